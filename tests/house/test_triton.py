"""What the source of every kernel in Triton keeps to, so that the oldest Triton compiles it too."""

import ast
from pathlib import Path

import pytest

OPS = Path(__file__).parents[2] / "fastpg" / "ops"
SOURCES = sorted(OPS.rglob("*triton.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_kernel_unpacks_a_tuple_within_a_tuple(path):
    """Triton 3.6 fails on `(a, b), c = f(x)` with "unhashable type: 'list'"."""
    targets = [
        target
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Tuple)
    ]
    nested = [t.lineno for t in targets if any(isinstance(x, ast.Tuple) for x in t.elts)]
    assert not nested
