"""What is served and to whom, apart from sockets: a map of names to files, two posts, and the rules for both.

A request is looked up by its whole path in the map; nothing is decoded, joined or searched, so there is no path to
escape from.
"""

import hmac
import json
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any

_TOKEN_BYTES = 16

# 'wasm-unsafe-eval' compiles WebAssembly and nothing else; blob: and mediastream: show the photo and the camera.
_POLICY = (
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob: mediastream:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    # These three make the page "cross-origin isolated": shared memory, hence threads, and a clock of 5 microseconds.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class File:
    """Something that is served: bytes, or a file that is read when asked for. `cached`: the phone may keep it."""

    content: bytes | Path
    content_type: str
    cached: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Response:
    """A status, what is sent, and headers beside `HEADERS`."""

    status: int
    file: File
    headers: Mapping[str, str] = field(default_factory=dict)


class RefusedError(ValueError):
    """A post that is not taken, with the reason in one line."""

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Post:
    """Takes a posted JSON value of at most `limit` bytes; its return value is the answer; may raise `RefusedError`."""

    limit: int
    take: Callable[[Any], Any]


def new_token() -> str:
    """An unguessable part of the address, new for each run."""
    return secrets.token_urlsafe(_TOKEN_BYTES)


def origin_of(tls: bool, host: str, port: int) -> str:
    """The origin as browsers write it, which leave out the port that the scheme implies."""
    scheme, implied = ("https", 443) if tls else ("http", 80)
    return f"{scheme}://{host}" if port == implied else f"{scheme}://{host}:{port}"


def refuse(status: int, reason: str, **headers: str) -> Response:
    """An answer of one line."""
    return Response(status, File((reason + "\n").encode(), "text/plain; charset=utf-8"), headers)


@dataclass(frozen=True)
class Site:
    """The page's files and posts under `/<token>/`, for requests to these hosts.

    Attributes:
        origin: as the browser names it in `Origin`: "https://192.168.1.5:8443".
        aliases: other origins that reach the same server (localhost).
        token: the first part of every path.
        files: by name; "" is the page itself.
        posts: by name.
    """

    origin: str
    token: str
    files: Mapping[str, File]
    posts: Mapping[str, Post]
    aliases: Iterable[str] = ()

    @property
    def url(self) -> str:
        """The page's address."""
        return f"{self.origin}/{self.token}/"

    @property
    def _origins(self) -> set[str]:
        return {self.origin, *self.aliases}

    def check(self, method: str, target: str, headers: Message) -> Response | Post:
        """The answer to a request whose body has not been read, or the post that its body is for."""
        # A foreign page can make a browser resolve its name to this address (DNS rebinding); its Host gives it away.
        hosts = headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0].lower() not in {origin.split("//")[1] for origin in self._origins}:
            return refuse(421, "This server answers under its own address only.")
        if method not in ("GET", "HEAD", "POST"):
            return refuse(405, "Only GET, HEAD and POST are known here.", Allow="GET, HEAD, POST")
        name = self._name(target)
        if name is None or name not in (self.posts if method == "POST" else self.files):
            known = name is not None and name in {**self.posts, **self.files}
            return refuse(405, "Not with this method.") if known else refuse(404, "Nothing here.")
        if method != "POST":
            file = self.files[name]
            return Response(200, file, {"Cache-Control": "private, max-age=3600" if file.cached else "no-store"})
        return self._check_post(self.posts[name], headers)

    def _name(self, target: str) -> str | None:
        """The part after the token, or None where the token is missing or wrong."""
        path = target.split("?", 1)[0]
        empty, _, rest = path.partition("/")
        token, slash, name = rest.partition("/")
        right = hmac.compare_digest(token.encode(errors="replace"), self.token.encode())
        return name if right and slash and not empty else None

    def _check_post(self, post: Post, headers: Message) -> Response | Post:
        if headers.get("Origin") not in self._origins:  # browsers send it with every post
            return refuse(403, "Posts come from this server's own page only.")
        if headers.get_content_type() != "application/json":
            return refuse(415, "Posts are application/json.")
        lengths = headers.get_all("Content-Length", [])
        if len(lengths) != 1 or "Transfer-Encoding" in headers:
            return refuse(411, "A post needs one Content-Length.")
        if not (lengths[0].isascii() and lengths[0].isdigit()):
            return refuse(400, "Content-Length is no number.")
        if len(lengths[0]) > 12 or int(lengths[0]) > post.limit:
            return refuse(413, f"At most {post.limit} bytes are taken.")
        return post

    def take(self, post: Post, body: bytes) -> Response:
        """The answer to a post with this body."""
        try:
            value = json.loads(body.decode(), parse_constant=_no_constant)
            answer = post.take(value)
        except RefusedError as refused:
            return refuse(refused.status, str(refused))
        except (ValueError, RecursionError) as error:
            return refuse(400, f"Not JSON: {type(error).__name__}.")
        return Response(200, File(json.dumps(answer).encode(), "application/json"), {"Cache-Control": "no-store"})


def _no_constant(name: str) -> float:
    raise RefusedError(f"{name} is not JSON.")
