// The module fastpg._cuda: the ops in CUDA C++, each bound in its own file. Nothing waits for the
// GPU.
#include "common/module.h"

PyMODINIT_FUNC PyInit__cuda() {
  PyObject* module = fpg::make_module("fastpg._cuda");
  if (module != nullptr && PyModule_AddStringConstant(module, "gpus", FPG_GPUS) != 0)
    Py_CLEAR(module);
  return module;
}
