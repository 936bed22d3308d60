"""Print every setting: for a terminal, as a TOML file to start from, or as the page docs/reference/settings.md.

rm-robust settings [SECTION] [--toml | --markdown]
"""

import argparse
import sys

from rm_robust.config.loading import nearest
from rm_robust.config.reference import as_markdown, as_text, as_toml, below, nearest_names, tables_of
from rm_robust.config.run import PipelineConfig
from rm_robust.errors import ConfigError
from rm_robust.responses.config import ResponsesConfig

GIVEN = {"name": "mine"}
"""What a TOML file must set, because it has no default."""
TOML_TOP = """\
# Every setting of a run, with its default. Take the # away before a setting that you change, and before the header of
# its table. A setting with nothing after the = is left out by default.

"""
PAGE = """\
<!-- Written by `rm-robust settings --markdown > docs/reference/settings.md`. Change the docstrings instead. -->

# Look up a setting

```
rm-robust settings rloo                        # what begins with rloo, in the terminal
rm-robust settings --toml > mine.toml          # a config to start from, with every default and its meaning
```

This page holds every setting with its type, bounds, default and meaning. A TOML file needs to hold only what
differs from the defaults. The command line overrides the file: `--rloo.num_steps 200`,
`--rloo.num_steps=200` and `--set rloo.num_steps=200` are the same, and the last of several wins.

- The default *none* means that the setting is left out; its meaning says what happens then.
- A setting that is *required* has no default.
- A heading in double brackets is a table of a list: write it once for each entry.

## A run

The files of `pipelines/configs/` have these settings, and the commands that run stages read them.

{run}
## Responses of named models

`rm-robust generate-responses` reads these settings ([responses](../trainer/responses.md)).

{responses}
## A scoring service

`rm-robust serve --service FILE` reads these settings, and so does a Ray Serve application
([serving](../serving/serving.md)).

{service}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "section",
        nargs="?",
        metavar="SECTION",
        help="print only what begins with this, e.g. rloo, rloo.optimizer, rloo.num_steps or reward_model.bsr",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--toml", action="store_true", help="print a config file with every default as a comment below its meaning"
    )
    form.add_argument("--markdown", action="store_true", help="print docs/reference/settings.md")


def main(options: argparse.Namespace) -> int:
    """Print the settings and return the exit code: 0, or 2 for a section that no config has."""
    try:
        print(printed(options.section, toml=options.toml, markdown=options.markdown), end="")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def printed(section: str | None, *, toml: bool, markdown: bool) -> str:
    """Return what the command prints. Raises ConfigError for an unknown section."""
    if markdown:
        if section is not None:
            raise ConfigError(f"--markdown prints the whole page; leave out {section}.")
        return page()
    tables = tables_of(PipelineConfig)
    chosen = tables if section is None else below(tables, section)
    if not chosen:
        known = [name for name in PipelineConfig.model_fields if below(tables, name)]
        raise ConfigError(
            f"No setting begins with {section!r}. {nearest(nearest_names(section or '', PipelineConfig))}"
            f"The sections are {', '.join(known)}."
        )
    return TOML_TOP + as_toml(chosen, GIVEN) if toml else as_text(chosen)


def page() -> str:
    """Return docs/reference/settings.md."""
    from serve.settings import ServiceSettings  # it loads pyarrow, which only this page needs

    top = "Top of the file"
    return PAGE.format(
        run=as_markdown(tables_of(PipelineConfig), top=top),
        responses=as_markdown(tables_of(ResponsesConfig), top=top),
        service=as_markdown(tables_of(ServiceSettings), top=top),
    )
