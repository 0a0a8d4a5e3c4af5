// Advantages and returns, and their gradient: several sequences at a time in each thread.
#include "credit/gae.h"

#include "common/bind.h"
#include "common/dtype.h"
#include "common/parallel.h"

namespace fpg {
namespace {

// So many sequences are in flight: each hides the others' latency.
constexpr int kLanes = 4;
// A thread should have at least so many tokens.
constexpr int64_t kGrain = 16384;

// Reads what is known of each token; what is not given has its default.
template <typename X, Look kLook>
struct Tokens {
  const GaeInputs in;
  const X* rewards = static_cast<const X*>(in.rewards);
  const X* values = static_cast<const X*>(in.values);
  const X* gammas = static_cast<const X*>(in.gammas);
  const X* lams = static_cast<const X*>(in.lams);
  const X* bootstrap = static_cast<const X*>(in.bootstrap);
  const X* rhos = static_cast<const X*>(in.rho);
  const X* cs = static_cast<const X*>(in.c);

  static constexpr bool kAll = kLook == Look::kEverything;

  bool kept(int64_t i) const { return kLook == Look::kNothing || !in.mask || in.mask[i]; }
  bool terminated(int64_t i) const { return kAll && in.terminated && in.terminated[i]; }
  bool truncated(int64_t i) const { return kAll && in.truncated && in.truncated[i]; }
  bool cut(int64_t i) const { return terminated(i) || truncated(i); }
  double value(int64_t i) const { return values ? values[i] : 0.0; }
  GaeFactors<double> factors(int64_t sequence, int64_t i) const {
    if (!kAll) return {in.gamma, in.gamma * in.lam, 1.0};
    const double gamma = gammas ? gammas[in.gamma_per_token ? i : sequence] : in.gamma;
    const double lam = lams ? lams[in.lam_per_token ? i : sequence] : in.lam;
    return {gamma, gamma * lam * (cs ? cs[i] : 1.0), rhos ? rhos[i] : 1.0};
  }
};

// Where the walk along one sequence stands.
struct Lane {
  int64_t sequence, token, left;
  GaeNext<double> carry;
};

// Walks the sequences [begin, end), kLanes at a time. A walk starts a lane, moves it by one token
// and finishes it; what one lane does never depends on another.
template <typename Walk>
void interleave(const Walk& walk, int64_t begin, int64_t end) {
  Lane lanes[kLanes];
  int active = 0;
  while (true) {
    while (active < kLanes && begin < end) lanes[active++] = walk.start(begin++);
    if (active < kLanes) break;
    int64_t steps = lanes[0].left;
    for (const Lane& lane : lanes) steps = smaller(steps, lane.left);
    for (int64_t i = 0; i < steps; ++i)
      for (Lane& lane : lanes) walk.step(lane);
    for (int i = kLanes - 1; i >= 0; --i) {
      lanes[i].left -= steps;
      if (lanes[i].left > 0) continue;
      walk.finish(lanes[i]);
      lanes[i] = lanes[--active];
    }
  }
  for (int i = 0; i < active; ++i) {
    for (; lanes[i].left > 0; --lanes[i].left) walk.step(lanes[i]);
    walk.finish(lanes[i]);
  }
}

template <typename Walk>
void run(const Walk& walk, const Sequences& sequences) {
  parallel_for(sequences, kGrain,
               [&](int64_t begin, int64_t end) { interleave(walk, begin, end); });
}

// From the last token to the first.
template <typename X, Look kLook>
struct Forward : Tokens<X, kLook> {
  X* advantages;
  X* returns;

  Forward(const GaeInputs& in, void* advantages, void* returns)
      : Tokens<X, kLook>{in},
        advantages(static_cast<X*>(advantages)),
        returns(static_cast<X*>(returns)) {}

  Lane start(int64_t sequence) const {
    const bool follows = this->bootstrap && !this->in.truncated;
    const int64_t begin = this->in.sequences().begin(sequence);
    const int64_t end = this->in.sequences().end(sequence);
    return {sequence, end - 1, end - begin, {0.0, follows ? this->bootstrap[sequence] : 0.0}};
  }

