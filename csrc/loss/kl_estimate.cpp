// The KL estimates of a batch of tokens, and their gradient: ranges of tokens over the threads.
#include "loss/kl_estimate.h"

#include "common/parallel.h"
#include "simd/kernels.h"

namespace fpg {
namespace {

constexpr int64_t kGrain = 32768;  // tokens a thread should have at least

}  // namespace

template <typename T>
void kl_estimate(const T* logp, const T* ref_logp, int64_t count, KlKind kind, T* kl) {
  const KlEstimateKernels<T>& kernel = kernels();
  parallel_for(count, kGrain, [&](int64_t begin, int64_t end) {
    kernel.kl_values(logp + begin, ref_logp + begin, end - begin, kind, kl + begin);
  });
}

template <typename T>
void kl_estimate_backward(const T* grad, const T* logp, const T* ref_logp, int64_t count,
                          KlKind kind, T* grad_logp) {
  const KlEstimateKernels<T>& kernel = kernels();
  parallel_for(count, kGrain, [&](int64_t begin, int64_t end) {
    kernel.kl_gradient(grad + begin, logp + begin, ref_logp + begin, end - begin, kind,
                       grad_logp + begin);
  });
}

template void kl_estimate(const float*, const float*, int64_t, KlKind, float*);
template void kl_estimate(const double*, const double*, int64_t, KlKind, double*);
template void kl_estimate_backward(const float*, const float*, const float*, int64_t, KlKind,
                                   float*);
template void kl_estimate_backward(const double*, const double*, const double*, int64_t, KlKind,
                                   double*);

}  // namespace fpg
