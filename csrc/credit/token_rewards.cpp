// Scores and KL penalties to rewards, and back: one sequence after another.
#include "credit/token_rewards.h"

#include "common/dtype.h"

namespace fpg {
namespace {

constexpr int64_t kGrain = 32768;  // tokens a thread should have at least

// The last unmasked token of [begin, end), or -1.
int64_t last_token(const bool* mask, int64_t begin, int64_t end) {
  for (int64_t i = end - 1; i >= begin; --i)
    if (mask[i]) return i;
  return -1;
}

// body(sequence, first token, end)
template <typename Body>
void for_each_sequence(const Sequences& sequences, const Body& body) {
  parallel_for(sequences, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) body(s, sequences.begin(s), sequences.end(s));
  });
}

}  // namespace

void token_rewards(const Sequences& sequences, int dtype, const void* scores_, const void* kl_,
                   const bool* mask, double kl_coef, void* rewards_) {
  sequences.check("token_rewards");
  with_compute_dtype(dtype, [&](auto element) {
    using X = decltype(element);
    const X *scores = static_cast<const X*>(scores_), *kl = static_cast<const X*>(kl_);
    X* rewards = static_cast<X*>(rewards_);
    const X coef = X(kl_coef);
    for_each_sequence(sequences, [=](int64_t sequence, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        rewards[i] = kl && mask[i] ? token_reward(X(0), kl[i], coef) : X(0);
      const int64_t last = last_token(mask, begin, end);
      if (last >= 0) rewards[last] = token_reward(scores[sequence], kl ? kl[last] : X(0), coef);
    });
  });
}

void token_rewards_backward(const Sequences& sequences, int dtype, const void* grad_,
                            const bool* mask, double kl_coef, void* grad_scores_, void* grad_kl_) {
  with_compute_dtype(dtype, [&](auto element) {
    using X = decltype(element);
    const X* grad = static_cast<const X*>(grad_);
    X *grad_scores = static_cast<X*>(grad_scores_), *grad_kl = static_cast<X*>(grad_kl_);
    const X coef = X(kl_coef);
    for_each_sequence(sequences, [=](int64_t sequence, int64_t begin, int64_t end) {
      for (int64_t i = begin; grad_kl && i < end; ++i)
        grad_kl[i] = mask[i] ? -coef * grad[i] : X(0);
      const int64_t last = last_token(mask, begin, end);
      grad_scores[sequence] = last >= 0 ? grad[last] : X(0);
    });
  });
}

}  // namespace fpg
