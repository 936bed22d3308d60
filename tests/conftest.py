"""Settings of every test run, and the folder of real preference data."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A loaded machine makes any deadline flaky. The same examples in every run show a failure to the author of a change.
settings.register_profile("rm_robust", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("rm_robust")

# The asserts of this module check the files under test, so they should show what differs.
pytest.register_assert_rewrite("tests.support.deploy_manifests")

DATA_VARIABLE = "RM_ROBUST_TEST_DATA"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data",
        default=os.environ.get(DATA_VARIABLE),
        help=f"folder of real preference data (or {DATA_VARIABLE}); without it, the tests that need it are skipped",
    )
    parser.addoption(
        "--load-seconds",
        type=float,
        default=600.0,
        help="how long test_serve_mixed_load.py sends requests (default: %(default)s)",
    )


@pytest.fixture(scope="session")
def data_dir(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--data")
    if folder is None:
        pytest.skip(f"needs real preference data: give its folder with --data or {DATA_VARIABLE}")
    assert Path(folder).is_dir(), f"--data {folder}: no such folder"
    return Path(folder)
