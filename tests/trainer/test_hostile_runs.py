"""A run folder or a model of a stranger: nothing in it is executed, nothing is written outside of
it, its sizes fill no memory, and what it holds is no markup in a page or a terminal."""

import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import untrained_run
from support.markup import OBEYED, strange
from support.refused import refused

import ito
from ito import compare, evaluate, export, report, search, train
from ito.checkpoint import load_checkpoint, save_checkpoint
from ito.data import splits
from ito.data.fields import Record
from ito.model import pretrained
from ito.model.exported import require_shapes
from ito.model.hf import write_tokenizer
from ito.model.tokenizer import Tokenizer

CANARY = "<script>alert('q')</script><img src=x onerror=alert(1)>\"'\x1b[31m\u202e"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An untrained run, and its data."""
    folder = tmp_path_factory.mktemp("hostile")
    data = untrained_run.write_data(folder / "data")
    return untrained_run.write_run(folder / "run", data), data


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "run")


def change(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- nothing is executed ---


class Evil:
    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def test_a_pickle_in_a_checkpoint_is_not_run(copy, tmp_path, capsys):
    made, newest = tmp_path / "made", copy / "checkpoints" / "step_0000006.pt"
    state = torch.load(newest, weights_only=True)
    for evil in (state | {"objective": Evil(made)}, state | {"extra": Evil(made)}, Evil(made)):
        torch.save(evil, newest)
        for command in ((train, "--resume", copy), (export, copy)):
            said = refused(*command, capsys=capsys)
            assert f"{newest} is damaged (UnpicklingError): remove it" in said
    newest.write_bytes(pickle.dumps(Evil(made)))
    assert f"{newest} is damaged" in refused(export, copy, capsys=capsys)
    weights = copy / "model" / "model.safetensors"
    weights.write_bytes(pickle.dumps(Evil(made)))
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        ito.load(copy)
    assert not made.exists()


def test_the_file_of_a_loss_is_run_only_if_it_is_given(copy, tmp_path, capsys):
    made, file = tmp_path / "made", copy / "loss.py"
    file.write_text(f"import os\nos.mkdir({str(made)!r})\ndef loss(*a, **k): pass\n")
    change(copy / "config.json", objective=f"{file}:loss", equal_captions="negative")
    assert "names a file, which is run only" in refused(train, "--resume", copy, capsys=capsys)
    evaluate.main([str(copy)])  # it needs no loss
    report.main([str(copy)])
    search.main([str(copy), "red cat"])
    runs = tmp_path / "runs"
    shutil.copytree(copy, runs / "ito-seed0")
    (runs / "ito-seed0" / "evaluation.json").write_text("{}")
    (runs / "ito-seed0" / "cost.json").write_text('{"peak_bytes": 1}')
    said = refused(compare, "--report-only", "--out", runs, capsys=capsys)
    assert "names a file, which is run only" in said
    assert not made.exists()


def test_a_model_s_description_fetches_nothing():
    """Without the packages: each is refused before one is imported, or is not handed on."""
    with pytest.raises(ValueError, match="architecture must be a name of timm's, got 'hf-hub:a/b'"):
        pretrained.Timm("hf-hub:a/b", 8, [0.5], [0.5])
    tower = object.__new__(pretrained.OpenClipImage)
    for config in (
        {"vision_cfg": {"timm_model_name": "hf-hub:a/b"}, "text_cfg": {}},
        {"vision_cfg": {}, "text_cfg": {"hf_model_name": "a/b"}},
    ):
        with pytest.raises(ValueError, match="expected a CLIP with a ViT and CLIP's own text"):
            tower.build(config, {})
    with pytest.raises(ValueError, match="model_type must be one of clip, siglip"):
        pretrained.HuggingFaceDual().build({"model_type": "rag"})
    about = {
        "auto_map": {"AutoModel": "a/b--evil.Model"},
        "text_config": {"quantization_config": 1},
    }
    assert pretrained.no_dropout(about) == {"text_config": {}}
    with pytest.raises(ValueError, match="num_hidden_layers must be at most 1000"):
        pretrained.planned_body({"name": "hf", "config": {"num_hidden_layers": 10**9}}, 1)


# --- nothing is written elsewhere ---


@pytest.mark.parametrize(
    "name",
    [
        "search.png",
        "report.html",
        "near.json",
        "index",
        "metrics.jsonl",
        "config.json",
        "checkpoints",
        "model",
        "model/config.json",
        "checkpoints/.0123456789ab.tmp",
    ],
)
def test_a_link_out_of_the_folder_is_refused(name, copy, tmp_path, capsys):
    path, outside = copy / name, tmp_path / "outside"
    if path.is_dir():
        shutil.move(path, outside)
    elif path.exists():
        path.rename(outside)
    else:
        outside.write_text("kept")
    path.symlink_to(outside)
    files = [outside, *outside.rglob("*")]
    before = {file: file.read_bytes() for file in files if file.is_file()}
    for command in ((search, copy, "red cat"), (report, copy), (train, "--resume", copy)):
        said = refused(*command, capsys=capsys)
        assert said == f"error: {path} is a link that leads out of {copy}: remove it\n"
    assert {file: file.read_bytes() for file in before} == before
    assert refused(compare, "--report-only", "--out", copy.parent, capsys=capsys)
    assert path.is_symlink()


def test_a_link_within_the_folder_is_followed(copy):
    (copy / "report.html").rename(copy / "page.html")
    (copy / "report.html").symlink_to("page.html")
    report.main([str(copy)])
    assert (copy / "report.html").is_symlink()
    linked = copy.parent / "linked"
    linked.symlink_to(copy)
    report.main([str(linked)])  # what the user names may be a link


def test_a_pipe_in_place_of_what_is_written_does_not_hang(run, capsys):
    os.mkfifo(run / "near.json")
    (run / "report.html").unlink(missing_ok=True)
    os.mkfifo(run / "report.html")
    for command in ((search, run, "red cat"), (report, run)):
        assert "is a named pipe, not a file" in refused(*command, capsys=capsys)


def test_an_export_writes_no_other_names(tmp_path):
    files = {"../evil.json": {}, "/tmp/evil.json": {}, "tokenizer_config.json": {"a": 1}}
    write_tokenizer(Tokenizer.train(["a b"], 259, 8), files, tmp_path / "out")
    found = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["tokenizer.json", "tokenizer_config.json"]


# --- no memory is filled, and what is wrong is named ---

WRONG = [
    ("width", "128"),
    ("width", 10**9),
    ("heads", -1),
    ("image_size", 2**40),
    ("image_size", 32.5),
    ("load_size", True),
    ("vocab_size", 10**12),
    ("text_depth", 10**9),
    ("steps", 10**400),
    ("batch_size", []),
    ("seed", None),
    ("train_data", 3),
    ("train_data", None),
    ("image_root", {"a": 1}),
    ("objective", 7),
    ("fit", "../.."),
    ("max_pixels", 10**12),
    ("augmentation", []),
    ("augmentation", {"scale": "x"}),
    ("augmentation", {"warp": float("nan")}),
    ("stream", "yes"),
    ("group_by", "("),
    ("unknown", 1),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_configuration_that_cannot_be_is_refused_in_one_line(name, value, run, capsys):
    change(run / "config.json", **{name: value})
    for command in ((evaluate, run), (train, "--resume", run)):
        said = refused(*command, capsys=capsys)
        assert f"{run}/config.json is not the configuration of a run: " in said


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "null", "[" * 100_000, '{"a": 1e999}', "\0"])
@pytest.mark.parametrize("name", ["config.json", "model/config.json", "model/tokenizer.json"])
def test_what_is_no_configuration_is_refused_in_one_line(name, text, run, capsys):
    (run / name).write_text(text)
    if name.endswith("tokenizer.json"):
        without_checksums(run)
    assert f"{run}/{name} is" in refused(evaluate, run, capsys=capsys)


def test_a_pattern_of_very_many_files_is_refused(run, capsys):
    for pattern in ("{0..99999999999}", "{a,b}" * 60, "{0..9999}{0..9999}"):
        change(run / "config.json", train_data=f"/data/{pattern}.tar")
        assert "stands for more than 1000000 files" in refused(evaluate, run, capsys=capsys)


def test_a_regular_expression_that_takes_for_ever_is_stopped(monkeypatch):
    monkeypatch.setattr(splits, "SEARCHED", 0.3)
    record = Record("a.csv:2", "a.png", "a", ["a"], {}, None, None, None, None, "a" * 60 + "!")
    with pytest.raises(ValueError, match=r"--group-by '\(a\+\)\+\$' takes longer than 0.3 s"):
        splits.set_groups([record], "(a+)+$")
    splits.set_groups([record], "a")
    assert record.group == "a"
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.fixture
def little_memory():
    """2 GB more than the process has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", 2**20),
        ("width", 2**70),
        ("width", "16"),
        ("heads", -2),
        ("heads", 0),
        ("image_depth", 10**9),
        ("text_depth", True),
        ("vocab_size", 2**22),
        ("context_length", 2**22),
        ("image_size", 2**20),
        ("patch_size", -8),
        ("patch_size", 2**30),
        ("image_width", 2**20),
        ("image_encoder", "evil"),
        ("image_encoder", {"name": "evil"}),
        ("text_encoder", {"name": "hf", "config": {}, "pad_id": 0}),
        ("evil", 1),
    ],
)
def test_sizes_that_the_weights_lack_are_refused(name, value, run, little_memory):
    about = json.loads((run / "model" / "config.json").read_text())
    change(run / "model" / "config.json", architecture=about["architecture"] | {name: value})
    with pytest.raises((ValueError, ImportError)) as told:
        ito.load(run)
    assert "model/config.json" in str(told.value) or "this encoder needs" in str(told.value)


