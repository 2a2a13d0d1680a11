"""The trainer: it learns, resumes to the same bits, exports what it trained."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.quick_run import QUICK, TINY, steady, write_set

import ito
from ito import evaluate as evaluate_command
from ito import train
from ito.batches import Batches, without_padding_columns
from ito.compiled import choose_compile, compile_towers
from ito.config import Config
from ito.data.augment import Augmentation
from ito.data.dataset import load_dataset
from ito.model.embed import embed_images, embed_texts
from ito.model.encoders import DualEncoder
from ito.model.fusion import Fusion
from ito.model.tokenizer import Tokenizer
from ito.objectives import Step
from ito.ranks import Ranks
from ito.scoring.evaluation import evaluate
from ito.scoring.metrics import retrieval
from ito.trainer import Trainer

CPU = torch.device("cpu")


# --- it learns ---


def test_64_samples_overfit(tmp_path):
    folder = write_set(tmp_path / "data", items=64, drawings=1, split="train")
    dataset = load_dataset(folder, 64, only="train")
    config = Config(
        steps=60, batch_size=32, width=64, vocab_size=300, augmentation=Augmentation(gray_p=0.0)
    )
    tokenizer = Tokenizer.train([c for names in dataset.captions for c in names], 300, 16)
    trainer = Trainer(config, dataset, tokenizer, CPU, torch.float32)

    def recall():
        images = embed_images(trainer.model, dataset.images)
        texts = embed_texts(trainer.model, tokenizer([names[0] for names in dataset.captions]))
        item = torch.arange(64)
        scores = retrieval(images, texts, item, torch.stack([item, item], 1))
        return scores["i2t/R@1"], scores["t2i/R@1"]

    assert max(recall()) < 0.15
    terms = [trainer.step(number) for number in range(config.steps)]
    assert min(recall()) > 0.95
    assert terms[-1]["align"] < 0.5 < 2 < terms[0]["align"]
    assert terms[-1]["fusion"] < 0.1 < 2 < terms[0]["fusion"]


@pytest.mark.parametrize("options", [{"lambda_fusion": 0.0, "views": 1}, {"captions": 2}])
def test_the_loss_is_that_of_the_method(data, options):
    """Against ITO's formula written out, on the trainer's own towers."""
    dataset = load_dataset(data, 64)
    tokenizer = Tokenizer.train([c for names in dataset.captions for c in names], 300, 8)
    config = Config(width=32, heads=2, batch_size=6, **options)
    trainer = Trainer(config, dataset, tokenizer, CPU, torch.float32)
    rows, ids, _ = trainer.batches.choose(0)
    images = torch.randn(*rows.shape, 3, 32, 32)
    step = Step(1, 0.0, torch.arange(6), torch.Generator())
    loss, _ = trainer.backward(images, ids, step)
    images = images.flatten(0, 1)

    model, scale, n = trainer.model, trainer.model.logit_scale.exp(), 6
    image_tokens, pooled = model.image(images)
    x = torch.nn.functional.normalize(pooled, dim=1).view(config.views, n, -1).double()
    encoded = [model.text(ids[c]) for c in range(config.captions)]
    y = [torch.nn.functional.normalize(e[1], dim=1).double() for e in encoded]

    def one_way(a, b):
        scores = (scale * a @ b.T).exp()
        return -(scores.diag() / scores.sum(1)).log().mean()

    pairs = [0.5 * (one_way(a, b) + one_way(b, a)) for a in x for b in y]
    want = sum(pairs) / len(pairs)
    if config.lambda_fusion:
        mask, positions = ids[0] != 0, model.text.positions[: ids.shape[2]]
        text_tokens = encoded[0][0]
        h, g = (
            trainer.objective.fusion(tokens, text_tokens, mask, positions).double()
            for tokens in image_tokens.split(n)
        )
        total = 0
        for i in range(n):
            for a, b in ((h, g), (g, h)):
                others = [j for j in range(n) if j != i]
                positive = (scale * a[i] @ b[i]).exp()
                negatives = (scale * a[i] @ torch.cat([b[others], a[others]]).T).exp().sum()
                total = total - (positive / (positive + negatives)).log()
        want = want + config.lambda_fusion * total / (2 * n)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)


def test_matrices_alone_decay_and_the_learning_rate_warms_up_and_falls(data):
    dataset = load_dataset(data, 64)
    tokenizer = Tokenizer.train([c for names in dataset.captions for c in names], 300, 8)
    config = Config(width=32, heads=2, steps=100, warmup=0.1, lr=1.0)
    trainer = Trainer(config, dataset, tokenizer, CPU, torch.float32)
    matrices, vectors = trainer.optimizer.param_groups
    assert matrices["weight_decay"] == config.weight_decay
    assert vectors["weight_decay"] == 0
    assert any(p is trainer.model.logit_scale for p in vectors["params"])
    assert all(p.ndim > 1 for p in matrices["params"])
    rates = [trainer.learning_rate(number) for number in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert (rates[0], max(rates), rates[55]) == pytest.approx((1 / 11, 1.0, 0.5), abs=1e-6)
    assert rates[-1] < 1e-3


def test_the_scale_stays_at_100(data):
    dataset = load_dataset(data, 64)
    tokenizer = Tokenizer.train([c for names in dataset.captions for c in names], 300, 8)
    config = Config(width=32, heads=2, steps=4, batch_size=8)
    trainer = Trainer(config, dataset, tokenizer, CPU, torch.float32)
    torch.nn.init.constant_(trainer.model.logit_scale, 5.0)  # a multiplier of 148
    assert trainer.step(0)["logit_scale"] == pytest.approx(100)


# --- batches ---


def test_batches_hold_distinct_items_whose_views_and_captions_differ(data):
    dataset = load_dataset(data, 64)
    tokenizer = Tokenizer.train([c for names in dataset.captions for c in names], 300, 16)
    config = Config(batch_size=12, captions=2, views=3)
    batches = Batches(dataset, tokenizer, config, Ranks(), CPU)
    seen = set()
    for step in range(3):  # 36 training items: one pass
        rows, ids, _ = batches.choose(step)
        assert rows.shape == (3, 12)
        items = dataset.image_item[rows]
        assert (items == items[0]).all()
        assert items[0].unique().numel() == 12
        assert (rows[0] != rows[1]).all()  # two drawings, three views
        assert ((rows[2] == rows[0]) | (rows[2] == rows[1])).all()
        assert {dataset.split[row] for row in rows.flatten().tolist()} == {"train"}
        assert (ids[0] != ids[1]).any(1).all()
        for item, own in zip(items[0].tolist(), ids.unbind(1), strict=True):
            known = tokenizer(dataset.captions[item])[:, : ids.shape[2]]
            assert (own[:, None] == known).all(2).any(1).all()  # captions of that very item
        assert (ids != 0).any(1).any(0).all()  # no column is padding everywhere
        seen |= set(items[0].tolist())
    assert len(seen) == 36
    passes = [
        torch.cat([dataset.image_item[batches.choose(step)[0][0]] for step in range(at, at + 3)])
        for at in (0, 3)
    ]
    assert not torch.equal(*passes)  # each in an order of its own
    assert torch.equal(passes[0].sort().values, passes[1].sort().values)
    again = batches.choose(1)[:2]
    batches.choose(2)
    assert all(torch.equal(a, b) for a, b in zip(again, batches.choose(1)[:2], strict=True))


# --- runs ---


def test_no_token_is_lost_where_padding_is_cut_off():
    ids = torch.tensor([[[1, 7, 2, 0, 0], [1, 2, 0, 0, 0]], [[1, 2, 0, 0, 0], [1, 9, 2, 0, 0]]])
    assert torch.equal(without_padding_columns(ids), ids[..., :3])
    assert torch.equal(without_padding_columns(ids[..., :3]), ids[..., :3])


def test_a_run_leaves_what_it_promises(finished):
    for name in (
        "config.json",
        "report.html",
        "checkpoints/step_0000006.pt",
        "model/model.safetensors",
        "model/config.json",
        "model/tokenizer.json",
    ):
        assert (finished / name).stat().st_size > 0
    records = steady(finished)
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [0, 3, 6]
    assert all(0 <= r["heldout/i2t/R@1"] <= 1 for r in records if r["kind"] == "eval")
    page = (finished / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert list(finished.rglob(".*.tmp")) == []


def test_resume_gives_the_same_bits_as_an_uninterrupted_run(finished, tmp_path):
    run = tmp_path / "killed"
    shutil.copytree(finished, run)
    (run / "checkpoints" / "step_0000006.pt").unlink()  # killed after step 3's checkpoint,
    (run / "report.html").unlink()
    shutil.rmtree(run / "model")
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:7]) + lines[7][:20])  # writing a line
    train.main(["--resume", str(run)])
    for name in ("model", "objective", "optimizer"):
        a, b = (
            torch.load(folder / "checkpoints" / "step_0000006.pt", weights_only=True)[name]
            for folder in (finished, run)
        )
        assert str(a.keys()) == str(b.keys())
        for x, y in zip(tensors(a), tensors(b), strict=True):
            assert torch.equal(x, y)
    assert steady(run) == steady(finished)


def test_resume_keeps_the_run_s_threads_and_tells_what_else_changed(finished, tmp_path, capsys):
    run, threads = tmp_path / "run", torch.get_num_threads()
    shutil.copytree(finished, run)
    before = json.loads((run / "environment.json").read_text())
    was = before | {"threads": threads + 1, "torch": "1.0"}
    (run / "environment.json").write_text(json.dumps(was))
    try:
        train.main(["--resume", str(run)])
        kept = capsys.readouterr().out
        train.main(["--resume", str(run), "--threads", str(threads), "--log-every", "7"])
        given = capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)
    assert f"{threads + 1} threads" in kept
    assert f"torch was 1.0, is {torch.__version__}: numbers may differ" in kept
    assert kept.count("warning") == 1
    assert f"threads was {threads + 1}, is {threads}" in given


def test_resume_keeps_the_run_s_device(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(before | {"device": "gone"}))
    with pytest.raises(SystemExit):
        train.main(["--resume", str(run)])
    assert "error: --device gone: " in capsys.readouterr().err
    train.main(["--resume", str(run), "--device", "cpu"])
    assert "device was gone, is cpu: numbers may differ" in capsys.readouterr().out


def test_a_run_goes_on_from_another_folder(data, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    monkeypatch.chdir(data.parent)
    train.main(["--train-data", data.name, "--out", str(run), *QUICK])
    monkeypatch.chdir(tmp_path)
    evaluate_command.main([str(run), "--json", "scores.json"])
    train.main(["--resume", str(run)])
    logged = steady(run)[-1]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {name: scores[name] for name in logged if "/" in name}.items() <= logged.items()


def test_evaluate_takes_the_data_options(finished, data, tmp_path, capsys):
    rows = [f"{n:03}-0.png,a red cat {n}" for n in range(20)]
    (tmp_path / "pairs.csv").write_text("\n".join(["picture,words", *rows]))
    for path in data.glob("*.png"):
        shutil.copy(path, tmp_path)
    source = ["--train-data", str(tmp_path / "pairs.csv"), "--csv-separator", ","]
    columns = ["--csv-img-key", "picture", "--csv-caption-key", "words"]
    evaluate_command.main([str(finished), *source, *columns])
    assert "heldout: 2 pictures, 2 captions" in capsys.readouterr().out


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def test_the_seed_decides_the_numbers(data):
    dataset = load_dataset(data, 64)
    tokenizer = Tokenizer.train([c for names in dataset.captions for c in names], 300, 8)

    def first(seed):
        config = Config(width=32, heads=2, batch_size=8, seed=seed)
        return Trainer(config, dataset, tokenizer, CPU, torch.float32).step(0)

    assert first(1) == first(1)
    assert first(1)["loss"] != first(2)["loss"]


def test_the_next_batch_is_prepared_while_a_step_computes(data):
    dataset = load_dataset(data, 64)
    tokenizer = Tokenizer.train([c for names in dataset.captions for c in names], 300, 8)
    config = Config(width=32, heads=2, batch_size=8, steps=4)
    trainer = Trainer(config, dataset, tokenizer, CPU, torch.float32)
    want = {number: trainer.batch(number) for number in (0, 2)}
    prepared = threading.Event()
    batch, backward, seen, threads = trainer.batch, trainer.backward, [], {}

    def recorded(number):
        threads[number] = threading.current_thread()
        if number == 3:
            raise OSError("batch 3 cannot be read")
        if number == 1:
            prepared.set()
        return batch(number)

    def patient(views, ids, step):
        seen.append((views, ids))
        assert prepared.wait(60), "the next batch waits for the step"
        return backward(views, ids, step)

    trainer.batch, trainer.backward = recorded, patient
    trainer.step(0)
    # the first in the main thread, from where a stream's workers can be forked
    assert threads[0] is threading.main_thread() is not threads[1]
    trainer.step(2)  # another than the next
    with pytest.raises(OSError, match="batch 3"):  # at its own step, not at the one before
        trainer.step(3)
    trainer.step(0)
    for found, number in zip(seen, (0, 2, 0), strict=True):
        assert all(map(torch.equal, found, want[number][:2]))


def test_the_thread_that_prepares_batches_leaves_the_others_their_threads(data):
    dataset = load_dataset(data, 64)
    tokenizer = Tokenizer.train([c for names in dataset.captions for c in names], 300, 8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        trainer = Trainer(
            Config(width=32, heads=2, batch_size=8), dataset, tokenizer, CPU, torch.float32
        )
        assert trainer.loader.submit(torch.get_num_threads).result() == 1
        with ThreadPoolExecutor(1) as another:
            assert another.submit(torch.get_num_threads).result() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_run_has_its_folder_alone_and_stops_between_steps(data, tmp_path, capsys):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "ito.train", "--train-data", str(data), "--out", str(run)]
    options = [*TINY.split(), "--steps", "5000", "--log-every", "1", "--threads", "1"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while '"train"' not in (
        (run / "metrics.jsonl").read_text()
        if run.exists() and (run / "metrics.jsonl").exists()
        else ""
    ):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for arguments in (["--resume", str(run)], ["--out", str(run), "--train-data", str(data)]):
        with pytest.raises(SystemExit) as end:
            train.main(arguments)
        holder = f"process {process.pid} on {socket.gethostname()}"
        assert f"error: {run} is in use by {holder}: " in capsys.readouterr().err
        assert end.value.code == 2
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert f"--resume {run}" in output
    step = torch.load(next((run / "checkpoints").glob("*.pt")), weights_only=True)["step"]
    assert 0 < step < 5000
    assert ito.load(run).step == step
    steps = [line["step"] for line in steady(run) if line["kind"] == "train"]
    assert steps == list(range(1, step + 1))


# --- export ---


def test_the_export_gives_the_trained_model_s_embeddings(finished, data):
    dataset = load_dataset(data, 64)
    checkpoint = torch.load(finished / "checkpoints" / "step_0000006.pt", weights_only=True)
    tokenizer = Tokenizer.train(train.training_captions(dataset), 300, 8)
    config = Config.load(finished / "config.json")
    trainer = Trainer(config, dataset, tokenizer, CPU, torch.float32)
    trainer.load(checkpoint)
    encoder = ito.load(finished)
    paths = [data / "003-0.png", data / "011-1.png"]
    rows = [2 * 3, 2 * 11 + 1]
    want = embed_images(trainer.model, dataset.images[rows])
    with Image.open(paths[0]) as opened:
        pil = opened.copy()
    assert torch.equal(encoder.encode_image(paths), want)
    assert torch.equal(encoder.encode_image([pil, str(paths[1])]), want)
    assert torch.equal(encoder.encode_image(dataset.images[rows]), want)
    torch.testing.assert_close(encoder.encode_image(pil), want[:1])
    texts = ["red cat", "a boat that is round"]
    assert torch.equal(encoder.encode_text(texts), embed_texts(trainer.model, tokenizer(texts)))
    torch.testing.assert_close(encoder.encode_text(texts[1])[0], encoder.encode_text(texts)[1])
    logged = steady(finished)[-1]
    scores = evaluate(encoder.model, encoder.tokenizer, dataset)
    assert {name: logged[name] for name in scores} == scores


def test_the_export_holds_the_dual_encoder_and_no_fusion(finished):
    names = set(load_file(finished / "model" / "model.safetensors"))
    assert names == set(ito.load(finished).model.state_dict())
    assert {name.split(".")[0] for name in names} == {"image", "text", "logit_scale"}
    checkpoint = torch.load(finished / "checkpoints" / "step_0000006.pt", weights_only=True)
    assert len(checkpoint["objective"]) > 20


def test_command_lines_of_a_finished_run(finished, tmp_path):
    def call(*arguments):
        command = [sys.executable, "-m", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    out = tmp_path / "again"
    call("ito.export", finished, "--out", out)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (finished / "model" / name).read_bytes()
    result = call("ito.evaluate", finished, "--json", tmp_path / "scores.json")
    assert "image to text R@1" in result.stdout
    assert result.stderr == ""
    logged = steady(finished)[-1]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {name: scores[name] for name in logged if "/" in name}.items() <= logged.items()


# --- bad input ---


def test_what_is_compiled_is_asked_for(monkeypatch):
    model = DualEncoder(
        image_size=16,
        width=16,
        heads=2,
        image_depth=3,
        text_depth=1,
        vocab_size=300,
        context_length=8,
    )
    trained = torch.nn.ModuleList([model, Fusion(2, 16, depth=2)])
    found = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: found.append(module))
    compile_towers(*trained)
    stem = trained[0].image.stem
    blocks = [m for m in trained.modules() if type(m).__name__ == "Block"]
    assert len(blocks) == 3 + 1 + 2
    assert {id(m) for m in found} == {id(m) for m in (stem, *blocks)}
    # without padding the number of tokens would vary
    assert (trained[0].text.packs, trained[1].packs) == (False, False)
    for device in ("cpu", "cuda"):
        wanted, why = choose_compile(False, torch.device(device))
        assert not wanted
        assert why.endswith("--compile asks for it")
        assert choose_compile(True, torch.device(device)) == (True, "asked for")


@pytest.mark.parametrize("locked", ["image", "text"])
def test_a_locked_tower_keeps_the_weights_and_statistics_of_its_run(
    locked, finished, data, tmp_path
):
    where = ["--train-data", str(data), "--out", str(tmp_path / "run")]
    start = ["--pretrained", str(finished), f"--lock-{locked}", "--objective", "siglip"]
    train.main([*where, *start, *QUICK, "--steps", "2"])
    before, after = (
        load_file(run / "model/model.safetensors") for run in (finished, tmp_path / "run")
    )
    for tower in ("image", "text"):
        same = [torch.equal(before[n], after[n]) for n in before if n.startswith(tower)]
        assert all(same) if tower == locked else not any(same)


def test_patches_take_the_place_of_the_convolutions():
    model = DualEncoder(
        image_size=48,
        width=16,
        heads=2,
        image_depth=1,
        text_depth=1,
        vocab_size=270,
        context_length=8,
        image_width=24,
        image_heads=3,
        patch_size=16,
    )
    tokens, pooled = model.image(torch.randn(2, 3, 48, 48))
    assert (tokens.shape, pooled.shape) == ((2, 10, 16), (2, 16))
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())
