// Rewards per token: a KL penalty at every token, and the score at the sequence's last unmasked
// one. The arguments are those of fastpg/ops/credit/token_rewards.py.
#pragma once

#include "common/fields.h"
#include "common/numbers.h"
#include "common/sequences.h"
#include "common/stream.h"

namespace fpg {

// The reward of an unmasked token; `score` is 0 but for the last.
template <typename T>
FPG_HD T token_reward(T score, T kl, T kl_coef) {
  return score - kl_coef * kl;
}

struct TokenRewardsInputs {
  int dtype;  // of scores, kl and rewards: fp32 or fp64
  int64_t sequence_count, length;
  const void* scores;         // [sequences]
  const bool* mask;           // [tokens]
  const void* kl;             // [tokens]; null: 0
  const int32_t* cu_seqlens;  // [sequences + 1]; null: padded
  double kl_coef;

  FPG_FIELDS(dtype, sequence_count, length, scores, mask, kl, cu_seqlens, kl_coef)

  FPG_METHOD Sequences sequences() const { return {sequence_count, length, cu_seqlens}; }
};

struct TokenRewardsArguments {
  TokenRewardsInputs inputs;
  void* rewards;  // [tokens]
  Stream stream;

  FPG_FIELDS(inputs, rewards, stream)
};

struct TokenRewardsBackwardArguments {
  TokenRewardsInputs inputs;
  const void* grad_rewards;  // [tokens]
  void* grad_scores;         // [sequences]
  void* grad_kl;             // [tokens], if there is kl
  Stream stream;

  FPG_FIELDS(inputs, grad_rewards, grad_scores, grad_kl, stream)
};

}  // namespace fpg
