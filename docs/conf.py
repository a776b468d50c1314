"""Sphinx settings of the book; `python docs/build.py` is the command."""

from __future__ import annotations

import json
import os

book = json.loads(os.environ["DBNB_BOOK"])  # set by build.py

project = "dbnb"
author = "the authors of dbnb"
extensions = ["myst_nb"]
root_doc = "playground/index"
html_title = "dbnb"
html_favicon = f"{book['static']}/favicon.png"
html_theme = "furo"
html_theme_options = {
    "top_of_page_buttons": [],
    "footer_icons": [
        {"name": "Repository", "url": f"https://github.com/{book['repository']}", "html": "Repository", "class": ""}
    ],
}
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_use_index = False
html_static_path = [book["static"]]
html_css_files = ["book.css"]
myst_heading_anchors = 2  # the terms of the glossary
myst_enable_extensions = ["attrs_block", "dollarmath"]
nb_execution_mode = "off"
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
mathjax_path = "mathjax/tex-svg.js"
pygments_style = "tango"
pygments_dark_style = "github-dark"
