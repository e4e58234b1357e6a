"""The server against requests that no honest page sends, over real sockets."""

import time
from pathlib import Path
from typing import Any

import pytest

from tests.browser.sockets import Running, Served
from tflite.browser.protocol import PROGRESS_BYTES
from tflite.browser.site import Post, RefusedError, new_token


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
