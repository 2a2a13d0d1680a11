// Running a function on several threads at once: on PyTorch's own, if PyTorch is in the process.
#pragma once
#include <functional>

namespace ito::cpu {

// Calls work(0) ... work(n - 1) at the same time and returns when all have. They may wait for each
// other. An exception of any of them is thrown here, after the others have returned: work that
// others wait for must not throw. Subnormal numbers are flushed to 0 meanwhile: they would slow the
// products down.
void run_parallel(int n, const std::function<void(int)>& work);

// Who provides the threads: "PyTorch's OpenMP team", the one of the runtime that libtorch_cpu is
// linked with, or "std::thread". For explain() and tests.
const char* thread_provider();

}  // namespace ito::cpu
