#include "cpu/isa/gemm_fma.hpp"
#include "cpu/isa/vec_avx512.hpp"
#include "cpu/isa/table.hpp"

// 28 of 32 registers hold the result; 16 loads feed 28 multiply-adds
const ito::cpu::Kernels ito::cpu::kAvx512 = Table<GemmFma<Vec512, 14, 2>>::make("avx512");
