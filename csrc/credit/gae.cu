// Advantages and returns, and their gradient: a block per sequence, which it scans in tiles.
//
// A lane folds four tokens into one affine map; a warp scans the maps of its lanes in a tree, and
// the warps, one after the other, apply theirs. Tiles of a warp are counted from the sequence's
// first token, so its bits depend on its own tokens alone: not on the number of warps or the batch.
#include "common/bind.h"
#include "common/dtype.h"
#include "credit/gae.h"
#include "credit/gae_scan.h"

namespace fpg {
namespace {

constexpr int kMaxWarps = 8;

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
  static constexpr bool kUnmasked = kLook == Look::kNothing;
  using Map = Affine<kAll>;

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

  __device__ typename Batch<X, kLook>::Map map(const Tokens& of, int i, int64_t sequence,
                                               Offer next) const {
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

  __device__ typename Batch<X, kLook>::Map map(const Tokens& of, int i, int64_t, Offer from) const {
    return {from.advantage, double(of.grad_advantages.x[i]) + of.grad_returns.x[i]};
  }

  __device__ void write(Out& out, const Tokens& of, int i, int64_t sequence, Offer from,
                        double before, double grad) const {
    const GaeFactors<double> by = this->factors(of, i, sequence);
    const double grad_reward = by.rho * grad;
    const double received = from.value == 0 ? 0.0 : from.value * before;
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
      grad_bootstrap[sequence] = X(from.value == 0 ? 0.0 : from.value * grad);
  }
};

// What the warps of a block tell each other.
template <typename Walk>
struct Exchange {
  Latest<typename Walk::Offer> latest[kMaxWarps];
  typename Walk::Map maps[kMaxWarps];
};

// What a tile hands to the next: offer and value of the last unmasked token.
template <typename Walk>
struct Carry {
  typename Walk::Offer offer;
  double x;

  // After the first `warps` of the block. kFull: each has given an offer.
  template <bool kFull>
  __device__ typename Walk::Offer offer_after(const Exchange<Walk>& all, int warps) const {
    for (int i = warps - 1; i >= 0; --i)
      if (kFull || all.latest[i].given) return all.latest[i].offer;
    return offer;
  }

  // Moves x past all warps; returns what it was before this one.
  __device__ double pass(const Exchange<Walk>& all, int warp, int warps) {
    for (int i = 0; i < warp; ++i) x = all.maps[i](x);
    const double before = x;
    for (int i = warp; i < warps; ++i) x = all.maps[i](x);
    return before;
  }
};

// The four tokens of a lane, in the order of the scan. kFull: none is masked or missing.
template <bool kFull, typename Walk>
struct Lane {
  using Offer = typename Walk::Offer;
  using Map = typename Walk::Map;
  const Walk& walk;
  const typename Walk::Tokens& tokens;
  int64_t sequence;
  Map maps[4];

  template <typename Body>
  __device__ void each(const Body& body) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = Walk::kReverse ? 3 - i : i;
      if (kFull || walk.kept(tokens, at)) body(at);
    }
  }

  __device__ Latest<Offer> latest() const {
    Latest<Offer> out = {{}, false};
    each([&](int i) { out = {walk.offer(tokens, i, sequence), true}; });
    return out;
  }

  __device__ Map fold(Offer offer) {
    Map out = {1.0, 0.0};
    each([&](int i) {
      maps[i] = walk.map(tokens, i, sequence, offer);
      out = maps[i].after(out);
      offer = walk.offer(tokens, i, sequence);
    });
    return out;
  }

  __device__ typename Walk::Out unfold(Offer offer, double x) const {
    typename Walk::Out out = {};
    each([&](int i) {
      const double before = x;
      x = maps[i](x);
      walk.write(out, tokens, i, sequence, offer, before, x);
      offer = walk.offer(tokens, i, sequence);
    });
    return out;
  }
};

// One tile: as many warps as the block has, each with 128 tokens.
template <bool kFull, typename Walk>
__device__ inline typename Walk::Out scan_tile(const Walk& walk, int64_t sequence,
                                               const typename Walk::Tokens& tokens,
                                               Carry<Walk>& carry, Exchange<Walk>& all) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const bool is_last_lane = threadIdx.x % kWarp == kWarp - 1;
  Lane<kFull, Walk> lane = {walk, tokens, sequence, {}};
  Latest<typename Walk::Offer> before;
  const auto latest = latest_of_warp<kFull>(lane.latest(), before);
  if (is_last_lane) all.latest[warp] = latest;
  __syncthreads();
  const auto offer = before.given ? before.offer : carry.template offer_after<kFull>(all, warp);
  const auto next_offer = carry.template offer_after<kFull>(all, warps);
  typename Walk::Map lanes_before;
  const auto map = scan_warp(lane.fold(offer), lanes_before);
  if (is_last_lane) all.maps[warp] = map;
  __syncthreads();
  const double x = lanes_before(carry.pass(all, warp, warps));
  carry.offer = next_offer;
  return lane.unfold(offer, x);
}

template <typename Walk>
__global__ void __launch_bounds__(kMaxWarps* kWarp) gae_kernel(Walk walk) {
  __shared__ Exchange<Walk> all;
  const Sequence sequence = sequence_at(walk.in.sequences(), blockIdx.x);
  const Place<Walk::kReverse> place(sequence.end - sequence.begin);
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const auto load = [&](int tile) {
    return walk.load(sequence.begin + place.first(tile), place.count(tile));
  };
  Carry<Walk> carry = {walk.start(sequence.index), 0.0};
  auto next = load(warp);
  for (int tile = 0; tile < place.tiles; tile += warps) {
    const auto tokens = next;
    next = load(tile + warps + warp);  // on its way while this tile is scanned
    const bool full = Walk::kUnmasked && place.full(tile, warps);
    const auto out = full ? scan_tile<Walk::kUnmasked>(walk, sequence.index, tokens, carry, all)
                          : scan_tile<false>(walk, sequence.index, tokens, carry, all);
    walk.store(out, sequence.begin + place.first(tile + warp), tokens.count);
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
  if (in.sequences().length > INT_MAX)
    throw std::invalid_argument("gae: a sequence of more than 2^31 - 1 tokens");
  const int64_t mean = in.sequences().tokens() / larger<int64_t>(in.sequences().count, 1);
  const int64_t warps = clamp<int64_t>(ceil_div(mean, kWarpTokens), 1, kMaxWarps);
  using Typed = Walk<X, kLook>;
  launch(gae_kernel<Typed>, in.sequences().count, int(warps) * kWarp, stream,
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

void gae(const GaeArguments& in) {
  dispatch<Forward>(in.inputs, in.stream, in.advantages, in.returns);
}

void gae_backward(const GaeBackwardArguments& in) {
  dispatch<Backward>(in.inputs, in.stream, in.grad_advantages, in.grad_returns, in.grad_rewards,
                     in.grad_values, in.grad_bootstrap);
}

FPG_BIND(gae, gae)
FPG_BIND(gae_backward, gae_backward)

}  // namespace
}  // namespace fpg
