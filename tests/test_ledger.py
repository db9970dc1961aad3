"""The tree and its canonical bytes, against published vectors, a naive tree and an independent encoder."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool
from verify import tree_hash

from ledger import entries

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


@contextmanager
def head_of_an_empty_log(url: URL) -> Iterator[Connection]:
    """A transaction that nobody will see."""
    with create_engine(url, poolclass=NullPool).connect() as connection:
        yield connection
        connection.rollback()


def grow(connection: Connection, leaves: list[bytes]) -> list[bytes]:
    """The frontier of the tree after these leaves."""
    statement = text("SELECT grow_ledger(ledger_head, :leaves, now()) FROM ledger_head")
    connection.execute(statement, {"leaves": leaves})
    (frontier,) = connection.execute(text("SELECT frontier FROM ledger_head")).one()
    return [bytes(node) for node in frontier]


def root(frontier: list[bytes]) -> bytes:
    """The root of the tree that is made of these full subtrees, largest first."""
    return reduce(lambda right, left: hashlib.sha256(b"\x01" + left + right).digest(), reversed(frontier))


def test_roots_are_those_of_the_published_vectors(database_url: URL) -> None:
    with head_of_an_empty_log(database_url) as connection:
        for leaf, expected in zip(LEAVES, ROOTS, strict=True):
            assert root(grow(connection, [hashlib.sha256(b"\x00" + leaf).digest()])).hex() == expected


def test_any_sequence_of_flushes_gives_the_root_of_a_naive_tree(database_url: URL) -> None:
    @settings(max_examples=60)
    @given(st.lists(st.integers(1, 50), min_size=1, max_size=5))  # a full tile would need the rows of its leaves
    def check(flushes: list[int]) -> None:
        hashes: list[bytes] = []
        with head_of_an_empty_log(database_url) as connection:
            for length in flushes:
                leaves = [hashlib.sha256(b"%d" % (len(hashes) + n)).digest() for n in range(length)]
                hashes += leaves
                frontier = grow(connection, leaves)
                assert len(frontier) == len(hashes).bit_count()
        assert root(frontier) == tree_hash(hashes)

    check()


def test_a_tile_above_the_leaves_is_made_of_the_roots_below(database_url: URL) -> None:
    with head_of_an_empty_log(database_url) as connection:
        roots = [hashlib.sha256(b"%d" % n).digest() for n in range(256)]
        below = [{"n": n, "root": node, "hashes": bytes(8192)} for n, node in enumerate(roots[:-1])]
        connection.execute(text("INSERT INTO ledger_tiles VALUES (0, :n, :hashes, :root)"), below)
        # One leaf short of 256 full tiles, the last of which is made of ones whose hash is known.
        last = [hashlib.sha256(b"leaf %d" % n).digest() for n in range(256)]
        roots[-1] = tree_hash(last)
        frontier = [tree_hash(roots[start : start + size]) for start, size in spans(255)]
        statement = text("UPDATE ledger_head SET size = 255 * 256, frontier = :frontier")
        connection.execute(statement, {"frontier": frontier})
        assert grow(connection, last) == [tree_hash(roots)]
        tiles = connection.execute(text("SELECT level, tile_index, hashes, root FROM ledger_tiles WHERE level = 1"))
        (tile,) = tiles.all()
        assert (tile.tile_index, bytes(tile.hashes), bytes(tile.root)) == (0, b"".join(roots), tree_hash(roots))


def spans(size: int) -> list[tuple[int, int]]:
    """Start and width of the full subtrees of a tree of this size, largest first."""
    widths = [1 << height for height in reversed(range(size.bit_length())) if size >> height & 1]
    return [(sum(widths[:n]), width) for n, width in enumerate(widths)]


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


@settings(max_examples=2000)
@given(_json)
def test_canonical_json_is_rfc_8785_over_the_whole_input_space(value: Any) -> None:
    assert entries.canonical_json(value) == rfc8785.dumps(value)


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
    assert entries.canonical_json(value) == canonical.encode()


def test_the_personal_part_leaves_out_what_is_null_and_what_is_not_personal() -> None:
    event = {"actor": "a", "resource": None, "source_ip": None, "metadata": {"b": 1.0}, "tenant": "t"}
    assert entries.personal_part(event) == {"actor": "a", "metadata": {"b": 1.0}}
    expected = hashlib.sha256(b"n" * 16 + b'{"actor":"a","metadata":{"b":1}}').digest()
    assert entries.hash_personal_part(b"n" * 16, entries.personal_part(event)) == expected
