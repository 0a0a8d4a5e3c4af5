"""python -m bench.predict [--check]: writes docs/predicted_gpu_times.md, from machine code alone.

For each kernel in Triton it compiles the variant that is used most, and predicts its time by the
model of roofline.py. With --check it compiles nothing: it fails if the page is of other kernels.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from . import aot
from ._example import modules
from ._variant import Variant
from .roofline import GPUS

PAGE = Path(__file__).parents[1] / "docs/predicted_gpu_times.md"
BEGIN, END = "<!-- predictions -->\n", "<!-- /predictions -->"
SHAPES = (("bf16", 151936), ("fp32", 151936), ("bf16", 50257))


def typical(op: str) -> Iterator[tuple[str, Variant]]:
    """The variants of an op's kernels that are used most, and what tells them apart."""
    plain: dict[str, Variant] = {}
    for variant in modules()[op].variants(False, 90):
        name = variant.kernel.__name__
        if variant.vocab:
            if (label := label_of_rows(variant)) is not None:
                yield label, variant
        elif variant.dtype == "fp32" and name != "merge_kernel":
            known = plain.setdefault(name, variant)
            if absent(variant) > absent(known):
                plain[name] = variant
    for variant in plain.values():
        yield "fp32", variant


def absent(variant: Variant) -> int:
    """How many tensors the variant does without."""
    return sum(value is None for value in variant.constants.values())


def label_of_rows(variant: Variant) -> str | None:
    """The type and width of the logits, of the variants that a model trains with."""
    dtype, constants = variant.pointers["logits"], variant.constants
    aligned = variant.vocab % 8 == 0
    if (dtype, variant.vocab) not in SHAPES or constants["ALIGNED"] != aligned:
        return None
    if constants["SOFTCAP"] or constants.get("SURROGATE", "sapo") != "sapo":
        return None
    return f"{dtype}, V={variant.vocab}" + (", with entropy" if constants["ENTROPY"] else "")


def rows() -> Iterator[str]:
    """The lines of the table."""
    names = [gpu.name for gpu in GPUS.values()]
    yield f"| op | kernel | logits or tokens | {' | '.join(names)} | bound by, on an H100 |"
    yield "|---|---|---|" + "---:|" * len(names) + "---|"
    for op in (name for name, module in modules().items() if hasattr(module, "variants")):
        for label, variant in typical(op):
            cells, limits = [], []
            for capability in GPUS:
                lines = aot.read(op, variant, capability)
                cells.append(f"{max(line.over_floor for line in lines):.2f}")
                if capability == 90:
                    limits = [f"{line.sweep}: {line.bound_by}" for line in lines]
            kernel = f"`{variant.kernel.__name__}`"
            yield f"| `{op}` | {kernel} | {label} | {' | '.join(cells)} | {'; '.join(limits)} |"


def kernels_of_page() -> set[tuple[str, ...]]:
    """The op, the kernel and the variant of each line of the page."""
    table = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    return set(re.findall(r"^\| `(\w+)` \| `(\w+)` \| ([^|]+) \|", table, re.MULTILINE))


def main() -> int:
    if "--check" in sys.argv[1:]:
        ops = [name for name, module in modules().items() if hasattr(module, "variants")]
        wanted = {(op, v.kernel.__name__, label) for op in ops for label, v in typical(op)}
        missing, stale = wanted - kernels_of_page(), kernels_of_page() - wanted
        print("missing:", sorted(missing), "stale:", sorted(stale))
        return int(bool(missing or stale))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    table = "\n".join(rows())
    PAGE.write_text(before + BEGIN + table + "\n" + END + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
