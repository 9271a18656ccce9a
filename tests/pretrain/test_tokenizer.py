import lzma

import numpy as np
import pytest

from celo2.pretrain import tokenizer as tokenizer_module
from celo2.pretrain.prepare_data import EMBEDDED_TEXT
from celo2.pretrain.tokenizer import GPT2_RANKS, LONGEST_RUN, GPT2Tokenizer, get_tokenizer

tiktoken_load = pytest.importorskip("tiktoken.load")

TEXT = "The naive caf\u00e9 cost \u20ac12.50,\n\n  didn't it?\t\u65e5\u672c\u8a9e \U0001f600 <|endoftext|> end "


@pytest.mark.parametrize(("name", "size", "vocab_id"), [("bytes", 257, 256), ("gpt2", 50257, 0)])
def test_facts_and_round_trip(name: str, size: int, vocab_id: int) -> None:
    tokenizer = get_tokenizer(name)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot, tokenizer.vocab_id) == (
        name,
        size,
        size - 1,
        vocab_id,
    )
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.uint16
    assert tokenizer.eot not in ids
    assert tokenizer.decode([tokenizer.eot, *ids, tokenizer.eot]) == TEXT
    assert tokenizer.encode("").shape == (0,)
    for one, text in zip(tokenizer.encode_batch([TEXT, "", "a b"]), [TEXT, "", "a b"], strict=True):
        np.testing.assert_array_equal(one, tokenizer.encode(text))


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_token_bytes_add_up(name: str) -> None:
    tokenizer = get_tokenizer(name)
    counts = tokenizer.token_bytes()
    assert counts.dtype == np.int64
    assert counts.shape == (tokenizer.vocab_size,)
    assert counts[tokenizer.eot] == 0
    assert counts[: tokenizer.eot].min() == 1
    assert counts[tokenizer.encode(TEXT)].sum() == len(TEXT.encode())


def test_gpt2_known_ids() -> None:
    assert get_tokenizer("gpt2").encode("Hello world").tolist() == [15496, 995]


def test_gpt2_ranks_equal_tiktoken_reader(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    merges = GPT2_RANKS.with_name("vocab.bpe")
    expected = tiktoken_load.data_gym_to_mergeable_bpe_ranks(str(merges), str(GPT2_RANKS))
    assert tokenizer_module._gpt2_ranks(GPT2_RANKS) == expected


def test_gpt2_works_with_a_read_only_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "missing"))
    GPT2Tokenizer()
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_incomplete_utf8_is_replaced(name: str) -> None:
    tokenizer = get_tokenizer(name)
    first = tokenizer.encode("\U0001f600")[:1]
    assert tokenizer.decode(first) == "\ufffd"


def test_lone_surrogate_encodes() -> None:
    for name in ("bytes", "gpt2"):
        assert get_tokenizer(name).encode("a\ud800b").size > 2


@pytest.mark.parametrize("run", [" ", " \n", "\u3000", "a", "!"])
@pytest.mark.parametrize("end", ["", "end"])
def test_a_very_long_run_encodes_in_pieces(run: str, end: str) -> None:
    tokenizer = get_tokenizer("gpt2")
    text = "start" + run * (1_000_000 // len(run)) + end
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    first, second = tokenizer.encode_batch(["one", text])
    np.testing.assert_array_equal(first, tokenizer.encode("one"))
    np.testing.assert_array_equal(second, ids)


def test_text_without_a_very_long_run_has_the_tokens_of_tiktoken() -> None:
    tokenizer = get_tokenizer("gpt2")
    assert isinstance(tokenizer, GPT2Tokenizer)
    with lzma.open(EMBEDDED_TEXT, "rt", encoding="utf-8") as file:
        text = file.read()
    unspaced = "\u65e5\u672c\u8a9e\u3002" * LONGEST_RUN
    runs = [char * count for char in " \na7!" for count in (LONGEST_RUN // 2, LONGEST_RUN - 1, LONGEST_RUN)]
    texts = [text, text.replace("\n\n", " " * 3000 + "\n" * 3000), unspaced, *runs, TEXT, "", " "]
    texts += [f"it's 1a {char * (LONGEST_RUN - 8)} a1's" for char in " \na7!"]
    for one in texts:
        np.testing.assert_array_equal(tokenizer.encode(one), tokenizer._encoding.encode_ordinary(one))
    # one more, and the run is cut: the pieces have tokens of their own
    cut = tokenizer.encode("!" * (LONGEST_RUN + 1) + " x")
    np.testing.assert_array_equal(cut, np.concatenate([tokenizer.encode("!" * LONGEST_RUN), tokenizer.encode("! x")]))


def test_refusals(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"'llama' is unknown; allowed: 'bytes', 'gpt2'"):
        get_tokenizer("llama")
    with pytest.raises(ValueError, match=r"token id 257 .* \(0\.\.256\)"):
        get_tokenizer("bytes").decode([257])
    with pytest.raises(ValueError, match=r"vocab_id=3 is unknown; allowed: 0 \(gpt2\), 256 \(bytes\)"):
        tokenizer_module.vocabulary(3)
    damaged = tmp_path / "encoder.json"
    damaged.write_bytes(GPT2_RANKS.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"encoder\.json: not the published .* restore the file"):
        tokenizer_module._gpt2_ranks(damaged)
