#include "cpu/info.hpp"

#include <fstream>
#include <string>
#include <thread>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sched.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace ito::cpu {
namespace {

#if defined(__x86_64__)
// The OS must save a register file before its instructions may be used: XCR0 says which it does.
unsigned long long xcr0() {
  unsigned lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<unsigned long long>(hi) << 32) | lo;
}

std::vector<std::string> features() {
  std::vector<std::string> out;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return out;
  const bool osxsave = c >> 27 & 1, avx = c >> 28 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
  if (!osxsave || !avx) return out;
  const unsigned long long os = xcr0();
  constexpr unsigned long long kYmm = 0x6, kZmm = 0xe6, kTile = 0x60000;
  unsigned a7 = 0, b7 = 0, c7 = 0, d7 = 0;
  if (!__get_cpuid_count(7, 0, &a7, &b7, &c7, &d7)) return out;
  unsigned a71 = 0, b71 = 0, c71 = 0, d71 = 0;
  if (a7 >= 1) __get_cpuid_count(7, 1, &a71, &b71, &c71, &d71);

  if ((os & kYmm) == kYmm) {
    if (b7 >> 5 & 1) out.push_back("avx2");
    if (fma) out.push_back("fma");
    if (f16c) out.push_back("f16c");
  }
  if ((os & kZmm) == kZmm) {
    const bool f = b7 >> 16 & 1, dq = b7 >> 17 & 1, bw = b7 >> 30 & 1, vl = b7 >> 31 & 1;
    if (f && dq && bw && vl) {
      out.push_back("avx512");
      if (a71 >> 5 & 1) out.push_back("avx512_bf16");
      if (d7 >> 23 & 1) out.push_back("avx512_fp16");
    }
  }
  if ((os & kTile) == kTile) {
    if (d7 >> 24 & 1) out.push_back("amx_tile");
    if (d7 >> 22 & 1) out.push_back("amx_bf16");
  }
  return out;
}
#elif defined(__aarch64__)
std::vector<std::string> features() {
  std::vector<std::string> out{"neon"};  // part of the base architecture
#if defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16
  if (getauxval(AT_HWCAP2) & kBf16) out.push_back("bf16");
#endif
  return out;
}
#else
std::vector<std::string> features() { return {}; }
#endif

int logical_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

#if defined(__linux__)
// The size of one cache, from sysfs. glibc's sysconf adds up the L3 caches of some AMD processors:
// it reports 320 MiB where each is 32.
long cache(int level) {
  cpu_set_t set;
  int cpu = 0;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    while (cpu < CPU_SETSIZE - 1 && !CPU_ISSET(cpu, &set)) ++cpu;
  const std::string folder = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/cache/index";
  for (int index = 0;; ++index) {
    std::string type;
    int found = 0;
    long kib = 0;
    std::ifstream(folder + std::to_string(index) + "/level") >> found;
    std::ifstream(folder + std::to_string(index) + "/type") >> type;
    std::ifstream(folder + std::to_string(index) + "/size") >> kib;  // as "32768K"
    if (found == 0) return 0;
    if (found == level && type != "Instruction") return kib << 10;
  }
}
#elif defined(__APPLE__)
long cache(int level) {
  const char* names[] = {"hw.l1dcachesize", "hw.l2cachesize", "hw.l3cachesize"};
  long size = 0;
  size_t length = sizeof size;
  return sysctlbyname(names[level - 1], &size, &length, nullptr, 0) == 0 ? size : 0;
}
#else
long cache(int) { return 0; }
#endif

}  // namespace

Info info() {
#if defined(__x86_64__)
  const char* arch = "x86_64";
#elif defined(__aarch64__)
  const char* arch = "aarch64";
#else
  const char* arch = "unknown";
#endif
  return {arch, features(), logical_cores(), cache(1), cache(2), cache(3)};
}

}  // namespace ito::cpu
