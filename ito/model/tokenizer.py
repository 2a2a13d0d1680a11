"""A byte-level BPE tokenizer, trained on the training captions."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as BPE

from ito.files import read_text

PAD, BOS, EOT = "<pad>", "<bos>", "<eot>"
# Bytes of the longest token. Training cuts longer words into pieces, because its time grows with
# the square of a word's length (one of 100,000 letters: 7 s; in pieces 0.01). It also bounds texts:
# at most so many characters per token of the context are read.
LONGEST_TOKEN = 256
SPACE = re.compile(r"[^\S\x1c-\x1f]+")  # the BPE's \s, which lacks four characters of Python's
NORMALIZER = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=True)


class Tokenizer:
    """Texts to int64 ids (B, context_length): BOS, tokens, EOT, then padding (id 0).

    Texts are lower-cased and normalised (NFKC), and any white space becomes one space. Byte-level:
    no text is out of vocabulary. A text that is too long is cut and keeps its EOT. At most 256
    characters per token are read, so very long texts take no more time.
    """

    pad_id = 0

    def __init__(self, bpe: BPE):
        self.bpe = bpe
        bpe.encode_special_tokens = True  # "<pad>" in a caption is ordinary text
        self.bos_id, self.eot_id = bpe.token_to_id(BOS), bpe.token_to_id(EOT)
        self.vocab_size = bpe.get_vocab_size()
        self.context_length = bpe.truncation["max_length"]
        self.measured: tuple[list[str], list[int]] = ([], [])

    @classmethod
    def train(
        cls, captions: list[str], vocab_size: int = 1300, context_length: int = 16
    ) -> "Tokenizer":
        """Learn merges from `captions`; the same captions give the same tokenizer.

        The vocabulary is smaller than `vocab_size` if fewer pairs of tokens occur twice.

        Raises ValueError if `vocab_size` leaves no room for the 256 bytes and 3 special tokens,
        if `context_length` is below 3, or without captions.
        """
        if vocab_size < 259:
            raise ValueError(f"vocab_size must be at least 259 (bytes, specials), got {vocab_size}")
        if context_length < 3:
            raise ValueError(f"context_length must be at least 3, got {context_length}")
        if not captions:
            raise ValueError("captions is empty: nothing to train a tokenizer on")
        bpe = BPE(models.BPE())
        bpe.normalizer = NORMALIZER
        pieces = pre_tokenizers.FixedLength(LONGEST_TOKEN)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([WORDS, pieces])
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,  # what one caption has alone is left in pieces that others have too
            special_tokens=[PAD, BOS, EOT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        bpe.train_from_iterator((bounded(text, context_length) for text in captions), trainer)
        bpe.pre_tokenizer = WORDS
        bos, eot = bpe.token_to_id(BOS), bpe.token_to_id(EOT)
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A {EOT}", special_tokens=[(BOS, bos), (EOT, eot)]
        )
        bpe.enable_truncation(context_length)
        bpe.enable_padding(pad_id=cls.pad_id, pad_token=PAD, length=context_length)
        return cls(bpe)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.bpe.to_str(pretty=True), encoding="utf-8")  # raises OSError

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        return cls.parse(read_text(Path(path)))

    @classmethod
    def parse(cls, text: str) -> "Tokenizer":
        """The tokenizer that `bpe.to_str()` has written. Raises ValueError if a text would become
        much longer with it, or anything but `context_length` ids below `vocab_size`."""
        require_bounded(json.loads(text))
        with panics_as_errors():
            return cls(BPE.from_str(text))

    def __call__(self, texts: list[str]) -> torch.Tensor:
        if isinstance(texts, str):
            raise TypeError(f"texts must be a list of texts, got the text {texts!r}")
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{number}] must be a text, got {text!r}")
        if not texts:
            return torch.empty(0, self.context_length, dtype=torch.int64)
        read = [bounded(text, self.context_length) for text in texts]
        with panics_as_errors():
            ids = torch.tensor([encoding.ids for encoding in self.bpe.encode_batch_fast(read)])
        return self.swap(ids, self.bpe.padding["pad_id"])

    def lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each text, BOS and EOT included, before it is cut to `context_length`.

        Of a text so long that it is not read to its end, a lower bound. The last answer is kept,
        because a run asks for it twice.
        """
        if texts == self.measured[0]:
            return self.measured[1]
        bpe = BPE.from_str(self.bpe.to_str())
        bpe.encode_special_tokens = True
        bpe.no_truncation()
        bpe.no_padding()
        parts = [[bounded(text, self.context_length)] for text in texts]
        # Our own BPE has no token with a space inside, and each word has a space before it: so each
        # word is counted once. 100,000 captions of ten words take 1 s; encoded, they take 4.
        ours = (str(NORMALIZER), str(WORDS))
        if (str(bpe.normalizer), str(bpe.pre_tokenizer)) == ours:
            parts = [SPACE.split(text) for [text] in parts]
        distinct = list(dict.fromkeys(part for own in parts for part in own))
        with panics_as_errors():
            ends, encoded = len(bpe.encode("")), bpe.encode_batch_fast(distinct)
        count = {part: len(e) - ends for part, e in zip(distinct, encoded, strict=True)}
        found = [ends + sum(map(count.__getitem__, own)) for own in parts]
        self.measured = list(texts), found
        return found

    @classmethod
    def swap(cls, ids: torch.Tensor, pad_id: int) -> torch.Tensor:
        """Exchange the ids `pad_id` and 0, so that padding is 0; twice gives the ids themselves."""
        if pad_id == cls.pad_id:
            return ids
        swapped = torch.where(ids == pad_id, cls.pad_id, ids)
        return torch.where(ids == cls.pad_id, pad_id, swapped)


