"""The models of transformers that a GPT of the harness is exactly: their configurations, and their names of weights.

`gpt2` is `GPT2LMHeadModel`. `modern` is `ApertusForCausalLM` (transformers 4.56 and later), whose MLP has no gate and
whose queries and keys are normalised before RoPE, with the tanh GELU, a RoPE base of 10,000 and every gain 1.
`speedrun` has no such model: attention is scaled by 0.12, RoPE turns half of each head, and logits have a cap.
"""

from typing import Any

import torch
from torch import Tensor

from celo2.pretrain.model import GPT, NORM_EPS, ROPE_BASE, GPTConfig

ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "modern": "ApertusForCausalLM"}
# module of a block here, there, and whether its matrix is a Conv1D there, which is transposed
_GPT2_BLOCK = (
    ("attention_norm", "ln_1", False),
    ("attention.qkv", "attn.c_attn", True),
    ("attention.out", "attn.c_proj", True),
    ("mlp_norm", "ln_2", False),
    ("mlp.up", "mlp.c_fc", True),
    ("mlp.down", "mlp.c_proj", True),
)


def gpt2_names(config: GPTConfig) -> dict[str, tuple[str, bool]]:
    """Parameters of a `gpt2` by name: the name in GPT-2's public weights, and whether it is transposed there.

    The biases, which those weights have, are among them whether or not the model has any.
    """
    names = {"token_embedding.weight": ("wte.weight", False), "position_embedding.weight": ("wpe.weight", False)}
    for index in range(config.n_layer):
        for here, there, transposed in _GPT2_BLOCK:
            names[f"blocks.{index}.{here}.weight"] = (f"h.{index}.{there}.weight", transposed)
            names[f"blocks.{index}.{here}.bias"] = (f"h.{index}.{there}.bias", False)
    return names | {f"final_norm.{kind}": (f"ln_f.{kind}", False) for kind in ("weight", "bias")}


def hf_config(config: GPTConfig) -> dict[str, Any]:
    """The contents of `config.json`; raises ValueError for an architecture that transformers does not have."""
    if config.arch not in ARCHITECTURES:
        raise ValueError(
            f"arch {config.arch!r} has no model in transformers: what can be exported is "
            f"{' and '.join(map(repr, ARCHITECTURES))}"
        )
    end = config.vocab_size - 1
    common = {
        "architectures": [ARCHITECTURES[config.arch]],
        "vocab_size": config.vocab_size,
        "initializer_range": 0.02,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": None,
        "tie_word_embeddings": config.tied,
        "torch_dtype": "float32",
    }
    if config.arch == "gpt2":
        return common | {
            "model_type": "gpt2",
            "n_positions": config.context,
            "n_embd": config.width,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": NORM_EPS["gpt2"],
            # the harness has no dropout
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        }
    return common | {
        "model_type": "apertus",
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head,
        "max_position_embeddings": config.context,
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": NORM_EPS["modern"],
        # of transformers 5, and of 4
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
        "rope_theta": ROPE_BASE,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }


def hf_tensors(model: GPT) -> dict[str, Tensor]:
    """The weights by the names of transformers, float32 and on the CPU, without the rows that are padding.

    Zeros stand for biases that the model does not have, ones for gains. Raises ValueError as `hf_config` does.
    """
    config = model.config
    hf_config(config)
    rows = config.vocab_size
    own = {name: parameter.detach().float().cpu() for name, parameter in model.named_parameters()}
    if config.arch == "gpt2":
        own["token_embedding.weight"] = own["token_embedding.weight"][:rows]
        tensors = {}
        for name, (there, transposed) in gpt2_names(config).items():
            # a bias is as long as its layer's matrix is high
            tensor = own[name] if name in own else torch.zeros(own[name.replace(".bias", ".weight")].shape[0])
            tensors[f"transformer.{there}"] = (tensor.T if transposed else tensor).contiguous()
        return tensors
    width, gain = torch.ones(config.width), torch.ones(config.head_dim)
    tensors = {
        "model.embed_tokens.weight": own["token_embedding.weight"][:rows],
        "model.norm.weight": width.clone(),
        "lm_head.weight": own["lm_head.weight"][:rows],
    }
    for index in range(config.n_layer):
        here, there = f"blocks.{index}", f"model.layers.{index}"
        for kind, part in zip("qkv", own[f"{here}.attention.qkv.weight"].chunk(3), strict=True):
            tensors[f"{there}.self_attn.{kind}_proj.weight"] = part
        tensors |= {
            f"{there}.self_attn.o_proj.weight": own[f"{here}.attention.out.weight"],
            f"{there}.self_attn.q_norm.weight": gain.clone(),
            f"{there}.self_attn.k_norm.weight": gain.clone(),
            f"{there}.attention_layernorm.weight": width.clone(),
            f"{there}.feedforward_layernorm.weight": width.clone(),
            f"{there}.mlp.up_proj.weight": own[f"{here}.mlp.up.weight"],
            f"{there}.mlp.down_proj.weight": own[f"{here}.mlp.down.weight"],
        }
    # parts of one tensor share its memory
    return {name: tensor.clone() for name, tensor in tensors.items()}
