"""Zero-shot evaluation from files of classes and templates, against CLIP's recipe in a loop."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support import untrained_run

import ito
from ito import evaluate
from ito.scoring import metrics

FOLDERS = {"n01": "red cat", "n02": "blue dog", "n03": "pink boat"}
TEMPLATES = ["a photo of a {}.", "{}", "the {c} again"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained_run.write(tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """5, 4 and 3 pictures of noise in folders by WordNet-like numbers."""
    root, random = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for n, name in enumerate(FOLDERS):
        (root / name).mkdir()
        for k in range(5 - n):
            pixels = random.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{k}.png")
    return root


def write(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("form", ["names", "folders"])
def test_the_scores_are_those_of_clip_s_recipe(form, run, pictures, tmp_path, capsys):
    names = {**FOLDERS, "n04": "old tree", "n05": "wet moon", "n06": "grey sun", "n07": "hot car"}
    lines = [f"{folder}\t{name}" for folder, name in names.items()]
    if form == "names":
        names = dict(FOLDERS)
        lines = [*names.values()]
    scores = tmp_path / "scores.json"
    files = ["--classes", write(tmp_path / "classes.txt", lines)]
    files += ["--templates", write(tmp_path / "templates.txt", TEMPLATES)]
    evaluate.main([str(run), "--data", str(pictures), "--json", str(scores), *files])
    got = json.loads(scores.read_text())

    encoder = ito.load(run)
    classes = []
    for name in names.values():
        own = [t.replace("{c}", "{}").replace("{}", name) for t in TEMPLATES]
        mean = torch.stack([encoder.encode_text(text)[0].double() for text in own]).mean(0)
        classes.append(mean / mean.norm())
    ranks = []
    for label, folder in enumerate(FOLDERS):
        for path in sorted((pictures / folder).iterdir()):
            image = encoder.encode_image(path)[0].double()
            cosines = [float(image @ c) for c in classes]
            ranks.append(1 + sum(c >= cosines[label] for n, c in enumerate(cosines) if n != label))
    assert len(ranks) == 12
    assert got["top1"] == pytest.approx(sum(r <= 1 for r in ranks) / 12)
    assert got["top5"] == pytest.approx(sum(r <= 5 for r in ranks) / 12)
    assert got["classes"] == len(names)
    assert got["top1/low"] <= got["top1"] <= got["top1/high"]
    told = capsys.readouterr().out
    assert f"zero-shot  {len(names)} classes, 3 templates, 12 pictures" in told
    assert f"  chance {1 / len(names):.2%}" in told


def test_the_interval_is_near_the_binomial_one():
    labels = torch.zeros(400, dtype=torch.int64)
    images = torch.eye(2)[torch.arange(400).remainder(4).eq(0).long()]
    found = metrics.zero_shot(images, torch.eye(2), labels, intervals=True)
    assert found["top1"] == 0.75
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    for end, want in (("low", 0.75 - half), ("high", 0.75 + half)):
        assert found[f"top1/{end}"] == pytest.approx(want, abs=0.01)


@pytest.mark.parametrize(
    ("lines", "more", "told"),
    [
        (["a", "b"], [], "--classes {file} must have a name for each of 3 folders"),
        (
            ["n01\ta", "n02\tb"],
            [],
            "--classes {file} must have a name for each of 3 folders",
        ),
        ([""], [], "--classes {file} must have a text on each line, got none"),
        (
            ["a", "b", "c"],
            ["--prompts", "{}"],
            "--prompts does not go with --templates or --classes",
        ),
        (["a", "b", "c"], ["--split", "no"], "--split no: the data has 12 items"),
        (["a", "b", "c"], ["--templates", "{bad}"], "--templates must hold {{}} for the name"),
    ],
)
def test_files_that_do_not_fit_are_refused(lines, more, told, run, pictures, tmp_path, capsys):
    file = write(tmp_path / "classes.txt", lines)
    bad = write(tmp_path / "bad.txt", ["no name"])
    more = [bad if word == "{bad}" else word for word in more]
    with pytest.raises(SystemExit):
        evaluate.main([str(run), "--data", str(pictures), "--classes", file, *more])
    assert f"error: {told.format(file=file)}" in capsys.readouterr().err
