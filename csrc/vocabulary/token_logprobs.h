// What the kernels of fastpg/ops/vocabulary/token_logprobs.py take.
#pragma once

#include <stdint.h>

#include <functional>

#include "common/fields.h"
#include "common/stream.h"

namespace fpg {

// `count` rows of `vocab` logits. Row i begins at (i / inner) * outer_stride + (i % inner) *
// inner_stride elements; its logits are adjacent.
struct TokenLogprobsInputs {
  int dtype;  // of the logits
  int64_t count, inner, outer_stride, inner_stride, vocab;
  bool temperature_per_row;  // else there is one temperature for all rows
  Strided logits;
  const int64_t* labels;    // [count]
  const void* temperature;  // [count] or [], in the compute type
  double softcap;           // 0: none
  int64_t ignore_index;
  bool with_entropy;

  FPG_FIELDS(dtype, count, inner, outer_stride, inner_stride, vocab, temperature_per_row, logits,
             labels, temperature, softcap, ignore_index, with_entropy)
};

// Each is [count] in the compute type, but stats: [2, count] of (max, log sum). The entropy is only
// written with_entropy.
struct LogprobsOut {
  void *logp, *entropy, *stats;

  FPG_FIELDS(logp, entropy, stats)
};

// The same. The gradients and the entropy may be null.
struct LogprobsGradient {
  const void *grad_logp, *grad_entropy, *entropy, *stats;

  FPG_FIELDS(grad_logp, grad_entropy, entropy, stats)
};

struct TokenLogprobsArguments {
  TokenLogprobsInputs inputs;
  LogprobsOut out;
  Stream stream;

  FPG_FIELDS(inputs, out, stream)
};

// A label outside the row, but for ignore_index, is nowhere in it: the row may be a slice.
struct TokenLogprobsBackwardArguments {
  TokenLogprobsInputs inputs;
  LogprobsGradient gradient;
  void* grad_logits;  // [count, vocab], in the dtype of the logits
  Stream stream;

  FPG_FIELDS(inputs, gradient, grad_logits, stream)
};

// The same op with its output among its inputs: it may be the logits.
struct TokenLogprobsBackwardOutArguments {
  TokenLogprobsInputs inputs;
  LogprobsGradient gradient;
  void* out;  // [count, vocab], in the dtype of the logits
  Stream stream;

  FPG_FIELDS(inputs, gradient, out, stream)
};

// Forward and backward, row by row, while the row is in cache. Between them row_loss(row) reads
// what `out` holds of the row, and writes the gradients that `gradient` points to. grad_logits may
// be the logits.
void token_logprobs_and_backward(const TokenLogprobsInputs& rows, const LogprobsOut& out,
                                 const std::function<void(int64_t row)>& row_loss,
                                 const LogprobsGradient& gradient, void* grad_logits);

}  // namespace fpg
