"""The command that Ray runs for each worker of a local Ray: it asks the worker server for one, and lives as long as it.

Ray runs this file itself, without site packages (`python -I -S`), so it takes milliseconds. worker_server.py has the
other side.
"""

import json
import os
import socket
import sys


def main(name: str, arguments: list[str]) -> int:
    """Ask for a worker with this process's environment, folder and output files, and return its exit code."""
    request = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(f"\0{name}")
        except ConnectionRefusedError:  # the server has been killed
            os.execv(sys.executable, [sys.executable, *arguments])
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(request)
        reply = connection.recv(1)
    return reply[0] if reply else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
