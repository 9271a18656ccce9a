"""Files that are whole or as they were."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

PathLike = str | os.PathLike[str]
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def write_atomic(path: PathLike, chunks: Iterable[bytes | memoryview]) -> None:
    """Write the chunks to `path` through a temporary file beside it: the file is whole, or as it was.

    Raises OSError naming the path, with the temporary file removed, when the disk is full or not writable.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"cannot write {path}: {reason}; free space or choose another folder, then run the same command "
            "again (what stood under this name is unchanged)",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary(folder: PathLike) -> None:
    """Remove the temporary files that killed calls of `write_atomic` left in a folder; nobody may be writing there."""
    for path in Path(folder).glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)
