#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["requests>=2.25.0"]
# ///
"""Bring every SUCCEEDED Runway video to disk before its link dies.

Reads the polling-results JSON that ``runway_task_polling_loop.py`` leaves, streams each
SUCCEEDED video to ``video_outputs/<stub>.mp4``, writes ``<stub>.json`` beside it and prints
a summary. The file reads as the data flows:

    results file -> tasks -> names and plan -> transfer -> metadata -> outcome -> summary

Pure functions over small immutable records decide; `PartFile`, `Shelf`, `Transfer` and
`DirectoryLock` are the places that touch disk and network; `Console` is the one that prints.

The records are NamedTuples: frozen dataclasses would cost a rerun over 10,000 videos a tenth
of its time, half of that for importing `dataclasses` and making the classes.
"""

from __future__ import annotations

import gc
import signal

if __name__ == "__main__":
    gc.set_threshold(100_000)  # objects: neither imports nor long results files leave cycles
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import argparse
import base64
import contextlib
import errno
import functools
import io
import itertools
import json
import math
import os
import re
import shlex
import stat
import struct
import sys
import threading
import time
import unicodedata
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn, TextIO

if TYPE_CHECKING:  # what a rerun that finds everything can do without is imported where it is used
    from concurrent.futures import Future, ThreadPoolExecutor
    from queue import SimpleQueue
    from subprocess import Popen

    import requests

__version__ = "1.0.0"

DEFAULT_OUTPUT_DIR = "video_outputs"
DEFAULT_WORKERS = 16
MAX_WORKERS = 64
DEFAULT_TIMEOUT_S = 30.0
DEFAULT_RETRIES = 3

BACKOFF_BASE_S = 0.5
BACKOFF_CAP_S = 30.0
RETRY_AFTER_CAP_S = 60.0
STALL_BYTES_PER_SECOND = 1024
COMPUTING_WORKERS = 2  # one in Python, one in TLS, SHA-256 or a write
READ_BYTES = 256 * 1024
HASH_BYTES = 1024 * 1024
HASH_ALONE_BYTES = 8 * 1024 * 1024
HASH_QUEUE = 8
FLUSH_BYTES = 8 * 1024 * 1024
METADATA_READ_BYTES = 4 * 1024
METADATA_MAX_BYTES = 64 * 1024 * 1024
SNIFF_BYTES = 64 * 1024
BYTES_PER_MB = 1024 * 1024

NAME_MAX_BYTES = 255
POSITION_SPACE = 2**30
LOCK_NAME = ".download_succeeded_videos.lock"
LOCK_POLL_S = 0.2
COMMAND_POLL_S = 0.02
REDRAW_S = 0.25
STOP_GRACE_S = 1.0
SAME_SIGNAL_S = 1.0
RATE_WINDOW_S = 5.0

LINK_SHOWN_CHARS = 50
EXISTING_SHOWN = 3
FILES_SHOWN = 10
PROBLEMS_SHOWN = 20
FAILURES_SHOWN = 200
VIDEOS_SHOWN = 50
COMMAND_LINES_SHOWN = 10

EXIT_OK = 0
EXIT_CANNOT = 1
EXIT_INCOMPLETE = 3

RUNWAY_BASE_URL = "https://api.dev.runwayml.com"
RUNWAY_VERSION = "2024-11-06"

RESULTS_PREFIX = "runway_polling_results_"


# --- Errors: the class says whether a retry, or a fresh link, helps --------------------------


class DownloaderError(Exception):
    """Base of everything this script raises on purpose; its text is one line for a person."""


class JobError(DownloaderError):
    """The run as a whole cannot go on: exit 1."""


class ResultsFileError(DownloaderError):
    """A results file cannot be used; the text names it and says why."""


class Stopped(DownloaderError):
    """Ctrl-C, SIGTERM or a failed run asked the work to end."""


class TaskError(DownloaderError):
    """One video failed for good. ``hint`` is what the user can do about it."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


class TransientError(TaskError):
    """The same request may succeed a moment later, after ``retry_after_s`` if the server said."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason, "run again to try once more")
        self.retry_after_s = retry_after_s


class Stalled(TransientError):
    """The server sent nothing, or a ``trickle``, for as long as we wait."""

    def __init__(self, timeout_s: float, trickle: bool) -> None:
        super().__init__(f"stalled: less than 1 kB/s for {timeout_s:g} s")
        self.trickle = trickle


class Trickle(TimeoutError):
    """What a socket raises when next to nothing comes out of it."""


class LinkRefused(TaskError):
    """The link itself is dead (401, 403, 404, 410); a fresh one may work."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the link was refused (HTTP {status})")
        self.status = status


NO_SPACE_ERRNOS = {errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def disk_errors(action: str) -> Iterator[None]:
    """Turn an OSError of the local disk into the failure of the run (full) or of the task."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE_ERRNOS:
            message = f"no space left on the disk, could not {action}: make room, then run again"
            raise JobError(message) from None
        reason = f"could not {action}: {error.strerror or type(error).__name__}"
        raise TaskError(reason, "check the output directory, then run again") from None


