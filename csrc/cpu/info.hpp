// What the processor offers: instruction sets usable now, cores, cache sizes.
#pragma once
#include <string>
#include <vector>

namespace ito::cpu {

struct Info {
  std::string arch;                    // "x86_64", "aarch64" or "unknown"
  std::vector<std::string> features;   // instruction sets that the CPU has and the OS has enabled
  int logical_cores = 0;               // that this process may run on
  long l1d_bytes = 0, l2_bytes = 0, l3_bytes = 0;  // per cache; 0 where the system does not tell
};

Info info();

}  // namespace ito::cpu
