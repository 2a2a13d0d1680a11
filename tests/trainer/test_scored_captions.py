"""Data with equal and with several captions: what counts as right, in scores, tables and report."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import untrained_run

import ito
from ito import evaluate
from ito.config import Config
from ito.data.dataset import load_dataset
from ito.scoring import evaluation, report_page
from ito.scoring.embedded_split import EmbeddedSplit
from ito.scoring.evaluation import evaluate_fully
from ito.scoring.scores import table

LABELS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained_run.write(tmp_path_factory.mktemp("scored"))


def write(folder: Path, records: list[dict]) -> Path:
    """A data set of a picture of coloured blocks per record."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(len(records))
    with (folder / "captions.jsonl").open("w") as lines:
        for n, record in enumerate(records):
            blocks = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(folder / f"{n}.png")
            lines.write(json.dumps({"image": f"{n}.png"} | record) + "\n")
    return folder


def repeated(pictures: int = 40) -> list[dict]:
    """Half of the captions occur again, also in other white space and case; 2 to 5 a picture, two
    pictures an item in the first quarter. They differ in the first tokens: the model reads 8."""
    records = []
    for n in range(pictures):
        texts = [f"{n} thing", f"{n} view", f"{n}, a number"][: 1 + n % 3]
        texts += [("{}  Thing", "{} thing", "{} THING ")[n % 3].format((n + 7) % pictures)]
        texts += [f"{'abcde'[n % 5]} kind"] * (n % 2)
        item = f"item {n // 2}" if n < pictures // 4 else f"picture {n}"
        records.append({"captions": texts, "item": item})
    return records


def classes(splits: dict[str, int]) -> list[dict]:
    return [
        {"captions": [LABELS[n % 3]], "split": split}
        for split, count in splits.items()
        for n in range(count)
    ]


def scored(run, data) -> tuple:
    """(encoder, data set, all scores of all its splits) of the untrained model."""
    encoder, dataset = ito.load(run), load_dataset(data, 32)
    splits = dataset.held_out_splits()
    return encoder, dataset, evaluate_fully(encoder.model, encoder.tokenizer, dataset, splits)


# --- R@K ---


def recall(cosines: np.ndarray, right: np.ndarray, k: int) -> float:
    """The share of rows with a right column among the k highest."""
    nearest = np.argsort(-cosines, 1)[:, :k]
    return float(np.take_along_axis(right, nearest, 1).any(1).mean())


def test_recall_is_that_of_the_exported_embeddings(run, tmp_path):
    """To the last digit, with half of the captions repeated: pictures from their files, texts from
    the file of captions, and nothing else of the trainer."""
    records = repeated()
    data = write(tmp_path / "data", records)
    evaluate.main([str(run), "--data", str(data), "--json", str(tmp_path / "scores.json")])
    got = json.loads((tmp_path / "scores.json").read_text())

    model, owned = ito.load(run), {}
    for record in records:
        words = [" ".join(text.lower().split()) for text in record["captions"]]
        owned.setdefault(record["item"], set()).update(words)
    texts = sorted(set().union(*owned.values()))
    images = model.encode_image([data / f"{n}.png" for n in range(40)]).double().numpy()
    cosines = images @ model.encode_text(texts).double().numpy().T
    right = np.array([[text in owned[record["item"]] for text in texts] for record in records])
    for k in (1, 5, 10):
        assert got[f"all/i2t/R@{k}"] == recall(cosines, right, k)
        assert got[f"all/t2i/R@{k}"] == recall(cosines.T, right.T, k)
        assert got[f"all/i2t/R@{k}/low"] <= got[f"all/i2t/R@{k}"] <= got[f"all/i2t/R@{k}/high"]
    assert got["all/i2t/chance"] == pytest.approx(right.mean())
    assert got["all/i2t/candidates"] == got["all/t2i/queries"] == len(texts)
    assert got["all/i2t/queries"] == got["all/t2i/candidates"] == 40
    assert got["all/distinct_captions"] == len(texts)
    assert got["all/items"] == len(owned)
    exact = {(record["item"], text) for record in records for text in record["captions"]}
    assert got["all/captions"] == len({(item, text.strip()) for item, text in exact})
    assert got["all/captions"] > 1.5 * len(texts)


def test_every_caption_of_a_picture_is_asked_for(run, tmp_path):
    """30 pictures with 1 to 5 captions, all different: 90 queries and candidates."""
    records = [{"captions": [f"{word}{n}" for word in "abcde"[: 1 + n % 5]]} for n in range(30)]
    *_, got = scored(run, write(tmp_path / "data", [r | {"split": "test"} for r in records]))
    assert got["test/captions"] == got["test/distinct_captions"] == 90
    assert got["test/t2i/queries"] == got["test/i2t/candidates"] == 90
    assert got["test/i2t/chance"] == pytest.approx(3 / 90)
    title, note, names, *_ = table({"": got}).splitlines()
    assert title == "test: 30 pictures, 90 captions"
    assert note == "  note: in brackets: the 95 % interval over 30 items (bootstrap)"
    assert names == "  note: names are the distinct first captions of all items, of every split"
    low, high = (100 * got[f"test/t2i/R@10/{end}"] for end in ("low", "high"))
    assert f"{got['test/t2i/R@10']:.1%} ({low:.1f}–{high:.1f})" in table({"": got})


