"""Rollouts by vLLM, in the same process and on the same device as training."""

import copy
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastpg.trainer.data.encoding import Prompt, encode_for, eos_ids
from fastpg.trainer.models.adapters import merged_weights
from fastpg.trainer.models.forward import causal_lm
from fastpg.trainer.rollouts.kept_sets import KeptSets
from fastpg.trainer.rollouts.rollout import Rollout
from fastpg.trainer.rollouts.sampling import Sampling
from fastpg.trainer.settings.config import PPOConfig

# The weights are handed to vLLM as tensors, which only works where its engine is in this process.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class VllmEngine:
    """Samples with vLLM, from a copy of the policy's weights.

    Args:
        policy: The policy, which a LoRA adapter may be a part of.
        tokenizer: The tokenizer.
        args: The settings.
    """

    def __init__(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: PPOConfig
    ) -> None:
        self.policy, self.tokenizer, self.args = policy, tokenizer, args
        self.ends = eos_ids(policy, tokenizer)
        cut = Sampling(args.temperature, args.top_k, args.top_p)
        options: dict[str, Any] = {} if cut.keeps_all else {"return_sampling_mask": True}
        if args.max_prompt_length is not None:
            options["max_model_len"] = args.max_prompt_length + args.max_new_tokens
        with tempfile.TemporaryDirectory() as directory:
            # vLLM learns the shape of the model here, and gets its weights below.
            _config_of(policy).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            self.llm = LLM(
                model=directory,
                skip_tokenizer_init=args.stop_strings is None,
                load_format="dummy",
                dtype=str(_DTYPES.get(args.mixed_precision, policy.dtype)).removeprefix("torch."),
                seed=args.seed,
                gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                trust_remote_code=args.trust_remote_code,
                # Log-probs after temperature, top_k and top_p are those of what is sampled from.
                logprobs_mode="processed_logprobs",
                **options,
            )
        self.update_weights()

    def update_weights(self) -> None:
        """Push the policy's weights into vLLM, as `RolloutEngine.update_weights`."""
        self.llm.apply_model(lambda model: model.load_weights(merged_weights(self.policy)))
        # It holds keys and values that the weights before have made of prompts.
        self.llm.reset_prefix_cache()

    def sample(self, prompts: Sequence[Prompt]) -> Rollout:
        """Sample one completion for each prompt, as `RolloutEngine.sample`."""
        ids, attention = encode_for(
            self.policy, self.tokenizer, prompts, self.args.max_prompt_length
        )
        requests = [
            {"prompt_token_ids": row[seen.bool()].tolist()}
            for row, seen in zip(ids, attention, strict=True)
        ]
        params = [self._params(seed) for seed in torch.randint(2**31, (len(prompts),)).tolist()]
        outputs = self.llm.generate(requests, params, use_tqdm=False)
        return self._rollout(ids, attention, [output.outputs[0] for output in outputs])

    def _params(self, seed: int) -> SamplingParams:
        """Return how one completion is sampled. Its seed is drawn where other samplers draw."""
        return SamplingParams(
            temperature=self.args.temperature,
            top_k=self.args.top_k,
            top_p=self.args.top_p,
            max_tokens=self.args.max_new_tokens,
            stop_token_ids=self.ends,
            seed=seed,
            logprobs=0,  # those of the sampled tokens alone
            stop=self.args.stop_strings,
            # vLLM finds strings in the text that it makes of the tokens.
            detokenize=self.args.stop_strings is not None,
        )

    def _rollout(self, ids: Tensor, attention: Tensor, completions: list[Any]) -> Rollout:
        """Return what vLLM sampled, a `CompletionOutput` for each prompt, as episodes."""
        lengths = torch.tensor([len(each.token_ids) for each in completions], device=ids.device)
        mask = torch.arange(int(lengths.max()), device=ids.device) < lengths[:, None]
        tokens = mask.new_full(mask.shape, self.ends[0], dtype=torch.int64)
        tokens[mask] = _flat([each.token_ids for each in completions], tokens)
        logp = torch.zeros(mask.shape, device=ids.device)
        logp[mask] = _flat([_logprobs(each) for each in completions], logp)
        return Rollout(
            input_ids=torch.cat([ids, tokens], dim=1),
            attention_mask=torch.cat([attention, mask.long()], dim=1),
            mask=mask,
            finished=torch.tensor(
                [each.finish_reason == "stop" for each in completions], device=ids.device
            ),
            kept=_kept_sets(completions, mask),
            behavior_logp=logp,
        )


def _config_of(policy: PreTrainedModel) -> PreTrainedConfig:
    """Return the config of a model with the name of its class, by which vLLM knows its own."""
    model = causal_lm(policy)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    return config


def _logprobs(completion: Any) -> list[float]:
    """Return the log-probs of the sampled tokens of a `CompletionOutput`."""
    places = zip(completion.logprobs, completion.token_ids, strict=True)
    return [known[token].logprob for known, token in places]


def _flat(rows: list[Any], like: Tensor) -> Tensor:
    """Return the numbers of all rows, one row after the other, on the device of a tensor."""
    return torch.tensor([x for row in rows for x in row], dtype=like.dtype, device=like.device)


def _kept_sets(completions: list[Any], mask: Tensor) -> KeptSets | None:
    """Return the tokens that vLLM kept at the places of `mask`, if any were cut off."""
    if completions[0].sampling_mask is None:
        return None
    sets = [sorted(kept) for each in completions for kept in each.sampling_mask.token_ids]
    counts = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
    counts[mask] = torch.tensor([len(kept) for kept in sets], device=mask.device)
    return KeptSets(_flat(sets, counts).int(), counts)
