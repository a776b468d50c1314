"""Tables show the same cells as text, HTML and Markdown, and let no markup through."""

from __future__ import annotations

import unicodedata
from html.parser import HTMLParser

import pytest
import yaml
from huggingface_hub import ModelCardData
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from dbnb.tables import Table, escape_markdown, printable


def test_a_table_shows_itself_three_ways_and_escapes_markup():
    table = Table([{"part": "unet", "note": "<b>|x"}, {"part": "text_encoder", "note": ""}])
    assert str(table).splitlines() == ["part          note", "unet          <b>|x", "text_encoder"]
    assert "&lt;b&gt;" in table._repr_html_() and "<b>" not in table._repr_html_()
    assert table.markdown().splitlines() == [
        "| part | note |",
        "|---|---|",
        "| unet | \\<b\\>\\|x |",
        "| text_encoder |  |",
    ]
    assert str(Table()) == "(empty)"


_PLAIN = [
    "<edfe>",
    "<s0><s1>",
    "[V]",
    "a\u00a0b\u3000c\u200bd",
    "一张小明狗的照片",
    "*a* _b_ `c` ~~d~~",
    "[x](http://y)",
    "a|b",
    "a\\|b",
    "&lt;b&gt;",
    "$x$",
    "text_encoder",
    "a --- b: c # d",
    "'a' \"b\"",
    "- a",
    "1. a",
    "👩\u200d🚀",
]


def _cells(markdown: str) -> list[str]:
    """The text of a table's cells, as a reader sees it."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)
    return ["".join(child.content for child in token.children) for token in tokens if token.type == "inline"]


class _Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.cells, self.tags = [], []

    def handle_data(self, data):
        self.cells.append(data)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)


@pytest.mark.parametrize("words", _PLAIN)
def test_any_words_come_back_from_markdown_html_and_yaml(words):
    table = Table([{"option": "instance_prompt", "value": words}])
    assert _cells(table.markdown()) == ["option", "value", "instance_prompt", words.strip()]
    assert _cells(f"The prompt {escape_markdown(words)} draws it.") == [f"The prompt {words} draws it."]
    page = _Text()
    page.feed(table._repr_html_())
    assert page.cells[-1] == words and set(page.tags) == {"table", "tr", "th", "td"}
    assert yaml.safe_load(ModelCardData(base_model=words).to_yaml())["base_model"] == words
    assert printable(words) == words and str(table).splitlines()[1].endswith(words)


@given(st.text(st.characters(exclude_categories=[]), max_size=20))
def test_any_text_stays_on_its_line_and_in_its_cell(text):
    shown = printable(text)
    assert not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in shown)
    assert len(str(Table([{"a": text, "b": "end"}])).splitlines()) == 2
    cells = _cells(Table([{"a": f"x{text}x", "b": "end"}]).markdown())
    assert cells == ["a", "b", f"x{shown}x", "end"]


def test_what_acts_on_a_terminal_is_shown_as_what_it_is():
    for text, shown in (
        ("a\nb", r"a\nb"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\udce9.png", r"\udce9.png"),
        ("\u2028", r"\u2028"),
        ("a\u202eb", r"a\u202eb"),
    ):
        assert printable(text) == shown
