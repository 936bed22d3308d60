"""requirements/install.sh asks pip's indexes for torch's CPU build, then the PyTorch project's, then says what to do.

A script that writes down its arguments stands for uv in all tests but one.
"""

import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
LOCK = (REPOSITORY / "requirements/cpu.lock").read_text()
TORCH = re.search(r"^torch==\S+\+cpu$", LOCK, re.MULTILINE).group()
INSTALLER = (REPOSITORY / "requirements/install.sh").read_text()
UV_VERSION = re.search(r"^uv_version=(.+)$", INSTALLER, re.MULTILINE).group(1)
UV = Path(sys.executable).with_name("uv")

FAKE_UV = f"""#!/bin/sh
[ "$1" = --version ] && echo "uv {UV_VERSION} (fake)" && exit
echo "$*" >> uv_calls
env > uv_environment
case "$*" in
    *--dry-run*) exit $PIPS_INDEXES ;;
    *--torch-backend*) exit $PYTORCHS_INDEX ;;
esac
[ -z "$INTERRUPT" ] || kill -KILL $PPID
"""
ASK = f"pip install --python .venv/bin/python --dry-run --no-deps {TORCH}"
TORCH_ALONE = f"pip install --python .venv/bin/python --torch-backend cpu --no-deps {TORCH}"
THE_REST = [
    "pip install --python .venv/bin/python --no-deps -r requirements/cpu.lock",
    "pip install --python .venv/bin/python --no-deps --no-build-isolation -e .",
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a new virtual environment with pip in it, and nothing else."""
    path = tmp_path_factory.mktemp("environment") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", path], check=True, timeout=120)
    return path


@pytest.fixture
def checkout(environment: Path, tmp_path: Path) -> Path:
    """Return a folder with the installer and the locks, and an environment whose uv only writes down its arguments."""
    shutil.copytree(REPOSITORY / "requirements", tmp_path / "requirements")
    shutil.copytree(environment, tmp_path / ".venv", symlinks=True)
    (tmp_path / ".venv/bin/uv").write_text(FAKE_UV)
    (tmp_path / ".venv/bin/uv").chmod(0o755)
    return tmp_path


def install(checkout: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    defaults = {"PIPS_INDEXES": "0", "PYTORCHS_INDEX": "0", "PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(
        ["bash", "requirements/install.sh", "cpu"],
        cwd=checkout,
        env=kept | defaults | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def uv_calls(checkout: Path) -> list[str]:
    return (checkout / "uv_calls").read_text().splitlines()


def commands_in_the_log(checkout: Path) -> list[str]:
    return re.findall(r"^\+ uv (.*)$", (checkout / ".venv/install.log").read_text(), re.MULTILINE)


def test_a_torch_that_pips_indexes_have_is_installed_with_the_rest_of_the_lock(checkout: Path) -> None:
    done = install(checkout)
    assert done.returncode == 0, done.stderr
    assert uv_calls(checkout) == [ASK, *THE_REST]
    assert re.fullmatch(r"Installed into \.venv in \d+ s", done.stdout.splitlines()[-1])
    assert (checkout / ".venv/.installed-cpu").exists()


def test_without_torch_on_pips_indexes_the_next_command_is_uvs_with_the_torch_backend(checkout: Path) -> None:
    done = install(checkout, PIPS_INDEXES="1")
    assert done.returncode == 0, done.stderr
    assert uv_calls(checkout) == [ASK, TORCH_ALONE, *THE_REST]
    assert (checkout / ".venv/.installed-cpu").exists()


def test_without_torch_anywhere_it_stops_and_names_the_fix(checkout: Path) -> None:
    done = install(checkout, PIPS_INDEXES="1", PYTORCHS_INDEX="1")
    assert done.returncode == 1
    assert uv_calls(checkout) == [ASK, TORCH_ALONE]
    assert not (checkout / ".venv/.installed-cpu").exists()
    check_that_the_message_names_the_fix(done.stderr)


def check_that_the_message_names_the_fix(stderr: str) -> None:
    message = stderr.splitlines()[-1]
    assert message.startswith(f"install: pip's indexes do not have {TORCH}")
    assert "Name an index that has it in PIP_EXTRA_INDEX_URL, or a folder with its wheel in PIP_FIND_LINKS." in message


@pytest.fixture
def index_without_the_cpu_build(tmp_path: Path) -> Iterator[str]:
    """Yield the address of a package index on loopback that has only the torch of the default index."""
    page = tmp_path / "index/torch/index.html"
    page.parent.mkdir(parents=True)
    version = TORCH.removeprefix("torch==").removesuffix("+cpu")
    page.write_text(
        f'<a href="torch-{version}-cp3{sys.version_info.minor}-cp3{sys.version_info.minor}-manylinux_2_28_x86_64.whl">'
        f"torch-{version}-cp3{sys.version_info.minor}-cp3{sys.version_info.minor}-manylinux_2_28_x86_64.whl</a>"
    )

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(tmp_path / "index"))

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.skipif(not UV.exists(), reason="needs uv, which requirements/install.sh puts into .venv")
def test_the_real_uv_finds_no_cpu_build_and_tries_the_torch_backend_and_the_message_names_the_fix(
    checkout: Path, index_without_the_cpu_build: str
) -> None:
    (checkout / ".venv/bin/uv").unlink()
    (checkout / ".venv/bin/uv").symlink_to(UV)
    done = install(
        checkout,
        PIP_INDEX_URL=index_without_the_cpu_build,
        UV_CACHE_DIR=str(checkout / "cache"),
        UV_HTTP_RETRIES="0",
        HTTPS_PROXY="http://127.0.0.1:9",  # nothing listens there, so the PyTorch project's index cannot be reached
        NO_PROXY="",
    )
    assert done.returncode == 1
    assert commands_in_the_log(checkout) == [
        f"pip install --dry-run --no-deps {TORCH}",
        f"pip install --torch-backend cpu --no-deps {TORCH}",
    ]
    assert f"there is no version of {TORCH}" in (checkout / ".venv/install.log").read_text()
    check_that_the_message_names_the_fix(done.stderr)


def test_uv_gets_pips_settings_and_no_password_is_written_anywhere(checkout: Path) -> None:
    (checkout / "pip.conf").write_text(
        "[global]\nextra-index-url =\n    https://me:secret@a.test/simple\n    https://b.test/simple\n"
    )
    done = install(checkout, PIP_CONFIG_FILE=str(checkout / "pip.conf"), PIP_FIND_LINKS="/wheels", PIP_CERT="/ca.pem")
    assert done.returncode == 0, done.stderr
    passed_on = (checkout / "uv_environment").read_text().splitlines()
    assert "UV_INDEX=https://me:secret@a.test/simple https://b.test/simple" in passed_on
    assert "UV_FIND_LINKS=/wheels" in passed_on
    assert "secret" not in done.stdout + done.stderr + (checkout / ".venv/install.log").read_text()


def test_an_interrupted_installation_makes_the_environment_anew(checkout: Path) -> None:
    interrupted = install(checkout, INTERRUPT="1")
    assert interrupted.returncode == -9
    assert not (checkout / ".venv/.installed-cpu").exists()
    repeated = install(checkout, PYTHON="no-such-python")
    assert "so .venv is made anew" in repeated.stdout
    assert not (checkout / ".venv").exists()
    assert repeated.stderr.splitlines() == [
        "install: 'no-such-python' does not run. Install Python 3.11, or name an interpreter: "
        "make PYTHON=/path/to/python3.11 …"
    ]


def test_a_uv_that_fails_leaves_no_stamp_and_no_mark_of_an_interruption(checkout: Path) -> None:
    (checkout / ".venv/.installed-cpu").touch()
    (checkout / ".venv/bin/uv").write_text(FAKE_UV + "\ncase $* in *cpu.lock) echo disk full; exit 2 ;; esac\n")
    failed = install(checkout)
    assert failed.returncode == 1
    assert "disk full" in failed.stderr
    assert [path.name for path in (checkout / ".venv").glob(".*")] == []
