"""The tokenizer: what it makes of text, and that training it is deterministic."""

import json
import random
import subprocess
import sys
import time

import pytest
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as BPE

from ito.model.tokenizer import Tokenizer, report_cut

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
        "import json, sys; from ito.model.tokenizer import Tokenizer;"
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


def unbounded(captions, vocab_size):
    """Byte-level BPE as the package `tokenizers` trains it, on whole texts; ids without a limit."""
    bpe = BPE(models.BPE())
    space = normalizers.Replace(Regex(r"\s+"), " ")
    steps = [normalizers.NFKC(), normalizers.Lowercase(), space, normalizers.Strip()]
    bpe.normalizer = normalizers.Sequence(steps)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    special = ["<pad>", "<bos>", "<eot>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eot>", special_tokens=[("<bos>", 1), ("<eot>", 2)]
    )
    return bpe


def test_texts_of_usual_length_are_read_whole(records):
    """The vocabulary, the merges and the ids are those of training without any bound."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdeé日🎌", k=chance.randint(1, 60))) for _ in range(80)]
    noise = [" ".join(chance.choices(words, k=chance.randint(1, 40))) for _ in range(99)]
    emoji = [name for record in records for name in record["captions"]]
    for captions in (emoji, noise):
        tokenizer, whole = Tokenizer.train(captions, 600, 16), unbounded(captions, 600)
        ours, theirs = (json.loads(bpe.to_str()) for bpe in (tokenizer.bpe, whole))
        for part in ("model", "normalizer", "pre_tokenizer", "post_processor", "added_tokens"):
            assert ours[part] == theirs[part], part
        texts = [*captions[:60], " \n ".join(captions)[:30_000], f"{' ' * 9000}{captions[0]}"]
        every = [whole.encode(text).ids for text in texts]
        want = [(ids if len(ids) < 17 else [*ids[:15], 2]) + [0] * (16 - len(ids)) for ids in every]
        assert tokenizer(texts).tolist() == want
        lengths = tokenizer.lengths(texts)
        assert lengths[:60] == [len(ids) for ids in every[:60]]
        assert 16 < lengths[60] <= len(every[60])
        assert lengths[61] == len(every[61])


def test_a_word_of_any_length_costs_no_time():
    """200,000 letters took half a minute to train on, 10 MB as long to encode."""
    began = time.process_time()
    tokenizer = Tokenizer.train([*CAPTIONS, "a" * 200_000], 300, 16)
    texts = ["a" * 10_000_000, "red apple " * 1_000_000, " " * 10_000_000]
    ids = tokenizer(texts)
    lengths = tokenizer.lengths(texts)
    assert time.process_time() - began < 5
    assert ids[:2, -1].tolist() == [tokenizer.eot_id] * 2
    assert ids[2].tolist()[:3] == [tokenizer.bos_id, tokenizer.eot_id, tokenizer.pad_id]
    assert min(lengths[:2]) > 16
    assert lengths[2] == 2


def test_a_long_text_is_split_where_the_bpe_splits_it():
    """Four control characters are white space to Python, and letters to the BPE."""
    tokenizer, whole = Tokenizer.train(CAPTIONS, 300, 16), unbounded(CAPTIONS, 300)
    spaces = [chr(n) for n in range(0x3001) if chr(n).isspace()]
    for space in spaces:
        text = f"{space}red{space}cat " * 20_000
        want = [*whole.encode(text[:1000]).ids[:15], 2]
        assert tokenizer([text])[0].tolist() == want, repr(space)


def test_lengths_are_those_of_whole_texts():
    """Words are counted one by one; spaces of all kinds, marks and ligatures stand around them."""
    tokenizer = Tokenizer.train([*CAPTIONS, "it's a dog's ball, isn't it? 10 km/h"] * 3, 320, 8)
    whole = BPE.from_str(tokenizer.bpe.to_str())
    whole.encode_special_tokens = True
    whole.no_truncation()
    whole.no_padding()
    parts = [" ", "  ", "\t", "\n", "\x1c", "\x85", "\xa0", "\u2003", "\u200b", "\u3000", "\xa8"]
    parts += [
        "\u0301",
        "'s",
        "'",
        "É",
        "Σ",
        "ﷺ",
        "ﬁ",
        "½",
        "a",
        "B",
        "12",
        "<pad>",
        "猫",
        "👩‍🚒",
        "ｆ",
    ]
    chance = random.Random(0)
    texts = ["".join(chance.choices(parts, k=chance.randrange(12))) for _ in range(5000)]
    assert tokenizer.lengths(texts) == [len(whole.encode(text)) for text in texts]
    assert tokenizer.lengths(texts[:3]) == [len(whole.encode(text)) for text in texts[:3]]
    tokenizer.bpe.pre_tokenizer = pre_tokenizers.FixedLength(4)  # pieces with spaces inside
    whole.pre_tokenizer = tokenizer.bpe.pre_tokenizer
    assert tokenizer.lengths(texts) == [len(whole.encode(text)) for text in texts]


def test_a_share_of_lost_tokens_that_would_read_zero_is_not_told():
    tokenizer = Tokenizer.train(["cat"] * 3, 300, 6)
    long = "cat " * 9
    few, many = (report_cut(["cat"] * count + [long], tokenizer) for count in (20_000, 20))
    for told, count in ((few, 20_001), (many, 21)):
        assert told.startswith(f"cut        1 of {count} captions, to their first 6 tokens")
    assert "lost" not in few
    assert "of all tokens are lost" in many
