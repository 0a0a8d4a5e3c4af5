"""The house keeps its floors: imports and includes go down only, the extension is known in one
place, `import fastpg` stays light, files and functions stay small."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE, CSRC = ROOT / "fastpg", ROOT / "csrc"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(path for path in CSRC.rglob("*") if path.is_file())

# From the ground up. A module may import what is on lower floors, and its own floor's folder.
FLOORS = [
    {"fastpg._library", "fastpg._record", "fastpg._flags"},
    {"fastpg._op", "fastpg._autograd"},
    {"fastpg.ops.common"},
    {"fastpg.ops.vocabulary", "fastpg.ops.credit", "fastpg.ops.weight"},
    {"fastpg.ops.loss"},
    {"fastpg", "fastpg.ops"},
    {"fastpg.algorithms"},
    {"fastpg.bench.timing"},
    {"fastpg.integrations"},
    {"fastpg.bench"},
    {"fastpg.report"},
    {"fastpg.trainer.settings"},
    {"fastpg.trainer.models"},
    {"fastpg.trainer.data"},
    {"fastpg.trainer.run"},
    {"fastpg.trainer.rollouts"},
    {"fastpg.trainer.rewards"},
    {"fastpg.trainer.learning"},
    {"fastpg.trainer.report"},
    {"fastpg.trainer"},
    {"fastpg.trainer.check"},
    {"fastpg.tasks", "fastpg.doctor"},
    {"fastpg.cli"},
    {"fastpg.__main__"},
]
# The same of csrc/: `simd` holds what every vectorised op needs, and is compiled for each machine.
CPP_FLOORS = [{"common"}, {"simd"}, {"vocabulary", "credit", "weight"}, {"loss"}, {"csrc"}]


def name_of(path: Path) -> str:
    """fastpg/ops/credit/gae.py -> fastpg.ops.credit.gae"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_and_floor(module: str, floors: list[set[str]]) -> tuple[str, int]:
    """The folder or file of a floor that a module is in, by the longest name, and that floor."""
    rooms = {room: floor for floor, rooms in enumerate(floors) for room in rooms}
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        room = ".".join(parts[:length])
        if room in rooms:
            return room, rooms[room]
    raise AssertionError(f"{module} is on no floor")


def is_module(name: str) -> bool:
    """Whether this is a module or package of fastpg."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports(source: str, package: str) -> set[str]:
    """Every module of fastpg that a file imports, wherever in it, in whatever form.

    `from . import x` imports the module x if there is one, else a name of the package.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                found.add(submodule if is_module(submodule) else module)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return {name for name in found if name.split(".")[0] == "fastpg" and is_module(name)}


def package_of(path: Path) -> str:
    return name_of(path) if path.stem == "__init__" else name_of(path).rpartition(".")[0]


def upward(module: str, imported: set[str]) -> set[str]:
    """The imports of a module that do not go down, nor stay in its own room."""
    room, floor = room_and_floor(module, FLOORS)
    found = set()
    for name in imported:
        other_room, other_floor = room_and_floor(name, FLOORS)
        if other_floor >= floor and other_room != room:
            found.add(name)
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down_only(path):
    assert not upward(name_of(path), imports(path.read_text(), package_of(path)))


FORMS = [
    "from . import value_loss",
    "from .value_loss import value_loss",
    "from ..loss import value_loss",
    "from ..loss.value_loss import value_loss",
    "import fastpg.ops.loss.value_loss",
    "from fastpg.ops.loss import value_loss as page",
    "from importlib import import_module\nimport_module('fastpg.ops.loss.value_loss')",
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_import_is_seen(form):
    package = "fastpg.ops.loss" if " ." in form and ".." not in form else "fastpg.ops.credit"
    found = imports(form, package)
    assert "fastpg.ops.loss.value_loss" in found
    assert upward("fastpg.ops.credit.gae", found) == {"fastpg.ops.loss.value_loss"}


def cpp_room(path: str) -> str:
    """The folder of a source of csrc/."""
    return path.split("/")[0] if "/" in path else "csrc"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes_go_down_only(path):
    room, floor = room_and_floor(cpp_room(str(path.relative_to(CSRC))), CPP_FLOORS)
    for include in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
        other_room, other_floor = room_and_floor(cpp_room(include), CPP_FLOORS)
        assert (CSRC / include).exists(), f"{include} is not named from csrc/"
        assert other_floor < floor or other_room == room, include


TRAINERS = {"transformers", "accelerate", "rich", "matplotlib", "safetensors", "yaml", "peft"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_trainer_and_integrations_need_an_extra(path):
    roots = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            roots.add(node.module.split(".")[0])
    allowed = {"trainer", "report", "integrations", "tasks", "bench", "doctor", "cli"}
    assert not roots & TRAINERS or allowed & {*path.parts[-3:-1], path.stem}


def run_python(code, folder):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    code = "import sys, fastpg; print({'transformers', 'accelerate', 'triton'} & set(sys.modules))"
    assert run_python(code, ROOT) == "set()"


def test_the_folder_above_a_clone_does_not_hide_the_package(tmp_path):
    """A clone is a folder called fastpg without an __init__.py: Python takes it for a namespace."""
    (tmp_path / "fastpg").mkdir()
    assert run_python("import fastpg; print(fastpg.gae.__name__)", tmp_path) == "gae"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_and_functions_stay_small(path):
    assert len(path.read_text().splitlines()) <= 400
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            code = node.body[1:] if ast.get_docstring(node) else node.body
            assert not code or node.end_lineno - code[0].lineno < 40, f"{node.name} is too long"
