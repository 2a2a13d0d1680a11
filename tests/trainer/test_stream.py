"""WebDataset shards and the stream: what is read, in which order, on which rank."""

import io
import itertools
import json
import re
import shutil
import tarfile
from collections import Counter

import pytest
import torch
from PIL import Image
from support.quick_run import steady

from ito import train
from ito.config import Config
from ito.data import records as sources
from ito.data.dataset import load_dataset
from ito.data.emoji import write_shards
from ito.data.records import Record, open_shards
from ito.data.shards import Member, expand
from ito.model.tokenizer import Tokenizer
from ito.ranks import Ranks
from ito.source import open_data
from ito.stream import Stream, StreamBatches

CPU = torch.device("cpu")


def png(value, size=8):
    out = io.BytesIO()
    Image.new("L", (size, size), value).convert("RGB").save(out, "PNG")
    return out.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key, value, **fields):
    fields = {"captions": [f"grey {value}"]} | fields
    return [(f"{key}.png", png(value)), (f"{key}.json", json.dumps(fields).encode())]


def numbered(folder, shards, per_shard, **fields):
    """Shards of grey squares; sample n has the grey n and the only caption "grey n"."""
    for shard in range(shards):
        values = range(shard * per_shard, (shard + 1) * per_shard)
        members = [member for n in values for member in sample(f"{n:05}", n, **fields)]
        write_tar(folder / f"part-{shard:03}.tar", members)
    return open_shards(folder)


def greys(batch):
    """The sample numbers of a batch, by its pictures; their captions must agree."""
    values = batch.images[:, 0, 0, 0].tolist()
    assert [r.captions for r in batch.records] == [[f"grey {value}"] for value in values]
    return values


# --- shards ---


def test_patterns():
    assert [p.name for p in expand("/d/a-{008..011}.tar")] == [
        "a-008.tar",
        "a-009.tar",
        "a-010.tar",
        "a-011.tar",
    ]
    assert len(expand("{0..1}/{00..02}.tar")) == 6
    assert [str(p) for p in expand("/d/a.tar")] == ["/d/a.tar"]


def test_a_tar_has_the_fields_of_a_folder_and_one_text_per_sample(tmp_path):
    fields = {"item": "x", "split": "test", "style": "s", "group": "g", "subgroup": "h"}
    names = {"de": ["rot"]}
    write_tar(
        tmp_path / "a-00.tar",
        [
            *sample("dir.v1/0", 10, captions=[" red ", "", "rot"], translations=names, **fields),
            ("dir.v1/0.txt", b"rot"),  # one of those of the .json
            ("1.jpg", png(20)),
            ("1.txt", b"from the text\n"),
            ("1.json", json.dumps({"url": "u", "caption": None}).encode()),
            ("2.cls", b"3"),
            ("2.seg.png", png(1)),
            ("2.PNG", png(30)),
            ("2.txt", "Größe".encode()),
        ],
    )
    write_tar(tmp_path / "a-01.tar", [("0.webp", png(40)), ("0.txt", b"again")])
    for source in (tmp_path, tmp_path / "a-{00..01}.tar"):
        data = load_dataset(source, 4)
        assert data.images[:, 0, 0, 0].tolist() == [10, 20, 30, 40]
        assert data.captions == [["red", "rot"], ["from the text"], ["Größe"], ["again"]]
        assert data.items == ["x", "a-00.tar/1", "a-00.tar/2", "a-01.tar/0"]
        assert data.split == ["test", "train", "train", "train"]
        assert (data.style[0], data.group[0], data.subgroup[0]) == ("s", "g", "h")
        assert data.translations[0] == names
        assert data.skipped == []
        assert data.files[3] == f"{tmp_path}/a-01.tar@512"  # after a header
    assert load_dataset(tmp_path / "a-01.tar", 4).captions == [["again"]]


