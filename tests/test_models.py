import sys
import types

import pytest
import torch
from tiny import tiny_model
from torch import nn
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from srd_lightning.errors import ModelError, SettingError
from srd_lightning.models.depth_cut import keep_layers
from srd_lightning.models.pretrained import Pretrained
from srd_lightning.models.vocabulary import check_same_tokenizer

IDS = torch.tensor([[70, 71, 72, 73, 74]])


def tiny_llama(depth=4):
    return tiny_model(num_hidden_layers=depth, initializer_range=0.3).eval()


def tiny_gpt2(depth=4):
    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "n_embd": 32, "n_head": 2, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(n_layer=depth, eos_token_id=1, bos_token_id=None, **sizes)).eval()


def stack(model):
    return model.model.layers if isinstance(model, LlamaForCausalLM) else model.transformer.h


def say(model, **options):
    return model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)[0].tolist()


def same_weights(found, expected):
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, weights in found.state_dict().items():
        assert torch.equal(weights, expected.state_dict()[name]), name


each_architecture = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


class TestPretrained:
    def test_loads_the_saved_weights(self, folder):
        same_weights(Pretrained(folder).model(), tiny_llama())

    def test_loads_the_saved_tokenizer(self, folder):
        found = Pretrained(folder).tokenizer()
        assert found.get_vocab() == ByT5Tokenizer().get_vocab()
        assert found("Hi é")["input_ids"] == ByT5Tokenizer()("Hi é")["input_ids"]

    def test_is_in_eval_mode(self, folder):
        assert not any(module.training for module in Pretrained(folder).model().modules())

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_dtype(self, folder, dtype):
        model = Pretrained(folder, dtype=dtype).model()
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}

    def test_weights_are_float32_by_default_however_they_were_saved(self, tmp_path):
        tiny_llama().bfloat16().save_pretrained(tmp_path)
        assert {parameter.dtype for parameter in Pretrained(str(tmp_path)).model().parameters()} == {torch.float32}

    def test_attention(self, folder):
        assert Pretrained(folder, attn_implementation="eager").model().config._attn_implementation == "eager"

    def test_keeps_layers(self, folder):
        found = Pretrained(folder, keep_layers=[0, 3]).model()
        whole = tiny_llama()
        for layer, kept in zip(found.model.layers, (0, 3), strict=True):
            same_weights(layer, whole.model.layers[kept])

    def test_nothing_is_loaded_before_it_is_asked_for(self):
        assert Pretrained("no/such/model").name == "no/such/model"

    @pytest.mark.parametrize(
        "dtype", ["float31", "bf16", "nn", "", "int8"], ids=["unknown", "short", "no_type", "empty", "whole"]
    )
    def test_unknown_dtype(self, dtype):
        with pytest.raises(ValueError, match=f"dtype must name a floating-point type .* but is '{dtype}'"):
            Pretrained("gpt2", dtype=dtype)


