"""A kernel in Triton as a launch would compile it: what `python -m bench.aot` compiles.

Each `bench_<op>.py` of an op with kernels in Triton has a function `variants(few, capability)`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

VOCABULARY_TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}
VOCABS = (151936, 1000)  # one for each row of the table of tiles


@dataclass(frozen=True)
class Variant:
    """A kernel as a launch would compile it: the types of its arguments, and what is constant."""

    kernel: Any  # a triton.JITFunction
    dtype: str  # of the pointers that POINTERS does not name
    constants: dict[str, object]  # None for a tensor that is absent
    options: dict[str, object] = field(default_factory=lambda: {"enable_fp_fusion": False})
    pointers: dict[str, str] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()  # pointers known to be multiples of 16 bytes

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
