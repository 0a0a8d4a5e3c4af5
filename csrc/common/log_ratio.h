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
  T most;    // the bound of log-ratios
  T beyond;  // the factor of a gradient beyond the bound: 1 holds it, 0 stops it
};

// logp - other at its bound, if it is beyond. It does not move with a log-prob of -inf.
template <typename T>
FPG_HD Moving<T> held_log_ratio(T logp, T other, const LogRatioBound<T>& bound) {
  const T size = abs(logp - other);  // infinite if one of them is, NaN if both are
  const T slope =
      select(size <= bound.most, T(1), select(size < infinity<T>(), bound.beyond, T(0)));
  return {bounded(log_ratio(logp, other), bound.most), slope};
}

// e^d, and its derivative.
template <typename T>
FPG_HD Moving<T> ratio_of(Moving<T> d) {
  const T ratio = exp_excess(d.value).exp;
  return {ratio, ratio * d.slope};
}

}  // namespace fpg
