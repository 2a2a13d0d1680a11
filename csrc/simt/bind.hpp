#pragma once
#include <pybind11/pybind11.h>

namespace simt {

void bind(pybind11::module_ m);

}  // namespace simt
