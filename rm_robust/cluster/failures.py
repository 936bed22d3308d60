"""What of a failure in another process is the user's to mend: Ray wraps it in errors of its own, once for each process that it passes through."""

import logging
import re

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, UserCodeException, WorkerCrashedError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from rm_robust import errors
from rm_robust.errors import RmRobustError

LOST = (NodeDiedError, WorkerCrashedError, OutOfMemoryError, TrainingFailedError)
"""Nobody's fault in the config: the same command again goes on from what is committed."""
_OWN_ERROR = re.compile(r"^rm_robust\.errors\.(\w+): (.+)$", re.MULTILINE)


def origin_of(error: BaseException) -> BaseException:
    """What was raised first. Of a worker group, the first failure that a user can mend, or the group's error itself.

    Ray Data 2.60 keeps no more than the text of what one of its tasks raised, so an error of ours is made anew from its line there.
    """
    if isinstance(error, RayTaskError) and error.cause is not None:
        origin = origin_of(error.cause)
        own = _OWN_ERROR.search(str(error)) if isinstance(origin, UserCodeException) else None
        return getattr(errors, own[1])(own[2]) if own else origin
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
    """In a Ray Train worker, which otherwise logs the traceback of whatever its function raises (Ray 2.60)."""
    logging.getLogger("ray.train.v2._internal.util").addFilter(_in_one_line)


def _in_one_line(record: logging.LogRecord) -> bool:
    own = _OWN_ERROR.search(record.getMessage())
    if own:
        record.msg, record.args = own[0], ()
    return True
