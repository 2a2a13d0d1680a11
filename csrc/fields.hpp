// What Python passes to native code: tuples of integers, in the order of a struct's members.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

namespace ito {

// Reads a tuple from left to right; addresses are integers too, 0 for absent.
class Fields {
 public:
  explicit Fields(const pybind11::tuple& values) : values_(values.ptr()) {}
  int64_t number() {
    if (done()) throw std::invalid_argument("too few fields");
    const int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(values_, next_++));
    if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return value;
  }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(number()));
  }
  template <class T>
  T as() {
    return static_cast<T>(number());
  }
  bool done() const { return next_ >= PyTuple_GET_SIZE(values_); }

 private:
  PyObject* values_;
  Py_ssize_t next_ = 0;
};

}  // namespace ito
