"""Runs that are killed at random moments and taken up again.

    python tests/trainer/resumable_run.py 200

kills two hundred times, and compares what the runs end with.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tiny_trainer import make_trainer, metrics_of, share_of_praise

LIFE = 1.5  # the seconds that a killed process lives, on average
RUN = {"num_steps": 4, "save_steps": 1, "save_total_limit": None}
QUICK = {**RUN, "rollout_batch_size": 2, "num_mini_batches": 1, "num_ppo_epochs": 1}


def noisy_praise(prompts, completions):
    """It draws from every generator, so that each of them has to be taken up."""
    noise = random.random() + np.random.rand() + torch.rand(()).item()
    return [praise + 0.1 * noise for praise in share_of_praise(prompts, completions)]


def trained(output_dir, resume=False, **settings):
    trainer = make_trainer(output_dir, noisy_praise, **{**RUN, **settings})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def without_times(rows):
    times = ("time/", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(times)} for row in rows]


def assert_same_run(folder, whole):
    """The files of two runs that tell what was learned."""
    assert without_times(metrics_of(folder)) == without_times(metrics_of(whole))
    last = (whole / "LATEST").read_text()
    names = [path.relative_to(whole) for path in whole.glob("completions/*")]
    for name in (*names, "model/model.safetensors", f"{last}/tensors.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = (json.loads((run / last / "state.json").read_text()) for run in (folder, whole))
    for state in (ours, theirs):
        del state["seconds"], state["settings"]
    assert ours == theirs


def _train_quietly(folder, settings):
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    trained(folder, resume=(folder / "LATEST").exists(), **settings)
    os._exit(0)  # A copy of a process must not do what that process does at its end.


def killed_and_resumed(folder, kills, rng, **settings):
    """A run that is killed at random moments until it has been `kills` times, and then ends.

    No kill may cost more than the steps since the last checkpoint.
    """
    # A copy of this process need not import anything.
    context, done = multiprocessing.get_context("fork"), 0
    while True:
        process = context.Process(target=_train_quietly, args=(folder, settings))
        process.start()
        process.join(rng.expovariate(1 / LIFE) if done < kills else None)
        if process.exitcode is not None:
            assert process.exitcode == 0
            return done
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        done += 1
        if (folder / "LATEST").exists():
            rows = _whole_rows(folder / "metrics.jsonl")
            finished = [row for row in rows if row["step"] > 0]
            saved = int((folder / "LATEST").read_text().removeprefix("checkpoint-"))
            assert saved >= len(finished) - settings.get("save_steps", RUN["save_steps"])


def _whole_rows(path):
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def main(kills):
    """Kill runs of other lengths until all kills are spent."""
    rng, done = random.Random(0), 0
    settings = {"num_steps": 12, "save_steps": 2, "save_total_limit": 2}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _ = trained(folder / "whole", **settings)
        while done < kills:
            part = folder / f"part-{done}"
            done += killed_and_resumed(part, min(10, kills - done), rng, **settings)
            assert_same_run(part, folder / "whole")
            print(f"{done} kills, {done} resumes, the same bits", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    main(int(sys.argv[1]))
