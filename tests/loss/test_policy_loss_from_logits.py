"""policy_loss_from_logits against the two ops that it is made of."""

import importlib
import importlib.util
import math

import pytest
import torch
from accuracy import GRADIENT_TOLERANCE, TOLERANCE, assert_no_worse, leaves
from registration import check_registration
from torch._dynamo.testing import CompileCounterWithBackend

from bench.inputs import DEVICE, logits_and_labels
from fastpg import check, policy_loss, policy_loss_from_logits, token_logprobs
from fastpg.ops.loss import policy_loss_from_logits as page
from fastpg.ops.loss.surrogates import LossOptions
from fastpg.ops.vocabulary import token_logprobs as rows_page

OP = "policy_loss_from_logits"
ROWS = {"temperature": 0.7, "softcap": 30.0, "ignore_index": -7}  # options of token_logprobs
CASES = {  # the options of the loss, and which optional tensors are given
    "on_policy": ({}, ""),
    "ppo": ({"clip": (0.1, None), "dual_clip": 1.3, "entropy_coef": -0.07}, "old_logp"),
    "reinforce": ({"surrogate": "reinforce", "entropy_coef": 0.07}, "old_logp"),
    "cispo": ({"surrogate": "cispo", "kl_coef": 0.1, "kl": "k3_naive"}, "old_logp ref_logp"),
    "sapo": ({"surrogate": "sapo", "kl_coef": 0.1, "kl": "k2"}, "old_logp ref_logp"),
    "all": ({"kl_coef": 0.1, "entropy_coef": 0.07}, "old_logp ref_logp"),
}


def sample(rows, vocab, dtype=torch.float32):
    """(logits, labels, the other tensors): a third of the tokens masked, the second row ignored."""
    logits, labels = logits_and_labels(rows, vocab, dtype)
    logp = token_logprobs(logits.double(), labels, temperature=0.7, softcap=30.0)
    noise = torch.randn(4, *labels.shape, dtype=torch.float64)
    tokens = {
        "advantages": noise[0],
        "weight": torch.where(noise[1] > -0.4, 0.5 + noise[1] ** 2, 0),
    }
    tokens |= {"old_logp": logp + 0.3 * noise[2], "ref_logp": logp + 0.2 * noise[3]}
    if labels.numel() > 1:
        labels.view(-1)[1], tokens["weight"].view(-1)[1] = -7, 0.0
    dtype = torch.float64 if dtype is torch.float64 else torch.float32
    return logits, labels, {name: x.to(dtype) for name, x in tokens.items()}


def by_two_ops(
    logits, labels, *tokens, entropy_coef=0.0, temperature, softcap, ignore_index, **rest
):
    of_rows = {"temperature": temperature, "softcap": softcap, "ignore_index": ignore_index}
    if entropy_coef == 0:
        return policy_loss(token_logprobs(logits, labels, **of_rows), *tokens, **rest)
    logp, entropy = token_logprobs(logits, labels, **of_rows, return_entropy=True)
    return policy_loss(logp, *tokens, entropy=entropy, entropy_coef=entropy_coef, **rest)


