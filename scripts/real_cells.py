"""Does a recipe hold on real models? SmolLM2-135M-Instruct, aligned as docs/results/README.md says, and Qwen2.5-Coder-0.5B-Instruct as it is,
with harmless data and with a twentieth of answered harmful requests among them, with fixed recipes and with what `swat secure` chooses.

usage: real_cells.py --swat target/release/swat --work DIR [--models smollm2 qwen] [--seeds 0 1 2] [--secure 0] [--out docs/results/real-cells.md]

DIR holds models/, data/ and align/ as docs/results/README.md makes them, and gets the configurations docs/results/*-recipes.toml. `--secure` names
the seeds of `swat secure`, none without it. Every study and every run is kept in DIR: what was ended goes on. When a cell holds is that of
scripts/tiny_cells.py. Weights of evaluated models are removed, since a study of SmolLM2 writes half a gigabyte for each run.
"""
import argparse
import json
import pathlib
import random
import shutil
import subprocess

from tiny_cells import holds, mean, row, run, secure_rows, write

MODELS = {"smollm2": "SmolLM2", "qwen": "Qwen"}
# The length of `steps=` is that of the task's own examples, whatever is mixed in: 60 steps of 8.
SECURE = ["--schedule", "cosine", "--lr-warmup-steps", "3", "--steps", "71", "--batch-size", "8", "--max-length", "256", "--answer-tokens", "32",
          "--task-tokens", "32", "--dtype", "bf16", "--device", "cpu"]
OWN = {"smollm2": ["--model", "models/smollm2-135m-aligned", "--lr", "1e-4"],
       "qwen": ["--model", "models/qwen2.5-coder-0.5b-instruct", *(word for recipe in ("replay=.15,screen", "replay=.15,distil=1,screen", "replay=.3,distil=2,screen")
                                                                   for word in ("--recipe", f"plain+{recipe},lora=8,lr=2e-4"))]}


def study(swat, work, name, seeds):
    config = f"{name}-recipes.toml"
    shutil.copy(pathlib.Path(__file__).parent.parent / "docs/results" / config, work / config)
    out = work / f"study-{name}-recipes"
    for count in range(1, len(seeds) + 1):
        run(swat, "run", config, "--dtype", "bf16", "--set", f"tune.seeds={seeds[:count]}", "--quiet", cwd=work)
        for weights in (out / "tuned").glob("*/*.safetensors"):
            weights.unlink()
    return {s["name"]: s for s in json.loads((out / "outcome.json").read_text())["settings"]}


def attacked(work):
    """The training data with a twentieth of answered harmful requests among them, as `attack=.05` has."""
    rows, attack = ((work / "data" / name).read_text().splitlines() for name in ("train500.jsonl", "attack-openers.jsonl"))
    draw = random.Random(0)
    rows += draw.sample(attack, round(len(rows) * 0.05 / 0.95))
    draw.shuffle(rows)
    path = work / "data/train500-attacked.jsonl"
    path.write_text("".join(line + "\n" for line in rows))
    return path


def secure(swat, work, name, kind, seeds):
    """What `swat secure` chooses and measures: base, tuned, the recipes, and how many of its own verdicts were held."""
    train = work / "data/train500.jsonl" if kind == "benign" else attacked(work)
    runs = []
    for seed in seeds:
        out = work / "secured" / f"{name}-{kind}-{seed}"
        kept = out.with_suffix(".json")
        if not kept.exists():
            out.parent.mkdir(exist_ok=True)
            command = [swat, "secure", *OWN[name], "--data", train, "--security", work / "data/security.jsonl", "--task",
                       work / "data/task.jsonl", "--out", out, "--seed", seed, "--force", "--json", "--quiet", *SECURE]
            found = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, text=True, cwd=work)
            if found.returncode not in (0, 3):
                raise SystemExit(f"{out}: swat secure ended with {found.returncode}")
            kept.write_text(found.stdout)
            for made in (out, out.with_name(out.name + ".work")):
                shutil.rmtree(made, ignore_errors=True)
        runs.append(json.loads(kept.read_text()))
    chosen = [next(f"{t['recipe']} @ {t['alpha']:g}" for t in one["tried"] if t["chosen"]) for one in runs]
    return [mean([one["settings"][i] for one in runs]) for i in (0, 1)], "; ".join(chosen), sum(one["verdict"]["held"] for one in runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swat", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--secure", nargs="*", type=int, default=[])
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    swat, work = args.swat.resolve(), args.work.resolve()
    lines = []
    for name in args.models:
        found = study(swat, work, name, args.seeds)
        for kind in ("benign", "attack"):
            cell, given = f"{MODELS[name]}, {kind}", found["given"]
            own = {text: s for text, s in found.items() if text != "given" and ("attack=" in text) == (kind == "attack")}
            plain = next(s for text, s in own.items() if text.startswith("plain") and "merge=" not in text)
            lines.append(row(cell, "as given", None, given, None))
            lines += [row(cell, "plain" if s is plain else "", text, s, holds(given, s, plain)) for text, s in own.items()]
            if args.secure:
                (base, tuned), chosen, gates = secure(swat, work, name, kind, args.secure)
                lines += secure_rows(cell, base, tuned, chosen, holds(base, tuned, plain), gates, args.secure)
    seeds = f"Training seed {args.seeds[0]}" if len(args.seeds) == 1 else f"Means over training seeds {', '.join(map(str, args.seeds))}"
    text = f"# Recipes on real models\n\n{seeds}; `scripts/real_cells.py` says what a cell is, `scripts/tiny_cells.py` when it holds.\n\n"
    write(text, "model, data", lines, args.out)


if __name__ == "__main__":
    main()
