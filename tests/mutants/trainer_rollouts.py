"""Faults of the trainer's rollouts: completions, their masks, and how they are sampled."""

from . import Mutant

STEPS = ("tests/trainer/test_trainer_steps.py",)
SAMPLING = ("tests/trainer/test_trainer_sampling.py",)
SETS = ("tests/trainer/test_kept_sets.py",)
VLLM = ("tests/trainer/test_vllm_engine.py",)
GENERATION = "fastpg/trainer/rollouts/generation.py"
EPISODES = "fastpg/trainer/rewards/episodes.py"
PROMPTS = "fastpg/trainer/data/prompts.py"
ROLLOUT = "fastpg/trainer/rollouts/rollout.py"
ENCODING = "fastpg/trainer/data/encoding.py"
ROLLOUT_ENGINE = "fastpg/trainer/rollouts/rollout_engine.py"
TRAINER = "fastpg/trainer/trainer.py"

MUTANTS = [
    # Completions and their masks.
    Mutant(
        "the-end-is-masked",
        ROLLOUT,
        "return eos_before == 0, is_eos.any(-1)",
        "return is_eos.cumsum(-1) == 0, is_eos.any(-1)",
        STEPS,
    ),
    Mutant(
        "one-token-after-the-end-is-kept",
        ROLLOUT,
        "eos_before = is_eos.cumsum(-1) - is_eos.long()",
        "eos_before = (is_eos.cumsum(-1) - is_eos.long()).roll(1, -1)",
        STEPS,
    ),
    Mutant(
        "finished-only-at-the-last-token", ROLLOUT, "is_eos.any(-1)\n", "is_eos[:, -1]\n", STEPS
    ),
    Mutant(
        "what-follows-the-end-is-attended-to",
        ROLLOUT,
        "torch.cat([attention, mask.long()], dim=1)",
        "torch.cat([attention, torch.ones_like(mask).long()], dim=1)",
        SAMPLING,
        harmless="the states of a causal model do not hang on the tokens after them",
    ),
    Mutant(
        "what-follows-the-end-is-decoded",
        EPISODES,
        "tokenizer.decode(row[mask], skip_special_tokens=True)",
        "tokenizer.decode(row, skip_special_tokens=True)",
        SAMPLING,
    ),
    Mutant(
        "ends-of-the-generation-config-ignored",
        ENCODING,
        "more = policy.generation_config.eos_token_id\n",
        "more = None\n",
        SAMPLING,
    ),
    Mutant(
        "only-the-first-end-of-the-generation-config",
        ENCODING,
        "ends.update(more)",
        "ends.update(more[:1])",
        SAMPLING,
    ),
    Mutant(
        "end-of-the-tokenizer-ignored",
        ENCODING,
        "known = sorted(end for end in ends if end < size)",
        "known = sorted(e for e in ends - {tokenizer.eos_token_id} or ends if e < size)",
        SAMPLING,
    ),
    # Sampling.
    Mutant("fifty-likeliest-tokens", ROLLOUT, "top_k=0,", "top_k=50,", SAMPLING),
    Mutant("top-k-of-transformers", ROLLOUT, "        top_k=0,\n", "", SAMPLING),
    Mutant("nucleus", ROLLOUT, "top_p=1.0,", "top_p=0.95,", SAMPLING),
    Mutant("improbable-tokens-dropped", ROLLOUT, "top_p=1.0,", "min_p=0.02,", SAMPLING),
    Mutant(
        "rollouts-at-temperature-1",
        ROLLOUT,
        "        temperature=temperature,\n",
        "        temperature=1.0,\n",
        SAMPLING,
    ),
    Mutant(
        "evaluations-at-temperature-1",
        ROLLOUT_ENGINE,
        "temperature=self.args.temperature,",
        "temperature=self.args.temperature if len(prompts) != self.args.num_eval_samples else 1.0,",
        SAMPLING,
    ),
    Mutant("greedy", ROLLOUT, "do_sample=True", "do_sample=False", SAMPLING),
    # Kept sets.
    Mutant(
        "log-probs-over-the-whole-vocabulary",
        "fastpg/trainer/learning/learner.py",
        "support=None if rollout.kept is None else rollout.kept.support,",
        "support=None,",
        SETS,
    ),
    Mutant(
        "sets-of-other-episodes",
        "fastpg/trainer/rollouts/kept_sets.py",
        "order = places.argsort()",
        "order = torch.arange(len(places))",
        SETS,
    ),
    Mutant(
        "sets-before-the-temperature",
        "fastpg/trainer/rollouts/sampling.py",
        "z = logits / sampling.temperature",
        "z = logits",
        SETS,
    ),
    Mutant(
        "weights-of-vllm-never-pushed",
        "fastpg/trainer/own_loop.py",
        """            self.engine.update_weights()
        # Metrics""",
        """            pass
        # Metrics""",
        VLLM,
    ),
    Mutant(
        "vllm-not-corrected",
        "fastpg/trainer/models/objective.py",
        "weight = weight * targets.importance",
        "pass",
        VLLM,
    ),
    Mutant(
        "one-token-less",
        ROLLOUT,
        "        max_new_tokens=max_new_tokens,\n        eos_token_id",
        "        max_new_tokens=max_new_tokens - 1,\n        eos_token_id",
        SAMPLING,
    ),
    Mutant("sampling-in-the-mode-of-training", GENERATION, "    policy.eval()\n", "", SAMPLING),
    Mutant(
        "prompts-at-their-full-length",
        ROLLOUT_ENGINE,
        "max_prompt_length=self.args.max_prompt_length",
        "max_prompt_length=512",
        SAMPLING,
    ),
    Mutant(
        "order-of-the-prompts-ignores-the-seed",
        PROMPTS,
        "torch.Generator().manual_seed(args.seed)",
        "torch.Generator().manual_seed(0)",
        SAMPLING,
    ),
    Mutant(
        "prompts-in-the-order-of-the-dataset",
        PROMPTS,
        "sampler=sampler, collate_fn",
        "collate_fn",
        SAMPLING,
    ),
    Mutant(
        "prompts-drawn-with-replacement",
        PROMPTS,
        "        generator=torch.Generator()",
        "        replacement=True,\n        generator=torch.Generator()",
        SAMPLING,
    ),
    Mutant(
        "prompts-of-a-group-are-apart",
        PROMPTS,
        "(example for example in examples for _ in range(copies))",
        "(example for _ in range(copies) for example in examples)",
        SAMPLING,
    ),
    Mutant(
        "samples-ignore-the-seed",
        TRAINER,
        "set_seed(self.args.seed, device_specific=True)",
        "set_seed(0, device_specific=True)",
        SAMPLING,
    ),
    Mutant(
        "samples-of-no-seed",
        TRAINER,
        "        set_seed(self.args.seed, device_specific=True)\n",
        "        torch.seed()\n",
        SAMPLING,
    ),
    Mutant(
        "evaluations-differ-in-their-samples",
        TRAINER,
        "            torch.manual_seed(self.args.seed + self.accelerator.process_index)\n",
        "            torch.seed()\n",
        SAMPLING,
    ),
    Mutant(
        "an-evaluation-reseeds-training",
        TRAINER,
        'with torch.random.fork_rng([device] if device.type == "cuda" else []):',
        "with torch.random.fork_rng([], enabled=False):",
        SAMPLING,
    ),
    Mutant(
        "evaluation-on-the-training-prompts",
        TRAINER,
        "[self.eval_dataset[i] for i in range(count)]",
        "[self.train_dataset[i] for i in range(count)]",
        SAMPLING,
    ),
    Mutant(
        "evaluation-on-the-last-prompts",
        TRAINER,
        "[self.eval_dataset[i] for i in range(count)]",
        "[self.eval_dataset[-1 - i] for i in range(count)]",
        SAMPLING,
    ),
]
