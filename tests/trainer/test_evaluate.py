"""The evaluation command: what it scores, what it leaves out and says, and what it writes."""

import json
import statistics

import pytest
import torch
from support import untrained_run

import ito
from ito import evaluate, report, search
from ito.config import Config
from ito.model.embed import embed_images, embed_texts
from ito.scoring import evaluation
from ito.scoring.evaluation import evaluate_fully
from ito.scoring.scores import certain, clip_benchmark, table
from ito.source import open_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return untrained_run.write_data(tmp_path_factory.mktemp("evaluate") / "data")


@pytest.fixture(scope="module")
def run(data):
    return untrained_run.write_run(data.parent / "run", data)


@pytest.fixture(scope="module")
def scored(run):
    """(encoder, data set, every score of its held-out splits)."""
    encoder = ito.load(run)
    dataset = open_dataset(Config.load(run / "config.json"))
    splits = dataset.held_out_splits()
    return encoder, dataset, evaluate_fully(encoder.model, encoder.tokenizer, dataset, splits)


def test_the_full_evaluation_holds_what_training_logs(run, scored):
    encoder, dataset, scores = scored
    logged = evaluation.evaluate(encoder.model, encoder.tokenizer, dataset)
    assert {name: scores[name] for name in logged} == logged


def test_an_ensemble_is_scored_by_the_mean_of_its_prompts(scored):
    encoder, dataset, _ = scored
    rows = dataset.rows("heldout_concept")
    prompts = ("{}", "a drawing of {}, on white")
    got = evaluate_fully(
        encoder.model, encoder.tokenizer, dataset, ["heldout_concept"], prompts=prompts
    )
    images = embed_images(encoder.model, dataset.images[rows]).double()
    words = sorted(untrained_run.COLOURS)
    classes = [
        sum(
            embed_texts(encoder.model, encoder.tokenizer([prompt.format(word)]))[0].double()
            for prompt in prompts
        )
        for word in words
    ]
    classes = torch.stack([c / c.norm() for c in classes])
    truth = torch.tensor(
        [words.index(dataset.subgroup[n]) for n in dataset.image_item[rows].tolist()]
    )
    want = ((images @ classes.T).argmax(1) == truth).double().mean()
    assert got["heldout_concept/zero_shot/subgroups/ensemble"] == pytest.approx(float(want))


def test_which_classifiers_are_fitted(scored):
    """Held-out drawings show trained concepts and colours; held-out concepts colours alone."""
    *_, scores = scored
    for probe in ("linear_probe", "knn"):
        assert scores[f"heldout_style/{probe}/concepts/classes"] == 5
        assert scores[f"heldout_style/{probe}/subgroups/classes"] == 5
        assert scores[f"heldout_concept/{probe}/subgroups/train"] == 25  # 2 things x 2, 1 x 1
        assert f"heldout_concept/{probe}/concepts/top1" not in scores


def test_geometry_is_the_losses_written_out(scored):
    encoder, dataset, scores = scored
    rows = dataset.rows("heldout_style")
    x = embed_images(encoder.model, dataset.images[rows]).double()
    names = [dataset.captions[n][0] for n in dataset.image_item[rows].tolist()]
    y = embed_texts(encoder.model, encoder.tokenizer(names)).double()
    align = sum(float(((a - b) ** 2).sum()) for a, b in zip(x, y, strict=True)) / len(x)
    assert scores["heldout_style/geometry/alignment"] == pytest.approx(align, rel=1e-4)
    for name, rows in (("images", x), ("texts", y)):
        far = [
            torch.exp(-2 * ((a - b) ** 2).sum())
            for i, a in enumerate(rows)
            for j, b in enumerate(rows)
            if i != j
        ]
        want = float(torch.stack(far).mean().log())
        assert scores[f"heldout_style/geometry/uniformity_{name}"] == pytest.approx(want, abs=1e-4)


def test_languages_are_those_that_the_items_have(scored):
    encoder, dataset, scores = scored
    assert scores["heldout_concept/languages/count"] == 3  # the captions', de, fr
    assert scores["heldout_concept/languages/items"] == 5
    item = dataset.image_item[dataset.rows("heldout_concept")]
    images = embed_images(encoder.model, dataset.images[dataset.rows("heldout_concept")])
    spread = []
    for n in item.unique().tolist():
        rank = []
        for text in (dataset.captions[n], *dataset.translations[n].values()):
            query = embed_texts(encoder.model, encoder.tokenizer(text[:1]))[0]
            cosines = (images.double() @ query.double()).tolist()
            best = max(c for c, i in zip(cosines, item.tolist(), strict=True) if i == n)
            rank.append(1 + sum(c > best for c in cosines))
        spread.append(statistics.pvariance(rank))
    want = pytest.approx(statistics.mean(spread))
    assert scores["heldout_concept/languages/t2i/mean_rank_variance"] == want
    args = encoder.model, encoder.tokenizer, dataset, images, item
    translations = dataset.translations
    first, *others = item.unique().tolist()
    try:
        dataset.translations = [dict(texts) for texts in translations]
        del dataset.translations[first]["de"]
        fewer = evaluation.language_scores(*args)
        for n in others[:2]:
            del dataset.translations[n]["de"]
        rare = evaluation.language_scores(*args)
        for n in others[2:]:
            del dataset.translations[n]["de"]
        gone = evaluation.language_scores(*args)
        dataset.translations = [{} for _ in translations]
        none = evaluation.language_scores(*args)
        same = [{"en": [names[0]]} for names in dataset.captions]
        dataset.translations = same
        agreed = evaluation.language_scores(*args)
    finally:
        dataset.translations = translations
    assert (fewer["languages/count"], fewer["languages/items"]) == (3, 4)
    assert (rare["languages/count"], rare["languages/items"]) == (2, 5)  # of 2 items in 5
    assert (gone["languages/count"], gone["languages/items"]) == (2, 5)
    assert none == {}
    assert agreed["languages/t2i/mean_rank_variance"] == 0