class Stop:
    """The one switch that ends a run early, with the reason: a signal, or an error."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.signal_number: int | None = None
        self._signalled = 0.0
        self._interrupts = False
        self.error: JobError | None = None

    def on_signal(self, number: int, _frame: object) -> None:
        """Note the signal; at a later one, end at once.

        Takes no lock, which the interrupted thread may hold: `check` sets the event. The
        same moment's second signal is the first: `timeout` and CI runners send two.
        """
        if not self.signal_number:
            self.signal_number, self._signalled = number, time.monotonic()
        elif time.monotonic() - self._signalled > SAME_SIGNAL_S:
            os._exit(128 + number)
        if self._interrupts:
            raise Stopped

    def fail(self, error: JobError) -> None:
        self.error = self.error or error
        self.event.set()

    def check(self) -> None:
        """Raise `Stopped` if the run is to end; the main thread calls this often."""
        if self.signal_number:
            self.event.set()
        if self.event.is_set():
            raise Stopped

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a signal break off what this thread waits for: a pipe that nobody writes to."""
        self._interrupts = True
        try:
            self.check()
            yield
        finally:
            self._interrupts = False

    def watch(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """``tasks``, until the run is to end."""
        for task in tasks:
            self.check()
            yield task

    def wait(self, seconds: float) -> None:
        """Sleep in a worker, but raise `Stopped` as soon as the run is to end."""
        if self.event.wait(seconds):
            raise Stopped


# --- Text for people: nothing of a link's query, no control characters ------------------------


def printable(text: str) -> str:
    """``text`` with everything a terminal might obey instead of show replaced by ``?``."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else "?" for char in text)


def link_without_query(link: str) -> str:
    """``link`` up to its query or fragment, and without user name and password."""
    bare = re.split(r"[?#]", link, maxsplit=1)[0]
    return re.sub(r"^([a-zA-Z]+://)[^/]*@", r"\1", bare)


def shown_link(link: str) -> str:
    bare = printable(link_without_query(link))
    return bare if len(bare) <= LINK_SHOWN_CHARS else bare[:LINK_SHOWN_CHARS] + "..."


def megabytes(size_bytes: float) -> str:
    return f"{size_bytes / BYTES_PER_MB:.2f} MB"


def shortened(lines: Sequence[str], limit: int, more: str) -> list[str]:
    """At most ``limit`` of ``lines``; what is left out is counted in ``more.format(count)``."""
    left_out = len(lines) - limit
    return list(lines) if left_out <= 0 else [*lines[:limit], more.format(f"{left_out:,}")]


# --- Results files: which ones, and what is in them -------------------------------------------


_TIME_IN_NAME = re.compile(  # YYYYMMDD_HHMMSS, wherever it begins
    r"(?=([0-9]{4})([0-9]{2})([0-9]{2})_([0-9]{2})([0-9]{2})([0-9]{2}))"
)


def find_results_files(directories: Iterable[str | Path]) -> list[Path]:
    """The polling-results files in ``directories``, each once, latest first.

    The time in the name counts, since a clone or copy makes all modification times equal;
    a name without one counts by its modification time. Unreadable directories hold none.
    """
    found: dict[str, Path] = {}
    for directory in dict.fromkeys(map(Path, directories)):
        with contextlib.suppress(OSError, ValueError):
            for name in os.listdir(directory):
                if name.startswith(RESULTS_PREFIX) and name.endswith(".json"):
                    path = Path(directory, name)
                    if path.is_file():
                        found.setdefault(os.path.realpath(path), path)
    return sorted(found.values(), key=lambda path: (results_time(path), path.name), reverse=True)


def results_time(path: Path) -> datetime:
    """When the results in ``path`` were saved, as naive local time."""
    for match in _TIME_IN_NAME.finditer(path.name):
        with contextlib.suppress(ValueError):
            year, month, day, hour, minute, second = map(int, match.groups())
            return datetime(year, month, day, hour, minute, second)
    try:
        return datetime.fromtimestamp(path.stat().st_mtime)
    except (OSError, ValueError, OverflowError):
        return datetime.min


def read_results(path: Path) -> dict[str, Any]:
    """The object in results file ``path``, with its ``task_results`` list.

    Raises `ResultsFileError` in one line for whatever can be wrong with it.
    """
    name = printable(str(path))
    try:
        document = json.loads(
            path.read_bytes().decode("utf-8-sig"),
            parse_int=_number_or_text,
            parse_constant=str,  # NaN and Infinity are not JSON; they must not cost the file
        )
    except OSError as error:
        raise ResultsFileError(f"{name}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ResultsFileError(f"{name}: is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ResultsFileError(f"{name}: is not JSON: {error.msg} ({where})") from None
    except RecursionError:
        raise ResultsFileError(f"{name}: is nested too deeply") from None
    except ValueError as error:
        raise ResultsFileError(f"{name}: cannot be read: {printable(str(error))}") from None
    if not isinstance(document, dict) or not isinstance(document.get("task_results"), list):
        raise ResultsFileError(f'{name}: has no "task_results" list')
    return document


def _number_or_text(digits: str) -> int | str:
    """An integer; as text where Python refuses to make one of so many digits."""
    return int(digits) if len(digits) < 1000 else digits


# --- Tasks: one SUCCEEDED row each ------------------------------------------------------------

TEXT_FIELDS = (
    "task_id",
    "target_filename_stub",
    "image_path",
    "prompt",
    "timestamp",
    "completion_time",
    "status",
)
EXTRA_FIELDS = ("cluster_id", "theme", "duration", "resolution")

_LINK_HEAD = re.compile(  # [user@]host[:port], then path, query, fragment or nothing
    r"https?://(?:[^/?#@]*@)?(?:\[[0-9a-f:.]+\]|[^/?#@:\[\]]+)(?::([0-9]{1,5}))?(?=[/?#]|$)",
    re.IGNORECASE,
)


def usable_link(value: object) -> str:
    """``value`` as an http(s) link that can be asked for, or ``""``."""
    link = value.strip() if isinstance(value, str) else ""
    head = _LINK_HEAD.match(link)
    clean = link.isprintable() and " " not in link and "\\" not in link
    return link if head and clean and int(head[1] or 0) <= 65535 else ""


def link_expiry(link: str) -> float | None:
    """When ``link`` dies, in Unix seconds: ``exp`` of its ``_jwt`` (RFC 7519), unverified.

    ``None`` when the link does not say, or talks nonsense.
    """
    token = re.search(r"[?&]_jwt=[^.&#]*\.([^.&#]+)", link)
    if not token:
        return None
    try:
        payload = base64.urlsafe_b64decode(token[1] + "=" * (-len(token[1]) % 4))
        expiry = json.loads(payload)["exp"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    if isinstance(expiry, bool) or not isinstance(expiry, (int, float)):
        return None
    return float(expiry) if 0 < expiry < 253402300800 else None  # the year 10000: no date


def shown_time(unix_seconds: float) -> str:
    return datetime.fromtimestamp(unix_seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


class Task(NamedTuple):
    """A SUCCEEDED row, checked: ``stub`` is a safe name, ``link`` usable or empty."""

    task_id: str
    stub: str
    link: str
    key: str
    row: Mapping[str, Any]

    def __repr__(self) -> str:
        """Without the link, whose query must not get into anybody's log."""
        return f"Task(task_id={self.task_id!r}, stub={self.stub!r})"

    @property
    def shown_id(self) -> str:
        return printable(self.task_id[:8]) + "..." if self.task_id else "unknown"


def task_key(task_id: str, link: str) -> str:
    """Equal for two rows of the same task: its id; without one the link, query aside."""
    if task_id:
        return f"id {task_id}"
    return f"link {link_without_query(link)}" if link else ""


class Batch(NamedTuple):
    """What one results file holds: ``others`` counts the rows that did not succeed."""

    tasks: list[Task]
    problems: list[str]
    others: Counter[str]


def read_rows(results: Mapping[str, Any]) -> Batch:
    """The SUCCEEDED tasks of a results object, in order, and what is wrong with its rows."""
    batch = Batch([], [], Counter())
    rows = results.get("task_results")
    for number, row in enumerate(rows if isinstance(rows, list) else (), 1):
        if not isinstance(row, dict):
            batch.problems.append(f"Row {number} is not an object: passed over")
            continue
        status = row.get("final_status")
        if status == "SUCCEEDED":
            batch.tasks.append(task_from_row(row, f"Row {number}", batch.problems))
        elif status is None:
            batch.others["still running"] += 1
        elif isinstance(status, str):
            batch.others[printable(status[:20])] += 1
        else:
            batch.problems.append(f'Row {number}: "final_status" is not text: passed over')
    return batch


def task_from_row(row: Mapping[str, Any], name: str, problems: list[str]) -> Task:
    """The task of SUCCEEDED ``row``; a text field of another type counts as missing."""
    wrong = [key for key in TEXT_FIELDS if not isinstance(row.get(key), (str, NoneType))]
    problems += [f'{name}: "{key}" is not text: left out' for key in wrong]
    task_id = text_of(row, "task_id")
    stub = safe_stub(text_of(row, "target_filename_stub")) or default_stub(task_id)
    link = usable_link(row.get("video_url"))
    if not link:
        whose = f"task {printable(task_id[:36])}" if task_id else "no task_id"
        problems.append(f'{name} ({whose}): no usable "video_url"')
    return Task(task_id, stub, link, task_key(task_id, link), row)


def as_row(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def text_of(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return value if isinstance(value, str) else ""


def is_plain(value: object, depth: int = 100) -> bool:
    """Whether any JSON reader takes ``value``: no NaN, no endless number or nesting."""
    if isinstance(value, (list, tuple)):
        return depth > 0 and all(is_plain(each, depth - 1) for each in value)
    if isinstance(value, dict):
        keys_are_text = all(isinstance(key, str) for key in value)
        return depth > 0 and keys_are_text and is_plain(list(value.values()), depth - 1)
    if isinstance(value, int):
        return value.bit_length() < 4096
    return math.isfinite(value) if isinstance(value, float) else isinstance(value, (str, NoneType))


def merge_tasks(batches: Iterable[Iterable[Task]]) -> list[Task]:
    """Each task once, with the first row found that has a link: the freshest comes first."""
    merged: dict[str, Task] = {}
    nameless: list[Task] = []
    for task in itertools.chain.from_iterable(batches):
        if not task.key:
            nameless.append(task)
        elif task.key not in merged or (task.link and not merged[task.key].link):
            merged[task.key] = task
    return [*merged.values(), *nameless]


# --- Names: a stub is a name, never a path ----------------------------------------------------

_UNSAFE = re.compile(
    r'[\x00-\x1f\x7f-\x9f<>:"/\\|?*\ud800-\udfff'  # separators, control, not encodable
    r"\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff]"  # lines and text direction
)
_RESERVED = re.compile(  # https://learn.microsoft.com/windows/win32/fileio/naming-a-file
    r"(?:CON|PRN|AUX|NUL|COM[0-9¹²³]|LPT[0-9¹²³]|CONIN\$|CONOUT\$) *(?:\.|$)", re.IGNORECASE
)

_ID_SUFFIX = re.compile(r"(?<!^video)(?:_[0-9a-f]{8})+$")  # but not that of `default_stub`


def safe_stub(stub: str) -> str:
    """``stub`` as a name any common file system takes; ``""`` when nothing is left of it.

    An ordinary stub comes back to the letter. Leading dots would hide the video.
    """
    name = _UNSAFE.sub("_", stub)
    if not name.strip():
        return ""
    if not name.isascii():
        name = "".join(char if is_encodable(char) else "_" for char in name)
    if name.startswith("."):
        bare = name.lstrip(".")
        name = "_" * (len(name) - len(bare)) + bare
    if _RESERVED.match(name) or name.startswith(RESULTS_PREFIX):
        name = f"_{name}"
    return fit(name)


def is_encodable(char: str) -> bool:
    """Whether file names can hold ``char``: under an old locale they are not UTF-8."""
    try:
        os.fsencode(char)
    except UnicodeEncodeError:
        return False
    return True


def default_stub(task_id: str) -> str:
    return safe_stub(f"video_{task_id[:8]}") if task_id else "video_unknown"


def fit(stub: str, suffix: str = "") -> str:
    """``stub + suffix``, the stub cut so that ``.json`` and ``.mp4`` fit a file name."""
    room = NAME_MAX_BYTES - len(suffix.encode()) - len(".json")
    encoded = stub.encode()
    return (stub if len(encoded) <= room else encoded[:room].decode(errors="ignore")) + suffix


def candidate_stubs(task: Task) -> Iterator[str]:
    """The names ``task`` may get, best first: its stub, with its id, with a number."""
    yield task.stub
    short_id = safe_stub(task.task_id[:8]) or digest(task.key)[:8]
    yield fit(task.stub, f"_{short_id}")
    for number in itertools.count(2):
        yield fit(task.stub, f"_{short_id}_{number}")


def fold(name: str) -> str:
    """The same for two names that some file system takes for one: case and Unicode form."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


class Shard(NamedTuple):
    """The ``number``-th of so many equal ``parts`` parts of all stubs; 1 of 1 is everything.

    Stubs are hashed onto positions, a part is an interval of them. So a part is the same
    whatever else the results hold, and overlap of any two parts of any two sets is plain.
    """

    number: int = 1
    parts: int = 1

    @property
    def positions(self) -> range:
        return range(
            POSITION_SPACE * (self.number - 1) // self.parts,
            POSITION_SPACE * self.number // self.parts,
        )

    def holds(self, stub: str) -> bool:
        return self.parts == 1 or stub_position(stub) in self.positions


EVERYTHING = Shard()


def stub_position(stub: str) -> int:
    """Where ``stub`` stands in the shards' space: together with the names it may get."""
    return int(digest(_ID_SUFFIX.sub("", fold(stub)))[:8], 16) % POSITION_SPACE


# --- MP4 structure (ISO/IEC 14496-12) ---------------------------------------------------------


class Content(Enum):
    """What a body turns out to be. An ODD_MP4 starts like one but cannot be walked."""

    WHOLE_MP4 = "a whole MP4"
    CUT_MP4 = "an MP4 cut short"
    ODD_MP4 = "an MP4 of unknown structure"
    ERROR_PAGE = "an error page"
    OTHER = "not an MP4"


_FIRST_BOXES = {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"pnot"}
_ERROR_PAGE = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:<[A-Za-z!?]|\{\s*["}]|\[\s*[\[{"\]])')
_BOXES_MAX = 100_000


def inspect(file: BinaryIO, size_bytes: int) -> Content:
    """Look at the first bytes of ``file`` and walk its top-level boxes."""
    file.seek(0)
    start = file.read(SNIFF_BYTES)

    def read_at(offset: int) -> bytes:
        if offset + 16 <= len(start):  # as a rule all box heads are near the start
            return start[offset : offset + 16]
        file.seek(offset)
        return file.read(16)

    if start[4:8] in _FIRST_BOXES:
        return walk_boxes(read_at, size_bytes)
    if len(start) < 8 and start[:3] == b"\0\0\0"[: len(start)]:
        return Content.CUT_MP4
    return Content.ERROR_PAGE if _ERROR_PAGE.match(start) else Content.OTHER


def walk_boxes(read_at: Callable[[int], bytes], size_bytes: int) -> Content:
    """ISO/IEC 14496-12, 4.2: size and type; size 1: 64 bits follow; size 0: up to the end."""
    offset = 0
    for _ in range(_BOXES_MAX):
        if offset == size_bytes:
            return Content.WHOLE_MP4
        head = read_at(offset)
        if len(head) < 8:
            return Content.CUT_MP4
        length = int.from_bytes(head[:4], "big")
        if length == 0:
            return Content.WHOLE_MP4
        head_length = 16 if length == 1 else 8
        if length == 1:
            if len(head) < 16:
                return Content.CUT_MP4
            length = int.from_bytes(head[8:], "big")
        if length < head_length:
            return Content.ODD_MP4
        offset += length
        if offset > size_bytes:
            return Content.CUT_MP4
    return Content.ODD_MP4


# --- The plan: which name, and download, adopt or leave ---------------------------------------


class Slot(Enum):
    """What a look at one name found."""

    FREE = "nothing there"
    BROKEN = "an empty video, or an MP4 cut short, without metadata"
    ORPHAN = "a video without metadata"
    OURS = "metadata of this task, but no video"
    DONE = "metadata of this task, and its video"
    TAKEN = "somebody else's"


class Action(Enum):
    DOWNLOAD = "download"
    ADOPT = "adopt"
    KEEP = "keep"


class Plan(NamedTuple):
    """What to do for ``task``, under the name ``stub``, where ``slot`` was found."""

    task: Task
    stub: str
    slot: Slot
    size_bytes: int = 0

    @property
    def action(self) -> Action:
        if self.slot is Slot.DONE:
            return Action.KEEP
        return Action.ADOPT if self.slot is Slot.ORPHAN else Action.DOWNLOAD


def file_bytes(path: str | Path) -> int | None:
    """The size of the file ``path``; ``None`` when it is not there or no regular file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def urgency(plan: Plan) -> tuple[bool, float]:
    """Sorts links that die soonest first, those that do not say when last."""
    expiry = link_expiry(plan.task.link)
    return plan.action is Action.ADOPT, math.inf if expiry is None else expiry


class Shelf:
    """The output directory as one scan saw it; reads each metadata file at most once."""

    def __init__(self, directory: Path) -> None:
        self._prefix = os.path.join(directory, "")
        self._owners: dict[str, str | None] = {}
        self._parts: dict[str, list[PartId]] = {}
        try:
            self._names = dict.fromkeys(os.listdir(directory))
        except FileNotFoundError:
            self._names = {}
        except OSError as error:
            raise JobError(f"{printable(str(directory))}: {error.strerror}") from None
        hidden = [name for name in self._names if name[0] == "."]
        self.has_leftovers = any(name.endswith((".part", ".tmp")) for name in hidden)
        for part_id in filter(None, map(PartId.parse, hidden)):
            self._parts.setdefault(part_id.task_digest, []).append(part_id)

    @functools.cached_property
    def _folded(self) -> dict[str, list[str]]:
        """The names by what they fold to; a rerun that finds all to the letter never asks."""
        folded: dict[str, list[str]] = {}
        for name in self._names:
            folded.setdefault(fold(name), []).append(name)
        return folded

    def names(self, name: str) -> Iterator[str]:
        """The names on disk that are ``name``, but for case and Unicode form; itself first."""
        if name in self._names:
            yield name
        yield from (other for other in self._folded.get(fold(name), ()) if other != name)

    def all_names(self, suffix: str) -> list[str]:
        return [name for name in self._names if name.endswith(suffix)]

    def parts(self, task: Task) -> list[PartId]:
        """The part files that earlier runs left of ``task``."""
        return self._parts.get(PartId.of(task).task_digest, [])

    def owner(self, metadata_name: str) -> str | None:
        """The key of the task that ``metadata_name`` belongs to, or ``None``."""
        if metadata_name not in self._owners:
            self._owners[metadata_name] = read_owner(self._prefix + metadata_name)
        return self._owners[metadata_name]

    def look(self, stub: str, key: str) -> tuple[Slot, str, int]:
        """What stands under ``stub`` for the task ``key``: slot, stub as on disk, bytes."""
        for name in self.names(f"{stub}.json"):
            if name.endswith(".json") and self.owner(name) == key:
                own = name.removesuffix(".json")
                size = file_bytes(f"{self._prefix}{own}.mp4")
                return (Slot.DONE, own, size) if size else (Slot.OURS, own, 0)
        metadata = list(self.names(f"{stub}.json"))
        videos = list(self.names(f"{stub}.mp4"))
        if not metadata and not videos:
            return Slot.FREE, stub, 0
        if metadata or videos != [f"{stub}.mp4"]:
            return Slot.TAKEN, stub, 0
        return self._look_at_orphan(stub)

    def _look_at_orphan(self, stub: str) -> tuple[Slot, str, int]:
        size = file_bytes(f"{self._prefix}{stub}.mp4")
        if size is None:
            return Slot.TAKEN, stub, 0
        if size == 0:
            return Slot.BROKEN, stub, 0
        try:
            with open(f"{self._prefix}{stub}.mp4", "rb") as file:
                content = inspect(file, size)
        except OSError:
            return Slot.TAKEN, stub, 0
        if content is Content.CUT_MP4:
            return Slot.BROKEN, stub, size
        return (Slot.TAKEN if content is Content.ERROR_PAGE else Slot.ORPHAN), stub, size


def plan_task(task: Task, shelf: Shelf, claimed: Mapping[str, str]) -> Plan:
    """Find ``task`` on ``shelf``, or the place it is to have.

    ``claimed`` maps folded stubs that are about to be filled to the key of their task. The
    task's own finished video wins, then a place its metadata already holds, then a video
    without metadata under a name with its id, then the best name nobody has.
    """
    best, best_rank = None, 3
    for number, stub in enumerate(candidate_stubs(task)):
        slot, actual, size = shelf.look(stub, task.key)
        if slot is Slot.DONE:
            return Plan(task, actual, slot, size)
        if slot is not Slot.TAKEN and claimed.get(fold(stub), task.key) == task.key:
            rank = 0 if slot is Slot.OURS else 1 if slot is Slot.ORPHAN and number > 0 else 2
            if rank < best_rank:
                best, best_rank = Plan(task, actual, slot, size), rank
        if best and number > 0 and slot is Slot.FREE:
            return best
    raise AssertionError("the numbers never run out")


def plan_all(tasks: Iterable[Task], shelf: Shelf, claimed: dict[str, str]) -> list[Plan]:
    """Plan ``tasks`` in order, so that a rerun gives each the same name; adds to ``claimed``."""
    plans = []
    for task in tasks:
        plan = plan_task(task, shelf, claimed)
        if plan.slot is not Slot.DONE:
            claimed[fold(plan.stub)] = task.key
        plans.append(plan)
    return plans


# --- What an answer's head says (RFC 9110) ----------------------------------------------------


def parse_length(value: str | None) -> int | None:
    """``Content-Length`` in bytes; ``None`` for nonsense. ``"5, 5"`` is 5 (section 8.6)."""
    lengths = {part.strip() for part in (value or "").split(",")}
    length = lengths.pop() if len(lengths) == 1 else ""
    return int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None


def parse_content_range(value: str | None) -> tuple[int, int, int] | None:
    """First byte, last byte and total of ``Content-Range`` (section 14.4); else ``None``."""
    match = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", (value or "").strip())
    if not match:
        return None
    first, last, total = (int(number) for number in match.groups())
    return (first, last, total) if first <= last < total else None


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Seconds to wait (section 10.2.3), from a number or a date; ``None`` for nonsense."""
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]+", text):
        return float(text[:18])
    from email.utils import parsedate_to_datetime

    try:
        date = parsedate_to_datetime(text)
        if date.tzinfo is None:  # the old form without a zone (5.6.7) is UTC as well
            date = date.replace(tzinfo=timezone.utc)
        return max(0.0, date.timestamp() - now)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def strong_validator(headers: Mapping[str, str]) -> str:
    """What tells this object from any other (section 8.8): ETag, else Last-Modified, or "".

    A weak ETag says that the bytes may differ: nothing may be resumed with it (13.1.5).
    """
    etag = (headers.get("ETag") or "").strip()
    if etag:
        return etag if re.fullmatch(r'"[^"\x00-\x20\x7f]*"', etag) else ""
    return (headers.get("Last-Modified") or "").strip()


class Answer(NamedTuple):
    """The head of a response, nonsense already turned into ``None`` or ``""``."""

    status: int
    length: int | None = None
    content_range: tuple[int, int, int] | None = None
    validator: str = ""
    chunked: bool = False
    encoding: str = ""
    media_type: str = ""
    retry_after_s: float | None = None

    @property
    def total(self) -> int | None:
        """The whole object's bytes, if the answer says them."""
        if self.encoding:
            return None
        if self.status == 206:
            return self.content_range[2] if self.content_range else None
        return self.length


def read_head(status: int, headers: Mapping[str, str], now: float) -> Answer:
    """Read what matters from ``headers`` (case-insensitive); ``now`` in Unix seconds."""
    encoding = (headers.get("Content-Encoding") or "").strip().lower()
    chunked = "chunked" in (headers.get("Transfer-Encoding") or "").lower()
    return Answer(
        status=status,
        length=None if chunked else parse_length(headers.get("Content-Length")),
        content_range=parse_content_range(headers.get("Content-Range")),
        validator=strong_validator(headers),
        chunked=chunked,
        encoding="" if encoding == "identity" else encoding,
        media_type=(headers.get("Content-Type") or "").split(";")[0].strip().lower(),
        retry_after_s=parse_retry_after(headers.get("Retry-After"), now),
    )


_TRANSIENT_STATUSES = {408, 425, 429}
_REFUSED_STATUSES = {401, 403, 404, 410}
_GZIP_WBITS = 16 + zlib.MAX_WBITS
_DECODERS = {"gzip": _GZIP_WBITS, "x-gzip": _GZIP_WBITS, "deflate": zlib.MAX_WBITS}
_PAGE_TYPES = re.compile(r"text/.*|application/(?:json|xml|xhtml\+xml)|.*\+(?:json|xml)")


def check_status(answer: Answer) -> None:
    """Raise what a status other than 200 and 206 means: transient, refused or final."""
    status = answer.status
    if status in (200, 206):
        return
    if status in _TRANSIENT_STATUSES or status >= 500:
        raise TransientError(f"the server answered HTTP {status}", answer.retry_after_s)
    if status in _REFUSED_STATUSES:
        raise LinkRefused(status)
    raise TaskError(f"the server answered HTTP {status}", "check the link in the results file")


def check_content(answer: Answer) -> None:
    """Refuse a body that cannot be the video, before a byte of it is read."""
    if _PAGE_TYPES.fullmatch(answer.media_type):
        kind = printable(answer.media_type)
        raise TaskError(f"the server sent an error page ({kind})", "open it from the results file")
    if answer.length == 0:
        raise TaskError("the server sent an empty body", "check the task in Runway")


class PartId(NamedTuple):
    """Whose part file it is and of which object; all of it is in the file's name.

    A name changes in one step, so no crash can part the bytes from the validator they
    came with. ``total`` 0 or no ``validator``: cannot be resumed.
    """

    position: int
    task_digest: str
    total: int = 0
    validator: str = ""

    @property
    def filename(self) -> str:
        validator = base64.urlsafe_b64encode(self.validator.encode("latin-1", "replace")).decode()
        return f".{self.position:08x}-{self.task_digest}-{self.total}-{validator.rstrip('=')}.part"

    @property
    def resumable(self) -> bool:
        return self.total > 0 and self.validator != ""

    @classmethod
    def of(cls, task: Task, answer: Answer | None = None) -> PartId:
        """The id for the object that ``answer`` begins to send."""
        bare = cls(stub_position(task.stub), digest(task.key)[:16])
        if not answer or not answer.total or not answer.validator:
            return bare
        part_id = cls(bare.position, bare.task_digest, answer.total, answer.validator)
        fits = part_id.validator.isascii() and len(part_id.filename) <= NAME_MAX_BYTES
        return part_id if fits else bare

    @classmethod
    def parse(cls, filename: str) -> PartId | None:
        match = re.fullmatch(
            r"\.([0-9a-f]{8})-([0-9a-f]{16})-([0-9]+)-([\w-]*)\.part", filename, re.ASCII
        )
        if not match:
            return None
        encoded = match[4] + "=" * (-len(match[4]) % 4)
        try:
            validator = base64.urlsafe_b64decode(encoded).decode("latin-1")
        except ValueError:
            return None
        return cls(int(match[1], 16), match[2], int(match[3]), validator)


class Body(Enum):
    """What to do with the body of an answer."""

    WRITE = "write from zero"
    APPEND = "append to the part"
    ASK_AGAIN = "drop the part and ask for everything"


def judge(answer: Answer, part_id: PartId | None, offset: int) -> Body:
    """Decide on the answer to a request that asked for ``offset`` onwards of ``part_id``.

    ``part_id`` is ``None`` when the whole object was asked for. Appends only to the very
    same object (RFC 9110, 15.3.7), even if the server ignored ``If-Range``. Raises what
    `check_status` and `check_content` raise.
    """
    if part_id and answer.status == 416:
        return Body.ASK_AGAIN
    check_status(answer)
    check_content(answer)
    if answer.status == 200:
        return Body.WRITE
    first, last, total = answer.content_range or (-1, -1, -1)
    as_long_as_said = answer.length in (None, last - first + 1)
    if part_id is None:
        if (first, last + 1) == (0, total) and as_long_as_said:
            return Body.WRITE
        raise TransientError("the server sent a part that was not asked for")
    same_object = (total, answer.validator) == (part_id.total, part_id.validator)
    if first == offset and same_object and as_long_as_said and not answer.encoding:
        return Body.APPEND
    return Body.ASK_AGAIN


# --- Transport: requests, with one TLS context and a guard against stalls ---------------------


class Turns:
    """Lets ``count`` workers compute at a time, first come first served; others wait or sleep.

    Python computes in one thread at a time. Sixteen that contend for it change places at
    every TLS record: 400 videos without latency take a seventh less when they take turns.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._queue: deque[threading.Lock] = deque()
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            called = threading.Lock()
            called.acquire()
            self._queue.append(called)
        called.acquire()

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            if self._queue:
                self._queue.popleft().release()
            else:
                self._free += 1

    @contextlib.contextmanager
    def given_back(self) -> Iterator[None]:
        """Let others compute, as long as the caller waits for something."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


class StallGuard(io.RawIOBase):
    """The socket's stream: hands on all that has arrived, raises when next to nothing does.

    Reading as much as is there, and no more, keeps the number of calls low and lets every
    byte reach the disk at once. An error waits until the bytes before it are handed on.
    """

    def __init__(
        self, raw: io.RawIOBase, sock: Any, turns: Turns, clock: Callable[[], float]
    ) -> None:
        self._raw = raw
        self._sock = sock
        self._turns = turns
        self._timeout_s: float | None = sock.gettimeout()
        self._clock = clock
        self._error: OSError | None = None
        self._total = 0
        self._marks: deque[tuple[float, int]] = deque()
        sock.settimeout(0)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.settimeout(self._timeout_s)  # for the next request
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        from urllib3.util.wait import wait_for_read

        view = memoryview(buffer)
        with self._turns.given_back():
            pass  # whoever has waited for a turn is next
        while (count := self._read_arrived(view)) is None:
            with self._turns.given_back():
                if not wait_for_read(self._sock, self._timeout_s):
                    raise TimeoutError
        if count and self._timeout_s:
            self._check_rate(count, self._timeout_s)
        return count

    def _read_arrived(self, view: memoryview) -> int | None:
        """Read what is there, TLS hands it out in bits of 16 kB; ``None`` if nothing is yet."""
        filled = 0
        try:
            if self._error:
                raise self._error
            while filled < len(view) and (count := self._sock.recv_into(view[filled:])):
                filled += count
        except OSError as error:
            if type(error).__name__ in ("BlockingIOError", "SSLWantReadError"):
                return filled or None
            if not filled:
                raise
            self._error = error
        return filled

    def _check_rate(self, count: int, timeout_s: float) -> None:
        """Keep marks of (time, bytes so far) over one timeout's time, and judge by them."""
        now = self._clock()
        self._total += count
        marks = self._marks
        while len(marks) > 1 and marks[1][0] <= now - timeout_s:
            marks.popleft()
        if not marks or now - marks[-1][0] >= timeout_s / 10:
            marks.append((now, self._total))
        since, before = marks[0]
        slow = self._total - before < STALL_BYTES_PER_SECOND * timeout_s
        if slow and now - since >= timeout_s:
            raise Trickle


def make_guard(turns: Turns) -> Callable[[Any], None]:
    """What makes the connections of a urllib3 pool manager read through a `StallGuard`."""
    from http.client import HTTPResponse

    class GuardedResponse(HTTPResponse):
        """Does not wait until a read is full."""

        def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(sock, *args, **kwargs)
            guard = StallGuard(self.fp.detach(), sock, turns, time.monotonic)
            self.fp = io.BufferedReader(guard, READ_BYTES)

        def read(self, amt: int | None = None) -> bytes:
            if amt is None:
                return super().read()
            data = self.read1(amt)
            if self.length == 0 and not self.isclosed():
                self._close_conn()  # type: ignore[attr-defined]
            return data

    def guarded(pool: Any) -> Any:
        base = pool.ConnectionCls
        if base.response_class is GuardedResponse:
            return pool

        def connect(connection: Any) -> None:
            with turns.given_back():
                base.connect(connection)

        extras = {"response_class": GuardedResponse, "connect": connect}
        return type("GuardedPool", (pool,), {"ConnectionCls": type("Guarded", (base,), extras)})

    def guard(manager: Any) -> None:
        pools = manager.pool_classes_by_scheme
        manager.pool_classes_by_scheme = {scheme: guarded(pool) for scheme, pool in pools.items()}

    return guard


def make_session(workers: int, turns: Turns) -> requests.Session:
    """A session for ``workers`` threads, which hold one of the ``turns`` when they use it.

    Connections are kept alive and share one TLS context: left alone, requests loads the CA
    bundle anew for each, 20 ms of CPU each.
    """
    import logging

    import requests

    guard, context = make_guard(turns), make_tls_context()

    class Adapter(requests.adapters.HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, ssl_context=context, **kwargs)
            guard(self.poolmanager)

        def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
            manager = super().proxy_manager_for(proxy, ssl_context=context, **kwargs)
            guard(manager)
            return manager

        def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            return super().send(request, *args, **{**kwargs, "verify": True})

        def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
            """Add nothing: the context holds the bundle and asks for a good certificate."""

    class Session(requests.Session):
        def get_redirect_target(self, resp: requests.Response) -> str | None:
            """Leave a long body of a redirect unread; requests would hold it in memory."""
            target = super().get_redirect_target(resp)
            length = parse_length(resp.headers.get("Content-Length"))
            if target is not None and (length is None or length > READ_BYTES):
                resp.raw.close()
            return target

    for name in ("urllib3.connection", "urllib3.connectionpool"):
        logging.getLogger(name).addFilter(hide_queries)
    session = Session()
    session.trust_env = False  # no .netrc; `proxies_for` asks for the proxies, once per host
    session.headers["User-Agent"] = f"download_succeeded_videos/{__version__}"
    for scheme in ("http://", "https://"):
        session.mount(scheme, Adapter(pool_connections=workers, pool_maxsize=workers))
    return session


def hide_queries(record: Any) -> bool:
    """A log filter: urllib3 logs whole links to a program that listens."""
    arguments = record.args if isinstance(record.args, tuple) else ()
    record.args = tuple(link_without_query(a) if isinstance(a, str) else a for a in arguments)
    return True


@functools.lru_cache
def proxies_for(origin: str) -> dict[str, str]:
    """The proxies that the environment names for ``origin``, a link without its path."""
    from requests.utils import get_environ_proxies

    return dict(get_environ_proxies(origin))


def origin_of(link: str) -> str:
    return "/".join(link.split("/", 3)[:3])


def make_tls_context() -> Any:
    """A verifying context with the CA bundle that requests would take."""
    from requests.utils import DEFAULT_CA_BUNDLE_PATH
    from urllib3.util.ssl_ import create_urllib3_context

    environment = (os.environ.get(name) for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"))
    bundle = next(filter(None, environment), None) or DEFAULT_CA_BUNDLE_PATH
    context = create_urllib3_context()
    try:
        if os.path.isdir(bundle):
            context.load_verify_locations(capath=bundle)
        else:
            context.load_verify_locations(cafile=bundle)
    except OSError as error:
        reason = error.strerror or "not a CA bundle"
        raise JobError(f"the CA bundle {printable(bundle)} cannot be loaded: {reason}") from None
    return context


def explain(error: BaseException, timeout_s: float) -> TaskError:
    """A library's exception in our words: theirs may hold the link, query and all."""
    import ssl

    from requests import exceptions
    from urllib3.exceptions import ReadTimeoutError

    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            reason = f"the server's certificate is not trusted: {cause.verify_message}"
            return TaskError(reason, "set REQUESTS_CA_BUNDLE to the bundle that holds its CA")
        if type(cause).__name__ == "CertificateError":  # urllib3 1.26: of another host
            reason = "the server's certificate is not trusted: it is another host's"
            return TaskError(reason, "check the link in the results file")
    if isinstance(error, exceptions.ConnectTimeout):
        return TransientError(f"no connection within {timeout_s:g} s")
    if isinstance(error, (exceptions.Timeout, ReadTimeoutError, TimeoutError)):
        return Stalled(timeout_s, any(isinstance(cause, Trickle) for cause in causes))
    if isinstance(error, exceptions.TooManyRedirects):
        return TaskError("the link redirects without end", "check the link in the results file")
    if isinstance(error, exceptions.InvalidHeader):
        return TransientError("the server sent contradictory headers")
    if isinstance(error, exceptions.InvalidProxyURL) or "for SOCKS support" in str(error):
        return TaskError("the proxy cannot be used", "check HTTPS_PROXY; socks needs PySocks")
    if isinstance(error, exceptions.ProxyError):
        return TransientError("the proxy cannot be reached or refuses")
    if isinstance(error, ValueError):
        return TaskError("the link leads to an unusable address", "check it in the results file")
    for cause in causes:
        if type(cause).__name__ in ("gaierror", "NameResolutionError"):
            return TransientError("the host name cannot be resolved")
        if isinstance(cause, ssl.SSLError):
            return TransientError(f"TLS failed ({cause.reason or 'no reason given'})")
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno and cause.strerror:
            return TransientError(f"the connection failed: {cause.strerror}")
    return TransientError("the connection was cut")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it was made of, whichever way the libraries wrapped it."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        each = waiting.pop()
        if isinstance(each, BaseException) and id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [*each.args, getattr(each, "reason", None), each.__cause__, each.__context__]


def network_errors() -> tuple[type[Exception], ...]:
    """What code that talks to a server may raise, for `explain`."""
    from http.client import HTTPException

    from requests.exceptions import RequestException
    from urllib3.exceptions import HTTPError

    return RequestException, HTTPError, HTTPException, OSError, ValueError


# --- Part files: hidden, written as bytes arrive ----------------------------------------------


_BINARY = getattr(os, "O_BINARY", 0)  # Windows


class Hasher:
    """The SHA-256 of a stream; a long one is hashed in a thread beside its transfer.

    That takes a third off the time of a 1 GB video: the hash costs as much as the transfer.
    """

    def __init__(self) -> None:
        import hashlib

        self._sha256 = hashlib.sha256()
        self._size_bytes = 0
        self._thread: ThreadPoolExecutor | None = None
        self._pending: deque[Future[None]] = deque()

    def update(self, data: bytes) -> None:
        self._size_bytes += len(data)
        if self._size_bytes < HASH_ALONE_BYTES:
            self._sha256.update(data)
            return
        if not self._thread:
            from concurrent.futures import ThreadPoolExecutor

            self._thread = ThreadPoolExecutor(1, "sha256")
        self._pending.append(self._thread.submit(self._sha256.update, data))
        if len(self._pending) > HASH_QUEUE:
            self._pending.popleft().result()

    def hexdigest(self) -> str:
        self.close()
        return self._sha256.hexdigest()

    def close(self) -> None:
        if self._thread:
            self._thread.shutdown()
            self._thread = None


class PartFile:
    """The growing file of one download, with the SHA-256 of what is in it."""

    def __init__(self, directory: Path, part_id: PartId) -> None:
        """Open the part file of ``part_id`` as it stands, reading what it holds already."""
        self.id = part_id
        self.path = directory / part_id.filename
        self.size_bytes = 0
        self._hasher = Hasher()
        self._flushed = 0
        with disk_errors("write to the output directory"):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | _BINARY, 0o666)
            self.file = io.FileIO(descriptor, "r+b")
            while block := self.file.read(HASH_BYTES):
                self._add(block)

    @classmethod
    def reopen(cls, directory: Path, part_ids: Iterable[PartId]) -> PartFile | None:
        """The first of ``part_ids`` that can be resumed; the others are removed."""
        found = None
        for part_id in part_ids:
            if found or not part_id.resumable:
                remove(directory / part_id.filename)
                continue
            found = cls(directory, part_id)
            if not 0 < found.size_bytes <= part_id.total:
                found.discard()
                found = None
        return found

    @property
    def sha256(self) -> str:
        return self._hasher.hexdigest()

    @property
    def complete(self) -> bool:
        return self.id.resumable and self.size_bytes == self.id.total

    def _add(self, data: bytes) -> None:
        self._hasher.update(data)
        self.size_bytes += len(data)

    def write(self, data: bytes) -> None:
        with disk_errors("write the video"):
            write_all(self.file, data)
        self._add(data)
        if self.size_bytes - self._flushed >= FLUSH_BYTES:
            self._start_flush()

    def _start_flush(self) -> None:
        """Have the kernel write now what `sync` would have to wait for at the end."""
        if hasattr(os, "posix_fadvise"):  # on Linux it starts the writing and does not wait
            length = self.size_bytes - self._flushed
            descriptor = self.file.fileno()
            os.posix_fadvise(descriptor, self._flushed, length, os.POSIX_FADV_DONTNEED)
        self._flushed = self.size_bytes

    def content(self) -> Content:
        with disk_errors("read the video back"):
            return inspect(self.file, self.size_bytes)

    def sync(self) -> None:
        with disk_errors("write the video"):
            os.fsync(self.file.fileno())
            self.file.close()

    def close(self) -> None:
        """Close it; what a later run could not resume is removed."""
        self._hasher.close()
        with contextlib.suppress(OSError):
            self.file.close()
        if not self.id.resumable or not self.size_bytes:
            remove(self.path)

    def discard(self) -> None:
        self.close()
        remove(self.path)


def write_all(file: io.FileIO, data: bytes) -> None:
    """Write all of ``data``: a nearly full disk takes a part of it and says nothing."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) or 0 :]


def hash_file(path: Path, stop: Stop) -> tuple[int, str]:
    """Bytes and SHA-256 of ``path``, read in constant memory; raises `TaskError`."""
    import hashlib

    size_bytes, sha256 = 0, hashlib.sha256()
    with disk_errors(f"read {printable(path.name)}"), open(path, "rb", buffering=0) as file:
        while block := file.read(HASH_BYTES):
            stop.check()
            sha256.update(block)
            size_bytes += len(block)
    return size_bytes, sha256.hexdigest()


def remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def sweep(directory: Path, positions: range, keep: set[str]) -> None:
    """Remove what downloads left at ``positions``, but for the tasks with digests ``keep``."""
    pattern = re.compile(r"\.([0-9a-f]{8})-([0-9a-f]{16})[\w-]*\.(?:part|tmp)", re.ASCII)
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            match = pattern.fullmatch(name)
            if match and int(match[1], 16) in positions and match[2] not in keep:
                remove(directory / name)


# --- Transfer: attempts, back-off, resume, a fresh link ---------------------------------------


class Settings(NamedTuple):
    """How to download; times in seconds."""

    workers: int = DEFAULT_WORKERS
    timeout_s: float = DEFAULT_TIMEOUT_S
    retries: int = DEFAULT_RETRIES
    shard: Shard = EVERYTHING
    command: tuple[str, ...] = ()


def backoff_s(failures: int, retry_after_s: float | None, jitter: float) -> float:
    """Seconds before the next try: exponential, ``jitter`` in [0, 1) halves it at most."""
    delay = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2.0 ** min(failures - 1, 10))
    return max(delay * (0.5 + jitter / 2), retry_after_s or 0.0)


class Retries:
    """Counts the tries of one task, waits between them and remembers why."""

    def __init__(self, limit: int, wait: Callable[[float], None]) -> None:
        self.limit = limit
        self.reasons: list[str] = []
        self._failures = 0
        self._wait = wait

    def renew(self) -> None:
        """Bytes came: all tries are left again."""
        self._failures = 0

    def back_off(self, error: TransientError) -> None:
        """Wait until it is time for another try; raise ``error`` when none is left."""
        if (error.retry_after_s or 0) > RETRY_AFTER_CAP_S:
            reason = f"{error.reason} and asks to wait {error.retry_after_s:.0f} s"
            raise TaskError(reason, "run again after that time") from None
        if self._failures >= self.limit:
            tries = len(self.reasons) + 1
            reason = error.reason if tries == 1 else f"{error.reason} (tried {tries} times)"
            raise TaskError(reason, error.hint) from None
        import random

        self._failures += 1
        self.reasons.append(error.reason)
        self._wait(backoff_s(self._failures, error.retry_after_s, random.random()))


class Progress:
    """What the live line needs to know of all transfers; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.received = 0
        self._sizes: dict[str, tuple[int, int | None]] = {}

    def note(self, key: str, size_bytes: int, total: int | None, received: int) -> None:
        """Task ``key`` has ``size_bytes`` of ``total`` on disk, ``received`` of them now."""
        with self._lock:
            self.received += received
            self._sizes[key] = (size_bytes, total)

    def sizes(self) -> list[tuple[int, int | None]]:
        with self._lock:
            return list(self._sizes.values())


class Decoder:
    """Undoes a Content-Encoding that was not asked for, in bounded memory."""

    def __init__(self, encoding: str) -> None:
        self._wbits = _DECODERS[encoding]
        self._decompressor = zlib.decompressobj(self._wbits)
        self._is_fresh = True

    def feed(self, data: bytes) -> Iterator[bytes]:
        try:
            while data:
                if self._decompressor.eof:
                    self._start_next_member()
                yield self._decompress(data)
                data = self._decompressor.unconsumed_tail or self._decompressor.unused_data
        except zlib.error:
            raise TransientError("the encoded body is damaged") from None

    def _start_next_member(self) -> None:
        """A gzip body may be a series of members (RFC 1952, 2.2)."""
        if self._wbits != _GZIP_WBITS:
            raise TransientError("the encoded body is damaged")
        self._decompressor = zlib.decompressobj(self._wbits)

    def _decompress(self, data: bytes) -> bytes:
        """Some servers send deflate without its zlib head (RFC 9110, 8.4.1.2)."""
        is_fresh, self._is_fresh = self._is_fresh, False
        try:
            return self._decompressor.decompress(data, READ_BYTES)
        except zlib.error:
            if not is_fresh or self._wbits == _GZIP_WBITS:
                raise
            self._decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
            return self._decompressor.decompress(data, READ_BYTES)

    def finish(self) -> bytes:
        """The rest; raises `TransientError` when the encoded body did not come to its end."""
        rest = self._decompressor.flush()
        if not self._decompressor.eof:
            raise TransientError("the encoded body is cut")
        return rest


class Workplace(NamedTuple):
    """What all transfers of a run share."""

    directory: Path
    shelf: Shelf
    settings: Settings
    session: requests.Session
    turns: Turns
    stop: Stop
    progress: Progress
    wait: Callable[[float], None]


class Transfer:
    """Brings one task's video, whole, into its part file."""

    def __init__(self, task: Task, place: Workplace) -> None:
        self.task = task
        self.place = place
        self.retries = Retries(place.settings.retries, place.wait)
        self.refreshed = False
        self.warning = ""
        self._link = task.link
        self._part: PartFile | None = None
        self._most_bytes = 0

    def run(self) -> PartFile:
        """The part file with the whole video; raises `TaskError`, `JobError`, `Stopped`."""
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(self._close)
            self._part = PartFile.reopen(self.place.directory, self.place.shelf.parts(self.task))
            part = self._try_until_whole()
            cleanup.pop_all()
        return part

    def _try_until_whole(self) -> PartFile:
        while True:
            self.place.stop.check()
            try:
                part = self._part if self._part and self._part.complete else self._fetch()
                self._check_content(part)
                return part
            except LinkRefused as error:
                self._refresh(error)
            except TransientError as error:
                self._note_progress(error)
                self.retries.back_off(error)

    def _note_progress(self, error: TransientError) -> None:
        """Renew the tries if this one got further than any; drop what cannot be resumed.

        A trickle is no progress, or a server that trickles would keep us for days.
        """
        part = self._part
        is_trickle = isinstance(error, Stalled) and error.trickle
        if part and part.size_bytes > self._most_bytes:
            self._most_bytes = part.size_bytes
            if not is_trickle:
                self.retries.renew()
        if part and not (part.id.resumable and part.size_bytes):
            self._drop()

    def _fetch(self) -> PartFile:
        """One request for what is missing, its body written as it arrives."""
        part = self._part
        with self.place.turns, self._open(part) as response:
            answer = read_head(response.status_code, response.headers, time.time())
            todo = judge(answer, part.id if part else None, part.size_bytes if part else 0)
            if not part or todo is not Body.APPEND:
                self._drop()
                part = None
            if todo is Body.WRITE:
                part = self._part = PartFile(self.place.directory, PartId.of(self.task, answer))
            if part:
                self._receive(response, answer, part)
                return part
        return self._fetch()

    def _open(self, part: PartFile | None) -> requests.Response:
        """Ask for the video, from where ``part`` ends."""
        import requests

        if not self._link:
            raise LinkRefused(0)
        headers = {"Accept-Encoding": "identity"}
        if part:
            headers |= {"Range": f"bytes={part.size_bytes}-", "If-Range": part.id.validator}
        session, timeout_s = self.place.session, self.place.settings.timeout_s
        try:
            request = requests.Request("GET", self._link, {**session.headers, **headers})
            return session.send(
                request.prepare(),  # without the session's cookies
                timeout=(timeout_s, timeout_s),
                stream=True,
                proxies=proxies_for(origin_of(self._link)),
            )
        except network_errors() as error:
            raise explain(error, timeout_s) from None

    def _receive(self, response: requests.Response, answer: Answer, part: PartFile) -> None:
        """Write the body to ``part`` and count it against what the head announced."""
        decoder = Decoder(answer.encoding) if answer.encoding in _DECODERS else None
        received = 0
        while data := self._read(response):
            self.place.stop.check()
            received += len(data)
            for piece in decoder.feed(data) if decoder else (data,):
                part.write(piece)
            self.place.progress.note(self.task.key, part.size_bytes, answer.total, len(data))
        if answer.length is not None and received < answer.length:
            raise TransientError("the connection was cut")
        if decoder:
            part.write(decoder.finish())
        if part.size_bytes == 0 and not answer.chunked and not decoder:
            raise TransientError("the connection was closed before the first byte")
        if part.size_bytes == 0:
            raise TaskError("the server sent an empty body", "check the task in Runway")
        if answer.encoding and not decoder and part.content() is not Content.WHOLE_MP4:
            kind = printable(answer.encoding)
            raise TaskError(f"the server sent an unknown encoding ({kind})", "report it to them")
        if part.id.resumable and part.size_bytes != part.id.total:
            raise TransientError("the server sent fewer bytes than it announced")

    def _read(self, response: requests.Response) -> bytes:
        try:
            data: bytes = response.raw.read(READ_BYTES, decode_content=False)
        except network_errors() as error:
            raise explain(error, self.place.settings.timeout_s) from None
        return data

    def _check_content(self, part: PartFile) -> None:
        content = part.content()
        if content is Content.ERROR_PAGE:
            self._drop()
            raise TaskError("the server sent an error page", "open it from the results file")
        if content is Content.CUT_MP4:
            error = TransientError("the video is an MP4 cut short")
            self._note_progress(error)
            self._drop()
            raise error
        if content is not Content.WHOLE_MP4:
            self.warning = f"kept, but it is {content.value}: look at it"

    def _refresh(self, error: LinkRefused) -> None:
        """Take a fresh link from Runway, once; else fail and say what would help."""
        expiry = link_expiry(self._link)
        reason = refusal(self._link, error, expiry, time.time())
        if self.refreshed:
            raise TaskError(f"the fresh {reason.removeprefix('the ')}", "run again later") from None
        secret = api_secret()
        if not secret:
            hint = "set RUNWAYML_API_SECRET and run again to fetch a fresh link"
            raise TaskError(reason, hint) from None
        self.refreshed = True
        try:
            self._link = self._ask_for_link(secret)
        except TaskError as api_error:
            raise TaskError(f"{reason}; {api_error.reason}", api_error.hint) from None

    def _ask_for_link(self, secret: str) -> str:
        while True:
            try:
                with self.place.turns:
                    return fetch_fresh_link(self.task.task_id, secret, self.place)
            except TransientError as error:
                self.retries.back_off(error)

    def _drop(self) -> None:
        if self._part:
            self._part.discard()
            self._part = None

    def _close(self) -> None:
        if self._part:
            self._part.close()


def refusal(link: str, error: LinkRefused, expiry: float | None, now: float) -> str:
    """Why ``link`` did not give the video, with its expiry if that is known."""
    if not link:
        return 'the row has no usable "video_url"'
    if expiry is None:
        return error.reason
    if expiry <= now:
        return f"the link expired on {shown_time(expiry)} (HTTP {error.status})"
    return f"{error.reason}, though it is valid until {shown_time(expiry)}"


# --- The Runway API: a fresh link for a dead one ----------------------------------------------


def api_secret() -> str:
    return os.environ.get("RUNWAYML_API_SECRET", "").strip()


def fetch_fresh_link(task_id: str, secret: str, place: Workplace) -> str:
    """A new link to the video of ``task_id`` (https://docs.dev.runwayml.com/api/).

    Raises `TransientError` where another try may help, else `TaskError`. Redirects are not
    followed: the key is for this host alone.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", task_id):
        raise TaskError("Runway cannot be asked without a task_id", "check the results file")
    if not re.fullmatch(r"[\x21-\x7e]+", secret):
        raise TaskError("RUNWAYML_API_SECRET is not a key", "set it to the key alone")

    def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {secret}"
        return request

    base_url = os.environ.get("RUNWAYML_BASE_URL", "").strip().rstrip("/") or RUNWAY_BASE_URL
    timeout_s = place.settings.timeout_s
    try:
        response = place.session.get(
            f"{base_url}/v1/tasks/{task_id}",
            headers={"X-Runway-Version": RUNWAY_VERSION, "Accept": "application/json"},
            auth=sign,
            timeout=(timeout_s, timeout_s),
            proxies=proxies_for(origin_of(base_url)),
            allow_redirects=False,
        )
        body = response.content
    except network_errors() as error:
        fault = explain(error, timeout_s)
        if isinstance(fault, TransientError):
            raise TransientError(f"Runway API: {fault.reason}") from None
        raise TaskError(f"Runway API: {fault.reason}", "check RUNWAYML_BASE_URL") from None
    length = parse_length(response.headers.get("Content-Length"))
    if length is not None and response.raw.tell() < length:  # urllib3 1.26 says nothing
        raise TransientError("Runway API: the connection was cut")
    check_api_status(read_head(response.status_code, response.headers, time.time()))
    return read_api_answer(body)


def check_api_status(answer: Answer) -> None:
    status = answer.status
    if status == 200:
        return
    if status in _TRANSIENT_STATUSES or status >= 500:
        raise TransientError(f"Runway API: answered HTTP {status}", answer.retry_after_s)
    if status in (401, 403):
        raise TaskError(f"Runway API: refused the key (HTTP {status})", "check RUNWAYML_API_SECRET")
    if status == 404:
        raise TaskError("Runway API: knows no such task (HTTP 404)", "make the video again")
    raise TaskError(f"Runway API: answered HTTP {status}", "check RUNWAYML_BASE_URL")


def read_api_answer(body: bytes) -> str:
    """The first usable link in ``output`` of a task as the API describes it."""
    try:
        task = json.loads(body)
    except (ValueError, RecursionError):
        task = None
    if not isinstance(task, dict):
        raise TaskError("Runway API: the answer is not a task", "check RUNWAYML_BASE_URL")
    status = task.get("status", "SUCCEEDED")
    if status != "SUCCEEDED":
        reason = f"Runway API: the task is no longer SUCCEEDED but {printable(str(status)[:20])}"
        raise TaskError(reason, "make the video again")
    output = task.get("output")
    link = usable_link(output[0]) if isinstance(output, list) and output else ""
    if not link:
        raise TaskError("Runway API: the task has no output", "make the video again")
    return link


# --- Metadata: <stub>.json --------------------------------------------------------------------


_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY
_OWNER_LINE = re.compile(rb'\n  "runway_task_json": \{\n    "task_id": "([ !#-\[\]-~]+)",\n')


def build_metadata(
    task: Task, video_name: str, size_bytes: int, sha256: str, now: datetime
) -> dict[str, Any]:
    """What ``<stub>.json`` holds; ``now`` in naive local time, as the poller writes it."""
    row = task.row
    runway_task = {
        "task_id": task.task_id,
        "final_status": text_of(row, "final_status"),
        "completion_time": text_of(row, "completion_time"),
        "video_url": text_of(row, "video_url"),
        "original_status": text_of(row, "status"),
        "timestamp": text_of(row, "timestamp"),
    }
    extras = {key: row[key] for key in EXTRA_FIELDS if row.get(key) is not None}
    extras = {key: value for key, value in extras.items() if is_plain(value)}
    seed = row.get("seed")
    return {
        "video_file": video_name,
        "download_timestamp": now.isoformat(timespec="microseconds"),
        "input_path": text_of(row, "image_path"),
        "prompt": text_of(row, "prompt"),
        "seed": seed if is_plain(seed) else None,
        "runway_task_json": runway_task | extras,
        "target_filename_stub": text_of(row, "target_filename_stub"),
        "file_info": {
            "size_bytes": size_bytes,
            "size_mb": round(size_bytes / BYTES_PER_MB, 2),
            "sha256": sha256,
        },
    }


def encode_metadata(metadata: Mapping[str, Any]) -> bytes:
    """``metadata`` as JSON in UTF-8, readable as it is; only lone surrogates are escaped."""
    text = json.dumps(metadata, indent=2, ensure_ascii=False)
    text = re.sub(r"[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)
    return text.encode()


def metadata_path(video: Path) -> Path:
    return video.with_name(video.name.removesuffix(".mp4") + ".json")


def read_bytes(path: str | Path) -> bytes:
    """All of a small file; not blocking, so that a pipe called x.json does not hang the run."""
    descriptor = os.open(path, _READ_FLAGS)
    try:
        data = os.read(descriptor, METADATA_READ_BYTES)
        while len(data) % METADATA_READ_BYTES == 0 and len(data) < METADATA_MAX_BYTES:
            if not (more := os.read(descriptor, len(data))):
                break
            data += more
    finally:
        os.close(descriptor)
    return data


def parse_metadata(data: bytes) -> dict[str, Any] | None:
    """The object in ``data``; ``None`` for what is not ours to understand."""
    try:
        document = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def read_metadata(path: Path) -> dict[str, Any] | None:
    try:
        return parse_metadata(read_bytes(path))
    except OSError:
        return None


def metadata_owner(metadata: Mapping[str, Any] | None) -> str | None:
    """The key of the task that ``metadata`` names, ``None`` if it names none."""
    runway_task = metadata.get("runway_task_json") if metadata else None
    if not isinstance(runway_task, dict):
        return None
    task_id = text_of(runway_task, "task_id")
    return task_key(task_id, "" if task_id else usable_link(runway_task.get("video_url"))) or None


def read_owner(path: str) -> str | None:
    """The key of the task that metadata file ``path`` names.

    A rerun over 10,000 videos spends a tenth of its time parsing their metadata, so the id is
    taken from where `encode_metadata` puts it; no JSON text can hold the line breaks around it.
    """
    try:
        data = read_bytes(path)
    except OSError:
        return None
    line = _OWNER_LINE.search(data)
    if line and data.startswith(b"{\n") and data.endswith(b"\n}"):
        return task_key(line[1].decode(), "")
    return metadata_owner(parse_metadata(data))


def publish(hidden: Path, final: Path, replaces: bool) -> None:
    """Give ``hidden`` its final name in one step.

    Unless it ``replaces`` what is there, raises FileExistsError rather than overwrite: another
    program, or another part of a shard set, may have taken the name a moment ago.
    """
    if not replaces:
        try:
            os.link(hidden, final)
        except FileExistsError:
            raise
        except (OSError, AttributeError, NotImplementedError):  # no hard links here
            if os.path.lexists(final):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        else:
            os.unlink(hidden)
            return
    os.replace(hidden, final)


def write_metadata(path: Path, task: Task, metadata: Mapping[str, Any], replaces: bool) -> None:
    """Write ``metadata`` to ``path``, whole or not at all: synced under a hidden name first."""
    bare_name = PartId.of(task).filename
    temporary = path.with_name(bare_name.removesuffix("part") + "tmp")
    remove(temporary)  # after a kill it may be a second link to published metadata
    try:
        with open(temporary, "xb", buffering=0) as file:
            write_all(file, encode_metadata(metadata))
            os.fsync(file.fileno())
        publish(temporary, path, replaces)
    except OSError:
        remove(temporary)
        raise


# --- Outcomes, and how they look --------------------------------------------------------------


class Status(str, Enum):
    DOWNLOADED = "downloaded"
    EXISTS = "exists"
    FAILED = "failed"


class Outcome(NamedTuple):
    """What became of one task: ``path`` and ``size_bytes`` of its video, or why it failed."""

    task: Task
    status: Status
    directory: Path
    stub: str
    size_bytes: int | None = None
    reason: str = ""
    hint: str = ""
    notes: tuple[str, ...] = ()
    history: tuple[str, ...] = ()
    command_error: str = ""

    @property
    def task_id(self) -> str:
        return self.task.task_id

    @property
    def path(self) -> Path | None:
        """The video; ``None`` if there is none."""
        return None if self.status is Status.FAILED else self.directory / f"{self.stub}.mp4"

    @property
    def error(self) -> str:
        """One line: why it failed, and what the user can do."""
        return " — ".join(filter(None, (self.reason, self.hint)))


def failed(plan: Plan, directory: Path, error: TaskError, history: Sequence[str] = ()) -> Outcome:
    return Outcome(
        plan.task,
        Status.FAILED,
        directory,
        plan.stub,
        reason=error.reason,
        hint=error.hint,
        history=tuple(history),
    )


def outcome_lines(outcome: Outcome, number: str) -> list[str]:
    """The block of lines about one task; ``number`` is ``"k/N "`` or empty."""
    task = outcome.task
    stub = printable(outcome.stub)
    name = f"{stub}.mp4"
    lines = ["", f"  {number}Task {task.shown_id}"]
    if outcome.status is Status.EXISTS:
        return [*lines, f"  ⚠️ Already exists: {name}", *outcome.notes]
    lines.append(f"  🎬 Downloading: {name}")
    if task.link:
        lines.append(f"  📥 Streaming download from: {shown_link(task.link)}")
    lines += outcome.history
    if outcome.status is Status.FAILED:
        return [*lines, f"  ❌ Failed: {outcome.error}"]
    size = megabytes(outcome.size_bytes or 0)
    lines += [f"  📊 File size: {size}", f"  ✅ Downloaded: {size}"]
    return [*lines, f"  📄 Metadata saved: {stub}.json", *outcome.notes]


def failure_line(outcome: Outcome) -> str:
    return f"  • {outcome.task.shown_id} {printable(outcome.stub)}.mp4: {outcome.error}"


def statistics_lines(stats: Mapping[str, int], outcomes: Iterable[Outcome]) -> list[str]:
    """The summary, then each failed task with its reason and what to do."""
    total = stats["total_succeeded"]
    on_disk = stats["downloaded"] + stats["already_exists"]
    lines = [
        "",
        "=" * 60,
        "📊 DOWNLOAD STATISTICS",
        "=" * 60,
        f"✅ Total SUCCEEDED tasks found: {total}",
        f"📥 Videos downloaded: {stats['downloaded']}",
        f"⚠️ Already existed: {stats['already_exists']}",
        f"❌ Failed downloads: {stats['failed_downloads']}",
    ]
    if total:
        lines.append(f"📈 Success rate: {100 * on_disk / total:.1f}%")
    failures = [failure_line(each) for each in outcomes if each.status is Status.FAILED]
    commands = [
        f"  • {printable(each.stub)}.mp4: {each.command_error} — run it by hand, a rerun does not"
        for each in outcomes
        if each.command_error
    ]
    for title, listed in (("Failed:", failures), ("Saved, but not handed on:", commands)):
        if listed:
            lines += ["", f"❌ {title}", *shortened(listed, FAILURES_SHOWN, "  … and {} more")]
    return lines


def storage_lines(directory: Path, videos: Mapping[str, int]) -> list[str]:
    """The videos in ``directory``, by name and bytes, and what they take together."""
    if not videos:
        return []
    names = sorted(videos)
    listed = [f"  • {printable(name)} ({megabytes(videos[name])})" for name in names[:VIDEOS_SHOWN]]
    if len(names) > VIDEOS_SHOWN:
        listed.append(f"  … and {len(names) - VIDEOS_SHOWN:,} more")
    return [
        "",
        f"📁 Videos in {printable(str(directory))}:",
        *listed,
        "",
        f"💾 Total storage used: {megabytes(sum(videos.values()))}",
    ]


def video_sizes(directory: Path, names: Iterable[str], known: Mapping[str, int]) -> dict[str, int]:
    """Name and bytes of the visible files ``names``; looks only at those not ``known``."""
    visible = [name for name in names if name[0] != "."]
    sizes = {name: known.get(name) or file_bytes(directory / name) for name in visible}
    return {name: size for name, size in sizes.items() if size is not None}


def others_line(others: Mapping[str, int]) -> list[str]:
    """The one line about the tasks that did not succeed, if there are any."""
    counts = ", ".join(f"{count:,} {status}" for status, count in others.items())
    return [f"  ℹ️ Not downloaded: {counts}"] if counts else []


def transfer_history(transfer: Transfer) -> list[str]:
    """What happened on the way that a person should know."""
    history = []
    if transfer.refreshed:
        history.append("  🔑 Asked the Runway API for a fresh link")
    if transfer.retries.reasons:
        reasons = "; ".join(dict.fromkeys(transfer.retries.reasons))
        count = len(transfer.retries.reasons)
        history.append(f"  🔁 Retried {'once' if count == 1 else f'{count} times'}: {reasons}")
    return history


# --- The console: the one place that prints ---------------------------------------------------


class Console:
    """Prints blocks of lines to ``out``, and a live line to a terminal on stderr.

    A reader that goes away or an encoding without emoji never breaks the run.
    """

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out
        self._lock = threading.Lock()
        self._live = ""
        self._mute = False

    def print(self, *lines: str) -> bool:
        """Whether ``lines`` could be printed."""
        with self._lock:
            self._clear()
            out = self._out or sys.stdout
            if out is None or self._mute or not lines:
                return not lines
            text = "\n".join(lines) + "\n"
            try:
                encoding = getattr(out, "encoding", None) or "utf-8"
                out.write(text.encode(encoding, "replace").decode(encoding))
                getattr(out, "flush", bool)()
            except (OSError, ValueError):
                self._mute = True
            return not self._mute

    @property
    def has_live_line(self) -> bool:
        try:
            return sys.stderr.isatty()
        except (AttributeError, ValueError):  # none, closed, or a caller's stand-in
            return False

    def draw(self, live: str) -> None:
        """Show ``live`` as the live line; ``""`` clears it. Nothing of it off a terminal."""
        with self._lock:
            if live != self._live:
                self._clear()
                self._write_live(live)
                self._live = live

    def _clear(self) -> None:
        if self._live:
            self._write_live("\r\x1b[K")
            self._live = ""

    def _write_live(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            encoding = sys.stderr.encoding or "utf-8"
            sys.stderr.write(text.encode(encoding, "replace").decode(encoding))
            sys.stderr.flush()


def terminal_columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


class Live(NamedTuple):
    """One moment of a run, as the live line shows it. Bytes; seconds.

    ``expected`` is ``None`` before the first answer; ``estimated`` until the last video's.
    """

    done: int
    videos: int
    received: int
    expected: int | None
    estimated: bool
    bytes_per_second: float

    def text(self, columns: int) -> str:
        """The live line in less than ``columns``: what does not fit is left out, last first."""
        line = f"⏬ {self.done}/{self.videos}"
        for part in self._amounts():
            if len(line) + len(part) + 4 > columns:  # two blanks, and the arrow is two wide
                break
            line += f"  {part}"
        return line

    def _amounts(self) -> Iterator[str]:
        received = f"{self.received / BYTES_PER_MB:.1f}"
        rate = f"{self.bytes_per_second / BYTES_PER_MB:.1f} MB/s"
        if not self.expected:
            yield from (f"{received} MB", rate)
            return
        about = "~" if self.estimated else ""
        yield f"{received}/{about}{self.expected / BYTES_PER_MB:.1f} MB"
        yield f"{about}{min(100, 100 * self.received // self.expected)}%"
        yield rate
        if self.bytes_per_second > 0:
            left_s = max(0, self.expected - self.received) / self.bytes_per_second
            yield f"{shown_duration(left_s)} left"


def shown_duration(seconds: float) -> str:
    minutes, rest = divmod(round(min(seconds, 359999)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Meter:
    """Makes `Live` moments from `Progress`; the rate is that of the last few seconds."""

    def __init__(self, progress: Progress, transfers: int, clock: Callable[[], float]) -> None:
        self._progress = progress
        self._transfers = transfers
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque([(clock(), 0)])

    def moment(self, done: int, videos: int) -> Live:
        now, received = self._clock(), self._progress.received
        self._samples.append((now, received))
        while len(self._samples) > 2 and self._samples[1][0] < now - RATE_WINDOW_S:
            self._samples.popleft()
        since, before = self._samples[0]
        rate = (received - before) / (now - since) if now > since else 0.0
        sizes = self._progress.sizes()
        totals = [total for _, total in sizes if total]
        return Live(
            done=done,
            videos=videos,
            received=sum(size for size, _ in sizes),
            expected=sum(totals) * self._transfers // len(totals) if totals else None,
            estimated=len(totals) < self._transfers,
            bytes_per_second=rate,
        )


# --- From results files to tasks, said aloud --------------------------------------------------


def read_tasks(
    paths: Sequence[Path], shard: Shard, console: Console, stop: Stop
) -> tuple[list[Task], list[str]]:
    """The tasks of results files, latest first, each once; and what kept files from use."""
    errors: list[str] = []
    batches = _read_batches(paths, errors, console, stop)
    if len(paths) == 1:
        rows = next(batches, [])
        tasks = merge_tasks([rows])
        if len(tasks) < len(rows):
            console.print(f"  ℹ️ {len(rows) - len(tasks):,} rows repeat a task: counted once")
    else:
        tasks = merge_tasks(batches)
    if len(paths) > 1:
        console.print("", f"  ✅ Found {len(tasks):,} different SUCCEEDED tasks in all")
    if shard.parts == 1 or not paths:
        return tasks, errors
    part = [task for task in tasks if shard.holds(task.stub)]
    count = f"{len(part):,} of {len(tasks):,} tasks"
    console.print(f"  🧩 Shard {shard.number}/{shard.parts}: {count}")
    return part, errors


def _read_batches(
    paths: Sequence[Path], errors: list[str], console: Console, stop: Stop
) -> Iterator[list[Task]]:
    """The tasks of one file after the other; what is heard of a long list is the faults."""
    silent = 0
    for number, path in enumerate(paths):
        stop.check()
        heading = ["", f"📋 Processing: {printable(path.name)}"]
        if number < FILES_SHOWN:
            console.print(*heading)
            heading = []
        try:
            with stop.interrupting():
                results = read_results(path)
        except ResultsFileError as error:
            console.print(*heading, f"  ❌ {error}")
            errors.append(str(error))
            continue
        batch = read_rows(results)
        if number >= FILES_SHOWN and not batch.problems:
            silent += 1
        else:
            problems = [f"  ⚠️ {problem}" for problem in batch.problems]
            console.print(
                *heading,
                f"  ✅ Found {len(batch.tasks)} SUCCEEDED tasks",
                *others_line(batch.others),
                *shortened(problems, PROBLEMS_SHOWN, "  … and {} more such rows"),
            )
        yield batch.tasks
    if silent:
        console.print("", f"  … and {silent:,} more files")


# --- The command that takes each new video over -----------------------------------------------


def run_command(template: Sequence[str], video: Path, stop: Stop) -> tuple[list[str], str]:
    """Run ``template`` for ``video``, without a shell; the lines to show, and why it failed."""
    import tempfile
    from subprocess import DEVNULL, STDOUT, Popen

    paths = {"{video}": str(video.absolute()), "{metadata}": str(metadata_path(video).absolute())}
    words = [
        re.sub(r"\{video\}|\{metadata\}", lambda match: paths[match[0]], word) for word in template
    ]
    name = printable(words[0])
    try:
        with tempfile.TemporaryFile() as output:
            process = Popen(words, stdin=DEVNULL, stdout=output, stderr=STDOUT)
            code = wait_for(process, stop)
            lines = read_tail(output)
    except (OSError, ValueError) as error:
        reason = f"{name}: {getattr(error, 'strerror', None) or 'not a usable command'}"
        return [f"  ❌ Command failed: {reason}"], reason
    if code:
        reason = f"{name}: exit code {code}"
        return [*lines, f"  ❌ Command failed: {reason}"], reason
    return [*lines, f"  🔧 Command done: {name}"], ""


def wait_for(process: Popen[bytes], stop: Stop) -> int:
    """The exit code of ``process``, which is ended when the run is."""
    from subprocess import TimeoutExpired

    while (code := process.poll()) is None:
        if stop.event.wait(COMMAND_POLL_S):
            process.terminate()
            with contextlib.suppress(TimeoutExpired):
                return process.wait(STOP_GRACE_S / 2)
            process.kill()
            return process.wait()
    return code


def read_tail(output: BinaryIO) -> list[str]:
    """The last lines in ``output``, fit for the console."""
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - READ_BYTES))
    lines = output.read().decode(errors="replace").splitlines()
    return [f"     {printable(line)}" for line in lines[-COMMAND_LINES_SHOWN:]]


# --- The lock: held by the kernel, so a killed run leaves none --------------------------------


class DirectoryLock:
    """An exclusive lock on ``positions`` of one output directory.

    Byte ranges of one hidden file stand for the positions, so parts of a shard set do not
    meet, and everything else does. Where the system has no such locks, there is none.
    """

    def __init__(self, directory: Path, positions: range) -> None:
        self._path = directory / LOCK_NAME
        self._positions = positions
        self._descriptor = -1

    def acquire(self, on_wait: Callable[[], None], stop: Stop) -> None:
        """Take the lock; calls ``on_wait`` once if it is another run's, then polls for it."""
        told = False
        while not self._try():
            if not told:
                on_wait()
                told = True
            time.sleep(LOCK_POLL_S)
            stop.check()

    def _try(self) -> bool:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        if lock_range(self._descriptor, self._positions):
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._descriptor), os.stat(self._path)):
                    return True
        self._close()  # another run has it, or its last holder has just removed the file
        return False

    def release(self) -> None:
        """Let go; the last run to do so removes the file."""
        if lock_range(self._descriptor, range(POSITION_SPACE)):
            remove(self._path)
        self._close()

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1


