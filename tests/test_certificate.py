"""What a certificate must not overlook: each input of a reward against something that was not made by the same code.

Right values are transformers' classes on the ids of the checkpoint's own tokenizer.json.
"""

from __future__ import annotations

import dataclasses
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from checkpoints import BASE, GQA, edit_json, make_tokenizer, randomize, write_sequence_classification
from checkpoints_encoders import make_encoder_tokenizer, write_encoder
from rewardrt import RewardModel
from rewardrt.bundle.manifest import read_bundle
from rewardrt.bundle.spec import Head, Layer, Tap
from rewardrt.checks.verify import GoldenText
from rewardrt.cli.app import app
from rewardrt.errors import CertificateError, RewardRTError, RowError
from rewardrt_export import pipeline
from rewardrt_export.certificate.certify import GoldenSet, Split
from rewardrt_export.families import FAMILIES, sequence_classification
from rewardrt_export.pipeline import export
from rewardrt_export.source.folder import read_source
from rewardrt_export.tracing import attention_masks, trace

TEXTS = [" leading", "<s>[INST] Hi [/INST]", "two  spaces and a tab\t", "e\u0301 ＡＢＣ 12345", "plain words", "a\nb"]


def sentencepiece_tokenizer(words: list[str]) -> Tokenizer:
    """Llama 2's layout: a space becomes ▁, one comes first, and what is not known is bytes."""
    pieces = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁"]
    letters = sorted({letter for word in words for letter in word})
    backend = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate([*pieces, *letters, *(f"▁{letter}" for letter in letters)])},
            [("▁", "▁"), *(("▁", letter) for letter in letters)],
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>", "<pad>")])
    return backend


def digits_tokenizer() -> Tokenizer:
    """Byte-level BPE whose digits stand alone, after NFKC: what GPT-2's and Qwen's own layouts do not say."""
    backend = Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    return backend


def write_with_tokenizer(folder: Path, backend: Tokenizer, tokenizer_class: str, **fields: Any) -> torch.nn.Module:
    """Write a llama that scores, with a tokenizer.json of its own and the class that tokenizer_config.json names."""
    model = write_sequence_classification(folder, vocab_size=backend.get_vocab_size())
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"unk_token": "<unk>", "model_max_length": 512} | fields)
    )
    return model


def reward_of_ids(model: Any, ids: list[int]) -> float:
    with torch.inference_mode():
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


@pytest.mark.parametrize(
    "name", ["LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"]
)
def test_the_ids_are_those_of_the_saved_tokenizer_json(name: str, tmp_path: Path) -> None:
    pieces = name in ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
    backend = (
        sentencepiece_tokenizer(["".join(TEXTS), "abcdefghijklmnopqrstuvwxyz[]"]) if pieces else digits_tokenizer()
    )
    model = write_with_tokenizer(tmp_path / "rm", backend, name)
    lines: list[str] = []
    bundle = export(tmp_path / "rm", tmp_path / "bundle", progress=lambda step: lines.append(str(step)))
    own = Tokenizer.from_file(str(tmp_path / "rm" / "tokenizer.json"))
    ids = [own.encode(text, add_special_tokens=False).ids for text in TEXTS]
    rebuilt = AutoTokenizer.from_pretrained(tmp_path / "rm")
    differs = any(
        rebuilt(text, add_special_tokens=False)["input_ids"] != found for text, found in zip(TEXTS, ids, strict=True)
    )
    found = RewardModel.load(bundle.path, provider="cpu").score_many([{"text": text} for text in TEXTS])
    expected = np.array([reward_of_ids(model, text) for text in ids])
    assert np.abs(found - expected).max() < 1e-4 * expected.std()
    # The choice is told, kept and shown where there was one.
    choice = bundle.manifest.provenance.choices.get("tokenizer", "")
    assert bool(choice) == differs
    assert [line for line in lines if line.startswith("tokenizer: ")] == ([f"tokenizer: {choice}"] if differs else [])
    if name != "GemmaTokenizer":
        assert differs and "--tokenizer transformers" in choice
        shown = CliRunner().invoke(app, ["inspect", str(bundle.path)]).output
        assert f"tokenizer: {choice}" in shown


