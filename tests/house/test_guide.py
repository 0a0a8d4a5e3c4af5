"""The guide "Train your own model", followed to the letter, ends with a better model."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from fastpg.trainer.options import RunConfig, read_options
from fastpg.trainer.rewards.reward_trainer import RewardConfig
from fastpg.trainer.settings.config import from_mapping
from fastpg.trainer.settings.parsing import load_yaml

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "train_your_own_model.md"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
COMPARED = re.compile(r"^(\S*model) +kind ([-+.\d]+)  words ([.\d]+)$", re.MULTILINE)


def script():
    """The page as one: a block with a title is a file of that name, and those of bash are run."""
    lines = ["set -e"]
    for language, title, text in BLOCK.findall(GUIDE.read_text()):
        if title:
            lines.append(f"cat > {title} <<'end of file'\n{text}end of file")
        elif language == "bash":
            lines.append(text)
    return "\n".join(lines)


def follow(folder):
    """Run the page in a folder. Returns what it printed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script()], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.training
def test_the_guide_ends_with_a_better_model_and_the_numbers_that_it_shows(tmp_path):
    printed = follow(tmp_path)
    assert "0 fail" in printed
    (_, before, longer), (_, after, shorter) = COMPARED.findall(printed)
    assert float(after) > float(before) + 0.5 and float(shorter) < float(longer)
    shown, seen = COMPARED.findall(GUIDE.read_text()), COMPARED.findall(printed)
    for (name, *numbers), (same, *others) in zip(shown, seen, strict=True):
        assert name == same
        assert [float(x) for x in numbers] == pytest.approx([float(x) for x in others], abs=0.3)
    # The table of metrics names those that there are.
    table = GUIDE.read_text().partition("| metric |")[2].partition("\n\n")[0]
    named = {name for name in re.findall(r"`([^`\s-]+/[^`\s]+|grad_norm)`", table)}
    lines = (tmp_path / "out/first/metrics.jsonl").read_text().splitlines()
    known = {name for line in lines for name in json.loads(line)}
    assert len(named) > 15 and not named - known


def commands():
    """The arguments of every `fastpg train` and `fastpg reward-model` of the page."""
    blocks = BLOCK.findall(GUIDE.read_text())
    text = "".join(text for language, _, text in blocks if language == "bash")
    lines = text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line) for line in lines if line.startswith("fastpg ")]
    return [words[1:] for words in found if words[1] in ("train", "reward-model")]


def test_the_commands_of_the_guide_have_settings_that_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _, title, text in BLOCK.findall(GUIDE.read_text()):
        if title:
            Path(title).write_text(text)
            if title.endswith(".py"):
                compile(text, title, "exec")
    assert len(commands()) >= 5
    for command, *flags in commands():
        kind = RunConfig if command == "train" else RewardConfig
        given = read_options(flags, command, kind)
        for flag in ("check", "resume"):
            given.pop(flag, None)
        from_mapping(kind, given)
    run = from_mapping(RunConfig, load_yaml("run.yaml"))
    assert run.reward == ["rewards:kind", "rewards:brief"] and run.learning_rate == 2e-4


def test_every_setting_that_the_guide_names_is_one():
    named = set(re.findall(r"`?--(\w+)", GUIDE.read_text())) - {"check", "resume", "config", "help"}
    known = set(RunConfig.__dataclass_fields__) | set(RewardConfig.__dataclass_fields__)
    assert named and not named - known
