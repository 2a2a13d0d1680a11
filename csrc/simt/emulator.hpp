// CUDA's execution model on a CPU, as far as csrc/cuda uses it. The kernels' own source runs in the
// tests, and a fault that a GPU may or may not show is an error here, with its thread and line.
//
// Every CUDA thread is a fiber. Blocks run one after another. A warp runs until all of its lanes
// wait at a barrier; a seeded generator draws the next warp. At an instruction of the whole warp
// (shuffle, vote, ldmatrix, mma) each lane waits for the others; the last to arrive does the work.
//
// Shared memory is touched by cp.async and ldmatrix only, so its state is kept for each 16 bytes:
// - it starts as NaN, and reading what was never written is an error;
// - cp.async lands at its wait, never before, and until then reading or writing there is an error;
// - two threads at the same place without a barrier between them, one of them writing, is a race,
//   whatever the order in which they happen to run.
// Also errors: a barrier or warp instruction that not all threads reach, or reach at different
// lines; and access outside of shared memory or of the tensors.
#pragma once
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt/context.hpp"

namespace simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Where {
  const char* file = "";
  int line = 0;
  bool operator==(const Where& other) const { return line == other.line && file == other.file; }
};

constexpr int kWarp = 32;
constexpr int kChunk = 16;  // bytes of one cp.async, and of what a lane points ldmatrix to

// An instruction's passes over the 32 banks of shared memory, and how many it needs at least.
struct BankUse {
  int64_t instructions = 0, passes = 0, least = 0;
};

// Of the calling OS thread. The trace is by source line; it grows until it is cleared.
struct Settings {
  uint64_t seed = 0;
  bool trace = false;
  std::map<std::string, BankUse> banks;
};
Settings& settings();

struct Copy {  // a cp.async under way
  int chunk;
  const void* from;
  int bytes;
  int group;
  Where where;
};

struct Warp {
  int arrived = 0;  // lanes in the present instruction
  int parked = 0;   // lanes at a barrier or at their end
  unsigned generation = 0;
  Where where;
  void* slot[kWarp] = {};
  struct Copies {
    Where where;
    std::map<int, int> chunks;  // by lane
  };
  std::vector<Copies> copies;  // the lanes' k-th cp.async since the last barrier, while tracing
};

struct Thread {
  enum State { kRunning, kBarrier, kDone };
  Context context;
  Warp* warp = nullptr;
  int index = 0, lane = 0;
  State state = kRunning;
  Where where;  // of the barrier
  int group = 0;
  size_t issued = 0;  // cp.async since the last barrier
  std::vector<Copy> copies;
};

class Block {
 public:
  Block(const char* kernel, int threads, size_t shared_bytes, std::function<void()> body);
  void run(unsigned index);

  unsigned index() const { return index_; }
  Thread& thread() { return *running_; }

  void barrier(Where where);
  void copy(int chunk, const void* from, int bytes, Where where);
  void commit() { ++running_->group; }
  void wait(int groups_left, Where where);
  const void* read(int chunk, Where where);  // for the running thread
  void check(bool inside, const char* what, int64_t index, int64_t size, Where where) {
    if (!inside) out_of_bounds(what, index, size, where);
  }
  // While tracing, counts the passes of an instruction in which lanes ask for `chunks`: eight at a
  // time move 128 bytes, in one pass if they meet different banks.
  void record(const char* what, const int* chunks, int count, Where where);
  [[noreturn]] void fail(const std::string& what, Where where) const;

  // `op` gets the pointers that the 32 lanes of the warp gave, in the order of lanes.
  template <class Op>
  void collective(void* mine, Where where, Op&& op) {
    Warp& warp = *running_->warp;
    if (warp.parked || (warp.arrived && !(warp.where == where))) divergence(where);
    warp.where = where;
    warp.slot[running_->lane] = mine;
    const unsigned generation = warp.generation;
    if (++warp.arrived == kWarp) {
      op(warp.slot);
      warp.arrived = 0;
      ++warp.generation;
      return;
    }
    while (warp.generation == generation) next_lane();
  }

 private:
  struct Cell {  // the last accesses to a chunk: at which count of barriers, and by whom
    int written = -1, read = -1;
    int writer = 0, reader = 0;
    bool pending = false;
  };
  static constexpr int kMany = -1;

  static void entry();
  void next_lane();
  void park(Thread::State state);
  void write(Cell& cell, int chunk, Where where);
  void bank_use_of_copies(Warp& warp);
  [[noreturn]] void out_of_bounds(const char* what, int64_t index, int64_t size, Where where) const;
  [[noreturn]] void divergence(Where where) const;
  [[noreturn]] void race(const char* what, int chunk, int other, Where where) const;

  const char* kernel_;
  std::function<void()> body_;
  unsigned index_ = 0;
  int epoch_ = 0;  // barriers passed
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::unique_ptr<char[]> stacks_;
  std::vector<char> shared_;
  std::vector<Cell> cells_;
  Thread* running_ = nullptr;
  Context main_;
  std::exception_ptr error_;
};

extern thread_local Block* block;  // the one that runs

// All blocks of a grid, in the order of their indices.
void launch(const char* kernel, int64_t blocks, int threads, size_t shared_bytes,
            std::function<void()> body);

}  // namespace simt
