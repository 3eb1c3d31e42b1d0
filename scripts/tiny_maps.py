"""Does a way of making the robustness map choose better modules? Maps by noise, by gradients and by the planned step against random sets of the
same size, on tiny models and two tasks, by their distance to the front of plain tuning at the same held-out loss.

usage: tiny_maps.py --swat target/release/swat --work DIR [--models 3] [--out docs/results/tiny-maps.md]

Models, data and lengths are those of scripts/tiny_cells.py; the front is spanned by plain tuning of four lengths. Every study is kept in DIR: what
was ended goes on. A study of one model and task takes two to three minutes on two idle cores.
"""
import argparse
import json
import pathlib
import statistics

from cells import interval, points, run
from tiny_cells import STUDY, TASKS, make

MAPS = {"noise (SWAT)": "swat", "conflict": "swat+by=conflict", "update": "swat+by=update",
        "noise, rates": "rates", "conflict, rates": "rates+by=conflict", "update, rates": "rates+by=update"}
RANDOM = {f"random set {i}": f"warmup:random:{i}" for i in (1, 2, 3)}
FRONT = ["plain-equal", "plain+steps=25", "plain+steps=50", "plain+steps=100"]
HELD_OUT = 30


def split_far(data):
    """The far task has no held-out file: its last rows."""
    rows = (data / "train_far_unseen.jsonl").read_text().splitlines()
    (data / "train_far_fit.jsonl").write_text("".join(row + "\n" for row in rows[:-HELD_OUT]))
    (data / "heldout_far.jsonl").write_text("".join(row + "\n" for row in rows[-HELD_OUT:]))


def study(swat, work, n, task):
    title, train, tasks = TASKS[task]
    train, held_out = (train, "heldout.jsonl") if task == "style" else ("train_far_fit.jsonl", "heldout_far.jsonl")
    settings = json.dumps(["given", *FRONT, *MAPS.values(), *RANDOM.values()])
    model = f"d{n}/model" if n == 1 else f"m{n}"
    text = STUDY.format(model=model, name=f"{task}{n}", n=n, title=f"{title}, maps", settings=settings, train=train, task=tasks)
    text = text.replace('out = "cells/', 'out = "maps/').replace("\n\n[perturb]", f'\nheldout = "d{n}/data/{held_out}"\noverlap = "report"\n\n[perturb]')
    config = work / f"maps-{task}{n}.toml"
    config.write_text(text)
    run(swat, "run", config.name, "--quiet", cwd=work)
    return json.loads((work / "maps" / f"{task}{n}" / "outcome.json").read_text())


def loss(setting):
    return statistics.mean(one["evaluation"]["perplexity"]["nll"] for one in [setting, *setting.get("more_seeds", [])])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swat", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    swat, work = args.swat.resolve(), args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    lines, distances = [], {}
    for n in range(1, args.models + 1):
        make(swat, work, n)
        split_far(work / f"d{n}" / "data")
        for task in TASKS:
            found = study(swat, work, n, task)
            settings = {s["name"]: s for s in found["settings"]}
            claims = {claim["name"]: claim["at_loss"] for claim in found["claims"]}
            named = {"original": "given", "plain": "plain-equal", **MAPS, **RANDOM}
            for name, recipe in named.items():
                s, claim = settings[recipe], claims.get(recipe)
                values = " | ".join(f"{points(s, key):.1f}" for key in ("asr", "over_refusal", "j", "task"))
                at = [f"{claim[key]['value']:.1f} ({claim[key]['interval'][0]:.1f} to {claim[key]['interval'][1]:.1f})" if claim else "" for key in ("asr", "j")]
                lines.append(f"| {n}, {task} | {name} | {values} | {loss(s):.3f} | {at[0]} | {at[1]} |")
                if claim:
                    distances.setdefault(name, []).append([claim["asr"]["value"], claim["j"]["value"]])
    cells = 2 * args.models
    chance = [[statistics.mean(distances[name][cell][i] for name in RANDOM) for i in (0, 1)] for cell in range(cells)]
    summary = ["| map | ASR, points from the front | 1 − J, points from the front | ASR against the mean of three random sets | 1 − J against it |", "|---|---:|---:|---:|---:|"]
    both = lambda values: "{:.1f} ± {:.1f}".format(*interval(values))
    for name, found in {**{name: distances[name] for name in MAPS}, "random sets, mean of three": chance}.items():
        own = [both([cell[i] for cell in found]) for i in (0, 1)]
        against = ["" if found is chance else both([cell[i] - other[i] for cell, other in zip(found, chance)]) for i in (0, 1)]
        summary.append(f"| {name} | {own[0]} | {own[1]} | {against[0]} | {against[1]} |")
    text = f"""# Ways to make the robustness map, at equal held-out loss

{args.models} tiny models × 2 tasks × 3 training seeds, `scripts/tiny_maps.py`. A distance is that of a setting to the front of plain tuning (25, 50, 100 and
300 steps, and the original model) at its own held-out loss; below 0 is safer than plain tuning. Means over {cells} cells with 95 % intervals over them:

""" + "\n".join(summary) + """

Each cell, means over seeds; in brackets 95 % intervals over three seeds:

| model, task | setting | ASR % | over-refusal % | J | task % | held-out loss | ASR from the front | 1 − J from the front |
|---|---|---:|---:|---:|---:|---:|---:|---:|
""" + "\n".join(lines) + "\n"
    if args.out:
        args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
