#!/usr/bin/env python3
"""Measure download_succeeded_videos.py against the tools one would use instead.

One command, as root, on Debian 12 or later:

    python3 .ci/benchmark.py [--runs 5] [--rows videos,bare,large,rerun] [--no-install]

A loopback nginx (TLS, HTTP/1.1) serves one real MP4 under as many links as there are videos.
The script, with its default settings, and its rivals take turns: a round that does not count,
then --runs that do, each into an empty directory after a sync(2). Wall time, CPU time (user +
system) and peak memory are those of the client's process alone. After each run every video is
compared with what was served; a run that did not bring all of them home ends the benchmark.

Prints a Markdown table. Exit status: 0, every limit met; 1, a limit missed, or no figure to be
had; 2, bad command line; 130, interrupted.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "download_succeeded_videos.py"
PACKAGES = (
    *("nginx-light", "libnginx-mod-http-echo", "ffmpeg", "openssl"),
    *("curl", "aria2", "wget2"),
)

PARALLEL = 16
CURL_PARALLEL = f"-Z --parallel-max {PARALLEL}"
FIRST_BYTE_S = 0.150
FIRST_BYTE_SLACK_S = 0.030
CLIP_BYTES = range(850_000, 1_000_001)
LARGE_BYTES = 1_000_000_000
TINY_MP4 = b"\0\0\0\x10ftypisom\0\0\2\0" + b"\0\0\0\x08mdat"
MAX_FLOOR_MIB = 16.0
LINK_LIFE_S = 86_400

# On Linux a process's peak memory starts at that of the process which spawned it, across fork,
# vfork and exec alike. So a bare interpreter spawns what is measured, not this program.
# Arguments: the log for the command's output, then the command.
LAUNCHER = """
import os, sys, time
log, *command = sys.argv[1:]
to_log = [(os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
          (os.POSIX_SPAWN_DUP2, 1, 2)]
started = time.perf_counter()
child = os.posix_spawnp(command[0], command, os.environ, file_actions=to_log)
_, status, usage = os.wait4(child, 0)
wall = time.perf_counter() - started
print(os.waitstatus_to_exitcode(status), wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
"""

# The rivals written in Python. Arguments: the polling results file, the output directory.
SEQUENTIAL_LOOP = """
import json, sys
import requests
results_file, output_dir = sys.argv[1:]
with open(results_file) as file:
    rows = json.load(file)["task_results"]
for row in rows:
    response = requests.get(row["video_url"], stream=True, timeout=30)
    response.raise_for_status()
    with open(f"{output_dir}/{row['target_filename_stub']}.mp4", "wb") as video:
        for chunk in response.iter_content(8192):
            video.write(chunk)
"""
EXISTS_LOOP = """
import json, os, sys
results_file, output_dir = sys.argv[1:]
with open(results_file) as file:
    rows = json.load(file)["task_results"]
for row in rows:
    stem = os.path.join(output_dir, row["target_filename_stub"])
    if not (os.path.exists(stem + ".mp4") and os.path.exists(stem + ".json")):
        sys.exit(f"missing: {stem}")
    print(f"already exists: {stem}.mp4")
"""

NGINX_CONF = """
load_module /usr/lib/nginx/modules/ngx_http_echo_module.so;
user root;  # the served directory is root's alone
worker_processes auto;
pid {work}/nginx.pid;
error_log {work}/nginx.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    sendfile on;
    keepalive_requests 1000000;
    default_type video/mp4;
    root {work}/served;
    server {{
        listen 127.0.0.1:{tls_port} ssl;
        ssl_certificate {work}/cert.pem;
        ssl_certificate_key {work}/key.pem;
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_session_cache shared:tls:10m;
        location / {{ internal; }}
        location /slow/ {{ echo_sleep {first_byte_s}; echo_exec /clip.mp4; }}
        location /fast/ {{ rewrite ^ /clip.mp4 last; }}
        location /tiny/ {{ rewrite ^ /tiny.mp4 last; }}
    }}
    server {{
        listen 127.0.0.1:{plain_port};
        location / {{ internal; }}
        location /large/ {{ rewrite ^ /large.mp4 last; }}
    }}
}}
"""


class BenchmarkError(Exception):
    """No figure could be had; the message says why."""


@dataclass(frozen=True)
class Bench:
    """What all rows share; ``served`` is the server's root."""

    work: Path
    served: Path
    script: Path
    python: str
    ca_bundle: Path
    tls_url: str
    plain_url: str


