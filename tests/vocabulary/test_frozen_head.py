"""A head that needs no gradient: that of hidden is made with the log-probs, in the same pass."""

import math
from contextlib import nullcontext

import pytest
import torch
from accuracy import leaves
from registration import check_registration

from bench.inputs import head_and_labels
from fastpg import linear_token_logprobs
from fastpg.ops.vocabulary import frozen_head as page
from fastpg.ops.vocabulary import head as head_module
from fastpg.ops.vocabulary import linear_rows

OP = "frozen_head"
TUNED = {"temperature": 0.7, "softcap": 20.0, "logit_scale": 0.5}

# Of a gradient against that of two passes, relative in norm: the tolerance that is promised.
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 6e-3, torch.float64: 1e-14}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that small problems take several in each direction."""
    monkeypatch.setattr(head_module, "WIDTH", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(head_module, "ROWS", {"cpu": 16, "cuda": 16})


@pytest.fixture
def counted(monkeypatch):
    """The shape of each matrix product."""
    shapes, plain = [], head_module.product

    def counting(out, a, b, **options):
        shapes.append(tuple(out.shape))
        plain(out, a, b, **options)

    monkeypatch.setattr(head_module, "product", counting)
    monkeypatch.setattr("fastpg.ops.vocabulary.frozen_head_blas.product", counting)
    return shapes


def by_one_pass(hidden, weight, bias, labels, **options):
    """The log-probs, and the gradient of hidden for incoming gradients of both signs, and 0."""
    hidden = [x.detach().requires_grad_() for x in hidden]
    logp = linear_token_logprobs(hidden, weight, labels, bias=bias, **options)
    upstream = torch.linspace(-1, 2, logp.numel(), dtype=logp.dtype).view(logp.shape)
    upstream.view(-1)[::7] = 0
    return logp, torch.autograd.grad(logp, hidden, upstream)


def by_two_passes(hidden, weight, bias, labels, **options):
    """The same of a head that is not frozen."""
    weight = [x.detach().requires_grad_() for x in weight]
    return by_one_pass(hidden, weight, bias, labels, **options)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", [{}, TUNED])
@pytest.mark.parametrize("shape", [(2, 3, 3), (40,), (1,), (0,), ()])
def test_both_ways_agree(kernel, dtype, options, shape):
    """Log-probs to the bit, gradients to the tolerance; and with fp64 as well as two passes do."""
    hidden, weight, bias, labels = head_and_labels(shape, 150, 24, dtype)
    if len(shape) == 1:
        labels[1::3] = -100
    ours, others = (
        f([hidden], [weight], bias, labels, **options) for f in (by_one_pass, by_two_passes)
    )
    assert torch.equal(ours[0], others[0])
    (got,), (want,) = ours[1], others[1]
    assert got.dtype is dtype
    assert (got - want).norm() <= TOLERANCE[dtype] * want.norm()
    exact = by_two_passes([hidden.double()], [weight.double()], bias.double(), labels, **options)[1]
    if dtype is torch.float32:
        assert (got - exact[0]).norm() <= 5e-7 * exact[0].norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_sum_of_products(kernel, dtype):
    """Each hidden that wants a gradient gets its own."""
    hidden, weight, bias, labels = head_and_labels((40,), 150, 24, dtype)
    h, w = (x.split((20, 4), 1) for x in (hidden, weight))
    ours, others = (f(h, w, bias, labels) for f in (by_one_pass, by_two_passes))
    assert torch.equal(ours[0], others[0])
    for got, want in zip(ours[1], others[1], strict=True):
        assert (got - want).norm() <= TOLERANCE[dtype] * want.norm()
    alone = h[1].detach().requires_grad_()
    logp = linear_token_logprobs((h[0].detach(), alone), w, labels, bias=bias)
    assert torch.equal(logp, ours[0])
    (got,) = torch.autograd.grad(logp.sum(), alone)
    w = [x.detach().requires_grad_() for x in w]
    logp = linear_token_logprobs((h[0].detach(), alone), w, labels, bias=bias)
    (want,) = torch.autograd.grad(logp.sum(), alone)
    assert (got - want).norm() <= TOLERANCE[dtype] * want.norm()


def test_two_products_where_two_passes_take_three(kernel, counted):
    """Those of the logits and of the gradient, slice by slice, and none in backward."""
    if kernel == "reference":
        pytest.skip("the specification computes all")
    hidden, weight, _, labels = head_and_labels((16,), 128, 24)
    hidden.requires_grad_()
    logp = linear_token_logprobs(hidden, weight, labels)
    assert counted == [(16, 64), (16, 24)] * 2
    logp.sum().backward()
    assert len(counted) == 4


@pytest.mark.parametrize("who", ["no_grad", "inference", "hidden", "weight", "bias", "entropy"])
def test_only_hidden_alone_takes_one_pass(kernel, counted, who):
    """Forward makes the logits and nothing else: without a gradient, and for those of the head."""
    if kernel == "reference":
        pytest.skip("the specification computes all")
    hidden, weight, bias, labels = head_and_labels((16,), 128, 24)
    hidden.requires_grad_(who != "hidden")
    weight.requires_grad_(who == "weight")
    bias.requires_grad_(who == "bias")
    modes = {"no_grad": torch.no_grad(), "inference": torch.inference_mode()}
    with modes.get(who, nullcontext()):
        linear_token_logprobs(hidden, weight, labels, bias=bias, return_entropy=who == "entropy")
    assert (16, 24) not in counted


def test_gradcheck(kernel):
    hidden, weight, bias, labels = head_and_labels((2, 3), 70, 4, torch.float64)
    labels[0, 1] = -100
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h: linear_token_logprobs(h, weight, labels, bias=bias, **TUNED), hidden
    )


def test_extreme_logits(kernel):
    """-inf in whole slices, everywhere, and at the label; and large offsets."""
    hidden, weight, bias, labels = head_and_labels((6,), 200, 8)
    bias[:64] = -math.inf
    labels = torch.where(labels < 64, labels + 64, labels)
    labels[0] = 3
    for shift in (0.0, 1e4, -1e4, -math.inf):
        logp, (got,) = by_one_pass([hidden], [weight], bias + shift, labels)
        want_logp, (want,) = by_two_passes([hidden], [weight], bias + shift, labels)
        assert torch.equal(logp, want_logp) and logp[0] == -math.inf
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_logit_so_low_that_its_log_prob_underflows_has_a_gradient(kernel):
    """A temperature near 0 makes a difference of 40 infinite; -inf alone has no gradient."""
    hidden, weight = torch.full((2, 1), 10.0), torch.tensor([[0.0], [-4.0]])
    bias, labels = torch.zeros(2), torch.tensor([0, 1])
    for way in (by_one_pass, by_two_passes):
        logp, (gradient,) = way([hidden], [weight], bias, labels, temperature=1e-37)
        assert logp.tolist() == [0.0, -math.inf]
        assert gradient.flatten().tolist() == pytest.approx([0.0, -8e37])


def test_a_label_of_probability_near_1_keeps_its_digits(kernel):
    """Its own term is 1 - p_y times its weight, not the difference of two weights."""
    hidden, weight, bias, labels = head_and_labels((8,), 200, 8)
    weight, bias = weight * 0.1, bias * 0.1
    logits = torch.nn.functional.linear(hidden, weight, bias)
    labels = labels[:1].expand(8)
    bias[labels[0]] += 14 + logits.amax() - logits[:, labels[0]].amin()
    ours, others = (f([hidden], [weight], bias, labels) for f in (by_one_pass, by_two_passes))
    assert ours[0].exp().min() > 0.999
    (got,), (want,) = ours[1], others[1]
    assert (got - want).norm() <= 2e-6 * want.norm()


def test_rows_that_no_gradient_reaches_are_zero(kernel):
    """Whatever stands in them: ignored ones, and those of a gradient that is exactly 0."""
    hidden, weight, _, labels = head_and_labels((9,), 150, 8)
    labels[::3] = -100
    hidden[::3] = math.nan
    hidden[1] = math.nan
    hidden.requires_grad_()
    logp = linear_token_logprobs(hidden, weight, labels)
    assert (logp[::3] == 0).all() and logp[1].isnan()
    upstream = torch.ones(9)
    upstream[::3], upstream[1] = math.nan, 0
    (grad,) = torch.autograd.grad(logp, hidden, upstream, retain_graph=True)
    assert (grad[::3] == 0).all() and (grad[1] == 0).all() and grad[2].any()
    assert grad.isfinite().all()
    (again,) = torch.autograd.grad(logp, hidden, upstream)
    assert torch.equal(grad, again)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(logp, hidden, upstream)


def test_a_row_depends_on_itself_alone(kernel):
    if kernel in ("reference", "cuda"):
        pytest.skip("row purity is a promise of the kernels, as far as BLAS keeps it")
    hidden, weight, bias, labels = head_and_labels((40,), 200, 48)

    def gradient(rows):
        h = hidden[rows].detach().requires_grad_()
        logp = linear_token_logprobs(h, weight, labels[rows], bias=bias)
        return torch.autograd.grad(logp.sum(), h)[0]

    whole = gradient(slice(None))
    for size in (4, 7, 33):
        parts = [gradient(slice(i, i + size)) for i in range(0, 40 - size, size)]
        assert torch.equal(torch.cat(parts), whole[: size * len(parts)])


@pytest.mark.parametrize("wanted", [[True, True], [False, True]])
def test_registration(wanted):
    hidden, weight, bias, labels = head_and_labels((5,), 70, 8)
    labels[1] = -100
    h, w = (list(x.split((5, 3), 1)) for x in (hidden, weight))
    t = torch.tensor(0.7)
    rows = linear_rows.Inputs(h, w, bias, labels, t, 0.0, -100, torch.float32)
    x = page.Inputs(rows, wanted)
    check_registration(page.frozen_head_op, x)


def test_compile():
    hidden, weight, bias, labels = head_and_labels((6,), 150, 8)
    labels[1] = -100

    def function(hidden):
        return linear_token_logprobs(hidden, weight, labels, bias=bias)

    results = []
    for f in (torch.compile(function, backend="aot_eager", fullgraph=True), function):
        (h,) = leaves(hidden)
        logp = f(h)
        results.append((logp, *torch.autograd.grad(logp.square().sum(), h)))
    assert all(map(torch.equal, *results))