def test_what_transformers_rebuilds_is_the_other_choice(tmp_path: Path) -> None:
    write_with_tokenizer(tmp_path / "rm", sentencepiece_tokenizer(["".join(TEXTS)]), "LlamaTokenizer")
    bundle = export(tmp_path / "rm", tmp_path / "bundle", tokenizer="transformers")
    rebuilt = AutoTokenizer.from_pretrained(tmp_path / "rm")
    saved = Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
    wanted = [rebuilt(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert [saved.encode(text, add_special_tokens=False).ids for text in TEXTS] == wanted
    assert bundle.manifest.provenance.choices["tokenizer"].startswith("as transformers ")


def test_a_bundle_of_the_rebuilt_tokenizer_fails_its_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_with_tokenizer(tmp_path / "rm", sentencepiece_tokenizer(["".join(TEXTS)]), "LlamaTokenizer")

    def write_rebuilt(checkpoint: Any, folder: Path) -> None:
        AutoTokenizer.from_pretrained(tmp_path / "rm").backend_tokenizer.save(str(folder / "tokenizer.json"))

    monkeypatch.setattr(pipeline, "_write_text_files", write_rebuilt)
    with pytest.raises(CertificateError, match="the bundle's tokenizer gives other ids than the checkpoint's"):
        export(tmp_path / "rm", tmp_path / "bundle")


def test_special_tokens_that_are_split_in_training_are_split_in_the_bundle(tmp_path: Path) -> None:
    model = write_encoder(tmp_path / "rm", "bert")
    edit_json(tmp_path / "rm" / "tokenizer_config.json", split_special_tokens=True)
    bundle = export(tmp_path / "rm", tmp_path / "bundle")
    runtime, tokenizer = RewardModel.load(bundle.path, provider="cpu"), AutoTokenizer.from_pretrained(tmp_path / "rm")
    pairs = [("what is [SEP] here", "the fox [SEP] jumps"), ("hi", "[CLS][PAD] fox"), ("the", "fox")]
    for question, answer in pairs:
        inputs = tokenizer(question, answer, return_tensors="pt")
        with torch.inference_mode():
            expected = float(model(**inputs).logits[0, 0])
        assert runtime.score(prompt=question, response=answer) == pytest.approx(expected, abs=1e-5)
    whole = make_encoder_tokenizer("bert")(*pairs[0])["input_ids"]
    assert len(whole) < len(tokenizer(*pairs[0])["input_ids"])  # the option does something here


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta"])
def test_positions_are_counted_over_the_ids_that_are_not_padding_as_in_torch(name: str, tmp_path: Path) -> None:
    model = write_encoder(tmp_path / "rm", name)
    bundle = export(tmp_path / "rm", tmp_path / "bundle")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    pairs = [("the fox", "jumps <pad> over"), ("a <pad><pad> b", "c"), ("the fox", "jumps over"), ("<pad>", "<pad>")]
    expected = []
    for pair in pairs:
        inputs = tokenizer(*pair, return_tensors="pt")
        with torch.inference_mode():
            expected.append(float(model(**inputs).logits[0, 0]))
    rows = [{"prompt": question, "response": answer} for question, answer in pairs]
    for padding in (False, True):
        found = RewardModel.load(bundle.path, provider="cpu", padding=padding).score_many(rows)
        assert np.abs(found - np.array(expected)).max() < 1e-5


@pytest.mark.traces
def test_positions_by_place_alone_fail_the_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_encoder(tmp_path / "rm", "roberta")

    class ByPlace(trace.WholeTextGraph):
        def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor, **others: Any) -> tuple[torch.Tensor, ...]:
            place = torch.arange(input_ids.shape[1]).unsqueeze(0).expand_as(input_ids) + 2
            original = self.backbone.forward
            self.backbone.forward = lambda **inputs: original(**inputs, position_ids=place)
            try:
                return super().forward(input_ids, lengths, **others)
            finally:
                self.backbone.forward = original

    monkeypatch.setattr(trace, "WholeTextGraph", ByPlace)
    with pytest.raises(CertificateError, match="failed its certificate"):
        export(tmp_path / "rm", tmp_path / "bundle")


WINDOWED: dict[str, dict[str, Any]] = {
    "phimoe": GQA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 600},
    "qwen2_moe": GQA
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "use_sliding_window": True,
        "sliding_window": 600,
        "max_window_layers": 1,
    },
}


