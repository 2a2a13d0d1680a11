#include "cpu/keys.hpp"

#include <algorithm>
#include <utility>

namespace ito::cpu {
namespace {

constexpr int32_t kNoRow = -1, kNoColumn = -2;

using Entry = std::pair<int64_t, int32_t>;  // id, position

std::vector<Entry> sorted(const int64_t* ids, int64_t n) {
  std::vector<Entry> entries;
  entries.reserve(n);
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] >= 0) entries.push_back({ids[i], static_cast<int32_t>(i)});
  if (!std::is_sorted(entries.begin(), entries.end())) std::sort(entries.begin(), entries.end());
  return entries;
}

std::vector<uint8_t> padding(const int64_t* ids, int64_t n) {
  if (std::all_of(ids, ids + n, [](int64_t id) { return id >= 0; })) return {};
  std::vector<uint8_t> skip(n);
  std::transform(ids, ids + n, skip.begin(), [](int64_t id) { return id < 0; });
  return skip;
}

std::vector<int32_t> block_of(const Blocks& blocks) {
  std::vector<int32_t> out(blocks.length);
  for (int64_t b = 0; b < blocks.count; ++b)
    std::fill(out.begin() + blocks.begin(b), out.begin() + blocks.begin(b + 1), int32_t(b));
  return out;
}

// The blocks of the entries [first, last), each once. The entries are in order of position.
void distinct_blocks(const Entry* first, const Entry* last, const std::vector<int32_t>& block,
                     std::vector<int32_t>& out) {
  out.clear();
  for (; first != last; ++first)
    if (out.empty() || out.back() != block[first->second]) out.push_back(block[first->second]);
}

}  // namespace

Keys::Keys(const Problem& p, const Plan& plan)
    : row_keys(p.a.rows + kSlack, kNoRow),
      col_keys(p.b.rows + kSlack, kNoColumn),
      col_blocks_(plan.cols.count),
      has_positives_(plan.rows.count * plan.cols.count, 0) {
  if (p.row_ids)
    from_ids(p, plan);
  else
    from_diagonal(p, plan);
}

void Keys::from_ids(const Problem& p, const Plan& plan) {
  row_skip = padding(p.row_ids, p.a.rows);
  col_skip = padding(p.col_ids, p.b.rows);
  const std::vector<Entry> rows = sorted(p.row_ids, p.a.rows), cols = sorted(p.col_ids, p.b.rows);
  const std::vector<int32_t> row_block = block_of(plan.rows), col_block = block_of(plan.cols);
  std::vector<int32_t> in_rows, in_cols;
  const Entry *r = rows.data(), *r_end = r + rows.size();
  const Entry *c = cols.data(), *c_end = c + cols.size();
  for (int32_t key = 0; r != r_end; ++key) {
    const int64_t id = r->first;
    const Entry *r_first = r;
    while (r != r_end && r->first == id) row_keys[r++->second] = key;
    while (c != c_end && c->first < id) ++c;
    const Entry *c_first = c;
    while (c != c_end && c->first == id) col_keys[c++->second] = key;
    distinct_blocks(r_first, r, row_block, in_rows);
    distinct_blocks(c_first, c, col_block, in_cols);
    for (const int32_t i : in_rows)
      for (const int32_t j : in_cols) has_positives_[i * col_blocks_ + j] = 1;
  }
}

void Keys::from_diagonal(const Problem& p, const Plan& plan) {
  for (int64_t j = 0; j < p.b.rows; ++j) col_keys[j] = static_cast<int32_t>(j);
  for (int64_t i = 0; i < p.a.rows; ++i) {
    const int64_t j = i + p.diagonal;
    if (j >= 0 && j < p.b.rows) row_keys[i] = static_cast<int32_t>(j);
  }
  for (int64_t i = 0; i < plan.rows.count; ++i)
    for (int64_t j = 0; j < plan.cols.count; ++j)
      has_positives_[i * col_blocks_ + j] = crosses_diagonal(plan, i, j, p.diagonal);
}

void count_equal(const int64_t* ids, int64_t n, const int64_t* others, int64_t m,
                 int64_t* counts) {
  std::vector<int64_t> ordered(others, others + m);
  std::sort(ordered.begin(), ordered.end());
  for (int64_t i = 0; i < n; ++i) {
    const auto [first, last] = std::equal_range(ordered.begin(), ordered.end(), ids[i]);
    counts[i] = ids[i] < 0 ? 0 : last - first;
  }
}

bool crosses_diagonal(const Plan& plan, int64_t row_block, int64_t col_block, int64_t diagonal) {
  const int64_t first = plan.rows.begin(row_block) + diagonal;
  const int64_t last = plan.rows.begin(row_block + 1) + diagonal;
  return first < plan.cols.begin(col_block + 1) && last > plan.cols.begin(col_block);
}

}  // namespace ito::cpu
