// Advantages and returns, and their gradient: a block per sequence, which it scans in tiles.
//
//   tokens    t t t t   t t t t  ...  t t t t      four to a lane, 128 to a warp: a tile
//                |         |             |
//                | fold    | fold        | fold    each token is a map x -> b + a x: see Affine
//                v         v             v
//   lanes       f_0       f_1    ...    f_31
//                \__ scan_warp, in a tree __/       gives each lane the maps of those before it
//                             |
//   warps          F_0       F_1   ...             to shared memory, as WarpResults
//                   |         |
//   carry   x ---> F_0 ----> F_1 ---> ... ---> x   in every thread; to the block's next tiles
//                   |         |
//                   | unfold  | unfold             from x before the lane, its four maps again
//                   v         v
//   results   A A A A   A A A A  ...  A A A A
//
// The map of a token needs a number of the unmasked token before it in the scan: its message. In
// the forward scan, which goes from the last token to the first, that is a value; in the backward
// scan it is what a unit of gradient sends on. Messages take the same way: through the lanes of a
// warp by shuffles, from warp to warp through WarpResults, from tiles to tiles in the carry.
//
// Tiles of a warp are counted from the sequence's first token, so its bits depend on its own tokens
// alone: not on the number of warps or the batch.
#include "common/bind.h"
#include "common/dtype.h"
#include "credit/gae.h"
#include "credit/gae_scan.h"

namespace fpg {
namespace {

constexpr int kMaxWarps = 8;

// What four neighbouring tokens bring besides the numbers that are scanned.
template <typename X>
struct Settings {
  int count;
  Four<bool> mask, terminated, truncated;
  Four<X> gammas, lams, rho, c;
};

// Reads the settings of tokens; what is not given has its default.
template <typename X, Look kLook>
struct SettingsReader {
  GaeInputs in;

  static constexpr bool kAll = kLook == Look::kEverything;
  static constexpr bool kUnmasked = kLook == Look::kNothing;
  using Map = Affine<kAll>;

  template <typename T = X>
  __device__ static Four<T> four(const void* array, int64_t first, int count, T otherwise = T(0)) {
    const T* x = static_cast<const T*>(array);
    return load_four(x ? x + first : x, count, otherwise);
  }

  __device__ Settings<X> settings(int64_t i, int count) const {
    Settings<X> out;
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

  __device__ static bool kept(const Settings<X>& settings, int i) {
    return i < settings.count && (kLook == Look::kNothing || settings.mask.x[i]);
  }
  __device__ static bool terminated(const Settings<X>& settings, int i) {
    return kAll && settings.terminated.x[i];
  }
  __device__ static bool truncated(const Settings<X>& settings, int i) {
    return kAll && settings.truncated.x[i];
  }

  // gamma or lam, which is given per token, per sequence, or as one number.
  __device__ static double discount(const void* given, bool per_token, X token_value, double number,
                                    int64_t sequence) {
    if (per_token) return token_value;
    return given ? static_cast<const X*>(given)[sequence] : number;
  }

  __device__ GaeFactors<double> factors(const Settings<X>& settings, int i,
                                        int64_t sequence) const {
    if (!kAll) return {in.gamma, in.gamma * in.lam, 1.0};
    const double gamma =
        discount(in.gammas, in.gamma_per_token, settings.gammas.x[i], in.gamma, sequence);
    const double lam = discount(in.lams, in.lam_per_token, settings.lams.x[i], in.lam, sequence);
    return {gamma, gamma * lam * settings.c.x[i], settings.rho.x[i]};
  }
};

// From the last token to the first. The message of a token is its value, for the token before.
template <typename X, Look kLook>
struct Forward : SettingsReader<X, kLook> {
  X *advantages, *returns;

  static constexpr bool kReverse = true;
  using Message = X;
  struct Tokens : Settings<X> {
    Four<X> rewards, values, bootstrap;
  };
  struct Out {
    Four<X> advantages, returns;
  };

  __device__ Tokens load(int64_t i, int count) const {
    Tokens out = {this->settings(i, count),
                  this->four(this->in.rewards, i, count),
                  this->four(this->in.values, i, count),
                  {}};
    if (this->kAll && this->in.truncated) out.bootstrap = this->four(this->in.bootstrap, i, count);
    return out;
  }

  __device__ Message start(int64_t sequence) const {
    const bool follows = this->in.bootstrap && !this->in.truncated;
    return follows ? static_cast<const X*>(this->in.bootstrap)[sequence] : X(0);
  }

  __device__ Message message(const Tokens& tokens, int i, int64_t) const {
    return tokens.values.x[i];
  }

