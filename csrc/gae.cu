// Advantages and returns, and their gradient: a block per sequence, which it scans in tiles.
//
// A lane folds four tokens into one affine map; a warp scans the maps of its lanes in a tree, and
// the warps, one after the other, apply theirs. Tiles of a warp are counted from the sequence's
// first token, so its bits depend on its own tokens alone: not on the number of warps or the batch.
#include "cuda.h"
#include "dtype.h"
#include "gae.h"

namespace fpg {
namespace {

constexpr int kMaxWarps = 8, kWarpTokens = 4 * kWarp;

// x -> b + a x, and b where a is 0: what is cut off is never read.
struct Affine {
  double a, b;
};

__device__ inline double apply(Affine f, double x) { return f.a == 0 ? f.b : f.b + f.a * x; }
__device__ inline Affine compose(Affine f, Affine g) {  // f(g(x))
  return {f.a == 0 ? 0.0 : f.a * g.a, apply(f, g.b)};
}

__device__ inline double up(double x, int by) { return __shfl_up_sync(kAllLanes, x, by); }
__device__ inline float from_lane(float x, int lane) { return __shfl_sync(kAllLanes, x, lane); }
__device__ inline double from_lane(double x, int lane) { return __shfl_sync(kAllLanes, x, lane); }
__device__ inline GaeNext<double> from_lane(GaeNext<double> x, int lane) {
  return {from_lane(x.advantage, lane), from_lane(x.value, lane)};
}

// What four neighbours bring besides numbers to be scanned.
template <typename X>
struct Options {
  int count;
  Four<bool> mask, terminated, truncated;
  Four<X> gammas, lams, rho, c;
};

template <typename X, Look kLook>
struct Batch {
  GaeInputs in;

  static constexpr bool kAll = kLook == Look::kEverything;

  template <typename T = X>
  __device__ static Four<T> four(const void* array, int64_t first, int count, T otherwise = T(0)) {
    const T* x = static_cast<const T*>(array);
    return load_four(x ? x + first : x, count, otherwise);
  }

  __device__ Options<X> options(int64_t i, int count) const {
    Options<X> out;
    out.count = count;
    if (kLook != Look::kNothing) out.mask = four<bool>(in.mask, i, count, true);
    if (!kAll) return out;
    out.terminated = four<bool>(in.terminated, i, count);
    out.truncated = four<bool>(in.truncated, i, count);
    if (in.gamma_per_token) out.gammas = four(in.gammas, i, count);
    if (in.lam_per_token) out.lams = four(in.lams, i, count);
    out.rho = four(in.rho, i, count, X(1)), out.c = four(in.c, i, count, X(1));
    return out;
  }

  __device__ static bool kept(const Options<X>& of, int i) {
    return i < of.count && (kLook == Look::kNothing || of.mask.x[i]);
  }
  __device__ static bool terminated(const Options<X>& of, int i) {
    return kAll && of.terminated.x[i];
  }
  __device__ static bool truncated(const Options<X>& of, int i) {
    return kAll && of.truncated.x[i];
  }

  // gamma or lam: of the token, of the sequence, or of all.
  __device__ static double discount(const void* given, bool per_token, X of_token, double of_all,
                                    int64_t sequence) {
    if (per_token) return of_token;
    return given ? static_cast<const X*>(given)[sequence] : of_all;
  }

  __device__ GaeFactors<double> factors(const Options<X>& of, int i, int64_t sequence) const {
    if (!kAll) return {in.gamma, in.gamma * in.lam, 1.0};
    const double gamma =
        discount(in.gammas, in.gamma_per_token, of.gammas.x[i], in.gamma, sequence);
    const double lam = discount(in.lams, in.lam_per_token, of.lams.x[i], in.lam, sequence);
    return {gamma, gamma * lam * of.c.x[i], of.rho.x[i]};
  }
};

// From the last token to the first. Tokens offer their value to those before.
template <typename X, Look kLook>
struct Forward : Batch<X, kLook> {
  X *advantages, *returns;