  void step(Lane& lane) const {
    const int64_t i = lane.token--;
    if (!this->kept(i)) {
      advantages[i] = returns[i] = X(0);
      return;
    }
    if (this->terminated(i)) {
      lane.carry = {0.0, 0.0};
    } else if (this->truncated(i)) {
      lane.carry = {0.0, this->bootstrap[i]};
    }
    const GaeFactors<double> factors = this->factors(lane.sequence, i);
    // A trace of 0 lets nothing through: 0 times an infinite advantage would be NaN.
    if (this->kAll && factors.trace == 0) lane.carry.advantage = 0;
    lane.carry = gae_step(lane.carry, double(this->rewards[i]), this->value(i), factors);
    advantages[i] = X(lane.carry.advantage);
    returns[i] = X(lane.carry.advantage + lane.carry.value);
  }

  void finish(const Lane&) const {}
};

// From the first token to the last; the carry is what the token before sends.
template <typename X, Look kLook>
struct Backward : Tokens<X, kLook> {
  const X* grad_advantages;
  const X* grad_returns;
  X* grad_rewards;
  X* grad_values;
  X* grad_bootstrap;

  Backward(const GaeInputs& in, const void* grad_advantages, const void* grad_returns,
           void* grad_rewards, void* grad_values, void* grad_bootstrap)
      : Tokens<X, kLook>{in},
        grad_advantages(static_cast<const X*>(grad_advantages)),
        grad_returns(static_cast<const X*>(grad_returns)),
        grad_rewards(static_cast<X*>(grad_rewards)),
        grad_values(static_cast<X*>(grad_values)),
        grad_bootstrap(static_cast<X*>(grad_bootstrap)) {}

  Lane start(int64_t sequence) const {
    const int64_t begin = this->in.sequences().begin(sequence);
    const int64_t end = this->in.sequences().end(sequence);
    return {sequence, begin, end - begin, {0.0, 0.0}};
  }

  void write(int64_t i, double reward, double value, double bootstrap) const {
    grad_rewards[i] = X(reward);
    if (this->values) grad_values[i] = X(value);
    if (this->in.truncated) grad_bootstrap[i] = X(bootstrap);
  }

  void step(Lane& lane) const {
    const int64_t i = lane.token++;
    if (!this->kept(i)) return write(i, 0.0, 0.0, 0.0);
    const double grad = double(grad_advantages[i]) + grad_returns[i] + lane.carry.advantage;
    const GaeFactors<double> factors = this->factors(lane.sequence, i);
    const double grad_reward = factors.rho * grad;
    const double grad_value = grad_returns[i] - grad_reward + lane.carry.value;
    lane.carry = gae_adjoint(grad, factors);
    if (this->kAll && factors.trace == 0) lane.carry.advantage = 0;
    const bool reads = this->truncated(i) && !this->terminated(i);
    write(i, grad_reward, grad_value, reads ? lane.carry.value : 0.0);
    if (this->cut(i)) lane.carry = {0.0, 0.0};
  }

  void finish(const Lane& lane) const {
    if (this->bootstrap && !this->in.truncated) grad_bootstrap[lane.sequence] = X(lane.carry.value);
  }
};

template <template <typename, Look> class Walk, typename... Pointers>
void dispatch(const GaeInputs& in, Pointers... pointers) {
  in.sequences().check("gae");
  with_compute_dtype(in.dtype, [&](auto x) {
    using X = decltype(x);
    switch (look_of(in)) {
      case Look::kNothing:
        return run(Walk<X, Look::kNothing>(in, pointers...), in.sequences());
      case Look::kMask:
        return run(Walk<X, Look::kMask>(in, pointers...), in.sequences());
      case Look::kEverything:
        return run(Walk<X, Look::kEverything>(in, pointers...), in.sequences());
    }
  });
}

void gae(const GaeArguments& in) { dispatch<Forward>(in.inputs, in.advantages, in.returns); }

void gae_backward(const GaeBackwardArguments& in) {
  dispatch<Backward>(in.inputs, in.grad_advantages, in.grad_returns, in.grad_rewards,
                     in.grad_values, in.grad_bootstrap);
}

FPG_BIND(gae, gae)
FPG_BIND(gae_backward, gae_backward)

}  // namespace
}  // namespace fpg
