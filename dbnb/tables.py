"""Tables that show themselves: as text in a terminal, as HTML in a notebook, as Markdown in a card."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape


class Table(list[Mapping[str, str]]):
    """Rows with the same columns; the column names are the keys of the first row."""

    def __str__(self) -> str:
        if not self:
            return "(empty)"
        widths = {key: max(len(key), *(len(row[key]) for row in self)) for key in self[0]}
        lines = ["  ".join(key.ljust(width) for key, width in widths.items())]
        lines += ["  ".join(row[key].ljust(width) for key, width in widths.items()) for row in self]
        return "\n".join(line.rstrip() for line in lines)

    def markdown(self) -> str:
        """As a Markdown table, for a card."""
        rows = [list(self[0]) if self else [], *(list(row.values()) for row in self)]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])

    def _repr_html_(self) -> str:
        left = 'style="text-align:left"'  # notebooks align numbers, and so all cells, to the right
        head = "".join(f"<th {left}>{escape(key)}</th>" for key in (self[0] if self else ()))
        rows = ("".join(f"<td {left}>{escape(value)}</td>" for value in row.values()) for row in self)
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
