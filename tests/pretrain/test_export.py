"""Models of transformers from checkpoints, and first weights from GPT-2's public layout, without transformers."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from celo2.pretrain import train_gpt
from celo2.pretrain.checkpoint import Checkpoints, RunState
from celo2.pretrain.export import FILES, export, main
from celo2.pretrain.hf_layout import hf_tensors
from celo2.pretrain.hf_tokenizer import tokenizer_files
from celo2.pretrain.init_hf import load_gpt2
from celo2.pretrain.model import GPT, GPTConfig
from celo2.pretrain.optimizers import Optimizers
from celo2.pretrain.parallel import World
from celo2.pretrain.recipes import recipe_for
from celo2.pretrain.runlog import METRICS, read_metrics
from celo2.pretrain.tokenizer import GPT2_RANKS

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
SCRIPT = Path(train_gpt.__file__)
SMALL = ["--size", "nano", "--batch-tokens", "512", "--val-tokens", "512", "--sample-tokens", "4", "--steps", "2"]
trains = pytest.mark.needs("matplotlib", "tqdm", "tiktoken")


def config(arch: str = "gpt2", **changes: Any) -> GPTConfig:
    return dataclasses.replace(GPTConfig(arch, 2, 4, 8, 16, 257), **changes)


def random_model(shape: GPTConfig) -> GPT:
    """A model in which every parameter counts, biases and gains too."""
    model = GPT(shape)
    model.init_weights(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape))
            if name in ("token_embedding.weight", "lm_head.weight"):
                parameter[shape.vocab_size :] = 0
    return model


def checkpoint(folder: Path, model: GPT, step: int = 3) -> Path:
    optimizers = Optimizers("adamw", recipe_for("nano", "adamw"), model, None, num_steps=10)
    state = RunState(step, 0, "0123abcd", {"model": dataclasses.asdict(model.config)})
    Checkpoints(folder, keep=9).save(model, optimizers, state)
    return folder


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from celo2.pretrain.prepare_data import prepare_embedded

    return prepare_embedded("bytes", tmp_path_factory.mktemp("data") / "wikipedia-bytes")


@pytest.mark.parametrize("shape", [config(), config(bias=True), config(vocab_size=50257)], ids=["plain", "bias", "bpe"])
def test_gpt2_there_and_back(shape: GPTConfig, tmp_path: Path) -> None:
    model = random_model(shape)
    line = export(checkpoint(tmp_path / "run", model), tmp_path / "new" / "model")
    assert line.endswith(f"GPT2LMHeadModel, {model.num_params():,} parameters, of run 0123abcd, step 3")
    assert sorted(os.listdir(tmp_path / "new" / "model")) == sorted(FILES)
    modes = {path.stat().st_mode for path in (tmp_path / "new" / "model").iterdir()}
    assert len(modes) == 1
    again = GPT(shape)
    text = load_gpt2(again, str(tmp_path / "new" / "model"), ALONE)
    assert text.startswith(f"{tmp_path / 'new' / 'model'}, SHA-256 ") and len(text.split()[-1]) == 12
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
    tensors = load_file(tmp_path / "new" / "model" / "model.safetensors")
    assert tensors["transformer.wte.weight"].shape == (shape.vocab_size, 32)
    assert tensors["transformer.h.1.attn.c_attn.weight"].shape == (32, 96)
    assert torch.equal(tensors["transformer.h.1.mlp.c_fc.weight"].T, model.blocks[1].mlp.up.weight)
    bias = model.blocks[0].attention.qkv.bias
    assert torch.equal(tensors["transformer.h.0.attn.c_attn.bias"], torch.zeros(96) if bias is None else bias)
    # what a model without biases has is one with zeros
    if not shape.bias:
        biased = GPT(dataclasses.replace(shape, bias=True))
        load_gpt2(biased, str(tmp_path / "new" / "model"), ALONE)
        tokens_BT = torch.randint(shape.vocab_size, (2, 16))
        torch.testing.assert_close(biased(tokens_BT), model(tokens_BT))


def test_modern_has_unit_gains_and_its_queries_keys_and_values(tmp_path: Path) -> None:
    model = random_model(config("modern"))
    tensors = hf_tensors(model)
    for name in ("model.norm", "model.layers.0.attention_layernorm", "model.layers.1.self_attn.q_norm"):
        assert torch.equal(tensors.pop(f"{name}.weight"), torch.ones(8 if "q_norm" in name else 32))
    parts = [tensors[f"model.layers.1.self_attn.{kind}_proj.weight"] for kind in "qkv"]
    assert torch.equal(torch.cat(parts), model.blocks[1].attention.qkv.weight)
    assert torch.equal(tensors["lm_head.weight"], model.lm_head.weight)
    export(checkpoint(tmp_path / "run", model), tmp_path / "model")
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["architectures"] == ["ApertusForCausalLM"] and written["hidden_act"] == "gelu_pytorch_tanh"
    assert written["celo2"] == {"run": "0123abcd", "step": 3, "arch": "modern"}


def test_the_merges_are_the_published_ones() -> None:
    published = GPT2_RANKS.with_name("vocab.bpe")
    files = tokenizer_files("gpt2", 1024)
    merges = json.loads(files["tokenizer.json"])["model"]["merges"]
    assert len(merges) == 50_000 and merges[:5] == ["\u0120 t", "\u0120 a", "h e", "i n", "r e"]
    assert merges[6] == "\u0120t he" and merges[-1] == "\u0120g azed"
    if published.exists():
        assert merges == published.read_text(encoding="utf-8").strip().split("\n")[1:]


def test_a_folder_that_holds_something_else_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = checkpoint(tmp_path / "run", random_model(config()), step=3)
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    for name, message in (
        ("file", "file is a file: give a folder"),
        ("mine", "mine holds something else (notes.txt): give a new folder"),
        ("theirs", "theirs holds something else (a model that celo2 did not export): give a new folder"),
        ("run", "run holds something else (step-00000003): give a new folder"),
    ):
        assert main(["--run", str(run), "--export-hf", str(tmp_path / name)]) == 1
        assert capsys.readouterr().err == f"error: --export-hf {tmp_path}/{message}\n"
    # an empty one is filled, and an export gives way to the next; leavings of one that was killed go
    (tmp_path / "model").mkdir()
    left, other = tmp_path / ".model.0123abcd.tmp", tmp_path / ".model2.0123abcd.tmp"
    left.mkdir()
    other.mkdir()
    assert main(["--run", str(run), "--export-hf", str(tmp_path / "model")]) == 0
    assert not left.exists() and other.exists()
    other.rmdir()
    checkpoint(run, random_model(config()), step=5)
    assert main(["--run", str(run), "--export-hf", str(tmp_path / "model")]) == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["celo2"]["step"] == 5
    assert main(["--run", str(run / "step-00000003"), "--export-hf", str(tmp_path / "model")]) == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["celo2"]["step"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"run", "file", "mine", "theirs", "model"}


def test_the_program_names_what_is_wrong(tmp_path: Path) -> None:
    run = checkpoint(tmp_path / "run", random_model(config()))
    checkpoint(tmp_path / "fast", random_model(config("speedrun")))
    damaged = checkpoint(tmp_path / "damaged", random_model(config()))
    file = next((damaged / "step-00000003").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    foreign = checkpoint(tmp_path / "foreign", random_model(config()))
    done = json.loads((foreign / "step-00000003" / "DONE").read_text())
    done["identity"] = {"model": {"kind": "resnet"}}
    (foreign / "step-00000003" / "DONE").write_text(json.dumps(done))
    for name, message in (
        ("none", "none: holds no complete checkpoint; give the --out-dir of a run, or one of its step-* folders"),
        ("damaged", "__0_0.distcp is damaged"),
        ("foreign", "is no checkpoint of a language model of celo2-train"),
        ("fast", "arch 'speedrun' has no model in transformers: what can be exported is 'gpt2' and 'modern'"),
    ):
        with pytest.raises(ValueError) as caught:
            export(tmp_path / name, tmp_path / "model")
        assert message in str(caught.value)
    # as a process, in another folder, and on a disk that is full
    arguments = ("-m", "celo2.pretrain.export", "--run", "run", "--export-hf", "model")
    shown = process(*arguments, cwd=tmp_path)
    assert shown.returncode == 0 and shown.stdout.startswith("model, GPT2LMHeadModel, ") and shown.stderr == ""
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    code = (
        "import resource, signal, sys; from celo2.pretrain.export import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000));"
        "sys.exit(main(['--run', 'run', '--export-hf', 'model']))"
    )
    full = process("-c", code, cwd=tmp_path)
    assert full.returncode == 1 and full.stderr.startswith("error: cannot export to ") and full.stderr.count("\n") == 1
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "fast", "damaged", "foreign", "model"}
    assert run.is_dir()


# first weights


def write_gpt2(folder: Path, shape: GPTConfig, prefix: str = "transformer.", **changes: Any) -> GPT:
    """GPT-2's public layout, masks and all, of a random model with biases."""
    model = random_model(shape)
    export(checkpoint(folder.with_name("run"), model), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {prefix + name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors |= {f"{prefix}h.{index}.attn.bias": torch.ones(1, 1, 16, 16) for index in range(shape.n_layer)}
    tensors |= {f"{prefix}h.{index}.attn.masked_bias": torch.tensor(-1e4) for index in range(shape.n_layer)}
    tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    written = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(written))
    return model


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("files", [1, 3])
def test_public_names_and_several_files(prefix: str, files: int, tmp_path: Path) -> None:
    shape = config(bias=True, vocab_size=50257)
    folder = tmp_path / "gpt2"
    model = write_gpt2(folder, shape, prefix)
    if files > 1:
        tensors, where = load_file(folder / "model.safetensors"), {}
        for number in range(files):
            name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
            part = dict(list(tensors.items())[number::files])
            save_file(part, folder / name)
            where |= dict.fromkeys(part, name)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    again = GPT(shape)
    load_gpt2(again, str(folder), ALONE)
    tokens_BT = torch.randint(50257, (2, 16))
    assert torch.equal(again(tokens_BT), model(tokens_BT))
    # the padding as well, which nothing else may fill
    assert not again.token_embedding.weight[50257:].any()


def test_every_mismatch_is_named(tmp_path: Path) -> None:
    shape, folder = config(bias=True), tmp_path / "gpt2"
    write_gpt2(folder, shape)
    written = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")

    def refused(message: str, other: GPTConfig = shape, source: str = "gpt2") -> None:
        with pytest.raises(ValueError) as caught:
            load_gpt2(GPT(other), str(tmp_path / source), ALONE)
        assert str(caught.value).startswith(f"--init-hf {tmp_path / source}: ") and message in str(caught.value)

    refused("arch is 'gpt2' there and 'modern' here", config("modern"))
    refused("it has biases, and this model none: give --bias", config())
    text = "n_layer is 2 there and 3 here; n_embd is 32 there and 64 here; n_positions is 16 there and 8 here"
    refused(text, config(n_layer=3, head_dim=16, context=8))
    refused("vocab_size is 257 there and 50257 here", config(vocab_size=50257))
    for key, value in (
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 100),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
    ):
        (folder / "config.json").write_text(json.dumps(written | {key: value}))
        refused(f"{key} is {value!r} there")
    # the layers of a size are named
    nano = written | {"n_layer": 12, "n_head": 12, "n_embd": 768}
    (folder / "config.json").write_text(json.dumps(nano))
    refused("(its layers are those of --size small)")
    (folder / "config.json").write_text(json.dumps(written))
    save_file({name: t for name, t in tensors.items() if "h.1.mlp" not in name}, folder / "model.safetensors")
    refused("tensors are missing, ['h.1.mlp.c_fc.bias', 'h.1.mlp.c_fc.weight'")
    save_file(tensors | {"h.0.crossattention.weight": torch.ones(2)}, folder / "model.safetensors")
    refused("or unknown, ['h.0.crossattention.weight']")
    wrong = tensors["transformer.h.0.mlp.c_fc.weight"].T.contiguous()
    save_file(tensors | {"transformer.h.0.mlp.c_fc.weight": wrong}, folder / "model.safetensors")
    refused("h.0.mlp.c_fc.weight has shape (128, 32) there and (32, 128) here")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    refused("")
    (folder / "config.json").write_text("[")
    refused("config.json is damaged")
    (folder / "config.json").write_text(json.dumps(written))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused("holds no model.safetensors, in which this program reads weights")
    refused("is a file: give the folder", source="gpt2/config.json")
    with pytest.raises(ValueError, match=r"--init-hf gpt2: no such folder; an id of the hub is owner/name, such as"):
        load_gpt2(GPT(shape), "gpt2", ALONE)


