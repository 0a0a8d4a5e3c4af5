// The distillation loss of a batch of tokens: blocks over the threads, their sums added in order.
#include "loss/distillation_loss.h"

#include <vector>

#include "common/bind.h"
#include "common/dtype.h"
#include "common/parallel.h"

namespace fpg {
namespace {

constexpr int64_t kBlockTokens = 32;
constexpr int64_t kGrain = 8192;  // A thread should have at least so many log-probs.

// What the kept tokens leave of 1. That of the likeliest is subtracted first, by expm1: nothing
// cancels as the tail goes to 0.
template <typename T>
double tail_of(const T* logp, int64_t kept) {
  int64_t likeliest = 0;
  for (int64_t k = 1; k < kept; ++k)
    if (logp[k] > logp[likeliest]) likeliest = k;
  double others = 0;
  for (int64_t k = 0; k < kept; ++k)
    if (k != likeliest) others += exp(double(logp[k]));
  const double tail = -expm1(double(logp[likeliest])) - others;
  return tail < 0 ? 0 : tail;  // a NaN stays one
}

template <typename T>
struct Batch {
  const T *logp, *teacher_logp, *weight;
  int64_t kept;
  Divergence divergence;
  double beta;
  T* coefficient;

  // Writes the coefficients of a token, and adds to the statistics.
  void token(int64_t t, DistillationStats& stats) const {
    const T *const student = logp + t * kept, *const teacher = teacher_logp + t * kept;
    T* const slopes = coefficient + t * kept;
    const double w = weight[t];
    if (w == 0) {
      for (int64_t k = 0; k < kept; ++k) slopes[k] = T(0);
      return;
    }
    const double p_tail = tail_of(student, kept), q_tail = tail_of(teacher, kept);
    const Moving<double> tail =
        divergence_of({p_tail, q_tail, log(p_tail), log(q_tail)}, divergence, beta);
    double value = tail.value;
    for (int64_t k = 0; k < kept; ++k) {
      const double log_p = student[k], log_q = teacher[k], p = exp(log_p);
      const Bucket bucket = {p, exp(log_q), log_p, log_q};
      const Moving<double> term = divergence_of(bucket, divergence, beta);
      value += term.value;
      const double slope = w * (pull_of(bucket, term.slope, divergence) - p * tail.slope);
      slopes[k] = T(log_p == -infinity<double>() ? 0.0 : slope);
    }
    stats.x[DistillationStats::count] += 1;
    stats.x[DistillationStats::loss] += w * value;
    stats.x[DistillationStats::divergence] += value;
    stats.x[DistillationStats::student_tail] += p_tail;
    stats.x[DistillationStats::teacher_tail] += q_tail;
  }
};

void distillation_loss(const DistillationArguments& in) {
  with_compute_dtype(in.inputs.dtype, [&](auto zero) {
    using T = decltype(zero);
    const DistillationInputs& x = in.inputs;
    const Batch<T> batch = {static_cast<const T*>(x.logp),
                            static_cast<const T*>(x.teacher_logp),
                            static_cast<const T*>(x.weight),
                            x.kept_count,
                            x.divergence,
                            x.beta,
                            static_cast<T*>(in.coefficient)};
    const int64_t blocks = ceil_div(x.token_count, kBlockTokens);
    std::vector<DistillationStats> parts(blocks);
    parallel_for(blocks, kGrain / (kBlockTokens * x.kept_count), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t last = smaller((i + 1) * kBlockTokens, x.token_count);
        for (int64_t t = i * kBlockTokens; t < last; ++t) batch.token(t, parts[i]);
      }
    });
    *in.stats = {};
    for (const DistillationStats& part : parts)
      for (int i = 0; i < DistillationStats::kFields; ++i) in.stats->x[i] += part.x[i];
    *static_cast<T*>(in.loss) = T(in.stats->x[DistillationStats::loss]);
  });
}

FPG_BIND(distillation_loss, distillation_loss)
FPG_BIND_STATISTICS(DistillationStats)

}  // namespace
}  // namespace fpg
