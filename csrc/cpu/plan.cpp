#include "cpu/plan.hpp"

#include <algorithm>

namespace ito::cpu {
namespace {

// Waking a thread takes about 10 µs: below this many multiply-adds it costs more than it brings.
#ifdef ITO_SANITIZED  // every problem on all threads
constexpr double kWorkPerThread = 1;
#else
constexpr double kWorkPerThread = 1 << 19;
#endif

}  // namespace

int64_t Blocks::largest() const {
  int64_t most = 0;
  for (int64_t block = 0; block < count; ++block) most = std::max(most, size(block));
  return most;
}

Plan make_plan(const Problem& p, const Kernels& k, int threads, int64_t l2_bytes, bool half) {
  const int64_t n = p.a.rows, m = p.b.rows, d = p.a.width;
  Plan plan;
  plan.self = p.self;
  plan.half = half;

  // A row block, its gradient and the tile are used again and again and should fit into L2. What
  // streams through beside them, the column blocks and their gradient, is fetched ahead.
  const int64_t cols = 256;
  const int64_t bytes_per_row = 4 * (cols + 2 * std::min<int64_t>(d, 1024));
  const int64_t fitting = (l2_bytes > 0 ? l2_bytes : 1 << 20) / bytes_per_row;
  const int64_t rows = std::clamp<int64_t>(fitting, 64, 256);

  // Whole row panels are the fastest. But where every thread has one row block, equal blocks matter
  // more: 128 rows become 64 + 64, not 70 + 58.
  const int64_t unit = p.self ? k.col_panel : n <= threads * rows ? 2 : k.row_panel;
  const int64_t units = ceil_div(n, unit);
  const double work = static_cast<double>(n) * m * d;  // beyond 64 bits for what is only explained
  plan.threads = static_cast<int>(
      std::max(1.0, std::min<double>({1.0 * threads, 1.0 * units, work / kWorkPerThread})));
  // With half of the tiles, threads get equally many if each has an even number of row blocks.
  const int64_t share = plan.threads * (half ? 2 : 1);
  plan.rows = {n, std::min(round_up(ceil_div(n, std::max(rows, unit)), share), units), unit};
  if (p.self) {
    plan.cols = plan.rows;
  } else {
    const int64_t wanted = ceil_div(m, std::max<int64_t>(cols, k.col_panel));
    plan.cols = {m, std::min(round_up(wanted, plan.threads), ceil_div(m, k.col_panel)),
                 k.col_panel};
  }
  return plan;
}

// Turns are given out in the order in which tiles would be computed if all threads kept step.
Turns::Turns(const Plan& plan) : tiles_(plan.tiles()) {
  turns_.resize(plan.rows.count * (tiles_ + 1));
  std::vector<int> next(plan.cols.count, 0);
  for (int64_t group = 0; group < plan.rows.count; group += plan.threads) {
    const int64_t end = std::min(group + plan.threads, plan.rows.count);
    for (int64_t n = 0; n < tiles_; ++n)
      for (int64_t row_block = group; row_block < end; ++row_block) {
        if (n >= plan.tiles(row_block)) continue;
        const TileIndex at = plan.tile(row_block, n);
        if (!plan.both_sides(at))
          turns_[row_block * (tiles_ + 1) + at.offset] = next[at.col_block]++;
      }
    for (int64_t row_block = group; plan.self && row_block < end; ++row_block)
      turns_[row_block * (tiles_ + 1) + tiles_] = next[row_block]++;
  }
}

}  // namespace ito::cpu
