"""Slides for a class: `python docs/slides.py --notebooks 00 06 --output slides.html`.

One page of HTML that needs no network: a slide for each figure of the notebooks, with its heading, what to predict
before it is shown, and what should be seen. The arrow keys and a click turn the pages; `s` shows or hides the answer.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import nbformat
from markdown_it import MarkdownIt

from dbnb.files import whole

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
_IMAGE = re.compile(r'<img alt="[^"]*" src="data:image/[^"]+"[^>]*>')
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>dbnb: slides</title><style>
body {{ margin: 0; font: 2.4vmin/1.45 system-ui, sans-serif; color: #222; background: #fff; }}
section {{ display: none; box-sizing: border-box; height: 100vh; padding: 4vmin 6vmin; overflow: auto; }}
section.shown {{ display: flex; flex-direction: column; gap: 2vmin; }}
header {{ color: #777; }}
h1 {{ margin: 0; font-size: 5vmin; }}
h2 {{ margin: 0; font-size: 3.6vmin; }}
img {{ width: 100%; height: 62vh; object-fit: contain; object-position: left top; }}
p {{ margin: 0 0 1vmin; max-width: 100ch; }}
.seen {{ display: none; }}
.answers .seen {{ display: block; }}
@media print {{
  section {{ display: flex; flex-direction: column; page-break-after: always; }}
  .seen {{ display: block; }}
}}
</style></head><body>
{slides}
<script>
const slides = [...document.querySelectorAll("section")];
let at = Math.min(Number(location.hash.slice(1)) || 0, slides.length - 1);
function show(next) {{
  at = Math.max(0, Math.min(next, slides.length - 1));
  slides.forEach((slide, i) => slide.classList.toggle("shown", i === at));
  document.body.classList.remove("answers");
  location.hash = at;
}}
addEventListener("keydown", event => {{
  if (["ArrowRight", "PageDown", " "].includes(event.key)) show(at + 1);
  else if (["ArrowLeft", "PageUp"].includes(event.key)) show(at - 1);
  else if (event.key === "s") document.body.classList.toggle("answers");
}});
addEventListener("click", () => show(at + 1));
show(at);
</script></body></html>
"""


@dataclass
class Slide:
    """One figure, and what belongs to it, as HTML."""

    notebook: str
    heading: str
    image: str = ""
    predict: str = ""
    seen: str = ""

    def html(self) -> str:
        """The section of the page."""
        size = "h2" if self.image else "h1"
        seen = f'<div class="seen">{self.seen}</div>' if self.seen else ""
        parts = [f"<header>{escape(self.notebook)}</header>", f"<{size}>{escape(self.heading)}</{size}>"]
        return f"<section>{''.join([*parts, self.predict, self.image, seen])}</section>"


def _paragraph(markdown: str, start: str) -> str:
    """The paragraph that begins with these words, as HTML without links, or nothing."""
    for block in re.split(r"\n\s*\n", markdown):
        if block.startswith(start):
            return MarkdownIt().render(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", block))
    return ""


def slides(path: Path) -> Iterator[Slide]:
    """The slides of one notebook: its title, then one for each figure in its outputs."""
    cells = nbformat.read(path, as_version=4).cells
    title = heading = next(cell.source for cell in cells if cell.cell_type == "markdown").splitlines()[0].lstrip("# ")
    yield Slide(path.stem, title)
    predict, waiting = "", None
    for cell in cells:
        if cell.cell_type == "markdown":
            if waiting is not None:
                waiting.seen = _paragraph(cell.source, "**What you should see**")
                yield waiting
                waiting = None
            headings = re.findall(r"^##+ (.+)$", cell.source, flags=re.MULTILINE)
            heading = headings[-1] if headings else heading
            predict = _paragraph(cell.source, "**Predict**")
            continue
        for output in cell.get("outputs", []):
            for image in _IMAGE.findall("".join(output.get("data", {}).get("text/html", ""))):
                if waiting is not None:
                    yield waiting
                waiting, predict = Slide(title, heading, image, predict), ""
    if waiting is not None:
        yield waiting


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notebooks", nargs="+", metavar="NN", help="numbers, such as 00 00b 06 (default: all)")
    parser.add_argument("--output", type=Path, default=Path("build/slides.html"))
    args = parser.parse_args(argv)
    paths = {path.stem.split("_")[0]: path for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    wanted = args.notebooks or list(paths)
    if unknown := [number for number in wanted if number not in paths]:
        parser.error(f"--notebooks {unknown[0]} is none of {', '.join(paths)}.")
    pages = [slide.html() for number in wanted for slide in slides(paths[number])]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with whole(args.output) as temporary:
        temporary.write_text(_PAGE.format(slides="\n".join(pages)), encoding="utf-8")
    print(f"{len(pages)} slides: {args.output}")


if __name__ == "__main__":
    main()
