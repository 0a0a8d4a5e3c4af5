// The policy loss of one token, its statistics, and the arguments of
// fastpg/ops/loss/policy_loss.py.
#pragma once

#include "common/fields.h"
#include "common/log_ratio.h"
#include "common/statistics.h"
#include "common/stream.h"

namespace fpg {

// The codes of fastpg/ops/loss/surrogates.py. The KL is that to the reference policy.
enum class Surrogate : int { kPpo, kReinforce, kCispo, kSapo };
enum class PolicyKl : int { kK3, kK3Naive, kK2 };

// Sums, then minima, then maxima: the names and their order are those of PolicyStats in Python.
struct PolicyStats {
  FPG_STATISTICS(count, loss, surrogate, ratio, ratio_sq, k1, k3, clipped_low, clipped_high,
                 clipped_dual, ref_kl, entropy, ratio_min, has_ref_kl, has_entropy, ratio_max)

  static constexpr int kSums = ratio_min;
  static constexpr int kMinimaEnd = ratio_max;

  FPG_METHOD static double initial(int field) {
    return field < kSums ? 0 : field < kMinimaEnd ? infinity<double>() : -infinity<double>();
  }
  FPG_METHOD static double merged(int field, double a, double b) {
    return field < kSums ? a + b : field < kMinimaEnd ? smaller(a, b) : larger(a, b);
  }
};

FPG_HD void clear(PolicyStats& stats) {
  for (int i = 0; i < PolicyStats::kFields; ++i) stats.x[i] = PolicyStats::initial(i);
}

FPG_HD void merge(PolicyStats& total, const PolicyStats& part) {
  for (int i = 0; i < PolicyStats::kFields; ++i)
    total.x[i] = PolicyStats::merged(i, total.x[i], part.x[i]);
}

// A NaN ratio must show: minima and maxima skip it, but the sum of positive ratios does not.
FPG_HD void show_nan(PolicyStats& stats) {
  const double sum = stats.x[PolicyStats::ratio];
  if (sum != sum) stats.x[PolicyStats::ratio_min] = stats.x[PolicyStats::ratio_max] = sum;
}

template <typename T>
struct PolicyTokens {
  const T* logp;
  const T* advantages;
  const T* weight;              // 0 masks a token
  const T* old_logp;            // null: logp itself
  const T* sequence_log_ratio;  // of the surrogate; null: logp - old_logp
  const T* ref_logp;            // null: there is no KL term
  const T* entropy;             // null: there is no entropy term
};

// Tokens whose arrays `make` makes of those of the same names.
FPG_UNCHECKED_EXECUTION_SPACE
template <typename T, typename Arrays, typename Make>
FPG_HD PolicyTokens<T> tokens_by(const Arrays& arrays, const Make& make) {
  PolicyTokens<T> out;
  out.logp = make(arrays.logp);
  out.advantages = make(arrays.advantages);
  out.weight = make(arrays.weight);
  out.old_logp = make(arrays.old_logp);
  out.sequence_log_ratio = make(arrays.sequence_log_ratio);
  out.ref_logp = make(arrays.ref_logp);
  out.entropy = make(arrays.entropy);
  return out;
}

// The tokens from the first on.
template <typename T>
FPG_HD PolicyTokens<T> tokens_from(const PolicyTokens<T>& tokens, int64_t first) {
  return tokens_by<T>(tokens, [first](const T* x) { return x ? x + first : nullptr; });
}

// The numbers of the loss.
struct LossOptions {
  double low, high, dual_clip;  // bounds of the ratio; infinite: none
  double tau_positive, tau_negative;
  double kl_coef, entropy_coef;
  double max_log_ratio;  // the bound of log-ratios
  double beyond;         // the factor of a gradient beyond it: 1 holds it, 0 stops it

  FPG_FIELDS(low, high, dual_clip, tau_positive, tau_negative, kl_coef, entropy_coef, max_log_ratio,
             beyond)
};

// Which loss it is.
struct PolicyTerms {
  Surrogate surrogate;
  PolicyKl kl;
  LossOptions options;
  const LossOptions* traced_options;  // in memory of the device; null: `options` holds

