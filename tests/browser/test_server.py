"""The server against requests that no honest page sends, over real sockets."""

import contextlib
import dataclasses
import hashlib
import http.client
import io
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mobiatt_tf.errors import UserError
from tflite.browser import address, certificate, litertjs, server
from tflite.browser.protocol import PROGRESS_BYTES, parse_progress
from tflite.browser.server import Server
from tflite.browser.site import File, Post, RefusedError, Site, new_token, origin_of

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


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A server over plain HTTP with one file from memory, one from disk, and one post."""
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "app.js").write_text("let x;")
    posted: list[Any] = []

    def take(value: Any) -> dict[str, bool]:
        posted.append(parse_progress(value))
        return {"taken": True}

    with Running(tmp_path, {"progress": Post(PROGRESS_BYTES, take)}) as (serving, site):
        yield Served(site, serving.port, posted)


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


def test_serves_its_files_with_the_headers_that_isolate_the_page(served: Served) -> None:
    status, content, headers = served.request("GET", f"/{served.site.token}/")
    assert (status, content) == (200, b"<!doctype html>")
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert headers["Content-Security-Policy"].startswith("default-src 'self'; script-src 'self' 'wasm-unsafe-eval';")
    assert "unsafe-inline" not in headers["Content-Security-Policy"]
    assert headers["Cache-Control"] == "no-store"
    assert headers["Server"] is None  # no version of Python for the curious
    status, content, headers = served.request("GET", f"/{served.site.token}/app.js?v=1")
    assert (status, content, headers["Content-Type"]) == (200, b"let x;", "text/javascript")
    status, content, headers = served.request("HEAD", f"/{served.site.token}/app.js")
    assert (status, content, headers["Content-Length"]) == (200, b"", "6")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.txt",
        "page/../../secret.txt",
        "..%2fsecret.txt",
        "%2e%2e/secret.txt",
        "..%252fsecret.txt",
        "..\\secret.txt",
        "%c0%ae%c0%ae/secret.txt",
        "/etc/passwd",
        "//etc/passwd",
        "app.js/",
        "app.js%00.txt",
        "./app.js",
        "page/app.js",
        "APP.JS",
        "secret.txt",
        "app%2ejs",
    ],
)
def test_knows_no_paths(served: Served, name: str) -> None:
    status, content, _ = served.request("GET", f"/{served.site.token}/{name}")
    assert (status, content) == (404, b"Nothing here.\n")


@pytest.mark.parametrize(
    "target",
    ["/", "/app.js", "//app.js", "/wrong/app.js", "/wrong/", "/favicon.ico", "*", "/{token}", "x{token}/", "{url}"],
)
def test_nothing_without_the_token(served: Served, target: str) -> None:
    target = target.format(token=served.site.token, url=served.site.url)  # the last one is a proxy's form
    status, content, _ = served.request("GET", target)
    assert (status, content) == (404, b"Nothing here.\n")


def test_a_token_is_right_as_a_whole(served: Served) -> None:
    token = served.site.token
    for wrong in (token[:-1], token + "x", token.swapcase(), token[:-1] + "é", ""):
        status, content, _ = served.request("GET", f"/{wrong}/")
        assert (status, content) == (404, b"Nothing here.\n")
    assert len({new_token() for _ in range(100)}) == 100
    assert len(token) >= 22  # 128 bits


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "192.168.1.5:{port}"]
)
def test_refuses_other_hosts(served: Served, host: str) -> None:
    status, content, _ = served.request("GET", f"/{served.site.token}/", Host=host.format(port=served.port))
    assert (status, content) == (421, b"This server answers under its own address only.\n")


def test_refuses_no_host_and_two_hosts(served: Served) -> None:
    target = f"/{served.site.token}/"
    assert served.request("GET", target, Host=None)[0] == 421
    two = f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nHost: evil.example\r\n\r\n"
    assert served.raw(two.encode()).startswith(b"HTTP/1.1 421 ")
    assert served.request("GET", target, Host=f"LOCALHOST:{served.port}")[0] == 200


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH", "GETT", "_"])
def test_unknown_methods(served: Served, method: str) -> None:
    status, _, headers = served.request(method, f"/{served.site.token}/app.js")
    assert (status, headers["Allow"]) == (405, "GET, HEAD, POST")


def test_files_take_no_posts_and_posts_are_no_files(served: Served) -> None:
    assert served.request("POST", f"/{served.site.token}/app.js", body=b"{}")[0] == 405
    assert served.request("GET", f"/{served.site.token}/progress")[0] == 405
    assert served.request("POST", f"/{served.site.token}/nothing", body=b"{}")[0] == 404


def test_takes_an_honest_post(served: Served) -> None:
    status, content = served.post(b'{"done": 1, "total": 2}')
    assert (status, content) == (200, b'{"taken": true}')
    assert [(one.done, one.total) for one in served.posted] == [(1, 2)]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": None}, 403),
        ({"Content_Type": "text/plain"}, 415),  # what a form can send without asking
        ({"Content_Type": None}, 415),
        ({"Content_Length": None}, 411),
        ({"Content_Length": "-1"}, 400),
        ({"Content_Length": "+5"}, 400),
        ({"Content_Length": "0x10"}, 400),
        ({"Content_Length": "²"}, 400),
        ({"Content_Length": "1" * 5000}, 413),
        ({"Transfer_Encoding": "chunked"}, 411),
    ],
)
def test_refuses_posts_by_their_headers(served: Served, headers: dict[str, str | None], status: int) -> None:
    assert served.post(b'{"done": 1, "total": 2}', **headers)[0] == status
    assert not served.posted


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "Not JSON: JSONDecodeError."),
        (b"{", "Not JSON: JSONDecodeError."),
        (b"\xff\xfe", "Not JSON: UnicodeDecodeError."),
        (b"[" * 900, "Not JSON: "),
        (b'{"done": ' + b"9" * 900 + b', "total": 1}', "done must be an integer from 0 to 1."),
        (b'{"done": NaN, "total": 1}', "NaN is not JSON."),
        (b'{"done": -Infinity, "total": 1}', "-Infinity is not JSON."),
        (b'{"done": 1e999, "total": 1}', "done must be an integer from 0 to 1."),
        (b'{"done": 1.0, "total": 1}', "done must be an integer from 0 to 1."),
        (b'{"done": true, "total": 1}', "done must be an integer from 0 to 1."),
        (b'{"done": 2, "total": 1}', "done must be an integer from 0 to 1."),
        (b'{"done": 1}', "progress must be an object with exactly done, total."),
        (b'{"done": 1, "total": 1, "more": 1}', "progress must be an object with exactly done, total."),
        (b"[1, 1]", "progress must be an object with exactly done, total."),
        (b"null", "progress must be an object with exactly done, total."),
    ],
)
def test_refuses_malformed_posts(served: Served, body: bytes, reason: str) -> None:
    status, content = served.post(body)
    assert status == 400
    assert content.decode().startswith(reason)
    assert not served.posted


def test_a_huge_body_is_refused_before_it_is_read(served: Served) -> None:
    """10 GB are announced and a part is sent; the answer comes at once, and the rest is not waited for."""
    head = (
        f"POST /{served.site.token}/progress HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n"
        f"Origin: {served.site.origin}\r\n"
        "Content-Type: application/json\r\nContent-Length: 10000000000\r\n\r\n"
    )
    start = time.monotonic()
    answer = served.raw(head.encode() + b" " * 300_000)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"At most 1000 bytes are taken." in answer
    assert time.monotonic() - start < 5
    assert served.post(b" " * (PROGRESS_BYTES + 1))[0] == 413


def test_long_addresses_and_many_headers(served: Served) -> None:
    assert served.raw(b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 414 ")
    host = f"Host: 127.0.0.1:{served.port}\r\n".encode()
    many = b"".join(b"X-%d: 1\r\n" % number for number in range(500))
    assert served.raw(b"GET / HTTP/1.1\r\n" + host + many + b"\r\n").startswith(b"HTTP/1.1 431 ")
    assert served.raw(b"GET / HTTP/1.1\r\n" + host + b"X: " + b"a" * 70_000 + b"\r\n\r\n").startswith(b"HTTP/1.1 431 ")
    assert served.raw(b"\x16\x03\x01\x02\x00 not http\r\n\r\n").startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("tls", [False, True])
def test_slow_clients_are_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tls: bool) -> None:
    """One byte at a time, for ever, each well before any time limit of a single read; others are served meanwhile."""
    monkeypatch.setattr(server, "REQUEST_SECONDS", 1.0)
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "app.js").write_text("let x;")
    made = certificate.make("127.0.0.1") if tls else None
    with Running(tmp_path, {}, made.context if made else None) as (serving, site):
        ends: list[float] = []

        def drip(content: bytes) -> None:
            start = time.monotonic()
            with socket.create_connection(("127.0.0.1", serving.port), timeout=10) as connection:
                try:
                    for byte in content * 1000:
                        connection.sendall(bytes([byte]))
                        time.sleep(0.05)
                except OSError:
                    ends.append(time.monotonic() - start)

        contents = [b"\x16\x03\x01"] if tls else [b"GET / HTTP/1.1\r\nX: ", b"a"]
        threads = [threading.Thread(target=drip, args=(content,), daemon=True) for content in contents]
        for thread in threads:
            thread.start()
        assert _get(site, made) == b"<!doctype html>"
        for thread in threads:
            thread.join(10)
        assert len(ends) == len(threads)
        assert all(0.9 < seconds < 5 for seconds in ends)


def _get(site: Site, made: certificate.Certificate | None) -> bytes:
    connection: http.client.HTTPConnection
    host = site.origin.split("//")[1]
    if made:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, timeout=10, context=context)
    else:
        connection = http.client.HTTPConnection(host, timeout=10)
    connection.request("GET", f"/{site.token}/")
    content = connection.getresponse().read()
    connection.close()
    return content


def test_a_body_that_does_not_come(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.5)
    start = time.monotonic()
    head = (
        f"POST /{served.site.token}/progress HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n"
        f"Origin: {served.site.origin}\r\n"
        'Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"done"'
    )
    served.raw(head.encode())
    assert time.monotonic() - start < 5
    assert not served.posted


def test_many_idle_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are held at a time: the surplus is closed at once, and the server lives on when they are gone."""
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "app.js").write_text("")
    monkeypatch.setattr(server, "REQUEST_SECONDS", 1.5)
    with Running(tmp_path, {}) as (serving, site):
        crowd = [socket.create_connection(("127.0.0.1", serving.port), timeout=10) for _ in range(100)]
        time.sleep(0.5)
        alive = threading.active_count()
        assert alive < 64 + 20
        for connection in crowd:
            assert connection.recv(1) == b""  # by the limit, or by the deadline
            connection.close()
        assert _get(site, None) == b"<!doctype html>"


