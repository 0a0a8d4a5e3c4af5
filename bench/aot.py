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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # which would leave nothing to compile

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastpg.ops.common import triton as _triton
from fastpg.ops.credit import gae_triton, token_rewards_triton, whiten_triton
from fastpg.ops.loss import (
    kl_estimate_triton,
    policy_loss_from_logits_triton,
    policy_loss_triton,
    value_loss_triton,
)
from fastpg.ops.vocabulary import token_logprobs_triton
from fastpg.ops.weight import importance_weights_triton, token_weights_triton

BIN = Path(triton.backends.nvidia.__file__).parent / "bin"
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}
VOCABS = (151936, 1000)  # one for each row of the table
COLUMNS = "{:7}{:25}{:22}{:>5}{:>7}{:>8}{:>9}{:>6}  {}"
HEADER = ("arch", "op", "kernel", "regs", "spill", "shared", "LDG.128", "s", "variant")


@dataclass(frozen=True)
class Variant:
    """A kernel as a launch would compile it: the types of its arguments, and what is constant."""

    kernel: triton.JITFunction
    dtype: str  # of the pointers that POINTERS does not name
    constants: dict[str, object]  # None for a tensor that is absent
    options: dict[str, object] = field(default_factory=lambda: _triton.OPTIONS)
    pointers: dict[str, str] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()  # pointers known to be multiples of 16 bytes

    def compile(self, capability: int):
        names = self.kernel.arg_names
        types = {n: "constexpr" if n in self.constants else self.type_of(n) for n in names}
        attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in self.aligned}
        source = ASTSource(self.kernel, types, constexprs=self.constants, attrs=attrs)
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options=dict(self.options))

    def type_of(self, name: str) -> str:
        annotated = self.kernel.params[self.kernel.arg_names.index(name)].annotation_type
        return annotated or "*" + (POINTERS | self.pointers).get(name, self.dtype)

    def __str__(self) -> str:
        shown = " ".join(f"{k}={v}" for k, v in self.constants.items())
        return f"{self.pointers.get('logits', self.dtype)} {shown}"


POINTERS = {"mask": "i1", "cu_seqlens": "i32", "lengths": "i32", "denom": "fp64"}
POINTERS |= dict.fromkeys(("terminated", "truncated"), "i1")
POINTERS |= dict.fromkeys(
    ("device_options", "traced_options", "parts", "sums", "moments", "stats"), "fp64"
)

BOTH = (True, False)
GIVEN_OR_NOT = (..., None)  # of a tensor


def variants_of(kernel, few: bool, **choices: tuple) -> Iterator[Variant]:
    """One for each choice of constants, in fp64 and fp32. The first of each is the largest.

    Packed and padded batches take other branches: with `few` too, both are compiled.
    """
    choices = {"dtype": ("fp64", "fp32")} | choices
    if few:
        choices = {k: v if k == "cu_seqlens" else v[:1] for k, v in choices.items()}
    for values in itertools.product(*choices.values()):
        constants = dict(zip(choices, values, strict=True))
        dtype = constants.pop("dtype")
        constants = {name: value for name, value in constants.items() if value is not ...}
        yield Variant(kernel, dtype, constants)


def kl_estimate(few: bool, _) -> Iterator[Variant]:
    yield from variants_of(kl_estimate_triton.forward_kernel, few, KIND=("k3", "k2", "k1"))
    yield from variants_of(kl_estimate_triton.backward_kernel, few, KIND=("k3", "k2"))


def token_weights(few: bool, _) -> Iterator[Variant]:
    page, fp32 = token_weights_triton, ("fp32",)
    yield from variants_of(page.length_kernel, few, dtype=fp32, cu_seqlens=GIVEN_OR_NOT)
    yield from variants_of(
        page.weight_kernel, few, dtype=fp32, cu_seqlens=GIVEN_OR_NOT, PER_SEQUENCE=BOTH
    )


def token_rewards(few: bool, _) -> Iterator[Variant]:
    page, packed = token_rewards_triton, {"cu_seqlens": GIVEN_OR_NOT}
    yield from variants_of(page.forward_kernel, few, kl=GIVEN_OR_NOT, **packed)
    yield from variants_of(page.backward_kernel, few, grad_kl=GIVEN_OR_NOT, **packed)


def importance_weights(few: bool, _) -> Iterator[Variant]:
    page, packed = importance_weights_triton, {"cu_seqlens": GIVEN_OR_NOT}
    yield from variants_of(page.token_kernel, few, ZERO=BOTH)
    yield from variants_of(page.sequence_kernel, few, **packed, MEAN=BOTH, ZERO=BOTH)
    yield from variants_of(page.merge_kernel, few, dtype=("fp64",))


def whiten(few: bool, _) -> Iterator[Variant]:
    page = whiten_triton
    yield from variants_of(page.moments_kernel, few)
    yield from variants_of(page.merge_kernel, few, dtype=("fp64",))
    yield from variants_of(page.whiten_kernel, few, CENTER=BOTH)
    yield from variants_of(page.gradient_sums_kernel, few)
    yield from variants_of(page.gradient_kernel, few, CENTER=BOTH)


def value_loss(few: bool, _) -> Iterator[Variant]:
    yield from variants_of(value_loss_triton.forward_kernel, few, old_values=GIVEN_OR_NOT)
    yield from variants_of(value_loss_triton.merge_kernel, few)


