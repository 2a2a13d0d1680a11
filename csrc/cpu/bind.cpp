// The Python face of the CPU engine: structs of tensors and numbers. What would make the engine read
// or write other memory is refused here, with the name of the tensor. That they make sense is
// checked by ito_kernels/similarity/spec.py.
#include "cpu/bind.hpp"

#include <pybind11/stl.h>

#include <cstdlib>

#include "cpu/engine.hpp"
#include "cpu/isa.hpp"
#include "cpu/keys.hpp"
#include "cpu/tensors.hpp"
#include "cpu/threads.hpp"

namespace py = pybind11;

namespace ito::cpu {
namespace {

// In the order of `_fields` of cpu.py.
Problem problem(const py::tuple& values, Memory& memory) {
  Tensors f(Fields(values), memory);
  Problem p;
  p.a = f.matrix("a");
  p.b = f.matrix("b");
  require(p.a.data, "a is missing");
  p.self = !p.b.data;
  if (p.self) p.b = p.a;
  require(p.a.dtype == p.b.dtype, "a and b must have the same dtype");
  const int64_t n = p.a.rows, m = p.b.rows;
  require(p.a.width == p.b.width, "a and b must have the same width, got ", p.a.width, " and ",
          p.b.width);
  p.scale_per_row = f.as<bool>();
  p.scale = f.input<float>("scale", p.scale_per_row ? n : 1);
  require(p.scale, "scale is missing");
  p.row_bias = f.input<float>("row_bias", n);
  p.col_bias = f.input<float>("col_bias", m);
  p.row_ids = f.input<int64_t>("row_ids", n);
  p.col_ids = f.input<int64_t>("col_ids", m);
  require(!p.row_ids == !p.col_ids, "row_ids and col_ids must be given together");
  p.row_limit = f.input<float>("row_limit", n);
  const int64_t positives = f.number();
  require(positives >= 0 && positives <= 2, "positives must be from 0 to 2, got ", positives);
  p.positives = static_cast<Positives>(positives);
  p.exclude_self = f.as<bool>();
  p.exclude_positives = f.as<bool>();
  p.diagonal = f.as<int32_t>();
  p.rows = f.as<bool>();
  p.cols = f.as<bool>();
  p.hardest = f.as<bool>();
  f.end();
  return p;
}

// The others in the order of their Python namesakes.
template <class Read>
Stats stats(const py::tuple& values, const Problem& p, Memory& memory, Read read) {
  Tensors f(Fields(values), memory);
  Stats s;
  const bool positives = p.positives != Positives::kNone;
  for (auto [side, wanted, n] :
       {std::tuple{&s.row, p.rows, p.a.rows}, {&s.col, p.cols, p.b.rows}}) {
    Tensors of_side = f.inner();
    if (of_side.done()) continue;  // not wanted
    side->max = read(of_side, "max", n);
    side->logsum = read(of_side, "logsum", n);
    side->pos = read(of_side, "pos", n);
    side->neg_max = read(of_side, "neg_max", n);
    of_side.end();
    require(wanted, "statistics of a side that the problem does not ask for");
    require(side->max && side->logsum, "max and logsum are missing");
    require(!side->pos || positives, "pos is given, but the problem has no positives");
    require(!side->neg_max || p.hardest, "neg_max is given, but the problem does not ask for it");
  }
  f.end();
  return s;
}
Stats written_stats(const py::tuple& values, const Problem& p, Memory& memory) {
  return stats(values, p, memory, [](Tensors& from, const char* name, int64_t n) {
    return from.output<float>(name, n);
  });
}
Stats read_stats(const py::tuple& values, const Problem& p, Memory& memory) {
  return stats(values, p, memory, [](Tensors& from, const char* name, int64_t n) {
    return const_cast<float*>(from.input<float>(name, n));
  });
}

struct UpstreamWithMemory : Upstream {
  std::vector<float> memory[4];  // of weights that are numbers
};

void read(const py::tuple& values, const Problem& p, Memory& memory, UpstreamWithMemory& up) {
  Tensors f(Fields(values), memory);
  std::vector<float>* numbers = up.memory;
  for (auto [side, wanted, n] :
       {std::tuple{&up.row, p.rows, p.a.rows}, {&up.col, p.cols, p.b.rows}}) {
    Tensors of_side = f.inner();
    if (of_side.done()) continue;
    side->logsum = of_side.values("the weights of logsum", n, *numbers++);
    side->pos = of_side.values("the weights of pos", n, *numbers++);
    of_side.end();
    require(wanted || !(side->logsum || side->pos),
            "weights of a side that the problem does not ask for");
    require(!side->pos || p.positives != Positives::kNone,
            "weights of pos are given, but the problem has no positives");
  }
  f.end();
}

// The statistics that are read are there: of a side with weights, and of a self-similarity both.
void check_complete(const Problem& p, const Stats& s, const Upstream& up) {
  const auto check = [&](bool wanted, const SideStats& stats, const SideUpstream& side,
                         const SideUpstream& other) {
    const bool shared = p.self && wanted;
    const bool pos = side.pos || (shared && other.pos);
    const bool any = pos || side.logsum || (shared && other.logsum);
    require(!any || stats.max, "the statistics of a side with weights are missing");
    require(!pos || stats.pos, "pos of a side with weights is missing");
  };
  check(p.rows, s.row, up.row, up.col);
  check(p.cols, s.col, up.col, up.row);
}

Grads grads(const py::tuple& values, const Problem& p, Memory& memory) {
  Tensors f(Fields(values), memory);
  Grads g;
  g.a = f.output("the gradient of a", p.a);
  g.b = f.output("the gradient of b", p.b);
  require(!g.b || !p.self, "the gradient of b is asked for, but there is no b");
  g.scale = f.output<float>("the gradient of scale", p.scale_per_row ? p.a.rows : 1);
  g.row_bias = f.output<float>("the gradient of row_bias", p.a.rows);
  g.col_bias = f.output<float>("the gradient of col_bias", p.b.rows);
  f.end();
  return g;
}

TileCache cache(const py::tuple& values, Memory& memory, bool may_be_missing = false) {
  Tensors f(Fields(values), memory);
  require(values.size() == 2, "a cache must be (memory, bytes)");
  const int64_t bytes = py::cast<int64_t>(values[1]);
  require(bytes >= 0, "the bytes of a cache must be 0 or more, got ", bytes);
  void* const data = f.output<uint8_t>("the cache", bytes);
  require(data || bytes == 0 || may_be_missing, "the memory of the cache is missing");
  return {data, bytes};
}

float* vector(const char* name, int64_t n, const py::tuple& values, Memory& memory) {  // (tensor,)
  Tensors f(Fields(values), memory);
  float* const out = f.output<float>(name, n);
  f.end();
  return out;
}

// To be called last, when `memory` knows all tensors.
Run run(int threads, const Problem& p, Memory& memory) {
  memory.check();
  require(threads >= 1 && threads <= 4096, "threads must be from 1 to 4096, got ", threads);
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
    Memory memory;
    const Problem p = problem(f, memory);
    const Stats out = written_stats(s, p, memory);
    const TileCache kept = cache(c, memory);
    const Run how = run(n, p, memory);
    const py::gil_scoped_release release;
    logsumexp_forward(p, out, kept, how);
  });
  m.def("cpu_backward", [](const py::tuple& f, const py::tuple& s, const py::tuple& u,
                           const py::tuple& g, const py::tuple& c, int n) {
    Memory memory;
    const Problem p = problem(f, memory);
    const Stats statistics = read_stats(s, p, memory);
    UpstreamWithMemory up;
    read(u, p, memory, up);
    check_complete(p, statistics, up);
    const Grads out = grads(g, p, memory);
    const TileCache kept = cache(c, memory);
    const Run how = run(n, p, memory);
    const py::gil_scoped_release release;
    logsumexp_backward(p, statistics, up, out, kept, how);
  });
  m.def("cpu_both", [](const py::tuple& f, const py::tuple& s, const py::tuple& u,
                       const py::tuple& g, const py::tuple& total, const py::tuple& c, int n) {
    Memory memory;
    const Problem p = problem(f, memory);
    const Stats statistics = written_stats(s, p, memory);
    UpstreamWithMemory up;
    read(u, p, memory, up);
    if (statistics.row.max || statistics.col.max) check_complete(p, statistics, up);
    const Grads out = grads(g, p, memory);
    const TileCache kept = cache(c, memory, true);
    float* const sum = vector("total", 1, total, memory);
    require(sum, "total is missing");
    const Run how = run(n, p, memory);
    const py::gil_scoped_release release;
    logsumexp_both(p, statistics, up, out, sum, kept, how);
  });
  m.def("cpu_softplus", [](const py::tuple& f, const py::tuple& loss, const py::tuple& u,
                           const py::tuple& g, const py::tuple& total, int n) {
    Memory memory;
    const Problem p = problem(f, memory);
    require(!p.exclude_positives && !p.row_limit,
            "softplus takes neither exclude_positives nor row_limit");
    const Grads out = grads(g, p, memory);
    std::vector<float> number;
    Tensors weights(Fields(u), memory);
    const float* const upstream = weights.values("the weights", p.a.rows, number);
    weights.end();
    float* const sums = vector("loss", p.a.rows, loss, memory);
    float* const sum = vector("total", 1, total, memory);
    const Run how = run(n, p, memory);
    const py::gil_scoped_release release;
    softplus(p, sums, upstream, out, sum, how);
  });
  m.def("cpu_count_equal", [](const py::tuple& values) {  // n, m, ids, others, counts
    Memory memory;
    Tensors f(Fields(values), memory);
    const int64_t n = f.number(), m = f.number();
    require(n >= 0 && m >= 0, "lengths must be 0 or more, got ", n, " and ", m);
    const int64_t* const ids = f.input<int64_t>("ids", n);
    const int64_t* const others = f.input<int64_t>("others", m);
    int64_t* const counts = f.output<int64_t>("counts", n);
    require((!n || (ids && counts)) && (!m || others), "ids, others or counts are missing");
    f.end();
    memory.check();
    const py::gil_scoped_release release;
    count_equal(ids, n, others, m, counts);
  });
  m.def("cpu_describe", [](const py::tuple& f, int n) {
    Memory memory;
    const Problem p = problem(f, memory);
    return describe(p, run(n, p, memory));
  });
  m.def("cpu_instruction_sets", &instruction_sets);
  m.def("gemm_flops", &gemm_flops);
  m.def("cpu_thread_provider", &thread_provider);
  // How many floating-point operations `rounds` of independent multiply-adds are, on each thread:
  // timed by the caller, they are the peak that the products are compared with.
  m.def("cpu_peak", [](int64_t rounds, DType dtype, const std::string& isa, int n) {
    const Kernels& k = kernels(isa, dtype);
    require(n >= 1 && n <= 4096, "threads must be from 1 to 4096, got ", n);
    std::vector<double> operations(n);
    const py::gil_scoped_release release;
    run_parallel(n, [&](int thread) { operations[thread] = k.peak(rounds); });
    double total = 0;
    for (const double x : operations) total += x;
    return total;
  });
}

}  // namespace ito::cpu
