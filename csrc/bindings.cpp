// The Python face of the native code: free of torch, so one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/bind.hpp"
#include "cpu/info.hpp"
#include "cuda/bind.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native code of ito_kernels";
  // One more whenever what a call's structures hold changes: ito_kernels/similarity/native.py
  // refuses a module with another number.
  m.attr("interface") = 8;

  m.def("build_info", [] {
    py::dict out;
    out["compiler"] = ITO_COMPILER;
    out["standard"] = static_cast<long>(__cplusplus);
    return out;
  });

  m.def("cpu_info", [] {
    const ito::cpu::Info info = ito::cpu::info();
    py::dict out;
    out["arch"] = info.arch;
    out["features"] = info.features;
    out["logical_cores"] = info.logical_cores;
    out["l1d_bytes"] = info.l1d_bytes;
    out["l2_bytes"] = info.l2_bytes;
    out["l3_bytes"] = info.l3_bytes;
    return out;
  });

  ito::cpu::bind(m);
#ifdef ITO_EMULATOR
  ito::emulated::bind(m.def_submodule("simt", "The CUDA kernels on the emulator"));
#endif
#ifdef ITO_CUDA
  ito::cuda::bind(m.def_submodule("cuda", "The CUDA kernels"));
#endif
}
