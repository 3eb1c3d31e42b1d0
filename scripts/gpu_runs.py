"""Child processes of gpu_check.py: each in a session of its own, killed with all its children at its time limit; and parsers of
their output: tests, benches, profiles, sanitizers, Nsight Compute.

A run returns a dict with `status` (`passed`, `failed`, `hung`) and its results. Nothing here raises because of what a process
does.
"""
import csv
import io
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
# The line that libtest prints when a test has ended.
# What NVIDIA's tools print where they are not permitted, such as in a container without access to performance counters.
CANNOT = re.compile(r"ERR_NVGPUCTRPERM|Failed to initialize the profiler[^\n]*|Device not supported")
TEST_LINE = re.compile(r"^test (\S+) \.\.\. (ok|FAILED|ignored)", re.M)


class Process:
    """A command in a session of its own. Its output goes to a file, as a pipe may be held open by a child."""

    alive = set()

    def __init__(self, command, environment=None):
        self.output, self.started = tempfile.TemporaryFile(), time.time()
        self.error = self.child = None
        try:
            self.child = subprocess.Popen(
                [str(part) for part in command], cwd=HERE, env={**os.environ, **(environment or {})},
                start_new_session=True, stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT)
            Process.alive.add(self)
        except OSError as error:
            self.error = str(error)

    def wait(self, seconds):
        """(exit code, output, seconds). The code is None if it was killed, 127 if it did not start."""
        if self.child is None:
            return 127, self.error, 0.0
        try:
            code = self.child.wait(max(0.1, seconds))
        except subprocess.TimeoutExpired:
            code = None
        self.kill()
        self.output.seek(0)
        text = self.output.read().decode(errors="replace")
        self.output.close()
        return code, text, round(time.time() - self.started, 2)

    def kill(self):
        """Kills the process and its children; one that hangs in the driver is left behind."""
        Process.alive.discard(self)
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        try:
            self.child.wait(5)
        except subprocess.TimeoutExpired:
            print(f"process {self.child.pid} cannot be killed", flush=True)


def kill_all():
    for process in list(Process.alive):
        process.kill()


def run(command, seconds, environment=None):
    return Process(command, environment).wait(seconds)


def outcome(code, text, took, keep=3000):
    """The common part of every kind of run."""
    status = "hung" if code is None else "passed" if code == 0 else "failed"
    found = {"status": status, "seconds": took, "exit": code}
    if code is None:
        found["reason"] = f"killed after {took:.0f} s"
    elif code:
        found["reason"] = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    if code != 0:
        found["tail"] = text[-keep:]
    return found


# ---- tests


def listed_tests(executable):
    """Names of an executable's tests; an error text if it does not list them."""
    code, text, _ = run([executable, "--list", "--format", "terse"], 20)
    names = re.findall(r"^(\S+): test$", text, re.M)
    return names if code == 0 and names else f"{executable.name} does not list its tests: {text.strip()[-200:] or code}"


def test_run(executable, names, seconds, environment, prefix=(), threads=4):
    """Runs tests by name in one process. If that fails, each test that did not pass is run again in a process of its own,
    for half as long in total: after a fault every later test of a process fails."""
    began = time.time()
    command = [*prefix, executable, "--exact", *names, "--test-threads", threads]
    code, text, took = run(command, seconds, environment)
    found = outcome(code, text, took)
    results = {name: {"ok": "passed", "FAILED": "failed"}.get(said, said) for name, said in TEST_LINE.findall(text)}
    found["tests"] = {name: results.get(name, "not reached") for name in names}
    if found["status"] == "passed" and not all(said == "passed" for said in found["tests"].values()):
        found.update(status="failed", reason="not all of its tests were run", tail=text[-3000:])
    if found["status"] != "passed" and not prefix and len(names) > 1:
        ends = time.time() + seconds / 2
        for name in names:
            if found["tests"][name] != "passed" and time.time() < ends:
                code, text, _ = run([executable, "--exact", name], seconds / 4, environment)
                alone = outcome(code, text, 0, 1500)
                found["tests"][name] = f"{alone['status']} alone"
                if alone["status"] != "passed":
                    found.setdefault("failures", {})[name] = alone["tail"]
    found["passed"] = sum(said.startswith("passed") for said in found["tests"].values())
    found["seconds"] = round(time.time() - began, 2)
    return found


def sanitizer_run(tool, executable, names, seconds, environment):
    command = [*tool, "--error-exitcode", 86, "--print-limit", 5]
    found = test_run(executable, names, seconds, environment, command, 1)
    if refused := CANNOT.search(found.get("tail", "")):
        return {"status": "left out", "reason": f"it cannot run here: {refused[0]}"}
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", found.get("tail", ""))
    if summary:
        found["summary"] = summary[-1]
    return found


# ---- benches