  static constexpr bool kReverse = true;
  using Offer = X;
  struct Tokens : Options<X> {
    Four<X> rewards, values, bootstrap;
  };
  struct Out {
    Four<X> advantages, returns;
  };

  __device__ Tokens load(int64_t i, int count) const {
    Tokens out = {this->options(i, count),
                  this->four(this->in.rewards, i, count),
                  this->four(this->in.values, i, count),
                  {}};
    if (this->kAll && this->in.truncated) out.bootstrap = this->four(this->in.bootstrap, i, count);
    return out;
  }

  __device__ Offer start(int64_t sequence) const {
    const bool follows = this->in.bootstrap && !this->in.truncated;
    return follows ? static_cast<const X*>(this->in.bootstrap)[sequence] : X(0);
  }

  __device__ Offer offer(const Tokens& of, int i, int64_t) const { return of.values.x[i]; }

  __device__ Affine map(const Tokens& of, int i, int64_t sequence, Offer next) const {
    const bool terminated = this->terminated(of, i), truncated = this->truncated(of, i);
    const double value = terminated ? X(0) : truncated ? of.bootstrap.x[i] : next;
    const GaeFactors<double> by = this->factors(of, i, sequence);
    const double reward = of.rewards.x[i], own = of.values.x[i];
    return {terminated || truncated ? 0.0 : by.trace,
            gae_step({0.0, value}, reward, own, by).advantage};
  }

  __device__ void write(Out& out, const Tokens& of, int i, int64_t, Offer, double,
                        double advantage) const {
    out.advantages.x[i] = X(advantage);
    out.returns.x[i] = X(advantage + of.values.x[i]);
  }

  __device__ void store(const Out& out, int64_t i, int count) const {
    store_four(advantages + i, count, out.advantages);
    store_four(returns + i, count, out.returns);
  }

  __device__ void finish(int64_t, Offer, double) const {}
};

// From the first token to the last. Tokens offer what one unit of their gradient sends onwards.
template <typename X, Look kLook>
struct Backward : Batch<X, kLook> {
  const X *grad_advantages, *grad_returns;
  X *grad_rewards, *grad_values, *grad_bootstrap;

  static constexpr bool kReverse = false;
  using Offer = GaeNext<double>;
  struct Tokens : Options<X> {
    Four<X> grad_advantages, grad_returns;
  };
  struct Out {
    Four<X> rewards, values, bootstrap;
  };

  __device__ Tokens load(int64_t i, int count) const {
    return {this->options(i, count), this->four(grad_advantages, i, count),
            this->four(grad_returns, i, count)};
  }

  __device__ Offer start(int64_t) const { return {0.0, 0.0}; }

  __device__ Offer offer(const Tokens& of, int i, int64_t sequence) const {
    if (this->terminated(of, i) || this->truncated(of, i)) return {0.0, 0.0};
    return gae_adjoint(1.0, this->factors(of, i, sequence));
  }

  __device__ Affine map(const Tokens& of, int i, int64_t, Offer from) const {
    return {from.advantage, double(of.grad_advantages.x[i]) + of.grad_returns.x[i]};
  }

  __device__ void write(Out& out, const Tokens& of, int i, int64_t sequence, Offer from,
                        double before, double grad) const {
    const GaeFactors<double> by = this->factors(of, i, sequence);
    const double grad_reward = by.rho * grad;
    const double received = apply({from.value, 0.0}, before);
    const bool reads = this->truncated(of, i) && !this->terminated(of, i);
    out.rewards.x[i] = X(grad_reward);
    out.values.x[i] = X(of.grad_returns.x[i] - grad_reward + received);
    out.bootstrap.x[i] = X(reads ? gae_adjoint(grad, by).value : 0.0);
  }

  __device__ void store(const Out& out, int64_t i, int count) const {
    store_four(grad_rewards + i, count, out.rewards);
    if (this->in.values) store_four(grad_values + i, count, out.values);
    if (this->in.truncated) store_four(grad_bootstrap + i, count, out.bootstrap);
  }

