// Gradients of the logsumexp, and softplus with its gradients: from each tile W = ∂L/∂S, then the
// products of W with the features.
#include <algorithm>
#include <numeric>
#include <thread>

#include "cpu/call.hpp"
#include "cpu/threads.hpp"

namespace ito::cpu {
namespace {

// Σ weight · value. A weight of 0 for a value of -inf adds nothing.
double weighted(const float* weight, const float* value, int64_t n) {
  double total = 0;
  for (int64_t i = 0; weight && i < n; ++i)
    if (weight[i] != 0 || value[i] != -kInf) total += static_cast<double>(weight[i]) * value[i];
  return total;
}

bool wanted(const Grads& g) { return g.a || g.b || g.scale || g.row_bias || g.col_bias; }

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

template <class T>
T* from(T* p, int64_t first) {
  return p ? p + first : nullptr;
}
SideStats from(const SideStats& s, int64_t first) {
  return {from(s.max, first), from(s.logsum, first), from(s.pos, first), nullptr};
}
SideUpstream from(const SideUpstream& up, int64_t first) {
  return {from(up.logsum, first), from(up.pos, first)};
}

// The same over the memory of a vector.
SideStats stats_in(std::vector<float>& memory, int64_t n, bool positives) {
  memory.resize(3 * n);
  float* const max = memory.data();
  return {max, max + n, positives ? max + 2 * n : nullptr, nullptr};
}

}  // namespace

BackwardSide Call::SideVectors::from(int64_t first) const {
  const auto at = [first](const std::vector<float>& v) {
    return v.empty() ? nullptr : v.data() + first;
  };
  return {at(shift), at(logsum), at(factor), at(pos), at(pos_factor)};
}

void Call::SideVectors::reserve(int64_t n) {
  for (std::vector<float>* v : {&shift, &logsum, &factor, &pos, &pos_factor})
    v->reserve(n + kSlack);
}

// A row that allows no pair gets factor 0 and logsum +inf: every exp(S - shift - logsum) is 0. So
// does one without a positive, or with scores of -inf at all of them, which -inf would make NaN.
void Call::SideVectors::fill(const SideStats& stats, const SideUpstream& up, int64_t n) {
  const float *const u = up.logsum, *const alpha = up.pos;
  if (!u && !alpha) return;
  const auto make = [n](std::vector<float>& v, float beyond) { v.assign(n + kSlack, beyond); };
  make(shift, 0);
  make(logsum, kInf);
  if (u) make(factor, 0);
  if (alpha) make(pos_factor, 0);
  if (alpha && stats.pos) make(pos, 0);
  for (int64_t i = 0; i < n; ++i) {
    const bool empty = stats.max[i] == -kInf && stats.logsum[i] == -kInf;
    shift[i] = stats.max[i] == -kInf ? 0 : stats.max[i];
    if (!empty) logsum[i] = stats.logsum[i];
    if (u && !empty) factor[i] = u[i];
    if (alpha) pos_factor[i] = alpha[i];
    if (alpha && stats.pos) pos[i] = stats.pos[i] == -kInf ? kInf : stats.pos[i];
  }
}

// S and its statistics are symmetric. The gradient of both sides together is that of W + Wᵀ: the
// same vectors on both sides, with the rows' and the columns' upstream gradients added.
void Call::symmetric_sides(const Stats& stats, const Upstream& up, SideVectors& row,
                           SideVectors& col) const {
  const int64_t n = p_.a.rows;
  const auto sum = [n](const float* x, const float* y, std::vector<float>& out) -> const float* {
    if (!x || !y) return x ? x : y;
    out.resize(n);
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] + y[i];
    return out.data();
  };
  std::vector<float> u, alpha;
  const SideUpstream both = {sum(up.row.logsum, up.col.logsum, u),
                             sum(up.row.pos, up.col.pos, alpha)};
  row.fill(p_.rows ? stats.row : stats.col, both, n);
  col = row;
}

// Calls work(add) when it is the tile's turn. The first in turn finds an accumulator that nobody
// has cleared: it replaces what is there.
template <class Work>
void Call::in_turn(int64_t col_block, int turn, Work work) {
  std::atomic<int>& now = next_turn_[col_block];
  for (int spins = 0; now.load(std::memory_order_acquire) != turn; ++spins) {
    relax();
    if (spins > 4096) std::this_thread::yield();  // another process has the other thread's core
  }
  work(turn > 0);
  now.store(turn + 1, std::memory_order_release);
}

void Call::start_row_gradients(const Workspace& ws) {
  for (double* x : {ws.row_scale, ws.row_bias})
    if (x) std::fill_n(x, rows_, 0.0);
}

GradientSums Call::gradient_sums(const Workspace& ws, const TileIndex& at) const {
  return {ws.row_scale, ws.row_bias, from(ws.col_bias, plan_.cols.begin(at.col_block))};
}