def write_windowed(folder: Path, name: str) -> None:
    """Write a classifier whose class puts a window of 600 tokens into its mask, and does not tell its attention."""
    config = AutoConfig.for_model(name, **BASE | WINDOWED[name] | {"max_position_embeddings": 2048, "num_labels": 1})
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomize(model)
    model.eval().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_that_only_the_mask_knows_is_in_the_graph(name: str, tmp_path: Path) -> None:
    write_windowed(tmp_path / "rm", name)
    bundle = export(tmp_path / "rm", tmp_path / "bundle")
    longest = bundle.manifest.certificates[0].longest
    assert longest is not None
    assert longest > 600


@pytest.mark.traces
def test_without_it_the_golden_texts_are_long_enough_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_windowed(tmp_path / "rm", "phimoe")
    none = attention_masks.Reach()
    monkeypatch.setattr(attention_masks.WatchedMasks, "reach", lambda *args, **options: none)
    with pytest.raises(CertificateError, match="failed its certificate"):
        export(tmp_path / "rm", tmp_path / "bundle")


def test_golden_texts_go_past_every_window_and_the_manifest_says_how_far(tmp_path: Path) -> None:
    write_sequence_classification(tmp_path / "rm", "mistral", sliding_window=700, max_position_embeddings=1024)
    bundle = export(tmp_path / "rm", tmp_path / "bundle")
    (certificate,) = bundle.manifest.certificates
    assert certificate.longest == 724
    assert certificate.beyond == ()


def test_a_window_that_no_golden_text_can_pass_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sequence_classification(tmp_path / "rm", "mistral", sliding_window=700, max_position_embeddings=1024)
    monkeypatch.setattr("rewardrt_export.certificate.encode.LONGEST_PROBE", 600)
    bundle = export(tmp_path / "rm", tmp_path / "bundle")
    (certificate,) = bundle.manifest.certificates
    assert certificate.longest == 512
    assert certificate.beyond == ("sliding_window 700",)
    shown = CliRunner().invoke(app, ["inspect", str(bundle.path)]).output
    assert "texts of up to 512 tokens; not compared beyond sliding_window 700" in shown


def test_the_probes_hold_what_ordinary_texts_do_not(tmp_path: Path) -> None:
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for d in documents or [] %}{{ d.text }}{% endfor %}"
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if terse %}Be terse.{% endif %}"
    )
    write_sequence_classification(tmp_path / "rm", tokenizer=make_tokenizer(template=template))
    bundle = export(tmp_path / "rm", tmp_path / "bundle")
    rows = [json.loads(line)["row"] for line in (bundle.path / "golden.jsonl").read_text().splitlines()]
    answers = [str(row.get("response", row.get("text", ""))) for row in rows]
    for token in ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"):
        assert any(token in answer for answer in answers), token
    assert any(answer.startswith(" ") and answer.endswith(" ") for answer in answers)
    for form in ("e\u0301", "\u1112\u1161\u11ab", "ＡＢＣ", "\u200b"):
        assert any(form in answer for answer in answers)
    for field in ("tools", "documents", "chat_template_kwargs"):
        assert any(field in row for row in rows), field


