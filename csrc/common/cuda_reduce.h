// Floor 1 of CUDA: statistics of all tokens in one launch. Each block reduces its tokens, the last
// one to finish merges what all have left, both in a fixed order: no bit depends on the timing.
//
// Stats is a struct of doubles, x[], with clear(Stats&) and merge(Stats& total, const Stats& part).
#pragma once

#include "common/cuda.h"
#include "common/stream.h"

namespace fpg {

template <int kFields>
struct Sums {
  double x[kFields];
};
template <int kFields>
FPG_HD void clear(Sums<kFields>& sums) {
  for (double& x : sums.x) x = 0;
}
template <int kFields>
FPG_HD void merge(Sums<kFields>& total, const Sums<kFields>& part) {
  for (int i = 0; i < kFields; ++i) total.x[i] += part.x[i];
}

constexpr int kReduceThreads = kReduceTokens / 4;

template <typename Stats, typename Get>
__device__ inline Stats stats_of(const Get& get) {
  Stats stats;
#pragma unroll
  for (unsigned i = 0; i < sizeof(Stats) / sizeof(double); ++i) stats.x[i] = get(i);
  return stats;
}

// Every thread of the block gets the total: a tree over the lanes, then the warps in their order.
template <typename Stats>
__device__ inline void block_reduce(Stats& stats) {
  __shared__ Stats warps[32];
  const int warp = threadIdx.x / kWarp, count = blockDim.x / kWarp;
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    merge(stats, stats_of<Stats>(
                     [&](int i) { return __shfl_down_sync(kAllLanes, stats.x[i], distance); }));
  if (threadIdx.x % kWarp == 0) warps[warp] = stats;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int i = 1; i < count; ++i) merge(warps[0], warps[i]);
  __syncthreads();
  stats = warps[0];
  __syncthreads();  // before the next call writes
}

// Given the statistics of each block, returns true in one thread of the launch: where they are now
// those of all blocks.
template <typename Stats>
__device__ inline bool grid_reduce(Stats& stats, const Scratch<Stats>& scratch) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    scratch.parts[blockIdx.x] = stats;
    __threadfence();
    last = atomicInc(scratch.ticket, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return false;
  clear(stats);
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x)
    merge(stats, stats_of<Stats>([&](int k) { return __ldcg(&scratch.parts[i].x[k]); }));
  block_reduce(stats);
  return threadIdx.x == 0;
}

// A launch of kReduceThreads threads for each kReduceTokens tokens; one for none.
template <typename Kernel, typename Stats, typename... Args>
void launch_reduce(Kernel kernel, int64_t tokens, const Scratch<Stats>& scratch, Stream stream,
                   const Args&... args) {
  if (scratch.blocks != larger<int64_t>(1, ceil_div(tokens, kReduceTokens)))
    throw std::invalid_argument("fastpg: scratch memory of the wrong size");
  launch(kernel, scratch.blocks, kReduceThreads, stream, args..., scratch);
}

}  // namespace fpg
