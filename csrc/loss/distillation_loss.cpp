// The distillation loss of a batch of tokens: blocks over the threads, their sums added in order.
#include "loss/distillation_loss.h"

#include <vector>

#include "common/bind.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "simd/select.h"

namespace fpg {
namespace {

constexpr int64_t kBlockTokens = 32;
constexpr int64_t kGrain = 8192;  // A thread should have at least so many log-probs.

void distillation_loss(const DistillationArguments& in) {
  with_compute_dtype(in.inputs.dtype, [&](auto zero) {
    using T = decltype(zero);
    const DistillationInputs& x = in.inputs;
    const DistillationBatch<T> batch = {static_cast<const T*>(x.logp),
                                        static_cast<const T*>(x.teacher_logp),
                                        static_cast<const T*>(x.weight),
                                        x.kept_count,
                                        x.divergence,
                                        x.beta,
                                        static_cast<T*>(in.coefficient)};
    const auto& kernel = kernels<DistillationKernels<T>>();
    const int64_t lanes = ceil_div(x.kept_count, kKeptLanes) * kKeptLanes;
    const int64_t blocks = ceil_div(x.token_count, kBlockTokens);
    std::vector<DistillationStats> parts(blocks);
    parallel_for(blocks, kGrain / (kBlockTokens * x.kept_count), [&](int64_t begin, int64_t end) {
      std::vector<double> space(5 * lanes);
      double* const row = space.data();
      const DistillationRoom room = {
          {row, row + lanes}, {row + 2 * lanes, row + 3 * lanes}, row + 4 * lanes};
      for (int64_t i = begin; i < end; ++i) {
        const int64_t last = smaller((i + 1) * kBlockTokens, x.token_count);
        kernel.tokens(batch, i * kBlockTokens, last, room, parts[i]);
      }
    });
    *in.stats = {};
    for (const DistillationStats& part : parts)
      for (int i = 0; i < DistillationStats::kFields; ++i) in.stats->x[i] += part.x[i];
    *static_cast<T*>(in.loss) = T(in.stats->x[DistillationStats::loss]);
  });
}

FPG_BIND(distillation_loss, distillation_loss)
FPG_BIND_STATISTICS(DistillationStats)

}  // namespace
}  // namespace fpg
