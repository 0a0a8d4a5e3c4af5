"""Logits that are a sum of products, as of a head with a LoRA adapter: (h, s h Aᵀ) and (W, B)."""

import pytest
import torch
from accuracy import leaves
from torch.nn.functional import linear

from bench.inputs import head_and_labels
from fastpg import linear_token_logprobs, linear_token_loss, token_logprobs
from fastpg.ops.vocabulary import head as head_module
from fastpg.ops.vocabulary import linear_token_loss as page

OP = "linear_rows"  # and linear_token_loss, which is made of it
RANK = 3


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that small problems take several in each direction."""
    monkeypatch.setattr(head_module, "WIDTH", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(head_module, "ROWS", {"cpu": 16, "cuda": 16})
    rows = {2: 16, 4: 8, 8: 4}
    monkeypatch.setattr(page, "CHUNK_ROWS", {"cpu": rows, "cuda": rows})


def problem(dtype):
    """hidden [40, 24], weight [150, 24], bias; a third of the labels is ignored."""
    *head, labels = head_and_labels((40,), 150, 24, dtype)
    labels[::3] = -100
    return leaves(*head), labels


def split(x):
    return x.split((x.shape[1] - RANK, RANK), 1)


def logprobs(hidden, weight, bias, labels):
    logp, entropy = linear_token_logprobs(hidden, weight, labels, bias=bias, return_entropy=True)
    return logp.sin().sum() + entropy.sum()


def loss(hidden, weight, bias, labels):
    def token_loss(logp, entropy, rows):
        return logp.sin().sum() + entropy.sum(), None

    return linear_token_loss(hidden, weight, labels, token_loss, bias=bias)[0]


@pytest.mark.parametrize("function", [logprobs, loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_add_up(kernel, function, dtype):
    """To that of their columns side by side, gradients too."""
    (hidden, weight, bias), labels = problem(dtype)
    results = []
    for inputs in ((hidden, weight), (split(hidden), split(weight))):
        value = function(*inputs, bias, labels)
        results.append([value, *torch.autograd.grad(value, (hidden, weight, bias))])
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        assert (got - want).norm() <= tolerance * want.norm()


def test_bf16_rounds_when_a_product_is_added(kernel):
    """To the bit: the first product and bias, rounded; and with the second one, rounded again."""
    if kernel == "cuda":
        pytest.skip("a GPU's BLAS may round a tile otherwise than the whole")
    (hidden, weight, bias), labels = problem(torch.bfloat16)
    h, w = split(hidden), split(weight)
    logits = torch.addmm(linear(h[0], w[0], bias), h[1], w[1].t())
    got = linear_token_logprobs(h, w, labels, bias=bias)
    want = token_logprobs(logits, labels)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    for other in (linear(hidden, weight, bias), linear(h[0], w[0], bias) + linear(h[1], w[1])):
        assert (token_logprobs(other, labels) - want).abs().max() > 1e-3


@pytest.mark.parametrize("function", [logprobs, loss])
def test_a_frozen_weight_costs_nothing(kernel, function, monkeypatch):
    """No product for its gradient: only that of the adapter is made."""
    if kernel == "reference":
        pytest.skip("the specification computes all")
    (hidden, weight, bias), labels = problem(torch.float32)
    want = torch.autograd.grad(function(hidden, weight, bias, labels), (hidden, weight))
    products, plain = [], head_module.product

    def counting(out, *args, **options):
        products.append(tuple(out.shape))
        plain(out, *args, **options)

    monkeypatch.setattr(head_module, "product", counting)
    frozen, adapter = (x.detach() for x in split(weight))
    adapter.requires_grad_()
    value = function(split(hidden), (frozen, adapter), bias, labels)
    got = torch.autograd.grad(value, (hidden, adapter))
    torch.testing.assert_close(got, (want[0], want[1][:, -RANK:]), rtol=0, atol=1e-5)
    assert (48, RANK) in products and (48, 24 - RANK) not in products


def test_compile():
    (hidden, weight, bias), labels = problem(torch.float32)

    def function(hidden, weight, bias):
        return logprobs(split(hidden), split(weight), bias, labels)

    inputs = hidden, weight, bias
    got = torch.compile(function, backend="aot_eager", fullgraph=True)(*inputs)
    want = function(*inputs)
    assert torch.equal(got, want)
    grads = (torch.autograd.grad(x, inputs) for x in (got, want))
    assert all(map(torch.equal, *grads))
