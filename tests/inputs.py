"""Sample inputs, shared by tests and benchmarks."""

import torch

# The implementations that cannot raise about a value without waiting for the device.
DEVICE = ("triton", "cuda")


def generator(seed):
    """On the default device, where the tensors of a test are made."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def logits_and_labels(rows, vocab, dtype=torch.float32, *, scale=3.0, seed=0):
    """Logits [*rows, vocab] of a peaked distribution, and labels [*rows] sampled from it."""
    random = generator(seed)
    rows = (rows,) if isinstance(rows, int) else rows
    logits = (torch.randn(*rows, vocab, generator=random) * scale).to(dtype)
    gumbel = -torch.empty(*rows, vocab).exponential_(generator=random).log()
    return logits, (logits.float() + gumbel).argmax(-1)
