#pragma once
#include <pybind11/pybind11.h>

namespace ito {
namespace cuda {
void bind(pybind11::module_ m);
}
namespace emulated {
void bind(pybind11::module_ m);
}
}  // namespace ito