@dataclass(frozen=True)
class Job:
    """Work to be done: bring ``<stub>.mp4`` home for every stub, from its link."""

    bench: Bench
    title: str
    links: dict[str, str]
    fingerprint: tuple[int, str]  # of the one file behind all links
    directory: Path
    results_file: Path
    output_dir: Path


@dataclass(frozen=True)
class Contender:
    """A command that does a job: the script, or a rival of it."""

    name: str
    command: tuple[str, ...]
    max_runs: int | None = None  # for the slow: so many runs, and no warm-up


@dataclass(frozen=True)
class Row:
    """A job, and what the script is measured against there.

    A limit is of the script's figure over the other; None: to know, not to judge.
    """

    job: Job
    rivals: tuple[tuple[Contender, float | None], ...]
    wall_goal: tuple[str, float, float] | None = None  # name, seconds, limit
    peak_limit_mib: float | None = None
    starts_empty: bool = True  # False: each run finds what the script's warm-up brought home


@dataclass(frozen=True)
class Measurement:
    """What one run cost: wall and CPU seconds, peak resident memory in MiB."""

    wall_s: float
    cpu_s: float
    peak_mib: float


Measurements = Sequence[Measurement]


@dataclass(frozen=True)
class Verdict:
    """One comparison: a line of the table."""

    cells: tuple[str, ...]
    met: bool


# --- What is needed -----------------------------------------------------------------------------


def run_tool(*command: str) -> str:
    """Run a command that must succeed; return all that it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr or done.stdout).strip()[-500:]
        raise BenchmarkError(f"{command[0]} exited with {done.returncode}: {reason}")
    return done.stdout + done.stderr


def install_packages() -> None:
    """Install the Debian packages, unless all of them are there."""
    asked = subprocess.run(("dpkg", "--status", *PACKAGES), capture_output=True, check=False)
    if asked.returncode != 0:
        run_tool("apt-get", "update")
        run_tool("apt-get", "install", "-y", "--no-install-recommends", *PACKAGES)


def make_interpreter(work: Path) -> str:
    """Return the Python of a fresh virtual environment that has requests."""
    run_tool(sys.executable, "-m", "venv", str(work / "venv"))
    python = str(work / "venv/bin/python")
    run_tool(python, "-m", "pip", "install", "--quiet", "requests>=2.25.0")
    return python


def fingerprint(path: Path) -> tuple[int, str]:
    """Return a file's size in bytes and its SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return path.stat().st_size, digest.hexdigest()


def make_clip(path: Path) -> None:
    """Encode five noisy seconds at a constant bit rate: an MP4 of the usual 0.9 MB."""
    picture = "testsrc2=size=1280x720:rate=24:duration=5,noise=alls=20:allf=t"
    rate = "-b:v 1450k -minrate 1450k -maxrate 1450k -bufsize 1450k -x264-params nal-hrd=cbr"
    codec = f"-c:v libx264 -preset veryfast -pix_fmt yuv420p {rate} -movflags +faststart"
    run_tool("ffmpeg", "-v", "error", "-f", "lavfi", "-i", picture, *codec.split(), str(path))
    if path.stat().st_size not in CLIP_BYTES:
        raise BenchmarkError(f"the test video has {path.stat().st_size} bytes, not 0.9 MB")


def make_large(clip: Path, path: Path) -> None:
    """Write a whole MP4 of 1 GB: the clip, then one mdat box with a 64-bit size."""
    mdat_bytes = LARGE_BYTES - clip.stat().st_size
    noise = random.Random(1).randbytes(1 << 20)
    with path.open("wb") as file:
        file.write(clip.read_bytes())
        file.write((1).to_bytes(4, "big") + b"mdat" + mdat_bytes.to_bytes(8, "big"))
        while left := LARGE_BYTES - file.tell():
            file.write(noise[:left])


# --- The server ---------------------------------------------------------------------------------


def make_ca_bundle(work: Path, python: str) -> Path:
    """Make a certificate for localhost; return certifi's CA bundle with it added."""
    key = ("-newkey", "rsa:2048", "-noenc", "-keyout", str(work / "key.pem"))
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    usage = ("-days", "2", "-addext", "keyUsage=digitalSignature,keyCertSign")
    run_tool("openssl", "req", "-x509", *key, *names, *usage, "-out", str(work / "cert.pem"))
    public = run_tool(python, "-c", "import certifi; print(certifi.contents())")
    bundle = work / "ca-bundle.pem"
    bundle.write_text(public + (work / "cert.pem").read_text())
    return bundle


