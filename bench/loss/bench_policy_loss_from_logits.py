"""policy_loss_from_logits against the two ops and eager, forward + backward: PPO's loss.

In place, the logits hold their gradient after a call, and the next call takes that for its logits.
"""

import torch

import fastpg
from fastpg import policy_loss, policy_loss_from_logits, token_logprobs
from fastpg.bench.timing import Case

from .._example import Example
from .._variant import OPTIONS, VOCABULARY_TYPES, Variant, features_of_rows
from ..inputs import logits_and_labels
from ..vocabulary import bench_token_logprobs
from . import bench_policy_loss

ROWS, VOCAB, CUDA_ROWS = 256, 151936, 8192


def eager(logits, labels, *tokens):
    return bench_policy_loss.eager(bench_token_logprobs.eager(logits, labels), *tokens)


def two_ops(logits, labels, advantages, weight, old_logp):
    return policy_loss(token_logprobs(logits, labels), advantages, weight, old_logp=old_logp)[0]


def fused(logits, labels, advantages, weight, old_logp, inplace=False):
    args = logits, labels, advantages, weight
    return policy_loss_from_logits(*args, old_logp=old_logp, inplace=inplace)[0]


def training(function, logits, *args):
    x = logits.detach().requires_grad_()
    return lambda: torch.autograd.grad(function(x, *args), x)


def in_place(logits, *args):
    x = logits.clone().requires_grad_()
    return lambda: torch.autograd.grad(fused(_not_a_leaf(x), *args, inplace=True), x)


class _NotALeaf(torch.autograd.Function):
    """The same memory, as an output of the graph."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


_not_a_leaf = _NotALeaf.apply


def gate(*inputs):
    def check():
        few = [x[:32] for x in inputs]
        got, want = (training(f, *few)()[0].double() for f in (fused, two_ops))
        assert torch.equal(got, want) or (got - want).norm() < 1e-5 * want.norm(), "gradient"

    return check


def case(rows, dtype, device):
    with torch.device(device):
        logits, labels = logits_and_labels(rows, VOCAB, dtype)
        noise, weight = torch.randn(2, rows), torch.full((rows,), 1 / rows)
    inputs = logits, labels, noise[0], weight, token_logprobs(logits, labels) + 0.1 * noise[1]
    candidates = {
        "fastpg": training(fused, *inputs),
        "fastpg, in place": in_place(*inputs),
        "token_logprobs and policy_loss": training(two_ops, *inputs),
    }
    if device == "cuda":
        copy = torch.empty_like(logits)
        candidates["copying the logits"] = lambda: copy.copy_(logits)
    else:
        candidates["eager"] = training(eager, *inputs)
    return Case(
        "policy_loss_from_logits",
        f"forward + backward, {rows} x {VOCAB} {str(dtype).removeprefix('torch.')}",
        gate(*inputs),
        candidates,
        targets={"token_logprobs and policy_loss": "> 1", "copying the logits": ">= 0.83"},
        device=device,
    )


def cases(device):
    if device == "cuda":
        yield case(CUDA_ROWS, torch.bfloat16, device)
    else:
        for dtype in (torch.float32, torch.bfloat16):
            yield case(ROWS, dtype, device)


def examples(device):
    """Small calls of the op."""
    advantages, weight, old_logp = torch.randn(3, 3, device=device).unbind()
    yield Example(
        fastpg.policy_loss_from_logits,
        {
            "logits": torch.randn(3, 36, device=device),  # whole vectors
            "labels": torch.tensor([0, 5, 32], device=device),
            "advantages": advantages,
            "weight": weight,
            "old_logp": old_logp,
        },
        differentiable=("logits",),
        forward_launches=5,
        backward_launches=1,
    )


def variants(few, capability):
    """With all that is optional where there is entropy, else without; and every surrogate so."""
    from fastpg.ops.loss import policy_loss_from_logits_triton as page

    absent = dict.fromkeys(("old_logp", "ref_logp", "traced_options", "entropy"))
    losses = [{"SURROGATE": kind, "KL": "k3"} for kind in ("sapo", "ppo", "cispo", "reinforce")]
    dtypes = list(VOCABULARY_TYPES)[:2]
    for features in features_of_rows(few, capability, dtypes):
        if features["vocab"] % 8:
            continue  # the two ops serve rows that are no whole vectors
        constants = page.constants(**features)
        options = {name: constants.pop(name) for name in OPTIONS}
        types = dict.fromkeys(("logits", "out"), VOCABULARY_TYPES[features["dtype"]])
        types |= {"labels": "i64", "flag": "i64"}
        given = {} if features["entropy"] else absent
        plain = features["aligned"] and not (features["entropy"] or features["softcap"])
        for loss in losses if plain and not few else losses[:1]:
            yield Variant(
                page.rows_kernel,
                "fp32",
                given | loss | constants,
                options,
                pointers=types,
                aligned=("logits", "out") if features["aligned"] else (),
                vocab=features["vocab"],
            )
    for dtype in ("fp64",) if few else ("fp64", "fp32", "bf16"):
        factor = {"factor": "fp64" if dtype == "fp64" else "fp32"}
        yield Variant(page.scale_kernel, dtype, {}, pointers=factor)
