"""`python -m ito.evaluate RUN`: what a run's model knows about held-out pictures, or any others.

Retrieval, zero-shot with prompt ensembles, linear probe and k nearest neighbours, the modality gap,
uniformity and alignment, and how evenly languages find the same things.
"""

import argparse
import json
from pathlib import Path

import torch

from ito import probes
from ito.augment import eval_transform
from ito.cli import user_errors
from ito.config import Config, add_options, from_options
from ito.data import Dataset, report_cut, report_skipped
from ito.encoders import DualEncoder
from ito.files import write_text
from ito.metrics import (
    ensemble,
    mean_rank_variance,
    modality_gap,
    random_rank_variance,
    ranks,
    retrieval,
    zero_shot,
)
from ito.scores import clip_benchmark, table
from ito.source import open_dataset
from ito.tokenizer import Tokenizer
from ito_kernels import alignment_loss, uniformity_loss

BATCH = 256
PROMPTS = ("{}", "a picture of {}", "a drawing of {}", "a photo of {}", "an icon of {}")
ALL = "all"  # every picture of a data set, as one split


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
    """The scores that training logs, of every held-out split, as `split/metric`.

    An item's first caption stands for it. Retrieval is among the split's own pictures and items.
    `zero_shot/names`: the most similar name of *all* items of the data set, trained on or not.
    `zero_shot/subgroups`, where the data has them: the most similar subgroup, by its words alone.

    Raises ValueError if nothing is held out.
    """
    classes = Classes(model, tokenizer, dataset, ("subgroup",))
    scores = {}
    for split in dataset.held_out_splits():
        rows = dataset.rows(split)
        images = embed_images(model, dataset.images[rows])
        scores |= under(split, basic_scores(images, dataset.image_item[rows], classes))
    return scores


def evaluate_fully(
    model: DualEncoder,
    tokenizer: Tokenizer,
    dataset: Dataset,
    splits: list[str],
    prompts: tuple[str, ...] = PROMPTS,
) -> dict[str, float]:
    """`evaluate`'s scores, of `splits`, and those too dear to compute while training.

    `zero_shot/…/ensemble`: a class is the mean of its `prompts`. `linear_probe`, `knn`: classifiers
    of the images' embeddings, fitted on the split "train" and so only where there is one; by
    subgroup, and by concept (item). `modality/classifier`; `geometry/` uniformity of each modality
    and alignment of the pairs; `languages/` mean rank variance over the data's translations.
    `splits` may hold ALL. Raises ValueError naming a split that the data lacks.
    """
    missing = [name for name in splits if name != ALL and name not in dataset.split]
    if missing:
        raise ValueError(f"--split {missing[0]}: the data has {dataset.describe()}")
    classes = Classes(model, tokenizer, dataset, ("group", "subgroup"), prompts)
    train = dataset.rows("train")
    trained = embed_images(model, dataset.images[train]) if len(train) else None
    scores = {}
    for split in splits:
        rows = torch.arange(len(dataset.images)) if split == ALL else dataset.rows(split)
        images, item = embed_images(model, dataset.images[rows]), dataset.image_item[rows]
        texts = classes.names[item]
        found = basic_scores(images, item, classes)
        for kind, emb, labels in classes.of(item, classes.ensembles):
            known = labels >= 0
            top1 = zero_shot(images[known], emb, labels[known])["top1"]
            found[f"zero_shot/{kind}/ensemble"] = top1
        if trained is not None and split not in (ALL, "train"):
            sides = trained, dataset.image_item[train], images, item
            found |= probe_scores(*sides, dataset.subgroup)
        if len(images) > 1 and len(item.unique()) > 1:
            items = item.unique()
            names = classes.names[items]
            found |= under("modality", probes.modality_classifier(images, names, item, items))
            found |= {
                "geometry/uniformity_images": uniformity_loss(images).item(),
                "geometry/uniformity_texts": uniformity_loss(names).item(),
            }
        found["geometry/alignment"] = alignment_loss(images, texts).item()
        found |= language_scores(model, tokenizer, dataset, images, item)
        scores |= under(split, found)
    return scores


def under(prefix: str, scores: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in scores.items()}


class Classes:
    """What a picture can be told to be: embeddings of all names, and of groups by their words.

    `names` (n, E), an item each. With `prompts`, `ensembles` too. A picture without a group has
    the label -1 there.
    """

    def __init__(self, model, tokenizer, dataset, groupings, prompts=None):
        words = {"names": [captions[0] for captions in dataset.captions]}
        self.index = {"names": torch.arange(len(dataset.items))}
        for grouping in groupings:
            label = getattr(dataset, grouping)
            known = sorted({name for name in label if name is not None})
            if known:
                words[f"{grouping}s"] = [name.replace("-", " ") for name in known]
                place = {name: n for n, name in enumerate(known)} | {None: -1}
                self.index[f"{grouping}s"] = torch.tensor([place[name] for name in label])

        def embed(texts: list[str]) -> torch.Tensor:
            return embed_texts(model, tokenizer(texts))

        self.plain = {kind: embed(texts) for kind, texts in words.items()}
        self.names = self.plain["names"]
        if prompts:
            self.ensembles = {
                kind: ensemble(
                    torch.stack([embed([p.replace("{}", t) for t in texts]) for p in prompts], 1)
                )
                for kind, texts in words.items()
            }

    def of(self, item: torch.Tensor, embeddings: dict[str, torch.Tensor]):
        """(kind, embeddings, label of each item) of every kind that these items have."""
        for kind, emb in embeddings.items():
            labels = self.index[kind][item]
            if (labels >= 0).any():
                yield kind, emb, labels


