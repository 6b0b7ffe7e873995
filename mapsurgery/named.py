"""Choices that have a name and options: methods and update families."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

Choice = TypeVar("Choice")


def register(table: dict[str, type[Choice]], kind: str, base: type, cls: type[Choice]) -> type[Choice]:
    """Add a class to a table under its `name`.

    Raises:
        TypeError: it is no frozen dataclass of the kind, or an option has no default.
        ValueError: it has no name, or another class has it already.
    """
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise TypeError(f"{kind} must be a subclass of {base.__name__}, got {cls!r}")
    own = vars(cls).get("__dataclass_params__")  # a parent's would leave the fields of this class out
    if own is None or not own.frozen:
        raise TypeError(f"{kind} {cls.__name__} must be a frozen dataclass: its fields are its options")
    name = getattr(cls, "name", "")
    if not isinstance(name, str) or not name:
        raise ValueError(f'{kind} {cls.__name__} needs a name: set `name = "..."` in the class')
    try:
        cls()
    except TypeError as error:
        raise TypeError(f"{kind} {cls.__name__} needs a default for each option: {error}") from None
    other = table.get(name, cls)
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"{kind} {name!r} is taken by {other.__module__}.{other.__qualname__}: choose another name")
    table[name] = cls
    return cls


def parse(table: Mapping[str, type[Choice]], kind: str, value: Any) -> Any:
    """An instance of a class of the table: from itself, its name, or what `plain` made of it.

    Raises:
        TypeError: `value` is of another type.
        ValueError: no class has this name, or an option is unknown or bad.
    """
    if type(value) in table.values():  # a subclass has to be registered: a file knows it by its name
        _refuse_unwritable(kind, value)
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise TypeError(
            f"{kind} must be one of {', '.join(map(repr, table))} or an instance of such a class with options, got "
            f"{value!r}; a class of your own has to be registered first (mapsurgery.register_{kind})"
        )
    options = {**value}
    name = options.pop("name")
    if name not in table:
        raise ValueError(
            f"there is no {kind} {name!r}; there are: {', '.join(map(repr, table))}. One of your own has to be "
            f"registered first (mapsurgery.register_{kind}), also before a file that uses it is loaded"
        )
    try:
        return table[name](**options)
    except TypeError as error:
        raise ValueError(f"{kind} {name!r} takes no such options: {error}") from None


def _refuse_unwritable(kind: str, value: Any) -> None:
    try:
        json.dumps(plain(value))
    except TypeError as error:
        raise TypeError(f"{kind} {value!r} has an option that a file cannot hold: {error}") from None


def plain(value: Any) -> str | dict[str, Any]:
    """The name of a choice, with its options where they are not the defaults: for a file's metadata."""
    options = dataclasses.asdict(value)
    defaults = dataclasses.asdict(type(value)())
    changed = {key: option for key, option in options.items() if option != defaults[key]}
    return {"name": value.name, **changed} if changed else str(value.name)


def positive(kind: str, **values: Any) -> None:
    """Raises ValueError unless each value is a positive, finite number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise ValueError(f"{name} of {kind} must be a positive number, got {value!r}")


def flags(kind: str, **values: Any) -> None:
    """Raises ValueError unless each value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} of {kind} must be True or False, got {value!r}")
