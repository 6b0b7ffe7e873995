"""Language understanding: MiniLM on SST-2's sentences."""

from __future__ import annotations