_BUSY_ERRNOS = {errno.EAGAIN, errno.EACCES, errno.EDEADLK, errno.EINTR}


def lock_range(descriptor: int, positions: range) -> bool:
    """Lock these bytes of the file without waiting; whether they are ours now.

    Open-file-description locks where there are any: unlike the older ones they also hold
    between threads, and last until this descriptor is closed.
    """
    start, length = positions.start, len(positions)
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, start, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, length)
            return True
        import fcntl

        if hasattr(fcntl, "F_OFD_SETLK") and sys.platform == "linux":
            request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)
        else:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except OSError as error:
        return error.errno not in _BUSY_ERRNOS
    return True


# --- Reporting what the workers did -----------------------------------------------------------


def empty_stats() -> dict[str, int]:
    names = ("total_succeeded", "downloaded", "failed_downloads", "already_exists")
    return dict.fromkeys(names, 0)


_COUNTED_AS = {
    Status.DOWNLOADED: "downloaded",
    Status.EXISTS: "already_exists",
    Status.FAILED: "failed_downloads",
}


class Reporter:
    """Prints each task's lines as one block when the task is finished, counting up to N."""

    def __init__(
        self,
        console: Console,
        record: Callable[[Sequence[Outcome]], None],
        directory: Path,
        total: int,
        numbered: bool,
    ) -> None:
        self.on_disk = 0
        self.failed_keys: set[str] = set()
        self._console = console
        self._record = record
        self._directory = directory
        self._total = total
        self._numbered = numbered
        self._done = 0
        self._existing = 0
        self._hidden = 0
        self._next_draw = 0.0

    def existing(self, plans: Sequence[Plan]) -> None:
        """Report the videos that are there already, the first few of them in full."""
        exists, directory = Status.EXISTS, self._directory
        self._report(
            *(Outcome(plan.task, exists, directory, plan.stub, plan.size_bytes) for plan in plans)
        )
        self.say_hidden()

    def say_hidden(self) -> None:
        """Count the existing videos that were not worth a block of their own."""
        if self._hidden:
            self._console.print("", f"  ⚠️ … and {self._hidden:,} more that already exist")
        self._hidden = 0

    def finished(self, plan: Plan, future: Future[Outcome]) -> None:
        """Report what a worker made of ``plan``; a worker that was stopped says nothing."""
        error = future.exception()
        if isinstance(error, Stopped):
            return
        if error:
            import traceback

            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            reason, hint = f"unexpected {type(error).__name__} (line {line})", "please report it"
            self._report(failed(plan, self._directory, TaskError(reason, hint)))
        else:
            self._report(future.result())

    def _report(self, *outcomes: Outcome) -> None:
        for outcome in outcomes:
            self._done += 1
            if outcome.status is Status.FAILED:
                self.failed_keys.add(outcome.task.key)
            else:
                self.on_disk += 1
            if outcome.status is Status.EXISTS:
                self._existing += 1
                if self._existing > EXISTING_SHOWN:
                    self._hidden += 1
                    continue
            number = f"{self._done}/{self._total} " if self._numbered else ""
            self._console.print(*outcome_lines(outcome, number))
        self._record(outcomes)

    def draw(self, meter: Meter) -> None:
        """Redraw the live line, a few times a second."""
        now = time.monotonic()
        if now >= self._next_draw and self._console.has_live_line:
            self._next_draw = now + REDRAW_S
            self._console.draw(meter.moment(self._done, self._total).text(terminal_columns()))


