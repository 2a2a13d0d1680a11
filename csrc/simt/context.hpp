// A stack for each emulated thread, and the switch from one to another.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace simt {

#if defined(__x86_64__) || defined(__aarch64__)

// Saves the registers that a function must preserve and changes the stack: 4 ns. swapcontext takes
// 420, for its system call about signals, and one instruction of a warp is 32 switches.
extern "C" void ito_simt_switch(void** from, void* to);

struct Context {
  void* stack_pointer = nullptr;
};

inline void switch_to(Context& from, Context& to) {
  ito_simt_switch(&from.stack_pointer, to.stack_pointer);
}

// As if the switch had saved a thread that is about to return to `entry`.
inline void start(Context& context, char* stack, size_t bytes, void (*entry)()) {
#ifdef __x86_64__
  constexpr int kWords = 8, kReturn = 6;  // 7 are popped: a function starts 8 bytes off 16
#else
  constexpr int kWords = 20, kReturn = 11;  // x30
#endif
  const auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
  auto* words = reinterpret_cast<uintptr_t*>(top) - kWords;
  std::fill(words, words + kWords, 0);
  words[kReturn] = reinterpret_cast<uintptr_t>(entry);
  context.stack_pointer = words;
}

#else

struct Context {
  ucontext_t state;
};

inline void switch_to(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

inline void start(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

#endif

}  // namespace simt
