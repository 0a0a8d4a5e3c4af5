// What the page fastpg/ops/token_logprobs.py hands to the C++ kernel.
#pragma once

#include <stdint.h>

namespace fpg {

// `count` rows of `vocab` logits. Row i begins at (i / inner) * outer_stride + (i % inner) *
// inner_stride elements; its logits are adjacent.
struct LogitRows {
  const void* logits;
  int dtype;
  int64_t count, inner, outer_stride, inner_stride, vocab;
  const int64_t* labels;       // [count]
  const void* temperatures;    // [count] in the compute type, or null: `temperature` for all
  double temperature, softcap;  // softcap 0: none
  int64_t ignore_index;
};

struct LogprobsOut {  // each [count] in the compute type; entropy may be null
  void *logp, *entropy, *max, *log_sum;
};

struct LogprobsGradient {  // each [count] in the compute type; the gradients and entropy may be null
  const void *grad_logp, *grad_entropy, *entropy, *max, *log_sum;
};

void token_logprobs(const LogitRows& rows, const LogprobsOut& out);
void token_logprobs_backward(const LogitRows& rows, const LogprobsGradient& in, void* grad_logits);

}  // namespace fpg
