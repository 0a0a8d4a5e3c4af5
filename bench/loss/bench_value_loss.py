"""value_loss, forward + backward at a million tokens, against the loss as commonly written."""

import torch

import fastpg
from fastpg import value_loss
from fastpg.bench.baselines import CLIP
from fastpg.bench.baselines import clipped_value_loss as eager
from fastpg.bench.timing import Case

from .._example import Example
from .._variant import GIVEN_OR_NOT, variants_of

TOKENS = 1_000_000


def fused(values, returns, weight, old_values):
    return value_loss(values, returns, weight, old_values=old_values, clip=CLIP)[0]


def training(function, values, *rest):
    x = values.clone().requires_grad_()
    return lambda: torch.autograd.grad(function(x, *rest), x)


def cases(device):
    yield case(TOKENS, device)
    if device == "cuda":
        yield case(131072, device)


def case(tokens, device):
    values, returns, noise = torch.randn(3, tokens, device=device)
    weight = torch.full((tokens,), 1 / tokens, device=device)
    inputs = values, returns, weight, values + 0.2 * noise

    def gate():
        want = eager(*(t.double() for t in inputs)).item()
        error = abs(fused(*inputs).item() - want)
        assert error < 1e-6 * (1 + abs(want)), f"loss off by {error}"

    step = training(fused, *inputs)
    graph = {"fastpg, under a CUDA graph": step} if device == "cuda" else {}
    return Case(
        "value_loss",
        f"forward + backward, {tokens} tokens",
        gate,
        {
            "fastpg, with its statistics": step,
            **graph,
            "eager, loss alone": training(eager, *inputs),
            "torch.compile, loss alone": training(torch.compile(eager), *inputs),
        },
        ours="fastpg, with its statistics",
        device=device,
        graphs=tuple(graph),
    )


def examples(device):
    """Small calls of the op."""
    values, returns, old_values = torch.randn(3, 3, 7, device=device).unbind()
    arguments = {"values": values, "returns": returns, "weight": (values < 1).float()}
    yield Example(
        fastpg.value_loss,
        arguments,
        differentiable=("values",),
        forward_launches=2,
        backward_launches=1,
    )
    yield Example(
        fastpg.value_loss,
        arguments | {"old_values": old_values, "clip": 0.2},
        differentiable=("values",),
        variant="clipped",
    )


def variants(few, capability):
    """What a GPU may be asked to compile."""
    from fastpg.ops.loss import value_loss_triton as page

    yield from variants_of(page.forward_kernel, few, old_values=GIVEN_OR_NOT)
    yield from variants_of(page.merge_kernel, few)
