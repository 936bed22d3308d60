"""The Ray cluster of a run: connection, capacity, worker groups, environment, log lines and failures."""
