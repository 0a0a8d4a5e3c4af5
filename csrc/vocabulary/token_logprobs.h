// What the page fastpg/ops/token_logprobs.py hands to the C++ kernel.
#pragma once

#include <stdint.h>

#include <functional>

namespace fpg {

// `count` rows of `vocab` logits. Row i begins at (i / inner) * outer_stride + (i % inner) *
// inner_stride elements; its logits are adjacent.
struct LogitRows {
  const void* logits;
  int dtype;
  int64_t count, inner, outer_stride, inner_stride, vocab;
  const int64_t* labels;    // [count]
  const void* temperature;  // in the compute type: [count], or one for all
  bool temperature_per_row;
  double softcap;  // 0: none
  int64_t ignore_index;
};

// Each in the compute type: [count], stats [2, count] of (max, log sum). Entropy may be null.
struct LogprobsOut {
  void *logp, *entropy, *stats;
};

// The same; the gradients and the entropy may be null.
struct LogprobsGradient {
  const void *grad_logp, *grad_entropy, *entropy, *stats;
};

void token_logprobs(const LogitRows& rows, const LogprobsOut& out);
// A label outside the row, but for ignore_index, is nowhere in it. grad_logits may be the logits.
void token_logprobs_backward(const LogitRows& rows, const LogprobsGradient& in, void* grad_logits);

// Both, row by row, while the row is near: between them row_loss(row) writes, from what `out` then
// holds of the row, the gradients of it that `in` points to. grad_logits may be the logits.
void token_logprobs_and_backward(const LogitRows& rows, const LogprobsOut& out,
                                 const std::function<void(int64_t row)>& row_loss,
                                 const LogprobsGradient& in, void* grad_logits);

}  // namespace fpg
