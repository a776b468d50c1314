"""The pages in docs/ and the notebooks agree: terms and links; and what is written is spelled right."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

ROOT = Path(__file__).parents[1]
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
ENTRY = re.compile(
    r"^## ([^\n]+)\n\n([^#]+?)\n\nTaught in \[[^]]+\]\(\.\./notebooks/(\d\d[a-z]?_\w+)\.ipynb\)\.$", re.M
)
TERMS = {term: (sentence, notebook) for term, sentence, notebook in ENTRY.findall(GLOSSARY)}
SCRIPTS = sorted((ROOT / "notebooks" / "src").glob("*.py"))


@functools.cache
def _prose(notebook: str) -> str:
    cells = jupytext.read(ROOT / "notebooks" / "src" / f"{notebook}.py").cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def _anchor(heading: str) -> str:
    """What GitHub and JupyterLab make of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_the_glossary_is_sorted_and_whole():
    headings = re.findall(r"^## (.+)$", GLOSSARY, re.M)
    assert headings == list(TERMS) == sorted(TERMS, key=str.lower) and len(headings) > 50


@pytest.mark.parametrize("term", TERMS)
def test_a_term_has_one_sentence_and_is_linked_in_the_notebook_that_teaches_it(term):
    sentence, notebook = TERMS[term]
    assert sentence.endswith(".") and not re.search(r"(?<!al)\. [A-Z]", sentence)
    prose = _prose(notebook)
    assert f"](../docs/glossary.md#{_anchor(term)})" in prose
    words = re.sub(r"[*\[\]]|\(\.\./docs/glossary.md#[\w-]+\)", "", prose).lower()
    assert term.lower() in re.sub(r"\s+", " ", words)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_links_to_the_glossary_lead_to_a_term(script):
    anchors = re.findall(r"\]\(\.\./docs/glossary\.md#([\w-]+)\)", _prose(script.stem))
    assert anchors and len(set(anchors)) == len(anchors)
    assert set(anchors) <= {_anchor(term) for term in TERMS}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_links_lead_to_files_of_the_project(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_page_for_teachers_has_questions_for_every_notebook(script):
    title = re.match(r"# (.*?):", jupytext.read(script).cells[0].source)[1]
    page = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
    questions = page.split(f"### {title}\n")[1].split("\n### ")[0]
    assert len(re.findall(r"^\d+\. .*\?$", questions, re.M)) >= 4


def test_codespell_finds_no_slips_in_prose_and_code():
    paths = ["README.md", "docs", "dbnb", "notebooks", "tests", "pyproject.toml"]
    command = [sys.executable, "-m", "codespell_lib", *paths]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")
