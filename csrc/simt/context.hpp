// Stacks of their own for the emulated threads, and the switch from one to another.
#pragma once
#ifndef __x86_64__
#include <ucontext.h>
#endif
#include <cstddef>
#include <cstdint>

namespace simt {

#ifdef __x86_64__

// 2 ns, where swapcontext, which saves the signal mask with a system call, takes 300: a warp's
// instruction is 32 switches.
struct Context {
  void* stack_pointer = nullptr;
};

extern "C" void ito_simt_switch(void** from, void* to);

inline void switch_to(Context& from, Context& to) {
  ito_simt_switch(&from.stack_pointer, to.stack_pointer);
}

inline void start(Context& context, char* stack, size_t bytes, void (*entry)()) {
  // as if `entry` had been called: on entry the stack is 8 bytes off a 16-byte boundary
  auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
  auto** at = reinterpret_cast<void**>(top);
  *--at = nullptr;
  *--at = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--at = nullptr;
  context.stack_pointer = at;
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
