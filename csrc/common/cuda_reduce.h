// Statistics of all tokens in one launch. Each block reduces its tokens, the last one to finish
// merges what all have left, both in a fixed order: no bit depends on the timing.
//
// Stats is a struct of doubles, x[2^n], whose fields merge one by one: Stats::initial(field) and
// Stats::merged(field, a, b). A thread holds one field of many, not the other way around.
#pragma once

#include "common/cuda.h"
#include "common/stream.h"

namespace fpg {

template <int kCount>
struct Sums {
  double x[kCount];

  __device__ static double merged(int, double a, double b) { return a + b; }
};

constexpr int kReduceThreads = kReduceTokens / 4;
constexpr int kReduceWarps = kReduceThreads / kWarp;

template <typename Stats>
constexpr int kFieldsOf = sizeof(Stats) / sizeof(double);

// Merges the statistics of a warp's lanes: lane i gets field i kFields / 32. Each step halves the
// fields that a lane holds, from `first` on: it sends the others to a lane which sends it these.
template <typename Stats, int kDistance = kWarp / 2>
__device__ inline double warp_reduce(Stats& stats, int first = 0) {
  constexpr int kFields = kFieldsOf<Stats>;
  static_assert((kFields & (kFields - 1)) == 0 && kFields <= kWarp, "not a power of two");
  if constexpr (kDistance == 0) {
    return stats.x[0];
  } else {
    constexpr int kHalf = kFields * kDistance / kWarp;  // 0 once a lane has one field
    const bool upper = kHalf > 0 && (threadIdx.x & kDistance) != 0;
    if (upper) first += kHalf;
#pragma unroll
    for (int i = 0; i < (kHalf > 0 ? kHalf : 1); ++i) {
      // A select of bits: of `upper ? x[i + kHalf] : x[i]` the compiler makes an index.
      const double kept = select(upper, stats.x[i + kHalf], stats.x[i]);
      const double sent = select(upper, stats.x[i], stats.x[i + kHalf]);
      const double got = __shfl_xor_sync(kAllLanes, sent, kDistance);
      stats.x[i] = Stats::merged(first + i, kept, got);
    }
    return warp_reduce<Stats, kDistance / 2>(stats, first);
  }
}

// Merges what the warps of a block have in their order; warps[i][k] is field k of warp i. Every
// thread gets the total.
template <typename Stats>
__device__ inline const Stats& merge_warps(const double (&warps)[kReduceWarps][kFieldsOf<Stats>]) {
  __shared__ Stats total;
  __syncthreads();
  const int field = threadIdx.x;
  if (field < kFieldsOf<Stats>) {
    double x = warps[0][field];
#pragma unroll
    for (int i = 1; i < kReduceWarps; ++i) x = Stats::merged(field, x, warps[i][field]);
    total.x[field] = x;
  }
  __syncthreads();
  return total;
}

// The total of a block's threads, in shared memory until the next call.
template <typename Stats>
__device__ inline const Stats& block_reduce(Stats stats) {
  constexpr int kLanes = kWarp / kFieldsOf<Stats>;  // which hold the same field
  __shared__ double warps[kReduceWarps][kFieldsOf<Stats>];
  const int lane = threadIdx.x % kWarp;
  const double x = warp_reduce(stats);
  if (lane % kLanes == 0) warps[threadIdx.x / kWarp][lane / kLanes] = x;
  return merge_warps<Stats>(warps);
}

// Stores the statistics of a block. True in every thread of the last block to do so: it may read
// those of all blocks, by __ldcg.
template <typename Stats>
__device__ inline bool store_part(const Stats& stats, const Scratch<Stats>& scratch) {
  __shared__ bool last;
  const int field = threadIdx.x;
  if (field < kFieldsOf<Stats>) {
    scratch.parts[blockIdx.x].x[field] = stats.x[field];
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicInc(scratch.ticket, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// The total of all blocks; neighbouring threads read neighbouring fields.
template <typename Stats>
__device__ inline const Stats& merge_parts(const Scratch<Stats>& scratch) {
  constexpr int kFields = kFieldsOf<Stats>;
  __shared__ double warps[kReduceWarps][kFields];
  const int field = threadIdx.x % kFields;
  const int lane = threadIdx.x % kWarp;
  double x = Stats::initial(field);
#pragma unroll 8
  for (unsigned i = threadIdx.x / kFields; i < gridDim.x; i += kReduceThreads / kFields)
    x = Stats::merged(field, x, __ldcg(&scratch.parts[i].x[field]));
#pragma unroll
  for (int distance = kWarp / 2; distance >= kFields; distance /= 2)
    x = Stats::merged(field, x, __shfl_xor_sync(kAllLanes, x, distance));
  if (lane < kFields) warps[threadIdx.x / kWarp][field] = x;
  return merge_warps<Stats>(warps);
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
