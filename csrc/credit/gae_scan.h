// A scan of affine maps along a sequence on a GPU, four tokens to a lane.
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

// The x of the lane that is this far before.
__device__ inline double from_before(double x, int distance) {
  return __shfl_up_sync(kAllLanes, x, distance);
}
__device__ inline float from_lane(float x, int lane) { return __shfl_sync(kAllLanes, x, lane); }
__device__ inline double from_lane(double x, int lane) { return __shfl_sync(kAllLanes, x, lane); }
__device__ inline GaeNext<double> from_lane(GaeNext<double> x, int lane) {
  return {from_lane(x.advantage, lane), from_lane(x.value, lane)};
}

// The message of the last unmasked token among some, if there is one.
template <typename Message>
struct LastMessage {
  Message message;
  bool given;
};

// That of the whole warp; `before` becomes that of the lanes before this one. kFull: every lane has
// an unmasked token.
template <bool kFull, typename Message>
__device__ inline LastMessage<Message> last_message_of_warp(const LastMessage<Message>& own,
                                                            LastMessage<Message>& before) {
  const unsigned lane = threadIdx.x % kWarp;
  if (kFull) {
    before = {from_lane(own.message, (lane + kWarp - 1) % kWarp), lane > 0};
    return own;  // The last lane's is the warp's.
  }
  const unsigned all = __ballot_sync(kAllLanes, own.given), lower = all & ((1u << lane) - 1);
  before = {from_lane(own.message, lower ? 31 - __clz(lower) : 0), lower != 0};
  return {from_lane(own.message, all ? 31 - __clz(all) : 0), all != 0};
}

// The maps of the lanes up to this one, composed; `before` becomes that without this one.
template <typename Map>
__device__ inline Map scan_warp(Map f, Map& before) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const Map other = {from_before(f.a, distance), from_before(f.b, distance)};
    if (lane >= distance) f = f.after(other);
  }
  before = {from_before(f.a, 1), from_before(f.b, 1)};
  if (lane == 0) before = {1.0, 0.0};
  return f;
}

// How a sequence is cut into tiles, counted in the order of the scan, and which tokens of a tile a
// lane has.
template <bool kReverse>
struct Tiling {
  int length, tiles;

  __device__ explicit Tiling(int64_t length)
      : length(int(length)), tiles(int(ceil_div(length, kWarpTokens))) {}

  // This lane's first token in a tile.
  __device__ int first(int tile) const {
    const int lane = threadIdx.x % kWarp;
    return kReverse ? (tiles - 1 - tile) * kWarpTokens + 4 * (kWarp - 1 - lane)
                    : tile * kWarpTokens + 4 * lane;
  }
  // How many tokens, of four, the lane has there.
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
