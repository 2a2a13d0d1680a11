#include "cpu/isa/gemm_fma.hpp"
#include "cpu/isa/vec_neon.hpp"
#include "cpu/isa/table.hpp"

// 24 of 32 registers hold the result
const ito::cpu::Kernels ito::cpu::kNeon = Table<GemmFma<VecNeon, 6, 4>>::make("neon");
