"""Tokenizers of the pretraining harness: raw bytes, and the GPT-2 byte-pair encoding from bundled files."""

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
GPT2_RANKS = Path(__file__).resolve().parent / "assets" / "gpt2" / "encoder.json"
LONGEST_RUN = 25_000
GPT2_RANKS_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

# vocabulary id, as shard headers carry it -> (tokenizer name, vocabulary size)
VOCABULARIES: dict[int, tuple[str, int]] = {0: ("gpt2", 50257), 256: ("bytes", 257)}


def vocabulary(vocab_id: int) -> tuple[str, int]:
    """Name and size of the vocabulary with this id.

    Raises ValueError for an unknown id.
    """
    if vocab_id not in VOCABULARIES:
        allowed = ", ".join(f"{key} ({name})" for key, (name, _) in VOCABULARIES.items())
        raise ValueError(f"vocab_id={vocab_id!r} is unknown; allowed: {allowed}; take it from a tokenizer's vocab_id")
    return VOCABULARIES[vocab_id]


class Tokenizer(ABC):
    """Text to token ids and back; no text encodes to `eot`, the end-of-text token that marks documents."""

    name: str
    vocab_id: int

    @property
    def vocab_size(self) -> int:
        """Number of token ids, the end-of-text token included."""
        return VOCABULARIES[self.vocab_id][1]

    @property
    def eot(self) -> int:
        """Id of the end-of-text token, the last of the vocabulary."""
        return self.vocab_size - 1

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text` as uint16 [tokens]; never contains `eot`."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, as `encode` gives them."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the token ids; `eot` is dropped and bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        kept = [int(i) for i in ids if int(i) != self.eot]
        bad = [i for i in kept if not 0 <= i < self.vocab_size]
        if bad:
            raise ValueError(
                f"token id {bad[0]} is outside the vocabulary of {self.name!r} (0..{self.vocab_size - 1}); "
                "decode with the tokenizer that encoded the text"
            )
        return self._decode_bytes(kept).decode("utf-8", errors="replace")

    @abstractmethod
    def _decode_bytes(self, ids: list[int]) -> bytes: ...

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Bytes of text per token id, int64 [vocab_size], 0 for `eot`; for a loss in bits per byte."""


class ByteTokenizer(Tokenizer):
    """One token a byte of UTF-8: ids 0..255, end of text 256."""

    name = "bytes"
    vocab_id = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.uint16)

    def _decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(ids)

    def token_bytes(self) -> np.ndarray:
        counts = np.ones(self.vocab_size, dtype=np.int64)
        counts[self.eot] = 0
        return counts


class GPT2Tokenizer(Tokenizer):
    """The GPT-2 byte-pair encoding: ids 0..50255, end of text 50256; needs `tiktoken`, no network.

    The encoding works on runs of letters, of digits, of white space and of other characters. A run of more than
    LONGEST_RUN characters is encoded in pieces of that length, because tiktoken panics at a million spaces, and older
    versions take time by the square of a run. Text without such a run has the tokens of GPT-2; one with it decodes to
    itself all the same.

    Raises ImportError without `tiktoken`, ValueError when the bundled file is damaged.
    """

    name = "gpt2"
    vocab_id = 0

    def __init__(self) -> None:
        self._encoding = _gpt2_encoding()
        # tiktoken depends on regex; its own expression has the same classes
        import regex

        self._run = regex.compile(r"\p{L}++|\p{N}++|\s++|[^\s\p{L}\p{N}]++")

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        pieces = [self._pieces(text) for text in texts]
        encoded = iter(self._encoding.encode_ordinary_batch([piece for parts in pieces for piece in parts]))
        return [np.array(list(chain.from_iterable(islice(encoded, len(parts)))), dtype=np.uint16) for parts in pieces]

    def _pieces(self, text: str) -> list[str]:
        """The text, cut where a run is longer than LONGEST_RUN."""
        # such a run fills one of these blocks, which next to no text does
        half = LONGEST_RUN // 2
        if not any(self._run.fullmatch(text, i, i + half) for i in range(0, len(text) - half + 1, half)):
            return [text]
        cuts = [0]
        for run in self._run.finditer(text):
            cuts += range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)
        return [text[start:end] for start, end in pairwise([*cuts, len(text)])]

    def _decode_bytes(self, ids: list[int]) -> bytes:
        return self._encoding.decode_bytes(ids)

    def token_bytes(self) -> np.ndarray:
        counts = [len(self._encoding.decode_single_token_bytes(i)) for i in range(self.vocab_size)]
        counts[self.eot] = 0
        return np.array(counts, dtype=np.int64)


def byte_characters() -> list[str]:
    """The character that files of GPT-2's encoding write for each byte.

    Byte b is chr(b) where that prints and is no space; the others are U+0100, U+0101, ... in order.
    """
    plain = {b for b in range(256) if chr(b).isprintable() and chr(b) != " "}
    escaped = (chr(code) for code in range(256, 512))
    return [chr(b) if b in plain else next(escaped) for b in range(256)]


def gpt2_ids(path: Path = GPT2_RANKS) -> dict[str, int]:
    """The ids of GPT-2's encoder.json by token, in the characters of `byte_characters`; ids are the merge order.

    Raises ValueError when the file is damaged.
    """
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != GPT2_RANKS_SHA256:
        raise ValueError(
            f"{path}: not the published GPT-2 encoder.json (its SHA-256 differs); restore the file, "
            "for example with `git checkout` or by reinstalling the package"
        )
    ids: dict[str, int] = json.loads(raw)
    return ids


def _gpt2_ranks(path: Path) -> dict[bytes, int]:
    """Merge ranks {token bytes: id} of GPT-2's encoder.json."""
    byte_of = {character: b for b, character in enumerate(byte_characters())}
    return {bytes(byte_of[c] for c in token): i for token, i in gpt2_ids(path).items() if token != END_OF_TEXT}


def _gpt2_encoding() -> "tiktoken.Encoding":
    try:
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str
    except ImportError as error:
        raise ImportError(
            "the 'gpt2' tokenizer needs the package tiktoken >= 0.9; install it with `pip install 'celo2[train]'`"
        ) from error
    # tiktoken's own reader of these files copies them to a cache folder that may be read-only: not used
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=_gpt2_ranks(GPT2_RANKS),
        special_tokens={END_OF_TEXT: 50256},
        explicit_n_vocab=50257,
    )


_TOKENIZERS: dict[str, type[Tokenizer]] = {"bytes": ByteTokenizer, "gpt2": GPT2Tokenizer}


@functools.cache
def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer "bytes" or "gpt2".

    Raises ValueError for another name, ImportError when "gpt2" lacks `tiktoken`.
    """
    if name not in _TOKENIZERS:
        raise ValueError(f"tokenizer {name!r} is unknown; allowed: {', '.join(map(repr, _TOKENIZERS))}")
    return _TOKENIZERS[name]()
