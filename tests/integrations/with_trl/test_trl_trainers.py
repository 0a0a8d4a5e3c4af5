"""One step of TRL's trainers, stock and patched: the same losses and the same gradients."""

import contextlib
from importlib.util import find_spec

import pytest
import tiny
import torch
import trl
from packaging.version import Version
from peft import LoraConfig
from transformers import Qwen3ForCausalLM

from fastpg.integrations import trl as fastpg_trl

HAS_HEAD = Version(trl.__version__) >= Version("1.15")

# Old releases know no other trainer whose settings are these; SFT's loss was the model's own.
ALGORITHMS = ["grpo", "rloo", "sft", "dpo", "kto"] if HAS_HEAD else ["grpo", "rloo", "dpo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.saved_model(tmp_path_factory.mktemp("model"))


def both_steps(algorithm, folder, **settings):
    """One step as it is, and one patched."""
    torch.use_deterministic_algorithms(False)  # some of the model's own kernels are not
    for context in (contextlib.nullcontext, fastpg_trl.patched):
        torch.manual_seed(0)
        with context():
            yield tiny.step(tiny.trainer_of(algorithm, folder, **settings))


def assert_same_step(stock, ours):
    assert ours.log["grad_norm"] > 0
    assert abs(ours.loss - stock.loss) <= 1e-5 * max(1.0, abs(stock.loss))
    assert ours.gradients.keys() == stock.gradients.keys()
    for name, gradient in stock.gradients.items():
        error = (ours.gradients[name] - gradient).abs().max()
        assert error <= 1e-5 * gradient.abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_losses_and_gradients_are_those_of_trl(algorithm, folder):
    stock, ours = both_steps(algorithm, folder)
    assert_same_step(stock, ours)
    for name in ("entropy", "mean_token_accuracy", "logits/chosen", "kl"):
        if name in stock.log:
            assert ours.log[name] == pytest.approx(stock.log[name], abs=1e-4, rel=1e-4), name


def test_the_entropy_in_the_loss_has_its_gradient(folder):
    stock, ours = both_steps("grpo", folder, entropy_coef=0.1, top_entropy_quantile=0.5)
    assert_same_step(stock, ours)


@pytest.mark.parametrize("algorithm", ["dpo", "kto"] if HAS_HEAD else ["dpo"])
def test_policy_and_reference_are_bit_equal_before_the_first_step(algorithm, folder):
    _, ours = both_steps(algorithm, folder)
    assert ours.log["rewards/chosen"] == ours.log["rewards/rejected"] == 0.0


@pytest.mark.skipif(not HAS_HEAD, reason="TRL 1.15 and later refuse it, before it is as any LoRA")
def test_a_lora_adapter_on_the_head_trains_as_through_the_model_itself(folder):
    adapter = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], init_lora_weights=False
    )
    with pytest.raises(ValueError, match="`lm_head` is not supported"):
        tiny.trainer_of("sft", folder, peft_config=adapter)
    with fastpg_trl.patched(lora_head=True, strict=True):
        torch.manual_seed(0)
        trainer = tiny.trainer_of("sft", folder, peft_config=adapter, loss_type="nll")
        model = trainer.model
        batch = next(iter(trainer.get_train_dataloader()))
        labels = batch["labels"]
        found = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=labels,
            fused_lm_head=True,
        )
        found.loss.backward()
        ours = {name: x.grad.clone() for name, x in model.named_parameters() if x.requires_grad}
        model.zero_grad()
        plain = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        logits, shifted = plain.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        torch.nn.functional.cross_entropy(logits, shifted).backward()
    for name, x in model.named_parameters():
        if x.requires_grad:
            torch.testing.assert_close(ours[name], x.grad, rtol=1e-4, atol=1e-6)
    assert any("lm_head.lora_B" in name and x.abs().max() > 0 for name, x in ours.items())


@pytest.mark.skipif(not HAS_HEAD, reason="from TRL 1.15 on the head is TRL's own")
def test_the_signature_that_generate_reads_is_the_models(folder):
    import inspect

    from trl.trainer.utils import add_fused_lm_head

    expected = inspect.signature(Qwen3ForCausalLM.from_pretrained(folder).forward)
    with fastpg_trl.patched(lora_head=True):
        from trl.trainer import utils

        model = Qwen3ForCausalLM.from_pretrained(folder)
        utils.add_fused_lm_head(model)
    assert utils.add_fused_lm_head is add_fused_lm_head
    assert inspect.signature(model.forward) == expected


@pytest.mark.skipif(not find_spec("liger_kernel"), reason="Liger is not installed")
def test_liger_beside_it_changes_nothing(folder):
    """Its layers need a GPU; without them TRL still takes it for a trainer with Liger."""
    names = ("rope", "rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy")
    liger = {"use_liger_kernel": True, "liger_kernel_config": dict.fromkeys(names, False)}
    stock, ours = both_steps("grpo", folder, **liger)
    assert_same_step(stock, ours)
    with fastpg_trl.patched(strict=True) as report:
        assert report.complete
    _, without = both_steps("grpo", folder)
    assert ours.loss == without.loss


@pytest.mark.skipif(not HAS_HEAD, reason="one release is enough")
def test_torch_compile_compiles_nothing_anew_after_the_first_step(folder):
    """The graphs are counted as they are traced: what is made of them afterwards is the same."""
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 4}
    with fastpg_trl.patched():
        trainer = tiny.trainer_of("grpo", folder, **settings)
        counts = []
        training_step = trainer.training_step

        def counted(*args, **kwargs):
            result = training_step(*args, **kwargs)
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            return result

        trainer.training_step = counted
        trainer.train()
    assert counts[0] > 0 and counts[1:] == counts[1:2] * 3
