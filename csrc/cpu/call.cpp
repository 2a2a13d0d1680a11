#include "cpu/call.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/info.hpp"
#include "cpu/threads.hpp"

namespace ito::cpu {
namespace {

std::atomic<int64_t> total_flops{0};

// Asked once: in a virtual machine the question traps and takes 13 µs.
int64_t l2_bytes() {
  static const int64_t bytes = info().l2_bytes;
  return bytes;
}

// S equals its transpose, biases and ids included.
bool symmetric(const Problem& p) {
  if (!p.self || p.scale_per_row || p.row_bias || p.col_bias || p.row_limit || p.diagonal != 0)
    return false;
  return p.row_ids == p.col_ids ||
         (p.row_ids && p.col_ids && std::equal(p.row_ids, p.row_ids + p.a.rows, p.col_ids));
}

// What is added to the scores of a row or column: its bias; -inf at padding and beyond the end.
std::vector<float> additive(const float* bias, const int64_t* ids, int64_t n) {
  std::vector<float> out(n + kSlack, -kInf);
  for (int64_t i = 0; i < n; ++i)
    if (!ids || ids[i] >= 0) out[i] = bias ? bias[i] : 0.0f;
  return out;
}

// How the tiles of a cache were cut. Another number of threads or another instruction set cuts them
// differently: such a cache is not read, the inner products are computed again.
struct CacheHeader {
  int64_t row_blocks, col_blocks, threads, half, col_panel, row_align;
  const Kernels* kernels;
  int64_t magic;
};
static_assert(sizeof(CacheHeader) == 64, "what follows it stays aligned");

}  // namespace

Call::Call(const Problem& problem, const Run& run, Wants wants, const Grads& grads)
    : p_(problem),
      k_(*run.kernels),
      grads_(grads),
      wants_(wants),
      plan_(make_plan(p_, k_, run.threads, l2_bytes(), wants.symmetry && symmetric(p_))),
      keys_(wants.keys ? std::make_unique<Keys>(p_, plan_) : nullptr),
      width_(round_up(p_.a.width, k_.width_align)),
      columns_(round_up(p_.b.rows, k_.col_panel)),
      rows_(static_cast<int>(round_up(plan_.rows.largest(), 2 * kVector))),  // any row_align
      cols_(static_cast<int>(round_up(plan_.cols.largest(), k_.col_panel))),
      scale_(p_.a.rows + kSlack),
      row_add_(additive(p_.row_bias, p_.row_ids, p_.a.rows)),
      col_add_(additive(p_.col_bias, p_.col_ids, p_.b.rows)),
      workspaces_(plan_.threads) {
  for (int64_t i = 0; i < p_.a.rows; ++i) scale_[i] = p_.scale[p_.scale_per_row ? i : 0];
  for (Workspace& ws : workspaces_) allocate(ws);
  if (grads_.scale)
    scale_rows_ = p_.scale_per_row ? grads_.scale : arena_.get<float>(p_.a.rows);
}

// After each row block, so that others can see how far a call is.
void Call::count(Workspace& ws) {
  total_flops.fetch_add(std::exchange(ws.flops, 0), std::memory_order_relaxed);
}

int64_t gemm_flops() { return total_flops; }

RunningStats Call::running_stats(int64_t n, bool positives, bool negatives) {
  RunningStats r;
  r.max = arena_.get<float>(n);
  r.sum = arena_.get<float>(n);
  r.low = arena_.get<float>(n);
  if (positives)
    for (float** x : {&r.pos, &r.pos_sum, &r.pos_low}) *x = arena_.get<float>(n);
  if (negatives) r.neg_max = arena_.get<float>(n);
  return r;
}

void Call::allocate(Workspace& ws) {
  const int64_t area = int64_t(rows_) * cols_;
  ws.a = arena_.get<char>(round_up(rows_, k_.row_panel) * width_ * k_.element * k_.row_layouts);
  ws.scores = arena_.get<float>(area);
  ws.scratch = arena_.get<float>(kScratch * (int64_t(rows_) + cols_));
  if (wants_.statistics) {
    const bool positives = p_.positives != Positives::kNone;
    ws.dots = arena_.get<float>(area);
    ws.row = running_stats(rows_ + kSlack, positives, p_.hardest);
    ws.col = running_stats(columns_, positives, p_.hardest);
    if (plan_.half) ws.unread = running_stats(cols_, positives, p_.hardest);
  }
  ws.row_loss = arena_.get<double>(rows_);
  if (!wants_.gradients) return;
  ws.row_side.reserve(rows_);
  ws.operand = arena_.get<char>(area * k_.operand_bytes);
  if (row_products()) ws.da = arena_.get<float>(rows_ * round_up(p_.a.width, k_.col_panel));
  if (grads_.scale) ws.row_scale = arena_.get<double>(rows_);
  if (grads_.row_bias) ws.row_bias = arena_.get<double>(rows_);
  if (grads_.col_bias) ws.col_bias = arena_.get<double>(columns_);
}

void Call::pack_columns() {
  if (b_scores_) return;  // by the forward pass of this call
  b_scores_ = arena_.get<char>(columns_ * width_ * k_.element);
  const int64_t grad_panel = columns_ * k_.col_panel;  // elements
  if (wants_.gradients && row_products())
    b_grad_ = arena_.get<char>(grad_panel * ceil_div(p_.a.width, k_.col_panel) * k_.element);
  const uint8_t* skip = keys_ && !keys_->col_skip.empty() ? keys_->col_skip.data() : nullptr;
  run_parallel(plan_.threads, [&](int thread) {
    for (int64_t panel = thread; panel < columns_ / k_.col_panel; panel += plan_.threads)
      k_.pack_cols(p_.b, skip, panel, b_scores_, b_grad_, grad_panel);
  });
}

void Call::pack_rows(Workspace& ws, int64_t row_block) const {
  if (ws.packed == row_block) return;  // the thread's only row block, by this call's forward pass
  ws.packed = row_block;
  const uint8_t* skip = keys_ && !keys_->row_skip.empty() ? keys_->row_skip.data() : nullptr;
  k_.pack_rows(p_.a, skip, plan_.rows.begin(row_block),
               static_cast<int>(plan_.rows.size(row_block)), ws.a);
}

TileCache Call::new_cache(int64_t bytes) { return {arena_.get<char>(bytes), bytes}; }

Tile Call::tile(const Workspace& ws, const TileIndex& at) const {
  const int64_t i = plan_.rows.begin(at.row_block), j = plan_.cols.begin(at.col_block);
  Tile t;
  t.rows = static_cast<int>(plan_.rows.size(at.row_block));
  t.cols = static_cast<int>(round_up(plan_.cols.size(at.col_block), k_.col_panel));
  t.real_cols = static_cast<int>(plan_.cols.size(at.col_block));
  t.width = static_cast<int>(p_.a.width);
  t.a = ws.a;
  t.b = b_scores_ + j * width_ * k_.element;
  t.scores = t.dots = ws.scores;
  t.operand = ws.operand;
  t.scratch = ws.scratch;
  t.scale = scale_.data() + i;
  t.row_add = row_add_.data() + i;
  t.col_add = col_add_.data() + j;
  if (!keys_) return t;
  t.exclude_self =
      p_.exclude_self && crosses_diagonal(plan_, at.row_block, at.col_block, p_.diagonal);
  t.exclude_positives = p_.exclude_positives;
  if (p_.row_limit) t.row_limit = p_.row_limit + i;
  t.plain = !t.exclude_self && !t.row_limit && !keys_->positives(at.row_block, at.col_block);
  t.row_keys = keys_->row_keys.data() + i;
  t.col_keys = keys_->col_keys.data() + j;
  t.self_column = i + p_.diagonal - j;
  return t;
}

// Row blocks of one thread share their place if the cache need not outlive a row block.
void Call::open_cache(TileCache cache, bool write, bool per_thread) {
  cache_per_thread_ = per_thread;
  int64_t rows = 0;
  cached_rows_.assign(plan_.rows.count, 0);
  for (int64_t block = 0; block < plan_.rows.count; ++block) {
    const int64_t size =
        per_thread ? round_up(plan_.rows.largest(), k_.row_align) : stored_rows(block);
    const bool shares = per_thread && block >= plan_.threads;
    cached_rows_[block] = shares ? cached_rows_[block - plan_.threads] : rows;
    if (!shares) rows += size;
  }
  const int64_t room = cache.bytes - static_cast<int64_t>(sizeof(CacheHeader));
  const int64_t bytes_per_tile = rows * cols_ * static_cast<int64_t>(sizeof(float));
  cached_tiles_ = std::min<int64_t>(plan_.tiles(), room / bytes_per_tile);
  if (!cache.data || cached_tiles_ <= 0) {
    cached_tiles_ = 0;
    // fresh memory may hold the header of an earlier call: backward must not believe it
    if (write && room >= 0) std::memset(cache.data, 0, sizeof(CacheHeader));
    return;
  }
  cache_ = static_cast<float*>(cache.data) + sizeof(CacheHeader) / sizeof(float);
  const CacheHeader header = {plan_.rows.count, plan_.cols.count, plan_.threads, plan_.half,
                              k_.col_panel,     k_.row_align,     &k_,           0x6974636b};
  if (write) {
    prefer_huge_pages(cache.data, cache.bytes);
    std::memcpy(cache.data, &header, sizeof header);
  } else if (std::memcmp(cache.data, &header, sizeof header) != 0) {
    cached_tiles_ = 0;
  }
}

// Where the tile's inner products are kept; null if they are not.
float* Call::place_in_cache(const TileIndex& at) const {
  if (at.offset >= cached_tiles_) return nullptr;
  return cache_ + (cached_rows_[at.row_block] * cached_tiles_ +
                   at.offset * stored_rows(at.row_block)) * cols_;
}

// What the thread reads after the n-th tile of a row block.
void Call::expect_next(Tile& t, int64_t row_block, int64_t n) const {
  if (++n == plan_.tiles(row_block)) n = 0, row_block += plan_.threads;
  if (row_block >= plan_.rows.count) return;
  const TileIndex next = plan_.tile(row_block, n);
  t.next_dots = place_in_cache(next);
  t.next_bytes = stored_rows(row_block) * round_up(plan_.cols.size(next.col_block), k_.col_panel) *
                 static_cast<int64_t>(sizeof(float));
}

std::string describe(const Problem& problem, const Run& run) {
  const Plan plan = make_plan(problem, *run.kernels, run.threads, l2_bytes(),
                              symmetric(problem));
  return std::string(run.kernels->name) + ", " + run.kernels->arithmetic + " products, tiles of " +
         std::to_string(plan.rows.largest()) + " x " + std::to_string(plan.cols.largest()) + ", " +
         std::to_string(plan.threads) + " of " + std::to_string(run.threads) + " threads (" +
         thread_provider() + ")" + (plan.half ? ", half of the tiles" : "");
}

}  // namespace ito::cpu
