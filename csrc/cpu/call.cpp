#include "cpu/call.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/info.hpp"
#include "cpu/threads.hpp"

namespace ito::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

std::atomic<int64_t> product_flops{0};

// Asked once: a virtual machine traps the instruction that tells: 13 µs.
int64_t l2_bytes() {
  static const int64_t bytes = info().l2_bytes;
  return bytes;
}

// One tile serves both of its sides.
bool symmetric(const Problem& p) {
  if (!p.self || p.scale_per_row || p.row_bias || p.col_bias || p.row_limit || p.diagonal != 0)
    return false;
  return p.row_ids == p.col_ids ||
         (p.row_ids && p.col_ids && std::equal(p.row_ids, p.row_ids + p.a.rows, p.col_ids));
}

// What is added to the scores of a row or column: its bias, -inf at padding and beyond the end.
std::vector<float> additive(const float* bias, const int64_t* ids, int64_t n) {
  std::vector<float> out(n + kSlack, -kInf);
  for (int64_t i = 0; i < n; ++i)
    if (!ids || ids[i] >= 0) out[i] = bias ? bias[i] : 0.0f;
  return out;
}

// The geometry that a cache was written with. Another number of threads or instruction set cuts
// tiles differently: such a cache is not read, the scores are computed again.
struct CacheHeader {
  int64_t rows, cols, threads, half, panel, row_align;
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
      columns_(round_up(p_.b.rows, k_.panel)),
      rows_(static_cast<int>(round_up(plan_.rows.largest(), 32))),
      cols_(static_cast<int>(round_up(plan_.cols.largest(), k_.panel))),
      scale_(p_.a.rows + kSlack),
      row_add_(additive(p_.row_bias, p_.row_ids, p_.a.rows)),
      col_add_(additive(p_.col_bias, p_.col_ids, p_.b.rows)),
      lanes_(plan_.threads) {
  for (int64_t i = 0; i < p_.a.rows; ++i) scale_[i] = p_.scale[p_.scale_per_row ? i : 0];
  for (Lane& lane : lanes_) make_lane(lane);
}

Call::~Call() {
  for (const Lane& lane : lanes_) product_flops += lane.flops;
}

int64_t gemm_flops() { return product_flops; }

void Call::parallel(const std::function<void(int)>& work) const {
  run_parallel(plan_.threads, work);
}

void Call::make_lane(Lane& lane) {
  const int64_t area = int64_t(rows_) * cols_;
  lane.a = arena_.get<char>(round_up(rows_, k_.row_panel) * width_ * k_.element * k_.row_forms);
  lane.scores = arena_.get<float>(area);
  lane.scratch = arena_.get<float>(kScratch * (int64_t(rows_) + cols_));
  if (wants_.statistics) {
    lane.dots = arena_.get<float>(area);
    for (float** x : {&lane.row.max, &lane.row.sum, &lane.row.pos, &lane.row.aux, &lane.row.neg})
      *x = arena_.get<float>(rows_ + kSlack);
    lane.col.max = arena_.get<float>(columns_);
    lane.col.sum = arena_.get<float>(columns_);
    if (p_.hardest) lane.col.neg = arena_.get<float>(columns_);
    if (plan_.half) lane.unread = arena_.get<float>(5 * int64_t(cols_));
    if (p_.positives != Positives::kNone) {
      lane.col.pos = arena_.get<float>(columns_);
      lane.col.aux = arena_.get<float>(columns_);
    }
  }
  if (!wants_.gradients) return;
  lane.own.reserve(rows_);
  lane.operand = arena_.get<char>(area * k_.operand_bytes);
  if (row_products()) lane.da = arena_.get<float>(rows_ * round_up(p_.a.width, k_.panel));
  if (grads_.col_bias) lane.col_sum = arena_.get<float>(columns_);
}

void Call::pack_columns() {
  if (b_scores_) return;  // by the forward pass of this call
  b_scores_ = arena_.get<char>(columns_ * width_ * k_.element);
  const int64_t grad_panel = columns_ * k_.panel;
  if (wants_.gradients && row_products())
    b_grad_ = arena_.get<char>(grad_panel * round_up(p_.a.width, k_.panel) / k_.panel * k_.element);
  const uint8_t* skip = keys_ && !keys_->col_skip.empty() ? keys_->col_skip.data() : nullptr;
  parallel([&](int thread) {
    for (int64_t panel = thread; panel < columns_ / k_.panel; panel += plan_.threads)
      k_.pack_cols(p_.b, skip, panel, b_scores_, b_grad_, grad_panel);
  });
}

void Call::pack_rows(Lane& lane, int64_t row) const {
  if (lane.packed == row) return;  // a thread's only block, by the forward pass of this call
  lane.packed = row;
  const uint8_t* skip = keys_ && !keys_->row_skip.empty() ? keys_->row_skip.data() : nullptr;
  k_.pack_rows(p_.a, skip, plan_.rows.begin(row), static_cast<int>(plan_.rows.size(row)), lane.a);
}

Tile Call::tile(const Lane& lane, int64_t row, int64_t step) const {
  const int64_t column = plan_.column(row, step);
  const int64_t i = plan_.rows.begin(row), j = plan_.cols.begin(column);
  Tile t;
  t.rows = static_cast<int>(plan_.rows.size(row));
  t.cols = static_cast<int>(round_up(plan_.cols.size(column), k_.panel));
  t.width = static_cast<int>(p_.a.width);
  t.a = lane.a;
  t.b = b_scores_ + j * width_ * k_.element;
  t.scores = t.dots = lane.scores;
  t.operand = lane.operand;
  t.scratch = lane.scratch;
  t.scale = scale_.data() + i;
  t.row_add = row_add_.data() + i;
  t.col_add = col_add_.data() + j;
  if (!keys_) return t;
  t.exclude_self = p_.exclude_self && crosses_diagonal(plan_, row, column, p_.diagonal);
  t.exclude_positives = p_.exclude_positives;
  if (p_.row_limit) t.row_limit = p_.row_limit + i;
  t.plain = !t.exclude_self && !t.row_limit && !keys_->positives(row, column);
  t.row_keys = keys_->row_keys.data() + i;
  t.col_keys = keys_->col_keys.data() + j;
  t.self_column = i + p_.diagonal - j;
  return t;
}

void Call::open_cache(TileCache cache, bool write, bool per_thread) {
  cache_per_thread_ = per_thread;
  const int64_t area = round_up(plan_.rows.largest(), k_.row_align) * cols_;
  const int64_t owners = per_thread ? plan_.threads : plan_.rows.count;
  const int64_t room = cache.bytes - static_cast<int64_t>(sizeof(CacheHeader));
  cached_steps_ = std::min<int64_t>(plan_.steps(), room / (owners * area * int64_t(sizeof(float))));
  if (!cache.data || cached_steps_ <= 0) {
    cached_steps_ = 0;
    // fresh memory may hold the header of an earlier call: backward must not believe it
    if (write && room >= 0) std::memset(cache.data, 0, sizeof(CacheHeader));
    return;
  }
  cache_ = static_cast<float*>(cache.data) + sizeof(CacheHeader) / sizeof(float);
  const CacheHeader mine = {plan_.rows.count, plan_.cols.count, plan_.threads, plan_.half,
                            k_.panel,         k_.row_align,     &k_,           0x6974636b};
  if (write) {
    prefer_huge_pages(cache.data, cache.bytes);
    std::memcpy(cache.data, &mine, sizeof mine);
  } else if (std::memcmp(cache.data, &mine, sizeof mine) != 0) {
    cached_steps_ = 0;
  }
}

bool Call::use_cache(Tile& t, int64_t row, int64_t step) const {
  if (step >= cached_steps_) return false;
  const int64_t owner = cache_per_thread_ ? row % plan_.threads : row;
  const int64_t area = round_up(plan_.rows.largest(), k_.row_align) * cols_;
  t.dots = cache_ + (owner * cached_steps_ + step) * area;
  return true;
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
