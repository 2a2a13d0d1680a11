"""FSDP2, activation checkpointing and fp16: the numbers of one process without them, and resumed
runs that repeat them to the bit."""

import io
import itertools
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import processes
from support.quick_run import QUICK, steady, write_set

import ito
from ito import export, train
from ito.checkpoint import load_checkpoint, save_checkpoint
from ito.config import Config
from ito.data.dataset import load_dataset
from ito.files import FileError
from ito.model.layers import recompute
from ito.model.tokenizer import Tokenizer
from ito.ranks import Ranks
from ito.sharding import load_shards, read_weights, save_shards
from ito.trainer import Trainer

CPU = torch.device("cpu")
STEPS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("data"), items=20)


def make(data, dtype=torch.float32, alone=False, **options) -> Trainer:
    dataset = load_dataset(data, 32)
    tokenizer = Tokenizer.train([c for names in dataset.captions for c in names], 270, 8)
    size = {"width": 16, "heads": 2, "image_size": 16, "load_size": 32, "batch_size": 15}
    ranks = Ranks()
    if dist.is_initialized() and not alone:
        ranks.group = dist.group.WORLD
        ranks.rank, ranks.size = dist.get_rank(), dist.get_world_size()
    return Trainer(Config(**size | options), dataset, tokenizer, CPU, dtype, ranks)


def weights(trainer: Trainer) -> dict:
    model = trainer.whole_model()
    return model.state_dict() if trainer.ranks.leads else {}


def curves(data, folder: str, parts: int) -> dict:
    """20 steps in fp64 and the weights after them: on one process, sharded, and of a trainer that
    goes on from shards saved after half of the steps."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double

    def start(**options) -> Trainer:
        trainer = make(data, steps=STEPS, **options)
        trainer.model.double()
        trainer.objective.double()
        return trainer

    fsdp = {"fsdp": True, "grad_checkpointing": True, "accum_freq": parts}
    trainer, half, found = start(**fsdp), STEPS // 2, {}
    if trainer.ranks.leads:
        alone = start(alone=True)
        found["alone"] = [alone.step(n) for n in range(STEPS)]
        found["weights alone"] = alone.model.state_dict()
    steps = [trainer.step(n) for n in range(half)]
    sums = save_shards(Path(folder), trainer.shards(), trainer.ranks)
    resumed = start(**fsdp)
    load_shards(Path(folder), resumed.shards(), sums, resumed.ranks)
    resumed.load(trainer.state())
    found |= {"sums": sums, "half": weights(trainer)}
    found["resumed"] = [resumed.step(n) for n in range(half, STEPS)], weights(resumed)
    steps += [trainer.step(n) for n in range(half, STEPS)]
    return found | {"steps": steps, "weights": weights(trainer)}


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sharded_weights_train_as_those_of_one_process_and_are_resumed_exactly(
    data, parts, tmp_path
):
    """The blocks are sharded and computed again, the items of a step unevenly divided, in so many
    micro-batches. Measured: losses to 1.3e-11, weights to 8e-15."""
    first, second = processes.run(curves, 2, data, str(tmp_path / "shards"), parts)
    for found in (first, second):
        for got, want in zip(found["steps"], first["alone"], strict=True):
            assert got == pytest.approx(want, rel=1e-9)
        assert found["resumed"][0] == found["steps"][STEPS // 2 :]
    for name, want in first["weights alone"].items():
        torch.testing.assert_close(first["weights"][name], want, rtol=0, atol=1e-10)
        assert torch.equal(first["resumed"][1][name], first["weights"][name])

    # one process reads the shards of two
    assert len(first["sums"]) == 2
    read = read_weights(tmp_path / "shards", first["sums"], shapes_only=False)["model"]
    assert read.keys() == first["half"].keys()
    assert all(torch.equal(read[name], value) for name, value in first["half"].items())
    name = next(iter(first["sums"]))
    content = bytearray((tmp_path / "shards" / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / "shards" / name).write_bytes(content)
    with pytest.raises(FileError, match=f"{name} is damaged: it does not have its checksum"):
        read_weights(tmp_path / "shards", first["sums"], shapes_only=False)
    (tmp_path / "shards" / name).write_bytes(content[:50])
    (tmp_path / "shards").rename(tmp_path / "step_0000007")
    save_checkpoint(tmp_path, 7, {"shards": first["sums"]})
    with pytest.raises(ValueError, match=r"step_0000007 is damaged, or not of this run"):
        load_checkpoint(tmp_path)


def kept_bytes(trainer: Trainer, number: int) -> tuple[dict, int]:
    """A step, and the bytes that autograd keeps for backward."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step = trainer.step(number)
    return step, sum(kept.values())


