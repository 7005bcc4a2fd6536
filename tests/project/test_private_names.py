"""Private names of other packages are in `luvc_fx._compat`, with the versions that have them."""

from __future__ import annotations

import ast

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "luvc_fx"
FILES = sorted({*PACKAGE.rglob("*.py"), *(ROOT / "passes").rglob("*.py")})
COMPAT = PACKAGE / "_compat"

ALLOWED = {
    "torch._dynamo.mark_dynamic",
    "torch._dynamo.mark_static",
    "torch._dynamo.maybe_mark_dynamic",
}
"""What torch documents for its users although the module has a private name."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def own_names(trees: list[ast.Module]) -> set[str]:
    """The private names that this package gives: functions, classes, variables, arguments and attributes."""
    own: set[str] = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    own.add(node.attr)
            elif isinstance(node, ast.arg):
                own.add(node.arg)
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("luvc_fx"):
                own |= {alias.name for alias in node.names}
    return own


def full_name(node: ast.expr) -> str:
    """``"torch._dynamo.reset"`` of a chain of attributes; ``"?.x"`` of one on something else."""
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def foreign_private_names(tree: ast.Module, own: set[str]) -> set[str]:
    """Each private name that is not ours, as it is written."""
    inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{getattr(node, 'module', None) or ''}."
            found |= {f"{module}{alias.name}".lstrip(".") for alias in node.names}
        elif isinstance(node, ast.Attribute) and node not in inner:
            found.add(full_name(node))
        elif isinstance(node, ast.Call) and full_name(node.func) in ("getattr", "hasattr", "setattr"):
            found |= {f"?.{name.value}" for name in node.args[1:2] if isinstance(name, ast.Constant)}
    return {
        name
        for name in found
        # Operators of torch are named as in graphs.
        if not name.startswith(("luvc_fx", "__future__", "torch.ops."))
        and any(is_private(part) and part not in own for part in name.split("."))
    }


TREES = {path: ast.parse(path.read_text()) for path in FILES}
OWN = own_names([*TREES.values()])


def test_private_names_of_others_are_in_compat() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): names
        for path, tree in TREES.items()
        if COMPAT not in path.parents and (names := foreign_private_names(tree, OWN) - ALLOWED)
    }
    assert found == {}


def test_nothing_is_allowed_that_is_not_used() -> None:
    used = set().union(*(foreign_private_names(tree, OWN) for tree in TREES.values()))
    assert used >= ALLOWED


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("from transformers.cache_utils import _private", "transformers.cache_utils._private"),
        ("torch._dynamo.config.recompile_limit = 9", "torch._dynamo.config.recompile_limit"),
        ("model.config._attn_implementation", "model.config._attn_implementation"),
        ("self.model._modules['x']", "self.model._modules"),
        ("f(x)._schema.name", "?._schema.name"),
        ("hasattr(module, '_hf_hook')", "?._hf_hook"),
    ],
)
def test_what_counts_as_private(program: str, name: str) -> None:
    assert foreign_private_names(ast.parse(program), {"_ours"}) == {name}


@pytest.mark.parametrize(
    "program",
    [
        "from luvc_fx import _compat; _compat.hint(1)",
        "self._ours + cls._ours",
        "torch.ops.aten._assert_async.msg(x)",
        "model.__dict__; _ = x",
        "torch.compiler.reset()",
        "'torch._dynamo in prose'",
    ],
)
def test_what_does_not(program: str) -> None:
    assert foreign_private_names(ast.parse(program), {"_ours", "_compat"}) == set()
