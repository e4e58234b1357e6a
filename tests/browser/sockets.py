"""A server with one page, and requests to it byte by byte."""

import dataclasses
import http.client
import io
import socket
import ssl
from pathlib import Path
from typing import Any

from tflite.browser.server import Server
from tflite.browser.site import File, Post, Site, new_token

SECRET = "a file beside the page"


@dataclasses.dataclass
class Served:
    """A running server, its site, and what it was told."""

    site: Site
    port: int
    posted: list[Any]

    def raw(self, request: bytes, *, seconds: float = 10) -> bytes:
        """Everything that the server answers to these bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            connection.sendall(request)
            parts = []
            while part := connection.recv(1 << 16):
                parts.append(part)
        return b"".join(parts)

    def request(
        self, method: str, target: str, *, body: bytes | None = None, **headers: str | None
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        """One request with the headers of an honest page, but for those given here (None leaves one out)."""
        values: dict[str, str | None] = {"Host": f"127.0.0.1:{self.port}"}
        if body is not None:
            values |= {
                "Origin": self.site.origin,
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
            }
        values |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in values.items() if value)]
        answer = self.raw("\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b""))
        head, _, content = answer.partition(b"\r\n\r\n")
        status, _, rest = head.partition(b"\r\n")
        return int(status.split()[1]), content, http.client.parse_headers(io.BytesIO(rest + b"\r\n\r\n"))

    def post(self, value: bytes, **headers: str | None) -> tuple[int, bytes]:
        status, content, _ = self.request("POST", f"/{self.site.token}/progress", body=value, **headers)
        return status, content


class Running:
    """A server with the fixture's files and these posts."""

    def __init__(self, directory: Path, posts: dict[str, Post], context: ssl.SSLContext | None = None) -> None:
        self._server = Server("127.0.0.1", 0, context)
        scheme = "https" if context else "http"
        files = {
            "": File(b"<!doctype html>", "text/html"),
            "app.js": File(directory / "page" / "app.js", "text/javascript"),
        }
        origin = f"{scheme}://127.0.0.1:{self._server.port}"
        self.site = Site(origin, new_token(), files, posts, aliases=[f"{scheme}://localhost:{self._server.port}"])
        self._server.site = self.site

    def __enter__(self) -> tuple[Server, Site]:
        return self._server.__enter__(), self.site

    def __exit__(self, *error: Any) -> None:
        self._server.__exit__(*error)
