"""The order in which a run takes prompts from its dataset."""

from collections import UserList
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from fastpg.trainer.settings.config import PPOConfig

Example = dict[str, Any]


def prompt_loader(dataset: Sequence[Example], args: PPOConfig, num_processes: int) -> DataLoader:
    """Return a loader of one batch per step and process: permutations of a dataset.

    Args:
        dataset: The examples.
        args: The settings of the run. An example comes `num_generations` times in a batch, one
            after the other.
        num_processes: The processes that share the loader out.

    Returns:
        The loader. Its order depends on the seed alone, not on what else draws random numbers.
    """
    copies = args.resolved().num_generations
    num_prompts = args.rollout_batch_size // copies
    # The sampler starts another permutation when one is used up, so a dataset may be smaller
    # than a rollout.
    sampler = RandomSampler(
        dataset,
        num_samples=args.num_steps * num_prompts * num_processes,
        generator=torch.Generator().manual_seed(args.seed),
    )

    # No list or dict: accelerate would look for tensors in all that they hold, however deep.
    def collate(examples: list[Example]) -> UserList[Example]:
        return UserList(example for example in examples for _ in range(copies))

    # A DataLoader needs only `len` and indices, which any sequence has; its type asks for more.
    typed = cast(Dataset[Example], dataset)
    return DataLoader(typed, num_prompts, sampler=sampler, collate_fn=collate)
