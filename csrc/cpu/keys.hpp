// Ids as small integers, and which tiles have positives in them.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/plan.hpp"

namespace ito::cpu {

// Row i and column j are positive where row_keys[i] == col_keys[j]. Padded rows and columns, and
// the entries beyond the end, have keys that are equal to none.
struct Keys {
  std::vector<int32_t> row_keys, col_keys;
  std::vector<uint8_t> row_skip, col_skip;  // padding; empty if there is none

  Keys(const Problem& problem, const Plan& plan);
  bool positives(int64_t row_block, int64_t col_block) const {
    return touched_[row_block * col_blocks_ + col_block] != 0;
  }

 private:
  void from_ids(const Problem& problem, const Plan& plan);
  void from_diagonal(const Problem& problem, const Plan& plan);

  int64_t col_blocks_;
  std::vector<uint8_t> touched_;
};

// Does the diagonal j = i + diagonal cross the tile?
bool crosses_diagonal(const Plan& plan, int64_t row_block, int64_t col_block, int64_t diagonal);

}  // namespace ito::cpu