MOST_GROWTH = 16  # of a text, by replacements


def require_bounded(about: dict) -> None:
    """Raises ValueError if a tokenizer's JSON cuts and pads to different lengths, makes texts more
    than MOST_GROWTH times as long, or adds many tokens to each. Its regular expressions need no
    limit: Oniguruma gives up after ten million steps."""
    length, padding = about["truncation"]["max_length"], about["padding"]
    if about["truncation"]["stride"] or padding["strategy"] != {"Fixed": length}:
        raise ValueError(f"it must cut and pad to the same length, got {length} and {padding}")
    if padding["pad_to_multiple_of"]:
        raise ValueError("padding must not be to a multiple")
    parts = json_objects([about["normalizer"], about["pre_tokenizer"], about["post_processor"]])
    growth = math.prod(
        max(1, len(part.get(key) or "")) for part in parts for key in ("content", "prepend")
    )
    added = sum(len(part.get(key) or "") for part in parts for key in ("single", "ids"))
    if growth > MOST_GROWTH or added > MOST_GROWTH:
        raise ValueError(f"texts grow by a factor of {growth} and by {added} tokens")


def json_objects(value) -> list[dict]:
    """All objects in a JSON value, at any depth."""
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, dict) else []
    return own + [found for part in below for found in json_objects(part)]


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turns a panic of the package tokenizers, which is no Exception, into a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer fails: {error}") from None


def bounded(text: str, tokens: int) -> str:
    """The beginning of a text that its first `tokens` tokens can come from; most texts entirely.

    In longer texts white space is first reduced to single spaces, as the tokenizer does.
    """
    limit = tokens * LONGEST_TOKEN
    if len(text) <= limit:
        return text
    return " ".join(SPACE.split(text, maxsplit=limit)[:limit]).lstrip(" ")[:limit]


def report_cut(captions: list[str], tokenizer: Tokenizer) -> str:
    """How many captions are cut to the context length, and what that loses, in words; "" if none
    is."""
    lengths, limit = tokenizer.lengths(captions), tokenizer.context_length
    cut = sum(length > limit for length in lengths)
    if not cut:
        return ""
    read = all(len(caption) <= limit * LONGEST_TOKEN for caption in captions)
    lost = lost_share(lengths, limit)
    return (
        f"cut        {cut} of {len(captions)} captions, to their first {limit} tokens; "
        f"the longest has {'' if read else 'at least '}{max(lengths)}"
        + f"\n           {lost:.1%} of all tokens are lost"
        * (lost >= LEAST_SHARE)
    )


LEAST_SHARE = 0.0005  # of lost tokens, that is told: a smaller one reads 0.0 %


def lost_share(lengths: list[int], limit: int) -> float:
    """The share of all tokens that is lost when texts of these lengths are cut to `limit`."""
    lost = sum(max(0, length - limit) for length in lengths)
    return lost / max(1, sum(lengths))
