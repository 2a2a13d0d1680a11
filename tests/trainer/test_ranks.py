"""Training on several ranks and in micro-batches: the numbers of one process, told once."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import processes
from support.quick_run import QUICK, steady, write_set

from ito import source, train
from ito.config import Config
from ito.data.dataset import load_dataset
from ito.model.tokenizer import Tokenizer
from ito.ranks import GlobalBatchNorm, Ranks
from ito.run import locked
from ito.trainer import Trainer

CPU = torch.device("cpu")
OBJECTIVES = {
    "ito": {},
    "ito, every option": {
        "views": 3,
        "captions": 2,
        "denominator": "pooled",
        "lambda_schedule": "cosine",
        "fusion_scale": "own",
        "fusion_text": "shuffled",
        "fusion_readout": "mean",
        "fusion_stop_gradient": "image",
    },
    "slip": {"objective": "slip"},
    "siglip": {"objective": "siglip"},
    "flair": {"objective": "flair", "captions": 3},
    # items share captions, of 3 classes
    "ito, equal captions": {"classes": 3, "captions": 2},
    "ito, equal captions left out": {
        "classes": 3,
        "captions": 2,
        "equal_captions": "ignore",
        "denominator": "pooled",
        "fusion_scale": "own",
    },
    "slip, equal captions": {"classes": 3, "objective": "slip"},
    "siglip, equal captions": {"classes": 3, "objective": "siglip"},
    "siglip, equal captions left out": {
        "classes": 3,
        "objective": "siglip",
        "equal_captions": "ignore",
    },
    "flair, equal captions": {"classes": 3, "objective": "flair"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("data"), items=20)


def make(data, ranks=None, classes=0, **options):
    dataset = load_dataset(data, 32)
    if classes:  # a caption of its own, and one that other items have
        own = enumerate(dataset.captions)
        dataset.captions = [[names[0], f"kind {n % classes}"] for n, names in own]
    tokenizer = Tokenizer.train([c for names in dataset.captions for c in names], 270, 8)
    size = {"width": 16, "heads": 2, "image_size": 16, "load_size": 32, "batch_size": 15}
    return Trainer(Config(**size | options), dataset, tokenizer, CPU, torch.float32, ranks)


def joined() -> Ranks:
    """This process in the group that `processes.run` has made, as `torchrun` would have it."""
    ranks = Ranks()
    ranks.rank, ranks.size = dist.get_rank(), dist.get_world_size()
    ranks.group = dist.group.WORLD if ranks.size > 1 else None
    return ranks


def curves(data, accum_freqs: tuple[int, ...]) -> dict:
    """{accum_freq: two steps of every objective}, all of it in fp64."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    found = {accum_freq: {} for accum_freq in accum_freqs}
    for accum_freq in accum_freqs:
        for name, options in OBJECTIVES.items():
            trainer = make(data, joined(), steps=3, accum_freq=accum_freq, **options)
            trainer.model.double()
            trainer.objective.double()
            found[accum_freq][name] = [trainer.step(number) for number in range(2)]
    rank = joined().rank
    found["merged"] = joined().all_gather_dicts({"same": "a", f"{rank}": "b"})
    return found


def test_ranks_and_micro_batches_give_the_numbers_of_one_process(data):
    """15 items: uneven shares and uneven micro-batches. The encoders have batch normalisation."""
    alone = processes.run(curves, 1, data, (1, 3))[0]
    two = processes.run(curves, 2, data, (1, 2))
    others = {"3 parts": alone[3]} | {
        f"rank {rank} of 2, {parts} parts": found[parts]
        for rank, found in enumerate(two)
        for parts in (1, 2)
    }
    assert alone["merged"] == {"same": "a", "0": "b"}
    assert [found["merged"] for found in two] == [{"same": "a", "0": "b", "1": "b"}] * 2
    assert alone[1].keys() == OBJECTIVES.keys()
    for name, steps in alone[1].items():
        for which, found in others.items():
            for got, want in zip(found[name], steps, strict=True):
                assert got == pytest.approx(want, rel=1e-11), (name, which)


def normalised() -> dict:
    """What a GlobalBatchNorm of this rank's pictures has in common with torch's of all of them."""
    ranks = joined()
    x = torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.BatchNorm2d(3)
    ours, part = GlobalBatchNorm(torch.nn.BatchNorm2d(3), ranks.group), ranks.local_slice(7)
    found = {"output": (ours(x[part]), whole(x)[part])}
    found |= {name: (value, whole.state_dict()[name]) for name, value in ours.state_dict().items()}
    return {name: torch.allclose(*pair, atol=1e-6) for name, pair in found.items()}


def test_batch_normalisation_over_ranks_is_torch_s_of_the_whole_batch():
    names = ["output", *torch.nn.BatchNorm2d(3).state_dict()]
    assert processes.run(normalised, 2) == [dict.fromkeys(names, True)] * 2


