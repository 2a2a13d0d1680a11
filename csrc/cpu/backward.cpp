#include <algorithm>
#include <cstring>
#include <limits>
#include <thread>

#include "cpu/call.hpp"

namespace ito::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Σ weight · value, without those of weight 0 and value -inf: there is nothing to sum.
double weighted(const float* weight, const float* value, int64_t n) {
  double total = 0;
  for (int64_t i = 0; weight && i < n; ++i)
    if (weight[i] != 0 || value[i] != -kInf) total += static_cast<double>(weight[i]) * value[i];
  return total;
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Side Call::SideVectors::at(int64_t i) const {
  const auto from = [i](const std::vector<float>& v) { return v.empty() ? nullptr : v.data() + i; };
  return {from(shift), from(logsum), from(factor), from(pos), from(pos_factor)};
}

void Call::SideVectors::reserve(int64_t n) {
  for (std::vector<float>* v : {&shift, &logsum, &factor, &pos, &pos_factor}) v->reserve(n + kSlack);
}

// Where nothing is allowed the factor is 0 and logsum +inf: every exponential of it is 0.
void Call::fill(SideVectors& out, const SideStats& stats, const SideUpstream& up, int64_t n) {
  const float *const u = up.logsum, *const alpha = up.pos;
  if (!u && !alpha) return;
  const auto make = [n](std::vector<float>& v, float beyond) { v.assign(n + kSlack, beyond); };
  make(out.shift, 0);
  make(out.logsum, kInf);
  if (u) make(out.factor, 0);
  if (alpha) make(out.pos_factor, 0);
  if (alpha && stats.pos) make(out.pos, 0);
  for (int64_t i = 0; i < n; ++i) {
    const bool empty = stats.max[i] == -kInf && stats.logsum[i] == -kInf;
    out.shift[i] = stats.max[i] == -kInf ? 0 : stats.max[i];
    if (!empty) out.logsum[i] = stats.logsum[i];
    if (u && !empty) out.factor[i] = u[i];
    if (alpha) out.pos_factor[i] = alpha[i];
    if (alpha && stats.pos) out.pos[i] = stats.pos[i];
  }
}

// S and its statistics are symmetric, so the gradient of both sides together is that of W + Wᵀ:
// the same vectors stand on both sides, the rows' and columns' upstream gradients added.
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
  fill(row, p_.rows ? stats.row : stats.col, both, n);
  col = row;
}

// The first in turn finds an accumulator that nobody has cleared.
template <class Work>
void Call::in_turn(int64_t column, int turn, Work work) {
  std::atomic<int>& taken = taken_[column];
  for (int spins = 0; taken.load(std::memory_order_acquire) != turn; ++spins) {
    relax();
    if (spins > 4096) std::this_thread::yield();  // another process has the other thread's core
  }
  work(turn > 0);
  taken.store(turn + 1, std::memory_order_release);
}

void Call::start_row_gradients(int64_t row) {
  const int64_t first = plan_.rows.begin(row), n = plan_.rows.size(row);
  if (grads_.scale) std::fill_n(grads_.scale + first, n, 0.0f);
  if (grads_.row_bias) std::fill_n(grads_.row_bias + first, n, 0.0f);
}

void Call::add_products(Lane& lane, const Tile& t, int64_t row, int64_t at) {
  const int64_t step = plan_.step(row, at);
  const int64_t column = plan_.column(row, step), j = plan_.cols.begin(column);
  if (row_products()) {
    count_product(lane, row, step);
    k_.grad_rows(t, b_grad_ + j * k_.panel * k_.element, columns_ * k_.panel, lane.da, at > 0);
  }
  if (!col_products() || plan_.both_sides(step)) return;
  count_product(lane, row, step);
  in_turn(column, turns_->of(row, step),
          [&](bool add) { k_.grad_cols(t, lane.a, acc_ + j * width_, add); });
}

void Call::finish_row_gradients(const Lane& lane, int64_t row) {
  if (!row_products()) return;
  const int n = static_cast<int>(plan_.rows.size(row));
  const int stride = static_cast<int>(round_up(n, k_.row_align));
  const int width = static_cast<int>(p_.a.width), packed = static_cast<int>(width_);
  const int64_t first = plan_.rows.begin(row);
  if (p_.self)  // both sides' gradient is rounded once: it is added up in fp32
    in_turn(row, turns_->of_rows(row), [&](bool add) {
      k_.fold_rows(lane.da, stride, n, width, acc_ + first * width_, packed, add);
    });
  else
    k_.store_rows(lane.da, stride, n, {grads_.a, p_.a.rows, p_.a.width, p_.a.width, p_.a.dtype},
                  first);
}

