"""token_rewards against a loop over the sequences, and where the score goes."""

import pytest
import torch
from accuracy import TOLERANCE, assert_no_worse, leaves
from registration import check_registration
from torch.autograd import gradcheck

from bench.inputs import DEVICE, generator
from fastpg import token_rewards
from fastpg.ops.credit import token_rewards as page

OP = "token_rewards"
CU = torch.tensor([0, 3, 3, 8, 12, 13, 20], dtype=torch.int32)


def inputs(packed=False, dtype=torch.float64, shape=(4, 5), seed=0):
    """Scores, KL, a mask with a sequence that has no unmasked token, and cu_seqlens."""
    g = generator(seed)
    shape = (20,) if packed else shape
    mask = torch.rand(shape, generator=g) < 0.6
    mask[slice(8, 12) if packed else slice(0, 1)] = False
    scores, kl = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype)
                  for s in ((6,) if packed else shape[:1], shape))  # fmt: skip
    return scores, kl, mask, CU.to(mask.device) if packed else None


def by_loop(scores, kl, mask, cu, kl_coef):
    """The formula of the page in fp64, one sequence after the other."""
    exact = torch.zeros(mask.shape, dtype=torch.float64)
    exact[mask] = -kl_coef * kl.double()[mask]
    for i, rewards in enumerate(exact if cu is None else exact.split(cu.diff().tolist())):
        kept = (mask[i] if cu is None else mask[cu[i] : cu[i + 1]]).nonzero()
        if len(kept):
            rewards[kept[-1]] += scores[i].double()
    return exact


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
def test_matches_a_loop_over_the_sequences(kernel, dtype, packed):
    scores, kl, mask, cu = inputs(packed, dtype)
    ours = token_rewards(scores, mask, kl=kl, kl_coef=0.3, cu_seqlens=cu)
    assert ours.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    exact = by_loop(scores, kl, mask, cu, 0.3)
    assert_no_worse(ours, exact.to(ours.dtype), exact, TOLERANCE[dtype])


@pytest.mark.parametrize("last", [0, 1023, 1024, 2047, 2048, 2499])
def test_the_last_token_may_be_in_any_block(kernel, last):
    """Blocks have 1024 tokens in Triton."""
    kl, mask = torch.rand(2, 2500), torch.zeros(2, 2500, dtype=torch.bool)
    mask[0, ::3], mask[0, last + 1 :], mask[0, last] = True, False, True
    scores = torch.tensor([5.0, 7.0], requires_grad=True)
    kl.requires_grad_()
    rewards = token_rewards(scores, mask, kl=kl, kl_coef=0.5)
    exact = by_loop(scores.detach(), kl.detach(), mask, None, 0.5)
    assert torch.equal(rewards, exact.float())
    grad = torch.rand(2, 2500)
    grad_scores, grad_kl = torch.autograd.grad(rewards, (scores, kl), grad)
    assert torch.equal(grad_scores, torch.stack([grad[0, last], torch.zeros(())]))
    assert torch.equal(grad_kl, torch.where(mask, -0.5 * grad, 0.0))


@pytest.mark.parametrize("wanted", range(1, 4))
@pytest.mark.parametrize("packed", [False, True])
def test_gradients(kernel, packed, wanted):
    scores, kl, mask, cu = inputs(packed)
    scores, kl = scores.requires_grad_(bool(wanted & 1)), kl.requires_grad_(bool(wanted & 2))

    def run(scores, kl):
        return token_rewards(scores, mask, kl=kl, kl_coef=0.3, cu_seqlens=cu)

    fast = kernel == "triton"  # its interpreter is slow
    assert gradcheck(run, (scores, kl), fast_mode=fast)
    if wanted & 1:
        assert gradcheck(lambda s: token_rewards(s, mask, cu_seqlens=cu), scores, fast_mode=fast)
    weight = torch.randn(mask.shape[::-1], dtype=torch.float64).t()
    for g in (weight, weight[:1].expand(mask.shape)):
        tensors = [x for x in (scores, kl) if x.requires_grad]
        pair = [torch.autograd.grad(run(scores, kl), tensors, x) for x in (g, g.clone())]
        assert all(torch.equal(*grads) for grads in zip(*pair, strict=True))


