"""The scoring service: reward models behind Ray Serve, over HTTP or from inside a Ray cluster."""
