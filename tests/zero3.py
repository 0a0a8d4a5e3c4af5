"""Parameters of ZeRO-3, and as much of DeepSpeed as gathers them, in its place.

They do what those of DeepSpeed 0.19 do: `param.data` is exchanged, ranks have ranges of the flat
values, the last one padded, and contexts that gather the same parameter must not be nested.
"""

import sys
from enum import Enum
from types import ModuleType

import torch
import torch.distributed as dist


class Status(Enum):
    """ZeroParamStatus."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2


def parameter_of_zero3(values, *, in_plain_parts=True):
    """An empty parameter, whose values are spread over all ranks.

    In plain parts, or as with hpZ: a second time on each node.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parameter = torch.nn.Parameter(values.clone())
    size = -(-values.numel() // ranks)
    flat = torch.nn.functional.pad(values.flatten(), (0, size * ranks - values.numel()))
    parameter.ds_id, parameter.ds_shape = id(parameter), values.shape
    parameter.ds_numel, parameter.ds_status = values.numel(), Status.NOT_AVAILABLE
    parameter.ds_tensor = flat[rank * size : (rank + 1) * size].clone()
    parameter.ds_tensor.ds_numel = size
    parameter.ds_secondary_tensor = None if in_plain_parts else parameter.ds_tensor
    parameter.ds_process_group = dist.group.WORLD
    parameter.data = values.new_empty(0)
    return parameter


class GatheredParameters:
    """As deepspeed.zero.GatheredParameters: within it the parameters are whole."""

    gathered = 0  # how often it was entered

    def __init__(self, parameters):
        self.parameters = parameters

    def __enter__(self):
        type(self).gathered += 1
        for x in self.parameters:
            assert x.ds_status is Status.NOT_AVAILABLE, "DeepSpeed refuses nested contexts"
            ranks = dist.get_world_size(x.ds_process_group)
            parts = [torch.empty_like(x.ds_tensor) for _ in range(ranks)]
            dist.all_gather(parts, x.ds_tensor, group=x.ds_process_group)
            x.data = torch.cat(parts)[: x.ds_numel].view(x.ds_shape)
            x.ds_status = Status.AVAILABLE

    def __exit__(self, *_error):
        for x in self.parameters:
            x.data = x.data.new_empty(0)
            x.ds_status = Status.NOT_AVAILABLE


def stand_for_deepspeed(monkeypatch):
    """Makes this module what `import deepspeed` finds; returns GatheredParameters."""
    module = ModuleType("deepspeed")
    module.zero = sys.modules[__name__]
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    GatheredParameters.gathered = 0
    return GatheredParameters