def free_port() -> int:
    """Return a port of the loopback address that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def nginx(work: Path) -> Iterator[tuple[str, str]]:
    """Serve while the block runs; yield the TLS and the plain base URL."""
    tls_port, plain_port = free_port(), free_port()
    conf = NGINX_CONF.format(
        work=work,
        tls_port=tls_port,
        plain_port=plain_port,
        first_byte_s=FIRST_BYTE_S,
    )
    (work / "nginx.conf").write_text(conf)
    command = ("nginx", "-e", f"{work}/nginx.log", "-c", f"{work}/nginx.conf")
    run_tool(*command)  # returns once it listens
    try:
        yield f"https://localhost:{tls_port}", f"http://localhost:{plain_port}"
    finally:
        run_tool(*command, "-s", "stop")
        while (work / "nginx.pid").exists():  # the last thing that it removes
            time.sleep(0.01)


def check_first_byte(bench: Bench) -> None:
    """Refuse a server without the claimed latency, on a new and on a kept-alive connection."""
    report = r"%{num_connects} %{time_pretransfer} %{time_starttransfer}\n"
    twice = ("-o", os.devnull, f"{bench.tls_url}/slow/probe.mp4") * 2
    printed = run_tool("curl", "-sSf", "--cacert", str(bench.ca_bundle), "-w", report, *twice)
    first, second = (line.split() for line in printed.splitlines())
    if (first[0], second[0]) != ("1", "0"):
        raise BenchmarkError(f"the server does not keep connections alive: {printed!r}")
    for _, request_sent_s, first_byte_s in (first, second):
        wait_s = float(first_byte_s) - float(request_sent_s)
        if not FIRST_BYTE_S <= wait_s < FIRST_BYTE_S + FIRST_BYTE_SLACK_S:
            raise BenchmarkError(f"the first byte takes {wait_s:.3f} s")


# --- The jobs, and who does them ----------------------------------------------------------------


def signed_query() -> str:
    """Return a query like that of Runway's links: a token that has not expired."""
    header, payload = {"alg": "HS256", "typ": "JWT"}, {"exp": int(time.time()) + LINK_LIFE_S}
    parts = (json.dumps(header).encode(), json.dumps(payload).encode(), bytes(32))
    encoded = [base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts]
    return f"_jwt={'.'.join(encoded)}"


def result_row(stub: str, link: str) -> dict[str, str]:
    """Return a row of the polling results, with the fields that the poller writes."""
    return {
        "task_id": stub,
        "image_path": f"video_queue/{stub}_draft.png",
        "prompt": "soft focus transition, elegant reveal, smooth camera motion",
        "target_filename_stub": stub,
        "timestamp": "2025-06-17T03:48:46.656953",
        "status": "PENDING",
        "final_status": "SUCCEEDED",
        "completion_time": "2025-06-17T04:00:58.870095",
        "video_url": link,
    }


def make_job(bench: Bench, title: str, served: str, base_url: str, count: int) -> Job:
    """Write the polling results for so many videos, each with a link of its own."""
    query = signed_query()
    stubs = [str(uuid.uuid5(uuid.NAMESPACE_URL, f"{base_url}/{n}")) for n in range(count)]
    links = {stub: f"{base_url}/{stub}.mp4?{query}" for stub in stubs}
    directory = Path(tempfile.mkdtemp(dir=bench.work))
    results_file = directory / "runway_polling_results_20250617_040158.json"
    rows = [result_row(stub, link) for stub, link in links.items()]
    results_file.write_text(json.dumps({"task_results": rows}, indent=2))
    output_dir = directory / "videos"
    output_dir.mkdir()
    served_as = fingerprint(bench.served / served)
    return Job(bench, title, links, served_as, directory, results_file, output_dir)


def the_script(job: Job) -> Contender:
    """Return the script, told what to read and where to write, and nothing else."""
    files = ("--polling-results-file", str(job.results_file), "--output-dir", str(job.output_dir))
    return Contender("the script", (job.bench.python, str(job.bench.script), *files))


def python_loop(job: Job, program: str, name: str, max_runs: int | None = None) -> Contender:
    """Return a rival given as source text, run by the script's interpreter."""
    path = job.directory / "rival.py"
    path.write_text(program)
    command = (job.bench.python, str(path), str(job.results_file), str(job.output_dir))
    return Contender(name, command, max_runs)


