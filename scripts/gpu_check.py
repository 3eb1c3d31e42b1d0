#!/usr/bin/env python3
"""The check of a GPU host: tests, 7B-shaped benches, training steps, profiles. One JSON record of the results.

usage: gpu_check.py [--budget SECONDS] [--out FILE_OR_FOLDER] [--only PART ...] [--list]

Runs in the folder that scripts/gpu_pack.sh made. Every item is a process of its own, which is killed with its children at
its time limit; no item stops the rest. The record is saved after each item and lists all: `passed`, `failed`, `hung`, or
`left out` with the reason. A section that exceeds its share of time is continued after memcheck. Reports of Nsight Compute
lie beside the record. `--only ops ncu` runs the items whose names contain one of these parts.

Needs Python 3.9 and an NVIDIA driver; uses PyTorch, ncu and compute-sanitizer if installed, and says what is missing.
Exit code 1: an item failed or hung (racecheck, synccheck and initcheck do not count), or no test passed.
"""
import argparse
import datetime
import glob
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time

import bench_report
import gpu_runs
from gpu_runs import HERE

ON_GPU = {"SWAT_TEST_CUDA": "gpu", "SWAT_KNOWN_IMAGES": str(HERE / "known"), "RUST_BACKTRACE": "0"}
# Sections in order, and seconds after which the next one starts.
SECTIONS = {"known": 60, "ops": 90, "products": 130, "memory": 70, "step": 110, "engine": 60, "ncu": 120,
            "memcheck": 120, "versions": 240, "families": 120, "peers": 120, "sanitizers": 240}
# Before this section, unfinished items of the earlier ones are continued.
SECOND = "versions"
# Tests of `ops` that are skipped: the CPU's, and two of the stand-in's four devices, as the GPU replaces each: f32 and bf16 state remain.
NOT_ON_A_GPU = ("cpu", "cpu_bf16", "cpu_bf16_state", "cuda_2", "cuda_3", "gpu_2", "gpu_3", "determinism", "compiled_kernels")
# Groups of `ops` that run first.
FIRST = ["gemm::gpu_0", "attention::cuda_0", "versions", "gemm::gpu_1", "attention::cuda_1", "gemm", "attention"]
MODEL, TOKENS = "qwen2.5-7b", (4, 1024)
# A shape for which FlashAttention publishes its rates.
HEADS = "heads-16x128"
GEMM = ["forward", "backward-input", "backward-weight"]
# The product that Nsight Compute profiles.
GEMM_SHAPE = "8192x3584x18944"
MEMORY_BOUND = {"adamw": ["step-bf16", "step-f32", "squares-bf16"], "cross_entropy": ["loss", "gradient"],
                "rmsnorm": ["forward", "backward"], "perturb": ["gaussian", "given"]}
OTHER_FAMILIES = ["swiglu", "rope", "embedding", "sampling"]
ADVISORY = ["racecheck", "synccheck", "initcheck"]
# Metrics of Nsight Compute in the summary.
SHOWN = {"gpu__time_duration.sum": "time",
         "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor pipe",
         "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM",
         "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM",
         "lts__t_sector_hit_rate.pct": "L2 hits"}
# Optional tools and peers; missing ones are reported.
PEERS = ["cublaslt", "torch", "cudnn", "ncu", "compute-sanitizer"]
PROBE = """
import json, torch
told = {"torch": torch.__version__, "gpu": torch.cuda.is_available(), "cudnn": torch.backends.cudnn.version()}
print(json.dumps(told))
"""


class Item:
    """`run(seconds)` returns a dict with a status. `need`: minimum seconds left to start it."""

    def __init__(self, name, run, seconds, need=2, advisory=False):
        self.name, self.run, self.seconds, self.need, self.advisory = name, run, seconds, need, advisory
        self.section = name.split("/")[0]
        self.found = {"status": "left out", "reason": "not reached"}


def left_out(reason):
    return {"status": "left out", "reason": reason}


