"""Tables that show themselves: as text in a terminal, as HTML in a notebook, as Markdown in a card."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from html import escape

# Line breaks, control characters, halves of a character; what turns the direction of the text around it.
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
# What Markdown, or GitHub's, reads as more than itself within a line; an underscore within a word is just that.
_MARKUP = re.compile(r"[\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w)")


def printable(text: str) -> str:
    """Any text on one line of a terminal or a file: what would break it, or act on a terminal, as `\\n` or `\\x1b`."""
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in UNPRINTABLE or letter in _TURNING
        else letter
        for letter in text
    )


def escape_markdown(text: str) -> str:
    """Any text as plain words within a line of Markdown, or within a cell of its tables."""
    return _MARKUP.sub(r"\\\g<0>", printable(text))


class Table(list[Mapping[str, str]]):
    """Rows with the same columns; the column names are the keys of the first row."""

    def __str__(self) -> str:
        if not self:
            return "(empty)"
        rows = [{key: printable(row[key]) for key in self[0]} for row in self]
        widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in self[0]}
        lines = ["  ".join(key.ljust(width) for key, width in widths.items())]
        lines += ["  ".join(row[key].ljust(width) for key, width in widths.items()) for row in rows]
        return "\n".join(line.rstrip() for line in lines)

    def markdown(self) -> str:
        """As a Markdown table, for a card."""
        rows = [list(self[0]) if self else [], *(list(row.values()) for row in self)]
        lines = ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in rows]
        return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])

    def _repr_html_(self) -> str:
        left = 'style="text-align:left"'  # notebooks align numbers, and so all cells, to the right
        head = "".join(f"<th {left}>{escape(key)}</th>" for key in (self[0] if self else ()))
        rows = ("".join(f"<td {left}>{escape(value)}</td>" for value in row.values()) for row in self)
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
