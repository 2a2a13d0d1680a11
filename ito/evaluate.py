"""`python -m ito.evaluate RUN`: retrieval, zero-shot and the modality gap on held-out pictures."""

import argparse
import json
from pathlib import Path

import torch

from ito.augment import eval_transform
from ito.cli import user_errors
from ito.config import Config, add_options, from_options
from ito.data import Dataset, report_skipped
from ito.encoders import DualEncoder
from ito.metrics import modality_gap, retrieval, zero_shot
from ito.source import open_dataset
from ito.tokenizer import Tokenizer

BATCH = 256


@torch.inference_mode()
def embed_images(model: DualEncoder, images: torch.Tensor) -> torch.Tensor:
    """uint8 (K, 3, S, S) -> unit rows (K, E) on the CPU, fp32, without augmentation."""
    device = model.logit_scale.device
    model.eval()
    parts = [
        model.encode_image(eval_transform(batch.to(device), model.image.image_size))
        for batch in images.split(BATCH)
    ]
    return torch.cat(parts).cpu()


@torch.inference_mode()
def embed_texts(model: DualEncoder, ids: torch.Tensor) -> torch.Tensor:
    """Token ids (K, L) -> unit rows (K, E) on the CPU, fp32."""
    device = model.logit_scale.device
    model.eval()
    return torch.cat([model.encode_text(batch.to(device)) for batch in ids.split(BATCH)]).cpu()


def evaluate(model: DualEncoder, tokenizer: Tokenizer, dataset: Dataset) -> dict[str, float]:
    """Scores of every held-out split, as `split/metric`.

    An item's first caption stands for it. Retrieval is among the split's own pictures and items.
    `zero_shot/names`: the most similar name of *all* items of the data set, trained on or not.
    `zero_shot/subgroups`, where the data has them: the most similar subgroup, by its words alone.

    Raises ValueError if nothing is held out.
    """
    names = embed_texts(model, tokenizer([captions[0] for captions in dataset.captions]))
    subgroups = sorted({name for name in dataset.subgroup if name is not None})
    prompts = embed_texts(model, tokenizer([name.replace("-", " ") for name in subgroups]))
    scores: dict[str, float] = {}
    for split in dataset.held_out_splits():
        rows = dataset.rows(split)
        images = embed_images(model, dataset.images[rows])
        item = dataset.image_item[rows]
        candidates = item.unique()
        results = {
            "": retrieval(images, names[candidates], item, candidates),
            "zero_shot/names/": zero_shot(images, names, item),
            "modality/": modality_gap(images, names[candidates]),
        }
        known = torch.tensor([dataset.subgroup[n] is not None for n in item.tolist()])
        if known.any():
            labels = [subgroups.index(dataset.subgroup[n]) for n in item[known].tolist()]
            results["zero_shot/subgroups/"] = zero_shot(
                images[known], prompts, torch.tensor(labels)
            )
        scores |= {
            f"{split}/{prefix}{name}": value
            for prefix, values in results.items()
            for name, value in values.items()
        }
    return scores


def table(columns: dict[str, dict[str, float]]) -> str:
    """The scores as text, a column per evaluation (`{"before": ..., "after": ...}`)."""
    last = columns[list(columns)[-1]]
    lines = []
    for split in dict.fromkeys(name.split("/")[0] for name in last if "/" in name):

        def line(label: str, key: str, chance: str = "", form: str = ".1%", split=split) -> None:
            if f"{split}/{key}" in last:
                cells = "".join(
                    f"{scores[f'{split}/{key}']:10{form}}" for scores in columns.values()
                )
                odds = f"{last[f'{split}/{chance}']:10.2%}" if chance else ""
                lines.append(f"  {label:32}{cells}{odds}")

        pictures, captions = last[f"{split}/t2i/candidates"], last[f"{split}/i2t/candidates"]
        lines.append(f"{split}: {pictures} pictures, {captions} captions")
        lines.append(f"  {'':32}" + "".join(f"{title:>10}" for title in [*columns, "chance"]))
        for direction, words in (("i2t", "image to text"), ("t2i", "text to image")):
            line(f"{words} R@1", f"{direction}/R@1", f"{direction}/chance")
            line(f"{words} R@5", f"{direction}/R@5")
            line(f"{words} R@10", f"{direction}/R@10")
        for kind in ("names", "subgroups"):
            classes = last.get(f"{split}/zero_shot/{kind}/classes")
            label = f"zero-shot among {classes} {kind}"
            line(label, f"zero_shot/{kind}/top1", f"zero_shot/{kind}/chance")
        line("modality gap", "modality/gap", form=".3f")
        line("modality gap, relative", "modality/relative", form=".3f")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    from ito.export import load

    parser = argparse.ArgumentParser(prog="python -m ito.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--cache", type=Path, help="where prepared data lives (~/.cache/ito)")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    add_options(parser, only="data")
    with user_errors():
        options = parser.parse_args(arguments)
        encoder = load(options.run)
        config = from_options(options, Config.load(options.run / "config.json"))
        dataset = open_dataset(config, options.cache)
        print(report_skipped(dataset.skipped) or f"{len(dataset.images)} pictures")
        scores = evaluate(encoder.model, encoder.tokenizer, dataset)
        print(table({"score": scores}))
        if options.json:
            options.json.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
