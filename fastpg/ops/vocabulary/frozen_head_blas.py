"""Log-probs from a frozen head by a device's BLAS, in tiles of logits: the kernel of its page."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .frozen_head import Inputs, Outputs
from .head import (
    ALL,
    RowLabels,
    Tile,
    filled,
    kept_rows,
    product,
    row_chunks,
    statistics,
    take,
    tiles,
)
from .linear_rows import checked_labels
from .shards import NEVER, Statistics, finite_max, label_logprob
from .token_logprobs import (
    BackwardInputs,
    BackwardOutInputs,
    token_logprobs_backward_out_op,
)
from .token_logprobs import Inputs as TileInputs


class Sums:
    """Σ_{j ≠ y} e^{z_j − m} t_j weight_i[j] of rows [n], with m the maximum of their z so far.

    Attributes:
        sums: [n, H_i] of each i, in the compute dtype; None where it is not wanted.
        top: m T, [n].
    """

    def __init__(
        self, sums: list[Tensor | None], head_weight: list[Tensor], rows: RowLabels, softcap: float
    ) -> None:
        self.sums, self.head_weight = sums, head_weight
        self.rows, self.softcap = rows, softcap
        self.top = torch.full_like(rows.labels, -math.inf, dtype=rows.temperature.dtype)

    def add(self, tile: Tile, top: Tensor) -> None:
        """Adds a tile, whose rows have the maxima `top`; its logits are overwritten."""
        before, self.top = self.top, torch.maximum(self.top, top)
        shrink = ((before - finite_max(self.top)) / self.rows.temperature).exp()[:, None]
        self._write_exponentials(tile)
        for total, weight in zip(self.sums, self.head_weight, strict=True):
            if total is not None:
                total *= shrink
                product(total, tile.logits.to(weight.dtype), weight[tile.tokens], add=True)

    def _write_exponentials(self, tile: Tile) -> None:
        """Turns logits into e^{z_j − m} t_j: minus a gradient, were log Σ e^{z − m} = 0."""
        labels, temperature = self.rows.labels - tile.tokens.start, self.rows.temperature
        nowhere = torch.full_like(labels, -1)
        inputs = TileInputs(tile.logits, nowhere, temperature, self.softcap, NEVER, False)
        minus_one = torch.full_like(self.top, -1.0)
        stats = torch.stack([self.top, torch.zeros_like(self.top)])
        backward = BackwardInputs(inputs, minus_one, None, None, stats)
        token_logprobs_backward_out_op(BackwardOutInputs(backward, tile.logits))
        here = (labels >= 0) & (labels < tile.logits.shape[1])
        # A CPU's scatter_ takes hundreds of times as long in bf16.
        at_labels = torch.arange(len(labels), device=labels.device), torch.where(here, labels, 0)
        tile.logits[at_labels] = tile.logits[at_labels].masked_fill(here, 0.0)

    def write_gradients(self, found: Statistics, logp: Tensor) -> None:
        """Turns the sums, once all tiles are in them, into ∂logp/∂hidden_i."""
        slope = 1 / self.rows.temperature
        if self.softcap:
            slope = slope * (1 - (found.label_logit / self.softcap) ** 2)
        # 1 - p_y as -expm1(logp) keeps its digits as p_y -> 1; a logit of -inf has no gradient.
        own = torch.where(found.label_logit == -math.inf, 0.0, -torch.expm1(logp)) * slope
        labels = torch.where(self.rows.legal, self.rows.labels, 0)
        share = torch.exp(-found.log_sum)
        for total, weight in zip(self.sums, self.head_weight, strict=True):
            if total is not None:
                total *= -share[:, None]
                total.addcmul_(weight[labels].to(total.dtype), own[:, None])


def chunk_logprobs(logits: Iterable[Tile], rows: RowLabels, sums: Sums) -> Tensor:
    """The log-probs of some rows; the sums become their gradients."""
    found = statistics(logits, rows.labels, rows.temperature, sums.softcap, then=sums.add)
    found = found._replace(log_sum=torch.where(rows.legal, found.log_sum, math.nan))
    logp = label_logprob(found, rows.temperature)
    sums.write_gradients(found, logp)
    return logp


def forward(x: Inputs) -> Outputs:
    """Log-probs, and their gradients by hidden; rows that are ignored go through no product."""
    kept, legal, _ = checked_labels(x.rows)
    rows = kept_rows(kept)
    head = x.rows.head.tile(rows, ALL)
    labels = take(RowLabels(x.rows.labels, legal, x.rows.temperature), rows)
    sums = [
        hidden.new_zeros(hidden.shape, dtype=x.rows.temperature.dtype) if want else None
        for hidden, want in zip(head.hidden, x.wanted, strict=True)
    ]

    def results(chunk: slice) -> Tensor:
        of_chunk, its_labels = head.tile(chunk, ALL), take(labels, chunk)
        its_sums = Sums(
            [None if total is None else total[chunk] for total in sums],
            x.rows.head_weight,
            its_labels,
            x.rows.softcap,
        )
        logits = tiles(of_chunk, x.rows.logits_dtype)
        return chunk_logprobs(logits, its_labels, its_sums)

    logp = torch.cat([results(chunk) for chunk in row_chunks(labels.labels)])
    empty = logp.new_empty(0)
    gradients = [empty if total is None else filled(rows, len(kept), total) for total in sums]
    return Outputs(filled(rows, len(kept), logp), gradients)
