"""token_logprobs at the edges of slices, tiles and vectors, and where a stored value is a tie."""

import importlib
import math

import pytest
import torch
from accuracy import GRADIENT_TOLERANCE, TOLERANCE, assert_no_worse, leaves

from bench.inputs import logits_and_labels
from fastpg import token_logprobs
from fastpg.ops.vocabulary import token_logprobs as page

OP = "token_logprobs"

GPU = torch.cuda.is_available()

# The first and the last tokens of vectors, tiles and slices: powers of two, and one less.
PLACES = [0, *(2**i - last for i in range(6, 16) for last in (1, 0))]


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """Lets a short row take several tiles and slices in Triton's interpreter, which is slow."""
    if "kernel" in request.fixturenames and request.getfixturevalue("kernel") == "triton":
        module = importlib.import_module("fastpg.ops.vocabulary.token_logprobs_triton")
        tiles = module.Tiles(warps=1, vectors=2, blocks=4)
        monkeypatch.setattr(module, "TABLE", {(0, 0): tiles})


def by_torch(logits, labels):
    logp = logits.log_softmax(-1)
    return logp.gather(-1, labels[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def check(logits, labels):
    """Compares values and gradients with torch's."""
    (x,), (x64,), (native,) = leaves(logits), leaves(logits.double()), leaves(logits)
    ours = token_logprobs(x, labels, return_entropy=True)
    oracle, torchs = by_torch(x64, labels), by_torch(native.float(), labels)
    for got, want, baseline in zip(ours, oracle, torchs, strict=True):
        assert_no_worse(got, baseline, want, TOLERANCE[logits.dtype])
    for logp, entropy in (ours, oracle, torchs):
        (logp.double().sum() + entropy.double().sum()).backward()
    assert_no_worse(x.grad, native.grad, x64.grad, GRADIENT_TOLERANCE[logits.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [511, 512, 513, 1100, 8191, 16384, 33000])
def test_the_likeliest_token_counts_wherever_it_is(kernel, vocab, dtype):
    """A label, and the only likely token of its row, at every edge: one that is missed shows."""
    if kernel == "triton" and not GPU and vocab > 1100:
        pytest.skip("the interpreter is slow")
    places = torch.tensor([place for place in (*PLACES, vocab - 1) if place < vocab])
    logits, _ = logits_and_labels(len(places), vocab, dtype)
    rows = torch.arange(len(places))
    logits[rows, places] = 16.0
    check(logits, places)
    check(logits, (places + 1) % vocab)  # the label is another token, beyond the edge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_label_at_an_edge_is_in_one_slice_alone(kernel, dtype):
    """Where the gradient lies over the logits: the slice before must not write into the next."""
    vocab = 700 if kernel == "triton" and not GPU else 17000
    labels = torch.tensor([place for place in (*PLACES, vocab - 1) if place < vocab])
    logits, _ = logits_and_labels(len(labels), vocab, dtype)
    temperature = torch.tensor(0.7)
    x = page.Inputs(logits, labels, temperature, 0.0, -100, True)
    _, entropy, stats = page.token_logprobs_op(x)
    grad_logp, grad_entropy = torch.randn(2, len(labels))
    gradient = page.BackwardInputs(x, grad_logp, grad_entropy, entropy, stats)
    want = page.token_logprobs_backward_op(gradient).grad_logits
    page.token_logprobs_backward_out_op(page.BackwardOutInputs(gradient, logits))
    assert torch.equal(logits, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tie_of_the_gradient_is_rounded_to_even(kernel, dtype):
    """Every store of 16 bits: by vectors, in the rest of a row, and at the label."""
    if kernel == "triton" and not GPU:
        pytest.skip("Triton's interpreter truncates")
    half = torch.finfo(dtype).eps / 2
    ties = torch.tensor([1 + half, 1 + 3 * half, 1.5 + half, 2 + 6 * half, 1 + 0.99 * half])
    tiny = torch.finfo(dtype).smallest_normal * half * torch.tensor([1.0, 3.0, 5.0])
    upstream = torch.cat([ties, -ties, tiny, -tiny])
    for top, label in ((3, 7), (129, 3), (3, 129)):
        logits = torch.full((len(upstream), 130), -200.0, dtype=dtype)
        logits[:, top] = 0  # its probability is 1, and that of the label is 0
        (x,) = leaves(logits)
        logp = token_logprobs(x, torch.full((len(upstream),), label))
        logp.backward(upstream)
        assert torch.equal(x.grad[:, label], upstream.to(dtype))
        assert torch.equal(x.grad[:, top], (-upstream).to(dtype))
        assert x.grad.count_nonzero() <= 2 * len(upstream)


def test_a_temperature_of_its_own_serves_each_row(kernel):
    """Also where rows are read by two strides, and the temperature by none."""
    logits, labels = logits_and_labels((3, 4), 50)
    temperature = torch.linspace(0.5, 2.0, 12).view(3, 4)
    got = token_logprobs(logits.transpose(0, 1), labels.t(), temperature=temperature.t())
    want = by_torch(logits.double() / temperature.double()[..., None], labels)[0]
    torch.testing.assert_close(got.double(), want.t(), rtol=0, atol=math.sqrt(2) * 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [136, 129])  # whole vectors, and not
def test_bits_do_not_depend_on_where_a_row_begins(kernel, vocab, dtype):
    if kernel == "reference":
        pytest.skip("the reference computes as torch does")
    logits, labels = logits_and_labels(3, vocab, dtype)
    results = []
    for begin in (0, 1, 3):
        x = torch.empty(3 * vocab + begin, dtype=dtype)[begin:].view(3, vocab)
        x = x.copy_(logits).requires_grad_()
        logp, entropy = token_logprobs(x, labels, return_entropy=True)
        (grad,) = torch.autograd.grad(logp.sum() + entropy.sum(), x)
        results.append(torch.cat([logp.detach(), entropy.detach(), grad.float().flatten()]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_the_entropy_alone_has_a_gradient(kernel):
    logits, labels = logits_and_labels(3, 40)
    (x,), (x64,) = leaves(logits), leaves(logits.double())
    token_logprobs(x, labels, return_entropy=True)[1].sum().backward()
    by_torch(x64, labels)[1].sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [5, 70])  # few are split by slices, many by rows
def test_each_row_has_its_own_temperature(kernel, rows):
    logits, labels = logits_and_labels(rows, 40)
    temperature = torch.linspace(0.5, 3, rows)
    (x64,) = leaves(logits.double())
    (x,) = leaves(logits)
    ours = token_logprobs(x, labels, temperature=temperature)
    want, _ = by_torch(x64 / temperature.double()[:, None], labels)
    torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-6)
    ours.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-6)
