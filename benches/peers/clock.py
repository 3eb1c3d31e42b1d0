"""Timing of the peers of the kernel benches, as in benches/common, at the shapes of benches/shapes.json.

Random data; buffers that are rotated so that together they exceed three times the L2 cache; on a GPU, CUDA events around many calls,
queued behind one that is not counted, and calls under 50 µs captured in a CUDA graph; samples of about 5 ms, of which the median and
the 10th and 90th percentiles are reported, one JSON object a line on stdout.
"""
import argparse
import itertools
import json
import pathlib
import statistics
import sys
import time

import torch

SAMPLES, SAMPLE_S, MOST_S, LEAST = 21, 0.005, 1.0, 7
SHORT_S, LONG_S, REPLAYED = 50e-6, 1e-3, 64
SHAPES = pathlib.Path(__file__).parent.parent / "shapes.json"


def arguments(doc, families):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("filters", nargs="*", help="parts of ids family/operation/shape to choose by; all without any")
    p.add_argument("--device", default="cuda", help="cuda (default), or cpu with --tiny to try the script out")
    p.add_argument("--tiny", action="store_true", help="tiny shapes, and no compilation: the numbers mean nothing")
    p.add_argument("--list", action="store_true", help=f"print the families ({', '.join(families)}) and stop")
    args = p.parse_args()
    if args.list:
        print("\n".join(families))
        sys.exit(0)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        sys.exit(3)
    if not args.device.startswith("cuda") and not args.tiny:
        p.error("--device cpu: only with --tiny; the CPU's peer is benches/peers/compare.py")
    return args


class Bench:
    """Times calls and prints the results."""

    def __init__(self, args):
        self.filters, self.tiny, self.device = args.filters, args.tiny, torch.device(args.device)
        self.cuda = self.device.type == "cuda"
        # As on our side: bf16 on a GPU, f32 on the CPU.
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        shapes = json.loads(SHAPES.read_text())
        self.scale = shapes["tiny" if self.tiny else "gpu"]
        self.all_models = {model["name"]: model for model in shapes["models"]}
        self.models, self.tokens = [self.all_models[name] for name in self.scale["models"]], self.scale["tokens"]
        cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size if self.cuda else 0
        self.rotated_bytes = self.scale["rotated_caches"] * cache_bytes
        self.product = torch.cuda.get_device_name(self.device) if self.cuda else "CPU, a trial"

    def random(self, *shape, dtype=None, grad=False):
        return torch.randn(*shape, device=self.device).to(dtype or self.dtype).requires_grad_(grad)

    def compiled(self, function):
        return torch.compile(function, dynamic=False, backend="eager" if self.tiny else "inductor")

    def element(self):
        return torch.empty(0, dtype=self.dtype).element_size()

    def run(self, family, op, shape, variant, cost, make, call, capture=True):
        """`cost` (bytes, flops) of a call; `make()` the tensors of one; `call(*tensors)`."""
        if self.filters and not any(part in f"{family}/{op}/{shape}/{variant}" for part in self.filters):
            return
        size = max(cost[0], 1 << 16)
        try:
            sets = [make() for _ in range(self.rotated_bytes // size + 1 if cost[0] else 1)]
            samples = self.samples(sets, call, capture)
        except (RuntimeError, NotImplementedError) as error:
            # A peer that does not support this shape is reported as missing.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"{family}/{op}/{shape}/{variant}: {reason}", file=sys.stderr)
            print(json.dumps({"family": family, "op": op, "shape": shape, "missing": variant, "reason": reason}), flush=True)
            return
        low, high = quantiles(samples)
        print(json.dumps({"id": f"{family}/{op}/{shape}/{variant}", "family": family, "op": op, "shape": shape, "variant": variant,
                          "peer": True, "ns": statistics.median(samples), "low_ns": low, "high_ns": high, "samples": len(samples),
                          "bytes": cost[0], "flops": cost[1], "device": self.product, "torch": torch.__version__}), flush=True)

    def samples(self, sets, call, capture):
        """Nanoseconds a call, one for each sample."""
        turn = itertools.cycle(sets)
        for _ in range(max(3, len(sets))):
            call(*next(turn))
        one = self.elapsed(lambda: call(*next(turn)))
        work, calls_a_turn = (lambda: call(*next(turn))), 1
        if self.cuda and capture and one < SHORT_S:
            calls_a_turn = len(sets) * -(-REPLAYED // len(sets))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(calls_a_turn):
                    call(*next(turn))
            work = graph.replay
            work()
        repeats = 1
        while True:
            spent = self.elapsed(lambda: [work() for _ in range(repeats)])
            if spent >= SAMPLE_S / 2 or repeats >= 1 << 20:
                break
            repeats *= 4
        repeats = max(1, round(repeats * SAMPLE_S / spent))
        samples, total = [], 0.0
        while len(samples) < LEAST or (len(samples) < SAMPLES and total < MOST_S):
            spent = self.elapsed(lambda: [work() for _ in range(repeats)], before=work if one < LONG_S else None)
            total += spent
            samples.append(spent * 1e9 / (repeats * calls_a_turn))
        return samples

    def elapsed(self, work, before=None):
        """Seconds by the device's clock."""
        if not self.cuda:
            start = time.perf_counter()
            work()
            return max(time.perf_counter() - start, 1e-9)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if before:
            before()
        start.record()
        work()
        end.record()
        end.synchronize()
        return max(start.elapsed_time(end) / 1e3, 1e-9)


def quantiles(samples):
    """The 10th and the 90th percentile, linearly interpolated."""
    ordered = sorted(samples)
    def at(q):
        place = q * (len(ordered) - 1)
        low = int(place)
        return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (place - low)
    return at(0.1), at(0.9)
