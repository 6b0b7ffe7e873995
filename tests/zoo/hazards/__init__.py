"""Hand-written constructions: each way in which an adapter can be bypassed, dropped or left without a gradient."""

from __future__ import annotations

from ..entry import Entry
from . import calls, computed, convolutions, graph, raw, reads, sequence, structure, zero


def entries() -> list[Entry]:
    parts = (reads, calls, structure, sequence, convolutions, computed, raw, zero, graph)
    return [entry for part in parts for entry in part.entries()]
