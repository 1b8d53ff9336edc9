"""A decoder cut in depth: some of its layers, as a model that its saved configuration describes.

The cut model is not the old one with fewer modules: it is built anew from the configuration that will be saved with it,
and given the weights of the layers that are kept. So what is trained is what is exported. Whether it also is what was
asked for is seen on a few tokens: its logits must be those of the whole model where the other layers only pass their
input on. Architectures whose layers depend on their place, in ways that no configuration can say, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from srd_lightning.errors import ModelError, SettingError, in_one_line, lacks_memory
from srd_lightning.models.quantised import method_of

try:
    from transformers.initialization import no_init_weights
except ImportError:  # before transformers 5
    from transformers.modeling_utils import no_init_weights

LAYER_NUMBERS = ("mlp_only_layers", "moe_layers", "attn_layer_indices")
"""Settings that list layers by their numbers."""
FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers", "num_hash_layers")
"""Settings that say how many layers, from the first, are of one kind."""
TOLERANCE = 1e-4
"""Of the logits, relative to the largest: the same sums are formed, in half precision too."""


def check_layers(config: Any, layers: Sequence[int]) -> None:
    """Check that numbers of layers fit a model.

    Args:
        config: Of the model.
        layers: Numbers of the layers to keep.

    Raises:
        SettingError: A number is out of range, repeated or out of order.
        ModelError: It is an encoder-decoder, quantised, or does not say how many layers it has.
    """
    if (method := method_of(config)) is not None:
        raise ModelError(
            f"keep_layers cannot be used with weights that are quantised ({method}); name the model that it was made of"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"keep_layers cuts decoders, but {type(config).__name__} is of an encoder-decoder, which has two stacks of "
            "layers; leave it out, and choose a smaller student"
        )
    depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise ModelError(f"keep_layers cannot be used with {type(config).__name__}, which has no num_hidden_layers")
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= depth:
        raise SettingError(f"keep_layers must be rising numbers from 0 to {depth - 1}, but is {list(layers)}")


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Cut a decoder in depth.

    Args:
        model: A model whose decoder layers stand in one ``ModuleList``.
        layers: Numbers of the layers to keep, rising, from 0. Which ones matters more than how many: evenly spaced
            layers wreck a model that survives the loss of as many unimportant ones.

    Returns:
        The cut model, in eval mode. It shares the weights that it keeps with the whole one.

    Raises:
        SettingError: A number is out of range, repeated or out of order.
        ModelError: The architecture cannot be cut: its layers stand in no list, or are not the same elsewhere.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 9}
        >>> whole = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4))
        >>> keep_layers(whole, [0, 3]).config.num_hidden_layers
        2
    """
    check_layers(model.config, layers)
    depth = cast(Any, model.config).get_text_config(decoder=True).num_hidden_layers
    name, stack = _find_layers(model, depth)
    try:
        with _without(stack, set(range(depth)) - set(layers)):
            expected = _logits(model)
        cut = _build(model, name, depth, layers)
        found = _logits(cut)
    except Exception as error:
        if lacks_memory(error):
            raise
        reason = f"{type(error).__name__}: {in_one_line(error)[:300]}"
        raise ModelError(f"keep_layers {list(layers)} cannot be used with {_name(model)} ({reason})") from error
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
    if not difference <= TOLERANCE:
        raise ModelError(
            f"keep_layers {list(layers)} cannot be used with {_name(model)}: its layers depend on their place, so the "
            "cut, saved and loaded again, would be another model; keep all layers, or choose another student"
        )
    return cut


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__


def _find_layers(model: PreTrainedModel, depth: int) -> tuple[str, nn.ModuleList]:
    """Return the outermost list of so many modules, and its name."""
    found = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    found = [(name, part) for name, part in found if len(part) == depth]
    outer = [(name, part) for name, part in found if not any(name.startswith(f"{other}.") for other, _ in found)]
    if len(outer) != 1:
        raise ModelError(f"keep_layers needs one list of {depth} layers in {_name(model)}, found {len(outer)}")
    return outer[0]


