"""Signed notes: the example of Go's sumdb/note, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger import notes
from ledger.notes import NoteError

# golang.org/x/mod/sumdb/note, the package's own example.
SECRET = "PRIVATE+KEY+PeterNeumann+c74f20a3+AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"
PUBLIC = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
SIGNATURE = "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="
TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
SIGNED = f"{TEXT}\n— PeterNeumann {SIGNATURE}\n"


def test_the_example_of_the_reference_implementation() -> None:
    signer = notes.parse_signer(SECRET)
    assert (str(signer.verifier), signer.secret_text()) == (PUBLIC, SECRET)
    assert str(notes.Note(TEXT, [signer.sign(TEXT)])) == SIGNED
    opened = notes.parse_note(SIGNED)
    assert opened.text == TEXT and str(opened) == SIGNED
    assert notes.parse_verifier(PUBLIC).signature_in(opened.signatures, TEXT) is not None
    assert "EKFAL" not in repr(signer)


@given(st.integers(0, 2**63 - 1), st.binary(min_size=32, max_size=32))
def test_a_checkpoint_is_opened_as_it_was_signed(size: int, root: bytes) -> None:
    signer = notes.generate_signer("audit.example.org/log")
    head, opened = notes.open_checkpoint(str(notes.sign_checkpoint(signer, size, root)), signer.verifier)
    assert (head.origin, head.size, head.root) == ("audit.example.org/log", size, root)
    assert notes.parse_signer(signer.secret_text()) == signer
    with pytest.raises(NoteError):
        notes.open_checkpoint(str(opened), notes.generate_signer("audit.example.org/log").verifier)
    with pytest.raises(NoteError):
        notes.open_checkpoint(str(opened), notes.generate_signer("another.example.org").verifier)
    changed = notes.Note(str(notes.TreeHead(head.origin, size + 1, root)), opened.signatures)
    with pytest.raises(NoteError):
        notes.open_checkpoint(str(changed), signer.verifier)


def test_a_cosignature_is_over_its_moment_too() -> None:
    witness = notes.generate_signer("witness.example.org", notes.COSIGNATURE)
    signature = witness.cosign(TEXT, 1_700_000_000)
    assert signature.timestamp == 1_700_000_000
    assert witness.verifier.signature_in([signature], TEXT) == signature
    later = notes.Signature(signature.name, signature.key_id, (1_700_000_001).to_bytes(8) + signature.payload[8:])
    with pytest.raises(NoteError):
        witness.verifier.signature_in([later], TEXT)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "text\n",
        SIGNED[:-1],
        SIGNED.replace("\n\n", "\n"),
        SIGNED.replace("— ", "- "),
        SIGNED.replace("x08go", "x08g*"),
        "\t" + SIGNED,
        TEXT + "\n— a+b AAAAAAAA\n",
    ],
)
def test_what_is_not_a_note_is_refused(text: str) -> None:
    with pytest.raises(NoteError):
        notes.parse_note(text)


@pytest.mark.parametrize(
    "key",
    ["", "name", PUBLIC.replace("c74f20a3", "c74f20a4"), PUBLIC.replace("Peter", "Petra"), PUBLIC[:-4], f"x y{PUBLIC}"],
)
def test_what_is_not_a_key_is_refused(key: str) -> None:
    with pytest.raises(NoteError):
        notes.parse_verifier(key)
    with pytest.raises(NoteError) as refused:
        notes.parse_signer(f"PRIVATE+KEY+{key}")
    assert "ARpc2" not in str(refused.value)
