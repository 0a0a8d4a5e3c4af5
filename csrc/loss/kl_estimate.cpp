// The KL estimates of a batch of tokens, and their gradient: ranges of tokens over the threads.
#include "loss/kl_estimate.h"

#include "common/bind.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "simd/select.h"

namespace fpg {
namespace {

constexpr int64_t kGrain = 32768;  // A thread should have at least so many tokens.

void kl_estimate(const KlEstimateArguments& in) {
  with_compute_dtype(in.inputs.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto& kernel = kernels<KlEstimateKernels<T>>();
    const T* logp = static_cast<const T*>(in.inputs.logp);
    const T* ref_logp = static_cast<const T*>(in.inputs.ref_logp);
    T* kl = static_cast<T*>(in.kl);
    const KlBounds<T> bounds = in.inputs.bounds<T>();
    parallel_for(in.inputs.count, kGrain, [&](int64_t begin, int64_t end) {
      kernel.kl_values(logp + begin, ref_logp + begin, end - begin, in.inputs.kind, bounds,
                       kl + begin);
    });
  });
}

void kl_estimate_backward(const KlEstimateBackwardArguments& in) {
  with_compute_dtype(in.inputs.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto& kernel = kernels<KlEstimateKernels<T>>();
    const T* grad_kl = static_cast<const T*>(in.grad_kl);
    const T* logp = static_cast<const T*>(in.inputs.logp);
    const T* ref_logp = static_cast<const T*>(in.inputs.ref_logp);
    T* grad_logp = static_cast<T*>(in.grad_logp);
    const KlBounds<T> bounds = in.inputs.bounds<T>();
    parallel_for(in.inputs.count, kGrain, [&](int64_t begin, int64_t end) {
      kernel.kl_gradient(grad_kl + begin, logp + begin, ref_logp + begin, end - begin,
                         in.inputs.kind, bounds, grad_logp + begin);
    });
  });
}

FPG_BIND(kl_estimate, kl_estimate)
FPG_BIND(kl_estimate_backward, kl_estimate_backward)

}  // namespace
}  // namespace fpg
