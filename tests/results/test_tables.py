"""One layout: columns by their decimal points, and the same in HTML."""

from pyproelbo._results.tables import Number, Row, Table, as_html, as_text, row


def test_numbers_and_errors_stand_by_their_decimal_points():
    rows = [
        row("all", -123.4, 0.0123, "(most)"),
        row("  one", 5.0),
        row("  few", 1.0, 12.3),
        row("count", 12345),
        Row("active", ("2 of 3",), "(no number)"),
        row("none", float("nan")),
    ]
    assert as_text(Table("Parts, nats", rows)).splitlines() == [
        "Parts, nats",
        "all       -123.400  ±  0.012  (most)",
        "  one        5.0000",
        "  few        1.00   ± 12.30",
        "count   12,345",
        "active       2 of 3           (no number)",
        "none        unknown",
    ]


def test_columns_have_heads_and_empty_cells():
    rows = [Row("a", (Number(1.0, 0.1), None, 3)), Row("b", (None, Number(2.0)))]
    assert as_text(Table("Two", rows, ("name", "first", "second", "third"))).splitlines() == [
        "Two",
        "name        first  second  third",
        "a     1.00 ± 0.10              3",
        "b                  2.0000",
    ]
    assert as_text(Table("Nothing", [])) == "Nothing"


def test_html_has_the_same_numbers_and_nothing_of_the_labels():
    rows = [Row("  <b>", (Number(1.0, 0.1), 1234)), Row("b & c", (), "<i>")]
    html = as_html(Table("x < y", rows, ("name", "<", ">")))
    for text in ("x &lt; y", "&lt;b&gt;", "1.00 ± 0.10", "1,234", "b &amp; c", "&lt;i&gt;"):
        assert f">{text}<" in html
    assert html.count("<tr>") == html.count("</tr>") == 3
    assert html.count("<td") == html.count("</td>") == 8  # as many in each row
    assert "<b>" not in html and "<i>" not in html
