"""Golden files: tiny random models and what transformers and peft compute with them, in f64 wherever they allow it.

usage: make.py [NAME...]      (the interpreter of scripts/setup_oracle.sh; writes the directories beside this file)

NAME/config.json, model.safetensors   a Hugging Face model directory
NAME/case.json                        documents, targets (null = no loss), what the ten steps train, losses, greedy continuations
adapters/NAME                         an adapter as peft saves it, case.json (base, losses of twenty steps), expected.safetensors (logits,
                                      after.TENSOR under peft's names)
NAME/expected.safetensors             hidden.I [tokens, hidden], logits [tokens, vocab], grad.TENSOR of the mean loss over all trained
                                      tokens, after.TENSOR: the trained tensors after ten steps of AdamW
Documents run one by one, without padding. transformers computes RMSNorm and rope tables in f32 whatever the model's type.
A seed is taken only if a second run in f32 agrees with the one in f64: what is committed is well conditioned.
"""
import copy
import json
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.utils import logging

HERE = pathlib.Path(__file__).parent
STEPS, RATE, DECAY, CLIP = 10, 1e-2, 0.1, 1.0
NEW_TOKENS, PROMPT_TOKENS = 20, 5
# f32 against f64, relative to the largest element of each tensor; the Rust test allows 2e-5.
AGREEMENT = 5e-6
LEAST_MARGIN = 1e-2

