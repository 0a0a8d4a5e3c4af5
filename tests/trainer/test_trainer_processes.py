"""Two processes that share a rollout, and maybe the weights, make the step of one on all of it."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType, PartialState
from accelerate.commands.config.config_args import load_config_from_file
from played_episodes import played_episodes
from recorded_runs import OF_ALGORITHM, move, trained_parameters
from recorded_runs import SETTINGS as RUN_SETTINGS
from test_own_loop import columns
from test_packing import WHOLE
from tiny_trainer import make_trainer, metrics_of, share_of_praise, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from two_processes import ENGINES, in_two_processes

from fastpg.tasks import reviews
from fastpg.trainer import InputError
from fastpg.trainer.learning.micro_batches import cut_by_tokens
from fastpg.trainer.rollouts.rollout import Rollout
from fastpg.trainer.run.engine import is_deepspeed, is_zero3, whole_state

CONFIGURATIONS = Path(__file__).parents[2] / "examples" / "accelerate"
EPISODES, PROMPT, LENGTH, GROUP = 20, 3, 6, 5
BUDGET = 16  # tokens of a micro-batch


def fixed_rollout():
    """The completions of the second half are shorter, so that the processes differ in tokens."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 40, (EPISODES, PROMPT + LENGTH), generator=g)
    lengths = torch.randint(1, LENGTH + 1, (EPISODES,), generator=g)
    lengths[EPISODES // 2 :].clamp_(max=2)
    mask = torch.arange(LENGTH) < lengths[:, None]
    seen = torch.cat([torch.ones(EPISODES, PROMPT, dtype=torch.bool), mask], 1).long()
    finished = torch.arange(EPISODES) < EPISODES // 2
    return Rollout(ids, seen, mask, finished), torch.randn(EPISODES, generator=g)


def step(folder, algorithm, rows, **changes):
    """Parameters and metrics after one optimiser step on the episodes `rows` of the rollout."""
    trainer = make_trainer(
        folder, algorithm=algorithm, rollout_batch_size=len(rows), kl_coef=0.1,
        num_generations=1 if algorithm == "ppo" else GROUP, num_mini_batches=1, num_ppo_epochs=1,
        learning_rate=1e-2, max_grad_norm=1e3,
        adam_epsilon=0.1,  # so that the size of a gradient shows
        **changes,
    )  # fmt: skip
    assert trainer.paths.packing is not None
    assert (trainer.paths.head is None) == is_zero3(trainer.accelerator)
    rollout, scores = fixed_rollout()
    experience, metrics = trainer.learner.experience(rollout[rows], scores[rows])
    metrics |= trainer.learner.update(experience)
    if not is_deepspeed(trainer.accelerator):
        return trained_parameters(trainer), metrics
    state = whole_state(trainer.accelerator, trainer.model)
    return torch.cat([x.flatten() for x in state.values()]) if state else None, metrics


CASES = {
    "ppo": {"algorithm": "ppo"},
    "grpo": {"algorithm": "grpo"},
    "dr_grpo": {"algorithm": "dr_grpo"},
    # None of the episodes of the second process has ended, so nothing of it counts.
    "masked": {"algorithm": "ppo", "mask_truncated_completions": True},
    # The second process has shorter episodes, and fills fewer micro-batches.
    "tokens": {"algorithm": "grpo", "micro_batch_size": None, "micro_batch_tokens": BUDGET},
    "value model": {"algorithm": "ppo", "value_learning_rate": 1e-2},
}


HALVES = torch.arange(EPISODES).chunk(2)


def settings(name, folder):
    """Those of a case, whose critic is in a folder."""
    has_model = name == "value model"
    return CASES[name] | ({"value_model": f"{folder}/critic"} if has_model else {})


def own_half(folder, cases):
    rows = HALVES[torch.distributed.get_rank()]
    return {name: step(folder, rows=rows, **settings(name, folder)) for name in cases}


@pytest.fixture
def critic(tmp_path):
    """A model of values of another shape than the policy, whose first values are not 0."""
    torch.manual_seed(1)
    config = tiny_model(num_hidden_layers=1, hidden_size=16, intermediate_size=32).config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "critic")
    reviews.build_tokenizer().save_pretrained(tmp_path / "critic")


