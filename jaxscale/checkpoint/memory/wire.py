"""What trainers and keepers say to each other over TCP: a JSON request, a JSON answer and, with some, raw bytes.

A message is its length (4 bytes, big-endian), then JSON; an answer with "bytes" is followed by as many. Nothing is
unpickled. The network is trusted, as JAX's own coordinator trusts it; a job's name keeps two jobs apart.
"""

import contextlib
import json
import socket
import time
from typing import Any

MAX_JSON = 256 << 20  # bytes; a manifest has about 100 for each shard


class KeeperError(OSError):
    """A keeper could not be reached, or could not do what was asked."""


class KeeperGone(KeeperError):
    """A keeper ended, or cannot be reached."""


class Connection:
    """To one keeper.

    Args:
      address: "host:port".
      job: name of the job whose keeper this must be.
      seconds: how long to try to connect, as when the keeper is just starting.
    """

    def __init__(self, address: str, job: str, *, seconds: float = 0.0):
        self.address, self.job = address, job
        host, _, port = address.rpartition(":")
        end = time.monotonic() + seconds
        while True:
            try:
                self.socket = socket.create_connection((host, int(port)), timeout=10)
                break
            except OSError as error:
                if time.monotonic() > end:
                    raise KeeperGone(f"no keeper answers at {address}: {error}") from None
                time.sleep(0.05)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, command: str, *, timeout: float = 120.0, **arguments: Any) -> tuple[dict[str, Any], bytearray]:
        """The answer and its bytes.

        Raises:
          KeeperError: the keeper refused, ended, or took longer than `timeout` seconds.
        """
        try:
            self.socket.settimeout(timeout)
            send(self.socket, {"command": command, "job": self.job, **arguments})
            answer = receive(self.socket)
            if answer is None:
                raise KeeperGone(f"the keeper at {self.address} ended")
            payload = bytearray(answer.get("bytes", 0))
            receive_into(self.socket, memoryview(payload))
        except TimeoutError:
            raise KeeperError(f"the keeper at {self.address} took longer than {timeout:.0f} s for {command}") from None
        except KeeperError:
            raise
        except OSError as error:
            raise KeeperGone(f"the keeper at {self.address} cannot be reached: {error}") from None
        if "error" in answer:
            raise KeeperError(f"keeper at {self.address}: {answer['error']}")
        return answer, payload

    def await_end(self) -> None:
        """Until the keeper has ended and its port is free, a few seconds at most."""
        with contextlib.suppress(OSError):
            self.socket.settimeout(5)
            self.socket.recv(1)
            for _ in range(100):  # its sockets close one after the other
                Connection(self.address, self.job).close()
                time.sleep(0.02)

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def send(to: socket.socket, message: dict[str, Any], payload: Any = b"") -> None:
    text = json.dumps(message).encode()
    to.sendall(len(text).to_bytes(4, "big") + text)
    if len(payload):
        to.sendall(payload)


def receive(source: socket.socket) -> dict[str, Any] | None:
    """The next message; None when the other side has ended."""
    head = bytearray(4)
    try:
        receive_into(source, memoryview(head))
    except ConnectionError:
        return None
    length = int.from_bytes(head, "big")
    if length > MAX_JSON:
        raise KeeperError(f"a message of {length} bytes; no jaxscale keeper sends more than {MAX_JSON}")
    text = bytearray(length)
    receive_into(source, memoryview(text))
    return json.loads(text)


def receive_into(source: socket.socket, view: memoryview) -> None:
    while len(view):
        count = source.recv_into(view)
        if not count:
            raise ConnectionError("the connection ended within a message")
        view = view[count:]
