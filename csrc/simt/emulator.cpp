#include "simt/emulator.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#ifdef ITO_SANITIZED
#include <sanitizer/asan_interface.h>
#endif

#ifdef __APPLE__
#define SYMBOL "_ito_simt_switch"
#else
#define SYMBOL "ito_simt_switch"
#endif
// Ends in a jump. A return would go where the processor does not predict it, and take five times as
// long.
#if defined(__x86_64__)
asm(".text\n.globl " SYMBOL "\n" SYMBOL ":\n"
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n  mov %rsi, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n"
    "  pop %rcx\n  jmp *%rcx\n");
#elif defined(__aarch64__)
asm(".text\n.globl " SYMBOL "\n.p2align 2\n" SYMBOL ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n  br x30\n");
#endif

namespace simt {
namespace {

constexpr size_t kStack = 128 << 10;

std::string text(Where where) {
  const char* name = std::strrchr(where.file, '/');
  return std::string(name ? name + 1 : where.file) + ":" + std::to_string(where.line);
}

}  // namespace

thread_local Block* block = nullptr;

Settings& settings() {
  static thread_local Settings s;
  return s;
}

Block::Block(const char* kernel, int threads, size_t shared_bytes, std::function<void()> body)
    : kernel_(kernel),
      body_(std::move(body)),
      threads_(threads),
      warps_(threads / kWarp),
      stacks_(new char[threads * kStack]),
      shared_(shared_bytes) {
  if (threads % kWarp) throw Error(std::string(kernel) + ": a block must be whole warps");
}

void Block::run(unsigned index) {
  index_ = index;
  epoch_ = 0;
  std::fill(shared_.begin(), shared_.end(), char(0xff));  // NaN in every format
  cells_.assign(shared_.size() / kChunk, {});
  warps_.assign(warps_.size(), {});
#ifdef ITO_SANITIZED  // threads of the last block never returned: the ends of their frames are marked
  ASAN_UNPOISON_MEMORY_REGION(stacks_.get(), threads_.size() * kStack);
#endif
  for (size_t i = 0; i < threads_.size(); ++i) {
    threads_[i] = {};
    Thread& t = threads_[i];
    t.index = static_cast<int>(i);
    t.lane = t.index % kWarp;
    t.warp = &warps_[i / kWarp];
    start(t.context, stacks_.get() + i * kStack, kStack, entry);
  }
  std::vector<size_t> order(warps_.size());
  std::iota(order.begin(), order.end(), 0);
  std::mt19937_64 draw(settings().seed * 0x9e3779b97f4a7c15u + index);
  for (;; ++epoch_) {
    std::shuffle(order.begin(), order.end(), draw);
    for (const size_t w : order) {
      running_ = &threads_[w * kWarp];
      switch_to(main_, running_->context);
      if (error_) std::rethrow_exception(error_);
    }
    const Thread& first = threads_[0];
    for (const Thread& t : threads_) {
      if (t.state == first.state && t.where == first.where) continue;
      const Thread& waits = t.state == Thread::kBarrier ? t : first;
      fail("not all threads reach the same barrier: thread " + std::to_string(waits.index) +
               " waits here",
           waits.where);
    }
    for (Warp& w : warps_) bank_use_of_copies(w);
    if (first.state == Thread::kDone) break;
    for (Warp& w : warps_) w.parked = 0;
    for (Thread& t : threads_) {
      t.state = Thread::kRunning;
      t.issued = 0;
    }
  }
}

void Block::entry() {
  Block& b = *block;
  try {
    b.body_();
  } catch (...) {
    b.error_ = std::current_exception();
  }
  if (b.error_) switch_to(b.running_->context, b.main_);
  b.park(Thread::kDone);
}

void Block::next_lane() {
  Thread* from = running_;
  const int first = from->index - from->lane;
  do running_ = &threads_[first + (running_->lane + 1) % kWarp];
  while (running_->state != Thread::kRunning);
  if (running_ != from) switch_to(from->context, running_->context);
}

void Block::park(Thread::State state) {
  Thread* from = running_;
  from->state = state;
  if (++from->warp->parked == kWarp)
    switch_to(from->context, main_);
  else
    next_lane();
}

void Block::barrier(Where where) {
  if (running_->warp->arrived) divergence(where);
  running_->where = where;
  park(Thread::kBarrier);
}

void Block::copy(int chunk, const void* from, int bytes, Where where) {
  check(chunk >= 0 && chunk < static_cast<int>(cells_.size()), "shared memory", chunk,
        cells_.size(), where);
  Cell& cell = cells_[chunk];
  write(cell, chunk, where);
  cell.pending = true;
  std::memset(&shared_[size_t(chunk) * kChunk], 0xff, kChunk);
  running_->copies.push_back({chunk, from, bytes, running_->group, where});
  if (settings().trace) {
    auto& copies = running_->warp->copies;
    if (copies.size() <= running_->issued) copies.push_back({where, {}});
    copies[running_->issued++].chunks[running_->lane] = chunk;
  }
}

void Block::wait(int groups_left, Where where) {
  auto& copies = running_->copies;
  const auto lands = [&](const Copy& c) { return c.group < running_->group - groups_left; };
  for (const Copy& c : copies) {
    if (!lands(c)) continue;
    Cell& cell = cells_[c.chunk];
    cell.pending = false;
    write(cell, c.chunk, where);
    char* to = &shared_[size_t(c.chunk) * kChunk];
    std::memset(to, 0, kChunk);
    if (c.bytes) std::memcpy(to, c.from, c.bytes);
  }
  copies.erase(std::remove_if(copies.begin(), copies.end(), lands), copies.end());
}

void Block::write(Cell& cell, int chunk, Where where) {
  const int me = running_->index;
  if (cell.pending) fail("writes shared chunk " + std::to_string(chunk) +
                         ", where a cp.async has not been waited for", where);
  if (cell.written == epoch_ && cell.writer != me) race("written", chunk, cell.writer, where);
  if (cell.read == epoch_ && cell.reader != me) race("read", chunk, cell.reader, where);
  cell.written = epoch_;
  cell.writer = me;
}

const void* Block::read(int chunk, Where where) {
  check(chunk >= 0 && chunk < static_cast<int>(cells_.size()), "shared memory", chunk,
        cells_.size(), where);
  Cell& cell = cells_[chunk];
  const int me = running_->index;
  if (cell.pending) fail("reads shared chunk " + std::to_string(chunk) +
                         ", where a cp.async has not been waited for", where);
  if (cell.written < 0) fail("reads shared chunk " + std::to_string(chunk) +
                             ", which was never written", where);
  if (cell.written == epoch_ && cell.writer != me) race("written", chunk, cell.writer, where);
  if (cell.read != epoch_) cell.reader = me;
  if (cell.reader != me) cell.reader = kMany;
  cell.read = epoch_;
  return &shared_[size_t(chunk) * kChunk];
}

void Block::record(const char* what, const int* chunks, int count, Where where) {
  if (!settings().trace) return;
  BankUse& use = settings().banks[text(where) + " " + what];
  ++use.instructions;
  for (int first = 0; first < count; first += 8) {
    int at[8] = {}, passes = 1;  // of the eight places in a line of 128 bytes
    for (int i = first; i < std::min(first + 8, count); ++i)
      if (std::find(chunks + first, chunks + i, chunks[i]) == chunks + i)
        passes = std::max(passes, ++at[chunks[i] % 8]);
    use.passes += passes;
    ++use.least;
  }
}

void Block::bank_use_of_copies(Warp& warp) {
  for (const Warp::Copies& c : warp.copies) {
    std::vector<int> chunks;  // in the order of lanes, whatever the order in which they ran
    for (const auto& [lane, chunk] : c.chunks) chunks.push_back(chunk);
    record("cp.async", chunks.data(), static_cast<int>(chunks.size()), c.where);
  }
  warp.copies.clear();
}

void Block::fail(const std::string& what, Where where) const {
  throw Error(std::string(kernel_) + ": block " + std::to_string(index_) + ", thread " +
              std::to_string(running_->index) + ", " + text(where) + ": " + what);
}

void Block::out_of_bounds(const char* what, int64_t index, int64_t size, Where where) const {
  fail("index " + std::to_string(index) + " is outside of " + what + " of " +
           std::to_string(size),
       where);
}

void Block::divergence(Where where) const {
  fail("not all lanes of the warp reach the same instruction", where);
}

void Block::race(const char* what, int chunk, int other, Where where) const {
  fail("race: shared chunk " + std::to_string(chunk) + " was " + what + " by " +
           (other == kMany ? "other threads" : "thread " + std::to_string(other)) +
           " without a barrier since",
       where);
}

void launch(const char* kernel, int64_t blocks, int threads, size_t shared_bytes,
            std::function<void()> body) {
  Block b(kernel, threads, shared_bytes, std::move(body));
  block = &b;
  for (int64_t i = 0; i < blocks; ++i) b.run(static_cast<unsigned>(i));
}

}  // namespace simt
