"""Every command on a page exists and takes its options. With `-m slow` the trainer's run, on tiny
data, but for those that download, take hours or never end."""

import json
import re
import shlex
import subprocess
import sys
from importlib import import_module

import pytest
from support.pages import PAGES, ROOT, commands
from support.quick_run import QUICK, write_set
from support.tars import tar

from ito.cli import Parser

COMMANDS = list(dict.fromkeys(x for page in PAGES if page != "docs/LOG.md" for x in commands(page)))


class Parsed(BaseException):
    """The parser has taken the options."""


def and_stop(parse):
    def parse_and_stop(*args):
        parse(*args)
        raise Parsed

    return parse_and_stop


def of_the_trainer(words: list[str]) -> list[str] | None:
    """Module and options of `python -m ito.…` and `torchrun … -m ito.…`."""
    if "-m" in words and words[words.index("-m") + 1].startswith("ito."):
        return words[words.index("-m") + 1 :]
    return None


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_exists(command, monkeypatch):
    words = [x for x in shlex.split(command.replace("$lr", "1e-3")) if not re.match("[A-Z_]+=", x)]
    program, *rest = words
    trainer = of_the_trainer(words)
    if trainer and not trainer[1:]:  # a sentence about it
        assert import_module(trainer[0]).main
    elif trainer:
        for name in ("parse_args", "parse_intermixed_args"):
            monkeypatch.setattr(Parser, name, and_stop(getattr(Parser, name)))
        with pytest.raises((Parsed, SystemExit)) as ended:
            import_module(trainer[0]).main(trainer[1:])
        assert ended.type is Parsed or ended.value.code == 0  # 0: --help
    elif program in ("python", "bash") and rest[0] != "-m":
        script = (ROOT / rest[0]).read_text()
        assert all(option in script for option in rest[1:] if option.startswith("--"))
    elif program == "make":
        assert f"\n{rest[0]}:" in (ROOT / "Makefile").read_text()
    elif program == "pip":
        extras = (ROOT / "trainer" / "pyproject.toml").read_text()
        for word in rest:
            assert not word.startswith("requirements") or (ROOT / word).is_file()
            for extra in re.findall(r"\[(\w+)\]", word):
                assert f"\n{extra} = [" in extras
    else:
        assert program in ("python", "pytest", "for", "mkdir", "cp")
    for word in rest:
        assert not re.match(r"(tests|docs|benchmarks|examples)/", word) or (ROOT / word).exists()


# why a command is not run
NOT_RUN = {
    "--help": "argparse's",
    "--pretrained": "downloads weights; tests/trainer/test_finetuning.py",
    "--serve": "never ends; tests/trainer/test_search.py",
    "--onnx": "tests/trainer/test_onnx.py",
    "ito.compare": "hours; tests/trainer/test_compare.py",
    "ito.prepare": "downloads 56 MiB; tests/trainer/test_emoji_full.py",
}
TRAINERS = [
    command
    for page in ("README.md", "docs/trainer.md")
    for command in commands(page)
    if of_the_trainer(shlex.split(command)) and not any(x in command for x in NOT_RUN)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which everything that the commands name is there, under that name."""
    place = tmp_path_factory.mktemp("place")
    data = write_set(place / "DATA", items=40)
    records = [json.loads(line) for line in (data / "captions.jsonl").open()]
    (place / "FOLDER").mkdir()
    for record in records:
        (place / "FOLDER" / record["image"]).write_bytes((data / record["image"]).read_bytes())
        caption = place / "FOLDER" / record["image"].replace(".png", ".txt")
        caption.write_text(record["captions"][0])
    rows = [f"DATA/{record['image']}\t{record['captions'][0]}\n" for record in records]
    (place / "pairs.csv").write_text("filepath\ttitle\n" + "".join(rows))
    (place / "train2017").symlink_to(place / "DATA")
    coco = {
        "images": [{"id": i, "file_name": x["image"]} for i, x in enumerate(records)],
        "annotations": [
            {"id": i, "image_id": i, "caption": x["captions"][0]} for i, x in enumerate(records)
        ],
    }
    (place / "captions_train2017.json").write_text(json.dumps(coco))
    for number in range(13):
        members = []
        for record in records[6 * number : 6 * number + 6]:
            picture, name = (data / record["image"]).read_bytes(), record["image"][:-4]
            members += [(f"{name}.png", picture), (f"{name}.txt", record["captions"][0])]
        tar(place / f"shards/{number:03}.tar", members)
    (place / "SHARDS").symlink_to(place / "shards")
    module(["ito.train", "--train-data", "DATA", "--out", "runs/DATE-TIME", *QUICK], place)
    return place


def module(words: list[str], place, launcher: tuple[str, ...] = ()) -> None:
    done = subprocess.run(
        [sys.executable, *launcher, "-m", *words], cwd=place, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("command", TRAINERS)
def test_a_command_of_the_trainer_runs(command, place):
    words = shlex.split(command)
    name, *options = of_the_trainer(words)
    if name == "ito.train" and "--resume" not in options:
        options += QUICK
        if "--train-data" not in options:  # the emoji: .ci/run
            options += ["--train-data", "DATA"]
    launcher = ()
    if words[0] == "torchrun":
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    module([name, *options], place, launcher)
