// Tensors that Python passes to the CPU engine. Each is checked against the size that the problem
// gives it; a call whose results overlap each other or its inputs is refused. What PyTorch says of
// a tensor (its shape, strides and memory) is believed.
#pragma once
#include <algorithm>
#include <array>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cpu/problem.hpp"
#include "fields.hpp"

namespace ito::cpu {

template <class... Text>
void require(bool condition, const Text&... text) {
  if (condition) return;
  std::ostringstream out;
  (out << ... << text);
  throw std::invalid_argument(out.str());
}

// The tensors of one call: their addresses, and copies of those that the engine cannot read in
// place. It must outlive the call.
class Memory {
 public:
  void add(const char* name, const void* data, int64_t bytes, bool written) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    spans_.at(count_++) = {begin, begin + bytes, name, written};
  }
  void keep(pybind11::object copy) { copies_.push_back(std::move(copy)); }

  // Whatever is written overlaps nothing else.
  void check() {
    std::sort(spans_.begin(), spans_.begin() + count_,
              [](const Span& x, const Span& y) {
                return std::pair(x.begin, x.written) < std::pair(y.begin, y.written);
              });
    const Span *last = nullptr, *last_written = nullptr;  // the ones that end last so far
    for (size_t i = 0; i < count_; ++i) {
      const Span& s = spans_[i];
      const Span* const other = s.written ? last : last_written;
      if (other)
        require(s.begin >= other->end, s.name, " must not overlap ", other->name, " in memory");
      if (!last || s.end > last->end) last = &s;
      if (s.written && (!last_written || s.end > last_written->end)) last_written = &s;
    }
  }

 private:
  struct Span {
    uintptr_t begin, end;
    const char* name;
    bool written;
  };
  std::array<Span, 40> spans_;
  size_t count_ = 0;
  std::vector<pybind11::object> copies_;
};

class Tensors : public Fields {
 public:
  Tensors(const Fields& fields, Memory& memory) : Fields(fields), memory_(memory) {}
  Tensors inner() { return Tensors(Fields::inner(), memory_); }

  // n elements side by side; null where Python has None.
  template <class T>
  const T* input(const char* name, int64_t n) {
    return static_cast<const T*>(vector(name, n, sizeof(T), dtypes().of(T()), false));
  }
  template <class T>
  T* output(const char* name, int64_t n) {
    return static_cast<T*>(vector(name, n, sizeof(T), dtypes().of(T()), true));
  }
  // The memory of a dense matrix.
  void* output(const char* name, const Matrix& like) {
    return vector(name, like.rows * like.width, bytes(like.dtype), dtypes().of(like.dtype), true);
  }
  void end() { require(done(), "too many fields"); }
  // A tensor of n values, or a number n times in `memory`.
  const float* values(const char* name, int64_t n, std::vector<float>& memory) {
    if (!PyFloat_Check(peek())) return input<float>(name, n);
    memory.assign(n, static_cast<float>(PyFloat_AS_DOUBLE(next())));
    return memory.data();
  }
  // Rows whose elements are adjacent.
  Matrix matrix(const char* name) {
    pybind11::object x = pybind11::reinterpret_borrow<pybind11::object>(next());
    if (x.is_none()) return {};
    const auto [rows, width] = two(name, x.attr(names().shape));
    auto [stride, step] = two(name, call(x, names().stride));
    require(rows >= 1 && width >= 1, name, " must have at least one row and one column, got (",
            rows, ", ", width, ")");
    require(rows <= kMostRows && width <= kMostWidth, name,
            " must have fewer than 2^31 rows and 2^24 columns, got (", rows, ", ", width, ")");
    const DType dtype = dtypes().read(name, x);
    const int64_t element = bytes(dtype);
    if ((step != 1 && width > 1) || integer(call(x, names().data_ptr)) % element != 0) {
      x = call(call(x, names().contiguous), names().clone);
      memory_.keep(x);
      stride = width;
    }
    if (rows == 1) stride = width;
    require(stride >= 0 && stride <= kMostElements / rows, name, " has rows ", stride,
            " elements apart");
    const void* const data = address(name, x);
    memory_.add(name, data, ((rows - 1) * stride + width) * element, false);
    return {data, rows, width, stride, dtype};
  }

