"""The authors' own files, and what other code wrote before PEFT had HRA → an adapter of ours.

Layouts are told apart by the names of their tensors, and what was understood is said in notes. Where the maths is that
of HRA the result is an adapter; the authors' LLaMA code acts after its layers and softens its reflections, which no HRA
file can hold, and gives a source of exact low-rank factors instead.

Limits: what a bare state dict does not say, Gram-Schmidt and ε, the caller must. The hint encoder of the authors'
controllable generation has no counterpart in diffusers: it is named, not converted.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from hra_export import names, publish
from hra_export.adapter import HraAdapter, adapter_files, digest_of
from hra_export.checkpoint import MANIFEST_NAME, Checkpoint
from hra_export.composition import for_every_chain, rounded_to_float32
from hra_export.converted import HRA_FORMAT, ConvertedTarget, ConvertReport, manifest_bytes
from hra_export.errors import AdapterError, ConversionError
from hra_export.low_rank import HraSource, locate
from hra_export.official.beside import Beside, sort_beside, use_base_
from hra_export.official.choice import check_layout, choose_layout
from hra_export.official.layouts import ForeignLayout, chain_vectors
from hra_export.official.ldm_names import diffusers_names
from hra_export.official.settings import UNSAID, Settings, epsilon_of, gram_schmidt_of
from hra_export.official.soft_chain import SoftSource, softness
from hra_export.official.state_file import StateFile, read_state
from hra_export.peft_directory import CONFIG_NAME, SharedFields

# β = 2 (1 − softness): below half a unit in the last place of float32, a softened reflection is one.
FLOAT32_ROUNDING = 2.0**-24
# The layers of a control checkpoint keep their weights one level further down.
FIXED = re.compile(r"(?P<module>.+)\.fixed_linear\.(?P<leaf>weight|bias)")


@dataclass(frozen=True)
class Official:
    """What a file of other code turned out to be.

    Attributes:
        layout: one of `official.layouts.LAYOUTS`.
        adapter: HRA, or a source of ΔW where HRA cannot hold it.
        notes: what was understood, and what was left out, one sentence each.
    """

    layout: str
    adapter: HraAdapter | SoftSource
    notes: tuple[str, ...]


def read(
    source: Path,
    *,
    layout: str | None = None,
    allow_pickle: bool = False,
    base: Checkpoint | None = None,
    settings: Settings = UNSAID,
) -> Official:
    """Read a file of the authors' code, or of code that came after it.

    Args:
        source: a file, or a directory that holds one: a state dict, a checkpoint of Lightning, an adapter directory.
        layout: one of `official.layouts.LAYOUTS`; None to recognize it.
        allow_pickle: read `.bin`, `.pt` and `.ckpt`, with torch's restricted loader.
        base: the model that was adapted. Its layers that are not square tell on which side chains act, and it is
            compared with the weights that some layouts repeat.
        settings: what the file does not say.

    Raises:
        ConversionError: no layout of HRA, several that fit, settings that are missing or contradict the file, a
            pickle that may not be read.
        AdapterError: malformed chains, or tensors that the layout does not have; all findings.
        MismatchError: the chains do not fit the base.
        NumericalError: vectors without a direction; all of them.
        FormatError: a damaged file.
        OutputError: the file system does not let us read.
        UnsupportedModelError: names of Stable Diffusion's own code, and diffusers is not installed.
        ValueError: there is no such layout, or ε is no number of at least 0.
    """
    check_layout(layout)
    state = read_state(source, allow_pickle=allow_pickle)
    chosen, reason = choose_layout(state, layout, base)
    chains = chain_vectors(chosen, state.tensors)
    others = {name: value for name, value in state.tensors.items() if not chosen.pattern.fullmatch(name)}
    if chosen.name == "control":
        chains, others = _renamed(chains, others, base)
    shared = _shared_fields(source, state)
    beside = sort_beside(chosen.name, others, shared.modules_to_save)
    use_base_(chosen.name, beside, chains, base)
    if beside.unknown:
        raise AdapterError(f"`{source}`: not tensors of the layout `{chosen.name}`", findings=beside.unknown)
    ranks = sorted({vectors.shape[1] for vectors in chains.values()})
    _check_rank(source, state, ranks)
    rank = " to ".join(str(rank) for rank in dict.fromkeys((ranks[0], ranks[-1])))
    notes = [f"read as `{chosen.name}`, {chosen.what} ({reason}): {len(chains)} chains of rank {rank}"]
    soft, of_settings = _soft_source(source, state, chosen, chains, beside, shared, settings)
    adapter, of_maths = _hardened(soft)
    notes += [*of_settings, *of_maths, *beside.notes]
    _check(adapter, base)
    if isinstance(adapter, SoftSource):
        adapter = replace(adapter, notes=tuple(notes))
    return Official(chosen.name, adapter, tuple(notes))


def convert(
    source: Path,
    output: Path,
    *,
    base: Checkpoint | None = None,
    layout: str | None = None,
    allow_pickle: bool = False,
    settings: Settings = UNSAID,
    overwrite: bool = False,
) -> ConvertReport:
    """Write what was read as an HRA directory of PEFT, if HRA can hold it.

    Args:
        source: as `read`, like what is not named here.
        output: directory to be made.
        base: as `read`.
        layout: as `read`.
        allow_pickle: as `read`.
        settings: as `read`.
        overwrite: replace an earlier output of ours.

    Returns:
        Of each target ‖R − I‖_F in place of ‖ΔW‖, and what float32 costs of it.

    Raises:
        ConversionError: as `read`, and where the maths is not that of HRA.
        AdapterError: as `read`; so MismatchError, NumericalError, FormatError, UnsupportedModelError and ValueError.
        OutputError: the output exists or cannot be written.
    """
    protected = [source, *([base.root] if base is not None else [])]
    publish.check_output(output, overwrite=overwrite, protected=protected)
    official = read(source, layout=layout, allow_pickle=allow_pickle, base=base, settings=settings)
    if isinstance(official.adapter, SoftSource):
        raise ConversionError(
            f"`{source}` cannot be written as HRA",
            findings=official.notes,
            hint="`--to lora` holds it exactly, and `--to merged` folds it into the base",
        )
    files = adapter_files(official.adapter)
    manifest = _manifest(official, official.adapter)
    size = sum(map(len, files.values())) + len(manifest)
    key = official.adapter.digest
    with publish.stage(output, key=key, size_bytes=size, overwrite=overwrite, protected=protected) as stage:
        for name, data in files.items():
            stage.write_bytes(name, data)
        stage.publish(MANIFEST_NAME, manifest)
    adapter = official.adapter
    targets = tuple(
        ConvertedTarget(module, adapter.rank, norm, error)
        for module, (norm, error) in rounded_to_float32(adapter).items()
    )
    return ConvertReport(HRA_FORMAT, output, size, targets, official.notes, quantity="R − I")


def _renamed(
    chains: Mapping[str, Tensor], others: Mapping[str, Tensor], base: Checkpoint | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Chains and weights of an LDM checkpoint under diffusers' names; what diffusers lacks keeps its own.

    Raises:
        AdapterError: a chain has no place in diffusers' UNet; all of them.
    """
    plain = {FIXED.sub(r"\g<module>.\g<leaf>", name): value for name, value in others.items()}
    owners = {module: names.weight_name(module) for module in chains}
    layers = base.config.get("layers_per_block") if base is not None else None
    mapping = diffusers_names({*plain, *owners.values()}, layers_per_block=layers if isinstance(layers, int) else None)
    homeless = [f"{module}: no module of diffusers' UNet" for module, name in owners.items() if name not in mapping]
    if homeless:
        raise AdapterError(f"{len(homeless)} chains have no place in diffusers", findings=homeless)
    moved = {mapping[name].removesuffix(".weight"): chains[module] for module, name in owners.items()}
    return moved, {mapping.get(name, name): value for name, value in plain.items()}