def tool(job: Job, name: str, options: Sequence[str], links: str) -> Contender:
    """Return a tool, started as its name says; its last option takes the file of links."""
    path = job.directory / f"{name.split(maxsplit=1)[0]}.links"
    path.write_text(links)
    return Contender(name, (*name.split(), *options, str(path)))


def curl(job: Job, options: str = "") -> Contender:
    """Return curl, quiet, with the links and file names in a config file."""
    lines = [f'url = "{link}"\noutput = "{stub}.mp4"\n' for stub, link in job.links.items()]
    quiet = ("-sSf", "--no-progress-meter", "--cacert", str(job.bench.ca_bundle))
    files = ("--output-dir", str(job.output_dir), "-K")
    return tool(job, f"curl {options}".strip(), (*quiet, *files), "".join(lines))


def aria2c(job: Job) -> Contender:
    """Return aria2c, quiet, not allocating ahead, one connection per video (its default)."""
    lines = [f"{link}\n out={stub}.mp4\n" for stub, link in job.links.items()]
    quiet = ("--quiet", "--console-log-level=error", "--file-allocation=none")
    files = (f"--ca-certificate={job.bench.ca_bundle}", "-d", str(job.output_dir), "-i")
    return tool(job, f"aria2c -j{PARALLEL}", (*quiet, *files), "".join(lines))


def wget2(job: Job) -> Contender:
    """Return wget2, quiet; it makes the folders of the links' paths in the output directory."""
    options = ("--quiet", "--cut-file-get-vars", f"--ca-certificate={job.bench.ca_bundle}")
    files = ("-P", str(job.output_dir), "-i")
    name = f"wget2 --max-threads={PARALLEL}"
    return tool(job, name, (*options, *files), "\n".join(job.links.values()))


def videos_row(bench: Bench) -> Row:
    """Set up the usual work: small videos from far away."""
    url = f"{bench.tls_url}/slow"
    job = make_job(bench, "200 videos, 150 ms to the first byte", "clip.mp4", url, 200)
    rivals = (
        (curl(job, CURL_PARALLEL), 0.95),
        (aria2c(job), 0.75),
        (python_loop(job, SEQUENTIAL_LOOP, "sequential requests.get", max_runs=2), 0.075),
        (wget2(job), None),
    )
    return Row(job, rivals, wall_goal=("200 / 16 x 150 ms", 200 / PARALLEL * FIRST_BYTE_S, 1.4))


def bare_row(bench: Bench) -> Row:
    """Set up small videos from nearby, where the client's own work is what counts."""
    url = f"{bench.tls_url}/fast"
    job = make_job(bench, "400 videos, no latency", "clip.mp4", url, 400)
    return Row(job, ((aria2c(job), 1.1), (curl(job, CURL_PARALLEL), None)))


def large_row(bench: Bench) -> Row:
    """Set up one large video."""
    make_large(bench.served / "clip.mp4", bench.served / "large.mp4")
    job = make_job(bench, "1 GB, plain HTTP", "large.mp4", f"{bench.plain_url}/large", 1)
    return Row(job, ((curl(job), 1.75),), peak_limit_mib=64.0)


def rerun_row(bench: Bench) -> Row:
    """Set up a rerun: in its warm-up the script brings everything home, later nothing is left."""
    (bench.served / "tiny.mp4").write_bytes(TINY_MP4)
    url = f"{bench.tls_url}/tiny"
    job = make_job(bench, "rerun, 10,000 videos there already", "tiny.mp4", url, 10_000)
    loop = python_loop(job, EXISTS_LOOP, "bare loop of exists-checks")
    return Row(job, ((loop, 2.5),), starts_empty=False)


ROWS = {"videos": videos_row, "bare": bare_row, "large": large_row, "rerun": rerun_row}


# --- Measuring ----------------------------------------------------------------------------------


