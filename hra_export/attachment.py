"""Put adapters to work in a model in memory: find each target, carry its chain in front, put everything back."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hra_export import householder
from hra_export.adapter import HraAdapter
from hra_export.errors import MismatchError, NumericalError, UnsupportedModelError
from hra_export.layer import Chain, ReflectedConv2d, ReflectedEmbedding, ReflectedLayer, RotatedRegion, chains_of
from hra_export.layout import runtime_location
from hra_export.names import is_under
from hra_export.strength import Interpolation, take_strength


@dataclass
class Attachment:
    """Adapters at work in a model. `detach` puts everything back as it was.

    Attributes:
        renamed: target → the module path that this model has for it, where they differ.
    """

    model: nn.Module
    layers: Mapping[str, ReflectedLayer | RotatedRegion]
    _replaced: Mapping[str, Tensor] = field(default_factory=dict)
    _trained: Mapping[str, Tensor] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)

    def parameters(self) -> list[nn.Parameter]:
        """The chains' vectors, for an optimizer."""
        return [chain.hra_u for layer in self.layers.values() for chain in chains_of(layer)]

    def vectors(self) -> dict[str, Tensor]:
        """Module path → U (d, r) as it stands, for one attached adapter."""
        return {path: chains_of(layer)[0].hra_u.detach().clone() for path, layer in self.layers.items()}

    def unused(self) -> list[str]:
        """Targets that no forward pass has run since they were attached: their chains had no effect."""
        return [path for path, layer in self.layers.items() if layer.calls == 0]

    @contextmanager
    def disabled(self, *, keep: Collection[str] = ()) -> Iterator[None]:
        """The base model, inside the block.

        Args:
            keep: trained parameters to leave in place: a head that the base has not, for example.
        """
        before = all(layer.enabled for layer in self.layers.values())  # blocks may be nested
        self._set_enabled(False, keep)
        try:
            yield
        finally:
            self._set_enabled(before)

    @torch.no_grad()
    def fold_(self) -> None:
        """Fold every chain into the weight behind it and take the layers out: a plain model, for good.

        Each weight is computed in float64 and rounded once. It is a parameter of its own afterwards: one that was
        tied to another module no longer is. Biases and saved modules stay the adapters'.

        Raises:
            NumericalError: a chain has no direction, or a folded weight is not finite in its dtype.
        """
        for path, layer in self.layers.items():
            if isinstance(layer, ReflectedLayer):
                layer.base_layer.weight = nn.Parameter(_folded(path, layer), requires_grad=False)
                self.model.set_submodule(path, layer.base_layer)
        for module in list(self.model.modules()):
            for name in [name for name in getattr(module, "parametrizations", {}) if _is_rotated(module, name)]:
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)

    def detach(self) -> None:
        """Take the layers out again and restore biases and saved modules."""
        _install_parameters(self.model, self._replaced)
        for path, layer in self.layers.items():
            if isinstance(layer, ReflectedLayer):
                self.model.set_submodule(path, layer.base_layer)
        for module in list(self.model.modules()):
            for name in [name for name in getattr(module, "parametrizations", {}) if _is_rotated(module, name)]:
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)

    def _set_enabled(self, enabled: bool, keep: Collection[str] = ()) -> None:
        for layer in self.layers.values():
            layer.enabled = enabled
        values = self._trained if enabled else {name: old for name, old in self._replaced.items() if name not in keep}
        _install_parameters(self.model, values)


def attach(
    model: nn.Module, *adapters: HraAdapter, strength: float = 1.0, interpolation: Interpolation = "geodesic"
) -> Attachment:
    """Put live HRA layers into `model`, which is changed in place until `Attachment.detach`.

    Several adapters compose in the order given: W R_1 R_2 …. Their biases and saved modules replace the model's, the
    last adapter's winning.

    Args:
        model: any module tree; module paths are matched literally, then through transformers' own renamings.
        adapters: as read by `read_adapter`.
        strength: t of R^t, or of W + t (W R − W); biases and saved modules are the adapters' whatever it is.
        interpolation: which of the two. With R^t the layers carry chains that were made of the adapters'.

    Raises:
        ConversionError: R^t of a chain with determinant −1.
        MismatchError: targets or parameters that the model does not have, or whose shapes disagree; all of them.
            The first axis of a saved module or of a matrix may differ: labels and vocabularies are resized.
        UnsupportedModelError: a grouped convolution, or a layer kind that no chain is defined for.
    """
    chains: dict[str, list[Chain]] = {}
    taken = take_strength(adapters, strength, interpolation)
    for adapter in taken.adapters:
        for path, vectors in adapter.chains.items():
            chains.setdefault(path, []).append(Chain(vectors, orthogonalize=adapter.orthogonalize))
    parameters = {name: value for adapter in taken.adapters for name, value in adapter.parameters.items()}
    saved = {name for adapter in taken.adapters for name in parameters if is_under(name, adapter.modules_to_save)}
    sites = {path: _find_site(model, path) for path in chains}
    findings = [*_chain_findings(model, chains, sites), *_parameter_findings(model, parameters, saved)]
    if findings:
        raise MismatchError(f"the adapter does not fit this {type(model).__name__}", findings=findings)
    state = _state(model)
    replaced = {name: state[name] for name in parameters}
    trained = {name: _in_place_of(replaced[name], value) for name, value in parameters.items()}
    _install_parameters(model, trained)
    layers: dict[str, ReflectedLayer | RotatedRegion] = {}
    for path, site in sites.items():
        assert site is not None
        key = path if isinstance(site, _Stacked) else site
        layers[key] = _install_chain(model, site, chains[path], taken.linear)
    renamed = {path: site for path, site in sites.items() if isinstance(site, str) and site != path}
    return Attachment(model, layers, replaced, trained, renamed)


