"""A kernel in Triton as a launch would compile it: what `python -m bench.aot` compiles.

Each `bench_<op>.py` of an op with kernels in Triton has a function `variants(few, capability)`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

VOCABULARY_TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}
VOCABS = (151936, 50257, 1000, 32000)  # all but 50257 are whole vectors of 16 bytes
OPTIONS = ("num_warps", "enable_fp_fusion", "maxnreg")  # of a launch, among its constants
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
TOKENS = 1024  # A program takes so many at a time, unless its constant BLOCK says otherwise.


@dataclass(frozen=True)
class Variant:
    """A kernel as a launch would compile it: the types of its arguments, and what is constant."""

    kernel: Any  # a triton.JITFunction
    dtype: str  # of the pointers that POINTERS does not name
    constants: dict[str, object]  # None for a tensor that is absent
    options: dict[str, object] = field(default_factory=lambda: {"enable_fp_fusion": False})
    pointers: dict[str, str] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()  # pointers known to be multiples of 16 bytes
    vocab: int = 0  # of the rows of logits that the kernel walks along, if it does

    def type_of(self, name: str) -> str:
        annotated = self.kernel.params[self.kernel.arg_names.index(name)].annotation_type
        return annotated or "*" + (POINTERS | self.pointers).get(name, self.dtype)

    @property
    def element_bytes(self) -> int:
        """The size of what the kernel reads most of."""
        return SIZES[self.pointers.get("logits", self.dtype)]

    @property
    def row_bytes(self) -> int:
        """The size of a row of logits; 0 if the kernel reads none."""
        return self.vocab * self.element_bytes

    @property
    def sweeps_twice(self) -> bool:
        """Whether the kernel reads each row of logits again, when it writes the gradient."""
        return self.kernel.__name__ == "rows_kernel"

    def elements_of_thread(self, warps: int) -> float:
        """How many tokens a thread takes at a time; 0 where the bytes that it reads tell."""
        block = self.constants.get("BLOCK", TOKENS)
        return 0.0 if self.vocab else block / (32 * warps)

    def __str__(self) -> str:
        shown = " ".join(f"{k}={v}" for k, v in self.constants.items())
        return f"{self.pointers.get('logits', self.dtype)} {shown}"


POINTERS = {"mask": "i1", "cu_seqlens": "i32", "lengths": "i32", "denom": "fp64"}
POINTERS |= dict.fromkeys(("terminated", "truncated"), "i1")
POINTERS |= dict.fromkeys(("traced_options", "parts", "sums", "moments", "stats"), "fp64")

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
        options = {name: constants.pop(name) for name in OPTIONS if name in constants}
        yield Variant(kernel, dtype, constants, {"enable_fp_fusion": False} | options)


def features_of_rows(
    few: bool, capability: int, dtypes: Iterable[torch.dtype] = VOCABULARY_TYPES
) -> Iterator[dict[str, Any]]:
    """What the compile-time arguments of the kernels of the vocabulary depend on.

    With `few`, rows as most models train on them, with their entropy; and the largest of all.
    """
    for dtype, vocab, entropy, softcap in itertools.product(dtypes, VOCABS, BOTH, BOTH):
        for aligned in BOTH if vocab % 8 == 0 else (False,):
            usual = entropy and not softcap and aligned == (vocab == VOCABS[0])
            odd = vocab == VOCABS[1] or (vocab == VOCABS[0] and not aligned)
            largest = entropy and softcap and odd and dtype is torch.bfloat16
            wanted = (usual and vocab in VOCABS[:2] and dtype is not torch.float16) or largest
            if wanted or not few:
                yield {
                    "entropy": entropy,
                    "softcap": softcap,
                    "aligned": aligned,
                    "dtype": dtype,
                    "vocab": vocab,
                    "capability": capability // 10,
                }
