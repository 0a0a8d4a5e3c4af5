import math

import kernels
import pytest
import torch
from accuracy import GRADIENT_TOLERANCE, TOLERANCE, assert_no_worse, leaves
from registration import check_registration
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from bench.inputs import head_and_labels
from fastpg import check, linear_token_logprobs
from fastpg.ops.vocabulary import head as head_module
from fastpg.ops.vocabulary import linear_rows as page

OP = "linear_rows"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TUNED = {"temperature": 0.7, "softcap": 20.0, "logit_scale": 0.5}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that small problems take several, and the last ones are of another size."""
    monkeypatch.setattr(head_module, "WIDTH", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(head_module, "ROWS", {"cpu": 16, "cuda": 16})


def by_torch(
    hidden, weight, bias, labels, temperature=1.0, softcap=None, logit_scale=1.0, rounded=None
):
    """(logp, entropy) as PyTorch code is commonly written; at the logits `rounded`, if given."""
    z = torch.nn.functional.linear(hidden, weight, bias)
    z = z if rounded is None else z + (rounded - z).detach()
    z = (z.float() if z.dtype != torch.float64 else z) * logit_scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    logp = z.div(temperature).log_softmax(-1)
    return logp.gather(-1, labels[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def gradients(outputs, inputs):
    """Of a weighted sum of log-probs and entropies."""
    weights = (torch.linspace(-1, 2, o.numel()).view(o.shape) for o in outputs)
    total = sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(total, [x for x in inputs if x is not None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, TUNED])
@pytest.mark.parametrize(
    ("shape", "vocab", "with_bias"),
    [
        ((1,), 1, False),  # the smallest
        ((2, 3, 3), 150, True),  # three slices, three leading axes
        ((40,), 128, False),  # whole slices
        ((0,), 70, True),  # no rows
        ((), 70, True),  # one row alone
    ],
)
def test_matches_reference(kernel, shape, vocab, with_bias, dtype, options):
    hidden, weight, bias, labels = head_and_labels(shape, vocab, 24, dtype)
    inputs = hidden, weight, bias if with_bias else None
    ours, native = leaves(*inputs), leaves(*inputs)
    exact = leaves(*(x if x is None else x.double() for x in inputs))
    got = linear_token_logprobs(*ours[:2], labels, bias=ours[2], return_entropy=True, **options)
    rounded = torch.nn.functional.linear(*inputs).double()  # as the model's own head does
    want = by_torch(*exact, labels, **options, rounded=rounded)
    baseline = by_torch(*native, labels, **options)
    for g, b, w in zip(got, baseline, want, strict=True):
        assert g.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_no_worse(g, b, w, TOLERANCE[dtype])
    grads = (gradients(o, i) for o, i in ((got, ours), (baseline, native), (want, exact)))
    for g, b, w in zip(*grads, strict=True):
        assert g.dtype == dtype
        assert_no_worse(g, b, w, GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("options", [{}, TUNED])
def test_gradients(kernel, options):
    hidden, weight, bias, labels = head_and_labels((2, 3), 70, 4, torch.float64)
    labels[0, 1] = -100

    def both(hidden, weight, bias):
        return linear_token_logprobs(
            hidden, weight, labels, bias=bias, return_entropy=True, **options
        )

    inputs = leaves(hidden, weight, bias)
    assert torch.autograd.gradcheck(both, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *x: both(*x)[1], inputs, fast_mode=True)
    assert not linear_token_logprobs(hidden, weight, labels).requires_grad


def test_only_what_requires_a_gradient_gets_one(kernel):
    hidden, weight, bias, labels = head_and_labels((9,), 150, 8)
    all_three = leaves(hidden, weight, bias)
    want = gradients([linear_token_logprobs(*all_three[:2], labels, bias=all_three[2])], all_three)
    for chosen in range(1, 8):
        inputs = [x.detach().requires_grad_(bool(chosen >> i & 1)) for i, x in enumerate(all_three)]
        linear_token_logprobs(*inputs[:2], labels, bias=inputs[2]).mul(
            torch.linspace(-1, 2, 9)
        ).sum().backward()
        for x, w in zip(inputs, want, strict=True):
            if not x.requires_grad:
                assert x.grad is None
            else:
                torch.testing.assert_close(x.grad, w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("with_bias", [True, False])
def test_registration(with_bias):
    hidden, weight, bias, labels = head_and_labels((5,), 70, 8)
    labels[1] = -100
    x = page.Inputs(
        hidden=[hidden],
        head_weight=[weight],
        bias=bias if with_bias else None,
        labels=labels,
        temperature=torch.tensor(0.7),
        softcap=0.0,
        ignore_index=-100,
        logits_dtype=torch.float32,
    )
    check_registration(page.linear_token_logprobs_op, x)
    _, entropy, stats = page.linear_token_logprobs_op(x)
    for wanted in ([True, True, with_bias], [True, False, False], [False, True, False]):
        grad_logp, grad_entropy = torch.randn(5), None if wanted[1] else torch.randn(5)
        gradient = page.BackwardInputs(x, grad_logp, grad_entropy, entropy, stats, wanted)
        check_registration(page.linear_token_logprobs_backward_op, gradient)


def test_compile(compiler):
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(linear_token_logprobs, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for rows, vocab, temperature in [(4, 150, 0.7), (6, 130, 0.9), (5, 140, 1.1)]:
        *inputs, labels = head_and_labels((rows,), vocab, 8)
        labels[1] = -100
        results = []
        for function in (compiled, linear_token_logprobs):
            hidden, weight, bias = leaves(*inputs)
            outputs = function(
                hidden, weight, labels, bias=bias, temperature=temperature, return_entropy=True
            )
            results.append((*outputs, *gradients(outputs, (hidden, weight, bias))))
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


HIDDEN, WEIGHT, LABELS = torch.zeros(2, 4), torch.zeros(5, 4), torch.tensor([1, 2])


class Gathered(torch.Tensor):
    """As far as the check can tell, a DTensor."""


SHARDED = WEIGHT.as_subclass(Gathered)
SHARDED.full_tensor = lambda: WEIGHT


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (IndexError, "linear_token_logprobs: labels holds 5", {"labels": torch.tensor([1, 5])}),
        (ValueError, r"labels \(3,\)", {"labels": torch.tensor([1, 2, 3])}),
        (TypeError, "labels must be integers, got torch.float32", {"labels": LABELS.float()}),
        (ValueError, r"weight \[V, H\], got \(2, 4\) and \(5, 3\)", {"weight": torch.zeros(5, 3)}),
        (ValueError, r"got \(2, 4\) and \(4,\)", {"weight": torch.zeros(4)}),
        (ValueError, r"at least one token, got \(0, 4\)", {"weight": torch.zeros(0, 4)}),
        (TypeError, "weight is torch.bfloat16, must be of hidden's torch.float32",
         {"weight": WEIGHT.bfloat16()}),
        (TypeError, "bias is torch.float64", {"bias": torch.zeros(5).double()}),
        (ValueError, r"bias \(4,\) must be \(5,\)", {"bias": torch.zeros(4)}),
        (ValueError, "weight on meta, expected", {"weight": WEIGHT.to("meta")}),
        (TypeError, "hidden is a DTensor: pass hidden.to_local", {"hidden": SHARDED}),
        (TypeError, "hidden must be floating point", {"hidden": HIDDEN.long(),
                                                      "weight": WEIGHT.long()}),
        (TypeError, "weight must be a tensor, got int", {"weight": [1]}),
        (ValueError, "a tensor each, or as many, got 1 and 2", {"weight": [WEIGHT, WEIGHT]}),
        (TypeError, "hidden must be a tensor, got generator", {"hidden": (x for x in [HIDDEN])}),
        (ValueError, "a tensor each, or as many, got 0 and 0", {"hidden": [], "weight": []}),
        (ValueError, r"hidden \(3, 4\) must be \(2, 4\)",
         {"hidden": [HIDDEN, torch.zeros(3, 4)], "weight": [WEIGHT, WEIGHT]}),
        (ValueError, r"weight \(6, 4\) must be \(5, 4\)",
         {"hidden": [HIDDEN, HIDDEN], "weight": [WEIGHT, torch.zeros(6, 4)]}),
        (TypeError, "hidden is torch.float64, must be of hidden's torch.float32",
         {"hidden": [HIDDEN, HIDDEN.double()], "weight": [WEIGHT, WEIGHT]}),
        (TypeError, "bias must be a tensor, got list", {"bias": [1]}),
        (TypeError, "logit_scale must be a number, got Parameter",
         {"logit_scale": torch.nn.Parameter(torch.ones(()))}),
        (ValueError, "logit_scale .* got 0", {"logit_scale": 0}),
        (ValueError, "softcap .* got -1", {"softcap": -1}),
        (ValueError, r"softcap / logit_scale .* got 1e\+60",
         {"softcap": 1e30, "logit_scale": 1e-30}),
        (ValueError, "temperature .* got 0", {"temperature": 0}),
        (ValueError, r"temperature / logit_scale .* got 1e\+60",
         {"temperature": 1e30, "logit_scale": 1e-30}),
        (ValueError, "temperature holds -1", {"temperature": torch.tensor([1.0, -1.0])}),
        (ValueError, "temperature holds -1", {"temperature": torch.tensor(-1.0),
                                                "logit_scale": 0.5}),
        (TypeError, "ignore_index must be an integer, got NoneType", {"ignore_index": None}),
        (TypeError, "process_group must be a .*ProcessGroup, got str", {"process_group": "tp"}),
        (ValueError, r"hidden must be \[..., H\], H > 0, got \(2, 0\)",
         {"hidden": torch.zeros(2, 0), "weight": torch.zeros(5, 0)}),
        (TypeError, "logits_dtype must be None, torch.float32, got torch.bfloat16",
         {"logits_dtype": torch.bfloat16}),
        (TypeError, "None, torch.float64, got torch.float32",
         {"hidden": HIDDEN.double(), "weight": WEIGHT.double(), "logits_dtype": torch.float32}),
    ],
)  # fmt: skip
def test_bad_arguments_raise(kernel, error, message, changes):
    if kernel == "cuda" and message.startswith("temperature holds"):
        pytest.skip("a GPU makes its row NaN")
    here = torch.get_default_device()
    args = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS} | changes
    args |= {
        name: x.to(here) for name, x in args.items() if type(x) is torch.Tensor and not x.is_meta
    }
    with pytest.raises(error, match=message):
        linear_token_logprobs(**args)
        check()  # raises for the kernels of a device


def test_rows_without_a_label_or_a_gradient_are_left_out(kernel):
    """Whatever stands in an ignored row; and backward a row whose gradient is exactly zero."""
    *inputs, labels = head_and_labels((9,), 150, 8)
    labels[::3] = -100
    results = []
    for value in (0.0, math.nan):
        hidden, weight, bias = leaves(*inputs)
        with torch.no_grad():
            hidden[::3] = value
        logp, entropy = linear_token_logprobs(
            hidden, weight, labels, bias=bias, return_entropy=True
        )
        assert (logp[::3] == 0).all() and (entropy[::3] == 0).all()
        upstream = torch.tensor([5.0, 1, 0, 5, 0, 2, 5, 0, 0])
        grads = torch.autograd.grad((logp * upstream).sum(), (hidden, weight, bias))
        assert (grads[0][upstream * (labels + 100) == 0] == 0).all()
        results.append((logp, entropy, *grads))
    assert all(map(torch.equal, *results))


def test_no_row_at_all(kernel):
    *inputs, labels = head_and_labels((3,), 150, 8)
    hidden, weight, bias = leaves(*inputs)
    logp = linear_token_logprobs(hidden, weight, torch.full_like(labels, -100), bias=bias)
    logp.sum().backward()
    assert logp.count_nonzero() == 0
    assert all(x.grad.count_nonzero() == 0 for x in (hidden, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_row_depends_on_itself_alone(kernel, dtype):
    """However few: the CPU's product of fewer than 4 rows in fp32 would round otherwise."""
    if kernel in ("reference", "cuda"):
        pytest.skip("row purity is a promise of the kernels, as far as BLAS keeps it")
    hidden, weight, bias, labels = head_and_labels((70,), 200, 48, dtype)

    def logp(rows, **options):
        return linear_token_logprobs(hidden[rows], weight, labels[rows], bias=bias, **options)

    whole = logp(slice(None))
    assert torch.equal(logp(slice(None), temperature=torch.ones(70)), whole)
    for size in (1, 3, 4, 7, 33):
        parts = [logp(slice(i, i + size)) for i in range(0, 70 - size, size)]
        assert torch.equal(torch.cat(parts), whole[: size * len(parts)])
    torch.set_num_threads(2)
    assert torch.equal(logp(slice(None)), whole)


