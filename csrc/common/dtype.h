// From the dtype code that Python passes (fastpg/_library.py) to a C++ type.
#pragma once

#include <stdexcept>

#include "common/numbers.h"

namespace fpg {

enum class DType : int { kFp32 = 0, kFp64 = 1, kBf16 = 2, kFp16 = 3 };

template <typename F>
void with_float_dtype(int code, const F& f) {
  switch (static_cast<DType>(code)) {
    case DType::kFp32:
      return f(float{});
    case DType::kFp64:
      return f(double{});
    case DType::kBf16:
      return f(bf16{});
    case DType::kFp16:
      return f(fp16{});
  }
  throw std::invalid_argument("fastpg: unknown dtype code");
}

// For ops whose page has already brought every tensor to fp32 or fp64.
template <typename F>
void with_compute_dtype(int code, const F& f) {
  switch (static_cast<DType>(code)) {
    case DType::kFp32:
      return f(float{});
    case DType::kFp64:
      return f(double{});
    default:
      throw std::invalid_argument("fastpg: this kernel takes fp32 or fp64");
  }
}

}  // namespace fpg