def test_registration():
    for layout in ("contiguous", "transposed", "expanded", "empty", "packed"):
        shape = (4, 0) if layout == "empty" else (4, 4)
        scores, kl, mask, cu = inputs(layout == "packed", shape=shape)
        kl, mask = (kl.t(), mask.t()) if layout == "transposed" else (kl, mask)
        kl = kl[:1].expand(kl.shape) if layout == "expanded" else kl
        for given in (kl, None):
            x = page.Inputs(scores, mask, given, cu, 0.3)
            check_registration(page.token_rewards_op, x)
            grad = page.BackwardInputs(x, kl.sum().expand(mask.shape))
            check_registration(page.token_rewards_backward_op, grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses its own old parts
def test_compile(compiler):
    @torch.compile(backend=compiler, fullgraph=True, dynamic=True)
    def compiled(scores, kl, mask, coef):
        return token_rewards(scores, mask, kl=kl, kl_coef=coef).cos().sum()

    cases = [("default", (3, 7), 0.3), ("fail_on_recompile", (5, 11), 0.1)]
    for stance, shape, coef in cases:
        scores, kl, mask, _ = inputs(dtype=torch.float32, shape=shape)
        ours, eager = leaves(scores, kl), leaves(scores, kl)
        with torch.compiler.set_stance(stance):
            compiled(*ours, mask, coef).backward()
        token_rewards(eager[0], mask, kl=eager[1], kl_coef=coef).cos().sum().backward()
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_bad_arguments_raise(kernel):
    scores, _, mask, _ = inputs()
    with pytest.raises(TypeError, match=r"scores must be floating point, got torch\.int64"):
        token_rewards(scores.long(), mask)
    with pytest.raises(ValueError, match=r"scores \(3,\) must be \(4,\)"):
        token_rewards(scores[:3], mask)
    with pytest.raises(ValueError, match=r"kl \(4,\) must be \(4, 5\)"):
        token_rewards(scores, mask, kl=scores, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"kl_coef=0.1 needs kl"):
        token_rewards(scores, mask, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"mask must be \[B, T\], or \[N\] with cu_seqlens, got"):
        token_rewards(scores, mask, cu_seqlens=CU.to(mask.device))
    for coef in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"kl_coef must be finite and >= 0, got {coef}"):
            token_rewards(scores, mask, kl=mask.double(), kl_coef=coef)
    assert token_rewards(scores, torch.zeros(4, 5)).count_nonzero() == 0
    infinite = torch.full((4, 5), torch.inf)
    assert torch.equal(token_rewards(scores, mask, kl=infinite), token_rewards(scores, mask))
    if kernel not in DEVICE:
        with pytest.raises(ValueError, match="must rise from 0 to N = 20, got 12 at index 4"):
            token_rewards(scores, mask.view(-1), cu_seqlens=CU[:5])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("packed", [False, True])
def test_masked_slots_change_no_bit(kernel, packed, poison):
    scores, kl, mask, cu = inputs(packed)
    empty = torch.tensor([i in ((1, 3) if packed else (0,)) for i in range(len(scores))])
    weight = torch.randn(mask.shape, dtype=torch.float64)

    def run(fill):
        tensors = leaves(scores.masked_fill(empty, fill), torch.where(mask, kl, fill))
        out = token_rewards(tensors[0], mask, kl=tensors[1], kl_coef=0.3, cu_seqlens=cu)
        return out, *torch.autograd.grad(out, tensors, torch.where(mask, weight, fill))

    assert all(torch.equal(a, b) for a, b in zip(run(0.0), run(poison), strict=True))


def test_packed_equals_padded(kernel):
    scores, kl, mask, _ = inputs()
    cu = torch.arange(0, 21, 5, dtype=torch.int32)
    padded = token_rewards(scores, mask, kl=kl, kl_coef=0.3)
    packed = token_rewards(scores, mask.view(-1), kl=kl.view(-1), kl_coef=0.3, cu_seqlens=cu)
    assert torch.equal(padded.view(-1), packed)


def test_any_strides(kernel):
    scores, kl, mask, _ = inputs(shape=(6, 6))
    weight = torch.randn(6, 6, dtype=torch.float64)

    def run(scores, kl, mask):
        scores, kl = (x.detach().requires_grad_() for x in (scores, kl))
        rewards = token_rewards(scores, mask, kl=kl, kl_coef=0.3)
        return rewards, *torch.autograd.grad(rewards, (scores, kl), weight)

    views = scores[:1].expand(6), kl.t(), mask.t()
    ours, plain = run(*views), run(*(x.clone() for x in views))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_threads_change_no_bit():
    scores, kl, mask, _ = inputs(dtype=torch.float32, shape=(7, 30000))
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        leaf, penalty = leaves(scores, kl)
        rewards = token_rewards(leaf, mask, kl=penalty, kl_coef=0.3)
        results.append((rewards, *torch.autograd.grad(rewards, (leaf, penalty), kl)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    exact = by_loop(scores, kl, mask, None, 0.3)
    torch.testing.assert_close(results[0][0].double(), exact, rtol=1e-6, atol=1e-6)
