// How a problem is cut into tiles, which thread computes which, and in which order they may add to
// the gradients.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/kernels.hpp"

namespace ito::cpu {

// A range of rows or columns cut into nearly equal blocks whose ends are multiples of `unit`.
struct Blocks {
  int64_t length = 0, count = 0, unit = 1;
  int64_t begin(int64_t b) const {
    const int64_t units = (length + unit - 1) / unit, at = units * b / count * unit;
    return at < length ? at : length;
  }
  int64_t size(int64_t b) const { return begin(b + 1) - begin(b); }
  int64_t largest() const;
};

// Thread t owns the row blocks t, t + threads, ...; for each it takes `steps` column blocks in
// turn. At any moment different threads are at different column blocks, so they can add to the
// columns' gradients without locks, and always in the same order: the sums have the same bits
// every time.
struct Plan {
  int threads = 1;
  Blocks rows, cols;
  // Self-similarity: rows and columns are cut alike. `half`: S is symmetric and block I meets only
  // the columns I, I + 1, ... half way round, so every pair of blocks is computed once.
  bool square = false, half = false;

  int64_t steps() const { return half ? cols.count / 2 + 1 : cols.count; }
  // The number of steps of one row block: when the count is even, opposite blocks meet once.
  int64_t steps(int64_t row) const {
    return half && cols.count % 2 == 0 && row >= cols.count / 2 ? steps() - 1 : steps();
  }
  // The order of the steps. In a square problem neighbouring rows begin at neighbouring columns, and
  // threads that follow each other at one tile's distance wait for each other: they are spread out.
  int64_t step(int64_t row, int64_t at) const {
    return square ? (at + row % threads * steps(row) / threads) % steps(row) : at;
  }
  int64_t column(int64_t row, int64_t step) const {
    const int64_t start = square ? row : row % threads * cols.count / threads;
    return (start + step) % cols.count;
  }
  // On the diagonal of a symmetric problem one product gives both sides' gradient.
  bool both_sides(int64_t step) const { return half && step == 0; }
};

Plan make_plan(const Problem& problem, const Kernels& kernels, int threads, int64_t l2_bytes,
               bool half);

// The order in which tiles add to the gradient of a column block.
class Turns {
 public:
  explicit Turns(const Plan& plan);
  int of(int64_t row, int64_t step) const { return turns_[row * (steps_ + 1) + step]; }
  // The turn at which the row block's own part is added, in a self-similarity.
  int of_rows(int64_t row) const { return of(row, steps_); }

 private:
  int64_t steps_;
  std::vector<int> turns_;
};

}  // namespace ito::cpu
