"""What policy-gradient training computes, as problems of any size, and who can solve them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpg import (
    gae,
    kl_estimate,
    linear_token_logprobs,
    linear_token_loss,
    policy_loss,
    token_logprobs,
    value_loss,
    whiten,
)

from . import baselines, peers
from .inputs import head_and_labels, log_ratios, logits_and_labels
from .peers import Adapter
from .problem import OURS, PLAIN, Problem, Solution

VOCAB = 151936  # of Qwen
DOUBLING = "PyTorch, doubling"
CHECKED = 16  # rows that are compared with fp64 on a GPU, whose memory all would fill
TWICE = "(It keeps no logits: for a gradient it makes them twice, by a fourth product.)"
TILES = "(Its threads meet once a tile of 4096 tokens, and wait there for one whose core is taken.)"
STATISTICS = "(fastpg makes the statistics of a step too, which nobody else makes here.)"

# mypy reads the overloads of these, which tell apart what is not known here.
log_probs_of: Callable[..., Any] = token_logprobs
log_probs_of_head: Callable[..., Any] = linear_token_logprobs


class Settings(NamedTuple):
    """How a run is asked for.

    Attributes:
        device: "cpu" or "cuda".
        quick: Whether all suites have a minute together.
        left_out: Reasons by name: filled by the suites with what takes no part.
    """

    device: str
    quick: bool
    left_out: dict[str, str]

    @property
    def seconds(self) -> float:
        """For each problem."""
        return 0.2 if self.quick else 5.0

    @property
    def tokens(self) -> int:
        """Of a batch of losses."""
        return 2**17 if self.quick else 2**20

    @property
    def checked(self) -> slice:
        """The rows of logits that are compared with fp64."""
        return slice(CHECKED if self.device == "cuda" else None)

    def peers(self, adapters: Mapping[str, Adapter]) -> dict[str, Solution]:
        """The other packages that are there; the reasons of the others are noted."""
        found, left_out = peers.ask(adapters, self.device)
        for name in peers.COMPILED_ON_A_CPU if self.quick and self.device == "cpu" else ():
            if found.pop(name, None):
                left_out[name] = "torch.compile makes it on a CPU, for longer than --quick takes"
        self.left_out.update(left_out)
        return found


TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def log_probs(
    settings: Settings, rows: int, vocab: int, dtype: torch.dtype, *, backward: bool, calls: int = 1
) -> Problem:
    """Log-probs of labels from logits."""
    with torch.device(settings.device):
        logits, labels = logits_and_labels(rows, vocab, dtype)
    direction = "fwd + bwd" if backward else "fwd"
    return Problem(
        "token_logprobs",
        f"{direction}, {rows} x {vocab} {TYPES[dtype]}",
        (logits, labels),
        (0,) if backward else (),
        baselines.log_probs,
        {
            OURS: log_probs_of,
            PLAIN: baselines.log_probs,
            "PyTorch, cross_entropy": baselines.log_probs_by_cross_entropy,
            **settings.peers(peers.LOG_PROBS),
        },
        few=(logits[settings.checked], labels[settings.checked]),
        operations=(6.0 if backward else 4.0) * logits.numel(),
        calls=calls,
    )


def log_probs_and_entropy(settings: Settings, rows: int, vocab: int, dtype: torch.dtype) -> Problem:
    """Log-probs and entropies from logits, forward, as before an update."""
    with torch.device(settings.device):
        logits, labels = logits_and_labels(rows, vocab, dtype)
    return Problem(
        "token_logprobs",
        f"with entropy, fwd, {rows} x {vocab} {TYPES[dtype]}",
        (logits, labels),
        (),
        baselines.log_probs_and_entropy,
        {
            OURS: partial(log_probs_of, return_entropy=True),
            PLAIN: baselines.log_probs_and_entropy,
            **settings.peers(peers.LOG_PROBS_AND_ENTROPY),
        },
        few=(logits[settings.checked], labels[settings.checked]),
        operations=6.0 * logits.numel(),
    )


def head_loss(log_probs: Solution) -> Solution:
    """A head's cross entropy from a function for its log-probs: all that some packages give."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logp = log_probs(hidden, weight, labels)
        assert isinstance(logp, Tensor)
        return -logp.sum()

    return loss


