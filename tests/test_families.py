"""Tiny random models of many architectures: cut in depth, saved and loaded; what sees the answer is refused."""

import inspect

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM, ByT5Tokenizer
from transformers.utils import logging

from srd_lightning.errors import ModelError
from srd_lightning.models.depth_cut import keep_layers
from srd_lightning.models.generation import Decoding, generate
from srd_lightning.models.soundness import check_causal, check_module

DEPTH = 4
PROMPTS = [[70, 71, 72], [80], [90, 91, 92, 93, 94, 95]]
SIZES = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_groups": 1,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "state_size": 8,
    "num_heads": 4,
    "use_mamba_kernels": False,
}
"""Of whatever a configuration has of these."""
SPARSE = {"mlp_only_layers": [2], "decoder_sparse_step": 2}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
WINDOWS = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]}
CUT = {
    "llama": {},
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {},
    "olmo2": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 2},
    "gemma3_text": {**WINDOWS, "sliding_window": 2},
    "gpt_oss": {"layer_types": WINDOWS["layer_types"][::-1], "sliding_window": 2},
    "cohere2": {"sliding_window": 2},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "llama4_text": {"no_rope_layers": [1, 0, 0, 1], "moe_layers": [1, 3], "intermediate_size_mlp": 24},
    "mixtral": {},
    "qwen3_moe": SPARSE,
    "qwen2_moe": {**SPARSE, "shared_expert_intermediate_size": 16},
    "deepseek_v2": {**LATENT, "first_k_dense_replace": 3, "head_dim": 8},
    "deepseek_v3": {**LATENT, "first_k_dense_replace": 2},
    "glm4_moe": {"first_k_dense_replace": 1},
    "mamba": {},
    "mamba2": {},
    "falcon_mamba": {},
    "bamba": {"attn_layer_indices": [2]},
    "falcon_h1": {},
    "recurrent_gemma": {"block_types": ["recurrent"]},
    "jamba": {"attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0},
}
"""Settings of architectures that can be cut to their second and fourth layer."""
REFUSED = {
    "gpt2": {"scale_attn_by_inverse_layer_idx": True, "attn_implementation": "eager"},
    "rwkv": {"attention_hidden_size": 32},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 4, "expert_layer_offset": 1},
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_num_experts": 4, "moe_k": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "hybrid", "hybrid"], "num_mem_blocks": 2, "num_heads": 4},
}
"""Settings of architectures whose layers differ in what no setting can say of a cut."""


def tiny(name, **settings):
    """Return a random model of an architecture, small in what its configuration has."""
    logging.set_verbosity_error()
    kind = CONFIG_MAPPING[name]
    names = {*inspect.signature(kind).parameters, *dir(kind), *kind.attribute_map}
    sizes = {kind.attribute_map.get(size, size): value for size, value in SIZES.items() if size in names}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**{**sizes, **settings})).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(70, 77)[None], use_cache=False).logits


@pytest.mark.parametrize("name", CUT)
def test_a_cut_is_the_same_when_it_is_saved_and_loaded(name, tmp_path):
    whole = tiny(name, **CUT[name])
    cut = keep_layers(whole, [1, 3])
    assert sum(weight.numel() for weight in cut.parameters()) < sum(weight.numel() for weight in whole.parameters())
    cut.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.num_hidden_layers == 2
    torch.testing.assert_close(logits(loaded), logits(cut), rtol=1e-5, atol=1e-5)
    assert (logits(cut) - logits(whole)).abs().max() > 0.01 * logits(whole).abs().max()


@pytest.mark.parametrize("name", REFUSED)
def test_a_cut_that_would_be_another_model_is_refused(name):
    model = tiny(name, **REFUSED[name])
    check_causal(model, name)
    with pytest.raises(ModelError, match=rf"^keep_layers \[1, 3\] cannot be used with {type(model).__name__}"):
        keep_layers(model, [1, 3])


def test_the_first_layers_can_be_kept_where_only_their_places_matter():
    for name in ("jamba", "rwkv", "ernie4_5_moe"):
        assert keep_layers(tiny(name, **REFUSED[name]), [0, 1]).config.num_hidden_layers == 2


class TestWhatSeesTheAnswer:
    @pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
    def test_an_encoder_is_no_causal_language_model(self, name):
        model = tiny(name, embedding_size=32) if name == "electra" else tiny(name)
        with pytest.raises(
            ModelError, match=f"^the student: {type(model).__name__} is no causal language model: the last"
        ):
            check_module(model, "the student", None)

    @pytest.mark.parametrize("name", ["bert", "roberta"])
    def test_as_a_decoder_it_is(self, name):
        check_module(tiny(name, is_decoder=True), "the student", None)

    def test_xlnet(self):
        sizes = {"vocab_size": 384, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 32}
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["xlnet"](**sizes))
        with pytest.raises(ModelError, match="XLNetLMHeadModel is no causal language model"):
            check_module(model, "the teacher", None)

    @pytest.mark.parametrize("name", ["t5", "mt5", "bart"])
    def test_encoder_decoders_by_name(self, name):
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "encoder_ffn_dim": 32}
        sizes |= {"encoder_layers": 1, "decoder_layers": 1, "decoder_ffn_dim": 32, "vocab_size": 384}
        sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
        kind = CONFIG_MAPPING[name]
        config = kind(**{size: value for size, value in sizes.items() if size in inspect.signature(kind).parameters})
        with pytest.raises(
            ModelError, match=f"^the student is an encoder-decoder .{kind.__name__}., whose encoder would see"
        ):
            check_module(AutoModelForSeq2SeqLM.from_config(config), "the student", None)


@pytest.mark.parametrize("name", ["llama", "rwkv"])
def test_answers_do_not_depend_on_the_rows_beside(name):
    model = tiny(name, **REFUSED.get(name, {}))
    together = generate(model, ByT5Tokenizer(), PROMPTS, Decoding(max_new_tokens=6))
    assert together == [generate(model, ByT5Tokenizer(), [one], Decoding(max_new_tokens=6))[0] for one in PROMPTS]


@pytest.mark.parametrize(("name", "sizes"), [("llama", [3]), ("rwkv", [1, 1, 1]), ("recurrent_gemma", [1, 1, 1])])
def test_who_answers_alone(name, sizes, monkeypatch):
    model, seen = tiny(name, **REFUSED.get(name, {})), []
    answer = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **options: (seen.append(len(options["input_ids"])), answer(**options))[1]
    )
    generate(model, ByT5Tokenizer(), PROMPTS, Decoding(max_new_tokens=2))
    assert seen == sizes
