import math

import pytest
import torch
from accuracy import GRADIENT_TOLERANCE, assert_no_worse, leaves
from torch.utils.checkpoint import checkpoint

from bench.inputs import head_and_labels
from fastpg import linear_token_logprobs, linear_token_loss, merge_stats, policy_loss
from fastpg.ops.vocabulary import head as head_module
from fastpg.ops.vocabulary import linear_token_loss as page

OP = "linear_token_loss"
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
TUNED = {"temperature": 0.7, "softcap": 20.0, "logit_scale": 0.5}
SURROGATES = {
    "ppo": {"old_logp": True},
    "ppo with an entropy bonus and a KL": {
        "old_logp": True, "entropy_coef": 0.01, "ref_logp": True, "kl_coef": 0.1,
    },
    "reinforce": {"surrogate": "reinforce"},
    "cispo": {"surrogate": "cispo", "old_logp": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """So that few rows take several chunks, of several slices each."""
    monkeypatch.setattr(head_module, "WIDTH", {"cpu": 64, "cuda": 64})
    rows = {2: 16, 4: 8, 8: 4}
    monkeypatch.setattr(page, "CHUNK_ROWS", {"cpu": rows, "cuda": rows})


def problem(rows, vocab, width, dtype=torch.float32):
    """Leaves of a head, labels of which a third is ignored, and what policy_loss takes."""
    *head, labels = head_and_labels((rows,), vocab, width, dtype)
    labels[::3] = -100
    old_logp = (
        linear_token_logprobs(head[0], head[1], labels, bias=head[2]) + torch.randn(rows) * 0.3
    )
    tokens = {"old_logp": old_logp, "ref_logp": old_logp + torch.randn(rows) * 0.1}
    tokens |= {"advantages": torch.randn(rows), "weight": (labels >= 0) / rows}
    return leaves(*head), labels, tokens


def surrogate(tokens, options):
    """A token_loss as a user writes it."""

    def token_loss(logp, entropy, rows):
        given = dict(options)
        for name in ("old_logp", "ref_logp"):
            given |= {name: tokens[name][rows]} if options.get(name) else {}
        given |= {"entropy": entropy} if "entropy_coef" in options else {}
        return policy_loss(logp, tokens["advantages"][rows], tokens["weight"][rows], **given)

    return token_loss


def in_two_steps(hidden, weight, labels, token_loss, **options):
    """The specification: the log-probs of all tokens, and then their loss."""
    logp, entropy = linear_token_logprobs(hidden, weight, labels, return_entropy=True, **options)
    return token_loss(logp, entropy, torch.arange(len(labels)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("options", [{}, TUNED])
def test_matches_reference(kernel, dtype, name, options):
    """Loss, statistics and gradients of chunks add up to those of all tokens at once."""
    (hidden, weight, bias), labels, tokens = problem(40, 150, 24, dtype)
    token_loss = surrogate(tokens, SURROGATES[name])
    exact = leaves(*(x.double() for x in (hidden, weight, bias)))
    loss, stats = linear_token_loss(hidden, weight, labels, token_loss, bias=bias, **options)
    want, want_stats = in_two_steps(hidden, weight, labels, token_loss, bias=bias, **options)
    assert len(stats) > 1
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    got_stats, want_stats = merge_stats(stats), merge_stats(want_stats)
    assert got_stats == pytest.approx(want_stats, rel=1e-5, abs=1e-6)
    (3 * loss).backward()
    baseline = torch.autograd.grad(3 * want, (hidden, weight, bias))
    oracle, _ = in_two_steps(*exact[:2], labels, token_loss, bias=exact[2], **options)
    (3 * oracle).backward()
    for x, b, w in zip((hidden, weight, bias), baseline, exact, strict=True):
        assert x.grad.dtype == dtype
        assert_no_worse(x.grad, b, w.grad, GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("options", [{}, TUNED])
def test_gradients(kernel, options):
    (hidden, weight, bias), labels, _ = problem(9, 70, 4, torch.float64)
    factor = torch.randn(9).double()

    def smooth(logp, entropy, rows):
        return ((factor[rows] * logp).sin() + factor[rows] * entropy).sum(), None

    def loss(hidden, weight, bias):
        return linear_token_loss(hidden, weight, labels, smooth, bias=bias, **options)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias), fast_mode=True)


def test_compile(compiler):
    """In a graph it goes by the log-probs of all tokens, with gradients made in backward."""
    (hidden, weight, bias), labels, tokens = problem(9, 150, 8)
    token_loss = surrogate(tokens, SURROGATES["ppo"])

    def loss(hidden, weight, bias):
        return linear_token_loss(hidden, weight, labels, token_loss, bias=bias)[0]

    compiled = torch.compile(loss, backend=compiler, fullgraph=True)
    got, want = compiled(hidden, weight, bias), loss(hidden, weight, bias)
    torch.testing.assert_close(got, want)
    inputs = hidden, weight, bias
    grads = torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-6)


HIDDEN, WEIGHT, LABELS = torch.zeros(2, 4, requires_grad=True), torch.zeros(5, 4), [1, 2]


@pytest.mark.parametrize(
    ("error", "message", "token_loss", "options"),
    [
        (TypeError, r"must return \(0-d tensor, stats\), got Tensor", lambda a, b, c: a.sum(), {}),
        (TypeError, r"got a loss torch.Size\(\[2\]\)", lambda a, b, c: (a, None), {}),
        (TypeError, "got a loss 1.0", lambda a, b, c: (1.0, None), {}),
        (ValueError, "a loss without a graph", lambda a, b, c: (a.detach().sum(), None), {}),
        (ValueError, "a loss without a graph",
         lambda a, b, c: (a.detach().sum() * torch.ones((), requires_grad=True), None), {}),
        (ValueError, "a loss without a graph", lambda a, b, c: (a.detach().sum(), None),
         {"level": "sequence"}),
        (TypeError, "token_loss must be callable, got int", 3, {}),
        (ValueError, "level must be token or sequence, got 'batch'", max, {"level": "batch"}),
        (ValueError, r"linear_token_loss: .* got \(2, 4\) and \(5, 3\)", max,
         {"weight": torch.zeros(5, 3)}),
        (IndexError, "linear_token_loss: labels holds 5", lambda a, b, c: (a.sum(), None),
         {"labels": torch.tensor([1, 5])}),
    ],
)  # fmt: skip
def test_edges(error, message, token_loss, options):
    args = {"hidden": HIDDEN, "weight": WEIGHT, "labels": torch.tensor(LABELS)} | options
    with pytest.raises(error, match=message):
        linear_token_loss(**args, token_loss=token_loss)


def test_without_a_gradient_it_is_the_loss_alone(kernel):
    (hidden, weight, bias), labels, tokens = problem(9, 150, 8)
    token_loss = surrogate(tokens, SURROGATES["ppo"])
    want, _ = linear_token_loss(hidden, weight, labels, token_loss, bias=bias)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got, _ = linear_token_loss(hidden, weight, labels, token_loss, bias=bias)
        torch.testing.assert_close(got, want)
        assert not got.requires_grad


def test_sequences(kernel):
    """A loss of whole sequences sees all tokens at once, in the order of the labels."""
    (hidden, weight, bias), labels, tokens = problem(24, 150, 8)
    seen = []

    def token_loss(logp, entropy, rows):
        seen.append(rows)
        given = (x.view(4, 6) for x in (logp, tokens["advantages"], tokens["weight"]))
        old_logp = tokens["old_logp"].view(4, 6)
        return policy_loss(*given, old_logp=old_logp, level="sequence")

    def both(function, **options):
        loss, _ = function(hidden, weight, labels, token_loss, bias=bias, **options)
        return loss, *torch.autograd.grad(loss, (hidden, weight, bias))

    for got, want in zip(
        both(linear_token_loss, level="sequence"), both(in_two_steps), strict=True
    ):
        assert torch.equal(got, want)
    assert torch.equal(seen[0], torch.arange(24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_nothing_else_that_the_loss_looks_at_gets_a_gradient(kernel, level, dtype):
    (hidden, weight, _), labels, _ = problem(9, 150, 8, dtype)
    factor = torch.ones((), requires_grad=True)

    def token_loss(logp, entropy, rows):
        return factor * logp.sum(), None

    linear_token_loss(hidden, weight, labels, token_loss, level=level)[0].backward()
    assert factor.grad is None and hidden.grad.count_nonzero() > 0
    constants = hidden.detach(), weight.detach()
    assert not linear_token_loss(*constants, labels, token_loss, level=level)[0].requires_grad


def test_a_frozen_head_takes_no_memory(kernel, monkeypatch):
    """And no product: of dhidden alone, or of dweight and dbias alone."""
    tensors, labels, tokens = problem(20, 150, 8)
    token_loss = surrogate(tokens, SURROGATES["ppo"])
    want = torch.autograd.grad(
        linear_token_loss(*tensors[:2], labels, token_loss, bias=tensors[2])[0], tensors
    )
    products = []
    plain = head_module.product
    monkeypatch.setattr(
        head_module,
        "product",
        lambda out, *args, **kw: products.append(out.shape) or plain(out, *args, **kw),
    )
    for chosen in ([0], [1, 2], [2]):
        inputs = [x.detach().requires_grad_(i in chosen) for i, x in enumerate(tensors)]
        loss, _ = linear_token_loss(*inputs[:2], labels, token_loss, bias=inputs[2])
        products.clear()
        got = torch.autograd.grad(loss, [inputs[i] for i in chosen])
        assert not products  # they were made in forward
        for g, i in zip(got, chosen, strict=True):
            torch.testing.assert_close(g, want[i], rtol=0, atol=1e-6)
    linear_token_loss(tensors[0], weight := tensors[1].detach(), labels, token_loss)
    assert products and max(rows for rows, _ in products) < 48 < len(weight)  # a slice


def test_rows_of_coefficient_zero_are_left_out(kernel, monkeypatch):
    """Clipped, of advantage 0 or ignored: a NaN in their logits reaches no gradient."""
    (hidden, weight, _), labels, tokens = problem(12, 150, 8)
    tokens["advantages"][1] = 0
    tokens["advantages"][2], tokens["old_logp"][2] = 1, -100.0
    counts = []
    op = head_module.token_logprobs_backward_out_op
    plain = op.overload

    def counting(*values):
        counts.append(len(values[0]))
        plain(*values)

    monkeypatch.setattr(op, "overload", counting)
    loss, _ = linear_token_loss(hidden, weight, labels, surrogate(tokens, SURROGATES["ppo"]))
    loss.backward()
    live = [4, 5, 7, 8, 10, 11]  # but for those that are clipped by chance
    assert (hidden.grad[[0, 1, 2, 3, 6, 9]] == 0).all()
    assert sum(counts) <= 3 * len(live)


def test_no_row_at_all(kernel):
    (hidden, weight, bias), labels, tokens = problem(3, 150, 8)
    token_loss = surrogate(tokens, SURROGATES["ppo"])
    for n, y in ((3, torch.full_like(labels, -100)), (0, labels[:0])):
        loss, stats = linear_token_loss(hidden[:n], weight, y, token_loss, bias=bias)
        grads = torch.autograd.grad(loss, (hidden, weight, bias))
        assert loss == 0 and all((g == 0).all() for g in grads) and merge_stats(stats)["count"] == 0


@pytest.mark.parametrize("rows", [12, 160])
def test_the_gradient_of_the_weight_does_not_drift_with_chunks(kernel, rows):
    """bf16: accumulated in fp32, and rounded once, however many chunks there are."""
    (hidden, weight, _), labels, _ = problem(rows, 64, 16, torch.bfloat16)

    def loss(logp, entropy, rows):
        return logp.sum(), None

    linear_token_loss(hidden, weight, labels, loss)[0].backward()
    x64, w64 = leaves(hidden.double(), weight.double())
    in_two_steps(x64, w64, labels, loss)[0].backward()
    error = (weight.grad - w64.grad).norm() / w64.grad.norm()
    assert error < 2**-8  # of one rounding, 2^-9, and of what bf16 logits add


def test_fp16_takes_a_scaled_loss(kernel):
    """Gradients of logits of 1e-9 each, which would be 0 in fp16 but for the scale of the loss."""
    (hidden, weight, _), labels, _ = problem(40, 150, 24, torch.float16)
    exact, grads = leaves(hidden.double(), weight.double()), []
    for inputs in ((hidden, weight), exact):
        loss, _ = linear_token_loss(*inputs, labels, lambda a, b, c: (1e-6 * a.sum(), None))
        grads.append(torch.autograd.grad(loss * 2**20, inputs))
    for got, want in zip(*grads, strict=True):
        assert (got - want).norm() < 4e-3 * want.norm()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [9, 40])
def test_retained_graph(kernel, level, dtype, rows):
    """Each backward pass gives the same, whatever was done to what the one before gave."""
    (hidden, weight, bias), labels, tokens = problem(rows, 150, 8, dtype)
    token_loss = surrogate(tokens, SURROGATES["ppo"])
    inputs = hidden, weight, bias
    loss, _ = linear_token_loss(hidden, weight, labels, token_loss, bias=bias, level=level)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    want = [x.clone() for x in first]
    for x in first:
        x.data.mul_(100)
    for _ in range(3):
        loss.backward(retain_graph=True)
    (2 * loss).backward()
    for x, w in zip(inputs, want, strict=True):
        torch.testing.assert_close(x.grad, 5 * w, rtol=1e-2, atol=0)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_checkpoint(kernel, level):
    (hidden, weight, bias), labels, tokens = problem(9, 150, 8)

    def gradients(wrapper):
        def loss(hidden):
            token_loss = surrogate(tokens, SURROGATES["ppo"])
            return linear_token_loss(hidden, weight, labels, token_loss, bias=bias, level=level)[0]

        return torch.autograd.grad(wrapper(loss), (hidden, weight, bias))

    got = gradients(lambda loss: checkpoint(loss, hidden, use_reentrant=False))
    assert all(map(torch.equal, got, gradients(lambda loss: loss(hidden))))


def test_autocast(kernel):
    (hidden, weight, bias), labels, tokens = problem(9, 150, 8)
    token_loss = surrogate(tokens, SURROGATES["ppo"])
    with torch.autocast(hidden.device.type, torch.bfloat16):
        loss, _ = linear_token_loss(hidden, weight, labels, token_loss, bias=bias)
    half = leaves(*(x.bfloat16() for x in (hidden, weight, bias)))
    want, _ = linear_token_loss(*half[:2], labels, token_loss, bias=half[2])
    loss.backward()
    want.backward()
    assert torch.equal(loss, want)
    for x, w in zip((hidden, weight, bias), half, strict=True):
        assert x.grad.dtype == torch.float32 and torch.equal(x.grad, w.grad.float())


def test_double_backward_raises(kernel):
    (hidden, weight, _), labels, _ = problem(4, 20, 4)
    loss, _ = linear_token_loss(hidden, weight, labels, lambda a, b, c: (a.sum() * math.pi, None))
    with pytest.raises(RuntimeError, match="linear_token_loss: its gradient is not differentiable"):
        torch.autograd.grad(loss, hidden, create_graph=True)
