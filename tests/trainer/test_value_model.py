"""A critic with a trunk of its own: its values, where it begins, its files, and its way back."""

import copy
import dataclasses
import json

import pytest
import torch
from resumable_run import noisy_praise, without_times
from safetensors.torch import load_file
from test_reward_model import make_reward_trainer, praise_pairs
from tiny_trainer import make_trainer, metrics_of, share_of_praise, tiny_model

from fastpg.cli import main
from fastpg.tasks import reviews
from fastpg.trainer import InputError, RewardModel
from fastpg.trainer.models.loading import load_scorer
from fastpg.trainer.models.policy import logprobs_through

# peft asks for a property of transformers by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def critic(tmp_path):
    """A language model of another shape than the policy, with the same tokenizer."""
    model = tiny_model(num_hidden_layers=1, hidden_size=16, intermediate_size=32)
    model.save_pretrained(tmp_path / "critic")
    reviews.build_tokenizer().save_pretrained(tmp_path / "critic")
    return str(tmp_path / "critic")


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A reward model that has been trained a little."""
    folder = tmp_path_factory.mktemp("reward")
    make_reward_trainer(folder, praise_pairs(64), learning_rate=1e-2).train()
    return str(folder / "model")


def values_by_hand(value_model, rollout):
    """fp64, unpadded: what the head says of the state before each token of the completions."""
    model = copy.deepcopy(value_model).double()
    values = torch.zeros(rollout.mask.shape, dtype=torch.float64)
    for row, (ids, kept, mask) in enumerate(
        zip(rollout.input_ids, rollout.attention_mask, rollout.mask, strict=True)
    ):
        states = model.model(input_ids=ids[kept.bool()][None]).last_hidden_state[0]
        length = int(mask.sum())
        values[row, :length] = states[-length - 1 : -1] @ model.score.weight[0]
    return values


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False])
def test_values_are_those_of_the_models_own_states(tmp_path, critic, packed):
    trainer = make_trainer(tmp_path / "run", value_model=critic)
    value_model = trainer.model.value_model
    assert value_model.score.weight.abs().max() == 0.0
    torch.nn.init.normal_(value_model.score.weight)
    rollout = trainer._sample(next(iter(trainer.loader)))
    paths = trainer.paths
    assert paths.value_packing is not None
    if not packed:
        trainer.learner.paths = dataclasses.replace(paths, value_packing=None)
    values = logprobs_through(trainer.model, trainer.learner.batch(rollout)).values
    expected = values_by_hand(value_model, rollout)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(
        values[rollout.mask].double(), expected[rollout.mask], rtol=1e-4, atol=1e-5
    )


def test_policy_and_value_model_learn_each_from_its_own_loss(tmp_path, critic):
    gradients = {}
    for vf_coef in (0.0, 0.5):
        trainer = make_trainer(tmp_path / str(vf_coef), value_model=critic, vf_coef=vf_coef)
        torch.nn.init.ones_(trainer.model.value_model.score.weight)
        torch.manual_seed(0)
        rollout = trainer._sample(next(iter(trainer.loader)))
        old, _ = trainer.learner.experience(rollout, torch.linspace(-1, 1, len(rollout.mask)))
        targets = trainer.learner._targets(old, rollout.mask.sum())
        trainer.learner._loss(old, targets).loss.backward()
        for part in ("policy", "value_model"):
            module = getattr(trainer.model, part)
            every = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
            gradients[part, vf_coef] = torch.cat(every)
    torch.testing.assert_close(gradients["policy", 0.0], gradients["policy", 0.5], rtol=0, atol=0)
    assert gradients["value_model", 0.0].abs().max() == 0.0
    assert gradients["value_model", 0.5].abs().max() > 1e-4


@torch.no_grad()
def test_the_first_values_are_the_scores_of_the_reward_model(tmp_path, reward_model):
    trainer = make_trainer(tmp_path, value_model=reward_model)
    rollout = trainer._sample(trainer.train_dataset[:3])
    longer = rollout.lengthened()
    values = logprobs_through(trainer.model, trainer.learner.batch(longer)).values
    scorer = RewardModel.load(reward_model)
    ids = [row[kept.bool()].tolist() for row, kept in zip(*rollout_tokens(rollout), strict=True)]
    scores = scorer.scores_of(scorer.model, ids)
    last = rollout.mask.sum(-1)
    for row in range(3):
        if not rollout.finished[row]:
            torch.testing.assert_close(values[row, last[row]], scores[row], rtol=1e-4, atol=1e-5)
    assert not rollout.finished.all()


def rollout_tokens(rollout):
    return rollout.input_ids, rollout.attention_mask


LORA_TOO = [None, pytest.param(2, marks=pytest.mark.slow)]


@pytest.mark.parametrize("lora_rank", LORA_TOO)
def test_a_run_with_a_value_model_resumes_to_the_same_bits(tmp_path, critic, lora_rank):
    if lora_rank:
        pytest.importorskip("peft")
    settings = {
        "value_model": critic, "lora_rank": lora_rank, "save_steps": 1, "save_total_limit": None,
        "learning_rate": 1e-2, "rollout_batch_size": 4, "micro_batch_size": 4,
        "num_ppo_epochs": 1, "num_mini_batches": 1,
    }  # fmt: skip

    def trained(folder, resume=False):
        trainer = make_trainer(folder, noisy_praise, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained(tmp_path / "whole")
    trained(tmp_path / "part")
    (tmp_path / "part/LATEST").write_text("checkpoint-1")
    torch.manual_seed(99)
    part = trained(tmp_path / "part", resume=True)
    ours, theirs = part.model.state_dict(), whole.model.state_dict()
    start = make_trainer(tmp_path / "start", noisy_praise, **settings).model.state_dict()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
    for part_of_model in ("policy.", "value_model."):
        assert any(
            not torch.equal(theirs[name], start[name]) for name in start if part_of_model in name
        )
    rows = [without_times(metrics_of(tmp_path / name)) for name in ("part", "whole")]
    assert rows[0] == rows[1]
    assert rows[1][0]["policy/first_ratio_deviation"] == 0.0


def test_a_checkpoint_holds_no_weight_of_a_value_model_twice(tmp_path, critic):
    make_trainer(tmp_path / "run", value_model=critic, num_steps=1).train()
    checkpoint = tmp_path / "run/checkpoint-1"
    tensors = load_file(checkpoint / "tensors.safetensors")
    assert not [name for name in tensors if name.startswith("weights.")]
    names = json.loads((checkpoint / "state.json").read_text())["in_model"]
    assert "weights.value_model.score.weight" in names


@pytest.mark.parametrize("lora_rank", LORA_TOO)
@torch.no_grad()
def test_a_saved_value_model_is_where_another_run_begins(tmp_path, critic, lora_rank):
    if lora_rank:
        pytest.importorskip("peft")
    settings = {"learning_rate": 1e-2, "value_learning_rate": 0.1, "num_steps": 1}
    with torch.enable_grad():
        first = make_trainer(
            tmp_path / "first", value_model=critic, lora_rank=lora_rank, **settings
        )
        first.train()
    saved = str(tmp_path / "first/model/value_model")
    again = make_trainer(tmp_path / "again", value_model=saved)
    rollout = first._sample(next(iter(first.loader)))
    ours, theirs = (
        logprobs_through(trainer.model, trainer.learner.batch(rollout)).values[rollout.mask]
        for trainer in (again, first)
    )
    assert theirs.abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # It can score texts, too.
    assert load_scorer(saved, False, new_head=False).model.num_labels == 1
    if lora_rank:
        with pytest.raises(InputError, match=r"lora_rank makes a new adapter, but .* holds one"):
            make_trainer(tmp_path / "third", value_model=saved, lora_rank=2)


def test_a_value_model_is_saved_in_the_dtype_of_its_files(tmp_path, critic):
    load_scorer(critic, False, new_head=True).model.bfloat16().save_pretrained(critic)
    trainer = make_trainer(tmp_path / "run", value_model=critic)
    assert trainer.model.value_model.dtype == torch.float32
    trainer.save_model(tmp_path / "model")
    weights = load_file(tmp_path / "model/value_model/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_a_value_model_learns_ten_times_as_fast_as_the_policy_by_default(tmp_path, critic):
    trainer = make_trainer(tmp_path / "a", value_model=critic, learning_rate=1e-4)
    assert [group["lr"] for group in trainer.learner.optimizer.param_groups] == [1e-4, 1e-3]
    trainer = make_trainer(tmp_path / "b", value_model=critic, value_learning_rate=0.5)
    assert trainer.learner.optimizer.param_groups[1]["lr"] == 0.5
    trainer = make_trainer(tmp_path / "c", learning_rate=1e-4)
    assert [group["lr"] for group in trainer.learner.optimizer.param_groups] == [1e-4, 1e-3]


# Refusals.


def reordered(directory):
    """Give the tokenizer of a directory two words the other way round."""
    path = f"{directory}/tokenizer.json"
    with open(path, encoding="utf-8") as file:
        tokenizer = json.load(file)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["plot"], vocabulary["cast"] = vocabulary["cast"], vocabulary["plot"]
    with open(path, "w", encoding="utf-8") as file:
        json.dump(tokenizer, file)


def shortened(directory):
    tiny_model(vocab_size=40).save_pretrained(directory)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (reordered, "has another vocabulary than the policy: token 'plot' is number"),
        (shortened, "has 40 tokens, but the tokenizer of the policy makes one of id 42."),
        (
            lambda directory: tiny_model(max_position_embeddings=10).save_pretrained(directory),
            "The model has 10 positions: too few",
        ),
    ],
)
def test_a_value_model_that_does_not_fit_is_refused(tmp_path, critic, damage, sentence):
    damage(critic)
    with pytest.raises(InputError, match=sentence):
        make_trainer(tmp_path / "run", share_of_praise, value_model=critic, max_new_tokens=9)


def test_a_value_model_needs_a_critic_and_a_directory(tmp_path, critic, capsys):
    with pytest.raises(InputError, match="value_model needs a critic, which algorithm=grpo has"):
        make_trainer(tmp_path, algorithm="grpo", num_generations=2, value_model=critic)
    with pytest.raises(InputError, match=r"Cannot load a value model from '\./no': there is no"):
        make_trainer(tmp_path, value_model="./no")
    assert main(["train", "--value_model", critic]) == 2
    assert "also needs --model and --dataset and --reward." in capsys.readouterr().err
    assert main(["train", "--rlhf", "--value_model", critic]) == 2
    assert "rlhf is the embedded task, which has its own value_model." in capsys.readouterr().err
