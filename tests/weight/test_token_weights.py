"""token_weights against a loop over the sequences, and the sums that they make."""

import math

import pytest
import torch
from registration import check_registration

from bench.inputs import DEVICE, generator
from fastpg import token_weights
from fastpg.ops.weight import token_weights as page

OP = "token_weights"
REDUCTIONS = list(page.REDUCTIONS)
CU = torch.tensor([0, 3, 3, 8, 12, 13, 2100], dtype=torch.int32)  # the last one has three blocks


def sample(packed=False, shape=(6, 9)):
    """A mask with a sequence that has no unmasked token, and cu_seqlens."""
    mask = torch.rand((2100,) if packed else shape, generator=generator(0)) < 0.6
    mask[slice(8, 12) if packed else slice(1, 2)] = False
    return mask, CU.to(mask.device) if packed else None


def by_loop(mask, cu, reduce, denom=None):
    """The table of the page in fp64, one sequence after the other."""
    sequences = list(mask.double() if cu is None else mask.double().split(cu.diff().tolist()))
    counts = [int(x.sum()) for x in sequences]
    if denom is None:
        denom = sum(counts) if reduce == "token" else sum(n > 0 for n in counts)
    weights = []
    for x, count in zip(sequences, counts, strict=True):
        share = max(count, 1) if reduce == "sequence" else 1
        weights.append(x / (denom * share))
    return torch.cat(weights).view(mask.shape)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("denom", [None, 7.5, "tensor"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_matches_a_loop_over_the_sequences(kernel, reduce, packed, denom, dtype):
    mask, cu = sample(packed)
    denom = torch.tensor(7.5) if denom == "tensor" else denom
    ours = token_weights(mask.to(dtype), reduce=reduce, denom=denom, cu_seqlens=cu)
    assert ours.dtype is torch.float32
    expected = by_loop(mask, cu, reduce, None if denom is None else 7.5)
    assert torch.equal(ours, expected.float())


def test_weights_have_no_gradient():
    assert not token_weights(torch.ones(2, 3, requires_grad=True)).requires_grad


def test_registration():
    for layout in ("contiguous", "transposed", "expanded", "empty", "packed"):
        mask, cu = sample(layout == "packed", shape=(4, 0) if layout == "empty" else (4, 3))
        mask = mask.t() if layout == "transposed" else mask
        mask = mask[:1].expand(mask.shape) if layout == "expanded" else mask
        check_registration(page.token_weights_op, page.Inputs(mask, None, cu, "sequence"))
        denom = torch.tensor(7.5, dtype=torch.float64)
        check_registration(page.token_weights_op, page.Inputs(mask, denom, cu, "token"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses its own old parts
def test_compile(compiler):
    @torch.compile(backend=compiler, fullgraph=True, dynamic=True)
    def compiled(mask, losses, denom):
        return (token_weights(mask, reduce="sequence", denom=denom) * losses).sum()

    floats = [("default", (3, 7), 7.5), ("fail_on_recompile", (5, 11), 2.5)]
    tensors = [(stance, shape, torch.tensor(denom)) for stance, shape, denom in floats]
    for stance, shape, denom in floats + tensors:
        mask, losses = sample(shape=shape)[0], torch.randn(shape, requires_grad=True)
        with torch.compiler.set_stance(stance):
            compiled(mask, losses, denom).backward()
        expected = token_weights(mask, reduce="sequence", denom=denom)
        torch.testing.assert_close(losses.grad, expected)


def test_bad_arguments_raise(kernel):
    mask, _ = sample()
    with pytest.raises(ValueError, match="one of token, sequence, sequence_sum, got 'mean'"):
        token_weights(mask, reduce="mean")
    for denom in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"denom must be finite and >= 0, got {denom}"):
            token_weights(mask, denom=denom)
        if mask.device.type == "cpu":  # to look at one on a GPU would be to wait for it
            with pytest.raises(ValueError, match=f"denom must be finite and >= 0, got {denom}"):
                token_weights(mask, denom=torch.tensor(denom))
    with pytest.raises(TypeError, match="denom must be real"):
        token_weights(mask, denom=torch.tensor(1j))
    with pytest.raises(ValueError, match=r"denom \(2,\) must be \(\)"):
        token_weights(mask, denom=torch.ones(2))
    with pytest.raises(ValueError, match=r"mask must be \[B, T\], or .*, got \(9,\)"):
        token_weights(mask[0])
    if kernel not in DEVICE:
        with pytest.raises(ValueError, match="must rise from 0 to N = 9, got 2100 at index 6"):
            token_weights(mask[0], cu_seqlens=CU)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("denom", [None, 0.0, 5.0])
def test_all_masked_gives_zeros(kernel, reduce, denom):
    for shape in (3, 4), (0, 4), (3, 0):
        assert token_weights(torch.zeros(shape), reduce=reduce, denom=denom).count_nonzero() == 0
    for zero in (0, torch.tensor(0.0)):  # a wrong count must not make the weights infinite
        assert token_weights(torch.ones(3, 4), reduce=reduce, denom=zero).count_nonzero() == 0


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_micro_batches_add_up(kernel, reduce):
    mask, _ = sample()
    losses = torch.randn(mask.shape, dtype=torch.float64)
    whole = (token_weights(mask, reduce=reduce) * losses).sum()
    count = mask.sum() if reduce == "token" else mask.any(1).sum()
    for sizes in ([6], [1, 5], [2, 2, 2], [1] * 6):
        parts = zip(mask.split(sizes), losses.split(sizes), strict=True)
        total = sum((token_weights(m, reduce=reduce, denom=count) * x).sum() for m, x in parts)
        torch.testing.assert_close(total, whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_any_strides(kernel, reduce):
    mask, _ = sample()
    for view in (mask.t(), mask[:, ::2], mask[:1].expand(4, 9)):
        ours = token_weights(view, reduce=reduce)
        assert torch.equal(ours, token_weights(view.clone(), reduce=reduce))
        assert ours.is_contiguous()


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_threads_change_no_bit(reduce):
    mask, _ = sample(shape=(7, 30000))
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(token_weights(mask, reduce=reduce))
    assert torch.equal(*results)
    assert torch.equal(results[0], by_loop(mask, None, reduce).float())
