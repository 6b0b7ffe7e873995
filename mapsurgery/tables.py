"""Tables for people: rich where it is installed, padded plain text where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO


def render(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], footer: str = "") -> str:
    """A table as text. Numbers are aligned to the right."""
    cells = [[_text(value) for value in row] for row in rows]
    numeric = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(columns))]
    try:
        body = _rich(title, columns, cells, numeric)
    except ModuleNotFoundError:
        body = _plain(title, columns, cells, numeric)
    return f"{body}\n{footer}" if footer else body


def _text(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rich(title: str, columns: Sequence[str], cells: list[list[str]], numeric: list[bool]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name, right in zip(columns, numeric, strict=True):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))  # Text: a path such as "layers[0]" is no markup
    out = StringIO()
    Console(file=out, width=160).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _plain(title: str, columns: Sequence[str], cells: list[list[str]], numeric: list[bool]) -> str:
    lines = [list(columns), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]

    def padded(line: list[str]) -> str:
        parts = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ]
        return "  ".join(parts).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([title, padded(lines[0]), rule, *map(padded, lines[1:])])
