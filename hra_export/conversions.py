"""transformers' own weight conversions, followed by name and shape.

transformers loads a checkpoint through a list of renamings and of conversions (stack the experts, split a fused
projection, …). `ModelNames` answers, for one model: what is a name called in it, and which parts of its parameters is
a parameter of an older or a stored layout. `assemble` answers what its parameters are made of in a checkpoint.

Limits: an operation that is not in `_OPERATIONS` is refused by name; quantized checkpoints are not followed.

Source: `transformers/core_model_loading.py`, `convert_and_load_state_dict_in_model` and `revert_weight_conversion`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hra_export.errors import CheckpointError, HraExportError, UnsupportedModelError
from hra_export.pieces import Block, concatenate, deinterleave, split, squeeze, stack, transpose, whole

Blocks = dict[str, list[Block]]


@dataclass(frozen=True)
class ModelNames:
    """The names and shapes of one model, and transformers' rules for names that differ from them.

    Attributes:
        model: a PreTrainedModel, on any device; any other module has no rules.
        shapes: of its parameters and buffers.
        renamings, converters: transformers' `WeightRenaming` and `WeightConverter` objects.
    """

    model: Any
    shapes: dict[str, tuple[int, ...]]
    renamings: list[Any] = field(default_factory=list)
    converters: list[Any] = field(default_factory=list)
    _stored: dict[str, dict[str, Block]] = field(default_factory=dict)

    def rename(self, name: str) -> tuple[str, str | None]:
        """A stored name → the model's name, and the pattern of the conversion that leads there, if any."""
        if not self.renamings and not self.converters and not hasattr(self.model, "base_model_prefix"):
            return name, None
        from transformers.core_model_loading import rename_source_key

        prefix, shapes = getattr(self.model, "base_model_prefix", None), self.shapes
        renamed, pattern = rename_source_key(name, self.renamings, self.converters, prefix, shapes)
        if renamed not in shapes and name in shapes:
            renamed, pattern = rename_source_key(name, [], [], prefix, shapes)
        return renamed, pattern

    def converter(self, pattern: str) -> Any:
        """The conversion a pattern belongs to."""
        return {source: entry for entry in self.converters for source in entry.source_patterns}[pattern]

    def locate(self, parameter: str) -> Block | None:
        """The parts of the model's parameters that a parameter is, whichever layout its name comes from.

        Raises:
            UnsupportedModelError: they are related by an operation that is not known here.
        """
        for name in (parameter, parameter.removesuffix(".weight")):
            if name in self.shapes:
                return whole(name, self.shapes[name])
            renamed, pattern = self.rename(name)
            if renamed not in self.shapes:
                continue
            if pattern is None:
                return whole(renamed, self.shapes[renamed])
            found = self._reverted(renamed, pattern)
            for candidate in self._before_conversion(name):
                if candidate in found:
                    return found[candidate]
        return None

    def _before_conversion(self, name: str) -> tuple[str, ...]:
        from transformers.core_model_loading import apply_renamings

        renamed = apply_renamings(name, self.renamings)
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        return (renamed, f"{prefix}{renamed}", renamed.removeprefix(prefix))

    def _reverted(self, name: str, pattern: str) -> dict[str, Block]:
        """The stored tensors that a conversion reads, as parts of the parameters that it makes."""
        if name not in self._stored:
            self._stored[name] = self._revert(name, pattern)
        return self._stored[name]

    def _revert(self, name: str, pattern: str) -> dict[str, Block]:
        converter = self.converter(pattern)
        try:
            reverse = converter.reverse_transform()
        except (NotImplementedError, ValueError) as error:
            raise UnsupportedModelError(f"`{name}`: transformers cannot undo its conversion: {error}") from error
        inputs: Blocks = {}
        layer = ""
        for target in converter.target_patterns:
            made = name.replace(converter.target_patterns[0], target)
            renamed, source = reverse.rename_source_key(made)
            if made not in self.shapes or source is None:
                return {}
            layer = layer or renamed
            inputs.setdefault(source, []).append(whole(made, self.shapes[made]))
        return convert(reverse, inputs, layer, self.model)


