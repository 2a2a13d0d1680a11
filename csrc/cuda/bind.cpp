// The Python face of the CUDA kernels and, compiled once more with ITO_SIMT, of the same kernels on
// the emulator. Tensors are checked and kept alive by the caller, ito_kernels/similarity/cuda.py.
#include "cuda/bind.hpp"

#include "cuda/problem.hpp"
#include "fields.hpp"
#ifdef ITO_SIMT
#include "simt/bind.hpp"
#endif

namespace py = pybind11;

namespace ito::ITO_GPU {
namespace {

// Fills the structs of problem.hpp. Members come in the order of
// ito_kernels/similarity/cuda_structs.py.
class Reader {
 public:
  explicit Reader(const py::tuple& values) : fields_(values) {}
  bool done() const { return fields_.done(); }

  void read(Forward& p) { all(p.scores, p.split, p.row_slots, p.col_slots); }
  void read(Merge& p) {
    all(p.slots, p.length, p.count, p.positives, p.biased, p.ids, p.shift, p.out, p.underflowed);
  }
  void read(Fallback& p) { all(p.scores, p.underflowed, p.slots, p.out); }
  void read(Panel& p) {
    all(p.scores, p.split, p.first_row, p.last_row, p.first_col, p.last_col, p.panel, p.stride,
        p.scale_sums, p.row_sums, p.col_sums);
  }
  void read(Gradient& p) { all(p.scores, p.grad, p.stride, p.scale_sums, p.row_sums); }

 private:
  template <class... T>
  void all(T&... to) {
    (read(to), ...);
  }
  template <class T>
  void read(T& to) {  // a number or an enumerator
    to = fields_.as<T>();
  }
  template <class T>
  void read(Global<T>& to) {  // an address and bytes; the last chunk of features may be incomplete
    T* const data = fields_.pointer<T>();
    to = {data, ceil_div(fields_.number(), static_cast<int64_t>(sizeof(T)))};
  }
  void read(SideStats& s) { all(s.max, s.logsum, s.pos, s.neg_max); }
  void read(Side& s) {
    all(s.features, s.stride, s.length, s.bias, s.ids, s.limit, s.weights, s.exact, s.shifts);
  }
  void read(Scores& s) {
    all(s.arithmetic, s.row, s.col, s.row_bytes, s.scale, s.scale_of, s.shift, s.underflowed,
        s.positives, s.exclude_self, s.exclude_positives, s.softplus, s.positives_matter,
        s.diagonal);
  }
  void read(Split& s) {
    all(s.row_tiles, s.col_tiles, s.row_groups, s.col_groups, s.triangle);
  }

  Fields fields_;
};

template <class Parameters>
void define(py::module_& m, const char* name, void (*kernel)(const Parameters&, gpu::Stream)) {
  m.def(name, [kernel](const py::tuple& values, uintptr_t stream, int device) {
    Reader reader(values);
    Parameters p;
    reader.read(p);
    if (!reader.done()) throw std::invalid_argument("too many fields");
    const py::gil_scoped_release release;
    kernel(p, {reinterpret_cast<void*>(stream), device});
  });
}

}  // namespace

void bind(py::module_ m) {
  m.attr("TILE") = kTile;
  m.attr("FIELDS") = static_cast<int>(kFields);
  m.attr("FALLBACK_FIELDS") = kFallbackFields;
  m.attr("SLOTS") = kSlots;
  m.attr("WARP_ROWS") = kWarpRows;
  m.attr("WARP_COLS") = kWarpCols;
  m.attr("GRADIENT_WIDTH") = kGradientWidth;
  m.def("unavailable", &unavailable);
  define(m, "forward", &forward);
  define(m, "merge", &merge);
  define(m, "fallback", &fallback);
  define(m, "panel", &panel);
  define(m, "gradient", &gradient);
#ifdef ITO_SIMT
  simt::bind(m);
#endif
}

}  // namespace ito::ITO_GPU
