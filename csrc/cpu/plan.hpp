// How a problem is cut into tiles, which thread computes which tile, and the order in which tiles
// add to the gradients.
//
// Rows are cut into row blocks, columns into column blocks. A tile is the part of the score matrix
// where one row block meets one column block.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/kernels.hpp"

namespace ito::cpu {

// A range of rows or columns, cut into nearly equal blocks whose ends are multiples of `unit`.
struct Blocks {
  int64_t length = 0, count = 0, unit = 1;
  int64_t begin(int64_t block) const {
    const int64_t at = ceil_div(length, unit) * block / count * unit;
    return at < length ? at : length;
  }
  int64_t size(int64_t block) const { return begin(block + 1) - begin(block); }
  int64_t largest() const;
};

// One tile of a plan.
struct TileIndex {
  int64_t row_block = 0, col_block = 0;
  int64_t offset = 0;  // col_block, counted from the row block's first column block
  bool first = false;  // of the row block's tiles, in the order in which they are computed
};

// Thread t owns the row blocks t, t + threads, ... For each of them it visits the column blocks in
// a circle that begins elsewhere for every thread. So threads add to different column blocks at any
// moment and rarely wait for each other.
struct Plan {
  int threads = 1;
  Blocks rows, cols;
  // A self-similarity: rows and columns are cut alike, and row block I begins at column block I.
  bool self = false;
  // S is symmetric too. Row block I then meets the column blocks I, I + 1, ... half way round the
  // circle only: every pair of blocks is computed once.
  bool half = false;

  // The most tiles that a row block has.
  int64_t tiles() const { return half ? cols.count / 2 + 1 : cols.count; }
  // The tiles of this one. With an even number of blocks, two that lie opposite each other on the
  // circle would both compute their tile; the later one leaves it out.
  int64_t tiles(int64_t row_block) const {
    return half && cols.count % 2 == 0 && row_block >= cols.count / 2 ? tiles() - 1 : tiles();
  }
  // The n-th tile that is computed for a row block.
  TileIndex tile(int64_t row_block, int64_t n) const {
    const int64_t thread = row_block % threads, count = tiles(row_block);
    // In a self-similarity neighbouring row blocks begin at neighbouring columns. Their threads
    // would follow each other one tile apart and wait at every tile: they start spread out instead.
    const int64_t offset = self ? (n + thread * count / threads) % count : n;
    const int64_t start = self ? row_block : thread * cols.count / threads;
    return {row_block, (start + offset) % cols.count, offset, n == 0};
  }
  // A tile on the diagonal of a symmetric matrix holds its pairs twice, as (i, j) and as (j, i).
  // The gradient that one product gives the rows is then the whole one.
  bool both_sides(const TileIndex& at) const { return half && at.offset == 0; }
};

Plan make_plan(const Problem& problem, const Kernels& kernels, int threads, int64_t l2_bytes,
               bool half);

// Several threads add to the gradient of one column block. Each tile has its turn there: 0 adds
// first, 1 next, and so on. The order is fixed, so the sums have the same bits every time.
class Turns {
 public:
  explicit Turns(const Plan& plan);
  int of(const TileIndex& at) const { return turns_[at.row_block * (tiles_ + 1) + at.offset]; }
  // In a self-similarity a row block's own gradient is added to the same accumulator, once.
  int of_rows(int64_t row_block) const { return turns_[row_block * (tiles_ + 1) + tiles_]; }

 private:
  int64_t tiles_;
  std::vector<int> turns_;
};

}  // namespace ito::cpu
