"""Checks that transformers opens a model directory, and compares its logits with those of another.

usage: check_hf.py DIR [REFERENCE] [--same] [--dtype float32]

Opens DIR (config, weights, tokenizer, chat template), checks that no weight is missing or unused and that all are finite, and generates
a few tokens. With REFERENCE, compares the logits of both over a few sentences: largest difference, mean KL divergence,
share of equal next tokens, and the tensors that differ. --same fails unless all weights are equal.
Prints one JSON object; exit code 1 if a check fails.
"""
import argparse
import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "In the morning the baker opens the shop, and by noon the shelves are empty.",
    "def add(a, b):\n    return a + b\n",
    "Water boils at 100 degrees Celsius at sea level; on a mountain it boils earlier, since",
    "Une phrase en français, eine auf Deutsch, и одна по-русски.",
]


def opened(folder, dtype):
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    problems = {k: sorted(map(str, v)) for k, v in report.items() if v}
    infinite = [n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if infinite:
        problems["not_finite"] = infinite
    return model.eval(), problems


def logits(model, tokenizer):
    rows = []
    with torch.no_grad():
        for sentence in SENTENCES:
            rows.append(model(**tokenizer(sentence, return_tensors="pt")).logits[0].double())
    return torch.cat(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("reference", nargs="?")
    parser.add_argument("--same", action="store_true")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    logging.disable_progress_bar()
    dtype = getattr(torch, args.dtype)

    model, problems = opened(args.directory, dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.directory)
    report = {"directory": args.directory, "model_type": model.config.model_type, "problems": problems,
              "parameters": sum(p.numel() for p in model.parameters())}
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "Name three colours."}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(SENTENCES[0], return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0][inputs["input_ids"].shape[1]:]
    report["answer"] = tokenizer.decode(answer, skip_special_tokens=True)
    good = not problems
    if args.reference:
        other, other_problems = opened(args.reference, dtype)
        ours, theirs = logits(model, tokenizer), logits(other, tokenizer)
        kl = torch.nn.functional.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
        weights = dict(other.named_parameters())
        differing = [n for n, p in model.named_parameters() if n not in weights or not torch.equal(p, weights[n])]
        report |= {
            "reference": args.reference, "reference_problems": other_problems,
            "largest_logit_difference": float((ours - theirs).abs().max()), "mean_kl": float(kl),
            "same_next_token": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()), "differing_tensors": differing,
        }
        good = good and not other_problems and not (args.same and differing)
    print(json.dumps(report, ensure_ascii=False, indent=1))
    sys.exit(0 if good else 1)


main()
