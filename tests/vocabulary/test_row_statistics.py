"""Row statistics: against their formulas in fp64, and without a trace in the other results."""

import math

import kernels
import pytest
import torch
from accuracy import TOLERANCE, assert_no_worse, leaves
from registration import check_registration
from torch._dynamo.testing import CompileCounterWithBackend

from bench.inputs import DEVICE, head_and_labels, logits_and_labels
from fastpg import TokenLogprobs, check, linear_token_logprobs, token_logprobs
from fastpg.ops.vocabulary import linear_several_labels as linear_page
from fastpg.ops.vocabulary import row_statistics as page

OP = "row_statistics"
ALL = ("sum_p_squared", "is_top1", "mean_logit")
SHAPES = [((2, 3), 129), ((3,), 8193), ((2, 33), 257), ((0,), 10), ((4,), 1)]


def by_torch(logits, labels, temperature=1.0, softcap=None):
    """(sum_p_squared, is_top1, mean_logit) as PyTorch code is commonly written."""
    z = (softcap * torch.tanh(logits / softcap) if softcap else logits) / temperature
    is_top1 = logits.argmax(-1) == labels
    return z.softmax(-1).square().sum(-1), is_top1, z.mean(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "vocab"), SHAPES)
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, 30.0)])
def test_matches_reference(kernel, shape, vocab, dtype, temperature, softcap):
    if kernel == "triton" and shape == (2, 33):
        pytest.skip("for the loop of C++ over many rows; the interpreter is slow")
    logits, labels = logits_and_labels(shape, vocab, dtype)
    options = {"temperature": temperature, "softcap": softcap}
    ours = token_logprobs(logits, labels, row_statistics=ALL, **options)
    p2, is_top1, mean = by_torch(logits.double(), labels, **options)
    native_p2, _, native_mean = by_torch(logits, labels, **options)
    assert_no_worse(ours.sum_p_squared, native_p2, p2, TOLERANCE[dtype])
    assert_no_worse(ours.mean_logit, native_mean, mean, TOLERANCE[dtype])
    assert torch.equal(ours.is_top1, is_top1)
    assert ours.logp.dtype == ours.mean_logit.dtype == ours.sum_p_squared.dtype


@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradients(kernel, with_entropy, monkeypatch, request):
    """They are those without statistics, to the bit, as the other results are."""
    if kernel == "triton":  # the op without statistics is of another page
        kernels.run_with(monkeypatch, kernel, "token_logprobs", request.config.cache)
    logits, labels = logits_and_labels((2, 3), 300)
    labels[0, 1] = -100
    results = []
    for names in ((), ALL):
        (x,) = leaves(logits)
        got = token_logprobs(x, labels, return_entropy=with_entropy, row_statistics=names)
        logp, entropy = got[:2] if names or with_entropy else (got, None)
        loss = (2 * logp + (0.3 * entropy if with_entropy else 0.0)).sum()
        results.append((logp, *torch.autograd.grad(loss, x)))
        if names:
            assert not any(s.requires_grad for s in got[2:])
            assert (entropy is None) == (not with_entropy)
    assert all(map(torch.equal, *results))


def test_registration():
    logits, labels = logits_and_labels((4, 3), 7)
    x = page.Inputs(logits, labels, torch.tensor(0.7), 5.0, -100, True)
    check_registration(page.row_statistics_op, x)
    check_registration(page.row_statistics_op, x._replace(with_entropy=False))


def test_compile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(token_logprobs, backend=counter, fullgraph=True, dynamic=True)
    for rows, vocab in [(4, 300), (6, 500)]:
        logits, labels = logits_and_labels(rows, vocab)
        ours, eager = (f(logits, labels, row_statistics=ALL) for f in (compiled, token_logprobs))
        assert ours.entropy is eager.entropy is None
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True) if b is not None)
    assert counter.frame_count == 1


GROUP = object()  # is refused before anybody looks at it
KEPT = (torch.tensor([0]), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "row_statistics must be one of sum_p_squared, .* got 'sum'",
         {"row_statistics": ["sum"]}),
        (TypeError, "row_statistics must be a sequence of names, got 'is_top1'",
         {"row_statistics": "is_top1"}),
        (TypeError, "row_statistics must be a sequence of names, got tensor",
         {"row_statistics": torch.ones(2)}),
        (ValueError, "whole vocabulary, support must be None",
         {"row_statistics": ALL, "support": KEPT}),
        (ValueError, "whole vocabulary, process_group must be None",
         {"row_statistics": ALL, "process_group": GROUP}),
    ],
)  # fmt: skip
def test_bad_arguments_raise(error, message, options):
    labels = torch.tensor([1])
    with pytest.raises(error, match=f"^token_logprobs: .*{message}"):
        token_logprobs(torch.zeros(1, 3), labels, **options)
    with pytest.raises(error, match=f"^linear_token_logprobs: .*{message}"):
        linear_token_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), labels, **options)


def test_what_was_not_asked_for_is_none():
    logits, labels = logits_and_labels(3, 20)
    found = token_logprobs(logits, labels, row_statistics=["is_top1"])
    assert isinstance(found, TokenLogprobs)
    assert found.is_top1 is not None and found.logp is not None
    assert found.entropy is found.sum_p_squared is found.mean_logit is None


def test_of_equal_logits_the_first_is_top1(kernel):
    logits = torch.full((6, 9000), -1.0)
    logits[:5, 8500] = logits[:3, 20] = 2.0
    logits[5] = -math.inf
    labels = torch.tensor([20, 8500, 0, 8500, 20, 0])
    found = token_logprobs(logits, labels, row_statistics=ALL).is_top1
    assert found.tolist() == [True, False, False, True, False, False]