def test_an_id_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    shape, folder, asked = config(bias=True), tmp_path / "gpt2", []
    model = write_gpt2(folder, shape)

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.append((repo, options["revision"], options["local_files_only"]))
        assert {"config.json", "model.safetensors"} <= set(options["allow_patterns"])
        if repo == "no/such":
            raise FileNotFoundError("404\nmore")
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    again = GPT(shape)
    assert load_gpt2(again, "me/gpt2@v1", ALONE).startswith("me/gpt2@v1, SHA-256 ")
    assert asked == [("me/gpt2", "v1", False)]
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    with pytest.raises(ValueError, match=r"^--init-hf no/such: 'no/such' could not .*\(FileNotFoundError: 404\)"):
        load_gpt2(again, "no/such", ALONE)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"'me/gpt2' is a hub id: pip install huggingface_hub, or give a folder"):
        load_gpt2(again, "me/gpt2", ALONE)


# in the trainer


@trains
def test_a_run_exports_when_it_ends_and_begins_from_one(data: Path, tmp_path: Path, capsys: Any) -> None:
    def trained(out: str, *options: object) -> int:
        arguments = [*SMALL, "--data", str(data), "--out-dir", str(tmp_path / out), *map(str, options)]
        return train_gpt.main(arguments)

    def validation(out: str) -> list[float]:
        return [r["loss"] for r in read_metrics(tmp_path / out / METRICS) if r["kind"] == "val"]

    assert trained("first") == 0
    capsys.readouterr()
    # a finished run, which trains no further
    model = tmp_path / "model"
    assert trained("first", "--resume", "auto", "--export-hf", model) == 0
    printed = capsys.readouterr().out
    assert "resumed at step 2 of 2" in printed
    assert f"export:     {model}, GPT2LMHeadModel, 853,248 parameters" in printed
    assert trained("second", "--init-hf", model, "--seed", "7", "--export-hf", tmp_path / "next") == 0
    assert f"weights:    began as those of {model}, SHA-256 " in capsys.readouterr().out
    assert validation("second")[0] == validation("first")[-1]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "next"))
    assert not torch.equal(one["transformer.wte.weight"], two["transformer.wte.weight"])
    identity = Checkpoints(tmp_path / "second").latest().identity
    assert identity["weights_of"].startswith(str(model))
    # a run that goes on does not need them again
    shutil.rmtree(model)
    assert trained("second", "--seed", "7", "--resume", "auto", "--init-hf", model) == 0
    capsys.readouterr()
    # refused before any training
    for options, message in (
        (["--arch", "speedrun", "--export-hf", str(model)], "error: arch 'speedrun' has no model in transformers"),
        (["--export-hf", str(data)], f"error: --export-hf {data} holds something else"),
        (["--init-hf", str(tmp_path / "nowhere")], "error: --init-hf "),
    ):
        assert trained("third", *options) == 1
        error = capsys.readouterr().err
        assert error.startswith(message) and error.count("\n") == 1
    with pytest.raises(SystemExit):
        trained("third", "--init-hf", "a/b", "--init-from", "c")
    assert "not allowed with argument" in capsys.readouterr().err


