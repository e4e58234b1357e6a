"""The files of LiteRT.js, which are 40 MB and come from npm, not from this repository."""

import json
import os
import shlex
from pathlib import Path

from mobiatt_tf.errors import UserError
from tflite.browser.site import File

VERSION = "2.5.3"
RUNTIME = f"@litertjs/core {VERSION}"
DEFAULT_DIRECTORY = "runs/litertjs"

_LISTS = ("package.json", "package-lock.json")  # beside this file, in the installed package too
_IMPORT = b'from "@litertjs/wasm-utils"'  # a bare name, which browsers cannot resolve; import maps end at workers
_BUILDS = ("", "_compat", "_jspi", "_threaded")


def install_command(directory: str | os.PathLike[str]) -> str:
    """What puts LiteRT.js there, at the checksums of package-lock.json: in a checkout, and anywhere else."""
    target = shlex.quote(str(directory))
    lists = " ".join(shlex.quote(str(Path(__file__).parent / name)) for name in _LISTS)
    script = f"tools/phone_page.sh {target}" if str(directory) != DEFAULT_DIRECTORY else "tools/phone_page.sh"
    return (
        f"{script} (it needs npm, as in apt-get install npm), or outside a checkout with: mkdir -p {target} && "
        f"cp {lists} {target} && npm ci --prefix {target} --ignore-scripts"
    )


def files(directory: str | os.PathLike[str]) -> dict[str, File]:
    """What the page loads, by the name it is served under.

    Args:
        directory: where `npm ci` ran: it holds node_modules.

    Raises:
        UserError: LiteRT.js is not there, or not in the version that this page was written for.
    """
    packages = Path(directory) / "node_modules" / "@litertjs"
    core, utils = packages / "core", packages / "wasm-utils"
    command = install_command(directory)
    try:
        found = {json.loads((package / "package.json").read_text())["version"] for package in (core, utils)}
        module = (core / "dist" / "index.js").read_bytes()
        served = {
            "litert/wasm-utils.js": File((utils / "dist" / "index.js").read_bytes(), "text/javascript", cached=True)
        }
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"LiteRT.js is not in {directory}. Install it with {command}.") from None
    if found != {VERSION} or module.count(_IMPORT) != 1:
        raise UserError(
            f"LiteRT.js in {directory} has version {', '.join(sorted(map(str, found)))}; the page needs {VERSION}. "
            f"Install it with {command}."
        )
    served["litert/core.js"] = File(module.replace(_IMPORT, b'from "./wasm-utils.js"'), "text/javascript", cached=True)
    for build in _BUILDS:
        for suffix, content_type in ((".js", "text/javascript"), (".wasm", "application/wasm")):
            name = f"litert_wasm{build}_internal{suffix}"
            if not (core / "wasm" / name).is_file():
                raise UserError(f"LiteRT.js in {directory} lacks {name}. Install it again with {command}.")
            served[f"litert/wasm/{name}"] = File(core / "wasm" / name, content_type, cached=True)
    return served
