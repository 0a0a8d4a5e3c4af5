"""linear_token_logprobs against the logits kept, and against its own matrix products alone.

Forward and backward to hidden and weight; extra MiB does not count their gradients.
"""

import torch
from torch.nn.functional import linear

import fastpg
from fastpg import linear_token_logprobs, token_logprobs
from fastpg.bench.baselines import head_log_probs as eager
from fastpg.bench.baselines import log_probs as of_logits
from fastpg.bench.timing import Case

from .._example import Example
from ..inputs import head_and_labels
from .bench_token_logprobs import LABELS_A_ROW, STATISTICS, eager_of_labels

CPU_SHAPES = [
    (rows, 896, 151936, dtype) for rows in (1024, 4096) for dtype in (torch.bfloat16, torch.float32)
]
FROZEN_SHAPES = [(2048, 576, 49152, torch.float32), *CPU_SHAPES[:2]]
CUDA_SHAPES = [(8192, 4096, 131072, torch.bfloat16)]


def training(function, hidden, weight, labels):
    """Forward and backward, with the gradients dropped as an optimiser step would."""
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    upstream = torch.ones_like(labels, dtype=torch.float32)
    return lambda: torch.autograd.grad(function(*leaves, labels), leaves, upstream)


def with_a_frozen_head(function, hidden, weight, labels):
    """The same to hidden alone."""
    hidden = hidden.detach().requires_grad_()
    upstream = torch.ones_like(labels, dtype=torch.float32)
    return lambda: torch.autograd.grad(function(hidden, weight, labels), hidden, upstream)[0]


def by_two_passes(hidden, weight, labels):
    """The same log-probs; a call that returns the entropy makes no gradient in forward."""
    return linear_token_logprobs(hidden, weight, labels, return_entropy=True)[0]


def random_sets(rows, vocab, size, device):
    """Kept sets of one size, a label in each, and the mask [N, V] of what is left out."""
    ids = torch.rand(rows, vocab, device=device).topk(size).indices.sort().values
    left_out = torch.ones(rows, vocab, dtype=torch.bool, device=device).scatter_(1, ids, False)
    support = ids.view(-1), torch.arange(rows + 1, device=device) * size
    return support, ids[:, size // 2], left_out


def with_an_adapter(function, hidden, weight, labels, rank=16):
    """The same with LoRA, to hidden, A and B; weight is frozen."""
    a, b = hidden[:rank] / hidden.shape[1], weight[:, :rank]
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, a, b)]
    upstream = torch.ones_like(labels, dtype=torch.float32)

    def step():
        hidden, a, b = leaves
        value = function((hidden, linear(hidden, a)), (weight, b), labels)
        return torch.autograd.grad(value, leaves, upstream)

    return step


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
        yield whole_head(inputs, name, gradients, device, quick=shape[0] != 4096)
        if shape in (CPU_SHAPES[0], *CUDA_SHAPES):
            yield adapted_head(inputs, name, device)

    for shape in CUDA_SHAPES if device == "cuda" else FROZEN_SHAPES:
        inputs, name, gradients = problem(*shape, device)
        yield frozen_head(inputs, name, device)
        if shape[-1] is torch.float32:
            yield kept_sets(inputs, name, gradients, 32, device)
            yield kept_sets(inputs, name, gradients, 512, device)
            yield several_labels(inputs, name, gradients)


def frozen_head(inputs, name, device):
    functions = {"fastpg": linear_token_logprobs, "two passes": by_two_passes}

    def check():
        few = inputs[0][:16], inputs[1], inputs[2][:16]
        got, want = (with_a_frozen_head(f, *few)() for f in functions.values())
        error = (got - want).float().norm() / want.float().norm()
        assert error < (6e-3 if got.dtype is torch.bfloat16 else 1e-6), f"gradient: {error}"

    return Case(
        "linear_token_logprobs",
        f"forward + backward, frozen head, {name}",
        check,
        {key: with_a_frozen_head(function, *inputs) for key, function in functions.items()},
        targets={"two passes": ">= 1.43"},
        device=device,
        results_mib=inputs[0].nbytes / 2**20,
        least=3,
    )


def kept_sets(inputs, name, gradients, size, device):
    hidden, weight, _ = inputs
    support, labels, left_out = random_sets(len(hidden), len(weight), size, device)

    def ours(hidden, weight, labels):
        return linear_token_logprobs(hidden, weight, labels, support=support)

    def with_a_mask(hidden, weight, labels):
        return token_logprobs(linear(hidden, weight).masked_fill(left_out, -torch.inf), labels)

    functions = {"fastpg": ours, "all logits with a mask": with_a_mask}
    steps = {key: training(function, hidden, weight, labels) for key, function in functions.items()}

    def check():
        for got, want in zip(*(step() for step in steps.values()), strict=True):
            error = (got - want).float().norm() / want.float().norm()
            assert error < 1e-5, f"gradient: {error}"

    return Case(
        "linear_token_logprobs",
        f"forward + backward, sets of {size} tokens, {name}",
        check,
        steps,
        targets={"all logits with a mask": ">= 20" if size == 32 else ">= 8"},
        device=device,
        results_mib=gradients,
        least=3,
    )


