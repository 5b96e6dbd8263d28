# SPDX-License-Identifier: Apache-2.0
"""A proxy with switchable faults, to stand between a run and a real object storage server. Threads, standard library.

Responses are forwarded byte for byte; what a fault does, it does to the bytes on the wire.
"""

import os
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock


@dataclass
class Faults:
    """What goes wrong; each only for requests whose first line matches ``where``, and only ``left`` times.

    Args:
        where: Regular expression for the first line of a request, such as ``GET /bucket/new/.*mds``.
        left: How many more requests are spoilt.
        latency: Seconds to wait before the answer.
        status: Answer with this status instead.
        reset_after: Reset the connection after so many bytes of the body.
        cut_after: Close it properly after so many bytes of the body; its length header promises more.
        flip: Turn over the bits of a byte in the middle of the body.
    """

    where: str = ''
    left: float = float('inf')
    latency: float = 0
    status: int = 0
    reset_after: int | None = None
    cut_after: int | None = None
    flip: bool = False


@dataclass
class Proxy:
    """``http://127.0.0.1:<port>`` in front of ``server``.

    Args:
        server: Address of the server.
    """

    server: str
    faults: Faults = field(default_factory=Faults)
    requests: list[str] = field(default_factory=list)
    spoilt: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.port = 0
        # a DataLoader worker that is forked from here would hold connections open that we close
        os.register_at_fork(after_in_child=self._forget)
        self.come_back()

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.port}'

    def come_back(self) -> None:
        """Listen, at the same port as before."""
        listener = socket.create_server(('127.0.0.1', self.port), backlog=64)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def go_away(self) -> None:
        """Refuse connections and break those there are, as a server that has died."""
        if self._listener is not None:
            listener, self._listener = self._listener, None
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept
            listener.close()
        with self._lock:
            for connection in self._open:
                connection.close() if connection.fileno() < 0 else _reset(connection)
            self._open.clear()

    def _forget(self) -> None:
        for connection in [*self._open, *filter(None, [self._listener])]:
            connection.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                self._open.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            while (request := _read_message(client)) is not None:
                if not self._answer(client, *request):
                    return
        except OSError:  # the client or go_away closed it
            return
        finally:
            with self._lock:
                self._open.discard(client)
            client.close()

    def _answer(self, client: socket.socket, head: bytes, body: bytes) -> bool:
        """Forward one request; whether the connection may go on."""
        first = head.split(b'\r\n', 1)[0].decode()
        with self._lock:
            self.requests.append(first)
            faults = self.faults
            spoil = faults.left > 0 and re.search(faults.where, first) is not None and faults != Faults()
            if spoil:
                faults.left -= 1
                self.spoilt += 1
        if not spoil:
            client.sendall(self._forward(head, body)[0])
            return True
        time.sleep(faults.latency)
        if faults.status:
            client.sendall(f'HTTP/1.1 {faults.status} Fault\r\nContent-Length: 0\r\n\r\n'.encode())
            return True
        answer, begin = self._forward(head, body)
        if faults.flip and begin < len(answer):
            middle = (begin + len(answer)) // 2
            answer = answer[:middle] + bytes([answer[middle] ^ 0xFF]) + answer[middle + 1 :]
        if faults.reset_after is not None:
            client.sendall(answer[: begin + faults.reset_after])
            _reset(client)
            return False
        if faults.cut_after is not None:
            client.sendall(answer[: begin + faults.cut_after])
            return False
        client.sendall(answer)
        return True

    def _forward(self, head: bytes, body: bytes) -> tuple[bytes, int]:
        """The server's answer, and where its body begins."""
        there = urlsplit(self.server)
        head = re.sub(rb'(?i)\r\nconnection: [^\r]*', b'', head)
        head = head.replace(b'\r\n', b'\r\nConnection: close\r\n', 1)  # so that it ends where the answer does
        with socket.create_connection((there.hostname, there.port)) as upstream:
            upstream.sendall(head + body)
            answer = b''.join(iter(lambda: upstream.recv(1 << 16), b''))
        head_length = answer.index(b'\r\n\r\n') + 4
        answer_head = re.sub(rb'(?i)\r\nconnection: [^\r]*', b'', answer[:head_length])
        return answer_head + answer[head_length:], len(answer_head)


def _read_message(client: socket.socket) -> tuple[bytes, bytes] | None:
    """Head and body of a request; None if there is no more."""
    data = b''
    while b'\r\n\r\n' not in data:
        more = client.recv(1 << 16)
        if not more:
            return None
        data += more
    head, _, body = data.partition(b'\r\n\r\n')
    length = re.search(rb'(?i)\r\ncontent-length: (\d+)', head)
    while length and len(body) < int(length[1]):
        body += client.recv(1 << 16)
    return head + b'\r\n\r\n', body


def _reset(connection: socket.socket) -> None:
    """Close with RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\x01\x00\x00\x00\x00\x00\x00\x00')
    connection.close()


def read_a_row(
    begun: Any, environment: dict[str, str], lock: str, dataset_class: type, arguments: dict[str, Any]
) -> None:
    """A run, in a process of its own, until it is killed."""
    os.environ.update(environment)
    with FileLock(lock):  # one dataset at a time on this machine
        dataset = dataset_class(**arguments)
    rows = iter(dataset)
    next(rows)
    begun.set()
    time.sleep(600)