 private:
  // Rows and columns are counted with 32 bits, and so are the elements of a panel of columns.
  static constexpr int64_t kMostRows = (int64_t(1) << 31) - 1, kMostWidth = (1 << 24) - 1;
  static constexpr int64_t kMostElements = int64_t(1) << 60;

  // Never destroyed: Python may have ended.
  struct Names {
    pybind11::str shape{"shape"}, stride{"stride"}, numel{"numel"}, dtype{"dtype"},
        data_ptr{"data_ptr"}, contiguous{"contiguous"}, clone{"clone"};
  };
  static const Names& names() {
    static const auto* const all = new Names;
    return *all;
  }
  struct Dtypes {
    pybind11::module_ torch = pybind11::module_::import("torch");
    pybind11::object features[3] = {torch.attr("float32"), torch.attr("bfloat16"),
                                    torch.attr("float16")};
    pybind11::object int64 = torch.attr("int64"), uint8 = torch.attr("uint8");

    const pybind11::object& of(float) const { return features[0]; }
    const pybind11::object& of(int64_t) const { return int64; }
    const pybind11::object& of(uint8_t) const { return uint8; }
    const pybind11::object& of(DType dtype) const { return features[static_cast<int>(dtype)]; }
    DType read(const char* name, const pybind11::object& x) const {
      const pybind11::object found = x.attr(names().dtype);
      for (int i = 0; i < 3; ++i)
        if (found.is(features[i])) return static_cast<DType>(i);
      require(false, name, " must be float32, bfloat16 or float16, got ", text(found));
      return {};
    }
  };
  static const Dtypes& dtypes() {
    static const auto* const all = new Dtypes;
    return *all;
  }
  static std::string text(const pybind11::object& x) { return pybind11::str(x); }
  static int64_t bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
  static pybind11::object call(const pybind11::object& x, const pybind11::str& name) {
    auto result = pybind11::reinterpret_steal<pybind11::object>(
        PyObject_CallMethodObjArgs(x.ptr(), name.ptr(), nullptr));
    if (!result) throw pybind11::error_already_set();
    return result;
  }
  static int64_t integer(const pybind11::object& x) { return number_of(x.ptr()); }
  static std::pair<int64_t, int64_t> two(const char* name, const pybind11::object& x) {
    require(PyTuple_Check(x.ptr()) && PyTuple_GET_SIZE(x.ptr()) == 2, name, " must be a matrix");
    return {number_of(PyTuple_GET_ITEM(x.ptr(), 0)), number_of(PyTuple_GET_ITEM(x.ptr(), 1))};
  }
  static void* address(const char* name, const pybind11::object& x) {
    const int64_t at = integer(call(x, names().data_ptr));
    require(at > 0, name, " must have its values in memory");
    return reinterpret_cast<void*>(static_cast<uintptr_t>(at));
  }

  void* vector(const char* name, int64_t n, int64_t element, const pybind11::object& dtype,
               bool written) {
    const auto x = pybind11::reinterpret_borrow<pybind11::object>(next());
    if (x.is_none()) return nullptr;
    const pybind11::object found = x.attr(names().dtype);
    if (!found.is(dtype)) require(false, name, " must be ", text(dtype), ", got ", text(found));
    const int64_t count = integer(call(x, names().numel));
    require(count == n, name, " must have ", n, " elements, got ", count);
    if (n == 0) return nullptr;
    pybind11::object dense = call(x, names().contiguous);
    void* data = address(name, dense);
    if (reinterpret_cast<uintptr_t>(data) % element != 0) {
      dense = call(dense, names().clone);
      data = address(name, dense);
    }
    if (!dense.is(x)) {
      require(!written, name, " must be contiguous and aligned");
      memory_.keep(dense);
    }
    memory_.add(name, data, n * element, written);
    return data;
  }

  Memory& memory_;
};

}  // namespace ito::cpu
