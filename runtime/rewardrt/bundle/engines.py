"""The TensorRT engines of a bundle: what they are built for, and whether one is cached for this machine."""

from __future__ import annotations

from rewardrt.bundle.manifest import Bundle, Variant
from rewardrt.errors import ProviderError
from rewardrt.graph.engine import EngineRequest
from rewardrt.graph.shapes import Profile
from rewardrt.machine.engine_cache import Entry, holds
from rewardrt.machine.providers import Provider, ProviderChoice, why_not

TENSORRT: Provider = "tensorrt"


def engine_request(bundle: Bundle, variant: Variant) -> EngineRequest:
    """Return what a graph's engine is built for; its identity comes from the hashes in the manifest."""
    spec = bundle.manifest.spec
    hashes = {record.path: record.sha256 for record in bundle.manifest.files}
    identity = "+".join(hashes[name] for name in (variant.graph, *variant.data))
    taps = len(spec.taps) if spec.has_positions else 0
    return EngineRequest(identity, Profile.of(spec.max_length), taps, bool(spec.text.type_ids))


def check_whole(bundle: Bundle, variant: Variant, provider: Provider) -> None:
    """Raise ProviderError if a graph that was not made for TensorRT is to run there: it would run in part at best."""
    if provider == TENSORRT and TENSORRT not in variant.made_for:
        raise ProviderError(
            f"{bundle.name}: TensorRT does not take the {variant.precision} graph whole; export with "
            "`--precision tensorrt`, or score with provider 'cuda'"
        )


def warm_choice(bundle: Bundle, choice: ProviderChoice) -> ProviderChoice:
    """Return the provider choice, with "auto" replaced by TensorRT if an engine of this bundle is cached here."""
    if choice != "auto":
        return choice
    made = [variant for variant in bundle.manifest.variants if TENSORRT in variant.made_for]
    kept = [request for request in (engine_request(bundle, each) for each in made) if holds(request.identity)]
    # Test the GPU only if an engine exists.
    if not kept or why_not(TENSORRT) is not None:
        return choice
    return TENSORRT if any(Entry.of(request.key()).is_there() for request in kept) else choice
