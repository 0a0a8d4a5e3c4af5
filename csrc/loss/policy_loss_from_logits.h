// The arguments of fastpg/ops/loss/policy_loss_from_logits.py.
#pragma once

#include "loss/policy_loss.h"
#include "vocabulary/token_logprobs.h"

namespace fpg {

struct PolicyLossFromLogitsArguments {
  TokenLogprobsInputs rows;
  void* out;               // [count, vocab]: dL/dlogits. It may be the logits.
  const void* advantages;  // [count] in the compute type, as the next three
  const void* weight;
  const void* old_logp;  // null: the log-prob itself
  const void* ref_logp;  // null: there is no KL term
  PolicyTerms terms;
  void* loss;  // one number
  PolicyStats* stats;
  Stream stream;

  FPG_FIELDS(rows, out, advantages, weight, old_logp, ref_logp, terms, loss, stats, stream)
};

}  // namespace fpg
