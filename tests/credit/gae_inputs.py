"""Inputs for the tests of gae, and gae itself as a plain loop."""

import torch

from fastpg.ops.credit import gae as page

POISON = [float("nan"), float("inf"), -float("inf"), 1e30]
CU = torch.tensor([0, 3, 3, 8, 12, 13, 20], dtype=torch.int32)


def inputs(shape=(3, 7), dtype=torch.float64, seed=0):
    """Rewards, values and a mask that hides tokens at the start, inside and at the end."""
    g = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in "rv")
    return rewards, values, torch.rand(shape, generator=g) < 0.7


def flags(shape, seed=1):
    """terminated, truncated and bootstrap of one shape."""
    g = torch.Generator().manual_seed(seed)
    terminated, truncated = (torch.rand(shape, generator=g) < 0.3 for _ in range(2))
    return terminated, truncated, torch.randn(shape, generator=g, dtype=torch.float64)


def record(rewards, values=None, *, gamma=1.0, lam=1.0, **given):
    """The inputs of the op; what is not given is None."""
    options = dict.fromkeys(page.Inputs._fields) | given
    options |= {"rewards": rewards, "values": values, "gamma": gamma, "lam": lam}
    return page.Inputs(**options)


def sequences(x, cu_seqlens):
    """The sequences of a padded or packed tensor, one by one."""
    return list(x) if cu_seqlens is None else list(x.split(cu_seqlens.diff().tolist()))


def by_loop(rewards, values, mask, gamma, lam):
    """Advantages and returns of a padded batch by `loop`, in fp64."""
    if mask is None:
        mask = torch.ones(rewards.shape, dtype=torch.bool)
    rewards, values = rewards.double(), values.double()
    gamma, lam = (torch.full((), x, dtype=torch.float64) for x in (gamma, lam))
    out = torch.zeros(2, *rewards.shape, dtype=torch.float64)
    for i in range(len(rewards)):
        one = torch.ones_like(rewards[i])
        out[:, i] = loop(rewards[i], values[i], mask[i], gamma, lam, one, one, None, None, None)
    return out


def loop(r, v, mask, gamma, lam, rho, c, terminated, truncated, bootstrap):
    """One sequence, by the words of the docstring; flags and bootstrap are [T], [] or None."""
    kept, out = mask.nonzero()[:, 0].tolist(), r.new_zeros(2, len(r))
    carry = value = r.new_zeros(())
    for t in reversed(kept):
        last = t == kept[-1]

        def here(x, last=last, t=t):
            return x is not None and bool(x[t] if x.dim() else last and x)

        done, cut = here(terminated), here(truncated)
        if terminated is None:
            done = last and not cut and (truncated is not None or bootstrap is None)
        if last or done or cut:
            read = bootstrap is not None and not done and (cut or bootstrap.dim() == 0)
            value = (bootstrap[t] if bootstrap.dim() else bootstrap) if read else r.new_zeros(())
            carry = r.new_zeros(())
        g, decay = (x[t] if x.dim() else x for x in (gamma, lam))
        carry = rho[t] * (r[t] + g * value - v[t]) + g * decay * c[t] * carry
        value = v[t]
        out[:, t] = torch.stack([carry, carry + value])
    return out


def scaled_to_blocks(length, kernel):
    """A length as far from a multiple of 8, Triton's short blocks, as this one is from one of 128.

    Other kernels than Triton's keep the length: in CUDA C++ a warp has tiles of 128 tokens.
    """
    if kernel != "triton":
        return length
    tiles, beyond = divmod(length + 64, 128)
    return 8 * tiles + beyond - 64


def shorten_blocks(request, monkeypatch):
    """Makes the blocks of the scan in Triton short, so that a sequence of these tests has several.

    Triton's interpreter is too slow for longer sequences.
    """
    if "kernel" in request.fixturenames and request.getfixturevalue("kernel") == "triton":
        monkeypatch.setattr("fastpg.ops.credit.gae_triton.BLOCK", 8)
