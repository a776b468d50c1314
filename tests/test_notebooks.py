"""The course as it is committed: both halves of each pair agree, outputs are whole, clean and light.

Once executed notebooks are there, nbval collects and runs `notebooks/` beside these tests.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
import torch
from families import write

from dbnb.adapters import add_adapters
from dbnb.config import DreamBoothConfig
from dbnb.dataset import DreamBoothDataset, cache_latents
from dbnb.models import load_components
from dbnb.training import train

FOLDER = Path(__file__).parent.parent / "notebooks"
SCRIPTS = sorted((FOLDER / "src").glob("*.py"))
by_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
by_notebook = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)


def _tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def test_the_notebooks_are_numbered_as_the_steps():
    numbers = [path.name.split("_")[0] for path in SCRIPTS]
    assert numbers == ["00", "00b", *(f"{number:02d}" for number in range(1, 12))]


@by_notebook
def test_script_and_notebook_are_the_same(path):
    halves = (jupytext.read(FOLDER / "src" / f"{path.stem}.py"), nbformat.read(path, as_version=4))
    script, notebook = [[(c.cell_type, c.source, _tags(c)) for c in half.cells] for half in halves]
    assert script == notebook


@by_notebook
def test_outputs_are_complete_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and "skip-execution" not in _tags(cell)]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert "widgets" not in notebook.metadata and not any("execution" in cell.metadata for cell in notebook.cells)
    assert path.stat().st_size <= 2**20
    assert not re.search(r"/root/|/home/|/Users/|/tmp/|hf_[A-Za-z0-9]{20}", path.read_text())


@by_notebook
def test_it_shows_pictures(path):
    outputs = [o for cell in nbformat.read(path, as_version=4).cells for o in cell.get("outputs", [])]
    assert sum("<img alt=" in output.get("data", {}).get("text/html", "") for output in outputs) >= 4


@by_script
def test_it_reads_as_a_lesson(script):
    cells = jupytext.read(script).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    lesson = [cell for cell in code if "dbnb.exercises" not in cell.source]
    assert 10 <= len(lesson) <= 35 and max(len(cell.source.splitlines()) for cell in code) <= 20
    for words in ("What you will do", "What you need", "On your own", "<details>", "In short"):
        assert words in prose
    assert sum("NBVAL_CHECK_OUTPUT" in cell.source for cell in code) >= 1
    for link in re.findall(r"\]\(([^)]+)\.ipynb\)", prose):
        assert (FOLDER / "src" / f"{link}.py").is_file(), link


@by_script
def test_links_within_a_notebook_lead_to_a_heading(script):
    prose = "\n".join(cell.source for cell in jupytext.read(script).cells if cell.cell_type == "markdown")
    # JupyterLab keeps the case of a heading, the book's pages do not: an id that both make is in lower case.
    headings = {heading.replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", prose, re.M) if heading.islower()}
    assert set(re.findall(r"\]\(#([^)]+)\)", prose)) <= {h for h in headings if re.fullmatch(r"[\w-]+", h)}


@by_script
def test_the_map_of_the_course_marks_the_notebook_that_it_is_in(script):
    marked = re.findall(r'plots\.you_are_here\("(\w+)"\)', script.read_text(encoding="utf-8"))
    assert set(marked) <= {script.name.split("_")[0]}


def test_the_first_cell_is_the_same_everywhere_and_works(tmp_path):
    firsts = {next(c.source for c in jupytext.read(script).cells if c.cell_type == "code") for script in SCRIPTS}
    assert len(firsts) == 1
    code = firsts.pop()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)  # dbnb is installed: nothing happens
    absent = "import importlib.util\nimportlib.util.find_spec = lambda name: None\n"
    outside = subprocess.run([sys.executable, "-c", absent + code], cwd=tmp_path, capture_output=True, text=True)
    assert outside.returncode != 0 and "set DBNB_SOURCE" in outside.stderr
    told = "import subprocess\nsubprocess.run = lambda command, check: print(command)\n"
    inside = subprocess.run([sys.executable, "-c", told + absent + code], cwd=FOLDER, capture_output=True, text=True)
    assert "pip" in inside.stdout and str(FOLDER.parent) in inside.stdout


def _loop(notebook: str) -> str:
    """The source of the cell that holds a notebook's training loop."""
    [script] = [script for script in SCRIPTS if script.name.startswith(notebook)]
    return next(cell.source for cell in jupytext.read(script).cells if "the-loop" in _tags(cell))


def test_the_loop_of_notebook_06_is_train(dataset, concept, tmp_path):
    config = DreamBoothConfig(
        max_train_steps=4,
        train_text_encoder=True,
        lr_scheduler="constant",
        output_dir=str(tmp_path),
        checkpointing_steps=0,
        validation_steps=0,
    )
    models = []
    for _ in range(2):
        components = load_components("miniature")
        add_adapters(components, rank=config.rank, train_text_encoder=True, seed=config.seed)
        models.append(components)
    names = dict(config=config, components=models[0], dataset=dataset, concept=concept)
    setup = "import torch\nfrom dbnb.adapters import trainable_parameters\n"
    setup += "from dbnb.training import batch_at, held_out_loss, training_step\nfrom dbnb.validation import draw\n"
    exec(setup + _loop("06"), names)
    train(config, models[1], dataset)
    for part in ("unet", "text_encoder"):
        states = [getattr(components, part).state_dict() for components in models]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_loop_of_notebook_11_is_train(concept, class_paths, tmp_path):
    dataset = DreamBoothDataset(
        concept.paths, concept.instance_prompt, class_paths=class_paths, class_prompt=concept.class_prompt, size=32
    )
    config = DreamBoothConfig(
        base=str(write("sd35", tmp_path / "base")),
        max_train_steps=4,
        train_batch_size=2,
        lr_scheduler="constant",
        tokenizer_max_length=16,
        output_dir=str(tmp_path / "run"),
        checkpointing_steps=0,
        validation_steps=0,
    )
    assert config.weighting_scheme == "logit_normal"  # which the loop has to hand on
    models = []
    for _ in range(2):
        components = load_components(config.base)
        cache_latents(dataset, components.vae)
        add_adapters(components, config.adapters)
        models.append(components)
    start = {name: value.clone() for name, value in models[0].denoiser.state_dict().items()}
    names = dict(config=config, components=models[0], dataset=dataset)
    setup = "import torch\nfrom dbnb.adapters import trainable_parameters\n"
    setup += "from dbnb.training import batch_at, training_step\n"
    exec(setup + _loop("11"), names)
    train(config, models[1], dataset)
    mine, theirs = (components.denoiser.state_dict() for components in models)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert any(not torch.equal(mine[name], start[name]) for name in mine)
