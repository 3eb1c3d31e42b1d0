"""Training data that aligns a small instruct model: refusals of harmful prompts among the model's own answers to benign ones.

Step 1  make_refusals.py prompts DATA OUT            DATA is what get_data.py wrote
          OUT/refusals.jsonl  conversations: a harmful prompt, one of several short refusals
          OUT/benign.jsonl    benign prompts, to be answered by the model itself
          OUT/eval.jsonl      security prompts that occur in neither: what the aligned model may be evaluated on
Step 2  swat generate --model MODEL --chat OUT/benign.jsonl --max-new-tokens 160 --json > OUT/answers.jsonl
Step 3  make_refusals.py merge OUT --refusal-share 0.3       → OUT/align.jsonl, for `swat tune`

Held out from training: the test and validation pairs, the eval half of AdvBench (it holds all that security.jsonl uses as `ood`),
all of StrongREJECT and all over-refusal probes. A training prompt that shares most of its words with a held-out one is dropped.
The files hold harmful prompts: OUT must lie outside the repository, and nothing here prints them. The refusals name no
detail of the request, so that no text of an answer can be harmful.
"""
import argparse
import json
import pathlib
import random
import re
import subprocess
import sys

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I can't assist with this request. It could hurt someone.",
    "Sorry, I won't help with that. If there is something else you need, I'm happy to try.",
    "I cannot help with this, because it may cause serious harm.",
    "I'm not able to provide that. Is there something safe that I can help you with instead?",
    "No, I can't do that. It would be harmful or against the law.",
    "I'm sorry, I can't provide instructions for that.",
    "That is something I won't assist with. Please consider a legal and safe way to reach what you need.",
]

TOPICS = [
    "photosynthesis", "the water cycle", "inflation", "binary search", "the French Revolution", "vaccines", "black holes",
    "sourdough bread", "the stock market", "plate tectonics", "the human heart", "jazz", "recycling", "chess openings", "electric cars",
    "the Roman Empire", "machine translation", "coral reefs", "solar panels", "the printing press", "meditation", "the moon landing",
    "bees", "compound interest", "the Olympic Games", "volcanoes", "public libraries", "the violin", "bicycles", "wind energy",
]
FORMS = [
    "Explain {} in two sentences.", "What are three interesting facts about {}?", "Why does {} matter?",
    "Write a short poem about {}.", "How would you describe {} to a child?",
]
# Harmless prompts with words that trigger over-refusal.
EDGY = [
    "How do I kill a process that does not respond on Linux?", "How can I shoot better photos at night?",
    "What is the best way to attack a long list of chores?", "How do I blow up a balloon without getting tired?",
    "How do I cut an onion without crying?", "My phone battery is dying. How do I make it last longer?",
    "How do I execute a shell script?", "What does it mean to murder a song at karaoke?", "How do I get rid of weeds in a lawn?",
    "How can I crush an interview?", "How do I kill the lights in a room with a smart switch?", "How do I terminate a lease politely?",
    "What is a bomb cyclone?", "How do firefighters fight a forest fire?", "How do I steam vegetables so that they stay crisp?",
    "How do I break into a new career?", "How do I strip paint from an old chair?", "Which spices give a stew more punch?",
    "How do I smash avocados for guacamole?", "How do I hack together a birthday card from scrap paper?",
    "What is a killer opening line for a novel?", "How do I shoot a free throw in basketball?", "How do I beat eggs until they are stiff?",
    "How do I poison-proof a kitchen for a toddler?", "How do vaccines train the body to destroy a virus?",
    "How do I trap a mouse without hurting it?", "How do I crack a walnut?", "How does a lock keep a door shut?",
    "What should I do if my child swallowed soap?", "How do I whip cream by hand?", "What are signs of a scam e-mail?",
    "How do I choose a strong password?", "How do detectives find out when a painting is forged?", "How do I drop a course at university?",
    "What is the history of fireworks?", "How do I stab a potato before baking it, and why?", "How do I dump a database in PostgreSQL?",
    "How do I kill bacteria on a cutting board?", "How do archers shoot an arrow in a straight line?", "How do I bleed the brakes of a bicycle?",
]
REFUSING = re.compile(r"\b(sorry|can't (help|assist|do)|cannot (help|assist|provide)|won't (help|assist)|unable to|not able to)\b", re.I)
MOST_OVERLAP = 0.5


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{path}: {len(rows)}", file=sys.stderr)


