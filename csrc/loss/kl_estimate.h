// An estimate of KL(policy || reference) at one token, its derivative by logp, and the arguments of
// fastpg/ops/loss/kl_estimate.py.
#pragma once

#include "common/elementary.h"
#include "common/fields.h"
#include "common/stream.h"

namespace fpg {

enum class KlKind : int { kK1, kK2, kK3 };  // the codes of fastpg/ops/loss/kl_estimate.py

// d = logp - ref_logp
template <KlKind kKind, typename T>
FPG_HD T kl_value(T d) {
  if constexpr (kKind == KlKind::kK1) return d;
  if constexpr (kKind == KlKind::kK2) return d * d * T(0.5);
  const T bounded = bounded_log_ratio(d);
  return exp_excess(-bounded).excess + (d - bounded);
}

// The derivative of k2 or k3; that of k1 is 1.
template <KlKind kKind, typename T>
FPG_HD T kl_slope(T d) {
  if constexpr (kKind == KlKind::kK2) return d;
  const T bounded = bounded_log_ratio(d);
  return bounded - exp_excess(-bounded).excess;  // 1 - e^-d without its cancellation
}

struct KlEstimateInputs {
  int dtype;  // of every array
  int64_t count;
  const void *logp, *ref_logp;  // [count]
  KlKind kind;

  FPG_FIELDS(dtype, count, logp, ref_logp, kind)
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
  void (*kl_values)(const T* logp, const T* ref_logp, int64_t n, KlKind kind, T* kl);
  void (*kl_gradient)(const T* grad, const T* logp, const T* ref_logp, int64_t n, KlKind kind,
                      T* grad_logp);
};

}  // namespace fpg
