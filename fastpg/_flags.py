"""Errors that a kernel finds on the device: recorded without synchronising, raised by check()."""

from __future__ import annotations

import torch
from torch import Tensor

_flags: dict[tuple[str, torch.device], Tensor] = {}


def label_flag(op: str, device: torch.device) -> Tensor:
    """int64 [3] on the device: bad labels the op met since check(), row and label of the first."""
    if (op, device) not in _flags:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # In the memory of a graph it would hold anything until the graph is replayed.
            raise RuntimeError(f"{op}: call it once on {device} before a CUDA graph captures it")
        with torch.inference_mode(False):  # a tensor that check() may clear from anywhere
            _flags[op, device] = torch.zeros(3, dtype=torch.int64, device=device)
    return _flags[op, device]


def record_labels(op: str, labels: Tensor, bad: Tensor) -> None:
    """What the kernels do with bad labels, in PyTorch: counts, and keeps the place of the first."""
    if bad.numel() == 0:
        return
    flag, bad = label_flag(op, labels.device), bad.flatten()
    row = bad.int().argmax()
    found = torch.stack([bad.sum(), row, labels.flatten()[row]])
    seen = flag[0] > 0
    flag.copy_(torch.where(seen, flag, found))
    flag[0] += torch.where(seen, found[0], 0)


def check() -> None:
    """Waits for every device that fastpg has run on, and raises what its kernels recorded.

    IndexError for a label outside the vocabulary, with the op, the row of the flattened labels and
    the label; that record is cleared. On the CPU the ops themselves raise.
    """
    for (op, device), flag in list(_flags.items()):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count, row, label = flag.tolist()
        if count:
            flag.zero_()
            others = f", and {count - 1} more" if count > 1 else ""
            raise IndexError(
                f"{op}: labels holds {label} at row {row}{others}: outside the vocabulary and not "
                f"ignore_index ({device})"
            )
