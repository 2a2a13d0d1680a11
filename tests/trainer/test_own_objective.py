"""`--objective FILE.py:NAME`: what a file's loss is given, what of it is kept, what is refused."""

import json

import pytest
import torch
from support import untrained_run

from ito import train
from ito.checkpoint import load_checkpoint
from ito.config import Config
from ito.model.tokenizer import Tokenizer
from ito.source import open_dataset
from ito.trainer import Trainer

SMALL = {"image_size": 16, "load_size": 32, "width": 16, "heads": 2, "text_depth": 1}
QUICK = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
QUICK += ["--batch-size=6", "--vocab-size=300", "--precision=fp32", "--threads=1", "--log-every=1"]
# CLIP as anyone would write it, and a bias of its own that it learns
OWN = """
import torch, torch.nn.functional as F

def clip(image, text, logit_scale, *, item, step, generator, group):
    scores = logit_scale * image[0] @ text[0].T
    own = torch.arange(len(scores))
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2

SEEN = []

def seen(image, text, logit_scale, *, item, step, generator, group):
    drawn = torch.rand(2, generator=generator).tolist()
    SEEN.append((image.shape, text.shape, item.tolist(), step, drawn, group))
    return clip(image, text, logit_scale, item=None, step=0, generator=None, group=None)

class Biased(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor(-1.0))

    def forward(self, image, text, logit_scale, **about):
        scores = logit_scale * image[0] @ text[0].T + self.bias
        loss = F.softplus(scores - 2 * scores.diag().diag()).mean()
        return loss, {"bias": self.bias}

class Needy(torch.nn.Module):
    def __init__(self, width):
        super().__init__()

class Other:
    pass

def short(image, text):
    return image.sum()

def wide(image, text, logit_scale, **about):
    return image[0] @ text[0].T

def detached(image, text, logit_scale, **about):
    return image.detach().mean()

def named(image, text, logit_scale, **about):
    return image.mean(), {"scores": 2.0}

def broken(image, text, logit_scale, **about):
    return image @ torch.ones(3)

number = 7
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return untrained_run.write_data(tmp_path_factory.mktemp("own") / "data")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def trainer(data, objective, **options):
    config = Config(train_data=str(data), objective=objective, batch_size=6, **SMALL, **options)
    dataset = open_dataset(config)
    tokenizer = Tokenizer.train([c for names in dataset.captions for c in names], 300, 8)
    return Trainer(config, dataset, tokenizer, torch.device("cpu"), torch.float32), dataset


@pytest.mark.parametrize("accum_freq", [1, 3])
def test_clip_of_one_s_own_is_clip(data, file, accum_freq):
    theirs, _ = trainer(data, "clip-aug", accum_freq=accum_freq)
    own, _ = trainer(data, f"{file}:clip", accum_freq=accum_freq)
    for number in range(3):
        want, got = theirs.step(number), own.step(number)
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


def test_what_a_function_is_given(data, file):
    own, dataset = trainer(data, f"{file}:seen", views=3, captions=2)
    for number in (0, 1, 0):
        own.step(number)
    found = own.objective.function.__globals__["SEEN"]
    (image, text, item, step, drawn, group), second, again = found
    assert (image, text, step, group) == ((3, 6, 16), (2, 6, 16), 1, None)
    assert second[3] == 2
    assert again[2:5] == (item, step, drawn)
    assert second[4] != drawn
    # the items' numbers: their captions are those that the batch holds
    _, ids, numbers, _ = own.batch(0)
    assert numbers.tolist() == item
    tokenizer = Tokenizer.train([c for names in dataset.captions for c in names], 300, 8)
    for number, row in zip(item, ids.permute(1, 0, 2), strict=True):
        want = tokenizer(dataset.captions[number])[:, : row.shape[1]]
        assert sorted(row.tolist()) == sorted(want.tolist())


def test_a_module_s_parameters_are_trained_saved_and_resumed(
    data, file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)  # a relative path is kept as an absolute one
    arguments = ["--train-data", str(data), "--objective", "own.py:Biased", *QUICK]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.main([*arguments, "--steps", "4", "--out", str(whole), "--checkpoint-every", "2"])
    assert json.loads((whole / "config.json").read_text())["objective"] == f"{file}:Biased"
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    biases = [line["bias"] for line in lines if line["kind"] == "train"]
    assert len(set(biases)) == 4
    state = load_checkpoint(whole / "checkpoints")
    assert state["objective"].keys() == {"function.bias"}
    cut.mkdir()
    for path in whole.rglob("*"):
        if path.is_file() and path.name != "step_0000004.pt":
            copy = cut / path.relative_to(whole)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    monkeypatch.chdir(data)
    with pytest.raises(SystemExit):  # the folder may be others'
        train.main(["--resume", str(cut)])
    told = f"names a file, which is run only if you give it: --objective {file}:Biased\n"
    assert told in capsys.readouterr().err
    train.main(["--resume", str(cut), "--objective", f"{file}:Biased"])
    assert "warning" not in capsys.readouterr().out
    assert torch.equal(
        load_checkpoint(cut / "checkpoints")["objective"]["function.bias"],
        state["objective"]["function.bias"],
    )
    file.write_text(OWN + "# changed")
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", str(cut), "--objective", "own.py:Biased"])
    assert "warning    objective was " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope.py:clip", "nope.py:clip: there is no file"),
        ("own.py:nope", "own.py:nope: own.py has no nope"),
        ("own.py:number", "number must be a function or a torch.nn.Module class, got int"),
        ("own.py:Other", "Other must be a function or a torch.nn.Module class, got a class"),
        ("own.py:Needy", "own.py:Needy: TypeError: "),
        (
            "own.py:short",
            "short must take (image, text, logit_scale, *, item, step, generator, gro",
        ),
        ("own.py:detached", "own.py:detached: its loss must have a gradient"),
        ("own.py:wide", "own.py:wide: its loss must be a tensor of one number, got (6, 6)"),
        ("own.py:named", "own.py:named: scores must be a tensor of one number, got float"),
        ("own.py:broken", "own.py:broken: RuntimeError in line 46: "),
        ("syntax.py:clip", "syntax.py:clip: SyntaxError: "),
        (
            "own.py",
            "objective must be one of ('ito', 'clip', 'clip-aug', 'slip', 'siglip', 'flair')",
        ),
        ("own.py:clip --lambda-fusion 1", "own.py:clip does not take lambda_fusion"),
    ],
)
def test_what_is_refused_is_told_in_one_line(name, message, data, file, capsys, monkeypatch):
    monkeypatch.chdir(file.parent)
    (file.parent / "syntax.py").write_text("def clip(:\n")
    arguments = ["--train-data", str(data), "--objective", *name.split(), *QUICK]
    with pytest.raises(SystemExit) as end:
        train.main([*arguments, "--steps", "1", "--out", "run"])
    assert end.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "objective" in last
    assert message in last