void Call::add_products(Workspace& ws, const Tile& t, const TileIndex& at) {
  const int64_t j = plan_.cols.begin(at.col_block);
  if (row_products()) {
    ws.flops += product_flops(at);
    k_.grad_rows(t, b_grad_ + j * k_.col_panel * k_.element, columns_ * k_.col_panel, ws.da,
                 !at.first);
  }
  if (!col_products() || plan_.both_sides(at)) return;
  ws.flops += product_flops(at);
  in_turn(at.col_block, turns_->of(at),
          [&](bool add) { k_.grad_cols(t, ws.a, acc_ + j * width_, add); });
}

void Call::finish_row_gradients(const Workspace& ws, int64_t row_block) {
  const int n = static_cast<int>(plan_.rows.size(row_block));
  const int64_t first = plan_.rows.begin(row_block);
  if (ws.row_scale) std::copy_n(ws.row_scale, n, scale_rows_ + first);
  if (ws.row_bias) std::copy_n(ws.row_bias, n, grads_.row_bias + first);
  if (!row_products()) return;
  const int stride = static_cast<int>(round_up(n, k_.row_align));
  const int width = static_cast<int>(p_.a.width), packed = static_cast<int>(width_);
  if (p_.self)  // both sides' gradients are added in fp32 and rounded once
    in_turn(row_block, turns_->of_rows(row_block), [&](bool add) {
      k_.fold_rows(ws.da, stride, n, width, acc_ + first * width_, packed, add);
    });
  else
    k_.store_rows(ws.da, stride, n, {grads_.a, p_.a.rows, p_.a.width, p_.a.width, p_.a.dtype},
                  first);
}

void Call::finish_scale_gradient() {
  if (!grads_.scale || p_.scale_per_row) return;
  *grads_.scale = static_cast<float>(
      std::accumulate(scale_rows_, scale_rows_ + p_.a.rows, 0.0));
}

void Call::finish_col_gradients() {
  // before the result is touched: they are not needed at the same time
  if (acc_ != reinterpret_cast<float*>(b_scores_)) arena_.release(b_scores_);
  arena_.release(b_grad_);
  void* out = p_.self ? grads_.a : grads_.b;
  const Matrix to = {out, p_.b.rows, p_.b.width, p_.b.width, p_.b.dtype};
  run_parallel(plan_.threads, [&](int thread) {
    for (int64_t panel = thread; out && panel < columns_ / k_.col_panel; panel += plan_.threads)
      k_.store_cols(acc_ + panel * k_.col_panel * width_, to, panel);
    if (!grads_.col_bias) return;
    const int64_t m = p_.b.rows, share = ceil_div(m, plan_.threads);
    for (int64_t j = thread * share; j < std::min(m, (thread + 1) * share); ++j) {
      double sum = 0;
      for (const Workspace& ws : workspaces_) sum += ws.col_bias[j];
      grads_.col_bias[j] = static_cast<float>(sum);
    }
  });
}

void Call::start_gradients() {
  const int64_t bytes = p_.a.width * (p_.a.dtype == DType::kFloat32 ? 4 : 2);
  prefer_huge_pages(grads_.a, p_.a.rows * bytes);
  prefer_huge_pages(grads_.b, p_.b.rows * bytes);
  turns_ = std::make_unique<Turns>(plan_);
  next_turn_ = std::make_unique<std::atomic<int>[]>(plan_.cols.count);
  for (int64_t j = 0; j < plan_.cols.count; ++j) next_turn_[j] = 0;
  pack_columns();
  // Where every tile was kept, nobody reads the columns packed for scores again, and their gradient
  // takes their place. For small batches that is a quarter less memory to bring into the cache.
  const bool unread = cached_tiles_ == plan_.tiles() && !cache_per_thread_;
  if (col_products())
    acc_ = unread && k_.element == sizeof(float) ? reinterpret_cast<float*>(b_scores_)
                                                 : arena_.get<float>(columns_ * width_);
  if (!grads_.col_bias) return;
  for (const Workspace& ws : workspaces_) std::fill_n(ws.col_bias, columns_, 0.0);
}

