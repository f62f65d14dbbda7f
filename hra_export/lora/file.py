"""LoRA adapters in PEFT's layout, read strictly: what they add to each weight, and what was trained beside it.

Ranks and targets are read from the tensors. `alpha_pattern` may hold regular expressions, which are never run: plain
module paths, or their ends, are taken, as PEFT writes them and people do.

Limits: variants whose ΔW is not s B A of the original weight are refused by name: DoRA, biases in B, LoRA on bare
parameters, initializations that change the base. Pickles are refused.

Source: PEFT `tuners/lora/layer.py` (`get_delta_weight`, `scaling`), `utils/save_and_load.py`, `utils/other.py`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from hra_export import names, tensorfile
from hra_export.errors import AdapterError, NumericalError, UnsupportedModelError
from hra_export.lora import layout
from hra_export.peft_directory import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    SharedFields,
    files_digest,
    read_config_bytes,
    reading_adapter,
    weights_path,
)
from hra_export.target_weights import TargetWeight

# PEFT's words for the biases of a LoRA, and HRA's.
BIASES = {theirs: ours for ours, theirs in layout.BIASES.items()}
# Fields that make ΔW something else than s B A of the original weight, and what each one is.
VARIANTS = {
    "alora_invocation_tokens": "aLoRA, which acts on some tokens alone",
    "arrow_config": "Arrow, which routes between adapters",
    "kasa_config": "KaSA",
    "layer_replication": "replicated layers",
    "lora_bias": "biases in B",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA on bare parameters, such as stacked experts",
    "trainable_token_indices": "trained rows of an embedding",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA, which scales the columns of W beside ΔW",
    "use_qalora": "QA-LoRA, which pools the input",
    "velora_config": "VeLoRA",
}
# Initializations that leave the base as it is; the others take their factors out of it.
PLAIN_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
FACTOR = re.compile(r"(?P<module>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")
VARIANT_KEYS = {"lora_magnitude_vector": VARIANTS["use_dora"], "lora_B.bias": VARIANTS["lora_bias"]}
PLAIN_PATH = re.compile(r"\^?[\w.-]+\$?")


@dataclass(frozen=True)
class Factors:
    """One target's ΔW = scaling · B A.

    Attributes:
        left: B (o, r), as stored.
        right: A (r, d), as stored; kernels of a convolution flattened.
        scaling: alpha / r, or alpha / √r.
    """

    left: Tensor
    right: Tensor
    scaling: float


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter; a `DeltaSource` of low_rank.py.

    Attributes:
        targets: module path → its factors, in the file's order.
        parameters: parameter name → its trained value: biases, saved modules.
        bias: in HRA's words, `none`, `hra_only` or `all`.
    """

    path: Path
    targets: Mapping[str, Factors]
    digest: str
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    base: str | None = None
    task: str | None = None
    model_class: str | None = None
    model_library: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Its directory, as messages name it."""
        return f"`{self.path}`"

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its directory."""
        return (self.path,)

    @property
    def modules(self) -> tuple[str, ...]:
        """The targets."""
        return tuple(self.targets)

    def entries(self) -> list[dict[str, object]]:
        """How manifests name it."""
        ranks = sorted({factors.right.shape[0] for factors in self.targets.values()})
        return [
            {
                "name": self.path.name,
                "peft_type": "LORA",
                "digest": self.digest,
                "ranks": ranks,
                "targets": len(self.targets),
            }
        ]

    def misfit(self, weight: TargetWeight) -> str | None:
        """B has a row for each row of W, A a column for each column."""
        factors = self.targets[weight.module]
        got = (factors.left.shape[0], factors.right.shape[1])
        return None if got == weight.shape else f"{weight.module}: expected ΔW of shape {weight.shape}, got {got}"

    def rank(self, module: str) -> int:
        """r; 0 where B or A is zero."""
        factors = self.targets[module]
        return factors.right.shape[0] if factors.scaling and factors.left.any() and factors.right.any() else 0

    def factors(self, weight: TargetWeight) -> tuple[Tensor, Tensor]:
        """B (o, r), scaled, and A (r, d), float64."""
        factors = self.targets[weight.module]
        return factors.left.double() * factors.scaling, factors.right.double()


