"""Settings of every test run."""

from hypothesis import settings

# Loaded machines make any deadline flaky; the same examples every time make a failure one that its author sees.
settings.register_profile("rm_robust", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("rm_robust")
