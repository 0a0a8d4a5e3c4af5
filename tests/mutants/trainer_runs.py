"""Faults of what surrounds the steps of the trainer: reports, several processes, resumed runs."""

from . import Mutant

STEPS = ("tests/trainer/test_trainer_steps.py",)
METRICS = ("tests/trainer/test_trainer_metrics.py",)
PROCESSES = ("tests/trainer/test_two_processes.py",)
RESUME = ("tests/trainer/test_checkpoint.py", "tests/trainer/test_interruptions.py")
CHECKPOINT = "fastpg/trainer/run/checkpoint.py"
EPISODES = "fastpg/trainer/rewards/episodes.py"
ENGINE = "fastpg/trainer/run/engine.py"
LEARNER = "fastpg/trainer/learning/learner.py"
LOGGING = "fastpg/trainer/report/logging.py"
PROMPTS = "fastpg/trainer/data/prompts.py"
STATE = "fastpg/trainer/run/state.py"
STEPS_FILE = "fastpg/trainer/learning/steps.py"
OWN_LOOP = "fastpg/trainer/own_loop.py"
TRAINER = "fastpg/trainer/trainer.py"

MUTANTS = [
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
        "            saver.save_model = lambda: None\n",
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
        OWN_LOOP,
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
        "synchronized_if(self.accelerator, self.model, i == len(parts))",
        "synchronized_if(self.accelerator, self.model, i == 1)",
        PROCESSES,
    ),
    Mutant(
        "gradients-never-synchronised",
        ENGINE,
        "nullcontext() if last else ",
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
        "if saved is not None and done > 0 and number == 0:",
        "if False:",
        RESUME,
    ),
    Mutant(
        "random-numbers-of-a-last-evaluation-begin-anew",
        TRAINER,
        "if saved is not None and done == self.args.num_steps:",
        "if False:",
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
