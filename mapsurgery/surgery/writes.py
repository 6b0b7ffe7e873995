"""Whether the source of a module's forward writes into a parameter, for modules whose inputs nobody knows.

It reads what a person would look for: `self.weight.data.clamp_()`, `self.weight *= mask`, `nn.init.ones_(self.weight)`,
`self.weight.data = ...`, `torch.mul(..., out=self.weight)`, in the forward and in the methods of `self` that it calls.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from types import CodeType, ModuleType
from typing import Any

from torch import nn

from .forwards import carried_forward

_SAME_MEMORY = frozenset(
    (
        *("data", "detach", "view", "view_as", "reshape", "t", "T", "mT", "H", "mH", "transpose", "permute", "flatten"),
        *("unflatten", "squeeze", "unsqueeze", "narrow", "select", "chunk", "split", "unbind", "diagonal", "swapaxes"),
        *("movedim", "expand", "contiguous", "real", "imag"),
    )
)
"""Attributes and methods of a tensor that give its own memory."""

_NO_NUMBERS = frozenset({"requires_grad_", "retain_grad_", "share_memory_", "__setattr__"})


def written_in_source(module: nn.Module, name: str) -> str | None:
    """The line of the module's forward that writes into its parameter `name`, or None if none is seen."""
    own = carried_forward(module)
    seen: set[Any] = set()
    waiting: list[Any] = [type(module).forward if own is None else own]
    while waiting:
        function = inspect.unwrap(waiting.pop())
        function = getattr(function, "func", getattr(function, "__func__", function))  # of a partial, of a method
        if function in seen or not inspect.isfunction(function):
            continue
        seen.add(function)
        parsed = _parsed(function.__code__)
        if parsed is None or not parsed.args.args:
            continue
        finder = _Finder(parsed.args.args[0].arg, name, function.__globals__)
        for statement in parsed.body:
            finder.visit(statement)
        if finder.line is not None:
            return finder.line
        waiting += [
            vars(cls)[called] for cls in type(module).__mro__ for called in finder.called if called in vars(cls)
        ]
    return None


@functools.lru_cache(256)
def _parsed(code: CodeType) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):  # made in a prompt or by exec; a lambda in the middle of a line
        return None
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)


class _Finder(ast.NodeVisitor):
    """Looks through one function. `line`: what writes; `called`: methods of self that are called."""

    def __init__(self, this: str, parameter: str, names: dict[str, Any]) -> None:
        self.this, self.parameter, self.names = this, parameter, names
        self.aliases: set[str] = set()
        self.called: list[str] = []
        self.line: str | None = None

    def is_weight(self, node: ast.AST | None) -> bool:
        """Whether an expression is the parameter or has its memory."""
        if isinstance(node, ast.Name):
            return node.id in self.aliases
        if isinstance(node, ast.Attribute):
            if self.is_this(node.value):
                return node.attr == self.parameter
            return node.attr in _SAME_MEMORY and self.is_weight(node.value)
        if isinstance(node, ast.Subscript):
            return self.is_weight(node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return node.func.attr in _SAME_MEMORY and self.is_weight(node.func.value)
        return False

    def is_this(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self.this

    def is_module(self, node: ast.AST) -> bool:
        """Whether an expression names a module of Python's (nn.init), whose function takes what it changes."""
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and isinstance(self.names.get(node.id), ModuleType)

    def found(self, node: ast.AST) -> None:
        self.line = self.line or ast.unparse(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if not isinstance(target, ast.Name) and self.is_weight(target):
                self.found(node)
            elif isinstance(target, ast.Name):
                (self.aliases.add if self.is_weight(node.value) else self.aliases.discard)(target.id)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if self.is_weight(node.target):
            self.found(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        in_place = called.endswith("_") and not called.endswith("__") and called not in _NO_NUMBERS
        owner = function.value if isinstance(function, ast.Attribute) else None
        first = node.args[0] if node.args and (owner is None or self.is_module(owner)) else None
        if in_place and (self.is_weight(owner) or self.is_weight(first)):
            self.found(node)
        if any(keyword.arg == "out" and self.is_weight(keyword.value) for keyword in node.keywords):
            self.found(node)
        if owner is not None and (self.is_this(owner) or ast.unparse(owner).startswith("super(")):
            self.called.append(called)
        self.generic_visit(node)
