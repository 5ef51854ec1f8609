"""The book and the slides: that nothing is missing from them, and that their links hold."""

import json
import re

import nbformat
import pytest

import links
import slides
from helpers.tutorial.exercises import judge_of
from helpers.tutorial.settings import project_root

ROOT = project_root()
TEACHING = (ROOT / "docs" / "teaching.md").read_text()
DECK = nbformat.read(slides.DECK, as_version=4)
SLIDES = [cell for cell in DECK.cells if cell.metadata.slideshow.slide_type == "slide"]
FIGURES = [figure for cell in SLIDES for figure in slides.FIGURE.findall(cell.source)]


def page(body: str) -> str:
    return f"<!DOCTYPE html><html><body>{body}</body></html>"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('<a href="b.html">', ""),
        ('<a href="b.html#here">', ""),
        ('<a href="#top"><h1 id="top">', ""),
        ('<a href="https://example.org/none">', ""),
        ('<a href="none.html">', "a.html: there is no file for none.html"),
        ('<img src="none.png">', "a.html: there is no file for none.png"),
        ('<a href="b.html#there">', "a.html: there is no such place: b.html#there"),
        ('<a href="#there">', "a.html: there is no such place: #there"),
    ],
)
def test_a_link_that_leads_nowhere_is_named(tmp_path, body, said):
    (tmp_path / "a.html").write_text(page(body))
    (tmp_path / "b.html").write_text(page('<h1 id="here">'))
    assert links.broken_links(tmp_path) == [said] * bool(said)


@pytest.mark.parametrize("figure", FIGURES, ids="/".join)
def test_every_figure_of_the_slides_is_stored_in_its_notebook(figure):
    assert slides.stored_figure(*figure).startswith("data:image/png;base64,iVBOR")


def test_a_figure_that_no_notebook_stores_is_named():
    with pytest.raises(SystemExit, match=r"02_prune_2_4\.ipynb stores no figure by plot_nothing"):
        slides.stored_figure("02", "plot_nothing")


def test_every_picture_of_the_slides_has_a_description_and_a_place():
    assert len(FIGURES) >= 10
    pictures = [each for cell in SLIDES for each in re.findall(r"!\[(.*?)\]\((.*?)\)", cell.source)]
    assert len(pictures) == len(FIGURES)
    assert all(text and slides.FIGURE.fullmatch(f"({target})") for text, target in pictures)


def test_every_slide_has_notes_for_the_speaker():
    kinds = [cell.metadata.slideshow.slide_type for cell in DECK.cells]
    assert kinds == ["slide", "notes"] * len(SLIDES)


def test_the_published_figures_on_the_slides_are_those_of_the_record():
    record = json.loads((ROOT / "data" / "reference" / "case_study.json").read_text())
    (text,) = (cell.source for cell in SLIDES if cell.id == "published")
    (reader,) = record["others"]
    for size, ms in reader["milliseconds"].items():
        times = f"| {ms['dense']:.3g} ms | {ms['sparse']:.3g} ms |"
        assert f"| InceptionV3 | {reader['gpu']} | {size} {times}" in text
    assert f"up to {record['largest_speedup']:.2f}x" in text


def test_the_teachers_page_knows_every_notebook_and_its_minutes_to_read():
    rows = dict(re.findall(r"^\| (\d\d[a-z]?)(?:, optional)? \| (\d+) \| ", TEACHING, re.M))
    assert len(rows) >= 10
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        number = path.name.partition("_")[0]
        assert f"\n### {number} · " in TEACHING
        first = nbformat.read(path, as_version=4).cells[0].source
        (minutes,) = re.findall(r"\*\*Time\*\* \|.*?(\d+) to read", first)
        assert rows.get(number, minutes) == minutes, number


def test_the_welcome_page_knows_every_notebook_and_its_minutes():
    welcome = (ROOT / "docs" / "welcome.md").read_text()
    rows = dict(re.findall(r"\(\.\./(notebooks/\w+\.ipynb)\) \|.*\| (\d+) \|$", welcome, re.M))
    assert len(rows) >= 10
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        first = nbformat.read(path, as_version=4).cells[0].source
        run, read = map(int, re.findall(r"(\d+)(?: minutes?)? to r", first.partition("Time")[2]))
        assert int(rows[f"notebooks/{path.name}"]) == run + read, path.name


@pytest.mark.parametrize(
    "name",
    [
        *re.findall(r"`(\d\d-[a-z0-9-]+)`", TEACHING),
        *(
            name
            for cell in DECK.cells
            for name in re.findall(r"xercise (\d\d-[a-z0-9-]+)", cell.source)
        ),
    ],
)
def test_the_exercises_that_the_teachers_page_and_the_slides_name_exist(name):
    assert judge_of(name)


def test_the_slides_of_the_schedules_exist():
    named = [int(number) for number in re.findall(r"\| slides? [\d to]*?(\d+) \|", TEACHING)]
    assert len(named) == 4
    assert max(named) == len(SLIDES)