void Call::backward(const Stats& stats, const Upstream& up, TileCache cache, bool one_pass) {
  SideVectors row_side, col_side;
  if (!one_pass && plan_.half) {
    symmetric_sides(stats, up, row_side, col_side);
  } else if (!one_pass) {
    if (p_.rows) row_side.fill(stats.row, up.row, p_.a.rows);
    if (p_.cols) col_side.fill(stats.col, up.col, p_.b.rows);
  }
  open_cache(cache, one_pass, one_pass);
  start_gradients();
  run_parallel(plan_.threads, [&](int thread) {
    Workspace& ws = workspaces_[thread];
    if (one_pass) reset(ws.col, columns_);
    for (int64_t b = thread; b < plan_.rows.count; b += plan_.threads) {
      const int64_t first = plan_.rows.begin(b);
      pack_rows(ws, b);
      start_row_gradients(ws);
      if (one_pass) {
        forward_row_block(ws, b, stats);
        ws.row_side.fill(from(stats.row, first), from(up.row, first), plan_.rows.size(b));
      }
      for_each_tile(ws, b, [&](Tile& t, const TileIndex& at) {
        if (float* const kept = place_in_cache(at)) t.dots = kept, t.have_dots = true;
        BackwardTile w;
        w.row = one_pass ? ws.row_side.from(0) : row_side.from(first);
        w.col = col_side.from(plan_.cols.begin(at.col_block));
        w.lse = p_.positives == Positives::kLse;
        w.sums = gradient_sums(ws, at);
        // Of a symmetric problem the tile holds W + Wᵀ. Off the diagonal it stands for two tiles;
        // on it, it counts every pair twice.
        w.scale_part = plan_.both_sides(at) ? 0.5f : 1.0f;
        k_.weights(t, w);
        add_products(ws, t, at);
      });
      finish_row_gradients(ws, b);
    }
  });
  finish_scale_gradient();
  finish_col_gradients();
}

void Call::softplus(float* loss, const float* u) {
  if (!wants_.gradients) u = nullptr;
  if (u)
    start_gradients();
  else
    pack_columns();
  run_parallel(plan_.threads, [&](int thread) {
    Workspace& ws = workspaces_[thread];
    for (int64_t b = thread; b < plan_.rows.count; b += plan_.threads) {
      const int64_t first = plan_.rows.begin(b);
      pack_rows(ws, b);
      if (loss) std::fill_n(ws.row_loss, rows_, 0.0);
      if (u) start_row_gradients(ws);
      for_each_tile(ws, b, [&](Tile& t, const TileIndex& at) {
        k_.softplus(t, {from(u, first), loss ? ws.row_loss : nullptr, gradient_sums(ws, at)});
        if (u) add_products(ws, t, at);
      });
      if (loss) std::copy_n(ws.row_loss, plan_.rows.size(b), loss + first);
      if (u) finish_row_gradients(ws, b);
    }
  });
  if (!u) return;
  finish_scale_gradient();
  finish_col_gradients();
}

void logsumexp_backward(const Problem& p, const Stats& stats, const Upstream& up,
                        const Grads& grads, TileCache cache, const Run& run) {
  Call::Wants wants;
  wants.keys = p.row_ids || p.exclude_self || p.exclude_positives || p.row_limit || up.row.pos ||
               up.col.pos;
  wants.gradients = wants.symmetry = true;
  Call(p, run, wants, grads).backward(stats, up, cache, false);
}

void logsumexp_both(const Problem& p, Stats stats, const Upstream& up, const Grads& grads,
                    float* total, TileCache cache, const Run& run) {
  Call::Wants wants;
  wants.keys = p.row_ids || p.exclude_self || p.exclude_positives || p.row_limit || p.hardest ||
               p.positives != Positives::kNone;
  wants.statistics = true;
  wants.gradients = wanted(grads);
  // Columns need every row first. Of a symmetric problem, half of the tiles twice are less than all
  // of them once.
  const bool one_pass = wants.gradients && !p.cols && !p.self;
  wants.symmetry = !one_pass;
  const int64_t n = p.a.rows, m = p.b.rows;
  std::vector<float> rows, cols;  // backward reads statistics even where the caller wants none
  if (!stats.row.logsum && !stats.col.logsum) {
    const bool positives = p.positives != Positives::kNone;
    if (p.rows) stats.row = stats_in(rows, n, positives);
    if (p.cols) stats.col = stats_in(cols, m, positives);
  }
  Call call(p, run, wants, grads);
  if (!cache.data) cache = call.new_cache(cache.bytes);
  if (!one_pass) call.forward(stats, cache);
  if (wants.gradients) call.backward(stats, up, cache, one_pass);
  *total = static_cast<float>(
      weighted(up.row.logsum, stats.row.logsum, n) + weighted(up.row.pos, stats.row.pos, n) +
      weighted(up.col.logsum, stats.col.logsum, m) + weighted(up.col.pos, stats.col.pos, m));
}

void softplus(const Problem& p, float* loss, const float* u, const Grads& grads, float* total,
              const Run& run) {
  Call::Wants wants;
  wants.keys = true;
  wants.gradients = wanted(grads);
  std::vector<float> rows;
  if (total && !loss) {
    rows.resize(p.a.rows);
    loss = rows.data();
  }
  Call(p, run, wants, grads).softplus(loss, u);
  if (total) *total = static_cast<float>(weighted(u, loss, p.a.rows));
}

}  // namespace ito::cpu
