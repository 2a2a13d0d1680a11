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

// Adds nothing to what `grads` points to: overwrites it. `cache` is what the forward pass filled.
void logsumexp_backward(const Problem&, const Stats&, const Upstream&, const Grads&, TileCache,
                        const Run&);

// Both, where the upstream gradient is known in advance, and Σ u·logsum + α·pos + v·logsum + β·pos.
// The statistics may be null: the caller does not want them. A rows-only problem takes one pass: a
// panel's statistics are complete before its gradient is taken, so its scores are computed once if
// they fit into the cache.
void logsumexp_both(const Problem&, Stats, const Upstream&, const Grads&, float* total,
                    TileCache, const Run&);

// Row sums (if `loss` is not null) and, with the upstream gradient `u`, gradients, in one pass.
void softplus(const Problem&, float* loss, const float* u, const Grads&, const Run&);

// Floating-point operations of all matrix products so far: what was really computed.
int64_t gemm_flops();

// Tile shape, threads and instruction set, in words.
std::string describe(const Problem&, const Run&);

}  // namespace ito::cpu
