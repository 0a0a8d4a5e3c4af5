"""Faults of the trainer and of the table of algorithms, one at a time."""

from . import Mutant

STEPS = ("tests/trainer/test_trainer_steps.py",)
SAMPLING = ("tests/trainer/test_trainer_sampling.py",)
METRICS = ("tests/trainer/test_trainer_metrics.py",)
PROCESSES = ("tests/trainer/test_two_processes.py",)

RESUME = ("tests/trainer/test_checkpoint.py",)

ALGORITHMS = "fastpg/algorithms.py"
ASSEMBLY = "fastpg/trainer/assembly.py"
CHECKPOINT = "fastpg/trainer/checkpoint.py"
CONFIG = "fastpg/trainer/config.py"
EPISODES = "fastpg/trainer/episodes.py"
FORWARD = "fastpg/trainer/forward.py"
HEAD = "fastpg/trainer/head.py"
LEARNER = "fastpg/trainer/learner.py"
LOGGING = "fastpg/trainer/logging.py"
MODELS = "fastpg/trainer/models.py"
OBJECTIVE = "fastpg/trainer/objective.py"
OPTIMIZER = "fastpg/trainer/optimizer.py"
PROMPTS = "fastpg/trainer/prompts.py"
ROLLOUT = "fastpg/trainer/rollout.py"
STATE = "fastpg/trainer/state.py"
STEPS_FILE = "fastpg/trainer/steps.py"
TRAINER = "fastpg/trainer/trainer.py"

OPTIMISER_STEP = """\
        self.optimizer.step()
        self.optimizer.zero_grad()
"""

