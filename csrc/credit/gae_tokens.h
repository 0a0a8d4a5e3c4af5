// What the scans of gae do with a token on a GPU: the forward scan, from the last token to the
// first, and the backward scan, from the first to the last. A lane has four tokens.
#pragma once

#include "credit/gae_scan.h"

namespace fpg {

// What four neighbouring tokens bring besides the numbers that are scanned.
template <typename X>
struct Settings {
  int count;
  Four<bool> mask, terminated, truncated;
  Four<X> gammas, lams, rho, c;
};

// Reads the settings of tokens; what is not given has its default. kWide: of four tokens whose
// numbers are moved by one instruction.
template <typename X, Look kLook>
struct SettingsReader {
  GaeInputs in;
  bool aligned;  // every array, as Four is

  static constexpr bool kAll = kLook == Look::kEverything;
  static constexpr bool kUnmasked = kLook == Look::kNothing;
  using Map = Affine<kAll>;
  // Whether a group is loaded while the one before it is scanned: all options take the registers.
  static constexpr bool kPrefetch = !kAll;
  // So many blocks should fit on a multiprocessor at a time.
  static constexpr int kBlocks = (kAll ? 2 : 3) * sizeof(float) / sizeof(X);

  __device__ bool wide(int64_t first, int count) const {
    return aligned && count == 4 && first % 4 == 0;
  }

  template <bool kWide, typename T = X>
  __device__ static Four<T> four(const void* array, int64_t first, int count, T otherwise = T(0)) {
    const T* x = static_cast<const T*>(array);
    if (x == nullptr) return four_of(otherwise);
    return kWide ? load_whole(x + first) : load_some(x + first, count, otherwise);
  }

  template <bool kWide>
  __device__ Settings<X> settings(int64_t i, int count) const {
    Settings<X> out;
    out.count = count;
    if (kLook != Look::kNothing) out.mask = four<kWide, bool>(in.mask, i, count, true);
    if (!kAll) return out;
    out.terminated = four<kWide, bool>(in.terminated, i, count);
    out.truncated = four<kWide, bool>(in.truncated, i, count);
    if (in.gamma_per_token) out.gammas = four<kWide>(in.gammas, i, count);
    if (in.lam_per_token) out.lams = four<kWide>(in.lams, i, count);
    out.rho = four<kWide>(in.rho, i, count, X(1));
    out.c = four<kWide>(in.c, i, count, X(1));
    return out;
  }

  // Writes some of the four results.
  __device__ void put(X* array, int64_t first, int count, const Four<X>& results) const {
    if (wide(first, count))
      store_whole(array + first, results);
    else
      store_some(array + first, count, results);
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
  X* advantages;
  X* returns;

  static constexpr bool kReverse = true;
  using Message = X;
  struct Tokens : Settings<X> {
    Four<X> rewards, values, bootstrap;
  };
  struct Out {
    Four<X> advantages, returns;
  };

  template <bool kWide>
  __device__ Tokens load(int64_t i, int count) const {
    Tokens out = {this->template settings<kWide>(i, count),
                  this->template four<kWide>(this->in.rewards, i, count),
                  this->template four<kWide>(this->in.values, i, count),
                  {}};
    if (this->kAll && this->in.truncated)
      out.bootstrap = this->template four<kWide>(this->in.bootstrap, i, count);
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
    const bool terminated = this->terminated(tokens, i);
    const bool truncated = this->truncated(tokens, i);
    const double value = terminated ? X(0) : truncated ? tokens.bootstrap.x[i] : next;
    const GaeFactors<double> factors = this->factors(tokens, i, sequence);
    const double reward = tokens.rewards.x[i];
    const double own = tokens.values.x[i];
    return {terminated || truncated ? 0.0 : factors.trace,
            gae_step({0.0, value}, reward, own, factors).advantage};
  }

  __device__ void write(Out& out, const Tokens& tokens, int i, int64_t, Message, double,
                        double advantage) const {
    out.advantages.x[i] = X(advantage);
    out.returns.x[i] = X(advantage + tokens.values.x[i]);
  }

  __device__ void store(const Out& out, int64_t i, int count) const {
    this->put(advantages, i, count, out.advantages);
    this->put(returns, i, count, out.returns);
  }

  __device__ void finish(int64_t, Message, double) const {}
};

// From the first token to the last. The message of a token is what a unit of its gradient sends on.
template <typename X, Look kLook>
struct Backward : SettingsReader<X, kLook> {
  const X* grad_advantages;
  const X* grad_returns;
  X* grad_rewards;
  X* grad_values;
  X* grad_bootstrap;

  static constexpr bool kReverse = false;
  using Message = GaeNext<double>;
  struct Tokens : Settings<X> {
    Four<X> grad_advantages, grad_returns;
  };
  struct Out {
    Four<X> rewards, values, bootstrap;
  };

  template <bool kWide>
  __device__ Tokens load(int64_t i, int count) const {
    return {this->template settings<kWide>(i, count),
            this->template four<kWide>(grad_advantages, i, count),
            this->template four<kWide>(grad_returns, i, count)};
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
    this->put(grad_rewards, i, count, out.rewards);
    if (this->in.values) this->put(grad_values, i, count, out.values);
    if (this->in.truncated) this->put(grad_bootstrap, i, count, out.bootstrap);
  }

  __device__ void finish(int64_t sequence, Message message, double grad) const {
    if (this->in.bootstrap && !this->in.truncated)
      grad_bootstrap[sequence] = X(message.value == 0 ? 0.0 : message.value * grad);
  }
};

}  // namespace fpg