def json_lines(text):
    found = []
    for line in text.splitlines():
        try:
            found += [json.loads(line)] if line.startswith("{") else []
        except json.JSONDecodeError:
            # A killed process may leave an incomplete last line.
            pass
    return found


def bench_run(command, seconds):
    """The JSON lines of a bench; of a hanging one, those so far."""
    code, text, took = run(command, seconds)
    found = outcome(code, text, took)
    found["lines"] = json_lines(text)
    if found["status"] == "passed" and not any("ns" in line for line in found["lines"]):
        found.update(status="failed", reason="it measured nothing", tail=text[-2000:])
    return found


def json_run(command, seconds):
    """The JSON object that a command prints."""
    code, text, took = run(command, seconds)
    found = outcome(code, text, took)
    try:
        found["value"] = json.loads(text[text.index("{"):]) if code == 0 else None
    except ValueError:
        found.update(status="failed", reason="it printed no JSON", tail=text[-2000:])
    return found


def ncu_run(ncu, report, command, seconds):
    """Profiles a command within its profiler range; metrics by kernel name."""
    began = time.time()
    profiled = [ncu, "--set", "full", "--clock-control", "none", "--profile-from-start", "off", "-f", "-o", report]
    profiled += command
    code, text, took = run(profiled, seconds)
    found = outcome(code, text, took)
    if refused := CANNOT.search(text):
        return {"status": "left out", "reason": f"it cannot profile here: {refused[0]}"}
    if code != 0:
        return found
    read = [ncu, "--import", f"{report}.ncu-rep", "--page", "raw", "--csv"]
    code, text, _ = run(read, max(5, began + seconds - time.time()))
    rows = list(csv.reader(io.StringIO(text[text.find('"ID"'):]))) if '"ID"' in text else []
    kernels = []
    # The second row holds the units.
    for row in rows[2:]:
        metrics = {name: f"{value} {unit}".strip() for name, unit, value in zip(*rows[:2], row) if value}
        kernels.append({"kernel": metrics.pop("Kernel Name", "?"), "metrics": metrics})
    found.update(kernels=kernels, seconds=round(time.time() - began, 2))
    if not kernels:
        found.update(status="failed", reason="ncu profiled no kernel", tail=text[-2000:])
    return found


# ---- models


def elements(model, layers):
    """Number of parameters of a model of benches/shapes.json with this many layers."""
    return sum(rows * columns for _, rows, columns in tensors(model, layers))


def tensors(model, layers):
    h, ffn, vocab = model["hidden"], model["ffn"], model["vocab"]
    q, kv = model["heads"] * model["head_dim"], model["kv_heads"] * model["head_dim"]
    yield "model.embed_tokens.weight", vocab, h
    for i in range(layers):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", 1, h
        for name, rows, columns in (("q", q, h), ("k", kv, h), ("v", kv, h), ("o", h, q)):
            yield f"{at}self_attn.{name}_proj.weight", rows, columns
        yield at + "post_attention_layernorm.weight", 1, h
        for name, rows, columns in (("gate", ffn, h), ("up", ffn, h), ("down", h, ffn)):
            yield f"{at}mlp.{name}_proj.weight", rows, columns
    yield "model.norm.weight", 1, h
    if not model["tied"]:
        yield "lm_head.weight", vocab, h


def write_model(folder, model, layers, deadline):
    """A model directory with weights between ±2^-7 and ±2^-5, norms of one. Raises TimeoutError past the deadline."""
    folder.mkdir(parents=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
              "hidden_size": model["hidden"], "intermediate_size": model["ffn"], "num_hidden_layers": layers,
              "num_attention_heads": model["heads"], "num_key_value_heads": model["kv_heads"],
              "head_dim": model["head_dim"], "vocab_size": model["vocab"], "tie_word_embeddings": model["tied"],
              "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
                 "pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": [], "normalizer": None,
                 "post_processor": None, "decoder": None, "truncation": None, "padding": None}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    # bf16 with random sign and mantissa and the exponents of 2^-7 and 2^-6; one block, repeated.
    draw, count = random.Random(0), 1 << 22
    block = bytearray(2 * count)
    block[0::2] = draw.randbytes(count)
    block[1::2] = draw.randbytes(count).translate(bytes(0x3c | (i & 1) << 7 for i in range(256)))
    header, at = {}, 0
    shapes = list(tensors(model, layers))
    for name, rows, columns in shapes:
        shape = [columns] if "norm" in name else [rows, columns]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + 2 * rows * columns]}
        at += 2 * rows * columns
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, rows, columns in shapes:
            left = 2 * rows * columns
            if "norm" in name:
                out.write(b"\x80\x3f" * (left // 2))
                continue
            while left:
                if time.time() > deadline:
                    raise TimeoutError
                left -= out.write(memoryview(block)[:min(left, len(block))])
