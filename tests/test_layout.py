"""What DESIGN says of the code's shape, held true: imports point one way, docs name what exists."""

import ast
import re
from pathlib import Path

import pytest

import problems
from config import ROOT
from main import app

# A module imports from lower layers only.
LAYERS = [
    {"cli"},
    {"verifier.command"},
    {"verifier.database", "verifier.export"},
    {"verifier.adopted", "verifier.ranges", "verifier.remote"},
    {"verifier.records", "verifier.swaps"},
    {"verifier.rows"},
    {"verifier.differences", "verifier.entries", "verifier.promises", "verifier.tree"},
    {"server"},
    {"main"},
    {"routes"},
    {"proofs.watch", "proofs.witnesses", "proofs.continuation"},
    {"proofs.checkpoints", "proofs.signing"},
    {"proofs.paths", "proofs.sink"},
    {"proofs.tiles"},
    {"queries.aggregates", "queries.exports", "ingest.reads", "queries.replica", "queries.stream"},
    {"queries.pages", "queries.lookup"},
    {"queries.listing", "housekeeping.rounds"},
    {"auth"},
    {"keys.memory"},
    {"ingest.writer", "queries.filters", "telemetry", "keys.store"}
    | {"housekeeping.holds", "housekeeping.redaction", "housekeeping.retention", "housekeeping.rewrite"},
    {"housekeeping.adoption"},
    {"ingest.records"},
    {
        "ingest.append",
        "housekeeping.partitions",
        "housekeeping.privileges",
        "ingest.cloudevents",
        "queries.cursors",
        "queries.lines",
    },
    {"ingest.parse", "edge.direct"},
    {"edge.connections"},
    {"models", "schemas"},
    {"fields"},
    {"ledger.entries", "ledger.tree", "ledger.notes", "queries.reader", "keys.tokens"},
    {"queries.seals"},
    {"db"},
    {"migrations", "cluster", "edge.limits"},
    {"config", "problems"},
    {"edge.headers"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
PROBLEMS = [
    value
    for value in vars(problems).values()
    if isinstance(value, type) and issubclass(value, problems.Problem) and value is not problems.Problem
]
PACKAGES = ("edge", "housekeeping", "ingest", "keys", "ledger", "proofs", "queries", "routes", "verifier")
MODULES = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).glob("[!_]*.py"))]
MOST_MODULES_AT_THE_TOP = 14


def layer_name(path: Path) -> str:
    package = path.parent.name
    if package == "routes":
        return package
    return f"{package}.{path.stem}" if package in PACKAGES else path.stem


def imported_modules(path: Path) -> set[str]:
    """As LAYERS names them; of `from package import module` it is the module that counts."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return {"routes" if name.startswith("routes") else name for name in names}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    name = layer_name(path)
    assert name in RANK, f"{name} has no layer yet: give it one"
    own = {imported for imported in imported_modules(path) if imported in RANK}
    allowed = {"routes": {"routes"}}.get(name, set())
    assert {imported for imported in own - allowed if RANK[imported] <= RANK[name]} == set()


def test_only_config_reads_the_environment() -> None:
    readers = [
        path.name for path in MODULES if re.search(r"os\.environ(?!\[.*\] = )|os\.getenv|dotenv", path.read_text())
    ]
    assert readers == ["config.py"]


def test_the_readme_names_every_call_and_every_error() -> None:
    readme = (ROOT / "README.md").read_text()
    calls = [f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items() for method in methods]
    assert [call for call in calls if f"`{call}" not in readme] == []
    assert [cls.code for cls in PROBLEMS if f"`{cls.code}`" not in readme] == []


def test_the_hierarchy_in_problems_is_the_real_one() -> None:
    drawn = re.findall(r"[├└]── (\w+) +(\d+)", problems.__doc__ or "")
    assert sorted(drawn) == sorted((cls.__name__, str(cls.status)) for cls in PROBLEMS)


def test_every_module_is_on_the_map_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    missing = [path for path in MODULES if path.parent.name != "routes" and f"{path.name}" not in readme]
    assert missing == []


def test_the_top_level_stays_small() -> None:
    assert len(list(ROOT.glob("*.py"))) <= MOST_MODULES_AT_THE_TOP


def test_openapi_has_examples_and_both_kinds_of_key() -> None:
    document = app.openapi()
    post = document["paths"]["/events"]["post"]
    assert post["requestBody"]["content"]["application/json"]["schema"]["examples"]
    assert set(post["responses"]) >= {"201", "400", "401", "413", "415", "422", "503"}
    assert {scheme["type"] for scheme in document["components"]["securitySchemes"].values()} == {"apiKey", "http"}


@pytest.mark.parametrize("document", ["docs/security.md", "docs/threat-model.md"])
def test_every_test_that_the_documents_name_exists(document: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / document).read_text())
    assert named
    assert [
        (path, test)
        for path, test in named
        if not (ROOT / path).is_file() or (test and f"def {test}(" not in (ROOT / path).read_text())
    ] == []


def test_every_attack_names_its_test() -> None:
    rows = [line for line in (ROOT / "docs/threat-model.md").read_text().splitlines() if line.startswith("| ")]
    titles = ("| attack", "| who ", "| ---")
    assert [row for row in rows if "`tests/" not in row and not row.startswith(titles)] == []
