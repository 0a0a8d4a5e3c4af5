"""The files of a run that never was."""

import json
from pathlib import Path

PROMPT = "the sea is"


def sample(completion, prompt=PROMPT, **changes):
    record = {"prompt": prompt, "completion": completion, "score": 0.25, "rewards": {}}
    return {**record, "length": 3, "finished": True, **changes}


def steps(count=20, **more):
    """Rows of metrics.jsonl: a reward of step / 10, which evaluations every 5 steps find too."""
    rows = [{"step": 0, "eval/reward/mean": 0.0}]
    for step in range(1, count + 1):
        row = {"step": step, "reward/mean": step / 10, "objective/kl": 0.5, "time/train": 2.0}
        rows.append({**row, "time/generate": 1.0, "time/step": 3.0, **more})
        if step % 5 == 0:
            rows[-1]["eval/reward/mean"] = step / 10
    return rows


def start(**changes):
    return {
        "date": "2026-11-26 11:20:03+01:00",
        "after_step": 0,
        "command": "fastpg train --model some-model",
        "versions": {"fastpg": "0.1.0", "torch": "2.13.0"},
        "device": "CPU",
        "machine": "CPU, threads: 1",
        "kernels": {"gae": "C++", "whiten": "C++", "linear_token_logprobs": "BLAS"},
        **changes,
    }


def lines(rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def make_run(
    directory: Path,
    rows=None,
    algorithm="PPO",
    starts=None,
    evaluations=None,
    completions=None,
    num_steps=20,
    settings="algorithm: ppo\nkl_coef: 0.1\nlam: null\n",
) -> Path:
    """Write a run; `evaluations` and `completions` are samples by step."""
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text(lines(steps() if rows is None else rows))
    (directory / "config.yaml").write_text(settings)
    run = {"algorithm": algorithm, "num_steps": num_steps}
    (directory / "run.json").write_text(json.dumps({**run, "starts": starts or [start()]}))
    if evaluations is None:
        evaluations = {0: [sample("grey .")], 20: [sample("blue , and wide .")]}
    for folder, samples in (("evaluations", evaluations), ("completions", completions or {})):
        (directory / folder).mkdir()
        for step, records in samples.items():
            path = directory / folder / f"step_{step:06d}.jsonl"
            path.write_text(lines(records))
    return directory
