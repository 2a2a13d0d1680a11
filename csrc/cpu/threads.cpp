#include "cpu/threads.hpp"

#include <atomic>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ito::cpu {
namespace {

// A second pool of threads would compete with PyTorch's, whose idle workers spin for milliseconds
// on the same cores. So the OpenMP runtime that libtorch_cpu itself was linked with is asked for
// its team, through the entry points that compilers generate calls to. Linking with OpenMP would
// not do: PyTorch's wheels bring their own copy, under a name that varies.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread)() = nullptr;
  int (*threads)() = nullptr;

  OpenMP() {
#if defined(__unix__) || defined(__APPLE__)
#if defined(__APPLE__)
    constexpr const char* kTorch = "libtorch_cpu.dylib";
#else
    constexpr const char* kTorch = "libtorch_cpu.so";
#endif
    void* torch = dlopen(kTorch, RTLD_LAZY | RTLD_NOLOAD);
    if (!torch) return;
    // a symbol of a library's dependencies counts as its own
    find(torch, "GOMP_parallel", parallel);
    find(torch, "omp_get_thread_num", thread);
    find(torch, "omp_get_num_threads", threads);
    dlclose(torch);
    if (!thread || !threads) parallel = nullptr;
#endif
  }

  template <class F>
  static void find(void* library, const char* name, F& function) {
#if defined(__unix__) || defined(__APPLE__)
    function = reinterpret_cast<F>(dlsym(library, name));
#endif
  }
};

const OpenMP& openmp() {
  static const OpenMP instance;
  return instance;
}

class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(saved_ | 1ul << 24));
  }
  ~FlushSubnormals() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  unsigned long saved_;
#endif
};

struct Job {
  const std::function<void(int)>& work;
  int n;
  std::atomic<bool> short_of_threads{false};
};

void call(const std::function<void(int)>& work, int index) {
  const FlushSubnormals flush;
  work(index);
}

void openmp_body(void* data) {
  Job& job = *static_cast<Job*>(data);
  if (openmp().threads() == job.n)
    call(job.work, openmp().thread());
  else
    job.short_of_threads = true;
}

}  // namespace

void run_parallel(int n, const std::function<void(int)>& work) {
  if (n == 1) return call(work, 0);
  if (openmp().parallel) {
    Job job{work, n};
    openmp().parallel(openmp_body, &job, static_cast<unsigned>(n), 0);
    if (!job.short_of_threads) return;  // it is inside another parallel region, or at its limit
  }
  std::vector<std::thread> others;
  for (int i = 1; i < n; ++i) others.emplace_back([&work, i] { call(work, i); });
  call(work, 0);
  for (std::thread& thread : others) thread.join();
}

const char* thread_provider() {
  return openmp().parallel ? "PyTorch's OpenMP team" : "std::thread";
}

}  // namespace ito::cpu
