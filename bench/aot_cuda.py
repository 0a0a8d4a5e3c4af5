"""python -m bench.aot_cuda: what the kernels of fastpg._cuda take of each GPU; needs no GPU.

Registers, shared memory, and how wide its accesses are, read from the machine code that nvcc built.
Exits with 1 if any kernel spills registers, or has no loads or no stores of 16 bytes, unless it is
one that writes little.
"""

from __future__ import annotations

import re
import subprocess
import sys

from fastpg._library import _cuda

from .sass import run

NARROW = ("sequence_log_ratio_kernel",)  # A warp sums a sequence, which may begin at any address.
COLUMNS = "{:8}{:>5}{:>7}{:>8}{:>9}{:>9}{:>6}  {}"


def readable(names: list[str]) -> list[str]:
    """What stands before the arguments, without its namespaces: gae_kernel<float>."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    plain = [re.sub(r"\(anonymous namespace\)::|\w+::", "", x) for x in done.stdout.split("\n")]
    return [re.search(r"(\w+<.*>|\w+)\(", name)[1] for name in plain]


def kernels(machine: str) -> list[tuple[str, int, int, int]]:
    """(mangled name, registers, bytes spilled, bytes of shared memory) of each."""
    usage = run("cuobjdump", "-res-usage", "-arch", machine, _cuda.__file__)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    return [(name, int(r), int(stack) + int(local), int(s)) for name, r, stack, s, local in found]


def code_of(machine: str) -> dict[str, str]:
    """The disassembled code of each kernel, by its mangled name."""
    functions = re.split(
        r"Function : (\S+)", run("cuobjdump", "-sass", "-arch", machine, _cuda.__file__)
    )
    return dict(zip(functions[1::2], functions[2::2], strict=True))


def main() -> int:
    header = "arch", "regs", "spill", "shared", "LDG.128", "STG.128", "code", "kernel"
    print(COLUMNS.format(*header))
    faults = []
    for machine in _cuda.gpus.split():
        rows, code = kernels(machine), code_of(machine)
        names = readable([row[0] for row in rows])
        for name, (mangled, registers, spill, shared) in sorted(zip(names, rows, strict=True)):
            loads = len(re.findall(r"LDG\.E\S*\.128", code[mangled]))
            stores = len(re.findall(r"STG\.E\S*\.128", code[mangled]))
            size = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", code[mangled], re.MULTILINE))
            cells = machine, registers, spill, shared, loads, stores, size, name
            print(COLUMNS.format(*cells))
            narrow = not (loads and stores) and not name.startswith(NARROW)
            if spill or narrow:
                faults.append(f"{machine} {name}")
    print(*(f"spills, or is narrow: {fault}" for fault in faults), sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
