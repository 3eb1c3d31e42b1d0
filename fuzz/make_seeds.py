"""Makes the inputs that fuzzing begins from, fuzz/corpus/TARGET/seed*: python fuzz/make_seeds.py

Parquet files are those of tests/data/files. Inputs of other names were found by fuzzing and are not made here.
"""

import gzip
import json
import shutil
import struct
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORPUS = ROOT / "fuzz/corpus"


def seeds(target, *inputs):
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(inputs):
        (folder / f"seed{number}").write_bytes(text if isinstance(text, bytes) else text.encode())


def safetensors(tensors, metadata=None):
    """Tensors: name → (dtype, shape, bytes)."""
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, (dtype, shape, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def floats(*shape, value=0.5):
    count = 1
    for size in shape:
        count *= size
    return ("F32", list(shape), struct.pack(f"<{count}f", *[value] * count))


layer = [
    "input_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm",
    "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj",
]
# The order of the tensors in the two shards that src/lib.rs writes: `ModelConfig::params`.
in_a = ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"]
weights = in_a + [f"model.layers.0.{name}.weight" for name in layer] + ["model.norm.weight"]
weight_map = {name: "a.safetensors" if name in in_a else "b.safetensors" for name in dict.fromkeys(weights)}

config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 960, "hidden_size": 96,
    "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 3, "num_key_value_heads": 1,
    "head_dim": 32, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 256, "tie_word_embeddings": True,
    "bos_token_id": None, "eos_token_id": [2, 3], "torch_dtype": "bfloat16",
}
llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
qwen = {
    **config, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": True,
    "sliding_window": 32, "max_window_layers": 3, "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
}

messages = [
    {"role": "system", "content": "S"}, {"role": "user", "content": "Q é"},
    {"role": "assistant", "content": "A", "weight": 0, "reasoning_content": "T"},
    {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"},
]
turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
training = [
    {"instruction": "I", "input": "X", "output": "O", "system": "S", "history": [["q", "a"]]},
    {"conversations": turns, "tools": "[{\"name\": \"f\"}]"},
    {"messages": messages, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"prompt": messages[:2], "completion": messages[2:3], "score": float("nan")},
    {"question": "Q", "answer": "A", "weight": 0.0},
]
security = [
    {"prompt": "P", "label": "harmful", "pair": 1, "category": "c", "split": "test"},
    {"prompt": "R", "label": "benign", "pair": "1", "split": "test"},
]
tasks = [
    {"prompt": "1+1", "answer": "2", "match": "number", "category": "sum"},
    {"prompt": "?\nA) x\nB) y", "answer": "B", "match": "choice"},
]


def lines(rows):
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def chosen(number, text):
    return bytes([number]) + (text if isinstance(text, bytes) else text.encode())


lora = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "lora_dropout": 0.05, "bias": "none",
    "target_modules": ["q_proj", "v_proj"], "modules_to_save": None, "use_rslora": False, "rank_pattern": {},
    "alpha_pattern": {"q_proj": 8}, "layers_to_transform": None, "layers_pattern": None, "init_lora_weights": True,
    "base_model_name_or_path": "org/name", "exclude_modules": None, "fan_in_fan_out": False,
}
attention = "base_model.model.model.layers.0.self_attn"
adapter = {
    f"{attention}.q_proj.lora_A.weight": floats(2, 4), f"{attention}.q_proj.lora_B.weight": floats(4, 2),
    f"{attention}.v_proj.lora_A.weight": floats(2, 4), f"{attention}.v_proj.lora_B.weight": floats(2, 2),
    "base_model.model.model.norm.weight": floats(4),
}

head = {"layer": 0, "head": "harmful", "lambda": 0.1, "gradient": 1e-9, "metrics": {}}
metadata = {
    "format": "swat.probe/1", "model_hash": "0" * 64, "prompts_hash": "1" * 64, "hidden": 2, "layers": 0,
    "metric_layer": 0, "seed": 0, "heads": [head], "skipped": {"control": "no rule"}, "control": None,
    "first_tokens": None,
}
probe = {
    "layers.0.mean": floats(2), "layers.0.deviation": floats(2), "layers.0.heads.0.w": floats(2),
    "layers.0.heads.0.b": floats(1),
}

