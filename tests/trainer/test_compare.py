"""`ito.compare`: what is run, what is not run again, and the arithmetic of the report."""

import argparse
import json
import re
import time

import pytest
from support.quick_run import QUICK

from ito import compare, train
from ito.config import Config, add_options, from_options
from ito.scoring import comparison, cost
from ito.scoring.cost import StepCost
from ito.trainer import Trainer

STEPS = 40


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(words)


def options(tmp_path, **more) -> argparse.Namespace:
    chosen = {"out": tmp_path, "seeds": [0, 1], "arms": ["clip", "ito"], "jobs": 1}
    return argparse.Namespace(**chosen | {"threads": None, "cache": None, "steps": STEPS} | more)


def test_the_plan_goes_seed_by_seed(tmp_path):
    runs = compare.plan(options(tmp_path))
    assert [run.name for run in runs] == ["clip-seed0", "ito-seed0", "clip-seed1", "ito-seed1"]


@pytest.mark.parametrize("arm", compare.ARMS)
def test_a_run_is_given_the_configuration_that_was_planned(tmp_path, arm):
    more = {"batch_size": 8, "scale": [0.5, 0.9]} if arm != "clip" else {"batch_size": 8}
    more = {name: x for name, x in more.items() if name in Config().flat()}
    (run,) = compare.plan(options(tmp_path, arms=[arm], seeds=[3], **more))
    assert from_options(parsed(*run.options)) == run.config
    assert (run.config.seed, run.config.steps, run.config.batch_size) == (3, STEPS, 8)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--seeds 0 1 0", "--seeds must differ, got 0 1 0"),  # two runs in one folder
        ("--arms clip clip", "--arms must differ, got clip clip"),
        ("--jobs 0", "--jobs must be at least 1, got 0"),
    ],
)
def test_bad_options_are_told_before_anything_runs(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit):
        compare.main(["--out", str(tmp_path / "out"), *words.split()])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_flag_is_given_without_a_value(tmp_path):
    more = {"stream": True, "val_data": "/val", "train_data": "/train"}
    (run,) = compare.plan(options(tmp_path, arms=["clip"], seeds=[0], **more))
    assert from_options(parsed(*run.options)) == run.config


def test_what_the_arms_differ_in_is_refused_as_an_option(tmp_path):
    with pytest.raises(ValueError, match="--lambda-fusion is set by the arms"):
        compare.plan(options(tmp_path, lambda_fusion=1.0))


def test_help_shows_the_shared_options_and_none_that_is_refused(capsys):
    with pytest.raises(SystemExit):
        compare.main(["--help"])
    shown = re.findall(r"--[a-z-]+", capsys.readouterr().out)
    assert {"--seeds", "--views", "--lr"} <= set(shown)
    assert not {"--seed", "--objective", "--lambda-fusion"} & set(shown)


def test_arms_differ_in_more_than_their_names(tmp_path):
    runs = compare.plan(options(tmp_path, arms=list(compare.ARMS), seeds=[0]))
    assert len({run.config for run in runs}) == len(compare.ARMS)


def test_finished_runs_stay_and_those_cut_off_go_on(tmp_path, monkeypatch):
    """One of each: finished, trained but not scored, with a checkpoint, without one, not begun."""
    places = {"train_data": "pipe:cat a.tar", "val_data": "/val"}
    chosen = options(tmp_path, seeds=[0, 1, 2], **places)
    whole, scoreless, halfway, early, new, _ = compare.plan(chosen)
    for run in (whole, scoreless, halfway, early):
        (tmp_path / run.name / "checkpoints").mkdir(parents=True)
        run.config.save(tmp_path / run.name / "config.json")
    for name in ("cost.json", "evaluation.json"):
        (tmp_path / whole.name / name).write_text("{}")
    (tmp_path / scoreless.name / "cost.json").write_text('{"peak_bytes": 7}')
    (tmp_path / halfway.name / "checkpoints" / "step_0000010.pt").touch()
    called, scored = [], []

    def call(words, log, environment):
        if "ito.evaluate" in words:
            scored.append(words[3])
            data = parsed(*words[6:])  # a command in place of data is run only if it is given
            assert (data.train_data, data.val_data) == (chosen.train_data, chosen.val_data)
        if "ito.train" in words:
            called.append(words[3:])
            if "--out" in words:
                (tmp_path / words[words.index("--out") + 1]).mkdir()
        return {"peak_bytes": 0, "cpu_seconds": 0}

    monkeypatch.setattr(compare, "call", call)
    compare.train_all([whole, scoreless, halfway, early, new], chosen)
    assert scored == [str(tmp_path / run.name) for run in (scoreless, halfway, early, new)]
    # what its training took is not what its scoring takes
    assert json.loads((tmp_path / scoreless.name / "cost.json").read_text()) == {"peak_bytes": 7}
    assert called == [
        ["--resume", str(tmp_path / halfway.name), "--train-data", "pipe:cat a.tar"],
        ["--resume", str(tmp_path / early.name), "--train-data", "pipe:cat a.tar"],
        ["--out", str(tmp_path / new.name), *new.options],
    ]


