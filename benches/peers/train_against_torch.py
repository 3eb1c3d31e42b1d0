"""Training from the same weights on the same data in swat and in PyTorch; and planned against measured memory.

usage: train_against_torch.py --swat target/release/swat --work DIR [--device cuda] [--shapes 135M,0.5B,1.5B] [--memory 1.5B,7B]
       train_against_torch.py --swat target/release/swat --work DIR --device cpu --tiny      proves the script; a minute

Run it with the interpreter of scripts/setup_oracle.sh, or any with torch, transformers, tokenizers and safetensors. Models have the
shapes of SmolLM2-135M, Qwen2.5-0.5B and -1.5B and Llama-2-7B and random weights in bf16; data are skewed draws of words, so that losses
fall at once; nothing is downloaded. Three runs a shape: swat; PyTorch in f32; PyTorch in f32 with products in bf16 (autocast), whose
distance from the second is the noise of bf16. swat's distance may be twice that noise, or --tolerance. Memory: `swat plan` against the
peak of `swat profile`, which takes real steps and writes nothing. One JSON object on stdout; exit code 1 where something is too far off.
7B needs 14 GB of disk and 30 GB of host memory.
"""
import argparse
import gc
import json
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import time

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

LLAMA = dict(model_type="llama", rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False, max_position_embeddings=2048)
QWEN = dict(model_type="qwen2", rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True, max_position_embeddings=4096, vocab_size=151936)
SHAPES = {
    "tiny": dict(LLAMA, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=512),
    "135M": dict(LLAMA, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                 vocab_size=49152, tie_word_embeddings=True),
    "0.5B": dict(QWEN, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2),
    "1.5B": dict(QWEN, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2),
    "7B": dict(LLAMA, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
               vocab_size=32000),
}
# What is planned and measured: gradients and moments, what trains, documents, tokens of each.
MEMORY = {
    "tiny": [("f32", "all", 4, 64)],
    "7B": [("bf16", "all", 4, 1024), ("f32", "layers.0-31.{q_proj,k_proj,v_proj,o_proj}", 4, 1024)],
    None: [("f32", "all", 8, 1024), ("bf16", "all", 8, 1024), ("f32", "layers.0-9.{q_proj,k_proj,v_proj,o_proj}", 8, 1024)],
}
END, ANSWER, WORDS = 0, 1, 64
TEMPLATE = ("{% for message in messages %}{{ message['content'] }}"
            "{{ ' <end>' if message['role'] == 'assistant' else ' <answer> ' }}{% endfor %}")


