"""Run `python -m rm_robust.scoring score …`: score a jsonl file with a served reward model."""

import argparse
import sys

from rm_robust.scoring.files import add_arguments, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m rm_robust.scoring", description="Scores over HTTP. The key is taken from RM_ROBUST_API_KEY."
    )
    add_arguments(parser.add_subparsers(required=True).add_parser("score", help="score a jsonl file, or continue"))
    sys.exit(main(parser.parse_args()))
