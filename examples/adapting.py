"""The command line's options about adapters, shared by the examples: what becomes of the model's layers, and how fast.

parser = argparse.ArgumentParser()
adapting.add_options(parser, targets=["*q_proj", "*v_proj"])
args = parser.parse_args()
plan = adapting.adapt(model, args)  # prints the plan and patches
optimizer = torch.optim.AdamW(adapting.groups(model, args))
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from typing import Any

from torch import nn

import mapsurgery
from mapsurgery.tables import render

METHODS = ("map", "lora", "dora")
UPDATES = ("lora", "pissa", "olora", "adalora", "vera", "loha", "lokr", "flora", "dense")
SCALED = {"lora": mapsurgery.Lora, "dora": mapsurgery.Dora}
"""Methods with LoRA's scaling alpha/r of the update; MAP has a trained magnitude in its place."""
MEASURES = ("rank", "alpha", "beta", "change", "cosine", "effective_rank")
"""Of ``mapsurgery.report``, those that `summary` shows."""


# --- options ----------------------------------------------------------------------------------------------------------


def add_options(
    parser: argparse._ActionsContainer,
    targets: Iterable[str] = (),
    *,
    exclude: Iterable[str] = (),
    rank: int = 8,
    lr: float = 5e-4,
    weight_decay: float = 0.0,
) -> None:
    """Add the options that `adapt` and `groups` read to a parser or to one of its groups.

    Args:
        targets: default of ``--targets``; the option is required where there is none.
        exclude, rank, lr, weight_decay: defaults of their options.
    """
    _add_method_options(parser)
    targets = list(targets)
    parser.add_argument(
        "--targets", nargs="+", default=targets or None, required=not targets, metavar="GLOB", help="layers to adapt"
    )
    parser.add_argument("--exclude", nargs="*", default=list(exclude), metavar="GLOB", help="layers to leave alone")
    parser.add_argument(
        "--train", nargs="*", metavar="GLOB", help="parameters to train in full; the new head, if any, if left out"
    )
    parser.add_argument("--rank", type=positive, default=rank, help="rank of the update")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropped share of the update path's inputs")
    parser.add_argument("--lr", type=float, default=lr, help="highest learning rate")
    parser.add_argument("--weight-decay", type=float, default=weight_decay, help="of matrices, never of magnitudes")
    parser.add_argument(
        "--magnitude-lr-factor", type=float, default=1.0, metavar="FACTOR", help="learning rate of magnitudes, over lr"
    )
    parser.add_argument(
        "--b-lr-factor", type=float, default=1.0, metavar="FACTOR", help="learning rate of B over lr (LoRA+)"
    )
    parser.add_argument(
        "--layer-lr",
        nargs="+",
        type=_glob_and_factor,
        default=[],
        metavar="GLOB=FACTOR",
        help="learning rate of some of the layers, over lr",
    )


def _add_method_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--method", choices=METHODS, default="map", help="how the update is put to the weight")
    parser.add_argument("--update", choices=UPDATES, default="lora", help="what the update is made of")
    parser.add_argument("--init", help="how MAP starts: soft, zero or random; the library's default if left out")
    parser.add_argument(
        "--lora-alpha", type=float, metavar="ALPHA", help="lora and dora: the update is scaled by ALPHA/rank"
    )
    parser.add_argument("--rslora", action="store_true", help="lora and dora: the scaling is ALPHA/sqrt(rank)")


def positive(text: str) -> int:
    """An option's value: a whole number above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _glob_and_factor(text: str) -> tuple[str, float]:
    pattern, separator, factor = text.rpartition("=")
    if not separator or not pattern:
        raise argparse.ArgumentTypeError(f"{text!r} is not a glob, = and a factor, such as '*layers.0.*=0.5'")
    return pattern, float(factor)


# --- what the options mean --------------------------------------------------------------------------------------------


def settings(args: argparse.Namespace, head: Iterable[str] = ()) -> dict[str, Any]:
    """Arguments of ``mapsurgery.plan`` and ``mapsurgery.patch``.

    Args:
        head: globs of what to train in full where ``--train`` was left out.

    Raises:
        ValueError: options that do not go together.
    """
    chosen: dict[str, Any] = {
        "targets": args.targets,
        "exclude": args.exclude,
        "rank": args.rank,
        "method": method(args),
        "update": args.update,
        "dropout": args.dropout,
        "train": list(head) if args.train is None else args.train,
    }
    if args.init is not None:
        chosen["init"] = args.init
    return chosen


def method(args: argparse.Namespace) -> Any:
    """The value of ``mapsurgery.patch(method=)``: a name, or an instance where the options ask for more.

    Raises:
        ValueError: an option that the method does not have.
    """
    options: dict[str, Any] = {}
    if args.lora_alpha is not None:
        options["alpha"] = args.lora_alpha
    if args.rslora:
        options["rslora"] = True
    if not options:
        return args.method
    if args.method not in SCALED:
        raise ValueError(
            f"--method {args.method} has no scaling, its magnitude is trained: --lora-alpha and --rslora belong to "
            f"--method {' and '.join(SCALED)}"
        )
    return SCALED[args.method](**options)


def adapt(model: nn.Module, args: argparse.Namespace, head: Iterable[str] = ()) -> mapsurgery.Plan:
    """Patch the model in place as the options say, and print the plan before.

    Args:
        head: globs of what to train in full where ``--train`` was left out.

    Returns:
        The plan that was carried out.

    Raises:
        ValueError: see `settings` and ``mapsurgery.patch``.
    """
    chosen = settings(args, head)
    plan = mapsurgery.plan(model, **chosen)
    print(f"{plan}\n")
    mapsurgery.patch(model, **chosen)
    return plan


def groups(model: nn.Module, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Parameter groups of a patched model for a torch optimiser, each with its learning rate.

    Raises:
        ValueError: see ``mapsurgery.param_groups``.
    """
    options: dict[str, Any] = {
        "magnitude_lr_factor": args.magnitude_lr_factor,
        "b_lr_factor": args.b_lr_factor,
    }
    if args.layer_lr:
        options["layer_lr_factors"] = dict(args.layer_lr)
    return mapsurgery.param_groups(model, args.lr, args.weight_decay, **options)


def summary(model: nn.Module) -> str:
    """``mapsurgery.report`` as a table of means over the layers of the same name (all query projections, say)."""
    members: dict[str, list[dict[str, float]]] = {}
    for path, values in mapsurgery.report(model).layers.items():
        members.setdefault(path.rpartition(".")[2], []).append(values)
    rows = [
        [name, len(layers), *(statistics.mean(layer[column] for layer in layers) for column in MEASURES)]
        for name, layers in members.items()
    ]
    return render("adapters, means over layers of the same name", ["layers", "n", *MEASURES], rows)
