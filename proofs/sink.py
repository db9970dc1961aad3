"""A checkpoint kept outside the database, in a file or at a URL, which remembers what a restored backup forgot."""

import errno
import http.client
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ledger.notes import decode_note

_TIMEOUT_S = 2  # twice: the 5 s that a transaction may wait, db.py, must be enough for read() and write()
_MOST_BYTES = 1_000_000
_CONTENT_TYPE = "text/plain; charset=utf-8"


class Sink(Protocol):
    """Where the newest checkpoint is kept. Both raise OSError."""

    def read(self) -> str | None:
        """What is kept there, or None where nothing is yet; raises NoteError where it is no text."""

    def write(self, note: str) -> None:
        """Keep this instead."""


class FileSink:
    """A file, replaced as a whole: never half of one, whatever happens meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> str | None:
        try:
            return decode_note(self._path.read_bytes())
        except FileNotFoundError:
            return None

    def write(self, note: str) -> None:
        # Not the pid's: on a shared volume two containers have the same. Nor tempfile's: others may read this file.
        written = self._path.with_name(f".{self._path.name}.{secrets.token_hex(8)}")
        try:
            with written.open("x", encoding="utf-8") as file:
                file.write(note)
                file.flush()
                os.fsync(file.fileno())
            written.replace(self._path)
        finally:
            written.unlink(missing_ok=True)
        _sync_folder(self._path.parent)


def _sync_folder(folder: Path) -> None:
    """Until then a power cut may undo a rename in it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system cannot; PostgreSQL, fsync_fname_ext(), goes on, too
            raise
    finally:
        os.close(descriptor)


class UrlSink:
    """A URL that takes the note with PUT and gives it back with GET; 404 is nothing yet."""

    def __init__(self, url: str) -> None:
        self._url = url

    def read(self) -> str | None:
        try:
            with _answer_to(urllib.request.Request(self._url)) as answer:  # noqa: S310 - http(s), see sink_at()
                note = answer.read(_MOST_BYTES)
                if answer.length:  # what read() with a limit leaves unread, and says nothing of
                    raise OSError("the answer was cut off, or is longer than any checkpoint")
                return decode_note(note)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def write(self, note: str) -> None:
        headers = {"Content-Type": _CONTENT_TYPE}
        request = urllib.request.Request(self._url, note.encode(), headers, method="PUT")  # noqa: S310 - as above
        with _answer_to(request):
            pass


@contextmanager
def _answer_to(request: urllib.request.Request) -> Iterator[http.client.HTTPResponse]:
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # nosec B310  # noqa: S310 - as above
            yield answer
    except http.client.HTTPException as error:
        raise OSError(f"the answer is not one of HTTP: {type(error).__name__}") from None


def sink_at(place: str | None) -> Sink | None:
    """The sink at an http(s) URL, or else in the file at this path; None where none is wanted."""
    if place is None:
        return None
    return UrlSink(place) if place.startswith(("http://", "https://")) else FileSink(Path(place))
