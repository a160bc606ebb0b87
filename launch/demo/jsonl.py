"""Writing .jsonl files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hfprune_dist.store.atomic_files import write_text


def write_jsonl(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line."""
    write_text(file, "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records))
