// What the two modules share: addresses become pointers, tuples become structs.
#pragma once

#include <pybind11/pybind11.h>

#include "gae.h"

namespace fpg {

using Address = uintptr_t;  // 0: absent

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The fields of GaeInputs.
using GaeTuple =
    std::tuple<int64_t, int64_t, Address, int, Address, Address, Address, Address, bool, bool,
               double, double, Address, Address, Address, Address, Address, Address>;

inline GaeInputs gae_inputs(const GaeTuple& in) {
  const auto [count, length, cu_seqlens, dtype, rewards, values, gammas, lams, gamma_per_token,
              lam_per_token, gamma, lam, rho, c, mask, terminated, truncated, bootstrap] = in;
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
