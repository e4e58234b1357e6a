"""`--device=browser`: waits for a phone that opens the page, and turns what it posts into measurements."""

import contextlib
import datetime
import importlib.util
import queue
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from mobiatt_tf import files
from mobiatt_tf.errors import UserError
from tflite.browser import certificate, litertjs, protocol
from tflite.browser.address import is_loopback, qr_text, resolved
from tflite.browser.job import Job, prepare
from tflite.browser.protocol import Failure, Phone, Progress, Result
from tflite.browser.server import Server
from tflite.browser.site import File, Post, RefusedError, Site, new_token, origin_of
from tflite.measurements import Measurements, Plan

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Settings:
    """How the page is served.

    Attributes:
        port: 0 takes a free one.
        address: an IPv4 address of this computer or "localhost"; None: that of the local network.
        https: serve TLS with a certificate of this run.
        webgpu: measure with WebGPU too where the phone has it.
        litertjs_dir: where `npm ci` put LiteRT.js.
        timeout_seconds: how long to wait for a phone, and for the next sign of one.
        stay: keep serving after a result, until Ctrl-C.
        classes: JSON with the class names and the preprocessing of the graphs' images, for the camera.
        flows: a .tflite file that also returns attention flows, for the picture of them.
        show: told the page's address once it is served, as text for a person.
        keep: with `stay`, told every phone's measurements.
    """

    port: int = 0
    address: str | None = None
    https: bool = True
    webgpu: bool = True
    litertjs_dir: Path = Path(litertjs.DEFAULT_DIRECTORY)
    timeout_seconds: float = 900.0
    stay: bool = False
    classes: Path | None = None
    flows: Path | None = None
    show: Callable[["Page"], None] = field(default=lambda page: print(page.text, flush=True))
    keep: Callable[[Measurements], None] = field(default=lambda found: None)


@dataclass(frozen=True)
class Page:
    """The page's address and how it is explained to a person."""

    url: str
    port: int
    fingerprint: str | None

    @property
    def text(self) -> str:
        """QR code, address, and what the phone will say."""
        lines = [
            "Open this page on the phone (same network, or see below):",
            "",
            qr_text(self.url, colors=sys.stdout.isatty()),
            "",
            self.url,
            "",
        ]
        reverse = f"adb reverse tcp:{self.port} tcp:{self.port}"
        if self.fingerprint:
            lines += [
                "The phone will warn of the certificate: it was made for this run, and nobody vouches for it. Go on",
                'with "Advanced, Proceed" (Chrome) or "Show Details, visit this website" (Safari). Its SHA-256:',
                self.fingerprint,
                f"Android over USB, without a warning: --nohttps --address=localhost --port={self.port}, {reverse}.",
            ]
        elif "//localhost" in self.url:
            lines += [f"For a phone over USB: {reverse}, then this address in its Chrome."]
        else:
            lines += ["Without TLS browsers give a page one thread, a coarse clock, no camera and no WebGPU."]
        return "\n".join([*lines, "", "Ctrl-C stops."])


