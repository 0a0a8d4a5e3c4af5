"""The training that `PPOTrainer` promises as a plain loop of plain torch in float64.

It makes its optimiser steps on the episodes of a recorded run, with nothing of fastpg in it, and
computes by hand every metric that the trainer logs.
"""

import copy

import torch
from recorded_runs import ENDS, REWARDS, SETTINGS, score_by_hand
from tiny_trainer import tiny_model

from fastpg.tasks import reviews

PENALISED_REWARD = {"kl": "reward", "whiten": True, "share": "token"}
RULES = {
    "ppo": {**PENALISED_REWARD, "critic": True},
    "reinforce++": PENALISED_REWARD,
    "grpo": {"kl": "loss", "center": "std", "share": "sequence"},
    "dr_grpo": {"kl": "loss", "center": "mean", "share": "longest"},
    "rloo": {"kl": "score", "center": "loo", "share": "sum", "unclipped": True},
    "gspo": {"kl": "loss", "center": "std", "share": "sequence", "level": "sequence"},
}
"""What each algorithm does, in the words of `PlainLoop`."""


def centred(scores, how, size):
    """Each score compared with those of its group: `size` episodes one after the other."""
    out = []
    for group in scores.split(size):
        for score in group:
            others = (group.sum() - score) / (size - 1)
            spread = group.std() + 1e-6 if how == "std" else 1.0
            out.append((score - (others if how == "loo" else group.mean())) / spread)
    return torch.stack(out)


