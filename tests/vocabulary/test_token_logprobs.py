import math

import pytest
import torch
from accuracy import GRADIENT_TOLERANCE, TOLERANCE, assert_no_worse, leaves
from registration import check_registration
from torch._dynamo.testing import CompileCounterWithBackend

from bench.inputs import DEVICE, logits_and_labels
from fastpg import check, token_logprobs
from fastpg.ops.vocabulary import token_logprobs as page

OP = "token_logprobs"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [
    ((1,), 1),  # the smallest
    ((3, 7), 129),  # no multiple of any vector
    ((2, 1), 8192),  # one slice of the kernel
    ((5,), 8193),  # and one logit more
    ((2, 33), 257),  # more rows than the few that are split by slices
    ((2, 2, 3), 64),  # three leading axes
    ((0,), 10),  # no rows
]


def by_torch(logits, labels, temperature=1.0, softcap=None):
    """(logp, entropy) as PyTorch code is commonly written."""
    z = softcap * torch.tanh(logits / softcap) if softcap else logits
    logp = (z / temperature).log_softmax(-1)
    return logp.gather(-1, labels[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "vocab"), SHAPES)
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, 30.0)])
def test_matches_reference(kernel, shape, vocab, dtype, temperature, softcap):
    if kernel == "triton":
        shape = *shape[:-1], min(shape[-1], 7)  # The interpreter is slow.
    logits, labels = logits_and_labels(shape, vocab, dtype)
    options = {"temperature": temperature, "softcap": softcap}
    (x,), (x64,), (native,) = leaves(logits), leaves(logits.double()), leaves(logits)
    ours = token_logprobs(x, labels, return_entropy=True, **options)
    oracle, torchs = by_torch(x64, labels, **options), by_torch(native, labels, **options)
    for got, want, baseline in zip(ours, oracle, torchs, strict=True):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_no_worse(got, baseline, want, TOLERANCE[dtype])
    for outputs in (ours, oracle, torchs):
        weights = (torch.linspace(-1, 1, o.numel()).view(o.shape) for o in outputs)
        sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True)).backward()
    assert x.grad.dtype == dtype
    assert_no_worse(x.grad, native.grad, x64.grad, GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradients(kernel, softcap):
    logits, labels = logits_and_labels((2, 3), 11, torch.float64)
    labels[0, 1] = -100
    temperature = torch.tensor([[0.7], [1.3]], dtype=torch.float64)
    options = {"temperature": temperature, "softcap": softcap}

    def both(x):
        return token_logprobs(x, labels, return_entropy=True, **options)

    (x,) = leaves(logits)
    assert torch.autograd.gradcheck(both, x)
    for one in (lambda x: token_logprobs(x, labels, **options), lambda x: both(x)[1]):
        assert torch.autograd.gradcheck(one, x, fast_mode=True)
    assert not token_logprobs(logits, labels).requires_grad


def test_gradients_of_expanded_and_strided_grad_output(kernel):
    logits, labels = logits_and_labels((2, 3), 11, torch.float64)
    (x,) = leaves(logits)
    for upstream in (torch.ones(()).double().expand(2, 3), torch.randn(3, 2).double().t()):
        got, *_ = torch.autograd.grad(token_logprobs(x, labels), x, upstream)
        want, *_ = torch.autograd.grad(by_torch(x, labels)[0], x, upstream)
        torch.testing.assert_close(got, want)


def record(logits, labels, *, temperature=0.7, softcap=0.0, with_entropy=True):
    """The inputs of the op."""
    temperature = torch.tensor(temperature, dtype=torch.float32)
    return page.Inputs(logits, labels, temperature, softcap, -100, with_entropy)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "last axis", "empty"])
