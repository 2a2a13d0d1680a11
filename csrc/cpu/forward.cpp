// Statistics of rows and columns in one pass over the tiles.
#include <algorithm>
#include <cmath>

#include "cpu/call.hpp"
#include "cpu/threads.hpp"

namespace ito::cpu {
namespace {

// A sum and what rounding has taken from it. NaN, if the sum is infinite: then the sum alone.
double total(float sum, float low) {
  return std::isfinite(low) ? static_cast<double>(sum) + low : sum;
}

void set(float& sum, float& low, double value) {
  sum = static_cast<float>(value);
  low = static_cast<float>(value - sum);
}

// Adds another (max, Σ exp(S - max)) to one.
void merge(float& max, float& sum, float& low, float other_max, float other_sum, float other_low) {
  double here = total(sum, low), other = total(other_sum, other_low);
  if (other_max > max) {
    std::swap(max, other_max);
    std::swap(here, other);
  }
  // both -inf: the other sum is 0, or NaN if a score was NaN, which must not be lost
  here += other_max == max ? other : other * std::exp(static_cast<double>(other_max) - max);
  set(sum, low, here);
}

// Adds entry `from` of `other` to entry `to` of `r`.
void merge(const RunningStats& r, int64_t to, const RunningStats& other, int64_t from,
           Positives kind) {
  merge(r.max[to], r.sum[to], r.low[to], other.max[from], other.sum[from], other.low[from]);
  if (r.neg_max && other.neg_max) r.neg_max[to] = std::max(r.neg_max[to], other.neg_max[from]);
  if (kind == Positives::kLinear) {
    set(r.pos[to], r.pos_low[to],
        total(r.pos[to], r.pos_low[to]) + total(other.pos[from], other.pos_low[from]));
    r.pos_sum[to] += other.pos_sum[from];
  } else if (kind == Positives::kLse) {
    merge(r.pos[to], r.pos_sum[to], r.pos_low[to], other.pos[from], other.pos_sum[from],
          other.pos_low[from]);
  }
}

// Entry `i` of running statistics as entry `to` of the result.
void finish(const RunningStats& r, int64_t i, Positives kind, const SideStats& out, int64_t to) {
  const double shift = r.max[i] == -kInf ? 0.0 : r.max[i];
  if (out.max) out.max[to] = r.max[i];
  if (out.logsum) out.logsum[to] = static_cast<float>(std::log(total(r.sum[i], r.low[i])));
  if (out.neg_max) out.neg_max[to] = r.neg_max[i];
  if (!out.pos) return;
  const float low = r.pos_low[i];
  out.pos[to] = static_cast<float>(
      kind == Positives::kLinear ? total(r.pos[i], low) - r.pos_sum[i] * shift
                                 : r.pos[i] - shift + std::log(total(r.pos_sum[i], low)));
}

float no_positives(Positives kind) { return kind == Positives::kLse ? -kInf : 0.0f; }

RunningStats from(RunningStats r, int64_t first) {
  for (float** x : {&r.max, &r.sum, &r.low, &r.pos, &r.pos_sum, &r.pos_low, &r.neg_max})
    if (*x) *x += first;
  return r;
}

}  // namespace

void Call::reset(const RunningStats& r, int64_t n) const {
  std::fill_n(r.max, n, -kInf);
  for (float* x : {r.sum, r.low, r.pos_sum, r.pos_low})
    if (x) std::fill_n(x, n, 0.0f);
  if (r.pos) std::fill_n(r.pos, n, no_positives(p_.positives));
  if (r.neg_max) std::fill_n(r.neg_max, n, -kInf);
}

// The row block's statistics in ws.row; its part of the columns' added to ws.col.
void Call::forward_row_block(Workspace& ws, int64_t row_block, const Stats& stats) {
  reset(ws.row, rows_ + kSlack);
  for_each_tile(ws, row_block, [&](Tile& t, const TileIndex& at) {
    // S overwrites the inner products, and is -inf where a pair is excluded. The cache wants them
    // whole, and so do the positives of "lse".
    if (float* const kept = place_in_cache(at))
      t.dots = kept;
    else if (!t.plain)
      t.dots = ws.dots;
    ForwardTile f{p_.positives, p_.hardest, ws.row, from(ws.col, plan_.cols.begin(at.col_block))};
    if (plan_.both_sides(at)) {  // the columns' statistics are the rows' again
      f.col = ws.unread;
      reset(f.col, t.cols);
    }
    k_.forward(t, f);
  });
  if (plan_.half || !p_.rows) return;
  const int64_t first = plan_.rows.begin(row_block);
  for (int64_t i = 0; i < plan_.rows.size(row_block); ++i)
    finish(ws.row, i, p_.positives, stats.row, first + i);
}

void Call::forward(const Stats& stats, TileCache cache) {
  pack_columns();
  open_cache(cache, true, false);
  run_parallel(plan_.threads, [&](int thread) {
    Workspace& ws = workspaces_[thread];
    reset(ws.col, columns_);
    for (int64_t b = thread; b < plan_.rows.count; b += plan_.threads) {
      pack_rows(ws, b);
      forward_row_block(ws, b, stats);
      // Symmetric: tiles that are left out would have given their rows what others give columns.
      for (int64_t i = 0; plan_.half && i < plan_.rows.size(b); ++i)
        merge(ws.col, plan_.rows.begin(b) + i, ws.row, i, p_.positives);
    }
  });
  if (plan_.half && p_.rows) finish_columns(stats.row);
  if (p_.cols) finish_columns(stats.col);
}

// Merges the threads' statistics of the columns, always in the same order.
void Call::finish_columns(const SideStats& out) {
  run_parallel(plan_.threads, [&](int thread) {
    const int64_t m = p_.b.rows, share = ceil_div(m, plan_.threads);
    for (int64_t j = thread * share; j < std::min(m, (thread + 1) * share); ++j) {
      float max, sum, low, pos, pos_sum, pos_low, neg_max;
      const RunningStats total = {&max, &sum, &low, &pos, &pos_sum, &pos_low, &neg_max};
      reset(total, 1);
      for (const Workspace& ws : workspaces_) merge(total, 0, ws.col, j, p_.positives);
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
