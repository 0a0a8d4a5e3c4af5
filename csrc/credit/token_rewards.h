// Rewards per token: a KL penalty at every token, and the score at the sequence's last unmasked
// one.
#pragma once

#include "common/numbers.h"
#include "common/sequences.h"

namespace fpg {

// The reward of an unmasked token; `score` is 0 but for the last.
template <typename T>
FPG_HD T token_reward(T score, T kl, T kl_coef) {
  return score - kl_coef * kl;
}

// Of the dtype code: scores [sequences], kl and rewards [tokens]. kl may be null: 0.
void token_rewards(const Sequences& sequences, int dtype, const void* scores, const void* kl,
                   const bool* mask, double kl_coef, void* rewards);
void token_rewards_backward(const Sequences& sequences, int dtype, const void* grad,
                            const bool* mask, double kl_coef, void* grad_scores, void* grad_kl);

}  // namespace fpg
