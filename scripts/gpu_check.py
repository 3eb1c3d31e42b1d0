#!/usr/bin/env python3
"""Runs the CUDA tests and benches of scripts/gpu_pack.sh on this machine's GPU, and writes one JSON record of what came out.

usage: gpu_check.py [--out RECORD.json] [--no-sanitizer] [--no-bench] [--bench PART ...] [--seconds N]

The record goes to benches/records/<device>/<date>-<commit>.json in the repository. Needs Python 3.9 and an NVIDIA driver; compute-sanitizer
is used where it is found (PATH, CUDA_HOME, /usr/local/cuda). Exit code 0: every test passed, and every run of the sanitizer that came to
its end was clean (the last line tells how many did); 1 otherwise.
"""
import argparse
import datetime
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
# Kernel families: a bench executable each, and a module of tests in `ops`.
FAMILIES = ["swiglu", "rmsnorm", "rope", "embedding", "cross_entropy", "sampling", "adamw", "perturb", "gemm", "attention"]
# The kernels' own tests, and those of the engine on them.
SUITES = ["ops", "cuda", "cuda_graphs"]
TOOLS = ["memcheck", "racecheck", "synccheck", "initcheck"]
# Of `ops`: not the CPU's, and of the stand-in's devices, for all of which the GPU stands, one with f32 and one with bf16 state.
ONE_GPU = [part for skipped in ["::cpu::", "determinism::", "cuda_2::", "cuda_3::", "gpu_2::", "gpu_3::"] for part in ("--skip", skipped)]
# Under a sanitizer, ten to a hundred times slower, the f32 state alone.
SANITIZED = [*ONE_GPU, "--skip", "cuda_1::", "--skip", "gpu_1::"]


def run(command, seconds, **environment):
    """Exit code, output and seconds of a command; its code is None where it took too long."""
    started = time.time()
    try:
        done = subprocess.run(command, cwd=HERE, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, errors="replace", timeout=max(1, seconds))
        code, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        code, text = None, late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
    except OSError as error:
        code, text = 127, str(error)
    return code, text, round(time.time() - started, 2)