class Crew:
    """Worker threads for the transfers, and one more that commits what they bring.

    One thread for the commits, because sixteen that sync and rename in one directory at a
    time are in each other's way: 400 videos take a fifth less.
    """

    def __init__(self, workers: int) -> None:
        from concurrent.futures import ThreadPoolExecutor
        from queue import SimpleQueue

        self._workers = ThreadPoolExecutor(workers, "download")
        self._committer = ThreadPoolExecutor(1, "commit")
        self._plans: dict[Future[Any], Plan] = {}
        self._done: SimpleQueue[Future[Any]] = SimpleQueue()

    @property
    def busy(self) -> int:
        return len(self._plans)

    def start(self, plan: Plan, work: Callable[..., Any], *arguments: Any) -> None:
        """Have a worker do ``work(plan, *arguments)``: its outcome, or the future of one."""
        self._follow(plan, self._workers.submit(work, plan, *arguments))

    def commit(self, work: Callable[..., Outcome], *arguments: Any) -> Future[Outcome]:
        return self._committer.submit(work, *arguments)

    def _follow(self, plan: Plan, future: Future[Any]) -> None:
        self._plans[future] = plan
        future.add_done_callback(self._done.put)

    def finished(
        self, timeout_s: float, all_of_them: bool = False
    ) -> Iterator[tuple[Plan, Future[Outcome]]]:
        """The next plan that is finished, or all that finish within ``timeout_s``."""
        from queue import Empty

        deadline = time.monotonic() + timeout_s
        while self._plans:
            try:
                future = self._done.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                return
            plan = self._plans.pop(future)
            if not future.exception() and not isinstance(future.result(), Outcome):
                self._follow(plan, future.result())
                continue
            yield plan, future
            if not all_of_them:
                return

    def dismiss(self) -> None:
        """Let the threads go; what they still do is nobody's concern."""
        for threads in (self._workers, self._committer):
            threads.shutdown(wait=False, cancel_futures=True)


