"""The policy loss of tokens and its gradient by their logits, with each row read from memory once.

    logp, H = token_logprobs(logits, labels)     L = policy_loss(logp, ..., entropy=H)

A row gives its token's log-prob; this, with what is known beforehand, gives dL/dlogp and dL/dH; and
these, while the row is still in cache, turn it into dL/dlogits. So memory is read once and written
once, where the two ops read it twice and write it once. Backward only hands the gradient over.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._autograd import Differentiable, needs_no_gradient
from ..._library import empty_like
from ..._op import Op
from ..common.checks import alike, cast, check_shape, check_tensors
from ..common.log_ratio import MAX_LOG_RATIO, Beyond
from ..common.stats import PolicyStats
from ..vocabulary import token_logprobs as rows_page
from ..vocabulary.logit_rows import RowSizes, RowsOp, may_overwrite
from . import policy_loss as tokens_page
from .policy_loss import policy_loss
from .surrogates import (
    CODES,
    Clip,
    KlName,
    LossOptions,
    SurrogateName,
    as_traced,
    check_options,
)

OP = "policy_loss_from_logits"


class Tokens(NamedTuple):
    """What is known of the token of each row beforehand, in the compute dtype of the rows."""

    advantages: Tensor  # like labels
    weight: Tensor  # like labels; 0 masks a token
    old_logp: Tensor | None  # like labels; None: the log-prob itself, as a constant
    ref_logp: Tensor | None  # like labels; None: there is no KL term


class Inputs(NamedTuple):
    rows: rows_page.Inputs  # with an entropy, if the loss has an entropy term
    out: Tensor  # for dL/dlogits: like logits, contiguous. It may be the logits themselves.
    tokens: Tokens
    surrogate: str  # a key of SURROGATES
    kl: str  # a key of KLS
    options: LossOptions
    traced_options: Tensor | None  # fp64 [9]: the options in a compiled graph; None: they are above


class Outputs(NamedTuple):
    loss: Tensor  # [], in the compute dtype
    stats: Tensor  # fp64, in the order of PolicyStats.FIELDS


class ScaleInputs(NamedTuple):
    gradient: Tensor  # any shape, contiguous; written to
    factor: Tensor  # []


class NoOutputs(NamedTuple):
    """An op that only writes to one of its inputs has no outputs."""


def masked_by_both(labels: Tensor, weight: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Labels and weights that both mask what one of them masks."""
    kept = (weight != 0) & (labels != ignore_index)
    return torch.where(kept, labels, ignore_index), torch.where(kept, weight, 0.0)


def loss_inputs(
    x: Inputs, logp: Tensor, weight: Tensor, entropy: Tensor | None
) -> tokens_page.Inputs:
    """The inputs of policy_loss, for tokens with these log-probs, weights and entropies."""
    return tokens_page.Inputs(
        logp=logp,
        sequence_log_ratio=None,
        entropy=entropy,
        surrogate=x.surrogate,
        kl=x.kl,
        options=x.options,
        traced_options=x.traced_options,
        **x.tokens._replace(weight=weight)._asdict(),
    )


def by_two_ops(x: Inputs, logprobs: Callable, loss_of: Callable, backward_out: Callable) -> Outputs:
    """The two ops, forward and backward, by these kernels. It writes dL/dlogits to `out`."""
    labels, weight = masked_by_both(x.rows.labels, x.tokens.weight, x.rows.ignore_index)
    rows = x.rows._replace(labels=labels)
    logp, row_entropy, row_stats = logprobs(rows)
    entropy = row_entropy if rows.with_entropy else None
    loss = loss_of(loss_inputs(x, logp, weight, entropy))
    # The loss subtracts entropy_coef times the entropy of each token, weighted like the token.
    grad_entropy = None
    if rows.with_entropy:
        entropy_coef: float | Tensor = x.options.entropy_coef
        if x.traced_options is not None:
            entropy_coef = x.traced_options[tokens_page.ENTROPY_COEF].to(logp.dtype)
        grad_entropy = -entropy_coef * weight
    gradient = rows_page.BackwardInputs(rows, loss.coefficient, grad_entropy, entropy, row_stats)
    # `out` may be the logits themselves: everything else that reads them is done by now.
    backward_out(rows_page.BackwardOutInputs(gradient, x.out))
    return Outputs(loss.loss, loss.stats)


def reference(x: Inputs) -> Outputs:
    """The specification: the two ops by theirs."""
    return by_two_ops(
        x, rows_page.reference, tokens_page.reference, rows_page.reference_backward_out
    )


def allocate(x: Inputs) -> Outputs:
    """Makes an empty loss and empty statistics."""
    stats = x.rows.temperature.new_empty(len(PolicyStats.FIELDS), dtype=torch.float64)
    return Outputs(x.rows.temperature.new_empty(()), stats)


