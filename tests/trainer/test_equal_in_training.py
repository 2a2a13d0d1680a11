"""Items whose captions are equal: what each objective makes of them, and how it learns of them."""

import argparse
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.quick_run import QUICK, steady, write_set

from ito import train
from ito.batches import Batches
from ito.config import Config, add_options, from_options
from ito.data.augment import Augmentation
from ito.data.dataset import load_dataset
from ito.data.records import Record
from ito.model.encoders import DualEncoder
from ito.model.tokenizer import Tokenizer
from ito.objectives import OBJECTIVES, Step
from ito.ranks import Ranks
from ito.stream import Decoded, StreamBatches
from ito.summary import report_equal_captions
from ito.trainer import Trainer

CPU = torch.device("cpu")
N, E, SCALE = 6, 16, 7.0
# items 0, 1 and 3 have the same first caption; 2's first is 4's second; 5 has one caption twice
IDS = torch.tensor([[1, 1, 2, 1, 3, 4], [5, 6, 7, 8, 2, 4]])


# --- the losses, against their formulas in fp64 ---


def rows(*shape) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, E, dtype=torch.float64), dim=-1).requires_grad_()


def found(name, equal_captions, *features, ids=IDS[:1], **options):
    """The objective, its loss and the terms, in fp64."""
    config = Config(objective=name, width=E, heads=2, equal_captions=equal_captions, **options)
    size = {"width": E, "heads": 2, "image_depth": 1, "text_depth": 1}
    model = DualEncoder(image_size=16, vocab_size=20, context_length=6, **size)
    objective = OBJECTIVES[name](config, model).double()
    step = Step(1, 0.0, torch.arange(N), torch.Generator(), ids)
    scale = torch.tensor(SCALE, dtype=torch.float64)
    return objective, *objective.loss(*features, logit_scale=scale, step=step, group=None)


def softmax(scores, item, other, ids, equal_captions):
    """log D - T of every row; rows and columns are of items, each item's captions have an id."""
    losses = []
    for a, i in enumerate(item):
        equal = [b for b, j in enumerate(other) if ids[i] == ids[j] and i != j]
        own = [b for b, j in enumerate(other) if i == j]
        out = equal if equal_captions == "ignore" else []
        kept = [b for b in range(len(other)) if b not in out and scores[a, b] > -math.inf]
        good = [b for b in (own + equal if equal_captions == "positive" else own) if b in kept]
        losses.append(scores[a, kept].logsumexp(0) - scores[a, good].mean())
    return sum(losses) / len(losses)


def clip(x, y, ids, equal_captions):
    items, scores = range(N), SCALE * x @ y.T
    one, other = (softmax(s, items, items, ids, equal_captions) for s in (scores, scores.T))
    return 0.5 * (one + other)


def fused(h, ids, equal_captions, scale=SCALE):
    flat, items = h.flatten(0, 1), [*range(N)] * len(h)
    scores = (scale * flat @ flat.T).masked_fill(torch.eye(len(flat)).bool(), -torch.inf)
    return softmax(scores, items, items, ids, equal_captions)


def same(total, want, leaves):
    torch.testing.assert_close(total, want)
    for ours, theirs in zip(*(torch.autograd.grad(z, leaves) for z in (total, want)), strict=True):
        torch.testing.assert_close(ours, theirs)


MEANINGS = pytest.mark.parametrize("meaning", ["positive", "ignore"])


@MEANINGS
@pytest.mark.parametrize("name", ["clip", "clip-aug", "slip"])
def test_clip(name, meaning):
    """SLIP's views are told apart by item."""
    x, y, z = rows(1, N), rows(1, N), rows(2, N)
    _, _, terms = found(name, meaning, x, y, *([z] if name == "slip" else []))
    same(terms["align"], clip(x[0], y[0], IDS[0], meaning), [x, y])
    if name == "slip":
        torch.testing.assert_close(terms["views"], fused(z, range(N), "negative", 10.0))


