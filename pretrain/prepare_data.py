"""Prepare token shards from text files, a `datasets` id or the embedded corpus: streamed, resumable, atomic.

    python -m celo2.pretrain.prepare_data --tokenizer gpt2 --out data/fineweb --dataset HuggingFaceFW/fineweb-edu \\
        --name sample-10BT
    python -m celo2.pretrain.prepare_data --tokenizer gpt2 --out data/books --text book1.txt book2.txt.xz
    python -m celo2.pretrain.prepare_data --tokenizer bytes --out data/wikipedia --embedded

An end-of-text token stands before each document. Shards hold exactly `--shard-tokens` tokens, but for shard 0, which
is for validation and an eighth of that; when the text fills less than two shards, every 20th document is for
validation instead and all the others make one training shard. After each shard `prepare_progress.json` records where
the stream stands; the same command goes on from there and the shards are bitwise those of an uninterrupted run.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from celo2.files import PathLike, write_atomic
from celo2.pretrain import options
from celo2.pretrain.shards import MAX_SHARD_TOKENS, open_shard, write_shard
from celo2.pretrain.sources import DatasetRows, Source, TextFiles
from celo2.pretrain.terminal import unfailing_streams
from celo2.pretrain.tokenizer import Tokenizer, get_tokenizer

EMBEDDED_TEXT = Path(__file__).resolve().parent / "assets" / "wikipedia.txt.xz"
PROGRESS_FILE = "prepare_progress.json"
SHARD_TOKENS = 100_000_000
HELD_OUT_EVERY = 20
# of a shard is for validation: 12.5M tokens of the default
VALIDATION_PART = 8
_BATCH_DOCUMENTS = 64


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard and where the stream stands after it."""

    file: str
    """Name in the output folder."""
    tokens: int
    """Tokens in it."""
    documents: int
    """Documents of the source that are wholly in this and the earlier shards."""
    offset: int
    """Tokens of the next document (its end-of-text token counted) that are in them already."""


@dataclass(frozen=True)
class Prepared:
    """Outcome of `prepare`: the finished shards, and whether they all stood there already."""

    shards: tuple[ShardRecord, ...]
    unchanged: bool

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)


