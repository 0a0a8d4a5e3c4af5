"""The settings of a run in groups, of which `PPOConfig` is made."""

from dataclasses import dataclass, field
from typing import Any

from fastpg.trainer.settings.ranges import Dtype, LearningRateSchedule


def option(default: Any, text: str) -> Any:
    """Declare a setting: a dataclass field with a help text.

    Args:
        default: The value of a setting that nobody gave.
        text: The help that `HfArgumentParser` and `fastpg train --help` show.

    Returns:
        The dataclass field.
    """
    return field(default=default, metadata={"help": text})


@dataclass
class ModelSettings:
    """What is trained, and in which form.

    Args:
        dtype: The dtype that weights are loaded in, trained in and saved in: "float32", "bfloat16"
            or "float16". None: they are trained in float32, and saved in the dtype of the files
            that they came from.
        gradient_checkpointing: Whether layers are computed again in backward, which saves the
            memory of their activations; never while completions are sampled.
        value_model: Directory or name of the model that computes values, with a trunk of its own:
            a causal language model, or a reward model, whose scores are the first values. Its
            tokens must be those of the policy. None: values come from a head on the trunk of the
            policy.
        lora_rank: Rank of the LoRA adapters that are trained in place of the weights. The
            reference of the KL penalty is then the model without them, not a copy. A value model
            gets adapters too. None: the weights themselves are trained.
        lora_alpha: Adapters are scaled by lora_alpha / lora_rank. None: by 2.
        lora_target_modules: Names of the layers that get an adapter. None: all linear layers but
            the LM head.
    """

    dtype: Dtype | None = field(
        default=None,
        metadata={
            "help": "float32, bfloat16 or float16, of weights in training and saved; by default "
            "they are trained in float32 and saved as they came"
        },
    )
    gradient_checkpointing: bool = option(
        False, "compute layers again in backward, which saves memory"
    )
    value_model: str | None = option(
        None,
        "directory or name of a language or reward model that computes values; by default a head "
        "on the trunk of the policy does",
    )
    lora_rank: int | None = option(
        None, "train LoRA adapters of this rank; by default the weights themselves"
    )
    lora_alpha: float | None = option(
        None, "adapters are scaled by lora_alpha / lora_rank; by default by 2"
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "layers with an adapter; by default all linear ones but the LM head"},
    )


@dataclass
class VllmSettings:
    """Rollouts by vLLM. The names are those of TRL.

    Args:
        use_vllm: Whether vLLM samples, in this process and on the same device. Its log-probs are
            not those of training, to rounding and more; truncated importance sampling corrects the
            policy loss for that.
        vllm_gpu_memory_utilization: The share of the GPU's memory that vLLM takes for itself.
        vllm_importance_sampling_clip_max: The largest weight of a token in that correction.
    """

    use_vllm: bool = option(False, "sample with vLLM, beside the model on the same GPU")
    vllm_gpu_memory_utilization: float = option(0.3, "share of the GPU's memory for vLLM")
    vllm_importance_sampling_clip_max: float = option(
        2.0, "largest weight of a token, by which its log-prob in training corrects that of vLLM"
    )


@dataclass
class OptimizerSettings:
    """AdamW and its learning rates.

    Args:
        learning_rate: Learning rate of the policy after warm-up.
        value_learning_rate: The same for the value head, or for all of a value model. None: 1e-3
            for a head, which starts from nothing, and 10 · learning_rate for a value model.
        lr_scheduler_type: How both go on after warm-up: "linear" to 0, "cosine" to 0, or
            "constant".
        warmup_steps: Steps in which the rates rise from 0.
        weight_decay: Decay of AdamW, of matrices only.
        adam_epsilon: Epsilon of AdamW.
        max_grad_norm: The gradient is clipped to this norm.
    """

    learning_rate: float = option(1e-6, "learning rate of the policy after warm-up")
    value_learning_rate: float | None = option(
        None,
        "likewise of the value head or value model; by default 1e-3, or 10 * learning_rate if it "
        "is a model",
    )
    lr_scheduler_type: LearningRateSchedule = field(
        default="linear", metadata={"help": "linear or cosine, down to 0, or constant"}
    )
    warmup_steps: int = option(0, "steps in which the learning rates rise from 0")
    weight_decay: float = option(0.0, "decay of AdamW, of matrices only")
    adam_epsilon: float = option(1e-5, "epsilon of AdamW")
    max_grad_norm: float = option(1.0, "the gradient is clipped to this norm")


