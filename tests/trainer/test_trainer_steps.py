"""Many optimiser steps of `PPOTrainer.train` against a plain loop, and what each of them sees."""

from pathlib import Path

import pytest
import torch
from plain_loop import learn_plainly, plain_loop
from recorded_runs import OF_ALGORITHM, SETTINGS, moved_trainer, recording, trained_parameters
from safetensors.torch import load_file
from tiny_trainer import make_trainer, metrics_of, tiny_model
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of an algorithm and its plain loop, made when it is first asked for."""
    made = {}

    def run(algorithm):
        if algorithm not in made:
            folder = tmp_path_factory.mktemp("run")
            trainer, settings = moved_trainer(folder, algorithm)
            loop, start = plain_loop(trainer, settings), trained_parameters(trainer)
            with recording(trainer) as rounds:
                trainer.train()
            rounds = rounds[1:-1]  # The first and the last are evaluations.
            rows = learn_plainly(loop, rounds)
            made[algorithm] = trainer, loop, start, rounds, metrics_of(folder), rows
        return made[algorithm]

    return run


@pytest.mark.parametrize("algorithm", OF_ALGORITHM)
def test_the_parameters_are_those_of_a_plain_loop(runs, algorithm):
    trainer, loop, start, rounds, *_ = runs(algorithm)
    assert [len(played.minibatches()) for played in rounds] == [4, 4]
    assert (trained_parameters(trainer) - start).abs().max() > 0.01
    torch.testing.assert_close(
        trained_parameters(trainer).double(), loop.parameters(), rtol=0, atol=3e-6
    )


@pytest.mark.parametrize("algorithm", OF_ALGORITHM)
def test_the_metrics_are_those_of_a_plain_loop(runs, algorithm):
    *_, logged, by_hand = runs(algorithm)
    assert [row["step"] for row in logged] == [1, 2]
    for row, expected in zip(logged, by_hand, strict=True):
        # The evaluation after training is among the metrics of the last step.
        others = {name for name in row if name.startswith(("time/", "eval/"))}
        assert set(row) == {*expected, *others, "step", "tokens_per_second"}
        actual = {name: row[name] for name in expected}
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_runs_above_meet_every_bound(runs):
    """The bounds of gradients, ratios and values bite, but not everywhere."""
    norms = runs("grpo")[1].norms
    assert min(norms) < SETTINGS["max_grad_norm"] < max(norms)
    for row in runs("ppo")[-1]:
        assert 0 < row["value/clip_frac"] < 1
        assert 0 < row["completions/finished"] < 1
    for algorithm in ("ppo", "reinforce++", "grpo", "dr_grpo", "gspo"):
        for bound in ("policy/clip_frac_low", "policy/clip_frac_high"):
            assert 0 < runs(algorithm)[-1][0][bound] < 1, (algorithm, bound)


def test_the_saved_weights_are_those_after_the_last_step(runs):
    trainer, loop, *_ = runs("ppo")
    folder = Path(trainer.args.output_dir, "model")
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    head = load_file(folder / "value_head.safetensors")
    parameters = [*saved.parameters(), head["weight"], head["bias"]]
    vector = torch.nn.utils.parameters_to_vector(parameters).double()
    torch.testing.assert_close(vector, loop.parameters(), rtol=0, atol=3e-6)


def joined(batches):
    return [number for batch in batches for number in batch]


def test_the_first_pass_is_in_the_order_of_the_old_log_probs(runs):
    """Micro-batch by micro-batch, so that the first ratio is 1 to the last bit."""
    for played in runs("ppo")[3]:
        first_pass = [part for parts in played.parts[:2] for part in parts]
        assert [len(part) for part in first_pass] == [4, 2, 4, 2]
        torch.testing.assert_close(first_pass, played.looks, rtol=0, atol=0)
        assert joined(played.minibatches()[:2]) == list(range(12))


def test_every_later_pass_is_in_an_order_of_its_own(tmp_path):
    trainer, _ = moved_trainer(tmp_path, "ppo", num_ppo_epochs=4, num_mini_batches=5)
    with recording(trainer) as rounds:
        trainer.train()
    orders = []
    for played in rounds[1:-1]:
        batches = played.minibatches()
        assert [len(batch) for batch in batches] == 4 * [3, 3, 2, 2, 2]
        orders += [joined(batches[i : i + 5]) for i in range(0, 20, 5)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    # Both rollouts begin in their own order, and shuffle it three times.
    assert len(set(map(tuple, orders))) == 7


def test_every_parameter_is_learned_at_its_rate(runs):
    rounds = runs("ppo")[3]
    steps = [groups for played in rounds for groups in played.groups]
    rates = [tuple(group["lr"] for group in groups) for groups in steps]
    assert rates == 4 * [(3e-3, 0.1)] + 4 * [(1.5e-3, 0.05)]
    for group in (group for groups in steps for group in groups):
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-3, 0.0)


@pytest.fixture
def gradients():
    """The gradient at every optimiser step, and every step's parameters before it."""
    seen = []

    def before_step(optimizer, *_):
        every = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in every]
        seen.append(torch.nn.utils.parameters_to_vector(grads).clone())

    hook = register_optimizer_step_pre_hook(before_step)
    yield seen
    hook.remove()


def test_a_step_has_the_gradient_of_its_own_minibatch_alone(tmp_path, gradients):
    """While nothing moves, every pass over the rollout has the gradient of the first one."""
    still = {"learning_rate": 0.0, "value_learning_rate": 0.0, "max_grad_norm": 1e3}
    trainer, _ = moved_trainer(tmp_path, "ppo", **still, num_mini_batches=1, num_steps=1)
    trainer.train()
    first, second = gradients
    assert first.norm() > 0.1
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-6)


def test_dropout_changes_nothing(tmp_path):
    results = []
    for rate in (0.0, 0.4):
        model = tiny_model(attention_dropout=rate).train()
        trainer = make_trainer(tmp_path / f"{rate}", model=model, num_steps=1)
        with recording(trainer) as rounds:
            trainer.train()
        assert all(played.is_quiet for played in rounds)
        results.append(trained_parameters(trainer))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_values_start_at_zero(tmp_path):
    trainer = make_trainer(tmp_path, algorithm="ppo", num_steps=1)
    trainer.train()
    assert metrics_of(tmp_path)[0]["value/explained_variance"] == pytest.approx(0.0, abs=1e-6)