def test_the_processes_have_different_numbers_of_micro_batches():
    """In the case "tokens"."""
    rollout, _ = fixed_rollout()
    assert [len(cut_by_tokens(rollout, half, BUDGET, WHOLE)) for half in HALVES] == [5, 3]


@pytest.mark.usefixtures("critic")
@pytest.mark.parametrize(
    ("engine", "cases"),
    [
        ("fsdp", ["masked", "tokens"]),
        pytest.param("fsdp", list(CASES), marks=pytest.mark.slow),
        pytest.param("ddp", list(CASES), marks=pytest.mark.slow),
    ],
)
def test_two_processes_make_the_step_of_one(tmp_path, engine, cases):
    """Parameters and every metric, also where nothing of a process counts."""
    ranks = in_two_processes(own_half, tmp_path, cases, engine=engine)
    for name in cases:
        rows = torch.arange(EPISODES)
        parameters, metrics = step(tmp_path, rows=rows, **settings(name, tmp_path))
        for theirs, their_metrics in (rank[name] for rank in ranks):
            torch.testing.assert_close(theirs, parameters, rtol=0, atol=1e-6)
            assert their_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.usefixtures("critic")
# DeepSpeed calls functions of torch by their older names.
@pytest.mark.filterwarnings("ignore:.torch.distributed.* is deprecated:FutureWarning")
@pytest.mark.parametrize("cases", [["masked", "grpo"], ["tokens", "value model"]])
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_two_processes_of_deepspeed_make_the_step_of_one(tmp_path, engine, cases):
    """In two micro-batches a process or more, of which DeepSpeed must make one step."""
    pytest.importorskip("deepspeed")
    ranks = in_two_processes(own_half, tmp_path, cases, engine=engine)
    for name in cases:
        rows = torch.arange(EPISODES)
        parameters, metrics = step(tmp_path, rows=rows, **settings(name, tmp_path))
        for theirs, their_metrics in (rank[name] for rank in ranks):
            assert their_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)
            # Under ZeRO-3 the main process alone has the whole weights.
            if theirs is not None:
                torch.testing.assert_close(theirs, parameters, rtol=0, atol=1e-6)
        assert ranks[0][name][0] is not None


EPISODES_OF_A_LOOP = played_episodes(groups=4)
SCORES_OF_A_LOOP = torch.linspace(-1, 1, 16)[
    torch.randperm(16, generator=torch.Generator().manual_seed(2))
]


def own_loop(folder, algorithm, rows):
    """Parameters and metrics after two steps of a loop of one's own on the episodes `rows`."""
    changes = {"num_ppo_epochs": 1, "num_mini_batches": 1, "reward_weights": None}
    settings = RUN_SETTINGS | OF_ALGORITHM[algorithm] | changes | {"algorithm": algorithm}
    trainer = make_trainer(folder, None, dataset=None, **settings)
    move(trainer)
    queries, responses, masks = columns([EPISODES_OF_A_LOOP[i] for i in rows])
    seen = [
        trainer.step(queries, responses, SCORES_OF_A_LOOP[rows], masks)
        for _ in range(trainer.args.num_steps)
    ]
    return trained_parameters(trainer), seen


def own_loops(folder):
    """Those of this process, on its half of the episodes; and what is said of unequal parts."""
    rank = torch.distributed.get_rank()
    half = range(8 * rank, 8 * rank + 8)
    runs = {name: own_loop(f"{folder}/{name}", name, list(half)) for name in ("ppo", "grpo")}
    with pytest.raises(InputError) as refusal:
        own_loop(f"{folder}/unequal", "ppo", list(half)[rank:])
    return runs, str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_loop_of_ones_own_on_two_processes_ends_in_the_weights_of_one(tmp_path, engine):
    """And with its metrics, but for the times; the files have the episodes of both."""
    ranks = in_two_processes(own_loops, tmp_path, engine=engine)
    for name in ("ppo", "grpo"):
        parameters, expected = own_loop(tmp_path / f"one-{name}", name, list(range(16)))
        for runs, _ in ranks:
            theirs, seen = runs[name]
            torch.testing.assert_close(theirs, parameters, rtol=0, atol=3e-6)
            for row, by_one in zip(seen, expected, strict=True):
                timeless = {key for key in by_one if not re.match("time/|tokens_per_second", key)}
                assert {key: row[key] for key in timeless} == pytest.approx(
                    {key: by_one[key] for key in timeless}, rel=1e-4, abs=1e-5
                )
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / name / "model")
        weights = torch.nn.utils.parameters_to_vector(saved.parameters())
        torch.testing.assert_close(weights, ranks[0][0][name][0][: len(weights)], rtol=0, atol=0)
        assert len(metrics_of(tmp_path / name)) == 2
    for _, refusal in ranks:
        assert refusal == "step() needs as many episodes from each process, and got 8, 7."


