// The loops that pay for wide vectors, as one table of functions per instruction set. The table is
// chosen once, at load; everything else is compiled for the baseline.
#pragma once

#include "loss/kl_estimate.h"
#include "loss/policy_loss.h"
#include "loss/value_loss.h"
#include "vocabulary/online_softmax.h"
#include "weight/importance_weights.h"

namespace fpg {

// A vocabulary row is reduced in slices of this many logits, whatever the number of rows or
// threads, so that a token's bits depend on its own row alone. A slice fits in a first-level cache,
// which its second reading hits.
constexpr int64_t kSlice = 8192;

// Losses are summed over blocks of this many tokens, added in block order. A block stays in the
// cache.
constexpr int64_t kTokenBlock = 2048;

template <typename X>
struct TokenLogprobsKernels {
  using T = compute_t<X>;
  RowStats<T> (*slice_stats)(const X* x, int64_t n, T softcap, T inv_temperature, bool entropy);
  void (*slice_gradient)(const X* x, X* dx, int64_t n, const RowGradient<T>& row);
};

template <typename T>
struct PolicyLossKernels {
  void (*policy_block)(const PolicyTokens<T>& tokens, int64_t n, const PolicyOptions& options,
                       T* coefficient, double* part);
};

template <typename T>
struct ValueLossKernels {
  void (*value_block)(const ValueTokens<T>& tokens, int64_t n, T clip, T* coefficient,
                      double* part);
};

template <typename T>
struct KlEstimateKernels {
  void (*kl_values)(const T* logp, const T* ref_logp, int64_t n, KlKind kind, T* kl);
  void (*kl_gradient)(const T* grad, const T* logp, const T* ref_logp, int64_t n, KlKind kind,
                      T* grad_logp);
};

template <typename T>
struct ImportanceKernels {
  void (*importance_block)(const ImportanceTokens<T>& tokens, int64_t n,
                           const ImportanceBounds& bounds, T* weights, double* part);
};

struct Kernels : TokenLogprobsKernels<bf16>,
                 TokenLogprobsKernels<fp16>,
                 TokenLogprobsKernels<float>,
                 TokenLogprobsKernels<double>,
                 PolicyLossKernels<float>,
                 PolicyLossKernels<double>,
                 ValueLossKernels<float>,
                 ValueLossKernels<double>,
                 KlEstimateKernels<float>,
                 KlEstimateKernels<double>,
                 ImportanceKernels<float>,
                 ImportanceKernels<double> {
  const char* name;
};

extern const Kernels baseline, avx2, avx512;

const Kernels& kernels();  // the table in use

// The tables this machine can run, best first, as a null-terminated list; and the choice of one.
const Kernels* const* supported_kernels();
bool select_kernels(const char* name);

}  // namespace fpg
