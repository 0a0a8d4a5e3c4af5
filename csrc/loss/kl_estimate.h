// An estimate of KL(policy || reference) at one token, its derivative by logp, and the arguments of
// fastpg/ops/loss/kl_estimate.py.
#pragma once

#include "common/fields.h"
#include "common/log_ratio.h"
#include "common/stream.h"

namespace fpg {

// The codes of fastpg/ops/loss/kl_estimate.py.
enum class KlKind : int { kK1, kK2, kK3 };
enum class Beyond : int { kStop, kHold };  // what happens to a gradient beyond max_log_ratio

template <typename T>
struct KlBounds {
  LogRatioBound<T> log_ratio;
  T most;  // of the estimate; infinite: none
};

// By the log-ratio d: its value, and its derivative.
template <KlKind kKind, typename T>
FPG_HD Moving<T> kl_of(T d) {
  if constexpr (kKind == KlKind::kK1) return {d, T(1)};
  if constexpr (kKind == KlKind::kK2) return {d * d * T(0.5), d};
  const T k3 = exp_excess(-d).excess;
  return {k3, d - k3};  // 1 - e^-d without its cancellation
}

// The estimate within its bounds.
template <KlKind kKind, typename T>
FPG_HD Moving<T> kl_term(T logp, T ref_logp, const KlBounds<T>& bounds) {
  const Moving<T> d = held_log_ratio(logp, ref_logp, bounds.log_ratio);
  const Moving<T> kl = kl_of<kKind>(d.value);
  const bool too_much = (kl.value > bounds.most) | (kl.value < -bounds.most);
  return {bounded(kl.value, bounds.most), select(too_much, T(0), kl.slope * d.slope)};
}

struct KlEstimateInputs {
  int dtype;  // of every array
  int64_t count;
  const void* logp;      // [count]
  const void* ref_logp;  // [count]
  KlKind kind;
  double max_log_ratio, max_kl;
  Beyond beyond;

  FPG_FIELDS(dtype, count, logp, ref_logp, kind, max_log_ratio, max_kl, beyond)

  template <typename T>
  KlBounds<T> bounds() const {
    return {{T(max_log_ratio), T(beyond == Beyond::kHold)}, T(max_kl)};
  }
};

struct KlEstimateArguments {
  KlEstimateInputs inputs;
  void* kl;  // [count]
  Stream stream;

  FPG_FIELDS(inputs, kl, stream)
};

struct KlEstimateBackwardArguments {
  KlEstimateInputs inputs;
  const void* grad_kl;  // [count], dL/dkl
  void* grad_logp;      // [count], dL/dlogp
  Stream stream;

  FPG_FIELDS(inputs, grad_kl, grad_logp, stream)
};

// The loops of kl_estimate_simd.cpp, which is compiled for each instruction set.
template <typename T>
struct KlEstimateKernels {
  void (*kl_values)(const T* logp, const T* ref_logp, int64_t n, KlKind kind,
                    const KlBounds<T>& bounds, T* kl);
  void (*kl_gradient)(const T* grad, const T* logp, const T* ref_logp, int64_t n, KlKind kind,
                      const KlBounds<T>& bounds, T* grad_logp);
};

}  // namespace fpg
