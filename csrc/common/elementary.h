// exp, e^x - 1 - x, tanh, expm1 and log. The float ones of the first three are branch-free
// polynomials, so that a plain loop over them is vectorised for every instruction set, with the
// same error (below 2 ulp) on each.
#pragma once

#include "common/numbers.h"

namespace fpg {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

FPG_HD double exp(double x) { return __builtin_exp(x); }
FPG_HD double expm1(double x) { return __builtin_expm1(x); }
FPG_HD double log(double x) { return __builtin_log(x); }
FPG_HD double log1p(double x) { return __builtin_log1p(x); }
FPG_HD double tanh(double x) { return __builtin_tanh(x); }
FPG_HD double abs(double x) { return __builtin_fabs(x); }
FPG_HD float abs(float x) { return __builtin_fabsf(x); }
FPG_HD float log(float x) { return __builtin_logf(x); }
FPG_HD float log1p(float x) { return __builtin_log1pf(x); }
FPG_HD float expm1(float x) { return __builtin_expm1f(x); }

template <typename T>
struct ExpExcess {
  T exp, excess;
};

// e^x and e^x - 1 - x for |x| <= 87: e^x = s e^r with s = 2^n, n = round(x / ln 2), |r| <= ln(2)/2
// and a minimax polynomial for e^r (Cephes). The excess is s (e^r - 1 - r) + (s r + s - 1 - x):
// where n = 0 the second summand is exactly 0, so that digits are kept as x -> 0; elsewhere less
// than one is lost. A NaN stays one.
FPG_HD ExpExcess<float> exp_excess(float x) {
  constexpr float kRound = 12582912.f + 127.f;  // 1.5 * 2^23 + the exponent's bias
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float s = __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, shifted) << 23);
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float tail = p * (r * r);
  return {s * (tail + r) + s, s * tail + (s * r + (s - 1.f - x))};
}
FPG_HD ExpExcess<double> exp_excess(double x) { return {exp(x), expm1(x) - x}; }

// Below -87.33 the result would be subnormal: it is 0. Above 88.37 it is infinite, a little early.
FPG_HD float exp(float x) {
  const float bounded = exp_excess(clamp(x, -87.33654f, 88.37626f)).exp;
  const float not_below = x < -87.33654f ? 0.f : bounded;
  return x > 88.37626f ? infinity<float>() : not_below;
}

// e^x without a branch or a call, so that a loop over it is vectorised: as exp_excess, with the
// series of e^r up to r^13, whose rest is below 2e-17. Its error is below 1 ulp. Below -708.3 the
// result would be subnormal: it is 0. Above 709.7 it is infinite, a little early.
FPG_HD double vectorised_exp(double x) {
  constexpr double kRound = 0x1.8p52 + 1023.0;  // 1.5 * 2^52 + the exponent's bias
  const double inside = clamp(x, -708.3, 709.7);
  const double shifted = inside * kLog2E + kRound;
  const double n = shifted - kRound;
  const double s = __builtin_bit_cast(double, __builtin_bit_cast(uint64_t, shifted) << 52);
  const double r = (inside - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  double p = 1.0 / 6227020800;
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  const double result = s * (p * (r * r) + r) + s;
  const double not_below = select(x < -708.3, 0.0, result);
  return select(x > 709.7, infinity<double>(), not_below);
}

// log(x) of a finite x >= 0, likewise without a branch or a call: x = 2^n m with m between
// sqrt(1/2) and sqrt(2), and the polynomial of fdlibm for log(m). Its error is below 1 ulp. Of a
// subnormal x it is that of the smallest normal number.
FPG_HD double vectorised_log(double x) {
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  constexpr uint64_t kOne = 0x3ff0000000000000;
  constexpr uint64_t kMantissa = (uint64_t(1) << 52) - 1;
  constexpr uint64_t kTwoTo52 = 0x4330000000000000;
  const double normal = larger(x, 0x1p-1022);
  const uint64_t bits = __builtin_bit_cast(uint64_t, normal) + (kOne - kSqrtHalf);
  const double n = __builtin_bit_cast(double, (bits >> 52) | kTwoTo52) - (0x1p52 + 1023.0);
  const double f = __builtin_bit_cast(double, (bits & kMantissa) + kSqrtHalf) - 1.0;
  const double s = f / (2.0 + f);
  const double z = s * s;
  const double half_square = 0.5 * f * f;
  double p = 1.479819860511658591e-01;
  p = p * z + 1.531383769920937332e-01;
  p = p * z + 1.818357216161805012e-01;
  p = p * z + 2.222219843214978396e-01;
  p = p * z + 2.857142874366239149e-01;
  p = p * z + 3.999999999940941908e-01;
  p = p * z + 6.666666666666735130e-01;
  const double low = s * (half_square + p * z) + n * 0x1.a39ef35793c76p-33;
  const double result = n * 0x1.62e42feep-1 - ((half_square - low) - f);
  const double not_zero = select(x > 0, result, x - x);  // a NaN stays one
  return select(x == 0, -infinity<double>(), not_zero);
}

// Where 2^y rounds to 0, and the smallest argument of exp2.
template <typename T>
FPG_HD T zero_exponent() {
  return sizeof(T) == 4 ? T(-127) : T(-1100);
}

FPG_HD double exp2(double y) { return __builtin_exp2(y); }

// 2^y for -127 <= y <= 127, in as few instructions as the softmax can do with: y = n + f with
// |f| <= 1/2, a minimax polynomial for 2^f, and 2^n from the bits that rounding left. 2^-127 is 0.
FPG_HD float exp2(float y) {
  constexpr float kRound = 12582912.f + 127.f;  // 1.5 * 2^23 + the exponent's bias
  const float shifted = y + kRound;
  const float f = y - (shifted - kRound);
  float p = 0x1.41d334p-13f;
  p = p * f + 0x1.5f456ap-10f;
  p = p * f + 0x1.3b2dbcp-7f;
  p = p * f + 0x1.c6aed4p-5f;
  p = p * f + 0x1.ebfbdap-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.f;
  return p * __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, shifted) << 23);
}

// An odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
FPG_HD float tanh(float x) {
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float near_zero = p * z * x + x;
  const float elsewhere = 1.f - 2.f / (exp(2.f * x) + 1.f);
  return z < 0.390625f ? near_zero : elsewhere;
}

}  // namespace fpg
