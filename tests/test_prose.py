"""The prose of README, docs and notebooks: proselint's rules, and those of this house by name."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# proselint.json leaves out what does not fit technical prose: curly quotes, `color` beside colour, "that very toy".
CONFIG = Path(__file__).with_name("proselint.json")

# What reads as stiff or is no English of the field, and what to write instead.
RULES = {
    "anew": (r"\banew\b", "again"),
    "whoever": (r"\bwhoever\b", "anyone who"),
    "one's own": (r"\bone's own\b", "your own"),
    "but for": (r"\bbut for\b", "except for"),
    "can be had": (r"\bcan(not)? be had\b", "is available"),
    "archaic": (r"\b(whence|thereof|wherein|therein|lest|amidst|upon|shall|hitherto)\b", "a plain word"),
    "doubled word": (r"\b(the|a|an|of|in|to|and|is|that) \1\b", "the word once"),
}


def prose(text: str) -> str:
    """Markdown without code, pictures, links' addresses, tables, formulas, shapes and tags."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", "x", text, flags=re.DOTALL)
    numbers = itertools.count()
    text = re.sub(r"`[^`]*`", lambda _: f"code{next(numbers)}", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<[^>]+>|\d+ x( \d+ x)* \d+", "", text)
    return "\n".join("" if line.lstrip().startswith("|") else line for line in text.splitlines())


def source(path: Path) -> str:
    """The prose of a page or of a notebook's cells."""
    if path.suffix != ".ipynb":
        return prose(path.read_text(encoding="utf-8"))
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(prose("".join(cell["source"])) for cell in cells if cell["cell_type"] == "markdown")


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {path.name: source(path) for path in (*PAGES, *NOTEBOOKS)}


def test_proselint_finds_nothing(texts, tmp_path):
    files = []
    for name, text in texts.items():
        files.append(tmp_path / f"{name}.md")
        files[-1].write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "proselint", "check", "--config", str(CONFIG), *map(str, files)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert not found.stdout and not found.stderr, found.stdout + found.stderr


@pytest.mark.parametrize("name", RULES)
def test_no_words_that_read_as_stiff(texts, name):
    pattern, instead = RULES[name]
    code = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted((ROOT / "dbnb").rglob("*.py"))
    }
    found = [
        f"{where}: … {text[max(0, match.start() - 40) : match.end() + 20]!r}"
        for where, text in (texts | code).items()
        for match in re.finditer(pattern, text, flags=re.IGNORECASE)
    ]
    assert not found, f"write {instead!r}:\n" + "\n".join(found)


def test_the_rules_find_what_they_are_for(tmp_path):
    for name, sentence in {
        "anew": "It is drawn anew.",
        "whoever": "Whoever loads it",
        "one's own": "one's own toy",
        "but for": "all but for one",
        "can be had": "it cannot be had",
        "archaic": "the shape thereof",
        "doubled word": "of the the toy",
    }.items():
        assert re.search(RULES[name][0], sentence, flags=re.IGNORECASE)
    page = tmp_path / "page.md"
    page.write_text("It is a free gift, and it is very unique.\n")
    command = [sys.executable, "-m", "proselint", "check", "--config", str(CONFIG), str(page)]
    assert "redundancy" in subprocess.run(command, capture_output=True, text=True).stdout
