"""Models of the harness in transformers, and GPT-2 of transformers in the harness: the same logits and tokens."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from celo2.pretrain.checkpoint import Checkpoints, RunState
from celo2.pretrain.export import export
from celo2.pretrain.init_hf import load_gpt2
from celo2.pretrain.model import GPT, GPTConfig
from celo2.pretrain.optimizers import Optimizers
from celo2.pretrain.parallel import World
from celo2.pretrain.recipes import recipe_for
from celo2.pretrain.tokenizer import get_tokenizer

# declares operators for torchvision; pytest does not put this folder on the path
if importlib.util.find_spec("common") is None:
    sys.path.append(str(Path(__file__).parent))
import common

assert common.VOCABULARY

CONTEXT = 64
ALONE = World(0, 1, 0, 1, torch.device("cpu"))
# in float32, the logits being of size 1 to 6
CLOSE = {"rtol": 0.0, "atol": 1e-5}
TEXT = (
    "Hello w\u00f6rld, 12 \u00fcnd  x\n\n  it's the 1990s\u2014\u65e5\u672c \U0001f600 tokenization "
    "antidisestablishmentarianism\t!!"
)
# of tiktoken's encoding of GPT-2
GPT2_IDS = [15496, 266, 30570, 335, 11, 1105, 6184, 120, 358, 220, 2124, 628, 220, 340, 338, 262, 6303, 82, 960, 33768]
GPT2_IDS += [98, 17312, 105, 30325, 222, 11241, 1634, 1885, 29207, 44390, 3699, 1042, 197, 3228]


def random_model(shape: GPTConfig) -> GPT:
    """A model in which every parameter counts, biases and gains too."""
    torch.manual_seed(0)
    model = GPT(shape)
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def exported(model: GPT, folder: Path) -> Path:
    optimizers = Optimizers("adamw", recipe_for("nano", "adamw"), model, None, num_steps=10)
    state = RunState(3, 0, "0123abcd", {"model": dataclasses.asdict(model.config)})
    Checkpoints(folder / "run").save(model, optimizers, state)
    export(folder / "run", folder / "model")
    return folder / "model"


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        (GPTConfig("gpt2", 3, 4, 32, CONTEXT, 50257), "GPT2LMHeadModel"),
        (GPTConfig("gpt2", 3, 4, 32, CONTEXT, 257, bias=True), "GPT2LMHeadModel"),
        (GPTConfig("modern", 3, 4, 32, CONTEXT, 50257), "ApertusForCausalLM"),
        (GPTConfig("modern", 2, 3, 128, CONTEXT, 257), "ApertusForCausalLM"),
    ],
    ids=["gpt2", "gpt2 with biases", "modern", "modern, bytes"],
)
def test_exported_models_have_the_same_logits(shape: GPTConfig, kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = random_model(shape)
    folder = exported(model, tmp_path)
    there, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(there).__name__ == kind and there.dtype == torch.float32
    assert not any(report.values()), report
    tokens_BT = torch.randint(shape.vocab_size, (2, CONTEXT))
    with torch.no_grad():
        logits = there.eval()(tokens_BT).logits
        torch.testing.assert_close(logits, model(tokens_BT), **CLOSE)
    assert 1 < float(logits.abs().max()) < 10
    loss = there(tokens_BT, labels=tokens_BT).loss
    torch.testing.assert_close(loss, model(tokens_BT[:, :-1], tokens_BT[:, 1:]))
    # token by token, from the cache
    prompt = tokens_BT[:1, :5]
    generated = there.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    assert torch.equal(generated, model.generate(prompt, 20, temperature=0.0)[:, : generated.shape[1]])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = GPT2_IDS if shape.vocab_size == 50257 else get_tokenizer("bytes").encode(TEXT).tolist()
    assert tokenizer(TEXT)["input_ids"] == ids and tokenizer.decode(ids) == TEXT
    assert tokenizer.eos_token_id == shape.vocab_size - 1 == there.generation_config.eos_token_id
    assert tokenizer("a<|endoftext|>b")["input_ids"][1] == shape.vocab_size - 1 and len(tokenizer) == shape.vocab_size


@pytest.mark.parametrize("way", ["with a head", "without", "in several files", "bfloat16"])
def test_gpt2_of_transformers_has_the_same_logits(way: str, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 128, "n_positions": CONTEXT}
    there = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    with torch.no_grad():
        for parameter in there.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    options: dict[str, Any] = {"max_shard_size": "5MB"} if way == "in several files" else {}
    if way == "bfloat16":
        there = there.bfloat16()
    (there.transformer if way == "without" else there).save_pretrained(tmp_path, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (way == "in several files")
    model = GPT(GPTConfig("gpt2", 3, 4, 32, CONTEXT, 50257, bias=True))
    load_gpt2(model, str(tmp_path), ALONE)
    tokens_BT = torch.randint(50257, (2, CONTEXT))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT), there.float()(tokens_BT).logits, **CLOSE)
