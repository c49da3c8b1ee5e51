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
import faulthandler
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
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import reduce
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote

import pytest
import requests
import responses

import download_succeeded_videos as dsv

SCRIPT = Path(dsv.__file__).resolve()

# --- Builders: whole MP4s, rows, results files -----------------------------------------------


VIDEO_BYTES = 100_000


def make_mp4(seed: object = 0, size: int = VIDEO_BYTES) -> bytes:
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
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

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

    def __enter__(self) -> Any:
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
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def serve(cdn: Cdn, count: int, *replies: Reply, size: int = VIDEO_BYTES) -> list[dict[str, Any]]:
    """The rows of ``count`` tasks whose videos, ``make_mp4(number, size)``, are on ``cdn``."""
    links = [cdn.add(f"{i}.mp4", make_mp4(i, size), *replies) for i in range(count)]
    return [make_row(i, video_url=link) for i, link in enumerate(links)]


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
    """The command line in this process, from ``directory``, to its end."""
    home, said = Path.cwd(), (io.BytesIO(), io.BytesIO())
    out, err = (io.TextIOWrapper(each, "utf-8", newline="\n", write_through=True) for each in said)
    console = mock.patch.multiple(sys, argv=[str(SCRIPT)], stdout=out, stderr=err)
    environ = mock.patch.dict(os.environ, script_environment(**env or {}), clear=True)
    faulthandler.dump_traceback_later(60, exit=True)  # what hangs is a failure
    os.chdir(directory)
    try:
        with console, environ:
            exit_code = dsv.main(arguments)
    except SystemExit as error:  # argparse
        exit_code = int(error.code or 0)
    finally:
        os.chdir(home)
        faulthandler.cancel_dump_traceback_later()
    texts = [each.getvalue().decode() for each in said]
    assert "Traceback" not in "".join(texts)
    return subprocess.CompletedProcess(arguments, exit_code, *texts)


