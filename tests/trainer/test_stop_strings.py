"""Strings end completions, whatever tokens they are made of and whichever way samples."""

import sys
from dataclasses import replace

import pytest
import vllm_stub
from tiny_trainer import make_trainer, tiny_model
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from fastpg.trainer import InputError, PPOConfig
from fastpg.trainer.check.command import gather_evidence
from fastpg.trainer.check.of_rollouts import completions_mask, ends
from fastpg.trainer.rollouts.given import given_rollout

LETTERS = list("abcdefxyz")  # the library looks for "abcdef" in every vocabulary
PIECES = ["<pad>", "<eos>", *LETTERS, "ab", "bc", "abc", "ca", "xa", "by"]
PROMPTS = [{"prompt": "xa"}] * 30 + [{"prompt": "ab"}] * 10  # the second is half of a stop string


def tokenizer_of_pieces():
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("x", "a")]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def rolled_out(folder, way, **settings):
    trainer = make_trainer(
        folder, lambda completions: [0.0] * len(completions), dataset=PROMPTS,
        model=tiny_model(vocab_size=len(PIECES)), tokenizer=tokenizer_of_pieces(),
        rollout_batch_size=40, max_new_tokens=16,
        stop_strings=["abca", "yy"], use_vllm=way == "vllm", **settings,
    )  # fmt: skip
    if way == "generate":
        trainer.engine.packing = None
    return trainer


@pytest.mark.parametrize(
    "way, cut",
    [
        ("shared prompts", {}),
        ("shared prompts", {"top_k": 9}),
        ("generate", {"top_k": 9}),
        ("vllm", {"top_k": 9}),
    ],
)
def test_a_completion_ends_with_the_first_stop_string(tmp_path, monkeypatch, way, cut):
    if way == "vllm":
        monkeypatch.setitem(sys.modules, "vllm", vllm_stub)
        sys.modules.pop("fastpg.trainer.rollouts.vllm_engine", None)
    evidence = gather_evidence(rolled_out(tmp_path, way, **cut))
    sys.modules.pop("fastpg.trainer.rollouts.vllm_engine", None)
    rollout = evidence.rollout
    stopped = 0
    for ids, mask, finished in zip(
        rollout.completion_ids, rollout.mask, rollout.finished, strict=True
    ):
        pieces = [PIECES[i] for i in ids[mask].tolist()]
        text, before = "".join(pieces), "".join(pieces[:-1])
        assert "abca" not in before and "yy" not in before and "<eos>" not in before
        has_stop = "abca" in text or "yy" in text
        assert finished == (has_stop or pieces[-1] == "<eos>")
        assert finished or len(pieces) == 16
        stopped += has_stop
    assert stopped > 1
    assert completions_mask(evidence).verdict == ends(evidence).verdict == "pass"
    if cut:
        counts = rollout.kept.counts
        assert (counts[rollout.mask] == 9).all() and not counts[~rollout.mask].any()


def test_strings_keep_their_commas_and_spaces():
    assert PPOConfig(stop_strings=["\n", "a, b"]).stop_strings == ["\n", "a, b"]
    assert PPOConfig(stop_strings=", ").stop_strings == [", "]


@pytest.mark.parametrize("strings", [[], ["a", ""], [1]])
def test_what_is_no_string_is_refused(strings):
    with pytest.raises(InputError, match="stop_strings must be text or a list of texts, none"):
        PPOConfig(stop_strings=strings)


def test_a_string_of_unknown_characters_is_refused(tmp_path):
    trainer = rolled_out(tmp_path, "generate")
    trainer.args = trainer.engine.args = replace(trainer.args, stop_strings=["§"])
    with pytest.raises(InputError, match="The tokens have no stop_strings"):
        trainer.evaluate()


def test_a_response_of_ones_own_loop_ends_where_its_last_token_completes_a_string():
    tokenizer = tokenizer_of_pieces()
    responses = [["x", "abc", "a"], ["abc", "a", "x"], ["x", "y"], ["y", "y"], ["y", "<eos>"]]
    rollout = given_rollout(
        [[2]] * 5, [[PIECES.index(piece) for piece in pieces] for pieces in responses], None,
        [tiny_model(vocab_size=len(PIECES))], tokenizer,
        PPOConfig(stop_strings=["abca", "yy"], rollout_batch_size=5),
    )  # fmt: skip
    assert rollout.finished.tolist() == [True, False, False, True, True]
