"""What is replaced in TRL, and that all of it comes back."""

import importlib
import sys

import pytest
import torch
import trl
from packaging.version import Version

import fastpg
from fastpg.integrations import trl as fastpg_trl
from fastpg.integrations.patching import PatchError
from fastpg.integrations.verifying import Sizes

utils = importlib.import_module("trl.trainer.utils")
HAS_HEAD = Version(trl.__version__) >= Version("1.15")


@pytest.fixture(autouse=True)
def stock():
    """Each test begins and ends with TRL as it was released."""
    yield
    fastpg_trl.unpatch()


def globals_of_trl():
    """Every global of every module of TRL that is imported."""
    return {
        (name, key): value
        for name, module in list(sys.modules.items())
        if module is not None and name.partition(".")[0] == "trl"
        for key, value in vars(module).items()
    }


def forget(module):
    """Imports a module as if for the first time."""
    sys.modules.pop(module, None)
    return importlib.import_module(module)


def test_everything_is_replaced_and_comes_back_by_identity_also_in_modules_imported_in_between():
    importer = "trl.experimental.cpo.cpo_trainer"
    _ = trl.GRPOTrainer, trl.RLOOTrainer, trl.DPOTrainer
    before = globals_of_trl()
    first = fastpg_trl.patch(strict=True)
    assert fastpg_trl.is_patched() and first.complete
    second = fastpg_trl.patch()
    assert {row.state for row in second.rows} == {"refused"} and "already patched" in str(second)
    late = forget(importer)
    assert late.selective_log_softmax is utils.selective_log_softmax
    assert late.selective_log_softmax.__module__.startswith("fastpg.")
    fastpg_trl.unpatch()
    assert not fastpg_trl.is_patched()
    after = globals_of_trl()
    assert [name for name, value in before.items() if after[name] is not value] == []
    assert late.selective_log_softmax is utils.selective_log_softmax
    assert late.selective_log_softmax.__module__ == "trl.trainer.utils"


def test_nothing_of_fastpg_is_left_in_any_module_after_unpatch():
    with fastpg_trl.patched():
        forget("trl.trainer.grpo_trainer")
    ours = [
        name
        for name, value in globals_of_trl().items()
        if getattr(value, "__module__", "").startswith("fastpg")
    ]
    assert ours == []


def test_an_unknown_version_is_in_the_report_and_raises_if_strict(monkeypatch):
    monkeypatch.setattr(fastpg_trl._patches, "version", lambda: "9.0.0")
    with pytest.raises(PatchError, match=r"tested with TRL 0\.16 to 1\.16"):
        fastpg_trl.patch(strict=True)
    assert not fastpg_trl.is_patched()


def test_a_function_of_another_signature_is_refused(monkeypatch):
    monkeypatch.setattr(utils, "selective_log_softmax", lambda logits, labels, mask: None)
    row = fastpg_trl.patch().rows[0]
    assert row.state == "refused" and "logits, labels, mask" in row.reason


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="logits_dtype must be None or"):
        fastpg_trl.patch(logits_dtype=torch.bfloat16)
    assert not fastpg_trl.is_patched()


@pytest.mark.skipif(HAS_HEAD, reason="TRL 1.15 and later have what the options are for")
def test_options_without_effect_in_this_release_are_in_the_report():
    rows = {row.target: row.state for row in fastpg_trl.patch(lora_head=True).rows}
    assert rows["lora_head"] == "refused"


def test_the_functions_agree_with_fp64_and_fastpg_is_worse_in_nothing():
    report = fastpg_trl.verify(Sizes(vocab=3000, hidden=32, tokens=24))
    errors = [(row.case, row.worse) for row in report.rows if row.worse not in ("", "time")]
    assert report.patch.complete and errors == []
    assert len(report.rows) > 5 and max(row.ours.value for row in report.rows[:-1]) < 0.03
    assert not fastpg_trl.is_patched()


