"""Compiles modules so that each line of their functions is a place that can fail.

`sys.monitoring` would do, but exists since Python 3.12 only, and a function of `sys.settrace` is removed once it
raises. So a call is compiled in before every statement.
"""

import ast
import builtins
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CALL = "_line_reached_"


class _Marker(ast.NodeTransformer):
    """Puts `CALL(file, line)` before every statement inside functions."""

    def __init__(self, file: str) -> None:
        self.file, self._depth = file, 0

    def visit(self, node: ast.AST) -> Any:
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        self._depth += is_function
        self.generic_visit(node)
        if self._depth:
            for name in ("body", "orelse", "finalbody"):
                statements = getattr(node, name, None)
                if isinstance(statements, list):
                    is_documented = is_function and name == "body" and ast.get_docstring(node) is not None  # type: ignore[arg-type]
                    setattr(node, name, self._marked(statements, first=int(is_documented)))
        self._depth -= is_function
        return node

    def _marked(self, statements: list[ast.stmt], first: int) -> list[ast.stmt]:
        marked = statements[:first]
        for statement in statements[first:]:
            call = ast.Call(ast.Name(CALL, ast.Load()), [ast.Constant(self.file), ast.Constant(statement.lineno)], [])
            marked += [ast.copy_location(ast.Expr(call), statement), statement]
        return marked


def marked(source: bytes, path: str, file: str) -> types.CodeType:
    """Compile a module whose functions call `CALL` with `file` and the line, before each statement."""
    tree = ast.fix_missing_locations(_Marker(file).visit(ast.parse(source, path)))
    return compile(tree, path, "exec", dont_inherit=True)


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles anew: a module's file of byte code has no such calls."""

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        return marked(self.get_data(path), path, fullname.replace(".", "/") + ".py")


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = modules

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.modules:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, str(Path(spec.origin)))
        return spec


def watch(modules: Sequence[str], reached: Callable[[str, int], None]) -> None:
    """Have `reached` called with file and line before each statement of these modules, which are not imported yet."""
    assert not set(modules) & sys.modules.keys(), "a module is imported already"
    setattr(builtins, CALL, reached)
    sys.meta_path.insert(0, _Finder(modules))
