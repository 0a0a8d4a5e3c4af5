"""What is replaced in verl, and in which modules; the plugin that verl loads itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import verl.trainer.distillation.fsdp.losses as distillation
import verl.trainer.ppo.core_algos as core
import verl.utils.torch_functional as logits
import verl.workers.engine.fsdp.transformer_impl as engine
import verl.workers.utils.losses as losses
from verl.utils.experimental.torch_functional import FusedLinearForPPO

from fastpg.integrations import verl as ours
from fastpg.integrations import verl_functions as functions
from fastpg.integrations import verl_verify
from fastpg.integrations.patching import PatchError
from fastpg.integrations.verifying import Sizes

HELD = [
    (core, "compute_gae_advantage_return"),
    (core, "compute_value_loss"),
    (losses, "compute_value_loss"),
    (logits, "logprobs_from_logits"),
    (engine, "logprobs_from_logits"),
    (logits, "entropy_from_logits"),
    (logits, "entropy_from_logits_with_chunking"),
    (logits, "calculate_sum_pi_squared_from_logits"),
    (distillation, "_chunked_topk_log_probs"),
    (FusedLinearForPPO, "forward"),
]


def held():
    return [vars(owner)[name] for owner, name in HELD] + [core.ADV_ESTIMATOR_REGISTRY["gae"]]


@pytest.fixture(autouse=True)
def stock_afterwards():
    before = held()
    yield
    ours.unpatch()
    assert all(a is b for a, b in zip(held(), before, strict=True))


def test_everything_is_replaced_in_its_holders_too_and_given_back():
    before, registered = held(), set(core.POLICY_LOSS_REGISTRY)
    with ours.patched(strict=True) as report:
        assert report.version == "0.9.1" and ours.is_patched()
        assert not any(a is b for a, b in zip(held(), before, strict=True))
        assert losses.compute_value_loss is core.compute_value_loss
        for loss in functions.POLICY_LOSSES:
            assert core.get_policy_loss_fn(loss.__name__) is loss
    assert not ours.is_patched() and set(core.POLICY_LOSS_REGISTRY) == registered


def test_a_word_stands_for_its_functions_alone():
    before = held()
    with ours.patched(["value"], strict=True):
        changed = [a is not b for a, b in zip(held(), before, strict=True)]
    assert changed == [name == "compute_value_loss" for _, name in HELD] + [False]


def test_a_second_patch_changes_nothing_and_says_so():
    ours.patch(["gae"], strict=True)
    first = held()
    assert all(row.state == "refused" for row in ours.patch().rows)
    with pytest.raises(PatchError, match="already patched"):
        ours.patch(strict=True)
    assert all(a is b for a, b in zip(held(), first, strict=True))


def test_verify_finds_ours_no_less_exact(monkeypatch):
    monkeypatch.setattr(verl_verify, "LENGTH", 200)
    report = ours.verify(Sizes(vocab=500, hidden=32, tokens=20))
    # A busy machine is no place to compare times.
    assert {row.worse for row in report.rows} <= {"", "time", "memory"}, str(report)
    judged = [row for row in report.rows if row.ours.value >= 0]
    assert len(judged) >= 5 and not ours.is_patched()


def test_an_unknown_word_raises():
    with pytest.raises(ValueError, match=r"what must be of logprob, .*, got 'loss'"):
        ours.patch(["loss"])


def test_a_release_that_was_not_tested_is_in_the_report(monkeypatch):
    monkeypatch.setattr(ours._patches, "version", lambda: "0.10.0")
    report = ours.patch(["value"])
    assert [row.state for row in report.rows if row.target == "verl"] == ["refused"]
    assert losses.compute_value_loss.__module__ == functions.__name__
    ours.unpatch()
    with pytest.raises(PatchError, match=r"tested with verl 0\.9"):
        ours.patch(["value"], strict=True)


def test_an_engine_that_was_built_before_is_in_the_report():
    built = object.__new__(engine.FSDPEngine)
    built.compute_entropy_from_logits = logits.entropy_from_logits
    (row,) = (row for row in ours.patch(["entropy"]).rows if row.state == "refused")
    assert "FSDPEngine.compute_entropy_from_logits" in row.target
    ours.unpatch()
    with pytest.raises(PatchError, match="an engine was built before the patch"):
        ours.patch(["entropy"], strict=True)
    del built
    assert ours.patch(["entropy"]).complete


def test_verl_loads_the_plugin_which_waits_for_its_modules():
    code = """
from stubs import stub
stub("ray")
import sys, verl
print("verl.trainer.ppo.core_algos" in sys.modules)
import verl.trainer.distillation.fsdp.losses as distillation
import verl.trainer.ppo.core_algos as core
for f in core.compute_gae_advantage_return, core.get_policy_loss_fn("fastpg_gspo"), (
    core.compute_value_loss
):
    print(f.__module__)
from fastpg.integrations.verl import patch
print(patch(["value"]).complete)
"""
    environment = os.environ | {"FASTPG_VERL": "gae,losses"}
    tests = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([tests, environment["PYTHONPATH"]])
    command = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    functions_here, core_there = "fastpg.integrations.verl_functions", core.__name__
    assert run.stdout.split() == ["False", functions_here, functions_here, core_there, "False"]
    assert "FASTPG_VERL has 'losses', must be of logprob" in run.stderr
