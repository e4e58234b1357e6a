"""Sockets for a `Site`: TLS, one request per connection, and nobody may be slow.

Every connection has a deadline, for the handshake, the request and its body, and after that one for the answer that
grows with its size. A client that drips bytes is cut off by it, and only so many connections are held at a time, in
all and of one address.
"""

import contextlib
import errno
import http.client
import shutil
import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mobiatt_tf.errors import UserError
from tflite.browser.site import HEADERS, Post, Response, Site, refuse

REQUEST_SECONDS = 15.0
_ANSWER_SECONDS = 30.0
_SLOWEST_BYTES_PER_SECOND = 100_000
_MOST_CONNECTIONS = 64
_MOST_OF_ONE_ADDRESS = 16  # a browser holds six
_LINGER_SECONDS = 1.0
_GRACE_SECONDS = 1.5
_LINGER_BYTES = 1 << 20
_LONGEST_LINE = 65_536


class Server:
    """Serves a site from a thread of its own, as a context manager."""

    def __init__(self, address: str, port: int, context: ssl.SSLContext | None = None) -> None:
        """Listens, so that the port is known; answers once it is entered.

        Args:
            address: an IPv4 address of this computer.
            port: 0 takes a free one.
            context: serves TLS with it; None serves plain HTTP.

        Raises:
            UserError: the port or the address cannot be had.
        """
        self.site: Site | None = None
        try:
            self._server = _ThreadingServer(self, address, port, context)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = "is taken by another program" if taken else f"cannot be used: {error.strerror}"
            advice = "Choose another --port, or 0 for any." if taken else "Give an --address of this computer."
            raise UserError(f"{address} port {port} {reason}. {advice}") from None
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        assert self.site is not None, "a server needs a site"
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self.close()

    def close(self) -> None:
        """Listens no longer; answers under way get a moment to arrive."""
        self._server.server_close()
        end = time.monotonic() + _GRACE_SECONDS
        while self._server.busy and time.monotonic() < end:
            time.sleep(_GRACE_SECONDS / 50)
        self._server.cut_off(all_of_them=True)


class _ThreadingServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = _MOST_CONNECTIONS

    def __init__(self, owner: Server, address: str, port: int, context: ssl.SSLContext | None) -> None:
        self.owner = owner
        self._context = context
        self._deadlines: dict[socket.socket, float] = {}
        self._addresses: dict[socket.socket, str] = {}
        self._lock = threading.Lock()
        super().__init__((address, port), _Handler)

    def server_bind(self) -> None:
        """Without the look-up of a host name, which `HTTPServer` does and nothing here needs."""
        socket.socket.bind(self.socket, self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for one more connection."""
        with self._lock:
            of_this = sum(address == client_address[0] for address in self._addresses.values())
            return len(self._addresses) < _MOST_CONNECTIONS and of_this < _MOST_OF_ONE_ADDRESS

    @property
    def busy(self) -> bool:
        """Whether there are connections."""
        with self._lock:
            return bool(self._deadlines)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts the connection's thread; the handshake is part of what must not take long."""
        if self._context:
            request = self._context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        with self._lock:
            self._addresses[request] = client_address[0]
        self.set_deadline(request, REQUEST_SECONDS)
        try:
            super().process_request(request, client_address)
        except BaseException:  # the system gives no more threads
            self._end(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serves one connection, in its thread."""
        connection: socket.socket = request
        try:
            # A client that goes away or does not speak TLS (a phone that dislikes the certificate) is nobody's error.
            with contextlib.suppress(OSError, ValueError):
                if isinstance(connection, ssl.SSLSocket):
                    connection.do_handshake()
                self.finish_request(connection, client_address)
                _linger(connection)
        finally:
            self._end(connection)

    def _end(self, connection: socket.socket) -> None:
        with self._lock:
            self._deadlines.pop(connection, None)
            self._addresses.pop(connection, None)
        connection.close()

    def set_deadline(self, connection: socket.socket, seconds: float) -> None:
        """Cuts the connection off in so many seconds from now."""
        with self._lock:
            self._deadlines[connection] = time.monotonic() + seconds

    def service_actions(self) -> None:
        """Called by `serve_forever` several times a second."""
        self.cut_off()

    def cut_off(self, *, all_of_them: bool = False) -> None:
        """Ends the connections past their deadline; their threads see the end of the stream."""
        now = time.monotonic()
        with self._lock:
            late = [connection for connection, deadline in self._deadlines.items() if all_of_them or now > deadline]
            for connection in late:
                with contextlib.suppress(OSError):  # SSLSocket.shutdown would touch TLS state from a foreign thread
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that cannot be served is no message for the terminal."""


class _Handler(BaseHTTPRequestHandler):
    """One request. `BaseHTTPRequestHandler` parses its head; everything else is `Site`'s."""

    protocol_version = "HTTP/1.1"
    server: _ThreadingServer

    def handle(self) -> None:
        self.close_connection = True
        self.raw_requestline = self.rfile.readline(_LONGEST_LINE + 1)
        if len(self.raw_requestline) > _LONGEST_LINE:
            self.requestline, self.request_version, self.command = "", "", ""
            self._send(refuse(414, "The address is too long."))
            return
        if not self.raw_requestline or not self.parse_request():
            return
        self._send(self._answer())

    def _answer(self) -> Response:
        site = self.server.owner.site
        assert site is not None
        found = site.check(self.command, self.path, self.headers)
        if not isinstance(found, Post):
            return found
        length = int(self.headers["Content-Length"])
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self.rfile.read(length)
        return site.take(found, body) if len(body) == length else refuse(408, "The post ended early.")

    def handle_expect_100(self) -> bool:
        """Only once the post is known to be taken; see `_answer`."""
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Called by `parse_request`: the same one line as all other refusals."""
        self._send(refuse(code, message or http.client.responses.get(code, "RefusedError")))

    def _send(self, response: Response) -> None:
        size = response.file.size
        self.request_version = self.protocol_version  # else a line of HTTP/0.9 gets no status
        self.server.set_deadline(self.connection, _ANSWER_SECONDS + size / _SLOWEST_BYTES_PER_SECOND)
        self.send_response_only(response.status)
        headers = {
            "Content-Type": response.file.content_type,
            "Content-Length": str(size),
            "Connection": "close",
            **HEADERS,
            **response.headers,
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(response.file.content, Path):
            with open(response.file.content, "rb") as file:
                shutil.copyfileobj(file, self.wfile, 1 << 16)
        else:
            self.wfile.write(response.file.content)


def _linger(connection: socket.socket) -> None:
    """Lets the client read a refusal before unread bytes of its request reset the connection."""
    connection.settimeout(_LINGER_SECONDS)
    connection.shutdown(socket.SHUT_WR)
    end, left = time.monotonic() + _LINGER_SECONDS, _LINGER_BYTES
    while left > 0 and time.monotonic() < end and (part := connection.recv(1 << 16)):
        left -= len(part)
