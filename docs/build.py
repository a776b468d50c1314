"""Build the course's web site, docs/_build/html: `python docs/build.py`.

The pages are the committed notebooks with their outputs as they are; the first page draws with the miniature. Needs the
extra `[book]` and npm; nothing but npm's first call, which fetches what package-lock.json names, needs a network.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
from sphinx.cmd.build import build_main

from dbnb import export, workflow
from dbnb.config import DreamBoothConfig, parse_args
from dbnb.files import whole
from dbnb.models import fingerprint, resolve_base

DOCS = Path(__file__).parent
BUILD = DOCS / "_build"
HTML = BUILD / "html"
WIDGET = "application/vnd.jupyter.widget-view+json"


def repository() -> str:
    """owner/name on GitHub: the one setting from which all links are made."""
    return tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["dbnb"]["repository"]


def node_modules() -> Path:
    """The packages of package-lock.json, installed if they are not. Raises FileNotFoundError where npm is missing."""
    folder = DOCS / "node_modules"
    lock, installed = DOCS / "package-lock.json", folder / ".package-lock.json"
    if not installed.is_file() or installed.stat().st_mtime < lock.stat().st_mtime:
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError("There is no npm, which fetches what the live page runs on: install Node.js.")
        subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=DOCS, check=True)
        installed.touch()
    return folder


def sample_adapter(config: DreamBoothConfig) -> Path:
    """The adapter of the default run on the sample subject; a run that the cache holds is not trained again."""
    folder = BUILD / "adapter"
    folder.mkdir(parents=True, exist_ok=True)
    return export.save_adapters(workflow.trained(config, tell=print).components, folder)


def exported(config: DreamBoothConfig, adapter: Path) -> Path:
    """The folder of the graphs, made anew only where the base, the adapter or the exporter has changed."""
    key = hashlib.sha256(fingerprint(resolve_base(config.base)).encode())
    for path in (adapter, DOCS / "export_onnx.py"):
        key.update(path.read_bytes())
    folder = BUILD / "models" / key.hexdigest()[:16]
    if not (folder / "model.json").is_file():  # written last
        from export_onnx import export_model

        export_model(config, adapter, folder)
    return folder


def playground(packages: Path, model: Path) -> None:
    """What the live page loads besides its text: scripts, styles, the runtime and the model."""
    target = HTML / "playground"
    for pattern in ("*.js", "*.css"):
        for path in (DOCS / "playground").glob(pattern):
            shutil.copyfile(path, target / path.name)
    shutil.copytree(model, target / "model")
    (target / "ort").mkdir()
    runtime = packages / "onnxruntime-web" / "dist"
    shutil.copyfile(runtime / "ort.wasm.bundle.min.mjs", target / "ort" / "ort.wasm.bundle.min.mjs")
    wasm = runtime / "ort-wasm-simd-threaded.wasm"
    (target / "ort" / f"{wasm.name}.gz").write_bytes(gzip.compress(wasm.read_bytes(), mtime=0))


def page(notebook: Path) -> nbformat.NotebookNode:
    """A notebook as the book shows it: with links under its title, and a sentence where a widget would stand."""
    content = nbformat.read(notebook, as_version=4)
    title, _, rest = content.cells[0].source.partition("\n")
    colab = f"https://colab.research.google.com/github/{repository()}/blob/main/notebooks/{notebook.name}"
    links = f'<a href="{colab}">Open in Colab</a><a href="{notebook.name}" download>Download the notebook</a>'
    content.cells[0].source = f'{title}\n\n<div class="links">{links}</div>\n{rest}'
    for cell in content.cells:
        for output in cell.get("outputs", ()):
            if WIDGET in output.get("data", {}):
                output.data = {"text/plain": "Sliders and buttons stand here where the notebook runs."}
    return content


def stage(folder: Path) -> None:
    """Sphinx's sources: the first page's text, and the notebooks."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS / "playground", folder / "playground", ignore=lambda _, names: [n for n in names if n.endswith((".js", ".css"))])
    (folder / "notebooks").mkdir()
    for notebook in sorted((DOCS.parent / "notebooks").glob("*.ipynb")):
        nbformat.write(page(notebook), folder / "notebooks" / notebook.name)


def book(packages: Path) -> None:
    """Run Sphinx; a warning ends the build. Raises RuntimeError then."""
    source, static = BUILD / "source", BUILD / "static"
    stage(source)
    shutil.rmtree(static, ignore_errors=True)
    shutil.copytree(DOCS / "theme", static)
    (static / "mathjax").mkdir()
    shutil.copyfile(packages / "mathjax" / "es5" / "tex-svg.js", static / "mathjax" / "tex-svg.js")
    shutil.rmtree(HTML, ignore_errors=True)
    os.environ["DBNB_BOOK"] = json.dumps({"repository": repository(), "static": str(static)})
    options = ["-b", "html", "-c", str(DOCS), "-d", str(BUILD / "doctrees"), "-W", "--keep-going", "-q"]
    if build_main([*options, str(source), str(HTML)]):
        raise RuntimeError("Sphinx has warned: mend what is named above.")
    for notebook in (DOCS.parent / "notebooks").glob("*.ipynb"):
        shutil.copyfile(notebook, HTML / "notebooks" / notebook.name)
    first = '<!doctype html><meta charset="utf-8"><title>dbnb</title><meta http-equiv="refresh" content="0; url=playground/index.html">'
    (HTML / "index.html").write_text(first, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, help="an adapter file to draw with; without, the default run's")
    args = parser.parse_args(argv)
    workflow.quiet_libraries()
    config = parse_args([])
    try:
        packages = node_modules()
        model = exported(config, args.adapter or sample_adapter(config))
        book(packages)
        playground(packages, model)
    except (OSError, ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"docs/build.py: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in (HTML / "playground").rglob("*") if path.is_file())
    print(f"{HTML / 'playground' / 'index.html'}: the live page loads {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