@trains
@pytest.mark.dist
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_on_two_processes(data: Path, tmp_path: Path, parallel: str) -> None:
    source = tmp_path / "gpt2"
    model = random_model(dataclasses.replace(config(bias=True), n_layer=4, head_dim=32, context=256))
    export(checkpoint(tmp_path / "run", model), source)
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, *SMALL, "--bias")
    options = ("--data", data, "--parallel", parallel, "--init-hf")
    done = process(*ranks, *options, source, "--out-dir", tmp_path / "two", "--export-hf", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("export:     ") == 1
    alone = [*SMALL, "--bias", *map(str, options[:2]), "--init-hf", str(source), "--out-dir", str(tmp_path / "one")]
    assert train_gpt.main(alone) == 0
    first, second = (
        [r["loss"] for r in read_metrics(tmp_path / out / METRICS) if r["kind"] == "val"] for out in ("two", "one")
    )
    assert first == pytest.approx(second, abs=2e-4) and first[0] == pytest.approx(second[0], abs=1e-5)
    # what the run exported is what its checkpoint gives
    export(tmp_path / "two", tmp_path / "again")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    if parallel == "fsdp":
        # both ranks refuse alike, and by the message
        bad = process(*ranks[:-1], *options, source, "--out-dir", tmp_path / "bad")
        assert bad.returncode != 0 and bad.stderr.count("it has biases, and this model none: give --bias") == 2
