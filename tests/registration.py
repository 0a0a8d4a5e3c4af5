"""What torch asks of an operator: its schema, its fake and its kernels agree."""

import torch


def check_registration(op, record):
    """Runs torch's own check of an op on the inputs of a record."""
    torch.library.opcheck(op.overload, tuple(op.inputs.flatten(record)))
