"""Sample inputs, shared by tests and benchmarks."""

import torch


def logits_and_labels(rows, vocab, dtype=torch.float32, *, scale=3.0, seed=0):
    """Logits [*rows, vocab] of a peaked distribution, and labels [*rows] sampled from it."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    rows = (rows,) if isinstance(rows, int) else rows
    logits = (torch.randn(*rows, vocab, generator=generator) * scale).to(dtype)
    gumbel = -torch.empty(*rows, vocab).exponential_(generator=generator).log()
    return logits, (logits.float() + gumbel).argmax(-1)