def model_dir(work, shape, device):
    """A model of this shape with random weights, and a tokenizer whose words are w0, w1, …"""
    path = work / shape
    if (path / "model_is_whole").exists():
        return path
    settings = dict(SHAPES[shape])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings, eos_token_id=END, bos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path, max_shard_size="4GB")
    vocab = {"<end>": END, "<answer>": ANSWER, **{f"w{i}": i for i in range(2, config.vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": TEMPLATE}))
    (path / "generation_config.json").unlink(missing_ok=True)
    (path / "model_is_whole").touch()
    return path


def documents(count, length, vocab, seed=0):
    """(tokens, labels) of so many documents; a quarter of each is the prompt. Few words are drawn often."""
    draw = random.Random(seed)
    words = draw.sample(range(2, vocab), WORDS)
    weights = [1 / (i + 1) for i in range(WORDS)]
    made = []
    for _ in range(count):
        prompt = draw.choices(words, weights, k=length // 4 - 1)
        answer = draw.choices(words, weights, k=length - len(prompt) - 2)
        made.append((prompt + [ANSWER] + answer + [END], [-100] * (len(prompt) + 1) + answer + [END]))
    return made


def write_data(path, made):
    text = lambda tokens: " ".join(f"w{token}" for token in tokens)
    with open(path, "w") as out:
        for tokens, labels in made:
            first = sum(label == -100 for label in labels)
            turns = [("user", tokens[: first - 1]), ("assistant", tokens[first:-1])]
            out.write(json.dumps({"messages": [{"role": role, "content": text(part)} for role, part in turns]}) + "\n")


def swat(args, command, model, *options):
    line = [args.swat, command, "--model", model, "--device", args.device, "--json", "--quiet", *options]
    done = subprocess.run([str(part) for part in line], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, line))}\nexit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def swat_run(args, model, data):
    out = args.work / "tuned"
    shutil.rmtree(out, ignore_errors=True)
    swat(args, "tune", model, "--data", data, "--out", out, "--force", "--steps", args.steps, "--batch-size", args.batch, "--max-length",
         args.length, "--packing", "false", "--shuffle", "false", "--lr", args.lr, "--schedule", "constant", "--save-every", 0)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(out)
    return {"losses": [line["loss"] for line in lines], "tokens": [line["tokens"] for line in lines],
            "step_ms": statistics.median(line["step_ms"] for line in lines[2:]), "peak_bytes": lines[-1]["peak_bytes"]}


def torch_run(args, path, made, autocast):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").to(args.device)
    model.config.use_cache = False
    model.train()
    on_gpu = args.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    losses, times = [], []
    for step in range(args.steps):
        began = time.perf_counter()
        chosen = [made[(step * args.batch + i) % len(made)] for i in range(args.batch)]
        tokens, labels = (torch.tensor([document[k] for document in chosen], device=args.device) for k in (0, 1))
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        times.append((time.perf_counter() - began) * 1e3)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    del model, optimizer
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return {"losses": losses, "step_ms": statistics.median(times[2:]), "peak_bytes": peak}


def distance(got, expected):
    """The largest relative difference of a step's loss."""
    return max(abs(g - e) / e for g, e in zip(got, expected))


def compare(args, shape):
    path = model_dir(args.work, shape, args.device)
    made = documents(args.batch * args.steps, args.length, SHAPES[shape]["vocab_size"])
    data = args.work / "data.jsonl"
    write_data(data, made)
    ours = swat_run(args, path, data)
    if any(tokens != args.batch * args.length for tokens in ours.pop("tokens")):
        raise RuntimeError("swat tune: a step of another size than PyTorch's")
    exact, rounded = torch_run(args, path, made, False), torch_run(args, path, made, True)
    noise, off = distance(rounded["losses"], exact["losses"]), distance(ours["losses"], exact["losses"])
    learned = exact["losses"][-1] < 0.8 * exact["losses"][0]
    # On the CPU swat computes in f32.
    allowed = args.tolerance if args.device == "cpu" else max(2 * noise, args.tolerance)
    return {"shape": shape, "swat": ours, "torch_f32": exact, "torch_autocast": rounded, "bf16_noise": noise, "swat_off": off,
            "learned": learned, "ok": learned and off <= allowed}


def memory(args, shape):
    path = model_dir(args.work, shape, args.device)
    results = []
    for state, mods, batch, length in MEMORY.get(shape, MEMORY[None]):
        shared = ["--mods", mods, "--state", state, "--batch-size", batch]
        planned = swat(args, "plan", path, *shared, "--max-length", length)
        result = {"shape": shape, "state": state, "mods": mods, "batch": batch, "length": length, "planned_bytes": planned["total_bytes"],
                  "free_bytes": planned["free_bytes"]}
        try:
            measured = swat(args, "profile", path, *shared, "--length", length, "--steps", 2)
            ratio = planned["total_bytes"] / measured["peak_bytes"]
            # On the CPU the peak is that of the whole process.
            result.update(measured_bytes=measured["peak_bytes"], planned_over_measured=ratio, step_ms=measured["step_ms"],
                          ok=args.device == "cpu" or 0.9 <= ratio <= 1.1)
        except RuntimeError as error:
            # Only a run that is planned not to fit may fail.
            result.update(error=str(error)[-600:], ok=planned["total_bytes"] > (planned["free_bytes"] or 0))
        results.append(result)
    return results


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--swat", type=pathlib.Path, required=True)
    p.add_argument("--work", type=pathlib.Path, required=True, help="for models, data and tuned copies")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    p.add_argument("--shapes", default="135M,0.5B,1.5B", help="trained against PyTorch")
    p.add_argument("--memory", default="135M,1.5B,7B", help="planned and measured")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--batch", type=int, default=8, help="documents a step")
    p.add_argument("--length", type=int, default=512, help="tokens of each")
    p.add_argument("--lr", type=float, default=3e-4)
    p.add_argument("--tolerance", type=float, default=0.02, help="how far a loss may be off, in parts of it; on the CPU a thousandth")
    p.add_argument("--tiny", action="store_true", help="the smallest shape, a few small steps")
    args = p.parse_args()
    args.swat = args.swat.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.tiny:
        args.shapes, args.memory, args.batch, args.length, args.lr = "tiny", "tiny", 4, 64, 3e-3
    if args.device == "cpu":
        args.tolerance = 1e-3
    names = lambda text: [name for name in text.split(",") if name]
    if unknown := set(names(args.shapes) + names(args.memory)) - set(SHAPES):
        sys.exit(f"no such shape: {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} CPU cores"
    record = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__, "steps": args.steps,
              "tokens": args.batch * args.length, "lr": args.lr, "training": [], "memory": []}
    for shape in names(args.shapes):
        record["training"].append(compare(args, shape))
        print(f"{shape}: off by {record['training'][-1]['swat_off']:.2e}, bf16 noise {record['training'][-1]['bf16_noise']:.2e}", file=sys.stderr)
    for shape in names(args.memory):
        record["memory"] += memory(args, shape)
        print(f"{shape}: planned / measured {[m.get('planned_over_measured') for m in record['memory'] if m['shape'] == shape]}", file=sys.stderr)
    json.dump(record, sys.stdout, indent=1)
    print()
    sys.exit(0 if all(result["ok"] for result in record["training"] + record["memory"]) else 1)


if __name__ == "__main__":
    main()