def sigmoid(score, own, equal, meaning):
    if equal and not own and meaning == "ignore":
        return 0
    positive = own or (equal and meaning == "positive")
    return F.softplus(-score if positive else score)


@MEANINGS
def test_siglip(meaning):
    x, y = rows(1, N), rows(1, N)
    objective, total, _ = found("siglip", meaning, x, y)
    scores = SCALE * x[0] @ y[0].T + objective.logit_bias
    terms = [
        sigmoid(scores[i, j], i == j, IDS[0, i] == IDS[0, j], meaning)
        for i in range(N)
        for j in range(N)
    ]
    same(total, sum(terms) / N, [x, y, objective.logit_bias])


@MEANINGS
@pytest.mark.parametrize("pairs", [1, 16384])
def test_flair(meaning, pairs, monkeypatch):
    """A caption of another item is equal if it is among the item's own two."""
    monkeypatch.setattr(OBJECTIVES["flair"], "PAIRS", pairs)
    x, y, tokens = rows(1, N), rows(2, N), torch.randn(1, N, 4, E).double().requires_grad_()
    objective, total, terms = found("flair", meaning, x, y, tokens, ids=IDS)
    bias, local, every = objective.logit_bias, 0, 0
    own = [set(ids) for ids in IDS.T.tolist()]
    for i in range(N):
        texts = [(i, k) for k in range(2)] + [(j, 0) for j in range(N) if j != i]
        queries = torch.stack([y[k, j] for j, k in texts])
        pooled = F.normalize(objective.pooling(queries[None], tokens[0, i : i + 1])[0], dim=-1)
        for (j, k), a, b in zip(texts, pooled, queries, strict=True):
            local += sigmoid(SCALE * a @ b + bias, i == j, int(IDS[k, j]) in own[i], meaning)
        for j in range(N):
            for k in range(2):
                score = SCALE * x[0, i] @ y[k, j] + bias
                every += sigmoid(score, i == j, int(IDS[k, j]) in own[i], meaning)
    torch.testing.assert_close(terms["local"], local / (N + 1))
    torch.testing.assert_close(terms["all"], every / (2 * N))
    want = (local / (N + 1) + every / (2 * N)) / 2
    same(total, want, [x, y, tokens, *objective.parameters()])


@MEANINGS
@pytest.mark.parametrize("text", ["caption", "shuffled", "dropped"])
@pytest.mark.parametrize("scale", ["shared", "own"])
def test_ito(meaning, text, scale):
    """The fusion goes by the first captions if it sees them, and else by item."""
    x, y, h = rows(2, N), rows(4 if text == "shuffled" else 2, N), rows(2, N)
    options = {"captions": 2, "fusion_text": text, "fusion_scale": scale}
    objective, total, terms = found("ito", meaning, x, y, h, ids=IDS, **options)
    align = sum(clip(a, y[k], IDS[k], meaning) for a in x for k in range(2)) / 4
    of_fusion = SCALE if scale == "shared" else objective.logit_scale.exp()
    ids = IDS[0] if text == "caption" else range(N)
    fusion = fused(h, ids, meaning, of_fusion)
    torch.testing.assert_close(terms["align"], align)
    torch.testing.assert_close(terms["fusion"], fusion)
    learned = [objective.logit_scale] if scale == "own" else []
    same(total, align + 2 * fusion, [x, y, h, *learned])


# --- the ids ---

CAPTIONS = [["A  red\tcat", "tom"], ["a red cat", "A RED CAT"], ["a dog"], ["tom", "rex"], ["own"]]


def dataset(folder, captions, pictures=None, held_out=()):
    folder.mkdir()
    lines = []
    for n, texts in enumerate(captions):
        picture = torch.zeros(16, 16, 3) if pictures is None else pictures[n]
        Image.fromarray(picture.to(torch.uint8).numpy()).save(folder / f"{n}.png")
        split = "heldout" if n in held_out else "train"
        lines.append({"image": f"{n}.png", "captions": texts, "split": split})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return load_dataset(folder, 16, only="train")


