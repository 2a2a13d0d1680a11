"""Published times of other packages, as a check of `gpu_model.py`: the model is given what their
code computes, and has to meet what their authors measured.

The instructions of memeff's kernels are those of version 0.3.1, compiled as ours are
(results/published_kernels.json). Two packages cannot be compared: inf-cl publishes no time of its
loss alone, only pictures of whole trainings, and PyTorch only how much faster its new kernel for
`linear_cross_entropy` is than its old code (pull request 195829: 0.61 to 0.87 of the time, H100).
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """A published time.

    n, m: rows and columns of the scores. vendor: ((m, n, k of a matrix product by the vendor's
    library or of its speed, how often), ...). moved: bytes that passes without matrix products read
    and write per score. kernels: ((row of published_kernels.json, width, how often), ...).
    """

    name: str
    what: str
    chip: str
    ms: float
    n: int
    m: int
    vendor: tuple[tuple[tuple[int, int, int], int], ...] = ()
    moved: int = 0
    kernels: tuple[tuple[str, int, int], ...] = ()
    remark: str = ""
    contrastive: bool = True


def siglip_products(m: int, chunk: int) -> tuple[tuple[tuple[int, int, int], int], ...]:
    """siglip-kernel's three products of one chunk of rows against m columns, D = 768."""
    return ((chunk, m, 768), 1), ((chunk, 768, m), 1), ((m, 768, chunk), 1)


def times(number: int, products: tuple) -> tuple:
    return tuple((shape, number * each) for shape, each in products)


def liger_ms(products: int, m: int, h: int, v: int, tflops: float) -> float:
    return round(products * 2 * m * h * v / tflops * 1e-9, 2)


SIGLIP = "H100 SXM"  # a GH200: the same chip with more power and faster memory
PUBLISHED = (
    Published(
        "siglip-kernel 0.1.2", "SigLIP, 65,536 rows, D = 768, chunks of 4,096", SIGLIP, 48.8,
        65536, 65536, times(16, siglip_products(65536, 4096)), 4,
        remark="3 products by cuBLAS; its pass over the scores alone takes 8.9 ms (its source)",
    ),
    Published(
        "siglip-kernel 0.1.2", "SigLIP, 65,536 × 262,144, D = 768", SIGLIP, 196, 65536, 262144,
        times(16, siglip_products(262144, 4096)), 4, remark="by ids; chunks assumed as above",
    ),
    Published(
        "memeff 0.3.1", "CLIP, 65,536 rows, D = 512", "A100 SXM", 201, 65536, 65536,
        kernels=(("memeff denominators", 512, 1), ("memeff gradients", 512, 2)),
        remark="5 products; probably on a 250 W A100 PCIe, which its README names elsewhere",
    ),
    Published(
        "memeff 0.3.1", "CLIP, 131,072 rows, D = 384", "A100 SXM", 703, 131072, 131072,
        kernels=(("memeff denominators", 384, 1), ("memeff gradients", 512, 2)),
        remark="the gradients are computed at a width of 512",
    ),
    Published(
        "Liger-Kernel, pull request 1422",
        "linear cross-entropy forward, 8,192 × 262,144, D = 2,048",
        "H200 SXM", liger_ms(1, 8192, 2048, 262144, 747.5), 8192, 262144,
        (((8192, 262144, 2048), 1),),
        remark="1 product, CuTe, taken at the vendor's speed", contrastive=False,
    ),
    Published(
        "Liger-Kernel, pull request 1422",
        "linear cross-entropy backward, 8,192 × 131,072, D = 2,048",
        "H200 SXM", liger_ms(3, 8192, 2048, 131072, 694.9), 8192, 131072,
        (((8192, 131072, 2048), 1), ((8192, 2048, 131072), 1), ((131072, 2048, 8192), 1)), 4,
        remark="3 products, CuTe, taken at the vendor's speed", contrastive=False,
    ),
)  # fmt: skip
