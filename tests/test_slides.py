"""Slides show each figure of the notebooks once, and need no network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _slides(folder: Path, *numbers: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "docs/slides.py", "--output", str(folder / "slides.html"), "--notebooks", *numbers]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_each_figure_of_a_notebook_is_on_a_slide_of_its_own(tmp_path):
    done = _slides(tmp_path, "01", "06")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "slides.html").read_text()
    figures = []
    for name in ("01_instance_data", "06_training"):
        source = (ROOT / "notebooks" / f"{name}.ipynb").read_text()
        figures += re.findall(r'<img alt=\\"([^"]*)\\" src=\\"data:image', source)  # those of views have a width
    sections = re.findall(r"<section>.*?</section>", page, flags=re.DOTALL)
    assert len(sections) == len(figures) + 2  # two titles
    shown = [alt for section in sections for alt in re.findall(r'<img alt="(.*?)" src="data', section)]
    assert shown == figures and max(section.count("<img") for section in sections) == 1
    assert "<strong>Predict</strong>" in page and "<strong>What you should see</strong>" in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_notebook_that_is_not_there_is_named(tmp_path):
    done = _slides(tmp_path, "01", "42")
    assert done.returncode == 2 and "--notebooks 42 is none of 00, 00b, 01" in done.stderr
    assert not (tmp_path / "slides.html").exists()
