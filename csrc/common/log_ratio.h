// Log-ratios of the log-probs of two policies, as fastpg/ops/common/log_ratio.py has them.
#pragma once

#include "common/elementary.h"

namespace fpg {

constexpr double kMaxLogRatio = 20;  // MAX_LOG_RATIO of fastpg/ops/common/log_ratio.py

// logp - other; 0 where they are equal, as two -inf are. NaN passes through.
template <typename T>
FPG_HD T log_ratio(T logp, T other) {
  return select(logp == other, T(0), logp - other);
}

// x within +-bound. NaN passes through.
template <typename T>
FPG_HD T bounded(T x, T bound = T(kMaxLogRatio)) {
  return select(x > bound, bound, select(x < -bound, -bound, x));
}

// A number of one token, and its derivative by the token's log-prob.
template <typename T>
struct Moving {
  T value, slope;
};

template <typename T>
struct LogRatioBound {
  T most;    // the bound of log-ratios,
  T beyond;  // and the factor of a gradient beyond it: 1 holds it, 0 stops it
};

// The log-ratio d at its bound, if it is beyond.
template <typename T>
FPG_HD Moving<T> held(T d, bool moves, const LogRatioBound<T>& bound) {
  const bool is_beyond = (d > bound.most) | (d < -bound.most);
  return {bounded(d, bound.most), select(moves, select(is_beyond, bound.beyond, T(1)), T(0))};
}

// The same of logp - other. A log-prob of -inf does not move it.
template <typename T>
FPG_HD Moving<T> held_log_ratio(T logp, T other, const LogRatioBound<T>& bound) {
  const bool moves = (logp != -infinity<T>()) & (other != -infinity<T>());
  return held(log_ratio(logp, other), moves, bound);
}

// e^d, and its derivative.
template <typename T>
FPG_HD Moving<T> ratio_of(Moving<T> d) {
  const T ratio = exp_excess(d.value).exp;
  return {ratio, ratio * d.slope};
}

}  // namespace fpg
