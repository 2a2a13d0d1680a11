"""`--report-to` sends what metrics.jsonl has to TensorBoard and Weights & Biases, and names the
extra that is missing; a run ends with its result and what to do next, and its model has a card."""

import json
import re
import sys

import pytest
from support.quick_run import QUICK, TINY

from ito import search, train
from ito.run import RunFolder


def logged(run) -> dict[tuple[str, int], float]:
    records = RunFolder(run).log().read()
    return {
        (f"{r['kind']}/{name}", r["step"]): value
        for r in records
        for name, value in r.items()
        if name not in ("kind", "step")
    }


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_library_is_named_before_anything_is_done(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as end:
        train.main(["--report-to", name, "--train-data", "/gone", "--out", str(tmp_path / "run")])
    printed = capsys.readouterr()
    assert end.value.code == 2
    assert re.match(rf"error: --report-to {name} needs {name} .*\[{name}\]'\n$", printed.err)
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_the_values_of_the_log(data, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    options = ["--train-data", str(data), "--out", str(run), *QUICK, "--report-to", "tensorboard"]
    train.main(options)
    train.main(["--resume", str(run), "--steps", "8", "--report-to", "tensorboard"])
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    scalars = {
        (tag, event.step): event.value
        for tag in found.Tags()["scalars"]
        for event in found.Scalars(tag)
    }
    expected = logged(run)
    assert scalars.keys() == expected.keys()
    assert scalars == pytest.approx(expected, rel=1e-6)


def test_wandb_has_the_values_of_the_log(data, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    sent, begin = {}, wandb.init

    def init(**options):
        begun = begin(**options)
        log = begun.log

        def spy(values, step):
            sent.update({(name, step): value for name, value in values.items()})
            log(values, step)

        begun.log = spy
        return begun

    monkeypatch.setattr(wandb, "init", init)
    run = tmp_path / "run"
    options = ["--train-data", str(data), "--out", str(run), *QUICK, "--report-to", "wandb"]
    train.main(options)
    assert sent == logged(run)
    train.main(["--resume", str(run), "--steps", "8", "--report-to", "wandb"])
    assert sent == logged(run)
    files = [*tmp_path.glob("wandb/offline-run-*/*.wandb")]
    assert len(files) == 2
    assert {file.stem for file in files} == {f"run-{(run / 'wandb.txt').read_text()}"}
    search.main([str(run), "red cat"])  # which refuses a folder with links out of it


def test_a_run_ends_with_its_result_and_what_to_do_next(data, tmp_path, capsys):
    run = tmp_path / "a run"
    options = [*TINY.split(), "--steps", "2", "--objective", "clip"]
    train.main(["--train-data", str(data), "--out", str(run), *options])
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0] == f"report     {run}/report.html"
    share = 100 * logged(run)["eval/heldout/i2t/R@1", 2]
    assert lines[1].startswith("result     Finds a right caption among ")
    assert f" for {share:.1f} % of " in lines[1]
    assert re.fullmatch(rf"next       python -m ito.search '{run}' \"[\w ]+\"", lines[2])
    assert lines[3] == f"           python -m ito.evaluate '{run}' --data YOUR_PICTURES"


def test_the_card_has_the_run_s_figures(finished):
    card = (finished / "model" / "README.md").read_text()
    front, text = card.split("---\n")[1:3]
    assert "pipeline_tag: zero-shot-image-classification\n" in front
    assert "license: unknown\n" in front
    last = RunFolder(finished).log().read("eval")[-1]
    share, low, high = (100 * last[f"heldout/i2t/R@1{end}"] for end in ("", "/low", "/high"))
    assert f"| image to text R@1 | {share:.1f}%" in text
    assert f"({low:.1f}–{high:.1f})" in text or low == high
    assert "6 steps of 16 items, objective ito, seed 0" in text


def test_the_card_of_a_batch_that_is_all_items(copy):
    facts = json.loads((copy / "data.json").read_text())
    (copy / "data.json").write_text(json.dumps(facts | {"train_items": 7}))
    from ito.scoring.model_card import write_card

    write_card(copy)
    assert "6 steps of 7 items" in (copy / "model" / "README.md").read_text()


def test_the_card_holds_no_markup_of_others(copy):
    evil = "# x\n---\n<script>`|[a](http://b)![c](d)&amp; **e** www.f.com g@h.com $i$"
    facts = json.loads((copy / "data.json").read_text())
    (copy / "data.json").write_text(json.dumps(facts | {"format": evil, "split_by": evil}))
    lines = (copy / "metrics.jsonl").read_text()
    split = json.dumps(evil.replace("/", ""))[1:-1]
    (copy / "metrics.jsonl").write_text(lines.replace("heldout/", f"{split}/"))
    environment = json.loads((copy / "environment.json").read_text())
    (copy / "environment.json").write_text(json.dumps(environment | {"torch": evil}))
    from ito.scoring.model_card import write_card

    before = (copy / "model" / "README.md").read_text()
    write_card(copy)
    card = (copy / "model" / "README.md").read_text()
    assert card.split("---\n")[1] == before.split("---\n")[1]  # the front matter
    assert card.count("\n") == before.count("\n")
    own = [line for line in card.splitlines() if "script" in line]
    assert len(own) >= 4
    for line in own:
        assert not re.search(r"(?<!\\)[<`\[\]!*$]|(?<!\\)://|www\.|h\.com(?<!\\@h\.com)", line), (
            line
        )
