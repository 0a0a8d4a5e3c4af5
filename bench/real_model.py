"""python -m bench.real_model MODEL [CASE]: a GRPO step on a real model, side by side with TRL's.

MODEL is a directory for `from_pretrained`; CASE a word in the name of the cases to run, of which
the one with a wide head takes the tokenizer alone from MODEL. Each trainer is a process of its own,
which keeps its model; they take a step in turn. TRL comes from `.integrations/trl-1.16.0`, which
`make test-integrations` lays out. Both train in float32, with a reference of weight 0.04, one
optimiser step on a rollout, and the same sizes. The time of a row is that of the process on the
CPU, all threads together: other work on the machine hardly shows in it. The memory is the peak.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from .__main__ import Results

FOLDERS = [f".integrations/{name}/site-packages" for name in ("trl-1.16.0", "datasets")]
WORDS = "time year people way day woman life child world school state family".split()  # noqa: SIM905
WIDE = "the head of Qwen2.5-0.5B, V=151936, on 2 of its layers"


@dataclass(frozen=True)
class Case:
    """Prompts of one kind, and the sizes of a step."""

    prompts: list[str]
    batch: int  # episodes
    group: int
    tokens: int  # of a completion at most
    micro: dict[str, int]  # episodes of a forward and backward, for each trainer
    target: str = ""  # for TRL's time, in units of ours
    memory_target: str = ""
    model: str = "SmolLM2-135M"
    steps: int = 2  # of which the first is left out, if it is not the only one


def make_cases() -> dict[str, Case]:
    g = random.Random(0)
    sums = [
        f"What is {g.randint(1, 9)} plus {g.randint(1, 9)}? Answer with the number alone."
        for _ in range(64)
    ]
    stories = [
        " ".join(g.choices(WORDS, k=470)) + ". Tell a long story with these words."
        for _ in range(16)
    ]
    return {
        "4 prompts of 44 x 8 of 12, micro-batches of 8": Case(
            sums, 32, 8, 12, {"fastpg": 8, "TRL": 8}, ">= 2", "<= TRL * 0.8"
        ),
        # TRL's memory for 16 of these would be 20 GB.
        "1 prompt of 512 x 16 of 64, TRL in micro-batches of 4": Case(
            stories, 16, 16, 64, {"fastpg": 16, "TRL": 4}, ">= 2.86", steps=1
        ),
        "4 prompts of 44 x 8 of 64, one micro-batch": Case(
            sums, 32, 8, 64, {"fastpg": 32, "TRL": 32}, "", "<= TRL * 0.5", WIDE
        ),
    }


def write_wide_model(tokenizer: str, folder: str) -> None:
    """Write a model with the widths of Qwen2.5-0.5B, random weights and 2 of its 24 layers."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def reward(completions: list[Any], **_: Any) -> list[float]:
    """A number that differs from one completion to another."""
    return [len(completion[0]["content"]) % 7 / 7 for completion in completions]


def examples(case: Case) -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": text}]} for text in case.prompts]


def wait() -> None:
    """Say that the last step is done, and wait for the word to begin the next."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mib": peak, "cpu": time.process_time()}), flush=True)
    sys.stdin.readline()


def run_fastpg(model: str, case: Case, folder: str) -> None:
    from fastpg.trainer import PPOConfig, PPOTrainer

    args = PPOConfig(
        algorithm="grpo", output_dir=folder, num_steps=case.steps, rollout_batch_size=case.batch,
        num_generations=case.group, max_new_tokens=case.tokens, num_ppo_epochs=1,
        num_mini_batches=1, micro_batch_size=case.micro["fastpg"], learning_rate=1e-6,
    )  # fmt: skip
    trainer = PPOTrainer(model, reward, args, train_dataset=examples(case))
    # A run also evaluates, writes samples and saves; here it makes steps alone, as TRL does.
    for batch in trainer.loader:
        wait()
        trainer.learn(*trainer.roll_out(batch))
    wait()


def run_trl(model: str, case: Case, folder: str) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait()

    args = GRPOConfig(
        output_dir=folder, max_steps=case.steps, per_device_train_batch_size=case.micro["TRL"],
        gradient_accumulation_steps=case.batch // case.micro["TRL"], num_generations=case.group,
        max_completion_length=case.tokens, beta=0.04, loss_type="grpo", learning_rate=1e-6,
        bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    data = Dataset.from_list(examples(case))
    GRPOTrainer(model, reward, args, train_dataset=data, callbacks=[Turns()]).train()
    wait()


def start(module: str, *words: str, with_trl: bool = True) -> subprocess.Popen[str]:
    """Start the process of a trainer."""
    here = Path(__file__).parents[1]
    paths = [str(here), *(str(here / folder) for folder in FOLDERS if with_trl)]
    process = subprocess.Popen(
        [sys.executable, "-m", module, *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=here,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return process


def answer(process: subprocess.Popen[str]) -> dict[str, float]:
    """Return the peak memory and the CPU seconds of a process, when it is ready for a step."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith('{"peak_mib"'):
            return json.loads(line)
    raise RuntimeError("a trainer has ended early; its error is above")