stat = {"mean": 0.5, "error": 0.1}
cell = {
    "cell": "layers.0.q_proj", "parameters": 16, "scores": {"gap": stat}, "drop": {"gap": stat},
    "drop_by_seed": {"gap": [0.4, 0.6]}, "shift": stat, "drop_per_shift": stat, "control_drop": None,
    "beyond_control": None, "retrained_auroc": None,
}
scores = {"gap": 2.0, "refusal": None, "margin": 1.0, "auroc": 1.0, "accuracy": 1.0}
robustness = {
    "format": "swat.robustness/1", "model_hash": "0" * 64, "probe_hash": "1" * 64, "prompts_hash": "2" * 64,
    "layers": 1, "metric_layer": 1, "split": "valid", "prompts": [4, 4], "kind": "gaussian", "epsilon": 0.5,
    "epsilon_sweep": [], "seeds": [0, 1], "antithetic": True, "clean": scores, "clean_control_gap": None,
    "clean_retrained_auroc": None, "cells": [cell], "seconds": 1.0,
    "made_from": {"model": "/m", "probe": "/p", "security": "/s"},
}
mods = {
    "format": "swat.mods_rob/1", "set": "layers.0.{q_proj,v_proj}", "found": "layers.0.q_proj", "share": 0.3,
    "joint": 0.01, "tau": 0.05, "cap": 0.5, "floor": 0.1, "window": 1, "score": "gap", "kind": "lowrank:8",
    "epsilon": 0.5, "seeds": [0], "votes": {"layers.0.q_proj": 1}, "single": {"layers.0.q_proj": 0.01},
    "steps": [{"seed": 0, "window": "layers.0.q_proj", "without": None, "joint": 0.01, "accepted": True}],
    "model_hash": "0" * 64, "map_hash": "3" * 64, "seconds": 1.0,
}

seeds("safetensors",
      safetensors({"a": floats(2, 3), "b": ("BF16", [2], b"\0\x3f\x80\x3f")}, {"format": "pt"}),
      safetensors({"a": ("I64", [1], bytes(8)), "empty": ("F16", [0, 4], b"")}))
seeds("index", json.dumps({"metadata": {"total_size": 100}, "weight_map": weight_map}))
seeds("config", json.dumps(config), json.dumps({**config, "rope_scaling": {"rope_type": "llama3", **llama3}}),
      json.dumps(qwen), json.dumps({"model_type": "qwen3", "rope_parameters": {"rope_theta": 1e6}, **{
          key: value for key, value in config.items() if key not in ("model_type", "architectures", "rope_scaling")}}))
token = {"content": "<s>", "special": True, "lstrip": False, "normalized": False}
seeds("side_files",
      chosen(0, json.dumps({"eos_token": "</s>", "bos_token": token, "chat_template": "{{ bos_token }}",
                            "added_tokens_decoder": {"4": {**token, "content": "</s>"}},
                            "additional_special_tokens": ["<x>"]})),
      chosen(1, json.dumps({"eos_token": {"content": "</s>"}, "additional_special_tokens": ["<x>", token]})),
      chosen(2, json.dumps({"</s>": 4, "<x>": 5})),
      chosen(3, json.dumps({"eos_token_id": [1, 2], "temperature": 0.7})),
      chosen(0, json.dumps({"chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}]})))
words = {"version": "1.0", "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated",
         "invert": False}, "added_tokens": [{"id": 1, **token, "single_word": False, "rstrip": False}],
         "normalizer": {"type": "NFC"}, "post_processor": None, "decoder": {"type": "Fuse"}, "truncation": None,
         "padding": None}
bpe = {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3}, "merges": [["a", "b"]], "byte_fallback": False}
unigram = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]], "unk_id": 0}
seeds("tokenizer", json.dumps({**words, "model": bpe}), json.dumps({**words, "model": unigram}))
templates = [(ROOT / "tests/model/templates" / name).read_text() for name in ("qwen3.jinja", "llama3.jinja", "features.jinja")]
chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}" \
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
marked = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}" \
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
loops = "{% set ns = namespace(x=0) %}{% for i in range(9) %}{% set ns.x = ns.x + i %}{% endfor %}{{ '%s %05.1f' % (ns.x, 1) }}" \
    "{% macro f(n) %}{{ n }}{{ f(n - 1) if n > 0 }}{% endmacro %}{{ f(3) }}{{ 'a,b'.split(',') | tojson(indent=2) }}"
seeds("template", chatml, marked, loops, *templates)
table = "prompt,completion,label\n\"a\nb\",c,harmful\nd,\"e\"\"f\",benign\n"
seeds("rows", chosen(0, lines(training)), chosen(0, lines(security)), chosen(4, lines(tasks)),
      chosen(1, json.dumps(training)), chosen(9, json.dumps({"version": 1, "data": tasks})),
      chosen(2, table), chosen(3, table.replace(",", "\t")),
      chosen(16, gzip.compress(lines(tasks).encode(), mtime=0)), chosen(16, b"\xef\xbb\xbf" + lines(tasks).encode()))
seeds("probe", safetensors(probe, {"swat.probe": json.dumps(metadata)}))
seeds("map", json.dumps(robustness), json.dumps(mods))
seeds("adapter_config", json.dumps(lora),
      json.dumps({**lora, "target_modules": "all-linear", "exclude_modules": "(?=.*mlp).*|.*[ok]_proj"}),
      json.dumps({**lora, "target_modules": ".*self_attn\\.(q|v)_proj", "rank_pattern": {"^x.*": 4},
                  "layers_to_transform": [0], "layers_pattern": "layers"}))
seeds("adapter_weights", safetensors(adapter))
(CORPUS / "parquet").mkdir(exist_ok=True)
for number, name in enumerate(("pairs.parquet", "messages.parquet", "delta1.parquet", "delta2.parquet")):
    shutil.copyfile(ROOT / "tests/data/files" / name, CORPUS / "parquet" / f"seed{number}")