TEXTS = [text for own in CAPTIONS for text in own]


def numbered(texts):
    """A tokenizer to whom each of TEXTS is one token, its place from 1."""
    return torch.tensor([[1 + TEXTS.index(text)] for text in texts])


def batches(folder, captions, held_out=(), **options):
    config = Config(batch_size=len(captions) - len(held_out), captions=3, load_size=16, **options)
    data = dataset(folder, captions, held_out=held_out)
    return Batches(data, numbered, config, Ranks(), CPU)


def assert_of_texts(texts, ids):
    plain = [" ".join(text.split()).lower() for text in texts]
    for a, i in zip(plain, ids, strict=True):
        for b, j in zip(plain, ids, strict=True):
            assert (a == b) == (i == j), (a, b)


@pytest.mark.parametrize("meaning", ["positive", "ignore"])
def test_ids_are_equal_where_the_drawn_captions_are(tmp_path, meaning):
    of = batches(tmp_path / "data", CAPTIONS, equal_captions=meaning)
    for step in range(4):
        batch = of(step)
        assert batch.caption_ids.shape == (3, 5)
        drawn = [TEXTS[token - 1] for token in batch.ids.flatten().tolist()]
        assert_of_texts(drawn, batch.caption_ids.flatten().tolist())


def test_there_are_none_if_no_two_items_to_train_on_share_a_caption(tmp_path):
    apart = CAPTIONS[1:3] + CAPTIONS[4:]  # the first has a caption twice
    assert batches(tmp_path / "a", apart)(0).caption_ids is None
    assert batches(tmp_path / "b", CAPTIONS, held_out=(0, 3))(0).caption_ids is None
    assert batches(tmp_path / "c", CAPTIONS, equal_captions="negative")(0).caption_ids is None
    assert batches(tmp_path / "d", CAPTIONS, held_out=(3,))(0).caption_ids is not None


class OneBatch:
    """A stream of one batch, over and over."""

    batch_size = len(CAPTIONS)

    def batches(self, start):
        records = [
            Record("", None, str(n), own, {}, None, None, None, None)
            for n, own in enumerate(CAPTIONS)
        ]
        while True:
            yield Decoded(torch.zeros(len(records), 3, 16, 16, dtype=torch.uint8), records)


def test_ids_of_a_stream_are_the_same_on_every_rank():
    def drawn(**options):
        said = []

        def tokenizer(texts):
            said.extend(texts)
            return numbered(texts)

        config = Config(captions=3, stream=True, val_data="x", **options)
        of = StreamBatches(OneBatch(), tokenizer, config, Ranks(), CPU)
        return said, of(0).caption_ids

    texts, ids = drawn()
    assert ids.shape == (3, 5)
    assert_of_texts(texts, ids.flatten().tolist())
    _, others = drawn(seed=5)  # other captions are drawn
    assert set(others.flatten().tolist()) & set(ids.flatten().tolist())
    assert drawn(equal_captions="negative")[1] is None


# --- it learns ---


