"""Statements of a syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator

_PARTS = ("body", "orelse", "handlers", "finalbody", "cases")


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a module and its statements at any depth, without the expressions in them, which are most of a tree."""
    yield node
    for name in _PARTS:
        part = getattr(node, name, ())
        # The body of a lambda or of a conditional expression is no list.
        for statement in part if isinstance(part, list) else ():
            yield from statements(statement)
