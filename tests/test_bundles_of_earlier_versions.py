"""A bundle keeps giving the rewards that it gave when it was written, whatever came into the manifest since.

`bundles/version-1` was exported by the last commit that wrote format version 1: a random llama of 2 layers, as fp32, int8
and half graphs. `bundles/version-1.json` holds the rewards that the same commit gave for the rows below.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from rewardrt import RewardModel
from rewardrt.checks.verify import verify
from rewardrt.machine import kernels
from rewardrt.machine.processor import read_processor
from rewardrt.machine.providers import import_onnxruntime
from texts import make_conversations, make_texts

BUNDLES = Path(__file__).parent / "bundles"
ROWS = [
    *({"prompt": prompt, "response": answer}
      for prompt, answer in zip(make_texts(12, seed=1), make_texts(12, longest=200, seed=2), strict=True)),
    *({"messages": messages} for messages in make_conversations(12, seed=3)),
    *({"text": text} for text in make_texts(6, longest=120, seed=4)),
]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "int8", "half"])
def test_a_bundle_of_version_1_gives_the_bits_that_it_gave(precision: str) -> None:
    expected = json.loads((BUNDLES / "version-1.json").read_text())
    wanted = np.array(expected["rewards"][precision], dtype=np.float32)
    model = RewardModel.load(BUNDLES / "version-1", provider="cpu", precision=precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of the texts are cut
        found = model.score_many(ROWS)
    assert len(found) == 30 and found.std() > 0.1
    same_machine = (
        list(read_processor().instruction_sets or ()) == expected["instruction_sets"]
        and import_onnxruntime().__version__ == expected["onnxruntime"]
        and (precision != "int8" or kernels.describe() == expected["kernels"])
    )
    if same_machine:  # kernels of other processors and versions add in another order
        assert found.tobytes() == wanted.tobytes()
    else:
        assert np.abs(found - wanted).max() < (1e-4 if precision == "fp32" else 0.05) * wanted.std()
    assert verify(model).passed
