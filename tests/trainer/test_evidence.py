"""The evidence behind docs/comparison.md: is its text that of the committed results, are its
statistics right, what is held out, and what do its objectives change?"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.quick_run import TINY, write_set

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import evidence
import evidence_page
import evidence_statistics as statistics
from evidence_objectives import ADDED

from ito.batches import generator
from ito.config import add_options, from_options
from ito.data.dataset import Dataset, load_dataset
from ito.data.emoji import family
from ito.model.tokenizer import Tokenizer
from ito.objectives import OBJECTIVES
from ito.scoring.embedded_split import EmbeddedSplit
from ito.scoring.metrics import retrieval
from ito.trainer import Trainer


@pytest.fixture(autouse=True)
def objectives(monkeypatch):
    for name, kind in ADDED.items():
        monkeypatch.setitem(OBJECTIVES, name, kind)


def test_the_pages_are_those_of_the_results():
    for path, text in evidence_page.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run evidence_page.py"


def test_who_wins():
    """In the words of the page, of the README and of docs/trainer.md."""
    page = evidence_page.Page()
    names = [name for name in evidence_page.FIRST if page.evidence.runs.get(name)]
    seen = {name: page.evidence.estimate(name, "seen/").value for name in names}
    assert max(evidence.ARMS, key=seen.get) == "slip"
    assert page.adjusted["ito", "slip", "seen"] > 0.05
    costs = {name: page.cost(name) for name in names}
    as_long = [name for name, cost in costs.items() if cost and abs(cost - costs["ito"]) < 0.1]
    assert {"slip", "flair", "siglip, ITO's time"} < {*as_long}
    assert max(as_long, key=seen.get) == "clip, ITO's time"
    assert page.adjusted["ito", "ito-align", "seen"] > 0.05
    assert min(p for (*_, kind), p in page.adjusted.items() if kind == "unseen") > 0.05


def test_words_about_differences():
    page = evidence_page.Page()

    def sign(a: str, b: str, kind: str = "seen/") -> int:
        """0 if the interval includes 0."""
        found = page.evidence.estimate(a, kind, b)
        return (found.value > found.half) - (found.value < -found.half)

    for arm in ("clip", "clip-aug", "ito-align", "siglip"):
        assert sign("ito", f"{arm}, ITO's time") == -1
    assert sign("ito", "clip-aug, twice the batch") == -1
    assert [sign("ito", arm) for arm in ("siglip", "flair", "clip", "slip")] == [1, 1, 0, 0]
    assert sign(evidence.WITHOUT, "clip-aug") == 1  # two views
    assert sign(evidence.WITHOUT, "clip-aug, twice the batch") == -1
    assert sign("ito-align, ITO's time", "clip-aug, ITO's time") == 0
    assert sign("dropped", "ito") == sign("one-sided", "ito") == 0
    for arm in ("ito", evidence.WITHOUT):
        assert sign(arm + evidence.LONG, "clip" + evidence.LONG) == 1
    for other in ("slip", evidence.WITHOUT):
        assert sign("ito" + evidence.LONG, other + evidence.LONG) == 0
    for pairs in evidence_page.QUESTIONS.values():
        assert not any(sign(a, b, "unseen/") for a, b in pairs)
    for scale in (50, 100):
        ours = f"ito, scale {scale}"
        assert sign(ours, f"{evidence.WITHOUT}, scale {scale}") == 1
        assert sign(ours, "ito") <= 0
        assert sign(f"one-sided, scale {scale}", ours) == 0


def test_words_of_the_page_that_are_not_made_of_the_results():
    """On the gap, on long training, and on the settings of ITO with and without fusion."""
    page = evidence_page.Page()

    def of(score: str, scale: str) -> list[float]:
        names = (evidence.WITHOUT, "ito", "one-sided")
        return [page.geometry(name + scale, "test", score) for name in names]

    for scale in ("", ", scale 20"):
        alone, *fused = of("gap", scale)
        assert min(fused) > alone
    for scale in (", scale 50", ", scale 100"):
        alone, *fused = of("gap", scale)
        assert 0.85 * alone < min(fused) < max(fused) < alone
    for arm, changed in (("clip-aug", -0.2), ("siglip", 0.1), ("clip", 0), ("ito-align", 0)):
        short, long = (page.geometry(arm + x, "test", "gap") for x in ("", ", ITO's time"))
        assert long - short == pytest.approx(changed, abs=0.06)
        assert changed or round(long, 1) == 0.1
    assert page.geometry("ito", "test", "centred") < page.geometry("ito", "test", "R@1") + 0.01
    for name in evidence.SATURATION:
        for line in page.evidence.runs[name].values():
            values = [value for _, value in line["curve"]]
            assert values[-1] > 0.93 * max(values)
            assert np.mean(values[-2:]) > np.mean(values[5:8])  # still rising
    for name in (*evidence.GAP, *evidence.FUSION):  # no form of fusion closes it
        assert page.geometry(name, "test", "gap") > 3 * page.geometry(name, "test", "floor")
    for name, runs in page.evidence.runs.items():
        assert len(runs) == (2 if name in evidence.SATURATION else 5), name
    settings = {
        tuple(line["settings"][key] for key in ("lr", "weight_decay", "start"))
        for name in ("ito", "clip-aug", evidence.WITHOUT)
        for line in page.evidence.runs[name].values()
    }
    assert len(settings) == 1


# ---- statistics


def test_students_t():
    """Tables of 97.5 % quantiles."""
    for df, want in ((1, 12.706), (4, 2.776), (10, 2.228), (1000, 1.962)):
        assert statistics.t_quantile(df) == pytest.approx(want, abs=2e-3)
        assert statistics.t_p(want, df) == pytest.approx(0.05, abs=1e-4)


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def made(folder, hits: dict[str, np.ndarray]) -> statistics.Evidence:
    """Runs of `hits` (seeds, items), every item a family and one query."""
    items = next(iter(hits.values())).shape[1]
    kinds = {"seen/a/i2t": [*range(items)], "unseen/a/i2t": [*range(items, 2 * items)]}
    (folder / "queries.json").write_text(json.dumps({"test": kinds}))
    lines = [
        {"family": "main", "name": name, "seed": seed}
        | {"hits": {kind: f"{int(''.join(map(str, row)), 2):x}" for kind in kinds}}
        for name, rows in hits.items()
        for seed, row in enumerate(rows)
    ]
    (folder / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return statistics.Evidence(folder)


def test_the_interval_is_that_of_the_items_if_seeds_agree(tmp_path):
    random = np.random.default_rng(0)
    a, b = (random.random((2, 300)) < [[0.4], [0.3]]).astype(int)
    found = made(tmp_path, {"a": np.array([a] * 5), "b": np.array([b] * 5)})
    got = found.estimate("a", "seen/", "b")
    difference = 100 * (a - b)
    assert got.value == pytest.approx(difference.mean())
    assert got.half == pytest.approx(1.97 * difference.std() / math.sqrt(300), rel=0.06)


def test_the_interval_is_students_of_the_seeds_if_items_agree(tmp_path):
    """All items of a seed are right or wrong, as only the seed decides."""
    rows = np.repeat([[1], [0], [1], [1], [0]], 300, 1)
    got = made(tmp_path, {"a": rows}).estimate("a", "seen/")
    shares = 100 * rows[:, 0]
    assert got.value == pytest.approx(60)
    assert got.half == pytest.approx(2.776 * shares.std(ddof=1) / math.sqrt(5), rel=0.05)


def test_differences_are_of_the_seeds_that_both_have(tmp_path):
    rows = np.eye(4, 50, dtype=int)
    got = made(tmp_path, {"a": rows, "b": rows[:2]}).estimate("a", "unseen/", "b")
    assert (got.value, got.half, got.seeds) == (0, 0, 2)


# ---- data


@pytest.fixture(scope="module")
def emoji(records):
    """The small emoji set without its drawings, as it is and divided."""
    numbers = {name: n for n, name in enumerate(dict.fromkeys(r["item"] for r in records))}
    captions = {r["item"]: r["captions"] for r in records}
    fields = dict.fromkeys(("images", "translations", "group", "subgroup", "skipped"))
    before = Dataset(
        image_item=torch.tensor([numbers[r["item"]] for r in records]),
        files=[r["image"] for r in records],
        split=[r["split"] for r in records],
        style=[r["style"] for r in records],
        items=[*numbers],
        captions=[captions[name] for name in numbers],
        format="",
        split_by="",
        enlarged=0,
        **fields,
    )
    return evidence.divide(before), before


def test_no_family_of_an_unseen_concept_is_trained_on(emoji):
    data, before = emoji
    families = {split: set() for split in data.split}
    items = {split: set() for split in data.split}
    for item, split in zip(data.image_item.tolist(), data.split, strict=True):
        families[split].add(family(data.captions[item][0]))
        items[split].add(item)
    for kind in ("val_unseen", "test_unseen"):
        for other in families.keys() - {kind}:
            assert not families[kind] & families[other], (kind, other)
    # of a seen concept the other artist's drawing is trained on, and validation has no part in it
    assert items["test_seen"] <= items["train"]
    assert items["val_seen"] <= items["train"]
    assert not items["test_seen"] & items["val_seen"]
    # what the trainer's own runs have been scored by is validation, and never test
    scored = [n for n, split in enumerate(before.split) if split != "train"]
    assert {data.split[n] for n in scored} == {"val_seen", "val_unseen"}


def test_the_committed_queries_are_those_of_the_data(emoji, monkeypatch):
    monkeypatch.setattr(evidence, "open_evidence", lambda: (emoji[0], None))
    committed = json.loads((evidence.FOLDER / "queries.json").read_text())
    assert evidence.query_families() == committed


def test_seen_drawings_of_which_a_variant_by_the_same_artist_is_trained_on(emoji):
    data = emoji[0]
    rows = list(zip(data.image_item.tolist(), data.split, data.style, strict=True))
    names = [family(captions[0]) for captions in data.captions]
    trained = {(names[item], style) for item, split, style in rows if split == "train"}
    seen = [(names[item], style) for item, split, style in rows if split == "test_seen"]
    assert (len(seen), sum(x in trained for x in seen)) == (392, 48)  # on the page


def test_few_concepts_are_trained_on_and_those_tested_are_among_them(emoji):
    few = evidence.with_concepts(emoji[0], 400)
    rows = list(zip(few.image_item.tolist(), few.split, strict=True))
    trained = {item for item, split in rows if split == "train"}
    assert len(trained) == 400
    assert {item for item, split in rows if split == "test_seen"} <= trained


# ---- runs


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    data = load_dataset(write_set(tmp_path_factory.mktemp("data") / "set", items=40), 36)
    return data, Tokenizer.train([x for own in data.captions for x in own], 300, 8)


def trainer(small, objective: str, **more) -> Trainer:
    parser = argparse.ArgumentParser()
    add_options(parser)
    options = argparse.Namespace(**vars(parser.parse_args(TINY.split())) | more)
    options.objective = objective
    return Trainer(from_options(options), *small, torch.device("cpu"), torch.float32)


def test_hits_are_those_of_the_trainers_recall(small):
    data, tokenizer = small
    model = trainer(small, "clip").model
    held = {"heldout": "test_seen"}
    split = [held.get(name, name) for name in data.split]
    data = evidence.dataclasses.replace(data, split=split, style=["twemoji"] * len(split))
    found = evidence.hits(model, data, tokenizer, "test")
    view = EmbeddedSplit(data.rows("test_seen"), model, tokenizer, data)
    want = retrieval(view.images, view.texts, view.item, view.item_text)
    for way in ("i2t", "t2i"):
        bits = found[f"seen/twemoji/{way}"]
        assert len(bits) == want[f"{way}/queries"]
        assert bits.count("1") / len(bits) == pytest.approx(want[f"{way}/R@1"])


def fused(small, objective: str, other_captions: bool, **more) -> torch.Tensor:
    """The two sides of the fusion loss, (2, n, E); with the captions of other items if asked."""
    own = trainer(small, objective, **more)
    own.model.eval()
    batch = own.batches(0)
    ids = batch.ids.roll(1, 1) if other_captions else batch.ids
    ids = own.objective.texts(ids, generator(0, "texts", 0))
    pictures = batch.pictures[..., :32, :32].float().flatten(0, 1) / 255
    patches = own.model.image.convolve(pictures).unflatten(0, batch.pictures.shape[:2])
    with torch.no_grad():
        return own.objective.encode(own.model, patches, ids)[2], patches, own


@pytest.mark.parametrize(
    ("objective", "first", "second"),
    [
        ("ito", True, True),
        ("one-sided", True, False),
        ("one-sided-tower", True, False),
        ("modality", True, True),
        ("mean-free", True, True),
    ],
)
def test_which_side_of_the_fusion_sees_the_caption(small, objective, first, second):
    with_own, with_others = (fused(small, objective, other)[0] for other in (False, True))
    sees = [not torch.allclose(a, b) for a, b in zip(with_own, with_others, strict=True)]
    assert sees == [first, second]


def test_of_the_tower_is_its_embedding(small):
    both, patches, own = fused(small, "one-sided-tower", False)
    with torch.no_grad():
        _, pooled = own.model.image.attend(patches[1])
    torch.testing.assert_close(both[1], torch.nn.functional.normalize(pooled, dim=-1))


def test_own_fuses_each_view_with_a_caption_of_its_own_and_aligns_the_first(small):
    more = {"captions": 2, "fusion_text": "shuffled"}
    own = trainer(small, "own", **more)
    step = own.batches(0)
    assert own.objective.texts(step.ids, None) is step.ids
    torch.manual_seed(0)
    image, text, both = (
        torch.nn.functional.normalize(torch.randn(2, 16, 32), dim=-1) for _ in "abc"
    )
    about = {"logit_scale": torch.tensor(10.0), "group": None}
    about["step"] = evidence_step = type("Step", (), {"progress": 0.0, "caption_ids": None})
    loss, _ = own.objective.loss(image, text, both, **about)
    text[1] = text[1].roll(1, 0)
    torch.testing.assert_close(own.objective.loss(image, text, both, **about)[0], loss)
    assert evidence_step.caption_ids is None


def test_scale_and_bias_start_as_told_and_a_frozen_scale_stays(small, monkeypatch):
    monkeypatch.setattr(evidence, "open_evidence", lambda: small)
    tiny = {"image_size": 32, "width": 32, "heads": 2, "vocab_size": 300, "context_length": 8}
    given = tiny | {"batch_size": 16, "objective": "siglip", "start": 0.5}
    own = evidence.trainer_of(given)
    assert own.model.logit_scale.exp().item() == pytest.approx(5)
    assert own.objective.logit_bias.item() == pytest.approx(-5)
    own = evidence.trainer_of(given | {"objective": "clip", "frozen": 50})
    before = own.model.image.state_dict()["norm.weight"].clone()
    logged = [own.step(n)["logit_scale"] for n in range(3)]
    assert logged == pytest.approx([50] * 3)
    assert not torch.equal(before, own.model.image.state_dict()["norm.weight"])


def test_what_has_its_line_is_not_run_again(tmp_path, monkeypatch):
    """And equal time is a number of steps, made of the measured times of a step."""
    trained = []

    def train(run, given):
        trained.append((run, given))
        return {"key": run.key, "family": run.family, "arm": run.arm, "trial": run.trial} | {
            "hits": {"seen/twemoji/i2t": "1", "unseen/twemoji/i2t": "1"},
            "cpu_seconds": 0,
        }

    class Here:
        """A pool of this process."""

        def __init__(self, *_, **__): ...

        def __enter__(self):
            return self

        def __exit__(self, *_): ...

        map = staticmethod(map)

    monkeypatch.setattr(evidence, "train", train)
    monkeypatch.setattr(evidence, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(evidence, "FOLDER", tmp_path)
    seconds = dict.fromkeys(evidence.ARMS, 1.0) | {"ito": 2.0}
    (tmp_path / "step_seconds.json").write_text(json.dumps(seconds))
    one = {"seen/twemoji/i2t": [0], "unseen/twemoji/i2t": [1]}
    monkeypatch.setattr(evidence, "query_families", lambda: {"val": one, "test": one})
    results = tmp_path / "runs.jsonl"
    evidence.run_all(results, 1, 5)
    assert len(trained) == 10  # five of each part
    evidence.run_all(results, 1, None)
    keys = [run.key for run, _ in trained]
    assert len(keys) == len({*keys}) == sum(map(len, evidence.plan()))
    given = {run.key: x for run, x in trained}
    usual = evidence.WORKLOAD["steps"]
    assert given["main/ito/0"]["steps"] == usual
    assert given["controls/clip-aug, ITO's time/0"]["steps"] == 2 * usual
    assert given["main/ito/0"]["lr"] == evidence.TRIALS[0][0]  # of equal trials the first
