"""A robot in a k x k room learns to fetch meat, by three policy gradients on fastpg's ops.

The room holds a broom (-1), a bathtub (-10) and the meat (+100, which ends the episode). Every
episode starts in the corner (0, 0); the robot walks up, down, left or right and stays where it is
if a wall is in the way. An episode is a row of T tokens whose vocabulary is the four actions: the
ops that train language models train the robot too.

    python examples/gridworld.py        # a table, and the learning curves in out/gridworld.png
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from fastpg import gae, policy_loss, token_logprobs, token_weights, value_loss, whiten

MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])
GAMMA, HORIZON, SCALE = 0.95, 40, 100.0  # rewards are divided by SCALE before learning


class Room:
    """Many robots in copies of one k x k room: states are cells [B], actions [B] in 0..3."""

    def __init__(self, k=6):
        self.k, self.start, self.meat = k, 0, k * k - 1  # opposite corners
        self.rewards = torch.zeros(k, k)
        self.rewards[0, k // 2] = -1.0  # the broom, on the wall
        self.rewards[k // 2, k // 2] = -10.0  # the bathtub, in the middle
        self.rewards[-1, -1] = 100.0

    def step(self, cells, actions):
        places = torch.stack([cells // self.k, cells % self.k], 1) + MOVES[actions]
        row, column = places.clamp(0, self.k - 1).unbind(1)
        cells = row * self.k + column
        return cells, self.rewards.flatten()[cells], cells == self.meat


@torch.no_grad()
def rollout(room, policy, episodes):
    """cells, actions, rewards, mask [B, T]: the mask ends at the meat. found, last cell [B]."""
    cells, found = torch.full((episodes,), room.start), torch.zeros(episodes, dtype=torch.bool)
    columns = []
    for _ in range(HORIZON):
        actions = policy(cells).softmax(-1).multinomial(1)[:, 0]
        after, rewards, at_meat = room.step(cells, actions)
        columns.append((cells, actions, rewards / SCALE, ~found))
        cells, found = after, found | at_meat
    return *(torch.stack(column, 1) for column in zip(*columns, strict=True)), found, cells


def network(room, outputs):
    return nn.Sequential(nn.Embedding(room.k**2, 64), nn.Tanh(), nn.Linear(64, outputs))


@torch.no_grad()
def ending(critic, found, last):
    """An episode ends at the meat, or goes on, worth V, from the cell where the time ran out."""
    return {"terminated": found, "bootstrap": critic(last)[..., 0]}


def reinforce(batch, policy, critic):
    """One step along Σ_t ∇log π(a_t | s_t) R, R the discounted return of the whole episode."""
    cells, actions, rewards, mask, *_ = batch
    returns, _ = gae(rewards, None, mask, gamma=GAMMA)
    logp = token_logprobs(policy(cells), actions)
    whole = returns[:, :1].expand(returns.shape)
    yield policy_loss(logp, whole, token_weights(mask, reduce="sequence_sum"))[0]


def vanilla(batch, policy, critic):
    """Reward-to-go minus a learned baseline, and a step of the baseline towards the returns."""
    cells, actions, rewards, mask, found, last = batch
    values = critic(cells)[..., 0]
    end = ending(critic, found, last)
    advantages, returns = gae(rewards, values.detach(), mask, gamma=GAMMA, **end)
    weight = token_weights(mask)
    logp = token_logprobs(policy(cells), actions)
    policy_part, _ = policy_loss(logp, advantages, weight, surrogate="reinforce")
    yield policy_part + 0.5 * value_loss(values, returns, weight)[0]


def ppo(batch, policy, critic, epochs=4):
    """GAE, whitened, and several clipped steps on the same episodes, with an entropy bonus."""
    cells, actions, rewards, mask, found, last = batch
    with torch.no_grad():
        old_logp, old_values = token_logprobs(policy(cells), actions), critic(cells)[..., 0]
        end = ending(critic, found, last)
        advantages, returns = gae(rewards, old_values, mask, gamma=GAMMA, lam=0.95, **end)
        advantages, weight = whiten(advantages, mask), token_weights(mask)
    for _ in range(epochs):
        logp, entropy = token_logprobs(policy(cells), actions, return_entropy=True)
        policy_part, _ = policy_loss(
            logp, advantages, weight, old_logp=old_logp, entropy=entropy, entropy_coef=0.01
        )
        value_part, _ = value_loss(
            critic(cells)[..., 0], returns, weight, old_values=old_values, clip=0.2
        )
        yield policy_part + 0.5 * value_part


ALGORITHMS = {"REINFORCE": reinforce, "vanilla policy gradient": vanilla, "PPO": ppo}


def train(algorithm, room, iterations, seed=0, episodes=32, lr=0.003, critic_lr=0.01):
    """The mean undiscounted reward of an episode, at each iteration."""
    torch.manual_seed(seed)
    policy, critic = network(room, len(MOVES)), network(room, 1)
    groups = (policy, lr), (critic, critic_lr)
    optimizer = torch.optim.Adam({"params": net.parameters(), "lr": rate} for net, rate in groups)
    curve = []
    for _ in range(iterations):
        batch = rollout(room, policy, episodes)
        rewards, mask = batch[2:4]
        curve.append(SCALE * rewards[mask].sum().item() / episodes)
        for loss in algorithm(batch, policy, critic):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return curve


def plot(curves, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, runs in curves.items():
        runs = torch.tensor(runs)
        (line,) = axes.plot(runs.mean(0), label=name)
        x = range(runs.shape[1])
        axes.fill_between(x, runs.amin(0), runs.amax(0), color=line.get_color(), alpha=0.15)
    axes.set(xlabel="iteration (32 episodes each)", ylabel="reward of an episode")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out/gridworld.png"))
    options = parser.parse_args(arguments)
    room, curves = Room(), {}
    print(f"{'reward of an episode':<26}{'first':>8}{'half':>8}{'last':>8}")
    for name, algorithm in ALGORITHMS.items():
        seeds = range(options.seeds)
        curves[name] = [train(algorithm, room, options.iterations, seed=seed) for seed in seeds]
        mean = torch.tensor(curves[name]).mean(0)
        points = mean[0], mean[len(mean) // 2], mean[-1]
        print(f"{name:<26}" + "".join(f"{point:8.1f}" for point in points))
    plot(curves, options.out)
    print(f"learning curves: {options.out}")
    return curves


if __name__ == "__main__":
    main()
