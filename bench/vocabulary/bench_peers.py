"""The ops of the vocabulary against what others have written for the same, on a GPU.

    pip install --no-deps liger-kernel trl quack-kernels cut-cross-entropy flash-attn

The problems are those of `fastpg bench`: each package must give the right values and gradients
before it is timed. Liger's cross entropy writes the gradient over the logits, which hold it after a
call.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastpg.bench import problems
from fastpg.bench.timing import Case

ROWS, VOCAB, WIDTH, HEAD_VOCAB = 8192, 151936, 4096, 131072


def cases(device: str) -> Iterator[Case]:
    if device != "cuda":
        return  # The peers' kernels need a GPU.
    settings = problems.Settings(device, quick=False, left_out={})
    for problem in (
        problems.log_probs_and_entropy(settings, ROWS, VOCAB, torch.bfloat16),
        problems.log_probs(settings, ROWS, VOCAB, torch.bfloat16, backward=True),
        problems.head_cross_entropy(settings, ROWS, WIDTH, HEAD_VOCAB, torch.bfloat16),
    ):
        yield problem.case(compiled=False, found={})
    for name, reason in settings.left_out.items():
        print(f"left out: {name}: {reason}")