def sizes(x: Inputs) -> RowSizes:
    """Tells C++ where each row of addressable logits begins."""
    return rows_page.sizes(x.rows)


def reference_scale(x: ScaleInputs) -> NoOutputs:
    """Multiplies the gradient by the factor, in place; a factor of 1 is not, where it is seen."""
    if x.factor.device.type != "cpu" or x.factor != 1:  # elsewhere to look would be to wait
        x.gradient.mul_(x.factor)
    return NoOutputs()


def allocate_nothing(x: ScaleInputs) -> NoOutputs:
    """Makes nothing: the gradient is there."""
    return NoOutputs()


policy_loss_from_logits_op = RowsOp(
    OP,
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
    sizes=sizes,
    codes=CODES,
    mutates="out",
)
scale_op = Op(
    "policy_loss_from_logits_scale",
    ScaleInputs,
    NoOutputs,
    page=__name__,
    reference=reference_scale,
    allocate=allocate_nothing,
    mutates="gradient",
)


class Once:
    """Whether a gradient has been handed over, which can be done once."""

    def __init__(self) -> None:
        self.done = False


class Call(NamedTuple):
    """What the autograd function takes."""

    logits: Tensor
    inplace: bool  # the gradient goes over the logits
    inputs: Inputs  # with the logits for `out`


class Saved(NamedTuple):
    """What backward needs."""

    gradient: Tensor
    handed_over: Once | None  # None in a compiled graph, which may run as often as it likes


class Gradients(NamedTuple):
    grad_logits: Tensor


def _forward(x: Call) -> tuple[tuple[Tensor, Tensor], Saved]:
    # The operator must not see a graph: the gradient is made here, not by torch.
    logits = x.logits.detach()
    out = logits if x.inplace else empty_like(logits)
    rows = x.inputs.rows._replace(logits=logits)
    outputs = policy_loss_from_logits_op(x.inputs._replace(rows=rows, out=out))
    # A second backward would scale a gradient that has been scaled already.
    once = None if torch.compiler.is_compiling() else Once()
    return (outputs.loss, outputs.stats), Saved(out, once)


def _backward(saved: Saved, grad_loss: Tensor) -> Gradients:
    if saved.handed_over is None:
        return Gradients(saved.gradient * grad_loss)
    if saved.handed_over.done:
        raise RuntimeError(f"{OP}: one backward a forward; this is the second")
    saved.handed_over.done = True
    # The gradient was made for a factor of 1, which most losses have: then nothing is read.
    scale_op(ScaleInputs(saved.gradient, grad_loss))
    return Gradients(saved.gradient)


_policy_loss_from_logits = Differentiable(
    OP,
    inputs=Call,
    saved=Saved,
    differentiable=("logits",),
    forward=_forward,
    backward=_backward,
    constants=1,
)


def _checked_tokens(
    labels: Tensor,
    dtype: torch.dtype,
    *,
    advantages: Tensor,
    weight: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
) -> Tokens:
    check_tensors(OP, advantages=advantages)
    check_shape(OP, "advantages", advantages, labels, labels.shape)
    tokens = alike(
        OP,
        ("old_logp", "ref_logp"),
        advantages=advantages,
        weight=weight,
        old_logp=old_logp,
        ref_logp=ref_logp,
    )
    return Tokens._make([x if x is None else cast(x.detach(), dtype) for x in tokens])


def _two_ops(rows: rows_page.Inputs, tokens: Tokens, **terms: Any) -> tuple[Tensor, PolicyStats]:
    """The loss by token_logprobs and policy_loss, whose gradient is made in backward."""
    # Both ops must leave out the same tokens, or a masked label would be read.
    labels, weight = masked_by_both(rows.labels, tokens.weight, rows.ignore_index)
    logprobs = partial(
        rows_page.token_logprobs,
        rows.logits,
        labels,
        temperature=rows.temperature,
        softcap=rows.softcap or None,
        ignore_index=rows.ignore_index,
    )
    if rows.with_entropy:
        logp, entropy = logprobs(return_entropy=True)
    else:
        logp, entropy = logprobs(), None
    return policy_loss(
        logp,
        tokens.advantages,
        weight,
        old_logp=tokens.old_logp,
        ref_logp=tokens.ref_logp,
        entropy=entropy,
        **terms,
    )


