// The divergence of a student from its teacher at one token, and the arguments of
// fastpg/ops/loss/distillation_loss.py.
#pragma once

#include "common/fields.h"
#include "common/log_ratio.h"
#include "common/statistics.h"
#include "common/stream.h"

namespace fpg {

// The codes of fastpg/ops/loss/distillation_loss.py.
enum class Divergence : int { kForwardKl, kReverseKl, kJsd };

// Sums. The names and their order are those of DistillationStats.FIELDS in Python.
struct DistillationStats {
  FPG_STATISTICS(count, loss, divergence, student_tail, teacher_tail)
};

struct DistillationInputs {
  int dtype;  // of every array
  int64_t token_count, kept_count;
  const void* logp;          // [tokens, kept]
  const void* teacher_logp;  // [tokens, kept]
  const void* weight;        // [tokens]; 0 masks a token
  Divergence divergence;
  double beta;  // of the Jensen-Shannon divergence

  FPG_FIELDS(dtype, token_count, kept_count, logp, teacher_logp, weight, divergence, beta)
};

struct DistillationArguments {
  DistillationInputs inputs;
  void* loss;         // one number
  void* coefficient;  // [tokens, kept], dL/dlogp
  DistillationStats* stats;
  Stream stream;

  FPG_FIELDS(inputs, loss, coefficient, stats, stream)
};

// A bucket: its probability under the student and under the teacher, and their logarithms.
struct Bucket {
  double p, q, log_p, log_q;
};

// log(p / q), within the bound of log-ratios where only one of them is 0.
FPG_HD double finite_log_ratio(double log_p, double log_q) {
  const double d = log_ratio(log_p, log_q);
  return select(abs(d) == infinity<double>(), bounded(d), d);
}

// What a bucket adds to the divergence, and u of the page: the derivative by the log-prob of a
// token is p u of the token, `pull_of`, less p times u of the tail.
template <Divergence kKind>
FPG_HD Moving<double> divergence_of(const Bucket& x, double beta) {
  if constexpr (kKind == Divergence::kForwardKl)
    return {x.q * finite_log_ratio(x.log_q, x.log_p), select(x.p == 0, 0.0, -x.q / x.p)};
  if constexpr (kKind == Divergence::kReverseKl) {
    const double d = finite_log_ratio(x.log_p, x.log_q);
    return {x.p * d, d};
  }
  const double log_m = vectorised_log((1 - beta) * x.p + beta * x.q);
  const double d = finite_log_ratio(x.log_p, log_m);
  const double of_teacher = x.q * finite_log_ratio(x.log_q, log_m);
  return {beta * of_teacher + (1 - beta) * x.p * d, (1 - beta) * d};
}

// p u of a token; of the forward KL, -q, also where p underflows to 0.
template <Divergence kKind>
FPG_HD double pull_of(const Bucket& x, double u) {
  return kKind == Divergence::kForwardKl ? -x.q : x.p * u;
}

template <typename T>
struct DistillationBatch {
  const T* logp;
  const T* teacher_logp;
  const T* weight;
  int64_t kept;
  Divergence divergence;
  double beta;
  T* coefficient;
};

// A distribution over the kept tokens, in double, with room for whole lanes.
struct Distribution {
  double* logp;
  double* p;
};

// What a token needs while it is computed.
struct DistillationRoom {
  Distribution student, teacher;
  double* slopes;  // of the kept tokens
};

constexpr int64_t kKeptLanes = 8;

template <typename T>
struct DistillationKernels {
  // Writes the coefficients of tokens begin to end, and adds to the statistics.
  void (*tokens)(const DistillationBatch<T>& batch, int64_t begin, int64_t end,
                 const DistillationRoom& room, DistillationStats& stats);
};

}  // namespace fpg
