"""token_logprobs at N=256 rows of V=151936, against PyTorch and against reading the logits once."""

import torch

from fastpg import token_logprobs
from tests.inputs import logits_and_labels

from ._timing import Case

ROWS, VOCAB = 256, 151936


def eager(logits, labels):
    return logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def gate(logits, labels):
    def check():
        want = eager(logits.double(), labels)
        error = (token_logprobs(logits, labels) - want).abs().max().item()
        assert error < 2e-6 * (1 + want.abs().max()), f"log-prob off by {error}"

    return check


def training(function, logits, labels):
    """Forward and backward, with the gradient dropped as an optimiser step would."""
    x = logits.detach().requires_grad_()
    upstream = torch.ones_like(labels, dtype=torch.float32)

    def step():
        torch.autograd.grad(function(x, labels), x, upstream)

    return step


def cases(device):
    for dtype in (torch.float32, torch.bfloat16):
        yield from of_dtype(dtype, device)


def of_dtype(dtype, device):
    compiled = torch.compile(eager)
    logits, labels = (t.to(device) for t in logits_and_labels(ROWS, VOCAB, dtype))
    fp32, name = logits.float(), str(dtype).removeprefix("torch.")
    yield Case(
        "token_logprobs",
        f"forward, {ROWS} x {VOCAB} {name}",
        gate(logits, labels),
        {
            "fastpg": lambda: token_logprobs(logits, labels),
            "fastpg with entropy": lambda: token_logprobs(logits, labels, return_entropy=True),
            "eager": lambda: eager(logits, labels),
            "torch.compile": lambda: compiled(logits, labels),
            "summing the fp32 logits": lambda: fp32.sum(),
        },
        targets={"fastpg with entropy": 1.4, "eager": 8, "torch.compile": 5,
                 "summing the fp32 logits": 0.4},
        device=device,
    )  # fmt: skip
    yield Case(
        "token_logprobs",
        f"forward + backward, {ROWS} x {VOCAB} {name}",
        gate(logits, labels),
        {
            "fastpg": training(token_logprobs, logits, labels),
            "eager": training(eager, logits, labels),
            "torch.compile": training(compiled, logits, labels),
            "cloning the logits": logits.clone,
        },
        targets={"eager": 6},
        device=device,
    )
