"""Where the command line begins. This module imports next to nothing: loading the commands takes seconds, in which
Ctrl-C shall end with one line too."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def main() -> None:
    """Entry point: `laserrec.cli.main.main`."""
    try:
        from laserrec.cli.main import main as run

        run()
    except KeyboardInterrupt:
        interrupted()


def interrupted() -> NoReturn:
    """Exit after Ctrl-C. Of several processes (torchrun) one alone speaks."""
    if os.environ.get("RANK", "0") == "0":
        print("interrupted; run the same command again to go on", file=sys.stderr)
    sys.exit(130)
