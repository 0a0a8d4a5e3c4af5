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
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._library import _C, DTYPE_CODE, address, compute_dtype, cpu_kernel, define


def _scaled(logits, labels, temperatures, temperature, softcap, ignore_index):
    """(kept rows, capped logits, their maximum, d = z - max z); what is ignored is never computed."""
    kept = labels != ignore_index
    x = torch.where(kept[..., None], logits.to(compute_dtype(logits.dtype)), 0.0)
    capped = softcap * torch.tanh(x / softcap) if softcap else x
    top = capped.amax(-1)
    origin = top.masked_fill(top == -math.inf, 0.0)
    t = temperature if temperatures is None else torch.where(kept, temperatures, 1.0)[..., None]
    return kept, capped, top, (capped - origin[..., None]) / t


def _check_on_host(labels, vocab, ignore_index, temperatures):
    """The checks of values that the C++ kernel makes. On other devices they would synchronise."""
    if labels.device.type != "cpu":
        return
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if bad.any():
        raise IndexError(
            f"token_logprobs: labels holds {labels[bad][0].item()}, outside [0, {vocab}) "
            f"and not ignore_index={ignore_index}"
        )
    if temperatures is not None:
        bad = (labels != ignore_index) & ~((temperatures > 0) & temperatures.isfinite())
        if bad.any():
            raise ValueError(
                f"token_logprobs: temperature holds {temperatures[bad][0].item()}, "
                "must be finite and > 0"
            )


def reference(logits, labels, temperatures, temperature, softcap, ignore_index):
    """[..., V] logits -> logp, entropy, max, log_sum, each of the shape of labels."""
    vocab = logits.shape[-1]
    _check_on_host(labels, vocab, ignore_index, temperatures)
    kept, _, top, d = _scaled(logits, labels, temperatures, temperature, softcap, ignore_index)
    e = d.exp()
    total = e.sum(-1)
    log_sum = torch.where(total == 0, 0.0, total.log())
    legal = kept & (labels >= 0) & (labels < vocab)
    label = torch.where(legal, labels, 0)[..., None]
    logp = d.gather(-1, label)[..., 0] - log_sum
    weighted = (e * torch.where(e == 0, 0.0, d)).sum(-1)
    entropy = torch.where(total == 0, 0.0, log_sum - weighted / total).clamp(min=0.0)
    logp = torch.where(legal, logp, math.nan)  # a device that cannot raise poisons the row
    return tuple(torch.where(kept, out, 0.0) for out in (logp, entropy, top, log_sum))


def reference_logp(*args):
    """The same without the entropy."""
    logp, _, top, log_sum = reference(*args)
    return logp, top, log_sum


def reference_backward(
    grad_logp, grad_entropy, entropy, top, log_sum,
    logits, labels, temperatures, temperature, softcap, ignore_index,
):  # fmt: skip
    """dL/dlogits, in the dtype and shape of logits, contiguous."""
    kept, capped, _, d = _scaled(logits, labels, temperatures, temperature, softcap, ignore_index)
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
    t = temperature if temperatures is None else torch.where(kept, temperatures, 1.0)[..., None]
    return torch.where(kept[..., None], grad / t, 0.0).to(logits.dtype).contiguous()


def _fake(logits, labels, *_):
    stats = [labels.new_empty(labels.shape, dtype=compute_dtype(logits.dtype)) for _ in range(4)]
    return tuple(stats)


_OPTIONS = (
    "Tensor logits, Tensor labels, Tensor? temperatures, float temperature, float softcap, "
    "int ignore_index"
)
_logp = define(
    f"token_logprobs({_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=lambda *args: _fake(*args)[:3],
    reference=reference_logp,
)
_logp_entropy = define(
    f"token_logprobs_entropy({_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference,
)
_backward = define(
    "token_logprobs_backward(Tensor grad_logp, Tensor? grad_entropy, Tensor? entropy, Tensor top, "
    f"Tensor log_sum, {_OPTIONS}) -> Tensor",
    fake=lambda *args: args[5].new_empty(args[5].shape),
    reference=reference_backward,
)


