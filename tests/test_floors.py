"""The house keeps its floors: imports go down only, the extension is known in one place, `import
fastpg` stays light, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastpg"
MODULES = sorted(PACKAGE.rglob("*.py"))


# Pages, and their helpers, that stand on others.
STOREYS = {"_triton": 0, "_policy_triton": 0.5, "_rows_triton": 0.5}
STOREYS |= {
    "policy_loss_from_logits_triton": 1.5,
    "_shards": 1.5,
    "_head": 3,
    "merge_stats": 3,
    "policy_loss_from_logits": 3,
    "_head_arguments": 4,
    "linear_token_logprobs_blas": 5,
    "linear_token_logprobs": 6,
    "linear_token_loss": 7,
}
ALGORITHMS, USERS = 8, 9


def floor(module: str) -> int:
    """0 plumbing, 1 Triton kernels and helpers of the pages, 2 pages, STOREYS, the algorithms, and
    their users."""
    parts = module.split(".")
    if parts[:2] in (["fastpg", "_library"], ["fastpg", "_flags"]):
        return 0
    if parts[:2] == ["fastpg", "ops"] and len(parts) > 2:
        private = parts[2].startswith("_") or parts[2].endswith("_triton")
        return STOREYS.get(parts[2], 1 if private else 2)
    return ALGORITHMS if parts[:2] == ["fastpg", "algorithms"] else USERS


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
    ops = {i for i in imports(path) if i.startswith("fastpg.") and i != "fastpg.ops"}
    level = floor(name_of(path))
    assert not {i for i in ops if floor(i) >= level and "." in i.removeprefix("fastpg.ops")[1:]}
    assert not {i for i in ops if floor(i) > level}


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
    page = path.parent.name == "ops" and not path.stem.endswith("_triton")
    assert len(path.read_text().splitlines()) <= (250 if page else 400)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            code = node.body[1:] if ast.get_docstring(node) else node.body
            assert not code or node.end_lineno - code[0].lineno < 40, f"{node.name} is too long"
