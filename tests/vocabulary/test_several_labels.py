"""K labels of each row: as K calls with one, from one pass."""

import math

import pytest
import torch
from accuracy import GRADIENT_TOLERANCE, TOLERANCE, assert_no_worse, leaves
from registration import check_registration
from torch._dynamo.testing import CompileCounterWithBackend

from bench.inputs import DEVICE, head_and_labels, logits_and_labels
from fastpg import check, linear_token_logprobs, token_logprobs
from fastpg.ops.vocabulary import linear_several_labels as linear_page
from fastpg.ops.vocabulary import several_labels as page

OP = "token_logprobs"
STATISTICS = ("sum_p_squared", "is_top1", "mean_logit")
SHAPES = [((3,), 1, 1), ((2, 3), 129, 5), ((2,), 8193, 7), ((40,), 64, 3), ((0,), 10, 4)]


def several(shape, vocab, count, dtype=torch.float32):
    """Logits, and labels of each row: a likely token, others, and some of them again."""
    logits, likely = logits_and_labels(shape, vocab, dtype)
    labels = torch.randint(vocab, (*likely.shape, count))
    labels[..., 0] = likely
    if count > 2:
        labels[..., 2] = likely
    return logits, labels


def by_torch(logits, labels, temperature=1.0, softcap=None):
    """(logp, entropy) as PyTorch code is commonly written."""
    z = softcap * torch.tanh(logits / softcap) if softcap else logits
    logp = (z / temperature).log_softmax(-1)
    return logp.gather(-1, labels), -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "vocab", "count"), SHAPES)
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, 30.0)])
def test_matches_reference(kernel, shape, vocab, count, dtype, temperature, softcap):
    if kernel == "triton" and shape == (40,):
        pytest.skip("the interpreter is slow")
    logits, labels = several(shape, vocab, count, dtype)
    options = {"temperature": temperature, "softcap": softcap}
    (x,), (x64,), (native,) = leaves(logits), leaves(logits.double()), leaves(logits)
    ours = token_logprobs(x, labels, return_entropy=True, **options)
    oracle, torchs = by_torch(x64, labels, **options), by_torch(native, labels, **options)
    for got, want, baseline in zip(ours, oracle, torchs, strict=True):
        assert_no_worse(got, baseline, want, TOLERANCE[dtype])
    for outputs in (ours, oracle, torchs):
        weights = (torch.linspace(-1, 1, o.numel()).view(o.shape) for o in outputs)
        sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True)).backward()
    assert_no_worse(x.grad, native.grad, x64.grad, GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradients(kernel, softcap):
    logits, labels = several((2, 3), 11, 4, torch.float64)
    labels[0, 1], labels[1, 1, 0] = -100, -100
    options = {"softcap": softcap, "temperature": torch.tensor([[0.7], [1.3]])}

    def both(x):
        return token_logprobs(x, labels, return_entropy=True, **options)

    (x,) = leaves(logits)
    for outputs in (both, lambda x: both(x)[0], lambda x: both(x)[1]):
        assert torch.autograd.gradcheck(outputs, x, fast_mode=True)


def test_registration():
    logits, labels = several((4, 3), 7, 3)
    labels[0, 0, 1] = -100
    rows = page.RowInputs(logits, labels, torch.tensor(0.7), 5.0, -100, True)
    for x in (page.Inputs(rows, True), page.Inputs(rows._replace(with_entropy=False), False)):
        check_registration(page.several_labels_op, x)
    logp, entropy, stats, *_ = page.several_labels_op(page.Inputs(rows, False))
    upstream = torch.randn_like(logp), torch.randn_like(entropy), logp, entropy, stats
    gradient = page.BackwardInputs(rows, *upstream)
    into = page.GradientInputs(gradient, torch.empty(logits.shape))
    check_registration(page.several_labels_backward_op, into)


def test_registration_from_hidden_states():
    hidden, weight, bias, _ = head_and_labels((5,), 40, 8)
    labels = torch.randint(40, (5, 3))
    x = linear_page.Inputs(
        [hidden], [weight], bias, labels, torch.tensor(1.0), 0.0, -100, hidden.dtype
    )
    check_registration(linear_page.linear_several_labels_op, x)
    logp, entropy, stats, *_ = linear_page.linear_several_labels_op(x)
    upstream = torch.randn_like(logp), torch.randn_like(entropy), logp, entropy, stats
    gradient = linear_page.BackwardInputs(x, *upstream, [True, True, True])
    check_registration(linear_page.linear_several_labels_backward_op, gradient)


def test_compile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(token_logprobs, backend=counter, fullgraph=True, dynamic=True)
    for rows, vocab in [(4, 300), (6, 500)]:
        logits, labels = several((rows,), vocab, 5)
        results = []
        for function in (compiled, token_logprobs):
            (x,) = leaves(logits)
            logp, entropy = function(x, labels, return_entropy=True)
            (logp.sum() + 0.3 * entropy.sum()).backward()
            results.append((logp, entropy, x.grad))
        assert all(map(torch.equal, *results))
    assert counter.frame_count == 1


@pytest.mark.parametrize("names", [(), STATISTICS])
def test_compile_without_an_entropy(names):
    torch._dynamo.reset()
    logits, labels = several((4,), 30, 3)

    def logprobs(x):
        found = token_logprobs(x, labels, row_statistics=names)
        return found.logp if names else found

    grads = []
    for function in (torch.compile(logprobs, backend="aot_eager", fullgraph=True), logprobs):
        (x,) = leaves(logits)
        function(x).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


LOGITS = torch.zeros(2, 5)
KEPT = (torch.tensor([0]), torch.tensor([0, 1, 1]))


@pytest.mark.parametrize(
    ("error", "message", "labels", "options"),
    [
        (IndexError, "labels holds 5", [[1, 5], [0, 0]], {}),
        (IndexError, "labels holds -1", [[1, 0], [-100, -1]], {}),
        (ValueError, r"labels \(1, 2\) must be \(2,\), or \(2,\) and K labels", [[1, 2]], {}),
        (ValueError, r"labels \(2, 0\) must be \(2,\), or", [[], []], {}),
        (ValueError, "several labels a row need the whole vocabulary, support", [[1], [1]],
         {"support": KEPT}),
        (ValueError, "several labels a row need the whole vocabulary, process_group", [[1], [1]],
         {"process_group": object()}),
    ],
)  # fmt: skip
def test_bad_arguments_raise(kernel, error, message, labels, options):
    if kernel in DEVICE and error is IndexError:
        pytest.skip("test_a_device_spoils_the_row_of_a_bad_label")
    labels = torch.tensor(labels, dtype=torch.int64)
    with pytest.raises(error, match=f"^token_logprobs: .*{message}"):
        token_logprobs(LOGITS, labels, **options)
    with pytest.raises(error, match=f"^linear_token_logprobs: .*{message}"):
        linear_token_logprobs(torch.zeros(2, 3), torch.zeros(5, 3), labels, **options)


def test_a_device_spoils_the_row_of_a_bad_label(kernel):
    if kernel not in DEVICE:
        pytest.skip("the CPU raises")
    logits, labels = several((3,), 33, 4)
    labels[1, 2] = 33
    (x,) = leaves(logits)
    logp = token_logprobs(x, labels)
    logp.sum().backward()
    assert logp[1].isnan().all() and x.grad[1].isnan().all()
    assert logp[[0, 2]].isfinite().all() and x.grad[[0, 2]].isfinite().all()
    with pytest.raises(IndexError, match="labels holds 33 at row 1"):
        check()


def test_one_of_one_has_the_bits_of_one(kernel):
    logits, labels = several((6,), 9000, 1)
    for softcap in (None, 5.0):
        ours = token_logprobs(logits, labels, softcap=softcap, return_entropy=True)
        plain = token_logprobs(logits, labels[:, 0], softcap=softcap, return_entropy=True)
        assert torch.equal(ours[0][:, 0], plain[0]) and torch.equal(ours[1], plain[1])


def test_labels_of_the_shape_of_the_rows_are_one_a_row(kernel):
    """A square of labels beside a cube of logits; K is 3 in the other call."""
    logits, labels = logits_and_labels((3, 3), 20)
    assert token_logprobs(logits, labels).shape == (3, 3)
    assert token_logprobs(logits[0], labels).shape == (3, 3)
    want = by_torch(logits[0].double(), labels)[0]
    torch.testing.assert_close(token_logprobs(logits[0], labels).double(), want)


@pytest.mark.parametrize("margin", [20.0, 40.0, 80.0])
@pytest.mark.parametrize("place", [0, 3])
def test_one_minus_p_keeps_its_digits(kernel, margin, place):
    """Of the one label that stands out, wherever it is among the K, and of its gradient."""
    logits, labels = several((1,), 9000, 5)
    labels[:] = torch.tensor([7, 8200, 30, 8999, 1])
    label = labels[:, place : place + 1]
    logits[0, label] = logits.max() + margin
    others = (logits.double() - logits.double().gather(1, label)).exp().scatter(1, label, 0.0)
    want = (others.sum() / (1 + others.sum()))[None]
    (x,) = leaves(logits)
    logp = token_logprobs(x, labels)
    torch.testing.assert_close(-torch.expm1(logp[:, place].double()), want, rtol=1e-6, atol=0)
    logp[:, place].sum().backward()
    torch.testing.assert_close(x.grad.gather(1, label)[0].double(), want, rtol=2e-6, atol=0)


def test_labels_that_are_equal_share_a_gradient(kernel):
    """Rounded once, in bf16 too, and in whatever order they stand."""
    logits, _ = logits_and_labels((2,), 300, torch.bfloat16)
    labels = torch.tensor([[4, 9, 4, 4, 9, 200, 4]] * 2)
    upstream = torch.randn(2, 7)
    grads = []
    for order in (torch.arange(7), torch.tensor([6, 3, 1, 0, 5, 2, 4])):
        (x,) = leaves(logits)
        token_logprobs(x, labels[:, order]).backward(upstream[:, order])
        grads.append(x.grad)
    (x64,) = leaves(logits.double())
    by_torch(x64, labels)[0].backward(upstream.double())
    torch.testing.assert_close(grads[0], x64.grad.bfloat16(), rtol=2**-7, atol=1e-6)
    assert torch.equal(*grads)


@pytest.mark.parametrize("poison", [math.nan, 1e30])
def test_an_ignored_label_adds_nothing_and_a_row_of_them_is_not_read(kernel, poison):
    logits, labels = several((4,), 33, 3)
    labels[0, 0], labels[2], labels[3, 1] = 7, 7, 7  # which is a token, too
    results = []
    for value in (0.0, poison):
        logits[2] = value
        (x,) = leaves(logits)
        options = {"return_entropy": True, "row_statistics": STATISTICS, "ignore_index": 7}
        found = token_logprobs(x, labels, **options)
        (found.logp.sum() + found.entropy.sum()).backward()
        results.append([*found, x.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (found.logp[labels == 7] == 0).all() and not found.is_top1[labels == 7].any()
    assert found.entropy[2] == found.mean_logit[2] == 0 and (x.grad[2] == 0).all()
    (x64,) = leaves(logits[[0, 1, 3]].double())
    logp, entropy = by_torch(x64, labels[[0, 1, 3]])
    (logp[labels[[0, 1, 3]] != 7].sum() + entropy.sum()).backward()
    torch.testing.assert_close(x.grad[[0, 1, 3]].double(), x64.grad, rtol=1e-5, atol=1e-6)


def test_minus_infinity_is_an_ordinary_logit(kernel):
    logits, labels = several((3,), 50, 4)
    labels[:, 1:] = torch.tensor([11, 12, 11])
    logits[0, 11], logits[1], logits[2, [11, 12]] = -math.inf, -math.inf, -math.inf
    labels[:, 0] = 13
    (x,) = leaves(logits)
    logp, entropy = token_logprobs(x, labels, return_entropy=True)
    assert (logp[1] == -math.inf).all() and entropy[1] == 0
    assert (logp == -math.inf).tolist()[0] == [False, True, False, True]
    (logp[logp.isfinite()].sum() + logp[0, 1] + logp[1].sum()).backward()
    assert x.grad.isfinite().all() and (x.grad[logits == -math.inf] == 0).all()


@pytest.mark.parametrize("op", ["token_logprobs", "linear_token_logprobs"])
def test_a_logit_so_low_that_its_log_prob_underflows_has_a_gradient(kernel, op):
    """A temperature near 0 makes a difference of 40 infinite; -inf alone has no gradient."""
    logits, labels = torch.tensor([[0.0, -40.0, -math.inf]]), torch.tensor([[1, 0]])

    def gradient(labels):
        (x,) = leaves(logits)
        if op == "token_logprobs":
            logp = token_logprobs(x, labels, temperature=1e-37)
        else:  # the bias of a head that is 0
            hidden, head = torch.zeros(1, 1), torch.zeros(3, 1)
            logp = linear_token_logprobs(hidden, head, labels, bias=x[0], temperature=1e-37)
        return torch.autograd.grad(logp[logp != 0].sum(), x)[0]

    want = torch.tensor([[-1e37, 1e37, 0.0]])
    for given in (labels[:, 0], labels):
        torch.testing.assert_close(gradient(given), want, rtol=1e-6, atol=0)


def test_statistics_are_those_of_one_label(kernel):
    logits, labels = several((6,), 300, 4)
    labels[:3, 3] = logits[:3].argmax(-1)
    found = token_logprobs(logits, labels, row_statistics=STATISTICS)
    one = token_logprobs(logits, labels[:, 3], row_statistics=STATISTICS)
    torch.testing.assert_close(found.sum_p_squared, one.sum_p_squared)
    torch.testing.assert_close(found.mean_logit, one.mean_logit)
    assert torch.equal(found.is_top1, labels == logits.argmax(-1)[:, None])
    assert found.entropy is None


def test_of_labels_with_equal_logits_the_first_of_the_row_is_top1(kernel):
    logits, labels = torch.zeros(2, 9000), torch.tensor([[8999, 1, 0, 1], [5, 3, 5, 7]])
    found = token_logprobs(logits, labels, row_statistics=STATISTICS)
    assert torch.equal(found.is_top1, labels == 0)
    weight, hidden = torch.zeros(9000, 1), torch.ones(2, 1)
    found = linear_token_logprobs(hidden, weight, labels, row_statistics=STATISTICS)
    assert torch.equal(found.is_top1, labels == 0)


def test_the_gradient_may_overwrite_the_logits(kernel):
    logits, labels = several((4,), 9000, 5)
    grads = []
    for inplace in (False, True):
        (leaf,) = leaves(logits)
        x = leaf * 1.0
        x.register_hook(grads.append)
        token_logprobs(x, labels, softcap=9.0, inplace_backward=inplace).square().sum().backward()
        assert torch.equal(x, grads[-1]) == inplace
    assert torch.equal(*grads)


def test_strided_logits_and_labels_of_any_dtype(kernel):
    logits, labels = several((3, 4), 40, 3)
    x = logits.transpose(0, 1).detach().requires_grad_()
    logp = token_logprobs(x, labels.transpose(0, 1).int())
    want = by_torch(logits.double(), labels)[0].transpose(0, 1)
    torch.testing.assert_close(logp.double(), want, rtol=1e-5, atol=1e-6)
    logp.sum().backward()
    assert x.grad.sum(-1).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_from_hidden_states_they_are_those_of_the_logits(dtype, softcap):
    """The tiles of a CPU have 4096 tokens; some labels of a row are in one tile, some in others."""
    hidden, weight, bias, _ = head_and_labels((2, 10), 9000, 16, dtype)
    labels = torch.randint(9000, (2, 10, 6))
    with torch.no_grad():
        labels[..., 1] = labels[..., 4] = torch.nn.functional.linear(hidden, weight).argmax(-1)
    labels[0, 0], labels[0, 1, :3], labels[1, 1] = -100, -100, 5
    options = {"softcap": softcap, "temperature": 0.7, "return_entropy": True}
    ours, theirs = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    x, w, b = ours
    found = linear_token_logprobs(x, w, labels, bias=b, row_statistics=STATISTICS, **options)
    logits = torch.nn.functional.linear(*theirs)
    want = token_logprobs(logits, labels, row_statistics=STATISTICS, **options)
    tolerance = {torch.bfloat16: 0.02, torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(labels.shape).to(found.logp.dtype)
    for results in (found, want):
        ((results.logp * upstream).sum() + 0.3 * results.entropy.sum()).backward()
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=tolerance, atol=10 * tolerance)
    assert (x.grad[0, 0] == 0).all()


@pytest.mark.parametrize("margin", [20.0, 40.0, 80.0])
@pytest.mark.parametrize("place", [3, 8190, 9999])
def test_one_minus_p_keeps_its_digits_from_hidden_states(margin, place):
    weight = torch.zeros(10000, 4)
    weight[:, 0] = torch.linspace(-1, 1, 10000)
    weight[place, 0] = 1 + margin
    hidden = torch.tensor([[1.0, 0.0, 0.0, 0.0]], requires_grad=True)
    labels = torch.tensor([[5000, place, 1]])
    z = weight[:, 0].double() - weight[place, 0].double()
    others = z.exp().index_fill(0, labels[0, 1:2], 0.0)
    want = others.sum() / (1 + others.sum())
    logp = linear_token_logprobs(hidden, weight, labels)[0, 1]
    torch.testing.assert_close(-torch.expm1(logp.double()), want, rtol=1e-6, atol=0)
    logp.backward()
    slope = -(others * z).sum() / (1 + others.sum())  # d logp / d hidden
    torch.testing.assert_close(hidden.grad[0, 0].double(), slope, rtol=5e-5, atol=0)
