#!/usr/bin/env python3
"""Measure download_succeeded_videos.py against the tools one would use instead.

    python3 .ci/benchmark.py [--runs N] [--rows ROW ...] [--script PATH] [--before PATH]

Needs Debian. As root it installs what is missing of PACKAGES. An nginx on the loopback address
serves a real MP4 under as many links as there are videos. The script and its rivals take turns:
a round that does not count, then N (default 5) that do. `--before` names another version of the
script, which takes part in every round.

Each run starts after a sync(2), from an empty directory or from one that holds 10,000 videos.
Afterwards every video is compared with what was served: a run that lost one ends the benchmark.
Wall time and peak memory are those of the client alone, from its start to its end.

Prints one Markdown table. Seconds are the median of the runs, with the range in brackets. Peak
memory is that of the worst run, in units of 1024² bytes. Exit status: 0, every limit is met;
1, one is missed, or a run failed; 2, bad command line; 130, interrupted.
"""

import argparse
import filecmp
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

SCRIPT = Path(__file__).resolve().parent.parent / "download_succeeded_videos.py"
PACKAGES = "python3-venv nginx-light libnginx-mod-http-echo ffmpeg openssl curl aria2 time"

# The benchmark runs in a work directory, and all paths below are relative to it.
SERVED = Path("served")
EMPTY_DIR = Path("videos")
CROWDED_DIR = Path("crowded")

# --- What nginx serves ------------------------------------------------------------------------

TLS = "https://localhost:18443"
PLAIN = "http://localhost:18080"
FIRST_BYTE_S = 0.150

# A link is /<kind>/<any name>.mp4 and leads to served/<kind>.mp4. The kind "slow" is the same
# video as "clip", with the delay before the first byte.
NGINX_CONF = f"""
load_module /usr/lib/nginx/modules/ngx_http_echo_module.so;
user root;  # the work directory is root's alone
worker_processes auto;
pid nginx.pid;
events {{}}
http {{
    access_log off;
    default_type video/mp4;
    sendfile on;
    server {{
        listen 127.0.0.1:18080;
        listen 127.0.0.1:18443 ssl;
        ssl_certificate cert.pem;
        ssl_certificate_key key.pem;
        root {SERVED};
        rewrite ^/(clip|large|slow|tiny)/ /$1.mp4;
        location = /slow.mp4 {{ echo_sleep {FIRST_BYTE_S}; echo_exec /clip.mp4; }}
    }}
}}
"""

# --- Who takes part ---------------------------------------------------------------------------

SEQUENTIAL_PY = """
import json, os, sys
import requests
_, results_file, output_dir = sys.argv
with open(results_file) as file:
    rows = json.load(file)["task_results"]
for row in rows:
    stem = os.path.join(output_dir, row["target_filename_stub"])
    if os.path.exists(stem + ".mp4") and os.path.exists(stem + ".json"):
        print(f"already exists: {stem}.mp4")
        continue
    response = requests.get(row["video_url"], stream=True, timeout=30)
    response.raise_for_status()
    with open(stem + ".mp4", "wb") as video:
        for chunk in response.iter_content(8192):
            video.write(chunk)
"""

CALLS_PY = """
import importlib, pathlib, sys
_, version, results_file, output_dir = sys.argv
downloader = importlib.import_module(version).VideoDownloader(output_dir=output_dir)
results = downloader.load_polling_results(pathlib.Path(results_file))
for task in downloader.get_succeeded_tasks(results):
    downloader.process_succeeded_task(task)
"""


@dataclass(frozen=True)
class Contender:
    """A program that downloads the videos of a row.

    ``command``: ``{directory}`` is where the videos go, ``{version}`` the module of the script.
    ``counts_once``: a run takes half a minute, so only one is made that counts.
    """

    command: str
    directory: Path = EMPTY_DIR
    version: str = "script"
    counts_once: bool = False

    @property
    def is_script(self) -> bool:
        return "{version}" in self.command


RUN_SCRIPT = (
    "venv/bin/python {version}.py --polling-results-file results.json --output-dir {directory}"
)
CALL_SCRIPT = "venv/bin/python calls.py {version} results.json {directory}"
RUN_SEQUENTIAL = "venv/bin/python sequential.py results.json {directory}"
CURL = "curl -sSf --cacert ca.pem --output-dir {directory} -K curl.config"
ARIA2C = "aria2c -q --file-allocation=none --ca-certificate=ca.pem -d {directory} -i aria2c.links"

