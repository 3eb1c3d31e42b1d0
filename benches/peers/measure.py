"""Shared by the peers: threads, model, timing, memory, the result as JSON."""
import argparse
import json
import os
import resource
import statistics
import sys
import time

# Before torch is imported, whose thread pools read them once.
THREADS = int(os.environ.get("PEER_THREADS", "2"))
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = str(THREADS)

import torch  # noqa: E402
import transformers  # noqa: E402

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(THREADS)


DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def parser(doc, model=True):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if model:
        p.add_argument("--model", required=True, help="Hugging Face model directory")
    p.add_argument("--dtype", choices=DTYPES, default="f32", help="precision of weights and activations")
    p.add_argument("--warmup", type=int, default=2, help="runs that are not counted")
    p.add_argument("--repeats", type=int, default=5, help="runs of which the median counts")
    return p


def load(path, dtype):
    """The model with PyTorch's fused attention, and its tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], attn_implementation="sdpa")
    return model, tokenizer


def conversation(row):
    """The messages of a line of JSONL in one of the two shapes that the benchmarks use."""
    return row.get("messages") or [{"role": "user", "content": row["prompt"]}]


def rows(path):
    with open(path) as lines:
        return [json.loads(line) for line in lines if line.strip()]


def timed(run, warmup, repeats):
    """Seconds of each counted run of `run(i)`."""
    seconds = []
    for i in range(warmup + repeats):
        start = time.perf_counter()
        run(i)
        if i >= warmup:
            seconds.append(time.perf_counter() - start)
    return seconds


def median(values):
    return statistics.median(values)


def peak_bytes():
    """Largest resident set of this process, as swat's metrics report it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(**fields):
    json.dump({"peer": f"PyTorch {torch.__version__}, transformers {transformers.__version__}", "threads": THREADS,
               "peak_bytes": peak_bytes(), **fields}, sys.stdout)
    print()
