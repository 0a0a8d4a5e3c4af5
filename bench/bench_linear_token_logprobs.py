"""linear_token_logprobs against the logits kept, and against its own matrix products alone.

Forward and backward to hidden and weight; extra MiB does not count their gradients.
"""

import torch
from torch.nn.functional import linear

from fastpg import linear_token_logprobs, token_logprobs
from tests.inputs import head_and_labels

from ._timing import Case

CPU_SHAPES = [
    (rows, 896, 151936, dtype) for rows in (1024, 4096) for dtype in (torch.bfloat16, torch.float32)
]
CUDA_SHAPES = [(8192, 4096, 131072, torch.bfloat16)]


def eager(hidden, weight, labels):
    return linear(hidden, weight).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def training(function, hidden, weight, labels):
    """Forward and backward, with the gradients dropped as an optimiser step would."""
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    upstream = torch.ones_like(labels, dtype=torch.float32)
    return lambda: torch.autograd.grad(function(*leaves, labels), leaves, upstream)


def products(hidden, weight, logits_times):
    """The matrix products alone: logits, as often as they are made, and both gradients."""
    outs = [x.new_empty(x.shape) for x in (hidden, weight)]
    logits = hidden.new_empty(len(hidden), len(weight))

    def step():
        for _ in range(logits_times):
            torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=outs[0])
        torch.mm(logits.t(), hidden, out=outs[1])

    return step


def gate(hidden, weight, labels):
    """The log-probs of the model's own logits, and gradients as eager has them, of a few rows."""
    few = hidden[:16], weight, labels[:16]

    def check():
        want = token_logprobs(linear(*few[:2]), few[2])
        error = (linear_token_logprobs(*few) - want).abs().max().item()
        assert error < 2e-6 * (1 + want.abs().max()), f"log-prob off by {error}"
        pairs = zip(training(linear_token_logprobs, *few)(), training(eager, *few)(), strict=True)
        for got, want in pairs:
            error = (got - want).float().norm() / want.float().norm()
            assert error < (1e-2 if got.dtype is torch.bfloat16 else 1e-5), f"gradient: {error}"

    return check


def problem(rows, width, vocab, dtype, device):
    """hidden, weight, labels; what a case of them is called; and the MiB of their gradients."""
    with torch.device(device):
        hidden, weight, _, labels = head_and_labels((rows,), vocab, width, dtype)
    name = f"N={rows} H={width} V={vocab} {str(dtype).removeprefix('torch.')}"
    return (hidden, weight, labels), name, (hidden.nbytes + weight.nbytes) / 2**20


def cases(device):
    for shape in CUDA_SHAPES if device == "cuda" else CPU_SHAPES:
        inputs, name, gradients = problem(*shape, device)
        candidates = {
            "fastpg": training(linear_token_logprobs, *inputs),
            "eager": training(eager, *inputs),
        }
        targets = {"eager": ">= 0.95" if shape[3] is torch.bfloat16 else ">= 0.89"}
        if device == "cuda":  # where eager's log-softmax in fp32 would not fit beside the logits
            del candidates["eager"]
        if shape[0] != 4096:
            candidates["its four products"] = products(*inputs[:2], 2)
            targets["its four products"] = ">= 0.8"
        yield Case(
            "linear_token_logprobs",
            f"forward + backward, {name}",
            gate(*inputs),
            candidates,
            targets=targets,
            device=device,
            results_mib=gradients,
            least=2 if shape[0] == 4096 else 5,
            memory_target="<= eager / 15" if "eager" in candidates else "",
        )
