"""Per-token log-probs and entropies from logits, without a softmax in memory.

`row_softmax.py` has the formulas and the specification. Forward reads the logits once and keeps
(max, log Σ e^d) per row; backward reads them once more and writes their gradient.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ..._autograd import Differentiable
from ..._library import empty_like
from ..common.checks import (
    check_labels,
    check_tensors,
    compute_dtype,
    first_labels,
    integer,
    label_temperature,
    positive,
)
from .logit_rows import RowSizes, RowsOp, may_overwrite, row_sizes
from .row_softmax import (
    OP,
    BackwardInputs,
    BackwardOutInputs,
    Gradient,
    Inputs,
    NoOutputs,
    Outputs,
    RowStatistic,
    TokenLogprobs,
    checked_statistics,
    reference,
    reference_backward,
    reference_backward_out,
)


def allocate(x: Inputs) -> Outputs:
    """Makes empty log-probs, entropies and statistics."""
    labels, dtype = x.labels, x.temperature.dtype
    logp = empty_like(labels, dtype)
    entropy = empty_like(logp) if x.with_entropy else logp.new_empty(0)
    return Outputs(logp, entropy, logp.new_empty(2, *labels.shape))


def allocate_gradient(x: BackwardInputs) -> Gradient:
    """Makes an empty gradient."""
    return Gradient(empty_like(x.inputs.logits))


def allocate_nothing(x: BackwardOutInputs) -> NoOutputs:
    """Makes nothing: `out` is there."""
    return NoOutputs()


def sizes(x: Inputs) -> RowSizes:
    """Tells C++ where each row of addressable logits begins."""
    return row_sizes(x.logits, x.labels, x.temperature)


def backward_sizes(x: BackwardInputs) -> RowSizes:
    """Tells the backward op the same."""
    return sizes(x.inputs)


def backward_out_sizes(x: BackwardOutInputs) -> RowSizes:
    """Tells the backward op the same."""
    return sizes(x.backward.inputs)


token_logprobs_op = RowsOp(
    "token_logprobs",
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
    sizes=sizes,
)
token_logprobs_backward_op = RowsOp(
    "token_logprobs_backward",
    BackwardInputs,
    Gradient,
    page=__name__,
    reference=reference_backward,
    allocate=allocate_gradient,
    sizes=backward_sizes,
)
token_logprobs_backward_out_op = RowsOp(
    "token_logprobs_backward_out",
    BackwardOutInputs,
    NoOutputs,
    page=__name__,
    reference=reference_backward_out,
    allocate=allocate_nothing,
    sizes=backward_out_sizes,
    mutates="out",
)


class Saved(NamedTuple):
    """What backward needs."""

    inputs: Inputs
    entropy: Tensor | None  # None: it was not wanted
    stats: Tensor


def _forward(x: Inputs) -> tuple[tuple[Tensor, ...], Saved]:
    logp, entropy, stats = token_logprobs_op(x)
    if x.with_entropy:
        return (logp, entropy), Saved(x, entropy, stats)
    return (logp,), Saved(x, None, stats)


def _backward_inputs(
    x: Saved, grad_logp: Tensor | None, grad_entropy: Tensor | None
) -> BackwardInputs:
    # A loss of the entropy alone sends nothing through the log-probs.
    if grad_logp is None:
        grad_logp = torch.zeros_like(x.stats[0])
    return BackwardInputs(x.inputs, grad_logp, grad_entropy, x.entropy, x.stats)


def backward(x: Saved, grad_logp: Tensor | None, grad_entropy: Tensor | None = None) -> Gradient:
    """The gradient of the logits."""
    return token_logprobs_backward_op(_backward_inputs(x, grad_logp, grad_entropy))


def backward_inplace(
    x: Saved, grad_logp: Tensor | None, grad_entropy: Tensor | None = None
) -> Gradient:
    """Writes the gradient of the logits over them."""
    # torch counts that the logits are written to: whoever saved them and needs them later raises,
    # and so does a second backward through here.
    out = x.inputs.logits.detach()
    inputs = _backward_inputs(x, grad_logp, grad_entropy)
    token_logprobs_backward_out_op(BackwardOutInputs(inputs, out))
    return Gradient(out)


_differentiable = partial(
    Differentiable, OP, inputs=Inputs, saved=Saved, differentiable=("logits",), forward=_forward
)
_token_logprobs = _differentiable(backward=backward)
_token_logprobs_inplace = _differentiable(backward=backward_inplace)


def checked_inputs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    with_entropy: bool,
    group: dist.ProcessGroup | None = None,
) -> Inputs:
    """The inputs of the op, from the arguments of the public function: two tensors, and options."""
    if logits.dim() == 0 or (logits.shape[-1] == 0 and group is None):
        raise ValueError(f"{OP}: logits must be [..., V], got {tuple(logits.shape)}")
    check_labels(OP, labels, logits)
    dtype = compute_dtype(OP, logits=logits)
    return Inputs(
        logits=logits,
        labels=labels if labels.dtype is torch.int64 else labels.long(),
        temperature=label_temperature(OP, temperature, dtype, labels),
        softcap=0.0 if softcap is None else positive(OP, "softcap", softcap, dtype),
        ignore_index=integer(OP, "ignore_index", ignore_index),
        with_entropy=bool(with_entropy),
    )


# The overloads spell their arguments out. One TypedDict could hold them, but hovering would hide
# them behind its name, and jedi, which completes in notebooks, would offer none of them.


@overload
def token_logprobs(  # type: ignore[overload-overlap]  # () names no statistic
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
    process_group: dist.ProcessGroup | None = ...,
    inplace_backward: bool = ...,
    support: tuple[Tensor, Tensor] | None = ...,
    row_statistics: tuple[()] = ...,
) -> Tensor: ...


@overload
def token_logprobs(  # type: ignore[overload-overlap]  # () names no statistic
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[True],
    process_group: dist.ProcessGroup | None = ...,
    inplace_backward: bool = ...,
    support: tuple[Tensor, Tensor] | None = ...,
    row_statistics: tuple[()] = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    ignore_index: int = ...,
    return_entropy: bool = ...,
    process_group: dist.ProcessGroup | None = ...,
    inplace_backward: bool = ...,
    support: tuple[Tensor, Tensor] | None = ...,
    row_statistics: Collection[RowStatistic],
) -> TokenLogprobs: ...


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    process_group: dist.ProcessGroup | None = None,
    inplace_backward: bool = False,
    support: tuple[Tensor, Tensor] | None = None,
    row_statistics: Collection[RowStatistic] = (),
) -> Tensor | tuple[Tensor, ...] | TokenLogprobs:
    """Log-probs of labels under softmax(softcap(logits) / temperature), and the entropy.

    The log-prob of label y is z_y − logsumexp(z) with z = softcap(logits) / temperature, and the
    entropy is −Σ_j p_j log p_j with p = softmax(z). The logits are read once, and once more for the
    gradient; no softmax is held in memory.

    Args:
        logits: [..., V], bf16, fp16, fp32 or fp64, with any strides; differentiable. A -inf logit
            has probability 0 (softcap makes it an ordinary one). NaN makes its own row NaN.
        labels: [...], integers in [0, V), or ignore_index. Or [..., K]: K labels of each row, from
            the same pass; they go with neither process_group nor support.
        temperature: A number > 0, or a tensor that broadcasts to [...], or is [..., 1]; a constant.
        softcap: A number > 0: a logit x becomes softcap · tanh(x / softcap), as in Gemma. None: x.
        ignore_index: A row with this label is not read; its results and its gradient are 0. Of K
            labels each may be ignored alone, and a row is not read if all are.
        return_entropy: Whether to return the entropy, which comes from the same pass and is
            differentiable.
        process_group: If given, the vocabulary is in shards, one on each rank in turn: logits are
            [..., V_rank], labels count in the whole vocabulary and are the same on each rank. Each
            rank gets the same results, and the gradient of its shard.
        inplace_backward: Whether backward may write the gradient over the logits, which then must
            be contiguous and no leaf of the graph: half the memory. Whatever else needs their
            values in a later backward raises, a second backward through this op too. They stay
            where no gradient is wanted, in torch.compile, whose own matter this is, and in a
            checkpoint or under other hooks of saved tensors.
        support: A pair (token_ids, offsets), the tokens that a sampler kept in each row, flat and
            in the CSR form: row n keeps token_ids[offsets[n]:offsets[n + 1]], integers that rise.
            The softmax is then over what is kept, and nothing else is read. A label outside its set
            has log-prob -inf and no gradient; an empty set means the whole vocabulary. A GPU is
            waited for. It goes with neither process_group nor inplace_backward.
        row_statistics: Names of statistics to return too, without gradients: "sum_p_squared", which
            is Σ_j p_j²; "is_top1", whether the label's logit is the highest, of equal ones the
            first; "mean_logit", the mean of z over the vocabulary, -inf where a logit is. It goes
            with neither process_group nor support.

    Returns:
        logp like labels, or (logp, entropy), entropy [...], in nats; fp32, or fp64 for fp64 logits.
        With row_statistics `TokenLogprobs(logp, entropy, sum_p_squared, is_top1, mean_logit)`, in
        which what was not asked for is None; is_top1 is like labels, the others are [...].

    Raises:
        TypeError: logits or labels are no tensors, or have a dtype that they cannot have.
        ValueError: A shape, a device, temperature, softcap or a name does not fit, or logits cannot
            be overwritten; the message names it.
        IndexError: A label is outside [0, V) and not ignore_index. Only the CPU raises at once;
            elsewhere the row of such a label is NaN, and `fastpg.check()` raises.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([0, 2])
        >>> fastpg.token_logprobs(logits, labels)
        tensor([-0.4076, -1.0986])
        >>> logp, entropy = fastpg.token_logprobs(logits, labels, return_entropy=True)
        >>> entropy
        tensor([0.8324, 1.0986])
        >>> fastpg.token_logprobs(logits, torch.tensor([[0, 1], [2, -100]]))  # two labels a row
        tensor([[-0.4076, -1.4076],
                [-1.0986,  0.0000]])

    Reference:
        Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", arXiv:1805.02867.
    """
    check_tensors(OP, logits=logits, labels=labels)
    names = checked_statistics(OP, row_statistics)
    several = labels.dim() == logits.dim() > 0
    inputs = checked_inputs(
        logits,
        first_labels(OP, labels, logits) if several else labels,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        with_entropy=return_entropy,
        group=process_group,
    )
    inplace = inplace_backward and may_overwrite(OP, "inplace_backward", logits)
    # The pages that are imported here are made of this one: at its top they would go round.
    results: tuple[Tensor, ...]
    if several or names:
        from .row_statistics import as_asked, check_whole_rows
        from .several_labels import logprobs as logprobs_of_labels

        check_whole_rows(OP, names, support, process_group)
        results = logprobs_of_labels(inputs, labels, with_statistics=bool(names), inplace=inplace)
        return as_asked(results, names, return_entropy=return_entropy)
    if support is not None:
        from .token_support import logprobs

        results = logprobs(inputs, support, process_group, inplace=inplace_backward)
    elif process_group is not None:
        from .logit_shards import logprobs_of_shard

        results = logprobs_of_shard(inputs, process_group, inplace=inplace)
    else:
        results = _token_logprobs_inplace(inputs) if inplace else _token_logprobs(inputs)
    return results if return_entropy else results[0]
