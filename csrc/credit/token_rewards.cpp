// Scores and KL penalties to rewards, and back: one sequence after another.
#include "credit/token_rewards.h"

#include "common/bind.h"
#include "common/dtype.h"
#include "common/parallel.h"

namespace fpg {
namespace {

constexpr int64_t kGrain = 32768;  // A thread should have at least so many tokens.

// The last unmasked token of [begin, end), or -1.
int64_t last_token(const bool* mask, int64_t begin, int64_t end) {
  for (int64_t i = end - 1; i >= begin; --i)
    if (mask[i]) return i;
  return -1;
}

// Calls body(sequence, first token, end) for each sequence.
template <typename Body>
void for_each_sequence(const Sequences& sequences, const Body& body) {
  parallel_for(sequences, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) body(s, sequences.begin(s), sequences.end(s));
  });
}

void token_rewards(const TokenRewardsArguments& in) {
  const Sequences sequences = in.inputs.sequences();
  sequences.check("token_rewards");
  with_compute_dtype(in.inputs.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool* mask = in.inputs.mask;
    const T* scores = static_cast<const T*>(in.inputs.scores);
    const T* kl = static_cast<const T*>(in.inputs.kl);
    T* rewards = static_cast<T*>(in.rewards);
    const T kl_coef = T(in.inputs.kl_coef);
    for_each_sequence(sequences, [=](int64_t sequence, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        rewards[i] = kl && mask[i] ? token_reward(T(0), kl[i], kl_coef) : T(0);
      const int64_t last = last_token(mask, begin, end);
      if (last >= 0) rewards[last] = token_reward(scores[sequence], kl ? kl[last] : T(0), kl_coef);
    });
  });
}

void token_rewards_backward(const TokenRewardsBackwardArguments& in) {
  with_compute_dtype(in.inputs.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool* mask = in.inputs.mask;
    const bool has_kl = in.inputs.kl != nullptr;
    const T* grad_rewards = static_cast<const T*>(in.grad_rewards);
    T* grad_scores = static_cast<T*>(in.grad_scores);
    T* grad_kl = static_cast<T*>(in.grad_kl);
    const T kl_coef = T(in.inputs.kl_coef);
    for_each_sequence(in.inputs.sequences(), [=](int64_t sequence, int64_t begin, int64_t end) {
      for (int64_t i = begin; has_kl && i < end; ++i)
        grad_kl[i] = mask[i] ? -kl_coef * grad_rewards[i] : T(0);
      const int64_t last = last_token(mask, begin, end);
      grad_scores[sequence] = last >= 0 ? grad_rewards[last] : T(0);
    });
  });
}

FPG_BIND(token_rewards, token_rewards)
FPG_BIND(token_rewards_backward, token_rewards_backward)

}  // namespace
}  // namespace fpg