@dataclass(frozen=True)
class _Stacked:
    """A region of a parameter that holds many layers at once."""

    module: str
    parameter: str
    index: tuple[slice | int, ...]
    input_axis: int


def _find_site(model: nn.Module, path: str) -> "str | _Stacked | None":
    """Where a target lives in this model: a module path, a region of a stacked parameter, or nowhere."""
    if _has_module(model, path):
        return path
    location = runtime_location(model, f"{path}.weight")
    if location is None:
        return None
    module, _, leaf = location.parameter.rpartition(".")
    if location.is_whole and leaf == "weight" and _has_module(model, module):
        return module
    return _Stacked(module, leaf, location.index, location.input_axis)


def _chain_findings(
    model: nn.Module, chains: Mapping[str, list[Chain]], sites: "Mapping[str, str | _Stacked | None]"
) -> Iterator[str]:
    for path, site in sites.items():
        if site is None:
            yield f"{path}: the model has no module of this name"
            continue
        if isinstance(site, str):
            features = _features(path, model.get_submodule(site))
        else:
            region = getattr(model.get_submodule(site.module), site.parameter)[site.index]
            features = int(region.shape[site.input_axis])
        for chain in chains[path]:
            if features not in (None, chain.hra_u.shape[0]):
                yield f"{path}: expected U of shape ({features}, r), got {tuple(chain.hra_u.shape)}"


def _parameter_findings(model: nn.Module, parameters: Mapping[str, Tensor], saved: Collection[str]) -> Iterator[str]:
    known = _state(model)
    for name, value in parameters.items():
        if name not in known:
            yield f"{name}: the model has no parameter of this name"
            continue
        shape, got = tuple(known[name].shape), tuple(value.shape)
        # A saved head may have another number of labels, a saved embedding a longer vocabulary; the rest must agree.
        resizable = len(shape) == len(got) > 0 and (name in saved or len(shape) > 1)
        if shape != got and not (resizable and shape[1:] == got[1:]):
            yield f"{name}: expected shape {shape}, got {got}"


def _features(path: str, module: nn.Module) -> int | None:
    """d of a target, None where the module does not say."""
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            raise UnsupportedModelError(
                f"`{path}` is a grouped convolution (groups={module.groups}), which HRA has not"
            )
        return module.weight[0].numel()
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if hasattr(module, "in_features"):
        return int(module.in_features)  # type: ignore[arg-type]  # nn.Module types every attribute as Tensor | Module
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):  # transformers' GPT-2 layer, (in, out)
        return weight.shape[0]
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise UnsupportedModelError(f"`{path}` is a {type(module).__name__}, for which HRA defines no chain")
    return None


def _install_chain(
    model: nn.Module, site: "str | _Stacked", chains: list[Chain], strength: float
) -> ReflectedLayer | RotatedRegion:
    if isinstance(site, _Stacked):
        region = RotatedRegion(chains, site.index, site.input_axis, strength=strength)
        parametrize.register_parametrization(model.get_submodule(site.module), site.parameter, region, unsafe=True)
        return region
    base = model.get_submodule(site)
    kind = ReflectedLayer
    if isinstance(base, nn.Conv2d):
        kind = ReflectedConv2d
    elif isinstance(base, nn.Embedding):
        kind = ReflectedEmbedding
    layer = kind(base, chains, strength=strength)
    layer.train(base.training)
    model.set_submodule(site, layer)
    return layer


def _folded(path: str, layer: ReflectedLayer) -> Tensor:
    """W R in W's dtype and shape."""
    weight: Tensor = layer.base_layer.weight  # type: ignore[assignment]  # torch types attributes as Tensor | Module
    blocks = [householder.compact_wy(chain.hra_u, orthogonalize=chain.orthogonalize) for chain in chains_of(layer)]
    whole = householder.compose(blocks[0], *blocks[1:])
    is_transposed = type(layer.base_layer).__name__ == "Conv1D"  # (in, out)
    exact = householder.fold(weight.T if is_transposed else weight, whole, strength=layer.strength)
    folded = (exact.T if is_transposed else exact).to(weight.dtype).contiguous()
    if not folded.isfinite().all():
        raise NumericalError(f"`{path}`: the folded weight is not finite in {weight.dtype}")
    return folded


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names: a saved BatchNorm comes with its running statistics."""
    return {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters(remove_duplicate=False))}


def _in_place_of(old: Tensor, value: Tensor) -> Tensor:
    value = value.detach().to(old.device, old.dtype)
    return nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value


def _install_parameters(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Swap parameters by name. The old ones are untouched: a tie to another module is broken, not written through."""
    for name, value in parameters.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        owner = module.base_layer if isinstance(module, ReflectedLayer) else module
        setattr(owner, leaf, value)


def _has_module(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _is_rotated(module: nn.Module, name: str) -> bool:
    return any(isinstance(entry, RotatedRegion) for entry in module.parametrizations[name])  # type: ignore[index]
