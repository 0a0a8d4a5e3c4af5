"""Checks of log-probs: each faster or batched way to them against a plainer one."""

import torch
from torch import Tensor

from fastpg.trainer.check.evidence import Evidence, Finding
from fastpg.trainer.models.policy import logprobs_through
from fastpg.trainer.run.engine import is_deepspeed

_LARGEST_GAP = 1e-3  # nats between two forwards that ought to be the same


def dropout(evidence: Evidence) -> Finding:
    """Do two forwards of training give the same log-probs?"""
    rows = torch.arange(len(evidence.rollout.mask))[: evidence.rows_of_a_forward]
    batch = evidence.learner.batch(evidence.rollout[rows])
    with torch.no_grad():
        first, second = (logprobs_through(evidence.trainer.model, batch).logp for _ in range(2))
    gap = (first - second).abs().max().item()
    active = [
        name
        for name, module in evidence.trainer.policy.named_modules()
        if module.training and getattr(module, "p", 0) and "Dropout" in type(module).__name__
    ]
    return Finding(
        "dropout",
        "pass" if gap < _LARGEST_GAP and not active else "fail",
        f"{gap:.1e} nats between two forwards, {len(active)} dropouts on",
        "something is random while the model trains; ratios would begin anywhere",
    )


def padding(evidence: Evidence) -> Finding:
    """Has an episode in a padded batch the log-probs that it has alone?"""
    padded = evidence.logp_with(None, None)
    return _compared(
        evidence,
        "padding",
        padded,
        evidence.plain.logp[evidence.temperatures[0]],
        "padding changes the model's output: positions count it, or it is attended to",
    )


def lm_head(evidence: Evidence) -> Finding:
    """Are fused log-probs those of the model's own logits?"""
    head = evidence.trainer.paths.head
    if head is None:
        return Finding("LM head", "warn", "not fused", "all logits of a batch are held in memory")
    return _compared(
        evidence,
        "LM head",
        evidence.logp_with(head, None),
        evidence.logp_with(None, None),
        "the fused LM head leaves out a scale, a softcap, a bias or an adapter of the model",
    )


def shared_prompts(evidence: Evidence) -> Finding | None:
    """Do completions that share a prompt get what they get with a copy each?"""
    paths = evidence.trainer.paths
    if paths.head is None or paths.packing is None:
        return None
    return _compared(
        evidence,
        "shared prompts",
        evidence.logp_with(paths.head, paths.packing),
        evidence.logp_with(paths.head, None),
        "completions that share a prompt see one another: report this model",
    )


def temperature(evidence: Evidence) -> Finding:
    """Which temperature explains the log-probs of training best?"""
    gaps = {
        value: _gap(evidence, evidence.logp, logp) for value, logp in evidence.plain.logp.items()
    }
    best = min(gaps, key=lambda value: gaps[value])
    wanted = evidence.temperatures[0]
    return Finding(
        "temperature",
        "pass" if best == wanted and gaps[best] <= evidence.tolerance else "fail",
        f"log-probs are those at {best:g}, to {gaps[best]:.1e} nats",
        f"logits are to be divided by temperature={wanted:g}, once",
    )


def first_ratio(evidence: Evidence) -> Finding | None:
    """Are the ratios of the first optimiser step 1?"""
    if is_deepspeed(evidence.trainer.accelerator):
        return None
    stats = evidence.gradient.stats
    deviation = max(stats["ratio_max"] - 1, 1 - stats["ratio_min"])
    return Finding(
        "first ratio",
        "pass" if deviation <= evidence.tolerance / 10 else "fail",
        f"{deviation:.1e} from 1 at most",
        "old and new log-probs come from different weights, dtypes or forwards",
    )


def reference(evidence: Evidence) -> Finding | None:
    """Is the reference the policy at its start?"""
    ref_logp = evidence.experience.ref_logp
    if ref_logp is None:
        return None
    gap = _gap(evidence, evidence.logp, ref_logp)
    kl = ((evidence.logp - ref_logp) * evidence.mask).sum(-1).mean().item()
    return Finding(
        "reference",
        "pass" if gap <= evidence.tolerance else "fail",
        f"KL {kl:.1e} nats a completion, {gap:.1e} at a token at most",
        "the KL penalty begins at another model than the policy does",
    )


def _compared(
    evidence: Evidence, name: str, logp: Tensor, expected: Tensor, advice: str
) -> Finding:
    """Return the finding of a comparison that rounding alone may make differ."""
    gap = _gap(evidence, logp, expected)
    return Finding(
        name,
        "pass" if gap <= evidence.tolerance else "fail",
        f"{gap:.1e} nats at most between log-probs",
        advice,
    )


def _gap(evidence: Evidence, first: Tensor, second: Tensor) -> float:
    """Return the largest difference of two log-probs of a completion token."""
    return (first.double() - second.double())[evidence.mask].abs().max().item()
