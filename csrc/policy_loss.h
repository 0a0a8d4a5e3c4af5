// Floor 1: the policy loss of one token, and what the page fastpg/ops/policy_loss.py hands over.
#pragma once

#include "elementary.h"

namespace fpg {

enum class Surrogate : int { kPpo, kReinforce };
enum class PolicyKl : int { kK3, kK3Naive, kK2 };  // to the reference policy; the page has k1 raise

// The statistics, in the order of PolicyStats.FIELDS. Sums, then minima, then maxima.
enum PolicyField {
  kCount,
  kWeight,
  kLoss,
  kSurrogate,
  kRatio,
  kRatioSq,
  kK1,
  kK3,
  kClippedLow,
  kClippedHigh,
  kRefKl,
  kEntropy,
  kPolicySums,
  kRatioMin = kPolicySums,
  kHasRefKl,
  kHasEntropy,
  kPolicyMinima,
  kRatioMax = kPolicyMinima,
  kPolicyFields
};

template <typename T>
struct PolicyTokens {  // old_logp, ref_logp and entropy may be null
  const T *logp, *advantages, *weight, *old_logp, *ref_logp, *entropy;
};

struct PolicyOptions {
  double low, high;  // bounds of the ratio; infinite: none
  Surrogate surrogate;
  PolicyKl kl;
  double kl_coef, entropy_coef;
};

// For one token: a summand of its loss, and the derivative of that by the token's log-prob.
template <typename T>
struct LossTerm {
  T value, slope;
};

template <typename T>
FPG_HD T log_ratio(T logp, T other) {
  const T d = logp - other;  // NaN passes through
  return select(d > T(20), T(20), select(d < T(-20), T(-20), d));
}

// Where the clipped branch of PPO is the minimum: no gradient there.
template <typename T>
FPG_HD bool clipped_low(T ratio, T advantage, T low) {
  return (advantage < T(0)) & (ratio < low);
}
template <typename T>
FPG_HD bool clipped_high(T ratio, T advantage, T high) {
  return (advantage > T(0)) & (ratio > high);
}

// -min(r A, clip(r) A)
template <typename T>
FPG_HD LossTerm<T> ppo(T ratio, T advantage, T low, T high) {
  const bool too_low = clipped_low(ratio, advantage, low);
  const bool too_high = clipped_high(ratio, advantage, high);
  const T bounded = select(too_low, low, select(too_high, high, ratio));
  return {-(bounded * advantage), select(too_low | too_high, T(0), -(ratio * advantage))};
}

// -r A logp with r a constant
template <typename T>
FPG_HD LossTerm<T> reinforce(T ratio, T advantage, T logp) {
  const T slope = -(ratio * advantage);
  return {select(advantage == T(0), T(0), slope * logp), slope};
}

// KL to the reference policy, d = logp - ref_logp. The derivative of r k3(d), r' = r, is r d.
template <PolicyKl kKind, typename T>
FPG_HD LossTerm<T> reference_kl(T d, T ratio) {
  if constexpr (kKind == PolicyKl::kK2) return {d * d * T(0.5), d};
  const T k3 = exp_excess(-d).excess;
  if constexpr (kKind == PolicyKl::kK3) return {ratio * k3, ratio * d};
  return {k3, d - k3};  // 1 - e^-d without its cancellation
}

// loss: one T; coefficient [count] in T: dL/dlogp; stats [kPolicyFields].
template <typename T>
struct PolicyOut {
  T *loss, *coefficient;
  double* stats;
};

template <typename T>
void policy_loss(const PolicyTokens<T>& tokens, int64_t count, const PolicyOptions& options,
                 const PolicyOut<T>& out);

}  // namespace fpg
