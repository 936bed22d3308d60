"""The filesystem that a path or a URI leads to.

A path is local. A URI (s3://bucket/folder, gs://…, abfs://…, hdfs://…, file:///…) is read through pyarrow's filesystem
for its scheme. That filesystem takes its credentials and endpoint from the environment (for s3: AWS's variables,
profile or instance role), so every node needs them. The URI of a data source may have options such as `?region=` or
`?endpoint_override=`.
"""

import functools
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from rm_robust.errors import DataError


def is_uri(path: str) -> bool:
    """Return whether the text is a URI, as opposed to a path."""
    return "://" in path


@functools.lru_cache(maxsize=64)
def filesystem_of(path: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of a path or URI, and the path in that filesystem.

    Raises DataError for a URI that pyarrow does not understand, and for a host that it cannot reach.
    """
    if not is_uri(path):
        return pafs.LocalFileSystem(), str(Path(path).expanduser().absolute())
    refuse_password(path)
    try:
        filesystem, inner = pafs.FileSystem.from_uri(path)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path} is no usable URI: {error}. Its scheme may be file, s3, gs, abfs or hdfs, its options those of "
            "pyarrow's filesystem."
        ) from error
    except Exception as error:  # pyarrow passes errors of other libraries on: hf:// raises those of httpx
        raise unreachable(path, error) from error
    return filesystem, inner


def refuse_password(uri: str) -> None:
    """Raise DataError for a URI with a password, which would get into config.resolved.json and logs."""
    if urlsplit(uri).password is not None:
        raise DataError(
            f"A {urlsplit(uri).scheme}:// URI holds a password, which would be written to config.resolved.json and "
            "logs. Take it out, and give the credentials through the environment."
        )


def unreachable(path: str, error: Exception) -> DataError:
    """Return the error for a path or URI that cannot be reached."""
    return DataError(
        f"{path} cannot be reached: {error}. Check the address, the network and the credentials of this machine."
    )
