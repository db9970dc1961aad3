"""Signed notes, checkpoints and cosignatures: texts and signatures, no I/O.

c2sp.org/signed-note, c2sp.org/tlog-checkpoint, c2sp.org/tlog-cosignature; private keys in the form of Go's
golang.org/x/mod/sumdb/note. Ed25519 only (RFC 8032).
"""

import binascii
import hashlib
import re
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

NOTE = 0x01  # signature types: an Ed25519 signature over the note's text
COSIGNATURE = 0x04  # and one over a moment and that text, by a witness
MAX_NOTE_BYTES = 1_000_000  # as golang.org/x/mod/sumdb/note has it

_KEY_BYTES = 32
_PRIVATE_KEY_PREFIX = "PRIVATE+KEY+"
_SIGNATURE_LINE = re.compile(r"— (\S+) ([A-Za-z0-9+/]+={0,2})")
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,18}")


class NoteError(ValueError):
    """A key or a note is not well-formed, or a signature does not verify. The message never quotes a private key."""


@dataclass(frozen=True)
class Signature:
    """A signature line: by whom, and the bytes behind the key id."""

    name: str
    key_id: bytes
    payload: bytes

    def __str__(self) -> str:
        return f"— {self.name} {b64encode(self.key_id + self.payload).decode()}\n"

    @property
    def timestamp(self) -> int:
        """When a cosignature was made, in Unix time."""
        return int.from_bytes(self.payload[:8])


@dataclass(frozen=True)
class Verifier:
    """A public key with its name and type."""

    name: str
    public_key: bytes
    kind: int = NOTE

    @cached_property
    def key_id(self) -> bytes:
        kind = bytes([self.kind])
        return hashlib.sha256(self.name.encode() + b"\n" + kind + self.public_key).digest()[:4]

    def __str__(self) -> str:
        """The key as a vkey: `name+key id+key`."""
        return f"{self.name}+{self.key_id.hex()}+{b64encode(bytes([self.kind]) + self.public_key).decode()}"

    def signature_in(self, signatures: Sequence[Signature], text: str) -> Signature | None:
        """This key's signature over the text, or None; raises NoteError where it has one that does not verify."""
        for signature in signatures:
            if (signature.name, signature.key_id) == (self.name, self.key_id):
                self._verify(signature, text)
                return signature
        return None

    def _verify(self, signature: Signature, text: str) -> None:
        message, payload = text, signature.payload
        if self.kind == COSIGNATURE:
            message, payload = cosigned_message(text, signature.timestamp), signature.payload[8:]
        try:
            Ed25519PublicKey.from_public_bytes(self.public_key).verify(payload, message.encode())
        except InvalidSignature:
            raise NoteError(f"the signature of {self.name} does not verify") from None


@dataclass(frozen=True)
class Signer:
    """A private key with its name. Its repr has no secret."""

    name: str
    seed: bytes = field(repr=False)
    kind: int = NOTE

    @cached_property
    def verifier(self) -> Verifier:
        return Verifier(self.name, self._key.public_key().public_bytes_raw(), self.kind)

    def secret_text(self) -> str:
        """The key as golang.org/x/mod/sumdb/note writes it: `PRIVATE+KEY+name+key id+key`."""
        secret = b64encode(bytes([self.kind]) + self.seed).decode()
        return f"{_PRIVATE_KEY_PREFIX}{self.name}+{self.verifier.key_id.hex()}+{secret}"

    def sign(self, text: str) -> Signature:
        """The signature over a note's text, which ends in a newline."""
        return Signature(self.name, self.verifier.key_id, self._key.sign(text.encode()))

    def cosign(self, text: str, timestamp: int) -> Signature:
        """What a witness signs, at a moment in Unix time."""
        message = cosigned_message(text, timestamp).encode()
        return Signature(self.name, self.verifier.key_id, timestamp.to_bytes(8) + self._key.sign(message))

    @cached_property
    def _key(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.seed)


@dataclass(frozen=True)
class Note:
    """A text, which ends in a newline, and the signatures under it; str() is the note."""

    text: str
    signatures: Sequence[Signature]

    def __str__(self) -> str:
        return f"{self.text}\n{''.join(map(str, self.signatures))}"


@dataclass(frozen=True)
class TreeHead:
    """What a checkpoint says: that the log of this origin had so many leaves, under this root."""

    origin: str
    size: int
    root: bytes

    def __str__(self) -> str:
        """The text of a checkpoint without extension lines."""
        return f"{self.origin}\n{self.size}\n{b64encode(self.root).decode()}\n"


def generate_signer(name: str, kind: int = NOTE) -> Signer:
    """A new key; raises NoteError where the name cannot be one."""
    _require_name(name)
    return Signer(name, Ed25519PrivateKey.generate().private_bytes_raw(), kind)