def test_tokens_without_a_row_in_the_embedding_are_named_and_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<extra>", special=True), AddedToken("<more>", special=True)])
    write_sequence_classification(tmp_path / "rm", tokenizer=tokenizer)  # 300 rows, 302 tokens
    lines: list[str] = []
    bundle = export(tmp_path / "rm", tmp_path / "bundle", progress=lambda step: lines.append(str(step)))
    assert (
        "vocabulary: 2 tokens of the tokenizer have no row in the embedding of 300: '<extra>' (id 300) and others; "
        "a text that holds one is refused"
    ) in lines
    assert read_bundle(bundle.path).manifest.spec.vocabulary == 300
    model = RewardModel.load(bundle.path, provider="cpu")
    good, bad = model.score_rows([{"text": "fine"}, {"text": "with <more>"}])
    assert not isinstance(good, Exception)
    assert isinstance(bad, RowError) and "'<more>' (token id 301), and the model knows the ids 0 to 299" in str(bad)
    with pytest.raises(RowError, match="token id 300: expected 0 to 299"):
        model.answers.tokenizer.encode_ids([1, 300])


def test_tokens_that_only_the_configuration_adds_are_in_the_bundle(tmp_path: Path) -> None:
    write_sequence_classification(tmp_path / "rm", vocab_size=304)
    edit_json(
        tmp_path / "rm" / "tokenizer_config.json",
        added_tokens_decoder={
            "300": {
                "content": "<judge>",
                "special": True,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
                "normalized": False,
            }
        },
    )
    source = read_source(tmp_path / "rm")
    assert source.trained is not None and source.trained.backend.encode("a<judge>").ids[-1] == 300


@pytest.mark.parametrize("wrong", ["pooling", "head"])
def test_a_family_that_is_not_what_the_class_computes_fails(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sequence_classification(tmp_path / "rm")
    if wrong == "pooling":  # the pad id is looked for in config.json; let the family read another one
        monkeypatch.setattr(
            "rewardrt_export.families.sequence_classification.pad_tap", lambda source: Tap("last", "last_not_id", (5,))
        )
    else:
        real = sequence_classification._describe
        odd = Head((Layer("score.weight", activation="tanh"),))
        family = dataclasses.replace(
            sequence_classification.SEQUENCE_CLASSIFICATION,
            describe=lambda source: dataclasses.replace(real(source), heads=(odd,)),
        )
        monkeypatch.setitem(FAMILIES, "sequence-classification", family)
    with pytest.raises(CertificateError, match=r"^LlamaForSequenceClassification of transformers gives "):
        export(tmp_path / "rm", tmp_path / "bundle")


@pytest.mark.parametrize("option", ["golden", "calibrate"])
def test_golden_and_calibration_texts_in_a_format_that_is_not_read_are_named(option: str, tmp_path: Path) -> None:
    write_sequence_classification(tmp_path / "rm")
    rows = "\n".join(json.dumps({"prompt": "Hi", "response": str(number)}) for number in range(20))
    (tmp_path / "rows.jsonl").write_bytes(lzma.compress(rows.encode()))
    precisions = ("fp32",) if option == "golden" else ("int8",)
    with pytest.raises(RewardRTError, match=r"rows\.jsonl: .*found xz"):
        export(tmp_path / "rm", tmp_path / "bundle", precisions=precisions, **{option: tmp_path / "rows.jsonl"})
    assert not (tmp_path / "bundle").exists()


def test_what_calibration_sees_and_what_is_measured_are_one_split() -> None:
    for count in range(20):
        split = Split.of(count, calibrated=True)
        assert sorted([*split.seen, *split.unseen]) == list(range(count))
        assert len(split.seen) - len(split.unseen) in (0, 1)
        assert list(Split.of(count, calibrated=False).unseen) == list(range(count))
    texts = tuple(GoldenText({"text": str(place)}, None, (1,), None, 0, (0,), (float(place),)) for place in range(5))
    golden = GoldenSet(texts[:4], texts[4:], Split.of(4, calibrated=True))
    assert [text.rewards[0] for text in golden.unseen] == [1, 3]
    assert golden.every == texts