def _soft_source(
    source: Path,
    state: StateFile,
    layout: ForeignLayout,
    chains: Mapping[str, Tensor],
    beside: Beside,
    shared: SharedFields,
    settings: Settings,
) -> tuple[SoftSource, list[str]]:
    """The chains with the settings of their code, and notes on these; ε is 0 where that code has none."""
    orthogonalize, notes = gram_schmidt_of(layout, state, chains, settings)
    epsilon = 0.0
    if layout.is_soft and not orthogonalize:
        epsilon, more = epsilon_of(state, settings)
        notes = [*notes, *more]
    has_classifier = "classifier" in beside.modules_to_save
    soft = SoftSource(
        chains,
        side="output" if layout.is_output_side else "input",
        epsilon=epsilon,
        orthogonalize=orthogonalize,
        layout=layout.name,
        parameters=beside.parameters,
        bias=shared.bias,
        modules_to_save=beside.modules_to_save,
        base=shared.base,
        task=shared.task or ("SEQ_CLS" if has_classifier else None),
        model_class=shared.model_class,
        model_library=shared.model_library,
        path=source,
    )
    return soft, notes


def _hardened(soft: SoftSource) -> tuple[HraAdapter | SoftSource, list[str]]:
    """The same as an HRA adapter, if that is what it is to the rounding of float32; or notes on why it is not."""
    notes = []
    softest = max(softness(vectors, soft.epsilon) for vectors in soft.chains.values())
    if softest >= FLOAT32_ROUNDING:
        notes.append(f"its reflections are softened: the softest multiplies 2 v vᵀ by {1 - softest:.3g}")
    if soft.side == "output":
        notes.append("its chains act after their layers (W' = Pᵀ W), those of HRA before them (W' = W R)")
    if notes:
        return soft, notes
    ranks = {vectors.shape[1] for vectors in soft.chains.values()}
    if len(ranks) > 1:
        raise AdapterError(f"{soft.label}: the chains of an HRA adapter have one rank, these have {sorted(ranks)}")
    adapter = HraAdapter(
        soft.chains,
        ranks.pop(),
        soft.orthogonalize,
        parameters=soft.parameters,
        bias=soft.bias,
        modules_to_save=soft.modules_to_save,
        base=soft.base,
        task=soft.task,
        model_class=soft.model_class,
        model_library=soft.model_library,
        path=soft.path,
        digest=digest_of({**soft.chains, **soft.parameters}, [soft.orthogonalize]),
    )
    return adapter, []