def test_sizes_of_the_pictures_and_steps_are_numbers(run):
    for name, value in (("load_size", 10**9), ("load_size", "32"), ("step", CANARY), ("fit", [])):
        before = (run / "model" / "config.json").read_text()
        change(run / "model" / "config.json", **{name: value})
        with pytest.raises(ValueError, match=r"model/config.json is damaged.*"):
            ito.load(run)
        (run / "model" / "config.json").write_text(before)


def test_a_checkpoint_of_other_sizes_than_config_json_is_refused(copy, capsys):
    change(copy / "config.json", width=65_536)
    said = refused(train, "--resume", copy, capsys=capsys)
    assert "checkpoints is of another model: width 32, config.json has 65536" in said
    state = load_checkpoint(copy / "checkpoints")
    about = state["architecture"] | {"text_depth": 10**9}
    save_checkpoint(copy / "checkpoints", 6, state | {"architecture": about})
    for command in ((train, "--resume", copy), (export, copy)):
        assert "text_depth must be a number from 1 to " in refused(*command, capsys=capsys)
    with pytest.raises(ValueError, match="must be"):
        require_shapes(state["architecture"], {})


def test_a_checkpoint_that_expands_is_refused(copy, capsys):
    newest = copy / "checkpoints" / "step_0000006.pt"
    with zipfile.ZipFile(newest) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(newest, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    said = refused(train, "--resume", copy, capsys=capsys)
    assert "is damaged (it is compressed: torch.save does not do so)" in said


def test_parts_of_a_checkpoint_of_another_type(copy, capsys):
    state = load_checkpoint(copy / "checkpoints")
    for name in ("model", "objective", "optimizer", "architecture", "tokenizer", "dtype"):
        save_checkpoint(copy / "checkpoints", 6, state | {name: [3]})
        said = refused(train, "--resume", copy, capsys=capsys)
        assert f"{copy}/checkpoints" in said or f"{copy}/environment.json" in said, name


def test_lying_headers_of_weights_are_refused(run):
    path = run / "model" / "model.safetensors"
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    about = json.loads(whole[8 : 8 + size])
    first = next(name for name in about if name != "__metadata__")
    lies = [
        {"shape": [2**40], "data_offsets": [0, 2**42]},
        {"shape": [2**62, 4], "data_offsets": about[first]["data_offsets"]},
        {"shape": [-1], "data_offsets": [8, 0]},
        {"dtype": "F128"},
        {"data_offsets": [2**63, 2**64]},
    ]
    headers = [json.dumps(about | {first: about[first] | lie}).encode() for lie in lies]
    contents = [struct.pack("<Q", len(text)) + text + whole[8 + size :] for text in headers]
    contents += [struct.pack("<Q", 2**62) + whole[8:], b"", whole[:8], whole[:-9], b"\xff" * 100]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
            ito.load(run)


def without_checksums(run) -> None:
    weights = run / "model" / "model.safetensors"
    save_file(load_file(weights), weights)


def tokenizer_with(run, **parts) -> None:
    without_checksums(run)
    change(run / "model" / "tokenizer.json", **parts)


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
TOKENIZERS = {
    "pads to terabytes": {"padding": {"strategy": {"Fixed": 2**40}, "direction": "Right"}},
    "cuts not": {"truncation": None},
    "cuts to nothing": {"truncation": {"max_length": 0, "stride": 0}},
    "a stride": {"truncation": {"max_length": 8, "stride": 100}},
    "texts grow": {"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 4}},
    "a long prefix": {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
    "many tokens": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}] * 10**5,
            "pair": [],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}},
        }
    },
    "a panic": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a charsmap that is none": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    },
    "no model": {"model": {"type": "Unigram", "vocab": [], "unk_id": 5}},
    "a list": {"added_tokens": {"a": 1}},
    "a slow expression": {"pre_tokenizer": SPLIT | {"pattern": {"Regex": "(a+)+$"}}},
    "ids beyond the weights": {},
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_of_others_is_limited(name, run, little_memory, capsys):
    path = run / "model" / "tokenizer.json"
    about = json.loads(path.read_text())
    parts = TOKENIZERS[name]
    for part in ("padding", "truncation"):
        if parts.get(part):
            parts = parts | {part: about[part] | parts[part]}
    if not parts:
        vocab = about["model"]["vocab"]
        parts = {"model": about["model"] | {"vocab": vocab | {max(vocab, key=vocab.get): 2**31}}}
    tokenizer_with(run, **parts)
    said = refused(search, run, "a" * 60 + "!", capsys=capsys)
    assert f"{path} is" in said or "the tokenizer fails" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [("threads", 10**9), ("threads", -1), ("threads", "8"), ("device", 3)],
)
def test_an_environment_that_cannot_be_is_refused(name, value, copy, capsys):
    change(copy / "environment.json", **{name: value})
    said = refused(train, "--resume", copy, capsys=capsys)
    assert f"{copy}/environment.json is damaged" in said


