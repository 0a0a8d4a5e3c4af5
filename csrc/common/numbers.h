// What every kernel needs of a number. No torch, no CUDA runtime, no SIMD intrinsics.
//
// Host functions are static and always inlined: each instruction set's translation unit must keep
// its own copy, or the linker could pick an AVX-512 one for a machine without AVX-512.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define FPG_HD __host__ __device__ __forceinline__
#define FPG_METHOD __host__ __device__ __forceinline__  // of a class
// Before a function that calls what it is given, be that for the host or for the device.
#define FPG_UNCHECKED_EXECUTION_SPACE _Pragma("nv_exec_check_disable")
#else
#define FPG_HD static inline __attribute__((always_inline))
#define FPG_METHOD inline __attribute__((always_inline))
#define FPG_UNCHECKED_EXECUTION_SPACE
#endif

namespace fpg {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// The type in which a stored type is computed.
template <typename X>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <typename X>
using compute_t = typename Compute<X>::type;

FPG_HD float load(float x) { return x; }
FPG_HD double load(double x) { return x; }
FPG_HD float load(bf16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }

FPG_HD float load(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  // Shifted into place the exponent is 112 too small; the product repairs it, subnormals included.
  const float scaled = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00 ? 0x7f800000u : 0u;  // inf and NaN
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, scaled) | special | sign);
}

FPG_HD void store(float* out, float x) { *out = x; }
FPG_HD void store(double* out, double x) { *out = x; }

// Round to nearest even; a NaN stays a NaN.
FPG_HD void store(bf16* out, float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  out->bits = x == x ? uint16_t(rounded >> 16) : uint16_t(0x7fc0);
}

FPG_HD void store(fp16* out, float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = bits & 0x80000000u;
  const uint32_t magnitude = bits ^ sign;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 lets the float unit shift and round the mantissa of a subnormal half.
  const float nudged = __builtin_bit_cast(float, magnitude) + 0.5f;
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, nudged) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  out->bits = uint16_t((magnitude >= 0x47800000u ? special : finite) | (sign >> 16));
}

FPG_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
FPG_HD T infinity() {
  return T(__builtin_huge_valf());
}
template <typename T>
FPG_HD T smaller(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
FPG_HD T larger(T a, T b) {
  return a < b ? b : a;
}
// a if `first`, else b; with bits, because GCC turns `sum += first ? a : 0` into a branch.
FPG_HD float select(bool first, float a, float b) {
  const uint32_t mask = -uint32_t(first);
  return __builtin_bit_cast(
      float, (__builtin_bit_cast(uint32_t, a) & mask) | (__builtin_bit_cast(uint32_t, b) & ~mask));
}
FPG_HD double select(bool first, double a, double b) {
  const uint64_t mask = -uint64_t(first);
  return __builtin_bit_cast(
      double, (__builtin_bit_cast(uint64_t, a) & mask) | (__builtin_bit_cast(uint64_t, b) & ~mask));
}
template <typename T>
FPG_HD T clamp(T x, T low, T high) {  // NaN passes through
  return x < low ? low : (x > high ? high : x);
}

}  // namespace fpg