  FPG_FIELDS(surrogate, kl, options, traced_options)
};

FPG_HD LossOptions options_of(const PolicyTerms& terms) {
  return terms.traced_options ? *terms.traced_options : terms.options;
}

// What the terms need of the options, in the type of the tokens.
template <typename T>
struct Bounds {
  T low, high, dual_clip, tau_positive, tau_negative;
  LogRatioBound<T> log_ratio;
};

template <typename T>
FPG_HD Bounds<T> bounds(const LossOptions& x) {
  const LogRatioBound<T> log_ratio = {T(x.max_log_ratio), T(x.beyond)};
  return {T(x.low), T(x.high), T(x.dual_clip), T(x.tau_positive), T(x.tau_negative), log_ratio};
}

// The log-ratio of a token's sequence, at its bound if it is beyond. A log-prob of -inf does not
// move it.
template <typename T>
FPG_HD Moving<T> held_mean(T mean, T logp, const Bounds<T>& bounds) {
  const Moving<T> d = held_log_ratio(mean, T(0), bounds.log_ratio);
  return {d.value, select(logp == -infinity<T>(), T(0), d.slope)};
}

// A surrogate's term, and 1 where the lower, the upper and the dual bound of the ratio are in
// force.
template <typename T>
struct SurrogateTerm {
  T value, slope, low, high, dual;
};

// A surrogate is called with the ratio r and its derivative, the advantage A, logp and the bounds.
//
// -min(r A, clip(r) A), for A < 0 at most -dual_clip A: no gradient where the ratio is held.
struct Ppo {
  template <typename T>
  FPG_METHOD SurrogateTerm<T> operator()(Moving<T> r, T advantage, T,
                                         const Bounds<T>& bounds) const {
    const bool gain = advantage > T(0);
    const bool penalty = advantage < T(0);
    const bool too_low = penalty & (r.value < bounds.low);
    const bool too_high = gain & (r.value > bounds.high);
    const bool dual = penalty & (r.value > bounds.dual_clip);
    const T above = select(gain, bounds.high, bounds.dual_clip);
    const T held = select(too_low, bounds.low, select(too_high | dual, above, r.value));
    const T slope = select(too_low | too_high | dual, T(0), -(r.slope * advantage));
    return {-(held * advantage), slope, select(too_low, T(1), T(0)), select(too_high, T(1), T(0)),
            select(dual, T(1), T(0))};
  }
};

// -r A logp with r a constant; 0 for a token of probability 0, which has no gradient.
struct Reinforce {
  template <typename T>
  FPG_METHOD SurrogateTerm<T> operator()(Moving<T> r, T advantage, T logp, const Bounds<T>&) const {
    const bool impossible = logp == -infinity<T>();
    const T slope = select(impossible, T(0), -(r.value * advantage));
    const T value = select((advantage == T(0)) | impossible, T(0), slope * logp);
    return {value, slope, T(0), T(0), T(0)};
  }
};

// -clip(r) A logp with r a constant: a token whose ratio is held keeps its gradient.
struct Cispo {
  template <typename T>
  FPG_METHOD SurrogateTerm<T> operator()(Moving<T> r, T advantage, T logp,
                                         const Bounds<T>& bounds) const {
    const bool counts = advantage != T(0);
    const bool too_low = counts & (r.value < bounds.low);
    const bool too_high = counts & (r.value > bounds.high);
    const T held = select(too_low, bounds.low, select(too_high, bounds.high, r.value));
    const SurrogateTerm<T> term = Reinforce()(Moving<T>{held, T(0)}, advantage, logp, bounds);
    return {term.value, term.slope, select(too_low, T(1), T(0)), select(too_high, T(1), T(0)),
            T(0)};
  }
};

// -4/tau s A with s = sigmoid(x), x = tau (r - 1). With z = e^-|x|, s (1 - s) = z / (1 + z)^2.
struct Sapo {
  template <typename T>
  FPG_METHOD SurrogateTerm<T> operator()(Moving<T> r, T advantage, T,
                                         const Bounds<T>& bounds) const {
    const T tau = select(advantage < T(0), bounds.tau_negative, bounds.tau_positive);
    const T x = tau * (r.value - T(1));
    const T z = exp(select(x < T(0), x, -x));
    const T share = T(1) / (T(1) + z);
    const T sigmoid = select(x < T(0), z * share, share);
    return {T(-4) / tau * sigmoid * advantage, T(-4) * z * share * share * r.slope * advantage,
            T(0), T(0), T(0)};
  }
};

// What `body` makes of the surrogate that is meant.
FPG_UNCHECKED_EXECUTION_SPACE
template <typename Body>
FPG_HD auto with_surrogate(Surrogate kind, const Body& body) {
  switch (kind) {
    case Surrogate::kPpo:
      return body(Ppo());
    case Surrogate::kReinforce:
      return body(Reinforce());
    case Surrogate::kCispo:
      return body(Cispo());
    default:
      return body(Sapo());
  }
}

// A KL to the reference policy is called with d = logp - ref_logp and the ratio r. It has no
// derivative where a log-ratio of its has none.
//
// r k3(d), whose derivative by logp, with r' = r, is r d.
struct K3 {
  template <typename T>
  FPG_METHOD Moving<T> operator()(Moving<T> d, Moving<T> r) const {
    return {r.value * exp_excess(-d.value).excess, r.slope * d.value * d.slope};
  }
};

struct K3Naive {
  template <typename T>
  FPG_METHOD Moving<T> operator()(Moving<T> d, Moving<T>) const {
    const T k3 = exp_excess(-d.value).excess;
    return {k3, (d.value - k3) * d.slope};  // 1 - e^-d without its cancellation
  }
};

struct K2 {
  template <typename T>
  FPG_METHOD Moving<T> operator()(Moving<T> d, Moving<T>) const {
    return {d.value * d.value * T(0.5), d.value * d.slope};
  }
};

// What `body` makes of the KL that is meant.
FPG_UNCHECKED_EXECUTION_SPACE
template <typename Body>
FPG_HD auto with_kl(PolicyKl kind, const Body& body) {
  switch (kind) {
    case PolicyKl::kK3:
      return body(K3());
    case PolicyKl::kK3Naive:
      return body(K3Naive());
    default:
      return body(K2());
  }
}

struct PolicyLossInputs {
  int dtype;         // of every array
  int64_t count;     // of tokens
  const void* logp;  // [count], as all arrays: those of PolicyTokens
  const void* advantages;
  const void* weight;
  const void* old_logp;
  const void* sequence_log_ratio;
  const void* ref_logp;
  const void* entropy;
  PolicyTerms terms;

