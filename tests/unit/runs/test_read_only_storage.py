"""A real file system, in a mount namespace of its own, becomes read-only or full in the middle of a commit."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

IN_A_NAMESPACE = ("unshare", "--mount", "--propagation", "private")
COMMITS = """
import subprocess, sys
from pathlib import Path
from rm_robust.runs.storage.commits import commit_directory
from rm_robust.errors import StorageError

disk, breaks = Path(sys.argv[1]), sys.argv[2]
target = disk / "checkpoint"

def mount(*options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(disk)], check=True)

def write(folder, text):
    (folder / "first").write_text(text)
    if text == "two":
        if breaks == "read-only":
            mount("remount", "ro")
        (folder / "second").write_text(text * (2**21 if breaks == "full" else 1))
    else:
        (folder / "second").write_text(text)

def contents():
    return [(path.name, path.read_text()) for path in sorted(target.iterdir())]

mount("size=1m")
commit_directory(target, lambda folder: write(folder, "one"))
try:
    commit_directory(target, lambda folder: write(folder, "two"))
except StorageError as error:
    print(error)
assert contents() == [("first", "one"), ("second", "one")], contents()
mount("remount", "rw", "size=1m")
commit_directory(target, lambda folder: write(folder, "three"))
assert contents() == [("first", "three"), ("second", "three")], contents()
assert [path.name for path in disk.iterdir()] == ["checkpoint"], "what was half written is gone"
"""


@pytest.mark.parametrize(
    ("breaks", "reason"), [("read-only", "Read-only file system"), ("full", "No space left on device")]
)
def test_the_last_commit_is_whole_and_the_next_one_works(tmp_path: Path, breaks: str, reason: str) -> None:
    if (
        shutil.which("unshare") is None
        or subprocess.run([*IN_A_NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], check=False).returncode
    ):
        pytest.skip("this machine gives no mount namespace: a real read-only disk cannot be made")
    done = subprocess.run(
        [*IN_A_NAMESPACE, sys.executable, "-c", COMMITS, str(tmp_path), breaks],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    message = f"{tmp_path}/checkpoint could not be written: {reason}. What was committed before is as it was. "
    assert message + "Make room, or mend the storage" in done.stdout
