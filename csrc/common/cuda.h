// How a CUDA kernel is launched, where its sequences lie, how its threads load.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <stdexcept>
#include <string>

#include "common/numbers.h"
#include "common/sequences.h"

namespace fpg {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Launches on the stream and does not wait. Without blocks there is nothing to do.
template <typename... Parameters, typename... Args>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
            const Args&... args) {
  if (blocks == 0) return;
  if (blocks > INT_MAX) throw std::invalid_argument("fastpg: the batch is too large for a GPU");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, Parameters(args)...);
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("fastpg: CUDA says: ") + cudaGetErrorString(status));
}

struct Sequence {
  int64_t index, begin, end;
};

// The page cannot check cu_seqlens on a GPU; whatever it holds, no other memory is touched.
__device__ inline Sequence sequence_at(const Sequences& all, int64_t i) {
  if (!all.cu_seqlens) return {i, i * all.length, (i + 1) * all.length};
  const int64_t begin = clamp<int64_t>(all.cu_seqlens[i], 0, all.length);
  return {i, begin, clamp<int64_t>(all.cu_seqlens[i + 1], begin, all.length)};
}

// Four neighbours, moved by one instruction where their address allows it.
template <typename X>
struct alignas(sizeof(X) < 4 ? 4 * sizeof(X) : 16) Four {
  X x[4];
};

template <typename X>
__device__ inline Four<X> four_of(X x) {
  return {{x, x, x, x}};
}

template <typename X>
__device__ inline bool holds_four(const X* first, int64_t left) {
  return left >= 4 && reinterpret_cast<uintptr_t>(first) % alignof(Four<X>) == 0;
}

template <typename X>
__device__ inline Four<X> load_whole(const X* first) {
  return *reinterpret_cast<const Four<X>*>(first);
}
template <typename X>
__device__ inline void store_whole(X* first, const Four<X>& four) {
  *reinterpret_cast<Four<X>*>(first) = four;
}

// first[0 .. left), and `otherwise` beyond.
template <typename X>
__device__ inline Four<X> load_some(const X* first, int64_t left, X otherwise) {
  Four<X> out = four_of(otherwise);
  for (int i = 0; i < 4; ++i)
    if (i < left) out.x[i] = first[i];
  return out;
}
template <typename X>
__device__ inline void store_some(X* first, int64_t left, const Four<X>& four) {
  for (int i = 0; i < 4; ++i)
    if (i < left) first[i] = four.x[i];
}

// The same, by one instruction where that can be; `otherwise` without an array.
template <typename X>
__device__ inline Four<X> load_four(const X* first, int64_t left, X otherwise) {
  if (first == nullptr) return four_of(otherwise);
  return holds_four(first, left) ? load_whole(first) : load_some(first, left, otherwise);
}
template <typename X>
__device__ inline void store_four(X* first, int64_t left, const Four<X>& four) {
  if (holds_four(first, left))
    store_whole(first, four);
  else
    store_some(first, left, four);
}

}  // namespace fpg