void Call::finish_col_gradients() {
  // before the result is touched: they are not needed at the same time
  if (acc_ != reinterpret_cast<float*>(b_scores_)) arena_.release(b_scores_);
  arena_.release(b_grad_);
  void* out = p_.self ? grads_.a : grads_.b;
  const Matrix to = {out, p_.b.rows, p_.b.width, p_.b.width, p_.b.dtype};
  parallel([&](int thread) {
    for (int64_t panel = thread; out && panel < columns_ / k_.panel; panel += plan_.threads)
      k_.store_cols(acc_ + panel * k_.panel * width_, to, panel);
    if (!grads_.col_bias) return;
    const int64_t m = p_.b.rows, share = (m + plan_.threads - 1) / plan_.threads;
    for (int64_t j = thread * share; j < std::min(m, (thread + 1) * share); ++j) {
      grads_.col_bias[j] = 0;
      for (const Lane& lane : lanes_) grads_.col_bias[j] += lane.col_sum[j];
    }
  });
}

void Call::start_gradients() {
  const int64_t bytes = p_.a.width * (p_.a.dtype == DType::kFloat32 ? 4 : 2);
  prefer_huge_pages(grads_.a, p_.a.rows * bytes);
  prefer_huge_pages(grads_.b, p_.b.rows * bytes);
  turns_ = std::make_unique<Turns>(plan_);
  taken_ = std::make_unique<std::atomic<int>[]>(plan_.cols.count);
  for (int64_t j = 0; j < plan_.cols.count; ++j) taken_[j] = 0;
  pack_columns();
  // Where every score was kept, nobody reads the columns' form for scores again: for small batches
  // a quarter of the memory that has to come back into the cache.
  const bool unread = cached_steps_ == plan_.steps() && !cache_per_thread_;
  if (col_products())
    acc_ = unread && k_.element == sizeof(float) ? reinterpret_cast<float*>(b_scores_)
                                                 : arena_.get<float>(columns_ * width_);
  if (!grads_.col_bias) return;
  for (const Lane& lane : lanes_) std::fill_n(lane.col_sum, columns_, 0.0f);
}

void Call::backward(const Stats& stats, const Upstream& up, TileCache cache, bool one_pass) {
  SideVectors row_side, col_side;
  if (!one_pass && plan_.half) {
    symmetric_sides(stats, up, row_side, col_side);
  } else if (!one_pass) {
    if (p_.rows) fill(row_side, stats.row, up.row, p_.a.rows);
    if (p_.cols) fill(col_side, stats.col, up.col, p_.b.rows);
  }
  open_cache(cache, one_pass, one_pass);
  start_gradients();
  parallel([&](int thread) {
    Lane& lane = lanes_[thread];
    if (one_pass) reset(lane.col, columns_);
    for (int64_t row = thread; row < plan_.rows.count; row += plan_.threads) {
      pack_rows(lane, row);
      start_row_gradients(row);
      const int64_t first = plan_.rows.begin(row);
      if (one_pass) {
        forward_rows(lane, row, stats, true);
        const SideStats& s = stats.row;
        fill(lane.own,
             {s.max + first, s.logsum + first, s.pos ? s.pos + first : nullptr, nullptr},
             {up.row.logsum ? up.row.logsum + first : nullptr,
              up.row.pos ? up.row.pos + first : nullptr},
             plan_.rows.size(row));
      }
      for (int64_t at = 0; at < plan_.steps(row); ++at) {
        const int64_t step = plan_.step(row, at);
        Tile t = tile(lane, row, step);
        t.have_dots = use_cache(t, row, step);
        if (!t.have_dots) count_product(lane, row, step);
        const int64_t j = plan_.cols.begin(plan_.column(row, step));
        BackwardTile b;
        b.row = one_pass ? lane.own.at(0) : row_side.at(first);
        b.col = col_side.at(j);
        b.lse = p_.positives == Positives::kLse;
        b.scale = grads_.scale ? grads_.scale + first : nullptr;
        // Σ W·dot over both halves of a symmetric W + Wᵀ counts every pair twice, and a tile off
        // the diagonal stands for two.
        b.scale_part = plan_.both_sides(step) ? 0.5f : 1.0f;
        b.row_sum = grads_.row_bias ? grads_.row_bias + first : nullptr;
        b.col_sum = lane.col_sum ? lane.col_sum + j : nullptr;
        k_.weights(t, b);
        add_products(lane, t, row, at);
      }
      finish_row_gradients(lane, row);
    }
  });
  finish_col_gradients();
}

