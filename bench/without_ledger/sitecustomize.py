"""For the other side of `make bench-ledger`: a Python that finds this on PYTHONPATH hashes no personal part."""

import ledger.entries

ledger.entries.hash_personal_part = lambda nonce, personal: nonce + nonce
