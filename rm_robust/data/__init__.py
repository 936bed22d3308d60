"""The data of a run: read rows, build the scenarios, apply chat templates, and tokenise to parquet."""
