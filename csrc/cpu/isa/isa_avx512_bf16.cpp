#include "cpu/isa/gemm_dpbf16.hpp"
#include "cpu/isa/table.hpp"

const ito::cpu::Kernels ito::cpu::kAvx512Bf16 = Table<GemmDotBf16>::make("avx512_bf16");