def test_registration(layout, with_entropy):
    logits, labels = logits_and_labels((0 if layout == "empty" else 4, 3), 7)
    if layout == "transposed":
        logits, labels = logits.transpose(0, 1), labels.t()
    if layout == "expanded":
        logits = logits[:1].expand(4, 3, 7)
    if layout == "last axis":
        logits = logits.repeat_interleave(2, -1)[..., ::2]
    x = record(logits, labels, with_entropy=with_entropy)
    check_registration(page.token_logprobs_op, x)
    logp, entropy, stats = page.token_logprobs_op(x)
    upstream = torch.randn_like(logp)
    gradient = page.BackwardInputs(x, upstream, None, None, stats)
    if with_entropy:
        gradient = gradient._replace(grad_entropy=upstream, entropy=entropy)
    check_registration(page.token_logprobs_backward_op, gradient)
    into = page.BackwardOutInputs(gradient, torch.empty(logits.shape))
    check_registration(page.token_logprobs_backward_out_op, into)


def test_the_dispatcher_brings_cuda_tensors_to_triton(kernel, monkeypatch):
    if kernel != "triton":
        pytest.skip("of the kernel's attachment")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # that of a tensor on the CPU
    x = record(*logits_and_labels(3, 50))
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    dispatched = torch.ops.fastpg.token_logprobs.default.redispatch(cuda, *x)
    assert all(map(torch.equal, dispatched, page.token_logprobs_op(x)))


def test_compile(compiler):
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(token_logprobs, backend=counter, fullgraph=True, dynamic=True)
    for rows, vocab, temperature in [(4, 300, 0.7), (6, 500, 0.9), (5, 400, 1.1)]:
        logits, labels = logits_and_labels(rows, vocab)
        results = []
        for function in (compiled, token_logprobs):
            (x,) = leaves(logits)
            logp, entropy = function(x, labels, temperature=temperature, return_entropy=True)
            (logp + 0.3 * entropy).sum().backward()
            results.append((logp, entropy, x.grad))
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)
    assert counter.frame_count == 1


LOGITS = torch.zeros(2, 5)
LABELS = torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("error", "message", "logits", "labels", "options"),
    [
        (IndexError, "labels holds 5", LOGITS, torch.tensor([1, 5]), {}),
        (IndexError, "labels holds -1", LOGITS, torch.tensor([-1, 0]), {}),
        (IndexError, "labels holds 4294967299", LOGITS, torch.tensor([0, 2**32 + 3]), {}),
        (ValueError, r"labels \(3,\)", LOGITS, torch.tensor([1, 2, 3]), {}),
        (TypeError, "labels must be integers, got torch.float32", LOGITS, LABELS.float(), {}),
        (TypeError, "labels must be integers, got torch.bool", LOGITS, LABELS.bool(), {}),
        (TypeError, "logits must be floating point, got torch.int64", LOGITS.long(), LABELS, {}),
        (TypeError, "logits must be bf16, .* got torch.float8_e4m3fn",
         LOGITS.to(torch.float8_e4m3fn), LABELS, {}),
        (ValueError, r"must be \[..., V\], got \(2, 0\)", torch.zeros(2, 0), LABELS, {}),
        (ValueError, "labels on .*, expected meta", LOGITS.to("meta"), LABELS, {}),
        (ValueError, "temperature and its inverse .* > 0", LOGITS, LABELS, {"temperature": 0}),
        (ValueError, "temperature .* in torch.float32, got 1e-39", LOGITS, LABELS,
         {"temperature": 1e-39}),
        (ValueError, "temperature .* got 1e[+]39", LOGITS, LABELS, {"temperature": 1e39}),
        (ValueError, "temperature .* got nan", LOGITS, LABELS, {"temperature": math.nan}),
        (ValueError, "temperature holds -1", LOGITS, LABELS, {"temperature": -LABELS}),
        (ValueError, "temperature holds 0", LOGITS, LABELS, {"temperature": 0 * LABELS}),
        (ValueError, "temperature holds 9.99995e-41", LOGITS, LABELS,
         {"temperature": torch.tensor(1e-40)}),
        (ValueError, "ignore_index must fit into int64, got 92", LOGITS, LABELS,
         {"ignore_index": 2**63}),
        (ValueError, r"temperature \(3,\) does", LOGITS, LABELS, {"temperature": torch.ones(3)}),
        (ValueError, "softcap .* finite and > 0 .* got -1", LOGITS, LABELS, {"softcap": -1.0}),
    ],
)  # fmt: skip
def test_bad_arguments_raise(kernel, error, message, logits, labels, options):
    if kernel in DEVICE and message.startswith("temperature holds"):
        pytest.skip("test_a_device_spoils_the_row_of_a_bad_value")
    here = torch.get_default_device()
    labels, logits = labels.to(here), logits if logits.is_meta else logits.to(here)
    options = {k: v.to(here) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with pytest.raises(error, match=message):
        token_logprobs(logits, labels, **options)
        check()  # raises for the kernels of a device


def test_only_tensors():
    with pytest.raises(TypeError, match="logits must be a tensor, got list"):
        token_logprobs([[0.0]], LABELS)
    with pytest.raises(TypeError, match="labels must be a tensor, got list"):
        token_logprobs(LOGITS, [1, 2])


def test_a_device_spoils_the_row_of_a_bad_value(kernel):
    if kernel not in DEVICE:
        pytest.skip("the CPU raises")
    logits, labels = logits_and_labels(5, 33)
    labels[1], labels[3], temperature = 33, -(2**40), torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0])
    (x,) = leaves(logits)
    logp, entropy = token_logprobs(x, labels, temperature=temperature, return_entropy=True)
    (logp.sum() + entropy.sum()).backward()
    for rows in (logp[:, None], entropy[:, None], x.grad):
        assert rows[1:4].isnan().all() and rows[[0, 4]].isfinite().all()
    with pytest.raises(IndexError, match=r"labels holds .* at row [13], and 1 more"):
        check()
    check()  # once


