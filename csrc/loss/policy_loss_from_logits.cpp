// The policy loss of rows of logits and its gradient by them: each row comes from memory once.
#include "loss/policy_loss_from_logits.h"

#include "simd/select.h"

namespace fpg {

template <typename T>
void policy_loss_from_logits(const TokenLogprobsInputs& rows, const PolicyTokens<T>& tokens,
                             const PolicyTerms& terms, const RowsOut<T>& rows_out,
                             const PolicyOut<T>& out) {
  const auto& kernel = kernels<PolicyLossKernels<T>>();
  const T entropy_coef = T(options_of(terms).entropy_coef);
  const auto row_loss = [&](int64_t i) {  // a block of one token
    PolicyStats part;
    kernel.policy_block(tokens_from(tokens, i), 1, terms, out.coefficient + i, part.x);
    if (rows_out.grad_entropy) rows_out.grad_entropy[i] = -entropy_coef * tokens.weight[i];
  };
  token_logprobs_and_backward(
      rows, {rows_out.logp, rows_out.entropy, rows_out.row_stats}, row_loss,
      {out.coefficient, rows_out.grad_entropy, rows_out.entropy, rows_out.row_stats},
      rows_out.grad_logits);
  policy_loss_in_blocks(tokens, rows.count, terms,
                        out);  // the same coefficients again, and the sums
}

template void policy_loss_from_logits(const TokenLogprobsInputs&, const PolicyTokens<float>&,
                                      const PolicyTerms&, const RowsOut<float>&,
                                      const PolicyOut<float>&);
template void policy_loss_from_logits(const TokenLogprobsInputs&, const PolicyTokens<double>&,
                                      const PolicyTerms&, const RowsOut<double>&,
                                      const PolicyOut<double>&);

}  // namespace fpg
