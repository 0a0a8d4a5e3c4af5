// Advantages by one reverse affine scan, and its adjoint. The element's maths, and what the page
// fastpg/ops/gae.py hands to the C++ kernel.
#pragma once

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
FPG_HD GaeNext<T> gae_step(GaeNext<T> next, T reward, T value, GaeFactors<T> by) {
  const T delta = by.rho * (reward + by.gamma * next.value - value);
  return {delta + by.trace * next.advantage, value};
}

// The gradient that a token with dL/dA = grad sends to the advantage and the value after it.
template <typename T>
FPG_HD GaeNext<T> gae_adjoint(T grad, GaeFactors<T> by) {
  return {by.trace * grad, by.gamma * (by.rho * grad)};
}

struct GaeInputs {
  Sequences sequences;
  int dtype;                     // of every pointer to void: fp32 or fp64
  const void *rewards, *values;  // [tokens]; values may be null: 0
  const void *gammas, *lams;     // [tokens] or [sequences], or null: gamma, lam
  bool gamma_per_token, lam_per_token;
  double gamma, lam;
  const void *rho, *c;                        // [tokens] or null: 1
  const bool *mask, *terminated, *truncated;  // [tokens] or null
  const void* bootstrap;  // [tokens] if truncated is given, else [sequences]; null: 0
};

// What a loop must look up for each token, so that the usual batches look up nothing else.
enum class Look { kNothing, kMask, kEverything };

inline Look look_of(const GaeInputs& in) {
  if (in.terminated || in.truncated || in.gammas || in.lams || in.rho || in.c)
    return Look::kEverything;
  return in.mask ? Look::kMask : Look::kNothing;
}

void gae(const GaeInputs& in, void* advantages, void* returns);
void gae_backward(const GaeInputs& in, const void* grad_advantages, const void* grad_returns,
                  void* grad_rewards, void* grad_values, void* grad_bootstrap);
void gae(const GaeInputs& in, void* advantages, void* returns, Stream stream);
void gae_backward(const GaeInputs& in, const void* grad_advantages, const void* grad_returns,
                  void* grad_rewards, void* grad_values, void* grad_bootstrap, Stream stream);

}  // namespace fpg
