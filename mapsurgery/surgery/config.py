"""The options of `patch`: what there is, the defaults, the checks, and how they are written to a file."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from ..methods import Init, Method, find_method
from ..methods.adapter import DTYPES, check_dropout, check_rank
from ..named import plain
from ..updates import Update, find_update
from .globs import as_patterns, nearest

Patterns = str | Iterable[str]
TIES = ("share", "separate", "refuse")


class Config:
    """The options of `patch`, checked; there it is said what each of them means. The signature is their only list.

    Raises:
        TypeError, ValueError: naming the option and its value.
    """

    def __init__(
        self,
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
    ) -> None:
        self.rank, self.rank_pattern = rank, dict(rank_pattern or {})
        as_patterns(self.rank_pattern, "rank_pattern")
        check_rank(rank, "rank")
        for glob, value in self.rank_pattern.items():
            check_rank(value, f"rank_pattern[{glob!r}]")
        check_dropout(dropout)
        self.dropout = float(dropout)
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))} or None, got {dtype!r}")
        self.dtype = dtype
        self.targets, self.parameters = as_patterns(targets, "targets"), as_patterns(parameters, "parameters")
        if not self.targets and not self.parameters:
            raise ValueError('targets is empty: name the layers to adapt by glob, such as targets=["*attn*"]')
        self.exclude, self.train = as_patterns(exclude, "exclude"), as_patterns(train, "train")
        if tied not in TIES:
            raise ValueError(f"tied must be one of {', '.join(map(repr, TIES))}, got {tied!r}")
        self.tied = tied
        self.method, self.update = find_method(method), find_update(update)
        self.init = self.method.init_of(init)
        self.update.refuse(self.init.kind == "random")

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and vars(self) == vars(other)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file's metadata."""
        return {
            **vars(self),
            "method": plain(self.method),
            "update": plain(self.update),
            "init": self.init.to_dict(),
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The reverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError, OverflowError: the values are none that `to_dict` makes.
        """
        dtypes = {None: None} | {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
        if values["dtype"] not in dtypes:
            raise ValueError(f"dtype must be one of {', '.join(map(str, dtypes))}, got {values['dtype']!r}")
        config = cls(**{**values, "init": None, "dtype": dtypes[values["dtype"]]})
        config.init = Init(**values["init"])  # files of older versions may hold options that their method does not read
        config.method.refuse(config.init)
        config.update.refuse(config.init.kind == "random")
        return config


Options = ParamSpec("Options")
Subject = TypeVar("Subject", bound=nn.Module)
Result = TypeVar("Result")


def _taking_what(
    make: Callable[Options, Config],
) -> Callable[[Callable[[Subject, Config], Result]], Callable[Concatenate[Subject, Options], Result]]:
    """A decorator: a function of a model and a `Config` becomes one of the model and what the `Config` is made of."""
    options = inspect.signature(make).parameters

    def decorator(function: Callable[[Subject, Config], Result]) -> Callable[Concatenate[Subject, Options], Result]:
        own = inspect.signature(function)
        signature = own.replace(parameters=[own.parameters["model"], *options.values()])

        @functools.wraps(function)
        def call(model: Subject, *args: Options.args, **kwargs: Options.kwargs) -> Result:
            for name in kwargs:
                if name not in options:
                    close = ", ".join(nearest(name, options, 3))
                    hint = f"the nearest that exist: {close}" if close else f"there are: {', '.join(options)}"
                    raise TypeError(f"{function.__name__} has no option {name!r}; {hint}")
            try:
                signature.bind(model, *args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}: {error}") from None
            config = make(*args, **kwargs)
            if not isinstance(model, nn.Module):
                raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
            return function(model, config)

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorator


takes_options = _taking_what(Config)
"""Makes a public function of one that takes a model and a `Config`: it takes the options themselves."""
