#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["requests>=2.25.0,!=2.32.0,!=2.32.1,!=2.32.2"]
# ///
"""Bring every SUCCEEDED Runway video to disk before its link dies.

Reads the polling-results JSON that runway_task_polling_loop.py leaves (or what
Runway's API answered), streams each SUCCEEDED video to
video_outputs/<stub>.mp4, writes <stub>.json beside it and prints a summary.

examples:
  the latest results file:
    %(prog)s
  every results file (a backfill):
    %(prog)s --all
  from cron, which mails what is printed; only problems are:
    %(prog)s --all -q
  from standard input:
    cat results.json | %(prog)s -
  hand each video over to a command:
    %(prog)s --exec "rclone copy {video} remote:"

exit codes:
  0   every SUCCEEDED task found is on disk (also when there was none)
  1   could not do the job: no results file, unreadable input,
      output directory, disk full
  2   bad command line
  3   done, but at least one video (or one of several results files),
      a question to Runway, a hand-over or the gallery failed;
      a rerun tries just those again
  129, 130, 143   stopped by SIGHUP, Ctrl-C, SIGTERM

environment:
  RUNWAYML_API_SECRET   asks Runway for a fresh link when one is dead or
                        missing, and about tasks that polling gave up on
  RUNWAYML_BASE_URL     the Runway API (https://api.dev.runwayml.com)
  REQUESTS_CA_BUNDLE, HTTPS_PROXY, NO_PROXY   as requests knows them
"""

# The file reads as the data flows. Each chapter uses only chapters above it, except in type
# annotations.
#
#     text, errors                      words that all chapters use
#     rows, results files               what there is to bring home
#     names, tasks                      under which name, and what is to be fetched
#     files, content, metadata          what a file is by its bytes, and what is written beside it
#     the directory, the plan           what is there, and whether to download, adopt or keep
#     the watch, hidden files           looking on from another thread; parts and leftovers
#     HTTP, Runway, retries             asking servers
#     outcomes, publishing, download    from a request to a file under its final name
#     hand-over                         the commands of --exec
#     report, looks, console            what a run came to, and how it is told
#     the run                           many downloads in parallel
#     reading tasks, VideoDownloader    the door for programs
#     dry run, verify, gallery          looking without downloading
#     the command line                  the door for people
#
# Glossary:
#
#     row        one entry of a results file, as JSON has it
#     task       a row, read and checked: something that Runway was asked to make
#     key        what identifies a task: its id, or its link without the query
#     stub       a file name without its suffix
#     home       the stub under which a task's metadata lies
#     part       a hidden file that one process writes, and no other writes or publishes
#     leftover   a part that its owner let go of on purpose, so that a later attempt can resume it
#     orphan     a video on disk without metadata
#     holder     a sentence: what holds a name that a task would have liked
#     attempt    one look at the directory, with at most one body received
#     leader     the thread that leads a run: it starts, watches and reports the downloads
#     hand-over  running a command of --exec for a video
#     outcome    what became of a task
#     fault      what went wrong with a task, and what the user can do

from __future__ import annotations

import os
import signal
import sys

if sys.version_info < (3, 10):  # noqa: UP036 - older versions can parse this file
    sys.exit(f"Python 3.10 or later is needed, this is {sys.version.split()[0]}")

if __name__ == "__main__":
    # The imports take a moment, and a signal during them must not print a traceback. A signal that
    # is ignored stays ignored: nohup does that to SIGHUP, and a shell's "&" to SIGINT.
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]
    SIGNALS = [each for each in known if signal.getsignal(each) is not signal.SIG_IGN]
    for each in SIGNALS:
        signal.signal(each, lambda number, _frame: os._exit(128 + number))
else:
    SIGNALS = []  # a program handles its signals itself

import argparse
import base64
import contextlib
import difflib
import errno
import functools
import hashlib
import heapq
import html
import itertools
import json
import math
import random
import re
import shlex
import shutil
import socket
import ssl
import stat
import subprocess
import tempfile
import threading
import time
import unicodedata
from argparse import Namespace
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from enum import Enum
from glob import glob
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, NoReturn, TypeVar
from urllib.parse import quote, urljoin

try:
    import requests
    import urllib3
    from requests import Session
    from requests.adapters import HTTPAdapter
    from requests.utils import DEFAULT_CA_BUNDLE_PATH, get_environ_proxies, select_proxy
    from urllib3.exceptions import HTTPError
    from urllib3.util.retry import Retry
    from urllib3.util.ssl_ import create_urllib3_context

    UNUSABLE_REQUESTS = ""
except (ImportError, OSError) as missing:  # OSError: some versions open SSLKEYLOGFILE at once
    if __name__ != "__main__":
        raise
    UNUSABLE_REQUESTS = f"the package requests cannot be used: {missing} — pip install requests"
    Session = HTTPAdapter = object  # type: ignore[assignment,misc] # for --help and --version
    HTTPError = OSError  # type: ignore[assignment,misc]

VERSION = "3.0.0"

JsonObject = Mapping[str, Any]  # a JSON object

DEFAULT_OUTPUT_DIR = "video_outputs"
RESULTS_PREFIX = "runway_polling_results_"
HIDDEN_DIR = ".dsv"
HIDDEN_DIR_NAME = re.compile(r"\.dsv(-[0-9a-f]{8})?")
GALLERY_NAME = "index.html"

BYTES_PER_MB = 1024 * 1024
DAY_S = 86_400.0

NAME_TRIES = 10  # at a name, while other programs keep taking or removing it
NAMES_SHOWN = 20  # of what is wrong for one reason
BLOCKS_SHOWN = 20  # a run of more tasks prints one line for each video


# --- Text for people: nothing of a link's query, no control characters ------------------------


def bare(text: object) -> str:
    """Return ``text`` with no user, query or fragment in its links."""
    return re.sub(r"(?i)(https?:/+)(?:[^\s/?#]*@)?([^\s?#]*)\S*", r"\1\2", str(text))


def printable(text: object) -> str:
    """Return ``text`` with bare links, and with ``?`` for each character that is not printable.

    Some of those are commands to a terminal.
    """
    safe = bare(text)
    if safe.isprintable():
        return safe
    return "".join(each if each.isprintable() else "?" for each in safe)


def shown_id(task_id: str) -> str:
    return f"{printable(task_id[:8])}..." if task_id else "unknown"


def without_query(link: str) -> str:
    """Return ``link`` with no user, query or fragment, whatever characters these hold."""
    return bare(re.split("[?#]", link, maxsplit=1)[0])


def shown_link(link: str) -> str:
    """Return the first 50 characters of ``link``, without its query."""
    text = printable(without_query(link))
    return text if len(text) <= 50 else f"{text[:50]}..."


def shown_time(unix_seconds: float) -> str:
    return f"{utc(unix_seconds):%Y-%m-%d %H:%M:%S} UTC"


def utc(unix_seconds: float) -> datetime:
    return datetime.fromtimestamp(unix_seconds, timezone.utc)


def megabytes(size_bytes: float) -> str:
    return f"{size_bytes / BYTES_PER_MB:.2f} MB"


def counted(count: int, noun: str = "video") -> str:
    return f"1 {noun}" if count == 1 else f"{count:,} {noun}s"


def shortened(lines: Sequence[str], limit: int) -> list[str]:
    """Return at most ``limit`` of ``lines``, and a line that counts what is left out."""
    left_out = len(lines) - limit
    if left_out <= 0:
        return list(lines)
    return [*lines[:limit], f"… and {left_out:,} more"]


def digest(text: str) -> str:
    """Return the SHA-256 of ``text`` in hexadecimal; text of JSON may hold lone surrogates."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


# --- Errors: the class says what helps --------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """Why one video failed.

    ``reason`` is the same for all that failed alike, ``detail`` is this video's own, ``hint`` is
    what the user can do, and ``http_status`` is the server's answer if that was the reason.
    """

    reason: str
    hint: str
    detail: str = ""
    http_status: int | None = None

    @property
    def why(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason

    def __str__(self) -> str:
        return f"{self.why} — {self.hint}"


class DownloaderError(Exception):
    """Base of everything that this script raises on purpose."""


class JobError(DownloaderError):
    """The run as a whole, or a results file, cannot go on: exit code 1.

    Its ``args`` are the lines to print.
    """


class DiskFull(JobError):
    """The disk is full. Its text says what failed; the run adds in which directory."""


class Cancelled(DownloaderError):
    """Ends a download's thread: the run is ending, or has given this download up."""


class Later(DownloaderError):
    """The download is to be continued after ``wait_s`` seconds.

    ``is_pressure`` says that the server asks us to slow down, and ``is_in_other_hands`` that
    another run is at work on the video.
    """

    def __init__(
        self, wait_s: float, why: str, is_pressure: bool = False, is_in_other_hands: bool = False
    ) -> None:
        super().__init__(why)
        self.wait_s = wait_s
        self.why = why
        self.is_pressure = is_pressure
        self.is_in_other_hands = is_in_other_hands


class NotSucceeded(DownloaderError):
    """Runway says that a task which polling gave up on has not succeeded, or not yet."""

    def __init__(self, runway_status: str) -> None:
        super().__init__(runway_status)
        self.runway_status = runway_status


class TaskError(DownloaderError):
    """One video failed for good, as ``fault`` says."""

    def __init__(
        self, reason: str, hint: str, detail: str = "", http_status: int | None = None
    ) -> None:
        super().__init__(reason)
        self.fault = Fault(reason, hint, detail, http_status)


class TransientError(TaskError):
    """The same request may succeed later, after ``wait_s`` seconds if the server said so.

    ``is_pressure`` says that the server is only asking us to slow down.
    """

    def __init__(
        self,
        reason: str,
        wait_s: float = 0.0,
        is_pressure: bool = False,
        http_status: int | None = None,
    ) -> None:
        super().__init__(reason, "run again to try once more", http_status=http_status)
        self.wait_s = wait_s
        self.is_pressure = is_pressure


class PartGone(TransientError):
    """A hidden file is gone or could not be copied, and the download begins again.

    That does not count as a try, up to ``PART_GONE_MAX`` times.
    """

    def __init__(self, reason: str = "another program removed the hidden file") -> None:
        super().__init__(reason)


class LinkDead(TaskError):
    """There is no link that leads to the video, or the one there is was refused."""


def is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_error(error: OSError, action: str) -> DownloaderError:
    """Return our error for an OSError of the local disk; ``action`` is what we were doing.

    A full disk ends the run. A lack of file descriptors is temporary. Anything else fails the task.
    """
    if is_full(error):
        return DiskFull(f"could not {action}")
    reason = printable(f"could not {action}: {error.strerror or type(error).__name__}")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return TransientError(reason)
    return TaskError(reason, "look at the output directory, then run again")


@contextlib.contextmanager
def disk_errors(action: str) -> Iterator[None]:
    """Turn an OSError of the local disk into a `disk_error`.

    FileExistsError passes: somebody has taken a name, which is for the caller to settle.
    """
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise disk_error(error, action) from None


# --- Rows: each fact of a row is read in one place ---------------------------------------------

SUCCEEDED = "SUCCEEDED"
ENDED_STATUSES = {"FAILED", "CANCELLED"}
RUNWAY_STATUSES = {"PENDING", "RUNNING", "THROTTLED", SUCCEEDED, *ENDED_STATUSES}

FIRST_YEAR = 2018
ASKED_FOR_S = 7 * DAY_S  # Runway is not asked about tasks that were submitted longer ago

TEXT_FIELDS = (
    "task_id",
    "id",
    "final_status",
    "status",
    "prompt",
    "promptText",
    "target_filename_stub",
    "image_path",
    "completion_time",
    "timestamp",
    "createdAt",
    "created_at",
)
EXTRA_FIELDS = ("cluster_id", "theme", "duration", "resolution")  # copied to the metadata


NO_LINK = 'the row has no usable "video_url"'


def as_object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def text_of(row: JsonObject, *names: str) -> str:
    """Return the first of the fields ``names`` that is a non-empty text, else ``""``."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value:
            return value
    return ""


def row_id(row: JsonObject) -> str:
    return text_of(row, "task_id", "id")


def row_status(row: JsonObject) -> str:
    """Return the status in capitals; the poller's takes precedence over the one at submission."""
    status = text_of(row, "final_status", "status").strip().upper()
    return "CANCELLED" if status == "CANCELED" else status


def row_links(row: JsonObject) -> list[str]:
    """Return the usable links of ``row``: of ``video_url``, else of ``output``."""
    for name in ("video_url", "output"):
        value = row.get(name)
        values = value if isinstance(value, list) else [value]
        links = [link for each in values if (link := usable_link(each))]
        if links:
            return links
    return []


def row_link(row: JsonObject) -> str:
    """Return the link to the video, the first of several, else ``""``."""
    links = row_links(row)
    return links[0] if links else ""


def row_prompt(row: JsonObject) -> str:
    return text_of(row, "prompt", "promptText")


def row_submitted(row: JsonObject) -> str:
    """Return when the task was submitted, as the row has it."""
    return text_of(row, "timestamp", "createdAt", "created_at")


def looks_like_a_task(row: object) -> bool:
    """Whether ``row`` describes a task: it is an object with an id, and a status or a link."""
    if not isinstance(row, dict) or not row_id(row):
        return False
    return bool(row_status(row) or row_link(row))


_LINK = re.compile(  # [user@]host[:port], then path, query, fragment or nothing
    r"https?://([^/?#@\s]*@)?(\[[0-9a-f:.]+\]|[^/?#@:\[\]\\\s]+)(:[0-9]{1,5})?([/?#].*)?",
    re.IGNORECASE | re.DOTALL,
)


def usable_link(value: object) -> str:
    """Return ``value`` if it is an http(s) URL that can be requested, else ``""``.

    Characters that a URL must quote may be there as they are: requests quotes them.
    """
    link = value.strip() if isinstance(value, str) else ""
    with contextlib.suppress(UnicodeEncodeError):  # a lone surrogate cannot be quoted
        link.encode()
        return link if _LINK.fullmatch(link) else ""
    return ""


def link_expiry(link: str) -> float:
    """Return when ``link`` dies, in Unix seconds: ``exp`` of its ``_jwt`` (RFC 7519).

    Returns ``math.inf`` if the link carries no readable expiry.
    """
    tokens = re.findall(r"[?&]_jwt=[^.&#]*\.([^.&#]+)", link)
    try:
        expiry = float(json.loads(base64.urlsafe_b64decode(tokens[0] + "=="))["exp"])
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return math.inf
    return expiry if 0 < expiry < 253402300800 else math.inf  # the year 10000


def parse_time(text: str) -> float | None:
    """Return an ISO time in Unix seconds, ``None`` for nonsense.

    Without an offset it is local, as the poller writes it. A time before Runway made videos is
    nonsense, too: some programs write the year 1 for an empty field.
    """
    with contextlib.suppress(ValueError, OverflowError, OSError):
        whole_seconds = re.sub(r"\.[0-9]+", "", text.strip())
        moment = datetime.fromisoformat(re.sub(r"[Zz]$", "+00:00", whole_seconds))
        return moment.timestamp() if moment.year >= FIRST_YEAR else None
    return None


# --- Results files: which ones, and what is in them -------------------------------------------

STANDARD_INPUT = Path("-")
RESULTS_MAX_BYTES = 1_000_000_000
LOOKS_LIKE = '{"task_results": [{"task_id": …, "final_status": "SUCCEEDED", "video_url": …}]}'


def find_results_files(directories: Iterable[str | Path]) -> list[Path]:
    """Return the polling-results files in ``directories``, each once, latest first."""
    files: dict[str, Path] = {}
    for directory in directories:
        for name in glob(f"{RESULTS_PREFIX}*.json", root_dir=directory):
            path = Path(directory, name)
            # Not Path.is_dir: before Python 3.14 it raises for a link that may not be followed.
            # Such a link and one that leads nowhere are taken, and found unreadable later.
            if not os.path.isdir(path):
                files[os.path.realpath(path)] = path
    return sorted(files.values(), key=results_order, reverse=True)


def results_order(path: Path) -> tuple[datetime, str]:
    """Return the sort key of a results file: the second in which it was saved, then its name.

    The times are naive local ones, as in the names, so that neither another time zone nor the
    change to winter time can reorder the files.
    """
    return saved_at(path).replace(microsecond=0), path.name


def saved_at(path: Path) -> datetime:
    """Return when a results file was saved, in naive local time.

    The time in the name counts, since a clone or copy makes all modification times equal. If
    the name has none, the modification time counts. Standard input counts as saved now.
    """
    if path == STANDARD_INPUT:
        return datetime.now()
    named = time_in_name(path.name)
    if named:
        return named
    with contextlib.suppress(OSError, ValueError, OverflowError):
        return datetime.fromtimestamp(path.stat().st_mtime)
    return datetime.now()


def time_in_name(name: str) -> datetime | None:
    for match in re.finditer(r"[0-9]{8}_[0-9]{6}", name):
        with contextlib.suppress(ValueError):  # another match may be a time
            return datetime.strptime(match[0], "%Y%m%d_%H%M%S")
    return None


def read_results(path: Path) -> dict[str, Any]:
    """Return results file ``path`` as an object with a list ``task_results``.

    Raises `JobError`, in one line, for whatever can be wrong with the file.
    """
    name = "standard input" if path == STANDARD_INPUT else printable(path)
    try:
        return parse_results(read_input(path))
    except OSError as error:
        reason = f"cannot be read: {error.strerror or type(error).__name__}"
    except ValueError as error:
        reason = printable(error)
    raise JobError(f"{name}: {reason} — name another file, or run the polling step again")


def read_input(path: Path) -> bytes:
    """Return the bytes of ``path``; raises OSError, and ValueError for absurdly many."""
    if path == STANDARD_INPUT:
        if sys.stdin is None:
            raise ValueError("is closed")
        return read_to_the_end(sys.stdin.buffer)
    with open(path, "rb") as file:
        check_results_size(os.fstat(file.fileno()).st_size)
        return read_to_the_end(file)


def read_to_the_end(file: BinaryIO) -> bytes:
    blocks = []
    size_bytes = 0
    while block := file.read(BYTES_PER_MB):
        blocks.append(block)
        size_bytes += len(block)
        check_results_size(size_bytes)
    return b"".join(blocks)


def check_results_size(size_bytes: int) -> None:
    if size_bytes > RESULTS_MAX_BYTES:
        raise ValueError("is larger than 1 GB, so it is not a polling-results file")


def parse_results(data: bytes) -> dict[str, Any]:
    """Return the polling results in ``data``: the poller's object, or Runway's own answers.

    Raises ValueError if ``data`` is not JSON in UTF-8, and says at which line and column or at
    which byte. Raises it, too, for JSON without tasks.
    """
    try:
        document = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read as JSON in UTF-8: {error}") from None
    if isinstance(document, dict) and isinstance(document.get("task_results"), list):
        return document
    rows = document if isinstance(document, list) else [document]
    if any(looks_like_a_task(row) for row in rows):
        return {"task_results": rows}
    raise ValueError(f"is not a polling-results file, which looks like {LOOKS_LIKE}")


# --- Names: a stub is a name, never a path ----------------------------------------------------

NAME_MAX_BYTES = 143  # eCryptfs and encrypted folders of some NAS take no longer names

_UNSAFE = re.compile(
    r'[\x00-\x1f\x7f-\x9f<>:"/\\|?*\ud800-\udfff'  # separators, control, not encodable
    r"\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff]"  # lines and text direction
)
_RESERVED = re.compile(  # https://learn.microsoft.com/windows/win32/fileio/naming-a-file
    r"(?:CON|PRN|AUX|NUL|COM[0-9¹²³]|LPT[0-9¹²³]|CONIN\$|CONOUT\$) *(?:\.|$)", re.IGNORECASE
)


def safe_stub(stub: str) -> str:
    """Return ``stub`` as a name that any common file system takes, ``""`` if nothing is left.

    An ordinary stub comes back unchanged. Leading dots are replaced, since they would hide the
    video, and the names of devices and of results files are not left as they are.
    """
    name = in_locale(_UNSAFE.sub("_", stub))
    if not name.strip():
        return ""
    name = re.sub(r"\A\.+", lambda dots: "_" * len(dots[0]), name)
    looks_like_results = name.startswith(RESULTS_PREFIX)  # its .json would be read as such
    if _RESERVED.match(name) or looks_like_results:
        name = f"_{name}"
    return fit(name)


def in_locale(name: str) -> str:
    """Return ``name`` with ``_`` for what the locale's encoding of file names cannot hold."""
    encoding = sys.getfilesystemencoding()
    return name.encode(encoding, "replace").decode(encoding).replace("?", "_")


def fit(stub: str, suffix: str = "") -> str:
    """Return ``stub + suffix``, the stub cut so that the name with ``.json`` is not too long."""
    room = NAME_MAX_BYTES - len(suffix.encode()) - len(".json")
    return stub.encode()[:room].decode(errors="ignore") + suffix


def fold(name: str) -> str:
    """Return a form of ``name`` that is equal for names which some file systems do not tell apart.

    Such a file system ignores case, or the Unicode form.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


# --- Tasks: a row, read and checked --------------------------------------------------------------


class State(Enum):
    """How far a row says that its task has come."""

    SUCCEEDED = "SUCCEEDED"
    ENDED = "FAILED or CANCELLED"
    UNFINISHED = "any other status or none, but an id to ask about"  # polling gave up on it
    UNKNOWN = "any other status or none, and no id to ask about"


@dataclass(frozen=True)
class Task:
    """A row, checked: ``stub`` is a safe name, ``link`` can be requested or is empty.

    ``submitted_s`` is when Runway was asked to make it, in Unix seconds. Two tasks with the same
    ``key`` are the same one; a task with neither id nor link has the key ``""``.
    """

    task_id: str
    stub: str
    link: str = field(repr=False)
    state: State
    submitted_s: float
    row: JsonObject = field(repr=False)

    @functools.cached_property
    def key(self) -> str:
        return row_key(self.row)

    @functools.cached_property
    def file_key(self) -> str:
        """What its hidden files are named after."""
        return digest(self.key or repr(self.row))[:16]

    @functools.cached_property
    def fallback_stubs(self) -> list[str]:
        """The names it gets when its stub is somebody else's: with its id, then with a hash.

        The hash is of the id, else of the link without its query.
        """
        identity = self.task_id or without_query(self.link)
        suffixes = [safe_stub(self.task_id[:8]), digest(identity)[:16]]
        return [fit(self.stub, f"_{each}") for each in suffixes if each]

    def owns(self, metadata: JsonObject) -> bool:
        """Whether ``metadata`` is about this task."""
        return bool(self.key) and owner_key(metadata) == self.key

    def is_asked_about(self, now_s: float) -> bool:
        """Whether polling gave up on it so lately that Runway is worth asking."""
        is_recent = now_s - self.submitted_s <= ASKED_FOR_S
        return self.state is State.UNFINISHED and bool(self.task_id) and is_recent

    def as_succeeded(self, link: str) -> Task:
        """Return the same task as Runway describes it now: SUCCEEDED, with this link."""
        return replace(self, state=State.SUCCEEDED, link=link)


def row_key(row: JsonObject) -> str:
    """Return what identifies the task of ``row``: its id, else its link without the query."""
    task_id = row_id(row)
    if task_id:
        return f"id {task_id}"
    link = row_link(row)
    return f"link {without_query(link)}" if link else ""


def owner_key(metadata: JsonObject) -> str:
    """Return the key of the task that ``metadata`` is about, ``""`` if it names none."""
    return row_key(as_object(metadata.get("runway_task_json")))


def wanted_stub(row: JsonObject) -> str:
    """Return the name that ``row`` asks for, made safe, without suffix."""
    return safe_stub(text_of(row, "target_filename_stub")) or default_stub(row_id(row))


def default_stub(task_id: str) -> str:
    return safe_stub(f"video_{task_id[:8] or 'unknown'}")


def row_state(row: JsonObject) -> State:
    status = row_status(row)
    if status == SUCCEEDED:
        return State.SUCCEEDED
    if status in ENDED_STATUSES:
        return State.ENDED
    return State.UNFINISHED if row_id(row) else State.UNKNOWN


def task_from_row(row: JsonObject, stub: str = "", saved_s: float | None = None) -> Task:
    """Return the task of ``row``.

    ``stub`` is its name if that is not for the row to say. ``saved_s`` is when its results were
    saved, in Unix seconds, for a row that does not say when it was submitted.
    """
    default_s = time.time() if saved_s is None else saved_s
    return Task(
        task_id=row_id(row),
        stub=safe_stub(stub) or wanted_stub(row),
        link=row_link(row),
        state=row_state(row),
        submitted_s=parse_time(row_submitted(row)) or default_s,
        row=row,
    )


def wrong_with_row(row: object) -> list[str]:
    """Return what is wrong with ``row``, a line for each reason not to use it or a field of it.

    A row that has a link but an odd status is left to `odd_status_warning`, which names it.
    """
    if not isinstance(row, dict):
        return ["not an object: passed over"]
    odd = [name for name in TEXT_FIELDS if not isinstance(row.get(name), str | None)]
    wrong = [f'"{name}" is not text: ignored' for name in odd]
    has_odd_status = row_status(row) not in RUNWAY_STATUSES  # told elsewhere, if there is a link
    if row_state(row) is State.UNKNOWN and not (row_link(row) and has_odd_status):
        wrong.append(f"no id, and its status is {shown_status(row)}: passed over")
    return wrong


def shown_status(row: JsonObject) -> str:
    written = text_of(row, "final_status", "status")
    return f'"{printable(written[:40])}"' if written else "missing"


def api_key() -> str:
    return os.environ.get("RUNWAYML_API_SECRET", "").strip()


def is_to_be_fetched(task: Task) -> bool:
    """Whether there may be a video to fetch: the task SUCCEEDED, or Runway can say if it did."""
    if task.state is State.UNFINISHED:
        return bool(api_key()) and task.is_asked_about(time.time())
    return task.state is State.SUCCEEDED


def odd_status_warning(task: Task) -> str:
    """Say that a task has a link, but a status that is none of Runway's; ``""`` if all is well."""
    is_known = row_status(task.row) in RUNWAY_STATUSES
    if is_known or not task.link:
        return ""
    what = f"task {shown_id(task.task_id)} has a link, but its status is {shown_status(task.row)}"
    if is_to_be_fetched(task):
        return f"{what}: Runway is asked about it"
    return f"{what}: not downloaded"


