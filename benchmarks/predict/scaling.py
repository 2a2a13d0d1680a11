"""Predicts the time of a loss's step on many GPUs: prints the table and draws the picture. Without
options it writes the figures of docs/scaling.md again.

    python benchmarks/predict/scaling.py [--gpu h100] [--dim 512] [--loss clip] [--out FOLDER]
    python benchmarks/predict/scaling.py --measure     runs the loss on gloo instead, and compares

`scaling_model.py` has the model, `scaling_check.py` the comparison with gloo on this machine.

Columns. rows: of each GPU. compute: the kernels alone. step: with the chunk size beside it, the
smallest that is within 2 % of the best. hides from: the smallest whose kernels take as long as its
transfers, if there is one. rule: with max(32,768, 512·GPUs). default: with chunk_size=None.
ring: neighbours' sends instead of all-gathers. memory: the bound of docs/distributed.md with that
chunk, and the kernels' panel; open_clip: its logits and gathered features, local_loss, and without.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parent.parent))  # where loss_throughput.py and plot.py are

from gpu_model import ROOT, written
from scaling_check import check
from scaling_model import (
    BATCHES,
    LEAST_ROWS,
    LOSSES,
    NETWORKS,
    NODE,
    PROTOCOLS,
    RANKS,
    RESULTS,
    Gpu,
    Step,
    markdown,
    most_gpus,
    page,
    row,
    rows_to_hide,
)
from scaling_plot import draw

PAGE = ROOT / "docs" / "scaling.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", choices=NETWORKS, default="h100")
    parser.add_argument("--dim", type=int, default=512, help="embedding width, at least 256")
    parser.add_argument("--loss", choices=LOSSES, default="clip")
    parser.add_argument("--out", type=Path, default=RESULTS, help="output folder")
    parser.add_argument(
        "--measure", action="store_true", help="check the model on gloo with 1, 2 and 4 processes"
    )
    options = parser.parse_args()
    if options.dim < 256:
        parser.error(f"--dim must be at least 256, got {options.dim}")
    if options.measure:
        check(options.out / "scaling_check.json")
        return

    gpu = Gpu(options.gpu)
    rows = [
        row(Step(ranks, batch // ranks, options.dim, loss=options.loss), gpu)
        for ranks, batch in product(RANKS, BATCHES)
        if batch // ranks >= LEAST_ROWS
    ]
    print(markdown(rows))
    inside, across = (rows_to_hide(gpu, options.dim, ranks) for ranks in (NODE, 2 * NODE))
    print(
        f"\nKernels hide a large chunk's transfer from {inside:,.0f} rows for each GPU in one node,"
        f" {across:,.0f} across nodes (predictions; nothing was run)"
    )
    most = {batch: most_gpus(batch, gpu, options.dim, options.loss) for batch in BATCHES}
    for batch, ranks in most.items():
        print(f"batch {batch:,}: kernels are half of the step up to {ranks:,} GPUs")
    name = f"scaling-{options.gpu}-{options.loss}-{options.dim}"
    report = {
        "gpu": options.gpu, "network": gpu.network._asdict(), "protocols": PROTOCOLS,
        "host_s": gpu.host, "call_s": gpu.call, "most_gpus": most, "rows": rows,
        "rows_to_hide": {"node": inside, "across": across},
    }  # fmt: skip
    (options.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(gpu, options.dim, options.loss, options.out / f"{name}.png")
    if (options.gpu, options.loss, options.dim) == ("h100", "clip", 512):
        PAGE.write_text(written(PAGE.read_text(), page(rows)))


if __name__ == "__main__":
    main()