  __device__ typename SettingsReader<X, kLook>::Map map(const Tokens& tokens, int i,
                                                        int64_t sequence, Message next) const {
    const bool terminated = this->terminated(tokens, i), truncated = this->truncated(tokens, i);
    const double value = terminated ? X(0) : truncated ? tokens.bootstrap.x[i] : next;
    const GaeFactors<double> factors = this->factors(tokens, i, sequence);
    const double reward = tokens.rewards.x[i], own = tokens.values.x[i];
    return {terminated || truncated ? 0.0 : factors.trace,
            gae_step({0.0, value}, reward, own, factors).advantage};
  }

  __device__ void write(Out& out, const Tokens& tokens, int i, int64_t, Message, double,
                        double advantage) const {
    out.advantages.x[i] = X(advantage);
    out.returns.x[i] = X(advantage + tokens.values.x[i]);
  }

  __device__ void store(const Out& out, int64_t i, int count) const {
    store_four(advantages + i, count, out.advantages);
    store_four(returns + i, count, out.returns);
  }

  __device__ void finish(int64_t, Message, double) const {}
};

// From the first token to the last. The message of a token is what a unit of its gradient sends on.
template <typename X, Look kLook>
struct Backward : SettingsReader<X, kLook> {
  const X *grad_advantages, *grad_returns;
  X *grad_rewards, *grad_values, *grad_bootstrap;

  static constexpr bool kReverse = false;
  using Message = GaeNext<double>;
  struct Tokens : Settings<X> {
    Four<X> grad_advantages, grad_returns;
  };
  struct Out {
    Four<X> rewards, values, bootstrap;
  };

  __device__ Tokens load(int64_t i, int count) const {
    return {this->settings(i, count), this->four(grad_advantages, i, count),
            this->four(grad_returns, i, count)};
  }

  __device__ Message start(int64_t) const { return {0.0, 0.0}; }

  __device__ Message message(const Tokens& tokens, int i, int64_t sequence) const {
    if (this->terminated(tokens, i) || this->truncated(tokens, i)) return {0.0, 0.0};
    return gae_adjoint(1.0, this->factors(tokens, i, sequence));
  }

  __device__ typename SettingsReader<X, kLook>::Map map(const Tokens& tokens, int i, int64_t,
                                                        Message message) const {
    return {message.advantage, double(tokens.grad_advantages.x[i]) + tokens.grad_returns.x[i]};
  }

  __device__ void write(Out& out, const Tokens& tokens, int i, int64_t sequence, Message message,
                        double before, double grad) const {
    const GaeFactors<double> factors = this->factors(tokens, i, sequence);
    const double grad_reward = factors.rho * grad;
    const double received = message.value == 0 ? 0.0 : message.value * before;
    const bool reads = this->truncated(tokens, i) && !this->terminated(tokens, i);
    out.rewards.x[i] = X(grad_reward);
    out.values.x[i] = X(tokens.grad_returns.x[i] - grad_reward + received);
    out.bootstrap.x[i] = X(reads ? gae_adjoint(grad, factors).value : 0.0);
  }

  __device__ void store(const Out& out, int64_t i, int count) const {
    store_four(grad_rewards + i, count, out.rewards);
    if (this->in.values) store_four(grad_values + i, count, out.values);
    if (this->in.truncated) store_four(grad_bootstrap + i, count, out.bootstrap);
  }

  __device__ void finish(int64_t sequence, Message message, double grad) const {
    if (this->in.bootstrap && !this->in.truncated)
      grad_bootstrap[sequence] = X(message.value == 0 ? 0.0 : message.value * grad);
  }
};

// What the warps of a block found in their tiles, in shared memory.
template <typename Scan>
struct WarpResults {
  LastMessage<typename Scan::Message> last[kMaxWarps];
  typename Scan::Map maps[kMaxWarps];
};

// What goes from the tiles of a block to its next tiles: the message and the x of the last unmasked
// token.
template <typename Scan>
struct Carry {
  typename Scan::Message message;
  double x;

  // The message after the first `warps` of the block. kFull: each of them has one.
  template <bool kFull>
  __device__ typename Scan::Message message_after(const WarpResults<Scan>& all, int warps) const {
    for (int i = warps - 1; i >= 0; --i)
      if (kFull || all.last[i].given) return all.last[i].message;
    return message;
  }

  // Moves x past all warps; returns what it was before this one.
  __device__ double pass(const WarpResults<Scan>& all, int warp, int warps) {
    for (int i = 0; i < warp; ++i) x = all.maps[i](x);
    const double before = x;
    for (int i = warp; i < warps; ++i) x = all.maps[i](x);
    return before;
  }
};

// The four tokens of a lane, in the order of the scan. kFull: none is masked or missing.
template <bool kFull, typename Scan>
struct Lane {
  using Message = typename Scan::Message;
  using Map = typename Scan::Map;
  const Scan& scan;
  const typename Scan::Tokens& tokens;
  int64_t sequence;
  Map maps[4];

  template <typename Body>
  __device__ void each(const Body& body) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = Scan::kReverse ? 3 - i : i;
      if (kFull || scan.kept(tokens, token)) body(token);
    }
  }

