"""What the tests of exporting share: which operators a program calls, and torch's limits told from this library's."""

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
    """The result for the patched model; the test is skipped, with the reason, where the unpatched one fails too."""
    try:
        return patched()
    except Exception as error:
        try:
            unpatched()
        except Exception as limit:
            pytest.skip(f"torch cannot do this on the unpatched model: {type(limit).__name__}: {str(limit)[:200]}")
        raise error
