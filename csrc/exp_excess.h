// Floor 0: e^x and e^x - 1 - x from one polynomial, for the log-ratios of the losses: |x| <= 20.
#pragma once

#include "elementary.h"

namespace fpg {

template <typename T>
struct ExpExcess {
  T exp, excess;
};

// As exp(float) of elementary.h, without its ends. Where n = 0, e^x - 1 - x is the tail of the
// polynomial, which keeps its digits as x -> 0; elsewhere the subtraction loses less than a digit.
FPG_HD ExpExcess<float> exp_excess(float x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float tail = p * (r * r);
  const uint32_t exponent = __builtin_bit_cast(uint32_t, shifted) << 23;
  const uint32_t mantissa = __builtin_bit_cast(uint32_t, tail + r + 1.f);
  const float e = __builtin_bit_cast(float, mantissa + exponent);
  return {e, select(n == 0.f, tail, (e - 1.f) - x)};
}

FPG_HD ExpExcess<double> exp_excess(double x) { return {exp(x), expm1(x) - x}; }

}  // namespace fpg
