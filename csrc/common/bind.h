// What the two modules share: addresses become pointers, tuples become structs.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "credit/gae.h"

namespace fpg {

using Address = uintptr_t;  // 0: absent

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Sequences, their length, dtype, whether gamma and lam are per token, gamma, lam, and the tensors
// of the op in the order of its schema.
using GaeTuple =
    std::tuple<int64_t, int64_t, int, bool, bool, double, double, std::array<Address, 11>>;

inline GaeInputs gae_inputs(const GaeTuple& in) {
  const auto& [count, length, dtype, gamma_per_token, lam_per_token, gamma, lam, tensors] = in;
  const auto& [rewards, values, bootstrap, mask, gammas, lams, rho, c, terminated, truncated,
               cu_seqlens] = tensors;
  return {{count, length, at<int32_t>(cu_seqlens)},
          dtype,
          at(rewards),
          at(values),
          at(gammas),
          at(lams),
          gamma_per_token,
          lam_per_token,
          gamma,
          lam,
          at(rho),
          at(c),
          at<bool>(mask),
          at<bool>(terminated),
          at<bool>(truncated),
          at(bootstrap)};
}

}  // namespace fpg
