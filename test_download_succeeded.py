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
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import socketserver
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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import responses
from requests.structures import CaseInsensitiveDict

import download_succeeded_videos as dsv

SCRIPT = Path(dsv.__file__).resolve()

# --- Builders: whole MP4s, rows, results files -----------------------------------------------

# One second of a test picture, 64 x 64 pixels, H.264: zlib, base64.
_PICTURE = (
    "eNp9VH1sFEUU32uLlK9wCMZGiYxKQLB33ftoKQ0brym0pwHBCBSUZp3dnbtbb7+6O70PRNOGqJggNJL0D0RSIYQUISbI"
    "RyRQsWq0pojBaCCgaKICUUARkAByvtm70gORzc6837z5vffmzXu7HMehGM1aqmPqHFfCMQkjiFNyQLfCAY4rfUE3zRTH"
    "cZqeSijcLU/paXd4OPYOPZ5bWbevI9xdnxJ436c2TgJeRpNuzNL/emOx7x7njnEjNw8wmSjUATmRaA4dsmB+vQXbkqm6"
    "omIASFduzz3vaNGn7sKXUDR7cCelKqSYuRjWZhQbikYYx3NEV40YgAkp3XVafMzJSn5vomKTWFEao9tsDeWx5y2HShrg"
    "Poc6ShFnJyva/1wFO2uEi4KMDjJGzwU+0lQpE6wJ36kQFbkczLXAavAo3MjcT9wDcZDb7bLZUw7OZkUpY1NkVrRrXLuH"
    "G5443dAR3ln5z5UrzNprYccqnISNCRK1C9f88JL84Coc6pZg8MTl7gtcyKxYz0atPMQdltd5C/uRgqwotE++Pwq+JoIv"
    "+TZf5QUZhr3lRRmDvvQgKzeMsezW7zDgbLJZ1C6dIIU2hbI2qdaJK90ki1sC2sjGlqUVX2+5mu+78phNoF/KQrqCKev9"
    "e4blcu+dmHPmwK/Honu7Ko+iY4+eO8+KhHxINm2CAgDtED+zGkmYkDDPw0bUD4SqeQvmNPnCqH5xAzAVIsNGg2llNRKj"
    "KMjzIV+QDwZBmaDUqquqSqfTftatpoYNv2nHq1gUf4LqGnBMi6qm4dQhGUtYFgIIOlII1CCFSJopJ4VAHV/HI2xgLesQ"
    "gc+E6vhMIBRCOhHa9ARy2iRAAR5ZThaMYRZtRQj4ebCCCelqhiii6xNMRBsbcSIEw0hO2KaORWaLqE00TXWEIKrN1Coy"
    "BZXcqgs8nAEry00DDAKVgQCKYYeKlpNULcbIO2i1RDMWcwgVfEFEEzZYMEeaaSZxAhbioC6AHE2VyZCCR4btxpBVHVN2"
    "DtWgxNYwkEAvaW02zoqyqVuYwlqGS4LflWqACyDamHFiNtaJI9QiSbSygFUFYksiVrBFXSSpmEWCviCQVwiliRpPUAmC"
    "mRYxxLhpwW5eaYFBkmTBtxCs5gtQhJ8IuHdkYhC5jQphHrnB2Y3axEmAtS2LN7MVathakO0Y0uFDJCwrWAjhaj+PWlku"
    "Au8HTqvF/LoSZ4SamQAcSiwhjFQLagQdASWEWLgV6s+KybXDZzCCrOrgxucGvtzQMuZY9pdFFzdM/6pxbfjGPJ9krF/3"
    "zQf0jzWHa9GLe9pXnNkcjHyUuvzcFvni2kO/9+nmpLOplpVL+5vq8H0H+ldMLXv2wrvdnQu613SN/25xb3psT+bn5qDn"
    "675T2/rnpsR7E0++sv9vzTtqy8KWzLVTT0UI2jU/i80HG+Lo+oUdfzWf711dP7JzVLBq86URZuOfY23PnpHHv93ubUxP"
    "5+6fkV7n3/3Yiau7ejZ9aNXPfOf5WStOcttamn/YN8H2Dde9Y5ZVNXV+f+OhJee2pTorpi3sr/zi9b3JH7d2X572WdfJ"
    "zkde+3z+MHLNbLr6+Kyt/K5XV+rXB/bse/lo3/Xd3ZeW4pesU8dzHeyHU7++/Oyqw6t7xSPPHCp5ovmN32qe/mRg04z+"
    "/b3JBbA/qn6jNz5uUs+NJW9/zD5/z8aKKasO97QXcCPgjgJ+MzqEdxThQwz/C4FsApQ="
)


def make_mp4(seed: object = 0, size: int = 100_000) -> bytes:
    """A playable MP4 of ``size`` bytes; another ``seed`` makes other bytes."""
    picture = zlib.decompress(base64.b64decode(_PICTURE))
    padding = random.Random(str(seed)).randbytes(size - len(picture) - 8)
    return picture + struct.pack(">I4s", len(padding) + 8, b"free") + padding


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
    bytes_per_second: float | None = None


@dataclass(frozen=True)
class Request:
    path: str
    headers: Mapping[str, str]

    @property
    def range_start(self) -> int | None:
        value = self.headers.get("Range")
        return int(value.removeprefix("bytes=").removesuffix("-")) if value else None


def make_etag(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


class Cdn:
    """Serves objects on the loopback address and remembers every request."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.replies: dict[str, Sequence[Reply]] = {}
        self.requests: list[Request] = []
        self.connections: list[Any] = []
        self.released = threading.Event()  # ends what hangs
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        handler = type("Handler", (_CdnHandler,), {"cdn": self})
        self._server = _QuietServer(("127.0.0.1", 0), handler)
        self._server.connections = self.connections
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

    def next_reply(self, path: str, headers: Mapping[str, str]) -> Reply | None:
        with self._lock:
            self.requests.append(Request(path, headers))
            count = self._counts[path] = self._counts.get(path, 0) + 1
        replies = self.replies.get(path)
        return replies[min(count, len(replies)) - 1] if replies else None

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Cdn:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    connections: list[Any]

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(client_address)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what many tests are about."""


class _CdnHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cdn: Cdn

    def log_message(self, *_: Any) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        reply = self.cdn.next_reply(path, dict(self.headers.items()))
        if reply is None:
            self.send_error(404)
            return
        self.cdn.released.wait(reply.wait_s)
        whole = self.cdn.objects[path] if reply.body is None else reply.body
        status, headers, body = self._select(reply, whole)
        if reply.framing == "chunked":
            headers["Transfer-Encoding"] = "chunked"
        elif reply.framing == "close":
            headers["Connection"] = "close"
        else:
            headers["Content-Length"] = str(len(body))
        self.send_response(status)
        for key, value in (headers | dict(reply.headers)).items():
            if value is not None:
                self.send_header(key, value)
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
        for start in range(0, len(sent), step):
            piece = sent[start : start + step]
            if reply.framing == "chunked":
                piece = b"%x\r\n%s\r\n" % (len(piece), piece)
            self.wfile.write(piece)
            if reply.bytes_per_second is not None:
                self.cdn.released.wait(0.05)
        if reply.send is None:
            if reply.framing == "chunked":
                self.wfile.write(b"0\r\n\r\n")
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
    process = start_script(directory, *arguments, env=env)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_script(
    directory: Path, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=directory,
        env=script_environment(**env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for ``condition``; fail when it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def make_downloader(output_dir: Path, **settings: Any) -> dsv.VideoDownloader:
    """A downloader that does not sleep before a retry."""
    defaults: dict[str, Any] = {"wait": lambda _seconds: None, "timeout": 5.0}
    return dsv.VideoDownloader(output_dir, **defaults | settings)


def assert_whole(output_dir: Path, stub: str, task_id: str, body: bytes) -> None:
    """The video is there, to the byte, with metadata of its own task."""
    assert (output_dir / f"{stub}.mp4").read_bytes() == body
    metadata = json.loads((output_dir / f"{stub}.json").read_text(encoding="utf-8"))
    assert metadata["runway_task_json"]["task_id"] == task_id
    assert metadata["file_info"]["sha256"] == hashlib.sha256(body).hexdigest()


def names_in(directory: Path) -> set[str]:
    return set(os.listdir(directory))


# --- Builders for what the script decides upon -------------------------------------------------

SMALL = 2_500  # bytes: about the least that `make_mp4` can do
posix = pytest.mark.skipif(os.name != "posix", reason="no named pipes, no free symbolic links")


def make_task(number: int = 0, **overrides: Any) -> dsv.Task:
    return dsv.read_rows({"task_results": [make_row(number, **overrides)]}).tasks[0]


def make_metadata(task: dsv.Task, name: str = "x.mp4") -> bytes:
    now = datetime(2025, 6, 17, 4, 5, 53, 806609)
    return dsv.encode_metadata(dsv.build_metadata(task, name, 941873, "ab" * 32, now))


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


# --- Results files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "latest_first"),
    [
        pytest.param(
            {"20250101_000000": 9, "20250103_000000": 8, "20250102_000000": 7},
            ["20250103_000000", "20250102_000000", "20250101_000000"],
            id="the name, not the modification time",
        ),
        pytest.param(
            {"one": 2, "20250102_000000": 9, "two": 3, "20250103_000000": 1},
            ["two", "20250103_000000", "one", "20250102_000000"],
            id="without a time in the name the modification time",
        ),
        pytest.param(
            {"99999999_999999": 2, "20250230_000000": 4, "20250103_000000": 1},
            ["20250230_000000", "20250103_000000", "99999999_999999"],
            id="no such date, so the modification time",
        ),
        pytest.param(
            {"night_20250102_000000_copy": 1, "20250101_235959 (2)": 3},
            ["night_20250102_000000_copy", "20250101_235959 (2)"],
            id="the time anywhere in the name",
        ),
    ],
)
def test_latest_goes_by_the_time_in_the_name(
    tmp_path: Path, files: dict[str, int], latest_first: list[str]
) -> None:
    for when, day in files.items():
        modified = datetime(2025, 1, day, 12).timestamp()
        os.utime(write_results(tmp_path, [], when), (modified, modified))
    found = dsv.find_results_files([tmp_path])
    assert [path.stem.removeprefix("runway_polling_results_") for path in found] == latest_first


@posix
def test_results_files_are_found_once_in_each_place_and_nothing_else(tmp_path: Path) -> None:
    here, output = tmp_path, tmp_path / "elsewhere"
    for directory in (output, here / "video_outputs"):
        directory.mkdir()
    wanted = [
        write_results(here, [], "20250103_000000"),
        write_results(here / "video_outputs", [], "20250102_000000"),
        write_results(output, [], "20250101_000000"),
    ]
    (here / "runway_polling_results_20250104_000000.json").mkdir()
    for name in ("loop", "gone"):
        target = f"runway_polling_results_{name if name == 'loop' else 'nowhere'}.json"
        (here / f"runway_polling_results_{name}.json").symlink_to(target)
    for name in ("runway_polling_results.json", "runway_polling_results_1.json.bak"):
        (here / name).touch()
    assert make_downloader(output).find_all_polling_results(here) == wanted
    again = [here, here / "video_outputs" / "..", tmp_path / "missing", wanted[0]]
    assert dsv.find_results_files(again) == wanted[:1]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(None, "No such file", id="missing"),
        pytest.param(os.mkdir, "Is a directory", id="directory", marks=posix),
        pytest.param(b"", "not JSON: Expecting value (line 1, column 1)", id="empty"),
        pytest.param(b'{"a": 1,\n  b}', "(line 2, column 3)", id="comma"),
        pytest.param(b'{\n\n "a" 1}', "(line 3, column 6)", id="no colon"),
        pytest.param(b"\xef\xbb\xbf{]", "(line 1, column 2)", id="broken behind a mark"),
        pytest.param(b'{"a": "\x00\x1b[31m"}', "(line 1, column 8)", id="control characters"),
        pytest.param(b'{"task_results": []} {}', "(line 1, column 22)", id="two documents"),
        pytest.param(b'{"task_results": ["\xe9"]}', "not UTF-8 (byte 19)", id="Latin-1"),
        pytest.param('{"task_results": []}'.encode("utf-16"), "not UTF-8", id="UTF-16"),
        pytest.param(b"[" * 200_000, "nested too deeply", id="nesting"),
        pytest.param(b"[]", 'no "task_results" list', id="a list"),
        pytest.param(b"null", 'no "task_results" list', id="null"),
        pytest.param(b'{"tasks": []}', 'no "task_results" list', id="other keys"),
        pytest.param(b'{"task_results": {}}', 'no "task_results" list', id="no list"),
    ],
)
def test_broken_results_file_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, complaint: str
) -> None:
    name = "runway_polling_results_20250617_040158.json"
    lay_out(tmp_path, {} if content is None else {name: content})
    assert make_downloader(tmp_path).load_polling_results(tmp_path / name) == {}
    (line,) = capsys.readouterr().out.splitlines()
    assert name in line
    assert complaint in line
    assert dsv.printable(line) == line


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\r\n \t"])
@pytest.mark.parametrize(
    "seed", ["null", "NaN", "-Infinity", "1e999", "9" * 5000, '"\\ud800"', "[" * 90 + "]" * 90]
)
def test_odd_results_file_is_used_and_leaves_sound_metadata(
    tmp_path: Path, start: bytes, seed: str
) -> None:
    row = json.dumps(make_row(3))[:-1] + f', "seed": {seed}}}'
    path = tmp_path / "results.json"
    path.write_bytes(start + b'{"task_results": [' + row.encode() + b"]}")
    (task,) = dsv.read_rows(dsv.read_results(path)).tasks
    metadata = strict_json(make_metadata(task))
    assert metadata["runway_task_json"]["task_id"] == make_task_id(3)


# --- Rows and tasks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "is_task", "complaint"),
    [
        pytest.param(None, False, "Row 2 is not an object", id="null"),
        pytest.param("SUCCEEDED", False, "Row 2 is not an object", id="text"),
        pytest.param([make_row(1)], False, "Row 2 is not an object", id="list"),
        pytest.param({"final_status": 7}, False, 'Row 2: "final_status"', id="number as status"),
        pytest.param({"final_status": ["FAILED"]}, False, '"final_status"', id="list as status"),
        pytest.param(make_row(1, task_id=5), True, '"task_id"', id="number as task_id"),
        pytest.param(make_row(1, target_filename_stub={}), True, "stub", id="object as stub"),
        pytest.param(make_row(1, prompt=["a"]), True, '"prompt"', id="list as prompt"),
        pytest.param(make_row(1, image_path=False), True, '"image_path"', id="bool as path"),
        pytest.param(make_row(1, video_url=[]), True, '"video_url"', id="list as link"),
        pytest.param({"final_status": "SUCCEEDED"}, True, '"video_url"', id="nothing else"),
    ],
)
def test_hostile_row_is_named_and_costs_no_other_row(
    row: Any, is_task: bool, complaint: str
) -> None:
    batch = dsv.read_rows({"task_results": [make_row(0), row, make_row(2)]})
    ids = [task.task_id for task in batch.tasks]
    assert (ids[0], ids[-1]) == (make_task_id(0), make_task_id(2))
    assert len(ids) == 2 + is_task
    assert any("Row 2" in problem and complaint in problem for problem in batch.problems)


def test_tasks_that_did_not_succeed_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses = ["FAILED", None, "CANCELLED", "FAILED", None, "THROTTLED\x1b[31m", None]
    rows = [make_row(i, final_status=status) for i, status in enumerate(statuses)]
    downloader = make_downloader(tmp_path / "out")
    assert downloader.process_polling_results_file(write_results(tmp_path, rows)) == 0
    assert downloader.stats["total_succeeded"] == 0
    (line,) = (each for each in capsys.readouterr().out.splitlines() if "FAILED" in each)
    for count in ("2 FAILED", "1 CANCELLED", "3 still running", "1 THROTTLED?[31m"):
        assert count in line


UNUSABLE_LINKS = [
    pytest.param(None, id="absent"),
    pytest.param("", id="empty"),
    pytest.param(5, id="number"),
    pytest.param(["https://cdn.invalid/a.mp4"], id="list"),
    pytest.param("cdn.invalid/a.mp4", id="no scheme"),
    pytest.param("ftp://cdn.invalid/a.mp4", id="ftp"),
    pytest.param("file:///etc/passwd", id="file"),
    pytest.param("javascript:alert(1)", id="script"),
    pytest.param("https://", id="no host"),
    pytest.param("https:///a.mp4", id="empty host"),
    pytest.param("https://?_jwt=a", id="query alone"),
    pytest.param("https://u:p@/a.mp4", id="user alone"),
    pytest.param("https://cdn.invalid:65536/a.mp4", id="port too high"),
    pytest.param("https://cdn.invalid:8x/a.mp4", id="port no number"),
    pytest.param("https://cdn.invalid:٨٠/a.mp4", id="port in other digits"),
    pytest.param("https://[cdn]/a.mp4", id="brackets around no address"),
    pytest.param("https://cdn.invalid/a b.mp4", id="space"),
    pytest.param("https://cdn.invalid/a\r\nX-Header: b", id="header smuggled in"),
    pytest.param("https://cdn.invalid/\x1b[31m", id="escape"),
    pytest.param("https://cdn.invalid/\x00", id="NUL"),
    pytest.param("https://cdn.invalid\\a.mp4", id="backslash"),
    pytest.param("https://cdn.invalid/\ud800.mp4", id="lone surrogate"),
]


@pytest.mark.parametrize("link", UNUSABLE_LINKS)
def test_succeeded_task_without_usable_link_is_found_failed_and_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    link: object,
) -> None:
    monkeypatch.delenv("RUNWAYML_API_SECRET", raising=False)
    rows = [make_row(7, video_url=link)]
    downloader = make_downloader(tmp_path / "out")
    assert downloader.get_succeeded_tasks({"task_results": rows}) == []
    assert downloader.process_polling_results_file(write_results(tmp_path, rows)) == 0
    assert downloader.stats == dsv.empty_stats() | {"total_succeeded": 1, "failed_downloads": 1}
    lines = capsys.readouterr().out.splitlines()
    assert any(make_task_id(7)[:8] in line and "video_url" in line for line in lines)
    assert names_in(tmp_path / "out") == set()


@pytest.mark.parametrize(
    "link",
    [
        "https://dnznrvs05pmza.cloudfront.net/0f3b.mp4?_jwt=a.b.c",
        "HTTP://CDN.invalid:65535",
        "https://[2001:db8::1]:8443/a.mp4#t=1",
        "https://user:secret@cdn.invalid?x=@/y",
        "https://bücher.invalid/ü.mp4",
    ],
)
def test_usable_link_is_used_to_the_letter(link: str) -> None:
    assert dsv.usable_link(link) == link
    assert dsv.usable_link(f" {link}\n") == link


def sign(payload: bytes) -> str:
    return "https://cdn.invalid/a.mp4?_jwt=h." + base64.urlsafe_b64encode(payload).decode() + ".s"


@pytest.mark.parametrize(
    ("link", "expiry"),
    [
        pytest.param(make_jwt_link("https://cdn.invalid", 1750300000), 1750300000, id="int"),
        pytest.param(make_jwt_link("https://cdn.invalid", 1750300000.5), 1750300000.5, id="float"),
        pytest.param(sign(b'{"exp": 9}').replace("?", "?a=b&") + "&c=d", 9, id="among others"),
        pytest.param("https://cdn.invalid/a.mp4", None, id="no query"),
        pytest.param("https://cdn.invalid/a.mp4?my_jwt=h.eyJleHAiOjl9.s", None, id="another name"),
        pytest.param("https://cdn.invalid/a.mp4?_jwt=", None, id="empty"),
        pytest.param("https://cdn.invalid/a.mp4?_jwt=a..c", None, id="no payload"),
        pytest.param("https://cdn.invalid/a.mp4?_jwt=a.x.c", None, id="base64 cut"),
        pytest.param("https://cdn.invalid/a.mp4?_jwt=a.é!?.c", None, id="not base64"),
        pytest.param(sign(b"\xff\xfe"), None, id="not UTF-8"),
        pytest.param(sign(b"exp"), None, id="not JSON"),
        pytest.param(sign(b"[" * 100_000), None, id="nesting"),
        pytest.param(sign(b"[1]"), None, id="list"),
        pytest.param(sign(b'"exp"'), None, id="text"),
        pytest.param(sign(b"{}"), None, id="no exp"),
        *(
            pytest.param(sign(b'{"exp": %s}' % value), None, id=f"exp {value[:9].decode()}")
            for value in (b"null", b"true", b'"9"', b"[9]", b"0", b"-1", b"NaN", b"Infinity")
        ),
        *(
            pytest.param(sign(b'{"exp": %s}' % value), None, id=f"exp {value[:9].decode()}")
            for value in (b"1e999", b"253402300800", b"9" * 400, b"9" * 5000)
        ),
    ],
)
def test_link_expiry_is_read_from_the_token_and_nonsense_is_none(
    link: str, expiry: float | None
) -> None:
    assert dsv.link_expiry(link) == expiry


@pytest.mark.parametrize(
    ("link", "shown"),
    [
        ("https://h.invalid/a.mp4?_jwt=SECRET", "https://h.invalid/a.mp4"),
        ("https://h.invalid?SECRET", "https://h.invalid"),
        ("https://h.invalid/a#SECRET?SECRET", "https://h.invalid/a"),
        ("https://user:SECRET@h.invalid/a@b", "https://h.invalid/a@b"),
        ("https://SECRET@SECRET@h.invalid/a", "https://h.invalid/a"),
        ("https://h.invalid/\x1b[31m\u202e", "https://h.invalid/?[31m?"),
        ("https://h.invalid/" + "x" * 32 + "?SECRET", "https://h.invalid/" + "x" * 32),
        ("https://h.invalid/" + "x" * 33, "https://h.invalid/" + "x" * 32 + "..."),
    ],
)
def test_shown_link_is_cut_to_50_characters_without_its_secrets(link: str, shown: str) -> None:
    assert dsv.shown_link(link) == shown


