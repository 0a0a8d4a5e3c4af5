// The distillation loss of a range of tokens: vectors over the kept tokens of each.
#include "loss/distillation_loss.h"
#include "simd/lanes.h"
#include "simd/select.h"

namespace fpg {
namespace {

// Reads the log-probs of a token's kept tokens. Lanes beyond them have a probability of 0.
template <typename T>
void read(const T* logp, int64_t kept, int64_t lanes, const Distribution& into) {
  double* __restrict__ const log_p = into.logp;
  double* __restrict__ const p = into.p;
  for (int64_t k = 0; k < kept; ++k) log_p[k] = logp[k];
  for (int64_t k = kept; k < lanes; ++k) log_p[k] = -infinity<double>();
  for (int64_t k = 0; k < lanes; ++k) p[k] = vectorised_exp(log_p[k]);
}

// What the kept tokens leave of 1. That of the likeliest is subtracted first, by expm1: nothing
// cancels as the tail goes to 0. Others may be as likely.
double tail_of(const Distribution& x, int64_t lanes) {
  double most[kKeptLanes];
  double others[kKeptLanes] = {};
  double as_likely[kKeptLanes] = {};
  for (int64_t i = 0; i < kKeptLanes; ++i) most[i] = x.logp[i];
  for (int64_t begin = kKeptLanes; begin < lanes; begin += kKeptLanes) {
#pragma GCC unroll 1
    for (int64_t i = 0; i < kKeptLanes; ++i) most[i] = larger(most[i], x.logp[begin + i]);
  }
  const double largest = fold_max(most);
  for (int64_t begin = 0; begin < lanes; begin += kKeptLanes) {
#pragma GCC unroll 1
    for (int64_t i = 0; i < kKeptLanes; ++i) {
      const bool is_likeliest = x.logp[begin + i] == largest;
      others[i] += select(is_likeliest, 0.0, x.p[begin + i]);
      as_likely[i] += select(is_likeliest, 1.0, 0.0);
    }
  }
  const double rest = fold_sum(others) + (fold_sum(as_likely) - 1) * vectorised_exp(largest);
  const double tail = -expm1(largest) - rest;
  return tail < 0 ? 0 : tail;  // a NaN stays one
}

// Writes the slopes of the kept tokens, and returns the sum of what they add to the divergence.
template <Divergence kKind>
double kept_tokens(const DistillationRoom& room, int64_t lanes, double beta, double tail_slope) {
  const double* const log_p = room.student.logp;
  const double* const p = room.student.p;
  const double* const log_q = room.teacher.logp;
  const double* const q = room.teacher.p;
  double* __restrict__ const slopes = room.slopes;
  double values[kKeptLanes] = {};
  for (int64_t begin = 0; begin < lanes; begin += kKeptLanes) {
#pragma GCC unroll 1
    for (int64_t i = 0; i < kKeptLanes; ++i) {
      const int64_t k = begin + i;
      const Bucket bucket = {p[k], q[k], log_p[k], log_q[k]};
      const Moving<double> term = divergence_of<kKind>(bucket, beta);
      values[i] += term.value;
      const double slope = pull_of<kKind>(bucket, term.slope) - bucket.p * tail_slope;
      slopes[k] = select(bucket.log_p == -infinity<double>(), 0.0, slope);
    }
  }
  return fold_sum(values);
}

template <Divergence kKind, typename T>
void token_loop(const DistillationBatch<T>& batch, int64_t begin, int64_t end,
                const DistillationRoom& room, DistillationStats& stats) {
  const int64_t kept = batch.kept;
  const int64_t lanes = ceil_div(kept, kKeptLanes) * kKeptLanes;
  for (int64_t t = begin; t < end; ++t) {
    T* const coefficient = batch.coefficient + t * kept;
    const double w = batch.weight[t];
    if (w == 0) {
      for (int64_t k = 0; k < kept; ++k) coefficient[k] = T(0);
      continue;
    }
    read(batch.logp + t * kept, kept, lanes, room.student);
    read(batch.teacher_logp + t * kept, kept, lanes, room.teacher);
    const double p_tail = tail_of(room.student, lanes);
    const double q_tail = tail_of(room.teacher, lanes);
    const Bucket bucket = {p_tail, q_tail, log(p_tail), log(q_tail)};
    const Moving<double> tail = divergence_of<kKind>(bucket, batch.beta);
    const double value = tail.value + kept_tokens<kKind>(room, lanes, batch.beta, tail.slope);
    for (int64_t k = 0; k < kept; ++k) coefficient[k] = T(w * room.slopes[k]);
    stats.x[DistillationStats::count] += 1;
    stats.x[DistillationStats::loss] += w * value;
    stats.x[DistillationStats::divergence] += value;
    stats.x[DistillationStats::student_tail] += p_tail;
    stats.x[DistillationStats::teacher_tail] += q_tail;
  }
}

template <typename T>
void tokens(const DistillationBatch<T>& batch, int64_t begin, int64_t end,
            const DistillationRoom& room, DistillationStats& stats) {
  const auto loop =
      batch.divergence == Divergence::kForwardKl   ? token_loop<Divergence::kForwardKl, T>
      : batch.divergence == Divergence::kReverseKl ? token_loop<Divergence::kReverseKl, T>
                                                   : token_loop<Divergence::kJsd, T>;
  loop(batch, begin, end, room, stats);
}

}  // namespace

namespace FPG_ISA {

template <>
const DistillationKernels<float>& table() {
  static constexpr DistillationKernels<float> kernels = {tokens<float>};
  return kernels;
}
template <>
const DistillationKernels<double>& table() {
  static constexpr DistillationKernels<double> kernels = {tokens<double>};
  return kernels;
}

}  // namespace FPG_ISA
}  // namespace fpg