@pytest.mark.parametrize("path", sorted(CONFIGURATIONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_takes_the_configurations_that_are_shipped(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 8 * config.num_machines and config.mixed_precision == "no"
    if config.distributed_type == DistributedType.FSDP:
        assert config.fsdp_config["fsdp_version"] == 2
    else:
        assert not config.fsdp_config
    assert (config.distributed_type == DistributedType.DEEPSPEED) == path.stem.startswith("zero")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("WORLD_SIZE", "2", "2 processes were started, but each would train alone; ACC"),
        ("ACCELERATE_USE_FSDP", "true", "accelerate leaves FSDP out, for one process alone or"),
        pytest.param(
            "ACCELERATE_USE_DEEPSPEED",
            "true",
            "accelerate leaves DEEPSPEED out, for one process",
            marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="it is not installed"),
        ),
    ],
)
def test_processes_that_would_not_share_as_they_were_told_are_refused(
    tmp_path, monkeypatch, name, value, sentence
):
    """As a program that has asked accelerate for its state before, and one process of an engine."""
    PartialState()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=sentence):
        make_trainer(tmp_path)


RUN = {"num_steps": 3, "save_steps": 1, "save_total_limit": None}


def trained_and_resumed(folder):
    """Parameters of a run, and of one that takes up its checkpoint of step 1."""
    whole_run = make_trainer(f"{folder}/run", **RUN)
    whole_run.train()
    resumed = make_trainer(f"{folder}/resumed", **RUN)
    resumed.train(resume_from_checkpoint=f"{folder}/run/checkpoint-1")
    return trained_parameters(whole_run), trained_parameters(resumed)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_go_on_from_a_checkpoint_as_if_never_stopped(tmp_path, engine):
    (first, resumed), (others, _) = in_two_processes(trained_and_resumed, tmp_path, engine=engine)
    assert torch.equal(first, others)
    torch.testing.assert_close(resumed, first, rtol=0, atol=1e-6)
    run, again = metrics_of(tmp_path / "run"), metrics_of(tmp_path / "resumed")
    rewards = [[row["reward/mean"] for row in rows] for rows in (run, again)]
    assert rewards[0][1:] == rewards[1][-2:]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    weights = torch.cat([p.detach().flatten() for p in saved.parameters()])
    torch.testing.assert_close(weights, first[: len(weights)], rtol=0, atol=0)
    before = torch.nn.utils.parameters_to_vector(tiny_model().parameters())
    assert not torch.equal(weights, before)


def full_disk_at_step_1(folder):
    """A run whose main process cannot write one checkpoint."""
    trainer, calls = make_trainer(f"{folder}/full", num_steps=2, save_steps=1), []
    write = trainer._write_model

    def write_or_fail(*given):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(*given)

    trainer._write_model = write_or_fail
    return trainer.train()


def dying(folder):
    """The message of a process whose neighbour dies while it scores."""
    calls = []

    def deadly(prompts, completions):
        calls.append(1)
        if len(calls) == 2 and torch.distributed.get_rank() == 1:
            os._exit(0)
        return share_of_praise(prompts, completions)

    try:
        make_trainer(f"{folder}/dying", deadly).train()
    except InputError as error:
        return str(error)


@pytest.mark.slow
def test_a_full_disk_does_not_leave_the_other_process_waiting(tmp_path):
    first, second = in_two_processes(full_disk_at_step_1, tmp_path)
    assert first == second
    assert sorted(path.name for path in (tmp_path / "full").glob("checkpoint-*")) == [
        "checkpoint-0", "checkpoint-2",
    ]  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
def test_a_process_that_dies_ends_the_others_with_a_message(tmp_path, engine):
    left, dead = in_two_processes(dying, tmp_path, engine=engine)
    assert dead is None
    assert left.startswith("Another process of this run has ended; its own message says why.")
    assert "checkpoint-0" in left
