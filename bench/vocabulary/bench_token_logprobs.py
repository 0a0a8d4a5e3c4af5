"""token_logprobs against PyTorch, and against what it costs to read and copy the logits.

On the CPU 256 rows of V=151936; on a GPU more, of other widths and types too.
"""

import itertools

import torch

import fastpg
from fastpg import token_logprobs
from fastpg.bench.baselines import log_probs as eager
from fastpg.bench.baselines import log_probs_and_entropy as eager_with_entropy
from fastpg.bench.timing import Case

from .._example import Example
from .._variant import OPTIONS, VOCABULARY_TYPES, Variant, features_of_rows
from ..inputs import logits_and_labels

ROWS, VOCAB = 256, 151936
STATISTICS = ("sum_p_squared", "is_top1", "mean_logit")


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
    if device == "cuda":
        for rows, vocab, dtype in CUDA_SHAPES:
            yield from on_cuda(rows, vocab, dtype)
    else:
        for dtype in (torch.float32, torch.bfloat16):
            yield from of_dtype(dtype, device)
            yield from of_several_labels(2048, 49152, dtype)
        yield in_place(*logits_and_labels(ROWS, VOCAB, torch.float32))


CUDA_SHAPES = [
    (8192, 151936, torch.bfloat16),
    (512, 151936, torch.bfloat16),
    *((4096, vocab, torch.float32) for vocab in (32000, 128256, 262144)),
]


def on_cuda(rows, vocab, dtype):
    """Targets: 0.9 of the bandwidth forward (0.8 off the first shape); 1.12 of three passes."""
    with torch.device("cuda"):
        logits, labels = logits_and_labels(rows, vocab, dtype)
    right = gate(logits[:64], labels[:64])
    words, copy = logits.view(torch.float32), torch.empty_like(logits)
    compiled, compiled_both = torch.compile(eager), torch.compile(eager_with_entropy)
    few, few_labels = logits[: rows // 4], labels[: rows // 4]  # eager holds several fp32 copies
    name = f"{rows} x {vocab} {str(dtype).removeprefix('torch.')}"
    yield Case(
        "token_logprobs",
        f"forward, {name}",
        right,
        {
            "fastpg with entropy": lambda: token_logprobs(logits, labels, return_entropy=True),
            "fastpg": lambda: token_logprobs(logits, labels),
            "torch.compile with entropy": lambda: compiled_both(logits, labels),
            "torch.compile": lambda: compiled(logits, labels),
            "eager, a quarter of the rows": lambda: eager(few, few_labels),
            "summing the logits as fp32 words": words.sum,
        },
        ours="fastpg with entropy",
        targets={"summing the logits as fp32 words": ">= 0.9" if rows == 8192 else ">= 0.8"},
        device="cuda",
    )
    yield Case(
        "token_logprobs",
        f"forward + backward, {name}",
        right,
        {
            "fastpg": training(token_logprobs, logits, labels),
            "torch.compile": training(compiled, logits, labels),
            "eager, a quarter of the rows": training(eager, few, few_labels),
            "summing and copying the logits": lambda: (words.sum(), copy.copy_(logits)),
        },
        targets={"summing and copying the logits": ">= 0.89"},
        device="cuda",
    )


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
        targets={"fastpg with entropy": "<= 1.4", "eager": ">= 8", "torch.compile": ">= 5",
                 "summing the fp32 logits": ">= 0.4"},
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
        targets={"eager": ">= 6"},
        device=device,
    )


def in_place(logits, labels):
    """The gradient over the logits, which here are a copy, as a head's output is of nothing else's.

    Extra MiB are of the copy too: half of what is out of place.
    """

    def of_copy(inplace):
        def logp(x, labels):
            return token_logprobs(x.clone(), labels, inplace_backward=inplace)

        return logp

    def gradient(inplace):
        x = logits[:8].detach().requires_grad_()
        return torch.autograd.grad(of_copy(inplace)(x, labels[:8]).sum(), x)[0]

    def check():
        assert torch.equal(gradient(True), gradient(False)), "the gradients differ"

    return Case(
        "token_logprobs",
        f"inplace_backward, forward + backward of a copy, {ROWS} x {VOCAB} float32",
        check,
        {
            "fastpg": training(of_copy(True), logits, labels),
            "out of place": training(of_copy(False), logits, labels),
        },
        memory_target="<= out of place * 0.55",
    )


LABELS_A_ROW = 64


def gate_of_labels(logits, labels):
    def check():
        want = eager_of_labels(logits[:64].double(), labels[:64])
        error = (token_logprobs(logits[:64], labels[:64]) - want).abs().max().item()
        assert error < 2e-6 * (1 + want.abs().max()), f"log-prob off by {error}"

    return check


