"""Tables show the same cells as text, HTML and Markdown, and let no markup through."""

from __future__ import annotations

from dbnb.tables import Table


def test_a_table_shows_itself_three_ways_and_escapes_markup():
    table = Table([{"part": "unet", "note": "<b>|x"}, {"part": "text_encoder", "note": ""}])
    assert str(table).splitlines() == ["part          note", "unet          <b>|x", "text_encoder"]
    assert "&lt;b&gt;" in table._repr_html_() and "<b>" not in table._repr_html_()
    assert table.markdown().splitlines() == [
        "| part | note |", "|---|---|", "| unet | <b>\\|x |", "| text_encoder |  |"
    ]  # fmt: skip
    assert str(Table()) == "(empty)"
