// How much each token counts in a sum of per-token losses.
#pragma once

#include "common/numbers.h"
#include "common/sequences.h"

namespace fpg {

enum class Reduce : int { kToken = 0, kSequence = 1, kSequenceSum = 2 };

// The weight of an unmasked token: `length` is the number of them in its sequence. Of no tokens in
// the whole step, denom 0, none counts.
FPG_HD float token_weight(double denom, double length, Reduce reduce) {
  if (denom == 0) return 0.f;
  return float(1 / (reduce == Reduce::kSequence ? denom * length : denom));
}

// denom null: the unmasked tokens, or the sequences that have one.
void token_weights(const Sequences& sequences, const bool* mask, const double* denom, Reduce reduce,
                   float* weights);

}  // namespace fpg
