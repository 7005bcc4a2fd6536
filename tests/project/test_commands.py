"""Every shell command that a page shows runs, in a copy of the checkout, or is in `NOT_RUN` with its reason.

Commands are written for a photo, a model and hours of the reader's; `STAND_INS` says what takes their place.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

from luvc_fx.cli.commands import COMMANDS, SETTINGS
from tests.support import golden
from tests.support.cases import slow_unless
from tests.support.pages import OTHER_PAGES, PAGES, name_of, shell_commands
from tests.support.paths import DEMO_MODEL, ROOT

TRAIN = "python -m examples.research.tinyvlm.train"

NOT_RUN = {
    r"pip install": "asks a package index; `make release-check` installs what is built here",
    r"python -m lmms_eval": "lmms-eval is not installed; tests/stacks/test_lmms_eval.py runs it where it is",
    r"export MODEL=llava-hf/|arm\(\)": "a model and data sets of the hub",
    r"tlparse": "not installed; tests/graph/test_logs.py reads the trace",
    r"luvc-fx bench --shape qwen2-vl-7b": "the weights of a 7B model need a GPU",
    r"luvc-fx bench --mode best": "fills a GPU's memory",
    r"python -m \S+\.campaign(?! --small)": "needs a GPU, and says so",
}
"""Beginnings of commands that cannot run here, by pattern, and why."""

STAND_INS = (
    # what the reader has: the shipped model, or its first layers, which some presets are too deep for
    (r"\bMODEL_DIR\b(?=.*--schedule document)", "luvc_fx/apps/demo_model"),
    (r"\bMODEL_DIR\b", "small"),
    (r"luvc_fx/apps/demo_model(?=.*--wrong-image)", "small"),
    (r"\bINTERNVL\b", "examples/research/models/internvl"),
    (r"\bQWEN2_VL\b", "examples/research/models/qwen2_vl"),
    # less of everything, and no compiler behind the graphs; tests/inductor and tests/apps have that
    (rf"^{TRAIN}", f"TORCH_COMPILE_DISABLE=1 {TRAIN}"),
    (r"luvc-fx (demo|eval|serve)(?!.*--inner)", r"luvc-fx \1 --inner eager"),
    (r"luvc-fx demo(?!.*--runs)", "luvc-fx demo --runs 1"),
    (r"--limit \d+", "--limit 2"),
    (r"(bench --shape \S+ --quick)", r"\1 --layers 3 --frames 1 --text 8 --new-tokens 1 --rounds 1"),
    (r"(campaign --small)", r"\1 --only internvl2.5-2b-video"),
    (r"(tinyvlm\.questions [^\n#]*?)(?: --scenes \d+)?(?= *(?:#|$))", r"\1 --scenes 2"),
    (r"local_task scenes --scenes \d+", "local_task scenes --scenes 2"),
    (r"(tinyvlm\.evaluate)", r"\1 --scenes 2 --per-scene 1"),
    (rf"({TRAIN})(?= *(?:#|$))", r"\1 --warmup-minutes 0.01 --minutes 0.02 --warmup-batch 2 --batch 2"),
    (r"(?<=-minutes )[\d.]+", "0.01"),
    (r"(?<= --minutes )[\d.]+", "0.03"),
    (r"(?<=batch )\d+", "2"),
    (r"(?<=--workers )\d", "1"),
    (r"--device cuda", "--device cpu"),
    (r"(tinyvlm\.export)", r"\1 --out exported"),
    (r"-m pytest", "-m pytest --collect-only"),
    # what would not end, ends with another code, or takes a port that another run may have
    (r"^torchrun", "torchrun --standalone"),
    (r"^make", "make --dry-run"),
    (r"^diff (.*)\| less$", r"! diff \1"),
)
"""What is run in place of what is written: pattern and replacement, one after the other."""

PROGRAMS = {
    "python": "",
    "luvc-fx": "-m luvc_fx.cli.main",
    "torchrun": "-m torch.distributed.run",
    "curl": "-c 'import sys, urllib.request as u; print(u.urlopen(\"http://\" + sys.argv[1]).read())'",
}
"""Programs that a page takes for granted, as arguments of this Python."""

EVERY_PAGE = [page for page in [*PAGES, *OTHER_PAGES] if shell_commands(page)]
CHEAP = ("docs/develop/write-a-family.md",)
"""Pages whose commands the default run runs."""


def without_folder(command: str) -> str:
    return re.sub(r"(?<!\S)\.venv/bin/", "", command)


def reason_not_to_run(command: str) -> str | None:
    # behind settings of the environment
    begins = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", without_folder(command))
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, begins)), None)


def as_run(command: str) -> str:
    """The command with its stand-ins."""
    for pattern, instead in STAND_INS:
        command = re.sub(pattern, instead, command, flags=re.MULTILINE)
    return command


def run_by(page: Path) -> list[str]:
    """The commands that run on behalf of the page: those that no page before it shows."""
    before = {
        without_comment(command)
        for other in EVERY_PAGE[: EVERY_PAGE.index(page)]
        for command in shell_commands(other)
    }
    return [
        command
        for command in shell_commands(page)
        if without_comment(command) not in before and reason_not_to_run(command) is None
    ]


def without_comment(command: str) -> str:
    return re.sub(r"\s+#.*", "", command)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, with the model, the photo and the programs that the commands ask for."""
    copy = tmp_path_factory.mktemp("copy") / "checkout"
    left_out = shutil.ignore_patterns(
        ".git", ".*_cache", ".venv", ".hypothesis", "__pycache__", "runs", "_build"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=left_out)
    golden.prepare(copy)
    shutil.copy(DEMO_MODEL / "chart.png", copy / "photo.png")
    programs = copy / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, arguments in PROGRAMS.items():
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
        program.chmod(0o755)
    return copy


