// The module fastpg._cuda: the ops in CUDA C++, each bound in its own file. Nothing waits for the
// GPU.
#include "common/module.h"

PYBIND11_MODULE(_cuda, m) {
  fpg::add_ops(m);
  m.attr("gpus") = FPG_GPUS;
}
