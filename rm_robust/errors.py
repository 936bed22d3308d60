"""What a user can cause, one class per place. Every message says what was wrong, the value, and the fix."""


class RmRobustError(ValueError):
    """Base of every error that a user's input, file, config or environment can cause."""


class ConfigError(RmRobustError):
    """A config file, `--set` override or run directory cannot be used."""


class DataError(RmRobustError):
    """A data source is missing, malformed or empty, or too many of its rows had to be dropped."""


class ChatTemplateError(RmRobustError):
    """A tokenizer's chat template or special tokens would make scores wrong."""


class CheckpointError(RmRobustError):
    """A checkpoint directory is missing, incomplete, altered or of the wrong kind."""


class StorageError(RmRobustError):
    """What a run commits could not be written: storage that is full, read-only or away."""


class ScoringError(RmRobustError):
    """A scoring request failed for good; never turned into a score."""


class RefusedInputError(ScoringError):
    """The texts themselves are the reason (too long, no valid text, a score that is not finite): others of the same request may have scores."""


class ScorerUnavailableError(ScoringError):
    """A scorer was full, away or silent until the last attempt: no single completion is the reason, and asking in parts would not help."""


class RolloutError(RmRobustError):
    """A generator returned stale, incomplete or impossible completions."""


class ClusterError(RmRobustError):
    """A Ray cluster cannot be reached, does not let us in, or can never run what a config asks for."""


class StudyError(RmRobustError):
    """Runs of the study failed, or another process is at it."""