def device():
    fields = ["name", "driver_version", "compute_cap", "memory.total", "clocks.sm", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu"]
    code, text, _ = run(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"], 30)
    values = [value.strip() for value in text.strip().splitlines()[0].split(",")] if code == 0 and text.strip() else []
    return dict(zip(fields, values)) or {"error": text.strip()}


def tests(name, filters, seconds):
    """Each test of an executable on the GPU: ok, failed or missing, with what a failed one printed."""
    command = [str(HERE / name), "--test-threads", "2", *filters]
    code, text, took = run(command, seconds, SWAT_TEST_CUDA="gpu", RUST_BACKTRACE="0")
    found = {test: {"ok": "ok", "FAILED": "failed"}.get(result, result) for test, result in re.findall(r"^test (\S+) \.\.\. (\w+)", text, re.M)}
    failures = dict(re.findall(r"^---- (\S+) stdout ----\n(.*?)(?=\n---- |\nfailures:|\Z)", text, re.M | re.S))
    entry = {"seconds": took, "exit": code, "passed": sum(r == "ok" for r in found.values()), "tests": found}
    if code != 0:
        entry["failures"] = {test: said[-1500:] for test, said in failures.items()}
        entry["tail"] = text[-3000:]
    return entry


def sanitizer():
    places = [shutil.which("compute-sanitizer")]
    places += [f"{home}/bin/compute-sanitizer" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return next((place for place in places if place and os.path.exists(place)), None)


def sanitized(tool_path, deadline):
    """Each tool over each family's tests: clean or its findings; in words, why it did not run to its end."""
    results = {}
    for tool in TOOLS:
        results[tool] = {}
        for family in FAMILIES:
            left = deadline - time.time()
            if left < 10:
                results[tool][family] = "no time left"
                continue
            command = [tool_path, "--tool", tool, "--error-exitcode", "86", "--print-limit", "5", str(HERE / "ops"), "--test-threads", "1", f"{family}::", *SANITIZED]
            code, text, took = run(command, min(left, 120), SWAT_TEST_CUDA="gpu")
            if code is None:
                results[tool][family] = "took too long"
                continue
            summary = re.findall(r"ERROR SUMMARY: (.*)|RACECHECK SUMMARY: (.*)", text)
            summary = next(filter(None, summary[-1]), "") if summary else text[-400:]
            # A filter that meets no test must not look like one that met no mistake.
            clean = code == 0 and re.search(r"test result: ok\. [1-9]", text) is not None
            results[tool][family] = {"clean": clean, "seconds": took, "summary": summary}
            if not clean:
                results[tool][family]["tail"] = text[-2000:]
    return results


def benches(parts, seconds):
    """The JSON lines of each family's bench, and its exit code. A family gets its share of the time that is left; one that takes longer
    keeps what it had measured."""
    ends = time.time() + seconds
    results, exits = [], {}
    for i, family in enumerate(FAMILIES):
        left = (ends - time.time()) / (len(FAMILIES) - i)
        if left < 2:
            exits[family] = "no time left"
            continue
        code, text, _ = run([str(HERE / "bench" / family), "--bench", "--json", *parts], left)
        exits[family] = "took too long" if code is None else code
        for line in text.splitlines():
            try:
                results += [json.loads(line)] if line.startswith("{") else []
            except json.JSONDecodeError:
                exits[family] = f"cut off: {line[:80]}"
        if code:
            exits[family] = {"exit": code, "tail": text[-2000:]}
    return {"seconds": round(time.time() - ends + seconds, 2), "exit": exits, "results": results}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "record.json")
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--no-bench", action="store_true")
    parser.add_argument("--bench", nargs="+", default=[], metavar="PART", help="parts of bench ids to choose by, such as qwen2.5-7b")
    parser.add_argument("--bench-seconds", type=float, default=180, help="for all families together")
    parser.add_argument("--seconds", type=float, default=540, help="for all of it; what does not fit is left out, by name")
    options = parser.parse_args()
    deadline = time.time() + options.seconds
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": (HERE / "commit").read_text().strip(),
        "command": "gpu_check.py " + " ".join(sys.argv[1:]),
        "device": device(),
    }

    def save():
        partial = options.out.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(partial, options.out)

    save()
    code, text, _ = run([str(HERE / "swat"), "doctor", "--json"], 60)
    record["doctor"] = json.loads(text) if code == 0 else {"error": text[-2000:]}
    record["ops"] = tests("ops", ONE_GPU, min(240, deadline - time.time()))
    for suite in SUITES[1:]:
        record[suite] = tests(suite, [], min(120, deadline - time.time()))
    save()
    if not options.no_bench:
        record["bench"] = benches(options.bench, min(options.bench_seconds, deadline - time.time()))
        save()
    tool_path = None if options.no_sanitizer else sanitizer()
    record["sanitizer"] = sanitized(tool_path, deadline) if tool_path else "not run: no compute-sanitizer here" if not options.no_sanitizer else "not asked for"
    record["device_after"] = device()
    save()
    sanitizer_runs = [f for t in record["sanitizer"].values() for f in t.values()] if isinstance(record["sanitizer"], dict) else []
    unfinished = sum(isinstance(f, str) for f in sanitizer_runs)
    sanitizer_said = f"{len(sanitizer_runs) - unfinished} of {len(sanitizer_runs)} runs finished" if sanitizer_runs else record["sanitizer"]
    print(json.dumps({**{suite: record[suite]["passed"] for suite in SUITES}, "sanitizer": sanitizer_said, "record": str(options.out)}))
    dirty = any(not f["clean"] for f in sanitizer_runs if isinstance(f, dict))
    failed = any(record[suite]["exit"] != 0 or not record[suite]["tests"] for suite in SUITES)
    for suite in SUITES:
        for test, said in record[suite].get("failures", {}).items():
            print(f"FAILED {suite} {test}: {said[:400]}")
    return 1 if failed or dirty else 0


if __name__ == "__main__":
    sys.exit(main())
