// torch's own thread pool behind one function: torch.set_num_threads holds, no second OpenMP
// exists.
#pragma once

#include <stdint.h>

#include <algorithm>

namespace fpg {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody,
                                     void*);

// Address of libtorch's C function torch_parallel_for, handed over once by fastpg/_library.py.
extern TorchParallelFor torch_parallel_for;

// Losses are summed over blocks of this many tokens, added in block order. A block stays in the
// first-level cache.
constexpr int64_t kTokenBlock = 2048;

// Calls body(begin, end) on disjoint ranges that cover [0, n), each of at least `grain` items (but
// the last). Which thread gets which range must never show in a result. `body` must not throw.
template <typename Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  grain = std::max<int64_t>(grain, 1);
  if (n <= grain || torch_parallel_for == nullptr) {
    if (n > 0) body(int64_t{0}, n);
  } else {
    torch_parallel_for(0, n, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
  }
}

}  // namespace fpg
