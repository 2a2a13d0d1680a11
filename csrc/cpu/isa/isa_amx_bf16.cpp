#include "cpu/isa/gemm_amx.hpp"
#include "cpu/isa/table.hpp"

const ito::cpu::Kernels ito::cpu::kAmxBf16 = Table<GemmAmx>::make("amx_bf16");
