"""Models and tokenizers that cannot do what is asked of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    PretrainedConfig,
)

from faults.fault import Fault

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 1}
NEW_SIZE = {"init_args": {"config": {"init_args": {"vocab_size": 100}}}}


def named(name: str, **settings: Any) -> dict[str, Any]:
    """Return a model by name."""
    return {"class_path": "srd_lightning.Pretrained", "init_args": {"name": name, **settings}}


def of(name: str = "student", **settings: Any) -> dict[str, Any]:
    """Return settings of a student by name."""
    return {"model": {"student": named(name, **settings)}}


def llama(folder: Path, **settings: Any) -> Path:
    """Save a tiny model and its tokenizer; return its folder."""
    LlamaForCausalLM(LlamaConfig(vocab_size=384, **SIZES, **settings)).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


def damaged(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return what makes a folder with a student, and changes something in it."""

    def prepare(folder: Path) -> None:
        change(llama(folder / "student"))

    return prepare


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        file = llama(folder / "student") / "model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})

    return prepare


def nothing(_: object) -> None: ...


def lose_layer(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if "layers.3." in name]:
        del weights[name]


def configured(config: PretrainedConfig) -> Callable[[Path], None]:
    """Return what makes a folder with a configuration and a file of weights, which nobody reads."""

    def prepare(folder: Path) -> None:
        config.save_pretrained(folder / "student")
        (folder / "student" / "pytorch_model.bin").write_bytes(b"")

    return prepare


def lose_shard(student: Path) -> None:
    (student / "model.safetensors").unlink()
    weights = {"lm_head.weight": "model-00001-of-00002.safetensors"}
    (student / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))


def cut_weights(student: Path) -> None:
    file = student / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def spoil(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"][5, 5] = torch.nan


def without_end(student: Path) -> None:
    settings = json.loads((student / "tokenizer_config.json").read_text())
    (student / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))


def without_tokenizer(student: Path) -> None:
    for file in student.glob("*token*"):
        file.unlink()


def bert(folder: Path) -> None:
    BertLMHeadModel(BertConfig(vocab_size=384, **SIZES)).save_pretrained(folder / "student")


def inverse_gpt2(folder: Path) -> None:
    sizes = {"vocab_size": 384, "n_embd": 16, "n_layer": 4, "n_head": 1, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, scale_attn_by_inverse_layer_idx=True))
    model.save_pretrained(folder / "student")


def two_tokenizers(folder: Path) -> None:
    llama(folder / "student")
    llama(folder / "teacher")
    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder / "teacher")


