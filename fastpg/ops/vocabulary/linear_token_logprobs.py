"""Per-token log-probs and entropies from hidden states and the LM head: no logits in memory.

`linear_rows.py` has the formulas and the kernels; `frozen_head.py` those of a head that needs no
gradient, which takes that of hidden with it in the same pass; `linear_support.py` those of sets of
tokens that a sampler kept; `linear_several_labels.py` those of several labels a row, which make row
statistics too; `sharded_head.py` those of a head in parts on data-parallel ranks, DTensors and
parameters of ZeRO-3 (`placeholders.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.checks import first_labels
from . import frozen_head, linear_several_labels, linear_support, sharded_head
from .head_arguments import HeadInputs, as_list, has_several, head_inputs, in_shards
from .head_ranks import of_all_ranks
from .linear_rows import OP, logprobs
from .row_softmax import RowStatistic, TokenLogprobs, checked_statistics
from .row_statistics import as_asked, check_whole_rows
from .support import checked_support

# The overloads spell their arguments out. One TypedDict could hold them, but hovering would hide
# them behind its name, and jedi, which completes in notebooks, would offer none of them.


@overload
def linear_token_logprobs(  # type: ignore[overload-overlap]  # () names no statistic
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
    logits_dtype: torch.dtype | None = ...,
    process_group: dist.ProcessGroup | None = ...,
    support: tuple[Tensor, Tensor] | None = ...,
    row_statistics: tuple[()] = ...,
) -> Tensor: ...


@overload
def linear_token_logprobs(  # type: ignore[overload-overlap]  # () names no statistic
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    ignore_index: int = ...,
    return_entropy: Literal[True],
    logits_dtype: torch.dtype | None = ...,
    process_group: dist.ProcessGroup | None = ...,
    support: tuple[Tensor, Tensor] | None = ...,
    row_statistics: tuple[()] = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_token_logprobs(
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    ignore_index: int = ...,
    return_entropy: bool = ...,
    logits_dtype: torch.dtype | None = ...,
    process_group: dist.ProcessGroup | None = ...,
    support: tuple[Tensor, Tensor] | None = ...,
    row_statistics: Collection[RowStatistic],
) -> TokenLogprobs: ...


def linear_token_logprobs(
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    logits_dtype: torch.dtype | None = None,
    process_group: dist.ProcessGroup | None = None,
    support: tuple[Tensor, Tensor] | None = None,
    row_statistics: Collection[RowStatistic] = (),
) -> Tensor | tuple[Tensor, Tensor] | TokenLogprobs:
    """Log-probs of labels from hidden states and the LM head, without the logits in memory.

    The results are those of token_logprobs(hidden @ weight.T + bias, labels, ...). The logits are
    made in tiles, one at a time, of at most about 4096 rows by 4096 tokens, on a GPU 8192 by 16384.
    With more rows than that, a slice of the gradient of weight is in fp32 beside it.

    Args:
        hidden: [..., H], bf16, fp16, fp32 or fp64; differentiable. Or a sequence of [..., H_i], as
            many as weight has: the logits are the sum of the products. A head W with a LoRA adapter
            is (h, s h @ A.T) with (W, B).
        weight: [V, H] of the dtype of hidden, the LM head's; or a sequence of [V, H_i].
            Differentiable. Under autocast all three are cast as for a linear layer. It may lie on
            data-parallel ranks, each with hidden of its own, which must all call, and go backward,
            alike: as a DTensor, whose gradient is the mean of the ranks', as under FSDP2; or as a
            parameter of ZeRO-3, whose gradient DeepSpeed reduces. In shards of the vocabulary it is
            gathered slice by slice, and again in backward. Otherwise, and with support,
            row_statistics or K labels, it is gathered whole; of ZeRO-3, again in backward.
        labels: [...], integers in [0, V), or ignore_index. Or [..., K]: K labels of each row, from
            the same pass; they go with neither process_group nor support.
        bias: [V] of the dtype of hidden; differentiable. None: 0.
        temperature: A number > 0, or a tensor that broadcasts to [...], or is [..., 1]; a constant.
        softcap: A number > 0: a logit x becomes softcap · tanh(x / softcap), as in Gemma. None: x.
        logit_scale: A number > 0 that multiplies the logits, before softcap.
        ignore_index: A row with this label is not read; its results and its gradient are 0. Of K
            labels each may be ignored alone, and a row is not read if all are.
        return_entropy: Whether to return the entropy, which is differentiable.
        logits_dtype: None rounds the logits to the dtype of hidden, as a model's own head does;
            torch.float32 keeps those of bf16 and fp16 operands. A CPU upcasts these slice by slice,
            which takes up to twice the time.
        process_group: If given, the vocabulary is in shards, one on each rank in turn: weight is
            [V_rank, H] and bias [V_rank]. All else is the same on each rank, the results and the
            gradient of hidden too.
        support: A pair (token_ids, offsets), the tokens that a sampler kept in each row, flat and
            in the CSR form: row n keeps token_ids[offsets[n]:offsets[n + 1]], integers that rise.
            Log-probs and entropies are then those of the softmax over what is kept. A label outside
            its set has log-prob -inf and no gradient; an empty set means the whole vocabulary.
            Only the rows of weight that are kept are multiplied; process_group must be None.
        row_statistics: Names of statistics to return too, without gradients: "sum_p_squared", which
            is Σ_j p_j²; "is_top1", whether the label's logit is the highest, of equal ones the
            first; "mean_logit", the mean of the processed logits over the vocabulary, -inf where
            one is. They go with neither process_group nor support.

    Returns:
        logp like labels, or (logp, entropy), entropy [...], in nats; fp32, or fp64 for fp64 hidden.
        With row_statistics `TokenLogprobs(logp, entropy, sum_p_squared, is_top1, mean_logit)`, in
        which what was not asked for is None; is_top1 is like labels, the others are [...].

    Raises:
        TypeError: An argument is no tensor or number, or has a dtype that it cannot have; or it is
            a DTensor, and is not weight or bias, or is passed beside a process_group.
        ValueError: A shape, a device, a number or a name does not fit, or support is in no order;
            the message names it.
        IndexError: A token of support is outside [0, V), or a label is, and is not ignore_index. Of
            labels only the CPU raises at once; elsewhere the row of such a label is NaN, and
            `fastpg.check()` raises.
        RuntimeError: On a CPU, another of the ranks that weight lies on raised one of these.

    Note:
        A GPU is waited for: forward for the number of rows that are not ignored, backward for the
        number of those that a gradient reaches, and for support, which it checks too.

        Off fp64 at H=896, V=151936 (on a CPU, 256 rows of logits of standard deviation 2, half the
        labels the likeliest): log-probs at most 4e-6 in fp32, 0.04 from logits in bf16, 2e-6 from
        fp32 logits of bf16 operands; gradients, relative, 6e-7 in fp32 and 3e-3 in bf16. A row's
        bits depend on itself alone as far as BLAS keeps to that: MKL with AVX-512 does for
        log-probs in fp32 and bf16, and for the gradient of hidden if 4 rows have one. With AVX2
        the last rows of 5, 6, 7 or 9 may differ from the same among more, by 6e-6; in fp64, and on
        a GPU, its kernel may depend on the number of rows.

        Where hidden alone requires a gradient (a frozen head), off fp16, and one label a row is all
        that is asked for, without a process_group, forward makes it too, in 4 N V H operations in
        place of 6, and backward multiplies. It is within 1e-6 of that of two passes in fp32 and
        6e-3 in bf16, relative in norm; the log-probs are the same bits. A row that no gradient
        reaches in the end costs as much as any then: with more than half of such rows two passes
        would be faster.

    Example:
        >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> fastpg.linear_token_logprobs(hidden, weight, torch.tensor([0]))
        tensor([-0.1269])

    Reference:
        Wijmans et al. 2024, "Cut your losses in large-vocabulary language models",
        arXiv:2411.09009.
    """
    several = has_several(labels, hidden)
    names = checked_statistics(OP, row_statistics)
    # The kernels of these take a whole head: one that lies in parts is gathered for them.
    gathers_whole = several or bool(names) or support is not None
    inputs = head_inputs(
        OP,
        hidden,
        weight,
        first_labels(OP, labels, as_list(hidden)[0]) if several else labels,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        logits_dtype=logits_dtype,
        group=process_group,
        keep_shards=not (gathers_whole or torch.compiler.is_compiling()),
    )
    if in_shards(inputs.head_weight):
        logp, entropy = (x.view(labels.shape) for x in sharded_head.logprobs(inputs))
        return (logp, entropy) if return_entropy else logp
    # A label that one rank refuses has to stop the ranks that hold the other parts, too.
    with of_all_ranks(OP, [*as_list(weight), bias], inputs.head):
        return _of_whole_head(
            inputs,
            labels,
            several=several,
            return_entropy=return_entropy,
            support=support,
            names=names,
        )


def _of_whole_head(
    inputs: HeadInputs,
    labels: Tensor,
    *,
    several: bool,
    return_entropy: bool,
    support: tuple[Tensor, Tensor] | None,
    names: Collection[str],
) -> Tensor | tuple[Tensor, Tensor] | TokenLogprobs:
    """What the public function returns, with the statistics of these names."""
    if several or names:
        check_whole_rows(OP, names, support, inputs.group)
        found = linear_several_labels.logprobs(inputs, labels, several=several)
        return as_asked(found, names, return_entropy=return_entropy)
    if support is not None:
        sets = checked_support(OP, support, labels, inputs.group)
        logp, entropy = linear_support.logprobs(inputs, sets)
    # With a frozen head forward makes the gradient as well, which saves a product.
    elif not return_entropy and frozen_head.serves(inputs):
        return frozen_head.logprobs(inputs).view(labels.shape)
    else:
        logp, entropy = logprobs(inputs)
    if return_entropy:
        return logp.view(labels.shape), entropy.view(labels.shape)
    return logp.view(labels.shape)
