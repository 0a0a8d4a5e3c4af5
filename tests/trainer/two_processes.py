"""Runs a function in two processes that share a training out, over gloo on the CPU."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState

ENGINES = ["ddp", "fsdp"]

ZERO = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "DS_ACCELERATOR": "cpu",
}
ENVIRONMENTS = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "fsdp": {
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    },
    "zero2": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
"""What `accelerate launch` would set."""


def in_two_processes(function, folder, *arguments, engine="ddp"):
    """The results of `function(folder, *arguments)` in both, which are copies of this process.

    A process that ends before its function has returned has the result None.
    """
    given = function, str(folder), arguments, engine
    mp.start_processes(_rank, given, nprocs=2, start_method="fork")
    files = [Path(folder, f"rank{i}") for i in (0, 1)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _rank(rank, function, folder, arguments, engine):
    # The state is that of the process of which this one is a copy.
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(x) for name, x in places.items()})
    os.environ["OMP_NUM_THREADS"] = "1"  # Otherwise accelerate warns that it sets it.
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    os.environ.update(ENVIRONMENTS[engine])
    if engine.startswith("zero"):
        import deepspeed

        # Its exchange in shared memory would be compiled now, for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.save(function(folder, *arguments), f"{folder}/rank{rank}")
    dist.destroy_process_group()
