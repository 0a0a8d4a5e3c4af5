"""The suites: which problems each of them times, at the sizes that training has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from .problem import OURS, PLAIN, Problem
from .problems import (
    VOCAB,
    Settings,
    advantages,
    clipped_surrogate,
    clipped_value_loss,
    head_cross_entropy,
    head_log_probs,
    head_policy_loss,
    kl,
    log_probs,
    log_probs_and_entropy,
    whitening,
)


def token_logprobs_suite(settings: Settings) -> Iterator[Problem]:
    """Log-probs from logits."""
    rows = 8192 if settings.device == "cuda" else 32 if settings.quick else 256
    yield log_probs(settings, rows, VOCAB, torch.bfloat16, backward=False)
    yield log_probs(settings, rows, VOCAB, torch.float32, backward=True)
    yield log_probs_and_entropy(settings, rows, VOCAB, torch.bfloat16)
    if not settings.quick:
        yield log_probs(settings, rows, VOCAB, torch.float32, backward=False)
        yield log_probs(settings, rows, VOCAB, torch.bfloat16, backward=True)


def linear_suite(settings: Settings) -> Iterator[Problem]:
    """Log-probs and losses from hidden states and the LM head."""
    rows, width, vocab, dtype = 512, 576, 49152, torch.float32  # of SmolLM2-135M
    if settings.quick:
        rows, width, vocab = 128, 256, 32768
    elif settings.device == "cuda":
        rows, width, vocab, dtype = 8192, 4096, 131072, torch.bfloat16
    yield head_log_probs(settings, rows, width, vocab, dtype, backward=False)
    if not settings.quick:
        yield head_log_probs(settings, rows, width, vocab, dtype, backward=True)
    yield head_cross_entropy(settings, rows, width, vocab, dtype)
    yield head_policy_loss(settings, 4, rows // 4, width, vocab, dtype)


def gae_suite(settings: Settings) -> Iterator[Problem]:
    """Advantages."""
    yield advantages(settings, 8, 8192, 0.95)
    if not settings.quick:
        yield advantages(settings, 128, 1024, 0.95)
        yield advantages(settings, 128, 1024, 1.0)


def losses_suite(settings: Settings) -> Iterator[Problem]:
    """Losses, and what is computed of tokens around them."""
    yield clipped_surrogate(settings, settings.tokens)
    yield clipped_value_loss(settings, settings.tokens)
    yield kl(settings, settings.tokens)
    yield whitening(settings, 128, settings.tokens // 128)


def overhead_suite(settings: Settings) -> Iterator[Problem]:
    """The same on almost nothing: what a call costs beside its work."""
    calls = 50 if settings.quick else 300
    yield tiny(log_probs(settings, 4, 64, torch.float32, backward=True, calls=calls))
    yield tiny(advantages(settings, 2, 8, 0.95, calls=calls))
    yield tiny(clipped_surrogate(settings, 16, calls=calls))
    yield tiny(clipped_value_loss(settings, 16, calls=calls))


def tiny(problem: Problem) -> Problem:
    """A problem that takes no time: of the lines that people write, one form is enough."""
    kept = {name: problem.solutions[name] for name in (OURS, PLAIN)}
    note = "(An op in Python costs microseconds that an op inside torch does not.)"
    return replace(problem, solutions=kept, compiled=PLAIN, note=note)