def basic_scores(images: torch.Tensor, item: torch.Tensor, classes: Classes) -> dict[str, float]:
    candidates = item.unique()
    names = classes.names[candidates]
    scores = retrieval(images, names, item, candidates)
    for kind, emb, labels in classes.of(item, classes.plain):
        known = labels >= 0
        scores |= under(f"zero_shot/{kind}", zero_shot(images[known], emb, labels[known]))
    return scores | under("modality", modality_gap(images, names))


def probe_scores(train_emb, train_item, test_emb, test_item, subgroup) -> dict[str, float]:
    """By subgroup and by concept, each where at least 2 labels are on both sides."""
    place = {name: n for n, name in enumerate(sorted({s for s in subgroup if s is not None}))}
    index = torch.tensor([place.get(name, -1) for name in subgroup])
    scores = {}
    for kind, labels in (("subgroups", index), ("concepts", torch.arange(len(subgroup)))):
        y, y_test = labels[train_item], labels[test_item]
        fit, test = y >= 0, y_test >= 0
        if len(y[fit][torch.isin(y[fit], y_test[test])].unique()) < 2:
            continue
        sides = train_emb[fit], y[fit], test_emb[test], y_test[test]
        scores |= under(f"linear_probe/{kind}", probes.linear_probe(*sides))
        scores |= under(f"knn/{kind}", probes.knn(*sides))
    return scores


def language_scores(model, tokenizer, dataset, images, item) -> dict[str, float]:
    """Mean rank variance over the captions' language and those that half of the items or more have.

    Of the items that have a name in each of them; nothing if that leaves fewer than 2 items, or no
    second language.
    """
    names = {n: dataset.translations[n] for n in item.unique().tolist()}
    languages = sorted({language for texts in names.values() for language in texts})
    languages = [
        name
        for name in languages
        if 2 * sum(name in texts for texts in names.values()) >= len(names)
    ]
    items = [n for n, texts in names.items() if all(texts.get(name) for name in languages)]
    if not languages or len(items) < 2:
        return {}
    items = torch.tensor(items)
    shown = torch.isin(item, items)
    images, item = images[shown], item[shown]
    text_rank, image_rank = [], []
    for language in [None, *languages]:
        texts = [
            names[n][language][0] if language else dataset.captions[n][0] for n in items.tolist()
        ]
        emb = embed_texts(model, tokenizer(texts))
        text_rank.append(ranks(emb, images, items, item)[0])
        image_rank.append(ranks(images, emb, item, items)[0])
    count = len(text_rank)
    pictures = (item[None, :] == items[:, None]).sum(1)
    return {
        "languages/count": count,
        "languages/items": len(items),
        "languages/t2i/mean_rank_variance": mean_rank_variance(torch.stack(text_rank, 1)),
        "languages/t2i/chance": random_rank_variance(pictures, len(item), count),
        "languages/i2t/mean_rank_variance": mean_rank_variance(torch.stack(image_rank, 1)),
        "languages/i2t/chance": random_rank_variance(torch.ones(1), len(items), count),
    }


def main(arguments: list[str] | None = None) -> None:
    from ito.export import load

    parser = argparse.ArgumentParser(prog="python -m ito.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument(
        "--data", metavar="PATH", help="score every picture of this data set, not the held-out ones"
    )
    parser.add_argument("--split", action="append", help=f"score this one ({ALL}: every picture)")
    parser.add_argument(
        "--prompts",
        nargs="+",
        default=PROMPTS,
        metavar="TEXT",
        help="of the ensembles; {} is filled",
    )
    parser.add_argument("--cache", type=Path, help="where prepared data lives (~/.cache/ito)")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    parser.add_argument(
        "--clip-benchmark",
        type=Path,
        metavar="FOLDER",
        help="also write a file per split and task, as clip_benchmark does",
    )
    add_options(parser, only="data")
    with user_errors():
        options = parser.parse_args(arguments)
        if bad := [prompt for prompt in options.prompts if "{}" not in prompt]:
            raise ValueError(f"--prompts must hold {{}} for the name, got {bad[0]!r}")
        for name, file in (("json", options.json), ("clip-benchmark", options.clip_benchmark)):
            if file and not file.parent.is_dir():  # told before the work
                raise ValueError(f"--{name} {file}: {file.parent} is no folder")
        encoder = load(options.run)
        config, splits = choose_data(options)
        dataset = open_dataset(config, options.cache)
        print(report_skipped(dataset.skipped) or f"{len(dataset.images)} pictures")
        captions = [caption for names in dataset.captions for caption in names]
        if cut := report_cut(captions, encoder.tokenizer):
            print(cut)
        scores = evaluate_fully(
            encoder.model,
            encoder.tokenizer,
            dataset,
            splits or dataset.held_out_splits(),
            tuple(options.prompts),
        )
        print(table({"score": scores}))
        if options.json:
            write_text(options.json, json.dumps(scores, indent=2) + "\n")
        if options.clip_benchmark:
            data = Path(config.train_data).stem
            for record in clip_benchmark(scores, data, options.run):
                name = f"{record['dataset']}_{record['task']}".replace("/", "-")
                path = options.clip_benchmark / f"{name}.json"
                write_text(path, json.dumps(record, indent=2) + "\n")


def choose_data(options: argparse.Namespace) -> tuple[Config, list[str] | None]:
    """The run's configuration with the data asked for, and which splits (None: the held-out)."""
    config = from_options(options, Config.load(options.run / "config.json"))
    if options.data is None:
        return config, options.split
    if "train_data" in options:
        raise ValueError(f"--data {options.data} and --train-data name the same thing: drop one")
    path = argparse.Namespace(train_data=options.data, stream=False, val_data=None)
    return from_options(path, config), options.split or [ALL]


if __name__ == "__main__":
    main()