def test_a_score_that_cannot_be_otherwise_is_said_to_be(scored):
    *_, scores = scored
    assert "R@5, R@10 are 100 % for any model, with at most 4 wrong of 5" in table(
        {"score": scores}
    )
    one = {"a/i2t/candidates": 1, "a/t2i/candidates": 12}
    assert certain("a", one) == [
        "image to text: R@1, R@5, R@10 are 100 % for any model, with at most 0 wrong of 1 candidate"
    ]


def test_one_held_out_picture(data, scored, capsys):
    """No second picture, no second caption: what needs one is left out, and R@1 is remarked on."""
    encoder, dataset, _ = scored
    last = dataset.split[-1]
    dataset.split[-1] = "alone"
    try:
        scores = evaluate_fully(encoder.model, encoder.tokenizer, dataset, ["alone"])
    finally:
        dataset.split[-1] = last
    assert scores["alone/i2t/R@1"] == 1
    assert "note: image to text: R@1, R@5, R@10 are 100 % for any model" in table({"": scores})
    assert not any("classifier" in name or "uniformity" in name for name in scores)


def test_other_data_is_scored_whole(run, tmp_path, capsys):
    other = untrained_run.write_data(tmp_path / "other", split="train")
    evaluate.main([str(run), "--data", str(other), "--json", str(tmp_path / "scores.json")])
    assert "all: 40 pictures, 40 captions, 24 of them distinct" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {name.split("/")[0] for name in scores} == {"all"}
    assert not any("knn" in name for name in scores)  # nothing to fit on
    evaluate.main([str(run), "--split", "heldout_style"])
    assert "heldout_concept:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ("--split all", 1),
        ("--split train", 1),
        ("--data {data}", 1),
        ("", 0),
        ("--data {other}", 0),
    ],
)
def test_scores_of_training_pictures_are_marked(options, warned, run, data, tmp_path, capsys):
    other = untrained_run.write_data(tmp_path / "other", split="train")
    evaluate.main([str(run), *options.format(data=data, other=other).split()])
    assert capsys.readouterr().out.count("pictures that were trained on are scored too") == warned


def test_clip_benchmark_s_files(run, tmp_path):
    evaluate.main([str(run), "--clip-benchmark", str(tmp_path / "cb")])
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "cb").iterdir())]
    assert {record["task"] for record in records} == {
        "zeroshot_retrieval",
        "zeroshot_classification",
        "linear_probe",
    }
    for record in records:
        assert list(record) == ["dataset", "model", "pretrained", "task", "metrics", "language"]
    scores = {
        "x/clip_benchmark/image_retrieval_recall@1": 0.1,
        "x/clip_benchmark/text_retrieval_recall@5": 0.7,
        "x/t2i/R@1": 0.2,  # by our rule
        "x/linear_probe/concepts/top1": 0.3,
    }
    retrieval, probe = clip_benchmark(scores, "data", run)
    assert retrieval["metrics"] == {"image_retrieval_recall@1": 0.1, "text_retrieval_recall@5": 0.7}
    assert (probe["dataset"], probe["metrics"]) == ("data/x/concepts", {"lp_acc1": 0.3})


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (evaluate, "{run} --split test", "--split test: the data has 20 items"),
        (evaluate, "{run} --data {data} --train-data {data}", "--train-data name the same thing"),
        (evaluate, "{run} --prompts word", "--prompts must hold {{}} for the name, got 'word'"),
        (
            evaluate,
            "{weights}",
            "model.safetensors is damaged, or not of this run (SafetensorError)",
        ),
        (evaluate, "{model}", "model/config.json is damaged, or not of this run (JSONDecodeError)"),
        (evaluate, "{tokenizer}", "tokenizer.json is damaged"),
        (report, "{metrics}", "metrics.jsonl:1 is damaged, or not of this run (JSONDecodeError)"),
        (report, "nope", "nope holds no exported model"),
        (search, "nope x", "nope holds no exported model"),
        (search, "{run}", "nothing to search for"),
        (search, "{run} x -k 0", "-k must be at least 1, got 0"),
        (search, "{run} nowhere.png", "error: no picture: nowhere.png"),
        (search, "{run} {data}/captions.jsonl", "error: not a picture"),
        (search, "{run} x --data nowhere", "no data at {here}/nowhere"),
        (search, "{run} x --out {run}", "--out {run} is a folder"),
    ],
)
def test_bad_input_ends_with_one_line_that_names_it(
    command, arguments, message, run, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    places = {"run": run, "data": data, "here": tmp_path}
    for name, file in (
        ("weights", "model/model.safetensors"),
        ("model", "model/config.json"),
        ("tokenizer", "model/tokenizer.json"),
        ("metrics", "metrics.jsonl"),
    ):
        places[name] = broken = tmp_path / name
        for path in run.rglob("*"):
            if path.is_file() and path.name != "report.html":
                (broken / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
                (broken / path.relative_to(run)).write_bytes(path.read_bytes())
        (broken / file).write_bytes(b"{")
    with pytest.raises(SystemExit) as error:
        command.main(arguments.format(**places).split())
    assert error.value.code == 2
    stderr = capsys.readouterr().err
    assert message.format(**places) in stderr
    assert stderr.count("\n") == 1