# --- The engine: plan all, download in parallel, report one by one ----------------------------


class VideoDownloader:
    """Downloads the SUCCEEDED videos of polling results into one directory.

    A caller may rely on this:

    - No method raises for bad input, a bad task or a full disk: the fault is printed and
      counted. Only the constructor raises, `JobError`, for a directory that cannot be made.
    - A video is under its final name only when it is whole, synced and has its metadata. No
      finished video is overwritten or moved. Another process on the same directory is waited
      for.
    - ``on_outcome`` is called once per finished task, in the thread that called the method,
      with an `Outcome` (``task_id``, ``status``, ``path``, ``size_bytes``, ``error``).
    - Methods may be called from several threads. Ctrl-C leaves resumable part files.
    """

    def __init__(
        self,
        output_dir: str | Path = DEFAULT_OUTPUT_DIR,
        *,
        workers: int = DEFAULT_WORKERS,
        timeout: float = DEFAULT_TIMEOUT_S,
        retries: int = DEFAULT_RETRIES,
        on_outcome: Callable[[Outcome], None] | None = None,
        shard: Shard = EVERYTHING,
        command: Sequence[str] = (),
        console: Console | None = None,
        stop: Stop | None = None,
        wait: Callable[[float], None] | None = None,
    ) -> None:
        """Make ``output_dir`` and keep the settings; ``timeout`` is in seconds.

        ``shard`` restricts which tasks are taken, ``command`` is run for each new video with
        ``{video}`` and ``{metadata}`` filled in; ``stop`` ends runs from outside, ``wait``
        stands in for the sleep before a retry.
        """
        self.output_dir = Path(output_dir)
        self.stats = empty_stats()
        self.outcomes: list[Outcome] = []
        self._settings = Settings(workers, timeout, retries, shard, tuple(command))
        self._on_outcome = on_outcome or (lambda _outcome: None)
        self._console = console or Console()
        self._stop = stop
        self._wait = wait
        self._mutex = threading.Condition()
        self._session: requests.Session | None = None
        self._turns = Turns(COMPUTING_WORKERS)
        self._shelf: Shelf | None = None
        self._claims: dict[str, str] = {}
        self._busy: set[str] = set()
        self._lock: DirectoryLock | None = None
        self._lock_users = 0
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise self._directory_error(error) from None

    # What the orchestrator calls

    def find_all_polling_results(self, directory: str | Path = ".") -> list[Path]:
        """The results files in ``directory``, its ``video_outputs`` and the output directory."""
        places = (directory, Path(directory) / DEFAULT_OUTPUT_DIR, self.output_dir)
        return find_results_files(places)

    def load_polling_results(self, path: str | Path) -> dict[str, Any]:
        """The object in results file ``path``; ``{}`` and a printed line when there is none."""
        try:
            return read_results(Path(path))
        except ResultsFileError as error:
            self._console.print(f"  ❌ {error}")
            return {}

    def get_succeeded_tasks(self, results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The raw rows, in order, that SUCCEEDED and have a usable ``video_url``."""
        return [task.row for task in read_rows(as_row(results)).tasks if task.link]

    def generate_filename_stub(self, task: Mapping[str, Any]) -> str:
        """The name that row ``task`` asks for, made safe, without suffix."""
        return task_from_row(as_row(task), "", []).stub

    def process_succeeded_task(self, task: Mapping[str, Any]) -> bool:
        """Bring the video of row ``task`` to disk; whether it is there, new or before."""
        problems: list[str] = []
        checked = task_from_row(as_row(task), "The task", problems)
        self._console.print(*(f"  ⚠️ {problem}" for problem in problems))
        return self._run_safely([checked], complete=False) == 1

    def process_polling_results_file(self, path: str | Path) -> int:
        """Bring all videos of results file ``path`` to disk; how many are there now."""
        stop = self._stop or Stop()
        tasks, _ = read_tasks([Path(path)], self._settings.shard, self._console, stop)
        return self._run_safely(tasks)

    def create_metadata_json(
        self, task: Mapping[str, Any], video_path: str | Path, metadata_path: str | Path
    ) -> bool:
        """Write the metadata of row ``task`` and the video on disk; whether it worked."""
        video = Path(video_path)
        if not as_row(task):
            self._console.print("  ❌ There is no task to describe")
            return False
        checked = task_from_row(task, "", [])
        try:
            self._describe(checked, video, Path(metadata_path), Stop())
        except (DownloaderError, ValueError) as error:
            self._console.print(f"  ❌ {error}")
            return False
        return True

    def print_final_stats(self) -> None:
        """Print the summary of everything done so far, and the videos in the directory.

        Where all were there already, they are those that the last look at it found.
        """
        known = {
            f"{each.stub}.mp4": each.size_bytes or 0
            for each in self.outcomes
            if each.status is Status.EXISTS
        }
        self._console.print(*statistics_lines(self.stats, self.outcomes))
        with contextlib.suppress(JobError):
            if not self._shelf or len(known) < self.stats["total_succeeded"]:
                self._shelf = Shelf(self.output_dir)
            videos = video_sizes(self.output_dir, self._shelf.all_names(".mp4"), known)
            self._console.print(*storage_lines(self.output_dir, videos))

    # The run

    def _run_safely(self, tasks: Sequence[Task], *, complete: bool = True) -> int:
        try:
            return self.run(tasks, complete=complete)
        except JobError as error:
            self._console.print(f"❌ {error}")
            with self._mutex:
                reported = {id(outcome.task) for outcome in self.outcomes}
                unreported = sum(id(task) not in reported for task in tasks)
                self.stats["failed_downloads"] += unreported
            return 0

    def run(self, tasks: Sequence[Task], *, complete: bool = True) -> int:
        """Bring ``tasks`` to disk; how many are there. Raises `JobError` and `Stopped`.

        ``complete``: these are all the tasks there are, so other part files are of no use.
        """
        stop = self._stop or Stop()
        report = Reporter(
            self._console, self._record, self.output_dir, len(tasks), numbered=complete
        )
        with self._mutex:
            self.stats["total_succeeded"] += len(tasks)
        try:
            if not complete and self._are_there(tasks, report):
                return report.on_disk
            self._run_locked(tasks, report, stop, complete)
        except Stopped:
            raise stop.error or Stopped from None
        return report.on_disk

    def _run_locked(
        self, tasks: Sequence[Task], report: Reporter, stop: Stop, complete: bool
    ) -> None:
        with self._locked(stop):
            shelf, plans = self._claim(tasks, stop)
            report.existing([plan for plan in plans if plan.slot is Slot.DONE])
            jobs = [plan for plan in plans if plan.slot is not Slot.DONE]
            try:
                self._work(sorted(jobs, key=urgency), shelf, report, stop)
            finally:
                self._unclaim(jobs)
                if jobs or shelf.has_leftovers:
                    self._clean_up(report, stop, complete)

    def _are_there(self, tasks: Sequence[Task], report: Reporter) -> bool:
        """Whether the last look at the directory is enough to find the videos of ``tasks``.

        Spares a caller who goes task by task a scan of the whole directory for each.
        """
        with self._mutex:
            self._shelf = self._shelf or Shelf(self.output_dir)
            plans = [plan_task(task, self._shelf, self._claims) for task in tasks]
        there = all(plan.slot is Slot.DONE for plan in plans)
        if there:
            report.existing(plans)
        return there

    def _record(self, outcomes: Sequence[Outcome]) -> None:
        """Count ``outcomes`` and tell the caller."""
        with self._mutex:
            for outcome in outcomes:
                self.stats[_COUNTED_AS[outcome.status]] += 1
                self._busy.discard(outcome.task.key)  # the callback may try it again
            self.outcomes += outcomes
        for outcome in outcomes:
            self._on_outcome(outcome)

    def _claim(self, tasks: Sequence[Task], stop: Stop) -> tuple[Shelf, list[Plan]]:
        """Plan ``tasks`` in order and hold their names against this process's other threads."""
        keys = {task.key for task in tasks if task.key}
        with self._mutex:
            while self._busy & keys:
                stop.check()
                self._mutex.wait(LOCK_POLL_S)
            self._shelf = shelf = Shelf(self.output_dir)
            plans = plan_all(stop.watch(tasks), shelf, self._claims)
            self._busy |= {plan.task.key for plan in plans if plan.slot is not Slot.DONE}
        return shelf, plans

    def _unclaim(self, plans: Iterable[Plan]) -> None:
        with self._mutex:
            keys = {plan.task.key for plan in plans}
            self._busy -= keys
            keys.add("")  # what `_move` has set aside
            self._claims = {stub: key for stub, key in self._claims.items() if key not in keys}
            self._mutex.notify_all()

    def _work(self, plans: Sequence[Plan], shelf: Shelf, report: Reporter, stop: Stop) -> None:
        """Carry ``plans`` out in worker threads; report each in this one."""
        if not plans:
            return
        crew = Crew(min(self._settings.workers, len(plans)))
        place = Workplace(
            self.output_dir,
            shelf,
            self._settings,
            self._shared_session(),
            self._turns,
            stop,
            Progress(),
            self._wait or stop.wait,
        )
        meter = Meter(place.progress, len(plans), time.monotonic)
        waiting = iter(plans)
        try:
            while True:
                stop.check()
                for plan in itertools.islice(waiting, 2 * self._settings.workers - crew.busy):
                    crew.start(plan, self._execute, place, crew)
                if not crew.busy:
                    break
                for finished in crew.finished(REDRAW_S):
                    report.finished(*finished)
                report.draw(meter)
        finally:
            try:
                if crew.busy:
                    stop.event.set()
                    for finished in crew.finished(STOP_GRACE_S, all_of_them=True):
                        report.finished(*finished)
            finally:
                crew.dismiss()
                self._console.draw("")
                report.say_hidden()
        stop.check()

    def _execute(self, plan: Plan, place: Workplace, crew: Crew) -> Outcome | Future[Outcome]:
        """Do what ``plan`` says, in a worker thread. Raises `Stopped`."""
        try:
            place.stop.check()
            if plan.action is Action.ADOPT:
                return self._adopt(plan, place)
            transfer = Transfer(plan.task, place)
            try:
                part = transfer.run()
            except TaskError as error:
                return failed(plan, self.output_dir, error, transfer_history(transfer))
            committed = crew.commit(self._commit, plan, part, transfer)
            if not place.settings.command:
                return committed
            return self._hand_over(committed.result(), place)
        except JobError as error:
            place.stop.fail(error)
            raise Stopped from None

    def _adopt(self, plan: Plan, place: Workplace) -> Outcome:
        video = self.output_dir / f"{plan.stub}.mp4"
        metadata = metadata_path(video)
        try:
            self._describe(plan.task, video, metadata, place.stop)
        except TaskError as error:
            return failed(plan, self.output_dir, error)
        notes = (f"  📄 Metadata created: {printable(metadata.name)}",)
        return Outcome(
            plan.task, Status.EXISTS, self.output_dir, plan.stub, plan.size_bytes, notes=notes
        )

    def _commit(self, plan: Plan, part: PartFile, transfer: Transfer) -> Outcome:
        """Give ``part`` its final name, or another if that is taken by now."""
        stop = transfer.place.stop
        try:
            part.sync()
            while not self._put_in_place(plan, part):
                plan = self._move(plan)
        except TaskError as error:
            part.close()
            return failed(plan, self.output_dir, error, transfer_history(transfer))
        except JobError as error:
            stop.fail(error)
            raise Stopped from None
        notes = [f"  ⚠️ {transfer.warning}"] if transfer.warning else []
        if plan.stub != plan.task.stub:
            wanted = printable(plan.task.stub)
            notes.insert(0, f"  ℹ️ Saved under this name: {wanted}.mp4 is another task's")
        return Outcome(
            plan.task,
            Status.DOWNLOADED,
            self.output_dir,
            plan.stub,
            part.size_bytes,
            notes=tuple(notes),
            history=tuple(transfer_history(transfer)),
        )

    def _hand_over(self, outcome: Outcome, place: Workplace) -> Outcome:
        """Run the user's command for a video that has just been saved."""
        if not outcome.path:
            return outcome
        lines, error = run_command(place.settings.command, outcome.path, place.stop)
        return outcome._replace(notes=(*outcome.notes, *lines), command_error=error)

    def _put_in_place(self, plan: Plan, part: PartFile) -> bool:
        """Publish metadata and video; False if somebody has taken the name meanwhile.

        Metadata first: whoever sees the video finds it. A kill in between leaves metadata
        without a video, which the next run fills.
        """
        video = self.output_dir / f"{plan.stub}.mp4"
        replaces = os.path.lexists(video)
        if replaces and file_bytes(video) not in (0, plan.size_bytes):
            return False
        is_ours = plan.slot is Slot.OURS
        size_bytes, sha256 = part.size_bytes, part.sha256
        metadata = build_metadata(plan.task, video.name, size_bytes, sha256, datetime.now())
        with disk_errors("put the video in place"):
            try:
                write_metadata(metadata_path(video), plan.task, metadata, is_ours)
            except FileExistsError:
                return False
            try:
                publish(part.path, video, replaces)
            except FileExistsError:
                remove(metadata_path(video))
                return False
        return True

    def _move(self, plan: Plan) -> Plan:
        """Another place for ``plan``, whose own somebody has taken meanwhile."""
        with self._mutex:
            self._claims[fold(plan.stub)] = ""
            moved = plan_task(plan.task, Shelf(self.output_dir), self._claims)
            self._claims[fold(moved.stub)] = plan.task.key
        return moved

    def _describe(self, task: Task, video: Path, metadata: Path, stop: Stop) -> None:
        """Write the metadata of a ``video`` that is on disk."""
        size_bytes, sha256 = hash_file(video, stop)
        content = build_metadata(task, video.name, size_bytes, sha256, datetime.now())
        with disk_errors("write the metadata"):
            write_metadata(metadata, task, content, replaces=True)

    # What runs need around them

    def _shared_session(self) -> requests.Session:
        with self._mutex:
            if not self._session:
                try:
                    self._session = make_session(self._settings.workers, self._turns)
                except ImportError as error:
                    name = error.name or "requests"
                    raise JobError(f"the package {name} is missing: pip install {name}") from None
            return self._session

    def _directory_error(self, error: OSError | ValueError) -> JobError:
        name = printable(str(self.output_dir))
        if getattr(error, "errno", None) in NO_SPACE_ERRNOS:
            return JobError(f"no space left on the disk that holds {name}")
        reason = getattr(error, "strerror", None) or "not a usable name"
        return JobError(f"the output directory {name} cannot be used: {reason}")

    @contextlib.contextmanager
    def _locked(self, stop: Stop) -> Iterator[None]:
        """Hold the lock of this directory; threads of one downloader share it."""
        with self._mutex:
            if not self._lock:
                lock = DirectoryLock(self.output_dir, self._settings.shard.positions)
                try:
                    lock.acquire(self._say_waiting, stop)
                except OSError as error:
                    raise self._directory_error(error) from None
                self._lock = lock
            self._lock_users += 1
        try:
            yield
        finally:
            with self._mutex:
                self._lock_users -= 1
                if not self._lock_users:
                    self._lock.release()
                    self._lock = None

    def _say_waiting(self) -> None:
        name = printable(str(self.output_dir))
        self._console.print(f"⏳ Another run is working on {name}: waiting until it is done")

    def _clean_up(self, report: Reporter, stop: Stop, complete: bool) -> None:
        """Sync the directory; after a complete run remove the part files that no rerun needs."""
        positions = self._settings.shard.positions
        if stop.error:
            sweep(self.output_dir, positions, set())
        elif complete and not stop.event.is_set():
            with self._mutex:
                resumable = self._busy | report.failed_keys
            sweep(self.output_dir, positions, {digest(key)[:16] for key in resumable})
        with contextlib.suppress(OSError):
            descriptor = os.open(self.output_dir, os.O_RDONLY)
            with contextlib.suppress(OSError):
                os.fsync(descriptor)
            os.close(descriptor)


# --- Looking without downloading: --dry-run and --verify --------------------------------------


class Report(NamedTuple):
    """What one invocation found, for the console, ``--json`` and the exit code."""

    stats: Mapping[str, int] = empty_stats()
    videos: Sequence[Mapping[str, Any]] = ()
    exit_code: int = EXIT_OK
    error: str | None = None


def dry_run(tasks: Sequence[Task], directory: Path, console: Console, stop: Stop) -> Report:
    """List what a run would do, soonest to expire first; no request, nothing written."""
    plans = plan_all(stop.watch(tasks), Shelf(directory), {})
    todo = sorted((plan for plan in plans if plan.action is not Action.KEEP), key=urgency)
    videos = [dry_run_entry(plan, directory) for plan in plans]
    failed = sum(video["status"] == "failed" for video in videos)
    kept = len(plans) - len(todo)
    lines = [dry_run_line(plan, time.time()) for plan in todo]
    console.print("", *lines, *([""] if lines else []))
    console.print(f"🔎 Dry run: {len(todo):,} to do, {kept:,} already there; nothing was written")
    stats = empty_stats() | {
        "total_succeeded": len(tasks),
        "failed_downloads": failed,
        "already_exists": kept,
    }
    return Report(stats, videos, EXIT_INCOMPLETE if failed else EXIT_OK)


def dry_run_line(plan: Plan, now: float) -> str:
    name = f"{printable(plan.stub)}.mp4 (task {plan.task.shown_id})"
    if plan.action is Action.ADOPT:
        return f"  📄 {name}: is there, metadata would be created"
    if not plan.task.link:
        return f'  ⚠️ {name}: no usable "video_url"'
    expiry = link_expiry(plan.task.link)
    if expiry is None:
        return f"  📥 {name}: the link does not say when it expires"
    if expiry <= now:
        return f"  ⚠️ {name}: link expired {shown_time(expiry)}"
    return f"  📥 {name}: link expires {shown_time(expiry)}"


def dry_run_entry(plan: Plan, directory: Path) -> dict[str, Any]:
    expiry = link_expiry(plan.task.link)
    kept = plan.action is Action.KEEP
    fails = not plan.task.link and plan.action is Action.DOWNLOAD and not api_secret()
    return {
        "task_id": plan.task.task_id,
        "status": "exists" if kept else "failed" if fails else "pending",
        "path": str(directory / f"{plan.stub}.mp4"),
        "size_bytes": plan.size_bytes if kept else None,
        "error": 'the row has no usable "video_url"' if fails else None,
        "expires": None if expiry is None else shown_time(expiry),
    }


class Check(NamedTuple):
    """One video held against its metadata; ``problem`` is empty when all is well."""

    task_id: str
    key: str | None
    path: Path
    size_bytes: int | None
    problem: str = ""


def verify(
    directory: Path, tasks: Sequence[Task], settings: Settings, console: Console, stop: Stop
) -> Report:
    """Check every video that has metadata, and that each of ``tasks`` has one; no request."""
    from concurrent.futures import ThreadPoolExecutor

    if not tasks and not directory.is_dir():
        raise JobError(f"the output directory {printable(str(directory))} is not there")
    names = sorted(Shelf(directory).all_names(".json"))
    executor = ThreadPoolExecutor(settings.workers, "verify")
    try:
        found = executor.map(
            lambda name: verify_video(directory / name, settings.shard, stop), names
        )
        checks = [check for check in found if check]
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
    stop.check()
    there = {check.key for check in checks}
    for plan in plan_all(stop.watch(tasks), Shelf(directory), {}):
        if plan.task.key not in there:
            path = directory / f"{plan.stub}.mp4"
            problem = f"has not been downloaded (task {plan.task.shown_id}) — run again"
            checks.append(Check(plan.task.task_id, plan.task.key, path, None, problem))
    problems = [check for check in checks if check.problem]
    for check in problems:
        console.print(f"  ❌ {printable(check.path.name)}: {check.problem}")
    whole = len(checks) - len(problems)
    console.print("", f"🔎 Verified: {whole:,} whole, {len(problems):,} with a problem")
    stats = empty_stats() | {
        "total_succeeded": len(checks),
        "failed_downloads": len(problems),
        "already_exists": whole,
    }
    videos = [verify_entry(check) for check in checks]
    return Report(stats, videos, EXIT_INCOMPLETE if problems else EXIT_OK)


def verify_video(path: Path, shard: Shard, stop: Stop) -> Check | None:
    """Check the video beside metadata ``path``; ``None`` if that is none, or not in ``shard``."""
    stop.check()
    metadata = read_metadata(path)
    wanted_stub = text_of(metadata, "target_filename_stub") if metadata else ""
    if not shard.holds(safe_stub(wanted_stub) or path.stem):
        return None
    video = path.with_name(path.name.removesuffix(".json") + ".mp4")
    if metadata is None and os.path.lexists(video):
        return Check("", None, video, None, "its metadata cannot be read")
    if metadata is None or not isinstance(metadata.get("runway_task_json"), dict):
        return None
    task_id = metadata["runway_task_json"].get("task_id")
    check = Check(
        task_id if isinstance(task_id, str) else "", metadata_owner(metadata), video, None
    )
    size_bytes = file_bytes(video)
    if size_bytes is None:
        if os.path.lexists(video):
            return check._replace(problem="is no file — move it away and run again")
        return check._replace(problem="is missing — run again to download it")
    try:
        with open(video, "rb") as file:
            content = inspect(file, size_bytes)
        wanted = metadata.get("file_info")
        problem = compare(wanted if isinstance(wanted, dict) else {}, size_bytes, content)
        if not problem and isinstance(wanted, dict) and "sha256" in wanted:
            _, sha256 = hash_file(video, stop)
            problem = "" if sha256 == wanted["sha256"] else "has another SHA-256 than downloaded"
    except OSError as error:
        return check._replace(problem=f"cannot be read: {error.strerror}")
    except TaskError as error:
        return check._replace(problem=error.reason)
    if problem:
        problem += " — if you did not edit it, delete it and run again"
    return check._replace(size_bytes=size_bytes, problem=problem)


def compare(wanted: Mapping[str, Any], size_bytes: int, content: Content) -> str:
    """What is wrong with a video of ``size_bytes`` whose metadata has the ``file_info`` given."""
    if size_bytes == 0:
        return "is empty"
    size_wanted = wanted.get("size_bytes")
    if isinstance(size_wanted, int) and size_wanted != size_bytes:
        return f"has {size_bytes:,} bytes instead of {size_wanted:,}"
    return "" if content is Content.WHOLE_MP4 else f"is {content.value}"


def verify_entry(check: Check) -> dict[str, Any]:
    return {
        "task_id": check.task_id,
        "status": "failed" if check.problem else "exists",
        "path": str(check.path),
        "size_bytes": check.size_bytes,
        "error": check.problem or None,
    }


# --- The command line -------------------------------------------------------------------------

EPILOG = """\
exit codes:
  0         every SUCCEEDED task found is on disk (also when there was none)
  1         could not do the job: no results file, unreadable input, output directory, disk full
  2         bad command line
  3         done, but at least one video (with --all: or results file) failed; a rerun tries
            just those again. With --verify: a problem was found. With --exec: a command failed
  130, 143  stopped by Ctrl-C, SIGTERM

environment:
  RUNWAYML_API_SECRET   fetches a fresh link from Runway when one is dead
  RUNWAYML_BASE_URL     the Runway API to ask, default https://api.dev.runwayml.com
  REQUESTS_CA_BUNDLE, HTTPS_PROXY, NO_PROXY   as requests knows them
"""


def bounded(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """An argparse type: a ``kind`` from ``low`` to ``high``."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    parse.__name__ = "number"  # argparse says "invalid number value"
    return parse


def parse_path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return Path(text)


def parse_shard(text: str) -> Shard:
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    shard = Shard(int(match[1]), int(match[2])) if match else Shard(0, 0)
    if not 1 <= shard.number <= shard.parts:
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with K from 1 to N")
    return shard


def parse_command(text: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(text.replace("\\", "\\\\") if os.name == "nt" else text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    if not words or not words[0]:
        raise argparse.ArgumentTypeError("no command given")
    return words


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Bring every SUCCEEDED Runway video to disk before its link dies.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--polling-results-file",
        type=parse_path,
        metavar="FILE",
        help="read this results file (default: the latest runway_polling_results_*.json)",
    )
    which.add_argument("--all", action="store_true", help="read every results file, latest first")
    add("--output-dir", type=Path, metavar="DIR", default=Path(DEFAULT_OUTPUT_DIR),
        help="where the videos go (default: %(default)s; created)")  # fmt: skip
    add("--workers", type=bounded(int, 1, MAX_WORKERS), metavar="N", default=DEFAULT_WORKERS,
        help=f"videos at a time, 1 to {MAX_WORKERS} (default: %(default)s)")  # fmt: skip
    add("--timeout", type=bounded(float, 0.001, 86400), metavar="SECONDS",
        default=DEFAULT_TIMEOUT_S,
        help="for connecting and for each wait for data (default: %(default)g)")  # fmt: skip
    add("--retries", type=bounded(int, 0, 1000), metavar="N", default=DEFAULT_RETRIES,
        help="more tries after one that brought nothing (default: %(default)s)")  # fmt: skip
    add("--shard", type=parse_shard, metavar="K/N", default=EVERYTHING,
        help="only the K-th of N equal parts, for job arrays that share a directory")  # fmt: skip
    add("--exec", type=parse_command, metavar="CMD", default=(), dest="command",
        help='run "CMD {video} {metadata}" for each new video, without a shell')  # fmt: skip
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="only list what would be downloaded")
    mode.add_argument("--verify", action="store_true",
        help="only check the videos that are there against their metadata")  # fmt: skip
    add("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def choose_results_files(options: argparse.Namespace, console: Console) -> list[Path]:
    """The results files the command line asks for; raises `JobError` when there are none."""
    if options.polling_results_file:
        return [options.polling_results_file]
    if options.verify and not options.all:
        return []
    places = (".", DEFAULT_OUTPUT_DIR, options.output_dir)
    files = find_results_files(places)
    if not files:
        searched = ", ".join(dict.fromkeys(printable(str(place)) for place in places))
        raise JobError(f"no {RESULTS_PREFIX}*.json in {searched}: run the polling step first")
    if options.all:
        console.print(f"🔍 Found {len(files):,} polling results files")
        return files
    console.print(f"📁 Using latest results file: {printable(files[0].name)}")
    return files[:1]


def download(
    tasks: Sequence[Task],
    directory: Path,
    settings: Settings,
    console: Console,
    stop: Stop,
    listed: bool,
) -> Report:
    """Bring ``tasks`` to ``directory`` and print the summary, however the run ends."""
    downloader = VideoDownloader(
        directory,
        workers=settings.workers,
        timeout=settings.timeout_s,
        retries=settings.retries,
        shard=settings.shard,
        command=settings.command,
        console=console,
        stop=stop,
    )
    exit_code, error = EXIT_OK, ""
    try:
        downloader.run(tasks)
    except JobError as job_error:
        exit_code, error = EXIT_CANNOT, str(job_error)
    except Stopped:
        exit_code, error = stopped_exit_code(stop), "stopped, run again to go on"
    outcomes = downloader.outcomes
    if not error and any(each.status is Status.FAILED or each.command_error for each in outcomes):
        exit_code = EXIT_INCOMPLETE
    if outcomes or exit_code != EXIT_CANNOT:
        downloader.print_final_stats()
    if error and len(tasks) > len(outcomes):
        error += f" ({len(tasks) - len(outcomes):,} videos still to do)"
    videos = [outcome_entry(outcome) for outcome in outcomes] if listed else []
    return Report(downloader.stats, videos, exit_code, error or None)


def stopped_exit_code(stop: Stop) -> int:
    return 128 + (stop.signal_number or signal.SIGINT)


def outcome_entry(outcome: Outcome) -> dict[str, Any]:
    error = outcome.error or (outcome.command_error and f"--exec failed: {outcome.command_error}")
    return {
        "task_id": outcome.task_id,
        "status": outcome.status.value,
        "path": str(outcome.path) if outcome.path else None,
        "size_bytes": outcome.size_bytes,
        "error": error or None,
    }


def do(options: argparse.Namespace, console: Console, stop: Stop) -> Report:
    """Do what the command line says. Raises `JobError` and `Stopped`."""
    settings = Settings(
        options.workers, options.timeout, options.retries, options.shard, options.command
    )
    paths = choose_results_files(options, console)
    tasks, errors = read_tasks(paths, settings.shard, console, stop)
    if paths and len(errors) == len(paths):
        raise JobError("no results file could be read: nothing was done")
    if options.verify:
        report = verify(options.output_dir, tasks, settings, console, stop)
    elif options.dry_run:
        report = dry_run(tasks, options.output_dir, console, stop)
    else:
        report = download(tasks, options.output_dir, settings, console, stop, options.json)
    if errors:
        unread = "; ".join(shortened(errors, FILES_SHOWN, "and {} more results files"))
        error = "; ".join(filter(None, (report.error, unread)))
        return report._replace(exit_code=report.exit_code or EXIT_INCOMPLETE, error=error)
    return report


@contextlib.contextmanager
def stopping_on_signals(stop: Stop) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the run gently; leave a signal alone that is ignored (nohup)."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, stop.on_signal)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; the exit code, as ``--help`` lists them."""
    options = build_parser().parse_args(argv)
    console = Console((sys.stderr or io.StringIO()) if options.json else None)
    stop = Stop()
    with stopping_on_signals(stop):
        try:
            report = do(options, console, stop)
        except JobError as error:
            report = Report(exit_code=EXIT_CANNOT, error=str(error))
        except Stopped:
            report = Report(exit_code=stopped_exit_code(stop), error="stopped")
        if report.error:
            console.print("", f"❌ {report.error}")
        if options.json and not Console().print(json.dumps(report._asdict(), indent=2)):
            console.print("❌ the JSON could not be written")
            return EXIT_CANNOT
    return report.exit_code


def leave(exit_code: int) -> NoReturn:
    """Exit at once: threads may wait for a server, and freeing 10,000 rows takes a while."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):  # its reader has gone
            stream.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    leave(main())
