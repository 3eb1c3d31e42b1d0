"""The robustness sweep as a plain PyTorch script: perturb a module, run the prompts, restore it.

usage: sweep.py --model DIR --security F.jsonl [--chat-template F] [--members 4] [--layers 0,10,20,29]

For each of the seven projections of each layer in --layers and each of its --members draws: w + ε‖w‖/‖n‖·n (every second one is the
twin w − …), the last token's hidden states of all prompts of the test split, the clean weight back. Prompts are as the chat template
renders them, padded on the left, in one batch. The counted runs are spread evenly over all of them; this loop costs the same for
each. Reports seconds a perturbed run.
"""
from measure import load, median, parser, report, rows, timed
import torch

KINDS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def main():
    p = parser(__doc__)
    p.add_argument("--security", required=True)
    p.add_argument("--chat-template")
    p.add_argument("--members", type=int, default=4)
    p.add_argument("--layers", default="")
    p.add_argument("--epsilon", type=float, default=1.2)
    args = p.parse_args()
    model, tokenizer = load(args.model, args.dtype)
    model.eval()
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if args.chat_template:
        with open(args.chat_template) as template:
            tokenizer.chat_template = template.read()
    chats = [[{"role": "user", "content": r["prompt"]}] for r in rows(args.security) if r["split"] == "test"]
    texts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    count = model.config.num_hidden_layers
    layers = [int(l) for l in args.layers.split(",")] if args.layers else range(count)
    runs = [(layer, kind, member) for layer in layers for kind in KINDS for member in range(args.members)]

    @torch.inference_mode()
    def run(i):
        layer, kind, member = runs[i * len(runs) // (args.warmup + args.repeats) % len(runs)]
        weight = model.get_parameter(f"model.layers.{layer}.{kind}.weight")
        clean = weight.clone()
        noise = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(member // 2))
        sign = -1.0 if member % 2 else 1.0
        weight.add_(noise, alpha=float(sign * args.epsilon * weight.norm() / noise.norm()))
        states = model.model(**batch, output_hidden_states=True, use_cache=False).hidden_states
        last = torch.stack([h[:, -1] for h in states])
        weight.copy_(clean)
        return last

    seconds = timed(run, args.warmup, args.repeats)
    report(measurement="sweep", prompts=len(texts), tokens=int(batch["attention_mask"].sum()), padded_tokens=batch["input_ids"].numel(),
           runs=args.repeats, run_s=seconds, s_per_run=median(seconds))


if __name__ == "__main__":
    main()