  __device__ LastMessage<Message> last_message() const {
    LastMessage<Message> out = {{}, false};
    each([&](int i) { out = {scan.message(tokens, i, sequence), true}; });
    return out;
  }

  // The maps of the four tokens as one. `message` comes from the token before them.
  __device__ Map fold(Message message) {
    Map out = {1.0, 0.0};
    each([&](int i) {
      maps[i] = scan.map(tokens, i, sequence, message);
      out = maps[i].after(out);
      message = scan.message(tokens, i, sequence);
    });
    return out;
  }

  // The results of the four tokens, from the x before them.
  __device__ typename Scan::Out unfold(Message message, double x) const {
    typename Scan::Out out = {};
    each([&](int i) {
      const double before = x;
      x = maps[i](x);
      scan.write(out, tokens, i, sequence, message, before, x);
      message = scan.message(tokens, i, sequence);
    });
    return out;
  }
};

// One tile: as many warps as the block has, each with 128 tokens.
template <bool kFull, typename Scan>
__device__ inline typename Scan::Out scan_tile(const Scan& scan, int64_t sequence,
                                               const typename Scan::Tokens& tokens,
                                               Carry<Scan>& carry, WarpResults<Scan>& all) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const bool is_last_lane = threadIdx.x % kWarp == kWarp - 1;
  Lane<kFull, Scan> lane = {scan, tokens, sequence, {}};
  LastMessage<typename Scan::Message> before;
  const auto last = last_message_of_warp<kFull>(lane.last_message(), before);
  if (is_last_lane) all.last[warp] = last;
  __syncthreads();
  const auto message =
      before.given ? before.message : carry.template message_after<kFull>(all, warp);
  const auto next_message = carry.template message_after<kFull>(all, warps);
  typename Scan::Map lanes_before;
  const auto map = scan_warp(lane.fold(message), lanes_before);
  if (is_last_lane) all.maps[warp] = map;
  __syncthreads();
  const double x = lanes_before(carry.pass(all, warp, warps));
  carry.message = next_message;
  return lane.unfold(message, x);
}

template <typename Scan>
__global__ void __launch_bounds__(kMaxWarps* kWarp) gae_kernel(Scan scan) {
  __shared__ WarpResults<Scan> all;
  const Sequence sequence = sequence_at(scan.in.sequences(), blockIdx.x);
  const Tiling<Scan::kReverse> tiling(sequence.end - sequence.begin);
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const auto load = [&](int tile) {
    return scan.load(sequence.begin + tiling.first(tile), tiling.count(tile));
  };
  Carry<Scan> carry = {scan.start(sequence.index), 0.0};
  auto next = load(warp);
  for (int tile = 0; tile < tiling.tiles; tile += warps) {
    const auto tokens = next;
    next = load(tile + warps + warp);  // on its way while this tile is scanned
    const bool full = Scan::kUnmasked && tiling.full(tile, warps);
    const auto out = full ? scan_tile<Scan::kUnmasked>(scan, sequence.index, tokens, carry, all)
                          : scan_tile<false>(scan, sequence.index, tokens, carry, all);
    scan.store(out, sequence.begin + tiling.first(tile + warp), tokens.count);
  }
  if (threadIdx.x == 0) scan.finish(sequence.index, carry.message, carry.x);
}

template <typename X>
X* typed(void* array) {
  return static_cast<X*>(array);
}
template <typename X>
const X* typed(const void* array) {
  return static_cast<const X*>(array);
}

template <template <typename, Look> class Scan, typename X, Look kLook, typename... Arrays>
void run(const GaeInputs& in, Stream stream, Arrays... arrays) {
  if (in.sequences().length > INT_MAX)
    throw std::invalid_argument("gae: a sequence of more than 2^31 - 1 tokens");
  const int64_t mean = in.sequences().tokens() / larger<int64_t>(in.sequences().count, 1);
  const int64_t warps = clamp<int64_t>(ceil_div(mean, kWarpTokens), 1, kMaxWarps);
  using Typed = Scan<X, kLook>;
  launch(gae_kernel<Typed>, in.sequences().count, int(warps) * kWarp, stream,
         Typed{{in}, typed<X>(arrays)...});
}

template <template <typename, Look> class Scan, typename... Arrays>
void dispatch(const GaeInputs& in, Stream stream, Arrays... arrays) {
  with_compute_dtype(in.dtype, [&](auto x) {
    using X = decltype(x);
    switch (look_of(in)) {
      case Look::kNothing:
        return run<Scan, X, Look::kNothing>(in, stream, arrays...);
      case Look::kMask:
        return run<Scan, X, Look::kMask>(in, stream, arrays...);
      case Look::kEverything:
        return run<Scan, X, Look::kEverything>(in, stream, arrays...);
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
