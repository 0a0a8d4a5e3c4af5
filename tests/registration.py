"""What torch asks of an operator: its schema, its fake and its kernels agree."""

import torch


def check_registration(op, record):
    """Runs torch's own check of an op on the inputs of a record."""
    values = [detached(value) for value in op.inputs.flatten(record)]
    torch.library.opcheck(op.overload, tuple(values))


def detached(value):
    """The value without its graph: operators have no gradient of their own."""
    if isinstance(value, list):
        return [detached(member) for member in value]
    return value.detach() if isinstance(value, torch.Tensor) else value
