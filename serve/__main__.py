"""Serves one scorer on this machine, in the foreground, until Ctrl-C.

python -m serve --checkpoint runs/tiny_cpu/checkpoints/reward_model --keys keys.toml --port 8000
python -m serve --embedded-judge --insecure-no-auth --port 8000
"""

import argparse
import json
import logging
import os
import signal
import sys
from pathlib import Path
from random import Random

import ray
from ray import serve

from rm_robust.checkpoint import read_manifest
from rm_robust.embedded_world.corpus import distinct_prompts
from rm_robust.errors import CheckpointError, ConfigError, RmRobustError
from rm_robust.scoring import KEY_VARIABLE, SCORE_PATH
from serve.keys import KEYS_VARIABLE, ApiKey, keys_from_environment, read_keys
from serve.launch import deploy_scorer, refuse_open_host, refuse_taken_port, start_serve
from serve.settings import ScoringAppSettings

MOST_TOKENS_BY_DEFAULT = 4096


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m serve", description="Serve one scorer on this machine until Ctrl-C.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="a committed reward-model checkpoint directory")
    what.add_argument("--embedded-judge", action="store_true", help="the embedded world's gold judge")
    parser.add_argument("--keys", type=Path, help=f"the file of the keys that are accepted (default: the keys in {KEYS_VARIABLE})")
    parser.add_argument("--insecure-no-auth", action="store_true", help="accept requests without a key, from this machine only")
    parser.add_argument("--host", default="127.0.0.1", help="loopback only, unless there are keys (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--max-length-tokens", type=int, help=f"prompt + completion (default: what the model takes, at most {MOST_TOKENS_BY_DEFAULT})")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("httpx", "ray.serve"):  # a line per request and a dozen per deployment
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        serve_until_interrupted(settings_from(arguments), arguments.host, arguments.port)
    except RmRobustError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped")
    return 0


def settings_from(arguments: argparse.Namespace) -> ScoringAppSettings:
    """Raises CheckpointError when the checkpoint cannot be one, ConfigError as keys_from."""
    shared = {
        "device": arguments.device,
        "num_gpus": 1 if arguments.device == "cuda" else 0,
        "num_threads": os.cpu_count() or 1,
        "api_keys": keys_from(arguments),
        "insecure_no_auth": arguments.insecure_no_auth,
    }
    if arguments.embedded_judge:
        return ScoringAppSettings(model_name="embedded_judge", embedded_judge=True, **shared)
    checkpoint_dir = arguments.checkpoint.absolute()
    max_length_tokens = arguments.max_length_tokens or min(MOST_TOKENS_BY_DEFAULT, num_positions(checkpoint_dir))
    return ScoringAppSettings(model_name=checkpoint_dir.name, checkpoint_dir=checkpoint_dir, max_length_tokens=max_length_tokens, **shared)


def keys_from(arguments: argparse.Namespace) -> tuple[ApiKey, ...]:
    """Raises ConfigError without keys and without --insecure-no-auth, with both, and for keys that are wrong."""
    keys = read_keys(arguments.keys) if arguments.keys else keys_from_environment()
    if bool(keys) == arguments.insecure_no_auth:
        found = f"keys in {arguments.keys or KEYS_VARIABLE} and --insecure-no-auth" if keys else "neither keys nor --insecure-no-auth"
        raise ConfigError(f"There are {found}: give the one or the other. `python -m serve.keys NAME` makes a key and its line for the file that --keys names.")
    return keys


def num_positions(checkpoint_dir: Path) -> int:
    """The longest input that the model can read, in tokens."""
    read_manifest(checkpoint_dir)
    config = json.loads((checkpoint_dir / "config.json").read_text())
    if "max_position_embeddings" not in config:
        raise CheckpointError(f"{checkpoint_dir}/config.json does not say max_position_embeddings; give --max-length-tokens.")
    return int(config["max_position_embeddings"])


def serve_until_interrupted(settings: ScoringAppSettings, host: str, port: int) -> None:
    """Start a Ray of its own and the scorer on it; both end with this function, after the requests in progress."""
    refuse_open_host(host, settings)
    refuse_taken_port(host, port)
    ray.init(address="local", include_dashboard=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # in place of Ray's own: `kill` stops as cleanly as Ctrl-C
    try:
        start_serve(host, port)
        base_url = deploy_scorer(settings, "scorer", "/")
        print(f"\n{settings.model_name} answers at {base_url}{SCORE_PATH}. Ctrl-C stops it. Try:\n\n{curl_example(base_url, settings)}\n", flush=True)
        while True:
            signal.pause()
    finally:
        for stop in (signal.SIGINT, signal.SIGTERM):  # a second one must not leave processes behind
            signal.signal(stop, signal.SIG_IGN)
        serve.shutdown()
        ray.shutdown()


def curl_example(base_url: str, settings: ScoringAppSettings) -> str:
    """A request that this scorer answers with 200 (the judge knows only its own world's prompts)."""
    prompt = next(distinct_prompts(Random(0))) if settings.embedded_judge else "Name a colour."
    body = json.dumps({"inputs": [{"prompt": prompt, "completions": ["Blue.", "Seven."]}]}).replace("'", r"\u0027")
    key = f' -H "authorization: Bearer ${KEY_VARIABLE}"' if settings.api_keys else ""
    return f"  curl -s {base_url}{SCORE_PATH}{key} -H 'content-type: application/json' -d '{body}'"


if __name__ == "__main__":
    sys.exit(main())
