"""swat beside PyTorch + transformers on this machine: training steps, generation, the sweep.

usage: compare.py --swat target/release/swat --model DIR --work DIR [--dtype f32|bf16] [--rounds 3] [--only NAME ...]
                  [--out docs/results]

Run it with the interpreter of scripts/setup_oracle.sh. Both sides get the same model in the same precision, threads and inputs, and run
alternately, A B A B; each round's result is the median of its steps after the warm-up, each side's result the median of its rounds. Their
results are compared as well: losses of the first steps, greedy tokens. PyTorch trains through torch.compile if that is faster. Writes
peers-<cpu>.json and peers-<cpu>.md (peers-bf16-… in bf16), unless other work kept more than a tenth of a core busy.
Large files (a tuned copy of the model) go to --work, and each measurement once it is made: a run that was ended, or disturbed, goes on
with what is missing, as long as binary, model and rounds are the same. On an idle machine of two cores three rounds take half an hour.
"""
import argparse
import json
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time

import transformers

import workload

HERE = pathlib.Path(__file__).parent
WARMUP, STEPS = 2, 5
BATCH, LENGTH = 4, 256
NEW_TOKENS = 64
SWEEP_PROMPTS, SWEEP_TOKENS, SWEEP_DRAWS, SWEEP_EPSILON = 64, 32, 2, 1.2
# Cells that the peer's loop runs, spread over all: each costs the same there.
SWEEP_SAMPLE = 20
# Cores that other work may keep busy.
MOST_BUSY = 0.1


