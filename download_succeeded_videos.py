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
# Pure functions over small frozen records decide. `Index` reads the directory, `PartFile` and
# `put_metadata` write to it, `Session` asks servers, `Console` prints; `Download` does one
# task from start to end in a worker thread, and a `WorkerPool` of them works in parallel.

from __future__ import annotations

import os
import signal
import sys

if sys.version_info < (3, 10):  # noqa: UP036 - 3.8 can read this far
    sys.exit(f"Python 3.10 or later is needed, this is {sys.version.split()[0]}")

if __name__ == "__main__":  # until `stop` takes over: the imports take a while
    both = (signal.SIGINT, signal.SIGTERM)
    SIGNALS = [each for each in both if signal.getsignal(each) is not signal.SIG_IGN]  # nohup
    for number in SIGNALS:
        signal.signal(number, lambda number, _: os._exit(128 + number))

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
import random
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
import unicodedata
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from enum import Enum
from glob import glob
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, NoReturn
from urllib.parse import quote, urljoin, urlsplit

try:
    import requests
    import urllib3
    from requests.utils import DEFAULT_CA_BUNDLE_PATH, get_environ_proxies
    from urllib3.util.retry import Retry
    from urllib3.util.ssl_ import create_urllib3_context
except ImportError as missing:
    sys.exit(f"❌ the package {missing.name} is missing: pip install requests")

if sys.platform != "win32":
    import fcntl
    import termios

Object = Mapping[str, Any]  # of JSON

DEFAULT_OUTPUT_DIR = "video_outputs"
MAX_WORKERS = 64

BACKOFF_BASE_S = 0.5
RETRY_AFTER_CAP_S = 60.0
STILL_SERVING_S = 10.0
NEVER = -math.inf  # on the monotonic clock
STALL_BYTES_PER_SECOND = 1024
READ_BYTES = 512 * 1024
TLS_RECORD_BYTES = 16 * 1024 + 261  # RFC 8446, 5.2, with its head
BYTES_PER_MB = 1024 * 1024
NAME_MAX_BYTES = 255
NAME_TRIES = 10

TICK_S = 0.25
STOP_GRACE_S = 1.0
SILENCE_S = 30.0

EXISTING_SHOWN = 3
LISTED = 10
NAMES_SHOWN = 20

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
    """The same request may succeed later, after ``wait_s`` seconds if the server said so.

    ``served_at`` is when an overloaded server last served another, on the monotonic clock; of
    other faults, never.
    """

    def __init__(self, reason: str, wait_s: float | None = None, served_at: float = NEVER) -> None:
        super().__init__(reason, "run again to try once more")
        self.wait_s, self.served_at = wait_s, served_at


class LinkDead(TaskError):
    """There is no link that leads to the video, or the one there is was refused."""


NO_LINK = 'the row has no usable "video_url"'


@contextlib.contextmanager
def disk_errors(action: str) -> Iterator[None]:
    """Turn an OSError of the local disk into the failure of the run (full) or of the task."""
    try:
        yield
    except FileExistsError:
        raise  # somebody has taken a name, which is for the caller to settle
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise JobError(f"no space left, could not {action}: make room, run again") from None
        reason = f"could not {action}: {error.strerror or type(error).__name__}"
        raise TaskError(reason, "look at the output directory, then run again") from None


# --- Text for people: nothing of a link's query, no control characters ------------------------


def bare(text: object) -> str:
    """``text`` with no user, query and fragment in its links."""
    return re.sub(r"(?i)(https?:/+)(?:[^\s/?#]*@)?([^\s?#]*)\S*", r"\1\2", str(text))


