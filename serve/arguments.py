"""The options of `python -m serve`. They are apart from its work, so that --help imports neither torch nor Ray."""

import argparse
from pathlib import Path

from serve.keys import KEYS_VARIABLE

MOST_TOKENS_BY_DEFAULT = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    served = parser.add_mutually_exclusive_group(required=True)
    served.add_argument("--checkpoint", help="a committed reward-model checkpoint: a directory, or a URI (s3://…)")
    served.add_argument(
        "--service", type=Path, help="a TOML file with the fields of ServiceSettings (serve/settings.py)"
    )
    served.add_argument("--embedded-judge", action="store_true", help="the embedded world's gold judge")
    parser.add_argument(
        "--keys", type=Path, help=f"the file of the keys that are accepted (default: the keys in {KEYS_VARIABLE})"
    )
    parser.add_argument(
        "--insecure-no-auth", action="store_true", help="accept requests without a key, from this machine only"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="loopback only, unless there are keys (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    _add_arguments_of_one_model(parser)


def _add_arguments_of_one_model(parser: argparse.ArgumentParser) -> None:
    one_model = parser.add_argument_group("options of --checkpoint; a service file sets these itself")
    one_model.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    one_model.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the weights; scores are always float32 (default: %(default)s)",
    )
    one_model.add_argument(
        "--replicas", type=int, help="default: one per core for a small model on CPUs, otherwise one"
    )
    one_model.add_argument("--threads", type=int, help="threads of each replica (default: its share of the cores)")
    one_model.add_argument(
        "--max-length-tokens",
        type=int,
        help=f"limit of prompt + completion (default: the model's own, at most {MOST_TOKENS_BY_DEFAULT})",
    )
    one_model.add_argument(
        "--no-prompt-sharing",
        action="store_true",
        help="compute a prompt for each request, even if a batch has it twice",
    )
