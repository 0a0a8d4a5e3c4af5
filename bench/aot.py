"""python -m bench.aot [--few] [80 90 100]: compiles the Triton kernels without a GPU.

Every variant that the launchers can ask for; with --few, the largest of each kernel. Prints what
each takes, and exits with 1 if any spills registers.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # which would leave nothing to compile

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._example import modules
from ._variant import Variant

BIN = Path(triton.backends.nvidia.__file__).parent / "bin"
COLUMNS = "{:7}{:25}{:22}{:>5}{:>7}{:>8}{:>9}{:>6}  {}"
HEADER = ("arch", "op", "kernel", "regs", "spill", "shared", "LDG.128", "s", "variant")


def compiled(variant: Variant, capability: int):
    """The kernel, compiled for a GPU that need not be here."""
    names = variant.kernel.arg_names
    types = {n: "constexpr" if n in variant.constants else variant.type_of(n) for n in names}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in variant.aligned}
    source = ASTSource(variant.kernel, types, constexprs=variant.constants, attrs=attrs)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=dict(variant.options))


def resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes spilled, and the loads of 16 bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [BIN / tool, flag, file.name], capture_output=True, text=True, check=True
            )
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage.stdout)
    registers, stack, local = map(int, found.groups())
    return registers, stack + local, len(re.findall(r"LDG\.E\S*\.128", code.stdout))


def report(op: str, few: bool, capability: int) -> tuple[list[str], int]:
    """A line for each variant of an op, and how many of them spill registers."""
    lines, spilled = [], 0
    for variant in modules()[op].variants(few, capability):
        begin = time.perf_counter()
        binary = compiled(variant, capability)
        registers, spill, loads = resources(binary.asm["cubin"])
        spilled += spill > 0
        name, seconds = variant.kernel.__name__, f"{time.perf_counter() - begin:.1f}"
        cells = f"sm_{capability}", op, name, registers, spill, binary.metadata.shared
        lines.append(COLUMNS.format(*cells, loads, seconds, str(variant)))
    return lines, spilled


def main() -> int:
    known = [name for name, module in modules().items() if hasattr(module, "variants")]
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument("capabilities", nargs="*", type=int, default=[80, 90, 100])
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--op", action="append", choices=known)
    args = parser.parse_args()
    cases = itertools.product(args.op or known, [args.few], args.capabilities)
    print(COLUMNS.format(*HEADER))
    spilled = 0
    with ProcessPoolExecutor() as pool:
        for lines, count in pool.map(report, *zip(*cases, strict=True)):
            print("\n".join(lines), flush=True)
            spilled += count
    print(f"{spilled} spill registers" if spilled else "no variant spills registers")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