def test_logits_that_softcap_leaves_equal_are_told_apart(kernel):
    logits = torch.tensor([[100.0, 101.0, 0.0], [101.0, 100.0, 0.0]])
    found = token_logprobs(logits, torch.tensor([0, 0]), softcap=1.0, row_statistics=ALL)
    assert found.is_top1.tolist() == [False, True]


def test_a_padded_vocabulary_has_no_mean_logit(kernel):
    """A -inf logit is one of those that the mean is of; it has no other effect."""
    logits, labels = logits_and_labels(3, 50)
    logits[1], labels[1] = -math.inf, 0
    padded = torch.nn.functional.pad(logits, (0, 14), value=-math.inf)
    found = token_logprobs(padded, labels, return_entropy=True, row_statistics=ALL)
    want = token_logprobs(logits, labels, return_entropy=True, row_statistics=ALL)
    assert (found.mean_logit == -math.inf).all()
    assert want.mean_logit.isinf().tolist() == [False, True, False]
    for ours, plain in zip(found[:4], want[:4], strict=True):
        torch.testing.assert_close(ours, plain)
    assert found.sum_p_squared[1] == 0 and not found.is_top1[1]
    capped = token_logprobs(padded, labels, softcap=5.0, row_statistics=ALL)
    assert capped.mean_logit.isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_logit_spoils_its_own_row_only(kernel, poison):
    logits, labels = logits_and_labels(4, 9000)
    labels[:] = logits.argmax(-1)
    clean = token_logprobs(logits, labels, row_statistics=ALL)
    logits[1, 8500] = poison
    found = token_logprobs(logits, labels, row_statistics=ALL)
    assert found.sum_p_squared[1].isnan() and found.mean_logit[1].isnan()
    assert clean.is_top1.all() and not found.is_top1[1]
    for got, want in zip(found[2:], clean[2:], strict=True):
        assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])


def test_ignored_rows_are_never_read(kernel):
    logits, labels = logits_and_labels(40, 33)
    logits[::3], labels[::3] = math.nan, 7
    found = token_logprobs(logits, labels, ignore_index=7, row_statistics=ALL)
    assert (found.sum_p_squared[::3] == 0).all() and (found.mean_logit[::3] == 0).all()
    assert not found.is_top1[::3].any()


def test_a_device_spoils_the_row_of_a_bad_label(kernel):
    if kernel not in DEVICE:
        pytest.skip("the CPU raises")
    logits, labels = logits_and_labels(3, 33)
    labels[1] = 33
    found = token_logprobs(logits, labels, row_statistics=ALL)
    assert found.sum_p_squared[1].isnan() and not found.is_top1[1]
    with pytest.raises(IndexError, match="labels holds 33 at row 1"):
        check()


def test_a_certain_row_has_squares_of_one(kernel):
    logits = torch.zeros(1, 5000)
    logits[0, 4100] = 60.0
    found = token_logprobs(logits, torch.tensor([3]), row_statistics=ALL)
    assert found.sum_p_squared == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_from_hidden_states_they_are_those_of_the_logits(dtype, softcap):
    """And the other results keep their bits; the tiles of a CPU have 4096 tokens."""
    hidden, weight, bias, labels = head_and_labels((2, 20), 9000, 16, dtype)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    labels[0], labels[1, 3] = logits[0].argmax(-1), -100
    options = {"temperature": 0.7, "softcap": softcap, "return_entropy": True}
    x, w = leaves(hidden, weight)
    found = linear_token_logprobs(x, w, labels, bias=bias, row_statistics=ALL, **options)
    plain_x, plain_w = leaves(hidden, weight)
    plain = linear_token_logprobs(plain_x, plain_w, labels, bias=bias, **options)
    assert all(map(torch.equal, found[:2], plain))
    for results, inputs in ((found, (x, w)), (plain, (plain_x, plain_w))):
        (results[0] - 0.3 * results[1]).sum().backward()
        assert all(v.grad is not None for v in inputs)
    assert torch.equal(x.grad, plain_x.grad) and torch.equal(w.grad, plain_w.grad)
    want = token_logprobs(logits, labels, row_statistics=ALL, **options)
    tolerance = 0.02 if dtype is torch.bfloat16 else 2e-5  # of the rounding of the logits
    for ours, theirs in zip(found[2:], want[2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert found.is_top1[0].any() and not found.is_top1[1, 3]


def test_from_hidden_states_the_first_of_equal_tokens_is_top1():
    weight = torch.zeros(9000, 2)
    weight[100] = weight[5000] = torch.tensor([3.0, 0.0])
    labels = torch.tensor([100, 5000, 0])
    found = linear_token_logprobs(torch.ones(3, 2), weight, labels, row_statistics=ALL)
    assert found.is_top1.tolist() == [True, False, False]


def test_from_hidden_states_tokens_that_softcap_leaves_equal_are_told_apart():
    weight = torch.zeros(9000, 1)
    weight[100], weight[5000] = 100.0, 101.0
    labels, options = torch.tensor([100, 5000]), {"softcap": 1.0, "row_statistics": ALL}
    found = linear_token_logprobs(torch.ones(2, 1), weight, labels, **options)
    assert found.is_top1.tolist() == [False, True]
    lowest = torch.full((9000,), -math.inf)  # of which softcap makes ordinary logits
    found = linear_token_logprobs(torch.ones(2, 1), weight, labels - 100, bias=lowest, **options)
    assert found.is_top1.tolist() == [True, False]


def test_registration_from_hidden_states():
    hidden, weight, bias, labels = head_and_labels((5,), 40, 8)
    t = torch.tensor(1.0)
    x = linear_page.Inputs([hidden], [weight], bias, labels[:, None], t, 0.0, -100, hidden.dtype)
    check_registration(linear_page.linear_several_labels_op, x)
