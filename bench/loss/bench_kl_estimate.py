"""kl_estimate, forward + backward at a million tokens, against the formula in PyTorch."""

import torch

import fastpg
from fastpg import kl_estimate
from fastpg.bench.baselines import k3 as eager
from fastpg.bench.timing import Case

from .._example import Example
from .._variant import variants_of

TOKENS = 1_000_000


def fused(logp, ref_logp):
    return kl_estimate(logp, ref_logp, kind="k3")


def training(function, logp, ref_logp):
    x, upstream = logp.clone().requires_grad_(), torch.ones_like(logp)
    return lambda: torch.autograd.grad(function(x, ref_logp), x, upstream)


def cases(device):
    logp = -torch.rand(TOKENS, device=device) * 5
    ref_logp = logp + 0.2 * torch.randn(TOKENS, device=device)

    def gate():
        want = eager(logp.double(), ref_logp.double())
        error = (fused(logp, ref_logp) - want).abs().max().item()
        assert error < 1e-6 * (1 + want.abs().max()), f"kl off by {error}"

    yield Case(
        "kl_estimate",
        f"k3, forward + backward, {TOKENS} tokens",
        gate,
        {
            "fastpg": training(fused, logp, ref_logp),
            "eager": training(eager, logp, ref_logp),
            "torch.compile": training(torch.compile(eager), logp, ref_logp),
        },
        device=device,
    )


def examples(device):
    """Small calls of the op."""
    logp, ref_logp = torch.randn(2, 3, 7, device=device).unbind()
    yield Example(
        fastpg.kl_estimate,
        {"logp": logp, "ref_logp": ref_logp, "kind": "k3"},
        differentiable=("logp", "ref_logp"),
        forward_launches=1,
        backward_launches=2,
    )


def variants(few, capability):
    """What a GPU may be asked to compile."""
    from fastpg.ops.loss import kl_estimate_triton as page

    yield from variants_of(page.forward_kernel, few, KIND=("k3", "k2", "k1"))
    yield from variants_of(page.backward_kernel, few, KIND=("k3", "k2", "k1"))
