// The module fastpg._cuda: as fastpg._C, with a stream first. Nothing waits for the GPU.
#include <array>

#include "common/dtype.h"
#include "common/module.h"
#include "common/sequences.h"
#include "loss/policy_loss.h"

namespace py = pybind11;

namespace fpg {
namespace {

// Address of the parts, their number, address of the ticket.
using ScratchTuple = std::tuple<Address, int64_t, Address>;

template <typename Stats>
Scratch<Stats> scratch(const ScratchTuple& in) {
  const auto [parts, blocks, ticket] = in;
  return {at<Stats>(parts), blocks, at<unsigned>(ticket)};
}

void bind_policy_loss(py::module_& m) {
  m.def("policy_loss", [](Address stream, int dtype, int64_t count, Address logp,
                          Address advantages, Address weight, Address old_logp, Address ratio,
                          Address ref_logp, Address entropy, int surrogate, int kl,
                          const std::array<double, 7>& numbers, Address on_device, Address loss,
                          Address coefficient, Address stats, const ScratchTuple& parts) {
    with_compute_dtype(dtype, [&](auto x) {
      using T = decltype(x);
      policy_loss<T>({at<T>(logp), at<T>(advantages), at<T>(weight), at<T>(old_logp), at<T>(ratio),
                      at<T>(ref_logp), at<T>(entropy)},
                     count,
                     {Surrogate(surrogate), PolicyKl(kl),
                      __builtin_bit_cast(PolicyNumbers, numbers), at<PolicyNumbers>(on_device)},
                     {at<T>(loss), at<T>(coefficient), at<PolicyStats>(stats)},
                     scratch<PolicyStats>(parts), at<CUstream_st>(stream));
    });
  });
  m.def("policy_loss_sequence_ratio",
        [](Address stream, int dtype, int64_t count, int64_t length, Address cu_seqlens,
           Address logp, Address old_logp, Address weight, Address ratio) {
          with_compute_dtype(dtype, [&](auto x) {
            using T = decltype(x);
            policy_loss_sequence_ratio<T>({count, length, at<int32_t>(cu_seqlens)}, at<T>(logp),
                                          at<T>(old_logp), at<T>(weight), at<T>(ratio),
                                          at<CUstream_st>(stream));
          });
        });
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  add_ops(m);
  m.attr("gpus") = FPG_GPUS;
  bind_policy_loss(m);
}

}  // namespace fpg
