"""Test API keys without a server: what a keys file may hold, who passes the guard, and how often."""

import argparse
import hashlib
import json
import shlex
import tomllib
import traceback
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Scope

from pipelines.command import main
from rm_robust.data.world.gold_judge import gold_score
from rm_robust.errors import ConfigError
from rm_robust.scoring.contract import EXAMPLE_COMPLETIONS, EXAMPLE_PROMPT
from serve.__main__ import curl_example, keys_from
from serve.http.middleware import Guard, RateLimit, matching_key
from serve.keys import KEYS_VARIABLE, ApiKey, new_key, parse_keys, read_keys
from serve.settings import ModelSettings, ServiceSettings

ALICE, ALICE_ENTRY = new_key("alice")
BOB, BOB_ENTRY = new_key("bob")
KEYS = (ALICE_ENTRY, BOB_ENTRY)


def request_scope(*authorization: str, client: tuple[str, int] | None = ("10.0.0.7", 1234)) -> Scope:
    headers = [(b"host", b"x"), *((b"authorization", value.encode()) for value in authorization)]
    return {"type": "http", "path": "/v1/score", "root_path": "", "headers": headers, "client": client}


def status_of(guard: Guard, scope: Scope, now_s: float = 0.0) -> int:
    refusal = guard.refusal(scope, now_s)
    return 200 if refusal is None else refusal.status_code


def test_a_key_is_accepted_by_the_hash_in_its_file(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    (tmp_path / "keys.toml").write_text(
        f'# our team\nalice = {{ sha256 = "{digest}", requests_per_minute = 5 }}\n\n[bob]\nsha256 = "{"0" * 64}"\n'
    )
    keys = read_keys(tmp_path / "keys.toml")
    assert keys == (ApiKey(name="alice", sha256=digest, requests_per_minute=5), ApiKey(name="bob", sha256="0" * 64))
    assert matching_key([b"Bearer secret"], keys) == keys[0]


HASH = "a" * 64
WRONG_FILES = {
    "not TOML": ("alice: x", "is not TOML"),
    "empty": ("", "holds no keys"),
    "no table": ('alice = "rmk_secret"', "alice must be a table"),
    "the key itself": ('alice = { sha256 = "rmk_secret" }', "alice.sha256: String should match"),
    "upper case": (f'alice = {{ sha256 = "{HASH.upper()}" }}', "alice.sha256: String should match"),
    "no hash": ("alice = {}", "alice.sha256: Field required"),
    "an unknown field": (f'alice = {{ sha256 = "{HASH}", rate = 3 }}', "alice.rate: Extra inputs"),
    "no requests": (
        f'alice = {{ sha256 = "{HASH}", requests_per_minute = 0 }}',
        "alice.requests_per_minute: Input should be greater",
    ),
    "a name with a space": (f'"a b" = {{ sha256 = "{HASH}" }}', "a b.name: String should match"),
    "one key twice": (f'alice = {{ sha256 = "{HASH}" }}\nbob = {{ sha256 = "{HASH}" }}', "one key under two names"),
}


@pytest.mark.parametrize("wrong", WRONG_FILES.values(), ids=WRONG_FILES.keys())
def test_a_wrong_keys_file_is_refused_by_its_field_and_its_values_are_not_repeated(wrong: tuple[str, str]) -> None:
    text, message = wrong
    with pytest.raises(ConfigError, match=message) as caught:
        parse_keys(text, source="keys.toml")
    assert "rmk_secret" not in "".join(traceback.format_exception(caught.value)).replace("text, message = wrong", "")


def test_a_keys_file_that_is_missing_is_an_error_with_the_command_that_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    with pytest.raises(ConfigError, match="There is no keys file") as refused:
        read_keys(path)
    assert f"`rm-robust keys NAME >> {path}`" in str(refused.value)
    with pytest.raises(ConfigError, match="cannot be read: .*Is a directory"):
        read_keys(tmp_path)


def test_git_ignores_the_keys_file_that_the_pages_name() -> None:
    assert "/keys.toml" in Path(".gitignore").read_text().splitlines()


WRONG_HEADERS: dict[str, list[str]] = {
    "none": [],
    "empty": [""],
    "no scheme": [ALICE],
    "another scheme": [f"Basic {ALICE}"],
    "an empty key": ["Bearer "],
    "another key": [f"Bearer {new_key('alice')[0]}"],
    "the hash in place of the key": [f"Bearer {ALICE_ENTRY.sha256}"],
    "a key and more": [f"Bearer {ALICE}x"],
    "the start of a key": [f"Bearer {ALICE[:-1]}"],
    "two headers": [f"Bearer {ALICE}", f"Bearer {ALICE}"],
}


@pytest.mark.parametrize("values", WRONG_HEADERS.values(), ids=WRONG_HEADERS.keys())
def test_without_the_right_header_there_is_only_401(values: list[str]) -> None:
    refusal = Guard(KEYS).refusal(request_scope(*values), 0.0)
    assert refusal is not None
    assert (refusal.status_code, refusal.headers["www-authenticate"]) == (401, "Bearer")
    assert ALICE not in bytes(refusal.body).decode()


@pytest.mark.parametrize("value", [f"Bearer {ALICE}", f"bearer {ALICE}", f"BEARER {BOB}", f"Bearer  {BOB}"])
def test_every_key_passes_and_the_scheme_has_no_case(value: str) -> None:
    assert status_of(Guard(KEYS), request_scope(value)) == 200


def test_every_key_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(
        "serve.http.middleware.hmac.compare_digest",
        lambda digest, expected: compared.append(expected) or digest == expected,
    )
    assert matching_key([f"Bearer {ALICE}".encode()], KEYS) == ALICE_ENTRY
    assert compared == [ALICE_ENTRY.sha256, BOB_ENTRY.sha256]


@pytest.mark.parametrize(
    ("client", "status"), [(("127.0.0.1", 1), 200), (("::1", 1), 200), (("10.0.0.7", 1), 401), (None, 401)]
)
def test_without_keys_the_own_machine_alone_is_answered(client: tuple[str, int] | None, status: int) -> None:
    assert status_of(Guard(()), request_scope(client=client)) == status


def test_a_rate_limit_admits_its_number_within_any_minute() -> None:
    limit = RateLimit(3)
    assert [limit.wait_s(now_s) for now_s in (0.0, 10.0, 59.0)] == [0.0, 0.0, 0.0]
    assert limit.wait_s(59.5) == 0.5
    assert limit.wait_s(60.0) == 0.0  # the first one is a minute old
    assert limit.wait_s(61.0) == 9.0  # a refused request did not count
    assert limit.wait_s(70.0) == 0.0


def test_one_keys_limit_is_not_anothers() -> None:
    guard = Guard([ALICE_ENTRY.model_copy(update={"requests_per_minute": 1}), BOB_ENTRY])
    assert [status_of(guard, request_scope(f"Bearer {key}"), 1.0) for key in (ALICE, ALICE, BOB, BOB)] == [
        200,
        429,
        200,
        200,
    ]
    refusal = guard.refusal(request_scope(f"Bearer {ALICE}"), 2.5)
    assert refusal is not None
    assert refusal.headers["retry-after"] == "59"
    assert status_of(guard, request_scope("Bearer wrong"), 2.5) == 401


def test_a_new_key_is_printed_once_with_a_line_that_accepts_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "alice"]) == 0
    printed = capsys.readouterr()
    (key,) = [line.strip() for line in printed.err.splitlines() if line.strip().startswith("rmk_")]
    line = printed.out  # all of it: `>> keys.toml` appends it, and never the key
    keys = parse_keys(line, source="keys.toml")
    assert matching_key([f"Bearer {key}".encode()], keys) == keys[0]
    assert set(tomllib.loads(line)) == {"alice"}


