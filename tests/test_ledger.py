"""The tree and its canonical bytes, against published vectors, a naive tree and an independent encoder."""

import hashlib
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

import ledger

# The tree of certificate-transparency's reference tests: eight leaves, and the root at each size.
LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def naive_root(hashes: list[bytes]) -> bytes:
    """MTH of RFC 6962 section 2.1, word for word."""
    if not hashes:
        return hashlib.sha256(b"").digest()
    if len(hashes) == 1:
        return hashes[0]
    split = 1 << (len(hashes) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + naive_root(hashes[:split]) + naive_root(hashes[split:])).digest()


@pytest.mark.parametrize("size", range(1, 9))
def test_roots_are_those_of_the_published_vectors(size: int) -> None:
    hashes = [ledger.hash_leaf(leaf) for leaf in LEAVES[:size]]
    assert ledger.root(ledger.append_leaves([], 0, hashes)).hex() == ROOTS[size - 1]


def test_the_empty_tree() -> None:
    assert ledger.root([]).hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@given(st.lists(st.integers(0, 300), max_size=6))
def test_any_sequence_of_batches_gives_the_root_of_a_naive_tree(batches: list[int]) -> None:
    frontier: list[bytes] = []
    hashes: list[bytes] = []
    for length in batches:
        leaves = [hashlib.sha256(b"%d" % (len(hashes) + n)).digest() for n in range(length)]
        frontier = ledger.append_leaves(frontier, len(hashes), leaves)
        hashes += leaves
        assert len(frontier) == len(hashes).bit_count()
    assert ledger.root(frontier) == naive_root(hashes)


def test_the_root_of_a_tile_is_the_root_of_its_hashes() -> None:
    hashes = [hashlib.sha256(b"%d" % n).digest() for n in range(ledger.TILE_WIDTH)]
    assert ledger.tile_root(b"".join(hashes)) == naive_root(hashes)


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=2000, deadline=None)
@given(_json)
def test_canonical_json_is_rfc_8785_over_the_whole_input_space(value: Any) -> None:
    assert ledger.canonical_json(value) == rfc8785.dumps(value)


@pytest.mark.parametrize(
    ("value", "canonical"),
    [
        ({"\U0001f600": 1, "\uff00": 2}, '{"\U0001f600":1,"\uff00":2}'),  # UTF-16 order, not code point order
        ([1.0, -0.0, 1e21, 1e22, 1e-7, 5e-324, 333333333.33333329], "[1,0,1e+21,1e+22,1e-7,5e-324,333333333.3333333]"),
        ({"b": 10**22, "a": 2**53 - 1}, '{"a":9007199254740991,"b":1e+22}'),
        ('\u20ac$\u000f\nA\'B"\\\\"/\x7f\u2028', '"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/\x7f\u2028"'),
    ],
)
def test_canonical_json_where_encoders_differ(value: Any, canonical: str) -> None:
    assert ledger.canonical_json(value) == canonical.encode()


def test_the_personal_part_leaves_out_what_is_null_and_what_is_not_personal() -> None:
    event = {"actor": "a", "resource": None, "source_ip": None, "metadata": {"b": 1.0}, "tenant": "t"}
    assert ledger.personal_part(event) == {"actor": "a", "metadata": {"b": 1.0}}
    expected = hashlib.sha256(b"n" * 16 + b'{"actor":"a","metadata":{"b":1}}').digest()
    assert ledger.hash_personal_part(b"n" * 16, ledger.personal_part(event)) == expected
