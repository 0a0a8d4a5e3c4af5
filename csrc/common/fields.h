// The arguments of an op: a struct that names its fields once, in the order in which Python passes
// them (fastpg/_op.py compares the names with those of its records).
#pragma once

#include <tuple>

// Inside a struct: FPG_FIELDS(dtype, count, logp). A field may be a struct that has fields itself.
#define FPG_FIELDS(...)                                    \
  static constexpr const char* kFieldNames = #__VA_ARGS__; \
  auto fields() { return std::tie(__VA_ARGS__); }

namespace fpg {

// The memory of a tensor that is taken as it lies: its kernel knows its strides.
struct Strided {
  const void* data;
};

}  // namespace fpg