LINKS = ["https://cdn.invalid/a.mp4?_jwt=new", "https://cdn.invalid/a.mp4?_jwt=old"]
OTHER_LINK = "https://cdn.invalid/b.mp4"


@pytest.mark.parametrize(
    ("files", "links"),
    [
        pytest.param(
            [[{"video_url": LINKS[0]}], [{"video_url": LINKS[1]}]], LINKS[:1], id="two files"
        ),
        pytest.param(
            [[{"video_url": LINKS[0]}, {"video_url": LINKS[1]}]], LINKS[:1], id="one file"
        ),
        pytest.param(
            [[{"video_url": None}], [{"video_url": OTHER_LINK}]], [OTHER_LINK], id="latest has none"
        ),
        pytest.param(
            [[{"video_url": LINKS[0]}], [{"video_url": OTHER_LINK}]], LINKS[:1], id="moved"
        ),
        pytest.param(
            [[{"task_id": "a", "video_url": LINKS[0]}], [{"task_id": "b", "video_url": LINKS[0]}]],
            [LINKS[0], LINKS[0]],
            id="other tasks with one link and stub",
        ),
        pytest.param(
            [[{"task_id": None, "video_url": link}] for link in LINKS], LINKS[:1], id="no id"
        ),
        pytest.param(
            [[{"task_id": "", "video_url": LINKS[0]}], [{"task_id": "", "video_url": OTHER_LINK}]],
            [LINKS[0], OTHER_LINK],
            id="no id, other link",
        ),
        pytest.param([[{"task_id": None, "video_url": None}] * 2], ["", ""], id="neither"),
    ],
)
def test_task_in_several_rows_counts_once_with_its_freshest_link(
    files: list[list[dict[str, Any]]], links: list[str]
) -> None:
    batches = [[make_task(**row) for row in rows] for rows in files]
    assert [task.link for task in dsv.merge_tasks(batches)] == links


# --- Names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stub",
    [
        "elegant_business_classic_tt_video",
        "Ein schönes Bild (2), final!",
        "日本語の動画🎬",
        "cafe\N{COMBINING ACUTE ACCENT}",
        "a.b.mp4",
        "trailing dot.",
        "console",
        "COM10",
        "nul_video",
        "runway_polling",
        " inner and outer ",
        "x" * 250,
        "é" * 125,
    ],
)
def test_ordinary_stub_is_used_to_the_letter(tmp_path: Path, stub: str) -> None:
    task = make_row(target_filename_stub=stub)
    assert make_downloader(tmp_path).generate_filename_stub(task) == stub


HOSTILE_STUBS = {
    "separators": "a/b\\c",
    "upwards": "../../../../tmp/up",
    "upwards on Windows": "..\\..\\up",
    "absolute": "/etc/passwd",
    "drive": "C:\\up",
    "alternate stream": "file:stream",
    "dot": ".",
    "dots": "..",
    "three dots": "...",
    "hidden": ".hidden",
    "NUL character": "a\0b",
    "newlines": "a\r\nb\n",
    "escapes": "\x1b[31mred\x1b]0;title\x07",
    "C1 control": "a\x9b31mb",
    "delete": "a\x7fb",
    "wildcards": '<>:"|?*',
    "lone surrogates": "a\ud800b\udfff",
    "400 characters": "x" * 400,
    "400 characters in 3 bytes": "語" * 400,
    "400 characters in 4 bytes": "🎬" * 400,
    "bytes cut in a character": "a" + "é" * 200,
    "reserved": "CON",
    "reserved, small": "nul",
    "reserved with suffix": "aux.tar.gz",
    "reserved with spaces": "LPT1  .x",
    "reserved, high digit": "COM¹",
    "reserved device": "CONIN$",
    "reserved behind a cut": "PRN." + "x" * 400,
    "direction": "photo\u202egpj.exe\u2066",
    "line separators": "a\u2028b\u2029c",
    "byte order mark": "\ufeffname",
    "like results": "runway_polling_results_20991231_235959",
}
_WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{port}{digit}" for port in ("COM", "LPT") for digit in "0123456789¹²³"
}


@pytest.mark.parametrize("stub", HOSTILE_STUBS.values(), ids=HOSTILE_STUBS.keys())
def test_hostile_stub_becomes_a_name_for_any_file_system(stub: str) -> None:
    name = dsv.safe_stub(stub)
    assert name
    assert not set(name) & set('<>:"/\\|?*')
    assert not name.startswith(".")
    assert name.split(".")[0].rstrip(" ").upper() not in _WINDOWS_DEVICES
    assert len(f"{name}.json".encode()) <= 255
    forbidden = {"Cc", "Cs", "Zl", "Zp"}
    assert not forbidden & {unicodedata.category(char) for char in name}
    directing = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert not directing & {unicodedata.bidirectional(char) for char in name}
    assert not name.startswith("runway_polling_results_")  # the metadata would pass for results
    assert dsv.safe_stub(name) == name


def test_videos_with_hostile_stubs_are_saved_flat_and_whole(tmp_path: Path, cdn: Cdn) -> None:
    bodies = {make_task_id(i): make_mp4(i, SMALL) for i in range(len(HOSTILE_STUBS))}
    rows = [
        make_row(i, target_filename_stub=stub, video_url=cdn.add(f"{i}.mp4", body))
        for i, (stub, body) in enumerate(zip(HOSTILE_STUBS.values(), bodies.values(), strict=True))
    ]
    output = tmp_path / "in" / "out"
    results = write_results(tmp_path, rows)
    assert make_downloader(output).process_polling_results_file(results) == len(rows)
    assert names_in(tmp_path) == {"in", results.name}
    assert names_in(tmp_path / "in") == {"out"}
    videos = [name for name in names_in(output) if name.endswith(".mp4")]
    assert len(videos) == len(rows) == len(names_in(output)) / 2
    for name in videos:
        metadata = strict_json((output / f"{name[:-4]}.json").read_bytes())
        body = bodies[metadata["runway_task_json"]["task_id"]]
        assert_whole(output, name[:-4], metadata["runway_task_json"]["task_id"], body)
    assert make_downloader(output).process_polling_results_file(results) == len(rows)
    assert len(cdn.requests) == len(rows)


@pytest.mark.parametrize(
    ("task", "stub"),
    [
        ({"task_id": "def45678-90ab"}, "video_def45678"),
        ({"task_id": "abc"}, "video_abc"),
        ({}, "video_unknown"),
        ({"task_id": ""}, "video_unknown"),
        ({"task_id": 12345678}, "video_unknown"),
        ({"task_id": "def45678-90ab", "target_filename_stub": ""}, "video_def45678"),
        ({"task_id": "def45678-90ab", "target_filename_stub": "  "}, "video_def45678"),
        ({"task_id": "def45678-90ab", "target_filename_stub": ["a"]}, "video_def45678"),
    ],
)
def test_default_stub_is_made_of_the_task_id(
    tmp_path: Path, task: dict[str, Any], stub: str
) -> None:
    assert make_downloader(tmp_path).generate_filename_stub(task) == stub


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Video", "vIDEO", True),
        ("ÉTÉ", "été", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("CAFE\u0301", "caf\u00e9", True),
        ("\u212bngström", "\u00e5NGSTRÖM", True),
        ("video_1", "video_2", False),
        ("cafe", "café", False),
        ("a b", "a_b", False),
    ],
)
def test_names_equal_but_for_case_or_unicode_form_are_one(one: str, other: str, same: bool) -> None:
    assert (dsv.fold(one) == dsv.fold(other)) is same


@pytest.mark.parametrize(
    ("row", "names"),
    [
        pytest.param(
            {"target_filename_stub": "s", "task_id": "f645e2df-b639"},
            ["s", "s_f645e2df", "s_f645e2df_2", "s_f645e2df_3"],
            id="with the id, then numbers",
        ),
        pytest.param(
            {"target_filename_stub": "x" * 400, "task_id": "f645e2df-b639"},
            ["x" * 250, "x" * 241 + "_f645e2df", "x" * 239 + "_f645e2df_2"],
            id="as long as a name may be",
        ),
        pytest.param(
            {"target_filename_stub": "語" * 400, "task_id": "f645e2df-b639"},
            ["語" * 83, "語" * 80 + "_f645e2df"],
            id="no character cut",
        ),
    ],
)
def test_another_task_with_the_stub_gets_its_id_behind_it(
    row: dict[str, Any], names: list[str]
) -> None:
    assert list(islice(dsv.candidate_stubs(make_task(**row)), len(names))) == names


# --- Shards ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_shards_part_all_tasks_by_their_stub(count: int) -> None:
    shards = [dsv.Shard(number, count) for number in range(1, count + 1)]
    for i in range(50):
        tasks = [
            make_task(i, target_filename_stub=stub, task_id=task_id)
            for stub in (f"Picture_{i}", f"picture_{i}")
            for task_id in (make_task_id(i), None)
        ]
        holders = [[shard for shard in shards if shard.holds(task.stub)] for task in tasks]
        assert len(holders[0]) == 1
        assert all(each == holders[0] for each in holders)


def test_shards_are_about_equal() -> None:
    tasks = [make_task(i) for i in range(1000)]
    sizes = [sum(dsv.Shard(n, 4).holds(task.stub) for task in tasks) for n in range(1, 5)]
    assert min(sizes) > 200


# --- MP4 structure -----------------------------------------------------------------------------


def box(kind: bytes, payload: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack(">I4s", 8 + len(payload) if size is None else size, kind) + payload


def long_box(kind: bytes, payload: bytes = b"", size: int | None = None) -> bytes:
    size = 16 + len(payload) if size is None else size
    return struct.pack(">I4sQ", 1, kind, size) + payload


FTYP = box(b"ftyp", b"isom\0\0\2\0isomiso2")


@pytest.mark.parametrize(
    ("body", "content"),
    [
        pytest.param(make_mp4(0, SMALL), "WHOLE_MP4", id="a real one"),
        pytest.param(FTYP + box(b"mdat", b"12345"), "WHOLE_MP4", id="to the end"),
        pytest.param(FTYP + box(b"free"), "WHOLE_MP4", id="empty box at the end"),
        pytest.param(FTYP + box(b"mdat", b"12345", size=0), "WHOLE_MP4", id="size 0: all the rest"),
        pytest.param(FTYP + long_box(b"mdat", b"12345"), "WHOLE_MP4", id="64 bit"),
        pytest.param(FTYP + box(b"moov", b"12345", size=14), "CUT_MP4", id="a byte short"),
        pytest.param(FTYP + box(b"mdat", b"1", size=2**32 - 1), "CUT_MP4", id="far too short"),
        pytest.param(FTYP + long_box(b"mdat", b"1", size=2**64 - 1), "CUT_MP4", id="64 bit, short"),
        pytest.param(FTYP + box(b"mdat", size=7), "ODD_MP4", id="size below a header"),
        pytest.param(FTYP + long_box(b"mdat", size=15), "ODD_MP4", id="64 bit, below a header"),
        pytest.param(b"\xff" * 600, "OTHER", id="something else"),
        pytest.param(b"RIFF\0\0\0\0AVI LIST", "OTHER", id="another format"),
        pytest.param(b"<html><body>Forbidden", "ERROR_PAGE", id="HTML"),
        pytest.param(b"\xef\xbb\xbf\r\n<!DOCTYPE html>", "ERROR_PAGE", id="HTML behind a mark"),
        pytest.param(b'<?xml version="1.0"?><Error/>', "ERROR_PAGE", id="XML"),
        pytest.param(b'{"error": "expired"}', "ERROR_PAGE", id="JSON"),
        pytest.param(b"{}", "ERROR_PAGE", id="empty JSON"),
        pytest.param(b'[{"error": 1}]', "ERROR_PAGE", id="JSON list"),
    ],
)
def test_content_is_told_by_its_boxes_and_first_bytes(body: bytes, content: str) -> None:
    assert dsv.inspect(io.BytesIO(body), len(body)) is dsv.Content[content]


def test_mp4_cut_at_any_byte_inside_a_box_is_seen() -> None:
    boxes = [FTYP, long_box(b"mdat", b"12345"), box(b"free"), box(b"moov", b"123")]
    body = b"".join(boxes)
    ends = {sum(map(len, boxes[:count])) for count in range(1, len(boxes) + 1)}
    for size in range(1, len(body) + 1):
        content = dsv.inspect(io.BytesIO(body[:size]), size)
        expected = dsv.Content.WHOLE_MP4 if size in ends else dsv.Content.CUT_MP4
        assert content is expected, f"cut to {size} bytes"


# --- The plan ----------------------------------------------------------------------------------

MINE = make_task(0, target_filename_stub="s", task_id="f645e2df-b639")
OTHERS = make_task(1, target_filename_stub="s")
WHOLE = make_mp4(0, SMALL)
ALL_OURS = {"s.json": MINE, "s.mp4": WHOLE}
ALL_OTHERS = {"s.json": OTHERS, "s.mp4": WHOLE}
SECOND = "s_f645e2df"
FOREIGN_JSON = {
    "list": b"[]",
    "null": b"null",
    "object": b'{"task_id": "f645e2df-b639"}',
    "other types": b'{"runway_task_json": [1]}',
    "no id": b'{"runway_task_json": {"task_id": 5}}',
    "cut": b'{"runway_task_json": {"task_id": "f645e2df-b639"',
    "empty": b"",
    "binary": b"\xff\xfe\0",
    "nesting": b"[" * 200_000,
    "directory": os.mkdir,
}


@pytest.mark.parametrize(
    ("entries", "action", "stub"),
    [
        pytest.param({}, "DOWNLOAD", "s", id="nothing there"),
        pytest.param(ALL_OURS, "KEEP", "s", id="there already"),
        pytest.param(ALL_OURS | {"s.mp4": b"edited"}, "KEEP", "s", id="edited in place"),
        pytest.param(ALL_OURS | {"s.mp4": WHOLE[:-1]}, "KEEP", "s", id="cut, but has metadata"),
        pytest.param({"s.json": MINE}, "DOWNLOAD", "s", id="metadata without video"),
        pytest.param(ALL_OURS | {"s.mp4": b""}, "DOWNLOAD", "s", id="zero bytes, has metadata"),
        pytest.param({"s.mp4": b""}, "DOWNLOAD", "s", id="zero bytes"),
        pytest.param({"s.mp4": WHOLE[:-1]}, "DOWNLOAD", "s", id="cut MP4 without metadata"),
        pytest.param({"s.mp4": WHOLE[:2]}, "DOWNLOAD", "s", id="MP4 cut to 2 bytes"),
        pytest.param({"s.mp4": WHOLE}, "ADOPT", "s", id="whole without metadata"),
        pytest.param({"s.mp4": b"RIFF...."}, "ADOPT", "s", id="no MP4, without metadata"),
        pytest.param({"s.mp4": b"<html>"}, "DOWNLOAD", SECOND, id="error page named mp4"),
        pytest.param({"s.mp4": os.mkdir}, "DOWNLOAD", SECOND, id="directory named mp4"),
        pytest.param(ALL_OTHERS, "DOWNLOAD", SECOND, id="another task's"),
        pytest.param({"s.json": OTHERS}, "DOWNLOAD", SECOND, id="another task's, no video yet"),
        *(
            pytest.param(
                {"s.json": content, "s.mp4": WHOLE}, "DOWNLOAD", SECOND, id=f"foreign: {name}"
            )
            for name, content in FOREIGN_JSON.items()
        ),
        pytest.param({"S.json": OTHERS, "S.mp4": WHOLE}, "DOWNLOAD", SECOND, id="another case"),
        pytest.param({"S.json": MINE, "S.mp4": WHOLE}, "KEEP", "S", id="ours in another case"),
        pytest.param({"S.mp4": WHOLE}, "DOWNLOAD", SECOND, id="whole video in another case"),
        pytest.param(
            ALL_OTHERS | {f"{SECOND}.json": MINE, f"{SECOND}.mp4": WHOLE},
            "KEEP",
            SECOND,
            id="under the second name",
        ),
        pytest.param(
            {f"{SECOND}.json": MINE, f"{SECOND}.mp4": WHOLE},
            "KEEP",
            SECOND,
            id="under the second name, the first free again",
        ),
        pytest.param(
            {f"{SECOND}.json": MINE}, "DOWNLOAD", SECOND, id="metadata under the second name"
        ),
        pytest.param(
            ALL_OTHERS | {f"{SECOND}.mp4": WHOLE}, "ADOPT", SECOND, id="whole under the second name"
        ),
        pytest.param(
            ALL_OTHERS | {f"{SECOND}.json": b"[]"}, "DOWNLOAD", f"{SECOND}_2", id="both names taken"
        ),
        pytest.param(
            {f"{SECOND}.json": b"[]", f"{SECOND}_2.json": MINE, f"{SECOND}_2.mp4": WHOLE},
            "KEEP",
            f"{SECOND}_2",
            id="under the third name, the first free again",
        ),
        pytest.param(
            ALL_OURS | {f"{SECOND}.json": MINE, f"{SECOND}.mp4": b""}, "KEEP", "s", id="twice"
        ),
        pytest.param(
            {"s.json": MINE, f"{SECOND}.json": MINE, f"{SECOND}.mp4": WHOLE},
            "KEEP",
            SECOND,
            id="the finished one of two",
        ),
    ],
)
def test_plan_follows_from_what_is_on_disk(
    tmp_path: Path, entries: dict[str, Any], action: str, stub: str
) -> None:
    lay_out(tmp_path, entries)
    plan = dsv.plan_task(MINE, dsv.Shelf(tmp_path), {})
    assert (plan.action, plan.stub) == (dsv.Action[action], stub)
    assert names_in(tmp_path) == set(entries)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def point_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


@posix
@pytest.mark.parametrize(
    ("entries", "action", "stub"),
    [
        pytest.param({"s.json": make_pipe}, "DOWNLOAD", SECOND, id="pipe named json"),
        pytest.param({"s.mp4": make_pipe}, "DOWNLOAD", SECOND, id="pipe named mp4"),
        pytest.param({"s.mp4": point_to("gone")}, "DOWNLOAD", SECOND, id="link to nothing"),
        pytest.param({"s.mp4": point_to("s.mp4")}, "DOWNLOAD", SECOND, id="link to itself"),
        pytest.param({"v": WHOLE, "s.mp4": point_to("v")}, "ADOPT", "s", id="link to a video"),
        pytest.param(
            {"v": WHOLE, "s.mp4": point_to("v"), "s.json": MINE}, "KEEP", "s", id="ours, linked"
        ),
    ],
)
def test_plan_neither_hangs_on_pipes_nor_trips_over_links(
    tmp_path: Path, entries: dict[str, Any], action: str, stub: str
) -> None:
    test_plan_follows_from_what_is_on_disk(tmp_path, entries, action, stub)


def test_task_without_id_owns_its_video_by_the_link(tmp_path: Path) -> None:
    links = ("https://cdn.invalid/a.mp4?_jwt=old", "https://cdn.invalid/a.mp4?_jwt=fresh")
    old, fresh = (make_task(task_id=None, video_url=link) for link in links)
    other = make_task(task_id=None, video_url="https://cdn.invalid/b.mp4?_jwt=old")
    lay_out(tmp_path, {f"{old.stub}.json": old, f"{old.stub}.mp4": WHOLE})
    shelf = dsv.Shelf(tmp_path)
    assert dsv.plan_task(fresh, shelf, {}).action is dsv.Action.KEEP
    plan = dsv.plan_task(other, shelf, {})
    assert plan.action is dsv.Action.DOWNLOAD
    assert plan.stub.startswith(f"{other.stub}_")


@pytest.mark.parametrize(
    "stubs",
    [
        pytest.param(["s", "s", "s"], id="equal"),
        pytest.param(["Same", "same", "SAME"], id="but for case"),
        pytest.param(["caf\u00e9", "cafe\u0301"], id="but for Unicode form"),
        pytest.param(["a/b", "a\\b", "a_b"], id="made equal"),
        pytest.param(["x" * 300, "x" * 400], id="cut to be equal"),
        pytest.param(["s", "s", f"s_{make_task_id(1)[:8]}"], id="equal to another's second name"),
    ],
)
def test_tasks_that_want_one_name_each_get_their_own(tmp_path: Path, stubs: list[str]) -> None:
    tasks = [make_task(i, target_filename_stub=stub) for i, stub in enumerate(stubs)]
    plans = dsv.plan_all(tasks, dsv.Shelf(tmp_path), {})
    assert plans[0].stub == dsv.safe_stub(stubs[0])
    assert len({dsv.fold(plan.stub) for plan in plans}) == len(stubs)
    assert all(plan.action is dsv.Action.DOWNLOAD for plan in plans)
    for plan in plans:
        lay_out(tmp_path, {f"{plan.stub}.json": plan.task, f"{plan.stub}.mp4": WHOLE})
    again = dsv.plan_all(reversed(tasks), dsv.Shelf(tmp_path), {})
    assert [plan.stub for plan in reversed(again)] == [plan.stub for plan in plans]
    assert all(plan.action is dsv.Action.KEEP for plan in again)


def test_two_tasks_with_one_orphan_between_them_do_not_both_adopt_it(tmp_path: Path) -> None:
    lay_out(tmp_path, {"s.mp4": WHOLE})
    plans = dsv.plan_all([MINE, OTHERS], dsv.Shelf(tmp_path), {})
    assert [plan.action for plan in plans] == [dsv.Action.ADOPT, dsv.Action.DOWNLOAD]


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
    nights: list[list[dict[str, Any]]] = [
        [
            make_row(
                i,
                target_filename_stub=f"style_{i % 61 % 21}_tt_video",
                video_url=cdn.add(f"{i}.mp4", make_mp4(i, SMALL)),
            )
            for i in range(61 * night, 61 * night + 61)
        ]
        for night in range(2)
    ]
    output = tmp_path / "video_outputs"
    write_results(tmp_path, nights[0], "20250617_040158")
    assert run_script(tmp_path).returncode == 0
    first = owners(output)
    assert len(first) == 61
    assert {f"style_{i}_tt_video" for i in range(21)} < set(first.values())
    write_results(tmp_path, nights[1], "20250618_040158")
    assert run_script(tmp_path).returncode == 0
    both = owners(output)
    assert len(both) == 122
    assert both.items() > first.items()
    for _ in range(2):
        assert run_script(tmp_path, "--all").returncode == 0
        assert owners(output) == both
    for i in range(122):
        assert_whole(output, both[make_task_id(i)], make_task_id(i), make_mp4(i, SMALL))
        assert len(cdn.asked(f"{i}.mp4")) == 1


def test_61_tasks_over_21_stubs_come_home_from_two_nights_at_once(tmp_path: Path) -> None:
    tasks = [make_task(i, target_filename_stub=f"style_{i % 61 % 21}") for i in range(122)]
    names = [plan.stub for plan in dsv.plan_all(tasks, dsv.Shelf(tmp_path), {})]
    wanted = [task.stub for task in tasks]
    ids = [task.task_id[:8] for task in tasks]
    assert names[:21] == wanted[:21]
    assert names[21:] == [f"{stub}_{i}" for stub, i in zip(wanted[21:], ids[21:], strict=True)]
    assert len(set(names)) == 122


# --- What an answer's head says ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "length"),
    [
        ("941873", 941873), (" 0 ", 0), ("5, 5", 5), ("007", 7), ("5, 6", None), (None, None),
        ("", None), ("-1", None), ("+5", None), ("1e3", None), ("1_0", None), ("5.0", None),
        ("0x10", None), ("٥", None), ("9" * 5000, None), ("5 5", None), ("five", None),
    ],
)  # fmt: skip
def test_content_length_is_digits_or_nothing(value: str | None, length: int | None) -> None:
    assert dsv.parse_length(value) == length


