#!/usr/bin/env python3
"""Tests of download_succeeded_videos.py, in the order of the script; command line last.

    python test_download_succeeded.py           run all of them, as `pytest` does
    python test_download_succeeded.py -k NAME   options go to pytest
    python test_download_succeeded.py --demo    show the main job without a Runway account

Whatever the network can do is done by real servers on the loopback address (`Cdn`, `RawServer`,
`RunwayApi`); kills and several runs are real processes; what a file system can do wrong is done
by `fault`. A table of replies is a list of `Case`, which `run_cases` serves in one run.

Section of the contract, what it promises, and the test where that begins; others follow it.

    2  shapes, statuses, facts of a row  test_runways_own_answers_are_read
    2  which files are read, also -      test_files_are_searched_or_named
    2  a task in several rows            test_a_task_in_several_rows_counts_once
    2  broken files                      test_a_broken_results_file_gets_one_line
    2  odd rows, odd links               test_odd_rows_are_named_and_the_good_ones_served
    2  tasks that polling gave up on     test_what_became_of_a_task_that_polling_gave_up_on
    3  names (143 bytes), namesakes      test_an_ordinary_stub_is_used_to_the_letter
    3  what is there is not overwritten  test_a_run_goes_by_what_lies_in_the_directory
    3  what cannot be read               test_one_read_error_costs_no_name
    3  what others do meanwhile          test_what_others_do_makes_no_wrong_file
    4  a kill costs nothing              test_a_kill_before_any_step_costs_nothing
    4  disks without links, fsync, …     test_all_come_home_on_any_disk
    4  a full disk                       test_a_full_disk_ends_the_run_with_one_clear_line
    4  nothing stays hidden              test_a_leftover_stays_for_7_days
    4  several runs at once              test_four_runs_share_the_work
    4  retry                             test_a_reply_is_asked_for_again_if_that_may_help
    4  what is a video                   test_the_bytes_decide_what_is_kept
    4  resume, refused ranges            test_a_cut_video_is_resumed_and_never_stitched
    4  stall, what has no end            test_a_silent_server_is_a_stall
    4  requests, redirects, passwords    test_a_picky_cdn_serves_us_as_it_serves_requests
    4  waits, tries, pressure            test_a_fault_uses_up_a_try
    4  few descriptors, few threads      test_few_descriptors_mean_fewer_workers
    4  Ctrl-C, SIGTERM, SIGHUP           test_a_signal_ends_the_run_with_its_statistics
    4  links that die, secrets           test_a_dead_or_missing_link_is_renewed_once
    5  metadata                          test_metadata_is_exact
    6  blame: TLS, proxies               test_a_bad_certificate_fails_at_once_and_is_told_as_it_is
    6  console, verdict, quiet           test_one_video_is_told_as_the_guide_shows_it
    6  live line, pipes, control chars   test_the_live_line_counts_fits_and_is_cleared
    7  the orchestrator's calls          test_the_orchestrators_calls_work_to_the_letter
    7  callbacks                         test_each_outcome_is_told_once_in_the_calling_thread
    7  pools, subclasses, threads        test_a_pool_brings_61_tasks_over_21_stubs_home
    8  options, help, --only, --shard    test_the_impossible_is_refused_with_what_is_possible
    8  --dry-run, --json, --verify       test_dry_run_says_names_and_expiry_and_touches_nothing
    8  --exec (hand-over)                test_words_reach_the_command_to_the_letter_without_a_shell
    8  --gallery                         test_the_page_shows_each_video_newest_first_with_its_facts
    9  layout, packages, Python, README  test_the_top_level_holds_five_entries
    9  the demo                          test_the_demo_brings_everything_home
"""

from __future__ import annotations

import ast
import atexit
import base64
import builtins
import contextlib
import errno
import faulthandler
import fnmatch
import functools
import gc
import gzip
import hashlib
import http.client
import importlib
import inspect
import io
import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
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
import urllib.parse
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import requests
import responses
from packaging.requirements import Requirement
from requests.structures import CaseInsensitiveDict

import download_succeeded_videos as dsv

SCRIPT = Path(dsv.__file__).resolve()

# --- Helpers: whole MP4s, rows, results files -----------------------------------------------------

VIDEO_BYTES = 100_000
HALF = VIDEO_BYTES // 2
BIG = 900_000  # bytes, as real ones are: a small video says little about what is buffered
SMALL = 2_500  # bytes, where the size is all the same
API_KEY = "key_secret_0123456789abcdef"
SECRETS = re.compile(r"_jwt|eyJ|secret", re.IGNORECASE)  # what queries and the API key hold
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all but \n
LATEST = "runway_polling_results_20250617_040158.json"
PYTHON = shlex.quote(sys.executable)
unix_only = pytest.mark.skipif(os.name != "posix", reason="needs a Unix shell, terminal or pipe")


def box(kind: bytes, payload: bytes = b"", size: int | None = None) -> bytes:
    """One box of an MP4; ``size`` is what it says of itself, if not the truth."""
    told = 8 + len(payload) if size is None else size
    return struct.pack(">I4s", told, kind) + payload


def make_mp4(seed: object = 0, size: int = VIDEO_BYTES) -> bytes:
    """The boxes of an MP4, ``size`` bytes in all; another ``seed`` makes other bytes."""
    picture = random.Random(str(seed)).randbytes(size - 48)
    start = box(b"ftyp", b"isom\0\0\2\0") + box(b"moov", bytes(8))
    return start + box(b"mdat", picture) + box(b"free")


OBJECT = make_mp4("object")
OTHER = make_mp4("other")
WHOLE = make_mp4(0, SMALL)
WEBM = b"\x1aE\xdf\xa3\x9fB\x86\x81\1B\xf7\x81\1B\xf2\x81\4B\xf3\x81\x08B\x82\x84webm" * 99


def make_jwt_link(base: str, expires: float) -> str:
    """``base`` signed as Runway's CDN links are; ``expires`` in Unix seconds."""
    claims = json.dumps({"exp": expires}).encode()
    payload = base64.urlsafe_b64encode(claims).decode().rstrip("=")
    return f"{base}?_jwt=eyJhbGciOiJIUzI1NiJ9.{payload}.c2VjcmV0LXNpZ25hdHVyZQ"


def make_task_id(number: int) -> str:
    start = hashlib.md5(str(number).encode()).hexdigest()[:8]
    return f"{start}-0000-4000-8000-{number:012}"


def make_row(number: int = 0, **overrides: Any) -> dict[str, Any]:
    """A SUCCEEDED row as the poller writes it; ``None`` leaves a field out."""
    row: dict[str, Any] = {
        "task_id": make_task_id(number),
        "image_path": f"video_queue/picture_{number}_draft.png",
        "prompt": "soft focus transition, élégant reveal",
        "target_filename_stub": f"picture_{number}",
        "timestamp": "2025-06-17T03:48:46.656953",
        "status": "PENDING",
        "final_status": "SUCCEEDED",
        "completion_time": "2025-06-17T04:00:58.870095",
        "video_url": f"https://cdn.invalid/{number}.mp4?_jwt=secret",
    }
    row |= overrides
    return {key: value for key, value in row.items() if value is not None}


def make_answer(task_id: str, *links: str, **overrides: Any) -> dict[str, Any]:
    """Runway's own answer about a task that SUCCEEDED; ``None`` leaves a field out."""
    answer = {
        "id": task_id,
        "status": "SUCCEEDED",
        "createdAt": "2025-06-17T03:48:46.656Z",
        "output": list(links),
    }
    answer |= overrides
    return {key: value for key, value in answer.items() if value is not None}


def days_ago(days: float) -> datetime:
    """Naive local time, as the poller writes it."""
    return datetime.now() - timedelta(days=days)


def stamp(days: float = 0) -> str:
    """The time ``days`` ago, as the names of results files hold it."""
    return days_ago(days).strftime("%Y%m%d_%H%M%S")


def make_unfinished(number: int = 0, days: float = 0.1, **overrides: Any) -> dict[str, Any]:
    """A row of a task, submitted ``days`` ago, that polling gave up on."""
    fields: dict[str, Any] = dict.fromkeys(("final_status", "completion_time", "video_url"))
    fields["timestamp"] = days_ago(days).isoformat()
    return make_row(number, **fields | overrides)


def write_results(directory: Path, rows: Iterable[Any], when: str = "20250617_040158") -> Path:
    """A results file in ``directory``, named for the time ``when``."""
    path = directory / f"runway_polling_results_{when}.json"
    document = {"polling_stats": {}, "task_results": list(rows), "generated_at": "2025-06-17"}
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


# --- Helpers: a CDN that does what it is told -----------------------------------------------------


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


GOOD = Reply()
CUT = Reply(send=HALF)
CHUNKED = Reply(framing="chunked")


def refusal(code: int, retry_after: str | None = None) -> Reply:
    return Reply(status=code, body=b"no", headers={"Retry-After": retry_after})


def statuses(*codes: int) -> dict[str, Reply]:
    return {f"status {code}": refusal(code) for code in codes}


def cut(reply: Reply) -> Reply:
    return replace(reply, send=HALF)


def headed(name: str, value: str | None, **how: Any) -> Reply:
    return Reply(headers={name: value}, **how)


@dataclass(frozen=True)
class Request:
    path: str  # without the query
    headers: Mapping[str, str]  # in any case
    client: tuple[str, int]  # the connection it came by
    at: float  # by the monotonic clock
    target: str  # as it was sent, query and all

    @property
    def range_start(self) -> int | None:
        """Where the asked range begins; None if the whole object was asked for."""
        value = self.headers.get("Range")
        if value is None:
            return None
        return int(value.removeprefix("bytes=").removesuffix("-"))


def make_etag(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what many tests are about."""


class Cdn:
    """Serves objects on the loopback address and remembers every request."""

    def __init__(self, certificate: Path | None = None) -> None:
        """With ``certificate``, a file of `write_certificate`, it speaks TLS."""
        self.objects: dict[str, bytes] = {}
        self.replies: dict[str, Sequence[Reply]] = {}
        self.requests: list[Request] = []
        self.released = threading.Event()  # ends what hangs
        self._lock = threading.Lock()
        self._counts = Counter[str]()
        self._scheme = "https" if certificate else "http"

        handler = type("Handler", (_CdnHandler,), {"cdn": self})
        self._server = _QuietServer(("127.0.0.1", 0), handler)
        if certificate:
            context = server_context(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_port}"

    def add(self, name: str, body: bytes, *replies: Reply) -> str:
        """Serve ``body`` as ``name`` with ``replies`` in turn, the last one stays; its link."""
        self.objects[f"/{name}"] = body
        self.replies[f"/{name}"] = replies or (GOOD,)
        return f"{self.url}/{name}?_jwt=secret.{name}"

    def asked(self, name: str) -> list[Request]:
        """The requests for what `add` serves as ``name``."""
        return [request for request in self.requests if request.path == f"/{name}"]

    def next_reply(self, request: Request) -> Reply | None:
        with self._lock:
            self.requests.append(request)
            number = self._counts[request.path]
            self._counts[request.path] += 1
        replies = self.replies.get(request.path)
        if not replies:
            return None
        return replies[min(number, len(replies) - 1)]

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


class _CdnHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cdn: Cdn

    def log_message(self, *_: Any) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        headers = CaseInsensitiveDict(self.headers.items())
        request = Request(path, headers, self.client_address, time.monotonic(), self.path)
        reply = self.cdn.next_reply(request)
        if reply is None:
            self.send_error(404)
            return
        self.cdn.released.wait(reply.wait_s)
        whole = self.cdn.objects[path] if reply.body is None else reply.body
        status, told, body = self._select(reply, whole)
        try:
            self._send_head(reply, status, told, len(body))
            self._send_body(reply, body)
        except OSError:
            self.close_connection = True

    def _select(self, reply: Reply, whole: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and bytes of the answer, ranges considered (RFC 9110, 14)."""
        told = {"Content-Type": "video/mp4", "ETag": make_etag(whole)}
        asked = self.headers.get("Range")
        if (
            reply.status != 200
            or not asked
            or not reply.ranges
            or not self._is_current(reply, told)
        ):
            return reply.status, told, whole
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(whole):
            return 416, told | {"Content-Range": f"bytes */{len(whole)}"}, b""
        told["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        return 206, told, whole[start:]

    def _is_current(self, reply: Reply, told: Mapping[str, str]) -> bool:
        """Whether the object is still the one that If-Range names."""
        condition = self.headers.get("If-Range")
        if condition is None or not reply.if_range:
            return True
        validators = {**told, **reply.headers}
        return condition in (validators["ETag"], validators.get("Last-Modified"))

    def _send_head(self, reply: Reply, status: int, told: dict[str, str], length: int) -> None:
        if reply.framing == "chunked":
            told["Transfer-Encoding"] = "chunked"
        elif reply.framing == "close":
            told["Connection"] = "close"
        else:
            told["Content-Length"] = str(length)
        self.send_response(status)
        for name, value in {**told, **reply.headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()

    def _send_body(self, reply: Reply, body: bytes) -> None:
        is_chunked = reply.framing == "chunked"
        for piece in self._pieces(reply, body[: reply.send]):
            if is_chunked:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            else:
                self.wfile.write(piece)
        if reply.send is not None:
            self._break_off(reply.ending)
        elif is_chunked:
            self.wfile.write(b"0\r\n\r\n")
        elif reply.framing == "close":
            self.close_connection = True

    def _pieces(self, reply: Reply, body: bytes) -> Iterator[bytes]:
        """Yield what goes out at once, and wait in between."""
        size = reply.pause_at or 65536
        if reply.bytes_per_second is not None:
            size = max(1, int(reply.bytes_per_second / 20))
        for start in range(0, len(body), size):
            if start == reply.pause_at:
                self.cdn.released.wait(60)
            yield body[start : start + size]
            if reply.bytes_per_second is not None:
                self.cdn.released.wait(0.05)

    def _break_off(self, ending: str) -> None:
        self.close_connection = True
        if ending == "hang":
            self.cdn.released.wait(60)
        if ending == "reset":
            reset(self.connection)


def reset(connection: socket.socket) -> None:
    """Close ``connection`` with a reset instead of an end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def serve(cdn: Cdn, count: int, *replies: Reply, size: int = VIDEO_BYTES) -> list[dict[str, Any]]:
    """The rows of ``count`` tasks whose videos, ``make_mp4(number, size)``, are on ``cdn``."""
    rows = []
    for number in range(count):
        link = cdn.add(f"{number}.mp4", make_mp4(number, size), *replies)
        rows.append(make_row(number, video_url=link))
    return rows


@pytest.fixture
def cdn() -> Iterator[Cdn]:
    with Cdn() as server:
        yield server


# --- Helpers: certificates, a Runway API, a server for bare bytes ---------------------------------

# Of one key, signed by themselves. What makes them: https://cryptography.io, x509.
CERTIFICATES = {
    "good": (  # for 127.0.0.1, until 2120
        "MIIBHDCBz6ADAgECAgEBMAUGAytlcDAOMQwwCgYDVQQDDANDRE4wIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMD"
        "EwMDAwMDBaMA4xDDAKBgNVBAMMA0NETjAqMAUGAytlcAMhAHIg2uxCe1SqB9egv89RfNhj4ruUsYSjK3p+6BwF"
        "noQTo1AwTjAPBgNVHRMBAf8EBTADAQH/MAsGA1UdDwQEAwIChDAPBgNVHREECDAGhwR/AAABMB0GA1UdDgQWBB"
        "TeDrAm2Sy2T15RGA8A+7gBi0SFDTAFBgMrZXADQQAxuzqqrA82a8A3nTDIQp4qtnmX+iRViy2WaYervGOrCuTK"
        "25Abz7TuxvWCnij/suk3YWa8Lr0pibmpTDtnhYkB"
    ),
    "expired": (  # in 2001
        "MIIBGjCBzaADAgECAgEBMAUGAytlcDAOMQwwCgYDVQQDDANDRE4wHhcNMDAwMTAxMDAwMDAwWhcNMDEwMTAxMD"
        "AwMDAwWjAOMQwwCgYDVQQDDANDRE4wKjAFBgMrZXADIQByINrsQntUqgfXoL/PUXzYY+K7lLGEoyt6fugcBZ6E"
        "E6NQME4wDwYDVR0TAQH/BAUwAwEB/zALBgNVHQ8EBAMCAoQwDwYDVR0RBAgwBocEfwAAATAdBgNVHQ4EFgQU3g"
        "6wJtkstk9eURgPAPu4AYtEhQ0wBQYDK2VwA0EApLhHyItJvJhvcZneSdfsthCnJO/AuUr0tItB8AhsRtnlqWmi"
        "Fyg+nuWM4HrPJj/sjmztaad6FygcrzTYLa0JDw=="
    ),
    "not yet valid": (  # before 2110
        "MIIBHjCB0aADAgECAgEBMAUGAytlcDAOMQwwCgYDVQQDDANDRE4wIhgPMjExMDAxMDEwMDAwMDBaGA8yMTIwMD"
        "EwMTAwMDAwMFowDjEMMAoGA1UEAwwDQ0ROMCowBQYDK2VwAyEAciDa7EJ7VKoH16C/z1F82GPiu5SxhKMren7o"
        "HAWehBOjUDBOMA8GA1UdEwEB/wQFMAMBAf8wCwYDVR0PBAQDAgKEMA8GA1UdEQQIMAaHBH8AAAEwHQYDVR0OBB"
        "YEFN4OsCbZLLZPXlEYDwD7uAGLRIUNMAUGAytlcANBAPIVNocfxcsW0jZWGbAoqEhwZdxS9DNSKIJnzoMPd1bP"
        "3ALKhQUGa0EFXUVVia8xw/Npwdbf3fUrnkzqtd5UVQc="
    ),
    "another host": (  # for cdn.invalid
        "MIIBIzCB1qADAgECAgEBMAUGAytlcDAOMQwwCgYDVQQDDANDRE4wIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMD"
        "EwMDAwMDBaMA4xDDAKBgNVBAMMA0NETjAqMAUGAytlcAMhAHIg2uxCe1SqB9egv89RfNhj4ruUsYSjK3p+6BwF"
        "noQTo1cwVTAPBgNVHRMBAf8EBTADAQH/MAsGA1UdDwQEAwIChDAWBgNVHREEDzANggtjZG4uaW52YWxpZDAdBg"
        "NVHQ4EFgQU3g6wJtkstk9eURgPAPu4AYtEhQ0wBQYDK2VwA0EAcZRkNz4CnTYAmA3nCiTM2XnSSgjqJLEOcdLt"
        "kJc0jFtkP+Mlf+Vj+Yii78U+fuMuXsGbnOszukCWskBCa/f3Cw=="
    ),
}
KEY_OF_CERTIFICATES = "MC4CAQAwBQYDK2VwBCIEIJyw1k9R0oyz6P7Gh49P0/fL8sMv1x54glnSulixHxMN"


def make_pem(kind: str, data: str) -> str:
    return ssl.DER_cert_to_PEM_cert(base64.b64decode(data)).replace("CERTIFICATE", kind)


def write_certificate(directory: Path, which: str = "good") -> Path:
    """A file with a certificate of `CERTIFICATES` and its key; also a CA bundle that trusts it."""
    path = directory / f"{which.replace(' ', '-')}.pem"
    certificate = make_pem("CERTIFICATE", CERTIFICATES[which])
    path.write_text(certificate + make_pem("PRIVATE KEY", KEY_OF_CERTIFICATES))
    return path


def server_context(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


class RunwayApi(Cdn):
    """Answers ``GET /v1/tasks/<id>``: 404 but for the tasks that it was told of."""

    @property
    def env(self) -> dict[str, str]:
        """What has the script ask here."""
        return {"RUNWAYML_API_SECRET": API_KEY, "RUNWAYML_BASE_URL": self.url}

    def answer(self, task_id: str, *answers: Reply | object) -> None:
        """Give ``answers`` in turn: each a `Reply`, or what JSON holds, such as `make_answer`."""
        replies = [self._as_reply(answer) for answer in answers]
        self.replies[f"/v1/tasks/{task_id}"] = replies
        self.objects[f"/v1/tasks/{task_id}"] = b""

    @staticmethod
    def _as_reply(answer: Reply | object) -> Reply:
        if isinstance(answer, Reply):
            return answer
        return headed("Content-Type", "application/json", body=json.dumps(answer).encode())

    def asked(self, name: str) -> list[Request]:
        """The requests for the task with the id ``name``."""
        return super().asked(f"v1/tasks/{name}")


@pytest.fixture
def api() -> Iterator[RunwayApi]:
    with RunwayApi() as server:
        yield server


def tell(
    api: RunwayApi, task_id: str, link: str, answers: Sequence[Reply | dict[str, Any]]
) -> None:
    """Have ``api`` give ``answers`` in turn; a dict is what differs from a good answer."""
    given: list[object] = []
    for answer in answers:
        if isinstance(answer, dict):
            given.append(make_answer(task_id, link) | answer)
        else:
            given.append(answer)
    api.answer(task_id, *given)


# What a `RawServer` does: (connection, path, headers, how often the path was asked for, from 1);
# True keeps the connection for another request.
RawHandler = Callable[[socket.socket, str, Mapping[str, str], int], Any]


def raw_answer(body: bytes = b"", status: str = "200 OK", **headers: object) -> bytes:
    """The bytes of an answer; ``Content_Length=None`` leaves that header out."""
    told: dict[str, object] = {"Content_Type": "video/mp4", "Content_Length": len(body)}
    told |= headers
    lines = [f"HTTP/1.1 {status}"]
    for name, value in told.items():
        if value is not None:
            lines.append(f"{name.replace('_', '-')}: {value}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class RawServer:
    """Answers each request by a function that writes to the connection what it likes."""

    def __init__(self, handler: RawHandler, certificate: Path | None = None) -> None:
        self.requests: list[Request] = []
        self.released = threading.Event()  # for handlers that hang: ``released.wait(60)``
        self._handler = handler
        self._context = server_context(certificate) if certificate else None
        self._lock = threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        scheme = "https" if self._context else "http"
        return f"{scheme}://127.0.0.1:{self._socket.getsockname()[1]}"

    def link(self, name: str) -> str:
        return f"{self.url}/{name}?_jwt=secret.{name}"

    def asked(self, name: str) -> list[Request]:
        return [request for request in self.requests if request.path == f"/{name}"]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, client = self._socket.accept()
                serve_it = functools.partial(self._serve, connection, client)
                threading.Thread(target=serve_it, daemon=True).start()

    def _serve(self, connection: socket.socket, client: tuple[str, int]) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException), connection:
            if self._context:
                connection = self._context.wrap_socket(connection, server_side=True)
            with connection, connection.makefile("rb") as requests_sent:
                while request := self._read_request(requests_sent, client):
                    number = len(self.asked(request.path.removeprefix("/")))
                    if not self._handler(connection, request.path, request.headers, number):
                        break

    def _read_request(self, requests_sent: Any, client: tuple[str, int]) -> Request | None:
        words = requests_sent.readline().decode("latin-1").split()
        if len(words) < 2:
            return None
        target = words[1]
        headers = CaseInsensitiveDict(http.client.parse_headers(requests_sent).items())
        request = Request(target.split("?")[0], headers, client, time.monotonic(), target)
        with self._lock:
            self.requests.append(request)
        return request

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes up `accept`
        self._socket.close()


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


# --- Helpers: running the script ------------------------------------------------------------------


def script_environment(**changes: str) -> dict[str, str]:
    """This environment without what concerns Runway, and with ``changes``."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RUNWAYML_")}
    return clean | {"PYTHONIOENCODING": "utf-8", "NO_PROXY": "*"} | changes


def run_script(
    directory: Path, *arguments: str, env: Mapping[str, str] | None = None, stdin: bytes = b""
) -> subprocess.CompletedProcess[str]:
    """The command line in this process, from ``directory``, to its end."""
    home = Path.cwd()
    said = [io.BytesIO(), io.BytesIO()]
    out, err = (io.TextIOWrapper(each, "utf-8", newline="\n", write_through=True) for each in said)
    typed = io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
    console = mock.patch.multiple(sys, argv=[str(SCRIPT)], stdin=typed, stdout=out, stderr=err)
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


def without_privileges() -> list[str]:
    """What goes before a command to have it obey permissions, even for root."""
    if os.geteuid() != 0:
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root may do anything, and there is no setpriv")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"]


def start_script(
    directory: Path,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[str]:
    """The real script in a process of its own; ``before`` goes before the command."""
    return subprocess.Popen(
        [*before, sys.executable, str(SCRIPT), *arguments],
        cwd=directory,
        env=script_environment(**env or {}),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )


def finish(
    process: subprocess.Popen[str], stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """What ``process`` printed, and its exit code, when it has come to its end."""
    try:
        out, err = process.communicate(stdin, timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in out + err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_process(directory: Path, *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """As `run_script`, but in a process of its own."""
    return finish(start_script(directory, *arguments, **how))


def download(
    directory: Path, rows: Iterable[Any], *arguments: str, run: Any = run_script, **how: Any
) -> subprocess.CompletedProcess[str]:
    """A run of the script for ``rows``; whatever it does, it tells no secret."""
    write_results(directory, rows)
    result: subprocess.CompletedProcess[str] = run(directory, *arguments, **how)
    assert not SECRETS.search((result.stdout + result.stderr).replace("RUNWAYML_API_SECRET", ""))
    return result


def run_in(
    directory: Path, rows: Iterable[Any], *arguments: str, api: RunwayApi, days: float = 0.01
) -> subprocess.CompletedProcess[str]:
    """A run for ``rows`` of a results file that is ``days`` old, with a key for ``api``."""
    file = write_results(directory, rows, stamp(days))
    when = days_ago(days).timestamp()
    os.utime(file, (when, when))
    return run_script(directory, file.name, *arguments, env=api.env)


def figures(**changes: int) -> dict[str, int]:
    """The statistics of `VideoDownloader`, 0 unless said otherwise."""
    names = ("total_succeeded", "downloaded", "failed_downloads", "already_exists")
    return dict.fromkeys(names, 0) | changes


def run_json(directory: Path, *arguments: str, run: Any = run_script, **how: Any) -> dict[str, Any]:
    """What ``--json`` prints, with the videos by id, and what is on stderr as ``console``."""
    result = run(directory, "--json", *arguments, **how)
    report: dict[str, Any] = json.loads(result.stdout)
    assert result.returncode == report["exit_code"]
    assert list(report["stats"]) == list(figures())
    videos = {video["task_id"]: video for video in report["videos"]}
    return report | {"videos": videos, "console": result.stderr}


def make_downloader(output_dir: Path, timeout: float = 5.0, **more: Any) -> dsv.VideoDownloader:
    """A downloader that does not wait long for a server."""
    return dsv.VideoDownloader(output_dir, timeout=timeout, **more)


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for ``condition``; fail when it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def statistic(result: subprocess.CompletedProcess[str], name: str) -> int:
    """The figure behind ``name`` in the statistics that ``result`` printed."""
    match = re.search(rf"{name}: ([0-9]+)\n", result.stdout)
    assert match, f"no {name} in {result.stdout}"
    return int(match[1])


def read_failures(err: str) -> dict[str, str]:
    """Name -> reason, detail and advice, from the groups at the end of a run."""
    found = {}
    groups = re.sub(r"\n❌ [\d,]+ of [\d,]+ with a problem, [\d,]+ on disk\n$", "", err)
    for block in groups.strip("\n").split("\n\n"):
        reason, *names, advice = block.splitlines()
        for line in names:
            found[line.split()[0]] = f"{reason}\n{line}\n{advice}"
    return found


def make_recorder(directory: Path, code: str = "") -> str:
    """A command for --exec that appends its arguments to ``calls``, then does ``code``."""
    script = directory / "record it.py"
    record = f"open({str(directory / 'calls')!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')"
    script.write_text(f"import json, os, sys\n{record}\n{code}", encoding="utf-8")
    return f"{PYTHON} -IS {shlex.quote(str(script))} {{video}} --with={{metadata}}"


def read_calls(directory: Path) -> list[list[str]]:
    """The arguments of each call of `make_recorder`'s command."""
    return [json.loads(line) for line in (directory / "calls").read_text().splitlines()]


@pytest.fixture(autouse=True, scope="session")
def short_ca_bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One certificate instead of all, as each run loads them; and no API key."""
    bundle = tmp_path_factory.mktemp("tls") / "ca.pem"
    mark = "-----END CERTIFICATE-----\n"
    every = Path(requests.utils.DEFAULT_CA_BUNDLE_PATH).read_text("utf-8")
    bundle.write_text(every.partition(mark)[0] + mark)
    with mock.patch.dict(os.environ, {"REQUESTS_CA_BUNDLE": str(bundle)}):
        os.environ.pop("RUNWAYML_API_SECRET", None)
        yield


@pytest.fixture(autouse=True, scope="session")
def signals_as_in_the_foreground() -> None:
    """Let the processes of the tests be stopped, even if ``&`` or nohup has us ignore signals.

    A handler that does nothing ignores a signal as well, but no process inherits it.
    """
    for name in ("SIGINT", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


# --- Helpers: what lies in the directory ----------------------------------------------------------


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    """Where a run that begins in ``tmp_path`` puts its videos; not made yet."""
    return tmp_path / "video_outputs"


def names_in(directory: Path) -> set[str]:
    return set(os.listdir(directory))


def hidden_in(output_dir: Path) -> set[str]:
    """The names of all that is hidden, such as ``.dsv`` and ``.dsv/x.part``."""
    found = set()
    for path in output_dir.glob(".*"):
        found.add(path.name)
        with contextlib.suppress(FileNotFoundError):  # gone meanwhile
            found |= {f"{path.name}/{each.name}" for each in path.glob("*")}
    return found


def parts_in(output_dir: Path) -> dict[Path, bytes]:
    """The hidden files that hold the beginning of an MP4, and what they hold."""
    parts = {}
    for path in (output_dir / name for name in hidden_in(output_dir)):
        with contextlib.suppress(OSError):  # gone meanwhile, or a directory
            parts[path] = path.read_bytes()
    return {path: data for path, data in parts.items() if data[4:8] == b"ftyp"}


def bytes_in(output_dir: Path) -> int:
    """How much the files hold, hidden ones and all."""
    total = 0
    for directory, _, names in os.walk(output_dir):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(directory, name)).st_size
    return total


def strict_json(data: bytes) -> Any:
    """``data`` as JSON that has no NaN and no Infinity, which other languages refuse."""

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    return json.loads(data.decode("utf-8"), parse_constant=refuse)


def assert_whole(output_dir: Path, stub: str, task_id: str, body: bytes) -> None:
    """The video is there, to the byte, with metadata of its own task."""
    assert (output_dir / f"{stub}.mp4").read_bytes() == body, f"{stub}.mp4 is not as served"
    text = (output_dir / f"{stub}.json").read_text(encoding="utf-8")
    metadata = json.loads(text)
    digest = hashlib.sha256(body).hexdigest()
    assert metadata["runway_task_json"]["task_id"] == task_id
    assert metadata["file_info"]["sha256"] == digest


def assert_home(output_dir: Path, count: int, size: int = VIDEO_BYTES) -> None:
    """The videos of `serve` are there, and nothing else is."""
    for number in range(count):
        assert_whole(output_dir, f"picture_{number}", make_task_id(number), make_mp4(number, size))
    assert len(names_in(output_dir)) == 2 * count


def owners(directory: Path) -> dict[str, str]:
    """The stub under which each task's video is there, by id."""
    found = {}
    for path in directory.glob("*.json"):
        task_id = json.loads(path.read_bytes())["runway_task_json"]["task_id"]
        assert path.with_suffix(".mp4").exists()
        assert task_id not in found
        found[task_id] = path.stem
    return found


def make_metadata(row: Mapping[str, Any], body: bytes = b"") -> bytes:
    """The metadata of ``row`` as an earlier run left it beside the video ``body``."""
    info: dict[str, Any] = {}
    if body:
        info = {"size_bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    return json.dumps({"runway_task_json": row, "file_info": info}).encode()


def put_video(directory: Path, row: Mapping[str, Any], body: bytes, facts: bool = True) -> Path:
    """A video and its metadata as an earlier run left them; without ``facts`` an old one."""
    directory.mkdir(parents=True, exist_ok=True)
    video = directory / f"{row['target_filename_stub']}.mp4"
    video.write_bytes(body)
    video.with_suffix(".json").write_bytes(make_metadata(row, body if facts else b""))
    return video


def lay_out(directory: Path, entries: Mapping[str, Any]) -> None:
    """Make files: of bytes, with the metadata of a row, or as a function of the path does."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in entries.items():
        if callable(content):
            content(directory / name)
        elif isinstance(content, dict):
            (directory / name).write_bytes(make_metadata(content))
        else:
            (directory / name).write_bytes(content)


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """All that is below ``directory``, with sizes and times."""
    found = {}
    for path in (directory, *directory.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(directory))] = (status.st_size, status.st_mtime_ns)
    return found


# --- Helpers: tables of cases ---------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row of a table of tests; ``ids=str`` names its test by its sentence."""

    sentence: str

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class Case(Row):
    """What the server does to one video, and what is to come of it."""

    replies: Sequence[Reply] = (GOOD,)
    requests: int | None = None  # how often the video is asked for; None: not looked at
    starts: Sequence[int | None] | None = None  # where the range of each request begins
    fails: str = ""  # pattern of the reason; "": the video comes home
    says: str = ""  # pattern in the lines about it
    status: str = ""  # of the outcome: "downloaded", "exists"...; "": not looked at
    body: bytes = OBJECT  # what the server has
    arrives: bytes | None = None  # what is on disk at the end; None: ``body``
    row: Mapping[str, Any] = field(default_factory=dict)  # overrides for `make_row`


def cases(
    replies: Mapping[str, Reply],
    before: Sequence[Reply] = (),
    after: Sequence[Reply] = (),
    **more: Any,
) -> list[Case]:
    """A case for each of ``replies``, with the same replies before and after it."""
    return [Case(name, [*before, reply, *after], **more) for name, reply in replies.items()]


@dataclass(frozen=True)
class CaseEnd:
    """What became of one case."""

    outcome: Mapping[str, Any]  # as --json gives it
    requests: Sequence[Request]
    lines: str  # all that was printed about it

    @property
    def reason(self) -> str:
        """Why it failed, with the advice; "" if it did not."""
        error = self.outcome["error"]
        if not error:
            return ""
        return f"{error['reason']} {error['hint']}"


@dataclass(frozen=True)
class CasesRun:
    """What one run of the script made of a table, one video a row."""

    cdn: Cdn
    directory: Path
    cases: Sequence[Case]
    exit_code: int
    report: Mapping[str, Any]  # the object that --json prints
    console: str

    @property
    def output_dir(self) -> Path:
        return self.directory / "video_outputs"

    def number(self, case: Case) -> int:
        return self.cases.index(case)

    def row(self, case: Case) -> dict[str, Any]:
        """The row of ``case``, its link on the CDN unless its own overrides say otherwise."""
        number = self.number(case)
        link = f"{self.cdn.url}/{number}.mp4?_jwt=secret.{number}"
        return make_row(number, **{"video_url": link, **case.row})

    def end(self, case: Case) -> CaseEnd:
        number = self.number(case)
        task_id = make_task_id(number)
        outcomes = [each for each in self.report["videos"] if each["task_id"] == task_id]
        assert len(outcomes) == 1, f"{case}: {len(outcomes)} outcomes in --json"
        lines = lines_about(self.console, f"picture_{number}", task_id)
        return CaseEnd(outcomes[0], self.cdn.asked(f"{number}.mp4"), lines)

    def check(self, case: Case) -> None:
        """Fail, with the sentence of ``case``, if it did not end as it says."""
        end = self.end(case)
        seen = f"{case}\nseen: {dict(end.outcome)}\nprinted:\n{end.lines}"
        if case.fails:
            self._check_failure(case, end, seen)
        else:
            self._check_video(case, end, seen)
        if case.status:
            assert end.outcome["status"] == case.status, seen
        if case.requests is not None:
            assert len(end.requests) == case.requests, seen
        if case.starts is not None:
            starts = [request.range_start for request in end.requests]
            assert starts == list(case.starts), seen
        if case.says:
            said = f"{end.lines}\n{end.outcome['warning'] or ''}\n{end.reason}"
            assert re.search(case.says, said), f"not said: {case.says}\n{seen}"

    def _check_failure(self, case: Case, end: CaseEnd, seen: str) -> None:
        assert end.outcome["status"] == "failed", seen
        assert re.search(case.fails, end.reason), f"the reason is not {case.fails}\n{seen}"
        stub = f"picture_{self.number(case)}"
        left = names_in(self.output_dir) & {f"{stub}.mp4", f"{stub}.json"}
        assert not left, f"{left} is left\n{seen}"

    def _check_video(self, case: Case, end: CaseEnd, seen: str) -> None:
        assert end.outcome["error"] is None, seen
        video = self.directory / end.outcome["path"]
        body = case.body if case.arrives is None else case.arrives
        assert video.read_bytes() == body, f"{video.name} is not what was served\n{seen}"
        task_id = make_task_id(self.number(case))
        assert_whole(video.parent, video.stem, task_id, body)


def lines_about(console: str, stub: str, task_id: str) -> str:
    """The printed lines of one task, and those that name its video later on."""
    is_named = re.compile(rf"(?<!\w){re.escape(stub)}(?![0-9])|{task_id[:8]}")
    blocks = re.split(r"^(?=\s*\d+/\d+ |=+$|$)", console, flags=re.MULTILINE)
    return "".join(block for block in blocks if is_named.search(block))


def run_cases(
    cdn: Cdn,
    directory: Path,
    cases: Sequence[Case],
    *arguments: str,
    env: Mapping[str, str] | None = None,
) -> CasesRun:
    """Serve each of ``cases`` as one video, and run the script once on all of them."""
    planned = CasesRun(cdn, directory, cases, 0, {}, "")
    for number, case in enumerate(cases):
        cdn.add(f"{number}.mp4", case.body, *case.replies)
    rows = [planned.row(case) for case in cases]
    options = ("--json", "--workers", "64", *arguments)
    result = download(directory, rows, *options, env=env)
    report = json.loads(result.stdout)
    return replace(planned, exit_code=result.returncode, report=report, console=result.stderr)


# --- Helpers: what a file system can do wrong -----------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a process, and at which of its calls."""

    calls: Sequence[str]  # names of `Saboteur.PLACES`; "create" is an open that creates
    error: str = ""  # what they raise: a name of errno, or of an exception
    act: str = ""  # or what happens: "kill", "stop", "hang", "copy", "log", "other inode"
    of: str = "*"  # only calls for a file of this name, a pattern
    at: int = 0  # only the n-th of these calls, from 1
    after: int = 0  # only those after so many
    late: bool = False  # the call is made, and fails then
    only_open: bool = False  # only for files that the process has open
    longer_than: int = 0  # only for names of more bytes
    room: int = -1  # bytes that can still be written, then "disk full"; -1: no limit
    copies: Mapping[str, str] = field(default_factory=dict)  # before the call: from, to
    log: str = ""  # the file in which "log" writes down each call


class Saboteur:
    """Has calls of its own process fail as ``faults`` say.

    Runs in the process of the script, where there is nothing but these two classes.
    """

    PLACES = {  # noqa: RUF012
        **{name: f"os.{name}" for name in ("open", "close", "read", "write", "fsync", "ftruncate")},
        **{name: f"os.{name}" for name in ("link", "rename", "replace", "unlink", "remove")},
        **{name: f"os.{name}" for name in ("mkdir", "rmdir", "stat", "lstat", "fstat", "chmod")},
        "start thread": "threading.Thread.start",
        "look up": "socket.getaddrinfo",
        "load CA bundle": "ssl.SSLContext.load_verify_locations",
    }
    TWO_PATHS = ("link", "rename", "replace")

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = faults
        self.counts = [0] * len(faults)
        self.room = max([fault.room for fault in faults], default=-1)
        self.paths: dict[int, str] = {}  # of the descriptors that are open
        self.inodes = itertools.count(1)
        self.inodes_change = any(fault.act == "other inode" for fault in faults)
        self.lock = threading.RLock()

    @classmethod
    def from_environment(cls) -> Saboteur:
        """Take over what `fault` put into the environment, so that no child inherits it."""
        names = sorted(name for name in os.environ if name.startswith("FAULT_"))
        return cls([Fault(**json.loads(os.environ.pop(name))) for name in names])

    def begin(self) -> None:
        """Patch what ``faults`` name. All files go through `os` from now on."""
        for name in ("sendfile", "copy_file_range"):
            vars(os).pop(name, None)
        python_open = importlib.import_module("_pyio").open
        self.patch(io, "open", python_open)
        self.patch(builtins, "open", python_open)

        wanted = {"open", "close"}.union(*(fault.calls for fault in self.faults)) - {"create"}
        if self.room >= 0:
            wanted |= {"write", "unlink", "remove", "ftruncate"}
        for name in sorted(wanted):
            module_name, *middle, attribute = self.PLACES[name].split(".")
            owner = importlib.import_module(module_name)
            for each in middle:
                owner = getattr(owner, each)
            self.patch(owner, attribute, self.spied(name, getattr(owner, attribute)))

    @staticmethod
    def patch(owner: Any, name: str, function: Any) -> None:
        before = getattr(owner, name)
        setattr(owner, name, function)
        copies = getattr(sys.modules.get("pathlib"), "_NormalAccessor", None)  # Python 3.10
        if copies and vars(copies).get(name) == before:
            setattr(copies, name, staticmethod(function))

    def spied(self, name: str, call: Any) -> Any:
        def instead(*arguments: Any, **options: Any) -> Any:
            paths = self.paths_of(name, arguments)
            kind = name
            if name == "open" and arguments[1] & os.O_CREAT:
                kind = "create"
            due = self.due(kind, paths)
            for fault in [each for each in due if not each.late]:
                self.happen(fault, kind, paths, arguments, options)
            if self.room >= 0:
                arguments = self.fit(name, paths, arguments)
            result = call(*arguments, **options)
            for fault in [each for each in due if each.late]:
                self.happen(fault, kind, paths, arguments, options)
            self.note(name, paths, arguments, result)
            if self.inodes_change and isinstance(result, os.stat_result):
                return self.with_other_inode(result)
            return result

        return instead

    def paths_of(self, name: str, arguments: Sequence[Any]) -> list[str]:
        """The files that a call is about; none for a descriptor that `os.open` did not open."""
        count = 2 if name in self.TWO_PATHS else 1
        paths = []
        for argument in arguments[:count]:
            if isinstance(argument, int):
                argument = self.paths.get(argument)
            if isinstance(argument, (str, bytes, os.PathLike)):
                paths.append(os.fsdecode(argument))
        return paths

    def due(self, kind: str, paths: Sequence[str]) -> list[Fault]:
        """The faults that happen at this call."""
        found = []
        with self.lock:
            for number, fault in enumerate(self.faults):
                if kind not in fault.calls or not self.concerns(fault, kind, paths):
                    continue
                self.counts[number] += 1
                count = self.counts[number]
                if count > fault.after and fault.at in (0, count):
                    found.append(fault)
        return found

    def concerns(self, fault: Fault, kind: str, paths: Sequence[str]) -> bool:
        if self.PLACES.get(kind, "os.").startswith("os.") and not paths:
            return False
        names = [os.path.basename(path) for path in paths]
        if fault.of != "*" and not any(fnmatch.fnmatch(name, fault.of) for name in names):
            return False
        if fault.only_open and not set(paths) & set(self.paths.values()):
            return False
        longest = max([len(os.fsencode(name)) for name in names], default=0)
        return not fault.longer_than or longest > fault.longer_than

    def happen(self, fault: Fault, kind: str, paths: Sequence[str], *call: Any) -> None:
        if fault.act == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.act == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.act == "hang":
            time.sleep(3600)
        elif fault.act == "log":
            self.write_log(fault.log, f"{kind} {paths} {call}\n")
        elif fault.act == "copy":
            for source, target in fault.copies.items():
                self.copy(source, target)
        elif hasattr(errno, fault.error):
            number = getattr(errno, fault.error)
            raise OSError(number, os.strerror(number), *paths[:1])
        elif fault.error:
            raise getattr(builtins, fault.error)(f"{kind} failed on purpose")

    def fit(self, name: str, paths: Sequence[str], arguments: Any) -> Any:
        """Keep the account of a small disk; cut what is to be written to what there is room for."""
        with self.lock:
            if name in ("unlink", "remove") and os.path.exists(paths[0]):
                status = os.stat(paths[0])
                self.room += status.st_size if status.st_nlink == 1 else 0
            elif name == "ftruncate" and paths:
                self.room += os.fstat(arguments[0]).st_size - arguments[1]
            elif name == "write" and paths:
                if self.room <= 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                arguments = (arguments[0], bytes(arguments[1])[: self.room])
                self.room -= len(arguments[1])
        return arguments

    def note(self, name: str, paths: Sequence[str], arguments: Sequence[Any], result: Any) -> None:
        """Remember which descriptor is which file."""
        if name == "open":
            self.paths[result] = paths[0]
        elif name == "close":
            self.paths.pop(arguments[0], None)

    def with_other_inode(self, status: os.stat_result) -> os.stat_result:
        values, more = cast(Any, status.__reduce__()[1])
        return os.stat_result((values[0], next(self.inodes), *values[2:]), more)

    @staticmethod
    def write_log(log: str, line: str) -> None:
        with io.FileIO(log, "a") as file:
            file.write(line.encode("utf-8", "replace"))

    @staticmethod
    def copy(source: str, target: str) -> None:
        with io.FileIO(source) as given, io.FileIO(target, "w") as made:
            made.write(given.readall())


STEPS = ("create", "write", "ftruncate", "fsync", "link", "rename", "replace", "unlink", "remove")
LOOKS = ("open", "create", "stat", "lstat", "link", "rename", "replace", "unlink", "mkdir", "chmod")
FAULTS = {
    "no hard links": Fault(["link"], "EPERM"),
    "no fsync": Fault(["fsync"], "EINVAL"),
    "fsync error": Fault(["fsync"], "EIO"),
    "hung fsync": Fault(["fsync"], act="hang"),
    "close error": Fault(["close"], "EIO", late=True),
    "no unlink of open files": Fault(["unlink", "remove"], "EBUSY", only_open=True),
    "no rename": Fault(["rename", "replace"], "EIO"),
    "no chmod": Fault(["chmod"], "EPERM"),
    "no create": Fault(["create"], "EACCES"),
    "disk full": Fault(["fsync"], "ENOSPC"),  # with ``after``, else ``room``
    "read error": Fault(["open", "read"], "EIO"),
    "names of 143 bytes": Fault(LOOKS, "ENAMETOOLONG", longer_than=143),
    "kill": Fault([*STEPS, "mkdir", "rmdir"], act="kill"),
    "stop": Fault([*STEPS, "mkdir", "rmdir"], act="stop"),
    "inodes change": Fault(["stat", "lstat", "fstat"], act="other inode"),
    "few threads": Fault(["start thread"], "RuntimeError"),
    "hung look-up": Fault(["look up"], act="hang"),
    "another file arrives": Fault(["link", "rename"], act="copy", at=1),  # ``copies``
    "log": Fault(["fsync"], act="log"),
}
SITECUSTOMIZE = """
from __future__ import annotations
import builtins, errno, fnmatch, importlib, io, itertools, json, os, pathlib
import signal, sys, threading, time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

{classes}
Saboteur.from_environment().begin()
"""


@functools.cache
def saboteur_directory() -> str:
    """A directory that has every Python with it on its path begin with a `Saboteur`."""
    directory = tempfile.mkdtemp(prefix="faults-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    classes = f"{inspect.getsource(Fault)}\n\n{inspect.getsource(Saboteur)}"
    code = SITECUSTOMIZE.format(classes=classes)
    Path(directory, "sitecustomize.py").write_text(code, encoding="utf-8")
    return directory


def fault(name: str, **how: Any) -> dict[str, str]:
    """The environment of a process in which the fault ``name`` of `FAULTS` happens.

    ``how`` changes fields of the `Fault`; ``at_step``, ``after_fsyncs`` and ``at_bytes`` are other
    names of ``at``, ``after`` and ``room``. Join several with ``|``. The processes that the script
    starts are spared.
    """
    same = {"at_step": "at", "after_fsyncs": "after", "at_bytes": "room"}
    changes = {same.get(key, key): value for key, value in how.items()}
    if "room" in changes:
        changes["calls"] = []
    told = asdict(replace(FAULTS[name], **changes))
    path = filter(None, (saboteur_directory(), os.environ.get("PYTHONPATH")))
    variable = f"FAULT_{name.replace(' ', '_')}"
    return {variable: json.dumps(told), "PYTHONPATH": os.pathsep.join(path)}


# --- Helpers: many runs in forked processes -------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A run of the script in a process that is forked from one that has it loaded."""

    directory: Path
    arguments: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Run the script; in the child."""
        environment = script_environment(**self.env)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(self.directory)
        with open("console.txt", "w", encoding="utf-8") as console:
            sys.stdout = sys.stderr = console
            Saboteur.from_environment().begin()
            sys.exit(dsv.main(self.arguments))


@functools.cache
def forkserver() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        multiprocessing.forkserver.ensure_running()
    return context


FORKED: list[Any] = []  # the processes of the test that runs


def start_forked(job: Job) -> Any:
    """Start ``job``; its process, of `multiprocessing`. 30 ms, where `start_script` takes 250."""
    process = forkserver().Process(target=job.run, daemon=True)
    process.start()
    FORKED.append(process)
    return process


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Kill what a failed test leaves: a process that is stopped would keep pytest from ending."""
    yield
    while FORKED:
        FORKED.pop().kill()


def run_forked(jobs: Sequence[Job]) -> list[int | None]:
    """Run ``jobs``, all at once; their exit codes, -9 for a kill, None for one that hangs."""
    processes = [start_forked(job) for job in jobs]
    deadline = time.monotonic() + 60
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    exit_codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    for job in jobs:
        assert "Traceback" not in (job.directory / "console.txt").read_text(encoding="utf-8")
    return exit_codes


# --- Input: shapes of results, facts of a row, statuses -------------------------------------------

LINK = "https://cdn.invalid/1.mp4?_jwt=secret"
OTHER_LINK = "https://cdn.invalid/2.mp4?_jwt=secret"


def write_document(directory: Path, document: object, name: str = "") -> Path:
    """A results file in ``directory`` that holds ``document``, whatever its shape."""
    path = directory / (name or f"runway_polling_results_{stamp()}.json")
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Shape(Row):
    wrap: Callable[[dict[str, Any]], object]  # an answer of Runway's, in this shape


SHAPES = [
    Shape("in task_results", lambda answer: {"task_results": [answer]}),
    Shape("a bare list", lambda answer: [answer]),
    Shape("a bare list in which something else comes first", lambda answer: ["note", {}, answer]),
    Shape("one object", lambda answer: answer),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_runways_own_answers_are_read(
    tmp_path: Path, output_dir: Path, cdn: Cdn, shape: Shape
) -> None:
    task_id = make_task_id(1)
    answer = make_answer(task_id, cdn.add("1.mp4", WHOLE))
    write_document(tmp_path, shape.wrap(answer))
    run_script(tmp_path)
    assert_whole(output_dir, f"video_{task_id[:8]}", task_id, WHOLE)


def test_the_sdks_dump_is_read(tmp_path: Path, output_dir: Path, cdn: Cdn) -> None:
    task_id = make_task_id(1)
    link = cdn.add("1.mp4", WHOLE)
    dump = {
        "id": task_id,
        "created_at": "2026-06-27 19:49:32.335000+00:00",  # json.dump(..., default=str)
        "status": "SUCCEEDED",
        "failure": None,
        "failure_code": None,
        "output": [link],
        "progress": None,
    }
    write_document(tmp_path, dump)
    assert run_script(tmp_path).returncode == 0
    assert_whole(output_dir, f"video_{task_id[:8]}", task_id, WHOLE)


def test_a_list_or_one_object_is_loaded_as_task_results(tmp_path: Path) -> None:
    downloader = make_downloader(tmp_path / "out")
    whole = {"polling_stats": {"succeeded": 1}, "task_results": [make_row()]}
    several = [make_answer("1", LINK), make_answer("2", LINK)]
    one = make_answer("3", output=None)
    assert downloader.load_polling_results(write_document(tmp_path, whole)) == whole
    loaded = downloader.load_polling_results(write_document(tmp_path, several))
    assert loaded == {"task_results": several}
    assert downloader.load_polling_results(write_document(tmp_path, one)) == {"task_results": [one]}


@dataclass(frozen=True)
class Fact(Row):
    row: dict[str, Any]
    name: str  # as the metadata calls it
    value: str


FACTS = [
    Fact("task_id first", {"task_id": "a", "id": "b"}, "task_id", "a"),
    Fact("the id, else", {"id": "b"}, "task_id", "b"),
    Fact("a task_id of null is none", {"task_id": None, "id": "b"}, "task_id", "b"),
    Fact("video_url first", {"video_url": LINK, "output": OTHER_LINK}, "video_url", LINK),
    Fact("the output, else", {"output": LINK}, "video_url", LINK),
    Fact("the first of the output", {"output": [LINK, OTHER_LINK]}, "video_url", LINK),
    Fact("the first of video_url", {"video_url": [LINK]}, "video_url", LINK),
    Fact("a video_url of null is none", {"video_url": None, "output": [LINK]}, "video_url", LINK),
    Fact("an empty video_url is none", {"video_url": "", "output": [LINK]}, "video_url", LINK),
    Fact("prompt first", {"prompt": "a", "promptText": "b"}, "prompt", "a"),
    Fact("the promptText, else", {"promptText": "b"}, "prompt", "b"),
    Fact("timestamp first", {"timestamp": "1", "createdAt": "2"}, "timestamp", "1"),
    Fact("createdAt next", {"createdAt": "2", "created_at": "3"}, "timestamp", "2"),
    Fact("created_at last", {"created_at": "3"}, "timestamp", "3"),
]  # fmt: skip


@pytest.mark.parametrize("fact", FACTS, ids=str)
def test_a_fact_is_the_first_that_is_there(tmp_path: Path, fact: Fact) -> None:
    video = tmp_path / "a.mp4"
    video.write_bytes(WHOLE)
    row = {"final_status": "SUCCEEDED"} | fact.row
    assert make_downloader(tmp_path).create_metadata_json(row, video, tmp_path / "a.json")
    metadata = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (metadata | metadata["runway_task_json"])[fact.name] == fact.value


@dataclass(frozen=True)
class StatusCase(Row):
    fields: dict[str, Any]
    is_task: bool


STATUSES = [
    StatusCase("final_status says so", {"final_status": "SUCCEEDED", "status": "PENDING"}, True),
    StatusCase("case does not matter", {"final_status": "Succeeded"}, True),
    StatusCase("the status, where there is no final_status", {"status": "succeeded"}, True),
    StatusCase("nor one of null", {"final_status": None, "status": "SUCCEEDED"}, True),
    StatusCase("nor an empty one", {"final_status": "", "status": "SUCCEEDED"}, True),
    StatusCase("nor one that is no text", {"final_status": 1, "status": "SUCCEEDED"}, True),
    StatusCase("final_status denies it", {"final_status": "FAILED", "status": "SUCCEEDED"}, False),
    StatusCase("another word for it", {"status": "completed"}, False),
    StatusCase("neither", {}, False),
]


@pytest.mark.parametrize("case", STATUSES, ids=str)
def test_a_row_that_says_succeeded_is_a_task(tmp_path: Path, case: StatusCase) -> None:
    row = {"task_id": make_task_id(1), "video_url": LINK} | case.fields
    tasks = make_downloader(tmp_path).get_succeeded_tasks({"task_results": [row]})
    assert tasks == ([row] if case.is_task else [])


def test_that_there_are_more_links_is_said(tmp_path: Path, cdn: Cdn) -> None:
    links = [cdn.add(f"{number}.mp4", WHOLE) for number in range(3)]
    one = make_answer("one", links[0])
    several = make_answer("more", *links)
    write_document(tmp_path, [one, several])
    printed = run_script(tmp_path, "--workers", "1").stdout
    more = lines_about(printed, "video_more", "more")
    assert re.search(r"\b2 more links?\b", more)
    assert "more link" not in lines_about(printed, "video_one", "one")
    assert len(cdn.asked("0.mp4")) == 2
    assert len(cdn.requests) == 2


def test_failed_cancelled_and_unfinished_tasks_are_counted_in_one_line(tmp_path: Path) -> None:
    statuses: list[str | None] = [
        "FAILED",
        "failed",
        "CANCELLED",
        "CANCELED",
        "canceled",
        "RUNNING",
        "Throttled",
    ]
    statuses += ["PENDING", None]
    rows = [make_row(i, final_status=x, video_url=None) for i, x in enumerate(statuses)]
    write_results(tmp_path, rows)
    result = run_script(tmp_path)
    assert re.search(r"\b2 FAILED.*\b3 CANCELLED.*\b4 \w", result.stdout)
    assert result.stderr == ""
    assert result.returncode == 0


@dataclass(frozen=True)
class UnknownStatus(Row):
    status: object
    said: str  # in the warning; "" where there is none


UNKNOWN_STATUSES = [
    UnknownStatus("another word for it", "completed", "completed"),
    UnknownStatus("a word with an escape code", "done\x1b[31m", r"done\S+31m"),
    UnknownStatus("no status at all", None, "status"),
    *[UnknownStatus(status, status, "") for status in ("PENDING", "RUNNING", "THROTTLED")],
    *[UnknownStatus(status, status, "") for status in ("FAILED", "CANCELLED", "Canceled")],
]


@pytest.mark.parametrize("case", UNKNOWN_STATUSES, ids=str)
def test_a_link_with_an_unknown_status_is_named(tmp_path: Path, case: UnknownStatus) -> None:
    write_results(tmp_path, [make_row(1, status=case.status, final_status=None)])
    for mode in ((), ("-q",), ("--json",), ("--dry-run", "-q")):
        printed = run_script(tmp_path, *mode).stderr
        warnings = re.findall(f".*{make_task_id(1)[:8]}.*", printed)
        if not case.said:
            assert warnings == [], mode
            continue
        (warning,) = warnings
        assert re.search(case.said, warning)
        assert "\x1b" not in warning


# --- Input: which files are read, and what is made of broken ones ---------------------------------


@dataclass(frozen=True)
class Choice(Row):
    arguments: Sequence[str]
    read: Sequence[str]  # names
    begins: str = ""  # what is printed, with


MY_ROW = ["elsewhere/mine.json"]
NAMES = [f"runway_polling_results_20250617_04015{second}.json" for second in (9, 8, 7)]
CHOICES = [
    Choice("none named: the latest", [], NAMES[:1], f"📁 Using latest results file: {NAMES[0]}\n"),
    Choice("--all: every one", ["--all"], NAMES, "🔍 Found 3 polling results files\n"),
    Choice("named", MY_ROW, ["mine.json"]),
    Choice("named by the option", ["--polling-results-file", *MY_ROW], ["mine.json"]),
    Choice("several named", [f"video_outputs/{NAMES[1]}", *MY_ROW], [NAMES[1], "mine.json"]),
]


@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_files_are_searched_or_named(tmp_path: Path, case: Choice) -> None:
    for place, name in zip(("out", "video_outputs", "."), NAMES, strict=True):
        (tmp_path / place).mkdir(exist_ok=True)
        write_document(tmp_path / place, {"task_results": []}, name)
    (tmp_path / "elsewhere").mkdir()
    write_document(tmp_path / "elsewhere", {"task_results": []}, "mine.json")
    write_document(tmp_path / "elsewhere", {"task_results": []}, NAMES[0].replace("2025", "2026"))
    printed = run_script(tmp_path, "--output-dir", "out", *case.arguments).stdout
    read = re.findall(r"Processing: (.*)\n", printed)
    assert sorted(read) == sorted(case.read)
    assert printed.startswith(case.begins)


def test_all_files_are_read_latest_first(tmp_path: Path) -> None:
    for name in NAMES:
        write_document(tmp_path, {"task_results": []}, name)
    printed = run_script(tmp_path, "--all").stdout
    read = re.findall(r"Processing: (.*)\n", printed)
    assert read == sorted(NAMES, reverse=True)


def test_latest_goes_by_the_time_in_the_name_else_by_the_modification_time(tmp_path: Path) -> None:
    modified_on = {
        "20250101_000000": 9,
        "night_20250105_000000 (2)": 8,
        "20250103_000000": 7,
        "one": 2,
        "another": 4,
    }
    for name, day in modified_on.items():
        path = write_results(tmp_path, [], name)
        noon = datetime(2025, 1, day, 12).timestamp()
        os.utime(path, (noon, noon))
    (tmp_path / "runway_polling_results_20250109_000000.json").mkdir()
    (tmp_path / "runway_polling_results_20250109_000000.json.bak").touch()
    paths = make_downloader(tmp_path / "out").find_all_polling_results(tmp_path)
    names = [path.stem.partition("results_")[2] for path in paths]
    expected = ["night_20250105_000000 (2)", "another", "20250103_000000", "one", "20250101_000000"]
    assert names == expected


@unix_only
def test_names_are_compared_as_written_whatever_the_clocks_do(tmp_path: Path) -> None:
    write_results(tmp_path, [], "20250330_023000")  # an hour that does not exist in Berlin
    latest = write_results(tmp_path, [], "20250330_030500")
    berlin = {"TZ": "CET-1CEST,M3.5.0,M10.5.0/3"}
    result = run_process(tmp_path, env=berlin)
    assert result.stdout.startswith(f"📁 Using latest results file: {latest.name}\n")


def test_no_results_file_is_said_with_what_would_help(tmp_path: Path, output_dir: Path) -> None:
    for mode in ((), ("--all",), ("-q",)):
        result = run_script(tmp_path, "--output-dir", "elsewhere", *mode)
        assert (result.returncode, result.stdout) == (1, "")
        (line,) = result.stderr.strip().splitlines()
        assert re.match(r"\W*No polling results found", line)
        assert "runway_polling_results_*.json" in line
        for place in (tmp_path, output_dir, tmp_path / "elsewhere"):
            assert re.search(re.escape(str(place)) + r"(?![\w/])", line)
        assert re.search("run the polling step first.* or .*name a file", line)


@dataclass(frozen=True)
class Piped(Row):
    arguments: Sequence[str]
    exit_code: int
    says: str
    data: bytes = b""


PIPED = [
    Piped("- is standard input", ["-"], 0, "Found 1 SUCCEEDED"),
    Piped("so it is with the option", ["--polling-results-file", "-"], 0, "Found 1 SUCCEEDED"),
    Piped("not beside a file", ["-", "a.json"], 2, "-"),
    Piped("not with --all", ["-", "--all"], 2, "--all"),
    Piped("what is wrong is said", ["-"], 1, "standard input.*line 2 column 3", b'{"a": 1,\n  b}'),
    Piped("nothing is no results file", ["-"], 1, "standard input"),
]


@pytest.mark.parametrize("case", PIPED, ids=str)
def test_standard_input_is_read(tmp_path: Path, cdn: Cdn, case: Piped) -> None:
    data = case.data
    if case.exit_code == 0:
        link = cdn.add("1.mp4", WHOLE)
        data = json.dumps([make_answer("one", link)]).encode()
    result = run_script(tmp_path, *case.arguments, stdin=data)
    assert result.returncode == case.exit_code
    assert re.search(case.says, result.stdout + result.stderr)
    assert len(cdn.requests) == (case.exit_code == 0)


@unix_only
def test_a_pipe_is_read(tmp_path: Path, output_dir: Path, cdn: Cdn) -> None:
    document = json.dumps(serve(cdn, 1))
    process = start_script(tmp_path, "-", stdin=subprocess.PIPE)
    assert finish(process, document).returncode == 0
    assert_home(output_dir, 1)


def test_standard_input_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dsv, "RESULTS_MAX_BYTES", 5)  # instead of 1 GB
    result = run_script(tmp_path, "-", stdin=b" " * 6)
    assert result.returncode == 1
    assert re.search("standard input.*1 GB", result.stderr)


# Several files, broken files.


@dataclass(frozen=True)
class Merge(Row):
    latest: dict[str, Any]
    older: dict[str, Any]
    asked: Sequence[str]  # what the CDN is asked for
    found: int = 1


FRESH = "fresh"  # what the test makes a link of the CDN, each time with another signature
STALE = "stale"
FRESH_LINK = {"video_url": FRESH}
STALE_LINK = {"video_url": STALE}
NO_LINK = {"video_url": None}
NO_ID: dict[str, Any] = {"task_id": None}
MERGES = [
    Merge("the latest file's link", FRESH_LINK, STALE_LINK, [FRESH]),
    Merge("a link before none", NO_LINK, STALE_LINK, [STALE]),
    Merge("or before no usable one", {"video_url": "soon"}, STALE_LINK, [STALE]),
    Merge("SUCCEEDED before none", {"final_status": None}, STALE_LINK, [STALE]),
    Merge("SUCCEEDED before FAILED", {"final_status": "FAILED"}, STALE_LINK, [STALE]),
    Merge("SUCCEEDED before a link", FRESH_LINK | {"final_status": "RUNNING"}, NO_LINK, []),
]
MERGES_BY_ID = [
    Merge(
        "id is task_id", NO_ID | FRESH_LINK | {"id": "1"}, STALE_LINK | {"task_id": "1"}, [FRESH]
    ),
    Merge("without id: the link, query aside", NO_ID | FRESH_LINK, NO_ID | FRESH_LINK, [FRESH]),
    Merge(
        "without id: the link, a query with spaces aside",
        NO_ID | FRESH_LINK | {"query": "a "},
        NO_ID | FRESH_LINK | {"query": "b c "},
        [FRESH],
    ),
    Merge("without id: another link", NO_ID | FRESH_LINK, NO_ID | STALE_LINK, [FRESH, STALE], 2),
    Merge("two ids, one link", FRESH_LINK, FRESH_LINK | {"task_id": "2"}, [FRESH, FRESH], 2),
]


@pytest.mark.parametrize("way", ["--all", "one file"])
@pytest.mark.parametrize("case", [*MERGES, *MERGES_BY_ID], ids=str)
def test_a_task_in_several_rows_counts_once(
    tmp_path: Path, cdn: Cdn, case: Merge, way: str
) -> None:
    rows = [make_row(**case.latest), make_row(**case.older)]
    for number, row in enumerate(rows):
        if row.get("video_url") in (FRESH, STALE):
            link = cdn.add(row["video_url"], WHOLE)
            row["video_url"] = link + row.get("query", "") + str(number)
    if way == "--all":
        write_results(tmp_path, rows[:1], "20250618_000000")
        write_results(tmp_path, rows[1:], "20250617_000000")
    else:
        write_results(tmp_path, rows)
    report = run_json(tmp_path, "--all")
    asked = sorted(request.path for request in cdn.requests)
    assert asked == [f"/{name}" for name in case.asked]
    home = len(case.asked)
    lost = case.found - home
    expected = figures(total_succeeded=case.found, downloaded=home, failed_downloads=lost)
    assert report["stats"] == expected


@dataclass(frozen=True)
class Broken(Row):
    content: bytes | Callable[[Path], object] | None  # a function makes the file
    says: str


def make_huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**30 + 1)


def make_unreadable(path: Path) -> None:
    path.symlink_to("/proc/self/mem")  # its first byte cannot be read, not even by root


NO_RESULTS = r"(no|not a) polling.results file.*\{.task_results.: \[\{"
BROKEN = [
    Broken("is missing", None, "No such file"),
    Broken("is a directory", os.mkdir, "directory"),
    Broken("cannot be read", make_unreadable, "Input/output error"),
    Broken("is empty", b"", "line 1 column 1"),
    Broken("is not JSON", b'{"a": 1,\n  b}', "line 2 column 3"),
    Broken("ends too soon", b'{"task_results": [{"task_id": "a"}', "line 1 column"),
    Broken("is not UTF-8", b'{"task_results": ["\xe9"]}', "UTF-8"),
    Broken("is nested absurdly", b"[" * 200_000, "nest|deep|recursion"),
    Broken("has more than 1 GB", make_huge, "1 GB"),
    Broken("is another step's", b'{"tasks": [{"task_id": "a"}]}', NO_RESULTS),
    Broken("has no list of results", b'{"task_results": {}}', NO_RESULTS),
    Broken("is an empty list", b"[]", NO_RESULTS),
    Broken("is an empty object", b"{}", NO_RESULTS),
    Broken("is a list of something else", b'[{"success": false, "status": "a"}]', NO_RESULTS),
    Broken("is a list of bare ids", b'[{"id": "a", "prompt": "b"}]', NO_RESULTS),
    Broken("is a number", b"5", NO_RESULTS),
    Broken("is null", b"null", NO_RESULTS),
]


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_a_broken_results_file_gets_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], case: Broken
) -> None:
    if case.content is make_unreadable and not sys.platform.startswith("linux"):
        pytest.skip("needs /proc")
    path = tmp_path / "runway_polling_results_20250617_040158.json"
    if case.content is not None:
        lay_out(tmp_path, {path.name: case.content})
    result = run_script(tmp_path, path.name)
    assert make_downloader(tmp_path / "out").load_polling_results(path) == {}
    printed = capfd.readouterr()
    assert result.returncode == 1
    for text in (result.stderr, printed.out + printed.err):
        (line,) = text.strip().splitlines()
        assert path.name in line
        assert re.search(case.says, line)


def test_a_list_of_ids_with_a_link_or_a_status_is_results(tmp_path: Path) -> None:
    downloader = make_downloader(tmp_path / "out")
    for item in ({"id": "a", "status": "RUNNING"}, {"task_id": "a", "output": [LINK]}):
        path = write_document(tmp_path, ["note", item])
        assert downloader.load_polling_results(path) == {"task_results": ["note", item]}


def test_a_byte_order_mark_and_blanks_are_fine(tmp_path: Path) -> None:
    file = write_results(tmp_path, [make_row()])
    file.write_bytes(b"\xef\xbb\xbf\r\n \t" + file.read_bytes())
    loaded = make_downloader(tmp_path / "out").load_polling_results(file)
    assert loaded["task_results"] == [make_row()]


def test_each_bad_file_gets_a_line_and_the_good_one_is_served(
    tmp_path: Path, output_dir: Path, cdn: Cdn
) -> None:
    bad = [write_results(tmp_path, [], f"2025061{day}_000000") for day in (1, 5, 9)]
    for path in bad:
        path.write_text("{", encoding="utf-8")
    write_results(tmp_path, serve(cdn, 1), "20250617_000000")
    for mode in ((), ("--dry-run",)):
        result = run_script(tmp_path, "--all", *mode)
        assert result.returncode == 3
        for path in bad:
            assert result.stderr.count(path.name) == 1
    assert_home(output_dir, 1)


@unix_only
def test_a_link_to_nowhere_is_a_bad_file(tmp_path: Path, output_dir: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1), "20250617_000000")
    gone = tmp_path / "runway_polling_results_20250618_000000.json"
    gone.symlink_to(tmp_path / "gone")
    latest = run_script(tmp_path)
    every = run_script(tmp_path, "--all")
    assert latest.returncode == 1
    assert gone.name in latest.stderr
    assert every.returncode == 3
    assert gone.name in every.stderr
    assert_home(output_dir, 1)


def test_a_huge_json_in_the_output_directory_is_another_programs(tmp_path: Path, cdn: Cdn) -> None:
    (row,) = serve(cdn, 1)
    write_results(tmp_path, [row])
    output = tmp_path / "video_outputs"
    huge = output / "picture_0.json"
    lay_out(output, {huge.name: make_metadata(row)})
    os.truncate(huge, 10 * 2**20 + 1)
    assert run_script(tmp_path).returncode == 0
    with_id = f"picture_0_{row['task_id'][:8]}"
    assert_whole(output, with_id, row["task_id"], make_mp4(0))
    assert huge.stat().st_size == 10 * 2**20 + 1
    assert not huge.with_suffix(".mp4").exists()


# --- Input: odd rows, and odd links ---------------------------------------------------------------


@dataclass(frozen=True)
class OddRow(Row):
    row: Any
    says: str  # of it, in the line that names the row


RUNNING = {"final_status": "RUNNING"}
ODD_ROWS = [
    OddRow("no object", None, "object"),
    OddRow("a list", [make_row(1)], "object"),
    OddRow("a text", "SUCCEEDED", "object"),
    OddRow("neither id nor status", {"task": make_row(1)}, " id"),
    OddRow("no id, but a link and a status of Runway's", make_row(1, **NO_ID) | RUNNING, " id"),
    OddRow("no id, and an unknown status", {"status": "done", "url": "https://cdn.invalid"}, " id"),
    OddRow(
        "a status that is no text", {"task_id": "a", "final_status": ["FAILED"]}, "final_status"
    ),
    OddRow("an id that is no text", make_row(1, task_id=5), "task_id"),
    OddRow("a stub that is no text", make_row(2, target_filename_stub={}), "stub"),
    OddRow("a prompt that is no text", make_row(3, prompt=["a"]), "prompt"),
]


def test_odd_rows_are_named_and_the_good_ones_served(tmp_path: Path) -> None:
    rows = [odd.row for odd in ODD_ROWS]
    rows += [make_row(8), make_row(9)]
    write_results(tmp_path, rows)
    report = run_json(tmp_path, "--dry-run")
    for number, odd in enumerate(ODD_ROWS, 1):
        said = re.findall(f"row {number}:.*", report["console"])
        assert odd.says in "".join(said), odd
    ids = [make_task_id(number) for number in (2, 3, 8, 9)]
    assert sorted(report["videos"]) == sorted(["", *ids])  # "": a row without a usable id


UNUSABLE_LINKS: list[Any] = [
    None, "", 5, {}, [], [5], [None], "cdn.invalid/a.mp4", "ftp://cdn.invalid/a.mp4",
    "file:///etc/passwd", "javascript:alert(1)", "https:///a.mp4", "https://?_jwt=a",
    "https://u:p@/a.mp4", "https://cdn.invalid:8x/a.mp4", "https://[cdn]/a.mp4",
]  # fmt: skip


def test_succeeded_tasks_without_usable_link_are_found_failed_and_named(
    tmp_path: Path, output_dir: Path
) -> None:
    rows = [make_row(i, video_url=link) for i, link in enumerate(UNUSABLE_LINKS)]
    write_results(tmp_path, rows)
    report = run_json(tmp_path)
    assert report["stats"] == figures(total_succeeded=len(rows), failed_downloads=len(rows))
    assert report["exit_code"] == 3
    assert names_in(output_dir) == set()
    for i, link in enumerate(UNUSABLE_LINKS):
        said = lines_about(report["console"], f"picture_{i}", make_task_id(i))
        assert "video_url" in said, link


def test_unusable_links_are_left_to_those_with_a_key(tmp_path: Path) -> None:
    rows = [make_row(i, video_url=link) for i, link in enumerate(UNUSABLE_LINKS)]
    downloader = make_downloader(tmp_path)
    assert downloader.get_succeeded_tasks({"task_results": rows}) == []
    without_id = make_row(video_url=None, **NO_ID)
    with mock.patch.dict(os.environ, {"RUNWAYML_API_SECRET": API_KEY}):
        assert downloader.get_succeeded_tasks({"task_results": [*rows, without_id]}) == rows


USABLE_LINKS = [
    "https://dnznrvs05pmza.cloudfront.net/0f3b.mp4?_jwt=a.b.c",
    "HTTP://CDN.invalid:65535",
    "https://[2001:db8::1]:8443/a.mp4#t=1",
    "https://user:secret@cdn.invalid?x=@/y",
    "https://bücher.invalid/ü.mp4",
    " https://cdn.invalid/a.mp4\n",
]


def test_unusual_links_are_usable(tmp_path: Path) -> None:
    rows = [make_row(video_url=link) for link in USABLE_LINKS]
    assert make_downloader(tmp_path).get_succeeded_tasks({"task_results": rows}) == rows


@dataclass(frozen=True)
class Quoted(Row):
    link: str  # after the host, as the results file has it
    target: str  # as requests quotes it


QUOTED = [
    Quoted("a space", "a b.mp4?sig=1", "a%20b.mp4?sig=1"),
    Quoted("spaces and quotes in the query", 'c.mp4?a=b; d="e f"', "c.mp4?a=b;%20d=%22e%20f%22"),
    Quoted("spaces in both", "m n.mp4?_jwt=a secret b", "m%20n.mp4?_jwt=a%20secret%20b"),
    Quoted("a backslash", "c\\d.mp4", "c%5Cd.mp4"),
    Quoted("a backslash in the query", "e.mp4?sig=a\\b", "e.mp4?sig=a%5Cb"),
    Quoted("a space of no width", "f.mp4?sig=1\u200b", "f.mp4?sig=1%E2%80%8B"),
    Quoted("letters beyond ASCII", "ü.mp4", "%C3%BC.mp4"),
    Quoted("brackets", "g[1].mp4", "g%5B1%5D.mp4"),
    Quoted("what is quoted stays so", "%20x%2Fy.mp4?a=%2F+%3D", "%20x%2Fy.mp4?a=%2F+%3D"),
    Quoted("a control character", "j\x01.mp4", "j%01.mp4"),
    Quoted("another header", "k\r\nEvil: b", "k%0D%0AEvil:%20b"),
]


def test_a_link_that_must_be_quoted_is_quoted_and_asked_for(tmp_path: Path, cdn: Cdn) -> None:
    rows = []
    for number, case in enumerate(QUOTED):
        cdn.add(case.target.partition("?")[0], WHOLE)
        rows.append(make_row(number, video_url=f"{cdn.url}/{case.link}"))
    write_results(tmp_path, rows)
    report = run_json(tmp_path)
    assert not SECRETS.search(report["console"])
    targets = [request.target for request in cdn.requests]
    for number, case in enumerate(QUOTED):
        assert report["videos"][make_task_id(number)]["status"] == "downloaded", case
        assert targets.count(f"/{case.target}") == 1, case
    for request in cdn.requests:
        assert "Evil" not in request.headers


def sign(payload: bytes) -> str:
    return "https://cdn.invalid/a.mp4?_jwt=h." + base64.urlsafe_b64encode(payload).decode() + ".s"


@dataclass(frozen=True)
class Expiry(Row):
    link: str
    expires: str | None = None


IN_OTHERS = sign(b'{"exp": 9}').replace("?", "?a=b&") + "&c=d"
EXPIRIES = [
    Expiry("whole seconds", sign(b'{"exp": 1750300000}'), "2025-06-19T02:26:40+00:00"),
    Expiry("a fraction", sign(b'{"exp": 1750300000.5}'), "2025-06-19T02:26:40.500000+00:00"),
    Expiry("among others", IN_OTHERS, "1970-01-01T00:00:09+00:00"),
    Expiry("another parameter", "https://cdn.invalid/a.mp4?my_jwt=h.eyJleHAiOjl9.s"),
]
NO_TOKENS = ("", "a..c", "a.é!?.c")
NO_PAYLOADS = (b"\xff\xfe", b"exp", b"[1]", b"{}", b"[" * 100_000)
NO_TIMES = (b"null", b"[9]", b'"a"', b"0", b"-1", b"NaN", b"1e999", b"253402300800", b"9" * 5000)
EXPIRIES += [Expiry(f"token {each!r}", f"https://cdn.invalid/?_jwt={each}") for each in NO_TOKENS]
EXPIRIES += [Expiry(f"payload {each[:20]!r}", sign(each)) for each in NO_PAYLOADS]
EXPIRIES += [Expiry(f"exp {each[:20]!r}", sign(b'{"exp": %s}' % each)) for each in NO_TIMES]


def test_expiry_is_read_from_the_token_and_nonsense_is_none(tmp_path: Path) -> None:
    write_results(tmp_path, [make_row(i, video_url=x.link) for i, x in enumerate(EXPIRIES)])
    videos = run_json(tmp_path, "--dry-run")["videos"]
    for number, case in enumerate(EXPIRIES):
        video = videos[make_task_id(number)]
        assert video["expires"] == case.expires, case


# --- Names ----------------------------------------------------------------------------------------

ORDINARY_STUBS = [
    "elegant_business_classic_tt_video",
    "Ein schönes Bild (2), final!",
    "日本語の動画🎬",
    "cafe\u0301",
    "a.b.mp4",
    "trailing dot.",
    "COM10",
    "nul_video",
    " in and out ",
    "x" * 138,  # 143 bytes with ".json"
    "é" * 69,
]
HOSTILE_STUBS = [
    "a/b\\c",
    "../../../../tmp/up",
    "/etc/passwd",
    "C:\\up",
    "..",
    ".hidden",
    "a\0b",
    "a\r\nb\n",
    "\x1b[31mred\x1b]0;title\x07",
    "a\x9b31m\x7fb",
    '<>:"|?*',
    "a\ud800b\udfff",
    "photo\u202egpj.exe\u2066",
    "a\u2028b\u2029c",
    "\ufeffname",
    "x" * 139,
    "x" * 400,
    "🎬" * 400,
    "a" + "é" * 200,
    "PRN." + "x" * 400,
    "nul",
    "aux.tar.gz",
    "LPT1  .x",
    "COM¹",
    "CONIN$",
    "runway_polling_results_20991231_235959",
]
WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{port}{digit}" for port in ("COM", "LPT") for digit in "0123456789¹²³"
}
NAME_MAX = 143  # bytes; what encrypted home directories and some NAS take


def assert_name_for_any_file_system(name: str) -> None:
    device = name.split(".")[0].rstrip(" ").upper()
    categories = {unicodedata.category(char) for char in name}
    directions = {unicodedata.bidirectional(char) for char in name}
    assert not set(name) & set('<>:"/\\|?*')
    assert not name.startswith((".", "runway_polling_results_"))
    assert device not in WINDOWS_DEVICES
    assert len(name.encode()) <= NAME_MAX
    assert not categories & {"Cc", "Cs", "Zl", "Zp"}
    assert not directions & {"RLO", "LRI"}


def test_an_ordinary_stub_is_used_to_the_letter(tmp_path: Path) -> None:
    stub_of = make_downloader(tmp_path).generate_filename_stub
    stubs = [stub_of(make_row(target_filename_stub=stub)) for stub in ORDINARY_STUBS]
    assert stubs == ORDINARY_STUBS


def give_stubs(rows: Iterable[dict[str, Any]], stubs: Iterable[str]) -> None:
    for row, stub in zip(rows, stubs, strict=True):
        row["target_filename_stub"] = stub


@dataclass(frozen=True)
class Place(Row):
    """A system on which files with any stub are to be saved."""

    env: Mapping[str, str] = field(default_factory=dict)
    is_ascii: bool = False


ASCII_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
PLACES = [
    Place("an ordinary system"),
    Place("names of at most 143 bytes", fault("names of 143 bytes")),
    Place("a locale that can encode ASCII alone", ASCII_LOCALE, is_ascii=sys.platform == "linux"),
]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_any_stub_is_saved_flat_and_whole(tmp_path: Path, cdn: Cdn, place: Place) -> None:
    stubs = HOSTILE_STUBS + ORDINARY_STUBS
    rows = serve(cdn, len(stubs), size=SMALL)
    give_stubs(rows, stubs)
    results = write_results(tmp_path, rows)
    output_dir = tmp_path / "in" / "out"
    where = ("--output-dir", "in/out")

    assert run_process(tmp_path, *where, env=place.env).returncode == 0
    assert run_script(tmp_path, *where).returncode == 0  # finds them all

    assert len(cdn.requests) == len(rows)
    assert names_in(tmp_path) == {"in", results.name}
    assert names_in(tmp_path / "in") == {"out"}
    names = owners(output_dir)
    assert len(names_in(output_dir)) == 2 * len(rows)
    for number in range(len(rows)):
        name = names[make_task_id(number)]
        assert_name_for_any_file_system(f"{name}.json")
        assert name.isascii() or not place.is_ascii
        assert_whole(output_dir, name, make_task_id(number), make_mp4(number, SMALL))


def test_the_default_stub_is_made_of_the_task_id(tmp_path: Path) -> None:
    stub_of = make_downloader(tmp_path).generate_filename_stub
    for stub in (None, "  ", ["a"]):
        row = make_row(task_id="def45678-90ab", target_filename_stub=stub)
        assert stub_of(row) == "video_def45678"
    for task_id in (None, 12345678):
        row = make_row(task_id=task_id, target_filename_stub="")
        assert stub_of(row) == "video_unknown"


# Tasks that want one name.


@dataclass(frozen=True)
class Namesakes(Row):
    """Stubs that some file system takes for one."""

    stubs: Sequence[str]


NAMESAKES = [
    Namesakes("equal", ["s", "s", "s"]),
    Namesakes("equal but for case", ["Same", "same", "SAME"]),
    Namesakes("equal but for Unicode form", ["caf\u00e9", "cafe\u0301", "CAFE\u0301"]),
    Namesakes("equal once made safe", ["a/b", "a\\b", "a_b"]),
    Namesakes("equal once cut", ["x" * 300, "x" * 400, "x" * 500]),
    Namesakes("equal to another's second name", ["s", "s", f"s_{make_task_id(1)[:8]}"]),
]


@pytest.mark.parametrize("case", NAMESAKES, ids=str)
def test_namesakes_each_get_a_name(tmp_path: Path, cdn: Cdn, case: Namesakes) -> None:
    rows = serve(cdn, 3, size=SMALL)
    give_stubs(rows, case.stubs)
    output_dir = tmp_path / "video_outputs"
    write_results(tmp_path, rows)
    assert run_script(tmp_path).returncode == 0
    found = owners(output_dir)
    write_results(tmp_path, rows[::-1])
    assert run_script(tmp_path).returncode == 0
    assert owners(output_dir) == found
    assert len(cdn.requests) == 3

    names = [found[row["task_id"]] for row in rows]
    wanted = make_downloader(tmp_path / "other").generate_filename_stub(rows[0])
    assert names[0] == wanted
    folded = {unicodedata.normalize("NFC", name).casefold() for name in names}
    assert len(folded) == 3
    for number, name in enumerate(names):
        task_id = make_task_id(number)
        assert_name_for_any_file_system(f"{name}.json")
        assert number == 0 or name.endswith(f"_{task_id[:8]}")
        assert_whole(output_dir, name, task_id, make_mp4(number, SMALL))


def third_name(stub: str, identity: str) -> str:
    digest = hashlib.sha256(identity.encode()).hexdigest()
    return f"{stub}_{digest[:16]}"


def make_twins(count: int) -> list[dict[str, Any]]:
    """Rows of tasks with one stub, whose ids begin alike."""
    rows = []
    for number in range(count):
        task_id = f"aaaaaaaa-0000-4000-8000-{number:012}"
        rows.append(make_row(number, task_id=task_id, target_filename_stub="s"))
    return rows


def test_ids_that_begin_alike_get_a_name_of_their_digest(tmp_path: Path) -> None:
    rows = make_twins(4)
    write_results(tmp_path, rows)
    videos = run_json(tmp_path, "--dry-run")["videos"].values()
    names = [Path(video["path"]).stem for video in videos]
    digests = [third_name("s", row["task_id"]) for row in rows[2:]]
    assert names == ["s", "s_aaaaaaaa", *digests]


def test_a_task_whose_three_names_are_taken_fails(tmp_path: Path, cdn: Cdn) -> None:
    (row,) = serve(cdn, 1)
    task_id = row["task_id"]
    stubs = ["picture_0", f"picture_0_{task_id[:8]}", third_name("picture_0", task_id)]
    output_dir = tmp_path / "video_outputs"
    taken = {f"{stub}.json": b"[]" for stub in stubs}
    lay_out(output_dir, taken)
    write_results(tmp_path, [row])
    report = run_json(tmp_path)
    assert report["exit_code"] == 3
    assert "picture_0" in report["videos"][task_id]["error"]["reason"]
    left = {path.name: path.read_bytes() for path in output_dir.iterdir()}
    assert left == taken


def test_a_task_without_id_gets_a_name_of_the_digest_of_its_link(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 2, size=SMALL)
    give_stubs(rows, ["s", "s"])
    del rows[1]["task_id"]
    output_dir = tmp_path / "video_outputs"
    write_results(tmp_path, rows)
    for _ in range(2):
        assert run_script(tmp_path).returncode == 0
    (video,) = output_dir.glob("s_*.mp4")
    assert re.fullmatch("s_[0-9a-f]{8,16}", video.stem)
    assert video.read_bytes() == make_mp4(1, SMALL)
    assert len(cdn.requests) == 2


def test_an_id_is_no_path_either(tmp_path: Path, output_dir: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 2, size=SMALL)
    give_stubs(rows, ["s", "s"])
    rows[1]["task_id"] = "../../\x1b/up"
    results = write_results(tmp_path, rows)
    assert run_script(tmp_path).returncode == 0
    assert names_in(tmp_path) == {"video_outputs", results.name}
    names = owners(output_dir).values()
    for name in names:
        assert_name_for_any_file_system(f"{name}.json")


def count_calls(function: Callable[[], object]) -> int:
    """How many functions ``function`` calls in this thread: its work, on any machine."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def test_2000_tasks_of_one_stub_plan_in_time(tmp_path: Path) -> None:
    calls = {}
    for count in (500, 2000):
        directory = tmp_path / str(count)
        directory.mkdir()
        write_results(directory, make_twins(count))
        calls[count] = count_calls(lambda: run_script(directory, "--dry-run", "-q"))  # noqa: B023
    assert calls[2000] < 6 * calls[500]  # in proportion: 4; a plan that counts up: 16


def test_61_tasks_over_21_stubs_keep_their_names_over_two_nights(tmp_path: Path, cdn: Cdn) -> None:
    output_dir = tmp_path / "video_outputs"
    rows = serve(cdn, 122, size=SMALL)
    stubs = [f"style_{number % 61 % 21}" for number in range(122)]
    give_stubs(rows, stubs)

    write_results(tmp_path, rows[:61], "20250610_040158")
    assert run_script(tmp_path).returncode == 0
    first_night = owners(output_dir)
    write_results(tmp_path, rows[61:], "20250611_040158")
    assert run_script(tmp_path).returncode == 0
    names = owners(output_dir)

    assert len(first_night) == 61
    assert len(names) == 122
    assert names.items() > first_night.items()
    assert set(stubs) < set(names.values())
    for row, stub in zip(rows, stubs, strict=True):
        task_id = row["task_id"]
        assert names[task_id] in (stub, f"{stub}_{task_id[:8]}")

    assert run_script(tmp_path, "--all").returncode == 0
    assert owners(output_dir) == names
    assert len(cdn.requests) == 122
    for number, row in enumerate(rows):
        task_id = row["task_id"]
        assert_whole(output_dir, names[task_id], task_id, make_mp4(number, SMALL))


# --- Metadata -------------------------------------------------------------------------------------

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


@dataclass(frozen=True)
class Written(Row):
    """A row that differs from `EXAMPLE_ROW`, and where its metadata differs from the example."""

    changes: Mapping[str, Any] = field(default_factory=dict)  # None takes a field away
    instead_of: str = ""
    stands: str = ""


SEED = '"seed": null'
PROMPT = '"prompt": "soft focus transition, elegant reveal, ..."'
STUB = '"target_filename_stub": "elegant_business_classic_tt_video"'
LAST = '46.656953"\n  }'
EXTRAS = """46.656953",
    "cluster_id": {
      "é": 0
    },
    "theme": "rain",
    "duration": null,
    "resolution": "720p"
  }"""
RUNWAYS_OWN = {
    "id": EXAMPLE_ROW["task_id"],
    "status": "SUCCEEDED",
    "createdAt": EXAMPLE_ROW["timestamp"],
    "promptText": EXAMPLE_ROW["prompt"],
    "output": [EXAMPLE_ROW["video_url"], "https://cdn.invalid/second.mp4"],
} | dict.fromkeys(["task_id", "final_status", "timestamp", "prompt", "video_url"])


def without(key: str) -> Written:
    value = f'": "{EXAMPLE_ROW[key]}"'
    return Written(f"no {key}", {key: None}, value, '": ""')


WRITTEN = [
    Written("the documented one"),
    Written("a seed of zero", {"seed": 0}, SEED, '"seed": 0'),
    Written("NaN is left out", {"seed": float("nan")}),
    Written("what no JSON can hold is left out", {"theme": {1}, "cluster_id": [float("inf")]}),
    Written("text as it is", {"prompt": 'é 🎬 "\n'}, PROMPT, '"prompt": "é 🎬 \\"\\n"'),
    Written("a lone surrogate", {"prompt": "\ud800 é"}, PROMPT, '"prompt": "\\ud800 é"'),
    Written("a prompt of another type", {"prompt": 5}, PROMPT, '"prompt": ""'),
    Written("the row's stub", {"target_filename_stub": "a/b"}, STUB, STUB[:24] + '"a/b"'),
    Written("no stub", {"target_filename_stub": None}, STUB, STUB[:24] + '""'),
    Written("Runway's own answer", RUNWAYS_OWN, '"PENDING"', '"SUCCEEDED"'),
    without("image_path"),
    without("prompt"),
    without("timestamp"),
    without("completion_time"),
    without("status"),
    Written(
        "extras in their order, null included",
        {"resolution": "720p", "duration": ..., "x": 1, "theme": "rain", "cluster_id": {"é": 0}},
        LAST,
        EXTRAS,
    ),
]


@pytest.mark.parametrize("case", WRITTEN, ids=str)
def test_metadata_is_exact(tmp_path: Path, case: Written) -> None:
    changed = EXAMPLE_ROW | dict(case.changes)
    kept = {key: value for key, value in changed.items() if value is not None}
    row = {key: None if value is ... else value for key, value in kept.items()}
    video = tmp_path / "elegant_business_classic_tt_video.mp4"
    video.write_bytes(EXAMPLE_VIDEO)
    path = tmp_path / "a.json"

    assert make_downloader(tmp_path).create_metadata_json(row, video, path) is True

    metadata = strict_json(path.read_bytes())
    written = datetime.fromisoformat(metadata["download_timestamp"])
    age = datetime.now() - written  # both are naive
    assert abs(age.total_seconds()) < 60
    assert case.instead_of in EXAMPLE_METADATA
    expected = EXAMPLE_METADATA
    if case.instead_of:
        expected = expected.replace(case.instead_of, case.stands)
    stamp = written.isoformat(timespec="microseconds")
    expected = expected.replace("2025-06-17T04:05:53.806609", stamp)
    assert path.read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("env", [{}, ASCII_LOCALE], ids=["UTF-8", "a locale of ASCII alone"])
def test_a_run_writes_the_same_metadata(tmp_path: Path, cdn: Cdn, env: dict[str, str]) -> None:
    link = cdn.add("0.mp4", EXAMPLE_VIDEO)
    row = EXAMPLE_ROW | {"video_url": link, "prompt": "élégant \ud800", "seed": 5}
    write_results(tmp_path, [row])
    assert run_process(tmp_path, env=env).returncode == 0

    output_dir = tmp_path / "video_outputs"
    video = output_dir / "elegant_business_classic_tt_video.mp4"
    copy = tmp_path / "copy.json"
    make_downloader(output_dir).create_metadata_json(row, video, copy)
    texts = []
    for path in (video.with_suffix(".json"), copy):
        text = path.read_text(encoding="utf-8")
        texts.append(re.sub('"download_timestamp": "[^"]*"', "", text))
    assert texts[0] == texts[1]


@dataclass(frozen=True)
class LostVideo:
    """A video that is gone, while its metadata is there."""

    directory: Path
    metadata: Path

    def bring_back(self) -> None:
        assert run_script(self.directory).returncode == 0
        assert_whole(self.metadata.parent, "picture_0", make_task_id(0), make_mp4(0, SMALL))


@pytest.fixture
def lost_video(tmp_path: Path, cdn: Cdn) -> LostVideo:
    write_results(tmp_path, serve(cdn, 1, size=SMALL))
    lost = LostVideo(tmp_path, tmp_path / "video_outputs" / "picture_0.json")
    lost.bring_back()
    lost.metadata.with_suffix(".mp4").unlink()
    return lost


def test_metadata_of_a_lost_video_stays_but_for_file_info(lost_video: LostVideo) -> None:
    metadata = json.loads(lost_video.metadata.read_bytes())
    edited = {"rated": 5, **metadata, "prompt": "edited by hand"}
    outdated = {"size_bytes": 1, "size_mb": 0.0, "sha256": "0"}
    lost_video.metadata.write_text(json.dumps(edited | {"file_info": outdated}))
    lost_video.bring_back()
    now = json.loads(lost_video.metadata.read_bytes())
    assert list(now.items()) == list(edited.items())


def test_metadata_that_is_true_is_not_touched(lost_video: LostVideo) -> None:
    by_hand = lost_video.metadata.read_bytes().replace(b"\n", b"\n\n")
    lost_video.metadata.write_bytes(by_hand)
    lost_video.bring_back()
    assert lost_video.metadata.read_bytes() == by_hand


# --- The directory: what lies there, and what becomes of a video ----------------------------------

MINE = make_row(0, target_filename_stub="s", task_id="f645e2df-b639")
OTHERS = make_row(1, target_filename_stub="s")
ALL_OURS = {"s.json": MINE, "s.mp4": WHOLE}
ALL_OTHERS = {"s.json": OTHERS, "s.mp4": WHOLE}
RENAMED = {"holiday.json": MINE, "holiday.mp4": WHOLE}
SECOND = "s_f645e2df"
THIRD = f"s_{hashlib.sha256(b'f645e2df-b639').hexdigest()[:16]}"
NEW = make_mp4("new", SMALL + 100)  # what the CDN has
OF_THE_SAME_SIZE = make_mp4("another", len(NEW))
ANOTHER_VIDEO = r"s\.mp4 .*another (task's )?video"
ANOTHER_TASK = r"s\.json .*another task's record"
ANOTHER_PROGRAM = r"s\.json .*another program's"


@dataclass(frozen=True)
class Found(Row):
    """What lies in the directory when a run for `MINE` begins, and what becomes of the video.

    Whatever is not the task's own stays as it is, to the byte.
    """

    entries: Mapping[str, Any]  # as `lay_out` takes them
    name: str = "s"  # of the video at the end
    says: str = ""  # pattern in the lines
    ends: str = "downloaded"  # or "adopted" (got metadata), "untouched", "failed"
    replies: Sequence[Reply] = (GOOD,)
    requests: int = 1


def untouched(sentence: str, entries: Mapping[str, Any], name: str) -> Found:
    """The task's video is there: nothing is asked for and nothing written."""
    return Found(sentence, entries, name, ends="untouched", requests=0)


def taken(sentence: str, entries: Mapping[str, Any], says: str) -> Found:
    """The wanted name is somebody else's, so the video gets another one."""
    return Found(sentence, entries, SECOND, f"Saved under.*{says}")


def foreign(sentence: str, content: Any, says: str = ANOTHER_PROGRAM) -> Found:
    """The wanted name is held by a ``.json`` of some other program."""
    return taken(sentence, {"s.json": content}, says)


def asked(sentence: str, reply: Reply, ends: str, name: str = "s", says: str = "") -> Found:
    """A whole video without metadata has the wanted name: the server is asked for its size."""
    return Found(sentence, {"s.mp4": OF_THE_SAME_SIZE}, name, says, ends, [reply])


def sparse(path: Path) -> None:
    """60 GB that take no room."""
    with path.open("wb") as file:
        file.truncate(60 << 30)


def large(path: Path) -> None:
    """What would be the task's metadata if it had not more than 10 MB."""
    path.write_bytes(make_metadata(MINE) + b" " * 11_000_000)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    os.mkfifo(path)


FREE = [
    Found("nothing there", {}),
    Found("our metadata, no video", {"s.json": MINE}),
    Found("our metadata, an empty video", ALL_OURS | {"s.mp4": b""}),
    Found("an empty video", {"s.mp4": b""}),
    Found("empty metadata", {"s.json": b""}),
    Found("empty metadata, an empty video", {"s.json": b"", "s.mp4": b""}),
    Found("a video of zeros without metadata", {"s.mp4": bytes(999)}),
    Found("a video cut short without metadata", {"s.mp4": WHOLE[:-9]}),
    Found("a page of HTML without metadata", {"s.mp4": b"<html>"}),
    Found("ours, renamed, without its video", {"holiday.json": MINE}, "holiday"),
    Found("text under a name with our id", ALL_OTHERS | {f"{SECOND}.mp4": b"text"}, SECOND),
]
TWO_CASES = {
    "Holiday.json": MINE,
    "Holiday.mp4": WHOLE,
    "holiday.json": OTHERS,
    "holiday.mp4": WHOLE,
}
WITH_MY_ID = {f"{SECOND}.json": MINE, f"{SECOND}.mp4": WHOLE}
THERE = [
    untouched("ours, edited in place", ALL_OURS | {"s.mp4": b"edited"}, "s"),
    untouched("ours, renamed", RENAMED, "holiday"),
    untouched("ours, renamed; another's instead", RENAMED | ALL_OTHERS, "holiday"),
    untouched("ours, another's in another case", TWO_CASES, "Holiday"),
    untouched("ours twice, once finished", RENAMED | {"s.json": MINE}, "holiday"),
    untouched("ours in another case", {"S.json": MINE, "S.mp4": WHOLE}, "S"),
    untouched("ours under the second name", ALL_OTHERS | WITH_MY_ID, SECOND),
]
TAKEN = [
    taken("another task's video", ALL_OTHERS, ANOTHER_VIDEO),
    taken("another task's record", {"s.json": OTHERS}, ANOTHER_TASK),
    taken("a name in another case", {"S.mp4": WHOLE}, "S.mp4"),
    taken("a directory", {"s.mp4": os.mkdir}, "s.mp4"),
    taken("our metadata, a directory", ALL_OURS | {"s.mp4": os.mkdir}, "s.mp4"),
    taken("a pipe", {"s.mp4": pipe}, "s.mp4"),
    taken("a loop", {"s.mp4": loop}, "s.mp4"),
    Found("two names taken", ALL_OTHERS | {f"{SECOND}.json": b"[]"}, THIRD, "Saved under"),
    taken("another's record in another case", {"S.json": OTHERS}, r"S\.json"),
    taken("another program's .json in another case", {"S.json": b"[]"}, r"S\.json"),
]
FOREIGN_JSON = [
    foreign("a list", b"[]"),
    foreign("an object that is no metadata", b'{"task_id": "f645e2df-b639"}'),
    foreign("absurd nesting", b"[" * 200_000),
    foreign("an id of another type", b'{"runway_task_json": {"task_id": 5}}'),
    foreign("binary", b"\xff\xfe\0"),
    foreign("metadata that was cut", b'{"runway_task_json": {"task_id": "f645e2df-b639"'),
    foreign("a directory as metadata", os.mkdir, says="s.json"),
    foreign("a pipe as metadata", pipe, says="s.json"),
    foreign("60 GB of nothing", sparse),
    foreign("11 MB", large),
]
IN_CHUNKS = Reply(framing="chunked")
ZIPPED = headed("Content-Encoding", "gzip", body=gzip.compress(NEW).ljust(len(NEW), b"\0"))
SIZE_IN_A_206 = Reply(206, NEW, {"Content-Range": f"bytes 0-{len(NEW) - 1}/{len(NEW)}"})
CUT_AT_FIRST = [Reply(send=1000), GOOD]
ORPHANS = [
    asked("the server announces its size", Reply(pause_at=0), "adopted"),
    asked("the server fails", refusal(500), "failed", says="HTTP 500"),
    asked("no size is announced", IN_CHUNKS, "downloaded", SECOND),
    asked("the size of an encoding is announced", ZIPPED, "downloaded", SECOND),
    asked("the size comes with a 206 that nobody asked for", SIZE_IN_A_206, "downloaded", SECOND),
    taken("a video of another size", {"s.mp4": WHOLE}, ANOTHER_VIDEO),
    taken("a WebM of another size", {"s.mp4": WEBM}, ANOTHER_VIDEO),
    replace(taken("cut at first", {"s.mp4": WHOLE}, ""), replies=CUT_AT_FIRST, requests=2),
    *[
        asked(f"a dead link: {code}", refusal(code), "adopted", says=str(code))
        for code in (401, 403, 404, 410)
    ],
]


@unix_only
@pytest.mark.parametrize("found", [*FREE, *THERE, *TAKEN, *FOREIGN_JSON, *ORPHANS], ids=str)
def test_a_run_goes_by_what_lies_in_the_directory(tmp_path: Path, cdn: Cdn, found: Found) -> None:
    output_dir = tmp_path / "video_outputs"
    lay_out(output_dir, found.entries)
    before = snapshot(output_dir)
    link = cdn.add("0.mp4", NEW, *found.replies)
    write_results(tmp_path, [MINE | {"video_url": link}])
    retries = len(found.replies) - 1

    report = run_json(tmp_path, "--retries", str(retries))

    check_said(report, found)
    assert len(cdn.requests) == found.requests
    check_files(output_dir, found, before)


def check_said(report: Mapping[str, Any], found: Found) -> None:
    """The outcome is the one of ``found``, and the lines say why."""
    (video,) = report["videos"].values()
    said = report["console"]
    if found.ends in ("untouched", "adopted"):
        assert video["status"] == "exists", said
    else:
        assert video["status"] == found.ends, said
    if found.ends in ("adopted", "downloaded"):
        assert video["path"] == os.path.join("video_outputs", f"{found.name}.mp4")
    assert re.search(found.says, said), said
    if found.name not in (SECOND, THIRD):
        assert "Saved under" not in said


def check_files(output_dir: Path, found: Found, before: Mapping[str, Any]) -> None:
    """The video is there, and all else is as it was ``before``, a `snapshot`."""
    own = set()
    if found.ends in ("adopted", "downloaded"):
        name = f"{found.name}.mp4"
        body = NEW if found.ends == "downloaded" else found.entries[name]
        assert_whole(output_dir, found.name, MINE["task_id"], body)
        own = {name, f"{found.name}.json"}
    directory = {"."}
    after = snapshot(output_dir)
    others = before.keys() - own - directory
    assert after.keys() == own | others | directory
    for name in others:
        assert after[name] == before[name], f"{name} was changed"


@unix_only
def test_a_whole_video_without_metadata_or_link_is_adopted(tmp_path: Path) -> None:
    output_dir = tmp_path / "video_outputs"
    lay_out(output_dir, {"s.mp4": WHOLE})
    row = {key: value for key, value in MINE.items() if key != "video_url"}
    write_results(tmp_path, [row])
    result = run_script(tmp_path)
    assert result.returncode == 0
    assert "video_url" in result.stdout
    assert_whole(output_dir, "s", MINE["task_id"], WHOLE)


# --- Owners: which task a file in the directory belongs to ----------------------------------------

MY_ID = MINE["task_id"]
OTHERS_ID = OTHERS["task_id"]
ORPHAN = {"s.mp4": WHOLE}


def run_for(directory: Path, *rows: Any, **how: Any) -> dict[str, Any]:
    """What ``--json`` tells of a run for ``rows``."""
    write_results(directory, rows)
    return run_json(directory, "--retries", "0", **how)


def linked(row: dict[str, Any], link: str) -> dict[str, Any]:
    return row | {"video_url": link}


def test_a_whole_video_under_a_name_with_the_id_is_adopted(tmp_path: Path, cdn: Cdn) -> None:
    output_dir = tmp_path / "video_outputs"
    lay_out(output_dir, {"video_def45678.mp4": WHOLE})
    link = cdn.add("0", NEW)
    row = make_row(task_id="def45678-90ab", target_filename_stub=None, video_url=link)
    stats = run_for(tmp_path, row)["stats"]
    assert stats == figures(total_succeeded=1, already_exists=1)
    assert cdn.requests == []
    assert_whole(output_dir, "video_def45678", "def45678-90ab", WHOLE)


def test_a_short_id_within_a_name_is_no_claim_to_it(
    tmp_path: Path, output_dir: Path, cdn: Cdn
) -> None:
    lay_out(output_dir, {"clip_12.mp4": WHOLE})
    link = cdn.add("0", NEW)
    row = make_row(task_id="1", target_filename_stub="clip_12", video_url=link)
    stats = run_for(tmp_path, row)["stats"]
    assert stats == figures(total_succeeded=1, downloaded=1)


def test_a_task_without_id_owns_its_video_by_the_link(
    tmp_path: Path, output_dir: Path, cdn: Cdn
) -> None:
    link = cdn.add("a", NEW)
    old = make_row(task_id=None, video_url=link)
    fresh = make_row(task_id=None, video_url=f"{link}.fresh")
    other = make_row(task_id=None, video_url=cdn.add("b", NEW))
    lay_out(output_dir, {"picture_0.json": old, "picture_0.mp4": WHOLE})
    first = run_for(tmp_path, fresh, other)["stats"]
    second = run_for(tmp_path, fresh, other)["stats"]
    assert first == figures(total_succeeded=2, downloaded=1, already_exists=1)
    assert second == figures(total_succeeded=2, already_exists=2)
    assert len(cdn.requests) == 1
    assert cdn.asked("b")


def test_a_row_without_id_and_link_takes_nothing(tmp_path: Path) -> None:
    output_dir = tmp_path / "video_outputs"
    lay_out(output_dir, {"picture_0.mp4": WHOLE})
    row = make_row(task_id=None, video_url=None)
    stats = run_for(tmp_path, row, row)["stats"]
    assert stats == figures(total_succeeded=2, failed_downloads=2)
    assert names_in(output_dir) == {"picture_0.mp4"}


# A video without metadata that several tasks want.


def test_one_orphan_is_taken_for_one_task_alone(tmp_path: Path, cdn: Cdn) -> None:
    output_dir = tmp_path / "video_outputs"
    lay_out(output_dir, ORPHAN)
    mine = linked(MINE, cdn.add("mine", WHOLE))
    others = linked(OTHERS, cdn.add("others", WHOLE))
    stats = run_for(tmp_path, mine, others)["stats"]
    assert stats == figures(total_succeeded=2, downloaded=1, already_exists=1)
    assert owners(output_dir).keys() == {MY_ID, OTHERS_ID}
    assert len(cdn.requests) == 2


def test_an_orphan_goes_to_the_task_with_its_size(tmp_path: Path, cdn: Cdn) -> None:
    output_dir = tmp_path / "video_outputs"
    lay_out(output_dir, ORPHAN)
    others = linked(OTHERS, cdn.add("others", NEW))
    mine = linked(MINE, cdn.add("mine", WHOLE))
    stats = run_for(tmp_path, others, mine)["stats"]
    assert stats == figures(total_succeeded=2, downloaded=1, already_exists=1)
    assert owners(output_dir)[MY_ID] == "s"
    assert len(cdn.requests) == 2


@pytest.mark.parametrize("dead", [refusal(403), None], ids=["dead", "missing"])
def test_an_orphan_that_two_want_is_no_ones_by_a_dead_link(
    tmp_path: Path, cdn: Cdn, dead: Reply | None
) -> None:
    output_dir = tmp_path / "video_outputs"
    lay_out(output_dir, ORPHAN)
    mine = linked(MINE, cdn.add("mine", WHOLE, dead) if dead else "")
    others = linked(OTHERS, cdn.add("others", NEW))
    videos = run_for(tmp_path, mine, others)["videos"]
    assert videos[MY_ID]["status"] == "failed"
    assert videos[OTHERS_ID]["status"] == "downloaded"
    assert owners(output_dir).keys() == {OTHERS_ID}
    assert (output_dir / "s.mp4").read_bytes() == WHOLE


def test_an_orphan_is_asked_about_by_a_fresh_link(tmp_path: Path, cdn: Cdn, api: RunwayApi) -> None:
    output_dir = tmp_path / "video_outputs"
    lay_out(output_dir, ORPHAN)
    mine = linked(MINE, cdn.add("dead", b"", refusal(403)))
    api.answer(MY_ID, make_answer(MY_ID, cdn.add("fresh", NEW)))
    stats = run_for(tmp_path, mine, env=api.env)["stats"]
    assert stats == figures(total_succeeded=1, downloaded=1)
    assert owners(output_dir) == {MY_ID: SECOND}


# Metadata that cannot be read is not somebody else's.


@pytest.mark.parametrize("entries", [ALL_OURS, {"s.json": MINE}], ids=["complete", "no video"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_one_read_error_costs_no_name(
    tmp_path: Path, cdn: Cdn, number: int, entries: dict[str, Any]
) -> None:
    output_dir = tmp_path / "video_outputs"
    lay_out(output_dir, entries)
    mine = linked(MINE, cdn.add("mine", WHOLE))
    write_results(tmp_path, [mine])
    broken = fault("read error", calls=["open"], of="s.json", at=number)
    (exit_code,) = run_forked([Job(tmp_path, env=broken)])
    assert exit_code in (0, 3)
    visible = names_in(output_dir) - hidden_in(output_dir)
    assert visible <= {"s.json", "s.mp4"}

    assert run_script(tmp_path).returncode == 0
    assert names_in(output_dir) == {"s.json", "s.mp4"}
    assert (output_dir / "s.mp4").read_bytes() == WHOLE


@unix_only
def test_metadata_that_may_not_be_read_fails_its_task_alone(tmp_path: Path, cdn: Cdn) -> None:
    output_dir = tmp_path / "video_outputs"
    lay_out(output_dir, {"s.json": MINE})
    metadata = output_dir / "s.json"
    metadata.chmod(0)
    rows = serve(cdn, 1, size=SMALL)
    rows.append(linked(MINE, cdn.add("mine", WHOLE)))

    how = {"run": run_process, "before": without_privileges()}
    videos = run_for(tmp_path, *rows, **how)["videos"]

    assert videos[MY_ID]["status"] == "failed"
    reason = videos[MY_ID]["error"]["reason"].lower()
    assert re.search(r"s\.json.*permission denied", reason)
    assert names_in(output_dir) == {"s.json", "picture_0.json", "picture_0.mp4"}
    assert cdn.asked("mine") == []

    metadata.chmod(0o644)
    assert run_script(tmp_path).returncode == 0
    assert owners(output_dir)[MY_ID] == "s"


# --- Kills: a run that ends before any of its steps costs nothing ---------------------------------

KILLED_ROW = make_row(target_filename_stub="s")
KILLED_BYTES = 3_000  # few writes, thus few steps
CUT_VIDEO = {"s.mp4": WHOLE[:-9]}
EMPTY = {"s.json": KILLED_ROW, "s.mp4": b""}
NO_LINKS = fault("no hard links")
CUT_ONCE = [Reply(send=KILLED_BYTES // 2), GOOD]


@dataclass(frozen=True)
class Scene(Row):
    """A run that is killed before its first step, another before its second, and so on."""

    entries: Mapping[str, Any] = field(default_factory=dict)  # before the run, as for `lay_out`
    env: dict[str, str] = field(default_factory=dict)
    replies: Sequence[Reply] = (GOOD,)
    is_deleted: bool = False  # somebody edits and deletes the video before the rerun
    is_adopted: bool = False  # what was there stays


SCENES = [
    Scene("a download"),
    Scene("a download; the video is edited and deleted before the rerun", is_deleted=True),
    Scene("a download without hard links", env=NO_LINKS),
    Scene("an empty video gives way, without hard links", EMPTY, env=NO_LINKS),
    Scene("a broken video gives way", CUT_VIDEO),
    Scene("a cut video is let go", replies=CUT_ONCE),
    Scene("a video is adopted", {"s.mp4": WHOLE}, replies=[refusal(403)], is_adopted=True),
]


@dataclass(frozen=True)
class Killed:
    """A directory in which a run of ``scene`` was to be killed before its step ``step``."""

    scene: Scene
    cdn: Cdn
    directory: Path
    step: int

    @property
    def output_dir(self) -> Path:
        return self.directory / "video_outputs"

    @property
    def served(self) -> bytes:
        return make_mp4(self.step, KILLED_BYTES)

    def prepare(self) -> Job:
        """Lay the directory out for a run that is killed."""
        link = self.cdn.add(f"{self.step}.mp4", self.served, *self.scene.replies)
        self.directory.mkdir()
        write_results(self.directory, [KILLED_ROW | {"video_url": link}])
        lay_out(self.output_dir, self.scene.entries)
        env = self.scene.env | fault("kill", at_step=self.step)
        return Job(self.directory, ["--retries", "0"], env)

    def check_whole(self) -> None:
        """The video is there with its metadata, as served or, if it was adopted, as it was."""
        body = self.scene.entries["s.mp4"] if self.scene.is_adopted else self.served
        assert_whole(self.output_dir, "s", make_task_id(0), body)

    def check_visible(self) -> None:
        """If a video has its name, it is whole, or was there before."""
        video = self.output_dir / "s.mp4"
        content = video.read_bytes() if video.exists() else b""
        was_there = content == self.scene.entries.get("s.mp4")
        if content and not was_there:
            self.check_whole()

    def edit_and_delete(self) -> None:
        """What a user does with the video, if it is there: in place, then with its metadata."""
        video = self.output_dir / "s.mp4"
        if video.exists():
            with video.open("r+b") as file:
                file.seek(500)  # it looks whole from its beginning
                file.write(b"edited" * 100)
                file.truncate(KILLED_BYTES // 2)
            video.unlink()
            video.with_suffix(".json").unlink()

    def check_rerun(self) -> None:
        """The video is there and nothing else, and was asked for twice at most."""
        self.check_whole()
        assert names_in(self.output_dir) == {"s.mp4", "s.json"}
        requests = self.cdn.asked(f"{self.step}.mp4")
        assert len(requests) <= 2
        if self.scene.replies is not CUT_ONCE:  # what a killed run left is not resumed
            assert not any(request.range_start for request in requests)


@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_a_kill_before_any_step_costs_nothing(tmp_path: Path, cdn: Cdn, scene: Scene) -> None:
    runs: list[Killed] = []
    exit_codes: list[int | None] = []
    for first in range(1, 100, 4):
        steps = range(first, first + 4)
        batch = [Killed(scene, cdn, tmp_path / str(step), step) for step in steps]
        exit_codes += run_forked([run.prepare() for run in batch])
        runs += batch
        if exit_codes[-1] != -signal.SIGKILL:  # it has fewer steps
            break

    assert exit_codes.count(-signal.SIGKILL) > 10
    for run in runs:
        run.check_visible()
        if scene.is_deleted:
            run.edit_and_delete()
    reruns = [Job(run.directory, (), scene.env) for run in runs]
    assert run_forked(reruns) == [0] * len(reruns)
    for run in runs:
        run.check_rerun()


def test_a_kill_before_any_step_of_the_gallery_leaves_nothing_for_long(
    tmp_path: Path, cdn: Cdn
) -> None:
    rows = serve(cdn, 2)
    cdn.replies["/1.mp4"] = [refusal(404)]
    write_results(tmp_path, rows)
    assert run_script(tmp_path).returncode == 3
    output_dir = tmp_path / "video_outputs"

    kills = 0
    while True:
        env = fault("kill", at_step=kills + 1)
        (exit_code,) = run_forked([Job(tmp_path, ["--gallery"], env)])
        if exit_code != -signal.SIGKILL:
            break
        kills += 1
        assert run_script(tmp_path).returncode == 3
        assert hidden_in(output_dir) == set(), f"left by a kill before step {kills}"

    assert exit_code == 3
    assert kills > 3
    assert names_in(output_dir) == {"index.html", "picture_0.json", "picture_0.mp4"}


def test_kills_at_random_moments_cost_nothing(tmp_path: Path) -> None:
    bodies = [make_mp4(i, BIG) for i in range(16)]
    rng = random.Random(0)
    output_dir = tmp_path / "video_outputs"
    slow = Reply(bytes_per_second=6_000_000)
    for reply in [slow, slow, slow, GOOD]:
        with Cdn() as cdn:
            write_results(tmp_path, serve(cdn, 16, reply, size=BIG))
            enough = bytes_in(output_dir) + rng.choice([BIG // 2, BIG, 2 * BIG])
            run = start_forked(Job(tmp_path, ["--workers", "4"]))
            if reply is slow:
                wait_until(lambda: bytes_in(output_dir) >= enough)  # noqa: B023
                run.kill()
            run.join(60)
            assert run.exitcode == (-signal.SIGKILL if reply is slow else 0)
            assert not any(request.range_start for request in cdn.requests)
        for video in output_dir.glob("*.mp4"):
            number = int(video.stem.removeprefix("picture_"))
            assert_whole(output_dir, video.stem, make_task_id(number), bodies[number])
    assert_home(output_dir, 16, BIG)


# --- Disks: what a file system cannot do, and what goes wrong in it -------------------------------


@dataclass(frozen=True)
class Disk(Row):
    """A file system on which everything comes home all the same."""

    env: dict[str, str]


RCLONE_MOUNT = (
    fault("no hard links")
    | fault("no chmod")
    | fault("inodes change")
    | fault("no unlink of open files")
    | fault("no fsync")
)
DISKS = [
    Disk("nothing wrong", {}),
    Disk("no hard links", fault("no hard links")),
    Disk("no fsync", fault("no fsync")),
    Disk("no chmod", fault("no chmod")),
    Disk("open files cannot be removed", fault("no unlink of open files")),
    Disk("a file gets another inode every time", fault("inodes change")),
    Disk("an rclone mount", RCLONE_MOUNT),
    Disk("names of at most 143 bytes", fault("names of 143 bytes")),
    Disk("hard links fail with an I/O error", fault("no hard links", error="EIO")),
]


@pytest.mark.parametrize("disk", DISKS, ids=str)
def test_all_come_home_on_any_disk(tmp_path: Path, cdn: Cdn, disk: Disk) -> None:
    rows = serve(cdn, 5, size=SMALL)
    cdn.replies["/1.mp4"] = [Reply(send=1000), GOOD]  # cut, and resumed
    for row in rows[3:]:
        row["target_filename_stub"] = "x" * 300
    write_results(tmp_path, rows)
    output_dir = tmp_path / "video_outputs"
    lay_out(output_dir, {"picture_2.json": rows[2], "picture_2.mp4": b""})

    assert run_forked([Job(tmp_path, (), disk.env)]) == [0]

    console = (tmp_path / "console.txt").read_text(encoding="utf-8")
    assert "Videos downloaded: 5\n" in console
    assert cdn.asked("1.mp4")[-1].range_start == 1000
    assert len(cdn.requests) == 6
    names = owners(output_dir)
    for number, row in enumerate(rows):
        task_id = row["task_id"]
        assert_whole(output_dir, names[task_id], task_id, make_mp4(number, SMALL))
    assert len(names_in(output_dir)) == 10  # nothing hidden either


def run_on(env: dict[str, str], directory: Path) -> int | None:
    (exit_code,) = run_forked([Job(directory, ["--retries", "0"], env)])
    return exit_code


@pytest.mark.parametrize("disk", DISKS, ids=str)
def test_a_later_run_resumes_on_any_disk(
    tmp_path: Path, output_dir: Path, cdn: Cdn, disk: Disk
) -> None:
    write_results(tmp_path, serve(cdn, 1, Reply(send=HALF), GOOD))
    assert run_on(disk.env, tmp_path) == 3
    assert run_on(disk.env, tmp_path) == 0
    starts = [request.range_start for request in cdn.requests]
    assert starts == [None, HALF]
    assert_home(output_dir, 1)


def test_no_part_is_trusted_after_an_fsync_error(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1))
    output_dir = tmp_path / "video_outputs"
    assert run_on(fault("fsync error"), tmp_path) != 0
    assert not list(output_dir.glob("*.mp4"))
    before = len(cdn.requests)
    assert run_script(tmp_path).returncode == 0
    (request,) = cdn.requests[before:]
    assert request.range_start is None
    assert_home(output_dir, 1)


@pytest.mark.parametrize("number", range(1, 6))
def test_any_one_fsync_error_costs_no_video(tmp_path: Path, cdn: Cdn, number: int) -> None:
    write_results(tmp_path, serve(cdn, 1))
    output_dir = tmp_path / "video_outputs"
    run_on(fault("fsync error", at=number), tmp_path)
    if (output_dir / "picture_0.mp4").exists():
        assert_whole(output_dir, "picture_0", make_task_id(0), make_mp4(0))
    assert run_script(tmp_path).returncode == 0
    assert not any(request.range_start for request in cdn.requests)
    assert_home(output_dir, 1)


def test_a_close_that_fails_costs_no_video(tmp_path: Path, output_dir: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1))
    env = fault("close error", of="*.part", at=1)
    assert run_forked([Job(tmp_path, (), env)]) == [0]
    assert len(cdn.requests) == 1
    assert_home(output_dir, 1)


# A full disk.


@dataclass(frozen=True)
class Full(Row):
    """A disk that is full at some moment."""

    env: dict[str, str]
    at_least: int = 0  # videos that are home by then
    hangs: bool = False  # so does the server, with one of the videos


FULL = [
    Full("from the start", fault("disk full", at_bytes=0)),
    Full("at the first bytes", fault("disk full", at_bytes=1000)),
    Full("amid the first videos", fault("disk full", at_bytes=100_500)),
    Full("amid later ones", fault("disk full", at_bytes=350_000), at_least=1, hangs=True),
    Full("when a video is synced", fault("disk full", after_fsyncs=4, of="*.part"), at_least=1),
    Full("when metadata is synced", fault("disk full", after_fsyncs=2, of="*.tmp"), at_least=1),
    Full("when metadata is made", fault("no create", error="ENOSPC", of="*.tmp", after=2)),
    Full("when a quota is used up", fault("no create", error="EDQUOT", of="*.tmp", after=2)),
    Full(
        "when metadata is written, no hard links",
        fault("no hard links") | fault("disk full", calls=["write"], of="*.json", after=2),
        at_least=1,
    ),
]


@pytest.mark.parametrize("full", FULL, ids=str)
def test_a_full_disk_ends_the_run_with_one_clear_line(tmp_path: Path, cdn: Cdn, full: Full) -> None:
    rows = serve(cdn, 7, Reply(wait_s=0.02))
    if full.hangs:
        cdn.replies["/0.mp4"] = [Reply(send=HALF, ending="hang"), GOOD]
    output_dir = tmp_path / "video_outputs"

    result = download(tmp_path, rows, "--workers", "2", run=run_process, env=full.env)

    assert result.returncode == 1
    assert re.match(f"❌ no space left[^\n]*{output_dir.name}", result.stderr.strip())
    assert result.stderr.count("❌") == 1
    videos = list(output_dir.glob("*.mp4"))
    assert full.at_least <= len(videos) < 6
    for video in videos:
        number = int(video.stem.removeprefix("picture_"))
        assert_whole(output_dir, video.stem, make_task_id(number), make_mp4(number))
    assert len(names_in(output_dir)) == 2 * len(videos)  # nothing hidden either
    assert run_script(tmp_path).returncode == 0  # there is room again
    assert_home(output_dir, 7)


# A directory that cannot be used.


@unix_only
def test_a_directory_that_cannot_be_written_is_one_clear_line(tmp_path: Path, cdn: Cdn) -> None:
    output_dir = tmp_path / "video_outputs"
    output_dir.mkdir(mode=0o555)
    rows = serve(cdn, 2)
    result = download(tmp_path, rows, run=run_process, before=without_privileges())
    assert result.returncode == 1
    assert re.fullmatch(r"\s*❌ the output directory .*video_outputs.*\n", result.stderr)
    assert cdn.requests == []


def dead_link(path: Path) -> None:
    path.symlink_to("nowhere")


def closed_directory(path: Path) -> None:
    """A directory that lets nobody in."""
    path.mkdir()
    path.chmod(0)


@dataclass(frozen=True)
class Unusable(Row):
    """Something of another's that has the name of the hidden directory."""

    content: Any  # as `lay_out` takes it


UNUSABLE = [
    Unusable("a file", b"mine"),
    Unusable("a dead symbolic link", dead_link),
    Unusable("a directory that is closed to us", closed_directory),
]


@unix_only
@pytest.mark.parametrize("case", UNUSABLE, ids=str)
def test_all_come_home_past_what_has_the_hidden_name(
    tmp_path: Path, cdn: Cdn, case: Unusable
) -> None:
    output_dir = tmp_path / "video_outputs"
    lay_out(output_dir, {".dsv": case.content})
    place = output_dir / ".dsv"
    inode = place.lstat().st_ino
    rows = serve(cdn, 3)
    result = download(tmp_path, rows, run=run_process, before=without_privileges())
    assert result.returncode == 0
    assert place.lstat().st_ino == inode
    place.rename(tmp_path / "was there before")
    assert_home(output_dir, 3)  # nothing else is hidden


# --- Leftovers: what a later run resumes, and what it removes -------------------------------------


def leave_half(directory: Path, cdn: Cdn, count: int = 1) -> list[dict[str, Any]]:
    """A run that fails with half of each of ``count`` videos kept; their rows."""
    rows = serve(cdn, count, Reply(send=HALF), GOOD)
    assert download(directory, rows, "--retries", "0").returncode == 3
    assert len(parts_in(directory / "video_outputs")) == count
    return rows


def starts_of(cdn: Cdn, number: int = 0) -> list[int | None]:
    """Where the range of each request for the video of that number begins."""
    return [request.range_start for request in cdn.asked(f"{number}.mp4")]


def test_a_long_validator_and_short_names_are_resumed_too(
    tmp_path: Path, output_dir: Path, cdn: Cdn
) -> None:
    etag = '"' + "e" * 58 + '"'
    rows = serve(cdn, 1, headed("ETag", etag, send=HALF), headed("ETag", etag))
    rows[0]["target_filename_stub"] = "x" * 400
    write_results(tmp_path, rows)
    job = Job(tmp_path, ["--retries", "0"], fault("names of 143 bytes"))
    assert run_forked([job]) == [3]
    assert run_forked([job]) == [0]
    assert starts_of(cdn) == [None, HALF]
    assert_whole(output_dir, "x" * 138, make_task_id(0), make_mp4(0))


@unix_only
def test_what_a_kill_leaves_is_removed_and_not_resumed(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 3, Reply(pause_at=HALF), GOOD)
    cdn.replies["/2.mp4"] = [Reply(pause_at=HALF), refusal(404)]
    write_results(tmp_path, rows)
    output_dir = tmp_path / "video_outputs"
    run = start_forked(Job(tmp_path))
    wait_until(lambda: len(parts_in(output_dir)) == 3)
    run.kill()
    run.join()
    assert download(tmp_path, rows).returncode == 3
    for number in range(3):
        assert starts_of(cdn, number) == [None, None]
    assert_home(output_dir, 2)  # and nothing is hidden, whatever else failed


# Nothing stays hidden.


def age(directory: Path, days: float) -> None:
    """Make all that is hidden look ``days`` old."""
    then = time.time() - days * 86_400
    for path in [directory / name for name in hidden_in(directory)]:
        os.utime(path, (then, then))


def test_a_leftover_stays_for_7_days(tmp_path: Path, cdn: Cdn) -> None:
    rows = leave_half(tmp_path, cdn)
    output_dir = tmp_path / "video_outputs"
    other = make_row(7, video_url=cdn.add("7.mp4", WHOLE))
    age(output_dir, days=6.9)
    assert download(tmp_path, [other]).returncode == 0
    assert len(parts_in(output_dir)) == 1
    age(output_dir, days=7.1)
    assert download(tmp_path, [other]).returncode == 0
    assert hidden_in(output_dir) == set()
    assert download(tmp_path, rows).returncode == 0
    assert starts_of(cdn) == [None, None]


def test_a_leftover_goes_when_its_video_is_there(tmp_path: Path, cdn: Cdn) -> None:
    rows = leave_half(tmp_path, cdn, 2)
    output_dir = tmp_path / "video_outputs"
    cdn.replies["/1.mp4"] = [refusal(403)]
    lay_out(output_dir, {"picture_0.json": rows[0], "picture_0.mp4": WHOLE})  # by other means
    assert download(tmp_path, rows).returncode == 3
    assert len(cdn.asked("0.mp4")) == 1
    (left,) = parts_in(output_dir).values()  # of the other, for a fresh link
    assert left == make_mp4(1)[:HALF]


@pytest.mark.parametrize("count", [0, 1], ids=["nothing to do", "a failure"])
def test_an_empty_hidden_directory_goes(tmp_path: Path, cdn: Cdn, count: int) -> None:
    output_dir = tmp_path / "video_outputs"
    (output_dir / ".dsv").mkdir(parents=True)
    download(tmp_path, serve(cdn, count, refusal(404)))
    assert names_in(output_dir) == set()


# Somebody does something to a leftover.


@dataclass(frozen=True)
class Spoilt(Row):
    """What became of the one leftover; the video comes home, in at most two requests."""

    spoil: Callable[[Path], object]


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x" * VIDEO_BYTES)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def shorten(path: Path) -> None:
    os.truncate(path, 1000)


def become_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_dead_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def get_nonsense_name(path: Path) -> None:
    path.rename(path.with_name("nonsense.....left"))


def go_with_directory(path: Path) -> None:
    shutil.rmtree(path.parent)


def become_text(path: Path) -> None:
    path.write_bytes(b"x" * VIDEO_BYTES)


SPOILT = [
    Spoilt("it is removed", os.unlink),
    Spoilt("it is emptied", empty),
    Spoilt("it is cut", shorten),
    Spoilt("it is longer than the video", grow),
    Spoilt("it is as long as the video, and text", become_text),
    Spoilt("it is a directory", become_directory),
    Spoilt("it is a pipe", become_pipe),
    Spoilt("it is a dead symbolic link", become_dead_link),
    Spoilt("its name is nonsense", get_nonsense_name),
    Spoilt("all of the hidden directory is gone", go_with_directory),
]


@unix_only
@pytest.mark.parametrize("case", SPOILT, ids=str)
def test_a_spoilt_leftover_makes_no_wrong_file(tmp_path: Path, cdn: Cdn, case: Spoilt) -> None:
    rows = leave_half(tmp_path, cdn)
    output_dir = tmp_path / "video_outputs"
    (left,) = parts_in(output_dir)
    case.spoil(left)
    assert download(tmp_path, rows).returncode == 0
    assert len(cdn.requests) <= 3
    assert_whole(output_dir, "picture_0", make_task_id(0), make_mp4(0))


def test_a_leftover_that_was_of_no_use_is_not_blamed(tmp_path: Path, cdn: Cdn) -> None:
    rows = leave_half(tmp_path, cdn)
    cdn.replies["/0.mp4"] = [Reply(body=b"<html>gone</html>")]
    before = len(cdn.requests)
    result = download(tmp_path, rows)
    assert result.returncode == 3
    assert "what the server sent is text" in result.stderr
    assert len(cdn.requests) == before + 1


def test_the_total_of_a_range_is_as_good_as_a_length(
    tmp_path: Path, output_dir: Path, cdn: Cdn
) -> None:
    surplus = make_mp4(0) + b"something else"
    link = cdn.add("0.mp4", surplus, Reply(send=HALF), CHUNKED)
    rows = [make_row(0, video_url=link)]
    assert download(tmp_path, rows, "--retries", "0").returncode == 3
    assert download(tmp_path, rows, "--retries", "0").returncode == 0
    assert (output_dir / "picture_0.mp4").read_bytes() == surplus
    assert starts_of(cdn) == [None, HALF]


@pytest.mark.parametrize("broken", ["open", "read"])
def test_a_leftover_that_cannot_be_read_costs_no_video(
    tmp_path: Path, output_dir: Path, cdn: Cdn, broken: str
) -> None:
    write_results(tmp_path, leave_half(tmp_path, cdn))
    env = fault("read error", calls=[broken], of="*.left")
    assert run_forked([Job(tmp_path, (), env)]) == [0]
    assert_home(output_dir, 1)


# --- Several runs at once on one directory --------------------------------------------------------


def prepare_run(directory: Path, name: str, rows: Iterable[Any], *arguments: str) -> Job:
    """One of several runs that share ``directory/video_outputs``, with files of its own."""
    own = directory / name
    own.mkdir()
    write_results(own, rows)
    return Job(own, ["--output-dir", "../video_outputs", *arguments])


def join(*runs: Any) -> list[int | None]:
    """The exit codes of ``runs``; None for one that has not ended within 30 s."""
    deadline = time.monotonic() + 30
    for run in runs:
        rest = deadline - time.monotonic()
        run.join(max(0, rest))
    codes = [run.exitcode for run in runs]
    for run in runs:
        run.kill()
    return codes


def signal_all(number: int, *runs: Any) -> None:
    for run in runs:
        with contextlib.suppress(ProcessLookupError):
            os.kill(run.pid, number)


def wait_for_part(output_dir: Path) -> None:
    wait_until(lambda: output_dir.exists() and parts_in(output_dir))


def assert_waited(job: Job) -> None:
    console = job.directory / "console.txt"
    assert "another run" in console.read_text(encoding="utf-8")


def test_four_runs_share_the_work(tmp_path: Path, output_dir: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 40, Reply(wait_s=60))
    runs = []
    for number in range(4):
        job = prepare_run(tmp_path, f"run{number}", rows, "--workers", "2")
        runs.append(start_forked(job))
    wait_until(lambda: len(cdn.requests) == 8)  # all of them are at work
    paths = {request.path for request in cdn.requests}
    assert len(paths) == 8
    cdn.released.set()
    assert join(*runs) == [0, 0, 0, 0]
    assert len(cdn.requests) <= 50
    assert_home(output_dir, 40)


def test_a_file_that_grows_is_waited_for(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 1, Reply(bytes_per_second=450_000), size=BIG)
    output_dir = tmp_path / "video_outputs"
    slow = start_forked(prepare_run(tmp_path, "slow", rows))
    wait_for_part(output_dir)
    job = prepare_run(tmp_path, "waiting", rows, "--timeout", "1")
    waiting = start_forked(job)
    assert join(waiting, slow) == [0, 0]
    assert_waited(job)
    assert len(cdn.requests) == 1
    assert_home(output_dir, 1, BIG)


def test_a_frozen_run_holds_nothing_up_and_spoils_nothing(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 4)
    cdn.replies["/0.mp4"] = [Reply(body=OTHER, pause_at=HALF), GOOD]  # it has changed since
    output_dir = tmp_path / "video_outputs"
    frozen = start_forked(prepare_run(tmp_path, "frozen", rows, "--workers", "1"))
    wait_for_part(output_dir)
    signal_all(signal.SIGSTOP, frozen)
    job = prepare_run(tmp_path, "other", rows, "--timeout", "0.5")
    other = start_forked(job)
    assert join(other) == [0]
    assert_home(output_dir, 4)  # nothing is hidden either

    signal_all(signal.SIGCONT, frozen)
    cdn.released.set()
    assert join(frozen) == [0]
    assert_home(output_dir, 4)
    assert len(cdn.requests) == 5


def test_what_a_killed_run_had_in_hand_is_fetched_at_once(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 4)
    cdn.replies["/0.mp4"] = [Reply(pause_at=HALF), GOOD]
    output_dir = tmp_path / "video_outputs"
    killed = start_forked(prepare_run(tmp_path, "killed", rows, "--workers", "1"))
    wait_for_part(output_dir)
    other = start_forked(prepare_run(tmp_path, "other", rows, "--timeout", "3600"))
    wait_until(lambda: len(list(output_dir.glob("*.mp4"))) == 3)
    assert len(cdn.requests) == 4  # it waits
    killed.kill()
    assert join(other) == [0]
    starts = [request.range_start for request in cdn.asked("0.mp4")]
    assert starts == [None, None]
    assert_home(output_dir, 4)


# One run is frozen before each of its steps in turn; another begins and ends; the first goes on.


@dataclass(frozen=True)
class Meeting(Row):
    """Two runs that want the same name."""

    tasks: Sequence[int]  # of the frozen run, and of the other
    env: dict[str, str] = field(default_factory=dict)
    has_metadata: bool = False  # of a video that was lost


WITHOUT_LINKS = fault("no hard links")
MEETINGS = [
    Meeting("the same task", [0, 0]),
    Meeting("the same task, no hard links", [0, 0], WITHOUT_LINKS),
    Meeting("two tasks, no hard links", [0, 1], WITHOUT_LINKS),
    Meeting("the same task, its metadata is there", [0, 0], has_metadata=True),
]


@dataclass(frozen=True)
class Step:
    """One of the steps at which two runs meet, each in a directory of its own."""

    number: int
    directory: Path
    meeting: Meeting
    cdn: Cdn

    def body(self, turn: int) -> bytes:
        """What the server has when the run of that ``turn``, 0 or 1, asks."""
        return make_mp4(f"{self.number}/{turn}", 3_000)  # few writes, thus few steps

    def prepare(self, turn: int, timeout: str) -> Job:
        link = self.cdn.add(f"{self.number}/{turn}", self.body(turn))
        task = self.meeting.tasks[turn]
        row = make_row(task, target_filename_stub="s", video_url=link)
        job = prepare_run(self.directory, f"run{turn}", [row], "--timeout", timeout)
        return replace(job, env=self.meeting.env)

    def start_first(self) -> Any:
        """Start the run that stops before this step."""
        self.directory.mkdir()
        if self.meeting.has_metadata:
            lay_out(self.directory / "video_outputs", {"s.json": make_row()})
        job = self.prepare(0, "60")
        stop = fault("stop", at_step=self.number)
        return start_forked(replace(job, env={**job.env, **stop}))

    def start_second(self) -> Any:
        return start_forked(self.prepare(1, "0.5"))

    def check(self) -> None:
        """All that the two wanted is there, whole and with its metadata, and nothing else."""
        output_dir = self.directory / "video_outputs"
        found = owners(output_dir)
        wanted = {make_task_id(task) for task in self.meeting.tasks}
        assert found.keys() == wanted, self
        for task_id, name in found.items():
            assert name in ("s", f"s_{task_id[:8]}"), self
            content = (output_dir / f"{name}.mp4").read_bytes()
            assert content in (self.body(0), self.body(1)), self
            assert_whole(output_dir, name, task_id, content)
        assert len(names_in(output_dir)) == 2 * len(wanted), self


def is_stopped(run: Any) -> bool:
    """Whether the process was stopped, or has ended."""
    try:
        status = Path(f"/proc/{run.pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    state = status.rpartition(")")[2].split()[0]
    return state in ("T", "Z")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("meeting", MEETINGS, ids=str)
def test_runs_that_meet_at_any_step_spoil_nothing(
    tmp_path: Path, cdn: Cdn, meeting: Meeting
) -> None:
    steps = [Step(number, tmp_path / str(number), meeting, cdn) for number in range(1, 35)]
    first_runs = [step.start_first() for step in steps]
    wait_until(lambda: all(is_stopped(run) for run in first_runs))
    stopped = sum(run.is_alive() for run in first_runs)
    assert 10 < stopped < len(steps), "there are more steps than were tried"

    second_runs = [step.start_second() for step in steps]
    assert set(join(*second_runs)) == {0}
    signal_all(signal.SIGCONT, *first_runs)
    assert set(join(*first_runs)) == {0}
    for step in steps:
        step.check()


# Another user, who lets nobody read his files.

STRANGER = 65533
IN_PRIVATE = ["sh", "-c", 'umask 077; exec "$@"', "-"]


def as_a_stranger() -> list[str]:
    """What goes before a command that another user runs; it may go anywhere, unlike us."""
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    user = ["--reuid", str(STRANGER), "--regid", str(STRANGER), "--clear-groups"]
    rights = ["--inh-caps", "+dac_override", "--ambient-caps", "+dac_override"]
    without_privileges()  # skips if there is no setpriv
    return ["setpriv", *user, *rights, *IN_PRIVATE]


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A directory that others reach too, unlike ``tmp_path``."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def shared_directory(directory: Path, mode: int) -> Path:
    output_dir = directory / "video_outputs"
    output_dir.mkdir()
    output_dir.chmod(mode)
    return output_dir


@unix_only
def test_two_users_share_the_work(open_path: Path, cdn: Cdn) -> None:
    write_results(open_path, serve(cdn, 12, Reply(wait_s=60)))
    output_dir = shared_directory(open_path, 0o777)
    stranger = start_script(open_path, "--workers", "2", before=as_a_stranger())
    wait_until(lambda: len(cdn.requests) == 2)
    we = start_script(open_path, "--workers", "2", before=[*without_privileges(), *IN_PRIVATE])
    wait_until(lambda: len(cdn.requests) == 4)
    cdn.released.set()
    results = [finish(stranger), finish(we)]
    assert [result.returncode for result in results] == [0, 0]
    assert len(cdn.requests) <= 15
    assert_home(output_dir, 12)


@unix_only
@pytest.mark.parametrize("mode", [0o777, 0o1777], ids=["anybody may remove", "sticky"])
def test_what_another_user_left_blocks_nobody(open_path: Path, cdn: Cdn, mode: int) -> None:
    write_results(open_path, serve(cdn, 2, Reply(send=HALF), GOOD))
    output_dir = shared_directory(open_path, mode)
    failed = run_process(open_path, "--retries", "0", before=as_a_stranger())
    assert failed.returncode == 3
    for part in parts_in(output_dir):
        part.chmod(0o600)
    assert len(parts_in(output_dir)) == 2
    assert run_process(open_path, before=without_privileges()).returncode == 0
    if mode == 0o1777:  # only he may remove his files
        assert run_process(open_path, before=as_a_stranger()).returncode == 0
    assert_home(output_dir, 2)


# --- Meddling: what others do in the directory while a run works ----------------------------------

FOREIGN = make_mp4("foreign", 70_000)


@dataclass(frozen=True)
class Meddling(Row):
    """What somebody does to the hidden file of a download, or to the name it is to have."""

    act: Callable[[Path, Path], object]  # given the hidden file and the path of the video
    ends: str = "wanted"  # under its name, "with id" behind it, or "arrived": others were first


def metadata_of(video: Path) -> Path:
    return video.with_suffix(".json")


def number_of(video: Path) -> int:
    return int(video.stem.removeprefix("picture_"))


def replace_part(part: Path, _: Path) -> None:
    part.unlink()
    part.write_bytes(FOREIGN)


def link_part(part: Path, _: Path) -> None:
    part.unlink()
    part.symlink_to("elsewhere")


def move_part(part: Path, video: Path) -> None:
    part.rename(video.parent.parent / "rescued")


def put_own_metadata(_: Path, video: Path) -> None:
    metadata_of(video).write_bytes(make_metadata(make_row(number_of(video))))


def put_same_task(part: Path, video: Path) -> None:
    put_own_metadata(part, video)
    video.write_bytes(FOREIGN)


def put_another_task(_: Path, video: Path) -> None:
    metadata_of(video).write_bytes(make_metadata(make_row(99)))


MEDDLINGS = [
    Meddling("the hidden file is removed", lambda part, _: part.unlink()),
    Meddling("the hidden file is cut", lambda part, _: os.truncate(part, 1000)),
    Meddling("the hidden file grows", lambda part, _: os.truncate(part, BIG)),
    Meddling("the hidden file becomes a link", link_part),
    Meddling("the hidden file is moved away", move_part),
    Meddling("the hidden file is replaced", replace_part),
    Meddling("the same video and metadata arrive", put_same_task, "arrived"),
    Meddling("its own metadata arrives", put_own_metadata),
    Meddling("another task's metadata arrives", put_another_task, "with id"),
    Meddling("another video arrives", lambda _, video: video.write_bytes(FOREIGN), "with id"),
    Meddling(
        "another program's .json arrives",
        lambda _, video: metadata_of(video).write_bytes(b"[]"),
        "with id",
    ),
    Meddling("a directory arrives", lambda _, video: video.mkdir(), "with id"),
    Meddling("a dead link arrives", lambda _, video: video.symlink_to("nowhere"), "with id"),
    Meddling("an empty video arrives", lambda _, video: video.touch()),
    Meddling("an empty .json arrives", lambda _, video: metadata_of(video).touch()),
]


@dataclass(frozen=True)
class MeddledRun:
    cdn: Cdn
    output_dir: Path
    exit_code: int
    arrived: Mapping[str, bytes]  # the files that others had put there


@pytest.fixture(scope="module")
def meddled_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeddledRun]:
    """One run in which each video has its meddling, when half of it is there."""
    directory = tmp_path_factory.mktemp("meddled")
    output_dir = directory / "video_outputs"
    output_dir.mkdir()
    with Cdn() as cdn:
        rows = serve(cdn, len(MEDDLINGS), Reply(pause_at=BIG // 2), GOOD, size=BIG)
        write_results(directory, rows)
        run = start_forked(Job(directory, ["--retries", "1"]))
        least = BIG // 3  # older urllib3 hands on what fills its buffer

        def begun() -> dict[bytes, Path]:
            parts = parts_in(output_dir).items()
            return {data[:least]: path for path, data in parts if len(data) > least}

        wait_until(lambda: len(begun()) == len(rows))
        parts = begun()
        for number, meddling in enumerate(MEDDLINGS):
            part = parts[make_mp4(number, BIG)[:least]]
            meddling.act(part, output_dir / f"picture_{number}.mp4")
        files = [path for path in output_dir.glob("picture_*") if path.is_file()]
        arrived = {path.name: path.read_bytes() for path in files}
        cdn.released.set()
        run.join(30)
        yield MeddledRun(cdn, output_dir, run.exitcode, arrived)


@unix_only
@pytest.mark.parametrize("meddling", MEDDLINGS, ids=str)
def test_what_others_do_makes_no_wrong_file(meddled_run: MeddledRun, meddling: Meddling) -> None:
    number = MEDDLINGS.index(meddling)
    output_dir = meddled_run.output_dir
    task_id = make_task_id(number)
    stub = f"picture_{number}"
    if meddling.ends == "with id":
        stub += f"_{task_id[:8]}"
    if meddling.ends != "arrived":
        assert_whole(output_dir, stub, task_id, make_mp4(number, BIG))
    if meddling.ends != "wanted":
        for name in (f"picture_{number}.mp4", f"picture_{number}.json"):
            if name in meddled_run.arrived:
                assert (output_dir / name).read_bytes() == meddled_run.arrived[name]
    assert len(meddled_run.cdn.asked(f"{number}.mp4")) <= 2


@unix_only
def test_what_others_did_leaves_nothing_hidden_behind(meddled_run: MeddledRun) -> None:
    assert meddled_run.exit_code == 0
    assert hidden_in(meddled_run.output_dir) == set()


@unix_only
@pytest.mark.parametrize("is_moved", [False, True], ids=["removed", "moved away"])
def test_the_hidden_directory_goes_amid_the_work(tmp_path: Path, cdn: Cdn, is_moved: bool) -> None:
    write_results(tmp_path, serve(cdn, 3, Reply(pause_at=HALF), GOOD))
    output_dir = tmp_path / "video_outputs"
    run = start_forked(Job(tmp_path, ["--retries", "0"]))
    wait_until(lambda: len(parts_in(output_dir)) == 3)
    hidden = {path.parent for path in parts_in(output_dir)} - {output_dir}
    for directory in hidden:
        if is_moved:
            directory.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(directory)
    assert hidden
    cdn.released.set()
    run.join(30)
    assert run.exitcode == 0
    assert len(cdn.requests) <= 6
    assert_home(output_dir, 3)


@pytest.mark.parametrize("times", [1, 1000], ids=["once", "always"])
def test_a_part_that_is_gone_begins_anew_ten_times_at_most(tmp_path: Path, times: int) -> None:
    output_dir = tmp_path / "video_outputs"
    body = make_mp4(0, BIG)

    def remove_parts(connection: socket.socket, _: str, __: Any, number: int) -> None:
        answer = raw_answer(body)
        connection.sendall(answer[: BIG // 2])
        if number <= times:
            wait_until(lambda: parts_in(output_dir))
            for part in parts_in(output_dir):
                part.unlink()
        connection.sendall(answer[BIG // 2 :])

    with RawServer(remove_parts) as server:
        write_results(tmp_path, [make_row(0, video_url=server.link("0.mp4"))])
        exit_code = run_script(tmp_path, "--retries", "0").returncode
        if times == 1:
            assert exit_code == 0
            assert len(server.requests) == 2
            assert_home(output_dir, 1, BIG)
        else:
            assert exit_code == 3
            assert 2 < len(server.requests) <= 11
            assert names_in(output_dir) == set()


# A name that is taken at the last moment: between the decision and the step that gives it.


@dataclass(frozen=True)
class LastMoment(Row):
    """What arrives just before picture_0.mp4, or picture_0.json, is to get its name."""

    name: str  # the one that is about to be given
    arrives: Mapping[str, bytes]
    ends: str = "with id"  # our video; or "wanted", or "arrived": another run was first
    has_metadata: bool = False  # of ours, from the start
    has_links: bool = True

    def faults(self, arrivals: Path, output_dir: Path) -> dict[str, str]:
        copies = {str(arrivals / name): str(output_dir / name) for name in self.arrives}
        calls = ["link", "replace"] if self.has_links else ["create"]
        arrival = fault("another file arrives", copies=copies, calls=calls, of=self.name)
        return arrival if self.has_links else arrival | fault("no hard links")


VIDEO = {"picture_0.mp4": FOREIGN}
METADATA = {"picture_0.json": make_metadata(make_row(), FOREIGN)}
OURS = VIDEO | METADATA
THEIRS = {"picture_0.json": make_metadata(make_row(99))}
LAST_MOMENTS = [
    LastMoment("a video", "picture_0.mp4", VIDEO),
    LastMoment("a video, no hard links", "picture_0.mp4", VIDEO, has_links=False),
    LastMoment("another task's metadata", "picture_0.json", THEIRS),
    LastMoment("another task's metadata, no hard links", "picture_0.json", THEIRS, has_links=False),
    LastMoment("our video", "picture_0.json", OURS, "arrived"),
    LastMoment("our video, of which we had metadata", "picture_0.json", OURS, "arrived", True),
    LastMoment("metadata of another run's copy", "picture_0.mp4", METADATA, "wanted"),
]


@pytest.mark.parametrize("moment", LAST_MOMENTS, ids=str)
def test_a_name_taken_at_the_last_moment(
    tmp_path: Path, output_dir: Path, cdn: Cdn, moment: LastMoment
) -> None:
    write_results(tmp_path, serve(cdn, 1))
    arrivals = tmp_path / "arrivals"
    lay_out(arrivals, moment.arrives)
    if moment.has_metadata:
        lay_out(output_dir, {"picture_0.json": make_row()})
    env = moment.faults(arrivals, output_dir)

    assert run_forked([Job(tmp_path, ["--retries", "0"], env)]) == [0]

    assert len(cdn.requests) == 1
    task_id = make_task_id(0)
    visible = {"picture_0.mp4", "picture_0.json"}
    if moment.ends == "wanted":
        assert_whole(output_dir, "picture_0", task_id, make_mp4(0))
    elif moment.ends == "arrived":
        assert_whole(output_dir, "picture_0", task_id, FOREIGN)
    else:
        for name, content in moment.arrives.items():
            assert (output_dir / name).read_bytes() == content
        stub = f"picture_0_{task_id[:8]}"
        assert_whole(output_dir, stub, task_id, make_mp4(0))
        visible = {f"{stub}.mp4", f"{stub}.json", *moment.arrives}
    assert names_in(output_dir) == visible


# --- Network: which replies are asked for again, and how often ------------------------------------

UNTIL_CLOSE = Reply(framing="close")  # the body ends with the connection
PACKED = headed("Content-Encoding", "gzip", body=gzip.compress(OBJECT))
DEFLATED = headed("Content-Encoding", "deflate", body=zlib.compress(OBJECT))
UNASKED_RANGE = {"ETag": None, "Content-Range": "bytes 0-9999/10000"}
A_CENTURY = "Sun, 17 Jun 2125 03:59:59 GMT"
THE_PAST = "Tue, 17 Jun 2025 03:59:59 GMT"
STEPPED = make_mp4("steps", 250_000)
COMES_HOME = {
    "a good reply": GOOD,
    "chunks": CHUNKED,
    "a body until the connection ends": UNTIL_CLOSE,
    "gzip, though identity was asked for": PACKED,
    "gzip in chunks": replace(PACKED, framing="chunked"),
    "deflate": DEFLATED,
    "an encoding named identity": headed("Content-Encoding", "identity"),
    "a Transfer-Encoding named identity": headed("Transfer-Encoding", "identity"),
}
ASKED_AGAIN = {
    "a cut body": CUT,
    "a body cut between two boxes": headed("ETag", None, send=VIDEO_BYTES - 8),
    "a reset": replace(CUT, ending="reset"),
    "cut chunks": cut(CHUNKED),
    "a body until the connection ends, too early": cut(UNTIL_CLOSE),
    "whole by its length, yet it ends inside a box": Reply(body=OBJECT[:HALF]),
    "a length that is too short": headed("Content-Length", str(HALF)),
    "gzip that is cut": cut(PACKED),
    "gzip that is none": headed("Content-Encoding", "gzip"),
    "a 206 that nobody asked for": Reply(206, WHOLE, UNASKED_RANGE),
    "503 with a Retry-After": refusal(503, "1"),
    "500 with a Retry-After": refusal(500, "1"),
    "503 with a Retry-After in the past": refusal(503, THE_PAST),
    "503 with a senseless Retry-After": refusal(503, "soon"),
}
MAY_PASS = statuses(408, 425, 429, 500, 502, 503, 504, 520)
IS_FINAL = statuses(400, 401, 402, 403, 404, 405, 410, 416, 418, 451)
STAYS = {  # with --retries 2: three tries, if none brings 64 kB more than those before
    "20 kB more renew no tries": Reply(send=20_000),
    "the same 70 kB again and again renew no tries": headed("ETag", None, send=70_000),
    "always cut before the connection ends": cut(UNTIL_CLOSE),
    "always inside a box": Reply(body=OBJECT[:HALF]),
}
OTHER_REPLIES = [
    Case("70 kB more renew the tries", [Reply(send=70_000)], requests=4, body=STEPPED),
    Case("500 for ever", [refusal(500)], requests=3, fails="HTTP 500"),
    Case(
        "503 that asks for more than 60 s", [refusal(503, "300")], requests=1, fails="503.* 300 s"
    ),
    Case("429 that asks for more than 60 s", [refusal(429, "61")], requests=1, fails="429.* 61 s"),
    Case("500 that asks for a century", [refusal(500, A_CENTURY)], requests=1, fails="500"),
    Case("an absurd length", [headed("Content-Length", str(10**19), send=HALF), GOOD]),
    Case("Brotli", [headed("Content-Encoding", "br", body=b"\x0b" + OBJECT)], fails=r"\bbr\b"),
    Case("an unknown encoding", [headed("Content-Encoding", "aes128gcm")], fails="aes128gcm"),
    Case("an unknown framing", [headed("Transfer-Encoding", "aes128gcm")], fails="aes128gcm"),
]
REPLIES = [
    *cases(COMES_HOME, after=[GOOD], requests=1),
    *cases(ASKED_AGAIN, after=[GOOD], requests=2),
    *cases(MAY_PASS, after=[GOOD], requests=2),
    *cases(IS_FINAL, after=[GOOD], requests=1, fails="HTTP|refused"),
    *cases(STAYS, requests=3, fails="cut"),
    *OTHER_REPLIES,
]


@pytest.fixture(scope="module")
def reply_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CasesRun]:
    with Cdn() as cdn:
        yield run_cases(cdn, tmp_path_factory.mktemp("replies"), REPLIES, "--retries", "2")


@pytest.mark.parametrize("case", REPLIES, ids=str)
def test_a_reply_is_asked_for_again_if_that_may_help(reply_run: CasesRun, case: Case) -> None:
    reply_run.check(case)


def test_each_failure_is_counted_and_said(reply_run: CasesRun) -> None:
    failed = sum(bool(case.fails) for case in REPLIES)
    assert reply_run.exit_code == 3
    stats = reply_run.report["stats"]
    assert stats["failed_downloads"] == failed
    assert f"Failed downloads: {failed}\n" in reply_run.console


@pytest.mark.parametrize("code", [500, 503])
def test_retry_after_is_honoured(reply_run: CasesRun, code: int) -> None:
    sentence = f"{code} with a Retry-After"
    case = next(case for case in REPLIES if case.sentence == sentence)
    first, second = reply_run.end(case).requests
    waited_s = second.at - first.at
    assert waited_s >= 1


# --- Network: what is a video is decided by its bytes ---------------------------------------------

FTYP = box(b"ftyp", b"isom\0\0\2\0isomiso2")
LONG_BOX = box(b"mdat", struct.pack(">Q", 21) + b"12345", size=1)  # a size of 64 bits
BOXES = [FTYP, LONG_BOX, box(b"free"), box(b"moov", b"123")]
ALL_BOXES = b"".join(BOXES)
BOX_ENDS = {sum(map(len, BOXES[:count])) for count in range(1, 5)}


def contents(sentence: str, body: bytes, **more: Any) -> Case:
    """A body that arrives whole. Videos come as text here, and texts as videos."""
    kind = "video/mp4" if "fails" in more else "text/html"
    reply = headed("Content-Type", kind)
    return Case(sentence, [reply], requests=1, body=body, **more)


TEXTS = {
    "a page": b"<!DOCTYPE html><title>Sorry</title>",
    "a page behind a mark": b"\xef\xbb\xbf\r\n<!DOCTYPE html>",
    "XML": b'<?xml version="1.0"?><Error/>',
    "JSON": b'{"error": "expired"}',
    "a playlist": b"#EXTM3U\n#EXT-X-VERSION:3\n",
    "a letter": b"x",
    "Access denied": b"Access denied",
    "a text in Latin-1": b"Zugriff verweigert: f\xfcr",
    "a text in UTF-16": "Access denied".encode("utf-16"),
    "a long text": b"Access denied. " * 10_000,
}
OTHER_BINARIES = {
    "a WebM": WEBM,
    "a GIF": b"GIF89a\1\0\1\0\x80\0\0\xff\xff\xff",
    "a ZIP": b"PK\3\4\x14\0\0\0\x08\0" + bytes(range(256)),
    "a byte behind 200 kB of zeros": bytes(200_000) + b"\1",
}
LONGER_THAN_ALL = FTYP + box(b"mdat", b"\xff" * 8 + b"1", size=1)
CONTENTS = [
    contents("a whole MP4", WHOLE),
    contents("a box of size 0 is all the rest", FTYP + box(b"mdat", b"12345", size=0)),
    contents("an old MOV", box(b"wide") + box(b"mdat", b"1") + box(b"moov")),
    contents("a box of 64 bits that is longer than all", LONGER_THAN_ALL, fails="cut"),
    contents("the head of a box of 64 bits, cut", b"\0\0\0\1mdat\0\0", fails="cut"),
    contents("zero bytes behind an MP4", WHOLE + bytes(4), says="behind it"),
    contents("text behind an MP4", WHOLE + b"<html>Bye</html>", says="behind it"),
    contents("nothing", b"", fails="empty"),
    contents("a zero byte", b"\0", fails="zero bytes"),
    contents("200 kB of zero bytes", bytes(200_000), fails="zero bytes"),
    *[contents(sentence, body, fails="text") for sentence, body in TEXTS.items()],
    *[contents(sentence, body, says="not an MP4") for sentence, body in OTHER_BINARIES.items()],
]
CUTS = [contents(f"cut to {n} bytes", ALL_BOXES[:n]) for n in range(1, 1 + len(ALL_BOXES))]


@pytest.fixture(scope="module")
def content_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CasesRun]:
    with Cdn() as cdn:
        directory = tmp_path_factory.mktemp("contents")
        yield run_cases(cdn, directory, [*CONTENTS, *CUTS], "--retries", "0")


@pytest.mark.parametrize("case", CONTENTS, ids=str)
def test_the_bytes_decide_what_is_kept(content_run: CasesRun, case: Case) -> None:
    content_run.check(case)
    is_warned = bool(content_run.end(case).outcome["warning"])
    assert is_warned == bool(case.says), case


def test_mp4_cut_at_any_byte_inside_a_box_is_seen(content_run: CasesRun) -> None:
    for case in CUTS:
        size = len(case.body)
        outcome = content_run.end(case).outcome
        is_kept = outcome["status"] == "downloaded"
        is_clean = is_kept and not outcome["warning"]
        assert is_clean == (size in BOX_ENDS), f"{case}: {outcome}"
        if is_kept:  # fewer bytes than the head of a box has may be behind it
            surplus = min(size - end for end in BOX_ENDS if end <= size)
            assert surplus < 8, f"{case}: {outcome}"


def test_nothing_stays_hidden_of_what_is_no_video(content_run: CasesRun) -> None:
    assert hidden_in(content_run.output_dir) == set()


# --- Network: resuming, and the range that is refused ---------------------------------------------

END = VIDEO_BYTES - 1
DATED = Reply(headers={"ETag": None, "Last-Modified": "Tue, 17 Jun 2025 04:00:00 GMT"})
WEAK = headed("ETag", 'W/"object"')
UNMARKED = headed("ETag", None)
OTHER_OBJECT = Reply(body=OTHER)
OTHER_ANYWAY = Reply(body=OTHER, if_range=False)
SHORTER_OBJECT = Reply(body=WHOLE, if_range=False)
SAME_MARK = Reply(body=OTHER + WHOLE, headers={"ETag": make_etag(OBJECT)})


def sent_from(first: int, last: int = END, **headers: str | None) -> Reply:
    """A 206 of the bytes from ``first`` to ``last``, whatever was asked for."""
    told: dict[str, str | None] = {}
    told["Content-Range"] = f"bytes {first}-{last}/{VIDEO_BYTES}"
    told["ETag"] = make_etag(OBJECT)
    for name, value in headers.items():
        told[name.replace("_", "-")] = value
    return Reply(status=206, body=OBJECT[first : last + 1], headers=told)


SECOND_HALF = f"bytes {HALF}-{END}"

# What comes second, when the first half has come.
IS_NO_SUCH_206 = {
    "a 206 that begins too late": sent_from(HALF + 1),
    "a 206 that begins too early": sent_from(HALF - 1),
    "a 206 of everything": sent_from(0),
    "a 206 without total": sent_from(HALF, Content_Range=SECOND_HALF + "/*"),
    "a 206 of another total": sent_from(HALF, Content_Range=SECOND_HALF + "/99999"),
    "a 206 without range": sent_from(HALF, Content_Range=None),
    "a 206 without validator": sent_from(HALF, ETag=None),
    "a 206 of another ETag": sent_from(HALF, ETag='"another"'),
    "a 206 that is packed": sent_from(HALF, Content_Encoding="gzip"),
}
REFUSES_THE_RANGE = statuses(302, 400, 401, 403, 404, 405, 406, 410, 412, 416, 421)
REFUSES_THE_RANGE |= {f"status {code}": Reply(code, b"") for code in (204, 304)}
GOES_ON = {
    "the same object": GOOD,
    "the same object in chunks": CHUNKED,
    "a server without ranges sends all": Reply(ranges=False),
}
IS_MENDED = {
    "a 206 that ends early": sent_from(HALF, END - 9),
    "a 206 of more than it says": replace(sent_from(HALF), body=OBJECT),
    "the same in chunks": replace(sent_from(HALF), body=OBJECT, framing="chunked"),
}
# Replies of which the first half is not to be resumed. Then another object comes.
SAYS_TOO_LITTLE = {
    "a weak ETag": cut(WEAK),
    "no validator": cut(UNMARKED),
    "no length": cut(CHUNKED),
    "no byte": Reply(send=0),
}
RESUMED = [None, HALF]  # where the range of each request begins
ANEW = [None, HALF, None]
FURTHER = [None, HALF, HALF + HALF // 2]
NEVER = [None, None]
RESUMES = [
    *cases(GOES_ON, [CUT], starts=RESUMED),
    *cases(IS_NO_SUCH_206, [CUT], [GOOD], starts=ANEW),
    *cases(REFUSES_THE_RANGE, [CUT], [GOOD], starts=ANEW),
    *cases(IS_MENDED, [CUT], [GOOD]),
    *cases(SAYS_TOO_LITTLE, after=[OTHER_OBJECT], starts=NEVER, arrives=OTHER),
    Case("cut twice", [CUT, Reply(send=HALF // 2), GOOD], starts=FURTHER),
    Case("a 503 in between", [CUT, refusal(503), GOOD], starts=[None, HALF, HALF]),
    Case("a Last-Modified", [cut(DATED), DATED], starts=RESUMED),
    Case("another object", [CUT, OTHER_OBJECT], starts=RESUMED, arrives=OTHER),
    Case("another object, If-Range ignored", [CUT, OTHER_ANYWAY], starts=ANEW, arrives=OTHER),
    Case("a longer object, same ETag", [CUT, SAME_MARK], starts=ANEW, arrives=OTHER + WHOLE),
    Case("an object shorter than the part", [CUT, SHORTER_OBJECT], starts=ANEW, arrives=WHOLE),
]


def with_fresh_links(cdn: Cdn, given: Sequence[Case]) -> list[Case]:
    """The same objects under links with another signature."""
    fresh = []
    for number, case in enumerate(given):
        link = f"{cdn.url}/{number}.mp4?_jwt=secret.fresh"
        fresh.append(replace(case, row={"video_url": link}))
    return fresh


@pytest.fixture(scope="module", params=["in one run", "in a later run"])
def resume_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CasesRun]:
    """``--retries`` are such that as many tries are left for what follows on the first."""
    directory = tmp_path_factory.mktemp("resumes")
    with Cdn() as cdn:
        if request.param == "in one run":
            yield run_cases(cdn, directory, RESUMES, "--retries", "4")
            return
        first_run = run_cases(cdn, directory, RESUMES, "--retries", "0")
        stats = first_run.report["stats"]
        assert stats["failed_downloads"] == len(RESUMES)
        fresh = with_fresh_links(cdn, RESUMES)
        second_run = run_cases(cdn, directory, fresh, "--retries", "3")
        yield replace(second_run, cases=RESUMES)


@pytest.mark.parametrize("case", RESUMES, ids=str)
def test_a_cut_video_is_resumed_and_never_stitched(resume_run: CasesRun, case: Case) -> None:
    resume_run.check(case)
    for request in resume_run.end(case).requests:
        headers = request.headers
        assert ("If-Range" in headers) == ("Range" in headers), case
        assert headers["Accept-Encoding"] == "identity", case


def test_nothing_stays_hidden_of_what_came_home(resume_run: CasesRun) -> None:
    assert hidden_in(resume_run.output_dir) == set()


def test_a_resumed_download_says_from_where(resume_run: CasesRun) -> None:
    lines = resume_run.end(RESUMES[0]).lines
    assert re.search("[Rr]esum", lines)
    assert "0.05 MB" in lines


LAST_TRIES = [
    Case("500 for any range", [CUT, refusal(500), GOOD], starts=ANEW),
    Case("no byte of any range comes", [CUT, Reply(send=0), GOOD], starts=ANEW),
]


@pytest.mark.parametrize("retries", [(2,), (0, 1)], ids=["in one run", "in a later run"])
def test_the_last_of_several_tries_asks_for_all(
    cdn: Cdn, tmp_path: Path, retries: Sequence[int]
) -> None:
    for count in retries:
        run = run_cases(cdn, tmp_path, LAST_TRIES, "--retries", str(count))
    for case in LAST_TRIES:
        run.check(case)


def test_a_refused_link_keeps_the_part_for_a_fresh_one(cdn: Cdn, tmp_path: Path) -> None:
    refused = []
    for name, reply in statuses(401, 403, 404, 410, 416).items():
        replies = [CUT, reply, reply, GOOD]
        refused.append(Case(name, replies, starts=[None, HALF, None, HALF]))
    assert run_cases(cdn, tmp_path, refused, "--retries", "2").exit_code == 3
    parts = parts_in(tmp_path / "video_outputs")
    assert [*parts.values()] == [OBJECT[:HALF]] * len(refused)

    run = run_cases(cdn, tmp_path, with_fresh_links(cdn, refused))
    for case in run.cases:
        run.check(case)
    assert hidden_in(run.output_dir) == set()


def test_every_later_run_of_a_server_that_refuses_ranges_comes_home(
    tmp_path: Path, output_dir: Path
) -> None:
    """Cut once; from then on the server serves all of it, and refuses every range."""

    def handle(connection: socket.socket, _: str, headers: Mapping[str, str], number: int) -> None:
        if "Range" in headers:
            connection.sendall(raw_answer(status="403 Forbidden"))
        else:
            answer = raw_answer(OBJECT, ETag='"a"')
            connection.sendall(answer[:HALF] if number == 1 else answer)

    with RawServer(handle) as server:
        link = server.link("0.mp4")
        rows = [make_row(video_url=link)]
        first_run = download(tmp_path, rows, "--retries", "0")
        second_run = download(tmp_path, rows, "--retries", "0")
    assert first_run.returncode == 3
    assert second_run.returncode == 0
    assert_whole(output_dir, "picture_0", make_task_id(0), OBJECT)


def test_what_cannot_be_resumed_is_removed_at_once(cdn: Cdn, tmp_path: Path) -> None:
    run = run_cases(cdn, tmp_path, cases(SAYS_TOO_LITTLE, fails="cut"), "--retries", "0")
    for case in run.cases:
        run.check(case)
    assert hidden_in(run.output_dir) == set()


def test_a_part_stays_for_its_own_task_when_another_is_done(cdn: Cdn, tmp_path: Path) -> None:
    rows = serve(cdn, 2)
    cdn.replies["/0.mp4"] = [CUT, GOOD]
    downloader = make_downloader(tmp_path / "out", retries=0, quiet=True)
    mine, others = rows
    assert not downloader.process_succeeded_task(mine)
    assert downloader.process_succeeded_task(others)
    assert downloader.process_succeeded_task(mine)
    starts = [request.range_start for request in cdn.asked("0.mp4")]
    assert starts == RESUMED
    assert_home(tmp_path / "out", 2)


# --- Network: stalls, and what has no end ---------------------------------------------------------

# With --timeout 0.5 and --retries 2.
STALLS = [
    Case("silent before the head", [Reply(wait_s=60), GOOD], starts=[None, None]),
    Case("silent half way", [Reply(send=HALF, ending="hang"), GOOD], requests=2),
    Case("slow, but above the limit", [Reply(bytes_per_second=70_000)], requests=1),
    Case("a trickle", [Reply(bytes_per_second=400), GOOD], requests=2),
    Case("always silent", [Reply(wait_s=60)], requests=3, fails="stalled|nothing came"),
    Case("a port that lets nobody in", fails="no connection|stalled|nothing came"),
]


@pytest.fixture(scope="module")
def stall_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CasesRun]:
    directory = tmp_path_factory.mktemp("stalls")
    with Cdn() as cdn, deaf_port() as deaf:
        deaf_row = {"video_url": f"{deaf}/0.mp4?_jwt=secret"}
        cases = [*STALLS[:-1], replace(STALLS[-1], row=deaf_row)]
        run = run_cases(cdn, directory, cases, "--timeout", "0.5", "--retries", "2")
        yield replace(run, cases=STALLS)


@pytest.mark.parametrize("case", STALLS, ids=str)
def test_a_silent_server_is_a_stall(stall_run: CasesRun, case: Case) -> None:
    stall_run.check(case)


@pytest.mark.parametrize("sentence", ["silent half way", "a trickle"])
def test_what_came_before_a_stall_is_kept(stall_run: CasesRun, sentence: str) -> None:
    (case,) = [case for case in STALLS if case.sentence == sentence]
    first, second = stall_run.end(case).requests
    assert first.range_start is None
    assert 0 < (second.range_start or 0) <= HALF


@dataclass(frozen=True)
class Drip(Row):
    """The server sends ``first``, then ``again`` every tenth of a second, for ever."""

    first: bytes
    again: bytes
    at_last: bytes = b""  # after that time, when the run is long over


CHUNKS = raw_answer(Content_Length=None, Transfer_Encoding="chunked")
GZIPPED = raw_answer(Content_Length=None, Content_Encoding="gzip")
NAMED_GZIP = b"\x1f\x8b\x08\x08" + bytes(6)  # a file name follows, until a zero byte
WHOLE_AFTER_ALL = b"a\r\nContent-Length: %d\r\n\r\n%s" % (VIDEO_BYTES, OBJECT)
DRIPS = [
    Drip("a head", b"HTTP/1.1 200 OK\r\nX-Long: ", b"a", WHOLE_AFTER_ALL),
    Drip("answers of 100 Continue", b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    Drip("the head of a 100 Continue", b"HTTP/1.1 100 Continue\r\n", b"X-More: 1\r\n"),
    Drip("a chunk line", CHUNKS + b"5;name=", b"a"),
    Drip("trailers", CHUNKS + b"%x\r\n%s\r\n0\r\n" % (VIDEO_BYTES, OBJECT), b"X-More: 1\r\n"),
    Drip("the head of a gzip file", GZIPPED + NAMED_GZIP, b"a"),
    Drip("the head of a gzip file, in a hurry", GZIPPED + NAMED_GZIP, b"a" * 20_000),
    Drip("the answer of a proxy", b"HTTP/1.1 200 OK\r\nX-Long: ", b"a"),
]
GIVEN_UP = "given up"
PATIENT = [refusal(503, "2"), GOOD]  # a wait of our own is longer than a download may be silent


@dataclass(frozen=True)
class DripRun:
    """What a run made of `DRIPS`, and what changed on disk when they came to an end."""

    report: Mapping[str, Any]
    asked: Counter[str]  # requests, by name
    exit_code: int
    output_dir: Path
    at_end: Mapping[str, Any]
    later: Mapping[str, Any]


def have_ended(threads: Iterable[threading.Thread]) -> bool:
    """Whether all of them are gone: the script's own, and those of servers it is connected to."""
    gc.collect()  # closes the connections that nobody uses any more
    return not any(thread.is_alive() for thread in threads)


def run_drips(server: RawServer, cdn: Cdn, directory: Path) -> DripRun:
    """With fewer workers than drips. Other videos are to come home meanwhile."""
    rows = serve(cdn, 5)
    cdn.replies["/0.mp4"] = PATIENT
    links = [server.link(f"{number}.mp4") for number in range(len(DRIPS) - 1)]
    links.append("https://proxied.invalid/0.mp4?_jwt=secret")
    for number, link in enumerate(links, len(rows)):
        rows.append(make_row(number, video_url=link))

    before = set(threading.enumerate())
    write_results(directory, rows)
    env = {"HTTPS_PROXY": server.url, "NO_PROXY": "127.0.0.1"}
    limits = ("--timeout", "0.4", "--retries", "0", "--workers", "6")
    report = run_json(directory, *limits, env=env)
    output_dir = directory / "video_outputs"
    at_end = snapshot(output_dir)

    left_behind = set(threading.enumerate()) - before
    server.released.set()
    wait_until(lambda: have_ended(left_behind))
    asked = Counter(request.path for request in server.requests)
    return DripRun(report, asked, report["exit_code"], output_dir, at_end, snapshot(output_dir))


@pytest.fixture(scope="module")
def drip_run(tmp_path_factory: pytest.TempPathFactory) -> DripRun:
    proxied = "proxied.invalid:443"

    def handle(connection: socket.socket, path: str, _: Mapping[str, str], __: int) -> None:
        drip = DRIPS[-1] if path == proxied else DRIPS[int(path[1:-4])]
        connection.sendall(drip.first)
        while not server.released.wait(0.1):
            connection.sendall(drip.again)
        connection.sendall(drip.at_last)

    with RawServer(handle) as server, Cdn() as cdn:
        return run_drips(server, cdn, tmp_path_factory.mktemp("drips"))


@pytest.mark.parametrize("drip", DRIPS, ids=str)
def test_what_drips_without_end_is_given_up(drip_run: DripRun, drip: Drip) -> None:
    number = DRIPS.index(drip)
    video = drip_run.report["videos"][make_task_id(5 + number)]
    assert video["status"] == "failed", drip
    assert re.search(GIVEN_UP, video["error"]["reason"]), drip
    path = "proxied.invalid:443" if drip == DRIPS[-1] else f"/{number}.mp4"
    assert drip_run.asked[path] == 1, drip


def test_others_come_home_beside_what_has_no_end(drip_run: DripRun) -> None:
    assert drip_run.exit_code == 3
    assert_home(drip_run.output_dir, 5)


def test_what_was_given_up_publishes_nothing_any_more(drip_run: DripRun) -> None:
    assert drip_run.later == drip_run.at_end


def test_a_hung_look_up_and_a_hung_disk_keep_no_run_from_ending(
    cdn: Cdn, tmp_path: Path, output_dir: Path
) -> None:
    rows = [*serve(cdn, 3), make_row(3, video_url="http://hangs.invalid/3.mp4?_jwt=secret")]
    env = fault("hung look-up", of="hangs.invalid") | fault("hung fsync", of="*.part", at=1)
    write_results(tmp_path, rows)
    report = run_json(tmp_path, "--timeout", "0.4", "--retries", "0", run=run_process, env=env)
    assert report["exit_code"] == 3
    statuses = Counter(video["status"] for video in report["videos"].values())
    assert statuses == {"downloaded": 2, "failed": 2}
    assert re.search(GIVEN_UP, report["videos"][make_task_id(3)]["error"]["reason"])
    assert len(cdn.requests) == 3
    assert len([*output_dir.glob("*.mp4")]) == 2


def send_tiny_records(connection: socket.socket, data: bytes) -> None:
    """Each byte in a TLS record of its own, but all of them in one go."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    for byte in data:
        connection.sendall(bytes([byte]))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)


@pytest.mark.skipif(not hasattr(socket, "TCP_CORK"), reason="needs TCP_CORK")
def test_tiny_tls_records_hold_up_nobody_else(tmp_path: Path) -> None:
    def handle(connection: socket.socket, path: str, _: Mapping[str, str], __: int) -> bool:
        number = int(path[1:-4])
        if number:
            server.released.wait(0.2)
            connection.sendall(raw_answer(make_mp4(number)))
            return True
        connection.sendall(raw_answer(OBJECT)[:1000])
        server.released.wait(0.2)
        send_tiny_records(connection, OBJECT[:20_000])
        while not server.released.wait(0.2):
            connection.sendall(b"a")
        return False

    certificate = write_certificate(tmp_path)
    limits = ("--timeout", "0.4", "--retries", "0", "--workers", "4")
    with RawServer(handle, certificate) as server:
        rows = [make_row(i, video_url=server.link(f"{i}.mp4")) for i in range(6)]
        env = {"REQUESTS_CA_BUNDLE": str(certificate)}
        result = download(tmp_path, rows, *limits, run=run_process, env=env)
    assert result.returncode == 3
    for number in range(1, 6):
        output_dir = tmp_path / "video_outputs"
        assert_whole(output_dir, f"picture_{number}", make_task_id(number), make_mp4(number))


# --- Network: what a CDN sees, redirects, connections, secrets ------------------------------------


@dataclass(frozen=True)
class Demand(Row):
    """What a picky CDN wants of a request, and what it answers otherwise."""

    is_met: Callable[[Request], bool]
    otherwise: Reply


def redirect(target: str, **headers: str) -> Reply:
    """Its body has no end: nobody should read it."""
    return Reply(302, OBJECT, {"Location": target, **headers}, send=1, ending="hang")


DEMANDS = [
    Demand(
        "python-urllib3 is refused",
        lambda request: "urllib3" not in request.headers.get("User-Agent", "urllib3"),
        otherwise=refusal(403),
    ),
    Demand(
        "Accept is wanted",
        lambda request: request.headers.get("Accept") == "*/*",
        otherwise=refusal(406),
    ),
    Demand(
        "a cookie is wanted that its redirect sets",
        lambda request: "pass=1" in request.headers.get("Cookie", ""),
        otherwise=redirect("2.mp4", **{"Set-Cookie": "pass=1; Path=/"}),
    ),
    Demand(
        "a redirect is to be followed",
        lambda request: "moved" in request.target,
        otherwise=redirect("/3.mp4?moved&_jwt=secret"),
    ),
]


class PickyCdn(Cdn):
    """Its video number i is for those who meet `DEMANDS[i]`."""

    def next_reply(self, request: Request) -> Reply | None:
        demand = DEMANDS[int(request.path[1:-4])]
        reply = super().next_reply(request)
        return reply if demand.is_met(request) else demand.otherwise


@pytest.fixture(scope="module")
def picky_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CasesRun]:
    served = [Case(str(demand)) for demand in DEMANDS]
    with PickyCdn() as cdn:
        yield run_cases(cdn, tmp_path_factory.mktemp("picky"), served, "--retries", "0")


@pytest.mark.parametrize("number", range(len(DEMANDS)), ids=map(str, DEMANDS))
def test_a_picky_cdn_serves_us_as_it_serves_requests(picky_run: CasesRun, number: int) -> None:
    picky_run.check(picky_run.cases[number])


def test_a_cookie_is_for_its_own_video_alone(picky_run: CasesRun) -> None:
    for request in picky_run.cdn.requests:
        if request.path != "/2.mp4":
            assert "Cookie" not in request.headers, request.path


USELESS_LINKS = {
    "a name that is nowhere": "http://nowhere.invalid/0.mp4?_jwt=secret",
    "a port with nobody": "http://127.0.0.1:1/0.mp4?_jwt=secret",
    "an impossible port": "http://127.0.0.1:99999/0.mp4?_jwt=secret",
    "an impossible host": "http://a..b/0.mp4?_jwt=secret",
    "an unfinished host": "http://[::1/0.mp4?_jwt=secret",
    "a file": "file:///etc/passwd",
}
DEAD_REDIRECTS = {f"a redirect to {name}": redirect(link) for name, link in USELESS_LINKS.items()}


def test_dead_ends_fail_and_tell_no_query(cdn: Cdn, tmp_path: Path) -> None:
    dead_ends = cases(DEAD_REDIRECTS, requests=1, fails=".")
    for name, link in USELESS_LINKS.items():
        dead_ends.append(Case(name, row={"video_url": link}, fails="."))
    run = run_cases(cdn, tmp_path, dead_ends, "--retries", "0")
    told = json.dumps(run.report).replace("RUNWAYML_API_SECRET", "")
    assert not SECRETS.search(told)
    for case in dead_ends:
        run.check(case)


def test_redirects_in_a_circle_come_to_an_end(cdn: Cdn, tmp_path: Path) -> None:
    circle = Case("a circle", [redirect("0.mp4?_jwt=secret")], fails="redirect")
    run = run_cases(cdn, tmp_path, [circle], "--retries", "0")
    run.check(circle)
    assert len(cdn.requests) <= 31  # as with requests


def test_no_password_of_netrc_is_sent(cdn: Cdn, tmp_path: Path) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password hunter2\ndefault login me password x\n")
    netrc.chmod(0o600)
    rows = serve(cdn, 2)
    cdn.replies["/1.mp4"] = [redirect("0.mp4")]
    env = {"HOME": str(tmp_path), "NETRC": str(netrc)}
    download(tmp_path, rows, env=env)
    assert len(cdn.requests) == 3
    for request in cdn.requests:
        assert "Authorization" not in request.headers


def test_connections_are_kept_alive(cdn: Cdn, tmp_path: Path) -> None:
    rows = serve(cdn, 30)
    for number in range(0, 30, 2):
        cdn.replies[f"/{number}.mp4"] = [CHUNKED]
    result = download(tmp_path, rows, "--workers", "3")
    assert result.returncode == 0
    assert len(cdn.requests) == 30
    connections = {request.client for request in cdn.requests}
    assert len(connections) <= 3


class BelatedCdn(Cdn):
    """Answers a faulty first request twice, so that each later answer is one too late."""

    def __init__(self) -> None:
        super().__init__()
        self.owed: dict[Any, bytes] = {}  # by connection: the video that was asked for before

    def next_reply(self, request: Request) -> Reply | None:
        reply = super().next_reply(request)
        owed = self.owed.get(request.client)
        if owed is None and reply == GOOD:
            return reply
        self.owed[request.client] = self.objects[request.path]
        return reply if owed is None else Reply(body=owed)


FAULTY_ANSWERS = {
    "a 500": refusal(500),
    "a 503": refusal(503),
    "a redirect": Reply(302, b"", {"Location": "0.mp4"}),
    "a part that nobody asked for": Reply(206, b"", {"Content-Range": "nonsense"}),
}
NO_VIDEOS = {
    "a 404": refusal(404),
    "a text": Reply(body=b"Please wait"),
    "nothing": Reply(body=b""),
}
FIRST_ANSWERS = [
    *cases(FAULTY_ANSWERS, after=[GOOD]),
    *cases(NO_VIDEOS, after=[GOOD], fails="."),
]


@pytest.mark.parametrize("first", FIRST_ANSWERS, ids=str)
def test_a_request_that_is_answered_twice_shifts_no_video(tmp_path: Path, first: Case) -> None:
    followers = [Case(f"video {number}", body=make_mp4(number)) for number in range(3)]
    with BelatedCdn() as cdn:
        run = run_cases(cdn, tmp_path, [first, *followers], "--workers", "1")
    for case in run.cases:
        run.check(case)


def test_a_video_that_is_sent_twice_at_once_is_not_the_next_one_too(
    cdn: Cdn, tmp_path: Path, output_dir: Path
) -> None:
    rows = serve(cdn, 4)
    body = make_mp4(0)
    again = raw_answer(body, ETag=make_etag(body))
    cdn.replies["/0.mp4"] = [headed("Content-Length", str(VIDEO_BYTES), body=body + again)]
    assert download(tmp_path, rows, "--workers", "1").returncode == 0
    assert_home(output_dir, 4)


def test_after_a_fault_no_idle_connection_is_used_again(cdn: Cdn, tmp_path: Path) -> None:
    """Two videos leave two connections; one is idle when the other brings a fault."""
    rows = serve(cdn, 3, Reply(wait_s=0.1))
    cdn.replies["/2.mp4"] = [Reply(status=500, body=b"no", wait_s=0.2), GOOD]
    assert download(tmp_path, rows, "--workers", "2").returncode == 0
    first_three = {request.client for request in cdn.requests[:3]}
    assert len(first_three) == 2, "nothing to see: no connection was kept alive"
    assert cdn.requests[3].client not in first_three


# --- Network: waits and tries, servers under pressure, a system that is short ---------------------


def ask_in_vain(error: dsv.TransientError, allowed: int = 3, jitter: float = 0.5) -> list[float]:
    """The waits of a link that always answers with ``error``, until no try is left."""
    started_s = 1000.0
    now_s = started_s
    retries = dsv.Retries(allowed, started_s)
    waits: list[float] = []
    while len(waits) < 1000:
        try:
            waits.append(retries.delay_s(error, now_s, jitter))
        except dsv.TaskError:
            return waits
        now_s += waits[-1]
    pytest.fail("the tries have no end")


FAULT = dsv.TransientError("cut")
PRESSED = dsv.TransientError("HTTP 503", is_pressure=True)
JITTERS = [0.0, 0.5, 1.0]


@pytest.mark.parametrize("allowed", [0, 1, 3, 10])
def test_a_fault_uses_up_a_try(allowed: int) -> None:
    assert len(ask_in_vain(FAULT, allowed)) == allowed


@pytest.mark.parametrize("jitter", JITTERS)
def test_waits_double_up_to_a_bound(jitter: float) -> None:
    waits = ask_in_vain(FAULT, allowed=100, jitter=jitter)
    assert [wait / waits[0] for wait in waits[:4]] == pytest.approx([1, 2, 4, 8])
    assert waits == sorted(waits)
    assert 0 < waits[0] < 2
    assert waits[-1] <= 60


def test_waits_have_jitter() -> None:
    pairs = zip(ask_in_vain(FAULT, jitter=0.0), ask_in_vain(FAULT, jitter=1.0), strict=True)
    assert all(least < most for least, most in pairs)


@pytest.mark.parametrize("jitter", JITTERS)
def test_a_refusal_is_free_for_15_s_and_ends_within_a_minute(jitter: float) -> None:
    waits = ask_in_vain(PRESSED, jitter=jitter)
    assert 15 <= sum(waits) <= 60
    assert max(waits) <= 8
    assert len(waits) <= 40


def test_refusals_are_asked_again_with_growing_waits() -> None:
    waits = ask_in_vain(PRESSED)
    assert waits[:4] == sorted(waits[:4])
    assert waits[3] > waits[0]


def test_without_tries_a_refusal_is_still_free_at_first() -> None:
    assert 15 <= sum(ask_in_vain(PRESSED, allowed=0)) <= 60


@pytest.mark.parametrize("is_pressure", [True, False])
@pytest.mark.parametrize("jitter", JITTERS)
def test_never_less_than_retry_after(is_pressure: bool, jitter: float) -> None:
    error = dsv.TransientError("HTTP 503", wait_s=45.0, is_pressure=is_pressure)
    assert min(ask_in_vain(error, jitter=jitter)) >= 45


@dataclass(frozen=True)
class Progress(Row):
    """How many bytes each of several tries brought, before and after tries were used up."""

    sizes: Sequence[int]
    is_whole: bool
    renews: bool


PROGRESS = [
    Progress("64 kB", [65_536], is_whole=False, renews=True),
    Progress("the rest", [10], is_whole=True, renews=True),
    Progress("60 kB", [60_000], is_whole=False, renews=False),
    Progress("nothing more than before", [65_536, 65_536], is_whole=False, renews=False),
    Progress("64 kB more than before", [65_536, 131_072], is_whole=False, renews=True),
    Progress("less than before", [131_072, 65_536], is_whole=False, renews=False),
]


@pytest.mark.parametrize("progress", PROGRESS, ids=str)
def test_a_try_that_brings_64_kb_more_renews_the_tries(progress: Progress) -> None:
    retries = dsv.Retries(allowed=1, started_s=0.0)
    for size in progress.sizes[:-1]:
        retries.progressed(size, is_whole=False)
    retries.delay_s(FAULT, 1.0, 0.5)
    retries.progressed(progress.sizes[-1], is_whole=progress.is_whole)
    if progress.renews:
        assert retries.delay_s(FAULT, 2.0, 0.5) > 0
    else:
        with pytest.raises(dsv.TaskError):
            retries.delay_s(FAULT, 2.0, 0.5)


class BusyCdn(Cdn):
    """Serves 50 requests a second and answers the others with ``refused``."""

    def __init__(self, refused: Reply) -> None:
        super().__init__()
        self.refusals = 0
        self._refused = refused
        self._free_at = 0.0

    def next_reply(self, request: Request) -> Reply | None:
        reply = super().next_reply(request)
        with self._lock:
            if request.at < self._free_at:
                self.refusals += 1
                return self._refused
            self._free_at = max(self._free_at, request.at - 0.1) + 1 / 50
        return reply


@dataclass(frozen=True)
class Pressure(Row):
    workers: int
    refused: Reply


PRESSURES = [
    Pressure("64 workers and 429", 64, refusal(429)),
    Pressure("16 workers and 503 with a Retry-After", 16, refusal(503, "1")),
]


def test_all_come_home_from_a_server_under_pressure(tmp_path: Path) -> None:
    """Without a try to lose. Both runs at once, as most of the time goes into waits."""
    with contextlib.ExitStack() as stack:
        runs = []
        for number, pressure in enumerate(PRESSURES):
            cdn = stack.enter_context(BusyCdn(pressure.refused))
            directory = tmp_path / str(number)
            directory.mkdir()
            write_results(directory, serve(cdn, 30, size=SMALL))
            limits = ("--workers", str(pressure.workers), "--retries", "0")
            runs.append((pressure, cdn, start_script(directory, *limits), directory))
        for pressure, cdn, process, directory in runs:
            assert finish(process).returncode == 0, pressure
            assert_home(directory / "video_outputs", 30, SMALL)
            assert cdn.refusals <= 180, pressure


def test_links_that_are_always_refused_hold_up_no_other(
    cdn: Cdn, tmp_path: Path, output_dir: Path
) -> None:
    rows = serve(cdn, 20)
    for number, code in enumerate([429, 500, 503]):
        cdn.replies[f"/{number}.mp4"] = [refusal(code, "30")]
    write_results(tmp_path, rows)
    process = start_script(tmp_path, "--workers", "4")
    wait_until(lambda: len([*output_dir.glob("*.mp4")]) == 17)
    process.send_signal(signal.SIGINT)
    assert finish(process).returncode == 130
    assert len(cdn.requests) == 20


def test_few_descriptors_mean_fewer_workers(cdn: Cdn, tmp_path: Path, output_dir: Path) -> None:
    rows = serve(cdn, 60, Reply(wait_s=0.02), size=SMALL)
    few = ("bash", "-c", 'ulimit -n 64; exec "$@"', "x")
    result = download(tmp_path, rows, run=run_process, before=few)
    assert (result.returncode, result.stderr) == (0, "")
    assert_home(output_dir, 60, SMALL)
    assert len(cdn.requests) == 60


def test_workers_start_a_moment_apart(cdn: Cdn, tmp_path: Path, output_dir: Path) -> None:
    rows = serve(cdn, 40, Reply(wait_s=0.5), size=SMALL)
    download(tmp_path, rows, "--workers", "40")
    assert_home(output_dir, 40, SMALL)
    asked_at = [request.at for request in cdn.requests]
    assert max(asked_at) - min(asked_at) > 0.1


@pytest.mark.parametrize("count", [0, 3])
def test_few_threads_mean_fewer_workers(
    cdn: Cdn, tmp_path: Path, output_dir: Path, count: int
) -> None:
    env = fault("few threads", after=count)
    result = download(tmp_path, serve(cdn, 9), run=run_process, env=env)
    assert (result.returncode, result.stderr) == (0, "")
    assert_home(output_dir, 9)


# --- Network: messages that blame the right thing -------------------------------------------------


@dataclass(frozen=True)
class BadCertificate(Row):
    kind: str  # of `CERTIFICATES`
    is_trusted: bool
    says: str


BAD_CERTIFICATES = [
    BadCertificate("expired", "expired", True, "expired"),
    BadCertificate("not yet valid", "not yet valid", True, "not yet valid"),
    BadCertificate("for another host", "another host", True, "another host|other host"),
    BadCertificate("of somebody unknown", "good", False, "not trusted"),
]


@pytest.mark.parametrize("bad", BAD_CERTIFICATES, ids=str)
def test_a_bad_certificate_fails_at_once_and_is_told_as_it_is(
    tmp_path: Path, bad: BadCertificate
) -> None:
    certificate = write_certificate(tmp_path, bad.kind)
    env = {"REQUESTS_CA_BUNDLE": str(certificate)} if bad.is_trusted else {}
    with Cdn(certificate) as cdn:
        result = download(tmp_path, serve(cdn, 1), env=env)
    assert result.returncode == 3
    reason = result.stderr.splitlines()[1]
    assert re.search(bad.says, reason), bad
    blamed = [each.says for each in BAD_CERTIFICATES if re.search(each.says, reason)]
    assert blamed == [bad.says], reason
    assert "tried" not in result.stderr
    assert cdn.requests == []


def test_a_bundle_of_ones_own_is_trusted_and_loaded_once_a_run(tmp_path: Path) -> None:
    log = tmp_path / "log"
    certificate = write_certificate(tmp_path)
    env = fault("log", log=str(log), calls=["load CA bundle"])
    env["REQUESTS_CA_BUNDLE"] = str(certificate)
    with Cdn(certificate) as cdn:
        rows = serve(cdn, 20, Reply(wait_s=0.05))
        result = download(tmp_path, rows, "--workers", "10", run=run_process, env=env)
    assert result.returncode == 0
    assert len({request.client for request in cdn.requests}) == 10
    assert len(log.read_text().splitlines()) == 1


def test_a_directory_of_certificates_is_a_bundle_too(tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    with Cdn(certificate) as cdn:
        (bundle / f"{subject_hash(certificate)}.0").write_bytes(certificate.read_bytes())
        result = download(tmp_path, serve(cdn, 1), env={"REQUESTS_CA_BUNDLE": str(bundle)})
    assert result.returncode == 0


def subject_hash(certificate: Path) -> str:
    """The name under which OpenSSL looks for ``certificate`` in a directory."""
    command = ["openssl", "x509", "-noout", "-subject_hash", "-in", str(certificate)]
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@dataclass(frozen=True)
class BadSetup(Row):
    """A variable names a file that cannot be used."""

    variable: str
    path: str


BAD_SETUPS = [
    BadSetup("a bundle that is not there", "REQUESTS_CA_BUNDLE", "gone/bundle.pem"),
    BadSetup("curl's bundle is not there", "CURL_CA_BUNDLE", "gone/bundle.pem"),
    BadSetup("a bundle without certificates", "REQUESTS_CA_BUNDLE", "text.pem"),
    BadSetup("a key log that cannot be opened", "SSLKEYLOGFILE", "gone/keys.log"),
]


def bad_environment(directory: Path, bad: BadSetup) -> dict[str, str]:
    (directory / "text.pem").write_text("This is no certificate.\n")
    env = {bad.variable: str(directory / bad.path)}
    if bad.variable == "CURL_CA_BUNDLE":
        env["REQUESTS_CA_BUNDLE"] = ""
    return env


@pytest.mark.parametrize("bad", BAD_SETUPS, ids=str)
def test_what_keeps_tls_from_being_set_up_is_one_line(tmp_path: Path, bad: BadSetup) -> None:
    rows = [make_row(video_url="https://127.0.0.1:1/0.mp4?_jwt=secret")]
    result = download(tmp_path, rows, "-q", env=bad_environment(tmp_path, bad))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert str(tmp_path / bad.path) in line


@pytest.mark.parametrize("bad", BAD_SETUPS, ids=str)
def test_what_keeps_tls_from_being_set_up_ends_no_program(
    tmp_path: Path, bad: BadSetup, capsys: pytest.CaptureFixture[str]
) -> None:
    row = make_row(video_url="https://127.0.0.1:1/0.mp4?_jwt=secret")
    with mock.patch.dict(os.environ, bad_environment(tmp_path, bad)):
        assert not make_downloader(tmp_path / "out").process_succeeded_task(row)
    said = capsys.readouterr()
    assert str(tmp_path / bad.path) in said.out + said.err


@dataclass(frozen=True)
class BadProxy(Row):
    env: Mapping[str, str]
    says: str
    link: str = "http://cdn.invalid/0.mp4?_jwt=secret"


TO_TLS = "https://cdn.invalid/0.mp4?_jwt=secret"
REFUSING = "proxy that refuses"  # in the place of an address
SILENT = "proxy that hangs up"
BAD_PROXIES = [
    BadProxy("nobody listens", {"http_proxy": "http://me:secret@127.0.0.1:1"}, "proxy"),
    BadProxy("nobody listens, TLS", {"https_proxy": "http://127.0.0.1:1"}, "proxy", TO_TLS),
    BadProxy("its name is nowhere", {"http_proxy": "http://nowhere.invalid:3128"}, "proxy"),
    BadProxy("it wants a password", {"http_proxy": REFUSING}, "proxy.*407|407.*proxy"),
    BadProxy("it wants a password, TLS", {"https_proxy": REFUSING}, "proxy", TO_TLS),
    BadProxy("it hangs up, TLS", {"https_proxy": SILENT}, "proxy", TO_TLS),
    BadProxy("SOCKS", {"all_proxy": "socks5h://127.0.0.1:1"}, "(?i)proxy|SOCKS"),
    BadProxy("no address", {"http_proxy": "http://"}, "proxy"),
]


@pytest.fixture(scope="module")
def proxies() -> Iterator[Mapping[str, str]]:
    """The addresses of real servers, by what stands for them in `BAD_PROXIES`."""

    def refuse(connection: socket.socket, *_: object) -> None:
        answer = raw_answer(b"", "407 Proxy Authentication Required", Proxy_Authenticate="Basic")
        connection.sendall(answer)

    def hang_up(*_: object) -> bool:
        return False

    with RawServer(refuse) as refusing, RawServer(hang_up) as silent:
        yield {REFUSING: refusing.url, SILENT: silent.url}


@pytest.mark.parametrize("bad", BAD_PROXIES, ids=str)
def test_a_fault_of_the_proxy_says_so(
    tmp_path: Path, proxies: Mapping[str, str], bad: BadProxy
) -> None:
    env = {"NO_PROXY": "", "no_proxy": ""}
    for name, address in bad.env.items():
        env[name] = proxies.get(address, address)
    result = download(tmp_path, [make_row(video_url=bad.link)], "-q", "--retries", "0", env=env)
    assert result.returncode == 3
    reason = result.stderr.splitlines()[0]
    assert re.search(bad.says, reason), f"{bad}: {result.stderr}"


# --- Network: Ctrl-C, SIGTERM and SIGHUP ----------------------------------------------------------


@dataclass(frozen=True)
class Situation(Row):
    """What one of two videos is about when the signal comes. The other is at home by then."""

    signal_name: str
    reply: Reply | None = None  # None: the link leads elsewhere
    host: str = ""  # of the link, if it leads elsewhere
    faults: Mapping[str, str] = field(default_factory=dict)
    times: int = 1  # how often the signal is sent


HALF_OF_BIG = Reply(pause_at=BIG // 2)
HUNG_DISK = fault("hung fsync", of="*.part", at=1)  # one of the two, no matter which
HUNG_LOOK_UP = fault("hung look-up", of="hangs.invalid")
SITUATIONS = [
    Situation("a body that comes", "SIGINT", HALF_OF_BIG),
    Situation("a body that comes, and SIGTERM", "SIGTERM", HALF_OF_BIG),
    Situation("a body that comes, and SIGHUP", "SIGHUP", HALF_OF_BIG),
    Situation("a head that does not come", "SIGTERM", Reply(wait_s=60)),
    Situation("an impatient user", "SIGINT", Reply(wait_s=60), times=3),
    Situation("a trickle", "SIGHUP", Reply(bytes_per_second=40)),
    Situation("a back-off", "SIGINT", refusal(500, "50")),
    Situation("a server under pressure", "SIGTERM", refusal(503, "50")),
    Situation("a connection that is not made", "SIGHUP", host="deaf"),
    Situation("a name that is looked up", "SIGINT", host="hangs.invalid", faults=HUNG_LOOK_UP),
    Situation("a disk that hangs", "SIGTERM", GOOD, faults=HUNG_DISK),
]


@dataclass(frozen=True)
class StoppedRun:
    directory: Path
    result: subprocess.CompletedProcess[str]

    @property
    def output_dir(self) -> Path:
        return self.directory / "video_outputs"


@dataclass(frozen=True)
class StoppedRuns:
    cdn: Cdn
    by_situation: Mapping[str, StoppedRun]


def start_situation(
    cdn: Cdn, deaf: str, directory: Path, situation: Situation
) -> subprocess.Popen[str]:
    name = directory.name
    rows = [make_row(0, video_url=cdn.add(f"{name}/0.mp4", OBJECT))]
    if situation.reply:
        link = cdn.add(f"{name}/1.mp4", make_mp4(1, BIG), situation.reply, GOOD)
    elif situation.host == "deaf":
        link = f"{deaf}/1.mp4"
    else:
        link = f"http://{situation.host}/1.mp4"
    write_results(directory, [*rows, make_row(1, video_url=link)])
    return start_script(directory, env=situation.faults)


def is_reached(cdn: Cdn, directory: Path, situation: Situation) -> bool:
    """One video is at home, the other as far as it comes."""
    output_dir = directory / "video_outputs"
    if not any(output_dir.glob("*.mp4")):
        return False
    if situation.reply and not cdn.asked(f"{directory.name}/1.mp4"):
        return False
    return situation.reply != HALF_OF_BIG or bool(parts_in(output_dir))


@pytest.fixture(scope="module")
def stopped_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoppedRuns]:
    """One run for each situation; all of them are stopped at once, and end at once."""
    directories = {str(each): tmp_path_factory.mktemp("stopped") for each in SITUATIONS}
    processes = {}
    with Cdn() as cdn, deaf_port() as deaf:
        for situation in SITUATIONS:
            directory = directories[str(situation)]
            processes[str(situation)] = start_situation(cdn, deaf, directory, situation)
        for situation in SITUATIONS:
            directory = directories[str(situation)]
            wait_until(functools.partial(is_reached, cdn, directory, situation))

        for situation in SITUATIONS:
            stop(processes[str(situation)], situation)
        by_situation = {}
        for name, process in processes.items():
            wait_until_ended(process)
            by_situation[name] = StoppedRun(directories[name], finish(process))
        yield StoppedRuns(cdn, by_situation)


def stop(process: subprocess.Popen[str], situation: Situation) -> None:
    number = getattr(signal, situation.signal_name)
    for _ in range(situation.times):
        process.send_signal(number)


def wait_until_ended(process: subprocess.Popen[Any]) -> None:
    """No server does anything meanwhile, and the first time limit of the script is 30 s."""
    wait_until(lambda: process.poll() is not None, seconds=10)


@unix_only
@pytest.mark.parametrize("situation", SITUATIONS, ids=str)
def test_a_signal_ends_the_run_with_its_statistics(
    stopped_runs: StoppedRuns, situation: Situation
) -> None:
    run = stopped_runs.by_situation[str(situation)]
    result = run.result
    number = getattr(signal, situation.signal_name)
    assert result.returncode == 128 + number, result
    assert statistic(result, "Total SUCCEEDED tasks found") == 2
    assert statistic(result, "Videos downloaded") == 1
    assert statistic(result, "Failed downloads") == 0
    assert "⏸ stopped: 1 on disk, 1 not finished" in result.stderr
    visible = sorted(path.suffix for path in run.output_dir.glob("picture_*"))
    assert visible == [".json", ".mp4"], "a name without its video, or without its metadata"


@unix_only
@pytest.mark.parametrize("name", [str(each) for each in SITUATIONS if each.reply == HALF_OF_BIG])
def test_a_stopped_run_keeps_what_came_and_the_next_resumes_it(
    stopped_runs: StoppedRuns, name: str
) -> None:
    run = stopped_runs.by_situation[name]
    body = make_mp4(1, BIG)
    (part,) = parts_in(run.output_dir).values()
    assert body.startswith(part)
    said = re.search("1 not finished, ([0-9.]+) MB of .* kept", run.result.stderr)
    assert said, run.result.stderr
    part_mb = len(part) / 1024**2
    assert float(said[1]) == pytest.approx(part_mb, abs=0.1)

    again = run_script(run.directory)
    assert again.returncode == 0
    asked = stopped_runs.cdn.asked(f"{run.directory.name}/1.mp4")
    starts = [request.range_start for request in asked]
    assert starts == [None, len(part)]
    assert_whole(run.output_dir, "picture_1", make_task_id(1), body)
    assert hidden_in(run.output_dir) == set()


@unix_only
def test_nohup_is_heeded(cdn: Cdn, tmp_path: Path, output_dir: Path) -> None:
    write_results(tmp_path, serve(cdn, 1, Reply(wait_s=60)))
    process = start_script(tmp_path, before=["nohup"])
    wait_until(lambda: cdn.requests)
    process.send_signal(signal.SIGHUP)
    cdn.released.set()
    assert finish(process).returncode == 0
    assert_home(output_dir, 1)


@unix_only
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_modules_are_loaded_is_no_traceback(tmp_path: Path, name: str) -> None:
    write_results(tmp_path, [])
    stops = f"import os, signal; os.kill(os.getpid(), signal.{name}); signal.pause()"
    (tmp_path / "requests.py").write_text(stops)
    result = run_process(tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 128 + getattr(signal, name)
    assert (result.stdout, result.stderr) == ("", "")


PROGRAM = """
import sys
from download_succeeded_videos import VideoDownloader
VideoDownloader("video_outputs").process_polling_results_file(sys.argv[1])
"""


@unix_only
def test_a_program_that_uses_the_class_ends_soon_after_ctrl_c(cdn: Cdn, tmp_path: Path) -> None:
    file = write_results(tmp_path, serve(cdn, 2, Reply(wait_s=60)))
    cdn.replies["/1.mp4"] = [Reply(send=HALF, ending="hang"), GOOD]
    env = script_environment(PYTHONPATH=str(SCRIPT.parent))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, file], cwd=tmp_path, env=env, stderr=subprocess.PIPE
    )
    output_dir = tmp_path / "video_outputs"
    wait_until(lambda: len(cdn.requests) == 2 and parts_in(output_dir))
    process.send_signal(signal.SIGINT)
    wait_until_ended(process)
    assert b"KeyboardInterrupt" in process.communicate()[1]
    (part,) = parts_in(output_dir).values()
    assert make_mp4(1).startswith(part)


# --- Runway: links that die, and secrets ----------------------------------------------------------

EXPIRED = 1_750_000_000  # 2025-06-15 15:06:40 UTC
NOT_ALL = Reply(body=b" " * 3_000_000, send=3_000_000, ending="hang")
MOVED = headed("Location", "../moved/secret", status=302, body=b"")
DEAD = refusal(403)


@dataclass(frozen=True)
class Renewal(Row):
    """A task whose link is refused, or missing, and what Runway says of it."""

    answers: Sequence[Reply | dict[str, Any]] = ({},)  # in turn; {}: changes to a good answer
    asked: int | None = 1  # how often Runway is; None: not looked at
    fails: str = ""  # pattern of the reason; "": the video comes home
    link: Any = (DEAD,)  # what the CDN replies to the link; else what the row holds
    fresh: Sequence[Reply] = (GOOD,)
    starts: Sequence[int | None] = (None,)  # of what is asked of the fresh link


def in_vain(
    answers: Mapping[str, Reply | dict[str, Any]], asked: int | None, fails: str
) -> list[Renewal]:
    """Tasks that come to nothing, as Runway gives always the same answer."""
    return [Renewal(name, [answer], asked, fails, starts=()) for name, answer in answers.items()]


RENEWED = [
    Renewal("a refused link is renewed"),
    *[Renewal(f"so it is after {code}", link=(refusal(code),)) for code in (401, 404, 410)],
    Renewal("a missing link is asked for", link=None),
    Renewal("an unusable one as well", link="soon"),
    Renewal("the fresh link goes on where the dead one ended", link=(CUT, DEAD), starts=(HALF,)),
    Renewal("a fresh link is tried again", fresh=(refusal(500), GOOD), starts=(None, None)),
    Renewal("Runway is asked again after 429", [refusal(429), {}], 2),
    Renewal("and after 500", [refusal(500), {}], 2),
]
NOT_RENEWED = [
    Renewal("a fresh link is renewed no more", fails="refused", fresh=(DEAD,)),
    Renewal("Runway is not asked for ever", [refusal(500)], 3, "(Runway|API).*500", starts=()),
    Renewal("nor after minutes", [refusal(429, "300")], 1, "429.*300 s", starts=()),
    Renewal("nor after 403", [DEAD], 1, "(Runway|API).*403", starts=()),
    Renewal("nor after 404", [refusal(404)], 1, "Runway.*(404|know)", starts=()),
    Renewal("no redirect is followed", [MOVED], 1, "(Runway|API).*302", starts=()),
    Renewal("it has failed by now", [{"status": "FAILED", "output": None}], 1, "FAILED", starts=()),
]
ANSWERS_WITHOUT_LINK: dict[str, Reply | dict[str, Any]] = {
    "no output": {"output": None},
    "an empty output": {"output": []},
    "an output that is no link": {"output": ["soon"]},
    "a status that holds the key": {"status": API_KEY, "output": []},
}
NO_ANSWER: dict[str, Reply | dict[str, Any]] = {
    "not JSON": Reply(body=b"<html>"),
    "no object": Reply(body=b"[]"),
    "nested absurdly": Reply(body=b"[" * 200_000),
    "more than 1 MB": {"more": "x" * 2**20},
    "without end": NOT_ALL,
}
RENEWALS = [*RENEWED, *NOT_RENEWED]
RENEWALS += in_vain(ANSWERS_WITHOUT_LINK, 1, "Runway|API")
RENEWALS += in_vain(NO_ANSWER, None, "Runway|API")
RENEWALS += [
    Renewal(f"{code} has other causes", (), 0, f"HTTP {code}", link=(refusal(code),), starts=())
    for code in (400, 402, 451)
]


@dataclass(frozen=True)
class RenewalsRun:
    cdn: Cdn
    api: RunwayApi
    output_dir: Path
    videos: Mapping[str, Any]
    rows: Sequence[dict[str, Any]]


@pytest.fixture(scope="module")
def renewals_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RenewalsRun]:
    """One run of the script over the whole table, a row a video."""
    directory = tmp_path_factory.mktemp("renewals")
    rows = []
    with Cdn() as cdn, RunwayApi() as api:
        for number, case in enumerate(RENEWALS):
            fresh = cdn.add(f"{number}/fresh.mp4", OBJECT, *case.fresh)
            link = case.link
            if isinstance(link, tuple):
                dead = cdn.add(f"{number}/dead.mp4", OBJECT, *link)
                link = make_jwt_link(dead.partition("?")[0], EXPIRED)
            row = make_row(number, video_url=link)
            rows.append(row)
            tell(api, row["task_id"], fresh, case.answers)
        env = api.env | {"RUNWAYML_BASE_URL": api.url + "/"}
        result = download(directory, rows, "--json", "--workers", "64", "--retries", "2", env=env)
        assert result.returncode == 3
        videos = {video["task_id"]: video for video in json.loads(result.stdout)["videos"]}
        yield RenewalsRun(cdn, api, directory / "video_outputs", videos, rows)


@pytest.mark.parametrize("case", RENEWALS, ids=str)
def test_a_dead_or_missing_link_is_renewed_once(renewals_run: RenewalsRun, case: Renewal) -> None:
    number = RENEWALS.index(case)
    task_id = make_task_id(number)
    video = renewals_run.videos[task_id]
    if case.fails:
        assert video["status"] == "failed", video
        assert re.search(case.fails, said_of(video)), video
    else:
        assert video["error"] is None, video
        assert_whole(renewals_run.output_dir, f"picture_{number}", task_id, OBJECT)
    asked = len(renewals_run.api.asked(task_id))
    assert asked <= 3
    if case.asked is not None:
        assert asked == case.asked
    fresh = renewals_run.cdn.asked(f"{number}/fresh.mp4")
    starts = [request.range_start for request in fresh]
    assert starts == list(case.starts)


def said_of(video: Mapping[str, Any]) -> str:
    """Why ``video``, as --json gives it, failed, and what the user can do."""
    error = video["error"]
    return f"{error['reason']} {error['hint']}"


def test_the_api_is_asked_as_runway_wants_it(renewals_run: RenewalsRun) -> None:
    for request in renewals_run.api.requests:
        assert request.headers["Authorization"] == f"Bearer {API_KEY}"
        assert request.headers["X-Runway-Version"] == "2024-11-06"
        assert re.fullmatch(r"/v1/tasks/[-0-9a-f]+", request.target)


def test_the_api_key_is_seen_by_no_other_host_and_kept_nowhere(renewals_run: RenewalsRun) -> None:
    for request in renewals_run.cdn.requests:
        assert "Authorization" not in request.headers
        assert API_KEY not in f"{request.target} {request.headers}"
    assert len(renewals_run.cdn.requests) > len(RENEWALS)
    for path in renewals_run.output_dir.rglob("*"):
        assert path.is_dir() or API_KEY.encode() not in path.read_bytes()


def test_the_metadata_holds_the_rows_link(renewals_run: RenewalsRun) -> None:
    text = (renewals_run.output_dir / "picture_0.json").read_text(encoding="utf-8")
    link = json.loads(text)["runway_task_json"]["video_url"]
    assert link == renewals_run.rows[0]["video_url"]


def test_a_fresh_link_is_told(tmp_path: Path, cdn: Cdn, api: RunwayApi) -> None:
    row = make_row(video_url=cdn.add("dead/0f3b0be2-a946-4f5c-b1c2.mp4", b"", refusal(403)))
    fresh = cdn.add("fresh/0f3b0be2-a946-4f5c-b1c2.mp4", WHOLE)
    tell(api, row["task_id"], fresh, [{}])
    result = download(tmp_path, [row], env=api.env)
    assert result.returncode == 0
    assert "fresh link" in result.stdout.lower()
    assert f"  📥 Streaming download from: {fresh[:50]}...\n" in result.stdout


def test_without_a_base_url_runways_own_is_asked(tmp_path: Path, cdn: Cdn) -> None:
    row = make_row(video_url=None)
    link = cdn.add("0.mp4", WHOLE)
    with responses.RequestsMock() as runway:
        runway.add_passthru(cdn.url)
        url = f"https://api.dev.runwayml.com/v1/tasks/{row['task_id']}"
        runway.get(url, json=make_answer(row["task_id"], link))
        result = download(tmp_path, [row], env={"RUNWAYML_API_SECRET": API_KEY})
    assert result.returncode == 0
    assert len(cdn.requests) == 1


NO_KEY = {"RUNWAYML_API_SECRET": ""}
DEAD_LINKS = [
    *[Case(f"{code}, with the expiry", [refusal(code)], requests=1,
           fails="2025-06-15 15:06:40 UTC.*RUNWAYML_API_SECRET") for code in (401, 403, 404, 410)],
    Case("no link", requests=0, fails="video_url.*RUNWAYML_API_SECRET", row={"video_url": None}),
]  # fmt: skip


@pytest.mark.parametrize("env", [{}, NO_KEY], ids=["no key", "an empty key"])
def test_without_a_key_expiry_and_remedy_are_said(
    tmp_path: Path, cdn: Cdn, env: Mapping[str, str]
) -> None:
    cases = []
    for number, case in enumerate(DEAD_LINKS):
        link = make_jwt_link(f"{cdn.url}/{number}.mp4", EXPIRED)
        cases.append(replace(case, row={"video_url": link, **case.row}))
    run = run_cases(cdn, tmp_path, cases, env=env)
    for case in cases:
        run.check(case)
    assert run.exit_code == 3
    codes = [run.end(case).outcome["error"]["http_status"] for case in cases]
    assert codes == [401, 403, 404, 410, None]


def test_the_link_that_dies_soonest_is_asked_for_first(cdn: Cdn, tmp_path: Path) -> None:
    expiries = [4_000_000_300, EXPIRED, 4_000_000_100, 4_000_000_200.5]
    rows = serve(cdn, 5, size=SMALL)  # the link of the last one says nothing
    for number, expiry in enumerate(expiries):
        rows[number]["video_url"] = make_jwt_link(f"{cdn.url}/{number}.mp4", expiry)
    download(tmp_path, rows, "--workers", "1")
    asked = [request.path for request in cdn.requests]
    assert asked == ["/1.mp4", "/2.mp4", "/3.mp4", "/0.mp4", "/4.mp4"]


BAD_KEYS = ["“key_secret”", "key\nsecret", "секрет", "key_secret\udcff"]


@pytest.mark.parametrize("key", BAD_KEYS, ids=ascii)
def test_a_key_that_no_header_can_hold_is_named(
    tmp_path: Path, cdn: Cdn, api: RunwayApi, key: str
) -> None:
    rows = serve(cdn, 3, size=SMALL)
    cdn.add("1.mp4", b"", refusal(403))
    rows[2] = make_unfinished(2)
    env = api.env | {"RUNWAYML_API_SECRET": key}
    write_results(tmp_path, rows)
    report = run_json(tmp_path, env=env)
    assert report["exit_code"] == 3
    assert report["stats"] == figures(total_succeeded=2, downloaded=1, failed_downloads=1)
    refused = report["videos"][make_task_id(1)]
    assert re.search("RUNWAYML_API_SECRET.*header", said_of(refused))
    assert re.search("RUNWAYML_API_SECRET.*header", report["console"])
    assert api.requests == []
    assert key not in str(report)


def test_such_a_key_ends_no_program(tmp_path: Path, cdn: Cdn, api: RunwayApi) -> None:
    row = make_row(video_url=cdn.add("0.mp4", b"", refusal(403)))
    downloader = make_downloader(tmp_path)
    with mock.patch.dict(os.environ, api.env | {"RUNWAYML_API_SECRET": BAD_KEYS[0]}):
        assert downloader.process_succeeded_task(row) is False
        assert downloader.process_succeeded_task(make_unfinished(1)) is False


CLOSED = "http://127.0.0.1:1/closed.mp4?_jwt=secret.closed"
TALKATIVE = [
    Case("a closed port", row={"video_url": CLOSED}, fails="."),
    Case("a redirect to one", [headed("Location", CLOSED, status=302, body=b"")], fails="."),
    Case("redirects without end", [headed("Location", "?_jwt=secret", status=302)], fails="."),
    Case("a redirect to nowhere", [headed("Location", "http://?_jwt", status=302)], fails="."),
    Case("a host that is none", row={"video_url": "http://a..b/x.mp4?_jwt=secret"}, fails="."),
    Case("a broken framing", [Reply(framing="chunked", headers={"Content-Encoding": "gzip"})],
         fails="cannot be decoded"),
]  # fmt: skip


def test_no_query_is_printed_whatever_a_library_says(tmp_path: Path, cdn: Cdn) -> None:
    run = run_cases(cdn, tmp_path, TALKATIVE, "--retries", "0")
    for case in TALKATIVE:
        run.check(case)
    printed = f"{run.report} {run.console}".replace("RUNWAYML_API_SECRET", "")
    assert not SECRETS.search(printed)


# --- Runway: tasks that polling gave up on --------------------------------------------------------


@dataclass(frozen=True)
class GaveUp(Row):
    """A task without an end in its row, and what Runway says of it now."""

    answers: Sequence[Reply | dict[str, Any]]  # see `tell`
    says: str = ""  # pattern in its line
    status: str | None = ""  # in ``not_succeeded``; None: not looked at; "": it comes home
    row: Mapping[str, Any] = field(default_factory=dict)


GAVE_UP = [
    GaveUp("it has succeeded since", [{}]),
    GaveUp("Runway is asked again after 503", [refusal(503), {}]),
    GaveUp("the status of a row is RUNNING", [{}], row={"status": "RUNNING"}),
    GaveUp("the status of a row is unknown", [{}], row={"status": "completed"}),
    GaveUp("a row without status", [{}], row={"status": None}),
    GaveUp("a row of Runway's own", [{}], row={"task_id": None, "id": make_task_id(5)}),
    GaveUp("it has failed", [{"status": "FAILED", "output": None}], "FAILED", "FAILED"),
    GaveUp("it was cancelled", [{"status": "CANCELLED", "output": None}], "CANCELLED", "CANCELLED"),
    GaveUp("Runway does not know it", [refusal(404)], "Runway", None),
    *[GaveUp(f"{status} goes on", [{"status": status, "output": None}], "again", status)
      for status in ("PENDING", "THROTTLED", "RUNNING")],
]  # fmt: skip


@dataclass(frozen=True)
class GaveUpRun:
    """A run with --json, and one that prints, of the same rows in two directories."""

    api: RunwayApi
    directory: Path
    report: Mapping[str, Any]
    printed: str
    fresh: Mapping[str, str]  # links by id


@pytest.fixture(scope="module")
def gave_up_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GaveUpRun]:
    directory = tmp_path_factory.mktemp("gave_up")
    with Cdn() as cdn, RunwayApi() as api:
        ordinary = make_row(99, video_url=cdn.add("99.mp4", WHOLE))
        rows, fresh = [ordinary], {}
        for number, case in enumerate(GAVE_UP):
            rows.append(make_unfinished(number, **case.row))
            task_id = make_task_id(number)
            fresh[task_id] = cdn.add(f"{number}.mp4", OBJECT)
            tell(api, task_id, fresh[task_id], case.answers)
        report = run_in(directory, rows, "--json", api=api)
        printed = run_in(directory, rows, "--output-dir", "printed", api=api)
        assert printed.returncode == 0
        yield GaveUpRun(api, directory, json.loads(report.stdout), printed.stdout, fresh)


@pytest.mark.parametrize("case", GAVE_UP, ids=str)
def test_what_became_of_a_task_that_polling_gave_up_on(
    gave_up_run: GaveUpRun, case: GaveUp
) -> None:
    number = GAVE_UP.index(case)
    task_id = make_task_id(number)
    stub = f"picture_{number}"
    videos = {video["task_id"]: video for video in gave_up_run.report["videos"]}
    others = {task["task_id"]: task for task in gave_up_run.report["not_succeeded"]}
    if case.status == "":
        assert videos[task_id]["status"] == "downloaded"
        assert task_id not in others
        assert_whole(gave_up_run.directory / "video_outputs", stub, task_id, OBJECT)
        assert_whole(gave_up_run.directory / "printed", stub, task_id, OBJECT)
        return
    assert task_id not in videos
    told = others[task_id]
    assert list(told) == ["task_id", "stub", "runway_status"]
    assert told["stub"] == stub
    if case.status:
        assert told["runway_status"] == case.status
    said = re.findall(f".*{case.says}.*", lines_about(gave_up_run.printed, stub, task_id))
    assert len(said) == 1


def test_only_those_that_succeeded_are_counted(gave_up_run: GaveUpRun) -> None:
    succeeded = [case for case in GAVE_UP if case.status == ""]
    count = 1 + len(succeeded)
    assert gave_up_run.report["stats"] == figures(total_succeeded=count, downloaded=count)
    assert gave_up_run.report["exit_code"] == 0
    assert f"Total SUCCEEDED tasks found: {count}\n" in gave_up_run.printed


def test_how_many_runway_is_asked_about_is_said_below(gave_up_run: GaveUpRun) -> None:
    asked = len(GAVE_UP)
    _, found, rest = gave_up_run.printed.partition("Found 1 SUCCEEDED tasks\n")
    below = rest.partition("\n")[0]
    assert found
    assert "Runway" in below
    assert re.search(rf"\b{asked}\b", below)
    assert f"  1/{asked + 1} " in rest
    assert f"  {asked + 1}/{asked + 1} " in rest


def test_its_metadata_holds_what_runway_said(gave_up_run: GaveUpRun) -> None:
    path = gave_up_run.directory / "video_outputs" / "picture_0.json"
    facts = json.loads(path.read_bytes())["runway_task_json"]
    assert facts["final_status"] == "SUCCEEDED"
    assert facts["original_status"] == "PENDING"
    assert facts["video_url"] == gave_up_run.fresh[make_task_id(0)]


def test_each_is_asked_about_once_a_run(tmp_path: Path, cdn: Cdn, api: RunwayApi) -> None:
    succeeded = make_unfinished(1)
    running = make_unfinished(2)
    tell(api, succeeded["task_id"], cdn.add("1.mp4", OBJECT), [{}])
    tell(api, running["task_id"], "", [{"status": "RUNNING"}])
    for days in (0.2, 0.1):
        write_results(tmp_path, [succeeded, running, succeeded], stamp(days))
    for _ in range(2):
        report = run_json(tmp_path, "--all", env=api.env)
        assert report["stats"]["total_succeeded"] == 1
    assert len(api.asked(succeeded["task_id"])) == 1  # the second run found it on disk
    assert len(api.asked(running["task_id"])) == 2


def test_they_are_asked_about_in_parallel(tmp_path: Path, api: RunwayApi) -> None:
    for number in range(4):
        api.answer(make_task_id(number), Reply(body=b"{}", wait_s=30))
    write_results(tmp_path, [make_unfinished(number) for number in range(4)], stamp())
    process = start_script(tmp_path, "--workers", "4", "--retries", "0", env=api.env)
    wait_until(lambda: len(api.requests) == 4)
    api.released.set()
    finish(process)
    assert len(api.requests) == 4


def test_with_quiet_nothing_is_said_of_those_that_did_not_succeed(
    tmp_path: Path, api: RunwayApi
) -> None:
    rows = []
    for number, status in enumerate(("FAILED", "CANCELLED", "RUNNING")):
        rows.append(make_unfinished(number))
        tell(api, make_task_id(number), "", [{"status": status, "output": None}])
    result = run_in(tmp_path, rows, "-q", api=api)
    assert result.stdout + result.stderr == ""
    assert result.returncode == 0


@dataclass(frozen=True)
class Unasked(Row):
    """Why Runway could not be asked."""

    answer: Reply
    says: str
    url: str = ""  # of the API; "": where it is


ARCHIVED = Reply(body=b'{"status": "ARCHIVED", "output": ["https://cdn.invalid/a.mp4"]}')
UNASKED = [
    Unasked("a wrong key", refusal(401), "HTTP 401"),
    Unasked("a key without rights", refusal(403), "HTTP 403"),
    Unasked("always 500", refusal(500), "HTTP 500"),
    Unasked("a link, and a status that is none of Runway's", ARCHIVED, "ARCHIVED"),
    Unasked("no connection", GOOD, "refused", "http://127.0.0.1:1"),
    Unasked("an address without https://", GOOD, "the address is invalid", "api.invalid"),
]


@pytest.mark.parametrize("case", UNASKED, ids=str)
def test_that_runway_could_not_be_asked_is_said_once(
    tmp_path: Path, api: RunwayApi, case: Unasked
) -> None:
    for number in range(3):
        api.answer(make_task_id(number), case.answer)
    write_results(tmp_path, [make_unfinished(number) for number in range(3)], stamp())
    env = api.env | {"RUNWAYML_BASE_URL": case.url or api.url}
    result = run_script(tmp_path, "-q", "--json", "--retries", "0", env=env)
    report = json.loads(result.stdout)
    assert result.returncode == 3
    assert report["stats"] == figures()
    assert report["videos"] == []
    assert len(re.findall(case.says, result.stderr)) == 1
    assert "Runway" in result.stderr


@dataclass(frozen=True)
class Known(Row):
    """What lies in the directory of a task that polling gave up on: `picture_0`."""

    entries: Mapping[str, Any]
    is_asked: bool
    status: str
    lands: str = "picture_0.mp4"


OWN_RECORD = {"task_id": make_task_id(0)}
WITH_ID = f"picture_0_{make_task_id(0)[:8]}"
KNOWN = [
    Known("its metadata and video", {"picture_0.json": OWN_RECORD, "picture_0.mp4": OBJECT},
          False, "exists"),
    Known("both renamed", {"mine.json": OWN_RECORD, "mine.mp4": OBJECT}, False, "exists",
          "mine.mp4"),
    Known("a video with its id", {f"{WITH_ID}.mp4": OBJECT}, False, "exists", f"{WITH_ID}.mp4"),
    Known("metadata without a video", {"picture_0.json": OWN_RECORD}, True, "downloaded"),
    Known("a video without metadata", {"picture_0.mp4": OBJECT}, True, "downloaded",
          f"{WITH_ID}.mp4"),
    Known("another task's", {"picture_0.json": {"task_id": "b"}, "picture_0.mp4": OTHER}, True,
          "downloaded", f"{WITH_ID}.mp4"),
]  # fmt: skip


@pytest.mark.parametrize("case", KNOWN, ids=str)
def test_a_task_that_is_there_is_not_asked_about(
    tmp_path: Path, cdn: Cdn, api: RunwayApi, case: Known
) -> None:
    output = tmp_path / "video_outputs"
    lay_out(output, case.entries)
    row = make_unfinished(0)
    link = cdn.add("0.mp4", OBJECT)
    tell(api, row["task_id"], link, [{}])
    result = run_in(tmp_path, [row], "--json", api=api)
    report = json.loads(result.stdout)
    counted = "already_exists" if case.status == "exists" else "downloaded"
    assert report["stats"] == figures(total_succeeded=1, **{counted: 1})
    assert report["exit_code"] == 0
    assert len(api.requests) == case.is_asked
    (video,) = report["videos"]
    assert Path(video["path"]).name == case.lands
    for name, content in case.entries.items():
        if isinstance(content, bytes):
            assert (output / name).read_bytes() == content


def test_a_video_without_metadata_is_there_for_one_task_alone(
    tmp_path: Path, output_dir: Path, cdn: Cdn, api: RunwayApi
) -> None:
    rows = []
    for end in ("a", "b"):
        task_id = f"12345678-{end}"
        rows.append(make_unfinished(task_id=task_id, target_filename_stub=None))
        tell(api, task_id, cdn.add(f"{end}.mp4", OBJECT), [{}])
    lay_out(output_dir, {"video_12345678.mp4": OTHER})
    report = json.loads(run_in(tmp_path, rows, "--json", api=api).stdout)
    assert report["stats"] == figures(total_succeeded=2, downloaded=1, already_exists=1)


# --- Runway: tasks too old to ask about, no key, other ways to ask --------------------------------


@dataclass(frozen=True)
class Age(Row):
    """How long ago a task was submitted, by its row, and how old the results file is."""

    is_asked: bool
    row: Callable[[datetime], object] | None = None  # makes the row's time
    row_days: float = 0
    file_days: float = 0.01
    name: str = "timestamp"


def runways_form(when: datetime) -> str:
    utc = when.astimezone(timezone.utc)
    return utc.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def sdks_form(when: datetime) -> str:
    return str(when.astimezone(timezone.utc))


AGES = [
    Age("6.9 days", True, datetime.isoformat, 6.9),
    Age("7.1 days", False, datetime.isoformat, 7.1),
    Age("Runway's form, 6.9 days", True, runways_form, 6.9, name="createdAt"),
    Age("Runway's form, 7.1 days", False, runways_form, 7.1, name="createdAt"),
    Age("the SDK's form, 6.9 days", True, sdks_form, 6.9, name="created_at"),
    Age("the SDK's form, 7.1 days", False, sdks_form, 7.1, name="created_at"),
    Age("the row goes before the file: young", True, datetime.isoformat, 1, file_days=30),
    Age("the row goes before the file: old", False, datetime.isoformat, 30, file_days=1),
    Age("no time in the row, a file of 6.9 days", True, file_days=6.9),
    Age("no time in the row, a file of 7.1 days", False, file_days=7.1),
    Age("nonsense in the row, a young file", True, lambda _: "yesterday"),
    Age("nonsense in the row, an old file", False, lambda _: "yesterday", file_days=8),
    Age("a time before Runway, a young file", True, lambda _: "0001-01-01T00:00:00Z"),
    Age("a number in the row, a young file", True, datetime.timestamp, 30),
]


@pytest.mark.parametrize("case", AGES, ids=str)
def test_runway_is_not_asked_about_tasks_older_than_7_days(
    tmp_path: Path, api: RunwayApi, case: Age
) -> None:
    row = make_unfinished(0, timestamp=None)
    if case.row:
        row[case.name] = case.row(days_ago(case.row_days))
    tell(api, row["task_id"], "", [{"status": "RUNNING", "output": None}])
    result = run_in(tmp_path, [row], api=api, days=case.file_days)
    assert len(api.requests) == case.is_asked
    assert ("7 days" in result.stdout) != case.is_asked
    assert result.returncode == 0


def test_how_many_are_older_is_said(tmp_path: Path, api: RunwayApi) -> None:
    rows = [make_unfinished(number, days=8) for number in range(3)]
    result = run_in(tmp_path, rows, api=api)
    (line,) = re.findall(r".*7 days.*", result.stdout)
    assert re.search(r"\b3\b", line)
    assert result.stderr == ""


def test_a_file_of_no_time_at_all_is_read(tmp_path: Path, api: RunwayApi) -> None:
    row = make_unfinished(0, timestamp=None)
    tell(api, row["task_id"], "", [{"status": "RUNNING"}])
    write_results(tmp_path, [row], "00010101_000000")
    assert run_script(tmp_path, env=api.env).returncode == 0


@pytest.mark.parametrize(("days", "is_warned"), [(2.9, True), (3.1, False)])
def test_without_a_key_unfinished_tasks_are_counted(
    tmp_path: Path, days: float, is_warned: bool
) -> None:
    file = write_results(tmp_path, [make_unfinished(number) for number in range(3)], stamp(days))
    when = days_ago(days).timestamp()
    os.utime(file, (when, when))
    for mode in ((), ("-q",)):
        result = run_script(tmp_path, *mode)
        assert result.returncode == 0
        if is_warned:
            assert re.search(r"\b3\b.*RUNWAYML_API_SECRET", result.stderr)
        else:
            assert result.stderr == ""
        assert bool(re.search(r"\b3\b", result.stdout)) == (not mode)


@pytest.mark.parametrize("status", [None, "completed"])
def test_nobody_is_warned_of_a_task_that_another_file_has(
    tmp_path: Path, cdn: Cdn, status: str | None
) -> None:
    (row,) = serve(cdn, 1)
    write_results(tmp_path, [row], stamp(0.2))
    write_results(tmp_path, [row | {"final_status": status}], stamp(0.1))
    result = run_script(tmp_path, "--all", "-q")
    assert result.returncode == 0
    assert result.stderr == ""
    assert len(cdn.requests) == 1


@dataclass(frozen=True)
class Lost(Row):
    """A task that succeeded since, and yet does not come home."""

    answer: dict[str, Any]
    fails: str


LOST = [
    Lost("its link is refused", {}, "HTTP 403"),
    Lost("it has no output", {"output": None}, "output|link|video"),
]


@pytest.mark.parametrize("case", LOST, ids=str)
def test_one_that_succeeded_and_is_not_had_is_a_failure(
    tmp_path: Path, cdn: Cdn, api: RunwayApi, case: Lost
) -> None:
    row = make_unfinished(0)
    dead = cdn.add("0.mp4", b"", refusal(403))
    tell(api, row["task_id"], dead, [case.answer])
    result = run_in(tmp_path, [row], "--json", api=api)
    report = json.loads(result.stdout)
    assert report["stats"] == figures(total_succeeded=1, failed_downloads=1)
    assert report["exit_code"] == 3
    (video,) = report["videos"]
    assert re.search(case.fails, video["error"]["reason"])


def test_a_dry_run_lists_them_and_asks_nobody(tmp_path: Path, api: RunwayApi) -> None:
    rows = [make_unfinished(0), make_unfinished(1), make_unfinished(2, days=8)]
    result = run_in(tmp_path, rows, "--dry-run", api=api)
    assert result.returncode == 0
    assert re.search("picture_0.*would be asked about", result.stdout)
    assert re.search("picture_1.*would be asked about", result.stdout)
    assert "picture_2" not in result.stdout
    assert api.requests == []
    assert len(names_in(tmp_path)) == 1


def test_only_and_skip_choose_among_them(tmp_path: Path, api: RunwayApi) -> None:
    rows = [make_unfinished(number) for number in range(3)]
    first, second, third = (row["task_id"] for row in rows)
    run_in(tmp_path, rows, "--only", second[:8], api=api)
    run_in(tmp_path, rows, "--skip", second, "--skip", third[:10], api=api)
    asked = [request.path for request in api.requests]
    assert asked == [f"/v1/tasks/{second}", f"/v1/tasks/{first}"]


def test_from_python(
    tmp_path: Path, cdn: Cdn, api: RunwayApi, capsys: pytest.CaptureFixture[str]
) -> None:
    ready = make_unfinished(0)
    failed = make_unfinished(1, final_status="FAILED")
    running = make_unfinished(2)
    succeeded = make_row(3)
    results = {"task_results": [ready, failed, running, succeeded]}
    tell(api, ready["task_id"], cdn.add("0.mp4", OBJECT), [{}])
    tell(api, running["task_id"], "", [{"status": "RUNNING", "output": None}])
    downloader = make_downloader(tmp_path / "out")
    assert downloader.get_succeeded_tasks(results) == [succeeded]
    with mock.patch.dict(os.environ, api.env):
        assert downloader.get_succeeded_tasks(results) == [ready, running, succeeded]
        assert downloader.process_succeeded_task(ready) is True
        assert downloader.process_succeeded_task(running) is False
    assert downloader.stats == figures(total_succeeded=1, downloaded=1)
    printed = capsys.readouterr()
    said = lines_about(printed.out + printed.err, "picture_2", running["task_id"])
    assert "RUNNING" in said


# --- Console --------------------------------------------------------------------------------------

GUIDE = """\
📁 Using latest results file: runway_polling_results_20250617_040158.json

📋 Processing: runway_polling_results_20250617_040158.json
  ✅ Found 1 SUCCEEDED tasks

  1/1 Task f645e2df...
  🎬 Downloading: test_succeeded_video.mp4
  📥 Streaming download from: LINK
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


@pytest.mark.parametrize("length", [50, 51], ids=["link of 50", "longer link"])
def test_one_video_is_told_as_the_guide_shows_it(tmp_path: Path, cdn: Cdn, length: int) -> None:
    name = "v" * (length - len(f"{cdn.url}/"))
    link = cdn.add(name, make_mp4("guide", 941_873))
    task_id = "f645e2df-b639-4264-9bf2-fc7bceb6c658"
    stub = "test_succeeded_video"
    write_results(tmp_path, [make_row(task_id=task_id, target_filename_stub=stub, video_url=link)])

    result = run_script(tmp_path)

    dots = "..." if length > 50 else ""
    assert result.stdout == GUIDE.replace("LINK", f"{cdn.url}/{name}"[:50] + dots)
    assert result.returncode == 0
    assert result.stderr == ""


def make_block(row: Mapping[str, Any]) -> str:
    """The lines about a video of `SMALL` bytes, but for its number."""
    stub = row["target_filename_stub"]
    task_id = row["task_id"]
    link = row["video_url"].partition("?")[0]
    lines = [
        f"Task {task_id[:8]}...",
        f"  🎬 Downloading: {stub}.mp4",
        f"  📥 Streaming download from: {link}",
        "  📊 File size: 0.00 MB",
        "  ✅ Downloaded: 0.00 MB",
        f"  📄 Metadata saved: {stub}.json",
    ]
    return "".join(f"{line}\n" for line in lines)


def test_20_tasks_have_a_block_each_whose_lines_stand_together(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 20, size=SMALL)
    write_results(tmp_path, rows)
    result = run_script(tmp_path, "--workers", "16")
    blocks = re.findall(r"(?m)^  (\d+)/20 (Task (?:.+\n)+)", result.stdout)
    assert [int(number) for number, _ in blocks] == list(range(1, 21))
    assert {block for _, block in blocks} == {make_block(row) for row in rows}
    assert "\n\n✅ 20 of 20 on disk\n" in result.stdout
    assert result.stderr == ""


def test_21_tasks_have_a_line_each(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 21, size=SMALL)
    write_results(tmp_path, rows)
    out = run_script(tmp_path).stdout
    names = re.findall(r"(?m)^  \d+/21 ✅ (\w+)\.mp4 \(0\.00 MB\)$", out)
    assert sorted(names) == sorted(row["target_filename_stub"] for row in rows)
    assert "🎬" not in out


# More than 20 tasks: a line for each video. 0 and 1 are there, 2 and 3 want one name.

CLASH = 2
RETRIED = 4
CUT_SHORT = 5
FORBIDDEN = range(6, 28)
TEXT = 28
LINKLESS = 29


@pytest.fixture(scope="module")
def big_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    directory = tmp_path_factory.mktemp("big")
    with Cdn() as cdn:
        rows = serve(cdn, 60, size=SMALL)
        for row in rows[:2]:
            put_video(directory / "video_outputs", row, WHOLE)
        rows[CLASH]["target_filename_stub"] = "picture_3"
        cdn.add(f"{RETRIED}.mp4", WHOLE, refusal(500), refusal(500), Reply())
        cdn.add(f"{CUT_SHORT}.mp4", make_mp4(), Reply(send=HALF), Reply())
        for number in FORBIDDEN:
            cdn.add(f"{number}.mp4", b"", Reply(status=403))
        cdn.add(f"{TEXT}.mp4", b"<html>")
        del rows[LINKLESS]["video_url"]
        write_results(directory, rows)
        yield run_script(directory)


def test_above_20_tasks_each_video_has_one_line(big_run: Any) -> None:
    work = big_run.stdout.partition("DOWNLOAD STATISTICS")[0]
    numbers = [int(number) for number in re.findall(r"(?m)^  (\d+)/60 ", work)]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 60
    downloaded = re.findall(r"(?m)^  \d+/60 ✅ \w+\.mp4 \(\d\.\d\d MB\)", work)
    assert len(downloaded) == 34
    failed = re.findall(r"(?m)^  \d+/60 ❌ \w+\.mp4", work)
    assert len(failed) == 24
    there = re.findall(r"(?mi)^.*\b2\b.*(?:exist|already|there).*$", work)
    assert len(there) == 1
    assert "🎬" not in work


@dataclass(frozen=True)
class Told:
    """What is told of one video, behind its line or below."""

    sentence: str
    name: str
    says: str


TOLD = [
    Told("another name", "picture_3_(?:c81e728d|eccbc87e)", r"picture_3\.mp4"),
    Told("tried again", f"picture_{RETRIED}", "HTTP 500.*2 times"),
    Told("resumed, and from where", f"picture_{CUT_SHORT}", r"(?i)resumed.*0\.05 MB"),
]


@pytest.mark.parametrize("case", TOLD, ids=lambda case: case.sentence)
def test_what_is_worth_knowing_stands_behind_or_below(big_run: Any, case: Told) -> None:
    lines = rf"(?m)^  \d+/60 ✅ {case.name}\.mp4(.*(?:\n(?!  \d+/60 ).+)*)"
    told = re.search(lines, big_run.stdout)
    assert told
    assert re.search(case.says, told[1])


def test_failures_come_last_on_stderr_each_reason_said_once(big_run: Any) -> None:
    out = big_run.stdout
    assert "📥 Videos downloaded: 34\n⚠️ Already existed: 2\n" in out
    assert "❌ Failed downloads: 24\n📈 Success rate: 60.0%\n" in out
    assert big_run.returncode == 3

    err = big_run.stderr
    assert err.endswith("\n\n❌ 24 of 60 with a problem, 36 on disk\n")
    assert re.search(r"❌ 22 videos: .*\n.*HTTP 403", err)
    assert "\n    … and 2 more\n  → set RUNWAYML_API_SECRET" in err
    assert err.count("set RUNWAYML_API_SECRET") == 2
    failures = read_failures(err)
    named = [name for name in failures if name.endswith(".mp4")]
    assert len(named) == 20 + 2
    assert re.search("text|HTML", failures[f"picture_{TEXT}.mp4"])
    assert "video_url" in failures[f"picture_{LINKLESS}.mp4"]


def test_the_last_screen_holds_10_videos_and_no_rate_that_is_rounded_up(
    tmp_path: Path, output_dir: Path, cdn: Cdn
) -> None:
    there = [make_row(number) for number in range(2, 2000)]
    for row in there:
        put_video(output_dir, row, WHOLE)
    lay_out(output_dir, {"z\x1b.mp4": WHOLE, ".hidden.mp4": WHOLE})
    new = make_row(1, target_filename_stub="zebra", video_url=cdn.add("zebra.mp4", WHOLE))
    write_results(tmp_path, [make_row(0, video_url=None), new, *there])
    result = run_script(tmp_path)
    listed = re.findall(r"(?m)^  • (\w+)\.mp4 \(0\.00 MB\)$", result.stdout)
    assert listed[0] == "zebra"
    assert len(listed) == 10
    assert "\n  … and 1,990 more\n" in result.stdout
    assert f"💾 Total storage used: {2000 * SMALL / 1024**2:.2f} MB\n" in result.stdout
    assert "📈 Success rate: 99.9%\n" in result.stdout
    assert result.stderr.endswith("\n\n❌ 1 of 2,000 with a problem, 1,999 on disk\n")
    assert len(result.stdout.splitlines()) < 40


# The end of a run: one sentence that is true of all of it.


@dataclass(frozen=True)
class Ending:
    """A run over three tasks, of which some are there, some are refused and some handed over."""

    sentence: str
    verdict: str
    rate: str
    there: int = 0
    refused: int = 0
    arguments: Sequence[str] = ()


FAIL_ON_1 = ("--exec", f'{PYTHON} -c \'exit("picture_1" in "{{video}}")\'')
ENDINGS = [
    Ending("all come home", "✅ 3 of 3 on disk", "100.0"),
    Ending("one is refused", "❌ 1 of 3 with a problem, 2 on disk", "66.6", there=1, refused=1),
    Ending("all are refused", "❌ 3 of 3 with a problem, 0 on disk", "0.0", refused=3),
    Ending(
        "a hand-over fails", "❌ 1 of 3 with a problem, 3 on disk", "100.0", arguments=FAIL_ON_1
    ),
]


@pytest.mark.parametrize("case", ENDINGS, ids=lambda case: case.sentence)
def test_a_run_ends_with_one_true_sentence(
    tmp_path: Path, output_dir: Path, cdn: Cdn, case: Ending
) -> None:
    rows = serve(cdn, 3, size=SMALL)
    for row in rows[: case.there]:
        put_video(output_dir, row, WHOLE)
    for number in range(3 - case.refused, 3):
        cdn.add(f"{number}.mp4", b"", Reply(status=404))
    write_results(tmp_path, rows)
    result = run_script(tmp_path, *case.arguments)
    is_bad = case.verdict.startswith("❌")
    said = result.stderr if is_bad else result.stdout
    assert said.splitlines()[-1] == case.verdict
    assert result.returncode == (3 if is_bad else 0)
    assert f"❌ Failed downloads: {case.refused}\n" in result.stdout
    assert f"📈 Success rate: {case.rate}%\n" in result.stdout


@unix_only
def test_a_stop_says_what_is_done_and_what_is_kept(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 3)
    cdn.add("1.mp4", make_mp4(1, 4_000_000), Reply(send=3_000_000, ending="hang"))
    cdn.add("2.mp4", WHOLE, Reply(wait_s=60))
    write_results(tmp_path, rows)
    videos = tmp_path / "video_outputs"
    run = start_script(tmp_path, "--json")
    wait_until(lambda: sum(map(len, parts_in(videos).values())) > 2_900_000)
    wait_until((videos / "picture_0.mp4").exists)
    run.terminate()
    result = finish(run)

    report = json.loads(result.stdout)
    assert result.returncode == 143
    assert report["exit_code"] == 143
    assert [video["status"] for video in report["videos"]] == ["downloaded"]
    verdict = r"⏸ stopped: 1 on disk, 2 not finished, (3|2\.8\d) MB of them kept"
    assert re.fullmatch(verdict, result.stderr.splitlines()[-1])
    assert "📈 Success rate: 33.3%\n" in result.stderr


# Quiet, and what is wrong


def test_quiet_prints_what_is_wrong_and_nothing_else(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 2)
    cdn.add("1.mp4", b"", Reply(status=404))
    write_results(tmp_path, [rows[0], make_row(9, final_status="FAILED")])
    for option in ("--quiet", "-q"):
        good = run_script(tmp_path, option, "--gallery")
        assert good.returncode == 0
        assert good.stdout == good.stderr == ""

    write_results(tmp_path, rows)
    bad = run_script(tmp_path, "-q")
    assert bad.returncode == 3
    assert bad.stdout == ""
    said = r"❌ 1 video: .*\n    picture_1.mp4 .*HTTP 404.*\n  → .*\n\n?❌ 1 of 2 with .*\n"
    assert re.fullmatch(said, bad.stderr)


def test_the_link_told_is_the_one_that_brought_the_bytes(
    tmp_path: Path, cdn: Cdn, api: RunwayApi
) -> None:
    dead = cdn.add("dead.mp4", b"", Reply(status=403))
    fresh = cdn.add("fresh.mp4", WHOLE)
    api.answer(make_task_id(0), make_answer(make_task_id(0), fresh))
    result = download(tmp_path, [make_row(video_url=dead)], env=api.env)
    assert result.returncode == 0
    assert result.stderr == ""
    assert f"  📥 Streaming download from: {cdn.url}/fresh.mp4\n" in result.stdout
    assert re.search("(?i)fresh link", result.stdout)
    assert "dead.mp4" not in result.stdout


# --- Terminals, pipes and consoles that fail ------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """What a run showed on a terminal."""

    exit_code: int
    raw: str
    lines: Sequence[str]  # that stay
    live: Sequence[str]  # that were cleared


ERASE = re.compile(r"\r\x1b\[[02]?K|\x1b\[2K\r")


def columns_of(line: str) -> int:
    """The columns that ``line`` takes: an emoji takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in line)


def run_in_terminal(
    directory: Path,
    columns: int,
    *arguments: str,
    act: Callable[[subprocess.Popen[bytes], str], object] = lambda _process, _shown: None,
    **env: str,
) -> Shown:
    """Run the script on a pseudo-terminal; ``act`` sees what is shown so far, again and again."""
    fcntl = pytest.importorskip("fcntl")
    termios = pytest.importorskip("termios")
    terminal, console = pytest.importorskip("pty").openpty()
    fcntl.ioctl(console, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, str(SCRIPT), *arguments]
    environment = script_environment(**{"TERM": "xterm-256color", **env})
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        command, cwd=directory, env=environment, stdout=console, stderr=console
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
    raw = shown.decode()
    pieces = [ERASE.split(row) for row in raw.replace("\r\n", "\n").split("\n")]
    lines = [piece[-1] for piece in pieces]
    live = [line for piece in pieces for line in piece[:-1] if line]
    return Shown(process.wait(60), raw, lines, live)


def releasing(cdn: Cdn, pattern: str) -> Callable[[object, str], None]:
    """What hangs at ``cdn`` goes on as soon as ``pattern`` is shown."""

    def act(_process: object, shown: str) -> None:
        if re.search(pattern, shown):
            cdn.released.set()

    return act


@unix_only
@pytest.mark.parametrize("columns", [80, 40])
def test_the_live_line_counts_fits_and_is_cleared(
    tmp_path: Path, output_dir: Path, cdn: Cdn, columns: int
) -> None:
    rows = serve(cdn, 6)
    for row in rows[:3]:
        put_video(output_dir, row, make_mp4())
    cdn.replies["/3.mp4"] = [refusal(500), Reply(wait_s=60)]
    slow = Reply(bytes_per_second=800_000, send=2_000_000)
    cdn.add("4.mp4", make_mp4(4, 2_000_000), slow)
    cdn.add("5.mp4", b"", Reply(status=404))
    write_results(tmp_path, rows)
    seen = r"⏬ 4/6 [^\r]*\d MB/s"
    shown = run_in_terminal(tmp_path, columns, act=releasing(cdn, seen))
    assert shown.exit_code == 3
    assert cdn.released.is_set()
    assert max(map(columns_of, shown.live)) < columns
    assert all(line.startswith("⏬ ") for line in shown.live)
    assert not [line for line in shown.lines if CONTROL.search(line) or "⏬" in line]
    assert not re.search(r"\d:\d\d|\bleft\b", "".join(shown.live))
    assert "📥 Videos downloaded: 2" in shown.lines
    assert shown.lines[-2:] == ["❌ 1 of 6 with a problem, 5 on disk", ""]


@unix_only
def test_the_live_line_tells_rate_and_the_last_slow_video(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 2, size=SMALL)
    cdn.add("1.mp4", make_mp4(1, 3_000_000), Reply(pause_at=2_000_000))
    write_results(tmp_path, rows)
    seen = r"⏬ 1/2 [^\r]*1\.9 MB[^\r]*picture_1"
    shown = run_in_terminal(tmp_path, 100, act=releasing(cdn, seen))
    assert shown.exit_code == 0
    assert [line for line in shown.live if re.search(seen, line)]
    assert [line for line in shown.live if re.search(r"\d\.\d MB/s", line)]


@unix_only
def test_the_live_line_tells_of_a_command(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1, size=SMALL))
    done = tmp_path / "done"
    waits = f"for _ in range(1000): os.path.exists({str(done)!r}) or time.sleep(0.02)"
    code = f"import time\n{waits}"
    command = make_recorder(tmp_path, code)

    def act(_process: object, text: str) -> None:
        if re.search(r"⏬ 0/1 [^\r]*command", text):
            done.touch()

    shown = run_in_terminal(tmp_path, 80, "--exec", command, act=act)
    assert done.exists()
    assert shown.exit_code == 0


@unix_only
def test_another_run_is_waited_for_and_a_stop_ends_the_line_well(tmp_path: Path, cdn: Cdn) -> None:
    body = make_mp4(0, 400_000)
    link = cdn.add("0.mp4", body, Reply(bytes_per_second=40_000))
    write_results(tmp_path, [make_row(0, video_url=link)])
    other = start_script(tmp_path)
    wait_until(lambda: list(tmp_path.rglob("*.part")))
    pressed = threading.Event()

    def act(process: subprocess.Popen[bytes], text: str) -> None:
        live = text.partition("Waiting for 1 video that another run")[2]
        if re.search(r"⏬ [^\r]*another run", live) and not pressed.is_set():
            pressed.set()
            process.send_signal(signal.SIGINT)

    shown = run_in_terminal(tmp_path, 80, act=act)
    other.kill()
    other.communicate()
    assert pressed.is_set()
    assert shown.exit_code == 130
    assert "📥 Videos downloaded: 0" in shown.lines
    assert not [line for line in shown.lines if CONTROL.search(line) or "⏬" in line]
    assert len(cdn.requests) == 1


@unix_only
def test_a_dumb_terminal_gets_no_returns_and_no_codes(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 2, Reply(wait_s=0.6), size=SMALL))
    shown = run_in_terminal(tmp_path, 80, TERM="dumb")
    assert shown.exit_code == 0
    assert not CONTROL.search(shown.raw.replace("\r\n", "\n"))
    assert "⏬" not in shown.raw


@unix_only
def test_a_quiet_run_shows_nothing_on_a_terminal_either(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1, Reply(wait_s=0.6), size=SMALL))
    shown = run_in_terminal(tmp_path, 80, "-q")
    assert shown.exit_code == 0
    assert shown.raw == ""


# Off a terminal


def test_all_is_printed_and_a_long_silence_is_broken(
    tmp_path: Path, cdn: Cdn, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results(tmp_path, serve(cdn, 1, Reply(wait_s=8)))
    said: list[str] = []

    def hear(*texts: object, **_how: object) -> None:
        said.extend(map(str, texts))
        if re.search(r"(?m)^⏬ 0/1\b", said[-1]):
            cdn.released.set()

    monkeypatch.setattr("builtins.print", hear)
    monkeypatch.setattr(dsv, "SILENCE_S", 0.3)
    result = run_script(tmp_path)
    assert result.returncode == 0
    assert result.stdout == ""
    assert result.stderr == ""
    assert cdn.released.is_set()
    assert "📥 Videos downloaded: 1" in "\n".join(said)
    assert not CONTROL.search("\n".join(said))


def test_a_quiet_run_keeps_silent_and_a_short_one_has_no_progress(
    tmp_path: Path, cdn: Cdn, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results(tmp_path, serve(cdn, 1, Reply(wait_s=0.7)))
    assert "⏬" not in run_script(tmp_path, "--output-dir", "a").stdout
    monkeypatch.setattr(dsv, "SILENCE_S", 0.1)
    result = run_script(tmp_path, "-q", "--output-dir", "b")
    assert result.returncode == 0
    assert result.stdout == ""
    assert result.stderr == ""


@unix_only
def test_in_one_pipe_what_is_wrong_comes_last(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 3, size=SMALL)
    cdn.add("1.mp4", b"", Reply(status=404))
    write_results(tmp_path, rows)
    shown = run_process(tmp_path, before=["sh", "-c", '"$@" 2>&1', "sh"]).stdout
    places = [shown.index(text) for text in ("STATISTICS", "💾 Total", "❌ 1 video: ", "❌ 1 of 3")]
    assert places == sorted(places)
    assert not CONTROL.search(shown)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252:strict"])
def test_a_console_without_emoji_will_do(
    tmp_path: Path, output_dir: Path, cdn: Cdn, encoding: str
) -> None:
    rows = serve(cdn, 2)
    rows[0]["target_filename_stub"] = "élan☃"
    cdn.add("1.mp4", b"", Reply(status=404))
    write_results(tmp_path, rows)
    result = run_process(tmp_path, env={"PYTHONIOENCODING": encoding})
    assert result.returncode == 3
    assert "Videos downloaded: 1" in result.stdout
    assert "1 of 2 with a problem, 1 on disk" in result.stderr
    assert_whole(output_dir, "élan☃", make_task_id(0), make_mp4())


NO_CONSOLE = {
    "closed": '"$@" >&- 2>&- <&-; echo $? >code',
    "pipe whose reader leaves": '{ "$@"; echo $? >code; } | head -n 0',
}


@unix_only
@pytest.mark.parametrize("kind", NO_CONSOLE)
def test_a_console_that_goes_away_costs_no_video(
    tmp_path: Path, output_dir: Path, cdn: Cdn, kind: str
) -> None:
    write_results(tmp_path, serve(cdn, 1))
    assert run_process(tmp_path, before=["sh", "-c", NO_CONSOLE[kind], "sh"]).stderr == ""
    assert (tmp_path / "code").read_text() == "0\n"
    assert_whole(output_dir, "picture_0", make_task_id(0), make_mp4())


@unix_only
def test_closed_streams_are_told_as_they_are(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1))
    no_stderr = run_process(tmp_path, "--json", before=["sh", "-c", '"$@" 2>&-', "sh"])
    assert json.loads(no_stderr.stdout)["exit_code"] == 0
    no_stdin = run_process(tmp_path, "-", before=["sh", "-c", '"$@" <&-', "sh"])
    assert no_stdin.returncode == 1
    assert re.search("standard input.*closed", no_stdin.stderr)
    assert "Traceback" not in no_stdin.stderr
    no_stdout = run_process(tmp_path, "--json", before=["sh", "-c", '"$@" >&-', "sh"])
    assert no_stdout.returncode == 1
    assert "JSON could not be written" in no_stdout.stderr


@pytest.mark.parametrize("name", ["video_sizes", "write_gallery"])
def test_a_directory_that_falls_silent_at_the_end_keeps_no_run_from_ending(
    tmp_path: Path, cdn: Cdn, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    monkeypatch.setattr(dsv, name, lambda *_: {} if never.wait(30) else None)
    monkeypatch.setattr(dsv, "LISTING_MAX_S", 0.1)
    monkeypatch.setattr(dsv, "GALLERY_MAX_S", 0.1)
    write_results(tmp_path, serve(cdn, 1))
    started_s = time.monotonic()
    result = run_script(tmp_path, "--gallery")
    assert time.monotonic() - started_s < 20
    assert "Videos downloaded: 1" in result.stdout
    assert ("does not answer" in result.stderr) == (name == "write_gallery")
    assert result.returncode == (3 if name == "write_gallery" else 0)
    never.set()


# Control characters in data

EVIL = "\x1b]0;owned\x07\x1b[2J\r\x08\x9b31m\u202egnp\x00\ud800\nOWNED"
MODES = [
    (),
    ("--dry-run",),
    ("--verify",),
    ("--json",),
    ("--all", "-q"),
    ("--output-dir", "out\x1b[2J\rput"),
    ("--only", EVIL.replace("\0", "").replace("\ud800", "")),
]


@pytest.mark.parametrize("mode", MODES, ids=[" ".join(mode)[:8] or "plain" for mode in MODES])
def test_no_control_character_is_printed(tmp_path: Path, cdn: Cdn, mode: Sequence[str]) -> None:
    good = cdn.add("0.mp4", make_mp4())
    refused = cdn.add("1.mp4", b"", Reply(status=403))
    rows: list[dict[str, Any]] = []
    for link in (good, refused, EVIL, f"http://127.0.0.1:1/{EVIL}"):
        number = len(rows)
        rows.append(make_row(number, video_url=link, task_id=EVIL + str(number)))
        texts = dict.fromkeys(("target_filename_stub", "prompt", "image_path"), EVIL)
        rows.append(make_row(number + 1, video_url=link, **texts))
    rows += [make_row(8, final_status=EVIL), make_row(9, final_status=[EVIL]), {EVIL: EVIL}]
    name = "20250617_040158\x1b[2J\r" if os.name == "posix" else "1"
    write_results(tmp_path, rows, name)
    broken = write_results(tmp_path, [], "20250101_000000")
    broken.write_text('{"\x1b[2J', encoding="utf-8")
    command = [sys.executable, "-c", "print('\\x1b[2J\\r\\x07 said'); exit(1)"]
    how = ["--exec", shlex.join(command), "--retries", "0"]
    result = run_script(tmp_path, *mode, *([] if "--verify" in mode else how))
    shown = result.stdout + result.stderr
    assert len(shown) > 40
    assert not CONTROL.search(shown)
    assert not re.search("^ *OWNED", shown, re.MULTILINE)


# --- Options --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """Command lines that cannot be, and what their refusal says."""

    says: str
    lines: Sequence[str]

    def __str__(self) -> str:
        return f"{self.lines[0]}: {self.says}"


REFUSALS = [
    Refusal("from 1 to 64", ["--workers 0", "--workers 65", "--workers two", "--workers 1.5"]),
    Refusal("a number from ", ["--timeout 0", "--timeout -1", "--timeout nan", "--timeout soon"]),
    Refusal("a whole number from 0 to ", ["--retries -1", "--retries x"]),
    Refusal("K/N", ["--shard 0/4", "--shard 5/4", "--shard 1/0", "--shard x"]),
    Refusal("--output-dir", ["--output-dir ''", "--output-dir=", "--out-dir=x"]),
    Refusal("no such command", ["--exec ''", "--exec 'no-such-command {video}'"]),
    Refusal("No closing quotation", ['--exec "\'unbalanced {video}"']),
    Refusal(
        "{video}",
        [
            f"--exec '{PYTHON} {{vid}}'",
            f"--exec '{PYTHON} {{video-file}}'",
            f"--exec '{PYTHON} {{}}'",
            f"--exec '{PYTHON} {{ video}}'",
            f"--exec '{PYTHON} {{video!r}}'",
            f"--exec '{PYTHON} {{video}}' --exec '{PYTHON} {{vid}}'",
        ],
    ),
    Refusal("--only", ["--only ''"]),
    Refusal("--skip", ["--skip ''"]),
    Refusal("--quiet", ["--quite"]),
    Refusal("--workers", ["--worker 3"]),
    Refusal("--dry-run", ["--dryrun"]),
    Refusal("--gallery", ["a.json --galery", "--verify --gallery", "--dry-run --gallery"]),
    Refusal("--zzz", ["--zzz"]),
    Refusal("expected one argument", ["--polling-results-file"]),
    Refusal("--all", ["--all a.json", "--all --polling-results-file a.json"]),
    Refusal("--polling-results-file", ["a.json --polling-results-file b.json"]),
    Refusal("standard input", ["- a.json", "a.json -"]),
    Refusal("--verify", ["--dry-run --verify", "--verify a.json", "--verify --all"]),
]


@pytest.mark.parametrize("case", REFUSALS, ids=str)
def test_the_impossible_is_refused_with_what_is_possible(tmp_path: Path, case: Refusal) -> None:
    for line in case.lines:
        result = run_script(tmp_path, *shlex.split(line))
        assert result.returncode == 2, line
        assert result.stdout == "", line
        error = result.stderr.splitlines()[-1].partition("error:")[2]
        assert case.says in error, line
    assert names_in(tmp_path) == set()


OPTIONS = [
    *("--all", "--dry-run", "--exec", "--gallery", "--help", "--json", "--only", "--output-dir"),
    *("--polling-results-file", "--quiet", "--retries", "--shard", "--skip", "--timeout"),
    *("--verify", "--version", "--workers"),
]


def test_help_names_all_options_and_exit_codes_within_80_columns(tmp_path: Path) -> None:
    helped = run_process(tmp_path, "--help", env={"COLUMNS": "80"})
    assert helped.returncode == 0
    assert helped.stderr == ""
    long = re.findall("--[a-z-]+[a-z]", helped.stdout)
    assert sorted(set(long)) == OPTIONS
    short = re.findall(r"(?m)^  (-[a-zA-Z]), --", helped.stdout)
    assert sorted(short) == ["-V", "-h", "-q"]
    assert "examples:\n" in helped.stdout
    table = helped.stdout.partition("exit codes:\n")[2]
    codes = re.findall(r"(?m)^  (\d[\d, ]*?)  ", table)
    assert codes == ["0", "1", "2", "3", "129, 130, 143"]
    assert max(map(len, helped.stdout.splitlines())) <= 80


def test_version_and_help_need_no_requests(tmp_path: Path) -> None:
    """`-S` hides the packages; the name of a results file needs them."""

    def run(option: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", "-S", str(SCRIPT), option]
        how: Any = {"cwd": tmp_path, "capture_output": True, "encoding": "utf-8"}
        return subprocess.run(command, **how, check=False)

    short, long, helped, bare = (run(each) for each in ("-V", "--version", "--help", "a.json"))
    assert re.fullmatch(r"download_succeeded_videos\.py \d+\.\d+\.\d+\n", short.stdout)
    assert long.stdout == short.stdout
    assert "--polling-results-file" in helped.stdout
    assert [each.returncode for each in (short, long, helped)] == [0, 0, 0]

    (line,) = bare.stderr.splitlines()
    assert "the package requests" in line
    assert "pip install requests" in line
    assert bare.returncode == 1
    assert bare.stdout == ""


@pytest.mark.parametrize("mode", ["--workers=2", "-q", "--json", "--dry-run", "--verify"])
def test_a_file_as_output_directory_is_one_message(tmp_path: Path, cdn: Cdn, mode: str) -> None:
    write_results(tmp_path, serve(cdn, 1))
    (tmp_path / "taken").write_text("mine")
    result = run_script(tmp_path, "--output-dir", "taken", mode)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "❌" in line]
    assert "taken" in line
    assert cdn.requests == []


# --only, --skip, --shard


@dataclass(frozen=True)
class Chosen:
    """Options that choose of four tasks, 0 to 3, and those that are left."""

    sentence: str
    arguments: Sequence[str]
    chosen: Sequence[int]


ID_0 = make_task_id(0)
ID_1 = make_task_id(1)
ID_2 = make_task_id(2)
ID_3 = make_task_id(3)
NOBODY = "00000000-nobody"
CHOSEN = [
    Chosen("a whole id", ["--only", ID_1], [1]),
    Chosen("its first 8 characters", ["--only", ID_2[:8]], [2]),
    Chosen("more than 8", ["--only", ID_2[:20]], [2]),
    Chosen("two ids", ["--only", ID_0, "--only", ID_3], [0, 3]),
    Chosen("all but one", ["--skip", ID_1[:8]], [0, 2, 3]),
    Chosen("all but two", ["--skip", ID_1, "--skip", ID_0], [2, 3]),
    Chosen("skip without a match", ["--skip", NOBODY], [0, 1, 2, 3]),
]


def test_only_may_name_a_task_of_another_shard(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 4, size=SMALL))
    for shard in ("1/2", "2/2"):
        result = run_script(tmp_path, "--only", ID_1, "--shard", shard)
        assert result.returncode == 0
        assert result.stderr == ""
    assert [request.path for request in cdn.requests] == ["/1.mp4"]
    both = run_script(tmp_path, "--only", ID_1, "--skip", ID_1)
    assert both.returncode == 0


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.sentence)
def test_only_and_skip_choose_tasks(tmp_path: Path, cdn: Cdn, case: Chosen) -> None:
    write_results(tmp_path, serve(cdn, 4, size=SMALL))
    result = run_script(tmp_path, *case.arguments)
    assert result.returncode == 0
    assert result.stderr == ""
    asked = {request.path for request in cdn.requests}
    assert asked == {f"/{number}.mp4" for number in case.chosen}
    count = len(case.chosen)
    assert f"tasks found: {count}\n📥 Videos downloaded: {count}\n" in result.stdout
    told = re.search(r"(?i)left out\D*(\d+)", result.stdout)
    left_out = int(told[1]) if told else 0
    assert left_out == 4 - count


@pytest.mark.parametrize("name", [NOBODY, ID_1[:7]], ids=["of nobody", "only 7 characters"])
def test_only_without_a_match_is_an_error(tmp_path: Path, cdn: Cdn, name: str) -> None:
    write_results(tmp_path, serve(cdn, 4, size=SMALL))
    result = run_script(tmp_path, "--only", name)
    assert result.returncode == 1
    assert "--only" in result.stderr
    assert cdn.requests == []


def test_a_dead_task_can_be_retired_and_json_holds_the_rest(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 3, size=SMALL)
    dead = rows[1]["task_id"]
    cdn.add("1.mp4", b"", Reply(status=404))
    write_results(tmp_path, rows)
    assert run_script(tmp_path, "-q").returncode == 3

    retired = run_script(tmp_path, "-q", "--skip", dead[:8])
    assert retired.returncode == 0
    assert retired.stderr == ""
    report = run_json(tmp_path, "--skip", dead)
    assert dead not in report["videos"]
    assert report["stats"] == figures(total_succeeded=2, already_exists=2)
    assert len(cdn.asked("1.mp4")) == 1


def test_shards_part_the_tasks_by_stub_alone(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 16, size=SMALL)
    for number, row in enumerate(rows):
        row["target_filename_stub"] = f"stub_{number % 8}"
    fewer = write_results(tmp_path, rows[::3], "20250101_000000").name
    write_results(tmp_path, rows)
    fewer_ids = {row["task_id"] for row in rows[::3]}

    shards = []
    for shard in ("1/2", "2/2"):
        options = ("--shard", shard, "--output-dir", f"part-{shard[0]}")
        planned = run_json(tmp_path, "--dry-run", fewer, *options)["videos"].keys()
        ids = run_json(tmp_path, *options)["videos"].keys()
        assert planned == ids & fewer_ids
        shards.append(ids)

    first, second = shards
    assert first
    assert second
    assert not first & second
    assert first | second == {row["task_id"] for row in rows}
    for one, other in zip(rows[:8], rows[8:], strict=True):  # of one stub
        assert (one["task_id"] in first) == (other["task_id"] in first)
    assert len(cdn.requests) == len(rows)


# --- --dry-run, --json, --verify ------------------------------------------------------------------


EXPIRED_S = 1_750_000_000  # 2025-06-15 15:06:40 UTC
ALIVE = 1_893_456_000  # 2030-01-01 00:00:00 UTC


def make_mixed_rows(directory: Path, cdn: Cdn) -> list[dict[str, Any]]:
    """Five tasks: to download, twice under one stub; refused; without a link; already there."""
    rows = serve(cdn, 5)
    rows[0]["video_url"] = make_jwt_link(f"{cdn.url}/0.mp4", ALIVE)
    rows[1]["target_filename_stub"] = "picture_0"
    cdn.add("1.mp4", WEBM)
    cdn.add("2.mp4", b"", Reply(status=404))
    rows[3]["video_url"] = 7
    put_video(directory / "video_outputs", rows[4], make_mp4(4))
    write_results(directory, [*rows, make_row(9, final_status="FAILED"), "no object"])
    return rows


def test_dry_run_says_names_and_expiry_and_touches_nothing(tmp_path: Path, cdn: Cdn) -> None:
    rows = make_mixed_rows(tmp_path, cdn)
    rows[2]["video_url"] = make_jwt_link(f"{cdn.url}/2.mp4", EXPIRED_S)
    write_results(tmp_path, rows)
    before = snapshot(tmp_path)
    result = run_script(tmp_path, "--dry-run", "--exec", f"{PYTHON} -h")
    assert run_script(tmp_path, "--dry-run", "--output-dir", "new").returncode == 3
    assert snapshot(tmp_path) == before
    assert cdn.requests == []

    out = result.stdout
    clash = f"picture_0_{rows[1]['task_id'][:8]}"
    assert re.search(r" picture_0\.mp4 .*2030-01-01 00:00:00 UTC", out)
    assert re.search(rf" {clash}\.mp4 .*not say", out)
    assert re.search(r" picture_2\.mp4 .*2025-06-15 15:06:40 UTC", out)
    assert "picture_4" not in out
    assert re.search(r"\b1 expired\b", out.splitlines()[-1])


def test_dry_run_counts_what_has_no_way_to_come_home(tmp_path: Path, cdn: Cdn) -> None:
    rows = make_mixed_rows(tmp_path, cdn)
    rows[2]["video_url"] = make_jwt_link(f"{cdn.url}/2.mp4", EXPIRED_S)
    write_results(tmp_path, rows)
    result = run_script(tmp_path, "--dry-run")
    assert result.returncode == 3
    failures = read_failures(result.stderr)
    assert failures.keys() == {"picture_2.mp4", "picture_3.mp4"}
    assert "expired" in failures["picture_2.mp4"]
    assert "video_url" in failures["picture_3.mp4"]
    assert all("RUNWAYML_API_SECRET" in failure for failure in failures.values())


def test_dry_run_advises_what_can_help(tmp_path: Path, cdn: Cdn, api: RunwayApi) -> None:
    without_id = make_row(0, **NO_ID, video_url=make_jwt_link(f"{cdn.url}/0.mp4", EXPIRED_S))
    write_results(tmp_path, [without_id])
    for env in ({}, api.env):
        result = run_script(tmp_path, "--dry-run", env=env)
        assert result.returncode == 3
        assert "run the polling step again" in result.stderr
        assert "RUNWAYML_API_SECRET" not in result.stderr


def test_dry_run_with_a_key_has_a_way_for_all(tmp_path: Path, cdn: Cdn, api: RunwayApi) -> None:
    rows = make_mixed_rows(tmp_path, cdn)
    rows[2]["video_url"] = make_jwt_link(f"{cdn.url}/2.mp4", EXPIRED_S)
    now = datetime.now().isoformat()
    unfinished = make_row(5, final_status=None, video_url=None, timestamp=now)
    write_results(tmp_path, [*rows, unfinished])
    result = run_script(tmp_path, "--dry-run", env=api.env)
    assert result.returncode == 0
    assert result.stderr == ""
    assert re.search("picture_5.*would be asked about", result.stdout)
    assert cdn.requests == api.requests == []


def test_json_tells_what_a_run_would_do(tmp_path: Path, cdn: Cdn) -> None:
    rows = make_mixed_rows(tmp_path, cdn)
    planned = run_json(tmp_path, "--dry-run")["videos"]
    statuses = [planned[row["task_id"]]["status"] for row in rows]
    assert statuses == ["pending", "pending", "pending", "failed", "exists"]
    done = run_json(tmp_path)["videos"]
    for number in (0, 1, 4):
        task_id = rows[number]["task_id"]
        assert planned[task_id]["path"] == done[task_id]["path"]


def test_json_tells_what_became_of_each_video(tmp_path: Path, cdn: Cdn) -> None:
    rows = make_mixed_rows(tmp_path, cdn)
    report = run_json(tmp_path)
    assert report["exit_code"] == 3
    assert report["error"] is None
    expected = figures(total_succeeded=5, downloaded=2, failed_downloads=2, already_exists=1)
    assert report["stats"] == expected
    good, odd, refused, linkless, there = (report["videos"][row["task_id"]] for row in rows)

    assert good == {
        "task_id": rows[0]["task_id"],
        "stub": "picture_0",
        "status": "downloaded",
        "path": os.path.join("video_outputs", "picture_0.mp4"),
        "size_bytes": VIDEO_BYTES,
        "error": None,
        "warning": None,
        "expires": "2030-01-01T00:00:00+00:00",
    }
    assert odd["stub"] == "picture_0"
    assert odd["size_bytes"] == len(WEBM)
    assert odd["expires"] is None
    assert "MP4" in odd["warning"]

    assert refused["status"] == "failed"
    assert list(refused["error"]) == ["reason", "hint", "http_status"]
    assert refused["error"]["http_status"] == 404
    assert "refused" in refused["error"]["reason"]
    assert "RUNWAYML_API_SECRET" in refused["error"]["hint"]
    assert linkless["status"] == "failed"
    assert linkless["error"]["http_status"] is None
    assert "video_url" in linkless["error"]["reason"]

    assert there["status"] == "exists"
    assert there["size_bytes"] == VIDEO_BYTES


def test_json_has_its_keys_in_order_and_stdout_to_itself(
    tmp_path: Path, cdn: Cdn, api: RunwayApi
) -> None:
    unfinished = make_unfinished(5)
    task_id = unfinished["task_id"]
    api.answer(task_id, make_answer(task_id, status="RUNNING"))
    (finished,) = serve(cdn, 1, size=SMALL)
    write_results(tmp_path, [unfinished, finished])
    result = run_script(tmp_path, "--json", env=api.env)
    report = strict_json(result.stdout.encode())
    assert list(report) == ["stats", "videos", "not_succeeded", "exit_code", "error"]
    assert list(report["stats"]) == list(figures())
    (video,) = report["videos"]
    keys = ["task_id", "stub", "status", "path", "size_bytes", "error", "warning", "expires"]
    assert list(video) == keys
    (other,) = report["not_succeeded"]
    assert list(other) == ["task_id", "stub", "runway_status"]
    assert list(other.values()) == [task_id, "picture_5", "RUNNING"]
    assert "DOWNLOAD STATISTICS" in result.stderr
    quiet = run_script(tmp_path, "--json", "-q", env=api.env)
    assert quiet.stderr == ""


def test_json_says_what_ended_the_run(tmp_path: Path) -> None:
    report = run_json(tmp_path)
    assert report["exit_code"] == 1
    assert report["videos"] == {}
    assert report["not_succeeded"] == []
    assert report["error"].startswith("No polling results found")


@dataclass(frozen=True)
class Damage:
    """What happened to a video since it was saved, and what --verify says of it."""

    name: str
    says: str
    act: Callable[[Path], object] = Path.exists
    facts: bool = True


DAMAGES = [
    Damage("missing", "missing.*run again", Path.unlink),
    Damage("cut", "99,990 bytes", lambda video: os.truncate(video, 99_990)),
    Damage("empty", "empty|0 bytes", lambda video: os.truncate(video, 0)),
    Damage("changed", "SHA-256", lambda video: video.write_bytes(OTHER)),
    Damage("old", "cut short", lambda video: os.truncate(video, 99_900), facts=False),
]


def test_verify_names_each_problem_and_what_to_do(
    tmp_path: Path, output_dir: Path, cdn: Cdn
) -> None:
    for number, damage in enumerate(DAMAGES):
        row = make_row(number, target_filename_stub=damage.name)
        video = put_video(output_dir, row, make_mp4(number), facts=damage.facts)
        damage.act(video)
    whole = make_row(9, target_filename_stub="whole")
    put_video(output_dir, whole, make_mp4())
    before = snapshot(tmp_path)
    result = run_script(tmp_path, "--verify")
    assert result.returncode == 3
    failures = read_failures(result.stderr)
    assert failures.keys() == {f"{damage.name}.mp4" for damage in DAMAGES}
    for damage in DAMAGES:
        assert re.search(f"(?s){damage.says}", failures[f"{damage.name}.mp4"]), damage.name
    assert snapshot(tmp_path) == before
    assert cdn.requests == []
    report = run_json(tmp_path, "--verify")
    assert report["stats"] == figures(total_succeeded=6, failed_downloads=5, already_exists=1)


def test_verify_accepts_all_that_a_run_leaves_or_keeps(tmp_path: Path, cdn: Cdn) -> None:
    videos = tmp_path / "video_outputs"
    rows = [make_row(0, video_url=cdn.add("0.mp4", WEBM)), make_row(1), make_row(2)]
    write_results(tmp_path, rows)
    put_video(videos, rows[1], make_mp4(1), facts=False)
    renamed = put_video(videos, rows[2], make_mp4(2))
    for path in (renamed, renamed.with_suffix(".json")):
        path.rename(videos / f"mine{path.suffix}")
    first = run_script(tmp_path)
    assert first.returncode == 0
    assert run_script(tmp_path).returncode == 0
    assert re.search(r"(?m)^  ⚠️ .*MP4", first.stdout)
    assert re.search(r"(?m)^⚠️ 1 video\b.*MP4", first.stderr)
    assert len(cdn.requests) == 1
    loose = {"loose.mp4": WHOLE, "odd.mp4": WHOLE, "odd.json": b"{", "queue.json": b"{}"}
    lay_out(videos, loose)
    result = run_script(tmp_path, "--verify")
    assert result.returncode == 0
    assert result.stderr == ""
    assert re.search(r"\b3 whole\b", result.stdout)
    assert "Without metadata that can be read, so not checked: 2 videos" in result.stdout
    assert {"loose.mp4", "odd.mp4"} <= set(result.stdout.split())


# --- Hand-over: --exec ----------------------------------------------------------------------------


def digest_of(command: str) -> str:
    """What the metadata of a video says when ``command`` took it."""
    return hashlib.sha256("\0".join(shlex.split(command)).encode()).hexdigest()[:12]


def handed_over(video: Path) -> Any:
    """The last key of the metadata, which must be the right one."""
    metadata = strict_json(video.with_suffix(".json").read_bytes())
    last = list(metadata)[-1]
    assert last == "handed_over", f"the last key of {video.stem}.json is {last}"
    return metadata["handed_over"]


def names_called(directory: Path) -> list[str]:
    """The names of the videos that a recorder was called for, in order."""
    if not (directory / "calls").exists():
        return []
    return [Path(call[0]).name for call in read_calls(directory)]


def test_words_reach_the_command_to_the_letter_without_a_shell(
    tmp_path: Path, output_dir: Path, cdn: Cdn
) -> None:
    stubs = [
        *("a b", "it's", "$(touch owned)", "`touch owned`", "; touch owned;", "&& touch owned"),
        *("$HOME", "-rf", "{metadata}", "{video}", "~", "%PATH%", "${IFS}", "é☃", "'", '"'),
    ]
    rows = serve(cdn, len(stubs), size=SMALL)
    for row, stub in zip(rows, stubs, strict=True):
        row["target_filename_stub"] = stub
    write_results(tmp_path, rows)
    command = make_recorder(tmp_path, "assert 'key' not in os.environ.values()")
    result = run_script(tmp_path, "--exec", command, env={"RUNWAYML_API_SECRET": "key"})
    assert result.returncode == 0
    assert result.stderr == ""
    videos = list(output_dir.glob("*.mp4"))
    expected = [[str(video), f"--with={video.with_suffix('.json')}"] for video in videos]
    assert sorted(read_calls(tmp_path)) == sorted(expected)
    assert len(expected) == len(stubs)
    assert "owned" not in names_in(tmp_path)
    assert "owned" not in names_in(output_dir)


def test_no_command_is_begun_after_a_stop(
    tmp_path: Path, cdn: Cdn, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = make_recorder(tmp_path)
    commands = [f"{command} 1", f"{command} 2"]
    downloader = make_downloader(tmp_path / "videos", commands=commands)
    remember = dsv.record_hand_over

    def remember_and_stop(*arguments: Any) -> None:
        remember(*arguments)
        downloader.stop()

    begun: list[Any] = []
    begin = subprocess.Popen

    def note_and_begin(words: Any, **how: Any) -> Any:
        begun.append(words)
        return begin(words, **how)

    monkeypatch.setattr(dsv, "record_hand_over", remember_and_stop)
    monkeypatch.setattr(subprocess, "Popen", note_and_begin)
    downloader.process_succeeded_task(serve(cdn, 1)[0])
    assert len(begun) == 1


@unix_only
def test_variables_of_a_shell_are_left_to_it(tmp_path: Path, output_dir: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1))
    script = 'video=its_own; echo "${video} ${none:-default} $1" >said'
    assert run_script(tmp_path, "--exec", f"sh -c '{script}' sh {{video}}").returncode == 0
    said = (tmp_path / "said").read_text().split()
    assert said == ["its_own", "default", str(output_dir / "picture_0.mp4")]


# What is handed over: each row is what was done before, then how often a run with --exec calls.


@dataclass(frozen=True)
class Before:
    """What happened to one task's video before the run with --exec, and if it is handed over."""

    sentence: str
    is_handed_over: bool
    lies_there: bool = True
    earlier: Sequence[str] = ()  # commands of earlier runs
    record: Any = None  # what the metadata holds as ``handed_over``


FIRST_COMMAND = f"{PYTHON} -c pass {{video}} 'one two'"
SECOND_COMMAND = f"{PYTHON} -c pass {{metadata}}"
SAME_COMMAND = f"{PYTHON}   -c  'pass' \"{{video}}\" one\\ two"
BEFORES = [
    Before("it was downloaded just now", True, lies_there=False),
    Before("it was downloaded by a run without --exec", True),
    Before("another command took it", True, earlier=[SECOND_COMMAND]),
    Before("this command took it", False, earlier=[FIRST_COMMAND]),
    Before("the same words, written otherwise, took it", False, earlier=[SAME_COMMAND]),
    Before("this and another command took it", False, earlier=[FIRST_COMMAND, SECOND_COMMAND]),
    Before("an older script noted true", True, record=True),
    Before("the record is nonsense", True, record={"a": [1]}),
    Before("the record holds nonsense", True, record=[None, 5, "x"]),
    Before("the record holds it beside nonsense", False, record=[5, digest_of(FIRST_COMMAND)]),
]


@pytest.mark.parametrize("case", BEFORES, ids=lambda case: case.sentence)
def test_each_command_gets_each_video_once(
    tmp_path: Path, output_dir: Path, cdn: Cdn, case: Before
) -> None:
    (row,) = serve(cdn, 1, size=SMALL)
    write_results(tmp_path, [row])
    video = output_dir / "picture_0.mp4"
    if case.lies_there:
        put_video(video.parent, row, WHOLE)
    for command in case.earlier:
        assert run_script(tmp_path, "-q", "--exec", command).returncode == 0
    if case.record is not None:
        path = video.with_suffix(".json")
        metadata = strict_json(path.read_bytes()) | {"handed_over": case.record}
        path.write_text(json.dumps(metadata), encoding="utf-8")

    result = run_script(tmp_path, "--exec", FIRST_COMMAND)

    assert result.returncode == 0
    assert result.stderr == ""
    told = f"Handed over: {Path(sys.executable)}" in result.stdout
    assert told == case.is_handed_over
    assert handed_over(video).count(digest_of(FIRST_COMMAND)) == 1
    for command in case.earlier:
        assert digest_of(command) in handed_over(video)
    assert run_script(tmp_path, "--verify").returncode == 0
    assert len(cdn.requests) <= 1


def test_several_commands_run_in_their_order_and_the_record_moves_along(
    tmp_path: Path, output_dir: Path, cdn: Cdn
) -> None:
    write_results(tmp_path, serve(cdn, 1, size=SMALL))
    other = tmp_path / "second"
    other.mkdir()
    first = make_recorder(tmp_path)
    calls = str(tmp_path / "calls")
    second = make_recorder(other, f"assert os.path.exists({calls!r})")
    both = ("--exec", first, "--exec", second)
    assert run_script(tmp_path, *both).returncode == 0
    video = output_dir / "picture_0.mp4"
    assert handed_over(video) == [digest_of(first), digest_of(second)]
    moved = video.rename(video.with_name("mine.mp4"))
    video.with_suffix(".json").rename(moved.with_suffix(".json"))
    assert run_script(tmp_path, *both).returncode == 0
    assert names_called(tmp_path) == ["picture_0.mp4"]
    assert names_called(other) == ["picture_0.mp4"]
    assert len(cdn.requests) == 1


def test_a_video_found_and_adopted_is_handed_over_but_no_strangers(
    tmp_path: Path, cdn: Cdn
) -> None:
    rows = serve(cdn, 2, size=SMALL)
    videos = tmp_path / "video_outputs"
    put_video(videos, make_row(8), make_mp4(8))  # of no task of this run
    lay_out(videos, {"picture_0.mp4": WHOLE, "loose.mp4": WHOLE})
    cdn.add("1.mp4", b"", Reply(status=404))
    write_results(tmp_path, rows)
    assert run_script(tmp_path, "--exec", make_recorder(tmp_path)).returncode == 3
    assert names_called(tmp_path) == ["picture_0.mp4"]


def test_downloads_go_before_hand_overs_of_what_was_there(
    tmp_path: Path, output_dir: Path, cdn: Cdn
) -> None:
    rows = serve(cdn, 6, size=SMALL)
    for row in rows[:3]:
        put_video(output_dir, row, WHOLE)
    write_results(tmp_path, rows)
    home = "'new' if all(os.path.exists(f'picture_{i}.mp4') for i in (3, 4, 5)) else 'early'"
    note = f"os.chdir(os.path.dirname(sys.argv[1])); print({home}, file=open('../states', 'a'))"
    command = make_recorder(tmp_path, note)
    assert run_script(tmp_path, "--workers", "1", "--exec", command).returncode == 0
    states = (tmp_path / "states").read_text().split()
    called = names_called(tmp_path)
    were_there = {f"picture_{number}.mp4" for number in range(3)}
    assert set(called[-3:]) == were_there
    assert states[-3:] == ["new"] * 3
    assert len(called) == 6


# A command that fails, changes the video, or ends with the run


@dataclass(frozen=True)
class FailedCommand:
    """What a command does, and what is said of it."""

    sentence: str
    code: str
    says: str


FAILED_COMMANDS = [
    FailedCommand("an exit code", "sys.exit(7)", "exit code 7"),
    FailedCommand("its last lines", "print('first why\\nthen that'); sys.exit(1)", "then that"),
    FailedCommand(
        "blank lines at the end", "print('the reason\\n\\n \\n'); sys.exit(1)", "the reason"
    ),
    FailedCommand("what it says on stderr", "sys.exit('from stderr')", "from stderr"),
    FailedCommand(
        "nothing a terminal obeys, no query",
        "print('why \\x1b[2J https://x/a?secret failed'); sys.exit(1)",
        r"why \?\[2J https://x/a failed",
    ),
    FailedCommand("bytes that are no text", "os.write(1, b'caf\\xe9 shut'); sys.exit(1)", "shut"),
    FailedCommand("a signal", "os.kill(os.getpid(), 9)", "ended by signal 9"),
]


@unix_only
@pytest.mark.parametrize("case", FAILED_COMMANDS, ids=lambda case: case.sentence)
def test_a_failed_command_is_said_and_run_again(
    tmp_path: Path, output_dir: Path, cdn: Cdn, case: FailedCommand
) -> None:
    (row,) = serve(cdn, 1, size=SMALL)
    write_results(tmp_path, [row])
    video = output_dir / "picture_0.mp4"
    command = make_recorder(tmp_path, case.code)
    failed = run_script(tmp_path, "-q", "--exec", command)
    assert failed.returncode == 3
    assert re.search(f"(?s)not handed over.*{case.says}", failed.stderr)
    assert re.search(r"(?m)^    picture_0\.mp4 ", failed.stderr)
    assert_whole(video.parent, video.stem, row["task_id"], WHOLE)
    assert b"handed_over" not in video.with_suffix(".json").read_bytes()

    (tmp_path / "record it.py").write_text("pass", encoding="utf-8")  # mended
    assert run_script(tmp_path).returncode == 0
    assert run_script(tmp_path, "--exec", command).returncode == 0
    assert handed_over(video) == [digest_of(command)]
    assert len(cdn.requests) == 1


def test_a_failed_hand_over_is_an_error_of_the_video_but_no_failed_download(
    tmp_path: Path, output_dir: Path, cdn: Cdn
) -> None:
    rows = serve(cdn, 2, size=SMALL)
    put_video(output_dir, rows[0], WHOLE)
    write_results(tmp_path, rows)
    report = run_json(tmp_path, "--exec", make_recorder(tmp_path, "sys.exit(5)"))
    assert report["exit_code"] == 3
    assert report["stats"] == figures(total_succeeded=2, downloaded=1, already_exists=1)
    videos = [report["videos"][row["task_id"]] for row in rows]
    assert [video["status"] for video in videos] == ["exists", "downloaded"]
    for video in videos:
        assert "exit code 5" in video["error"]["reason"]
        assert "--exec" in video["error"]["hint"]
    assert len(names_called(tmp_path)) == 2


def test_a_video_changed_in_place_stays_right(tmp_path: Path, output_dir: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 2, size=SMALL)
    put_video(output_dir, rows[0], WHOLE)
    write_results(tmp_path, rows)
    watermark = make_recorder(tmp_path, "open(sys.argv[1], 'ab').write(b'\\0\\0\\0\\x08free')")
    for _ in range(2):
        assert run_script(tmp_path, "--exec", watermark).returncode == 0
        assert run_script(tmp_path, "--verify").returncode == 0
    assert len(names_called(tmp_path)) == 2
    for number, row in enumerate(rows):
        body = make_mp4(number, SMALL) + box(b"free")
        assert_whole(output_dir, f"picture_{number}", row["task_id"], body)


@unix_only
def test_a_command_killed_with_the_run_is_done_by_the_next(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1, size=SMALL))
    command = make_recorder(tmp_path, "os.path.exists('mended') or os.kill(os.getppid(), 9)")
    killed = start_script(tmp_path, "--exec", command)
    assert finish(killed).returncode == -signal.SIGKILL
    (tmp_path / "mended").touch()
    for _ in range(2):
        assert run_script(tmp_path, "--exec", command).returncode == 0
    assert len(names_called(tmp_path)) == 2
    assert len(cdn.requests) == 1


@unix_only
def test_a_command_ends_with_the_run_and_the_video_counts(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1, size=SMALL))
    end = "signal.signal(15, lambda *_: os.mkdir('ended') or os._exit(0))"
    slow = f"import signal, time; {end}; os.mkdir('ready'); time.sleep(60)"
    command = make_recorder(tmp_path, f"os.path.exists('mended') or exec({slow!r})")
    process = start_script(tmp_path, "--json", "--exec", command)
    wait_until((tmp_path / "ready").exists)
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    wait_until((tmp_path / "ended").exists)
    assert result.returncode == 143
    assert "not handed over" not in result.stderr
    assert json.loads(result.stdout)["stats"] == figures(total_succeeded=1, downloaded=1)
    (tmp_path / "mended").touch()
    assert run_script(tmp_path, "--exec", command).returncode == 0
    assert len(names_called(tmp_path)) == 2
    assert len(cdn.requests) == 1


# --- From Python ----------------------------------------------------------------------------------


def test_the_orchestrators_calls_work_to_the_letter(
    tmp_path: Path, cdn: Cdn, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = serve(cdn, 3, size=SMALL)
    cdn.add("2.mp4", b"", Reply(status=404))
    linkless = make_row(3, video_url=None)
    file = write_results(tmp_path, [*rows, make_row(9, final_status="FAILED"), linkless, None])
    output = tmp_path / "new" / "video_outputs"

    downloader = dsv.VideoDownloader(output_dir=str(output))
    assert output.is_dir()
    assert downloader.find_all_polling_results(directory=str(tmp_path)) == [file]
    results = downloader.load_polling_results(file)
    assert results == json.loads(file.read_bytes())
    tasks = downloader.get_succeeded_tasks(results)
    assert tasks == rows
    answers = [downloader.process_succeeded_task(task) for task in [*tasks, tasks[0]]]
    assert answers == [True, True, False, True]
    counted = figures(total_succeeded=4, downloaded=2, failed_downloads=1, already_exists=1)
    assert list(downloader.stats.items()) == list(counted.items())
    downloader.print_final_stats()
    assert downloader.load_polling_results(tmp_path / "missing.json") == {}

    out, err = capsys.readouterr()
    assert "✅ Total SUCCEEDED tasks found: 4\n" in out
    assert re.search(rf"{linkless['task_id'][:8]}.*video_url", err)
    assert "missing.json" in err.splitlines()[-1]


def test_a_file_is_processed_and_the_answer_is_how_many_are_there(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 3, size=SMALL)
    cdn.add("1.mp4", WHOLE, Reply(status=403), Reply())
    file = write_results(tmp_path, [*rows, rows[0]])
    assert make_downloader(tmp_path).process_polling_results_file(file) == 2
    downloader = make_downloader(tmp_path)
    assert downloader.process_polling_results_file(str(file)) == 3
    assert downloader.stats == figures(total_succeeded=3, downloaded=1, already_exists=2)
    assert downloader.process_polling_results_file(tmp_path / "missing.json") == 0


def test_default_stubs(tmp_path: Path) -> None:
    downloader = make_downloader(tmp_path)
    assert downloader.generate_filename_stub({"task_id": "def45678-1234"}) == "video_def45678"
    assert downloader.generate_filename_stub({}) == "video_unknown"
    assert downloader.generate_filename_stub({"target_filename_stub": "a b"}) == "a b"


def test_with_a_key_rows_without_a_link_are_tasks_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloader = make_downloader(tmp_path)
    now = datetime.now().isoformat()
    unfinished = make_row(3, final_status=None, video_url=None, timestamp=now)
    rows = [
        make_row(1),
        make_row(2, video_url=None),
        unfinished,
        make_row(4, final_status="FAILED"),
    ]
    results = {"task_results": rows}
    assert downloader.get_succeeded_tasks(results) == rows[:1]
    monkeypatch.setenv("RUNWAYML_API_SECRET", API_KEY)
    assert downloader.get_succeeded_tasks(results) == rows[:3]


@pytest.mark.parametrize(
    "row",
    [make_row(final_status="FAILED"), make_row(final_status=None, video_url=None)],
    ids=["failed", "still running"],
)
def test_one_that_has_not_succeeded_is_false_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Any
) -> None:
    assert make_downloader(tmp_path).process_succeeded_task(row) is False
    err = capsys.readouterr().err
    assert row["task_id"][:8] in err
    assert re.search("not succeeded: FAILED|not finished", err)
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize(
    "task",
    [None, 5, [], {}, {"final_status": "SUCCEEDED"}, make_row(0, video_url=5)],
    ids=repr,
)
def test_a_useless_task_is_false_and_raises_nothing(tmp_path: Path, task: Any) -> None:
    downloader = make_downloader(tmp_path)
    assert downloader.process_succeeded_task(task) is False
    assert names_in(tmp_path) == set()
    assert downloader.get_succeeded_tasks({"task_results": [task]}) == []
    assert downloader.get_succeeded_tasks(task) == []


def test_a_failed_call_gives_reason_and_advice(
    tmp_path: Path, cdn: Cdn, capsys: pytest.CaptureFixture[str]
) -> None:
    row = make_row(video_url=cdn.add("0.mp4", b"", Reply(status=403)))
    assert make_downloader(tmp_path).process_succeeded_task(row) is False
    said = "".join(capsys.readouterr())
    assert "HTTP 403" in said
    assert "RUNWAYML_API_SECRET" in said


@pytest.mark.parametrize("quiet", [False, True])
def test_a_failed_video_of_a_file_is_told_by_the_call_itself(
    tmp_path: Path, cdn: Cdn, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    file = write_results(tmp_path, serve(cdn, 1, refusal(403)))
    assert make_downloader(tmp_path / "a", quiet=quiet).process_polling_results_file(file) == 0
    said = capsys.readouterr()
    assert "HTTP 403" in said.out + said.err
    assert (said.out == "") == quiet


def test_the_verdict_knows_of_a_file_that_could_not_be_read(
    tmp_path: Path, cdn: Cdn, capsys: pytest.CaptureFixture[str]
) -> None:
    downloader = make_downloader(tmp_path / "a")
    assert downloader.process_polling_results_file(write_results(tmp_path, serve(cdn, 2))) == 2
    assert downloader.process_polling_results_file(tmp_path / "gone.json") == 0
    downloader.print_final_stats()
    assert "2 of 2 on disk, but another problem" in capsys.readouterr().err


@pytest.mark.parametrize("as_words", [False, True], ids=["one text", "a list of words"])
def test_a_failed_command_is_no_failed_call(tmp_path: Path, cdn: Cdn, as_words: bool) -> None:
    (row,) = serve(cdn, 1, size=SMALL)
    command = make_recorder(tmp_path, "sys.exit(9)")
    given = shlex.split(command) if as_words else command
    outcomes: list[Any] = []
    downloader = make_downloader(tmp_path / "a", commands=[given], on_outcome=outcomes.append)
    assert downloader.process_succeeded_task(row) is True
    assert len(read_calls(tmp_path)) == 1
    assert downloader.stats == figures(total_succeeded=1, downloaded=1)
    assert "exit code 9" in str(outcomes[0].error)


def test_settings_are_by_name_and_misuse_is_a_type_or_value_error(tmp_path: Path) -> None:
    make: Any = dsv.VideoDownloader
    with pytest.raises(TypeError):
        make(tmp_path, 8)
    misuses: list[Callable[[], object]] = [
        lambda: make(5),
        lambda: make(tmp_path, workers="many").process_succeeded_task(make_row()),
        lambda: make(tmp_path).process_polling_results_file(None),
        lambda: make(tmp_path, commands=["no-such-command {video}"]),
    ]
    for misuse in misuses:
        with pytest.raises((TypeError, ValueError)):
            misuse()


@pytest.mark.parametrize(
    "names",
    [
        ("a.mp4", "missing/b.json"),
        ("missing.mp4", "b.json"),
        (".", "b.json"),
        ("a\0.mp4", "b.json"),
    ],
    ids=["no directory", "no video", "a directory", "an impossible name"],
)
def test_create_metadata_json_answers_if_it_could(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: Sequence[str]
) -> None:
    row = make_row()
    good_video = tmp_path / "a.mp4"
    good_video.write_bytes(WHOLE)
    downloader = make_downloader(tmp_path)
    video, metadata = (f"{tmp_path}/{name}" for name in names)
    assert downloader.create_metadata_json(row, video, metadata) is False
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    good = f"{tmp_path}/a.json"
    assert downloader.create_metadata_json(row, str(good_video), good) is True
    assert_whole(tmp_path, "a", make_task_id(0), WHOLE)
    assert names_in(tmp_path) == {"a.mp4", "a.json"}


def test_create_metadata_json_leaves_nothing_hidden(tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    video.write_bytes(WHOLE)
    downloader = make_downloader(tmp_path)
    (tmp_path / ".dsv").symlink_to("elsewhere")  # so a directory of our own is made
    assert downloader.create_metadata_json(make_row(), video, tmp_path / "a.json") is True
    assert names_in(tmp_path) == {".dsv", "a.mp4", "a.json"}


def test_create_metadata_json_says_that_the_disk_is_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    video = tmp_path / "a.mp4"
    video.write_bytes(WHOLE)
    downloader = make_downloader(tmp_path)
    monkeypatch.setattr(os, "fsync", no_room)
    assert downloader.create_metadata_json(make_row(), video, tmp_path / "a.json") is False
    assert "no space left" in capsys.readouterr().err


# Callbacks


def test_each_outcome_is_told_once_in_the_calling_thread(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 3, size=SMALL)
    cdn.add("1.mp4", b"", Reply(status=404))
    put_video(tmp_path, rows[2], WHOLE)
    seen = []
    threads = set()

    def note(outcome: Any) -> None:
        seen.append(outcome)
        threads.add(threading.current_thread())

    downloader = make_downloader(tmp_path, on_outcome=note)
    downloader.process_polling_results_file(write_results(tmp_path, rows))

    assert len(seen) == 3
    assert threads == {threading.current_thread()}
    by_id = {outcome.task.task_id: outcome for outcome in seen}
    good, refused, there = (by_id[row["task_id"]] for row in rows)
    assert f"{good.status} {refused.status} {there.status}" == "downloaded failed exists"
    assert good.path == tmp_path / "picture_0.mp4"
    assert good.size_bytes == SMALL
    assert not good.error
    assert "404" in str(refused.error)
    assert not SECRETS.search(repr(seen).replace("RUNWAYML_API_SECRET", ""))


def test_an_outcome_can_be_pickled(tmp_path: Path, cdn: Cdn) -> None:
    row = make_row(video_url=cdn.add("0.mp4", b"", Reply(status=404)))
    seen: list[Any] = []
    make_downloader(tmp_path, on_outcome=seen.append).process_succeeded_task(row)
    (copy,) = pickle.loads(pickle.dumps(seen))
    assert copy == seen[0]
    assert f"{copy.status}" == "failed"
    assert "404" in copy.error


def test_progress_is_frozen_and_told_a_few_times_a_second(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 3, size=SMALL)
    cdn.add("2.mp4", make_mp4(2), Reply(pause_at=HALF))
    seen: list[Any] = []
    threads = set()

    def note(progress: Any) -> None:
        seen.append(progress)
        threads.add(threading.current_thread())
        if progress.bytes_done > HALF and "picture_2" in progress.waiting_for:
            cdn.released.set()

    downloader = make_downloader(tmp_path, timeout=30, on_progress=note)
    assert downloader.process_polling_results_file(write_results(tmp_path, rows)) == 3
    assert cdn.released.is_set()
    assert threads == {threading.current_thread()}
    assert {progress.total for progress in seen} == {3}
    done = [progress.done for progress in seen]
    assert done == sorted(done)
    assert 2 in done
    with pytest.raises(AttributeError):
        seen[0].done = 5


def test_what_a_callback_raises_is_printed_and_the_run_goes_on(
    tmp_path: Path, cdn: Cdn, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_results(tmp_path, serve(cdn, 3, Reply(wait_s=0.6), size=SMALL))
    refuse = mock.Mock(side_effect=KeyError("mine"))
    hinder = mock.Mock(side_effect=RuntimeError("not now"))
    downloader = make_downloader(tmp_path, on_outcome=refuse, on_progress=hinder)
    assert downloader.process_polling_results_file(file) == 3
    err = capsys.readouterr().err
    assert err.count("on_outcome: KeyError: 'mine'") == 3
    assert "on_progress: RuntimeError: not now" in err


# --- From programs: pools, threads, subclasses ----------------------------------------------------

POOL = """
import json, multiprocessing, sys
from download_succeeded_videos import VideoDownloader

if __name__ == "__main__":
    downloader = VideoDownloader("videos", quiet=True)
    with open("rows.json", encoding="utf-8") as file:
        rows = json.load(file)
    with multiprocessing.get_context(sys.argv[1]).Pool(4) as pool:
        print(json.dumps(pool.map(downloader.process_succeeded_task, rows)))
"""
FAULTY = {7: Reply(status=500), 30: Reply(send=HALF), 60: Reply(send=0, ending="reset")}


@pytest.fixture(scope="module")
def pool_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """61 tasks over 21 stubs, with three faults, by two kinds of pools at the same time."""
    runs = {}
    with contextlib.ExitStack() as servers:
        for method in ("fork", "spawn"):
            if method not in multiprocessing.get_all_start_methods():
                continue
            cdn = servers.enter_context(Cdn())
            directory = tmp_path_factory.mktemp(method)
            rows = serve(cdn, 61)
            for number, row in enumerate(rows):
                row["target_filename_stub"] = f"clip_{number % 21}"
            for number, reply in FAULTY.items():
                cdn.add(f"{number}.mp4", make_mp4(number), reply, GOOD)
            (directory / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
            (directory / "pool.py").write_text(POOL, encoding="utf-8")
            process = subprocess.Popen(
                [sys.executable, "pool.py", method],
                cwd=directory,
                env=script_environment(PYTHONPATH=str(SCRIPT.parent)),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
            )
            runs[method] = (cdn, directory, process)
        yield runs


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pool_brings_61_tasks_over_21_stubs_home(pool_runs: Any, method: str) -> None:
    if method not in pool_runs:
        pytest.skip(f"no {method} here")
    cdn, directory, process = pool_runs[method]
    result = finish(process)
    assert result.returncode == 0
    assert result.stderr == ""
    assert json.loads(result.stdout) == [True] * 61
    names = owners(directory / "videos")
    for number in range(61):
        task_id = make_task_id(number)
        assert_whole(directory / "videos", names[task_id], task_id, make_mp4(number))
        requests_made = len(cdn.asked(f"{number}.mp4"))
        assert requests_made == (2 if number in FAULTY else 1), f"{number}: {requests_made}"
    assert len(names_in(directory / "videos")) == 2 * 61


def test_a_pickled_downloader_has_settings_and_directory_but_its_own_counts(
    tmp_path: Path, cdn: Cdn, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = serve(cdn, 2, size=SMALL)
    monkeypatch.chdir(tmp_path)
    command = make_recorder(tmp_path)
    told = mock.Mock()
    original = dsv.VideoDownloader(
        "videos", workers=3, timeout=7, retries=1, quiet=True, commands=[command], on_outcome=told
    )
    assert original.process_succeeded_task(rows[0])
    shutil.move(tmp_path / "videos", tmp_path / "kept")
    copy = pickle.loads(pickle.dumps(original))
    assert "videos" not in names_in(tmp_path)  # looked at by the first call, not by the copy
    monkeypatch.chdir("/")
    settings = ("workers", "timeout", "retries", "quiet")
    assert [getattr(copy, name) for name in settings] == [3, 7, 1, True]
    assert copy.stats == figures()
    assert copy.process_succeeded_task(rows[1])
    assert copy.stats == original.stats == figures(total_succeeded=1, downloaded=1)
    assert told.call_count == 1
    assert_whole(tmp_path / "videos", "picture_1", make_task_id(1), make_mp4(1, SMALL))
    assert len(read_calls(tmp_path)) == 2


class Numbered(dsv.VideoDownloader):
    """Names videos in its own way."""

    def generate_filename_stub(self, task: Any) -> str:
        return f"night_{task['task_id'][-3:]}"


def test_a_subclass_names_the_videos(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 3, size=SMALL)
    downloader = Numbered(tmp_path, timeout=5)
    assert downloader.process_succeeded_task(rows[0])
    file = write_results(tmp_path, rows)
    for _ in range(2):
        assert downloader.process_polling_results_file(file) == 3
    for number, row in enumerate(rows):
        assert_whole(tmp_path, f"night_{number:03}", row["task_id"], make_mp4(number, SMALL))
    assert len(names_in(tmp_path)) == 7
    assert len(cdn.requests) == 3


def test_threads_on_one_downloader_mix_nothing_up(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 12, size=SMALL)
    for number, row in enumerate(rows):
        row["target_filename_stub"] = "sSß"[: 1 + number % 2]
    outcomes: list[Any] = []
    downloader = make_downloader(tmp_path, on_outcome=outcomes.append)
    with ThreadPoolExecutor(24) as pool:
        assert all(pool.map(downloader.process_succeeded_task, [*rows, *rows]))
    assert downloader.stats == figures(total_succeeded=24, downloaded=12, already_exists=12)
    told = Counter(outcome.task.task_id for outcome in outcomes)
    assert told == {row["task_id"]: 2 for row in rows}
    names = owners(tmp_path)
    for number, row in enumerate(rows):
        assert_whole(tmp_path, names[row["task_id"]], row["task_id"], make_mp4(number, SMALL))
    assert len(names_in(tmp_path)) == 24
    assert len(cdn.requests) == 12


def test_an_adoption_that_was_given_up_writes_nothing_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_written = threading.Event()
    row = make_row(target_filename_stub=f"video_{make_task_id(0)[:8]}")
    (tmp_path / f"{row['target_filename_stub']}.mp4").write_bytes(WHOLE)
    describe = dsv.describe_file

    def describe_late(path: Path, on_block: Any = lambda: None) -> Any:
        time.sleep(0.6)  # as on a mount that hangs, longer than three timeouts
        try:
            return describe(path, on_block)
        finally:
            has_written.set()

    monkeypatch.setattr(dsv, "describe_file", describe_late)
    downloader = make_downloader(tmp_path, timeout=0.1)
    assert downloader.process_succeeded_task(row) is False
    assert has_written.wait(10)
    time.sleep(0.2)
    assert list(tmp_path.glob("*.json")) == []


def test_stop_from_another_thread_ends_the_call_alone(
    tmp_path: Path, cdn: Cdn, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = serve(cdn, 3)
    cdn.add("1.mp4", make_mp4(1), Reply(send=HALF, ending="hang"), GOOD)
    cdn.add("2.mp4", make_mp4(2), Reply(wait_s=60), GOOD)
    file = write_results(tmp_path, rows)
    videos = tmp_path / "videos"
    downloader = make_downloader(videos, timeout=60)
    downloader.stop()  # nothing to stop
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(downloader.process_polling_results_file, file)
        wait_until((videos / "picture_0.mp4").exists)
        wait_until(lambda: parts_in(videos) and cdn.asked("2.mp4"))
        downloader.stop()
        assert call.result(30) == 1
    assert downloader.process_polling_results_file(file) == 3
    first, second = (request.range_start for request in cdn.asked("1.mp4"))
    assert first is None
    assert HALF - 1000 < (second or 0) <= HALF
    assert_home(videos, 3)
    downloader.print_final_stats()
    assert "3 of 3 on disk" in capsys.readouterr().out


class Hasty(dsv.VideoDownloader):
    """Another thread stops it while it reads the results file."""

    def generate_filename_stub(self, task: Any) -> str:
        stopper = threading.Thread(target=self.stop)
        stopper.start()
        stopper.join()
        return super().generate_filename_stub(task)


def test_a_stop_holds_whenever_it_comes(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 3, size=SMALL)
    file = write_results(tmp_path, rows)
    assert Hasty(tmp_path / "a").process_polling_results_file(file) == 0

    put_video(tmp_path / "b", rows[0], WHOLE)
    downloader: Any = make_downloader(tmp_path / "b", on_outcome=lambda _outcome: downloader.stop())
    assert downloader.process_polling_results_file(file) == 1
    assert cdn.requests == []


# The cost of a call: operations on the disk, counted, with 300 videos there and with none


def count_disk_calls(call: Callable[[], object]) -> Counter[str]:
    """How often ``call`` asks the file system for something, in all threads."""
    counts: Counter[str] = Counter()

    def note(_frame: object, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ in (
            "stat",
            "lstat",
            "scandir",
            "listdir",
            "open",
        ):
            counts[function.__name__] += 1

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        assert call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return counts


def test_a_call_costs_the_same_in_a_full_directory(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 3, size=SMALL)
    for number in range(100, 400):
        put_video(tmp_path / "full", make_row(number), WHOLE)
    counts = {}
    for name in ("empty", "full"):
        downloader = make_downloader(tmp_path / name)
        assert downloader.process_succeeded_task(rows[0])  # reads the directory
        calls = [functools.partial(downloader.process_succeeded_task, row) for row in rows[1:]]
        counts[name] = [count_disk_calls(call) for call in calls]
    assert all(sum(counted.values()) > 0 for counted in counts["empty"])
    for empty, full in zip(counts["empty"], counts["full"], strict=True):
        assert sum(full.values()) <= sum(empty.values()) + 10, (empty, full)


@pytest.mark.parametrize("is_late", [False, True], ids=["a run of a file", "half a minute later"])
def test_the_directory_is_looked_at_anew(
    tmp_path: Path, cdn: Cdn, monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    (row,) = serve(cdn, 1, size=SMALL)
    videos = tmp_path / "videos"
    downloader = make_downloader(videos)
    assert downloader.process_succeeded_task(row)
    for suffix in (".mp4", ".json"):  # by somebody else
        (videos / f"picture_0{suffix}").rename(videos / f"mine{suffix}")
    if is_late:
        now = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: now() + 31)
        assert downloader.process_succeeded_task(row)
    else:
        file = write_results(tmp_path, [row])
        assert downloader.process_polling_results_file(file) == 1
    assert names_in(videos) == {"mine.mp4", "mine.json"}
    assert len(cdn.requests) == 1


# Next to what else runs in the process


@unix_only
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_fork_has_connections_of_its_own(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 2)
    downloader = make_downloader(tmp_path)
    assert downloader.process_succeeded_task(rows[0])
    child = os.fork()
    if not child:
        os._exit(not downloader.process_succeeded_task(rows[1]))
    assert os.waitpid(child, 0)[1] == 0
    assert len({request.client for request in cdn.requests}) == 2


def test_callers_may_patch_requests_and_replace_the_console(
    tmp_path: Path, cdn: Cdn, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = mock.Mock(spec=["write"])
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", mock.Mock())
    (row,) = serve(cdn, 1, size=SMALL)
    with mock.patch("download_succeeded_videos.requests.get"):
        assert make_downloader(tmp_path).process_succeeded_task(row)
    assert "✅ Downloaded: 0.00 MB" in str(out.write.mock_calls)


@responses.activate
def test_the_package_responses_can_stand_in_for_the_network(tmp_path: Path) -> None:
    responses.add(responses.GET, re.compile("https://cdn.invalid/"), body=WHOLE)
    file = write_results(tmp_path, map(make_row, range(20)))
    before = set(threading.enumerate())
    assert make_downloader(tmp_path).process_polling_results_file(file) == 20
    wait_until(lambda: before.issuperset(threading.enumerate()))


# --- The gallery: --gallery -----------------------------------------------------------------------


class Page(HTMLParser):
    """The elements of a page in order, with their attributes, and its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.shape: list[tuple[str, ...]] = []  # the names of all elements and attributes
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.shape.append((tag, *dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def addresses(self) -> list[str]:
        """All that a browser might load or follow."""
        found = []
        for _, attributes in self.elements:
            addresses = [attributes.get(name) for name in ("src", "href", "action")]
            found += [address for address in addresses if address]
        return found

    @property
    def players(self) -> list[str]:
        """The names of the files that can be played, in order."""
        found = []
        for tag, attributes in self.elements:
            if tag == "video":
                path = (attributes["src"] or "").partition("#")[0]
                found.append(urllib.parse.unquote(path).removeprefix("./"))
        return found


def page_in(directory: Path) -> Path:
    return directory / "video_outputs" / "index.html"


def read_page(directory: Path) -> Page:
    return Page(page_in(directory).read_text(encoding="utf-8"))


def make_gallery(directory: Path, rows: Sequence[Any], *arguments: str) -> Page:
    """The page of a run for ``rows`` in a new directory, the last row's video the newest."""
    directory.mkdir()
    result = download(directory, rows, "--gallery", "--workers", "1", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    return read_page(directory)


def test_the_page_shows_each_video_newest_first_with_its_facts(tmp_path: Path, cdn: Cdn) -> None:
    facts = {"theme": "coast", "duration": 7.25, "seed": 4_294_967_295, "prompt": "élan, 2 < 3"}
    rows = [row | facts for row in serve(cdn, 3)]
    page = make_gallery(tmp_path / "run", rows)
    assert page.players == ["picture_2.mp4", "picture_1.mp4", "picture_0.mp4"]
    ids = map(make_task_id, range(3))
    for text in (*page.players, *ids, "coast", "7.25", "4294967295", "élan, 2 < 3", "0.10 MB"):
        assert text in page.text, f"not shown: {text}"
    assert f"{datetime.now():%Y-%m-}" in page.text
    tags = [tag for tag, _ in page.elements]
    for tag in ("title", "h1", "input"):
        assert tags.count(tag) == 1
    assert re.search(r"\b3 videos", page.text)


def test_the_page_asks_no_network_and_holds_no_signed_link(tmp_path: Path, cdn: Cdn) -> None:
    (row,) = serve(cdn, 1)
    signed = row["video_url"]
    texts = {"prompt": f"as in {signed} and", "theme": signed.upper(), "cluster_id": signed}
    page = make_gallery(tmp_path / "run", [row | texts])
    assert cdn.url in page.text  # the prompt is there, without what the link is signed with
    assert not SECRETS.search(page.source)
    for address in page.addresses:
        assert re.match(r"\./|data:", address), f"{address} is no file beside the page"
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", page.source)


HOSTILE = [
    "</script></noscript><img src=x onerror=alert(1)>",
    "\"'><script>alert(1)</script>",
    "</title></style><!-- &amp; $cards $count $n {name} %s \\g<0>",
    "javascript:alert(1)",
    "a/b #1 é\u3000\u200d?%41&amp;.mp4",
    "\ud800 \x00 \x1b[2J \u202e",
]


def test_a_hostile_text_becomes_no_element_and_its_video_is_found(tmp_path: Path, cdn: Cdn) -> None:
    texts = ("prompt", "seed", "theme", "duration", "target_filename_stub")
    hostile = []
    plain = []
    for number, row in enumerate(serve(cdn, len(HOSTILE))):
        hostile.append(row | dict.fromkeys(texts, HOSTILE[number]))
        plain.append(row | dict.fromkeys(texts, f"word{number}"))
    page = make_gallery(tmp_path / "hostile", hostile)
    assert page.shape == make_gallery(tmp_path / "plain", plain).shape
    for text in HOSTILE[:-1]:
        assert text in page.text, f"not shown as it is: {text}"
    for number, name in enumerate(reversed(page.players)):
        video = page_in(tmp_path / "hostile").with_name(name)
        assert video.read_bytes() == make_mp4(number)


def test_all_videos_with_metadata_are_shown_and_no_others(tmp_path: Path, cdn: Cdn) -> None:
    make_gallery(tmp_path / "run", serve(cdn, 1))
    videos = tmp_path / "run" / "video_outputs"
    put_video(videos, make_row(7, target_filename_stub="earlier"), make_mp4(7))
    put_video(videos, make_row(8, target_filename_stub="gone"), WHOLE).unlink()
    put_video(videos, make_row(9, target_filename_stub="empty"), b"")
    (videos / "without metadata.mp4").write_bytes(make_mp4())
    assert run_script(tmp_path / "run", "--gallery").returncode == 0
    assert set(read_page(tmp_path / "run").players) == {"picture_0.mp4", "earlier.mp4"}


@dataclass(frozen=True)
class RunEnd(Row):
    """A run with --gallery in a directory with one video, and whether it writes a page."""

    exit_code: int
    replies: Sequence[Reply] | None = (GOOD,)  # to a second task; None: no results file
    fault: Mapping[str, str] = field(default_factory=dict)
    writes: bool = True
    says: str = ""  # on stderr


NOT_IN_PLACE = fault("no rename", of="index.html")
DISK_FULL = fault("disk full", after_fsyncs=0)
RUN_ENDS = [
    RunEnd("all is well", 0),
    RunEnd("a video failed", 3, [refusal(403)]),
    RunEnd("there were no results files", 1, None),
    RunEnd("the disk was full", 1, [GOOD], DISK_FULL, False, "no space left"),
    RunEnd("the page could not be put in place", 3, [GOOD], NOT_IN_PLACE, False, "index.html"),
]


@pytest.mark.parametrize("end", RUN_ENDS, ids=str)
def test_the_page_is_written_at_the_end(tmp_path: Path, cdn: Cdn, end: RunEnd) -> None:
    videos = tmp_path / "video_outputs"
    put_video(videos, make_row(7, target_filename_stub="earlier"), make_mp4(7))
    if end.replies:
        write_results(tmp_path, serve(cdn, 1, *end.replies))
    result = run_process(tmp_path, "--gallery", env=end.fault)
    assert result.returncode == end.exit_code
    assert page_in(tmp_path).exists() == end.writes
    assert end.says in result.stderr
    assert hidden_in(videos) == set()


def test_no_page_is_tried_in_a_directory_that_cannot_be_made(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1))
    result = run_script(tmp_path, "--output-dir", "x" * 300, "--gallery")
    assert result.returncode == 1
    assert re.search("too long", result.stderr)


@unix_only
def test_a_stopped_run_writes_no_page(tmp_path: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1, Reply(send=HALF, ending="hang")))
    process = start_script(tmp_path, "--gallery")
    wait_until(lambda: cdn.requests)
    process.send_signal(signal.SIGTERM)
    assert finish(process).returncode == 143
    assert not page_in(tmp_path).exists()


def test_a_signal_while_the_page_is_written_ends_as_any_stop(
    tmp_path: Path, cdn: Cdn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt(signal.SIGTERM)

    monkeypatch.setattr(dsv, "make_gallery", interrupt)
    write_results(tmp_path, serve(cdn, 1))
    result = run_script(tmp_path, "--gallery", "--json")
    report = json.loads(result.stdout)
    assert report["exit_code"] == result.returncode == 143
    assert report["stats"]["downloaded"] == 1
    assert "Videos downloaded: 1" in result.stderr


def test_its_own_page_is_made_anew(tmp_path: Path, cdn: Cdn) -> None:
    page = make_gallery(tmp_path / "run", [])
    assert (page.players, "No videos" in page.text) == ([], True)
    download(tmp_path / "run", serve(cdn, 2), "--gallery")
    assert len(read_page(tmp_path / "run").players) == 2


ANOTHERS = {"a page": b"<title>mine</title>", "an empty file": b"", "a directory": Path.mkdir}


@pytest.mark.parametrize("what", ANOTHERS)
def test_an_index_of_anothers_is_left_alone_and_said(tmp_path: Path, cdn: Cdn, what: str) -> None:
    videos = tmp_path / "video_outputs"
    lay_out(videos, {"index.html": ANOTHERS[what]})
    before = snapshot(videos)["index.html"]
    result = download(tmp_path, serve(cdn, 1), "--gallery")
    assert snapshot(videos)["index.html"] == before
    assert "index.html" in result.stderr
    assert result.returncode == 3
    assert_whole(videos, "picture_0", make_task_id(0), make_mp4(0))


@unix_only
def test_a_kill_while_the_page_is_written_leaves_nothing(
    tmp_path: Path, output_dir: Path, cdn: Cdn
) -> None:
    write_results(tmp_path, serve(cdn, 1))
    killed = run_process(tmp_path, "--gallery", env=fault("kill", of="index.html", at_step=1))
    assert killed.returncode == -signal.SIGKILL
    assert run_script(tmp_path, "--gallery").returncode == 0
    assert read_page(tmp_path).players == ["picture_0.mp4"]
    assert hidden_in(output_dir) == set()


# --- The gallery in a browser ---------------------------------------------------------------------

# Tries the page, and tells the server what it saw.
IN_BROWSER = """<script>
const frame = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)));
const until = async condition => { while (!condition()) await frame(); };
const paused = [];
HTMLMediaElement.prototype.pause = function() { paused.push(this); };

const find = async text => {
  const box = document.querySelector("input");
  box.value = text;
  box.dispatchEvent(new Event("input"));
  await frame();
  const shown = [...document.querySelectorAll("article")].filter(card => card.offsetHeight);
  return [shown.length, document.querySelector("main").innerText.includes("No video")];
};

const look = async () => {
  const players = document.getElementsByTagName("video");
  await until(() => players.length >= 2);
  const [first, second] = players;
  first.dispatchEvent(new Event("play"));
  const seen = {pauses: [paused.includes(first), paused.includes(second)], controls: []};
  for (const element of [document.querySelector("input"), first, document.querySelector("a")]) {
    element.focus();
    await frame();
    seen.controls.push(first.controls);
  }
  seen.players = players.length;
  seen.fits = getComputedStyle(first).objectFit;
  seen.found = [await find("ELAN picture_3.mp4"), await find("no such thing"), await find(" ")];
  return seen;
};
const tell = seen => fetch("SERVER/seen?" + encodeURIComponent(JSON.stringify(seen)));
look().then(tell, error => tell(String(error)));
</script>"""


def test_the_page_in_a_browser(tmp_path: Path, cdn: Cdn) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs Chromium")
    rows = [row | {"prompt": "Élan"} for row in serve(cdn, 60, size=SMALL)]
    page = make_gallery(tmp_path / "run", rows)
    file = page_in(tmp_path / "run").with_name("tried.html")
    file.write_text(page.source + IN_BROWSER.replace("SERVER", cdn.url), encoding="utf-8")

    mouse = "availableHoverTypes=2,primaryHoverType=2"  # without one, there are always controls
    options = f"--headless --no-sandbox --disable-gpu --no-first-run --blink-settings={mouse}"
    command = [browser, *options.split(), "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'browser'}", file.as_uri()]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: cdn.asked("seen"))
        finally:
            process.terminate()

    (request,) = cdn.asked("seen")
    seen = json.loads(urllib.parse.unquote(request.target.partition("?")[2]))
    assert isinstance(seen, dict), seen
    assert 2 <= seen["players"] < 30  # only those near the view are made
    assert seen["pauses"] == [False, True]
    assert seen["controls"] == [False, True, False]
    assert seen["fits"] == "contain"
    assert seen["found"] == [[1, False], [0, True], [60, False]]


# --- Layout and dependencies ----------------------------------------------------------------------

ROOT = SCRIPT.parent
ENTRIES = {
    *("download_succeeded_videos.py", "test_download_succeeded.py"),
    *("requirements.txt", "README.md", "video_outputs"),
}


def git(*arguments: str) -> str:
    """What a git command that only reads says about the project."""
    command = shutil.which("git")
    if not command or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    whole = [command, "-c", "safe.directory=*", *arguments]
    return subprocess.check_output(whole, cwd=ROOT, text=True)


def test_the_top_level_holds_five_entries() -> None:
    files = git("ls-files").splitlines()
    top = {file.split("/")[0] for file in files}
    assert {name for name in top if not name.startswith(".")} == ENTRIES
    below = [file for file in files if file.startswith("video_outputs/")]
    assert below == ["video_outputs/.gitkeep"]


def test_what_runs_leave_is_not_for_git() -> None:
    left = ["video_outputs/a.mp4", "video_outputs/demo/index.html", f"./{LATEST}"]
    assert git("check-ignore", *left).split() == left


@unix_only
def test_the_script_can_be_executed(tmp_path: Path) -> None:
    assert os.access(SCRIPT, os.X_OK)
    first_line = SCRIPT.read_text(encoding="utf-8").partition("\n")[0]
    assert first_line == "#!/usr/bin/env python3"
    result = subprocess.run([SCRIPT, "-V"], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_copy_of_the_one_file_does_the_job(tmp_path: Path, output_dir: Path, cdn: Cdn) -> None:
    write_results(tmp_path, serve(cdn, 1))
    copy = shutil.copy(SCRIPT, tmp_path / "bring them.py")
    command = [sys.executable, str(copy)]
    result = subprocess.run(command, cwd=tmp_path, env=script_environment(), capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")
    assert_home(output_dir, 1)


# Packages


def test_the_packages_are_those_of_the_contract() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = {each.name: each for each in map(Requirement, filter(None, lines))}
    assert set(wanted) == {"requests", "pytest", "responses"}
    versions = ["2.24.0", "2.25.0", "2.31.0", "2.32.0", "2.32.1", "2.32.2", "2.32.3", "2.34.2"]
    taken = [each for each in versions if wanted["requests"].specifier.contains(each)]
    assert taken == ["2.25.0", "2.31.0", "2.32.3", "2.34.2"]


def test_uv_is_told_the_same_requests_as_pip() -> None:
    """The comment at the top, by which `uv run` installs what a script needs."""
    top = SCRIPT.read_text(encoding="utf-8").partition('"""')[0]
    (packages,) = re.findall(r"^# dependencies = (\[.*\])$", top, flags=re.MULTILINE)
    (text,) = json.loads(packages)
    requirement = Requirement(text)
    assert (requirement.name, '# requires-python = ">=3.10"\n' in top) == ("requests", True)
    refused = [each for each in ("2.24.0", "2.32.1") if each not in requirement.specifier]
    assert refused == ["2.24.0", "2.32.1"]


def imported_by(path: Path) -> set[str]:
    """The packages that a Python file imports, wherever it does."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return {name.partition(".")[0] for name in found}


# Of the standard library, what there is on POSIX alone.
POSIX_ONLY = {
    *("crypt", "fcntl", "grp", "nis", "posix", "pty", "pwd", "readline", "resource"),
    *("spwd", "syslog", "termios", "tty"),
}


def test_the_script_imports_requests_and_what_every_system_has() -> None:
    names = imported_by(SCRIPT)
    assert names - sys.stdlib_module_names <= {"requests", "urllib3"}
    assert names & POSIX_ONLY == set()


# As on Windows: none of these modules, signals and functions.
ELSEWHERE = f"""
import os, runpy, signal, sys
sys.modules.update(dict.fromkeys({sorted(POSIX_ONLY - {"posix"})}, None))
for name in ("SIGHUP", "SIGUSR1", "SIGALRM", "pthread_kill", "pthread_sigmask", "setitimer"):
    vars(signal).pop(name, None)
for name in ("fchmod", "fchown", "chown", "getuid", "geteuid", "getpgid", "killpg", "mkfifo",
             "posix_fadvise", "posix_fallocate", "pread", "pwrite", "setsid", "statvfs", "sync",
             "uname", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK"):
    vars(os).pop(name, None)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_nothing_is_needed_that_only_posix_has(tmp_path: Path, output_dir: Path, cdn: Cdn) -> None:
    cut = [Reply(send=HALF), GOOD]
    write_results(tmp_path, serve(cdn, 2, *cut))
    options = ["--gallery", "--exec", f"{PYTHON} -c pass {{video}}"]
    command = [sys.executable, "-c", ELSEWHERE, str(SCRIPT), *options]
    result = subprocess.run(command, cwd=tmp_path, env=script_environment(), capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")
    names = {"picture_0.mp4", "picture_0.json", "picture_1.mp4", "picture_1.json", "index.html"}
    assert names_in(output_dir) == names


# Python


def old_pythons() -> list[Path]:
    """Those that run; pyenv's stand-ins may not."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [*root.glob("versions/3.[89].*/bin/python")]
    for name in ("python3.8", "python3.9"):
        python = shutil.which(name)
        if python and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            found.append(Path(python))
    return found


def test_an_older_python_says_so_in_one_line(tmp_path: Path) -> None:
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 8))  # it can read the file
    for python in old_pythons():
        result = subprocess.run([python, SCRIPT], cwd=tmp_path, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (1, "")
        (line,) = result.stderr.splitlines()
        assert re.search(r"Python 3\.10 .*3\.[89]\.", line), line


# What is told to people


def help_text(directory: Path) -> str:
    return run_process(directory, "--help", env={"COLUMNS": "80"}).stdout


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text))


def commands_in(text: str, program: str) -> list[list[str]]:
    """The words behind ``program`` wherever ``text`` calls it, up to the end of the command."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for call in re.split(rf"\S*{re.escape(program)}(?= |$)", line)[1:]:
            with contextlib.suppress(ValueError):  # prose: an apostrophe
                words = list(shlex.shlex(call, posix=True, punctuation_chars=True))
                ends = [number for number, word in enumerate(words) if set(word) <= set("&|;<>")]
                found.append(words[: min(ends, default=None)])
    return found


def test_the_readme_knows_the_options_and_exit_codes_of_help(tmp_path: Path) -> None:
    helped = help_text(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert options_in(helped) - options_in(readme) <= {"--help"}
    variables = set(re.findall(r"\b(?:RUNWAYML|REQUESTS|HTTPS?|NO)_[A-Z_]+", helped))
    assert [name for name in variables if name not in readme] == []
    rows = re.findall(r"^\|\s*`?([\d, ]+)`?\s*\|", readme, flags=re.MULTILINE)
    codes = set(re.findall(r"\d+", " ".join(rows)))
    assert codes >= {"0", "1", "2", "3", "129", "130", "143"}


@pytest.mark.parametrize("source", ["README.md", "--help"])
def test_no_command_that_is_shown_has_an_unknown_option(tmp_path: Path, source: str) -> None:
    known = help_text(tmp_path)
    text = known
    if source != "--help":
        text = (ROOT / source).read_text(encoding="utf-8")
    commands = commands_in(text, SCRIPT.name)
    assert len(commands) >= 3
    for words in commands:
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert options <= options_in(known), words


def test_the_readme_names_the_commands_for_the_tests_and_the_demo() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    calls = commands_in(readme, "test_download_succeeded.py")
    assert [] in calls
    assert ["--demo"] in calls


# --- More promises: what small changes of the script broke unseen ---------------------------------


def test_the_time_of_day_in_the_name_counts(tmp_path: Path) -> None:
    latest = write_results(tmp_path, [], "a_20250104_230000")
    write_results(tmp_path, [], "b_20250104_010000")
    printed = run_script(tmp_path).stdout
    assert printed.startswith(f"📁 Using latest results file: {latest.name}\n")


def test_an_id_of_many_bytes_makes_no_long_name(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 2, size=SMALL)
    give_stubs(rows, ["x" * 300, "x" * 400])
    rows[1]["task_id"] = "🎬" * 8
    assert download(tmp_path, rows).returncode == 0
    names = owners(tmp_path / "video_outputs").values()
    assert len(names) == 2
    for name in names:
        assert_name_for_any_file_system(f"{name}.json")


@pytest.mark.parametrize("count", [1, 2])
def test_a_row_without_id_and_link_takes_no_video(tmp_path: Path, count: int) -> None:
    output_dir = tmp_path / "video_outputs"
    lay_out(output_dir, {"picture_0.mp4": WHOLE})
    row = make_row(task_id=None, video_url=None)
    stats = run_for(tmp_path, *[row] * count)["stats"]
    assert stats == figures(total_succeeded=count, failed_downloads=count)
    assert names_in(output_dir) == {"picture_0.mp4"}


def test_no_part_is_trusted_after_one_fsync_error(
    tmp_path: Path, output_dir: Path, cdn: Cdn
) -> None:
    write_results(tmp_path, serve(cdn, 1))
    env = fault("fsync error", of="*.part", at=1)
    assert run_forked([Job(tmp_path, (), env)]) == [0]
    assert [request.range_start for request in cdn.requests] == [None, None]
    assert_home(output_dir, 1)


def test_what_is_kept_has_reached_the_disk_before_it_gets_its_name(
    tmp_path: Path, cdn: Cdn
) -> None:
    write_results(tmp_path, serve(cdn, 1, Reply(send=HALF)))
    log = tmp_path / "log"
    env = fault("log", log=str(log), calls=["fsync", "rename"], of="*.part")
    assert run_forked([Job(tmp_path, ["--retries", "0"], env)]) == [3]
    calls = re.findall("^(fsync|rename) ", log.read_text(encoding="utf-8"), re.MULTILINE)
    assert calls == ["fsync", "rename"]


def test_more_contents_are_seen_as_what_they_are(tmp_path: Path, cdn: Cdn) -> None:
    in_first_head = Case(
        "whole by its length, yet it ends in its first head",
        [Reply(body=OBJECT[:5]), GOOD],
        requests=2,
    )
    in_a_head = Case(
        "a body until the connection ends, that ends in the head of a box",
        [Reply(body=OBJECT + b"\0\0\0", framing="close"), GOOD],
        requests=2,
    )
    behind_zeros = contents(
        "a byte behind 600 kB of zeros", bytes(600_000) + b"\1", says="not an MP4"
    )
    rows = [in_first_head, in_a_head, behind_zeros]
    run = run_cases(cdn, tmp_path, rows, "--retries", "1")
    for case in rows:
        run.check(case)


@pytest.mark.parametrize("body", [b"no", OBJECT[:HALF]], ids=["500", "a video that is cut"])
def test_after_a_fault_no_idle_connection_is_taken(cdn: Cdn, tmp_path: Path, body: bytes) -> None:
    """Two videos leave two connections; one is idle when the other brings a fault."""
    status = 500 if body == b"no" else 200
    rows = serve(cdn, 3, Reply(wait_s=0.1))
    cdn.replies["/2.mp4"] = [Reply(status=status, body=body, wait_s=0.2), GOOD]
    assert download(tmp_path, rows, "--workers", "2").returncode == 0
    first_three = {request.client for request in cdn.requests[:3]}
    assert len(first_three) == 2, "nothing to see: no connection was kept alive"
    assert cdn.requests[3].client not in first_three


def test_a_lack_of_descriptors_passes(tmp_path: Path, output_dir: Path, cdn: Cdn) -> None:
    env = fault("no create", error="EMFILE", of="*.part", at=1)
    result = download(tmp_path, serve(cdn, 3), run=run_process, env=env)
    assert (result.returncode, result.stderr) == (0, "")
    assert_home(output_dir, 3)


@pytest.mark.parametrize("is_pressure", [True, False])
def test_a_retry_after_of_60_s_is_honoured(is_pressure: bool) -> None:
    error = dsv.TransientError("HTTP 503", wait_s=60.0, is_pressure=is_pressure)
    assert min(ask_in_vain(error)) >= 60


def test_a_video_without_metadata_is_not_adopted_after_a_fault_either(
    tmp_path: Path, output_dir: Path, cdn: Cdn, api: RunwayApi
) -> None:
    lay_out(output_dir, {"picture_0.mp4": OBJECT})
    row = make_unfinished(0)
    tell(api, row["task_id"], cdn.add("0.mp4", OBJECT, refusal(500), GOOD), [{}])
    report = json.loads(run_in(tmp_path, [row], "--json", api=api).stdout)
    assert report["stats"] == figures(total_succeeded=1, downloaded=1)
    assert_whole(output_dir, WITH_ID, row["task_id"], OBJECT)


def test_no_password_of_a_link_is_printed(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 1)
    rows[0]["video_url"] = rows[0]["video_url"].replace("http://", "http://me:secret@")
    result = download(tmp_path, rows)
    assert result.returncode == 0
    assert "Streaming download from: http://127.0.0.1" in result.stdout
    assert not SECRETS.search(result.stdout)


@unix_only
def test_a_file_from_the_future_holds_nothing_up(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 1, Reply(pause_at=HALF), GOOD)
    output_dir = tmp_path / "video_outputs"
    frozen = start_forked(prepare_run(tmp_path, "frozen", rows))
    wait_for_part(output_dir)
    signal_all(signal.SIGSTOP, frozen)
    for part in parts_in(output_dir):
        in_an_hour = time.time() + 3600
        os.utime(part, (in_an_hour, in_an_hour))  # the clock of another machine is ahead
    other = start_forked(prepare_run(tmp_path, "other", rows, "--timeout", "0.5"))
    other.join(20)
    frozen.kill()
    assert other.exitcode == 0
    assert_whole(output_dir, "picture_0", make_task_id(0), make_mp4(0))


# --- More promises: console, commands, programs ---------------------------------------------------


def test_a_new_worker_takes_the_place_of_one_that_hangs(tmp_path: Path) -> None:
    def drip_once(connection: socket.socket, path: str, _: Any, __: int) -> None:
        if path == "/1.mp4":
            connection.sendall(raw_answer(make_mp4(1)))
            return
        connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while not server.released.wait(0.1):
            connection.sendall(b"a")

    with RawServer(drip_once) as server:
        rows = [make_row(number, video_url=server.link(f"{number}.mp4")) for number in range(2)]
        write_results(tmp_path, rows)
        options = ["--workers", "1", "--timeout", "0.5", "--retries", "0"]
        run = start_forked(Job(tmp_path, options))
        run.join(20)
        run.kill()
    assert run.exitcode == 3
    assert_whole(tmp_path / "video_outputs", "picture_1", make_task_id(1), make_mp4(1))


def test_of_21_names_one_is_counted(tmp_path: Path, cdn: Cdn) -> None:
    result = download(tmp_path, serve(cdn, 21, refusal(404)), "-q")
    assert result.stderr.count(".mp4") == 20
    assert "… and 1 more\n" in result.stderr


def test_without_an_id_there_is_no_way_even_with_a_key(tmp_path: Path, api: RunwayApi) -> None:
    write_results(tmp_path, [make_row(task_id=None, video_url=make_jwt_link(api.url, 1e9))])
    result = run_script(tmp_path, "--dry-run", env=api.env)
    assert result.returncode == 3
    assert "expired" in result.stderr


@unix_only
def test_a_stop_tells_what_was_not_handed_over(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 2, size=SMALL)
    download(tmp_path, rows)
    command = make_recorder(
        tmp_path, "import time; os.path.exists('ready') or os.mkdir('ready'); time.sleep(60)"
    )
    process = start_script(tmp_path, "--exec", command)
    wait_until((tmp_path / "ready").exists)
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert result.returncode == 143
    assert "⏸ stopped: 2 on disk, 2 not handed over\n" in result.stderr
    assert "✅ 2 of 2" not in result.stdout


def test_the_summary_forgets_a_failure_that_was_mended(
    tmp_path: Path, cdn: Cdn, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = serve(cdn, 1, refusal(404), GOOD)
    downloader = make_downloader(tmp_path / "videos")
    assert downloader.process_succeeded_task(row) is False
    assert downloader.process_succeeded_task(row) is True
    capsys.readouterr()
    downloader.print_final_stats()
    assert capsys.readouterr().err == ""


def test_a_later_call_knows_the_names_of_the_earlier_ones(tmp_path: Path, cdn: Cdn) -> None:
    rows = serve(cdn, 2, size=SMALL)
    give_stubs(rows, ["Same", "same"])
    downloader = make_downloader(tmp_path / "videos")
    for row in rows:
        assert downloader.process_succeeded_task(row)
    names = owners(tmp_path / "videos").values()
    assert len({name.casefold() for name in names}) == 2


def test_a_directory_that_was_removed_is_made_again(tmp_path: Path, cdn: Cdn) -> None:
    videos = tmp_path / "videos"
    downloader = make_downloader(videos)
    for row in serve(cdn, 2):
        videos.rmdir() if not cdn.requests else shutil.rmtree(videos)
        assert downloader.process_succeeded_task(row)


def test_a_page_that_is_a_dead_link_is_left_alone(tmp_path: Path, cdn: Cdn) -> None:
    videos = tmp_path / "video_outputs"
    videos.mkdir()
    (videos / "index.html").symlink_to("nowhere")
    result = download(tmp_path, serve(cdn, 1), "--gallery")
    assert os.readlink(videos / "index.html") == "nowhere"
    assert result.returncode == 3


def test_few_descriptors_mean_fewer_workers_and_no_fault(
    cdn: Cdn, tmp_path: Path, output_dir: Path
) -> None:
    rows = serve(cdn, 60, Reply(wait_s=0.2), size=SMALL)
    few = ("bash", "-c", 'ulimit -n 64; exec "$@"', "x")
    result = download(tmp_path, rows, "--retries", "0", run=run_process, before=few)
    assert (result.returncode, result.stderr) == (0, "")
    assert_home(output_dir, 60, SMALL)


def test_a_refusal_is_free_until_15_s() -> None:
    retries = dsv.Retries(allowed=0, started_s=0.0)
    assert retries.delay_s(PRESSED, 14.9, 0.5) > 0
    with pytest.raises(dsv.TaskError):
        retries.delay_s(PRESSED, 15.1, 0.5)


def test_a_silence_of_30_s_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    now_s = 0.0
    console = dsv.Console(clock=lambda: now_s)
    now_s = 29.9
    console.show_progress(dsv.Progress(0, 1, 0))
    assert capsys.readouterr().out == ""
    now_s = 30.0
    console.show_progress(dsv.Progress(0, 1, 0))
    assert "0/1" in capsys.readouterr().out


def test_the_line_that_breaks_a_silence_tells_the_rate_of_the_last_seconds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now_s = 0.0
    console = dsv.Console(clock=lambda: now_s)
    for now_s in (25.0, 28.0, 30.0):
        console.show_progress(dsv.Progress(0, 1, int(now_s) * 2**20))
    assert "1.0 MB/s" in capsys.readouterr().out


# --- The index at the top of this file ------------------------------------------------------------


def test_the_index_above_names_tests_that_exist() -> None:
    named = re.findall(r"^ +[2-9] .* (test_\w+)$", __doc__ or "", re.MULTILINE)
    missing = [name for name in named if name not in globals()]
    assert not missing
    sections = re.findall(r"^ +([2-9])  ", __doc__ or "", re.MULTILINE)
    assert sorted(set(sections)) == list("23456789")
    assert len(named) == len(sections)


# --- The demo -------------------------------------------------------------------------------------

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


@dataclass(frozen=True)
class DemoTask:
    """One task of the demo, and what happens to its video."""

    name: str
    theme: str
    prompt: str
    clip: int
    size: int  # bytes
    event: str = ""  # "busy", "breaks", "dead link" or "polling gave up"; "": nothing

    @property
    def stub(self) -> str:
        return f"{self.name}_video"

    def make_video(self) -> bytes:
        """A clip of a few kilobytes, filled up to the size of a real video."""
        clip = demo_clips()[self.clip]
        return clip + box(b"free", bytes(self.size - len(clip) - 8))

    def make_row(self, number: int, link: str) -> dict[str, Any]:
        """The row that the poller leaves of a task that SUCCEEDED just now."""
        now = datetime.now().isoformat()
        row = make_row(number, video_url=link, timestamp=now, completion_time=now)
        row["image_path"] = f"video_queue/{self.name}_draft.png"
        row["target_filename_stub"] = self.stub
        row["prompt"] = self.prompt
        row["theme"] = self.theme
        row["seed"] = 1000 + number
        row["duration"] = 2
        row["resolution"] = "320:180"
        return row


DEMO_TASKS = [
    DemoTask("desert_dunes", "land", "low sun over the dunes, slow drift", 0, 1_020_000, "busy"),
    DemoTask("quiet_sea", "water", "sunset at sea, gentle waves", 1, 1_110_000, "breaks"),
    DemoTask("morning_balloon", "air", "a balloon rises over green hills", 2, 840_000),
    DemoTask("morning_balloon", "air", "the same balloon, second take", 2, 750_000),
    DemoTask("aurora_sky", "night", "aurora over a frozen lake", 0, 930_000, "dead link"),
    DemoTask("evening_tide", "water", "the tide comes in at dusk", 1, 810_000, "polling gave up"),
]


def serve_demo_task(
    cdn: Cdn, api: RunwayApi, number: int, task: DemoTask, bytes_per_second: float
) -> dict[str, Any]:
    """Serve the video of ``task``, with what happens to it; its row."""
    task_id = make_task_id(number)
    file = f"{task_id[:8]}.mp4"
    slow = Reply(bytes_per_second=bytes_per_second)
    replies = [slow]
    if task.event == "busy":
        replies = [refusal(503, "1"), slow]
    elif task.event == "breaks":
        replies = [replace(slow, send=task.size // 2), slow]
    cdn.add(file, task.make_video(), *replies)

    now = time.time()
    link = make_jwt_link(f"{cdn.url}/{file}", now + 86_400)
    row = task.make_row(number, link)
    if task.event == "dead link":
        cdn.add(f"dead/{file}", b"", refusal(403))
        row["video_url"] = make_jwt_link(f"{cdn.url}/dead/{file}", now - 3_600)
        api.answer(task_id, make_answer(task_id, link))
    elif task.event == "polling gave up":
        for name in ("final_status", "completion_time", "video_url"):
            del row[name]
        api.answer(task_id, make_answer(task_id, link))
    return row


def make_demo(cdn: Cdn, api: RunwayApi, bytes_per_second: float) -> list[dict[str, Any]]:
    """The rows that the poller leaves of a night, their videos served by ``cdn``."""
    rows = []
    for number, task in enumerate(DEMO_TASKS):
        rows.append(serve_demo_task(cdn, api, number, task, bytes_per_second))
    reason = "SAFETY.OUTPUT.THIRD_PARTY"
    failed = make_row(len(rows), final_status="FAILED", failure_reason=reason, video_url=None)
    cancelled = make_row(len(rows) + 1, final_status="CANCELLED", video_url=None)
    return [*rows, failed, cancelled]


def clear_demo(directory: Path) -> None:
    """Remove what an earlier demo left, and nothing else."""
    for number, task in enumerate(DEMO_TASKS):
        for stub in (task.stub, f"{task.stub}_{make_task_id(number)[:8]}"):
            for suffix in (".mp4", ".json"):
                (directory / f"{stub}{suffix}").unlink(missing_ok=True)
    for hidden in directory.glob(".dsv*"):
        shutil.rmtree(hidden, ignore_errors=True)
    (directory / "index.html").unlink(missing_ok=True)


def demo(home: Path, bytes_per_second: float) -> int:
    """Run the script on servers of its own, into ``home``/video_outputs/demo; its exit code."""
    output_dir = home / "video_outputs" / "demo"
    clear_demo(output_dir)
    with Cdn() as cdn, RunwayApi() as api, tempfile.TemporaryDirectory() as directory:
        rows = make_demo(cdn, api, bytes_per_second)
        results = write_results(Path(directory), rows, stamp())
        options = ["--output-dir", "video_outputs/demo", "--workers", "3", "--gallery"]

        print("A small CDN and a small Runway API on this machine stand in for the real ones.")
        print("What goes wrong on the way is on purpose: a busy server, a cut connection, a")
        print("dead link, two videos of one name, and a task that polling gave up on.")
        print(f"\n$ python {SCRIPT.name} {shlex.join(options)} {results.name}\n", flush=True)

        command = [sys.executable, str(SCRIPT), *options, str(results)]
        exit_code = subprocess.call(command, cwd=home, env=script_environment(**api.env))
    if exit_code == 0:
        print(f"\nAll {len(DEMO_TASKS)} videos came home. Look at them in a browser:")
        print((output_dir / "index.html").as_uri())
    return exit_code


def test_the_demo_brings_everything_home(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output_dir = tmp_path / "video_outputs" / "demo"
    put_video(output_dir, make_row(1, target_filename_stub="quiet_sea_video"), WHOLE)
    lay_out(output_dir, {"notes.txt": b"mine", "index.html": b"of an earlier demo"})

    assert demo(tmp_path, bytes_per_second=1e8) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert f"Videos downloaded: {len(DEMO_TASKS)}\n" in out
    assert "Resumed" in out
    assert (output_dir / "index.html").as_uri() in out

    videos = owners(output_dir)
    for number, task in enumerate(DEMO_TASKS):
        task_id = make_task_id(number)
        assert videos[task_id] in (task.stub, f"{task.stub}_{task_id[:8]}")
        assert_whole(output_dir, videos[task_id], task_id, task.make_video())
    names = {f"{stub}{suffix}" for stub in videos.values() for suffix in (".mp4", ".json")}
    assert names_in(output_dir) == names | {"index.html", "notes.txt"}
    assert names_in(tmp_path / "video_outputs") == {"demo"}


def main(arguments: list[str]) -> int:
    """Run the demo, or else pytest with ``arguments``; the exit code."""
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the process that is started
    if arguments == ["--demo"]:
        return demo(SCRIPT.parent, bytes_per_second=400_000)
    # In a process of its own: each fork of this one would load this whole file once more.
    return subprocess.call([sys.executable, "-m", "pytest", __file__, *arguments])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