def printable(text: object) -> str:
    """``text`` with all links bare, and ``?`` for what a terminal might obey instead of show."""
    text = bare(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def shown_id(task_id: str) -> str:
    return f"{printable(task_id[:8])}..." if task_id else "unknown"


def utc(unix_seconds: float) -> datetime:
    return datetime.fromtimestamp(unix_seconds, timezone.utc)


def megabytes(size_bytes: float) -> str:
    return f"{size_bytes / BYTES_PER_MB:.2f} MB"


def counted(count: int) -> str:
    return "1 video" if count == 1 else f"{count:,} videos"


def shortened(lines: Sequence[str], limit: int) -> list[str]:
    """At most ``limit`` of ``lines``; what is left out is counted."""
    left_out = len(lines) - limit
    return list(lines) if left_out <= 0 else [*lines[:limit], f"… and {left_out:,} more"]


# --- Results files: which ones, and what is in them -------------------------------------------


def find_results_files(directories: Iterable[str | Path]) -> list[Path]:
    """The polling-results files in ``directories``, each once, latest first."""
    pattern = f"{RESULTS_PREFIX}*.json"
    found = (Path(each, name) for each in directories for name in glob(pattern, root_dir=each))
    files = {os.path.realpath(path): path for path in found if os.path.isfile(path)}
    return sorted(files.values(), key=results_time, reverse=True)


def results_time(path: Path) -> tuple[float, str]:
    """Sorts results files: when they were saved, in Unix seconds, then by name.

    The time in the name counts, since a clone or copy makes all modification times equal;
    a name without one counts by its modification time.
    """
    for match in re.finditer(r"[0-9]{8}_[0-9]{6}", path.name):
        with contextlib.suppress(ValueError):
            return datetime.strptime(match[0], "%Y%m%d_%H%M%S").timestamp(), path.name
    return os.path.getmtime(path) if os.path.exists(path) else 0.0, path.name


def read_results(path: Path) -> dict[str, Any]:
    """The object in results file ``path``, with its ``task_results`` list.

    Raises `JobError` in one line for whatever can be wrong with it.
    """
    try:
        document = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:  # their texts tell line and column, or byte
        reason = f"cannot be read as JSON in UTF-8: {printable(error)}"
    else:
        if isinstance(document, dict) and isinstance(document.get("task_results"), list):
            return document
        looks = '{"task_results": [{"task_id": …, "final_status": "SUCCEEDED", "video_url": …}]}'
        reason = f"is not a polling-results file, which looks like {looks}"
    raise JobError(f"{printable(path)}: {reason} — name another, or run the polling step again")


# --- Tasks: one SUCCEEDED row each ------------------------------------------------------------

_MADE_FIELDS = ("task_id", "target_filename_stub", "image_path", "prompt")
TEXT_FIELDS = (*_MADE_FIELDS, "timestamp", "completion_time", "status")
EXTRA_FIELDS = ("cluster_id", "theme", "duration", "resolution")
_LINK = re.compile(  # [user@]host[:port], then path, query, fragment or nothing
    r"(?i)https?://([^/?#@ ]*@)?(\[[0-9a-f:.]+\]|[^/?#@:\[\]\\ ]+)(:[0-9]{1,5})?([/?#][^\\ ]*)?"
)


def usable_link(value: object) -> str:
    """``value`` as an http(s) link that can be asked for, or ``""``."""
    link = value.strip() if isinstance(value, str) else ""
    return link if _LINK.fullmatch(link) and link.isprintable() else ""


def link_expiry(link: str) -> float:
    """When ``link`` dies, in Unix seconds: ``exp`` of its ``_jwt`` (RFC 7519), unverified.

    Infinity when the link does not say, or talks nonsense.
    """
    tokens = re.findall(r"[?&]_jwt=[^.&#]*\.([^.&#]+)", link)
    try:
        expiry = float(json.loads(base64.urlsafe_b64decode(tokens[0] + "=="))["exp"])
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return math.inf
    return expiry if 0 < expiry < 253402300800 else math.inf  # the year 10000


@dataclass(frozen=True)
class Task:
    """A SUCCEEDED row, checked: ``stub`` is a safe name, ``link`` usable or empty.

    Two tasks with the same ``key`` are the same one.
    """

    task_id: str
    stub: str
    link: str = field(repr=False)
    key: str = field(repr=False)
    row: Object = field(repr=False)

    @functools.cached_property
    def suffix(self) -> str:
        """What tells its names from those of other tasks with its stub."""
        return "_" + (safe_stub(self.task_id[:8]) or digest(self.key)[:8])


def row_key(row: Object) -> str:
    """Equal for two rows of the same task: its id; without one the link, bare of its query."""
    if task_id := text_of(row, "task_id"):
        return f"id {task_id}"
    link = usable_link(row.get("video_url"))
    return f"link {printable(link)}" if link else ""


def read_rows(results: Object) -> tuple[list[Task], list[str], list[str]]:
    """The SUCCEEDED tasks of a results object, in order; a line on others; what is wrong."""
    tasks, wrong, others = list[Task](), list[str](), Counter[str]()
    rows = results.get("task_results")
    for number, row in enumerate(rows if isinstance(rows, list) else (), 1):
        status = as_object(row).get("final_status")
        if not isinstance(row, dict) or not isinstance(status, str | None):
            wrong.append(f"row {number}: no object with a text as final_status: passed over")
        elif status == "SUCCEEDED":
            tasks.append(task_from_row(row))
            odd = [key for key in TEXT_FIELDS if not isinstance(row.get(key), str | None)]
            wrong += [f'row {number}: "{key}" is not text: not used' for key in odd]
        else:
            others[printable(status[:20]) if status else "still running"] += 1
    counts = ", ".join(f"{count:,} {status}" for status, count in others.items())
    return tasks, [f"  ℹ️ Not downloaded: {counts}"] if counts else [], wrong


def task_from_row(row: Object) -> Task:
    """The task of SUCCEEDED ``row``; a text field of another type counts as missing."""
    task_id, link = text_of(row, "task_id"), usable_link(row.get("video_url"))
    default = f"video_{task_id[:8] or 'unknown'}"
    stub = safe_stub(text_of(row, "target_filename_stub")) or safe_stub(default)
    return Task(task_id, stub, link, row_key(row), row)


def as_object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def text_of(row: Object, key: str) -> str:
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
    name = re.sub(r"\A\.+", lambda dots: "_" * len(dots[0]), name)
    return fit(f"_{name}" if _RESERVED.match(name) or name.startswith(RESULTS_PREFIX) else name)


def fit(stub: str, suffix: str = "") -> str:
    """``stub + suffix``, the stub cut so that ``.json`` and ``.mp4`` fit a file name."""
    room = NAME_MAX_BYTES - len(suffix.encode()) - len(".json")
    return stub.encode()[:room].decode(errors="ignore") + suffix


def stubs_with_id(task: Task) -> Iterator[str]:
    """The names for when its stub is somebody else's: with its id, then with a number, too."""
    for number in itertools.count(1):
        yield fit(task.stub, task.suffix + (f"_{number}" if number > 1 else ""))


def fold(name: str) -> str:
    """The same for two names that some file system takes for one: case and Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


# --- What a file is, by its bytes (ISO/IEC 14496-12) ------------------------------------------


class Content(Enum):
    """What a file turns out to be; the value reads on after "it is"."""

    WHOLE = "a whole MP4"
    SURPLUS = "an MP4 with something else behind it"
    OTHER = "no MP4, but some other kind of file"
    CUT = "an MP4 cut short"
    ZEROS = "empty, or nothing but zero bytes"
    TEXT = "text, not a video"


KEPT = {Content.WHOLE, Content.SURPLUS, Content.OTHER}  # what came whole, since its link dies

_BOXES = b"ftyp styp moov moof mdat free skip wide pnot meta uuid sidx mfra pdin udta emsg".split()
_TEXT = re.compile(rb"\xff\xfe|\xfe\xff|[^\x00-\x08\x0e-\x1a\x1c-\x1f]*\Z")  # or UTF-16


def inspect(file: BinaryIO, size_bytes: int) -> Content:
    """Look at the first bytes of ``file``, and at the heads of its boxes if it starts like one."""
    file.seek(0)
    start = file.read(READ_BYTES)
    if start[4:8] in _BOXES:
        return walk_boxes(file, size_bytes)
    blocks = itertools.chain([start], iter(functools.partial(file.read, READ_BYTES), b""))
    if not any(block.strip(b"\0") for block in blocks):
        return Content.ZEROS
    if len(start) < 8:  # no head of a box, or of any other container
        return Content.CUT if start[:3] == b"\0\0\0" else Content.TEXT
    return Content.TEXT if _TEXT.match(start) else Content.OTHER


def walk_boxes(file: BinaryIO, size_bytes: int) -> Content:
    """Section 4.2: size and type; size 1: 64 bits follow; size 0: the box goes on to the end.

    An unknown type with a length that does not fit is no box: it counts as surplus.
    """
    offset = 0
    while offset < size_bytes:
        file.seek(offset)
        head = file.read(16).ljust(16, b"\xff")  # what is missing makes it longer than the file
        kind, length = head[4:8], int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        if length == 0 and kind in _BOXES:
            return Content.WHOLE
        if length < 8 or offset + length > size_bytes:
            return Content.CUT if kind in _BOXES else Content.SURPLUS
        offset += length
    return Content.WHOLE


def hash_file(file: BinaryIO) -> hashlib._Hash:
    """The SHA-256 of all of ``file``, read in constant memory."""
    sha256 = hashlib.sha256()
    file.seek(0)
    while block := file.read(READ_BYTES):
        sha256.update(block)
    return sha256


def file_info(file: BinaryIO, sha256: hashlib._Hash | None = None) -> dict[str, Any]:
    """What the metadata says of the video's ``file``, whose hash may be known already."""
    size, digits = os.fstat(file.fileno()).st_size, (sha256 or hash_file(file)).hexdigest()
    return {"size_bytes": size, "size_mb": round(size / BYTES_PER_MB, 2), "sha256": digits}


# --- Metadata: <stub>.json --------------------------------------------------------------------


def build_metadata(task: Task, video_name: str, info: Object, now: datetime) -> dict[str, Any]:
    """What ``<stub>.json`` holds; ``now`` in naive local time, as the poller writes it."""
    row = task.row
    texts = {key: text_of(row, key) for key in (*TEXT_FIELDS, "final_status", "video_url")}
    told = {key: texts[key] for key in ("task_id", "final_status", "completion_time", "video_url")}
    told |= {"original_status": texts["status"], "timestamp": texts["timestamp"]}
    told |= {key: row[key] for key in EXTRA_FIELDS if key in row and is_json(row[key])}
    return {
        "video_file": video_name,
        "download_timestamp": now.isoformat(timespec="microseconds"),
        "input_path": texts["image_path"],
        "prompt": texts["prompt"],
        "seed": row.get("seed") if is_json(row.get("seed")) else None,
        "runway_task_json": told,
        "target_filename_stub": texts["target_filename_stub"],
        "file_info": info,
    }


def is_json(value: object) -> bool:
    """Whether JSON can hold ``value``: no NaN, no endless nesting, nothing foreign."""
    try:
        json.dumps(value, allow_nan=False, indent=2)
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def encode_metadata(metadata: Object) -> bytes:
    """``metadata`` as JSON in UTF-8, readable as it is; only lone surrogates are escaped."""
    text = json.dumps(metadata, indent=2, ensure_ascii=False)
    return re.sub(r"[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text).encode()


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The object in ``path``; empty for what cannot be read or is not ours to understand."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if os.path.isfile(path):  # a pipe would keep us waiting
            with open(path, "rb", buffering=0) as file:
                return as_object(json.loads(file.read()))
    return {}


def owner_key(metadata: Object) -> str:
    """The key of the task that ``metadata`` is about, ``""`` if it names none."""
    return row_key(as_object(metadata.get("runway_task_json")))


def put_metadata(path: Path, task: Task, name: str, info: Object, is_due: bool = False) -> bool:
    """Have ``path`` describe the video ``name``; whether it was not there before.

    What is there and the task's is left as it is, but for what has changed. Raises
    FileExistsError for a file that is another task's or another program's.
    """
    there = read_metadata(path)
    is_ours = owner_key(there) == task.key != ""
    metadata = there if is_ours else build_metadata(task, name, info, datetime.now())
    changed = {"file_info": {**as_object(metadata.get("file_info")), **info}}
    metadata = metadata | changed | ({"handed_over": False} if is_due else {})
    if metadata == there:
        return False
    write_whole(path, encode_metadata(metadata), task.key, replaces=is_ours)
    return not is_ours


def write_whole(path: Path, data: bytes, key: str, replaces: bool) -> None:
    """Write ``data`` to ``path``, whole or not at all: synced under the hidden name of ``key``.

    Raises FileExistsError unless it ``replaces`` what is there.
    """
    # a name of its own, as there may be no locks
    temporary = hidden_path(path.parent, key).with_suffix(f".{random.getrandbits(32):08x}.tmp")
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

    As a second link, unless it ``replaces`` what is there or the file system has none: then it
    is renamed, over an empty file that holds the name for a moment.
    """
    if not replaces:
        try:
            return os.link(hidden, final)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOENT):
                raise
            os.close(os.open(final, os.O_CREAT | os.O_EXCL))
    return os.replace(hidden, final)


def hidden_path(directory: Path, key: str) -> Path:
    """The part file of the task ``key``; what else belongs to it differs in the suffix."""
    return directory / f".dsv-{digest(key)[:16]}.part"


def remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def sync(path: Path) -> None:
    """Have a file or directory reach the disk; its own descriptor leaves errors to the writer's."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        descriptor = os.open(path, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        os.fsync(descriptor)


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
    """What to do for ``task``, whose video is to have the name ``path``.

    ``size_bytes`` is of the file that is there, ``holder`` says why it is not the wanted name.
    """

    task: Task
    path: Path
    action: Action
    size_bytes: int = 0
    holder: str = ""


@dataclass(frozen=True)
class Index:
    """The output directory as one scan saw it, and a look at single names as they are now.

    ``spellings`` are the names by what they fold to, ``homes`` the stubs of metadata by the key of
    the task that they name. ``promised`` are the folded stubs of videos that are on their way, with
    the key of their task.
    """

    directory: Path
    names: Sequence[str] = ()
    spellings: Mapping[str, str] = field(default_factory=dict)
    homes: dict[str, str] = field(default_factory=dict)
    promised: dict[str, str] = field(default_factory=dict)

    @classmethod
    def scan(cls, directory: Path) -> Index:
        """Read all metadata once; raises `JobError` for a directory that cannot be listed."""
        try:
            names = sorted(os.listdir(directory))
        except FileNotFoundError:
            return cls(directory)
        except OSError as error:
            raise directory_error(directory, error) from None
        index = cls(directory, names, {fold(name): name for name in names})
        for stub, metadata in index.described():
            if key := owner_key(metadata):
                first = index.homes.setdefault(key, stub)
                if first != stub and not file_bytes(directory / f"{first}.mp4"):
                    index.homes[key] = stub
        return index

    def described(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The stub and the metadata of each video that has some, be the video there or not."""
        for name in self.names:
            if name.endswith(".json") and not name.startswith((".", RESULTS_PREFIX)):
                metadata = read_metadata(f"{self.directory}{os.sep}{name}")
                if as_object(metadata.get("runway_task_json")):
                    yield name.removesuffix(".json"), metadata

    def look(self, task: Task, stub: str) -> Plan:
        """What can be done for ``task`` under the name ``stub`` as things are now."""
        path, metadata = self.directory / f"{stub}.mp4", self.directory / f"{stub}.json"
        leave = functools.partial(Plan, task, path, Action.LEAVE, 0)
        size, owner = file_bytes(path), owner_key(read_metadata(metadata))
        if size is None and os.path.lexists(path):
            return leave(f"{path.name} is no file")
        if owner == task.key != "":
            return Plan(task, path, Action.KEEP if size else Action.REFILL, size or 0)
        for name in (metadata.name, path.name):
            if (other := self.spellings.get(fold(name), name)) != name:
                return leave(f"{other} differs in case or Unicode form alone")
        if owner:
            return leave(f"{(metadata if size is None else path).name} is another task's")
        if os.path.lexists(metadata):
            return leave(f"{metadata.name} is another program's file, or cannot be read")
        if size is not None:
            try:
                with open(path, "rb") as file:
                    if inspect(file, size) in KEPT:
                        return Plan(task, path, Action.ASK, size, f"{path.name} is another video")
            except OSError as error:
                return leave(f"{path.name} cannot be read: {error.strerror}")
        if self.promised.get(fold(stub), task.key) != task.key:
            return leave(f"{path.name} is another task's")
        return Plan(task, path, Action.DOWNLOAD, size or 0)


def file_bytes(path: str | Path) -> int | None:
    """The size of the file ``path``; ``None`` when it is not there or no regular file."""
    with contextlib.suppress(OSError, ValueError):
        return os.stat(path).st_size if os.path.isfile(path) else None
    return None


def directory_error(directory: Path, error: OSError | ValueError) -> JobError:
    reason = str(getattr(error, "strerror", None) or error).lower()
    what = f"the output directory {printable(directory)} cannot be used: {reason}"
    return JobError(f"{what} — mend that, or choose another with --output-dir")


def plan_task(task: Task, index: Index, in_hand: bool = False) -> Plan:
    """Find ``task`` in the directory as it is now, or the place it is to have.

    With the whole video ``in_hand``, another one without metadata is nothing to ask about; nor is
    it for a task without a key, which cannot be known again. The task's own video wins, then a
    place its metadata already holds, then a video under a name with its id, then the best free
    name.
    """
    home = index.homes.get(task.key, task.stub)
    first_free, holder = None, ""
    for stub in itertools.chain(dict.fromkeys((home, task.stub)), stubs_with_id(task)):
        # stub_<id>, stub_<id>_2 or video_<id>, but not a longer id that begins alike
        plan, is_by_id = index.look(task, stub), f"{task.suffix}_" in f"{stub}_"
        if plan.action is Action.ASK and (in_hand or not task.key):
            plan = replace(plan, action=Action.LEAVE)
        elif plan.action is Action.ASK and is_by_id:
            plan = replace(plan, action=Action.ADOPT)
        if plan.action in (Action.KEEP, Action.REFILL, Action.ADOPT):
            return plan
        if plan.action is Action.LEAVE:
            holder = holder or plan.holder
        elif first_free is None:
            first_free = replace(plan, holder=holder)
        # its video may stand under a name with its id: once such a name is free, it is nowhere
        if first_free and is_by_id and plan.action is Action.DOWNLOAD and plan.size_bytes == 0:
            return first_free
    raise AssertionError("the numbers never run out")


def plan_all(tasks: Iterable[Task], index: Index) -> list[Plan]:
    """Plan ``tasks`` in order, so that a rerun gives each the same name, which it is promised."""
    plans = []
    for task in tasks:
        home = index.directory / f"{index.homes.get(task.key)}.mp4"
        if task.key in index.homes and (size := file_bytes(home)):
            plans.append(Plan(task, home, Action.KEEP, size))
        else:
            plans.append(plan_task(task, index))
            index.promised[fold(plans[-1].path.stem)] = task.key
    return plans


# --- Part files: hidden, locked, growing as bytes arrive --------------------------------------

_PART_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)

NOTE = "user.download_succeeded_videos"

CHANGED_MEANWHILE = "somebody changed the hidden file, or took the name, meanwhile"

Source = tuple[int, str]  # the object a part is the beginning of: its bytes in all, its validator


class PartFile:
    """One task's hidden file, which this run alone holds; it is written at its end alone.

    `claim` it, `restart` it for another object, `write`, and `release` it, which keeps what a
    later run can resume. What it is the beginning of is noted in an extended attribute: a second
    file for each part would make a run a tenth slower. Only Linux has those, and not on every
    file system: elsewhere a later run starts anew.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115 - `release` closes it
        self.size_bytes, self.sha256 = os.fstat(descriptor).st_size, hash_file(self.file)
        self.source: Source | None = None
        with contextlib.suppress(OSError, AttributeError, ValueError):
            total, _, validator = os.getxattr(descriptor, NOTE).decode("latin-1").partition(" ")
            self.source = int(total) or -1, validator
        if self.size_bytes and not self.share:
            self.restart()

    @classmethod
    @disk_errors("write to the output directory")
    def claim(cls, path: Path) -> PartFile:
        """Open and lock the part file ``path``; raises `InOtherHands` when somebody has it.

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
            if locked is False:  # somebody works on it
                raise InOtherHands
            if not (locked and is_usable):  # published, another user's, or there are no locks
                remove(path)
        own = path.with_name(f"{path.stem}-{os.getpid()}-{random.getrandbits(32):08x}.part")
        descriptor = os.open(own, _PART_FLAGS | os.O_EXCL, 0o666)
        try_lock(descriptor)
        return cls(own, descriptor)

    def is_at(self, path: Path) -> bool:
        return is_same_file(self.file.fileno(), path)

    def is_intact(self) -> bool:
        """Whether its name is of the file written, with what was written."""
        return os.fstat(self.file.fileno()).st_size == self.size_bytes and self.is_at(self.path)

    @property
    def share(self) -> float:
        """How much of the object is here, up to 1; 0 for what cannot be resumed."""
        share = self.size_bytes / self.source[0] if self.source else 0.0
        return share if 0 < share <= 1 else 0.0

    def restart(self, source: Source | None = None) -> None:
        """Forget all bytes; those to come are of ``source``, or cannot be resumed."""
        with disk_errors("write the part file"):
            self.file.truncate(0)
        with contextlib.suppress(OSError, AttributeError):
            for note in ((), source or ()):  # the first has room whatever was noted before
                os.setxattr(self.file.fileno(), NOTE, " ".join(map(str, note)).encode("latin-1"))
        self.source, self.size_bytes, self.sha256 = source, 0, hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Add ``data``; a sync in the background after each 64 MB saves a fifth with 1 GB."""
        rest = memoryview(data)
        with disk_errors("write the video"):
            while rest:  # a nearly full disk takes a part of it and says nothing
                rest = rest[self.file.write(rest) or 0 :]
        self.size_bytes += len(data)
        self.sha256.update(data)
        if self.size_bytes % (64 * BYTES_PER_MB) < len(data):
            with contextlib.suppress(RuntimeError):  # the system gives no more threads
                threading.Thread(target=sync, args=(self.path,), daemon=True).start()

    def release(self, keep: bool = True) -> None:
        """Let others have it; nothing is kept but what can be resumed."""
        if self.file.closed:
            return
        if self.is_at(self.path) and not (keep and self.is_intact() and self.share):
            if os.name == "nt":  # where no open file can be removed
                self.file.close()
            remove(self.path)
        self.file.close()


def open_part(path: Path) -> tuple[int, bool]:
    """Open a part file, made if need be; -1 if it cannot be. Whether it may be written.

    It may not where it is another user's, or published: then it has another name as well.
    """
    if path.is_symlink():  # whatever it leads to is not ours to write
        return -1, False
    for flags in (_PART_FLAGS, os.O_RDONLY):
        with contextlib.suppress(PermissionError, FileNotFoundError, IsADirectoryError):
            descriptor = os.open(path, flags, 0o666)
            return descriptor, flags == _PART_FLAGS and os.fstat(descriptor).st_nlink == 1
    return -1, False


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file against other runs and threads; ``None`` where there are no locks.

    The kernel's locks end with the process, so a killed run leaves none.
    """
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (OSError, ValueError):  # ValueError: there is no file
        return None
    return True


def is_same_file(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False


def sweep(directory: Path, tasks: Iterable[Task]) -> None:
    """Remove what is left of the hidden files of ``tasks``, but what somebody has in hand."""
    hidden = glob(".dsv-*", root_dir=directory)
    own = tuple(hidden_path(directory, task.key).stem for task in tasks) if hidden else ()
    for name in filter(lambda name: name.startswith(own), hidden):
        guard = name if name.endswith(".part") else f"{name[:21]}.part"  # its task's part
        with contextlib.suppress(OSError, DownloaderError):
            part = PartFile.claim(directory / guard)
            remove(directory / name)
            part.release(keep=False)


# --- What an answer's head says (RFC 9110) ----------------------------------------------------


def content_range(headers: Mapping[str, str]) -> tuple[int, int]:
    """First byte and total of ``Content-Range`` (section 14.4); -1 for nonsense."""
    value = (headers.get("Content-Range") or "").strip()
    match = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", value)
    is_good = match and int(match[1]) <= int(match[2]) == int(match[3]) - 1
    return (int(match[1]), int(match[3])) if match and is_good else (-1, -1)


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
    validator = (headers.get("ETag") or headers.get("Last-Modified") or "").strip()
    is_strong = 0 < len(validator) < 256 and not validator.startswith("W/")  # 13.1.5
    return start, total, (total, validator) if is_strong and total > 0 else None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait (section 10.2.3), said as a number or a date; ``None`` for nonsense."""
    with contextlib.suppress(urllib3.exceptions.HTTPError, ValueError, OverflowError):
        return float(Retry().parse_retry_after(headers.get("Retry-After") or ""))
    return None


RETRIED_STATUSES = {408, 425, *range(500, 1000)}  # RFC 9110, 15.5.9 and 15.6; RFC 8470, 5.2


def check_status(status: int, headers: Mapping[str, str]) -> None:
    """Raise what a status other than 200 and 206 means: transient, dead or final."""
    if status in RETRIED_STATUSES:
        raise TransientError(f"the server answered HTTP {status}", retry_after_s(headers))
    if status in (401, 403, 404, 410):
        raise LinkDead("the link was refused", "run again later", f"HTTP {status}")
    if status not in (200, 206):
        raise TaskError(f"the server answered HTTP {status}", "run the polling step again")
    # http.client takes chunks for the body where this is spelled in another way
    if headers.get("Transfer-Encoding", "chunked").lower() != "chunked":
        raise TransientError("the answer has an unknown Transfer-Encoding")


# --- Asking servers: one TLS context, a pace for all, and an eye on the rate ------------------


class SharedContextAdapter(requests.adapters.HTTPAdapter):
    """Gives all connections one TLS context: left alone, requests loads the CA bundle for each.

    That is 20 ms of CPU a connection. Used without a `requests.Session`, which would send
    servers the passwords of .netrc.
    """

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        named = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
        bundle = named or DEFAULT_CA_BUNDLE_PATH
        self._context = create_urllib3_context()
        try:
            kind = "capath" if os.path.isdir(bundle) else "cafile"
            self._context.load_verify_locations(**{kind: bundle})
        except OSError as error:
            raise JobError(f"cannot load the CA bundle {printable(bundle)}: {error}") from None
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        return super().proxy_manager_for(proxy, ssl_context=self._context, **kwargs)

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Add nothing: the context holds the bundle and asks for a good certificate."""


class Pace:
    """When one server may be asked next: at once, until it answers 429 or 503.

    Then all wait, the longer the more often that happens, and ask one after the other; each
    good answer shortens the interval a little. No lock: a race costs a request too many.
    """

    def __init__(self) -> None:
        self._interval_s = 0.0
        self._next = self.served_at = self._slowed_at = NEVER

    def take_turn(self, now: float, jitter: float) -> float:
        """0 when it is this request's turn, else seconds until it is worth asking again."""
        if now < self._next:
            return self._next - now + self._interval_s * jitter
        self._next = now + self._interval_s
        return 0.0

    def served(self, now: float) -> None:
        self.served_at = now
        self._interval_s = 0.93 * self._interval_s if self._interval_s > 0.01 else 0.0

    def overloaded(self, now: float, asked: float, hold_s: float, is_sending: bool) -> None:
        """Hold all requests for ``hold_s``; if others are still served, also ask less often.

        That, once for all requests ``asked`` before. A server that ``is_sending`` a body serves.
        """
        self._next = max(self._next, now + hold_s)
        self.served_at = now if is_sending else self.served_at
        if now - self.served_at > STILL_SERVING_S:
            self._interval_s = 0.0
        elif asked >= self._slowed_at:
            self._interval_s = min(0.5, max(0.05, 2 * self._interval_s))
            self._slowed_at = now


@dataclass(frozen=True)
class Session:
    """What all downloads of a run share: the directory, and how to ask servers, until ``stop``.

    The live line looks at ``downloads``, all those begun.
    """

    index: Index
    adapter: SharedContextAdapter
    timeout_s: float
    retries: int
    command: Sequence[str]
    stop: threading.Event = field(default_factory=threading.Event)
    downloads: list[Download] = field(default_factory=list)
    reading: threading.Lock = field(default_factory=threading.Lock)
    _paces: dict[str, Pace] = field(default_factory=dict)

    def get(self, link: str, headers: Mapping[str, str], redirects: int) -> requests.Response:
        """The head of the answer, when it is this request's turn, after so many ``redirects``.

        They are followed here, as requests would read their bodies, however long. Raises
        `TransientError` for 429 and 503 (RFC 6585, 4; RFC 9110, 15.6.4), and what `explain` makes
        of other faults.
        """
        try:
            pace = self._paces.setdefault(urlsplit(link).netloc, Pace())
            proxies = get_environ_proxies(link, no_proxy=None)
            while (delay_s := pace.take_turn(time.monotonic(), random.random())) > 0:
                self.wait(delay_s)
            asked = time.monotonic()
            request = requests.Request("GET", link, headers).prepare()
            reply = self.adapter.send(request, stream=True, timeout=self.timeout_s, proxies=proxies)
            target = reply.headers["Location"].strip() if redirects and reply.is_redirect else ""
            moved_to = urljoin(link, target.encode("latin-1").decode())
        except NETWORK_ERRORS as error:
            raise explain(error, self.timeout_s) from None
        if not target and (status := reply.status_code) not in (429, 503):
            pace.served(time.monotonic())
            return reply
        reply.close()
        if target:
            return self.get(moved_to, headers, redirects - 1)
        wait_s = retry_after_s(reply.headers)
        hold_s = wait_s if wait_s and wait_s <= RETRY_AFTER_CAP_S else BACKOFF_BASE_S
        is_sending = any(each.received and not each.waiting for each in self.active)
        pace.overloaded(time.monotonic(), asked, hold_s, is_sending)
        raise TransientError(f"the server answered HTTP {status}", wait_s, pace.served_at)

    @property
    def active(self) -> list[Download]:
        return [each for each in self.downloads if not each.part.file.closed]

    def wait(self, seconds: float) -> None:
        if self.stop.is_set() or (seconds and self.stop.wait(seconds)):
            raise Cancelled

    def chunks(self, response: requests.Response) -> Iterator[bytes]:
        """The decoded body in blocks; raises `TransientError` when it all but stops.

        Bytes already in the socket are read, and written to disk, by one thread at a time: 32 that
        hand each other the interpreter after every 16 kB take a fifth longer. A read that may have
        to wait takes whatever comes first, so that the rate can be seen; urllib3 before 2.2 has no
        such read, and a short one stands in for it.
        """
        raw, since, before = response.raw, time.monotonic(), 0
        is_encoded = "Content-Encoding" in response.headers
        read, most = (raw.read1, 65536) if hasattr(raw, "read1") else (raw.read, 256)
        try:
            while True:
                self.wait(0)
                with self.reading:  # held while the caller writes the block to disk: be quick
                    if not is_encoded and (size := bytes_there(raw)) > TLS_RECORD_BYTES:
                        yield raw.read(min(size, READ_BYTES), decode_content=False)
                        continue
                if not (data := read(most, decode_content=is_encoded)):
                    return
                yield data
                if (now := time.monotonic()) - since >= self.timeout_s / 2:
                    if raw.tell() - before < STALL_BYTES_PER_SECOND * (now - since):
                        raise TransientError(f"stalled: under 1 kB/s for {self.timeout_s / 2:g} s")
                    since, before = now, raw.tell()
        except NETWORK_ERRORS as error:
            raise explain(error, self.timeout_s) from None


def bytes_there(raw: Any) -> int:
    """How many bytes of a body of known length have surely come; 0 where that cannot be told.

    Of TLS, some bytes are no body (an eighth at most, if records have 200 or more), and the
    last record may be cut. A wrong guess would have others wait for this server.
    """
    if raw.length_remaining and sys.platform != "win32":
        with contextlib.suppress(OSError, ValueError):
            come = fcntl.ioctl(raw, termios.FIONREAD, bytes(4))
            return int.from_bytes(come, sys.byteorder) * 7 // 8 - TLS_RECORD_BYTES
    return 0


NETWORK_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)


def explain(error: BaseException | None, timeout_s: float) -> TaskError:
    """A library's exception in our words: theirs may hold the link, query and all."""
    is_refused = re.search("verify failed|n't match", str(error))
    is_proxy = isinstance(error, requests.exceptions.ProxyError)
    if isinstance(error, requests.exceptions.SSLError) and is_refused:
        return TaskError("the server's certificate is not trusted", "set REQUESTS_CA_BUNDLE")
    if isinstance(error, ValueError) and not isinstance(error, requests.exceptions.InvalidHeader):
        return TaskError("no usable address", "see link, proxy and base URL")
    if isinstance(error, (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)):
        return TransientError(f"stalled: nothing came within {timeout_s:g} s")
    while error:
        if isinstance(error, OSError) and error.strerror and error.errno:
            return TransientError(f"the connection failed: {error.strerror}")
        error = error.__cause__ or error.__context__
    return TransientError("the proxy did not connect" if is_proxy else "the connection was cut")


# --- The Runway API: a fresh link for a dead one ----------------------------------------------


def api_secret() -> str:
    return os.environ.get("RUNWAYML_API_SECRET", "").strip()


def fetch_fresh_link(task_id: str, session: Session) -> str:
    """A new link to the video of ``task_id`` (https://docs.dev.runwayml.com/api/).

    Raises `TransientError` where another try may help, else `TaskError`. Redirects are not
    followed: the key is for this host alone.
    """
    base_url = os.environ.get("RUNWAYML_BASE_URL", "").strip().rstrip("/") or RUNWAY_BASE_URL
    headers = {"Authorization": f"Bearer {api_secret()}", "X-Runway-Version": "2024-11-06"}
    link = f"{base_url}/v1/tasks/{quote(task_id, '', errors='replace')}"
    with session.get(link, headers, redirects=0) as response:
        status, body = response.status_code, b""
        if status != 200 and status not in RETRIED_STATUSES:
            raise TaskError(f"HTTP {status}", "see the task, and RUNWAYML_API_SECRET")
        check_status(status, response.headers)
        for piece in session.chunks(response):
            body += piece
            if len(body) >= BYTES_PER_MB:
                break
        return read_api_answer(body[:BYTES_PER_MB])


def read_api_answer(body: bytes) -> str:
    """The link that stands first in ``output`` of a task as the API describes it."""
    try:
        task = as_object(json.loads(body))
    except (ValueError, RecursionError):
        raise TransientError("the answer is not JSON, or not all of it came") from None
    output, status = task.get("output"), task.get("status", "SUCCEEDED")
    link = usable_link(output[0]) if isinstance(output, list) and output else ""
    if not link or status != "SUCCEEDED":
        shown = status if re.fullmatch("[A-Z_]{1,20}", str(status)) else "unknown"  # not our key
        reason = f"the answer holds no video (status {shown})"
        raise TaskError(reason, "see the task in Runway, or RUNWAYML_BASE_URL")
    return link


# --- Outcomes: what became of one task --------------------------------------------------------


class Status(str, Enum):
    DOWNLOADED = "downloaded"
    FAILED = "failed"
    EXISTS = "exists"
    PENDING = "pending"  # in a dry run


@dataclass(frozen=True)
class Outcome:
    """What became of one task: its video's ``path`` and bytes, and the ``fault`` if it failed.

    One that is there may have a fault as well: it could not be handed over. ``notes`` are
    lines for the console.
    """

    task: Task
    status: Status
    path: Path
    size_bytes: int | None = None
    fault: TaskError | None = None
    warning: str = ""
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> str:
        """One line: why it failed, and what the user can do; ``""`` when all is well."""
        return str(self.fault) if self.fault else ""

    @property
    def label(self) -> str:
        """How a list names it."""
        return f"{printable(self.path.name)} (task {shown_id(self.task.task_id)})"

    def as_json(self) -> dict[str, Any]:
        path = str(self.path) if self.status is not Status.FAILED or self.size_bytes else None
        what = {"task_id": self.task.task_id, "status": self.status.value, "path": path}
        said = {"error": self.error or None, "warning": self.warning or None}
        expiry = link_expiry(self.task.link) if self.status is Status.PENDING else math.inf
        more = {"expires": utc(expiry).isoformat()} if expiry < math.inf else {}
        return {**what, "size_bytes": self.size_bytes, **said, **more}


STATISTICS = {"downloaded": "downloaded", "failed": "failed_downloads", "exists": "already_exists"}


def count_outcomes(outcomes: Sequence[Outcome] = ()) -> dict[str, int]:
    counts = Counter(outcome.status.value for outcome in outcomes)
    named = {name: counts[status] for status, name in STATISTICS.items()}
    return {"total_succeeded": len(outcomes)} | named


# --- One download: attempts, back-off, resume, a fresh link, a name ---------------------------


def backoff_s(failures: int, at_least_s: float | None, jitter: float) -> float:
    """Seconds before the next try: exponential, ``jitter`` in [0, 1) halves it at most."""
    return max(BACKOFF_BASE_S * 2.0 ** min(failures - 1, 6) * (0.5 + jitter / 2), at_least_s or 0.0)


class Download:
    """Brings one task's video to its place, in the worker thread that calls `run`.

    The live line looks at ``part``, ``received`` and ``waiting`` meanwhile.
    """

    def __init__(self, plan: Plan, session: Session) -> None:
        self.received, self.waiting = 0, ""
        self._plan, self._task, self._session = plan, plan.task, session
        # the row's link, then "" when that is refused, then Runway's, which is not replaced
        self._link, self._is_fresh = plan.task.link, False
        self._hidden = hidden_path(plan.path.parent, plan.task.key)
        self._dead = LinkDead(NO_LINK, "")
        self._tries, self._failures, self._failed_at = 1, 0, NEVER
        self._most_bytes, self._is_length_known = 0, True
        self._ranges_work: bool | None = None  # False: asked for, and none has brought a byte
        self._notes, self._warning = Counter[str](), ""

    def run(self) -> Outcome:
        """Do what is to be done; raises `JobError`, `InOtherHands` and `Cancelled`."""
        keep = True
        try:
            self.part = PartFile.claim(self._hidden)
            self._session.downloads.append(self)
            try:
                outcome, keep = self._act(), False
                return hand_over(outcome, self._session)
            finally:
                self.part.release(keep)
        except TaskError as fault:
            tries = f"tried {self._tries} times" if self._tries > 1 else ""
            fault.detail = ", ".join(filter(None, (fault.detail, tries)))
            return self._outcome(Status.FAILED, None, fault)

    def _act(self) -> Outcome:
        while True:
            try:
                return self._attempt()
            except LinkDead as error:
                if self._link and not self._is_fresh:
                    self._dead, self._link = error, ""  # the next attempt asks for a fresh one
                elif self._plan.action is not Action.ASK:
                    raise
                elif adopted := self._adopt(f"  ℹ️ Taken for this task's, unasked: {error.why}"):
                    return adopted
            except TransientError as error:
                self._back_off(error)
                if not self.part.is_intact():
                    self.part.release()
                    self.part = PartFile.claim(self._hidden)

    def _attempt(self) -> Outcome:
        """A look at the directory, a request if need be for what is missing, and publishing."""
        if there := self._look(in_hand=self.part.share == 1):
            return there
        if self.part.share < 1:
            if not self._link:
                self._link, self._is_fresh = self._fresh_link(), True
            if adopted := self._transfer():
                return adopted
        with disk_errors("read the video back"):
            content = inspect(self.part.file, self.part.size_bytes)
        if content is Content.CUT or (content is Content.SURPLUS and not self._is_length_known):
            self.part.restart()
            raise TransientError(f"the server sent {content.value}")
        if content not in KEPT:
            self.part.restart()
            raise TaskError(f"what the server sent is {content.value}", "see the task in Runway")
        self._warning = "" if content is Content.WHOLE else f"it is {content.value}"
        return self._publish()

    def _look(self, in_hand: bool) -> Outcome | None:
        """Plan by the directory as it is now; the outcome if the video is there already."""
        self._plan = plan_task(self._task, self._session.index, in_hand)
        if self._plan.action is Action.KEEP:
            return self._outcome(Status.EXISTS, self._plan.size_bytes)
        return self._adopt() if self._plan.action is Action.ADOPT else None

    def _fresh_link(self) -> str:
        """A link from Runway; else raise `LinkDead`, saying what would help."""
        detail, expiry = self._dead.detail, link_expiry(self._task.link)
        if expiry < math.inf:
            word = "expired" if expiry <= time.time() else "valid until"
            detail += f", {word} {utc(expiry):%Y-%m-%d %H:%M:%S} UTC"
        if not (api_secret() and self._task.task_id):
            hint = "set RUNWAYML_API_SECRET and run again to fetch a fresh link"
            hint = hint if self._task.task_id else "run the polling step again"
            raise LinkDead(self._dead.reason, hint, detail)
        try:
            return fetch_fresh_link(self._task.task_id, self._session)
        except TransientError as error:
            error.reason = f"Runway API: {error.reason}"
            raise
        except TaskError as error:
            reason = f"{self._dead.reason}; Runway API: {error.reason}"
            raise LinkDead(reason, error.hint, detail) from None

    def _transfer(self) -> Outcome | None:
        """Ask and receive, unless the answer shows that the file there is this task's own."""
        part, headers = self.part, {"Accept-Encoding": "identity"}
        if part.source and part.size_bytes and self._failures <= self._session.retries:
            self._ranges_work = self._ranges_work or False
            headers |= {"Range": f"bytes={part.size_bytes}-", "If-Range": part.source[1]}
        with self._session.get(self._link, headers, redirects=30) as response:
            self.waiting = ""
            status, (start, total, source) = response.status_code, read_head(response)
            continues = 0 < part.size_bytes == start and source == part.source
            if part.size_bytes and not continues and status in (206, 400, 405, 412, 416, 501):
                part.restart()  # the server has another object by now, or gives no ranges
                return self._transfer()  # once: an empty part asks for none
            check_status(status, response.headers)
            if not continues and start != 0:
                raise TransientError("the server sent a part that was not asked for")
            is_own = self._plan.action is Action.ASK and total == self._plan.size_bytes
            if is_own and (adopted := self._adopt()):
                return adopted
            if continues:
                self._notes[f"  ⏩ Resumed at {megabytes(part.size_bytes)}"] += 1
            else:
                part.restart(source)
            self._receive(response, total)
        return None

    def _receive(self, response: requests.Response, total: int) -> None:
        """Write the body to the part and count it against what the head announced.

        Where it announced nothing, and nothing came, the head was cut.
        """
        part, announced = self.part, response.raw.length_remaining
        self._is_length_known = announced is not None
        least = 1 if announced is None else announced
        for data in self._session.chunks(response):
            part.write(data)
            self.received += len(data)
            self._ranges_work = response.status_code == 206 or self._ranges_work
            if part.size_bytes > self._most_bytes:
                self._most_bytes, self._failures = part.size_bytes, 0
        if least > response.raw.tell() or 0 < total != part.size_bytes:
            raise TransientError("the connection was cut")

    def _back_off(self, error: TransientError) -> None:
        """Wait until it is time for another try; raise a final error when none is left.

        A try costs nothing if the server served others lately, or since this video's last try.
        """
        if not self.part.share and self.part.is_intact():
            self.part.restart()
        if (error.wait_s or 0) > RETRY_AFTER_CAP_S:
            wait = f"{error.reason} and asks to wait {error.wait_s:.0f} s"
            raise TaskError(wait, "run again after that time") from None
        uses_up = error.served_at <= min(self._failed_at, time.monotonic() - STILL_SERVING_S)
        self._failed_at = time.monotonic()
        # one more, which asks for all: ranges may be what fails here
        if uses_up and self._failures >= self._session.retries + (self._ranges_work is False):
            raise TaskError(error.reason, error.hint) from None
        self.waiting = error.reason
        self._notes[f"  🔁 Tried again: {error.reason}"] += 1
        failures = self._failures + 1 if uses_up else min(self._tries, 4)
        self._failures += uses_up
        self._tries += 1
        self._session.wait(backoff_s(failures, error.wait_s, random.random()))
        if uses_up:
            self._session.adapter.close()  # connections that idle may be dead as well

    def _publish(self) -> Outcome:
        """Give the whole video its name, or another if that is taken by now."""
        with disk_errors("write the video"):
            os.fsync(self.part.file.fileno())
            info = file_info(self.part.file, self.part.sha256)
        for _ in range(NAME_TRIES):
            with contextlib.suppress(FileExistsError), disk_errors("put the video in place"):
                self._put_in_place(info)
                return self._outcome(Status.DOWNLOADED, info["size_bytes"])
            if there := self._look(in_hand=True):
                return there
            # what has the name is no video: it goes before metadata says that there is one
            if file_bytes(self._plan.path) == self._plan.size_bytes:
                with disk_errors(f"remove {printable(self._plan.path.name)}, which is no video"):
                    os.unlink(self._plan.path)
        raise TransientError(CHANGED_MEANWHILE)

    def _put_in_place(self, info: Object) -> None:
        """Publish metadata, then the video: whoever sees it finds both.

        A kill in between leaves metadata without a video, which the next run fills. Raises
        FileExistsError if somebody has taken the name.
        """
        path, metadata = self._plan.path, self._plan.path.with_suffix(".json")
        if os.path.lexists(path):
            raise FileExistsError
        is_new = put_metadata(metadata, self._task, path.name, info, bool(self._session.command))
        try:
            if not self.part.is_intact():
                raise TransientError(CHANGED_MEANWHILE)
            publish(self.part.path, path, replaces=False)
            if not (self.part.is_at(self.part.path) or self.part.is_at(path)):
                remove(path)  # somebody changed what the hidden name stands for
                raise FileExistsError
            with contextlib.suppress(OSError, AttributeError):
                os.removexattr(path, NOTE)
        except (OSError, TransientError):
            if is_new and file_bytes(path) != info["size_bytes"]:  # else it describes that one
                remove(metadata)
            raise

    def _adopt(self, *notes: str) -> Outcome | None:
        """Create metadata for the video that is there; ``None``: it is another's by now."""
        path, metadata = self._plan.path, self._plan.path.with_suffix(".json")
        with contextlib.suppress(FileExistsError), disk_errors("describe the video there"):
            with open(path, "rb") as file:
                info = file_info(file)
            put_metadata(metadata, self._task, path.name, info)
            self._notes.update([*notes, f"  📄 Metadata created: {printable(metadata.name)}"])
            return self._outcome(Status.EXISTS, info["size_bytes"])
        return None

    def _outcome(self, status: Status, size: int | None, fault: TaskError | None = None) -> Outcome:
        plan = self._plan
        if status is Status.DOWNLOADED and plan.holder and plan.path.stem != self._task.stub:
            self._notes[f"  ℹ️ Saved under this name: {printable(plan.holder)}"] += 1
        notes = tuple(f"{note} ({n} times)" if n > 1 else note for note, n in self._notes.items())
        return Outcome(self._task, status, plan.path, size, fault, self._warning, notes)


# --- Handing over: the command that takes each new video on -----------------------------------


def hand_over(outcome: Outcome, session: Session) -> Outcome:
    """Run the command if the metadata says that the video is still to be handed over.

    The metadata then says that it was: at least once, since a kill may come in between.
    """
    path, command, key = outcome.path.with_suffix(".json"), session.command, outcome.task.key
    if not command or not is_waiting(path):
        return outcome
    try:
        run_command(session, {"{video}": outcome.path, "{metadata}": path})
        with disk_errors("record that it was handed over"):
            if not is_waiting(path):  # the command may have renamed or moved it
                path = path.with_name(f"{Index.scan(path.parent).homes.get(key, '')}.json")
            if old := read_metadata(path):
                write_whole(path, encode_metadata(old | {"handed_over": True}), key, replaces=True)
    except Cancelled:  # the next run hands it over
        return outcome
    except TaskError as fault:
        return replace(outcome, fault=fault)
    return replace(outcome, notes=(*outcome.notes, f"  🔧 Handed over: {printable(command[0])}"))


def is_waiting(metadata: Path) -> bool:
    """Whether ``metadata`` says that its video is still to be handed over."""
    return read_metadata(metadata).get("handed_over") is False


def run_command(session: Session, paths: Mapping[str, Path]) -> None:
    """Run the command without a shell and without the API key; raises `TaskError`, `Cancelled`.

    ``paths`` go in, as absolute ones, for the ``{word}`` that is their key.
    """
    either = re.compile("|".join(paths))
    words = [either.sub(lambda key: str(paths[key[0]].absolute()), w) for w in session.command]
    clean = {key: value for key, value in os.environ.items() if key != "RUNWAYML_API_SECRET"}
    none, both = subprocess.DEVNULL, subprocess.STDOUT
    said = why = ""
    try:
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(words, stdin=none, stdout=output, stderr=both, env=clean)
            while process.poll() is None and not session.stop.wait(TICK_S / 5):
                pass
            process.terminate()  # where it has not ended, but the run does
            session.wait(TICK_S if process.returncode else 0)  # Ctrl-C may have ended both
            why = f"exit code {process.returncode}" if process.returncode else ""
            output.seek(0)
            said = b"".join(deque(output, maxlen=1)).decode(errors="replace").strip()[:200]
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not a usable command"
    if why:
        reason = f"not handed over: {printable(words[0])}: {why}"
        raise TaskError(reason, "mend that, then run again with --exec", printable(said))


# --- How it all looks -------------------------------------------------------------------------


def outcome_lines(outcome: Outcome, number: str) -> list[str]:
    """The block of lines about one task; ``number`` is ``k/N``."""
    name, size = printable(outcome.path.name), megabytes(outcome.size_bytes or 0)
    fault, link = outcome.fault, printable(outcome.task.link)
    link = link if len(link) <= 50 else f"{link[:50]}..."
    lines = ["", f"  {number} Task {shown_id(outcome.task.task_id)}"]
    if outcome.status is Status.DOWNLOADED:
        lines += [f"  🎬 Downloading: {name}"]
        lines += [f"  📥 Streaming download from: {link}"] if link else []
        lines += [f"  📊 File size: {size}", f"  ✅ Downloaded: {size}"]
        lines += [f"  📄 Metadata saved: {name.removesuffix('.mp4')}.json"]
        lines += [f"  ⚠️ Kept, though {outcome.warning}: look at it"] if outcome.warning else []
    elif outcome.status is Status.EXISTS:
        lines += [f"  ⚠️ Already exists: {name}"]
    return [*lines, *outcome.notes, *([f"  ❌ Failed: {name}: {fault.why}"] if fault else [])]


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
    return [*lines, f"📈 Success rate: {1000 * on_disk // total / 10}%"] if total else lines


def storage_lines(directory: Path, outcomes: Iterable[Outcome]) -> list[str]:
    """The videos in ``directory``, those of ``outcomes`` first, and what they take together."""
    sizes: dict[str, int] = {}
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        files = [each for each in entries if each.name.endswith(".mp4") and each.name[0] != "."]
        sizes = {each.name: each.stat().st_size for each in files if each.is_file()}
    new = [each.path.name for each in outcomes if each.status is Status.DOWNLOADED]
    names = dict.fromkeys([*filter(sizes.get, new), *sorted(sizes)])
    lines = shortened([f"• {printable(n)} ({megabytes(sizes[n])})" for n in names], LISTED)
    lines = ["", f"📁 Videos in {printable(directory)}:", *(f"  {line}" for line in lines)]
    return [*lines, "", f"💾 Total storage used: {megabytes(sum(sizes.values()))}"] if names else []


def failure_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """What is wrong, grouped by reason: the reason and the advice once, then the names."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for outcome in outcomes:
        if fault := outcome.fault:
            names = groups.setdefault(("❌", f": {fault.reason}", fault.hint), [])
            names.append(f"{outcome.label}: {fault.detail}" if fault.detail else outcome.label)
        if outcome.warning:
            said = f" kept, though {outcome.warning}"
            groups.setdefault(("⚠️", said, "look at it"), []).append(outcome.label)
    lines = []
    for (mark, said, hint), names in groups.items():
        lines += ["", f"{mark} {counted(len(names))}{said}"]
        lines += [*(f"    {name}" for name in shortened(names, NAMES_SHOWN)), f"  → {hint}"]
    bad, total = sum(outcome.fault is not None for outcome in outcomes), len(outcomes)
    verdict = f"❌ {bad:,} of {total:,} with a problem, {total - bad:,} without"
    return [*lines, "", verdict] if bad and total > 1 else lines


def progress_parts(total: int, done: int, session: Session, elapsed_s: float) -> list[str]:
    """How far a run of ``total`` tasks is after ``elapsed_s``, the most important part first.

    ``done`` of them have an outcome.
    """
    active, received = session.active, sum(d.received for d in session.downloads) / BYTES_PER_MB
    waiting = [f"🔁 {each.waiting}" for each in active if each.waiting]
    parts = [f"⏬ {done:,}/{total:,}", *waiting[-1:], f"{received:.1f} MB"]
    partly = sum(each.part.share for each in active)  # in videos, as what follows
    fetched = partly + sum(d.received > 0 and d.part.file.closed for d in session.downloads)
    to_do = max(0.0, total - done - partly)
    if received and fetched > 0 and len(waiting) < len(active):
        left = timedelta(seconds=round(min(elapsed_s * to_do / fetched, 359_999)))
        parts += [f"{received / elapsed_s:.1f} MB/s", f"{left} left"]
    return parts


class Console:
    """Prints all but the JSON: lines to stdout, what is wrong to stderr, and the live line.

    ``quiet`` leaves what is wrong; with ``as_json`` stdout is left to the object. A reader that
    goes away or an encoding without emoji never breaks the run.
    """

    def __init__(self, quiet: bool = False, as_json: bool = False) -> None:
        self._quiet, self._as_json, self._printed = quiet, as_json, time.monotonic()

    def say(self, *lines: str) -> None:
        if not self._quiet:
            self._write(sys.stderr if self._as_json else sys.stdout, *lines)

    def complain(self, *lines: str) -> None:
        self._write(sys.stderr, *(line for line in lines if line or not self._quiet))

    def _write(self, stream: Any, *lines: str) -> None:
        if lines:
            self.show_progress([])
            self._printed = time.monotonic()
            self._put(stream, "\n".join(lines) + "\n")

    def show_progress(self, parts: Sequence[str]) -> None:
        """Draw the live line, none of no ``parts``; off a terminal break a long silence."""
        columns = 0
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, LookupError):
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        if columns and not self._quiet:
            # emoji, two at most, are two columns wide
            self._put(sys.stderr, "\r\x1b[K" + "  ".join(parts)[: max(0, columns - 3)])
        elif parts and time.monotonic() - self._printed >= SILENCE_S:
            self.say("  ".join(parts))

    def _put(self, stream: Any, text: str) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, LookupError):
            encoding = getattr(stream, "encoding", None) or "utf-8"
            stream.write(text.encode(encoding, "replace").decode(encoding))
            stream.flush()


# --- The run: work in parallel, report as it ends ---------------------------------------------


def read_tasks(paths: Sequence[Path], console: Console) -> tuple[list[Task], list[str]]:
    """The tasks of results files, latest first, each once; and what kept files from use."""
    found, errors = list[Task](), list[str]()
    for path in paths:
        console.say("", f"📋 Processing: {printable(path.name)}")
        try:
            tasks, others, wrong = read_rows(read_results(path))
        except JobError as error:
            errors.append(str(error))
            continue
        found += tasks
        console.say(f"  ✅ Found {len(tasks)} SUCCEEDED tasks", *others)
        lines = [f"  ⚠️ {printable(path.name)}, {each}" for each in wrong]
        console.complain(*shortened(lines, NAMES_SHOWN))
    return merge_tasks(found), errors


class WorkerPool:
    """Worker threads that do one job each from start to end, led by the thread that made them.

    They are daemons: no exit waits for one that waits for a server. Jobs in other hands, whose
    tasks' keys are in ``held``, are tried again until they are done. Fewer threads than asked
    for, or none, will do.
    """

    def __init__(self, session: Session, jobs: Sequence[Plan], workers: int) -> None:
        self.left, self.held, self._session, self._threads = len(jobs), set[str](), session, 0
        self._todo, self._done = deque(jobs), SimpleQueue[Outcome | DownloaderError]()
        with contextlib.suppress(RuntimeError):  # the system gives no more
            while self._threads < min(workers, self.left):
                threading.Thread(target=self._run_jobs, daemon=True).start()
                self._threads += 1

    def results(self, until: float = math.inf) -> Iterator[Outcome | DownloaderError | None]:
        """What became of each job, as they end; ``None`` a few times a second in between."""
        ticked = NEVER
        while self.left and (now := time.monotonic()) < until:
            if now - ticked >= TICK_S:
                ticked = now
                yield None
            if not self._threads:
                self._run_jobs()
            with contextlib.suppress(Empty):
                result = self._done.get(timeout=TICK_S)
                self.left -= 1
                yield result

    def _run_jobs(self) -> None:
        with contextlib.suppress(IndexError):  # no job is left but what other threads will end
            while True:
                job = self._todo.popleft()
                if isinstance(result := self._run_job(job), InOtherHands):
                    self.held.add(job.task.key)
                    self._todo.append(job)
                    self._session.stop.wait(TICK_S)
                else:
                    self.held.discard(job.task.key)
                    self._done.put(result)

    def _run_job(self, job: Plan) -> Outcome | DownloaderError:
        try:
            self._session.wait(0)
            return Download(job, self._session).run()
        except DownloaderError as error:
            return error
        except Exception as error:  # or this thread would end, and the run wait for ever
            reason = f"unexpected {type(error).__name__}: {printable(error)}"
            fault = TaskError(reason, "please report it")
            return Outcome(job.task, Status.FAILED, job.path, fault=fault)


@dataclass(eq=False)
class VideoDownloader:
    """Downloads the SUCCEEDED videos of polling results into one directory.

    A caller may rely on this:

    - No method raises for bad input, a bad task or a full disk: the fault is printed and
      counted. The constructor raises `JobError` for a directory that cannot be made.
    - A video is under its final name only when it is whole, synced and has its metadata. No
      finished video is overwritten or moved. Other runs on the same directory share the work.
    - ``on_outcome`` is called once per finished task, in the thread that called the method,
      with an `Outcome` (``task``, ``status``, ``path``, ``size_bytes``, ``error``).
    - Methods may be called from several threads; they take turns. Ctrl-C raises
      KeyboardInterrupt as ever, and leaves part files that the next run resumes.
    """

    output_dir: str | Path = DEFAULT_OUTPUT_DIR
    _: KW_ONLY
    workers: int = 32
    timeout: float = 30.0
    retries: int = 3
    quiet: bool = False
    on_outcome: Callable[[Outcome], None] | None = None
    command: Sequence[str] = ()
    console: Console | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Make ``output_dir``; raises `JobError` if it cannot be made or written."""
        self.stats, self.outcomes = count_outcomes(), list[Outcome]()
        self.output_dir = self._directory = Path(self.output_dir)
        self._console = self.console or Console(self.quiet)
        self._turn = threading.RLock()
        self._adapters: dict[int, SharedContextAdapter] = {}  # by process: it alone may use them
        try:
            with contextlib.suppress(FileExistsError):  # if that is a file, the next line says so
                self._directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._directory).close()
        except (OSError, ValueError) as error:
            raise directory_error(self._directory, error) from None

    # What the orchestrator calls

    def find_all_polling_results(self, directory: str | Path = ".") -> list[Path]:
        """The results files in ``directory``, its ``video_outputs`` and the output directory."""
        return find_results_files([directory, Path(directory, DEFAULT_OUTPUT_DIR), self._directory])

    def load_polling_results(self, path: str | Path) -> dict[str, Any]:
        """The object in results file ``path``; ``{}`` and a printed line when there is none."""
        try:
            return read_results(Path(path))
        except JobError as error:
            self._console.complain(f"❌ {error}")
            return {}

    def get_succeeded_tasks(self, results: Object) -> list[Object]:
        """The raw rows, in order, that SUCCEEDED and have a usable ``video_url``.

        With ``RUNWAYML_API_SECRET`` set also those without, as Runway can be asked for one. Names
        on stderr what is left out.
        """
        tasks, _, wrong = read_rows(as_object(results))
        lost = [task for task in tasks if not (task.link or api_secret())]
        wrong += [f"task {shown_id(task.task_id)}: {NO_LINK}: left out" for task in lost]
        self._console.complain(*shortened([f"⚠️ {each}" for each in wrong], NAMES_SHOWN))
        return [task.row for task in tasks if task.link or api_secret()]

    def generate_filename_stub(self, task: Object) -> str:
        """The name that row ``task`` asks for, made safe, without suffix."""
        return task_from_row(as_object(task)).stub

    def process_succeeded_task(self, task: Object) -> bool:
        """Bring the video of row ``task`` to disk; whether it is there, new or before."""
        return self._run_safely([task_from_row(as_object(task))]) == 1

    def process_polling_results_file(self, path: str | Path) -> int:
        """Bring all videos of results file ``path`` to disk; how many are there now."""
        tasks, errors = read_tasks([Path(path)], self._console)
        self._console.complain(*(f"❌ {error}" for error in errors))
        return self._run_safely(tasks)

    def create_metadata_json(
        self, task: Object, video_path: str | Path, metadata_path: str | Path
    ) -> bool:
        """Write the metadata of row ``task`` and the video on disk; whether it worked."""
        checked, video = task_from_row(as_object(task)), Path(video_path)
        try:
            with disk_errors(f"describe {printable(video)}"), open(video, "rb") as file:
                put_metadata(Path(metadata_path), checked, video.name, file_info(file))
        except (DownloaderError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            self._console.complain(f"❌ {printable(metadata_path)}: {printable(reason)}")
            return False
        return True

    def print_final_stats(self) -> None:
        """Print the summary of everything done so far, the videos there, and what failed."""
        self._console.say(*statistics_lines(self.stats))
        self._console.say(*storage_lines(self._directory, self.outcomes))
        last = {each.task.key or id(each): each for each in self.outcomes}
        self._console.complain(*failure_lines([*last.values()]))

    # The run

    def _run_safely(self, tasks: Sequence[Task]) -> int:
        with self._turn:
            try:
                return self.run(tasks)
            except JobError as error:
                self._console.complain(f"❌ {error}")
                new = self.outcomes[self._before :]
                self.stats["failed_downloads"] += len(tasks) - len(new)
                return sum(each.status is not Status.FAILED for each in new)

    def run(self, tasks: Sequence[Task]) -> int:
        """Bring ``tasks`` to disk; how many are there. Raises `JobError`, KeyboardInterrupt."""
        self.stats["total_succeeded"] += len(tasks)
        self._total, self._before = len(tasks), len(self.outcomes)
        index, jobs = Index.scan(self._directory), list[Plan]()
        for plan in plan_all(tasks, index):
            is_due = self.command and is_waiting(plan.path.with_suffix(".json"))
            if plan.action is not Action.KEEP or is_due:
                jobs.append(plan)
            else:
                outcome = Outcome(plan.task, Status.EXISTS, plan.path, plan.size_bytes)
                self._record(outcome, len(self.outcomes) - self._before < EXISTING_SHOWN)
        if (more := len(tasks) - len(jobs) - EXISTING_SHOWN) > 0:
            self._console.say("", f"  ⚠️ … and {more:,} more that already exist")
        if jobs:
            self._work(sorted(jobs, key=lambda job: link_expiry(job.task.link)), index)
        failed = count_outcomes(self.outcomes[self._before :])["failed_downloads"]
        if not failed:
            sweep(self._directory, tasks)
        return len(tasks) - failed

    def _work(self, jobs: Sequence[Plan], index: Index) -> None:
        """Carry ``jobs`` out in worker threads; report each in this one."""
        if (process := os.getpid()) not in self._adapters:  # a fork copies open connections
            self._adapters = {process: SharedContextAdapter(self.workers, self.workers)}
        adapter = self._adapters[process]
        session = Session(index, adapter, self.timeout, self.retries, self.command)
        try:
            self._lead(WorkerPool(session, jobs, self.workers), session)
        except JobError:  # make room
            sweep(self._directory, [job.task for job in jobs])
            raise

    def _lead(self, pool: WorkerPool, session: Session) -> None:
        """Report what the ``pool`` does; have it end soon if anything is wrong."""
        started, told = time.monotonic(), False
        try:
            for result in pool.results():
                if isinstance(result, JobError):
                    raise result
                if isinstance(result, Outcome):
                    self._record(result)
                    continue
                done, elapsed_s = len(self.outcomes) - self._before, time.monotonic() - started
                parts = progress_parts(self._total, done, session, elapsed_s)
                if pool.left == len(pool.held) and not session.active:
                    waiting = f"⏳ Waiting for {counted(pool.left)} that another run has in hand"
                    self._console.say(*([] if told else ["", waiting]))
                    parts, told = [parts[0], waiting], True
                self._console.show_progress(parts)
        finally:
            session.stop.set()
            for result in pool.results(time.monotonic() + STOP_GRACE_S):
                if isinstance(result, Outcome):
                    self._record(result)
            for each in session.active:  # whose threads wait for a server
                with contextlib.suppress(ValueError):  # it is just letting go
                    each.part.release()
            self._console.show_progress([])
            sync(self._directory)  # the names

    def _record(self, outcome: Outcome, is_shown: bool = True) -> None:
        """Print and count ``outcome``, and tell the caller."""
        self.outcomes.append(outcome)
        self.stats[STATISTICS[outcome.status]] += 1
        if is_shown:
            number = f"{len(self.outcomes) - self._before}/{self._total}"
            self._console.say(*outcome_lines(outcome, number))
        try:
            if self.on_outcome:
                self.on_outcome(outcome)
        except Exception as error:  # is no reason to lose a video
            self._console.complain(f"⚠️ on_outcome: {type(error).__name__}: {printable(error)}")


# --- Looking without downloading: --dry-run and --verify --------------------------------------


def dry_run(tasks: Sequence[Task], directory: Path, console: Console) -> list[Outcome]:
    """List what a run would do, soonest to expire first; no request, nothing written."""
    counts = Counter({"to do": 0, "expired": 0, "already there": 0})
    plans = plan_all(tasks, Index.scan(directory))
    found = list[Outcome]()
    for plan in sorted(plans, key=lambda plan: link_expiry(plan.task.link)):
        expiry, is_there = link_expiry(plan.task.link), plan.action in (Action.KEEP, Action.ADOPT)
        is_dead = expiry <= time.time()
        said = "the link does not say when it expires" if plan.task.link else NO_LINK
        if expiry < math.inf:
            said = f"the link expire{'d' if is_dead else 's'} {utc(expiry):%Y-%m-%d %H:%M:%S} UTC"
        lost = not (plan.task.link or is_there or plan.action is Action.ASK or api_secret())
        fault = TaskError(NO_LINK, "set RUNWAYML_API_SECRET to fetch one") if lost else None
        status = Status.EXISTS if is_there else Status.FAILED if lost else Status.PENDING
        word = "without a link" if lost else "expired" if is_dead else "to do"
        counts["already there" if is_there else word] += 1
        found.append(Outcome(plan.task, status, plan.path, plan.size_bytes, fault))
        if status is not Status.EXISTS:
            console.say(f"  {found[-1].label}: {said}")
    console.say("", "🔎 Dry run: " + ", ".join(f"{n:,} {word}" for word, n in counts.items()))
    console.complain(*failure_lines(found))
    return found


def verify(directory: Path, console: Console) -> list[Outcome]:
    """Check every video that has metadata, and name those that have none; no request."""
    if not os.path.lexists(directory):
        raise JobError(f"{printable(directory.absolute())} is not there: see --output-dir")
    index = Index.scan(directory)
    outcomes = [check_video(directory / f"{stub}.mp4", info) for stub, info in index.described()]
    names = {name for name in index.names if name.endswith(".mp4") and name[0] != "."}
    if alone := names - {outcome.path.name for outcome in outcomes}:
        console.say("", f"ℹ️ Without metadata, so not checked: {counted(len(alone))}")
        console.say(*(f"    {printable(name)}" for name in shortened(sorted(alone), NAMES_SHOWN)))
    bad = count_outcomes(outcomes)["failed_downloads"]
    console.say("", f"🔎 Verified: {len(outcomes) - bad:,} whole, {bad:,} with a problem")
    console.complain(*failure_lines(outcomes))
    return outcomes


def check_video(path: Path, metadata: Object) -> Outcome:
    """Hold the video ``path`` against its ``metadata``."""
    task = task_from_row(as_object(metadata.get("runway_task_json")))
    info, size = as_object(metadata.get("file_info")), file_bytes(path)
    fault, hint = None, "if you edited it, leave it; else move it away and run again"
    try:
        if size is None:
            raise TaskError("the video is missing", "run again without --verify, or delete .json")
        with disk_errors("read it"), open(path, "rb") as file:
            if size != info.get("size_bytes", size):
                detail = printable(f"{size:,} bytes, not {info['size_bytes']}")
                raise TaskError("another size than when it was downloaded", hint, detail)
            if not size or "sha256" not in info:
                if (content := inspect(file, size)) is not Content.WHOLE:
                    raise TaskError(f"it is {content.value}", hint)
            elif hash_file(file).hexdigest() != info["sha256"]:
                raise TaskError("another SHA-256 than when it was downloaded", hint)
    except TaskError as error:
        fault = error
    return Outcome(task, Status.FAILED if fault else Status.EXISTS, path, size, fault)


# --- The gallery: one page that shows the videos ----------------------------------------------

# A browser takes a second for 300 players, so each is made when its card comes near the view,
# from what is for browsers without scripts.
GALLERY_PAGE = r"""<!DOCTYPE html>
<html lang=en><meta charset=utf-8><title>Videos</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<meta name="generator" content="download_succeeded_videos"><link rel="icon" href="data:,">
<style>@media (scripting: none) { input { display: none; } } * { margin: 0; }
body { font: 15px/1.5 system-ui, sans-serif; background: light-dark(#eff1f4, #111317); }
header, main { display: grid; gap: 1.2rem; padding: 1rem 1.2rem; align-items: start; }
header { position: sticky; top: 0; z-index: 1; grid-template-columns: auto minmax(0, 30rem);
  justify-content: space-between; background: inherit; }
input { font: inherit; padding: .4rem 1rem; border: 1px solid gray; border-radius: 2rem; }
main { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
article { content-visibility: auto; contain-intrinsic-size: auto 25rem; border-radius: 1rem;
  background: light-dark(#fff, #1d2026); overflow: hidden; overflow-wrap: anywhere; }
figure, video { display: block; width: 100%; aspect-ratio: 16 / 9; background: #000; }
h2, p, dl { margin: .7rem 1rem; font-size: 1em; } a { color: inherit; text-decoration: none; }
p { white-space: pre-wrap; max-height: 6em; overflow: auto; } dt { opacity: .7; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem 1rem; font-size: .85em; }
</style><header><output id="count" aria-live="polite">$n of $n videos</output>
<input id="search" type="search" aria-label="Search" placeholder="Search" autocomplete="off">
</header><main>$cards</main><script>
const cards = [...document.querySelectorAll("article")];
const watcher = new IntersectionObserver(seen => seen.forEach(({target, isIntersecting}) => {
  const raw = target.querySelector("noscript");
  if (isIntersecting && raw) raw.outerHTML = raw.textContent.replace("none", "metadata");
}), {rootMargin: "50%"});
cards.forEach(card => watcher.observe(card));
search.oninput = () => {
  const words = search.value.toLowerCase().split(/\s+/);
  for (const card of cards) card.hidden = !words.every(word => card.dataset.text.includes(word));
  count.value = `${cards.filter(card => !card.hidden).length} of ${cards.length} videos`;
};</script>"""


def gallery_card(video: Path, metadata: Object) -> str:
    """The HTML of one video, whatever its ``metadata`` holds; never its link."""
    row = {**metadata, **as_object(metadata.get("runway_task_json"))}
    texts = {k: html.escape(bare(row[k])) for k in row if isinstance(row[k], str | int | float)}
    prompt, date = (texts.get(key, "") for key in ("prompt", "download_timestamp"))
    texts |= {"size": megabytes(file_bytes(video) or 0), "date": date[:16].replace("T", " ")}
    labels = {"theme": "Theme", "seed": "Seed", "size": "Size", "date": "Date", "task_id": "Task"}
    facts = [f"<dt>{labels[key]}<dd>{texts[key]}" for key in labels if texts.get(key)]
    name, link = html.escape(video.name), quote(os.fsencode(video.name))
    found_by = " ".join([name, prompt, *(texts.get(key, "") for key in labels)]).lower()
    return (
        f'<article data-text="{found_by}"><figure><noscript><video controls loop playsinline'
        f' preload="none" aria-label="{name}" src="./{link}#t=0.001"></video></noscript></figure>'
        f'<h2 dir="auto"><a href="./{link}">{name}</a></h2><p dir="auto">{prompt}</p>'
        f"<dl>{''.join(facts)}</dl></article>\n"
    )


def write_gallery(directory: Path, console: Console) -> None:
    """Write the page that shows every video with metadata, newest first.

    Leaves a page alone that is not this script's, and says so; raises `DownloaderError`.
    """
    page, mark = directory / GALLERY_NAME, b'content="download_succeeded_videos"'
    pairs = [(directory / f"{stub}.mp4", info) for stub, info in Index.scan(directory).described()]
    pairs.sort(key=lambda pair: text_of(pair[1], "download_timestamp"), reverse=True)
    cards = [gallery_card(*pair) for pair in pairs if file_bytes(pair[0])]
    text = GALLERY_PAGE.replace("$n", str(len(cards))).replace("$cards", "".join(cards))
    with disk_errors(f"write the gallery {printable(page)}"):
        is_own = os.path.isfile(page) and mark in page.read_bytes()[:READ_BYTES]
        if os.path.lexists(page) and not is_own:
            console.complain("", f"⚠️ {printable(page)} is not this script's: left alone; rename it")
            return
        write_whole(page, text.encode(errors="replace"), GALLERY_NAME, replaces=True)
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


def command(text: str) -> tuple[str, ...]:
    """The words of a command that is there, with no other ``{word}`` than is filled in."""
    words = shlex.split(text.replace("\\", "\\\\") if os.name == "nt" else text)
    if not words or not shutil.which(words[0]):
        raise argparse.ArgumentTypeError(f"{text!r}: there is no such command")
    words_in_braces = re.findall(r"\{\s*[\w-]*(?:[.!:][^{}]*)?\s*\}", text)
    if wrong := set(words_in_braces) - {"{video}", "{metadata}"}:
        raise argparse.ArgumentTypeError(f"{min(wrong)} is not {{video}} or {{metadata}}")
    return tuple(words)


SETTINGS = ("workers", "timeout", "retries", "command")  # of `VideoDownloader`


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    on: dict[str, Any] = {"action": "store_true"}
    workers, some = bounded(int, 1, MAX_WORKERS), "(default: %(default)s)"
    add("files", nargs="*", type=Path, metavar="FILE", help="results files (default: the latest)")
    add("--polling-results-file", type=Path, action="append", metavar="FILE", help="the same")
    add("--all", **on, help="read every results file, latest first")
    add("--output-dir", type=Path, metavar="DIR", help=f"where the videos go; created {some}")
    add("--workers", type=workers, metavar="N", help=f"videos at a time, 1 to {MAX_WORKERS} {some}")
    retries, seconds = bounded(int, 0, 1000), bounded(float, 0.001, 86400)
    add("--timeout", type=seconds, metavar="SECONDS", help=f"for each wait for a server {some}")
    add("--retries", type=retries, metavar="N", help=f"more tries, if one brought nothing {some}")
    add("--shard", type=parse_shard, metavar="K/N", help="only the K-th of N equal parts")
    add("--exec", type=command, metavar="CMD", dest="command",
        help='hand each new video over to "CMD {video} {metadata}", without a shell')  # fmt: skip
    add("--gallery", **on, help=f"write DIR/{GALLERY_NAME}, a page that shows the videos")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", **on, help="only list what would be downloaded")
    mode.add_argument("--verify", **on, help="only check the videos against their metadata")
    add("-q", "--quiet", **on, help="print what is wrong, and nothing else")
    add("--json", **on, help="one JSON object on stdout, all else on stderr")
    add("--version", action="version", version="%(prog)s 2.1.0")
    parser.set_defaults(**{name: getattr(VideoDownloader, name) for name in SETTINGS})
    parser.set_defaults(output_dir=Path(DEFAULT_OUTPUT_DIR), shard=(1, 1), polling_results_file=[])
    return parser


def parse_arguments(argv: Sequence[str] | None) -> Namespace:
    """The options; what cannot be is refused with what could (exit 2)."""
    parser = build_parser()
    options, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        known, option = re.findall(r"--[a-z-]+", parser.format_help()), unknown[0].split("=")[0]
        longer = [each for each in known if each.startswith(option)]
        near = longer or difflib.get_close_matches(option, known, n=1, cutoff=0.0)
        parser.error(f"unknown option {unknown[0]}: is {near[0]} meant?")
    if bool(options.files) + bool(options.polling_results_file) + options.all > 1:
        parser.error("give only one of FILE, --polling-results-file and --all")
    options.files += options.polling_results_file
    return options


def choose_results_files(options: Namespace, console: Console) -> list[Path]:
    """The results files the command line asks for; raises `JobError` when there are none."""
    if options.files:
        return sorted(options.files, key=results_time, reverse=True)
    places = (".", DEFAULT_OUTPUT_DIR, options.output_dir)
    files = find_results_files(places)
    if not files:
        where = ", ".join(dict.fromkeys(printable(Path(place).absolute()) for place in places))
        raise JobError(f"No polling results found in {where} — run the polling step first")
    if options.all:
        console.say(f"🔍 Found {len(files):,} polling results files")
        return files
    console.say(f"📁 Using latest results file: {printable(files[0].name)}")
    return files[:1]


def do(options: Namespace, console: Console, outcomes: list[Outcome], stats: dict[str, int]) -> str:
    """Do what the command line says; what was wrong with its input.

    Adds to ``outcomes`` and ``stats``. Raises `JobError` and KeyboardInterrupt.
    """
    if options.verify:
        outcomes += verify(options.output_dir, console)
        stats |= count_outcomes(outcomes)
        return ""
    paths = choose_results_files(options, console)
    tasks, errors = read_tasks(paths, console)
    unread = "; ".join(shortened(errors, LISTED))
    if errors and len(errors) == len(paths):
        raise JobError(unread)
    part, parts = options.shard
    tasks = [task for task in tasks if int(digest(fold(task.stub)), 16) % parts == part - 1]
    if options.dry_run:
        outcomes += dry_run(tasks, options.output_dir, console)
        stats |= count_outcomes(outcomes)
    else:
        settings = {name: getattr(options, name) for name in SETTINGS}
        downloader = VideoDownloader(options.output_dir, console=console, **settings)
        downloader.outcomes, downloader.stats = outcomes, stats
        try:
            downloader.run(tasks)
            if options.gallery:
                write_gallery(options.output_dir, console)
        finally:
            downloader.print_final_stats()
    return unread


def stop(number: int, _frame: object) -> NoReturn:
    """Handle Ctrl-C and SIGTERM, once: since a kill at any instant is harmless, by raising."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # `timeout` and CI runners send two
    raise KeyboardInterrupt(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; the exit code, as ``--help`` lists them."""
    options = parse_arguments(argv)
    for number in SIGNALS if __name__ == "__main__" else ():
        signal.signal(number, stop)
    console = Console(options.quiet, options.json)
    outcomes, stats = list[Outcome](), count_outcomes()
    try:
        error = do(options, console, outcomes, stats)
        exit_code = 3 if error or any(outcome.fault for outcome in outcomes) else 0
    except (DownloaderError, OSError) as fatal:  # OSError: the current directory is gone
        exit_code, error = 1, printable(getattr(fatal, "strerror", fatal))
    except KeyboardInterrupt as interrupt:
        number = signal.Signals(interrupt.args[0] if interrupt.args else signal.SIGINT)
        exit_code, error = 128 + number, f"stopped by {number.name}, run again to go on"
    console.complain(*(["", f"❌ {error}"] if error else []))
    if options.json:
        videos = [outcome.as_json() for outcome in outcomes]
        report = {"stats": stats, "videos": videos, "exit_code": exit_code, "error": error or None}
        try:
            print(json.dumps(report, indent=2), flush=True)
        except OSError as unwritten:
            console.complain(f"❌ the JSON could not be written: {unwritten.strerror}")
            return 1
    return exit_code


if __name__ == "__main__":
    try:
        exit_code = main()
    except KeyboardInterrupt as interrupt:  # while its last lines are printed
        exit_code = 128 + interrupt.args[0]
    os._exit(exit_code)  # at once: worker threads may still wait for a server