def test_bad_samples_are_skipped_and_named(tmp_path):
    good = sample("good", 9)
    write_tar(
        tmp_path / "a.tar",
        [
            *good,
            ("lonely.txt", b"no picture"),
            ("dumb.png", png(1)),
            ("blank.png", png(1)),
            ("blank.txt", b"  "),
            ("json.png", png(1)),
            ("json.json", b"{"),
            ("deep.png", png(1)),
            ("deep.json", b"[" * 100_000),
            ("list.png", png(1)),
            ("list.json", b"[1]"),
            ("field.png", png(1)),
            ("field.json", b'{"caption": "a", "split": [3]}'),
            ("latin.png", png(1)),
            ("latin.txt", b"f\xfcr"),
            ("broken.png", b"no picture"),
            ("broken.txt", b"a"),
            *sample("good", 8),  # names that were there before: at once, and later
            *sample("good", 7),
            *sample("last", 6),
            *sample("good", 5),
            *sample("caf\udce9", 4),  # not UTF-8
        ],
    )
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:700])  # inside the first picture
    (tmp_path / "d.tar").write_bytes(whole[:2048])  # after the first sample
    (tmp_path / "e.tar").write_bytes(whole[:2048] + b"x" * 5000)
    (tmp_path / "c.tar").write_bytes(b"")
    data = load_dataset(tmp_path, 4)
    assert data.captions == [["grey 9"], ["grey 6"], ["grey 4"], ["grey 9"], ["grey 9"]]
    assert data.items[2] == r"a.tar/caf\xe9"
    reasons = {where.removeprefix(f"{tmp_path}/"): reason for where, reason in data.skipped}
    want = {
        "a.tar:lonely": "no picture in the sample: among .txt",
        "a.tar:dumb": "empty caption",
        "a.tar:blank": "empty caption",
        "a.tar:json": "Expecting",
        "a.tar:deep": "recursion",
        "a.tar:list": "expected a JSON object, got [1]",
        "a.tar:field": "split must be a text, got [3]",
        "a.tar:latin": "can't decode",
        "a.tar:broken": "of no known format",
        "b.tar": "damaged",
        "c.tar": "not an uncompressed tar",
        "d.tar": "no end mark at byte 2048: cut off after a whole file, or written so",
        "e.tar": "no header at byte 2048",
    }
    repeated = {where for where in reasons if "a.tar:good@" in where}
    assert len(repeated) == 3
    assert {reasons.pop(where) for where in repeated} == {
        "the tar has a sample of this name already"
    }
    assert reasons.keys() == want.keys()
    assert all(want[where] in reason for where, reason in reasons.items())


def test_tars_of_one_name_in_several_folders_are_told_apart(tmp_path):
    for n in range(2):
        (tmp_path / f"{n}").mkdir()
        write_tar(tmp_path / f"{n}" / "a.tar", sample("0", n))
    data = load_dataset(tmp_path / "{0..1}" / "a.tar", 4)
    assert data.items == ["0/a.tar/0", "1/a.tar/0"]
    assert data.captions == [["grey 0"], ["grey 1"]]