def test_a_folder_of_other_options_is_refused(tmp_path):
    (run,) = compare.plan(options(tmp_path, arms=["ito"], seeds=[0]))
    (other,) = compare.plan(options(tmp_path, arms=["ito"], seeds=[0], steps=STEPS + 1))
    (tmp_path / run.name).mkdir()
    other.config.save(tmp_path / run.name / "config.json")
    with pytest.raises(ValueError, match="another steps"):
        compare.train_all([run], options(tmp_path))


def test_a_run_that_fails_shows_the_end_of_its_output(tmp_path):
    words = [compare.sys.executable, "-c", "print('it broke'); raise SystemExit(3)"]
    with pytest.raises(OSError, match=r"ended with 3:\nit broke"):
        compare.call(words, tmp_path / "log", {})
    words[2] = "raise SystemExit(3)"
    with pytest.raises(OSError, match=r"ended with 3:\n$"):  # not what broke before
        compare.call(words, tmp_path / "log", {})


def write_run(folder, config: Config, score, gap, align, threads=1) -> None:
    """A finished run whose R@1, gap and loss are functions of the step."""
    folder.mkdir(parents=True)
    config.save(folder / "config.json")
    records = []
    for step in range(0, STEPS + 1, 2):
        if step:
            record = {"kind": "train", "step": step, "logit_scale": 10.0 + step}
            records.append(record | {"align": align(step), "fusion": 0.5})
        if step % 10 == 0:
            values = {f"{way}/R@1": score(step) for way in ("i2t", "t2i")}
            values |= {"i2t/candidates": 400, "i2t/chance": 1 / 400, "modality/gap": gap(step)}
            values |= {"modality/relative": gap(step), "t2i/R@10": 0.5}
            named = {f"heldout_style/{name}": x for name, x in values.items()}
            records.append({"kind": "eval", "step": step} | named)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    environment = {"threads": threads, "dtype": "torch.float32", "data": "400 items"}
    (folder / "environment.json").write_text(json.dumps(environment))
    more = {"heldout_style/linear_probe/concepts/top1": score(STEPS) / 2}
    (folder / "evaluation.json").write_text(json.dumps(more))
    (folder / "cost.json").write_text(json.dumps({"peak_bytes": 3 << 20, "cpu_seconds": 1}))
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_bytes(bytes(1 << 20))


@pytest.fixture
def two_arms(tmp_path, monkeypatch):
    """Two arms, three seeds: ITO learns twice as fast by step and costs twice as much."""
    monkeypatch.setattr(comparison, "draw_maps", lambda *_: "by hand")
    cost = {"clip-aug": 0.1, "ito-align": 0.2, "ito-pooled": 0.2}
    costs = {arm: StepCost(seconds, 0.01, 0.02) for arm, seconds in cost.items()}
    monkeypatch.setattr(comparison, "step_costs", lambda folders, _: {x: costs[x] for x in folders})
    chosen = options(tmp_path, seeds=[0, 1, 2], arms=["clip-aug", "ito-align"])
    for run in compare.plan(chosen):
        k = 2 if run.arm == "ito-align" else 1
        bonus = 0.01 * run.config.seed * k
        write_run(
            tmp_path / run.name,
            run.config,
            lambda step, k=k, bonus=bonus: 0.01 * k * step / 2 + bonus,
            lambda step, k=k: 1 - 0.02 * step / k,
            lambda step, k=k: 3.95 + 0.05 * k - 0.05 * k * step,
        )


