// What Python passes to native code: tuples, in the order of a struct's members.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

namespace ito {

// Reads a tuple from left to right.
class Fields {
 public:
  explicit Fields(const pybind11::tuple& values) : values_(values.ptr()) {}
  int64_t number() {
    return number_of(next());
  }
  template <class T>
  T* pointer() {  // an address
    return reinterpret_cast<T*>(static_cast<uintptr_t>(number_of(next())));
  }
  // Of a struct inside of the struct; empty where that is None.
  Fields inner() {
    PyObject* const item = next();
    if (item == Py_None) return Fields();
    if (!PyTuple_Check(item)) throw std::invalid_argument("a struct must be a tuple");
    return Fields(pybind11::reinterpret_borrow<pybind11::tuple>(item));
  }
  template <class T>
  T as() {
    const int64_t value = number();
    const T out = static_cast<T>(value);
    if (static_cast<int64_t>(out) != value) throw std::invalid_argument("a number is out of range");
    return out;
  }
  bool done() const { return !values_ || next_ >= PyTuple_GET_SIZE(values_); }

 protected:
  PyObject* peek() const {
    if (done()) throw std::invalid_argument("too few fields");
    return PyTuple_GET_ITEM(values_, next_);
  }
  PyObject* next() {
    PyObject* const item = peek();
    ++next_;
    return item;
  }
  static int64_t number_of(PyObject* item) {
    const int64_t value = PyLong_AsLongLong(item);
    if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return value;
  }

 private:
  Fields() = default;

  PyObject* values_ = nullptr;
  Py_ssize_t next_ = 0;
};

}  // namespace ito