def tool(name, *places):
    """Path of a CUDA tool: on PATH or where CUDA's installers put it."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    found = [shutil.which(name), *(f"{home}/bin/{name}" for home in homes)]
    found += [path for place in places for path in sorted(glob.glob(place))]
    return next((path for path in found if path and os.path.exists(path)), None)


class Check:
    def __init__(self, options):
        self.options, self.patience, self.python = options, options.patience, options.python
        self.deadline = time.time() + options.budget
        is_folder = options.out.is_dir() or not options.out.suffix
        self.folder = options.out if is_folder else options.out.parent
        self.path = self.folder / "record.json" if is_folder else options.out
        self.items, self.work, self.listed = [], None, None
        self.model = next(m for m in json.loads((HERE / "shapes.json").read_text())["models"] if m["name"] == MODEL)
        self.record = {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "commit": (HERE / "commit").read_text().strip(), "command": ["gpu_check.py " + " ".join(sys.argv[1:])],
            "budget": options.budget, "device": bench_report.query(bench_report.FIELDS),
            "peers": dict.fromkeys(PEERS, "not looked for"), "no_gpu": None, "broken": {}, "items": [],
            "bench": {"exit": {}, "results": []}, "step": {},
        }
        if not options.list:
            self.save()
        # PyTorch takes seconds to import: meanwhile the first tests run.
        self.torch = gpu_runs.Process([self.python, "-c", PROBE])
        nowhere = "not on the path, in CUDA_HOME, /usr/local/cuda or /opt/nvidia"
        self.ncu = tool("ncu", "/opt/nvidia/nsight-compute/*/ncu")
        self.no_ncu = self.peer("ncu", None if self.ncu else nowhere)
        self.sanitizer = tool("compute-sanitizer", "/usr/local/cuda*/compute-sanitizer/compute-sanitizer")
        self.no_sanitizer = self.peer("compute-sanitizer", None if self.sanitizer else nowhere)
        self.plan()

    # ---- what is there

    def peer(self, name, reason):
        """Records that a peer or a tool is there (None), or why it is missing."""
        if reason or self.record["peers"][name] == "not looked for":
            self.record["peers"][name] = reason or "found"
        return reason

    def no_torch(self, seconds=None):
        """Why PyTorch's peers cannot run; None if they can."""
        if isinstance(self.torch, gpu_runs.Process):
            code, text, _ = self.torch.wait(seconds or 2 * self.patience)
            told = gpu_runs.json_lines(text)[-1:] if code == 0 else []
            if not told:
                said = text.strip().splitlines()[-1:] or ["it does not answer"]
                self.torch = f"no PyTorch in {self.python}: {said[0]}"
            else:
                self.record["torch"] = told[0]
                self.torch = None if told[0]["gpu"] else f"PyTorch {told[0]['torch']} sees no GPU"
            self.peer("cudnn", None if told and told[0]["cudnn"] else self.torch or "PyTorch has no cuDNN")
        return self.peer("torch", self.torch)

    def no_gpu(self):
        """Why nothing can be timed, according to `swat doctor`."""
        return self.record["no_gpu"]

    # ---- items

    def plan(self):
        add = self.items.append
        groups = {}
        for name in self.tests("ops"):
            parts = name.split("::")
            if not set(parts) & set(NOT_ON_A_GPU):
                groups.setdefault("::".join(parts[:2]) if len(parts) > 2 else parts[0], []).append(name)
        add(Item("known/doctor", self.doctor, self.patience))
        for name in self.tests("standin"):
            if name.startswith("known::") and name != "known::nvcc_compiles_them":
                add(self.test_item(f"known/{name}", "standin", [name]))
        place = {name: i for i, name in enumerate(FIRST)}
        for group in sorted(groups, key=lambda g: (place.get(g, len(FIRST)), g[-1] == "1", g)):
            add(self.test_item(f"ops/{group}", "ops", groups[group]))
        attention = [f"attention/{op}/{shape}" for op in ("forward", "backward") for shape in (HEADS, MODEL)]
        for op in GEMM:
            add(self.bench_item(f"products/gemm {op}", [f"gemm/{op}/{MODEL}"], "swat,cublaslt"))
        for op, parts in (("forward", attention[:2]), ("backward", attention[2:])):
            add(self.bench_item(f"products/attention {op}", parts, "swat"))
        add(self.torch_item("products/torch attention", attention))
        add(self.torch_item("products/torch gemm", [f"gemm/{op}/{MODEL}" for op in GEMM]))
        for family, ops in MEMORY_BOUND.items():
            add(self.bench_item(f"memory/{family}", [f"{family}/{op}/{MODEL}" for op in ops], "swat,copy"))
        for layers in (2, 6, self.model["layers"]):
            work = lambda seconds, layers=layers: self.step(layers, seconds)
            add(Item(f"step/{layers} layers", work, 3 * self.patience, 10))
        for suite in ("cuda_graphs", "cuda"):
            for name in self.tests(suite):
                add(self.test_item(f"engine/{suite} {name}", suite, [name]))
        for op in GEMM:
            add(self.ncu_item(f"ncu/gemm {op}", f"gemm/{op}/{MODEL}/{GEMM_SHAPE}"))
        for op in ("forward", "backward"):
            add(self.ncu_item(f"ncu/attention {op}", f"attention/{op}/{HEADS}"))
        for group in ("gemm::gpu_0", "attention::cuda_0"):
            add(self.sanitizer_item(f"memcheck/{group}", "memcheck", groups.get(group, [])))
        for family, parts in (("gemm", [f"gemm/{op}/{MODEL}" for op in GEMM]), ("attention", attention)):
            for version in self.versions(parts):
                add(self.bench_item(f"versions/{family} {version}", parts, version))
        for family in OTHER_FAMILIES:
            add(self.bench_item(f"families/{family}", self.ladders(family), "swat,copy"))
        parts = [part for family in [*MEMORY_BOUND, *OTHER_FAMILIES] for part in self.ladders(family)]
        add(self.torch_item("peers/torch families", parts))
        add(self.torch_item("peers/torch steps", [], "steps.py", 6))
        add(Item("peers/train_against_torch", self.train_against_torch, 8 * self.patience, 60))
        for which in ADVISORY:
            for group in (group for group in groups if not group.endswith("_1")):
                add(self.sanitizer_item(f"sanitizers/{which} {group}", which, groups[group], True))

    def tests(self, executable):
        """Names of an executable's tests; empty if it does not list them, which the record says."""
        found = gpu_runs.listed_tests(HERE / executable)
        if isinstance(found, str):
            self.record["broken"][executable] = found
            return []
        return found

    def ids(self):
        """Ids of all variants on this GPU; empty if the benches list none, which the record says."""
        if self.listed is None:
            code, text, _ = gpu_runs.run([HERE / "kernels", "--gpu", "--list"], self.patience)
            self.listed = [line for line in text.splitlines() if line.count("/") >= 4] if code == 0 else []
            if not self.listed:
                self.record["broken"]["kernels"] = f"it lists no benches: {text.strip()[-300:] or code}"
        return self.listed

    def versions(self, parts):
        """Our versions of ladders, without those that are slow at this size."""
        found = [line.split("/")[-1] for line in self.ids() if line.startswith(tuple(parts))]
        others = ("swat", "cublaslt", "copy", "baseline", "scalar64")
        return [version for version in dict.fromkeys(found) if version not in others]

    def ladders(self, family):
        """Operations of a family at MODEL's shapes, as parts of ids."""
        found = ["/".join(line.split("/")[:3]) for line in self.ids() if line.startswith(f"{family}/")]
        return [part for part in dict.fromkeys(found) if part.endswith(MODEL)]

    def test_item(self, name, executable, tests):
        return Item(name, lambda seconds: gpu_runs.test_run(HERE / executable, tests, seconds, ON_GPU), self.patience)

    def bench_item(self, name, parts, variants):
        def work(seconds):
            if reason := self.no_gpu() or (None if parts else "the benches list nothing of it"):
                return left_out(reason)
            command = [HERE / "kernels", "--gpu", "--json", "--variants", variants, *parts]
            return self.keep(name, gpu_runs.bench_run(command, seconds))
        return Item(name, work, 1.5 * self.patience, 5)

    def torch_item(self, name, parts, script="kernels.py", patience=3):
        def work(seconds):
            if reason := self.no_torch():
                return left_out(reason)
            return self.keep(name, gpu_runs.bench_run([self.python, HERE / "peers" / script, *parts], seconds))
        return Item(name, work, patience * self.patience, 15)

    def ncu_item(self, name, part):
        def work(seconds):
            if reason := self.no_gpu() or self.no_ncu and f"no ncu: {self.no_ncu}":
                return left_out(reason)
            report = (self.folder / name.replace("/", "-").replace(" ", "-")).resolve()
            command = [HERE / "kernels", "--gpu", "--once", "--variants", "swat", part]
            return gpu_runs.ncu_run(self.ncu, report, command, seconds)
        return Item(name, work, 3 * self.patience, 12)

    def sanitizer_item(self, name, which, tests, advisory=False):
        def work(seconds):
            if self.no_sanitizer or not tests:
                return left_out(f"no compute-sanitizer: {self.no_sanitizer}" if tests else "ops lists none of its tests")
            command = [self.sanitizer, "--tool", which]
            if which == "memcheck":
                # The backend finds a kernel's last parameter by a call that the driver refuses, and checks the others itself.
                command += ["--report-api-errors", "no"]
            return gpu_runs.sanitizer_run(command, HERE / "ops", tests, seconds, ON_GPU)
        return Item(name, work, 4 * self.patience, 10, advisory)

    # ---- work

    def doctor(self, seconds):
        found = gpu_runs.json_run([HERE / "swat", "doctor", "--json"], seconds)
        if told := found.pop("value", None):
            self.record["doctor"] = told
            devices = [device for device in told.get("cuda_devices", []) if "error" not in device]
            if not devices:
                self.record["no_gpu"] = "swat doctor shows no GPU that can be used"
                found.update(status="failed", reason=self.record["no_gpu"])
            elif "name" not in self.record["device"]:
                self.record["device"]["name"] = devices[0]["name"]
        return found

    def keep(self, name, found):
        """Adds the lines of a bench to the record."""
        lines = found.pop("lines")
        self.record["bench"]["results"] += lines
        self.record["bench"]["exit"][name] = found["exit"]
        found["measured"] = sum("ns" in line for line in lines)
        for line in lines:
            if line.get("missing") in PEERS:
                self.peer(line["missing"], line["reason"])
            elif line.get("variant") == "cublaslt":
                self.peer("cublaslt", None)
        return found

    def step(self, layers, seconds):
        """`swat profile` of a step of MODEL with this many layers and random weights."""
        if reason := self.no_gpu():
            return left_out(reason)
        began, count = time.time(), gpu_runs.elements(self.model, layers)
        # Weights and gradients 2 bytes each, moments 4; activations and workspace are estimated.
        needed, memory = 8 * count + (16 << 30), self.device_bytes()
        if memory and needed > memory:
            return left_out(f"about {needed >> 30} GiB are needed, the GPU has {memory >> 30}")
        if 2 * count + (1 << 30) > shutil.disk_usage(self.work).free:
            return left_out(f"no {2 * count >> 30} GiB of disk for the weights")
        folder = pathlib.Path(self.work) / f"model-{layers}"
        try:
            gpu_runs.write_model(folder, self.model, layers, began + 0.6 * seconds)
            written = time.time() - began
            command = [HERE / "swat", "profile", "--model", folder, "--device", "cuda", "--state", "bf16"]
            command += ["--batch-size", TOKENS[0], "--length", TOKENS[1], "--steps", 5, "--json", "--quiet"]
            found = gpu_runs.json_run(command, seconds - written)
        except TimeoutError:
            return left_out(f"{2 * count >> 30} GiB of weights were not written in {0.6 * seconds:.0f} s")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        found["written_s"] = round(written, 2)
        if value := found.pop("value", None):
            self.record["step"][f"{layers} layers"] = {"layers": layers, **value}
            self.extrapolate()
        return found

    def extrapolate(self):
        """Extrapolates a step of all layers, if it has not run, linearly from two with fewer layers."""
        whole, steps = self.model["layers"], self.record["step"].values()
        found = [(step["layers"], step["step_ms"]) for step in steps if "layers" in step]
        self.record["step"].pop("extrapolated", None)
        if len(found) == 2 and whole not in dict(found):
            (few, few_ms), (more, more_ms) = sorted(found)
            ms = few_ms + (whole - few) * (more_ms - few_ms) / (more - few)
            rate = TOKENS[0] * TOKENS[1] / ms * 1e3
            self.record["step"]["extrapolated"] = {"to": whole, "from": [few, more], "step_ms": ms, "tok_per_s": rate}

    def device_bytes(self):
        """Memory of the GPU; None if unknown."""
        devices = (self.record.get("doctor") or {}).get("cuda_devices") or [{}]
        return devices[0].get("total_bytes")

    def train_against_torch(self, seconds):
        if reason := self.no_torch() or self.no_gpu():
            return left_out(reason)
        command = [self.python, HERE / "peers/train_against_torch.py", "--swat", HERE / "swat", "--work", self.work,
                   "--shapes", "135M", "--memory", "135M"]
        found = gpu_runs.json_run(command, seconds)
        found["result"] = found.pop("value", None)
        return found

    # ---- the run

    def save(self):
        told = lambda item: {"name": item.name, **({"advisory": True} if item.advisory else {}), **item.found}
        self.record["items"] = [told(item) for item in self.items]
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.record, indent=1) + "\n")
        os.replace(partial, self.path)

    def begin(self, item):
        """Runs an item, unless too little time is left; an exception counts as its failure."""
        left = self.deadline - time.time() - 3
        if left < item.need:
            item.found = left_out(f"no time: it needs {item.need} s, {max(0, left):.0f} s were left")
            return
        began = time.time()
        try:
            item.found = item.run(min(item.seconds, left))
        except Exception as error:  # The rest goes on.
            item.found = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        item.found.setdefault("seconds", round(time.time() - began, 2))
        self.save()
        reason = f": {item.found['reason']}" if "reason" in item.found else ""
        at = self.options.budget + time.time() - self.deadline
        print(f"{at:6.1f} s  {item.found['status']:8}  {item.name}{reason}", flush=True)

    def main(self):
        only = self.options.only
        chosen = [item for item in self.items if not only or any(part in item.name for part in only)]
        for item in self.items:
            if item not in chosen:
                item.found = left_out("not asked for (--only)")
        watch, postponed = bench_report.Watch(), []
        watch.start()
        with tempfile.TemporaryDirectory(dir=HERE) as self.work:
            for section, share in SECTIONS.items():
                if section == SECOND:
                    while postponed:
                        self.begin(postponed.pop(0))
                ends = time.time() + share
                for item in (item for item in chosen if item.section == section):
                    if time.time() < ends:
                        self.begin(item)
                    else:
                        postponed.append(item)
            for item in postponed:
                self.begin(item)
        self.no_torch(1)
        self.record["meanwhile"] = watch.stop()
        self.record["device"].setdefault("name", "unknown GPU")
        self.record["device_after"] = bench_report.query(bench_report.FIELDS)
        self.record["seconds"] = round(self.options.budget + time.time() - self.deadline, 1)
        self.save()
        return self.summary()

    def summary(self):
        if bench_report.measured(self.record["bench"]["results"]):
            bench_report.table([self.path])
        for what, step in self.record["step"].items():
            print(f"step of {MODEL}, {what}: {step['step_ms']:.1f} ms, {step['tok_per_s']:.0f} tok/s")
        for item in self.items:
            for kernel in item.found.get("kernels", []):
                metrics = kernel["metrics"]
                said = (f"{what} {metrics[name]}" for name, what in SHOWN.items() if name in metrics)
                print(f"{item.name}: {kernel['kernel'][:60]}: {', '.join(said)}")
        for what, said in self.record["broken"].items():
            print(f"BROKEN {what}: {said}")
        for name, state in self.record["peers"].items():
            if state != "found":
                print(f"MISSING {name}: {state}")
        wrong = [item for item in self.items if item.found["status"] in ("failed", "hung")]
        for item in wrong:
            advisory = " (advisory)" if item.advisory else ""
            print(f"{item.found['status'].upper()} {item.name}{advisory}: {item.found.get('reason', '')}")
        counts = {status: sum(item.found["status"] == status for item in self.items)
                  for status in ("passed", "failed", "hung", "left out")}
        print(json.dumps({**counts, "seconds": self.record["seconds"], "record": str(self.path)}))
        tested = any(item.found["status"] == "passed" and "tests" in item.found for item in self.items)
        return 1 if self.record["broken"] or not tested or any(not item.advisory for item in wrong) else 0


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--budget", type=float, default=540, help="seconds for all of it; the rest is left out, by name")
    p.add_argument("--out", type=pathlib.Path, default=HERE / "record.json", help="the record, or a folder for it")
    p.add_argument("--only", nargs="+", default=[], metavar="PART", help="items whose names hold one of these")
    p.add_argument("--list", action="store_true", help="print the items, and seconds of each at most, and stop")
    p.add_argument("--patience", type=float, default=20, help="seconds of a test; other items get a multiple")
    p.add_argument("--python", default=sys.executable, help="the interpreter that has PyTorch")
    options = p.parse_args()
    # As for Ctrl-C: the running process is killed; the record stays as of the last item.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    check = Check(options)
    try:
        if options.list:
            print("\n".join(f"{item.seconds:5.0f} s  {item.name}" for item in check.items))
            return 0
        return check.main()
    finally:
        gpu_runs.kill_all()


if __name__ == "__main__":
    sys.exit(main())