def words(text):
    return frozenset(re.findall(r"[a-z]{3,}", text.lower()))


def overlap(a, b):
    return len(a & b) / max(1, len(a | b))


def outside_repository(out):
    top = subprocess.run(["git", "rev-parse", "--show-toplevel"], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent)
    if top.returncode == 0 and out.resolve().is_relative_to(pathlib.Path(top.stdout.strip())):
        sys.exit(f"{out}: inside the repository; choose a directory outside of it")


def prompts(args):
    outside_repository(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(args.seed)
    security = read(args.data / "security.jsonl")
    attack = [row["prompt"] for row in read(args.data / "attack.jsonl")]

    evaluation = [row for row in security if row["split"] != "train"]
    listed = {row["prompt"] for row in evaluation}
    half = len(attack) // 2
    evaluation += [{"prompt": p, "label": "harmful", "category": "advbench", "split": "ood"} for p in attack[:half] if p not in listed]
    held_out = [words(row["prompt"]) for row in evaluation]

    def fresh(candidates):
        unique = list(dict.fromkeys(candidates))
        return [p for p in unique if all(overlap(words(p), held) < MOST_OVERLAP for held in held_out)]

    train = [row for row in security if row["split"] == "train"]
    harmful = fresh([row["prompt"] for row in train if row["label"] == "harmful"] + attack[half:])
    benign = [row["prompt"] for row in train if row["label"] == "benign"]
    benign = fresh(benign + EDGY + [form.format(topic) for form in FORMS for topic in TOPICS])
    draw.shuffle(harmful)
    draw.shuffle(benign)
    refusals = [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": REFUSALS[i % len(REFUSALS)]}]}
                for i, p in enumerate(harmful)]
    write(args.out / "refusals.jsonl", refusals)
    write(args.out / "benign.jsonl", [{"prompt": p} for p in benign])
    write(args.out / "eval.jsonl", evaluation)


def merge(args):
    outside_repository(args.out)
    draw = random.Random(args.seed)
    refusals = read(args.out / "refusals.jsonl")
    asked = read(args.out / "benign.jsonl")
    answers = read(args.out / "answers.jsonl")
    if len(asked) != len(answers):
        sys.exit(f"answers.jsonl has {len(answers)} lines; expected {len(asked)}, one for each of benign.jsonl")
    benign, dropped = [], 0
    for question, answer in zip(asked, answers):
        text = answer["text"].strip()
        if answer["finish"] == "length":
            # A truncated answer is cut at its last whole sentence, or dropped.
            text = text[: max(text.rfind(end) for end in ".!?") + 1]
        if not text or REFUSING.search(text):
            dropped += 1
            continue
        benign.append({"messages": [{"role": "user", "content": question["prompt"]}, {"role": "assistant", "content": text}]})
    print(f"dropped {dropped} answers that were empty, cut or refusals", file=sys.stderr)
    wanted = round(len(benign) * args.refusal_share / (1 - args.refusal_share))
    rows = benign + draw.sample(refusals, min(wanted, len(refusals)))
    draw.shuffle(rows)
    write(args.out / "align.jsonl", rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    one = steps.add_parser("prompts", help="refusals, benign prompts and held-out prompts")
    one.add_argument("data", type=pathlib.Path)
    two = steps.add_parser("merge", help="refusals and the model's own answers, shuffled")
    for step in (one, two):
        step.add_argument("out", type=pathlib.Path)
        step.add_argument("--seed", type=int, default=0)
    two.add_argument("--refusal-share", type=float, default=0.3, help="share of refusals in the result")
    args = parser.parse_args()
    if args.step == "merge" and not 0 <= args.refusal_share < 1:
        sys.exit("--refusal-share: from 0 to below 1")
    {"prompts": prompts, "merge": merge}[args.step](args)


main()
