"""The settings of a run: every section with its defaults and bounds, and how a TOML file becomes a config."""
