# Three commands matter: `make tutorial`, `make test`, and on a GPU `make gpu`. All set up .venv
# first; `make gpu GPU_PYTHON=python3` takes a Python that has PyTorch already.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
NBMAKE := TUTORIAL_PRESET=quick TUTORIAL_ARTIFACTS=$(CURDIR)/build/test-artifacts \
          $(BIN)/pytest --nbmake --nbmake-timeout=1800 notebooks

.PHONY: tutorial test gpu lab lint notebooks lock clean

tutorial: $(READY)  ## run the case study and print what came out
	$(BIN)/python -m helpers tutorial

test: $(READY) lint  ## everything: unit tests, then the notebooks from scratch and again
	$(BIN)/pytest
	rm -rf build/test-artifacts
	$(NBMAKE)
	$(NBMAKE)

gpu: $(if $(GPU_PYTHON),,$(READY))  ## check and measure a GPU; the next call goes on
	PYTHONPATH=$(CURDIR) $(or $(GPU_PYTHON),$(BIN)/python) benchmarks/gpu.py $(GPU_OPTIONS)

lab: $(READY)  ## open JupyterLab
	$(BIN)/jupyter lab notebooks

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
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# The site of notebooks, documentation and API. Its notebooks are shown with their stored outputs.
book: $(READY)  ## build/book: the notebooks, the documentation and the API as a site
	rm -rf docs/api build/book
	$(BIN)/sphinx-apidoc -q --separate --no-toc --templatedir docs/book/templates \
	    --output-dir docs/api helpers 'helpers/tutorial/answers*'
	$(BIN)/sphinx-build -W --keep-going --quiet -c docs/book . build/book
	$(BIN)/python docs/book/links.py build/book

# Pin every package, for each Python and platform at once.
lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet uv
	$(VENV)-lock/bin/uv pip compile --universal --python-version 3.11 --quiet \
	    --extra notebooks --extra serving --extra book --extra dev --no-emit-index-url --no-annotate \
	    pyproject.toml --output-file requirements.lock
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) artifacts build *.egg-info
