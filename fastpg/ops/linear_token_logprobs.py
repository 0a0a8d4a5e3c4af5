"""Per-token log-probs and entropies from hidden states and the LM head: no logits in memory.

    x = hidden @ weightᵀ + bias,   z = softcap(s x) / T,   s = logit_scale

and from z on as in token_logprobs.py. There s is part of the others, z = softcap'(x) / T' with
softcap' = softcap / s and T' = T / s: it costs nothing and rounds nothing.

Forward walks the vocabulary in slices: the logits of a slice by BLAS, into a buffer that the next
one overwrites; its statistics by token_logprobs; and those of the slices merge to the row's.
Backward knows the row's and walks again: logits, turned in place into their gradient g, and then

    dhidden += g @ weight_slice,   dweight_slice = gᵀ @ hidden,   dbias_slice = Σ g

so that only dhidden is a sum over slices; it is kept in fp32. That is 8 N V H operations where
eager, which keeps the logits, takes 6. Ignored rows, and backward those that no gradient reaches,
are left out of every product.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .._library import define, kernel
from . import token_logprobs as page
from ._autograd import once_differentiable
from ._checks import constant
from ._head import (
    filled,
    head_arguments,
    kept_rows,
    legal_labels,
    logits_of_slices,
    logp_and_statistics,
    reached,
    statistics,
    write_gradients,
)
from ._shards import NEVER, add_over_ranks, label_logit, of_all_ranks

OP = "linear_token_logprobs"


def _logits(hidden, weight, bias, logits_dtype):
    """[N, V], as a model's own head makes them; the specification of what kernels do in slices."""
    operands = (x if x is None else x.to(logits_dtype) for x in (hidden, weight, bias))
    return torch.nn.functional.linear(*operands)


def reference(hidden, weight, bias, labels, temperature, softcap, ignore_index, logits_dtype):
    """hidden [N, H], weight [V, H], labels [N] -> logp [N], entropy [N], stats [2, N]."""
    legal_labels(OP, labels, weight, temperature, ignore_index)
    logits = _logits(hidden, weight, bias, logits_dtype)
    return page.reference(logits, labels, temperature, softcap, ignore_index)


def reference_part(hidden, weight, bias, labels, temperature, softcap, ignore_index, logits_dtype):
    """label_logit, top, log_sum, entropy [4, N], weight being a part of the vocabulary's."""
    logits = _logits(hidden, weight, bias, logits_dtype)
    anything = torch.where(labels == ignore_index, ignore_index, 0)
    _, entropy, stats = page.reference(logits, anything, temperature, softcap, ignore_index)
    return torch.stack([label_logit(logits, labels, stats.dtype, softcap), *stats, entropy])


def reference_backward(
    grad_logp, grad_entropy, entropy, stats, hidden, weight, bias, labels, temperature, softcap,
    ignore_index, logits_dtype, wanted,
):  # fmt: skip
    """dL/dhidden, dL/dweight, dL/dbias in the dtype of hidden; one that is not wanted is empty."""
    hidden = torch.where((labels != ignore_index)[:, None], hidden, 0.0)
    logits = _logits(hidden, weight, bias, logits_dtype)
    rows = logits, labels, temperature, softcap, ignore_index
    g = page.reference_backward(grad_logp, grad_entropy, entropy, stats, *rows)
    g = g.to(hidden.dtype).to(temperature.dtype)
    dhidden = g @ weight.to(g.dtype) if wanted[0] else g.new_empty(0)
    dweight = g.T @ hidden.to(g.dtype) if wanted[1] else g.new_empty(0)
    dbias = g.sum(0) if wanted[2] else g.new_empty(0)
    return tuple(x.to(hidden.dtype) for x in (dhidden, dweight, dbias))


_HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor temperature, "
    "float softcap, int ignore_index, ScalarType logits_dtype"
)


def _fake(hidden, weight, bias, labels, temperature, *_):
    shapes = labels.shape, labels.shape, (2, *labels.shape)
    return tuple(labels.new_empty(shape, dtype=temperature.dtype) for shape in shapes)


def _fake_backward(*args):
    hidden, weight, wanted = *args[4:6], args[-1]
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    pairs = zip(shapes, wanted, strict=True)
    return tuple(hidden.new_empty(shape if want else 0) for shape, want in pairs)


_forward = define(
    f"linear_token_logprobs({_HEAD}) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference,
)
_part = define(
    f"linear_token_logprobs_part({_HEAD}) -> Tensor",
    fake=lambda *args: args[3].new_empty((4, *args[3].shape), dtype=args[4].dtype),
    reference=reference_part,
)
_backward = define(
    "linear_token_logprobs_backward(Tensor grad_logp, Tensor? grad_entropy, Tensor entropy, "
    f"Tensor stats, {_HEAD}, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    reference=reference_backward,
)


def _forward_by_slices(hidden, weight, bias, labels, temperature, softcap, ignore_index, dtype):
    kept, legal = legal_labels(OP, labels, weight, temperature, ignore_index)
    rows, inputs = kept_rows(kept, hidden, labels, legal, temperature)
    slices = logits_of_slices(inputs[0], weight, bias, dtype)
    outputs = logp_and_statistics(slices, *inputs[1:], softcap)
    logp, entropy, top, log_sum = (filled(rows, len(kept), x) for x in outputs)
    return logp, entropy, torch.stack([top, log_sum])


