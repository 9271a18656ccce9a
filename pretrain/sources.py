"""Where documents come from: text files, recognised by their content, and what `datasets` reads.

A source is a deterministic sequence of documents with an identity, so that a run that was interrupted goes on, and one
whose data have changed is refused.
"""

import bz2
import codecs
import glob
import gzip
import hashlib
import importlib
import json
import lzma
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Protocol

from celo2.pretrain.tokenizer import END_OF_TEXT

_CHUNK = 1 << 20
# what files of these begin with
_COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip, b"\xfd7zXZ\x00": lzma, b"BZh": bz2}


class Source(Protocol):
    """A deterministic sequence of documents."""

    @property
    def shard_name(self) -> str:
        """First part of the shards' file names."""

    def identity(self) -> dict[str, Any]:
        """What identifies the documents, as JSON values: progress of another identity is refused."""

    def documents(self, skip: int) -> Iterator[str]:
        """The documents from number `skip` on."""


@dataclass(frozen=True)
class TextFiles:
    """Documents of UTF-8 text files, plain or compressed by gzip, xz, bzip2 or Zstandard, whatever their names.

    Documents are separated by two or more blank lines, or by `separator` where one is given. Files of JSON lines, an
    object in each line, have a document in each `"text"`.

    Raises FileNotFoundError for a missing file, ValueError for one that is a pipe, an archive, not text or damaged,
    naming it.
    """

    paths: tuple[Path, ...]
    separator: str | None = None

    @property
    def shard_name(self) -> str:
        return file_name_part(self.paths[0].name.split(".")[0])

    def identity(self) -> dict[str, Any]:
        found: dict[str, Any] = {"kind": "text", "files": [fingerprint(path, "--text") for path in self.paths]}
        return found if self.separator is None else {**found, "separator": self.separator}

    def documents(self, skip: int) -> Iterator[str]:
        every = chain.from_iterable(split_documents(path, self.separator) for path in self.paths)
        return islice(every, skip, None)


@dataclass(frozen=True)
class DatasetRows:
    """Documents of the rows of what `datasets.load_dataset` accepts, streamed.

    Raises ImportError without `datasets`, ConnectionError or ValueError when the data cannot be had or lack
    the column.
    """

    path: str
    name: str | None = None
    split: str = "train"
    data_files: tuple[str, ...] = ()
    column: str = "text"

    @property
    def shard_name(self) -> str:
        return file_name_part(self.path.rstrip("/").split("/")[-1])

    def identity(self) -> dict[str, Any]:
        found = {
            "kind": "dataset",
            "path": self.path,
            "name": self.name,
            "split": self.split,
            "data_files": list(self.data_files),
            "column": self.column,
        }
        files = [fingerprint(path, "--data-files") for path in self.local_files()]
        return {**found, "files": files} if files else found

    def local_files(self) -> list[Path]:
        """The files of this machine that are read, in order: those given, or all of a folder."""
        base = Path(self.path)
        if self.data_files:
            places = [base / name if base.is_dir() else Path(name) for name in self.data_files]
            names = [name for place in places for name in sorted(glob.glob(str(place), recursive=True))]
            return [Path(name) for name in names if Path(name).is_file()]
        return sorted(path for path in base.rglob("*") if path.is_file()) if base.is_dir() else []

    def documents(self, skip: int) -> Iterator[str]:
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                "--dataset needs the package datasets; install it with `pip install 'celo2[train]'`, or use "
                "--text or --embedded"
            ) from error
        files, what = list(self.data_files) or None, f"dataset {self.path!r} (name {self.name!r}, split {self.split!r})"
        try:
            rows = datasets.load_dataset(self.path, name=self.name, split=self.split, data_files=files, streaming=True)
            for row in rows.skip(skip):
                if self.column not in row:
                    raise ValueError(f"there is no column {self.column!r} but {sorted(row)}; give one with --column")
                yield row[self.column]
        except (ValueError, RuntimeError) as error:
            # a dataset that is a script is a RuntimeError
            raise ValueError(f"{what}: {error}") from error
        except (OSError, datasets.exceptions.DatasetsError) as error:
            raise ConnectionError(
                f"{what} cannot be read: {error}; check the id and the network, then run the same command again "
                "(finished shards are kept), or use --text or --embedded, which need no network"
            ) from error