class PlainLoop:
    """The optimiser steps of an algorithm, one `step` per rollout.

    policy, value_head, reference: modules, of which the first two are trained.
    settings: those of the trainer, all given.
    """

    def __init__(self, policy, value_head, reference, settings):
        self.policy, self.reference = (copy.deepcopy(m).double() for m in (policy, reference))
        self.rule, self.settings = RULES[settings["algorithm"]], settings
        groups = [{"params": self.policy.parameters(), "lr": settings["learning_rate"]}]
        if "critic" in self.rule:
            self.value_head = copy.deepcopy(value_head).double()
            head = self.value_head.parameters()
            groups.append({"params": head, "lr": settings["value_learning_rate"]})
        self.optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.95), eps=settings["adam_epsilon"], weight_decay=0.0
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.steps_done = 0

    def parameters(self):
        """The trained parameters, of policy and value head, flat."""
        every = [p for group in self.optimizer.param_groups for p in group["params"]]
        return torch.nn.utils.parameters_to_vector(every).detach()

    def step(self, episodes, scores, minibatches):
        """Learn from the episodes. Returns the metrics of the step."""
        remaining = 1 - self.steps_done / self.settings["num_steps"]
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * remaining
        self.steps_done += 1
        with torch.no_grad():
            old = [self._tokens(self.policy, e) for e in episodes]
            metrics = self._credit(episodes, scores, old)
        self.seen, self.values_seen, losses, value_losses, norms = [], [], [], [], []
        for batch in minibatches:
            self.optimizer.zero_grad()
            terms = [self._loss(episodes[i], old[i]) for i in batch]
            shares = self._shares([len(old[i]["logp"]) for i in batch])
            loss = sum(s * t[0].sum() for s, t in zip(shares, terms, strict=True))
            value_loss = sum(s * t[1].sum() for s, t in zip(shares, terms, strict=True))
            (loss + self.settings["vf_coef"] * value_loss).backward()
            losses.append(loss.item())
            value_losses.append(value_loss.item())
            norms.append(self._clip_gradients())
            self.optimizer.step()
        metrics |= self._policy_metrics() | {
            "policy/loss": sum(losses) / len(losses),
            "grad_norm": sum(norms) / len(norms),
            "learning_rate": self.rates[0] * remaining,
        }
        if "critic" in self.rule:
            clipped = torch.cat(self.values_seen)
            metrics["value/loss"] = sum(value_losses) / len(value_losses)
            metrics["value/clip_frac"] = clipped.double().mean().item()
        self.norms = norms
        return metrics

    def _tokens(self, policy, episode):
        """Log-probs, entropies and values of the tokens of the completion that were sampled."""
        length = len(episode.completion)
        sampled = torch.tensor(episode.sampled or [True] * length)
        ids = torch.tensor(episode.prompt + episode.completion)
        out = policy(ids[None], output_hidden_states=True)
        logp = (out.logits[0, -length - 1 : -1] / self.settings["temperature"]).log_softmax(-1)
        result = {
            "logp": logp.gather(-1, ids[-length:, None])[:, 0],
            "entropy": -(logp.exp() * logp).sum(-1),
        }
        if "critic" in self.rule:
            hidden = out.hidden_states[-1][0, -length - 1 : -1]
            result["value"] = self.value_head(hidden)[:, 0]
        return {name: tokens[sampled] for name, tokens in result.items()}

    def _credit(self, episodes, scores, old):
        """Adds `advantage` (and `return`) to each entry of `old`. Returns metrics."""
        rule, coef = self.rule, self.settings["kl_coef"]
        for episode, tokens in zip(episodes, old, strict=True):
            tokens["ref_logp"] = self._tokens(self.reference, episode)["logp"]
            tokens["kl"] = tokens["logp"] - tokens["ref_logp"]
        kl = torch.stack([tokens["kl"].sum() for tokens in old])
        if rule["kl"] == "score":
            scores = scores - coef * kl
        if "center" in rule:
            scores = centred(scores, rule["center"], self.settings["num_generations"])
        for tokens, score in zip(old, scores, strict=True):
            rewards = -coef * tokens["kl"] if rule["kl"] == "reward" else 0 * tokens["kl"]
            rewards[-1] += score
            self._advantages(tokens, rewards)
        metrics = {"objective/kl": kl.mean().item()}
        if "critic" in rule:
            returns = torch.cat([tokens["return"] for tokens in old])
            missed = returns - torch.cat([tokens["value"] for tokens in old])
            explained = 1 - missed.var(correction=0) / returns.var(correction=0)
            metrics["value/explained_variance"] = explained.item()
        if "whiten" in rule:
            every = torch.cat([tokens["advantage"] for tokens in old])
            for tokens in old:
                tokens["advantage"] = (tokens["advantage"] - every.mean()) / every.std()
        return metrics

    def _advantages(self, tokens, rewards):
        """Generalised advantage estimation by its recursion; without a critic all values are 0."""
        values = tokens.get("value", torch.zeros_like(rewards))
        gamma, lam = self.settings["gamma"], self.settings.get("lam", 1.0)
        advantage, following, next_value = torch.zeros_like(rewards), 0.0, 0.0
        for t in reversed(range(len(rewards))):
            following = rewards[t] + gamma * next_value - values[t] + gamma * lam * following
            advantage[t], next_value = following, values[t]
        tokens["advantage"], tokens["return"] = advantage, advantage + values

    def _shares(self, lengths):
        """What one token of each episode counts in the loss of its optimiser step."""
        tokens, count, longest = sum(lengths), len(lengths), self.settings["max_new_tokens"]
        return {
            "token": [1 / tokens for _ in lengths],
            "sequence": [1 / (count * length) for length in lengths],
            "sum": [1 / count for _ in lengths],
            "longest": [1 / (count * longest) for _ in lengths],
        }[self.rule["share"]]

    def _loss(self, episode, old):
        """The losses of the tokens of an episode: of the policy, and of the values."""
        settings, advantage = self.settings, old["advantage"]
        now = self._tokens(self.policy, episode)
        d = now["logp"] - old["logp"]
        ratio = d.exp()
        if self.rule.get("level") == "sequence":
            ratio = d.mean().exp().expand(len(d))
        low, high = 1 - settings.get("cliprange", 0), 1 + settings.get("cliprange_high", 0)
        if "unclipped" in self.rule:
            terms = -ratio.detach() * advantage * now["logp"]
            low, high = 0.0, float("inf")
        else:
            terms = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        seen = {
            "d": d,
            "ratio": ratio,
            "low": (advantage < 0) & (ratio < low),
            "high": (advantage > 0) & (ratio > high),
            "entropy": now["entropy"],
        }
        if self.rule["kl"] == "loss":
            from_reference = now["logp"] - old["ref_logp"]
            seen["ref_kl"] = d.exp() * ((-from_reference).exp() - 1 + from_reference)
            terms = terms + settings["kl_coef"] * seen["ref_kl"]
        self.seen.append({name: x.detach() for name, x in seen.items()})
        terms = terms - settings["entropy_coef"] * now["entropy"]
        return terms, self._value_loss(now, old)

    def _value_loss(self, now, old):
        if "critic" not in self.rule:
            return torch.zeros(())
        bound = self.settings["cliprange_value"]
        held = torch.clamp(now["value"], old["value"] - bound, old["value"] + bound)
        error, held_error = (now["value"] - old["return"]) ** 2, (held - old["return"]) ** 2
        self.values_seen.append((held_error > error).detach())
        return 0.5 * torch.maximum(error, held_error)

    def _clip_gradients(self):
        """Scale the gradient of all parameters down to its bound. Returns the norm it had."""
        every = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.stack([(g**2).sum() for g in every]).sum().sqrt().item()
        for gradient in every:
            gradient *= min(1.0, self.settings["max_grad_norm"] / norm)
        return norm

    def _policy_metrics(self):
        """Means over the tokens of all optimiser steps of the rollout."""
        seen = {name: torch.cat([x[name] for x in self.seen]) for name in self.seen[0]}
        d, ratio = seen["d"], seen["ratio"]
        low, high = (seen[name].double().mean().item() for name in ("low", "high"))
        metrics = {
            "clip_frac": low + high,
            "clip_frac_low": low,
            "clip_frac_high": high,
            "clip_frac_dual": 0.0,
            "kl": -d.mean().item(),
            "approx_kl": (d.exp() - 1 - d).mean().item(),
            "ratio_mean": ratio.mean().item(),
            "ratio_min": ratio.min().item(),
            "ratio_max": ratio.max().item(),
            "ess": (ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum())).item(),
            "count": float(len(d)),
            "entropy": seen["entropy"].mean().item(),
            "first_ratio_deviation": 0.0,
        }
        if "ref_kl" in seen:
            metrics["ref_kl"] = seen["ref_kl"].mean().item()
        return {f"policy/{name}": value for name, value in metrics.items()}


def plain_loop(trainer, settings):
    """The plain loop from where the trainer is now."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return PlainLoop(trainer.policy, model.value_head, tiny_model(), settings)


def learn_plainly(loop, rounds):
    """Make the steps of the loop on recorded rollouts. Returns its metrics of every rollout."""
    rows = []
    for played in rounds:
        episodes = played.episodes(ENDS)
        scores, metrics = score_by_hand(
            episodes, REWARDS, SETTINGS["reward_weights"], 0.3, reviews.build_tokenizer()
        )
        rows.append(metrics | loop.step(episodes, scores, played.minibatches()))
    return rows
