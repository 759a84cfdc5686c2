#!/usr/bin/env python
"""Does another version of the program do the same? Every file and every document of every shipped recipe.

usage: PYTHONPATH=BEFORE scripts/stress/same_bytes.py [SOURCE ...] [--device cpu] --out before.json
       PYTHONPATH=AFTER scripts/stress/same_bytes.py [SOURCE ...] [--device cpu] --against before.json

Key idea: the program is called as a user calls it, `python -m mimoquant`, so PYTHONPATH says which checkout is asked.
Quantizes the micro checkpoint and each SOURCE by each shipped recipe (those that calibrate on few tokens), then keeps
the sha256 of each file, and what inspect, plan, quantize, verify and eval-kl print with --json. A refusal is kept as
its sentence. Left out are times, versions, what the machine is and has free, and the folders' own paths. One thread a
process, so that sums of float32 come in one order. Exits with 1 where anything differs, and says what.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

LEFT_OUT = {"version", "versions", "machine", "disk_free_bytes", "peak_rss_bytes", "bound_by"}
CALIBRATION = ("--sequences", "8", "--tokens", "64")
HELD_OUT = ("--sequences", "2", "--tokens", "32")


class Program:
    """The program of the checkout that PYTHONPATH names; `hidden`: paths → what stands for them in what is kept."""

    def __init__(self, device: str, hidden: dict[str, str]) -> None:
        self.device, self.hidden = device, hidden
        self.environment = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"} | os.environ

    def ask(self, *arguments: str) -> Any:
        """The document that a command line prints, or how it ends instead: its exit code and its sentences."""
        command = [sys.executable, "-m", "mimoquant", *arguments, "--json"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if done.returncode in (0, 5):
            return self.plain(json.loads(done.stdout))
        if done.returncode == 1:  # a bug, of the program or of its environment: nothing to compare with
            sys.exit(f"{' '.join(command)}\n{done.stderr}")
        said = [line for line in done.stderr.splitlines() if line.startswith(("error:", "hint:"))]
        return self.plain({"exit_code": done.returncode, "said": said})

    def plain(self, value: Any) -> Any:
        if isinstance(value, dict):
            kept = {key: inner for key, inner in value.items() if key not in LEFT_OUT and not key.endswith("_s")}
            return {self.plain(key): self.plain(inner) for key, inner in kept.items()}
        if isinstance(value, list):
            return [self.plain(inner) for inner in value]
        if isinstance(value, str):
            for path, name in self.hidden.items():
                value = value.replace(path, name)
        return value

    def evaluate(self, name: str) -> Any:
        """The value of a Python expression in the program's own process."""
        code = f"import json, mimoquant, mimoquant.shipped; print(json.dumps({name}))"
        return json.loads(subprocess.check_output([sys.executable, "-c", code], env=self.environment, text=True))


def of_recipe(program: Program, label: str, source: Path, recipe: str, out: Path) -> Iterator[tuple[str, Any]]:
    """(name, document or sha256) of all that one recipe makes of one source."""
    name, device = f"{label} {Path(recipe).stem}", ("--device", program.device)
    calibrates = Path(recipe).stem.startswith(("gptq", "awq"))
    making = ("-r", recipe, *device, *(CALIBRATION if calibrates else ()))
    yield f"{name} plan", program.ask("plan", str(source), *making)
    yield f"{name} quantize", program.ask("quantize", str(source), *making, "--out", str(out))
    if not out.is_dir():
        return
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        yield f"{name} {path.relative_to(out)}", hashlib.sha256(path.read_bytes()).hexdigest()
    yield f"{name} verify", program.ask("verify", str(out), "--source", str(source))
    yield f"{name} eval-kl", program.ask("eval-kl", str(source), str(out), *HELD_OUT, *device)


def differences(before: Any, after: Any, at: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            if key not in after or key not in before:
                yield f"{at}.{key}: is {'new' if key in after else 'gone'}"
            else:
                yield from differences(before[key], after[key], f"{at}.{key}")
    elif before != after:
        yield f"{at}: was {json.dumps(before)[:300]}, is {json.dumps(after)[:300]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="Recipes at once.")
    parser.add_argument("--recipe", action="append", default=[], help="A recipe file, beside the shipped ones.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--against", type=Path)
    options = parser.parse_args()
    program = Program(options.device, {})
    sources = {"micro": Path(program.evaluate("str(mimoquant.micro_checkpoint())"))}
    sources |= {path.name: path.resolve() for path in options.sources}
    program.hidden |= {str(path): f"SOURCE({label})" for label, path in sources.items()}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(options.jobs) as pool:
        program.hidden[str(Path(work).resolve())] = "WORK"
        runs = []
        for label, source in sources.items():
            found[f"{label} inspect"] = program.ask("inspect", str(source))
            for recipe in [*program.evaluate("list(mimoquant.shipped.shipped_recipes())"), *options.recipe]:
                out = Path(work) / f"{label}-{Path(recipe).stem}"
                runs.append(pool.submit(lambda *run: dict(of_recipe(program, *run)), label, source, recipe, out))
        for run in runs:
            found |= run.result()
    for name, value in found.items():
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        print(value if isinstance(value, str) else hashlib.sha256(text.encode()).hexdigest(), name)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if options.against:
        differ = list(differences(json.loads(options.against.read_text()), found, ""))
        print(*differ, f"{len(found)} compared, {len(differ)} differ", sep="\n", file=sys.stderr)
        sys.exit(bool(differ))


if __name__ == "__main__":
    main()
