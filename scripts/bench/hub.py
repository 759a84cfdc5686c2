"""How fast a run reads a source on the Hub, beside a plain download of the same files from the same server.

usage: scripts/bench/hub.py [--gb 1] [--work DIR] [--repeats 5] [--delay-ms 0]

The server of the tests, in a process of its own on the loopback address, serves a synthetic checkpoint. `plain` is
huggingface_hub's hf_hub_download, file by file, Xet off; `ours` is what quantize reads, through its read-ahead, with
nothing computed; `kept` is quantize's --keep-source, which writes and hashes too; `run` is a whole `quantize`, and
`near` the same from the folder, which tells what of its time and memory is the Hub's. Each in a fresh process, in turn.
--delay-ms: before each answer, as a network's way there and back.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from versions import versions

REPOSITORY = Path(__file__).resolve().parents[2]
KINDS = ("plain", "ours", "kept", "run", "near")


def serve(folder: Path, delay_s: float) -> None:
    """Until it is killed; the port goes to stdout."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from hub_server import HubServer

    server = HubServer(folder)

    def wait(name: str, begin: int, end: int) -> None:
        time.sleep(delay_s)

    server.fault = wait if delay_s else None
    print(server.endpoint, flush=True)
    server.serve_forever()


def plain(work: Path) -> tuple[float, int]:
    """Seconds and bytes of a download of all files."""
    from huggingface_hub import hf_hub_download, model_info
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    begin = time.perf_counter()
    files = [str(file.rfilename) for file in model_info("me/micro").siblings or []]
    size = sum(Path(hf_hub_download("me/micro", name, local_dir=work / "plain")).stat().st_size for name in files)
    return time.perf_counter() - begin, size


def ours(keep: Path | None) -> tuple[float, int]:
    """Seconds and bytes of what a data-free run reads."""
    from mimoquant.checkpoint.hub import opened
    from mimoquant.checkpoint.reader import CheckpointReader
    from mimoquant.machine.devices import make_engine
    from mimoquant.machine.overlap import read_ahead
    from mimoquant.planning.plan import make_plan
    from mimoquant.planning.recipe import load_recipe
    from mimoquant.run.deal import deal
    from mimoquant.run.loading import load
    from mimoquant.run.workshop import Workshop

    engine = make_engine("cpu")
    begin = time.perf_counter()
    with opened("hf://me/micro", keep) as place:
        plan = make_plan(place, load_recipe("mxfp4-rtn"))
        with CheckpointReader(plan.layout.index) as reader:
            for _ in read_ahead(load(Workshop(plan, reader, engine), deal(plan, (), 0, 1))):
                pass
            size = reader.bytes_read
    return time.perf_counter() - begin, size


def quantized(source: Path | str, out: Path) -> tuple[float, int]:
    """Seconds of a whole data-free run, and bytes of its source."""
    from mimoquant import api

    begin = time.perf_counter()
    document = api.quantize(source, "mxfp4-rtn", out, device="cpu")
    return time.perf_counter() - begin, document["source_bytes"]


def one(kind: str, work: Path) -> None:
    """Measure one kind in this process."""
    if kind in ("run", "near"):
        seconds, size = quantized("hf://me/micro" if kind == "run" else work.parent / "source", work / "out")
    else:
        seconds, size = plain(work) if kind == "plain" else ours(work / "kept" if kind == "kept" else None)
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    user = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    print(json.dumps({"seconds": seconds, "bytes": size, "peak": int(peak) * 1024, "user": user}))


def measured(kind: str, endpoint: str, work: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": f"{folder}/home"}
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            env.pop(name, None)
        command = [sys.executable, __file__, "--one", kind, "--work", folder]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(gigabytes: float, work: Path, repeats: int, delay_ms: float) -> None:
    from mimoquant.synthetic.checkpoint import SynthSizes, synth

    layers, expert = 4, 3 * 2048 * 1024
    experts = max(8, round(gigabytes * 1e9 / layers / expert))
    sizes = SynthSizes(layers=layers + 1, experts=experts, hidden=2048, expert_intermediate=1024)
    report = synth(work / "source", "v2.5", sizes=sizes)
    command = [sys.executable, __file__, "--serve", str(work / "source"), "--delay-ms", str(delay_ms)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        endpoint = server.stdout.readline().strip()
        try:
            runs = {kind: [measured(kind, endpoint, work)] for kind in KINDS}  # the first warms up, and is left out
            for _ in range(repeats):
                for kind in KINDS:
                    runs[kind].append(measured(kind, endpoint, work))
        finally:
            server.kill()
    size, cores = report.size_bytes / 1e9, os.cpu_count()
    print(f"{size:.2f} GB, {delay_ms:g} ms before an answer, {cores} cores, median of {repeats}")
    print(versions(("mimoquant", "huggingface_hub", "httpx")))
    print("\n| | MB/s (least to most) | to plain | user CPU | peak RSS |\n|---|---|---|---|---|")
    rates = {kind: [run["bytes"] / run["seconds"] / 1e6 for run in found[1:]] for kind, found in runs.items()}
    for kind, found in rates.items():
        median, peak = statistics.median(found), max(run["peak"] for run in runs[kind]) / 1e6
        ratio = median / statistics.median(rates["plain"])
        user = statistics.median(run["user"] for run in runs[kind][1:])
        told = f"{median:.0f} ({min(found):.0f} to {max(found):.0f}) | {ratio:.2f} | {user:.2f} s | {peak:.0f} MB |"
        print(f"| {kind} | {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, default=1)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--delay-ms", type=float, default=0)
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.delay_ms / 1e3)
    elif options.one:
        one(options.one, options.work)
    else:
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            compare(options.gb, Path(work), options.repeats, options.delay_ms)


if __name__ == "__main__":
    main()
