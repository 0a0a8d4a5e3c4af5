// Advantages by one reverse affine scan, and its adjoint: the maths of one token, and the arguments
// of fastpg/ops/credit/gae.py.
#pragma once

#include "common/fields.h"
#include "common/numbers.h"
#include "common/sequences.h"
#include "common/stream.h"

namespace fpg {

// What a token learns from the one after it: that one's advantage and value. Where the trace is cut
// the advantage is 0 and the value is what follows: a bootstrap, or 0.
template <typename T>
struct GaeNext {
  T advantage, value;
};

// How a token weighs what it learns: gamma, gamma lam c, and rho.
template <typename T>
struct GaeFactors {
  T gamma, trace, rho;
};

template <typename T>
FPG_HD GaeNext<T> gae_step(GaeNext<T> next, T reward, T value, GaeFactors<T> factors) {
  const T delta = factors.rho * (reward + factors.gamma * next.value - value);
  return {delta + factors.trace * next.advantage, value};
}

// The gradient that a token with dL/dA = grad sends to the advantage and the value after it.
template <typename T>
FPG_HD GaeNext<T> gae_adjoint(T grad, GaeFactors<T> factors) {
  return {factors.trace * grad, factors.gamma * (factors.rho * grad)};
}

struct GaeInputs {
  int dtype;  // of every array of numbers: fp32 or fp64
  int64_t sequence_count, length;
  bool gamma_per_token, lam_per_token;  // else they are per sequence
  const void* rewards;                  // [tokens]
  const void* values;                   // [tokens]; null: 0
  const void* bootstrap;                // [tokens] with truncated, else [sequences]; null: 0
  const bool* mask;                     // [tokens]; null: every token is kept
  const void* gammas;                   // [tokens] or [sequences]; null: gamma for all
  const void* lams;                     // [tokens] or [sequences]; null: lam for all
  const void* rho;                      // [tokens]; null: 1
  const void* c;                        // [tokens]; null: 1
  const bool* terminated;               // [tokens]; null: no token is
  const bool* truncated;                // [tokens]; null: no token is
  const int32_t* cu_seqlens;            // [sequences + 1]; null: padded
  double gamma, lam;

  FPG_FIELDS(dtype, sequence_count, length, gamma_per_token, lam_per_token, rewards, values,
             bootstrap, mask, gammas, lams, rho, c, terminated, truncated, cu_seqlens, gamma, lam)

  FPG_METHOD Sequences sequences() const { return {sequence_count, length, cu_seqlens}; }
};

// A sequence is scanned in groups of so many tokens, counted from its first, by blocks on a GPU.
constexpr int64_t kGroupTokens = 1024;

// For long sequences, which several blocks share on a GPU.
struct GaeScratch {
  void* maps;         // [map_count] of pairs of doubles, a map for each group; null: none is shared
  int64_t map_count;  // tokens / kGroupTokens + sequences

  FPG_FIELDS(maps, map_count)
};

struct GaeArguments {
  GaeInputs inputs;
  void* advantages;  // [tokens]
  void* returns;     // [tokens]
  GaeScratch scratch;
  Stream stream;

  FPG_FIELDS(inputs, advantages, returns, scratch, stream)
};

struct GaeBackwardArguments {
  GaeInputs inputs;
  const void* grad_advantages;  // [tokens]
  const void* grad_returns;     // [tokens]
  void* grad_rewards;           // [tokens]
  void* grad_values;            // like values, if there are any
  void* grad_bootstrap;         // like bootstrap, if there is one
  GaeScratch scratch;
  Stream stream;

  FPG_FIELDS(inputs, grad_advantages, grad_returns, grad_rewards, grad_values, grad_bootstrap,
             scratch, stream)
};

// What a loop must look up for each token, so that the usual batches look up nothing else. Only the
// last also looks for a trace of 0, which lets nothing through, be it infinite.
enum class Look { kNothing, kMask, kEverything };

inline Look look_of(const GaeInputs& in) {
  if (in.gamma * in.lam == 0) return Look::kEverything;
  if (in.terminated || in.truncated || in.gammas || in.lams || in.rho || in.c)
    return Look::kEverything;
  return in.mask ? Look::kMask : Look::kNothing;
}

}  // namespace fpg
