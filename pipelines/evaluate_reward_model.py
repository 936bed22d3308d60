"""Measure how well a reward model ranks.

--model CHECKPOINT --suite rm_bench --data FILE … --out DIR
    evaluate a checkpoint (with --url in place of --model: a served model) on a benchmark or on your own files
[--config FILE] [--set NAME=VALUE] [--run-dir DIR]
    make the four-scenario table: one stage of full_rlhf.py, in the run directory of the stages before it

It is `rm-robust evaluate`.
"""

import sys

from pipelines.command import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
