// One call of the engine: what its threads share and what each of them owns.
#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "cpu/engine.hpp"
#include "cpu/keys.hpp"
#include "cpu/memory.hpp"
#include "cpu/plan.hpp"

namespace ito::cpu {

class Call {
 public:
  // What a call does; decides which memory it needs.
  struct Wants {
    bool keys = false;        // positives or self pairs matter
    bool statistics = false;  // of the logsumexp
    bool gradients = false;
    bool symmetry = false;  // half of the tiles, if the problem is symmetric
  };
  Call(const Problem&, const Run&, Wants, const Grads& = {});

  TileCache new_cache(int64_t bytes);  // that lives as long as the call
  void forward(const Stats&, TileCache);
  void backward(const Stats&, const Upstream&, TileCache, bool one_pass);
  void softplus(float* loss, const float* u);

 private:
  // The memory of a BackwardSide; vectors that are not wanted are empty.
  struct SideVectors {
    std::vector<float> shift, logsum, factor, pos, pos_factor;
    void reserve(int64_t n);
    void fill(const SideStats&, const SideUpstream&, int64_t n);
    BackwardSide from(int64_t first) const;
  };
  // The memory of one thread. It exists before threads start: they must not throw.
  struct Workspace {
    void *a = nullptr, *operand = nullptr;
    float *scores = nullptr, *dots = nullptr, *da = nullptr, *scratch = nullptr;
    RunningStats row;     // of the row block in work
    RunningStats col;     // of all columns, over the thread's row blocks
    RunningStats unread;  // column statistics of a tile on the diagonal: those of its rows
    double *row_loss = nullptr, *row_scale = nullptr, *row_bias = nullptr;  // of the row block
    double* col_bias = nullptr;  // of all columns, over the thread's row blocks
    SideVectors row_side;
    int64_t packed = -1;  // the row block that `a` holds
    int64_t flops = 0;
  };

  // call.cpp
  RunningStats running_stats(int64_t n, bool positives, bool negatives);
  void allocate(Workspace&);
  void pack_columns();
  void pack_rows(Workspace&, int64_t row_block) const;
  Tile tile(const Workspace&, const TileIndex&) const;
  int64_t product_flops(const TileIndex& at) const {
    return 2 * plan_.rows.size(at.row_block) * plan_.cols.size(at.col_block) * p_.a.width;
  }
  void open_cache(TileCache, bool write, bool per_thread);
  int64_t stored_rows(int64_t row_block) const {
    return round_up(plan_.rows.size(row_block), k_.row_align);
  }
  float* place_in_cache(const TileIndex&) const;
  void expect_next(Tile&, int64_t row_block, int64_t n) const;

  // Calls work(tile, index) for every tile of a row block, in the plan's order.
  template <class Work>
  void for_each_tile(Workspace& ws, int64_t row_block, Work work) const {
    for (int64_t n = 0; n < plan_.tiles(row_block); ++n) {
      const TileIndex at = plan_.tile(row_block, n);
      Tile t = tile(ws, at);
      expect_next(t, row_block, n);
      work(t, at);
      if (!t.have_dots) ws.flops += product_flops(at);
    }
    count(ws);
  }
  static void count(Workspace&);  // its products so far, for gemm_flops

  // forward.cpp
  void forward_row_block(Workspace&, int64_t row_block, const Stats&);
  void reset(const RunningStats&, int64_t n) const;
  void finish_columns(const SideStats&);

  // backward.cpp
  bool row_products() const { return grads_.a; }
  bool col_products() const { return grads_.b || (grads_.a && p_.self); }
  void symmetric_sides(const Stats&, const Upstream&, SideVectors& row, SideVectors& col) const;
  void start_gradients();
  void start_row_gradients(const Workspace&);
  GradientSums gradient_sums(const Workspace&, const TileIndex&) const;
  void add_products(Workspace&, const Tile&, const TileIndex&);
  void finish_row_gradients(const Workspace&, int64_t row_block);
  void finish_col_gradients();
  void finish_scale_gradient();
  template <class Work>
  void in_turn(int64_t col_block, int turn, Work work);

  const Problem& p_;
  const Kernels& k_;
  const Grads grads_;
  const Wants wants_;
  const Plan plan_;
  const std::unique_ptr<const Keys> keys_;  // null if no pair is special
  const int64_t width_;                     // of packed features
  const int64_t columns_;                   // of packed columns
  const int rows_, cols_;                   // of the largest tile
  std::vector<float> scale_, row_add_, col_add_;

  Arena arena_;
  std::vector<Workspace> workspaces_;              // one for each thread
  char *b_scores_ = nullptr, *b_grad_ = nullptr;  // packed columns, for either kind of product
  float* acc_ = nullptr;                          // the columns' gradient
  float* scale_rows_ = nullptr;                   // every row's part of the scale's gradient
  std::unique_ptr<const Turns> turns_;
  std::unique_ptr<std::atomic<int>[]> next_turn_;  // at each column block
  float* cache_ = nullptr;
  int64_t cached_tiles_ = 0;  // of each row block: those of the smallest offsets
  bool cache_per_thread_ = false;
  std::vector<int64_t> cached_rows_;  // the rows of the cache before those of each row block
};

}  // namespace ito::cpu
