"""The key that signs checkpoints: the one of the settings, or in development one that is made once and kept."""

from config import ConfigurationError, Settings, kept_secret
from ledger.notes import NOTE, NoteError, Signer, generate_signer, parse_signer

DEVELOPMENT_ORIGIN = "localhost/audit"


def signer_in_force(settings: Settings) -> Signer:
    """The signer, whose name is the log's origin; raises ConfigurationError."""
    text = settings.ledger_signing_key
    if text is None and not settings.in_development:
        raise ConfigurationError(
            "LEDGER_SIGNING_KEY: not set, nor is LEDGER_SIGNING_KEY_FILE. Make a key with `python cli.py ledger keygen"
            " --origin audit.example.com/log`"
        )
    if text is None:
        origin = settings.ledger_origin or DEVELOPMENT_ORIGIN
        text = kept_secret(settings.data_dir / "ledger_signing_key", lambda: generate_signer(origin).secret_text())
    signer = _parse(text)
    if settings.ledger_origin not in (None, signer.name):
        raise ConfigurationError(f"LEDGER_ORIGIN: the signing key is that of {signer.name}; the two must agree")
    return signer


def _parse(text: str) -> Signer:
    try:
        signer = parse_signer(text)
    except NoteError as error:
        raise ConfigurationError(f"LEDGER_SIGNING_KEY: {error}") from None
    if signer.kind != NOTE:
        raise ConfigurationError("LEDGER_SIGNING_KEY: it is a witness' key, which cosigns and does not sign")
    return signer
