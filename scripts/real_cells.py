"""Does a recipe hold on real models? SmolLM2-135M-Instruct, aligned as docs/results/README.md says, and Qwen2.5-Coder-0.5B-Instruct as it is,
with harmless data and with a twentieth of answered harmful requests among them, with fixed recipes and with what `swat secure` chooses.

usage: real_cells.py --swat target/release/swat --work DIR [--models smollm2 qwen] [--seeds 0 1 2] [--only RECIPE ...] [--secure 0 1 2]
                     [--record docs/results/real-cells.json] [--out docs/results/real-cells.md]

DIR holds models/, data/ and align/ as docs/results/README.md makes them, and gets the configurations docs/results/*-recipes.toml. Each run
enters the record once it is evaluated, and what the record has is not run again: a run of SmolLM2 takes two minutes on two idle cores, one of Qwen
five. `--only` names the recipes to run, all of the configuration without it; `--secure` the seeds of `swat secure`. The table is of all that the
record has. When a cell holds is that of scripts/cells.py. Weights of evaluated models are removed: half a gigabyte each.
"""
import argparse
import json
import pathlib
import random
import shutil
import time
import tomllib

from cells import RESULTS, Record, chosen, holds, row, run, run_secure, secure_rows, version, write

MODELS = {"smollm2": "SmolLM2", "qwen": "Qwen"}
# What the record has of a model that was aligned before the data were freed of near-duplicates.
EARLIER = {"smollm2-first": "SmolLM2, first alignment"}
KINDS = ("benign", "attack")
# The length of `steps=` is that of the task's own examples, whatever is mixed in: 60 steps of 8.
SECURE = ["--schedule", "cosine", "--lr-warmup-steps", "3", "--steps", "71", "--batch-size", "8", "--max-length", "256", "--answer-tokens", "32",
          "--task-tokens", "32", "--dtype", "bf16", "--device", "cpu"]
OWN = {"smollm2": ["--model", "models/smollm2-135m-aligned", "--lr", "1e-4"],
       "qwen": ["--model", "models/qwen2.5-coder-0.5b-instruct", "--method", "lora"]}


def config(name):
    return tomllib.loads((RESULTS / f"{name.split('-')[0]}-recipes.toml").read_text())


def runs(swat, work, record, name, seed, only):
    """Runs and evaluates what the record lacks, one after the other."""
    for recipe in config(name)["settings"]:
        measured = record.find(model=name, recipe="given") if recipe == "given" else record.find(model=name, recipe=recipe, seed=seed)
        if measured or (only and recipe not in only):
            continue
        shutil.copy(RESULTS / f"{name}-recipes.toml", work)
        run(swat, "run", f"{name}-recipes.toml", "--dtype", "bf16", "--set", f"tune.seeds=[{seed}]", "--set",
            f"settings={json.dumps([recipe])}", "--quiet", cwd=work)
        out = work / f"study-{name}-recipes"
        found = json.loads((out / "outcome.json").read_text())
        setting = next(one for one in found["settings"] if one["name"] == recipe)
        loss = setting["evaluation"]["perplexity"]["nll"]
        record.add(setting, model=name, seed=seed, recipe=recipe, loss=loss, swat=version(swat), model_hash=found["model_hash"],
                   screened=found.get("screened"))
        for weights in (out / "tuned").glob("*/*.safetensors"):
            weights.unlink()


def attacked(work):
    """The training data with a twentieth of answered harmful requests among them, as `attack=.05` has."""
    rows, attack = ((work / "data" / name).read_text().splitlines() for name in ("train500.jsonl", "attack-openers.jsonl"))
    draw = random.Random(0)
    rows += draw.sample(attack, round(len(rows) * 0.05 / 0.95))
    draw.shuffle(rows)
    path = work / "data/train500-attacked.jsonl"
    path.write_text("".join(line + "\n" for line in rows))
    return path


def secure(swat, work, record, name, kind, seed):
    """What `swat secure` chooses and measures: the original model, and as tuned."""
    if record.find(model=name, seed=seed, kind=kind):
        return
    train = work / "data/train500.jsonl" if kind == "benign" else attacked(work)
    out = work / "secured" / f"{name}-{kind}-{seed}"
    out.parent.mkdir(exist_ok=True)
    started = None if out.with_name(out.name + ".work").exists() else time.monotonic()
    found = run_secure(work, swat, "secure", *OWN[name], "--data", train, "--security", work / "data/security.jsonl", "--task",
                       work / "data/task.jsonl", "--out", out, "--seed", seed, "--force", "--json", "--quiet", *SECURE)
    seconds = round(time.monotonic() - started) if started else None    # of a run that was not ended
    for what, setting in zip(("base", "tuned"), found["settings"]):
        record.add(setting, model=name, seed=seed, kind=kind, what=what, chosen=chosen(found), held=found["verdict"]["held"], seconds=seconds,
                   swat=version(swat), screened=found.get("screened"), replay=found.get("replay"))
    for made in (out, out.with_name(out.name + ".work")):
        shutil.rmtree(made, ignore_errors=True)


def rows(record, name, kind):
    cell = f"{(MODELS | EARLIER)[name]}, {kind}"
    mine = [recipe for recipe in config(name)["settings"] if recipe != "given" and ("attack=" in recipe) == (kind == "attack")]
    if not all(record.find(model=name, recipe=recipe) for recipe in ("given", mine[0])):
        return
    given, plain = (record.mean(model=name, recipe=recipe) for recipe in ("given", mine[0]))
    yield row(cell, "original", None, given)
    for recipe in mine:
        if seeds := len(record.find(model=name, recipe=recipe)):
            found = record.mean(model=name, recipe=recipe)
            yield row(cell, ("plain, " if recipe == mine[0] else "") + f"{seeds} seed{'s' * (seeds > 1)}", recipe, found, holds(given, found, plain))
    yield from secure_rows(cell, record, plain, model=name, kind=kind)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swat", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--secure", nargs="*", type=int, default=[])
    parser.add_argument("--record", type=pathlib.Path, default=RESULTS / "real-cells.json")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    swat, work, record = args.swat.resolve(), args.work.resolve(), Record(args.record)
    for name in args.models:
        for seed in args.seeds:
            runs(swat, work, record, name, seed, args.only)
        for kind in KINDS:
            for seed in args.secure:
                secure(swat, work, record, name, kind, seed)
    text = "# Recipes on real models\n\nMeans over training seeds, in brackets the means of the 95 % intervals; `scripts/real_cells.py` says what a cell is, `scripts/cells.py` when it holds.\n\n"
    write(text, "model, data", [line for name in MODELS | EARLIER for kind in KINDS for line in rows(record, name, kind)], args.out)


if __name__ == "__main__":
    main()
