"""The scores of a model on each split of a data set, by name.

`evaluate` has those that training logs, `evaluate_fully` those of `python -m ito.evaluate`.
"""

import torch

from ito.data.dataset import Dataset
from ito.model.embed import embed_images, embed_texts
from ito.model.encoders import DualEncoder
from ito.model.tokenizer import Tokenizer
from ito.scoring import probes
from ito.scoring.metrics import (
    ensemble,
    mean_rank_variance,
    modality_gap,
    random_rank_variance,
    ranks,
    retrieval,
    zero_shot,
)
from ito_kernels import alignment_loss, uniformity_loss

PROMPTS = ("{}", "a picture of {}", "a drawing of {}", "a photo of {}", "an icon of {}")
ALL = "all"  # all pictures of a data set, as one split


def evaluate(
    model: DualEncoder, tokenizer: Tokenizer, dataset: Dataset, splits: list[str] | None = None
) -> dict[str, float]:
    """The scores that training logs, of `splits` (by default all held-out ones), as `split/metric`.

    An item's first caption is its text. Retrieval is within the split's pictures and items.
    `zero_shot/names`: classification by the names of *all* items of the data set, including those
    trained on. `zero_shot/subgroups`: by the names of the subgroups, if the data has any.

    Raises ValueError if nothing is held out.
    """
    classes = Classes(model, tokenizer, dataset, ("subgroup",))
    scores = {}
    for split in splits or dataset.held_out_splits():
        rows = dataset.rows(split)
        images = embed_images(model, dataset.images[rows])
        scores |= with_prefix(split, basic_scores(images, dataset.image_item[rows], classes))
    return scores


def evaluate_fully(
    model: DualEncoder,
    tokenizer: Tokenizer,
    dataset: Dataset,
    splits: list[str],
    prompts: tuple[str, ...] = PROMPTS,
) -> dict[str, float]:
    """The scores of `evaluate` for `splits`, and others that take too long during training.

    `zero_shot/…/ensemble`: a class is the mean of its `prompts`. `linear_probe`, `knn`: classifiers
    of image embeddings by subgroup and by concept (item), fitted on the split "train" if there is
    one. `modality/classifier`. `geometry/`: uniformity of each modality, alignment of the pairs.
    `languages/`: mean rank variance over the data's translations. `splits` may contain ALL. Raises
    ValueError naming a split that the data lacks.
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
            found |= with_prefix("modality", probes.modality_classifier(images, names, item, items))
            found |= {
                "geometry/uniformity_images": uniformity_loss(images).item(),
                "geometry/uniformity_texts": uniformity_loss(names).item(),
            }
        found["geometry/alignment"] = alignment_loss(images, texts).item()
        found |= language_scores(model, tokenizer, dataset, images, item)
        scores |= with_prefix(split, found)
    return scores


def with_prefix(prefix: str, scores: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in scores.items()}


class Classes:
    """The classes of zero-shot classification: embeddings of all names, and of groups' names.

    `names` (n, E) has one row per item. With `prompts` there are `ensembles` too. Pictures without
    a group have the label -1.
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
        """(kind, class embeddings, label of each item) for every kind that these items have."""
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
        scores |= with_prefix(f"zero_shot/{kind}", zero_shot(images[known], emb, labels[known]))
    return scores | with_prefix("modality", modality_gap(images, names))


def probe_scores(train_emb, train_item, test_emb, test_item, subgroup) -> dict[str, float]:
    """Scores by subgroup and by concept, each if at least 2 labels occur in both sets."""
    place = {name: n for n, name in enumerate(sorted({s for s in subgroup if s is not None}))}
    index = torch.tensor([place.get(name, -1) for name in subgroup])
    scores = {}
    for kind, labels in (("subgroups", index), ("concepts", torch.arange(len(subgroup)))):
        y, y_test = labels[train_item], labels[test_item]
        fit, test = y >= 0, y_test >= 0
        if len(y[fit][torch.isin(y[fit], y_test[test])].unique()) < 2:
            continue
        sides = train_emb[fit], y[fit], test_emb[test], y_test[test]
        scores |= with_prefix(f"linear_probe/{kind}", probes.linear_probe(*sides))
        scores |= with_prefix(f"knn/{kind}", probes.knn(*sides))
    return scores


def language_scores(model, tokenizer, dataset, images, item) -> dict[str, float]:
    """Mean rank variance over the captions' language and all that at least half of the items have.

    Only items with a name in each of these languages are used. Empty if they are fewer than 2, or
    if there is no second language.
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
