"""python -m bench.aot [--few] [80 90 100]: reads the machine code of the kernels in Triton.

It needs no GPU. It compiles every variant that the launchers can ask for; with --few, the largest
of each kernel, and those of the vocabulary that a model trains with. It prints a line for each
sweep over memory. If a variant does not compile or is worse than its bar (bars.py), it exits
with 1.

The Triton that is imported compiles. `make aot` runs this with the installed Triton and, by
PYTHONPATH=.triton-oldest, with the oldest one that is supported.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # which would leave nothing to compile
# Triton keeps what it compiled by a hash of the source and of its own version.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "triton"))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import bars
from ._example import modules
from ._variant import Variant
from .roofline import GPUS, Gpu, bound, resident, rows_over_floor
from .sass import machine_code, sweeps

COLUMNS = "{:7}{:24}{:22}{:>5}{:>6}{:>7}{:>4} {:10}{:>7}{:>6}{:>6}{:>4}{:>4}{:>7} {:17}{:>6}  {}"
HEADER = (
    "arch", "op", "kernel", "regs", "spill", "shared", "on", "sweep", "ins/el", "MUFU", "SHFL",
    "LD", "ST", "flight", "bound by", "floor", "variant",
)  # fmt: skip
LEGEND = """\
on: programs on a multiprocessor; ins/el, MUFU, SHFL: instructions for each element, and of those
the special functions and the shuffles; LD, ST: bytes of a thread's narrowest load and store;
flight: bytes of loads under way on a multiprocessor; floor: the time as a multiple of a copy's of
the same bytes, predicted and not measured."""


class Line(NamedTuple):
    """What is known of one sweep of a compiled kernel; the columns of the table."""

    arch: str
    op: str
    kernel: str
    registers: int
    spilled: int
    shared: int
    programs: int
    sweep: str
    instructions: float
    mufu: float
    shuffles: float
    load: int
    store: int
    in_flight: int
    bound_by: str
    over_floor: float
    variant: str

    def __str__(self) -> str:
        cells = [f"{x:.2f}" if isinstance(x, float) else x for x in self]
        return COLUMNS.format(*cells)


def compiled(variant: Variant, capability: int):
    """The kernel, compiled for a GPU that need not be here."""
    names = variant.kernel.arg_names
    types = {n: "constexpr" if n in variant.constants else variant.type_of(n) for n in names}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in variant.aligned}
    source = ASTSource(variant.kernel, types, constexprs=variant.constants, attrs=attrs)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=dict(variant.options))


def read(op: str, variant: Variant, capability: int) -> list[Line]:
    """A line for each sweep of a variant."""
    binary, gpu = compiled(variant, capability), GPUS[capability]
    warps, shared = binary.metadata.num_warps, binary.metadata.shared
    code = machine_code(binary.asm["cubin"])
    here = resident(code.registers, shared, warps, gpu, programs_by_cache(variant, gpu))
    found = sweeps(code, variant.element_bytes, variant.elements_of_thread(warps))
    if variant.vocab:  # Zeros for the rows that no gradient reaches are no sweep of the logits.
        found = [sweep for sweep in found if sweep.loads]
    lines = []
    for sweep in found:
        limit = bound(sweep, here, gpu, from_cache=variant.sweeps_twice and bool(sweep.stores))
        line = Line(
            arch=f"sm_{capability}",
            op=op,
            kernel=variant.kernel.__name__,
            registers=code.registers,
            spilled=code.spilled,
            shared=shared,
            programs=here.programs,
            sweep=sweep.kind,
            instructions=sweep.per_element(),
            mufu=sweep.per_element("MUFU"),
            shuffles=sweep.per_element("SHFL"),
            load=sweep.load_width,
            store=sweep.store_width,
            in_flight=here.in_flight(sweep),
            bound_by=limit.by,
            over_floor=limit.over_floor,
            variant=str(variant),
        )
        lines.append(line)
    if variant.sweeps_twice:
        both = rows_over_floor(found, here, variant.row_bytes, gpu)
        lines = [line._replace(over_floor=both) for line in lines]
    return lines


def programs_by_cache(variant: Variant, gpu: Gpu) -> int:
    """The most programs on a multiprocessor, as their rows stay in the cache between two sweeps."""
    if not variant.sweeps_twice:
        return 32
    return max(gpu.cache_bytes // (gpu.multiprocessors * variant.row_bytes), 1)


def report(op: str, few: bool, capability: int) -> tuple[list[Line], list[str]]:
    """The lines of all variants of an op, and what is worse than its bar."""
    lines, faults = [], []
    for variant in modules()[op].variants(few, capability):
        try:
            of_variant = read(op, variant, capability)
        except Exception as error:  # Versions of Triton raise errors of several types.
            reason = (str(error).splitlines() or [""])[-1]
            name = f"sm_{capability} {op} {variant.kernel.__name__}"
            faults.append(f"{name} does not compile: {type(error).__name__}: {reason}; {variant}")
            continue
        lines += of_variant
        for line in of_variant:
            faults += [
                f"{line.arch} {op} {line.kernel} {fault}; {variant}"
                for fault in bars.faults(line, variant)
            ]
    return lines, faults


def main() -> int:
    known = [name for name, module in modules().items() if hasattr(module, "variants")]
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument("capabilities", nargs="*", type=int, default=list(GPUS))
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--op", action="append", choices=known)
    args = parser.parse_args()
    cases = itertools.product(args.op or known, [args.few], args.capabilities)
    print(f"triton {triton.__version__}", LEGEND, COLUMNS.format(*HEADER), sep="\n")
    worse: list[str] = []
    with ProcessPoolExecutor() as pool:
        for lines, faults in pool.map(report, *zip(*cases, strict=True)):
            print(*lines, sep="\n", flush=True)
            worse += faults
    print(*worse, sep="\n")
    print(f"{len(worse)} faults" if worse else "every kernel is within its bars")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
