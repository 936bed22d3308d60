"""Print pip's settings as shell commands that give uv the same settings, for `eval` in install.sh.

uv does not read pip's configuration. A variable of uv's own that is already set keeps its value.
"""

import ast
import os
import shlex
import subprocess
import sys

VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "constraint": "UV_CONSTRAINT",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "timeout": "UV_HTTP_TIMEOUT",
}
"""The variable of uv for each setting of pip."""

SEPARATORS = {"extra-index-url": " ", "find-links": ",", "trusted-host": " ", "constraint": " "}
"""What separates the values of a setting that may have several, in uv's variable. In pip white space does."""

SECTIONS = ("global", "install", ":env:")
"""The sections of pip's configuration that apply to `pip install`. A later one overrides an earlier one."""


def pip_settings(lines: list[str]) -> dict[str, str]:
    """Return the settings that apply to `pip install` from the lines of `pip config list`: section.name='value'."""
    sections: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in lines:
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in sections:
            sections[section][name] = ast.literal_eval(value)
    return sections["global"] | sections["install"] | sections[":env:"]


def shell_commands(settings: dict[str, str], environment: dict[str, str]) -> list[str]:
    """Return the commands that give uv pip's `settings`, except those that `environment` has already set for uv.

    With several indexes pip takes the best version of them all, and uv by default the first index that has the package.
    So further indexes come with pip's strategy. uv has no variable for pip's `no-index`: it becomes an option in the
    array `uv_options`.
    """
    values = {
        variable: SEPARATORS[name].join(settings[name].split()) if name in SEPARATORS else settings[name]
        for name, variable in VARIABLES.items()
        if settings.get(name)
    }
    if "UV_INDEX" in values:
        values["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    commands = [
        f"export {variable}={shlex.quote(value)}" for variable, value in values.items() if variable not in environment
    ]
    if settings.get("no-index", "").lower() in ("y", "yes", "t", "true", "on", "1"):
        commands.append("uv_options+=(--no-index)")
    return commands


if __name__ == "__main__":
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True)
    print("\n".join(shell_commands(pip_settings(listed.stdout.splitlines()), dict(os.environ))))
