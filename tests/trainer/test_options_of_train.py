"""What the trainer is told, and what it tells: options, presets, bad input, by name."""

import argparse
import dataclasses
import json
import re
import shutil

import pytest
import torch
from support.quick_run import QUICK, write_set

import ito
from ito import evaluate as evaluate_command
from ito import export, prepare, train
from ito.cli import user_errors
from ito.config import Config, add_options, from_options
from ito.data.augment import CROP, DRAWINGS, PAPER
from ito.device import choose_precision

CPU = torch.device("cpu")


def test_help_groups_the_options(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    for group in ("run:", "data:", "objective:", "model:", "optimisation:", "augmentation:"):
        assert f"\n{group}\n" in text


def test_options_reach_the_configuration_and_its_file(tmp_path):
    parser = argparse.ArgumentParser()
    add_options(parser)
    given = [
        "--scale",
        "0.5",
        "1.0",
        "--stroke-p",
        "0",
        "--views",
        "3",
        "--denominator",
        "pooled",
        "--lr",
        "1e-2",
    ]
    config = from_options(parser.parse_args(given))
    augmentation = dataclasses.replace(DRAWINGS, scale=(0.5, 1.0), stroke_p=0.0)
    assert config == Config(views=3, denominator="pooled", lr=1e-2, augmentation=augmentation)
    assert from_options(parser.parse_args([])) == Config()
    config.save(tmp_path / "config.json")
    assert Config.load(tmp_path / "config.json") == config


def test_skipped_pictures_are_counted_and_named(tmp_path, capsys):
    folder = write_set(tmp_path / "data", items=20)
    (folder / "003-0.png").write_bytes(b"not a picture")
    (folder / "005-1.png").unlink()
    train.main(["--train-data", str(folder), "--out", str(tmp_path / "run"), *QUICK])
    output = capsys.readouterr().out
    assert "skipped 2 records" in output
    assert "captions.jsonl:7: not a picture" in output
    assert "captions.jsonl:12: no picture" in output
    report = (tmp_path / "run" / "report.html").read_text()
    assert "2 records skipped" in report
    facts = json.loads((tmp_path / "run" / "data.json").read_text())
    assert facts["skipped"] == {"not a picture": 1, "no picture": 1}
    told = "jsonl: 38 pictures of 20 items with 40 captions, "
    assert told in report
    assert f"read       {told}" in output
    assert output.index(told) < output.index("trained    6 steps")


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (train, "--train-data nowhere", "no data at {here}/nowhere"),
        (train, "--train-data {wrong}", "wrong.csv:1: no column 'title'"),
        (train, "--train-data {wrong} --csv-separator ,", "separator ','; set --csv-separator"),
        (train, "--train-data {broken}", "training needs at least 2 items"),
        (train, "--train-data {single}", "training needs at least 2 items"),
        (train, "--train-data {data} --views 1", "views must be at least 2, got 1"),
        (train, "--train-data {data} --views 0", "views must be at least 1, got 0"),
        (
            train,
            "--train-data {data} --objective clip --scale 1 1",
            "not take scale; clip-aug does",
        ),
        (
            train,
            "--train-data {data} --objective slip --lambda-fusion 2 --views 3",
            "slip does not take lambda_fusion, views",
        ),
        (train, "--train-data {data} --lock-text", "keeps the weights of --pretrained: name a run"),
        (
            train,
            "--train-data {data} --pretrained {finished} --image-size 64 --heads 4",
            "has image_size 32, heads 2: drop the options",
        ),
        (train, "--train-data {data} --accum-freq 65", "36 items cannot be cut into 65 parts"),
        (train, "--train-data {data} --device meta", "--device meta: training runs on cpu or cuda"),
        (train, "--resume {damaged}", "step_0000006.pt is damaged (File is not a zip file)"),
        (train, "--resume {finished} --objective clip", "configuration: drop --objective"),
        (train, "--resume {finished} --preset emoji-full", "drop --preset emoji-full"),
        (train, "--train-data {data} --image-size 36", "must be a multiple of 8, got 36"),
        (train, "--train-data {data} --gray-p 2", "gray_p is a probability"),
        (train, "--train-data {data} --device gpu", "--device gpu: Expected one of cpu, cuda"),
        (train, "--train-data {data} --out {data}", "exists; name another --out"),
        (train, "--train-data {data} --out {wrong}/run", "--out: cannot create {wrong}/run: Not a"),
        (train, "--cache {wrong}", "--cache: cannot prepare {wrong}/emoji-small"),
        (train, "--resume nope", "--resume: no run folder at nope"),
        (
            train,
            "--resume {finished} --out other",
            "{finished} continues in that folder: drop --out",
        ),
        (train, "--resume {finished} --lr 1 --flip-p 1", "configuration: drop --lr, --flip-p"),
        (train, "--resume {finished} --precision {other}", "precision, {kept}: drop --precision"),
        (evaluate_command, "nope", "nope holds no exported model because it does not exist"),
        (
            train,
            "--train-data {data} --pretrained open-clip:ViT",
            "{here}/open-clip:ViT: name a run",
        ),
        (train, "--train-data {data} --stream", "--val-data: of a stream nothing is held out"),
        (evaluate_command, "{finished}/model", "model/config.json is not the configuration of a"),
        (evaluate_command, "{finished} --train-data {wrong}", "wrong.csv:1: no column 'title'"),
        (evaluate_command, "{finished} --json {wrong}/x", "{wrong} is not a folder"),
        (export, "nope", "nope holds no checkpoint"),
        (export, "{finished} --out {wrong}", "{wrong} is not a folder"),
        (prepare, "emoji-small --out {wrong}", "is not the small emoji set"),
    ],
)
def test_bad_input_ends_with_one_line_that_names_it(
    command, arguments, message, data, finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("filepath\twords\na.png\tb\n")
    broken = write_set(tmp_path / "broken", items=1)
    (broken / "captions.jsonl").write_text('{"image": "000-0.png", "caption": "a"}\n{"image"')
    dtype = json.loads((finished / "environment.json").read_text())["dtype"]
    kept, other = ("bf16", "fp32") if dtype == "torch.bfloat16" else ("fp32", "bf16")
    damaged = shutil.copytree(finished, tmp_path / "damaged")
    (damaged / "checkpoints" / "step_0000006.pt").write_bytes(b"x")
    places = {
        "damaged": damaged,
        "here": tmp_path,
        "data": data,
        "wrong": wrong,
        "broken": broken,
        "single": write_set(tmp_path / "single", items=1),
        "finished": finished,
        "kept": kept,
        "other": other,
    }
    with pytest.raises(SystemExit) as error:
        command.main(arguments.format(**places).split())
    assert error.value.code == 2
    stderr = capsys.readouterr().err
    assert message.format(**places) in stderr
    assert stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        "wrong.csv",
        "broken",
        "damaged",
        "single",
    }