def head_log_probs(
    settings: Settings, rows: int, width: int, vocab: int, dtype: torch.dtype, *, backward: bool
) -> Problem:
    """Log-probs from hidden states and a head, and their gradients by both."""
    with torch.device(settings.device):
        hidden, weight, _, labels = head_and_labels((rows,), vocab, width, dtype)
    return Problem(
        "linear_token_logprobs",
        f"{'fwd + bwd' if backward else 'fwd'}, N={rows} H={width} V={vocab} {TYPES[dtype]}",
        (hidden, weight, labels),
        (0, 1) if backward else (),
        baselines.head_log_probs,
        {
            OURS: log_probs_of_head,
            PLAIN: baselines.head_log_probs,
            **settings.peers(peers.HEAD_LOG_PROBS),
        },
        few=(hidden[settings.checked], weight, labels[settings.checked]),
        operations=(6.0 if backward else 2.0) * rows * width * vocab,
        note=TWICE if backward else TILES,
    )


def head_cross_entropy(
    settings: Settings, rows: int, width: int, vocab: int, dtype: torch.dtype
) -> Problem:
    """The cross entropy of a head, which most packages give, and its gradients by both."""
    with torch.device(settings.device):
        hidden, weight, _, labels = head_and_labels((rows,), vocab, width, dtype)
    return Problem(
        "linear_token_loss",
        f"cross entropy, fwd + bwd, N={rows} H={width} V={vocab} {TYPES[dtype]}",
        (hidden, weight, labels),
        (0, 1),
        baselines.head_cross_entropy,
        {
            OURS: fused_cross_entropy,
            PLAIN: baselines.head_cross_entropy,
            **settings.peers(peers.HEAD_CROSS_ENTROPY),
        },
        few=(hidden[settings.checked], weight, labels[settings.checked]),
        operations=6.0 * rows * width * vocab,
        note=TILES,
    )


def fused_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`linear_token_loss` of nothing but -log p."""

    def token_loss(logp: Tensor, entropy: Tensor | None, rows: Tensor) -> tuple[Tensor, None]:
        return -logp.sum(), None

    return linear_token_loss(hidden, weight, labels, token_loss)[0]


def head_policy_loss(
    settings: Settings, batch: int, length: int, width: int, vocab: int, dtype: torch.dtype
) -> Problem:
    """GRPO's clipped loss from hidden states, the mean over tokens, and its gradients by both."""
    with torch.device(settings.device):
        hidden, weight, _, labels = head_and_labels((batch, length), vocab, width, dtype)
        advantages, ratios = torch.randn(batch), log_ratios(batch, length)
    few = settings.checked
    old_logp = log_probs_of_head(hidden, weight, labels) - ratios
    return Problem(
        "linear_token_loss",
        f"clipped loss, fwd + bwd, N={batch * length} H={width} V={vocab} {TYPES[dtype]}",
        (hidden, weight, labels, advantages, old_logp),
        (0, 1),
        baselines.head_policy_loss,
        {
            OURS: fused_policy_loss,
            PLAIN: baselines.head_policy_loss,
            **settings.peers(peers.HEAD_POLICY_LOSS),
        },
        few=(hidden[:, few], weight, labels[:, few], advantages, old_logp[:, few]),
        operations=6.0 * batch * length * width * vocab,
        note=TILES,
    )


def fused_policy_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, advantages: Tensor, old_logp: Tensor
) -> Tensor:
    """`linear_token_loss` of `policy_loss`."""
    tokens = advantages[:, None].expand_as(old_logp).flatten(), old_logp.flatten()
    share = torch.full_like(tokens[0], 1 / labels.numel())

    def token_loss(logp: Tensor, entropy: Tensor | None, rows: Tensor) -> tuple[Tensor, Any]:
        return policy_loss(logp, tokens[0][rows], share[rows], old_logp=tokens[1][rows])

    return linear_token_loss(hidden, weight, labels, token_loss)[0]


def fused_gae(gamma: float, lam: float) -> Solution:
    """The advantages of `gae`."""
    return lambda rewards, values: gae(rewards, values, gamma=gamma, lam=lam)[0]


