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


def head_and_labels(rows, vocab, width, dtype=torch.float32, *, scale=2.0, seed=0):
    """Hidden states [*rows, width], a head's weight and bias, labels [*rows]."""
    random = generator(seed)
    hidden = torch.randn(*rows, width, generator=random)
    weight = torch.randn(vocab, width, generator=random) * (scale / width**0.5)
    bias = torch.randn(vocab, generator=random)
    labels = torch.randint(vocab, tuple(rows), generator=random)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels
