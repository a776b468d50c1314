"""Build the course's web site, docs/_build/html: `python docs/build.py`.

The pages are the committed notebooks with their outputs as they are; the first page draws with the miniature. Needs the
extra `[book]` and npm. Only the first call, which installs what package-lock.json names, needs a network.
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
from PIL import Image

from dbnb import export, workflow
from dbnb.config import DreamBoothConfig
from dbnb.models import fingerprint, load_components
from dbnb.toybox.sample import SAMPLE_DIR

DOCS = Path(__file__).parent
NOTEBOOKS = sorted((DOCS.parent / "notebooks").glob("*.ipynb"))
LOADED = ("*.js", "*.css")  # what the live page's text loads
WIDGET = "application/vnd.jupyter.widget-view+json"
TO_FIRST_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="refresh" content="0; url=playground/index.html">
<link rel="icon" href="_static/favicon.png">
<title>dbnb</title>
<a href="playground/index.html">The first page</a>
"""


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
            raise FileNotFoundError("There is no npm, which installs what the live page runs on: install Node.js.")
        subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=DOCS, check=True)
        installed.touch()
    return folder


def sample_adapter(config: DreamBoothConfig, folder: Path) -> Path:
    """The adapter of the default run on the sample subject; a run that the cache holds is not trained again."""
    folder.mkdir(parents=True, exist_ok=True)
    return export.save_adapters(workflow.trained(config, tell=print).components, folder)


def page(notebook: Path) -> nbformat.NotebookNode:
    """A notebook as the book shows it: with links under its title, and a sentence where a widget would stand."""
    content = nbformat.read(notebook, as_version=4)
    title, _, rest = content.cells[0].source.partition("\n")
    colab = f"https://colab.research.google.com/github/{repository()}/blob/main/notebooks/{notebook.name}"
    links = f'<a href="{colab}">Open in Colab</a><a href="{notebook.name}" download>Download the notebook</a>'
    content.cells[0].source = f'{title}\n\n<div class="links">{links}</div>\n{rest}'
    for cell in content.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if data.pop(WIDGET, None) and not {"text/html", "image/png"} & data.keys():  # nothing to see in its place
                output.data = {"text/plain": "Sliders and buttons stand here where the notebook runs."}
    return content


def stage(packages: Path, source: Path, static: Path) -> None:
    """Write Sphinx's sources, and the files that it copies as they are."""
    for folder in (source, static):
        shutil.rmtree(folder, ignore_errors=True)
    (source / "notebooks").mkdir(parents=True)
    for notebook in NOTEBOOKS:
        nbformat.write(page(notebook), source / "notebooks" / notebook.name)
    (source / "docs").mkdir()
    shutil.copy(DOCS / "glossary.md", source / "docs")  # at the place that the notebooks link to
    shutil.copytree(DOCS / "playground", source / "playground", ignore=shutil.ignore_patterns(*LOADED))
    shutil.copytree(SAMPLE_DIR / "photos", source / "playground" / "photos")
    shutil.copytree(DOCS / "theme", static)
    (static / "mathjax").mkdir()
    shutil.copy(packages / "mathjax" / "es5" / "tex-svg.js", static / "mathjax")
    with Image.open(SAMPLE_DIR / "photos" / "01.png") as photograph:
        photograph.resize((64, 64)).save(static / "favicon.png")


def write_book(packages: Path, build: Path, html: Path) -> None:
    """The pages. A warning of Sphinx's ends the build, as a RuntimeError."""
    from sphinx.cmd.build import build_main  # of the extra alone

    stage(packages, build / "source", build / "static")
    os.environ["DBNB_BOOK"] = json.dumps({"repository": repository(), "static": str(build / "static")})
    options = ["-b", "html", "-c", str(DOCS), "-d", str(build / "doctrees"), "-W", "--keep-going", "-q"]
    if build_main([*options, str(build / "source"), str(html)]):
        raise RuntimeError("Sphinx has warned: mend what is named above.")
    for notebook in NOTEBOOKS:
        shutil.copy(notebook, html / "notebooks")
    (html / "index.html").write_text(TO_FIRST_PAGE, encoding="utf-8")


def write_model(config: DreamBoothConfig, adapter: Path, build: Path, target: Path) -> None:
    """What the live page draws with: graphs, adapter, tokenizer, and a description of them.

    The graphs are made anew only where the base, the adapter's shapes or the exporter have changed.
    """
    import export_onnx  # of the extra alone

    components, layers = load_components(config.base), export_onnx.read_adapter(adapter)
    decides = (fingerprint(components.base), sorted(layers.items()), Path(export_onnx.__file__).read_text("utf-8"))
    graphs = build / "graphs" / hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
    if not (graphs / "unet.onnx").is_file():
        graphs.mkdir(parents=True, exist_ok=True)
        export_onnx.export_graphs(components, layers, graphs)
    description = export_onnx.description(components, layers, config)
    shutil.copytree(graphs, target)
    shutil.copy(components.base / "tokenizer" / "tokenizer.json", target)
    shutil.copyfile(adapter, target / "adapter.safetensors")
    (target / "model.json").write_text(json.dumps(description), encoding="utf-8")


def write_page(packages: Path, target: Path) -> None:
    """What the live page loads besides: scripts, style and the runtime."""
    for pattern in LOADED:
        for path in (DOCS / "playground").glob(pattern):
            shutil.copy(path, target)
    (target / "ort").mkdir()
    runtime = packages / "onnxruntime-web" / "dist"
    shutil.copy(runtime / "ort.wasm.bundle.min.mjs", target / "ort")
    wasm = runtime / "ort-wasm-simd-threaded.wasm"
    (target / "ort" / f"{wasm.name}.gz").write_bytes(gzip.compress(wasm.read_bytes(), mtime=0))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, help="an adapter of the sample subject; without, the default run's")
    parser.add_argument("--output_dir", type=Path, default=DOCS / "_build", help="the site is html/ in it")
    args = parser.parse_args(argv)
    workflow.quiet_libraries()
    config, build = DreamBoothConfig(), args.output_dir.resolve()
    site, new = build / "html", build / "html.new"
    shutil.rmtree(new, ignore_errors=True)
    try:
        packages = node_modules()
        adapter = args.adapter or sample_adapter(config, build / "adapter")
        write_book(packages, build, new)
        write_model(config, adapter, build, new / "playground" / "model")
        write_page(packages, new / "playground")
    except ModuleNotFoundError as error:
        print(f'docs/build.py: {error}: pip install -e ".[book]"', file=sys.stderr)
        return 2
    except (OSError, ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"docs/build.py: {error}", file=sys.stderr)
        return 2
    shutil.rmtree(site, ignore_errors=True)
    new.rename(site)  # whole or not at all
    first = site / "playground" / "index.html"
    size = sum(path.stat().st_size for path in first.parent.rglob("*") if path.is_file())
    print(f"{first}: {size / 1e6:.1f} MB to draw with")
    return 0


if __name__ == "__main__":
    sys.exit(main())
