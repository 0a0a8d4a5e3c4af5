"""Runs a function in two processes that share a training out, over gloo on the CPU."""

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState

ENGINES = ["ddp", "fsdp"]

ZERO = {
    "ACCELERATE_USE_DEEPSPEED": "true",
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
    "zero2": ZERO,
    "zero3": ZERO,
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

        # Its exchange in shared memory would be compiled now, for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        path = Path(folder, f"{engine}-{rank}.json")
        path.write_text(json.dumps(_deepspeed_config(stage=int(engine[-1]))))
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)
    torch.save(function(folder, *arguments), f"{folder}/rank{rank}")
    dist.destroy_process_group()


def _deepspeed_config(stage):
    """That of accelerate, but for the buckets: those of DeepSpeed take 2 GB of each process."""
    zero = {"stage": stage, "reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero | {"stage3_gather_16bit_weights_on_model_save": stage == 3},
    }