FAULTS: list[Fault] = [
    Fault(
        id="model_no_folder",
        done="a folder of a student that is not there",
        settings=of("runs/old/student"),
        says="there is no folder 'runs/old/student' to load a model from (seen from {folder}); name one "
        "that an export has written, or a model on the Hugging Face hub",
    ),
    Fault(
        id="model_no_hub",
        done="a model of the hub, where the hub cannot be reached",
        settings=of("gpt2"),
        says="'gpt2' is no folder here (seen from {folder}), and as a hub id it cannot be loaded: We "
        "couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in "
        "the cached files. Check your internet connection or see how to run the library in offline "
        "mode at 'https://huggingface.co/docs/transformers/installation#offline-mode'.",
    ),
    Fault(
        id="model_is_file",
        done="a file of weights instead of its folder",
        files={"model.gguf": "GGUF"},
        settings=of("model.gguf"),
        says="the model model.gguf is a file, where a folder or a hub id is expected; name its folder, "
        "with gguf_file: model.gguf",
    ),
    Fault(
        id="model_no_gguf",
        done="a `gguf_file` that is not there",
        files={"weights/q8.gguf": "GGUF"},
        settings=of("weights", gguf_file="q4.gguf"),
        says="the folder weights has no gguf_file 'q4.gguf', but q8.gguf; name one of these",
    ),
    Fault(
        id="model_no_config",
        done="a folder that holds no model",
        prepare=damaged(lambda student: (student / "config.json").unlink()),
        settings=of(),
        says="the folder student has no config.json, so it holds no model of transformers; a folder that "
        "HuggingFaceExport or save_pretrained has written has one",
    ),
    Fault(
        id="model_config_cut",
        done="a model whose `config.json` was cut off",
        prepare=damaged(lambda student: (student / "config.json").write_text("{")),
        settings=of(),
        says="student/config.json cannot be used (It looks like the config file at 'student/config.json' "
        "is not a valid JSON file.); copy it again, or name another folder",
    ),
    Fault(
        id="model_no_weights",
        done="a model without its file of weights",
        prepare=damaged(lambda student: (student / "model.safetensors").unlink()),
        settings=of(),
        says="the folder student has a config.json, but no weights (*.safetensors); copy them there",
    ),
    Fault(
        id="model_weights_cut",
        done="a model whose weights were cut off",
        prepare=damaged(cut_weights),
        settings=of(),
        says="student/model.safetensors is damaged or was cut off (Error while deserializing header: "
        "incomplete metadata, file not fully covered); copy it again",
    ),
    Fault(
        id="model_shard_lost",
        done="a model of which one file of weights was not copied",
        prepare=damaged(lose_shard),
        settings=of(),
        says="student/model.safetensors.index.json names model-00001-of-00002.safetensors, which is not "
        "there; copy all files of the model",
    ),
    Fault(
        id="model_layer_lost",
        done="a model whose weights lack a layer",
        prepare=change_weights(lose_layer),
        settings=of(),
        says="the files of student lack 9 tensors of LlamaForCausalLM, "
        "model.layers.3.input_layernorm.weight among them, in whose place there would be random "
        "numbers; copy all files, or correct its config.json",
    ),
    Fault(
        id="model_nan",
        done="a student whose weights have become NaN",
        prepare=change_weights(spoil),
        settings=of(),
        says="student has weights that are NaN or inf, lm_head.weight among 1 of 39 tensors; its training "
        "has diverged or its file is damaged: choose an earlier checkpoint, or load it anew",
    ),
    Fault(
        id="model_encoder_decoder",
        done="an encoder-decoder as student, and a decoder as teacher",
        prepare=configured(BartConfig(vocab_size=384)),
        settings=of(),
        says="the student is an encoder-decoder whose decoder begins with token 2 and the teacher a decoder, so no batch "
        "is made for both; choose two decoders, or two encoder-decoders whose decoders begin with the same token",
    ),
    Fault(
        id="model_encoder_decoder_cut",
        done="`keep_layers` of an encoder-decoder",
        prepare=configured(BartConfig(vocab_size=384)),
        settings=of(keep_layers=[0]),
        says="keep_layers cuts decoders, but BartConfig is of an encoder-decoder, which has two stacks of layers; leave "
        "it out, and choose a smaller student",
    ),
    Fault(
        id="model_encoder",
        done="an encoder as student, which would see the answer",
        prepare=bert,
        settings=of(),
        says="student: BertLMHeadModel is no causal language model: the last token changes what it says of "
        "those before, so it would see the answer that it is to learn",
    ),
    Fault(
        id="model_image_text",
        done="a model of images and text by name",
        prepare=configured(LlavaConfig()),
        settings=of(),
        says="student is of type llava, which transformers have no language model of text for; an "
        "image-text model can be loaded with its own class and be given as a module in Python",
    ),
    Fault(
        id="model_dtype",
        done="a `dtype` that torch does not know",
        settings=of(dtype="bf16"),
        says="dtype must name a floating-point type of torch, such as float32 or bfloat16, but is 'bf16'",
    ),
    Fault(
        id="model_layers_range",
        done="`keep_layers` with a layer that the model does not have",
        prepare=damaged(nothing),
        settings=of(keep_layers=[0, 4]),
        says="keep_layers must be rising numbers from 0 to 3, but is [0, 4]",
    ),
    Fault(
        id="model_layers_refused",
        done="`keep_layers` of a model whose layers depend on their place",
        prepare=inverse_gpt2,
        settings=of(keep_layers=[1, 3], attn_implementation="eager"),
        says="keep_layers [1, 3] cannot be used with GPT2LMHeadModel: its layers depend on their place, so "
        "the cut, saved and loaded again, would be another model; keep all layers, or choose another "
        "student",
    ),
    Fault(
        id="model_lora_setting",
        done="a setting of `lora` that PEFT does not know",
        prepare=damaged(nothing),
        settings=of(lora={"rank": 4}),
        says="lora has settings that peft.LoraConfig does not take: LoraConfig.__init__() got an "
        "unexpected keyword argument 'rank'",
    ),
    Fault(
        id="model_lora_layers",
        done="`lora` for layers that the model does not have",
        prepare=damaged(nothing),
        settings=of(lora={"r": 2, "target_modules": ["qkv"]}),
        says="lora does not fit student: Target modules {'qkv'} not found in the base model. Please check "
        "the target modules and try again.",
    ),
    Fault(
        id="model_tokenizers",
        done="student and teacher with different tokenizers",
        prepare=two_tokenizers,
        settings={"model": {"student": named("student"), "teacher": named("teacher")}},
        says="student and teacher have different tokenizers (384 and 385 tokens, 1 differ), so their "
        "distributions cannot be compared; choose two models of one family",
    ),
    Fault(
        id="model_tokens",
        done="a tokenizer with tokens that the model does not know",
        settings={"model": {"student": NEW_SIZE, "teacher": NEW_SIZE}},
        says="the student knows 100 tokens, but the tokenizer goes up to 258 ('ÿ'); choose the tokenizer "
        "that belongs to the model, or make room with model.resize_token_embeddings and save it",
    ),
    Fault(
        id="model_no_end",
        done="a tokenizer without an end token",
        prepare=damaged(without_end),
        settings={**of(), "data": {"tokenizer": "student"}},
        says="the tokenizer student has no eos_token, so no response would end; set tokenizer.eos_token to "
        "the token that ends an answer, and save it beside the model",
    ),
    Fault(
        id="model_no_tokenizer",
        done="a tokenizer by a folder without one",
        prepare=damaged(without_tokenizer),
        settings={**of(), "data": {"tokenizer": "student"}},
        says="no tokenizer can be loaded from student (the folder has no tokenizer.json); save it there "
        "with tokenizer.save_pretrained, or name another one with data.tokenizer",
    ),
]
