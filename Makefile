# Three commands matter: `make tutorial`, `make test`, and on a GPU `make gpu`. All set up .venv
# first; `make gpu GPU_PYTHON=python3` takes a Python that has PyTorch already.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
ONLY   := TUTORIAL_PRESET=quick TUTORIAL_ARTIFACTS=$(CURDIR)/build/test-artifacts

.PHONY: tutorial test solved browser gpu lab lint notebooks book slides wheelhouse wheelhouse-check lock clean

tutorial: $(READY)  ## run the case study and print what came out
	$(BIN)/python -m helpers tutorial

test: $(READY) lint  ## unit tests; the notebooks, then with solutions; book, slides; a browser
	$(BIN)/pytest
	rm -rf build/test-artifacts
	$(ONLY) $(BIN)/pytest --nbmake --nbmake-timeout=1800 notebooks
	$(MAKE) solved book slides browser

solved: $(READY)  ## the notebooks once more with the solutions filled in, after a first run
	$(ONLY) $(BIN)/pytest tests/solved

browser: $(READY)  ## what a learner does, in Chromium; screenshots in build/browser
	rm -rf build/browser
	$(BIN)/pytest --durations=0 tests/browser

gpu: $(if $(GPU_PYTHON),,$(READY))  ## check and measure a GPU; the next call goes on
	PYTHONPATH=$(CURDIR) $(or $(GPU_PYTHON),$(BIN)/python) benchmarks/gpu.py $(GPU_OPTIONS)

lab: $(READY)  ## learn: copies of the notebooks in JupyterLab; LAB_OPTIONS are those of jupyter lab
	$(BIN)/python -m helpers learn $(LAB_OPTIONS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(READY)  ## run the notebooks and save their outputs
	rm -f artifacts/quick/03_progress.pt  # so that notebook 03 shows a whole training
	$(BIN)/python -m helpers tutorial --save
	cp artifacts/quick/figures/02_pattern.png docs/images/pattern.png

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# The site of notebooks, documentation and API. Its notebooks are shown with their stored outputs.
book: $(READY)  ## build/book: the notebooks, the documentation and the API as a site
	rm -rf docs/api build/book build/doctrees
	$(BIN)/sphinx-apidoc -q --separate --no-toc --templatedir docs/book/templates \
	    --output-dir docs/api helpers 'helpers/tutorial/answers*'
	$(BIN)/sphinx-build -W --keep-going --quiet -d build/doctrees -c docs/book . build/book
	$(BIN)/python docs/book/links.py build/book

slides: $(READY)  ## build/slides/index.html: the slides of docs/teaching.md, with speaker notes
	rm -rf build/slides
	$(BIN)/python docs/book/slides.py build/slides

# For a room without network (docs/install.md). The check installs everything with no index.
wheelhouse:  ## build/wheelhouse: the wheel of every package in the lock
	rm -rf build/wheelhouse build/wheelhouse-pip
	$(PYTHON) -m venv build/wheelhouse-pip
	build/wheelhouse-pip/bin/pip wheel --quiet --requirement requirements.lock \
	    --wheel-dir build/wheelhouse
	rm -rf build/wheelhouse-pip

wheelhouse-check:
	rm -rf build/offline
	PIP_NO_INDEX=1 PIP_FIND_LINKS=$(CURDIR)/build/wheelhouse \
	    $(MAKE) VENV=build/offline build/offline/.ready
	build/offline/bin/python -m helpers setup
	rm -rf build/offline

# Pin every package, for each Python and platform at once.
lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet uv
	$(VENV)-lock/bin/uv pip compile --universal --python-version 3.11 --quiet \
	    --extra notebooks --extra serving --extra book --extra browser --extra dev \
	    --no-emit-index-url --no-annotate \
	    pyproject.toml --output-file requirements.lock
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) artifacts build *.egg-info