class BrowserDevice:
    """Any phone (or computer) with a browser. Implements `tflite.measurements.Device`."""

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or Settings()

    def run(self, plan: Plan) -> Measurements:
        """Serves the page, waits for a phone's result, and stops serving.

        Raises:
            UserError: a graph, LiteRT.js or the port cannot be used; no phone came, or its outputs are wrong.
        """
        settings = self._settings
        for file in plan.inputs or ():
            if not file.is_file():
                raise UserError(f"There is no input file {file}.")
        _check_packages()
        runtime = litertjs.files(settings.litertjs_dir)
        with tempfile.TemporaryDirectory(prefix="mobiatt-tf-") as directory:
            job = prepare(
                plan,
                Path(directory),
                webgpu=settings.webgpu,
                stay=settings.stay,
                classes_file=settings.classes,
                flows_file=settings.flows,
            )
            inbox = Inbox(job, settings.stay)
            with self._serving({**job.files, **runtime}, inbox) as page:
                settings.show(page)
                return self._wait(job, inbox)

    @contextlib.contextmanager
    def _serving(self, served: Mapping[str, File], inbox: "Inbox") -> Iterator[Page]:
        settings = self._settings
        address = resolved(settings.address)
        tls = certificate.make(address) if settings.https else None
        server = Server(address, settings.port, tls.context if tls else None)
        names = ["localhost", address] if is_loopback(address) else [address]
        origins = [origin_of(bool(tls), name, server.port) for name in names]
        server.site = Site(origins[0], new_token(), served, inbox.posts, aliases=origins[1:])
        with server:
            yield Page(server.site.url, server.port, tls.fingerprint if tls else None)

    def _wait(self, job: Job, inbox: "Inbox") -> Measurements:
        settings = self._settings
        last: Measurements | None = None
        heard = time.monotonic()
        try:
            with tqdm(desc="waiting", leave=False, mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
                while True:
                    try:
                        message = inbox.messages.get(timeout=_POLL_SECONDS)
                    except queue.Empty:
                        if not settings.stay and time.monotonic() - heard > settings.timeout_seconds:
                            raise UserError(_nobody(settings, inbox.seen)) from None
                        continue
                    heard = time.monotonic()
                    if isinstance(message, Progress):
                        bar.desc, bar.total = "measure: ", message.total
                        bar.update(message.done - bar.n)
                        continue
                    bar.clear()
                    try:
                        last = _accepted(job, message)
                        if not settings.stay:
                            return last
                        settings.keep(last)
                    except UserError as error:
                        if not settings.stay:
                            raise
                        bar.write(str(error), file=sys.stderr)  # the next phone may do better
        except KeyboardInterrupt:
            if last is None:
                raise
            return last


def _accepted(job: Job, message: Result | Failure) -> Measurements:
    if isinstance(message, Failure):
        raise UserError(f"{message.phone.name}: {message.reason}")
    return measurements(job, message)


def _check_packages() -> None:
    for package in ("cryptography", "segno"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is needed for --device=browser: pip install mobiatt-tf[phone].")


def _nobody(settings: Settings, seen: bool) -> str:
    if seen:
        return (
            f"The phone was silent for {settings.timeout_seconds:g} s. Keep its page in the foreground and try again."
        )
    return (
        f"No phone started the benchmark within {settings.timeout_seconds:g} s. Is it in the same network? A firewall "
        "may keep it out: allow the port, or use --address=localhost and adb reverse."
    )


class Inbox:
    """Takes the posts, in the server's threads, and hands them to the thread that waits."""

    def __init__(self, job: Job, stay: bool) -> None:
        self.messages: queue.SimpleQueue[Progress | Result | Failure] = queue.SimpleQueue()
        self.seen = False
        self._job, self._stay, self._done, self._lock = job, stay, False, threading.Lock()
        self.posts = {
            "progress": Post(protocol.PROGRESS_BYTES, self._progress),
            "result": Post(protocol.post_bytes(job), self._result),
        }

    def _progress(self, value: Any) -> dict[str, Any]:
        found = protocol.parse_progress(value)
        self.seen = True
        self.messages.put(found)
        return {}

    def _result(self, value: Any) -> dict[str, Any]:
        found = protocol.parse_result(value, self._job)
        with self._lock:
            if self._done and not self._stay:
                raise RefusedError("A result has been taken already; this run is over.", 409)
            self._done = True
        self.messages.put(found)
        return {"stay": self._stay}


def measurements(job: Job, result: Result) -> Measurements:
    """A phone's result as measurements.

    Raises:
        UserError: nothing was measured.
    """
    if not result.measurements:
        reasons = "; ".join(f"{configuration}: {reason}" for configuration, reason in result.skipped.items())
        raise UserError(f"{result.phone.name} measured nothing. {reasons}")
    warnings = [f"{configuration}: not measured, {reason}" for configuration, reason in result.skipped.items()]
    warnings += [f"WebGPU took only a part of {label}; the rest ran on WASM." for label in result.partial]
    device = describe_phone(result.phone)
    if "emulated" in device:
        warnings.append(str(device["emulated"]))
    most = max(one.invocations_per_latency for one in result.measurements)
    if most > 1:
        steps = result.phone.timer_resolution_seconds * 1e6
        warnings.append(
            f"The browser's clock has steps of {steps:.3g} microseconds: a latency is the mean of up to {most} "
            "consecutive invocations."
        )
    return Measurements(
        device=device,
        plan=job.plan,
        descriptions=job.descriptions,
        measurements=result.measurements,
        warnings=warnings,
        exports=job.exports,
    )


def describe_phone(phone: Phone) -> dict[str, Any]:
    """What a reader needs to know of the phone to judge the figures, as `Measurements.device`."""
    known = [
        phone.os,
        f"{phone.logical_cores} logical cores" if phone.logical_cores else None,
        f"{phone.memory_gib:g} GiB or more" if phone.memory_gib else None,
        f"GPU {phone.gpu}" if phone.gpu else None,
    ]
    isolated = (
        "not isolated (no threads)"
        if not phone.cross_origin_isolated
        else "isolated (threads)"
        if phone.relaxed_simd
        else "isolated, without relaxed SIMD (no threads)"
    )
    device: dict[str, Any] = {
        "kind": "browser",
        "name": phone.name,
        "runtime": litertjs.RUNTIME,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "headline": [
            f"{phone.name}: {', '.join(filter(None, known))}",
            f"{phone.browser}, {isolated}, {litertjs.RUNTIME}; inputs lie in its memory, outputs are read back",
        ],
        "model": phone.model,
        "browser": phone.browser,
        "os": phone.os,
        "user_agent": phone.user_agent,
        "logical_cores": phone.logical_cores,
        "memory_gib": phone.memory_gib,
        "gpu": phone.gpu,
        "cross_origin_isolated": phone.cross_origin_isolated,
        "relaxed_simd": phone.relaxed_simd,
        "secure_context": phone.secure_context,
        "timer_resolution_seconds": phone.timer_resolution_seconds,
    }
    if "Headless" in phone.user_agent:
        device["emulated"] = "A headless browser on a computer: a test, not a phone's figures."
    return device


def define_flags() -> None:
    """The flags of `--device=browser`."""
    flags.DEFINE_integer(
        "port", 0, "browser: the port to serve on; 0 takes a free one.", lower_bound=0, upper_bound=65535
    )
    flags.DEFINE_string("address", None, "browser: the address to serve on; localhost for adb reverse.")
    flags.DEFINE_bool(
        "https", True, "browser: serve TLS with a certificate of this run; threads and the camera need it."
    )
    flags.DEFINE_bool("webgpu", True, "browser: measure with WebGPU too where the phone has it.")
    flags.DEFINE_string("litertjs_dir", litertjs.DEFAULT_DIRECTORY, "browser: where tools/phone_page.sh put LiteRT.js.")
    flags.DEFINE_float("timeout_seconds", 900.0, "browser: how long to wait for a phone's next sign.", lower_bound=1)
    flags.DEFINE_bool(
        "stay", False, "browser: keep serving after a result, for more phones and the camera, until Ctrl-C."
    )
    flags.DEFINE_string("classes", None, "browser: JSON with the class names of the graphs, for the camera.")
    flags.DEFINE_string("flows", None, "browser: a .tflite file with attention flows, for a picture of them.")


def new_directory(parent: Path, device: Mapping[str, Any]) -> Path:
    """Makes a directory for one phone's result: its name and the time, and a number where that one is taken.

    Raises:
        UserError: it cannot be made.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-") or "phone"
    stamp = re.sub(r"[^0-9]", "", device["date"])[:14]
    made, number = parent / f"{slug}-{stamp}", 1
    while True:
        try:
            made.mkdir(parents=True)
        except FileExistsError:
            made, number = parent / f"{slug}-{stamp}-{number + 1}", number + 1
        except OSError as error:
            raise UserError(f"{made} cannot be made ({error.strerror or error}): give another --output_dir.") from error
        else:
            return made


def from_flags() -> BrowserDevice:
    """The device that the flags describe."""
    values = flags.FLAGS

    def keep(found: Measurements) -> None:
        from tflite import summary  # draws, hence matplotlib

        written = summary.write(found, new_directory(files.user_path(values.output_dir), found.device))
        print(summary.format_table(found), flush=True)
        print("\nwritten: " + ", ".join(str(path) for path in written) + "\n", flush=True)

    return BrowserDevice(
        Settings(
            port=values.port,
            address=values.address,
            https=values.https,
            webgpu=values.webgpu,
            litertjs_dir=files.user_path(values.litertjs_dir),
            timeout_seconds=values.timeout_seconds,
            stay=values.stay,
            classes=files.user_path(values.classes) if values.classes else None,
            flows=files.user_path(values.flows) if values.flows else None,
            keep=keep,
        )
    )
