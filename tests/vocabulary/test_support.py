"""Log-probs over kept sets, support=(token_ids, offsets), against all logits with a mask."""

import math

import pytest
import torch
from accuracy import leaves
from registration import check_registration

from bench.inputs import head_and_labels
from fastpg import linear_token_logprobs, linear_token_loss
from fastpg.ops.vocabulary import linear_rows
from fastpg.ops.vocabulary import linear_support as page
from fastpg.ops.vocabulary import sparse_products as products
from fastpg.ops.vocabulary.support import Support

OP = "linear_support"
TUNED = {"temperature": 0.7, "softcap": 20.0, "logit_scale": 0.5}
# Relative in norm, from logits of fp64; those in bf16 are rounded as a model's head rounds them.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-13}
VOCAB = 150


def problem(dtype=torch.float32, sizes=(5, 1, 0, 40, VOCAB, 7, 20, 3)):
    """hidden, weight, bias; labels inside their sets; and the sets, of these sizes."""
    *head, _ = head_and_labels((len(sizes),), VOCAB, 72, dtype)
    random = torch.Generator(torch.get_default_device()).manual_seed(1)
    sets = [torch.randperm(VOCAB, generator=random)[:size].sort()[0] for size in sizes]
    labels = torch.stack([kept[len(kept) // 2] if len(kept) else torch.tensor(9) for kept in sets])
    return head, labels, csr(sets)


def csr(sets):
    offsets = torch.tensor([0, *[len(kept) for kept in sets]]).cumsum(0)
    return torch.cat(sets), offsets


def with_a_mask(
    hidden, weight, bias, labels, support, temperature=1.0, softcap=None, logit_scale=1
):
    """(logp, entropy) from all logits, of which those outside the set are far below."""
    z = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    token_ids, offsets = support
    for n in range(len(z)):
        kept = token_ids[offsets[n] : offsets[n + 1]]
        outside = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, kept, False)
        if len(kept):
            z = z.masked_fill(outside & (torch.arange(len(z)) == n)[:, None], -1e30)
    logp = z.log_softmax(-1)
    return logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def gradients(logp, entropy, inputs):
    upstream = torch.linspace(-1, 2, len(logp))
    return torch.autograd.grad((logp * upstream).sum() + (entropy * upstream).sum(), inputs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", [{}, TUNED])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_matches_reference(kernel, dtype, options, integer):
    inputs, labels, support = problem(dtype)
    ours, exact = leaves(*inputs), leaves(*(x.double() for x in inputs))
    kept = tuple(x.to(integer) for x in support)
    got = linear_token_logprobs(
        *ours[:2], labels, bias=ours[2], support=kept, return_entropy=True, **options
    )
    want = with_a_mask(*exact, labels, support, **options)
    scale = 1.0 if dtype in (torch.float32, torch.float64) else 4.0  # of the logits' rounding
    for g, w in zip(got, want, strict=True):
        assert g.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (g - w).norm() <= scale * TOLERANCE[dtype] * (1 + w.norm())
    pairs = zip(gradients(*got, ours), gradients(*want, exact), strict=True)
    for g, w in pairs:
        assert g.dtype == dtype
        assert (g - w).norm() <= scale * TOLERANCE[dtype] * w.norm()


@pytest.mark.parametrize("options", [{}, TUNED])
def test_gradients(kernel, options):
    (hidden, weight, bias), labels, support = problem(torch.float64, sizes=(3, 0, 7))
    hidden, weight = hidden[:, :4], weight[:, :4]

    def both(hidden, weight, bias):
        return linear_token_logprobs(
            hidden, weight, labels, bias=bias, support=support, return_entropy=True, **options
        )

    assert torch.autograd.gradcheck(both, leaves(hidden, weight, bias), fast_mode=True)


def test_a_label_outside_has_no_gradient(kernel):
    """Its log-prob is -inf; the entropy of its row has one as ever."""
    inputs, labels, support = problem(sizes=(5, 4))
    kept = support[0][:5].tolist()
    labels[0] = next(token for token in range(VOCAB) if token not in kept)
    ours = leaves(*inputs)
    logp, entropy = linear_token_logprobs(
        *ours[:2], labels, bias=ours[2], support=support, return_entropy=True
    )
    assert logp[0] == -math.inf and logp[1].isfinite() and entropy.isfinite().all()
    grads = torch.autograd.grad(logp, ours, torch.ones(2), retain_graph=True)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][0].any() and grads[0][1].any()
    (grad,) = torch.autograd.grad(entropy[0], ours[0])
    assert grad[0].any()


def test_only_what_is_kept_is_read(kernel):
    """Ignored rows and tokens in no set may hold anything, and get a gradient of exactly 0."""
    if kernel == "reference":
        pytest.skip("the specification multiplies all")
    (hidden, weight, bias), labels, support = problem(sizes=(5, 4, 3))
    labels[1] = -100
    kept = torch.cat([support[0][:5], support[0][9:]])
    results = []
    for value in (0.0, math.nan):
        h, w = hidden.clone(), torch.full_like(weight, value)
        h[1] = value
        w[kept] = weight[kept]
        h, w = leaves(h, w)
        logp, entropy = linear_token_logprobs(
            h, w, labels, bias=bias, support=support, return_entropy=True
        )
        assert logp[1] == 0 and entropy[1] == 0
        upstream = torch.tensor([1.0, math.nan, 2.0])
        grads = torch.autograd.grad(logp, (h, w), upstream)
        assert not grads[0][1].any()
        results.append((logp, entropy, *grads))
    assert all(map(torch.equal, *results))


def test_all_tokens_kept_are_the_whole_vocabulary(kernel):
    """As is an empty set: log-probs, entropies and gradients."""
    inputs, labels, support = problem(sizes=(VOCAB,) * 5)
    nothing = support[0][:0], torch.zeros(6, dtype=torch.int64)
    results = []
    for options in ({}, {"support": support}, {"support": nothing}):
        ours = leaves(*inputs)
        outputs = linear_token_logprobs(
            *ours[:2], labels, bias=ours[2], return_entropy=True, **options
        )
        results.append([*outputs, *gradients(*outputs, ours)])
    for plain, whole, empty in zip(*results, strict=True):
        torch.testing.assert_close(whole, plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(empty, plain, rtol=1e-5, atol=1e-5)


def test_minus_infinity_and_nan(kernel):
    """A bias of -inf is probability 0, in a set of nothing else too; NaN stays in its row."""
    (hidden, weight, bias), labels, support = problem(sizes=(5, 2, 4))
    bias[support[0][5:7]] = -math.inf
    hidden[2, 0] = math.nan
    h, w = leaves(hidden, weight)
    logp, entropy = linear_token_logprobs(
        h, w, labels, bias=bias, support=support, return_entropy=True
    )
    assert logp[1] == -math.inf and entropy[1] == 0
    assert logp[2].isnan() and entropy[2].isnan() and logp[0].isfinite()
    grads = torch.autograd.grad(logp, h, torch.tensor([1.0, 1.0, 0.0]))
    assert grads[0][:2].isfinite().all() and not grads[0][1].any()


def test_a_row_depends_on_itself_alone(kernel):
    """Whatever the other sets are, and for any number of threads; the gradient of hidden too."""
    if kernel == "reference":
        pytest.skip("row purity is a promise of the kernels")
    (hidden, weight, bias), labels, (token_ids, offsets) = problem(sizes=(50, 1, 7, 33) * 20)

    def results(rows):
        h = hidden[rows].detach().requires_grad_()
        part = offsets[rows.start : rows.stop + 1]
        kept = token_ids[part[0] : part[-1]], part - part[0]
        logp = linear_token_logprobs(h, weight, labels[rows], bias=bias, support=kept)
        return logp, torch.autograd.grad(logp.sum(), h)[0]

    whole = results(slice(0, 80))
    torch.set_num_threads(2)
    for size in (1, 3, 80):
        parts = [results(slice(i, min(i + size, 80))) for i in range(0, 80, size)]
        for got, want in zip(zip(*parts, strict=True), whole, strict=True):
            assert torch.equal(torch.cat(got), want)


def test_a_sum_of_products(kernel):
    (hidden, weight, bias), labels, support = problem()
    results = []
    for parts in ([hidden], [weight]), (hidden.split((60, 12), 1), weight.split((60, 12), 1)):
        h, w = ([x.detach().requires_grad_() for x in part] for part in parts)
        logp = linear_token_logprobs(h, w, labels, bias=bias, support=support)
        grads = torch.autograd.grad(logp.sum(), [*h, *w])
        results.append((logp, torch.cat(grads[: len(h)], 1), torch.cat(grads[len(h) :], 1)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_loss_of_kept_sets(kernel, level):
    """linear_token_loss calls its function once, with what linear_token_logprobs gives."""
    inputs, labels, support = problem()
    calls = []

    def token_loss(logp, entropy, rows):
        calls.append(rows)
        return (logp.sin() + 0.1 * entropy).sum(), None

    ours, others = leaves(*inputs), leaves(*inputs)
    loss, _ = linear_token_loss(
        *ours[:2], labels, token_loss, bias=ours[2], support=support, level=level
    )
    assert len(calls) == 1 and calls[0].tolist() == list(range(len(labels)))
    both = linear_token_logprobs(
        *others[:2], labels, bias=others[2], support=support, return_entropy=True
    )
    want, _ = token_loss(*both, calls[0])
    assert torch.equal(loss, want)
    grads = (torch.autograd.grad(x, leaf) for x, leaf in ((loss, ours), (want, others)))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


IDS, OFFSETS = torch.tensor([1, 2, 0, 3]), torch.tensor([0, 2, 4])


@pytest.mark.parametrize(
    ("error", "message", "support"),
    [
        (TypeError, r"support must be a pair \(token_ids, offsets\), got Tensor", IDS),
        (TypeError, "support's offsets must be a tensor, got list", (IDS, [0, 2, 4])),
        (TypeError, "support's token_ids must be int32 or int64 and flat, got torch.float32",
         (IDS.float(), OFFSETS)),
        (TypeError, r"must be int32 or int64 and flat, got torch.int64 \(2, 2\)",
         (IDS.view(2, 2), OFFSETS)),
        (ValueError, "support's offsets are 2, one more than 2 rows needed", (IDS, OFFSETS[1:])),
        (ValueError, "begin at 0, never fall, and end at the number of token_ids, 4, got 0 to 3",
         (IDS, torch.tensor([0, 2, 3]))),
        (ValueError, "got 1 to 4", (IDS, torch.tensor([1, 2, 4]))),
        (ValueError, "never fall", (IDS, torch.tensor([0, 5, 4]))),
        (ValueError, "token_ids holds 1 at 1 after 2, must rise within a set",
         (torch.tensor([2, 1, 0, 3]), OFFSETS)),
        (ValueError, "token_ids holds 3 at 3 after 3", (torch.tensor([1, 2, 3, 3]), OFFSETS)),
        (IndexError, r"token_ids holds 5 at 3, outside \[0, 5\)",
         (torch.tensor([1, 2, 0, 5]), OFFSETS)),
        (IndexError, r"token_ids holds -1 at 2, outside", (torch.tensor([1, 2, -1, 3]), OFFSETS)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("function", [linear_token_logprobs, linear_token_loss])
def test_bad_arguments_raise(kernel, function, error, message, support):
    here = torch.get_default_device()
    if isinstance(support, tuple):
        support = tuple(x.to(here) if isinstance(x, torch.Tensor) else x for x in support)
    arguments = [torch.zeros(2, 4), torch.zeros(5, 4), torch.tensor([1, 3])]
    if function is linear_token_loss:
        arguments.append(lambda logp, entropy, rows: (logp.sum(), None))
    with pytest.raises(
        error, match=rf"^linear_token_log\w+: .*{message}|^linear_token_loss: .*{message}"
    ):
        function(*arguments, support=support)


def test_registration():
    (hidden, weight, bias), labels, support = problem(sizes=(5, 0, 3))
    labels[2] = -100
    t = torch.tensor(0.7)
    rows = linear_rows.Inputs([hidden], [weight], bias, labels, t, 0.0, -100, torch.float32)
    x = page.Inputs(rows, Support(*support))
    check_registration(page.linear_support_op, x)
    _, entropy, stats, logits = page.linear_support_op(x)
    for wanted in ([True, True, True], [True, False, False], [False, True, False]):
        grad = torch.randn(3)
        upstream = page.BackwardInputs(x, grad, None, entropy, stats, logits, wanted)
        check_registration(page.linear_support_backward_op, upstream)
    sampled = products.SampledInputs(hidden, weight, *support)
    check_registration(products.sampled_product_op, sampled)
    check_registration(products.sparse_product_op, products.SparseInputs(weight, logits, *support))


def test_compile():
    inputs, labels, support = problem()

    def function(hidden, weight, bias):
        return linear_token_logprobs(
            hidden, weight, labels, bias=bias, support=support, return_entropy=True
        )

    results = []
    for f in (torch.compile(function, backend="aot_eager", fullgraph=True), function):
        ours = leaves(*inputs)
        outputs = f(*ours)
        results.append([*outputs, *gradients(*outputs, ours)])
    assert all(map(torch.equal, *results))
