#include "cpu/threads.hpp"

#include <atomic>
#include <exception>
#include <future>
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

// PyTorch's own team of OpenMP threads. A second pool would compete with it: its idle workers spin
// on the same cores for milliseconds. The OpenMP runtime is looked up in libtorch_cpu, and its team
// started through the entry points that compilers generate calls to. Linking with OpenMP would give
// another runtime: PyTorch's wheels bring their own copy, under a name that varies.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread)() = nullptr;
  int (*threads)() = nullptr;

  OpenMP() {
#if defined(__SANITIZE_THREAD__)
    // Own threads: TSan does not see how a runtime that it has not compiled synchronises.
#elif defined(__unix__) || defined(__APPLE__)
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

// While it lives, this thread's subnormal numbers are 0.
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
  Job(int threads, const std::function<void(int)>& what)
      : n(threads), work(what), failed(threads) {}

  void run(int index) {
    const FlushSubnormals flush;
    try {
      work(index);
    } catch (...) {  // an exception may leave neither a thread nor OpenMP's region
      failed[index] = std::current_exception();
    }
  }
  void rethrow() const {
    for (const std::exception_ptr& e : failed)
      if (e) std::rethrow_exception(e);
  }

  const int n;
  const std::function<void(int)>& work;
  std::vector<std::exception_ptr> failed;
  std::atomic<bool> short_of_threads{false};
};

void openmp_body(void* data) {
  Job& job = *static_cast<Job*>(data);
  if (openmp().threads() == job.n)
    job.run(openmp().thread());
  else
    job.short_of_threads = true;
}

// No thread starts the work before all of them exist: they may wait for each other.
void on_own_threads(Job& job) {
  std::promise<bool> all_there;
  const std::shared_future<bool> start = all_there.get_future().share();
  std::vector<std::thread> others;
  const auto finish = [&](bool there) {
    all_there.set_value(there);
    if (there) job.run(0);
    for (std::thread& thread : others) thread.join();
  };
  try {
    others.reserve(job.n - 1);
    for (int i = 1; i < job.n; ++i)
      others.emplace_back([&job, start, i] {
        if (start.get()) job.run(i);
      });
  } catch (...) {
    finish(false);
    throw;
  }
  finish(true);
}

}  // namespace

void run_parallel(int n, const std::function<void(int)>& work) {
  if (n == 1) {
    const FlushSubnormals flush;
    return work(0);
  }
  Job job(n, work);
  if (openmp().parallel) openmp().parallel(openmp_body, &job, static_cast<unsigned>(n), 0);
  // inside another parallel region, or at its limit, OpenMP gives fewer threads
  if (!openmp().parallel || job.short_of_threads) on_own_threads(job);
  job.rethrow();
}

const char* thread_provider() {
  return openmp().parallel ? "PyTorch's OpenMP team" : "std::thread";
}

}  // namespace ito::cpu
