"""A data set of coloured noise that a run of seconds learns, and how such a run is started."""

import json

import numpy as np
from PIL import Image

NAMES = ["red", "green", "blue", "old", "new", "big", "tiny", "wet", "dry", "hot", "cold", "round"]
THINGS = ["cat", "dog", "sun", "moon", "tree", "boat"]
TINY = "--image-size 32 --width 32 --heads 2 --image-depth 1 --vocab-size 300 --context-length 8"
TINY += " --batch-size 16"
QUICK = [*TINY.split(), "--steps", "6", "--log-every", "1", "--eval-every", "3"]


def write_set(folder, items: int, drawings: int = 2, **fields):
    """Pictures of coarse coloured noise; an item's drawings differ by a little finer noise."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "captions.jsonl").open("w") as lines:
        for item in range(items):
            coarse = random.integers(0, 256, (4, 4, 3))
            for drawing in range(drawings):
                noisy = coarse.repeat(16, 0).repeat(16, 1) + random.normal(0, 12, (64, 64, 3))
                name = f"{item:03}-{drawing}.png"
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / name)
                adjective, thing = NAMES[item % len(NAMES)], THINGS[item // len(NAMES)]
                names = [f"{adjective} {thing}", f"a {thing} that is {adjective}"]
                record = {"image": name, "item": str(item), "captions": names} | fields
                lines.write(json.dumps(record) + "\n")
    return folder


def steady(run):
    """The logged numbers without clocks."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "images_per_second", "input_share")}
        for r in records
    ]
