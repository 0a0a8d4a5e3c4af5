"""token_weights at a million tokens, reduce="sequence": against dividing by the lengths."""

import torch

import fastpg
from fastpg import token_weights
from fastpg.bench.timing import Case

from .._example import Example
from .._variant import BOTH, GIVEN_OR_NOT, variants_of

BATCH, LENGTH = 128, 8192


def eager(mask):
    lengths = mask.sum(1, keepdim=True)
    return mask / lengths.clamp(min=1) / (lengths > 0).sum()


def cases(device):
    lengths = torch.randint(1, LENGTH + 1, (BATCH, 1), device=device)
    mask = torch.arange(LENGTH, device=device) < lengths
    compiled = torch.compile(eager)

    def fused():
        return token_weights(mask, reduce="sequence")

    def gate():
        want = eager(mask)
        error = ((fused() - want).abs() / want.clamp(min=1e-12)).max().item()
        assert error < 1e-6, f"weights off by a relative {error}"

    yield Case(
        "token_weights",
        f"sequence, {BATCH} x {LENGTH}",
        gate,
        {"fastpg": fused, "eager": lambda: eager(mask), "torch.compile": lambda: compiled(mask)},
        device=device,
    )


def examples(device):
    """Small calls of the op."""
    mask = torch.rand(3, 7, device=device) < 0.8
    yield Example(fastpg.token_weights, {"mask": mask, "reduce": "sequence"}, forward_launches=4)


def variants(few, capability):
    """What a GPU may be asked to compile."""
    from fastpg.ops.weight import token_weights_triton as page

    fp32 = ("fp32",)
    yield from variants_of(page.length_kernel, few, dtype=fp32, cu_seqlens=GIVEN_OR_NOT)
    yield from variants_of(
        page.weight_kernel, few, dtype=fp32, cu_seqlens=GIVEN_OR_NOT, PER_SEQUENCE=BOTH
    )
