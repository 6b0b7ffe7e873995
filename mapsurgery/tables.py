"""Tables for people: in a terminal as wide as it is, elsewhere whole, and in notebooks as HTML.

The frame is rich's where it is installed, and plain text where it is not.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from io import StringIO
from unicodedata import combining, east_asian_width

_NARROWEST = 10
"""Characters that a column of text keeps, if it has as many."""


@dataclass(frozen=True)
class Table:
    """Rows of values under heads. Columns of numbers are aligned to the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    def __str__(self) -> str:
        """As text. In a terminal, long cells are wrapped, and what is too wide even so comes in several parts."""
        cells = [[_text(value) for value in row] for row in self.rows]
        columns = list(map(_text, self.columns))
        numeric = self._numeric()
        draw, frame, gap = (_rich, 4, 3) if find_spec("rich") else (_plain, 0, 2)
        parts: list[str] = []
        for chosen, widths in _parts(columns, cells, numeric, _terminal_width(), frame, gap):
            kept = [[row[i] for i in chosen] for row in cells]
            names = [columns[i] for i in chosen]
            parts.append(draw(names, kept, [numeric[i] for i in chosen], widths))
        return "\n".join([*([wrapped([self.title])] if self.title else []), *parts])

    def html(self) -> str:
        """As a piece of HTML that needs nothing else."""
        numeric = self._numeric()

        def line(cells: Iterable[str], tag: str) -> str:
            sides = ("right" if right else "left" for right in numeric)
            return "".join(
                f'<{tag} style="text-align: {side}">{escape(text)}</{tag}>'
                for text, side in zip(cells, sides, strict=True)
            )

        rows = "".join(f"<tr>{line(map(_text, row), 'td')}</tr>" for row in self.rows)
        head = f"<thead><tr>{line(map(_text, self.columns), 'th')}</tr></thead>"
        title = f'<caption style="text-align: left">{escape(_text(self.title))}</caption>'
        return f"<table>{title}{head}<tbody>{rows}</tbody></table>"

    def _numeric(self) -> list[bool]:
        return [
            bool(self.rows) and all(isinstance(row[i], int | float) for row in self.rows)
            for i in range(len(self.columns))
        ]


def render(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], footer: str = "") -> str:
    """A table as text. Numbers are aligned to the right."""
    body = str(Table(title, columns, rows))
    return f"{body}\n{wrapped(footer.splitlines())}" if footer else body


def wrapped(lines: Iterable[str]) -> str:
    """Lines of text as they are shown beside a table: in a terminal as wide as it is."""
    room, shown = _terminal_width(), map(_text, lines)
    return "\n".join(shown if room is None else (part for line in shown for part in _folded(line, room)))


def paragraphs(lines: Iterable[str]) -> str:
    """Lines of text as HTML."""
    return "".join(f"<p>{escape(_text(line))}</p>" for line in lines)


def _text(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else "".join(map(_harmless, str(value)))


def _harmless(char: str) -> str:
    """A character, or what Python writes for one that acts on a terminal or is not seen (line ends, escapes)."""
    return char if char.isprintable() else ascii(char)[1:-1]


def _width(text: str) -> int:
    """Places in a terminal that a text takes: two for each wide character of CJK, none for what sits on another."""
    return sum(0 if combining(char) else 1 + (east_asian_width(char) in "WF") for char in text)


def _terminal_width() -> int | None:
    """Characters of a line of the terminal; None where the text goes elsewhere, and nothing has to fit."""
    out = sys.stdout
    return shutil.get_terminal_size().columns if out is not None and out.isatty() else None


def _parts(
    columns: Sequence[str], cells: list[list[str]], numeric: list[bool], room: int | None, frame: int, gap: int
) -> list[tuple[list[int], list[int]]]:
    """Which columns go beside each other, with their widths: all of them, or each part with the first as its head.

    Args: frame, gap: characters around all columns, and between two of them.
    """
    widest = [max(map(_width, [name, *(row[i] for row in cells)])) for i, name in enumerate(columns)]
    if room is None:
        return [(list(range(len(columns))), widest)]
    longest = [max([*(_width(row[i]) for row in cells), 1]) for i in range(len(columns))]  # a number is not broken
    least = {i: longest[i] if numeric[i] else min(widest[i], _NARROWEST) for i in range(len(columns))}

    def takes(chosen: list[int], widths: Mapping[int, int]) -> int:
        return frame + sum(widths[i] for i in chosen) + gap * (len(chosen) - 1)

    parts: list[list[int]] = [[0]]
    for i in range(1, len(columns)):
        fits = takes([*parts[-1], i], least) <= room or parts[-1] == [0]
        parts[-1:] = [[*parts[-1], i]] if fits else [parts[-1], [0, i]]
    found = []
    for chosen in parts:
        widths = {i: widest[i] for i in chosen}
        while takes(chosen, widths) > room:
            wide = max((i for i in chosen if widths[i] > least[i]), key=lambda i: widths[i], default=None)
            if wide is None:
                break
            widths[wide] -= 1
        found.append((chosen, [widths[i] for i in chosen]))
    return found


def _rich(columns: Sequence[str], cells: list[list[str]], numeric: list[bool], widths: Sequence[int]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=box.SIMPLE_HEAD)
    for name, right, width in zip(columns, numeric, widths, strict=True):
        grid.add_column(Text(name), justify="right" if right else "left", overflow="fold", width=width)
    for row in cells:
        grid.add_row(*map(Text, row))  # Text: a path such as "layers[0]" is no markup
    out = StringIO()
    Console(file=out, width=sum(widths) + 4 * len(widths) + 4).print(grid)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _plain(columns: Sequence[str], cells: list[list[str]], numeric: list[bool], widths: Sequence[int]) -> str:
    def lines(row: Sequence[str]) -> list[str]:
        folded = [_folded(text, width) for text, width in zip(row, widths, strict=True)]
        return [_line([part[i] if i < len(part) else "" for part in folded]) for i in range(max(map(len, folded)))]

    def _line(texts: list[str]) -> str:
        parts = []
        for text, width, right in zip(texts, widths, numeric, strict=True):
            fill = " " * (width - _width(text))
            parts.append(fill + text if right else text + fill)
        return "  ".join(parts).rstrip()

    rule = "  ".join("-" * width for width in widths)
    body = [line for row in cells for line in lines(row)]
    return "\n".join([*lines(columns), rule, *body])


def _folded(text: str, width: int) -> list[str]:
    """Lines of at most this width: broken between words, or where a word is longer than a line."""
    if _width(text) <= width:
        return [text]
    lines = [""]
    for word in text.split():
        if lines[-1] and _width(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines += [""] if lines[-1] else []
        for char in word:
            if lines[-1] and _width(lines[-1] + char) > width:
                lines.append("")
            lines[-1] += char
    return lines