def read_names(model: Any) -> ModelNames:
    """The names of a model, real or on the meta device. The model is not changed."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if hasattr(value, "shape")}
    if not hasattr(model, "base_model_prefix"):
        return ModelNames(model, shapes)
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    return ModelNames(model, shapes, [rule for rule in rules if not isinstance(rule, WeightConverter)], converters)


def assemble(
    names: ModelNames, stored: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Block], dict[str, HraExportError]]:
    """What each parameter of a model is made of when transformers loads these tensors.

    Returns:
        The blocks by parameter, and for those that cannot be followed the reason.
    """
    from transformers.core_model_loading import dot_natural_key

    blocks: dict[str, Block] = {}
    pending: dict[str, tuple[Any, Blocks]] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = names.rename(key)
        if name not in names.shapes:
            continue
        if pattern is None:
            blocks[name] = whole(key, stored[key])
        else:
            inputs = pending.setdefault(name, (names.converter(pattern), {}))[1]
            inputs.setdefault(pattern, []).append(whole(key, stored[key]))
    errors: dict[str, HraExportError] = {}
    for name, (converter, inputs) in pending.items():
        try:
            made = convert(converter, inputs, name, names.model)
            _check_shapes(made, names.shapes)
            blocks.update(made)
        except HraExportError as error:
            targets = converter.target_patterns
            errors.update({name.replace(targets[0], target): error for target in targets})
    return blocks, errors


def _check_shapes(made: Mapping[str, Block], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, block in made.items():
        expected = shapes.get(name)
        if expected is not None and block.shape != expected:
            raise CheckpointError(
                f"`{name}` cannot be put together from the base's tensors: expected shape {expected}, got {block.shape}"
            )


@dataclass(frozen=True)
class _Context:
    """What an operation may look at: the patterns of its conversion, the parameter's name, the model."""

    sources: Sequence[str]
    targets: Sequence[str]
    layer: str
    model: Any


def convert(converter: Any, inputs: Blocks, layer: str, model: Any) -> dict[str, Block]:
    """Run one of transformers' conversions on blocks; full names of what it makes → blocks.

    Raises:
        UnsupportedModelError: it contains an operation that is not known here.
        CheckpointError: the blocks do not fit the operation.
    """
    context = _Context(converter.source_patterns, converter.target_patterns, layer, model)
    blocks = inputs
    for operation in converter.operations:
        follow = _OPERATIONS.get(type(operation).__name__)
        if follow is None:
            raise UnsupportedModelError(f"`{layer}` is stored through {operation!r}, which is not supported yet")
        try:
            blocks = follow(operation, blocks, context)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"`{layer}` cannot be read through {operation!r}: {error}") from error
    full = layer.replace("*.", "0.")
    known = next((key for key in blocks if key in full), None)
    if known is None:
        return {key: block for key, (block,) in blocks.items()}
    before, _, after = full.partition(known)
    return {f"{before}{key}{after}": block for key, (block,) in blocks.items()}


def _only(blocks: Blocks) -> tuple[str, Block]:
    ((key, (block,)),) = blocks.items()
    return key, block


def _concatenate(operation: Any, blocks: Blocks, context: _Context) -> Blocks:
    parts = [block for source in context.sources for block in blocks.get(source, [])]
    return {context.targets[0]: [concatenate(parts, operation.dim)]}


