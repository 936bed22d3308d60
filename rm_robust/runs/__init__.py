"""Where a run lies, which config it has, who writes it, and its metrics and status."""
