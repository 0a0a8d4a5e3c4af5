"""The criterion of every accuracy test: no worse than PyTorch at the same dtype, judged in fp64."""

import torch

# What one rounding to the stored type, and a few of fp32, may add.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2e-6,
    torch.bfloat16: 2e-6,
}
# Of a gradient that is stored in the dtype of its input: one rounding of a value of size 1.
GRADIENT_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}


def assert_no_worse(ours, torchs, oracle, tolerance):
    """max |ours - oracle| <= max |torchs - oracle| + tolerance * (1 + max |oracle|).

    A tensor cannot be its own yardstick, nor its own oracle: such a test could not fail.
    """
    for name, yardstick in (("torchs", torchs), ("oracle", oracle)):
        is_same = ours is yardstick or (ours.numel() and ours.data_ptr() == yardstick.data_ptr())
        assert not is_same, f"the result is compared with itself: {name}"
    assert ours.shape == oracle.shape
    if oracle.numel() == 0:
        return
    ours, torchs = ours.double(), torchs.double()
    error, allowed = (ours - oracle).abs(), (torchs - oracle).abs().max()
    allowed = allowed + tolerance * (1 + oracle.abs().max())
    worst = error.argmax().item()
    assert error.max() <= allowed, (
        f"at {worst}: got {ours.flatten()[worst].item()!r}, "
        f"fp64 {oracle.flatten()[worst].item()!r}, allowed error {allowed.item():.3g}"
    )


def leaves(*tensors):
    """Copies that require a gradient (None stays None)."""
    return [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