@pytest.mark.parametrize("objective", ["ito", "flair"])
def test_a_step_with_blocks_computed_again_is_that_without_to_the_bit(data, objective):
    depth = {"image_depth": 3, "objective": objective, "accum_freq": 1, "steps": 5}
    plain = make(data, **depth)
    again = make(data, grad_checkpointing=True, **depth)
    for number in range(3):
        (want, before), (got, after) = kept_bytes(plain, number), kept_bytes(again, number)
        assert got == want
    assert after < 0.6 * before
    for name, value in plain.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_blocks_with_batch_normalisation_are_not_computed_again():
    with pytest.raises(ValueError, match=r"--grad-checkpointing: a block .* batch normalisation"):
        recompute([torch.nn.Sequential(torch.nn.BatchNorm1d(2))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_resumed_trainer_repeats_the_steps_and_the_scale_of_the_loss(data, dtype):
    first = make(data, dtype, steps=9)
    first.scaler = torch.amp.GradScaler(
        "cpu", 2.0**18, growth_interval=1, enabled=dtype == torch.float16
    )
    steps = [first.step(n) for n in range(6)]
    state = {name: own.copy() for name, own in first.state().items()}
    state = torch.load(saved(state), weights_only=True)
    second = make(data, dtype, steps=9)
    second.load(state)
    steps += [first.step(n) for n in range(6, 9)]
    assert [second.step(n) for n in range(6, 9)] == steps[6:]
    if dtype == torch.float16:
        scales = [step["loss_scale"] for step in steps]
        assert scales[0] == 2**17  # the first step overflows, and is left out
        assert "grad_norm" not in steps[0]
        ratios = {b / a for a, b in itertools.pairwise(scales)}
        assert ratios == {0.5, 2}  # it falls, and grows after each step


def saved(state: dict):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_a_scaled_loss_gives_the_gradients_of_fp32(data):
    """The first step in fp16 is that of fp32 to the precision of fp16."""
    plain, half = make(data, steps=5), make(data, torch.float16, steps=5)
    half.scaler = torch.amp.GradScaler("cpu", 256.0)
    want, got = plain.step(0), half.step(0)
    assert got["loss"] == pytest.approx(want["loss"], rel=2e-3)
    assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=2e-2)


# --- runs ---


def trained(runs: list[list[str]]) -> dict:
    """Runs by their options, on this group's ranks."""
    if dist.get_world_size() > 1:
        os.environ |= {"WORLD_SIZE": str(dist.get_world_size()), "RANK": str(dist.get_rank())}
        dist.init_process_group = lambda *_: None  # the group that is there
        dist.destroy_process_group = lambda *_: None
    for options in runs:
        train.main(options)
    return {"done": True}


@pytest.mark.slow
def test_runs_on_ranks_are_resumed_exactly_and_on_other_ranks(data, tmp_path):
    def begun(name, *more):
        options = ["--train-data", str(data), "--precision", "fp32", "--checkpoint-every", "3"]
        return [*options, "--out", str(tmp_path / name), *QUICK, *more]

    def cut_back(name, to):
        shutil.copytree(tmp_path / name, tmp_path / to)
        (tmp_path / to / "checkpoints" / "step_0000006.pt").unlink()
        return ["--resume", str(tmp_path / to)]

    done = [{"done": True}] * 2
    assert processes.run(trained, 2, [begun("whole"), begun("fsdp", "--fsdp")]) == done
    cut = [cut_back("whole", "whole again"), cut_back("fsdp", "fsdp again")]
    assert processes.run(trained, 2, cut) == done
    assert processes.run(trained, 3, [cut_back("fsdp", "three")]) == [{"done": True}] * 3
    train.main(cut_back("fsdp", "one"))
    for name in ("whole", "fsdp"):
        assert steady(tmp_path / name) == steady(tmp_path / f"{name} again")
    for name in ("whole", "three", "one"):  # other sums of gradients
        for got, want in zip(steady(tmp_path / name), steady(tmp_path / "fsdp"), strict=True):
            assert got.get("loss") == (want.get("loss") and pytest.approx(want["loss"], rel=5e-3))

    start = ["--train-data", str(data), "--out", str(tmp_path / "next"), "--batch-size", "16"]
    start += ["--steps", "1", "--fsdp", "--pretrained", str(tmp_path / "whole")]
    assert processes.run(trained, 2, [start]) == done
    last = [line for line in steady(tmp_path / "whole") if line["kind"] == "eval"][-1]
    first = steady(tmp_path / "next")[0]  # before its first step
    assert {k: first[k] for k in ("kind", "mean_R@1")} == {k: last[k] for k in ("kind", "mean_R@1")}
    assert first["heldout/modality/gap"] == pytest.approx(last["heldout/modality/gap"], abs=1e-5)

    run = tmp_path / "fsdp"
    state = load_checkpoint(run / "checkpoints")
    model = ito.load(run).model.state_dict()
    assert model.keys() == state["model"].keys()
    assert all(torch.equal(model[name], value) for name, value in state["model"].items())
    assert len(list((run / "checkpoints" / "step_0000006").iterdir())) == 2
    export.main([str(run), "--out", str(tmp_path / "exported")])
    written = ito.load(tmp_path / "exported").model.state_dict()
    assert all(torch.equal(model[name], value) for name, value in written.items())


def test_fp16_with_sharded_weights_is_refused(data, tmp_path, capsys):
    where = ["--train-data", str(data), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        train.main([*where, *QUICK, "--fsdp", "--precision", "fp16"])
    assert "error: --fsdp with --precision fp16: PyTorch's GradScaler" in capsys.readouterr().err
