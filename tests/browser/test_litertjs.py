"""LiteRT.js that is not there, or not the one that the page was written for."""

import json
import re
from pathlib import Path

import pytest

from mobiatt_tf.errors import UserError
from tflite.browser import litertjs


def test_litertjs_missing_or_of_another_version(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"LiteRT\.js is not in .*\. Install it with tools/phone_page\.sh"):
        litertjs.files(tmp_path)
    # Where there is no tools/ (pip): the lists that the command copies are in the package.
    lists = re.search(r"cp (\S+package\.json) (\S+package-lock\.json) ", litertjs.install_command(tmp_path))
    assert lists is not None
    assert [json.loads(Path(file).read_text())["name"] for file in lists.groups()] == ["mobiatt-tf-phone-page"] * 2
    assert f"npm ci --prefix {tmp_path} --ignore-scripts" in litertjs.install_command(tmp_path)
    for name in ("core", "wasm-utils"):
        package = tmp_path / "node_modules" / "@litertjs" / name
        (package / "dist").mkdir(parents=True)
        (package / "package.json").write_text(json.dumps({"version": "9.9.9"}))
        (package / "dist" / "index.js").write_text('import { createWasmLib } from "@litertjs/wasm-utils";')
    with pytest.raises(
        UserError, match=r"has version 9\.9\.9; the page needs 2\.5\.3\. Install it with tools/phone_page"
    ):
        litertjs.files(tmp_path)
