"""Find the error that a user can correct behind the failure of another process.

Ray wraps such an error in errors of its own, once for each process that it passes through.
"""

import logging
import re

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, UserCodeException, WorkerCrashedError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from rm_robust import errors
from rm_robust.errors import RmRobustError

LOST = (NodeDiedError, WorkerCrashedError, OutOfMemoryError, TrainingFailedError)
"""Failures that are not caused by the config. The same command continues from what is committed."""
_PROJECT_ERROR = re.compile(r"^rm_robust\.errors\.(\w+): (.+)$", re.MULTILINE)
"""The line of a traceback that names an error of rm_robust/errors.py and the first line of its message."""


def origin_of(error: BaseException) -> BaseException:
    """Return the error that was raised first.

    For a worker group this is the first failure that a user can correct, or else the group's error itself. Ray Data
    2.60 keeps only the text of an error that one of its tasks raised, so an error of this project is made again from
    that text, with the first line of its message.
    """
    if isinstance(error, RayTaskError) and error.cause is not None:
        origin = origin_of(error.cause)
        match = _PROJECT_ERROR.search(str(error)) if isinstance(origin, UserCodeException) else None
        return getattr(errors, match[1])(match[2]) if match else origin
    if isinstance(error, UserExceptionWithTraceback):
        return origin_of(error._base_exc)
    if isinstance(error, ControllerError):
        origin = origin_of(error.controller_failure)
        return origin if isinstance(origin, RmRobustError) else error
    if isinstance(error, WorkerGroupError):
        origins = [origin_of(failure) for _, failure in sorted(error.worker_failures.items())]
        return next((origin for origin in origins if isinstance(origin, RmRobustError)), error)
    return error


def log_own_errors_in_one_line() -> None:
    """Make a Ray Train worker log an error of this project in one line; Ray 2.60 would log its traceback."""
    logging.getLogger("ray.train.v2._internal.util").addFilter(_in_one_line)


def _in_one_line(record: logging.LogRecord) -> bool:
    """Cut a record with an error of this project down to that error's line. As a filter, keep every record."""
    match = _PROJECT_ERROR.search(record.getMessage())
    if match:
        record.msg, record.args = match[0], ()
    return True
