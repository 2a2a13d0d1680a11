"""The tokenizer: what it makes of text, and that training it is deterministic."""

import json
import subprocess
import sys

import pytest
import torch

from ito.tokenizer import Tokenizer

CAPTIONS = ["a red apple", "a green apple", "flag for France", "the moon", "a RED flag"] * 3


def test_tokenizer(tmp_path):
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size=300, context_length=8)
    ids = tokenizer(["a red apple", "A  Red\tAPPLE", "", "x" * 50, "日本 🎌"])
    assert ids.dtype == torch.int64
    assert ids.shape == (5, 8)
    assert ids.min() >= 0
    assert ids.max() < tokenizer.vocab_size <= 300
    for row in ids.tolist():
        end = row.index(tokenizer.eot_id)
        assert row[0] == tokenizer.bos_id
        assert all(row[1:end])
        assert not any(row[end + 1 :])
    assert ids[2].tolist()[:2] == [tokenizer.bos_id, tokenizer.eot_id]
    assert ids[3, -1] == tokenizer.eot_id  # cut, and still ended
    assert (ids[0] != 0).sum() == 5  # "a", "red", "apple" are tokens
    assert torch.equal(ids[0], ids[1])
    assert tokenizer([]).shape == (0, 8)

    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert torch.equal(
        loaded(["a red apple", "", "zebra"]), tokenizer(["a red apple", "", "zebra"])
    )
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.context_length == 8


def test_no_text_is_lost():
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size=300, context_length=64)
    for text in ("zebra", "кошка и 猫", "100 % $"):
        ids = tokenizer([text])[0].tolist()
        assert tokenizer.bpe.decode(ids).strip() == text
    ids = tokenizer(["a <pad> red <bos><eot> apple"])[0].tolist()
    end = ids.index(tokenizer.eot_id)
    assert tokenizer.bpe.decode(ids[1:end]).strip() == "a <pad> red <bos><eot> apple"
    assert all(ids[:end])
    assert not any(ids[end + 1 :])


def test_training_is_deterministic(tmp_path, records):
    captions = [name for record in records for name in record["captions"]]
    Tokenizer.train(captions, vocab_size=1300).save(tmp_path / "here.json")
    (tmp_path / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    program = (
        "import json, sys; from ito.tokenizer import Tokenizer;"
        "Tokenizer.train(json.load(open(sys.argv[1])), vocab_size=1300).save(sys.argv[2])"
    )
    paths = [str(tmp_path / "captions.json"), str(tmp_path / "there.json")]
    subprocess.run([sys.executable, "-c", program, *paths], check=True)
    assert (tmp_path / "here.json").read_bytes() == (tmp_path / "there.json").read_bytes()


def test_tokenizer_names_bad_arguments():
    with pytest.raises(ValueError, match=r"vocab_size must be at least 259.*got 258"):
        Tokenizer.train(CAPTIONS, vocab_size=258)
    with pytest.raises(ValueError, match="context_length must be at least 3, got 2"):
        Tokenizer.train(CAPTIONS, context_length=2)
    with pytest.raises(ValueError, match="captions is empty"):
        Tokenizer.train([])
    with pytest.raises(TypeError, match="list of texts, got the text 'a flag'"):
        Tokenizer.train(CAPTIONS)("a flag")
