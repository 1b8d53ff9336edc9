"""Pretrained models named in a configuration and loaded when they are needed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from jsonargparse import Namespace, set_parsing_settings
from jsonargparse.typing import register_type
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from srd_lightning.digests import bytes_digest, file_digest
from srd_lightning.errors import MissingDataError, ModelError, SettingError, in_one_line, lacks_memory
from srd_lightning.models.depth_cut import check_layers, keep_layers
from srd_lightning.models.family import family_of, is_encoder_decoder
from srd_lightning.models.files import ADAPTER, CONFIG, check_files, model_of_adapter
from srd_lightning.models.quantised import check_can_load
from srd_lightning.models.soundness import check_causal, check_weights
from srd_lightning.models.vocabulary import check_ends, check_tokens

ON_CPUS = ("eager", "sdpa")
"""Attention that a CPU has too."""


@dataclass(frozen=True)
class Pretrained:
    """A language model and its tokenizer, by name; nothing is loaded until it is asked for.

    A decoder, or an encoder-decoder such as T5: its configuration says which.

    Args:
        name: Folder or hub id.
        dtype: Type of the weights, such as ``bfloat16``. Keep a student that trains in ``float32``.
        revision: Branch, tag or commit on the hub.
        gguf_file: File in the folder or repository to read (and dequantize) instead of safetensors.
        keep_layers: Numbers, from 0, of the layers of a decoder to keep; cuts a student in depth out of its teacher.
        lora: Arguments of ``peft.LoraConfig``; only the adapters then train. Needs the ``lora`` extra.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``, …; the model's own choice by default.
        trust_remote_code: Run code that comes with the weights.
        liger: Use Liger's kernels for norms, rotary embeddings and feed-forward layers: for GPUs, needs the ``liger``
            extra.

    Example:
        >>> Pretrained("gpt2", keep_layers=[0, 1, 2, 9, 10, 11]).name
        'gpt2'
    """

    name: str
    dtype: str = "float32"
    revision: str | None = None
    gguf_file: str | None = None
    keep_layers: list[int] | None = None
    lora: dict[str, Any] | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    liger: bool = False

    def __post_init__(self) -> None:
        """Check the type, so that a typing error shows before the weights are loaded."""
        dtype_named(self.dtype)

    def check(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """See whether the model can be loaded and used, as far as that is known without its weights.

        Args:
            tokenizer: Of the rows, if it is known.

        Raises:
            MissingDataError: There is no such folder or hub id, or the hub cannot be reached.
            ModelError: Its files are damaged, it is no language model, or it does not know all tokens.
            SettingError: Another setting does not fit the model, or needs a package that is not installed.
        """
        check_files(self.name, self.gguf_file)
        if self.lora is not None:
            self._lora()
        if self.liger:
            _extra("liger_kernel.transformers", "liger")
        if (Path(self.name) / ADAPTER).is_file() and not (Path(self.name) / CONFIG).is_file():
            return  # an adapter, whose model is elsewhere
        config = self.config()
        family_of(config)  # which an encoder-decoder must say in full
        if self.gguf_file is None:  # from one they are dequantised
            check_can_load(config, self.name)
        if self.keep_layers is not None:
            check_layers(config, self.keep_layers)
        if tokenizer is not None:
            check_ends(tokenizer)
            check_tokens(getattr(config.get_text_config(decoder=True), "vocab_size", None), tokenizer, self.name)

    def config(self) -> Any:
        """Load the configuration.

        Raises:
            MissingDataError: There is none of this name.
            ModelError: It is damaged, or of no language model.
            SettingError: ``gguf_file`` needs a package that is not installed.
        """
        if (base := model_of_adapter(self.name)) is not None:
            return replace(self, name=base, revision=None).config()
        options: dict[str, Any] = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        try:
            config = AutoConfig.from_pretrained(
                self.name, revision=self.revision, trust_remote_code=self.trust_remote_code, **options
            )
        except ImportError as error:
            raise SettingError(f"{self.name} needs a package that is not installed: {_in_short(error)}") from error
        except Exception as error:
            if Path(self.name).is_dir():
                file = Path(self.name) / (self.gguf_file or CONFIG)
                raise ModelError(
                    f"{file} cannot be used ({_in_short(error)}); copy it again, or name another folder"
                ) from error
            raise _not_found(self.name, error) from error
        kinds: Any = MODEL_FOR_CAUSAL_LM_MAPPING
        if getattr(config, "is_encoder_decoder", False):
            kinds = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        own_code = self.trust_remote_code and _auto_class(config).__name__ in (getattr(config, "auto_map", None) or {})
        if type(config) not in kinds and not own_code:
            raise ModelError(
                f"{self.name} is of type {config.model_type}, which transformers have no language model of text for; "
                "an image-text model can be loaded with its own class and be given as a module in Python"
            )
        return config

    def model(self) -> nn.Module:
        """Load the model, and check that it can be trained or teach.

        Returns:
            The model, in eval mode as transformers leaves it.

        Raises:
            SRDError: As for `check`.
            ModelError: Weights are missing, of another size, NaN or inf, the model sees the tokens that it predicts, or
                ``keep_layers`` does not fit it.
            SettingError: ``lora`` does not fit it.
        """
        check_files(self.name, self.gguf_file)
        model = self._load()
        check_weights(model, self.name)
        check_causal(model, self.name)
        if self.keep_layers is not None:
            model = keep_layers(model, self.keep_layers)  # tried on the CPU, so with an attention that is there
            self._set_attention(model)
        if self.liger:
            # Not its losses: they would take the place of ours, and of the logits.
            _extra("liger_kernel.transformers", "liger")._apply_liger_kernel_to_instance(
                model, cross_entropy=False, fused_linear_cross_entropy=False
            )
        if self.lora is not None:
            config = self._lora("SEQ_2_SEQ_LM" if is_encoder_decoder(model) else "CAUSAL_LM")
            with torch.random.fork_rng():
                torch.manual_seed(0)  # the same adapters on every rank and in every run
                try:
                    model = _extra("peft", "lora").get_peft_model(model, config)
                except ValueError as error:
                    raise SettingError(f"lora does not fit {self.name}: {_in_short(error)}") from error
        return cast(nn.Module, model)

    def _load(self) -> Any:
        options: dict[str, Any] = {"dtype": dtype_named(self.dtype), "trust_remote_code": self.trust_remote_code}
        if self.attn_implementation is not None and (self.keep_layers is None or self.attn_implementation in ON_CPUS):
            options["attn_implementation"] = self.attn_implementation
        if self.gguf_file is not None:
            from transformers import GgufConfig  # transformers >= 5 only

            options |= {"gguf_file": self.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
        auto_class = AutoModelForCausalLM if self.gguf_file is not None else _auto_class(self.config())
        try:
            with torch.device("cpu"):  # where Lightning says otherwise, every GPU would hold what is to be spread
                model, found = auto_class.from_pretrained(
                    self.name, revision=self.revision, output_loading_info=True, **options
                )
        except Exception as error:
            if lacks_memory(error):
                raise
            self.check()  # says better what is wrong, where it knows
            raise ModelError(f"{self.name} cannot be loaded: {_in_short(error)}") from error
        if missing := sorted(found["missing_keys"]):
            raise ModelError(
                f"the files of {self.name} lack {len(missing)} tensors of {type(model).__name__}, {missing[0]} among "
                "them, in whose place there would be random numbers; copy all files, or correct its config.json"
            )
        return model

    def _set_attention(self, model: Any) -> None:
        if self.attn_implementation is None:
            return
        try:
            model.set_attn_implementation(self.attn_implementation)
        except (ImportError, ValueError) as error:
            raise SettingError(
                f"{self.name} cannot have attn_implementation {self.attn_implementation}: {_in_short(error)}"
            ) from error

    def _lora(self, task: str = "CAUSAL_LM") -> Any:
        try:
            return _extra("peft", "lora").LoraConfig(task_type=task, **cast(dict[str, Any], self.lora))
        except (TypeError, ValueError) as error:
            raise SettingError(f"lora has settings that peft.LoraConfig does not take: {_in_short(error)}") from error

    def digest(self) -> str:
        """Return a digest of the model, without loading it: of its files, or of the commit on the hub."""
        settings = repr(replace(self, name="", attn_implementation=None)).encode()
        folder = Path(self.name)
        if folder.is_dir():
            weights = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".gguf"))
            there = [path for path in (folder / CONFIG, *weights) if path.exists()]
            return bytes_digest([settings, *(file_digest(path, "").encode() for path in there)])
        self.config()  # fetched, so that the commit is known to which a branch points now
        fetched = try_to_load_from_cache(self.name, CONFIG, revision=self.revision)
        commit = Path(fetched).parent.name if isinstance(fetched, str) else self.revision
        return bytes_digest([settings, f"{self.name} {commit}".encode()])

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer.

        Raises:
            MissingDataError: There is no folder or hub id of this name.
            ModelError: There is no tokenizer beside the model, or it has no end token.
        """
        return load_tokenizer(
            self.name, revision=self.revision, gguf_file=self.gguf_file, trust_remote_code=self.trust_remote_code
        )