@dataclass(frozen=True)
class Rows:
    """What one results file holds: a task for each row, and what is ``wrong`` with rows."""

    tasks: list[Task]
    wrong: list[str]


def read_rows(results: JsonObject, name_row: Callable[[JsonObject], str], saved_s: float) -> Rows:
    """Read all rows of a results object.

    ``name_row`` gives each row's stub: a subclass of `VideoDownloader` may name the videos.
    """
    rows_read = Rows([], [])
    rows = results.get("task_results")
    for number, row in enumerate(rows if isinstance(rows, list) else [], 1):
        rows_read.wrong.extend(f"row {number}: {each}" for each in wrong_with_row(row))
        if isinstance(row, dict):
            rows_read.tasks.append(task_from_row(row, name_row(row), saved_s))
    return rows_read


def merge_tasks(tasks: Iterable[Task]) -> list[Task]:
    """Return each task once, from its best row; of equals, the first. Expects the latest first.

    A row that says SUCCEEDED is better than one that does not, then one with a link is better
    than one without, then one that says FAILED or CANCELLED is better than one that says nothing
    final.
    """
    merged: dict[str, Task] = {}
    for number, task in enumerate(tasks):
        key = task.key or f"unknown {number}"
        if key not in merged or row_rank(task) > row_rank(merged[key]):
            merged[key] = task
    return list(merged.values())


def row_rank(task: Task) -> tuple[bool, bool, bool]:
    is_final = task.state in (State.SUCCEEDED, State.ENDED)
    return task.state is State.SUCCEEDED, bool(task.link), is_final


@dataclass(frozen=True)
class Choice:
    """Which tasks the command line asks for; all of them by default.

    ``only`` and ``skip`` hold ids, or their first 8 characters or more. ``shard`` (k, n) takes the
    k-th of n parts. The hash of its stub decides which part a task is in, so tasks that want the
    same name are in the same part.
    """

    only: Sequence[str] = ()
    skip: Sequence[str] = ()
    shard: tuple[int, int] = (1, 1)

    def names(self, task: Task) -> bool:
        """Whether ``only`` names the task, or no task at all."""
        return not self.only or is_named(task.task_id, self.only)

    def takes(self, task: Task) -> bool:
        if not self.names(task) or is_named(task.task_id, self.skip):
            return False
        number, count = self.shard
        return int(digest(fold(task.stub)), 16) % count == number - 1


def is_named(task_id: str, names: Iterable[str]) -> bool:
    """Whether one of ``names`` is ``task_id``, or at least 8 characters that it begins with."""
    for name in names:
        is_prefix = len(name) >= 8 and task_id.startswith(name)
        if is_prefix or name == task_id:
            return True
    return False


# --- Files: what the other chapters ask of the file system ------------------------------------

CHUNK_BYTES = 512 * 1024  # read from a file at a time
FSYNC_NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def file_size(path: str | Path) -> int | None:
    """Return the size of the file ``path``, ``None`` if it is not there or no regular file."""
    with contextlib.suppress(OSError, ValueError):
        status = status_of(path)
        return status.st_size if status and stat.S_ISREG(status.st_mode) else None
    return None


def status_of(path: str | Path) -> os.stat_result | None:
    """Return the status of what ``path`` leads to, ``None`` if there is nothing.

    For a symbolic link that leads nowhere, returns the status of the link itself: its name is
    not free. Raises OSError if the status cannot be read.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISLNK(status.st_mode):
        return status
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return status
        raise


def age_s(path: Path) -> float:
    """Return how many seconds ago a file was changed, infinity if it is not there."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return math.inf


def share_with_writers(path: Path, directory_mode: int) -> None:
    """Let all who may write to the directory read the file ``path``, whatever our umask.

    Otherwise another user of a shared directory could not read the metadata, and so not tell
    whose the videos are.
    """
    wanted = 0
    if directory_mode & stat.S_IWGRP:
        wanted |= stat.S_IRGRP
    if directory_mode & stat.S_IWOTH:
        wanted |= stat.S_IROTH
    if not wanted:
        return
    with contextlib.suppress(OSError):
        mode = stat.S_IMODE(os.stat(path).st_mode)
        if wanted & ~mode:
            os.chmod(path, mode | wanted)


def remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def close(file: BinaryIO) -> None:
    """Close a file, and ignore all errors: it is about to be removed, or synced by its path."""
    with contextlib.suppress(OSError, ValueError):
        make_file_appear(file.fileno())
    with contextlib.suppress(OSError):
        file.close()


def make_file_appear(descriptor: int) -> None:
    """Have an unwritten file created now, not later.

    Some mounts, rclone's among them, create a file only when a descriptor of it is closed. If we
    have removed its name by then, it comes back; if we have renamed another file to that name, that
    file becomes empty. So a duplicate of the descriptor is closed before.
    """
    os.close(os.dup(descriptor))


def sync_file(descriptor: int) -> bool:
    """Have a file reach the disk; return whether the file system can promise that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in FSYNC_NOT_SUPPORTED:
            raise
        return False
    return True


def sync_and_close(file: BinaryIO) -> None:
    """Have an unbuffered file reach the disk, and close it.

    After an fsync that worked, an error of closing means nothing. Where there is no fsync, as on
    some network mounts, an error of closing is the only sign that the file is not safe.
    """
    is_safe = sync_file(file.fileno())
    try:
        file.close()
    except OSError:
        if not is_safe:
            raise


def sync_path(path: Path) -> None:
    """Have ``path``, a file or a directory, reach the disk."""
    # Windows syncs a file only if it is open for writing.
    flags = os.O_RDONLY if os.path.isdir(path) else os.O_RDWR
    descriptor = os.open(path, flags)
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)


# --- What a file is, by its bytes (ISO/IEC 14496-12) ------------------------------------------


class Content(Enum):
    """What a file turns out to be; the value completes a sentence that begins with "it is"."""

    WHOLE = "a whole MP4"
    SURPLUS = "an MP4 with something else behind it"
    OTHER = "not an MP4, but some other kind of file"
    CUT = "an MP4 cut short"
    ZEROS = "empty, or nothing but zero bytes"
    TEXT = "text, not a video"


# Worth keeping even if it is odd: the link may not work a second time.
KEPT = {Content.WHOLE, Content.SURPLUS, Content.OTHER}

_BOXES = set(
    b"ftyp styp moov moof mdat free skip wide pnot meta uuid sidx mfra pdin udta emsg".split()
)
# The byte order mark of UTF-16, or no control characters but those of text.
_TEXT = re.compile(rb"\xff\xfe|\xfe\xff|[^\x00-\x08\x0e-\x1a\x1c-\x1f]*\Z")


def inspect(file: BinaryIO, size_bytes: int) -> Content:
    """Look at the first bytes of ``file``, and at the heads of its boxes if it starts like one."""
    file.seek(0)
    if file.read(8)[4:] in _BOXES:
        return walk_boxes(file, size_bytes)
    file.seek(0)
    start = file.read(CHUNK_BYTES)
    blocks = itertools.chain([start], iter(functools.partial(file.read, CHUNK_BYTES), b""))
    if not any(block.strip(b"\0") for block in blocks):
        return Content.ZEROS
    if len(start) < 8:  # too short for the head of a box, or of any other container
        return Content.CUT if start[:3] == b"\0\0\0" else Content.TEXT
    return Content.TEXT if _TEXT.match(start) else Content.OTHER


def walk_boxes(file: BinaryIO, size_bytes: int) -> Content:
    """Follow the boxes from head to head (section 4.2): size, then type.

    Size 1 says that 64 bits of size follow, size 0 that the box goes on to the end. A box of
    unknown type whose length does not fit is no box: it counts as surplus.
    """
    offset = 0
    while offset < size_bytes:
        file.seek(offset)
        head = file.read(16).ljust(16, b"\xff")  # a cut head claims more than there is
        kind = head[4:8]
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        if length == 0 and kind in _BOXES:
            return Content.WHOLE
        if length < 8 or offset + length > size_bytes:
            return Content.CUT if kind in _BOXES else Content.SURPLUS
        offset += length
    return Content.WHOLE


def inspect_path(path: str | Path, size_bytes: int) -> Content:
    with open(path, "rb") as file:
        return inspect(file, size_bytes)


# --- Metadata: <stub>.json --------------------------------------------------------------------

METADATA_MAX_BYTES = 10_000_000  # a longer .json in the output directory is another program's


def file_info(size_bytes: int, sha256: str) -> dict[str, Any]:
    """Return what metadata says of a file."""
    size_mb = round(size_bytes / BYTES_PER_MB, 2)
    return {"size_bytes": size_bytes, "size_mb": size_mb, "sha256": sha256}


def describe_file(path: str | Path, on_block: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Hash ``path`` in constant memory and return its `file_info`; calls ``on_block`` meanwhile."""
    sha256 = hashlib.sha256()
    size_bytes = 0
    with open(path, "rb") as file:
        while block := file.read(CHUNK_BYTES):
            sha256.update(block)
            size_bytes += len(block)
            on_block()
    return file_info(size_bytes, sha256.hexdigest())


def build_metadata(task: Task, video_name: str, info: JsonObject, now: datetime) -> dict[str, Any]:
    """Return what ``<stub>.json`` holds; ``now`` is naive local time, as the poller writes it."""
    row = task.row
    task_json = {
        "task_id": task.task_id,
        "final_status": SUCCEEDED,
        "completion_time": text_of(row, "completion_time"),
        "video_url": task.link,
        "original_status": text_of(row, "status"),
        "timestamp": row_submitted(row),
    }
    for name in EXTRA_FIELDS:
        if name in row and is_json(row[name]):
            task_json[name] = row[name]
    seed = row.get("seed")
    return {
        "video_file": video_name,
        "download_timestamp": now.isoformat(timespec="microseconds"),
        "input_path": text_of(row, "image_path"),
        "prompt": row_prompt(row),
        "seed": seed if is_json(seed) else None,
        "runway_task_json": task_json,
        "target_filename_stub": text_of(row, "target_filename_stub"),
        "file_info": info,
    }


