"""python -m bench.aot [--few] [80 90 100]: compiles the Triton kernels without a GPU.

Every variant that the launchers can ask for; with --few, the largest: entropy and softcap, in bf16
and fp32. Prints what each takes, and exits with 1 if any spills registers.
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
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # which would leave nothing to compile

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastpg.ops import token_logprobs_triton as kernels

BIN = Path(triton.backends.nvidia.__file__).parent / "bin"
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}
VOCABS = (151936, 1000)  # one for each row of the table
COLUMNS = "{:7}{:9}{:6}{:8}{:8}{:8}{:8}{:>5}{:>7}{:>8}{:>9}{:>7}"
HEADER = ("arch", "kernel", "dtype", " V", "entropy", "softcap", "aligned", "regs", "spill")
HEADER = (*HEADER, "shared", "LDG.128", "s")


def signature(names: list[str], dtype: torch.dtype) -> dict[str, str]:
    """The types of the run-time arguments."""
    types = dict.fromkeys(names, "*fp32")
    types |= dict.fromkeys(("rows", "inner", "temperature_stride", "slices"), "i32")
    types |= dict.fromkeys(("outer_stride", "inner_stride", "vocab", "ignore_index"), "i64")
    types |= {"labels": "*i64", "flag": "*i64", "softcap": "fp32"}
    types |= dict.fromkeys(("logits", "out"), f"*{TYPES[dtype]}")
    return {name: types[name] for name in names}


def compiled(capability: int, forward: bool, dtype: torch.dtype, vocab: int, *flags: bool):
    """The kernel as a launch with these (entropy, softcap, aligned) would compile it."""
    options = kernels.options(forward, *flags, dtype, vocab, capability // 10)
    for_compiler = {name: options.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    kernel = kernels.forward_kernel if forward else kernels.backward_kernel
    names = [name for name in kernel.arg_names if name not in options]
    types = signature(names, dtype) | dict.fromkeys(options, "constexpr")
    aligned = [names.index(n) for n in ("logits", "out") if n in names and options["ALIGNED"]]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=options, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=for_compiler)


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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument("capabilities", nargs="*", type=int, default=[80, 90, 100])
    parser.add_argument("--few", action="store_true")
    args = parser.parse_args()
    both = (True, False)
    pairs = [(True, True)] if args.few else list(itertools.product(both, both))
    dtypes = list(TYPES)[:2] if args.few else list(TYPES)
    spilled = 0
    print(COLUMNS.format(*HEADER))
    for case in itertools.product(args.capabilities, both, dtypes, VOCABS, pairs, both):
        capability, forward, dtype, vocab, pair, aligned = case
        begin = time.perf_counter()
        kernel = compiled(capability, forward, dtype, vocab, *pair, aligned)
        registers, spill, loads = resources(kernel.asm["cubin"])
        spilled += spill > 0
        name, flags = "forward" if forward else "backward", [int(on) for on in (*pair, aligned)]
        cells = f"sm_{capability}", name, TYPES[dtype], f" {vocab}", *flags, registers, spill
        seconds = f"{time.perf_counter() - begin:.1f}"
        print(COLUMNS.format(*cells, kernel.metadata.shared, loads, seconds), flush=True)
    print(f"{spilled} spill registers" if spilled else "no variant spills registers")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
