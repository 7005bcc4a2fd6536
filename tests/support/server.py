"""A running `luvc-fx serve` of the shipped model, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.paths import DEMO_MODEL

SECONDS = 300
"""How long a request, or the end of the server, may take."""


@dataclass(frozen=True)
class Server:
    """Where a server listens, and the file with what it wrote on stderr."""

    address: str
    log: Path

    def report(self) -> Any:
        """The report of its model, as `luvc-fx serve` gives it."""
        with urllib.request.urlopen(f"{self.address}/luvc_fx/report") as answer:
            (report,) = json.load(answer).values()
        return report

    def post(self, path: str, body: object) -> tuple[int, Any]:
        """The status of the answer to a request, and what it holds."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@contextlib.contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[Server]:
    """Start `command`, which is `luvc-fx`, and wait until it has compiled and listens.

    As long as its process lives: how long that takes is the machine's, and pytest's timeout ends what hangs.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = ["serve", str(DEMO_MODEL), "--inner", "eager", "--warm-up"]
    arguments += ["--host", "127.0.0.1", "--port", port]
    with log.open("wb") as file:
        process = subprocess.Popen([*command, *arguments], stderr=file)
    server = Server(f"http://127.0.0.1:{port}", log)
    try:
        _wait(server, process)
        yield server
    finally:
        process.terminate()
        process.wait(SECONDS)


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Until it listens. Where it does not, what it wrote is shown, by whatever the wait was ended."""
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{server.address}/health", timeout=5):
                    return
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.5)
    except BaseException:
        print(server.log.read_text())
        raise