def script(commands: list[str], port: int) -> str:
    """What bash runs: one command after the other, all of which have to succeed; a server until the end."""
    lines = ["set -o pipefail"]
    for command in commands:
        text = as_run(command).replace("8000", str(port))
        if "luvc-fx serve" in text:
            lines += [f"{text} &", "trap 'kill $!' EXIT"]
            lines += [f"until curl 127.0.0.1:{port}/health; do sleep 1; kill -0 $! || exit 1; done"]
        else:
            lines += [text, f"[ $? -eq 0 ] || {{ echo {shlex.quote(text)} failed >&2; exit 1; }}"]
    return "\n".join(lines)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page",
    slow_unless([name_of(page) for page in EVERY_PAGE if run_by(page)], CHEAP),
)
def test_the_commands_of_a_page_run(page: str, checkout: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = checkout / ".venv" / "bin"
    done = subprocess.run(
        ["bash", "-c", script(run_by(ROOT / page), port)],
        env={**os.environ, "PYTHONPATH": str(checkout), "PATH": f"{programs}:{os.environ['PATH']}"},
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_every_command_that_is_not_run_has_its_reason() -> None:
    """Each reason, stand-in and program is of a command that some page shows."""
    commands = [command for page in EVERY_PAGE for command in shell_commands(page)]
    not_run = [command for command in commands if reason_not_to_run(command) is not None]
    for pattern in NOT_RUN:
        assert any(re.search(pattern, command) for command in not_run), pattern
    for pattern, _ in STAND_INS:
        assert any(re.search(pattern, command, re.MULTILINE) for command in commands), pattern
    for program in PROGRAMS:
        assert any(without_folder(command).startswith(program) for command in commands), program


def test_targets_of_make_that_are_shown_are_what_ci_runs() -> None:
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert {"make test", "make docs"} <= set(steps.splitlines())
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^test: lint$", makefile, re.MULTILINE)


# ------------------------------------------------------------------------------ as far as it can be read


def words_of(command: str) -> list[str]:
    return shlex.split(without_folder(command.replace("\\\n", " ")), comments=True)


def group() -> Any:
    app = typer.Typer(add_completion=False)
    for name, command in COMMANDS.items():
        app.command(name, context_settings=SETTINGS.get(name))(command)
    return typer.main.get_command(app)


def complaint(words: list[str]) -> str | None:
    """What is wrong with a command, as far as it can be told without running it."""
    program, *rest = words
    if program == "luvc-fx" and rest != ["--version"]:
        if rest[0] not in COMMANDS:
            return f"luvc-fx has no command {rest[0]}"
        try:
            group().commands[rest[0]].make_context(rest[0], rest[1:])
        except Exception as error:
            return repr(error)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return None if rest[0] in targets else f"the Makefile has no target {rest[0]}"
    elif program == "python" and rest[0] == "-m":
        known = rest[1] == "lmms_eval" or find_spec(rest[1]) is not None
        return None if known else f"there is no module {rest[1]}"
    elif program in ("python", "torchrun") and rest[0] != "-c":
        return None if any((ROOT / word).is_file() for word in rest) else "no file of the checkout is run"
    return None


@pytest.mark.parametrize("page", EVERY_PAGE, ids=name_of)
def test_commands_are_those_that_there_are(page: Path) -> None:
    for command in shell_commands(page):
        assert complaint(words_of(command)) is None, command


def test_a_wrong_command_is_found() -> None:
    assert "no command" in str(complaint(["luvc-fx", "fly"]))
    assert "--fly" in str(complaint(["luvc-fx", "demo", "--fly"]))
    assert complaint(["luvc-fx", "demo", "--json"]) is None
    assert "no target" in str(complaint(["make", "fly"]))
    assert "no module" in str(complaint(["python", "-m", "luvc_fx.fly"]))
    assert "no file" in str(complaint(["torchrun", "fly.py"]))


def test_a_command_that_fails_is_found(tmp_path: Path) -> None:
    for wrong in ("false | true", "fails() { return 3; }\nfails", "no-such-program"):
        done = subprocess.run(
            ["bash", "-c", script([wrong, "true"], 1)], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 1 and "failed" in done.stderr
