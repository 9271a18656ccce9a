"""The model of the harness: counts, causality, positions, initialisation, sampling, refusals."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from celo2 import MatrixView
from celo2.pretrain.model import ARCHS, GPT, SIZES, GPTConfig, model_config, qk_norm, rope_tables, rotate

TINY = {
    "gpt2": GPTConfig("gpt2", n_layer=2, n_head=3, head_dim=8, context=16, vocab_size=31),
    "modern": GPTConfig("modern", n_layer=2, n_head=3, head_dim=8, context=16, vocab_size=31),
    "speedrun": GPTConfig("speedrun", n_layer=2, n_head=3, head_dim=8, context=16, vocab_size=31),
}


def tiny(arch: str, seed: int = 0) -> GPT:
    model = GPT(TINY[arch])
    model.init_weights(seed)
    if arch == "speedrun":
        # it begins with zeros, through which nothing shows
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not parameter.any():
                    parameter.normal_(0.0, 0.5 if "bias" in name else 0.2, generator=generator)
    return model


def random_tokens(*shape: int, seed: int = 0, vocab: int = 31) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def on_meta(config: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config)


def gpt2_count(config: GPTConfig) -> int:
    """Parameters of a tied GPT-2, written out from its layers."""
    d, bias = config.width, int(config.bias)
    norm = d + bias * d
    attention = (d * 3 * d + bias * 3 * d) + (d * d + bias * d)
    mlp = (d * 4 * d + bias * 4 * d) + (4 * d * d + bias * d)
    return (config.vocab_size + config.context) * d + config.n_layer * (2 * norm + attention + mlp) + norm


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("small", 124_439_808),
        ("medium", 354_823_168),
        ("large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("xl", 1_315_723_264),
    ],
)
def test_gpt2_has_the_published_count_with_biases(size: str, count: int) -> None:
    assert on_meta(model_config(size, "gpt2", bias=True)).num_params() == count


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_gpt2_count_equals_the_closed_form(size: str, bias: bool) -> None:
    config = model_config(size, "gpt2", bias=bias)
    assert on_meta(config).num_params() == gpt2_count(config)


@pytest.mark.parametrize(
    ("size", "millions"), [("30m", 49.2), ("small", 162.1), ("xl", 1413.8)], ids=["30m", "small", "xl"]
)
def test_modern_count(size: str, millions: float) -> None:
    config = model_config(size, "modern")
    count = on_meta(config).num_params()
    assert count == 12 * config.n_layer * config.width**2 + 2 * config.vocab_size * config.width
    assert round(count / 1e6, 1) == millions


def test_30m_has_29_9_million_with_one_embedding() -> None:
    model = on_meta(model_config("30m"))
    assert round((model.num_params() - model.lm_head.weight.numel()) / 1e6, 1) == 29.9


def test_default_architectures_and_head_shapes() -> None:
    assert {size for size in SIZES if model_config(size).arch == "modern"} == {"30m"}
    shapes = {size: (model_config(size, "modern").n_head, model_config(size, "modern").head_dim) for size in SIZES}
    assert shapes == {
        "nano": (4, 32),
        "30m": (3, 128),
        "small": (6, 128),
        "medium": (8, 128),
        "large": (10, 128),
        "gpt2-xl": (25, 64),
        "xl": (16, 128),
    }
    nano = model_config("nano")
    assert (nano.vocab_size, nano.n_layer, nano.width, nano.context) == (257, 4, 128, 256)
    assert SIZES["nano"].tokenizer == "bytes"
    for size in SIZES:
        assert model_config(size, "gpt2").width == model_config(size, "modern").width


@pytest.mark.parametrize("arch", ARCHS)
def test_a_later_token_does_not_change_earlier_logits(arch: str) -> None:
    model, tokens_BT = tiny(arch), random_tokens(2, 16)
    logits_BTV = model(tokens_BT)
    changed_BT = tokens_BT.clone()
    changed_BT[:, 9] = (changed_BT[:, 9] + 1) % 31
    changed_BTV = model(changed_BT)
    torch.testing.assert_close(changed_BTV[:, :9], logits_BTV[:, :9], rtol=0, atol=1e-6)
    assert ((changed_BTV[:, 9:] - logits_BTV[:, 9:]).abs().amax(dim=(0, 2)) > 1e-5).all()


@pytest.mark.parametrize("arch", ARCHS)
def test_order_matters(arch: str) -> None:
    model, tokens_BT = tiny(arch), torch.tensor([[1, 2, 3, 4]])
    swapped_BT = torch.tensor([[2, 1, 3, 4]])
    assert (model(tokens_BT)[0, -1] - model(swapped_BT)[0, -1]).abs().max() > 1e-5


def test_rope_products_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q_K, k_K = torch.randn(2, 8, generator=generator)
    cos_TK, sin_TK = rope_tables(12, 8, torch.device("cpu"))
    q_TK, k_TK = rotate(q_K.expand(12, 8), cos_TK, sin_TK), rotate(k_K.expand(12, 8), cos_TK, sin_TK)
    products = q_TK @ k_TK.T
    for distance in (0, 1, 5):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert (products[1:, 0] - products[0, 0]).abs().min() > 1e-3
    torch.testing.assert_close(q_TK.norm(dim=-1), q_K.norm().expand(12))


def test_rope_turns_pairs_across_the_halves_by_base_1e4() -> None:
    cos_TK, sin_TK = rope_tables(4, 4, torch.device("cpu"))
    turned = rotate(torch.tensor([1.0, 0.0, 0.0, 1.0]).expand(4, 4), cos_TK, sin_TK)[3]
    expected = torch.tensor([math.cos(3.0), -math.sin(0.03), math.sin(3.0), math.cos(0.03)])
    torch.testing.assert_close(turned, expected)


def test_qk_norm_makes_the_scale_of_queries_and_keys_irrelevant() -> None:
    x_BHTK = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(qk_norm(x_BHTK).square().mean(-1), torch.ones(2, 3, 5), rtol=0, atol=1e-4)
    model, tokens_BT = tiny("modern"), random_tokens(2, 16)
    logits_BTV = model(tokens_BT)
    width = model.config.width
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight[: 2 * width].mul_(7.0)
    torch.testing.assert_close(model(tokens_BT), logits_BTV, rtol=1e-3, atol=1e-4)


def test_speedrun_equals_one_written_out_by_hand() -> None:
    """In float64, from the facts of the track: one head at a time, no function of the harness."""
    model = tiny("speedrun").double()
    w = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tokens_BT = random_tokens(2, 7)

    def norm(x: Tensor, gain: Tensor | None = None) -> Tensor:
        scaled = x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
        return scaled if gain is None else scaled * gain

    def turn(x_TK: Tensor) -> Tensor:
        turned = x_TK.clone()
        # heads of 8: two pairs turn, at 1 and at 1 / 1024 a token, two stay
        for pair, frequency in enumerate((1.0, 1 / 1024)):
            for t in range(7):
                c, s = math.cos(t * frequency), math.sin(t * frequency)
                a, b = x_TK[t, pair].item(), x_TK[t, pair + 4].item()
                turned[t, pair], turned[t, pair + 4] = a * c - b * s, b * c + a * s
        return turned

    for tokens_T, logits_TV in zip(tokens_BT, model(tokens_BT), strict=True):
        x_TD = norm(w["token_embedding.weight"][tokens_T], w["embedding_norm.weight"])
        for block in ("blocks.0.", "blocks.1."):
            y_TD = norm(x_TD, w[f"{block}attention_norm.weight"])
            qkv = y_TD @ w[f"{block}attention.qkv.weight"].T + w[f"{block}attention.qkv.bias"]
            heads = []
            for head in range(3):
                q, k, v = (qkv[:, 24 * part + 8 * head :][:, :8] for part in range(3))
                scores = 0.12 * turn(norm(q)) @ turn(norm(k)).T
                heads.append(scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf).softmax(-1) @ v)
            x_TD = x_TD + torch.cat(heads, -1) @ w[f"{block}attention.out.weight"].T + w[f"{block}attention.out.bias"]
            y_TD = norm(x_TD, w[f"{block}mlp_norm.weight"]) @ w[f"{block}mlp.up.weight"].T + w[f"{block}mlp.up.bias"]
            x_TD = x_TD + y_TD.clamp_min(0) ** 2 @ w[f"{block}mlp.down.weight"].T + w[f"{block}mlp.down.bias"]
        z_TV = norm(x_TD, w["final_norm.weight"]) @ w["lm_head.weight"].T + w["lm_head.bias"]
        expected_TV = 15 * z_TV / (z_TV**2 + 225).sqrt()
        # positions and the norm of queries are float32 in the model
        torch.testing.assert_close(logits_TV, expected_TV, rtol=0, atol=1e-5)


def test_speedrun_begins_as_its_track_does() -> None:
    config = model_config("small", "speedrun")
    assert (config.n_layer, config.n_head, config.head_dim, config.context) == (12, 6, 128, 1024)
    # written out: embedding, head with biases, and of a block two norms, four matrices with biases
    d, v = 768, 50257
    block = 2 * d + 4 * d * d + 4 * d + 8 * d * d + 5 * d
    assert on_meta(config).num_params() == v * d + (v * d + v) + 12 * block + 2 * d
    model = GPT(GPTConfig("speedrun", n_layer=1, n_head=4, head_dim=32, context=8, vocab_size=300))
    model.init_weights(0)
    assert not model.lm_head.weight.any() and not model.blocks[0].attention.out.weight.any()
    assert not model.blocks[0].mlp.down.weight.any() and not model.lm_head.bias.any()
    assert model.token_embedding.weight[:300].std().item() == pytest.approx(1.0, rel=0.03)
    for weight in (model.blocks[0].attention.qkv.weight, model.blocks[0].mlp.up.weight):
        assert weight.std().item() == pytest.approx(math.sqrt(0.33 / 128), rel=0.03)
    assert model(random_tokens(1, 8), random_tokens(1, 8)).item() == pytest.approx(math.log(300), rel=1e-5)


def test_attention_equals_one_written_out_by_hand() -> None:
    """The rows of qkv are query, key, value, each split in heads; out reads the heads in order."""
    attention = tiny("gpt2").blocks[0].attention
    x_TD = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    query, key, value = attention.qkv.weight.split(24)
    heads = []
    for head in range(3):
        rows = slice(8 * head, 8 * head + 8)
        scores = (x_TD @ query[rows].T) @ (x_TD @ key[rows].T).T / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ (x_TD @ value[rows].T))
    expected = torch.cat(heads, dim=-1) @ attention.out.weight.T
    torch.testing.assert_close(attention(x_TD[None], None)[0], expected)


@pytest.mark.parametrize("arch", ARCHS)
def test_loss_is_the_cross_entropy_of_the_logits_and_sum_is_n_means(arch: str) -> None:
    model, tokens_BT, targets_BT = tiny(arch), random_tokens(3, 10), random_tokens(3, 10, seed=1)
    mean = model(tokens_BT, targets_BT)
    log_probability = model(tokens_BT).log_softmax(-1).gather(-1, targets_BT[..., None])
    torch.testing.assert_close(mean, -log_probability.mean())
    torch.testing.assert_close(model(tokens_BT, targets_BT, reduction="sum"), mean * 30)
    assert mean.shape == () and mean.dtype == torch.float32


@pytest.mark.parametrize("arch", ARCHS)
def test_recomputed_blocks_and_a_loss_in_chunks_change_memory_and_not_numbers(arch: str) -> None:
    plain, tokens_BT, targets_BT = tiny(arch), random_tokens(3, 10), random_tokens(3, 10, seed=1)
    targets_BT[0, :4] = -100
    sparing = GPT(plain.config, recompute=True, loss_chunks=4)
    sparing.load_state_dict(plain.state_dict())
    kept: dict[GPT, int] = {}
    for model in (plain, sparing):
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(tokens_BT, targets_BT)
        loss.backward()
        kept[model] = sum(sizes)
        assert loss.item() == pytest.approx(plain(tokens_BT, targets_BT).item(), rel=1e-6)
    for one, other in zip(plain.parameters(), sparing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)
    assert kept[sparing] < kept[plain] / 5
    with torch.no_grad():
        torch.testing.assert_close(sparing(tokens_BT, targets_BT, "sum"), plain(tokens_BT, targets_BT, "sum"))
    with pytest.raises(ValueError, match="loss_chunks=0"):
        GPT(plain.config, loss_chunks=0)


@pytest.mark.parametrize("arch", ARCHS)
def test_bfloat16_gives_bfloat16_logits_and_a_float32_loss(arch: str) -> None:
    model, tokens_BT = tiny(arch), random_tokens(2, 8)
    expected = model(tokens_BT, tokens_BT)
    model.to(torch.bfloat16)
    assert model(tokens_BT).dtype == (torch.float32 if arch == "speedrun" else torch.bfloat16)
    loss = model(tokens_BT, tokens_BT)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_parameter_gets_a_finite_gradient(arch: str) -> None:
    model, tokens_BT = tiny(arch), random_tokens(2, 16)
    model(tokens_BT, tokens_BT).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_tied_head_shares_storage_and_stays_tied() -> None:
    model = tiny("gpt2")
    assert model.lm_head.weight is model.token_embedding.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    for other in (copy.deepcopy(model), on_meta(TINY["gpt2"]).to_empty(device="cpu"), tiny("gpt2").double()):
        assert other.lm_head.weight is other.token_embedding.weight


def test_modern_is_untied_and_has_no_vectors() -> None:
    model = tiny("modern")
    assert model.lm_head.weight.data_ptr() != model.token_embedding.weight.data_ptr()
    assert all(parameter.ndim == 2 for parameter in model.parameters())
    assert all(name.endswith("weight") for name, _ in model.named_parameters())


def test_bias_false_leaves_only_gains_as_vectors() -> None:
    vectors = [name for name, parameter in tiny("gpt2").named_parameters() if parameter.ndim == 1]
    assert len(vectors) == 2 * 2 + 1 and all(name.endswith("norm.weight") for name in vectors)


@pytest.mark.parametrize("arch", ARCHS)
def test_init_is_a_function_of_the_seed_alone(arch: str) -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        model = GPT(TINY[arch])
        model.init_weights(seed)
        return model.state_dict()

    first = drawn(3)
    state = torch.get_rng_state()
    from_meta = on_meta(TINY[arch]).to_empty(device="cpu")
    from_meta.init_weights(3)
    assert torch.equal(torch.get_rng_state(), state)
    other = drawn(4)
    for name, value in from_meta.state_dict().items():
        assert torch.equal(value, first[name]), name
        # gains, and what begins with zeros
        constant = name.endswith("norm.weight") or not value.any()
        assert torch.equal(value, other[name]) == constant, name


def test_weights_are_nan_until_they_are_filled() -> None:
    assert GPT(TINY["modern"])(random_tokens(1, 4)).isnan().all()


def test_gpt2_init_scales() -> None:
    model = GPT(model_config("nano", bias=True))
    model.init_weights(0)
    residual = 0.02 / math.sqrt(2 * 4)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            expected = residual if name.endswith(("out.weight", "down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name


def test_modern_init_scales() -> None:
    config = GPTConfig("modern", n_layer=1, n_head=2, head_dim=64, context=8, vocab_size=300)
    model = GPT(config)
    model.init_weights(0)
    attention, mlp = model.blocks[0].attention, model.blocks[0].mlp
    limits = [
        (attention.qkv, math.sqrt(6 / (3 * 2 * 128 + 3 * 2 * 64))),
        (attention.out, math.sqrt(6 / (2 * 64 + 2 * 128))),
        (mlp.up, math.sqrt(6 / (5 * 128))),
        (mlp.down, math.sqrt(6 / (5 * 128))),
    ]
    for linear, limit in limits:
        assert 0.99 * limit < linear.weight.abs().max().item() <= limit
        assert linear.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.03)
    for embedding in (model.token_embedding, model.lm_head):
        assert embedding.weight.std().item() == pytest.approx(1 / math.sqrt(128), rel=0.03)


@pytest.mark.parametrize("arch", ARCHS)
def test_matrix_views_cover_the_attention_weights(arch: str) -> None:
    model = tiny(arch)
    views = model.matrix_views()
    parameters = dict(model.named_parameters())
    assert set(views) == {name for name in parameters if ".attention." in name and "bias" not in name}
    for name, view in views.items():
        rows, columns = parameters[name].shape
        if name.endswith("qkv.weight"):
            assert view == MatrixView(split=3, heads=3, axis=0)
            assert rows == view.split * view.heads * 8 and columns == 24
        else:
            assert view == MatrixView(heads=3, axis=1)
            assert columns == view.heads * 8 and rows == 24


def test_flops_per_token_by_hand() -> None:
    blocks, head, attention = 2 * 12 * 24**2, 31 * 24, 12 * 2 * 24 * 16
    assert tiny("modern").flops_per_token() == 6 * (blocks + head) + attention
    gains = 5 * 24
    assert tiny("gpt2").flops_per_token() == 6 * (blocks + gains + head) + attention


@pytest.mark.parametrize("arch", ARCHS)
def test_generate_replays_and_runs_past_the_context(arch: str) -> None:
    model, prompt_BT = tiny(arch), random_tokens(2, 5)
    first = model.generate(prompt_BT, 20, generator=torch.Generator().manual_seed(1))
    again = model.generate(prompt_BT, 20, generator=torch.Generator().manual_seed(1))
    other = model.generate(prompt_BT, 20, generator=torch.Generator().manual_seed(2))
    assert first.shape == (2, 25) and torch.equal(first[:, :5], prompt_BT)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert model.training and not first.requires_grad
    model.eval()
    model.generate(prompt_BT, 1)
    assert not model.training


def test_greedy_and_top_1_take_the_likeliest_token() -> None:
    model, tokens_BT = tiny("modern"), random_tokens(2, 5)
    greedy = model.generate(tokens_BT, 15, temperature=0.0)
    assert torch.equal(greedy, model.generate(tokens_BT, 15, top_k=1))
    for _ in range(15):
        tokens_BT = torch.cat((tokens_BT, model(tokens_BT[:, -16:])[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(greedy, tokens_BT)


def test_top_k_samples_among_the_k_likeliest() -> None:
    model, prompt_BT = tiny("modern"), torch.zeros(400, 1, dtype=torch.int64)
    allowed = model(prompt_BT[:1])[0, -1].topk(3).indices
    sampled = model.generate(prompt_BT, 1, temperature=5.0, top_k=3, generator=torch.Generator().manual_seed(0))
    assert set(sampled[:, 1].tolist()) == set(allowed.tolist())
    assert model.generate(prompt_BT, 1, top_k=1000).shape == (400, 2)


def test_sampling_follows_the_softmax_at_the_temperature() -> None:
    model, prompt_BT = tiny("gpt2"), torch.zeros(20_000, 1, dtype=torch.int64)
    with torch.no_grad():
        model.token_embedding.weight.mul_(30.0)
    sampled = model.generate(prompt_BT, 1, temperature=0.5, generator=torch.Generator().manual_seed(0))[:, 1]
    expected = F.softmax(model(prompt_BT[:1])[0, -1] / 0.5, -1)
    assert expected.max() > 0.1
    torch.testing.assert_close(torch.bincount(sampled, minlength=31) / 20_000, expected, rtol=0, atol=0.02)


def test_a_tiny_model_learns() -> None:
    for arch in ARCHS:
        model, tokens_BT = tiny(arch), random_tokens(4, 16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            model(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()
            optimizer.step()
        assert model(tokens_BT[:, :-1], tokens_BT[:, 1:]).item() < 0.5


def test_refusals_name_the_value_and_the_allowed() -> None:
    with pytest.raises(ValueError, match="'huge'.*nano, 30m, small, medium, large, gpt2-xl, xl"):
        model_config("huge")
    with pytest.raises(ValueError, match="'llama'.*gpt2, modern"):
        model_config("nano", "llama")
    with pytest.raises(ValueError, match="bias=True.*arch='gpt2'"):
        model_config("30m", bias=True)
    with pytest.raises(ValueError, match="n_layer=0"):
        GPTConfig("gpt2", 0, 1, 8, 16, 31)
    with pytest.raises(ValueError, match="head_dim=7: .*head_dim that 2 divides"):
        GPTConfig("modern", 1, 1, 7, 16, 31)
    model = tiny("gpt2")
    with pytest.raises(ValueError, match=r"\(1, 17\).*context = 16"):
        model(random_tokens(1, 17))
    with pytest.raises(ValueError, match=r"\(5,\)"):
        model(random_tokens(5))
    with pytest.raises(ValueError, match=r"targets have shape \(1, 4\)"):
        model(random_tokens(1, 5), random_tokens(1, 4))
    with pytest.raises(ValueError, match="'none'.*mean, sum"):
        model(random_tokens(1, 5), random_tokens(1, 5), reduction="none")
    with pytest.raises(ValueError, match="token_embedding.weight is on the meta device.*to_empty"):
        on_meta(TINY["gpt2"]).init_weights(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": -1}, "count=-1"),
        ({"count": 1, "temperature": -0.1}, "temperature=-0.1"),
        ({"count": 1, "temperature": math.nan}, "temperature=nan"),
        ({"count": 1, "top_k": 0}, "top_k=0"),
    ],
)
def test_generate_refuses(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny("gpt2").generate(random_tokens(1, 2), **arguments)


def test_generate_refuses_an_empty_prompt() -> None:
    with pytest.raises(ValueError, match=r"\(1, 0\)"):
        tiny("gpt2").generate(torch.zeros(1, 0, dtype=torch.int64), 1)


# the padded vocabulary

PADDED = {arch: GPTConfig(arch, n_layer=1, n_head=2, head_dim=8, context=16, vocab_size=383) for arch in ARCHS}


class Plain(GPTConfig):
    """The same shape without padding."""

    @property
    def padded_vocab_size(self) -> int:
        return self.vocab_size


def padded_and_plain(arch: str, **options: int) -> tuple[GPT, GPT]:
    config = PADDED[arch]
    models = GPT(config, **options), GPT(Plain(**dataclasses.asdict(config)), **options)
    for model in models:
        model.init_weights(3)
    return models


def test_which_vocabularies_are_padded() -> None:
    sizes = {
        vocab: dataclasses.replace(PADDED["gpt2"], vocab_size=vocab).padded_vocab_size for vocab in (31, 257, 50257)
    }
    assert sizes == {31: 31, 257: 257, 50257: 50304}
    assert all(model_config(size).padded_vocab_size in (257, 50304) for size in SIZES)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("arch", ARCHS)
def test_padding_changes_no_loss_gradient_or_logit(arch: str, chunks: int) -> None:
    padded, plain = padded_and_plain(arch, loss_chunks=chunks)
    tokens_BT, targets_BT = random_tokens(2, 16, vocab=383), random_tokens(2, 16, seed=1, vocab=383)
    assert padded.lm_head.weight.shape[0] == 384 and padded.num_params() == plain.num_params()
    assert padded.flops_per_token() == plain.flops_per_token()
    assert (padded.lm_head.weight[383:] == 0).all() and (padded.token_embedding.weight[383:] == 0).all()
    # the same weights, drawn by the same stream
    for (name, p), (_, q) in zip(padded.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(p[: len(q)], q), name
    # what is in the rows makes no difference
    with torch.no_grad():
        for module in (padded.token_embedding, padded.lm_head):
            module.weight[383:] = 1e9
    losses = [model(tokens_BT, targets_BT) for model in (padded, plain)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-6)
    for loss in losses:
        loss.backward()
    for (name, p), (_, q) in zip(padded.named_parameters(), plain.named_parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad[: len(q)], q.grad, rtol=0, atol=1e-6, msg=name)
        assert not p.grad[len(q) :].any(), name
    logits_BTV = padded(tokens_BT)
    assert logits_BTV.shape == (2, 16, 383)
    torch.testing.assert_close(logits_BTV, plain(tokens_BT), rtol=0, atol=1e-6)
    assert int(padded.generate(tokens_BT, 8, temperature=0.0).max()) < 383


@pytest.mark.parametrize("how", ["compiled", "autocast"])
@pytest.mark.parametrize("arch", ARCHS)
def test_padding_changes_nothing_compiled_or_cast(arch: str, how: str) -> None:
    padded, plain = padded_and_plain(arch)
    with torch.no_grad():
        padded.lm_head.weight[383:] = 1e9
    tokens_BT, targets_BT = random_tokens(2, 16, vocab=383), random_tokens(2, 16, seed=1, vocab=383)
    call = torch.compile(padded, backend="aot_eager") if how == "compiled" else padded
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        losses = call(tokens_BT, targets_BT), plain(tokens_BT, targets_BT)
    # matrix products of another shape may round otherwise
    atol = 1e-6 if how == "compiled" else 1e-2
    torch.testing.assert_close(*losses, rtol=0, atol=atol)
    for loss in losses:
        loss.backward()
    gradient, expected = padded.lm_head.weight.grad, plain.lm_head.weight.grad
    assert gradient is not None and expected is not None
    torch.testing.assert_close(gradient[:383], expected, rtol=0, atol=atol)
    assert not gradient[383:].any()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_weights_without_padding_load(arch: str, assign: bool) -> None:
    padded, plain = padded_and_plain(arch)
    expected = plain.state_dict()
    padded.init_weights(4)
    # a copy's hooks are the copy's
    padded = copy.deepcopy(padded)
    padded.load_state_dict(plain.state_dict(), assign=assign)
    assert (padded.lm_head.weight is padded.token_embedding.weight) == (arch == "gpt2")
    assert torch.equal(padded.lm_head.weight[:383], expected["lm_head.weight"])
    assert (padded.lm_head.weight[383:] == 0).all()
    assert expected["lm_head.weight"].shape[0] == 383
    narrow = {name: value[:100] if "lm_head" in name else value for name, value in plain.state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch for lm_head.weight"):
        padded.load_state_dict(narrow)


@pytest.mark.parametrize("opt", ["adamw", "celo2", "celo2-base", "muon"])
def test_padding_in_training(opt: str) -> None:
    from celo2.pretrain.optimizers import Optimizers
    from celo2.pretrain.recipes import recipe_for

    model, _ = padded_and_plain("gpt2")
    optimizers = Optimizers(opt, recipe_for("nano", opt), model)
    assert sum(optimizers.parameters_by_rule().values()) == model.num_params()
    for seed in range(3):
        loss = model(random_tokens(2, 16, seed=seed, vocab=383), random_tokens(2, 16, seed=seed + 9, vocab=383))
        optimizers.zero_grad()
        loss.backward()
        optimizers.step()
    padding_PD = model.lm_head.weight[383:]
    assert padding_PD.isfinite().all()
    # the learned rule moves what has no gradient, and nothing reads it
    assert bool(padding_PD.any()) == (opt == "celo2-base")
    tokens_BT = random_tokens(2, 16, vocab=383)
    before = model(tokens_BT, tokens_BT)
    with torch.no_grad():
        padding_PD.zero_()
    torch.testing.assert_close(model(tokens_BT, tokens_BT), before, rtol=0, atol=0)
