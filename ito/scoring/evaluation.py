"""The scores of a model on each split of a data set, by name."""

from collections import Counter
from collections.abc import Sequence

import torch

from ito.data.dataset import Dataset
from ito.model.embed import embed_images, embed_texts
from ito.model.encoders import DualEncoder
from ito.model.tokenizer import Tokenizer
from ito.scoring import probes
from ito.scoring.embedded_split import EmbeddedSplit, distinct
from ito.scoring.metrics import (
    clip_benchmark_recall,
    ensemble,
    image_text_pairs,
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
# Above, they are captions rather than classes, and too slow to embed while training: 10,000 of 32
# tokens took 18 s of one core of a loaded Zen 4, each time.
MOST_NAMES = 5000


def evaluate(
    model: DualEncoder, tokenizer: Tokenizer, dataset: Dataset, splits: list[str] | None = None
) -> dict[str, float]:
    """The scores that training logs, of `splits` (by default all held-out ones), as `split/metric`.

    Retrieval is within the split's pictures and the distinct captions of their items: each is a
    query and a candidate, and right for all pictures whose item has it (`EmbeddedSplit`).
    `captions` counts those of all items, `distinct_captions` the texts, `items` what the intervals
    of R@K are over.
    An item's first caption is its name. `zero_shot/names`: classification by the distinct names of
    *all* items of the data set, including those trained on, if they are at most MOST_NAMES.
    `zero_shot/subgroups`: by the names of the subgroups, if the data has any. `modality/`: between
    the pictures and the name of each item.

    Raises ValueError if nothing is held out.
    """
    classes = Classes(model, tokenizer, dataset, ("subgroup",), most_names=MOST_NAMES)
    scores = {}
    for split in splits or dataset.held_out_splits():
        view = EmbeddedSplit(dataset.rows(split), model, tokenizer, dataset)
        scores |= with_prefix(split, basic_scores(view, classes))
    return scores


def evaluate_fully(
    model: DualEncoder,
    tokenizer: Tokenizer,
    dataset: Dataset,
    splits: list[str],
    prompts: tuple[str, ...] = PROMPTS,
) -> dict[str, float]:
    """The scores of `evaluate`, and others of `python -m ito.evaluate`, too slow for training.

    `zero_shot/…/ensemble`: a class is the mean of its `prompts`. `linear_probe`, `knn`: classifiers
    of image embeddings by subgroup and by concept (the item's name), fitted on the split "train" if
    there is one. `modality/classifier`: of pictures against the distinct names. `geometry/`:
    uniformity of the pictures and of the distinct names, alignment of each picture with its item's
    name. `languages/`: mean rank variance over the data's translations. `clip_benchmark/`: recall
    as clip_benchmark computes it. `splits` may contain ALL. Raises ValueError naming a split that
    the data lacks.
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
        view = EmbeddedSplit(rows, model, tokenizer, dataset)
        images, item = view.images, view.item
        found = basic_scores(view, classes)
        for kind, emb, labels in classes.of(item, classes.ensembles):
            known = labels >= 0
            top1 = zero_shot(images[known], emb, labels[known])["top1"]
            found[f"zero_shot/{kind}/ensemble"] = top1
        if trained is not None and split not in (ALL, "train"):
            kinds = {"subgroups": "subgroups", "concepts": "names"}
            labels = {kind: classes.index[of] for kind, of in kinds.items() if of in classes.index}
            found |= probe_scores(trained, dataset.image_item[train], images, item, labels)
        name = classes.index["names"][item]
        names = name.unique()
        if len(names) > 1:
            texts = classes.names[names]
            found |= with_prefix("modality", probes.modality_classifier(images, texts, name, names))
            found["geometry/uniformity_images"] = uniformity_loss(images).item()
            found["geometry/uniformity_texts"] = uniformity_loss(texts).item()
        found["geometry/alignment"] = alignment_loss(images, classes.names[name]).item()
        found |= language_scores(model, tokenizer, dataset, images, item)
        found |= clip_benchmark_scores(model, tokenizer, dataset, images, item)
        scores |= with_prefix(split, found)
    return scores


def embed_classes(model, tokenizer, names: list[str], templates: Sequence[str]) -> torch.Tensor:
    prompts = [[t.replace("{}", name) for name in names] for t in templates]
    return ensemble(torch.stack([embed_texts(model, tokenizer(texts)) for texts in prompts], 1))


def with_prefix(prefix: str, scores: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in scores.items()}


class Classes:
    """The classes of zero-shot classification: embeddings of all names, and of groups' names.

    `index`: {kind: the class of each item, (n,)}; -1 for an item without a group. The class in
    "names" is the item's first caption, the same for equal ones; `names` (C, E) are their
    embeddings. With `prompts` there are `ensembles` too. With more than `most_names` names they are
    no kind of classes, and not embedded.
    """

    def __init__(self, model, tokenizer, dataset, groupings, prompts=None, most_names=None):
        names, index = distinct(captions[0] for captions in dataset.captions)
        self.index, words = {"names": index}, {"names": names}
        if most_names is not None and len(names) > most_names:
            words = {}
        for grouping in groupings:
            label = getattr(dataset, grouping)
            known = sorted({name for name in label if name is not None})
            if known:
                words[f"{grouping}s"] = [name.replace("-", " ") for name in known]
                place = {name: n for n, name in enumerate(known)} | {None: -1}
                self.index[f"{grouping}s"] = torch.tensor([place[name] for name in label])
        self.plain = {kind: embed_texts(model, tokenizer(texts)) for kind, texts in words.items()}
        self.names = self.plain.get("names")
        if prompts:
            own = (model, tokenizer)
            self.ensembles = {
                kind: embed_classes(*own, texts, prompts) for kind, texts in words.items()
            }

    def of(self, item: torch.Tensor, embeddings: dict[str, torch.Tensor]):
        """(kind, class embeddings, label of each item) for every kind that these items have."""
        for kind, emb in embeddings.items():
            labels = self.index[kind][item]
            if (labels >= 0).any():
                yield kind, emb, labels


def basic_scores(view: EmbeddedSplit, classes: Classes) -> dict[str, float]:
    scores = {
        "items": len(view.own),
        "captions": len(view.item_text),
        "distinct_captions": len(view.captions),
    }
    scores |= retrieval(view.images, view.texts, view.item, view.item_text)
    for kind, emb, labels in classes.of(view.item, classes.plain):
        known = labels >= 0
        found = zero_shot(view.images[known], emb, labels[known])
        scores |= with_prefix(f"zero_shot/{kind}", found)
    names = view.texts[[own[0] for own in view.own.values()]]
    return scores | with_prefix("modality", modality_gap(view.images, names))


def probe_scores(train_emb, train_item, test_emb, test_item, classes) -> dict[str, float]:
    """Scores for each of `classes`, {kind: the class of each item or -1}, if at least 2 classes
    occur in both sets."""
    scores = {}
    for kind, labels in classes.items():
        y, y_test = labels[train_item], labels[test_item]
        fit, test = y >= 0, y_test >= 0
        if len(y[fit][torch.isin(y[fit], y_test[test])].unique()) < 2:
            continue
        sides = train_emb[fit], y[fit], test_emb[test], y_test[test]
        scores |= with_prefix(f"linear_probe/{kind}", probes.linear_probe(*sides))
        scores |= with_prefix(f"knn/{kind}", probes.knn(*sides))
    return scores


def clip_benchmark_scores(model, tokenizer, dataset, images, item) -> dict[str, float]:
    """Retrieval with each caption of each item as a text of its own, in the form that it has."""
    own = [(n, text) for n in item.unique().tolist() for text in dataset.captions[n]]
    texts = embed_texts(model, tokenizer([text for _, text in own]))
    owner = torch.tensor([n for n, _ in own])
    return with_prefix("clip_benchmark", clip_benchmark_recall(images, texts, item, owner))


def language_scores(model, tokenizer, dataset, images, item) -> dict[str, float]:
    """Mean rank variance over the captions' language and all that at least half of the items have.

    Only items with a name in each of these languages are used, each by its first one; equal names
    in a language are one text, right for all their items. Empty if the items are fewer than 2, or
    if there is no second language.
    """
    names = {n: dataset.translations[n] for n in item.unique().tolist()}
    known = Counter(language for texts in names.values() for language in texts)
    languages = sorted(name for name, count in known.items() if 2 * count >= len(names))
    items = [n for n, texts in names.items() if all(texts.get(name) for name in languages)]
    if not languages or len(items) < 2:
        return {}
    items = torch.tensor(items)
    shown = torch.isin(item, items)
    images, item = images[shown], item[shown]
    text_rank, image_rank, right, sizes = [], [], [], []
    for language in [None, *languages]:
        texts, text = distinct(
            names[n][language][0] if language else dataset.captions[n][0] for n in items.tolist()
        )
        emb = embed_texts(model, tokenizer(texts))
        pairs = image_text_pairs(item, torch.stack([items, text], 1))
        rank, correct = ranks(emb, images, pairs.flip(1))
        text_rank.append(rank[text])  # of an item by its name
        right.append(correct[text])
        image_rank.append(ranks(images, emb, pairs)[0])
        sizes.append(len(texts))
    count = len(text_rank)
    return {
        "languages/count": count,
        "languages/items": len(items),
        "languages/t2i/mean_rank_variance": mean_rank_variance(torch.stack(text_rank, 1)),
        "languages/t2i/chance": random_rank_variance(torch.stack(right, 1), len(item)),
        "languages/i2t/mean_rank_variance": mean_rank_variance(torch.stack(image_rank, 1)),
        "languages/i2t/chance": random_rank_variance(torch.ones(1, count), torch.tensor(sizes)),
    }
