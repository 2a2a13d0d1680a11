#include "cpu/isa.hpp"

#include <algorithm>
#include <iterator>
#include <stdexcept>

#include "cpu/info.hpp"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ito::cpu {
namespace {

struct Set {
  const char* name;
  std::vector<const char*> needs;  // of the processor
  const Kernels* fp32;             // for features of any dtype, which become fp32
  const Kernels* bf16;             // for bf16 features, if it multiplies those
};

// Best first.
const std::vector<Set>& sets() {
  static const std::vector<Set> all = {
#if defined(ITO_HAVE_AMX_BF16)
      {"amx_bf16", {"avx512_bf16", "fma", "amx_tile", "amx_bf16"}, &kAmxFp32, &kAmxBf16},
#endif
#if defined(ITO_HAVE_AVX512_BF16)
      {"avx512_bf16", {"avx512_bf16", "fma"}, &kAvx512, &kAvx512Bf16},
#endif
#if defined(ITO_HAVE_AVX512)
      {"avx512", {"avx512", "fma"}, &kAvx512, nullptr},
#endif
#if defined(ITO_HAVE_AVX2)
      {"avx2", {"avx2", "fma"}, &kAvx2, nullptr},
#endif
#if defined(ITO_HAVE_NEON)
      {"neon", {"neon"}, &kNeon, nullptr},
#endif
      {"scalar", {}, &kScalar, nullptr},
// For tests. After those that run anywhere: it is never the best.
#if defined(ITO_HAVE_AMX_EMULATED)
      {"amx_emulated", {"avx512_bf16", "fma"}, &kEmulatedFp32, &kEmulatedBf16},
#endif
  };
  return all;
}

// Linux gives a process the tile registers only when it asks for them.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
#else
  return false;
#endif
}

bool runs(const Set& set) {
  static const Info here = info();
  return std::all_of(set.needs.begin(), set.needs.end(), [](const std::string& need) {
    if (need == "amx_tile" && !may_use_tiles()) return false;
    return std::find(here.features.begin(), here.features.end(), need) != here.features.end();
  });
}

const std::vector<Set>& runnable() {
  static const std::vector<Set> found = [] {
    std::vector<Set> out;
    std::copy_if(sets().begin(), sets().end(), std::back_inserter(out), runs);
    return out;
  }();
  return found;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> out;
  for (const Set& set : runnable()) out.push_back(set.name);
  return out;
}

const Kernels& kernels(const std::string& name, DType dtype) {
  std::string known;
  for (const Set& set : runnable()) {
    if (name.empty() || name == set.name)
      return dtype == DType::kBFloat16 && set.bf16 ? *set.bf16 : *set.fp32;
    known += (known.empty() ? "" : ", ") + std::string(set.name);
  }
  throw std::invalid_argument("ITO_CPU_ISA must be one of " + known + ", got " + name);
}

}  // namespace ito::cpu
