"""Connections that are slow, many or not welcome, over real sockets; and the certificate."""

import contextlib
import hashlib
import http.client
import socket
import ssl
import threading
import time
from pathlib import Path

import pytest

from mobiatt_tf.errors import UserError
from tests.browser.sockets import Running, Served
from tflite.browser import certificate, server
from tflite.browser.server import Server
from tflite.browser.site import Site


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
        time.sleep(1)  # the server frees the places of the crowd a moment after their connections
        assert _get(site, None) == b"<!doctype html>"


def test_one_address_does_not_keep_the_others_out(tmp_path: Path) -> None:
    """It holds as many connections as it can; another one is served."""
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "app.js").write_text("")
    with Running(tmp_path, {}) as (serving, site), contextlib.ExitStack() as crowd:
        for _ in range(100):
            crowd.enter_context(
                socket.create_connection(("127.0.0.1", serving.port), timeout=10, source_address=("127.0.0.2", 0))
            )
        time.sleep(0.5)
        assert _get(site, None) == b"<!doctype html>"


def test_many_addresses_do_not_hold_more_than_there_is_room_for(tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "app.js").write_text("")
    before = threading.active_count()
    with Running(tmp_path, {}) as (serving, _), contextlib.ExitStack() as crowd:
        for number in range(100):
            own = (f"127.0.0.{2 + number % 20}", 0)
            crowd.enter_context(socket.create_connection(("127.0.0.1", serving.port), timeout=10, source_address=own))
        time.sleep(0.5)
        assert before + 64 <= threading.active_count() <= before + 64 + 2


def test_threads_that_cannot_start_take_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system gives none for a while; more connections come than are held at a time."""
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "app.js").write_text("")

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Running(tmp_path, {}) as (serving, site):
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start)
            for _ in range(70):
                with socket.create_connection(("127.0.0.1", serving.port), timeout=10) as connection:
                    assert connection.recv(1) == b""
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