@pytest.mark.parametrize(
    ("value", "content_range"),
    [
        ("bytes 0-0/1", (0, 0, 1)), (" bytes 5-9/10 ", (5, 9, 10)), ("bytes 5-8/10", (5, 8, 10)),
        (None, None), ("", None), ("bytes */10", None), ("bytes 0-9/*", None), ("5-9/10", None),
        ("bytes 5-9", None), ("bytes 9-5/10", None), ("bytes 5-10/10", None),
        ("bytes=5-9/10", None), ("items 5-9/10", None), ("bytes -5-9/10", None),
        ("bytes 5-9/10, 0-1/10", None),
        ("bytes ٥-9/10", None), (f"bytes 0-{'9' * 5000}/{'9' * 5001}", None),
    ],
)  # fmt: skip
def test_content_range_is_three_numbers_in_order_or_nothing(
    value: str | None, content_range: tuple[int, int, int] | None
) -> None:
    assert dsv.parse_content_range(value) == content_range


NOW = datetime(2025, 6, 17, 4, 0, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120), (" 0 ", 0), ("Tue, 17 Jun 2025 04:00:30 GMT", 30),
        ("Tuesday, 17-Jun-25 04:00:30 GMT", 30), ("Tue Jun 17 04:00:30 2025", 30),
        ("Tue, 17 Jun 2025 04:00:30 -0000", 30), ("Tue, 17 Jun 2025 06:00:30 +0200", 30),
        (format_datetime(NOW.replace(year=2026), usegmt=True), 365 * 86400),
        ("Tue, 17 Jun 2025 03:59:59 GMT", 0), (None, None), ("", None), ("-5", None),
        ("1.5", None), ("soon", None), ("Tue, 99 Jun 2025 04:00:30 GMT", None), ("٥", None),
        ("Tue, 17 Jun 99999 04:00:30 GMT", None), ("\x00", None), ("1 Jan", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("zone", ["UTC", "EST5"])
@posix
def test_retry_after_is_seconds_or_a_date_or_nothing(
    monkeypatch: pytest.MonkeyPatch, value: str | None, seconds: float | None, zone: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", zone)
        time.tzset()
        waited = dsv.parse_retry_after(value, NOW.timestamp())
    time.tzset()
    assert waited == seconds


def head(status: int = 200, /, **headers: str | None) -> dsv.Answer:
    """The head of a 10-byte object's answer; underscores stand for hyphens, None leaves out."""
    usual: dict[str, str | None] = {"Content_Length": "10", "ETag": '"a"'}
    if status == 206:
        usual |= {"Content_Length": "6", "Content_Range": "bytes 4-9/10"}
    present = {k.replace("_", "-"): v for k, v in (usual | headers).items() if v is not None}
    return dsv.read_head(status, CaseInsensitiveDict(present), NOW.timestamp())


def part(content_range: str, length: str) -> dsv.Answer:
    return head(206, Content_Range=f"bytes {content_range}", Content_Length=length)


@pytest.mark.parametrize(
    ("headers", "validator"),
    [
        ({"ETag": '"a"'}, '"a"'),
        ({"ETag": '"a"', "Last-Modified": "Tue, 17 Jun 2025 04:00:00 GMT"}, '"a"'),
        ({"Last-Modified": "Tue, 17 Jun 2025 04:00:00 GMT"}, "Tue, 17 Jun 2025 04:00:00 GMT"),
        ({"ETag": 'W/"a"'}, ""),
        ({"ETag": 'W/"a"', "Last-Modified": "Tue, 17 Jun 2025 04:00:00 GMT"}, ""),
        ({"ETag": "a"}, ""),
        ({"ETag": '"a'}, ""),
        ({"ETag": '"a", "b"'}, ""),
        ({}, ""),
    ],
)
def test_validator_is_a_strong_etag_or_else_the_date(
    headers: dict[str, str], validator: str
) -> None:
    assert dsv.strong_validator(headers) == validator


@pytest.mark.parametrize(
    ("answer", "decision"),
    [
        pytest.param(head(), "WRITE", id="the object"),
        pytest.param(head(Content_Length=None), "WRITE", id="no length"),
        pytest.param(head(Content_Encoding="gzip"), "WRITE", id="encoded"),
        pytest.param(head(Content_Encoding="X-GZIP"), "WRITE", id="encoded, old name"),
        pytest.param(head(Content_Type="binary/octet-stream"), "WRITE", id="no video type"),
        pytest.param(head(Content_Type="application/mp4"), "WRITE", id="MP4 type"),
        pytest.param(part("0-9/10", "10"), "WRITE", id="unasked, whole"),
        pytest.param(head(206), dsv.TransientError, id="unasked part"),
        pytest.param(head(206, Content_Range=None), dsv.TransientError, id="unasked, no range"),
        pytest.param(head(Content_Length="0"), dsv.TaskError, id="empty"),
        *(
            pytest.param(head(Content_Type=kind), dsv.TaskError, id=kind)
            for kind in (
                "text/html; charset=utf-8", "TEXT/plain", "application/json", "application/xml",
                "application/problem+json", "application/xhtml+xml", "image/svg+xml",
            )
        ),
    ],
)  # fmt: skip
def test_answer_to_a_request_for_everything(
    answer: dsv.Answer, decision: str | type[Exception]
) -> None:
    if isinstance(decision, str):
        assert dsv.judge(answer, None, 0) is dsv.Body[decision]
    else:
        with pytest.raises(decision) as raised:
            dsv.judge(answer, None, 0)
        assert raised.type is decision


DATED = {"ETag": None, "Last_Modified": "Tue, 17 Jun 2025 04:00:00 GMT"}


@pytest.mark.parametrize(
    ("answer", "decision"),
    [
        pytest.param(head(206), "APPEND", id="the rest"),
        pytest.param(head(206, Content_Length=None), "APPEND", id="the rest, no length"),
        pytest.param(head(206, Content_Encoding="identity"), "APPEND", id="the rest as it is"),
        pytest.param(part("4-7/10", "4"), "APPEND", id="some of it"),
        pytest.param(head(200), "WRITE", id="everything after all"),
        pytest.param(head(200, ETag='"b"'), "WRITE", id="a new object"),
        pytest.param(head(416, Content_Range="bytes */10"), "ASK_AGAIN", id="416"),
        pytest.param(part("5-9/10", "5"), "ASK_AGAIN", id="start too high"),
        pytest.param(part("3-9/10", "7"), "ASK_AGAIN", id="start too low"),
        pytest.param(part("0-9/10", "10"), "ASK_AGAIN", id="from zero"),
        pytest.param(part("4-9/11", "6"), "ASK_AGAIN", id="wrong total"),
        pytest.param(part("4-9/*", "6"), "ASK_AGAIN", id="no total"),
        pytest.param(head(206, Content_Range=None), "ASK_AGAIN", id="no range"),
        pytest.param(head(206, Content_Length="5"), "ASK_AGAIN", id="length against range"),
        pytest.param(head(206, ETag='"b"'), "ASK_AGAIN", id="other ETag"),
        pytest.param(head(206, ETag='W/"a"'), "ASK_AGAIN", id="weak ETag"),
        pytest.param(head(206, ETag=None), "ASK_AGAIN", id="no ETag"),
        pytest.param(head(206, **DATED), "ASK_AGAIN", id="a date instead"),
        pytest.param(head(206, Content_Encoding="gzip"), "ASK_AGAIN", id="encoded part"),
    ],
)
def test_answer_to_a_request_for_the_rest(answer: dsv.Answer, decision: str) -> None:
    part_id = dsv.PartId.of(MINE, head())
    assert dsv.judge(answer, part_id, 4) is dsv.Body[decision]


@pytest.mark.parametrize(("modified", "decision"), [(30, "APPEND"), (31, "ASK_AGAIN")])
def test_rest_of_a_dated_object_is_appended_if_the_date_is_the_same(
    modified: int, decision: str
) -> None:
    dated = {"ETag": None, "Last_Modified": "Tue, 17 Jun 2025 04:00:30 GMT"}
    later = dated | {"Last_Modified": f"Tue, 17 Jun 2025 04:00:{modified} GMT"}
    part_id = dsv.PartId.of(MINE, head(**dated))
    assert dsv.judge(head(206, **later), part_id, 4) is dsv.Body[decision]


@pytest.mark.parametrize("asked_for_rest", [False, True])
@pytest.mark.parametrize(
    ("error", "statuses"),
    [
        (dsv.TransientError, [408, 425, 429, 500, 502, 503, 504, 507, 520, 599]),
        (dsv.LinkRefused, [401, 403, 404, 410]),
        (dsv.TaskError, [204, 304, 400, 402, 405, 406, 409, 411, 412, 413, 422, 431, 451, 499]),
    ],
)
def test_status_says_whether_another_try_helps(
    error: type[Exception], statuses: list[int], asked_for_rest: bool
) -> None:
    part_id = dsv.PartId.of(MINE, head()) if asked_for_rest else None
    for status in statuses:
        with pytest.raises(error, match=str(status)) as raised:
            dsv.judge(head(status, Content_Type="text/html"), part_id, 4 * asked_for_rest)
        assert raised.type is error, status


def test_transient_status_hands_on_what_the_server_asks_to_wait() -> None:
    with pytest.raises(dsv.TransientError) as raised:
        dsv.judge(head(429, Retry_After="7"), None, 0)
    assert raised.value.retry_after_s == 7


# --- Taking turns ------------------------------------------------------------------------------


def test_turns_are_so_many_and_go_to_who_came_first() -> None:
    turns, came = dsv.Turns(2), list[int]()

    def take_one(number: int) -> None:
        with turns:
            came.append(number)

    threads = [threading.Thread(target=take_one, args=(number,)) for number in range(3)]
    with turns, turns:
        for thread in threads:
            thread.start()
            wait_until(lambda: len(turns._queue) == sum(each.is_alive() for each in threads))
        assert came == []
        with contextlib.suppress(TimeoutError), turns.given_back():
            wait_until(lambda: came == [0, 1, 2])
            raise TimeoutError
        late = threading.Thread(target=take_one, args=(3,))
        late.start()
        wait_until(lambda: len(turns._queue) == 1)  # both turns are taken again
    for thread in (*threads, late):
        thread.join()
    assert came == [0, 1, 2, 3]


class _BusySocket:
    """A socket that always has more."""

    def gettimeout(self) -> float:
        return 30.0

    def settimeout(self, _seconds: float) -> None:
        """Remain as it is."""

    def recv_into(self, view: memoryview) -> int:
        return len(view)


def test_a_stream_that_never_waits_lets_others_have_their_turn() -> None:
    turns, came = dsv.Turns(1), list[str]()

    def take_one() -> None:
        with turns:
            came.append("other")

    other = threading.Thread(target=take_one)
    guard = dsv.StallGuard(io.RawIOBase(), _BusySocket(), turns, time.monotonic)
    with turns:
        other.start()
        wait_until(lambda: len(turns._queue) == 1)
        assert guard.readinto(bytearray(9)) == 9
        assert came == ["other"]
    other.join()


# --- Back-off and part files -------------------------------------------------------------------


def test_back_off_doubles_up_to_a_bound_and_jitters() -> None:
    longest = [dsv.backoff_s(failures, None, 1.0) for failures in range(1, 1001)]
    shortest = [dsv.backoff_s(failures, None, 0.0) for failures in range(1, 1001)]
    assert longest[1] == 2 * longest[0]
    assert longest[3] == 8 * longest[0]
    assert longest == sorted(longest)
    assert longest[-1] <= 60
    assert all(0 < low < high for low, high in zip(shortest, longest, strict=True))


@pytest.mark.parametrize("failures", [1, 3, 1000])
def test_back_off_is_never_shorter_than_the_server_asked_for(failures: int) -> None:
    assert dsv.backoff_s(failures, 45.0, 0.5) == 45
    assert dsv.backoff_s(failures, 0.0, 0.5) == dsv.backoff_s(failures, None, 0.5)


@pytest.mark.parametrize(
    ("validator", "resumable"),
    [
        pytest.param('"d41d8cd98f00b204e9800998ecf8427e"', True, id="ETag"),
        pytest.param('"../../a\\b?*:"', True, id="ETag like a path"),
        pytest.param('"' + "x" * 120 + '"', True, id="long ETag"),
        pytest.param('"' + "x" * 300 + '"', False, id="ETag too long for a name"),
        pytest.param('"\xe9"', False, id="ETag not ASCII"),
        pytest.param('W/"a"', False, id="weak ETag"),
        pytest.param(None, False, id="no ETag"),
    ],
)
def test_part_file_name_tells_the_object(validator: str | None, resumable: bool) -> None:
    part_id = dsv.PartId.of(MINE, head(ETag=validator))
    assert part_id.resumable is resumable
    assert dsv.PartId.parse(part_id.filename) == part_id
    assert (part_id.total, part_id.validator) == ((10, validator) if resumable else (0, ""))
    assert part_id.filename.startswith(".")
    assert len(part_id.filename) <= 255
    assert not set(part_id.filename) & set('/\\:*?"<>|')


def test_part_without_a_total_cannot_be_resumed() -> None:
    assert not dsv.PartId.of(MINE, head(Content_Length=None)).resumable
    assert not dsv.PartId.of(MINE, head(Content_Encoding="gzip")).resumable
    assert not dsv.PartId.of(MINE).resumable


def test_part_files_of_different_tasks_differ() -> None:
    tasks = [make_task(i, target_filename_stub="s") for i in range(50)]
    assert len({dsv.PartId.of(task, head()).filename for task in tasks}) == 50


@pytest.mark.parametrize(
    "filename",
    ["", ".part", "s.mp4", ".s.mp4.part", ".00000000-0000000000000000-10-!.part",
     ".00000000-0000000000000000-x-YQ.part", ".00000000-0000000000000000-10-YQ.part.bak",
     ".0000000-0000000000000000-10-YQ.part", ".00000000-0000000000000000-10-A.part"],
)  # fmt: skip
def test_other_hidden_files_are_no_part_files(filename: str) -> None:
    assert dsv.PartId.parse(filename) is None


# --- Metadata ----------------------------------------------------------------------------------

EXAMPLE_ROW = {
    "task_id": "f645e2df-b639-4264-9bf2-fc7bceb6c658",
    "image_path": "video_queue/elegant_business_classic_tt_draft.png",
    "prompt": "soft focus transition, elegant reveal, ...",
    "target_filename_stub": "elegant_business_classic_tt_video",
    "timestamp": "2025-06-17T03:48:46.656953",
    "status": "PENDING",
    "final_status": "SUCCEEDED",
    "completion_time": "2025-06-17T04:00:58.870095",
    "video_url": "https://dnznrvs05pmza.cloudfront.net/0f3b0be2-a946.mp4?_jwt=a.b.c",
}
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


def example_task(**changes: Any) -> dsv.Task:
    row = {key: value for key, value in (EXAMPLE_ROW | changes).items() if value is not ...}
    return dsv.read_rows({"task_results": [row]}).tasks[0]


def test_metadata_is_as_documented_to_the_letter() -> None:
    task = example_task()
    assert make_metadata(task, f"{task.stub}.mp4").decode() == EXAMPLE_METADATA


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        pytest.param({"seed": 0}, {'  "seed": null,': '  "seed": 0,'}, id="seed zero"),
        pytest.param({"seed": 2**64}, {'  "seed": null,': f'  "seed": {2**64},'}, id="seed"),
        pytest.param(
            {"prompt": 'é 🎬 "\n'},
            {'"soft focus transition, elegant reveal, ..."': '"é 🎬 \\"\\n"'},
            id="text as it is",
        ),
        pytest.param(
            {"prompt": "\ud800 é"},
            {'"soft focus transition, elegant reveal, ..."': '"\\ud800 é"'},
            id="lone surrogate",
        ),
        pytest.param(
            {"resolution": "720p", "duration": 5, "other": 1, "cluster_id": {"é": 0}, "theme": ""},
            {'46.656953"\n  }': '46.656953",\n    "cluster_id": {\n      "é": 0\n    },\n'
             '    "theme": "",\n    "duration": 5,\n    "resolution": "720p"\n  }'},
            id="extras in their order",
        ),
        *(
            pytest.param({name: ...}, {f'": "{EXAMPLE_ROW[name]}"': '": ""'}, id=f"no {name}")
            for name in ("image_path", "prompt", "timestamp", "completion_time", "status")
        ),
        pytest.param(
            {"prompt": 5}, {'"soft focus transition, elegant reveal, ..."': '""'}, id="wrong type"
        ),
    ],
)  # fmt: skip
def test_metadata_of_other_rows(changes: dict[str, Any], lines: dict[str, str]) -> None:
    expected = EXAMPLE_METADATA
    for old, new in lines.items():
        assert old in expected
        expected = expected.replace(old, new)
    data = make_metadata(example_task(**changes), "elegant_business_classic_tt_video.mp4")
    assert data.decode() == expected
    strict_json(data)


def test_metadata_holds_the_row_not_the_name_it_was_saved_under() -> None:
    metadata = strict_json(make_metadata(example_task(target_filename_stub="a/b"), "a_b_1.mp4"))
    assert (metadata["video_file"], metadata["target_filename_stub"]) == ("a_b_1.mp4", "a/b")
    metadata = strict_json(make_metadata(example_task(target_filename_stub=...), "video_f.mp4"))
    assert (metadata["video_file"], metadata["target_filename_stub"]) == ("video_f.mp4", "")


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


def test_console_of_one_task_is_as_documented_to_the_letter(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mocked: responses.RequestsMock,
) -> None:
    link = "https://dnznrvs05pmza.cloudfront.net/0f3b0be2-a946-4f2c.mp4"
    mocked.get(link, body=make_mp4(0, 941873), content_type="video/mp4")
    changes = {"target_filename_stub": "test_succeeded_video", "video_url": f"{link}?_jwt=a.b.c"}
    write_results(tmp_path, [EXAMPLE_ROW | changes])
    monkeypatch.chdir(tmp_path)
    assert dsv.main([]) == 0
    captured = capsys.readouterr()
    assert captured.out == CONSOLE
    assert captured.err == ""


@pytest.mark.parametrize(
    ("rows", "block"),
    [
        pytest.param(
            [make_row(1, final_status="FAILED")],
            ["  ✅ Found 0 SUCCEEDED tasks", "✅ Total SUCCEEDED tasks found: 0"],
            id="nothing to do",
        ),
        pytest.param(
            [make_row(0), make_row(1, video_url=None), make_row(2), make_row(3)],
            [
                "  ✅ Found 4 SUCCEEDED tasks",
                "✅ Total SUCCEEDED tasks found: 4",
                "📥 Videos downloaded: 2",
                "⚠️ Already existed: 1",
                "❌ Failed downloads: 1",
                "📈 Success rate: 75.0%",
            ],
            id="some of each",
        ),
    ],
)
def test_statistics_count_what_was_found_loaded_there_and_failed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mocked: responses.RequestsMock,
    rows: list[dict[str, Any]],
    block: list[str],
) -> None:
    monkeypatch.delenv("RUNWAYML_API_SECRET", raising=False)
    for i in (2, 3):
        mocked.get(f"https://cdn.invalid/{i}.mp4", body=WHOLE, content_type="video/mp4")
    lay_out(tmp_path, {"picture_0.mp4": WHOLE, "picture_0.json": make_task(0)})
    downloader = make_downloader(tmp_path)
    downloader.process_polling_results_file(write_results(tmp_path, rows))
    downloader.print_final_stats()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line in block] == block


def test_console_says_that_a_video_got_another_name_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mocked: responses.RequestsMock
) -> None:
    mocked.get("https://cdn.invalid/0.mp4", body=WHOLE, content_type="video/mp4")
    lay_out(tmp_path, {"s.mp4": WHOLE, "s.json": OTHERS})
    row = make_row(0, target_filename_stub="s")
    assert make_downloader(tmp_path).process_succeeded_task(row)
    name = f"s_{make_task_id(0)[:8]}.mp4"
    out = capsys.readouterr().out
    assert f"  🎬 Downloading: {name}\n" in out
    assert [line for line in out.splitlines() if "s.mp4" in line and "another task" in line]
    assert_whole(tmp_path, name[:-4], make_task_id(0), WHOLE)


