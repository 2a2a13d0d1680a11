// The emulator's settings, for tests and benchmarks.
#include "simt/bind.hpp"

#include <pybind11/stl.h>

#include "simt/emulator.hpp"

namespace py = pybind11;

namespace simt {

void bind(py::module_ m) {
  m.def("set_seed", [](uint64_t seed) { settings().seed = seed; });
  m.def("start_trace", [] {
    settings().banks.clear();
    settings().trace = true;
  });
  // {"file:line instruction": (instructions, passes, passes without conflicts)}
  m.def("stop_trace", [] {
    settings().trace = false;
    py::dict out;
    for (const auto& [where, use] : settings().banks)
      out[where.c_str()] = py::make_tuple(use.instructions, use.passes, use.least);
    return out;
  });
}

}  // namespace simt
