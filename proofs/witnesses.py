"""Witnesses: others who see the log grow, and sign that it did (c2sp.org/tlog-witness, c2sp.org/tlog-cosignature)."""

import http.client
import urllib.error
import urllib.request
from base64 import b64encode

from sqlalchemy import text

from db import Database
from ledger.notes import NoteError, Verifier, parse_note, parse_signatures, parse_tree_head
from proofs.checkpoints import Checkpoint
from proofs.paths import prove_consistency
from proofs.tiles import Source, TransactionSource

_TIMEOUT_S = 10
_MOST_BYTES = 100_000

# Index: ledger_cosignatures_pkey.
_LAST_SIZE = text("SELECT max(size) FROM ledger_cosignatures WHERE origin = :origin AND witness = :witness")
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

    Raises what Database.transaction() raises.
    """
    head = checkpoint.head
    with database.transaction() as connection:
        if old_size is None:
            known = {"origin": head.origin, "witness": str(witness)}
            old_size = int(connection.scalar(_LAST_SIZE, known) or 0)
        path = prove_consistency(TransactionSource(connection), old_size, head.size)
    lines = "".join(f"{b64encode(node).decode()}\n" for node in path)
    return f"old {old_size}\n{lines}\n{checkpoint.note}"


def keep_cosignature(database: Database, request: str, witness: Verifier, answer: str) -> int:
    """Keep what the witness signed under the checkpoint of the request; the checkpoint's size.

    Raises NoteError where the answer has no such signature or it does not verify, and what transaction() raises.
    """
    note = parse_note(request.partition("\n\n")[2])
    head = parse_tree_head(note.text)
    signature = witness.signature_in(parse_signatures(answer), note.text)
    if signature is None:
        raise NoteError(f"the answer has no signature of {witness.name}")
    values = {"origin": head.origin, "size": head.size, "witness": str(witness), "signature": str(signature)}
    with database.transaction() as connection:
        connection.execute(_KEEP, {**values, "signed_at": signature.timestamp})
    return head.size


def send_to_witness(url: str, request: str) -> str:
    """POST the request to a witness' submission prefix; raises WitnessRefused and OSError."""
    sent = urllib.request.Request(f"{url.rstrip('/')}/add-checkpoint", request.encode(), method="POST")  # noqa: S310 - the operator's own
    try:
        with urllib.request.urlopen(sent, timeout=_TIMEOUT_S) as answer:  # nosec B310  # noqa: S310 - as above
            return str(answer.read(_MOST_BYTES).decode())
    except urllib.error.HTTPError as error:
        said = error.read(200).decode(errors="replace").strip()
        if error.code == 409:
            said = f"it has signed a checkpoint of size {said} last: name that with --old-size"
        raise WitnessRefused(f"the witness answered {error.code}: {said}") from None
    except (http.client.HTTPException, UnicodeDecodeError) as error:
        raise WitnessRefused(f"what the witness answered is not HTTP, or no text: {type(error).__name__}") from None


def newest_cosigned(source: Source, origin: str) -> str | None:
    """The newest checkpoint that any witness signed, with all of their signatures; None where there is none yet."""
    rows = source.walk(_NEWEST_COSIGNED, {"origin": origin})
    return str(rows[0][0]) if rows else None
