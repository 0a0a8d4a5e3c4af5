"""python -m bench.aot_cuda: what the kernels of fastpg._cuda take of each GPU; needs no GPU.

Registers, shared memory, and 16-byte loads, read from the machine code that nvcc built. Exits with
1 if any kernel spills registers.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import triton.backends.nvidia

from fastpg._library import _cuda

BIN = Path(triton.backends.nvidia.__file__).parent / "bin"
COLUMNS = "{:8}{:>5}{:>7}{:>8}{:>9}  {}"


def run(*command: object) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def readable(names: list[str]) -> list[str]:
    """What stands before the arguments, without its namespaces: gae_kernel<float>."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    plain = [re.sub(r"\(anonymous namespace\)::|\w+::", "", x) for x in done.stdout.split("\n")]
    return [re.search(r"(\w+<.*>|\w+)\(", name)[1] for name in plain]


def kernels(machine: str) -> list[tuple[str, int, int, int]]:
    """(mangled name, registers, bytes spilled, bytes of shared memory) of each."""
    usage = run(BIN / "cuobjdump", "-res-usage", "-arch", machine, _cuda.__file__)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    return [(name, int(r), int(stack) + int(local), int(s)) for name, r, stack, s, local in found]


def wide_loads(machine: str) -> dict[str, int]:
    """The loads of 16 bytes in each kernel."""
    code = run(BIN / "cuobjdump", "-sass", "-arch", machine, _cuda.__file__)
    functions = re.split(r"Function : (\S+)", code)[1:]
    bodies = zip(functions[::2], functions[1::2], strict=True)
    return {name: len(re.findall(r"LDG\.E\S*\.128", body)) for name, body in bodies}


def main() -> int:
    print(COLUMNS.format("arch", "regs", "spill", "shared", "LDG.128", "kernel"))
    spilled = 0
    for machine in _cuda.gpus.split():
        rows, loads = kernels(machine), wide_loads(machine)
        names = readable([row[0] for row in rows])
        for name, (mangled, registers, spill, shared) in sorted(zip(names, rows, strict=True)):
            spilled += spill > 0
            print(COLUMNS.format(machine, registers, spill, shared, loads[mangled], name))
    print(f"{spilled} spill registers" if spilled else "no kernel spills registers")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
