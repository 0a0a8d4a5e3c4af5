// The policy loss of rows of logits and its gradient by them: each row comes from memory once.
#include "loss/policy_loss_from_logits.h"

#include <memory>

#include "common/bind.h"
#include "common/dtype.h"
#include "simd/select.h"

namespace fpg {
namespace {

template <typename T>
std::unique_ptr<T[]> array_of(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

template <typename T>
void policy_loss_of_rows(const PolicyLossFromLogitsArguments& in) {
  const auto& kernel = kernels<PolicyLossKernels<T>>();
  const int64_t count = in.rows.count;
  const T entropy_coef = T(options_of(in.terms).entropy_coef);

  // Either the weight or the label masks a token: here both do.
  const auto labels = array_of<int64_t>(count);
  const auto weight = array_of<T>(count);
  for (int64_t i = 0; i < count; ++i) {
    const T w = static_cast<const T*>(in.weight)[i];
    const bool kept = w != T(0) && in.rows.labels[i] != in.rows.ignore_index;
    labels[i] = kept ? in.rows.labels[i] : in.rows.ignore_index;
    weight[i] = kept ? w : T(0);
  }
  TokenLogprobsInputs rows = in.rows;
  rows.labels = labels.get();

  const bool with_entropy = rows.with_entropy;
  const auto logp = array_of<T>(count);
  const auto row_stats = array_of<T>(2 * count);
  const auto coefficient = array_of<T>(count);
  const auto entropy = array_of<T>(count);
  const auto grad_entropy = array_of<T>(count);
  PolicyTokens<T> tokens = {};
  tokens.logp = logp.get();
  tokens.advantages = static_cast<const T*>(in.advantages);
  tokens.weight = weight.get();
  tokens.old_logp = static_cast<const T*>(in.old_logp);
  tokens.ref_logp = static_cast<const T*>(in.ref_logp);
  if (with_entropy) tokens.entropy = entropy.get();
  const LogprobsOut made = {logp.get(), with_entropy ? entropy.get() : nullptr, row_stats.get()};
  const LogprobsGradient gradient = {coefficient.get(), with_entropy ? grad_entropy.get() : nullptr,
                                     made.entropy, row_stats.get()};
  const auto row_loss = [&](int64_t i) {  // a block of one token
    PolicyStats part;
    kernel.policy_block(tokens_from(tokens, i), 1, in.terms, coefficient.get() + i, part.x);
    grad_entropy[i] = -entropy_coef * weight[i];
  };
  token_logprobs_and_backward(rows, made, row_loss, gradient, in.out);
  // The same coefficients again, and the sums.
  policy_loss_in_blocks<T>(tokens, count, in.terms,
                           {static_cast<T*>(in.loss), coefficient.get(), in.stats});
}

void policy_loss_from_logits(const PolicyLossFromLogitsArguments& in) {
  with_float_dtype(in.rows.dtype,
                   [&](auto logit) { policy_loss_of_rows<compute_t<decltype(logit)>>(in); });
}

FPG_BIND(policy_loss_from_logits, policy_loss_from_logits)

}  // namespace
}  // namespace fpg
