#!/usr/bin/env python3
"""Tests of download_succeeded_videos.py, in the order of the script; command line last.

``python test_download_succeeded.py`` or ``pytest`` runs them all;
``python test_download_succeeded.py --demo`` shows the main job without a Runway account.

Whatever the network can do is done by `Cdn`, a real server on the loopback address; the
processes, kills and full disks are real as well.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import heapq
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import format_datetime
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock
from urllib.parse import unquote

import pytest
import responses

import download_succeeded_videos as dsv

SCRIPT = Path(dsv.__file__).resolve()

# --- Builders: whole MP4s, rows, results files -----------------------------------------------


def make_mp4(seed: object = 0, size: int = 100_000) -> bytes:
    """The boxes of an MP4, ``size`` bytes in all; another ``seed`` makes other bytes."""
    data = random.Random(str(seed)).randbytes(size - 48)
    boxes = {b"ftyp": b"isom\0\0\2\0", b"moov": bytes(8), b"mdat": data, b"free": b""}
    return b"".join(struct.pack(">I4s", 8 + len(x), kind) + x for kind, x in boxes.items())


def make_jwt_link(base: str, expires: float) -> str:
    """``base`` signed as Runway's CDN links are; ``expires`` in Unix seconds."""
    payload = base64.urlsafe_b64encode(json.dumps({"exp": expires}).encode()).decode().rstrip("=")
    return f"{base}?_jwt=eyJhbGciOiJIUzI1NiJ9.{payload}.c2VjcmV0LXNpZ25hdHVyZQ"


def make_task_id(number: int) -> str:
    return hashlib.md5(str(number).encode()).hexdigest()[:8] + f"-0000-4000-8000-{number:012}"


def make_row(number: int = 0, **overrides: Any) -> dict[str, Any]:
    """A SUCCEEDED row as the poller writes it; ``None`` leaves a field out."""
    row = {
        "task_id": make_task_id(number),
        "image_path": f"video_queue/picture_{number}_draft.png",
        "prompt": "soft focus transition, élégant reveal",
        "target_filename_stub": f"picture_{number}",
        "timestamp": "2025-06-17T03:48:46.656953",
        "status": "PENDING",
        "final_status": "SUCCEEDED",
        "completion_time": "2025-06-17T04:00:58.870095",
        "video_url": f"https://cdn.invalid/{number}.mp4?_jwt=secret",
    } | overrides
    return {key: value for key, value in row.items() if value is not None}


def write_results(directory: Path, rows: Iterable[Any], when: str = "20250617_040158") -> Path:
    """A results file in ``directory``, named for the time ``when``."""
    path = directory / f"runway_polling_results_{when}.json"
    document = {"polling_stats": {}, "task_results": list(rows), "generated_at": "2025-06-17"}
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


# --- The CDN: a real server that does what it is told -----------------------------------------


@dataclass(frozen=True)
class Reply:
    """One answer: by default the object, whole, ranges and all, as a good CDN gives it."""

    status: int = 200
    body: bytes | None = None  # None: the object
    headers: Mapping[str, str | None] = field(default_factory=dict)  # None: leave it out
    framing: str = "length"  # or "chunked", or "close": until the connection closes
    send: int | None = None  # only so many bytes of the body, then ``ending``
    ending: str = "close"  # or "reset", or "hang"
    ranges: bool = True
    if_range: bool = True
    wait_s: float = 0.0  # before the head
    pause_at: int | None = None  # after so many bytes of the body, until `Cdn.released`
    bytes_per_second: float | None = None


@dataclass(frozen=True)
class Request:
    path: str
    headers: Mapping[str, str]
    client: tuple[str, int]  # the connection it came by
    at: float  # by the monotonic clock

    @property
    def range_start(self) -> int | None:
        value = self.headers.get("Range")
        return int(value.removeprefix("bytes=").removesuffix("-")) if value else None