def start_script(
    directory: Path, *arguments: str, env: Any = None, before: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """The real script in a process of its own; ``before`` goes before the command."""
    command = [*before, sys.executable, str(SCRIPT), *arguments]
    how: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "errors": "replace"}
    environment = script_environment(**env or {})
    return subprocess.Popen(command, cwd=directory, env=environment, encoding="utf-8", **how)


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """What ``process`` printed, and its exit code, when it has come to its end."""
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in out + err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_process(directory: Path, *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """As `run_script`, but in a process of its own."""
    return finish(start_script(directory, *arguments, **how))


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


# --- What lies in the directory ----------------------------------------------------------------

SMALL = 2_500  # bytes, where the size is all the same
WHOLE = make_mp4(0, SMALL)
WEBM = b"\x1aE\xdf\xa3\x9fB\x86\x81\1B\xf7\x81\1B\xf2\x81\4B\xf3\x81\x08B\x82\x84webm" * 99
unix_only = pytest.mark.skipif(os.name != "posix", reason="needs a Unix shell, terminal or pipe")


def make_metadata(row: Mapping[str, Any], body: bytes = b"") -> bytes:
    """The metadata of ``row`` as an earlier run left it beside the video ``body``."""
    info = {"size_bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()} if body else {}
    return json.dumps({"runway_task_json": row, "file_info": info}).encode()


def lay_out(directory: Path, entries: Mapping[str, Any]) -> None:
    """Make files: of bytes, with the metadata of a row, or as a function of the path does."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in entries.items():
        if callable(content):
            content(directory / name)
        else:
            data = make_metadata(content) if isinstance(content, dict) else content
            (directory / name).write_bytes(data)


def strict_json(data: bytes) -> Any:
    """``data`` as JSON that has no NaN and no Infinity, which other languages refuse."""

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    return json.loads(data.decode("utf-8"), parse_constant=refuse)


def run_json(directory: Path, *arguments: str) -> dict[str, Any]:
    """What ``--json`` prints: one object, on a stdout of its own; with what is on stderr."""
    result = run_script(directory, "--json", *arguments)
    report: dict[str, Any] = json.loads(result.stdout)
    assert result.returncode == report["exit_code"]
    assert list(report["stats"]) == list(figures())
    keys = ["task_id", "status", "path", "size_bytes", "error", "warning"]
    assert all(list(video)[:6] == keys for video in report["videos"])
    videos = {video["task_id"]: video for video in report["videos"]}
    return report | {"videos": videos, "console": result.stderr}


# --- Results files -----------------------------------------------------------------------------


def test_latest_goes_by_the_time_in_the_name_else_by_the_modification_time(tmp_path: Path) -> None:
    days = {"20250101_000000": 9, "night_20250105_000000 (2)": 8, "20250103_000000": 7,
            "one": 2, "20250230_000000": 4}  # fmt: skip
    for name, day in days.items():
        modified = datetime(2025, 1, day, 12).timestamp()
        os.utime(write_results(tmp_path, [], name), (modified, modified))
    (tmp_path / "runway_polling_results_20250109_000000.json").mkdir()
    (tmp_path / "runway_polling_results_20250109_000000.json.bak").touch()
    paths = make_downloader(tmp_path / "out").find_all_polling_results(tmp_path)
    times = ["night_20250105_000000 (2)", "20250230_000000", "20250103_000000", "one"]
    assert [path.stem.partition("results_")[2] for path in paths] == [*times, "20250101_000000"]
    assert dsv.find_results_files([tmp_path, "x" * 5000]) == paths


NO_RESULTS = 'is not a polling-results file, which looks like {"task_results": [{"task_id"'


@pytest.mark.parametrize(("content", "complaint"), [
    pytest.param(None, "No such file", id="missing"),
    pytest.param(os.mkdir, "Is a directory", id="directory", marks=unix_only),
    pytest.param(b"", "Expecting value: line 1 column 1", id="empty"),
    pytest.param(b'{"a": 1,\n  b}', ": line 2 column 3", id="comma"),
    pytest.param(b'{"task_results": ["\xe9"]}', "byte 0xe9 in position 19", id="Latin-1"),
    pytest.param(b"[" * 200_000, "recursion depth exceeded", id="nesting"),
    pytest.param(b'{"tasks": []}', NO_RESULTS, id="another step's"),
    pytest.param(b'{"task_results": {}}', NO_RESULTS, id="no list"),
])  # fmt: skip
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


# --- Rows and tasks ----------------------------------------------------------------------------


ODD_ROWS: list[tuple[Any, bool, str]] = [  # the row, whether it is a task, what is said of it
    (None, False, "object"),
    ([make_row(1)], False, "object"),
    ({"final_status": ["FAILED"]}, False, "final_status"),
    (make_row(1, task_id=5), True, '"task_id"'),
    (make_row(2, target_filename_stub={}), True, "stub"),
    (make_row(3, prompt=["a"]), True, '"prompt"'),
]
UNFINISHED = {"FAILED": 2, "CANCELLED": 1, "THROTTLED\x1b[31m": 1, None: 3}


def test_odd_rows_are_named_unfinished_ones_counted_others_served(tmp_path: Path) -> None:
    counted = [make_row(final_status=each) for each in UNFINISHED for _ in range(UNFINISHED[each])]
    write_results(tmp_path, [*[row for row, *_ in ODD_ROWS], *counted, make_row(8), make_row(9)])
    report = run_json(tmp_path, "--dry-run")
    served = {row["task_id"] for row, is_task, _ in ODD_ROWS if is_task and row["task_id"] != 5}
    assert report["videos"].keys() == served | {"", make_task_id(8), make_task_id(9)}
    lines = report["console"].splitlines()
    for number, (_, _, said) in enumerate(ODD_ROWS, 1):
        assert [line for line in lines if f".json, row {number}:" in line and said in line]
    (line,) = [line for line in lines if "FAILED" in line]
    for count in ("2 FAILED", "1 CANCELLED", "3 still running", "1 THROTTLED?[31m"):
        assert count in line


UNUSABLE_LINKS = [
    None, "", 5, ["https://cdn.invalid/a.mp4"], "cdn.invalid/a.mp4", "ftp://cdn.invalid/a.mp4",
    "file:///etc/passwd", "javascript:alert(1)", "https:///a.mp4", "https://?_jwt=a",
    "https://u:p@/a.mp4", "https://u s:p@cdn.invalid/a", "https://cdn.invalid:8x/a.mp4",
    "https://[cdn]/a.mp4", "https://cdn.invalid/a b.mp4", "https://cdn.invalid/a\r\nHeader: b",
    "https://cdn.invalid/\x1b[31m", "https://cdn.invalid/\0", "https://cdn.invalid\\a.mp4",
    "https://cdn.invalid/\ud800.mp4",
]  # fmt: skip


def test_succeeded_tasks_without_usable_link_are_found_failed_and_named(tmp_path: Path) -> None:
    rows = [make_row(i, video_url=link) for i, link in enumerate(UNUSABLE_LINKS)]
    write_results(tmp_path, rows)
    report, count = run_json(tmp_path), len(rows)
    assert report["stats"] == figures(total_succeeded=count, failed_downloads=count)
    lines = [line for line in report["console"].splitlines() if '"video_url"' in line]
    for i in range(count):
        assert any(f"picture_{i}." in line for line in lines), UNUSABLE_LINKS[i]
    assert names_in(tmp_path / "video_outputs") == set()
    downloader = make_downloader(tmp_path)
    assert downloader.get_succeeded_tasks({"task_results": rows}) == []
    with mock.patch.dict(os.environ, {"RUNWAYML_API_SECRET": "key"}):
        assert downloader.get_succeeded_tasks({"task_results": rows}) == rows


def test_unusual_links_are_usable(tmp_path: Path) -> None:
    rows = [make_row(video_url=link) for link in (
        "https://dnznrvs05pmza.cloudfront.net/0f3b.mp4?_jwt=a.b.c", "HTTP://CDN.invalid:65535",
        "https://[2001:db8::1]:8443/a.mp4#t=1", "https://user:secret@cdn.invalid?x=@/y",
        "https://bücher.invalid/ü.mp4", " https://cdn.invalid/a.mp4\n",
    )]  # fmt: skip
    assert make_downloader(tmp_path).get_succeeded_tasks({"task_results": rows}) == rows


def sign(payload: bytes) -> str:
    return "https://cdn.invalid/a.mp4?_jwt=h." + base64.urlsafe_b64encode(payload).decode() + ".s"


NO_EXPIRY = [b"null", b"[9]", b'"a"', b"0", b"-1", b"NaN", b"1e999", b"253402300800", b"9" * 5000]


def test_link_expiry_is_read_from_the_token_and_nonsense_is_none(tmp_path: Path) -> None:
    good = {make_jwt_link("https://cdn.invalid", 1750300000): "2025-06-19T02:26:40+00:00",
            make_jwt_link("https://cdn.invalid", 1750300000.5): "2025-06-19T02:26:40.500000+00:00",
            sign(b'{"exp": 9}').replace("?", "?a=b&") + "&c=d": "1970-01-01T00:00:09+00:00",
            }  # fmt: skip
    queries = ("", "?my_jwt=h.eyJleHAiOjl9.s", "?_jwt=", "?_jwt=a..c", "?_jwt=a.é!?.c")
    payloads = [b"\xff\xfe", b"exp", b"[1]", b"{}", b"[" * 100_000]
    payloads += [b'{"exp": %s}' % value for value in NO_EXPIRY]
    bad = [f"https://cdn.invalid/a.mp4{query}" for query in queries] + [*map(sign, payloads)]
    links = good | dict.fromkeys(bad)
    write_results(tmp_path, [make_row(i, video_url=link) for i, link in enumerate(links)])
    videos = run_json(tmp_path, "--dry-run")["videos"]
    for i, (link, expiry) in enumerate(links.items()):
        assert videos[make_task_id(i)].get("expires") == expiry, link[:60]


@pytest.mark.parametrize(("rows", "asked"), [
    pytest.param([("a", "fresh"), ("a", "stale")], ["fresh"], id="the latest"),
    pytest.param([("a", None), ("a", "stale")], ["stale"], id="the latest has none"),
    pytest.param([("a", "one"), ("b", "one")], ["one", "one"], id="other tasks, one link"),
    pytest.param([(None, "x"), (None, "x"), ("", "y")], ["x", "y"], id="no id"),
    pytest.param([(None, None), (None, None)], [], id="neither"),
])  # fmt: skip
def test_task_in_several_rows_counts_once_with_its_freshest_link(
    tmp_path: Path, cdn: Cdn, rows: list[tuple[str | None, str | None]], asked: list[str]
) -> None:
    write_results(tmp_path, [
        make_row(task_id=task_id, video_url=name and cdn.add(name, WHOLE) + str(i))
        for i, (task_id, name) in enumerate(rows)
    ])  # fmt: skip
    stats = run_json(tmp_path, "--workers", "1")["stats"]
    assert [request.path[1:] for request in cdn.requests] == asked
    assert (stats["total_succeeded"], stats["downloaded"]) == (len(asked) or 2, len(asked))


# --- Names -------------------------------------------------------------------------------------


ORDINARY_STUBS = [
    "elegant_business_classic_tt_video", "Ein schönes Bild (2), final!", "日本語の動画🎬",
    "cafe\u0301", "a.b.mp4", "trailing dot.", "COM10", "nul_video", " in and out ",
    "x" * 250, "é" * 125,
]  # fmt: skip


def test_ordinary_stub_is_used_to_the_letter(tmp_path: Path) -> None:
    stub_of = make_downloader(tmp_path).generate_filename_stub
    for stub in ORDINARY_STUBS:
        assert stub_of(make_row(target_filename_stub=stub)) == stub


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
    stubs = zip(serve(cdn, len(HOSTILE_STUBS), size=SMALL), HOSTILE_STUBS, strict=True)
    rows = [row | {"target_filename_stub": stub} for row, stub in stubs]
    results, output_dir = write_results(tmp_path, rows), tmp_path / "in" / "out"
    for _ in range(2):
        assert make_downloader(output_dir).process_polling_results_file(results) == len(rows)
    assert (names_in(tmp_path), names_in(tmp_path / "in")) == ({"in", results.name}, {"out"})
    names = owners(output_dir)
    assert len(names_in(output_dir)) == 2 * len(names) == 2 * len(cdn.requests)
    for i, task_id in enumerate(map(make_task_id, range(len(rows)))):
        assert_name_for_any_file_system(f"{names[task_id]}.json")
        assert_whole(output_dir, names[task_id], task_id, make_mp4(i, SMALL))


def test_default_stub_is_made_of_the_task_id(tmp_path: Path) -> None:
    stub_of = make_downloader(tmp_path).generate_filename_stub
    for stub in (None, "  ", ["a"]):
        row = make_row(task_id="def45678-90ab", target_filename_stub=stub)
        assert stub_of(row) == "video_def45678"
    for task_id in (None, 12345678):
        assert stub_of(make_row(task_id=task_id, target_filename_stub="")) == "video_unknown"


# --- Metadata ----------------------------------------------------------------------------------

EXAMPLE_ROW = make_row(
    task_id="f645e2df-b639-4264-9bf2-fc7bceb6c658",
    image_path="video_queue/elegant_business_classic_tt_draft.png",
    prompt="soft focus transition, elegant reveal, ...",
    target_filename_stub="elegant_business_classic_tt_video",
    video_url="https://dnznrvs05pmza.cloudfront.net/0f3b0be2-a946.mp4?_jwt=a.b.c",
)
EXAMPLE_VIDEO = make_mp4("example", 941_873)
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
    "sha256": "SHA256"
  }
}""".replace("SHA256", hashlib.sha256(EXAMPLE_VIDEO).hexdigest())


ROW_STUB = '_stub": "elegant_business_classic_tt_video"'
PROMPT, LAST = '"soft focus transition, elegant reveal, ..."', '46.656953"\n  }'


@pytest.mark.parametrize(("changes", "old", "new"), [
    pytest.param({}, "", "", id="the documented one"),
    pytest.param({"seed": 0}, '"seed": null', '"seed": 0', id="seed zero"),
    pytest.param({"seed": float("nan")}, "", "", id="NaN is left out"),
    pytest.param({"prompt": 'é 🎬 "\n'}, PROMPT, '"é 🎬 \\"\\n"', id="text as it is"),
    pytest.param({"prompt": "\ud800 é"}, PROMPT, '"\\ud800 é"', id="lone surrogate"),
    pytest.param({"prompt": 5}, PROMPT, '""', id="wrong type"),
    pytest.param({"target_filename_stub": "a/b"}, ROW_STUB, '_stub": "a/b"', id="the row's stub"),
    *(pytest.param({name: ...}, f'": "{EXAMPLE_ROW[name]}"', '": ""', id=f"no {name}")
      for name in ("image_path", "prompt", "timestamp", "completion_time", "status")),
    pytest.param({"resolution": "720p", "duration": None, "other": 1, "cluster_id": {"é": 0}}, LAST,
                 '46.656953",\n    "cluster_id": {\n      "é": 0\n    },\n    "duration": null,\n'
                 '    "resolution": "720p"\n  }', id="extras in their order, null included"),
])  # fmt: skip
def test_metadata_is_exact(tmp_path: Path, changes: dict[str, Any], old: str, new: str) -> None:
    row = {key: value for key, value in (EXAMPLE_ROW | changes).items() if value is not ...}
    video, path = tmp_path / "elegant_business_classic_tt_video.mp4", tmp_path / "a.json"
    video.write_bytes(EXAMPLE_VIDEO)
    assert make_downloader(tmp_path).create_metadata_json(row, video, path) is True
    written = datetime.fromisoformat(strict_json(path.read_bytes())["download_timestamp"])
    assert abs((datetime.now() - written).total_seconds()) < 60
    assert old in EXAMPLE_METADATA
    expected = EXAMPLE_METADATA.replace(old, new) if old else EXAMPLE_METADATA
    stamp = written.isoformat(timespec="microseconds")
    expected = expected.replace("2025-06-17T04:05:53.806609", stamp)
    assert path.read_text(encoding="utf-8") == expected


# --- The plan ----------------------------------------------------------------------------------

MINE = make_row(0, target_filename_stub="s", task_id="f645e2df-b639")
OTHERS = make_row(1, target_filename_stub="s")
ALL_OURS = {"s.json": MINE, "s.mp4": WHOLE}
ALL_OTHERS = {"s.json": OTHERS, "s.mp4": WHOLE}
SECOND = "s_f645e2df"
RENAMED = {"holiday.json": MINE, "holiday.mp4": WHOLE}
NEW = make_mp4("new", SMALL + 100)
TAKEN, NO_FILE = "downloaded: s.mp4 is another task's", "downloaded: s.mp4 is no file"
ODD = "downloaded: s.json is another program's file, or cannot be read"
FOREIGN_JSON: dict[str, Any] = {
    "list": b"[]", "object": b'{"task_id": "f645e2df-b639"}', "nesting": b"[" * 200_000,
    "other types": b'{"runway_task_json": {"task_id": 5}}', "binary": b"\xff\xfe\0",
    "cut": b'{"runway_task_json": {"task_id": "f645e2df-b639"', "directory": os.mkdir,
    "pipe": lambda path: os.mkfifo(path),
}  # fmt: skip


def second(**entries: Any) -> dict[str, Any]:
    """Entries under the name with the id of `MINE`."""
    return {f"{SECOND}.{suffix}": content for suffix, content in entries.items()}


def run_for(directory: Path, *rows: Any, **entries: Any) -> dict[str, Any]:
    """What ``--json`` tells of a run for ``rows`` over a directory with ``entries``."""
    lay_out(directory / "video_outputs", entries)
    write_results(directory, rows)
    return run_json(directory, "--retries", "1")


def case(name: str, entries: Any, stub: str, end: str, *replies: Reply | None) -> Any:
    return pytest.param(entries, stub, end, replies, id=name)


# Each row: what lies there, the name that the video has at the end, and how: there (not touched),
# adopted, failed, or downloaded, and what is said of that; the replies, if that is not to be
# one request for a download and none otherwise.


@unix_only
@pytest.mark.parametrize(
    ("entries", "stub", "end", "replies"),
    [
        case("nothing there", {}, "s", "downloaded"),
        case("edited in place", ALL_OURS | {"s.mp4": b"edited"}, "s", "there"),
        case("metadata without video", {"s.json": MINE}, "s", "downloaded"),
        case("renamed, without video", {"holiday.json": MINE}, "holiday", "downloaded"),
        case("zero bytes, has metadata", ALL_OURS | {"s.mp4": b""}, "s", "downloaded"),
        case("ours in another case", {"S.json": MINE, "S.mp4": WHOLE}, "S", "there"),
        case("renamed pair", RENAMED, "holiday", "there"),
        case("renamed, another instead", RENAMED | ALL_OTHERS, "holiday", "there"),
        case("the finished of two", RENAMED | {"s.json": MINE}, "holiday", "there"),
        case("second name", ALL_OTHERS | second(json=MINE, mp4=WHOLE), SECOND, "there"),
        case("orphan with the id", ALL_OTHERS | second(mp4=WHOLE), SECOND, "adopted"),
        case("text with the id", ALL_OTHERS | second(mp4=b"text"), SECOND, TAKEN),
        case("another task", ALL_OTHERS, SECOND, TAKEN),
        case("both taken", ALL_OTHERS | second(json=b"[]"), f"{SECOND}_2", TAKEN),
        case("its record", {"s.json": OTHERS}, SECOND, "downloaded: s.json is another task's"),
        case("ours, a twin", ALL_OURS | {"s.mp4": b"", "ſ.json": OTHERS}, "s", "downloaded"),
        case("another case", {"S.mp4": WHOLE}, SECOND, "downloaded: S.mp4 differs in case"),
        case("directory", {"s.mp4": os.mkdir}, SECOND, NO_FILE),
        case("ours, no file", ALL_OURS | {"s.mp4": os.mkdir}, SECOND, NO_FILE),
        case("pipe", {"s.mp4": FOREIGN_JSON["pipe"]}, SECOND, NO_FILE),
        case("loop", {"s.mp4": lambda path: path.symlink_to("s.mp4")}, SECOND, NO_FILE),
        *(case(f"json: {k}", {"s.json": it}, SECOND, ODD) for k, it in FOREIGN_JSON.items()),
        case("zero bytes", {"s.mp4": b""}, "s", "downloaded"),
        case("nothing but zeros", {"s.mp4": bytes(999)}, "s", "downloaded"),
        case("cut short", {"s.mp4": WHOLE[:-9]}, "s", "downloaded"),
        case("a page", {"s.mp4": b"<html>"}, "s", "downloaded"),
        case("same size", {"s.mp4": make_mp4(1, len(NEW))}, "s", "adopted", Reply(pause_at=0)),
        case("other size", {"s.mp4": WHOLE}, SECOND, "downloaded: s.mp4 is another video"),
        case("WebM", {"s.mp4": WEBM}, SECOND, "downloaded: s.mp4 is another video"),
        case("cut first", {"s.mp4": WHOLE}, SECOND, "downloaded: s", Reply(send=1000), Reply()),
        case("dead link", {"s.mp4": WHOLE}, "s", "adopted: HTTP 403", Reply(status=403)),
        case("no link", {"s.mp4": WHOLE}, "s", 'adopted: no usable "video_url"', None),
        case("cannot be asked", {"s.mp4": WHOLE}, "", "failed: HTTP 500", *[Reply(status=500)] * 2),
    ],
)
def test_a_run_goes_by_what_lies_in_the_directory(
    tmp_path: Path, cdn: Cdn, entries: Any, stub: str, end: str, replies: Sequence[Reply | None]
) -> None:
    output_dir, (end, _, said) = tmp_path / "video_outputs", end.partition(": ")
    lay_out(output_dir, entries)
    before = snapshot(output_dir)
    link = None if None in replies else cdn.add("0.mp4", NEW, *filter(None, replies))
    report = run_for(tmp_path, MINE | {"video_url": link})
    (video,) = report["videos"].values()
    assert video["status"] == {"there": "exists", "adopted": "exists"}.get(end, end)
    assert video["path"] == (os.path.join("video_outputs", f"{stub}.mp4") if stub else None)
    assert len(cdn.requests) == (len([*filter(None, replies)]) or (end == "downloaded"))
    assert said in report["console"]
    assert ("Saved under" in report["console"]) == (end == "downloaded" and bool(said))
    own = {"."} if end == "failed" else set()
    if end in ("adopted", "downloaded"):
        own = {".", f"{stub}.mp4", f"{stub}.json"}
        body = NEW if end == "downloaded" else entries[f"{stub}.mp4"]
        assert_whole(output_dir, stub, MINE["task_id"], body)
    after = snapshot(output_dir)
    assert after.keys() == before.keys() | own
    assert all(after[name] == before[name] for name in before.keys() - own)


def test_a_whole_video_under_a_name_with_the_id_is_adopted(tmp_path: Path, cdn: Cdn) -> None:
    row = make_row(task_id="def45678-90ab", target_filename_stub=None, video_url=cdn.add("0", NEW))
    report = run_for(tmp_path, row, **{"video_def45678.mp4": WHOLE})
    assert (report["stats"]["already_exists"], cdn.requests) == (1, [])
    assert_whole(tmp_path / "video_outputs", "video_def45678", "def45678-90ab", WHOLE)


def test_a_lost_video_comes_back_and_its_metadata_stays_as_it_is(tmp_path: Path, cdn: Cdn) -> None:
    rows, output_dir = serve(cdn, 1), tmp_path / "video_outputs"
    run_for(tmp_path, *rows)
    before = (output_dir / "picture_0.json").read_bytes().replace(b'"sha', b'"rated": 5, "sha')
    (output_dir / "picture_0.json").write_bytes(before)
    (output_dir / "picture_0.mp4").unlink()
    assert run_for(tmp_path, *rows)["stats"] == figures(total_succeeded=1, downloaded=1)
    assert (output_dir / "picture_0.json").read_bytes() == before
    assert_home(output_dir, 1)


def test_task_without_id_owns_its_video_by_the_link(tmp_path: Path, cdn: Cdn) -> None:
    old, other = (make_row(task_id=None, video_url=cdn.add(name, NEW)) for name in "ab")
    rows = old | {"video_url": old["video_url"] + ".fresh"}, other
    entries = {"picture_0.json": old, "picture_0.mp4": WHOLE}
    for counted in (figures(downloaded=1, already_exists=1), figures(already_exists=2)):
        assert run_for(tmp_path, *rows, **entries)["stats"] == counted | {"total_succeeded": 2}
        assert [request.path for request in cdn.requests] == ["/b"]
    assert len(names_in(tmp_path / "video_outputs")) == 4


@pytest.mark.parametrize("stubs", [
    pytest.param(["Same", "same", "SAME"], id="but for case"),
    pytest.param(["caf\u00e9", "cafe\u0301", "CAFE\u0301"], id="but for Unicode form"),
    pytest.param(["a/b", "a\\b", "a_b"], id="made equal"),
    pytest.param(["x" * 300, "x" * 400, "x" * 500], id="cut to be equal"),
    pytest.param(["s", "s", f"s_{make_task_id(1)[:8]}"], id="equal to another's second name"),
])  # fmt: skip
def test_tasks_of_one_name_each_get_their_own(tmp_path: Path, cdn: Cdn, stubs: list[str]) -> None:
    links = [cdn.add(f"{i}.mp4", make_mp4(i, SMALL)) for i in range(3)]
    rows = [make_row(i, target_filename_stub=stubs[i], video_url=links[i]) for i in range(3)]
    names = []
    for order in (rows, rows[::-1]):
        videos = run_for(tmp_path, *order)["videos"]
        names.append([Path(videos[make_task_id(i)]["path"]).stem for i in range(3)])
    assert names[0] == names[1]
    assert names[0][0] == make_downloader(tmp_path).generate_filename_stub(rows[0])
    assert len({unicodedata.normalize("NFC", name).casefold() for name in names[0]}) == 3
    for i, name in enumerate(names[0]):
        assert_name_for_any_file_system(f"{name}.json")
        assert name == names[0][0] or name.endswith(f"_{make_task_id(i)[:8]}")
        assert_whole(tmp_path / "video_outputs", name, make_task_id(i), make_mp4(i, SMALL))
    assert len(cdn.requests) == 3


def test_one_orphan_is_taken_for_one_task_alone(tmp_path: Path, cdn: Cdn) -> None:
    rows = [row | {"video_url": cdn.add(row["task_id"], WHOLE)} for row in (MINE, OTHERS)]
    stats = run_for(tmp_path, *rows, **{"s.mp4": WHOLE})["stats"]
    assert stats == figures(total_succeeded=2, downloaded=1, already_exists=1)
    assert len(cdn.requests) == 2


@pytest.mark.parametrize("reply", [Reply(), Reply(status=403)], ids=["alive", "dead"])
def test_an_orphan_goes_to_its_task_not_the_first(tmp_path: Path, cdn: Cdn, reply: Reply) -> None:
    first = OTHERS | {"video_url": cdn.add("first", NEW)}
    mine = MINE | {"video_url": cdn.add("0", WHOLE, reply)}
    report = run_for(tmp_path, first, mine, **{"s.mp4": WHOLE})
    assert report["stats"] == figures(total_succeeded=2, downloaded=1, already_exists=1)
    assert (owners(tmp_path / "video_outputs")[MINE["task_id"]], len(cdn.requests)) == ("s", 2)


def test_a_name_promised_to_one_task_does_not_hide_anothers_video(tmp_path: Path, cdn: Cdn) -> None:
    output_dir, first = tmp_path / "video_outputs", cdn.add("first", NEW, Reply(pause_at=1000))
    rows = OTHERS | {"video_url": first}, MINE | {"video_url": cdn.add("0", WHOLE)}
    write_results(tmp_path, rows)
    process = start_script(tmp_path, "--workers", "1")
    wait_until(lambda: cdn.requests)
    lay_out(output_dir, ALL_OURS)  # by another run
    cdn.released.set()
    assert finish(process).returncode == 0
    assert owners(output_dir) == {MINE["task_id"]: "s", OTHERS["task_id"]: "s_c4ca4238"}
    assert len(cdn.requests) == 1


def test_a_short_id_within_a_name_is_no_claim_to_it(tmp_path: Path, cdn: Cdn) -> None:
    row = make_row(task_id="1", target_filename_stub="clip_12", video_url=cdn.add("0", NEW))
    assert run_for(tmp_path, row, **{"clip_12.mp4": WHOLE})["stats"]["downloaded"] == 1


def test_a_row_without_id_and_link_takes_nothing(tmp_path: Path, cdn: Cdn) -> None:
    row = make_row(task_id=None, video_url=None)
    report = run_for(tmp_path, row, row, **{"picture_0.mp4": WHOLE})
    assert report["stats"] == figures(total_succeeded=2, failed_downloads=2)
    assert re.search("❌ 2 videos(?s:.*)run the polling step again", report["console"])
    assert names_in(tmp_path / "video_outputs") == {"picture_0.mp4"}
    key = {"RUNWAYML_API_SECRET": "key", "RUNWAYML_BASE_URL": cdn.url}
    assert (run_script(tmp_path, env=key).returncode, cdn.requests) == (3, [])


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
        names[renamed] = "mine"
        assert owners(output) == names
    for i in range(122):
        assert_whole(output, names[make_task_id(i)], make_task_id(i), make_mp4(i, SMALL))
        assert len(cdn.asked(f"{i}.mp4")) == 1


# --- Back-off and pace -------------------------------------------------------------------------


def test_back_off_doubles_up_to_a_bound_jitters_and_heeds_the_server() -> None:
    longest = [dsv.backoff_s(failures, None, 1.0) for failures in range(1, 1001)]
    assert [wait / longest[0] for wait in longest[:4]] == [1, 2, 4, 8]
    assert longest == sorted(longest)
    assert longest[-1] <= 60
    assert all(0 < dsv.backoff_s(1 + i, None, 0.0) < wait for i, wait in enumerate(longest))
    assert dsv.backoff_s(1, 45.0, 0.5) == dsv.backoff_s(1000, 45.0, 0.5) == 45


def test_a_server_that_serves_nobody_is_not_asked_for_ever(tmp_path: Path, cdn: Cdn) -> None:
    row = make_row(video_url=cdn.add("0.mp4", WHOLE, Reply(status=503)))
    assert "HTTP 503" in run_for(tmp_path, row)["videos"][row["task_id"]]["error"]
    assert len(cdn.requests) == 2


# What others get while a video is refused twice, or for ever; whether that costs no try.
SERVED_MEANWHILE: dict[str, tuple[Sequence[Reply], bool]] = {
    "a-body": ([Reply(bytes_per_second=SMALL)], True),
    "answers": ([Reply(), Reply(wait_s=0.5)], True),
    "nothing": ([], False),
}


@pytest.mark.parametrize("name", SERVED_MEANWHILE)
@mock.patch.object(dsv, "STILL_SERVING_S", -1.0)
def test_refusals_cost_no_try_while_others_are_served(tmp_path: Path, cdn: Cdn, name: str) -> None:
    others, is_free = SERVED_MEANWHILE[name]
    rows = serve(cdn, 1 + len(others), size=2 * SMALL)
    cdn.replies |= {f"/{i}.mp4": [reply] for i, reply in enumerate(others, 1)}
    cdn.replies["/0.mp4"] = [*[Reply(status=503, wait_s=0.2)] * 2, Reply()]
    rows[0]["video_url"] = cdn.add("moved", b"", headed("Location", "0.mp4", status=302))
    write_results(tmp_path, rows)
    assert run_json(tmp_path, "--retries", "0")["stats"]["failed_downloads"] == (not is_free)


# --- The console -------------------------------------------------------------------------------

CONSOLE = """\
📁 Using latest results file: runway_polling_results_20250617_040158.json

📋 Processing: runway_polling_results_20250617_040158.json
  ✅ Found 1 SUCCEEDED tasks

  1/1 Task f645e2df...
  🎬 Downloading: elegant_business_classic_tt_video.mp4
  📥 Streaming download from: LINK...
  📊 File size: 0.90 MB
  ✅ Downloaded: 0.90 MB
  📄 Metadata saved: elegant_business_classic_tt_video.json

============================================================
📊 DOWNLOAD STATISTICS
============================================================
✅ Total SUCCEEDED tasks found: 1
📥 Videos downloaded: 1
⚠️ Already existed: 0
❌ Failed downloads: 0
📈 Success rate: 100.0%

📁 Videos in video_outputs:
  • elegant_business_classic_tt_video.mp4 (0.90 MB)

💾 Total storage used: 0.90 MB
"""


def test_console_is_as_the_guide_shows_it_to_the_letter(tmp_path: Path, cdn: Cdn) -> None:
    for name in ("0f3b0be2-a946-4f3b-8c5e-d2a7b1c9e0f4.mp4", "a" * (49 - len(cdn.url))):
        link, directory = cdn.add(name, EXAMPLE_VIDEO), tmp_path / name
        directory.mkdir()
        write_results(directory, [EXAMPLE_ROW | {"video_url": link}])
        result = run_script(directory)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == CONSOLE.replace("LINK...", link[:50] + "..." * (".mp4" in name))


def test_the_listing_holds_10_videos_those_of_the_run_first(tmp_path: Path, cdn: Cdn) -> None:
    entries = {"a\x1b.mp4": WHOLE * 500, "dir.mp4": os.mkdir, ".hidden.mp4": WHOLE}
    entries |= {f"b{i:04}.mp4": WHOLE for i in range(1200)}
    row = make_row(target_filename_stub="z", video_url=cdn.add("z.mp4", WHOLE))
    lay_out(tmp_path / "video_outputs", entries)
    write_results(tmp_path, [row])
    listed = run_script(tmp_path).stdout.split("📁 Videos in video_outputs:\n")[1].splitlines()
    assert listed[:3] == ["  • z.mp4 (0.00 MB)", "  • a?.mp4 (1.19 MB)", "  • b0000.mp4 (0.00 MB)"]
    assert listed[9:12] == ["  • b0007.mp4 (0.00 MB)", "  … and 1,192 more", ""]
    assert listed[12:] == [f"💾 Total storage used: {1701 * SMALL / 1024**2:.2f} MB"]


# --- From Python -------------------------------------------------------------------------------


def figures(**changes: int) -> dict[str, int]:
    """The statistics of `VideoDownloader`, 0 unless said otherwise."""
    names = ("total_succeeded", "downloaded", "failed_downloads", "already_exists")
    return dict.fromkeys(names, 0) | changes


@pytest.fixture(autouse=True, scope="session")
def short_ca_bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One certificate instead of all, as each run loads them; and no API key."""
    bundle, mark = tmp_path_factory.mktemp("tls") / "ca.pem", "-----END CERTIFICATE-----\n"
    every = Path(requests.utils.DEFAULT_CA_BUNDLE_PATH).read_text("utf-8")
    bundle.write_text(every.partition(mark)[0] + mark)
    with mock.patch.dict(os.environ, {"REQUESTS_CA_BUNDLE": str(bundle)}):
        os.environ.pop("RUNWAYML_API_SECRET", None)
        yield


def test_orchestrator_results(tmp_path: Path, cdn: Cdn, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [make_row(i, video_url=cdn.add(f"{i}.mp4", WHOLE)) for i in range(2)]
    rows += [make_row(2, video_url=cdn.add("2.mp4", b"", Reply(status=404)))]
    others = [make_row(9, final_status="FAILED"), make_row(3, video_url=None), None]
    file = write_results(tmp_path, [*rows[:1], *others, *rows[1:]])
    file.write_bytes(b"\xef\xbb\xbf\r\n \t" + file.read_bytes())  # a byte order mark
    output = tmp_path / "new" / "video_outputs"
    downloader = dsv.VideoDownloader(output_dir=str(output))
    assert output.is_dir()
    assert downloader.find_all_polling_results(directory=str(tmp_path)) == [file]
    results = downloader.load_polling_results(file)
    assert results == json.loads(file.read_text(encoding="utf-8-sig"))
    tasks = downloader.get_succeeded_tasks(results)
    assert tasks == rows
    assert [downloader.process_succeeded_task(task) for task in tasks] == [True, True, False]
    assert [downloader.process_succeeded_task(tasks[i]) for i in (0, 2)] == [True, False]
    counted = figures(total_succeeded=5, downloaded=2, failed_downloads=2, already_exists=1)
    assert list(downloader.stats.items()) == list(counted.items())
    downloader.print_final_stats()
    assert downloader.load_polling_results(tmp_path / "missing.json") == {}
    out, err = capsys.readouterr()
    assert "✅ Total SUCCEEDED tasks found: 5\n" in out
    assert re.search(r"❌ 1 video: the link was refused\n.*HTTP 404", err)
    assert re.search(rf'task {make_task_id(3)[:8]}.*"video_url": left out\n', err)
    assert "missing.json" in err.splitlines()[-1]


def test_processing_a_file_answers_how_many_videos_are_on_disk(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 3)
    cdn.add("1.mp4", WHOLE, Reply(status=403), Reply())
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


@pytest.mark.parametrize("changes", [
    pytest.param({"task_id": "../../\ud800\x1b"}, id="hostile id"),
    pytest.param({"task_id": None, "target_filename_stub": None}, id="no id, no stub"),
    pytest.param({"prompt": 5, "image_path": b"x", "status": [], "timestamp": {}}, id="types"),
    pytest.param({"prompt": "\ud800\0" * 100_000}, id="long prompt"),
    pytest.param({"seed": float("nan"), "duration": float("inf")}, id="no numbers"),
    pytest.param({"theme": reduce(lambda x, _: [x], range(5000), list[Any]())}, id="nesting"),
    pytest.param({"seed": 10**6000}, id="huge number"),
    pytest.param({"cluster_id": {(1, 2): b""}, "duration": datetime.min}, id="no JSON"),
])  # fmt: skip
def test_hostile_fields_cost_no_video(tmp_path: Path, cdn: Cdn, changes: dict[str, Any]) -> None:
    downloader = make_downloader(tmp_path)
    row = make_row(0, video_url=cdn.add("0.mp4", WHOLE), **changes)
    assert downloader.process_succeeded_task(row) is True
    (video,) = tmp_path.glob("*.mp4")
    assert video.read_bytes() == WHOLE
    assert downloader.create_metadata_json(row, str(video), str(tmp_path / "again.json")) is True
    paths = video.with_suffix(".json"), tmp_path / "again.json"
    one, again = (list(strict_json(path.read_bytes()).items()) for path in paths)
    assert [one[0], *one[2:]] == [again[0], *again[2:]]  # all but the time
    assert make_downloader(tmp_path).process_succeeded_task(row) is True
    assert len(cdn.requests) == 1


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
    assert downloader.create_metadata_json(task, tmp_path / video, tmp_path / metadata) is False
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert names_in(tmp_path) == {"a.mp4"}


def test_on_outcome_is_called_once_per_task_in_the_calling_thread(tmp_path: Path, cdn: Cdn) -> None:
    rows, seen = serve(cdn, 5, size=SMALL), list[tuple[int, Any]]()
    cdn.add("3.mp4", b"", Reply(status=404))
    there = {"picture_0.mp4": WHOLE, "picture_0.json": make_row(0)}
    lay_out(tmp_path, there | {"picture_4.mp4": WHOLE})  # the last one is to be adopted
    make_downloader(
        tmp_path, on_outcome=lambda outcome: seen.append((threading.get_ident(), outcome))
    ).process_polling_results_file(write_results(tmp_path, rows))
    assert [thread for thread, _ in seen] == [threading.get_ident()] * 5
    outcomes = [each for row in rows for _, each in seen if each.task.task_id == row["task_id"]]
    statuses = [outcome.status.value for outcome in outcomes]
    assert statuses == ["exists", "downloaded", "downloaded", "failed", "exists"]
    one = outcomes[1]
    assert (one.path, one.size_bytes, one.error) == (tmp_path / "picture_1.mp4", SMALL, "")
    assert "404" in outcomes[3].error
    assert "secret" not in repr(seen)


@responses.activate
def test_a_callback_may_raise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    responses.add(responses.GET, re.compile("https://cdn.invalid/"), body=WHOLE)
    before, refuse = set(threading.enumerate()), mock.Mock(side_effect=KeyError("mine"))
    file = write_results(tmp_path, map(make_row, range(20)))
    assert make_downloader(tmp_path, on_outcome=refuse).process_polling_results_file(file) == 20
    assert capsys.readouterr().err.count("on_outcome: KeyError: 'mine'") == 20
    wait_until(lambda: before.issuperset(threading.enumerate()))


def test_callers_may_patch_requests_and_replace_the_console(
    tmp_path: Path, cdn: Cdn, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = mock.Mock(spec=["write"])
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", mock.Mock())
    row = make_row(video_url=cdn.add("0.mp4", WHOLE))
    with mock.patch("download_succeeded_videos.requests.get"):
        assert make_downloader(tmp_path).process_succeeded_task(row)
    assert "✅ Downloaded: 0.00 MB" in str(out.write.mock_calls)


def test_threads_on_one_downloader_give_each_task_its_own_name(tmp_path: Path, cdn: Cdn) -> None:
    rows, outcomes = serve(cdn, 12, size=SMALL), list[Any]()
    for i, row in enumerate(rows):
        row["target_filename_stub"] = "sSß"[: 1 + i % 2]
    downloader = make_downloader(tmp_path, on_outcome=outcomes.append)
    with ThreadPoolExecutor(24) as pool:
        assert all(pool.map(downloader.process_succeeded_task, [*rows, *rows]))
    assert downloader.stats == figures(total_succeeded=24, downloaded=12, already_exists=12)
    assert Counter(each.task.task_id for each in outcomes) == {row["task_id"]: 2 for row in rows}
    names = owners(tmp_path)
    for i, row in enumerate(rows):
        assert_whole(tmp_path, names[row["task_id"]], row["task_id"], make_mp4(i, SMALL))
    assert len(names_in(tmp_path)) == 24
    assert len(cdn.requests) == 12


@unix_only
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_fork_has_connections_of_its_own(tmp_path: Path, cdn: Cdn) -> None:
    downloader, rows = make_downloader(tmp_path), serve(cdn, 2)
    assert downloader.process_succeeded_task(rows[0])
    if not (child := os.fork()):
        os._exit(not downloader.process_succeeded_task(rows[1]))
    assert (os.waitpid(child, 0)[1], len({request.client for request in cdn.requests})) == (0, 2)


# --- Nothing that was paid for is lost ---------------------------------------------------------

HALF = VIDEO_BYTES // 2
OBJECT, OTHER = make_mp4("object"), make_mp4("other")
BIG = 900_000  # as real ones are: a small video says little about what is buffered
SECRETS = re.compile(r"_jwt|eyJ|secret", re.IGNORECASE)  # what queries and the API key hold
API_KEY = "key_secret_0123456789abcdef"


def download(
    directory: Path, rows: Iterable[Any], *arguments: str, run: Any = run_script, **how: Any
) -> subprocess.CompletedProcess[str]:
    """A run of the script for ``rows``; whatever it does, it tells no secret."""
    write_results(directory, rows)
    result: subprocess.CompletedProcess[str] = run(directory, *arguments, **how)
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


def refusal(code: int, retry_after: str | None = None) -> Reply:
    return Reply(status=code, body=b"no", headers={"Retry-After": retry_after})


def headed(name: str, value: str | None, **how: Any) -> Reply:
    return Reply(headers={name: value}, **how)


GOOD, GZIPPED = Reply(), gzip.compress(OBJECT)
REPLY_TABLE: dict[str, tuple[Sequence[Reply], int, str]] = {
    "good": ([GOOD], 1, ""),
    "cut": ([Reply(send=HALF), GOOD], 2, ""),
    "cut-between-boxes": ([headed("ETag", None, send=VIDEO_BYTES - 8), GOOD], 2, ""),
    "cut-again-and-again": ([Reply(send=VIDEO_BYTES // 5 + 1)], 5, ""),
    "reset": ([Reply(send=HALF, ending="reset"), GOOD], 2, ""),
    **{f"{code}-then-good": ([refusal(code), GOOD], 2, "") for code in (408, 425, 429, 500)},
    "302": ([headed("Location", "good.mp4?_jwt=secret", status=302, send=1, ending="hang")], 1, ""),
    "always-500": ([refusal(500)], 3, "HTTP 500"),
    "503-retry-after": ([refusal(503, "1"), GOOD], 2, ""),
    "503-retry-after-the-past": ([refusal(503, "Tue, 17 Jun 2025 03:59:59 GMT"), GOOD], 2, ""),
    "503-retry-after-nonsense": ([refusal(503, "soon"), GOOD], 2, ""),
    "503-retry-after-too-long": ([refusal(503, "300"), GOOD], 1, "503.* 300 s"),
    "503-retry-after-a-century": ([refusal(503, "Sun, 17 Jun 2125 03:59:59 GMT")], 1, "503"),
    **{str(code): ([refusal(code), GOOD], 1, f"HTTP {code}") for code in
       (400, 401, 402, 403, 404, 405, 410, 416, 451)},
    "no-video": ([Reply(body=b"Access denied")], 1, "text"),
    "chunked": ([Reply(framing="chunked")], 1, ""),
    "chunked-and-cut": ([Reply(framing="chunked", send=HALF), GOOD], 2, ""),
    "until-close": ([Reply(framing="close")], 1, ""),
    "until-close-and-cut": ([Reply(framing="close", send=HALF), GOOD], 2, ""),
    "until-close-always-cut": ([Reply(framing="close", send=HALF)], 3, "cut short"),
    "whole-by-length-but-cut": ([Reply(body=OBJECT[:HALF]), GOOD], 2, ""),
    "gzip": ([headed("Content-Encoding", "gzip", body=GZIPPED)], 1, ""),
    "gzip-and-cut": ([headed("Content-Encoding", "gzip", body=GZIPPED, send=HALF), GOOD], 2, ""),
    "length-too-short": ([headed("Content-Length", str(HALF)), GOOD], 2, ""),
    "206-short": ([Reply(206, WHOLE, {"ETag": None, "Content-Range": "bytes 0-9999/10000"}), GOOD],
                    2, ""),
    "unknown-framing": ([headed("Transfer-Encoding", "identity, chunked"), GOOD], 2, ""),
    "206-unasked": ([headed("Content-Range", "bytes 9-50000/100000", status=206), GOOD], 2, ""),
}  # fmt: skip


@dataclass
class TableRun:
    """What one run of the script made of a table, a row a task."""

    cdn: Cdn
    output_dir: Path
    exit_code: int
    videos: Mapping[str, Any]  # by task_id, as --json gives them
    console: str
    api: Any = None  # another `Cdn`
    arrived: Mapping[str, bytes] = field(default_factory=dict)  # what others had put by then


def serve_table(cdn: Cdn, table: Mapping[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """The rows of tasks whose videos, `OBJECT`, come as the first column of ``table`` says."""
    links = [cdn.add(f"{name}.mp4", OBJECT, *row[0]) for name, row in table.items()]
    return [make_row(number, video_url=link) for number, link in enumerate(links)]


def run_table(cdn: Cdn, directory: Path, rows: Any, *arguments: str, **how: Any) -> TableRun:
    result = download(directory, rows, "--json", "--workers", "64", *arguments, **how)
    videos = {video["task_id"]: video for video in json.loads(result.stdout)["videos"]}
    return TableRun(cdn, directory / "video_outputs", result.returncode, videos, result.stderr)


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


@pytest.fixture(scope="module")
def reply_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TableRun]:
    """The whole table at once. What asks to hold back does so by another name of the host."""
    with Cdn() as cdn:
        rows = serve_table(cdn, REPLY_TABLE)
        for row in rows:
            if re.search("/(429|503)", row["video_url"]):
                row["video_url"] = row["video_url"].replace("127.0.0.1", "localhost")
        yield run_table(cdn, tmp_path_factory.mktemp("replies"), rows, "--retries", "2")


@pytest.mark.parametrize("name", REPLY_TABLE)
def test_a_reply_is_retried_if_that_may_help(reply_run: TableRun, name: str) -> None:
    _, requests, reason = REPLY_TABLE[name]
    ends(reply_run, list(REPLY_TABLE).index(name), OBJECT, reason)
    asked = len(reply_run.cdn.asked(f"{name}.mp4"))
    assert asked == requests + (name == "good")  # a redirect leads there


def test_nothing_is_left_of_what_failed_and_each_failure_is_said(reply_run: TableRun) -> None:
    reasons = [reason for *_, reason in REPLY_TABLE.values()]
    whole = {f"picture_{number}" for number, reason in enumerate(reasons) if not reason}
    left = names_in(reply_run.output_dir)
    assert left == {f"{stub}{suffix}" for stub in whole for suffix in (".mp4", ".json")}
    assert reply_run.exit_code == 3
    assert f"Failed downloads: {len(reasons) - len(whole)}\n" in reply_run.console


def test_retry_after_is_honoured(reply_run: TableRun) -> None:
    first, second = reply_run.cdn.asked("503-retry-after.mp4")
    assert second.at - first.at >= 1


def test_a_retry_takes_no_idle_connection(cdn: Cdn, tmp_path: Path) -> None:
    rows = [*serve(cdn, 1, Reply(send=HALF), GOOD), make_row(1, video_url=cdn.add("1.mp4", OTHER))]
    assert download(tmp_path, rows).returncode == 0
    assert len({request.client for request in cdn.requests}) == 3  # those that idle may be dead


def test_a_proxy_that_refuses_is_named(cdn: Cdn, tmp_path: Path) -> None:
    env = {"HTTPS_PROXY": cdn.url, "NO_PROXY": ""}
    result = download(tmp_path, [make_row()], "--retries", "0", env=env)
    assert "❌ 1 video: the proxy did not connect\n" in result.stderr


def test_an_absurd_length_is_a_cut_connection(cdn: Cdn, tmp_path: Path) -> None:
    slow = headed("Content-Length", str(10**19), send=HALF, bytes_per_second=2 * HALF)
    write_results(tmp_path, [make_row(video_url=cdn.add("0.mp4", OBJECT, slow))])
    assert run_script(tmp_path, "--retries", "0").returncode == 3


# What arrives whole. Each row: the body, whether it is kept, and what is said, as a pattern.


def box(kind: bytes, payload: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack(">I4s", 8 + len(payload) if size is None else size, kind) + payload


FTYP = box(b"ftyp", b"isom\0\0\2\0isomiso2")
LONG_BOX = box(b"mdat", struct.pack(">Q", 21) + b"12345", size=1)
BOXES = [FTYP, LONG_BOX, box(b"free"), box(b"moov", b"123")]
CUTS = {size: b"".join(BOXES)[:size] for size in range(1, 1 + sum(map(len, BOXES)))}
CONTENTS: dict[str, tuple[bytes, bool, str]] = {
    "whole": (WHOLE, True, ""),
    "size-0-is-all-the-rest": (FTYP + box(b"mdat", b"12345", size=0), True, ""),
    "old-mov": (box(b"wide") + box(b"mdat", b"1") + box(b"moov"), True, ""),
    "64-bit-short": (FTYP + box(b"mdat", b"\xff" * 8 + b"1", size=1), False, "cut short"),
    "zero-bytes-behind": (WHOLE + bytes(4), True, "behind it"),
    "text-behind": (WHOLE + b"<html>Bye</html>", True, "behind it"),
    "webm": (WEBM, True, "no MP4"),
    "gif": (b"GIF89a\1\0\1\0\x80\0\0\xff\xff\xff", True, "no MP4"),
    "empty": (b"", False, "empty"),
    "a-zero-byte": (b"\0", False, "zero bytes"),
    "64-bit-head-cut": (b"\0\0\0\1mdat\0\0", False, "cut short"),
    "zeros": (bytes(200_000), False, "zero bytes"),
    "bytes-behind-zeros": (bytes(200_000) + b"\1", True, "no MP4"),
    "page-behind-a-mark": (b"\xef\xbb\xbf\r\n<!DOCTYPE html>", False, "text"),
    "xml": (b'<?xml version="1.0"?><Error/>', False, "text"),
    "json": (b'{"error": "expired"}', False, "text"),
    "playlist": (b"#EXTM3U\n#EXT-X-VERSION:3\n", False, "text"),
    "a-letter": (b"x", False, "text"),
    "latin-1": ("Zugriff verweigert: für".encode("latin-1"), False, "text"),
    "utf-16": ("Access denied".encode("utf-16"), False, "text"),
    "long-text": (b"Access denied. " * 10_000, False, "text"),
}


@pytest.fixture(scope="module")
def content_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TableRun]:
    """All of `CONTENTS` and `CUTS`, videos as text and texts as videos."""
    bodies = [(body, kept) for body, kept, _ in CONTENTS.values()]
    with Cdn() as cdn:
        rows = []
        for number, (body, kept) in enumerate([*bodies, *((cut, True) for cut in CUTS.values())]):
            reply = Reply(headers={"Content-Type": "text/plain" if kept else "video/mp4"})
            rows.append(make_row(number, video_url=cdn.add(f"{number}.mp4", body, reply)))
        yield run_table(cdn, tmp_path_factory.mktemp("contents"), rows, "--retries", "0")


@pytest.mark.parametrize("name", CONTENTS)
def test_the_bytes_decide_what_is_kept(content_run: TableRun, name: str) -> None:
    body, kept, said = CONTENTS[name]
    number = list(CONTENTS).index(name)
    ends(content_run, number, body, "" if kept else said)
    warning = content_run.videos[make_task_id(number)]["warning"]
    assert re.search(said, warning) if kept and said else warning is None
    assert len(content_run.cdn.asked(f"{number}.mp4")) == 1


def test_mp4_cut_at_any_byte_inside_a_box_is_seen(content_run: TableRun) -> None:
    whole = {sum(map(len, BOXES[:count])) for count in range(1, 5)}
    for number, size in enumerate(CUTS, len(CONTENTS)):
        video = content_run.videos[make_task_id(number)]
        is_kept = video["status"] == "downloaded"
        assert (is_kept and not video["warning"]) == (size in whole), f"cut to {size} bytes"
        assert not is_kept or any(size - 8 < end <= size for end in whole), f"cut to {size} bytes"


# Resuming. Each row: the replies after one that was cut half way, from which byte on each was
# asked for (None: all of it), and whether the object was another one by then.

DATED = Reply(headers={"ETag": None, "Last-Modified": "Tue, 17 Jun 2025 04:00:00 GMT"})
WEAK, UNMARKED = Reply(headers={"ETag": 'W/"object"'}), Reply(headers={"ETag": None})
CUT, QUARTER, END = Reply(send=HALF), Reply(send=HALF // 2), VIDEO_BYTES - 1


def sent_from(first: int) -> Reply:
    """A 206 from ``first`` on, whatever was asked for."""
    headers = {"Content-Range": f"bytes {first}-{END}/{VIDEO_BYTES}", "ETag": make_etag(OBJECT)}
    return Reply(status=206, body=OBJECT[first:], headers=headers)


LONGER = Reply(body=OTHER + WHOLE, headers={"ETag": make_etag(OBJECT)})
NO_TOTAL = headed("Content-Range", f"bytes {HALF}-{END}/*")
MORE = replace(sent_from(HALF), body=OBJECT)
ONCE, TWICE, FURTHER = [None, HALF], [None, HALF, None], [None, HALF, *[HALF * 3 // 2] * 2]
RESUME_TABLE: dict[str, tuple[Sequence[Reply], Sequence[int | None], bytes]] = {
    "the-same-object": ([CUT, Reply()], ONCE, OBJECT),
    "failing-after-a-resume": ([CUT, QUARTER, Reply(status=502), Reply()], FURTHER, OBJECT),
    "after-a-503": ([CUT, Reply(status=503), Reply()], [None, HALF, HALF], OBJECT),
    "chunked": ([CUT, Reply(framing="chunked")], ONCE, OBJECT),
    "another-object": ([CUT, Reply(body=OTHER)], ONCE, OTHER),
    "another-object-if-range-ignored": ([CUT, Reply(body=OTHER, if_range=False)], TWICE, OTHER),
    "another-object-of-the-same-etag": ([CUT, LONGER], TWICE, OTHER + WHOLE),
    "another-shorter-object": ([CUT, Reply(body=WHOLE, if_range=False)], TWICE, WHOLE),  # 416
    "range-ignored": ([CUT, Reply(ranges=False)], ONCE, OBJECT),
    "206-too-late": ([CUT, sent_from(HALF + 1), Reply()], TWICE, OBJECT),
    "206-of-everything": ([CUT, sent_from(0), Reply()], TWICE, OBJECT),
    "206-without-total": ([CUT, NO_TOTAL, Reply()], TWICE, OBJECT),
    "206-without-range": ([CUT, headed("Content-Range", None), Reply()], TWICE, OBJECT),
    "206-of-more-than-it-says": ([CUT, MORE, Reply()], TWICE, OBJECT),
    "206-of-more-in-chunks": ([CUT, replace(MORE, framing="chunked"), Reply()], TWICE, OBJECT),
    "206-gzipped": ([CUT, headed("Content-Encoding", "gzip"), Reply()], TWICE, OBJECT),
    "last-modified": ([replace(DATED, send=HALF), DATED], ONCE, OBJECT),
    "weak-etag": ([replace(WEAK, send=HALF), replace(WEAK, body=OTHER)], [None, None], OTHER),
    "no-validator": ([replace(UNMARKED, send=HALF), Reply(body=OTHER)], [None, None], OTHER),
    "no-length": ([Reply(send=HALF, framing="chunked"), Reply(body=OTHER)], [None, None], OTHER),
}


for refused in (400, 405, 412, 501):
    replies = [CUT, Reply(status=refused), Reply()]
    RESUME_TABLE[f"ranges-refused-{refused}"] = (replies, TWICE, OBJECT)


@pytest.fixture(scope="module", params=["in-one-run", "in-a-later-run"])
def resume_run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TableRun]:
    """All rows at once; the later run has links with a fresh signature."""
    directory = tmp_path_factory.mktemp("resume")
    with Cdn() as cdn:
        rows = serve_table(cdn, RESUME_TABLE)
        if request.param == "in-a-later-run":
            run_table(cdn, directory, rows, "--retries", "0")
            assert len(cdn.requests) == len(rows)
            rows = [row | {"video_url": row["video_url"] + ".fresh"} for row in rows]
        yield run_table(cdn, directory, rows, "--retries", "2")
        assert len(names_in(directory / "video_outputs")) == 2 * len(rows)  # no part is left


@pytest.mark.parametrize("name", RESUME_TABLE)
def test_a_cut_video_is_resumed_and_never_stitched(resume_run: TableRun, name: str) -> None:
    _, starts, body = RESUME_TABLE[name]
    ends(resume_run, list(RESUME_TABLE).index(name), body)
    asked = resume_run.cdn.asked(f"{name}.mp4")
    assert [request.range_start for request in asked] == starts
    assert [bool(request.headers.get("If-Range")) for request in asked] == [*map(bool, starts)]
    assert {request.headers["Accept-Encoding"] for request in asked} == {"identity"}


@pytest.mark.parametrize("fault", [refusal(500), Reply(send=0)], ids=["refused", "no-bytes"])
def test_a_last_try_asks_for_all_if_no_range_came(cdn: Cdn, tmp_path: Path, fault: Reply) -> None:
    write_results(tmp_path, serve(cdn, 1, CUT, fault, fault, GOOD))
    assert [run_script(tmp_path, "--retries", n).returncode for n in "01"] == [3, 0]
    assert [request.range_start for request in cdn.asked("0.mp4")] == [None, HALF, HALF, None]


def test_a_broken_note_of_a_part_is_no_hindrance(cdn: Cdn, tmp_path: Path) -> None:
    write_results(tmp_path, serve(cdn, 4, CUT, GOOD, size=2 * HALF))
    assert run_script(tmp_path, "--retries", "0").returncode == 3
    parts = (tmp_path / "video_outputs").glob(".dsv-*.part")
    for part, note in zip(parts, (b"", b"0 x", b"9" * 999, b"100000 \xe2\x82\xac"), strict=True):
        os.setxattr(part, dsv.NOTE, note)
    assert run_script(tmp_path).returncode == 0
    assert not any(map(os.listxattr, (tmp_path / "video_outputs").iterdir()))


def test_a_part_that_cannot_be_resumed_is_removed_at_once(cdn: Cdn, tmp_path: Path) -> None:
    kinds = replace(WEAK, send=HALF), replace(UNMARKED, send=HALF)
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
    "slow-but-above-the-limit": ([Reply(bytes_per_second=70_000)], "", [None]),
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
        trickle = [Reply(bytes_per_second=400), Reply()]
        rows = serve_table(cdn, STALL_TABLE | {"trickle": (trickle,)})
        rows.append(make_row(len(rows), video_url=f"{deaf}/0.mp4?_jwt=secret"))
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
        "fresh-link-refused-too": ([good], 1, "link was refused .*run again later"),
        "429-then-good": ([answer({}, 429), good], 2, ""),
        "429-retry-after-too-long": ([answer({}, 429, Retry_After="300")], 1, "429.*300 s"),
        "always-500": ([answer({}, 500)], 2, "API.*500"),
        "403": ([answer({}, 403)], 1, "API.*403"),
        "redirect": ([headed("Location", fresh, status=302, send=1, ending="hang")], 1, "API.*302"),
        "no-output": ([task(output=[], status=API_KEY)], 1, "API.*no (output|video)"),
        "failed-by-now": ([task(status="FAILED", output=None)], 1, "API.*FAILED"),
        "without-end": ([Reply(body=endless, send=2_000_000, ending="hang")], 2, "API.*not all"),
        "above-1-mb": ([Reply(body=endless[-(2**20 + 9) :])], 2, "API.*not all"),
        "not-json": ([Reply(body=b"<html>")], 2, "API.*not JSON"),
    }


@pytest.fixture(scope="module")
def api_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TableRun]:
    directory = tmp_path_factory.mktemp("api")
    refused, moved = Reply(status=403), headed("Location", "fresh.mp4", status=302, body=b"")
    before = {"fresh-link-after-a-cut": [CUT, refused]}
    after = {"fresh-link-refused-too": [refused], "fresh-link-after-a-cut": [moved, Reply()]}
    rows = []
    with Cdn() as cdn, Cdn() as api:
        for number, name in enumerate(make_api_table("")):
            fresh = cdn.add(f"{name}/fresh.mp4", OBJECT, *after.get(name, []))
            api.add(f"v1/tasks/{make_task_id(number)}", b"", *make_api_table(fresh)[name][0])
            link = cdn.add(f"{name}/dead.mp4", OBJECT, *before.get(name, [refused])).split("?")[0]
            dead = None if name == "no-link-in-the-row" else make_jwt_link(link, EXPIRED)
            rows.append(make_row(number, video_url=dead))
        env = {"RUNWAYML_API_SECRET": API_KEY, "RUNWAYML_BASE_URL": api.url + "/"}
        yield replace(run_table(cdn, directory, rows, "--retries", "1", env=env), api=api)


@pytest.mark.parametrize("name", make_api_table(""))
def test_a_dead_link_is_renewed_by_the_api_or_said_to_be_dead(api_run: TableRun, name: str) -> None:
    _, calls, reason = make_api_table("")[name]
    number = list(make_api_table("")).index(name)
    ends(api_run, number, OBJECT, reason)
    asked = api_run.api.asked(f"v1/tasks/{make_task_id(number)}")
    assert len(asked) == calls
    for request in asked:
        assert request.headers["Authorization"] == f"Bearer {API_KEY}"
        assert request.headers["X-Runway-Version"] == "2024-11-06"
    fresh = api_run.cdn.asked(f"{name}/fresh.mp4")
    starts = [HALF, HALF] if name == "fresh-link-after-a-cut" else [None]  # HALF: redirected, too
    refused_too = name == "fresh-link-refused-too"
    assert [each.range_start for each in fresh] == ([] if reason and not refused_too else starts)


def test_the_api_key_is_seen_by_no_other_host_and_kept_nowhere(api_run: TableRun) -> None:
    seen = [f"{request.path} {request.headers}" for request in api_run.cdn.requests]
    assert seen
    assert not [text for text in seen if API_KEY in text or "authorization" in text.lower()]
    for path in api_run.output_dir.iterdir():
        assert API_KEY.encode() not in path.read_bytes()


def test_without_a_key_a_dead_links_expiry_is_said(cdn: Cdn, tmp_path: Path) -> None:
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


def test_a_part_stays_for_its_own_task_when_another_is_done(cdn: Cdn, tmp_path: Path) -> None:
    rows = serve(cdn, 2)
    cdn.replies["/0.mp4"] = [Reply(send=HALF), Reply()]
    downloader = make_downloader(tmp_path / "out", retries=0)
    assert [downloader.process_succeeded_task(row) for row in (*rows, rows[0])] == [0, 1, 1]
    assert [request.range_start for request in cdn.asked("0.mp4")] == [None, HALF]
    names = {f"picture_{i}.{end}" for i in "01" for end in ("mp4", "json")}
    assert names_in(tmp_path / "out") == names


def test_a_whole_part_is_kept_while_its_name_cannot_be_settled(cdn: Cdn, tmp_path: Path) -> None:
    rows = serve(cdn, 1)
    env = sabotage(tmp_path / "s", "count < 99", "raise FileExistsError(17, 'taken')", "os.link")
    assert download(tmp_path, rows, "--retries", "0", run=run_process, env=env).returncode == 3
    assert [*parts_in(tmp_path / "video_outputs").values()] == [make_mp4(0)]
    assert download(tmp_path, rows).returncode == 0
    assert len(cdn.requests) == 1
    assert_whole(tmp_path / "video_outputs", "picture_0", make_task_id(0), make_mp4(0))


# Runs that end before their time: killed at a step, killed anywhere, stopped by a signal.


SABOTAGE = """
import builtins, errno, os, signal, ssl, threading
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


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
STEPS = ("os.fsync", "os.link", "os.rename", "os.replace", "os.unlink")


def test_a_kill_before_any_step_of_a_download_costs_nothing(cdn: Cdn, tmp_path: Path) -> None:
    steps, rows, broken = range(2, 12), serve(cdn, 12), WHOLE[:12]

    def run_until(step: int) -> int:
        directory = tmp_path / str(step)
        lay_out(directory / "video_outputs", {f"picture_{step}.mp4": broken} if step % 2 else {})
        env = sabotage(directory / "s", f"count == {step}", KILL, *STEPS)
        return download(directory, [rows[step]], run=run_process, env=env).returncode

    with ThreadPoolExecutor(2) as threads:
        exit_codes = list(threads.map(run_until, steps))
    assert set(exit_codes) <= {0, -signal.SIGKILL}
    assert exit_codes.count(-signal.SIGKILL) >= 4
    for step in steps:
        name, output_dir = f"picture_{step}", tmp_path / str(step) / "video_outputs"
        body, video = make_mp4(step), output_dir / f"{name}.mp4"
        is_there = body in parts_in(output_dir).values()
        if video.exists() and video.read_bytes() != broken:
            assert_whole(output_dir, name, make_task_id(step), body)
            is_there = True
        assert download(tmp_path / str(step), [rows[step]]).returncode == 0
        assert_whole(output_dir, name, make_task_id(step), body)
        assert names_in(output_dir) == {f"{name}.mp4", f"{name}.json"}
        assert len(cdn.asked(f"{step}.mp4")) <= (1 if is_there else 2)


def test_kills_at_random_moments_cost_nothing(tmp_path: Path) -> None:
    bodies, rng = [make_mp4(i, BIG) for i in range(16)], random.Random(0)
    output_dir, slow = tmp_path / "video_outputs", Reply(bytes_per_second=6_000_000)
    for reply in [*[slow] * 4, Reply()]:
        with Cdn() as cdn:
            write_results(tmp_path, serve(cdn, 16, reply, size=BIG))
            left = parts_in(output_dir).values()
            enough = bytes_in(output_dir) + rng.choice([0, BIG // 2, 2 * BIG])
            process = start_script(tmp_path, "--workers", "4")
            if reply is slow:
                wait_until(lambda: cdn.requests and bytes_in(output_dir) >= enough)  # noqa: B023
                process.kill()
            assert finish(process).returncode == (-signal.SIGKILL if reply is slow else 0)
            starts = {request.range_start for request in cdn.requests} - {None}
            assert starts <= {len(data) for data in left}
        assert all(any(x.startswith(y) for x in bodies) for y in parts_in(output_dir).values())
        there = [i for i in range(16) if (output_dir / f"picture_{i}.mp4").exists()]
        for i in there:
            assert_whole(output_dir, f"picture_{i}", make_task_id(i), bodies[i])
    assert len(names_in(output_dir)) == 2 * len(there) == 32


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


def assert_home(output_dir: Path, count: int, size: int = VIDEO_BYTES) -> None:
    """The videos of `serve` are there, and nothing else is."""
    for number in range(count):
        assert_whole(output_dir, f"picture_{number}", make_task_id(number), make_mp4(number, size))
    assert len(names_in(output_dir)) == 2 * count


def test_three_runs_on_one_directory_share_the_work(cdn: Cdn, tmp_path: Path) -> None:
    write_results(tmp_path, serve(cdn, 36, Reply(wait_s=60)))
    processes = [start_script(tmp_path, "--workers", "2") for _ in range(3)]
    wait_until(lambda: len(cdn.requests) == 6)  # all of them are at work
    cdn.released.set()
    results = [finish(process) for process in processes]
    assert [result.returncode for result in results] == [0] * 3
    shares = [statistic(result, "Videos downloaded") for result in results]
    assert min(shares) >= 2
    assert sum(shares) == 36
    assert Counter(request.path for request in cdn.requests).most_common(1)[0][1] == 1
    assert_home(tmp_path / "video_outputs", 36)


@pytest.mark.parametrize("end", ["thaws", "is-killed"])
def test_a_frozen_run_holds_up_what_it_has_alone(cdn: Cdn, tmp_path: Path, end: str) -> None:
    write_results(tmp_path, serve(cdn, 6, size=BIG))
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
def test_without_locks_or_links_no_wrong_file_is_made(cdn: Cdn, tmp_path: Path, call: str) -> None:
    env = sabotage(tmp_path / "s", "True", "raise OSError(errno.ENOLCK, 'no')", call)
    replies = Reply(wait_s=60), Reply(bytes_per_second=9_000_000)
    write_results(tmp_path, serve(cdn, 8, *replies, size=BIG))
    processes = [start_script(tmp_path, "--workers", "4", env=env) for _ in range(2)]
    wait_until(lambda: len(cdn.requests) >= 8)
    cdn.released.set()
    assert {finish(process).returncode for process in processes} <= {0, 3}
    assert run_script(tmp_path).returncode == 0
    for number in range(8):
        videos = list((tmp_path / "video_outputs").glob(f"picture_{number}*.mp4"))
        assert {video.read_bytes() for video in videos} == {make_mp4(number, BIG)}
        assert any(video.with_suffix(".json").exists() for video in videos)


def test_without_links_a_name_is_held_until_it_is_filled(tmp_path: Path) -> None:
    lay_out(tmp_path, {"first": b"1", "second": b"2"})
    first, second, final = (tmp_path / name for name in ("first", "second", "final"))
    rename = os.replace

    def rename_late(*paths: Path) -> None:
        with pytest.raises(FileExistsError):
            dsv.publish(second, final, replaces=False)
        rename(*paths)

    with mock.patch("os.link", side_effect=OSError(1, "")), mock.patch("os.replace", rename_late):
        dsv.publish(first, final, replaces=False)
    assert final.read_bytes() == b"1"


# What others do to a name while its video downloads. Each row: what, given the hidden file and
# the path of the video, and under which name it ends; "there": as what has arrived.

FOREIGN = make_mp4("foreign", 70_000)


def own_metadata(video: Path) -> bytes:
    return make_metadata(make_row(int(video.stem.removeprefix("picture_"))))


MEDDLING: dict[str, tuple[Callable[[Path, Path, Path], object], str]] = {
    "hidden-removed": (lambda hidden, *_: hidden.unlink(), "wanted"),
    "hidden-cut": (lambda hidden, *_: os.truncate(hidden, 1000), "wanted"),
    "hidden-grown": (lambda hidden, *_: os.truncate(hidden, BIG), "wanted"),
    "hidden-a-link": (lambda h, *_: (h.unlink(), h.symlink_to("elsewhere")), "wanted"),
    "hidden-moved": (lambda h, v, _: h.rename(v.parent.parent / "rescued"), "wanted"),
    "hidden-replaced": (lambda h, *_: (h.unlink(), h.write_bytes(FOREIGN)), "wanted"),
    "same-video-and-metadata": (
        lambda _, v, m: (m.write_bytes(own_metadata(v)), v.write_bytes(FOREIGN)), "there"),
    "own-metadata": (lambda _, video, meta: meta.write_bytes(own_metadata(video)), "wanted"),
    "foreign-video": (lambda _, video, __: video.write_bytes(FOREIGN), "with-id"),
    "foreign-metadata": (lambda *p: p[2].write_bytes(make_metadata(make_row(99))), "with-id"),
    "other-programs-json": (lambda _, __, metadata: metadata.write_bytes(b"[]"), "with-id"),
    "directory": (lambda _, video, __: video.mkdir(), "with-id"),
    "dead-symbolic-link": (lambda _, video, __: video.symlink_to("nowhere"), "with-id"),
    "empty-file": (lambda _, video, __: video.touch(), "wanted"),
}  # fmt: skip


@pytest.fixture(scope="module")
def meddled_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TableRun]:
    directory = tmp_path_factory.mktemp("meddled")
    output_dir = directory / "video_outputs"
    output_dir.mkdir()
    with Cdn() as cdn:
        rows = serve(cdn, len(MEDDLING), Reply(pause_at=BIG // 2), Reply(), size=BIG)
        write_results(directory, rows)
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
        yield TableRun(cdn, output_dir, result.returncode, videos, result.stderr, None, arrived)


@pytest.mark.parametrize("name", MEDDLING)
def test_what_others_do_makes_no_wrong_file(meddled_run: TableRun, name: str) -> None:
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


def test_what_others_did_leaves_nothing_hidden_behind(meddled_run: TableRun) -> None:
    assert (meddled_run.exit_code, hidden_in(meddled_run.output_dir)) == (0, set())
    assert (meddled_run.output_dir.parent / "rescued").stat().st_size == BIG  # as it was moved away


LAST_MOMENT = {  # which link is about to be made, the name that is taken, what follows
    "final": ("count == 2", "arguments[1]", "pass", "--retries=0"),
    "hidden": ("count == 2", "(arguments[0].unlink() or arguments[0])", "pass", "--retries=1"),
    "hidden-cut": ("count == 1", "next(arguments[0].parent.glob('.*t'))", "pass", "--retries=1"),
    "before-a-kill": ("count == 1", "arguments[1].with_suffix('.mp4')", KILL, "--retries=0"),
}


@pytest.mark.parametrize("name", LAST_MOMENT)
def test_a_name_taken_at_the_last_moment(cdn: Cdn, tmp_path: Path, name: str) -> None:
    condition, taken, then, option = LAST_MOMENT[name]
    env = sabotage(tmp_path / "s", condition, f"{taken}.write_bytes({WHOLE!r}); {then}", "os.link")
    task_id, rows, is_final = make_task_id(0), serve(cdn, 1), "hidden" not in name
    runs = [download(tmp_path, rows, option, run=run_process, env=each) for each in (env, {})]
    assert [run.returncode for run in runs] == [-signal.SIGKILL if then == KILL else 0, 0]
    output_dir = tmp_path / "video_outputs"
    assert ((output_dir / "picture_0.mp4").read_bytes() == WHOLE) == is_final
    assert_whole(output_dir, "picture_0" + is_final * f"_{task_id[:8]}", task_id, make_mp4(0))
    assert len(names_in(output_dir)) == 2 + is_final


def test_a_leftover_that_cannot_be_removed_is_named(cdn: Cdn, tmp_path: Path) -> None:
    lay_out(tmp_path / "video_outputs", {"picture_0.mp4": b""})
    is_it = "str(arguments[0]).endswith('0.mp4')"
    env = sabotage(tmp_path / "s", is_it, "raise PermissionError(1, 'no')", "os.unlink")
    result = download(tmp_path, serve(cdn, 1), run=run_process, env=env)
    assert (result.returncode, "not remove picture_0.mp4" in result.stderr) == (3, True)


def test_an_edit_right_after_publishing_stays(cdn: Cdn, tmp_path: Path) -> None:
    final = "video_outputs/picture_0.mp4"
    edit = f"open('{final}', 'wb').write(b'edited')"
    env = sabotage(tmp_path / "s", f"os.path.isfile('{final}')", edit, "os.lstat")
    assert download(tmp_path, serve(cdn, 1), run=run_process, env=env).returncode == 0
    assert (tmp_path / final).read_bytes() == b"edited"


def test_a_replaced_part_is_not_resumed(cdn: Cdn, tmp_path: Path) -> None:
    write_results(tmp_path, rows := serve(cdn, 1, Reply(pause_at=BIG // 2), Reply(), size=BIG))
    process = start_script(tmp_path)
    wait_until(lambda: any(map(len, parts_in(tmp_path / "video_outputs").values())))
    (hidden,) = parts_in(tmp_path / "video_outputs")
    hidden.unlink()
    hidden.write_bytes(FOREIGN)
    process.send_signal(signal.SIGINT)
    assert [finish(process).returncode, download(tmp_path, rows).returncode] == [130, 0]
    assert_whole(tmp_path / "video_outputs", "picture_0", make_task_id(0), make_mp4(0, BIG))


# A directory that is not ours alone.


def test_where_nothing_can_be_removed_the_requests_are_bounded(cdn: Cdn, tmp_path: Path) -> None:
    rows = serve(cdn, 4)
    cdn.replies["/1.mp4"] = [Reply(send=HALF)]
    cdn.replies["/2.mp4"] = [Reply(send=HALF, headers={"ETag": None})]
    cdn.replies["/3.mp4"] = [Reply(body=make_mp4(3)[:HALF])]
    output_dir = tmp_path / "video_outputs"
    output_dir.mkdir()
    if not shutil.which("chattr") or subprocess.run(["chattr", "+a", output_dir]).returncode != 0:
        pytest.skip("no right to forbid removal, or a file system that cannot")
    try:
        assert download(tmp_path, rows, "--retries", "1").returncode == 3
        assert max(Counter(request.path for request in cdn.requests).values()) <= 4
        assert_whole(output_dir, "picture_0", make_task_id(0), make_mp4(0))
        assert max(path.stat().st_size for path in output_dir.iterdir()) <= len(make_mp4(0))
    finally:
        subprocess.run(["chattr", "-a", output_dir], check=True)


STRANGER = 65533
ORDINARY_USER = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"]


@pytest.mark.parametrize("mode", [0o777, 0o1777], ids=["anybody-may-remove", "sticky"])
def test_a_killed_run_of_another_user_blocks_nobody(cdn: Cdn, tmp_path: Path, mode: int) -> None:
    if not shutil.which("setpriv") or os.geteuid() != 0:
        pytest.skip("no right to give files to another user")
    rows = serve(cdn, 2, Reply(send=HALF), Reply())
    assert download(tmp_path, rows, "--retries", "0").returncode == 3
    output_dir = tmp_path / "video_outputs"
    for path in [*output_dir.iterdir(), output_dir]:
        path.chmod(0o600 if path != output_dir else mode)
        os.chown(path, STRANGER, STRANGER)
    assert run_process(tmp_path, before=ORDINARY_USER).returncode == 0
    for name in hidden_in(output_dir) if mode == 0o1777 else ():
        (output_dir / name).unlink()  # which the stranger alone may do
    assert_home(output_dir, 2)


# Servers under pressure, and a system that is short of threads.


class BusyCdn(Cdn):
    """Serves 50 requests a second and refuses the others."""

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
            self._free_at = max(self._free_at, request.at - 0.1) + 1 / 50
        return reply


def test_a_server_that_asks_to_hold_back_is_obeyed_and_all_come_home(tmp_path: Path) -> None:
    with contextlib.ExitStack() as servers:
        runs = []
        for workers, each in (64, refusal(429)), (16, refusal(503, "1")):
            cdn, directory = servers.enter_context(BusyCdn(each)), tmp_path / str(workers)
            directory.mkdir()
            write_results(directory, serve(cdn, 40, size=SMALL))
            process = start_script(directory, "--workers", str(workers), "--retries", "1")
            runs.append((cdn, process, directory / "video_outputs"))
        for cdn, process, output_dir in runs:
            assert finish(process).returncode == 0
            assert_home(output_dir, 40, SMALL)
            assert 0 < cdn.refused < 120


@pytest.mark.parametrize("count", [0, 3])
def test_fewer_threads_than_asked_for_are_no_failure(cdn: Cdn, tmp_path: Path, count: int) -> None:
    no_more = "raise RuntimeError('no more threads')"
    env = sabotage(tmp_path / "s", f"count > {count}", no_more, "threading.Thread.start")
    result = download(tmp_path, serve(cdn, 9), run=run_process, env=env)
    assert (result.returncode, result.stderr) == (0, "")
    assert_home(tmp_path / "video_outputs", 9)


# Ctrl-C and SIGTERM. Each situation: what the second video's server does meanwhile.

SITUATIONS = {
    "transferring": (signal.SIGINT, Reply(pause_at=BIG // 2)),
    "waiting-for-the-head": (signal.SIGTERM, Reply(wait_s=60)),
    "in-a-back-off": (signal.SIGINT, Reply(status=500, headers={"Retry-After": "50"})),
    "holding-back": (signal.SIGTERM, Reply(status=503, headers={"Retry-After": "50"})),
    "connecting": (signal.SIGINT, None),
    "waiting-for-another-run": (signal.SIGTERM, Reply(wait_s=60)),
}


Stopped = tuple[Cdn, Mapping[str, Path], Mapping[str, subprocess.CompletedProcess[str]]]


@contextlib.contextmanager
def ctrl_c_allowed() -> Iterator[None]:
    """Scripts started by what ignores Ctrl-C, such as nohup, ignore it, too: not here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def stopped_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stopped]:
    """One run a situation, all of them stopped at once; one video is home by then."""
    directories = {name: tmp_path_factory.mktemp(name) for name in SITUATIONS}
    with Cdn() as cdn, deaf_port() as deaf, ctrl_c_allowed():
        for name, (_, reply) in SITUATIONS.items():
            links = [cdn.add(f"{name}/0.mp4", OBJECT), f"{deaf}/1.mp4"]
            if reply:
                links[1] = cdn.add(f"{name}/1.mp4", make_mp4(1, BIG), reply, Reply())
            rows = [make_row(number, video_url=link) for number, link in enumerate(links)]
            write_results(directories[name], rows)
        other = start_script(directories["waiting-for-another-run"])
        processes = {name: start_script(directories[name]) for name in list(SITUATIONS)[:-1]}
        home = directories["waiting-for-another-run"] / "video_outputs" / "picture_0.mp4"
        wait_until(lambda: home.exists() and cdn.asked("waiting-for-another-run/1.mp4"))
        processes["waiting-for-another-run"] = start_script(home.parent.parent)
        for name, (_, reply) in SITUATIONS.items():
            wait_until((directories[name] / "video_outputs" / "picture_0.mp4").exists)
            if reply:
                wait_until(lambda: cdn.asked(f"{name}/1.mp4"))  # noqa: B023
        wait_until(lambda: parts_in(directories["transferring"] / "video_outputs"))
        read_until(processes["waiting-for-another-run"], "Waiting for 1 video")
        since = time.monotonic()
        for name, process in processes.items():
            process.send_signal(SITUATIONS[name][0])
        ends = {name: finish(process) for name, process in processes.items()}
        assert time.monotonic() - since < 3
        other.kill()
        other.communicate()
        yield cdn, directories, ends


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_signal_ends_the_run_with_statistics(stopped_runs: Stopped, name: str) -> None:
    _, directories, ends = stopped_runs
    end = ends[name]
    assert end.returncode == 128 + SITUATIONS[name][0]
    assert re.fullmatch("❌ stopped by SIG[^\n]*", end.stderr.strip())
    home = statistic(end, "Videos downloaded"), statistic(end, "Already existed")
    assert home == ((0, 1) if name == "waiting-for-another-run" else (1, 0))
    assert "picture_1.mp4" not in names_in(directories[name] / "video_outputs")


def test_a_stopped_run_leaves_its_part_and_the_next_resumes_it(stopped_runs: Stopped) -> None:
    cdn, directory = stopped_runs[0], stopped_runs[1]["transferring"]
    output_dir, body = directory / "video_outputs", make_mp4(1, BIG)
    (part,) = parts_in(output_dir).values()
    assert body.startswith(part)
    assert run_script(directory).returncode == 0
    assert [request.range_start for request in cdn.asked("transferring/1.mp4")] == [None, len(part)]
    assert_whole(output_dir, "picture_1", make_task_id(1), body)
    assert len(names_in(output_dir)) == 4


@unix_only
@pytest.mark.parametrize("is_before", [True, False], ids=["imports", "JSON"])
def test_a_signal_before_or_after_the_work_is_no_traceback(tmp_path: Path, is_before: bool) -> None:
    write_results(tmp_path, [])
    act = "os.kill(os.getpid(), signal.SIGTERM); signal.pause()"
    env = sabotage(tmp_path / "s", "count == 1", act, "builtins.print")
    if is_before:
        (tmp_path / "s" / "requests.py").write_text(f"import os, signal; {act}")
    result = run_process(tmp_path, "--json", env=env)
    assert (result.returncode, result.stdout) == (143, "")


PROGRAM = """
import sys
from download_succeeded_videos import VideoDownloader
VideoDownloader("videos").process_polling_results_file(sys.argv[1])
"""


def test_a_program_that_uses_the_class_ends_soon_after_ctrl_c(cdn: Cdn, tmp_path: Path) -> None:
    file = write_results(tmp_path, serve(cdn, 2, Reply(wait_s=60)))
    cdn.replies["/1.mp4"] = [Reply(send=HALF, ending="hang")]
    env = script_environment(PYTHONPATH=str(SCRIPT.parent))
    with ctrl_c_allowed():
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, file], cwd=tmp_path, env=env)
    wait_until(lambda: len(cdn.requests) == 2 and parts_in(tmp_path / "videos"))
    since = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert time.monotonic() - since < 2
    assert len(hidden_in(tmp_path / "videos")) == 1  # no empty one


# The disk.


@pytest.mark.parametrize("at_least", [0, SMALL], ids=["any-file", "a-video"])
def test_a_disk_that_fills_up_ends_the_run(cdn: Cdn, tmp_path: Path, at_least: int) -> None:
    output_dir, rows = tmp_path / "video_outputs", serve(cdn, 7, Reply(wait_s=0.05))
    cdn.replies["/0.mp4"] = [Reply(send=HALF, ending="hang")]
    condition = f"count > 6 and os.fstat(arguments[0]).st_size >= {at_least}"
    env = sabotage(tmp_path / "s", condition, "raise OSError(errno.ENOSPC, '')", "os.fsync")
    result = download(tmp_path, rows, "--workers", "2", run=run_process, env=env)
    assert result.returncode == 1
    assert re.fullmatch("❌ no space left[^\n]*", result.stderr.strip())
    videos = list(output_dir.glob("*.mp4"))
    assert 1 <= len(videos) < 6
    for number in (int(video.stem[-1]) for video in videos):
        assert_whole(output_dir, f"picture_{number}", make_task_id(number), make_mp4(number))
    assert cdn.asked("0.mp4")
    assert len(names_in(output_dir)) == 2 * len(videos)  # no part file either


def test_a_directory_that_cannot_be_written_is_one_clear_line(cdn: Cdn, tmp_path: Path) -> None:
    (tmp_path / "video_outputs").mkdir(mode=0o555)
    write_results(tmp_path, serve(cdn, 2))
    if os.geteuid() == 0 and not shutil.which(ORDINARY_USER[0]):
        pytest.skip("root may write anywhere")
    before = ORDINARY_USER if os.geteuid() == 0 else ()
    result = run_process(tmp_path, before=before)
    assert result.returncode == 1
    assert re.fullmatch("❌ the output directory [^\n]*", result.stderr.strip())
    assert cdn.requests == []


# TLS: a certificate for 127.0.0.1 that no one else trusts, good until 2120.

CERTIFICATE = (
    "MIIBHzCB0qADAgECAgEBMAUGAytlcDAOMQwwCgYDVQQDDANDRE4wIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMD"
    "BaMA4xDDAKBgNVBAMMA0NETjAqMAUGAytlcAMhAHIg2uxCe1SqB9egv89RfNhj4ruUsYSjK3p+6BwFnoQTo1MwUTAPBgNV"
    "HRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIChDAPBgNVHREECDAGhwR/AAABMB0GA1UdDgQWBBTeDrAm2Sy2T15RGA8A+7"
    "gBi0SFDTAFBgMrZXADQQCevKWNT7jJqwzbWu9J/sdHrKl9Ni6lX6uPXBx2UFGRBCuvxDHGR3jFasm6WqOwRZhytTH3v683"
    "xg2ADLbmSm4I"
)
KEY_OF_CERTIFICATE = "MC4CAQAwBQYDK2VwBCIEIJyw1k9R0oyz6P7Gh49P0/fL8sMv1x54glnSulixHxMN"


def make_pem(kind: str, data: str) -> str:
    return ssl.DER_cert_to_PEM_cert(base64.b64decode(data)).replace("CERTIFICATE", kind)


class TlsCdn(Cdn):
    """A `Cdn` that speaks TLS; its certificate is in ``bundle``."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.bundle = directory / "bundle.pem"
        key = make_pem("PRIVATE KEY", KEY_OF_CERTIFICATE)
        self.bundle.write_text(make_pem("CERTIFICATE", CERTIFICATE) + key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.bundle)
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
        assert download(tmp_path, serve(cdn, 20), run=run_process, env=env).returncode == 0
    assert len(cdn.requests) == 20
    assert log.read_text().count("bundle.pem") == 1


# --- The command line: the real script in its own process -------------------------------------

LATEST = "runway_polling_results_20250617_040158.json"
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all but \n
PYTHON = shlex.quote(sys.executable)


def put_video(directory: Path, row: Mapping[str, Any], body: bytes, facts: bool = True) -> Path:
    """A video and its metadata as an earlier run left them; without ``facts`` an old one."""
    video = directory / f"{row['target_filename_stub']}.mp4"
    metadata = make_metadata(row, body if facts else b"")
    lay_out(directory, {video.name: body, f"{video.stem}.json": metadata})
    return video


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """All that is below ``directory``, with sizes and times."""
    paths = [directory, *directory.rglob("*")]
    status = {str(path.relative_to(directory)): path.lstat() for path in paths}
    return {name: (each.st_size, each.st_mtime_ns) for name, each in status.items()}


def read_failures(err: str) -> dict[str, str]:
    """Name → reason, detail and advice, from the groups at the end of a run."""
    found: dict[str, str] = {}
    groups = re.sub(r"\n❌ \d+ of \d+ with a problem, \d+ without\n$", "", err)
    for block in groups.strip("\n").split("\n\n"):
        reason, *names, advice = block.splitlines()
        found |= {line.split()[0]: f"{reason}\n{line}\n{advice}" for line in names}
    return found


# Console: section 6 of the contract


def test_a_big_run_ends_with_its_failures_each_reason_said_once(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 30)
    for number in range(3, 28):
        cdn.add(f"{number}.mp4", b"", Reply(status=403))
    cdn.add("28.mp4", b"<html>")
    del rows[29]["video_url"]
    write_results(tmp_path, rows)
    both = run_process(tmp_path, before=["sh", "-c", '"$@" 2>&1', "sh"]).stdout
    assert both.index("💾 Total storage used") < both.index("❌ 25 videos: ")
    result = run_script(tmp_path)
    assert result.returncode == 3
    counts = "downloaded: 0\n⚠️ Already existed: 3\n❌ Failed downloads: 27\n📈 Success rate: 10.0%"
    assert counts in result.stdout
    assert result.stderr.count("\n\n") == 3
    assert result.stderr.endswith("\n\n❌ 27 of 30 with a problem, 3 without\n")
    nearly_all = figures(total_succeeded=3000, downloaded=2999, failed_downloads=1)
    assert dsv.statistics_lines(nearly_all)[-1] == "📈 Success rate: 99.9%"
    failures = read_failures(result.stderr)
    assert len(failures) == 20 + 1 + 2  # the one that says how many more
    assert re.search(r"❌ 25 videos: .*\n.*HTTP 403", result.stderr)
    assert "\n    … and 5 more\n  → set RUNWAYML_API_SECRET" in result.stderr
    assert re.search("text|HTML", failures["picture_28.mp4"])
    assert "video_url" in failures["picture_29.mp4"]


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
    said = r"❌ 1 video: .*\n    picture_1.mp4 .*HTTP 404.*\n  → .*\n❌ 1 of 2 with a problem, .*\n"
    assert re.fullmatch(said, result.stderr)


def test_what_cannot_be_read_is_said_with_what_would_help(tmp_path: Path) -> None:
    result = run_script(tmp_path, "--output-dir", "elsewhere")
    assert (result.returncode, result.stdout) == (1, "")
    places = ", ".join(str(tmp_path / name) for name in ("", "video_outputs", "elsewhere"))
    said = f"❌ No polling results found in {places} — run the polling step first"
    assert result.stderr.strip().startswith(said)
    assert names_in(tmp_path) == set()
    result = run_script(tmp_path, "missing.json")
    assert result.returncode == 1
    assert "missing.json: cannot be read: No such file" in result.stderr


@pytest.mark.parametrize("way", ["--all", "", "--polling-results-file="])
def test_several_files_are_read_latest_first(tmp_path: Path, cdn: Cdn, way: str) -> None:
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
    arguments = ["--output-dir", "out", *([way] if way == "--all" else map(way.__add__, files))]
    result = run_script(tmp_path, *arguments)
    assert result.returncode == 3
    assert result.stdout.startswith("🔍 Found 4 polling results files\n") == (way == "--all")
    days = re.findall(r"Processing: \w+_2025061(\d)_000000\.json\n", result.stdout)
    assert days == ["4", "3", "2", "1"]
    assert broken.name in result.stderr
    assert not cdn.asked("stale.mp4")
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 3
    assert run_script(tmp_path, *arguments, "--dry-run").returncode == 3


@pytest.mark.parametrize("encoding", ["ascii", "cp1252:strict"])
def test_a_console_without_emoji_will_do(tmp_path: Path, cdn: Cdn, encoding: str) -> None:
    write_results(tmp_path, [row | {"target_filename_stub": "élan☃"} for row in serve(cdn, 1)])
    result = run_process(tmp_path, env={"PYTHONIOENCODING": encoding, "REQUESTS_CA_BUNDLE": ""})
    assert (result.returncode, result.stderr) == (0, "")
    assert "Videos downloaded: 1" in result.stdout
    assert_whole(tmp_path / "video_outputs", "élan☃", make_task_id(0), make_mp4())


NO_CONSOLE = '"$@" >&- 2>&- <&-; echo $? >code', '{ "$@"; echo $? >code; } | head -n 0'


@unix_only
@pytest.mark.parametrize("shell", NO_CONSOLE)
def test_a_console_that_goes_away_costs_no_video(tmp_path: Path, cdn: Cdn, shell: str) -> None:
    write_results(tmp_path, serve(cdn, 1))
    assert run_process(tmp_path, before=["sh", "-c", shell, "sh"]).stderr == ""
    assert (tmp_path / "code").read_text() == "0\n"
    assert_whole(tmp_path / "video_outputs", "picture_0", make_task_id(0), make_mp4())


EVIL = "\x1b]0;owned\x07\x1b[2J\r\x08\x9b31m\u202egnp\x00\ud800\nOWNED"


@pytest.mark.parametrize("mode", [
    (), ("--dry-run",), ("--verify", "--all"), ("--json",), ("--output-dir", "out\x1b[2J\rput"),
], ids=" ".join)  # fmt: skip
def test_no_control_character_is_printed(tmp_path: Path, cdn: Cdn, mode: tuple[str, ...]) -> None:
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
    result = run_script(tmp_path, *mode, "--exec", shlex.join(command), "--gallery")
    shown = result.stdout + result.stderr
    assert len(shown) > 40
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
    widths = [[unicodedata.east_asian_width(char) in "WF" for char in line] for line in cleared]
    assert max(len(wide) + sum(wide) for wide in widths) < columns
    lines = [row[-1] for row in rows]
    assert not [line for line in lines if CONTROL.search(line) or "⏬" in line]
    return process.wait(60), lines, cleared


@unix_only
def test_live_line_counts_fits_and_tells_of_retries(tmp_path: Path, cdn: Cdn) -> None:
    rows, columns = serve(cdn, 4), 72
    slow = cdn.add("4.mp4", make_mp4(4, 400_000), Reply(bytes_per_second=500_000))
    cdn.add("3.mp4", make_mp4(3), Reply(status=500), Reply(wait_s=60))
    for row in rows[:3]:
        put_video(tmp_path / "video_outputs", row, make_mp4())
    write_results(tmp_path, [*rows, make_row(4, video_url=slow)])

    def release(_process: object, shown: str) -> None:
        if re.search("⏬ 4/5  🔁 [^\r]*0.4 MB", shown):
            cdn.released.set()

    exit_code, lines, cleared = run_in_terminal(tmp_path, columns, release)
    assert exit_code == 0
    counted = r"⏬ 3/5  (🔁 [\w ]+  )?0\.\d MB  0\.\d MB/s  [\d:]+[1-9] l"
    assert [line for line in cleared if re.match(counted, line)]
    assert "📥 Videos downloaded: 2" in lines


@unix_only
def test_waiting_is_shown_and_a_signal_ends_line_and_json_well(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1, Reply(wait_s=60)))
    other = start_script(tmp_path, "--json")
    wait_until(lambda: cdn.requests)
    pressed: list[bool] = []

    def interrupt(process: subprocess.Popen[bytes], shown: str) -> None:
        if "  ⏳ Waiting for 1 video that another run" in shown and not pressed:
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


def test_a_copy_of_the_script_breaks_a_long_silence(tmp_path: Path, cdn: Cdn) -> None:
    shutil.copy(SCRIPT, tmp_path / "get.py")
    write_results(tmp_path, serve(cdn, 1, Reply(status=500), Reply(wait_s=10)))
    command = [sys.executable, "-c", "import get; get.SILENCE_S = 0.3; exit(get.main())"]
    how: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "cwd": tmp_path}
    process = subprocess.Popen(command, env=script_environment(), **how)
    log = b""
    for line in process.stdout or ():
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
    counted = figures(total_succeeded=5, downloaded=2, failed_downloads=2, already_exists=1)
    assert (run["exit_code"], run["stats"]) == (3, counted)
    path = os.path.join("video_outputs", "picture_0.mp4")
    assert list(done[0].values()) == [keys[0], "downloaded", path, 100_000, None, None]
    assert (done[1]["size_bytes"], done[1]["error"]) == (len(WEBM), None)
    assert "no MP4" in done[1]["warning"]
    for number, reason in ((2, "HTTP 404"), (3, "video_url")):
        assert (done[number]["status"], done[number]["path"]) == ("failed", None)
        assert reason in done[number]["error"]
    path = os.path.join("video_outputs", "picture_4.mp4")
    assert list(done[4].values()) == [keys[4], "exists", path, 100_000, None, None]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "run again without --verify"),
    "cut": (lambda video: os.truncate(video, 99_990), "99,990 bytes"),
    "empty": (lambda video: os.truncate(video, 0), "0 bytes"),
    "other": (lambda video: video.write_bytes(OTHER), "SHA-256"),
}


def test_verify_names_each_problem_and_what_to_do(tmp_path: Path, cdn: Cdn) -> None:
    for number, (name, (damage, _)) in enumerate(DAMAGES.items()):
        row = make_row(number, target_filename_stub=name)
        damage(put_video(tmp_path / "video_outputs", row, make_mp4(number)))
    old = make_row(8, target_filename_stub="old")
    put_video(tmp_path / "video_outputs", old, make_mp4()[:-100], facts=False)
    whole = make_row(9, target_filename_stub="whole")
    put_video(tmp_path / "video_outputs", whole, make_mp4())
    before = snapshot(tmp_path)
    result = run_script(tmp_path, "--verify")
    assert result.returncode == 3
    said = {f"{name}.mp4": said for name, (_, said) in DAMAGES.items()}
    said |= {"old.mp4": "cut short"}
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
    put_video(videos, rows[1], make_mp4(1), facts=False)
    renamed = put_video(videos, rows[2], make_mp4(2))
    for path in (renamed, renamed.with_suffix(".json")):
        path.rename(videos / f"mine{path.suffix}")
    first, second = (run_script(tmp_path) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0)
    assert "  ⚠️ Kept, though it is no MP4" in first.stdout
    assert "⚠️ 1 video kept, though it is no MP4" in first.stderr
    assert len(cdn.requests) == 1
    lay_out(videos, {"loose.mp4": WHOLE, "odd.mp4": WHOLE, "odd.json": b"{", "queue.json": b"{}"})
    for arguments in ([], ["--all"]):
        result = run_script(tmp_path, "--verify", *arguments)
        assert (result.returncode, result.stderr) == (0, "")
        assert "🔎 Verified: 3 whole, 0 with a problem\n" in result.stdout
        assert {"loose.mp4", "odd.mp4"} <= set(result.stdout.split())


def test_shards_part_the_tasks_by_stub_alone(tmp_path: Path, cdn: Cdn) -> None:
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
    return f"{PYTHON} -IS {shlex.quote(str(script))} {{video}} --with={{metadata}}"


def read_calls(directory: Path) -> list[list[str]]:
    return [json.loads(line) for line in (directory / "calls").read_text().splitlines()]


def test_exec_hands_hostile_names_over_to_the_letter(tmp_path: Path, cdn: Cdn) -> None:
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
    failing = make_recorder(tmp_path, "print('why \x1b[2J https://x/a?secret failed'); sys.exit(7)")
    result = run_script(tmp_path, "--exec", failing)
    assert result.returncode == 3
    failure = read_failures(result.stderr)["picture_2.mp4"]
    said = r"(?s)exit code 7.*why \?\[2J https://x/a failed.*run again with --exec"
    assert re.search(said, failure)
    assert run_script(tmp_path).returncode == 0
    video = run_json(tmp_path, "--exec", failing)["videos"][rows[2]["task_id"]]
    assert video["path"] == os.path.join("video_outputs", "picture_2.mp4")
    assert "exit code 7" in video["error"]
    metadata = [json.loads((videos / "picture_2.json").read_bytes())]
    for _ in range(2):
        assert run_script(tmp_path, "--exec", make_recorder(tmp_path)).returncode == 0
        metadata.append(json.loads((videos / "picture_2.json").read_bytes()))
    last = [list(each.items())[-1] for each in metadata]
    assert last == [("handed_over", done) for done in (False, True, True)]
    assert [Path(call[0]).name for call in read_calls(tmp_path)] == ["picture_2.mp4"] * 3
    assert len(cdn.asked("2.mp4")) == 1


@unix_only
def test_exec_killed_with_the_run_is_done_by_the_next(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1))
    kill = make_recorder(tmp_path, "os.kill(os.getppid(), 9)")
    assert run_process(tmp_path, "--exec", kill).returncode == -signal.SIGKILL
    rename = "[os.rename(p, p.replace('picture', 'sent')) for p in (sys.argv[1], sys.argv[2][7:])]"
    for _ in range(2):
        assert run_script(tmp_path, "--exec", make_recorder(tmp_path, rename)).returncode == 0
    assert len(read_calls(tmp_path)) == 2
    assert len(cdn.requests) == 1


@unix_only
def test_exec_ends_with_the_run_and_the_video_counts(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1))
    end = "signal.signal(15, lambda *_: os.mkdir('ended') or os._exit(0)); os.mkdir('ready')"
    slow = make_recorder(tmp_path, f"import signal, time; {end}; time.sleep(60)")
    with ctrl_c_allowed():
        process = start_script(tmp_path, "--json", "--exec", slow)
    wait_until((tmp_path / "ready").exists)
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert (result.returncode, "not handed over" in result.stderr) == (143, False)
    wait_until((tmp_path / "ended").exists)
    assert json.loads(result.stdout)["stats"] == figures(total_succeeded=1, downloaded=1)
    assert run_script(tmp_path, "--exec", make_recorder(tmp_path)).returncode == 0
    assert len(read_calls(tmp_path)) == 2


@unix_only
def test_exec_that_moves_a_video_away_is_followed_by_no_metadata(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1))
    (tmp_path / "moved").mkdir()
    result = run_script(tmp_path, "--exec", f"mv {{video}} {{metadata}} {tmp_path / 'moved'}")
    assert (result.returncode, result.stderr) == (0, "")
    assert names_in(tmp_path / "video_outputs") == set()
    assert_whole(tmp_path / "moved", "picture_0", make_task_id(0), make_mp4(0))


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
    described = [(row | dict.fromkeys(fields, text), text) for row, text in rows]
    write_results(directory, [row | {"prompt": text + row["video_url"]} for row, text in described])
    result = run_script(directory, "--gallery", "--workers", "1")
    assert (result.returncode, result.stderr) == (0, "")
    return Page(directory / "video_outputs" / "index.html")


HOSTILE = ["</script><img src=x onerror=alert(1)>", "\"'><script>alert(1)</script>",
           "</title></style><!-- &amp; $cards $n %s", "a/b #1 é\u3000\u200d?.mp4"]  # fmt: skip


def test_gallery_shows_each_video_newest_first(tmp_path: Path, cdn: Cdn) -> None:
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


def test_gallery_is_remade_but_another_page_left_alone(tmp_path: Path, cdn: Cdn) -> None:
    make_gallery(tmp_path / "a", cdn, [])
    write_results(tmp_path / "a", serve(cdn, 2))
    assert run_script(tmp_path / "a").returncode == 0
    page = tmp_path / "a" / "video_outputs" / "index.html"
    for suffix in (".mp4", ".json"):
        shutil.copy(page.with_name(f"picture_0{suffix}"), page.with_name(f"copy{suffix}"))
    assert run_script(tmp_path / "a", "--gallery").returncode == 0
    assert [tag for tag, _ in Page(page).elements].count("video") == 3
    page.write_text("<title>mine</title>", encoding="utf-8")
    result = run_script(tmp_path / "a", "--gallery")
    assert page.read_text(encoding="utf-8") == "<title>mine</title>"
    assert "index.html" in result.stdout + result.stderr
    page.unlink()
    page.mkdir()
    result = run_script(tmp_path / "a", "--gallery")
    assert (result.returncode, "left alone" in result.stderr) == (0, True)


# Options, exit codes, layout

REFUSED = {
    "1 to 64": ["--workers 0", "--workers 65", "--workers two", "--workers 1.5"],
    "a number from ": ["--timeout 0", "--timeout -1", "--timeout nan", "--timeout soon"],
    "a whole number from 0 to ": ["--retries -1", "--retries x"],
    "K/N with K from 1 to N": ["--shard 0/4", "--shard 5/4", "--shard 1/0", "--shard x"],
    "no such command": ["--exec ''", "--exec 'no-such-command {video}'"],
    "invalid command value": ['--exec "\'unbalanced {video}"'],
    "{video}": [f"--exec '{PYTHON} {{{word}}}'" for word in ("vid", "video-file", "", " video")],
    "--quiet": ["--quite"],
    "expected one argument": ["--polling-results-file"],
    "only one of FILE": ["--all a.json", "--all --polling-results-file a.json",
                             "a.json --polling-results-file b.json"],
    "not allowed with": ["--dry-run --verify"],
    "--workers": ["--worker 3"],
    "--dry-run": ["--dryrun"],
    "--output-dir": ["--out-dir=x", "--out x"],
    "--gallery": ["a.json --galery"],
    "--zzz": ["--zzz"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"), [(line, said) for said, lines in REFUSED.items() for line in lines]
)
def test_the_impossible_is_refused_with_what_is(tmp_path: Path, line: str, said: str) -> None:
    result = run_script(tmp_path, *shlex.split(line))
    assert (result.returncode, result.stdout) == (2, "")
    assert said in result.stderr.splitlines()[-1].partition("error:")[2]


def test_help_and_version(tmp_path: Path) -> None:
    helped, version = run_process(tmp_path, "--help"), run_script(tmp_path, "--version")
    assert helped.returncode == version.returncode == 0
    table = helped.stdout.partition("exit codes:")[2]
    assert re.findall(r"\n  (\d[\d, ]*?)  ", table) == ["0", "1", "2", "3", "130, 143"]
    assert set(re.findall("--[a-z-]+|examples:|RUNWAYML_API_SECRET", helped.stdout)) == {
        "--polling-results-file", "--all", "--output-dir", "--workers", "--timeout", "--retries",
        "--shard", "--exec", "--gallery", "--dry-run", "--verify", "--quiet", "--json", "--version",
        "--help", "examples:", "RUNWAYML_API_SECRET",
    }  # fmt: skip
    assert version.stdout.split() == ["download_succeeded_videos.py", "2.1.0"]


def test_a_file_as_output_directory_is_one_message(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1))
    (tmp_path / "taken").write_text("mine")
    said = set()
    for mode in ([], ["-q"], ["--json"], ["--dry-run"], ["--verify"], ["--all", "--verify"]):
        result = run_script(tmp_path, "--output-dir", "taken", *mode)
        assert result.returncode == 1
        said.add(result.stderr.splitlines()[-1])
    assert len(said) == 1
    assert said.pop().startswith("❌ the output directory taken cannot be used: ")
    assert "name too long" in run_script(tmp_path, "--output-dir", "x" * 300).stderr
    assert cdn.requests == []


def old_pythons() -> list[str]:
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [
        *map(shutil.which, ("python3.8", "python3.9")),
        *root.glob("versions/3.[89].*/bin/python"),
    ]
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
    others = {"requirements.txt", "README.md", "video_outputs/.gitkeep"}
    assert {name for name in named if name[0] != "."} <= {SCRIPT.name, Path(__file__).name, *others}


# --- The demo ---------------------------------------------------------------------------------

# Dunes, the sea, a balloon: 2 s each, drawn and piped to
# `ffmpeg -f rawvideo -s 320x180 -r 12 -pix_fmt rgb24 -i - -pix_fmt yuv420p -preset placebo -crf 44
# -x264-params psy=0:aq-mode=0:bframes=7:qcomp=.9:chroma-qp-offset=2`, without metadata and SEI.
CLIPS = """
c-rll2{@E%`@r8BBTM$3$Qpy9hU{XpFC9yVN+mR7YwWVi5@SnQB1>k-o}DNnI?<w%ERiCzrznxFn*aOGOed%R`Of*D>-*02|Gw+`
-pf7Db3f1hKKHY~KQ{mXB96X+o-RHfZU6uWpcE98z2C__Zk~#J002Sf=HcN7007R-&lv;!=AoGZ0J?4f20(w`AJ}iLe$=&rKYZX|
yVkzm_NT!7G2c^UpEUowHPA2c$9{g#FAVy*Mph-T7+)VS6~y9ve80Z|wM$QZ7vANDaj^$8B5s%;$G#gBJHV=)tn6~e;Jm-p__<)P
n=P$D-NVq{9fQL{Ht;|<7k5W6!{z5jZgg`uB`}maL5w%nanmrEPJ81-D0#T5kFNs`%-8t%`d~KM<Uxz}52gYd_%*-~%ou(vU@`^m
MQ|<-0VpNK-&+Vi5()fO2CZ~p7=Vd12Jkz9Y59FmbEoMjXi*T*kDZ2jQ2-2}bDk~XFcQ=LvbqYr%;n(gO`TP?C5ixiKEC7`|JFf1
0BQlW1qZUZ9Fppj-)*@lW%Sf~CTfcK2l_WV!OivX@4M@p9oG-`zz^-P{b2v2{u{r7;22K+Fa|zq>I>EdZJt=L7;>%-P#Q4<g%uQN
6|6xK0EHJ69#B}QVgU*}D9ltb*`yl-l+HnUO{zUOrzbr&jY%1*JB{&$cJp30EIEZ9(ak#--0j}>o}RePyMW$>ay;lAy|Li7M(DX=
>_HvIhK-Gak(Oo#?|a-1xj{an{?${6U5o80$$PP<K7BNwj}lWB%dx<joTZ6s<z2B8ZrNsO5~+}9lEqArHP~TL8tW;kd~f;CS5a8w
i+U&SccoH3iO#*R!X_K_=1hii#BX%gEsMXbNNu?^RC6RmjbQ2E8+=Lyr@k09Zg(f{7j}88yT=sWKhm5}GJQ@G+xpo3S<@l$+DA>C
Mp|J}r@ubTRq({D)gjB6MP{$a%m_UW!&)$m&fgoqnq<-k`>=qIKhCK2>DobES)lK3sC&Jf$FA;k4J1ryY869vgnG{_5i@R9x9VYc
F1;`b|NaZZWuXg^A3KoIb6vTiv3uUkVMoJ6zKDCik36*RJkt^Ate~?*6-WY7EaGKozM_i`)4F@J=;-VQQtgCNkyjiwyQb2L*f^J3
SDZ_PO^n~UA8|B#UE(JU-4^sPg7)PqAQ%m;EjnvIlEf;ky)!*L4o+yf<LSd1A{z5~&-7a74k=rKXokk_OE>Xv%maOOo$Agqng?IF
)Q|)e&}oc>ypS7L#07uhmTn7=YxCRl2yAXEj9{N8OM(;TSyZ8m3!UXqPGXgOH_>~2Rqov5<DM$+%gy74xfQ;qX>&cp8`GlQ8$&Ih
Lf7=zY-UgLK|9Y9ofTc6g(!K<zOR(uA}<PIP-z{e7RUDd{4rc$5Ul@juKvqD^J50LiYE`2^{z4KB&@t=)7;uNm}Vcd!8~!h8Q<Mc
doJ5LO^{trp^zWz65s;uZ#1ER!&sigKtCoiof)u?&1YP~yfFf-;e-+H@WhiCkTZg935(*>tdn`r#^wNv(<#N7b0<$^={qfgrHn8_
d#y1E9whjbqIIB*NibLbBv3nm&bn9FGmuO|xL}#4?uMN*a<5~qClbumMjOt)p3?5$fC<^i@oh(bCW&_M?CiMu?%*TI(S{+D6Yb?r
C7xx4oZ<EZNZ4*{@a|(~D$p526Q*iAQSv0Xw}}CC;22=UElTku%F2NX9q62*7@)HmcJvHA6-Hdl>kYtkYi+w%knu3%eKRkQ=YW-M
Qka5c>ac?6Ty>1i>v>NYU$cQz{F#S`9z`VD+4(9h(~;0QLsdq%oylH_NK_|EvXz$4B9@Qh$guXCBYkwXabeHUb74e^+9GRJtxW#y
^jpfA^%cw&3$0l?QmAD?J-CD(XUW@|4I!A8jRs~5Tkw755qzZBKCLFS-102{KrtHnyfC4OF14L%lC7{15fO@;_+Q7Piq1}e+#rWY
h}k-L<<s-IuPTzwPZwO<|Bi+><KZd8JywO~*&iPo5_l4g*M&-Ls)VFk#hv;^$jd@316!hD5{5oef5sfb{}0UJ{%^t@Q-23@B>$7l
Veucv96Sh${3YhNzlk|`|Cl-cj2-^&`hO{l2!p9Pl^@PgZTUCpLYue)PpxO6>WQFi+f?sD<uxb|?P8AKVG*-`5sT2qQCVag$Ra@N
@@3V@1GqNw$)y2|?XdZ_B0jvWt{ZxWIMnOuA(A~3mv`0`pJa(wy#7XIK^$e&h^fo!$$D(6@Jq0?H1_9(m4`9%l{Y63oNoEThw!$f
k%AS+jCmZHqq#m}z59x?P&+HFHve1y{9@g6`|sKo--^1FiZhUpXvd7~WTHu~>aY^B&g<$N<?t&hW9!cg*K$4K50`uH$7YZ4i!@fC
T{G2JbQ9Xey2CI(mY8Jn!rA`LPd7h{s0T7j#V@1{&h5F)lE&n`=EUC+qOi5-3`XcB;^(Gynp>Flo6UDu7+2R~GP>T?&Rbg^j*sS0
ywR4U`k*KL2~Ym6#LDHBEjCS~ET=-4LkN6fZi_V9UxL!g(;}ebWJ<;o#;Vm6=Ej>v0n0pUe%A!?Q`ZIsY{O(k-k|*B*JI3g<}chW
2<DlO87brQS3PTF%IxlFm4p4|V9L;yqxPn_S*+oM=VDdY$zKJCRe0Nk$3P_(ouz{$vClUbaR^I@534i^KY!4ZsK}Ey;V+7gmVa~4
DuVx>K5`si7MOo`^{OU|g?yTFd2_Dv;ODj0wZpyA=Wt5e0{ePe8YEP38(X>kyjbhlFQS5Co;clitE8WZ8Id!ZlpDZ}4CZ>-sxW1o
t~zKn!!X+NN#wAueE*v4tiuF8W}*E&bT@LL2@c%C^f?p3k_`BWr*t9*N4y~L<%SU=F2<ASYeqO28|8ly5BGgZYlfwaB=Wi}_4@{n
BwC{9nE{F2{XvJ2&(C9Mv>=}Np<}vkazl+bTI<ps8AT7(j5h~qDl05g))s2sC&@l~z=^uH#0)bO2Zne@wL-nTj^9g{<g^dfLk2RJ
2He2dIc+VmDCo4|PwruqAL^@7wRLOO{5U8qk2l!wZltoKTI+?n=FX4PpFXK4-|QWKv|ex+q8NS<jZh#OG1V#Cdhd&hk?o;dbrd-1
Y4DcP>pKk)a%fYO_FqXL62u)cazH~6Nse{W;HMpi%kY&~Zm=V~>DtqpcPFdjY~yU6{M`NexPXe4o}pB3!r2{~qxF$?+p=5UIB4iw
2eP(4Z5lhe`!Z98z@(Pxxw`y(kD8ec0p9&vRm<0NI9pC|n2da62%9W#7Od?E<uJvs%C9RjC#RmznLfiyS%xW)R-{NfL{Wv8JVTo#
a>CRp3_uI^8)jt0O$Dc4J03@2rRTzo4Q%Y}EC)2+28;y)N(oQ5PgO-&B)ZZ?6cM)V+ILg?MWoo!VzbAy#UmQGY6Rokx49bRj+ZxD
zox%@S3yCo<&xuyduYUj8_|Smu(?iuilG#zIDF8Rm*?H{0s2U3r*Y02d6dI)dISBGz#`3MYtNq!nI#6=bya>SY&j}O5Pb~Y{bbrw
lOiz+R-Vb^s{LSA;=FvPAe_=^gH2Pv3Bs^c2;(Mg)g8k2TUAVm4;2-umOi}dqpY3heG(va5xgS^th}5zQY+`!_ZSW)>?YP`3i5qe
epzzsN+zw1i(<tLec%~Jb;+wn<ts)?k19PXTWw`541CHo#FQ^uVUpSVp#Su~G1``~(CgM2@!>ym+VSt4##nuNCNnJS$UO^Zq-X&x
T$tTUy86XYJSIn-E?6vmq{~t+bmi9cMKPncbgQ@JMY1>UD+TP|F2pq}#FGVg?s|KTIrD=xU1#N)E@?fj6%RB6bl<a3SdNF|m5z?_
|B2`R8$<eU4C$ZZIrbTf{9Q4m-|!UtyB*tKj2Zn|{U7@MtK0^~eUzv%BqJ(wK@Dm_|ExjZed_zrZEHZyb5eCxYMz~1u11YP?WU%j
e`gFSlFDuR<QUTSBdgi27-BfI5x6tt!+eg55PZtMR?kmzk-h|mMkz%X_c`3HU7W2Vh3#H%zrwJ^#O_gatMbnIxqXd3S;IgtK<_^f
_ozk@)bo3@ev*02fT3@=t8ycKjIOL_`t+qLI79KBY(cJNp#*WF4$9Mj_Q^%7XdMkyp=MCf-ihh{D_sd|@8d%<xmK?~hw;WJ?cXxF
TF|Fv47cKCsT1x_h`b+Z(*Gpw=2*(O{HL`u-LFqxs<snbJ&{eYcM?_av3(}<X8DU*$%{<m+!IaPJ#Oovyz!A^qq2)FA>vv&Rd>3d
xmX8xs;jB`uMBtO_atM7#$5~7U=>U0Y1gqxH$-zTkK&BM=|MJ`iW6Nep&K`3^sFjS^}LK<xlDPr_IM>JbM|XlmACNT3^sjh*Yt3D
hUgXEmMq=|&N2;69XPWnGU7=c@zS(ESM!EvEGTV#_Dj!1DUi-l<TlhWhW?s&yRNw@TK9f$W5)((y^EXn4?!nAbk_b760#ko82Nfk
FM_u?89_MNBfw(pcBF1i<PpbqJU(b>2U@?rNb=A$+fLLHx252<%mM`C^5QF1SI1LnJh%5YwL#w^G{HWNoBAzc0s%`|mc%UojAy9@
3VEWl&XO66Z{|~^nb&i|l&4WrYMevy!UxyA&Wnm&k4L`xrff5gJe%hpetw12ZhINOJhJQK(s~ATE$u~T<rgm1CzGVSEag_Djo|1q
9I@)v*e*wU9mcouU8PZR37-n8iA~!F%S!i-`mr28(-(Fdy0Oq%9m0j>7f8rdg2>vIQ!_8mRUL1YYjIuDmAl}tYhO#m`)VSeWh!;i
Vhbg59CHk%tLh$xnT2h9uuq^Bbs4T7Jb%NloxX~KHxnFCFb45;^;Xj>?h1XSow?9af)NoQ4)840)Ti_vh#P7@4i@U5v*~v94Csa-
FGeP`*x(0<uF5oDEF|+io^oM?>JP$!Epg%#V<hbZk;7@`H2y#Y_u$SKc-Ofg*@0BA1AL<GA>m}7L`jZLHF*+Zg7B=OSD-04c@VnG
Sz$!I^mr02Bd4|XUYFQFN;mYW-5}(6h{A<GkS8wNhzy3(*CG@0ZQjSLymg2jD6t$bWHY?M9&2`a2VcdKDi0mo_NA*4?_%eVh`-#r
R0BCc6P-CAmV?iwUo2RMZhmGMF$VMr|Ck1kvFL?52P4LU9wnuZ7OiUt*m@gu?Agx%-A(B1cnIo{uSn80mU0QPXJs@UO#4>!xDsS{
8>l|;Fdu)%Gtx&&oDHm=2)ZrF)p2<`gO!aOvLu$K7?a>O{ukbZ>P~caS>aMc!6Df<0asU&%wHsY4z?-Y>-;Hn%x@-I1ewU&;(|I9
BJ|LyI06bEZbcJ2Q#xgoS}B|cPSPC6D@?BjKeKMM-HiAjOy<1<
"""


def demo_clips() -> list[bytes]:
    """Return three small MP4 files (H.264, 320x180) that any browser plays."""
    clips = zlib.decompress(base64.b85decode("".join(CLIPS.split())))
    start = b"\0\0\0 ftyp"
    return [start + rest for rest in clips.split(start)[1:]]


DEMO_VIDEOS = [  # name, theme, prompt, clip
    ("aurora_sky", "night", "green aurora over a frozen lake", 0),  # its link is dead
    ("desert_dunes", "land", "low sun over the dunes, the camera drifts slowly", 0),
    ("morning_balloon", "air", "a hot-air balloon rises over green hills", 2),
    ("quiet_sea", "water", "sunset at sea, gentle waves, warm light", 1),
    ("morning_balloon", "air", "a hot-air balloon rises over green hills, second take", 2),
]


def make_demo(cdn: Cdn, bytes_per_second: float) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The rows that the poller leaves of a night, and the videos of those that SUCCEEDED."""
    slow = Reply(bytes_per_second=bytes_per_second)
    faults = {
        "aurora_sky": [Reply(status=403, body=b"<Error>AccessDenied</Error>")],
        "quiet_sea": [Reply(send=550_000, bytes_per_second=bytes_per_second), slow],
        "desert_dunes": [Reply(status=503, body=b"", headers={"Retry-After": "1"}), slow],
    }
    now, clips = datetime.now(), demo_clips()
    times = {"timestamp": now.isoformat(), "completion_time": now.isoformat()}
    rows, bodies = [], []
    for number, (name, theme, prompt, clip) in enumerate(DEMO_VIDEOS):
        bodies.append(clips[clip] + box(b"free", bytes(750_000 + 90_000 * (number * 3 % 5))))
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
    gallery = home / "video_outputs" / "index.html"
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
    if exit_code != 3:
        return exit_code
    print("\nExit code 3 as planned: one link was dead. A rerun would ask for that alone.")
    print(f"Now open the gallery: {gallery.as_uri()}")
    return 0


def test_demo_leaves_videos_and_a_page(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Cdn() as cdn:
        _, bodies = make_demo(cdn, 0)
    names = [f"{name}_video" for name, *_ in DEMO_VIDEOS]
    names[4] += f"_{make_task_id(4)[:8]}"
    videos = tmp_path / "video_outputs"
    for new, old, said in ((4, 0, "Resumed at 0.5"), (0, 4, "an earlier demo")):
        assert demo(tmp_path, bytes_per_second=1e8) == 0
        out, err = capfd.readouterr()
        assert f"downloaded: {new}\n⚠️ Already existed: {old}\n❌ Failed downloads: 1\n" in out
        assert "1 FAILED, 1 CANCELLED, 1 still running" in out
        assert said in out
        assert {"403", "expired", "RUNWAYML_API_SECRET"} <= set(re.findall(r"\w+", err))
        for number in range(1, 5):
            assert_whole(videos, names[number], make_task_id(number), bodies[number])
        files = {f"{name}{suffix}" for name in names[1:] for suffix in (".mp4", ".json")}
        assert names_in(videos) == files | {"index.html"}
        assert (videos / "index.html").as_uri() in out


def main(arguments: list[str]) -> int:
    if arguments != ["--demo"]:
        return int(pytest.main([__file__, *arguments]))
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the script
    return demo(SCRIPT.parent, bytes_per_second=400_000)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
