"""Serves one scorer on this machine, in the foreground, until Ctrl-C.

    python -m serve --checkpoint runs/tiny_cpu/checkpoints/reward_model --port 8000
    python -m serve --embedded-judge --port 8000
"""

import argparse
import json
import logging
import os
import signal
import sys
from pathlib import Path

import ray
from pydantic import ValidationError
from ray import serve

from rm_robust.errors import ConfigError, RmRobustError
from rm_robust.scoring import SCORE_PATH
from serve.launch import deploy_scorer, start_serve
from serve.settings import ScoringAppSettings

EXAMPLE = {"inputs": [{"prompt": "Name a colour.", "completions": ["Blue.", "Seven."]}]}
EMBEDDED_EXAMPLE_FAMILY = "addition"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serve", description="Serve one scorer on this machine until Ctrl-C.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="a committed reward-model checkpoint directory")
    what.add_argument("--embedded-judge", action="store_true", help="the embedded world's gold judge")
    parser.add_argument("--host", default="127.0.0.1", help="loopback only (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0 takes a free one")
    parser.add_argument("--max-length-tokens", type=int, help="longest prompt + completion that is scored, up to the model's own limit")
