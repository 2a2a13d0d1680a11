#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/call.hpp"

namespace ito::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// (max, sum) with another pair, one at a time.
void merge(float& max, float& sum, float other_max, float other_sum) {
  if (other_max > max) {
    std::swap(max, other_max);
    std::swap(sum, other_sum);
  }
  // -inf twice: the other sum is 0, or NaN, which must not be lost
  sum += other_max == max ? other_sum : other_sum * std::exp(other_max - max);
}

// Entry `from` of another's running statistics into entry `to`.
void merge(const Running& r, int64_t to, const Running& other, int64_t from, Positives kind) {
  merge(r.max[to], r.sum[to], other.max[from], other.sum[from]);
  if (r.neg && other.neg) r.neg[to] = std::max(r.neg[to], other.neg[from]);
  if (kind == Positives::kLinear) {
    r.pos[to] += other.pos[from];
    r.aux[to] += other.aux[from];
  } else if (kind == Positives::kLse) {
    merge(r.pos[to], r.aux[to], other.pos[from], other.aux[from]);
  }
}

// The statistics of entry `i` of running ones, as entry `at` of the result.
void finish(const Running& r, int64_t i, Positives kind, const SideStats& out, int64_t at) {
  const double shift = r.max[i] == -kInf ? 0.0 : r.max[i];
  if (out.max) out.max[at] = r.max[i];
  if (out.logsum) out.logsum[at] = static_cast<float>(std::log(static_cast<double>(r.sum[i])));
  if (out.neg_max) out.neg_max[at] = r.neg[i];
  if (!out.pos) return;
  if (kind == Positives::kLinear)
    out.pos[at] = static_cast<float>(r.pos[i] - r.aux[i] * shift);
  else
    out.pos[at] = static_cast<float>(r.pos[i] - shift + std::log(static_cast<double>(r.aux[i])));
}

}  // namespace

void Call::reset(const Running& r, int64_t n) const {
  std::fill_n(r.max, n, -kInf);
  std::fill_n(r.sum, n, 0.0f);
  if (r.pos) std::fill_n(r.pos, n, p_.positives == Positives::kLse ? -kInf : 0.0f);
  if (r.aux) std::fill_n(r.aux, n, 0.0f);
  if (r.neg) std::fill_n(r.neg, n, -kInf);
}

void Call::forward_rows(Lane& lane, int64_t row, const Stats& stats, bool fill_cache) {
  reset(lane.row, rows_ + kSlack);
  ForwardTile f;
  f.positives = p_.positives;
  f.hardest = p_.hardest;
  f.row = lane.row;
  for (int64_t at = 0; at < plan_.steps(row); ++at) {
    const int64_t step = plan_.step(row, at);
    Tile t = tile(lane, row, step);
    const bool kept = fill_cache && use_cache(t, row, step);
    if (!kept && !t.plain) t.dots = lane.dots;  // scores lose what is excluded, "lse" needs it
    f.col = lane.col;
    const int64_t j = plan_.cols.begin(plan_.column(row, step));
    for (float** x : {&f.col.max, &f.col.sum, &f.col.pos, &f.col.aux, &f.col.neg})
      if (*x) *x += j;
    // On the diagonal of a symmetric problem the columns' statistics are the rows' again: a copy
    // that nobody reads.
    if (plan_.both_sides(step)) {
      float* p = lane.unread;
      f.col = {p, p + t.cols, p + 2 * t.cols, p + 3 * t.cols, p + 4 * t.cols};
      reset(f.col, t.cols);
    }
    count_product(lane, row, step);
    k_.forward(t, f);
  }
  if (plan_.half) return;
  const int64_t first = plan_.rows.begin(row);
  if (p_.rows)
    for (int64_t i = 0; i < plan_.rows.size(row); ++i)
      finish(lane.row, i, p_.positives, stats.row, first + i);
}

void Call::forward(const Stats& stats, TileCache cache) {
  pack_columns();
  open_cache(cache, true, false);
  // Symmetric: a block's row statistics join the columns' of its own thread.
  parallel([&](int thread) {
    Lane& lane = lanes_[thread];
    reset(lane.col, columns_);
    for (int64_t row = thread; row < plan_.rows.count; row += plan_.threads) {
      pack_rows(lane, row);
      forward_rows(lane, row, stats, true);
      const int64_t first = plan_.rows.begin(row);
      for (int64_t i = 0; plan_.half && i < plan_.rows.size(row); ++i)
        merge(lane.col, first + i, lane.row, i, p_.positives);
    }
  });
  if (plan_.half && p_.rows) finish_columns(stats.row);
  if (p_.cols) finish_columns(stats.col);
}

// Merges the threads' statistics of the columns, always in the same order.
void Call::finish_columns(const SideStats& out) {
  parallel([&](int thread) {
    const int64_t m = p_.b.rows, share = (m + plan_.threads - 1) / plan_.threads;
    for (int64_t j = thread * share; j < std::min(m, (thread + 1) * share); ++j) {
      float value[5] = {-kInf, 0, p_.positives == Positives::kLse ? -kInf : 0.0f, 0, -kInf};
      const Running total = {value, value + 1, value + 2, value + 3, value + 4};
      for (const Lane& lane : lanes_) merge(total, 0, lane.col, j, p_.positives);
      finish(total, 0, p_.positives, out, j);
    }
  });
}

void logsumexp_forward(const Problem& p, const Stats& stats, TileCache cache, const Run& run) {
  Call::Wants wants;
  wants.keys = p.row_ids || p.exclude_self || p.exclude_positives || p.row_limit || p.hardest ||
               p.positives != Positives::kNone;
  wants.statistics = wants.symmetry = true;
  Call(p, run, wants).forward(stats, cache);
}

}  // namespace ito::cpu