  __device__ void finish(int64_t sequence, Offer from, double grad) const {
    if (this->in.bootstrap && !this->in.truncated)
      grad_bootstrap[sequence] = X(apply({from.value, 0.0}, grad));
  }
};

// The last offer among some tokens, if one of them is unmasked.
template <typename Offer>
struct Latest {
  Offer offer;
  bool given;
};

// Of the whole warp; `before` becomes that of the lanes before this one.
template <typename Offer>
__device__ inline Latest<Offer> latest_of_warp(const Latest<Offer>& own, Latest<Offer>& before) {
  const unsigned all = __ballot_sync(kAllLanes, own.given);
  const unsigned lower = all & ((1u << threadIdx.x % kWarp) - 1);
  before = {from_lane(own.offer, lower ? 31 - __clz(lower) : 0), lower != 0};
  return {from_lane(own.offer, all ? 31 - __clz(all) : 0), all != 0};
}

// The maps of the lanes up to this one, composed; `before` becomes that without this one.
__device__ inline Affine scan_warp(Affine f, Affine& before) {
  const int lane = threadIdx.x % kWarp;
  for (int by = 1; by < kWarp; by *= 2) {
    const Affine other = {up(f.a, by), up(f.b, by)};
    if (lane >= by) f = compose(f, other);
  }
  before = {up(f.a, 1), up(f.b, 1)};
  if (lane == 0) before = {1.0, 0.0};
  return f;
}

// What the warps of a block tell each other, and what a tile hands to the next.
template <typename Offer>
struct Exchange {
  Latest<Offer> latest[kMaxWarps];
  Affine maps[kMaxWarps];
};

template <typename Offer>
struct Carry {
  Offer offer;
  double x;

  // After the first `warps` of the block.
  __device__ Offer offer_after(const Exchange<Offer>& all, int warps) const {
    for (int i = warps - 1; i >= 0; --i)
      if (all.latest[i].given) return all.latest[i].offer;
    return offer;
  }
  __device__ double x_after(const Exchange<Offer>& all, int warps) const {
    double out = x;
    for (int i = 0; i < warps; ++i) out = apply(all.maps[i], out);
    return out;
  }
};

template <typename Walk>
struct Lane {
  using Offer = typename Walk::Offer;
  using Tokens = typename Walk::Tokens;
  const Walk& walk;
  int64_t sequence;

  // The tokens in the order of the scan, as constants for the compiler.
  template <typename Body>
  __device__ void each(const Tokens& tokens, const Body& body) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = Walk::kReverse ? 3 - i : i;
      if (walk.kept(tokens, at)) body(at);
    }
  }

  __device__ Latest<Offer> latest(const Tokens& tokens) const {
    Latest<Offer> out = {{}, false};
    each(tokens, [&](int i) { out = {walk.offer(tokens, i, sequence), true}; });
    return out;
  }

  __device__ Affine map(const Tokens& tokens, Offer offer) const {
    Affine out = {1.0, 0.0};
    each(tokens, [&](int i) {
      out = compose(walk.map(tokens, i, sequence, offer), out);
      offer = walk.offer(tokens, i, sequence);
    });
    return out;
  }

  __device__ void write(const Tokens& tokens, Offer offer, double x, int64_t first) const {
    typename Walk::Out out = {};
    each(tokens, [&](int i) {
      const double before = x;
      x = apply(walk.map(tokens, i, sequence, offer), x);
      walk.write(out, tokens, i, sequence, offer, before, x);
      offer = walk.offer(tokens, i, sequence);
    });
    walk.store(out, first, tokens.count);
  }
};