def run(function, inputs, case, scale=1, **options):
    """[loss, statistics, gradient of the logits]"""
    logits, labels, tokens = inputs
    given = [tokens["advantages"], tokens["weight"]]
    options |= CASES[case][0] | {name: tokens[name] for name in CASES[case][1].split()}
    (x,) = leaves(logits)
    loss, stats = function(x.view_as(x) * 1, labels, *given, **ROWS, **options)
    (scale * loss).backward()
    return loss.detach(), stats.values, x.grad


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_matches_the_two_ops_in_fp64(kernel, case, dtype):
    shapes = [((1,), 1), ((2, 3), 129), ((35,), 8195), ((2, 3), 136)]
    if kernel == "triton":
        shapes.remove(((35,), 8195))  # the interpreter is slow
    for rows, vocab in shapes:
        inputs = sample(rows, vocab, dtype)
        logits, labels, tokens = inputs
        exact = logits.double(), labels, {name: x.double() for name, x in tokens.items()}
        ours, oracle = run(policy_loss_from_logits, inputs, case), run(by_two_ops, exact, case)
        assert ours[0].dtype == tokens["weight"].dtype and ours[2].dtype == dtype
        for got, want in zip(ours[:2], oracle[:2], strict=True):
            finite = want.isfinite()
            assert_no_worse(got[finite], want[finite], want[finite], 3 * TOLERANCE[dtype])
        assert_no_worse(ours[2], oracle[2], oracle[2], 3 * GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_two_ops(kernel, case, dtype):
    """Bit for bit, where both run on the same kind of kernel."""
    if kernel in DEVICE:
        pytest.skip("other kernels serve the two ops in its tests")
    inputs = sample((3, 5), 8300, dtype)
    ours, theirs = (run(f, inputs, case) for f in (policy_loss_from_logits, by_two_ops))
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("case", CASES)
def test_in_place_is_out_of_place(kernel, case):
    inputs = sample((3, 2), 152, torch.bfloat16)
    plain = run(policy_loss_from_logits, inputs, case)
    assert all(map(torch.equal, plain, run(policy_loss_from_logits, inputs, case, inplace=True)))


def test_the_gradient_lies_where_the_logits_lay(kernel):
    logits, labels, tokens = sample((4,), 200)
    (x,) = leaves(logits)
    y = x * 1
    y.register_hook(lambda grad: seen.append(grad.data_ptr()))
    seen, address = [], y.data_ptr()
    policy_loss_from_logits(y, labels, *[*tokens.values()][:2], **ROWS, inplace=True)[0].backward()
    assert seen == [address]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_loss_may_be_scaled(kernel, inplace):
    inputs = sample((3, 2), 300)
    plain = run(policy_loss_from_logits, inputs, "all")[2]
    assert torch.equal(
        run(policy_loss_from_logits, inputs, "all", 0.25, inplace=inplace)[2], plain / 4
    )


# The others hold the ratio constant: their loss is not the integral of their gradient.
@pytest.mark.parametrize("case", ["ppo", "sapo", "all"])
def test_gradients(kernel, case):
    """By a central difference: gradcheck goes backward more than once."""
    inputs = logits, labels, tokens = sample((2, 3), 11, torch.float64)
    direction, steps = torch.randn_like(logits), torch.tensor([1e-6, -1e-6], dtype=torch.float64)
    moved = [(logits + step * direction, labels, tokens) for step in steps]
    loss, other = (run(policy_loss_from_logits, x, case)[0] for x in moved)
    along = (run(policy_loss_from_logits, inputs, case)[2] * direction).sum()
    torch.testing.assert_close(along, (loss - other) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "empty"])
