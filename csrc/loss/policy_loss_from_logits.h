// What the page fastpg/ops/policy_loss_from_logits.py hands to the C++ kernel.
#pragma once

#include "loss/policy_loss.h"
#include "vocabulary/token_logprobs.h"

namespace fpg {

// [count] in the compute type, row_stats [2, count]; entropy and grad_entropy null: not wanted.
template <typename T>
struct RowsOut {
  T *logp, *entropy, *row_stats, *grad_entropy;
  void* grad_logits;  // may be the logits
};

// tokens.logp and tokens.entropy are what rows_out receives.
template <typename T>
void policy_loss_from_logits(const TokenLogprobsInputs& rows, const PolicyTokens<T>& tokens,
                             const PolicyTerms& terms, const RowsOut<T>& rows_out,
                             const PolicyOut<T>& out);

}  // namespace fpg
