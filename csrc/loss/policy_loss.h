// Floor 1: the policy loss of one token, and what the page fastpg/ops/policy_loss.py hands over.
#pragma once

#include "common/elementary.h"
#include "common/stream.h"

namespace fpg {

struct Sequences;

enum class Surrogate : int { kPpo, kReinforce, kCispo, kSapo };
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

struct PolicyStats {
  double x[kPolicyFields];
};

FPG_HD void clear(PolicyStats& stats) {
  for (int i = 0; i < kPolicyFields; ++i)
    stats.x[i] = i < kPolicySums ? 0 : i < kPolicyMinima ? infinity<double>() : -infinity<double>();
}

FPG_HD void merge(PolicyStats& total, const PolicyStats& part) {
  for (int i = 0; i < kPolicyFields; ++i)
    total.x[i] = i < kPolicySums     ? total.x[i] + part.x[i]
                 : i < kPolicyMinima ? smaller(total.x[i], part.x[i])
                                     : larger(total.x[i], part.x[i]);
}

// A NaN ratio must show: minima and maxima skip it, but the sum of positive ratios does not.
FPG_HD void show_nan(PolicyStats& stats) {
  const double sum = stats.x[kRatio];
  if (sum != sum) stats.x[kRatioMin] = stats.x[kRatioMax] = sum;
}

template <typename T>
struct PolicyTokens {  // all but the first three may be null
  const T *logp, *advantages, *weight;
  const T* old_logp;
  const T* ratio;  // what the surrogate takes in place of exp(logp - old_logp)
  const T *ref_logp, *entropy;
};

// The tokens from i on.
template <typename T>
FPG_HD PolicyTokens<T> from(const PolicyTokens<T>& t, int64_t i) {
  const auto at = [i](const T* x) { return x ? x + i : nullptr; };
  return {at(t.logp),  at(t.advantages), at(t.weight), at(t.old_logp),
          at(t.ratio), at(t.ref_logp),   at(t.entropy)};
}

struct PolicyNumbers {          // in the order of Options in fastpg/ops/_surrogates.py
  double low, high, dual_clip;  // bounds of the ratio; infinite: none
  double tau_positive, tau_negative;
  double kl_coef, entropy_coef;
};

struct PolicyOptions {
  Surrogate surrogate;
  PolicyKl kl;
  PolicyNumbers numbers;
  const PolicyNumbers* on_device;  // in place of the others, or null
};

FPG_HD PolicyNumbers numbers_of(const PolicyOptions& options) {
  return options.on_device ? *options.on_device : options.numbers;
}

// For one token: a summand of its loss, and the derivative of that by the token's log-prob.
template <typename T>
struct LossTerm {
  T value, slope;
};

template <typename T>
FPG_HD T log_ratio(T logp, T other) {
  return bounded_log_ratio(logp - other);
}

// What the surrogates need of the options, in the type of the tokens.
template <typename T>
struct Bounds {
  T low, high, dual_clip, tau_positive, tau_negative;
};

template <typename T>
FPG_HD Bounds<T> bounds(const PolicyNumbers& x) {
  return {T(x.low), T(x.high), T(x.dual_clip), T(x.tau_positive), T(x.tau_negative)};
}

// A surrogate's term, and 1 where the lower and the upper bound of the ratio are in force.
template <typename T>
struct SurrogateTerm {
  T value, slope, low, high;
};

// -min(r A, clip(r) A), for A < 0 at most -dual_clip A: no gradient where the ratio is held.
template <typename T>
FPG_HD SurrogateTerm<T> ppo(T ratio, T advantage, const Bounds<T>& bounds) {
  const bool gain = advantage > T(0), penalty = advantage < T(0);
  const T most = select(gain, bounds.high, bounds.dual_clip);
  const bool too_low = penalty & (ratio < bounds.low);
  const bool too_high = (gain | penalty) & (ratio > most);
  const T held = select(too_low, bounds.low, select(too_high, most, ratio));
  const T slope = select(too_low | too_high, T(0), -(ratio * advantage));
  return {-(held * advantage), slope, select(too_low, T(1), T(0)), select(too_high, T(1), T(0))};
}

// -r A logp with r a constant
template <typename T>
FPG_HD SurrogateTerm<T> reinforce(T ratio, T advantage, T logp) {
  const T slope = -(ratio * advantage);
  return {select(advantage == T(0), T(0), slope * logp), slope, T(0), T(0)};
}

// -clip(r) A logp with r a constant: a token whose ratio is held keeps its gradient.
template <typename T>
FPG_HD SurrogateTerm<T> cispo(T ratio, T advantage, T logp, const Bounds<T>& bounds) {
  const bool counts = advantage != T(0);
  const bool too_low = counts & (ratio < bounds.low), too_high = counts & (ratio > bounds.high);
  const T held = select(too_low, bounds.low, select(too_high, bounds.high, ratio));
  const SurrogateTerm<T> term = reinforce(held, advantage, logp);
  return {term.value, term.slope, select(too_low, T(1), T(0)), select(too_high, T(1), T(0))};
}

// -4/tau s A with s = sigmoid(x), x = tau (r - 1). With z = e^-|x|, s (1 - s) = z / (1 + z)^2.
template <typename T>
FPG_HD SurrogateTerm<T> sapo(T ratio, T advantage, const Bounds<T>& bounds) {
  const T tau = select(advantage < T(0), bounds.tau_negative, bounds.tau_positive);
  const T x = tau * (ratio - T(1));
  const T z = exp(select(x < T(0), x, -x)), share = T(1) / (T(1) + z);
  const T sigmoid = select(x < T(0), z * share, share);
  return {T(-4) / tau * sigmoid * advantage, T(-4) * z * share * share * ratio * advantage, T(0),
          T(0)};
}

template <Surrogate kKind, typename T>
FPG_HD SurrogateTerm<T> surrogate(T ratio, T advantage, T logp, const Bounds<T>& bounds) {
  if constexpr (kKind == Surrogate::kPpo)
    return ppo(ratio, advantage, bounds);
  else if constexpr (kKind == Surrogate::kReinforce)
    return reinforce(ratio, advantage, logp);
  else if constexpr (kKind == Surrogate::kCispo)
    return cispo(ratio, advantage, logp, bounds);
  else
    return sapo(ratio, advantage, bounds);
}

// KL to the reference policy, d = logp - ref_logp. The derivative of r k3(d), r' = r, is r d.
template <PolicyKl kKind, typename T>
FPG_HD LossTerm<T> reference_kl(T d, T ratio) {
  if constexpr (kKind == PolicyKl::kK2) return {d * d * T(0.5), d};
  const T k3 = exp_excess(-d).excess;
  if constexpr (kKind == PolicyKl::kK3) return {ratio * k3, ratio * d};
  return {k3, d - k3};  // 1 - e^-d without its cancellation
}

// loss: one T; coefficient [count] in T: dL/dlogp.
template <typename T>
struct PolicyOut {
  T *loss, *coefficient;
  PolicyStats* stats;
};

template <typename T>
void policy_loss(const PolicyTokens<T>& tokens, int64_t count, const PolicyOptions& options,
                 const PolicyOut<T>& out);
template <typename T>
void policy_loss(const PolicyTokens<T>& tokens, int64_t count, const PolicyOptions& options,
                 const PolicyOut<T>& out, const Scratch<PolicyStats>& scratch, Stream stream);

// The ratio of each token's sequence, exp(mean (logp - old_logp)); 0 at masked tokens.
template <typename T>
void policy_loss_sequence_ratio(const Sequences& sequences, const T* logp, const T* old_logp,
                                const T* weight, T* ratio);
template <typename T>
void policy_loss_sequence_ratio(const Sequences& sequences, const T* logp, const T* old_logp,
                                const T* weight, T* ratio, Stream stream);

// The loops of policy_loss_simd.cpp, which is compiled for each instruction set.
template <typename T>
struct PolicyLossKernels {
  void (*policy_block)(const PolicyTokens<T>& tokens, int64_t n, const PolicyOptions& options,
                       T* coefficient, double* part);
};

}  // namespace fpg
