"""How a run lies on a file system and in an object store.

Only rm_robust/runs/ knows; all others go through files.py.
"""
