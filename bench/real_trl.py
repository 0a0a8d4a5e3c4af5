"""python -m bench.real_trl MODEL: TRL's GRPOTrainer on a real model, as it is and patched.

MODEL is a directory for `from_pretrained`. Both runs have the same seeds, in processes of their
own, and take a step in turn. TRL comes from where `bench.real_model` finds it. Times, peaks and
curves go to bench/results/grpo_trainer.json; the curves are drawn in docs/grpo_trainer.png.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from .__main__ import machine, provenance
from .real_model import answer as await_process
from .real_model import start, take_step, wait

ROOT = Path(__file__).parents[1]
RECEIPT = ROOT / "bench/results/grpo_trainer.json"
PLOT = ROOT / "docs/grpo_trainer.png"
STEPS, BATCH, GROUP, TOKENS = 30, 8, 4, 12
TRAINERS = {"TRL": "stock", "TRL with fastpg": "patched"}
DRAWN = {"reward": "mean reward", "entropy": "entropy, nats", "grad_norm": "norm of the gradient"}


class Run(NamedTuple):
    """What is known of a trainer after its last step."""

    seconds: list[float]  # of each step
    peak_mib: float  # of the process
    curves: dict[str, list[float]]


def questions() -> list[dict[str, Any]]:
    g = random.Random(0)
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    g.shuffle(pairs)
    text = "What is {} plus {}? Answer with the number alone."
    return [
        {"prompt": [{"role": "user", "content": text.format(a, b)}], "answer": str(a + b)}
        for a, b in pairs
    ]


def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """What part of a completion the right number is: 1 for the number alone."""
    texts = [completion[0]["content"].strip() for completion in completions]
    found = [re.search(rf"(?<!\d){x}(?!\d)", text) for text, x in zip(texts, answer, strict=True)]
    return [
        len(x) / len(text) if match else 0.0
        for text, x, match in zip(texts, answer, found, strict=True)
    ]


def train(model: str, kind: str) -> None:
    """Train; the last line that is printed has the curves."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from fastpg.integrations import trl as fastpg_trl

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait()

    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH,
            num_generations=GROUP, max_completion_length=TOKENS, learning_rate=1e-5, seed=0,
            bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none",
            save_strategy="no", logging_steps=1, disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
        data = Dataset.from_list(questions())
        with fastpg_trl.patched(strict=True) if kind == "patched" else nullcontext():
            trainer = GRPOTrainer(model, reward, args, train_dataset=data, callbacks=[Turns()])
            trainer.train()
            wait()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    print(json.dumps({name: [float(row[name]) for row in rows] for name in DRAWN}))


def compare(model: str) -> dict[str, Run]:
    """Both runs."""
    processes: dict[str, subprocess.Popen[str]] = {}
    for trainer, kind in TRAINERS.items():
        processes[trainer] = start("bench.real_trl", model, kind)
        await_process(processes[trainer])
    seconds: dict[str, list[float]] = {trainer: [] for trainer in processes}
    peaks: dict[str, float] = {}
    for step in range(STEPS):
        for trainer, process in processes.items():
            taken, state = take_step(process)
            seconds[trainer].append(taken)
            peaks[trainer] = state["peak_mib"]
            print(f"step {step}, {trainer}: {taken:.2f} s", flush=True)
    runs = {}
    for trainer, process in processes.items():
        curves = json.loads(process.communicate("\n")[0].splitlines()[-1])
        runs[trainer] = Run(seconds[trainer], peaks[trainer], curves)
    return runs


def draw(runs: dict[str, Run]) -> None:
    """Draw the curves of both over one another."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(DRAWN), figsize=(9, 2.6), layout="constrained")
    for panel, (name, title) in zip(panels, DRAWN.items(), strict=True):
        for (trainer, run), style in zip(runs.items(), ["-", "--"], strict=True):
            panel.plot(range(1, STEPS + 1), run.curves[name], style, label=trainer)
        panel.set(title=title, xlabel="optimiser step")
    panels[0].legend()
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    if len(sys.argv) == 3:
        return train(*sys.argv[1:])
    runs = compare(sys.argv[1])
    for trainer, run in runs.items():
        seconds = statistics.median(run.seconds[1:])
        print(f"{trainer}: {seconds:.2f} s a step, {run.peak_mib:.0f} MiB", flush=True)
    facts = provenance() | {"machine": machine("cpu")}
    found = {trainer: run._asdict() for trainer, run in runs.items()}
    RECEIPT.write_text(json.dumps(facts | {"runs": found}) + "\n")
    draw(runs)


if __name__ == "__main__":
    main()
