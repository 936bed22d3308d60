"""The output of a run's workers on all nodes, as Ray forwards it to the driver.

Ray prints these lines itself, each with a coloured prefix. A terminal of ours (terminal.py) takes them over.
"""

import re
from collections.abc import Callable
from typing import Any

import ray
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray._private.worker import filter_autoscaler_events

TakeLine = Callable[[str, str], None]
"""Called with a prefix that names the process, such as "(RayTrainWorker pid=17) ", and one line of its output."""
RAYS_OWN = "ray_print_logs"
"""The name under which ray.init adds the handler that prints the lines."""

_RAYLET_ERROR = re.compile(r"\[\S+ \S+ [EF] ")
"""How a line of level error or fatal begins in the raylet's log."""
_take_line: TakeLine | None = None


def take_over(take_line: TakeLine | None) -> None:
    """Give every line that workers print from now on to `take_line`; None drops them, for a process that ends."""
    global _take_line
    _take_line = take_line
    if ray.is_initialized():
        keep_from_ray()


def is_taken() -> bool:
    """Return whether somebody takes the lines, so that Ray does not print them."""
    return _take_line is not None


def keep_from_ray() -> None:
    """Remove Ray's own printing, if the lines are taken. It is called after each ray.init, which adds the printing."""
    global_worker_stdstream_dispatcher.remove_handler(__name__)
    if is_taken():
        global_worker_stdstream_dispatcher.remove_handler(RAYS_OWN)
        global_worker_stdstream_dispatcher.add_handler(__name__, take_batch)


def take_batch(batch: dict[str, Any]) -> None:
    """Take lines of one process, as Ray hands them to its handlers."""
    if _take_line is None:
        return
    prefix, lines = prefix_of(batch), batch.get("lines", [])
    for line in filter_autoscaler_events(lines) if batch.get("pid") == "autoscaler" else lines:
        _take_line(prefix, line.rstrip("\n"))


def rays_news(prefix: str, text: str) -> str | None:
    """Return what people want to know of a line of Ray's own processes; None for other lines.

    That is an event of the autoscaler, such as a request that no node type can fulfil, or an error of the raylet.
    """
    is_news = prefix.startswith("(autoscaler") or (prefix.startswith("(raylet") and _RAYLET_ERROR.match(text))
    return prefix + text if is_news else None


def prefix_of(batch: dict[str, Any]) -> str:
    """Return the prefix that Ray 2.60 prints before the lines of a process."""
    if batch.get("pid") in ("autoscaler", "raylet"):
        return f"({batch['pid']}) "
    name = batch.get("actor_name") or batch.get("task_name")
    address = "" if batch.get("ip") == batch.get("localhost") else f", ip={batch.get('ip')}"
    return f"({f'{name} ' if name else ''}pid={batch.get('pid')}{address}) "
