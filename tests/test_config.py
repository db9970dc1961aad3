"""Settings: where they come from, which are refused, and that each is documented."""

import re
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import SCRUBBED

from config import ROOT, ConfigurationError, load_settings

SECRET = "s3cr3t-pass-word"
VARIABLES = sorted(set(re.findall(r'read\.\w+\("([A-Z_]+)"', (ROOT / "config.py").read_text())))


def load(env_file: Path | None = None, **variables: str) -> str | None:
    url = load_settings(variables, env_file).database_url
    return None if url is None else url.render_as_string(hide_password=False)


def test_database_url_wins_over_the_parts() -> None:
    assert load(DATABASE_URL="postgresql://a:b@c:1/d", DB_HOST="other") == "postgresql+psycopg2://a:b@c:1/d"
    assert load(DATABASE_URL="postgres://a@c/d?sslmode=require") == "postgresql+psycopg2://a@c/d?sslmode=require"


def test_the_parts_make_a_url_whatever_the_password_holds() -> None:
    parts = {"DB_USER": "u", "DB_PASSWORD": "p@:/?#% ü", "DB_NAME": "n", "DB_HOST": "h", "DB_PORT": "6543"}
    url = load_settings(parts, None).database_url
    assert url is not None
    assert (url.username, url.password, url.host, url.port, url.database) == ("u", "p@:/?#% ü", "h", 6543, "n")


def test_neither_means_the_embedded_server() -> None:
    assert load() is None
    assert load(DATABASE_URL="", DB_USER="u", DB_PASSWORD="p", DB_NAME="n") is None


def test_the_environment_wins_over_the_env_file(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("PORT=1234\nLOG_WRITES=true\nHOST=from-file\n")
    settings = load_settings({"PORT": "4321", "HOST": ""}, env_file)
    assert (settings.port, settings.log_writes, settings.host) == (4321, True, "127.0.0.1")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", f"mysql://u:{SECRET}@h/d"),
        ("DATABASE_URL", f"{SECRET} is not a url"),
        ("DATABASE_URL", f"postgresql://u:{SECRET}@h:port/d"),
        ("DATABASE_URL", f"sqlite:///{SECRET}"),
        ("API_KEY", f"{SECRET} with spaces"),
        ("API_KEY", f"{SECRET}\n"),
        ("API_KEY", f"{SECRET}é"),
        ("API_KEY", "change-me"),
        ("PORT", "0"),
        ("PORT", "65536"),
        ("PORT", "http"),
        ("RUN_MIGRATIONS", "maybe"),
        ("LOG_WRITES", "on!"),
        ("LOG_LEVEL", "LOUD"),
        ("ENVIRONMENT", "staging"),
        ("QUERY_TIMEOUT", "0s"),  # to PostgreSQL, without end
        ("IDEMPOTENCY_WINDOW", "0d"),
        ("CHECKPOINT_INTERVAL", "00m"),
    ],
)
def test_a_wrong_value_is_refused_by_name_and_never_shown(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name}: ") as refused:
        load_settings({name: value}, None)
    assert SECRET not in str(refused.value)
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


def test_clocks_may_be_asked_not_to_differ() -> None:
    assert load_settings({"MAX_CLOCK_SKEW": "0s"}, None).max_clock_skew == timedelta(0)


def test_a_wrong_port_of_the_parts_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^DB_PORT: "):
        load_settings({"DB_HOST": "h", "DB_PORT": "x"}, None)


def test_placeholders_are_refused_outside_development_only() -> None:
    parts = {"DB_HOST": "h", "DB_PASSWORD": "change-me-too"}
    with pytest.raises(ConfigurationError, match=r"^DB_PASSWORD: "):
        load_settings(parts, None)
    assert load_settings({**parts, "API_KEY": "change-me", "ENVIRONMENT": "development"}, None).in_development


def test_settings_show_no_secret_in_their_repr() -> None:
    settings = load_settings({"API_KEY": "key-" + "k" * 30, "DATABASE_URL": f"postgresql://u:{SECRET}@h/d"}, None)
    assert "key-" not in repr(settings)
    assert SECRET not in repr(settings)


def test_the_example_file_is_a_working_one() -> None:
    settings = load_settings({}, ROOT / ".env.example")
    assert settings.api_key == "change-me"
    assert settings.in_development


@pytest.mark.parametrize("document", [".env.example", "README.md"])
def test_every_variable_is_documented(document: str) -> None:
    text = (ROOT / document).read_text()
    assert [name for name in VARIABLES if not re.search(rf"\b{name}\b", text)] == []


def test_no_variable_is_documented_that_nothing_reads() -> None:
    documented = re.findall(r"^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    compose = set(re.findall(r"\$\{([A-Z_]+)", (ROOT / "docker-compose.yml").read_text()))
    assert sorted(documented) == sorted({*VARIABLES, *compose})


def test_the_suite_hides_every_variable_of_the_machine() -> None:
    assert sorted(SCRUBBED) == VARIABLES