def test_storage_listing_holds_videos_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = {"b.mp4": WHOLE, "a\x1b.mp4": WHOLE * 500, "dir.mp4": os.mkdir, ".hidden.mp4": WHOLE}
    lay_out(tmp_path, entries | {"c.json": b"{}", "c.mp4.bak": WHOLE})
    make_downloader(tmp_path).print_final_stats()
    listed = capsys.readouterr().out.split(f"📁 Videos in {tmp_path}:\n")[1].splitlines()
    assert listed[:3] == ["  • a?.mp4 (1.19 MB)", "  • b.mp4 (0.00 MB)", ""]
    assert listed[3] == "💾 Total storage used: 1.19 MB"


def test_storage_listing_after_a_download_holds_what_others_saved_meanwhile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mocked: responses.RequestsMock
) -> None:
    mocked.get("https://cdn.invalid/1.mp4", body=WHOLE, content_type="video/mp4")
    lay_out(tmp_path, {"picture_0.mp4": WHOLE, "picture_0.json": make_task(0)})
    file = write_results(tmp_path, [make_row(0), make_row(1)])

    def save_another(_outcome: dsv.Outcome) -> None:
        (tmp_path / "another.mp4").write_bytes(WHOLE)

    downloader = make_downloader(tmp_path, on_outcome=save_another)
    assert downloader.process_polling_results_file(file) == 2
    downloader.print_final_stats()
    listed = capsys.readouterr().out.split(f"📁 Videos in {tmp_path}:\n")[1]
    assert re.findall(r"• (.*) \(", listed) == ["another.mp4", "picture_0.mp4", "picture_1.mp4"]


MB = 1024 * 1024


def make_live(**overrides: Any) -> dsv.Live:
    moment = {
        "done": 7, "videos": 30, "received": 140 * MB, "expected": 600 * MB, "estimated": False,
        "bytes_per_second": 11.5 * MB,
    }  # fmt: skip
    return dsv.Live(**moment | overrides)


@pytest.mark.parametrize(
    ("moment", "columns", "text"),
    [
        ({}, 80, "⏬ 7/30  140.0/600.0 MB  23%  11.5 MB/s  0:40 left"),
        ({}, 40, "⏬ 7/30  140.0/600.0 MB  23%  11.5 MB/s"),
        ({}, 20, "⏬ 7/30"),
        ({"expected": None}, 80, "⏬ 7/30  140.0 MB  11.5 MB/s"),
        ({"estimated": True}, 80, "⏬ 7/30  140.0/~600.0 MB  ~23%  11.5 MB/s  0:40 left"),
        ({"bytes_per_second": 0.0}, 80, "⏬ 7/30  140.0/600.0 MB  23%  0.0 MB/s"),
        ({"received": 601 * MB}, 80, "⏬ 7/30  601.0/600.0 MB  100%  11.5 MB/s  0:00 left"),
        ({"bytes_per_second": MB / 10}, 80, "⏬ 7/30  140.0/600.0 MB  23%  0.1 MB/s  1:16:40 left"),
    ],
)
def test_live_line_shows_what_is_known(moment: dict[str, Any], columns: int, text: str) -> None:
    assert make_live(**moment).text(columns) == text


@pytest.mark.parametrize("columns", range(20, 121))
def test_live_line_is_never_as_wide_as_the_terminal(columns: int) -> None:
    big = {"done": 9_999, "videos": 10_000, "received": 10**15, "expected": 10**16}
    for moment in ({}, {"expected": None}, big, big | {"bytes_per_second": 1.0}):
        text = make_live(**moment).text(columns)
        wide = sum(1 + (unicodedata.east_asian_width(char) == "W") for char in text)
        assert wide < columns


# --- From Python -------------------------------------------------------------------------------


def test_orchestrator_gets_the_documented_results(
    tmp_path: Path, mocked: responses.RequestsMock, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(2):
        mocked.get(f"https://cdn.invalid/{i}.mp4", body=WHOLE, content_type="video/mp4")
    mocked.get("https://cdn.invalid/2.mp4", status=404)
    rows = [make_row(0), make_row(9, final_status="FAILED"), make_row(1, extra=[1]), make_row(2)]
    file = write_results(tmp_path, [*rows, make_row(3, video_url=None), None])
    output = tmp_path / "new" / "video_outputs"
    downloader = dsv.VideoDownloader(output_dir=str(output))
    assert output.is_dir()
    assert downloader.find_all_polling_results(directory=str(tmp_path)) == [file]
    results = downloader.load_polling_results(file)
    assert results == json.loads(file.read_text(encoding="utf-8"))
    tasks = downloader.get_succeeded_tasks(results)
    assert tasks == [rows[0], rows[2], rows[3]]
    assert [downloader.process_succeeded_task(task) for task in tasks] == [True, True, False]
    assert downloader.process_succeeded_task(tasks[0]) is True
    assert downloader.stats == {
        "total_succeeded": 4, "downloaded": 2, "failed_downloads": 1, "already_exists": 1,
    }  # fmt: skip
    downloader.print_final_stats()
    assert "✅ Total SUCCEEDED tasks found: 4\n" in capsys.readouterr().out


def test_a_rerun_lists_the_directory_once_and_looks_at_each_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [make_row(number) for number in range(5)]
    output = tmp_path / "videos"
    output.mkdir()
    lay_out(output, {f"picture_{number}.mp4": WHOLE for number in range(5)})
    lay_out(output, {f"picture_{number}.json": make_task(number) for number in range(5)})
    file, calls = write_results(tmp_path, rows), Counter[tuple[str, str]]()
    for name in ("listdir", "stat", "open"):
        called = getattr(os, name)

        def count(path: Any, *rest: Any, of: str = name, call: Any = called, **more: Any) -> Any:
            calls[of, os.path.basename(path)] += 1
            return call(path, *rest, **more)

        monkeypatch.setattr(os, name, count)
    downloader = make_downloader(output)
    assert downloader.process_polling_results_file(file) == 5
    downloader.print_final_stats()
    monkeypatch.undo()
    assert calls["listdir", "videos"] == 1
    assert {key: count for key, count in calls.items() if key[1].startswith("picture")} == {
        **{("stat", f"picture_{number}.mp4"): 1 for number in range(5)},
        **{("open", f"picture_{number}.json"): 1 for number in range(5)},
    }


def test_processing_a_file_answers_how_many_videos_are_on_disk(tmp_path: Path, cdn: Cdn) -> None:
    links = [
        cdn.add("0.mp4", make_mp4(0, SMALL)),
        cdn.add("1.mp4", make_mp4(1, SMALL), Reply(status=403), Reply()),
        cdn.add("2.mp4", make_mp4(2, SMALL)),
    ]
    rows = [make_row(i, video_url=link) for i, link in enumerate(links)]
    file = write_results(tmp_path, [*rows, rows[0]])
    assert make_downloader(tmp_path).process_polling_results_file(file) == 2
    downloader = make_downloader(tmp_path)
    assert downloader.process_polling_results_file(str(file)) == 3
    counted = {"total_succeeded": 3, "downloaded": 1, "already_exists": 2}
    assert downloader.stats == dsv.empty_stats() | counted
    assert downloader.process_polling_results_file(tmp_path / "missing.json") == 0


@pytest.mark.parametrize(
    "task",
    [None, 5, "SUCCEEDED", [], {}, {"final_status": "SUCCEEDED"}, make_row(0, video_url=5),
     make_row(0, video_url="https://cdn.invalid:99999/"), make_row(0, task_id=[], video_url=None)],
    ids=repr,
)  # fmt: skip
def test_useless_task_fails_without_raising(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Any
) -> None:
    monkeypatch.delenv("RUNWAYML_API_SECRET", raising=False)
    downloader = make_downloader(tmp_path)
    assert downloader.process_succeeded_task(task) is False
    assert downloader.stats == dsv.empty_stats() | {"total_succeeded": 1, "failed_downloads": 1}
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
        pytest.param({"seed": float("nan")}, id="NaN"),
        pytest.param({"seed": float("inf")}, id="infinite"),
        pytest.param({"theme": nested(5000)}, id="nesting"),
        pytest.param({"seed": 10**6000}, id="huge number"),
        pytest.param({"cluster_id": {1, 2}}, id="no JSON type"),
        pytest.param({"cluster_id": {(1, 2): b""}}, id="keys of no JSON type"),
        pytest.param({"duration": datetime(2025, 6, 17)}, id="date"),
    ],
)
def test_hostile_fields_never_cost_the_video(
    tmp_path: Path, mocked: responses.RequestsMock, changes: dict[str, Any]
) -> None:
    mocked.get("https://cdn.invalid/0.mp4", body=WHOLE, content_type="video/mp4")
    downloader = make_downloader(tmp_path)
    row = make_row(0, **changes)
    assert downloader.process_succeeded_task(row) is True
    (video,) = tmp_path.glob("*.mp4")
    assert video.read_bytes() == WHOLE
    strict_json(video.with_suffix(".json").read_bytes())
    assert downloader.create_metadata_json(row, video, tmp_path / "again.json") is True
    assert make_downloader(tmp_path).process_succeeded_task(row) is True
    assert len(mocked.calls) == 1


def test_create_metadata_json_writes_what_a_download_writes(tmp_path: Path) -> None:
    video, metadata = tmp_path / "a.mp4", tmp_path / "b.json"
    video.write_bytes(WHOLE)
    downloader = make_downloader(tmp_path)
    assert downloader.create_metadata_json(make_row(4), str(video), str(metadata)) is True
    written = strict_json(metadata.read_bytes())
    assert written["video_file"] == "a.mp4"
    assert written["runway_task_json"]["task_id"] == make_task_id(4)
    assert written["file_info"] == {
        "size_bytes": len(WHOLE), "size_mb": 0.0, "sha256": hashlib.sha256(WHOLE).hexdigest(),
    }  # fmt: skip
    assert names_in(tmp_path) == {"a.mp4", "b.json"}


@pytest.mark.parametrize(
    ("task", "video", "metadata"),
    [
        pytest.param({}, "missing.mp4", "b.json", id="no video"),
        pytest.param({}, ".", "b.json", id="a directory as video"),
        pytest.param({}, "a\0.mp4", "b.json", id="an impossible name"),
        pytest.param({}, "a.mp4", "missing/b.json", id="no directory"),
        pytest.param({}, "a.mp4", "a.mp4/b.json", id="a file as directory"),
        pytest.param(None, "a.mp4", "b.json", id="no task"),
    ],
)
def test_create_metadata_json_answers_false_when_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: Any, video: str, metadata: str
) -> None:
    (tmp_path / "a.mp4").write_bytes(WHOLE)
    downloader = make_downloader(tmp_path)
    done = downloader.create_metadata_json(task, tmp_path / video, tmp_path / metadata)
    assert done is False
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert names_in(tmp_path) == {"a.mp4"}


def test_on_outcome_is_called_once_per_task_in_the_calling_thread(tmp_path: Path, cdn: Cdn) -> None:
    rows = [make_row(i, video_url=cdn.add(f"{i}.mp4", make_mp4(i, SMALL))) for i in range(6)]
    rows[4]["video_url"] = cdn.add("gone.mp4", b"", Reply(status=404))
    done = {"picture_0.mp4": WHOLE, "picture_0.json": make_task(0)}
    lay_out(tmp_path, done | {"picture_5.mp4": WHOLE})
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
    assert outcomes[make_task_id(1)].path == tmp_path / "picture_1.mp4"
    assert outcomes[make_task_id(1)].size_bytes == SMALL
    assert "404" in outcomes[make_task_id(4)].error
    assert outcomes[make_task_id(4)].path is None


def test_a_callback_that_raises_leaves_no_thread_behind(tmp_path: Path, cdn: Cdn) -> None:
    rows = [make_row(i, video_url=cdn.add(f"{i}.mp4", make_mp4(i, SMALL))) for i in range(20)]

    def refuse(_outcome: dsv.Outcome) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        make_downloader(tmp_path, on_outcome=refuse).process_polling_results_file(
            write_results(tmp_path, rows)
        )
    ours = ("download", "commit")
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith(ours)])
    assert list(tmp_path.glob("*.mp4"))


def test_a_callback_may_try_its_failed_task_again(tmp_path: Path, cdn: Cdn) -> None:
    row = make_row(video_url=cdn.add("0.mp4", make_mp4(0, SMALL), Reply(status=404), Reply()))
    again: list[bool] = []

    def retry(outcome: dsv.Outcome) -> None:
        if outcome.status is dsv.Status.FAILED:
            again.append(downloader.process_succeeded_task(row))

    downloader = make_downloader(tmp_path, on_outcome=retry)
    assert downloader.process_succeeded_task(row) is False
    assert again == [True]


def test_neither_repr_nor_the_libraries_logs_show_a_query(
    tmp_path: Path, cdn: Cdn, caplog: pytest.LogCaptureFixture
) -> None:
    link = cdn.add("0.mp4", make_mp4(0, SMALL), Reply(headers={"X-Odd": "1\r\nno colon"}))
    seen: list[dsv.Outcome] = []
    with caplog.at_level("DEBUG"):
        downloader = make_downloader(tmp_path, on_outcome=seen.append)
        assert downloader.process_succeeded_task(make_row(video_url=link))
    assert "0.mp4" in caplog.text
    assert "secret" not in caplog.text + repr(seen)


def test_a_callers_stand_in_for_the_console_is_enough(
    tmp_path: Path, cdn: Cdn, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tee:
        def __init__(self) -> None:
            self.text = ""

        def write(self, text: str) -> None:
            self.text += text

    out = Tee()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", Tee())
    link = cdn.add("0.mp4", make_mp4(0, SMALL))
    assert make_downloader(tmp_path).process_succeeded_task(make_row(video_url=link))
    assert "✅ Downloaded: 0.00 MB" in out.text


def test_a_run_that_is_stopped_ends_while_it_still_plans() -> None:
    stop = dsv.Stop()
    seen = iter(stop.watch([make_task(0), make_task(1)]))
    assert next(seen).task_id == make_task_id(0)
    stop.on_signal(signal.SIGTERM, None)
    with pytest.raises(dsv.Stopped):
        next(seen)


def test_a_doubled_signal_is_one() -> None:
    """``timeout`` and CI runners signal the process, then its group."""
    stop = dsv.Stop()
    stop.on_signal(signal.SIGTERM, None)
    stop.on_signal(signal.SIGTERM, None)
    with pytest.raises(dsv.Stopped):
        stop.check()


def in_threads(action: Callable[[Any], object], items: Sequence[Any]) -> list[object]:
    """The results of ``action`` on all ``items``, each in a thread, all begun together."""
    results: list[object] = [None] * len(items)
    barrier = threading.Barrier(len(items))

    def work(index: int) -> None:
        barrier.wait(10)
        results[index] = action(items[index])

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(items))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_threads_on_one_downloader_give_each_task_its_own_name(tmp_path: Path, cdn: Cdn) -> None:
    bodies = [make_mp4(i, SMALL) for i in range(12)]
    rows = [
        make_row(i, target_filename_stub="sSß"[: 1 + i % 2], video_url=cdn.add(f"{i}.mp4", body))
        for i, body in enumerate(bodies)
    ]
    outcomes: list[Any] = []
    downloader = make_downloader(tmp_path, on_outcome=outcomes.append)
    assert in_threads(downloader.process_succeeded_task, rows) == [True] * 12
    assert downloader.stats == dsv.empty_stats() | {"total_succeeded": 12, "downloaded": 12}
    assert sorted(each.task_id for each in outcomes) == sorted(row["task_id"] for row in rows)
    names = owners(tmp_path)
    for i, body in enumerate(bodies):
        assert_whole(tmp_path, names[make_task_id(i)], make_task_id(i), body)
    assert len(names_in(tmp_path)) == 24


def test_threads_on_one_task_download_it_once(tmp_path: Path, cdn: Cdn) -> None:
    row = make_row(0, video_url=cdn.add("0.mp4", WHOLE))
    downloader = make_downloader(tmp_path)
    assert in_threads(downloader.process_succeeded_task, [row] * 8) == [True] * 8
    counted = {"total_succeeded": 8, "downloaded": 1, "already_exists": 7}
    assert downloader.stats == dsv.empty_stats() | counted
    assert len(cdn.asked("0.mp4")) == 1
    assert_whole(tmp_path, "picture_0", make_task_id(0), WHOLE)


@pytest.mark.parametrize("name", ["a_file", "a_file/below", "nul\0"])
def test_output_directory_that_cannot_be_made_is_one_clear_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "a_file").touch()
    with pytest.raises(dsv.JobError, match="output directory") as raised:
        dsv.VideoDownloader(tmp_path / name)
    assert "\n" not in str(raised.value)
    assert dsv.printable(str(raised.value)) == str(raised.value)


# --- Nothing that was paid for is lost ---------------------------------------------------------

VIDEO_BYTES = 60_000
HALF = VIDEO_BYTES // 2
SECRETS = re.compile(r"_jwt|eyJ|secret", re.IGNORECASE)  # what queries and the API key hold
API_KEY = "key_secret_0123456789abcdef"


