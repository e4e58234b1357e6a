"""Filling the cache: fetched once, checked, whole or absent; failures say what was tried."""

import contextlib
import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mobiatt_tf.data import cache
from mobiatt_tf.errors import UserError

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def read(directory: Path) -> bytes:
    """What the named datasets do: read, and compare the checksum."""
    content = (directory / "file.bin").read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise cache.DamagedError("file.bin has another SHA-256")
    return content


class Origin:
    """A source that counts how often it is asked."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content = content
        self.times_asked = 0

    def source(self) -> cache.Source:
        def fetch(directory: Path) -> None:
            self.times_asked += 1
            (directory / "file.bin").write_bytes(self.content)

        return cache.Source("the origin", fetch)


def test_what_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    origin = Origin()
    for _ in range(3):
        assert cache.obtain(tmp_path / "set", read, [origin.source()], "") == CONTENT
    assert origin.times_asked == 1
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("damage", ["changed", "truncated", "removed"])
def test_what_is_damaged_is_fetched_again_once(tmp_path: Path, damage: str) -> None:
    origin = Origin()
    cache.obtain(tmp_path / "set", read, [origin.source()], "")
    file = tmp_path / "set" / "file.bin"
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(CONTENT[:-1] if damage == "truncated" else b"x" + CONTENT[1:])
    assert cache.obtain(tmp_path / "set", read, [origin.source()], "") == CONTENT
    assert origin.times_asked == 2
    assert file.read_bytes() == CONTENT


def test_a_wrong_checksum_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    origin = Origin(CONTENT[:-1])
    with pytest.raises(UserError, match=r"set cannot be had.*the origin \(file.bin has another SHA-256\).*Do this"):
        cache.obtain(tmp_path / "set", read, [origin.source()], "Do this.")
    assert origin.times_asked == 1
    assert list(tmp_path.iterdir()) == []


def test_the_next_source_is_tried(tmp_path: Path) -> None:
    sources = [
        cache.installed_folder(str(tmp_path / "nowhere"), ".bin"),
        Origin(b"wrong").source(),
        Origin().source(),
    ]
    assert cache.obtain(tmp_path / "set", read, sources, "") == CONTENT


def test_a_kill_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    def fetch(directory: Path) -> None:
        (directory / "file.bin").write_bytes(CONTENT[:1000])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.obtain(tmp_path / "set", read, [cache.Source("interrupted", fetch)], "")
    assert list(tmp_path.iterdir()) == []


def test_two_at_a_time(tmp_path: Path) -> None:
    barrier = threading.Barrier(2)

    def fetch(directory: Path) -> None:
        (directory / "file.bin").write_bytes(CONTENT)
        barrier.wait(timeout=30)  # both have downloaded before either renames

    results = []

    def start() -> None:
        results.append(cache.obtain(tmp_path / "set", read, [cache.Source("slow", fetch)], ""))

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT, CONTENT]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(UserError, match=r"cannot be written.*MOBIATT_CACHE"):
        cache.obtain(tmp_path / "file" / "set", read, [Origin().source()], "")


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MOBIATT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("BUILD_WORKING_DIRECTORY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_directory() == tmp_path / ".cache" / "mobiatt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_directory() == tmp_path / "xdg" / "mobiatt"
    monkeypatch.setenv("MOBIATT_CACHE", str(tmp_path / "own"))
    assert cache.cache_directory() == tmp_path / "own"
    assert cache.cache_directory("~/given") == tmp_path / "given"


@contextlib.contextmanager
def web_server(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.usefixtures("no_proxy")
def test_files_from_the_web(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "file.bin").write_bytes(CONTENT)
    with web_server(tmp_path / "served") as address:
        source = cache.web_files(address, ["file.bin"])
        assert cache.obtain(tmp_path / "set", read, [source], "") == CONTENT


@pytest.mark.usefixtures("no_proxy")
def test_a_file_that_the_web_does_not_have(tmp_path: Path) -> None:
    with web_server(tmp_path) as address, pytest.raises(UserError, match="404"):
        cache.obtain(tmp_path / "set", read, [cache.web_files(address, ["file.bin"])], "")
    with pytest.raises(UserError, match="refused"):  # the server is gone
        cache.obtain(tmp_path / "set", read, [cache.web_files(address, ["file.bin"])], "")


@pytest.mark.parametrize(
    "source",
    [
        cache.debian_package("mobiatt-no-such-package", "/usr/share/none", ".bin", megabytes=1),
        cache.wheel_member("mobiatt-no-such-package==0.0.1", "none/file.bin"),
    ],
)
def test_packages_that_do_not_exist(
    tmp_path: Path, source: cache.Source, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # nobody is asked for a name that anyone could register
    with pytest.raises(UserError, match=r"download mobiatt-no-such-package.* \(.+\)"):
        cache.obtain(tmp_path / "set", read, [source], "")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err.startswith("Fetching")


def test_there_is_no_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no apt-get on this machine"):
        cache.obtain(tmp_path / "set", read, [cache.debian_package("any", "/none", ".bin", megabytes=1)], "")