def test_equal_captions_are_right_for_each_other(run, tmp_path):
    """The text that the model takes a picture for is right, whichever picture it is the caption of;
    and where all captions are equal, no answer is wrong."""
    encoder, dataset, got = scored(run, write(tmp_path / "data", classes({"train": 3, "test": 24})))
    images = encoder.encode_image(dataset.images[dataset.rows("test")])
    taken = (images @ encoder.encode_text(LABELS).T).argmax(1)
    want = float((taken == torch.arange(24) % 3).double().mean())
    assert got["test/i2t/R@1"] == got["test/zero_shot/names/top1"] == want
    assert got["test/i2t/chance"] == got["test/t2i/chance"] == pytest.approx(1 / 3)
    assert got["test/zero_shot/names/classes"] == 3
    assert "test: 24 pictures, 24 captions, 3 of them distinct" in table({"": got})
    few = "text to image has 3 queries: too few to trust its interval"
    assert few in table({"": got})
    assert "image to text has" not in table({"": got})  # which has 24
    records = [{"captions": [("one", "One ")[n % 2]], "split": "test"} for n in range(6)]
    *_, same = scored(run, write(tmp_path / "same", records))
    for way in ("i2t", "t2i"):
        assert same[f"test/{way}/R@1"] == same[f"test/{way}/chance"] == 1
    assert "text to image: R@1, R@5, R@10 are 100 % for any model" in table({"": same})


def test_very_many_names_are_no_classes_while_training(run, tmp_path, monkeypatch):
    """Each is embedded at each evaluation; all other scores stay."""
    encoder, dataset, _ = scored(run, write(tmp_path / "data", classes({"train": 3, "test": 24})))
    few = evaluation.evaluate(encoder.model, encoder.tokenizer, dataset)
    monkeypatch.setattr(evaluation, "MOST_NAMES", 2)
    many = evaluation.evaluate(encoder.model, encoder.tokenizer, dataset)
    assert few.keys() - many.keys() == {name for name in few if "zero_shot/names" in name}
    assert few["test/zero_shot/names/classes"] == 3
    for name, value in many.items():
        assert value == few[name]
    assert "zero-shot" not in table({"": many})


def test_names_are_classes_of_the_probes_too(run, tmp_path):
    """No item is in two splits here, its name is; pictures and names told apart are not the same
    names that the classifier was fitted on."""
    encoder, _, got = scored(run, write(tmp_path / "data", classes({"train": 30, "test": 9})))
    assert (got["test/knn/concepts/classes"], got["test/knn/concepts/train"]) == (3, 30)
    texts = encoder.encode_text(LABELS).double()
    far = [
        torch.exp(-2 * ((a - b) ** 2).sum())
        for i, a in enumerate(texts)
        for j, b in enumerate(texts)
        if i != j
    ]
    want = float(torch.stack(far).mean().log())
    assert got["test/geometry/uniformity_texts"] == pytest.approx(want, abs=1e-4)


def test_clip_benchmark_s_files_have_its_rule(run, tmp_path):
    """Every caption is a query, and only its own picture right, also of equal ones."""
    records = [r | {"item": f"{n}", "split": "test"} for n, r in enumerate(repeated())]
    data = write(tmp_path / "data", records)
    evaluate.main([str(run), "--data", str(data), "--clip-benchmark", str(tmp_path / "cb")])
    (path,) = (tmp_path / "cb").glob("*zeroshot_retrieval.json")
    got = json.loads(path.read_text())["metrics"]
    assert len(got) == 6
    dataset, model = load_dataset(data, 32), ito.load(run)
    owner = [n for n, texts in enumerate(dataset.captions) for _ in texts]
    texts = model.encode_text([text for texts in dataset.captions for text in texts])
    cosines = (texts @ model.encode_image(dataset.images).T).double().numpy()
    right = np.eye(40, dtype=bool)[owner]
    for k in (1, 5, 10):  # pictures differ, so that none of them tie
        want = pytest.approx(recall(cosines, right, k), abs=1e-7)
        assert got[f"image_retrieval_recall@{k}"] == want


# --- languages ---


def test_equal_names_in_a_language_are_right_for_each_other(run, tmp_path):
    """German has one word for all: its rank is 1, so that an item's two ranks r, 1 vary by
    ((r − 1) / 2)²."""
    records = [
        {"captions": [f"{n} thing"], "translations": {"de": ["Ding"]}, "split": "test"}
        for n in range(12)
    ]
    encoder, dataset, got = scored(run, write(tmp_path / "data", records))
    cosines = (
        encoder.encode_image(dataset.images)
        @ encoder.encode_text([texts[0] for texts in dataset.captions]).T
    )
    for way, scores in (("i2t", cosines), ("t2i", cosines.T)):
        rank = 1 + (scores > scores.diagonal()[:, None]).sum(1)
        want = float(((rank - 1) / 2).square().mean())
        assert got[f"test/languages/{way}/mean_rank_variance"] == pytest.approx(want)
        # ranks from 1 to 12 by chance: the mean of (r − 1)² is 253/6
        assert got[f"test/languages/{way}/chance"] == pytest.approx(253 / 6 / 4)


