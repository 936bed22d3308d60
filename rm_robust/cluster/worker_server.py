"""Start the workers of a local Ray as copies of one process that has already imported what they need.

    raylet ─starts─► worker_client.py ─environment, folder, files 0 to 2─► this server ─fork─► a worker of Ray

A smoke run starts some twenty workers. Each of them would import torch and transformers anew, which takes four CPU
seconds; a fork takes a hundredth of one, and the copies share the memory of what is loaded. The server never imports
Ray, whose native library reads its worker's environment when it is loaded. Other libraries that read variables when
they are loaded see the server's, so a process that needs others is started as usual (`runtime_env_of`), and whoever
computes with torch says with how many threads. The server ends a worker whose client has gone, and lives no longer than
the driver. A client that finds no server starts its worker as usual.

On a cluster, workers are started as usual. So are those of a machine with a GPU, because CUDA does not survive a fork.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import secrets
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rm_robust.cluster.environment import DRIVER_VARIABLE, this_driver, worker_environment

PRELOADED = (
    "fastapi",
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "requests",
    "scipy.optimize",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "rm_robust.evaluation.scenarios",
    "rm_robust.training.reward_model.training",
    "rm_robust.training.sft",
)
"""What a run's workers import, as far as it does not import Ray."""
GPU_DEVICE = Path("/dev/nvidiactl")
OOM_SCORE = Path("/proc/self/oom_score_adj")
RAYS_OOM_SCORE = "1000"
"""What Ray 2.60 gives a worker that it starts, so that the kernel ends a worker first when memory runs out."""
PR_SET_PDEATHSIG = 1
"""From linux/prctl.h: the signal that a process gets when its parent ends."""

_server: subprocess.Popen[bytes] | None = None
_command: str | None = None


def start() -> str | None:
    """Start the server of this process unless it runs, and return the command that starts a worker through it.

    The command is the `py_executable` of Ray's runtime environment. None on a machine with a GPU.
    """
    global _server, _command
    if GPU_DEVICE.exists():
        return None
    if _server is None or _server.poll() is not None:
        name = f"rm_robust-{secrets.token_hex(16)}"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"\0{name}")  # a name that is no file, and ends with the server
            listener.listen(128)
            _server = subprocess.Popen(
                [sys.executable, "-m", __name__, str(listener.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                env=os.environ | worker_environment() | {DRIVER_VARIABLE: this_driver(), "OMP_NUM_THREADS": "1"},
            )
        client = Path(__file__).with_name("worker_client.py")
        _command = f"{sys.executable} -I -S {client} {name}"
    return _command


def stop() -> None:
    """End the server of this process, if it has one. Its workers stay."""
    global _server, _command
    if _server is not None:
        _server.kill()
        _server.wait()
        _server = _command = None


def runtime_env_of(variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the runtime environment of an actor whose libraries read these variables when they are loaded."""
    return {"env_vars": dict(variables)} | ({"py_executable": sys.executable} if _command else {})


class Server:
    """Answers the clients of one user on a socket, and forks a worker for each."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._selector = selectors.DefaultSelector()
        for source in (self._listener, self._woken, sys.stdin):
            self._selector.register(source, selectors.EVENT_READ)
        self._clients: dict[int, socket.socket | None] = {}
        """The connection of each worker's client, by the worker's process id; None for a client that has gone."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._waker.fileno())

    def serve(self) -> dict[str, Any] | None:
        """Serve until the driver has gone, and return None; in a worker, return what its client asked for."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    request = self._accept()
                    if request is not None:
                        return request
                elif key.fileobj is self._woken:
                    self._reap()
                elif key.fileobj is sys.stdin:
                    return None
                else:
                    self._end(key.data)

    def _accept(self) -> dict[str, Any] | None:
        """Fork a worker for a new client. Returns its request in the worker, None in the server."""
        connection, _ = self._listener.accept()
        if _user_of(connection) != os.getuid():
            connection.close()
            return None
        header, files, _, _ = socket.recv_fds(connection, 8, 3)
        request = _received(connection, int.from_bytes(header, "big"))
        process_id = 0
        if request is not None:
            try:
                process_id = os.fork()
            except OSError as error:  # no memory, or too many processes: the client ends, and Ray tries again
                print(f"A worker cannot be forked: {error}", file=sys.stderr)
                request = None
        if request is not None and process_id == 0:
            self._forget(connection)
            for number, file in enumerate(files):
                os.dup2(file, number)
        for file in files:
            os.close(file)
        if request is None:  # the client has gone
            connection.close()
        elif process_id:
            self._clients[process_id] = connection
            self._selector.register(connection, selectors.EVENT_READ, process_id)
        else:
            return request
        return None

    def _forget(self, connection: socket.socket) -> None:
        """Close, in a worker, what belongs to the server."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as Ray starts a worker: Ctrl-C is for the driver
        self._selector.close()
        clients = [client for client in self._clients.values() if client is not None]
        for inherited in (connection, self._listener, self._woken, self._waker, *clients):
            inherited.close()

    def _reap(self) -> None:
        """Tell the clients of the workers that have ended."""
        self._woken.recv(4096)
        while self._clients:
            process_id, status = os.waitpid(-1, os.WNOHANG)
            if not process_id:
                return
            connection = self._clients.pop(process_id)
            if connection is not None:
                self._selector.unregister(connection)
                code = os.waitstatus_to_exitcode(status)
                with contextlib.suppress(OSError):  # the client has just gone too
                    connection.send(bytes([code if code >= 0 else 128 - code]), socket.MSG_NOSIGNAL)
                connection.close()

    def _end(self, process_id: int) -> None:
        """Kill the worker of a client that has gone."""
        connection = self._clients.get(process_id)
        if connection is None:  # the worker has ended too
            return
        self._selector.unregister(connection)
        connection.close()
        self._clients[process_id] = None
        os.kill(process_id, signal.SIGKILL)


def _user_of(connection: socket.socket) -> int:
    """Return the user id of the process at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _received(connection: socket.socket, num_bytes: int) -> dict[str, Any] | None:
    """Return the request of a client; None when it went before it had sent all."""
    parts = bytearray()
    while len(parts) < num_bytes:
        part = connection.recv(num_bytes - len(parts))
        if not part:
            return None
        parts += part
    request: dict[str, Any] | None = json.loads(parts) if parts else None
    return request


def become(request: Mapping[str, Any]) -> None:
    """Run the script that the client was asked to run, in this process, as `python` would run it."""
    import numpy as np

    np.random.seed()  # every copy has the server's state; Python's own generator is seeded anew by a fork
    os.environ.clear()
    os.environ.update(request["environment"])
    with contextlib.suppress(OSError):
        OOM_SCORE.write_text(RAYS_OOM_SCORE)
    os.chdir(request["folder"])
    script, *_ = sys.argv = request["arguments"]
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")


def main(arguments: Sequence[str]) -> int:
    """Serve on the listening socket with this file number, until the driver ends or stdin is closed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # also while it still imports
    if select.select([sys.stdin], [], [], 0)[0]:
        return 0  # the driver has ended before that call
    server = Server(socket.socket(fileno=int(arguments[0])))
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # a collection would otherwise write to, and so copy, every page
    request = server.serve()
    if request is not None:
        become(request)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
