"""What torch asks of an operator: its schema, its fake and its kernels agree."""

import torch

QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


def check_registration(op, record, *, traced=False):
    """Runs torch's own check of an op on the inputs of a record.

    If `traced`, the op is also traced with dynamic shapes, which takes twenty times as long as all
    else. The contract tests do so for every example; other layouts of the inputs show in the fake.
    """
    values = [detached(value) for value in op.inputs.flatten(record)]
    checks = (*QUICK, "test_aot_dispatch_dynamic") if traced else QUICK
    torch.library.opcheck(op.overload, tuple(values), test_utils=checks)


def detached(value):
    """The value without its graph: operators have no gradient of their own."""
    if isinstance(value, list):
        return [detached(member) for member in value]
    return value.detach() if isinstance(value, torch.Tensor) else value
