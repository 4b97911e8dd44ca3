"""What the searches here share: amazon-scientific, and a file with a line per trial that no later call repeats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from laserrec.config import Config
from laserrec.data.dataset import Dataset
from laserrec.data.prepare import prepare_source


def open_data(out: Path, config: Config) -> Dataset:
    prepare_source("amazon-scientific", out / "data", config.data)
    return Dataset.load(out / "data")


class Trials:
    """Lines of JSON in `file`, each with a `key` that tells one trial from another."""

    def __init__(self, file: Path):
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.loads(x) for x in file.read_text().splitlines()] if file.is_file() else []
        self._done: dict[str, dict[str, Any]] = {line["key"]: line for line in lines}

    def __contains__(self, key: str) -> bool:
        return key in self._done

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._done[key]

    def add(self, key: str, **line: Any) -> None:
        self._done[key] = {"key": key, **line}
        with self._file.open("a") as file:
            file.write(json.dumps(self._done[key]) + "\n")
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}, flush=True)
