"""Per-token log-probs and entropies from logits, without a softmax in memory.

    z    = softcap(x) / temperature,   softcap(x) = softcap · tanh(x / softcap)
    logp = z_y − logsumexp(z) = (z_y − max z) − log Σ_j exp(z_j − max z)
    H    = −Σ_j p_j log p_j = log Σ_j e^{d_j} − Σ_j e^{d_j} d_j / Σ_j e^{d_j},   d = z − max z

    ∂logp/∂z_j = 1[j = y] − p_j          ∂H/∂z_j = −p_j (log p_j + H)

Forward reads the logits once and keeps (max, log Σ e^d) per row; backward reads them once more and
writes their gradient.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ..._library import _C, DTYPE_CODE, address, cpu_kernel, define, triton_kernels
from ..common.autograd import once_differentiable
from ..common.checks import (
    check_label_values,
    check_labels,
    check_tensors,
    compute_dtype,
    constant,
    label_temperature,
    positive,
)
from .shards import logprobs_of_shards


def _scaled(logits, labels, temperature, softcap, ignore_index, top=None):
    """(kept rows, capped logits, their maximum, d = z - max z); ignored rows count as zeros."""
    kept = labels != ignore_index
    x = torch.where(kept[..., None], logits.to(temperature.dtype), 0.0)
    capped = softcap * torch.tanh(x / softcap) if softcap else x
    top = capped.amax(-1) if top is None else top
    origin = top.masked_fill(top == -math.inf, 0.0)
    return kept, capped, top, (capped - origin[..., None]) / temperature[..., None]


def reference(logits, labels, temperature, softcap, ignore_index):
    """[..., V] logits -> logp [...], entropy [...], stats [2, ...]: (max, log_sum) of each row."""
    vocab = logits.shape[-1]
    kept, _, top, d = _scaled(logits, labels, temperature, softcap, ignore_index)
    legal = kept & (labels >= 0) & (labels < vocab)
    check_label_values("token_logprobs", labels, legal, kept, vocab, ignore_index, temperature)
    e = d.exp()
    total = e.sum(-1)
    log_sum = torch.where(total == 0, 0.0, total.log())
    log_sum = torch.where(legal, log_sum, math.nan)  # spoils what a device cannot raise about
    logp = d.gather(-1, torch.where(legal, labels, 0)[..., None])[..., 0] - log_sum
    weighted = (e * torch.where(e == 0, 0.0, d)).sum(-1)
    entropy = torch.where(total == 0, 0.0, log_sum - weighted / total).clamp(min=0.0)
    stats = torch.stack([top, log_sum])
    return tuple(torch.where(kept, out, 0.0) for out in (logp, entropy, stats))


def reference_backward(
    grad_logp, grad_entropy, entropy, stats, logits, labels, temperature, softcap, ignore_index
):  # fmt: skip
    """dL/dlogits, in the dtype and shape of logits, contiguous."""
    top, log_sum = stats  # of the whole row, of which logits may be a slice
    kept, capped, _, d = _scaled(logits, labels, temperature, softcap, ignore_index, top)
    logp = d - log_sum[..., None]
    p = logp.exp()
    g = torch.where(kept, grad_logp, 0.0)[..., None]
    is_label = torch.arange(logits.shape[-1], device=logits.device) == labels[..., None]
    # 1 - p_y as -expm1(logp_y) keeps its digits as p_y -> 1.
    grad = g * torch.where(is_label, -torch.expm1(logp), -p)
    if grad_entropy is not None:
        g = torch.where(kept, grad_entropy, 0.0)[..., None]
        grad = grad - g * p * (torch.where(p == 0, 0.0, logp) + entropy[..., None])
    grad = torch.where(capped == -math.inf, 0.0, grad)
    if softcap:
        grad = grad * (1 - (capped / softcap) ** 2)
    grad = torch.where(kept[..., None], grad / temperature[..., None], 0.0)
    return grad.to(logits.dtype).contiguous()


def reference_backward_out(out, *args):
    out.copy_(reference_backward(*args))


def _fake(logits, labels, temperature, *_):
    shapes = labels.shape, labels.shape, (2, *labels.shape)
    return tuple(labels.new_empty(shape, dtype=temperature.dtype) for shape in shapes)


_OPTIONS = "Tensor logits, Tensor labels, Tensor temperature, float softcap, int ignore_index"
_logp = define(
    f"token_logprobs({_OPTIONS}) -> (Tensor, Tensor)",
    fake=lambda *args: _fake(*args)[1:],
    reference=lambda *args: reference(*args)[::2],
)
_logp_entropy = define(
    f"token_logprobs_entropy({_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference,
)
_GRADIENT = f"Tensor grad_logp, Tensor? grad_entropy, Tensor? entropy, Tensor stats, {_OPTIONS}"
_backward = define(
    f"token_logprobs_backward({_GRADIENT}) -> Tensor",
    fake=lambda *args: args[4].new_empty(args[4].shape),
    reference=reference_backward,
)
# out: contiguous, of the shape and dtype of logits. It may be the logits themselves.
_backward_out = define(
    f"token_logprobs_backward_out(Tensor(a!) out, {_GRADIENT}) -> ()",
    fake=lambda *_: None,
    reference=reference_backward_out,
)


def _addressable(logits, labels, temperature):
    """The same values with adjacent logits and at most two leading strides, copied if need be."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if logits.dim() > 3:
        logits = logits.flatten(0, -3)
    return logits, labels.contiguous(), temperature.contiguous()


