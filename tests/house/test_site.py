"""The site that `make docs` builds: what can be checked of it without building it."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import fastpg
from docs.hooks import op_pages

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
WITHOUT_PAGE = {"check", "extension_status", "kernels_of"}  # which gpu.md explains
OPS = [
    name
    for name in fastpg.__all__
    if name == "AdaptiveKL" or (name.islower() and name not in WITHOUT_PAGE)
]


def pages(entry):
    """The pages that an entry of the navigation names."""
    if isinstance(entry, str):
        return [entry]
    return [
        page for x in (entry.values() if isinstance(entry, dict) else entry) for page in pages(x)
    ]


def test_every_page_is_in_the_navigation_once_and_exists():
    yaml = pytest.importorskip("yaml")
    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    ours = [page for page in named if not page.startswith("repository/")]
    assert sorted(ours) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
    assert all((ROOT / page.removeprefix("repository/")).exists() for page in {*named} - {*ours})


def test_every_op_has_a_page():
    assert sorted(OPS) == sorted(
        page.stem for page in DOCS.glob("ops/*.md") if page.stem != "index"
    )


@pytest.mark.parametrize("op", OPS)
def test_the_page_of_an_op_has_its_docstring(op):
    page = op_pages.made(op, None)
    for argument in inspect.signature(getattr(fastpg, op)).parameters:
        assert f"- **`{argument}`**: " in page, argument
    for heading in ("Arguments", "Raises", "Example", "Reference", "Formula"):
        assert f"\n## {heading}\n" in page, heading
    assert "```pycon\n>>> " in page and "fastpg." in page.partition("```pycon")[2]


def test_markdown_reads_nothing_into_a_docstring():
    said = op_pages.sections(
        "Sum.\n\na * b\n\nArgs:\n    x: > 0, [B](c) and `a*b`\n        or <d>.\n"
    )
    assert said == "a \\* b\n\n## Arguments\n\n- **`x`**: \\> 0, \\[B\\](c) and `a*b` or \\<d\\>."


def test_an_op_page_has_its_kernels_its_times_and_its_predictions():
    page = op_pages.made("gae", None)
    kernels = page.partition("## Where it runs\n\n")[2].splitlines()[2]
    assert kernels.endswith("| C++ | CUDA C++ | Triton |")
    assert "scipy.signal.lfilter" in page.partition("## Measured on a CPU")[2]
    assert "`forward_kernel`" in page.partition("## Predicted on a GPU, not measured")[2]


@pytest.mark.parametrize("op", [op for op in OPS if op != "AdaptiveKL"])
def test_the_table_of_kernels_is_true(op):
    _, _, row, *_ = op_pages.rows(DOCS / "gpu.md", op)
    cpu, cuda, others = (cell.strip() for cell in row.split("|")[2:5])
    source = op_pages.source_of(op)
    if cpu == "BLAS and C++":  # made of the kernels of others
        return
    has_cpp = any((ROOT / "csrc").rglob(f"{source.stem}.cpp"))
    has_cuda = any((ROOT / "csrc").rglob(f"{source.stem}.cu"))
    has_triton = source.with_name(f"{source.stem}_triton.py").exists()
    assert (cpu == "C++") == has_cpp
    assert (cuda == "CUDA C++") == has_cuda
    assert (others == "Triton") == has_triton


def test_the_performance_guide_has_no_figure_that_was_not_measured():
    def figures(path):
        found = re.findall(r"(\d[\d.e+]*) (µs|ms|s|MiB)\b", path.read_text())
        return {(float(number), unit) for number, unit in found}

    said = figures(DOCS / "performance.md")
    assert len(said) > 20 and not said - figures(ROOT / "bench/results/README.md")


def test_the_hooks_need_nothing_of_fastpg():
    for path in DOCS.glob("hooks/*.py"):
        imports = [
            x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.ImportFrom)
        ]
        assert not [x.module for x in imports if x.module.startswith(("fastpg", "torch"))]