def _shared_fields(source: Path, state: StateFile) -> SharedFields:
    shared, findings = SharedFields.parse(state.configs.get(CONFIG_NAME, {}))
    if findings:
        raise AdapterError(f"`{source}`: its configuration is not valid", findings=findings)
    return shared


def _check_rank(source: Path, state: StateFile, ranks: Sequence[int]) -> None:
    """That code takes the first r vectors, where its configuration says r: a file with more is another rotation."""
    config = state.configs.get(CONFIG_NAME, {})
    rank = config.get("r")
    if isinstance(rank, int) and list(ranks) != [rank] and not config.get("rank_pattern"):
        raise AdapterError(f"`{source}`: its configuration says r = {rank}, its chains have {list(ranks)} vectors")


def _check(adapter: HraAdapter | SoftSource, base: Checkpoint | None) -> None:
    """Compute every chain once, and find its weight where there is a base."""
    for_every_chain(adapter.chains, adapter.reflector)
    if base is not None:
        locate(adapter if isinstance(adapter, SoftSource) else HraSource([adapter]), base)


def _manifest(official: Official, adapter: HraAdapter) -> bytes:
    content = {"layout": official.layout, "adapters": [adapter.entry()], "notes": list(official.notes)}
    return manifest_bytes("adapter", content)