def download(
    directory: Path, rows: Iterable[Any], *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A run of the real script for ``rows``; whatever it does, it tells no secret."""
    write_results(directory, rows)
    result = run_script(directory, *arguments, env=env)
    assert "Traceback" not in result.stdout + result.stderr
    assert not SECRETS.search((result.stdout + result.stderr).replace("RUNWAYML_API_SECRET", ""))
    return result


def hidden_in(directory: Path) -> dict[str, bytes]:
    """The part files and whatever else a run keeps out of sight, but for its lock."""
    names = {name for name in names_in(directory) if name.startswith(".")}
    return {name: (directory / name).read_bytes() for name in names if "lock" not in name}


def last_box(video: bytes) -> int:
    """Where the last box of ``video`` begins: cut there, all boxes are whole."""
    sizes = (int.from_bytes(video[at : at + 4], "big") for at in range(len(video)))
    return next(at for at, size in enumerate(sizes) if at and at + size == len(video))


# One table of replies. Each row: the replies in turn (the last one stays), then how often the
# video is asked for with --retries 2, then why it fails, as a pattern; "" when it comes whole.

WRONG_TYPE = {"Content-Type": "text/html; charset=utf-8"}


def make_reply_table(video: bytes) -> dict[str, tuple[Sequence[Reply], int, str]]:
    gzipped, deflated = gzip.compress(video), zlib.compress(video)
    half, last = len(video) // 2, last_box(video)
    damaged = gzipped[:-6] + bytes([gzipped[-6] ^ 1]) + gzipped[-5:]

    def encoded(body: bytes, encoding: str = "gzip", **how: Any) -> Reply:
        return Reply(body=body, headers={"Content-Encoding": encoding}, **how)

    def status(code: int, **headers: str) -> Reply:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return Reply(status=code, body=b"no", headers={"Content-Type": "video/mp4"} | names)

    def redirect(code: int, target: str) -> Reply:
        return Reply(status=code, body=b"", headers={"Location": target})

    good = Reply()
    return {
        "good": ([good], 1, ""),
        "cut": ([Reply(send=half), good], 2, ""),
        "cut-before-the-first-byte": ([Reply(send=0), good], 2, ""),
        "cut-by-one-byte": ([Reply(send=len(video) - 1), good], 2, ""),
        "cut-between-two-boxes": ([Reply(send=last, headers={"ETag": None}), good], 2, ""),
        "cut-again-and-again": ([Reply(send=len(video) // 5 + 1)], 5, ""),
        "reset": ([Reply(send=half, ending="reset"), good], 2, ""),
        "reset-before-the-first-byte": ([Reply(send=0, ending="reset"), good], 2, ""),
        "500-then-good": ([status(500), good], 2, ""),
        "502-503-then-good": ([status(502), status(503), good], 3, ""),
        "always-500": ([status(500)], 3, "HTTP 500"),
        "always-599": ([status(599)], 3, "HTTP 599"),
        "503-retry-after": ([status(503, Retry_After="1"), good], 2, ""),
        "503-retry-after-a-past-date": (
            [status(503, Retry_After="Tue, 17 Jun 2025 04:00:00 GMT"), good], 2, ""),
        "503-retry-after-nonsense": ([status(503, Retry_After="soon"), good], 2, ""),
        "503-retry-after-too-long": ([status(503, Retry_After="300"), good], 1, "503.* 300 s"),
        "429-retry-after-a-far-date": (
            [status(429, Retry_After="Sat, 17 Jun 2079 04:00:00 GMT"), good], 1, "429.* wait"),
        "408-then-good": ([status(408), good], 2, ""),
        "425-then-good": ([status(425), good], 2, ""),
        "429-then-good": ([status(429), good], 2, ""),
        "204": ([Reply(status=204, body=b"", headers={"Content-Length": None})], 1, "HTTP 204"),
        "304": ([Reply(status=304, body=b"", headers={"Content-Length": None})], 1, "HTTP 304"),
        **{str(code): ([status(code), good], 1, f"HTTP {code}") for code in
           (400, 401, 402, 403, 404, 405, 410, 416, 451)},
        "html-by-type": ([Reply(headers=WRONG_TYPE)], 1, "error page.*text/html"),
        "plain-text-by-type": ([Reply(headers={"Content-Type": "text/plain"})], 1, "error page"),
        "json-by-type": ([Reply(headers={"Content-Type": "application/json"})], 1, "error page"),
        "html-by-first-bytes": ([Reply(body=b"\n <!DOCTYPE html><p>Sorry")], 1, "error page"),
        "json-by-first-bytes": ([Reply(body=b'{"message": "denied"}')], 1, "error page"),
        "xml-by-first-bytes": ([Reply(body=b"\xef\xbb\xbf<?xml version='1.0'?><Error/>")], 1,
                               "error page"),
        "html-by-first-bytes-chunked": ([Reply(body=b"<html>", framing="chunked")], 1,
                                        "error page"),
        "empty": ([Reply(body=b"")], 1, "empty"),
        "empty-chunked": ([Reply(body=b"", framing="chunked")], 1, "empty"),
        "empty-gzipped": ([encoded(gzip.compress(b""))], 1, "empty"),
        "chunked": ([Reply(framing="chunked")], 1, ""),
        "chunked-and-cut": ([Reply(framing="chunked", send=half), good], 2, ""),
        "chunked-and-reset": ([Reply(framing="chunked", send=half, ending="reset"), good], 2, ""),
        "until-close": ([Reply(framing="close")], 1, ""),
        "until-close-and-cut": ([Reply(framing="close", send=half), good], 2, ""),
        "until-close-and-cut-in-the-first-box": ([Reply(framing="close", send=6), good], 2, ""),
        "until-close-always-cut": ([Reply(framing="close", send=half)], 3, "cut short"),
        "whole-by-length-but-cut": ([Reply(body=video[:half]), good], 2, ""),
        "gzip": ([encoded(gzipped)], 1, ""),
        "gzip-in-two-members": (
            [encoded(gzip.compress(video[:half]) + gzip.compress(video[half:]))], 1, ""),
        "gzip-chunked": ([encoded(gzipped, framing="chunked")], 1, ""),
        "gzip-and-cut": ([encoded(gzipped, send=half), good], 2, ""),
        "gzip-until-close-and-cut": ([encoded(gzipped, framing="close", send=half), good], 2, ""),
        "gzip-cut-before-its-checksum": ([encoded(gzipped[:-4], framing="close"), good], 2, ""),
        "gzip-damaged": ([encoded(damaged), good], 2, ""),
        "gzip-that-is-none": ([encoded(video), good], 2, ""),
        "gzip-of-a-page": ([encoded(gzip.compress(b"<html>"))], 1, "error page"),
        "deflate": ([encoded(deflated, "deflate")], 1, ""),
        "deflate-without-head": ([encoded(deflated[2:-4], "deflate")], 1, ""),
        "deflate-and-cut": ([encoded(deflated, "deflate", send=half), good], 2, ""),
        "identity-said": ([encoded(video, "identity")], 1, ""),
        "unknown-encoding": ([encoded(deflated, "zstd-of-2031")], 1, "encoding.*zstd-of-2031"),
        "unknown-encoding-said-of-a-plain-mp4": ([encoded(video, "zstd-of-2031")], 1, ""),
        "redirected-301": ([redirect(301, "/good.mp4?_jwt=secret")], 1, ""),
        "redirected-302-307-308": ([redirect(302, "/hop-1.mp4?_jwt=secret")], 1, ""),
        "redirected-to-a-dead-end": ([redirect(302, "/nothing.mp4?_jwt=secret")], 1, "HTTP 404"),
        "redirected-in-a-loop": ([redirect(302, "?_jwt=secret")], 31, "redirect"),
        "redirected-to-ftp": ([redirect(302, "ftp://127.0.0.1/_jwt=secret")], 1, "address"),
        "redirected-to-no-port": ([redirect(302, "http://a:99999/?_jwt=secret")], 1, "address"),
        "redirected-to-half-an-address": ([redirect(302, "http://[::1/?_jwt=secret")], 1,
                                          "address"),
        "redirected-nowhere": ([Reply(status=302, body=b"")], 1, "HTTP 302"),
        "length-too-short": ([Reply(headers={"Content-Length": str(half)}), good], 2, ""),
        "length-too-long": ([Reply(framing="close", headers={"Content-Length": "999999"}), good],
                            3, ""),
        "length-nonsense": ([Reply(framing="close", headers={"Content-Length": "many"})], 1, ""),
        "length-negative": ([Reply(framing="close", headers={"Content-Length": "-1"})], 1, ""),
        "part-not-asked-for": (
            [Reply(status=206, headers={"Content-Range": f"bytes 9-{half}/{len(video)}"}), good],
            2, ""),
    }  # fmt: skip


def add_redirect_targets(cdn: Cdn, video: bytes) -> None:
    cdn.add("good.mp4", video)
    for hop, code, target in ((1, 307, "/hop-2.mp4"), (2, 308, "/good.mp4")):
        cdn.add(f"hop-{hop}.mp4", b"", Reply(status=code, body=b"", headers={"Location": target}))


@dataclass
class TableRun:
    """What one run of the script made of a table, a row a task."""

    cdn: Cdn
    output_dir: Path
    exit_code: int
    videos: Mapping[str, Any]  # by task_id, as --json gives them
    console: str


def run_table(cdn: Cdn, directory: Path, rows: Iterable[Any], *arguments: str) -> TableRun:
    result = download(directory, rows, "--json", "--workers", "64", *arguments)
    videos = {video["task_id"]: video for video in json.loads(result.stdout)["videos"]}
    output_dir = directory / "video_outputs"
    return TableRun(cdn, output_dir, result.returncode, videos, result.stderr)


def ends_whole(run: TableRun, number: int, body: bytes) -> None:
    assert run.videos[make_task_id(number)]["error"] is None
    assert_whole(run.output_dir, f"picture_{number}", make_task_id(number), body)


def ends_failed(run: TableRun, number: int, reason: str) -> None:
    video = run.videos[make_task_id(number)]
    assert video["status"] == "failed"
    assert re.search(reason, video["error"])
    assert not names_in(run.output_dir) & {f"picture_{number}.mp4", f"picture_{number}.json"}


REPLY_TABLE = make_reply_table(make_mp4("table", VIDEO_BYTES))


@pytest.fixture(scope="module")
def reply_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TableRun]:
    video = make_mp4("table", VIDEO_BYTES)
    with Cdn() as cdn:
        add_redirect_targets(cdn, video)
        rows = [
            make_row(number, video_url=cdn.add(f"{name}/it.mp4", video, *replies))
            for number, (name, (replies, _, _)) in enumerate(REPLY_TABLE.items())
        ]
        yield run_table(cdn, tmp_path_factory.mktemp("replies"), rows, "--retries", "2")


@pytest.mark.parametrize("name", REPLY_TABLE)
def test_a_reply_is_retried_if_that_may_help_and_ends_whole_or_failed(
    reply_run: TableRun, name: str
) -> None:
    _, requests, reason = REPLY_TABLE[name]
    number = list(REPLY_TABLE).index(name)
    if reason:
        ends_failed(reply_run, number, reason)
    else:
        ends_whole(reply_run, number, make_mp4("table", VIDEO_BYTES))
    assert len(reply_run.cdn.asked(f"{name}/it.mp4")) == requests


def test_nothing_is_left_of_what_failed(reply_run: TableRun) -> None:
    whole = [number for number, row in enumerate(REPLY_TABLE.values()) if not row[2]]
    wanted = {f"picture_{number}.{suffix}" for number in whole for suffix in ("mp4", "json")}
    assert names_in(reply_run.output_dir) == wanted
    assert reply_run.exit_code == 3


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"RIFF\0\0\0\0AVI " * 99, id="another-container"),
        pytest.param(make_mp4(0, 9000) + b"\0\0\0\7free" * 9, id="an-odd-box-at-the-end"),
        pytest.param(b"[video]", id="a-few-bytes-of-anything"),
    ],
)
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_what_is_no_mp4_but_whole_is_kept_with_a_warning(
    cdn: Cdn, tmp_path: Path, capsys: pytest.CaptureFixture[str], body: bytes, framing: str
) -> None:
    row = make_row(video_url=cdn.add("0.mp4", body, Reply(framing=framing)))
    assert make_downloader(tmp_path).process_succeeded_task(row)
    assert_whole(tmp_path, "picture_0", make_task_id(0), body)
    assert "⚠️ kept, but it is" in capsys.readouterr().out
    assert len(cdn.requests) == 1


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_a_long_body_of_a_redirect_is_left_unread(cdn: Cdn, tmp_path: Path, framing: str) -> None:
    target = cdn.add("it.mp4", OBJECT)
    redirect = Reply(
        302, b"<" * 9_000_000, {"Location": target}, framing=framing, send=600_000, ending="hang"
    )
    row = make_row(video_url=cdn.add("0.mp4", b"", redirect))
    assert make_downloader(tmp_path, retries=0).process_succeeded_task(row)
    assert_whole(tmp_path, "picture_0", make_task_id(0), OBJECT)


# Resuming. Each row: the replies after one that was cut half way, from which byte on each was
# asked for (None: all of it), and whether the object was another one by then.

OBJECT, OTHER = make_mp4("object", VIDEO_BYTES), make_mp4("other", VIDEO_BYTES)
DATED = {"ETag": None, "Last-Modified": "Tue, 17 Jun 2025 04:00:00 GMT"}
WEAK = {"ETag": 'W/"object"'}
CUT = Reply(send=HALF)
END = VIDEO_BYTES - 1


def ranged(first: int, last: int, total: int) -> Reply:
    return Reply(headers={"Content-Range": f"bytes {first}-{last}/{total}"})


def sent_from(first: int) -> Reply:
    """A 206 from ``first`` on, whatever was asked for."""
    headers = {"Content-Range": f"bytes {first}-{END}/{VIDEO_BYTES}", "ETag": make_etag(OBJECT)}
    return Reply(status=206, body=OBJECT[first:], headers=headers)


RESUME_TABLE: dict[str, tuple[Sequence[Reply], Sequence[int | None], bytes]] = {
    "the-same-object": ([CUT, Reply()], [None, HALF], OBJECT),
    "after-a-503": ([CUT, Reply(status=503), Reply()], [None, HALF, HALF], OBJECT),
    "after-a-reset": ([CUT, Reply(send=0, ending="reset"), Reply()], [None, HALF, HALF], OBJECT),
    "cut-twice-more": (
        [CUT, Reply(send=HALF // 2), Reply(send=HALF // 4), Reply()],
        [None, HALF, HALF + HALF // 2, HALF + HALF // 2 + HALF // 4],
        OBJECT,
    ),
    "chunked": ([CUT, Reply(framing="chunked")], [None, HALF], OBJECT),
    "until-close": ([CUT, Reply(framing="close")], [None, HALF], OBJECT),
    "another-object": ([CUT, Reply(body=OTHER)], [None, HALF], OTHER),
    "another-object-cut-too": (
        [CUT, Reply(body=OTHER, send=HALF), Reply(body=OTHER)], [None, HALF, HALF], OTHER),
    "another-object-if-range-ignored": (
        [CUT, Reply(body=OTHER, if_range=False)], [None, HALF, None], OTHER),
    "another-longer-object-if-range-ignored": (
        [CUT, Reply(body=OTHER + make_mp4(1), if_range=False)], [None, HALF, None],
        OTHER + make_mp4(1)),
    "another-object-of-the-same-etag": (
        [CUT, Reply(body=OTHER + make_mp4(1), headers={"ETag": make_etag(OBJECT)})],
        [None, HALF, None], OTHER + make_mp4(1)),
    "another-shorter-object": (  # 416
        [CUT, Reply(body=make_mp4(1, HALF), if_range=False)], [None, HALF, None],
        make_mp4(1, HALF)),
    "range-ignored": ([CUT, Reply(ranges=False)], [None, HALF], OBJECT),
    "206-without-etag": ([CUT, Reply(headers={"ETag": None}, if_range=False)],
                         [None, HALF, None], OBJECT),
    "206-with-another-etag": ([CUT, Reply(headers={"ETag": '"x"'}, if_range=False)],
                              [None, HALF, None], OBJECT),
    "206-with-the-etag-made-weak": (
        [CUT, Reply(headers={"ETag": "W/" + make_etag(OBJECT)}, if_range=False)],
        [None, HALF, None], OBJECT),
    "206-too-early": ([CUT, sent_from(HALF - 1), Reply()], [None, HALF, None], OBJECT),
    "206-too-late": ([CUT, sent_from(HALF + 1), Reply()], [None, HALF, None], OBJECT),
    "206-of-everything": ([CUT, sent_from(0), Reply()], [None, HALF, None], OBJECT),
    "206-of-another-total": ([CUT, ranged(HALF, END, VIDEO_BYTES + 1), Reply()],
                             [None, HALF, None], OBJECT),
    "206-of-less-than-its-length": ([CUT, ranged(HALF, END - 9, VIDEO_BYTES), Reply()],
                                    [None, HALF, None], OBJECT),
    "206-backwards": ([CUT, ranged(END, HALF, VIDEO_BYTES), Reply()], [None, HALF, None], OBJECT),
    "206-of-unknown-total": (
        [CUT, Reply(headers={"Content-Range": f"bytes {HALF}-{END}/*"}), Reply()],
        [None, HALF, None], OBJECT),
    "206-without-content-range": ([CUT, Reply(headers={"Content-Range": None}), Reply()],
                                  [None, HALF, None], OBJECT),
    "206-gzipped": ([CUT, Reply(headers={"Content-Encoding": "gzip"}), Reply()],
                    [None, HALF, None], OBJECT),
    "last-modified": ([Reply(send=HALF, headers=DATED), Reply(headers=DATED)],
                      [None, HALF], OBJECT),
    "last-modified-changed": (
        [Reply(send=HALF, headers=DATED),
         Reply(body=OTHER, if_range=False, headers=DATED | {"Last-Modified": "Wed, 18 Jun 2025"})],
        [None, HALF, None], OTHER),
    "weak-etag": ([Reply(send=HALF, headers=WEAK), Reply(body=OTHER, headers=WEAK)],
                  [None, None], OTHER),
    "weak-etag-beside-a-date": (
        [Reply(send=HALF, headers=WEAK | {"Last-Modified": DATED["Last-Modified"]}), Reply()],
        [None, None], OBJECT),
    "no-validator": ([Reply(send=HALF, headers={"ETag": None}), Reply(body=OTHER)],
                     [None, None], OTHER),
    "no-length": ([Reply(send=HALF, framing="chunked"), Reply(body=OTHER)], [None, None], OTHER),
    "an-etag-too-long-to-keep": (
        [Reply(send=HALF, headers={"ETag": f'"{"x" * 300}"'}), Reply(body=OTHER)],
        [None, None], OTHER),
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


@pytest.mark.parametrize("name", RESUME_TABLE)
def test_a_cut_video_is_resumed_if_it_is_the_same_and_never_stitched(
    resume_run: TableRun, name: str
) -> None:
    _, starts, body = RESUME_TABLE[name]
    ends_whole(resume_run, list(RESUME_TABLE).index(name), body)
    assert [request.range_start for request in resume_run.cdn.asked(f"{name}.mp4")] == starts


def test_nothing_hidden_is_left_when_all_is_done(resume_run: TableRun) -> None:
    assert resume_run.exit_code == 0
    assert len(names_in(resume_run.output_dir)) == 2 * len(RESUME_TABLE)


@pytest.mark.parametrize(
    ("name", "validator"),
    [("the-same-object", make_etag(OBJECT)), ("last-modified", DATED["Last-Modified"])],
)
def test_a_range_is_asked_for_under_the_condition_of_the_validator(
    resume_run: TableRun, name: str, validator: str
) -> None:
    first, second = resume_run.cdn.asked(f"{name}.mp4")
    assert "If-Range" not in first.headers
    assert second.headers["If-Range"] == validator
    assert {each.headers["Accept-Encoding"] for each in (first, second)} == {"identity"}


def test_a_part_that_cannot_be_resumed_is_removed_at_once(cdn: Cdn, tmp_path: Path) -> None:
    kinds = (Reply(send=HALF, headers=WEAK), Reply(send=HALF, headers={"ETag": None}))
    links = [cdn.add(f"{i}.mp4", OBJECT, cut, Reply(wait_s=60)) for i, cut in enumerate(kinds)]
    write_results(tmp_path, [make_row(i, video_url=link) for i, link in enumerate(links)])
    process = start_script(tmp_path)
    wait_until(lambda: len(cdn.requests) == 4)
    left = hidden_in(tmp_path / "video_outputs")
    cdn.released.set()
    assert finish(process).returncode == 0
    assert left == {}


def test_a_part_is_dropped_when_its_task_is_in_no_results_file(cdn: Cdn, tmp_path: Path) -> None:
    download(tmp_path, [make_row(video_url=cdn.add("0.mp4", OBJECT, CUT))], "--retries", "0")
    assert list(hidden_in(tmp_path / "video_outputs").values()) == [OBJECT[:HALF]]
    download(tmp_path, [make_row(1, video_url=cdn.add("1.mp4", OTHER))])
    assert names_in(tmp_path / "video_outputs") == {"picture_1.mp4", "picture_1.json"}


# Stalls. Each row: the replies, how the video ends, and from which byte on it was asked for.

STALL_TABLE: dict[str, tuple[Sequence[Reply], str, Sequence[int | None]]] = {
    "silent-before-the-head": ([Reply(wait_s=60), Reply()], "", [None, None]),
    "silent-half-way": ([Reply(send=HALF, ending="hang"), Reply()], "", [None, HALF]),
    "always-silent": ([Reply(wait_s=60)], "stalled", [None, None]),
    "slow-but-above-the-limit": ([Reply(bytes_per_second=40_000)], "", [None]),
}


class _TricklingHead(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while True:
                self.wfile.write(b"X-Padding: 1\r\n")
                time.sleep(0.05)


@contextlib.contextmanager
def trickling_head() -> Iterator[str]:
    """A server whose head never ends; its address."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _TricklingHead) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


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
    with Cdn() as cdn, trickling_head() as endless, deaf_port() as deaf:
        links = [cdn.add(f"{name}.mp4", OBJECT, *row[0]) for name, row in STALL_TABLE.items()]
        trickle = cdn.add("trickle.mp4", OBJECT, Reply(bytes_per_second=400), Reply())
        links += [trickle, f"{endless}/0.mp4?_jwt=secret", f"{deaf}/0.mp4?_jwt=secret"]
        rows = [make_row(number, video_url=link) for number, link in enumerate(links)]
        limits = ("--timeout", "1", "--retries", "1")
        yield run_table(cdn, tmp_path_factory.mktemp("stalls"), rows, *limits)


@pytest.mark.parametrize("name", STALL_TABLE)
def test_a_silent_server_is_a_stall(stall_run: TableRun, name: str) -> None:
    _, reason, starts = STALL_TABLE[name]
    number = list(STALL_TABLE).index(name)
    if reason:
        ends_failed(stall_run, number, reason)
    else:
        ends_whole(stall_run, number, OBJECT)
    assert [request.range_start for request in stall_run.cdn.asked(f"{name}.mp4")] == starts


def test_a_trickle_is_a_stall_and_what_came_is_kept(stall_run: TableRun) -> None:
    ends_whole(stall_run, len(STALL_TABLE), OBJECT)
    starts = [request.range_start for request in stall_run.cdn.asked("trickle.mp4")]
    assert starts[0] is None
    assert 0 < (starts[1] or 0) < HALF


@pytest.mark.parametrize("place", [1, 2], ids=["trickling-head", "deaf-port"])
def test_a_server_that_never_comes_to_the_point_is_a_stall(stall_run: TableRun, place: int) -> None:
    ends_failed(stall_run, len(STALL_TABLE) + place, "stalled|no connection within 1 s")


def test_who_waits_for_a_server_holds_nobody_up(
    cdn: Cdn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, half = Reply(wait_s=60), Reply(send=HALF, ending="hang")
    monkeypatch.setenv("RUNWAYML_API_SECRET", "key")
    monkeypatch.setenv("RUNWAYML_BASE_URL", cdn.url)
    with deaf_port() as deaf:
        waiting = [
            *(cdn.add(f"silent{number}.mp4", OBJECT, silent) for number in range(3)),
            *(cdn.add(f"half{number}.mp4", OBJECT, half) for number in range(3)),
            *[f"{deaf}/0.mp4"] * 2,
            *[f"{deaf}/0.mp4".replace("http:", "https:")] * 2,
            *(None for _ in range(3)),  # asks the API
        ]
        links = [*waiting, *(cdn.add(f"good{number}.mp4", OBJECT) for number in range(3))]
        rows = [make_row(number, video_url=link) for number, link in enumerate(links)]
        for row in rows:
            cdn.add(f"v1/tasks/{row['task_id']}", b"", silent)
        ended = list[str]()
        downloader = make_downloader(
            tmp_path, timeout=1.0, retries=0, on_outcome=lambda each: ended.append(each.status)
        )
        assert downloader.process_polling_results_file(write_results(tmp_path, rows)) == 3
    assert ended == ["downloaded"] * 3 + ["failed"] * len(waiting)


# Links that die, and the Runway API. Each row: its replies in turn, how often it is asked with
# --retries 1, and why the task fails, if it does.

EXPIRED = 1_750_000_000  # 2025-06-15 15:06:40 UTC


def dying(link: str, expires: float) -> str:
    return make_jwt_link(link.split("?")[0], expires)


def make_api_table(fresh: str) -> dict[str, tuple[Sequence[Reply], int, str]]:
    def answer(body: object, status: int = 200, **headers: str) -> Reply:
        text = body if isinstance(body, str) else json.dumps(body)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return Reply(status, text.encode(), {"Content-Type": "application/json"} | names)

    def task(**fields: Any) -> Reply:
        return answer({"id": "x", "status": "SUCCEEDED", "output": [fresh]} | fields)

    good = task()
    return {
        "fresh-link": ([good], 1, ""),
        "several-links": ([task(output=[fresh, "http://127.0.0.1:9/other"])], 1, ""),
        "fresh-link-after-a-cut": ([good], 1, ""),
        "no-link-in-the-row": ([good], 1, ""),
        "fresh-link-refused-too": ([good], 1, "fresh link was refused"),
        "429-then-good": ([answer({}, 429), good], 2, ""),
        "429-retry-after-too-long": ([answer({}, 429, Retry_After="300")], 1, "429.*300 s"),
        "500-then-good": ([answer({}, 500), good], 2, ""),
        "cut-then-good": ([Reply(body=b"{" * 99, send=9), good], 2, ""),
        "always-500": ([answer({}, 500)], 2, "API.*500"),
        "400": ([answer({}, 400)], 1, "API.*400"),
        "401": ([answer({}, 401)], 1, "API.*key.*401"),
        "403": ([answer({}, 403)], 1, "API.*key.*403"),
        "404": ([answer({}, 404)], 1, "API.*no such task.*404"),
        "redirect": ([answer({}, 302, Location=fresh)], 1, "API.*302"),
        "no-output": ([task(output=[])], 1, "API.*no output"),
        "output-null": ([task(output=None)], 1, "API.*no output"),
        "output-not-a-link": ([task(output=[{"url": 1}])], 1, "API.*no output"),
        "output-text": ([task(output=fresh)], 1, "API.*no output"),
        "failed-by-now": ([task(status="FAILED", output=None)], 1, "API.*FAILED"),
        "status-nonsense": ([task(status=["\x1b[31m" * 99])], 1, "API.*SUCCEEDED"),
        "not-json": ([answer("<html>")], 1, "API.*not a task"),
        "a-list": ([answer([])], 1, "API.*not a task"),
        "nested-absurdly": ([answer("[" * 100_000)], 1, "API.*not a task"),
        "empty": ([answer("")], 1, "API.*not a task"),
        "not-utf-8": ([Reply(body=b"\xff\xfe{}")], 1, "API.*not a task"),
    }


@dataclass
class ApiRun(TableRun):
    api: Cdn
    directory: Path


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
            dead = cdn.add(f"{name}/dead.mp4", OBJECT, *before.get(name, [refused]))
            link = None if name == "no-link-in-the-row" else dying(dead, EXPIRED)
            rows.append(make_row(number, video_url=link))
        env = {"RUNWAYML_API_SECRET": API_KEY, "RUNWAYML_BASE_URL": api.url + "/"}
        write_results(directory, rows)
        result = download(directory, rows, "--json", "--retries", "1", env=env)
        videos = {video["task_id"]: video for video in json.loads(result.stdout)["videos"]}
        output_dir = directory / "video_outputs"
        yield ApiRun(cdn, output_dir, result.returncode, videos, result.stderr, api, directory)


@pytest.mark.parametrize("name", make_api_table(""))
def test_a_dead_link_is_renewed_by_the_api_or_said_to_be_dead(api_run: ApiRun, name: str) -> None:
    _, calls, reason = make_api_table("")[name]
    number = list(make_api_table("")).index(name)
    if reason:
        ends_failed(api_run, number, reason)
    else:
        ends_whole(api_run, number, OBJECT)
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


def test_a_query_is_kept_in_the_link_of_the_metadata_alone(api_run: ApiRun) -> None:
    saved = [path for path in api_run.output_dir.iterdir() if path.suffix == ".json"]
    assert saved
    for path in saved:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        metadata["runway_task_json"].pop("video_url")
        assert not SECRETS.search(json.dumps(metadata) + path.name)


def test_without_a_key_a_dead_link_is_said_with_its_expiry_and_what_helps(
    cdn: Cdn, tmp_path: Path
) -> None:
    links: list[str | None] = [
        dying(cdn.add(f"{status}-{expires}.mp4", b"", Reply(status=status)), expires)
        for status in (401, 403, 404, 410)
        for expires in (EXPIRED, 4_000_000_000)
    ]
    undated = cdn.add("x.mp4", b"", Reply(status=403)).replace("_jwt=", "_jwt=a.!\u00e9.")
    rows = [make_row(i, video_url=link) for i, link in enumerate([*links, undated, None])]
    run = run_table(cdn, tmp_path, rows)
    assert run.exit_code == 3
    for number in range(len(rows)):
        ends_failed(run, number, "RUNWAYML_API_SECRET" if number < 9 else "video_url.*RUNWAYML_API")
        if number < len(links):
            expiry = ("2025-06-15 15:06:40 UTC", "2096-10-02 07:06:40 UTC")[number % 2]
            ends_failed(run, number, expiry)
    assert len(cdn.requests) == len(links) + 1


def test_the_link_that_dies_soonest_is_asked_for_first(cdn: Cdn, tmp_path: Path) -> None:
    expiries = (4_000_000_300, None, EXPIRED, 4_000_000_100, 4_000_000_200.5)
    rows = []
    for number, expiry in enumerate(expiries):
        link = cdn.add(f"{number}.mp4", make_mp4(number))
        dated = link if expiry is None else dying(link, expiry)
        rows.append(make_row(number, video_url=dated))
    download(tmp_path, rows, "--workers", "1")
    assert [request.path for request in cdn.requests] == [f"/{i}.mp4" for i in (2, 3, 4, 0, 1)]


# Many at once.


def test_200_videos_from_a_server_that_misbehaves_on_a_third(cdn: Cdn, tmp_path: Path) -> None:
    rng = random.Random(200)
    bodies = [make_mp4(number, rng.randrange(20_000, 60_000)) for number in range(200)]
    faulty = {number: rng.choice(list(REPLY_TABLE)) for number in rng.sample(range(200), 67)}
    add_redirect_targets(cdn, bodies[0])
    reasons: dict[int, str] = {}
    rows = []
    for number, body in enumerate(bodies):
        if "redirected" in faulty.get(number, ""):
            body = bodies[number] = bodies[0]  # which is what the redirects lead to
        replies, _, reason = make_reply_table(body)[faulty.get(number, "good")]
        rows.append(make_row(number, video_url=cdn.add(f"{number}.mp4", body, *replies)))
        if reason:
            reasons[number] = reason
    run = run_table(cdn, tmp_path, rows, "--retries", "2")
    assert run.exit_code == 3
    for number, body in enumerate(bodies):
        if number in reasons:
            ends_failed(run, number, reasons[number])
            assert make_task_id(number)[:8] in run.console.split("DOWNLOAD STATISTICS")[1]
        else:
            ends_whole(run, number, body)
    assert len(names_in(run.output_dir)) == 2 * (200 - len(reasons))


# Runs that end before their time: killed at a step, killed anywhere, stopped by a signal.


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in out + err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def sabotage(directory: Path, code: str) -> dict[str, str]:
    """The environment of a script whose interpreter runs ``code`` before anything else."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(code, encoding="utf-8")
    inherited = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(directory), inherited)))}


KILL_AT_STEP = """
import functools, os, signal
left = {step}
def count(call, *arguments, **options):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*arguments, **options)
for name in ("fsync", "link", "rename", "replace", "unlink"):
    setattr(os, name, functools.partial(count, getattr(os, name)))
"""


@pytest.mark.parametrize("step", range(1, 9))  # there are at least four
def test_a_kill_before_any_step_of_the_commit_costs_nothing(
    cdn: Cdn, tmp_path: Path, step: int
) -> None:
    rows = [make_row(video_url=cdn.add("0.mp4", OBJECT))]
    output_dir = tmp_path / "video_outputs"
    killed = download(tmp_path, rows, env=sabotage(tmp_path / "s", KILL_AT_STEP.format(step=step)))
    assert killed.returncode == -signal.SIGKILL or (killed.returncode == 0 and step > 4)
    if "picture_0.mp4" in names_in(output_dir):
        assert_whole(output_dir, "picture_0", make_task_id(0), OBJECT)
    assert download(tmp_path, rows).returncode == 0
    assert_whole(output_dir, "picture_0", make_task_id(0), OBJECT)
    assert names_in(output_dir) == {"picture_0.mp4", "picture_0.json"}
    assert len(cdn.requests) == 1


@dataclass
class KillChain:
    """Runs that are killed one after the other, and what the next one finds and asks for."""

    directory: Path
    rng: random.Random
    bodies: Mapping[str, bytes]  # by path

    @property
    def output_dir(self) -> Path:
        return self.directory / "video_outputs"

    def start(self, cdn: Cdn, reply: Reply) -> subprocess.Popen[str]:
        rows = [
            make_row(number, video_url=cdn.add(path[1:], body, reply))
            for number, (path, body) in enumerate(self.bodies.items())
        ]
        write_results(self.directory, rows)
        return start_script(self.directory, "--workers", "4")

    def kill_one(self) -> None:
        """Kill a run at its first request, or when it has saved so many bytes."""
        left = self.parts_left()
        with Cdn() as cdn:
            enough = self.saved_bytes() + self.rng.randrange(80_000)
            at_request = self.rng.random() < 0.2
            process = self.start(cdn, Reply(bytes_per_second=100_000))
            wait_until(lambda: cdn.requests and (at_request or self.saved_bytes() > enough))
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        self.check_requests(cdn, left)
        self.check_videos()

    def saved_bytes(self) -> int:
        total = 0
        if self.output_dir.exists():
            for path in self.output_dir.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    total += path.stat().st_size
        return total

    def parts_left(self) -> dict[str, int]:
        """By path, how much of it is there; without what is too short to tell of what it is."""
        left = {}
        for data in hidden_in(self.output_dir).values() if self.output_dir.exists() else ():
            paths = [path for path, body in self.bodies.items() if body.startswith(data)]
            assert paths or data.startswith(b"{")  # metadata, else the start of a video
            if len(paths) == 1:
                left[paths[0]] = len(data)
        return left

    def check_requests(self, cdn: Cdn, left: Mapping[str, int]) -> None:
        for request in cdn.requests:
            if request.path in left or (request.range_start or 0) > 4096:
                assert request.range_start == left[request.path] < VIDEO_BYTES

    def check_videos(self) -> int:
        """Every visible video is whole, with metadata of its own; how many there are."""
        count = 0
        for number, (path, body) in enumerate(self.bodies.items()):
            if (self.output_dir / f"picture_{path[1:]}").exists():
                assert_whole(self.output_dir, f"picture_{number}", make_task_id(number), body)
                count += 1
        return count


@pytest.mark.parametrize("seed", [1])
def test_50_kills_at_random_moments_cost_nothing(tmp_path: Path, seed: int) -> None:
    def kill_25_times(number: int) -> None:
        bodies = {f"/{i}.mp4": make_mp4(f"{seed} {number} {i}", VIDEO_BYTES) for i in range(40)}
        directory = tmp_path / str(number)
        directory.mkdir()
        chain = KillChain(directory, random.Random(f"{seed} {number}"), bodies)
        for _ in range(25):
            chain.kill_one()
        left = chain.parts_left()
        with Cdn() as cdn:
            last = finish(chain.start(cdn, Reply()))
        chain.check_requests(cdn, left)
        assert last.returncode == 0
        assert "waiting" not in last.stdout  # a killed run leaves no lock
        assert chain.check_videos() == len(bodies)
        assert len(names_in(chain.output_dir)) == 2 * len(bodies)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(kill_25_times, range(2))) == [None, None]


# Several runs at once.


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Wait until ``process`` has said ``text``."""
    assert process.stdout
    watchdog = threading.Timer(30, process.kill)
    watchdog.start()
    assert any(text in line for line in iter(process.stdout.readline, ""))
    watchdog.cancel()


def test_of_four_processes_one_downloads_and_three_say_that_they_wait(
    cdn: Cdn, tmp_path: Path
) -> None:
    bodies = [make_mp4(number, VIDEO_BYTES) for number in range(5)]
    held = Reply(wait_s=60)
    write_results(
        tmp_path,
        [make_row(i, video_url=cdn.add(f"{i}.mp4", body, held)) for i, body in enumerate(bodies)],
    )
    first = start_script(tmp_path)
    wait_until(lambda: len(cdn.requests) == len(bodies))
    others = [start_script(tmp_path) for _ in range(3)]
    for other in others:
        read_until(other, "waiting")
    cdn.released.set()
    ends = [finish(process) for process in (first, *others)]
    assert [end.returncode for end in ends] == [0] * 4
    assert "waiting" not in ends[0].stdout
    assert all(f"Already existed: {len(bodies)}" in end.stdout for end in ends[1:])
    assert len(cdn.requests) == len(bodies)
    for number, body in enumerate(bodies):
        assert_whole(tmp_path / "video_outputs", f"picture_{number}", make_task_id(number), body)


def test_parts_of_one_shard_set_do_not_wait_for_each_other(cdn: Cdn, tmp_path: Path) -> None:
    bodies = [make_mp4(number, VIDEO_BYTES) for number in range(8)]

    def results(server: Cdn, name: str, reply: Reply) -> str:
        links = [server.add(f"{i}.mp4", body, reply) for i, body in enumerate(bodies)]
        rows = [make_row(i, video_url=link) for i, link in enumerate(links)]
        return write_results(tmp_path, rows, name).name

    with Cdn() as holding:
        held = results(holding, "held", Reply(wait_s=60))
        first = start_script(tmp_path, "--shard", "1/2", "--polling-results-file", held)
        wait_until(lambda: holding.requests)
        free = results(cdn, "free", Reply())
        second = run_script(tmp_path, "--shard", "2/2", "--polling-results-file", free)
        assert first.poll() is None
        holding.released.set()
        ends = [finish(first), second]
        asked = sorted(request.path for request in [*holding.requests, *cdn.requests])
    assert [end.returncode for end in ends] == [0, 0]
    assert not [end for end in ends if "waiting" in end.stdout]
    assert cdn.requests
    assert asked == [f"/{number}.mp4" for number in range(8)]
    for number, body in enumerate(bodies):
        assert_whole(tmp_path / "video_outputs", f"picture_{number}", make_task_id(number), body)


# Ctrl-C and SIGTERM. Each situation: what the second video's server does meanwhile.

SITUATIONS = {
    "transferring": Reply(send=HALF, ending="hang"),
    "waiting-for-the-head": Reply(wait_s=60),
    "in-a-back-off": Reply(status=503, headers={"Retry-After": "50"}),
    "connecting": None,
    "waiting-for-another-run": Reply(),
}


@dataclass
class StoppedRuns:
    signal_number: int
    cdn: Cdn
    directories: Mapping[str, Path]
    ends: Mapping[str, subprocess.CompletedProcess[str]]


def start_situation(name: str, directory: Path, cdn: Cdn, deaf: str) -> subprocess.Popen[str]:
    reply = SITUATIONS[name]
    good = cdn.add(f"{name}/0.mp4", OBJECT)
    link = cdn.add(f"{name}/1.mp4", OTHER, reply, Reply()) if reply else f"{deaf}/1.mp4"
    write_results(directory, [make_row(0, video_url=good), make_row(1, video_url=link)])
    return start_script(directory)


def wait_for_situation(
    name: str, directory: Path, cdn: Cdn, process: subprocess.Popen[str]
) -> None:
    """Wait until ``process`` is where it is to be stopped; one video is home by then."""
    output_dir = directory / "video_outputs"
    if name == "waiting-for-another-run":
        read_until(process, "waiting")
        return
    wait_until(lambda: (output_dir / "picture_0.mp4").exists())
    if SITUATIONS[name]:
        wait_until(lambda: cdn.asked(f"{name}/1.mp4"))
    if name == "transferring":
        wait_until(lambda: OTHER[:HALF] in hidden_in(output_dir).values())


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
    """One run a situation, all of them stopped by the same signal."""
    directories = {name: tmp_path_factory.mktemp(name) for name in SITUATIONS}
    busy = directories["waiting-for-another-run"]
    with Cdn() as cdn, deaf_port() as deaf, ctrl_c_allowed():
        held = cdn.add("held.mp4", OBJECT, Reply(wait_s=60))
        write_results(busy, [make_row(9, video_url=held)])
        other = start_script(busy)
        wait_until(lambda: cdn.asked("held.mp4"))
        processes = {
            name: start_situation(name, directory, cdn, deaf)
            for name, directory in directories.items()
        }
        for name, process in processes.items():
            wait_for_situation(name, directories[name], cdn, process)
        for process in processes.values():
            process.send_signal(request.param)
        ends = {name: finish(process) for name, process in processes.items()}
        other.kill()
        other.communicate()
        yield StoppedRuns(request.param, cdn, directories, ends)


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_signal_ends_the_run_with_statistics(stopped_runs: StoppedRuns, name: str) -> None:
    end = stopped_runs.ends[name]
    downloaded = 0 if name == "waiting-for-another-run" else 1
    assert end.returncode == 128 + stopped_runs.signal_number
    assert end.stderr == ""
    assert f"Videos downloaded: {downloaded}\n" in end.stdout
    output_dir = stopped_runs.directories[name] / "video_outputs"
    assert "picture_1.mp4" not in names_in(output_dir)


def test_a_stopped_run_leaves_its_part_and_the_next_resumes_it(stopped_runs: StoppedRuns) -> None:
    directory = stopped_runs.directories["transferring"]
    output_dir = directory / "video_outputs"
    assert list(hidden_in(output_dir).values()) == [OTHER[:HALF]]
    assert run_script(directory).returncode == 0
    starts = [request.range_start for request in stopped_runs.cdn.asked("transferring/1.mp4")]
    assert starts == [None, HALF]
    assert_whole(output_dir, "picture_1", make_task_id(1), OTHER)
    assert len(names_in(output_dir)) == 4


# The disk.

FULL_AFTER = """
import errno, os
left, sync = {syncs}, os.fsync
def fsync(descriptor):
    global left
    left -= 1
    if left < 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return sync(descriptor)
os.fsync = fsync
"""


def assert_full(result: subprocess.CompletedProcess[str], output_dir: Path) -> set[str]:
    """One clear line, exit 1, only whole videos; their names."""
    assert result.returncode == 1
    assert result.stderr == ""
    assert len([line for line in result.stdout.splitlines() if "no space left" in line]) == 1
    assert not [name for name in names_in(output_dir) if name.startswith(".")]
    videos = {name for name in names_in(output_dir) if name.endswith(".mp4")}
    for video in videos:
        number = int(video.removeprefix("picture_").removesuffix(".mp4"))
        body = make_mp4(number, VIDEO_BYTES)
        assert_whole(output_dir, f"picture_{number}", make_task_id(number), body)
    return videos


def add_videos(cdn: Cdn, count: int) -> list[dict[str, Any]]:
    links = [cdn.add(f"{i}.mp4", make_mp4(i, VIDEO_BYTES)) for i in range(count)]
    return [make_row(i, video_url=link) for i, link in enumerate(links)]


@pytest.mark.parametrize("syncs", [1, 4])
def test_a_disk_that_fills_up_ends_the_run_and_keeps_what_is_whole(
    cdn: Cdn, tmp_path: Path, syncs: int
) -> None:
    env = sabotage(tmp_path / "s", FULL_AFTER.format(syncs=syncs))
    result = download(tmp_path, add_videos(cdn, 6), "--workers", "1", env=env)
    videos = assert_full(result, tmp_path / "video_outputs")
    assert bool(videos) == (syncs >= 4)
    assert len(videos) < 6
    assert download(tmp_path, add_videos(cdn, 6)).returncode == 0


def test_a_full_disk_takes_the_parts_of_the_other_videos_along(cdn: Cdn, tmp_path: Path) -> None:
    rows = add_videos(cdn, 1)
    link = cdn.add("slow.mp4", OTHER, Reply(send=HALF, ending="hang"))
    cdn.replies["/0.mp4"] = [Reply(bytes_per_second=100_000)]
    env = sabotage(tmp_path / "s", FULL_AFTER.format(syncs=0))
    result = download(tmp_path, [*rows, make_row(1, video_url=link)], env=env)
    assert assert_full(result, tmp_path / "video_outputs") == set()
    assert cdn.asked("slow.mp4")


@contextlib.contextmanager
def mounted(place: Path, *options: str) -> Iterator[None]:
    """A small file system of its own at ``place``; skips the test where that may not be."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_small_file_system_fills_up(cdn: Cdn, tmp_path: Path) -> None:
    output_dir = tmp_path / "video_outputs"
    with mounted(output_dir, "size=300k"):
        videos = assert_full(download(tmp_path, add_videos(cdn, 9), "--workers", "2"), output_dir)
        assert 1 <= len(videos) <= 5


def test_a_read_only_directory_is_one_clear_line(cdn: Cdn, tmp_path: Path) -> None:
    output_dir = tmp_path / "video_outputs"
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        with mounted(output_dir, "ro"):
            result = download(tmp_path, add_videos(cdn, 2))
    else:
        output_dir.mkdir(mode=0o555)
        result = download(tmp_path, add_videos(cdn, 2))
    assert_no_directory(result, cdn)


@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below"])
def test_a_file_in_place_of_the_directory_is_one_clear_line(
    cdn: Cdn, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("mine")
    result = download(tmp_path, add_videos(cdn, 2), "--output-dir", place)
    assert_no_directory(result, cdn)
    assert (tmp_path / "file").read_text() == "mine"


def assert_no_directory(result: subprocess.CompletedProcess[str], cdn: Cdn) -> None:
    assert result.returncode == 1
    assert result.stderr == ""
    assert result.stdout.lower().count("❌ the output directory") == 1
    assert cdn.requests == []


def test_a_file_that_appears_meanwhile_under_the_name_is_not_overwritten(
    cdn: Cdn, tmp_path: Path
) -> None:
    output_dir = tmp_path / "video_outputs"
    link = cdn.add("0.mp4", OBJECT, Reply(wait_s=60))
    write_results(tmp_path, [make_row(video_url=link)])
    process = start_script(tmp_path)
    wait_until(lambda: cdn.requests)
    (output_dir / "picture_0.mp4").write_bytes(OTHER)
    cdn.released.set()
    assert finish(process).returncode == 0
    assert (output_dir / "picture_0.mp4").read_bytes() == OTHER
    assert_whole(output_dir, f"picture_0_{make_task_id(0)[:8]}", make_task_id(0), OBJECT)


# TLS: a certificate for 127.0.0.1 that no one else trusts, good until 2120.

CERTIFICATE = """
-----BEGIN CERTIFICATE-----
MIIBcjCCARigAwIBAgIBATAKBggqhkjOPQQDAjAXMRUwEwYDVQQDDAxMb29wYmFj
ayBDRE4wIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBcxFTATBgNV
BAMMDExvb3BiYWNrIENETjBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABCbhXfrI
X43ci5qC53k7uSEIAtE8KwPdDlxq/ZcEZcpu1uc+NtYRyt9Jv7mw5F/PtUh/C5Su
HHU4euxBKU1ZsSSjUzBRMA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgKE
MA8GA1UdEQQIMAaHBH8AAAEwHQYDVR0OBBYEFCljnNBLWPlfBZ76YtSzGTBeNR7i
MAoGCCqGSM49BAMCA0gAMEUCICW+FPHPvJp9yaYHLtGEp7f7p8rchSKrlB9PCHP+
7mqVAiEAjRm3RX01gKxOMjjFckOcmgub8G/3pEq5KhbfTMNEOuY=
-----END CERTIFICATE-----
"""
KEY_OF_CERTIFICATE = """
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgk7WA8SD/cCVsk3N8
q0YnyncBJoUWDIuhZT0UIEXQHlyhRANCAAQm4V36yF+N3Iuagud5O7khCALRPCsD
3Q5cav2XBGXKbtbnPjbWEcrfSb+5sORfz7VIfwuUrhx1OHrsQSlNWbEk
-----END PRIVATE KEY-----
"""


class TlsCdn(Cdn):
    """A `Cdn` that speaks TLS; its certificate is in ``bundle``."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.bundle = directory / "bundle.pem"
        self.bundle.write_text(CERTIFICATE)
        key = directory / "key.pem"
        key.write_text(KEY_OF_CERTIFICATE)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.bundle, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    @property
    def url(self) -> str:
        return super().url.replace("http:", "https:")


@pytest.fixture
def tls_cdn(tmp_path: Path) -> Iterator[Cdn]:
    with TlsCdn(tmp_path) as server:
        yield server


@pytest.mark.parametrize(
    ("host", "trusted"),
    [
        pytest.param("127.0.0.1", False, id="unknown-authority"),
        pytest.param("localhost", True, id="of-another-host"),
    ],
)
def test_a_certificate_that_is_not_trusted_fails_at_once(
    tls_cdn: TlsCdn, tmp_path: Path, host: str, trusted: bool
) -> None:
    link = tls_cdn.add("0.mp4", OBJECT).replace("127.0.0.1", host)
    env = {"REQUESTS_CA_BUNDLE": str(tls_cdn.bundle)} if trusted else None
    result = download(tmp_path, [make_row(video_url=link)], "--retries", "1", env=env)
    assert result.returncode == 3
    assert "certificate is not trusted" in result.stdout
    assert "Retried" not in result.stdout
    assert tls_cdn.requests == []


COUNT_BUNDLES = """
import ssl
load = ssl.SSLContext.load_verify_locations
def counted(self, *arguments, **options):
    with open({log!r}, "a") as log:
        print(arguments, options, file=log)
    return load(self, *arguments, **options)
ssl.SSLContext.load_verify_locations = counted
"""


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_connections_are_kept_alive(cdn: Cdn, tmp_path: Path, framing: str) -> None:
    replies = Reply(framing=framing)
    rows = [make_row(i, video_url=cdn.add(f"{i}.mp4", OBJECT, replies)) for i in range(30)]
    assert download(tmp_path, rows, "--workers", "3").returncode == 0
    assert len(cdn.requests) == 30
    assert len(cdn.connections) <= 3


def test_a_bundle_of_ones_own_is_trusted_and_loaded_once_a_run(
    tls_cdn: TlsCdn, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    env = sabotage(tmp_path / "s", COUNT_BUNDLES.format(log=str(log)))
    env["REQUESTS_CA_BUNDLE"] = str(tls_cdn.bundle)
    result = download(tmp_path, add_videos(tls_cdn, 20), env=env)
    assert result.returncode == 0
    assert len(tls_cdn.requests) == 20
    assert log.read_text().count("bundle.pem") == 1


# --- The command line: the real script in its own process -------------------------------------

LATEST = "runway_polling_results_20250617_040158.json"
GUIDE_ID = "f645e2df-b639-4264-9bf2-fc7bceb6c658"
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all but \n
unix_only = pytest.mark.skipif(os.name != "posix", reason="needs a Unix shell or terminal")


def run_raw(
    directory: Path, *arguments: str, shell: str = "", encoding: str = "utf-8",
    script: Path = SCRIPT, stdout: int = subprocess.PIPE,
) -> subprocess.CompletedProcess[bytes]:  # fmt: skip
    """As `run_script`, but in bytes; ``shell`` is a shell line in which ``"$@"`` is the script."""
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(
        ["sh", "-c", shell, "sh", *command] if shell else command,
        cwd=directory,
        env=script_environment(PYTHONIOENCODING=encoding),
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=120,
        check=False,
    )


def put_video(directory: Path, row: Mapping[str, Any], body: bytes, **file_info: Any) -> Path:
    """A video and its metadata as an earlier run left them; ``None`` leaves a fact out."""
    directory.mkdir(exist_ok=True)
    video = directory / f"{row['target_filename_stub']}.mp4"
    video.write_bytes(body)
    facts = {"size_bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()} | file_info
    metadata = {
        "runway_task_json": {"task_id": row["task_id"]},
        "file_info": {key: value for key, value in facts.items() if value is not None},
    }
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


# Console: section 6 of the contract


def test_console_of_a_run_with_one_task_is_the_guides(tmp_path: Path, cdn: Cdn) -> None:
    body = make_mp4("guide", 941_873)
    link = cdn.add("0f3b0be2-a946-4cbb-8c3c-38ba4c1bf3b1.mp4", body)
    stub = "test_succeeded_video"
    write_results(tmp_path, [make_row(task_id=GUIDE_ID, target_filename_stub=stub, video_url=link)])
    result = run_raw(tmp_path)
    shown = "https://dnznrvs05pmza.cloudfront.net/0f3b0be2-a946"
    expected = CONSOLE.replace(shown, link[: len(shown)])
    assert (result.stdout.decode(), result.stderr, result.returncode) == (expected, b"", 0)


def test_a_short_link_is_shown_up_to_its_query(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1))
    lines = run_script(tmp_path).stdout.splitlines()
    assert f"  📥 Streaming download from: {cdn.url}/0.mp4" in lines


def test_no_results_file_is_said_with_the_places_searched(tmp_path: Path) -> None:
    result = run_script(tmp_path, "--output-dir", "elsewhere")
    assert result.returncode == 1
    assert [line for line in result.stdout.splitlines() if line] == [
        "❌ no runway_polling_results_*.json in ., video_outputs, elsewhere: "
        "run the polling step first"
    ]
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(None, "No such file", id="missing"),
        pytest.param(b'{"task_results": [\n  {},,', "line 2, column 6", id="not-json"),
        pytest.param(b"[" * 200_000, "nested", id="nested-without-end"),
    ],
)
def test_an_unreadable_results_file_ends_the_run(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "chosen.json").write_bytes(content)
    result = run_script(tmp_path, "--polling-results-file", "chosen.json")
    assert result.returncode == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("  ❌")]
    assert "chosen.json" in line
    assert said in line
    assert result.stderr == ""