def test_kept_embeddings_of_others_are_refused(run, capsys):
    search.main([str(run), "red cat"])
    (path,) = (run / "index").iterdir()
    for wrong in (torch.zeros(3, 16), torch.zeros(40, 7), torch.zeros(40, 16).long()):
        save_file({"images": wrong}, path)
        assert f"{path} is damaged" in refused(search, run, "red cat", capsys=capsys)


# --- no markup, nothing that a terminal obeys ---


def test_no_page_and_no_output_holds_what_others_wrote_raw(tmp_path, capsys):
    """In captions, names of files, items, groups, splits, and all that a run's files hold."""
    data = untrained_run.write_data(tmp_path / "data", style=CANARY)
    lines = (data / "captions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for number, row in enumerate(rows):
        name = f"{number}-<img src=x onerror=alert(1)>\x1b[31m\u202e.png"
        (data / row["image"]).rename(data / name)
        row |= {"image": name, "item": CANARY + row["item"], "group": CANARY + row["group"]}
        row |= {"captions": [f"{CANARY} {text}" for text in row["captions"]], "subgroup": CANARY}
        row["translations"] = {CANARY: row["captions"]}
        if row["split"] != "train":
            row["split"] = "<img src=x onerror=alert(1)>"
    rows += [{"image": CANARY, "captions": [CANARY]}, {"image": "0", CANARY: 1}, CANARY]
    (data / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = untrained_run.write_run(tmp_path / "<img src=x onerror=alert(1)>", data)
    environment = {"torch": CANARY, CANARY: CANARY, "data": CANARY, "threads": 1}
    (run / "environment.json").write_text(json.dumps(environment))
    facts = {
        "format": CANARY,
        "pictures": CANARY,
        "items": 1,
        "captions": 1,
        "cut_captions": CANARY,
    }
    facts |= {"equal_captions": 1, "train_items": 1, "val_items": 1, "split_by": CANARY}
    (run / "data.json").write_text(json.dumps(facts | {"skipped": {CANARY: 3}}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "stream", "step": 7, "skipped": CANARY}) + "\n")
        file.write(json.dumps({"kind": "train", "step": 8, CANARY: 1.0, "loss": 1.0}) + "\n")
    report.main([str(run)])
    page = (run / "report.html").read_text()
    assert "&lt;script&gt;" in page
    search.main([str(run), CANARY, "red cat"])
    evaluate.main([str(run)])
    printed = capsys.readouterr()
    assert not strange(page)
    for text in (printed.out, printed.err):
        assert not OBEYED.findall(text.replace("\r", ""))


def test_what_a_run_says_about_itself_is_shown_by_numbers(copy, capsys):
    """On --resume: its environment, the hashes of its data, its log."""
    about = json.loads((copy / "environment.json").read_text())
    about |= {"torch": CANARY, CANARY: 1, "sha256": about["sha256"] | {CANARY: CANARY}}
    (copy / "environment.json").write_text(json.dumps(about))
    lines = (
        (copy / "metrics.jsonl")
        .read_text()
        .replace("heldout/", json.dumps(CANARY.replace("/", ""))[1:-1] + "/")
    )
    (copy / "metrics.jsonl").write_text(lines)
    train.main(["--resume", str(copy)])
    printed = capsys.readouterr()
    assert "\\x1b[31m" in printed.out
    assert not OBEYED.findall(printed.out + printed.err.replace("\r", ""))
    assert not strange((copy / "report.html").read_text())


def test_a_comparison_of_others_holds_no_markup():
    from ito.scoring.comparison import plain_text, rows

    table = rows(["a"], [[f"{CANARY}|`x`[a](javascript:b)![c](http://d)\n# e"]])
    assert table.count("\n") == 2
    for bare in ("<", "|", "`", "[", "]", "!"):
        cell = table.splitlines()[2][2:-2]
        assert not re.search(rf"(?<!\\){re.escape(bare)}", cell), bare
    assert plain_text("12.0 ± 3.4, significant") == "12.0 ± 3.4, significant"


def test_every_torch_load_takes_weights_only():
    from pathlib import Path

    root = Path(ito.__file__).parents[1]
    for path in (*root.glob("ito/**/*.py"), *root.glob("ito_kernels/**/*.py")):
        text = path.read_text()
        calls = re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", text)
        assert len(calls) == text.count("torch.load(")
        assert all("weights_only=True" in call for call in calls), path
        assert not re.search(
            r"\bpickle\.|allow_pickle=True|\beval\(|yaml\.", text.replace(".eval(", "")
        )
