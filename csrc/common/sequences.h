// Which tokens make a sequence: the rows of a padded [B, T], or what cu_seqlens cuts out of [N].
#pragma once

#include <stdint.h>

#include <stdexcept>
#include <string>

#include "common/parallel.h"

namespace fpg {

struct Sequences {
  int64_t count;
  int64_t length;             // tokens of each sequence, or of all of them where packed
  const int32_t* cu_seqlens;  // [count + 1], or null: padded

  int64_t begin(int64_t sequence) const {
    return cu_seqlens ? cu_seqlens[sequence] : sequence * length;
  }
  int64_t end(int64_t sequence) const {
    return cu_seqlens ? cu_seqlens[sequence + 1] : (sequence + 1) * length;
  }
  int64_t tokens() const { return cu_seqlens ? length : count * length; }

  void check(const std::string& op) const {
    for (int64_t i = 0; cu_seqlens && i <= count; ++i) {
      const int64_t low = i == 0 ? 0 : cu_seqlens[i - 1];
      if ((i == 0 && cu_seqlens[0] != 0) || cu_seqlens[i] < low ||
          (i == count && cu_seqlens[i] != length))
        throw std::invalid_argument(
            op + ": cu_seqlens must rise from 0 to N = " + std::to_string(length) + ", got " +
            std::to_string(cu_seqlens[i]) + " at index " + std::to_string(i));
    }
  }
};

// Calls body(begin, end) on ranges of sequences that have about `grain` tokens or more.
template <typename Body>
void parallel_for(const Sequences& sequences, int64_t grain, const Body& body) {
  parallel_for(sequences.count, grain * sequences.count / (sequences.tokens() + 1), body);
}

}  // namespace fpg
