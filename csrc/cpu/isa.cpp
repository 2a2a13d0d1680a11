#include "cpu/isa.hpp"

#include <algorithm>
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
#if defined(__x86_64__)
      {"avx512", {"avx512", "fma"}, &kAvx512, nullptr},
      {"avx2", {"avx2", "fma"}, &kAvx2, nullptr},
#elif defined(__aarch64__)
      {"neon", {"neon"}, &kNeon, nullptr},
#endif
      {"scalar", {}, &kScalar, nullptr},
  };
  return all;
}

bool runs(const Set& set) {
  static const Info here = info();
  return std::all_of(set.needs.begin(), set.needs.end(), [](const char* need) {
    return std::find(here.features.begin(), here.features.end(), need) != here.features.end();
  });
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> out;
  for (const Set& set : sets())
    if (runs(set)) out.push_back(set.name);
  return out;
}

const Kernels& kernels(const std::string& name, DType dtype) {
  std::string known;
  for (const Set& set : sets()) {
    if (runs(set) && (name.empty() || name == set.name))
      return dtype == DType::kBFloat16 && set.bf16 ? *set.bf16 : *set.fp32;
    if (runs(set)) known += (known.empty() ? "" : ", ") + std::string(set.name);
  }
  throw std::invalid_argument("ITO_CPU_ISA must be one of " + known + ", got " + name);
}

}  // namespace ito::cpu
