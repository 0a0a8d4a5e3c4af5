// How much each token counts in a sum of per-token losses, and the arguments of
// fastpg/ops/weight/token_weights.py.
#pragma once

#include "common/fields.h"
#include "common/numbers.h"
#include "common/sequences.h"
#include "common/stream.h"

namespace fpg {

enum class Reduce : int { kToken, kSequence, kSequenceSum };  // the codes of the page

// The weight of an unmasked token whose sequence has `length` of them. In an empty step, denom 0,
// no token counts.
FPG_HD float token_weight(double denom, double length, Reduce reduce) {
  if (denom == 0) return 0.f;
  return float(1 / (reduce == Reduce::kSequence ? denom * length : denom));
}

struct TokenWeightsInputs {
  int64_t sequence_count, length;
  const bool* mask;           // [tokens]
  const double* denom;        // []; null: the unmasked tokens, or the sequences that have one
  const int32_t* cu_seqlens;  // [sequences + 1]; null: padded
  Reduce reduce;

  FPG_FIELDS(sequence_count, length, mask, denom, cu_seqlens, reduce)

  FPG_METHOD Sequences sequences() const { return {sequence_count, length, cu_seqlens}; }
};

struct TokenWeightsArguments {
  TokenWeightsInputs inputs;
  float* weight;  // [tokens]
  Stream stream;

  FPG_FIELDS(inputs, weight, stream)
};

}  // namespace fpg
