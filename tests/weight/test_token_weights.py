"""token_weights against its reference, and the sums they make."""

import pytest
import torch
from torch.library import opcheck

import fastpg.ops.weight.token_weights as page
from bench.inputs import DEVICE, generator
from fastpg import token_weights

REDUCTIONS = ["token", "sequence", "sequence_sum"]
CU = torch.tensor([0, 3, 3, 8, 12, 13, 20], dtype=torch.int32)


def sample(packed=False, shape=(6, 9)):
    """A mask with a sequence that has no unmasked token, and cu_seqlens."""
    mask = torch.rand((20,) if packed else shape, generator=generator(0)) < 0.6
    mask[slice(8, 12) if packed else slice(1, 2)] = False
    return mask, CU.to(mask.device) if packed else None


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("denom", [None, 7.5, "tensor"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_matches_reference(kernel, reduce, packed, denom, dtype):
    mask, cu = sample(packed)
    denom = torch.tensor(7.5) if denom == "tensor" else denom
    rows = mask.double().split(cu.diff().tolist()) if packed else mask.double()
    lengths = torch.stack([row.sum() for row in rows])
    local = lengths.sum() if reduce == "token" else (lengths > 0).sum()
    total = local if denom is None else denom
    expected = [m / (total * (m.sum().clamp(min=1) if reduce == "sequence" else 1)) for m in rows]
    expected = torch.cat(expected).view(mask.shape).float()
    ours = token_weights(mask.to(dtype), reduce=reduce, denom=denom, cu_seqlens=cu)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_gradients():
    assert not token_weights(torch.ones(2, 3, requires_grad=True)).requires_grad


def test_registration():
    for layout in ("contiguous", "transposed", "expanded", "empty", "packed"):
        mask, cu = sample(layout == "packed", shape=(4, 0) if layout == "empty" else (4, 3))
        mask = mask.t() if layout == "transposed" else mask
        mask = mask[:1].expand(mask.shape) if layout == "expanded" else mask
        opcheck(page._weights, (mask, None, cu, 1))
        opcheck(page._weights, (mask, torch.tensor(7.5, dtype=torch.float64), cu, 0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by its own compiler
def test_compile():
    @torch.compile(fullgraph=True, dynamic=True)
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


def test_edges(kernel):
    mask, _ = sample()
    with pytest.raises(ValueError, match="one of token, sequence, sequence_sum, got 'mean'"):
        token_weights(mask, reduce="mean")
    with pytest.raises(ValueError, match="denom must be finite and >= 0, got -1"):
        token_weights(mask, denom=-1)
    with pytest.raises(ValueError, match="denom must be finite and >= 0, got nan"):
        token_weights(mask, denom=float("nan"))
    with pytest.raises(ValueError, match=r"denom \(2,\) must be \(\)"):
        token_weights(mask, denom=torch.ones(2))
    with pytest.raises(ValueError, match=r"mask must be \[B, T\], or .*, got \(9,\)"):
        token_weights(mask[0])
    if kernel not in DEVICE:
        with pytest.raises(ValueError, match="must rise from 0 to N = 9, got 20 at index 6"):
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