@pytest.mark.parametrize(
    ("objective", "meaning", "least"),
    [
        # a text that is 1 image's and not 7 others': 8 times the entropy of 1/8 bits, in nats
        ("siglip", "negative", -math.log(1 / 8) - 7 * math.log(7 / 8)),
        ("siglip", "positive", 0),
        ("siglip", "ignore", 0),
        # log D - T over 8 positives, or one of 8 equal texts
        ("clip-aug", "negative", math.log(8)),
        ("clip-aug", "positive", math.log(8)),
        ("clip-aug", "ignore", 0),
    ],
)
def test_two_kinds_of_eight_each_fall_to_what_is_left(tmp_path, objective, meaning, least):
    noise = torch.Generator().manual_seed(0)
    kinds = torch.tensor([[200, 60, 90], [40, 150, 220]]).repeat(8, 1)[:, None, None]
    pictures = kinds + torch.randint(-30, 30, (16, 16, 16, 3), generator=noise)
    data = dataset(tmp_path / "data", [["a cat"], ["a dog"]] * 8, pictures)
    tokenizer = Tokenizer.train(["a cat", "a dog"], 270, 8)
    size = {"width": 16, "heads": 2, "image_size": 16, "load_size": 16, "text_depth": 1}
    config = Config(
        objective=objective,
        equal_captions=meaning,
        batch_size=16,
        steps=40,
        lr=1e-2,
        weight_decay=0.0,
        augmentation=Augmentation(),
        **size,
    )
    trainer = Trainer(config, data, tokenizer, CPU, torch.float32)
    losses = [trainer.step(number)["loss"] for number in range(config.steps)]
    assert least - 1e-4 < min(losses) < least + 1.5


# --- options, and what is said ---


def test_runs_from_before_the_option_go_on_with_negatives(tmp_path):
    data = write_set(tmp_path / "data", items=20, drawings=1)
    lines = [json.loads(line) for line in (data / "captions.jsonl").open()]
    for n, line in enumerate(lines):
        line["captions"] = [f"a {'cat' if n % 2 else 'dog'}" if n else "A  Dog"]
    (data / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run, options = tmp_path / "run", ["--objective", "siglip", "--checkpoint-every", "3", *QUICK]
    given = ["--train-data", str(data), "--out", str(run), "--equal-captions", "negative"]
    train.main([*given, *options])
    assert json.loads((run / "data.json").read_text())["equal_captions"] == 20
    old = tmp_path / "old"
    shutil.copytree(run, old)
    (old / "checkpoints" / "step_0000006.pt").unlink()
    config = json.loads((old / "config.json").read_text())
    assert config.pop("equal_captions") == "negative"
    (old / "config.json").write_text(json.dumps(config))
    train.main(["--resume", str(old)])
    assert steady(old) == steady(run)


def test_the_option_reaches_the_configuration_but_not_a_user_s_objective():
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert from_options(parser.parse_args([])).equal_captions == "positive"
    given = ["--equal-captions", "ignore"]
    for objective in OBJECTIVES:
        options = parser.parse_args([*given, "--objective", objective])
        assert from_options(options).equal_captions == "ignore"
    with pytest.raises(ValueError, match=r"own.py:loss does not take equal_captions$"):
        from_options(parser.parse_args([*given, "--objective", "own.py:loss"]))
    assert Config(objective="own.py:loss").equal_captions == "negative"
    with pytest.raises(ValueError, match=r"equal_captions must be one of .*, got 'equal'"):
        Config(equal_captions="equal")


@pytest.mark.parametrize(
    ("meaning", "said"),
    [
        ("positive", "each other's positives (--equal-captions positive)"),
        ("ignore", "left out: neither positives nor negatives of each other (--equal-captions ign"),
        ("negative", "each other's negatives (--equal-captions negative)"),
        (None, "what your objective makes of them"),
    ],
)
def test_what_is_said(meaning, said, tmp_path):
    """Of the captions that are trained on: equal ones of held-out items are no positives."""
    data = dataset(tmp_path / "a", [["cat"], ["Cat "], ["dog"], ["hen"], ["dog"]], held_out={4})
    told = report_equal_captions(data, meaning)
    assert told.startswith("note       2 training captions are equal to one of another training")
    assert said in told
    data = dataset(tmp_path / "b", [["cat"], ["dog"], ["hen"], ["dog"]], held_out={3})
    assert report_equal_captions(data, meaning) == ""
    assert said in report_equal_captions(None, meaning)
    same = dataset(tmp_path / "c", [["cat"], ["Cat "], ["cat"], ["dog"]], held_out={3})
    nothing = "warning    all training captions are equal: there is nothing to tell apart"
    assert report_equal_captions(same, meaning) == nothing
