"""Requests that nobody should send. Number and seed decide each of them, whatever happens to the others."""

import gzip
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from enum import Enum, auto
from random import Random
from typing import Any
from urllib.parse import quote, quote_plus

import corpus
from conftest import API_KEY
from corpus import Seed

CUT_EVENT, SMUGGLED_EVENT, UNCLEAR_EVENT = "fuzz.cut", "fuzz.smuggled", "fuzz.unclear"


class Framing(Enum):
    """What the bytes are as HTTP, and so what must become of them."""

    WHOLE = auto()  # one request by the letter: it gets an answer
    CUT = auto()  # not all of one: nothing of it is stored
    UNCLEAR = auto()  # two servers could read it differently: an answer, or the end of the connection


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request as it goes over the wire."""

    number: int
    kind: str
    wire: bytes
    framing: Framing
    path: str
    method: str


@dataclass
class Request:
    """A request that is being spoilt."""

    method: str
    target: bytes
    fields: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""

    def set(self, name: str, value: bytes) -> None:
        self.fields = [each for each in self.fields if each[0].lower() != name.lower().encode()]
        self.fields.append((name.encode(), value))

    def head(self, *framing: bytes) -> bytes:
        lines = [self.method.encode() + b" " + self.target + b" HTTP/1.1", *framing]
        lines += [name + b": " + value for name, value in self.fields]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def whole(self) -> bytes:
        return self.head(b"Content-Length: %d" % len(self.body)) + self.body


def attempt(seed: str, number: int) -> Attempt:
    """The request with this number."""
    random = Random(f"{seed}/{number}")  # noqa: S311 - it must repeat
    (kind,) = random.choices(list(_KINDS), list(_KINDS.values()))
    return kind(random, number)


# Bodies: what stands in the JSON


def _spoilt_json(random: Random, number: int) -> Attempt:
    seed = random.choice(corpus.WRITES) if random.random() < 0.9 else random.choice(corpus.ADMIN[:5])
    body = deepcopy(seed.body)
    for _ in range(random.choice([1, 1, 1, 2, 5])):
        _spoil_value(random, body)
    literals: list[str] = []
    if random.random() < 0.3:
        _put(random, body, _LITERAL)
        literals = [random.choice(corpus.LITERALS)]
    request = _request(seed)
    request.body = _as_bytes(seed, body, literals)
    return _whole(request, number, "JSON")


_LITERAL = "\x1a literal"


def _spoil_value(random: Random, value: Any) -> None:
    action = random.random()
    if action < 0.75:
        _put(random, value, _hostile_value(random))
    elif action < 0.85 and isinstance(value, dict) and value:
        value.pop(random.choice(list(value)))
    else:
        _put(random, value, _hostile_value(random), key=random.choice(corpus.TEXTS))


def _put(random: Random, value: Any, new: Any, key: str | None = None) -> None:
    """Put the new value somewhere into the old one."""
    while True:
        places = list(range(len(value))) if isinstance(value, list) else list(value)
        if not places:
            return
        place = random.choice(places)
        if isinstance(value[place], dict | list) and value[place] and random.random() < 0.7:
            value = value[place]
            continue
        if key is not None and isinstance(value, dict):
            value[key] = new
        else:
            value[place] = new
        return


def _hostile_value(random: Random) -> Any:
    kind = random.random()
    if kind < 0.6:
        return random.choice(corpus.TEXTS)
    if kind < 0.8:
        return random.choice(corpus.NUMBERS)
    return random.choice([None, [], {}, [[]], {"": ""}, ["a"] * 300, {"a": {"b": [1, {"c": None}]}}])


def _as_bytes(seed: Seed, body: Any, literals: list[str]) -> bytes:
    lines = body if seed.media_type == "application/x-ndjson" else [body]
    text = "\n".join(json.dumps(line) for line in lines)
    for literal in literals:
        text = text.replace(json.dumps(_LITERAL), literal)
    return text.encode()


# Bodies: the bytes themselves


def _spoilt_bytes(random: Random, number: int) -> Attempt:
    seed = random.choice(corpus.WRITES + corpus.ADMIN[:5])
    request = _request(seed)
    body = _as_bytes(seed, seed.body, [])
    request.body = random.choice(_BYTE_SPOILERS)(random, body)
    return _whole(request, number, "bytes")


def _insert(random: Random, body: bytes, piece: bytes) -> bytes:
    at = random.randrange(len(body) + 1)
    return body[:at] + piece + body[at:]


def _flip(random: Random, body: bytes) -> bytes:
    spoilt = bytearray(body)
    for _ in range(random.choice([1, 1, 2, 8])):
        spoilt[random.randrange(len(spoilt))] = random.randrange(256)
    return bytes(spoilt)


def _deep(random: Random, body: bytes) -> bytes:
    depth = random.choice([130, 1_000, 1_000, 10_000] * 5 + [corpus.DEEPEST])
    opening, closing = random.choice([("[", "]"), ('{"a":', "1}"), ('{"metadata":', "{}}")])
    return corpus.nested(depth, opening, random.choice([closing, ""])).encode()


_BYTE_SPOILERS: list[Callable[[Random, bytes], bytes]] = [
    _flip,
    _deep,
    lambda random, body: _insert(random, body, random.choice(corpus.BROKEN_UTF8)),
    lambda random, body: _insert(random, body, random.randbytes(random.choice([1, 3, 64]))),
    lambda random, body: body[: random.randrange(len(body))],
    lambda random, body: body + random.choice([b"x", b"}", b"\0", b"\n\n\n", body]),
    lambda random, body: b"\xef\xbb\xbf" + body,
    lambda random, body: body.decode().encode(random.choice(["utf-16", "utf-16-be", "utf-32", "utf-7"])),
    # A member twice: which one counts must not depend on who reads it.
    lambda random, body: body.replace(b"{", b'{"actor": "mallory", "name": "x", ', random.choice([1, 2])),
    lambda random, body: b" " * random.choice([1, 1_000, 10_000]) + body,
    lambda random, body: random.choice([b"", b"null", b"0", b'""', b"[]", b"{}", b"[[]]", b"[null]", b"true"]),
]


def _compressed(random: Random, number: int) -> Attempt:
    seed = random.choice(corpus.WRITES + corpus.ADMIN[:5])
    request = _request(seed)
    body = _as_bytes(seed, seed.body, [])
    request.body = random.choice([gzip.compress(body), corpus.BOMB, gzip.compress(body)[:-4], body])
    request.set("Content-Encoding", random.choice([b"gzip", b"deflate", b"br", b"gzip, gzip", b"identity", b"\xe9"]))
    return _whole(request, number, "Content-Encoding")


def _too_large(random: Random, number: int) -> Attempt:
    seed = random.choice(corpus.WRITES[:4] + corpus.ADMIN[:5])
    request = _request(seed)
    limit = 16 * 1024 * 1024 if "batch" in seed.path else 1024 * 1024
    padding = b" " * (limit + random.choice([1, 1_000]) - len(body := _as_bytes(seed, seed.body, [])))
    if random.random() < 0.5:
        request.body = body + padding
        return _whole(request, number, "too large")
    wire = request.head(b"Transfer-Encoding: chunked") + _chunked(random, padding + body, size=65_536)
    return Attempt(number, "too large", wire, Framing.WHOLE, seed.path, seed.method)


# Query strings and paths


def _spoilt_query(random: Random, number: int) -> Attempt:
    seed = random.choice(corpus.READS)
    query = [*seed.query.items()]
    for _ in range(random.choice([1, 1, 2, 3])):
        name = random.choice([*(name for name, _ in query), *corpus.FILTERS, "cursor", "limit", "after", "x"])
        query = [each for each in query if each[0] != name or random.random() < 0.1]
        hostile = random.choice(corpus.CURSORS if name == "cursor" else corpus.TEXTS)
        query.append((name, hostile))
    if any(name == "cursor" for name, _ in query):
        seed, query = corpus.READS[1], [each for each in query if each[0] in ("cursor", "limit")]
    request = _request(seed)
    request.target = seed.path.encode() + b"?" + b"&".join(_pair(random, *each) for each in query)[:60_000]
    return _whole(request, number, "query")


def _pair(random: Random, name: str, value: str) -> bytes:
    encoded = quote_plus(value, errors="surrogatepass").encode()
    if random.random() < 0.1:
        broken = b"".join(b"%%%02X" % byte for byte in random.choice(corpus.BROKEN_UTF8))
        encoded = random.choice([encoded + b"%", encoded + b"%zz", encoded + broken, encoded + b";a=b", broken])
    return name.encode() + random.choice([b"=", b"=", b"=", b"==", b"%3D"]) + encoded


def _spoilt_path(random: Random, number: int) -> Attempt:
    seed = random.choice([*corpus.READS, *corpus.WRITES, *corpus.ADMIN])
    request = _request(seed)
    request.target = quote(random.choice(corpus.PATHS), safe="/%:*;=.").encode()
    if random.random() < 0.3:
        prefix = random.choice(["/events/", "/keys/", "/legal-holds/", "/"])
        request.target = (prefix + quote_plus(random.choice(corpus.TEXTS), errors="surrogatepass")[:4_000]).encode()
    # The seed's method stays, and so does its body; 16,000 ids that are not there are no harm.
    return _whole(request, number, "path")


def _spoilt_method(random: Random, number: int) -> Attempt:
    seed = random.choice([*corpus.READS, *corpus.WRITES])
    request = _request(seed)
    request.method = random.choice(corpus.METHODS)
    framing = Framing.UNCLEAR if request.method in ("get", "TRACE") else Framing.WHOLE
    return _attempt(request, number, "method", framing)


# Fields of the head


def _spoilt_fields(random: Random, number: int) -> Attempt:
    request = _request(random.choice(corpus.WRITES * 4 + corpus.READS + corpus.ADMIN[:5]))
    for _ in range(random.choice([1, 1, 2, 4])):
        name = random.choice([*corpus.FIELDS, "Content-Type", "X-API-Key", "Authorization"])
        values = corpus.MEDIA_TYPES if name == "Content-Type" and random.random() < 0.7 else corpus.TEXTS
        value = _field_value(random.choice(values))
        if random.random() < 0.2:
            request.fields.append((name.encode(), value))
        else:
            request.set(name, value)
    if random.random() < 0.02:
        request.fields += [(b"X-%d" % each, b"y") for each in range(random.choice([50, 99, 200]))]
    # Each wrong key comes from elsewhere: the address that presents many is shut out.
    request.set("X-Forwarded-For", _address(random)) if random.random() < 0.95 else None
    return _whole(request, number, "fields")


def _address(random: Random) -> bytes:
    octets = random.randbytes(4)
    address = b"10.%d.%d.%d" % tuple(octets[:3])
    odd = [b"[2001:db8::%d]:1" % octets[0], b"a:b:c%d" % octets[0], b"1::2::%d" % octets[0], b":%d" % octets[0], b","]
    return random.choice(odd) + address[:0] if random.random() < 0.2 else address


def _field_value(text: str) -> bytes:
    """As much of it as may stand in a field (RFC 9110 section 5.5)."""
    value = text.encode(errors="surrogatepass")
    return bytes(byte for byte in value if byte not in b"\r\n\0" and (byte >= 32 or byte == 9) and byte != 127)[:60_000]


# Framing: where a request ends


def _spoilt_framing(random: Random, number: int) -> Attempt:
    kind, framing, wire = random.choice(_FRAMING_SPOILERS)(random, number)
    return Attempt(number, kind, wire, framing, "/events", "POST")


def _event(event_type: str, number: int) -> bytes:
    return json.dumps({"event_type": event_type, "actor": str(number)}).encode()


def _posting(event_type: str, number: int) -> Request:
    request = _request(corpus.WRITES[1])
    request.body = _event(event_type, number)
    return request


def _chunked(random: Random, body: bytes, size: int = 7) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    extension = random.choice([b"", b"", b";a=b", b';a="b c"'])
    return b"".join(b"%x%s\r\n%s\r\n" % (len(piece), extension, piece) for piece in pieces) + b"0\r\n\r\n"


def _truncate(random: Random, number: int) -> tuple[str, Framing, bytes]:
    request = _posting(CUT_EVENT, number)
    wire = request.whole()
    if random.random() < 0.5:
        wire = request.head(b"Transfer-Encoding: chunked") + _chunked(random, request.body)
    return "cut off", Framing.CUT, wire[: random.randrange(1, len(wire) - 1)]


def _long_length(random: Random, number: int) -> tuple[str, Framing, bytes]:
    request = _posting(CUT_EVENT, number)
    length = len(request.body) + random.choice([1, 2, 1_000, 2**31, 2**63, 2**64 + 1, 10**30])
    return "length too long", Framing.CUT, request.head(b"Content-Length: %d" % length) + request.body


def _smuggle(random: Random, number: int) -> tuple[str, Framing, bytes]:
    """Two lengths for one body: whoever believes the other one sees a second request in it."""
    hidden = _posting(SMUGGLED_EVENT, number).whole()
    body = b"0\r\n\r\n" + hidden
    length = b"Content-Length: %d" % len(body)
    coding = random.choice(
        [
            b"Transfer-Encoding: chunked",
            b"transfer-encoding:chunked",
            b"Transfer-Encoding:\tchunked",
            b"Transfer-Encoding : chunked",
            b"Transfer-Encoding: identity, chunked",
            b"Transfer-Encoding: chunked, identity",
            b"Transfer-Encoding: xchunked",
            b'Transfer-Encoding: "chunked"',
            b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
            b"Transfer-Encoding:\r\n chunked",
            b"X: y\nTransfer-Encoding: chunked",
            b"X: y\rTransfer-Encoding: chunked",
            b"\x0bTransfer-Encoding: chunked",
            b"Content-Length: 5",
            b"Content-Length: 5, %d" % len(body),
            b"Content-Length: +5",
            b"Content-Length: 0x5",
            b"Content-Length: 5 5",
        ]
    )
    lines = [length, coding]
    random.shuffle(lines)
    return "smuggling", Framing.CUT, _posting(SMUGGLED_EVENT, number).head(*lines) + body


def _odd_head(random: Random, number: int) -> tuple[str, Framing, bytes]:
    request = _posting(UNCLEAR_EVENT, number)
    wire = request.whole()
    head, _, _ = wire.partition(b"\r\n\r\n")
    at = random.choice([each for each in range(len(head)) if head[each : each + 2] == b"\r\n"])
    odd = random.choice(
        [b"\n", b"\r", b"\r\n ", b"\r\n\t", b"\r\n : x\r\n", b"\r\nX\r\n", b"\r\n: y\r\n", b"\0", b"\r\n\n"]
    )
    return "odd head", Framing.UNCLEAR, wire[:at] + odd + wire[at + 2 :]


def _odd_chunks(random: Random, number: int) -> tuple[str, Framing, bytes]:
    request = _posting(UNCLEAR_EVENT, number)
    body = request.body
    size = b"%x" % len(body)
    line = random.choice(
        [
            b"0" * 20 + size,
            b"0x" + size,
            b"+" + size,
            b" " + size,
            size + b" ",
            size + b";" + b"a" * 70_000,
            size + b"\n",
            size + b"\r",
            b"-" + size,
            b"f" * 16,
            b"f" * 17,
            size.upper() + b";\x00",
            b"",
        ]
    )
    tail = random.choice(
        [b"\r\n0\r\n\r\n", b"\n0\n\n", b"0\r\n\r\n", b"\r\n0\r\nX-Trailer: y\r\n\r\n", b"\r\n00\r\n\r\n"]
    )
    return "odd chunks", Framing.UNCLEAR, request.head(b"Transfer-Encoding: chunked") + line + b"\r\n" + body + tail


def _flipped_wire(random: Random, number: int) -> tuple[str, Framing, bytes]:
    request = _posting(UNCLEAR_EVENT, number)
    head = request.head(b"Content-Length: %d" % len(request.body))
    return "flipped bytes", Framing.UNCLEAR, _flip(random, head) + request.body


def _noise(random: Random, number: int) -> tuple[str, Framing, bytes]:
    noise = random.choice(
        [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n" * 50]
    )
    return "noise", Framing.CUT, noise + random.randbytes(random.choice([0, 10, 1_000]))


def _chunked_well(random: Random, number: int) -> tuple[str, Framing, bytes]:
    request = _posting("fuzz.chunked", number)
    body = _chunked(random, request.body, random.choice([1, 2, 100]))
    return "chunked", Framing.WHOLE, request.head(b"Transfer-Encoding: chunked") + body


_FRAMING_SPOILERS = [
    _truncate,
    _long_length,
    _smuggle,
    _smuggle,
    _odd_head,
    _odd_chunks,
    _flipped_wire,
    _noise,
    _chunked_well,
]

_KINDS: dict[Callable[[Random, int], Attempt], float] = {
    _spoilt_json: 52,
    _spoilt_bytes: 24,
    _spoilt_query: 8,
    _spoilt_fields: 7,
    _spoilt_framing: 5,
    _spoilt_path: 2,
    _compressed: 1.5,
    _spoilt_method: 0.5,
    _too_large: 0.02,
}


def _request(seed: Seed) -> Request:
    target = seed.path.encode()
    if seed.query:
        target += b"?" + b"&".join(b"%s=%s" % (n.encode(), quote_plus(v).encode()) for n, v in seed.query.items())
    request = Request(seed.method, target, [(b"Host", b"test"), (b"X-API-Key", API_KEY.encode())])
    for name, value in seed.fields.items():
        request.set(name, value.encode())
    if seed.body is not None:
        request.set("Content-Type", seed.media_type.encode())
        request.body = _as_bytes(seed, seed.body, [])
    return request


def _whole(request: Request, number: int, kind: str) -> Attempt:
    return _attempt(request, number, kind, Framing.WHOLE)


def _attempt(request: Request, number: int, kind: str, framing: Framing) -> Attempt:
    path = request.target.partition(b"?")[0].removeprefix(b"http://other.example").decode("latin-1")
    return Attempt(number, kind, request.whole(), framing, path, request.method)
