"""Does a recipe hold elsewhere? Five tiny aligned models × two tasks × {benign, attack} × three training seeds, with fixed recipes and with
what `swat secure` chooses.

usage: tiny_cells.py --swat target/release/swat --work DIR [--models 1 2 3 4 5] [--only NAME ...] [--secure]
                     [--record docs/results/tiny-cells.json] [--out docs/results/tiny-cells.md]

Each model has a language and weights of its own (`swat demo --make-model`; the first is the embedded one). The tasks are the demo's new style of
answers, and a task that is far from what the model knows. `attack`: a twentieth of the examples answer forbidden requests. A cell is a
model, a task and benign or attack; scripts/cells.py says when it holds.

What the record has is not run again; `--only` names the settings that may be, `--secure` runs `swat secure` too. The table is of all that the record has.
Studies are kept in DIR. A setting takes half a minute a cell on two idle cores, with its three seeds; `swat secure` three minutes.

Fixed recipes are measured on all prompts of test and ood and on all tasks; `swat secure` on the half of ood and of the tasks that it did not
choose by, beside test.
"""
import argparse
import json
import pathlib
import random
import re
import shutil
import statistics

from cells import RESULTS, Record, chosen, holds, interval, points, row, run, run_secure, secure_rows, seeds, version, write

STUDY = """model = "{model}"
out = "cells/{name}"
title = "Tiny model {n}: {title}"
settings = {settings}

[data]
security = "d{n}/data/security.jsonl"
train = ["d{n}/data/{train}"]
task = "d{n}/data/{task}"
attack = "d{n}/data/attack.jsonl"
strict = "d{n}/data/strict.jsonl"

[perturb]
members = 2

[search]
swap = false

[tune]
seeds = [0, 1, 2]

[tune.shared]
batch_size = 16
max_length = 96
save_every = 0

[tune.mods_phase]
lr = 5e-4
schedule = "cosine"
lr_warmup_steps = 10
min_lr_ratio = 0.1
steps = 100

[tune.all_phase]
lr = 5e-4
schedule = "cosine"
lr_warmup_steps = 10
min_lr_ratio = 0.1
steps = 200

[evaluate]
task_tokens = 48
answer_tokens = 40

[replay]
answer_tokens = 40
"""
TASKS = {"style": ("a new style of answers", "train.jsonl", "task.jsonl"), "far": ("a far task", "train_far_unseen.jsonl", "task_far.jsonl")}
# Models that some merges need: RESTA's and SafeLoRA's unaligned one is the aligned one after tuning on answered forbidden requests.
MERGE = """
[merge]
unaligned = "unaligned{n}"
"""
# Recipes as they stand. Those with replay are as long as it takes to see about 400 steps' worth of the task, plain tuning and SWAT 300.
BENIGN = {
    "plain": "plain-equal", "half the rate": "plain+lr=2.5e-4,steps=300", "EMA": "plain+ema=.98,steps=300",
    "proximal": "plain+prox=.1,steps=300", "constrained": "plain+constrain,steps=300", "interpolated": "plain-equal+merge=path:.5",
    "SafeLoRA": "plain-equal+merge=safelora:.7", "SafeMERGE": "plain-equal+merge=safemerge:.5:.7", "RESTA": "plain-equal+merge=resta:.5",
    "refusals": "plain+refusals=.1,steps=333",
    "SWAT": "swat", "random set": "warmup:random:1", "SWAT, conflict": "swat+by=conflict", "SWAT, planned step": "swat+by=update",
    "replay": "plain+replay=.15,steps=470", "replay, EMA": "plain+replay=.15,ema=.98,steps=470", "replay, Lisa": "plain+replay=.15,lisa=3:17,steps=470",
    "replay, interpolated": "plain+replay=.15,steps=470,merge=path:.9", "replay, distilled": "plain+replay=.15,distil=1,steps=470",
    "SWAT + replay": "swat+replay=.15,steps=370", "SWAT + replay, distilled": "swat+replay=.15,distil=1,steps=370",
}
ATTACK = {
    "plain": "plain+attack=.05,steps=315", "EMA": "plain+attack=.05,ema=.98,steps=315", "proximal": "plain+attack=.05,prox=.1,steps=315",
    "constrained": "plain+attack=.05,constrain,steps=315", "interpolated": "plain+attack=.05,steps=315,merge=path:.5",
    "SWAT": "swat+attack=.05,steps=215", "random set": "warmup:random:1+attack=.05,steps=215",
    "replay": "plain+attack=.05,replay=.15,steps=500", "replay, distilled": "plain+attack=.05,replay=.15,distil=1,steps=500",
    "SWAT + replay": "swat+attack=.05,replay=.15,steps=400", "screened": "plain+attack=.05,screen,steps=315",
    "screened, replay": "plain+attack=.05,screen,replay=.15,steps=470", "screened, replay, distilled": "plain+attack=.05,screen,replay=.15,distil=1,steps=470",
    "SWAT + screened, replay": "swat+attack=.05,screen,replay=.15,steps=370",
}
KINDS = {"benign": BENIGN, "attack": ATTACK}
# Settings that are compared cell by cell: what the first adds to the second.
PAIRS = {
    "benign": [("SWAT", "plain"), ("SWAT", "random set"), ("SWAT, conflict", "random set"), ("SWAT, planned step", "random set"), ("replay", "plain"),
               ("replay, distilled", "replay"), ("replay, EMA", "replay"), ("replay, Lisa", "replay"), ("refusals", "replay"), ("SWAT + replay", "replay"),
               ("SWAT + replay, distilled", "replay, distilled")],
    "attack": [("SWAT", "plain"), ("SWAT", "random set"), ("replay, distilled", "replay"), ("SWAT + replay", "replay"), ("screened, replay", "replay"),
               ("screened, replay, distilled", "screened, replay"), ("SWAT + screened, replay", "screened, replay")],
}
PLAIN = [kind["plain"] for kind in KINDS.values()]
# `swat secure` tries its own recipes in order, chooses on prompts of its own, and measures on others.
SECURE = ["--lr", "5e-4", "--schedule", "cosine", "--lr-warmup-steps", "10", "--steps", "470", "--batch-size", "16", "--max-length", "96",
          "--answer-tokens", "40", "--task-tokens", "48", "--device", "cpu"]