@dataclass
class CreditSettings:
    """What a token is credited with, and the loss.

    Args:
        gamma: Discount per token, between 0 and 1.
        lam: Lambda of generalised advantage estimation, between 0 and 1. None: the algorithm's.
        kl_coef: Weight of the KL penalty to the starting model, in score per nat. With 0 no copy
            of that model is kept. None: the algorithm's.
        adaptive_kl_target: The KL that `fastpg.AdaptiveKL` moves the weight of the penalty
            towards, in nats per completion. None: the weight stays as it is.
        adaptive_kl_horizon: In so many completions the weight changes by a fifth at most.
        target_kl: No further optimiser step is made on a rollout once the policy has moved so far
            from the one that sampled it: policy/approx_kl, in nats per token. None: all are made.
        cliprange: The ratio is clipped to 1 - cliprange, 1 + cliprange; above 0 and below 1. None:
            the algorithm's.
        cliprange_high: The upper bound is 1 + cliprange_high, above 0. None: as `cliprange`.
        cliprange_value: Clip range of the values. None: they are not clipped.
        vf_coef: Weight of the value loss.
        entropy_coef: Weight of the entropy bonus.
    """

    gamma: float = option(1.0, "discount per token")
    lam: float | None = option(
        None, "lambda of generalised advantage estimation; by default the algorithm's"
    )
    kl_coef: float | None = option(
        None,
        "weight of the KL penalty to the starting model, of which no copy is kept if it is 0; by "
        "default the algorithm's",
    )
    adaptive_kl_target: float | None = option(
        None, "KL in nats per completion that kl_coef is moved towards; by default it stays"
    )
    adaptive_kl_horizon: float = option(10_000, "completions in which it changes by a fifth")
    target_kl: float | None = option(
        None, "end the passes over a rollout at this policy/approx_kl; by default never"
    )
    cliprange: float | None = option(
        None, "the ratio is clipped to 1 - cliprange, 1 + cliprange; by default the algorithm's"
    )
    cliprange_high: float | None = option(None, "1 + cliprange_high, if the two sides differ")
    cliprange_value: float | None = option(None, "clip range of the values; none by default")
    vf_coef: float = option(0.1, "weight of the value loss")
    entropy_coef: float = option(0.0, "weight of the entropy bonus")


@dataclass
class ScoreSettings:
    """How rewards become the scores that the policy is trained on.

    Args:
        reward_weights: One weight per reward function. None: all are 1.
        reward_clip: The weighted sum of the rewards is clipped to -reward_clip, reward_clip. None:
            it is not.
        missing_eos_penalty: Taken off the score of an unfinished completion.
        whiten_rewards: Whether the scores of a step are shifted and scaled to mean 0 and
            variance 1.
        mask_truncated_completions: Whether unfinished completions are left out of the loss.
        bootstrap_truncated: Whether an unfinished completion is credited with the value of what
            would follow, in place of 0. It needs a critic.
    """

    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "one weight per reward function; all are 1 by default"}
    )
    reward_clip: float | None = option(
        None, "bound of the weighted sum of the rewards, on both sides; none by default"
    )
    missing_eos_penalty: float = option(0.0, "taken off the score of an unfinished completion")
    whiten_rewards: bool = option(False, "bring the scores of a step to mean 0 and variance 1")
    mask_truncated_completions: bool = option(False, "leave unfinished completions out of the loss")
    bootstrap_truncated: bool = option(
        False, "credit unfinished completions with the value of what would follow"
    )


@dataclass
class WatchSettings:
    """What is evaluated, written and kept.

    Args:
        eval_steps: Evaluate every so many steps. None: only at the start and the end.
        num_eval_samples: Prompts of an evaluation.
        save_best_model: Whether the model of the best evaluation, by mean reward, is kept in
            `best_model`.
        num_logged_completions: Completions written to a file at each step and evaluation.
        report_to: Where metrics and samples go besides the files: "tensorboard", "wandb", both, or
            "none".
        save_steps: Write a checkpoint every so many steps, besides the start, the end and an
            interruption. None: only then.
        save_total_limit: Checkpoints that are kept, the newest. None: all.
    """

    eval_steps: int | None = option(None, "evaluate every so many steps, besides start and end")
    num_eval_samples: int = option(64, "prompts of an evaluation")
    save_best_model: bool = option(False, "keep the model of the best evaluation in best_model")
    num_logged_completions: int = option(8, "completions written to a file at each step")
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata={"help": "tensorboard, wandb, both with a comma between, or none"},
    )
    save_steps: int | None = option(
        50, "write a checkpoint every so many steps, besides start, end and interruption"
    )
    save_total_limit: int | None = option(2, "checkpoints that are kept, the newest; none: all")