if TYPE_CHECKING:
    ModelName = str
else:

    class ModelName(str):
        """A plain text that stands for a `Pretrained` of this name; a type of its own for any command line."""


def _spec(name: object) -> Namespace:
    """Return what a name stands for as it is written in full, so that settings can be added to it."""
    if not isinstance(name, str):
        raise ValueError(f"a model's name is a text, but is {name!r}")
    settings = Namespace(name=name)  # type: ignore[no-untyped-call]
    return Namespace(class_path="srd_lightning.Pretrained", init_args=settings)  # type: ignore[no-untyped-call]


register_type(ModelName, deserializer=_spec)

# As a dataclass among others it would be tried first for every setting of a model, and what the tries take from the
# settings given before is lost: `--model.student.config.hidden_size` would reset all others to their defaults.
set_parsing_settings(subclasses_enabled=[Pretrained])


def named(model: Pretrained | nn.Module | ModelName) -> Pretrained | nn.Module:
    """Return a model as it was given, or the pretrained one of a name.

    Example:
        >>> named("gpt2")
        Pretrained(name='gpt2', dtype='float32', revision=None, gguf_file=None, keep_layers=None, lora=None,
                   attn_implementation=None, trust_remote_code=False, liger=False)
    """
    return Pretrained(model) if isinstance(model, str) else model


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        name: Folder or hub id.
        **options: Of ``AutoTokenizer.from_pretrained``.

    Raises:
        MissingDataError: There is no folder or hub id of this name.
        ModelError: It cannot be loaded, or has no end token.
    """
    try:
        # Said in so many words, or transformers ask on the terminal whether to run code that comes with it.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, **{"trust_remote_code": False, **options}
        )
    except Exception as error:
        check_files(name, options.get("gguf_file"))
        if not Path(name).is_dir():
            raise _not_found(name, error) from error
        there = any((Path(name) / file).exists() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))
        reason = _in_short(error) if there else "the folder has no tokenizer.json"
        raise ModelError(
            f"no tokenizer can be loaded from {name} ({reason}); save it there with "
            "tokenizer.save_pretrained, or name another one with data.tokenizer"
        ) from error
    check_ends(tokenizer)
    return tokenizer


def _auto_class(config: Any) -> Any:
    return AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM


def _not_found(name: str, error: Exception) -> MissingDataError:
    return MissingDataError(
        f"{name!r} is no folder here (seen from {Path.cwd()}), and as a hub id it cannot be loaded: {_in_short(error)}"
    )


def _extra(module: str, extra: str) -> ModuleType:
    """Import a package that only one setting needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingError(
            f"the setting {extra} of a model needs a package: pip install 'srd-lightning[{extra}]' ({error})"
        ) from error


def _in_short(error: Exception) -> str:
    """Return the first sentences of another library's message."""
    text = in_one_line(error) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def dtype_named(name: str) -> torch.dtype:
    """Return the torch type of a name.

    Raises:
        SettingError: There is none.

    Example:
        >>> dtype_named("bfloat16")
        torch.bfloat16
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SettingError(
            f"dtype must name a floating-point type of torch, such as float32 or bfloat16, but is {name!r}"
        )
    return dtype