@pytest.mark.parametrize("vocab", [40, 20000])
def test_minus_infinity_is_an_ordinary_logit(kernel, vocab):
    logits, labels = logits_and_labels(6, vocab)
    logits[0, : vocab - 8] = -math.inf  # whole slices, the first one included
    logits[1, 1::2] = -math.inf
    logits[2] = -math.inf
    logits[3, labels[3]] = -math.inf
    labels[0], labels[1] = vocab - 3, 2
    (x,) = leaves(logits)
    logp, entropy = token_logprobs(x, labels, return_entropy=True)
    want, _ = by_torch(logits.double(), labels)
    assert torch.allclose(logp[[0, 1, 4, 5]].double(), want[[0, 1, 4, 5]], atol=1e-5)
    assert logp[2] == logp[3] == -math.inf
    assert entropy[2] == 0 and entropy.isfinite().all() and (entropy >= 0).all()
    (logp[[0, 1, 4, 5]].sum() + logp[[2, 3]].sum() + entropy.sum()).backward()
    assert x.grad.isfinite().all()
    assert (x.grad[logits == -math.inf] == 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_logit_spoils_its_own_row_only(kernel, poison):
    logits, labels = logits_and_labels((4,), 9000)
    clean = token_logprobs(logits, labels, return_entropy=True)
    logits[1, 8500] = poison
    (x,) = leaves(logits)
    for got, want in zip(token_logprobs(x, labels, return_entropy=True), clean, strict=True):
        assert got[1].isnan()
        assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])
        got.sum().backward(retain_graph=True)
    assert x.grad[1].isnan().any() and x.grad[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_ignored_rows_are_never_read(kernel, poison):
    logits, labels = logits_and_labels((40,), 33)
    labels[::3] = 99
    grads = []
    for value in (0.0, poison):
        logits[::3] = value
        (x,) = leaves(logits)
        logp, entropy = token_logprobs(x, labels, return_entropy=True, ignore_index=99)
        (logp.sum() + entropy.sum()).backward()
        assert (logp[::3] == 0).all() and (entropy[::3] == 0).all() and (x.grad[::3] == 0).all()
        grads.append(torch.cat([logp, entropy, x.grad.flatten()]))
    assert torch.equal(*grads)


@pytest.mark.parametrize("vocab", [1000, 20000])
def test_a_row_depends_on_itself_alone(kernel, vocab):
    """Not on its batch, strides, threads, or on whether a gradient or the entropy is wanted."""
    if kernel == "reference":
        pytest.skip("row purity is a promise of the kernels")
    rows, few, half = (6, 2, 3) if kernel == "triton" else (70, 7, 33)  # the interpreter is slow
    logits, labels = logits_and_labels((rows,), vocab)
    whole = token_logprobs(logits, labels)
    strided = torch.empty(rows, 2, vocab)[:, 0].copy_(logits)
    unaligned = torch.empty(rows * vocab + 1)[1:].view(rows, vocab).copy_(logits)
    torch.set_num_threads(3)
    three_threads = token_logprobs(logits, labels)
    few_rows = token_logprobs(logits[:few], labels[:few])
    torch.set_num_threads(1)
    (x,) = leaves(logits)
    for other in (
        torch.cat([token_logprobs(logits[i : i + 1], labels[i : i + 1]) for i in range(rows)]),
        torch.cat([token_logprobs(logits[i], labels[i]) for i in (slice(half), slice(half, None))]),
        token_logprobs(strided, labels),
        token_logprobs(unaligned, labels),
        token_logprobs(logits, labels, temperature=torch.ones(rows)),
        token_logprobs(x, labels),
        token_logprobs(x, labels, return_entropy=True)[0],
        three_threads,
        torch.cat([few_rows, whole[few:]]),
    ):  # fmt: skip
        assert torch.equal(whole, other)


LAYOUTS = {  # from logits [4, 5, 36]
    "shifted": lambda x: x[:, :-1],
    "transposed": lambda x: x.transpose(0, 1),
    "expanded": lambda x: x[:, :1].expand(4, 5, 36),
    "last axis": lambda x: x[..., ::2],
    "offset": lambda x: x.flatten()[3:].unfold(0, 30, 31),
    "four axes": lambda x: x.view(2, 2, 5, 36)[:, :, :-1],
    "four axes that need a copy": lambda x: x.view(2, 2, 5, 36).transpose(0, 1),
}


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_give_the_same_values_and_gradients(kernel, layout, dtype):
    base, _ = logits_and_labels((4, 5), 36, dtype)
    logits = LAYOUTS[layout](base)
    before = logits.clone()
    labels = torch.arange(logits[..., 0].numel()).view(logits.shape[:-1]) % logits.shape[-1]
    x = logits.detach().requires_grad_()
    assert x.stride() == logits.stride()
    (x64,), (native,) = leaves(before.double()), leaves(before)
    ours = token_logprobs(x, labels.int(), return_entropy=True)
    oracle, torchs = by_torch(x64, labels), by_torch(native.float(), labels)
    for got, want, baseline in zip(ours, oracle, torchs, strict=True):
        assert_no_worse(got, baseline, want, TOLERANCE[dtype])
    upstream = torch.linspace(-1, 1, labels.numel(), dtype=torch.float64).view(labels.shape)
    for outputs in (ours, oracle, torchs):
        sum((output.double() * upstream).sum() for output in outputs).backward()
    assert_no_worse(x.grad, native.grad, x64.grad, GRADIENT_TOLERANCE[dtype])
    assert torch.equal(before, logits)


def test_offsets_beyond_two_to_the_31(kernel):
    """Rows 2^30 elements apart: pages that are never touched cost nothing."""
    if kernel == "reference":
        pytest.skip("the reference computes with torch's own offsets")
    logits, labels = logits_and_labels(3, 50, torch.bfloat16)
    torch.use_deterministic_algorithms(False)  # it would fill, and so touch, them all
    far = torch.empty(2**31 + 2**30, dtype=torch.bfloat16).as_strided((3, 50), (2**30, 1))
    far.copy_(logits)
    results = []
    for x in (far.detach().requires_grad_(), *leaves(logits)):
        logp = token_logprobs(x, labels)
        results.append((logp, *torch.autograd.grad(logp.sum(), x)))
    assert all(map(torch.equal, *results))


def test_more_rows_than_an_axis_of_a_grid(kernel):
    if kernel == "triton":
        pytest.skip("the interpreter takes minutes")
    logits, labels = logits_and_labels(70_000, 8)
    torchs, oracle = by_torch(logits, labels)[0], by_torch(logits.double(), labels)[0]
    assert_no_worse(token_logprobs(logits, labels), torchs, oracle, 2e-6)


def test_cuda_graph(kernel):
    """Nothing synchronises or depends on the values, and replays give the same bits."""
    if kernel != "cuda":
        pytest.skip("for a GPU")
    (x, other), labels = [logits_and_labels(6, 5000, seed=i)[0] for i in (0, 1)], torch.arange(6)
    x.requires_grad_()

    def step():
        logp, entropy = token_logprobs(x, labels, return_entropy=True)
        return logp, entropy, *torch.autograd.grad(logp.sum() + entropy.sum(), x)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(other)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_rows_that_no_gradient_reaches_are_not_read_backward(kernel, dtype):
    if kernel == "reference":
        pytest.skip("the kernels skip them")
    logits, labels = logits_and_labels(4, 300, dtype)
    logits[1, 7] = math.nan
    (x,) = leaves(logits)
    logp, entropy = token_logprobs(x, labels, return_entropy=True)
    (logp + entropy)[[0, 2, 3]].sum().backward()
    assert (x.grad[1] == 0).all() and (x.grad[[0, 2, 3]] != 0).any(-1).all()


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_the_gradient_may_overwrite_the_logits(kernel, dtype, softcap):
    """And a label that is nowhere in the row adds nothing to it: the row may be a slice."""
    logits, labels = logits_and_labels(4, 9000, dtype)
    x = record(logits, labels, softcap=softcap)
    _, entropy, stats = page.token_logprobs_op(x)
    grad_logp, grad_entropy = torch.randn(2, 4)
    gradient = page.BackwardInputs(x, grad_logp, grad_entropy, entropy, stats)
    want = page.token_logprobs_backward_op(gradient).grad_logits
    halves = logits[:, :4500].contiguous(), logits[:, 4500:].contiguous()
    for begin, half in zip((0, 4500), halves, strict=True):
        of_half = gradient._replace(inputs=x._replace(logits=half, labels=labels - begin))
        page.token_logprobs_backward_out_op(page.BackwardOutInputs(of_half, half))
    assert_no_worse(torch.cat(halves, 1), want, want.double(), GRADIENT_TOLERANCE[dtype] * 1e-3)
    page.token_logprobs_backward_out_op(page.BackwardOutInputs(gradient, logits))
    assert torch.equal(logits, want)


def test_probabilities_sum_to_one(kernel):
    vocab = 100 if kernel == "triton" else 500
    logits, _ = logits_and_labels(1, vocab)
    logp = token_logprobs(logits.expand(vocab, vocab), torch.arange(vocab))
    assert abs(logp.double().exp().sum() - 1) < 2e-6
    assert (logp <= 0).all()


def test_large_logits_do_not_cancel(kernel):
    logits, labels = logits_and_labels(8, 2000)
    moved = (logits + 4096).double()
    want = by_torch(moved, labels)
    got = token_logprobs(moved.float(), labels, return_entropy=True)
    for ours, oracle in zip(got, want, strict=True):
        assert (ours - oracle).abs().max() < 1e-5


def test_gradient_keeps_its_digits_as_the_label_becomes_certain(kernel):
    logits = torch.tensor([[9.0, 0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    token_logprobs(logits, torch.tensor([0])).sum().backward()
    x64 = logits.detach().double().requires_grad_()
    by_torch(x64, torch.tensor([0]))[0].sum().backward()  # 1 - p = 2.5e-4; 1 - bf16(p) would be 0
    torch.testing.assert_close(logits.grad.double(), x64.grad, rtol=2**-8, atol=0)


def test_double_backward_raises(kernel):
    logits, labels = logits_and_labels(2, 5)
    (x,) = leaves(logits)
    loss = token_logprobs(x, labels).sum()
    with pytest.raises(RuntimeError, match="token_logprobs: its gradient is not differentiable"):
        torch.autograd.grad(loss, x, create_graph=True)