def is_json(value: object) -> bool:
    """Whether JSON can hold ``value``: no NaN, no endless nesting, nothing foreign."""
    try:
        json.dumps(value, allow_nan=False, indent=2)  # as it will be written
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def encode_metadata(metadata: JsonObject) -> bytes:
    """Return ``metadata`` as JSON in UTF-8, readable as it is; only lone surrogates are escaped."""
    text = json.dumps(metadata, indent=2, ensure_ascii=False)
    return re.sub(r"[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text).encode()


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """Return the object in ``path``, or ``None`` when nothing or an empty file is there.

    Returns an empty object for anything else that is there, such as a directory or a file that
    is not JSON. Raises OSError for a file that cannot be read: then nobody knows whose it is.
    """
    status = status_of(path)
    if status is None:
        return None
    if not stat.S_ISREG(status.st_mode) or status.st_size > METADATA_MAX_BYTES:
        return {}  # a pipe would keep us waiting
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read()
    except FileNotFoundError:  # another run has removed it since
        return None
    if not data:
        return None
    try:
        return as_object(json.loads(data))
    except (ValueError, RecursionError):
        return {}


# --- The directory: what is there under a name ------------------------------------------------


def no_space_left(directory: Path, what_failed: object) -> JobError:
    where = printable(directory.absolute())
    return JobError(f"no space left in {where}, {what_failed} — make room, then run again")


def directory_error(directory: Path, error: OSError | ValueError) -> JobError:
    if isinstance(error, OSError) and is_full(error):
        return no_space_left(directory, "could not write a first file")
    reason = str(getattr(error, "strerror", None) or error).lower()
    what = f"the output directory {printable(directory)} cannot be used: {reason}"
    return JobError(f"{what} — fix that, or choose another with --output-dir")


class Holding(Enum):
    """What there is under one name, as one task sees it."""

    OWN_VIDEO = "this task's video, with its metadata"
    OWN_METADATA = "this task's metadata, without the video"
    ORPHAN = "a video without metadata"
    FREE = "nothing, or a file that is no video"
    TAKEN = "something of somebody else's"


@dataclass(frozen=True)
class Place:
    """One name in the directory. ``size_bytes`` is of the file there, ``None`` if there is none.

    ``holder`` is the sentence that says why a task cannot have this name, ``""`` if it can.
    """

    path: Path
    holding: Holding
    size_bytes: int | None = None
    holder: str = ""


@dataclass
class Index:
    """What a run knows of the output directory: what one scan saw, and what the run has done since.

    `look` sees a single name as it is now.
    """

    directory: Path

    # Names in the directory, by what they fold to.
    spellings: dict[str, str] = field(default_factory=dict)

    # The stub of each task's metadata, by the task's key.
    homes: dict[str, str] = field(default_factory=dict)

    # The key of the task whose video is on its way to a name, by the folded stub.
    promised: dict[str, str] = field(default_factory=dict)

    # How many tasks want a name, by the folded stub.
    wanted: Counter[str] = field(default_factory=Counter)

    # Names of hidden directories.
    hidden: list[str] = field(default_factory=list)

    scanned_s: float = field(default_factory=time.monotonic)

    @classmethod
    def scan(cls, directory: Path) -> Index:
        """Read all metadata once; raises `JobError` for a directory that cannot be listed."""
        index = cls(directory)
        names = list_names(directory)
        for name in names:
            index.spellings[fold(name)] = name
            if HIDDEN_DIR_NAME.fullmatch(name):
                index.hidden.append(name)
        for stub, metadata in read_all_metadata(directory, names):
            index._note_home(owner_key(metadata), stub)
        return index

    def _note_home(self, key: str, stub: str) -> None:
        """Remember where a task's metadata is; of several, the first whose video is there."""
        known = self.homes.get(key)
        is_better = known is None or not file_size(self.directory / f"{known}.mp4")
        if key and is_better:
            self.homes[key] = stub

    def note_video(self, task: Task, stub: str) -> None:
        """Remember a video that this run has published, with its metadata."""
        self.homes[task.key] = stub
        for name in (f"{stub}.mp4", f"{stub}.json"):
            self.spellings[fold(name)] = name

    def look(self, task: Task, stub: str) -> Place:
        """Return what ``task`` finds under the name ``stub`` now.

        Raises `TaskError` when that cannot be read: then nothing may be written there.
        """
        path = self.directory / f"{stub}.mp4"
        metadata_path = self.directory / f"{stub}.json"
        with disk_errors(f"read {metadata_path.name}"):
            metadata = read_metadata(metadata_path)
            video = status_of(path)
        if video and not stat.S_ISREG(video.st_mode):
            return Place(path, Holding.TAKEN, holder=f"{path.name} is not a regular file")
        size = video.st_size if video else None
        if metadata is not None and task.owns(metadata):
            return Place(path, Holding.OWN_VIDEO if size else Holding.OWN_METADATA, size)
        holder = self._other_spelling(path) or self._other_spelling(metadata_path)
        if not holder and metadata is not None:
            holder = describe_holder(path, metadata_path, metadata, size)
        if holder:
            return Place(path, Holding.TAKEN, size, holder)
        return self._look_without_metadata(task, path, size)

    def _look_without_metadata(self, task: Task, path: Path, size: int | None) -> Place:
        """Return what ``task`` finds at ``path``, of ``size`` bytes, if no metadata is beside it.

        An orphan is returned even if it is promised to another task; `plan_task` checks that.
        """
        if size:
            with disk_errors(f"read {path.name}"):
                is_video = inspect_path(path, size) in KEPT
            if is_video:
                holder = f"{path.name} is another video"
                return Place(path, Holding.ORPHAN, size, holder)
        if self.is_promised_to_another(task, path.stem):
            return Place(path, Holding.TAKEN, size, f"{path.name} is another task's")
        return Place(path, Holding.FREE, size)

    def is_promised_to_another(self, task: Task, stub: str) -> bool:
        """Whether the name is promised, and to a task other than ``task``."""
        return self.promised.get(fold(stub), task.key) != task.key

    def _other_spelling(self, path: Path) -> str:
        """Say which file has ``path``'s name but for case or Unicode form, if one has."""
        other = self.spellings.get(fold(path.name), path.name)
        if other == path.name or not os.path.lexists(self.directory / other):
            return ""
        return f"{other} differs only in case or Unicode form"


def list_names(directory: Path) -> list[str]:
    """Return the names in ``directory`` in order, none if it is not there."""
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise directory_error(directory, error) from None


def read_all_metadata(
    directory: Path, names: Iterable[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the stub and the content of each metadata file, whether its video is there or not.

    Passes over a file that cannot be read: a download finds out when it looks at the name.
    """
    for name in names:
        may_be_metadata = name.endswith(".json") and not name.startswith((".", RESULTS_PREFIX))
        if not may_be_metadata:
            continue
        metadata: dict[str, Any] | None = None
        with contextlib.suppress(OSError):
            metadata = read_metadata(f"{directory}{os.sep}{name}")
        if metadata and as_object(metadata.get("runway_task_json")):
            yield name.removesuffix(".json"), metadata


def describe_holder(path: Path, metadata_path: Path, metadata: JsonObject, size: int | None) -> str:
    """Say whose the metadata is, and so the name."""
    if not owner_key(metadata):
        return f"{metadata_path.name} is another program's file"
    if size is None:
        return f"{metadata_path.name} is another task's record"
    return f"{path.name} is another task's video"


# --- The plan: which name, and download, adopt or keep ----------------------------------------


class Action(Enum):
    """What is to be done for a task."""

    KEEP = "its video is there"
    ADOPT = "a video without metadata is its own: it gets metadata"
    COMPARE = "a video without metadata is there: the size that the server announces tells whose"
    DOWNLOAD = "no video is there; the name is free, or its metadata has it"


@dataclass(frozen=True)
class Plan:
    """What to do for ``task``, whose video is to have the name ``path``.

    ``size_bytes`` is of the file that is there. ``holder`` is the sentence that says why an
    earlier name, usually the wanted one, could not be taken, ``""`` if this was the first.
    """

    task: Task
    path: Path
    action: Action
    size_bytes: int | None = None
    holder: str = ""

    @property
    def is_there(self) -> bool:
        """Whether the video need not be downloaded."""
        return self.action in (Action.KEEP, Action.ADOPT)


def plan_task(task: Task, index: Index, may_adopt: bool = True) -> Plan:
    """Return the plan for ``task`` in the directory as it is now.

    The first of these decides: its own video with metadata; its own metadata; an orphan whose
    name holds the task's id; the first name that is free or holds an orphan to compare with.
    Unless it ``may_adopt``, orphans count as somebody else's. Raises `TaskError` when a name
    cannot be read, or all are taken.
    """
    home = index.homes.get(task.key, task.stub)
    stubs = dict.fromkeys([home, task.stub, *task.fallback_stubs])
    places = [index.look(task, stub) for stub in stubs]
    for place in places:
        if place.holding is Holding.OWN_VIDEO:
            return Plan(task, place.path, Action.KEEP, place.size_bytes)
    for place in places:
        if place.holding is Holding.OWN_METADATA:
            return Plan(task, place.path, Action.DOWNLOAD, place.size_bytes)
    if may_adopt:
        for place in places:
            stub = place.path.stem
            is_free_to_take = not index.is_promised_to_another(task, stub)
            if place.holding is Holding.ORPHAN and holds_id(stub, task) and is_free_to_take:
                return plan_orphan_by_id(task, place)
    return plan_free_place(task, places, may_adopt)


def holds_id(stub: str, task: Task) -> bool:
    """Whether ``stub`` is made from the task's id, as its fallbacks and ``video_<id>`` are.

    The fallback of a task without an id is made from its link, and counts as well.
    """
    is_default = bool(task.task_id) and stub == default_stub(task.task_id)
    return is_default or stub in task.fallback_stubs


def plan_orphan_by_id(task: Task, place: Place) -> Plan:
    """Plan for a video whose name holds the task's id.

    If polling gave up on the task, the video is kept without metadata, since nobody has asked
    Runway whether the task SUCCEEDED.
    """
    is_finished = task.state is State.SUCCEEDED
    action = Action.ADOPT if is_finished else Action.KEEP
    return Plan(task, place.path, action, place.size_bytes)


def plan_free_place(task: Task, places: Sequence[Place], may_adopt: bool) -> Plan:
    """Plan for the first name that is free, or whose video may turn out to be the task's."""
    holder = ""
    for place in places:
        if place.holding is Holding.FREE:
            return Plan(task, place.path, Action.DOWNLOAD, place.size_bytes, holder)
        # To compare, the server must be asked, and the new metadata must name the task.
        can_compare = may_adopt and task.key and task.state is State.SUCCEEDED
        if place.holding is Holding.ORPHAN and can_compare:
            return Plan(task, place.path, Action.COMPARE, place.size_bytes, holder)
        holder = holder or place.holder
    hint = "move one of them away with its .json, then run again"
    taken = ", ".join(place.path.name for place in places)
    raise TaskError("all names for it are taken", hint, printable(taken))


def plan_all(tasks: Sequence[Task], index: Index) -> list[Plan]:
    """Plan ``tasks`` in order, and note in ``index`` which name is promised to which of them.

    The order of the tasks decides who gets a name that several want, so a rerun chooses alike.
    """
    index.promised.clear()
    index.wanted = Counter(fold(task.stub) for task in tasks)
    plans = []
    for task in tasks:
        plan = plan_by_index(task, index) or plan_or_guess(task, index)
        index.promised.setdefault(fold(plan.path.stem), task.key)
        plans.append(plan)
    return plans


def plan_by_index(task: Task, index: Index) -> Plan | None:
    """Return the plan to keep a video whose metadata the scan has read, else ``None``.

    It does without `Index.look`, which would read the metadata a second time.
    """
    stub = index.homes.get(task.key) if task.key else None
    if stub is None:
        return None
    path = index.directory / f"{stub}.mp4"
    size = file_size(path)
    return Plan(task, path, Action.KEEP, size) if size else None


def plan_or_guess(task: Task, index: Index) -> Plan:
    """Return the plan for ``task``, or to download it under its stub if planning fails.

    The download plans anew, and reports what is wrong then.
    """
    try:
        return plan_task(task, index)
    except TaskError:
        return Plan(task, index.directory / f"{task.stub}.mp4", Action.DOWNLOAD)


# --- The watch: what the leader sees of a download's thread -------------------------------------

HUNG_AFTER_TIMEOUTS = 3
STOP_GRACE_S = 1.0

T = TypeVar("T")


class Watch:
    """Shared by the thread of a download, which notes bytes, and the leader, which looks on.

    A download that has noted nothing for three timeouts is hung, whatever it is stuck in: a name
    look-up, response headers that never end, a proxy, a mount. The leader gives up on it, and
    its thread finds out at its next `check`. A thread that waits on purpose calls `pause`.
    """

    def __init__(self, stop: threading.Event, timeout_s: float) -> None:
        self._stop = stop
        self._limit_s = HUNG_AFTER_TIMEOUTS * timeout_s
        self._moved_s = math.inf  # on the monotonic clock; infinity while nothing is awaited
        self._is_given_up = False
        self.received_bytes = 0
        self.paused_for = ""

    def start(self) -> None:
        self.paused_for = ""
        self._moved_s = time.monotonic()

    def pause(self, paused_for: str = "") -> None:
        """Stop the clock: what follows may take any time. ``paused_for`` says what that is."""
        self.paused_for = paused_for
        self._moved_s = math.inf

    def note(self, size_bytes: int = 0) -> None:
        """Note that ``size_bytes`` came, or just that the thread got on with its work."""
        self.received_bytes += size_bytes
        self._moved_s = time.monotonic()

    def excuse(self, seconds: float) -> None:
        """Do not count a time in which the whole program stood still, as after Ctrl-Z."""
        self._moved_s += seconds

    def check(self) -> None:
        """Raise `Cancelled` when this thread must change nothing more."""
        if self._is_given_up or self._stop.is_set():
            raise Cancelled

    def go_on(self) -> None:
        """Note that the thread got on with its work, and check whether it may go on."""
        self.note()
        self.check()

    def is_hung(self, now_s: float) -> bool:
        return now_s - self._moved_s > self._limit_s

    def give_up(self) -> Fault:
        """Give the download up; return what to say of it."""
        self._is_given_up = True
        reason = f"nothing came for {self._limit_s:g} s: given up"
        return Fault(reason, "look at the network and the disk, then run again")


def try_for(seconds: float, work: Callable[[], T]) -> T | None:
    """Do ``work`` in a thread of its own; return its result, ``None`` if it takes too long.

    A mount that has fallen silent must not keep the run from ending.
    """
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the system gives no more threads
        return work()
    thread.join(seconds)
    return results[0] if results else None


# --- Hidden files: parts that are written, leftovers that can be resumed -----------------------

LEFTOVER_KEPT_S = 7 * DAY_S
HIDDEN_NAME = re.compile(r"[0-9a-f]{16}\..+\.(part|tmp|left)")
CHMOD_PENDING_S = 0.1
LISTING_KEPT_S = 1.0
VALIDATOR_MAX_BYTES = 60  # it is kept in a file name, as base64


@dataclass(frozen=True)
class Source:
    """What a server sends for a link: its size, and a validator that changes when it does.

    Bytes of the same source may be joined. The validator is the ETag, or Last-Modified if there is
    no ETag (RFC 9110, section 8.8); with a weak ETag there is no source.
    """

    total_bytes: int
    validator: str

    @property
    def fits_a_name(self) -> bool:
        """Whether the name of a leftover can hold it; without that, nothing can be resumed."""
        return 0 < len(self.validator) <= VALIDATOR_MAX_BYTES and self.total_bytes > 0


@dataclass(frozen=True)
class Leftover:
    """The first bytes of ``source``, or all of them, that an earlier attempt let go of."""

    path: Path
    size_bytes: int
    source: Source

    @property
    def is_whole(self) -> bool:
        return self.size_bytes == self.source.total_bytes


def leftover_name(file_key: str, source: Source) -> str:
    """Return a name that holds the source, so that no crash can separate it from the bytes."""
    validator = base64.urlsafe_b64encode(source.validator.encode("latin-1")).decode()
    return f"{file_key}.{random_hex()}.{source.total_bytes}.{validator}.left"


def parse_leftover(path: Path) -> Leftover | None:
    """Return the leftover ``path`` if its name and size say that it can be resumed."""
    with contextlib.suppress(ValueError, OSError):
        _key, _random, total, validator, suffix = path.name.split(".")
        source = Source(int(total), base64.urlsafe_b64decode(validator).decode("latin-1"))
        size = file_size(path) or 0
        is_possible = source.fits_a_name and 0 < size <= source.total_bytes
        if suffix == "left" and is_possible and os.access(path, os.R_OK):
            return Leftover(path, size, source)
    return None


def best_leftover(paths: Iterable[Path]) -> Leftover | None:
    """Return the longest of the leftovers that have the same source as the newest one."""
    found = [each for each in map(parse_leftover, paths) if each]
    newest = min(found, key=lambda each: age_s(each.path), default=None)
    same = [each for each in found if newest and each.source == newest.source]
    return max(same, key=lambda each: each.size_bytes, default=None)


def random_hex() -> str:
    return f"{random.getrandbits(32):08x}"


@functools.cache
def host_id() -> str:
    """Return an id for this machine and its namespace of process ids."""
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        facts.append(os.readlink("/proc/self/ns/pid"))
    return digest(" ".join(facts))[:8]


def is_process_alive(pid: int) -> bool:
    """Whether this host may have a process ``pid``; only a POSIX system can be asked."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # it is another user's, or ``pid`` is too large to be one
    return True


def owner_is_gone(name: str) -> bool:
    """Whether the hidden file ``name`` is of a process of this host that has ended.

    A part is named ``<file_key>.<host>-<pid>.<random>.part``, see `HiddenFiles.create`. The name of
    a leftover has no owner.
    """
    words = name.split(".")
    host, _, pid = words[1].partition("-") if len(words) > 2 else ("", "", "")
    is_local = host == host_id() and pid.isdecimal()
    return is_local and not is_process_alive(int(pid))


class HiddenFiles:
    """The hidden directory inside an output directory, where all that is unfinished lies.

    A part or temporary file there belongs to the process whose host and number are in its name: no
    other process writes, renames or publishes it. A leftover belongs to nobody: any attempt may
    copy or remove it. So there is nothing to lock.
    """

    def __init__(self, directory: Path, timeout_s: float) -> None:
        self.directory = directory
        self._own_home = directory / f"{HIDDEN_DIR}-{random_hex()}"
        self._timeout_s = timeout_s
        self._names: list[str] = []
        self._listed_s = -math.inf  # when, on the monotonic clock
        self.home = directory / HIDDEN_DIR
        # A link may lead to another disk, and hard links cannot cross disks.
        if os.path.islink(self.home):
            self.home = self._own_home

    def create(self, file_key: str, suffix: str) -> tuple[Path, BinaryIO]:
        """Make an empty file of our own and open it for writing at its end.

        A hidden directory that is gone is made again. One that cannot be used, since it is
        another user's or no directory, is replaced by one of our own.
        """
        name = f"{file_key}.{host_id()}-{os.getpid()}.{random_hex()}.{suffix}"
        home = self.home
        try:
            return home / name, self._open_in(home, name)
        except (PermissionError, NotADirectoryError):
            if home == self._own_home:
                raise
        time.sleep(CHMOD_PENDING_S)  # another user may have made it, and chmod follows: see `_make`
        with contextlib.suppress(PermissionError, NotADirectoryError):
            return home / name, self._open_in(home, name)
        self.home = self._own_home
        return self.home / name, self._open_in(self.home, name)

    def _open_in(self, home: Path, name: str) -> BinaryIO:
        for _ in range(NAME_TRIES):  # another run that ends may remove the directory once more
            with contextlib.suppress(FileNotFoundError):
                return self._open_new(home / name)
            self._make(home)
        return self._open_new(home / name)

    def _open_new(self, path: Path) -> BinaryIO:
        # Appending: if somebody truncates the file, it stays too short, which `Part.finish` sees.
        # Without O_APPEND the next write would leave a hole, and the size would be right.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | getattr(os, "O_BINARY", 0)
        file = open(os.open(path, flags, 0o666), "ab", buffering=0)  # noqa: SIM115
        share_with_writers(path, self._directory_mode)
        return file

    @functools.cached_property
    def _directory_mode(self) -> int:
        return stat.S_IMODE(os.stat(self.directory).st_mode)

    def _make(self, home: Path) -> None:
        """Make the hidden directory, for all who may write to the output directory."""
        try:
            os.mkdir(home)
        except FileExistsError:
            return
        with contextlib.suppress(OSError):
            os.chmod(home, self._directory_mode)

    def of_task(self, file_key: str, max_age_s: float = 0.0) -> list[Path]:
        """Return the hidden files of one task, from a listing at most ``max_age_s`` old."""
        names = self._names
        if time.monotonic() - self._listed_s >= max_age_s:
            names = []
            with contextlib.suppress(OSError):
                names = os.listdir(self.home)
            self._names = names
            self._listed_s = time.monotonic()
        return [self.home / name for name in names if name.startswith(f"{file_key}.")]

    def is_another_run_at_work(self, paths: Iterable[Path], own: Path | None) -> bool:
        """Whether somebody else has a part among ``paths`` that still grows.

        A part that was changed more than ``timeout`` ago does not count; nor does one whose process
        is gone, or whose time is more than ``timeout`` in the future.
        """
        for path in paths:
            is_part = path.suffix == ".part" and path != own
            is_growing = abs(age_s(path)) < self._timeout_s  # a server's clock may be ahead of ours
            if is_part and is_growing and not owner_is_gone(path.name):
                return True
        return False

    def keep_one_leftover(self, file_key: str) -> None:
        """Remove all leftovers of a task but the one that is resumed next."""
        paths = self.of_task(file_key)
        best = best_leftover(paths)
        for path in paths:
            if path.suffix == ".left" and (best is None or path != best.path):
                remove(path)

    def clean(self, done: set[str], more_homes: Iterable[str] = ()) -> None:
        """Remove all hidden files of the tasks ``done``, given as file keys, and what is too old.

        Of other tasks, leftovers are kept for 7 days, and parts as long as their process may live.
        ``more_homes`` are the names of the hidden directories of runs that could not use ours.
        """
        for home in {self.directory / name for name in (self.home.name, *more_homes)}:
            if os.path.islink(home):
                continue  # what it leads to is not ours
            with contextlib.suppress(OSError, ValueError):
                for name in os.listdir(home):
                    if self._is_useless(home / name, is_done=name.partition(".")[0] in done):
                        remove(home / name)
                os.rmdir(home)  # fails while something is in it

    def _is_useless(self, path: Path, is_done: bool) -> bool:
        if not HIDDEN_NAME.fullmatch(path.name):
            return False
        age = age_s(path)
        if path.suffix == ".left":
            return is_done or age > LEFTOVER_KEPT_S
        if owner_is_gone(path.name) or age > LEFTOVER_KEPT_S:
            return True
        return is_done and age > self._timeout_s

    def probe(self) -> None:
        """Raise OSError if no file can be written here."""
        path, file = self.create(digest("probe")[:16], "tmp")
        try:
            file.write(b"\0")
        finally:
            close(file)
            remove(path)

    def kept_bytes(self, file_keys: set[str]) -> int:
        """Return how many bytes of some tasks are kept for a later run."""
        kept = 0
        with contextlib.suppress(OSError):
            for name in os.listdir(self.home):
                leftover = parse_leftover(self.home / name)
                if leftover and name.partition(".")[0] in file_keys:
                    kept += leftover.size_bytes
        return kept

    def remove_all_of(self, file_keys: set[str]) -> None:
        """Remove the leftovers of some tasks, and our own parts, to make room on a full disk."""
        own = f".{host_id()}-{os.getpid()}."
        with contextlib.suppress(OSError):
            for name in os.listdir(self.home):
                is_ours = name.endswith(".left") or own in name
                if is_ours and name.partition(".")[0] in file_keys:
                    remove(self.home / name)


class Part:
    """A hidden file of our own that grows as bytes arrive, hashed on the way.

    It ends in one of three ways: its video is published, it is discarded, or it is let go of so
    that a later attempt can resume it.
    """

    def __init__(self, hidden: HiddenFiles, file_key: str) -> None:
        self._hidden = hidden
        self._file_key = file_key
        self.source: Source | None = None  # of the bytes; ``None`` if they cannot be resumed
        self.leftover: Leftover | None = None  # that was copied to begin with
        self.size_bytes = 0
        self.sha256 = hashlib.sha256()
        with disk_errors("write to the output directory"):
            self.path, self._file = self._hidden.create(self._file_key, "part")

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        with disk_errors("write the video"):
            while rest:  # a nearly full disk takes a part of it and says nothing
                rest = rest[self._file.write(rest) or 0 :]
        self.size_bytes += len(data)
        self.sha256.update(data)

    def copy(self, leftover: Leftover, watch: Watch) -> None:
        """Begin with a copy of the bytes of ``leftover``, hashing them.

        The leftover stays where it is. If it cannot be copied, for instance since the disk is full,
        both files are removed, and `PartGone` is raised: the next attempt begins at the first byte.
        """
        self.source = leftover.source
        self.leftover = leftover
        try:
            self._copy(leftover, watch)
        except TransientError:
            raise  # a lack of file descriptors, which is temporary
        except (DiskFull, TaskError):
            self.discard()
            remove(leftover.path)
            raise PartGone("the leftover of an earlier attempt could not be copied") from None

    def _copy(self, leftover: Leftover, watch: Watch) -> None:
        with disk_errors("read an earlier leftover"), open(leftover.path, "rb") as file:
            rest = leftover.size_bytes
            while rest and (block := file.read(min(rest, CHUNK_BYTES))):
                watch.go_on()
                self.write(block)
                rest -= len(block)
        if rest:
            # Never shown: `copy` makes a `PartGone` of it.
            raise TaskError("the leftover has changed meanwhile", "")

    def finish(self) -> None:
        """Have all bytes reach the disk, and close the file.

        Raises `TransientError` if the file does not hold what was counted, or is not there, and
        after an error of fsync, since which bytes reached the disk is unknown then.
        """
        try:
            sync_and_close(self._file)
            size = os.stat(self.path).st_size
        except FileNotFoundError:
            raise PartGone from None
        except OSError as error:
            self.discard()
            if is_full(error):
                raise disk_error(error, "write the video") from None
            reason = f"the video did not reach the disk: {error.strerror}"
            raise TransientError(reason) from None
        if size != self.size_bytes:
            self.discard()
            raise TransientError("another program changed the hidden file")

    def discard(self) -> None:
        close(self._file)
        remove(self.path)

    def let_go(self) -> None:
        """Make the part a leftover if it can be resumed, else remove it.

        Nothing happens to one that was published or discarded. The leading thread may call this
        while another thread is stuck with the file, so it does not close the file; `release` does.
        """
        source = self.source  # the thread that is stuck may still change it
        try:
            if source is None or not source.fits_a_name or self.size_bytes == 0:
                remove(self.path)
                return
            sync_path(self.path)
            os.rename(self.path, self.path.with_name(leftover_name(self._file_key, source)))
            self._hidden.keep_one_leftover(self._file_key)
        except FileNotFoundError:
            pass
        except OSError:
            remove(self.path)  # what did not reach the disk is not to be trusted

    def release(self) -> None:
        """Close the file and let go of it."""
        close(self._file)
        self.let_go()


# --- HTTP: a client that every download shares -------------------------------------------------

MAX_REDIRECTS = 30
READ_BYTES = 16 * 1024  # the longest TLS record (RFC 8446, section 5.1)
SHORT_READ_BYTES = 256  # urllib3 before 2.2 returns nothing until it has as many as it is asked for
READS_PER_BLOCK = 4
BLOCK_BYTES = READS_PER_BLOCK * READ_BYTES
STALL_BYTES_PER_SECOND = 1024

NETWORK_ERRORS = (OSError, ValueError, HTTPError)  # requests' own are OSErrors or ValueErrors


class SharedContextAdapter(HTTPAdapter):
    """Gives all its connections one TLS context.

    Left alone, requests loads the CA bundle for each connection, which takes 20 ms of CPU.
    """

    def __init__(self, context: ssl.SSLContext, connections: int) -> None:
        self._context = context
        super().__init__(pool_connections=connections, pool_maxsize=connections)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        return super().proxy_manager_for(proxy, ssl_context=self._context, **kwargs)

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Add nothing: the context holds the bundle and asks for a good certificate."""


def make_tls_context() -> ssl.SSLContext:
    """Return a context that trusts the CA bundle which requests would use.

    Raises `JobError`, naming the file, for a bundle or a key log that cannot be opened.
    """
    named = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    bundle = named or DEFAULT_CA_BUNDLE_PATH
    key_log = os.environ.get("SSLKEYLOGFILE", "")
    try:
        context = create_urllib3_context()
    except OSError as error:
        what = f"cannot write the TLS key log {printable(key_log)} (SSLKEYLOGFILE)"
        raise JobError(f"{what}: {error.strerror or error}") from None
    try:
        is_directory = os.path.isdir(bundle)
        context.load_verify_locations(**{"capath" if is_directory else "cafile": bundle})
    except OSError as error:
        what = f"cannot load the CA bundle {printable(bundle)}"
        raise JobError(f"{what}: {error.strerror or error}") from None
    return context


class VideoSession(Session):
    """A `requests.Session` for one video: its cookies, and redirects that its caller follows.

    Left alone, a session reads the body of a redirect, however long. It takes nothing from the
    environment, which would send passwords of .netrc to servers; the client passes the proxies.
    ``current_adapter`` is asked for each request, since the client may have got a new one.
    """

    def __init__(self, current_adapter: Callable[[], HTTPAdapter]) -> None:
        super().__init__()
        self.trust_env = False
        self._current_adapter = current_adapter

    def get_adapter(self, url: str) -> Any:
        super().get_adapter(url)  # raises for anything but http and https
        return self._current_adapter()

    def get_redirect_target(self, resp: requests.Response) -> str | None:  # noqa: ARG002
        return None

    def next_address(self, response: requests.Response) -> str:
        """Return where a redirect leads, ``""`` for any other answer."""
        target = super().get_redirect_target(response)
        return urljoin(response.url, target) if target else ""


class HttpClient:
    """Asks servers for all downloads of a run: one TLS context, connections that are kept."""

    def __init__(self, context: ssl.SSLContext, timeout_s: float, connections: int) -> None:
        self.timeout_s = timeout_s
        self._connections = connections
        self._context = context
        self._proxies: dict[str, dict[str, str]] = {}  # by server
        self.forget_connections()

    def session(self) -> VideoSession:
        return VideoSession(lambda: self._adapter)

    def forget_connections(self) -> None:
        """Use no idle connection again; those in use are closed after their answers.

        After a fault of one, others may be dead as well. And if a server sends two answers to one
        request, the second would be read as the answer to the next request.
        """
        self._adapter = SharedContextAdapter(self._context, self._connections)

    def _proxies_for(self, url: str) -> dict[str, str]:
        """Return the proxies that the environment names for this server, asked once a run."""
        server = "/".join(url.split("/", 3)[:3])
        if server not in self._proxies:
            try:
                self._proxies[server] = get_environ_proxies(url, no_proxy=None)
            except ValueError:  # urllib.parse is stricter than `usable_link`
                raise requests.exceptions.InvalidURL from None
        return self._proxies[server]

    def get(
        self, session: VideoSession, url: str, headers: Mapping[str, str], redirects: int
    ) -> requests.Response:
        """Send, follow up to ``redirects`` redirects, and return the answer with its body unread.

        Raises what `explain` makes of a fault.
        """
        is_proxied = False
        try:
            for _ in range(redirects + 1):
                proxies = self._proxies_for(url)
                is_proxied = bool(select_proxy(url, proxies))
                response = session.get(
                    url,
                    headers=dict(headers),
                    stream=True,
                    timeout=self.timeout_s,
                    allow_redirects=False,
                    proxies=proxies,
                )
                address = session.next_address(response)
                if not address or redirects == 0:
                    return response
                response.close()
                url = address
        except NETWORK_ERRORS as error:
            raise explain(error, self.timeout_s, is_proxied) from None
        raise TaskError(f"more than {redirects} redirects", "run the polling step again")


def causes(error: BaseException) -> list[BaseException]:
    """Return ``error`` and the exceptions inside it, outermost first."""
    found = [error]
    for each in found:
        inside = [each.__cause__, each.__context__, getattr(each, "reason", None), *each.args]
        for cause in inside:
            if isinstance(cause, BaseException) and cause not in found:
                found.append(cause)
    return found


def system_reason(found: Sequence[BaseException]) -> str:
    """Return what the operating system says of the fault, ``""`` if it says nothing."""
    for each in found:
        if isinstance(each, OSError) and each.strerror and each.errno:
            return each.strerror
    return ""


def explain(error: BaseException, timeout_s: float, is_proxied: bool = False) -> TaskError:
    """Return a library's exception in our words: theirs may hold the link, query and all."""
    found = causes(error)
    final = explain_certificate(found) or explain_address(error, is_proxied)
    if final:
        return final
    if any(isinstance(each, requests.exceptions.ProxyError) for each in found):
        return explain_proxy(found)
    through = "through the proxy, " if is_proxied else ""
    reason = system_reason(found)
    if reason:
        return TransientError(f"{through}the connection failed: {reason}")
    if any(isinstance(each, urllib3.exceptions.DecodeError) for each in found):
        return TransientError(f"{through}the server sent an encoded body that cannot be decoded")
    timeouts = (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)
    if any(isinstance(each, timeouts) for each in found):
        return TransientError(f"{through}stalled: nothing came within {timeout_s:g} s")
    return TransientError(f"{through}the connection was cut")


def explain_address(error: BaseException, is_proxied: bool) -> TaskError | None:
    """Return what is wrong with an address, ``None`` if that is not the fault."""
    bad_addresses = (
        requests.exceptions.InvalidURL,
        requests.exceptions.InvalidSchema,
        requests.exceptions.MissingSchema,
        urllib3.exceptions.LocationValueError,
        UnicodeError,
    )
    if not isinstance(error, bad_addresses):
        return None
    if "SOCKS" in str(error):
        return TaskError("the SOCKS proxy needs PySocks", "pip install requests[socks]")
    if is_proxied:
        reason = "the address of the link or of the proxy is invalid"
        return TaskError(reason, "check the link, HTTP_PROXY and HTTPS_PROXY")
    return TaskError("the address is invalid", "check the link, or RUNWAYML_BASE_URL")


CERTIFICATE_REASONS = {  # X509_V_ERR_... of OpenSSL
    9: ("the server's certificate is not yet valid", "set this machine's clock, then run again"),
    10: (
        "the server's certificate has expired",
        "check the clock of this machine, else ask whoever runs the server",
    ),
    62: ("the server's certificate is for another host", "check the link, and the network's proxy"),
    64: ("the server's certificate is for another host", "check the link, and the network's proxy"),
}
IGNORES_CA_BUNDLE = ("2.32.0", "2.32.1", "2.32.2")


def explain_certificate(found: Sequence[BaseException]) -> TaskError | None:
    """Return what is wrong with the server's certificate, ``None`` if that is not the fault."""
    for each in found:
        if isinstance(each, ssl.SSLCertVerificationError):
            default = ("the server's certificate is not trusted", trust_hint())
            reason, hint = CERTIFICATE_REASONS.get(each.verify_code, default)
            return TaskError(reason, hint)
        if isinstance(each, HTTPError) and "doesn't match" in str(each):  # urllib3 compares names
            return TaskError(*CERTIFICATE_REASONS[62])
    return None


def trust_hint() -> str:
    if requests.__version__ in IGNORES_CA_BUNDLE:
        return f"pip install -U requests: {requests.__version__} ignores REQUESTS_CA_BUNDLE"
    return "set REQUESTS_CA_BUNDLE to a bundle that contains the CA"


def explain_proxy(found: Sequence[BaseException]) -> TaskError:
    """Return a fault of the proxy: a status below 500 is final, anything else may pass."""
    for each in found:
        refusal = re.search(r"Tunnel connection failed: ([0-9]{3})", str(each))
        if refusal:
            return refused_by_proxy(int(refusal[1]))
    reason = system_reason(found)
    if reason:
        return TransientError(f"the proxy did not connect: {reason}")
    return TransientError("the proxy did not connect")


def refused_by_proxy(status: int) -> TaskError:
    reason = f"the proxy refused with HTTP {status}"
    if status >= 500:
        return TransientError(reason, http_status=status)
    return TaskError(reason, "check HTTPS_PROXY, its user and password", http_status=status)


# What the head of an answer says (RFC 9110)


@dataclass(frozen=True)
class Head:
    """The head of an answer: from which byte the body goes on, and the whole object's size.

    ``total_bytes`` is ``None`` if the head does not say. ``source`` is ``None`` if the body could
    not be resumed.
    """

    start: int
    total_bytes: int | None
    source: Source | None


def read_head(response: requests.Response) -> Head:
    """Return what the head says; to be called before the body is read."""
    headers = response.headers
    start = 0
    total = response.raw.length_remaining
    if response.status_code == 206:
        start, total = content_range(headers)
    if is_encoded(headers):
        total = None
    validator = read_validator(headers)
    source = Source(total, validator) if total and validator else None
    return Head(start, total, source)


def content_range(headers: Mapping[str, str]) -> tuple[int, int | None]:
    """Return first byte and total of a ``Content-Range`` that goes to the end (section 14.4).

    Returns -1 and ``None`` for any other, or for none.
    """
    value = (headers.get("Content-Range") or "").strip()
    match = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", value)
    if not match:
        return -1, None
    first, last, total = map(int, match.groups())
    if first <= last == total - 1:
        return first, total
    return -1, None


def read_validator(headers: Mapping[str, str]) -> str:
    """Return the ETag, or without one Last-Modified (section 13.1.5).

    Returns ``""`` if there is neither, or the ETag is weak.
    """
    validator = (headers.get("ETag") or headers.get("Last-Modified") or "").strip()
    is_usable = validator.isascii() and validator.isprintable()
    return validator if is_usable and not validator.startswith("W/") else ""


def is_encoded(headers: Mapping[str, str]) -> bool:
    return (headers.get("Content-Encoding") or "identity").strip().lower() != "identity"


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Return the seconds to wait (section 10.2.3), said as a number or a date; 0 for nonsense."""
    with contextlib.suppress(HTTPError, ValueError, OverflowError):
        return float(Retry().parse_retry_after(headers.get("Retry-After") or ""))
    return 0.0


PRESSURE_STATUSES = {429, 503}  # RFC 6585, 4; RFC 9110, 15.6.4
# RFC 9110, 15.5.9 and 15.6; RFC 8470, 5.2
RETRIED_STATUSES = {408, 425, *range(500, 1000), *PRESSURE_STATUSES}
REFUSED_STATUSES = {401, 403, 404, 410}


def is_retried(status: int) -> bool:
    return status in RETRIED_STATUSES


def check_status(response: requests.Response) -> None:
    """Raise `TransientError`, `LinkDead` or `TaskError` for a status other than 200 and 206."""
    status = response.status_code
    reason = f"the server answered HTTP {status}"
    if is_retried(status):
        wait_s = retry_after_s(response.headers)
        raise TransientError(reason, wait_s, status in PRESSURE_STATUSES, status)
    if status in REFUSED_STATUSES:
        raise LinkDead("the link was refused", "run again later", f"HTTP {status}", status)
    if status == 407:
        raise refused_by_proxy(status)
    if status not in (200, 206):
        raise TaskError(reason, "run the polling step again", http_status=status)


def check_encodings(headers: Mapping[str, str]) -> None:
    """Raise `TaskError` for a body that cannot be decoded, naming its encoding."""
    transfer = (headers.get("Transfer-Encoding") or "identity").strip().lower()
    if transfer not in ("chunked", "identity"):  # http.client would take chunks for the body
        reason = f"the answer has the unknown Transfer-Encoding {printable(transfer[:40])}"
        raise TaskError(reason, "ask whoever runs the server")
    known = {"identity", *urllib3.response.HTTPResponse.CONTENT_DECODERS}
    for coding in (headers.get("Content-Encoding") or "identity").lower().split(","):
        if coding.strip() not in known:
            reason = f"the answer has the unknown Content-Encoding {printable(coding.strip()[:40])}"
            raise TaskError(reason, "ask whoever runs the server")


def read_blocks(response: requests.Response, watch: Watch, timeout_s: float) -> Iterator[bytes]:
    """Yield the decoded body in blocks of some 64 kB, or of what has come.

    A read returns as soon as anything has come, so that the rate can be seen. If a read brought as
    much as was asked for, more has probably come already, so up to four are joined to a block.
    Raises `TransientError` when the body breaks off, or brings less than 1 kB/s over ``timeout_s``.
    """
    raw = response.raw
    can_read_what_is_there = hasattr(raw, "read1")  # since urllib3 2.2
    read = raw.read1 if can_read_what_is_there else raw.read
    most = READ_BYTES if can_read_what_is_there else SHORT_READ_BYTES
    decode = is_encoded(response.headers)
    stall = StallDetector(timeout_s)
    pieces: list[bytes] = []
    while True:
        before = raw.tell()
        try:
            piece = read(most, decode_content=decode)
        except NETWORK_ERRORS as error:
            yield b"".join(pieces)
            raise explain(error, timeout_s) from None
        watch.check()
        came = raw.tell() - before
        if piece:  # for the watch, what cannot be decoded yet is no progress
            watch.note(came)
        pieces.append(piece)
        if came < most or len(pieces) == READS_PER_BLOCK:
            yield b"".join(pieces)
            pieces.clear()
        if not piece and not came:
            return
        try:
            stall.count(came)
        except TransientError:
            yield b"".join(pieces)
            raise


class StallDetector:
    """Raises `TransientError` when a body comes slower than 1 kB/s over ``window_s`` seconds."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._since_s = time.monotonic()
        self._bytes = 0

    def count(self, came_bytes: int) -> None:
        self._bytes += came_bytes
        elapsed_s = time.monotonic() - self._since_s
        if elapsed_s < self._window_s:
            return
        if self._bytes < STALL_BYTES_PER_SECOND * elapsed_s:
            raise TransientError(f"stalled: under 1 kB/s for {self._window_s:g} s")
        self._since_s += elapsed_s
        self._bytes = 0


# --- Runway: a fresh link for a dead one, and tasks that polling gave up on --------------------

RUNWAY_BASE_URL = "https://api.dev.runwayml.com"
RUNWAY_VERSION = "2024-11-06"
ANSWER_MAX_BYTES = BYTES_PER_MB
NOT_FOUND = "not found"  # stands for a status, where Runway does not know the task


@dataclass(frozen=True)
class Answer:
    """What Runway says of a task: its status, and the link if it SUCCEEDED."""

    status: str
    link: str = ""

    @property
    def is_ambiguous(self) -> bool:
        """Whether there is a link, but a status unknown to us: nobody can say if it SUCCEEDED."""
        return bool(self.link) and self.status not in RUNWAY_STATUSES


class Runway:
    """The Runway API (https://docs.dev.runwayml.com/api/), asked with the user's key."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client

    def ask(self, task_id: str, watch: Watch) -> Answer:
        """Return what Runway says of a task.

        Raises `TransientError` where another try may help, else `TaskError`. Redirects are not
        followed: the key is for this host alone.
        """
        key = api_key()
        if not re.fullmatch(r"[\x21-\x7e]+", key):
            reason = "RUNWAYML_API_SECRET contains characters that no HTTP header can carry"
            raise TaskError(reason, "copy the key again, without quotes")
        base = os.environ.get("RUNWAYML_BASE_URL", "").strip().rstrip("/") or RUNWAY_BASE_URL
        url = f"{base}/v1/tasks/{quote(task_id, '', errors='replace')}"
        headers = {"Authorization": f"Bearer {key}", "X-Runway-Version": RUNWAY_VERSION}
        with self._client.get(self._client.session(), url, headers, redirects=0) as response:
            return self._read_answer(response, watch)

    def _read_answer(self, response: requests.Response, watch: Watch) -> Answer:
        status = response.status_code
        if status == 404:
            return Answer(NOT_FOUND)
        if is_retried(status):
            check_status(response)
        if status != 200:
            hint = "check RUNWAYML_API_SECRET and RUNWAYML_BASE_URL"
            raise TaskError(f"HTTP {status}", hint, http_status=status)
        check_encodings(response.headers)
        body = b""
        for block in read_blocks(response, watch, self._client.timeout_s):
            body += block
            if len(body) > ANSWER_MAX_BYTES - BLOCK_BYTES:  # the next block would pass the limit
                raise TaskError("the answer is too long", "check RUNWAYML_BASE_URL")
        return parse_answer(body)


def parse_answer(body: bytes) -> Answer:
    """Return the task that the API describes; the first of its ``output`` is the video.

    Raises `TransientError` for what is not JSON, and `TaskError` for a task without a status.
    """
    try:
        task = as_object(json.loads(body))
    except (ValueError, RecursionError):
        raise TransientError("the answer is not JSON, or not all of it came") from None
    link = row_link(task)
    status = row_status(task) or (SUCCEEDED if link else "")
    if not re.fullmatch("[A-Z_]{1,20}", status):  # it is printed, and may be an echo of the key
        raise TaskError("the answer contains no status", "check RUNWAYML_BASE_URL")
    return Answer(status, link)


class LinkSource:
    """Gives a task's link: the row's; if that one is dead or missing, one from Runway.

    ``current`` is the link in use, ``is_fresh`` says that it is from Runway, and ``has_succeeded``
    that the row or Runway says that the task SUCCEEDED. Both links may be refused: then there is
    none.
    """

    def __init__(self, task: Task, runway: Runway) -> None:
        self._task = task
        self._runway = runway
        self._refusal = Fault(NO_LINK, "")  # why the row's link does not do
        self.current = task.link if task.state is State.SUCCEEDED else ""
        self.is_fresh = False
        self.has_succeeded = task.state is State.SUCCEEDED

    def get(self, watch: Watch) -> str:
        """Return the link, asking Runway if need be.

        Raises `LinkDead` when there is none, and `TransientError` when Runway may be asked again.
        For a task that polling gave up on, raises `NotSucceeded` if Runway says so, and `TaskError`
        instead of `LinkDead`.
        """
        if not self.current:
            self.current = self._ask_runway(watch)
            self.is_fresh = True
        return self.current

    def refuse(self, error: LinkDead) -> None:
        """Forget a link that the server refused; raises `LinkDead` if there is no other."""
        if self.is_fresh:
            raise error
        self._refusal = error.fault
        self.current = ""
        if not self._can_ask:
            raise self._dead_unasked()

    @property
    def _can_ask(self) -> bool:
        return bool(api_key() and self._task.task_id)

    def _ask_runway(self, watch: Watch) -> str:
        if not self._can_ask:
            raise self._dead_unasked()
        try:
            answer = self._runway.ask(self._task.task_id, watch)
        except TransientError as error:
            reason = f"Runway API: {error.fault.reason}"
            http_status = error.fault.http_status
            raise TransientError(reason, error.wait_s, error.is_pressure, http_status) from None
        except TaskError as error:
            raise self._no_help(error.fault) from None
        if answer.status == SUCCEEDED:
            self.has_succeeded = True
            if answer.link:
                return answer.link
        if not self.has_succeeded and not answer.is_ambiguous:
            raise NotSucceeded(answer.status)
        hint = "look at the task in Runway, or check RUNWAYML_BASE_URL"
        raise self._no_help(Fault(why_no_video(answer), hint))

    def _no_help(self, fault: Fault) -> TaskError:
        """Return the error for a link that is dead or missing, and that Runway did not replace."""
        if self._task.state is State.UNFINISHED:
            return TaskError(f"Runway API: {fault.why}", fault.hint, "", fault.http_status)
        reason = f"{self._refusal.reason}; Runway API: {fault.why}"
        return LinkDead(reason, fault.hint, self._detail(), self._refusal.http_status)

    def _dead_unasked(self) -> LinkDead:
        """Return the error for a dead or missing link when Runway cannot be asked for another.

        Asking takes a key, and the id of the task.
        """
        hint = "set RUNWAYML_API_SECRET and run again to fetch a fresh link"
        if not self._task.task_id:
            hint = "run the polling step again"
        return LinkDead(self._refusal.reason, hint, self._detail(), self._refusal.http_status)

    def _detail(self) -> str:
        """Say how the row's link was refused, and when it expired."""
        told = [self._refusal.detail, expiry_text(self._task.link, time.time())]
        return ", ".join(filter(None, told))


def why_no_video(answer: Answer) -> str:
    if answer.status == NOT_FOUND:
        return "it does not know the task"
    if answer.is_ambiguous:
        return f"it reports the unknown status {answer.status}"
    return f"the answer contains no video (status {answer.status})"


def expiry_text(link: str, now_s: float) -> str:
    """Say when ``link`` expires or expired, ``""`` if it does not tell."""
    expiry = link_expiry(link)
    if expiry == math.inf:
        return ""
    word = "expired" if expiry <= now_s else "valid until"
    return f"{word} {shown_time(expiry)}"


# --- Retries: when to try again ----------------------------------------------------------------

BACKOFF_BASE_S = 0.5
BACKOFF_MAX_S = 32.0
PRESSURE_MAX_S = 8.0
PRESSURE_FREE_S = 15.0
RETRY_AFTER_MAX_S = 60.0
PROGRESS_BYTES = 64 * 1024
PART_GONE_MAX = 10


class Retries:
    """Counts the tries of one download, whatever its link, and says how long to wait.

    It ends when ``allowed`` retries in a row have brought no progress. Some retries are free.
    ``started_s`` and ``now_s`` are on the monotonic clock; ``jitter`` is from 0 to 1.
    """

    def __init__(self, allowed: int, started_s: float) -> None:
        self.allowed = allowed
        self.tries = 1
        self._started_s = started_s
        self._failures = 0  # since the last progress
        self._parts_gone = 0
        self._most_bytes = 0

    @property
    def is_last(self) -> bool:
        """Whether no retry is left but this one; the first try is never the last."""
        return 0 < self.allowed <= self._failures

    def progressed(self, size_bytes: int, is_whole: bool) -> None:
        """Renew the tries if this one brought 64 kB more than any before, or the rest."""
        is_much_more = size_bytes >= self._most_bytes + PROGRESS_BYTES
        is_the_rest = is_whole and size_bytes > self._most_bytes
        if is_much_more or is_the_rest:
            self._failures = 0
            self._most_bytes = size_bytes

    def delay_s(self, error: TransientError, now_s: float, jitter: float) -> float:
        """Count a failure and return how long to wait; raises `TaskError` if no try is left."""
        fault = error.fault
        if error.wait_s > RETRY_AFTER_MAX_S:
            reason = f"{fault.reason} and asks to wait {error.wait_s:.0f} s"
            raise self._final(reason, "run again after that time", fault.http_status)
        if not self._take_free_try(error, now_s):
            if self._failures >= self.allowed:
                raise self._final(fault.reason, fault.hint, fault.http_status)
            self._failures += 1
        self.tries += 1
        return max(self._backoff_s(error) * (0.5 + jitter / 2), error.wait_s)

    def _take_free_try(self, error: TransientError, now_s: float) -> bool:
        """Count a fault; return whether it uses up no try."""
        if isinstance(error, PartGone):
            self._parts_gone += 1
            return self._parts_gone <= PART_GONE_MAX
        return error.is_pressure and now_s - self._started_s < PRESSURE_FREE_S

    def _backoff_s(self, error: TransientError) -> float:
        """Return the wait without jitter: it doubles with each try, up to a bound.

        The doublings are bounded as well, since a float cannot hold 2 to the power of 1024.
        """
        if error.is_pressure:
            doublings = self.tries - 2  # 0 before the second try, which `tries` counts already
            return min(BACKOFF_BASE_S * 2.0 ** min(doublings, 10), PRESSURE_MAX_S)
        doublings = max(self._failures - 1, 0)  # 0 if all failures were free
        return min(BACKOFF_BASE_S * 2.0 ** min(doublings, 10), BACKOFF_MAX_S)

    def _final(self, reason: str, hint: str, http_status: int | None) -> TaskError:
        detail = f"tried {self.tries} times" if self.tries > 1 else ""
        return TaskError(reason, hint, detail, http_status)


# --- Outcomes: what became of one task ---------------------------------------------------------


class Status(str, Enum):
    DOWNLOADED = "downloaded"
    EXISTS = "exists"
    FAILED = "failed"
    PENDING = "pending"  # in a dry run
    NOT_SUCCEEDED = "not succeeded"  # says Runway of a task that polling gave up on
    UNASKED = "unasked"  # Runway could not be asked about such a task

    def __str__(self) -> str:
        return self.value


ON_DISK = {Status.DOWNLOADED, Status.EXISTS}
COUNTED = {*ON_DISK, Status.FAILED}  # in the statistics of tasks that SUCCEEDED


@dataclass(frozen=True)
class Outcome:
    """What became of one task: its video's ``path`` and bytes, and the ``fault`` if it has one.

    A video that is on disk may have a fault as well: it could not be handed over. ``warning``
    says why one that was kept is worth a look, ``link`` is the one that brought the bytes, and
    ``notes`` are lines for the console. ``is_kept_waiting`` says that a stop came before commands
    could take the video.
    """

    task: Task
    status: Status
    path: Path
    size_bytes: int | None = None
    fault: Fault | None = None
    warning: str = ""
    notes: tuple[str, ...] = ()
    runway_status: str = ""
    link: str = field(default="", repr=False)
    is_kept_waiting: bool = False

    @property
    def is_on_disk(self) -> bool:
        return self.status in ON_DISK

    @property
    def error(self) -> str:
        """One line: why it failed, and what the user can do; ``""`` when all is well."""
        return str(self.fault) if self.fault else ""

    @property
    def label(self) -> str:
        """How a list names it."""
        return f"{printable(self.path.name)} (task {shown_id(self.task.task_id)})"

    def as_json(self) -> dict[str, Any]:
        """Return the entry of ``videos`` in the object of --json."""
        error = None
        if self.fault:
            fault = self.fault
            error = {
                "reason": bare(fault.why),
                "hint": fault.hint,
                "http_status": fault.http_status,
            }
        expiry = link_expiry(self.link or self.task.link)
        # A failure has a path only if there is a file: one that --verify finds fault with, or one
        # that a dry run has seen.
        has_path = self.is_on_disk or self.status is Status.PENDING or bool(self.size_bytes)
        return {
            "task_id": self.task.task_id,
            "stub": self.task.stub,
            "status": self.status.value,
            "path": str(self.path) if has_path else None,
            "size_bytes": self.size_bytes,
            "error": error,
            "warning": self.warning or None,
            "expires": None if expiry == math.inf else utc(expiry).isoformat(),
        }


# --- Publishing: metadata first, then the video gets its name in one step ----------------------

# Errors of os.link that are to be raised. Any other is taken to mean that the file system has no
# hard links, which it may say in many ways: EPERM on FAT, ENOTSUP on shares, EIO on rclone mounts.
REAL_LINK_ERRORS = {errno.EEXIST, errno.ENOENT, errno.ENOSPC, errno.EDQUOT}


def publish_video(part: Part, plan: Plan, info: JsonObject, hidden: HiddenFiles) -> None:
    """Write the metadata, then give the whole ``part`` its name.

    A kill in between leaves metadata without a video, which the next run downloads. Raises
    FileExistsError if somebody has taken the name, `PartGone` if somebody removed the part.
    """
    task = plan.task
    path = plan.path
    metadata_path = path.with_suffix(".json")
    remove_what_is_no_video(path, plan.size_bytes)
    if os.path.lexists(path):
        raise FileExistsError
    try:
        is_new = put_metadata(metadata_path, task, path.name, info, hidden)
        try:
            give_name(part.path, path)
        except OSError:
            # Another run may have published the same bytes, which the metadata then describes.
            if not holds_video(path, info):
                take_back_metadata(metadata_path, plan, info, is_new, hidden)
            raise
    except FileNotFoundError:
        raise PartGone from None
    confirm_metadata(metadata_path, task, path.name, info, hidden)


def remove_what_is_no_video(path: Path, seen_bytes: int | None) -> None:
    """Remove a file of ``seen_bytes`` that is empty, text or a cut MP4; a video stays."""
    size = file_size(path)
    if size is None or size != seen_bytes:
        return
    if size and inspect_path(path, size) in KEPT:
        return
    with disk_errors(f"remove {path.name}, which is no video"):
        path.unlink(missing_ok=True)  # another run may have removed it meanwhile


def holds_video(path: Path, info: JsonObject) -> bool:
    """Whether the file ``path`` holds the bytes that ``info`` describes."""
    with contextlib.suppress(OSError):
        return file_size(path) == info["size_bytes"] and describe_file(path) == info
    return False


def take_back_metadata(
    path: Path, plan: Plan, info: JsonObject, is_new: bool, hidden: HiddenFiles
) -> None:
    """Undo what `put_metadata` did for a video of ours that did not get its name.

    Metadata that was there before stays, and is made to describe the video that is there, perhaps
    another run's copy. Nothing is done if somebody has changed it since.
    """
    with contextlib.suppress(OSError):
        there = read_metadata(path)
        if not there or not plan.task.owns(there) or there.get("file_info") != info:
            return
        if is_new:
            remove(path)
        elif file_size(plan.path):
            changes = {"file_info": describe_file(plan.path)}
            update_metadata(path, there, changes, plan.task.file_key, hidden)


def put_metadata(
    path: Path, task: Task, video_name: str, info: JsonObject, hidden: HiddenFiles
) -> bool:
    """Have ``path`` describe the video; return whether it was not there before.

    The task's own metadata keeps all but its ``file_info``. Raises FileExistsError for a file that
    is another task's or another program's.
    """
    there = read_metadata(path)
    if there is None:
        remove_if_empty(path)
        metadata = build_metadata(task, video_name, info, datetime.now())
        write_new(path, encode_metadata(metadata), task.file_key, hidden)
        return True
    if not task.owns(there):
        raise FileExistsError(errno.EEXIST, "it is another task's, or another program's", path)
    update_metadata(path, there, {"file_info": info}, task.file_key, hidden)
    return False


def update_metadata(
    path: Path, there: JsonObject, changes: JsonObject, file_key: str, hidden: HiddenFiles
) -> None:
    """Replace the metadata in one step, if ``changes`` change anything."""
    changed = {**there, **changes}
    if changed == there:
        return
    temporary = write_hidden(encode_metadata(changed), file_key, hidden)
    try:
        os.replace(temporary, path)
    finally:
        remove(temporary)


def confirm_metadata(
    path: Path, task: Task, video_name: str, info: JsonObject, hidden: HiddenFiles
) -> None:
    """Have the metadata describe the video that we published.

    Another run that fetched the same video meanwhile may have described its own copy there, or
    removed what it wrote. An error here must not fail a video that is in place.
    """
    with contextlib.suppress(OSError):
        put_metadata(path, task, video_name, info, hidden)


def remove_if_empty(path: Path) -> None:
    """Remove an empty file: it is nobody's, perhaps of a run that was killed."""
    if file_size(path) == 0:
        os.unlink(path)


def write_new(path: Path, data: bytes, file_key: str, hidden: HiddenFiles) -> None:
    """Write a file that is not there yet, whole or not at all; raises FileExistsError.

    On a file system without hard links, it is created under its name and written in one go.
    """
    temporary = write_hidden(data, file_key, hidden)
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno in REAL_LINK_ERRORS:
            raise
        write_exclusively(path, data)
    finally:
        remove(temporary)


def write_hidden(data: bytes, file_key: str, hidden: HiddenFiles) -> Path:
    """Write ``data`` to a hidden file of our own that has reached the disk."""
    path, file = hidden.create(file_key, "tmp")
    try:
        file.write(data)
        sync_and_close(file)
        if os.stat(path).st_size != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        close(file)
        remove(path)
        raise
    return path


def write_exclusively(path: Path, data: bytes) -> None:
    try:
        with open(path, "xb", buffering=0) as file:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync_file(file.fileno())
        share_with_writers(path, stat.S_IMODE(os.stat(path.parent).st_mode))
    except FileExistsError:
        raise
    except OSError:
        with contextlib.suppress(OSError):
            if data.startswith(path.read_bytes()):  # what is there is ours, or empty
                remove(path)
        raise


def give_name(hidden_path: Path, final: Path) -> None:
    """Give a hidden file its final name in one step; raises FileExistsError if that is taken.

    The name is made as a hard link, since a rename would replace a file that is there. On a file
    system without hard links, an empty file is created to claim the name, then replaced.
    """
    try:
        os.link(hidden_path, final)
    except OSError as error:
        if error.errno in REAL_LINK_ERRORS:
            raise
        rename_over_empty(hidden_path, final)
    else:
        remove(hidden_path)


def rename_over_empty(hidden_path: Path, final: Path) -> None:
    descriptor = os.open(final, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    make_file_appear(descriptor)
    os.close(descriptor)
    try:
        os.replace(hidden_path, final)
    except OSError:
        remove_if_empty(final)
        raise


# --- One download: attempts at one task, from the look at the directory to the video -----------

MAX_WORKERS = 64


@dataclass(frozen=True)
class Limit:
    """Which numbers a setting may have: of ``kind``, int or float, from ``low`` to ``high``."""

    kind: type[int] | type[float]
    low: float
    high: float

    def __str__(self) -> str:
        what = "a whole number" if self.kind is int else "a number"
        return f"{what} from {self.low:g} to {self.high:g}"

    def allows(self, value: float) -> bool:
        return self.low <= value <= self.high


LIMITS = {
    "workers": Limit(int, 1, MAX_WORKERS),
    "timeout": Limit(float, 0.001, DAY_S),
    "retries": Limit(int, 0, 1000),
}


@dataclass(frozen=True)
class Settings:
    """What a user may set, under the names of the options; ``timeout`` is in seconds.

    Raises TypeError or ValueError for what is beyond `LIMITS`.
    """

    workers: int = 32
    timeout: float = 30.0
    retries: int = 3

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            is_number = isinstance(value, (int, limit.kind)) and not isinstance(value, bool)
            if not is_number:
                raise TypeError(f"{name} must be {limit}, not {value!r}")
            if not limit.allows(value):
                raise ValueError(f"{name} must be {limit}, not {value!r}")


@dataclass(frozen=True)
class Tools:
    """What all downloads of a run use; ``stop`` ends them."""

    index: Index
    hidden: HiddenFiles
    client: HttpClient
    runway: Runway
    settings: Settings
    commands: Sequence[Command]
    stop: threading.Event


class Download:
    """Brings one task's video to its place. Each call of `bring` makes one attempt.

    The leading thread looks at ``watch`` and ``part`` meanwhile.
    """

    def __init__(self, plan: Plan, tools: Tools) -> None:
        self.plan = plan
        self.watch = Watch(tools.stop, tools.settings.timeout)
        self.part: Part | None = None
        self._tools = tools
        self._session = tools.client.session()
        self._links = LinkSource(plan.task, tools.runway)
        self._retries = Retries(tools.settings.retries, time.monotonic())
        self._notes: Counter[str] = Counter()  # lines for the console, each once
        self._may_adopt = True
        self._is_length_known = True  # whether the last body had an announced length

    @property
    def task(self) -> Task:
        return self.plan.task

    def bring(self) -> Outcome:
        """Make one attempt; return what became of the task.

        Raises `Later` when another attempt is to follow, `JobError` when the run cannot go on,
        and `Cancelled` when it is ending.
        """
        self.watch.start()
        try:
            return self._attempt_or_adopt()
        except TransientError as error:
            return self._later_or_failed(error)
        except TaskError as error:
            return self.failed(error.fault)
        except NotSucceeded as answer:
            return self._outcome(Status.NOT_SUCCEEDED, runway_status=answer.runway_status)
        finally:
            self.watch.pause()

    def _attempt_or_adopt(self) -> Outcome:
        try:
            return self._attempt()
        except LinkDead as error:
            return self._adopt_or_fail(error.fault)

    def failed(self, fault: Fault) -> Outcome:
        """Return the outcome of a failure: UNASKED for a task not known to have SUCCEEDED."""
        status = Status.FAILED if self._links.has_succeeded else Status.UNASKED
        return self._outcome(status, fault=fault)

    def _later_or_failed(self, error: TransientError) -> Outcome:
        """Raise `Later` if there is a try left, else return the failure."""
        if not error.is_pressure:
            self._tools.client.forget_connections()
        try:
            delay_s = self._retries.delay_s(error, time.monotonic(), random.random())
        except TaskError as final:
            return self.failed(final.fault)
        self._notes[f"  🔁 Tried again: {error.fault.reason}"] += 1
        raise Later(delay_s, error.fault.reason, is_pressure=error.is_pressure) from None

    def _adopt_or_fail(self, fault: Fault) -> Outcome:
        """Return what becomes of a task without a link.

        A video that the link would have been compared with is taken for the task's own if no
        other task of this run wants its name. Otherwise the task has failed.
        """
        if self.plan.action is not Action.COMPARE:
            return self.failed(fault)
        stub = self.plan.path.stem
        is_alone = self._tools.index.wanted[fold(stub)] <= 1
        is_anothers = self._tools.index.is_promised_to_another(self.task, stub)
        if is_alone and not is_anothers:
            told = "Assumed to be this task's video, since its link could not be asked"
            adopted = self._adopt(f"  ℹ️ {told}: {fault.why}")
            if adopted:
                return adopted
        name = printable(self.plan.path.name)
        may_be_it = f"{name} may be its video, but that could not be checked"
        detail = ", ".join(filter(None, [fault.detail, may_be_it]))
        return self.failed(replace(fault, detail=detail))

    def _attempt(self) -> Outcome:
        # Looked at before our part is made, so that a run which must wait makes none, and again
        # afterwards, so that of two runs that start together at least one gives way.
        self._list_hidden_files(max_age_s=LISTING_KEPT_S)
        self.part = Part(self._tools.hidden, self.task.file_key)
        try:
            hidden_files = self._list_hidden_files()
            return self._bring_into(self.part, best_leftover(hidden_files))
        except DiskFull:
            self.part.discard()  # a leftover would only take up room
            raise
        finally:
            self.part.release()

    def _list_hidden_files(self, max_age_s: float = 0.0) -> list[Path]:
        """Return the task's hidden files; raises `Later` if another run has the task in hand."""
        own = self.part.path if self.part else None
        hidden_files = self._tools.hidden.of_task(self.task.file_key, max_age_s)
        if self._tools.hidden.is_another_run_at_work(hidden_files, own):
            why = "a video that another run has in hand"
            raise Later(random.uniform(0.1, 0.4), why, is_in_other_hands=True)
        return hidden_files

    def _bring_into(self, part: Part, leftover: Leftover | None) -> Outcome:
        """Look at the directory, download what is missing, and publish it.

        Returns the outcome; raises what an attempt may end with.
        """
        self.plan = plan_task(self.task, self._tools.index, self._may_adopt)
        if self.plan.action is Action.KEEP:
            return self._outcome(Status.EXISTS)
        if self.plan.action is Action.ADOPT:
            adopted = self._adopt()
            if adopted:
                return adopted
            raise TransientError("the name was taken meanwhile")
        if not self._may_resume(leftover):
            leftover = None
        if leftover and leftover.is_whole:
            part.copy(leftover, self.watch)
        else:
            adopted = self._transfer(part, leftover)
            if adopted:
                return adopted
        self.watch.note()  # a slow disk gets as long as a slow server
        part.finish()
        return self._publish(part, self._check_content(part))

    def let_go(self) -> None:
        """Let go of the part, for a thread that is stuck with it."""
        if self.part:
            self.part.let_go()

    def _may_resume(self, leftover: Leftover | None) -> bool:
        """Whether to go on from ``leftover`` instead of downloading everything."""
        if leftover is None or self.plan.action is Action.COMPARE:
            return False  # to compare, an answer that announces the size of the whole is needed
        # The last of several tries starts from nothing: the leftover may be what is wrong.
        return leftover.is_whole or not self._retries.is_last

    # From the request to bytes on disk

    def _transfer(self, part: Part, leftover: Leftover | None) -> Outcome | None:
        """Fill the part and return ``None``, or return the outcome if the video was there.

        That it was there is seen from the size that the server announces.
        """
        link = self._links.get(self.watch)
        if self.task.state is State.UNFINISHED:
            self._learn_that_it_succeeded(link)
        response = self._request(link, leftover)
        if leftover and not resumes(response, leftover):
            leftover = None
            if response.status_code != 200 and not is_retried(response.status_code):
                # It may be the range that was refused and not the link: ask for all.
                response.close()
                response = self._request(link, None)
        with response:
            return self._receive_or_adopt(response, part, leftover)

    def _learn_that_it_succeeded(self, link: str) -> None:
        """Plan anew for a task that polling gave up on, and that Runway says has SUCCEEDED."""
        self._may_adopt = False  # no earlier run knew its link, so an orphan cannot be its video
        task = self.task.as_succeeded(link)
        self.plan = plan_task(task, self._tools.index, may_adopt=False)

    def _request(self, link: str, leftover: Leftover | None) -> requests.Response:
        headers = {"Accept-Encoding": "identity"}
        if leftover:
            headers["Range"] = f"bytes={leftover.size_bytes}-"
            headers["If-Range"] = leftover.source.validator
        return self._tools.client.get(self._session, link, headers, MAX_REDIRECTS)

    def _receive_or_adopt(
        self, response: requests.Response, part: Part, leftover: Leftover | None
    ) -> Outcome | None:
        """Receive the body into the part and return ``None``, or return the outcome of adopting.

        With ``leftover``, the answer is known to go on where that ends. Raises `Later` for a link
        that was refused when Runway can be asked for another.
        """
        try:
            check_status(response)
        except LinkDead as refusal:
            self._links.refuse(refusal)
            raise Later(0.0, "a fresh link from Runway") from None
        check_encodings(response.headers)
        head = read_head(response)
        is_own = self.plan.action is Action.COMPARE and head.total_bytes == self.plan.size_bytes
        if is_own and response.status_code == 200:
            adopted = self._adopt()
            if adopted:
                return adopted
        if leftover:
            part.copy(leftover, self.watch)
            self._notes[f"  ⏩ Resumed at {megabytes(leftover.size_bytes)}"] += 1
        elif head.start != 0:
            raise TransientError("the server sent a range that was not asked for")
        else:
            part.source = head.source
        self._receive_body(response, part, head)
        return None

    def _receive_body(self, response: requests.Response, part: Part, head: Head) -> None:
        """Write the body to the part and count it against what the head announced.

        If no length was announced, at least one byte must come.
        """
        announced = response.raw.length_remaining
        before = response.raw.tell()
        try:
            for block in read_blocks(response, self.watch, self._tools.settings.timeout):
                part.write(block)
        finally:
            self._retries.progressed(part.size_bytes, is_whole=part.size_bytes == head.total_bytes)
        came = response.raw.tell() - before
        expected = 1 if announced is None else announced
        is_short = came < expected
        is_miscounted = head.total_bytes is not None and head.total_bytes != part.size_bytes
        if is_short or is_miscounted:
            raise TransientError("the connection was cut")
        self._is_length_known = announced is not None or head.total_bytes is not None

    def _check_content(self, part: Part) -> Content:
        """Return what the part holds.

        Raises `TransientError` for a video that was cut, `TaskError` for what is no video. What
        began with a leftover may be wrong because of that: then all of it is asked for.
        """
        with disk_errors("read the video back"):
            content = inspect_path(part.path, part.size_bytes)
        if part.leftover and content not in KEPT:
            part.discard()
            remove(part.leftover.path)
            raise PartGone("the leftover of an earlier attempt did not lead to a video")
        # Without a length, what looks like surplus may be a box that was cut in its head.
        is_cut = content is Content.SURPLUS and not self._is_length_known
        if content is Content.CUT or is_cut:
            part.discard()
            raise TransientError(f"the server sent {content.value}")
        if content not in KEPT:
            part.discard()
            self._tools.client.forget_connections()
            raise TaskError(
                f"what the server sent is {content.value}", "look at the task in Runway"
            )
        return content

    # From bytes on disk to a video under its name

    def _publish(self, part: Part, content: Content) -> Outcome:
        """Give the whole video its name, or another if that is taken.

        It is taken when somebody was faster, and when a video that is there was compared with the
        answer and turned out not to be this task's.
        """
        info = file_info(part.size_bytes, part.sha256.hexdigest())
        for _ in range(NAME_TRIES):
            self.watch.check()
            try:
                with disk_errors("put the video in place"):
                    publish_video(part, self.plan, info, self._tools.hidden)
            except FileExistsError:
                self.plan = plan_task(self.task, self._tools.index, may_adopt=False)
                if self.plan.action is Action.KEEP:
                    return self._outcome(Status.EXISTS)
                continue
            self._tools.index.note_video(self.task, self.plan.path.stem)
            return self._downloaded(part.size_bytes, content)
        raise TransientError("other programs keep taking its names")

    def _downloaded(self, size_bytes: int, content: Content) -> Outcome:
        """Return the outcome of a download, with notes on what was unusual."""
        name = self.plan.path.stem
        if self.plan.holder and name != self.task.stub:
            self._notes[f"  ℹ️ Saved under another name: {printable(self.plan.holder)}"] += 1
        others = len(row_links(self.task.row)) - 1
        if others > 0:
            more = counted(others, "more link")
            self._notes[f"  ℹ️ The task has {more}; the first is the video"] += 1
        if self._links.is_fresh:
            self._notes["  🔗 Fresh link from Runway"] += 1
        warning = "" if content is Content.WHOLE else f"it is {content.value}"
        return self._outcome(Status.DOWNLOADED, size_bytes, warning=warning)

    def _adopt(self, *notes: str) -> Outcome | None:
        """Create metadata for the video that is there, and return the outcome, with ``notes``.

        Returns ``None`` if somebody took the name of the metadata meanwhile.
        """
        path = self.plan.path
        metadata_path = path.with_suffix(".json")
        try:
            with disk_errors(f"describe {path.name}"):
                info = describe_file(path, self.watch.go_on)
                put_metadata(metadata_path, self.task, path.name, info, self._tools.hidden)
        except FileExistsError:
            return None
        for line in [*notes, f"  📄 Metadata created: {printable(metadata_path.name)}"]:
            self._notes[line] += 1
        self._tools.index.note_video(self.task, path.stem)
        return self._outcome(Status.EXISTS, info["size_bytes"])

    def _outcome(
        self,
        status: Status,
        size_bytes: int | None = None,
        fault: Fault | None = None,
        warning: str = "",
        runway_status: str = "",
    ) -> Outcome:
        if status is Status.EXISTS and size_bytes is None:
            size_bytes = self.plan.size_bytes
        return Outcome(
            task=self.task,
            status=status,
            path=self.plan.path,
            size_bytes=size_bytes,
            fault=fault,
            warning=warning,
            notes=told_once(self._notes),
            runway_status=runway_status,
            link=self._links.current,
        )


def told_once(counts: Counter[str]) -> tuple[str, ...]:
    """Return each line once, with how often it came if that was more than once."""
    return tuple(
        line if count == 1 else f"{line} ({count} times)" for line, count in list(counts.items())
    )


def resumes(response: requests.Response, leftover: Leftover) -> bool:
    """Whether the answer goes on where ``leftover`` ends, with the same object."""
    if response.status_code != 206:
        return False
    head = read_head(response)
    return head.start == leftover.size_bytes and head.source == leftover.source


# --- Handing over: the commands of --exec -------------------------------------------------------

STOP_POLL_S = 0.05
OUTPUT_LINES_SHOWN = 3


@dataclass(frozen=True)
class Command:
    """A command that takes videos on: its words, with ``{video}`` and ``{metadata}`` to fill in."""

    words: tuple[str, ...]

    @classmethod
    def parse(cls, given: str | Sequence[str]) -> Command:
        """Return the command.

        Raises ValueError if there is no such program, or the words or placeholders are wrong.
        """
        if isinstance(given, str):
            words = tuple(shlex.split(given.replace("\\", "\\\\") if os.name == "nt" else given))
        else:
            words = tuple(given)
        program = words[0] if words else ""
        if not shutil.which(program):
            raise ValueError(f"there is no such command: {program!r}")
        # Refuse what looks like a placeholder but is none: {vidoe}, {video!r}, {video:>9}. ${WORD}
        # is left alone here and when filling in: it is a variable of a shell.
        for in_braces in re.findall(r"(?<!\$)\{\s*[\w-]*(?:[.!:][^{}]*)?\s*\}", " ".join(words)):
            if in_braces not in ("{video}", "{metadata}"):
                raise ValueError(f"{in_braces} is not {{video}} or {{metadata}}")
        unclosed = re.search(r"(?<!\$)\{(?:video|metadata)(?!\w*\})", " ".join(words))
        if unclosed:
            raise ValueError(f"{unclosed[0]} is not closed with a brace")
        return cls(words)

    @property
    def receipt(self) -> str:
        """What metadata holds once this command has taken a video."""
        return digest("\0".join(self.words))[:12]

    @property
    def name(self) -> str:
        return printable(self.words[0])

    def filled_in(self, video: Path, metadata: Path) -> list[str]:
        paths = {"{video}": str(video.absolute()), "{metadata}": str(metadata.absolute())}
        either = re.compile(r"(?<!\$)\{(?:video|metadata)\}")
        return [either.sub(lambda match: paths[match[0]], word) for word in self.words]


def receipts_of(metadata: JsonObject) -> list[str]:
    """Return the receipts of the commands that took the video, none if there is no such list."""
    receipts = metadata.get("handed_over")
    if not isinstance(receipts, list):
        return []
    return [each for each in receipts if isinstance(each, str)]


def commands_due(path: Path, commands: Sequence[Command]) -> list[Command]:
    """Return the commands that have not taken the video ``path`` yet; raises OSError.

    For a video without metadata there are none: there would be no place for the receipts.
    """
    metadata = read_metadata(path.with_suffix(".json")) if commands else None
    if not metadata:
        return []
    receipts = receipts_of(metadata)
    return [each for each in commands if each.receipt not in receipts]


def hand_over(outcome: Outcome, tools: Tools) -> Outcome:
    """Run the commands that have not taken this video, in order, until one fails.

    Metadata remembers each command that succeeded. After a kill between a command's end and its
    receipt, the next run runs the command again.
    """
    if not outcome.is_on_disk:
        return outcome
    notes = list(outcome.notes)
    try:
        with disk_errors("read or write its metadata, for --exec"):
            for command in commands_due(outcome.path, tools.commands):
                run_command(command, outcome.path, tools.stop)
                record_hand_over(command, outcome, tools.hidden)
                notes.append(f"  🔧 Handed over: {command.name}")
    except Cancelled:  # the next run hands it over
        return replace(outcome, notes=tuple(notes), is_kept_waiting=True)
    except TaskError as error:
        return replace(outcome, notes=tuple(notes), fault=error.fault)
    except DiskFull as error:
        fault = Fault(f"no space left, {error}", "make room, then run again with --exec")
        return replace(outcome, notes=tuple(notes), fault=fault)
    return replace(outcome, notes=tuple(notes))


def record_hand_over(command: Command, outcome: Outcome, hidden: HiddenFiles) -> None:
    """Note in the metadata that the command succeeded, and describe a video that it changed."""
    path = outcome.path.with_suffix(".json")
    there = read_metadata(path)
    if not there:
        return  # the command took the metadata away
    receipts = [*receipts_of(there), command.receipt]
    changes: dict[str, Any] = {"handed_over": receipts}
    if outcome.path.exists():
        changes["file_info"] = describe_file(outcome.path)
    update_metadata(path, there, changes, outcome.task.file_key, hidden)


def run_command(command: Command, video: Path, stop: threading.Event) -> None:
    """Run a command without a shell and without the API key.

    Raises `TaskError` with the last lines that it printed if it fails, `Cancelled` at a stop.
    """
    if stop.is_set():
        raise Cancelled
    words = command.filled_in(video, video.with_suffix(".json"))
    environment = {**os.environ}
    environment.pop("RUNWAYML_API_SECRET", None)
    said = ""
    try:
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            wait_for(process, stop)
            output.seek(0)
            said = last_lines(output)
        why = why_it_failed(process.returncode)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not a usable command"
    if why:
        reason = f"not handed over: {command.name}: {why}"
        raise TaskError(reason, "fix that, then run again with --exec", said)


def why_it_failed(exit_code: int) -> str:
    """Return why a command failed, ``""`` if it did not.

    For a command that a signal ended, subprocess gives the number of the signal, negated.
    """
    if exit_code == 0:
        return ""
    if exit_code > 0:
        return f"exit code {exit_code}"
    return f"ended by signal {-exit_code}"


def wait_for(process: subprocess.Popen[bytes], stop: threading.Event) -> None:
    """Wait for ``process``; at a stop, end it and raise `Cancelled`."""
    while process.poll() is None and not stop.is_set():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_POLL_S)
    has_failed = process.returncode not in (None, 0)
    if has_failed:
        # A terminal sends Ctrl-C to the command, too. It may have failed of that, before ``stop``
        # is set here.
        stop.wait(5 * STOP_POLL_S)
    has_succeeded = process.returncode == 0
    if stop.is_set() and not has_succeeded:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10 * STOP_POLL_S)
        process.kill()
        raise Cancelled


def last_lines(output: BinaryIO) -> str:
    """Return the last lines of a command's output that are not blank, joined to one line."""
    lines = (line.decode(errors="replace").strip() for line in output)
    return printable(" | ".join(deque(filter(None, lines), OUTPUT_LINES_SHOWN)))[-400:]


# --- The report: what a run came to -------------------------------------------------------------


class Report:
    """Collects what became of all tasks, for the statistics, the exit code and --json."""

    def __init__(self) -> None:
        self.found = 0
        self.outcomes: list[Outcome] = []
        self.problems: list[str] = []  # of files, the gallery, …: no single video's
        self.kept_bytes = 0  # of videos that a stop left unfinished
        self.is_run = False  # whether there was a run to sum up
        self._counted_keys: set[str] = set()
        self._open_file_keys: set[str] = set()  # of tasks found that have come to no end

    def begin(self, tasks: Iterable[Task]) -> None:
        """Count the tasks whose rows say SUCCEEDED; `record` adds those of which only Runway does.

        Each call of a program counts its tasks anew.
        """
        self._counted_keys.clear()
        for task in tasks:
            if task.state is State.SUCCEEDED:
                self.found += 1
                self._counted_keys.add(task.key)
                self._open_file_keys.add(task.file_key)

    def record(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._open_file_keys.discard(outcome.task.file_key)
        key = outcome.task.key
        if outcome.status in COUNTED and key not in self._counted_keys:
            self.found += 1
            self._counted_keys.add(key)

    def count(self, status: Status) -> int:
        return sum(outcome.status is status for outcome in self.outcomes)

    @property
    def stats(self) -> dict[str, int]:
        return {
            "total_succeeded": self.found,
            "downloaded": self.count(Status.DOWNLOADED),
            "failed_downloads": self.count(Status.FAILED),
            "already_exists": self.count(Status.EXISTS),
        }

    @property
    def unfinished(self) -> int:
        """How many of the tasks that were found have no outcome, from any call."""
        return len(self._open_file_keys)

    @property
    def latest(self) -> list[Outcome]:
        """The last outcome of each task: a program may have tried one several times."""
        # With the stub, since a program may process one row under several names.
        # Tasks without a key cannot be told apart, so each of their outcomes counts.
        last = {(each.task.key or id(each), each.task.stub): each for each in self.outcomes}
        return list(last.values())

    @property
    def exit_code(self) -> int:
        has_fault = any(outcome.fault for outcome in self.latest)
        return 3 if has_fault or self.problems else 0

    def as_json(self, exit_code: int, error: str) -> dict[str, Any]:
        shown = {*COUNTED, Status.PENDING}
        videos = [each.as_json() for each in self.outcomes if each.status in shown]
        others = [each for each in self.outcomes if each.status is Status.NOT_SUCCEEDED]
        unasked = [each.error for each in self.outcomes if each.status is Status.UNASKED]
        not_succeeded = [
            {
                "task_id": each.task.task_id,
                "stub": each.task.stub,
                "runway_status": each.runway_status,
            }
            for each in others
        ]
        errors = [error, *self.problems, *dict.fromkeys(unasked)]
        return {
            "stats": self.stats,
            "videos": videos,
            "not_succeeded": not_succeeded,
            "exit_code": exit_code,
            "error": "; ".join(filter(None, errors)) or None,
        }


# --- How it all looks ---------------------------------------------------------------------------

VIDEOS_LISTED = 10  # in the summary


def outcome_block(outcome: Outcome, number: str) -> list[str]:
    """Return the block of lines about one task; ``number`` is ``k/N``.

    It is printed as a whole when the task is done, though it reads as if it were printed step by
    step: users know these lines, and those of parallel downloads must not mix.
    """
    name = printable(outcome.path.name)
    lines = ["", f"  {number} Task {shown_id(outcome.task.task_id)}"]
    if outcome.status is Status.DOWNLOADED:
        lines.extend(download_lines(outcome, name))
    elif outcome.status is Status.EXISTS:
        lines.append(f"  ⚠️ Already exists: {name}")
    elif outcome.status is Status.NOT_SUCCEEDED:
        lines.append(f"  ℹ️ {runway_says(outcome.runway_status)}")
    if outcome.warning:
        lines.append(f"  ⚠️ Kept, though {outcome.warning}: look at it")
    lines.extend(outcome.notes)
    if outcome.fault:
        what = "" if outcome.is_on_disk else f"Failed: {name}: "
        lines.append(f"  ❌ {what}{outcome.fault.why}")
    return lines


def download_lines(outcome: Outcome, name: str) -> Iterator[str]:
    size = megabytes(outcome.size_bytes or 0)
    yield f"  🎬 Downloading: {name}"
    if outcome.link:
        yield f"  📥 Streaming download from: {shown_link(outcome.link)}"
    yield f"  📊 File size: {size}"
    yield f"  ✅ Downloaded: {size}"
    yield f"  📄 Metadata saved: {name.removesuffix('.mp4')}.json"


EMOJI = {
    Status.DOWNLOADED: "✅",
    Status.EXISTS: "⚠️",
    Status.NOT_SUCCEEDED: "ℹ️",
}


def outcome_line(outcome: Outcome, number: str) -> str:
    """Return one line about one task of many; its notes, warning and fault follow its name."""
    name = printable(outcome.path.name)
    mark = "❌" if outcome.fault else EMOJI[outcome.status]
    told = [line.strip() for line in outcome.notes]
    if outcome.warning:
        told.append(f"⚠️ kept, though {outcome.warning}")
    if outcome.fault:
        told.append(outcome.fault.why)
    if outcome.status is Status.NOT_SUCCEEDED:
        told.append(runway_says(outcome.runway_status))
    what = f"({megabytes(outcome.size_bytes or 0)})" if outcome.is_on_disk else ""
    return "  ".join(filter(None, [f"  {number} {mark} {name} {what}".rstrip(), *told]))


def runway_says(status: str) -> str:
    """Put Runway's answer about a task that polling gave up on into words."""
    if status in ENDED_STATUSES:
        return f"Not succeeded: Runway says {status}"
    if status == NOT_FOUND:
        return "Not succeeded: unknown to Runway"
    return f"Not finished: Runway says {printable(status)}; run again later"


def statistics_lines(stats: Mapping[str, int]) -> list[str]:
    total = stats["total_succeeded"]
    on_disk = stats["downloaded"] + stats["already_exists"]
    rule = "=" * 60
    lines = [
        "",
        rule,
        "📊 DOWNLOAD STATISTICS",
        rule,
        f"✅ Total SUCCEEDED tasks found: {total}",
        f"📥 Videos downloaded: {stats['downloaded']}",
        f"⚠️ Already existed: {stats['already_exists']}",
        f"❌ Failed downloads: {stats['failed_downloads']}",
    ]
    if total:
        tenths = 1000 * on_disk // total
        lines.append(f"📈 Success rate: {tenths / 10}%")
    return lines


def storage_lines(directory: Path, outcomes: Iterable[Outcome], patience_s: float) -> list[str]:
    """Return lines about the videos in ``directory``: new ones first, and the total size.

    Returns nothing if the directory cannot be listed within ``patience_s``.
    """
    sizes = try_for(patience_s, lambda: video_sizes(directory))
    if not sizes:
        return []
    downloaded = [each.path.name for each in outcomes if each.status is Status.DOWNLOADED]
    new = [name for name in downloaded if name in sizes]
    names = dict.fromkeys([*new, *sorted(sizes)])  # each once
    lines = [f"• {printable(name)} ({megabytes(sizes[name])})" for name in names]
    shown = shortened(lines, VIDEOS_LISTED)
    total = megabytes(sum(sizes.values()))
    return [
        "",
        f"📁 Videos in {printable(directory)}:",
        *(f"  {line}" for line in shown),
        "",
        f"💾 Total storage used: {total}",
    ]


def video_sizes(directory: Path) -> dict[str, int]:
    """Return the size of each video in ``directory`` by its name."""
    sizes = {}
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            is_video = entry.name.endswith(".mp4") and not entry.name.startswith(".")
            size = file_size(entry.path) if is_video else None
            if size is not None:
                sizes[entry.name] = size
    return sizes


def failure_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """Return what is wrong, grouped: the reason and the advice once, then the names."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for outcome in outcomes:
        fault = outcome.fault
        if fault:
            noun = "unfinished task" if outcome.status is Status.UNASKED else "video"
            names = groups.setdefault(("❌", noun, fault.reason, fault.hint), [])
            names.append(f"{outcome.label}: {fault.detail}" if fault.detail else outcome.label)
        if outcome.warning:
            group = ("⚠️", "video", f"kept, though {outcome.warning}", "look at it")
            groups.setdefault(group, []).append(outcome.label)
    lines = []
    for (mark, noun, reason, hint), names in groups.items():
        lines.append("")
        lines.append(f"{mark} {counted(len(names), noun)}: {reason}")
        lines.extend(f"    {name}" for name in shortened(names, NAMES_SHOWN))
        lines.append(f"  → {hint}")
    return lines


@dataclass(frozen=True)
class Verdict:
    """The last sentence of a run of several tasks, and whether it is bad news."""

    text: str
    is_bad: bool


def verdict(report: Report) -> Verdict | None:
    """Return the one sentence that is true of the whole run, ``None`` for fewer than two tasks."""
    outcomes = [outcome for outcome in report.latest if outcome.status in COUNTED]
    found = len(outcomes) + report.unfinished
    if found < 2:
        return None
    on_disk = sum(outcome.is_on_disk for outcome in outcomes)
    bad = sum(outcome.fault is not None for outcome in outcomes)
    waiting = sum(outcome.is_kept_waiting for outcome in outcomes)
    if report.unfinished or waiting:
        return Verdict(stopped_sentence(report, on_disk, bad, waiting), is_bad=True)
    if bad:
        return Verdict(f"❌ {bad:,} of {found:,} with a problem, {on_disk:,} on disk", is_bad=True)
    all_there = f"{on_disk:,} of {found:,} on disk"
    if report.exit_code:
        return Verdict(f"❌ {all_there}, but another problem is named above", is_bad=True)
    return Verdict(f"✅ {all_there}", is_bad=False)


def stopped_sentence(report: Report, on_disk: int, bad: int, waiting: int) -> str:
    """Say how far a stopped run came; ``waiting`` videos are on disk, but not handed over."""
    parts = [f"{on_disk:,} on disk"]
    if bad:
        parts.append(f"{bad:,} with a problem")
    if waiting:
        parts.append(f"{waiting:,} not handed over")
    if report.unfinished:
        parts.append(f"{report.unfinished:,} not finished")
    if report.kept_bytes:
        parts.append(f"{megabytes(report.kept_bytes)} of them kept")
    return f"⏸ stopped: {', '.join(parts)}"


# --- The console ---------------------------------------------------------------------------------

TICK_S = 0.25
SILENCE_S = 30.0
LISTING_MAX_S = 10.0  # a mount that has fallen silent must not keep the run from ending
RATE_WINDOW_S = 5.0
# What a stream may raise that is closed, None, replaced by a program, or of an unknown encoding.
CONSOLE_ERRORS = (OSError, ValueError, AttributeError, TypeError, LookupError)


@dataclass(frozen=True)
class Progress:
    """How far a run is: tasks ``done`` of ``total``, bytes received, and what is waited for."""

    done: int
    total: int
    bytes_done: int
    waiting_for: str = ""


def columns_of(text: str) -> int:
    """Return how many columns of a terminal ``text`` takes; most emoji take two."""
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text)


def fit_columns(text: str, columns: int) -> str:
    while columns_of(text) > columns:
        text = text[:-1]
    return text


def terminal_columns(stream: Any) -> int:
    """Return the width of the terminal behind ``stream``, 0 if it can show no live line."""
    if os.environ.get("TERM") == "dumb":
        return 0
    with contextlib.suppress(*CONSOLE_ERRORS):
        return os.get_terminal_size(stream.fileno()).columns or 80
    return 0


class Console:
    """Prints everything: lines to stdout; what is wrong, and the live line, to stderr.

    With ``quiet``, only what is wrong is printed. With ``as_json``, stdout is kept free for the
    JSON object. A reader that goes away or an encoding without emoji never breaks the run.
    """

    def __init__(
        self,
        quiet: bool = False,
        as_json: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quiet = quiet
        self._as_json = as_json
        self._clock = clock
        self._printed_s = clock()
        self._is_live = False  # whether the live line is on the screen
        self._shown = 0
        self._total = 0
        self._rates = deque([(clock(), 0)])

    def say(self, *lines: str) -> None:
        if not self._quiet:
            self._print(sys.stderr if self._as_json else sys.stdout, lines)

    def complain(self, *lines: str) -> None:
        """Print what is wrong; with ``quiet``, without the empty lines that set it apart."""
        self._print(sys.stderr, [line for line in lines if line or not self._quiet])

    def begin(self, total: int) -> None:
        """Number the outcomes to come from 1 to ``total``."""
        self._shown = 0
        self._total = total
        self._rates = deque([(self._clock(), 0)])

    def show_outcome(self, outcome: Outcome, is_shown: bool = True) -> None:
        """Print what became of a task, in a block, or in one line if there are many tasks.

        Of many, those that were there before are not printed. One that is not to be shown only
        takes its number.
        """
        self._shown += 1
        if not is_shown:
            return
        number = f"{self._shown}/{self._total}"
        is_news = outcome.status is not Status.EXISTS or outcome.notes or outcome.fault
        if self._total <= BLOCKS_SHOWN:
            self.say(*outcome_block(outcome, number))
        elif is_news:
            self.say(outcome_line(outcome, number))

    def show_summary(
        self, report: Report, directory: Path, error_lines: Sequence[str] = ()
    ) -> None:
        """Print the statistics, the videos there, then what is wrong, and the verdict."""
        self.say(*statistics_lines(report.stats))
        patience_s = STOP_GRACE_S if report.unfinished else LISTING_MAX_S
        self.say(*storage_lines(directory, report.outcomes, patience_s))
        self.complain(*failure_lines(report.latest))
        if error_lines:
            self.complain("", *(f"❌ {line}" for line in error_lines))
        end = verdict(report)
        if end:
            tell = self.complain if end.is_bad else self.say
            tell("", end.text)

    def show_progress(self, progress: Progress) -> None:
        """Redraw the live line; without a terminal, print a line after a long silence."""
        if self._quiet:
            return
        rate = self._bytes_per_second(progress.bytes_done)
        line = "  ".join(self._progress_parts(progress, rate))
        columns = terminal_columns(sys.stderr)
        if columns:
            self._is_live = True
            self._write(sys.stderr, f"\r\x1b[K{fit_columns(line, columns - 1)}", end="")
        elif self._clock() - self._printed_s >= SILENCE_S:
            self.say(line)

    def _progress_parts(self, progress: Progress, rate: float) -> list[str]:
        parts = [f"⏬ {progress.done:,}/{progress.total:,}"]
        if progress.bytes_done:
            parts.append(f"{progress.bytes_done / BYTES_PER_MB:.1f} MB")
        if rate:
            parts.append(f"{rate / BYTES_PER_MB:.1f} MB/s")
        if progress.waiting_for:
            parts.append(f"⏳ {printable(progress.waiting_for)}")
        return parts

    def _bytes_per_second(self, bytes_done: int) -> float:
        """Return the rate of the last seconds; it is to be called a few times a second."""
        now_s = self._clock()
        self._rates.append((now_s, bytes_done))
        while now_s - self._rates[0][0] > RATE_WINDOW_S:
            self._rates.popleft()
        first_s, first_bytes = self._rates[0]
        return (bytes_done - first_bytes) / (now_s - first_s) if now_s > first_s else 0.0

    def clear_line(self) -> None:
        if self._is_live:
            self._write(sys.stderr, "\r\x1b[K", end="")
            self._is_live = False

    def _print(self, stream: Any, lines: Iterable[str]) -> None:
        text = "\n".join(lines)
        if text:
            self.clear_line()
            self._printed_s = self._clock()
            self._write(stream, text, end="\n")

    def _write(self, stream: Any, text: str, end: str) -> None:
        if stream is None:  # it was closed before we began; print would take stdout instead
            return
        with contextlib.suppress(*CONSOLE_ERRORS):
            encoding = getattr(stream, "encoding", None) or "utf-8"
            shown = text.encode(encoding, "replace").decode(encoding)
            print(shown, end=end, file=stream, flush=True)


# --- The run: many downloads in parallel --------------------------------------------------------

STOOD_STILL_S = 1.0  # if a wait overruns by more, the process as a whole stood still: Ctrl-Z
# With the usual 8 MB for each thread, 64 of them can exhaust `ulimit -v`, and Python may wait for
# ever for a thread that could not begin.
THREAD_STACK_BYTES = 1024 * 1024
THREAD_START_INTERVAL_S = 0.004  # see `Workers`
OPEN_FILES_KEPT = 16  # for the program itself
OPEN_FILES_PER_WORKER = 6  # connection, part, metadata, what a command needs


def affordable_workers(wanted: int) -> int:
    """Return ``wanted``, or fewer if the limit of open files takes no more."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        limit = os.sysconf("SC_OPEN_MAX")
        if limit > 0:
            wanted = min(wanted, (limit - OPEN_FILES_KEPT) // OPEN_FILES_PER_WORKER)
    return max(1, wanted)


Result = tuple[Download, Outcome | DownloaderError]


class Workers:
    """Threads that make one attempt each at the downloads they are given.

    They are daemons, so that the program can end while one waits for a server. Where the system
    gives no thread at all, the caller's own does the work.

    They start a moment apart. If all started at once, all would wait for the server at the same
    time, and then compete for the processor at the same time: a run of 200 videos would take a
    tenth longer.
    """

    def __init__(self, limit: int, tools: Tools) -> None:
        self._limit = limit
        self._tools = tools
        self._threads = 0
        self._todo: SimpleQueue[Download | None] = SimpleQueue()
        self._has_news = threading.Event()
        self.done: deque[Result] = deque()  # attempts that have ended, for the leader to take

    def start(self, download: Download) -> None:
        self._todo.put(download)
        if self._threads < self._limit:
            self._start_thread()
        if self._threads == 0:
            self._todo.get()
            self._make_attempt(download)

    def wait(self, timeout_s: float) -> None:
        """Wait until an attempt has ended, but no longer than ``timeout_s``."""
        self._has_news.wait(timeout_s)
        self._has_news.clear()

    def replace_one(self) -> None:
        """Allow for one more thread: one is stuck."""
        self._limit += 1

    def end(self) -> None:
        for _ in range(self._threads):
            self._todo.put(None)

    def _start_thread(self) -> None:
        """Start one more thread, if the system gives one."""
        with contextlib.suppress(RuntimeError):
            threading.Thread(target=self._run, daemon=True).start()
            self._threads += 1
            time.sleep(THREAD_START_INTERVAL_S)

    def _run(self) -> None:
        while download := self._todo.get():
            self._make_attempt(download)

    def _make_attempt(self, download: Download) -> None:
        self.done.append((download, self._attempt(download)))
        self._has_news.set()

    def _attempt(self, download: Download) -> Outcome | DownloaderError:
        try:
            outcome = download.bring()
            download.watch.pause("commands of --exec")
            return hand_over(outcome, self._tools)
        except DownloaderError as error:
            return error
        except Exception as error:  # or this thread would end, and the run wait for ever
            reason = f"unexpected {type(error).__name__}: {printable(error)}"
            return download.failed(Fault(reason, "please report it"))


@dataclass(frozen=True, order=True)
class Waiting:
    """A download whose next attempt is due at ``due_s`` on the monotonic clock."""

    due_s: float
    download: Download = field(compare=False)
    later: Later = field(compare=False)


@dataclass(frozen=True)
class Listener:
    """The callbacks of a run.

    ``show_outcome`` takes each outcome, ``show_progress`` the bytes received and what the run is
    waiting for, and ``say`` lines to print.
    """

    show_outcome: Callable[[Outcome], None]
    show_progress: Callable[[int, str], None]
    say: Callable[..., None]


class Run:
    """Leads one run: starts attempts, keeps the downloads that wait for another one, and reports.

    A download that waits holds up no worker. If the server asked it to slow down, its slot stays
    empty nevertheless, so that the server is not asked by more and more. Downloads that another
    run has in hand are looked at again when nothing else is to be started.
    """

    def __init__(self, tools: Tools, workers: int, listener: Listener) -> None:
        self._tools = tools
        self._listener = listener
        self._slots = affordable_workers(workers)
        self._workers = Workers(self._slots, tools)
        self._plans: deque[Plan] = deque()  # not started yet
        self._running: list[Download] = []
        self._backing_off: list[Waiting] = []  # a heap
        self._elsewhere: list[Waiting] = []  # a heap: in another run's hands
        self._received_bytes = 0  # of downloads that have ended
        self._has_said_to_wait = False

    def work(self, plans: Iterable[Plan]) -> None:
        """Carry out ``plans``; raises `JobError` when the run cannot go on."""
        self._plans.extend(plans)
        ticked_s = time.monotonic() - TICK_S
        try:
            while self._is_at_work() and not self._tools.stop.is_set():
                self._start_what_is_due()
                self._wait()
                self._take_results()
                if time.monotonic() - ticked_s >= TICK_S:
                    ticked_s = time.monotonic()
                    self._give_up_what_hangs(ticked_s)
                    self._listener.show_progress(self._bytes(), self._waiting_for())
                    self._say_to_wait()
        finally:
            if self._is_at_work():
                self._tools.stop.set()
            self._wind_up()

    def _wait(self) -> None:
        """Wait for an attempt to end, or for the next tick."""
        patience_s = self._patience_s()
        began_s = time.monotonic()
        self._workers.wait(patience_s)
        overslept_s = time.monotonic() - began_s - patience_s
        if overslept_s > STOOD_STILL_S:
            for download in self._running:
                download.watch.excuse(overslept_s)

    def _is_at_work(self) -> bool:
        return bool(self._plans or self._running or self._backing_off or self._elsewhere)

    def _start_what_is_due(self) -> None:
        now_s = time.monotonic()
        # A retry is started even if no slot is free: it waits in the workers' queue.
        while self._backing_off and self._backing_off[0].due_s <= now_s:
            self._start(heapq.heappop(self._backing_off).download)
        while self._free_slots() > 0 and self._plans:
            self._start(Download(self._plans.popleft(), self._tools))
        while self._free_slots() > 0 and self._elsewhere and self._elsewhere[0].due_s <= now_s:
            self._start(heapq.heappop(self._elsewhere).download)

    def _free_slots(self) -> int:
        under_pressure = sum(each.later.is_pressure for each in self._backing_off)
        return self._slots - len(self._running) - under_pressure

    def _start(self, download: Download) -> None:
        self._running.append(download)
        self._workers.start(download)

    def _patience_s(self) -> float:
        """Return how long to wait for a result: until the next attempt is due, or a tick."""
        due = [TICK_S + time.monotonic()]
        if self._backing_off:
            due.append(self._backing_off[0].due_s)
        if self._elsewhere and self._free_slots() > 0:
            due.append(self._elsewhere[0].due_s)
        return max(0.0, min(due) - time.monotonic())

    def _take_results(self) -> None:
        """Take the attempts that have ended; raises the `JobError` that one has ended with.

        An attempt leaves the queue last, so that Ctrl-C at any moment loses none.
        """
        done = self._workers.done
        while done:
            download, result = done[0]
            if download in self._running:  # else it was given up before
                self._take(download, result)
                self._running.remove(download)
            done.popleft()

    def _take(self, download: Download, result: Outcome | DownloaderError) -> None:
        if isinstance(result, Later):
            heap = self._elsewhere if result.is_in_other_hands else self._backing_off
            due_s = time.monotonic() + result.wait_s
            heapq.heappush(heap, Waiting(due_s, download, result))
        elif isinstance(result, JobError):
            self._running.remove(download)  # or `_wind_up` would take it again
            raise result
        elif isinstance(result, Outcome):
            self._received_bytes += download.watch.received_bytes
            self._listener.show_outcome(result)
        # What is left is `Cancelled`, which needs no word: the run is ending.

    def _give_up_what_hangs(self, now_s: float) -> None:
        for download in [each for each in self._running if each.watch.is_hung(now_s)]:
            self._running.remove(download)
            self._workers.replace_one()
            fault = download.watch.give_up()
            self._received_bytes += download.watch.received_bytes
            try_for(STOP_GRACE_S, download.let_go)
            self._listener.show_outcome(download.failed(fault))

    def _wind_up(self) -> None:
        """Take what ends within a moment, and let go of the parts of what does not."""
        until_s = time.monotonic() + STOP_GRACE_S
        while self._running and time.monotonic() < until_s:
            with contextlib.suppress(JobError):  # one has ended the run already
                self._workers.wait(TICK_S)
                self._take_results()
        try_for(STOP_GRACE_S, self._let_go_of_all)
        self._workers.end()

    def _let_go_of_all(self) -> None:
        for download in self._running:
            download.let_go()

    # What is said of the run while it lasts

    def _is_waiting_for_others(self) -> bool:
        return bool(self._elsewhere) and not (self._plans or self._running or self._backing_off)

    def _say_to_wait(self) -> None:
        if self._is_waiting_for_others() and not self._has_said_to_wait:
            self._has_said_to_wait = True
            self._listener.say("", f"⏳ Waiting for {self._waiting_for()}")

    def _bytes(self) -> int:
        waiting = [each.download for each in (*self._backing_off, *self._elsewhere)]
        under_way = [*self._running, *waiting]
        return self._received_bytes + sum(each.watch.received_bytes for each in under_way)

    def _waiting_for(self) -> str:
        """Say what the run is waiting for: a retry, another run, commands, or one slow video."""
        if self._backing_off:
            return f"trying again: {self._backing_off[0].later.why}"
        if self._is_waiting_for_others():
            return f"{counted(len(self._elsewhere))} that another run has in hand"
        paused = [each.watch.paused_for for each in self._running if each.watch.paused_for]
        if paused and not self._plans:
            return paused[0]
        if len(self._running) == 1 and not self._plans:
            return self._running[0].plan.path.name
        return ""


# --- Reading the tasks of results files ----------------------------------------------------------

WARNED_FOR_S = 3 * DAY_S  # without a key, the tasks of older files are not worth a warning


@dataclass(frozen=True)
class Found:
    """What results files hold: the tasks to bring home, each once, and the files' ``errors``.

    ``askable`` are tasks that polling gave up on lately, about which Runway would be asked if
    there were a key. ``named`` counts the rows that --only names, all without it.
    """

    tasks: list[Task]
    askable: list[Task]
    errors: list[str]
    named: int


def read_tasks(
    paths: Sequence[Path],
    console: Console,
    name_row: Callable[[JsonObject], str] = wanted_stub,
    choice: Choice = Choice(),
) -> Found:
    """Read results files, latest first, and print what is in them.

    Returns tasks that polling gave up on, too, if Runway is to be asked about them. A file that
    cannot be read is among the errors that are returned.
    """
    found: list[Task] = []
    recent_keys: set[str] = set()
    errors = []
    named = 0
    for path in paths:
        saved = saved_at(path)
        saved_s = saved.timestamp() if saved.year >= FIRST_YEAR else time.time()
        try:
            rows = read_one_file(path, saved_s, console, name_row)
        except JobError as error:
            errors.append(str(error))
            continue
        named += sum(choice.names(task) for task in rows.tasks)
        chosen = [task for task in rows.tasks if choice.takes(task)]
        tell_of_rows(chosen, len(rows.tasks) - len(chosen), console)
        console.complain(*shortened(rows.wrong, NAMES_SHOWN))
        found.extend(chosen)
        if time.time() - saved_s < WARNED_FOR_S:
            recent_keys.update(task.key for task in chosen)
    merged = merge_tasks(found)
    warn_of_odd_statuses(merged, console)
    to_fetch = [task for task in merged if is_to_be_fetched(task)]
    askable = []
    if not api_key():
        recent = [task for task in merged if task.key in recent_keys]
        askable = [task for task in recent if task.is_asked_about(time.time())]
    return Found(to_fetch, askable, errors, named)


def read_one_file(
    path: Path, saved_s: float, console: Console, name_row: Callable[[JsonObject], str]
) -> Rows:
    """Return the rows of one results file, with lines to print of what is wrong with them.

    Prints which file it is. Raises `JobError` if it cannot be read.
    """
    name = "standard input" if path == STANDARD_INPUT else printable(path.name)
    console.say("", f"📋 Processing: {name}")
    rows = read_rows(read_results(path), name_row, saved_s)
    return Rows(rows.tasks, [f"  ⚠️ {name}, {each}" for each in rows.wrong])


def warn_of_odd_statuses(tasks: Iterable[Task], console: Console) -> None:
    """Print which tasks have a link, but a status that is none of Runway's."""
    told = filter(None, map(odd_status_warning, tasks))
    console.complain(*shortened([f"  ⚠️ {each}" for each in told], NAMES_SHOWN))


def tell_of_rows(tasks: Sequence[Task], left_out: int, console: Console) -> None:
    """Print how many rows of one file SUCCEEDED, and what is done about the others."""
    states = Counter(task.state for task in tasks)
    unfinished = [task for task in tasks if task.state is State.UNFINISHED]
    asked = sum(is_to_be_fetched(task) for task in unfinished)
    not_asked = len(unfinished) - asked
    old = not_asked if api_key() else 0  # with a key, only its age keeps a task from being asked
    ended = Counter(row_status(task.row) for task in tasks if task.state is State.ENDED)
    told = [f"{count:,} {status}" for status, count in ended.items()]
    if not_asked:
        told.append(f"{not_asked:,} not finished when polling ended")
    console.say(f"  ✅ Found {states[State.SUCCEEDED]} SUCCEEDED tasks")
    if asked:
        console.say(f"  🔎 Runway is asked about {asked:,} that polling gave up on")
    if old:
        console.say(f"  ℹ️ Too old to ask Runway about (more than 7 days): {old:,}")
    if told:
        console.say(f"  ℹ️ Not downloaded: {', '.join(told)}")
    if left_out:
        console.say(f"  ℹ️ Left out by --only, --skip or --shard: {left_out:,}")


def warn_without_key(tasks: Sequence[Task], directory: Path, console: Console) -> None:
    """Warn that Runway would be asked about ``tasks`` if there were a key.

    Tasks whose videos are there do not count.
    """
    if not tasks:
        return
    index = Index(directory)
    with contextlib.suppress(JobError):  # the run finds out, and says, that it cannot be listed
        index = Index.scan(directory)
    missing = sum(plan.action is not Action.KEEP for plan in plan_all(tasks, index))
    if missing:
        count = counted(missing, "task")
        advice = "set RUNWAYML_API_SECRET and run again to have Runway asked about them"
        console.complain(f"  ⚠️ {count} not finished when polling ended: {advice}")


# --- VideoDownloader: the door for programs -----------------------------------------------------

INDEX_KEPT_S = 30.0
EXISTING_SHOWN = 3  # videos that were there already and are named; the others are counted
UNPICKLED = {
    # The callbacks
    "on_outcome",
    "on_progress",
    # What `VideoDownloader._start_afresh` sets
    "_console",
    "_report",
    "_index",
    "_tls_context",
    "_stop",
    "_turn",
    "_is_checked",
}


class VideoDownloader:
    """Downloads the SUCCEEDED videos of polling results into one directory.

    A caller may rely on this:

    - No method but `run` raises for bad input, a bad task or a full disk: the fault is printed and
      counted. The constructor makes ``output_dir``; it raises `JobError` if it cannot, and
      TypeError or ValueError for settings that make no sense.
    - A video is under its final name only when it is whole, has reached the disk and has its
      metadata. No finished video is overwritten or moved. Other runs on the same directory share
      the work.
    - ``on_outcome`` is called once per finished task with an `Outcome`, ``on_progress`` a few
      times a second with a `Progress`, both in the thread that called the method. What they
      raise is printed, and the run goes on.
    - Methods may be called from several threads; those that download take turns. Ctrl-C raises
      KeyboardInterrupt as usual, and `stop` ends the current call without an exception. The next
      run resumes what either of them left unfinished. A callback must not call a method that
      downloads.
    - It can be pickled. The copy has the same settings and the absolute directory, but counts of
      its own and no callbacks. It reads the directory at its first call.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str] = DEFAULT_OUTPUT_DIR,
        *,
        workers: int = Settings.workers,
        timeout: float = Settings.timeout,
        retries: int = Settings.retries,
        quiet: bool = False,
        commands: Sequence[str | Sequence[str]] = (),
        on_outcome: Callable[[Outcome], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        console: Console | None = None,
        report: Report | None = None,
    ) -> None:
        if isinstance(commands, str):
            raise TypeError("commands is a list of commands, each a text or a list of words")
        self.output_dir = Path(output_dir)
        self.settings = Settings(workers, timeout, retries)
        self.quiet = quiet
        self.commands = tuple(Command.parse(each) for each in commands)
        self.on_outcome = on_outcome
        self.on_progress = on_progress
        self._start_afresh(console or Console(quiet), report or Report())
        self._check_directory()

    def _start_afresh(self, console: Console, report: Report) -> None:
        """Set all that a new object and an unpickled one begin with."""
        self._console = console
        self._report = report
        self._index: Index | None = None
        self._tls_context: ssl.SSLContext | None = None  # loading the CA bundle takes a while
        self._stop: threading.Event | None = None  # of the call that is under way
        self._turn = threading.RLock()
        self._is_checked = False  # whether the output directory could be written to

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in UNPICKLED}
        return {**state, "output_dir": self.output_dir.absolute()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.on_outcome = None
        self.on_progress = None
        self._start_afresh(Console(self.quiet), Report())

    # What orchestrators call: names and results are fixed

    @property
    def stats(self) -> dict[str, int]:
        return self._report.stats

    @property
    def workers(self) -> int:
        return self.settings.workers

    @property
    def timeout(self) -> float:
        return self.settings.timeout

    @property
    def retries(self) -> int:
        return self.settings.retries

    def find_all_polling_results(self, directory: str | Path = ".") -> list[Path]:
        """Return the results files in ``directory``, its ``video_outputs`` and the output
        directory, latest first."""
        places = [directory, Path(directory, DEFAULT_OUTPUT_DIR), self.output_dir]
        return find_results_files(places)

    def load_polling_results(self, path: str | Path) -> dict[str, Any]:
        """Return the object in results file ``path``; print why and return ``{}`` if it cannot."""
        try:
            return read_results(Path(path))
        except JobError as error:
            self._console.complain(f"❌ {error}")
            return {}

    def get_succeeded_tasks(self, results: JsonObject) -> list[JsonObject]:
        """Return the raw rows, in order, that SUCCEEDED and have a usable ``video_url``.

        If ``RUNWAYML_API_SECRET`` is set, Runway can be asked for links. Then rows that SUCCEEDED
        but have no link are returned as well, and recent ones that polling gave up on. What is
        left out is named on stderr.
        """
        rows = read_rows(as_object(results), self.generate_filename_stub, time.time())
        warnings = filter(None, map(odd_status_warning, rows.tasks))
        wrong = [*rows.wrong, *warnings]
        chosen = []
        for task in rows.tasks:
            if not is_to_be_fetched(task):
                continue
            can_be_asked_for = bool(api_key() and task.task_id)
            if task.link or can_be_asked_for:
                chosen.append(task.row)
            else:
                wrong.append(f"task {shown_id(task.task_id)}: {NO_LINK}: left out")
        self._console.complain(*shortened([f"⚠️ {each}" for each in wrong], NAMES_SHOWN))
        return chosen

    def generate_filename_stub(self, task: JsonObject) -> str:
        """Return the name that row ``task`` asks for, made safe, without suffix.

        A subclass may override this to name the videos.
        """
        return wanted_stub(as_object(task))

    def process_succeeded_task(self, task: JsonObject) -> bool:
        """Bring the video of row ``task`` to disk.

        Returns whether it is on disk afterwards, be it new or not. A row that has a link counts
        as SUCCEEDED, since the caller says so, unless its status contradicts that.
        """
        row = as_object(task)
        parsed = task_from_row(row, self.generate_filename_stub(row))
        # PENDING contradicts nothing: it may be the status at submission.
        is_under_way = row_status(row) in ("RUNNING", "THROTTLED")
        has_ended_without = parsed.state is State.ENDED
        if parsed.link and not is_under_way and not has_ended_without:
            parsed = parsed.as_succeeded(parsed.link)
        reason = why_not_processed(parsed)
        if reason:
            self._console.complain(f"❌ task {shown_id(parsed.task_id)}: {reason}")
            return False
        with self._call():
            before = len(self._report.outcomes)
            on_disk = self._run_safely([parsed])
            for outcome in self._report.outcomes[before:]:
                self._complain_of(outcome)
        return on_disk > 0

    def _complain_of(self, outcome: Outcome) -> None:
        """Print why there is no video: a program may call for one task and no summary."""
        if outcome.fault:
            self._console.complain(f"❌ {outcome.label}: {outcome.error}")
        elif outcome.status is Status.NOT_SUCCEEDED:
            self._console.complain(f"❌ {outcome.label}: {runway_says(outcome.runway_status)}")

    def process_polling_results_file(self, path: str | Path) -> int:
        """Bring all videos of results file ``path`` to disk; return how many are there now."""
        with self._call():
            found = read_tasks([Path(path)], self._console, self.generate_filename_stub)
            self._console.complain(*(f"❌ {error}" for error in found.errors))
            self._report.problems.extend(found.errors)
            warn_without_key(found.askable, self.output_dir, self._console)
            self._index = None  # look at the directory anew
            before = len(self._report.outcomes)
            on_disk = self._run_safely(found.tasks)
            if self.quiet:  # else the lines of each task tell it
                self._console.complain(*failure_lines(self._report.outcomes[before:]))
            return on_disk

    def create_metadata_json(
        self, task: JsonObject, video_path: str | Path, metadata_path: str | Path
    ) -> bool:
        """Write the metadata of row ``task`` and the video on disk; return whether it worked."""
        parsed = task_from_row(as_object(task))
        video = Path(video_path)
        metadata = Path(metadata_path)
        hidden = HiddenFiles(metadata.parent, self.settings.timeout)
        try:
            with disk_errors(f"describe {video}"):
                info = describe_file(video)
                put_metadata(metadata, parsed, video.name, info, hidden)
        except DiskFull as error:
            self._console.complain(f"❌ {no_space_left(metadata.parent, error)}")
            return False
        except (DownloaderError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            self._console.complain(f"❌ {printable(metadata_path)}: {printable(reason)}")
            return False
        finally:
            hidden.clean(set())
        return True

    def print_final_stats(self) -> None:
        """Print the summary of everything done so far, the videos there, and what failed."""
        self._console.show_summary(self._report, self.output_dir)

    def stop(self) -> None:
        """End the call that is downloading in another thread, as Ctrl-C would, but quietly.

        Does nothing if there is none.
        """
        stop = self._stop
        if stop:
            stop.set()

    @contextlib.contextmanager
    def _call(self) -> Iterator[threading.Event]:
        """Wait for our turn, then yield the event that `stop` sets.

        A method that makes a call may call another that does: then both have the same event.
        """
        with self._turn:
            before = self._stop
            self._stop = before or threading.Event()
            try:
                yield self._stop
            finally:
                self._stop = before

    # The run

    def _run_safely(self, tasks: Sequence[Task]) -> int:
        """Do what `run` does, but print a `JobError`."""
        before = len(self._report.outcomes)
        try:
            return self.run(tasks)
        except JobError as error:
            self._console.complain(f"❌ {error}")
            return sum(each.is_on_disk for each in self._report.outcomes[before:])

    def run(self, tasks: Sequence[Task]) -> int:
        """Bring ``tasks`` to disk; return how many are there now.

        Raises `JobError` when the run cannot go on, and KeyboardInterrupt.
        """
        with self._call() as stop:
            self._check_directory()
            before = len(self._report.outcomes)
            self._report.begin(tasks)
            self._console.begin(len(tasks))
            index = self._current_index()
            to_do = self._report_what_is_there(plan_all(tasks, index))
            hidden = self._hidden()
            try:
                if to_do:
                    self._work(to_do, index, hidden, stop, before, len(tasks))
            finally:
                self._tidy(tasks, index, hidden, before)
            return sum(each.is_on_disk for each in self._report.outcomes[before:])

    def _report_what_is_there(self, plans: Sequence[Plan]) -> list[Plan]:
        """Report the videos that are there, and return the plans for which there is work.

        Those that need a download come first, and of these the ones whose links die soonest.
        """
        to_do = []
        there = 0
        for plan in plans:
            if plan.action is not Action.KEEP or self._may_be_due(plan.path):
                to_do.append(plan)
                continue
            there += 1
            outcome = Outcome(plan.task, Status.EXISTS, plan.path, plan.size_bytes)
            self._record(outcome, is_shown=there <= EXISTING_SHOWN)
        if len(plans) > BLOCKS_SHOWN and there:  # `Console.show_outcome` shows none of them then
            self._console.say("", f"  ⚠️ {counted(there)} already there")
        elif there > EXISTING_SHOWN:
            more = counted(there - EXISTING_SHOWN, "more video")
            self._console.say("", f"  ⚠️ {more} already there")
        return sorted(to_do, key=lambda plan: (plan.is_there, link_expiry(plan.task.link)))

    def _may_be_due(self, path: Path) -> bool:
        """Whether a command of --exec may have to take the video.

        That includes a video whose metadata cannot be read: the hand-over then reports why.
        """
        try:
            return bool(commands_due(path, self.commands))
        except OSError:
            return True

    def _work(
        self,
        plans: Sequence[Plan],
        index: Index,
        hidden: HiddenFiles,
        stop: threading.Event,
        before: int,
        total: int,
    ) -> None:
        """Carry ``plans`` out in worker threads; report each outcome in this thread.

        ``before`` is how many outcomes earlier calls have reported, and ``total`` how many tasks
        this call has, with those that are reported already. Raises `JobError` when the run
        cannot go on.
        """
        workers = min(self.settings.workers, len(plans))
        self._tls_context = self._tls_context or make_tls_context()
        client = HttpClient(self._tls_context, self.settings.timeout, workers)
        tools = Tools(
            index=index,
            hidden=hidden,
            client=client,
            runway=Runway(client),
            settings=self.settings,
            commands=self.commands,
            stop=stop,
        )

        def show_progress(bytes_done: int, waiting_for: str) -> None:
            done = len(self._report.outcomes) - before
            self._show_progress(Progress(done, total, bytes_done, waiting_for))

        run = Run(tools, workers, Listener(self._record, show_progress, self._console.say))
        try:
            run.work(plans)
        except DiskFull as error:
            hidden.remove_all_of({plan.task.file_key for plan in plans})
            raise no_space_left(self.output_dir, error) from None
        finally:
            self._console.clear_line()
            self._report_kept_waiting(plans, before)

    def _report_kept_waiting(self, plans: Iterable[Plan], before: int) -> None:
        """Report the videos that are there, but that a stop has kept from being handed over."""
        reported = {outcome.task.key for outcome in self._report.outcomes[before:]}
        for plan in plans:
            if plan.action is Action.KEEP and plan.task.key not in reported:
                there = Outcome(plan.task, Status.EXISTS, plan.path, plan.size_bytes)
                self._record(replace(there, is_kept_waiting=True), is_shown=False)

    def _tidy(self, tasks: Sequence[Task], index: Index, hidden: HiddenFiles, before: int) -> None:
        """Remove hidden files that nobody needs, and have the names reach the disk."""
        new = self._report.outcomes[before:]
        done = {each.task.file_key for each in new if each.is_on_disk}
        left = {task.file_key for task in tasks} - {each.task.file_key for each in new}

        def tidy() -> None:
            hidden.clean(done, index.hidden)
            self._report.kept_bytes = hidden.kept_bytes(left)
            with contextlib.suppress(OSError):
                sync_path(self.output_dir)

        # After a stop, a slow mount must not hold us up.
        try_for(STOP_GRACE_S if left else self.settings.timeout, tidy)

    def _record(self, outcome: Outcome, is_shown: bool = True) -> None:
        """Count ``outcome``, print it, and tell the caller.

        After Ctrl-C, `Run` may bring the same outcome again: it is passed over.
        """
        if self._report.outcomes and self._report.outcomes[-1] is outcome:
            return
        self._report.record(outcome)
        self._console.show_outcome(outcome, is_shown)
        self._call_back("on_outcome", self.on_outcome, outcome)

    def _show_progress(self, progress: Progress) -> None:
        self._console.show_progress(progress)
        self._call_back("on_progress", self.on_progress, progress)

    def _call_back(self, name: str, callback: Callable[[Any], None] | None, value: object) -> None:
        if callback is None:
            return
        try:
            callback(value)
        except Exception as error:  # a fault in the caller's code must not lose a video
            self._console.complain(f"⚠️ {name}: {type(error).__name__}: {printable(error)}")

    # The directory

    def _hidden(self) -> HiddenFiles:
        return HiddenFiles(self.output_dir, self.settings.timeout)

    def _check_directory(self) -> None:
        """Make the output directory; raises `JobError` if it cannot be made or written to."""
        # Not Path.is_dir: that raises, for example after a mount has gone stale.
        if self._is_checked and os.path.isdir(self.output_dir):
            return
        try:
            with contextlib.suppress(FileExistsError):  # it may be a file: the probe finds out
                self.output_dir.mkdir(parents=True, exist_ok=True)
            hidden = self._hidden()
            try:
                hidden.probe()
            finally:
                hidden.clean(set())
        except (OSError, ValueError) as error:
            raise directory_error(self.output_dir, error) from None
        self._is_checked = True

    def _current_index(self) -> Index:
        """Return the index of the directory, which is read anew after `INDEX_KEPT_S`."""
        index = self._index
        if index is None or time.monotonic() - index.scanned_s > INDEX_KEPT_S:
            index = Index.scan(self.output_dir)
            self._index = index
        return index


def why_not_processed(task: Task) -> str:
    """Return why a task that a program hands in cannot be processed, ``""`` if it can."""
    if task.state is State.SUCCEEDED:
        return ""
    if task.state is State.ENDED:
        return f"it has not succeeded: {row_status(task.row)}"
    if not task.is_asked_about(time.time()):
        return "it had not finished, and Runway cannot be asked: it is too old, or has no id"
    if not api_key():
        return "it had not finished: set RUNWAYML_API_SECRET, and Runway is asked about it"
    return ""


# --- Looking without downloading: --dry-run and --verify ----------------------------------------


RENEW_HINT = "set RUNWAYML_API_SECRET to fetch a fresh one"


def dry_run(tasks: Sequence[Task], directory: Path, console: Console, report: Report) -> None:
    """List what a run would do, the links that expire soonest first.

    Sends no request and writes nothing. Raises `JobError` for a directory that cannot be listed.
    """
    report.begin(tasks)
    counts = Counter({"to do": 0, "expired": 0, "already there": 0})
    plans = plan_all(tasks, Index.scan(directory))
    for plan in sorted(plans, key=lambda plan: link_expiry(plan.task.link)):
        preview = preview_of(plan, time.time())
        counts[preview.kind] += 1
        report.record(preview.outcome)
        if not preview.outcome.is_on_disk:
            console.say(f"  {preview.outcome.label}: {preview.said}")
    told = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    console.say("", f"🔎 Dry run: {told}")
    console.complain(*failure_lines(report.outcomes))


@dataclass(frozen=True)
class Preview:
    """What a run would do for one task: the ``kind`` it is counted as, and the ``said`` line."""

    outcome: Outcome
    kind: str
    said: str  # only what is not on disk is listed


def preview_of(plan: Plan, now_s: float) -> Preview:
    """Return what a run would do for ``plan``."""
    task = plan.task
    if plan.is_there:
        there = Outcome(task, Status.EXISTS, plan.path, plan.size_bytes)
        return Preview(there, "already there", "")
    pending = Outcome(task, Status.PENDING, plan.path, plan.size_bytes)
    if task.state is State.UNFINISHED:
        return Preview(pending, "would be asked about", "Runway would be asked about it")
    if not task.link:
        return preview_without_link(pending, plan, "without a link", Fault(NO_LINK, RENEW_HINT))
    expiry = expiry_text(task.link, now_s)
    if link_expiry(task.link) <= now_s:
        fault = Fault("the link has expired", RENEW_HINT, f"the link {expiry}")
        return preview_without_link(pending, plan, "expired", fault)
    said = f"the link is {expiry}" if expiry else "the link does not say when it expires"
    return Preview(pending, "to do", said)


def preview_without_link(pending: Outcome, plan: Plan, kind: str, fault: Fault) -> Preview:
    """Return what a run would do without a live link.

    It would ask Runway for one, or perhaps take the video that is there, else fail.
    """
    said = fault.detail or fault.reason
    can_renew = bool(api_key() and plan.task.task_id)
    if can_renew or plan.action is Action.COMPARE:
        return Preview(pending, kind, said)
    if not plan.task.task_id:  # Runway cannot be asked, with the key or without
        fault = replace(fault, hint="run the polling step again")
    return Preview(replace(pending, status=Status.FAILED, fault=fault), kind, said)


def verify(directory: Path, console: Console, report: Report) -> None:
    """Check every video that has metadata, and name those that have none.

    Sends no request. Raises `JobError` if the directory does not exist or cannot be listed.
    """
    if not os.path.lexists(directory):
        raise JobError(f"{printable(directory.absolute())} does not exist: check --output-dir")
    names = list_names(directory)
    videos = {name for name in names if name.endswith(".mp4") and not name.startswith(".")}
    for stub, metadata in read_all_metadata(directory, names):
        outcome = check_video(directory / f"{stub}.mp4", metadata)
        videos.discard(outcome.path.name)
        report.begin([outcome.task])  # one by one: two files may be about the same task
        report.record(outcome)
    if videos:
        count = counted(len(videos))
        console.say("", f"ℹ️ Without metadata that can be read, so not checked: {count}")
        console.say(*(f"    {printable(name)}" for name in shortened(sorted(videos), NAMES_SHOWN)))
    bad = report.count(Status.FAILED)
    whole = len(report.outcomes) - bad
    console.say("", f"🔎 Verified: {whole:,} whole, {bad:,} with a problem")
    console.complain(*failure_lines(report.outcomes))


def check_video(path: Path, metadata: JsonObject) -> Outcome:
    """Compare the video ``path`` with its ``metadata``; return FAILED or EXISTS."""
    row = as_object(metadata.get("runway_task_json"))
    task = replace(task_from_row(row, path.stem), state=State.SUCCEEDED)
    size = file_size(path)
    try:
        with disk_errors("read it"):
            check_against(path, size, as_object(metadata.get("file_info")))
    except TaskError as error:
        return Outcome(task, Status.FAILED, path, size, error.fault)
    return Outcome(task, Status.EXISTS, path, size)


def check_against(path: Path, size: int | None, info: JsonObject) -> None:
    """Raise `TaskError` unless the video is what ``info`` says.

    If ``info`` has no hash, as in older metadata, the video must be a whole MP4.
    """
    if size is None:
        raise TaskError("the video is missing", "run again without --verify, or delete its .json")
    hint = "if you did not edit it, move it away and run again"
    if size == 0:  # a run replaces an empty file
        hint = "run again without --verify"
    if size != info.get("size_bytes", size):
        detail = printable(f"{size:,} bytes, not {info['size_bytes']}")
        raise TaskError("its size has changed since the download", hint, detail)
    if size and "sha256" in info:
        if describe_file(path)["sha256"] != info["sha256"]:
            raise TaskError("its SHA-256 has changed since the download", hint)
        return
    content = inspect_path(path, size)
    if content is not Content.WHOLE:
        raise TaskError(f"it is {content.value}", hint)


# --- The gallery: one page that shows the videos ----------------------------------------------

# The page must work from a directory, without a network and without a server.
# A browser copes with a few hundred players only. So the page makes a player when its card comes
# near the view, and removes it when the card is far away. Without scripts, each card has a player
# of its own. ``$count`` and ``$cards`` are filled in.
GALLERY_PAGE = r"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>Runway videos</title>
<meta name="generator" content="download_succeeded_videos">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<style>
:root { --page: #eff1f4; --card: #fff; --text: #16181d; --faint: #5c6370; --accent: #1d5fd1; }
@media (prefers-color-scheme: dark) {
  :root { --page: #111317; --card: #1d2026; --text: #e8eaee; --faint: #9aa1ad; --accent: #8ab4f8; }
}
* { box-sizing: border-box; margin: 0; }
html { scroll-padding-top: 6rem; }
body { font: 15px/1.5 system-ui, sans-serif; background: var(--page); color: var(--text); }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .5rem 1rem;
  padding: .8rem 1.2rem; background: var(--page); }
@media (min-width: 40rem) { header { position: sticky; top: 0; z-index: 1; } }
h1 { font-size: 1.3rem; }
output, dt, .duration { color: var(--faint); }
input { flex: 0 1 26rem; min-width: min(100%, 16rem); margin-left: auto; padding: .4rem 1rem;
  font: inherit; color: inherit; background: var(--card);
  border: 1px solid var(--faint); border-radius: 2rem; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr));
  gap: 1.2rem; align-items: start; padding: .4rem 1.2rem 2rem; }
article { overflow: hidden; overflow-wrap: anywhere; border-radius: .8rem;
  background: var(--card); content-visibility: auto; contain-intrinsic-size: auto 24rem; }
figure { aspect-ratio: 16 / 9; width: 100%; max-height: 26rem; background: #000; }
.broken::after { content: "This browser cannot play the file."; display: block;
  padding: 1rem; color: #ddd; }
.broken video { display: none; }
video { display: block; width: 100%; height: 100%; object-fit: contain; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: -3px; }
h2 { display: flex; gap: 1rem; justify-content: space-between; margin: .7rem 1rem; font-size: 1em; }
.duration { flex: none; font-weight: normal; }
a { color: inherit; text-decoration: none; }
a:hover, a:focus { text-decoration: underline; }
article p { margin: .7rem 1rem; white-space: pre-wrap; }
article p, dd { max-height: 6.75em; overflow: auto; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem 1rem; margin: .7rem 1rem 1rem;
  font-size: .87em; }
#none { grid-column: 1 / -1; padding: 3rem 0; text-align: center; color: var(--faint); }
p:empty, dd:empty, dt:has(+ dd:empty) { display: none; }
article:not([hidden]) ~ #none, body:not(:has(article)) input { display: none; }
.duration:not(:empty)::after { content: " s"; }
</style>
<noscript><style>input { display: none; }</style></noscript>
<header>
<h1>Runway videos</h1>
<output id="count">$count</output>
<input id="search" type="search" placeholder="Search" aria-label="Search" autocomplete="off">
</header>
<main>$cards
<p id="none">No videos yet.</p>
</main>
<script>
const count = document.getElementById("count");
const search = document.getElementById("search");
const none = document.getElementById("none");
const cards = [...document.querySelectorAll("article")];
const canHover = matchMedia("(hover: hover)").matches;

function addPlayer(card) {
  const figure = card.querySelector("figure");
  const link = card.querySelector("a");
  const video = document.createElement("video");
  const showControls = () => {
    video.controls = !canHover || video.matches(":hover, :focus-visible");
  };
  for (const event of ["pointerenter", "pointerleave", "focus", "blur"]) {
    video.addEventListener(event, showControls);
  }
  video.onerror = () => figure.classList.add("broken");
  video.onloadedmetadata = () => {
    if (video.videoWidth) {
      figure.style.aspectRatio = `${video.videoWidth} / ${video.videoHeight}`;
    }
    if (isFinite(video.duration)) {
      card.querySelector(".duration").textContent = +video.duration.toFixed(1);
    }
  };
  video.setAttribute("aria-label", link.textContent);
  Object.assign(video, {preload: "metadata", loop: true, playsInline: true, tabIndex: 0});
  video.src = link.href + "#t=0.001";  // so that iOS shows the first picture
  showControls();
  figure.append(video);
}

function removePlayer(video) {
  if (!video.paused || video === document.activeElement) return;
  video.removeAttribute("src");
  video.load();  // frees the memory at once
  video.remove();
}

const watcher = new IntersectionObserver(entries => {
  for (const {target, isIntersecting} of entries) {
    const video = target.querySelector("video");
    if (isIntersecting && !video) addPlayer(target);
    if (!isIntersecting && video) removePlayer(video);
  }
}, {rootMargin: "100%"});
cards.forEach(card => watcher.observe(card));

document.addEventListener("play", ({target}) => {
  for (const video of document.querySelectorAll("video")) {
    if (video !== target) video.pause();
  }
}, true);

// Without accents and capitals, so that "elegant" finds "Élégant".
const simple = text => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
const texts = new Map(cards.map(card => {
  const shown = [...card.querySelectorAll("h2, p, dd")];
  return [card, simple(shown.map(part => part.textContent).join(" "))];
}));
const all = count.textContent;
if (cards.length) none.textContent = "No video has all these words.";

search.oninput = () => {
  const words = simple(search.value).split(/\s+/);
  for (const card of cards) {
    card.hidden = !words.every(word => texts.get(card).includes(word));
  }
  const found = cards.filter(card => !card.hidden).length;
  count.textContent = search.value.trim() ? `${found.toLocaleString("en")} of ${all}` : all;
};
</script>
</html>
"""

GALLERY_CARD = """
<article>
<figure><noscript>
<video src="{link}#t=0.001" aria-label="{name}" controls loop playsinline preload="none"></video>
</noscript></figure>
<h2><a dir="auto" href="{link}">{name}</a><span class="duration">{duration}</span></h2>
<p dir="auto">{prompt}</p>
<dl>
<dt>Theme</dt><dd>{theme}</dd>
<dt>Seed</dt><dd>{seed}</dd>
<dt>Size</dt><dd>{size}</dd>
<dt>Date</dt><dd>{date}</dd>
<dt>Task</dt><dd>{task_id}</dd>
</dl>
</article>"""


def escaped(value: object) -> str:
    """Return a text or a number as HTML, with bare links; ``""`` for any other value."""
    if not isinstance(value, (str, int, float)):
        return ""
    return html.escape(bare(value))


def download_time(metadata: JsonObject) -> str:
    return text_of(metadata, "download_timestamp")


def gallery_card(video: Path, size_bytes: int, metadata: JsonObject) -> str:
    """Return the HTML of one video; the metadata may hold anything."""
    name = video.name
    task = as_object(metadata.get("runway_task_json"))
    when = download_time(metadata)
    facts = {**task, **metadata}
    facts["name"] = name
    facts["size"] = megabytes(size_bytes)
    facts["date"] = when[:16].replace("T", " ")

    texts: dict[str, str] = defaultdict(str)  # a fact that is missing is left empty
    for key, value in facts.items():
        texts[key] = escaped(value)
    link = quote(os.fsencode(name))
    texts["link"] = f"./{link}"  # without "./" a name may look like the scheme of a URL
    return GALLERY_CARD.format_map(texts)


def render_gallery(videos: Sequence[tuple[Path, int, JsonObject]]) -> str:
    """Return the page that shows the videos, newest first.

    Each video is its path, its size in bytes and its metadata.
    """
    newest_first = sorted(videos, key=lambda each: download_time(each[2]), reverse=True)
    cards = [gallery_card(*each) for each in newest_first]
    count = counted(len(cards))
    page = GALLERY_PAGE.replace("$count", count)

    # The cards come last: what they hold must not be taken for a placeholder.
    return page.replace("$cards", "".join(cards))


def write_gallery(directory: Path, hidden: HiddenFiles, console: Console) -> str:
    """Write the page that shows every video with metadata.

    Returns why that failed, ``""`` if it did not. A page that this script did not write is left
    alone. Raises `JobError` for a directory that cannot be listed.
    """
    page = directory / GALLERY_NAME
    videos = []
    for stub, metadata in read_all_metadata(directory, list_names(directory)):
        path = directory / f"{stub}.mp4"
        size = file_size(path)
        if size:
            videos.append((path, size, metadata))
    data = render_gallery(videos).encode(errors="replace")
    try:
        if os.path.lexists(page) and not is_own_page(page):
            return f"{printable(page)} is not this script's: left alone; rename it"
        temporary = write_hidden(data, digest(GALLERY_NAME)[:16], hidden)
        try:
            os.replace(temporary, page)
        finally:
            remove(temporary)
    except OSError as error:
        if is_full(error):
            return str(no_space_left(directory, "could not write the gallery"))
        return f"could not write the gallery {printable(page)}: {error.strerror}"
    console.say("", f"🖼️ Gallery: {printable(page)} ({counted(len(videos))})")
    return ""


def is_own_page(page: Path) -> bool:
    """Whether this script wrote the page: `GALLERY_PAGE` names it as the generator."""
    if not page.is_file():
        return False
    with open(page, "rb") as file:
        return b'content="download_succeeded_videos"' in file.read(CHUNK_BYTES)


# --- The command line: the door for people -------------------------------------------------------

GALLERY_MAX_S = 300.0  # it reads all metadata, perhaps over a network


def setting(name: str) -> Callable[[str], float]:
    """Return an argparse type for one of the `LIMITS`."""
    limit = LIMITS[name]

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = limit.kind(text)
            if limit.allows(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {limit}")

    return parse


def parse_shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if match and 1 <= int(match[1]) <= int(match[2]):
        return int(match[1]), int(match[2])
    raise argparse.ArgumentTypeError(f"{text!r} is not K/N with K from 1 to N, such as 2/4")


def parse_command(text: str) -> Command:
    try:
        return Command.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def parse_directory(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty: give a directory, such as videos")
    return Path(text)


def parse_id(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(
            "the id is empty: give an id, or at least its first 8 characters"
        )
    return text.strip()


def build_parser() -> argparse.ArgumentParser:
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, width=79)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=formatter,
        allow_abbrev=False,
        usage="%(prog)s [FILE ...] [options]",
    )
    default = "(default: %(default)s)"

    what = parser.add_argument_group("what to download")
    what.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="results files, or - for standard input (default: the latest file)",
    )
    what.add_argument(
        "--polling-results-file",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="same as FILE",
    )
    what.add_argument("--all", action="store_true", help="read every results file, latest first")
    what.add_argument(
        "--only",
        type=parse_id,
        action="append",
        default=[],
        metavar="ID",
        help="only this task: its id, or at least the first 8 characters of it; may be repeated",
    )
    what.add_argument(
        "--skip",
        type=parse_id,
        action="append",
        default=[],
        metavar="ID",
        help="not this task, given as for --only; may be repeated",
    )
    what.add_argument(
        "--shard",
        type=parse_shard,
        default=(1, 1),
        metavar="K/N",
        help="only the K-th of N parts, for machines that share no directory",
    )

    how = parser.add_argument_group("how to download")
    how.add_argument(
        "--output-dir",
        type=parse_directory,
        default=Path(DEFAULT_OUTPUT_DIR),
        metavar="DIR",
        help=f"output directory, created if missing {default}",
    )
    how.add_argument(
        "--workers",
        type=setting("workers"),
        default=Settings.workers,
        metavar="N",
        help=f"parallel downloads, 1 to {MAX_WORKERS} {default}",
    )
    how.add_argument(
        "--timeout",
        type=setting("timeout"),
        default=Settings.timeout,
        metavar="SECONDS",
        help=f"how long to wait for a connection, and for data each time {default}",
    )
    how.add_argument(
        "--retries",
        type=setting("retries"),
        default=Settings.retries,
        metavar="N",
        help=f"extra tries after one that brought nothing {default}",
    )

    after = parser.add_argument_group("after downloading")
    after.add_argument(
        "--exec",
        type=parse_command,
        action="append",
        default=[],
        metavar="CMD",
        dest="commands",
        help='hand each video over to "CMD {video} {metadata}", once, without a shell; '
        "may be repeated",
    )
    after.add_argument(
        "--gallery",
        action="store_true",
        help=f"write DIR/{GALLERY_NAME}, a page that shows the videos",
    )

    instead = parser.add_argument_group("instead of downloading").add_mutually_exclusive_group()
    instead.add_argument(
        "--dry-run", action="store_true", help="only list what would be downloaded"
    )
    instead.add_argument(
        "--verify", action="store_true", help="only check the videos against their metadata"
    )

    output = parser.add_argument_group("what to print")
    output.add_argument("-q", "--quiet", action="store_true", help="print only problems")
    output.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, all else on stderr"
    )
    output.add_argument("-V", "--version", action="version", version=f"%(prog)s {VERSION}")
    return parser


def parse_arguments(argv: Sequence[str] | None) -> Namespace:
    """Return the options; exit with code 2, and a message that helps, if they make no sense."""
    parser = build_parser()
    options, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        near = nearest_option(unknown[0], parser.format_help())
        parser.error(f"unknown option {unknown[0]}: did you mean {near}?")
    ways = [options.files, options.polling_results_file, options.all]
    if sum(bool(way) for way in ways) > 1:
        parser.error("give only one of FILE, --polling-results-file and --all")
    options.files += options.polling_results_file
    if STANDARD_INPUT in options.files and len(options.files) > 1:
        parser.error("- is standard input: give it alone, without other files")
    about_tasks = [options.only, options.skip, options.shard != (1, 1), options.commands]
    if options.verify and (options.files or options.all or any(about_tasks)):
        parser.error(
            "--verify checks the whole output directory: it takes no files, tasks or commands"
        )
    if options.gallery and (options.verify or options.dry_run):
        parser.error("--gallery writes a page: not with --dry-run or --verify")
    return options


def nearest_option(unknown: str, help_text: str) -> str:
    """Return the option that ``unknown`` abbreviates, else the one that is most similar."""
    known: list[str] = re.findall(r"--[a-z-]+", help_text)
    option = unknown.split("=")[0]
    abbreviated = [each for each in known if each.startswith(option)]
    nearest = abbreviated or difflib.get_close_matches(option, known, n=1, cutoff=0.0)
    return nearest[0]


def choose_results_files(options: Namespace, console: Console) -> list[Path]:
    """Return the results files that the command line asks for, latest first.

    Raises `JobError` if it names none and there are none.
    """
    if options.files:
        return sorted(options.files, key=results_order, reverse=True)
    places = (".", DEFAULT_OUTPUT_DIR, options.output_dir)
    files = find_results_files(places)
    if not files:
        where = ", ".join(dict.fromkeys(printable(Path(place).absolute()) for place in places))
        what = f"No polling results found: no {RESULTS_PREFIX}*.json in {where}"
        raise JobError(f"{what} — run the polling step first, or name a file")
    if options.all:
        console.say(f"🔍 Found {len(files):,} polling results files")
        return files
    console.say(f"📁 Using latest results file: {printable(files[0].name)}")
    return files[:1]


def read_chosen_tasks(options: Namespace, console: Console, report: Report) -> list[Task]:
    """Return the tasks that the command line asks for.

    A file that cannot be read is a problem. Raises `JobError` if none can, or if no task matches
    --only.
    """
    paths = choose_results_files(options, console)
    choice = Choice(options.only, options.skip, options.shard)
    found = read_tasks(paths, console, choice=choice)
    if len(found.errors) == len(paths):
        raise JobError(*found.errors)
    console.complain(*(f"❌ {error}" for error in found.errors))
    report.problems.extend(found.errors)
    warn_without_key(found.askable, options.output_dir, console)
    if options.only and not found.named:
        ids = printable(", ".join(options.only))
        raise JobError(
            f"no task matches --only {ids}: give an id, or at least its first 8 characters"
        )
    return found.tasks


def carry_out(options: Namespace, console: Console, report: Report) -> None:
    """Do what the command line says; raises `JobError` and KeyboardInterrupt."""
    if options.verify:
        verify(options.output_dir, console, report)
        return
    tasks = read_chosen_tasks(options, console, report)
    if options.dry_run:
        dry_run(tasks, options.output_dir, console, report)
        return
    downloader = VideoDownloader(
        options.output_dir,
        workers=options.workers,
        timeout=options.timeout,
        retries=options.retries,
        commands=[command.words for command in options.commands],
        console=console,
        report=report,
    )
    report.is_run = True
    downloader.run(tasks)


@dataclass(frozen=True)
class Ending:
    """How a run ended early: the exit code, and the lines that say why."""

    exit_code: int
    lines: tuple[str, ...]


def run_to_the_end(
    step: Callable[[Namespace, Console, Report], None],
    options: Namespace,
    console: Console,
    report: Report,
) -> Ending | None:
    """Do ``step``; return how it ended if that was early, else ``None``."""
    try:
        step(options, console, report)
    except JobError as error:
        return Ending(1, error.args)
    except OSError as error:  # Path.absolute, when the current directory is gone
        reason = printable(error.strerror or error)
        return Ending(1, (f"the current directory cannot be used: {reason}",))
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        return Ending(
            128 + number, (f"stopped by {signal.Signals(number).name}, run again to go on",)
        )
    return None


def make_gallery(options: Namespace, console: Console, report: Report) -> None:
    """Write the gallery; if that fails, print why, and count it as a problem."""
    if not os.path.isdir(options.output_dir):
        return  # what is wrong with that has been said

    def write() -> str:
        hidden = HiddenFiles(options.output_dir, options.timeout)
        try:
            return write_gallery(options.output_dir, hidden, console)
        except JobError as error:
            return str(error)
        finally:
            hidden.clean(set())

    problem = try_for(GALLERY_MAX_S, write)
    if problem is None:
        problem = "could not write the gallery: the output directory does not answer"
    if problem:
        console.complain("", f"⚠️ {problem}")
        report.problems.append(problem)


def end_by_signal(number: int, _frame: object) -> NoReturn:
    """Raise KeyboardInterrupt with the number, and ignore all signals that follow.

    An exception may come at any point of the program: what is on disk survives even a kill.
    """
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # `timeout` and CI runners send two
    raise KeyboardInterrupt(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; return the exit code, as ``--help`` lists them."""
    options = parse_arguments(argv)
    if UNUSABLE_REQUESTS:
        print(f"❌ {UNUSABLE_REQUESTS}", file=sys.stderr)
        return 1
    if __name__ == "__main__":
        for each in SIGNALS:
            signal.signal(each, end_by_signal)
    console = Console(options.quiet, options.json)
    report = Report()
    ending = run_to_the_end(carry_out, options, console, report)
    # If the run could not even begin, the gallery still shows what earlier runs brought.
    could_not_begin = ending is not None and ending.exit_code == 1 and not report.is_run
    if options.gallery and (ending is None or could_not_begin):
        ending = run_to_the_end(make_gallery, options, console, report) or ending
    console.clear_line()
    error_lines = ending.lines if ending else ()
    if report.is_run:
        console.show_summary(report, options.output_dir, error_lines)
    elif error_lines:
        console.complain("", *(f"❌ {line}" for line in error_lines))
    exit_code = ending.exit_code if ending else report.exit_code
    if options.json and not print_json(report.as_json(exit_code, "; ".join(error_lines)), console):
        return 1
    return exit_code


def print_json(document: JsonObject, console: Console) -> bool:
    """Print the object of --json; return whether that worked."""
    if sys.stdout is None:
        console.complain("❌ the JSON could not be written: stdout is closed")
        return False
    try:
        print(json.dumps(document, indent=2), flush=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        console.complain(f"❌ the JSON could not be written: {reason}")
        return False
    return True


def run_as_a_program() -> NoReturn:
    """Run the command line, then exit without waiting for worker threads that are stuck."""
    threading.stack_size(THREAD_STACK_BYTES)
    try:
        exit_code = main()
    except KeyboardInterrupt as interrupt:  # during the gallery, or while last lines are printed
        exit_code = 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    os._exit(exit_code)


if __name__ == "__main__":
    run_as_a_program()