void Call::softplus(float* loss, const float* u) {
  if (u)
    start_gradients();
  else
    pack_columns();
  parallel([&](int thread) {
    Lane& lane = lanes_[thread];
    for (int64_t row = thread; row < plan_.rows.count; row += plan_.threads) {
      pack_rows(lane, row);
      const int64_t first = plan_.rows.begin(row);
      if (loss) std::fill_n(loss + first, plan_.rows.size(row), 0.0f);
      if (u) start_row_gradients(row);
      for (int64_t at = 0; at < plan_.steps(row); ++at) {
        const int64_t step = plan_.step(row, at);
        const Tile t = tile(lane, row, step);
        count_product(lane, row, step);
        const int64_t j = plan_.cols.begin(plan_.column(row, step));
        SoftplusTile s;
        s.u = u ? u + first : nullptr;
        s.row_loss = loss ? loss + first : nullptr;
        s.scale = grads_.scale ? grads_.scale + first : nullptr;
        s.row_sum = grads_.row_bias ? grads_.row_bias + first : nullptr;
        s.col_sum = lane.col_sum ? lane.col_sum + j : nullptr;
        k_.softplus(t, s);
        if (u) add_products(lane, t, row, at);
      }
      if (u) finish_row_gradients(lane, row);
    }
  });
  if (u) finish_col_gradients();
}

void logsumexp_backward(const Problem& p, const Stats& stats, const Upstream& up,
                        const Grads& grads, TileCache cache, const Run& run) {
  Call::Wants wants;
  wants.keys = p.row_ids || p.exclude_self || p.exclude_positives || p.row_limit || up.row.pos ||
               up.col.pos;
  wants.gradients = true;
  wants.symmetry = true;
  Call(p, run, wants, grads).backward(stats, up, cache, false);
}

void logsumexp_both(const Problem& p, Stats stats, const Upstream& up, const Grads& grads,
                    float* total, TileCache cache, const Run& run) {
  Call::Wants wants;
  wants.keys = p.row_ids || p.exclude_self || p.exclude_positives || p.row_limit || p.hardest ||
               p.positives != Positives::kNone;
  wants.statistics = wants.gradients = true;
  // Columns need every row first, and half of the tiles twice are less than all of them once.
  const bool one_pass = !p.cols && !p.self;
  wants.symmetry = !one_pass;
  const int64_t n = p.a.rows, m = p.b.rows;
  std::vector<float> own;  // backward reads them even where the caller does not want them
  if (!stats.row.logsum && !stats.col.logsum) {
    own.resize(3 * (n + m));
    const bool pos = p.positives != Positives::kNone;
    float* const at = own.data();
    if (p.rows) stats.row = {at, at + n, pos ? at + 2 * n : nullptr, nullptr};
    float* const col = at + 3 * n;
    if (p.cols) stats.col = {col, col + m, pos ? col + 2 * m : nullptr, nullptr};
  }
  Call call(p, run, wants, grads);
  if (!one_pass) call.forward(stats, cache);
  call.backward(stats, up, cache, one_pass);
  *total = static_cast<float>(
      weighted(up.row.logsum, stats.row.logsum, n) + weighted(up.row.pos, stats.row.pos, n) +
      weighted(up.col.logsum, stats.col.logsum, m) + weighted(up.col.pos, stats.col.pos, m));
}

void softplus(const Problem& p, float* loss, const float* u, const Grads& grads, const Run& run) {
  Call::Wants wants;
  wants.keys = true;
  wants.gradients = u != nullptr;
  Call(p, run, wants, grads).softplus(loss, u);
}

}  // namespace ito::cpu
