// A scan of affine maps along sequences on a GPU: how a sequence is cut up, and what passes between
// the lanes of a warp and the warps of a block.
#pragma once

#include "common/cuda.h"
#include "credit/gae.h"

namespace fpg {

constexpr int kLaneTokens = 4;
constexpr int kTileTokens = kLaneTokens * kWarp;
constexpr int kWarps = 8;
static_assert(kGroupTokens == kTileTokens * kWarps, "a group has a tile for each warp of a block");

// x -> b + a x. Where kCuts, and a is 0, it is b whatever x is: nothing leaks out of an episode.
template <bool kCuts>
struct alignas(16) Affine {
  double a, b;

  __device__ double operator()(double x) const { return kCuts && a == 0 ? b : b + a * x; }
  __device__ Affine after(Affine first) const {
    return {kCuts && a == 0 ? 0.0 : a * first.a, (*this)(first.b)};
  }
};

__device__ inline float from_lane(float x, int lane) { return __shfl_sync(kAllLanes, x, lane); }
__device__ inline double from_lane(double x, int lane) { return __shfl_sync(kAllLanes, x, lane); }
__device__ inline GaeNext<double> from_lane(GaeNext<double> x, int lane) {
  return {from_lane(x.advantage, lane), from_lane(x.value, lane)};
}
// That of the lane which is so far before.
template <typename Map>
__device__ inline Map from_before(Map f, int distance) {
  return {__shfl_up_sync(kAllLanes, f.a, distance), __shfl_up_sync(kAllLanes, f.b, distance)};
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
  const unsigned all = __ballot_sync(kAllLanes, own.given);
  const unsigned lower = all & ((1u << lane) - 1);
  before = {from_lane(own.message, lower ? 31 - __clz(lower) : 0), lower != 0};
  return {from_lane(own.message, all ? 31 - __clz(all) : 0), all != 0};
}

// That of the warps [begin, end) of a block. kFull: each of them has one.
template <bool kFull, typename Message>
__device__ inline LastMessage<Message> last_message_of_warps(const LastMessage<Message>* warps,
                                                             int begin, int end) {
  if (kFull) return begin < end ? warps[end - 1] : LastMessage<Message>{{}, false};
  const int lane = threadIdx.x % kWarp;
  const bool given = begin <= lane && lane < end && warps[lane].given;
  const unsigned all = __ballot_sync(kAllLanes, given);
  return all ? warps[31 - __clz(all)] : LastMessage<Message>{{}, false};
}

// The maps of the lanes from `first` to this one, composed, of `lanes` lanes.
template <int kLanes, typename Map>
__device__ inline Map compose_lanes(Map f, int first) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const Map other = from_before(f, distance);
    if (lane - distance >= first) f = f.after(other);
  }
  return f;
}

// How a sequence is cut into tiles and groups, counted in the order of the scan, and which tokens
// of a tile a lane has.
template <bool kReverse>
struct Tiling {
  int length, tiles;

  __device__ explicit Tiling(int64_t length)
      : length(int(length)), tiles(int(ceil_div(length, kTileTokens))) {}

  // This lane's first token in a tile.
  __device__ int first(int tile) const {
    const int lane = threadIdx.x % kWarp;
    return kReverse ? (tiles - 1 - tile) * kTileTokens + kLaneTokens * (kWarp - 1 - lane)
                    : tile * kTileTokens + kLaneTokens * lane;
  }
  // How many tokens the lane has there.
  __device__ int count(int tile) const {
    return tile < tiles ? clamp(length - first(tile), 0, kLaneTokens) : 0;
  }
  // Whether so many tiles from this one on are there and lack no token.
  __device__ bool full(int tile, int count) const {
    const int partial = length % kTileTokens != 0;  // the last tile in memory
    return kReverse ? tile >= partial && tile + count <= tiles : tile + count <= tiles - partial;
  }
};

// The groups of a sequence that a block scans: those of `part`, of `parts`. The groups are divided
// evenly; the last part has one at least, be it without tokens.
struct Part {
  Sequence sequence;
  int begin, end;
  bool last;

  __device__ static Part of(const Sequence& sequence, int64_t part, int64_t parts) {
    const int64_t length = sequence.end - sequence.begin;
    const int64_t groups = larger<int64_t>(ceil_div(length, kGroupTokens), 1);
    return {sequence, int(part * groups / parts), int((part + 1) * groups / parts),
            part + 1 == parts};
  }
  // How many warps have tokens to scan.
  __device__ int warps() const {
    const int64_t tiles = ceil_div(sequence.end - sequence.begin, kTileTokens);
    return begin == end ? 0 : int(clamp<int64_t>(tiles, 1, kWarps));
  }
};

// The warps [begin, end) of a block scan a part together. Warps without a part belong to the last
// team: there they are beyond its tiles.
struct Team {
  Part part;
  int begin, end;

  __device__ int rank() const { return int(threadIdx.x / kWarp) - begin; }
  __device__ int size() const { return end - begin; }
};

}  // namespace fpg
