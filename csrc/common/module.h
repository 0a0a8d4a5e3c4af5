// What both extension modules have: the ops that bound themselves, the names of their fields, and
// those of their statistics.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/bind.h"
#include "common/statistics.h"

namespace fpg {

inline void add_ops(pybind11::module_& m) {
  for (Binding& binding : Binding::all())
    m.add_object(binding.method.ml_name, pybind11::reinterpret_steal<pybind11::object>(
                                             PyCFunction_New(&binding.method, nullptr)));
  m.def("fields", [](const std::string& op) {
    for (const Binding& binding : Binding::all())
      if (op == binding.method.ml_name) return binding.names();
    return std::vector<std::string>();  // It is none of an extension that is out of date.
  });
  pybind11::dict statistics;
  for (const StatisticsNames& each : StatisticsNames::all())
    statistics[each.kind] = pybind11::str(each.names).attr("split")(", ");
  m.attr("statistics") = statistics;
}

}  // namespace fpg
