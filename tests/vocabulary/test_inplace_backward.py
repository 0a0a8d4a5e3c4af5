"""token_logprobs(inplace_backward=True): the gradient lies where the logits lay, or it raises."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from bench.inputs import logits_and_labels
from fastpg import token_logprobs

OP = "token_logprobs"
CHANGED = "modified by an inplace operation"


def gradient(logits, labels, *, inplace, softcap=None):
    """The gradient by the tensor that the logits are made from, of log-probs and entropies."""
    source = logits.clone().requires_grad_()
    logp, entropy = token_logprobs(
        source * 1, labels, softcap=softcap, return_entropy=True, inplace_backward=inplace
    )
    weight = torch.linspace(-1, 1, logp.numel(), dtype=logp.dtype).view(logp.shape)
    return torch.autograd.grad((logp * weight + entropy).sum(), source)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_in_place_is_out_of_place(kernel, dtype, softcap):
    logits, labels = logits_and_labels((3, 2), 150, dtype)
    labels[1, 1] = -100
    ours = gradient(logits, labels, inplace=True, softcap=softcap)
    assert torch.equal(ours, gradient(logits, labels, inplace=False, softcap=softcap))


def test_the_gradient_lies_where_the_logits_lay(kernel):
    source, labels = logits_and_labels((4,), 200)
    logits, seen = source.requires_grad_() * 1, []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    token_logprobs(logits, labels, inplace_backward=True).sum().backward()
    assert seen == [logits.data_ptr()]


def test_a_second_backward_raises(kernel):
    source, labels = logits_and_labels((4,), 50)
    loss = token_logprobs(source.requires_grad_() * 1, labels, inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=CHANGED):
        loss.backward()


def test_whoever_needs_the_logits_later_raises(kernel):
    """Whoever made them from their own values, as tanh does, needs them later too."""
    source, labels = logits_and_labels((4,), 50)
    logits = source.requires_grad_() * 1
    square = logits.square().sum()  # its backward reads the logits
    token_logprobs(logits, labels, inplace_backward=True).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=CHANGED):
        square.backward()
    with pytest.raises(RuntimeError, match=CHANGED):
        token_logprobs(source.tanh(), labels, inplace_backward=True).sum().backward()


def test_a_use_that_needs_no_logits_adds_its_gradient(kernel):
    logits, labels = logits_and_labels((4,), 50)
    grads = []
    for inplace in (False, True):
        source = logits.clone().requires_grad_()
        x = source * 1
        loss = token_logprobs(x, labels, inplace_backward=inplace).sum() + 3 * x.mean()
        grads.append(torch.autograd.grad(loss, source)[0])
    assert torch.equal(*grads)


def test_logits_that_want_no_gradient_stay(kernel):
    logits, labels = logits_and_labels((4,), 50)
    before = logits.clone()
    token_logprobs(logits, labels, inplace_backward=True)
    with torch.no_grad():
        token_logprobs(logits.requires_grad_(), labels, inplace_backward=True)
    assert torch.equal(logits, before)


def squares_and_logprobs(source, labels, inplace):
    logits = source * 1
    return logits.square().sum() + token_logprobs(logits, labels, inplace_backward=inplace).sum()


@pytest.mark.parametrize("where", ["checkpoint", "identity hooks", "copying hooks"])
def test_logits_stay_where_torch_cannot_tell_who_needs_them(where):
    source, labels = logits_and_labels((3, 2), 50)
    source.requires_grad_()
    if where == "checkpoint":
        loss = checkpoint(squares_and_logprobs, source, labels, True, use_reentrant=False)
    else:
        pack = torch.clone if where == "copying hooks" else lambda x: x
        with saved_tensors_hooks(pack, lambda x: x):
            loss = squares_and_logprobs(source, labels, True)
    ours = torch.autograd.grad(loss, source)[0]
    expected = torch.autograd.grad(squares_and_logprobs(source, labels, False), source)[0]
    assert torch.equal(ours, expected)


def test_compile(compiler):
    logits, labels = logits_and_labels((3, 2), 150)
    compiled = torch.compile(gradient, backend=compiler, fullgraph=False)
    expected = gradient(logits, labels, inplace=False)
    torch.testing.assert_close(compiled(logits, labels, inplace=True), expected)


LEAF = torch.zeros(2, 6, requires_grad=True)
BAD = [
    (LEAF, "inplace_backward=True would overwrite logits that are a leaf of the graph"),
    (
        torch.zeros(2, 6).view(2, 6).requires_grad_(),
        "inplace_backward=True would overwrite logits that are a leaf of the graph",
    ),
    (LEAF.view(2, 6), "inplace_backward=True would overwrite logits that are a leaf of the graph"),
    (
        (LEAF * 1)[:, ::2],
        r"inplace_backward=True needs contiguous logits, got \(2, 3\) by \(6, 2\)",
    ),
    (
        (LEAF * 1)[:1].expand(2, 6),
        r"inplace_backward=True needs contiguous logits, got \(2, 6\) by \(0, 1\)",
    ),
]


@pytest.mark.parametrize(
    ("logits", "message"),
    BAD,
    ids=["leaf", "leaf that is a view", "view of a leaf", "strided", "expanded"],
)
def test_logits_that_cannot_be_overwritten_raise(logits, message):
    with pytest.raises(ValueError, match=f"^token_logprobs: {message}"):
        token_logprobs(logits, torch.tensor([0, 1]), inplace_backward=True)
