"""The HTTP side of the scoring service: routes, other servers' dialects, keys and limits, and the pages for people."""