def make_etag(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


AnyCdn = TypeVar("AnyCdn", bound="Cdn")


class Cdn:
    """Serves objects on the loopback address and remembers every request."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.replies: dict[str, Sequence[Reply]] = {}
        self.requests: list[Request] = []
        self.released = threading.Event()  # ends what hangs
        self._lock = threading.Lock()
        self._counts = Counter[str]()
        handler = type("Handler", (_CdnHandler,), {"cdn": self})
        self._server = _QuietServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def add(self, name: str, body: bytes, *replies: Reply) -> str:
        """Serve ``body`` as ``name`` with ``replies`` in turn, the last one stays; its link."""
        self.objects[f"/{name}"] = body
        self.replies[f"/{name}"] = replies or (Reply(),)
        return f"{self.url}/{name}?_jwt=secret.{name}"

    def asked(self, name: str) -> list[Request]:
        return [request for request in self.requests if request.path == f"/{name}"]

    def next_reply(self, request: Request) -> Reply | None:
        with self._lock:
            self.requests.append(request)
            self._counts[request.path] += 1
            replies = self.replies.get(request.path)
            return replies[min(self._counts[request.path], len(replies)) - 1] if replies else None

    def __enter__(self: AnyCdn) -> AnyCdn:
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what many tests are about."""


class _CdnHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cdn: Cdn

    def log_message(self, *_: Any) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        headers = dict(self.headers.items())
        reply = self.cdn.next_reply(Request(path, headers, self.client_address, time.monotonic()))
        if reply is None:
            self.send_error(404)
            return
        self.cdn.released.wait(reply.wait_s)
        whole = self.cdn.objects[path] if reply.body is None else reply.body
        status, head, body = self._select(reply, whole)
        framing = {"chunked": ("Transfer-Encoding", "chunked"), "close": ("Connection", "close")}
        key, text = framing.get(reply.framing, ("Content-Length", str(len(body))))
        self.send_response(status)
        for name, value in {**head, key: text, **reply.headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        try:
            self._send(reply, body)
        except OSError:
            self.close_connection = True

    def _select(self, reply: Reply, whole: bytes) -> tuple[int, dict[str, Any], bytes]:
        """Status, headers and bytes of the answer, ranges considered (RFC 9110, 14)."""
        headers: dict[str, Any] = {"Content-Type": "video/mp4", "ETag": make_etag(whole)}
        asked = self.headers.get("Range")
        condition = self.headers.get("If-Range")
        current = (headers | dict(reply.headers)).get("ETag"), reply.headers.get("Last-Modified")
        unchanged = condition is None or not reply.if_range or condition in current
        if reply.status != 200 or not asked or not reply.ranges or not unchanged:
            return reply.status, headers, whole
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(whole):
            return 416, headers | {"Content-Range": f"bytes */{len(whole)}"}, b""
        headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        return 206, headers, whole[start:]

    def _send(self, reply: Reply, body: bytes) -> None:
        sent = body if reply.send is None else body[: reply.send]
        step = 65536 if reply.bytes_per_second is None else max(1, int(reply.bytes_per_second / 20))
        step = reply.pause_at or step
        for start in range(0, len(sent), step):
            if start == reply.pause_at:
                self.cdn.released.wait(60)
            piece = sent[start : start + step]
            if reply.framing == "chunked":
                piece = b"%x\r\n%s\r\n" % (len(piece), piece)
            self.wfile.write(piece)
            if reply.bytes_per_second is not None:
                self.cdn.released.wait(0.05)
        if reply.send is None:
            self.wfile.write(b"0\r\n\r\n" if reply.framing == "chunked" else b"")
            self.close_connection = self.close_connection or reply.framing == "close"
            return
        self.close_connection = True
        if reply.ending == "hang":
            self.cdn.released.wait(60)
        if reply.ending == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()


@pytest.fixture
def cdn() -> Iterator[Cdn]:
    with Cdn() as server:
        yield server


# --- Running it -------------------------------------------------------------------------------


def script_environment(**changes: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RUNWAYML_")}
    return clean | {"PYTHONIOENCODING": "utf-8", "NO_PROXY": "*"} | changes


def run_script(
    directory: Path, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The real script in its own process, in ``directory``, to its end."""
    return finish(start_script(directory, *arguments, env=env))


def start_script(
    directory: Path,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*before, sys.executable, str(SCRIPT), *arguments],
        cwd=directory,
        env=script_environment(**env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """What ``process`` printed, and its exit code, when it has come to its end."""
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in out + err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for ``condition``; fail when it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def make_downloader(output_dir: Path, timeout: float = 5.0, **more: Any) -> dsv.VideoDownloader:
    """A downloader that does not wait long for a server."""
    return dsv.VideoDownloader(output_dir, timeout=timeout, **more)


def assert_whole(output_dir: Path, stub: str, task_id: str, body: bytes) -> None:
    """The video is there, to the byte, with metadata of its own task."""
    assert (output_dir / f"{stub}.mp4").read_bytes() == body
    metadata = json.loads((output_dir / f"{stub}.json").read_text(encoding="utf-8"))
    assert metadata["runway_task_json"]["task_id"] == task_id
    assert metadata["file_info"]["sha256"] == hashlib.sha256(body).hexdigest()


def names_in(directory: Path) -> set[str]:
    return set(os.listdir(directory))


# --- Builders for what the script decides upon -------------------------------------------------

SMALL = 2_500  # bytes, where the size is all the same
posix = pytest.mark.skipif(os.name != "posix", reason="no named pipes, no free symbolic links")


def make_task(number: int = 0, **overrides: Any) -> dsv.Task:
    return dsv.task_from_row(make_row(number, **overrides))


def make_metadata(task: dsv.Task, name: str = "x.mp4") -> bytes:
    now = datetime(2025, 6, 17, 4, 5, 53, 806609)
    info = {"size_bytes": 941873, "size_mb": 0.9, "sha256": "ab" * 32}
    return dsv.encode_metadata(dsv.build_metadata(task, name, info, now))


def strict_json(data: bytes) -> Any:
    """``data`` as JSON that has no NaN and no Infinity, which other languages refuse."""

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    return json.loads(data.decode("utf-8"), parse_constant=refuse)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def lay_out(directory: Path, entries: Mapping[str, Any]) -> None:
    """Make files: of bytes, with the metadata of a task, or as a function of the path does."""
    for name, content in entries.items():
        if callable(content):
            content(directory / name)
        else:
            data = make_metadata(content) if isinstance(content, dsv.Task) else content
            (directory / name).write_bytes(data)


# --- Text for people ---------------------------------------------------------------------------


def test_shown_link_is_cut_to_50_characters_without_its_secrets() -> None:
    for link, shown in {
        "h.invalid/a.mp4?_jwt=SECRET": "h.invalid/a.mp4",
        "h.invalid/a#SECRET?SECRET": "h.invalid/a",
        "SECRET@SECRET@h.invalid/a@b": "h.invalid/a@b",
        "h.invalid/\x1b[31m\u202e": "h.invalid/?[31m?",
        "h.invalid/" + "x" * 32 + "?SECRET": "h.invalid/" + "x" * 32,
        "h.invalid/" + "x" * 33: "h.invalid/" + "x" * 32 + "...",
    }.items():
        assert dsv.shown_link(f"https://{link}") == f"https://{shown}"


# --- Results files -----------------------------------------------------------------------------


def test_latest_goes_by_the_time_in_the_name_else_by_the_modification_time(tmp_path: Path) -> None:
    days = {"20250101_000000": 9, "night_20250105_000000 (2)": 8, "20250103_000000": 7,
            "one": 2, "20250230_000000": 4}  # fmt: skip
    for name, day in days.items():
        modified = datetime(2025, 1, day, 12).timestamp()
        os.utime(write_results(tmp_path, [], name), (modified, modified))
    (tmp_path / "runway_polling_results_20250109_000000.json").mkdir()
    (tmp_path / "runway_polling_results_20250109_000000.json.bak").touch()
    paths = dsv.find_results_files([tmp_path, tmp_path / ".", tmp_path / "missing"])
    times = ["night_20250105_000000 (2)", "20250230_000000", "20250103_000000", "one"]
    found = [path.stem.partition("results_")[2] for path in paths]
    assert found == [*times, "20250101_000000"]


NO_RESULTS = 'is not a polling-results file, which looks like {"task_results": [{"task_id"'


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(None, "No such file", id="missing"),
        pytest.param(os.mkdir, "Is a directory", id="directory", marks=posix),
        pytest.param(b"", "not JSON: Expecting value (line 1, column 1)", id="empty"),
        pytest.param(b'{"a": 1,\n  b}', "(line 2, column 3)", id="comma"),
        pytest.param(b"\xef\xbb\xbf{]", "(line 1, column 2)", id="broken behind a mark"),
        pytest.param(b'{"task_results": ["\xe9"]}', "not UTF-8 (byte 19)", id="Latin-1"),
        pytest.param(b"[" * 200_000, "nested too deeply", id="nesting"),
        pytest.param(b'{"tasks": []}', NO_RESULTS, id="another step's"),
        pytest.param(b'{"task_results": {}}', NO_RESULTS, id="no list"),
    ],
)
def test_broken_results_file_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, complaint: str
) -> None:
    name = "runway_polling_results_20250617_040158.json"
    lay_out(tmp_path, {} if content is None else {name: content})
    assert make_downloader(tmp_path).load_polling_results(tmp_path / name) == {}
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line
    assert complaint in line
    assert dsv.printable(line) == line


def test_results_file_with_a_byte_order_mark_is_used(tmp_path: Path) -> None:
    path = write_results(tmp_path, [make_row(3)])
    path.write_bytes(b"\xef\xbb\xbf\r\n \t" + path.read_bytes())
    assert dsv.read_results(path)["task_results"] == [make_row(3)]


# --- Rows and tasks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "is_task", "complaint"),
    [
        pytest.param(None, False, "object", id="null"),
        pytest.param([make_row(1)], False, "object", id="list"),
        pytest.param({"final_status": ["FAILED"]}, False, '"final_status"', id="status"),
        pytest.param(make_row(1, task_id=5), True, '"task_id"', id="task_id"),
        pytest.param(make_row(1, target_filename_stub={}), True, "stub", id="stub"),
        pytest.param(make_row(1, prompt=["a"]), True, '"prompt"', id="prompt"),
        pytest.param(make_row(1, image_path=False), True, '"image_path"', id="path"),
    ],
)
def test_hostile_row_is_named_and_costs_no_other_row(
    row: Any, is_task: bool, complaint: str
) -> None:
    tasks, remarks = dsv.read_rows({"task_results": [make_row(0), row, make_row(2)]})
    ids = [task.task_id for task in tasks]
    assert (ids[0], ids[-1], len(ids)) == (make_task_id(0), make_task_id(2), 2 + is_task)
    assert any("Row 2" in remark and complaint in remark for remark in remarks)


def test_tasks_that_did_not_succeed_are_told_in_one_line() -> None:
    statuses = ["FAILED", None, "CANCELLED", "FAILED", None, "THROTTLED\x1b[31m", None]
    rows = [make_row(i, final_status=status) for i, status in enumerate(statuses)]
    tasks, (line,) = dsv.read_rows({"task_results": rows})
    assert not tasks
    for count in ("2 FAILED", "1 CANCELLED", "3 still running", "1 THROTTLED?[31m"):
        assert count in line


UNUSABLE_LINKS = [
    None, "", 5, ["https://cdn.invalid/a.mp4"], "cdn.invalid/a.mp4", "ftp://cdn.invalid/a.mp4",
    "file:///etc/passwd", "javascript:alert(1)", "https:///a.mp4", "https://?_jwt=a",
    "https://u:p@/a.mp4", "https://cdn.invalid:8x/a.mp4",
    "https://[cdn]/a.mp4", "https://cdn.invalid/a b.mp4", "https://cdn.invalid/a\r\nHeader: b",
    "https://cdn.invalid/\x1b[31m", "https://cdn.invalid/\0", "https://cdn.invalid\\a.mp4",
    "https://cdn.invalid/\ud800.mp4",
]  # fmt: skip


def test_succeeded_tasks_without_usable_link_are_found_failed_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RUNWAYML_API_SECRET", raising=False)
    rows = [make_row(i, video_url=link) for i, link in enumerate(UNUSABLE_LINKS)]
    downloader, count = make_downloader(tmp_path / "out"), len(rows)
    assert downloader.get_succeeded_tasks({"task_results": rows}) == []
    assert downloader.process_polling_results_file(write_results(tmp_path, rows)) == 0
    stats = downloader.stats
    assert (stats["total_succeeded"], stats["failed_downloads"]) == (count, count)
    lines = [line for line in capsys.readouterr().out.splitlines() if '"video_url"' in line]
    for i in range(count):
        assert any(f"picture_{i}." in line for line in lines), UNUSABLE_LINKS[i]
    assert names_in(tmp_path / "out") == set()


def test_usable_link_is_used_to_the_letter() -> None:
    for link in (
        "https://dnznrvs05pmza.cloudfront.net/0f3b.mp4?_jwt=a.b.c", "HTTP://CDN.invalid:65535",
        "https://[2001:db8::1]:8443/a.mp4#t=1", "https://user:secret@cdn.invalid?x=@/y",
        "https://bücher.invalid/ü.mp4",
    ):  # fmt: skip
        assert dsv.usable_link(link) == dsv.usable_link(f" {link}\n") == link


def sign(payload: bytes) -> str:
    return "https://cdn.invalid/a.mp4?_jwt=h." + base64.urlsafe_b64encode(payload).decode() + ".s"


NO_EXPIRY = [b"null", b"true", b'"9"', b"0", b"-1", b"NaN", b"1e999", b"253402300800", b"9" * 5000]


def test_link_expiry_is_read_from_the_token_and_nonsense_is_none() -> None:
    for expiry in (1750300000, 1750300000.5):
        assert dsv.link_expiry(make_jwt_link("https://cdn.invalid", expiry)) == expiry
    assert dsv.link_expiry(sign(b'{"exp": 9}').replace("?", "?a=b&") + "&c=d") == 9
    for query in ("", "?my_jwt=h.eyJleHAiOjl9.s", "?_jwt=", "?_jwt=a..c", "?_jwt=a.é!?.c"):
        assert dsv.link_expiry(f"https://cdn.invalid/a.mp4{query}") is None, query
    nonsense = [b"\xff\xfe", b"exp", b"[1]", b"{}", b"[" * 100_000]
    for payload in (*nonsense, *(b'{"exp": %s}' % value for value in NO_EXPIRY)):
        assert dsv.link_expiry(sign(payload)) is None, payload[:20]


FRESH, STALE = (f"https://cdn.invalid/a.mp4?_jwt={token}" for token in ("fresh", "stale"))
ANOTHER = "https://cdn.invalid/b.mp4"


@pytest.mark.parametrize(
    ("rows", "links"),
    [
        pytest.param([("a", FRESH), ("a", STALE)], [FRESH], id="the latest"),
        pytest.param([("a", None), ("a", STALE)], [STALE], id="the latest has none"),
        pytest.param([("a", FRESH), ("a", ANOTHER)], [FRESH], id="moved"),
        pytest.param([("a", FRESH), ("b", FRESH)], [FRESH, FRESH], id="other tasks, one link"),
        pytest.param([(None, FRESH), (None, STALE), ("", ANOTHER)], [FRESH, ANOTHER], id="no id"),
        pytest.param([(None, None), (None, None)], ["", ""], id="neither"),
    ],
)
def test_task_in_several_rows_counts_once_with_its_freshest_link(
    rows: list[tuple[str | None, str | None]], links: list[str]
) -> None:
    tasks = [make_task(task_id=task_id, video_url=link) for task_id, link in rows]
    assert [task.link for task in dsv.merge_tasks(tasks)] == links


# --- Names -------------------------------------------------------------------------------------


ORDINARY_STUBS = [
    "elegant_business_classic_tt_video", "Ein schönes Bild (2), final!", "日本語の動画🎬",
    "cafe\u0301", "a.b.mp4", "trailing dot.", "COM10", "nul_video", " in and out ",
    "x" * 250, "é" * 125,
]  # fmt: skip


def test_ordinary_stub_is_used_to_the_letter(tmp_path: Path) -> None:
    stub_of = make_downloader(tmp_path).generate_filename_stub
    assert [stub_of(make_row(target_filename_stub=stub)) for stub in ORDINARY_STUBS] == (
        ORDINARY_STUBS
    )


HOSTILE_STUBS = [
    "a/b\\c", "../../../../tmp/up", "/etc/passwd", "C:\\up", "..", ".hidden", "a\0b", "a\r\nb\n",
    "\x1b[31mred\x1b]0;title\x07", "a\x9b31m\x7fb", '<>:"|?*', "a\ud800b\udfff",
    "photo\u202egpj.exe\u2066", "a\u2028b\u2029c", "\ufeffname",
    "x" * 400, "🎬" * 400, "a" + "é" * 200, "PRN." + "x" * 400,
    "nul", "aux.tar.gz", "LPT1  .x", "COM¹", "CONIN$", "runway_polling_results_20991231_235959",
]  # fmt: skip
WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{port}{digit}" for port in ("COM", "LPT") for digit in "0123456789¹²³"
}


def assert_name_for_any_file_system(name: str) -> None:
    assert not set(name) & set('<>:"/\\|?*')
    assert not name.startswith((".", "runway_polling_results_"))
    assert name.split(".")[0].rstrip(" ").upper() not in WINDOWS_DEVICES
    assert len(name.encode()) <= 255
    assert not {"Cc", "Cs", "Zl", "Zp"} & {unicodedata.category(char) for char in name}
    assert not {"RLO", "LRI"} & {unicodedata.bidirectional(char) for char in name}


def test_videos_with_hostile_stubs_are_saved_flat_and_whole(tmp_path: Path, cdn: Cdn) -> None:
    bodies = [make_mp4(stub.encode(errors="replace"), SMALL) for stub in HOSTILE_STUBS]
    links = [cdn.add(f"{i}.mp4", body) for i, body in enumerate(bodies)]
    rows = [
        make_row(i, target_filename_stub=stub, video_url=links[i])
        for i, stub in enumerate(HOSTILE_STUBS)
    ]
    results = write_results(tmp_path, rows)
    for _ in range(2):
        downloader = make_downloader(tmp_path / "in" / "out")
        assert downloader.process_polling_results_file(results) == len(rows)
    assert (names_in(tmp_path), names_in(tmp_path / "in")) == ({"in", results.name}, {"out"})
    names = owners(downloader.output_dir)
    assert len(names_in(downloader.output_dir)) == 2 * len(names) == 2 * len(cdn.requests)
    for i, body in enumerate(bodies):
        assert_name_for_any_file_system(f"{names[make_task_id(i)]}.json")
        assert_whole(downloader.output_dir, names[make_task_id(i)], make_task_id(i), body)


def test_default_stub_is_made_of_the_task_id(tmp_path: Path) -> None:
    stub_of = make_downloader(tmp_path).generate_filename_stub
    for stub in (None, "  ", ["a"]):
        row = make_row(task_id="def45678-90ab", target_filename_stub=stub)
        assert stub_of(row) == "video_def45678"
    for task_id in (None, 12345678):
        assert stub_of(make_row(task_id=task_id, target_filename_stub="")) == "video_unknown"


def test_another_task_with_the_stub_gets_its_id_behind_it() -> None:
    for stub, names in {
        "s": ["s_f645e2df", "s_f645e2df_2", "s_f645e2df_3"],
        "x" * 400: ["x" * 241 + "_f645e2df", "x" * 239 + "_f645e2df_2"],
        "語" * 400: ["語" * 80 + "_f645e2df"],
    }.items():
        task = make_task(target_filename_stub=stub, task_id="f645e2df-b639")
        assert list(islice(dsv.stubs_with_id(task), len(names))) == names


# --- What a file is, by its bytes --------------------------------------------------------------


def box(kind: bytes, payload: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack(">I4s", 8 + len(payload) if size is None else size, kind) + payload


def long_box(kind: bytes, payload: bytes = b"", size: int | None = None) -> bytes:
    size = 16 + len(payload) if size is None else size
    return struct.pack(">I4sQ", 1, kind, size) + payload


WHOLE = make_mp4(0, SMALL)
FTYP = box(b"ftyp", b"isom\0\0\2\0isomiso2")
WEBM = b"\x1aE\xdf\xa3\x9fB\x86\x81\1B\xf7\x81\1B\xf2\x81\4B\xf3\x81\x08B\x82\x84webm"


@pytest.mark.parametrize(
    ("body", "content"),
    [
        pytest.param(WHOLE, "WHOLE", id="a real one"),
        pytest.param(FTYP + box(b"free"), "WHOLE", id="empty box at the end"),
        pytest.param(FTYP + box(b"mdat", b"12345", size=0), "WHOLE", id="size 0: all the rest"),
        pytest.param(FTYP + long_box(b"mdat", b"12345"), "WHOLE", id="64 bit"),
        pytest.param(box(b"wide") + box(b"mdat", b"1") + box(b"moov"), "WHOLE", id="old MOV"),
        pytest.param(FTYP + box(b"moov", b"12345", size=14), "CUT", id="a byte short"),
        pytest.param(FTYP + long_box(b"mdat", b"1", size=2**64 - 1), "CUT", id="64 bit, short"),
        pytest.param(WHOLE + bytes(4), "SURPLUS", id="4 zero bytes behind"),
        pytest.param(WHOLE + b"<html>Bye</html>", "SURPLUS", id="text behind"),
        pytest.param(WEBM, "OTHER", id="WebM"),
        pytest.param(b"GIF89a\1\0\1\0\x80\0\0\xff\xff\xff", "OTHER", id="GIF"),
        pytest.param(b"", "ZEROS", id="empty"),
        pytest.param(b"\0", "ZEROS", id="a zero byte"),
        pytest.param(bytes(200_000), "ZEROS", id="zeros"),
        pytest.param(b"\xef\xbb\xbf\r\n<!DOCTYPE html>", "TEXT", id="HTML behind a mark"),
        pytest.param(b'<?xml version="1.0"?><Error/>', "TEXT", id="XML"),
        pytest.param(b'{"error": "expired"}', "TEXT", id="JSON"),
        pytest.param(b"#EXTM3U\n#EXT-X-VERSION:3\n", "TEXT", id="playlist"),
        pytest.param(b"Access denied", "TEXT", id="a sentence"),
        pytest.param(b"x", "TEXT", id="a letter"),
        pytest.param("Zugriff verweigert: für".encode("latin-1"), "TEXT", id="Latin-1"),
        pytest.param("Access denied".encode("utf-16"), "TEXT", id="UTF-16"),
        pytest.param(b"Access denied. " * 10_000, "TEXT", id="long text"),
    ],
)
def test_the_bytes_decide_what_a_file_is(body: bytes, content: str) -> None:
    assert dsv.inspect(io.BytesIO(body), len(body)) is dsv.Content[content]
    assert dsv.Content[content].is_video is (content in ("WHOLE", "SURPLUS", "OTHER"))


def test_mp4_cut_at_any_byte_inside_a_box_is_seen() -> None:
    boxes = [FTYP, long_box(b"mdat", b"12345"), box(b"free"), box(b"moov", b"123")]
    body, ends = b"".join(boxes), [sum(map(len, boxes[:count])) for count in range(1, 5)]
    for size in range(1, len(body) + 1):
        content = dsv.inspect(io.BytesIO(body[:size]), size)
        assert (content is dsv.Content.WHOLE) is (size in ends), f"cut to {size} bytes"
        assert content.is_video is (size >= ends[0] and content is not dsv.Content.CUT)
        if content is dsv.Content.SURPLUS:  # the announced length tells
            assert any(0 < size - end < 8 for end in ends), f"cut to {size} bytes"


# --- Metadata ----------------------------------------------------------------------------------

EXAMPLE_ROW = make_row(
    task_id="f645e2df-b639-4264-9bf2-fc7bceb6c658",
    image_path="video_queue/elegant_business_classic_tt_draft.png",
    prompt="soft focus transition, elegant reveal, ...",
    target_filename_stub="elegant_business_classic_tt_video",
    video_url="https://dnznrvs05pmza.cloudfront.net/0f3b0be2-a946.mp4?_jwt=a.b.c",
)
EXAMPLE_METADATA = """\
{
  "video_file": "elegant_business_classic_tt_video.mp4",
  "download_timestamp": "2025-06-17T04:05:53.806609",
  "input_path": "video_queue/elegant_business_classic_tt_draft.png",
  "prompt": "soft focus transition, elegant reveal, ...",
  "seed": null,
  "runway_task_json": {
    "task_id": "f645e2df-b639-4264-9bf2-fc7bceb6c658",
    "final_status": "SUCCEEDED",
    "completion_time": "2025-06-17T04:00:58.870095",
    "video_url": "https://dnznrvs05pmza.cloudfront.net/0f3b0be2-a946.mp4?_jwt=a.b.c",
    "original_status": "PENDING",
    "timestamp": "2025-06-17T03:48:46.656953"
  },
  "target_filename_stub": "elegant_business_classic_tt_video",
  "file_info": {
    "size_bytes": 941873,
    "size_mb": 0.9,
    "sha256": "abababababababababababababababababababababababababababababababab"
  }
}"""


ROW_STUB = '_stub": "elegant_business_classic_tt_video"'
PROMPT, LAST = '"soft focus transition, elegant reveal, ..."', '46.656953"\n  }'


@pytest.mark.parametrize(
    ("changes", "old", "new"),
    [
        pytest.param({}, "", "", id="the documented one"),
        pytest.param({"seed": 0}, '"seed": null', '"seed": 0', id="seed zero"),
        pytest.param({"seed": 2**64}, '"seed": null', f'"seed": {2**64}', id="long seed"),
        pytest.param({"seed": float("nan")}, "", "", id="NaN is left out"),
        pytest.param({"prompt": 'é 🎬 "\n'}, PROMPT, '"é 🎬 \\"\\n"', id="text as it is"),
        pytest.param({"prompt": "\ud800 é"}, PROMPT, '"\\ud800 é"', id="lone surrogate"),
        pytest.param({"prompt": 5}, PROMPT, '""', id="wrong type"),
        pytest.param(
            {"target_filename_stub": "a/b"}, ROW_STUB, '_stub": "a/b"', id="the row's stub"
        ),
        *(
            pytest.param({name: ...}, f'": "{EXAMPLE_ROW[name]}"', '": ""', id=f"no {name}")
            for name in ("image_path", "prompt", "timestamp", "completion_time", "status")
        ),
        pytest.param(
            {"resolution": "720p", "duration": None, "other": 1, "cluster_id": {"é": 0}},
            LAST,
            '46.656953",\n    "cluster_id": {\n      "é": 0\n    },\n'
            '    "duration": null,\n    "resolution": "720p"\n  }',
            id="extras in their order, null included",
        ),
        pytest.param({"theme": [float("inf")]}, "", "", id="infinity is left out"),
    ],
)
def test_metadata_is_as_documented_to_the_letter(
    changes: dict[str, Any], old: str, new: str
) -> None:
    row = {key: value for key, value in (EXAMPLE_ROW | changes).items() if value is not ...}
    name = "elegant_business_classic_tt_video.mp4"
    data = make_metadata(dsv.task_from_row(row), name)
    assert old in EXAMPLE_METADATA
    assert data.decode() == (EXAMPLE_METADATA.replace(old, new) if old else EXAMPLE_METADATA)
    strict_json(data)


def test_metadata_says_what_is_to_be_handed_over_and_is_then_left_alone(tmp_path: Path) -> None:
    task, info, path = make_task(), {"size_bytes": 1, "sha256": "ab" * 32}, tmp_path / "a.json"
    assert dsv.put_metadata(path, task, "a.mp4", info, hand_over=True)
    assert list(strict_json(path.read_bytes()).items())[-1] == ("handed_over", False)
    before = path.read_bytes()
    assert not dsv.put_metadata(path, task, "a.mp4", info)
    with pytest.raises(FileExistsError):
        dsv.put_metadata(path, make_task(1), "a.mp4", info)
    assert (path.read_bytes(), names_in(tmp_path)) == (before, {"a.json"})


# --- The plan ----------------------------------------------------------------------------------

MINE = make_task(0, target_filename_stub="s", task_id="f645e2df-b639")
OTHERS = make_task(1, target_filename_stub="s")
ALL_OURS = {"s.json": MINE, "s.mp4": WHOLE}
ALL_OTHERS = {"s.json": OTHERS, "s.mp4": WHOLE}
SECOND = "s_f645e2df"
RENAMED = {"holiday.json": MINE, "holiday.mp4": WHOLE}


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


FOREIGN_JSON: dict[str, Any] = {
    "list": b"[]",
    "object": b'{"task_id": "f645e2df-b639"}',
    "other types": b'{"runway_task_json": {"task_id": 5}}',
    "cut": b'{"runway_task_json": {"task_id": "f645e2df-b639"',
    "binary": b"\xff\xfe\0",
    "nesting": b"[" * 200_000,
    "directory": os.mkdir,
    "pipe": make_pipe,
}


@pytest.fixture
def no_hang() -> Iterator[None]:
    """Fail a test that waits for a pipe which nobody writes to."""
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def second(**entries: Any) -> dict[str, Any]:
    """Entries under the name with the id of `MINE`."""
    return {f"{SECOND}.{suffix}": content for suffix, content in entries.items()}


@pytest.mark.parametrize(
    ("entries", "action", "stub"),
    [
        pytest.param({}, "DOWNLOAD", "s", id="nothing there"),
        pytest.param(ALL_OURS | {"s.mp4": b"edited"}, "KEEP", "s", id="edited in place"),
        pytest.param({"s.json": MINE}, "REFILL", "s", id="metadata without video"),
        pytest.param({"holiday.json": MINE}, "REFILL", "holiday", id="renamed, without video"),
        pytest.param(ALL_OURS | {"s.mp4": b""}, "REFILL", "s", id="zero bytes, has metadata"),
        pytest.param({"s.mp4": b""}, "DOWNLOAD", "s", id="zero bytes"),
        pytest.param({"s.mp4": bytes(999)}, "DOWNLOAD", "s", id="nothing but zeros"),
        pytest.param({"s.mp4": WHOLE[:-100]}, "DOWNLOAD", "s", id="cut without metadata"),
        pytest.param({"s.mp4": b"<html>"}, "DOWNLOAD", "s", id="error page without metadata"),
        pytest.param({"s.mp4": WHOLE}, "ASK", "s", id="whole without metadata"),
        pytest.param({"s.mp4": WEBM}, "ASK", "s", id="WebM without metadata"),
        pytest.param({"S.json": MINE, "S.mp4": WHOLE}, "KEEP", "S", id="ours in another case"),
        pytest.param(RENAMED, "KEEP", "holiday", id="renamed pair"),
        pytest.param(RENAMED | ALL_OTHERS, "KEEP", "holiday", id="renamed, another in its place"),
        pytest.param(RENAMED | {"s.json": MINE}, "KEEP", "holiday", id="the finished one of two"),
        pytest.param(ALL_OTHERS | second(json=MINE, mp4=WHOLE), "KEEP", SECOND, id="second name"),
        pytest.param(ALL_OTHERS | second(mp4=WHOLE), "ADOPT", SECOND, id="orphan with the id"),
        pytest.param(ALL_OTHERS | second(mp4=b"text"), "DOWNLOAD", SECOND, id="text with the id"),
    ],
)
def test_plan_follows_from_what_is_on_disk(
    tmp_path: Path, entries: dict[str, Any], action: str, stub: str
) -> None:
    lay_out(tmp_path, entries)
    (plan,) = dsv.plan_all([MINE], dsv.Shelf.scan(tmp_path), {})
    assert (plan.action, plan.stub) == (dsv.Action[action], stub)
    assert names_in(tmp_path) == set(entries)


@posix
@pytest.mark.usefixtures("no_hang")
@pytest.mark.parametrize(
    ("entries", "holder"),
    [
        pytest.param(ALL_OTHERS, "s.mp4 is another task's", id="another task"),
        pytest.param(ALL_OTHERS | second(json=b"[]"), "s.mp4 is another task's", id="both taken"),
        pytest.param({"s.json": OTHERS}, "s.json is another task's", id="its record"),
        pytest.param({"S.mp4": WHOLE}, "S.mp4 differs in case", id="another case"),
        pytest.param({"s.mp4": WHOLE}, "s.mp4 is another video", id="a video of another size"),
        pytest.param({"s.mp4": os.mkdir}, "s.mp4 is no file", id="directory"),
        pytest.param({"s.mp4": os.mkdir, "s.json": MINE}, "s.mp4 is no file", id="ours, no file"),
        pytest.param({"s.mp4": make_pipe}, "s.mp4 is no file", id="pipe"),
        pytest.param({"s.mp4": lambda p: p.symlink_to("s.mp4")}, "s.mp4 is no file", id="loop"),
        *(
            pytest.param(
                {"s.json": content}, "s.json is another program's file", id=f"json: {name}"
            )
            for name, content in FOREIGN_JSON.items()
        ),
    ],
)
def test_what_holds_a_name_is_left_alone_and_rightly_named(
    tmp_path: Path, entries: dict[str, Any], holder: str
) -> None:
    lay_out(tmp_path, entries)
    plan = dsv.plan_task(MINE, dsv.Shelf.scan(tmp_path), {}, in_hand=True)
    stub = f"{SECOND}_2" if f"{SECOND}.json" in entries else SECOND
    assert (plan.action, plan.stub) == (dsv.Action.DOWNLOAD, stub)
    assert plan.holder.startswith(holder)


def test_whole_video_under_a_default_name_is_adopted_since_it_holds_the_id(tmp_path: Path) -> None:
    task = make_task(task_id="def45678-90ab", target_filename_stub=None)
    lay_out(tmp_path, {"video_def45678.mp4": WHOLE})
    plan = dsv.plan_task(task, dsv.Shelf.scan(tmp_path), {})
    assert (plan.action, plan.stub) == (dsv.Action.ADOPT, "video_def45678")


def test_task_without_id_owns_its_video_by_the_link(tmp_path: Path) -> None:
    old, fresh, other = (
        make_task(task_id=None, video_url=link) for link in (STALE, FRESH, ANOTHER)
    )
    lay_out(tmp_path, {f"{old.stub}.json": old, f"{old.stub}.mp4": WHOLE})
    plans = dsv.plan_all([fresh, other], dsv.Shelf.scan(tmp_path), {})
    assert [plan.action for plan in plans] == [dsv.Action.KEEP, dsv.Action.DOWNLOAD]
    assert plans[1].stub.startswith(f"{other.stub}_")


@pytest.mark.parametrize(
    "stubs",
    [
        pytest.param(["Same", "same", "SAME"], id="but for case"),
        pytest.param(["caf\u00e9", "cafe\u0301", "CAFE\u0301"], id="but for Unicode form"),
        pytest.param(["a/b", "a\\b", "a_b"], id="made equal"),
        pytest.param(["x" * 300, "x" * 400], id="cut to be equal"),
        pytest.param(["s", "s", f"s_{make_task_id(1)[:8]}"], id="equal to another's second name"),
    ],
)
def test_tasks_that_want_one_name_each_get_their_own(tmp_path: Path, stubs: list[str]) -> None:
    tasks = [make_task(i, target_filename_stub=stub) for i, stub in enumerate(stubs)]
    plans = dsv.plan_all(tasks, dsv.Shelf.scan(tmp_path), {})
    assert plans[0].stub == dsv.safe_stub(stubs[0])
    assert len({unicodedata.normalize("NFC", p.stub).casefold() for p in plans}) == len(stubs)
    for plan in plans:
        assert plan.action is dsv.Action.DOWNLOAD
        lay_out(tmp_path, {f"{plan.stub}.json": plan.task, f"{plan.stub}.mp4": WHOLE})
    again = dsv.plan_all(reversed(tasks), dsv.Shelf.scan(tmp_path), {})
    expected = [(plan.stub, dsv.Action.KEEP) for plan in plans]
    assert [(plan.stub, plan.action) for plan in reversed(again)] == expected


def test_one_orphan_is_asked_about_for_one_task_alone(tmp_path: Path) -> None:
    lay_out(tmp_path, {"s.mp4": WHOLE})
    plans = dsv.plan_all([MINE, OTHERS], dsv.Shelf.scan(tmp_path), {})
    assert [plan.action for plan in plans] == [dsv.Action.ASK, dsv.Action.DOWNLOAD]


def owners(directory: Path) -> dict[str, str]:
    """The name of each task's video."""
    found = {}
    for path in directory.glob("*.json"):
        task_id = json.loads(path.read_bytes())["runway_task_json"]["task_id"]
        assert path.with_suffix(".mp4").exists()
        assert task_id not in found
        found[task_id] = path.stem
    return found


def test_61_tasks_over_21_stubs_keep_their_names_over_two_nights(tmp_path: Path, cdn: Cdn) -> None:
    output, names = tmp_path / "video_outputs", dict[str, str]()
    for night in range(2):
        rows = []
        for i in range(61 * night, 61 * night + 61):
            link = cdn.add(f"{i}.mp4", make_mp4(i, SMALL))
            rows.append(make_row(i, target_filename_stub=f"style_{i % 61 % 21}", video_url=link))
        write_results(tmp_path, rows, f"2025061{night}_040158")
        assert run_script(tmp_path).returncode == 0
        assert owners(output).items() > names.items()
        names = owners(output)
        assert len(names) == 61 * (night + 1)
    stubs = {make_task_id(i): f"style_{i % 61 % 21}" for i in range(122)}
    assert {name for task_id, name in names.items() if name == stubs[task_id]} == {*stubs.values()}
    assert all(name in (stubs[i], f"{stubs[i]}_{i[:8]}") for i, name in names.items())
    renamed = make_task_id(70)
    for suffix in (".mp4", ".json"):
        (output / (names[renamed] + suffix)).rename(output / f"mine{suffix}")
    for _ in range(2):
        assert run_script(tmp_path, "--all").returncode == 0
        assert owners(output) == names | {renamed: "mine"}
    for i in range(122):
        assert_whole(output, owners(output)[make_task_id(i)], make_task_id(i), make_mp4(i, SMALL))
        assert len(cdn.asked(f"{i}.mp4")) == 1


# --- What an answer's head says ----------------------------------------------------------------


def test_content_range_is_two_numbers_or_nonsense() -> None:
    assert dsv.content_range({"Content-Range": " bytes 5-9/10 "}) == (5, 10)
    assert dsv.content_range({"Content-Range": "bytes 0-0/1"}) == (0, 1)
    for value in ("", "5-9/10", "bytes */10", "bytes 0-9/*", "bytes 9-5/10", "bytes 5-8/10",
                  "bytes 5-10/10", "bytes ٥-9/10", f"bytes 0-{'9' * 5000}/{'9' * 5001}",
                  ):  # fmt: skip
        assert dsv.content_range({"Content-Range": value}) == (-1, -1), value


def test_retry_after_is_seconds_or_a_date_or_nonsense() -> None:
    for value in ("", "-5", "1.5", "soon", "٥", "\0", "1 Jan"):
        assert dsv.retry_after_s({"Retry-After": value}) is None, value
    assert dsv.retry_after_s({"Retry-After": " 120 "}) == 120
    assert dsv.retry_after_s({"Retry-After": "Tue, 17 Jun 2025 03:59:59 GMT"}) == 0
    soon = format_datetime(datetime.fromtimestamp(time.time() + 50, timezone.utc), usegmt=True)
    assert 40 < (dsv.retry_after_s({"Retry-After": soon}) or 0) <= 50


# --- Back-off and pace -------------------------------------------------------------------------


def test_back_off_doubles_up_to_a_bound_jitters_and_heeds_the_server() -> None:
    longest = [dsv.backoff_s(failures, None, 1.0) for failures in range(1, 1001)]
    assert [wait / longest[0] for wait in longest[:4]] == [1, 2, 4, 8]
    assert longest == sorted(longest)
    assert longest[-1] <= 60
    assert all(0 < dsv.backoff_s(1 + i, None, 0.0) < wait for i, wait in enumerate(longest))
    assert dsv.backoff_s(1, 45.0, 0.5) == dsv.backoff_s(1000, 45.0, 0.5) == 45


def rush(workers: int, hold_s: float, seed: int) -> tuple[int, int, float]:
    """How many of 100 videos a server of 5 requests a second serves and refuses; the seconds.

    The clock is the simulation's; an event is (time, video, when it was asked for or -1).
    """
    pace, dice, taken, refused = dsv.Pace(), random.Random(seed), list[float](), 0
    tries = dict.fromkeys(range(100), 1 + dsv.DEFAULT_RETRIES)
    events = [(0.0, video, -1.0) for video in range(workers)]
    waiting = iter(range(workers, 100))
    while events:
        now, video, asked = heapq.heappop(events)
        if asked < 0:
            delay_s = pace.take_turn(now, dice.random())
            event = (now + delay_s, video, -1.0) if delay_s > 0 else (now + 0.1, video, now)
            heapq.heappush(events, event)
            continue
        if len(taken) < 5 or now - taken[-5] >= 1:
            taken.append(now)
            pace.served(now)
            tries[video] = 0
        else:
            refused += 1
            costs_a_try = not pace.overloaded(now, asked, hold_s)
            tries[video] -= costs_a_try
            failures = 1 + dsv.DEFAULT_RETRIES - tries[video]
            now += dsv.backoff_s(failures, hold_s, dice.random()) if costs_a_try else 0
        if tries[video]:
            heapq.heappush(events, (now, video, -1.0))
        elif (following := next(waiting, None)) is not None:
            heapq.heappush(events, (now, following, -1.0))
    return len(taken), refused, taken[-1]


@pytest.mark.parametrize("hold_s", [dsv.BACKOFF_BASE_S, 1], ids=["unsaid", "1 s"])
@pytest.mark.parametrize("workers", [16, 64])
def test_a_server_that_takes_5_a_second_serves_all_and_refuses_few(
    workers: int, hold_s: float
) -> None:
    for seed in range(10):
        served, refused, seconds = rush(workers, hold_s, seed)
        assert served == 100
        assert refused < 300
        assert seconds < 35


def test_nobody_waits_for_a_server_that_serves_and_all_for_one_that_is_overloaded() -> None:
    pace = dsv.Pace()
    assert [pace.take_turn(0.0, 0.9) for _ in range(64)] == [0.0] * 64
    assert not pace.overloaded(1.0, 0.0, 1.0)  # serves nobody: costs a try
    pace.served(2.0)
    assert pace.overloaded(3.0, 0.0, 7.0)
    delays = [pace.take_turn(3.0, jitter / 10) for jitter in range(10)]
    assert min(delays) >= 7
    assert len(set(delays)) == 10
    assert not pace.overloaded(100.0, 99.0, 1.0)


# --- The console -------------------------------------------------------------------------------

CONSOLE = """\
📁 Using latest results file: runway_polling_results_20250617_040158.json

📋 Processing: runway_polling_results_20250617_040158.json
  ✅ Found 1 SUCCEEDED tasks

  1/1 Task f645e2df...
  🎬 Downloading: test_succeeded_video.mp4
  📥 Streaming download from: https://dnznrvs05pmza.cloudfront.net/0f3b0be2-a946...
  📊 File size: 0.90 MB
  ✅ Downloaded: 0.90 MB
  📄 Metadata saved: test_succeeded_video.json

============================================================
📊 DOWNLOAD STATISTICS
============================================================
✅ Total SUCCEEDED tasks found: 1
📥 Videos downloaded: 1
⚠️ Already existed: 0
❌ Failed downloads: 0
📈 Success rate: 100.0%

📁 Videos in video_outputs:
  • test_succeeded_video.mp4 (0.90 MB)

💾 Total storage used: 0.90 MB
"""


@pytest.fixture
def mocked() -> Iterator[responses.RequestsMock]:
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        yield mock


def test_statistics_count_what_was_found_loaded_there_and_failed_and_other_names_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mocked: responses.RequestsMock
) -> None:
    mocked.get("https://cdn.invalid/8.mp4", status=400)
    mocked.get(re.compile("https://cdn.invalid/"), body=WHOLE)
    lay_out(tmp_path, ALL_OTHERS | {"picture_0.mp4": WHOLE, "picture_0.json": make_task(0)})
    rows = [make_row(0), make_row(7, target_filename_stub="s"), *map(make_row, (2, 3, 4, 5, 8))]
    downloader, name = make_downloader(tmp_path), f"s_{make_task_id(7)[:8]}"
    assert downloader.process_polling_results_file(write_results(tmp_path, rows)) == 6
    downloader.print_final_stats()
    out = capsys.readouterr().out
    block = out.partition("DOWNLOAD STATISTICS\n")[2].split("\n\n")[0].splitlines()
    assert [line.rpartition(": ")[2] for line in block[1:]] == ["7", "5", "1", "1", "85.7%"]
    assert re.search(f"🎬 Downloading: {name}.mp4\n(  .*\n)*  .*s.mp4 is another task's", out)
    assert_whole(tmp_path, name, make_task_id(7), WHOLE)


def test_storage_listing_holds_10_videos_those_of_the_run_first_and_counts_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mocked: responses.RequestsMock
) -> None:
    mocked.get(re.compile("https://cdn.invalid/"), body=WHOLE)
    entries = {"a\x1b.mp4": WHOLE * 500, "dir.mp4": os.mkdir, ".hidden.mp4": WHOLE}
    lay_out(tmp_path, entries | {f"b{i:04}.mp4": WHOLE for i in range(1200)})
    downloader = make_downloader(tmp_path)
    assert downloader.process_succeeded_task(make_row(2, target_filename_stub="z"))
    downloader.print_final_stats()
    listed = capsys.readouterr().out.split(f"📁 Videos in {tmp_path}:\n")[1].splitlines()
    assert listed[:3] == ["  • z.mp4 (0.00 MB)", "  • a?.mp4 (1.19 MB)", "  • b0000.mp4 (0.00 MB)"]
    assert listed[9:] == [
        "  • b0007.mp4 (0.00 MB)",
        "  … and 1,192 more",
        "",
        f"💾 Total storage used: {1701 * SMALL / 1024**2:.2f} MB",
    ]


def test_live_line_is_never_wider_than_the_terminal() -> None:
    parts = ["⏬ 1/2", "3.0 MB", "🔁 動画.mp4: 🎬"]
    assert dsv.fitted(parts, 31) == "⏬ 1/2  3.0 MB  🔁 動画.mp4: 🎬"
    assert dsv.fitted(parts, 30).endswith("動画.mp4:…")
    assert dsv.fitted(parts, 13) == "⏬ 1/2  3.0 …"
    for columns in range(1, 60):
        line = dsv.fitted(parts * 3, columns)
        assert columns - 2 <= columns_of(line) <= columns


# --- From Python -------------------------------------------------------------------------------


def figures(**changes: int) -> dict[str, int]:
    """The statistics of `VideoDownloader`, 0 unless said otherwise."""
    names = ("total_succeeded", "downloaded", "failed_downloads", "already_exists")
    return dict.fromkeys(names, 0) | changes


@pytest.fixture(autouse=True)
def no_api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNWAYML_API_SECRET", raising=False)


def test_orchestrator_gets_the_documented_results(
    tmp_path: Path, cdn: Cdn, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [make_row(i, video_url=cdn.add(f"{i}.mp4", WHOLE)) for i in range(2)]
    rows += [make_row(2, video_url=cdn.add("2.mp4", b"", Reply(status=404)))]
    others = [make_row(9, final_status="FAILED"), make_row(3, video_url=None), None]
    file = write_results(tmp_path, [*rows[:1], *others, *rows[1:]])
    output = tmp_path / "new" / "video_outputs"
    downloader = dsv.VideoDownloader(output_dir=str(output))
    assert output.is_dir()
    assert downloader.find_all_polling_results(directory=str(tmp_path)) == [file]
    results = downloader.load_polling_results(file)
    assert results == json.loads(file.read_text(encoding="utf-8"))
    tasks = downloader.get_succeeded_tasks(results)
    assert tasks == rows
    assert [downloader.process_succeeded_task(task) for task in tasks] == [True, True, False]
    assert downloader.process_succeeded_task(tasks[0]) is True
    counted = figures(total_succeeded=4, downloaded=2, failed_downloads=1, already_exists=1)
    assert list(downloader.stats.items()) == list(counted.items())
    assert downloader.generate_filename_stub(rows[0]) == "picture_0"
    assert downloader.generate_filename_stub({"task_id": "def456789"}) == "video_def45678"
    assert downloader.generate_filename_stub({}) == "video_unknown"
    downloader.print_final_stats()
    assert downloader.load_polling_results(tmp_path / "missing.json") == {}
    out, err = capsys.readouterr()
    assert "✅ Total SUCCEEDED tasks found: 4\n" in out
    assert re.search("❌ 1 video: .*HTTP 404", err)
    assert "missing.json" in err.splitlines()[-1]


def test_with_a_key_a_row_without_link_is_a_task_and_its_link_is_fetched(
    tmp_path: Path, cdn: Cdn, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, downloader = make_row(video_url=None), make_downloader(tmp_path)
    assert downloader.get_succeeded_tasks({"task_results": [row]}) == []
    answer = {"id": row["task_id"], "status": "SUCCEEDED", "output": [cdn.add("0.mp4", WHOLE)]}
    cdn.add(f"v1/tasks/{row['task_id']}", json.dumps(answer).encode())
    monkeypatch.setenv("RUNWAYML_API_SECRET", "key")
    monkeypatch.setenv("RUNWAYML_BASE_URL", cdn.url)
    assert downloader.get_succeeded_tasks({"task_results": [row]}) == [row]
    assert downloader.process_succeeded_task(row) is True
    assert_whole(tmp_path, "picture_0", make_task_id(0), WHOLE)


def test_processing_a_file_answers_how_many_videos_are_on_disk(tmp_path: Path, cdn: Cdn) -> None:
    replies = [(Reply(),), (Reply(status=403), Reply()), (Reply(),)]
    links = [cdn.add(f"{i}.mp4", WHOLE, *reply) for i, reply in enumerate(replies)]
    rows = [make_row(i, video_url=link) for i, link in enumerate(links)]
    file = write_results(tmp_path, [*rows, rows[0]])
    assert make_downloader(tmp_path).process_polling_results_file(file) == 2
    downloader = make_downloader(tmp_path)
    assert downloader.process_polling_results_file(str(file)) == 3
    assert downloader.stats == figures(total_succeeded=3, downloaded=1, already_exists=2)
    assert downloader.process_polling_results_file(tmp_path / "missing.json") == 0


@pytest.mark.parametrize(
    "task",
    [None, 5, [], {}, {"final_status": "SUCCEEDED"}, make_row(0, video_url=5),
     make_row(0, task_id=[], video_url=None)],
    ids=repr,
)  # fmt: skip
def test_useless_task_fails_without_raising(tmp_path: Path, task: Any) -> None:
    downloader = make_downloader(tmp_path)
    assert downloader.process_succeeded_task(task) is False
    assert downloader.stats == figures(total_succeeded=1, failed_downloads=1)
    assert names_in(tmp_path) == set()
    assert downloader.get_succeeded_tasks({"task_results": [task]}) == []
    assert downloader.get_succeeded_tasks(task) == []


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"task_id": "../../\ud800\x1b"}, id="hostile id"),
        pytest.param({"task_id": None, "target_filename_stub": None}, id="no id, no stub"),
        pytest.param({"prompt": 5, "image_path": b"x", "status": [], "timestamp": {}}, id="types"),
        pytest.param({"prompt": "\ud800\0" * 100_000}, id="long prompt"),
        pytest.param({"seed": float("nan"), "duration": float("inf")}, id="no numbers"),
        pytest.param({"theme": nested(5000)}, id="nesting"),
        pytest.param({"seed": 10**6000}, id="huge number"),
        pytest.param({"cluster_id": {(1, 2): b""}, "duration": datetime.min}, id="no JSON"),
    ],
)
def test_hostile_fields_never_cost_the_video(
    tmp_path: Path, cdn: Cdn, changes: dict[str, Any]
) -> None:
    downloader = make_downloader(tmp_path)
    row = make_row(0, video_url=cdn.add("0.mp4", WHOLE), **changes)
    assert downloader.process_succeeded_task(row) is True
    (video,) = tmp_path.glob("*.mp4")
    assert video.read_bytes() == WHOLE
    strict_json(video.with_suffix(".json").read_bytes())
    assert downloader.create_metadata_json(row, video, tmp_path / "again.json") is True
    assert make_downloader(tmp_path).process_succeeded_task(row) is True
    assert len(cdn.requests) == 1