def _chunk(operation: Any, blocks: Blocks, context: _Context) -> Blocks:
    block, targets = _only(blocks)[1], list(context.targets)
    attribute = getattr(operation, "num_shards_attribute", None)
    if attribute is not None:
        count = getattr(context.model.config.get_text_config(), attribute)
        targets = [targets[0].replace("*", str(i)) for i in range(count)]
    size = -(-block.shape[operation.dim] // len(targets))
    sizes = [min(size, block.shape[operation.dim] - i * size) for i in range(len(targets))]
    return {target: [part] for target, part in zip(targets, split(block, operation.dim, sizes), strict=True)}


def _split(operation: Any, blocks: Blocks, context: _Context) -> Blocks:
    block = _only(blocks)[1]
    made = [context.layer.replace(context.targets[0], target) for target in context.targets]
    sizes = [context.model.get_parameter(name).shape[operation.dim] for name in made]
    return {target: [part] for target, part in zip(context.targets, split(block, operation.dim, sizes), strict=True)}


def _merge_list(operation: Any, blocks: Blocks, context: _Context) -> Blocks:
    only = len(blocks) == 1
    return {(context.targets[0] if only else key): [stack(parts, operation.dim)] for key, parts in blocks.items()}


def _split_list(operation: Any, blocks: Blocks, context: _Context) -> Blocks:
    made: Blocks = {}
    for key, (block,) in blocks.items():
        pattern, count = (context.targets[0] if len(blocks) == 1 else key), block.shape[operation.dim]
        for i, part in enumerate(split(block, operation.dim, [1] * count)):
            made[pattern.replace("*", str(i))] = [squeeze(part, operation.dim)]
    return made


def _transpose(operation: Any, blocks: Blocks, context: _Context) -> Blocks:
    key, block = _only(blocks)
    target = context.targets[0] if len(context.targets) == 1 else key
    if operation.check_dims and block.shape == tuple(context.model.get_parameter(context.layer).shape):
        return {target: [block]}
    return {target: [transpose(block, operation.dim0, operation.dim1)]}


def _interleave(operation: Any, blocks: Blocks, context: _Context) -> Blocks:
    return {context.targets[0]: [deinterleave(_only(blocks)[1], operation.dim, inverse=operation.inverse)]}


def _permute_for_rope(operation: Any, blocks: Blocks, context: _Context) -> Blocks:
    config = context.model.config
    if operation.subconfig_key is not None:
        config = getattr(config, operation.subconfig_key, config)
    heads = getattr(config, "num_attention_heads", 1)
    permute = partial(deinterleave, axis=0, inverse=operation.inverse)
    single = len(context.sources) == len(context.targets) == 1
    made: Blocks = {}
    for key, (block,) in blocks.items():
        chosen = operation.permute_layer_names is None or any(name in key for name in operation.permute_layer_names)
        if chosen:
            block = concatenate([permute(head) for head in split(block, 0, [block.shape[0] // heads] * heads)], 0)
        made[context.targets[0] if single else key] = [block]
    return made


def _ernie_fuse(operation: Any, blocks: Blocks, context: _Context) -> Blocks:
    """The first experts are the text model's, the others the vision model's."""
    made: Blocks = {target: [] for target in context.targets}
    for source in context.sources:
        size = -(-len(blocks[source]) // len(made))
        for i, stacks in enumerate(made.values()):
            stacks.append(stack(blocks[source][i * size : (i + 1) * size], operation.stack_dim))
    return {target: [concatenate(stacks, operation.concat_dim)] for target, stacks in made.items()}


def _ernie_split(operation: Any, blocks: Blocks, context: _Context) -> Blocks:
    made: Blocks = {target: [] for target in context.targets}
    for source in context.sources:
        (block,) = blocks[source]
        size = block.shape[operation.concat_dim] // len(made)
        for experts, part in zip(made.values(), split(block, operation.concat_dim, [size] * len(made)), strict=True):
            singles = split(part, operation.stack_dim, [1] * part.shape[operation.stack_dim])
            experts.extend(squeeze(single, operation.stack_dim) for single in singles)
    return {target.replace("*", str(i)): [part] for target, parts in made.items() for i, part in enumerate(parts)}


_OPERATIONS: Mapping[str, Callable[[Any, Blocks, _Context], Blocks]] = {
    "Chunk": _chunk,
    "Concatenate": _concatenate,
    "ErnieFuseAndSplitTextVisionExperts": _ernie_fuse,
    "ErnieSplitAndDecoupleTextVisionExperts": _ernie_split,
    "Interleave": _interleave,
    "MergeModulelist": _merge_list,
    "PermuteForRope": _permute_for_rope,
    "Split": _split,
    "SplitModulelist": _split_list,
    "Transpose": _transpose,
}
