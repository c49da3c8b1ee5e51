#!/usr/bin/env python3
"""Measure download_succeeded_videos.py against the tools one would use instead.

    python3 .ci/benchmark.py [--runs N] [--rows ROW ...] [--script PATH]

Needs Debian; as root it installs what is missing of PACKAGES. A loopback nginx serves a real MP4
under as many links as there are videos. The script and the rivals that ROWS names take turns: a
round that does not count, then N (default 5) that do, each run after a sync(2) and, but for the
rerun, from an empty directory. Wall time and peak memory are those of the client alone. After
each run every video is compared with what was served; a run that lost one ends the benchmark.

Prints one Markdown table: wall times in seconds, the median and the range; peak memory in units
of 1024² bytes, the worst run. Exit status: 0, every limit met; 1, one missed, or no figure to be
had; 2, bad command line; 130, interrupted.
"""

import argparse
import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

SCRIPT = Path(__file__).resolve().parent.parent / "download_succeeded_videos.py"
PACKAGES = "python3-venv nginx-light libnginx-mod-http-echo ffmpeg openssl curl aria2 time"

# All else happens in a work directory, and all names are relative to it.
SERVED, VIDEOS = Path("served"), Path("videos")
TLS, PLAIN = "https://localhost:18443", "http://localhost:18080"
FIRST_BYTE_S = 0.150
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

# A contender's name is the word that finds its command here, and options to put behind that.
COMMANDS = {
    "script": "venv/bin/python script.py --polling-results-file results.json --output-dir videos",
    "sequential": "venv/bin/python sequential.py results.json videos",
    "curl": "curl -sSf --cacert ca.pem --output-dir videos -K curl.config",
    "aria2c": "aria2c -q --file-allocation=none --ca-certificate=ca.pem -d videos -i aria2c.links",
}
SEQUENTIAL = """
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


@dataclass(frozen=True)
class Row:
    """So many videos to fetch, and what the script may take for them.

    ``rivals``: by name, the most that the script's wall time may be of the rival's.
    ``limits``: the most that the script may take whoever else runs, in what the key says.
    ``rerun``: each run finds what the script brought home in the first round.
    """

    title: str
    count: int
    url: str
    rivals: dict[str, float]
    script: str = "script"
    limits: dict[str, float] = field(default_factory=dict)
    rerun: bool = False

    def stubs(self) -> list[str]:
        """Names like Runway's ids, which serve as task ids too."""
        return [f"{number:08x}-b639-4264-9bf2-fc7bceb6c658" for number in range(self.count)]


CURL16 = "curl -Z --parallel-max 16"
ROWS = {
    "videos": Row(
        "200 videos, 150 ms to the first byte",
        200,
        f"{TLS}/slow",
        {"curl -Z": 0.85, CURL16: 0.65, "aria2c -j16": 0.65, "sequential": 0.045},
        limits={"seconds": 7 * FIRST_BYTE_S + 0.7, "peak MB": 80},  # 32 workers need 7 rounds
    ),
    "workers16": Row("same, 16 workers", 200, f"{TLS}/slow", {CURL16: 0.95}, "script --workers 16"),
    "bare": Row("400 videos, no latency", 400, f"{TLS}/clip", {"aria2c -j16": 1.3}),
    "large": Row("1 GB, plain HTTP", 1, f"{PLAIN}/large", {"curl": 2.0}, limits={"peak MB": 64}),
    "rerun": Row("10,000 there already", 10_000, f"{TLS}/tiny", {"sequential": 1.5}, rerun=True),
}


class BenchmarkError(Exception):
    """No figure could be had; the message says why."""


@dataclass(frozen=True)
class Run:
    """What one run cost: seconds, and peak resident memory in units of 1024² bytes."""

    wall_s: float
    peak_mb: float


