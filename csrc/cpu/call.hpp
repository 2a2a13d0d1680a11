// One call of the engine: what its threads share and what each of them owns.
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <vector>

#include "cpu/engine.hpp"
#include "cpu/keys.hpp"
#include "cpu/memory.hpp"
#include "cpu/plan.hpp"

namespace ito::cpu {

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// `n` values and then some more, because tiles read and write whole vectors.
constexpr int64_t kSlack = 64;

class Call {
 public:
  // What of a tile's work this call does; decides which memory is needed.
  struct Wants {
    bool keys = false;        // positives or self pairs matter
    bool statistics = false;  // of the logsumexp
    bool gradients = false;
    bool symmetry = false;    // half of the tiles, if the problem is symmetric
  };
  Call(const Problem&, const Run&, Wants, const Grads& = {});
  ~Call();

  void forward(const Stats&, TileCache);
  void backward(const Stats&, const Upstream&, TileCache, bool one_pass);
  void softplus(float* loss, const float* u);

 private:
  // A side's statistics and upstream gradient as tiles want them; empty where absent.
  struct SideVectors {
    std::vector<float> shift, logsum, factor, pos, pos_factor;
    void reserve(int64_t n);
    Side at(int64_t i) const;
  };
  struct Lane {  // of one thread; its memory exists before threads start, which must not throw
    void *a = nullptr, *operand = nullptr;
    float *scores = nullptr, *dots = nullptr, *da = nullptr, *scratch = nullptr;
    Running row, col;
    float *col_sum = nullptr, *unread = nullptr;
    SideVectors own;
    int64_t packed = -1;  // the row block that `a` holds
    int64_t flops = 0;
  };

  // call.cpp
  void parallel(const std::function<void(int)>& work) const;
  void make_lane(Lane&);
  void pack_columns();
  void pack_rows(Lane&, int64_t row) const;
  Tile tile(const Lane&, int64_t row, int64_t step) const;
  void count_product(Lane& lane, int64_t row, int64_t step) const {
    lane.flops += 2 * plan_.rows.size(row) * plan_.cols.size(plan_.column(row, step)) * p_.a.width;
  }
  void open_cache(TileCache, bool write, bool per_thread);
  bool use_cache(Tile&, int64_t row, int64_t step) const;

  // forward.cpp
  void forward_rows(Lane&, int64_t row, const Stats&, bool fill_cache);
  void reset(const Running&, int64_t n) const;
  void finish_columns(const SideStats&);

  // backward.cpp
  bool any_sums() const { return grads_.scale || grads_.row_bias || grads_.col_bias; }
  bool row_products() const { return grads_.a; }
  bool col_products() const { return grads_.b || (grads_.a && p_.self); }
  static void fill(SideVectors&, const SideStats&, const SideUpstream&, int64_t n);
  void symmetric_sides(const Stats&, const Upstream&, SideVectors& row, SideVectors& col) const;
  void start_gradients();
  void start_row_gradients(int64_t row);
  void add_products(Lane&, const Tile&, int64_t row, int64_t at);
  void finish_row_gradients(const Lane&, int64_t row);
  void finish_col_gradients();
  template <class Work>
  void in_turn(int64_t column, int turn, Work work);

  const Problem& p_;
  const Kernels& k_;
  const Grads grads_;
  const Wants wants_;
  const Plan plan_;
  const std::unique_ptr<const Keys> keys_;  // null if no pair is special
  const int64_t width_;                     // of packed features
  const int64_t columns_;                   // of packed columns
  const int rows_, cols_;                   // capacity of a tile
  std::vector<float> scale_, row_add_, col_add_;

  Arena arena_;
  std::vector<Lane> lanes_;
  char *b_scores_ = nullptr, *b_grad_ = nullptr;  // packed columns, for either kind of product
  float* acc_ = nullptr;                          // the columns' gradient
  std::unique_ptr<const Turns> turns_;
  std::unique_ptr<std::atomic<int>[]> taken_;  // turns taken at each column block
  float* cache_ = nullptr;
  int64_t cached_steps_ = 0;  // of each row block: its first ones
  bool cache_per_thread_ = false;
};

}  // namespace ito::cpu
