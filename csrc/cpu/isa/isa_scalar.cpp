#include "cpu/isa/gemm_fma.hpp"
#include "cpu/isa/vec_scalar.hpp"
#include "cpu/isa/table.hpp"

const ito::cpu::Kernels ito::cpu::kScalar = Table<GemmFma<VecScalar, 3, 4>>::make("scalar");