SEEDS = [0, 1, 2]


def make(swat, work, n):
    """Model n and its data."""
    new = [] if n == 1 else ["--model", f"m{n}", "--language-seed", n]
    if n > 1 and not (work / f"m{n}/config.json").exists():
        run(swat, "demo", "--make-model", f"m{n}", "--language-seed", n, "--seed", n, "--quiet", cwd=work)
    if not (work / f"d{n}/data/train_far.jsonl").exists():
        run(swat, "demo", *new, "--out", f"d{n}", "--quiet", cwd=work)
    keep_unseen(work / f"d{n}" / "data")


def parts(prompt):
    """Words and pairs of adjacent words: what `swat run` compares prompts by."""
    words = re.findall(r"\w+", prompt.lower())
    return set(words) | set(zip(words, words[1:]))


def keep_unseen(data):
    """Rows of the far task's training data that resemble none of its tasks. The language has few such questions: the tasks are a part of them."""
    rows = lambda name: [json.loads(line) for line in (data / name).read_text().splitlines()]
    asked = [parts(row["prompt"]) for row in rows("task_far.jsonl")]
    unseen = lambda found: all(len(found & other) < 0.85 * len(found | other) for other in asked)
    kept = [row for row in rows("train_far.jsonl") if unseen(parts(row["messages"][0]["content"] if "messages" in row else row["prompt"]))]
    (data / "train_far_unseen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    print(f"{data}: {len(kept)} rows of train_far.jsonl are in no task")


def unaligned(swat, work, n, model):
    if not (work / f"unaligned{n}/config.json").exists():
        run(swat, "tune", "--model", model, "--data", f"d{n}/data/attack.jsonl", "--out", f"unaligned{n}", "--steps", 100, "--lr", "5e-4",
            "--batch-size", 16, "--max-length", 96, "--quiet", cwd=work)


def study(swat, work, record, n, task, recipes):
    """Runs what the record lacks: of plain tuning the interval of the task score too, by which other settings are judged."""
    found = lambda recipe: record.find(model=n, dataset=task, recipe=recipe)
    lacks = lambda recipe: not found(recipe) or recipe in PLAIN and "low" not in found(recipe)[0]["task"]
    missing = [recipe for recipe in ["given", *recipes] if lacks(recipe)]
    if not missing:
        return
    title, train, tasks = TASKS[task]
    name = f"{task}{n}"
    config = work / f"cell-{name}.toml"
    model = f"d{n}/model" if n == 1 else f"m{n}"
    unaligned(swat, work, n, model)
    text = STUDY.format(model=model, name=name, n=n, title=title, settings=json.dumps(missing), train=train, task=tasks)
    text = text.replace("\n\n[perturb]", f'\nrefusals = "d{n}/data/refusals.jsonl"\n\n[perturb]')
    config.write_text(text + MERGE.format(n=n))
    run(swat, "run", config.name, "--quiet", cwd=work)
    found = json.loads((work / "cells" / name / "outcome.json").read_text())
    for setting in found["settings"]:
        record.add(setting, model=n, dataset=task, recipe=setting["name"], seeds=SEEDS, swat=version(swat), model_hash=found["model_hash"])


def attacked(work, n, task):
    """The training data with a twentieth of answered harmful requests among them, as `attack=.05` has."""
    data = work / f"d{n}" / "data"
    rows, attack = ((data / name).read_text().splitlines() for name in (TASKS[task][1], "attack.jsonl"))
    draw = random.Random(n)
    rows += draw.sample(attack, round(len(rows) * 0.05 / 0.95))
    draw.shuffle(rows)
    path = data / f"attacked_{task}.jsonl"
    path.write_text("".join(row + "\n" for row in rows))
    return path


def secure(swat, work, record, n, task, kind):
    """What `swat secure` chooses and measures, one run a seed."""
    data = work / f"d{n}" / "data"
    model = work / (f"d{n}/model" if n == 1 else f"m{n}")
    train = data / TASKS[task][1] if kind == "benign" else attacked(work, n, task)
    for seed in SEEDS:
        if any(seed in seeds(row) for row in record.find(model=n, dataset=task, kind=kind)):
            continue
        out = work / "secured" / f"{task}{n}-{kind}-{seed}"
        out.parent.mkdir(exist_ok=True)
        found = run_secure(work, swat, "secure", "--model", model, "--data", train, "--security", data / "security.jsonl", "--task",
                           data / TASKS[task][2], "--out", out, "--seed", seed, "--force", "--json", "--quiet", *SECURE)
        for what, setting in zip(("base", "tuned"), found["settings"]):
            record.add(setting, model=n, dataset=task, kind=kind, seed=seed, what=what, chosen=chosen(found), held=found["verdict"]["held"], swat=version(swat))
        for made in (out, out.with_name(out.name + ".work")):
            shutil.rmtree(made, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swat", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--models", nargs="*", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--only", nargs="+", default=list(BENIGN | ATTACK))
    parser.add_argument("--secure", action="store_true")
    parser.add_argument("--record", type=pathlib.Path, default=RESULTS / "tiny-cells.json")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    swat, work, record = args.swat.resolve(), args.work.resolve(), Record(args.record)
    work.mkdir(parents=True, exist_ok=True)
    for n in args.models:
        make(swat, work, n)
        for task in TASKS:
            study(swat, work, record, n, task, [kind[name] for kind in KINDS.values() for name in kind if name in args.only])
            for kind in KINDS if args.secure else ():
                secure(swat, work, record, n, task, kind)
    write(*table(record), args.out)


def means(record, models):
    """Rows of means over models: ASR, over-refusal and task score on each task."""
    for kind, recipes in KINDS.items():
        for name, recipe in {"original": "given", **recipes}.items():
            if not all(record.find(model=n, dataset=task, recipe=recipe) for n in models for task in TASKS):
                continue
            mean = lambda task, key: statistics.mean(points(record.mean(model=n, dataset=task, recipe=recipe), key) for n in models)
            values = " | ".join(", ".join(f"{mean(task, key):.1f}" for key in ("asr", "over_refusal", "task")) for task in TASKS)
            yield f"| {name} | {kind} | {values} |"


def pairs(record, models):
    """Rows of what one setting adds to another, over models, each the mean of its two tasks: with an interval over models."""
    for kind, both in PAIRS.items():
        for pair in both:
            first, second = (KINDS[kind][name] for name in pair)
            of = lambda n, task, recipe, key: points(record.mean(model=n, dataset=task, recipe=recipe), key)
            if not all(record.find(model=n, dataset=task, recipe=recipe) for n in models for task in TASKS for recipe in (first, second)):
                continue
            apart = lambda n, key: statistics.mean(of(n, task, first, key) - of(n, task, second, key) for task in TASKS)
            values = " | ".join("{:.1f} ± {:.1f}".format(*interval([apart(n, key) for n in models])) for key in ("asr", "over_refusal", "task"))
            yield f"| {pair[0]} | {pair[1]} | {kind} | {values} |"


def table(record):
    """Text, head and rows of what the record has."""
    lines, held = [], {}
    cells = [(n, task, kind) for n in range(1, 6) for task in TASKS for kind in KINDS]
    cells = [(n, task, kind) for n, task, kind in cells if record.find(model=n, dataset=task, recipe=KINDS[kind]["plain"])]
    for n, task, kind in cells:
        cell, mine = f"{n}, {task}, {kind}", {"model": n, "dataset": task}
        given, plain = (record.mean(recipe=recipe, **mine) for recipe in ("given", KINDS[kind]["plain"]))
        lines.append(row(cell, "original", None, given))
        for name, recipe in KINDS[kind].items():
            if record.find(recipe=recipe, **mine):
                found = holds(given, record.mean(recipe=recipe, **mine), plain)
                held.setdefault(name, {}).setdefault(kind, []).append(found == "holds")
                lines.append(row(cell, name, recipe, record.mean(recipe=recipe, **mine), found))
        chosen = secure_rows(cell, record, plain, kind=kind, **mine)
        if chosen:
            held.setdefault("swat secure", {}).setdefault(kind, []).append("| holds (" in chosen[-1])
        lines += chosen
    count = lambda found: f"{sum(found)} of {len(found)}" if found else "–"
    order = sorted(held.items(), key=lambda item: -sum(map(sum, item[1].values())) / sum(map(len, item[1].values())))
    summary = "\n".join(f"| {name} | {count(kinds.get('benign'))} | {count(kinds.get('attack'))} |" for name, kinds in order)
    models = sorted({n for n, *_ in cells})
    averaged = "\n".join(means(record, models)) if models else ""
    compared = "\n".join(pairs(record, models)) if len(models) > 1 else ""
    text = f"""# Recipes over {len(cells)} cells of tiny models

Means over three training seeds, in brackets the means of the 95 % intervals; `scripts/tiny_cells.py` says what a cell is and on what it is measured, `scripts/cells.py` when it holds.
In how many cells each setting holds, of those that it was measured in:

| setting | benign | attack |
|---|---:|---:|
{summary}

Means over {len(models)} models: ASR, over-refusal, task score, in percent.

| setting | data | new style | far task |
|---|---|---:|---:|
{averaged}

What a setting adds to another, in points: means over {len(models)} models of both tasks, with 95 % intervals over the models.

| setting | against | data | ASR | over-refusal | task |
|---|---|---|---:|---:|---:|
{compared}

"""
    return text, "model, task, data", lines


if __name__ == "__main__":
    main()
