#include "cpu/plan.hpp"

#include <algorithm>

namespace ito::cpu {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Below this many multiply-adds another thread costs more than it brings (about 10 µs to wake it).
constexpr int64_t kWorkPerThread = int64_t(1) << 19;

}  // namespace

int64_t Blocks::largest() const {
  int64_t most = 0;
  for (int64_t b = 0; b < count; ++b) most = std::max(most, size(b));
  return most;
}

Plan make_plan(const Problem& p, const Kernels& k, int threads, int64_t l2_bytes, bool half) {
  const int64_t n = p.a.rows, m = p.b.rows, d = p.a.width;
  Plan plan;
  plan.square = p.self;
  plan.half = half;

  // A panel of rows, its gradient and the tile are used again and again: they fill half of L2,
  // what is streamed (columns and their gradient) has the rest.
  const int64_t cols = 256;
  const int64_t bytes_per_row = 4 * (cols + 2 * std::min<int64_t>(d, 1024));
  const int64_t fitting = (l2_bytes > 0 ? l2_bytes : 1 << 20) * 5 / 8 / bytes_per_row;
  const int64_t rows = std::clamp<int64_t>(fitting, 64, 256);

  // Whole panels of rows are the fastest, but where every thread has one block, equal ones matter
  // more: 128 rows are 64 + 64 instead of 70 + 58.
  const int64_t unit = p.self ? k.panel : n <= threads * rows ? 2 : k.row_panel;
  plan.threads = static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>({threads, divide_up(n, unit), n * m * d / kWorkPerThread})));
  const int64_t blocks = divide_up(n, std::max(rows, unit));
  // Half of the tiles are equally many for every thread if it has an even number of row blocks.
  const int64_t share = plan.threads * (half ? 2 : 1);
  plan.rows = {n, std::min(round_up(blocks, share), divide_up(n, unit)), unit};
  if (p.self) {
    plan.cols = plan.rows;
  } else {
    const int64_t wanted = round_up(divide_up(m, std::max<int64_t>(cols, k.panel)), plan.threads);
    plan.cols = {m, std::min(wanted, divide_up(m, k.panel)), k.panel};
  }
  return plan;
}

Turns::Turns(const Plan& plan) : steps_(plan.steps()) {
  turns_.resize(plan.rows.count * (steps_ + 1));
  std::vector<int> next(plan.cols.count, 0);
  for (int64_t group = 0; group < plan.rows.count; group += plan.threads)
    for (int64_t at = 0; at <= steps_; ++at)
      for (int64_t row = group; row < std::min(group + plan.threads, plan.rows.count); ++row) {
        if (at == steps_) {
          turns_[row * (steps_ + 1) + at] = plan.square ? next[row]++ : 0;
        } else if (at < plan.steps(row)) {
          const int64_t step = plan.step(row, at);
          if (!plan.both_sides(step))
            turns_[row * (steps_ + 1) + step] = next[plan.column(row, step)]++;
        }
      }
}

}  // namespace ito::cpu
