"""The zoo's verdicts as tables: printed, and as Markdown for benchmarks/results."""

from __future__ import annotations

from collections import Counter

from mapsurgery.tables import render

from .verdict import KINDS, Verdict

Found = dict[str, dict[str, Verdict]]
"""Column -> name -> verdict."""

_COLUMNS = ["family", "by", "entries", *KINDS, "right of runnable", "weights", "seconds"]


def _totals(found: Found) -> list[list[object]]:
    rows = []
    for column, verdicts in found.items():
        families = list(dict.fromkeys(v.family for v in verdicts.values()))
        for family in [*families, *(["all"] if families else [])]:
            chosen = [v for v in verdicts.values() if family in ("all", v.family)]
            kinds = Counter(v.kind for v in chosen)
            runnable = len(chosen) - kinds["not runnable"]
            share = f"{kinds['right'] / runnable:.1%}" if runnable else "-"
            sums = [sum(v.sites for v in chosen), round(sum(v.seconds for v in chosen))]
            rows.append([family, column, len(chosen), *(kinds[kind] for kind in KINDS), share, *sums])
    return rows


def _others(verdicts: dict[str, Verdict]) -> list[list[object]]:
    """Every entry that is not right, by kind."""
    chosen = sorted((v for v in verdicts.values() if v.kind != "right"), key=lambda v: (KINDS.index(v.kind), v.name))
    return [[v.name, v.kind, v.reason] for v in chosen]


def printed(found: Found) -> str:
    """What was not right, entry by entry, then the totals."""
    parts = [
        render(f"{column}: entries that are not right", ["entry", "verdict", "reason"], _others(verdicts))
        for column, verdicts in found.items()
        if verdicts and column == "mapsurgery"
    ]
    return "\n".join([*parts, render("totals", _COLUMNS, _totals(found))])


def markdown(found: Found) -> str:
    """The same for both columns, as a file."""
    parts = [
        "# The zoo\n",
        "Printed by `make zoo ZOO_ARGS='--peft --report FILE'`.\n",
        _table(_COLUMNS, _totals(found)),
    ]
    for column, verdicts in found.items():
        if verdicts:
            rows = [[name, kind, _short(str(reason))] for name, kind, reason in _others(verdicts)]
            parts += [f"\n## {column}: not right\n", _table(["entry", "verdict", "reason"], rows)]
    return "\n".join(parts) + "\n"


def _short(reason: str) -> str:
    reason = " ".join(reason.split()).replace("|", "\\|")
    return reason if len(reason) < 240 else f"{reason[:237]}..."


def _table(columns: list[str], rows: list[list[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
