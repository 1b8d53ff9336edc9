"""Tiny random models of many architectures: curated, trained, tested, exported, cut in depth, loaded again."""

import pytest
import references
import torch
from families import ENCODER_DECODERS, Numbers, own_loss, said_alone, tiny
from lightning import Trainer
from tiny import QUIET, make_rows
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM, ByT5Tokenizer

from srd_lightning import CacheSettings, ForwardKL, HuggingFaceExport, KDLightningModule, SRDDataModule
from srd_lightning.criteria import NegativeLogLikelihood
from srd_lightning.criteria.base import ReflectionBatch
from srd_lightning.errors import ModelError
from srd_lightning.models.depth_cut import keep_layers
from srd_lightning.models.family import family_of
from srd_lightning.models.generation import Decoding, generate
from srd_lightning.models.soundness import check_causal, check_module
from srd_lightning.training.step import DistillationStep

RUNS = {
    "llama": {},
    "gpt2": {"n_positions": 600, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 16},
    "mixtral": {"output_router_logits": True},
    "qwen3_moe": {},
    "mamba": {},
    **ENCODER_DECODERS,
}
"""Settings of architectures that go through all that there is."""
PROMPTS = [[70, 71, 72], [80], [90, 91, 92, 93, 94, 95]]
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


def of_run(name, seed):
    return tiny(name, seed, **{"max_position_embeddings": 600, "num_hidden_layers": 2, **RUNS[name]}).float()


@pytest.fixture(scope="module")
def tokenizer():
    return ByT5Tokenizer()


def rows_of(model, tokenizer):
    data = SRDDataModule(make_rows(4), tokenizer, student=model, schedule={0: 1.0})
    data.setup("fit")
    return data.rows["train"].to_list()


@pytest.mark.parametrize("name", RUNS)
def test_objective_and_gradient_are_those_of_each_row_alone(name, tokenizer):
    """Padding, the place of labels and the head's chunks change nothing."""
    student, teacher = of_run(name, 0), of_run(name, 1)
    rows = rows_of(student, tokenizer)
    batch = family_of(student.config).collate(rows, pad_token_id=0)
    assert len({len(row["input_ids"]) for row in rows}) > 1
    step = DistillationStep(chunk=3).attach(student, teacher)
    found = step.objective(step.laid_out(batch, "batch"), ForwardKL(), 0.25)
    assert step.parts is not None
    ce = kl = tokens = 0
    for row in rows:
        own = said_alone(student, row).log_softmax(-1)
        with torch.no_grad():
            theirs = said_alone(teacher, row).log_softmax(-1)
        for place, token in enumerate(row["input_ids"][row["prompt_length"] :]):
            ce, tokens = ce - own[place, token], tokens + 1
            kl = kl + references.forward_kl(theirs[place].exp(), own[place].exp())
    expected = (0.75 * ce + 0.25 * kl) / tokens
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.ce.item() == pytest.approx(ce.item() / tokens, rel=1e-5)
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    gradients, wanted = (
        torch.cat([part.flatten().double() for part in torch.autograd.grad(loss, weights, materialize_grads=True)])
        for loss in (found.loss, expected)
    )
    assert (gradients - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("name", RUNS)
def test_what_is_reflected_on_is_what_the_model_itself_says(name, tokenizer):
    model = of_run(name, 0)
    rows = rows_of(model, tokenizer)
    reflected = ReflectionBatch(model, Numbers(), rows, Decoding(max_new_tokens=5))
    with torch.no_grad():
        assert NegativeLogLikelihood().scores(reflected) == pytest.approx(
            [own_loss(model, row).item() for row in rows], rel=1e-4
        )
    alone = [ReflectionBatch(model, Numbers(), [row], Decoding(max_new_tokens=5)).answers[0] for row in rows]
    assert reflected.answers == alone
    assert all(alone)


@pytest.mark.filterwarnings("ignore:the student MixtralForCausalLM is configured to add its router's auxiliary loss")
@pytest.mark.parametrize("name", RUNS)
def test_from_curation_to_the_exported_student(name, tokenizer, tmp_path):
    """Three stages, with a live and a cached teacher, which give the same student; that is tested and loaded again."""
    students, measures = [], []
    for cache in ("none", CacheSettings("hidden", dtype="float32")):
        module = KDLightningModule(of_run(name, 0), of_run(name, 1), kd_weight=0.5, teacher_cache=cache)
        module.decoding = Decoding(max_new_tokens=2)
        rows = {"train": make_rows(8), "validation": make_rows(3), "test": make_rows(3)}
        data = SRDDataModule(rows, tokenizer, schedule={0: 0.25, 1: 0.5, 2: 0.75}, decoding=Decoding(max_new_tokens=2))
        export = HuggingFaceExport(str(tmp_path / f"student{len(students)}"))
        trainer = Trainer(**QUIET, max_epochs=3, default_root_dir=tmp_path, callbacks=[export])
        trainer.fit(module, datamodule=data)
        assert trainer.global_step == 3
        assert data.curation.scored == (0 if students else 8)
        students.append(module.student)
        measures.append(trainer.callback_metrics)
    assert measures[1]["val_kl"].item() == pytest.approx(measures[0]["val_kl"].item(), rel=1e-4)
    tested = Trainer(**QUIET, default_root_dir=tmp_path).test(module, datamodule=data, verbose=False)[0]
    assert tested["test_nll"] == pytest.approx(measures[1]["val_nll"].item(), rel=1e-5)  # of the same rows
    loaded = (AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else AutoModelForCausalLM).from_pretrained(
        export.dirpath
    )
    row = data.rows["test"][0]
    untrained, trained, again = (said_alone(model.eval(), row) for model in (of_run(name, 0), module.student, loaded))
    torch.testing.assert_close(again, trained, rtol=1e-6, atol=1e-6)
    assert (trained - untrained).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in RUNS if name in CUT])
def test_a_cut_answers_alike_with_and_without_cache(name):
    cut = keep_layers(tiny(name, **CUT[name]), [1, 3])
    options = {"input_ids": torch.arange(70, 77)[None], "max_new_tokens": 6, "do_sample": False}
    cached, whole = (cut.generate(**options, use_cache=use_cache).tolist() for use_cache in (True, False))
    assert cached == whole
