"""The pieces that the tokens of a text end are together the text, whatever the tokenizer makes of it first."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, Unigram, WordPiece
from tokenizers.normalizers import BertNormalizer, Lowercase, Prepend, Replace, Sequence, StripAccents
from tokenizers.trainers import BpeTrainer, WordPieceTrainer

from rewardrt.bundle.manifest import read_bundle
from rewardrt.text.rendering import RenderedText
from rewardrt.text.tokens import Tokenizer

BUNDLE = Path(__file__).parent / "bundles" / "version-1"
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "Hello, wörld! ﬁne Å 한국 한 漢字 1234",
    "e\u0301 a\u0308 ﬀ ① ｶﾞ \u1112\u1161\u11ab",
]


def byte_level() -> Backend:
    backend = Backend(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(
        CORPUS, BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    return backend


def normalizing(normalizer: object) -> Callable[[], Backend]:
    def build() -> Backend:
        backend = byte_level()
        backend.normalizer = normalizer
        return backend

    return build


def byte_fallback(pre: object, normalizer: object) -> Callable[[], Backend]:
    """Build a tokenizer as SentencePiece's: words begin with U+2581, what is unknown becomes bytes."""

    def build() -> Backend:
        words = [
            "<unk>",
            *(f"<0x{byte:02X}>" for byte in range(256)),
            "▁",
            *"abcdefghijklmnopqrstuvwxyz",
            "▁t",
            "th",
            "▁th",
        ]
        merges = [("▁", "t"), ("t", "h"), ("▁t", "h")]
        backend = Backend(
            BPE(
                {word: index for index, word in enumerate(words)},
                merges,
                unk_token="<unk>",
                byte_fallback=True,
                fuse_unk=True,
            )
        )
        if pre is not None:
            backend.pre_tokenizer = pre
        if normalizer is not None:
            backend.normalizer = normalizer
        return backend

    return build


def word_piece() -> Backend:
    backend = Backend(WordPiece(unk_token="[UNK]"))
    backend.normalizer = BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(
        CORPUS, WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", [("[CLS]", 1), ("[SEP]", 2)]
    )
    return backend


def unigram() -> Backend:
    backend = Backend(
        Unigram([("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "abcdefgho"), ("▁the", -1.0)], 0, False)
    )
    backend.normalizer = Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return backend


def with_added_tokens() -> Backend:
    backend = byte_level()
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken("<pad>", lstrip=True, rstrip=True), AddedToken("é", normalized=True)])
    return backend


TOKENIZERS: dict[str, Callable[[], Backend]] = {
    "byte level": byte_level,
    "NFC": normalizing(normalizers.NFC()),
    "NFD": normalizing(normalizers.NFD()),
    "NFKC": normalizing(normalizers.NFKC()),
    "NFKD and strip accents": normalizing(Sequence([normalizers.NFKD(), StripAccents()])),
    "lowercase": normalizing(Lowercase()),
    "replace": normalizing(Sequence([Replace("a", ""), Replace(Regex("o+"), "xyz"), Replace("é", "e")])),
    "strip": normalizing(normalizers.Strip()),
    "metaspace with prepend": byte_fallback(pre_tokenizers.Metaspace(prepend_scheme="always"), None),
    "metaspace, first word": byte_fallback(pre_tokenizers.Metaspace(prepend_scheme="first"), None),
    "prepend by the normalizer": byte_fallback(None, Sequence([Prepend("▁"), Replace(" ", "▁")])),
    "word pieces": word_piece,
    "unigram": unigram,
    "added tokens": with_added_tokens,
}


@cache
def tokenizer(name: str) -> Tokenizer:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(TOKENIZERS[name]().to_str(), encoding="utf-8")
        return Tokenizer(path, read_bundle(BUNDLE, check_hashes=False).manifest.spec)


TEXTS = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("aeo é\u0301\u1112\u1161\u11ab한ﬁ①ｶﾞ \n\t▁漢\u200d\x00<pad>"),
    )
)


@pytest.mark.parametrize("special_tokens", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=150)
@given(text=TEXTS)
@example(text="\u1112\u1161\u11ab")
@example(text="a\u0301 \u1112\u1161\u11ab b")
@example(text="  two  spaces <pad> ")
@example(text="\x00")
def test_the_pieces_of_a_text_are_together_the_text(name: str, special_tokens: bool, text: str) -> None:
    rendered = RenderedText(text, is_raw=True, special_tokens=special_tokens)
    pieces = tokenizer(name).pieces(rendered)
    assert len(pieces) == len(tokenizer(name).encode_whole(rendered))
    assert "".join(pieces) == (text if pieces else "")


def test_a_syllable_of_three_letters_is_one_piece() -> None:
    backend = json.loads(TOKENIZERS["NFC"]().to_str())
    assert backend["normalizer"] == {"type": "NFC"}
    pieces = tokenizer("NFC").pieces(RenderedText("a \u1112\u1161\u11ab b", is_raw=True))
    assert "".join(pieces) == "a \u1112\u1161\u11ab b"
    assert pieces[0] == "a"
    assert "".join(pieces).endswith(" b") and pieces[-1] in ("b", " b")
    assert any("\u1161\u11ab" in piece for piece in pieces)


def test_white_space_that_no_token_holds_goes_with_the_word_after_it() -> None:
    pieces = tokenizer("word pieces").pieces(RenderedText("the  dog\u0301 ", is_raw=True, special_tokens=True))
    assert (pieces[0], pieces[-1]) == ("", "")  # [CLS] and [SEP] stand for no text
    assert "".join(pieces[1:-1]) == "the  dog\u0301 "
