"""Attention within documents: each is as if it stood alone, in the loss and in the gradients."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from celo2.pretrain.documents import attend, document_blocks, document_mask
from celo2.pretrain.model import ARCHS, GPT, GPTConfig

END = 30  # the last of 31
# a rest of a document, three whole ones, and one of a token
LENGTHS = (3, 5, 1, 7)


def window(seed: int = 0) -> Tensor:
    tokens_T = torch.randint(END, (sum(LENGTHS) + 1,), generator=torch.Generator().manual_seed(seed))
    tokens_T[[3, 8, 9]] = END
    return tokens_T


def models(arch: str) -> tuple[GPT, GPT]:
    """One with masks and one without, of the same weights, none of which are zero."""
    config = GPTConfig(arch, n_layer=2, n_head=2, head_dim=8, context=16, vocab_size=31)
    masked, plain = GPT(config, mask_documents=True), GPT(config)
    masked.init_weights(0)
    with torch.no_grad():
        for parameter in masked.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    plain.load_state_dict(masked.state_dict())
    return masked.double(), plain.double()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("recompute", [False, True])
def test_documents_together_are_documents_one_by_one(arch: str, recompute: bool) -> None:
    masked, plain = models(arch)
    for block in masked.blocks:
        block.recompute = recompute
    tokens_T = window()
    together = masked(tokens_T[None, :-1], tokens_T[None, 1:], "sum")
    together.backward()
    total, start = torch.zeros((), dtype=torch.float64), 0
    positions = None if plain.position_embedding is None else plain.position_embedding.weight
    for length in LENGTHS:
        end = start + length
        if positions is None:
            loss = plain(tokens_T[None, start:end], tokens_T[None, start + 1 : end + 1], "sum")
        else:
            # learned positions are those in the window
            moved = {"position_embedding.weight": positions.roll(-start, 0)}
            arguments = (tokens_T[None, start:end], tokens_T[None, start + 1 : end + 1], "sum")
            loss = torch.func.functional_call(plain, moved, arguments)
        total, start = total + loss, end
    total.backward()
    # the loss and the tables of RoPE are float32
    torch.testing.assert_close(together.double(), total, rtol=1e-6, atol=0)
    for (name, one), other in zip(masked.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("arch", ARCHS)
def test_another_document_makes_no_difference(arch: str) -> None:
    masked, plain = models(arch)
    one_BT, other_BT = window()[None, :-1], window()[None, :-1].clone()
    other_BT[0, 4:8] = window(1)[4:8] % END
    for model, alike in ((masked, True), (plain, False)):
        logits_TV, changed_TV = model(one_BT)[0], model(other_BT)[0]
        assert torch.equal(logits_TV[:4], changed_TV[:4]) and not torch.equal(logits_TV[4:8], changed_TV[4:8])
        assert torch.equal(logits_TV[8:], changed_TV[8:]) == alike


def test_a_window_of_one_document_is_causal() -> None:
    masked, plain = models("modern")
    tokens_BT = window()[None, :3]
    torch.testing.assert_close(masked(tokens_BT), plain(tokens_BT))
    assert copy.deepcopy(masked).mask_documents


def test_the_blocks_of_a_gpu_compile_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU but for the backward pass: a mask of blocks that goes into compiled blocks."""
    config = GPTConfig("modern", n_layer=1, n_head=2, head_dim=32, context=128, vocab_size=31)
    model = GPT(config, mask_documents=True)
    model.init_weights(0)
    tokens_BT = torch.randint(END + 1, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens_BT)
        monkeypatch.setattr(
            "celo2.pretrain.model.document_mask", lambda tokens, end: document_blocks(tokens, end, create_block_mask)
        )
        model.compile_parts()
        torch.testing.assert_close(model(tokens_BT), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("scale", [None, 0.12])
def test_the_blocks_of_a_gpu_mask_alike(scale: float | None) -> None:
    """`flex_attention` in eager mode, whose forward pass runs on a CPU too."""
    generator = torch.Generator().manual_seed(0)
    q_BHTK, k_BHTK, v_BHTK = torch.randn(3, 2, 2, 16, 8, generator=generator)
    tokens_BT = torch.stack((window()[:-1], window().flip(0)[:-1]))
    mask = document_mask(tokens_BT, END)
    with torch.no_grad():
        blocks = document_blocks(tokens_BT, END, create_block_mask)
        found = attend(q_BHTK, k_BHTK, v_BHTK, blocks, scale)
    torch.testing.assert_close(found, attend(q_BHTK, k_BHTK, v_BHTK, mask, scale))
    # by hand
    for row, tokens_T in enumerate(tokens_BT.tolist()):
        for query in range(16):
            begins = max((t for t in range(query + 1) if tokens_T[t] == END), default=0)
            allowed = [begins <= key <= query for key in range(16)]
            assert mask[row, 0, query].tolist() == allowed
            scores = q_BHTK[row, 0, query] @ k_BHTK[row, 0].T * (scale or 1 / math.sqrt(8))
            odds = scores.masked_fill(~torch.tensor(allowed), -math.inf).softmax(0)
            torch.testing.assert_close(found[row, 0, query], odds @ v_BHTK[row, 0])
