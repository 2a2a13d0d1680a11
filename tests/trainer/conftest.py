"""Imports wait until a fixture is used: where open_clip is compared, nothing else is installed."""

import json
import shutil

import pytest
from support.quick_run import QUICK, write_set


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("data"), items=40)


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """A run of 6 steps with checkpoints at 3 and 6."""
    from ito import train

    run = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["--train-data", str(data), "--out", str(run), "--checkpoint-every", "3", *QUICK]
    return train.main(arguments)


@pytest.fixture
def copy(finished, tmp_path):
    """The finished run, to be changed."""
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The small emoji set."""
    from ito.data import emoji_small

    return emoji_small.prepare_emoji_small(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="session")
def records(prepared):
    return [json.loads(line) for line in (prepared / "captions.jsonl").open(encoding="utf-8")]