def test_padded_vocabulary(kernel):
    """-inf in the bias, here a whole slice of it, is probability 0; a row of nothing else too."""
    hidden, weight, bias, labels = head_and_labels((6,), 200, 8)
    bias[64:128] = -math.inf
    labels = torch.where((labels >= 64) & (labels < 128), 0, labels)
    labels[0] = 70
    hidden, weight, bias = leaves(hidden, weight, bias)
    logp, entropy = linear_token_logprobs(hidden, weight, labels, bias=bias, return_entropy=True)
    rest = torch.cat([torch.arange(64), torch.arange(128, 200)])
    short = labels[1:] - 64 * (labels[1:] >= 128)
    want = by_torch(hidden[1:], weight[rest], bias[rest], short)
    torch.testing.assert_close((logp[1:], entropy[1:]), want)
    assert logp[0] == -math.inf
    grads = torch.autograd.grad(logp[1:].sum() + entropy.sum(), (hidden, weight, bias))
    assert all(g.isfinite().all() for g in grads) and (grads[1][64:128] == 0).all()
    nothing = linear_token_logprobs(
        hidden, weight, labels, bias=torch.full_like(bias, -math.inf), return_entropy=True
    )
    assert (nothing[0] == -math.inf).all() and (nothing[1] == 0).all()


