"""Standard output and error that never end a run: after a failed write they go quiet.

A closed terminal, `| head`, `2>&-` or a full disk behind a redirection make a write fail. What a run shows there is in
its files as well, so it goes on without it.
"""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO


class Unfailing:
    """A text stream whose writes do not fail; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.quiet = False
        """Whether a write has failed."""

    def write(self, text: str) -> int:
        """Write, unless a write has failed before."""
        if not self.quiet:
            try:
                self._stream.write(text)
            except (OSError, ValueError):
                self._give_up()
        return len(text)

    def flush(self) -> None:
        if not self.quiet:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._give_up()

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        return not self.quiet and self._stream.isatty()

    def _give_up(self) -> None:
        self.quiet = True
        # what is buffered goes nowhere, or the interpreter's last flush would fail
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unfailing_streams() -> Iterator[None]:
    """Make standard output and error unfailing within; a closed one is nothing, and no file gets its descriptor.

    A sample or a name may hold what the terminal's encoding lacks: it is shown with question marks.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = io.TextIOWrapper(open(os.devnull, "wb"), encoding="utf-8")  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors="replace", line_buffering=True)
        setattr(sys, name, Unfailing(stream))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def printable(text: str) -> str:
    """A user's text as UTF-8 can have it: bytes of a file's name that are none become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def attempt(what: str, show: Callable[[], object]) -> None:
    """Show something of a run that is trained and saved: when that fails, a line on standard error says so."""
    try:
        show()
    except Exception as error:  # whatever a plotting library raises: it is not the run
        reason = (str(error).strip().splitlines() or [""])[0]
        print(f"warning: no {what}: {type(error).__name__}: {reason}", file=sys.stderr)


def end_with(main: Callable[[], int]) -> NoReturn:
    """Run a program's `main`, one process of several, and end the process with its status."""
    try:
        status = main()
    except SystemExit:
        # help, or a mistake in the command line: said already
        raise
    except BaseException:
        # a lost peer or device: the launcher ends the others
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        # an interpreter that tears down groups whose peers are gone may abort or hang; everything is written
        os._exit(status)
    sys.exit(status)
