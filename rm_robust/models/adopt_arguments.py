"""The options of `python -m rm_robust.models.adopt`, apart from its work, so that --help does not import torch."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "source", type=Path, help="local directory: config.json, safetensors, tokenizer with its chat template"
    )
    parser.add_argument("target", type=Path, help="the checkpoint to write; must not exist")
