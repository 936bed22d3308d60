"""Each file of this folder has a process of its own: one Ray cluster a process."""

import signal
from collections.abc import Iterator

import pytest

_modules: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def _one_cluster_a_process(request: pytest.FixtureRequest) -> None:
    """Ray's actor ids derive from the job's number and a counter, so they repeat from one cluster of a process to the next. A handle that Ray keeps
    of an earlier cluster then takes a reference from an actor of this one when it is collected, and Ray cancels that actor."""
    _modules.append(request.node.name)
    if len(_modules) > 1:
        pytest.exit(
            f"{_modules[-1]} needs a process of its own, and {_modules[0]} ran in this one. `make test` starts one for each.",
            returncode=3,
        )


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python ignores SIGINT where its parent did, as of a job in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
