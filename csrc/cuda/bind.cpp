// The Python face of the CUDA kernels and, compiled once more with ITO_SIMT, of the same kernels on
// the emulator: dicts of numbers and (address, elements). Tensors are checked and kept alive by the
// caller, ito_kernels/similarity/cuda.py.
#include "cuda/bind.hpp"

#include "cuda/problem.hpp"
#ifdef ITO_SIMT
#include "simt/bind.hpp"
#endif

namespace py = pybind11;

namespace ito::ITO_GPU {
namespace {

template <class T>
void read(T& to, const py::dict& from, const char* name) {
  to = from[name].cast<T>();
}

template <class T>
void read(Global<T>& to, const py::dict& from, const char* name) {
  const py::object given = from[name];
  if (given.is_none()) return;
  const auto [address, bytes] = given.cast<std::pair<uintptr_t, int64_t>>();
  to = {reinterpret_cast<T*>(address), bytes / static_cast<int64_t>(sizeof(T))};
}

template <class T>
void read_enum(T& to, const py::dict& from, const char* name) {
  to = static_cast<T>(from[name].cast<int>());
}

Side side(const py::dict& from) {
  Side s;
  read(s.features, from, "features");
  read(s.stride, from, "stride");
  read(s.length, from, "length");
  read(s.bias, from, "bias");
  read(s.ids, from, "ids");
  read(s.factors, from, "factors");
  read(s.alpha, from, "alpha");
  read(s.pos, from, "pos");
  return s;
}

Scores scores(const py::dict& from) {
  Scores s;
  s.row = side(from["row"]);
  s.col = side(from["col"]);
  read(s.row_bytes, from, "row_bytes");
  read(s.scale, from, "scale");
  read_enum(s.scale_of, from, "scale_of");
  read_enum(s.positives, from, "positives");
  read(s.exclude_self, from, "exclude_self");
  read(s.exclude_positives, from, "exclude_positives");
  read(s.hardest, from, "hardest");
  read(s.softplus, from, "softplus");
  read(s.positives_matter, from, "positives_matter");
  read(s.diagonal, from, "diagonal");
  return s;
}

Split split(const py::dict& from) {
  Split s;
  read(s.row_tiles, from, "row_tiles");
  read(s.col_tiles, from, "col_tiles");
  read(s.row_groups, from, "row_groups");
  read(s.col_groups, from, "col_groups");
  read(s.triangle, from, "triangle");
  return s;
}

gpu::Stream stream(const py::tuple& given) {  // (address, device)
  return {reinterpret_cast<void*>(given[0].cast<uintptr_t>()), given[1].cast<int>()};
}

}  // namespace

void bind(py::module_ m) {
  py::enum_<Arithmetic>(m, "Arithmetic", py::module_local())
      .value("bf16", Arithmetic::kBf16)
      .value("fp16", Arithmetic::kF16)
      .value("tf32", Arithmetic::kTf32)
      .value("tf32x3", Arithmetic::kTf32x3);
  m.attr("TILE") = kTile;
  m.attr("FIELDS") = kFields;
  m.attr("SLOTS") = kSlots;
  m.attr("WARP_ROWS") = kWarpRows;
  m.attr("WARP_COLS") = kWarpCols;
  m.attr("GRADIENT_WIDTH") = kGradientWidth;
  m.def("unavailable", &unavailable);
  m.def("forward", [](Arithmetic arithmetic, const py::dict& d, const py::tuple& s) {
    Forward p;
    p.scores = scores(d["scores"]);
    p.split = split(d["split"]);
    read(p.row_slots, d, "row_slots");
    read(p.col_slots, d, "col_slots");
    const gpu::Stream queue = stream(s);
    const py::gil_scoped_release release;
    forward(arithmetic, p, queue);
  });
  m.def("merge", [](const py::dict& d, const py::tuple& s) {
    Merge p;
    read(p.slots, d, "slots");
    read(p.length, d, "length");
    read(p.count, d, "count");
    read_enum(p.positives, d, "positives");
    read(p.max, d, "max");
    read(p.logsum, d, "logsum");
    read(p.pos, d, "pos");
    read(p.neg_max, d, "neg_max");
    const gpu::Stream queue = stream(s);
    const py::gil_scoped_release release;
    merge(p, queue);
  });
  m.def("panel", [](Arithmetic arithmetic, const py::dict& d, const py::tuple& s) {
    Panel p;
    p.scores = scores(d["scores"]);
    p.split = split(d["split"]);
    read(p.first_row, d, "first_row");
    read(p.last_row, d, "last_row");
    read(p.first_col, d, "first_col");
    read(p.last_col, d, "last_col");
    read(p.norm, d, "norm");
    read(p.panel, d, "panel");
    read(p.stride, d, "stride");
    read(p.scale_sums, d, "scale_sums");
    read(p.row_sums, d, "row_sums");
    read(p.col_sums, d, "col_sums");
    const gpu::Stream queue = stream(s);
    const py::gil_scoped_release release;
    panel(arithmetic, p, queue);
  });
  m.def("gradient", [](Arithmetic arithmetic, const py::dict& d, const py::tuple& s) {
    Gradient p;
    p.scores = scores(d["scores"]);
    read(p.norm, d, "norm");
    read(p.grad, d, "grad");
    read(p.stride, d, "stride");
    read(p.scale_sums, d, "scale_sums");
    read(p.row_sums, d, "row_sums");
    const gpu::Stream queue = stream(s);
    const py::gil_scoped_release release;
    gradient(arithmetic, p, queue);
  });
#ifdef ITO_SIMT
  simt::bind(m);
#endif
}

}  // namespace ito::ITO_GPU
