"""--epochs, and the best checkpoint: which it is, that it is kept, and who uses it."""

import json

import pytest
import torch

import ito
from ito import evaluate, export, train
from ito.checkpoint import checkpoints, save_checkpoint
from ito.run import BEST_BY, Log


def refused(capsys, command, *arguments) -> str:
    with pytest.raises(SystemExit) as ended:
        command.main([*map(str, arguments)])
    assert ended.value.code == 2
    return capsys.readouterr().err.removeprefix("error: ").strip()


def test_an_epoch_has_all_items_but_an_incomplete_batch(data, tmp_path, capsys):
    """36 items to train on, 16 in a batch."""
    tiny = "--image-size 32 --width 32 --heads 2 --text-depth 1 --vocab-size 300"
    where = ["--train-data", str(data), "--out", str(tmp_path / "run"), *tiny.split()]
    run = train.main([*where, "--context-length", "8", "--batch-size", "16", "--epochs", "2"])
    assert "epochs     2 of 2 steps, 36 items each" in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["steps"] == 4
    assert list(checkpoints(run / "checkpoints")) == [4]
    told = refused(capsys, train, "--resume", run, "--epochs", 3)
    assert told.startswith("--epochs 3: --resume goes on to the run's steps")


def test_epochs_without_a_meaning_are_refused(data, capsys):
    some = ["--train-data", data, "--epochs"]
    assert refused(capsys, train, *some, 0) == "--epochs must be at least 1, got 0"
    told = refused(capsys, train, *some, 2, "--steps", 5)
    assert told == "--epochs 2: --steps says it too: drop one"
    told = refused(capsys, train, *some, 2, "--stream", "--val-data", data)
    assert told == "--epochs 2: the length of a --stream is not known: give --steps"


def test_the_best_step_is_the_first_of_the_highest_and_not_the_untrained_one(tmp_path):
    log = Log(tmp_path / "metrics.jsonl")
    log.start()
    assert log.best() is None
    for step, score in ((0, 0.9), (2, 0.3), (4, 0.5), (6, 0.5), (8, 0.4)):
        log.write("eval", step, {BEST_BY: score, "val/i2t/R@1": 1 - score})
        log.write("train", step, {BEST_BY: 1.0})
    assert log.best() == 4


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    for step in range(1, 8):
        save_checkpoint(tmp_path, step, {"model": {}}, best=2 if step >= 2 else 1)
    assert list(checkpoints(tmp_path)) == [2, 6, 7]


def test_a_better_evaluation_is_saved_and_exported_on_request(copy, data, capsys, monkeypatch):
    """The scores of steps 3 and 6 are made up: 3 is the best."""
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if line["kind"] == "eval"]
    for line in scored:
        ways = [line["heldout/i2t/R@1"], line["heldout/t2i/R@1"]]
        assert line[BEST_BY] == pytest.approx(sum(ways) / 2)
    scored[1][BEST_BY], scored[2][BEST_BY] = 0.9, 0.8
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert ito.load(copy).step == 6
    capsys.readouterr()
    export.main([str(copy), "--best"])
    assert f"exported step 3, the best by {BEST_BY}, to" in capsys.readouterr().out
    assert ito.load(copy).step == 3
    evaluate.main([str(copy)])
    assert "the model is of step 3; the newest checkpoint is of step 6" in capsys.readouterr().out

    train.main(
        ["--resume", str(copy), "--steps", "8", "--eval-every", "7", "--checkpoint-every", "8"]
    )
    kept = set(checkpoints(copy / "checkpoints"))
    assert {3, 8} <= kept  # the best of before, and the last
    told = capsys.readouterr().out
    command = f"python -m ito.export {copy} --best"
    assert f"best       step 3 by {BEST_BY}; the model is of step 8: {command}\n" in told


def test_an_evaluation_between_checkpoints_is_saved_if_it_is_the_best(data, tmp_path, monkeypatch):
    from support.quick_run import TINY

    made_up = iter([0.1, 0.2, 0.5, 0.4, 0.3])
    monkeypatch.setattr(train, "evaluate", lambda *_: scores(next(made_up)))
    where = ["--train-data", str(data), "--out", str(tmp_path / "run"), *TINY.split()]
    run = train.main([*where, "--steps", "4", "--eval-every", "1", "--checkpoint-every", "4"])
    assert list(checkpoints(run / "checkpoints")) == [2, 4]
    state = torch.load(run / "checkpoints" / "step_0000002.pt", weights_only=True)
    assert state["step"] == 2


def scores(value: float) -> dict:
    names = ("R@1", "chance", "candidates", "queries", "R@5", "R@10", "mean_rank", "median_rank")
    return {f"heldout/{way}/{name}": value for way in ("i2t", "t2i") for name in names}


def test_no_best_is_named(copy, capsys):
    (copy / "metrics.jsonl").write_text("")
    told = refused(capsys, export, copy, "--best")
    assert told.endswith(f"has no evaluation with {BEST_BY}")