def test_fp32_logits_of_bf16_operands(kernel):
    hidden, weight, bias, labels = head_and_labels((30,), 500, 64, torch.bfloat16)
    exact = by_torch(hidden.double(), weight.double(), bias.double(), labels)[0]
    errors = [
        (linear_token_logprobs(hidden, weight, labels, bias=bias, logits_dtype=dtype) - exact)
        .abs().max().item()
        for dtype in (torch.float32, None)
    ]  # fmt: skip
    assert errors[0] < 4e-6 < 4e-3 < errors[1]
    ours, others = (
        leaves(hidden, weight, bias),
        leaves(hidden.float(), weight.float(), bias.float()),
    )
    got = linear_token_logprobs(*ours[:2], labels, bias=ours[2], logits_dtype=torch.float32)
    for g, w in zip(
        gradients([got], ours), gradients(by_torch(*others, labels)[:1], others), strict=True
    ):
        assert g.dtype == torch.bfloat16
        assert (g - w).abs().max() < 8e-3 * w.abs().max()


def test_strided_inputs(kernel):
    base, weight, bias, labels = head_and_labels((4, 6), 150, 8)
    want = linear_token_logprobs(base[:, :-1].contiguous(), weight, labels[:, 1:].contiguous())
    got = linear_token_logprobs(
        base[:, :-1],
        weight.t().contiguous().t(),
        labels.int()[:, 1:],
        bias=bias.new_zeros(1).expand(150),
    )
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_autocast_inference_mode_and_checkpoint(kernel):
    *inputs, labels = head_and_labels((9,), 150, 8)
    half = [x.bfloat16() for x in inputs]
    want = linear_token_logprobs(*half[:2], labels, bias=half[2])
    hidden, weight, bias = leaves(*inputs)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        got = linear_token_logprobs(hidden, weight, labels, bias=bias)
    assert torch.equal(got, want)
    grads = torch.autograd.grad(got.sum(), (hidden, weight, bias))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
    with torch.inference_mode():
        assert torch.equal(linear_token_logprobs(*half[:2], labels, bias=half[2]), want)
    plain = linear_token_logprobs(hidden, weight, labels, bias=bias)
    again = checkpoint(
        lambda h: linear_token_logprobs(h, weight, labels, bias=bias), hidden, use_reentrant=False
    )
    for out in (plain, again):
        out.sum().backward()
    assert torch.equal(plain, again)


