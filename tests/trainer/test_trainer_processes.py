"""Two processes that share a rollout make the step that one makes of the whole of it."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState
from tiny_trainer import make_trainer

from fastpg.trainer.rollout import Rollout

pytestmark = pytest.mark.slow

ALGORITHMS = ["ppo", "grpo", "dr_grpo"]
EPISODES, PROMPT, LENGTH, GROUP = 20, 3, 6, 5


def fixed_rollout():
    """The completions of the second half are shorter, so that the processes differ in tokens."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 40, (EPISODES, PROMPT + LENGTH), generator=g)
    lengths = torch.randint(1, LENGTH + 1, (EPISODES,), generator=g)
    lengths[EPISODES // 2 :].clamp_(max=2)
    mask = torch.arange(LENGTH) < lengths[:, None]
    seen = torch.cat([torch.ones(EPISODES, PROMPT, dtype=torch.bool), mask], 1).long()
    finished = torch.ones(EPISODES, dtype=torch.bool)
    return Rollout(ids, seen, mask, finished), torch.randn(EPISODES, generator=g)


def step(folder, algorithm, rows):
    """Parameters and metrics after one optimiser step on the episodes `rows` of the rollout."""
    trainer = make_trainer(
        folder, algorithm=algorithm, rollout_batch_size=len(rows), kl_coef=0.1,
        num_generations=1 if algorithm == "ppo" else GROUP, num_mini_batches=1, num_ppo_epochs=1,
        learning_rate=1e-2, max_grad_norm=1e3, adam_epsilon=0.1,  # so that its size shows
    )  # fmt: skip
    rollout, scores = fixed_rollout()
    experience, metrics = trainer.learner.experience(rollout[rows], scores[rows])
    metrics |= trainer.learner.update(experience)
    model = trainer.accelerator.unwrap_model(trainer.model)
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach(), metrics


def _rank(rank, folder):
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that this is a copy of
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(x) for name, x in places.items()}, ACCELERATE_USE_CPU="true")
    os.environ["OMP_NUM_THREADS"] = "1"  # or accelerate warns that it sets it
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    rows = torch.arange(EPISODES).chunk(2)[rank]
    torch.save({name: step(folder, name, rows) for name in ALGORITHMS}, f"{folder}/rank{rank}")
    dist.destroy_process_group()


def test_two_processes_make_the_step_of_one(tmp_path):
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    ranks = [torch.load(f"{tmp_path}/rank{rank}") for rank in (0, 1)]
    for name in ALGORITHMS:
        parameters, metrics = step(tmp_path, name, torch.arange(EPISODES))
        for theirs, their_metrics in (rank[name] for rank in ranks):
            torch.testing.assert_close(theirs, parameters, rtol=0, atol=1e-6)
            assert their_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5), name
