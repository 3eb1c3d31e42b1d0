#!/usr/bin/env python3
"""Bench records: makes them, renders the newest into README.md, compares two, and merges several into one table.

usage: bench_report.py record --run COMMAND [--run COMMAND ...] [--out DIR]
       bench_report.py render [--records DIR] [--readme FILE]
       bench_report.py compare OLD.json NEW.json
       bench_report.py table FILE [FILE ...]

record   runs commands that print JSON lines (`cargo bench -- --json`, `python benches/peers/kernels.py`), samples the GPU's clock, power
         and temperature meanwhile, and writes DIR/<device>/<date>-<commit>.json (DIR: benches/records).
render   writes a table of each device's newest record between the markers of README.md. Refuses a record of an unknown commit or of a
         modified tree.
compare  lists what became slower (or faster) by more than the spread: the ranges from the 10th to the 90th percentile of the samples
         do not overlap. Exit code 1 if something is slower.
table    one table of all variants in JSON lines or records: ours and the peers', each against the best peer.

Needs Python 3.9 and git; exit code 2 for invalid input.
"""
import argparse
import collections
import datetime
import json
import os
import pathlib
import platform
import re
import shlex
import statistics
import subprocess
import sys
import threading

ROOT = pathlib.Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:kernels begin -->", "<!-- results:kernels end -->"
FIELDS = ["name", "driver_version", "compute_cap", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit",
          "temperature.gpu"]
WATCHED = ["clocks.sm", "power.draw", "temperature.gpu"]


def refuse(text):
    print(f"bench_report.py: {text}", file=sys.stderr)
    sys.exit(2)


def git(*command):
    done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


# ---- reading


def lines_of(path):
    """The objects of a record, or of a file of JSON lines."""
    try:
        text = pathlib.Path(path).read_text()
    except OSError as error:
        refuse(f"{path}: {error.strerror}")
    try:
        record = json.loads(text)
        return record["bench"]["results"] if "bench" in record else [record]
    except (json.JSONDecodeError, KeyError, TypeError):
        pass
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("{"):
            continue
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            refuse(f"{path}, line {number}: {error}")
    if not found:
        refuse(f"{path}: no JSON objects, a line each")
    return found


def measured(lines):
    return [line for line in lines if "ns" in line and "variant" in line]


def ceilings_of(lines):
    """Of each family."""
    return {line["family"]: line["ceilings"] for line in lines if "ceilings" in line}


