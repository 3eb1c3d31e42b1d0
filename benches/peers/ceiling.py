"""What this machine multiplies in PyTorch: FLOPs a second of torch.nn.functional.linear on square matrices.

usage: ceiling.py [--dtype bf16] [--side 2048] [--repeats 20]
"""
import time

from measure import DTYPES, parser, report
import torch


def main():
    p = parser(__doc__, model=False)
    p.set_defaults(repeats=20)
    p.add_argument("--side", type=int, default=2048)
    args = p.parse_args()
    x, w = (torch.randn(args.side, args.side).to(DTYPES[args.dtype]) for _ in range(2))
    best = float("inf")
    with torch.inference_mode():
        for _ in range(args.warmup + args.repeats):
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            best = min(best, time.perf_counter() - start)
    report(measurement="ceiling", side=args.side, flops_per_s=2 * args.side**3 / best)


if __name__ == "__main__":
    main()
