// Which instruction set the kernels use.
#pragma once
#include <string>
#include <vector>

#include "cpu/kernels.hpp"

namespace ito::cpu {

// The instruction sets that this build has and this processor runs, best first.
std::vector<std::string> instruction_sets();

// The kernels for features of `dtype`. `name` forces an instruction set; empty: the best. Throws
// std::invalid_argument for one that is unknown or cannot run here.
const Kernels& kernels(const std::string& name, DType dtype);

}  // namespace ito::cpu
