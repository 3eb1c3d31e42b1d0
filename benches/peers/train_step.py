"""A training step in PyTorch: forward, backward, clipping to 1.0, fused AdamW.

usage: train_step.py --model DIR --data F.jsonl [--mods PATTERNS] [--lora-rank N] [--compile] [--batch-size 4] [--max-length 256]

The data are conversations of at least --max-length tokens, each cut there: every step has batch-size × max-length tokens and no
padding. Only answers carry a loss. --mods `layers.16-29.{o_proj,v_proj}` freezes everything else (requires_grad False), as the first
phase of `swat tune`; --lora-rank trains adapters of PEFT on q, k, v and o instead. --compile runs the model through torch.compile. Reports tokens a second of the median step, the loss before each step, and the peak of resident memory.
"""
import re

from measure import conversation, load, median, parser, report, rows, timed
import torch


def example(tokenizer, messages, length):
    """Tokens, and labels of the answers' tokens only."""
    tokens, labels = [], []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, tokenize=False)
        # The answer with its end of turn, without what the template appends.
        whole = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False).rstrip("\n")
        for text, trained in ((head, False), (whole[len(head):], True)):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens += ids
            labels += ids if trained else [-100] * len(ids)
    if len(tokens) < length:
        raise SystemExit(f"an example of {len(tokens)} tokens; expected {length} or more")
    return tokens[:length], labels[:length]


def freeze(model, mods):
    """Trains `layers.A-B.{x_proj,…}` alone."""
    found = re.fullmatch(r"layers\.(\d+)(?:-(\d+))?\.\{?([a-z_,]+)\}?", mods)
    if not found:
        raise SystemExit(f"--mods {mods}: expected layers.A-B.{{x_proj,…}}")
    first, last, kinds = int(found[1]), int(found[2] or found[1]), set(found[3].split(","))
    for name, p in model.named_parameters():
        parts = name.split(".")
        p.requires_grad_("layers" in parts and first <= int(parts[2]) <= last and parts[-2] in kinds)


def main():
    p = parser(__doc__)
    p.add_argument("--data", required=True)
    p.add_argument("--mods")
    p.add_argument("--lora-rank", type=int)
    p.add_argument("--compile", action="store_true")
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--max-length", type=int, default=256)
    p.add_argument("--lr", type=float, default=1e-5)
    args = p.parse_args()
    model, tokenizer = load(args.model, args.dtype)
    model.config.use_cache = False
    model.train()
    if args.mods:
        freeze(model, args.mods)
    if args.lora_rank:
        import peft
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        lora = peft.LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules=targets, task_type="CAUSAL_LM")
        # Adapters in the precision of the weights, as swat has them.
        model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=args.lr, weight_decay=0.0, fused=True)
    run = torch.compile(model) if args.compile else model
    examples = [example(tokenizer, conversation(r), args.max_length) for r in rows(args.data)]
    losses = []

    def step(i):
        chosen = [examples[(i * args.batch_size + j) % len(examples)] for j in range(args.batch_size)]
        tokens, labels = (torch.tensor([c[k] for c in chosen]) for k in (0, 1))
        loss = run(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    seconds = timed(step, args.warmup, args.repeats)
    tokens = args.batch_size * args.max_length
    report(measurement="train_step", mods=args.mods or "all", compiled=args.compile, tokens=tokens, step_s=seconds, losses=losses,
           tok_per_s=tokens / median(seconds), trainable=sum(p.numel() for p in moving) / sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    main()