def test_missing_shards_are_named(tmp_path):
    write_tar(tmp_path / "a-0.tar", sample("0", 0))
    with pytest.raises(FileNotFoundError, match=r"a-1.tar, .*a-2.tar \(2 missing\)"):
        load_dataset(tmp_path / "a-{0..2}.tar", 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no captions.jsonl, .tar"):
        load_dataset(tmp_path / "empty", 4)


def test_written_shards_are_read_again_and_mixed(tmp_path):
    records = [
        {"image": f"{n}.png", "item": f"{n // 2}", "captions": [f"grey {n}"], "split": split}
        for split, numbers in (("train", range(40)), ("test", range(40, 50)))
        for n in numbers
    ]
    write_shards(tmp_path / "shards", records, [png(n) for n in range(50)])
    names = [p.name for p in sorted((tmp_path / "shards").iterdir())]
    assert names == ["test-00000.tar", "train-00000.tar"]
    data = load_dataset(tmp_path / "shards", 4)
    assert sorted(data.images[:, 0, 0, 0].tolist()) == list(range(50))
    assert data.images[:, 0, 0, 0].tolist() != sorted(data.images[:, 0, 0, 0].tolist())
    assert len(data.items) == 25


# --- the stream ---


def test_a_pass_gives_every_record_once_in_an_order_of_its_own(tmp_path):
    stream = Stream(numbered(tmp_path, 5, 20), 4, 10, seed=3, buffer=30)
    passes = []
    batches = stream.batches()
    for _ in range(3):
        found = [n for batch in itertools.islice(batches, 10) for n in greys(batch)]
        assert sorted(found) == list(range(100))
        passes.append(found)
    assert passes[0] != passes[1] != passes[2]
    first = Counter(n // 20 for n in passes[0][:30])
    assert len(first) > 1  # shards are mixed
    other = Stream(open_shards(tmp_path), 4, 10, seed=4, buffer=30)
    assert greys(next(other.batches())) != passes[0][:10]


def test_ranks_share_the_records_out(tmp_path):
    shards = numbered(tmp_path, 7, 6)
    found = Counter()
    for rank in range(3):
        stream = Stream(shards, 4, 2, rank=rank, world_size=3, buffer=5)
        own = [record.where for record in stream.epoch(1)]
        found.update(own)
        assert len(own) in (12, 18)
    assert len(found) == 42
    assert set(found.values()) == {1}
    with pytest.raises(ValueError, match="at least one shard for each of 8 ranks, got 7"):
        Stream(shards, 4, 2, world_size=8)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core
def test_neither_workers_nor_the_start_change_a_batch(tmp_path):
    shards = numbered(tmp_path, 3, 10)
    want = [greys(batch) for batch in itertools.islice(Stream(shards, 4, 8).batches(), 9)]
    several = Stream(shards, 4, 8, workers=2).batches()
    assert [greys(batch) for batch in itertools.islice(several, 9)] == want
    assert greys(next(Stream(shards, 4, 8).batches(start=7))) == want[7]


def test_resuming_reads_no_earlier_picture(tmp_path, monkeypatch):
    shards = numbered(tmp_path, 3, 10)
    read = []
    monkeypatch.setattr(Member, "read_bytes", lambda m: read.append(m) or png(1))
    next(Stream(shards, 4, 8).batches(start=5))
    assert len(read) == 8


def test_items_of_a_batch_differ_and_none_is_lost(tmp_path):
    for shard in range(2):
        members = [
            member
            for n in range(shard * 30, shard * 30 + 30)
            for member in sample(f"{n:05}", n, item=str(n % 6))
        ]
        write_tar(tmp_path / f"{shard}.tar", members)
    batches = Stream(open_shards(tmp_path), 4, 5, buffer=20).batches()
    found = Counter()
    for batch in itertools.islice(batches, 24):
        assert len({record.item for record in batch.records}) == 5
        found.update(greys(batch))
    assert len(found) == 60  # two passes, to the records that wait for another batch
    assert sum(found.values()) == 120
    assert set(found.values()) <= {1, 2, 3}
    with pytest.raises(ValueError, match=r"different items, 6 in 2 shards .*; got 7"):
        Stream(open_shards(tmp_path), 4, 7)


def test_a_record_that_repeats_an_item_waits_for_the_next_batch(tmp_path):
    records = [Record(f"{n}", tmp_path, f"{n % 3}", ["a"], {}, *[None] * 4) for n in range(6)]
    for seed in range(5):
        groups = Stream([lambda: iter(records)], 4, 3, seed=seed, buffer=10).groups()
        found = {record.where for group in itertools.islice(groups, 2) for record in group}
        assert len(found) == 6


def test_an_item_of_half_the_records_ends_no_stream_and_fills_no_memory(tmp_path):
    records = [
        Record(f"{n}", tmp_path, "often" if n % 2 else f"{n}", ["a"], {}, *[None] * 4)
        for n in range(400)
    ]
    stream = Stream([lambda: iter(records)], 4, 16, buffer=50)
    groups, found = stream.groups(), Counter()
    for group in itertools.islice(groups, 200):
        assert len({record.item for record in group}) == len(group) == 16
        assert len(groups.gi_frame.f_locals["waiting"]) <= 50
        found.update(record.item for record in group)
    assert found.pop("often") == 200
    assert len(found) == 200  # 3000 / 200: 15 of each, to what the buffer holds
    assert set(found.values()) <= {14, 15, 16}


def test_a_rank_whose_shards_of_a_pass_hold_nothing_goes_on(tmp_path):
    """Of three shards one is trained on: in a pass one of two ranks, or of three, has none."""
    write_tar(tmp_path / "a.tar", [m for n in range(9) for m in sample(f"{n}", n)])
    write_tar(tmp_path / "b.tar", sample("0", 50, split="test"))
    (tmp_path / "c.tar").write_bytes(b"damaged")
    shards = open_shards(tmp_path)
    for size in (2, 3):
        empty = 0
        for rank in range(size):
            stream = Stream(shards, 4, 7, rank=rank, world_size=size)
            for batch in itertools.islice(stream.batches(), 6):
                assert len(set(greys(batch))) == 7
            empty += sum(not list(stream.epoch(number)) for number in range(6))
        assert empty == 6 * (size - 1)
    with pytest.raises(ValueError, match=r"items, 1 in 2 shards \(1 records .*c.tar.*; got 2"):
        Stream([lambda: iter([next(shards[0]())]), shards[2]], 4, 2)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_unreadable_pictures_are_replaced_and_counted_once(tmp_path):
    """Whatever the workers and the start; the records that come next take their places."""
    for shard in range(2):
        numbers = range(shard * 20, shard * 20 + 20)
        members = [member for n in numbers for member in sample(f"{n}", n)]
        members += [(f"bad{n}.{kind}", b"none") for n in range(9) for kind in ("png", "txt")]
        members += [("dumb.png", png(1)), *sample("held", 9, split="test")]
        write_tar(tmp_path / f"{shard}.tar", members)
    shards = open_shards(tmp_path)
    stream = Stream(shards, 4, 8)
    want = [greys(batch) for batch in itertools.islice(stream.batches(), 15)]
    assert all(len(set(values)) == 8 for values in want)
    assert {n for values in want for n in values} == set(range(40))
    bad = {f"{shard}.tar:bad{n}" for shard in range(2) for n in range(9)}
    skipped = {where.removeprefix(f"{tmp_path}/") for where in stream.skipped}
    assert skipped == bad | {"0.tar:dumb", "1.tar:dumb"}
    several = Stream(shards, 4, 8, workers=3).batches(start=4)
    assert [greys(batch) for batch in itertools.islice(several, 5)] == want[4:9]

    assert sorted(greys(next(Stream(shards, 4, 40).batches()))) == list(range(40))
    few = r"picture that can be read, 40 in 2 shards \(20 records skipped: .*; got 41"
    with pytest.raises(ValueError, match=few):
        next(Stream(shards, 4, 41).batches())
    write_tar(tmp_path / "0.tar", [("dumb.png", png(1)), *sample("held", 9, split="test")])
    with pytest.raises(ValueError, match=r"items, 0 in 1 shards \(1 records skipped: .*dumb"):
        Stream(shards[:1], 4, 1)


def test_tables_are_streamed_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROWS", 4)
    lines = ["filepath\ttitle"]
    for n in range(10):
        (tmp_path / f"{n}.png").write_bytes(png(n))
        lines.append(f"{n}.png\tgrey {n}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n9.png\t \n", encoding="utf-8")
    shards = open_shards(tmp_path / "table.csv")
    assert len(shards) == 3
    stream = Stream(shards, 4, 5)
    found = [greys(batch) for batch in itertools.islice(stream.batches(), 2)]
    assert sorted(itertools.chain(*found)) == list(range(10))
    assert list(stream.skipped.values()) == ["empty caption"]


def test_batches_for_the_trainer(tmp_path):
    numbered(tmp_path, 2, 20, captions=["one", "two words", "three words here"])
    tokenizer = Tokenizer.train(["one two words three here"] * 3, 300, 8)
    config = Config(views=3, captions=2, batch_size=5, seed=1)
    stream = Stream(open_shards(tmp_path), 4, config.batch_size, seed=config.seed)
    batches = StreamBatches(stream, tokenizer, config, Ranks(), CPU)
    first = batches(0)
    assert first.pictures.shape == (3, 5, 3, 4, 4)
    assert first.pictures.dtype == torch.uint8
    assert torch.equal(first.pictures[0], first.pictures[2])
    ids = first.ids[:, first.local_rows]
    assert ids.shape[:2] == (2, 5)
    known = {tuple(row) for row in tokenizer(["one", "two words", "three words here"]).tolist()}
    for first, second in zip(*ids.tolist(), strict=True):
        padded = [tuple(row + [0] * (8 - len(row))) for row in (first, second)]
        assert len(set(padded) & known) == 2  # two different captions
    assert ids[..., -1].any()  # columns of padding alone are left out
    later = [batches(step) for step in (1, 2, 3)][-1]
    for again in (batches(3), StreamBatches(stream, tokenizer, config, Ranks(), CPU)(3)):
        assert torch.equal(again.pictures, later.pictures)
        assert torch.equal(again.ids, later.ids)
    assert batches.size == 5


def test_ranks_have_places_of_their_own_in_the_batch(tmp_path):
    shards = numbered(tmp_path, 2, 20)
    tokenizer = Tokenizer.train(["grey"], 300, 8)
    ranks, seen = Ranks(), []
    ranks.size = 2
    for ranks.rank in range(2):
        stream = Stream(shards, 4, 5, rank=ranks.rank, world_size=2)
        batch = StreamBatches(stream, tokenizer, Config(views=3), ranks, CPU)(0)
        assert batch.count == 30
        seen += batch.positions.flatten().tolist()
    assert sorted(seen) == list(range(30))


# --- runs ---


def test_a_streamed_run_resumes_to_the_same_numbers(tmp_path, capsys):
    """Noise of two splits, in shards; the second half of the steps by another number of workers."""
    random = torch.Generator().manual_seed(0)
    for folder, split, count in (("data", "train", 12), ("val", None, 4)):
        (tmp_path / folder).mkdir()
        for shard in range(2):
            members = []
            for n in range(shard * count, (shard + 1) * count):
                coarse = torch.randint(0, 256, (4, 4, 3), generator=random, dtype=torch.uint8)
                out = io.BytesIO()
                Image.fromarray(coarse.numpy()).resize((32, 32)).save(out, "PNG")
                fields = {"captions": [f"thing {n} of {folder}"], "split": split}
                members += [(f"{n}.png", out.getvalue()), (f"{n}.json", json.dumps(fields))]
            if split and not shard:
                members += [("bad.png", b"no picture"), ("bad.txt", "bad " * 20)]
                members += [
                    ("held.png", out.getvalue()),
                    ("held.json", '{"caption": "h", "split": "test"}'),
                ]
            encoded = [(name, m if isinstance(m, bytes) else m.encode()) for name, m in members]
            write_tar(tmp_path / folder / f"{shard}.tar", encoded)
    whole = tmp_path / "whole"
    options = "--width 16 --heads 2 --vocab-size 300 --context-length 8 --image-size 16"
    options += " --load-size 32 --batch-size 8 --steps 6 --log-every 1 --eval-every 6"
    data = ["--train-data", str(tmp_path / "data"), "--val-data", str(tmp_path / "val")]
    every = [*options.split(), "--checkpoint-every", "3", "--threads", "1"]
    train.main(["--stream", *data, "--out", str(whole), "--workers", "0", *every])
    told = capsys.readouterr().out
    assert "a stream of 2 shards" in told
    assert "val: 8 pictures, 8 captions" in told
    assert "skipped 1 records:" in told
    assert "cut        9 of 33 captions, to their first 8 tokens; the longest has 22\n" in told
    assert "Records of the stream skipped: 1." in (whole / "report.html").read_text()
    assert "compile    no: " in told
    assert re.search(r"compute +\d+\.\d% of a step", told)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    assert all(0 < line["input_share"] < 1 for line in lines if line["kind"] == "train")

    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    (cut / "checkpoints" / "step_0000006.pt").unlink()
    train.main(["--resume", str(cut), "--workers", "1"])
    a, b = (
        torch.load(run / "checkpoints" / "step_0000006.pt", weights_only=True)["model"]
        for run in (whole, cut)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert steady(cut) == steady(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--stream", "--stream needs --val-data"),
        ("--val-data nowhere", "no data at"),
        ("--stream --val-data nowhere", "no data at"),
        ("--stream --val-data {here} --workers -1", "--workers must be at least 0, got -1"),
        (
            "--stream --val-data {here}",
            "different items, 6 in 1 shards (0 records skipped); got 64",
        ),
    ],
)
def test_bad_options_are_named(options, message, tmp_path, capsys):
    numbered(tmp_path, 1, 6)
    given = [option.format(here=tmp_path) for option in options.split()]
    with pytest.raises(SystemExit) as end:
        train.main(["--train-data", str(tmp_path), "--out", str(tmp_path / "run"), *given])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_rank_without_other_texts_to_shuffle_is_refused(tmp_path):
    numbered(tmp_path, 2, 6)
    where, ranks = str(tmp_path), Ranks()
    ranks.size = 2
    config = Config(
        train_data=where, val_data=where, stream=True, batch_size=2, fusion_text="shuffled"
    )
    with pytest.raises(ValueError, match="must be at least 2 for each of 2 ranks, got 2"):
        open_data(config, None, 0, ranks)


def test_a_record_is_small(tmp_path):
    """What the shuffle buffer and the workers are handed holds no pixels."""
    (record,) = open_shards(write_tar(tmp_path / "a.tar", sample("0", 5)))[0]()
    assert isinstance(record, Record)
    assert isinstance(record.image, Member)
    assert record.image.read_bytes() == png(5)
