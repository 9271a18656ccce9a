"""The harness's tokenizers as files that transformers and tokenizers read: GPT-2's encoding, and bytes.

Bytes are GPT-2's byte-level encoding with 256 tokens and no merges. Nothing but the bundled `encoder.json` is needed.
"""

import json
from itertools import pairwise
from typing import Any

from celo2.pretrain.tokenizer import END_OF_TEXT, byte_characters, gpt2_ids


def tokenizer_files(name: str, context: int) -> dict[str, bytes]:
    """The contents of `tokenizer.json` and `tokenizer_config.json` of the tokenizer "gpt2" or "bytes"."""
    ids = gpt2_ids() if name == "gpt2" else {token: b for b, token in enumerate((*byte_characters(), END_OF_TEXT))}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": ids[END_OF_TEXT], "content": END_OF_TEXT, "special": True, "normalized": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | {"single_word": False, "lstrip": False, "rstrip": False}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [f"{left} {right}" for left, right in _merges(ids)],
        },
    }
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": context,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    }
    return {"tokenizer.json": _json(tokenizer), "tokenizer_config.json": _json(settings)}


def _merges(ids: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of a byte-pair encoding in their order: of each token, the two that the earlier merges leave of it."""
    merges = []
    for token, rank in sorted(ids.items(), key=lambda entry: entry[1]):
        if len(token) == 1 or token == END_OF_TEXT:
            continue
        parts = list(token)
        while len(parts) > 2:
            # the earliest merge of neighbours; there is one, since the token came about
            ranks = [ids.get(left + right, rank) for left, right in pairwise(parts)]
            index = ranks.index(min(ranks))
            parts[index : index + 2] = ["".join(parts[index : index + 2])]
        merges.append((parts[0], parts[1]))
    return merges


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()