def _part_by_slices(hidden, weight, bias, labels, temperature, softcap, ignore_index, dtype):
    rows, inputs = kept_rows(labels != ignore_index, hidden, labels, temperature)
    slices = logits_of_slices(inputs[0], weight, bias, dtype)
    outputs = statistics(slices, *inputs[1:], softcap)
    return torch.stack([filled(rows, len(labels), x) for x in outputs])


def _backward_by_slices(
    grad_logp, grad_entropy, entropy, stats, hidden, weight, bias, labels, temperature, softcap,
    ignore_index, dtype, wanted,
):  # fmt: skip
    live = (labels != ignore_index) & reached(grad_logp, grad_entropy)
    per_row = grad_logp, grad_entropy, entropy, *stats, hidden, labels, temperature
    rows, (*upstream, top, log_sum, hidden, labels, temperature) = kept_rows(live, *per_row)
    upstream.append(torch.stack([top, log_sum]))
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    dtypes = temperature.dtype, weight.dtype, weight.dtype
    into = [
        weight.new_empty(shape, dtype=kind) if want else None
        for shape, kind, want in zip(shapes, dtypes, wanted, strict=True)
    ]
    slices = logits_of_slices(hidden, weight, bias, dtype)
    write_gradients(slices, upstream, (hidden, labels, temperature, softcap), weight, into)
    if wanted[0]:
        into[0] = filled(rows, len(live), into[0].to(hidden.dtype))
    return tuple(hidden.new_empty(0) if x is None else x for x in into)


for device in ("CPU", "CUDA"):
    kernel(_forward, device, "BLAS")(_forward_by_slices)
    kernel(_part, device, "BLAS")(_part_by_slices)
    kernel(_backward, device, "BLAS")(_backward_by_slices)


def _forward_of(group, *args):
    """logp, entropy and stats, and what backward is of: this rank's shard, as a head of its own."""
    if group is None:
        return _forward(*args), args
    hidden, weight, bias, labels, temperature, softcap, ignore_index, dtype = args

    def part(local):
        return _part(hidden, weight, bias, local, temperature, softcap, NEVER, dtype)

    rows = len(weight), labels, temperature, ignore_index
    outputs, local = of_all_ranks(OP, group, *rows, part)
    return outputs, (hidden, weight, bias, local, temperature, softcap, NEVER, dtype)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, *args):
        (logp, entropy, stats), args = _forward_of(group, *args)
        ctx.group = group
        ctx.save_for_backward(entropy, stats, *args[:5])
        ctx.options = args[5:]
        ctx.set_materialize_grads(False)  # an entropy that is only looked at costs nothing
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        entropy, stats, *head = ctx.saved_tensors
        if grad_logp is None:
            grad_logp = torch.zeros_like(entropy)
        wanted = list(ctx.needs_input_grad[1:4])
        args = grad_logp, grad_entropy, entropy, stats, *head, *ctx.options, wanted
        grads = [x if want else None for x, want in zip(_backward(*args), wanted, strict=True)]
        if ctx.group is not None and wanted[0]:
            grads[0] = add_over_ranks(grads[0], ctx.group, entropy.dtype)
        return None, *grads, None, None, None, None, None


def logprobs(group, *args) -> tuple[Tensor, Tensor]:
    """logp and entropy [N], of what head_arguments returns."""
    if constant(*args[:3]):
        return _forward_of(group, *args)[0][:2]
    return _LinearTokenLogprobs.apply(group, *args)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
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
) -> Tensor | tuple[Tensor, Tensor]:
    """token_logprobs(hidden @ weight.T + bias, labels, ...) without the logits [..., V].

    hidden: [..., H], bf16, fp16, fp32 or fp64; weight: [V, H]; bias: [V]; of one dtype, each
        differentiable. Under autocast they are cast as for a linear layer.
    labels: [...] integers in [0, V), or ignore_index: outputs and gradient 0, row not read.
    temperature: a float, or a tensor that broadcasts to labels (constant: it gets no gradient).
    logit_scale, softcap: z = softcap(logit_scale * logits) / temperature, softcap as in Gemma.
    logits_dtype: None rounds logits to the dtype of hidden, as a model's own head does; fp32 keeps
        those of bf16 and fp16 operands (a CPU upcasts these, slice by slice: twice the time).
    process_group: the vocabulary is in shards, one on each rank in turn: weight is [V_rank, H] and
        bias [V_rank]. All else is the same on each, the result and the gradient of hidden too.
    Returns logp [...], or (logp, entropy) each [...], in nats; fp32 (fp64 for fp64 hidden).

    -inf, NaN and bad labels are treated as by token_logprobs. On a GPU the call waits for the
    number of rows that are not ignored, and backward for that of those that a gradient reaches.
    The logits are in slices of all rows and 4096 tokens (on a GPU 16384), one at a time: [N, 4096],
    and so [N, V] for a vocabulary that is no larger than a slice.

    Off fp64 at H=896, V=151936 (256 peaked rows, on a CPU): log-probs at most 3e-6 in fp32, 0.03
    from logits in bf16, 2e-6 from fp32 logits of bf16 operands; gradients, relative, 6e-7 in fp32
    and 3e-3 in bf16. A row's bits depend on itself alone as far as BLAS keeps to that: the CPU's
    does, but for the gradient of hidden of fewer than 4 rows in fp32; a GPU's may choose its kernel
    by the number of rows.
    """
    args = head_arguments(
        OP, hidden, weight, labels, bias, temperature, softcap, logit_scale, ignore_index,
        logits_dtype, process_group,
    )  # fmt: skip
    logp, entropy = (x.view(labels.shape) for x in logprobs(process_group, *args))
    return (logp, entropy) if return_entropy else logp
