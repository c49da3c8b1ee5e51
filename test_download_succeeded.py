#!/usr/bin/env python3
"""Tests of download_succeeded_videos.py, in the order of the script; command line last.

``python test_download_succeeded.py`` or ``pytest`` runs them all;
``python test_download_succeeded.py --demo`` shows the main job without a Runway account.

Whatever the network can do is done by `Cdn`, a real server on the loopback address; the
processes, kills and full disks are real as well.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

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
        self.released = threading.Event()  # ends what hangs
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
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


def run_script(
    directory: Path, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The real script in its own process, in ``directory``, to its end."""
    process = start_script(directory, *arguments, env=env)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_script(
    directory: Path, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RUNWAYML_")}
    environment |= {"PYTHONIOENCODING": "utf-8", "NO_PROXY": "*"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=directory,
        env=environment | dict(env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


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