def eager_of_labels(logits, labels):
    return logits.float().log_softmax(-1).gather(-1, labels)


def of_several_labels(rows, vocab, dtype):
    """K labels of each row beside one of them, and row statistics beside none."""
    logits, label = logits_and_labels(rows, vocab, dtype)
    labels = torch.cat([label[:, None], torch.randint(vocab, (rows, LABELS_A_ROW - 1))], 1)
    name = f"{rows} x {vocab} {str(dtype).removeprefix('torch.')}"
    right = gate_of_labels(logits, labels)
    yield Case(
        "token_logprobs",
        f"{LABELS_A_ROW} labels a row, forward, {name}",
        right,
        {
            "fastpg": lambda: token_logprobs(logits, labels),
            "one label a row": lambda: token_logprobs(logits, label),
            "eager": lambda: eager_of_labels(logits, labels),
        },
        targets={"one label a row": ">= 0.8"},
    )
    yield Case(
        "token_logprobs",
        f"{LABELS_A_ROW} labels a row, forward + backward, {name}",
        right,
        {
            "fastpg": training(token_logprobs, logits, labels),
            "one label a row": training(token_logprobs, logits, label),
            "eager": training(eager_of_labels, logits, labels),
        },
        targets={"one label a row": ">= 0.8"},
    )
    yield Case(
        "token_logprobs",
        f"row statistics, forward, {name}",
        right,
        {
            "fastpg": lambda: with_statistics(logits, label),
            "without statistics": lambda: token_logprobs(logits, label, return_entropy=True),
            "eager": lambda: eager_statistics(logits, label),
        },
    )


def with_statistics(logits, labels):
    return token_logprobs(logits, labels, return_entropy=True, row_statistics=STATISTICS)


def eager_statistics(logits, labels):
    z = logits.float()
    logp = z.log_softmax(-1)
    p = logp.exp()
    entropy, is_top1 = -(p * logp).sum(-1), logits.argmax(-1) == labels
    return logp.gather(-1, labels[:, None]), entropy, p.square().sum(-1), is_top1, z.mean(-1)


def examples(device):
    """Small calls of the op."""
    logits, labels = torch.randn(3, 33, device=device), torch.tensor([0, 5, 32], device=device)
    arguments = {"logits": logits, "labels": labels}
    yield Example(
        fastpg.token_logprobs,
        arguments,
        differentiable=("logits",),
        forward_launches=3,
        backward_launches=1,
    )
    yield Example(
        fastpg.token_logprobs,
        arguments | {"temperature": 0.7, "softcap": 5.0, "return_entropy": True},
        differentiable=("logits",),
        variant="every option",
    )
    kept = torch.tensor([0, 4, 32, 1, 5], device=device), torch.tensor([0, 3, 5, 5], device=device)
    yield Example(
        fastpg.token_logprobs,
        arguments | {"support": kept},
        differentiable=("logits",),
        variant="kept sets",
    )
    yield Example(
        fastpg.token_logprobs,
        arguments | {"return_entropy": True, "row_statistics": STATISTICS},
        differentiable=("logits",),
        forward_launches=3,
        backward_launches=1,
        variant="row statistics",
    )
    several = torch.tensor([[0, 1, 0], [5, -100, 7], [32, 31, 30]], device=device)
    yield Example(
        fastpg.token_logprobs,
        arguments | {"labels": several, "return_entropy": True, "softcap": 5.0},
        differentiable=("logits",),
        variant="several labels",
    )


def variants(few, capability):
    """What a GPU may be asked to compile."""
    from fastpg.ops.vocabulary import token_logprobs_triton as page
    from fastpg.ops.vocabulary.row_statistics_triton import statistics_kernel

    kernels = page.forward_kernel, page.backward_kernel, statistics_kernel
    for features, kernel in itertools.product(features_of_rows(few, capability), kernels):
        constants = page.constants(forward=kernel is not page.backward_kernel, **features)
        options = {name: constants.pop(name) for name in OPTIONS if name in constants}
        tensors = {"labels": "i64", "flag": "i64", "stats": "fp32", "is_top1": "i8"}
        tensors |= dict.fromkeys(("logits", "out"), VOCABULARY_TYPES[features["dtype"]])
        aligned = [n for n in ("logits", "out") if features["aligned"] and n in kernel.arg_names]
        yield Variant(
            kernel, "fp32", constants, options, tensors, tuple(aligned), features["vocab"]
        )
