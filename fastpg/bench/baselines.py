"""The lines that people write in plain PyTorch, as trainers and tutorials have them.

On inputs in fp64 they compute in fp64: that is what every candidate is compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, pad

CLIP = 0.2


def at_least_fp32(x: Tensor) -> Tensor:
    """What softmaxes are computed in."""
    return x if x.dtype is torch.float64 else x.float()


def log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log softmax(z)_label of each row."""
    return at_least_fp32(logits).log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def log_probs_by_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The same; labels of -100 give 0."""
    return -cross_entropy(at_least_fp32(logits), labels, reduction="none")


def log_probs_by_logsumexp(logits: Tensor, labels: Tensor) -> Tensor:
    """The same, z_label - logsumexp(z), without a second tensor of the size of the logits."""
    z = at_least_fp32(logits)
    return z.gather(-1, labels[:, None])[:, 0] - z.logsumexp(-1)


def log_probs_of_the_likely(logits: Tensor, labels: Tensor) -> Tensor:
    """The same for labels whose p is nearly 1: what is left of 1 is summed without them."""
    differences = logits - logits.gather(-1, labels[:, None])
    others = differences.scatter(-1, labels[:, None], -torch.inf)
    return -torch.log1p(others.exp().sum(-1))


def log_probs_and_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs, and -Σ p log p of each row."""
    logp = at_least_fp32(logits).log_softmax(-1)
    return logp.gather(-1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def head_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probs from hidden states [N, H] and the head's weight [V, H]."""
    return log_probs(linear(hidden, weight), labels)


def head_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The sum of -log p, where labels of -100 count as 0."""
    logits = at_least_fp32(linear(hidden, weight))
    return cross_entropy(logits, labels, reduction="sum")


def deltas(rewards: Tensor, values: Tensor, gamma: float) -> Tensor:
    """δ_t = r_t + γ V_{t+1} - V_t."""
    return rewards + gamma * pad(values[:, 1:], (0, 1)) - values


def gae_by_loop(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages A_t = δ_t + γλ A_{t+1}, as most trainers write them."""
    delta = deltas(rewards, values, gamma)
    last, advantages = torch.zeros_like(delta[:, 0]), []
    for t in reversed(range(delta.shape[1])):
        last = delta[:, t] + gamma * lam * last
        advantages.append(last)
    return torch.stack(advantages[::-1], dim=1) if advantages else delta


def gae_by_doubling(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """The same by x_t = δ_t + (γλ)^k x_{t+k} for k = 1, 2, 4, ...: log2 T whole steps."""
    delta = deltas(rewards, values, gamma)
    step = 1
    while step < delta.shape[1]:
        delta = delta + (gamma * lam) ** step * pad(delta[:, step:], (0, step))
        step *= 2
    return delta


def gae_by_filter(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """The same by scipy's C loop over the reversed sequence. It has no gradient."""
    from scipy.signal import lfilter

    delta = deltas(rewards, values, gamma).numpy()
    b, a = delta.dtype.type([1.0]), delta.dtype.type([1.0, -gamma * lam])  # or it computes in fp64
    return torch.from_numpy(lfilter(b, a, delta[:, ::-1])[:, ::-1].copy())


def clipped_surrogate(logp: Tensor, advantages: Tensor, weight: Tensor, old_logp: Tensor) -> Tensor:
    """PPO's loss of tokens."""
    ratio = (logp - old_logp).exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages
    return -(torch.minimum(unclipped, clipped) * weight).sum()


def clipped_value_loss(
    values: Tensor, returns: Tensor, weight: Tensor, old_values: Tensor
) -> Tensor:
    """PPO's loss of the critic."""
    held = old_values + (values - old_values).clamp(-CLIP, CLIP)
    errors = torch.maximum((values - returns) ** 2, (held - returns) ** 2)
    return 0.5 * (errors * weight).sum()


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Schulman's third estimate of KL(π ‖ π_ref)."""
    d = (ref_logp - logp).clamp(-20.0, 20.0)
    return torch.expm1(d) - d


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over what is unmasked."""
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean) ** 2 * mask).sum() / (count - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def head_policy_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, advantages: Tensor, old_logp: Tensor
) -> Tensor:
    """GRPO's clipped loss of completions [B, T] with advantages [B], the mean over tokens."""
    logp = head_log_probs(hidden.flatten(0, 1), weight, labels.flatten()).view_as(labels)
    share = torch.full_like(logp, 1 / labels.numel())
    return clipped_surrogate(logp, advantages[:, None].to(logp), share, old_logp)
