#include "cpu/isa/amx_emulated.hpp"
#include "cpu/isa/gemm_amx.hpp"
#include "cpu/isa/gemm_split.hpp"
#include "cpu/isa/table.hpp"

// The kernels of AMX, for tests on processors without it.
const ito::cpu::Kernels ito::cpu::kEmulatedBf16 = Table<GemmAmx>::make("amx_emulated");
const ito::cpu::Kernels ito::cpu::kEmulatedFp32 = Table<GemmSplit>::make("amx_emulated");
