// Ids as small integers, and which tiles have positives in them.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/plan.hpp"

namespace ito::cpu {

// Row i and column j are a positive pair where row_keys[i] == col_keys[j]. The keys of padding, and
// those beyond the end, equal no other key.
struct Keys {
  std::vector<int32_t> row_keys, col_keys;
  std::vector<uint8_t> row_skip, col_skip;  // padding; empty if there is none

  Keys(const Problem& problem, const Plan& plan);
  bool positives(int64_t row_block, int64_t col_block) const {
    return has_positives_[row_block * col_blocks_ + col_block] != 0;
  }

 private:
  void from_ids(const Problem& problem, const Plan& plan);
  void from_diagonal(const Problem& problem, const Plan& plan);

  int64_t col_blocks_;
  std::vector<uint8_t> has_positives_;
};

// How many of `others` equal each id; none if it is negative, which means padding.
void count_equal(const int64_t* ids, int64_t n, const int64_t* others, int64_t m, int64_t* counts);

// Does the diagonal j = i + diagonal cross the tile?
bool crosses_diagonal(const Plan& plan, int64_t row_block, int64_t col_block, int64_t diagonal);

}  // namespace ito::cpu
