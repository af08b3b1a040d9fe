"""Every layout in which transformers 4 and 5 keep a tokenizer and a chat template is read, or refused by its file's name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from transformers import AutoModelForSequenceClassification

from checkpoints import CHATML, edit_json, make_tokenizer, write_openrlhf, write_sequence_classification
from checkpoints_encoders import write_encoder
from rewardrt import RewardModel, RewardRTError
from rewardrt.text.rows import parse_row
from rewardrt_export.checkpoint import read_checkpoint
from rewardrt_export.pipeline import export
from rewardrt_export.source.folder import read_source
from rewardrt_export.source.tokenizer_files import find_tokenizer_files
from texts import make_texts

OTHER = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OpenRLHF checkpoint without a chat template; copy it before changing anything."""
    folder = tmp_path_factory.mktemp("layouts") / "rm"
    write_openrlhf(folder, tokenizer=make_tokenizer(template=None))
    return folder


def put(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if name == "tokenizer_config.json":
            edit_json(path, **content)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


NAMED = [{"name": "default", "template": CHATML}, {"name": "rag", "template": OTHER}]
LAID_OUT: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "chat_template.jinja": ({"chat_template.jinja": CHATML}, CHATML, None),
    "tokenizer_config.json": ({"tokenizer_config.json": {"chat_template": CHATML}}, CHATML, None),
    "a list with names": ({"tokenizer_config.json": {"chat_template": NAMED}}, CHATML, "'default', of default, rag"),
    "an object by name": (
        {"tokenizer_config.json": {"chat_template": {"default": CHATML, "rag": OTHER}}},
        CHATML,
        "'default', of default, rag",
    ),
    "a folder of others": (
        {"chat_template.jinja": CHATML, "additional_chat_templates/rag.jinja": OTHER},
        CHATML,
        "'default', of default, rag",
    ),
    "files before the field": (
        {"chat_template.jinja": CHATML, "tokenizer_config.json": {"chat_template": OTHER}},
        CHATML,
        None,
    ),
    "a processor's file alone": (
        {"chat_template.json": {"chat_template": CHATML}},
        CHATML,
        "chat_template.json's, a processor's file, which transformers' tokenizer alone does not read",
    ),
    "a processor's config alone": (
        {"processor_config.json": {"chat_template": CHATML}},
        CHATML,
        "processor_config.json's, a processor's file, which transformers' tokenizer alone does not read",
    ),
    "a processor's file that says the same": (
        {"chat_template.jinja": CHATML, "chat_template.json": {"chat_template": CHATML}},
        CHATML,
        None,
    ),
    "a processor's file that says another": (
        {"chat_template.jinja": CHATML, "chat_template.json": {"chat_template": OTHER}},
        CHATML,
        "the tokenizer's; chat_template.json (a processor's) has another, left aside",
    ),
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_a_chat_template_is_found_in_every_file_that_keeps_one(tmp_path: Path, plain: Path, name: str) -> None:
    files, template, choice = LAID_OUT[name]
    source = read_source(put(shutil.copytree(plain, tmp_path / "rm"), files))
    assert source.chat_template == template
    assert source.choices.get("chat_template") == choice
    if "processor" not in name:
        theirs = source.tokenizer.chat_template
        assert (theirs["default"] if isinstance(theirs, dict) else theirs) == template


def test_a_processors_template_is_what_the_bundle_renders(tmp_path: Path, plain: Path) -> None:
    folder = put(shutil.copytree(plain, tmp_path / "rm"), {"chat_template.json": {"chat_template": CHATML}})
    bundle = export(folder, tmp_path / "bundle")
    assert "chat_template.json" in bundle.manifest.provenance.choices["chat_template"]
    runtime = RewardModel.load(tmp_path / "bundle", provider="cpu")
    text = make_tokenizer().apply_chat_template(HI, tokenize=False).rstrip("\n") + " </s>"
    assert runtime.score(messages=HI) == runtime.score(text=text) != runtime.score(text="hihello there </s>")


def test_of_several_templates_without_a_default_the_option_chooses(tmp_path: Path, plain: Path) -> None:
    named = {"tokenizer_config.json": {"chat_template": {"chat": CHATML, "rag": OTHER}}}
    folder = put(shutil.copytree(plain, tmp_path / "rm"), named)
    with pytest.raises(RewardRTError, match=r"2 chat templates with names \(chat, rag\), and none called 'default'"):
        read_source(folder)
    assert read_source(folder, chat_template="rag").chat_template == OTHER
    (tmp_path / "mine.jinja").write_text("mine")
    source = read_source(folder, chat_template=str(tmp_path / "mine.jinja"))
    assert (source.chat_template, source.choices["chat_template"]) == (
        "mine",
        "the file mine.jinja, as --chat-template says",
    )
    with pytest.raises(
        RewardRTError, match="--chat-template none: expected one of chat, rag, or a file, found neither"
    ):
        read_source(folder, chat_template="none")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a number": ({"tokenizer_config.json": {"chat_template": 5}}, "tokenizer_config.json: chat_template is a int"),
    "a list of numbers": (
        {"tokenizer_config.json": {"chat_template": [1]}},
        "chat_template is a list; expected a text",
    ),
    "a name without a text": (
        {"tokenizer_config.json": {"chat_template": [{"name": "default"}]}},
        "tokenizer_config.json: a chat template is a NoneType; expected a text",
    ),
    "an empty template": ({"chat_template.jinja": "\n"}, "chat_template.jinja: the chat template is empty"),
    "half of a character": (
        {"tokenizer_config.json": {"chat_template": "a\ud800"}},
        "tokenizer_config.json: the chat template has half of a character ('\\ud800', a lone surrogate)",
    ),
    "not UTF-8": ({"chat_template.jinja": b"\xff\xfe"}, "chat_template.jinja: not readable as text"),
    "a template left with git-lfs": ({"chat_template.jinja": POINTER}, "chat_template.jinja: a git-lfs pointer"),
    "a tokenizer left with git-lfs": ({"tokenizer.json": POINTER}, "tokenizer.json: a git-lfs pointer"),
    "a tokenizer of another kind": (
        {"tokenizer.json": {"model": {}}},
        "the tokenizer cannot be loaded from tokenizer.json",
    ),
    "settings cut short": ({"special_tokens_map.json": "{"}, "special_tokens_map.json: not readable as JSON"),
    "a token that is half of a character": (
        {"tokenizer_config.json": {"eos_token": "\ud800"}},
        "the tokenizer cannot be loaded from tokenizer.json, tokenizer_config.json",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_read_of_a_tokenizer_names_its_file_in_one_line(tmp_path: Path, plain: Path, name: str) -> None:
    files, message = WRONG[name]
    folder = put(shutil.copytree(plain, tmp_path / "rm"), files)
    with pytest.raises(RewardRTError) as caught:
        export(folder, tmp_path / "out" / "bundle")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rm"]


def train_sentencepiece(path: Path, kind: str, size: int = 280, **options: Any) -> sentencepiece.SentencePieceProcessor:
    texts = [text for text in make_texts(400, seed=3) if text.isascii() and "\n" not in text and text.strip()]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=size, model_type=kind, minloglevel=9, **options
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_a_sentencepiece_file_alone_gives_sentencepieces_ids(tmp_path: Path) -> None:
    write_sequence_classification(tmp_path / "rm", pad_token_id=None, vocab_size=400)
    for path in tmp_path.glob("rm/*token*"):
        path.unlink()
    (tmp_path / "rm" / "chat_template.jinja").unlink()
    options = {"byte_fallback": True, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "hard_vocab_limit": False}
    theirs = train_sentencepiece(tmp_path / "rm" / "tokenizer.model", "bpe", 380, **options)
    export(tmp_path / "rm", tmp_path / "bundle", max_length=128)
    runtime = RewardModel.load(tmp_path / "bundle", provider="cpu")
    for text in ("the quick brown fox", "jumps over it, lazily"):
        (encoded,) = runtime.answers.encode(list(parse_row({"text": text}).items))
        assert [token for token in encoded.ids.tolist() if token != 1] == theirs.encode(text)


def test_xlm_robertas_sentencepiece_file_alone_gives_its_ids(tmp_path: Path) -> None:
    write_encoder(tmp_path / "rm", "xlm-roberta")
    for path in tmp_path.glob("rm/*token*"):
        path.unlink()
    options = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "hard_vocab_limit": False}
    theirs = train_sentencepiece(tmp_path / "rm" / "sentencepiece.bpe.model", "unigram", **options)
    assert find_tokenizer_files(tmp_path / "rm") == ["sentencepiece.bpe.model"]
    tokenizer = read_checkpoint(tmp_path / "rm").source.tokenizer
    text = "the quick brown fox"
    # fairseq's order: <s> <pad> </s> <unk>, and sentencepiece's ids one further on.
    assert tokenizer(text)["input_ids"] == [0, *(token + 1 for token in theirs.encode(text)), 2]


def only(folder: Path, *names: str) -> None:
    for path in folder.glob("*"):
        if ("token" in path.name or "vocab" in path.name or "merges" in path.name) and path.name not in names:
            path.unlink()


def rename_vocabulary(name: str) -> Callable[[Path], object]:
    def rename(folder: Path) -> None:
        only(folder)
        train_sentencepiece(folder / name, "unigram", hard_vocab_limit=False)

    return rename


MISFITS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another class's file": (
        rename_vocabulary("spiece.model"),
        "cannot be loaded from spiece.model; its class reads other files, or one is missing: add tokenizer.json",
    ),
    "a file with its version": (
        rename_vocabulary("tokenizer.model.v3"),
        "cannot be loaded from tokenizer.model.v3; its class",
    ),
    "no sentencepiece model": (
        lambda f: (only(f), (f / "tokenizer.model").write_bytes(b"\x00nothing of the kind")),
        "tokenizer.model: not a sentencepiece model",
    ),
    "a sentencepiece model left with git-lfs": (
        lambda f: (only(f), (f / "tokenizer.model").write_bytes(POINTER)),
        "tokenizer.model: a git-lfs pointer",
    ),
    "a tiktoken file": (
        lambda f: (only(f), (f / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")),
        "tokenizer.model: a tiktoken vocabulary, which does not say how texts are split",
    ),
    "Qwen's first": (
        lambda f: (only(f), (f / "qwen.tiktoken").write_bytes(b"IQ== 0\nIg== 1\n")),
        "qwen.tiktoken: a vocabulary that only the checkpoint's own code reads",
    ),
    "settings alone": (lambda f: only(f, "tokenizer_config.json"), "no tokenizer; expected tokenizer.json"),
}


def test_a_sentencepiece_file_that_transformers_reads_otherwise_than_sentencepiece_is_refused(tmp_path: Path) -> None:
    """Without bytes for what it does not know, transformers' class leaves such characters out."""
    write_sequence_classification(tmp_path / "rm", pad_token_id=None)
    only(tmp_path / "rm")
    train_sentencepiece(tmp_path / "rm" / "tokenizer.model", "bpe", 270, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    with pytest.raises(RewardRTError, match=r"gives other tokens than sentencepiece \(.* name the tokenizer_class in"):
        read_checkpoint(tmp_path / "rm")


@pytest.mark.parametrize("name", MISFITS)
def test_files_that_the_tokenizers_class_does_not_read_are_named_and_never_passed_over(
    tmp_path: Path, plain: Path, name: str
) -> None:
    change, message = MISFITS[name]
    shutil.copytree(plain, tmp_path / "rm")
    change(tmp_path / "rm")
    with pytest.raises(RewardRTError) as caught:
        read_checkpoint(tmp_path / "rm")
    assert message in str(caught.value)


def test_merges_that_are_missing_are_named(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2Tokenizer

    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, num_labels=1, pad_token_id=3)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "rm")
    GPT2Tokenizer(vocab={"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")]).save_pretrained(
        tmp_path / "rm"
    )
    data = json.loads((tmp_path / "rm" / "tokenizer.json").read_text())["model"]
    (tmp_path / "rm" / "tokenizer.json").unlink()
    (tmp_path / "rm" / "vocab.json").write_text(json.dumps(data["vocab"]))
    with pytest.raises(
        RewardRTError, match=r"cannot be loaded from vocab.json, .*; its class reads other files, or one"
    ):
        read_checkpoint(tmp_path / "rm")
    (tmp_path / "rm" / "merges.txt").write_text("#version: 0.2\na b\n")
    assert read_checkpoint(tmp_path / "rm").source.tokenizer("ab")["input_ids"] == [3]


def test_every_name_that_transformers_gives_a_vocabulary_is_seen(tmp_path: Path) -> None:
    """The names stand in the sources of transformers' tokenizers; a new one shows here."""
    import re

    import transformers

    names = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization*.py"):
        for block in re.findall(r"^VOCAB_FILES_NAMES\s*=\s*\{([^}]*)\}", path.read_text(), re.MULTILINE):
            names |= set(re.findall(r'"\w+":\s*"([^"]+)"', block))
    aside = {"tokenizer_config.json", "byte_maps.json", "emoji.json", "normalizer.json"}
    aside |= {"word_shape.json", "word_pronunciation.json"}  # beside a vocabulary, and none themselves
    assert len(names) > 20
    for name in names:
        (tmp_path / name).write_text("")
    assert set(find_tokenizer_files(tmp_path)) == names - aside
