// Threads without PyTorch: all run at the same time, and an exception of one reaches the caller.
#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "cpu/threads.hpp"

int main() {
  std::atomic<int> ran{0};
  std::string caught;
  try {
    ito::cpu::run_parallel(4, [&](int i) {
      ++ran;
      if (i == 2) throw std::runtime_error("from a thread");
    });
  } catch (const std::runtime_error& e) {
    caught = e.what();
  }
  std::atomic<int> here{0};
  ito::cpu::run_parallel(3, [&](int) {  // ends only if all three are there together
    for (++here; here < 3;) {
    }
  });
  const bool right = ran == 4 && caught == "from a thread";
  std::puts(right ? ito::cpu::thread_provider() : "the exception was lost");
  return right ? 0 : 1;
}
