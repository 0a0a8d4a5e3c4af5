"""A label whose probability goes to 1: 1 - p keeps its digits, in the log-prob and its gradient."""

import math

import pytest
import torch

from fastpg import linear_token_logprobs, token_logprobs

OP = "token_logprobs"
MARGINS = [20.0, 40.0, 80.0]
TOLERANCE = 1e-6


def nearly_certain(margin, vocab, place, dtype=torch.float32):
    """Logits [1, V] whose label stands out by about the margin, and the label."""
    generator = torch.Generator().manual_seed(vocab + place)
    logits = torch.randn(1, vocab, generator=generator)
    label = torch.tensor([place % vocab])
    logits[0, label] = logits.max() + margin
    return logits.to(dtype), label


def one_minus_p(logits, label):
    """1 - p of the label by its definition, in fp64: the others' share."""
    z = logits.double()
    weight = (z - z.gather(-1, label[:, None])).exp()
    others = weight.scatter(-1, label[:, None], 0.0).sum(-1)
    return others / (1 + others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("vocab, place", [(2, 1), (100, 0), (100, 99), (9000, 8192), (20000, 70)])
def test_one_minus_p_keeps_its_digits(kernel, margin, vocab, place, dtype):
    logits, label = nearly_certain(margin, vocab, place, dtype)
    x = logits.requires_grad_()
    logp = token_logprobs(x, label)
    want = one_minus_p(logits, label)
    torch.testing.assert_close(-torch.expm1(logp.double()), want, rtol=TOLERANCE, atol=0)
    logp.sum().backward()
    slope = x.grad.gather(-1, label[:, None])[:, 0].double()
    rounding = 2**-7 if dtype is torch.bfloat16 else 2 * TOLERANCE
    torch.testing.assert_close(slope, want, rtol=rounding, atol=0)


@pytest.mark.parametrize("margin", MARGINS)
def test_the_entropy_keeps_its_digits(kernel, margin):
    logits, label = nearly_certain(margin, 9000, 8500)
    p = (logits.double() - logits.double().max()).exp()
    others = p.scatter(-1, label[:, None], 0.0)
    d = torch.where(others > 0, others.log(), 0.0)
    want = others.sum(-1).log1p() - (others * d).sum(-1) / (1 + others.sum(-1))
    _, entropy = token_logprobs(logits, label, return_entropy=True)
    torch.testing.assert_close(entropy.double(), want, rtol=5e-6, atol=0)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("label", [3, 8190, 9999])
def test_one_minus_p_keeps_its_digits_from_hidden_states(margin, label):
    """The label's tile is one of several: the others' tiles must not be rounded away."""
    weight = torch.zeros(10000, 4)
    weight[:, 0] = torch.linspace(-1, 1, 10000)
    weight[label, 0] = 1 + margin
    hidden = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    logits = (hidden @ weight.t()).double()
    want = one_minus_p(logits, torch.tensor([label]))
    logp = linear_token_logprobs(hidden, weight, torch.tensor([label]))
    torch.testing.assert_close(-torch.expm1(logp.double()), want, rtol=TOLERANCE, atol=0)


def test_a_tie_for_the_maximum_is_no_certainty(kernel):
    logits = torch.tensor([[5.0, 5.0, -math.inf]])
    logp = token_logprobs(logits, torch.tensor([1]))
    torch.testing.assert_close(logp, torch.tensor([-math.log(2)]), rtol=1e-7, atol=0)


@pytest.mark.parametrize("frozen", [False, True])
def test_one_minus_p_keeps_its_digits_under_softcap_from_hidden_states(frozen):
    """The label's logit and the maximum of its row must be the same number to the last bit."""
    hidden = torch.linspace(15, 40, 64)[:, None].requires_grad_()
    weight = torch.tensor([[1.0], [0.0], [-0.1]], requires_grad=not frozen)
    labels = torch.zeros(64, dtype=torch.int64)
    logp = linear_token_logprobs(hidden, weight, labels, softcap=30.0)
    x64 = hidden.detach().double().requires_grad_()
    capped = 30 * torch.tanh(x64 @ weight.detach().double().t() / 30)
    want = -(capped[:, 1:] - capped[:, :1]).exp().sum(-1).log1p()
    torch.testing.assert_close(logp.double(), want, rtol=2e-5, atol=0)
    (slope,) = torch.autograd.grad(logp.sum(), hidden)
    (expected,) = torch.autograd.grad(want.sum(), x64)
    torch.testing.assert_close(slope.double(), expected, rtol=5e-4, atol=0)


@pytest.mark.parametrize("margin", MARGINS)
def test_one_minus_p_keeps_its_digits_over_a_kept_set(margin):
    logits = torch.tensor([[0.0, margin, -1.0, 99.0]], requires_grad=True)
    label, support = torch.tensor([1]), (torch.tensor([0, 1, 2]), torch.tensor([0, 3]))
    logp = token_logprobs(logits, label, support=support)
    want = one_minus_p(logits.detach()[:, :3], label)
    torch.testing.assert_close(-torch.expm1(logp.double()), want, rtol=TOLERANCE, atol=0)
    logp.sum().backward()
    torch.testing.assert_close(logits.grad[:, 1].double(), want, rtol=2 * TOLERANCE, atol=0)
    assert logits.grad[0, 3] == 0
