// What a CUDA launch takes besides its tensors, without CUDA's headers.
#pragma once

#include <stdint.h>

#include "common/fields.h"

struct CUstream_st;

namespace fpg {

using Stream = CUstream_st*;  // CUDA's cudaStream_t

// For statistics of all tokens from one launch (cuda_reduce.h).
template <typename Stats>
struct Scratch {
  Stats* parts;      // [blocks]
  int64_t blocks;    // of the launch: each takes kReduceTokens
  unsigned* ticket;  // 0 between the launches

  FPG_FIELDS(parts, blocks, ticket)
};

constexpr int64_t kReduceTokens = 1024;

}  // namespace fpg
