"""linear_token_logprobs by a device's BLAS, in tiles of logits: the kernels of its page."""

from __future__ import annotations

from itertools import groupby

import torch

from .head import (
    ALL,
    Factors,
    by_chunks,
    chunks_of,
    filled,
    kept_rows,
    logp_and_statistics,
    parts,
    reached,
    statistics,
    tiles,
    write_gradients,
)
from .head_arguments import legal_labels


def forward(hidden, weight, bias, labels, temperature, softcap, ignore_index, dtype):
    rest = len(weight[0]), temperature, ignore_index
    kept, legal = legal_labels("linear_token_logprobs", labels, *rest)
    rows = kept_rows(kept)
    head = Factors(hidden, weight, bias).tile(rows, ALL)
    per_row = parts(rows, labels, legal, temperature)

    def of(chunk):
        logits = tiles(head.tile(chunk, ALL), dtype)
        return logp_and_statistics(logits, *parts(chunk, *per_row), softcap)

    outputs = by_chunks(of, per_row[0])
    logp, entropy, top, log_sum = (filled(rows, len(kept), x) for x in outputs)
    return logp, entropy, torch.stack([top, log_sum])


def part(hidden, weight, bias, labels, temperature, softcap, ignore_index, dtype):
    rows = kept_rows(labels != ignore_index)
    head = Factors(hidden, weight, bias).tile(rows, ALL)
    per_row = parts(rows, labels, temperature)

    def of(chunk):
        return statistics(tiles(head.tile(chunk, ALL), dtype), *parts(chunk, *per_row), softcap)

    return torch.stack([filled(rows, len(labels), x) for x in by_chunks(of, per_row[0])])


def backward(
    grad_logp, grad_entropy, entropy, stats, hidden, weight, bias, labels, temperature, softcap,
    ignore_index, dtype, wanted,
):  # fmt: skip
    rows = kept_rows((labels != ignore_index) & reached(grad_logp, grad_entropy))
    head = Factors(hidden, weight, bias).tile(rows, ALL)
    per_row = parts(rows, grad_logp, grad_entropy, entropy, *stats, labels, temperature)
    into = head.memory(temperature.dtype, weight[0].dtype, wanted)
    for tokens, of_slice in groupby(tiles(head, dtype), key=lambda tile: tile[1]):
        _write_slice(of_slice, tokens, head, into, per_row, softcap)
    dhidden = [x if x is None else x.to(weight[0].dtype) for x in into.hidden]
    dhidden = [x if x is None else filled(rows, len(labels), x) for x in dhidden]
    flat = into._replace(hidden=dhidden).flat()
    return [weight[0].new_empty(0) if x is None else x for x in flat]


def _write_slice(of_slice, tokens, head, into, per_row, softcap):
    """dweight and dbias of a slice of the vocabulary, and its share of dhidden."""
    to = into.tile(ALL, tokens)
    *_, labels, temperature = per_row
    sums = to
    if len(chunks_of(labels)) > 1:  # tiles, whose sum is to be rounded once
        *weight, bias = [x if x is None else x.to(temperature.dtype) for x in [*to.weight, to.bias]]
        sums = Factors(to.hidden, weight, bias)
    for rows, _, logits in of_slice:
        *upstream, top, log_sum, labels, temperature = parts(rows, *per_row)
        upstream.append(torch.stack([top, log_sum]))
        given = labels - tokens.start, temperature, softcap
        tile = head.tile(rows, tokens), sums.tile(rows, ALL)
        write_gradients(logits, upstream, given, *tile, add=(tokens.start > 0, rows.start > 0))
    for x, total in zip(to.flat(), sums.flat(), strict=True):
        if total is not x:
            x.copy_(total)