@pytest.mark.parametrize("place", [".", "video_outputs", "elsewhere"])
def test_latest_goes_by_the_name_in_all_places(tmp_path: Path, cdn: Cdn, place: str) -> None:
    new, old = serve(cdn, 2)
    for name in ("video_outputs", "elsewhere"):
        (tmp_path / name).mkdir()
    for directory in {".", "video_outputs", "elsewhere"} - {place}:
        write_results(tmp_path / directory, [old], "20250616_235959")
    os.utime(write_results(tmp_path / place, [new], "20250617_000000"), (0, 0))
    result = run_script(tmp_path, "--output-dir", "elsewhere")
    assert result.stdout.startswith(
        "📁 Using latest results file: runway_polling_results_20250617_000000.json\n"
    )
    assert_whole(tmp_path / "elsewhere", "picture_0", make_task_id(0), make_mp4(0))
    assert not cdn.asked("1.mp4")


def test_all_serves_the_good_files_latest_first(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 3)
    stale = cdn.add("stale.mp4", b"", Reply(status=404))
    (tmp_path / "video_outputs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runway_polling_results_20250617_000003.json").write_text("{", encoding="utf-8")
    write_results(tmp_path / "elsewhere", rows[:2], "20250617_000004")
    write_results(tmp_path, [rows[0] | {"video_url": stale}], "20250617_000002")
    write_results(tmp_path / "video_outputs", rows[2:], "20250617_000001")
    (tmp_path / "runway_polling_results_20250616_000000.json").write_bytes(b"\xff")
    result = run_script(tmp_path, "--all", "--output-dir", "elsewhere")
    assert result.returncode == 3
    assert result.stdout.startswith("🔍 Found 5 polling results files\n\n📋 Processing: ")
    assert re.findall(r"results_(\d+_\d+)\.json$", result.stdout, re.MULTILINE) == [
        "20250617_000004",
        "20250617_000003",
        "20250617_000002",
        "20250617_000001",
        "20250616_000000",
    ]
    assert "✅ Total SUCCEEDED tasks found: 3\n" in result.stdout
    assert not cdn.asked("stale.mp4")
    for number in range(3):
        body = make_mp4(number)
        assert_whole(tmp_path / "elsewhere", f"picture_{number}", make_task_id(number), body)


