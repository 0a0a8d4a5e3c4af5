// The KL estimates of a range of tokens, and their gradient.
#include "loss/kl_estimate.h"
#include "simd/select.h"

namespace fpg {
namespace {

template <KlKind kKind, typename T>
void value_loop(const T* logp, const T* ref_logp, int64_t n, const KlBounds<T>& bounds,
                T* __restrict__ kl) {
  const KlBounds<T> bound = bounds;  // a copy, which the stores cannot change
  for (int64_t i = 0; i < n; ++i) kl[i] = kl_term<kKind>(logp[i], ref_logp[i], bound).value;
}

template <KlKind kKind, typename T>
void slope_loop(const T* grad, const T* logp, const T* ref_logp, int64_t n,
                const KlBounds<T>& bounds, T* __restrict__ grad_logp) {
  const KlBounds<T> bound = bounds;
  for (int64_t i = 0; i < n; ++i)
    grad_logp[i] = grad[i] * kl_term<kKind>(logp[i], ref_logp[i], bound).slope;
}

template <typename T>
void kl_values(const T* logp, const T* ref_logp, int64_t n, KlKind kind, const KlBounds<T>& bounds,
               T* kl) {
  const auto loop = kind == KlKind::kK1   ? value_loop<KlKind::kK1, T>
                    : kind == KlKind::kK2 ? value_loop<KlKind::kK2, T>
                                          : value_loop<KlKind::kK3, T>;
  loop(logp, ref_logp, n, bounds, kl);
}

template <typename T>
void kl_gradient(const T* grad, const T* logp, const T* ref_logp, int64_t n, KlKind kind,
                 const KlBounds<T>& bounds, T* grad_logp) {
  const auto loop = kind == KlKind::kK1   ? slope_loop<KlKind::kK1, T>
                    : kind == KlKind::kK2 ? slope_loop<KlKind::kK2, T>
                                          : slope_loop<KlKind::kK3, T>;
  loop(grad, logp, ref_logp, n, bounds, grad_logp);
}

}  // namespace

namespace FPG_ISA {

template <>
const KlEstimateKernels<float>& table() {
  static constexpr KlEstimateKernels<float> kernels = {kl_values<float>, kl_gradient<float>};
  return kernels;
}
template <>
const KlEstimateKernels<double>& table() {
  static constexpr KlEstimateKernels<double> kernels = {kl_values<double>, kl_gradient<double>};
  return kernels;
}

}  // namespace FPG_ISA
}  // namespace fpg