def take_step(process: subprocess.Popen[str]) -> tuple[float, dict[str, float]]:
    """Let a process take a step; return its seconds, and what it answers then."""
    assert process.stdin is not None
    began = time.perf_counter()
    process.stdin.write("\n")
    process.stdin.flush()
    state = answer(process)
    return time.perf_counter() - began, state


def compare(model: str, name: str) -> None:
    """Let both trainers take their steps in turn, and write a row for each."""
    if make_cases()[name].model != WIDE:
        return measure(model, name)
    with tempfile.TemporaryDirectory() as folder:
        write_wide_model(model, folder)
        return measure(folder, name)


def measure(model: str, name: str) -> None:
    processes = {
        trainer: start("bench.real_model", model, trainer, name, with_trl=trainer == "TRL")
        for trainer in ("fastpg", "TRL")
    }
    cpu = {trainer: answer(process)["cpu"] for trainer, process in processes.items()}
    seconds: dict[str, list[float]] = {trainer: [] for trainer in processes}
    peaks: dict[str, float] = {}
    for _ in range(make_cases()[name].steps):
        for trainer, process in processes.items():
            taken, state = take_step(process)
            seconds[trainer].append(state["cpu"] - cpu[trainer])
            cpu[trainer], peaks[trainer] = state["cpu"], state["peak_mib"]
            print(f"{name}, {trainer}: {taken:.2f} s, {seconds[trainer][-1]:.2f} CPU s", flush=True)
    for process in processes.values():
        process.communicate("\n")
    write(name, seconds, peaks)


def write(name: str, seconds: dict[str, list[float]], peaks: dict[str, float]) -> None:
    """Add a row for each trainer to the results, the first step left out if there are more."""
    case, rows = make_cases()[name], []
    counted = {trainer: times[1:] or times for trainer, times in seconds.items()}
    for trainer, times in counted.items():
        later = sorted(times)
        ratios = [t / ours for t, ours in zip(times, counted["fastpg"], strict=True)]
        rows.append(
            {
                "op": "grpo_step", "case": f"{case.model}, {name}, fp32", "candidate": trainer,
                "median_ms": 1e3 * statistics.median(later), "p10_ms": 1e3 * later[0],
                "p90_ms": 1e3 * later[-1], "ratio": statistics.median(ratios),
                "target": case.target if trainer == "TRL" else "",
                "extra_mib": peaks[trainer], "memory_target": case.memory_target,
                "threads": torch.get_num_threads(),
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    Results("cpu").append(rows)


def main() -> None:
    if len(sys.argv) < 4:
        word = sys.argv[2] if len(sys.argv) == 3 else ""
        for name, case in make_cases().items():
            if word in f"{case.model} {name}":
                compare(sys.argv[1], name)
        return
    model, trainer, name = sys.argv[1:]
    run = {"fastpg": run_fastpg, "TRL": run_trl}[trainer]
    with tempfile.TemporaryDirectory() as folder:
        run(model, make_cases()[name], folder)


if __name__ == "__main__":
    main()
