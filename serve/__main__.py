"""Serve reward models on this machine, in the foreground, until Ctrl-C.

python -m serve --checkpoint runs/tiny_cpu/checkpoints/reward_model --keys keys.toml --port 8000
python -m serve --service service.toml --keys keys.toml
python -m serve --embedded-judge --insecure-no-auth --port 8000

The service file has the fields of serve/settings.py: several models, ensembles, limits.

SIGHUP reads the keys and the checkpoints' paths again: a new checkpoint takes the old one's place without a failed
request, and a key that is no longer in the file is no longer accepted. Any other change of the service file needs a new
start. Ctrl-C, or SIGTERM, stops taking requests, answers those that are in progress, and ends.
"""

import argparse
import asyncio
import json
import logging
import math
import os
import signal
import sys
import tomllib
from pathlib import Path

import ray
import uvicorn

from rm_robust.cluster.environment import KEEPS_FREED_MEMORY, free_port
from rm_robust.cluster.log_lines import lines_are_of, start_logging
from rm_robust.cluster.session import make_own_token
from rm_robust.errors import CheckpointError, ConfigError, RmRobustError
from rm_robust.models.checkpoint import read_json, read_manifest
from rm_robust.runs import files as run_files
from rm_robust.scoring.client import KEY_VARIABLE
from rm_robust.scoring.contract import EXAMPLE_INPUT, SCORE_PATH
from serve.app import without_checkpoint
from serve.arguments import MOST_TOKENS_BY_DEFAULT, add_arguments
from serve.batching.front import DESCRIPTION_IS_FRESH_S, NO_ANSWER, Front
from serve.http.middleware import Guard, ReadWholeBody
from serve.http.routes import scoring_api
from serve.keys import KEYS_VARIABLE, ApiKey, keys_from_environment, read_keys
from serve.launch import (
    delete_all_services,
    deploy_models,
    refuse_open_host,
    refuse_taken_port,
    start_serve_without_http,
)
from serve.settings import ServiceSettings, checked_service

logger = logging.getLogger(__name__)
SMALL_WEIGHTS_BYTES = 400 << 20
"""The bytes of 100 M parameters in float32.

The matrices of smaller models do not keep several threads busy, so a replica per core answers more requests
(docs/results/benchmarks.md).
"""
MOST_REPLICAS_BY_DEFAULT = 8
"""The most replicas that are started without --replicas. Each is a process of about 450 MiB beside its weights."""
KEEP_ALIVE_S = 75


