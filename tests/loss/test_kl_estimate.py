import math

import pytest
import torch
from accuracy import TOLERANCE, assert_no_worse, leaves
from registration import check_registration
from torch._dynamo.testing import CompileCounterWithBackend

from fastpg import kl_estimate
from fastpg.ops.loss import kl_estimate as page

OP = "kl_estimate"
KINDS = page.KINDS


def sample(shape, dtype=torch.float32):
    logp = -torch.rand(shape, dtype=torch.float64)
    return logp.to(dtype), (logp + 0.1 * torch.randn(shape, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_matches_reference(kernel, kind, dtype):
    logp, ref = sample((3, 50), dtype)
    d = logp.double() - ref.double()
    formula = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kind]
    kl = kl_estimate(logp, ref, kind=kind)
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_no_worse(kl, formula, formula, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kernel, kind):
    logp, ref = sample((3, 4), torch.float64)
    for wanted in ((True, False), (False, True), (True, True)):
        inputs = [t.clone().requires_grad_(w) for t, w in zip((logp, ref), wanted, strict=True)]
        assert torch.autograd.gradcheck(
            lambda a, b: kl_estimate(a, b, kind=kind), inputs, fast_mode=kernel == "triton"
        )
    logp, ref = leaves(logp, ref)
    kl = kl_estimate(logp, ref, kind=kind)
    strided = torch.randn(4, 3, dtype=torch.float64).t()
    for grad in (torch.ones((), dtype=torch.float64).expand(3, 4), strided):
        ours, plain = (
            torch.autograd.grad(kl, (logp, ref), g, retain_graph=True)
            for g in (grad, grad.contiguous())
        )
        assert all(map(torch.equal, ours, plain))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "empty"])
def test_registration(layout, kind):
    change = {
        "contiguous": lambda t: t,
        "transposed": lambda t: t.t(),
        "expanded": lambda t: t[:, :1].expand(4, 6),
        "empty": lambda t: t[:0],
    }[layout]
    logp, ref = map(change, sample((4, 6)))
    x = page.Inputs(logp, ref, kind, 20.0, math.inf, "stop")
    check_registration(page.kl_estimate_op, x)
    grad = torch.ones(()).expand(logp.shape)
    check_registration(page.kl_estimate_backward_op, page.BackwardInputs(x, grad))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch compiles by its own old parts
def test_compile(compiler):
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(kl_estimate, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for n in (50, 77):
        logp, ref = leaves(*sample((2, n)))
        compiled(logp, ref, kind="k3").sum().backward()
        compilations.append(counter.frame_count)
        kl = kl_estimate(logp, ref, kind="k3")
        grads = torch.autograd.grad(kl.sum(), (logp, ref))
        torch.testing.assert_close((logp.grad, ref.grad), grads)
    assert len(set(compilations)) == 1


def test_edges():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"kind must be one of k1, k2, k3, got 'k4'"):
        kl_estimate(x, x, kind="k4")
    with pytest.raises(ValueError, match=r"ref_logp \(2,\) must have the shape of logp \(3,\)"):
        kl_estimate(x, x[:2])
    with pytest.raises(TypeError, match=r"logp must be floating point, got torch.int64"):
        kl_estimate(x.long(), x)
    with pytest.raises(ValueError, match=r"max_log_ratio must be > 0 and <= 40, got 41"):
        kl_estimate(x, x, max_log_ratio=41)
    with pytest.raises(ValueError, match=r"beyond must be one of stop, hold, got None"):
        kl_estimate(x, x, beyond=None)
    with pytest.raises(ValueError, match=r"max_kl must be > 0, got -1.0"):
        kl_estimate(x, x, max_kl=-1.0)
    with pytest.raises(TypeError, match=r"max_kl must be a number, got str"):
        kl_estimate(x, x, max_kl="10")


def test_k3_is_finite_and_never_negative(kernel):
    logp = torch.tensor([-1000.0, -1e-4, -0.5, 0.0])
    ref = torch.tensor([-0.5, -1e-4 - 1e-7, -1000.0, 0.0])
    kl = kl_estimate(*leaves(logp, ref), kind="k3")
    assert kl.isfinite().all() and (kl >= 0).all() and kl[3] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beyond", ["stop", "hold"])
def test_the_bounds_are_those_of_a_clamp_in_torch(kernel, kind, beyond):
    """Log-ratios at 3, estimates at 2, as verl and OpenRLHF have them at 20 and 10."""
    logp, ref, upstream = torch.randn(3, 200, dtype=torch.float64)
    ours, plain = leaves(3 * logp, 3 * logp)
    kl = kl_estimate(ours, ref, kind=kind, max_log_ratio=3.0, max_kl=2.0, beyond=beyond)
    d = (plain - ref).clamp(-3, 3)
    if beyond == "hold":
        d = d.detach() + plain - plain.detach()
    value = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kind]
    expected = value.clamp(-2, 2)
    torch.testing.assert_close(kl, expected)
    grads = torch.autograd.grad(kl, ours, upstream), torch.autograd.grad(expected, plain, upstream)
    torch.testing.assert_close(*grads)
    assert (expected == 2).sum() > 10 and (d.detach().abs() == 3).sum() > 10


@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_of_infinite_log_probs(kernel, kind):
    """d is 0 where both are -inf and at its bound where one is; neither has a gradient."""
    inf = math.inf
    logp = torch.tensor([-inf, -inf, -2.0, -1.0, -inf], dtype=torch.float64)
    ref = torch.tensor([-inf, -2.0, -inf, -1.5, math.nan], dtype=torch.float64)
    d = torch.tensor([0.0, -20.0, 20.0, 0.5, math.nan], dtype=torch.float64)
    leaves_of = leaves(logp, ref)
    kl = kl_estimate(*leaves_of, kind=kind, beyond="hold")
    expected = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kind]
    torch.testing.assert_close(kl, expected, equal_nan=True)
    by_logp, by_ref = torch.autograd.grad(kl.sum(), leaves_of)
    slope = {"k1": 1.0, "k2": 0.5, "k3": 1 - math.exp(-0.5)}[kind]
    expected = torch.tensor([0.0, 0.0, 0.0, slope], dtype=torch.float64)
    torch.testing.assert_close(by_logp[:4], expected)
    torch.testing.assert_close(by_ref[:4], -expected)


def test_estimators_by_enumeration(kernel):
    theta, phi = torch.randn(2, 5, dtype=torch.float64)
    ref = phi.log_softmax(0)

    def expected_gradient(kind):
        t = theta.clone().requires_grad_()
        logp = t.log_softmax(0)
        mean = (logp.detach().exp() * kl_estimate(logp, ref, kind=kind)).sum()
        return torch.autograd.grad(mean, t)[0]

    t = theta.clone().requires_grad_()
    logp = t.log_softmax(0)
    kl = (logp.exp() * (logp - ref)).sum()
    reverse = torch.autograd.grad(kl, t, retain_graph=True)[0]
    forward = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), t)[0]
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros_like(t))
    torch.testing.assert_close(expected_gradient("k2"), reverse)
    torch.testing.assert_close(expected_gradient("k3"), forward)
    for kind in ("k1", "k3"):  # unbiased
        mean = (logp.exp() * kl_estimate(logp, ref, kind=kind)).sum()
        torch.testing.assert_close(mean, kl)
