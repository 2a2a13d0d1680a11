// The emulator's settings in Python, for tests and benchmarks.
#pragma once
#include <pybind11/pybind11.h>

#include "simt/emulator.hpp"

namespace simt {

inline void bind(pybind11::module_& m) {
  m.def("set_seed", [](uint64_t seed) { settings().seed = seed; });
  m.def("start_trace", [] {
    settings().banks.clear();
    settings().trace = true;
  });
  // {"file:line instruction": (instructions, passes, passes without conflicts)}
  m.def("stop_trace", [] {
    settings().trace = false;
    pybind11::dict out;
    for (const auto& [where, use] : settings().banks)
      out[where.c_str()] = pybind11::make_tuple(use.instructions, use.passes, use.least);
    return out;
  });
}

}  // namespace simt
