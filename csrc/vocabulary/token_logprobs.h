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

// What the op writes, in the compute type.
struct LogprobsOut {
  void* logp;     // [count]
  void* entropy;  // [count]; written only with_entropy
  void* stats;    // [2, count]: the maximum of each row, then its log sum

  FPG_FIELDS(logp, entropy, stats)
};

// What the gradient of the logits is made of besides them, in the compute type.
struct LogprobsGradient {
  const void* grad_logp;     // [count]; null: 0
  const void* grad_entropy;  // [count]; null: 0
  const void* entropy;       // [count]; null: 0
  const void* stats;         // [2, count], as the op wrote them

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
