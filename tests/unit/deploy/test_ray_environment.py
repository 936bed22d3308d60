"""`source deploy/ray_environment.sh` makes a terminal ready for Ray with one command, and keeps the token secret."""

import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]

FAKES = {
    "make": """echo "$@" > made
mkdir -p .venv/bin
echo "export PATH=$PWD/.venv/bin:$PATH" > .venv/bin/activate
exit $MAKE_STATUS""",
    "ray": """test "$*" = "get-auth-token --generate" && test "$RAY_AUTH_MODE" = token && mkdir -p ~/.ray || exit 1
test -n "$RAY_AUTH_TOKEN" || test -e ~/.ray/auth_token && exit 0
echo made > ~/.ray/auth_token
ls -l ~/.ray/auth_token > created""",
}
"""Scripts that replace an installation, which would take minutes."""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(("make_status", "argument"), [(0, ""), (0, "/shared/runs"), (2, "")])
def test_a_terminal_is_ready_for_ray_after_one_command_or_says_why_not(
    tmp_path: Path, make_status: int, argument: str
) -> None:
    terminal = source_ray_environment(
        tmp_path,
        f"{argument}\necho $? $RAY_AUTH_MODE $RAY_JOB_STOP_WAIT_TIME_S $RM_ROBUST_RUN_ROOT",
        MAKE_STATUS=str(make_status),
    )
    expected = ["0", "token", "60", *argument.split()] if make_status == 0 else ["2"]
    assert terminal.stdout.split() == expected, terminal.stderr
    assert (tmp_path / "made").read_text() == "--no-print-directory install\n"
    assert (tmp_path / ".ray" / "auth_token").exists() == (make_status == 0)


def source_ray_environment(home: Path, rest: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Source the script in a terminal whose files everybody may read. `rest` follows on the same line."""
    for name, text in FAKES.items():
        (home / name).write_text(f"#!/bin/sh\n{text}\n")
        (home / name).chmod(0o755)
    environment = {"HOME": str(home), "PATH": f"{home}:/usr/bin:/bin", "MAKE_STATUS": "0", **variables}
    script = f"umask 022; source {REPOSITORY}/deploy/ray_environment.sh {rest}"
    return subprocess.run(["bash", "-c", script], cwd=home, env=environment, capture_output=True, text=True, timeout=30)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_rays_token_is_never_readable_by_others_and_the_terminals_umask_stays(tmp_path: Path) -> None:
    terminal = source_ray_environment(tmp_path, "&& umask")
    assert (terminal.stdout, terminal.stderr) == ("0022\n", "")
    assert (tmp_path / "created").read_text().startswith("-rw-------"), "from the start, and not by a later chmod"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o604, 0o644, 0o444])
@pytest.mark.parametrize("is_link", [False, True])
@pytest.mark.parametrize("variables", [{}, {"RAY_AUTH_TOKEN": "of another cluster"}])
def test_a_token_that_others_could_read_is_replaced_and_what_to_restart_is_said(
    tmp_path: Path, mode: int, is_link: bool, variables: dict[str, str]
) -> None:
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    held = tmp_path / "elsewhere" if is_link else token
    held.write_text("old\n")
    held.chmod(mode)
    if is_link:
        token.symlink_to(held)
    terminal = source_ray_environment(tmp_path, **variables)
    assert terminal.returncode == 0, terminal.stderr
    if mode in (0o600, 0o400):
        assert (token.read_text(), terminal.stderr) == ("old\n", "")
        return
    assert (token.read_text(), stat.S_IMODE(token.lstat().st_mode)) == ("made\n", 0o600)
    (line,) = terminal.stderr.splitlines()
    assert re.search(
        r"a new token takes its place\. Stop, and start again, every cluster and run that began with the old one", line
    )
