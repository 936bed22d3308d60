"""A model directory's JSON files, read without torch."""

import json
from pathlib import Path
from typing import Any

from rm_robust.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError when the file is missing or no JSON object."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"There is no {path}. Give a Hugging Face model directory: config.json, safetensors and a tokenizer.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Download or copy it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object. Download or copy it again.")
    return content
