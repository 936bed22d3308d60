"""API keys: a TOML file has their names and hashes. Without a key, every route but /healthz and /readyz answers 401.

    alice = { sha256 = "…64 hex digits…" }
    bob = { sha256 = "…", requests_per_minute = 600 }

Each line is one key. RM_ROBUST_API_KEYS may hold the same text instead. `rm-robust keys alice` prints a new key,
which is not shown again, and its line; `rm-robust keys alice >> keys.toml` writes the line into the file.

Keys have 256 random bits, so a plain hash gives nothing away. To withdraw a key, delete its line; then send SIGHUP to
`python -m serve`, or deploy again on a Ray cluster. A run makes a key of its own for its scorers (run_service.py), so
they are guarded as well. Without keys (`insecure_no_auth`), only clients on the same machine are answered.

Ray Serve's proxy stands in front of all this and answers two paths of its own to anybody: /-/healthz, and /-/routes
(route prefixes and application names). Let the TLS proxy in front of an open port refuse /-/.
"""

import argparse
import hashlib
import os
import re
import secrets
import sys
import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rm_robust.errors import ConfigError

KEYS_VARIABLE = "RM_ROBUST_API_KEYS"
NAME_PATTERN = r"^[A-Za-z0-9_-]+$"


class ApiKey(BaseModel):
    """One key that is accepted. The server knows only its hash."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = Field(pattern=NAME_PATTERN)
    """Whose key it is; each name is given once."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """The SHA-256 of the key's bytes, in hex."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """The most requests within any minute. None: as many as the scorer's queue takes."""


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Return the keys of a file. Raises ConfigError when the file cannot be read, and what parse_keys raises."""
    try:
        text = path.read_text()
    except FileNotFoundError as error:
        raise ConfigError(
            f"There is no keys file {path}. `rm-robust keys NAME >> {path}` makes a key and writes its line."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The keys file {path} cannot be read: {error}.") from error
    return parse_keys(text, source=str(path))


def keys_from_environment() -> tuple[ApiKey, ...]:
    """Return the keys in RM_ROBUST_API_KEYS; none if it is not set. Raises what parse_keys raises."""
    return parse_keys(os.environ[KEYS_VARIABLE], source=KEYS_VARIABLE) if KEYS_VARIABLE in os.environ else ()


def parse_keys(text: str, *, source: str) -> tuple[ApiKey, ...]:
    """Return the keys of a keys file's text; `source` names it in errors.

    Raises ConfigError for text that is not TOML, for a wrong field, for one key under two names, and for no keys at
    all. No message, and no chained error, repeats a value: somebody may have written the key in place of its hash.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {error}.") from None
    keys = tuple(parse_key(name, entry, source=source) for name, entry in table.items())
    if not keys:
        raise ConfigError(f"{source} holds no keys; `rm-robust keys NAME` makes one.")
    if len({key.sha256 for key in keys}) < len(keys):
        raise ConfigError(
            f"{source} holds one key under two names; deleting one of them would not take it back. "
            "Give each name a key of its own."
        )
    return keys


def parse_key(name: str, entry: object, *, source: str) -> ApiKey:
    if not isinstance(entry, dict):
        raise ConfigError(f'{source}: {name} must be a table: {name} = {{ sha256 = "…" }}.')
    try:
        return ApiKey.model_validate({**entry, "name": name})
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise ConfigError(f"{source}: {name}.{'.'.join(map(str, problem['loc']))}: {problem['msg']}.") from None


def new_key(name: str) -> tuple[str, ApiKey]:
    """Return a new random key, and the entry under which a server accepts it."""
    key = "rmk_" + secrets.token_urlsafe(32)
    return key, ApiKey(name=name, sha256=hashlib.sha256(key.encode()).hexdigest())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command that makes a key."""
    parser.add_argument("name", type=key_name, help="whose key it is: letters, digits, _ and -")


def key_name(text: str) -> str:
    """Return the name if the keys file can hold it. Raises argparse's error otherwise."""
    if not re.fullmatch(NAME_PATTERN, text):
        raise argparse.ArgumentTypeError(f"a name has letters, digits, _ and - only, got {text!r}")
    return text


def main(options: argparse.Namespace) -> int:
    """Make a key, print it and its line for the keys file, and return the exit code.

    The line alone goes to stdout, so that `>> keys.toml` writes it; the key goes to stderr, never into the file.
    """
    key, entry = new_key(options.name)
    print(
        f"The key, for its owner; it is not shown again:\n\n  {key}\n\n"
        "Its line for the keys file (`>> keys.toml` appends it):\n",
        file=sys.stderr,
        flush=True,
    )
    print(f'{entry.name} = {{ sha256 = "{entry.sha256}" }}')
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m serve.keys", description="Make an API key. It is printed once, here; only its hash is kept."
    )
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
