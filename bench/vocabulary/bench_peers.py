"""The ops of the vocabulary against what others have written for the same, where it is installed.

    pip install --no-deps liger-kernel trl quack-kernels cut-cross-entropy flash-attn

Each must give the right values and gradients on the very inputs before it is timed. A peer that
computes a cross entropy gives -logp of every token. Liger's writes the gradient over the logits, so
it has logits of its own, and they hold their gradient after a call. It computes no other loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from fastpg import linear_token_logprobs, token_logprobs

from .._timing import Case
from ..inputs import head_and_labels, logits_and_labels

ROWS, VOCAB, WIDTH = 8192, 151936, 4096
HEAD_VOCAB = 131072
CHECKED = 64  # rows: a float32 copy of all of them would not fit beside the logits

LogProbs = Callable[[Tensor, Tensor], Tensor]  # logits [N, V] and labels [N] to [N]
HeadLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [N, H], weight [V, H], labels [N]


def _installed(name: str) -> bool:
    """Whether a package is there; its parent may be missing as well."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def log_probs() -> dict[str, LogProbs]:
    """Log-probs of labels from logits, with a gradient, by the name of who wrote it."""
    found: dict[str, LogProbs] = {}
    if _installed("trl.kernels"):
        kernels = import_module("trl.kernels.logprob_entropy")
        found["TRL"] = lambda x, y: kernels.selective_log_softmax_and_entropy(x, y)[0]
    if _installed("quack"):
        quack = import_module("quack.cross_entropy")
        found["quack-kernels"] = lambda x, y: -quack.cross_entropy(x, y, reduction="none")
    if _installed("flash_attn"):
        flash = import_module("flash_attn.ops.triton.cross_entropy")
        found["flash-attention"] = lambda x, y: -flash.cross_entropy_loss(x, y)[0]
    if _installed("liger_kernel"):
        liger = import_module("liger_kernel.transformers.functional")
        found["liger-kernel, in place"] = lambda x, y: (
            -liger.liger_cross_entropy(x, y, reduction="sum")
        )
    return found


def head_losses() -> dict[str, HeadLoss]:
    """The sum of cross entropies from hidden states and the head, by who wrote it."""
    found: dict[str, HeadLoss] = {}
    if _installed("cut_cross_entropy"):
        cce = import_module("cut_cross_entropy")
        found["cut-cross-entropy"] = lambda *args: cce.linear_cross_entropy(*args, reduction="sum")
    if _installed("liger_kernel"):
        liger = import_module("liger_kernel.transformers.functional")
        found["liger-kernel"] = lambda *args: liger.liger_fused_linear_cross_entropy(
            *args, reduction="sum"
        )
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        own = torch.nn.functional.linear_cross_entropy
        found["torch"] = lambda *args: own(*args, reduction="sum")
    return found


def value_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """What a function returns, and the gradients of its sum by all inputs but the labels."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:-1]]
    value = function(*leaves, inputs[-1])
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


def gate(
    theirs: Callable[..., Tensor], wanted: Callable[..., Tensor], *inputs: Tensor
) -> Callable[[], None]:
    """A check of a function's values and gradients, as far as gradients in bf16 tell."""

    def check() -> None:
        got, *got_gradients = value_and_gradients(theirs, *inputs)
        want, *gradients = value_and_gradients(wanted, *inputs)
        want = want.sum() if got.dim() == 0 else want
        least = 1e-2 if got.dtype is torch.bfloat16 else 1e-3
        assert off(got, want) < least, f"values off by a relative {off(got, want):.2g}"
        for pair in zip(got_gradients, gradients, strict=True):
            assert off(*pair) < 1e-2, f"a gradient off by a relative {off(*pair):.2g}"

    return check


def off(got: Tensor, want: Tensor) -> float:
    """The relative error, in the norm."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def training(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """Forward and backward of a sum, with the gradients dropped."""
    leaves = [x.detach().requires_grad_() for x in inputs[:-1]]
    return lambda: torch.autograd.grad(function(*leaves, inputs[-1]).sum(), leaves)


def reference(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def of_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -linear_token_logprobs(hidden, weight, labels)


def from_logits(device: str, rows: int, vocab: int) -> Case:
    """Log-probs, forward and backward."""
    with torch.device(device):
        logits, labels = logits_and_labels(rows, vocab, torch.bfloat16)
    few = logits[:CHECKED], labels[:CHECKED]
    peers = log_probs()
    candidates = {"fastpg": training(token_logprobs, logits, labels)}
    for name, peer in peers.items():
        own = logits.clone() if "in place" in name else logits
        candidates[name] = training(peer, own, labels)
    return Case(
        "peers",
        f"log-probs, forward + backward, {rows} x {vocab} bfloat16",
        gate(token_logprobs, reference, *few),
        candidates,
        device=device,
        gates={name: gate(peer, reference, *few) for name, peer in peers.items()},
    )


def with_entropy(device: str, rows: int, vocab: int) -> Case | None:
    """Log-probs and entropies, forward: only TRL has a kernel of it."""
    if not _installed("trl.kernels"):
        return None
    theirs = import_module("trl.kernels.logprob_entropy").selective_log_softmax_and_entropy
    with torch.device(device):
        logits, labels = logits_and_labels(rows, vocab, torch.bfloat16)
    few = logits[:CHECKED], labels[:CHECKED]

    def check() -> None:
        ours = token_logprobs(*few, return_entropy=True)
        for got, want in zip(theirs(*few), ours, strict=True):
            torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-2)

    return Case(
        "peers",
        f"log-probs and entropies, forward, {rows} x {vocab} bfloat16",
        gate(token_logprobs, reference, *few),
        {
            "fastpg": lambda: token_logprobs(logits, labels, return_entropy=True),
            "TRL": lambda: theirs(logits, labels),
        },
        device=device,
        gates={"TRL": check},
    )


def from_hidden(device: str, rows: int, width: int, vocab: int) -> Case:
    """The loss of a head, forward and backward to hidden states and weight."""
    with torch.device(device):
        hidden, weight, _, labels = head_and_labels((rows,), vocab, width, torch.bfloat16)
    few = hidden[:CHECKED], weight, labels[:CHECKED]
    peers = head_losses()
    functions = {"fastpg": of_head, **peers}

    def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -reference(torch.nn.functional.linear(hidden, weight), labels)

    return Case(
        "peers",
        f"a head's cross entropy, forward + backward, N={rows} H={width} V={vocab} bfloat16",
        gate(of_head, eager, *few),
        {name: training(f, hidden, weight, labels) for name, f in functions.items()},
        device=device,
        gates={name: gate(peer, eager, *few) for name, peer in peers.items()},
        least=3,
    )


def cases(device: str) -> Iterator[Case]:
    if device != "cuda":
        return  # The peers' kernels need a GPU.
    if (case := with_entropy(device, ROWS, VOCAB)) is not None:
        yield case
    yield from_logits(device, ROWS, VOCAB)
    yield from_hidden(device, ROWS, WIDTH, HEAD_VOCAB)
