"""Small bugs in Python source: each changes one expression or one statement of a file.

A bug is found by ``ast`` and made by replacing a piece of the text, so all other lines stay as they are.
"""

from __future__ import annotations

import ast
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[tuple[str, str], ...]] = {
    ast.Lt: (("<", "<="), ("<", ">")),
    ast.LtE: (("<=", "<"),),
    ast.Gt: ((">", ">="), (">", "<")),
    ast.GtE: ((">=", ">"),),
    ast.Eq: (("==", "!="),),
    ast.NotEq: (("!=", "=="),),
    ast.Is: (("is", "is not"),),
    ast.IsNot: (("is not", "is"),),
    ast.In: (("in", "not in"),),
    ast.NotIn: (("not in", "in"),),
}
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}
NAMES = {
    "min": "max",
    "max": "min",
    "minimum": "maximum",
    "maximum": "minimum",
    "any": "all",
    "all": "any",
    "amin": "amax",
    "amax": "amin",
    "argmin": "argmax",
    "argmax": "argmin",
    "floor": "ceil",
    "ceil": "floor",
}
"""Functions and their opposites."""

WORDS = {"left": "right", "right": "left"}
"""Words as arguments, such as the side of a binary search."""

NO_BEHAVIOUR = {
    *("strict", "frozen", "daemon", "non_blocking", "cache", "nogil", "use_threads"),
    *("name", "help", "description", "desc", "quiet"),
}
"""Keyword arguments that change checks, speed or texts, and no result."""

TEXTS = {"logger", "logging", "warnings", "print", "TypeVar", "Field", "NewType", "cast", "text_table"}
"""Calls that make texts or types; bugs inside them are left out, as are those inside ``raise`` and ``assert``."""


@dataclass(frozen=True)
class Mutant:
    """One small bug.

    Attributes:
        file: path below the repository.
        line: number of the line, from 1.
        function: qualified name of the function; empty at the level of the module.
        kind: the operator that made it.
        start, stop: bytes of the file that are replaced.
        text: their replacement.
        original, mutant: the line before and after, without indentation.
    """

    file: str
    line: int
    function: str
    kind: str
    start: int
    stop: int
    text: str
    original: str
    mutant: str

    def apply(self, source: bytes) -> bytes:
        """Return the file's content with the bug."""
        return source[: self.start] + self.text.encode() + source[self.stop :]


def mutants(file: str, source: bytes) -> list[Mutant]:
    """Return the small bugs of a file in the order of the lines; for each ask :func:`has_meaning`."""
    found = _Finder(file, source).found
    found.sort(key=lambda mutant: (mutant.start, mutant.stop, mutant.text))
    return found


def has_meaning(mutant: Mutant, sources: Mapping[str, bytes]) -> bool:
    """True if a bug is valid Python and not the same program in other words.

    Args:
        mutant: the bug.
        sources: file -> content.
    """
    plain = sources[mutant.file]
    try:
        return ast.dump(ast.parse(mutant.apply(plain))) != ast.dump(ast.parse(plain))
    except SyntaxError:
        return False


