// The Python face of the CPU engine: structs of tensors and numbers. Tensors are checked by the
// caller, ito_kernels/similarity/cpu.py, and live as long as the tuples that they come in.
#include "cpu/bind.hpp"

#include <pybind11/stl.h>

#include <cstdlib>

#include "cpu/engine.hpp"
#include "cpu/isa.hpp"
#include "cpu/keys.hpp"
#include "cpu/threads.hpp"
#include "fields.hpp"

namespace py = pybind11;

namespace ito::cpu {
namespace {

// In the order of `_fields` of cpu.py.
Problem problem(const py::tuple& values) {
  Fields f(values);
  Problem p;
  p.a.dtype = p.b.dtype = f.as<DType>();
  p.a.width = p.b.width = f.number();
  for (Matrix* x : {&p.a, &p.b}) {
    x->data = f.pointer<const void>();
    x->rows = f.number();
    x->stride = f.number();
  }
  p.self = f.as<bool>();
  p.scale_per_row = f.as<bool>();
  p.scale = f.pointer<const float>();
  p.row_bias = f.pointer<const float>();
  p.col_bias = f.pointer<const float>();
  p.row_ids = f.pointer<const int64_t>();
  p.col_ids = f.pointer<const int64_t>();
  p.row_limit = f.pointer<const float>();
  p.positives = f.as<Positives>();
  p.exclude_self = f.as<bool>();
  p.exclude_positives = f.as<bool>();
  p.diagonal = f.number();
  p.rows = f.as<bool>();
  p.cols = f.as<bool>();
  p.hardest = f.as<bool>();
  return p;
}

// The others in the order of their Python namesakes.
Stats stats(const py::tuple& values) {
  Fields f(values);
  Stats s;
  for (SideStats* side : {&s.row, &s.col}) {
    Fields of_side = f.inner();
    if (of_side.done()) continue;  // not wanted
    for (float** x : {&side->max, &side->logsum, &side->pos, &side->neg_max})
      *x = of_side.pointer<float>();
  }
  return s;
}

struct UpstreamWithMemory : Upstream {
  std::vector<float> memory[4];  // of weights that are numbers
};

void read(const py::tuple& values, const Problem& p, UpstreamWithMemory& up) {
  Fields f(values);
  std::vector<float>* memory = up.memory;
  for (auto [side, n] : {std::pair{&up.row, p.a.rows}, {&up.col, p.b.rows}}) {
    Fields of_side = f.inner();
    for (const float** x : {&side->logsum, &side->pos}) *x = of_side.values(n, *memory++);
  }
}

Grads grads(const py::tuple& values) {
  Fields f(values);
  Grads g;
  g.a = f.pointer<void>();
  g.b = f.pointer<void>();
  for (float** x : {&g.scale, &g.row_bias, &g.col_bias}) *x = f.pointer<float>();
  return g;
}

TileCache cache(const py::tuple& values) {  // (memory, bytes)
  Fields f(values);
  TileCache c;
  c.data = f.pointer<void>();
  c.bytes = f.number();
  return c;
}

float* vector(const py::tuple& values) {  // (tensor,)
  return Fields(values).pointer<float>();
}

Run run(int threads, const Problem& p) {
  const char* const isa = std::getenv("ITO_CPU_ISA");  // a lookup in os.environ takes 1 µs
  return {&kernels(isa ? isa : "", p.a.dtype), threads};
}

}  // namespace

void bind(py::module_& m) {
  py::enum_<DType>(m, "CpuDType")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16);
  m.def("cpu_forward", [](const py::tuple& f, const py::tuple& s, const py::tuple& c, int n) {
    const Problem p = problem(f);
    const Stats out = stats(s);
    const TileCache kept = cache(c);
    const Run how = run(n, p);
    const py::gil_scoped_release release;
    logsumexp_forward(p, out, kept, how);
  });
  m.def("cpu_backward", [](const py::tuple& f, const py::tuple& s, const py::tuple& u,
                           const py::tuple& g, const py::tuple& c, int n) {
    const Problem p = problem(f);
    const Stats statistics = stats(s);
    UpstreamWithMemory up;
    read(u, p, up);
    const Grads out = grads(g);
    const TileCache kept = cache(c);
    const Run how = run(n, p);
    const py::gil_scoped_release release;
    logsumexp_backward(p, statistics, up, out, kept, how);
  });
  m.def("cpu_both", [](const py::tuple& f, const py::tuple& s, const py::tuple& u,
                       const py::tuple& g, const py::tuple& total, const py::tuple& c, int n) {
    const Problem p = problem(f);
    const Stats statistics = stats(s);
    UpstreamWithMemory up;
    read(u, p, up);
    const Grads out = grads(g);
    const TileCache kept = cache(c);
    float* const sum = vector(total);
    const Run how = run(n, p);
    const py::gil_scoped_release release;
    logsumexp_both(p, statistics, up, out, sum, kept, how);
  });
  m.def("cpu_softplus", [](const py::tuple& f, const py::tuple& loss, const py::tuple& u,
                           const py::tuple& g, const py::tuple& total, int n) {
    const Problem p = problem(f);
    const Grads out = grads(g);
    std::vector<float> memory;
    const float* const upstream = Fields(u).values(p.a.rows, memory);
    float *const sums = vector(loss), *const sum = vector(total);
    const Run how = run(n, p);
    const py::gil_scoped_release release;
    softplus(p, sums, upstream, out, sum, how);
  });
  m.def("cpu_count_equal", [](const py::tuple& values) {  // ids, n, others, m, counts
    Fields f(values);
    const int64_t* const ids = f.pointer<const int64_t>();
    const int64_t n = f.number();
    const int64_t* const others = f.pointer<const int64_t>();
    const int64_t m = f.number();
    int64_t* const counts = f.pointer<int64_t>();
    const py::gil_scoped_release release;
    count_equal(ids, n, others, m, counts);
  });
  m.def("cpu_describe", [](const py::tuple& f, int n) {
    const Problem p = problem(f);
    return describe(p, run(n, p));
  });
  m.def("cpu_instruction_sets", &instruction_sets);
  m.def("gemm_flops", &gemm_flops);
  m.def("cpu_thread_provider", &thread_provider);
  // How many floating-point operations `rounds` of independent multiply-adds are, on each thread:
  // timed by the caller, they are the peak that the products are compared with.
  m.def("cpu_peak", [](int64_t rounds, DType dtype, const std::string& isa, int n) {
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
