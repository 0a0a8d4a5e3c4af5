"""The house keeps its floors: imports go down only, the extension is known in one place, `import
fastpg` stays light, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastpg"
MODULES = sorted(PACKAGE.rglob("*.py"))


def floor(module: str) -> int:
    """0 plumbing, 1 what the chapters share, 2 the chapters, 3 the losses that read logits,
    4 the algorithms, 5 their users."""
    parts = module.split(".")
    if parts[:2] in (["fastpg", "_library"], ["fastpg", "_flags"], ["fastpg", "_op"]):
        return 0
    if parts[:2] == ["fastpg", "ops"] and len(parts) > 2:
        return 1 if parts[2] == "common" else 2
    return 4 if parts[:2] == ["fastpg", "algorithms"] else 5


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it, relative ones resolved."""
    package = name_of(path) if path.stem == "__init__" else name_of(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join([*base, *filter(None, [node.module])]) if node.level else node.module
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


BELOW_THE_TRAINER = [p for p in MODULES if "ops" in p.parts or p.stem == "algorithms"]


@pytest.mark.parametrize("path", BELOW_THE_TRAINER, ids=name_of)
def test_imports_go_down_only(path):
    level = floor(name_of(path))
    assert not {i for i in imports(path) if i.startswith("fastpg.ops.") and floor(i) > level}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_trainer_needs_its_extra(path):
    heavy = {"transformers", "accelerate", "rich", "matplotlib", "safetensors", "yaml"}
    found = {i.split(".")[0] for i in imports(path)} & heavy
    assert not found or {"trainer", "tasks", "cli"} & {path.parent.name, path.stem}


def test_import_is_light():
    code = "import sys, fastpg; print({'transformers', 'accelerate', 'triton'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "set()", out.stderr


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_and_functions_stay_small(path):
    assert len(path.read_text().splitlines()) <= 400
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            code = node.body[1:] if ast.get_docstring(node) else node.body
            assert not code or node.end_lineno - code[0].lineno < 40, f"{node.name} is too long"
