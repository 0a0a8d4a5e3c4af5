// Floor 1 of CUDA: a scan of affine maps along a sequence, four tokens to a lane.
#pragma once

#include "common/cuda.h"
#include "credit/gae.h"

namespace fpg {

constexpr int kWarpTokens = 4 * kWarp;

// x -> b + a x. Where kCuts, and a is 0, it is b whatever x is: nothing leaks out of an episode.
template <bool kCuts>
struct Affine {
  double a, b;

  __device__ double operator()(double x) const { return kCuts && a == 0 ? b : b + a * x; }
  __device__ Affine after(Affine first) const {
    return {kCuts && a == 0 ? 0.0 : a * first.a, (*this)(first.b)};
  }
};

__device__ inline double up(double x, int by) { return __shfl_up_sync(kAllLanes, x, by); }
__device__ inline float from_lane(float x, int lane) { return __shfl_sync(kAllLanes, x, lane); }
__device__ inline double from_lane(double x, int lane) { return __shfl_sync(kAllLanes, x, lane); }
__device__ inline GaeNext<double> from_lane(GaeNext<double> x, int lane) {
  return {from_lane(x.advantage, lane), from_lane(x.value, lane)};
}

// The last offer among some tokens, if one of them is unmasked.
template <typename Offer>
struct Latest {
  Offer offer;
  bool given;
};

// Of the whole warp; `before` becomes that of the lanes before this one.
template <bool kFull, typename Offer>
__device__ inline Latest<Offer> latest_of_warp(const Latest<Offer>& own, Latest<Offer>& before) {
  const unsigned lane = threadIdx.x % kWarp;
  if (kFull) {
    before = {from_lane(own.offer, (lane + kWarp - 1) % kWarp), lane > 0};
    return own;  // the last lane's is the warp's
  }
  const unsigned all = __ballot_sync(kAllLanes, own.given), lower = all & ((1u << lane) - 1);
  before = {from_lane(own.offer, lower ? 31 - __clz(lower) : 0), lower != 0};
  return {from_lane(own.offer, all ? 31 - __clz(all) : 0), all != 0};
}

// The maps of the lanes up to this one, composed; `before` becomes that without this one.
template <typename Map>
__device__ inline Map scan_warp(Map f, Map& before) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    const Map other = {up(f.a, by), up(f.b, by)};
    if (lane >= by) f = f.after(other);
  }
  before = {up(f.a, 1), up(f.b, 1)};
  if (lane == 0) before = {1.0, 0.0};
  return f;
}

// Which tokens of its sequence a lane has in a tile of its warp; tiles are counted as scanned.
template <bool kReverse>
struct Place {
  int length, tiles;

  __device__ explicit Place(int64_t length)
      : length(int(length)), tiles(int(ceil_div(length, kWarpTokens))) {}

  __device__ int first(int tile) const {
    const int lane = threadIdx.x % kWarp;
    return kReverse ? (tiles - 1 - tile) * kWarpTokens + 4 * (kWarp - 1 - lane)
                    : tile * kWarpTokens + 4 * lane;
  }
  __device__ int count(int tile) const {
    return tile < tiles ? clamp(length - first(tile), 0, 4) : 0;
  }
  // Whether these tiles, one for each warp of a block, lack no token.
  __device__ bool full(int tile, int warps) const {
    const int last_whole = length / kWarpTokens - 1;
    return kReverse ? tile >= tiles - 1 - last_whole && tile + warps <= tiles
                    : tile + warps - 1 <= last_whole;
  }
};

}  // namespace fpg
