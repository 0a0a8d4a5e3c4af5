"""Episodes of several turns, in which tokens of a tool stand between those of the policy."""

import torch
from recorded_runs import Episode

from fastpg.trainer.rollouts.rollout import Rollout

EOS = 1


def played_episodes(groups=3, size=4):
    """Episodes of `size` completions to each of `groups` prompts, as their plain tokens."""
    g = torch.Generator().manual_seed(4)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=g))

    def tokens(count):
        return torch.randint(2, 43, (count,), generator=g).tolist()

    episodes = []
    for prompt in [tokens(number(2, 6)) for _ in range(groups)]:
        for i in range(size):
            completion, sampled = [], []
            # Some begin with a tool, some end with one, and some have none.
            for turn in range(number(1, 4)):
                is_policy, length = (turn + i) % 4 != 0, number(1, 5)
                completion += tokens(length)
                sampled += [is_policy] * length
            completion += tokens(1)
            sampled += [True]
            finished = number(0, 2) == 1
            if finished:
                completion[-1] = EOS
            elif i == 1:
                completion += tokens(2)
                sampled += [False, False]
            episodes.append(Episode(prompt, completion, finished, sampled))
    return episodes


def as_rollout(episodes):
    """The same episodes as padded tensors."""
    before = max(len(episode.prompt) for episode in episodes)
    behind = max(len(episode.completion) for episode in episodes)
    ids = torch.zeros(len(episodes), before + behind, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    mask = torch.zeros(len(episodes), behind, dtype=torch.bool)
    for row, episode in enumerate(episodes):
        length = len(episode.completion)
        slots = slice(before - len(episode.prompt), before + length)
        ids[row, slots] = torch.tensor(episode.prompt + episode.completion)
        attention[row, slots] = 1
        mask[row, :length] = torch.tensor(episode.sampled)
    finished = torch.tensor([episode.finished for episode in episodes])
    return Rollout(ids, attention, mask, finished)