def _rows(logits, labels, temperature, softcap, ignore_index):
    """LogitRows of csrc/token_logprobs.h. The caller keeps the tensors alive."""
    shape, strides = logits.shape, logits.stride()
    inner, inner_stride = (shape[-2], strides[-2]) if len(shape) > 1 else (1, 0)
    outer_stride = strides[0] if len(shape) > 2 else 0
    return (
        logits.data_ptr(), DTYPE_CODE[logits.dtype], labels.numel(), inner, outer_stride,
        inner_stride, shape[-1], labels.data_ptr(), temperature.data_ptr(), temperature.dim() > 0,
        softcap, ignore_index,
    )  # fmt: skip


def _forward_cpu(with_entropy, logits, labels, temperature, *options):
    logits, labels, temperature = _addressable(logits, labels, temperature)
    logp = torch.empty_like(labels, dtype=temperature.dtype)
    entropy = torch.empty_like(logp) if with_entropy else None
    stats = logp.new_empty((2, *labels.shape))
    rows = _rows(logits, labels, temperature, *options)
    _C.token_logprobs(rows, logp.data_ptr(), address(entropy), stats.data_ptr())
    return logp, entropy, stats


@cpu_kernel(_logp)
def _logp_cpu(*args):
    return _forward_cpu(False, *args)[::2]


@cpu_kernel(_logp_entropy)
def _logp_entropy_cpu(*args):
    return _forward_cpu(True, *args)


@cpu_kernel(_backward_out)
def _backward_out_cpu(out, grad_logp, grad_entropy, entropy, stats, *args):
    logits, labels, temperature = _addressable(*args[:3])
    grad_logp = grad_logp.contiguous()  # sum() hands an expanded one over
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    per_row = grad_logp.data_ptr(), address(grad_entropy), address(entropy), stats.data_ptr()
    rows = _rows(logits, labels, temperature, *args[3:])
    _C.token_logprobs_backward(rows, *per_row, out.data_ptr())


@cpu_kernel(_backward)
def _backward_cpu(*args):
    grad = torch.empty_like(args[4], memory_format=torch.contiguous_format)
    _backward_out_cpu(grad, *args)
    return grad


triton_kernels(__name__, _logp, _logp_entropy, _backward, _backward_out)


def _forward(group, return_entropy, *args):
    """(logp, entropy if wanted, stats), and the arguments that backward takes."""
    op = _logp_entropy if return_entropy else _logp
    return (op(*args), args) if group is None else logprobs_of_shards(op, group, *args)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, return_entropy, *args):
        (logp, *entropy, stats), args = _forward(group, return_entropy, *args)
        ctx.save_for_backward(stats, *args[:3], *entropy)
        ctx.options = args[3:]
        ctx.set_materialize_grads(False)  # an entropy that is only looked at costs nothing
        return (logp, *entropy) if return_entropy else logp

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy=None):
        stats, logits, labels, temperature, *entropy = ctx.saved_tensors
        if grad_logp is None:
            grad_logp = torch.zeros_like(stats[0])
        rows = stats, logits, labels, temperature, *ctx.options
        grad = _backward(grad_logp, grad_entropy, entropy[0] if entropy else None, *rows)
        return None, None, grad, None, None, None, None


def arguments(logits, labels, temperature, softcap, ignore_index, group=None):
    """Those of the ops, from those of the public function, checked."""
    check_tensors("token_logprobs", logits=logits, labels=labels)
    if logits.dim() == 0 or (logits.shape[-1] == 0 and group is None):
        raise ValueError(f"token_logprobs: logits must be [..., V], got {tuple(logits.shape)}")
    check_labels("token_logprobs", labels, logits)
    dtype = compute_dtype("token_logprobs", logits=logits)
    softcap = 0.0 if softcap is None else positive("token_logprobs", "softcap", softcap, dtype)
    t = label_temperature("token_logprobs", temperature, dtype, labels)
    return logits, labels.long(), t, softcap, ignore_index


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each label under softmax(softcap(logits) / temperature), and the entropy.

    logits: [..., V], bf16, fp16, fp32 or fp64, any strides; differentiable.
    labels: [...] integers in [0, V), or ignore_index: outputs and gradient 0, row not read.
    temperature: a float, or a tensor that broadcasts to labels (constant: it gets no gradient).
    process_group: the vocabulary is in shards, one on each rank in turn: logits are [..., V_rank],
        labels and result are of the whole and the same on each, which gets its shard's gradient.
    Returns logp [...], or (logp, entropy) each [...], in nats; fp32 (fp64 for fp64 logits).

    A -inf logit has probability 0 (softcap makes it an ordinary one). NaN makes its own row NaN. A
    label outside [0, V) raises IndexError on the CPU; elsewhere its row is NaN, and check() raises.
    """
    args = arguments(logits, labels, temperature, softcap, ignore_index, process_group)
    if not constant(logits):
        return _TokenLogprobs.apply(process_group, return_entropy, *args)
    *outputs, _ = _forward(process_group, return_entropy, *args)[0]
    return tuple(outputs) if return_entropy else outputs[0]
