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
    lines = [list(rows[0])]
    for row in rows:
        lines.append([format_value(row.get(column)) for column in lines[0]])
    return lines


def _padded(lines: list[list[str]]) -> list[list[str]]:
    """Cells as wide as their column's widest: the first column flush left, all others flush right."""
    widths = [0] * len(lines[0])
    for line in lines:
        for column, cell in enumerate(line):
            widths[column] = max(widths[column], len(cell))
    padded = []
    for first, *others in lines:
        padded.append([first.ljust(widths[0])])
        for width, cell in zip(widths[1:], others, strict=True):
            padded[-1].append(cell.rjust(width))
    return padded
