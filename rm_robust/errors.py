"""The errors that a user can cause and correct. Every message says what was wrong, the value, and the fix."""


class RmRobustError(ValueError):
    """The base of every error that a user's input, file, config or environment can cause; the message says the fix."""


class ConfigError(RmRobustError):
    """Raised when a config, override, option or run directory cannot be used; correct what the message names."""


class NotInstalledError(ConfigError):
    """Raised when the light installation, which can only ask a service for scores, is asked for more."""

    def __init__(self, user: str, package: str) -> None:
        super().__init__(
            f"{user} needs {package}, which is not installed: this is the scoring client alone. Clone the repository "
            "and run `make install` there (`make EXTRA=gpu install` for GPUs)."
        )


class DataError(RmRobustError):
    """Raised when data is missing, malformed or empty, or loses too many rows; correct the named file or row."""


class ChatTemplateError(RmRobustError):
    """Raised when a chat template or special tokens would make scores wrong; correct the tokenizer and save it."""


class CheckpointError(RmRobustError):
    """Raised when a checkpoint is missing, incomplete, altered or of the wrong kind; name another, or make it again."""


class StorageError(RmRobustError):
    """Raised when the storage of a run is full, read-only or unreachable; repair it, and run the same command again."""


class ScoringError(RmRobustError):
    """Raised when a scoring request failed for good, as no failure becomes a score; correct what the message names."""


class RefusedInputError(ScoringError):
    """Raised when a text is the reason (too long, invalid, its score not finite); correct it, or leave it out.

    Other inputs of the same request may have scores.
    """


class ScorerUnavailableError(ScoringError):
    """Raised when a scorer was full, unreachable or silent until the last attempt; start it, or give it more replicas.

    No single completion is the reason, so asking in parts does not help.
    """


class RolloutError(RmRobustError):
    """Raised when RLOO gets stale, incomplete or impossible completions, or loses its processes too often.

    Look at Ray's logs, and run the same command again: it resumes.
    """


class ClusterError(RmRobustError):
    """Raised when a Ray cluster cannot be reached, refuses us, or can never run what a config asks for.

    Correct the address, the token or the config, or add nodes.
    """


class StudyError(RmRobustError):
    """Raised when runs of the study failed, or another process runs the study; run the same command again later."""