def fused_surrogate(logp: Tensor, advantages: Tensor, weight: Tensor, old_logp: Tensor) -> Tensor:
    """The loss of `policy_loss`, which makes statistics too."""
    return policy_loss(logp, advantages, weight, old_logp=old_logp)[0]


def fused_value_loss(values: Tensor, returns: Tensor, weight: Tensor, old_values: Tensor) -> Tensor:
    """The loss of `value_loss`, which makes statistics too."""
    return value_loss(values, returns, weight, old_values=old_values, clip=baselines.CLIP)[0]


def advantages(settings: Settings, batch: int, length: int, lam: float, calls: int = 1) -> Problem:
    """Generalised advantage estimation."""
    gamma = 1.0
    rewards, values = torch.randn(2, batch, length, device=settings.device)
    loop = partial(baselines.gae_by_loop, gamma=gamma, lam=lam)
    solutions: dict[str, Solution] = {
        OURS: fused_gae(gamma, lam),
        PLAIN: loop,
        DOUBLING: partial(baselines.gae_by_doubling, gamma=gamma, lam=lam),
    }
    adapters = {
        "torchrl": peers.torchrl_gae(gamma, lam),
        "torchaudio's lfilter": peers.torchaudio_gae(gamma, lam),
        "scipy's lfilter": peers.scipy_gae(gamma, lam),
    }
    return Problem(
        "gae",
        f"lam={lam}, {batch} x {length} fp32",
        (rewards, values),
        (),
        loop,
        solutions | settings.peers(adapters),
        operations=4.0 * rewards.numel(),
        compiled=DOUBLING,  # It would write the loop out, step by step.
        calls=calls,
    )


def clipped_surrogate(settings: Settings, tokens: int, calls: int = 1) -> Problem:
    """PPO's loss, with its statistics in fastpg, without them elsewhere."""
    with torch.device(settings.device):
        logp, advantages = -torch.rand(tokens) * 5, torch.randn(tokens)
        weight = torch.full((tokens,), 1 / tokens)
        inputs = logp, advantages, weight, logp - log_ratios(tokens)
    return Problem(
        "policy_loss",
        f"fwd + bwd, {tokens} tokens",
        inputs,
        (0,),
        baselines.clipped_surrogate,
        {
            OURS: fused_surrogate,
            PLAIN: baselines.clipped_surrogate,
        },
        note=STATISTICS,
        operations=12.0 * tokens,
        calls=calls,
    )


def clipped_value_loss(settings: Settings, tokens: int, calls: int = 1) -> Problem:
    """PPO's loss of the critic, with its statistics in fastpg, without them elsewhere."""
    with torch.device(settings.device):
        values, returns = torch.randn(2, tokens)
        weight = torch.full((tokens,), 1 / tokens)
        inputs = values, returns, weight, values - log_ratios(tokens)
    return Problem(
        "value_loss",
        f"fwd + bwd, {tokens} tokens",
        inputs,
        (0,),
        baselines.clipped_value_loss,
        {
            OURS: fused_value_loss,
            PLAIN: baselines.clipped_value_loss,
        },
        note=STATISTICS,
        operations=12.0 * tokens,
        calls=calls,
    )


def kl(settings: Settings, tokens: int) -> Problem:
    """The estimate of the KL divergence that GRPO uses."""
    logp = -torch.rand(tokens, device=settings.device) * 5
    ref_logp = logp + 0.2 * torch.randn(tokens, device=settings.device)
    return Problem(
        "kl_estimate",
        f"k3, fwd + bwd, {tokens} tokens",
        (logp, ref_logp),
        (0,),
        baselines.k3,
        {OURS: partial(kl_estimate, kind="k3"), PLAIN: baselines.k3},
        operations=6.0 * tokens,
    )


def whitening(settings: Settings, batch: int, length: int) -> Problem:
    """Advantages of mean 0 and variance 1 over what is unmasked."""
    x = torch.randn(batch, length, device=settings.device)
    lengths = torch.randint(1, length + 1, (batch, 1), device=settings.device)
    mask = torch.arange(length, device=settings.device) < lengths
    return Problem(
        "whiten",
        f"{batch} x {length} fp32",
        (x, mask),
        (),
        baselines.whiten,
        {OURS: whiten, PLAIN: baselines.whiten},
        operations=6.0 * x.numel(),
    )
