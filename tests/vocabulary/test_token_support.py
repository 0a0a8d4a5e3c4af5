"""Log-probs over kept sets from logits, against logits with a mask."""

import math

import pytest
import torch
from accuracy import leaves
from registration import check_registration

from bench.inputs import logits_and_labels
from fastpg import token_logprobs
from fastpg.ops.vocabulary import token_logprobs as token_logprobs_page
from fastpg.ops.vocabulary import token_support as page
from fastpg.ops.vocabulary.support import Support

OP = "token_support"
VOCAB = 150
SIZES = (5, 1, 0, 40, VOCAB, 7)
TUNED = {"temperature": 0.7, "softcap": 4.0}


def problem(dtype=torch.float32):
    """Logits [2, 3, V], labels inside their sets, and the sets."""
    logits, _ = logits_and_labels((2, 3), VOCAB, dtype)
    random = torch.Generator(torch.get_default_device()).manual_seed(1)
    sets = [torch.randperm(VOCAB, generator=random)[:size].sort()[0] for size in SIZES]
    labels = torch.stack([kept[len(kept) // 2] if len(kept) else torch.tensor(9) for kept in sets])
    offsets = torch.tensor([0, *SIZES]).cumsum(0)
    return logits, labels.view(2, 3), (torch.cat(sets), offsets)


def with_a_mask(logits, labels, support, temperature=1.0, softcap=None):
    """(logp, entropy) of the logits, of which those outside the set are far below."""
    z = (softcap * torch.tanh(logits / softcap) if softcap else logits) / temperature
    outside = torch.ones(len(SIZES), VOCAB, dtype=torch.bool)
    for n in range(len(SIZES)):
        outside[n, support[0][support[1][n] : support[1][n + 1]]] = False
    outside[2] = False
    logp = z.masked_fill(outside.view(z.shape), -1e30).log_softmax(-1)
    return logp.gather(-1, labels[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def gradient(outputs, logits):
    upstream = torch.linspace(-1, 2, len(SIZES)).view(2, 3)
    return torch.autograd.grad(sum((x * upstream).sum() for x in outputs), logits)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, TUNED])
def test_matches_reference(kernel, dtype, options):
    logits, labels, support = problem(dtype)
    (ours,), (exact,) = leaves(logits), leaves(logits.double())
    got = token_logprobs(ours, labels, support=support, return_entropy=True, **options)
    want = with_a_mask(exact, labels, support, **options)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-6, atol=2e-6)
    g, w = gradient(got, ours), gradient(want, exact)
    assert g.dtype is dtype and g.is_contiguous()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float64: 1e-13}[dtype]
    assert (g - w).norm() <= tolerance * w.norm()


def test_gradients(kernel):
    logits, labels, support = problem(torch.float64)
    labels[0, 1] = -100

    def both(logits):
        return token_logprobs(logits, labels, support=support, return_entropy=True, **TUNED)

    assert torch.autograd.gradcheck(both, leaves(logits), fast_mode=True)


def test_a_label_outside_has_no_gradient(kernel):
    logits, labels, support = problem()
    kept = support[0][:5].tolist()
    labels[0, 0] = next(token for token in range(VOCAB) if token not in kept)
    (logits,) = leaves(logits)
    logp, entropy = token_logprobs(logits, labels, support=support, return_entropy=True)
    assert logp[0, 0] == -math.inf and entropy.isfinite().all()
    (grad,) = torch.autograd.grad(logp, logits, torch.ones(2, 3), retain_graph=True)
    assert grad.isfinite().all() and not grad[0, 0].any() and grad[1, 0].any()
    assert torch.autograd.grad(entropy[0, 0], logits)[0][0, 0].any()


def test_nothing_else_is_read(kernel):
    """Ignored rows and tokens in no set may be NaN, and get a gradient of exactly 0."""
    logits, labels, (token_ids, offsets) = problem()
    labels[0, 2], labels[1, 1] = -100, -100
    kept = torch.zeros(len(SIZES), VOCAB, dtype=torch.bool)
    for n in (0, 1, 3, 5):
        kept[n, token_ids[offsets[n] : offsets[n + 1]]] = True
    (spoiled,) = leaves(torch.where(kept.view(logits.shape), logits, math.nan))
    got = token_logprobs(spoiled, labels, support=(token_ids, offsets), return_entropy=True)
    want = token_logprobs(logits, labels, support=(token_ids, offsets), return_entropy=True)
    assert all(map(torch.equal, got, want))
    assert (got[0][labels == -100] == 0).all()
    if kernel != "reference":  # which multiplies NaN by 0
        grad = gradient(got, spoiled)
        assert grad.isfinite().all() and not grad.view(-1, VOCAB)[~kept].any()


def test_bad_arguments_raise(kernel):
    logits, labels, (token_ids, offsets) = problem()
    for error, message, support in (
        (TypeError, "support must be a pair", token_ids),
        (ValueError, "end at the number of token_ids, 202, got 0 to 203", (token_ids[1:], offsets)),
        (ValueError, "must rise within a set", (token_ids.flip(0), offsets)),
        (IndexError, r"outside \[0, 150\)", (token_ids + 1, offsets)),
    ):
        with pytest.raises(error, match=f"token_logprobs: .*{message}"):
            token_logprobs(logits, labels, support=support)
    with pytest.raises(ValueError, match="inplace_backward must be False with support"):
        token_logprobs(logits, labels, support=(token_ids, offsets), inplace_backward=True)


def test_registration():
    logits, labels, support = problem()
    labels = labels.view(-1)
    labels[3] = -100
    t = torch.tensor(0.7)
    rows = token_logprobs_page.Inputs(logits.view(-1, VOCAB), labels, t, 0.0, -100, True)
    x = page.Inputs(rows, Support(*support))
    check_registration(page.token_support_op, x)
    upstream = page.BackwardInputs(x, torch.randn(6), None)
    check_registration(page.token_support_backward_op, upstream)


def test_compile():
    logits, labels, support = problem()

    def function(logits):
        return token_logprobs(logits, labels, support=support, return_entropy=True)

    results = []
    for f in (torch.compile(function, backend="aot_eager", fullgraph=True), function):
        (ours,) = leaves(logits)
        outputs = f(ours)
        results.append([*outputs, gradient(outputs, ours)])
    assert all(map(torch.equal, *results))