def launch(command: Sequence[str], directory: Path, ca_bundle: Path) -> Measurement:
    """Run a command in a clean environment, its output in a file, and measure it."""
    log = directory / "output.log"
    env = {"PATH": os.environ["PATH"], "HOME": str(directory), "LANG": "C.UTF-8"}
    done = subprocess.run(
        (sys.executable, "-I", "-S", "-c", LAUNCHER, str(log), *command),
        cwd=directory,
        env={**env, "REQUESTS_CA_BUNDLE": str(ca_bundle)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BenchmarkError(f"{command[0]} could not be started")
    code, wall_s, cpu_s, peak_kib = done.stdout.split()
    if code != "0":
        tail = log.read_text(errors="replace")[-1000:]
        raise BenchmarkError(f"{' '.join(command)} exited with {code}; its output ends: {tail}")
    return Measurement(float(wall_s), float(cpu_s), int(peak_kib) / 1024)


def memory_floor_mib(bench: Bench) -> float:
    """Return the smallest peak that can be measured; refuse if that is large."""
    floor_mib = launch(("true",), bench.work, bench.ca_bundle).peak_mib
    if floor_mib > MAX_FLOOR_MIB:
        raise BenchmarkError(f"true(1) seems to need {floor_mib:.1f} MB of memory")
    return floor_mib


def metadata_fingerprint(path: Path) -> tuple[int, str]:
    """Return the size in bytes and the SHA-256 that the metadata gives for its video."""
    try:
        file_info = json.loads(path.read_text("utf-8"))["file_info"]
        return file_info["size_bytes"], file_info["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise BenchmarkError(f"the metadata {path.name} cannot be used: {error!r}") from error


def check_brought_home(job: Job, who: str, with_metadata: bool) -> None:
    """Refuse a run whose videos (and their metadata) are not just those asked for."""
    found = {path.stem: path for path in job.output_dir.rglob("*.mp4")}
    if found.keys() != job.links.keys():
        raise BenchmarkError(f"{who}: {len(found)} videos, not the {len(job.links)} asked for")
    for path in found.values():
        if fingerprint(path) != job.fingerprint:
            raise BenchmarkError(f"{who}: {path.name} differs from what was served")
        if with_metadata and metadata_fingerprint(path.with_suffix(".json")) != job.fingerprint:
            raise BenchmarkError(f"{who}: the metadata of {path.name} says something else")


def measure_row(row: Row, runs: int) -> list[Verdict]:
    """Let the script and its rivals take turns, turn 0 to warm up, and compare them."""
    job, script = row.job, the_script(row.job)
    contenders = (script, *(rival for rival, _ in row.rivals))
    measured: dict[Contender, list[Measurement]] = {}
    for turn in range(runs + 1):
        for contender in contenders:
            if contender.max_runs is not None and not 1 <= turn <= contender.max_runs:
                continue
            if row.starts_empty:
                shutil.rmtree(job.output_dir)
                job.output_dir.mkdir()
            os.sync()
            run = launch(contender.command, job.directory, job.bench.ca_bundle)
            check_brought_home(job, contender.name, with_metadata=contender is script)
            progress = f"{job.title}, run {turn} of {runs}: {contender.name} {run.wall_s:.3f} s"
            print(progress, file=sys.stderr)
            if turn:
                measured.setdefault(contender, []).append(run)
    ours = measured[script]
    pairs = [(rival.name, measured[rival], limit) for rival, limit in row.rivals]
    return [compare(job.title, ours, *pair) for pair in pairs] + compare_with_goals(row, ours)


# --- Reporting ----------------------------------------------------------------------------------


def median_wall_s(runs: Measurements) -> float:
    """Return the median of the wall times."""
    return statistics.median(run.wall_s for run in runs)


def show_wall(runs: Measurements) -> str:
    """Return the median wall time with the least and the most."""
    walls_s = sorted(run.wall_s for run in runs)
    return f"{median_wall_s(runs):.3f} ({walls_s[0]:.3f} to {walls_s[-1]:.3f})"


def verdict(cells: Sequence[str], ratio: float, limit: float | None, *costs: str) -> Verdict:
    """Judge one ratio, and make its line of the table."""
    met = limit is None or ratio <= limit
    judged = ("-", "-") if limit is None else (f"{limit:g}", "yes" if met else "**NO**")
    return Verdict((*cells, f"{ratio:.3f}", *judged, *costs), met)


def compare(
    title: str, ours: Measurements, rival: str, theirs: Measurements, limit: float | None
) -> Verdict:
    """Compare the script with a rival by their median wall times."""
    cpu_s, rival_cpu_s = (statistics.median(r.cpu_s for r in runs) for runs in (ours, theirs))
    peak_mib, rival_peak_mib = (max(r.peak_mib for r in runs) for runs in (ours, theirs))
    return verdict(
        (title, rival, show_wall(ours), show_wall(theirs)),
        median_wall_s(ours) / median_wall_s(theirs),
        limit,
        f"{cpu_s:.2f} / {rival_cpu_s:.2f}",
        f"{peak_mib:.0f} / {rival_peak_mib:.0f}",
    )


def compare_with_goals(row: Row, ours: Measurements) -> list[Verdict]:
    """Compare the script with the figures that a row sets, if it does."""
    title, verdicts = row.job.title, []
    if row.wall_goal:
        name, goal_s, limit = row.wall_goal
        cells = (title, name, show_wall(ours), f"{goal_s:.3f}")
        verdicts.append(verdict(cells, median_wall_s(ours) / goal_s, limit, "", ""))
    if row.peak_limit_mib:
        worst_mib = max(run.peak_mib for run in ours)
        cells = (title, "peak memory", f"{worst_mib:.1f} MB", f"{row.peak_limit_mib:.1f} MB")
        verdicts.append(verdict(cells, worst_mib / row.peak_limit_mib, 1.0, "", ""))
    return verdicts


def machine_line(bench: Bench) -> str:
    """Return one line on the machine and the versions of all that take part."""
    ask = "import platform, requests as r; print(platform.python_version(), r.__version__)"
    python, requests = run_tool(bench.python, "-c", ask).split()
    versions = [f"Python {python}", f"requests {requests}"]
    for tool, option in (("curl", "-V"), ("aria2c", "-v"), ("wget2", "-V"), ("nginx", "-v")):
        number = re.search(r"\d+(\.\d+)+", run_tool(tool, option))
        versions.append(f"{tool} {number[0] if number else '?'}")
    machine = f"{os.cpu_count()} cores (load {os.getloadavg()[0]:.1f}), Linux {platform.release()}"
    clip_bytes = (bench.served / "clip.mp4").stat().st_size
    floor = f"memory can be measured from {memory_floor_mib(bench):.0f} MB up"
    return f"{machine}, {', '.join(versions)}; the video has {clip_bytes} bytes; {floor}"


def markdown(verdicts: Sequence[Verdict]) -> str:
    """Return the table: medians, but of peak memory (in MiB) the worst."""
    judged = ("work", "rival", "script, s", "rival, s", "ratio", "limit", "met")
    columns = (*judged, "CPU s, script / rival", "peak MB, script / rival")
    lines = [columns, ("---",) * len(columns), *(verdict.cells for verdict in verdicts)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# --- The command line ---------------------------------------------------------------------------


def row_names(text: str) -> list[str]:
    """Parse --rows."""
    names = text.split(",")
    if unknown := set(names) - set(ROWS):
        raise argparse.ArgumentTypeError(f"no such row: {', '.join(sorted(unknown))}")
    return names


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure the script against its rivals.")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each (5)")
    parser.add_argument("--rows", type=row_names, default=list(ROWS), help=",".join(ROWS))
    parser.add_argument("--script", type=Path, default=SCRIPT, help="what to measure")
    parser.add_argument("--work", default="/var/tmp", help="where on a real disk (/var/tmp)")
    parser.add_argument("--no-install", action="store_true", help="use this Python as it is")
    options = parser.parse_args(argv)
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    return options


def benchmark(options: argparse.Namespace, work: Path) -> list[Verdict]:
    """Prepare everything in the work directory, and measure the chosen rows."""
    script = Path(options.script).resolve()
    if not script.is_file():
        raise BenchmarkError(f"there is no {script}")
    if not options.no_install:
        install_packages()
    python = sys.executable if options.no_install else make_interpreter(work)
    served = work / "served"
    served.mkdir()
    make_clip(served / "clip.mp4")
    ca_bundle = make_ca_bundle(work, python)
    with nginx(work) as (tls_url, plain_url):
        bench = Bench(work, served, script, python, ca_bundle, tls_url, plain_url)
        check_first_byte(bench)
        print(machine_line(bench), end="\n\n", flush=True)
        rows = (ROWS[name](bench) for name in options.rows)
        return [verdict for row in rows for verdict in measure_row(row, options.runs)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = parse_arguments(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or nginx would not be stopped
    try:
        with tempfile.TemporaryDirectory(dir=options.work, ignore_cleanup_errors=True) as work:
            verdicts = benchmark(options, Path(work))
    except (BenchmarkError, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(markdown(verdicts))
    return 0 if all(verdict.met for verdict in verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