def policy_loss_from_logits(
    logits: Tensor,
    labels: Tensor,
    advantages: Tensor,
    weight: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    old_logp: Tensor | None = None,
    clip: Clip = (0.2, 0.2),
    dual_clip: float | None = None,
    tau: tuple[float, float] = (1.0, 1.05),
    surrogate: SurrogateName = "ppo",
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: KlName = "k3",
    entropy_coef: float = 0.0,
    max_log_ratio: float = MAX_LOG_RATIO,
    beyond: Beyond = "stop",
    inplace: bool = False,
) -> tuple[Tensor, PolicyStats]:
    """The policy loss of logits, whose gradient is made in the same pass over them.

    L = policy_loss(token_logprobs(logits, labels), advantages, weight, ...), and the entropy of the
    rows, if entropy_coef is not 0. Memory is read once and written once.

    The gradient is that of the loss times 1. A backward that brings another factor costs a pass
    over the gradient: put it into weight. Only one backward is allowed, and no second derivative.
    The ratio of a whole sequence (level="sequence") needs all its log-probs first: the two ops do
    that. They also serve fp16, whose gradient would underflow before a GradScaler could scale it.

    Args:
        logits: [..., V], as in token_logprobs; differentiable.
        labels: [...], integers in [0, V), or ignore_index.
        advantages: A, like labels, of any float dtype; a constant, as are the other tensors.
        weight: w, like labels. Weight 0 masks a token, and so does ignore_index: its row is not
            read and gets gradient 0.
        temperature: A number > 0, or a tensor that broadcasts to labels, or [..., 1].
        softcap: A number > 0: a logit x becomes softcap · tanh(x / softcap). None: x.
        ignore_index: The label that masks a row.
        old_logp: The log-probs when the tokens were sampled, like labels. None: those of logits.
        clip: (low, high), as in policy_loss.
        dual_clip: > 1, as in policy_loss.
        tau: A pair > 0, as in policy_loss.
        surrogate: "ppo", "reinforce", "cispo" or "sapo", as in policy_loss.
        ref_logp: The log-probs under the reference policy, like labels.
        kl_coef: >= 0; needs ref_logp.
        kl: "k3", "k3_naive" or "k2", as in policy_loss.
        entropy_coef: Any finite number, which multiplies the entropy of the rows.
        max_log_ratio: The bound of log-ratios, > 0 and <= 40, as in policy_loss.
        beyond: "stop" or "hold": the gradient beyond that bound, as in policy_loss.
        inplace: Whether the gradient may overwrite the logits, which must be contiguous and no leaf
            of the graph; nothing else may use them then. They stay where no gradient is wanted, in
            torch.compile, whose own matter this is, and in a checkpoint or under other hooks of
            saved tensors.

    Returns:
        (loss, stats): a scalar, fp32, or fp64 for fp64 logits; and `PolicyStats`.

    Raises:
        TypeError: An argument is no tensor or number, or has a dtype that it cannot have.
        ValueError: A shape, a device or a value does not fit, or logits cannot be overwritten; the
            message names it.
        IndexError: A label is outside [0, V) and not ignore_index; as in token_logprobs.
        RuntimeError: The loss is differentiated for the second time.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> labels, advantages = torch.tensor([0, 2]), torch.tensor([1.0, -1.0])
        >>> weight = torch.tensor([0.5, 0.5])
        >>> loss, stats = fastpg.policy_loss_from_logits(logits, labels, advantages, weight)
        >>> loss.backward()
        >>> logits.grad
        tensor([[-0.1674,  0.1224,  0.0450],
                [-0.1667, -0.1667,  0.3333]])

    Reference:
        The gradient by logits made in forward: Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989.
    """
    check_tensors(OP, logits=logits, labels=labels)
    rows = rows_page.checked_inputs(
        logits,
        labels,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        with_entropy=entropy_coef != 0,
    )
    terms: dict[str, Any] = {
        "clip": clip,
        "dual_clip": dual_clip,
        "tau": tau,
        "surrogate": surrogate,
        "kl": kl,
        "kl_coef": kl_coef,
        "entropy_coef": entropy_coef,
        "max_log_ratio": max_log_ratio,
        "beyond": beyond,
    }
    options = check_options(ref_logp=ref_logp, **terms)
    tokens = _checked_tokens(
        labels,
        rows.temperature.dtype,
        advantages=advantages,
        weight=weight,
        old_logp=old_logp,
        ref_logp=ref_logp,
    )
    if not torch.is_grad_enabled() or needs_no_gradient(logits) or logits.dtype is torch.float16:
        return _two_ops(rows, tokens, **terms)
    inplace = inplace and may_overwrite(OP, "inplace", logits)
    options, traced = as_traced(options, logits.device)
    inputs = Inputs(rows, rows.logits, tokens, surrogate, kl, options, traced)
    loss, stats = _policy_loss_from_logits(Call(logits, inplace, inputs))
    return loss, PolicyStats(stats)
