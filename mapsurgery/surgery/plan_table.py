"""The text of a plan."""

from __future__ import annotations

import re
from typing import Any

from ..tables import Table
from .config import Config
from .planned import PlannedLayer, SkippedModule


def layers_table(layers: tuple[PlannedLayer, ...], config: Config, full: bool) -> Table:
    """The layers to adapt, similar ones in one row; `full` gives every layer a row of its own."""
    columns = ["layer", "n", "type", "weight", "way", "rank", "trainable", "pattern", "notes"]
    rows = [_row(group) for group in _grouped(layers, full)]
    return Table(f"{len(layers)} layers to adapt with {said(config)}", columns, rows)


def skipped_table(skipped: tuple[SkippedModule, ...], full: bool) -> Table:
    """The modules that are not adapted, in the same way."""
    rows = [_skipped_row(group) for group in _grouped_skips(skipped, full)]
    return Table("not adapted", ["module", "n", "type", "reason"], rows)


def said(config: Config) -> str:
    """The method, and the update family where it is not LoRA's."""
    return config.method.name if config.update.name == "lora" else f"{config.method.name} on {config.update.name}"


def _grouped(layers: tuple[PlannedLayer, ...], full: bool) -> list[list[PlannedLayer]]:
    groups: dict[Any, list[PlannedLayer]] = {}
    for i, layer in enumerate(layers):
        alike = (_family(layer.path), layer.type_name, layer.shape, layer.rank, layer.pattern, len(layer.paths))
        notes = (layer.shares is None, tuple(_family(note) for note in layer.notes))
        key = i if full else (*alike, *notes)
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def _row(group: list[PlannedLayer]) -> list[object]:
    first = group[0]
    name = _span([layer.path for layer in group])
    aliases = "".join(f" = {alias}" for alias in first.paths[1:]) if len(group) == 1 else ""
    also = [f"each under {len(first.paths)} names"] if len(first.paths) > 1 and not aliases else []
    notes = "; ".join([*also, *first.notes])
    shape = "x".join(map(str, first.shape))
    trainable = sum(layer.trainable for layer in group)
    in_training, in_eval = first.way, first.way_in_eval
    way = in_training if in_training is in_eval else f"{in_training}, in eval mode {in_eval}"
    return [name + aliases, len(group), first.type_name, shape, way, first.rank, trainable, first.pattern, notes]


def _grouped_skips(skipped: tuple[SkippedModule, ...], full: bool) -> list[list[SkippedModule]]:
    groups: dict[Any, list[SkippedModule]] = {}
    for i, skip in enumerate(skipped):
        groups.setdefault(i if full else (_family(skip.path), skip.type_name, skip.reason), []).append(skip)
    return list(groups.values())


def _skipped_row(group: list[SkippedModule]) -> list[object]:
    return [_span([skip.path for skip in group]), len(group), group[0].type_name, group[0].reason]


def shortened(names: tuple[str, ...], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _family(path: str) -> str:
    return re.sub(r"\d+", "#", path)


def _span(paths: list[str]) -> str:
    """One name for similar paths: "blocks.{0..11}.attn.qkv" where a single number differs."""
    if len(paths) == 1:
        return paths[0]
    numbers = [re.findall(r"\d+", path) for path in paths]
    varying = [i for i in range(len(numbers[0])) if len({n[i] for n in numbers}) > 1]
    if len(varying) != 1:
        return f"{paths[0]} .. {paths[-1]}"
    at, pieces = varying[0], re.split(r"\d+", paths[0])
    values = [int(n[at]) for n in numbers]
    texts = list(numbers[0])
    whole = values == list(range(values[0], values[0] + len(values)))
    texts[at] = f"{{{values[0]}..{values[-1]}}}" if whole else f"{{{','.join(map(str, values))}}}"
    return "".join(piece + text for piece, text in zip(pieces, [*texts, ""], strict=True))
