"""What an offline run of wandb holds: its log, in LevelDB's format, read with wandb's own messages."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7


@dataclass
class Logged:
    """group, job_type, tags and config of the run; its summary; names in its history; artifacts: name -> files."""

    group: str = ""
    job_type: str = ""
    tags: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: set[str] = field(default_factory=set)
    artifacts: dict[str, list[str]] = field(default_factory=dict)


def logged(path: Path) -> Logged:
    """Read run-*.wandb."""
    found = Logged()
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found.group, found.job_type, found.tags = run.run_group, run.job_type, tuple(run.tags)
            found.config = {item.key: json.loads(item.value_json) for item in run.config.update}
        elif kind == "summary":
            found.summary |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "history":
            found.history |= {_key(item) for item in record.history.item}
        elif kind == "artifact":
            files = record.artifact.manifest.contents
            found.artifacts[record.artifact.name] = sorted(file.path for file in files)
    return found


def _key(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


def _records(data: bytes) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    at, whole = HEADER, b""  # the file has a header of its own
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + HEADER])
        whole += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record
