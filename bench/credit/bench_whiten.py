"""whiten at a million tokens, against the masked form that trainers use."""

import torch

import fastpg
from fastpg import whiten
from fastpg.bench.baselines import whiten as eager
from fastpg.bench.timing import Case

from .._example import Example
from .._variant import BOTH, variants_of

BATCH, LENGTH = 128, 8192


def cases(device):
    x = torch.randn(BATCH, LENGTH, device=device)
    lengths = torch.randint(1, LENGTH + 1, (BATCH, 1), device=device)
    mask = torch.arange(LENGTH, device=device) < lengths
    compiled = torch.compile(eager)

    def gate():
        want = eager(x.double(), mask)
        error = (whiten(x, mask) - want).abs().max().item()
        assert error < 1e-6 * (1 + want.abs().max()), f"off by {error}"

    yield Case(
        "whiten",
        f"{BATCH} x {LENGTH} float32",
        gate,
        {
            "fastpg": lambda: whiten(x, mask),
            "eager": lambda: eager(x, mask),
            "torch.compile": lambda: compiled(x, mask),
        },
        device=device,
    )


def examples(device):
    """Small calls of the op."""
    x = torch.randn(3, 7, device=device)
    yield Example(
        fastpg.whiten,
        {"x": x, "mask": x < 1},
        differentiable=("x",),
        forward_launches=3,
        backward_launches=3,
    )


def variants(few, capability):
    """What a GPU may be asked to compile."""
    from fastpg.ops.credit import whiten_triton as page

    yield from variants_of(page.moments_kernel, few)
    yield from variants_of(page.merge_kernel, few, dtype=("fp64",))
    yield from variants_of(page.whiten_kernel, few, CENTER=BOTH)
    yield from variants_of(page.gradient_sums_kernel, few)
    yield from variants_of(page.gradient_kernel, few, CENTER=BOTH)
