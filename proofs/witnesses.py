"""Witnesses: others who see the log grow, and sign that it did (c2sp.org/tlog-witness, c2sp.org/tlog-cosignature)."""

import urllib.error
import urllib.request
from base64 import b64encode
from http.client import HTTPException

from sqlalchemy import text

from db import Database
from ledger.notes import (
    COSIGNATURE,
    NoteError,
    Signature,
    Verifier,
    decode_note,
    open_checkpoint,
    parse_note,
    parse_signatures,
)
from problems import LedgerInconsistent
from proofs.checkpoints import Checkpoint
from proofs.paths import prove_consistency
from proofs.tiles import Source, TransactionSource

_TIMEOUT_S = 10
_MOST_BYTES = 100_000
_LAST_MOMENT = 253_402_300_799  # 9999-12-31T23:59:59Z in Unix time

# Index: ledger_cosignatures_pkey.
_LAST_SIZE = text("SELECT max(size) FROM ledger_cosignatures WHERE origin = :origin AND witness = :witness")
# Index: ledger_checkpoints_pkey.
_SIGNED = text("SELECT note FROM ledger_checkpoints WHERE origin = :origin AND size = :size")
_KEEP = text(
    "INSERT INTO ledger_cosignatures (origin, size, witness, signature, signed_at)"
    " VALUES (:origin, :size, :witness, :signature, to_timestamp(:signed_at)) ON CONFLICT DO NOTHING"
)
# Indexes: the primary keys of both tables.
_NEWEST_COSIGNED = """
    SELECT note || (
        SELECT string_agg(signature, '' ORDER BY witness) FROM ledger_cosignatures AS cosignature
        WHERE cosignature.origin = checkpoint.origin AND cosignature.size = checkpoint.size
    )
    FROM ledger_checkpoints AS checkpoint
    WHERE origin = %(origin)s AND size = (SELECT max(size) FROM ledger_cosignatures WHERE origin = %(origin)s)
"""


class WitnessRefused(Exception):
    """The witness did not sign. The message says what it answered."""


def request_cosignature(
    database: Database, checkpoint: Checkpoint, witness: Verifier, old_size: int | None = None
) -> str:
    """The body of add-checkpoint: the proof from what the witness signed last, as far as is known, and the checkpoint.

    Raises LedgerInconsistent where the witness has signed more than there is, and what Database.transaction() raises.
    """
    head = checkpoint.head
    with database.transaction() as connection:
        if old_size is None:
            known = {"origin": head.origin, "witness": str(witness)}
            old_size = int(connection.scalar(_LAST_SIZE, known) or 0)
        if old_size > head.size:
            raise LedgerInconsistent(
                f"The witness has signed a checkpoint of size {old_size}, and the log's newest has {head.size}: the log"
                " is shorter than what the witness has seen."
            )
        path = prove_consistency(TransactionSource(connection), old_size, head.size)
    lines = "".join(f"{b64encode(node).decode()}\n" for node in path)
    return f"old {old_size}\n{lines}\n{checkpoint.note}"


def keep_cosignature(database: Database, log: Verifier, request: str, witness: Verifier, answer: str) -> int:
    """Keep what the witness signed under the checkpoint of the request; the checkpoint's size.

    Raises NoteError where the checkpoint is not one that the log signed and keeps, or where the answer has no such
    signature or it does not verify, and what transaction() raises.
    """
    head, asked = open_checkpoint(request.partition("\n\n")[2], log)
    signature = _signature_in(answer, witness, asked.text)
    values = {"origin": head.origin, "size": head.size, "witness": str(witness), "signature": str(signature)}
    with database.transaction() as connection:
        kept = connection.scalar(_SIGNED, {"origin": head.origin, "size": head.size})
        # What is served is the kept note, with the signature under it.
        if kept is None or parse_note(kept).text != asked.text:
            raise NoteError(f"the checkpoint of the request is not the one of size {head.size} that is kept here")
        connection.execute(_KEEP, {**values, "signed_at": signature.timestamp})
    return head.size


def send_to_witness(url: str, request: str) -> str:
    """POST the request to a witness' submission prefix; raises WitnessRefused and OSError."""
    try:
        sent = urllib.request.Request(f"{url.rstrip('/')}/add-checkpoint", request.encode(), method="POST")  # noqa: S310 - the operator's own
        with urllib.request.urlopen(sent, timeout=_TIMEOUT_S) as answer:  # nosec B310  # noqa: S310 - as above
            return decode_note(answer.read(_MOST_BYTES))
    except (HTTPException, ValueError) as error:
        said = " ".join(str(error).split()) or type(error).__name__  # one line
        raise WitnessRefused(f"{url} does not answer as a witness does: {said}") from None
    except urllib.error.HTTPError as error:
        said = error.read(200).decode(errors="replace").strip()
        if error.code == 409:
            said = f"it has signed a checkpoint of size {said} last: name that with --old-size"
        raise WitnessRefused(f"the witness answered {error.code}: {said}") from None


def newest_cosigned(source: Source, origin: str) -> str | None:
    """The newest checkpoint that any witness signed, with all of their signatures; None where there is none yet."""
    rows = source.walk(_NEWEST_COSIGNED, {"origin": origin})
    return str(rows[0][0]) if rows else None


def _signature_in(answer: str, witness: Verifier, text: str) -> Signature:
    """The witness' signature over this text; raises NoteError."""
    if witness.kind != COSIGNATURE:
        raise NoteError(f"the key of {witness.name} is none of a witness, which cosigns")
    signature = witness.signature_in(parse_signatures(answer), text)
    if signature is None:
        raise NoteError(f"the answer has no signature of {witness.name}")
    if signature.timestamp > _LAST_MOMENT:
        raise NoteError(f"{witness.name} has signed at {signature.timestamp} in Unix time, which is beyond all years")
    return signature