def test_triton_kernels_serve_the_slices(monkeypatch):
    """As on a GPU, but for the products: the slices' statistics and gradients by Triton."""
    *inputs, labels = head_and_labels((5,), 150, 8)

    def results():
        hidden, weight, bias = leaves(*inputs)
        outputs = linear_token_logprobs(hidden, weight, labels, bias=bias, return_entropy=True)
        return *outputs, *gradients(outputs, (hidden, weight, bias))

    expected = results()
    kernels.run_with(monkeypatch, "triton", "token_logprobs", cache=None)
    for got, want in zip(results(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_autocast_leaves_fp64_alone():
    hidden, weight, bias, labels = head_and_labels((9,), 150, 8, torch.float64)
    want = linear_token_logprobs(hidden, weight, labels, bias=bias)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_token_logprobs(hidden, weight, labels, bias=bias)
    assert got.dtype is torch.float64 and torch.equal(got, want)


def test_no_log_prob_is_above_0(kernel):
    """That of the only token is 0, however its softcap was rounded."""
    hidden, weight, _, labels = head_and_labels((200,), 1, 8)
    logp = linear_token_logprobs(hidden, weight, labels, softcap=20.0)
    assert logp.max() == 0 and logp.min() > -1e-5


def test_meta_tensors_have_the_shape_of_the_result():
    *head, labels = (x.to("meta") for x in head_and_labels((2, 3), 5, 4))
    assert linear_token_logprobs(*head[:2], labels).shape == (2, 3)


def test_double_backward_raises(kernel):
    *inputs, labels = head_and_labels((2,), 5, 4)
    hidden, weight, _ = leaves(*inputs)
    loss = linear_token_logprobs(hidden, weight, labels).sum()
    with pytest.raises(RuntimeError, match="linear_token_logprobs: its gradient is not differ"):
        torch.autograd.grad(loss, hidden, create_graph=True)
