"""Exports: all events that meet a filter, from one snapshot, as NDJSON or CSV, and whether they are all there."""

import asyncio
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import orjson
from prometheus_client import Gauge

from problems import TooManyReaders
from queries.lines import CSV_HEADER, CSV_LINE, EXPORTED_FIELDS, NDJSON_LINE
from queries.pages import Page, Selection, read_bounds, read_pages
from queries.reader import Reader
from schemas import ExportQuery

MAX_OPEN_EXPORTS = 4  # in one process; each holds four pages
MAX_EXPORTS_PER_KEY = 2  # of those: a slow reader keeps one open for as long as it likes
GZIP_LEVEL = 1


class Exports:
    """The exports that are open in this process."""

    def __init__(self, reader: Reader, gauge: Gauge) -> None:
        self._reader = reader
        self._gauge = gauge
        self._open: Counter[str] = Counter()  # how many each key has

    async def start(self, query: ExportQuery, key_id: str, tenant: str | None = None, *, compressed: bool) -> "Export":
        """An export whose first page is read, so that what can fail at once has not. Each is to be closed.

        `tenant`: the one that the caller is bound to, if any; the query is, too.
        """
        if self._open.total() >= MAX_OPEN_EXPORTS:
            raise TooManyReaders("As many exports are open as this process serves at a time.")
        if self._open[key_id] >= MAX_EXPORTS_PER_KEY:
            raise TooManyReaders(
                f"This key has {MAX_EXPORTS_PER_KEY} exports open in this process, and may have no more."
            )
        self._count(key_id, 1)
        try:
            oldest, newest = await self._reader.scan(read_bounds)
            # From the oldest on, for to look through all the ids before it may take for ever.
            after = oldest - 1 if query.after is None else max(query.after, oldest - 1)
            snapshot = newest if query.snapshot is None else query.snapshot
            selection = Selection(query, CSV_LINE if query.format == "csv" else NDJSON_LINE, snapshot)
            pages = read_pages(self._reader.seen_by(tenant), selection, after)
            first = await anext(pages, None)
        except BaseException:
            self._count(key_id, -1)
            raise
        return Export(query, snapshot, first, pages, compressed=compressed, close=lambda: self._count(key_id, -1))

    def _count(self, key_id: str, change: int) -> None:
        self._open[key_id] += change
        if not self._open[key_id]:
            del self._open[key_id]
        self._gauge.inc(change)


class Export:
    """One export: its body, piece by piece, ending in a record that says that it is complete."""

    def __init__(
        self,
        query: ExportQuery,
        snapshot: int,
        first: Page | None,
        pages: AsyncGenerator[Page, None],
        *,
        compressed: bool,
        close: Callable[[], None],
    ) -> None:
        self.snapshot = snapshot
        self.count = 0  # of events handed over
        self.is_complete = False
        self.close = close
        self._is_csv = query.format == "csv"
        self._has_header = self._is_csv and query.after is None  # the parts of a resumed export make one file
        self._first = first
        self._pages = pages
        self._compressor = zlib.compressobj(GZIP_LEVEL, wbits=31) if compressed else None

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body."""
        if self._has_header:
            yield self._encode(CSV_HEADER.encode())
        async with aclosing(self._pages):
            page = self._first
            while page is not None:
                self.count += page.count
                for piece in page.pieces:
                    if encoded := await asyncio.to_thread(self._encode, piece) if self._compressor else piece:
                        yield encoded
                page = await anext(self._pages, None)
        yield self._encode(self._last_record(), is_last=True)
        self.is_complete = True

    def _encode(self, piece: bytes, *, is_last: bool = False) -> bytes:
        if self._compressor is None:
            return piece
        return self._compressor.compress(piece) + (self._compressor.flush() if is_last else b"")

    def _last_record(self) -> bytes:
        """No event has it: in NDJSON no `id`, in CSV an empty one."""
        totals = {"count": self.count, "snapshot": self.snapshot}
        if not self._is_csv:
            return orjson.dumps({"complete": True, **totals}, option=orjson.OPT_APPEND_NEWLINE)
        record = {"event_type": "export.complete", "metadata": orjson.dumps(totals).decode().replace('"', '""')}
        return (",".join(f'"{record[name]}"' if name in record else "" for name in EXPORTED_FIELDS) + "\r\n").encode()


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether the header asks for gzip (RFC 9110 section 12.5.3); silence does not."""
    for coding in accept_encoding.lower().replace(" ", "").split(","):
        name, _, weight = coding.partition(";q=")
        if name in ("gzip", "x-gzip"):
            return weight.strip("0.") != "" or weight == ""
    return False
