"""The project's files agree with each other."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for line in [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]]


def _constraints(name: str) -> dict[str, Version]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints" / name).read_text().splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {name.lower().replace("_", "-"): Version(version) for name, version in pairs}


def test_constraints_pin_every_dependency_at_or_above_its_floor():
    pinned = _constraints("linux-cpu.txt")
    for requirement in _requirements():
        name = requirement.name.lower().replace("_", "-")
        assert name in pinned, f"{name} is not in constraints/linux-cpu.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} against {pinned[name]}"


def test_what_colab_has_is_at_or_above_every_floor():
    pinned, names = _constraints("colab.txt"), set()
    for requirement in _requirements():
        name = requirement.name.lower().replace("_", "-")
        if name in pinned:
            names.add(name)
            assert requirement.specifier.contains(pinned[name]), f"{requirement} against {pinned[name]}"
    assert {"diffusers", "transformers", "peft", "accelerate", "ipywidgets"} <= names


def test_environment_takes_everything_from_pyproject_under_the_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [line for line in environment["dependencies"] if isinstance(line, str)]
    assert {re.split("[=<>]", line)[0] for line in plain} == {"python", "pip"}
    python = next(line for line in plain if line.startswith("python")).split("=")[1]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python)
    [pip] = [line["pip"] for line in environment["dependencies"] if isinstance(line, dict)]
    index = "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert pip == ["-c constraints/linux-cpu.txt", index, "-e .[jupyter]"] and index in (ROOT / "README.md").read_text()
    assert "jupyter" in PROJECT["optional-dependencies"]


def test_ci_runs_the_commands_of_the_readme():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in (
        "pip install -c constraints/linux-cpu.txt -e . && python -m dbnb",
        'pip install -c constraints/linux-cpu.txt -e ".[test]" && pytest -n auto --dist loadfile',
        'pip install -c constraints/colab.txt -e ".[test]" && '
        'pytest tests -n auto --dist loadfile -m "quick or commands" --cov',
    ):
        assert command in readme
        assert command.replace("pip install", "pip install --quiet") in ci


def test_the_readmes_measured_tables_are_those_of_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    readme = (ROOT / "README.md").read_text()
    assert importlib.import_module("results").filled(readme) == readme
    assert readme.count("<!-- measured: ") >= 2


def test_help_names_the_options_of_the_contract():
    output = subprocess.run(
        [sys.executable, "-m", "dbnb", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    for name in (
        "base instance_data_dir class_word identifier num_class_images class_data_dir train_batch_size rank "
        "learning_rate num_validation_images resolution checkpointing_steps max_train_steps seed center_crop "
        "with_prior_preservation train_text_encoder resume_from_checkpoint output_dir"
    ).split():
        assert f"--{name}" in output


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, dbnb; print([m for m in ('torch', 'diffusers', 'numba', 'matplotlib') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert output.strip() == "[]"


_MODULES = sorted((ROOT / "dbnb").glob("*.py"))


@pytest.mark.parametrize("path", _MODULES, ids=lambda path: path.stem)
def test_text_is_read_and_written_as_utf8_whatever_the_locale(path):
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = getattr(call.func, "attr", getattr(call.func, "id", "")) if isinstance(call, ast.Call) else ""
        if name in ("read_text", "write_text") or (name == "open" and ast.unparse(call.func) != "Image.open"):
            modes = [word.value for word in call.args if isinstance(word, ast.Constant)]
            binary = any(isinstance(mode, str) and "b" in mode for mode in modes)
            assert binary or "encoding" in {word.arg for word in call.keywords}, f"{path.name}:{call.lineno}"


_SOURCES = sorted(path for part in ("dbnb", "tests", "notebooks") for path in (ROOT / part).rglob("*.py"))


def test_the_formatter_is_switched_off_in_tables_of_data_alone():
    off = re.compile(r"#\s*fmt:\s*(?:skip|off)(.*)")
    found = [match[1] for path in _SOURCES for match in off.finditer(path.read_text(encoding="utf-8"))]
    assert all("table of data" in reason for reason in found), found


@pytest.mark.parametrize("path", sorted((ROOT / "dbnb").rglob("*.py")), ids=lambda path: path.stem)
def test_no_function_takes_more_than_eight_arguments(path):
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef):
            arguments = function.args
            names = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
            assert len(names - {"self", "cls", "ctx"}) <= 8, f"{path.name}:{function.lineno} {function.name}"


def _layers() -> list[str]:
    """The modules in the order of the table in docs/architecture.md."""
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## What may import what")[1]
    rows = re.findall(r"^\| (`[^|]+) \|", table.split("##")[0], flags=re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]


def _imports(path: Path, modules: list[str]) -> set[str]:
    """The package's modules that a file imports, at its top or within functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dbnb":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}".removeprefix("dbnb.")
                found.add(whole if whole in modules else node.module.removeprefix("dbnb."))
    return found - {"dbnb"}


def test_modules_import_only_what_stands_above_them_in_the_architecture():
    modules = _layers()
    paths = {path: path.relative_to(ROOT / "dbnb").with_suffix("") for path in (ROOT / "dbnb").rglob("*.py")}
    names = {path: ".".join(parts.parts).removesuffix(".__init__") for path, parts in paths.items()}
    names = {path: name for path, name in names.items() if name != "__init__"}
    assert sorted(modules) == sorted(names.values())
    for path, name in names.items():
        above = modules[: modules.index(name)]
        assert _imports(path, modules) <= {*above, name}, f"{name} imports {_imports(path, modules) - {*above, name}}"


def test_the_package_lists_its_modules():
    import dbnb

    modules = {path.stem for path in (ROOT / "dbnb").glob("*.py")} | {"exercises", "miniature", "toybox"}
    assert sorted(dbnb.__all__) == sorted(modules - {"__init__", "__main__"})
    assert all(getattr(dbnb, name).__doc__ for name in dbnb.__all__)


@pytest.mark.parametrize("path", _MODULES, ids=lambda path: path.stem)
def test_a_module_that_is_built_in_a_notebook_is_used_there(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    for number in re.findall(r"[Bb]uilt in\s+notebook (\d\d)", docstring):
        [script] = (ROOT / "notebooks" / "src").glob(f"{number}_*.py")
        imported = re.findall(r"^from dbnb(?:\.(\w+))? import (.+)$", script.read_text(encoding="utf-8"), re.M)
        names = {module or name.strip() for module, names in imported for name in names.split(",")}
        assert path.stem in names, f"notebook {number} does not import dbnb.{path.stem}"
