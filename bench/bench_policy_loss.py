"""policy_loss, forward + backward at a million tokens, against the loss as commonly written."""

import torch

from fastpg import policy_loss

from ._timing import Case

TOKENS, CLIP = 1_000_000, 0.2


def eager(logp, advantages, weight, old_logp):
    ratio = (logp - old_logp).exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages
    return -(torch.minimum(unclipped, clipped) * weight).sum()


def with_statistics(logp, advantages, weight, old_logp):
    """The loss, and what PolicyStats counts of it, in plain PyTorch."""
    d = logp - old_logp
    ratio = d.exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages
    loss = -(torch.minimum(unclipped, clipped) * weight).sum()
    with torch.no_grad():
        sums = [weight != 0, weight, ratio, ratio**2, -d, torch.expm1(d) - d]
        sums += [(advantages < 0) & (ratio < 1 - CLIP), (advantages > 0) & (ratio > 1 + CLIP)]
        stats = [*(x.sum() for x in sums), ratio.amin(), ratio.amax()]
    return loss, torch.stack([x.float() for x in stats])


def fused(logp, advantages, weight, old_logp):
    return policy_loss(logp, advantages, weight, old_logp=old_logp)[0]


def training(function, logp, *rest):
    x = logp.clone().requires_grad_()
    return lambda: torch.autograd.grad(function(x, *rest), x)


def cases(device):
    logp = -torch.rand(TOKENS, device=device) * 5
    inputs = (
        logp,
        torch.randn(TOKENS, device=device),
        torch.full((TOKENS,), 1 / TOKENS, device=device),
        logp + 0.2 * torch.randn(TOKENS, device=device),
    )

    compiled = torch.compile(with_statistics)

    def gate():
        want = eager(*(t.double() for t in inputs)).item()
        error = abs(fused(*inputs).item() - want)
        assert error < 1e-6 * (1 + abs(want)), f"loss off by {error}"

    yield Case(
        "policy_loss",
        f"forward + backward, {TOKENS} tokens",
        gate,
        {
            "fastpg, with its statistics": training(fused, *inputs),
            "eager, loss alone": training(eager, *inputs),
            "torch.compile, loss alone": training(torch.compile(eager), *inputs),
            "torch.compile, with the same statistics": training(
                lambda *args: compiled(*args)[0], *inputs
            ),
        },
        ours="fastpg, with its statistics",
        targets={"eager, loss alone": ">= 5", "torch.compile, loss alone": ">= 2"},
        device=device,
    )
