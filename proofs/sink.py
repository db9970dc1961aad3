"""A checkpoint kept outside the database, in a file or at a URL, which remembers what a restored backup forgot."""

import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Protocol

from ledger.notes import decode_note

_TIMEOUT_S = 5
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
        written = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with written.open("w", encoding="utf-8") as file:
            file.write(note)
            file.flush()
            os.fsync(file.fileno())
        written.replace(self._path)


class UrlSink:
    """A URL that takes the note with PUT and gives it back with GET; 404 is nothing yet."""

    def __init__(self, url: str) -> None:
        self._url = url

    def read(self) -> str | None:
        try:
            with urllib.request.urlopen(self._url, timeout=_TIMEOUT_S) as answer:  # nosec B310  # noqa: S310 - http(s)
                return decode_note(answer.read(_MOST_BYTES))
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def write(self, note: str) -> None:
        request = urllib.request.Request(  # nosec B310  # noqa: S310 - http(s), see sink_at()
            self._url, note.encode(), {"Content-Type": _CONTENT_TYPE}, method="PUT"
        )
        urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()  # nosec B310  # noqa: S310 - http(s), see sink_at()


def sink_at(place: str | None) -> Sink | None:
    """The sink at an http(s) URL, or else in the file at this path; None where none is wanted."""
    if place is None:
        return None
    return UrlSink(place) if place.startswith(("http://", "https://")) else FileSink(Path(place))