def test_registration(layout):
    logits, labels, tokens = sample((0 if layout == "empty" else 4, 3), 7)
    if layout == "transposed":
        logits, labels = logits.transpose(0, 1), labels.t()
        tokens = {name: x.t() for name, x in tokens.items()}
    if layout == "expanded":
        logits = logits[:1].expand(4, 3, 7)
    options = LossOptions(0.8, 1.27, 3.0, 1.0, 1.05, 0.13, 0.07, 20.0, 0.0)
    traced = torch.tensor(options, dtype=torch.float64)
    for with_entropy in (True, False):
        rows = rows_page.Inputs(logits, labels, torch.tensor(0.7), 0.0, -7, with_entropy)
        out = torch.empty(logits.shape)
        x = page.Inputs(rows, out, page.Tokens(**tokens), "ppo", "k3", options, None)
        check_registration(page.policy_loss_from_logits_op, x)
        x = x._replace(surrogate="sapo", kl="k2", traced_options=traced)
        check_registration(page.policy_loss_from_logits_op, x)
    factor = torch.tensor(2.0)
    check_registration(page.scale_op, page.ScaleInputs(torch.ones(3), factor), traced=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses its own old parts
def test_compile(compiler):
    """One graph for all numbers; whether anything is in place is for the compiler to say."""

    def of_leaf(x, *args, **options):
        return policy_loss_from_logits(x * 1, *args, **options, inplace=True)

    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(of_leaf, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for rows, vocab, coef in [(4, 300, 0.1), (6, 500, 0.3), (5, 400, 0.2)]:
        logits, labels, tokens = sample((rows,), vocab)
        results = []
        for function in (compiled, of_leaf):
            (x,) = leaves(logits)
            loss, stats = function(x, labels, **tokens, **ROWS, kl_coef=coef, entropy_coef=coef)
            (2 * loss).backward()
            results.append((loss, stats.values, x.grad))
        compilations.append(counter.frame_count)
        torch.testing.assert_close(*results)
    assert len(set(compilations)) == 1


LOGITS, X = torch.zeros(2, 5, requires_grad=True), torch.ones(2)
LABELS = torch.tensor([1, 2])
BAD = [
    ({"labels": torch.tensor([1, 5])}, IndexError, "labels holds 5"),
    ({"labels": X}, TypeError, "labels must be integers, got torch.float32"),
    ({"labels": LABELS[:1]}, ValueError, r"labels \(1,\)"),
    ({"logits": LOGITS[0, 0]}, ValueError, r"logits must be \[..., V\]"),
    ({"temperature": 0.0}, ValueError, "temperature and its inverse must be finite and > 0"),
    ({"temperature": torch.tensor([1.0, -1.0])}, ValueError, "temperature holds -1"),
    ({"softcap": -1.0}, ValueError, "softcap .* finite and > 0"),
    ({"advantages": None}, TypeError, "advantages must be a tensor, got NoneType"),
    ({"advantages": X[:1]}, ValueError, r"advantages \(1,\) must be \(2,\)"),
    ({"weight": X[None]}, ValueError, r"weight \(1, 2\) must have the shape of advantages"),
    ({"old_logp": X.bool()}, TypeError, "old_logp must be floating point, got torch.bool"),
    ({"ref_logp": X.to("meta"), "kl_coef": 0.1}, ValueError, "ref_logp on meta"),
    ({"clip": 0.2}, ValueError, "clip must be a pair"),
    ({"surrogate": "gspo"}, ValueError, "surrogate must be one of .* got 'gspo'"),
    ({"kl_coef": 0.1}, ValueError, "kl_coef=0.1 needs ref_logp"),
    ({"kl": "k1"}, ValueError, "kl='k1' has expected gradient 0"),
    ({"entropy_coef": math.nan}, ValueError, "entropy_coef must be finite, got nan"),
    ({"inplace": True}, ValueError, "inplace=True would overwrite logits that are a leaf"),
    ({"logits": LOGITS.view(2, 5), "inplace": True}, ValueError, "inplace=True would overwrite"),
    ({"logits": (LOGITS * 1)[:, ::2], "inplace": True, "labels": LABELS}, ValueError,
     r"inplace=True needs contiguous logits, got \(2, 3\) by \(5, 2\)"),
]  # fmt: skip


@pytest.mark.parametrize("change, error, message", BAD, ids=lambda x: str(x)[:30])
def test_bad_arguments_raise(change, error, message):
    with pytest.raises(error, match=message):
        policy_loss_from_logits(
            **{"logits": LOGITS, "labels": LABELS, "advantages": X, "weight": X, **change}
        )


def test_a_bad_label_raises_before_anything_is_written():
    x = torch.randn(3, 50, requires_grad=True) * 1
    before, ones = x.detach().clone(), torch.ones(3)
    with pytest.raises(IndexError, match="labels holds 50 at row 2"):
        policy_loss_from_logits(x, torch.tensor([1, 2, 50]), ones, ones, inplace=True)
    assert torch.equal(x, before)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_masked_and_ignored_rows_are_never_read(kernel, poison):
    """Nor is what else is known of their tokens; ignore_index masks whatever the weight."""
    logits, labels, tokens = sample((9,), 300)
    tokens["weight"][:] = torch.arange(9) % 3
    labels[4] = -7
    masked = (tokens["weight"] == 0) | (labels == -7)
    results = []
    for value in (0.0, poison):
        logits[masked] = value
        for name in ("advantages", "old_logp", "ref_logp"):
            tokens[name][masked] = value
        results.append(run(policy_loss_from_logits, (logits, labels, tokens), "all"))
    assert all(map(torch.equal, *results))
    _, stats, grad = results[0]
    assert stats[0] == 4 and (grad[masked] == 0).all() and (grad[~masked] != 0).any(-1).all()


def test_minus_infinity_is_an_ordinary_logit(kernel):
    logits, labels, tokens = sample((3,), 100)
    logits[0, : labels[0]] = logits[2, labels[2] + 1 :] = -math.inf
    tokens["weight"][:], labels[1] = 1.0, 5
    (x,) = leaves(logits)
    given = {k: tokens[k] for k in ("advantages", "weight", "old_logp")}
    loss, _ = policy_loss_from_logits(x, labels, **given, entropy_coef=0.1)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
    assert (x.grad[logits == -math.inf] == 0).all() and (x.grad[:, 0] != 0).any()


def test_a_row_depends_on_itself_alone(kernel):
    """Not on its batch, strides or threads."""
    if kernel == "reference":
        pytest.skip("row purity is a promise of the kernels")
    logits, labels, tokens = sample((6,), 300 if kernel == "triton" else 20000)
    whole = run(policy_loss_from_logits, (logits, labels, tokens), "all")[2]
    torch.set_num_threads(3)
    threads = run(policy_loss_from_logits, (logits, labels, tokens), "all")[2]
    torch.set_num_threads(1)
    first = logits[:2], labels[:2], {name: x[:2] for name, x in tokens.items()}
    assert torch.equal(whole, threads)
    assert torch.equal(whole[:2], run(policy_loss_from_logits, first, "all")[2])


def test_without_a_gradient_nothing_is_written():
    inputs = sample((3, 2), 300)
    before = inputs[0].clone()
    for x in (inputs[0], inputs[0].clone().requires_grad_() * 1):
        with torch.set_grad_enabled(not x.requires_grad):
            loss, stats = policy_loss_from_logits(
                x, inputs[1], **inputs[2], **ROWS, **CASES["all"][0], inplace=True
            )
        want = run(policy_loss_from_logits, inputs, "all")
        assert not loss.requires_grad and torch.equal(x, before)
        assert torch.equal(loss, want[0]) and torch.equal(stats.values, want[1])


def test_logits_that_want_no_gradient_stay_in_a_dual_level():
    logits, labels, tokens = sample((4,), 50)
    before = logits.clone()
    with torch.autograd.forward_ad.dual_level():
        policy_loss_from_logits(logits, labels, **tokens, **ROWS, inplace=True)
    assert torch.equal(logits, before)


def test_fp16_gradients_are_made_after_the_loss_is_scaled():
    """In forward they would underflow: 6e-8 is the least that fp16 holds."""
    logits, labels, tokens = sample((4,), 50, torch.float16)
    tokens["weight"] = tokens["weight"] * 1e-7
    grad = run(policy_loss_from_logits, (logits, labels, tokens), "all", 2.0**20)[2]
    want = run(policy_loss_from_logits, (logits.float(), labels, tokens), "all", 2.0**20)[2]
    torch.testing.assert_close(grad.float(), want, rtol=2e-3, atol=1e-6)


def test_a_second_backward_raises():
    logits, labels, tokens = sample((4,), 50)
    for inplace in (False, True):
        (x,) = leaves(logits)
        loss, _ = policy_loss_from_logits(
            x * 1, labels, tokens["advantages"], tokens["weight"], **ROWS, inplace=inplace
        )
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="one backward a forward; this is the second"):
            loss.backward()


def test_double_backward_raises():
    logits, labels, tokens = sample((4,), 50)
    (x,) = leaves(logits)
    loss, _ = policy_loss_from_logits(x, labels, tokens["advantages"], tokens["weight"], **ROWS)
    with pytest.raises(RuntimeError, match="policy_loss_from_logits: its gradient is not diff"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_who_saved_the_logits_raises_once_they_are_overwritten():
    logits, labels, tokens = sample((4,), 50)
    (x,) = leaves(logits)
    y = x * 1
    square = (y**2).sum()
    given = tokens["advantages"], tokens["weight"]
    loss, _ = policy_loss_from_logits(y, labels, *given, **ROWS, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square + loss).backward()


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def launcher():
    """The page of the kernels, which needs Triton."""
    return importlib.import_module("fastpg.ops.loss.policy_loss_from_logits_triton")


# (multiprocessors, bytes of L2 cache, registers and threads of a multiprocessor)
H100, B200 = (132, 50 << 20, 65536, 2048), (148, 126 << 20, 65536, 2048)
PROGRAMS = [
    (H100, 151936 * 2, 16, 124, 1),
    (H100, 128256 * 4, 16, 92, 0),  # 132 such rows take 68 MB
    (B200, 128256 * 4, 16, 92, 1),
    (H100, 32000 * 4, 8, 80, 2),  # as many as have their rows in the cache
    (H100, 32000 * 2, 8, 80, 3),  # as many as there are registers for
    (H100, 32000 * 2, 8, 128, 2),
    (H100, 1000 * 2, 4, 96, 4),  # more would hide nothing more
    (H100, 50257 * 2, 8, 64, 0),  # no whole vectors
    (H100, 131072 * 2**14, 16, 64, 0),
]


@needs_triton
@pytest.mark.parametrize("device, row_bytes, warps, registers, count", PROGRAMS)
def test_as_many_programs_as_have_their_rows_in_the_cache(
    device, row_bytes, warps, registers, count
):
    page = launcher()
    assert page.programs(page.Device(*device), row_bytes, warps, registers) == count


@pytest.mark.parametrize("case", CASES)
def test_rows_that_do_not_fit_the_cache_take_the_two_ops(kernel, case, monkeypatch):
    if kernel != "triton":
        pytest.skip("of the kernels in Triton")
    inputs = sample((2, 3), 136)
    rows = run(policy_loss_from_logits, inputs, case)
    page = launcher()
    monkeypatch.setattr(page, "device_of", lambda x: page.Device(1, 600, 65536, 2048))
    monkeypatch.setattr(page, "rows_kernel", None)
    for got, want in zip(run(policy_loss_from_logits, inputs, case), rows, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    inplace = run(policy_loss_from_logits, inputs, case, inplace=True)
    assert torch.equal(inplace[2], run(policy_loss_from_logits, inputs, case)[2])


def test_a_device_spoils_the_row_of_a_bad_label_alone(kernel):
    if kernel not in DEVICE:
        pytest.skip("the CPU raises")
    logits, labels, tokens = sample((3,), 136)
    labels[:], tokens["weight"][:] = torch.tensor([5, 138, 7]), 1.0  # 138: in the row after
    grad = run(policy_loss_from_logits, (logits, labels, tokens), "all")[2]
    assert grad[1].isnan().all() and grad[[0, 2]].isfinite().all()
    with pytest.raises(IndexError, match="policy_loss_from_logits: labels holds 138 at row 1"):
        check()
