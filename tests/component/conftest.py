"""Each test file of this folder runs in a process of its own, because a process may have only one Ray cluster."""

import signal
from collections.abc import Iterator

import pytest

_modules: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def _one_cluster_a_process(request: pytest.FixtureRequest) -> None:
    """Refuse to run a second module in one process.

    Ray derives actor ids from the job's number and a counter, so they repeat in the next cluster of a process. When a
    handle of an earlier cluster is collected, it takes a reference from the actor with the same id in this cluster, and
    Ray cancels that actor.
    """
    _modules.append(request.node.name)
    if len(_modules) > 1:
        pytest.exit(
            f"{_modules[-1]} needs a process of its own, but {_modules[0]} ran in this one. "
            "`make test` starts a process for each.",
            returncode=3,
        )


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let Ctrl-C interrupt Python. It ignores SIGINT if its parent does, for example in a script's background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
