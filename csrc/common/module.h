// What both extension modules have: the ops that bound themselves, the names of their fields, and
// those of their statistics.
#pragma once

#include "common/bind.h"
#include "common/statistics.h"

namespace fpg {

inline PyObject* list_of(const std::vector<std::string>& names) {
  PyObject* list = PyList_New(0);
  for (const std::string& name : names) {
    PyObject* text = list == nullptr ? nullptr : PyUnicode_FromString(name.c_str());
    if (text == nullptr || PyList_Append(list, text) != 0) Py_CLEAR(list);
    Py_XDECREF(text);
  }
  return list;
}

// Python's function `fields`: the names of the fields of an op, as a list.
inline PyObject* fields(PyObject*, PyObject* op) {
  const char* name = PyUnicode_AsUTF8AndSize(op, nullptr);
  if (name == nullptr) return nullptr;
  for (const Binding& binding : Binding::all())
    if (std::string(name) == binding.method.ml_name) return list_of(binding.names());
  return PyList_New(0);  // It is none of an extension that is out of date.
}

// The names of each kind of statistics, as a dict of lists.
inline PyObject* statistics() {
  PyObject* kinds = PyDict_New();
  for (const StatisticsNames& each : StatisticsNames::all()) {
    PyObject* text = PyUnicode_FromString(each.names);
    PyObject* names = text == nullptr ? nullptr : PyObject_CallMethod(text, "split", "s", ", ");
    if (names == nullptr || PyDict_SetItemString(kinds, each.kind, names) != 0) Py_CLEAR(kinds);
    Py_XDECREF(text);
    Py_XDECREF(names);
    if (kinds == nullptr) break;
  }
  return kinds;
}

// The module with its ops, and `more` functions; null if Python raised.
inline PyObject* make_module(const char* name, std::vector<PyMethodDef> more = {}) {
  static std::vector<PyMethodDef> functions;  // Python keeps its address, and the definition's.
  for (const Binding& binding : Binding::all()) functions.push_back(binding.method);
  functions.push_back({"fields", fields, METH_O, "The names of the fields of an op."});
  functions.insert(functions.end(), more.begin(), more.end());
  functions.push_back({nullptr, nullptr, 0, nullptr});
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   name,
                                   nullptr,
                                   -1,
                                   functions.data(),
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  PyObject* module = PyModule_Create(&definition);
  PyObject* kinds = module == nullptr ? nullptr : statistics();
  if (kinds == nullptr || PyModule_AddObjectRef(module, "statistics", kinds) != 0) Py_CLEAR(module);
  Py_XDECREF(kinds);
  return module;
}

}  // namespace fpg