def policy_loss(few: bool, _) -> Iterator[Variant]:
    page, surrogates = policy_loss_triton, ("sapo", "ppo", "cispo", "reinforce")
    absent = dict.fromkeys(("ratio", "ref_logp", "entropy", "traced_options"), (None,))
    forward, kls = page.forward_kernel, ("k3", "k3_naive", "k2")
    yield from variants_of(forward, few, SURROGATE=surrogates, KL=kls)
    if not few:
        yield from variants_of(
            forward, few, old_logp=GIVEN_OR_NOT, SURROGATE=surrogates, KL=("k3",), **absent
        )
    yield from variants_of(page.merge_kernel, few)
    yield from variants_of(page.sequence_ratio_kernel, few, cu_seqlens=GIVEN_OR_NOT)


def gae(few: bool, _) -> Iterator[Variant]:
    """Every optional tensor; none; the mask alone; each padded and packed."""
    page, names = gae_triton, ("bootstrap", "mask", "gammas", "lams", "rho", "c", "terminated")
    shape = {"BLOCK": (page.BLOCK,), "GAMMA_PER_TOKEN": BOTH, "LAM_PER_TOKEN": BOTH}
    none = dict.fromkeys((*names, "truncated"), (None,))
    for kernel in (page.forward_kernel, page.backward_kernel):
        absent = {name: value for name, value in none.items() if name in kernel.arg_names}
        packed = {"cu_seqlens": GIVEN_OR_NOT}
        yield from variants_of(kernel, few, **shape, **packed)
        if not few:
            plain = absent | dict.fromkeys(("GAMMA_PER_TOKEN", "LAM_PER_TOKEN"), (False,))
            yield from variants_of(kernel, few, **shape | plain, **packed)
            yield from variants_of(kernel, few, **shape | plain | {"mask": (...,)}, **packed)


def token_logprobs(few: bool, capability: int) -> Iterator[Variant]:
    page, flags = token_logprobs_triton, BOTH[:1] if few else BOTH
    dtypes = list(TYPES)[: 2 if few else None]
    vocabs = VOCABS[: 1 if few else None]
    cases = itertools.product(BOTH, flags, flags, BOTH, dtypes, vocabs)
    for forward, entropy, softcap, aligned, dtype, vocab in cases:
        features = {"entropy": entropy, "softcap": softcap, "aligned": aligned}
        features |= {"dtype": dtype, "vocab": vocab, "capability": capability // 10}
        constants = page.constants(forward=forward, **features)
        options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
        kernel = page.forward_kernel if forward else page.backward_kernel
        tensors = {"labels": "i64", "flag": "i64", "stats": "fp32"}
        tensors |= dict.fromkeys(("logits", "out"), TYPES[dtype])
        names = tuple(n for n in ("logits", "out") if aligned and n in kernel.arg_names)
        yield Variant(kernel, "fp32", constants, options, tensors, names)


def policy_loss_from_logits(few: bool, capability: int) -> Iterator[Variant]:
    """With all that is optional where there is entropy, else without; and every surrogate so."""
    page, kernel = policy_loss_from_logits_triton, policy_loss_from_logits_triton.rows_kernel
    absent = dict.fromkeys(("old_logp", "ref_logp", "traced_options"))
    losses = [{"SURROGATE": kind, "KL": "k3"} for kind in ("sapo", "ppo", "cispo", "reinforce")]
    flags, dtypes = BOTH[:1] if few else BOTH, list(TYPES)[:2]
    cases = itertools.product(flags, flags, BOTH, dtypes, VOCABS[: 1 if few else None])
    for *row, dtype, vocab in cases:
        features = dict(zip(("entropy", "softcap", "aligned"), row, strict=True))
        features |= {"dtype": dtype, "vocab": vocab, "capability": capability // 10}
        constants = page.constants(**features)
        options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
        tensors = {"labels": "i64", "flag": "i64", **dict.fromkeys(("logits", "out"), TYPES[dtype])}
        given = {} if constants["ENTROPY"] else absent | {"entropy": None}
        for loss in losses[: 1 if few or any(row[:2]) or not row[2] else None]:
            constant = given | loss | constants
            yield Variant(kernel, "fp32", constant, options, tensors, ("logits", "out") * row[2])
    for dtype in ("fp64",) if few else ("fp64", "fp32", "bf16"):
        factor = {"factor": "fp64" if dtype == "fp64" else "fp32"}
        yield Variant(page.scale_kernel, dtype, {}, pointers=factor)


OPS = (
    token_logprobs,
    policy_loss_from_logits,
    kl_estimate,
    token_weights,
    token_rewards,
    importance_weights,
    whiten,
    value_loss,
    policy_loss,
    gae,
)


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


def report(op: Callable, few: bool, capability: int) -> tuple[list[str], int]:
    """A line for each variant of an op, and how many of them spill registers."""
    lines, spilled = [], 0
    for variant in op(few, capability):
        begin = time.perf_counter()
        compiled = variant.compile(capability)
        registers, spill, loads = resources(compiled.asm["cubin"])
        spilled += spill > 0
        name, seconds = variant.kernel.__name__, f"{time.perf_counter() - begin:.1f}"
        cells = f"sm_{capability}", op.__name__, name, registers, spill, compiled.metadata.shared
        lines.append(COLUMNS.format(*cells, loads, seconds, str(variant)))
    return lines, spilled


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument("capabilities", nargs="*", type=int, default=[80, 90, 100])
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--op", action="append", choices=[op.__name__ for op in OPS])
    args = parser.parse_args()
    ops = [op for op in OPS if not args.op or op.__name__ in args.op]
    cases = itertools.product(ops, [args.few], args.capabilities)
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
