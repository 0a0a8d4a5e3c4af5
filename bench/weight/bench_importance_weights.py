"""importance_weights at a million tokens, with its statistics, against the same in PyTorch."""

import torch

import fastpg
from fastpg import importance_weights
from fastpg.bench.timing import Case

from .._example import Example
from .._variant import BOTH, GIVEN_OR_NOT, variants_of

BATCH, LENGTH, HIGH = 128, 8192, 2.0


def _stats(d, mask, ratio, weight, n):
    """What frameworks log of these weights: n of them, 0 where masked."""
    above, squares = (mask & (ratio > HIGH)).sum() / n, (weight**2).sum()
    least, most = ratio.masked_fill(~mask, torch.inf).amin(), (ratio * mask).amax()
    k1, k3 = -d.sum() / mask.sum(), (d.exp() - 1 - d).sum() / mask.sum()
    return above, weight.sum() / n, least, most, weight.sum() ** 2 / (n * squares), k1, k3


def eager_token(logp, behavior_logp, mask):
    d = torch.where(mask, logp - behavior_logp, 0.0).clamp(-20, 20)
    ratio = d.exp()
    weight = torch.where(mask, ratio.clamp(max=HIGH), 0.0)
    return weight, _stats(d, mask, ratio, weight, mask.sum())


def eager_geometric(logp, behavior_logp, mask):
    d = torch.where(mask, logp - behavior_logp, 0.0).clamp(-20, 20)
    mean = d.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    ratio = mean.exp().expand(mask.shape)
    weight = torch.where(mask, ratio.clamp(max=HIGH), 0.0)
    return weight, _stats(d, mask, ratio, weight, mask.sum())


def _case(device, level, eager):
    logp = -torch.rand(BATCH, LENGTH, device=device) * 5
    behavior_logp = logp + 0.2 * torch.randn(BATCH, LENGTH, device=device)
    mask = torch.arange(LENGTH, device=device) < torch.randint(
        1, LENGTH + 1, (BATCH, 1), device=device
    )
    compiled = torch.compile(eager)

    def fused():
        return importance_weights(logp, behavior_logp, mask, level=level, high=HIGH)

    def gate():
        want, _ = eager(logp.double(), behavior_logp.double(), mask)
        error = (fused()[0] - want).abs().max().item()
        assert error < 2e-6, f"weights off by {error}"

    return Case(
        "importance_weights",
        f"{level}, with statistics, {BATCH} x {LENGTH}",
        gate,
        {
            "fastpg": fused,
            "eager": lambda: eager(logp, behavior_logp, mask),
            "torch.compile": lambda: compiled(logp, behavior_logp, mask),
        },
        device=device,
    )


def cases(device):
    yield _case(device, "token", eager_token)
    yield _case(device, "geometric", eager_geometric)


def examples(device):
    """Small calls of the op."""
    logp, behavior_logp = torch.randn(2, 3, 7, device=device).unbind()
    arguments = {"logp": logp, "behavior_logp": behavior_logp, "mask": logp < 1}
    yield Example(fastpg.importance_weights, arguments | {"high": 2.0}, forward_launches=2)
    yield Example(
        fastpg.importance_weights,
        arguments | {"level": "geometric", "low": 0.5, "high": 2.0, "outside": "zero"},
        variant="per sequence",
    )


def variants(few, capability):
    """What a GPU may be asked to compile."""
    from fastpg.ops.weight import importance_weights_triton as page

    packed = {"cu_seqlens": GIVEN_OR_NOT}
    yield from variants_of(page.token_kernel, few, ZERO=BOTH)
    yield from variants_of(page.sequence_kernel, few, **packed, MEAN=BOTH, ZERO=BOTH)
    yield from variants_of(page.merge_kernel, few, dtype=("fp64",))
