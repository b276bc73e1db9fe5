"""Tables of measurements: Markdown for cards and documents, plain text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Rows = Sequence[Mapping[str, object]]
"""Lines of a table: column -> value. The columns are the first row's keys; what a row lacks is shown as "-"."""


def markdown_table(rows: Rows, aligned: bool = False) -> str:
    """A Markdown table; `aligned` pads its cells for people who read the source."""
    lines = _formatted(rows)
    if aligned:
        lines = _padded(lines)
    lines.insert(1, ["-" * max(3, len(name)) for name in lines[0]])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text_table(rows: Rows) -> str:
    """The same without any markup: names on the left, values on the right of their columns."""
    return "\n".join("  ".join(line) for line in _padded(_formatted(rows)))


def format_value(value: object) -> str:
    """Four significant digits of a float, thousands separated; "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        # Beyond four digits ".4g" would turn to powers of ten.
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _formatted(rows: Rows) -> list[list[str]]:
    """Names of the columns, then the cells of every row."""
    columns = list(rows[0])
    return [columns, *([format_value(row.get(column)) for column in columns] for row in rows)]


def _padded(lines: list[list[str]]) -> list[list[str]]:
    """Cells as wide as their column's widest: the first column flush left, all others flush right."""
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    padded = []
    for first, *others in lines:
        right = [cell.rjust(width) for width, cell in zip(widths[1:], others, strict=True)]
        padded.append([first.ljust(widths[0]), *right])
    return padded
