"""Greedy generation with transformers and its key-value cache.

usage: generate.py --model DIR --chat F.jsonl [--max-new-tokens 64] [--batch-size 1] [--tokens-out F.jsonl]

Reports new tokens a second over all prompts, their processing included; --batch-size above 1 pads on the left. --tokens-out keeps each
answer's tokens, a line a prompt in their order, to be compared with those of swat.
"""
import json

from measure import conversation, load, median, parser, report, rows, timed
import torch


def main():
    p = parser(__doc__)
    p.set_defaults(warmup=1, repeats=1)
    p.add_argument("--chat", required=True)
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.add_argument("--batch-size", type=int, default=1)
    p.add_argument("--tokens-out")
    args = p.parse_args()
    model, tokenizer = load(args.model, args.dtype)
    model.eval()
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [tokenizer.apply_chat_template(conversation(r), add_generation_prompt=True, tokenize=False) for r in rows(args.chat)]
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    answers = []

    def generate(texts):
        batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**batch, max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        found = []
        for row in out[:, batch["input_ids"].shape[1]:].tolist():
            end = next((i for i, token in enumerate(row) if token in ends), len(row))
            # The end token was computed too.
            found.append((row[:end], min(end + 1, len(row))))
        return found

    def run(_):
        answers.clear()
        for i in range(0, len(texts), args.batch_size):
            answers.extend(generate(texts[i: i + args.batch_size]))

    generate(texts[: args.batch_size])  # warms up at a fraction of the time of a whole run
    seconds = timed(run, 0, args.repeats)
    new_tokens = sum(computed for _, computed in answers)
    if args.tokens_out:
        with open(args.tokens_out, "w") as out:
            out.writelines(json.dumps({"tokens": tokens}) + "\n" for tokens, _ in answers)
    report(measurement="generate", prompts=len(texts), batch_size=args.batch_size, new_tokens=new_tokens, run_s=seconds,
           tok_per_s=new_tokens / median(seconds))


if __name__ == "__main__":
    main()
