// Mean and spread from parts that merge, without the cancellation of E[x^2] - E[x]^2 (Chan).
#pragma once

#include "common/numbers.h"

namespace fpg {

struct Moments {
  double count;
  double mean;
  double m2;  // the sum of (x - mean)^2
};

FPG_HD Moments merge(Moments a, Moments b) {
  if (b.count == 0) return a;
  const double count = a.count + b.count;
  const double d = b.mean - a.mean;
  const double share = b.count / count;
  return {count, a.mean + d * share, a.m2 + b.m2 + d * d * a.count * share};
}

}  // namespace fpg