def parse_signer(text: str) -> Signer:
    """A private key in Go's form; raises NoteError."""
    if not text.startswith(_PRIVATE_KEY_PREFIX):
        raise NoteError("a private key begins with PRIVATE+KEY+")
    name, key_id, kind, seed = _parse_key(text.removeprefix(_PRIVATE_KEY_PREFIX))
    signer = Signer(name, seed, kind)
    if signer.verifier.key_id != key_id:
        raise NoteError("the key id is not that of this key and name")
    return signer


def parse_verifier(text: str) -> Verifier:
    """A vkey; raises NoteError."""
    name, key_id, kind, key = _parse_key(text)
    verifier = Verifier(name, key, kind)
    if verifier.key_id != key_id:
        raise NoteError("the key id is not that of this key and name")
    return verifier


def decode_note(note: bytes) -> str:
    """A note's bytes as text; raises NoteError."""
    try:
        return note.decode()
    except UnicodeDecodeError:
        raise NoteError("a note is UTF-8") from None


def parse_note(note: str) -> Note:
    """Take a note apart, whoever signed it; raises NoteError."""
    if len(note) > MAX_NOTE_BYTES:
        raise NoteError("it is too long for a note")
    if any(character < " " and character != "\n" for character in note):
        raise NoteError("a note has no control characters but newlines")
    text, blank, lines = note.rpartition("\n\n")
    if not blank or not text or not lines.endswith("\n"):
        raise NoteError("a note is a text, an empty line, and signature lines")
    return Note(text + "\n", parse_signatures(lines))


def parse_signatures(lines: str) -> list[Signature]:
    """Signature lines, each ending in a newline; raises NoteError."""
    return [_parse_signature(line) for line in lines.removesuffix("\n").split("\n")]


def parse_tree_head(text: str) -> TreeHead:
    """What a checkpoint's text says, extension lines left aside; raises NoteError."""
    origin, size, root = [*text.split("\n"), "", ""][:3]
    decoded = _decode(root)
    if not origin or not _DECIMAL.fullmatch(size) or len(decoded) != hashlib.sha256().digest_size:
        raise NoteError("a checkpoint has an origin, a size and a root hash, each on a line")
    return TreeHead(origin, int(size), decoded)


def open_checkpoint(note: str, verifier: Verifier) -> tuple[TreeHead, Note]:
    """A checkpoint that this key has signed under its own name; raises NoteError."""
    opened = parse_note(note)
    head = parse_tree_head(opened.text)
    if head.origin != verifier.name:
        raise NoteError(f"it is a checkpoint of {head.origin}, not of {verifier.name}")
    if verifier.signature_in(opened.signatures, opened.text) is None:
        raise NoteError(f"the key {verifier.name}+{verifier.key_id.hex()} has not signed it")
    return head, opened


def sign_checkpoint(signer: Signer, size: int, root: bytes) -> Note:
    """The checkpoint of the signer's log, whose origin is the key's name."""
    text = str(TreeHead(signer.name, size, root))
    return Note(text, [signer.sign(text)])


def cosigned_message(text: str, timestamp: int) -> str:
    """What a witness signs: c2sp.org/tlog-cosignature, Ed25519."""
    return f"cosignature/v1\ntime {timestamp}\n{text}"


def _parse_signature(line: str) -> Signature:
    parts = _SIGNATURE_LINE.fullmatch(line)
    payload = _decode(parts[2]) if parts else b""
    if parts is None or len(payload) < 5 or "+" in parts[1]:
        raise NoteError("a signature line is a dash, a name and the signature in base64")
    return Signature(parts[1], payload[:4], payload[4:])


def _parse_key(text: str) -> tuple[str, bytes, int, bytes]:
    """Name, key id, type and key; the key itself holds plus signs, being base64."""
    name, _, rest = text.strip().partition("+")
    key_id, _, encoded = rest.partition("+")
    key = _decode(encoded)
    _require_name(name)
    if not re.fullmatch(r"[0-9a-f]{8}", key_id) or len(key) != 1 + _KEY_BYTES or key[0] not in (NOTE, COSIGNATURE):
        raise NoteError("a key is a name, a key id of 8 hex digits and an Ed25519 key, with a plus sign between")
    return name, bytes.fromhex(key_id), key[0], key[1:]


def _require_name(name: str) -> None:
    if not name or "+" in name or re.search(r"[\s\x00-\x1f]", name):
        raise NoteError("a key's name is not empty and has neither spaces nor plus signs")


def _decode(text: str) -> bytes:
    """Base64, strictly; b'' where it is none."""
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""
