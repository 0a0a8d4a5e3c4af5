"""What TRL makes log-probs from hidden states with, `_ChunkedLogProbFunction`, by fastpg.

TRL calls `_ChunkedLogProbFunction.apply` with hidden [N, H], the LM head's weight [V, H] and the
labels [N]. What it is given, and what it returns, differs from release to release:

    1.15 and later   any of log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1: a tuple of
                     five, None for what is not asked for
    1.13, 1.14       (log_probs, entropy)
    1.12             the same, without a bias
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastpg

from .patching import Patches, Refused, Replacement
from .trl_logits import UTILS
from .trl_lora import RunningHead

NAME = "_ChunkedLogProbFunction"
TARGET = f"{UTILS}.{NAME}"

# The statistics of fastpg that TRL's outputs are made of.
STATISTICS = {
    "log_sum_sq_probs": "sum_p_squared",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}
OUTPUTS = ("log_probs", "entropy", *STATISTICS)

BEFORE_LABELS, AFTER_LABELS = ("hidden", "weight"), ("targets", "temperature", "chunk_size")
CAP_AND_SCALE = ("final_logit_softcapping", "logit_scale")
WITHOUT_BIAS = (*BEFORE_LABELS, *AFTER_LABELS, *CAP_AND_SCALE)
WITH_BIAS = (*BEFORE_LABELS, "bias", *AFTER_LABELS, *CAP_AND_SCALE)
WITH_OUTPUTS = (*WITH_BIAS, "outputs")

linear_token_logprobs: Callable[..., Any] = fastpg.linear_token_logprobs  # mypy reads overloads

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Arguments(NamedTuple):
    """What `apply` is given, by its name."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]; a DTensor too, or a parameter of ZeRO-3
    targets: Tensor  # int64 [N]
    temperature: float
    chunk_size: int  # TRL's own tiles
    bias: Tensor | None = None  # [V]
    final_logit_softcapping: float | None = None
    logit_scale: float = 1.0
    outputs: tuple[str, ...] = ("log_probs", "entropy")


class FusedLogProbs:
    """Stands for `_ChunkedLogProbFunction`.

    Args:
        original: TRL's function; None where TRL could not make one, for want of Triton.
        patches: Where a call is noted that is left to TRL.
        logits_dtype: That of `fastpg.linear_token_logprobs`.
        running: The LM head of the model whose forward runs.
    """

    def __init__(
        self,
        original: Any,
        patches: Patches,
        logits_dtype: torch.dtype | None,
        running: RunningHead,
    ) -> None:
        self.original, self.patches = original, patches
        self.logits_dtype, self.running = logits_dtype, running
        self.names = names_of_arguments(original)

    def apply(self, *values: Any) -> tuple[Tensor | None, ...]:
        """What `_ChunkedLogProbFunction.apply` returns."""
        x = Arguments(**dict(zip(self.names, values, strict=False)))
        if x.weight.dtype not in DTYPES:
            self.patches.leave(TARGET, f"a head of {x.weight.dtype} is left to TRL")
            return self.original.apply(*values)
        for name in x.outputs:
            if name not in OUTPUTS:
                raise ValueError(f"{TARGET}: outputs must be of {OUTPUTS}, got {name!r}")
        results = self.log_probs(x)
        return results if "outputs" in self.names else results[:2]

    def log_probs(self, x: Arguments) -> tuple[Tensor | None, ...]:
        """All five outputs; None for what is not asked for."""
        head = self.running.products(x.hidden, x.weight, x.bias)
        dtype = head.hidden[0].dtype
        statistics = tuple(STATISTICS[name] for name in x.outputs if name in STATISTICS)
        with_entropy = "entropy" in x.outputs
        found = linear_token_logprobs(
            head.hidden,
            [weight.to(dtype) for weight in head.head_weight],  # TRL takes another dtype too
            x.targets,
            bias=None if head.bias is None else head.bias.to(dtype),
            temperature=x.temperature,
            softcap=x.final_logit_softcapping,
            logit_scale=x.logit_scale,
            return_entropy=with_entropy,
            logits_dtype=None if dtype is torch.float64 else self.logits_dtype,
            row_statistics=statistics,
        )
        if statistics:
            log_sum = optional(torch.log, found.sum_p_squared)
            return found.logp, found.entropy, log_sum, found.mean_logit, found.is_top1
        logp, entropy = found if with_entropy else (found, None)
        return logp, entropy, None, None, None


def optional(function: Callable[[Tensor], Tensor], x: Tensor | None) -> Tensor | None:
    """The function of a tensor that may not be there."""
    return None if x is None else function(x)


def names_of_arguments(original: Any) -> tuple[str, ...]:
    """What `apply` takes, in its order.

    Raises:
        Refused: It is none of the functions at the top of this page.
    """
    if original is None:
        return WITH_OUTPUTS
    parameters = dict(inspect.signature(original.forward).parameters)
    names = tuple(parameters)[1:]
    if names[:1] == ("last_hidden",):
        names = ("hidden", *names[1:])
    if names not in (WITHOUT_BIAS, WITH_BIAS, WITH_OUTPUTS):
        raise Refused(f"it takes {', '.join(names)}")
    outputs = parameters["outputs"].default if "outputs" in parameters else ()
    if not set(outputs) <= set(OUTPUTS):
        raise Refused(f"it returns {', '.join(outputs)}")
    return names


def replacement(
    patches: Patches, logits_dtype: torch.dtype | None, running: RunningHead
) -> Replacement:
    """Replaces the function wherever TRL holds it."""
    return Replacement(TARGET, lambda stock: FusedLogProbs(stock, patches, logits_dtype, running))