CONTENDERS = {
    "script": Contender(RUN_SCRIPT),
    "script, all there": Contender(RUN_SCRIPT, CROWDED_DIR),
    "calls, empty directory": Contender(CALL_SCRIPT),
    "calls, 10,000 there": Contender(CALL_SCRIPT, CROWDED_DIR),
    "sequential": Contender(RUN_SEQUENTIAL, counts_once=True),
    "sequential, all there": Contender(RUN_SEQUENTIAL, CROWDED_DIR),
    "curl": Contender(CURL),
    "curl -Z": Contender(f"{CURL} -Z"),
    "curl -Z --parallel-max 16": Contender(f"{CURL} -Z --parallel-max 16"),
    "aria2c -j16": Contender(f"{ARIA2C} -j16"),
}
BEFORE = "the version before"

# --- What is measured -------------------------------------------------------------------------

NO_LIMIT = math.inf  # the figure is printed for information


@dataclass(frozen=True)
class Row:
    """A set of videos, who downloads them, and what the script may cost.

    ``numbers``: the numbers of the videos.
    ``script``: the contender that the limits are for; the others are its rivals.
    ``ratios``: by rival, the script's seconds divided by the rival's, at most.
    ``differences_s``: by rival, how many seconds more the script takes, at most.
    ``rounds``: how many times the script must wait for a first byte, however fast it is.
    ``beyond_rounds_s``: how many seconds more than these waits it takes, at most.
    ``peak_mb``: the script's peak memory, at most.
    """

    title: str
    numbers: range
    url: str
    script: str = "script"
    ratios: dict[str, float] = field(default_factory=dict)
    differences_s: dict[str, float] = field(default_factory=dict)
    rounds: int = 0
    beyond_rounds_s: float = NO_LIMIT
    peak_mb: float = NO_LIMIT

    @property
    def stubs(self) -> list[str]:
        """Names like Runway's ids; they serve as task ids, too."""
        return [f"{number:08x}-b639-4264-9bf2-fc7bceb6c658" for number in self.numbers]

    @property
    def needs_crowd(self) -> bool:
        return CONTENDERS[self.script].directory == CROWDED_DIR


CROWD = range(1_000_000, 1_010_000)

ROWS = {
    "videos": Row(
        "200 videos",
        range(200),
        f"{TLS}/slow",
        ratios={
            "curl -Z": 0.90,
            "curl -Z --parallel-max 16": 0.75,
            "aria2c -j16": 0.75,
            "sequential": 0.055,
        },
        rounds=7,  # of 32 workers
        beyond_rounds_s=0.8,
        peak_mb=80,
    ),
    "calls": Row(
        "61 calls of process_succeeded_task, 10,000 there",
        range(61),
        f"{TLS}/slow",
        script="calls, 10,000 there",
        ratios={"calls, empty directory": 1.2},
    ),
    "one": Row("one video", range(1), f"{TLS}/slow", differences_s={"curl": 0.25}),
    "night": Row("61 videos", range(61), f"{TLS}/slow", ratios={"curl -Z": 0.65}),
    "bare": Row(
        "400 videos, no latency", range(400), f"{TLS}/clip", ratios={"aria2c -j16": NO_LIMIT}
    ),
    "large": Row("1 GB, plain HTTP", range(1), f"{PLAIN}/large", ratios={"curl": NO_LIMIT}),
    "rerun": Row(
        "10,000 videos, all there",
        CROWD,
        f"{TLS}/tiny",
        script="script, all there",
        ratios={"sequential, all there": NO_LIMIT},
    ),
}


class BenchmarkError(Exception):
    """There is no figure to be had; the message says why."""