@pytest.mark.parametrize("size", [2, 3])
def test_shares_are_the_batch_without_duplicates_or_drops(data, size):
    trainer = make(data, fusion_text="shuffled")
    views, ids, *_ = trainer.batch(1)
    shares = []
    for rank in range(size):
        trainer.ranks.rank, trainer.ranks.size = rank, size
        shares.append(trainer.batch(1))
    for whole, parts in ((views, 0), (ids, 1)):
        torch.testing.assert_close(torch.cat([share[parts] for share in shares], 1), whole)
    sizes = [share[1].shape[1] for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_shuffled_texts_are_another_item_s_and_another_s_in_each_view(data):
    trainer = make(data, fusion_text="shuffled", views=3)
    ids = torch.arange(15)[None, :, None]
    for seed in range(20):
        texts = trainer.objective.texts(ids, torch.Generator().manual_seed(seed))[..., 0]
        assert texts.shape == (4, 15)
        for item in range(15):
            assert texts[:, item].unique().numel() == 4


def test_a_batch_too_small_to_cut_is_refused(data):
    with pytest.raises(ValueError, match="15 items cannot be cut into 16 parts: 1 ranks x 16"):
        make(data, accum_freq=16)


# --- runs ---


def curve(run) -> list[dict]:
    return [record for record in steady(run) if record["kind"] == "train"]


def assert_same_curve(a, b):
    """To what rounding becomes in six steps of AdamW; another batch or view would be far off."""
    for got, want in zip(curve(a), curve(b), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=5e-3)


def cut_back(run, to) -> Path:
    """A copy of a finished run as if it had been killed after its checkpoint at step 3."""
    shutil.copytree(run, to)
    (to / "checkpoints" / "step_0000006.pt").unlink()
    return to


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    options = ["--train-data", str(data), "--precision", "fp32", "--checkpoint-every", "3"]
    return train.main([*options, "--out", str(run), *QUICK])


def test_torchrun_resumes_the_run_of_one_process_and_one_process_that_of_torchrun(
    finished, tmp_path, capsys
):
    run = cut_back(finished, tmp_path / "two")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ito.train"]
    result = subprocess.run(
        [sys.executable, *command, "--resume", str(run), "--accum-freq", "2"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    )
    assert "ranks was 1, is 2: numbers may differ" in result.stdout
    assert result.stdout.count("\ntrained ") == 1
    assert_same_curve(run, finished)
    back = cut_back(run, tmp_path / "one")
    about = json.loads((back / "environment.json").read_text())
    (back / "environment.json").write_text(json.dumps(about | {"ranks": 2}))
    train.main(["--resume", str(back)])
    assert "ranks was 2, is 1: numbers may differ" in capsys.readouterr().out
    assert_same_curve(back, finished)


def trouble(data, out: str) -> dict:
    """What each rank says, and how it ends, of runs in which rank 1 meets something."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(dist.get_rank())}
    dist.init_process_group = lambda *_: None  # the group that is there
    dist.destroy_process_group = lambda *_: None
    step, told = Trainer.step, {}

    def run(name, *arguments):
        with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
            sys.__stdout__ = sys.stdout
            try:
                train.main(
                    ["--train-data", str(data), "--out", f"{out}/{name}", *QUICK, *arguments]
                )
                code = 0
            except SystemExit as error:
                code = error.code
        told[name] = (code, stdout.getvalue(), stderr.getvalue())

    def asked(self, number):
        if number == 2 and self.ranks.rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number)

    def missing(config, cache):
        if dist.get_rank() == 1:
            raise OSError(5, "Input/output error", "x.tar")
        return load_dataset(config.train_data, config.load_size)

    Trainer.step = asked
    run("asked")
    Trainer.step = step
    run("bad", "--views", "1")
    if dist.get_rank():
        run("taken")
    else:
        Path(out, "taken").mkdir()
        with locked(Path(out, "taken")):
            run("taken")
    run("diverged", "--lr", "1e30")
    source.open_dataset = missing
    run("missing")
    return told


def test_ranks_stop_together_and_an_error_is_told_once(data, tmp_path):
    first, second = processes.run(trouble, 2, data, str(tmp_path))
    assert first["asked"][0] == second["asked"][0] == 128 + signal.SIGTERM
    assert "stopped after step 3; continue with" in first["asked"][1]
    assert [file.name for file in (tmp_path / "asked/checkpoints").iterdir()] == ["step_0000003.pt"]
    for name, code, message in (
        ("taken", 2, f"error: {tmp_path}/taken is in use by process "),
        ("bad", 2, "error: the fusion term compares views: views must be at least 2, got 1"),
        ("diverged", 1, "error: the loss of step "),
        ("missing", 2, "error: rank 1: x.tar: Input/output error"),
    ):
        assert first[name][0] == second[name][0] == code, name
        assert message in first[name][2]
    for _, stdout, stderr in second.values():
        assert stdout == stderr == ""
