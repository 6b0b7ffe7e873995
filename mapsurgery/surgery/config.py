"""The arguments of `patch`, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..methods import Init, Map, Method, find_method
from ..methods.adapter import DTYPES, check_dropout, check_rank
from ..named import plain
from ..updates import LoraUpdate, Update, find_update
from .globs import as_patterns

Patterns = str | Iterable[str]
TIES = ("share", "separate", "refuse")


@dataclass(frozen=True)
class Config:
    """The arguments of `patch`, checked."""

    targets: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    rank: int = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    method: Method = field(default_factory=Map)
    update: Update = field(default_factory=LoraUpdate)
    init: Init = field(default_factory=Init)
    dropout: float = 0.0
    dtype: torch.dtype | None = None
    train: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    tied: str = "share"

    @classmethod
    def checked(
        cls,
        targets: Patterns,
        *,
        exclude: Patterns = (),
        rank: int = 8,
        rank_pattern: Mapping[str, int] | None = None,
        method: str | Method | Mapping[str, Any] = "map",
        update: str | Update | Mapping[str, Any] = "lora",
        init: str | Init | None = None,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        train: Patterns = (),
        parameters: Patterns = (),
        tied: str = "share",
    ) -> Config:
        """Normalised and checked arguments.

        Raises:
            TypeError, ValueError: naming the argument and its value.
        """
        ranks = dict(rank_pattern or {})
        as_patterns(ranks, "rank_pattern")
        for name, value in [("rank", rank), *((f"rank_pattern[{key!r}]", value) for key, value in ranks.items())]:
            check_rank(value, name)
        check_dropout(dropout)
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))} or None, got {dtype!r}")
        patterns, raw = as_patterns(targets, "targets"), as_patterns(parameters, "parameters")
        if not patterns and not raw:
            raise ValueError('targets is empty: name the layers to adapt by glob, such as targets=["*attn*"]')
        if tied not in TIES:
            raise ValueError(f"tied must be one of {', '.join(map(repr, TIES))}, got {tied!r}")
        how, what = find_method(method), find_update(update)
        start = how.init_of(init)
        what.refuse(start.kind == "random")
        return cls(
            targets=patterns,
            exclude=as_patterns(exclude, "exclude"),
            rank=rank,
            rank_pattern=ranks,
            method=how,
            update=what,
            init=start,
            dropout=float(dropout),
            dtype=dtype,
            train=as_patterns(train, "train"),
            parameters=raw,
            tied=tied,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file's metadata."""
        return {
            "targets": list(self.targets),
            "exclude": list(self.exclude),
            "rank": self.rank,
            "rank_pattern": dict(self.rank_pattern),
            "method": plain(self.method),
            "update": plain(self.update),
            "init": self.init.to_dict(),
            "dropout": self.dropout,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "train": list(self.train),
            "parameters": list(self.parameters),
            "tied": self.tied,
        }
