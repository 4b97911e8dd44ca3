"""The fenced blocks of a Markdown page, and running them as a reader would: in small, in one folder, in their order.

In a page `<!-- starts with: runs/data ... -->` says which folders a reader has made before, and
`<!-- shown only: WHY -->` above a block keeps it from being run. A block that begins with `# NAME.toml` is that file.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from cyclopts import App
from running import running

from laserrec.cli import main as cli
from laserrec.config import Config

ROOT = Path(__file__).parents[1]
RUN, SHOWN = ("python", "console"), ("text", "toml", "json")
SECTIONS = {name: info.annotation for name, info in Config.model_fields.items() if isinstance(info.annotation, type)}
"""The sections of the settings; `student` is optional and no section."""
_FENCE = re.compile(r"(?:<!-- shown only: (?P<why>[^\n]+) -->\n+)?^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$",
                    re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    text: str
    line: int
    shown_only: str | None
    """Why it is not run."""

    def commands(self) -> list[list[str]]:
        """Words of each command of a console block: lines after `$ `, continued where they end in a backslash."""
        joined = self.text.replace("\\\n", " ")
        return [shlex.split(line[2:], comments=True) for line in joined.splitlines() if line.startswith("$ ")]


def blocks(page: Path) -> list[Block]:
    """All of a page; directives (`{include}` ...) are none."""
    text = page.read_text(encoding="utf-8")
    found = [Block(m["language"], m["text"], text[: m.start("text")].count("\n"), m["why"])
             for m in _FENCE.finditer(text)]
    return [block for block in found if not block.language.startswith("{")]


def starts_with(page: Path) -> list[str]:
    """Folders that a reader of the page has already."""
    mark = re.search(r"<!-- starts with: (.+) -->", page.read_text(encoding="utf-8"))
    return mark[1].split() if mark else []


def leaves(command: App, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], App]:
    """Every command that does something, by its words."""
    names = [name for name in command if not name.startswith("-")]
    found = {path: command} if command.default_command is not None and path else {}
    for name in names:
        found |= leaves(command[name], (*path, name))
    return found


def parse(words: list[str]) -> None:
    """Names and flags of a command of laserrec are right."""
    cli.app.parse_args(words[1:], print_error=False, exit_on_error=False)


class Reader:
    """Runs blocks in the current folder. Python blocks share their names; a served model is stopped at the end."""

    def __init__(self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch):
        self.names: dict = {"__name__": "snippet"}
        self.port: int | None = None
        self._stack, self._patch = stack, monkeypatch

    def run(self, block: Block) -> None:
        if block.language == "toml" and (name := re.match(r"# (\S+\.toml)\n", block.text)):
            Path(name[1]).write_text(block.text, encoding="utf-8")
        if block.language == "python":
            exec(compile(block.text, f"block at line {block.line}", "exec"), self.names)
        if block.language == "console":
            for words in block.commands():
                self.command(words)

    def command(self, words: list[str]) -> None:
        """The programs that pages may use."""
        programs = {"laserrec": self._laserrec, "curl": self._curl, "pip": self._pip, "make": self._make,
                    "torchrun": self._torchrun, "accelerate": self._accelerate, "hf": self._hf}
        programs[words[0]](words)

    def _laserrec(self, words: list[str]) -> None:
        if "ray" in words:  # not run: test_batch_ray.py does that
            parse(words)
            return
        if words[1] == "serve":
            self._patch.setenv("PYTHONPATH", str(ROOT))  # its process starts elsewhere, and must run this source
            self.port = self._stack.enter_context(running(Path(words[2]), "--threads", "1", *words[3:]))
            return
        self._patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            cli.main()
            sys.exit(0)
        assert not stop.value.code, words

    def _curl(self, words: list[str]) -> None:
        assert self.port, "curl before laserrec serve"
        words = [w.replace("localhost:8000", f"127.0.0.1:{self.port}") for w in words]
        assert any("127.0.0.1" in w for w in words), words
        subprocess.run([words[0], "--fail", "--max-time", "30", *words[1:]], check=True, stdout=subprocess.DEVNULL)

    def _pip(self, words: list[str]) -> None:
        """Nothing is installed; what is named must be there to install."""
        arguments = argparse.ArgumentParser()
        arguments.add_argument("what", choices=["install"])
        arguments.add_argument("name")
        name = re.fullmatch(r"(\.|laserrec)(?:\[(.+)\])?", arguments.parse_args(words[1:]).name)
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert name and {*(name[2] or "").split(",")} - {""} <= extras.keys(), words

    def _torchrun(self, words: list[str]) -> None:
        """Not run: test_distributed.py does that."""
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(words[1:])
        assert given.module and given.training_script == "laserrec", words
        parse(["laserrec", *given.training_script_args])

    def _accelerate(self, words: list[str]) -> None:
        from accelerate.commands.launch import launch_command_parser

        assert words[1] == "launch"
        given = launch_command_parser().parse_args(words[2:])
        assert given.module and given.training_script == "laserrec", words
        parse(["laserrec", *given.training_script_args])

    def _hf(self, words: list[str]) -> None:
        """Not run: it asks a person for a token."""
        assert words == ["hf", "auth", "login"]

    def _make(self, words: list[str]) -> None:
        """Not run: it would set up all anew."""
        targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
        assert {*words[1:]} <= {*targets}, words