def test_a_name_that_the_file_cannot_hold_gets_no_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["keys", "a b"])
    assert "rmk_" not in capsys.readouterr().out


def arguments(**changed: Any) -> argparse.Namespace:
    return argparse.Namespace(**({"keys": None, "insecure_no_auth": False} | changed))


def test_the_command_line_needs_keys_or_the_word_that_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f'alice = {{ sha256 = "{ALICE_ENTRY.sha256}" }}')
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert keys_from(arguments(keys=path)) == (ALICE_ENTRY,)
    assert keys_from(arguments(insecure_no_auth=True)) == ()
    with pytest.raises(ConfigError, match="neither keys nor --insecure-no-auth"):
        keys_from(arguments())
    with pytest.raises(ConfigError, match="keys in .* and --insecure-no-auth"):
        keys_from(arguments(keys=path, insecure_no_auth=True))
    monkeypatch.setenv(KEYS_VARIABLE, path.read_text())
    assert keys_from(arguments()) == (ALICE_ENTRY,)


def test_the_printed_example_is_of_the_embedded_world_and_its_first_answer_is_the_better() -> None:
    first, second = (gold_score(EXAMPLE_PROMPT, completion) for completion in EXAMPLE_COMPLETIONS)
    assert first > second + 0.5  # the judge's scores lie between 0 and 1
    printed = curl_example("http://x", ServiceSettings(models=(ModelSettings(model_name="m", embedded_judge=True),)))
    body = shlex.split(printed)[-1]
    assert json.loads(body) == {"inputs": [{"prompt": EXAMPLE_PROMPT, "completions": [*EXAMPLE_COMPLETIONS]}]}


def test_the_printed_example_sends_a_key_where_one_is_needed() -> None:
    judge = (ModelSettings(model_name="m", embedded_judge=True),)
    guarded = ServiceSettings(models=judge, api_keys=KEYS)
    assert '-H "authorization: Bearer $RM_ROBUST_API_KEY"' in curl_example("http://x", guarded)
    assert "authorization" not in curl_example("http://x", ServiceSettings(models=judge))