def file_name_part(text: str) -> str:
    """Make a part of a file name of any text."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in text) or "text"


def fingerprint(path: Path, flag: str) -> dict[str, Any]:
    """Name, size and hash of a file, the same after a copy; raises FileNotFoundError, ValueError for a pipe."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise FileNotFoundError(f"{path}: no such text file; correct the path given to {flag}") from error
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe, which cannot be read twice"
        raise ValueError(f"{path}: is {what}; write the text to a file, and give that to {flag}")
    head, whole = hashlib.sha256(), hashlib.sha256()
    with open(path, "rb") as file:
        first = file.read(_CHUNK)
        head.update(first)
        whole.update(first)
        while part := file.read(16 * _CHUNK):
            whole.update(part)
    return {
        "name": path.name,
        "bytes": path.stat().st_size,
        "head_sha256": head.hexdigest(),
        "sha256": whole.hexdigest(),
    }


def open_content(path: Path) -> IO[bytes]:
    """Open a file for its bytes, uncompressed, by what it begins with.

    Raises ValueError for archives, which are several files, and without a library for Zstandard.
    """
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path}: is a zip archive; unpack it, and give the text files in it to --text")
    opener: Callable[[Path, str], Any] = open
    for beginning, module in _COMPRESSED.items():
        if magic.startswith(beginning):
            opener = module.open
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        opener = _zstandard(path)
    with opener(path, "rb") as content:
        head = content.read(512)
    if head[257:262] == b"ustar":
        raise ValueError(f"{path}: is a tar archive; unpack it, and give the text files in it to --text")
    opened: IO[bytes] = opener(path, "rb")
    return opened


def _zstandard(path: Path) -> Callable[[Path, str], Any]:
    for name in ("compression.zstd", "backports.zstd", "zstandard"):
        try:
            opener: Callable[[Path, str], Any] = importlib.import_module(name).open
        except ImportError:
            continue
        return opener
    raise ValueError(f"{path}: is compressed by Zstandard: pip install zstandard, or unpack it")


def split_documents(path: Path, separator: str | None = None) -> Iterator[str]:
    """The documents of a file; raises as `TextFiles`."""
    try:
        with open_content(path) as content, TextIOWrapper(content, encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
            lines = chain([first], file)
            if _is_json_line(first):
                yield from _of_json(path, lines)
            elif separator is not None:
                yield from _between(lines, separator)
            else:
                yield from _between_blank_lines(path, lines)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text ({error.reason} at byte {_first_wrong_byte(path)}); convert it to UTF-8"
        ) from error
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: the compressed file is damaged or cut short ({error}); get it again") from error
    except OSError as error:
        if error.errno is not None:
            raise
        # bzip2 says it so
        raise ValueError(f"{path}: the compressed file is damaged or cut short ({error}); get it again") from error


def _between_blank_lines(path: Path, lines: Iterator[str]) -> Iterator[str]:
    document: list[str] = []
    blank, seen = 0, False
    for line in lines:
        if END_OF_TEXT in line and not seen:
            seen = True
            print(
                f"note: {path} has {END_OF_TEXT!r} in its text; if that ends a document, give --separator "
                f"'{END_OF_TEXT}'",
                file=sys.stderr,
            )
        if not line.strip():
            blank += 1
            continue
        if blank >= 2 and document:
            yield "".join(document).rstrip("\n")
            document = []
        elif document:
            document.append("\n" * blank)
        blank = 0
        document.append(line)
    if document:
        yield "".join(document).rstrip("\n")


def _between(lines: Iterator[str], separator: str) -> Iterator[str]:
    """Documents between a text that may not span lines, without the blank lines around them."""
    document: list[str] = []
    for line in lines:
        first, *others = line.split(separator)
        document.append(first)
        for part in others:
            if text := "".join(document).strip("\n"):
                yield text
            document = [part]
    if text := "".join(document).strip("\n"):
        yield text


def _is_json_line(line: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _of_json(path: Path, lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}: JSON lines, of which number {number} has no "text" ({type(error).__name__}: {error}); for '
                f"another column give --dataset json --data-files {path} --column NAME"
            ) from error
        if text is not None and not isinstance(text, str):
            raise ValueError(f'{path}: the "text" of JSON line {number} is {text!r}, not text')
        yield text or ""


def _first_wrong_byte(path: Path) -> int:
    """Where the content of a file stops being UTF-8, in bytes from its beginning."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with open_content(path) as file:
        while True:
            chunk = file.read(_CHUNK)
            kept = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return done - kept + error.start
            done += len(chunk)
            if not chunk:
                return done