def test_the_certificate_is_for_the_address_and_its_key_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = certificate.make("127.0.0.1")
    assert not list(tmp_path.iterdir())
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "app.js").write_text("let x;")
    with Running(tmp_path, {}, made.context) as (serving, _):
        pem = ssl.get_server_certificate(("127.0.0.1", serving.port))
        trusting = ssl.create_default_context(cadata=pem)  # checks the name as well
        for name in ("127.0.0.1", "localhost"):
            with (
                socket.create_connection(("127.0.0.1", serving.port), timeout=10) as plain,
                trusting.wrap_socket(plain, server_hostname=name) as secure,
            ):
                digest = _sha256(secure.getpeercert(binary_form=True) or b"")
                assert digest == made.fingerprint
        # Plain HTTP on the port of TLS gets nothing.
        with socket.create_connection(("127.0.0.1", serving.port), timeout=10) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert b"HTTP" not in plain.recv(1000)
    assert certificate.make("127.0.0.1").fingerprint != made.fingerprint


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).digest().hex(":").upper()


def test_a_taken_port_is_one_line() -> None:
    first = Server("127.0.0.1", 0)
    with pytest.raises(
        UserError, match=rf"127.0.0.1 port {first.port} is taken by another program. Choose another --port"
    ):
        Server("127.0.0.1", first.port)
    first.close()
    with pytest.raises(UserError, match=r"192\.0\.2\.1 port 0 cannot be used: .* Give an --address of this computer"):
        Server("192.0.2.1", 0)