// One tile: as many warps as the block has, each with 128 tokens.
template <typename Walk, typename Offer = typename Walk::Offer>
__device__ inline void scan_tile(const Lane<Walk>& lane, const typename Walk::Tokens& tokens,
                                 int64_t first, Carry<Offer>& carry, Exchange<Offer>& all) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  Latest<Offer> before;
  const Latest<Offer> latest = latest_of_warp(lane.latest(tokens), before);
  if (threadIdx.x % kWarp == 0) all.latest[warp] = latest;
  __syncthreads();
  const Offer offer = before.given ? before.offer : carry.offer_after(all, warp);
  Affine maps_before;
  const Offer last_offer = carry.offer_after(all, warps);
  const Affine map = scan_warp(lane.map(tokens, offer), maps_before);
  if (threadIdx.x % kWarp == kWarp - 1) all.maps[warp] = map;
  __syncthreads();
  lane.write(tokens, offer, apply(maps_before, carry.x_after(all, warp)), first);
  carry = {last_offer, carry.x_after(all, warps)};
}

template <typename Walk>
__global__ void __launch_bounds__(kMaxWarps* kWarp) gae_kernel(Walk walk) {
  using Offer = typename Walk::Offer;
  __shared__ Exchange<Offer> all;
  const Sequence sequence = sequence_at(walk.in.sequences, blockIdx.x);
  const int64_t tiles = ceil_div(sequence.end - sequence.begin, kWarpTokens);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const auto first = [&](int64_t tile) {  // of this lane in its warp's tile, counted as scanned
    const int64_t at = Walk::kReverse ? tiles - 1 - tile : tile;
    return sequence.begin + at * kWarpTokens + 4 * (Walk::kReverse ? kWarp - 1 - lane : lane);
  };
  const auto load = [&](int64_t tile) {
    const int64_t left = tile < tiles ? sequence.end - first(tile) : 0;
    return walk.load(first(tile), int(clamp<int64_t>(left, 0, 4)));
  };
  Carry<Offer> carry = {walk.start(sequence.index), 0.0};
  auto next = load(warp);
  for (int64_t tile = 0; tile < tiles; tile += warps) {
    const auto tokens = next;
    next = load(tile + warps + warp);  // on its way while this tile is scanned
    scan_tile(Lane<Walk>{walk, sequence.index}, tokens, first(tile + warp), carry, all);
  }
  if (threadIdx.x == 0) walk.finish(sequence.index, carry.offer, carry.x);
}

template <typename X>
X* typed(void* array) {
  return static_cast<X*>(array);
}
template <typename X>
const X* typed(const void* array) {
  return static_cast<const X*>(array);
}

template <template <typename, Look> class Walk, typename X, Look kLook, typename... Arrays>
void run(const GaeInputs& in, Stream stream, Arrays... arrays) {
  const int64_t mean = in.sequences.tokens() / larger<int64_t>(in.sequences.count, 1);
  const int64_t warps = clamp<int64_t>(ceil_div(mean, kWarpTokens), 1, kMaxWarps);
  using Typed = Walk<X, kLook>;
  launch(gae_kernel<Typed>, in.sequences.count, int(warps) * kWarp, stream,
         Typed{{in}, typed<X>(arrays)...});
}

template <template <typename, Look> class Walk, typename... Arrays>
void dispatch(const GaeInputs& in, Stream stream, Arrays... arrays) {
  with_compute_dtype(in.dtype, [&](auto x) {
    using X = decltype(x);
    switch (look_of(in)) {
      case Look::kNothing:
        return run<Walk, X, Look::kNothing>(in, stream, arrays...);
      case Look::kMask:
        return run<Walk, X, Look::kMask>(in, stream, arrays...);
      case Look::kEverything:
        return run<Walk, X, Look::kEverything>(in, stream, arrays...);
    }
  });
}

}  // namespace

void gae(const GaeInputs& in, void* advantages, void* returns, Stream stream) {
  dispatch<Forward>(in, stream, advantages, returns);
}

void gae_backward(const GaeInputs& in, const void* grad_advantages, const void* grad_returns,
                  void* grad_rewards, void* grad_values, void* grad_bootstrap, Stream stream) {
  dispatch<Backward>(in, stream, grad_advantages, grad_returns, grad_rewards, grad_values,
                     grad_bootstrap);
}

}  // namespace fpg