def read_lora(directory: Path) -> LoraAdapter:
    """Read a LoRA directory of PEFT and check everything that can be checked without the base.

    Raises:
        AdapterError: not an adapter, not LoRA, malformed, or config and tensors disagree; all findings at once.
        UnsupportedModelError: a variant whose ΔW is not that of LoRA; all of them named.
        NumericalError: NaN or Inf in a factor; all of them.
        OutputError: the file system does not let us read it.
    """
    with reading_adapter(directory):
        config_bytes = read_config_bytes(directory)
        config = _Config.parse(directory, tensorfile.strict_json(directory / CONFIG_NAME, config_bytes))
        weights = tensorfile.read_header(weights_path(directory))
        digest = files_digest(config_bytes, weights.path)
    targets, parameters = _read_tensors(directory, weights, config)
    shared = config.shared
    return LoraAdapter(
        path=directory,
        targets=targets,
        digest=digest,
        parameters=parameters,
        bias=BIASES[shared.bias],
        modules_to_save=shared.modules_to_save,
        base=shared.base,
        task=shared.task,
        model_class=shared.model_class,
        model_library=shared.model_library,
    )


@dataclass(frozen=True)
class _Config:
    """The fields of `adapter_config.json` that matter here, checked."""

    rank: int
    ranks: Mapping[str, int]
    alpha: float
    alphas: Mapping[str, float]
    is_root_scaled: bool
    shared: SharedFields

    @classmethod
    def parse(cls, directory: Path, config: object) -> "_Config":
        path = directory / CONFIG_NAME
        if not isinstance(config, dict):
            raise AdapterError(f"`{path}`: expected a JSON object, got {type(config).__name__}")
        if (kind := config.get("peft_type")) != "LORA":
            hint = "`--from hra` takes it" if kind == "HRA" else "PEFT's `convert_to_lora` makes LoRA of some methods"
            raise AdapterError(f"`{directory}` is not a LoRA adapter: its peft_type is {kind!r}", hint=hint)
        _refuse_variants(directory, config)
        alpha, alphas = config.get("lora_alpha", 8), config.get("alpha_pattern") or {}
        rank, ranks = config.get("r", 8), config.get("rank_pattern") or {}
        findings = []
        if not _is_rank(rank):
            findings.append(f"r: expected a positive integer, got {rank!r}")
        if not (isinstance(ranks, dict) and all(map(_is_rank, ranks.values()))):
            findings.append(f"rank_pattern: expected positive integers by module, got {ranks!r}")
        if not _is_number(alpha):
            findings.append(f"lora_alpha: expected a finite number, got {alpha!r}")
        if not (isinstance(alphas, dict) and all(map(_is_number, alphas.values()))):
            findings.append(f"alpha_pattern: expected finite numbers by module, got {alphas!r}")
        shared, more = SharedFields.parse(config, BIASES)
        findings += more
        if findings:
            raise AdapterError(f"`{path}` is not a valid LoRA config", findings=findings)
        return cls(
            rank=rank,
            ranks=ranks,
            alpha=float(alpha),
            alphas={key: float(value) for key, value in alphas.items()},
            is_root_scaled=bool(config.get("use_rslora")),
            shared=shared,
        )

    def rank_of(self, module: str) -> int | None:
        """The rank of this module; None where a pattern is a regular expression, which is not run."""
        if not all(map(PLAIN_PATH.fullmatch, self.ranks)):
            return None
        return next((rank for key, rank in self.ranks.items() if _is_end(key, module)), self.rank)

    def scaling(self, module: str, rank: int) -> float:
        """Alpha of this module, by the first pattern that is its path or the end of it, over r or √r."""
        alpha = next((value for key, value in self.alphas.items() if _is_end(key, module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.is_root_scaled else rank)


def _refuse_variants(directory: Path, config: Mapping[str, object]) -> None:
    findings = [f"{field}: {words}" for field, words in VARIANTS.items() if config.get(field)]
    start = config.get("init_lora_weights", True)
    hint = None
    if start not in PLAIN_INITIALIZATIONS:
        findings.append(f"init_lora_weights: {start!r} may take its factors out of the base, and leave it changed")
        hint = "PEFT's `save_pretrained(…, path_initial_model_for_weight_conversion=…)` makes it plain LoRA"
    alphas = config.get("alpha_pattern")
    patterns = [key for key in alphas if not PLAIN_PATH.fullmatch(key)] if isinstance(alphas, dict) else []
    findings += [f"alpha_pattern: {key!r} is a regular expression, which is not run" for key in patterns]
    if findings:
        raise UnsupportedModelError(f"`{directory}` is no plain LoRA", findings=findings, hint=hint)


def _is_end(key: str, module: str) -> bool:
    """Whether a pattern that is a plain path is this one or the end of it; `^` ties it to the start."""
    plain = key.strip("^$")
    return module == plain or (not key.startswith("^") and module.endswith(f".{plain}"))


def _read_tensors(
    directory: Path, weights: tensorfile.TensorFile, config: _Config
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    pairs: dict[str, dict[str, Tensor]] = {}
    parameters: dict[str, Tensor] = {}
    findings, variants = [], []
    for key, info in weights.tensors.items():
        path = key.removeprefix(names.PEFT_PREFIX)
        factor = FACTOR.fullmatch(path) if path != key and ".base_layer." not in path else None
        parsed = names.parse_adapter_key(key, config.shared.modules_to_save)
        variant = next((words for part, words in VARIANT_KEYS.items() if part in path), None)
        if variant is not None:
            variants.append(f"{key}: {variant}")
        elif factor is None and (parsed is None or parsed.kind == "chain" or "lora_" in path):
            findings.append(f"{key}: not a tensor of a LoRA adapter")
        elif factor is None:
            if parsed is not None and parsed.kind == "parameter":
                parameters[parsed.path] = weights.map(key)
        elif info.dtype not in tensorfile.FLOAT_DTYPES:
            findings.append(f"{key}: expected floats, got {info.dtype}")
        else:
            letter = f"embedding_{factor['embedding']}" if factor["embedding"] else factor["linear"]
            pairs.setdefault(factor["module"], {})[letter] = weights.map(key)
    if variants:
        raise UnsupportedModelError(f"`{directory}` is no plain LoRA", findings=variants)
    targets = {}
    for module, pair in pairs.items():
        left, right = _matrices(pair)
        if left is None or right is None or left.shape[1] != right.shape[0] or not right.shape[0]:
            shapes = ", ".join(f"{letter} {tuple(value.shape)}" for letter, value in pair.items())
            findings.append(f"{module}: expected B (o, r) and A (r, d), got {shapes}")
        elif config.rank_of(module) not in (None, right.shape[0]):
            findings.append(f"{module}: the config says r = {config.rank_of(module)}, got {right.shape[0]}")
        else:
            targets[module] = Factors(left, right, config.scaling(module, right.shape[0]))
    if not pairs and not findings:
        findings.append(f"{WEIGHTS_NAME} holds no LoRA factor")
    if findings:
        raise AdapterError(f"adapter `{directory}`: {len(findings)} tensors are wrong", findings=findings)
    _check_finite(directory, targets)
    return targets, parameters


def _matrices(pair: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """B (o, r) and A (r, d). An embedding looks rows of Aᵀ up: its ΔW is Aᵀ Bᵀ, and the factors change places."""
    if set(pair) == {"embedding_A", "embedding_B"}:
        a, b = pair["embedding_A"], pair["embedding_B"]
        return (a.T, b.T) if a.ndim == b.ndim == 2 else (None, None)
    if set(pair) != {"A", "B"} or pair["A"].ndim != pair["B"].ndim or pair["A"].ndim not in (2, 4):
        return None, None
    if any(size != 1 for size in pair["B"].shape[2:]):
        return None, None
    return pair["B"].flatten(1), pair["A"].flatten(1)


def _check_finite(directory: Path, targets: Mapping[str, Factors]) -> None:
    wild = [
        f"{module}: NaN or Inf"
        for module, factors in targets.items()
        if not ((factors.left.double() * factors.scaling).isfinite().all() and factors.right.isfinite().all())
    ]
    if wild:
        raise NumericalError(
            f"adapter `{directory}`: the factors of {len(wild)} targets are not finite",
            findings=wild,
            hint="training diverged, or the file is damaged; go back to an earlier checkpoint",
        )


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
