#include "cpu/isa/gemm_fma.hpp"
#include "cpu/isa/vec_avx2.hpp"
#include "cpu/isa/table.hpp"

// 12 of 16 registers hold the result
const ito::cpu::Kernels ito::cpu::kAvx2 = Table<GemmFma<Vec256, 6, 2>>::make("avx2");
