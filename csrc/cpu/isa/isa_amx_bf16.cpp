#include "cpu/isa/gemm_amx.hpp"
#include "cpu/isa/gemm_split.hpp"
#include "cpu/isa/table.hpp"

const ito::cpu::Kernels ito::cpu::kAmxBf16 = Table<GemmAmx>::make("amx_bf16");
const ito::cpu::Kernels ito::cpu::kAmxFp32 = Table<GemmSplit>::make("amx_bf16");