def test_create_metadata_json_writes_what_a_download_writes(tmp_path: Path, cdn: Cdn) -> None:
    row, downloader = make_row(video_url=cdn.add("0.mp4", WHOLE)), make_downloader(tmp_path)
    assert downloader.process_succeeded_task(row)
    video, metadata = tmp_path / "picture_0.mp4", tmp_path / "b.json"
    assert downloader.create_metadata_json(row, str(video), str(metadata)) is True
    one, other = (strict_json(path.read_bytes()) for path in (video.with_suffix(".json"), metadata))
    assert one | {"download_timestamp": ""} == other | {"download_timestamp": ""}
    assert list(one) == list(other)


@pytest.mark.parametrize(
    ("task", "video", "metadata"),
    [({}, "missing.mp4", "b.json"), ({}, ".", "b.json"), ({}, "a\0.mp4", "b.json"),
     ({}, "a.mp4", "missing/b.json"), (None, "a.mp4", "a.mp4")],
    ids=["no video", "a directory", "an impossible name", "no directory", "another's file"],
)  # fmt: skip
def test_create_metadata_json_answers_false_when_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: Any, video: str, metadata: str
) -> None:
    (tmp_path / "a.mp4").write_bytes(WHOLE)
    downloader = make_downloader(tmp_path)
    done = downloader.create_metadata_json(task, tmp_path / video, tmp_path / metadata)
    assert done is False
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert names_in(tmp_path) == {"a.mp4"}


def test_on_outcome_is_called_once_per_task_in_the_calling_thread(tmp_path: Path, cdn: Cdn) -> None:
    rows = [make_row(i, video_url=cdn.add(f"{i}.mp4", WHOLE)) for i in range(6)]
    rows[4]["video_url"] = cdn.add("gone.mp4", b"", Reply(status=404))
    there = {"picture_0.mp4": WHOLE, "picture_0.json": make_task(0)}
    lay_out(tmp_path, there | {"picture_5.mp4": WHOLE})  # the last one is to be adopted
    seen: list[tuple[int, Any]] = []
    downloader = make_downloader(
        tmp_path, on_outcome=lambda outcome: seen.append((threading.get_ident(), outcome))
    )
    downloader.process_polling_results_file(write_results(tmp_path, rows))
    assert {thread for thread, _ in seen} == {threading.get_ident()}
    outcomes = {outcome.task_id: outcome for _, outcome in seen}
    assert len(seen) == len(outcomes) == 6
    statuses = [outcomes[make_task_id(i)].status.value for i in range(6)]
    assert statuses == ["exists", *["downloaded"] * 3, "failed", "exists"]
    one = outcomes[make_task_id(1)]
    assert (one.path, one.size_bytes, one.error) == (tmp_path / "picture_1.mp4", SMALL, "")
    assert "404" in outcomes[make_task_id(4)].error
    assert "secret" not in repr(seen)


def test_a_callback_that_raises_leaves_no_thread_behind(
    tmp_path: Path, mocked: responses.RequestsMock
) -> None:
    mocked.get(re.compile("https://cdn.invalid/"), body=WHOLE)
    before = set(threading.enumerate())

    def refuse(_outcome: dsv.Outcome) -> None:
        raise KeyError("mine")

    file = write_results(tmp_path, map(make_row, range(20)))
    with pytest.raises(KeyError, match="mine"):
        make_downloader(tmp_path, on_outcome=refuse).process_polling_results_file(file)
    wait_until(lambda: before.issuperset(threading.enumerate()))
    assert make_downloader(tmp_path).process_polling_results_file(file) == 20


