"""Faults of an optimiser step of the trainer: minibatches, rates, credit and losses."""

from . import Mutant

STEPS = ("tests/trainer/test_trainer_steps.py",)
PROCESSES = ("tests/trainer/test_two_processes.py",)
ALGORITHMS = "fastpg/algorithms.py"
ASSEMBLY = "fastpg/trainer/models/assembly.py"
CONFIG = "fastpg/trainer/settings/config.py"
FORWARD = "fastpg/trainer/models/forward.py"
LEARNER = "fastpg/trainer/learning/learner.py"
MODELS = "fastpg/trainer/models/policy.py"
OBJECTIVE = "fastpg/trainer/models/objective.py"
OPTIMIZER = "fastpg/trainer/learning/optimizer.py"
OWN_LOOP = "fastpg/trainer/own_loop.py"
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
        "                self.model.zero_grad()\n"  # the optimiser's own waits for the last one
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
    Mutant("rate-constant", OWN_LOOP, "        self.scheduler.step()\n", "", STEPS),
    Mutant(
        "rate-logged-after-its-step",
        OWN_LOOP,
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
        OWN_LOOP,
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
        "ref_logp, advantages, returns, importance)",
        "ref_logp, advantages, advantages, importance)",
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
]