@pytest.mark.parametrize("option", ["threads", "log-every", "eval-every", "checkpoint-every"])
def test_counts_are_positive(option, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        train.main(["--train-data", str(data), f"--{option}", "0"])
    assert error.value.code == 2
    assert re.search(rf"{option[-5:]}.* must be at least 1, got 0", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "error: No space left on device\n"),
        (PermissionError(13, "Permission denied", "a/b"), "error: a/b: Permission denied\n"),
        (FileExistsError("a exists"), "error: a exists\n"),
    ],
)
def test_the_system_s_errors_are_told_in_words(error, message, capsys):
    with pytest.raises(SystemExit), user_errors():
        raise error
    assert capsys.readouterr().err == message


def test_a_diverged_run_ends_with_one_line(data, tmp_path, capsys):
    arguments = ["--train-data", str(data), "--out", str(tmp_path / "run"), *QUICK]
    with pytest.raises(SystemExit) as error:
        train.main([*arguments, "--lr", "1e30"])
    assert error.value.code == 1
    assert re.search(r"\nerror: the loss of step \d is nan\n$", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be at least 1e-09, got 0.0"),
        ({"lr": float("nan")}, "lr must be at least 1e-09, got nan"),
        ({"lambda_fusion": -1.0}, "lambda_fusion must be at least 0, got -1.0"),
        ({"grad_clip": 0.0}, "grad_clip must be at least 1e-09, got 0.0"),
        ({"warmup": 3.0}, "warmup must be at most 1, got 3.0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"text_depth": 0}, "text_depth must be at least 1, got 0"),
        ({"seed": 2**70}, f"seed must be at most {2**63 - 1}, got {2**70}"),
        ({"load_size": 65}, "load_size must be at most twice image_size = 32.* got 65"),
        ({"csv_separator": "::"}, "--csv-separator must be one character, got '::'"),
    ],
)
def test_the_configuration_names_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_load_and_precision_name_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no exported model"):
        ito.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nope holds no exported model because it does no"):
        ito.load(tmp_path / "nope")
    with pytest.raises(ValueError, match="precision must be auto, bf16, fp16 or fp32, got 'fp8'"):
        choose_precision("fp8", CPU)


def test_presets_are_values_for_what_is_not_given():
    parser = argparse.ArgumentParser()
    train.run_options(parser)
    add_options(parser)

    def config(*given):
        return from_options(parser.parse_args(given))

    assert config("--preset", "emoji-small") == Config()
    assert config("--preset", "emoji-full") == Config(train_data="emoji-full")
    paper = config("--preset", "cc12m-vitb16", "--batch-size", "512")
    assert (paper.image_size, paper.patch_size, paper.lr, paper.batch_size) == (224, 16, 1e-3, 512)
    assert paper.augmentation == PAPER
    assert paper.warmup * paper.steps == pytest.approx(10_000)
    yfcc = config("--preset", "yfcc15m-vitb16", "--objective", "clip")
    assert yfcc.augmentation == CROP
    assert yfcc.steps * yfcc.batch_size / 14_082_031 == pytest.approx(30, abs=1e-3)  # epochs


def test_resuming_a_finished_run_says_so_and_one_held_out_item_is_remarked(
    finished, tmp_path, capsys
):
    train.main(["--resume", str(finished)])
    assert f"{finished} is finished: it has all of its 6 steps" in capsys.readouterr().out
    few = write_set(tmp_path / "few", items=12)
    train.main(["--train-data", str(few), "--out", str(tmp_path / "run"), *QUICK, "--steps", "1"])
    assert "warning    heldout holds 1 item: R@1 is 100 %" in capsys.readouterr().out


def test_encode_text_names_what_is_no_text(finished):
    with pytest.raises(TypeError, match=r"texts\[1\] must be a text, got 3"):
        ito.load(finished).encode_text(["a cat", 3])
    with pytest.raises(TypeError, match=r"^texts must be a text, or several; got int"):
        ito.load(finished).encode_text(3)


def test_encode_image_names_the_picture(finished, tmp_path):
    encoder = ito.load(finished)
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"images\[1\]: not a picture: .*bad.png"):
        encoder.encode_image([torch.zeros(3, 8, 8, dtype=torch.uint8), tmp_path / "bad.png"])
    with pytest.raises(ValueError, match=r"images\[0\] must be uint8 \(3, H, W\), got torch.float"):
        encoder.encode_image(torch.zeros(3, 8, 8))


def test_precision_follows_the_processor(monkeypatch):
    for flags, want in (
        ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx2": True}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        assert choose_precision("auto", CPU)[0] == want
    assert choose_precision("bf16", CPU)[0] == torch.bfloat16
