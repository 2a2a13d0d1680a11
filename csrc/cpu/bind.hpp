#pragma once
#include <pybind11/pybind11.h>

namespace ito::cpu {

void bind(pybind11::module_& m);

}  // namespace ito::cpu
