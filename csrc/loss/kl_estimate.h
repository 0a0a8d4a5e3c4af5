// Floor 1: an estimate of KL(policy || reference) at one token, and its derivative by logp.
#pragma once

#include "common/elementary.h"

namespace fpg {

enum class KlKind : int { kK1, kK2, kK3 };  // the codes of fastpg/ops/kl_estimate.py

// d = logp - ref_logp
template <KlKind kKind, typename T>
FPG_HD T kl_value(T d) {
  if constexpr (kKind == KlKind::kK1) return d;
  if constexpr (kKind == KlKind::kK2) return d * d * T(0.5);
  const T bounded = clamp(d, T(-20), T(20));
  return exp_excess(-bounded).excess + (d - bounded);
}

// Of k2 or k3; that of k1 is 1.
template <KlKind kKind, typename T>
FPG_HD T kl_slope(T d) {
  if constexpr (kKind == KlKind::kK2) return d;
  const T bounded = clamp(d, T(-20), T(20));
  return bounded - exp_excess(-bounded).excess;  // 1 - e^-d without its cancellation
}

// Each [count]: kl, and grad_logp = dL/dlogp from grad = dL/dkl.
template <typename T>
void kl_estimate(const T* logp, const T* ref_logp, int64_t count, KlKind kind, T* kl);
template <typename T>
void kl_estimate_backward(const T* grad, const T* logp, const T* ref_logp, int64_t count,
                          KlKind kind, T* grad_logp);

}  // namespace fpg