def main(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C, and return the exit code: 0, or 1 for an error that a user can correct."""
    for name in ("httpx", "ray.serve"):  # at INFO they write a line per request and a dozen per deployment
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        start_logging()
        asyncio.run(serve_until_interrupted(options))
    except RmRobustError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped")
    return 0


def settings_from(arguments: argparse.Namespace) -> ServiceSettings:
    """Return the service's settings that the command line gives.

    Raises CheckpointError when the checkpoint cannot be one, ConfigError for wrong settings, and what keys_from raises.
    """
    access = {"api_keys": keys_from(arguments), "insecure_no_auth": arguments.insecure_no_auth}
    service_fields: dict[str, object] = (
        {"models": [model_from(arguments)]} if arguments.service is None else read_service(arguments.service)
    )
    return checked_service({**service_fields, **access}, source="The service's settings")


def read_service(path: Path) -> dict[str, object]:
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The service file {path} cannot be read: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error
    access_fields = sorted({"api_keys", "insecure_no_auth"} & table.keys())
    if access_fields:
        raise ConfigError(
            f"{path} sets {access_fields[0]}, but a service file does not say who may ask. "
            f"Use --keys, {KEYS_VARIABLE} or --insecure-no-auth."
        )
    return table


def model_from(arguments: argparse.Namespace) -> dict[str, object]:
    """Return the fields of the one model that the command line names."""
    if arguments.embedded_judge:
        return {"model_name": "embedded_judge", "embedded_judge": True}
    checkpoint_dir = run_files.fetch(run_files.locate(arguments.checkpoint).absolute())
    num_replicas, num_threads = workers_of(arguments, checkpoint_dir)
    return {
        "model_name": checkpoint_dir.name,
        "checkpoint_dir": checkpoint_dir,
        "max_length_tokens": arguments.max_length_tokens or min(MOST_TOKENS_BY_DEFAULT, num_positions(checkpoint_dir)),
        "device": arguments.device,
        "dtype": arguments.dtype,
        "num_gpus": 1 if arguments.device == "cuda" else 0,
        "num_replicas": num_replicas,
        "num_threads": num_threads,
        "share_prompts": not arguments.no_prompt_sharing,
    }


def workers_of(arguments: argparse.Namespace, checkpoint_dir: Path) -> tuple[int, int]:
    """Return the number of replicas and the threads of each.

    Where the command line does not say them, all replicas together have a thread per core.
    """
    num_cores = len(os.sched_getaffinity(0))
    num_replicas = arguments.replicas
    if num_replicas is None:
        is_small = sum(path.stat().st_size for path in checkpoint_dir.glob("*.safetensors")) <= SMALL_WEIGHTS_BYTES
        num_replicas = (
            min(MOST_REPLICAS_BY_DEFAULT, max(1, num_cores // (arguments.threads or 1)))
            if is_small and arguments.device == "cpu"
            else 1
        )
    return num_replicas, arguments.threads or max(1, num_cores // max(1, num_replicas))


def keys_from(arguments: argparse.Namespace) -> tuple[ApiKey, ...]:
    """Return the keys that are accepted: of --keys, or of the environment; none with --insecure-no-auth.

    Raises ConfigError when there are neither keys nor --insecure-no-auth, when there are both, and for wrong keys.
    """
    keys = read_keys(arguments.keys) if arguments.keys else keys_from_environment()
    if bool(keys) == arguments.insecure_no_auth:
        problem = (
            f"keys in {arguments.keys or KEYS_VARIABLE} and --insecure-no-auth"
            if keys
            else "neither keys nor --insecure-no-auth"
        )
        raise ConfigError(
            f"There are {problem}: give the one or the other. `rm-robust keys NAME` makes a key and its line "
            "for the file that --keys names."
        )
    return keys


def num_positions(checkpoint_dir: Path) -> int:
    """Return the longest input that the model can read, in tokens."""
    read_manifest(checkpoint_dir)
    config = read_json(checkpoint_dir / "config.json")
    config = config.get("text_config", config)
    if "max_position_embeddings" not in config:
        raise CheckpointError(
            f"{checkpoint_dir}/config.json does not say max_position_embeddings; give --max-length-tokens."
        )
    return int(config["max_position_embeddings"])


async def serve_until_interrupted(arguments: argparse.Namespace) -> None:
    """Start a Ray of its own, the models on it and the HTTP server in this process, and serve until a signal.

    All of them end with this function, after the requests in progress.
    """
    settings = settings_from(arguments)
    lines_are_of(settings.models[0].model_name, "serve", "front")
    refuse_open_host(arguments.host, settings)
    port = arguments.port or free_port(arguments.host)
    refuse_taken_port(arguments.host, port)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not take the core that the front needs
    os.environ.setdefault("GLIBC_TUNABLES", KEEPS_FREED_MEMORY)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # ignored until there is something to reload
    make_own_token()
    ray.init(address="local", include_dashboard=False)
    # SIGTERM works as Ctrl-C does. With Ray's handler, an orderly end would have status 15.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        start_serve_without_http()
        front = Front(settings, deploy_models(settings))
        await front.start()
        guard = Guard(settings.api_keys)
        server = http_server(front, guard, arguments.host, port)
        asyncio.get_running_loop().add_signal_handler(
            signal.SIGHUP, lambda: reload_in_background(arguments, settings, front, guard)
        )
        base_url = f"http://{arguments.host}:{port}"
        print(
            f"\n{', '.join(front.model_names)} at {base_url}{SCORE_PATH}. Ctrl-C stops it. Try:\n\n"
            f"{curl_example(base_url, settings)}\n",
            flush=True,
        )
        await server.serve()  # until SIGINT or SIGTERM; then it answers what it has begun
    finally:
        for stop in (signal.SIGINT, signal.SIGTERM):  # a second signal must not leave processes behind
            signal.signal(stop, signal.SIG_IGN)
        delete_all_services()
        ray.shutdown()


def http_server(front: Front, guard: Guard, host: str, port: int) -> uvicorn.Server:
    api = ReadWholeBody(scoring_api(front, guard))
    # A client that never finishes its body must not hold up the server's end.
    shutdown_timeout_s = math.ceil(front.settings.limits.request_timeout_s) + 1
    return uvicorn.Server(
        uvicorn.Config(
            api,
            host=host,
            port=port,
            ws="none",
            access_log=False,
            log_level="warning",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=shutdown_timeout_s,
        )
    )


RELOADING = asyncio.Lock()
RELOADS: set[asyncio.Task[None]] = set()
"""The reloads in progress. The event loop itself keeps only a weak reference to a task."""


def reload_in_background(arguments: argparse.Namespace, running: ServiceSettings, front: Front, guard: Guard) -> None:
    task = asyncio.create_task(reload(arguments, running, front, guard))
    RELOADS.add(task)
    task.add_done_callback(RELOADS.discard)


async def reload(arguments: argparse.Namespace, running: ServiceSettings, front: Front, guard: Guard) -> None:
    """Do what SIGHUP asks for; several reloads come one after another.

    Keys come first and on their own: a key that was taken back is refused even if the rest of the reload fails.
    """
    async with RELOADING:
        try:
            guard.replace_keys(keys_from(arguments))
            settings = settings_from(arguments)
            if with_any_checkpoints(settings) != with_any_checkpoints(running):
                raise ConfigError(
                    "Only keys and checkpoints change while the service runs. "
                    "For other models, limits or replicas, start it again."
                )
            await asyncio.to_thread(deploy_models, settings)
            await asyncio.sleep(DESCRIPTION_IS_FRESH_S)
            served = await front.models()
        except NO_ANSWER as error:
            logger.error("not reloaded: %s", error)
        else:
            logger.info("reloaded: %s", ", ".join(f"{model.model} {model.checkpoint}" for model in served))


def with_any_checkpoints(settings: ServiceSettings) -> ServiceSettings:
    """Return what may not change while the service runs: the settings without checkpoints and keys."""
    return settings.model_copy(
        update={"models": tuple(without_checkpoint(model) for model in settings.models), "api_keys": ()}
    )


def curl_example(base_url: str, settings: ServiceSettings) -> str:
    """Return a curl command that the first model answers with 200; the demo's models know only their own world."""
    body = json.dumps({"inputs": [EXAMPLE_INPUT]})
    key = f' -H "authorization: Bearer ${KEY_VARIABLE}"' if settings.api_keys else ""
    return f"  curl -s {base_url}{SCORE_PATH}{key} -H 'content-type: application/json' -d '{body}'"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m serve", description="Serve reward models on this machine until Ctrl-C."
    )
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