def test_k_tokens_of_each_row_are_those_of_trl_and_fp32():
    """As distillation over a teacher's top K asks for."""
    logits, index = torch.randn(2, 3, 10), torch.randint(10, (2, 3, 4))
    results = []
    for context in (fastpg_trl.patched, torch.enable_grad):
        leaf = logits.clone().requires_grad_()
        with context():
            logp = utils.selective_log_softmax(leaf, index)
        logp.mul(torch.linspace(-1, 1, 24).view(2, 3, 4)).sum().backward()
        results.append((logp, leaf.grad))
    for ours, stock in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)
    with fastpg_trl.patched():
        halved = utils.selective_log_softmax(logits.bfloat16(), index)
    assert halved.dtype is torch.float32


@pytest.mark.skipif(
    not hasattr(utils, "selective_log_softmax_and_entropy"), reason="from TRL 1.14 on"
)
def test_log_probs_and_entropy_take_a_temperature_and_a_mask():
    logits, index = torch.randn(2, 3, 10, requires_grad=True), torch.randint(10, (2, 3))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    results = []
    for context in (fastpg_trl.patched, torch.enable_grad):
        with context():
            logp, entropy = utils.selective_log_softmax_and_entropy(
                logits, index, entropy_requires_grad=True, temperature=0.7, row_mask=mask
            )
            (gradient,) = torch.autograd.grad((logp + 2 * entropy).sum(), logits)
            _, constant = utils.selective_log_softmax_and_entropy(logits, index, False)
            assert not constant.requires_grad
        results.append((logp, entropy, gradient))
    torch.testing.assert_close(*results)
    assert torch.equal(results[0][0] == 0, mask == 0)


def head_arguments(outputs, weight=None):
    """What TRL passes to its function of hidden states."""
    hidden, labels = torch.randn(3, 4), torch.tensor([1, 0, 4])
    weight = torch.randn(5, 4) if weight is None else weight
    return hidden, weight, None, labels, 0.7, 32768, None, 1.0, outputs


@pytest.mark.skipif(not HAS_HEAD, reason="from TRL 1.15 on")
def test_a_quantised_head_is_left_to_trl_noted_and_raises_if_strict():
    arguments = head_arguments(("log_probs",), torch.zeros(5, 4, dtype=torch.int8))
    with fastpg_trl.patched() as report:
        utils._ChunkedLogProbFunction.apply(*arguments)
        assert "a head of torch.int8 is left to TRL" in str(report) and not report.complete
    with fastpg_trl.patched(strict=True), pytest.raises(PatchError, match=r"torch\.int8"):
        utils._ChunkedLogProbFunction.apply(*arguments)


@pytest.mark.skipif(not HAS_HEAD, reason="from TRL 1.15 on")
def test_an_unknown_output_raises():
    with fastpg_trl.patched(), pytest.raises(ValueError, match="got 'variance'"):
        utils._ChunkedLogProbFunction.apply(*head_arguments(("log_probs", "variance")))


@pytest.mark.skipif(not HAS_HEAD, reason="from TRL 1.15 on")
def test_fp32_logits_of_a_bf16_model_are_four_digits_better():
    hidden, weight = torch.randn(16, 32).bfloat16(), torch.randn(300, 32).bfloat16()
    labels = torch.randint(300, (16,))
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    errors = []
    for options in ({}, {"logits_dtype": torch.float32}):
        with fastpg_trl.patched(**options):
            found = utils._ChunkedLogProbFunction.apply(
                hidden, weight, None, labels, 1.0, 32768, None, 1.0, ("log_probs",)
            )
        errors.append((found[0].double() - exact).abs().max().item())
    assert errors[1] < 1e-5 < 1e-2 < errors[0]


def test_the_package_itself_is_what_is_replaced_by():
    with fastpg_trl.patched():
        labels = torch.tensor([[1, 2]])
        logits = torch.randn(1, 2, 5)
        found = utils.selective_log_softmax(logits, labels)
    assert torch.equal(found, fastpg.token_logprobs(logits, labels))
