"""What a page of an op gets from elsewhere: its docstring, formula, kernels and times.

A page docs/ops/<op>.md says by hand what the op is for and what it costs. Below that, this hook of
MkDocs writes what the repository knows already. It reads files and imports nothing of fastpg, so
that the site is built without torch.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Note|Example|Reference):\n", re.MULTILINE)
ITEM = re.compile(r"^(\w+): ", re.MULTILINE)


def op_of(path: str) -> str | None:
    """The op that a page is about, or None: "ops/gae.md" is about gae."""
    match = re.fullmatch(r"ops/(\w+)\.md", path)
    return None if match is None or match[1] == "index" else match[1]


def source_of(op: str) -> Path:
    """The Python file in which an op, or AdaptiveKL, is defined."""
    definition = re.compile(rf"^(def|class) {op}\b", re.MULTILINE)
    files = sorted((ROOT / "fastpg/ops").rglob("*.py"))
    return next(path for path in files if definition.search(path.read_text()))


def parsed(path: Path, op: str) -> tuple[str, ast.FunctionDef | ast.ClassDef]:
    """The text of a file, and the last definition of a name in it: overloads stand before it."""
    text = path.read_text()
    kinds = ast.FunctionDef | ast.ClassDef
    found = [x for x in ast.parse(text).body if isinstance(x, kinds) and x.name == op]
    return text, found[-1]


def signature(text: str, node: ast.FunctionDef | ast.ClassDef) -> str:
    """The call as the source has it; of a class that of its constructor."""
    if isinstance(node, ast.ClassDef):
        body = [x for x in node.body if isinstance(x, ast.FunctionDef)]
        arguments = ast.unparse(body[0].args).removeprefix("self, ")
        return f"{node.name}({arguments})"
    lines = text.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    return "\n".join(lines).removeprefix("def ").removesuffix(":")


def dedent(block: str) -> str:
    """A section's text without the indentation that all of it has."""
    return re.sub(r"^ {4}", "", block, flags=re.MULTILINE).strip("\n")


def plain(text: str) -> str:
    """Text in which Markdown sees no emphasis, no HTML and no quotation; its code stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*<>\[\]])", r"\\\1", part) for part in parts
    )


def items(block: str) -> str:
    """`name: description` entries as a list. What follows a blank line stays as it is."""
    first, *rest = ITEM.split(dedent(block))
    lines = [plain(first)] if first.strip() else []
    for name, description in zip(rest[::2], rest[1::2], strict=True):
        words = " ".join(description.partition("\n\n")[0].split())
        lines.append(f"- **`{name}`**: {plain(words)}")
        if below := description.partition("\n\n")[2].rstrip():
            lines += ["", below, ""]
    return "\n".join(lines)


def sections(docstring: str) -> str:
    """A Google-style docstring as Markdown, from its second paragraph on."""
    first, *rest = SECTION.split(docstring + "\n")
    summary, _, more = first.partition("\n\n")
    written = [plain(more.strip() or summary)]
    for title, block in zip(rest[::2], rest[1::2], strict=True):
        if title in ("Args", "Attributes", "Raises"):
            text = items(block)
        elif title == "Example":
            text = f"```pycon\n{dedent(block)}\n```"
        else:
            text = paragraphs(dedent(block))
        name = {"Args": "Arguments", "Note": "What to know"}.get(title, title)
        written.append(f"## {name}\n\n{text}")
    return "\n\n".join(written)


def paragraphs(text: str) -> str:
    """Paragraphs that Markdown reads nothing into, and indented blocks, which are code."""
    blocks = text.split("\n\n")
    return "\n\n".join(block if block.startswith("    ") else plain(block) for block in blocks)


def formula(path: Path) -> str:
    """The docstring of a file: prose, and formulas as indented blocks."""
    return paragraphs(ast.get_docstring(ast.parse(path.read_text())) or "")


def rows(page: Path, op: str) -> list[str]:
    """The first table of a page that has a row about an op: its header, and the rows about it."""
    header: list[str] = []
    found: list[str] = []
    lines = page.read_text().splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if following.startswith("|---") and not found:
            header = [line, following]
        elif f"`{op}`" in line.split("|")[1:2][0] if line.startswith("| ") else False:
            found.append(line)
    return header + found if found else []


def cases() -> list[tuple[str, str, str, str]]:
    """(machine, op, case, table) of all that was measured, from bench/results/README.md."""
    found = []
    text = (ROOT / "bench/results/README.md").read_text()
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        machine = section.partition("\n")[0]
        of_machine = re.findall(r"^### `(\w+)`, (.*)\n\n((?:\|.*\n)+)", section, re.MULTILINE)
        found += [(machine, *case) for case in of_machine]
    return found


def measured(op: str) -> str:
    """The newest times of an op's cases."""
    return "\n\n".join(
        f"**{case}**, {machine}\n\n{table}" for machine, name, case, table in cases() if name == op
    )


def plotted(op: str) -> str:
    """The picture of an op's rows of `fastpg bench`, where it has some."""
    if not (ROOT / f"docs/plots/ops/{op}.svg").exists():
        return ""
    said = "Time of the others as a multiple of fastpg's"
    return f"![{said}](../plots/ops/{op}.svg)\n\n[Every candidate](../benchmarks.md).\n\n"


def measured_in_short() -> str:
    """For each machine a table with a line for each case: its time, and the others' over it."""
    lines: list[str] = []
    heading = ""
    for machine, op, case, table in cases():
        if op in ("overhead", "hardware"):
            continue
        if machine != heading:
            heading = machine
            lines += ["", f"### {machine}", "", "| op | case | fastpg | time / ours |"]
            lines += ["|---|---|---:|---|"]
        header, _, ours, *others = ([x.strip() for x in y.split("|")] for y in table.splitlines())
        ratio = header.index("time / ours")
        slower = ", ".join(f"{other[1]} **{other[ratio]}**" for other in others)
        lines.append(f"| `{op}` | {case} | {ours[2]} | {slower} |")
    return "\n".join(lines)


def made(op: str, formula_of: str | None) -> str:
    """All that follows the hand-written part of a page."""
    source = source_of(op)
    text, node = parsed(source, op)
    parts = [
        f"```python\n{signature(text, node)}\n```",
        sections(ast.get_docstring(node) or ""),
        f"## Formula\n\n{formula(ROOT / formula_of if formula_of else source)}",
    ]
    if where := rows(ROOT / "docs/gpu.md", op):
        parts.append("## Where it runs\n\n" + "\n".join(where))
        parts.append("Backward runs where forward does. [More about GPUs](../gpu.md).")
    if times := plotted(op) + measured(op):
        how = "[how this was measured](../speed.md)"
        parts.append(f"## Measured on a CPU\n\nMedians of interleaved runs: {how}.\n\n{times}")
    if predicted := rows(ROOT / "docs/predicted_gpu_times.md", op):
        parts.append("## Predicted on a GPU, not measured\n\n" + "\n".join(predicted))
        parts.append("As multiples of a copy's time: [the model](../predicted_gpu_times.md).")
    path = source.relative_to(ROOT)
    parts.append(f"The page of the op in the source is [`{path}`](../../{path}).")
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs for every page."""
    if page.file.src_uri == "speed.md":
        return markdown.replace("<!-- measured -->", measured_in_short())
    op = op_of(page.file.src_uri)
    return markdown if op is None else f"{markdown}\n\n{made(op, page.meta.get('formula'))}\n"
