// The value loss of a batch of tokens: blocks over the threads, merged in block order.
#include "loss/value_loss.h"

#include <vector>

#include "common/bind.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "simd/select.h"

namespace fpg {
namespace {

constexpr int64_t kGrain = 32;  // A thread should have at least so many blocks.

template <typename T>
ValueTokens<T> tokens_from(const ValueTokens<T>& t, int64_t i) {
  return {t.values + i, t.returns + i, t.weight + i, t.old_values ? t.old_values + i : nullptr};
}

void value_loss(const ValueLossArguments& in) {
  with_compute_dtype(in.inputs.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto& kernel = kernels<ValueLossKernels<T>>();
    const ValueTokens<T> tokens = tokens_of<T>(in.inputs);
    T* coefficient = static_cast<T*>(in.coefficient);
    const int64_t count = in.inputs.count;
    const int64_t blocks = ceil_div(count, kTokenBlock);
    std::vector<ValueStats> parts(blocks);
    parallel_for(blocks, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * kTokenBlock;
        kernel.value_block(tokens_from(tokens, first), smaller(kTokenBlock, count - first),
                           T(in.inputs.clip), coefficient + first, parts[i].x);
      }
    });
    clear(*in.stats);
    for (const ValueStats& part : parts) merge(*in.stats, part);
    *static_cast<T*>(in.loss) = T(in.stats->x[ValueStats::loss]);
  });
}

FPG_BIND(value_loss, value_loss)
FPG_BIND_STATISTICS(ValueStats)

}  // namespace
}  // namespace fpg
