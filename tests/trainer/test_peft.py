"""LoRA on the LM head: one more product, as exact as the layers of peft."""

import contextlib
import copy

import pytest
import torch
from safetensors.torch import load_file
from test_head import FAMILIES, assert_gives_the_models_own, build, perturb
from tiny_trainer import make_trainer, metrics_of, tiny_model
from transformers import AutoModelForCausalLM

from fastpg.integrations.peft import UnknownHead, head_products
from fastpg.trainer import InputError
from fastpg.trainer.models.head import HeadTransform, find_head
from fastpg.trainer.models.loading import load_policy

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model

# peft asks for a property of transformers by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

ADAPTER = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "lm_head"]}


def adapted(**changes):
    """A model with LoRA on its head, whose B is not zero any more."""
    model = build(FAMILIES["llama"][0])
    return perturb(get_peft_model(model, LoraConfig(**{**ADAPTER, **changes})).eval().double())


def with_a_hook(part):
    model = adapted()
    adapter = getattr(model.get_output_embeddings(), part)["default"]
    adapter.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: with_a_hook("lora_A"), "adapter 'default' has a hook"),
        (lambda: with_a_hook("lora_B"), "adapter 'default' has a hook"),
        (lambda: adapted(lora_dropout=0.1).train(), "adapter 'default' has dropout"),
        (lambda: adapted(use_dora=True), "adapter 'default' is not plain LoRA"),
    ],
)
def test_an_adapter_that_is_no_plain_product_is_refused(make, reason):
    with pytest.raises(UnknownHead, match=reason):
        find_head(make(), contextlib.nullcontext)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True, "r": 1},
        {"lora_dropout": 0.5},  # of no effect in evaluation mode
        {"target_modules": ["q_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_lora_on_the_head_is_exact(changes):
    model = adapted(**changes)
    head = find_head(model, contextlib.nullcontext)
    assert_gives_the_models_own(model, head)


def test_lora_with_a_bias_on_a_trained_head():
    model = build(FAMILIES["phi"][0])
    model = get_peft_model(model, LoraConfig(**ADAPTER, lora_bias=True)).eval().double()
    perturb(model)
    model.get_output_embeddings().base_layer.requires_grad_(True)
    assert_gives_the_models_own(model, HeadTransform())


def test_the_adapters_that_peft_applies_count():
    model = adapted()
    hidden = torch.randn(3, 32, dtype=torch.float64)
    lm_head = model.get_output_embeddings()

    def agrees():
        factors, weights, bias = head_products(lm_head, hidden)
        logits = sum(h @ w.T for h, w in zip(factors, weights, strict=True))
        torch.testing.assert_close(logits if bias is None else logits + bias, lm_head(hidden))
        return [w.shape[1] for w in weights[1:]]

    assert agrees() == [3]
    model.add_adapter("second", LoraConfig(**{**ADAPTER, "r": 4}))
    perturb(model.double())
    model.base_model.set_adapter(["default", "second"])
    assert agrees() == [3, 4]
    model.set_adapter("second")
    assert agrees() == [4]
    with model.disable_adapter():
        assert agrees() == []
    model.merge_adapter()
    assert agrees() == []
    model.base_model.disable_adapter_layers()
    with pytest.raises(UnknownHead, match="merged LoRA adapter that is disabled"):
        head_products(lm_head, hidden)


def test_autocast_leaves_fp64_alone():
    with torch.autocast("cpu", torch.bfloat16):
        head = head_products(torch.nn.Linear(4, 5).double(), torch.zeros(2, 4).double())
    assert {x.dtype for x in head.tensors()} == {torch.float64}


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to:UserWarning")
def test_lora_on_the_head_learns(tmp_path):
    config = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights="gaussian")
    policy = get_peft_model(tiny_model(), config)
    before = copy.deepcopy(policy.state_dict())
    trainer = make_trainer(tmp_path, model=policy)
    assert trainer.learner.paths.head == HeadTransform()
    trainer.train()
    first, second = metrics_of(tmp_path)
    assert first["objective/kl"] == 0.0 != second["objective/kl"]
    assert first["policy/first_ratio_deviation"] == second["policy/first_ratio_deviation"] == 0.0
    changed = {name for name, x in policy.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {name for name in before if "lora_" in name}


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to:UserWarning")
def test_an_adapter_that_was_loaded_for_inference_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    policy, _ = load_policy(str(tmp_path / "adapter"), trust_remote_code=False)
    with pytest.raises(InputError, match=r"No weight of the model can be trained.* adapter"):
        make_trainer(tmp_path / "run", model=policy)


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to:UserWarning")
@pytest.mark.slow
def test_an_adapter_is_resumed_without_a_copy_of_its_base(tmp_path):
    def trained(folder, resume=False, **settings):
        torch.manual_seed(3)  # An adapter begins with random weights.
        policy = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
        settings = {"num_steps": 3, "save_steps": 1, "save_total_limit": None, **settings}
        trainer = make_trainer(folder, model=policy, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return folder / "checkpoint-3"

    whole = trained(tmp_path / "whole")
    trained(tmp_path / "part")
    (tmp_path / "part" / "LATEST").write_text("checkpoint-1")
    part = trained(tmp_path / "part", resume=True)
    tensors = [load_file(run / "tensors.safetensors") for run in (whole, part)]
    assert all("lora_" in name for name in tensors[0] if name.startswith("weights.policy."))
    torch.testing.assert_close(*tensors, rtol=0, atol=0)