def run(command: str, env: dict[str, str] | None = None) -> str:
    """Run a command that must succeed; return all that it printed."""
    log_path = Path("output.log")
    with log_path.open("wb") as log:
        done = subprocess.run(
            command.split(), env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    output = log_path.read_text("utf-8", errors="replace")
    if done.returncode != 0:
        raise BenchmarkError(f"{command} exited with {done.returncode}: {output[-1000:]}")
    return output


# --- What is needed: packages, certificate, videos, links -------------------------------------


def install() -> None:
    """Install the Debian packages unless all are there, and a Python that has requests."""
    known = subprocess.run(("dpkg", "--status", *PACKAGES.split()), capture_output=True)
    if known.returncode != 0:
        run("apt-get update")
        run(f"apt-get install -y --no-install-recommends {PACKAGES}")
    run(f"{sys.executable} -m venv venv")
    run("venv/bin/pip install requests>=2.25.0")


def make_certificate() -> None:
    """Make a certificate for localhost, and certifi's CA bundle with it added."""
    names = "-subj /CN=localhost -addext subjectAltName=DNS:localhost"
    run(f"openssl req -x509 -newkey rsa:2048 -noenc -keyout key.pem -out cert.pem {names}")
    certifi_path = run("venv/bin/python -m certifi").strip()
    public = Path(certifi_path).read_text()
    own = Path("cert.pem").read_text()
    Path("ca.pem").write_text(public + own)


def make_videos() -> None:
    """Make an MP4 of the usual 0.9 MB, one of 1 GB that begins with it, and a tiny one."""
    SERVED.mkdir()
    clip = SERVED / "clip.mp4"
    picture = "testsrc2=size=1280x720:rate=24:duration=5,noise=alls=20:allf=t"
    codec = "-preset veryfast -pix_fmt yuv420p -b:v 1450k -maxrate 1450k -bufsize 1450k"
    run(f"ffmpeg -v error -f lavfi -i {picture} {codec} -movflags +faststart {clip}")

    megabyte = os.urandom(1_000_000)
    mdat_size = 16 + 1000 * len(megabyte)
    with (SERVED / "large.mp4").open("wb") as large:
        large.write(clip.read_bytes())
        large.write(b"\0\0\0\1mdat" + mdat_size.to_bytes(8, "big"))
        for _ in range(1000):
            large.write(megabyte)

    tiny = b"\0\0\0\x10ftypisom\0\0\2\0" + b"\0\0\0\x08mdat"
    (SERVED / "tiny.mp4").write_bytes(tiny)
    (SERVED / "slow.mp4").symlink_to("clip.mp4")


def write_links(row: Row) -> None:
    """Write what to download, for each contender in its own format."""
    results = []
    curl = ""
    aria2c = ""
    for stub in row.stubs:
        token = "e30.eyJleHAiOjQxMDI0NDQ4MDB9.c2ln"  # expires in the year 2100
        link = f"{row.url}/{stub}.mp4?_jwt={token}"
        task = {"task_id": stub, "target_filename_stub": stub, "video_url": link}
        results.append({**task, "final_status": "SUCCEEDED", "prompt": "soft focus transition"})
        curl += f'url = "{link}"\noutput = "{stub}.mp4"\n'
        aria2c += f"{link}\n out={stub}.mp4\n"
    Path("results.json").write_text(json.dumps({"task_results": results}, indent=2))
    Path("curl.config").write_text(curl)
    Path("aria2c.links").write_text(aria2c)


# --- Measuring --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one run cost: seconds, and peak resident memory in units of 1024² bytes."""

    wall_s: float
    peak_mb: float


def contenders_of(row: Row, has_before: bool) -> dict[str, Contender]:
    """Return who takes part, by name, in the order of their turns."""
    names = [row.script, *row.ratios, *row.differences_s]
    contenders = {name: CONTENDERS[name] for name in names}
    if has_before:
        contenders[BEFORE] = replace(CONTENDERS[row.script], version="before")
    return contenders


def measure(contender: Contender) -> Run:
    """Run a contender in a clean environment.

    On Linux a process's peak memory starts at that of the process which spawned it, across
    fork, vfork and exec alike. So time(1), which is small, spawns it, not this program.
    """
    command = contender.command.format(version=contender.version, directory=contender.directory)
    env = {
        "HOME": ".",
        "LANG": "C.UTF-8",
        "PATH": os.environ["PATH"],
        "REQUESTS_CA_BUNDLE": "ca.pem",
    }
    started_s = time.perf_counter()
    run(f"/usr/bin/time -q -f %M -o peak.kib {command}", env)
    wall_s = time.perf_counter() - started_s
    peak_kib = int(Path("peak.kib").read_text())
    return Run(wall_s, peak_kib / 1024)


def fill_crowded_dir() -> None:
    """Download the 10,000 videos that are there already in some rows."""
    CROWDED_DIR.mkdir()
    write_links(ROWS["rerun"])
    measure(CONTENDERS["script, all there"])


def clear(directory: Path, row: Row) -> None:
    """Remove what the last run left; the crowded directory keeps its 10,000 videos."""
    if directory == EMPTY_DIR:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
    elif row.numbers != CROWD:
        for stub in row.stubs:
            (directory / f"{stub}.mp4").unlink(missing_ok=True)
            (directory / f"{stub}.json").unlink(missing_ok=True)


def check_brought_home(row: Row, contender: Contender) -> None:
    """Refuse a run that did not bring home every video, and with the script its metadata."""
    kind = row.url.rpartition("/")[2]
    served = SERVED / f"{kind}.mp4"
    for stub in row.stubs:
        video = contender.directory / f"{stub}.mp4"
        if not video.is_file():
            raise BenchmarkError(f"{contender.command}: {video} is not there")
        if not filecmp.cmp(video, served, shallow=False):
            raise BenchmarkError(f"{contender.command}: {video} is not what was served")
        if contender.is_script and not video.with_suffix(".json").is_file():
            raise BenchmarkError(f"{contender.command}: {video} has no metadata")


def take_turns(row: Row, rounds: int, has_before: bool) -> dict[str, list[Run]]:
    """Run the contenders of a row in turn; return, by name, the runs that count."""
    write_links(row)
    contenders = contenders_of(row, has_before)
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            if contender.counts_once and number != 1:
                continue
            clear(contender.directory, row)
            os.sync()
            cost = measure(contender)
            check_brought_home(row, contender)
            print(f"{row.title}, round {number}: {name} {cost.wall_s:.3f} s", file=sys.stderr)
            if number > 0:
                runs[name].append(cost)
    return runs


# --- The table --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of the table: a figure of the script's, and the limit it must keep to."""

    work: str
    beside: str
    script: str
    rival: str
    figure: float
    unit: str
    at_most: float

    @property
    def verdict(self) -> str:
        if self.at_most == NO_LIMIT:
            return ""
        if self.figure <= self.at_most:
            return "met"
        return "MISSED"

    def __str__(self) -> str:
        figure = f"{self.figure:.3f} {self.unit}"
        at_most = f"{self.at_most:g} {self.unit}" if self.verdict else ""
        cells = [self.work, self.beside, self.script, self.rival, figure, at_most, self.verdict]
        return "| " + " | ".join(cells) + " |"


HEADING = """
| work | beside | script | rival | figure | at most | verdict |
|---|---|---|---|---|---|---|
""".strip()


def spread(runs: list[Run]) -> str:
    """Return the median of the seconds, and of several runs the least and the most."""
    seconds = [run.wall_s for run in runs]
    middle = f"{median(seconds):.3f}"
    if len(seconds) == 1:
        return middle
    return f"{middle} ({min(seconds):.3f} to {max(seconds):.3f})"


def compare(row: Row, runs: dict[str, list[Run]]) -> Iterator[Line]:
    """Yield the lines of the table for one row."""
    medians_s = {name: median(run.wall_s for run in counted) for name, counted in runs.items()}
    ours_s = medians_s[row.script]
    ours = spread(runs[row.script])

    for rival, at_most in row.ratios.items():
        ratio = ours_s / medians_s[rival]
        yield Line(row.title, rival, ours, spread(runs[rival]), ratio, "×", at_most)

    for rival, at_most in row.differences_s.items():
        more_s = ours_s - medians_s[rival]
        yield Line(row.title, rival, ours, spread(runs[rival]), more_s, "s more", at_most)

    if row.rounds > 0:
        floor = f"{row.rounds} rounds of {FIRST_BYTE_S * 1000:.0f} ms"
        more_s = ours_s - row.rounds * FIRST_BYTE_S
        yield Line(row.title, floor, ours, "", more_s, "s more", row.beyond_rounds_s)

    if row.peak_mb != NO_LIMIT:
        peak_mb = max(run.peak_mb for run in runs[row.script])
        yield Line(row.title, "peak memory", "", "", peak_mb, "MB", row.peak_mb)

    if BEFORE in runs:
        ratio = ours_s / medians_s[BEFORE]
        yield Line(row.title, BEFORE, ours, spread(runs[BEFORE]), ratio, "×", NO_LIMIT)


# --- The command line -------------------------------------------------------------------------


def benchmark(rows: list[Row], rounds: int, has_before: bool) -> bool:
    """Measure the rows and print the table; return whether every limit is met."""
    install()
    make_certificate()
    make_videos()
    Path("sequential.py").write_text(SEQUENTIAL_PY)
    Path("calls.py").write_text(CALLS_PY)
    Path("nginx.conf").write_text(NGINX_CONF)
    nginx = "nginx -e nginx.log -p . -c nginx.conf"

    lines: list[Line] = []
    run(nginx)  # returns once it listens
    try:
        if any(row.needs_crowd for row in rows):
            fill_crowded_dir()
        for row in rows:
            runs = take_turns(row, rounds, has_before)
            lines += compare(row, runs)
    finally:
        run(f"{nginx} -s stop")

    print(HEADING)
    for line in lines:
        print(line)
    return all(line.verdict != "MISSED" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the script against its rivals.")
    parser.add_argument("--runs", type=int, choices=range(1, 21), default=5, metavar="N")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--script", type=Path, default=SCRIPT, metavar="PATH")
    parser.add_argument("--before", type=Path, metavar="PATH", help="another version to measure")
    options = parser.parse_args()
    rows = [ROWS[name] for name in options.rows]
    has_before = options.before is not None

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or nginx would not be stopped
    try:
        # On a real disk: /tmp may be memory.
        with tempfile.TemporaryDirectory(dir="/var/tmp", ignore_cleanup_errors=True) as work:
            shutil.copy(options.script, Path(work, "script.py"))
            if has_before:
                shutil.copy(options.before, Path(work, "before.py"))
            os.chdir(work)
            return 0 if benchmark(rows, options.runs, has_before) else 1
    except (BenchmarkError, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
