"""Responses of named models to a set of prompts, with gold scores: what the four scenarios are built from.

--config FILE --out DIR [--set NAME=VALUE]

The same command again goes on where it was stopped. Then pipelines/prepare_preferences.py builds train, in-domain, prompt-, response- and
mutual-disjoint sets of DIR/labelled (data.source = "responses").
"""

import sys

from rm_robust.responses import command

if __name__ == "__main__":
    sys.exit(command.main(__doc__))