SMALL = dict(vocab_size=47, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
# Heads wide enough that a rope scaling treats its frequencies in different ways.
WIDE_HEADS = dict(SMALL, vocab_size=31, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                  tie_word_embeddings=True)


def rope(kind, theta=10000.0, **more):
    return dict(rope_type=kind, rope_theta=theta, **more)


# The gradient of k's bias is nearly nothing (softmax takes no notice of what all keys share, but for the rotation), so AdamW on it
# amplifies rounding: its gradient is compared, its steps are not.
# name: (configuration, style of config.json by version of transformers, lengths of documents, cells that train)
MODELS = {
    "llama": (LlamaConfig(**SMALL), 5, [13, 1, 8], "layers.0.o_proj,layers.1.{q_proj,v_proj,down_proj}"),
    "llama-bias": (LlamaConfig(**dict(SMALL, num_key_value_heads=4), attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
                   4, [9, 12], "layers.0.{q_proj,o_proj,gate_proj},layers.1.{v_proj,up_proj,down_proj}"),
    "llama-rope-llama3": (LlamaConfig(**WIDE_HEADS, rope_parameters=rope(
        "llama3", 500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)),
        4, [24, 6], "layers.0.{q_proj,k_proj}"),
    "llama-rope-linear": (LlamaConfig(**WIDE_HEADS, rope_parameters=rope("linear", factor=4.0)), 4, [15, 11], "layers.1.{q_proj,k_proj}"),
    # Longer than its context of 32 tokens, where the base grows; only one document is, since transformers keeps the base until a short one.
    "llama-rope-dynamic": (LlamaConfig(**dict(WIDE_HEADS, max_position_embeddings=32), rope_parameters=rope("dynamic", factor=2.0)),
                           5, [12, 43, 7], "layers.0.{q_proj,k_proj,v_proj}"),
    "llama-rope-yarn": (LlamaConfig(**WIDE_HEADS, rope_parameters=rope(
        "yarn", 100.0, factor=2.0, beta_fast=2.0, beta_slow=1.0, original_max_position_embeddings=32)),
        5, [36, 5], "layers.0.k_proj,layers.1.q_proj"),
    "mistral": (MistralConfig(**dict(SMALL, num_key_value_heads=1), sliding_window=4), 4, [14, 3, 9],
                "layers.0.{k_proj,v_proj},layers.1.{norms,gate_proj},lm_head"),
    "qwen2": (Qwen2Config(**dict(SMALL, num_key_value_heads=1), rope_parameters=rope("default", 1e6)), 4, [10, 13],
              "layers.0.{q_proj,v_proj},layers.1.{o_proj,up_proj},norm"),
    "qwen2-window": (Qwen2Config(**dict(SMALL, vocab_size=31, num_hidden_layers=3, intermediate_size=32, num_attention_heads=2,
                                        tie_word_embeddings=True), use_sliding_window=True, sliding_window=3, max_window_layers=1),
                     4, [11, 10], "layers.1.{q_proj,down_proj},embed_tokens"),
    "qwen3": (Qwen3Config(**SMALL, head_dim=8, rope_parameters=rope("default", 1e6)), 5, [12, 10],
              "layers.0.{norms,q_proj},layers.1.{k_proj,down_proj},lm_head"),
    "qwen3-tied": (Qwen3Config(**dict(SMALL, num_key_value_heads=4), head_dim=10, tie_word_embeddings=True), 4, [7, 15],
                   "embed_tokens,layers.1.{v_proj,norms}"),
}


def initialise(model, seed):
    """Normal weights of a size at which every path matters; norms away from 1; values that bf16 and f16 hold exactly."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = torch.randn(p.shape, generator=draw) * (0.6 if "embed_tokens" in name else 0.22)
            if "norm" in name:
                values = 1.0 + values
            values = values.bfloat16()
            p.copy_(torch.where(values.abs() < 2.0**-14, torch.zeros_like(values), values))


def config_of_version_4(config):
    """The spelling that transformers 4 wrote and most published models carry."""
    fields = {k: v for k, v in config.to_dict().items() if v is not None and k not in ("layer_types", "dtype", "rope_parameters")}
    if config.model_type in ("llama", "mistral") and fields["head_dim"] * config.num_attention_heads == config.hidden_size:
        del fields["head_dim"]
    parameters = dict(config.rope_parameters)
    fields["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    if kind == "linear":
        fields["rope_scaling"] = dict(type=kind, **parameters)
    elif kind != "default":
        fields["rope_scaling"] = dict(rope_type=kind, **parameters)
    for dead in ("output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id",
                 "problem_type", "_name_or_path", "output_attentions"):
        fields.pop(dead, None)
    return dict(fields, torch_dtype="float32", transformers_version="4.46.0")


def save(model, out, style, dtype=torch.float32, shard="5GB"):
    shutil.rmtree(out, ignore_errors=True)
    model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(out, max_shard_size=shard)
    (out / "generation_config.json").unlink(missing_ok=True)
    if style == 4:
        fields = dict(config_of_version_4(model.config), torch_dtype=str(dtype).removeprefix("torch."))
        (out / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def opened(folder, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def loss_of(model, documents, targets):
    """Σ −log p over the trained tokens of all documents / their number."""
    total, count = 0, 0
    for tokens, wanted in zip(documents, targets):
        logits = model(torch.tensor([tokens])).logits[0]
        wanted = torch.tensor([-100 if t is None else t for t in wanted])
        total = total + torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
        count += int((wanted != -100).sum())
    return total / count


def cells(names, text):
    """The tensors of a set written as `layers.0.{q_proj,norms},norm`."""
    depth, pattern, patterns = 0, "", []
    for c in text + ",":
        depth += (c == "{") - (c == "}")
        if c == "," and depth == 0:
            patterns.append(pattern)
            pattern = ""
        else:
            pattern += c
    chosen = set()
    for pattern in patterns:
        if not pattern.startswith("layers."):
            chosen |= {n for n in names if n in (f"model.{pattern}.weight", f"{pattern}.weight")}
            continue
        _, layer, kinds = pattern.split(".", 2)
        for kind in kinds.strip("{}").split(","):
            for n in names:
                part = n.removeprefix(f"model.layers.{layer}.")
                if part != n and (kind in part.split(".") or (kind == "norms" and "norm" in part)):
                    chosen.add(n)
    return chosen


def results(folder, dtype, documents, targets, trained):
    """Everything that is expected, computed in `dtype`."""
    model = opened(folder, dtype)
    out = {}
    with torch.no_grad():
        runs = [model(torch.tensor([d]), output_hidden_states=True) for d in documents]
    for i in range(len(runs[0].hidden_states)):
        out[f"hidden.{i}"] = torch.cat([r.hidden_states[i][0] for r in runs])
    out["logits"] = torch.cat([r.logits[0] for r in runs])
    loss = loss_of(model, documents, targets)
    loss.backward()
    out |= {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    # Optimisers drop the gradients of what they do not hold.
    chosen = cells([name for name, _ in model.named_parameters()], trained)
    for name, p in model.named_parameters():
        p.grad = None
        p.requires_grad_(name in chosen)
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=RATE, weight_decay=DECAY)
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        step_loss = loss_of(model, documents, targets)
        step_loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(moving, CLIP)))
        optimizer.step()
        losses.append(step_loss.item())
    out |= {f"after.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    return {k: v.detach().clone().contiguous() for k, v in out.items()}, loss.item(), losses, norms


def greedy(folder, prompts):
    """Continuations, and the smallest distance between the best and the second logit on the way."""
    model = opened(folder, torch.float64)
    margin, answers = float("inf"), []
    for prompt in prompts:
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                best = model(torch.tensor([tokens])).logits[0, -1].topk(2)
                margin = min(margin, float(best.values[0] - best.values[1]))
                tokens.append(int(best.indices[0]))
            cached = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
                                    eos_token_id=None, pad_token_id=0)[0].tolist()
        if cached != tokens:
            return None, 0.0
        answers.append({"prompt": list(prompt), "tokens": tokens[len(prompt):]})
    return answers, margin


def worst(a, b):
    """Largest relative difference of two sets of tensors, and whose it is."""
    return max((float((a[k].double() - b[k].double()).abs().max() / b[k].double().abs().max().clamp(min=1e-12)), k) for k in b)


def documents_of(lengths, vocab, seed):
    draw = torch.Generator().manual_seed(seed)
    documents = [torch.randint(3, vocab, (n,), generator=draw).tolist() for n in lengths]
    keep = [torch.rand(n, generator=draw) < 0.7 for n in lengths]
    targets = [[d[i + 1] if i + 1 < len(d) and k[i] else None for i in range(len(d))] for d, k in zip(documents, keep)]
    return documents, targets


def make(name):
    config, style, lengths, trained = MODELS[name]
    out = HERE / name
    for seed in range(1, 200):
        model = AutoModelForCausalLM.from_config(config)
        initialise(model, seed)
        save(model, out, style)
        documents, targets = documents_of(lengths, config.vocab_size, seed)
        expected, loss, losses, norms = results(out, torch.float64, documents, targets, trained)
        narrow, *_ = results(out, torch.float32, documents, targets, trained)
        error, whose = worst(narrow, expected)
        answers, margin = greedy(out, [d[:PROMPT_TOKENS] for d in documents if len(d) >= PROMPT_TOKENS])
        if error <= AGREEMENT and margin >= LEAST_MARGIN:
            break
    else:
        sys.exit(f"{name}: no well-conditioned seed; last: {error:.1e} in {whose}, margin {margin:.1e}")
    save_file({k: v.float() for k, v in expected.items()}, out / "expected.safetensors")
    write_case(out, dict(documents=documents, targets=targets, trained=trained, loss=loss, step_losses=losses, greedy=answers))
    print(f"{name}: seed {seed}, loss {loss:.4f} -> {losses[-1]:.4f}, gradient norms {max(norms):.2f} to {min(norms):.2f}, "
          f"f32 within {error:.1e} ({whose}), margin {margin:.2g}", flush=True)


def write_case(out, case):
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in case.items()]
    (out / "case.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def make_variants():
    """The Llama again, as it may lie on a disk: other types, shards, the older config.json. Same expectations."""
    model = opened(HERE / "llama", torch.float32)
    reference = model(torch.tensor([[3, 4, 5]])).logits
    for name, options in {
        "llama-bf16": dict(style=5, dtype=torch.bfloat16),
        "llama-f16": dict(style=4, dtype=torch.float16),
        "llama-sharded": dict(style=5, shard="20KB"),
    }.items():
        save(model, HERE / name, **options)
        again = opened(HERE / name, torch.float32)(torch.tensor([[3, 4, 5]])).logits
        assert torch.equal(again, reference), name
        write_case(HERE / name, {"same_as": "llama"})
        print(name, flush=True)


def make_lora():
    """Adapters of rank 4 and alpha 8 on q, k, v, o of the Llama: A and B random, their gradients, the logits."""
    from peft import LoraConfig, get_peft_model

    out = HERE / "lora"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    case = json.loads((HERE / "llama" / "case.json").read_text())
    model = opened(HERE / "llama", torch.float64)
    # peft keeps adapters in f32 unless told.
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
                           autocast_adapter_dtype=False)
    draw = torch.Generator().manual_seed(11)
    adapters = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=draw) * 0.25)
                adapters[name.removeprefix("base_model.model.").replace(".default", "")] = p
    logits = torch.cat([model(torch.tensor([d])).logits[0] for d in case["documents"]])
    loss = loss_of(model, case["documents"], case["targets"])
    loss.backward()
    tensors = {"logits": logits}
    for name, p in adapters.items():
        tensors |= {f"adapter.{name}": p, f"grad.{name}": p.grad}
    save_file({k: v.detach().float().contiguous() for k, v in tensors.items()}, out / "expected.safetensors")
    write_case(out, dict(same_as="llama", rank=4, alpha=8, loss=loss.item()))
    print("lora", flush=True)


# base: the model; settings of peft; what the settings make of the model is trained for the steps below
ADAPTERS = {
    "patterns": ("llama", dict(target_modules=["q_proj", "v_proj", "down_proj"], r=4, lora_alpha=8, use_rslora=True,
                               rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 3}, alpha_pattern={"v_proj": 5, "0.mlp.down_proj": 12})),
    "regex-bias": ("qwen2", dict(target_modules=r"model\.layers\.\d\.self_attn\.(?:q|o)_proj", exclude_modules=["0.self_attn.o_proj"],
                                 r=3, lora_alpha=6, bias="all")),
    "all-linear": ("qwen3", dict(target_modules="all-linear", r=2, lora_alpha=4)),
    "saved-norms": ("mistral", dict(target_modules=["gate_proj"], r=2, lora_alpha=4, modules_to_save=["layernorm", "lm_head"])),
    "untied-embedding": ("qwen3-tied", dict(target_modules=["k_proj", "up_proj"], layers_to_transform=[1], layers_pattern="layers",
                                            r=2, lora_alpha=4, modules_to_save=["embed_tokens"])),
    "untied-ends": ("llama-bias", dict(target_modules=["o_proj"], r=2, lora_alpha=4, bias="lora_only",
                                       modules_to_save=["embed_tokens", "lm_head"])),
}
ADAPTER_STEPS = 20


def make_adapters():
    """Adapters as peft saves them, the logits with them, and twenty steps of AdamW on what they train."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file

    for name, (base, settings) in ADAPTERS.items():
        out = HERE / "adapters" / name
        shutil.rmtree(out, ignore_errors=True)
        case = json.loads((HERE / base / "case.json").read_text())
        model = get_peft_model(opened(HERE / base, torch.float32), LoraConfig(task_type="CAUSAL_LM", **settings))
        draw = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if p.requires_grad:
                    noise = torch.randn(p.shape, generator=draw) * (0.25 if "lora_" in key else 0.05)
                    p.copy_(noise if "lora_" in key else p + noise)
        model.save_pretrained(out)
        (out / "README.md").unlink()
        saved = json.loads((out / "adapter_config.json").read_text())
        (out / "adapter_config.json").write_text(json.dumps(dict(saved, base_model_name_or_path=base), indent=2) + "\n")

        # As anybody reads it back, to go on with it.
        model = PeftModel.from_pretrained(opened(HERE / base, torch.float64), out, is_trainable=True, autocast_adapter_dtype=False).double()
        with torch.no_grad():
            logits = torch.cat([model(torch.tensor([d])).logits[0] for d in case["documents"]])
        moving = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(moving, lr=RATE, weight_decay=DECAY)
        losses = []
        for _ in range(ADAPTER_STEPS):
            optimizer.zero_grad()
            loss = loss_of(model, case["documents"], case["targets"])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(moving, CLIP)
            optimizer.step()
            losses.append(loss.item())
        scratch = out / "scratch"
        model.save_pretrained(scratch)
        after = load_file(scratch / "adapter_model.safetensors")
        shutil.rmtree(scratch)
        tensors = {"logits": logits} | {f"after.{key}": p for key, p in after.items()}
        save_file({k: v.detach().float().contiguous() for k, v in tensors.items()}, out / "expected.safetensors")
        write_case(out, dict(base=base, losses=losses))
        print(f"adapters/{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}", flush=True)


def main():
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    wanted = sys.argv[1:] or [*MODELS, "variants", "lora", "adapters"]
    for name in wanted:
        {"variants": make_variants, "lora": make_lora, "adapters": make_adapters}.get(name, lambda: make(name))()


main()