def test_callers_may_patch_requests_and_replace_the_console(
    tmp_path: Path, cdn: Cdn, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = mock.Mock(spec=["write"])
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", mock.Mock(spec=["write"]))
    row = make_row(video_url=cdn.add("0.mp4", WHOLE))
    with mock.patch("download_succeeded_videos.requests.get"):
        assert make_downloader(tmp_path).process_succeeded_task(row)
    assert "✅ Downloaded: 0.00 MB" in str(out.write.mock_calls)


def test_threads_on_one_downloader_give_each_task_its_own_name(tmp_path: Path, cdn: Cdn) -> None:
    bodies = [make_mp4(i, SMALL) for i in range(12)]
    rows = [
        make_row(i, target_filename_stub="sSß"[: 1 + i % 2], video_url=cdn.add(f"{i}.mp4", body))
        for i, body in enumerate(bodies)
    ]
    outcomes: list[Any] = []
    downloader = make_downloader(tmp_path, on_outcome=outcomes.append)
    with ThreadPoolExecutor(24) as pool:
        assert all(pool.map(downloader.process_succeeded_task, [*rows, *rows]))
    assert downloader.stats == figures(total_succeeded=24, downloaded=12, already_exists=12)
    assert Counter(each.task_id for each in outcomes) == {row["task_id"]: 2 for row in rows}
    names = owners(tmp_path)
    for i, body in enumerate(bodies):
        assert_whole(tmp_path, names[make_task_id(i)], make_task_id(i), body)
    assert len(names_in(tmp_path)) == 24
    assert len(cdn.requests) == 12


# --- Nothing that was paid for is lost ---------------------------------------------------------

VIDEO_BYTES = 60_000
HALF = VIDEO_BYTES // 2
BIG = 900_000  # as real ones are: a small video says little about what is buffered
SECRETS = re.compile(r"_jwt|eyJ|secret", re.IGNORECASE)  # what queries and the API key hold
API_KEY = "key_secret_0123456789abcdef"


def download(
    directory: Path, rows: Iterable[Any], *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A run of the real script for ``rows``; whatever it does, it tells no secret."""
    write_results(directory, rows)
    result = run_script(directory, *arguments, env=env)
    assert not SECRETS.search((result.stdout + result.stderr).replace("RUNWAYML_API_SECRET", ""))
    return result


def hidden_in(directory: Path) -> set[str]:
    return {path.name for path in directory.glob(".*")}


def parts_in(directory: Path) -> dict[Path, bytes]:
    """The hidden files that hold the beginning of an MP4, and what they hold."""
    parts = {}
    for path in (directory / name for name in hidden_in(directory)):
        with contextlib.suppress(OSError):  # gone meanwhile, or a directory
            parts[path] = path.read_bytes()
    return {path: data for path, data in parts.items() if data[4:8] == b"ftyp"}


# One table of replies. Each row: the replies in turn (the last one stays), then how often the
# video is asked for with --retries 2, then why it fails, as a pattern; "" when it comes whole.


def make_reply_table(video: bytes) -> dict[str, tuple[Sequence[Reply], int, str]]:
    gzipped = gzip.compress(video)
    half = len(video) // 2

    def encoded(body: bytes, **how: Any) -> Reply:
        return Reply(body=body, headers={"Content-Encoding": "gzip"}, **how)

    def status(code: int, retry_after: str | None = None) -> Reply:
        return Reply(status=code, body=b"no", headers={"Retry-After": retry_after})

    def redirect(target: str) -> Reply:
        return Reply(status=302, body=b"", headers={"Location": target})

    good = Reply()
    return {
        "good": ([good], 1, ""),
        "cut": ([Reply(send=half), good], 2, ""),
        "cut-between-boxes": ([Reply(send=len(video) - 8, headers={"ETag": None}), good], 2, ""),
        "cut-again-and-again": ([Reply(send=len(video) // 5 + 1)], 5, ""),
        "reset": ([Reply(send=half, ending="reset"), good], 2, ""),
        **{f"{code}-then-good": ([status(code), good], 2, "") for code in (408, 425, 429, 500)},
        "redirected": ([redirect("/good/it.mp4?_jwt=secret")], 1, ""),
        "always-500": ([status(500)], 3, "HTTP 500"),
        "503-retry-after": ([status(503, "1"), good], 2, ""),
        "503-retry-after-too-long": ([status(503, "300"), good], 1, "503.* 300 s"),
        **{str(code): ([status(code), good], 1, f"HTTP {code}") for code in
           (400, 401, 402, 403, 404, 405, 410, 416, 451)},
        **{f"no-video-{name}": ([Reply(body=body)], 1, reason) for name, (body, reason) in {
            "page": (b"\n <!DOCTYPE html><p>Sorry", "text"),
            "error": (b"\xef\xbb\xbf<?xml version='1.0'?><Error/>", "text"),
            "json": (b'{"message": "denied"}', "text"),
            "playlist": (b"#EXTM3U\n#EXT-X-VERSION:3\n" + b"0.ts\n" * 99, "text"),
            "words": (b"Access denied", "text"),
            "one-byte": (b"x", "text"),
            "zeros": (bytes(VIDEO_BYTES), "zero bytes"),
        }.items()},
        "empty": ([Reply(body=b"")], 1, "empty"),
        "chunked": ([Reply(framing="chunked")], 1, ""),
        "chunked-and-cut": ([Reply(framing="chunked", send=half), good], 2, ""),
        "until-close": ([Reply(framing="close")], 1, ""),
        "until-close-and-cut": ([Reply(framing="close", send=half), good], 2, ""),
        "until-close-always-cut": ([Reply(framing="close", send=half)], 3, "cut short"),
        "whole-by-length-but-cut": ([Reply(body=video[:half]), good], 2, ""),
        "gzip": ([encoded(gzipped)], 1, ""),
        "gzip-and-cut": ([encoded(gzipped, send=half), good], 2, ""),
        "length-too-short": ([Reply(headers={"Content-Length": str(half)}), good], 2, ""),
        "part-not-asked-for": (
            [Reply(status=206, headers={"Content-Range": f"bytes 9-{half}/{len(video)}"}), good],
            2, ""),
    }  # fmt: skip


@dataclass
class TableRun:
    """What one run of the script made of a table, a row a task."""

    cdn: Cdn
    output_dir: Path
    exit_code: int
    videos: Mapping[str, Any]  # by task_id, as --json gives them
    console: str


def run_table(
    cdn: Cdn, directory: Path, rows: Iterable[Any], *arguments: str, **how: Any
) -> TableRun:
    result = download(directory, rows, "--json", "--workers", "64", *arguments, **how)
    videos = {video["task_id"]: video for video in json.loads(result.stdout)["videos"]}
    output_dir = directory / "video_outputs"
    return TableRun(cdn, output_dir, result.returncode, videos, result.stderr)


def ends(run: TableRun, number: int, body: bytes, reason: str = "") -> None:
    """The video of that number is whole, or failed for ``reason``, a pattern."""
    video, name = run.videos[make_task_id(number)], f"picture_{number}"
    if not reason:
        assert video["error"] is None
        assert_whole(run.output_dir, name, make_task_id(number), body)
        return
    assert video["status"] == "failed"
    assert re.search(reason, video["error"])
    assert not names_in(run.output_dir) & {f"{name}.mp4", f"{name}.json"}


REPLY_TABLE = make_reply_table(make_mp4("table", VIDEO_BYTES))

# What is whole and no error page is kept. Each row: the answer, and the warning, as a pattern.

KEPT_TABLE: dict[str, tuple[Reply, str]] = {
    "mp4-as-text": (Reply(body=make_mp4(1), headers={"Content-Type": "text/plain"}), ""),
    "mp4-and-four-zero-bytes": (Reply(body=make_mp4(3) + bytes(4)), "behind it"),
    "webm": (Reply(body=b"\x1aE\xdf\xa3\x9fB\x86\x81\x01" * 99), "no MP4"),
    "gif-chunked": (Reply(body=b"GIF89a\x40\0\x40\0" * 99, framing="chunked"), "no MP4"),
}


@pytest.fixture(scope="module")
def reply_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TableRun]:
    """Both tables at once. What asks to hold back does so under another name of the host."""
    video = make_mp4("table", VIDEO_BYTES)
    replies = {name: row[0] for name, row in REPLY_TABLE.items()}
    replies |= {name: [reply] for name, (reply, _) in KEPT_TABLE.items()}
    rows = []
    with Cdn() as cdn:
        for number, (name, each) in enumerate(replies.items()):
            link = cdn.add(f"{name}/it.mp4", video, *each)
            if "429" in name or "503" in name:
                link = link.replace("127.0.0.1", "localhost")
            rows.append(make_row(number, video_url=link))
        yield run_table(cdn, tmp_path_factory.mktemp("replies"), rows, "--retries", "2")


@pytest.mark.parametrize("name", REPLY_TABLE)
def test_a_reply_is_retried_if_that_may_help_and_ends_whole_or_failed(
    reply_run: TableRun, name: str
) -> None:
    _, requests, reason = REPLY_TABLE[name]
    number = list(REPLY_TABLE).index(name)
    ends(reply_run, number, make_mp4("table", VIDEO_BYTES), reason)
    asked = len(reply_run.cdn.asked(f"{name}/it.mp4"))
    assert asked == requests + (name == "good")  # a redirect leads there


@pytest.mark.parametrize("name", KEPT_TABLE)
def test_what_came_whole_is_kept_whatever_its_type_with_a_warning_if_it_is_no_mp4(
    reply_run: TableRun, name: str
) -> None:
    reply, warning = KEPT_TABLE[name]
    number = len(REPLY_TABLE) + list(KEPT_TABLE).index(name)
    ends(reply_run, number, reply.body or b"")
    said = reply_run.videos[make_task_id(number)]["warning"]
    assert re.search(warning, said) if warning else said is None
    assert len(reply_run.cdn.asked(f"{name}/it.mp4")) == 1


def test_nothing_is_left_of_what_failed_and_each_failure_is_said(reply_run: TableRun) -> None:
    reasons = [reason for *_, reason in REPLY_TABLE.values()] + [""] * len(KEPT_TABLE)
    whole = {f"picture_{number}" for number, reason in enumerate(reasons) if not reason}
    left = names_in(reply_run.output_dir)
    assert left == {f"{stub}{suffix}" for stub in whole for suffix in (".mp4", ".json")}
    assert reply_run.exit_code == 3
    assert f"Failed downloads: {len(reasons) - len(whole)}\n" in reply_run.console


def test_retry_after_is_honoured(reply_run: TableRun) -> None:
    first, second = reply_run.cdn.asked("503-retry-after/it.mp4")
    assert second.at - first.at >= 1


# Resuming. Each row: the replies after one that was cut half way, from which byte on each was
# asked for (None: all of it), and whether the object was another one by then.

OBJECT, OTHER = make_mp4("object", VIDEO_BYTES), make_mp4("other", VIDEO_BYTES)
ONLY_DATED = {"ETag": None, "Last-Modified": "Tue, 17 Jun 2025 04:00:00 GMT"}
WEAK = {"ETag": 'W/"object"'}
CUT = Reply(send=HALF)
END = VIDEO_BYTES - 1


def sent_from(first: int) -> Reply:
    """A 206 from ``first`` on, whatever was asked for."""
    headers = {"Content-Range": f"bytes {first}-{END}/{VIDEO_BYTES}", "ETag": make_etag(OBJECT)}
    return Reply(status=206, body=OBJECT[first:], headers=headers)


RESUME_TABLE: dict[str, tuple[Sequence[Reply], Sequence[int | None], bytes]] = {
    "the-same-object": ([CUT, Reply()], [None, HALF], OBJECT),
    "after-a-503": ([CUT, Reply(status=503), Reply()], [None, HALF, HALF], OBJECT),
    "chunked": ([CUT, Reply(framing="chunked")], [None, HALF], OBJECT),
    "another-object": ([CUT, Reply(body=OTHER)], [None, HALF], OTHER),
    "another-object-if-range-ignored": (
        [CUT, Reply(body=OTHER, if_range=False)], [None, HALF, None], OTHER),
    "another-object-of-the-same-etag": (
        [CUT, Reply(body=OTHER + make_mp4(1), headers={"ETag": make_etag(OBJECT)})],
        [None, HALF, None], OTHER + make_mp4(1)),
    "another-shorter-object": (  # 416
        [CUT, Reply(body=make_mp4(1, HALF), if_range=False)], [None, HALF, None],
        make_mp4(1, HALF)),
    "range-ignored": ([CUT, Reply(ranges=False)], [None, HALF], OBJECT),
    "206-too-late": ([CUT, sent_from(HALF + 1), Reply()], [None, HALF, None], OBJECT),
    "206-of-everything": ([CUT, sent_from(0), Reply()], [None, HALF, None], OBJECT),
    "206-gzipped": ([CUT, Reply(headers={"Content-Encoding": "gzip"}), Reply()],
                    [None, HALF, None], OBJECT),
    "last-modified": ([Reply(send=HALF, headers=ONLY_DATED), Reply(headers=ONLY_DATED)],
                      [None, HALF], OBJECT),
    "weak-etag": ([Reply(send=HALF, headers=WEAK), Reply(body=OTHER, headers=WEAK)],
                  [None, None], OTHER),
    "no-validator": ([Reply(send=HALF, headers={"ETag": None}), Reply(body=OTHER)],
                     [None, None], OTHER),
    "no-length": ([Reply(send=HALF, framing="chunked"), Reply(body=OTHER)], [None, None], OTHER),
}  # fmt: skip


@pytest.fixture(scope="module", params=["in-one-run", "in-a-later-run"])
def resume_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TableRun]:
    """All rows at once; the later run has links with a fresh signature."""
    directory = tmp_path_factory.mktemp("resume")
    with Cdn() as cdn:
        rows = [
            make_row(number, video_url=cdn.add(f"{name}.mp4", OBJECT, *replies))
            for number, (name, (replies, _, _)) in enumerate(RESUME_TABLE.items())
        ]
        if request.param == "in-a-later-run":
            run_table(cdn, directory, rows, "--retries", "0")
            assert len(cdn.requests) == len(rows)
            rows = [row | {"video_url": row["video_url"] + ".fresh"} for row in rows]
        yield run_table(cdn, directory, rows, "--retries", "2")
        assert len(names_in(directory / "video_outputs")) == 2 * len(rows)  # no part is left


@pytest.mark.parametrize("name", RESUME_TABLE)
def test_a_cut_video_is_resumed_if_it_is_the_same_and_never_stitched(
    resume_run: TableRun, name: str
) -> None:
    _, starts, body = RESUME_TABLE[name]
    ends(resume_run, list(RESUME_TABLE).index(name), body)
    asked = resume_run.cdn.asked(f"{name}.mp4")
    assert [request.range_start for request in asked] == starts
    assert [bool(request.headers.get("If-Range")) for request in asked] == [*map(bool, starts)]
    assert {request.headers["Accept-Encoding"] for request in asked} == {"identity"}


def test_a_part_that_cannot_be_resumed_is_removed_at_once(cdn: Cdn, tmp_path: Path) -> None:
    kinds = (Reply(send=HALF, headers=WEAK), Reply(send=HALF, headers={"ETag": None}))
    links = [cdn.add(f"{i}.mp4", OBJECT, cut, Reply(wait_s=60)) for i, cut in enumerate(kinds)]
    write_results(tmp_path, [make_row(i, video_url=link) for i, link in enumerate(links)])
    process = start_script(tmp_path)
    wait_until(lambda: len(cdn.requests) == 4)
    left = parts_in(tmp_path / "video_outputs")
    cdn.released.set()
    assert finish(process).returncode == 0
    assert left == {}


# Stalls. Each row: the replies, how the video ends, and from which byte on it was asked for.
# (30,720: older urllib3 hands on full steps alone.)

STALL_TABLE: dict[str, tuple[Sequence[Reply], str, Sequence[int | None]]] = {
    "silent-before-the-head": ([Reply(wait_s=60), Reply()], "", [None, None]),
    "silent-half-way": ([Reply(send=30_720, ending="hang"), Reply()], "", [None, 30_720]),
    "always-silent": ([Reply(wait_s=60)], "stalled", [None, None]),
    "slow-but-above-the-limit": ([Reply(bytes_per_second=40_000)], "", [None]),
}


@contextlib.contextmanager
def deaf_port() -> Iterator[str]:
    """A port that lets nobody in, as its queue is full; its address."""
    with contextlib.ExitStack() as sockets:
        server = sockets.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(3):
            client = sockets.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="module")
def stall_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TableRun]:
    with Cdn() as cdn, deaf_port() as deaf:
        links = [cdn.add(f"{name}.mp4", OBJECT, *row[0]) for name, row in STALL_TABLE.items()]
        trickle = cdn.add("trickle.mp4", OBJECT, Reply(bytes_per_second=400), Reply())
        links += [trickle, f"{deaf}/0.mp4?_jwt=secret"]
        rows = [make_row(number, video_url=link) for number, link in enumerate(links)]
        directory = tmp_path_factory.mktemp("stalls")
        yield run_table(cdn, directory, rows, "--timeout", "0.5", "--retries", "1")


@pytest.mark.parametrize("name", STALL_TABLE)
def test_a_silent_server_is_a_stall(stall_run: TableRun, name: str) -> None:
    _, reason, starts = STALL_TABLE[name]
    ends(stall_run, list(STALL_TABLE).index(name), OBJECT, reason)
    assert [request.range_start for request in stall_run.cdn.asked(f"{name}.mp4")] == starts


def test_a_trickle_is_a_stall_and_what_came_is_kept(stall_run: TableRun) -> None:
    ends(stall_run, len(STALL_TABLE), OBJECT)
    first, second = stall_run.cdn.asked("trickle.mp4")
    assert first.range_start is None
    assert 0 < (second.range_start or 0) < HALF
    assert second.at - first.at < 2 * 0.5 + 1  # twice the timeout, and a back-off
    ends(stall_run, len(STALL_TABLE) + 1, b"", "stalled|no connection within 0.5 s")


# Links that die, and the Runway API. Each row: its replies in turn, how often it is asked with
# --retries 1, and why the task fails, if it does.

EXPIRED = 1_750_000_000  # 2025-06-15 15:06:40 UTC


def make_api_table(fresh: str) -> dict[str, tuple[Sequence[Reply], int, str]]:
    def answer(body: object, status: int = 200, **headers: str) -> Reply:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return Reply(status, json.dumps(body).encode(), names)

    def task(**fields: Any) -> Reply:
        return answer({"id": "x", "status": "SUCCEEDED", "output": [fresh]} | fields)

    good = task()
    endless = b" " * 2_000_000 + (good.body or b"")
    return {
        "fresh-link": ([good], 1, ""),
        "fresh-link-after-a-cut": ([good], 1, ""),
        "no-link-in-the-row": ([good], 1, ""),
        "fresh-link-refused-too": ([good], 1, "fresh link was refused"),
        "429-then-good": ([answer({}, 429), good], 2, ""),
        "429-retry-after-too-long": ([answer({}, 429, Retry_After="300")], 1, "429.*300 s"),
        "always-500": ([answer({}, 500)], 2, "API.*500"),
        "403": ([answer({}, 403)], 1, "API.*403"),
        "redirect": ([answer({}, 302, Location=fresh)], 1, "API.*302"),
        "404": ([answer({}, 404)], 1, "API.*404"),
        "no-output": ([task(output=[])], 1, "API.*no (output|video)"),
        "failed-by-now": ([task(status="FAILED", output=None)], 1, "API.*FAILED"),
        "without-end": ([Reply(body=endless, send=2_000_000, ending="hang")], 2, "API.*not all"),
        "not-json": ([Reply(body=b"<html>")], 2, "API.*not JSON"),
    }


@dataclass
class ApiRun(TableRun):
    api: Cdn


@pytest.fixture(scope="module")
def api_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiRun]:
    directory = tmp_path_factory.mktemp("api")
    refused = Reply(status=403)
    before = {"fresh-link-after-a-cut": [CUT, refused]}
    after = {"fresh-link-refused-too": [refused]}
    rows = []
    with Cdn() as cdn, Cdn() as api:
        for number, name in enumerate(make_api_table("")):
            fresh = cdn.add(f"{name}/fresh.mp4", OBJECT, *after.get(name, []))
            api.add(f"v1/tasks/{make_task_id(number)}", b"", *make_api_table(fresh)[name][0])
            link = cdn.add(f"{name}/dead.mp4", OBJECT, *before.get(name, [refused])).split("?")[0]
            dead = None if name == "no-link-in-the-row" else make_jwt_link(link, EXPIRED)
            rows.append(make_row(number, video_url=dead))
        env = {"RUNWAYML_API_SECRET": API_KEY, "RUNWAYML_BASE_URL": api.url + "/"}
        run = run_table(cdn, directory, rows, "--retries", "1", env=env)
        yield ApiRun(**vars(run), api=api)


@pytest.mark.parametrize("name", make_api_table(""))
def test_a_dead_link_is_renewed_by_the_api_or_said_to_be_dead(api_run: ApiRun, name: str) -> None:
    _, calls, reason = make_api_table("")[name]
    number = list(make_api_table("")).index(name)
    ends(api_run, number, OBJECT, reason)
    asked = api_run.api.asked(f"v1/tasks/{make_task_id(number)}")
    assert len(asked) == calls
    for request in asked:
        assert request.headers["Authorization"] == f"Bearer {API_KEY}"
        assert request.headers["X-Runway-Version"] == "2024-11-06"
    fresh = api_run.cdn.asked(f"{name}/fresh.mp4")
    part = HALF if name == "fresh-link-after-a-cut" else None
    refused_too = name == "fresh-link-refused-too"
    assert [each.range_start for each in fresh] == ([] if reason and not refused_too else [part])


def test_the_api_key_is_seen_by_no_other_host_and_kept_nowhere(api_run: ApiRun) -> None:
    seen = [f"{request.path} {request.headers}" for request in api_run.cdn.requests]
    assert seen
    assert not [text for text in seen if API_KEY in text or "authorization" in text.lower()]
    for path in api_run.output_dir.iterdir():
        assert API_KEY.encode() not in path.read_bytes()


def test_without_a_key_a_dead_link_is_said_with_its_expiry_and_what_helps(
    cdn: Cdn, tmp_path: Path
) -> None:
    dead = [cdn.add(f"{code}.mp4", b"", Reply(status=code)) for code in (401, 403, 404, 410)]
    links: list[str | None] = [make_jwt_link(link.split("?")[0], EXPIRED) for link in dead]
    links += [dead[0].replace("_jwt=", "_jwt=a.!."), None]
    run = run_table(cdn, tmp_path, [make_row(i, video_url=link) for i, link in enumerate(links)])
    assert run.exit_code == 3
    for number, said in enumerate([*["2025-06-15 15:06:40 UTC.*"] * 4, "", "video_url.*"]):
        ends(run, number, b"", f"{said}RUNWAYML_API_SECRET")
    assert len(cdn.requests) == 5


def test_the_link_that_dies_soonest_is_asked_for_first(cdn: Cdn, tmp_path: Path) -> None:
    expiries = (4_000_000_300, EXPIRED, 4_000_000_100, 4_000_000_200.5)
    links = [cdn.add(f"{number}.mp4", OBJECT) for number in range(5)]
    for number, expiry in enumerate(expiries):
        links[number] = make_jwt_link(links[number].split("?")[0], expiry)
    rows = [make_row(i, video_url=link) for i, link in enumerate(links)]
    download(tmp_path, rows, "--workers", "1")
    assert [request.path for request in cdn.requests] == [f"/{i}.mp4" for i in (1, 2, 3, 0, 4)]


# Runs that end before their time: killed at a step, killed anywhere, stopped by a signal.


SABOTAGE = """
import errno, os, signal, ssl, threading
count = 0
def spied(call):
    def instead(*arguments, **options):
        global count
        count += 1
        if {condition}: {act}
        return call(*arguments, **options)
    return instead
for owner, name in ({places},):
    setattr(owner, name, spied(getattr(owner, name)))
"""


def sabotage(directory: Path, condition: str, act: str, *places: str) -> dict[str, str]:
    """The environment of a script whose calls of ``places`` do ``act`` first."""
    directory.mkdir()
    calls = [re.sub(r"(.*)\.(.*)", r"(\1, '\2')", place) for place in places]
    code = SABOTAGE.format(condition=condition, act=act, places=", ".join(calls))
    (directory / "sitecustomize.py").write_text(code, encoding="utf-8")
    inherited = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(directory), inherited)))}


STEPS = ("os.fsync", "os.link", "os.rename", "os.replace", "os.unlink")


def test_a_kill_before_any_step_of_a_download_costs_nothing(cdn: Cdn, tmp_path: Path) -> None:
    def is_killed_at(step: int) -> bool:
        name, directory = f"picture_{step}", tmp_path / str(step)
        directory.mkdir()
        output_dir = directory / "video_outputs"
        rows = [make_row(step, video_url=cdn.add(f"{step}.mp4", OBJECT))]
        kill = "os.kill(os.getpid(), signal.SIGKILL)"
        env = sabotage(directory / "s", f"count == {step}", kill, *STEPS)
        killed = download(directory, rows, env=env)
        is_there = OBJECT in parts_in(output_dir).values()
        if f"{name}.mp4" in names_in(output_dir):
            assert_whole(output_dir, name, make_task_id(step), OBJECT)
            is_there = True
        assert download(directory, rows).returncode == 0
        assert_whole(output_dir, name, make_task_id(step), OBJECT)
        assert names_in(output_dir) == {f"{name}.mp4", f"{name}.json"}
        assert len(cdn.asked(f"{step}.mp4")) <= (1 if is_there else 2)
        assert killed.returncode in (0, -signal.SIGKILL)
        return killed.returncode != 0

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(is_killed_at, range(2, 10))).count(True) >= 4


def test_kills_at_random_moments_cost_nothing(tmp_path: Path) -> None:
    def kill_6_times(number: int) -> None:
        bodies = [make_mp4(f"{number} {i}", BIG) for i in range(16)]
        directory, rng = tmp_path / str(number), random.Random(number)
        output_dir = directory / "video_outputs"
        directory.mkdir()
        for reply in [Reply(bytes_per_second=4_000_000)] * 6 + [Reply()]:
            with Cdn() as cdn:
                links = [cdn.add(f"{i}.mp4", body, reply) for i, body in enumerate(bodies)]
                rows = [make_row(i, video_url=link) for i, link in enumerate(links)]
                write_results(directory, rows)
                left = parts_in(output_dir).values()
                enough = bytes_in(output_dir) + rng.choice([0, BIG // 2, 2 * BIG])
                process = start_script(directory, "--workers", "4")
                if reply != Reply():
                    wait_until(lambda: cdn.requests and bytes_in(output_dir) >= enough)  # noqa: B023
                    process.kill()
                assert finish(process).returncode == (0 if reply == Reply() else -signal.SIGKILL)
                starts = {request.range_start for request in cdn.requests} - {None}
                assert starts <= {len(data) for data in left}
            assert all(any(x.startswith(y) for x in bodies) for y in parts_in(output_dir).values())
            there = [i for i in range(16) if (output_dir / f"picture_{i}.mp4").exists()]
            for i in there:
                assert_whole(output_dir, f"picture_{i}", make_task_id(i), bodies[i])
        assert len(names_in(output_dir)) == 2 * len(there) == 32

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(kill_6_times, range(2)))


def bytes_in(directory: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return sum(path.stat().st_size for path in directory.glob("*"))
    return 0


# Several runs at once.


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Wait until ``process`` has said ``text``."""
    assert process.stdout
    watchdog = threading.Timer(30, process.kill)
    watchdog.start()
    assert any(text in line for line in iter(process.stdout.readline, ""))
    watchdog.cancel()


def statistic(result: subprocess.CompletedProcess[str], name: str) -> int:
    match = re.search(rf"{name}: ([0-9]+)\n", result.stdout)
    assert match
    return int(match[1])


def add_videos(cdn: Cdn, count: int, *replies: Reply, size: int = VIDEO_BYTES) -> list[Any]:
    links = [cdn.add(f"{i}.mp4", make_mp4(i, size), *replies) for i in range(count)]
    return [make_row(i, video_url=link) for i, link in enumerate(links)]


def assert_home(output_dir: Path, count: int, size: int = VIDEO_BYTES) -> None:
    """The videos of `add_videos` are there, and nothing else is."""
    for number in range(count):
        body = make_mp4(number, size)
        assert_whole(output_dir, f"picture_{number}", make_task_id(number), body)
    assert len(names_in(output_dir)) == 2 * count


def test_four_runs_on_one_directory_share_the_work(cdn: Cdn, tmp_path: Path) -> None:
    write_results(tmp_path, add_videos(cdn, 50, Reply(wait_s=60)))
    processes = [start_script(tmp_path, "--workers", "2") for _ in range(4)]
    wait_until(lambda: len(cdn.requests) == 8)  # all of them are at work
    cdn.released.set()
    results = [finish(process) for process in processes]
    assert [result.returncode for result in results] == [0] * 4
    shares = [statistic(result, "Videos downloaded") for result in results]
    assert min(shares) >= 2
    assert sum(shares) == 50
    assert Counter(request.path for request in cdn.requests).most_common(1)[0][1] == 1
    assert_home(tmp_path / "video_outputs", 50)


@pytest.mark.parametrize("end", ["thaws", "is-killed"])
def test_a_frozen_run_holds_up_what_it_has_in_hand_and_nothing_else(
    cdn: Cdn, tmp_path: Path, end: str
) -> None:
    write_results(tmp_path, add_videos(cdn, 6, size=BIG))
    cdn.replies["/0.mp4"] = [Reply(pause_at=BIG // 2), Reply()]
    output_dir = tmp_path / "video_outputs"
    frozen = start_script(tmp_path, "--workers", "1")
    wait_until(lambda: bytes_in(output_dir) > BIG // 3)
    frozen.send_signal(signal.SIGSTOP)
    other = start_script(tmp_path)
    read_until(other, "Waiting for 1 video that another run has in hand")
    visible = names_in(output_dir) - hidden_in(output_dir)
    frozen.send_signal(signal.SIGCONT if end == "thaws" else signal.SIGKILL)
    cdn.released.set()
    results = [finish(other), finish(frozen)]
    assert len(visible) == 10
    assert [result.returncode for result in results] == [0, 0 if end == "thaws" else -9]
    resumed = [bool(request.range_start) for request in cdn.asked("0.mp4")]
    assert resumed == ([False] if end == "thaws" else [False, True])
    assert_home(output_dir, 6, BIG)


@pytest.mark.parametrize("call", ["__import__('fcntl').flock", "os.link"])
def test_where_the_file_system_lacks_something_two_runs_still_write_no_wrong_file(
    cdn: Cdn, tmp_path: Path, call: str
) -> None:
    env = sabotage(tmp_path / "s", "True", "raise OSError(errno.ENOLCK, 'no')", call)
    replies = Reply(wait_s=60), Reply(bytes_per_second=9_000_000)
    write_results(tmp_path, add_videos(cdn, 8, *replies, size=BIG))
    processes = [start_script(tmp_path, "--workers", "4", env=env) for _ in range(2)]
    wait_until(lambda: len(cdn.requests) >= 8)
    cdn.released.set()
    assert {finish(process).returncode for process in processes} <= {0, 3}
    assert run_script(tmp_path).returncode == 0
    for number in range(8):
        videos = list((tmp_path / "video_outputs").glob(f"picture_{number}*.mp4"))
        assert {video.read_bytes() for video in videos} == {make_mp4(number, BIG)}
        assert any(video.with_suffix(".json").exists() for video in videos)


# What others do to a name while its video downloads. Each row: what, given the hidden file and
# the path of the video, and under which name it ends; "there": as what has arrived.

FOREIGN = make_mp4("foreign", 70_000)


def own_metadata(video: Path) -> bytes:
    return make_metadata(make_task(int(video.stem.removeprefix("picture_"))), video.name)


MEDDLING: dict[str, tuple[Callable[[Path, Path, Path], object], str]] = {
    "hidden-removed": (lambda hidden, *_: hidden.unlink(), "wanted"),
    "hidden-cut": (lambda hidden, *_: os.truncate(hidden, 1000), "wanted"),
    "hidden-grown": (lambda hidden, *_: os.truncate(hidden, BIG), "wanted"),
    "hidden-replaced": (
        lambda hidden, *_: (hidden.unlink(), hidden.write_bytes(FOREIGN)), "wanted"),
    "same-video-and-metadata": (
        lambda _, video, meta: (meta.write_bytes(own_metadata(video)), video.write_bytes(FOREIGN)),
        "there"),
    "video-beside-its-metadata": (lambda _, video, __: video.write_bytes(FOREIGN), "there"),
    "own-metadata": (lambda _, video, meta: meta.write_bytes(own_metadata(video)), "wanted"),
    "foreign-video": (lambda _, video, __: video.write_bytes(FOREIGN), "with-id"),
    "foreign-metadata": (
        lambda _, __, meta: meta.write_bytes(make_metadata(make_task(99))), "with-id"),
    "other-programs-json": (lambda _, __, metadata: metadata.write_bytes(b"[]"), "with-id"),
    "directory": (lambda _, video, __: video.mkdir(), "with-id"),
    "directory-as-json": (lambda _, __, metadata: metadata.mkdir(), "with-id"),
    "dead-symbolic-link": (lambda _, video, __: video.symlink_to("nowhere"), "with-id"),
    "empty-file": (lambda _, video, __: video.touch(), "wanted"),
}  # fmt: skip


@dataclass
class MeddledRun(TableRun):
    arrived: Mapping[str, bytes]  # by name, the files that others had put when all went on


@pytest.fixture(scope="module")
def meddled_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeddledRun]:
    directory = tmp_path_factory.mktemp("meddled")
    output_dir = directory / "video_outputs"
    output_dir.mkdir()
    with Cdn() as cdn:
        rows = add_videos(cdn, len(MEDDLING), Reply(pause_at=BIG // 2), Reply(), size=BIG)
        write_results(directory, rows)
        video = output_dir / f"picture_{list(MEDDLING).index('video-beside-its-metadata')}.mp4"
        video.with_suffix(".json").write_bytes(own_metadata(video))
        process = start_script(directory, "--json")
        least = BIG // 3  # older urllib3 hands on what fills its buffer
        wait_until(lambda: sum(len(x) > least for x in parts_in(output_dir).values()) == len(rows))
        starts = {data[:least]: path for path, data in parts_in(output_dir).items()}
        for number, (meddle, _) in enumerate(MEDDLING.values()):
            hidden = starts[make_mp4(number, BIG)[:least]]
            video = output_dir / f"picture_{number}.mp4"
            meddle(hidden, video, video.with_suffix(".json"))
        files = [path for path in output_dir.glob("picture_*") if path.is_file()]
        arrived = {path.name: path.read_bytes() for path in files}
        cdn.released.set()
        result = finish(process)
        videos = {video["task_id"]: video for video in json.loads(result.stdout)["videos"]}
        yield MeddledRun(cdn, output_dir, result.returncode, videos, result.stderr, arrived)


@pytest.mark.parametrize("name", MEDDLING)
def test_what_others_do_meanwhile_never_makes_a_wrong_file(
    meddled_run: MeddledRun, name: str
) -> None:
    number = list(MEDDLING).index(name)
    task_id, ends = make_task_id(number), MEDDLING[name][1]
    stub = f"picture_{number}_{task_id[:8]}" if ends == "with-id" else f"picture_{number}"
    assert meddled_run.videos[task_id]["error"] is None
    assert meddled_run.videos[task_id]["path"].endswith(f"{stub}.mp4")
    assert len(meddled_run.cdn.asked(f"{number}.mp4")) <= 3
    if ends == "there":
        assert meddled_run.videos[task_id]["status"] == "exists"
    else:
        assert_whole(meddled_run.output_dir, stub, task_id, make_mp4(number, BIG))
    if ends != "wanted":
        for file in (f"picture_{number}.mp4", f"picture_{number}.json"):
            if file in meddled_run.arrived:
                assert (meddled_run.output_dir / file).read_bytes() == meddled_run.arrived[file]


def test_what_others_did_leaves_nothing_hidden_behind(meddled_run: MeddledRun) -> None:
    assert meddled_run.exit_code == 0
    assert hidden_in(meddled_run.output_dir) == set()


def test_a_name_taken_at_the_last_moment_stays_whose_it_is(cdn: Cdn, tmp_path: Path) -> None:
    foreign, task_id = make_mp4("foreign", 3000), make_task_id(0)
    put = f"open(arguments[1], 'wb').write({foreign!r})"
    env = sabotage(tmp_path / "s", "str(arguments[1]).endswith('_0.mp4')", put, "os.link")
    assert download(tmp_path, add_videos(cdn, 1), env=env).returncode == 0
    output_dir = tmp_path / "video_outputs"
    assert (output_dir / "picture_0.mp4").read_bytes() == foreign
    assert_whole(output_dir, f"picture_0_{task_id[:8]}", task_id, make_mp4(0, VIDEO_BYTES))
    assert len(names_in(output_dir)) == 3


# A directory that is not ours alone.


def test_where_nothing_can_be_removed_the_requests_are_bounded(cdn: Cdn, tmp_path: Path) -> None:
    rows = add_videos(cdn, 4)
    cdn.replies["/1.mp4"] = [Reply(send=HALF)]
    cdn.replies["/2.mp4"] = [Reply(send=HALF, headers={"ETag": None})]
    cdn.replies["/3.mp4"] = [Reply(body=make_mp4(3, VIDEO_BYTES)[:HALF])]
    output_dir = tmp_path / "video_outputs"
    output_dir.mkdir()
    with contextlib.suppress(OSError):
        subprocess.run(["chattr", "+a", str(output_dir)], capture_output=True)
    (output_dir / "x").touch()
    with contextlib.suppress(OSError):
        (output_dir / "x").unlink()
        pytest.skip("no right to forbid removal, or a file system that cannot")
    try:
        result = download(tmp_path, rows, "--retries", "1")
        assert result.returncode == 3
        assert max(Counter(request.path for request in cdn.requests).values()) <= 4
        assert_whole(output_dir, "picture_0", make_task_id(0), make_mp4(0, VIDEO_BYTES))
        assert max(path.stat().st_size for path in output_dir.iterdir()) <= VIDEO_BYTES
    finally:
        subprocess.run(["chattr", "-a", str(output_dir)], check=True)


STRANGER = 65533
ORDINARY_USER = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"]


@pytest.mark.parametrize("mode", [0o777, 0o1777], ids=["anybody-may-remove", "sticky"])
def test_what_a_killed_run_of_another_user_left_blocks_nobody(
    cdn: Cdn, tmp_path: Path, mode: int
) -> None:
    if not shutil.which("setpriv") or os.geteuid() != 0:
        pytest.skip("no right to give files to another user")
    rows = add_videos(cdn, 2, Reply(send=HALF), Reply())
    assert download(tmp_path, rows, "--retries", "0").returncode == 3
    output_dir = tmp_path / "video_outputs"
    for path in [*output_dir.iterdir(), output_dir]:
        path.chmod(0o600 if path != output_dir else mode)
        os.chown(path, STRANGER, STRANGER)
    assert finish(start_script(tmp_path, before=ORDINARY_USER)).returncode == 0
    for name in hidden_in(output_dir) if mode == 0o1777 else ():
        (output_dir / name).unlink()  # which the stranger alone may do
    assert_home(output_dir, 2)


# What lies under the wanted name, without metadata. Each row: it, the answer, and how it ends.

UNDER_THE_NAME: dict[str, tuple[bytes, Sequence[Reply] | None, str]] = {
    "same-size": (make_mp4("edited", VIDEO_BYTES), [Reply(pause_at=0)], "adopted"),
    "other-size": (FOREIGN, [Reply()], "with-id"),
    "other-size-cut-first": (FOREIGN, [CUT, Reply()], "with-id"),
    "dead-link": (FOREIGN, [Reply(status=403)], "adopted, HTTP 403"),
    "no-link": (FOREIGN, None, 'adopted, no usable "video_url"'),
    "cannot-be-asked": (FOREIGN, [Reply(status=500)], "failed"),
    "cut-short": (FOREIGN[:-9], [Reply()], "wanted"),
    "a-page": (b"<html>", [Reply()], "wanted"),
    "empty": (b"", [Reply()], "wanted"),
}


@pytest.fixture(scope="module")
def found_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TableRun]:
    directory = tmp_path_factory.mktemp("found")
    (directory / "video_outputs").mkdir()
    with Cdn() as cdn:
        rows = []
        for number, (found, replies, _) in enumerate(UNDER_THE_NAME.values()):
            link = cdn.add(f"{number}.mp4", OBJECT, *replies) if replies else None
            rows.append(make_row(number, video_url=link))
            (directory / "video_outputs" / f"picture_{number}.mp4").write_bytes(found)
        yield run_table(cdn, directory, rows, "--retries", "1", "--timeout", "9")


@pytest.mark.parametrize("name", UNDER_THE_NAME)
def test_a_video_without_metadata_is_told_apart_by_the_size_that_is_announced(
    found_run: TableRun, name: str
) -> None:
    found, _, end = UNDER_THE_NAME[name]
    number = list(UNDER_THE_NAME).index(name)
    task_id, stub, run = make_task_id(number), f"picture_{number}", found_run
    own = {"wanted": stub, "with-id": f"{stub}_{task_id[:8]}"}.get(end)
    if own:
        assert_whole(run.output_dir, own, task_id, OBJECT)
    if own != stub:
        assert (run.output_dir / f"{stub}.mp4").read_bytes() == found
        assert (f"{stub}.json" in names_in(run.output_dir)) == end.startswith("adopted")
    if end.startswith("adopted"):
        assert_whole(run.output_dir, stub, task_id, found)
        said = run.console.split(f"Already exists: {stub}.mp4\n")[1].split("Task ")[0]
        assert end.removeprefix("adopted").removeprefix(", ") in said
    statuses = {"failed": "failed", "wanted": "downloaded", "with-id": "downloaded"}
    assert run.videos[task_id]["status"] == statuses.get(end, "exists")


# Servers under pressure, and a system that is short of threads.

REFUSALS = {
    f"{status}{said and '-retry-after'}": Reply(status, b"no", {"Retry-After": said or None})
    for status in (429, 503)
    for said in ("", "1")
}
SERVED_PER_SECOND = 50


class BusyCdn(Cdn):
    """Serves so many requests a second and refuses the others."""

    def __init__(self, refusal: Reply) -> None:
        super().__init__()
        self.refused = 0
        self._refusal = refusal
        self._free_at = 0.0

    def next_reply(self, request: Request) -> Reply | None:
        reply = super().next_reply(request)
        with self._lock:
            if request.at < self._free_at:
                self.refused += 1
                return self._refusal
            self._free_at = max(self._free_at, request.at - 0.1) + 1 / SERVED_PER_SECOND
        return reply


PRESSURE = [(name, workers) for name in REFUSALS for workers in (16, 64)]


@pytest.fixture(scope="module")
def busy_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Any, Any]]:
    """The server, the exit code and the output directory of each run, all at once."""
    with contextlib.ExitStack() as servers:
        runs = {}
        for name, workers in PRESSURE:
            cdn = BusyCdn(REFUSALS[name])
            servers.enter_context(cdn)
            directory = tmp_path_factory.mktemp(name)
            write_results(directory, add_videos(cdn, 100, size=SMALL))
            process = start_script(directory, "--workers", str(workers), "--retries", "1")
            runs[name, workers] = cdn, process, directory / "video_outputs"
        yield {key: (run[0], finish(run[1]).returncode, run[2]) for key, run in runs.items()}


@pytest.mark.parametrize(("name", "workers"), PRESSURE)
def test_a_server_that_asks_to_hold_back_is_obeyed_and_all_come_home(
    busy_runs: dict[Any, Any], name: str, workers: int
) -> None:
    cdn, exit_code, output_dir = busy_runs[name, workers]
    assert exit_code == 0
    assert_home(output_dir, 100, SMALL)
    assert cdn.refused < 300


@pytest.mark.parametrize("count", [0, 3])
def test_fewer_threads_than_asked_for_are_no_failure(cdn: Cdn, tmp_path: Path, count: int) -> None:
    no_more = "raise RuntimeError('no more threads')"
    env = sabotage(tmp_path / "s", f"count > {count}", no_more, "threading.Thread.start")
    result = download(tmp_path, add_videos(cdn, 9), env=env)
    assert (result.returncode, result.stderr) == (0, "")
    assert_home(tmp_path / "video_outputs", 9)


# Ctrl-C and SIGTERM. Each situation: what the second video's server does meanwhile.

SITUATIONS = {
    "transferring": Reply(pause_at=BIG // 2),
    "waiting-for-the-head": Reply(wait_s=60),
    "in-a-back-off": Reply(status=500, headers={"Retry-After": "50"}),
    "holding-back": Reply(status=503, headers={"Retry-After": "50"}),
    "connecting": None,
    "waiting-for-another-run": Reply(wait_s=60),
}


@dataclass
class StoppedRuns:
    cdn: Cdn
    directories: Mapping[str, Path]
    exit_code: int
    ends: Mapping[str, subprocess.CompletedProcess[str]]


@contextlib.contextmanager
def ctrl_c_allowed() -> Iterator[None]:
    """Scripts started by what ignores Ctrl-C, such as nohup, ignore it, too: not here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module", params=[signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def stopped_runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StoppedRuns]:
    """One run a situation, all of them stopped by the same signal; one video is home by then."""
    directories = {name: tmp_path_factory.mktemp(name) for name in SITUATIONS}
    with Cdn() as cdn, deaf_port() as deaf, ctrl_c_allowed():
        for name, reply in SITUATIONS.items():
            links = [cdn.add(f"{name}/0.mp4", OBJECT), f"{deaf}/1.mp4"]
            if reply:
                links[1] = cdn.add(f"{name}/1.mp4", make_mp4(1, BIG), reply, Reply())
            rows = [make_row(number, video_url=link) for number, link in enumerate(links)]
            write_results(directories[name], rows)
        other = start_script(directories["waiting-for-another-run"])
        home = directories["waiting-for-another-run"] / "video_outputs" / "picture_0.mp4"
        wait_until(lambda: home.exists() and cdn.asked("waiting-for-another-run/1.mp4"))
        processes = {name: start_script(directory) for name, directory in directories.items()}
        for name, reply in SITUATIONS.items():
            wait_until((directories[name] / "video_outputs" / "picture_0.mp4").exists)
            if reply:
                wait_until(lambda: cdn.asked(f"{name}/1.mp4"))  # noqa: B023
        wait_until(lambda: parts_in(directories["transferring"] / "video_outputs"))
        read_until(processes["waiting-for-another-run"], "Waiting for 1 video")
        since = time.monotonic()
        for process in processes.values():
            process.send_signal(request.param)
        ends = {name: finish(process) for name, process in processes.items()}
        assert time.monotonic() - since < 3
        other.kill()
        other.communicate()
        yield StoppedRuns(cdn, directories, 128 + request.param, ends)


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_signal_ends_the_run_with_statistics(stopped_runs: StoppedRuns, name: str) -> None:
    end = stopped_runs.ends[name]
    assert end.returncode == stopped_runs.exit_code
    assert re.fullmatch("❌ stopped by SIG[^\n]*", end.stderr.strip())
    home = statistic(end, "Videos downloaded"), statistic(end, "Already existed")
    assert home == ((0, 1) if name == "waiting-for-another-run" else (1, 0))
    assert "picture_1.mp4" not in names_in(stopped_runs.directories[name] / "video_outputs")


def test_a_stopped_run_leaves_its_part_and_the_next_resumes_it(stopped_runs: StoppedRuns) -> None:
    directory = stopped_runs.directories["transferring"]
    output_dir, body = directory / "video_outputs", make_mp4(1, BIG)
    (part,) = parts_in(output_dir).values()
    assert body.startswith(part)
    assert run_script(directory).returncode == 0
    starts = [request.range_start for request in stopped_runs.cdn.asked("transferring/1.mp4")]
    assert starts == [None, len(part)]
    assert_whole(output_dir, "picture_1", make_task_id(1), body)
    assert len(names_in(output_dir)) == 4


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from download_succeeded_videos import VideoDownloader
VideoDownloader("videos").process_polling_results_file(sys.argv[2])
"""


def test_a_program_that_uses_the_class_ends_soon_after_ctrl_c(cdn: Cdn, tmp_path: Path) -> None:
    silent = Reply(wait_s=60), Reply(send=HALF, ending="hang")
    links = [cdn.add(f"{number}.mp4", OBJECT, reply) for number, reply in enumerate(silent)]
    file = write_results(tmp_path, [make_row(i, video_url=link) for i, link in enumerate(links)])
    command = [sys.executable, "-c", PROGRAM, str(SCRIPT.parent), str(file)]
    with ctrl_c_allowed():
        process = subprocess.Popen(command, cwd=tmp_path, env=script_environment())
    wait_until(lambda: len(cdn.requests) == 2)
    since = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert time.monotonic() - since < 2


# The disk.


def test_a_disk_that_fills_up_ends_the_run_and_keeps_what_is_whole(
    cdn: Cdn, tmp_path: Path
) -> None:
    output_dir, rows = tmp_path / "video_outputs", add_videos(cdn, 6)
    rows.append(make_row(6, video_url=cdn.add("6.mp4", OTHER, Reply(send=HALF, ending="hang"))))
    full = "raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))"
    env = sabotage(tmp_path / "s", "count > 6", full, "os.fsync")
    result = download(tmp_path, rows, "--workers", "2", env=env)
    assert result.returncode == 1
    assert re.fullmatch("❌ no space left[^\n]*", result.stderr.strip())
    videos = list(output_dir.glob("*.mp4"))
    assert 1 <= len(videos) < 6
    for video in videos:
        number = int(video.stem[-1])
        assert_whole(output_dir, video.stem, make_task_id(number), make_mp4(number, VIDEO_BYTES))
    assert len(names_in(output_dir)) == 2 * len(videos)  # no part file either


def test_a_directory_that_cannot_be_written_is_one_clear_line(cdn: Cdn, tmp_path: Path) -> None:
    (tmp_path / "video_outputs").mkdir(mode=0o555)
    write_results(tmp_path, add_videos(cdn, 2))
    if os.geteuid() == 0 and not shutil.which(ORDINARY_USER[0]):
        pytest.skip("root may write anywhere")
    before = ORDINARY_USER if os.geteuid() == 0 else ()
    result = finish(start_script(tmp_path, before=before))
    assert result.returncode == 1
    assert re.fullmatch("❌ the output directory [^\n]*", result.stderr.strip())
    assert cdn.requests == []


# TLS: a certificate for 127.0.0.1 that no one else trusts, good until 2120.

CERTIFICATE = (
    "MIIBcjCCARigAwIBAgIBATAKBggqhkjOPQQDAjAXMRUwEwYDVQQDDAxMb29wYmFjayBDRE4wIBcNMjAwMTAxMDAwMDAw"
    "WhgPMjEyMDAxMDEwMDAwMDBaMBcxFTATBgNVBAMMDExvb3BiYWNrIENETjBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IA"
    "BCbhXfrIX43ci5qC53k7uSEIAtE8KwPdDlxq/ZcEZcpu1uc+NtYRyt9Jv7mw5F/PtUh/C5SuHHU4euxBKU1ZsSSjUzBR"
    "MA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgKEMA8GA1UdEQQIMAaHBH8AAAEwHQYDVR0OBBYEFCljnNBLWPlf"
    "BZ76YtSzGTBeNR7iMAoGCCqGSM49BAMCA0gAMEUCICW+FPHPvJp9yaYHLtGEp7f7p8rchSKrlB9PCHP+7mqVAiEAjRm3"
    "RX01gKxOMjjFckOcmgub8G/3pEq5KhbfTMNEOuY="
)
KEY_OF_CERTIFICATE = (
    "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgk7WA8SD/cCVsk3N8q0YnyncBJoUWDIuhZT0UIEXQHlyh"
    "RANCAAQm4V36yF+N3Iuagud5O7khCALRPCsD3Q5cav2XBGXKbtbnPjbWEcrfSb+5sORfz7VIfwuUrhx1OHrsQSlNWbEk"
)


def make_pem(kind: str, data: str) -> str:
    pem = ssl.DER_cert_to_PEM_cert(base64.b64decode(data))
    return pem.replace("CERTIFICATE", kind)


class TlsCdn(Cdn):
    """A `Cdn` that speaks TLS; its certificate is in ``bundle``."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.bundle = directory / "bundle.pem"
        self.bundle.write_text(make_pem("CERTIFICATE", CERTIFICATE))
        key = directory / "key.pem"
        key.write_text(make_pem("PRIVATE KEY", KEY_OF_CERTIFICATE))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.bundle, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    @property
    def url(self) -> str:
        return super().url.replace("http:", "https:")


def test_a_certificate_that_is_not_trusted_fails_at_once(tmp_path: Path) -> None:
    with TlsCdn(tmp_path) as cdn:
        result = download(tmp_path, [make_row(video_url=cdn.add("0.mp4", OBJECT))])
    assert result.returncode == 3
    assert "certificate is not trusted" in result.stderr
    assert "tried" not in result.stderr
    assert cdn.requests == []


def test_connections_are_kept_alive(cdn: Cdn, tmp_path: Path) -> None:
    replies = [Reply(), Reply(framing="chunked")]
    rows = [make_row(i, video_url=cdn.add(f"{i}.mp4", OBJECT, replies[i % 2])) for i in range(30)]
    assert download(tmp_path, rows, "--workers", "3").returncode == 0
    assert len(cdn.requests) == 30
    assert len({request.client for request in cdn.requests}) <= 3


def test_a_bundle_of_ones_own_is_trusted_and_loaded_once_a_run(tmp_path: Path) -> None:
    log = tmp_path / "log"
    note = f"print(arguments, options, file=open({str(log)!r}, 'a'))"
    env = sabotage(tmp_path / "s", "True", note, "ssl.SSLContext.load_verify_locations")
    with TlsCdn(tmp_path) as cdn:
        env["REQUESTS_CA_BUNDLE"] = str(cdn.bundle)
        assert download(tmp_path, add_videos(cdn, 20), env=env).returncode == 0
    assert len(cdn.requests) == 20
    assert log.read_text().count("bundle.pem") == 1


# --- The command line: the real script in its own process -------------------------------------

LATEST = "runway_polling_results_20250617_040158.json"
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all but \n
WEBM = b"\x1a\x45\xdf\xa3" + random.Random(0).randbytes(2000)
PYTHON = shlex.quote(sys.executable)
unix_only = pytest.mark.skipif(os.name != "posix", reason="needs a Unix shell or terminal")


def run_raw(
    directory: Path, *arguments: str, shell: str = "", encoding: str = "utf-8"
) -> subprocess.CompletedProcess[bytes]:
    """As `run_script`, but in bytes; ``shell`` is a shell line in which ``"$@"`` is the script."""
    command = [*(["sh", "-c", shell, "sh"] if shell else []), sys.executable, str(SCRIPT)]
    env = script_environment(PYTHONIOENCODING=encoding)
    command += arguments
    return subprocess.run(command, cwd=directory, env=env, capture_output=True, check=False)


def run_json(directory: Path, *arguments: str) -> dict[str, Any]:
    """What ``--json`` prints: one object, on a stdout of its own."""
    result = run_script(directory, "--json", *arguments)
    report: dict[str, Any] = json.loads(result.stdout)
    assert result.returncode == report["exit_code"]
    assert list(report["stats"]) == list(figures())
    keys = ["task_id", "status", "path", "size_bytes", "error", "warning"]
    assert all(list(video)[:6] == keys for video in report["videos"])
    return report | {"videos": {video["task_id"]: video for video in report["videos"]}}


def put_video(
    directory: Path, row: Mapping[str, Any], body: bytes, info: Mapping[str, Any] | None = None
) -> Path:
    """A video and its metadata as an earlier run left them; ``info`` as an older one did."""
    directory.mkdir(exist_ok=True)
    video = directory / f"{row['target_filename_stub']}.mp4"
    video.write_bytes(body)
    facts = {"size_bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    metadata = {"runway_task_json": row, "file_info": facts if info is None else info}
    video.with_suffix(".json").write_text(json.dumps(metadata), encoding="utf-8")
    return video


def serve(cdn: Cdn, count: int, *replies: Reply) -> list[dict[str, Any]]:
    """The rows of ``count`` tasks whose videos, ``make_mp4(number)``, are on ``cdn``."""
    return [
        make_row(number, video_url=cdn.add(f"{number}.mp4", make_mp4(number), *replies))
        for number in range(count)
    ]


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """All that is below ``directory``, with sizes and times."""
    paths = [directory, *directory.rglob("*")]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def read_failures(err: str) -> dict[str, str]:
    """Name → reason, detail and advice, from the groups at the end of a run."""
    found: dict[str, str] = {}
    for block in err.strip("\n").split("\n\n"):
        reason, *names, advice = block.splitlines()
        found |= {line.split()[0]: f"{reason}\n{line}\n{advice}" for line in names}
    return found


# Console: section 6 of the contract


def test_a_big_run_ends_with_its_failures_each_reason_said_once(tmp_path: Path, cdn: Cdn) -> None:
    (tmp_path / "video_outputs").mkdir()
    for number in range(1100):
        (tmp_path / "video_outputs" / f"a{number}.mp4").write_bytes(WHOLE)
    rows = serve(cdn, 30)
    for number in range(3, 28):
        cdn.add(f"{number}.mp4", b"", Reply(status=403))
    cdn.add("28.mp4", b"<html>")
    del rows[29]["video_url"]
    write_results(tmp_path, rows)
    result = run_script(tmp_path)
    assert result.returncode == 3
    head, _, listing = result.stdout.partition("📁 Videos in video_outputs:\n")
    assert "📥 Videos downloaded: 3\n⚠️ Already existed: 0\n❌ Failed downloads: 27\n" in head
    *names, more, _, total = listing.splitlines()
    assert sorted(names[:3]) == [f"  • picture_{number}.mp4 (0.10 MB)" for number in range(3)]
    assert [name[:5] for name in names[3:]] == ["  • a"] * 7
    assert more == "  … and 1,093 more"
    assert total.startswith("💾 Total storage used: ")
    assert result.stderr.count("\n\n") == 2
    failures = read_failures(result.stderr)
    assert len(failures) == 20 + 1 + 2  # the one that says how many more
    assert re.search("❌ 25 videos: .*HTTP 403", result.stderr)
    assert "\n    … and 5 more\n  → set RUNWAYML_API_SECRET" in result.stderr
    assert re.search("text|HTML", failures["picture_28.mp4"])
    assert "video_url" in failures["picture_29.mp4"]
    both = run_raw(tmp_path, shell='"$@" 2>&1').stdout.decode()
    assert both.index("💾 Total storage used") < both.index("❌ 25 videos: ")


def test_quiet_prints_what_is_wrong_and_nothing_else(tmp_path: Path, cdn: Cdn) -> None:
    rows = [make_row(9, final_status="FAILED"), *serve(cdn, 2)]
    cdn.add("1.mp4", b"", Reply(status=404))
    for option, count in (("--quiet", 1), ("-q", 2), ("-q", 2)):
        write_results(tmp_path, rows[:count])
        result = run_script(tmp_path, option, "--gallery")
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    write_results(tmp_path, rows)
    result = run_script(tmp_path, "-q")
    assert (result.returncode, result.stdout) == (3, "")
    said = r"\n?❌ 1 video: .*HTTP 404.*\n    picture_1.mp4 .*\n  → .*\n"
    assert re.fullmatch(said, result.stderr)


def test_what_cannot_be_read_is_said_with_what_would_help(tmp_path: Path) -> None:
    result = run_script(tmp_path, "--output-dir", "elsewhere")
    assert (result.returncode, result.stdout) == (1, "")
    places = ", ".join(str(tmp_path / name) for name in ("", "video_outputs", "elsewhere"))
    said = f"❌ No polling results found in {places} — run the polling step first"
    assert result.stderr.strip().startswith(said)
    assert names_in(tmp_path) == set()
    (tmp_path / "queue.json").write_text('{"tasks": []}', encoding="utf-8")
    result = run_script(tmp_path, "missing.json", "queue.json")
    assert result.returncode == 1
    assert "missing.json: cannot be read: No such file" in result.stderr
    assert "queue.json: is not a polling-results file, which looks like {" in result.stderr


@pytest.mark.parametrize("way", ["--all", "FILE ..."])
def test_several_files_are_read_latest_first_and_the_broken_ones_named(
    tmp_path: Path, cdn: Cdn, way: str
) -> None:
    rows = serve(cdn, 3)
    stale = rows[0] | {"video_url": cdn.add("stale.mp4", b"", Reply(status=404))}
    contents = {"video_outputs": [rows[2]], ".": [stale], "out": rows[:2]}
    for number, place in enumerate(contents, 1):
        (tmp_path / place).mkdir(exist_ok=True)
        write_results(tmp_path / place, contents[place], f"2025061{number}_000000")
    latest = run_script(tmp_path, "--output-dir", "out", "--dry-run").stdout
    assert latest.startswith("📁 Using latest results file: runway_polling_results_20250613_000000")
    broken = write_results(tmp_path, [], "20250614_000000")
    broken.write_text("{", encoding="utf-8")
    files = sorted(map(str, tmp_path.rglob("*.json")), key=os.path.basename)
    arguments = ["--output-dir", "out", *(["--all"] if way == "--all" else files)]
    result = run_script(tmp_path, *arguments)
    assert result.returncode == 3
    assert result.stdout.startswith("🔍 Found 4 polling results files\n") == (way == "--all")
    days = re.findall(r"Processing: \w+_2025061(\d)_000000\.json\n", result.stdout)
    assert days == ["4", "3", "2", "1"]
    assert broken.name in result.stderr
    assert not cdn.asked("stale.mp4")
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 3
    for mode in ("--dry-run", "--verify"):
        assert run_script(tmp_path, *arguments, mode).returncode == 3


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252:strict"])
def test_a_console_without_emoji_does_not_break_the_run(
    tmp_path: Path, cdn: Cdn, encoding: str
) -> None:
    write_results(tmp_path, [row | {"target_filename_stub": "élan☃"} for row in serve(cdn, 1)])
    result = run_raw(tmp_path, encoding=encoding)
    assert (result.returncode, result.stderr) == (0, b"")
    assert "Videos downloaded: 1" in result.stdout.decode(encoding.split(":")[0])
    assert_whole(tmp_path / "video_outputs", "élan☃", make_task_id(0), make_mp4())


@unix_only
@pytest.mark.parametrize(
    "shell", ['"$@" >&- 2>&- <&-; echo $? >code', '{ "$@"; echo $? >code; } | head -n 0']
)
def test_a_console_that_goes_away_costs_no_video(tmp_path: Path, cdn: Cdn, shell: str) -> None:
    write_results(tmp_path, serve(cdn, 1))
    assert run_raw(tmp_path, shell=shell).stderr == b""
    assert (tmp_path / "code").read_text() == "0\n"
    assert_whole(tmp_path / "video_outputs", "picture_0", make_task_id(0), make_mp4())


EVIL = "\x1b]0;owned\x07\x1b[2J\r\x08\x9b31m\u202egnp\x00\ud800\nOWNED"


@pytest.mark.parametrize(
    "mode",
    [(), ("--dry-run",), ("--verify", "--all"), ("--json",), ("--output-dir", "out\x1b[2J\rput")],
    ids=" ".join,
)
def test_control_characters_never_reach_the_console(
    tmp_path: Path, cdn: Cdn, mode: tuple[str, ...]
) -> None:
    links = cdn.add("0.mp4", make_mp4()), cdn.add("1.mp4", b"", Reply(status=403)), EVIL
    rows = [
        make_row(number, video_url=link, **dict.fromkeys(fields, EVIL))
        for number, link in enumerate([*links, f"http://h/{EVIL}"])
        for fields in (("task_id",), ("target_filename_stub", "prompt", "image_path"))
    ]
    rows += [make_row(final_status=EVIL), make_row(final_status=[EVIL]), {EVIL: EVIL}]
    write_results(tmp_path, rows, "20250617_040158\x1b[2J\r" if os.name == "posix" else "1")
    (tmp_path / f"runway_polling_results_1{LATEST}").write_text('{"\x1b[2J', encoding="utf-8")
    command = [sys.executable, "-c", "print('\\x1b[2J\\r\\x07 said'); exit(1)"]
    result = run_raw(tmp_path, *mode, "--exec", shlex.join(command), "--gallery")
    shown = (result.stdout + result.stderr).decode()
    assert len(shown) > 100
    assert not CONTROL.search(shown)
    assert not re.search("^ *OWNED", shown, re.MULTILINE)


# Progress: the live line on a terminal, lines in a log


def run_in_terminal(
    directory: Path, columns: int, act: Callable[[subprocess.Popen[bytes], str], None]
) -> tuple[int, list[str], list[str]]:
    """Run the script on a pseudo-terminal; ``act`` sees what is shown so far, again and again.

    The exit code, the lines that stay and the live lines, which fit and are cleared.
    """
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    terminal, console = pytest.importorskip("pty").openpty()
    fcntl.ioctl(console, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command, env = [sys.executable, str(SCRIPT)], script_environment()
    process = subprocess.Popen(command, cwd=directory, env=env, stdout=console, stderr=console)
    os.close(console)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while block := os.read(terminal, 65536):
            shown += block
            act(process, shown.decode(errors="ignore"))
    watchdog.cancel()
    os.close(terminal)
    rows = [row.split("\r\x1b[K") for row in shown.decode().replace("\r\n", "\n").split("\n")]
    cleared = [line for row in rows for line in row[:-1] if line]
    assert all(line.startswith("⏬ ") for line in cleared)
    assert max(map(columns_of, cleared)) < columns
    lines = [row[-1] for row in rows]
    assert not [line for line in lines if CONTROL.search(line) or "⏬" in line]
    return process.wait(60), lines, cleared


def columns_of(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in line)


@unix_only
@pytest.mark.parametrize("columns", [80, 40])
def test_live_line_counts_fits_and_shows_what_is_retried(
    tmp_path: Path, cdn: Cdn, columns: int
) -> None:
    rows = serve(cdn, 4)
    slow = cdn.add("4.mp4", make_mp4(4, 600_000), Reply(bytes_per_second=400_000))
    cdn.add("3.mp4", make_mp4(3), Reply(status=500), Reply(wait_s=60))
    for row in rows[:3]:
        put_video(tmp_path / "video_outputs", row, make_mp4())
    write_results(tmp_path, [*rows, make_row(4, video_url=slow)])

    def release(_process: object, shown: str) -> None:
        if re.search("⏬ 4/5  0.6 MB" + "  [^\r]*🔁 " * (columns > 40), shown):
            cdn.released.set()

    exit_code, lines, cleared = run_in_terminal(tmp_path, columns, release)
    assert exit_code == 0
    counted = r"⏬ 3/5  0\.\d MB  0\.\d MB/s  [\d:]+[1-9] left"
    assert [line for line in cleared if re.match(counted, line)]
    assert "📥 Videos downloaded: 2" in lines


@unix_only
def test_waiting_is_shown_and_a_signal_ends_line_and_json_well(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1, Reply(wait_s=60)))
    other = start_script(tmp_path, "--json")
    wait_until(lambda: cdn.requests)
    pressed: list[bool] = []

    def interrupt(process: subprocess.Popen[bytes], shown: str) -> None:
        if "waiting for 1 video of another run" in shown and not pressed:
            pressed.append(True)
            threading.Timer(0.1, process.send_signal, [signal.SIGINT]).start()

    exit_code, lines, _ = run_in_terminal(tmp_path, 80, interrupt)
    assert exit_code == 130
    assert "⏳ Waiting for 1 video that another run has in hand" in lines
    assert "📥 Videos downloaded: 0" in lines
    other.terminate()
    out, err = other.communicate(timeout=30)
    assert other.returncode == json.loads(out)["exit_code"] == 143
    assert "📥 Videos downloaded: 0" in err
    assert len(cdn.requests) == 1


def test_a_copy_of_the_script_alone_breaks_a_long_silence_in_a_log(
    tmp_path: Path, cdn: Cdn
) -> None:
    shutil.copy(SCRIPT, tmp_path / "get.py")
    write_results(tmp_path, serve(cdn, 1, Reply(status=500), Reply(wait_s=10)))
    command = [sys.executable, "-c", "import get; get.SILENCE_S = 0.3; exit(get.main())"]
    both, env = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}, script_environment()
    process = subprocess.Popen(command, cwd=tmp_path, env=env, **both)  # type: ignore[call-overload]
    log = b""
    for line in process.stdout:
        log += line
        if re.search("⏬ 0/1 .*HTTP 500", line.decode()):
            cdn.released.set()
    assert process.wait(30) == 0
    assert cdn.released.is_set()
    assert not CONTROL.search(log.decode())
    assert_whole(tmp_path / "video_outputs", "picture_0", make_task_id(0), make_mp4())


# --dry-run, --json, --verify, --shard


def make_mixed_directory(directory: Path, cdn: Cdn) -> list[dict[str, Any]]:
    """Five tasks: to download, twice under one stub; expired; without link; already there."""
    rows = serve(cdn, 5)
    rows[0]["video_url"] = make_jwt_link(f"{cdn.url}/0.mp4", 1893456000)
    rows[1]["target_filename_stub"] = "picture_0"
    cdn.add("1.mp4", WEBM)
    cdn.add("2.mp4", b"", Reply(status=404))
    rows[2]["video_url"] = make_jwt_link(f"{cdn.url}/2.mp4", 1750000000)
    rows[3]["video_url"] = 7
    put_video(directory / "video_outputs", rows[4], make_mp4(4))
    write_results(directory, [*rows, make_row(9, final_status="FAILED"), "no object"])
    return rows


def test_dry_run_says_names_and_expiry_and_touches_nothing(tmp_path: Path, cdn: Cdn) -> None:
    make_mixed_directory(tmp_path, cdn)
    before = snapshot(tmp_path)
    result = run_script(tmp_path, "--dry-run", "--exec", f"{PYTHON} -h", "--gallery")
    assert run_script(tmp_path, "--dry-run", "--output-dir", "new").returncode == 3
    assert snapshot(tmp_path) == before
    assert cdn.requests == []
    *lines, last = result.stdout.splitlines()
    names = ["picture_0.mp4", f"picture_0_{make_task_id(1)[:8]}.mp4", "picture_2.mp4"]
    said = ["expires 2030-01-01 00:00:00 UTC", "not say when", "expired 2025-06-15 15:06:40 UTC"]
    for name, expiry in zip(names, said, strict=True):
        assert [line for line in lines if f" {name} " in line and expiry in line]
    assert "picture_4" not in result.stdout
    assert "2 to do, 1 expired, 1 already there" in last


def test_json_tells_what_will_become_and_became_of_each_video(tmp_path: Path, cdn: Cdn) -> None:
    keys = [row["task_id"] for row in make_mixed_directory(tmp_path, cdn)]
    plan, run = run_json(tmp_path, "--dry-run"), run_json(tmp_path)
    planned, done = ([report["videos"][key] for key in keys] for report in (plan, run))
    assert [video["status"] for video in planned] == [*["pending"] * 3, "failed", "exists"]
    assert planned[0]["expires"] == "2030-01-01T00:00:00+00:00"
    assert [planned[i]["path"] for i in (0, 1, 4)] == [done[i]["path"] for i in (0, 1, 4)]
    assert run["exit_code"] == 3
    counted = figures(total_succeeded=5, downloaded=2, failed_downloads=2, already_exists=1)
    assert run["stats"] == counted
    path = os.path.join("video_outputs", "picture_0.mp4")
    assert list(done[0].values()) == [keys[0], "downloaded", path, 100_000, None, None]
    assert (done[1]["size_bytes"], done[1]["error"]) == (len(WEBM), None)
    assert "no MP4" in done[1]["warning"]
    for number, reason in ((2, "HTTP 404"), (3, "video_url")):
        assert (done[number]["status"], done[number]["path"]) == ("failed", None)
        assert reason in done[number]["error"]
    path = os.path.join("video_outputs", "picture_4.mp4")
    assert list(done[4].values()) == [keys[4], "exists", path, 100_000, None, None]


def flip_last_byte(video: Path) -> None:
    data = video.read_bytes()
    video.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "run again without --verify"),
    "cut": (lambda video: os.truncate(video, 99_990), "99,990 bytes"),
    "empty": (lambda video: os.truncate(video, 0), "0 bytes"),
    "other": (flip_last_byte, "SHA-256"),
}


def test_verify_names_each_problem_and_what_to_do(tmp_path: Path, cdn: Cdn) -> None:
    for number, (name, (damage, _)) in enumerate(DAMAGES.items()):
        row = make_row(number, target_filename_stub=name)
        damage(put_video(tmp_path / "video_outputs", row, make_mp4(number)))
    old = make_row(8, target_filename_stub="old")
    put_video(tmp_path / "video_outputs", old, make_mp4()[:-100], info={})
    whole, never = (make_row(number, target_filename_stub="whole") for number in (9, 10))
    put_video(tmp_path / "video_outputs", whole, make_mp4())
    write_results(tmp_path, [whole, never])
    before = snapshot(tmp_path)
    result = run_script(tmp_path, "--verify", "--all")
    assert result.returncode == 3
    said = {f"{name}.mp4": said for name, (_, said) in DAMAGES.items()}
    said |= {"old.mp4": "cut short", f"whole_{make_task_id(10)[:8]}.mp4": "not been downloaded"}
    failures = read_failures(result.stderr)
    assert failures.keys() == said.keys()
    assert not [name for name in said if said[name] not in failures[name]]
    assert all("run again" in failure for failure in failures.values())
    assert snapshot(tmp_path) == before
    assert cdn.requests == []


def test_verify_accepts_all_that_a_run_leaves_or_keeps(tmp_path: Path, cdn: Cdn) -> None:
    videos = tmp_path / "video_outputs"
    rows = [make_row(0, video_url=cdn.add("0.mp4", WEBM)), make_row(1), make_row(2)]
    write_results(tmp_path, rows)
    put_video(videos, rows[1], make_mp4(1), info={})
    renamed = put_video(videos, rows[2], make_mp4(2))
    for path in (renamed, renamed.with_suffix(".json")):
        path.rename(videos / f"mine{path.suffix}")
    for _ in range(2):
        assert run_script(tmp_path).returncode == 0
    assert len(cdn.requests) == 1
    lay_out(videos, {"loose.mp4": WHOLE, "odd.mp4": WHOLE, "odd.json": b"{", "queue.json": b"{}"})
    for arguments in ([], ["--all"]):
        result = run_script(tmp_path, "--verify", *arguments)
        assert (result.returncode, result.stderr) == (0, "")
        assert "🔎 Verified: 3 whole, 0 with a problem\n" in result.stdout
        assert {"loose.mp4", "odd.mp4"} <= set(result.stdout.split())


def test_shards_part_the_tasks_by_stub_whatever_else_the_files_hold(
    tmp_path: Path, cdn: Cdn
) -> None:
    rows = serve(cdn, 16)
    for number, row in enumerate(rows):
        row["target_filename_stub"] = f"stub_{number % 8}"
    fewer = write_results(tmp_path, rows[::3], "20250101_000000")
    write_results(tmp_path, rows)
    parts = []
    for shard in ("1/2", "2/2"):
        options = ("--shard", shard, "--output-dir", shard[0])
        some = run_json(tmp_path, *options, fewer.name, "--dry-run")["videos"]
        parts.append(run_json(tmp_path, *options)["videos"])
        assert some.keys() == parts[-1].keys() & {row["task_id"] for row in rows[::3]}
        assert run_script(tmp_path, *options, "--verify", LATEST).returncode == 0
    for first, second in zip(rows[:8], rows[8:], strict=True):  # of one stub
        (owner,) = [part for part in parts if first["task_id"] in part]
        assert second["task_id"] in owner
    assert all(parts)
    assert len(cdn.requests) == sum(map(len, parts)) == len(rows)


# --exec


def make_recorder(directory: Path, code: str = "") -> str:
    """A command for --exec that appends its arguments to ``calls``, then does ``code``."""
    script = directory / "record it.py"
    record = f"open({str(directory / 'calls')!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')"
    script.write_text(f"import json, os, sys\n{record}\n{code}", encoding="utf-8")
    return f"{PYTHON} {shlex.quote(str(script))} {{video}} --with={{metadata}}"


def read_calls(directory: Path) -> list[list[str]]:
    return [json.loads(line) for line in (directory / "calls").read_text().splitlines()]


def test_exec_hands_hostile_names_over_to_the_letter_without_the_key(
    tmp_path: Path, cdn: Cdn
) -> None:
    stubs = ["a b", "it's", "$(touch owned)", "`touch owned`", "; touch owned;", "&& touch owned",
             "$HOME", "-rf", "{metadata}", "{video}", "~", "%PATH%", "${IFS}", "é☃"]  # fmt: skip
    rows = zip(serve(cdn, len(stubs)), stubs, strict=True)
    write_results(tmp_path, [row | {"target_filename_stub": stub} for row, stub in rows])
    command = make_recorder(tmp_path, "assert 'key' not in os.environ.values()")
    result = run_script(tmp_path, "--exec", command, env={"RUNWAYML_API_SECRET": "key"})
    assert (result.returncode, result.stderr) == (0, "")
    paths = [tmp_path / "video_outputs" / stub for stub in stubs]
    calls = [[f"{path}.mp4", f"--with={path}.json"] for path in paths]
    assert sorted(read_calls(tmp_path)) == sorted(calls)
    assert "owned" not in names_in(tmp_path) | names_in(tmp_path / "video_outputs")


def test_exec_that_fails_is_said_and_done_again_until_it_succeeds(tmp_path: Path, cdn: Cdn) -> None:
    videos, rows = tmp_path / "video_outputs", serve(cdn, 3)
    put_video(videos, rows[0], make_mp4(0))  # what was there before is not new
    lay_out(videos, {"picture_1.mp4": make_mp4(1)})  # nor is what is adopted
    write_results(tmp_path, rows)
    failing = make_recorder(tmp_path, "print('why \x1b[2J it failed'); sys.exit(7)")
    result = run_script(tmp_path, "--exec", failing)
    assert result.returncode == 3
    failure = read_failures(result.stderr)["picture_2.mp4"]
    assert re.search(r"(?s)exit code 7.*why \?\[2J it failed.*run again with --exec", failure)
    assert run_script(tmp_path).returncode == 0
    video = run_json(tmp_path, "--exec", failing)["videos"][rows[2]["task_id"]]
    assert video["path"] == os.path.join("video_outputs", "picture_2.mp4")
    assert "exit code 7" in video["error"]
    metadata = [json.loads((videos / "picture_2.json").read_bytes())]
    for _ in range(2):
        assert run_script(tmp_path, "--exec", make_recorder(tmp_path)).returncode == 0
        metadata.append(json.loads((videos / "picture_2.json").read_bytes()))
    assert [list(each.items())[-1] for each in metadata] == [
        ("handed_over", done) for done in (False, True, True)
    ]
    assert [Path(call[0]).name for call in read_calls(tmp_path)] == ["picture_2.mp4"] * 3
    assert len(cdn.asked("2.mp4")) == 1


@unix_only
def test_exec_killed_with_the_run_is_done_by_the_next(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1))
    kill = make_recorder(tmp_path, "os.kill(os.getppid(), 9)")
    assert run_script(tmp_path, "--exec", kill).returncode == -signal.SIGKILL
    for _ in range(2):
        assert run_script(tmp_path, "--exec", make_recorder(tmp_path)).returncode == 0
    assert len(read_calls(tmp_path)) == 2
    assert len(cdn.requests) == 1


# --gallery


class Page(HTMLParser):
    """The elements of a page in order, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def make_gallery(directory: Path, cdn: Cdn, texts: Sequence[str]) -> Page:
    """The page of a run over new videos described by ``texts``, the last one the newest."""
    fields = ("prompt", "seed", "theme", "target_filename_stub")
    rows = zip(serve(cdn, len(texts)), texts, strict=True)
    directory.mkdir()
    write_results(directory, [row | dict.fromkeys(fields, text) for row, text in rows])
    result = run_script(directory, "--gallery", "--workers", "1")
    assert (result.returncode, result.stderr) == (0, "")
    return Page(directory / "video_outputs" / "index.html")


HOSTILE = ["</script><img src=x onerror=alert(1)>", "\"'><script>alert(1)</script>",
           "</title></style><!-- &amp; {title} $title %s", "a/b #1 100% é?.mp4"]  # fmt: skip


def test_gallery_shows_each_video_newest_first_and_what_is_known_of_it(
    tmp_path: Path, cdn: Cdn
) -> None:
    page = make_gallery(tmp_path / "a", cdn, HOSTILE)
    plain = make_gallery(tmp_path / "b", cdn, "abcd")
    shapes = [[(tag, *names) for tag, names in each.elements] for each in (page, plain)]
    assert shapes[0] == shapes[1]  # nothing of a text has become an element
    for text in [*HOSTILE, *(make_task_id(number)[:8] for number in range(4)), "0.10 MB"]:
        assert text in page.text
    assert f"{datetime.now():%Y-%m-}" in page.text
    values = [value for _, names in page.elements for value in names.values() if value]
    videos = tmp_path / "a" / "video_outputs"
    files = [videos / unquote(value.partition("#")[0]) for value in values if len(value) < 200]
    shown = dict.fromkeys(file for file in files if file.suffix == ".mp4" and file.is_file())
    assert [file.read_bytes() for file in shown] == [make_mp4(number) for number in (3, 2, 1, 0)]
    tags = Counter(tag for tag, _ in page.elements)
    assert (tags["video"], tags["input"]) == (4, 1)
    assert ("meta", {"name": "generator", "content": SCRIPT.stem}) in page.elements
    assert "_jwt" not in page.source
    assert not [value for value in values if re.match("(https?:)?//", value)]


def test_gallery_is_made_when_all_are_there_and_leaves_another_page_alone(
    tmp_path: Path, cdn: Cdn
) -> None:
    make_gallery(tmp_path / "a", cdn, [])
    write_results(tmp_path / "a", serve(cdn, 2))
    for more in ([], ["--gallery"]):
        assert run_script(tmp_path / "a", *more).returncode == 0
    page = tmp_path / "a" / "video_outputs" / "index.html"
    assert [tag for tag, _ in Page(page).elements].count("video") == 2
    page.write_text("<title>mine</title>", encoding="utf-8")
    result = run_script(tmp_path / "a", "--gallery")
    assert page.read_text(encoding="utf-8") == "<title>mine</title>"
    assert "index.html" in result.stdout + result.stderr


# Options, exit codes, layout

REFUSED = {
    "1 to 64": ["--workers 0", "--workers 65", "--workers two", "--workers 1.5"],
    "a number from ": ["--timeout 0", "--timeout -1", "--timeout nan", "--timeout soon"],
    "a whole number from 0 to ": ["--retries -1", "--retries x"],
    "K/N with K from 1 to N": ["--shard 0/4", "--shard 5/4", "--shard 1/0", "--shard x"],
    "no such command": ["--exec ''", "--exec 'no-such-command {video}'"],
    "No closing quotation": ['--exec "\'unbalanced {video}"'],
    "{video}": [f"--exec '{PYTHON} {{vid}}'"],
    "expected one argument": ["--polling-results-file"],
    "one way of the three": ["--all a.json", "--all --polling-results-file a.json",
                             "a.json --polling-results-file b.json"],
    "not allowed with": ["--dry-run --verify"],
    "--workers": ["--worker 3"],
    "--dry-run": ["--dryrun"],
    "--output-dir": ["--out-dir=x"],
    "--gallery": ["a.json --galery"],
    "--zzz": ["--zzz"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"), [(line, said) for said, lines in REFUSED.items() for line in lines]
)
def test_impossible_arguments_are_refused_with_what_is_possible(
    capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        dsv.main(shlex.split(line))
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert said in err.splitlines()[-1].partition("error:")[2]


def test_help_and_version(tmp_path: Path) -> None:
    helped, version = (run_script(tmp_path, option) for option in ("--help", "--version"))
    assert helped.returncode == version.returncode == 0
    table = helped.stdout.partition("exit codes:")[2]
    assert re.findall(r"\n  (\d[\d, ]*?)  ", table) == ["0", "1", "2", "3", "130, 143"]
    assert set(re.findall("--[a-z-]+|examples:|RUNWAYML_API_SECRET", helped.stdout)) == {
        "--polling-results-file", "--all", "--output-dir", "--workers", "--timeout", "--retries",
        "--shard", "--exec", "--gallery", "--dry-run", "--verify", "--quiet", "--json", "--version",
        "--help", "examples:", "RUNWAYML_API_SECRET",
    }  # fmt: skip
    assert version.stdout.split() == ["download_succeeded_videos.py", dsv.__version__]


def test_a_file_as_output_directory_is_one_message_whatever_the_mode(
    tmp_path: Path, cdn: Cdn
) -> None:
    write_results(tmp_path, serve(cdn, 1))
    (tmp_path / "taken").write_text("mine")
    said = set()
    for mode in ([], ["-q"], ["--json"], ["--dry-run"], ["--verify"], ["--all", "--verify"]):
        result = run_script(tmp_path, "--output-dir", "taken", *mode)
        assert result.returncode == 1
        said.add(result.stderr.splitlines()[-1])
    assert len(said) == 1
    assert said.pop().startswith("❌ the output directory taken cannot be used: ")
    assert cdn.requests == []


OLD_PYTHONS = ("python3.8", "python3.9")


def old_pythons() -> list[str]:
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [*map(shutil.which, OLD_PYTHONS), *root.glob("versions/3.[89].*/bin/python")]
    runs = [[str(python), "-c", ""] for python in found if python]
    return [run[0] for run in runs if not subprocess.run(run, capture_output=True).returncode]


def test_what_is_missing_to_run_is_said_in_one_line(tmp_path: Path) -> None:
    starts = [([sys.executable, "-S"], "the package requests is missing: pip install requests")]
    starts += [([python], "Python 3.10 or later is needed") for python in old_pythons()]
    for start, said in starts:
        start.append(str(SCRIPT))
        result = subprocess.run(start, cwd=tmp_path, capture_output=True, check=False)
        (line,) = result.stderr.decode().splitlines()
        assert said in line
        assert (result.returncode, result.stdout) == (1, b"")


def test_top_level_holds_only_the_five_entries() -> None:
    git = shutil.which("git")
    if not git or not (SCRIPT.parent / ".git").exists():
        pytest.skip("not a git checkout")
    command = [git, "-c", "safe.directory=*", "ls-files"]
    files = subprocess.check_output(command, cwd=SCRIPT.parent, text=True).splitlines()
    named = {file.split("/")[0] if "video_outputs" not in file else file for file in files}
    assert {name for name in named if name[0] != "."} <= {
        *("download_succeeded_videos.py", "test_download_succeeded.py"),
        *("requirements.txt", "README.md", "video_outputs/.gitkeep"),
    }


# --- The demo ---------------------------------------------------------------------------------

# Dunes, a mountain at night, the sea, a city, a balloon, a planet: 2 s each, drawn and piped to
# `ffmpeg -f rawvideo -s 320x180 -r 12 -pix_fmt rgb24 -i - -pix_fmt yuv420p -preset placebo -crf 44
# -x264-params psy=0:aq-mode=0:bframes=7:qcomp=.9:chroma-qp-offset=2`, without metadata and SEI.
CLIPS = """
c-rlo1z1$u-tcFJE=lR`k{B9680nHwKtPc$>5}e}5>&zg89GEjI;50RKvX&uqy#}hkVc$uHZ$kF-gD25^WJ;Dd++nS^YCY{+N<NY
{%dUz2*hgV?eFgB<>mqcK|sJ0B~VLWYf%?>aZwNm8_&hf%@+g$IlK5e*ns}*hqVd<;k^NYLBQXie&9b3^=rE#=x_cYsCbRMJuPpd
%-6hco~DWQm$9MJ1^w-Gek)xt@UQOF%4uuk?S*<W+B$oA|LF}NUVO~EkRcZvM@y7})y3x5Wfwt-1<0`b)N;<j#@X{1A74is+n+-k
q3mwzmaaC=wm=w&zl)=*9m+uE>v9_D&)MX(LHjY<c-q?iR19JtPiI!N86xB5ZRLzIS9^JT+58kH4`{T%QWZeK>p<!#gZeKH#M-Fv
tj>;Beo#sA-)ab2Bog&s3KdETYy%=j&V%UeQP0OO-1Y2NqJT!h2L4&d=@t8dL3j?IN+~qh6;BQhfS0MPygf0sO16U*5UrQ@X^sDq
L0S+H11c=4AV0eU^2GX2VX4q=_!xg;%oF>s*nbJf__IIcPrd7xa8$nv5BgO+WWNgkYx|$2%ZMt2^{>i6i+OsZ`~rTiSd=r6_<0aI
5?z##q6BCKBb3miga#$lC^>@>eUy-+gajj6KiM@w=*$6Tc}#dzom#v7R3<6F&&S3a=*<!?wx>_v$M$p2MfG-1OLuqYpL+qmBYJq?
+j-iex;3_ni;X494kojWivlBeRwrM$Jqv0&9iq3Me8fJt-F-Jz!uICgH@%H0b}9CU`p#OBSWz7``xY#13<g>eVtHC{k{kgwF14~a
cW$Y^UE?2Y;O3cn`?Fulc)XGvM&?47n^o4erXO-N_1ErlysNm^mN8vz5+s{rVC5ZnQ`-6bcGRLp*X`%z!iK%q#9hB(C8ualA=!yu
xsJCObJPsBP--ZIM)~|0$Q5(9IjrR^Ct>}R&%es_D%4h=;KN4W;-eI;QSjDgO#F31g}u7V$^xL#-eA{yA-8jH5*v^<W%sHGvck^~
&#~&BC3Si7-jzxvl=Ifuo%iLzn-Sl7c%#>ca)aYU*Vb)6gtDG+xPOf>zK~380*n<HoJ|Z#&vS;O97bDw-)co!0*;4gF>%j==^k&s
o&3<pv|=*KosNBnQWh=EFRmtb8VjYqEWm7m56)4{t^x(ZfVPFfFY+QuSri4+!)`-z+Pd7mNQ2m7zl*LM_H*%=(?=6DzsYzSv!>_o
t!!T#NvIciC!-++REQ@x8#E)dDDE71a+a?%>~^QG=pZUOB5;mnng9}#vvEcSn7CkYtH(%E?k`ItjR!)BudcgGyY99ws^?aCYp1Ob
zdv4KdviS9wikS;LT38OnilAJ1~7PZp#pa4EAk6vbozNw*lLwVp|ZEhrjoBY`v-u>uI8$~8`Zm})?TuFxqRf1Kq+DWE15h|=VY2?
>@msGv(}h5V>pRfMrn-XDq=-+wvK*|K>vp26jEpkBMI>5IaeO|T_E#X<kV{pNBK~KbGoSGkp#S}jGYPF94n;Dc|gaeKsl$Qogb`Q
-+-&yZ=+lZ!8zSEnn*|h<6E??2daq#JJF?}Y&tM_U(xVHDiYh#miS|D=uHjRT9SH1j;`#7hRB7FietxMCQ~6=X5Q~ewl{+PJ&(Rz
9_0SeFs*f?`>}ngdwCIMnB@d7Sj09^<eIKDFvegxA8Y!d!bpgxmKreN2*3zj$#^8X<xmzpRN`oh8Z3)|Yk2xC3-<lI5kH$Z3JiUP
nFE<$TWP4>Ck)L~LdERvy%%#|e-dlDu;C7-ZB?_64;e5X3{SGK@Rr=gL&6?TS7|(RI87D73+;z;ci_<K$I+q_Qm^?XAyrtGX3_BU
6btrU*=^FQ8vcT3>FrVv>MKYpHap--JkVW66$qyaW$EYYV<xbIshkZiS>Ow)*_a6S3koeTq1{h(6D2TUc_D@&9BcYzxjVo?tgPr{
;{T^SGO(-!AQ|3iB=)CTNafq)+_{QWJ)gq5i(jyCG6!y|iy9U^&iXc>o<p6adBjv^TE)cE!C^nfdfF_Aa#T!M#4NxP_4k;A^xwc7
=KmqgG5$v|NBBR<9I*c~=AhI=%kN^2rk|MOEV@_xqs;O5>}0=_J@Eg*c<}!>>;a4{Neoi}+@XMB2AQ9p<QR8KjGHE=PN*=P!GjVQ
#{U-<0m5<p274&{tJvcmhCMt_*@M{x*&pjB2Ljm<4VT!B?nFB(xNmvT=iYsmZfDleWxhyBx8TVXE1FujJ}(r_eLb|?Kvtml^Ns1*
{6weOM^ygh#HmCCwt?f=KfK&EmV9nLUFlnUlcAb1raNQC)by1;Xi79=QE`-KPK_}0_;o{+zlc1J8tL4V3x*OJ{i1YxJeq2V<_)+<
&wB0qMlLcx-DCgmomyFQ4eTG%8IP_mOe7v&`#?$WuN`r)`sqrtQds5rc9*5@33bEj)T801bG#z$ayLwN?iH!T8#r~XA;_IA&n<jR
>CZl~NDBY#br1F!roO1lR9)rfAj|1;V`CvKBG9M-|772@#%HaTn`v6=0jp?+{k5V24G^iV0G3;^o=`)wfKx=keJ}NRuj-IzF3L9x
r@kS=uu9h_^R-=*maYm9^|@PBj?5BG2##W5c?ZOGT@Yp=K!%nzRj8lus?Bwn^06y>H}_h?Wh*RWm{gKN)(_RkR)Iws3WKxOBAHd#
A*0!<Vy-I1(zwPCuf|&4wBA#NX@}MNomYzCUe<CrEY}zO>iUdzfJqU(0>es?`1!q(N25qGjm(qj5gsamchGRgRyxU#BC|1A@VD(B
lJ}dggvRFRbI1Ltctf9>TUq>x_0@Og6UXDc##cYM!XW#J8D65(Wf+_}D}V$`=nljI5Pga>*!nkua3Xf2)OD_tzIJs>Aijt1R$xEI
U)UnY{%lRDj=|vAWTMwKKb7oB$pB$P_F2&l=A;2ME=16vVzU&O2YM$A9$BaW>3bzGm6)`r1?{1V67}GeB82numJ??fDQ<FG7`{dl
W%4*y;)<DR?Vo9T)AXGP9ZdlRia|coZlR+oEYc4JA4vE45vBCeDt`wLs*X9&`c9R5kd?aaXg#qsXo-lwr0R{kOm<0aCXvS;*0lzV
EELM1qQQ#g7g&Esk1ky=mjVP=8#`cOiDiTLrSkiBU%oA?C+bwOYQ4n<Mh)7Yw}*zLK<vq*l|u@=ci8n_k<wk5Yu_RRGC~T=S*GZR
3Uxpjtg~>G710YZ4vHMWaHcnCbin5V_y|IMxhh~>zIKDIYL-QEjZ$TDk4>4EfT4mT?$)5jJr+F^-Dw{J$kl6{cfu0zeD3pIB{40%
YIXldV~dJC&^yRs2p)=4Fd`Vty`V#S@DkXSfDx)FU<2=0o~$cr!l%R0Ords)E<kQLU|H%#03$)D3EubzDqkV{%AG`=$ft>a$NHj^
I+tVqF|c^Z!?GN6(#LPBDkC9NuL$!{jidQVS~W;UT#4$_&D*r!+!L5GO}@plzud8~9(ZAJ%s8Teb<177c(hbD;2BU6V8m?{eqg83
OO7dWUFk&QSpwI|IaJZPb)Z1)evOR_4%l(>(KciJad^b&pK>iSubd^p!z6)sRD^zWDI&NW`{45A6<$G-%1gI4t@C!EvcwE8(0KL;
3SbkKJ51dlUCI4G87G*4C7TVFHGqOpWn+jc{Ty3uBSCz}1&K-5PHlqDQ8BBfXswBV0Et-s4M^nrAA&?5{|F>X{U?z~|Gx~0sIk%V
yO8L`Pe?@bx6$P9A<ZA{|1VX~u%MoL7}QC`gr)n*&h(QiCI;hw24hb`3BynRjz3`&(2FU41Cez9MTmrR8-qv;C`1Bv>}Ja>>o|9w
j$AB|riE>RIja{<htsi&x-)cPWg2P8>zo(q6q8~QBi^_sy~zR9Xtt?^55r$+i#-qI<Fmc8xjzsqT={fa$EWRt7TePRiw9g1JMU()
j@3A8B$6-1)J=+`NcZ_xL5XtW#a{E0_Na_|&T7Kp-8Qp=#8|0SJ%&t1c|-jlD11xH$;R@+6r66{f(T9dl38N=MrexR9BQkIyD*(2
<x($*L!@ZUI9PUFditI9ygvy~{ASwZy6CerX~YhP_H+$FVnoFuHcaoZue2Otwc8v$ZSCDBJUEQa9QsnTVPtSMKAJ+jsq>-C%i*xs
)CK2~DtGsBO<O*kxfw(fltUZpvW=y95|H*dEgTq5+NYWt!m5M2B+XBY{dTEked`!wKGsdrn}_nVu0e0bAI0hk7Hsww22yXt&X&{O
l8MyNCULbhd}#ap^4;ltGfQpfPqykWr`W3+PZu>neM8g90#HO846ekBB;RN)reNXZcrV?|GWBveNt`-w=@uI-T6nF`Fr2PWm3J|w
+`pjr;F0_pec?2z$E~?iliv?J4zG^zB|1wg(q9;EYv7c2J|;Tr>p@yeejgeT``Z46OC|nN?5vQ+ve1O{>}0NoxioR6Pt|3^Re}#~
d#qQLg~tvBK3Ofr#BO#c19Kx4EXV3B3;x5UKyHGV@V9uZmuEcyUEo=8PWb(JB!2ZQ1!1%BbB-|YcR0GX=#oS<3ShSUsFFl;4v(uL
$z5OeFnL{>hrt+Q5L-Pfwadq{G|>tfUHsy1GMQ_au_`MJ?jCMde@zh>d`Std+aUp~bAYC4J}3lxcwFyG=ccp_R^jz0Df4Txv9Kp9
)i3NfrAr+q6rLWfmN9o}mH#%$A{?W3(N#m5>xsh5d3nKaD|>tAQ=g734jvU=1r$4Uu$)4urZAGYR?6J-LR754Fy4V3y|ugAXLPQ+
8saffL4Z~Wp^Fd!gZG_kVSpmArpDRJ(c!#@@Y6o7JSNBX#OqFL6-kwGHotB9`pTPy>-5rwD(XDB36Wg#AL=747_!>dtmIUU{7F0B
w#=J}WD{r7FDqy#))o}FRj(e?(_AEyd3^Mcvh4<i*6cTe(B;Rij5R&M6xuNd!bjpHsrQl}u7uE_o8cq0AIgK|VuKcCxCggzJ`6pN
p)pjx!5SK8F}kGx$@p!w`e=%Uuz`%6{EUv=XTN!WkYvJJ=8sk3`bkcB;l()&=Po=|oQYtc-fndp-!_qJuV#$zW^hu=U3}bZw1A)8
D<&q}mSMN=8XUglg3uzKY^_!ONKoc1{{FHP4fU6)3H%5?`$fuXVW`z^dISDP`faRiBlk<jx=H>PLzP=aZDx!)Y_EX1|5O1b%Y!6j
tPFWTRkNjA>ag2Y7>41wpQ`>Ry_79RFLf44q&#gqW>~SrF<o3NQ#SC(OG+`%(;AdBl;atmLrO#0bgy!qTvUBBK?G6rfRT1<_g!gw
{sSCSNAZePeE$%_^W2X#9`9>N4pzEVc9`?)t9g~nu}j@Iv`Hl&1u*j$wH5AsaHCOXeAus5SJ(ffx*~kyv-%(uZqldkz{^&M17RWe
;CnJ-7Gv}9JYFDs`s|Q_Q1E{H%6)c?&UC}ikBbGGUP$^~WM-oJ#6%5;I1GKRBYCi8gx6mgGQ_8%u<r&V0OtEMX!RB~#hj9o=0Bq1
!gBln&vTIW{}7&&`~!FnJpa$}960a4jOW-2(ek@^j@J4w!v3#RNPVcMGKOc&QDTY`GmHQ%a|I=rQ6i108ekAAp+o~?2Hw@dbRGqa
8(_YG61l(RBP_(fh>!3+FnrW?%14|K7VnHzG#-I1{H+9bQpEXal=udXxg%aNUrDy|+yUzq)_nzW)JN`aWX?0bKFn?qQY?x}Q*3aP
24`HrAq(7)pnk+nb299@nB=~IFNNnj>eg{ZzemP!BUF0Su1spuE87SmMC`_Sq<<-Cw&Q8C4E|NU&-w522HniJq=VCf3sak4RToA+
>5A%#^EbJMaBYWQJ`Qm@X;FP}c!+Oy6@F2KP4;6{p;30&#E+mFj^4aYGe)TkgJKj8ksF3sI*nm_EUJOT(?gB*%jf*X4t$6ob!Fq{
&qv`uYbB@MK1aM?ibbUP^+ns6iA1^O#vkiQ+ZKrL`c6&w)iET}O(}2r<orHl3wPI|bI5cr|42XD1_xi4h|W(Uf7UnKb;+kX<g0^w
7C)0$#)=G$O?{M7_t@F-*I3739=+O{3Orc`iFzS2*^wfsAMZ&Ff$Zq4PH%|2RzOliRO9+NtBAI4<~VT448Oa98Le2!UdF|b^;~wT
2(@;)21z^7`c=rd^=vaGsaI^Yin;qvNEP0z+%DBzaFeJ4#BmZdwD~fNZ}DQat-kJxcRFfj$HPlY<i8{6?ROpMGcY)7O$P&Ab>zLT
P#I0-Zn7I&_!R*cFTk4|D4(d`B9DLhwDuy>9K2P!GJCzlgMr$Gs-d@cbY)CBVYYJkOX=z20Eh8bF%S<0dv1CjlafBIyHO@P4*tTk
XD88~KKg#)Xu9n9keqm)wx<wRstYIfoWSAaxVFY}%i@uZgnO57{oaMlJY+l4z-H$Qsg&N-mt3+B)yh!55gbo$Knr6EgIhkXBJtxy
5U2PsD9xYQ88M7^0KHKP8T{r}6h38_sS+F&#y`>&ROISq#!1uH&aP8tdOw_|`SX>Ag&&^e$?sbAV0!E=hWV;KV-yi1`*V37Mr@xi
-OdH(K^Q!OQvgX~Up`EvaI-5T%&CWRiS|Uy!L6#XCdAjR!d_Hp;nheLUt-uviZlba!@DTTkA{BQP2bM-Jjq?Sf3X6aF9Evd=KN|?
aujE{BfqqM=#Y^B6|*r6o?isSY@hWxzxa8$;mMNi-C3Ejb{%kpWBK(+vVnnQX?ede83&RnxfeQXnH4Hi9%{{5%E6q?Lmn1=xUlax
6&0^@$I7#?Kt4;WWw?hYHOt~xqoeM^38i4O-eG+{7-r{tQhD)<Wrr9EDerfkwXzn~iB?9RXlS&&xBD#nRTk?PGjTd~<A&K_{V_22
K1FhR-@$mdLhj<q``*B3Y4_q*ygTnE=nywPL!X{5Mu$>pTvxA)Tr_bdmt*h7eP>Tz{91GLd0+9)v!@_WN(epuISm`|XPj8`#2DP}
L<!ya4-eBy3pi(@8ee#QdFq^X=H%w5%m=_O5SE3F6G}2rePgd!Ufzj7)c9e&V##c7`mhTFC7&bwcErmG%`aZQVEYQ)S(1X%!(e1P
P29x_DtL6Kb0)?4*n>+o4|}gejRQ-_jy>Ag0UFeWWpPG_lFTHea7arX_rjaSUaCK*d69=xM;TNxez;BM6cVQ~T%~k9Gn;?z8?q*2
OxAM@Y5(?v9GB0X$=l2YW8aU4h%zV5Z|>m_Me`T~cL!iuDyVEWmUS`N9hkOGAfsL1iVycLq&Cf%DM}VRPe=(CG5=f;Y(HXeRAj^X
$&Y!i^$?hdVOh4(q2wbwvXl=WKwn$cUMuKT(CR+$i@E`G81x%3V}AoXw26Dw8EW8hpc+|q<xz>l^>EXXP7{qdnQxiAo~7P#lV}ZH
3@ZKlrB*zKhBG{4_q^=5z7gD&(MuKaIf}1QI5R%qx#R<T^n#Q9Ih%<szCzheErkIw|Ew1gj&Ok26ku7!sAj84jXRlhoT2lx?QmM|
Bq#g|o9mXJ2}+V{KZ96)^XbL*TIATkOM2FEZyo8R5D^!Opy68=^xmBZ76cVoRv)TUX+zy~ADfrrzNmHpUDd1JB2x+C62>E~cBQw|
DKXN)$!Y@&x%+#YQa+T>Q%b*<(#4pqI|0(gW0L+*S=-)+F3d`FD1iX3gPBo8BX+Z4xGyv;Lf5JBe1yP=%q|uyJ_mLDr%xbo#KkQ|
?Y=6R$j`^B1TYQ+tKe;$BJ{L`j}uBX_BAFpNTRgGf<!rQ&Db@u@lK<l`P&3fm$L^QX`u1mP*0~ufwyZ1lH?wK&80*U(T<{OJ{jKK
`M^@B0fX~Khf+d0N;G9~+(Mf^T)0N(#UO~KQS|uG%gGfdWIf4YL~2bq9{cT^5#edp7F;4TN9r3Sn|TLkW67V+Ml~e7^&m)&O#^CI
4hGjiRSlG*6|3CZ2<Q9liFW@3Gxe$~LjB!=cOn&n+l>Rp_yV5p2yQRymTyKzeIvZ`<-|_PU0Aks9<7IVj1DFI`t`NHWgeE&h}x4U
IrGxKh1S?td-6kmq-iBbMM5KF9_3P4zO2jZcjm|L4XHh|d{gOYpZc^y;qf@3#9T{S)0y5kpN8g@jY48~E4<UK<z?;fzU^9F9rPf_
74z=7y*QOLzxS3vcl3R_Nm`?UqQm#nYv}wx0xDw=H{i?hlDg}e?Wknu?h0DYuDKfB==4#8K7A~8?E$rBi|3Qz+|3rUw~CUVJ~VbY
s5q(vd@c)v51`6Fc&S5+L(|#Ek!Sqq;Kt>_<W5S9@6?djp!Y79XsN89DMC~CLg^@qluGAg*F49cdkvpy0VoCrUq_X`hU<WoE~Ug$
FWbkkYOKLbPMMTHN-EP3-ZDmcmY|DKF76SfyU6_(KKi^wVRt3kb~e!eU9bDU>vezdK7f1`Eq~PYx<Ava{&Xb%dylmLp8wxW_xJ8k
G%-iq#F#w?3FeBN0_J#I8}mM(by35ZDKT~#jF}wcE{i!P7r{I!|H$ig5t#jnD&~m$Aj`=H5e9UGvzfx7Ue{T3yvlz(*;uARp7;kx
Nk*59TJ_d!f2u-;iX3(46X0rD3`TcI32v-kX!e4?2aSO6Z*4%_o<MWX7mUC!@xLOl!Efl5Zc3lWD<59*$*6)5lyqe=QtdJ&a3GYR
?rJ!%?;A!d$w7<c0|F$LR>ty&5)Qw{2R)!VXq*Dm#7bVoT|OurmDPk8(wwPfd6N+FB0_8Ib=uSUyNkkmhaqnktTUciupivW%CWR(
J3nkb&cC*MqFXxiKr{D73$xoZ6{u%S#QX<=?Y1Beg@;vLZ^j*s0{hR)%G}z2-%~K0YCFB?RCEZg*hx=owB>cdZq20@Usdy&B;&8R
G1L}(+{CY9SOKl4A^bt5O`{;{ks?JoreOHEjpk{f_GgQhft6K+M_6YnM<=S5v9M~<$JT6ONFEapdCSD=HR}0*w4+Za!%JnLbc$k^
>4tgOkGyBKtu4{YFGiYsjw$OMT@-(HA5R4azgUXo?S_g+EX=Ef)0CuQ=U5NZpV4$NsXb&Jq+pJT37F=Bsn!>B8?TTFLU+y@FxEXN
#3tO`o|AF1yO~D)OrixiawLG|Sf-uD=%k3jIT2DQx)vU%-f2TGv5}{`R@&9Q2wjh<oR97rDfez$m27S~NjPka551cG;eD4uGa@q2
H7t1_*=?R3vpak4+s;v@DEiE~plGK)70KgaAhge?0fCh}BdX@+&)MNC5q^#zDvP?Euvhp5(ZW1gUMBIu_ssQ>(NKVw)nV`+mZHaZ
ki7SDSPyY;uD(mGy51qw=Cq?Mbmx|`Wep<6Tb_6Pf#eX5Z4u`~yNBw0RkZ`5x}nEgmI*j)j_>Oylbd|I@vG2k&Ls-qo*MR#gZ7rW
vlXh6g1{by9E`xO(L_>jR@dJh)ww<04eZ^NU|D!v!xPG(y!Rs#+Dv065KdB9C;Hq4Zf~h<nCdS>K)AO#mgbR)IuY;F^ssJ$!p}|$
&crya2MA2u^U$GX>kbM#O%uUQ(Jw2E#9qo7uNa|k2~3@2MIZU9q{kz12q}$>Bpl=X(b-VNWFzOH8ykcLeORBRajGEZtBXh|F#Q@Y
{n;vRqSRoqh)lhSJWe;8i?(7%h8mBIdFN61m$(fRj(0>m)u)H+2nPy4rwdt6zh8KyetLe7h()Cd`IZKW)gJ*e2S&u9Qsm|{D?XB=
H}_QQ5xod(tt4St@qludcMi!{Z6K5o7s)Sgr9HZ@LX{vOq9*gwO>glF_3S7z>68DHrGRJLR6W@%nWSW=*B=mNcQug^(_44GqO5|j
tn#9rhC*Y3HNQvuDS9&r-vdocBpmjF=Y3bBS$UIa+8m+AK}-YoCE>v7I}r@gf484svIDKJMOD%|R1--&H~F3PxbtcFKcKjr`!@iK
(0>T96#o&xqW@0<3;BN;u+Tn6%kKh~xSxQ96x{><8nAHw3=qHc6s*6zTlbrH>Hgk#1HThQAiymcLyRI65N6CBeIS$k!1%=+ECaB@
jk)vBg!u-58so=_Ieb5ld7lFVGi1L3BBcK!5Wy8gg9xMtP?X+a!A<Poc-L{oa)A}7OE9*za+7Za;e^Tiej%r~P?tAOQ#6*Yy}sW0
VGhD`YdW?97i`Pw$abBI`P{!e9i+;<Pc!(YgP{i7S$q5{d*tLS**8-5YgZ%-kR{1;c^NsfgCNldtH`a1{42(GAw&d@j9WD`DlJ&o
D`;7oJLhOZ?#YO<C9=rXabCHz@!IV9Mk4RyZP_i~J@5(7M3*^)U;`_F(|>y7+I9o2Ec?0PizRR7iRUNtRH&pQC#^%y!`9er!yDwr
rS;sFe5hPEKe-O11~q^*FI69yhis?M#*iJ!z6}j36`qq|T*IQiC0CWn<Iw5R-<2%ys%=6)3m$Nd%O}A(%c0+#-nM9+WW~L)^>}>B
OG{joJH?JlmDy75`nBXFwX)h_=ITmq&D^|}opaD<1K*2YXLbWMChdC|58kXdGPhx7#h<0UZm&voJ;hS>LUQ@&mo|~n_eCDm8FwaW
c$G=6I&Ie()cr6>3mzz6f4j}STt|cGh%k~=23xi5BA$cJi1a;gSb6ZIoT886hvGq>O*}ImOpEbm_E^DZzp}?^AMpFU`Sz{YBiNqi
T*uw*Cc?7_CcJh}=i<Ow%NmFZN!Z=WgBo7nF_!PF!TdsHQ?UCwvXvTlb0rX3op+;p2L@|R$VWf0`!N}R&8N3YE6_Hd^6_n@qisty
B%B)KZ<*0bh-YZNCB9FFWi4@GM$YE*m^p}@@|q{l4)>;ChV<HNS@>My@H2LZow~?GVC^MtMic@-%XM4=+B{c9E3{NyYhsA>mdJ*9
M91sg_(<lanwV_xK2KC97j)$sRQV!VE^FM%hRM$?a=S*#94YA)zcy{(o)?YDS~Q@Li#n!z^=_CYvTpVk1e6&c*Kzrzn)zmuKl2Ch
xMr>;zqLbQMOo&$ZX7<_WfrpakzQygND$bF>jSFd8^T>aw?^@^K~F{GsZJ`Zy8Zo(CR&<1IYeT^j(Q8dlcs8t8)5eLmI4HRVm<RS
kB$?Uv&+&_K$OF3?#ZQv>4NdaM6YLP+aB%(O`fXV;4t0}sxMgkamlI+jVz#ayO-kU-Lw);-pOw&w@2(PiB#Ufrow7qKsXM$Hl!)R
sf?eY-?I|zAivZWY|5nvRSFX{HOH<HHwPn;4;-^I4zgcg4ij=4NH{Va%-TWVlZHhwYY;sIrUh_Lc!mIyrB2G|>G92%F2>tAc(-j7
W0`BhPjBeMV>nSDRFg52HPp~sw<I2Yv3zIj3xoI8^Mu38TlIm2qRYLj+caiF)4Ps$Bk2aTBULYYRf0~}eazPwSe|``bSK37+jvzB
HdN5r4)-J(<BvvWz)Zpo&UxMtk0gF9yX?-!4NhX?CY_4=K@`PVXzoI2QX9;tb#)+Y!2=bN7o5{2i3+KksXd3JO1d8|y_csXNl?Un
$Cy^#Bgbuc)?3!Y!fgCA`Yr<SSqJt^>I-AezWt^CLF}U-fR~}@gM6&Om+!LEq{*9?1)ztN>R8?BIfse_RkAG(gvgx*n{n*b?rFxL
h5B$P4A{G|qrU*b3LI1%QXWINBoF>5R(BB8$uoBBqH+q!nBrMSe@oH>#2ti>Q+c*kx@EdT>hzKUychUhBourjH9kQr9w*p;ev-8n
e>VK|dlmR9b9!q65~51zVjz`a&|*=hOAYu?zz}$+mmhJyr4EMBgLjIfPs@eiK_!86{KzC&`|9rdI(z2JgSn?woyA);JjO?Z#OfBj
k=H|VVqY4c`3OO6ozGK(7t#Vu=#;Q5t(^2S^(yQ-8Ido~PUtjdWlldaLO7kKL^t=A7pEm;PY!Y~V=DA;n9-Y)J5gD{`MojNssNI}
{NZaulT9juzcw9#R6L)1+IJAQspFA!d*aj~W$`ZWDeb^@+=7ZnmuG=_p9STc4){Ww1MXAQ>Fx8@>BYBC@l1Xt{6R5=t#P_zLBylV
LswNdxfq7FCqOaw@c#!njSK|
"""


def demo_clips() -> list[bytes]:
    """Return six small MP4 files (H.264, 320x180) that any browser plays."""
    clips = zlib.decompress(base64.b85decode("".join(CLIPS.split())))
    start = b"\0\0\0 ftyp"
    return [start + rest for rest in clips.split(start)[1:]]


def padded(clip: bytes, size_bytes: int) -> bytes:
    """Return *clip* with a `free` box behind it, *size_bytes* in all: it plays the same."""
    space = size_bytes - len(clip)
    return clip + space.to_bytes(4, "big") + b"free" + bytes(space - 8)


DEMO_VIDEOS = [  # name, theme, prompt, clip
    ("aurora_sky", "night", "green aurora over a frozen lake", 0),  # its link is dead
    ("desert_dunes", "land", "low sun over the dunes, the camera drifts slowly", 0),
    ("morning_balloon", "air", "a hot-air balloon rises over green hills", 4),
    ("quiet_sea", "water", "sunset at sea, gentle waves, warm light", 2),
    ("night_peak", "night", "a snowy peak by moonlight, clear sky", 1),
    ("morning_balloon", "air", "a hot-air balloon rises over green hills, second take", 4),
    ("city_dusk", "city", "skyline at dusk, the first windows light up", 3),
    ("ringed_planet", "space", "a moon goes round a ringed planet", 5),
]


def make_demo(cdn: Cdn, bytes_per_second: float) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The rows that the poller leaves of a night, and the videos of those that SUCCEEDED."""
    slow = Reply(bytes_per_second=bytes_per_second)
    faults = {
        "aurora_sky": [Reply(status=403, body=b"<Error>AccessDenied</Error>")],
        "quiet_sea": [Reply(send=550_000, bytes_per_second=bytes_per_second), slow],
        "night_peak": [Reply(status=503, body=b"", headers={"Retry-After": "1"}), slow],
    }
    now, clips = datetime.now(), demo_clips()
    times = {"timestamp": now.isoformat(), "completion_time": now.isoformat()}
    rows, bodies = [], []
    for number, (name, theme, prompt, clip) in enumerate(DEMO_VIDEOS):
        bodies.append(padded(clips[clip], 750_000 + 90_000 * (number * 3 % 5)))
        file = f"{make_task_id(number)[:8]}.mp4"
        cdn.add(file, bodies[-1], *faults.get(name, [slow]))
        dies = now.timestamp() + (-3600 if name == "aurora_sky" else 86400)
        more: dict[str, Any] = {
            "image_path": f"video_queue/{name}_draft.png",
            "target_filename_stub": f"{name}_video",
            "video_url": make_jwt_link(f"{cdn.url}/{file}", dies),
            "seed": 1000 + number,
        }
        rows.append(make_row(number, prompt=prompt, theme=theme, **more, **times))
    others: list[dict[str, Any]] = [
        {"final_status": "FAILED", "failure_reason": "SAFETY.OUTPUT.THIRD_PARTY"},
        {"final_status": "CANCELLED"},
        {"final_status": None, "completion_time": None},  # still running
    ]
    for number, other in enumerate(others, len(rows)):
        rows.append(make_row(number, **times | {"video_url": None} | other))
    return rows, bodies


def demo(home: Path, bytes_per_second: float) -> int:
    """Run the script in ``home`` on a CDN of its own; 0 if it ended as it is to."""
    gallery = home / dsv.DEFAULT_OUTPUT_DIR / dsv.GALLERY_NAME
    with Cdn() as cdn, tempfile.TemporaryDirectory() as directory:
        rows, _ = make_demo(cdn, bytes_per_second)
        results = write_results(Path(directory), rows, f"{datetime.now():%Y%m%d_%H%M%S}")
        options = ["--workers", "3", "--gallery"]
        print("A small CDN on this machine stands in for Runway's; its faults are on purpose.")
        if (gallery.parent / f"{DEMO_VIDEOS[-1][0]}_video.mp4").exists():
            print("Videos of an earlier demo are there: delete them to see it all again.")
        print(f"\n$ python {SCRIPT.name} {shlex.join(options)} FILE", flush=True)
        command = [sys.executable, str(SCRIPT), *options, str(results)]
        exit_code = subprocess.call(command, cwd=home, env=script_environment())
    if exit_code != dsv.EXIT_INCOMPLETE:
        return exit_code
    print("\nExit code 3 as planned: one link was dead. A rerun would ask for that alone.")
    print(f"Now open the gallery: {gallery.as_uri()}")
    return 0


def test_demo_leaves_videos_with_metadata_and_a_gallery(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Cdn() as cdn:
        _, bodies = make_demo(cdn, 0)
    names = [f"{name}_video" for name, *_ in DEMO_VIDEOS]
    names[5] += f"_{make_task_id(5)[:8]}"
    videos = tmp_path / "video_outputs"
    for new, old, said in ((7, 0, "Resumed at 0.5"), (0, 7, "an earlier demo")):
        assert demo(tmp_path, bytes_per_second=1e8) == 0
        out, err = capfd.readouterr()
        assert f"downloaded: {new}\n⚠️ Already existed: {old}\n❌ Failed downloads: 1\n" in out
        assert "1 FAILED, 1 CANCELLED, 1 still running" in out
        assert said in out
        assert {"403", "expired", "RUNWAYML_API_SECRET"} <= set(re.findall(r"\w+", err))
        for number in range(1, 8):
            assert_whole(videos, names[number], make_task_id(number), bodies[number])
        files = {f"{name}{suffix}" for name in names[1:] for suffix in (".mp4", ".json")}
        assert names_in(videos) == files | {dsv.GALLERY_NAME}
        assert (videos / dsv.GALLERY_NAME).as_uri() in out


def main(arguments: list[str]) -> int:
    if arguments != ["--demo"]:
        return int(pytest.main([__file__, *arguments]))
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the script
    return demo(SCRIPT.parent, bytes_per_second=400_000)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
