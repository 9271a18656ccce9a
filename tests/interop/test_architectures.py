"""The routing of architectures of transformers and timm on the meta device: what AdamW takes of two axes and more.

All else of two axes and more is for the learned rule, and what has fewer for AdamW. Numbers of blocks are `*`.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from celo2 import FusedCelo2, param_groups
from celo2.routes import route_module

# declares operators for torchvision; pytest does not put this folder on the path
if importlib.util.find_spec("common") is None:
    sys.path.append(str(Path(__file__).parent))
import common

assert common.VOCABULARY

TRANSFORMERS = {
    "GPT2LMHeadModel gpt2": {
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "embedding",
    },
    "LlamaForCausalLM llama": {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "head",
    },
    "Qwen2ForCausalLM qwen2": {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "head",
    },
    "Qwen3MoeForCausalLM qwen3_moe": {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "head",
    },
    "MixtralForCausalLM mixtral": {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "head",
    },
    "Gemma2ForCausalLM gemma2": {
        "model.embed_tokens.weight": "embedding",
    },
    "Gemma3ForCausalLM gemma3_text": {
        "model.embed_tokens.weight": "embedding",
    },
    "Phi3ForCausalLM phi3": {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "head",
    },
    "GPTNeoXForCausalLM gpt_neox": {
        "gpt_neox.embed_in.weight": "embedding",
        "lm_head.weight": "head",
    },
    "OPTForCausalLM opt": {
        "model.decoder.embed_tokens.weight": "embedding",
        "model.decoder.embed_positions.weight": "embedding",
    },
    "BloomForCausalLM bloom": {
        "transformer.word_embeddings.weight": "embedding",
    },
    "FalconForCausalLM falcon": {
        "transformer.word_embeddings.weight": "embedding",
    },
    "MambaForCausalLM mamba": {
        "backbone.embeddings.weight": "embedding",
        "backbone.layers.*.mixer.A_log": "state",
        "backbone.layers.*.mixer.conv1d.weight": "depthwise",
    },
    "Mamba2ForCausalLM mamba2": {
        "backbone.embeddings.weight": "embedding",
        "backbone.layers.*.mixer.conv1d.weight": "depthwise",
        "lm_head.weight": "head",
    },
    "RwkvForCausalLM rwkv": {
        "rwkv.embeddings.weight": "embedding",
        "rwkv.blocks.*.attention.time_mix_key": "vector",
        "rwkv.blocks.*.attention.time_mix_value": "vector",
        "rwkv.blocks.*.attention.time_mix_receptance": "vector",
        "rwkv.blocks.*.feed_forward.time_mix_key": "vector",
        "rwkv.blocks.*.feed_forward.time_mix_receptance": "vector",
        "head.weight": "head",
    },
    "T5ForConditionalGeneration t5": {
        "shared.weight": "embedding",
        "encoder.block.*.layer.*.SelfAttention.relative_attention_bias.weight": "embedding",
        "decoder.block.*.layer.*.SelfAttention.relative_attention_bias.weight": "embedding",
    },
    "BertForMaskedLM bert": {
        "bert.embeddings.word_embeddings.weight": "embedding",
        "bert.embeddings.position_embeddings.weight": "embedding",
        "bert.embeddings.token_type_embeddings.weight": "embedding",
    },
    "RobertaForSequenceClassification roberta": {
        "roberta.embeddings.word_embeddings.weight": "embedding",
        "roberta.embeddings.token_type_embeddings.weight": "embedding",
        "roberta.embeddings.position_embeddings.weight": "embedding",
        "classifier.out_proj.weight": "head",
    },
    "DebertaV2ForSequenceClassification deberta-v2": {
        "deberta.embeddings.word_embeddings.weight": "embedding",
        "deberta.embeddings.position_embeddings.weight": "embedding",
        "deberta.encoder.rel_embeddings.weight": "embedding",
        "classifier.weight": "head",
    },
    "ViTForImageClassification vit": {
        "vit.embeddings.cls_token": "vector",
        "vit.embeddings.position_embeddings": "table",
        "vit.embeddings.patch_embeddings.projection.weight": "embedding",
        "classifier.weight": "head",
    },
    "WhisperForConditionalGeneration whisper": {
        "model.encoder.embed_positions.weight": "embedding",
        "model.decoder.embed_tokens.weight": "embedding",
        "model.decoder.embed_positions.weight": "embedding",
    },
    "CLIPModel clip": {
        "text_model.embeddings.token_embedding.weight": "embedding",
        "text_model.embeddings.position_embedding.weight": "embedding",
        "vision_model.embeddings.patch_embedding.weight": "embedding",
        "vision_model.embeddings.position_embedding.weight": "embedding",
    },
    "GptOssForCausalLM gpt_oss": {
        "model.embed_tokens.weight": "embedding",
        "model.layers.*.mlp.experts.gate_up_proj_bias": "vector",
        "model.layers.*.mlp.experts.down_proj_bias": "vector",
        "lm_head.weight": "head",
    },
    "DeepseekV3ForCausalLM deepseek_v3": {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "head",
    },
    "Wav2Vec2ForCTC wav2vec2": {
        "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0": "vector",
        "lm_head.weight": "head",
    },
    "DistilBertForQuestionAnswering distilbert": {
        "distilbert.embeddings.word_embeddings.weight": "embedding",
        "distilbert.embeddings.position_embeddings.weight": "embedding",
        "qa_outputs.weight": "head",
    },
}
TIMM = {
    "vit_tiny_patch16_224": {
        "cls_token": "vector",
        "pos_embed": "table",
        "patch_embed.proj.weight": "embedding",
        "head.weight": "head",
    },
    "swin_tiny_patch4_window7_224": {
        "patch_embed.proj.weight": "embedding",
        "layers.*.blocks.*.attn.relative_position_bias_table": "table",
        "head.fc.weight": "head",
    },
    "convnext_tiny": {
        "stages.*.blocks.*.conv_dw.weight": "depthwise",
        "head.fc.weight": "head",
    },
    "resnet50": {
        "fc.weight": "head",
    },
    "maxvit_tiny_tf_224": {
        "stages.*.blocks.*.conv.conv2_kxk.weight": "depthwise",
        "stages.*.blocks.*.attn_block.attn.rel_pos.relative_position_bias_table": "table",
        "stages.*.blocks.*.attn_grid.attn.rel_pos.relative_position_bias_table": "table",
        "head.fc.weight": "head",
    },
    "levit_128": {
        "stages.*.blocks.*.attn.attention_biases": "table",
        "stages.*.downsample.attn_downsample.attention_biases": "table",
        "head.linear.weight": "head",
        "head_dist.linear.weight": "head",
    },
    "mixer_b16_224": {
        "head.weight": "head",
    },
    "beit_base_patch16_224": {
        "cls_token": "vector",
        "patch_embed.proj.weight": "embedding",
        "blocks.*.attn.relative_position_bias_table": "table",
        "head.weight": "head",
    },
    "efficientnet_b0": {
        "blocks.*.*.conv_dw.weight": "depthwise",
        "classifier.weight": "head",
    },
    "deit_tiny_distilled_patch16_224": {
        "cls_token": "vector",
        "pos_embed": "table",
        "dist_token": "vector",
        "patch_embed.proj.weight": "embedding",
        "head.weight": "head",
        "head_dist.weight": "head",
    },
    "vit_base_r50_s16_224": {
        "cls_token": "vector",
        "pos_embed": "table",
        "patch_embed.backbone.stem.conv.weight": "embedding",
    },
    "cait_xxs24_224": {
        "cls_token": "vector",
        "pos_embed": "table",
        "patch_embed.proj.weight": "embedding",
        "head.weight": "head",
    },
    "xcit_nano_12_p8_224": {
        "cls_token": "vector",
        "patch_embed.proj.*.*.weight": "embedding",
        "blocks.*.attn.temperature": "vector",
        "blocks.*.local_mp.conv1.weight": "depthwise",
        "blocks.*.local_mp.conv2.weight": "depthwise",
        "head.weight": "head",
    },
    "regnety_002": {
        "head.fc.weight": "head",
    },
}


def of_transformers(name: str):
    import transformers

    config = transformers.AutoConfig.for_model(name.split(" ")[1], **OPTIONS.get(name, {}))
    for layers in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
        if getattr(config, layers, 0) > 2:
            setattr(config, layers, 2)
    if isinstance(vars(config).get("layer_types"), list):
        config.layer_types = config.layer_types[:2]
    with torch.device("meta"):
        return getattr(transformers, name.split(" ")[0])(config)


# padding must be a token, and positions relative
OPTIONS = {
    "Phi3ForCausalLM phi3": {"pad_token_id": 0},
    "DebertaV2ForSequenceClassification deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
}


def check(model, expected: dict[str, str]) -> None:
    found = {
        re.sub(r"(?<=\.)\d+(?=\.|$)", "*", route.name): route.kind
        for route in route_module(model)
        if route.parameter.ndim > 1 and route.rule == "adamw"
    }
    assert found == expected
    # every parameter once, and each where its route says
    groups = param_groups(model)
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(group["reasons"][name] for group in groups for name, _ in group["params"])
    vectors = {group["rule"] for group in groups for _, p in group["params"] if p.ndim < 2}
    assert vectors <= {"adamw"}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str) -> None:
    check(of_transformers(name), TRANSFORMERS[name])


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    check(model, TIMM[name])


def test_fused_projections_are_hinted_at() -> None:
    for name, line, view in (
        ("GPT2LMHeadModel gpt2", "transformer.h.0.attn.c_attn.weight", "MatrixView(split=3, heads=12, axis=1)"),
        ("Phi3ForCausalLM phi3", "model.layers.0.mlp.gate_up_proj.weight", "MatrixView(split=2)"),
        ("MixtralForCausalLM mixtral", "model.layers.0.mlp.experts.gate_up_proj", "MatrixView(split=2)"),
    ):
        (hint,) = (route.hint for route in route_module(of_transformers(name)) if route.name == line)
        assert hint is not None and hint.startswith("fused ") and hint.endswith(f'views={{"{line}": {view}}}')


def test_adapters_and_copies_of_heads() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(common.llama(), config)
    rules = {name: g["rule"] for g in FusedCelo2(model).param_groups for name in g["param_names"]}
    saved = {name: rule for name, rule in rules.items() if "lm_head" in name}
    assert len(saved) == 2 and set(saved.values()) == {"adamw"}
    assert {rule for name, rule in rules.items() if "lora_" in name} == {"celo2"}
    assert {rule for name, rule in rules.items() if "embed_tokens" in name} == {"adamw"}


def test_the_trainer_gives_the_weight_decay(tmp_path: Path) -> None:
    """What docs/interop.md says: the decay of the Trainer's arguments wins, and their rate is not read."""
    from transformers import Trainer, TrainingArguments

    given = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    arguments = TrainingArguments(**given, weight_decay=0.3, learning_rate=7e-5)
    model = common.llama()
    options = {"lr": 1e-3, "weight_decay": 0.1, "module": model}
    trainer = Trainer(model, arguments, optimizer_cls_and_kwargs=(FusedCelo2, options))
    groups = trainer.create_optimizer().param_groups
    found = {(group["kind"], group["lr"], group["weight_decay"]) for group in groups}
    assert found == {("matrix", 1e-3, 0.3), ("embedding", 0.02, 0.3), ("head", 0.02, 0.3), ("vector", 0.02, 0.0)}
