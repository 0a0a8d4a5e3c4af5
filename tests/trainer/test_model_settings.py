"""LoRA, dtypes and gradient checkpointing by settings, and models with hidden dropout."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from test_cli import workspace
from tiny_trainer import make_trainer, metrics_of, tiny_model
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    BioGptForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)

from fastpg.tasks import reviews
from fastpg.trainer import InputError
from fastpg.trainer.models.adapters import WithoutAdapter
from fastpg.trainer.models.modes import frozen_copy
from fastpg.trainer.models.policy import logprobs_through, reference_logprobs_through

__all__ = ["workspace"]

# peft asks for a property of transformers by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


# LoRA.


def test_lora_trains_an_adapter_against_the_model_without_it(tmp_path):
    pytest.importorskip("peft")
    model = tiny_model()
    start = frozen_copy(model)
    trainer = make_trainer(tmp_path, model=model, lora_rank=3, learning_rate=1e-2)
    assert isinstance(trainer.learner.reference, WithoutAdapter)
    trained = {n for n, p in trainer.policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert {name.split(".")[-4] for name in trained} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    trainer.train()
    first, second = metrics_of(tmp_path)
    assert first["objective/kl"] == 0.0 != second["objective/kl"]
    assert first["policy/first_ratio_deviation"] == 0.0
    # The reference is what a copy of the start would say.
    rollout = trainer._sample(trainer.train_dataset[:3])
    batch = trainer.learner.batch(rollout)
    with torch.no_grad():
        ours = reference_logprobs_through(trainer.model, batch)
        expected = trainer.learner._reference_logp(start, batch)
        moved = logprobs_through(trainer.model, batch).logp
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert (moved - ours).abs().max() > 1e-3
    # After the reference has been asked the adapter is trained as before.
    assert all(p.requires_grad == ("lora_" in n) for n, p in trainer.policy.named_parameters())


def test_a_saved_adapter_finds_its_base(workspace, monkeypatch):
    pytest.importorskip("peft")
    trainer = make_trainer("run", model="model", lora_rank=2, lora_target_modules="q_proj,v_proj")
    trainer.train()
    monkeypatch.chdir("/")
    loaded = AutoModelForCausalLM.from_pretrained(workspace / "run/model")
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(loaded(ids).logits, trainer.policy(ids).logits)
    config = json.loads((workspace / "run/model/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lora_alpha": 3}, "lora_alpha means nothing without lora_rank."),
        ({"lora_rank": 0}, "lora_rank must be positive, not 0."),
        ({"lora_rank": 2, "lora_target_modules": ["q"]}, "The model cannot be given an adapter: "),
    ],
)
def test_lora_that_cannot_be_is_refused(tmp_path, settings, sentence):
    pytest.importorskip("peft")
    with pytest.raises(InputError, match=sentence):
        make_trainer(tmp_path, **settings)


# Dtypes.


def dtypes_in(path):
    with safe_open(path, "pt") as file:
        return {str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("setting", "in_training", "saved"),
    [
        (None, torch.float32, "bfloat16"),
        ("bfloat16", torch.bfloat16, "bfloat16"),
        ("float32", torch.float32, "float32"),
    ],
)
def test_a_bf16_model_is_saved_as_bf16(tmp_path, setting, in_training, saved, tied):
    start = tiny_model(tie_word_embeddings=tied).bfloat16()
    start.save_pretrained(tmp_path / "start")
    reviews.build_tokenizer().save_pretrained(tmp_path / "start")
    trainer = make_trainer(tmp_path, model=str(tmp_path / "start"), dtype=setting, num_steps=1)
    assert trainer.policy.dtype == in_training
    trainer.train()
    (first,) = metrics_of(tmp_path)
    assert first["policy/first_ratio_deviation"] == 0.0
    assert dtypes_in(tmp_path / "model/model.safetensors") == {f"torch.{saved}"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert str(loaded.dtype) == f"torch.{saved}"
    expected = copy.deepcopy(trainer.policy).to(loaded.dtype).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in loaded.state_dict().items())
    assert loaded.config.tie_word_embeddings == tied


@pytest.mark.slow
def test_a_run_in_bf16_files_resumes_with_its_float32_weights(tmp_path):
    tiny_model().bfloat16().save_pretrained(tmp_path / "start")
    reviews.build_tokenizer().save_pretrained(tmp_path / "start")
    settings = {"num_steps": 3, "save_steps": 1, "save_total_limit": None}

    def trained(folder, resume=False):
        trainer = make_trainer(folder, model=str(tmp_path / "start"), **settings)
        trainer.train(resume_from_checkpoint=resume)
        return torch.nn.utils.parameters_to_vector(trainer.policy.parameters())

    whole = trained(tmp_path / "whole")
    trained(tmp_path / "part")
    (tmp_path / "part/LATEST").write_text("checkpoint-1")
    assert torch.equal(trained(tmp_path / "part", resume=True), whole)


# Gradient checkpointing.


def test_gradient_checkpointing_changes_nothing_and_rests_while_sampling(tmp_path):
    calls = []

    def counted(*args):
        calls.append(torch.is_grad_enabled())
        return torch.utils.checkpoint.checkpoint(*args, use_reentrant=False)

    weights = {}
    for setting in (False, True):
        trainer = make_trainer(tmp_path / str(setting), gradient_checkpointing=setting)
        if setting:
            for layer in trainer.policy.model.layers:
                layer._gradient_checkpointing_func = counted
            trainer.evaluate()
            assert not calls
        trainer.train()
        weights[setting] = torch.nn.utils.parameters_to_vector(trainer.policy.parameters())
    assert True in calls
    torch.testing.assert_close(weights[True], weights[False], rtol=0, atol=0)


SMALL = {"vocab_size": 43, "hidden_size": 32, "num_attention_heads": 2}
RATES = [
    (FalconForCausalLM, FalconConfig, {"num_hidden_layers": 2, "hidden_dropout": 0.5}),
    (
        Starcoder2ForCausalLM,
        Starcoder2Config,
        {
            "num_hidden_layers": 2, "intermediate_size": 64, "num_key_value_heads": 1,
            "embedding_dropout": 0.5, "residual_dropout": 0.5,
        },
    ),
    (
        OPTForCausalLM,
        OPTConfig,
        {"num_hidden_layers": 2, "ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.5},
    ),
    (
        BioGptForCausalLM,
        BioGptConfig,
        {"num_hidden_layers": 2, "intermediate_size": 64, "layerdrop": 0.5},
    ),
    (
        XGLMForCausalLM,
        XGLMConfig,
        {
            "vocab_size": 43, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 2,
            "layerdrop": 0.5,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "config", "changes"), RATES, ids=lambda x: getattr(x, "__name__", "")
)
def test_no_dropout_hides_behind_gradient_checkpointing(tmp_path, kind, config, changes):
    sizes = {} if config is XGLMConfig else SMALL
    torch.manual_seed(0)
    model = kind(config(**sizes, **changes, eos_token_id=1, pad_token_id=0, bos_token_id=1))
    settings = {"gradient_checkpointing": True, "num_steps": 1, "kl_coef": 0.0}
    make_trainer(tmp_path, model=model, **settings).train()
    (row,) = metrics_of(tmp_path)
    assert row["policy/first_ratio_deviation"] < 1e-6
    # What is saved still has its dropouts.
    saved = json.loads((tmp_path / "model/config.json").read_text())
    for name, value in changes.items():
        assert "drop" not in name or saved[name] == value


def test_a_model_that_is_random_in_training_is_refused(tmp_path):
    model = tiny_model()
    embeddings = model.model.embed_tokens
    plain = embeddings.forward
    embeddings.forward = lambda ids: torch.nn.functional.dropout(plain(ids), 0.1, training=True)
    with pytest.raises(InputError, match=r"Two forwards of the model on the same prompt differ by"):
        make_trainer(tmp_path, model=model)