def test_console_stays_short_and_failures_are_found_at_its_end(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 20)
    for number in range(15, 20):
        rows[number]["video_url"] = cdn.add(f"{number}.mp4", b"", Reply(status=403))
    for number in range(20, 500):
        rows.append(make_row(number))
        put_video(tmp_path / "video_outputs", rows[-1], make_mp4(number, 2000))
    write_results(tmp_path, rows)
    result = run_script(tmp_path)
    assert result.returncode == 3
    assert len(result.stdout.splitlines()) < 300
    tail = result.stdout.partition("📊 DOWNLOAD STATISTICS")[2]
    for count in ("found: 500", "downloaded: 15", "existed: 480", "downloads: 5"):
        assert f" {count}\n" in tail
    for number in range(15, 20):
        (line,) = [line for line in tail.splitlines() if make_task_id(number)[:8] in line]
        assert "HTTP 403" in line
        assert "RUNWAYML_API_SECRET" in line
    assert "  … and 445 more\n" in tail


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252:strict"])
def test_a_console_without_emoji_does_not_break_the_run(
    tmp_path: Path, cdn: Cdn, encoding: str
) -> None:
    row = make_row(target_filename_stub="élan☃", video_url=cdn.add("0.mp4", make_mp4()))
    write_results(tmp_path, [row])
    result = run_raw(tmp_path, encoding=encoding)
    assert (result.returncode, result.stderr) == (0, b"")
    assert "Videos downloaded: 1" in result.stdout.decode(encoding.split(":")[0])
    assert_whole(tmp_path / "video_outputs", "élan☃", make_task_id(0), make_mp4())


@unix_only
@pytest.mark.parametrize("shell", ['exec "$@" >&- 2>&- <&-', '"$@" | head -n 1'])
def test_a_console_that_goes_away_costs_no_video(tmp_path: Path, cdn: Cdn, shell: str) -> None:
    write_results(tmp_path, serve(cdn, 3))
    result = run_raw(tmp_path, shell=shell)
    assert (result.returncode, result.stderr) == (0, b"")
    for number in range(3):
        body = make_mp4(number)
        assert_whole(tmp_path / "video_outputs", f"picture_{number}", make_task_id(number), body)


@unix_only
def test_json_stays_alone_on_stdout_when_stderr_is_closed(tmp_path: Path) -> None:
    write_results(tmp_path, [])
    result = run_raw(tmp_path, "--json", shell='exec "$@" 2>&-')
    assert json.loads(result.stdout)["stats"]["total_succeeded"] == 0


def test_a_broken_pipe_does_not_change_the_exit_code(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1))
    for exists in (False, True):
        reader, writer = os.pipe()
        os.close(reader)
        result = run_raw(tmp_path, stdout=writer)
        os.close(writer)
        assert (result.returncode, result.stderr) == (0, b"")
        assert len(cdn.requests) == 1, f"{exists=}"


EVIL = "\x1b]0;owned\x07\x1b[2J\r\x08\x9b31m\u202egnp\x00\ud800\nOWNED"


@pytest.mark.parametrize(
    "arguments",
    [(), ("--dry-run",), ("--verify", "--all"), ("--json",), ("--output-dir", "out\x1b[2J\rput")],
    ids=" ".join,
)
def test_control_characters_never_reach_the_console(
    tmp_path: Path, cdn: Cdn, arguments: tuple[str, ...]
) -> None:
    good, bad = cdn.add("0.mp4", make_mp4()), cdn.add("1.mp4", b"", Reply(status=403))
    page = cdn.add("2.mp4", b"x", Reply(headers={"Content-Type": "text/\x1b[2J\x9b31m"}))
    rows = [
        make_row(number, video_url=link, **dict.fromkeys(fields, EVIL))
        for number, link in enumerate((good, bad, page, EVIL, f"http://h/{EVIL}"))
        for fields in (("task_id",), ("target_filename_stub", "prompt", "image_path"))
    ]
    rows += [make_row(final_status=EVIL), make_row(final_status=[EVIL]), {EVIL: EVIL}]
    write_results(tmp_path, rows, "20250617_040158\x1b[2J\r" if os.name == "posix" else "1")
    (tmp_path / f"runway_polling_results_1{LATEST}").write_text('{"\x1b[2J', encoding="utf-8")
    command = shlex.join([sys.executable, "-c", "print('\\x1b[2J\\r\\x07 said')"])
    result = run_raw(tmp_path, *arguments, "--exec", command)
    shown = (result.stdout + result.stderr).decode()
    assert len(shown) > 100
    assert not CONTROL.search(shown)
    assert not re.search("^ *OWNED", shown, re.MULTILINE)


# The live line, on a terminal


@dataclass
class Screen:
    """What a terminal was told to show: lines that stay, and lines that were cleared."""

    lines: list[str]
    cleared: list[str]
    exit_code: int


def run_in_terminal(
    directory: Path, columns: int, act: Callable[[subprocess.Popen[bytes], str], None]
) -> Screen:
    """Run the script on a pseudo-terminal; ``act`` sees what is shown so far, again and again."""
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    terminal, console = pytest.importorskip("pty").openpty()
    fcntl.ioctl(console, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT)],
        cwd=directory,
        env=script_environment(),
        stdout=console,
        stderr=console,
    )
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
    return Screen([row[-1] for row in rows], cleared, process.wait(60))


def columns_of(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in line)


@unix_only
@pytest.mark.parametrize("columns", [80, 40])
def test_live_line_counts_fits_and_is_cleared(tmp_path: Path, cdn: Cdn, columns: int) -> None:
    rows = serve(cdn, 5)
    rows[4]["video_url"] = cdn.add("4.mp4", make_mp4(4, 3_000_000), Reply(wait_s=60))
    for row in rows[:3]:
        put_video(tmp_path / "video_outputs", row, make_mp4())
    write_results(tmp_path, rows)
    waiting: list[str] = []  # what the live line shows while the last video is awaited

    def release(_process: object, shown: str) -> None:
        waiting.extend(re.findall(r"⏬ (\d+/\d+)", shown.partition("  4/5 Task")[2]))
        if waiting:
            cdn.released.set()

    screen = run_in_terminal(tmp_path, columns, release)
    assert screen.exit_code == 0
    assert waiting[0] in ("4/5", "1/2")  # of all, or of those to download
    assert all(line.startswith("⏬ ") for line in screen.cleared)
    assert all(columns_of(line) < columns for line in screen.cleared)
    if columns == 80:
        assert any(re.search(r" MB  .?\d+%  [\d.]+ MB/s  .* left", x) for x in screen.cleared)
    assert not [line for line in screen.lines if CONTROL.search(line) or "⏬" in line]
    assert "📥 Videos downloaded: 2" in screen.lines


@unix_only
def test_live_line_is_cleared_on_ctrl_c(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 2, Reply(send=50_000, ending="hang")))
    pressed: list[bool] = []

    def interrupt(process: subprocess.Popen[bytes], shown: str) -> None:
        if "⏬" in shown and not pressed:
            pressed.append(True)
            process.send_signal(signal.SIGINT)

    screen = run_in_terminal(tmp_path, 80, interrupt)
    assert screen.exit_code == 130
    assert screen.cleared
    assert not [line for line in screen.lines if CONTROL.search(line) or "⏬" in line]
    assert "📊 DOWNLOAD STATISTICS" in screen.lines


# --dry-run, --verify, --json, --shard, --exec


def make_mixed_directory(directory: Path, cdn: Cdn) -> list[dict[str, Any]]:
    """Five tasks: to download, twice under one stub; dead; without link; already there."""
    rows = serve(cdn, 5)
    rows[0]["video_url"] = make_jwt_link(f"{cdn.url}/0.mp4", 1893456000)
    rows[1]["target_filename_stub"] = "picture_0"
    rows[2]["video_url"] = cdn.add("2.mp4", b"", Reply(status=404))
    rows[3]["video_url"] = 7
    put_video(directory / "video_outputs", rows[4], make_mp4(4))
    write_results(directory, [*rows, make_row(9, final_status="FAILED"), "no object"])
    return rows


def test_dry_run_says_names_and_expiry_and_touches_nothing(tmp_path: Path, cdn: Cdn) -> None:
    make_mixed_directory(tmp_path, cdn)
    before = snapshot(tmp_path)
    result = run_script(tmp_path, "--dry-run", "--exec", "touch ran")
    assert snapshot(tmp_path) == before
    assert cdn.requests == []
    lines = result.stdout.splitlines()
    first, shared = make_task_id(0)[:8], make_task_id(1)[:8]
    assert f"  📥 picture_0.mp4 (task {first}...): link expires 2030-01-01 00:00:00 UTC" in lines
    (line,) = [line for line in lines if f"picture_0_{shared}.mp4" in line]
    assert "does not say when it expires" in line
    assert not [line for line in lines if "picture_4" in line]
    assert "4 to do, 1 already there" in result.stdout


def test_dry_run_names_are_those_of_the_run(tmp_path: Path, cdn: Cdn) -> None:
    make_mixed_directory(tmp_path, cdn)
    runs = [json.loads(run_script(tmp_path, "--json", *a).stdout) for a in (["--dry-run"], [])]
    planned, done = ({v["task_id"]: v["path"] for v in run["videos"]} for run in runs)
    assert planned.keys() == done.keys()
    paths = {key: path for key, path in done.items() if path}
    assert len(paths) == 3
    assert paths.items() <= planned.items()


def test_dry_run_does_not_create_the_output_directory(tmp_path: Path) -> None:
    write_results(tmp_path, [make_row()])
    assert run_script(tmp_path, "--dry-run", "--output-dir", "new/deep").returncode == 0
    assert names_in(tmp_path) == {LATEST}


def flip_last_byte(video: Path) -> None:
    data = video.read_bytes()
    video.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def break_structure(video: Path) -> None:
    """Cut the video, with metadata that knows neither its size nor its checksum."""
    data = video.read_bytes()[:-5]
    row = make_row(1, target_filename_stub=video.stem)
    put_video(video.parent, row, data, size_bytes=None, sha256=None)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(Path.unlink, "is missing", id="missing"),
        pytest.param(lambda video: os.truncate(video, 99_990), "99,990 bytes", id="cut"),
        pytest.param(lambda video: os.truncate(video, 0), "is empty", id="empty"),
        pytest.param(flip_last_byte, "SHA-256", id="same-size-other-bytes"),
        pytest.param(break_structure, "cut short", id="cut-with-old-metadata"),
        pytest.param(
            lambda video: video.with_suffix(".json").write_text("{", encoding="utf-8"),
            "metadata cannot be read",
            id="unreadable-metadata",
        ),
    ],
)
def test_verify_names_each_problem(
    tmp_path: Path, cdn: Cdn, damage: Callable[[Path], object], said: str
) -> None:
    videos = tmp_path / "video_outputs"
    for row in serve(cdn, 3):
        put_video(videos, row, make_mp4(row["task_id"]))
    damage(videos / "picture_1.mp4")
    before = snapshot(tmp_path)
    result = run_script(tmp_path, "--verify")
    assert result.returncode == 3
    (line,) = [line for line in result.stdout.splitlines() if "❌" in line]
    assert line.startswith("  ❌ picture_1.mp4: ")
    assert said in line
    assert snapshot(tmp_path) == before
    assert cdn.requests == []


def test_verify_accepts_old_metadata_and_other_programs_files(tmp_path: Path) -> None:
    videos = tmp_path / "video_outputs"
    put_video(videos, make_row(0), make_mp4(0), sha256=None)
    put_video(videos, make_row(1), make_mp4(1), sha256=None, size_bytes=None)
    (videos / "loose.mp4").write_bytes(b"a video without metadata is not checked")
    (videos / "task_queue_20250617.json").write_text('{"tasks": []}', encoding="utf-8")
    (videos / "list.json").write_text("[]", encoding="utf-8")
    result = run_script(tmp_path, "--verify")
    assert result.returncode == 0
    assert result.stdout.strip() == "🔎 Verified: 2 whole, 0 with a problem"


def test_verify_reads_in_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both_read = threading.Barrier(2, timeout=30)
    hash_file = dsv.hash_file

    def hash_together(path: Path, stop: dsv.Stop) -> tuple[int, str]:
        both_read.wait()
        return hash_file(path, stop)

    for number in range(2):
        put_video(tmp_path / "video_outputs", make_row(number), make_mp4(number))
    monkeypatch.setattr(dsv, "hash_file", hash_together)
    monkeypatch.chdir(tmp_path)
    assert dsv.main(["--verify", "--workers", "2"]) == 0


