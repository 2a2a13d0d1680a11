// The micro-kernel of a matrix product: a block of the result that stays in registers.
#pragma once
#include <cstdint>

namespace {

// c[row][C vectors] (+)= Σ_k a(row, k) · b[k][C vectors], for up to R rows. A K step is one number
// of each operand, or a pair of bf16: `Op` says how they are loaded, broadcast and multiplied.
template <class Op, int R, int C>
struct MicroKernel {
  using V = typename Op::Vec;
  using Unit = typename Op::Unit;
  static constexpr int kColPanel = C * V::kWidth;

  // Memory that is read soon is fetched into L2 meanwhile, `step` bytes further every K step. The
  // columns and their gradient come from L3: without it the products run at 91 to 94 % of the peak,
  // with it at 95 to 97.
  struct Ahead {
    const void* from;
    int step = 0;
    // `bytes` from `p` on, spread over so many K steps
    Ahead(const void* p, int64_t bytes, int64_t k_steps)
        : from(p), step(static_cast<int>((bytes + k_steps - 1) / k_steps)) {}
    // nothing: memory that is read anyway
    explicit Ahead(const void* p) : from(p) {}
    // that of a block of the result further on
    Ahead after(int64_t k_steps) const {
      Ahead next = *this;
      next.from = static_cast<const char*>(from) + k_steps * step;
      return next;
    }
  };

  // `depth` K steps. In `a`, rows are ARow units apart and steps AStep; every `chunk` steps it goes
  // on `a_chunk` units from where the chunk began. `b` is contiguous.
  template <int M, int ARow, int AStep>
  static inline void run(int depth, int chunk, const Unit* a, int64_t a_chunk, const Unit* b,
                         float* c, bool accumulate, Ahead ahead, Ahead other) {
    const char *next = static_cast<const char*>(ahead.from),
               *other_next = static_cast<const char*>(other.from);
    typename V::F acc[M][C];
    // c is needed at the end; where it accumulates gradients it comes from L2 or beyond.
    for (int i = 0; i < M * kColPanel; i += 16) __builtin_prefetch(c + i, 1);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) acc[i][j] = V::zero();
    for (int k0 = 0; k0 < depth; k0 += chunk, a += a_chunk) {
      const Unit* ak = a;
      const int steps = depth - k0 < chunk ? depth - k0 : chunk;
      for (int k = 0; k < steps; ++k, ak += AStep, b += kColPanel) {
        __builtin_prefetch(next, 0, 2);
        __builtin_prefetch(other_next, 0, 2);
        next += ahead.step;
        other_next += other.step;
        typename Op::Operand right[C];
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) right[j] = Op::load(b + j * V::kWidth);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
          // Every other row is broadcast by the multiply-adds themselves: one more load, one
          // instruction less, 41 instead of 48 for 28 multiply-adds. A core whose front end also
          // serves another hyperthread then reaches 78 % of its peak instead of 72.
          if (i % 2 == 0) {
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j)
              acc[i][j] = Op::multiply_add(ak + i * ARow, right[j], acc[i][j]);
            continue;
          }
          const typename Op::Operand left = Op::broadcast(ak[i * ARow]);
#pragma GCC unroll 4
          for (int j = 0; j < C; ++j) acc[i][j] = Op::multiply_add(left, right[j], acc[i][j]);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) {
        float* out = c + i * kColPanel + j * V::kWidth;
        V::store(out, accumulate ? V::add(V::load(out), acc[i][j]) : acc[i][j]);
      }
  }

  // The same for min(rows, R) rows: nothing is computed for rows that do not exist.
  template <int ARow, int AStep, int M = R>
  static inline void rows(int rows_, int depth, int chunk, const Unit* a, int64_t a_chunk,
                          const Unit* b, float* c, bool accumulate, Ahead ahead, Ahead other) {
    if (rows_ >= M)
      return run<M, ARow, AStep>(depth, chunk, a, a_chunk, b, c, accumulate, ahead, other);
    if constexpr (M > 1)
      rows<ARow, AStep, M - 1>(rows_, depth, chunk, a, a_chunk, b, c, accumulate, ahead, other);
  }

  // Multiply-adds that depend on nothing in memory.
  static double peak(int64_t rounds, typename Op::Operand x, typename Op::Operand y) {
    typename V::F acc[R * C];
#pragma GCC unroll 32
    for (int i = 0; i < R * C; ++i) acc[i] = V::set(static_cast<float>(i));
    for (int64_t k = 0; k < rounds; ++k)
#pragma GCC unroll 32
      for (int i = 0; i < R * C; ++i) acc[i] = Op::multiply_add(x, y, acc[i]);
    typename V::F total = V::zero();
#pragma GCC unroll 32
    for (int i = 0; i < R * C; ++i) total = V::add(total, acc[i]);
    volatile float sink = V::sum(total);  // keeps the loop alive
    (void)sink;
    return 2.0 * sizeof(Unit) / Op::kElement * R * C * V::kWidth * static_cast<double>(rounds);
  }
};

}  // namespace
