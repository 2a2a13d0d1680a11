"""A kernel that reads the same bytes in every program, past L1: the rate of L2."""

import triton
import triton.language as tl


@triton.jit
def read(x, out, blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    sums = tl.zeros((BLOCK,), tl.float32)
    for i in range(blocks):
        at = (program + i) % blocks
        sums += tl.load(x + at * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg")
    tl.store(out + program, tl.sum(sums, 0))
