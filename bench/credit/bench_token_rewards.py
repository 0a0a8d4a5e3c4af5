"""token_rewards at a million tokens, against indexing the last token as trainers do."""

import torch

import fastpg
from fastpg import token_rewards
from fastpg.bench.timing import Case

from .._example import Example
from .._variant import GIVEN_OR_NOT, variants_of

BATCH, LENGTH, COEF = 128, 8192, 0.05


def eager(scores, mask, kl):
    rewards = -COEF * kl * mask
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1, keepdim=True)
    return rewards.scatter_add(1, last, scores[:, None])


def cases(device):
    scores, kl = torch.randn(BATCH, device=device), torch.randn(BATCH, LENGTH, device=device)
    lengths = torch.randint(1, LENGTH + 1, (BATCH, 1), device=device)
    mask = torch.arange(LENGTH, device=device) < lengths
    compiled = torch.compile(eager)

    def fused():
        return token_rewards(scores, mask, kl=kl, kl_coef=COEF)

    def gate():
        error = (fused() - eager(scores.double(), mask, kl.double())).abs().max().item()
        assert error < 1e-6, f"rewards off by {error}"

    yield Case(
        "token_rewards",
        f"{BATCH} x {LENGTH} float32",
        gate,
        {
            "fastpg": fused,
            "eager": lambda: eager(scores, mask, kl),
            "torch.compile": lambda: compiled(scores, mask, kl),
        },
        device=device,
    )


def examples(device):
    """Small calls of the op."""
    mask = torch.rand(3, 7, device=device) < 0.8
    yield Example(
        fastpg.token_rewards,
        {
            "scores": torch.randn(3, device=device),
            "mask": mask,
            "kl": torch.randn(3, 7, device=device),
            "kl_coef": 0.1,
        },
        differentiable=("scores", "kl"),
        forward_launches=1,
        backward_launches=1,
    )


def variants(few, capability):
    """What a GPU may be asked to compile."""
    from fastpg.ops.credit import token_rewards_triton as page

    packed = {"cu_seqlens": GIVEN_OR_NOT}
    yield from variants_of(page.forward_kernel, few, kl=GIVEN_OR_NOT, **packed)
    yield from variants_of(page.backward_kernel, few, grad_kl=GIVEN_OR_NOT, **packed)