def run(command: str, env: dict[str, str] | None = None) -> str:
    """Run a command that must succeed; return all that it printed."""
    words, log_path = command.split(), Path("output.log")
    with log_path.open("wb") as log:
        done = subprocess.run(words, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
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
    public = Path(run("venv/bin/python -m certifi").strip()).read_text()
    Path("ca.pem").write_text(public + Path("cert.pem").read_text())


def make_videos() -> None:
    """Make an MP4 of the usual 0.9 MB, one of 1 GB that begins with it, and a tiny one."""
    SERVED.mkdir()
    clip = SERVED / "clip.mp4"
    picture = "testsrc2=size=1280x720:rate=24:duration=5,noise=alls=20:allf=t"
    codec = "-preset veryfast -pix_fmt yuv420p -b:v 1450k -maxrate 1450k -bufsize 1450k"
    run(f"ffmpeg -v error -f lavfi -i {picture} {codec} -movflags +faststart {clip}")
    (SERVED / "slow.mp4").symlink_to("clip.mp4")
    noise = os.urandom(1_000_000)
    with (SERVED / "large.mp4").open("wb") as large:
        large.write(clip.read_bytes() + b"\0\0\0\1mdat" + (1_000_000_016).to_bytes(8, "big"))
        large.writelines([noise] * 1000)
    (SERVED / "tiny.mp4").write_bytes(b"\0\0\0\x10ftypisom\0\0\2\0" + b"\0\0\0\x08mdat")


def write_links(row: Row) -> None:
    """Tell the script and its rivals, each in its own format, what to fetch."""
    token = "e30.eyJleHAiOjQxMDI0NDQ4MDB9.c2ln"  # expires in the year 2100
    links = {stub: f"{row.url}/{stub}.mp4?_jwt={token}" for stub in row.stubs()}
    common = {"final_status": "SUCCEEDED", "prompt": "soft focus transition, elegant reveal"}
    results = [
        {**common, "task_id": stub, "target_filename_stub": stub, "video_url": link}
        for stub, link in links.items()
    ]
    curl = [f'url = "{link}"\noutput = "{stub}.mp4"\n' for stub, link in links.items()]
    aria2c = [f"{link}\n out={stub}.mp4\n" for stub, link in links.items()]
    Path("results.json").write_text(json.dumps({"task_results": results}, indent=2))
    Path("curl.config").write_text("".join(curl))
    Path("aria2c.links").write_text("".join(aria2c))


# --- Measuring --------------------------------------------------------------------------------


def measure(contender: str) -> Run:
    """Run a contender in a clean environment.

    On Linux a process's peak memory starts at that of the process which spawned it, across
    fork, vfork and exec alike. So time(1), which is small, spawns it, not this program.
    """
    program, _, options = contender.partition(" ")
    command = f"/usr/bin/time -q -f %M -o peak.kib {COMMANDS[program]} {options}"
    clean = {"HOME": ".", "LANG": "C.UTF-8", "REQUESTS_CA_BUNDLE": "ca.pem"}
    started_s = time.perf_counter()
    run(command, {**clean, "PATH": os.environ["PATH"]})
    wall_s = time.perf_counter() - started_s
    return Run(wall_s, int(Path("peak.kib").read_text()) / 1024)


def check_brought_home(row: Row, contender: str) -> None:
    """Refuse a run that did not bring home every video, and with the script its metadata."""
    served = SERVED / f"{Path(row.url).name}.mp4"
    for stub in row.stubs():
        video = VIDEOS / f"{stub}.mp4"
        if not (video.is_file() and filecmp.cmp(video, served, shallow=False)):
            raise BenchmarkError(f"{contender}: {video} is not there, or not what was served")
        if contender == row.script and not video.with_suffix(".json").is_file():
            raise BenchmarkError(f"{contender}: {video} has no metadata")


def take_turns(row: Row, rounds: int) -> dict[str, list[Run]]:
    """Run the script and its rivals in turn; return, by name, the runs that count."""
    write_links(row)
    runs: dict[str, list[Run]] = {name: [] for name in (row.script, *row.rivals)}
    for number in range(rounds + 1):
        for name, counted in runs.items():
            if name == "sequential" and number != 1 and not row.rerun:
                continue  # half a minute: once is enough
            if not row.rerun or (number == 0 and name == row.script):
                shutil.rmtree(VIDEOS, ignore_errors=True)
                VIDEOS.mkdir()
            os.sync()
            cost = measure(name)
            check_brought_home(row, name)
            print(f"{row.title}, round {number}: {name} {cost.wall_s:.3f} s", file=sys.stderr)
            if number > 0:
                counted.append(cost)
    return runs


# --- The table --------------------------------------------------------------------------------


def spread(figures: list[float]) -> str:
    """Return the median, and of several figures the least and the most."""
    middle = f"{median(figures):.3f}"
    return middle if len(figures) == 1 else f"{middle} ({min(figures):.3f} to {max(figures):.3f})"


def judge(row: Row, runs: dict[str, list[Run]]) -> int:
    """Print the table's lines for ``row``; return how many of its limits are missed."""
    walls_s = {name: [run.wall_s for run in counted] for name, counted in runs.items()}
    worst_mb = max(run.peak_mb for run in runs[row.script])
    ours = {"seconds": walls_s[row.script], "peak MB": [worst_mb]}
    lines = [(name, ours["seconds"], walls_s[name], limit) for name, limit in row.rivals.items()]
    lines += [(figure, ours[figure], [limit], 1.0) for figure, limit in row.limits.items()]
    missed = 0
    for against, mine, theirs, limit in lines:
        ratio = median(mine) / median(theirs)
        missed += ratio > limit
        verdict = f"{ratio:.3f} | {limit:g} | {'MISSED' if ratio > limit else 'met'}"
        print(f"| {row.title} | {against} | {spread(mine)} | {spread(theirs)} | {verdict} |")
    return missed


# --- The command line -------------------------------------------------------------------------


def benchmark(names: list[str], rounds: int) -> int:
    """Measure the rows, print the table; return how many limits are missed."""
    install()
    make_certificate()
    make_videos()
    Path("sequential.py").write_text(SEQUENTIAL)
    Path("nginx.conf").write_text(NGINX_CONF)
    nginx = "nginx -e nginx.log -p . -c nginx.conf"
    run(nginx)  # returns once it listens
    try:
        measured = [(ROWS[name], take_turns(ROWS[name], rounds)) for name in names]
    finally:
        run(f"{nginx} -s stop")
    print("| work | against | script | other | ratio | limit | verdict |\n" + "|---" * 7 + "|")
    return sum(judge(row, runs) for row, runs in measured)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the script against its rivals.")
    parser.add_argument("--runs", type=int, choices=range(1, 21), default=5, metavar="N")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--script", type=Path, default=SCRIPT, metavar="PATH")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or nginx would not be stopped
    try:
        # On a real disk: /tmp may be memory.
        with tempfile.TemporaryDirectory(dir="/var/tmp", ignore_cleanup_errors=True) as work:
            shutil.copy(options.script, Path(work, "script.py"))
            os.chdir(work)
            return 1 if benchmark(options.rows, options.runs) else 0
    except (BenchmarkError, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