MUTANTS = [
    # What an optimiser step is.
    Mutant(
        "gradients-never-cleared", LEARNER, OPTIMISER_STEP, "        self.optimizer.step()\n", STEPS
    ),
    Mutant(
        "gradients-cleared-before-the-step",
        LEARNER,
        OPTIMISER_STEP,
        "        self.optimizer.zero_grad()\n        self.optimizer.step()\n",
        STEPS,
    ),
    Mutant(
        "gradients-cleared-after-every-micro-batch-but-the-last",
        LEARNER,
        "            policy_stats += result.policy_stats\n",
        "            if i < len(parts):\n"
        "                self.optimizer.zero_grad()\n"
        "            policy_stats += result.policy_stats\n",
        STEPS,
    ),
    Mutant(
        "gradient-not-clipped",
        LEARNER,
        "self.model.parameters(), self.args.max_grad_norm)",
        'self.model.parameters(), float("inf"))',
        STEPS,
    ),
    Mutant(
        "gradient-of-the-policy-alone-clipped",
        LEARNER,
        "clip_grad_norm_(self.model.parameters()",
        "clip_grad_norm_(self.model.policy.parameters()",
        STEPS,
    ),
    Mutant(
        "gradient-clipped-by-value",
        LEARNER,
        "        self.optimizer.step()\n",
        "        torch.nn.utils.clip_grad_value_(self.model.parameters(), 0.05)\n"
        "        self.optimizer.step()\n",
        STEPS,
    ),
    Mutant(
        "last-micro-batch-dropped",
        LEARNER,
        "        parts = self._micro_batches(experience.rollout, rows)\n",
        "        parts = self._micro_batches(experience.rollout, rows)\n"
        "        parts = parts[:-1] or parts\n",
        STEPS,
    ),
    Mutant(
        "losses-divided-by-the-number-of-micro-batches",
        LEARNER,
        "self.accelerator.backward(result.loss * ",
        "self.accelerator.backward(result.loss / len(parts) * ",
        STEPS,
    ),
    Mutant(
        "denominator-of-the-micro-batch",
        LEARNER,
        "        weight = self.algorithm.weights(self._trained(experience.rollout), denom)\n",
        "        denom = self.algorithm.denom(experience.rollout.mask, self.args.max_new_tokens)\n"
        "        weight = self.algorithm.weights(self._trained(experience.rollout), denom)\n",
        STEPS,
    ),
    Mutant(
        "longest-completion-instead-of-the-longest-possible",
        LEARNER,
        "self.algorithm.denom(mask, self.args.max_new_tokens)",
        "self.algorithm.denom(mask, int(mask.sum(-1).max()))",
        STEPS,
    ),
    Mutant(
        "one-pass-too-few",
        LEARNER,
        "for epoch in range(self.resolved.num_ppo_epochs):",
        "for epoch in range(max(self.resolved.num_ppo_epochs - 1, 1)):",
        STEPS,
    ),
    # The order of the minibatches.
    Mutant(
        "every-pass-in-the-same-order",
        LEARNER,
        "torch.arange(count) if epoch == 0 else torch.randperm(count)",
        "torch.arange(count)",
        STEPS,
    ),
    Mutant(
        "every-later-pass-in-the-same-order",
        LEARNER,
        "torch.randperm(count)",
        "torch.randperm(count, generator=torch.Generator().manual_seed(0))",
        STEPS,
    ),
    Mutant(
        "first-pass-shuffled",
        LEARNER,
        "torch.arange(count) if epoch == 0 else torch.randperm(count)",
        "torch.randperm(count)",
        STEPS,
    ),
    Mutant(
        "minibatches-drawn-with-replacement",
        LEARNER,
        "torch.randperm(count)",
        "torch.randint(count, (count,))",
        STEPS,
    ),
    Mutant(
        "uneven-rest-dropped",
        LEARNER,
        "return order.tensor_split(self.resolved.num_mini_batches)",
        "number = self.resolved.num_mini_batches\n"
        "        return order.split(len(order) // number)[:number]",
        STEPS,
    ),
    Mutant(
        "old-log-probs-in-another-order",
        LEARNER,
        "in self.minibatches(torch.arange(len(rollout.mask))):",
        "in [torch.arange(len(rollout.mask))]:",
        STEPS,
    ),
    # The optimiser and its rates.
    Mutant(
        "value-head-at-the-rate-of-the-policy",
        OPTIMIZER,
        "args.resolved().value_learning_rate",
        "args.learning_rate",
        STEPS,
    ),
    Mutant("weight-decay", OPTIMIZER, "weight_decay=0.0", "weight_decay=0.01", STEPS),
    Mutant("second-beta-of-torch", OPTIMIZER, "(0.9, 0.95)", "(0.9, 0.999)", STEPS),
    Mutant("epsilon-of-torch", OPTIMIZER, "        eps=args.adam_epsilon,\n", "", STEPS),
    Mutant("rate-constant", TRAINER, "        self.scheduler.step()\n", "", STEPS),
    Mutant(
        "rate-logged-after-its-step",
        TRAINER,
        '        rate = {"learning_rate": float(self.scheduler.get_last_lr()[0])}\n'
        "        self.scheduler.step()\n",
        "        self.scheduler.step()\n"
        '        rate = {"learning_rate": float(self.scheduler.get_last_lr()[0])}\n',
        STEPS,
    ),
    Mutant(
        "rate-falls-at-every-optimiser-step",
        TRAINER,
        "        self.learner = Learner(",
        "        optimizer.optimizer.register_step_post_hook(lambda *_: self.scheduler.step())\n"
        "        self.learner = Learner(",
        STEPS,
    ),
    Mutant(
        "rate-warms-up",
        OPTIMIZER,
        "warmup=args.warmup_steps",
        "warmup=args.warmup_steps + 1",
        STEPS,
    ),
    Mutant(
        "rate-moves-by-the-number-of-processes",
        TRAINER,
        "        self.scheduler.step()\n",
        "        for _ in range(self.accelerator.num_processes):\n"
        "            self.scheduler.step()\n",
        PROCESSES,
    ),
    # Credit and losses.
    Mutant(
        "kl-of-the-wrong-sign",
        LEARNER,
        'fastpg.kl_estimate(logp, ref_logp, kind="k1")',
        'fastpg.kl_estimate(ref_logp, logp, kind="k1")',
        STEPS,
    ),
    Mutant(
        "kl-is-k3",
        LEARNER,
        'kl = fastpg.kl_estimate(logp, ref_logp, kind="k1")',
        'kl = fastpg.kl_estimate(logp, ref_logp, kind="k3")',
        STEPS,
    ),
    Mutant(
        "reference-is-the-policy",
        ASSEMBLY,
        "        reference = copied.to(device)\n",
        "        reference = policy.model\n",
        STEPS,
    ),
    Mutant(
        "reference-at-temperature-1",
        LEARNER,
        "policy_logprobs(reference, batch)",
        "policy_logprobs(reference, replace(batch, temperature=1.0))",
        STEPS,
    ),
    Mutant(
        "policy-at-temperature-1",
        LEARNER,
        "temperature=self.args.temperature,",
        "temperature=1.0,",
        STEPS,
    ),
    Mutant(
        "groups-are-interleaved",
        LEARNER,
        "// self.resolved.num_generations",
        "% (len(mask) // self.resolved.num_generations)",
        STEPS,
    ),
    Mutant(
        "returns-are-advantages",
        LEARNER,
        "ref_logp, advantages, returns), metrics",
        "ref_logp, advantages, advantages), metrics",
        STEPS,
    ),
    Mutant(
        "value-loss-of-all-slots",
        OBJECTIVE,
        "            targets.returns,\n            targets.token_weight,",
        "            targets.returns,\n"
        "            targets.token_weight.amax() + 0 * targets.token_weight,",
        STEPS,
    ),
    Mutant(
        "values-not-clipped",
        OBJECTIVE,
        "clip=self.cliprange_value,",
        "clip=1e9,",
        STEPS,
    ),
    Mutant(
        "value-loss-at-weight-1",
        OBJECTIVE,
        "return self.vf_coef * loss, stats",
        "return loss, stats",
        STEPS,
    ),
    Mutant(
        "entropy-is-a-penalty",
        OBJECTIVE,
        "entropy_coef=self.entropy_coef",
        "entropy_coef=-self.entropy_coef",
        STEPS,
    ),
    Mutant(
        "reference-of-the-loss-is-the-old-policy",
        OBJECTIVE,
        "ref_logp=chosen_if_any(targets.ref_logp, rows)",
        "ref_logp=chosen_if_any(targets.old_logp, rows)",
        STEPS,
    ),
    Mutant(
        "ratio-is-always-1",
        OBJECTIVE,
        "old_logp=chosen_if_any(targets.old_logp, rows)",
        "old_logp=logp.detach().view(shape)",
        STEPS,
    ),
    Mutant(
        "advantages-whitened-in-every-micro-batch",
        OBJECTIVE,
        "chosen(targets.advantages, rows)",
        "chosen(fastpg.whiten(targets.advantages, targets.token_weight != 0), rows)",
        STEPS,
    ),
    Mutant(
        "gamma-of-the-algorithm",
        CONFIG,
        "GaeOptions(gamma=self.gamma, ",
        'GaeOptions(gamma=algorithm.gae["gamma"], ',
        STEPS,
    ),
    Mutant(
        "lambda-of-the-algorithm",
        CONFIG,
        'lam=_given_or(self.lam, algorithm.gae["lam"])',
        'lam=algorithm.gae["lam"]',
        STEPS,
    ),
    Mutant(
        "bounds-of-the-ratio-in-the-wrong-order",
        CONFIG,
        'surrogate["clip"] = (low, high)',
        'surrogate["clip"] = (high, low)',
        STEPS,
    ),
    Mutant(
        "whitened-advantages-are-returned-to-the-critic",
        ALGORITHMS,
        "advantages = whiten(advantages, mask, process_group=process_group)",
        "advantages = returns = whiten(advantages, mask, process_group=process_group)",
        STEPS,
    ),
    Mutant(
        "padding-is-whitened-too",
        ALGORITHMS,
        "whiten(advantages, mask, process_group=process_group)",
        "whiten(advantages, torch.ones_like(mask), process_group=process_group)",
        STEPS,
    ),
    Mutant(
        "centred-before-the-penalty",
        ALGORITHMS,
        "scores = scores - self.kl_coef * torch.where(mask, kl, 0.0).sum(-1)",
        "scores = scores - self.kl_coef * torch.where(mask, kl, 0.0).mean(-1)",
        STEPS,
    ),
    Mutant(
        "dropout-stays-on",
        ASSEMBLY,
        "        disable_dropout(loaded.model)\n",
        "        loaded.model.train()\n",
        STEPS,
    ),
    Mutant(
        "value-head-starts-with-noise",
        MODELS,
        "    nn.init.zeros_(head.weight)\n",
        "",
        STEPS,
    ),
    Mutant(
        "states-after-the-tokens",
        FORWARD,
        "last_hidden_state[:, -width - 1 : -1]\n",
        "last_hidden_state[:, -width:]\n",
        ("tests/trainer/test_head.py",),
    ),
    Mutant(
        "values-one-slot-late",
        MODELS,
        "head(hidden.float()).squeeze(-1)",
        "head(hidden.float()).squeeze(-1).roll(1, 1)",
        STEPS,
    ),
    Mutant(
        "positions-count-the-padding",
        FORWARD,
        "(attention_mask.cumsum(-1) - 1).clamp(min=0)",
        "attention_mask.cumsum(-1).clamp(min=1)",
        ("tests/trainer/test_trainer.py", *STEPS),
    ),
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
        "tokenizer.decode(ids[mask], skip_special_tokens=True)",
        "tokenizer.decode(ids, skip_special_tokens=True)",
        SAMPLING,
    ),
    Mutant(
        "ends-of-the-generation-config-ignored",
        ROLLOUT,
        "more = policy.generation_config.eos_token_id\n",
        "more = None\n",
        SAMPLING,
    ),
    Mutant(
        "only-the-first-end-of-the-generation-config",
        ROLLOUT,
        "ends.update(more)",
        "ends.update(more[:1])",
        SAMPLING,
    ),
    Mutant(
        "end-of-the-tokenizer-ignored",
        ROLLOUT,
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
        TRAINER,
        "temperature=self.args.temperature,",
        "temperature=self.args.temperature if len(rows) != self.args.num_eval_samples else 1.0,",
        SAMPLING,
    ),
    Mutant("greedy", ROLLOUT, "do_sample=True", "do_sample=False", SAMPLING),
    Mutant(
        "one-token-less",
        ROLLOUT,
        "        max_new_tokens=max_new_tokens,\n        eos_token_id",
        "        max_new_tokens=max_new_tokens - 1,\n        eos_token_id",
        SAMPLING,
    ),
    Mutant("sampling-in-the-mode-of-training", ROLLOUT, "    policy.eval()\n", "", SAMPLING),
    Mutant(
        "prompts-at-their-full-length",
        TRAINER,
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
        "[example for example in examples for _ in range(copies)]",
        "[example for _ in range(copies) for example in examples]",
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
    # What is reported.
    Mutant(
        "spread-with-bessels-correction",
        EPISODES,
        "self.scores.std(correction=0)",
        "self.scores.std()",
        STEPS,
    ),
    Mutant(
        "unfinished-completions-get-the-penalty-as-a-bonus",
        EPISODES,
        "- args.missing_eos_penalty * (1 - finished)",
        "+ args.missing_eos_penalty * (1 - finished)",
        STEPS,
    ),
    Mutant(
        "finished-completions-are-penalised",
        EPISODES,
        "args.missing_eos_penalty * (1 - finished)",
        "args.missing_eos_penalty * finished",
        STEPS,
    ),
    Mutant(
        "rewards-not-weighted",
        EPISODES,
        "torch.tensor(args.reward_weights or [1.0] * len(rewards))",
        "torch.ones(len(rewards))",
        STEPS,
    ),
    Mutant(
        "length-with-padding",
        EPISODES,
        "lengths=rollout.mask.sum(-1).float().cpu()",
        "lengths=torch.full_like(finished, rollout.mask.shape[-1])",
        STEPS,
    ),
    Mutant(
        "kl-per-token",
        LEARNER,
        "self.accelerator.reduce(kl.sum(-1).mean(), ",
        "self.accelerator.reduce(kl[mask].mean(), ",
        STEPS,
    ),
    Mutant(
        "explained-variance-of-all-slots",
        LEARNER,
        "fastpg.value_loss(values, returns, fastpg.token_weights(mask))",
        "fastpg.value_loss(values, returns, torch.ones_like(values))",
        STEPS,
    ),
    Mutant(
        "policy-loss-summed-over-steps",
        STEPS_FILE,
        'metrics["policy/loss"] = policy["loss"] / len(steps)',
        'metrics["policy/loss"] = policy["loss"]',
        STEPS,
    ),
    Mutant(
        "value-loss-summed-over-steps",
        STEPS_FILE,
        'metrics["value/loss"] = value["loss"] / len(steps)',
        'metrics["value/loss"] = value["loss"]',
        STEPS,
    ),
    Mutant(
        "policy-metrics-of-the-last-step",
        STEPS_FILE,
        "[part for step in steps for part in step.policy_stats]",
        "[part for step in steps[-1:] for part in step.policy_stats]",
        STEPS,
    ),
    Mutant(
        "value-metrics-of-the-last-micro-batches",
        STEPS_FILE,
        "[part for step in steps for part in step.value_stats]",
        "[part for step in steps for part in step.value_stats[-1:]]",
        STEPS,
    ),
    Mutant(
        "first-ratio-is-the-last",
        STEPS_FILE,
        "fastpg.merge_stats(steps[0].policy_stats, process_group=group)",
        "fastpg.merge_stats(steps[-1].policy_stats, process_group=group)",
        STEPS,
    ),
    Mutant(
        "norm-of-the-last-gradient",
        STEPS_FILE,
        "torch.stack([step.grad_norm for step in steps]).mean()",
        "steps[-1].grad_norm",
        STEPS,
    ),
    Mutant(
        "times-add-up-over-steps",
        LOGGING,
        "        self._at_last_lap = dict(self.seconds)\n        return lap\n",
        "        return lap\n",
        METRICS,
    ),
    Mutant(
        "trackers-count-from-0",
        LOGGING,
        "self.accelerator.log(metrics, step=step)",
        "self.accelerator.log(metrics, step=step - 1)",
        METRICS,
    ),
    Mutant(
        "summary-without-change",
        TRAINER,
        "log.report(before, after, ",
        "log.report(after, after, ",
        METRICS,
    ),
    Mutant(
        "an-evaluation-one-step-late",
        TRAINER,
        "step % self.args.eval_steps == 0",
        "step % self.args.eval_steps == 1 and step > 1",
        METRICS,
    ),
    Mutant(
        "one-episode-too-many-written",
        LOGGING,
        "islice(episodes.records(), self.args.num_logged_completions)",
        "islice(episodes.records(), self.args.num_logged_completions + 1)",
        METRICS,
    ),
    Mutant(
        "model-saved-before-training",
        TRAINER,
        "            saver.begin(self.stopwatch.seconds)\n",
        "            saver.begin(self.stopwatch.seconds)\n            self.save_model()\n"
        "            self.save_model = lambda: None\n",
        STEPS,
    ),
    # Several processes.
    Mutant(
        "every-process-draws-the-same-samples",
        TRAINER,
        "device_specific=True",
        "device_specific=False",
        PROCESSES,
    ),
    Mutant(
        "every-process-evaluates-with-the-same-numbers",
        TRAINER,
        "torch.manual_seed(self.args.seed + self.accelerator.process_index)",
        "torch.manual_seed(self.args.seed)",
        PROCESSES,
    ),
    Mutant(
        "every-process-plays-the-whole-evaluation",
        TRAINER,
        "with self.accelerator.split_between_processes(examples) as own:",
        "for own in [examples]:",
        PROCESSES,
    ),
    Mutant(
        "evaluation-of-the-own-process",
        TRAINER,
        "return Episodes.concatenate(gather_object(episodes))",
        "return Episodes.concatenate(episodes)",
        PROCESSES,
    ),
    Mutant(
        "metrics-of-the-own-episodes",
        TRAINER,
        "everyone = Episodes.concatenate(gather_object([episodes]))",
        "everyone = episodes",
        PROCESSES,
    ),
    Mutant(
        "kl-of-the-own-process",
        LEARNER,
        'self.accelerator.reduce(kl.sum(-1).mean(), "mean").item()',
        "kl.sum(-1).mean().item()",
        PROCESSES,
    ),
    Mutant(
        "statistics-of-the-own-process",
        LEARNER,
        "fastpg.merge_stats(stats, process_group=self.process_group)",
        "fastpg.merge_stats(stats)",
        PROCESSES,
    ),
    Mutant(
        "whitened-within-the-process",
        LEARNER,
        "            process_group=self.process_group,\n        )\n        if values is not None",
        "        )\n        if values is not None",
        PROCESSES,
    ),
    Mutant(
        "denominator-of-the-own-process",
        LEARNER,
        'denom = self.accelerator.reduce(count, "sum")',
        "denom = count",
        PROCESSES,
    ),
    Mutant(
        "gradients-averaged-over-processes",
        LEARNER,
        "self.accelerator.backward(result.loss * self.accelerator.num_processes)",
        "self.accelerator.backward(result.loss)",
        PROCESSES,
    ),
    Mutant(
        "gradients-synchronised-at-the-first-micro-batch",
        LEARNER,
        "self._synchronized_if(i == len(parts))",
        "self._synchronized_if(i == 1)",
        PROCESSES,
    ),
    Mutant(
        "gradients-never-synchronised",
        LEARNER,
        "contextlib.nullcontext() if last else ",
        "",
        PROCESSES,
    ),
    Mutant(
        "too-few-prompts-for-the-processes",
        PROMPTS,
        "num_samples=args.num_steps * num_prompts * num_processes",
        "num_samples=args.num_steps * num_prompts",
        PROCESSES,
    ),
    Mutant(
        "every-process-has-the-same-prompts",
        TRAINER,
        "self.model, optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)",
        "self.model, optimizer = self.accelerator.prepare(model, optimizer)\n"
        "        self.loader = loader",
        PROCESSES,
    ),
    # What a resumed run begins with.
    Mutant(
        "random-numbers-begin-anew",
        TRAINER,
        "restore_random_state(self.state.own_random_state(saved))",
        "pass",
        RESUME,
    ),
    Mutant(
        "prompts-begin-anew",
        TRAINER,
        "skip_first_batches(self.loader, done) if done else self.loader",
        "self.loader",
        RESUME,
    ),
    Mutant(
        "moments-begin-anew",
        STATE,
        '{"state": moments, "param_groups": groups}',
        '{"state": {}, "param_groups": groups}',
        RESUME,
    ),
    Mutant(
        "schedule-begins-anew",
        STATE,
        '{**state["scheduler"], "_last_lr": rates}',
        '{**state["scheduler"], "_last_lr": rates, "last_epoch": 0}',
        RESUME,
    ),
    Mutant("numpy-forgotten", STATE, "    np.random.set_state((", "    str((", RESUME),
    Mutant("python-forgotten", STATE, "    random.setstate((", "    str((", RESUME),
    Mutant(
        "damage-unseen",
        CHECKPOINT,
        "if _described(directory / name) != manifest.get(name):",
        "if _described(directory / name) is None:",
        RESUME,
    ),
]