def record_of(path):
    try:
        record = json.loads(pathlib.Path(path).read_text())
        record["bench"]["results"], record["commit"], record["date"], record["device"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        refuse(f"{path}: not a record ({type(error).__name__}: {error})")
    return record


# ---- numbers as text


def significant(value, digits=3):
    if value == 0:
        return "0"
    text = f"{value:.{digits - 1}e}"
    exponent = int(text.split("e")[1])
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def duration(ns):
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= size:
            return f"{significant(ns / size)} {unit}"
    return f"{significant(ns)} ns"


def of_ceiling(line, ceilings):
    """Roofline time over measured time; None if one of them is unknown."""
    found = ceilings.get(line["family"])
    if not found or not line["bytes"] + line["flops"]:
        return None
    return max(line["flops"] / found["flops_per_s"], line["bytes"] / found["bytes_per_s"]) * 1e9 / line["ns"]


def rate(line):
    """In the unit of the bottleneck: TFLOP/s for products and attention, GB/s otherwise."""
    if line["flops"] >= 64 * max(line["bytes"], 1):
        return f"{significant(line['flops'] / line['ns'] / 1e3)} TFLOP/s"
    return f"{significant(line['bytes'] / line['ns'])} GB/s" if line["bytes"] else "–"


def missing(lines):
    """Missing peers: their family, and why."""
    found = collections.OrderedDict()
    for line in lines:
        if "missing" in line:
            what = " ".join(line[key] for key in ("family", "op", "shape") if key in line)
            found.setdefault((line["missing"], line["reason"]), {})[what] = None
    return [f"{peer} is missing for {', '.join(what)}: {reason}" for (peer, reason), what in found.items()]


def pairs_of(lines):
    """Interleaved samples: the peer's time over ours, by ladder and peer."""
    return {(line["family"], line["op"], line["shape"], line["pair"][1]): line for line in lines if "pair" in line}


def ladders(lines):
    """Lines by (family, op, shape), in their order."""
    found = collections.OrderedDict()
    for line in measured(lines):
        found.setdefault((line["family"], line["op"], line["shape"]), []).append(line)
    return found


def best_peer(ladder):
    return min((line for line in ladder if line["peer"]), key=lambda line: line["ns"], default=None)


def against(line, peer, pairs):
    """Speedup over the fastest peer; with a 95 % interval if both were sampled interleaved."""
    if not peer or line["peer"]:
        return "–"
    pair = pairs.get((line["family"], line["op"], line["shape"], peer["variant"]))
    if not pair or line["variant"] != "swat":
        return f"{significant(peer['ns'] / line['ns'])} × {peer['variant']}"
    ratio, low, high = (significant(pair[key]) for key in ("ratio", "low", "high"))
    return f"{ratio} × {peer['variant']} ({low} to {high})"


def percent(share):
    return "–" if share is None else f"{100 * share:.0f}"


# ---- table


def table(paths):
    lines = [line for path in paths for line in lines_of(path)]
    ceilings, pairs = ceilings_of(lines), pairs_of(lines)
    devices = sorted({line["device"] for line in measured(lines)})
    if len(devices) > 1:
        print(f"measured on different devices, not to be compared: {', '.join(devices)}", file=sys.stderr)
    print("| operation, shape | variant | time | rate | % of ceiling | best peer |\n|---|---|---:|---:|---:|---:|")
    for (family, op, shape), ladder in ladders(lines).items():
        peer = best_peer(ladder)
        for line in ladder:
            name = f"{line['variant']} (peer)" if line["peer"] else line["variant"]
            share = percent(of_ceiling(line, ceilings))
            fast = against(line, peer, pairs)
            print(f"| {family} {op} {shape} | {name} | {duration(line['ns'])} | {rate(line)} | {share} | {fast} |")
    for said in missing(lines):
        print(f"\n**{said}**")


# ---- compare


def compare(old_path, new_path):
    old, new = record_of(old_path), record_of(new_path)
    names = [record["device"].get("name") for record in (old, new)]
    if names[0] != names[1]:
        refuse(f"records of different devices: {names[0]} and {names[1]}")
    before = {line["id"]: line for line in measured(old["bench"]["results"])}
    slower, faster, same = [], [], 0
    for line in measured(new["bench"]["results"]):
        was = before.pop(line["id"], None)
        if was is None:
            continue
        entry = (line["ns"] / was["ns"], line, was)
        if line["low_ns"] > was["high_ns"]:
            slower.append(entry)
        elif line["high_ns"] < was["low_ns"]:
            faster.append(entry)
        else:
            same += 1
    for what, entries in (("slower", slower), ("faster", faster)):
        for ratio, line, was in sorted(entries, key=lambda e: e[0], reverse=what == "slower"):
            spans = " → ".join(f"{duration(l['ns'])} ({duration(l['low_ns'])} to {duration(l['high_ns'])})" for l in (was, line))
            print(f"{what} × {ratio:.3f}  {line['id']}: {spans}")
    print(f"{len(slower)} slower, {len(faster)} faster, {same} not told apart; {len(before)} only in the older record")
    return 1 if slower else 0


# ---- render


def known(record, path):
    """Refuses a record whose code cannot be checked out."""
    commit = record["commit"]
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        refuse(f"{path}: made of {commit!r}; expected a commit without changes in the tree")
    if git("cat-file", "-e", f"{commit}^{{commit}}") is None:
        refuse(f"{path}: made of commit {commit}, which git does not know here")


def section(record):
    """A row for each operation, at its largest shape of the largest model."""
    lines = record["bench"]["results"]
    ceilings, pairs = ceilings_of(lines), pairs_of(lines)
    order = [model["name"] for model in json.loads((ROOT / "benches/shapes.json").read_text())["models"]]
    place = lambda shape: order.index(shape.split("/")[0]) if shape.split("/")[0] in order else -1
    chosen = {}
    for (family, op, shape), ladder in ladders(lines).items():
        ours = next((line for line in ladder if line["variant"] == "swat"), None)
        if not ours:
            continue
        size = (place(shape), ours["flops"] + ours["bytes"])
        if size > chosen.get((family, op), ((-2, 0),))[0]:
            chosen[(family, op)] = (size, ours, ladder)
    if not chosen:
        return None
    rows = ["| operation | shape | time | rate | % of ceiling | against the best peer |", "|---|---|---:|---:|---:|---:|"]
    for (family, op), (_, ours, ladder) in sorted(chosen.items()):
        share = percent(of_ceiling(ours, ceilings))
        rows.append(f"| {family} {op} | {ours['shape']} | {duration(ours['ns'])} | {rate(ours)} | {share} | {against(ours, best_peer(ladder), pairs)} |")
    device = record["device"]
    notes = [device["name"]]
    notes += [f"driver {device['driver_version']}"] if "driver_version" in device else []
    for field, unit in (("clocks.sm", "MHz"), ("power.draw", "W"), ("temperature.gpu", "°C")):
        if field in record.get("meanwhile", {}):
            notes.append(f"{record['meanwhile'][field]['median']:g} {unit} in the median")
    rates = [ceilings[family] for family in sorted(ceilings)]
    if rates:
        flops, moved = (max(r[key] for r in rates) for key in ("flops_per_s", "bytes_per_s"))
        notes.append(f"ceilings measured in the same processes: up to {significant(flops / 1e12)} TFLOP/s and {significant(moved / 1e9)} GB/s")
    notes += missing(lines)
    notes.append(f"{record['date'][:10]}, commit {record['commit'][:12]}")
    return "\n".join(rows) + "\n\n" + "; ".join(notes) + "."


def newest(records):
    """The newest record of each device."""
    found = {}
    for path in sorted(records.glob("*/*.json")):
        record = record_of(path)
        if path.parent not in found or record["date"] > found[path.parent][1]["date"]:
            found[path.parent] = (path, record)
    return [found[parent] for parent in sorted(found)]


def render(records, readme):
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        refuse(f"{readme}: expected the markers {BEGIN} and {END} once each")
    parts = []
    for path, record in newest(records):
        known(record, path)
        if found := section(record):
            parts.append(found)
    if not parts:
        refuse(f"{records}: no record with results of ours")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    partial = readme.with_name(readme.name + ".partial")
    partial.write_text(f"{head}{BEGIN}\n" + "\n\n".join(parts) + f"\n{END}{tail}")
    os.replace(partial, readme)


# ---- record


def query(fields):
    """Fields of nvidia-smi for the first GPU; empty if there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().splitlines()[0].split(",")] if done.returncode == 0 and done.stdout.strip() else []
    return dict(zip(fields, values))


def machine():
    try:
        cpu = re.search(r"model name\s*:\s*(.+)", pathlib.Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):
        cpu = platform.processor() or platform.machine()
    return {"name": cpu, "cores": os.cpu_count(), "load": os.getloadavg()[0]}


class Watch(threading.Thread):
    """Samples the GPU every two seconds until it is stopped."""

    def __init__(self):
        super().__init__(daemon=True)
        self.stopped, self.seen = threading.Event(), collections.defaultdict(list)

    def run(self):
        while not self.stopped.wait(2):
            for field, value in query(WATCHED).items():
                try:
                    self.seen[field].append(float(value))
                except ValueError:
                    pass

    def stop(self):
        self.stopped.set()
        self.join()
        return {f: {"least": min(v), "median": statistics.median(v), "most": max(v)} for f, v in self.seen.items() if v}


def slug(name):
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "").replace("(tm)", "")).strip("-")


def record(commands, out):
    commit = git("rev-parse", "HEAD") or "unknown"
    if git("status", "--porcelain", "--untracked-files=no"):
        commit += "-dirty"
    results, exits, watch = [], [], Watch()
    device = query(FIELDS) or machine()
    watch.start()
    for command in commands:
        done = subprocess.run(shlex.split(command), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        exits.append(done.returncode)
        results += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    meanwhile = watch.stop()
    now = datetime.datetime.now(datetime.timezone.utc)
    made = {"date": now.strftime("%Y-%m-%dT%H:%M:%SZ"), "commit": commit, "command": commands, "device": device, "meanwhile": meanwhile,
            "device_after": query(FIELDS) or machine(), "bench": {"exit": exits, "results": results}}
    if not measured(results):
        refuse(f"no results: {' and '.join(commands)} ended with {exits}")
    path = out / slug(device["name"]) / f"{now:%Y-%m-%d}-{commit[:12]}{'-dirty' if commit.endswith('-dirty') else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)
    print(path)
    return 1 if any(exits) else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("record")
    p.add_argument("--run", action="append", required=True, metavar="COMMAND")
    p.add_argument("--out", type=pathlib.Path, default=ROOT / "benches/records")
    p = commands.add_parser("render")
    p.add_argument("--records", type=pathlib.Path, default=ROOT / "benches/records")
    p.add_argument("--readme", type=pathlib.Path, default=ROOT / "README.md")
    p = commands.add_parser("compare")
    p.add_argument("old", type=pathlib.Path)
    p.add_argument("new", type=pathlib.Path)
    p = commands.add_parser("table")
    p.add_argument("files", nargs="+", type=pathlib.Path)
    args = parser.parse_args()
    if args.command == "record":
        return record(args.run, args.out)
    if args.command == "render":
        return render(args.records, args.readme)
    if args.command == "compare":
        return compare(args.old, args.new)
    return table(args.files)


if __name__ == "__main__":
    sys.exit(main())
