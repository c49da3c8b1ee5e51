#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["requests>=2.25.0"]
# ///
"""Bring every SUCCEEDED Runway video to disk before its link dies.

Reads the polling-results JSON that runway_task_polling_loop.py leaves, streams each SUCCEEDED
video to video_outputs/<stub>.mp4, writes <stub>.json beside it and prints a summary.

examples:
  %(prog)s                       the latest results file
  %(prog)s --all                 every results file: a backfill
  %(prog)s results.json -q       from cron: prints what is wrong, and nothing else
  %(prog)s --exec "rclone copy {video} remote:videos"

exit codes:
  0         every SUCCEEDED task found is on disk (also when there was none)
  1         could not do the job: no results file, unreadable input, output directory, disk full
  2         bad command line
  3         done, but at least one video (or one of several results files) failed; a rerun tries
            just those again. With --verify: a problem. With --exec: a command failed
  130, 143  stopped by Ctrl-C, SIGTERM

environment:
  RUNWAYML_API_SECRET   fetches a fresh link from Runway when one is dead or missing
  RUNWAYML_BASE_URL     the Runway API to ask, default https://api.dev.runwayml.com
  REQUESTS_CA_BUNDLE, HTTPS_PROXY, NO_PROXY   as requests knows them
"""

# The file reads as the data flows:
#
#     results file -> tasks -> names and plan -> part file -> transfer -> outcome -> summary
#
# Pure functions over small frozen records decide. `Shelf` reads the directory, `PartFile` and
# `put_metadata` write to it, `Transport` asks servers, `Console` prints; `Download` does one
# task from start to end in a worker thread, and a `Crew` of them works in parallel.

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - 3.8 can read this far
    sys.exit(f"Python 3.10 or later is needed, this is {sys.version.split()[0]}")

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import argparse
import base64
import contextlib
import difflib
import errno
import functools
import hashlib
import html
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import ssl
import stat
import string
import subprocess
import tempfile
import threading
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from enum import Enum
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, BinaryIO, NoReturn, TextIO
from urllib.parse import quote, urlsplit

try:
    import requests
    import urllib3
    from requests.utils import DEFAULT_CA_BUNDLE_PATH, get_environ_proxies
    from urllib3.util.retry import Retry
    from urllib3.util.ssl_ import create_urllib3_context
    from urllib3.util.wait import wait_for_read
except ImportError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"❌ the package {missing.name} is missing: pip install requests")

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__version__ = "2.0.0"

DEFAULT_OUTPUT_DIR = "video_outputs"
DEFAULT_WORKERS = 32
MAX_WORKERS = 64
DEFAULT_TIMEOUT_S = 30.0
DEFAULT_RETRIES = 3

BACKOFF_BASE_S = 0.5
RETRY_AFTER_CAP_S = 60.0
STILL_SERVING_S = 10.0
STALL_BYTES_PER_SECOND = 1024
READ_BYTES = 128 * 1024
BYTES_PER_MB = 1024 * 1024
NAME_MAX_BYTES = 255
NAME_TRIES = 10

TICK_S = 0.25
STOP_GRACE_S = 1.0
SILENCE_S = 30.0

LINK_SHOWN_CHARS = 50
EXISTING_SHOWN = 3
LISTED = 10
NAMES_SHOWN = 20

EXIT_CANNOT = 1
EXIT_INCOMPLETE = 3

RUNWAY_BASE_URL = "https://api.dev.runwayml.com"
RESULTS_PREFIX = "runway_polling_results_"
GALLERY_NAME = "index.html"


# --- Errors: the class says what helps --------------------------------------------------------


class DownloaderError(Exception):
    """Base of everything this script raises on purpose; its text is one line for a person."""


class JobError(DownloaderError):
    """The run as a whole, or a results file, cannot be used: exit 1."""


class Cancelled(DownloaderError):
    """The run is to end: a worker leaves its video where it is."""


class InOtherHands(DownloaderError):
    """Another run, or another thread, has this video in hand."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, whose ``number`` it is, reached the command line."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}, run again to go on")
        self.number = number


class TaskError(DownloaderError):
    """One video failed for good.

    ``reason`` groups what failed alike, ``detail`` is this video's own, ``hint`` what to do.
    """

    def __init__(self, reason: str, hint: str, detail: str = "") -> None:
        super().__init__(reason, hint, detail)
        self.reason, self.hint, self.detail = reason, hint, detail

    @property
    def why(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason

    def __str__(self) -> str:
        return f"{self.why} — {self.hint}"


class TransientError(TaskError):
    """The same request may succeed later, after ``retry_after_s`` if the server said so.

    It ``costs_a_try`` unless the server is overloaded and still serves others.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None, costs: bool = True) -> None:
        super().__init__(reason, "run again to try once more")
        self.retry_after_s, self.costs_a_try = retry_after_s, costs


class LinkDead(TaskError):
    """There is no link that leads to the video, or the one there is was refused."""


NO_SPACE_ERRNOS = {errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def disk_errors(action: str) -> Iterator[None]:
    """Turn an OSError of the local disk into the failure of the run (full) or of the task."""
    try:
        yield
    except FileExistsError:
        raise  # somebody has taken a name, which is for the caller to settle
    except OSError as error:
        if error.errno in NO_SPACE_ERRNOS:
            message = f"no space left on the disk, could not {action}: make room, then run again"
            raise JobError(message) from None
        reason = f"could not {action}: {error.strerror or type(error).__name__}"
        raise TaskError(reason, "look at the output directory, then run again") from None


# --- Text for people: nothing of a link's query, no control characters ------------------------


def printable(text: object) -> str:
    """``text`` with everything a terminal might obey instead of show replaced by ``?``."""
    shown = str(text)
    return shown if shown.isprintable() else re.sub("[^ -~]", _shown_char, shown)


def _shown_char(match: re.Match[str]) -> str:
    return match[0] if match[0].isprintable() else "?"


def link_without_query(link: str) -> str:
    """``link`` up to its query or fragment, and without user name and password."""
    bare = re.split(r"[?#]", link, maxsplit=1)[0]
    return re.sub(r"^([a-zA-Z]+://)[^/]*@", r"\1", bare)


def shown_link(link: str) -> str:
    bare = printable(link_without_query(link))
    return bare if len(bare) <= LINK_SHOWN_CHARS else bare[:LINK_SHOWN_CHARS] + "..."


def shown_id(task_id: str) -> str:
    return f"{printable(task_id[:8])}..." if task_id else "unknown"


def utc_time(unix_seconds: float) -> datetime:
    return datetime.fromtimestamp(unix_seconds, timezone.utc)


def megabytes(size_bytes: float) -> str:
    return f"{size_bytes / BYTES_PER_MB:.2f} MB"


def counted(count: int) -> str:
    return "1 video" if count == 1 else f"{count:,} videos"


def shortened(lines: Sequence[str], limit: int, more: str = "    … and {} more") -> list[str]:
    """At most ``limit`` of ``lines``; what is left out is counted in ``more.format(count)``."""
    left_out = len(lines) - limit
    return list(lines) if left_out <= 0 else [*lines[:limit], more.format(f"{left_out:,}")]


# --- Results files: which ones, and what is in them -------------------------------------------

_TIME_IN_NAME = re.compile(r"[0-9]{8}_[0-9]{6}")


def find_results_files(directories: Iterable[str | Path]) -> list[Path]:
    """The polling-results files in ``directories``, each once, latest first."""
    found: dict[str, Path] = {}
    for directory in directories:
        with contextlib.suppress(OSError, ValueError):
            for name in os.listdir(directory):
                path = Path(directory, name) if name.startswith(RESULTS_PREFIX) else None
                if path and path.suffix == ".json" and path.is_file():
                    found.setdefault(os.path.realpath(path), path)
    return latest_first(found.values())


def latest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (results_time(path), path.name), reverse=True)


def results_time(path: Path) -> datetime:
    """When the results in ``path`` were saved, as naive local time.

    The time in the name counts, since a clone or copy makes all modification times equal;
    a name without one counts by its modification time.
    """
    for match in _TIME_IN_NAME.finditer(path.name):
        with contextlib.suppress(ValueError):
            return datetime.strptime(match[0], "%Y%m%d_%H%M%S")
    with contextlib.suppress(OSError, ValueError, OverflowError):
        return datetime.fromtimestamp(path.stat().st_mtime)
    return datetime.min


def read_results(path: Path) -> dict[str, Any]:
    """The object in results file ``path``, with its ``task_results`` list.

    Raises `JobError` in one line for whatever can be wrong with it.
    """
    try:
        document = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 (byte {error.start})"
    except json.JSONDecodeError as error:
        reason = f"is not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
    except RecursionError:
        reason = "is nested too deeply"
    except ValueError as error:
        reason = f"cannot be read: {printable(error)}"
    else:
        if isinstance(document, dict) and isinstance(document.get("task_results"), list):
            return document
        looks = '{"task_results": [{"task_id": …, "final_status": "SUCCEEDED", "video_url": …}]}'
        reason = f"is not a polling-results file, which looks like {looks}"
    raise JobError(f"{printable(path)}: {reason}")


# --- Tasks: one SUCCEEDED row each ------------------------------------------------------------

_MADE_FIELDS = ("task_id", "target_filename_stub", "image_path", "prompt")
TEXT_FIELDS = (*_MADE_FIELDS, "timestamp", "completion_time", "status")
EXTRA_FIELDS = ("cluster_id", "theme", "duration", "resolution")
_TEXT_OR_NONE = (str, type(None))
_LINK = re.compile(  # [user@]host[:port], then path, query, fragment or nothing
    r"https?://(?:[^/?#@]*@)?(?:\[[0-9a-f:.]+\]|[^/?#@:\[\]\\ ]+)(?::[0-9]{1,5})?(?:[/?#][^\\ ]*)?",
    re.IGNORECASE,
)


def usable_link(value: object) -> str:
    """``value`` as an http(s) link that can be asked for, or ``""``."""
    link = value.strip() if isinstance(value, str) else ""
    return link if _LINK.fullmatch(link) and link.isprintable() else ""