def several_labels(inputs, name, gradients):
    hidden, weight, label = inputs
    more = torch.randint(len(weight), (len(hidden), LABELS_A_ROW - 1), device=hidden.device)
    labels = torch.cat([label[:, None], more], 1)

    def eager_of_all(hidden, weight, labels):
        return eager_of_labels(linear(hidden, weight), labels)

    def check():
        few = hidden[:16], weight, labels[:16]
        ours, others = (training(f, *few)() for f in (linear_token_logprobs, eager_of_all))
        for got, want in zip(ours, others, strict=True):
            error = (got - want).norm() / want.norm()
            assert error < 1e-5, f"gradient: {error}"

    return Case(
        "linear_token_logprobs",
        f"forward + backward, {LABELS_A_ROW} labels a row, {name}",
        check,
        {
            "fastpg": training(linear_token_logprobs, hidden, weight, labels),
            "one label a row": training(linear_token_logprobs, hidden, weight, label),
            "eager": training(eager_of_all, hidden, weight, labels),
        },
        targets={"one label a row": ">= 0.8"},
        results_mib=gradients,
        least=3,
    )


def whole_head(inputs, name, gradients, device, quick):
    candidates = {"fastpg": training(linear_token_logprobs, *inputs)}
    targets = {"eager": ">= 0.95" if inputs[0].dtype is torch.bfloat16 else ">= 0.89"}
    if device == "cpu":  # a GPU has no room for eager's log-softmax in fp32 beside the logits
        candidates["eager"] = training(eager, *inputs)
    if quick:
        candidates["its four products"] = products(*inputs[:2], 2)
        targets |= {"its four products": ">= 0.8"} if device == "cuda" else {}
    return Case(
        "linear_token_logprobs",
        f"forward + backward, {name}",
        gate(*inputs),
        candidates,
        targets=targets,
        device=device,
        results_mib=gradients,
        least=5 if quick else 2,
        memory_target="<= eager / 15" if "eager" in candidates else "",
    )


def adapted_head(inputs, name, device):
    def side_by_side(hidden, weight, labels):
        return linear_token_logprobs(torch.cat(hidden, -1), torch.cat(weight, -1), labels)

    def by_layers(hidden, weight, labels):
        return of_logits(sum(map(linear, hidden, weight)), labels)

    def check():
        few = inputs[0][:16], inputs[1], inputs[2][:16]
        ours, others = (with_an_adapter(f, *few)() for f in (linear_token_logprobs, by_layers))
        for got, want in zip(ours, others, strict=True):
            error = (got - want).float().norm() / want.float().norm()
            assert error < 1e-2, f"gradient: {error}"

    functions = {"fastpg": linear_token_logprobs, "its columns side by side": side_by_side}
    functions |= {"eager": by_layers} if device == "cpu" else {}
    return Case(
        "linear_token_logprobs",
        f"forward + backward, LoRA of rank 16 on a frozen head, {name}",
        check,
        {key: with_an_adapter(function, *inputs) for key, function in functions.items()},
        device=device,
        results_mib=inputs[0].nbytes / 2**20,
    )


def examples(device):
    """Small calls of the op."""
    hidden, head_weight = torch.randn(3, 4, device=device), torch.randn(33, 4, device=device)
    labels = torch.tensor([0, 5, 32], device=device)
    yield Example(
        fastpg.linear_token_logprobs,
        {"hidden": hidden, "weight": head_weight, "labels": labels, "bias": head_weight[:, 0]},
        differentiable=("hidden", "weight", "bias"),
    )
    yield Example(
        fastpg.linear_token_logprobs,
        {"hidden": hidden, "weight": head_weight, "labels": labels},
        differentiable=("hidden",),
        variant="frozen head",
    )
    kept = torch.tensor([0, 4, 32, 1, 5], device=device), torch.tensor([0, 3, 5, 5], device=device)
    yield Example(
        fastpg.linear_token_logprobs,
        {"hidden": hidden, "weight": head_weight, "labels": labels, "support": kept},
        differentiable=("hidden", "weight"),
        variant="kept sets",
    )
    statistics = {"return_entropy": True, "row_statistics": STATISTICS}
    yield Example(
        fastpg.linear_token_logprobs,
        {"hidden": hidden, "weight": head_weight, "labels": labels, **statistics},
        differentiable=("hidden", "weight"),
        variant="row statistics",
    )
    several = torch.tensor([[0, 1, 0], [5, -100, 7], [32, 31, 30]], device=device)
    yield Example(
        fastpg.linear_token_logprobs,
        {"hidden": hidden, "weight": head_weight, "labels": several, "softcap": 5.0},
        differentiable=("hidden", "weight"),
        variant="several labels",
    )
