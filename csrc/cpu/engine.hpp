// The two primitives on the CPU, forward and backward. See ito_kernels/similarity/spec.py for what
// they compute and plan.hpp for how the work is cut.
#pragma once
#include <string>

#include "cpu/kernels.hpp"

namespace ito::cpu {

struct Run {
  const Kernels* kernels = nullptr;
  int threads = 1;
};

// Writes the statistics that are not null. With a cache, keeps there as many inner products as fit.
void logsumexp_forward(const Problem&, const Stats&, TileCache, const Run&);

// Overwrites what `grads` points to. The cache is what the forward pass filled.
void logsumexp_backward(const Problem&, const Stats&, const Upstream&, const Grads&, TileCache,
                        const Run&);

// Forward and backward, where the upstream gradient is known in advance; forward alone if no
// gradient is asked for. `total` gets Σ u·logsum + α·pos over the rows + Σ v·logsum + β·pos over
// the columns, with (u, α), (v, β) the upstream gradients. Null statistics are not wanted. A
// problem of rows only takes one pass: a row block's statistics are complete before its gradient is
// taken, so that its scores are computed once if they fit into the cache. A cache without memory is
// taken from the working memory of the call.
void logsumexp_both(const Problem&, Stats, const Upstream&, const Grads&, float* total,
                    TileCache, const Run&);

// Row sums and the gradients, whose upstream gradient is `u`, in one pass. `total` gets Σ u·sum.
// Null results are not wanted.
void softplus(const Problem&, float* loss, const float* u, const Grads&, float* total, const Run&);

// Floating-point operations of all matrix products that were computed so far. Running calls add
// theirs after each row block.
int64_t gemm_flops();

// Tile shape, threads and instruction set, in words.
std::string describe(const Problem&, const Run&);

}  // namespace ito::cpu