class _Progress:
    """The manifest of an output folder; sound shards are kept, those from the first bad one on remade."""

    def __init__(self, out_dir: Path, arguments: dict[str, Any], vocab_id: int) -> None:
        self.path = out_dir / PROGRESS_FILE
        self.arguments = arguments
        self.shards: list[ShardRecord] = []
        self.complete = False
        if not self.path.exists():
            foreign = sorted(path.name for path in out_dir.glob("*.bin"))
            if foreign:
                raise ValueError(
                    f"{out_dir}: holds {foreign[0]} ({len(foreign)} .bin files) but no {PROGRESS_FILE}, so "
                    "other data would be mixed in; give an empty folder as --out"
                )
            return
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            found, complete = stored["arguments"], bool(stored["complete"])
            records = [ShardRecord(**record) for record in stored["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}: damaged progress file ({error}); delete it and the .bin files beside it, then run again"
            ) from error
        different = [
            f"{key}: {found.get(key)!r} there, {value!r} now"
            for key, value in arguments.items()
            if not _same(found.get(key), value)
        ]
        if not records:
            # a start that came to nothing is no run
            return
        if different:
            raise ValueError(
                f"{out_dir}: was prepared with other arguments or data ({'; '.join(different)}); give "
                "another --out, the same arguments and data, or delete the folder"
            )
        for record in records:
            try:
                sound = len(open_shard(out_dir / record.file, vocab_id)) == record.tokens
            except (ValueError, FileNotFoundError):
                sound = False
            if not sound:
                break
            self.shards.append(record)
        self.complete = complete and len(self.shards) == len(records)
        # the first two shards are split off together
        if len(self.shards) < 2:
            self.shards = []

    def save(self) -> None:
        stored = {
            "arguments": self.arguments,
            "shards": [vars(shard) for shard in self.shards],
            "complete": self.complete,
        }
        write_atomic(self.path, [(json.dumps(stored, indent=1) + "\n").encode()])


def _same(there: Any, here: Any) -> bool:
    """Whether arguments are those of the folder, which may have been written when less of a file was compared."""
    if isinstance(there, dict) and isinstance(here, dict):
        added = here.keys() - there.keys()
        return (
            there.keys() <= here.keys()
            and added <= {"sha256", "files"}
            and all(_same(there[key], here[key]) for key in there)
        )
    if isinstance(there, list) and isinstance(here, list):
        return len(there) == len(here) and all(_same(one, two) for one, two in zip(there, here, strict=True))
    return bool(there == here)


def _token_stream(
    source: Source, tokenizer: Tokenizer, skip: int, offset: int, limit: int | None
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (documents consumed, offset of its first token, tokens) per document, up to `limit` tokens.

    The first document starts at token `offset`; blank documents have no tokens.
    """
    documents = source.documents(skip)
    number = skip
    while batch := list(islice(documents, _BATCH_DOCUMENTS)):
        not_text = [i for i, text in enumerate(batch) if text is not None and not isinstance(text, str)]
        if not_text:
            i = not_text[0]
            raise ValueError(f"document {number + i} is {batch[i]!r}, not text; choose a text column with --column")
        # a row without text is a blank document
        texts = [text or "" for text in batch]
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            number += 1
            if not text.strip():
                continue
            tokens = np.concatenate([np.array([tokenizer.eot], dtype=np.uint16), ids])[offset:]
            if limit is not None:
                tokens = tokens[:limit]
                limit -= len(tokens)
            yield number, offset, tokens
            offset = 0
            if limit == 0:
                return


def _check_outside(out_dir: Path, dataset: str) -> None:
    """Raise ValueError for a folder in which the shards would be read as a part of the dataset."""
    there, out = Path(os.path.abspath(dataset)), Path(os.path.abspath(out_dir))
    if there == out or there in out.parents:
        raise ValueError(
            f"--out {out_dir} is the folder of --dataset {dataset}, or within it: what is written there would be read "
            "as data; give another folder"
        )


def _cut(pieces: list[tuple[int, int, int]], length: int) -> tuple[int, int]:
    """Take `length` tokens off the pieces; return the documents that are wholly taken, and the next one's tokens."""
    while True:
        documents, offset, tokens = pieces.pop(0)
        if tokens > length:
            pieces.insert(0, (documents, offset + length, tokens - length))
            return documents - 1, offset + length
        length -= tokens
        if not length:
            return documents, 0


def validation_tokens(shard_tokens: int) -> int:
    """Tokens of the validation shard of a text that fills two training shards: at most a sixteenth of it."""
    return max(1, shard_tokens // VALIDATION_PART)


def _hold_out(documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation tokens of a small text: every 20th document is held out.

    Of fewer than 20 documents the last is held out, of a single one its last twentieth.
    """
    if len(documents) == 1:
        tokens = documents[0]
        tail = max(1, len(tokens) // HELD_OUT_EVERY)
        return tokens[:-tail], tokens[-tail:]
    last = len(documents) - 1
    held = {i for i in range(len(documents)) if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1} or {last}
    train = np.concatenate([tokens for i, tokens in enumerate(documents) if i not in held])
    return train, np.concatenate([documents[i] for i in sorted(held)])


def prepare(
    source: Source,
    tokenizer_name: str,
    out_dir: PathLike,
    *,
    shard_tokens: int = SHARD_TOKENS,
    max_tokens: int | None = None,
) -> Prepared:
    """Write the shards of a source to a folder, or go on with what an interrupted run left there.

    shard_tokens: tokens a shard; max_tokens: tokens in all, validation included. Up to two shards are held in
    memory. Raises ValueError for a bad argument, a source without text, or a folder prepared with other
    arguments; OSError when a file cannot be written or the source cannot be read; finished shards always
    stay.
    """
    if not 2 <= shard_tokens <= MAX_SHARD_TOKENS // 2:
        raise ValueError(f"shard_tokens={shard_tokens!r}; allowed: 2..{MAX_SHARD_TOKENS // 2}")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens={max_tokens!r}; give at least 2 tokens, or none for all the text")
    tokenizer = get_tokenizer(tokenizer_name)
    arguments = {
        "tokenizer": tokenizer.name,
        "source": source.identity(),
        "shard_tokens": shard_tokens,
        "max_tokens": max_tokens,
    }
    out_dir = Path(out_dir)
    if isinstance(source, DatasetRows):
        _check_outside(out_dir, source.path)
    out_dir.mkdir(parents=True, exist_ok=True)
    progress = _Progress(out_dir, arguments, tokenizer.vocab_id)
    if progress.complete:
        return Prepared(tuple(progress.shards), unchanged=True)

    def finish(tokens: np.ndarray, documents: int, offset: int) -> None:
        number = len(progress.shards)
        if not number:
            # the source is open and has text
            progress.save()
        file = f"{source.shard_name}_{'train' if number else 'val'}_{number:06d}.bin"
        write_shard(out_dir / file, tokens, tokenizer.vocab_id)
        progress.shards.append(ShardRecord(file, len(tokens), documents, offset))

    documents, offset = (progress.shards[-1].documents, progress.shards[-1].offset) if progress.shards else (0, 0)
    written = sum(shard.tokens for shard in progress.shards)
    limit = None if max_tokens is None else max_tokens - written
    pending: list[np.ndarray] = []
    pieces: list[tuple[int, int, int]] = []  # of pending: documents until its end, offset in the last, tokens
    size = 0
    stream: Iterable[tuple[int, int, np.ndarray]] = ()
    if limit is None or limit > 0:
        stream = _token_stream(source, tokenizer, documents, offset, limit)
    with _progress_bar(max_tokens, written) as bar:
        for documents, first, tokens in stream:
            pending.append(tokens)
            pieces.append((documents, first, len(tokens)))
            size += len(tokens)
            if bar is not None:
                bar.update(len(tokens))
            if size < (shard_tokens if progress.shards else 2 * shard_tokens):
                continue
            flat = np.concatenate(pending)
            while size >= (length := shard_tokens if progress.shards else validation_tokens(shard_tokens)):
                start = len(flat) - size
                size -= length
                finish(flat[start : start + length], *_cut(pieces, length))
                if len(progress.shards) >= 2:
                    progress.save()
            pending = [flat[len(flat) - size :]] if size else []
    if not progress.shards:
        if size < 2:
            raise ValueError(f"the source {arguments['source']} has no text; give text with at least one document")
        train, val = _hold_out(pending)
        finish(val, documents, 0)
        finish(train, documents, 0)
    elif size:
        finish(np.concatenate(pending), documents, 0)
    progress.complete = True
    progress.save()
    return Prepared(tuple(progress.shards), unchanged=False)


def prepare_embedded(tokenizer_name: str, out_dir: PathLike) -> Path:
    """Prepare the embedded Wikipedia text in `out_dir`, unless it is there, and return the folder.

    tokenizer_name: "bytes" or "gpt2". Every 20th article is for validation. Raises as `prepare`; needs no
    network.
    """
    prepare(TextFiles((EMBEDDED_TEXT,)), tokenizer_name, out_dir)
    return Path(out_dir)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Prepare .bin token shards for train_gpt.py; resumable.")
    parser.add_argument("--tokenizer", default="gpt2", choices=["gpt2", "bytes"], help="default: gpt2")
    parser.add_argument("--out", required=True, type=options.path, help="folder for the shards")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text",
        nargs="+",
        type=options.path,
        metavar="FILE",
        help="text files or JSON lines, plain or compressed (gzip, xz, bzip2, Zstandard), whatever their names",
    )
    source.add_argument(
        "--dataset", type=options.given, help="what datasets.load_dataset accepts, such as HuggingFaceFW/fineweb-edu"
    )
    parser.add_argument(
        "--separator",
        type=options.given,
        metavar="TEXT",
        help="what separates the documents of --text, such as '<|endoftext|>' (default: two blank lines)",
    )
    source.add_argument("--embedded", action="store_true", help="the embedded Wikipedia articles; no network")
    parser.add_argument("--name", help="configuration of the dataset, such as sample-10BT")
    parser.add_argument("--split", help="split of the dataset (default: train)")
    parser.add_argument("--data-files", nargs="+", metavar="FILE", help="data files of the dataset")
    parser.add_argument("--column", help="text column of the dataset (default: text)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="stop after N tokens, validation included")
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=SHARD_TOKENS,
        metavar="N",
        help="tokens a shard (default: %(default)s)",
    )
    return parser


def _progress_bar(total: int | None, initial: int) -> AbstractContextManager[Any]:
    """Return a bar on a terminal; without tqdm, which is no reason to fail, something that gives None."""
    if importlib.util.find_spec("tqdm") is None:
        return nullcontext()
    from tqdm import tqdm

    # disable=None: no bar unless standard error is a terminal
    bar: AbstractContextManager[Any] = tqdm(total=total, initial=initial, unit="tok", unit_scale=True, disable=None)
    return bar


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 with a one-line error for bad input."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    with unfailing_streams():
        return _prepare(parser, arguments)


def _prepare(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if not arguments.dataset:
        for option in ("name", "split", "data_files", "column"):
            if getattr(arguments, option) is not None:
                parser.error(f"--{option.replace('_', '-')} belongs to --dataset; drop it, or give --dataset")
    if arguments.separator is not None and not arguments.text:
        parser.error("--separator belongs to --text; drop it, or give --text")
    source: Source
    if arguments.dataset:
        source = DatasetRows(
            arguments.dataset,
            arguments.name,
            arguments.split or "train",
            tuple(arguments.data_files or ()),
            arguments.column or "text",
        )
    else:
        source = TextFiles(tuple(arguments.text or [EMBEDDED_TEXT]), arguments.separator)
    try:
        prepared = prepare(
            source,
            arguments.tokenizer,
            arguments.out,
            shard_tokens=arguments.shard_tokens,
            max_tokens=arguments.max_tokens,
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last finished shard", file=sys.stderr)
        return 130
    state = "already complete, nothing to do" if prepared.unchanged else "prepared"
    validation, training = prepared.shards[0].tokens, prepared.tokens - prepared.shards[0].tokens
    print(
        f"{arguments.out}: {state}: {len(prepared.shards)} shards, {training:,} training and {validation:,} "
        f"validation tokens ({arguments.tokenizer})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
