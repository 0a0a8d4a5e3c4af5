// The module fastpg._C: the ops in C++, each bound in its own file, and the choice of their
// instruction set.
#include "common/module.h"
#include "common/parallel.h"
#include "simd/select.h"

namespace fpg {

TorchParallelFor torch_parallel_for = nullptr;

namespace {

PyObject* set_parallel_for(PyObject*, PyObject* address) {
  torch_parallel_for = reinterpret_cast<TorchParallelFor>(PyLong_AsVoidPtr(address));
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

PyObject* instruction_sets(PyObject*, PyObject*) {
  std::vector<std::string> names;
  for (const InstructionSet set : supported_instruction_sets()) names.emplace_back(name_of(set));
  return list_of(names);
}

PyObject* instruction_set(PyObject*, PyObject*) {
  return PyUnicode_FromString(name_of(selected_instruction_set()));
}

PyObject* use_instruction_set(PyObject*, PyObject* name) {
  const char* text = PyUnicode_AsUTF8AndSize(name, nullptr);
  if (text == nullptr) return nullptr;
  if (!select_instruction_set(text))
    return PyErr_Format(PyExc_ValueError, "this machine has no instruction set '%s'", text);
  Py_RETURN_NONE;
}

}  // namespace
}  // namespace fpg

PyMODINIT_FUNC PyInit__C() {
  return fpg::make_module(
      "fastpg._C",
      {{"set_parallel_for", fpg::set_parallel_for, METH_O, "Takes torch_parallel_for's address."},
       {"instruction_sets", fpg::instruction_sets, METH_NOARGS,
        "The instruction sets of this machine, best first."},
       {"instruction_set", fpg::instruction_set, METH_NOARGS, "The one in use."},
       {"use_instruction_set", fpg::use_instruction_set, METH_O, "Chooses one by its name."}});
}
