"""Every command and program in README.md and docs/ is run as it stands there, one file after the other, top to bottom.

A block that cannot be run here (a phone, hours on a GPU) has `<!-- not run: the reason -->` on the line above it.
Bash runs in the root of the repository with `set -e`; Python blocks are programs of their own. `make quickstart`,
`make test` and `.ci/run` are left out, because `.ci/run` runs them and this test runs inside of it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ("bash", "python")
RUN_BY_CI = ("make quickstart", "make test", ".ci/run")
BLOCK_SECONDS = 900

NOT_RUN = re.compile(r"<!-- not run:(.*)-->")


class Block(NamedTuple):
    """A fenced block of a Markdown file; `line` is that of its first line of text."""

    line: int
    language: str
    text: str
    exempt: str | None  # the reason of `not run`, or None


def code_blocks(markdown: str) -> list[Block]:
    """The fenced blocks of all languages, in order."""
    lines = markdown.splitlines()
    blocks = []
    opening = None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if opening is None:
            opening = number
            continue
        comment = NOT_RUN.fullmatch(lines[opening - 1].strip()) if opening else None
        language = lines[opening].strip().removeprefix("```").strip()
        text = "\n".join(lines[opening + 1 : number])
        blocks.append(Block(opening + 2, language, text, comment.group(1).strip() if comment else None))
        opening = None
    assert opening is None, f"the block that opens in line {opening + 1} is not closed"
    return blocks


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def runnable_blocks() -> list:
    """Collected when pytest starts; a missing README is reported by `test_readme_shows_how_to_start`."""
    return [
        pytest.param(block, id=f"{path.relative_to(ROOT)}:{block.line}")
        for path in documents()
        if path.exists()
        for block in code_blocks(path.read_text())
        if block.language in LANGUAGES and block.exempt is None
    ]


def without_ci_commands(script: str) -> str:
    return "\n".join(line for line in script.splitlines() if line.strip() not in RUN_BY_CI)


def test_readme_shows_how_to_start():
    languages = [block.language for block in code_blocks((ROOT / "README.md").read_text())]
    assert "bash" in languages
    assert "python" in languages
    assert "make quickstart" in (ROOT / "README.md").read_text()


def test_ci_runs_what_is_left_out_here():
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("\nexec make test")
    dry_run = subprocess.run(["make", "--dry-run", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for part in (
        "tools/quickstart.py",
        "-m ruff check",
        "-m ruff format --check",
        "-m mypy",
        "-m pytest",
        "run_bazel.sh",
    ):
        assert part in dry_run
    bazel = (ROOT / "tools" / "run_bazel.sh").read_text()
    for part in ("bazel build //...", "bazel test //tests/...", "bazel run //tflite:benchmark"):
        assert part in bazel


def test_links_to_files_lead_somewhere_and_nothing_is_left_to_fill_in():
    for path in documents():
        text = path.read_text()
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert "://" in target or (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"
        placeholder = re.search(r"^[A-Z_]{8,}$", text, re.MULTILINE)
        assert placeholder is None, f"{path.relative_to(ROOT)} still says {placeholder}"
        placeholder = re.search(r"@[A-Z0-9_]+@", text)
        assert placeholder is None, f"{path.relative_to(ROOT)} still says {placeholder}"


def test_every_exemption_has_a_reason():
    for path in documents():
        for block in code_blocks(path.read_text()):
            assert block.exempt != "", f"{path.relative_to(ROOT)}:{block.line} says `not run` without a reason"


def test_every_not_run_comment_stands_above_a_block():
    for path in documents():
        text = path.read_text()
        exempt = [block for block in code_blocks(text) if block.exempt is not None]
        assert len(NOT_RUN.findall(text)) == len(exempt), (
            f"{path.relative_to(ROOT)}: a `not run` that is above no block"
        )


def test_blocks_are_found():
    markdown = (
        "a\n```bash\nx\n\ny\n```\n<!-- not run: needs a phone -->\n```python\nz\n```\n\n<!-- not run: -->\n```\n```\n"
    )
    assert code_blocks(markdown) == [
        Block(3, "bash", "x\n\ny", None),
        Block(9, "python", "z", "needs a phone"),
        Block(14, "", "", ""),
    ]
    with pytest.raises(AssertionError, match="line 2 is not closed"):
        code_blocks("a\n```bash\nx\n")


def test_ci_commands_are_left_out():
    assert without_ci_commands("make quickstart\nmake tests\n  make test\n.ci/run\ntrue") == "make tests\ntrue"


@pytest.mark.slow
@pytest.mark.parametrize("block", runnable_blocks())
def test_block_runs(block):
    if re.search(r"^\s*bazel\b", block.text, re.MULTILINE) and not shutil.which("bazel") and not os.environ.get("CI"):
        pytest.skip("there is no bazel here")
    script = without_ci_commands(block.text)
    command = (
        ["bash", "-e", "-o", "pipefail", "-c", script] if block.language == "bash" else [sys.executable, "-c", script]
    )
    # `python` and `python3` in the text mean the environment that the tests run in; Bazel takes the same.
    interpreter = Path(sys.executable)
    environment = {
        **os.environ,
        "PATH": f"{interpreter.parent}{os.pathsep}{os.environ['PATH']}",
        "MOBIATT_PYTHON": str(interpreter),
    }
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BLOCK_SECONDS,
    )
    assert result.returncode == 0, f"{block.text}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