def _rows(logits, labels, temperatures, temperature, softcap, ignore_index):
    """The rows as the C++ kernels take them, and the tensors that must outlive the call."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if logits.dim() > 3:
        logits = logits.flatten(0, -3)  # copies only where the leading strides do not nest
    shape, strides = logits.shape, logits.stride()
    inner, inner_stride = (shape[-2], strides[-2]) if logits.dim() > 1 else (1, 0)
    outer_stride = strides[0] if logits.dim() == 3 else 0
    labels = labels.contiguous()
    if temperatures is not None:
        temperatures = temperatures.contiguous()
    rows = _C.LogitRows(
        logits.data_ptr(), DTYPE_CODE[logits.dtype], labels.numel(), inner, outer_stride,
        inner_stride, shape[-1], labels.data_ptr(), address(temperatures), temperature, softcap,
        ignore_index,
    )  # fmt: skip
    return rows, (logits, labels, temperatures)


@cpu_kernel(_logp)
def _logp_cpu(logits, labels, *options):
    rows, _alive = _rows(logits, labels, *options)
    out = [labels.new_empty(labels.shape, dtype=compute_dtype(logits.dtype)) for _ in range(3)]
    _C.token_logprobs(rows, out[0].data_ptr(), 0, out[1].data_ptr(), out[2].data_ptr())
    return tuple(out)


@cpu_kernel(_logp_entropy)
def _logp_entropy_cpu(logits, labels, *options):
    rows, _alive = _rows(logits, labels, *options)
    out = [labels.new_empty(labels.shape, dtype=compute_dtype(logits.dtype)) for _ in range(4)]
    _C.token_logprobs(rows, *(o.data_ptr() for o in out))
    return tuple(out)


@cpu_kernel(_backward)
def _backward_cpu(grad_logp, grad_entropy, entropy, top, log_sum, logits, labels, *options):
    rows, _alive = _rows(logits, labels, *options)
    grad_logp = grad_logp.contiguous()  # sum() hands an expanded one over
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    grad = logits.new_empty(logits.shape)
    per_row = map(address, (grad_logp, grad_entropy, entropy, top, log_sum))
    _C.token_logprobs_backward(rows, *per_row, grad.data_ptr())
    return grad


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, temperatures, *options):
        logp, top, log_sum = _logp(logits, labels, temperatures, *options)
        ctx.save_for_backward(None, top, log_sum, logits, labels, temperatures)
        ctx.options = options
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp):
        entropy, *saved = ctx.saved_tensors
        grad = _backward(grad_logp, None, entropy, *saved, *ctx.options)
        return (grad, *[None] * 5)


class _TokenLogprobsEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, temperatures, *options):
        logp, entropy, top, log_sum = _logp_entropy(logits, labels, temperatures, *options)
        ctx.save_for_backward(entropy, top, log_sum, logits, labels, temperatures)
        ctx.options = options
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        grad = _backward(grad_logp, grad_entropy, *ctx.saved_tensors, *ctx.options)
        return (grad, *[None] * 5)


def _check(logits: Tensor, labels: Tensor) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"token_logprobs: logits must be floating point, got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"token_logprobs: logits must be [..., V], got {tuple(logits.shape)}")
    if labels.dtype is not torch.int64 and labels.dtype not in _LABEL_DTYPES:
        raise TypeError(f"token_logprobs: labels must be integers, got {labels.dtype}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"token_logprobs: labels {tuple(labels.shape)} must have the shape of logits "
            f"{tuple(logits.shape)} without the last axis"
        )
    if labels.device != logits.device:
        raise ValueError(f"token_logprobs: labels on {labels.device}, logits on {logits.device}")


_LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _temperatures(temperature: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """One temperature per label, in the compute dtype."""
    if temperature.device != logits.device:
        raise ValueError(
            f"token_logprobs: temperature on {temperature.device}, logits on {logits.device}"
        )
    try:
        each = temperature.expand(labels.shape)
    except RuntimeError:
        raise ValueError(
            f"token_logprobs: temperature {tuple(temperature.shape)} does not broadcast to labels "
            f"{tuple(labels.shape)}"
        ) from None
    return each.detach().to(compute_dtype(logits.dtype))


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"token_logprobs: {name} must be finite and > 0, got {value}")
    return float(value)


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each label under softmax(softcap(logits) / temperature), and the entropy.

    logits: [..., V], bf16, fp16, fp32 or fp64, any strides; differentiable.
    labels: [...] integers in [0, V), or ignore_index: log-prob, entropy and gradient 0, row not read.
    temperature: a float, or a tensor that broadcasts to labels (constant: it gets no gradient).
    Returns logp [...], or (logp, entropy) each [...], in nats; fp32 (fp64 for fp64 logits).

    A -inf logit has probability 0. A NaN or +inf makes its own row NaN. A label outside [0, V)
    raises IndexError on the CPU and gives NaN on other devices.
    """
    _check(logits, labels)
    if labels.dtype is not torch.int64:
        labels = labels.long()
    if isinstance(temperature, Tensor):
        temperatures, temperature = _temperatures(temperature, logits, labels), 1.0
    else:
        temperatures, temperature = None, _positive("temperature", temperature)
    softcap = 0.0 if softcap is None else _positive("softcap", softcap)
    function = _TokenLogprobsEntropy if return_entropy else _TokenLogprobs
    return function.apply(logits, labels, temperatures, temperature, softcap, ignore_index)