def test_origins_are_those_that_browsers_send() -> None:
    assert origin_of(True, "192.168.1.5", 443) == "https://192.168.1.5"
    assert origin_of(False, "192.168.1.5", 443) == "http://192.168.1.5:443"
    assert origin_of(False, "localhost", 80) == "http://localhost"


def test_addresses() -> None:
    assert address.resolved("localhost") == "127.0.0.1"
    assert address.resolved("192.168.1.5") == "192.168.1.5"
    for wrong in ("phone.local", "::1", "1.2.3", "0x7f.1", ""):
        with pytest.raises(UserError, match="is not an address"):
            address.resolved(wrong)


def test_the_printed_qr_code_says_the_address() -> None:
    """Reads the printed half blocks back into modules and compares them with the code's own, light on dark."""
    import segno

    url = "https://192.168.100.100:54321/Rl9kB7Vn3wXzQy1mT5cA8g/"
    lines = address.qr_text(url).splitlines()
    dark = {" ": (1, 1), "▀": (0, 1), "▄": (1, 0), "█": (0, 0)}
    rows = [[dark[character][half] for character in line] for line in lines for half in (0, 1)]
    code = segno.make(url, error="l", micro=False, boost_error=False)
    expected = [list(map(int, row)) for row in code.matrix_iter(border=2)]
    assert [row[: len(expected)] for row in rows[: len(expected)]] == expected
    assert len(lines[0]) <= 60
    colored = address.qr_text(url, colors=True).splitlines()
    assert colored == [f"\x1b[97;40m{line}\x1b[0m" for line in lines]


def test_litertjs_missing_or_of_another_version(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"LiteRT\.js is not in .*\. Install it with tools/phone_page\.sh"):
        litertjs.files(tmp_path)
    for name in ("core", "wasm-utils"):
        package = tmp_path / "node_modules" / "@litertjs" / name
        (package / "dist").mkdir(parents=True)
        (package / "package.json").write_text(json.dumps({"version": "9.9.9"}))
        (package / "dist" / "index.js").write_text('import { createWasmLib } from "@litertjs/wasm-utils";')
    with pytest.raises(
        UserError, match=r"has version 9\.9\.9; the page needs 2\.5\.3\. Install it with tools/phone_page"
    ):
        litertjs.files(tmp_path)


def test_a_refusal_is_told_in_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "app.js").write_text("")

    def never(value: Any) -> Any:
        raise RefusedError("A result has been taken already; this run is over.", 409)

    with Running(tmp_path, {"progress": Post(100, never)}) as (serving, site):
        assert Served(site, serving.port, []).post(b"1") == (
            409,
            b"A result has been taken already; this run is over.\n",
        )
