"""A plain TCP connection: what the loopback device gives to anybody."""

from __future__ import annotations

import socket
import time

from bench.kv_side import Job, Receiver, Sender, new_memory

_DONE = b"!"


class SocketSender(Sender):
    """`sendall` of each block."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(new_memory(num_bytes, random=True))

    def connect(self, contact: str) -> None:
        self._connection = socket.create_connection(("127.0.0.1", int(contact)))
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, job: Job) -> list[float]:
        blocks = list(self.blocks(job))
        seconds = []
        for _ in range(job.repeat):
            began = time.perf_counter()
            for block in blocks:
                self._connection.sendall(block.data)
            if self._connection.recv(1) != _DONE:
                raise ConnectionError("the receiver has left")
            seconds.append(time.perf_counter() - began)
        return seconds


class SocketReceiver(Receiver):
    """`recv_into` each block's place."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(new_memory(num_bytes, random=False))
        self._listener = socket.create_server(("127.0.0.1", 0))

    def contact(self) -> str:
        return str(self._listener.getsockname()[1])

    def connect(self, contact: str) -> None:
        self._connection, _ = self._listener.accept()
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def receive(self, job: Job) -> None:
        views = [block.data for block in self.blocks(job)]
        for _ in range(job.repeat):
            for view in views:
                position = 0
                while position < len(view):
                    size = self._connection.recv_into(view[position:])
                    if not size:
                        raise ConnectionError("the sender has left")
                    position += size
            self._connection.sendall(_DONE)