@contextmanager
def _without(stack: nn.ModuleList, dropped: set[int]) -> Iterator[None]:
    """Let some layers pass on their input for a while."""

    def pass_on(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return states if isinstance(output, Tensor) else (states, *output[1:])

    with ExitStack() as hooks:
        for number in dropped:
            handle = stack[number].register_forward_hook(pass_on, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    tokens = torch.arange(1, 5, device=model.device)[None]
    return cast(Tensor, cast(Any, model).eval()(input_ids=tokens, use_cache=False).logits.float())


def _build(model: PreTrainedModel, name: str, depth: int, layers: Sequence[int]) -> PreTrainedModel:
    config = _cut_config(model.config, depth, layers)
    # no_init_weights: they come from the whole model; the random state stays as it is.
    with no_init_weights(), torch.device(model.device):
        cut: PreTrainedModel = type(model)._from_config(
            config, dtype=model.dtype, attn_implementation=getattr(model.config, "_attn_implementation", None)
        )
    kept = _kept(cast(Any, model).state_dict(keep_vars=True), name, layers)
    cut.load_state_dict(kept, assign=True)  # the same tensors, tied where they were
    cut.tie_weights()
    cut.generation_config = model.generation_config
    return cut.eval()


def _cut_config(config: Any, depth: int, layers: Sequence[int]) -> Any:
    """Return the configuration of the cut, as if read from its file: what follows from other settings does so anew."""
    text, settings = config.get_text_config(decoder=True), config.to_dict()
    if text is config:
        return type(config).from_dict(_cut_settings(settings, config.attribute_map, depth, layers))
    key = next(key for key in config.sub_configs if getattr(config, key) is text)
    settings[key] = _cut_settings(settings[key], text.attribute_map, depth, layers)
    return type(config).from_dict(settings)


def _cut_settings(
    settings: Mapping[str, Any], attribute_map: Mapping[str, str], depth: int, layers: Sequence[int]
) -> dict[str, Any]:
    """Return settings of which each says of the kept layers what it said of them in the whole model."""
    cut = {name: _of_layers(name, value, depth, layers) for name, value in settings.items()}
    if "decoder_sparse_step" in settings:  # every so many layers is sparse, but for those that mlp_only_layers lists
        step, dense = settings["decoder_sparse_step"], settings.get("mlp_only_layers") or []
        places = [place for place, layer in enumerate(layers) if layer in dense or (layer + 1) % step]
        cut |= {"decoder_sparse_step": 1, "mlp_only_layers": places}
    if "attention_types" in settings:  # GPT-Neo's, from which attention_layers follow
        cut["attention_types"] = [[[kind], 1] for kind in cut["attention_layers"]]
    return cut | {attribute_map.get("num_hidden_layers", "num_hidden_layers"): len(layers)}


def _of_layers(name: str, value: Any, depth: int, layers: Sequence[int]) -> Any:
    if name in LAYER_NUMBERS and isinstance(value, list):
        return [place for place, layer in enumerate(layers) if layer in value]
    if name in FIRST_LAYERS and isinstance(value, int):
        return sum(layer < value for layer in layers)
    if isinstance(value, list) and len(value) == depth and not name.endswith("token_id"):  # an entry for each layer
        return [value[layer] for layer in layers]
    return value


def _kept(state: Mapping[str, Tensor], name: str, layers: Sequence[int]) -> dict[str, Tensor]:
    """Return the weights that stay, by their names in the cut."""
    numbered, places = re.compile(rf"{re.escape(name)}\.(\d+)\."), {layer: place for place, layer in enumerate(layers)}
    kept = {}
    for key, weight in state.items():
        if (found := numbered.match(key)) is None:
            kept[key] = weight
        elif int(found[1]) in places:
            kept[f"{name}.{places[int(found[1])]}.{key[found.end() :]}"] = weight
    return kept
