"""The notebook with SmolLM2: it was run from top to bottom, and its cells run with this version."""

import ast
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from fastpg.trainer import PPOConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = json.loads((EXAMPLES / "smollm2.ipynb").read_text())
MODEL = EXAMPLES.parent / ".real" / "smollm2"
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
TREES = [ast.parse("".join(cell["source"])) for cell in CODE]


def nodes(kind):
    return [node for tree in TREES for node in ast.walk(tree) if isinstance(node, kind)]


def test_it_was_run_from_top_to_bottom_without_an_error():
    assert NOTEBOOK["nbformat"] == 4
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    kinds = {output["output_type"] for output in outputs}
    assert kinds <= {"stream", "execute_result", "display_data"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    # What was printed names no place of the machine that it ran on.
    assert not re.search(r"/(home|tmp|site-packages)/", json.dumps(outputs))


def test_what_it_imports_and_sets_is_there(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    imported = nodes(ast.ImportFrom)
    assert {"fastpg.trainer", "smollm2"} <= {node.module for node in imported}
    for node in imported:
        exec(ast.unparse(node), {})
    (config,) = [node for node in nodes(ast.Call) if ast.unparse(node.func) == "PPOConfig"]
    known = {field.name for field in fields(PPOConfig)}
    assert {setting.arg for setting in config.keywords} <= known


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.exists(), reason="make real has not been run")
def test_its_cells_run(tmp_path, monkeypatch):
    """With one step in place of its twelve."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.delenv("DISPLAY", raising=False)
    (tmp_path / ".real").mkdir()
    (tmp_path / ".real" / "smollm2").symlink_to(MODEL.resolve())
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / "examples")
    names = {}
    for cell in CODE:
        source = "".join(cell["source"]).replace("num_steps=12", "num_steps=1")
        exec(compile(source, "smollm2.ipynb", "exec"), names)
    assert len(names["steps"]) == 2 and len(names["after"]) == 8
