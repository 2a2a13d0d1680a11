// What Python passes to native code: tuples, in the order of a struct's members.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace ito {

// Reads a tuple from left to right. What is pointed to is an address, a tensor, which is asked for
// its `data_ptr()`, or None.
class Fields {
 public:
  explicit Fields(const pybind11::tuple& values) : values_(values.ptr()) {}
  int64_t number() {
    return number_of(next());
  }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address_of(next())));
  }
  // n values: a tensor's, or a number n times in `memory`.
  const float* values(int64_t n, std::vector<float>& memory) {
    if (done() || !PyFloat_Check(PyTuple_GET_ITEM(values_, next_))) return pointer<const float>();
    memory.assign(n, static_cast<float>(PyFloat_AS_DOUBLE(next())));
    return memory.data();
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
    return static_cast<T>(number());
  }
  bool done() const { return !values_ || next_ >= PyTuple_GET_SIZE(values_); }

 private:
  Fields() = default;
  PyObject* next() {
    if (done()) throw std::invalid_argument("too few fields");
    return PyTuple_GET_ITEM(values_, next_++);
  }
  static int64_t number_of(PyObject* item) {
    const int64_t value = PyLong_AsLongLong(item);
    if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return value;
  }
  static int64_t address_of(PyObject* item) {
    if (item == Py_None) return 0;
    if (PyLong_Check(item)) return number_of(item);
    static PyObject* const name = PyUnicode_InternFromString("data_ptr");
    const auto address = pybind11::reinterpret_steal<pybind11::object>(
        PyObject_CallMethodObjArgs(item, name, nullptr));
    if (!address) throw pybind11::error_already_set();
    return number_of(address.ptr());
  }

  PyObject* values_ = nullptr;
  Py_ssize_t next_ = 0;
};

}  // namespace ito
