"""Parts of a benchmark that are not done again when it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pbkd.artifacts import digest_of, read_json, write_json

Found = dict[str, Any]


class Keep:
    """Does a part, or takes what an earlier call has found.

    Args:
        folder: a file per part, named by it and by the settings; delete it to begin anew.
    """

    def __init__(self, folder: Path, settings: Found) -> None:
        self._folder, self._settings = folder, settings

    def __call__(self, name: str, measure: Callable[[], Found]) -> Found:
        """The findings of a part: plain values."""
        path = self._folder / f"{digest_of({'name': name} | self._settings)[:16]}.json"
        if path.is_file():
            print(f"{name}: done before", flush=True)
        else:
            found = json.loads(json.dumps(measure()))
            write_json(path, {"name": name, "found": found})
            print(f"{name}: done", flush=True)
        kept: Found = read_json(path)["found"]
        return kept
