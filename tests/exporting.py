"""What tests of exporting and compiling share: operators of a program, and torch's limits told from the library's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

# torch's own assertion that a `.to()` found the dtype it was traced with; its ATen dialect allows it.
_ASSERTIONS = {"aten::_assert_tensor_metadata"}

Result = TypeVar("Result")


def operators(program: torch.export.ExportedProgram) -> dict[str, torch._ops.OpOverload]:
    """Every operator that a program calls, in subgraphs too, by name."""
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [node.target for graph in graphs for node in graph.nodes]
    return {target.name(): target for target in targets if isinstance(target, torch._ops.OpOverload)}


def own_operators(program: torch.export.ExportedProgram) -> set[str]:
    return {name for name in operators(program) if name.startswith("mapsurgery::")}


def not_core(program: torch.export.ExportedProgram) -> set[str]:
    """Operators beyond core ATen."""
    return {name for name, op in operators(program).items() if torch.Tag.core not in op.tags} - _ASSERTIONS


def dtypes(program: torch.export.ExportedProgram) -> set[torch.dtype]:
    """dtypes of all tensors in a graph."""
    values = [node.meta.get("val") for node in program.graph.nodes]
    return {value.dtype for value in values if isinstance(value, torch.Tensor)}


def or_torch_cannot(patched: Callable[[], Result], unpatched: Callable[[], object]) -> Result:
    """The result for the patched model; the test is skipped where the unpatched one fails with the same exception type.

    Any other failure of the unpatched model excuses nothing: the patched model's own is raised.
    """
    try:
        return patched()
    except Exception as error:
        try:
            unpatched()
        except Exception as limit:
            if type(limit) is type(error):
                both = [f"{type(e).__name__}: {str(e)[:200]}" for e in (limit, error)]
                pytest.skip(f"torch cannot do this on the unpatched model: {both[0]}; patched: {both[1]}")
        raise