  FPG_FIELDS(dtype, count, logp, advantages, weight, old_logp, sequence_log_ratio, ref_logp,
             entropy, terms)
};

template <typename T>
PolicyTokens<T> tokens_of(const PolicyLossInputs& in) {
  return tokens_by<T>(in, [](const void* x) { return static_cast<const T*>(x); });
}

struct PolicyLossArguments {
  PolicyLossInputs inputs;
  void* loss;         // one number
  void* coefficient;  // [count], dL/dlogp
  PolicyStats* stats;
  Scratch<PolicyStats> scratch;  // on a GPU
  Stream stream;

  FPG_FIELDS(inputs, loss, coefficient, stats, scratch, stream)
};

// What a token brings into the mean log-ratio of its sequence, which is bounded itself: log-ratios
// of a long sequence cancel in it. Only infinite ones are bounded.
template <typename T>
FPG_HD double summand(T logp, T old_logp) {
  const double d = log_ratio(double(logp), double(old_logp));
  const bool is_infinite = (d == infinity<double>()) | (d == -infinity<double>());
  return select(is_infinite, bounded(d), d);
}

struct SequenceLogRatioArguments {
  int dtype;  // of every array
  int64_t sequence_count, length;
  const void* logp;           // [tokens]
  const void* old_logp;       // [tokens]
  const void* weight;         // [tokens]; 0 masks a token
  const int32_t* cu_seqlens;  // [sequences + 1]; null: padded
  void* log_ratio;            // [tokens]
  Stream stream;

  FPG_FIELDS(dtype, sequence_count, length, logp, old_logp, weight, cu_seqlens, log_ratio, stream)
};

template <typename T>
struct PolicyOut {
  T* loss;         // one number
  T* coefficient;  // [count], dL/dlogp
  PolicyStats* stats;
};

// The loss on the CPU, of tokens in blocks.
template <typename T>
void policy_loss_in_blocks(const PolicyTokens<T>& tokens, int64_t count, const PolicyTerms& terms,
                           const PolicyOut<T>& out);

// The loops of policy_loss_simd.cpp, which is compiled for each instruction set.
template <typename T>
struct PolicyLossKernels {
  void (*policy_block)(const PolicyTokens<T>& tokens, int64_t n, const PolicyTerms& terms,
                       T* coefficient, double* part);
};

}  // namespace fpg