class _Finder(ast.NodeVisitor):
    """Collects the bugs of one file; annotations, texts, decorators and errors are not visited."""

    def __init__(self, file: str, source: bytes) -> None:
        self.found: list[Mutant] = []
        self._file, self._source = file, source
        self._lines = source.split(b"\n")
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line) + 1)
        self._scope: list[str] = []
        self._function = ""
        self.visit(ast.parse(source))

    def _add(self, kind: str, start: int, stop: int, text: str) -> None:
        line = next(number for number, begin in enumerate(self._starts) if begin > start)
        begin, end = self._starts[line - 1], self._starts[line] - 1
        original = self._source[begin:end].decode().strip()
        rest = self._source[stop : max(end, stop)].decode() if stop <= end else ""
        changed = (self._source[begin:start].decode() + text + rest).strip()
        self.found.append(Mutant(self._file, line, self._function, kind, start, stop, text, original, changed))

    def _span(self, node: ast.AST) -> tuple[int, int]:
        start = self._starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        stop = self._starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        return start, stop

    def _between(self, left: ast.AST, right: ast.AST, old: str, new: str, kind: str) -> None:
        start, stop = self._span(left)[1], self._span(right)[0]
        pattern = r"\s+".join(map(re.escape, old.split()))
        if match := re.search(pattern.encode(), self._source[start:stop]):
            self._add(kind, start + match.start(), start + match.end(), new)

    # Statements.

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if all(isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) for part in node.body):
            # A method of a protocol says what others do.
            return
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        outer = self._function
        self._scope.append(node.name)
        self._function = outer or ".".join(self._scope)
        self._body(node.body)
        self._scope.pop()
        self._function = outer

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._scope.append(node.name)
        self._body(node.body)
        self._scope.pop()

    def visit_Module(self, node: ast.Module) -> None:
        self._body(node.body)

    def _body(self, body: list[ast.stmt]) -> None:
        for statement in body:
            # A text that stands alone is documentation.
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                self.visit(statement)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and not self._is_text(node.value):
            self._add("dropped statement", *self._span(node), "pass")
        self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        # Without the first assignment of a name the function ends in an error, which tells nothing.
        if self._function and not isinstance(node.targets[0], ast.Name | ast.Tuple) and self._scope[-1] != "__init__":
            self._add("dropped statement", *self._span(node), "pass")
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._add("dropped statement", *self._span(node), "pass")
        if type(node.op) in ARITHMETIC:
            old, new = ARITHMETIC[type(node.op)]
            self._between(node.target, node.value, old + "=", new + "=", "arithmetic")
        self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        if not any(isinstance(part, ast.Name) and part.id == "TYPE_CHECKING" for part in ast.walk(node.test)):
            self._condition(node.test)
            for statement in (*node.body, *node.orelse):
                self.visit(statement)

    def visit_While(self, node: ast.While) -> None:
        self.generic_visit(node)

    def visit_Continue(self, node: ast.Continue) -> None:
        self._add("continue and break", *self._span(node), "break")

    def visit_Break(self, node: ast.Break) -> None:
        self._add("continue and break", *self._span(node), "continue")

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_Assert(self, node: ast.Assert) -> None:
        pass

    # Expressions.

    def _condition(self, test: ast.expr) -> None:
        if isinstance(test, ast.Name | ast.Attribute | ast.Call | ast.Subscript | ast.NamedExpr):
            start, stop = self._span(test)
            self._add("negated condition", start, stop, f"not ({self._source[start:stop].decode()})")
        self.visit(test)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._condition(node.test)
        self.visit(node.body)
        self.visit(node.orelse)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.visit(node.iter)
        for test in node.ifs:
            self._condition(test)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            for old, new in COMPARISONS[type(operator)]:
                self._between(left, right, old, new, "comparison")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in ARITHMETIC and not _is_text_value(node.left) and not _is_text_value(node.right):
            self._between(node.left, node.right, *ARITHMETIC[type(node.op)], "arithmetic")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._between(left, right, old, new, "and and or")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub | ast.Invert):
            before = self._span(node)[0]
            width = 3 if isinstance(node.op, ast.Not) else 1
            self._add("dropped negation", before, before + width, " " if width == 3 else "")
        self.visit(node.operand)

    def visit_Constant(self, node: ast.Constant) -> None:
        span, value = self._span(node), node.value
        if value is True or value is False:
            self._add("constant", *span, str(not value))
        elif isinstance(value, int):
            self._add("constant", *span, str(value + 1))
            if value > 1:
                self._add("constant", *span, str(value - 1))
        elif isinstance(value, float) and value:
            self._add("constant", *span, str(value * 2))
        elif isinstance(value, str) and value in WORDS:
            self._add("constant", *span, repr(WORDS[value]).replace("'", '"'))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.slice, ast.Slice):
            for bound in (node.slice.lower, node.slice.upper):
                if bound is not None:
                    self._add("dropped bound", *self._span(bound), "")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if self._is_text(node):
            return
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in NAMES:
            stop = self._span(node.func)[1]
            self._add("opposite function", stop - len(name), stop, NAMES[name])
        first = node.args[:2]
        # Arguments of one form may well be of one type; others end in an error at once, which any test finds.
        if len(first) == 2 and type(first[0]) is type(first[1]) and isinstance(first[0], ast.Name | ast.Attribute):
            (start, end), (begin, stop) = map(self._span, first)
            one, between, other = self._source[start:end], self._source[end:begin], self._source[begin:stop]
            if name not in NAMES and b"\n" not in between:
                self._add("swapped arguments", start, stop, (other + between + one).decode())
        self.visit(node.func)
        for argument in node.args:
            self.visit(argument)
        for keyword in node.keywords:
            if keyword.arg not in NO_BEHAVIOUR:
                self.visit(keyword.value)

    def _is_text(self, node: ast.Call) -> bool:
        root: ast.expr = node.func
        while isinstance(root, ast.Attribute):
            root = root.value
        return isinstance(root, ast.Name) and root.id in TEXTS


def _is_text_value(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def chosen(
    by_file: Mapping[str, Sequence[Mutant]], count: int, seed: int, valid: Callable[[Mutant], bool]
) -> Iterator[Mutant]:
    """Yield about ``count`` valid bugs of all files.

    A file's share follows the root of its number of bugs, so that long files do not push short ones out. The choice
    within a file depends on that file and the seed alone, and the files take turns: a run that stops early has looked
    at each of them.
    """
    roots = {file: math.sqrt(len(found)) for file, found in by_file.items() if found}
    whole = sum(roots.values())
    queues = []
    for file, root in roots.items():
        order = random.Random(f"{seed} {file}").sample(by_file[file], len(by_file[file]))
        queues.append(itertools.islice(filter(valid, order), max(1, round(count * root / whole))))
    while queues:
        for queue in list(queues):
            mutant = next(queue, None)
            if mutant is None:
                queues.remove(queue)
            else:
                yield mutant