class Sides:
    """The two programs and the inputs that they share."""

    def __init__(self, args):
        self.swat, self.model, self.work, self.threads = args.swat.resolve(), args.model, args.work, args.threads
        self.dtype, self.compiles = args.dtype, {}
        self.layers = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
        self.mods = f"layers.{self.layers // 2}-{self.layers - 1}.{{v_proj,o_proj,down_proj}}"
        last = self.layers - 1
        self.swept = sorted({0, last // 4, last // 2, 3 * last // 4, last})
        self.work.mkdir(parents=True, exist_ok=True)
        self.conversations = self.work / "conversations.jsonl"
        self.security = self.work / "security.jsonl"
        self.template = self.work / "template.jinja"
        self.prompts = HERE / "prompts.jsonl"
        workload.conversations(self.conversations, 2 * BATCH * (WARMUP + STEPS))
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        workload.security(self.security, self.template, tokenizer, SWEEP_PROMPTS, SWEEP_TOKENS)

    def run(self, command):
        threads = str(self.threads)
        environment = dict(os.environ, RAYON_NUM_THREADS=threads, PEER_THREADS=threads)
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            sys.exit(f"{' '.join(map(str, command))}\nexit code {done.returncode}\n{done.stderr[-3000:]}")
        return done.stdout

    def run_swat(self, command, *options):
        return self.run([self.swat, command, "--device", "cpu", "--dtype", self.dtype, "--quiet", "--model", self.model, *options])

    def run_peer(self, script, *options):
        return json.loads(self.run([sys.executable, HERE / script, "--dtype", self.dtype, *options]))

    # ---- training steps: `swat tune` writes a line a step into metrics.jsonl

    def swat_train(self, mods=None, lora=None, batch=BATCH, length=LENGTH):
        out = self.work / "tuned"
        steps = ["--mods", mods, "--mods-steps", WARMUP + STEPS, "--steps", 0] if mods else ["--steps", WARMUP + STEPS]
        if lora:
            steps += ["--method", "lora", "--lora-rank", lora]
        if self.dtype == "bf16":
            # As PyTorch keeps gradients and moments of bf16 weights.
            steps += ["--state", "bf16"]
        self.run_swat("tune", "--data", self.conversations, "--out", out, "--force", "--batch-size", batch, "--max-length", length,
                      "--packing", "false", "--shuffle", "false", "--lr", "1e-5", "--schedule", "constant", "--save-every", 0, *steps)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        shutil.rmtree(out)
        counted = lines[WARMUP:]
        if any(line["tokens"] != batch * length for line in lines):
            sys.exit("swat tune: a step of another size than the peer's")
        return {"tok_per_s": batch * length / (statistics.median(line["step_ms"] for line in counted) / 1000),
                "losses": [line["loss"] for line in lines], "peak_bytes": lines[-1]["peak_bytes"]}

    def peer_train(self, mods=None, lora=None, batch=BATCH, length=LENGTH):
        chosen = ["--mods", mods] if mods else ["--lora-rank", lora] if lora else []
        run = lambda *how: self.run_peer("train_step.py", "--model", self.model, "--data", self.conversations, "--batch-size", batch,
                                         "--max-length", length, "--lr", "1e-5", "--warmup", WARMUP, "--repeats", STEPS, *chosen, *how)
        key = (mods, lora)
        if key not in self.compiles:
            try:
                self.compiles[key] = run("--compile")["tok_per_s"] > run()["tok_per_s"]
            except SystemExit as failed:
                print(f"torch.compile does not run here: {failed}", file=sys.stderr)
                self.compiles[key] = False
        result = run(*(["--compile"] if self.compiles[key] else []))
        result["peer"] += ", compiled" if self.compiles[key] else ", eager"
        return result

    # ---- generation: `swat generate --json` prints a line a prompt, with the rate over all of them

    def swat_generate(self, batch):
        # A cache for one prompt: prompts are answered one at a time.
        cache = ["--cache-mib", 0] if batch == 1 else []
        text = self.run_swat("generate", "--chat", self.prompts, "--max-new-tokens", NEW_TOKENS, "--json", *cache)
        lines = [json.loads(line) for line in text.splitlines()]
        return {"tok_per_s": lines[0]["tok_per_s"], "answers": [line["tokens"] for line in lines]}

    def peer_generate(self, batch):
        tokens = self.work / "tokens.jsonl"
        result = self.run_peer("generate.py", "--model", self.model, "--chat", self.prompts, "--max-new-tokens", NEW_TOKENS, "--batch-size", batch,
                               "--tokens-out", tokens)
        result["answers"] = [json.loads(line)["tokens"] for line in tokens.read_text().splitlines()]
        return result

    # ---- the sweep: `swat robustness` writes the wall time of its cells into the map

    def sweep_inputs(self, chat):
        """Prompts alone, or as users send them: through the model's own template, with its system prompt."""
        return ["--security", self.security, *([] if chat else ["--chat-template", self.template])]

    def swat_sweep(self, chat):
        probe, out = self.work / f"probe{'-chat' * chat}.safetensors", self.work / "map.json"
        shared = self.sweep_inputs(chat)
        if not probe.exists():
            self.run_swat("probe", *shared, "--out", probe)
        for left in self.work.glob("map.*"):
            left.unlink()
        cells = ",".join(f"layers.{layer}.modules" for layer in self.swept)
        self.run_swat("robustness", *shared, "--probe", probe, "--out", out, "--cells", cells, "--epsilon", SWEEP_EPSILON,
                      "--members", SWEEP_DRAWS, "--no-retrain")
        found = json.loads(out.read_text())
        runs = len(found["cells"]) * len(found["seeds"]) * (2 if found["antithetic"] else 1)
        return {"s_per_run": found["seconds"] / runs, "runs": runs}

    def peer_sweep(self, chat):
        layers = ",".join(map(str, self.swept))
        return self.run_peer("sweep.py", "--model", self.model, *self.sweep_inputs(chat), "--layers", layers, "--members", 2 * SWEEP_DRAWS, "--epsilon", SWEEP_EPSILON,
                             "--warmup", 1, "--repeats", SWEEP_SAMPLE)


    # ---- the ceiling: products alone

    def ceilings(self):
        """FLOPs a second of large products: swat's own, and PyTorch's."""
        ours = json.loads(self.run_swat("profile", "--json", "--work", "forward", "--steps", 1, "--warmup", 0))
        return {"swat": ours["ceilings"]["flops_per_s"], "peer": self.run_peer("ceiling.py")["flops_per_s"]}


def measurements(sides):
    """name: (what it is, swat's side, the peer's side, what is compared, whether more of it is better)"""
    step = f"{BATCH} × {LENGTH} tokens, AdamW"
    return {
        "train": (f"training step, {step}", sides.swat_train, sides.peer_train, "tok_per_s", True),
        "train-masked": (f"first-phase step, {step}, training {sides.mods}", lambda: sides.swat_train(sides.mods),
                         lambda: sides.peer_train(sides.mods), "tok_per_s", True),
        "train-lora": ("LoRA step, rank 8 on q, k, v and o, 8 × 128 tokens, AdamW", lambda: sides.swat_train(lora=8, batch=8, length=128),
                       lambda: sides.peer_train(lora=8, batch=8, length=128), "tok_per_s", True),
        "generate-1": (f"greedy generation, 20 prompts one by one, up to {NEW_TOKENS} tokens each", lambda: sides.swat_generate(1),
                       lambda: sides.peer_generate(1), "tok_per_s", True),
        "generate-20": (f"greedy generation, 20 prompts at once, up to {NEW_TOKENS} tokens each", lambda: sides.swat_generate(20),
                        lambda: sides.peer_generate(20), "tok_per_s", True),
        "sweep": (f"sweep: a perturbed run of {SWEEP_PROMPTS} prompts × {SWEEP_TOKENS} tokens, layers {sides.swept}",
                  lambda: sides.swat_sweep(False), lambda: sides.peer_sweep(False), "s_per_run", False),
        "sweep-chat": ("the same prompts through the model's chat template, with its system prompt",
                       lambda: sides.swat_sweep(True), lambda: sides.peer_sweep(True), "s_per_run", False),
    }


def agreement(name, ours, theirs, dtype):
    """Compares the results of both sides; stops if they did different work."""
    if name.startswith("train"):
        apart = [abs(a - b) / b for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
        # Adapters begin at random, and their first step is the original model. PyTorch rounds bf16 weights to the nearest, which loses most
        # updates at this learning rate; swat rounds stochastically, which keeps their mean. Only the first loss is of the same weights.
        compared, limit = (apart, 1e-3) if dtype == "f32" and name != "train-lora" else (apart[:1], 1e-2)
        if max(compared) > limit:
            sys.exit(f"{name}: losses differ by {max(compared):.1e}: {ours['losses']} and {theirs['losses']}")
        return f"losses of {len(apart)} steps within {max(compared):.0e}" if len(compared) > 1 else f"first loss within {compared[0]:.0e}"
    if name.startswith("generate"):
        equal = sum(a == b for a, b in zip(ours["answers"], theirs["answers"], strict=True))
        return f"{equal} of {len(theirs['answers'])} answers equal, token by token"
    return f"{ours['runs']} runs" if ours["runs"] == theirs["runs"] else f"{ours['runs']} runs against a sample of {theirs['runs']}"


def busy(seconds=1.0):
    """Cores that other processes keep busy while this program waits; None if unknown."""
    def jiffies():
        fields = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _, _, *rest = map(int, fields)
        return user + nice + system + sum(rest)
    try:
        before = jiffies()
        time.sleep(seconds)
        return round((jiffies() - before) / os.sysconf("SC_CLK_TCK") / seconds, 2)
    except (OSError, ValueError):
        return None


def measure(name, what, ours, theirs, key, more_is_better, rounds, dtype):
    sides = {"swat": [], "peer": []}
    busy_before = []
    for i in range(rounds):
        for side, run in (("swat", ours), ("peer", theirs)):
            busy_before.append(busy())
            start = time.perf_counter()
            result = run()
            sides[side].append(result)
            seconds = time.perf_counter() - start
            print(f"{name} {i + 1}/{rounds} {side}: {key} {result[key]:.4g} ({seconds:.0f} s)", file=sys.stderr, flush=True)
    medians = {side: statistics.median(r[key] for r in results) for side, results in sides.items()}
    ratio = medians["swat"] / medians["peer"] if more_is_better else medians["peer"] / medians["swat"]
    peaks = {side: max(r["peak_bytes"] for r in results) for side, results in sides.items() if "peak_bytes" in results[0]}
    return {"name": name, "what": what, "unit": key, "rounds": {s: [r[key] for r in results] for s, results in sides.items()},
            "median": medians, "swat_is_faster_by": ratio, "peak_bytes": peaks, "agreement": agreement(name, sides["swat"][0], sides["peer"][0], dtype),
            "peer": sides["peer"][0]["peer"], "busy_cores_before": busy_before}


def busiest_before(measurement):
    return max((b for b in measurement["busy_cores_before"] if b is not None), default=0)


def kept(path, about, make):
    """The measurement of an earlier run of the same programs on an idle machine, or a new one."""
    try:
        known = json.loads(path.read_text())
        if known["about"] == about and busiest_before(known["measured"]) <= MOST_BUSY:
            return known["measured"]
    except (OSError, ValueError, KeyError):
        pass
    measured = make()
    path.write_text(json.dumps({"about": about, "measured": measured}))
    return measured


def machine():
    try:
        cpu = re.search(r"model name\s*:\s*(.+)", pathlib.Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):
        cpu = platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system()}


def table(report):
    lines = ["| | swat | PyTorch | swat is faster by | peak memory | same work? |", "|---|---|---|---|---|---|"]
    for m in report["measurements"]:
        unit = "tok/s" if m["unit"] == "tok_per_s" else "s"
        rate = lambda side: f"{m['median'][side]:.3g} {unit}"
        peak = " / ".join(f"{m['peak_bytes'][s] / 2**30:.2f}" for s in ("swat", "peer") if s in m["peak_bytes"])
        peak = f"{peak} GiB" if "/" in peak else "–"
        lines.append(f"| {m['what']} | {rate('swat')} | {rate('peer')} | **{m['swat_is_faster_by']:.2f} ×** | {peak} | {m['agreement']} |")
    about = (f"{report['machine']['cpu']}, {report['threads']} threads; {report['model']} in {report['dtype']}; {report['measurements'][0]['peer']}; "
             f"{report['swat']}; medians of {report['rounds']} alternating rounds. Large products alone: swat {report['ceilings']['swat'] / 1e9:.0f} GFLOP/s, "
             f"PyTorch {report['ceilings']['peer'] / 1e9:.0f}.")
    return "\n".join(lines) + f"\n\n{about}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swat", type=pathlib.Path, required=True, help="the release binary")
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="directory for inputs and large outputs")
    parser.add_argument("--out", type=pathlib.Path, default=HERE.parent.parent / "docs" / "results")
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="train, train-masked, train-lora, generate-1, generate-20, sweep, sweep-chat")
    args = parser.parse_args()
    sides = Sides(args)
    chosen = measurements(sides)
    if unknown := set(args.only or []) - set(chosen):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(chosen)}")
    about = {"machine": machine(), "threads": args.threads, "model": args.model.resolve().name, "dtype": args.dtype, "rounds": args.rounds,
             "swat": sides.run([args.swat, "--version"]).strip()}
    ceilings = sides.ceilings()
    results = [kept(args.work / f"measured-{args.dtype}-{name}.json", about, lambda: measure(name, *what, args.rounds, args.dtype))
               for name, what in chosen.items() if not args.only or name in args.only]
    report = {**about, "ceilings": ceilings, "measurements": results}
    busiest = max((busiest_before(m) for m in results), default=0)
    if busiest > MOST_BUSY:
        print(json.dumps(report, indent=1, ensure_ascii=False))
        sys.exit(f"no table is written: other work kept {busiest:.2f} cores busy, at most {MOST_BUSY} may be")
    args.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", report["machine"]["cpu"].lower().replace("(r)", "")).strip("-")
    stem = args.out / f"peers-{'' if args.dtype == 'f32' else args.dtype + '-'}{slug}-{report['machine']['cores']}-cores"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    stem.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