@pytest.mark.parametrize("which", [("--all",), ("--polling-results-file", LATEST)], ids=" ".join)
def test_verify_names_tasks_that_were_never_downloaded(
    tmp_path: Path, which: tuple[str, ...]
) -> None:
    put_video(tmp_path / "video_outputs", make_row(0), make_mp4(0))
    write_results(tmp_path, [make_row(0), make_row(1, target_filename_stub="picture_0")])
    result = run_script(tmp_path, "--verify", *which)
    assert result.returncode == 3
    (line,) = [line for line in result.stdout.splitlines() if "❌" in line]
    assert make_task_id(1)[:8] in line  # picture_0.mp4 is another task's, and whole
    assert "not been downloaded" in line


@pytest.mark.parametrize(
    "task_ids", [("12345678-1", "12345678-2"), ("task-1", "task-2")], ids=["one-start", "no-uuid"]
)
def test_verify_of_all_shards_finds_what_they_downloaded(
    tmp_path: Path, cdn: Cdn, task_ids: tuple[str, str]
) -> None:
    rows = [row | {"target_filename_stub": "same"} for row in serve(cdn, 3)]
    rows[1]["task_id"], rows[2]["task_id"] = task_ids
    write_results(tmp_path, rows)
    assert run_script(tmp_path).returncode == 0
    results = [run_script(tmp_path, "--verify", "--all", "--shard", f"{k}/2") for k in (1, 2)]
    assert [result.returncode for result in results] == [0, 0]
    whole = [int(re.findall(r"Verified: (\d+) whole", result.stdout)[0]) for result in results]
    assert sum(whole) == 3


@pytest.mark.parametrize(
    ("arguments", "exit_code", "statuses"),
    [
        pytest.param((), 3, ["downloaded"] * 2 + ["failed"] * 2 + ["exists"], id="run"),
        pytest.param(("--dry-run",), 3, ["pending"] * 3 + ["failed", "exists"], id="dry-run"),
        pytest.param(("--verify",), 0, ["exists"], id="verify"),
        pytest.param(("--verify", "--all"), 3, ["failed"] * 4 + ["exists"], id="verify-all"),
        pytest.param(("--polling-results-file", "no.json"), 1, [], id="no-results-file"),
        pytest.param(("--output-dir", LATEST), 1, [], id="output-dir-is-a-file"),
        pytest.param(("--exec", "no-such-command"), 3, None, id="failing-command"),
    ],
)
def test_json_prints_one_object_and_nothing_else(
    tmp_path: Path, cdn: Cdn, arguments: tuple[str, ...], exit_code: int, statuses: Any
) -> None:
    rows = make_mixed_directory(tmp_path, cdn)
    result = run_script(tmp_path, "--json", *arguments)
    report = json.loads(result.stdout)
    assert result.returncode == exit_code
    assert result.stderr
    assert list(report["stats"]) == [
        "total_succeeded", "downloaded", "failed_downloads", "already_exists"
    ]  # fmt: skip
    assert all({"task_id", "status", "path", "size_bytes", "error"} <= set(video)
               for video in report["videos"])  # fmt: skip
    order = {row["task_id"]: number for number, row in enumerate(rows)}
    videos = sorted(report["videos"], key=lambda video: order[video["task_id"]])
    if statuses is not None:
        assert [video["status"] for video in videos] == statuses


def test_json_tells_what_became_of_each_video(tmp_path: Path, cdn: Cdn) -> None:
    rows = make_mixed_directory(tmp_path, cdn)
    report = json.loads(run_script(tmp_path, "--json").stdout)
    assert report["stats"] == {
        "total_succeeded": 5,
        "downloaded": 2,
        "failed_downloads": 2,
        "already_exists": 1,
    }
    videos = {video["task_id"]: video for video in report["videos"]}
    saved = os.path.join("video_outputs", f"picture_0_{make_task_id(1)[:8]}.mp4")
    assert videos[rows[1]["task_id"]] == {
        "task_id": rows[1]["task_id"],
        "status": "downloaded",
        "path": saved,
        "size_bytes": 100_000,
        "error": None,
    }
    there = videos[rows[4]["task_id"]]
    assert (there["status"], there["size_bytes"], there["error"]) == ("exists", 100_000, None)
    assert "HTTP 404" in videos[rows[2]["task_id"]]["error"]
    assert "video_url" in videos[rows[3]["task_id"]]["error"]


@unix_only
@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)
def test_json_prints_its_object_when_stopped(
    tmp_path: Path, cdn: Cdn, number: int, exit_code: int
) -> None:
    rows = serve(cdn, 3)
    rows[2]["video_url"] = cdn.add("2.mp4", make_mp4(2), Reply(send=50_000, ending="hang"))
    write_results(tmp_path, rows)
    process = start_script(tmp_path, "--json")
    done = {tmp_path / "video_outputs" / f"picture_{number}.mp4" for number in (0, 1)}
    wait_until(lambda: cdn.asked("2.mp4") and all(video.exists() for video in done))
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    report = json.loads(out)
    assert process.returncode == exit_code
    assert report["stats"]["downloaded"] == 2
    assert {video["status"] for video in report["videos"]} == {"downloaded"}
    assert "📊 DOWNLOAD STATISTICS" in err
    assert "Traceback" not in err


def test_shards_share_the_tasks_and_run_side_by_side(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 24, Reply(wait_s=60))
    for number, row in enumerate(rows):
        row["target_filename_stub"] = f"stub_{number % 8}"
    for number in range(20, 24):  # stubs that are the names other tasks are to get
        rows[number]["target_filename_stub"] = f"STUB_{number - 16}_{make_task_id(number - 8)[:8]}"
    write_results(tmp_path, rows)
    processes = [start_script(tmp_path, "--json", "--shard", f"{k}/4") for k in range(1, 5)]
    wait_until(lambda: len(cdn.requests) >= len(rows))  # nobody waits for another part
    cdn.released.set()
    reports = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    parts = [{video["task_id"] for video in report["videos"]} for report in reports]
    assert all(parts)
    assert sorted(key for part in parts for key in part) == sorted(row["task_id"] for row in rows)
    paths = {video["task_id"]: video["path"] for report in reports for video in report["videos"]}
    assert len({path.lower() for path in paths.values()}) == len(cdn.requests) == len(rows)
    for number, row in enumerate(rows):
        stub = Path(paths[row["task_id"]]).stem
        assert_whole(tmp_path / "video_outputs", stub, row["task_id"], make_mp4(number))


def make_recorder(directory: Path, code: str = "") -> str:
    """A command for --exec that appends its arguments to ``calls``, then does ``code``."""
    script = directory / "record it.py"
    script.write_text(
        "import json, sys\n"
        f"open({str(directory / 'calls')!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n{code}",
        encoding="utf-8",
    )
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(script))} {{video}} --with={{metadata}}"


def read_calls(directory: Path) -> list[list[str]]:
    return [json.loads(line) for line in (directory / "calls").read_text().splitlines()]


def test_exec_hands_hostile_names_over_to_the_letter(tmp_path: Path, cdn: Cdn) -> None:
    stubs = ["a b", "it's", "$(touch owned)", "`touch owned`", "; touch owned;", "&& touch owned",
             "$HOME", "-rf", "{metadata}", "{video}", "~", "%PATH%", "${IFS}", "é☃"]  # fmt: skip
    rows = serve(cdn, len(stubs))
    for row, stub in zip(rows, stubs, strict=True):
        row["target_filename_stub"] = stub
    write_results(tmp_path, rows)
    result = run_script(tmp_path, "--exec", make_recorder(tmp_path))
    assert result.returncode == 0
    videos = tmp_path / "video_outputs"
    assert sorted(read_calls(tmp_path)) == sorted(
        [str(videos / f"{stub}.mp4"), f"--with={videos / stub}.json"] for stub in stubs
    )
    assert "owned" not in names_in(tmp_path) | names_in(videos)


def test_exec_runs_once_for_each_new_video_only(tmp_path: Path, cdn: Cdn) -> None:
    rows = make_mixed_directory(tmp_path, cdn)
    (tmp_path / "video_outputs" / "picture_4.json").unlink()  # to be adopted: not new
    for _ in range(2):
        run_script(tmp_path, "--exec", make_recorder(tmp_path))
    names = [Path(call[0]).name for call in read_calls(tmp_path)]
    assert sorted(names) == ["picture_0.mp4", f"picture_0_{rows[1]['task_id'][:8]}.mp4"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        pytest.param("", "exit code 7", id="fails"),
        pytest.param("no-such-command {video}", "no-such-command: No such file", id="missing"),
        pytest.param("'' x {video}", None, id="refused"),
    ],
)
def test_exec_that_fails_is_said_and_the_video_stays(
    tmp_path: Path, cdn: Cdn, command: str, said: str | None
) -> None:
    write_results(tmp_path, serve(cdn, 2))
    failing = make_recorder(tmp_path, "print('why \x1b[2J it failed'); sys.exit(7)")
    result = run_script(tmp_path, "--exec", command or failing)
    if said is None:
        assert result.returncode == 2
        return
    assert result.returncode == 3
    block, _, tail = result.stdout.partition("📊 DOWNLOAD STATISTICS")
    assert said in block
    assert command or "     why ?[2J it failed\n" in block
    for number in range(2):
        assert re.search(rf"picture_{number}\.mp4: .+ — run it by hand", tail)
        body = make_mp4(number)
        assert_whole(tmp_path / "video_outputs", f"picture_{number}", make_task_id(number), body)
    assert "Videos downloaded: 2" in tail


@unix_only
def test_a_signal_ends_the_wait_for_a_pipe_that_nobody_writes_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "results.json")
    process = start_script(tmp_path, "--polling-results-file", "results.json")
    assert process.stdout
    assert (
        process.stdout.readline() + process.stdout.readline() == "\n📋 Processing: results.json\n"
    )
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_json_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    write_results(tmp_path, [])
    with open("/dev/full", "wb") as full:
        result = run_raw(tmp_path, "--json", stdout=full.fileno())
    assert result.returncode == 1
    assert b"the JSON could not be written" in result.stderr


@pytest.mark.parametrize("mode", [(), ("--dry-run",), ("--verify",)], ids=str)
def test_a_broken_results_file_is_named_at_the_end_whatever_else_failed(
    tmp_path: Path, cdn: Cdn, mode: tuple[str, ...]
) -> None:
    write_results(tmp_path, serve(cdn, 1, Reply(status=404)))
    broken = write_results(tmp_path, [], "20250101_000000")
    broken.write_text("{")
    result = run_script(tmp_path, "--all", "--json", *mode)
    assert result.returncode == 3
    assert broken.name in json.loads(result.stdout)["error"]
    assert broken.name in result.stderr.splitlines()[-1]


def test_of_many_results_files_the_rest_is_counted(tmp_path: Path) -> None:
    for day in range(1, 15):
        write_results(tmp_path, [make_row(day)], f"202501{day:02}_000000")
    lines = run_script(tmp_path, "--all", "--dry-run").stdout.splitlines()
    assert sum("📋 Processing" in line for line in lines) == 10
    assert "  … and 4 more files" in lines


def test_a_row_that_repeats_a_task_is_counted_once_and_said(tmp_path: Path) -> None:
    write_results(tmp_path, [make_row(0), make_row(1), make_row(0)])
    result = run_script(tmp_path, "--dry-run")
    assert "  ℹ️ 1 rows repeat a task: counted once\n" in result.stdout
    assert "Dry run: 2 to do" in result.stdout


def test_options_go_together(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 8)
    write_results(tmp_path, rows[:4], "20250617_000000")
    write_results(tmp_path, rows[4:], "20250618_000000")
    common = ("--all", "--json", "--output-dir", "out", "--exec", make_recorder(tmp_path))
    for part in ("1/2", "2/2"):
        assert run_script(tmp_path, *common, "--shard", part).returncode == 0
    assert len(read_calls(tmp_path)) == len(cdn.requests) == 8
    for mode in ("--dry-run", "--verify"):
        result = run_script(tmp_path, *common, mode)
        assert json.loads(result.stdout)["stats"]["already_exists"] == 8
        assert result.returncode == 0
    assert len(read_calls(tmp_path)) == len(cdn.requests) == 8


# Options, exit codes, layout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--workers", "0"),
        ("--workers", "65"),
        ("--workers", "x"),
        ("--workers", "1.5"),
        ("--timeout", "0"),
        ("--timeout", "-1"),
        ("--timeout", "nan"),
        ("--timeout", "inf"),
        ("--timeout", "soon"),
        ("--retries", "-1"),
        ("--retries", "x"),
        ("--shard", "0/4"),
        ("--shard", "5/4"),
        ("--shard", "1/0"),
        ("--shard", "-1/4"),
        ("--shard", "x"),
        ("--exec", ""),
        ("--exec", "  "),
        ("--exec", "curl 'unbalanced"),
        ("--all", "--polling-results-file", LATEST),
        ("--polling-results-file",),
        ("--no-such-option",),
        ("stray",),
    ],
    ids=" ".join,
)
def test_impossible_arguments_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        dsv.main(arguments)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error:" in err.splitlines()[-1]
    assert arguments[0] in err.splitlines()[-1]


def test_help_and_version(tmp_path: Path) -> None:
    helped, version = (run_script(tmp_path, option) for option in ("--help", "--version"))
    assert helped.returncode == version.returncode == 0
    table = helped.stdout.partition("exit codes:")[2]
    for code in ("0  ", "1  ", "2  ", "3  ", "130, 143  "):
        assert f"\n  {code}" in table
    for option in ("polling-results-file", "all", "output-dir", "workers", "timeout", "retries",
                   "dry-run", "verify", "json", "shard", "exec", "version"):  # fmt: skip
        assert f"--{option}" in helped.stdout
    assert version.stdout.split() == ["download_succeeded_videos.py", dsv.__version__]


@pytest.mark.parametrize(
    ("rows", "exit_code"),
    [
        pytest.param([], 0, id="no-tasks"),
        pytest.param([make_row(final_status="FAILED"), make_row(final_status=None)], 0, id="none"),
        pytest.param([make_row(video_url=None)], 3, id="a-video-without-link"),
    ],
)
def test_exit_code_without_a_download(tmp_path: Path, rows: list[Any], exit_code: int) -> None:
    write_results(tmp_path, rows)
    result = run_script(tmp_path)
    assert result.returncode == exit_code
    assert f"Failed downloads: {1 if exit_code else 0}\n" in result.stdout
    if len(rows) == 2:
        assert "1 FAILED, 1 still running" in result.stdout


def test_an_unusable_output_directory_is_one_line(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1))
    (tmp_path / "blocked").write_bytes(b"a file")
    result = run_script(tmp_path, "--output-dir", "blocked/below")
    assert result.returncode == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("❌")]
    assert "blocked" in line
    assert cdn.requests == []


def test_inline_metadata_names_the_requirements_to_run() -> None:
    source = SCRIPT.read_text(encoding="utf-8")
    block = re.search(r"(?m)^# /// script$\n((?:^#(?:| .*)$\n)+?)^# ///$", source)
    assert block, "PEP 723"
    fields = dict(re.findall(r"^# ([a-z-]+) = (.+)$", block[1], re.MULTILINE))
    listed = (SCRIPT.parent / "requirements.txt").read_text(encoding="utf-8").split()
    assert json.loads(fields["dependencies"]) == [
        line for line in listed if line not in ("pytest", "responses")
    ]
    assert {"pytest", "responses"} < set(listed)
    assert fields["requires-python"] == '">=3.10"'


def test_script_copied_on_its_own_does_the_job(tmp_path: Path, cdn: Cdn) -> None:
    copy = Path(shutil.copy(SCRIPT, tmp_path / "get.py"))
    write_results(tmp_path, serve(cdn, 1))
    assert run_raw(tmp_path, script=copy).returncode == 0
    assert_whole(tmp_path / "video_outputs", "picture_0", make_task_id(0), make_mp4(0))
    assert names_in(tmp_path) == {"get.py", LATEST, "video_outputs"}
    assert names_in(tmp_path / "video_outputs") == {"picture_0.mp4", "picture_0.json"}


def test_without_requests_one_line_says_what_to_install(tmp_path: Path) -> None:
    write_results(tmp_path, [make_row()])
    command = [sys.executable, "-S", str(SCRIPT)]  # -S: no site-packages
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert result.returncode == 1
    assert b"the package requests is missing: pip install requests" in result.stdout
    assert b"Traceback" not in result.stdout + result.stderr


def test_top_level_holds_only_the_five_entries() -> None:
    git = shutil.which("git")
    if not git or not (SCRIPT.parent / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        [git, "-c", "safe.directory=*", "ls-files"], cwd=SCRIPT.parent, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    files = [Path(line) for line in listing.stdout.splitlines()]
    assert {path.parts[0] for path in files if not path.parts[0].startswith(".")} <= {
        "download_succeeded_videos.py",
        "test_download_succeeded.py",
        "requirements.txt",
        "README.md",
        "video_outputs",
    }
    assert [path for path in files if path.parts[0] == "video_outputs"] == [
        Path("video_outputs/.gitkeep")
    ]


# --- The demo ---------------------------------------------------------------------------------


def demo_video(number: int) -> bytes:
    return make_mp4(f"demo {number}", 900_000 + 20_000 * number)


def make_demo_rows(cdn: Cdn) -> list[dict[str, Any]]:
    """What the poller leaves of a night: six videos, two of them under one stub, and the rest."""
    names = ["elegant_business_classic_tt", "luxury_kitchen_marble", "luxury_kitchen_marble",
             "sunset_terrace_drone", "garden_path_morning", "city_loft_evening"]  # fmt: skip
    rows = [
        make_row(
            number,
            image_path=f"video_queue/{name}_{number:02}_draft.png",
            target_filename_stub=f"{name}_video",
            video_url=make_jwt_link(f"{cdn.url}/{make_task_id(number)}.mp4", time.time() + 86400),
        )
        for number, name in enumerate(names)
    ]
    for number in range(len(names)):
        cdn.add(f"{make_task_id(number)}.mp4", demo_video(number))
    rows[0] |= {"seed": 42, "cluster_id": "c7", "theme": "elegant", "duration": 5}
    lost = {"video_url": None, "failure_reason": "SAFETY.OUTPUT.THIRD_PARTY"}
    return [
        *rows,
        make_row(6, final_status="FAILED", **lost),
        make_row(7, final_status="CANCELLED", video_url=None),
        make_row(8, final_status=None, video_url=None, completion_time=None),  # still running
    ]


def demo() -> int:
    """Run the script on a CDN of its own; the videos stay in ``video_outputs/``."""
    with Cdn() as cdn, tempfile.TemporaryDirectory() as directory:
        results = write_results(Path(directory), make_demo_rows(cdn))
        print(
            f"A small CDN runs at {cdn.url}, for as long as this takes; so does a results file.\n"
        )
        print(f"$ python {SCRIPT.name} --polling-results-file {results.name}", flush=True)
        command = [sys.executable, str(SCRIPT), "--polling-results-file", str(results)]
        environment = os.environ | {"NO_PROXY": "*"}
        exit_code = subprocess.call(command, cwd=SCRIPT.parent, env=environment)
    print(f"\nThe videos, each with its metadata, are in {SCRIPT.parent / 'video_outputs'}.")
    print("Play one; open the .json beside it; run this again: all are there already.")
    return exit_code


def test_demo_leaves_videos_and_metadata_like_real_ones(tmp_path: Path) -> None:
    for source in (SCRIPT, Path(__file__)):
        shutil.copy(source, tmp_path)
    command = [sys.executable, str(tmp_path / Path(__file__).name), "--demo"]
    for new, old in ((6, 0), (0, 6)):
        result = subprocess.run(command, cwd=tmp_path, env=script_environment(),
                                capture_output=True, encoding="utf-8", check=False)  # fmt: skip
        assert (result.returncode, result.stderr) == (0, "")
        assert f"downloaded: {new}\n⚠️ Already existed: {old}\n" in result.stdout
        assert "1 FAILED, 1 CANCELLED, 1 still running" in result.stdout
    with Cdn() as cdn:
        rows = make_demo_rows(cdn)[:6]
    names = [row["target_filename_stub"] for row in rows]
    names[2] += f"_{make_task_id(2)[:8]}"
    videos = tmp_path / "video_outputs"
    assert names_in(videos) == {f"{name}{suffix}" for name in names for suffix in (".mp4", ".json")}
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        assert_whole(videos, name, make_task_id(number), demo_video(number))
        assert_is_the_guides_metadata(videos / f"{name}.json", row, demo_video(number))


def assert_is_the_guides_metadata(path: Path, row: dict[str, Any], body: bytes) -> None:
    text = path.read_text(encoding="utf-8")
    metadata = json.loads(text)
    when, link = metadata["download_timestamp"], metadata["runway_task_json"]["video_url"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}", when)
    assert re.fullmatch(rf"http://127\.0\.0\.1:\d+/{row['task_id']}\.mp4\?_jwt=[\w.-]+", link)
    extras = ("cluster_id", "theme", "duration", "resolution")
    expected = {
        "video_file": f"{path.stem}.mp4",
        "download_timestamp": when,
        "input_path": row["image_path"],
        "prompt": row["prompt"],
        "seed": row.get("seed"),
        "runway_task_json": {
            "task_id": row["task_id"],
            "final_status": "SUCCEEDED",
            "completion_time": row["completion_time"],
            "video_url": link,
            "original_status": "PENDING",
            "timestamp": row["timestamp"],
            **{key: row[key] for key in extras if key in row},
        },
        "target_filename_stub": row["target_filename_stub"],
        "file_info": {
            "size_bytes": len(body),
            "size_mb": round(len(body) / 1024**2, 2),
            "sha256": hashlib.sha256(body).hexdigest(),
        },
    }
    assert text == json.dumps(expected, indent=2, ensure_ascii=False)  # keys in this order


def main(arguments: list[str]) -> int:
    return demo() if arguments == ["--demo"] else int(pytest.main([__file__, *arguments]))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