def test_the_report(tmp_path, two_arms):
    known = {arm: {"seconds": 9.0, "input": 0.0} for arm in ("clip-aug", "ito-align")}
    (tmp_path / "step_costs.json").write_text(json.dumps(known))  # an older one, without `loader`
    text = comparison.write_comparison(tmp_path).read_text()
    clip, ito = [line for line in text.splitlines() if line.startswith(("| clip-aug", "| ito-al"))][
        :2
    ]
    # at the end 0.2 + 0.01 seed and 0.4 + 0.02 seed; the last quarter is 10 of 40 steps
    assert "| 21.0 ± 1.0 | 21.0 ± 1.0 |" in clip
    assert clip.endswith("| 0.20 ± 0.00 | 0.20 ± 0.00 | 50.00 ± 0.00 | 5.0 ± 0.0 |")
    assert "| 42.0 ± 2.0 | 42.0 ± 2.0 |" in ito
    assert "| ito-align | 21.0 ± 1.0 |  |" in text  # what was not evaluated is left empty
    # clip-aug has ended after 4 s; ITO has made 20 steps by then
    assert "After 4 s of steps" in text
    assert "| ito-align | 20 | 22.0 ± 2.0 | 0.80 ± 0.00 |" in text
    # differences 0.20, 0.21, 0.22: 4.303 · 0.01 / √3
    assert "| ito-align − clip-aug | 21.0 ± 2.5, significant | 0.40 ± 0.00, significant |" in text
    # the least of the best is 20 %: clip-aug's seed 0 gets there at step 40, ITO's at 20, 18, 16
    assert "When R@1 first reaches 20.0%" in text
    assert "| ito-align | 18 | 0.82 ± 0.02 | 0.82 ± 0.02 | 28.00 ± 2.00 |" in text
    # a mean of ten is nine steps late: clip-aug ends at 4 - 0.05 · 31, ITO is there at step 25
    assert "first reaches 2.45" in text
    assert "| ito-align | 25 | 0.75 ± 0.00 | 0.75 ± 0.00 | 35.00 ± 0.00 |" in text
    assert "| ito-align | 200 | 2.00 | 5.0 | 20.0 | 3 | 1.0 |" in text
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_pooled_loss_is_not_matched_with_those_of_pairs(tmp_path, two_arms):
    """Its floor is ½ ln 2: it would decide when the others are looked at."""
    before = comparison.write_comparison(tmp_path).read_text()
    (run,) = compare.plan(options(tmp_path, seeds=[0], arms=["ito-pooled"]))
    curves = (lambda step: 0.01 * step, lambda step: 0.5, lambda step: 3.0)
    write_run(tmp_path / run.name, run.config, *curves)
    after = comparison.write_comparison(tmp_path).read_text()
    assert "first reaches 2.45" in before
    assert "first reaches 2.45" in after
    assert "| ito-pooled | " in after


@pytest.mark.parametrize(
    ("config", "threads", "said"),
    [({"steps": 2 * STEPS}, 1, "steps"), ({"batch_size": 8}, 1, "batch_size"), ({}, 2, "threads")],
)
def test_unequal_runs_are_not_compared(tmp_path, two_arms, config, threads, said):
    more = {"arms": ["siglip"], "seeds": [0]} | config
    (run,) = compare.plan(options(tmp_path, **more))
    curves = [lambda step: 0.5] * 3
    write_run(tmp_path / run.name, run.config, *curves, threads=threads)
    with pytest.raises(ValueError, match=f"differ in {said}: compare runs of equal"):
        comparison.write_comparison(tmp_path)


def test_runs_scored_by_an_older_version_are_not_compared(tmp_path, two_arms):
    log = tmp_path / "ito-align-seed0" / "metrics.jsonl"
    *lines, last = log.read_text().splitlines()
    last = json.loads(last)
    (split,) = {name.split("/")[0] for name in last if "/" in name}
    last |= {f"{split}/distinct_captions": 7}
    log.write_text("\n".join([*lines, json.dumps(last)]) + "\n")
    with pytest.raises(ValueError, match="differ in version of the scores"):
        comparison.write_comparison(tmp_path)


def test_no_command_of_a_folder_is_run(tmp_path, two_arms, capsys):
    """What opens the data, the costs and the maps, is not called (it is replaced here)."""
    command = "pipe:cat a.tar"
    for path in tmp_path.glob("*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"train_data": command}))
    for other in ([], ["--train-data", f"{command}2"]):
        with pytest.raises(SystemExit):
            compare.main(["--out", str(tmp_path), "--report-only", *other])
        assert "its config.json names a command" in capsys.readouterr().err
        assert not (tmp_path / "comparison.md").exists()
    compare.main(["--out", str(tmp_path), "--report-only", "--train-data", command])
    assert (tmp_path / "comparison.md").exists()


def test_an_interval_that_holds_zero_is_not_significant():
    assert comparison.interval([0.01, -0.01, 0.02], comparison.percent) == "0.7 ± 3.8"
    assert comparison.interval([0.01], comparison.percent) == "1.0 (one seed)"


def test_no_finished_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no finished run"):
        comparison.write_comparison(tmp_path)


def test_steps_are_timed_by_turns(tmp_path, data, finished, monkeypatch):
    """More views take longer, and what is waited for is a part of a step."""
    monkeypatch.setattr(cost, "ROUNDS", 5)
    threads = json.loads((finished / "environment.json").read_text())["threads"]
    more = tmp_path / "more"
    arguments = ["--train-data", str(data), "--out", str(more), "--threads", str(threads), *QUICK]
    train.main([*arguments, "--views", "12", "--steps", "1"])
    two, twelve = cost.step_costs({"two": finished, "twelve": more}).values()
    assert 0 < two.input < two.seconds < twelve.seconds
    assert 0 < two.loader < two.seconds

    def slow(trainer, number, batch=Trainer.batch):
        time.sleep(0.2)  # more than a step computes
        return batch(trainer, number)

    # a batch that takes long is prepared in the turn of the one that needs it
    monkeypatch.setattr(Trainer, "batch", slow)
    for arm in cost.step_costs({"two": finished, "again": finished}).values():
        assert arm.seconds > 0.2
        assert 0.05 < arm.input < arm.seconds
