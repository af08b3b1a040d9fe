"""URM: a normal distribution for each attribute; only the means make up the reward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewardrt.bundle.spec import Combine, Head, Layer, Output
from rewardrt.errors import CheckpointError
from rewardrt_export.families.draft import Draft, Family
from rewardrt_export.families.objectives import HELPSTEER, label_names
from rewardrt_export.families.sequence_classification import pad_tap, text_rule

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

# Weights of the five HelpSteer attributes, as published for Nemotron-4; constants in the class's code.
WEIGHTS = (0.3, 0.74, 0.46, 0.47, -0.33)
GATE = ("weights.fc.0", "weights.fc.2", "weights.fc.4")


def _matches(source: Source) -> str | None:
    remote = source.raw.get("auto_map")
    names = [source.architecture, *(map(str, remote.values()) if isinstance(remote, dict) else ())]
    for name in names:
        if "ForSequenceClassificationWithNormal" in name:
            return f"its class is {name}"
    if f"{GATE[0]}.weight" in source.stored:
        return f"it has {GATE[0]}.weight"
    return None


def _describe(source: Source) -> Draft:
    score = source.stored.get("score.weight")
    outputs = score.shape[0] if score is not None else 2 * len(WEIGHTS)
    if outputs % 2:
        raise CheckpointError(f"score.weight: {outputs} outputs; expected a mean and a deviation for each attribute")
    means = tuple(range(0, outputs, 2))  # mean, deviation, mean, deviation, ...
    bias = "score.bias" if "score.bias" in source.stored else None
    values = Head((Layer("score.weight", bias, rows=means),))
    is_gated = f"{GATE[0]}.weight" in source.stored
    gate = Head(tuple(Layer(f"{name}.weight", f"{name}.bias", "none" if name == GATE[-1] else "selu") for name in GATE))
    return Draft(
        heads=(values, gate) if is_gated else (values,),
        text=text_rule(source),
        taps=(pad_tap(source, "before_first_id"),),
        combine=Combine("gate", softmax=False) if is_gated else Combine("dot", WEIGHTS),
        output=Output(labels=label_names({}, len(means), HELPSTEER)),  # config.json's labels are the 2n outputs
        reasons={
            "heads": "the even rows of score are the means, the odd ones deviations",
            "taps": "the class is a copy of transformers' before its pull request 35911",
            "combine": "weights.fc is a learned gate" if is_gated else "no gate in the checkpoint: the fixed weights",
        },
    )


URM = Family(
    name="urm",
    title="URM: means of normal distributions",
    examples=("LxzGordon/URM-LLaMa-3-8B", "LxzGordon/URM-LLaMa-3.1-8B"),
    head="`score`: alternating means and deviations of five attributes; `weights.fc` (3.1) is a learned gate",
    tap="the token before the first pad id",
    eos="the template's own; without a template EOS is appended if missing",
    output="raw; the attributes' means by name",
    maths="r = sum(w * mean), mean = (W h[before pad])[0::2], w = 0.3, 0.74, 0.46, 0.47, -0.33, or the gate's MLP(h)",
    matches=_matches,
    describe=_describe,
)
