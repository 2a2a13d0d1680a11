// The Python face of the CPU engine: structs of addresses and sizes. Tensors are checked and kept
// alive by the caller, ito_kernels/similarity/cpu.py.
#include "cpu/bind.hpp"

#include <pybind11/stl.h>

#include "cpu/engine.hpp"
#include "cpu/isa.hpp"
#include "cpu/threads.hpp"

namespace py = pybind11;

namespace ito::cpu {
namespace {

// An address, None for absent.
template <class T>
T* pointer(const py::dict& fields, const char* name) {
  if (!fields.contains(name) || fields[name].is_none()) return nullptr;
  return reinterpret_cast<T*>(fields[name].cast<uintptr_t>());
}

Matrix matrix(const py::tuple& m) {  // (address, rows, width, stride, dtype)
  return {reinterpret_cast<const void*>(m[0].cast<uintptr_t>()), m[1].cast<int64_t>(),
          m[2].cast<int64_t>(), m[3].cast<int64_t>(), m[4].cast<DType>()};
}

Problem problem(const py::dict& f) {
  Problem p;
  p.a = matrix(f["a"]);
  p.b = matrix(f["b"]);
  p.self = f["self"].cast<bool>();
  p.scale = pointer<const float>(f, "scale");
  p.scale_per_row = f["scale_per_row"].cast<bool>();
  p.row_bias = pointer<const float>(f, "row_bias");
  p.col_bias = pointer<const float>(f, "col_bias");
  p.row_ids = pointer<const int64_t>(f, "row_ids");
  p.col_ids = pointer<const int64_t>(f, "col_ids");
  p.positives = f["positives"].cast<Positives>();
  p.exclude_self = f["exclude_self"].cast<bool>();
  p.exclude_positives = f["exclude_positives"].cast<bool>();
  p.diagonal = f["diagonal"].cast<int64_t>();
  p.rows = f["rows"].cast<bool>();
  p.cols = f["cols"].cast<bool>();
  p.hardest = f["hardest"].cast<bool>();
  return p;
}

Stats stats(const py::dict& f) {
  return {{pointer<float>(f, "row_max"), pointer<float>(f, "row_logsum"),
           pointer<float>(f, "row_pos"), pointer<float>(f, "row_neg_max")},
          {pointer<float>(f, "col_max"), pointer<float>(f, "col_logsum"),
           pointer<float>(f, "col_pos"), pointer<float>(f, "col_neg_max")}};
}

Upstream upstream(const py::dict& f) {
  return {pointer<const float>(f, "u"), pointer<const float>(f, "v"),
          pointer<const float>(f, "alpha"), pointer<const float>(f, "beta")};
}

Grads grads(const py::dict& f) {
  return {pointer<void>(f, "a"), pointer<void>(f, "b"), pointer<float>(f, "scale"),
          pointer<float>(f, "row_bias"), pointer<float>(f, "col_bias")};
}

TileCache cache(const py::tuple& c) {  // (address, bytes)
  return {reinterpret_cast<void*>(c[0].cast<uintptr_t>()), c[1].cast<int64_t>()};
}

Run run(const std::string& isa, int threads, const Problem& p) {
  return {&kernels(isa, p.a.dtype), threads};
}

}  // namespace

void bind(py::module_& m) {
  py::enum_<DType>(m, "CpuDType")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16);
  py::enum_<Positives>(m, "CpuPositives")
      .value("none", Positives::kNone)
      .value("linear", Positives::kLinear)
      .value("lse", Positives::kLse);

  using Isa = const std::string&;
  m.def("cpu_forward", [](const py::dict& f, const py::dict& s, const py::tuple& c, Isa isa, int n) {
    const Problem p = problem(f);
    const Stats out = stats(s);
    const TileCache kept = cache(c);
    const Run how = run(isa, n, p);
    const py::gil_scoped_release release;
    logsumexp_forward(p, out, kept, how);
  });
  m.def("cpu_backward", [](const py::dict& f, const py::dict& s, const py::dict& u,
                           const py::dict& g, const py::tuple& c, Isa isa, int n, bool one_pass) {
    const Problem p = problem(f);
    const Stats statistics = stats(s);
    const Upstream up = upstream(u);
    const Grads out = grads(g);
    const TileCache kept = cache(c);
    const Run how = run(isa, n, p);
    const py::gil_scoped_release release;
    (one_pass ? logsumexp_one_pass : logsumexp_backward)(p, statistics, up, out, kept, how);
  });
  m.def("cpu_softplus", [](const py::dict& f, uintptr_t loss, uintptr_t u, const py::dict& g,
                           Isa isa, int n) {
    const Problem p = problem(f);
    const Grads out = grads(g);
    const Run how = run(isa, n, p);
    const py::gil_scoped_release release;
    softplus(p, reinterpret_cast<float*>(loss), reinterpret_cast<const float*>(u), out, how);
  });
  m.def("cpu_describe", [](const py::dict& f, Isa isa, int n) {
    const Problem p = problem(f);
    return describe(p, run(isa, n, p));
  });
  m.def("cpu_instruction_sets", &instruction_sets);
  m.def("gemm_flops", &gemm_flops);
  m.def("cpu_thread_provider", &thread_provider);
  // How many floating-point operations `rounds` of independent multiply-adds are, on each thread:
  // timed by the caller, they are the peak that the products are compared with.
  m.def("cpu_peak", [](int64_t rounds, DType dtype, Isa isa, int n) {
    const Kernels& k = kernels(isa, dtype);
    std::vector<double> operations(n);
    const py::gil_scoped_release release;
    run_parallel(n, [&](int thread) { operations[thread] = k.peak(rounds); });
    double total = 0;
    for (const double x : operations) total += x;
    return total;
  });
}

}  // namespace ito::cpu