class TestKeepLayers:
    @each_architecture
    @pytest.mark.parametrize("kept", [[0], [3], [0, 2], [1, 2, 3]], ids=str)
    def test_kept_layers_have_their_weights(self, make, kept):
        whole = make()
        cut = keep_layers(make(), kept)
        assert cut.config.num_hidden_layers == len(kept)
        for layer, number in zip(stack(cut), kept, strict=True):
            same_weights(layer, stack(whole)[number])

    @each_architecture
    def test_the_rest_of_the_model_is_kept(self, make):
        cut, whole = keep_layers(make(), [1, 3]), make().state_dict()
        rest = {name: weights for name, weights in cut.state_dict().items() if "layers." not in name}
        rest = {name: weights for name, weights in rest.items() if ".h." not in name}
        assert len(rest) > 2
        assert all(torch.equal(weights, whole[name]) for name, weights in rest.items())

    @each_architecture
    def test_equals_a_model_whose_other_layers_are_skipped(self, make):
        cut, whole = keep_layers(make(), [1, 3]), make()
        skip = [stack(whole)[number] for number in (0, 2)]
        as_tensor = isinstance(skip[0](torch.zeros(1, 1, 32), **rotary(whole)), torch.Tensor)
        for layer in skip:
            layer.forward = lambda hidden, *args, **kwargs: hidden if as_tensor else (hidden,)
        torch.testing.assert_close(cut(IDS, use_cache=False).logits, whole(IDS, use_cache=False).logits)

    @each_architecture
    def test_generates_with_cache_as_without(self, make):
        cut = keep_layers(make(), [1, 3])
        said = say(cut, use_cache=True)
        assert said == say(cut, use_cache=False)
        assert said != say(make(), use_cache=True)

    @each_architecture
    def test_all_layers_change_nothing(self, make):
        torch.testing.assert_close(keep_layers(make(), range(4))(IDS).logits, make()(IDS).logits, rtol=0, atol=0)

    @each_architecture
    def test_can_be_saved_and_loaded(self, make, tmp_path):
        cut = keep_layers(make(), [0, 3])
        cut.save_pretrained(tmp_path)
        loaded = Pretrained(str(tmp_path)).model()
        same_weights(loaded, cut)
        assert say(loaded) == say(cut)

    def test_weights_stay_tied_trainable_and_in_place(self):
        whole = tiny_gpt2()
        before = torch.random.get_rng_state()
        cut = keep_layers(whole, [0, 3])
        assert cut.lm_head.weight is cut.transformer.wte.weight is whole.transformer.wte.weight
        assert all(weight.requires_grad for weight in cut.parameters())
        assert torch.equal(torch.random.get_rng_state(), before)
        assert not any(module.training for module in cut.modules())

    def test_own_generation_settings_stay(self):
        whole = tiny_llama()
        whole.generation_config.eos_token_id = [1, 7]
        assert keep_layers(whole, [0]).generation_config.eos_token_id == [1, 7]

    @pytest.mark.parametrize(
        "layers",
        [[], [0, 4], [-1, 2], [2, 1], [1, 1]],
        ids=["empty", "out_of_range", "negative", "unordered", "repeated"],
    )
    def test_layers_that_do_not_fit(self, layers):
        with pytest.raises(SettingError, match="rising numbers from 0 to 3, but is ") as error:
            keep_layers(tiny_llama(), layers)
        assert str(error.value).endswith(str(layers))

    @pytest.mark.parametrize("number", [0, 2], ids=["none", "two"])
    def test_a_model_without_one_list_of_layers(self, number):
        model = tiny_llama()
        layers = model.model.layers
        del model.model.layers
        for name in "ab"[:number]:
            setattr(model, name, nn.ModuleList(layers))
        with pytest.raises(ModelError, match=f"one list of 4 layers in LlamaForCausalLM, found {number}"):
            keep_layers(model, [0])


def rotary(model):
    """Return what a layer of the model takes besides its hidden states."""
    if not isinstance(model, LlamaForCausalLM):
        return {}
    return {"position_embeddings": model.model.rotary_emb(torch.zeros(1, 1, 32), torch.tensor([[0]]))}


class TestSameTokenizer:
    def test_the_same(self):
        check_same_tokenizer(ByT5Tokenizer(), ByT5Tokenizer())

    def test_other_tokens(self):
        student, teacher = ByT5Tokenizer(), ByT5Tokenizer()
        teacher.add_tokens(["<a>", "<b>"])
        size = len(student.get_vocab())
        with pytest.raises(ValueError, match=rf"\({size} and {size + 2} tokens, 2 differ\).*one family"):
            check_same_tokenizer(student, teacher)

    def test_the_same_tokens_in_other_places(self):
        student, teacher = ByT5Tokenizer(), ByT5Tokenizer()
        student.add_tokens(["<a>", "<b>"])
        teacher.add_tokens(["<b>", "<a>"])
        with pytest.raises(ValueError, match="2 differ"):
            check_same_tokenizer(student, teacher)


class TestLora:
    @pytest.fixture
    def lora(self, folder):
        pytest.importorskip("peft")
        options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        return Pretrained(folder, keep_layers=[0, 3], lora=options).model()

    def test_only_adapters_train(self, lora):
        trained = {name: weights.numel() for name, weights in lora.named_parameters() if weights.requires_grad}
        assert all("lora_" in name for name in trained)
        assert sum(trained.values()) == 2 * (32 * 2 + 2 * 32)

    def test_adapters_are_the_same_in_every_run(self, folder):
        options = {"r": 2, "target_modules": ["q_proj"]}
        first, second = (Pretrained(folder, lora=options).model().state_dict() for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_starts_as_the_model_without(self, lora, folder):
        base = Pretrained(folder, keep_layers=[0, 3]).model()
        torch.testing.assert_close(lora(input_ids=IDS).logits, base(input_ids=IDS).logits)

    def test_generates(self, lora, folder):
        assert say(lora) == say(Pretrained(folder, keep_layers=[0, 3]).model())


def test_liger_changes_the_layers_and_not_the_losses(tmp_path, monkeypatch):
    """Its kernels need a GPU; here a stand-in shows what is asked of it."""
    seen = []
    stand_in = types.ModuleType("liger_kernel.transformers")
    stand_in._apply_liger_kernel_to_instance = lambda model, **options: seen.append((model, options))
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    tiny_model().save_pretrained(tmp_path)
    model = Pretrained(str(tmp_path), liger=True).model()
    assert seen == [(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})]
