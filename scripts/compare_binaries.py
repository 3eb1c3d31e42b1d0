#!/usr/bin/env python3
"""Runs two swat binaries with the same seeds and compares their results: does a change keep every byte?

usage: compare_binaries.py OLD NEW [--work DIR] [--device DEVICE] [--only NAME ...]

Each binary gets the embedded tiny model and its data (as `swat demo` writes them) and runs probe, robustness, search, tune (in full, two
phases; adapters), drift, eval, generate, plan and score; score also on the models of tests/golden. Both run in the same directory, one
after the other; what they leave is kept in DIR/old and DIR/new (default: a temporary directory). Compared are exit codes, JSON on stdout,
and every file: weights, maps, losses, logits and texts byte for byte; JSON by value and order of keys, except for times, rates, measured
memory and versions (SKIPPED), of which only the keys count. About a minute on two cores. `--only NAME ...` repeats some of the commands in
a DIR in which all have run.

Exit code 1: something differs; each difference is printed. 2: a command failed on both sides. Needs Python 3.9.
"""
import argparse
import json
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests/golden"
# Values that differ from run to run: times, rates, what was measured of this machine, and versions.
SKIPPED = re.compile(r"(.*_)?(seconds|ms|ns)|.*_per_s|speed_of_light|peak_bytes|free_bytes|version|swat_version|commit|roofline|date")
PROMPTS = ["how do i plusant the drumir ?", "show me a way to rufont the lopir .", "i want to relump the nomuk , help me ."]
# `swat demo` has written the model and all data once this is there.
DEMO_READY = "stages/probe.json"
DEMO_SECONDS = 300
SHOWN = 12
# The golden model that is tuned; words w0 to w30 for all of them, and a turn that ends with w0.
TUNED = "qwen3"
END = {"id": 0, "content": "w0", "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
TOKENIZER = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [END], "normalizer": None,
             "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
             "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(31)}, "unk_token": "w0"}}
TEMPLATE = "{% for m in messages %}w2 {{ m['content'] }}w0{% endfor %}{% if add_generation_prompt %}w2 {% endif %}"


def commands(device):
    """Name and arguments of each command, in order; paths are relative to the side's directory."""
    common = ["--device", device, "--seed", "3", "--json"]
    security = ["--security", "data/security.jsonl"]
    model = ["--model", "model"]
    tune = [*model, "--data", "data/train.jsonl", "--batch-size", "4", "--max-length", "64", "--force"]
    answers = [*model, "--chat", "chat.jsonl", "--max-new-tokens", "12"]
    yield "probe", ["probe", *model, *security, "--out", "probe.safetensors", "--force", *common]
    yield "robustness", ["robustness", *model, *security, "--probe", "probe.safetensors", "--members", "1", "--split", "valid",
                         "--out", "map.json", "--force", *common]
    yield "search", ["search", "--map", "map.json", "--out", "mods.json", "--force", *common]
    yield "tune-full", ["tune", *tune, "--mods", "mods.json", "--mods-steps", "5", "--steps", "5", "--save-every", "3",
                        "--weight-decay", "0.1", "--grad-accum", "2", "--out", "tuned-full", *common]
    yield "tune-lora", ["tune", *tune, "--method", "lora", "--steps", "5", "--packing", "true", "--ema-decay", "0.9",
                        "--out", "tuned-lora", *common]
    yield "drift", ["drift", *model, "--tuned", "tuned-full", "--probe", "probe.safetensors", *security, *common]
    yield "eval", ["eval", "--model", "tuned-lora", *security, "--limit", "8", "--answer-tokens", "8", *common]
    yield "generate-greedy", ["generate", *answers, *common]
    yield "generate-sampled", ["generate", *answers, "--temperature", "0.8", "--top-p", "0.9", *common]
    yield "plan", ["plan", *model, *common]
    yield "score-tiny", ["score", *model, "--ids", "1,5,9,2,7", "--logits-out", "logits.safetensors", *common]
    for name in golden():
        outputs = ["--logits-out", f"{name}-logits.safetensors", "--hidden-out", f"{name}-hidden.safetensors"]
        yield f"score-{name}", ["score", "--model", f"golden/{name}", "--ids", "8,30,25,24,5,11,17,14,6,19", *outputs, *common]
    yield "tune-golden", ["tune", "--model", f"golden/{TUNED}", "--data", "golden.jsonl", "--steps", "4", "--batch-size", "2", "--lr", "1e-2",
                          "--force", "--out", "tuned-golden", *common]


def golden():
    return sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


def prepare(binary, side, device):
    """Lets `swat demo` write the tiny model and its data, and ends it when that is done; copies the golden models."""
    side.mkdir(parents=True)
    with tempfile.TemporaryFile("w+") as log:
        command = [binary, "demo", "--quiet", "--device", device, "--out", "demo"]
        demo = subprocess.Popen(command, cwd=side, stdout=log, stderr=log)
        end = time.time() + DEMO_SECONDS
        while not (side / "demo" / DEMO_READY).is_file() and demo.poll() is None and time.time() < end:
            time.sleep(0.2)
        demo.kill()
        demo.wait()
        if not (side / "demo" / DEMO_READY).is_file():
            log.seek(0)
            sys.exit(f"{binary} demo: no {DEMO_READY}: {log.read().strip()[-500:]}")
    for name in ("model", "data"):
        (side / "demo" / name).rename(side / name)
    shutil.rmtree(side / "demo")
    (side / "chat.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    for name in golden():
        shutil.copytree(GOLDEN / name, side / "golden" / name)
        # They have no tokenizer of their own.
        (side / "golden" / name / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        (side / "golden" / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w0", "chat_template": TEMPLATE}))
    lines = [{"prompt": f"w{i} w{i + 3}", "completion": f"w{i + 5} w{i + 1} w{i + 9}"} for i in range(1, 9)]
    (side / "golden.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(binary, side, name, arguments):
    """Runs a command; its stdout is left as NAME.stdout.json or .jsonl. Returns exit code and stderr."""
    done = subprocess.run([binary, *arguments], cwd=side, capture_output=True, text=True)
    kind = "jsonl" if name.startswith("generate") else "json"
    (side / f"{name}.stdout.{kind}").write_text(done.stdout)
    return done.returncode, done.stderr.strip()


class Differences:
    """What differs, printed as it is found; of each file the first few."""

    def __init__(self):
        self.count = 0
        self.here = 0

    def file(self):
        self.here = 0

    def add(self, place, old, new):
        self.count += 1
        self.here += 1
        if self.here <= SHOWN:
            print(f"DIFFERS {place}: {shortened(old)} | {shortened(new)}")
        elif self.here == SHOWN + 1:
            print(f"DIFFERS {place}: and more in this file")


def shortened(value):
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return text if len(text) <= 100 else text[:97] + "..."


def compare_json(found, place, old, new):
    """Values, and keys with their order; of skipped keys not the values."""
    if type(old) is not type(new):
        found.add(place, old, new)
    elif isinstance(old, dict):
        if set(old) != set(new):
            found.add(f"{place}: keys", [key for key in old if key not in new], [key for key in new if key not in old])
        elif list(old) != list(new):
            found.add(f"{place}: order of keys", list(old), list(new))
        for key in old:
            if key in new and not SKIPPED.fullmatch(key):
                compare_json(found, f"{place}.{key}", old[key], new[key])
    elif isinstance(old, list):
        if len(old) != len(new):
            found.add(f"{place}: length", len(old), len(new))
        for i, (a, b) in enumerate(zip(old, new)):
            compare_json(found, f"{place}[{i}]", a, b)
    elif old != new:
        found.add(place, old, new)


def tensors(path):
    """Header and data of a safetensors file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:8 + size]), data[8 + size:]


def compare_tensors(found, place, old, new):
    (old_header, old_data), (new_header, new_data) = tensors(old), tensors(new)
    for header in (old_header, new_header):
        # Metadata holds JSON as text.
        for key, text in header.get("__metadata__", {}).items():
            try:
                header["__metadata__"][key] = json.loads(text)
            except ValueError:
                pass
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    compare_json(found, f"{place}: header", old_header, new_header)
    for name, entry in old_header.items():
        other = new_header.get(name)
        if name != "__metadata__" and other and other.get("dtype") == entry["dtype"]:
            a, b = (data[slice(*h["data_offsets"])] for data, h in ((old_data, entry), (new_data, other)))
            if a != b:
                unequal = sum(x != y for x, y in zip(a, b))
                found.add(f"{place}: {name}", f"{len(a)} bytes", f"{unequal} of them differ")


def compare(found, old, new):
    """Every file of two directories."""
    names = [{str(path.relative_to(side)) for path in side.rglob("*") if path.is_file()} for side in (old, new)]
    for name in sorted(names[0] ^ names[1]):
        found.file()
        found.add(name, *("there" if name in side else "missing" for side in names))
    for name in sorted(names[0] & names[1]):
        found.file()
        a, b = old / name, new / name
        if a.read_bytes() == b.read_bytes():
            continue
        if name.endswith(".safetensors"):
            compare_tensors(found, name, a, b)
        elif name.endswith((".json", ".jsonl")):
            try:
                parsed = [[json.loads(line) for line in path.read_text().splitlines()] if name.endswith("l")
                          else json.loads(path.read_text()) for path in (a, b)]
                compare_json(found, name, *parsed)
            except ValueError as error:
                found.add(name, "not JSON", str(error))
        else:
            lines = list(zip(a.read_text().splitlines(), b.read_text().splitlines()))
            first = next((pair for pair in lines if pair[0] != pair[1]), ("", ""))
            found.add(name, *first)
    return len(names[0] | names[1])


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("old", type=pathlib.Path)
    p.add_argument("new", type=pathlib.Path)
    p.add_argument("--work", type=pathlib.Path)
    p.add_argument("--device", default="cpu")
    p.add_argument("--only", nargs="+", metavar="NAME")
    options = p.parse_args()
    temporary = None if options.work else tempfile.TemporaryDirectory()
    work = (options.work or pathlib.Path(temporary.name)).resolve()
    # One directory for both, because absolute paths are part of some results.
    shared = work / "run"
    ended = {}
    for binary, name in ((options.old, "old"), (options.new, "new")):
        if (work / name).is_dir():
            (work / name).rename(shared)
        else:
            prepare(str(binary.resolve()), shared, options.device)
        for command, arguments in commands(options.device):
            if not options.only or command in options.only:
                ended.setdefault(command, []).append(run(str(binary.resolve()), shared, command, arguments))
                print(f"{name} {command}: exit code {ended[command][-1][0]}", flush=True)
        shared.rename(work / name)
    found, failed = Differences(), []
    for command, ((old_code, old_error), (new_code, new_error)) in ended.items():
        if old_code != new_code:
            found.file()
            found.add(f"{command}: exit code", f"{old_code} {old_error[-200:]}", f"{new_code} {new_error[-200:]}")
        elif old_code:
            failed.append(f"FAILED on both sides: {command}: {old_error[-300:]}")
    files = compare(found, work / "old", work / "new")
    print("\n".join([*failed, f"{files} files, {found.count} differences"]))
    sys.exit(1 if found.count else 2 if failed else 0)


if __name__ == "__main__":
    main()
