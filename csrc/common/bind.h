// How an op's function comes to Python: FPG_BIND(name, function), where `function` takes the op's
// struct of arguments. Python calls it with one value for each field: a tensor, a size, a scalar.
// torch is not linked: a tensor is asked for its address as Python would ask it.
#pragma once

// Only what Python 3.10 promises to keep: one build serves it and every later version.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/fields.h"
#include "common/stream.h"

namespace fpg {

template <typename T, typename = void>
struct HasFields : std::false_type {};
template <typename T>
struct HasFields<T, std::void_t<decltype(std::declval<T&>().fields())>> : std::true_type {};

// Stands for the memory of an empty tensor, which has none: it is there, though never read. A
// tensor with elements has memory, unless it is one of torch's internal ones, or its storage was
// resized.
inline void* memory_of_empty(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("numel");
  static char byte;
  PyObject* count = PyErr_Occurred() ? nullptr : PyObject_CallMethodObjArgs(tensor, name, nullptr);
  if (count == nullptr) return nullptr;
  if (PyLong_AsLongLong(count) > 0)
    PyErr_SetString(PyExc_RuntimeError, "fastpg: a tensor with elements has no memory");
  Py_DECREF(count);
  return &byte;
}

// Reads the fields of a struct, one after another, from Python's values:
//   T*           an output, a contiguous tensor; or None
//   const T*     an input tensor, copied if it is not contiguous; or None
//   Strided      an input tensor as it is
//   numbers      int, float, bool
class FieldReader {
 public:
  explicit FieldReader(PyObject* const* values) : next_(values) {}
  ~FieldReader() {
    for (PyObject* copy : copies_) Py_DECREF(copy);
  }
  FieldReader(const FieldReader&) = delete;

  template <typename T>
  void read(T& field) {
    if constexpr (HasFields<T>::value) {
      std::apply([this](auto&... inner) { (read(inner), ...); }, field.fields());
    } else if constexpr (std::is_same_v<T, Strided>) {
      PyObject* tensor = *next_++;
      field.data = address(tensor);
      if (field.data == nullptr) field.data = memory_of_empty(tensor);
    } else if constexpr (std::is_same_v<T, Stream>) {
      field = static_cast<T>(PyLong_AsVoidPtr(*next_++));
    } else if constexpr (std::is_pointer_v<T>) {
      PyObject* tensor = *next_++;
      using Element = std::remove_pointer_t<T>;
      field = nullptr;
      if (tensor == Py_None) return;
      if constexpr (std::is_const_v<Element>) {
        PyObject* const adjacent = contiguous(tensor);
        field = static_cast<T>(address(adjacent));
        if (field == nullptr) field = static_cast<T>(memory_of_empty(adjacent));
      } else {
        field = static_cast<T>(address(tensor));
      }
    } else if constexpr (std::is_floating_point_v<T>) {
      field = static_cast<T>(PyFloat_AsDouble(*next_++));
    } else {
      field = static_cast<T>(PyLong_AsLongLong(*next_++));
    }
  }

 private:
  // The tensor itself if it is contiguous. A copy lives as long as this reader.
  PyObject* contiguous(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("contiguous");
    PyObject* copy = PyErr_Occurred() ? nullptr : PyObject_CallMethodObjArgs(tensor, name, nullptr);
    if (copy != nullptr) copies_.push_back(copy);
    return copy;
  }

  static void* address(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("data_ptr");
    if (tensor == nullptr || PyErr_Occurred()) return nullptr;
    PyObject* number = PyObject_CallMethodObjArgs(tensor, name, nullptr);
    if (number == nullptr) return nullptr;
    void* data = PyLong_AsVoidPtr(number);
    Py_DECREF(number);
    return data;
  }

  PyObject* const* next_;
  std::vector<PyObject*> copies_;
};

// The names of the fields of a struct, those of a field that is a struct in its place.
template <typename Arguments>
std::vector<std::string> field_names() {
  Arguments arguments{};
  std::vector<std::string> names;
  const char* text = Arguments::kFieldNames;
  const auto add = [&](auto& field) {
    const char* end = text;
    while (*end != '\0' && *end != ',') ++end;
    if constexpr (HasFields<std::remove_reference_t<decltype(field)>>::value) {
      for (std::string& name : field_names<std::remove_reference_t<decltype(field)>>())
        names.push_back(std::move(name));
    } else {
      names.emplace_back(text, end);
    }
    text = *end == ',' ? end + 2 : end;  // a comma and a blank
  };
  std::apply([&](auto&... field) { (add(field), ...); }, arguments.fields());
  return names;
}

// Lets other Python threads run for as long as it lives.
class WithoutInterpreterLock {
 public:
  WithoutInterpreterLock() : state_(PyEval_SaveThread()) {}
  ~WithoutInterpreterLock() { PyEval_RestoreThread(state_); }
  WithoutInterpreterLock(const WithoutInterpreterLock&) = delete;

 private:
  PyThreadState* state_;
};

// An op as Python's method: reads the arguments, runs, and turns C++ exceptions into Python's.
template <typename Arguments, void (*kRun)(const Arguments&)>
PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t count) {
  static const auto expected = static_cast<Py_ssize_t>(field_names<Arguments>().size());
  if (count != expected) {
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
    return nullptr;
  }
  Arguments arguments{};
  FieldReader reader(values);  // It keeps copies alive until the op has run.
  reader.read(arguments);
  if (PyErr_Occurred()) return nullptr;
  try {
    const WithoutInterpreterLock unlocked;
    kRun(arguments);
  } catch (const std::out_of_range& error) {
    PyErr_SetString(PyExc_IndexError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

// Every op of this extension. Each adds itself when the library is loaded.
struct Binding {
  PyMethodDef method;
  std::vector<std::string> (*names)();

  static std::vector<Binding>& all() {
    static std::vector<Binding> bindings;
    return bindings;
  }
};

template <typename Arguments, void (*kRun)(const Arguments&)>
bool bind(const char* name) {
  // CPython casts a method that takes an array of arguments back before it calls it.
  const auto method =
      reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call<Arguments, kRun>));
  Binding::all().push_back({{name, method, METH_FASTCALL, nullptr}, field_names<Arguments>});
  return true;
}

template <typename Arguments>
Arguments arguments_of(void (*)(const Arguments&));

}  // namespace fpg

// Makes `function` the op's kernel in this extension.
#define FPG_BIND(op, function) \
  const bool bound_##op = ::fpg::bind<decltype(::fpg::arguments_of(&function)), &function>(#op);