def link_expiry(link: str) -> float | None:
    """When ``link`` dies, in Unix seconds: ``exp`` of its ``_jwt`` (RFC 7519), unverified.

    ``None`` when the link does not say, or talks nonsense.
    """
    token = re.search(r"[?&]_jwt=[^.&#]*\.([^.&#]+)", link)
    try:
        payload = token[1] + "=" * (-len(token[1]) % 4) if token else ""
        expiry = json.loads(base64.urlsafe_b64decode(payload))["exp"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    is_number = isinstance(expiry, (int, float)) and not isinstance(expiry, bool)
    return float(expiry) if is_number and 0 < expiry < 253402300800 else None  # the year 10000


@dataclass(frozen=True)
class Task:
    """A SUCCEEDED row, checked: ``stub`` is a safe name, ``link`` usable or empty.

    Two tasks with the same ``key`` are the same one.
    """

    task_id: str
    stub: str
    link: str = field(repr=False)
    key: str = field(repr=False)
    row: Mapping[str, Any] = field(repr=False)

    @property
    def suffix(self) -> str:
        """What tells its names from those of other tasks with its stub."""
        return "_" + (safe_stub(self.task_id[:8]) or digest(self.key)[:8])


def task_key(task_id: str, link: str) -> str:
    """Equal for two rows of the same task: its id; without one the link, query aside."""
    if task_id:
        return f"id {task_id}"
    return f"link {link_without_query(link)}" if link else ""


def read_rows(results: Mapping[str, Any]) -> tuple[list[Task], list[str]]:
    """The SUCCEEDED tasks of a results object, in order, and what is to be said of other rows."""
    tasks: list[Task] = []
    remarks: list[str] = []
    others = Counter[str]()
    rows = results.get("task_results")
    for number, row in enumerate(rows if isinstance(rows, list) else (), 1):
        status = row.get("final_status") if isinstance(row, dict) else row
        if not isinstance(row, dict) or not isinstance(status, _TEXT_OR_NONE):
            what = '"final_status" is not text' if isinstance(row, dict) else "is not an object"
            remarks.append(f"⚠️ Row {number}: {what}: passed over")
        elif status == "SUCCEEDED":
            tasks.append(task_from_row(row))
            remarks += [f"⚠️ Row {number}: {wrong}" for wrong in wrong_fields(row)]
        else:
            others[printable(status[:20]) if status else "still running"] += 1
    if others:
        counts = ", ".join(f"{count:,} {status}" for status, count in others.items())
        remarks.insert(0, f"ℹ️ Not downloaded: {counts}")
    return tasks, remarks


def wrong_fields(row: Mapping[str, Any]) -> list[str]:
    wrong = [key for key in TEXT_FIELDS if not isinstance(row.get(key), _TEXT_OR_NONE)]
    return [f'"{key}" is not text: not used' for key in wrong]


def task_from_row(row: Mapping[str, Any]) -> Task:
    """The task of SUCCEEDED ``row``; a text field of another type counts as missing."""
    task_id, link = text_of(row, "task_id"), usable_link(row.get("video_url"))
    default = f"video_{task_id[:8] or 'unknown'}"
    stub = safe_stub(text_of(row, "target_filename_stub")) or safe_stub(default)
    return Task(task_id, stub, link, task_key(task_id, link), row)


def as_object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def text_of(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return value if isinstance(value, str) else ""


def merge_tasks(tasks: Iterable[Task]) -> list[Task]:
    """Each task once, with the first row found that has a link: the freshest comes first."""
    merged: dict[str, Task] = {}
    for number, task in enumerate(tasks):
        key = task.key or f"unknown {number}"
        if key not in merged or (task.link and not merged[key].link):
            merged[key] = task
    return list(merged.values())


# --- Names: a stub is a name, never a path ----------------------------------------------------

_UNSAFE = re.compile(
    r'[\x00-\x1f\x7f-\x9f<>:"/\\|?*\ud800-\udfff'  # separators, control, not encodable
    r"\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff]"  # lines and text direction
)
_RESERVED = re.compile(  # https://learn.microsoft.com/windows/win32/fileio/naming-a-file
    r"(?:CON|PRN|AUX|NUL|COM[0-9¹²³]|LPT[0-9¹²³]|CONIN\$|CONOUT\$) *(?:\.|$)", re.IGNORECASE
)


def safe_stub(stub: str) -> str:
    """``stub`` as a name any common file system takes; ``""`` when nothing is left of it.

    An ordinary stub comes back to the letter. Leading dots would hide the video.
    """
    name = _UNSAFE.sub("_", stub)
    if not name.strip():
        return ""
    bare = name.lstrip(".")
    name = "_" * (len(name) - len(bare)) + bare
    return fit(f"_{name}" if _RESERVED.match(name) or name.startswith(RESULTS_PREFIX) else name)


def fit(stub: str, suffix: str = "") -> str:
    """``stub + suffix``, the stub cut so that ``.json`` and ``.mp4`` fit a file name."""
    room = NAME_MAX_BYTES - len(suffix.encode()) - len(".json")
    return stub.encode()[:room].decode(errors="ignore") + suffix


def stubs_with_id(task: Task) -> Iterator[str]:
    """The names for when its stub is somebody else's: with its id, then with a number, too."""
    yield fit(task.stub, task.suffix)
    for number in itertools.count(2):
        yield fit(task.stub, f"{task.suffix}_{number}")


def fold(name: str) -> str:
    """The same for two names that some file system takes for one: case and Unicode form."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def in_shard(stub: str, number: int, parts: int) -> bool:
    """Whether ``stub`` is in the ``number``-th of ``parts`` parts, whatever else there is."""
    return int(digest(fold(stub)), 16) % parts == number - 1


# --- What a file is, by its bytes (ISO/IEC 14496-12) ------------------------------------------


class Content(Enum):
    """What a file turns out to be; the value reads on after "it is"."""

    WHOLE = "a whole MP4"
    SURPLUS = "an MP4 with something else behind it"
    OTHER = "no MP4, but some other kind of file"
    CUT = "an MP4 cut short"
    ZEROS = "empty, or nothing but zero bytes"
    TEXT = "text, not a video"

    @property
    def is_video(self) -> bool:
        """Whether it may be one: what came whole is kept, since its link dies."""
        return self in (Content.WHOLE, Content.SURPLUS, Content.OTHER)


_BOXES = b"ftyp styp moov moof mdat free skip wide pnot meta uuid sidx mfra pdin udta emsg".split()
_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


def inspect(file: BinaryIO, size_bytes: int) -> Content:
    """Look at the first bytes of ``file``, and at the heads of its boxes if it starts like one."""
    file.seek(0)
    start = file.read(READ_BYTES)
    if not start.strip(b"\0"):
        rest = iter(functools.partial(file.read, READ_BYTES), b"")
        return Content.OTHER if any(block.strip(b"\0") for block in rest) else Content.ZEROS
    if start[4:8] in _BOXES:
        return walk_boxes(file, size_bytes)
    if size_bytes < 8:  # no head of a box, or of any other container
        return Content.CUT if start[:3] == b"\0\0\0" else Content.TEXT
    is_text = start[:2] in (b"\xff\xfe", b"\xfe\xff") or not _BINARY.search(start)
    return Content.TEXT if is_text else Content.OTHER


def walk_boxes(file: BinaryIO, size_bytes: int) -> Content:
    """Section 4.2: size and type; size 1: 64 bits follow; size 0: the box goes on to the end.

    What does not begin like a known box and does not fit in is no box, but surplus.
    """
    offset = 0
    while offset < size_bytes:
        file.seek(offset)
        head = file.read(16)
        kind, length = head[4:8], int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big") if len(head) == 16 else size_bytes
        if length == 0 and kind in _BOXES:
            return Content.WHOLE
        if length < 8 or offset + length > size_bytes:
            return Content.CUT if kind in _BOXES else Content.SURPLUS
        offset += length
    return Content.WHOLE


def file_info(file: BinaryIO) -> dict[str, Any]:
    """What the metadata says of the video's file, read in constant memory."""
    sha256 = hashlib.sha256()
    file.seek(0)
    while block := file.read(READ_BYTES):
        sha256.update(block)
    size, size_mb = file.tell(), round(file.tell() / BYTES_PER_MB, 2)
    return {"size_bytes": size, "size_mb": size_mb, "sha256": sha256.hexdigest()}


# --- Metadata: <stub>.json --------------------------------------------------------------------


def build_metadata(
    task: Task, video_name: str, info: Mapping[str, Any], now: datetime
) -> dict[str, Any]:
    """What ``<stub>.json`` holds; ``now`` in naive local time, as the poller writes it."""
    row = {key: value for key, value in task.row.items() if is_json(value)}
    runway_task = {
        "task_id": task.task_id,
        "final_status": text_of(row, "final_status"),
        "completion_time": text_of(row, "completion_time"),
        "video_url": text_of(row, "video_url"),
        "original_status": text_of(row, "status"),
        "timestamp": text_of(row, "timestamp"),
    }
    return {
        "video_file": video_name,
        "download_timestamp": now.isoformat(timespec="microseconds"),
        "input_path": text_of(row, "image_path"),
        "prompt": text_of(row, "prompt"),
        "seed": row.get("seed"),
        "runway_task_json": runway_task | {key: row[key] for key in EXTRA_FIELDS if key in row},
        "target_filename_stub": text_of(row, "target_filename_stub"),
        "file_info": info,
    }


def is_json(value: object) -> bool:
    """Whether JSON can hold ``value``: no NaN, no endless nesting, nothing foreign."""
    try:
        json.dumps(value, allow_nan=False, indent=2)
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def encode_metadata(metadata: Mapping[str, Any]) -> bytes:
    """``metadata`` as JSON in UTF-8, readable as it is; only lone surrogates are escaped."""
    text = json.dumps(metadata, indent=2, ensure_ascii=False)
    return re.sub(r"[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text).encode()


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The object in ``path``; empty for what cannot be read or is not ours to understand."""
    try:
        if os.path.isfile(path):  # a pipe would keep us waiting
            with open(path, "rb", buffering=0) as file:
                document = json.loads(file.read())
            return document if isinstance(document, dict) else {}
    except (OSError, ValueError, RecursionError):
        pass
    return {}


def metadata_task(metadata: Mapping[str, Any]) -> tuple[str, str]:
    """The id and the key of the task that ``metadata`` names, ``""`` if it names none."""
    runway_task = as_object(metadata.get("runway_task_json"))
    task_id = text_of(runway_task, "task_id")
    link = "" if task_id else usable_link(runway_task.get("video_url"))
    return task_id, task_key(task_id, link)


def put_metadata(
    path: Path, task: Task, video_name: str, info: Mapping[str, Any], hand_over: bool = False
) -> bool:
    """Have ``path`` describe the video; whether it was not there before.

    What is there and does so is left as it is. Raises FileExistsError for a file that is
    another task's or another program's.
    """
    there = read_metadata(path)
    is_ours = metadata_task(there)[1] == task.key != ""
    if os.path.lexists(path) and not is_ours:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    if is_ours and there.get("file_info") == info and not hand_over:
        return False
    metadata = build_metadata(task, video_name, info, datetime.now())
    if hand_over or there.get("handed_over") is False:
        metadata["handed_over"] = False
    write_whole(path, encode_metadata(metadata), task.key, replaces=is_ours)
    return not is_ours


def write_whole(path: Path, data: bytes, key: str, replaces: bool) -> None:
    """Write ``data`` to ``path``, whole or not at all: synced under the hidden name of ``key``.

    Raises FileExistsError unless it ``replaces`` what is there.
    """
    hidden = hidden_path(path.parent, key)  # a name of its own, as there may be no locks
    temporary = hidden.with_suffix(f".{random.getrandbits(32):08x}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path, replaces)
    finally:
        remove(temporary)


def publish(hidden: Path, final: Path, replaces: bool) -> None:
    """Give ``hidden`` the name ``final`` in one step; raises FileExistsError if that is taken.

    As a second link, unless it ``replaces`` what is there or the file system has none: then
    it is renamed, a moment after a look.
    """
    if not replaces:
        try:
            return os.link(hidden, final)
        except FileExistsError:
            raise
        except (OSError, NotImplementedError):
            if os.path.lexists(final):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
    return os.replace(hidden, final)


def hidden_path(directory: Path, key: str) -> Path:
    """The part file of the task ``key``; what else belongs to it differs in the suffix."""
    return directory / f".dsv-{digest(key)[:16]}.part"


def remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


# --- The directory and the plan: which name, and download, adopt or leave ---------------------


class Action(Enum):
    """What is to be done about a task, or can be done with one name."""

    KEEP = "its video is there, with its metadata"
    REFILL = "its metadata is there, the video is to be downloaded"
    ADOPT = "a video without metadata is this task's"
    ASK = "a video without metadata is there: the size that the server announces tells whose"
    DOWNLOAD = "the name is free, or what has it is no video"
    LEAVE = "the name is somebody else's"


@dataclass(frozen=True)
class Plan:
    """What to do for ``task``, under the name ``stub``.

    ``size_bytes`` is of the file that is there, ``holder`` says who has the wanted name.
    """

    task: Task
    stub: str
    action: Action
    size_bytes: int = 0
    holder: str = ""


@dataclass(frozen=True)
class Shelf:
    """The output directory as one scan saw it, and a look at single names as they are now.

    ``homes`` are the stubs of metadata by the key of the task that they name, ``spellings``
    the names by what they fold to.
    """

    directory: Path
    names: Sequence[str] = ()
    homes: Mapping[str, str] = field(default_factory=dict)
    spellings: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def scan(cls, directory: Path) -> Shelf:
        """Read all metadata once; raises `JobError` for a directory that cannot be listed."""
        try:
            names = sorted(os.listdir(directory))
        except FileNotFoundError:
            return cls(directory)
        except OSError as error:
            raise directory_error(directory, error) from None
        homes: dict[str, str] = {}
        spellings: dict[str, list[str]] = {}
        for name in names:
            spellings.setdefault(fold(name), []).append(name)
            if name.endswith(".json") and not name.startswith((".", RESULTS_PREFIX)):
                _, key = metadata_task(read_metadata(f"{directory}{os.sep}{name}"))
                if key and (key not in homes or not file_bytes(directory / f"{homes[key]}.mp4")):
                    homes[key] = name.removesuffix(".json")
        return cls(directory, names, homes, spellings)

    def look(self, stub: str, key: str) -> tuple[Action, int, str]:
        """What can be done for the task ``key`` under ``stub``; the bytes there; who has it."""
        for name in (f"{stub}.json", f"{stub}.mp4"):
            for other in self.spellings.get(fold(name), ()):
                if other != name:
                    return Action.LEAVE, 0, f"{other} differs in case or Unicode form alone"
        path = f"{self.directory}{os.sep}{stub}"
        size = file_bytes(f"{path}.mp4")
        if size is None and os.path.lexists(f"{path}.mp4"):
            return Action.LEAVE, 0, f"{stub}.mp4 is no file"
        if os.path.lexists(f"{path}.json"):
            _, owner = metadata_task(read_metadata(f"{path}.json"))
            if owner == key != "":
                return (Action.KEEP, size, "") if size else (Action.REFILL, 0, "")
            if not owner:
                return Action.LEAVE, 0, f"{stub}.json is another program's file"
            return Action.LEAVE, 0, f"{stub}{'.json' if size is None else '.mp4'} is another task's"
        if size is None:
            return Action.DOWNLOAD, 0, ""
        try:
            with open(f"{path}.mp4", "rb") as file:
                action = Action.ASK if inspect(file, size).is_video else Action.DOWNLOAD
        except OSError as error:
            return Action.LEAVE, 0, f"{stub}.mp4 cannot be read: {error.strerror}"
        return action, size, f"{stub}.mp4 is another video"


def file_bytes(path: str | Path) -> int | None:
    """The size of the file ``path``; ``None`` when it is not there or no regular file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def directory_error(directory: Path, error: OSError | ValueError) -> JobError:
    reason = getattr(error, "strerror", None) or "not a usable name"
    if getattr(error, "errno", None) in NO_SPACE_ERRNOS:
        reason = "no space left on its disk"
    if isinstance(error, FileExistsError):
        reason = os.strerror(errno.ENOTDIR)  # as all other ways to use a file say
    hint = "mend that, or choose another with --output-dir"
    return JobError(
        f"the output directory {printable(directory)} cannot be used: {reason} — {hint}"
    )


def plan_task(task: Task, shelf: Shelf, claimed: Mapping[str, str], in_hand: bool = False) -> Plan:
    """Find ``task`` in the directory as it is now, or the place it is to have.

    ``claimed`` maps folded stubs that are about to be filled to the key of their task. With
    the whole video ``in_hand``, another one without metadata is nothing to ask about. The
    task's own video wins, then a place its metadata already holds, then a video under a name
    with its id, then the best name that nobody has.
    """
    home = shelf.homes.get(task.key, task.stub)
    best, holder = None, ""
    for stub in itertools.chain(dict.fromkeys((home, task.stub)), stubs_with_id(task)):
        action, size, held_by = shelf.look(stub, task.key)
        has_id = task.suffix in stub
        if claimed.get(fold(stub), task.key) != task.key:
            action, held_by = Action.LEAVE, f"{stub}.mp4 is another task's"
        if action is Action.ASK and (has_id or in_hand):
            action = Action.LEAVE if in_hand else Action.ADOPT
        if action in (Action.KEEP, Action.REFILL, Action.ADOPT):
            return Plan(task, stub, action, size)
        if action is Action.LEAVE:
            holder = holder or held_by
        elif best is None:
            best = Plan(task, stub, action, size, holder)
        if best and has_id and action is Action.DOWNLOAD and size == 0:
            break
    assert best  # the numbers never run out
    return best


def plan_all(tasks: Iterable[Task], shelf: Shelf, claimed: dict[str, str]) -> list[Plan]:
    """Plan ``tasks`` in order, so that a rerun gives each the same name; adds to ``claimed``."""
    plans = []
    for task in tasks:
        home = shelf.homes.get(task.key)
        size = file_bytes(f"{shelf.directory}{os.sep}{home}.mp4") if home else 0
        if home and size:
            plans.append(Plan(task, home, Action.KEEP, size))
        else:
            plans.append(plan_task(task, shelf, claimed))
            claimed[fold(plans[-1].stub)] = task.key
    return plans


def urgency(plan: Plan) -> tuple[bool, float]:
    """Sorts links that die soonest first, those that do not say when last."""
    expiry = link_expiry(plan.task.link)
    return plan.action is Action.ADOPT, math.inf if expiry is None else expiry


# --- Part files: hidden, locked, growing as bytes arrive --------------------------------------

_BINARY_FLAG = getattr(os, "O_BINARY", 0)  # Windows
_PART_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | _BINARY_FLAG

Source = tuple[int, str]  # the object a part is the beginning of: its bytes in all, its validator


class PartFile:
    """One task's hidden file, which this run alone holds; it is written at its end alone.

    `claim` it, `restart` it for another object, `write`, and `release` it, which keeps what a
    later run can resume. What it is the beginning of stands beside it, in ``<name>.json``.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115 - `release` closes it
        self.size_bytes = os.fstat(descriptor).st_size
        self.source: Source | None = None
        with contextlib.suppress(OSError, ValueError, TypeError):
            total, validator = json.loads(path.with_suffix(".json").read_bytes())
            self.source = int(total), str(validator)
        is_start = self.source and 0 < self.size_bytes <= self.source[0]
        if not is_start and (self.source or self.size_bytes):
            self.restart()

    @classmethod
    def claim(cls, path: Path) -> PartFile | None:
        """Open and lock the part file ``path``; ``None`` when it is in other hands.

        One that is published already, or another user's, makes way for a new one. Where that
        or locking is not possible, a name of its own serves for this run.
        """
        for _ in range(NAME_TRIES):
            descriptor, is_usable = open_part(path)
            locked = try_lock(descriptor)
            if locked and is_usable and is_same_file(descriptor, path):
                return cls(path, descriptor)
            if descriptor >= 0:
                os.close(descriptor)
            if locked is False:
                return None
            if not (locked and is_usable):
                remove(path)
        own = path.with_name(f"{path.stem}-{os.getpid()}-{random.getrandbits(32):08x}.part")
        descriptor = os.open(own, _PART_FLAGS | os.O_EXCL, 0o666)
        try_lock(descriptor)
        return cls(own, descriptor)

    @property
    def is_intact(self) -> bool:
        """Whether the file of this name is still the one written, with what was written."""
        size_bytes = os.fstat(self.file.fileno()).st_size
        return size_bytes == self.size_bytes and is_same_file(self.file.fileno(), self.path)

    @property
    def share(self) -> float:
        """How much of the object is here, up to 1; 0 where that cannot be known."""
        return self.size_bytes / self.source[0] if self.source else 0.0

    def restart(self, source: Source | None = None) -> None:
        """Forget all bytes; those to come are of ``source``, or cannot be resumed."""
        beside = self.path.with_suffix(".json")
        with disk_errors("write the part file"):
            if self.size_bytes:
                self.file.truncate(0)
            self.source, self.size_bytes = source, 0
            beside.unlink(missing_ok=True)
            if source:
                beside.write_text(json.dumps(source))

    def write(self, data: bytes | bytearray) -> None:
        rest = memoryview(data)
        with disk_errors("write the video"):
            while rest:  # a nearly full disk takes a part of it and says nothing
                rest = rest[self.file.write(rest) or 0 :]
            self.size_bytes += len(data)
            if self.file.tell() != self.size_bytes:
                raise TransientError("the hidden file was changed by somebody meanwhile")

    def release(self, keep: bool = True) -> None:
        """Let others have it; nothing is kept but what can be resumed."""
        is_ours = is_same_file(self.file.fileno(), self.path) or not os.path.lexists(self.path)
        keep = keep and self.is_intact and self.share > 0
        if os.name == "nt":  # where no open file can be removed
            self.file.close()
        if is_ours and not keep:
            remove_part(self.path)
        self.file.close()


def open_part(path: Path) -> tuple[int, bool]:
    """Open a part file, made if need be; -1 if it cannot be. Whether it may be written.

    It may not where it is another user's, or published: then it has another name as well.
    """
    for flags in (_PART_FLAGS, os.O_RDONLY | _BINARY_FLAG):
        with contextlib.suppress(PermissionError, FileNotFoundError, IsADirectoryError):
            descriptor = os.open(path, flags, 0o666)
            return descriptor, flags == _PART_FLAGS and os.fstat(descriptor).st_nlink == 1
    return -1, False


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file against other runs and threads; ``None`` where there are no locks.

    The kernel's locks end with the process, so a killed run leaves none.
    """
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 2**40, os.SEEK_SET)  # a byte far behind those of any video
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        elif descriptor >= 0:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK) else None
    return True if descriptor >= 0 else None


def is_same_file(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def remove_part(path: Path) -> None:
    """Remove the part file ``path`` and what stands beside it."""
    for suffix in (".json", ".tmp", ".part"):
        remove(path.with_suffix(suffix))


def sweep(directory: Path, names: Iterable[str]) -> None:
    """Remove what earlier runs left of the hidden files ``names``, unless it is in use."""
    for stem in {name.rsplit(".", 1)[0] for name in names if name.startswith(".dsv-")}:
        path = directory / f"{stem}.part"
        with contextlib.suppress(OSError):
            descriptor, _ = open_part(path)
            is_idle = try_lock(descriptor) and is_same_file(descriptor, path)
            os.close(descriptor)
            if is_idle:
                remove_part(path)


# --- What an answer's head says (RFC 9110) ----------------------------------------------------


def content_range(headers: Mapping[str, str]) -> tuple[int, int]:
    """First byte and total of ``Content-Range`` (section 14.4); -1 for nonsense."""
    value = (headers.get("Content-Range") or "").strip()
    match = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", value)
    good = match and int(match[1]) <= int(match[2]) == int(match[3]) - 1
    return (int(match[1]), int(match[3])) if match and good else (-1, -1)


def strong_validator(headers: Mapping[str, str]) -> str:
    """What tells this object from any other (section 8.8): ETag, else Last-Modified, or "".

    A weak ETag says that the bytes may differ: nothing may be resumed with it (13.1.5).
    """
    validator = (headers.get("ETag") or headers.get("Last-Modified") or "").strip()
    return "" if validator.startswith("W/") else validator


def read_head(response: requests.Response) -> tuple[int, int, Source | None]:
    """From which byte the body goes on, the whole object's size, and what it is if resumable.

    -1 stands for what the head does not say.
    """
    headers, announced = response.headers, response.raw.length_remaining
    start, total = 0, -1 if announced is None else announced
    if response.status_code == 206:
        start, total = content_range(headers)
    if headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        total = -1
    validator = strong_validator(headers)
    return start, total, (total, validator) if total > 0 and validator else None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait (section 10.2.3), said as a number or a date; ``None`` for nonsense."""
    with contextlib.suppress(urllib3.exceptions.HTTPError, ValueError, OverflowError):
        return Retry().parse_retry_after(headers.get("Retry-After") or "")
    return None


_OVERLOADED_STATUSES = {429, 503}  # RFC 6585, 4; RFC 9110, 15.6.4


def check_status(status: int, headers: Mapping[str, str]) -> None:
    """Raise what a status other than 200 and 206 means: transient, dead or final."""
    if status in (408, 425) or status >= 500:
        raise TransientError(f"the server answered HTTP {status}", retry_after_s(headers))
    if status in (401, 403, 404, 410):
        raise LinkDead(f"the link was refused: HTTP {status}", "")
    if status not in (200, 206):
        hint = "run the polling step again for another link"
        raise TaskError(f"the server answered HTTP {status}", hint)


# --- Transport: requests, with one TLS context, a pace for all, and an eye on the rate --------


class SharedContextAdapter(requests.adapters.HTTPAdapter):
    """Gives all connections one TLS context: left alone, requests loads the CA bundle for each.

    That is 20 ms of CPU a connection.
    """

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        self._context = make_tls_context()
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        return super().proxy_manager_for(proxy, ssl_context=self._context, **kwargs)

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Add nothing: the context holds the bundle and asks for a good certificate."""


def make_tls_context() -> ssl.SSLContext:
    """A verifying context with the CA bundle that requests would take; raises `JobError`."""
    named = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    bundle = named or DEFAULT_CA_BUNDLE_PATH
    context = create_urllib3_context()
    try:
        context.load_verify_locations(**{"capath" if os.path.isdir(bundle) else "cafile": bundle})
    except OSError as error:
        reason = error.strerror or "not a CA bundle"
        raise JobError(f"the CA bundle {printable(bundle)} cannot be loaded: {reason}") from None
    return context


def make_session(workers: int) -> requests.Session:
    """A session for ``workers`` threads, which keeps connections alive."""
    session = requests.Session()
    session.trust_env = False  # no .netrc for the CDN
    session.headers["User-Agent"] = f"download_succeeded_videos/{__version__}"
    adapter = SharedContextAdapter(pool_connections=workers, pool_maxsize=workers)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


class Pace:
    """When one server may be asked next: at once, until it answers 429 or 503.

    Then all wait, the longer the more often that happens, and ask one after the other; each
    good answer shortens the interval a little.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._interval_s = 0.0
        self._next = self._served = self._slowed = -math.inf

    def take_turn(self, now: float, jitter: float) -> float:
        """0 when it is this request's turn, else seconds until it is worth asking again."""
        with self._lock:
            if now < self._next:
                return self._next - now + self._interval_s * jitter
            self._next = now + self._interval_s
            return 0.0

    def served(self, now: float) -> None:
        with self._lock:
            self._served = now
            self._interval_s = 0.95 * self._interval_s if self._interval_s > 0.01 else 0.0

    def overloaded(self, now: float, asked: float, hold_s: float) -> bool:
        """Slow down, once for all requests of a burst; whether others are still served."""
        with self._lock:
            if now - self._served > STILL_SERVING_S:
                self._interval_s = 0.0
                return False
            if asked >= self._slowed:
                self._slowed = now
                self._interval_s = min(1.0, max(0.05, 2 * self._interval_s))
            self._next = max(self._next, now + hold_s)
            return True


def has_more(raw: Any) -> bool:
    """Whether more of a body has come already; False also where that cannot be seen."""
    try:
        return wait_for_read(raw, 0)
    except (OSError, ValueError, AttributeError):  # read to its end, or a test's stand-in
        return False


@dataclass(frozen=True)
class Transport:
    """How the workers of one run ask servers, until ``stop``: in turn, where one asks for it."""

    session: requests.Session
    timeout_s: float
    stop: threading.Event = field(default_factory=threading.Event)
    _paces: dict[str, Pace] = field(default_factory=dict)

    def get(self, link: str, headers: Mapping[str, str], **how: Any) -> requests.Response:
        """The head of the answer, when it is this request's turn.

        Raises `TransientError` for 429 and 503, and what `explain` makes of other faults.
        """
        pace = self._paces.setdefault(urlsplit(link).netloc, Pace())
        while (delay_s := pace.take_turn(time.monotonic(), random.random())) > 0:
            self.wait(delay_s)
        asked = time.monotonic()
        how |= {"timeout": (self.timeout_s, self.timeout_s), "stream": True}
        try:
            how["proxies"] = get_environ_proxies(link, no_proxy=None)
            response = self.session.get(link, headers=headers, **how)
        except NETWORK_ERRORS as error:
            raise explain(error, self.timeout_s) from None
        if response.status_code not in _OVERLOADED_STATUSES:
            pace.served(time.monotonic())
            return response
        with response:
            if (response.raw.length_remaining or READ_BYTES) < READ_BYTES:
                response.raw.drain_conn()  # keeps the connection
        wait_s = retry_after_s(response.headers)
        hold_s = wait_s if wait_s and wait_s <= RETRY_AFTER_CAP_S else BACKOFF_BASE_S
        still_serves = pace.overloaded(time.monotonic(), asked, hold_s)
        reason = f"the server answered HTTP {response.status_code}"
        raise TransientError(reason, wait_s, costs=not still_serves)

    def wait(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise Cancelled

    def chunks(
        self, response: requests.Response, clock: Callable[[], float] = time.monotonic
    ) -> Iterator[bytearray]:
        """The decoded body in blocks; raises `TransientError` when it all but stops.

        Reading what has come, and no more, lets the rate be seen; what is there already makes
        one block, since 32 threads that handle each bit of TLS by itself are in each other's
        way. urllib3 1.26 cannot read so: there a read is as short as the least rate fills in
        half the time.
        """
        raw, timeout_s, block = response.raw, self.timeout_s, bytearray()
        fault: TaskError | None = None
        how = {"decode_content": "Content-Encoding" in response.headers}
        if hasattr(raw, "read1"):
            pieces = iter(functools.partial(raw.read1, READ_BYTES, **how), b"")
        else:
            least = max(1, int(STALL_BYTES_PER_SECOND * timeout_s / 2))
            pieces = raw.stream(min(READ_BYTES, least), **how)
        since, before = clock(), 0
        try:
            for piece in pieces:
                block += piece
                if len(block) >= READ_BYTES or not has_more(raw):
                    yield block
                    self.wait(0)
                    block = bytearray()
                if (now := clock()) - since >= timeout_s:
                    if raw.tell() - before < STALL_BYTES_PER_SECOND * (now - since):
                        fault = TransientError(f"stalled: less than 1 kB/s for {timeout_s:g} s")
                        break
                    since, before = now, raw.tell()
        except NETWORK_ERRORS as error:
            fault = explain(error, timeout_s)
        yield block
        if fault:
            raise fault


NETWORK_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)


def explain(error: BaseException, timeout_s: float) -> TaskError:
    """A library's exception in our words: theirs may hold the link, query and all."""
    known = requests.exceptions
    if isinstance(error, known.SSLError) and re.search("verify failed|match", str(error)):
        hint = "set REQUESTS_CA_BUNDLE to the bundle that holds its CA"
        return TaskError("the server's certificate is not trusted", hint)
    if isinstance(error, (known.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)):
        what = (
            "no connection" if isinstance(error, known.ConnectTimeout) else "stalled: nothing came"
        )
        return TransientError(f"{what} within {timeout_s:g} s")
    if isinstance(error, (known.TooManyRedirects, ValueError)):
        hint = "look at HTTPS_PROXY, or run the polling step again for another link"
        return TaskError("the link or the proxy leads to no usable address", hint)
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, OSError) and cause.strerror and cause.errno:
            return TransientError(f"the connection failed: {cause.strerror}")
        cause = cause.__cause__ or cause.__context__
    return TransientError("the connection was cut")


# --- The Runway API: a fresh link for a dead one ----------------------------------------------


def api_secret() -> str:
    return os.environ.get("RUNWAYML_API_SECRET", "").strip()


def fetch_fresh_link(task_id: str, transport: Transport) -> str:
    """A new link to the video of ``task_id`` (https://docs.dev.runwayml.com/api/).

    Raises `TransientError` where another try may help, else `LinkDead`. Redirects are not
    followed: the key is for this host alone.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", task_id):
        raise LinkDead("Runway cannot be asked without a task_id", "look at the results file")
    if not re.fullmatch(r"[\x21-\x7e]+", api_secret()):
        raise LinkDead("RUNWAYML_API_SECRET is not a key", "set it to the key alone")
    base_url = os.environ.get("RUNWAYML_BASE_URL", "").strip().rstrip("/") or RUNWAY_BASE_URL
    headers = {"Authorization": f"Bearer {api_secret()}", "X-Runway-Version": "2024-11-06"}
    headers["Accept-Encoding"] = "identity"
    try:
        link = f"{base_url}/v1/tasks/{task_id}"
        with transport.get(link, headers, allow_redirects=False) as response:
            status, body = response.status_code, b""
            if status != 200 and status < 500 and status not in (408, 425):
                hints = {401: "see RUNWAYML_API_SECRET", 404: "make the video again"}
                hint = hints.get(status, "see RUNWAYML_API_SECRET and RUNWAYML_BASE_URL")
                raise TaskError(f"answered HTTP {status}", hint)
            check_status(status, response.headers)
            for piece in transport.chunks(response):
                body += piece
                if len(body) > BYTES_PER_MB:
                    break
            return read_api_answer(body)
    except TransientError as error:
        error.reason = f"Runway API: {error.reason}"
        raise
    except TaskError as error:
        raise LinkDead(f"Runway API: {error.reason}", error.hint) from None


def read_api_answer(body: bytes) -> str:
    """The first usable link in ``output`` of a task as the API describes it."""
    try:
        task = as_object(json.loads(body))
    except (ValueError, RecursionError):
        raise TransientError("the answer is not JSON, or not all of it came") from None
    output = task.get("output")
    link = usable_link(output[0]) if isinstance(output, list) and output else ""
    if not link or task.get("status", "SUCCEEDED") != "SUCCEEDED":
        status = printable(str(task.get("status"))[:20])
        reason = f"the answer holds no video (status {status})"
        raise TaskError(reason, "see the task in Runway, or RUNWAYML_BASE_URL")
    return link


# --- Outcomes: what became of one task --------------------------------------------------------


class Status(str, Enum):
    DOWNLOADED = "downloaded"
    EXISTS = "exists"
    FAILED = "failed"
    PENDING = "pending"  # in a dry run


@dataclass(frozen=True)
class Outcome:
    """What became of one task: its video's ``path`` and bytes, and the ``fault`` if it failed.

    One that is there may have a fault as well: it could not be handed over. ``file`` is the
    ``path`` as text, ``notes`` are lines for the console, ``expires`` is a dry run's, in ISO 8601.
    """

    task_id: str
    status: Status
    file: str
    size_bytes: int | None = None
    link: str = field(default="", repr=False)
    fault: TaskError | None = None
    warning: str = ""
    notes: tuple[str, ...] = ()
    expires: str = ""

    @property
    def path(self) -> Path:
        return Path(self.file)

    @property
    def name(self) -> str:
        return os.path.basename(self.file)

    @property
    def error(self) -> str:
        """One line: why it failed, and what the user can do; ``""`` when all is well."""
        return str(self.fault) if self.fault else ""

    @property
    def label(self) -> str:
        """How a list names it."""
        return f"{printable(self.name)} (task {shown_id(self.task_id)})"

    def as_json(self) -> dict[str, Any]:
        entry = {
            "task_id": self.task_id,
            "status": self.status.value,
            "path": None if self.status is Status.FAILED else self.file,
            "size_bytes": self.size_bytes,
            "error": self.error or None,
            "warning": self.warning or None,
        }
        return entry | {"expires": self.expires} if self.expires else entry


def outcome_of(plan: Plan, directory: Path, status: Status, **more: Any) -> Outcome:
    file = f"{directory}{os.sep}{plan.stub}.mp4"
    return Outcome(plan.task.task_id, status, file, link=plan.task.link, **more)


STATISTICS = {
    Status.DOWNLOADED: "downloaded",
    Status.FAILED: "failed_downloads",
    Status.EXISTS: "already_exists",
}


def count_outcomes(outcomes: Sequence[Outcome] = ()) -> dict[str, int]:
    counts = Counter(outcome.status for outcome in outcomes)
    return {"total_succeeded": len(outcomes)} | {
        name: counts[status] for status, name in STATISTICS.items()
    }


# --- One download: attempts, back-off, resume, a fresh link, a name ---------------------------


@dataclass(frozen=True)
class Workplace:
    """What all downloads of a run share; ``claimed`` maps folded stubs to their task's key.

    The live line looks at ``active``, by task key, and ``received``, bytes by each that ended.
    """

    shelf: Shelf
    claimed: dict[str, str]
    transport: Transport
    retries: int
    command: Sequence[str]
    active: dict[str, Download] = field(default_factory=dict)
    received: list[int] = field(default_factory=list)


def backoff_s(failures: int, at_least_s: float | None, jitter: float) -> float:
    """Seconds before the next try: exponential, ``jitter`` in [0, 1) halves it at most."""
    delay = BACKOFF_BASE_S * 2.0 ** min(failures - 1, 6)
    return max(delay * (0.5 + jitter / 2), at_least_s or 0.0)


class Download:
    """Brings one task's video to its place, in the worker thread that calls `run`.

    The live line looks at ``part``, ``received`` and ``waiting`` meanwhile.
    """

    def __init__(self, plan: Plan, place: Workplace) -> None:
        self.plan = plan
        self.part: PartFile | None = None
        self.received = 0
        self.waiting = ""
        self._place = place
        self._task = plan.task
        self._directory = place.shelf.directory
        self._link = plan.task.link
        self._refused: LinkDead | None = None
        self._is_fresh = False
        self._length_matched = True
        self._most_bytes = 0
        self._failures = 0
        self._tries = 1
        self._notes: list[str] = []
        self._warning = ""

    def run(self) -> Outcome:
        """Do what is to be done; raises `JobError`, `InOtherHands` and `Cancelled`."""
        self._place.active[self._task.key], keep = self, True
        try:
            part = self._claim()
            self.plan = plan_task(self._task, self._place.shelf, self._place.claimed)
            outcome, keep = self._act(part), False
            return hand_over(outcome, self._place.command) if self._place.command else outcome
        except TaskError as fault:
            tries = f"tried {self._tries} times" if self._tries > 1 else ""
            fault.detail = ", ".join(filter(None, (fault.detail, tries)))
            return self._outcome(Status.FAILED, None, fault)
        finally:
            self._place.active.pop(self._task.key, None)
            self._place.received.append(self.received)
            if self.part:
                self.part.release(keep)

    def _claim(self) -> PartFile:
        """Hold the part file, or raise `InOtherHands`; one that was held before is let go."""
        if self.part:
            self.part.release()
        self.part = None
        with disk_errors("write to the output directory"):
            self.part = PartFile.claim(hidden_path(self._directory, self._task.key))
        if not self.part:
            raise InOtherHands
        return self.part

    def _act(self, part: PartFile) -> Outcome:
        if self.plan.action is Action.KEEP:
            return self._outcome(Status.EXISTS, self.plan.size_bytes)
        if self.plan.action is Action.ADOPT:
            return self._adopt()
        while True:
            self._place.transport.wait(0)
            try:
                return self._attempt(part)
            except LinkDead as error:
                if self._link and not self._refused:
                    self._refused = error  # the next attempt asks for a fresh one
                elif self.plan.action is Action.ASK:
                    why = f"the link could not be asked, {error.reason.removeprefix('the link ')}"
                    return self._adopt(f"  ℹ️ Taken for this task's: {why}")
                else:
                    raise
            except TransientError as error:
                self._back_off(part, error)
                if not part.is_intact:
                    part = self._claim()

    def _attempt(self, part: PartFile) -> Outcome:
        """One request, if need be, for what is missing; then the video's place."""
        if part.share < 1:
            if not self._link or self._refused:
                self._renew_link()
            if not self._transfer(part):
                return self._adopt()
        self._check_content(part)
        return self._publish(part)

    def _renew_link(self) -> None:
        """Take a fresh link from Runway, once; else raise `LinkDead`, saying what would help."""
        reason, expiry = 'the row has no usable "video_url"', link_expiry(self._link)
        detail, hint = "", "set RUNWAYML_API_SECRET and run again to fetch a fresh link"
        if self._refused:
            reason = self._refused.reason
            if self._is_fresh:
                raise LinkDead(f"the fresh {reason.removeprefix('the ')}", "run again later")
        if expiry is not None:
            word = "expired" if expiry <= time.time() else "valid until"
            detail = f"{word} {utc_time(expiry):%Y-%m-%d %H:%M:%S} UTC"
        if not api_secret():
            raise LinkDead(reason, hint, detail)
        try:
            self._link = fetch_fresh_link(self._task.task_id, self._place.transport)
        except LinkDead as error:
            raise LinkDead(f"{reason}; {error.reason}", error.hint, detail) from None
        self._refused, self._is_fresh = None, True
        self._notes.append("  🔑 Fetched a fresh link from Runway")

    def _transfer(self, part: PartFile) -> bool:
        """Ask and receive; False if the answer shows that the file there is this task's own."""
        headers = {"Accept-Encoding": "identity"}
        if part.source and part.size_bytes:
            headers |= {"Range": f"bytes={part.size_bytes}-", "If-Range": part.source[1]}
        with self._place.transport.get(self._link, headers) as response:
            self.waiting = ""
            status, (start, total, source) = response.status_code, read_head(response)
            continues = 0 < part.size_bytes == start and source == part.source
            if continues or not (part.size_bytes and status in (206, 416)):
                check_status(status, response.headers)
                if not continues and start != 0:
                    raise TransientError("the server sent a part that was not asked for")
                if self.plan.action is Action.ASK:
                    if total == self.plan.size_bytes:
                        return False
                    self._move()
                if continues:
                    self._notes.append(f"  ⏩ Resumed at {megabytes(part.size_bytes)}")
                else:
                    part.restart(source)
                self._receive(response, part)
                return True
        part.restart()  # the server has another object by now
        return self._transfer(part)

    def _receive(self, response: requests.Response, part: PartFile) -> None:
        """Write the body to ``part`` and count it against what the head announced."""
        announced = response.raw.length_remaining
        self._length_matched = announced is not None
        try:
            for data in self._place.transport.chunks(response):
                part.write(data)
                self.received += len(data)
        finally:
            if part.size_bytes > self._most_bytes:
                self._most_bytes, self._failures = part.size_bytes, 0
        if (announced or 0) > response.raw.tell() or (part.source and part.share != 1):
            raise TransientError("the connection was cut")
        if not part.size_bytes and announced is None and not response.raw.chunked:
            raise TransientError("the connection was closed before the first byte")

    def _check_content(self, part: PartFile) -> None:
        with disk_errors("read the video back"):
            content = inspect(part.file, part.size_bytes)
        if content is Content.CUT or (content is Content.SURPLUS and not self._length_matched):
            part.restart()
            raise TransientError("the server sent an MP4 cut short")
        if not content.is_video:
            part.restart()
            hint = "open the link in a browser, or look at the task in Runway"
            raise TaskError(f"what the server sent is {content.value}", hint)
        if content is not Content.WHOLE:
            self._warning = f"it is {content.value}"

    def _back_off(self, part: PartFile, error: TransientError) -> None:
        """Wait until it is time for another try; raise a final error when none is left."""
        if part.share >= 1 or not part.source:
            part.restart()
        if (error.retry_after_s or 0) > RETRY_AFTER_CAP_S:
            reason = f"{error.reason} and asks to wait {error.retry_after_s:.0f} s"
            raise TaskError(reason, "run again after that time") from None
        self.waiting = f"{error.reason}: {printable(self.plan.stub)}.mp4"
        if error.costs_a_try and self._failures >= self._place.retries:
            raise TaskError(error.reason, error.hint) from None
        failures = self._failures + 1 if error.costs_a_try else min(self._tries, 4)
        self._failures += error.costs_a_try
        self._tries += 1
        self._notes.append(f"  🔁 Tried again: {error.reason}")
        self._place.transport.wait(backoff_s(failures, error.retry_after_s, random.random()))

    def _move(self) -> None:
        """Choose the name anew, knowing that the video there is another one."""
        place = self._place
        self.plan = plan_task(self._task, place.shelf, place.claimed, in_hand=True)
        place.claimed[fold(self.plan.stub)] = self._task.key

    def _publish(self, part: PartFile) -> Outcome:
        """Give the whole video its name, or another if that is taken by now."""
        with disk_errors("write the video"):
            info = file_info(part.file)
            os.fsync(part.file.fileno())
        for _ in range(NAME_TRIES):
            self._move()
            if self.plan.action is Action.KEEP:
                return self._outcome(Status.EXISTS, self.plan.size_bytes)
            if not part.is_intact:
                raise TransientError("the hidden file was changed by somebody meanwhile")
            with contextlib.suppress(FileExistsError), disk_errors("put the video in place"):
                self._put_in_place(part, info)
                return self._outcome(Status.DOWNLOADED, part.size_bytes)
        hint = "see who writes to the output directory, then run again"
        raise TaskError("its names were taken as fast as they were chosen", hint)

    def _put_in_place(self, part: PartFile, info: Mapping[str, Any]) -> None:
        """Publish metadata, then the video: whoever sees it finds both.

        A kill in between leaves metadata without a video, which the next run fills. Raises
        FileExistsError if somebody has taken the name.
        """
        path = self._directory / f"{self.plan.stub}.mp4"
        metadata = path.with_suffix(".json")
        is_new = put_metadata(metadata, self._task, path.name, info, bool(self._place.command))
        try:  # what is there is replaced if it is empty, or as broken as it was a moment ago
            publish(part.path, path, replaces=file_bytes(path) == self.plan.size_bytes)
        except OSError:
            if is_new and file_bytes(path) != info["size_bytes"]:  # else it describes that one
                remove(metadata)
            raise

    def _adopt(self, *notes: str) -> Outcome:
        """Create metadata for the video that is there."""
        path = self._directory / f"{self.plan.stub}.mp4"
        try:
            with disk_errors("describe the video that is there"), open(path, "rb") as file:
                info = file_info(file)
                put_metadata(path.with_suffix(".json"), self._task, path.name, info)
        except FileExistsError:
            raise TaskError("its name was taken by somebody meanwhile", "run again") from None
        self._notes += [*notes, f"  📄 Metadata created: {printable(self.plan.stub)}.json"]
        return self._outcome(Status.EXISTS, info["size_bytes"])

    def _outcome(
        self, status: Status, size_bytes: int | None, fault: TaskError | None = None
    ) -> Outcome:
        if status is Status.DOWNLOADED and self.plan.holder and self.plan.stub != self._task.stub:
            self._notes.append(f"  ℹ️ Saved under this name: {printable(self.plan.holder)}")
        more = {"warning": self._warning, "notes": tuple(self._notes), "fault": fault}
        return outcome_of(self.plan, self._directory, status, size_bytes=size_bytes, **more)


# --- Handing over: the command that takes each new video on -----------------------------------


def hand_over(outcome: Outcome, command: Sequence[str]) -> Outcome:
    """Run ``command`` if the metadata says that the video is still to be handed over.

    The metadata then says that it was: at least once, since a kill may come in between.
    """
    path = outcome.path.with_suffix(".json")
    if outcome.fault or not is_waiting(path):
        return outcome
    try:
        run_command(command, outcome.path, path)
        metadata = read_metadata(path) | {"handed_over": True}
        with disk_errors("record that it was handed over"):
            write_whole(path, encode_metadata(metadata), metadata_task(metadata)[1], replaces=True)
    except TaskError as fault:
        return replace(outcome, fault=fault)
    return replace(outcome, notes=(*outcome.notes, f"  🔧 Handed over: {printable(command[0])}"))


def is_waiting(metadata: Path) -> bool:
    """Whether ``metadata`` says that its video is still to be handed over."""
    return read_metadata(metadata).get("handed_over") is False


def run_command(template: Sequence[str], video: Path, metadata: Path) -> None:
    """Run ``template`` without a shell and without the API key; raises `TaskError`."""
    paths = {"{video}": str(video.absolute()), "{metadata}": str(metadata.absolute())}
    words = [
        re.sub(r"\{\w+\}", lambda match: paths.get(match[0], match[0]), word) for word in template
    ]
    environment = {key: value for key, value in os.environ.items() if key != "RUNWAYML_API_SECRET"}
    none, both = subprocess.DEVNULL, subprocess.STDOUT
    with tempfile.TemporaryFile() as output:
        try:
            code = subprocess.Popen(words, 0, None, none, output, both, env=environment).wait()
            why = f"exit code {code}" if code else ""
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "not a usable command"
        output.seek(0)
        said = printable(b"".join(deque(output, maxlen=1)).decode(errors="replace").strip()[:200])
    if why:
        reason = f"not handed over: {printable(words[0])}: {why}"
        raise TaskError(reason, "mend that, then run again with --exec", said)


# --- How it all looks -------------------------------------------------------------------------


def outcome_lines(outcome: Outcome, number: str) -> list[str]:
    """The block of lines about one task; ``number`` is ``"k/N "`` or empty."""
    name, size = printable(outcome.name), megabytes(outcome.size_bytes or 0)
    lines = ["", f"  {number}Task {shown_id(outcome.task_id)}"]
    if outcome.fault and outcome.status is Status.FAILED:
        return [*lines, *outcome.notes, f"  ❌ Failed: {name}: {outcome.fault.why}"]
    if outcome.status is Status.EXISTS:
        return [*lines, f"  ⚠️ Already exists: {name}", *outcome.notes]
    link = [f"  📥 Streaming download from: {shown_link(outcome.link)}"] if outcome.link else []
    lines += [f"  🎬 Downloading: {name}", *link, f"  📊 File size: {size}"]
    lines += [f"  ✅ Downloaded: {size}", f"  📄 Metadata saved: {name.removesuffix('.mp4')}.json"]
    lines += [f"  ⚠️ Kept, though {outcome.warning}: look at it"] if outcome.warning else []
    return [*lines, *outcome.notes, *([f"  ❌ {outcome.fault.why}"] if outcome.fault else [])]


def statistics_lines(stats: Mapping[str, int]) -> list[str]:
    total = stats["total_succeeded"]
    on_disk = stats["downloaded"] + stats["already_exists"]
    lines = [
        *("", "=" * 60, "📊 DOWNLOAD STATISTICS", "=" * 60),
        f"✅ Total SUCCEEDED tasks found: {total}",
        f"📥 Videos downloaded: {stats['downloaded']}",
        f"⚠️ Already existed: {stats['already_exists']}",
        f"❌ Failed downloads: {stats['failed_downloads']}",
    ]
    return [*lines, f"📈 Success rate: {100 * on_disk / total:.1f}%"] if total else lines


def storage_lines(directory: Path, outcomes: Iterable[Outcome]) -> list[str]:
    """The videos in ``directory``, those of ``outcomes`` first, and what they take together."""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        sizes = {
            entry.name: entry.stat().st_size
            for entry in entries
            if entry.name.endswith(".mp4") and entry.name[0] != "." and entry.is_file()
        }
        new = [each.name for each in outcomes if each.status is Status.DOWNLOADED]
        names = list(dict.fromkeys([*filter(sizes.get, new), *sorted(sizes)]))
        lines = [f"  • {printable(name)} ({megabytes(sizes[name])})" for name in names[:LISTED]]
        if len(names) > LISTED:
            lines.append(f"  … and {len(names) - LISTED:,} more")
        total = f"💾 Total storage used: {megabytes(sum(sizes.values()))}"
        return ["", f"📁 Videos in {printable(directory)}:", *lines, "", total] if names else []
    return []


def failure_lines(outcomes: Iterable[Outcome]) -> list[str]:
    """What is wrong, grouped by reason: the reason and the advice once, then the names."""
    groups: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        if fault := outcome.fault:
            names = groups.setdefault((f"❌ {{}}: {fault.reason}", fault.hint), [])
            names.append(f"    {outcome.label}" + (f": {fault.detail}" if fault.detail else ""))
        if outcome.warning:
            heading = f"⚠️ {{}} kept, though {outcome.warning}"
            groups.setdefault((heading, "look at it"), []).append(f"    {outcome.label}")
    lines = []
    for (heading, hint), names in groups.items():
        lines += ["", heading.replace("{}", counted(len(names)), 1)]
        lines += [*shortened(names, NAMES_SHOWN), f"  → {hint}"]
    return lines


def fitted(parts: Sequence[str], columns: int) -> str:
    """As much of ``parts`` as fits into ``columns`` of a terminal, emoji being two wide."""
    width, shown = 0, ""
    for char in "  ".join(parts):
        width += 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if width > columns:
            return shown[:-1] + "…"
        shown += char
    return shown


class Console:
    """The one place that prints: lines to stdout, what is wrong to stderr, and the live line.

    ``quiet`` leaves what is wrong; with ``as_json`` stdout is left to the object. A reader that
    goes away or an encoding without emoji never breaks the run.
    """

    def __init__(self, quiet: bool = False, as_json: bool = False) -> None:
        self._quiet = quiet
        self._as_json = as_json
        self._live = ""
        self._printed = time.monotonic()

    def say(self, *lines: str) -> None:
        if not self._quiet and lines:
            self.write(sys.stderr if self._as_json else sys.stdout, "\n".join(lines) + "\n")

    def complain(self, *lines: str) -> None:
        if lines:
            self.write(sys.stderr, "\n".join(lines) + "\n")

    def show_progress(self, parts: Sequence[str]) -> None:
        """Draw the live line, none of no ``parts``; off a terminal break a long silence."""
        columns = 0
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if sys.stderr.isatty() and not self._quiet:
                columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        if columns:
            live = fitted(parts, columns - 1)
            if live != self._live:
                clear, self._live = "\r\x1b[K" if self._live else "", live
                self._put(sys.stderr, clear + live)
        elif parts and time.monotonic() - self._printed >= SILENCE_S:
            self.say("  ".join(parts))

    def write(self, stream: TextIO | None, text: str) -> bool:
        """Whether ``text`` could be written, behind the live line if there is one."""
        self.show_progress([])
        self._printed = time.monotonic()
        return self._put(stream, text)

    def _put(self, stream: TextIO | None, text: str) -> bool:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            encoding = getattr(stream, "encoding", None) or "utf-8"
            if stream and stream.write(text.encode(encoding, "replace").decode(encoding)):
                stream.flush()
                return True
        return False


# --- The run: work in parallel, report as it ends ---------------------------------------------


@dataclass
class Crew:
    """Worker threads that do one job each from start to end, led by the thread that calls `do`.

    They are daemons: no exit waits for one that waits for a server. Jobs in other hands, whose
    tasks' keys are in ``waiting``, are tried again until they are done.
    """

    work: Callable[[Plan], Outcome]
    report: Callable[[Plan, Outcome | Exception], None]
    stop: threading.Event
    waiting: set[str] = field(default_factory=set)
    _todo: SimpleQueue[Plan | None] = field(default_factory=SimpleQueue)
    _done: SimpleQueue[tuple[Plan, Outcome | Exception]] = field(default_factory=SimpleQueue)

    def do(self, jobs: Sequence[Plan], workers: int, tick: Callable[[int], None]) -> None:
        """Do ``jobs`` and report each; ``tick`` gets how many are left, now and then.

        Whatever ends this early sets ``stop``, and what ends within the grace period is still
        reported. Fewer threads than asked for, or none, will do.
        """
        left, threads = len(jobs), 0
        for job in jobs:
            self._todo.put(job)
        with contextlib.suppress(RuntimeError):  # the system gives no more
            while threads < min(workers, left):
                threading.Thread(target=self._labour, daemon=True).start()
                threads += 1
        try:
            while left:
                if not threads:
                    self._todo.put(None)
                    self._labour()
                left -= self._settle(TICK_S)
                tick(left)
        finally:
            self.stop.set()
            deadline = time.monotonic() + STOP_GRACE_S
            for _ in range(threads):
                self._todo.put(None)
            while left and time.monotonic() < deadline:
                left -= self._settle(deadline - time.monotonic())

    def _labour(self) -> None:
        for job in iter(self._todo.get, None):
            result: Outcome | Exception = Cancelled()
            try:
                if not self.stop.is_set():
                    result = self.work(job)
            except InOtherHands:
                self.waiting.add(job.task.key)
                self._todo.put(job)
                self.stop.wait(TICK_S)
                continue
            except Exception as error:  # whatever it is, it is for the thread that leads
                result = error
            self.waiting.discard(job.task.key)
            self._done.put((job, result))

    def _settle(self, wait_s: float) -> int:
        """Report one job that is done within the time; how many there were."""
        with contextlib.suppress(Empty):
            job, result = self._done.get(timeout=max(0.0, wait_s))
            if not isinstance(result, Cancelled):
                self.report(job, result)
            return 1
        return 0


class Reporter:
    """Tells of one run: each task's lines as one block when it is done, and how far it is."""

    def __init__(self, console: Console, total: int, numbered: bool) -> None:
        self.on_disk = self.failed = self._existing = self._hidden = 0
        self._console = console
        self._total = total
        self._numbered = numbered
        self._started = time.monotonic()
        self._samples = deque([(self._started, 0)], maxlen=20)  # of some 5 s
        self._told_of_waiting = False

    def finished(self, outcome: Outcome) -> None:
        """Count ``outcome`` and print its lines; of many that were there, the first few."""
        self.on_disk += outcome.status is not Status.FAILED
        self.failed += outcome.status is Status.FAILED
        self._existing += outcome.status is Status.EXISTS and not outcome.notes
        is_news = outcome.status is not Status.EXISTS or outcome.notes
        self._hidden += not is_news and self._existing > EXISTING_SHOWN
        if is_news or self._existing <= EXISTING_SHOWN:
            number = f"{self.on_disk + self.failed}/{self._total} " if self._numbered else ""
            self._console.say(*outcome_lines(outcome, number))

    def say_hidden(self) -> None:
        """Count the existing videos that were not worth a block of their own."""
        if self._hidden:
            self._console.say("", f"  ⚠️ … and {self._hidden:,} more that already exist")
        self._hidden = 0

    def tick(self, active: Sequence[Download], received: int, held: int) -> None:
        """Show how far the run is, the most important part first, a few times a second."""
        if held and not self._told_of_waiting:
            self._told_of_waiting = True
            self._console.say("", f"⏳ Waiting for {counted(held)} that another run has in hand")
        now, done = time.monotonic(), self.on_disk + self.failed
        if now - self._samples[-1][0] < TICK_S:
            return
        self._samples.append((now, received))
        since, before = self._samples[0]
        rate = (received - before) / max(now - since, 0.001)
        share = done - self._existing + sum(each.part.share for each in active if each.part)
        waiting = [f"🔁 {each.waiting}" for each in active if each.waiting]
        parts = [f"⏬ {done}/{self._total}", f"{received / BYTES_PER_MB:.1f} MB"]
        if held:
            parts.append(f"waiting for {counted(held)} of another run")
        elif rate > 0 and share > 0:
            to_do = self._total - self._existing - share
            left = timedelta(seconds=math.ceil((now - self._started) * to_do / share))
            parts += [f"{rate / BYTES_PER_MB:.1f} MB/s", f"{left} left"]
        self._console.show_progress([*parts, *waiting[-1:]])


class VideoDownloader:
    """Downloads the SUCCEEDED videos of polling results into one directory.

    A caller may rely on this:

    - No method raises for bad input, a bad task or a full disk: the fault is printed and
      counted. Only the constructor raises, `JobError`, for a directory that cannot be made.
    - A video is under its final name only when it is whole, synced and has its metadata. No
      finished video is overwritten or moved. Other runs on the same directory share the work.
    - ``on_outcome`` is called once per finished task, in the thread that called the method,
      with an `Outcome` (``task_id``, ``status``, ``path``, ``size_bytes``, ``error``).
    - Methods may be called from several threads; they take turns. Ctrl-C raises
      KeyboardInterrupt as ever, and leaves part files that the next run resumes.
    """

    def __init__(
        self,
        output_dir: str | Path = DEFAULT_OUTPUT_DIR,
        *,
        workers: int = DEFAULT_WORKERS,
        timeout: float = DEFAULT_TIMEOUT_S,
        retries: int = DEFAULT_RETRIES,
        quiet: bool = False,
        on_outcome: Callable[[Outcome], None] | None = None,
        command: Sequence[str] = (),
        console: Console | None = None,
    ) -> None:
        """Make ``output_dir`` and keep the settings; ``timeout`` is in seconds.

        ``quiet`` prints nothing but what is wrong. ``command`` takes each new video over, with
        ``{video}`` and ``{metadata}`` filled in.
        """
        self.output_dir = Path(output_dir)
        self.stats = count_outcomes()
        self.outcomes: list[Outcome] = []
        self._workers, self._timeout_s, self._retries = workers, timeout, retries
        self._command, self._on_outcome = command, on_outcome
        self._console = console or Console(quiet)
        self._turn = threading.RLock()
        self._session: requests.Session | None = None
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise directory_error(self.output_dir, error) from None

    # What the orchestrator calls

    def find_all_polling_results(self, directory: str | Path = ".") -> list[Path]:
        """The results files in ``directory``, its ``video_outputs`` and the output directory."""
        return find_results_files(
            (directory, Path(directory) / DEFAULT_OUTPUT_DIR, self.output_dir)
        )

    def load_polling_results(self, path: str | Path) -> dict[str, Any]:
        """The object in results file ``path``; ``{}`` and a printed line when there is none."""
        try:
            return read_results(Path(path))
        except JobError as error:
            self._console.complain(f"❌ {error}")
            return {}

    def get_succeeded_tasks(self, results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The raw rows, in order, that SUCCEEDED and have a usable ``video_url``.

        With ``RUNWAYML_API_SECRET`` set also those without, as Runway can be asked for one.
        """
        tasks, _ = read_rows(as_object(results))
        return [task.row for task in tasks if task.link or api_secret()]

    def generate_filename_stub(self, task: Mapping[str, Any]) -> str:
        """The name that row ``task`` asks for, made safe, without suffix."""
        return task_from_row(as_object(task)).stub

    def process_succeeded_task(self, task: Mapping[str, Any]) -> bool:
        """Bring the video of row ``task`` to disk; whether it is there, new or before."""
        self._console.say(*(f"  ⚠️ {wrong}" for wrong in wrong_fields(as_object(task))))
        return self._run_safely([task_from_row(as_object(task))], numbered=False) == 1

    def process_polling_results_file(self, path: str | Path) -> int:
        """Bring all videos of results file ``path`` to disk; how many are there now."""
        tasks, errors = read_tasks([Path(path)], self._console)
        self._console.complain(*(f"❌ {error}" for error in errors))
        return self._run_safely(tasks)

    def create_metadata_json(
        self, task: Mapping[str, Any], video_path: str | Path, metadata_path: str | Path
    ) -> bool:
        """Write the metadata of row ``task`` and the video on disk; whether it worked."""
        checked, video = task_from_row(as_object(task)), Path(video_path)
        try:
            with disk_errors("write the metadata"), open(video, "rb") as file:
                put_metadata(Path(metadata_path), checked, video.name, file_info(file))
                return bool(checked.key)
        except (DownloaderError, ValueError, FileExistsError) as error:
            taken = isinstance(error, FileExistsError)
            what = "that file is another's: left alone" if taken else printable(error)
            self._console.complain(f"❌ {printable(metadata_path)}: {what}")
            return False

    def print_final_stats(self) -> None:
        """Print the summary of everything done so far, the videos there, and what failed."""
        self._console.say(*statistics_lines(self.stats))
        self._console.say(*storage_lines(self.output_dir, self.outcomes))
        self._console.complain(*failure_lines(self.outcomes))

    # The run

    def _run_safely(self, tasks: Sequence[Task], numbered: bool = True) -> int:
        before = len(self.outcomes)
        try:
            return self.run(tasks, numbered)
        except JobError as error:
            self._console.complain(f"❌ {error}")
            self.stats["failed_downloads"] += len(tasks) - len(self.outcomes) + before
            return 0

    def run(self, tasks: Sequence[Task], numbered: bool = True) -> int:
        """Bring ``tasks`` to disk; how many are there. Raises `JobError`, KeyboardInterrupt."""
        with self._turn:
            self.stats["total_succeeded"] += len(tasks)
            reporter = Reporter(self._console, len(tasks), numbered)
            shelf = Shelf.scan(self.output_dir) if numbered else self._look_around(tasks[0])
            claimed: dict[str, str] = {}
            jobs = []
            for plan in plan_all(tasks, shelf, claimed):
                size = plan.size_bytes
                exists = outcome_of(plan, self.output_dir, Status.EXISTS, size_bytes=size)
                waits = self._command and is_waiting(exists.path.with_suffix(".json"))
                if plan.action is not Action.KEEP or waits:
                    jobs.append(plan)
                else:
                    self._record(exists, reporter)
            reporter.say_hidden()
            if jobs:
                self._session = self._session or make_session(self._workers)
                transport = Transport(self._session, self._timeout_s)
                place = Workplace(shelf, claimed, transport, self._retries, self._command)
                self._work(sorted(jobs, key=urgency), place, reporter)
            reporter.say_hidden()
            if not reporter.failed:
                sweep(self.output_dir, shelf.names)
            return reporter.on_disk

    def _look_around(self, task: Task) -> Shelf:
        """A scan of the directory; for one task that is done, a look at its names is enough."""
        bare = Shelf(self.output_dir, [hidden_path(self.output_dir, task.key).name])
        is_done = plan_task(task, bare, {}).action is Action.KEEP
        return bare if is_done else Shelf.scan(self.output_dir)

    def _work(self, jobs: Sequence[Plan], place: Workplace, reporter: Reporter) -> None:
        """Carry ``jobs`` out in worker threads; report each in this one."""
        try:
            tempfile.TemporaryFile(dir=self.output_dir).close()
        except OSError as error:
            raise directory_error(self.output_dir, error) from None

        def report(plan: Plan, result: Outcome | Exception) -> None:
            if isinstance(result, JobError):
                raise result
            if isinstance(result, Exception):
                text = f"unexpected {type(result).__name__}: {printable(result)}"
                fault = TaskError(text, "please report it")
                result = outcome_of(plan, self.output_dir, Status.FAILED, fault=fault)
            self._record(result, reporter)

        def tick(left: int) -> None:
            active = list(place.active.values())
            received = sum(place.received) + sum(each.received for each in active)
            reporter.tick(active, received, left if left == len(crew.waiting) else 0)

        crew = Crew(lambda plan: Download(plan, place).run(), report, place.transport.stop)
        try:
            crew.do(jobs, self._workers, tick)
        except JobError:  # make room, of what workers still hold as well
            for download in list(place.active.values()):
                remove_part(hidden_path(self.output_dir, download.plan.task.key))
            sweep(self.output_dir, os.listdir(self.output_dir))
            raise
        finally:
            self._console.show_progress([])
            with contextlib.suppress(OSError):  # have the names reach the disk as well
                descriptor = os.open(self.output_dir, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)

    def _record(self, outcome: Outcome, reporter: Reporter) -> None:
        """Print and count ``outcome``, and tell the caller."""
        reporter.finished(outcome)
        self.outcomes.append(outcome)
        self.stats[STATISTICS[outcome.status]] += 1
        if self._on_outcome:
            self._on_outcome(outcome)


def read_tasks(paths: Sequence[Path], console: Console) -> tuple[list[Task], list[str]]:
    """The tasks of results files, latest first, each once; and what kept files from use."""
    found: list[Task] = []
    errors: list[str] = []
    for number, path in enumerate(paths):
        if number < LISTED:
            console.say("", f"📋 Processing: {printable(path.name)}")
        try:
            tasks, remarks = read_rows(read_results(path))
        except JobError as error:
            errors.append(str(error))
            continue
        found += tasks
        if number < LISTED:
            console.say(f"  ✅ Found {len(tasks)} SUCCEEDED tasks")
            console.say(*(f"  {remark}" for remark in remarks if remark[0] == "ℹ"))
        wrong = [f"  {remark}" for remark in remarks if remark[0] == "⚠"]
        console.complain(*shortened(wrong, NAMES_SHOWN))
    if len(paths) > LISTED:
        console.say("", f"  … and {len(paths) - LISTED:,} more files")
    merged = merge_tasks(found)
    if len(merged) < len(found):
        console.say("", f"  ✅ Found {len(merged):,} different SUCCEEDED tasks in all")
    return merged, errors


# --- Looking without downloading: --dry-run and --verify --------------------------------------


def dry_run(tasks: Sequence[Task], directory: Path, console: Console) -> list[Outcome]:
    """List what a run would do, soonest to expire first; no request, nothing written."""
    counts = Counter({"to do": 0, "expired": 0, "already there": 0})
    outcomes = []
    console.say("")
    for plan in sorted(plan_all(tasks, Shelf.scan(directory), {}), key=urgency):
        expiry, status, fault = link_expiry(plan.task.link), Status.PENDING, None
        word, said = "to do", "the link does not say when it expires"
        if plan.action is Action.KEEP:
            word, status = "already there", Status.EXISTS
        elif plan.action is Action.ADOPT:
            said = "is there, metadata would be created"
        elif not plan.task.link:
            said = 'the row has no usable "video_url"'
            if not api_secret():
                fault = TaskError(said, "set RUNWAYML_API_SECRET to fetch one")
                word, status = "without a link", Status.FAILED
        elif expiry is not None:
            word = "expired" if expiry <= time.time() else "to do"
            tense = "expired" if word == "expired" else "expires"
            said = f"the link {tense} {utc_time(expiry):%Y-%m-%d %H:%M:%S} UTC"
        counts[word] += 1
        more = {"fault": fault, "expires": utc_time(expiry).isoformat() if expiry else ""}
        size = plan.size_bytes or None
        outcomes.append(outcome_of(plan, directory, status, size_bytes=size, **more))
        if status is not Status.EXISTS:
            console.say(f"  {outcomes[-1].label}: {said}")
    total = ", ".join(f"{count:,} {word}" for word, count in counts.items())
    console.say("", f"🔎 Dry run: {total}")
    return outcomes


def verify(
    directory: Path, tasks: Sequence[Task], in_part: Callable[[str], bool], console: Console
) -> list[Outcome]:
    """Check every video that has metadata, and that each of ``tasks`` has one; no request."""
    if not tasks and not os.path.lexists(directory):
        raise JobError(f"the output directory {printable(directory)} is not there")
    shelf = Shelf.scan(directory)
    videos = {name for name in shelf.names if name.endswith(".mp4") and name[0] != "."}
    outcomes = []
    for number, name in enumerate(shelf.names):
        video, metadata = directory / f"{name.removesuffix('.json')}.mp4", {}
        if name.endswith(".json") and name[0] != ".":
            metadata = read_metadata(directory / name)
        if as_object(metadata.get("runway_task_json")):
            videos.discard(video.name)
            if in_part(safe_stub(text_of(metadata, "target_filename_stub")) or video.stem):
                console.show_progress([f"🔎 {number}/{len(shelf.names)}"])
                outcomes.append(check_video(video, metadata))
    for plan in plan_all(tasks, shelf, {}):
        is_there = plan.action in (Action.ASK, Action.ADOPT)  # named below
        if plan.task.key not in shelf.homes and not is_there:
            fault = TaskError("has not been downloaded", "run again without --verify")
            outcomes.append(outcome_of(plan, directory, Status.FAILED, fault=fault))
    if videos:
        console.say("", f"ℹ️ Without metadata, so not checked: {counted(len(videos))}")
        bare = [f"    {printable(name)}" for name in sorted(videos)]
        console.say(*shortened(bare, NAMES_SHOWN))
    bad = count_outcomes(outcomes)["failed_downloads"]
    console.say("", f"🔎 Verified: {len(outcomes) - bad:,} whole, {bad:,} with a problem")
    console.complain(*failure_lines(outcomes))
    return outcomes


def check_video(video: Path, metadata: Mapping[str, Any]) -> Outcome:
    """Hold ``video`` against its ``metadata``."""
    task_id, _ = metadata_task(metadata)
    info, size_bytes = as_object(metadata.get("file_info")), file_bytes(video)
    reason, detail, hint = "", "", "if you edited it, leave it; else delete it and run again"
    wanted = info.get("size_bytes", size_bytes)
    try:
        if size_bytes is None:
            reason = "is no file" if os.path.lexists(video) else "is missing"
            raise TaskError(reason, "run again without --verify")
        with disk_errors("read it"), open(video, "rb") as file:
            if size_bytes != wanted:
                reason = "has another size than what was downloaded"
                said = f"{wanted:,}" if isinstance(wanted, int) else printable(wanted)
                detail = f"{size_bytes:,} bytes, {said} were downloaded"
            elif info.get("sha256") and size_bytes:
                is_same = file_info(file)["sha256"] == info["sha256"]
                reason = "" if is_same else "has another SHA-256 than what was downloaded"
            elif (content := inspect(file, size_bytes)) is not Content.WHOLE:
                reason = f"is {content.value}"
        if reason:
            raise TaskError(reason, hint, detail)
    except TaskError as fault:
        return Outcome(task_id, Status.FAILED, str(video), fault=fault)
    return Outcome(task_id, Status.EXISTS, str(video), size_bytes)


# --- The gallery: one page that shows the videos ----------------------------------------------

# A browser takes a second for 300 players, so one is made when its card comes near the view, from
# what is for browsers without scripts, and let go far from it.
GALLERY_JS = r"""const cards = [...document.querySelectorAll("article")];
const watcher = new IntersectionObserver(seen => seen.forEach(({target, isIntersecting: near}) => {
  const [raw, old] = target.firstElementChild.children;
  if (near && !old) raw.insertAdjacentHTML("afterend", raw.textContent.replace("none", "metadata"));
  if (!near && old?.paused) { old.src = ""; old.remove(); }
}), {rootMargin: "50%"});
cards.forEach(card => watcher.observe(card));
const texts = cards.map(card => [...card.querySelectorAll("h2, p, dd")]
  .map(part => part.textContent).join("\n").toLowerCase());
search.oninput = () => {
  const words = search.value.toLowerCase().split(/\s+/);
  cards.forEach((card, i) => { card.hidden = !words.every(word => texts[i].includes(word)); });
  count.value = `${cards.filter(card => !card.hidden).length} of ${cards.length} videos`;
};"""

GALLERY_PAGE = string.Template("""<!DOCTYPE html>
<html lang=en><meta charset=utf-8><title>Videos</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<meta name="generator" content="download_succeeded_videos"><link rel="icon" href="data:,">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; media-src 'self' file:;
 style-src 'unsafe-inline'; script-src 'sha256-$hash'; base-uri 'none'; form-action 'none'">
<style>@media (scripting: none) { input { display: none; } }
* { margin: 0; }
body { font: 15px/1.5 system-ui, sans-serif; background: light-dark(#eff1f4, #111317); }
header, main { display: grid; gap: 1.2rem; padding: 1rem 1.2rem; }
header { grid-template-columns: auto minmax(0, 30rem); justify-content: space-between; }
header { position: sticky; top: 0; z-index: 1; align-items: center; background: inherit; }
input { font: inherit; padding: .4rem 1rem; border: 1px solid gray; border-radius: 2rem; }
main { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
main:not(:has(article:not([hidden])))::after { content: "No videos here."; }
article { content-visibility: auto; contain-intrinsic-size: auto 25rem; border-radius: 1rem;
  background: light-dark(#fff, #1d2026); overflow-wrap: anywhere; }
h2, p, details, dl { margin: .7rem 1rem; font-size: 1em; }
figure, video { display: block; width: 100%; aspect-ratio: 16 / 9; background: #000; }
p, dd { white-space: pre-wrap; max-height: 25rem; overflow: auto; }
a { color: inherit; text-decoration: none; }
article:has(details:not([open])) p { max-height: 4.5em; overflow: hidden; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem 1rem; font-size: .85em; }
dt, summary, ::placeholder { color: inherit; opacity: .7; }
</style>
<header><output id="count" aria-live="polite">$n of $n videos</output>
<input id="search" type="search" aria-label="Search" placeholder="Search" autocomplete="off">
</header><main>$cards</main><script>$js</script>""")


def gallery_card(video: Path, metadata: Mapping[str, Any]) -> str:
    """The HTML of one video, whatever its ``metadata`` holds; never its link."""
    row = {**metadata, **as_object(metadata.get("runway_task_json"))}
    texts = {key: html.escape(str(row[key])) for key in row if isinstance(row[key], str | int)}
    prompt, date = (texts.get(key, "") for key in ("prompt", "download_timestamp"))
    texts |= {"size": megabytes(file_bytes(video) or 0), "date": date[:16].replace("T", " ")}
    labels = {"theme": "Theme", "seed": "Seed", "size": "Size", "date": "Date", "task_id": "Task"}
    facts = [f"<dt>{labels[key]}<dd>{texts[key]}" for key in labels if texts.get(key)]
    more = "<details><summary>Whole prompt</summary></details>" if len(prompt) > 160 else ""
    name, link = html.escape(video.name), quote(os.fsencode(video.name))
    return (
        '<article><figure><noscript><video controls loop playsinline preload="none"'
        f' aria-label="{name}" src="./{link}#t=0.001"></video></noscript></figure>'
        f'<h2 dir="auto"><a href="./{link}">{name}</a></h2><p dir="auto">{prompt}</p>{more}'
        f"<dl>{''.join(facts)}</dl></article>\n"
    )


def write_gallery(directory: Path, console: Console) -> None:
    """Write the page that shows every video with metadata, newest first.

    Leaves a page alone that is not this script's, and says so; raises `JobError`.
    """
    page, mark = directory / GALLERY_NAME, b'content="download_succeeded_videos"'
    found = [(directory / f"{stub}.mp4", read_metadata(directory / f"{stub}.json"))
             for stub in Shelf.scan(directory).homes.values()]  # fmt: skip
    found = [each for each in found if file_bytes(each[0])]
    found.sort(key=lambda each: text_of(each[1], "download_timestamp"), reverse=True)
    cards = [gallery_card(video, metadata) for video, metadata in found]
    script = base64.b64encode(hashlib.sha256(GALLERY_JS.encode()).digest()).decode()
    text = GALLERY_PAGE.substitute(cards="".join(cards), n=len(cards), hash=script, js=GALLERY_JS)
    try:
        if os.path.lexists(page) and mark not in page.read_bytes()[:READ_BYTES]:
            console.complain("", f"⚠️ {printable(page)} is not this script's: left alone")
            return
        with disk_errors("write the gallery"):
            write_whole(page, text.encode(errors="replace"), GALLERY_NAME, replaces=True)
    except (OSError, TaskError) as error:
        raise JobError(f"the gallery {printable(page)} cannot be written: {error}") from None
    console.say("", f"🖼️ Gallery: {printable(page)} ({counted(len(cards))})")


# --- The command line -------------------------------------------------------------------------


def bounded(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """An argparse type: a ``kind`` from ``low`` to ``high``."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low:g} to {high:g}")

    return parse


def parse_shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with K from 1 to N, such as 2/4")
    return int(match[1]), int(match[2])


def parse_command(text: str) -> tuple[str, ...]:
    """The words of a command that is there, with no other ``{word}`` than is filled in."""
    try:
        words = shlex.split(text.replace("\\", "\\\\") if os.name == "nt" else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    if not words or not shutil.which(words[0]):
        raise argparse.ArgumentTypeError(f"{text!r}: there is no such command")
    if unknown := set(re.findall(r"\{\w+\}", text)) - {"{video}", "{metadata}"}:
        raise argparse.ArgumentTypeError(f"{min(unknown)} is not {{video}} or {{metadata}}")
    return tuple(words)


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    on: dict[str, Any] = {"action": "store_true"}
    add("files", nargs="*", type=Path, metavar="FILE",
        help=f"results files (default: the latest {RESULTS_PREFIX}*.json)")  # fmt: skip
    add("--polling-results-file", type=Path, metavar="FILE", help="the same, for one file")
    add("--all", **on, help="read every results file, latest first")
    add("--output-dir", type=Path, metavar="DIR", default=Path(DEFAULT_OUTPUT_DIR),
        help="where the videos go (default: %(default)s; created)")  # fmt: skip
    add("--workers", type=bounded(int, 1, MAX_WORKERS), metavar="N", default=DEFAULT_WORKERS,
        help=f"videos at a time, 1 to {MAX_WORKERS} (default: %(default)s)")  # fmt: skip
    add("--timeout", type=bounded(float, 0.001, 86400), metavar="SECONDS",
        default=DEFAULT_TIMEOUT_S,
        help="for connecting and for each wait for data (default: %(default)g)")  # fmt: skip
    add("--retries", type=bounded(int, 0, 1000), metavar="N", default=DEFAULT_RETRIES,
        help="more tries after one that brought nothing new (default: %(default)s)")  # fmt: skip
    add("--shard", type=parse_shard, metavar="K/N", default=(1, 1),
        help="only the K-th of N equal parts, for machines that share no directory")  # fmt: skip
    add("--exec", type=parse_command, metavar="CMD", default=(), dest="command",
        help='hand each new video over to "CMD {video} {metadata}", without a shell')  # fmt: skip
    add("--gallery", **on, help=f"write DIR/{GALLERY_NAME}, a page that shows the videos")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", **on, help="only list what would be downloaded")
    mode.add_argument("--verify", **on, help="only check the videos against their metadata")
    add("-q", "--quiet", **on, help="print what is wrong, and nothing else")
    add("--json", **on, help="one JSON object on stdout, all else on stderr")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; what cannot be is refused with what could (exit 2)."""
    parser = build_parser()
    options, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        known = re.findall(r"--[a-z-]+", parser.format_usage())
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        parser.error(f"unknown option {unknown[0]}" + (f": is {near[0]} meant?" if near else ""))
    if bool(options.files) + bool(options.polling_results_file) + options.all > 1:
        parser.error("FILE, --polling-results-file and --all: one way of the three")
    if options.polling_results_file:
        options.files = [options.polling_results_file]
    return options


def choose_results_files(options: argparse.Namespace, console: Console) -> list[Path]:
    """The results files the command line asks for; raises `JobError` when there are none."""
    if options.files or (options.verify and not options.all):
        return latest_first(options.files)
    places = (".", DEFAULT_OUTPUT_DIR, options.output_dir)
    files = find_results_files(places)
    if not files:
        searched = ", ".join(dict.fromkeys(printable(Path(place).resolve()) for place in places))
        hint = "run the polling step first, or name a results file"
        raise JobError(f"No polling results found in {searched} — {hint}")
    if options.all:
        console.say(f"🔍 Found {len(files):,} polling results files")
        return files
    console.say(f"📁 Using latest results file: {printable(files[0].name)}")
    return files[:1]


def do(options: argparse.Namespace, console: Console, outcomes: list[Outcome]) -> str:
    """Do what the command line says, and add the ``outcomes``; what was wrong with its input.

    Raises `JobError` and `Stopped`.
    """
    paths = choose_results_files(options, console)
    tasks, errors = read_tasks(paths, console)
    unread = "; ".join(shortened(errors, LISTED, "and {} more results files"))
    if errors and len(errors) == len(paths):
        raise JobError(unread)
    number, parts = options.shard
    tasks = [task for task in tasks if in_shard(task.stub, number, parts)]
    if parts > 1:
        console.say(f"  🧩 Shard {number}/{parts}: {counted(len(tasks))}")
    if options.verify:
        in_part = functools.partial(in_shard, number=number, parts=parts)
        outcomes += verify(options.output_dir, tasks, in_part, console)
    elif options.dry_run:
        outcomes += dry_run(tasks, options.output_dir, console)
    else:
        names = ("workers", "timeout", "retries", "command")
        settings = {name: getattr(options, name) for name in names}
        downloader = VideoDownloader(options.output_dir, console=console, **settings)
        downloader.outcomes = outcomes
        try:
            downloader.run(tasks)
            if options.gallery:
                write_gallery(options.output_dir, console)
        finally:
            downloader.print_final_stats()
    return unread


def raise_stopped(number: int, _frame: FrameType | None) -> NoReturn:
    """Handle Ctrl-C and SIGTERM, once: since a kill at any instant is harmless, by raising."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # `timeout` and CI runners send two
    raise Stopped(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; the exit code, as ``--help`` lists them."""
    options = parse_arguments(argv)
    console = Console(options.quiet, options.json)
    outcomes: list[Outcome] = []
    try:
        error = do(options, console, outcomes)
        failed = error or any(outcome.fault for outcome in outcomes)
        exit_code = EXIT_INCOMPLETE if failed else 0
    except JobError as job_error:
        exit_code, error = EXIT_CANNOT, str(job_error)
    except Stopped as stopped:
        exit_code, error = 128 + stopped.number, str(stopped)
    if error:
        console.complain("", f"❌ {error}")
    if options.json:
        videos = [outcome.as_json() for outcome in outcomes]
        report: dict[str, Any] = {"stats": count_outcomes(outcomes), "videos": videos}
        report |= {"exit_code": exit_code, "error": error or None}
        if not console.write(sys.stdout, json.dumps(report, indent=2) + "\n"):
            console.complain("❌ the JSON could not be written")
            return EXIT_CANNOT
    return exit_code


def leave(exit_code: int) -> NoReturn:
    """Exit at once: worker threads may still wait for a server."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):  # its reader has gone
            stream.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, raise_stopped)
    leave(main())