# --- few items, and embeddings that are no numbers ---


@pytest.mark.parametrize(
    "records",
    [
        [{"captions": ["one"]}],
        [{"captions": ["one", "ONE", "two"]}],
        [{"captions": ["one"], "item": "a"}, {"captions": ["two"], "item": "a"}],
        [{"captions": ["one"]}, {"captions": ["one"]}],
    ],
)
@pytest.mark.parametrize("broken", [False, True])
def test_few_items(run, tmp_path, records, broken, capsys):
    encoder = ito.load(run)
    dataset = load_dataset(write(tmp_path / "data", records), 32, only="test")
    if broken:
        torch.nn.init.constant_(encoder.model.image.project.weight, torch.nan)
    got = evaluate_fully(encoder.model, encoder.tokenizer, dataset, ["test"])
    for way in ("i2t", "t2i"):
        assert got[f"test/{way}/R@1"] == got[f"test/{way}/chance"] == 1
        assert got[f"test/{way}/R@1/low"] == got[f"test/{way}/R@1/high"] == 1
    assert "R@1, R@5, R@10 are 100 % for any model" in table({"": got})


def test_no_score_of_embeddings_that_are_no_numbers(run, tmp_path):
    encoder = ito.load(run)
    dataset = load_dataset(write(tmp_path / "data", classes({"train": 9, "test": 9})), 32)
    torch.nn.init.constant_(encoder.model.image.project.weight, torch.nan)
    got = evaluation.evaluate(encoder.model, encoder.tokenizer, dataset)
    assert got["test/i2t/R@1"] == got["test/t2i/R@1"] == got["test/zero_shot/names/top1"] == 0
    assert got["test/i2t/mean_rank"] == 3  # two of three texts are wrong


# --- the report ---


def test_the_report_shows_an_equal_caption_as_right(run, tmp_path):
    encoder = ito.load(run)
    dataset = load_dataset(write(tmp_path / "data", classes({"train": 3, "test": 24})), 32)
    view = EmbeddedSplit(dataset.rows("test"), encoder.model, encoder.tokenizer, dataset)
    label = [LABELS[n % 3] for n in range(24)]
    queries = report_page.text_to_image(view)
    assert [query["caption"] for query in queries] == list(LABELS)
    for word, query in zip(LABELS, queries, strict=True):
        assert len(query["pictures"]) == 6
        assert all(x["right"] == (x["name"] == word) for x in query["pictures"])
    cards = report_page.image_to_text(view)
    for picture, card in zip(report_page.spaced(24, report_page.QUERIES), cards, strict=True):
        assert sorted(name for name, _ in card["captions"]) == sorted(LABELS)
        assert all(right == (name == label[picture]) for name, right in card["captions"])
    wrong = report_page.mistakes(view)
    assert wrong
    assert all(x["own"]["name"] != x["taken"] and x["captions"] == 3 for x in wrong)


def test_the_worst_mistake_is_shown_beside_a_picture_of_its_caption(run, tmp_path):
    encoder = ito.load(run)
    records = [r | {"split": "test"} for r in repeated()]
    dataset = load_dataset(write(tmp_path / "data", records), 32)
    view = EmbeddedSplit(dataset.rows("test"), encoder.model, encoder.tokenizer, dataset)
    shown = {report_page.picture(view, n)["png"]: n for n in range(len(view.pictures))}
    for found in report_page.mistakes(view):
        picture, other = (shown[found[which]["png"]] for which in ("own", "other"))
        text = view.captions.index(found["taken"])
        assert text in view.right(other)
        assert text not in view.right(picture)


def test_a_run_of_a_version_without_these_scores_is_shown(run):
    """`RUN/metrics.jsonl` of before: no number of captions, no interval."""
    encoder, dataset = ito.load(run), untrained_data(run)
    got = evaluation.evaluate(encoder.model, encoder.tokenizer, dataset)
    new = ("items", "captions", "distinct_captions", "low", "high", "max_rank")
    old = {name: x for name, x in got.items() if name.rpartition("/")[2] not in new}
    lines = table({"": old}).splitlines()
    assert lines[0] == "heldout_style: 5 pictures, 6 captions"
    assert not any("–" in line for line in lines)
    # a run that an older version began and this one ended
    both = {"before": old, "after": got}
    told = [line for line in table(both).splitlines() if "older version" in line]
    assert len(told) == len(dataset.held_out_splits())
    assert told[0].startswith("  note: before is an older version's")
    assert "older version" not in table({"before": got, "after": got})


def untrained_data(run):
    return load_dataset(Config.load(run / "config.json").train_data, 32)
