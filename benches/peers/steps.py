"""PyTorch's counterparts of `cargo bench -- engine`, whole steps: JSON lines on stdout, in the format of its --json.

usage: steps.py [FILTER ...] [--device cuda|cpu] [--tiny] [--list]

Models of the same shapes with random weights (transformers, bf16, SDPA attention):
  train-all       forward, backward, clipping, fused AdamW
  train-lora-16   the same with adapters of rank 16 on every projection (peft)
  sweep-layer     the loop that perturbs a projection of the middle layer, runs all prompts, and restores it: 14 copies
  generate        greedy tokens
"""
import gc

import torch
import transformers

import clock

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(bench, shape):
    config = transformers.LlamaConfig(
        vocab_size=shape["vocab"], hidden_size=shape["hidden"], intermediate_size=shape["ffn"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"], head_dim=shape["head_dim"], rms_norm_eps=1e-5,
        max_position_embeddings=8192, tie_word_embeddings=shape["tied"], bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(bench.device, bench.dtype)


def documents(vocab, count, tokens):
    return [[(d * 7919 + i * 104_729) % vocab for i in range(tokens)] for d in range(count)]


def train(bench, shape, op, adapters, packed):
    count, tokens = packed

    def make():
        model = build(bench, shape)
        if adapters:
            import peft
            model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
        model.config.use_cache = False
        model.train()
        moving = [p for p in model.parameters() if p.requires_grad]
        ids = torch.tensor(documents(shape["vocab"], count, tokens), device=bench.device)
        return model, moving, torch.optim.AdamW(moving, lr=1e-5, weight_decay=0.0, fused=True), ids

    def step(model, moving, optimizer, ids):
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    bench.run("engine", op, f"{shape['name']}/{count}x{tokens}", "torch-peft" if adapters else "torch", (0, 0), make, step, capture=False)


def sweep(bench, shape, prompts):
    count, tokens = prompts

    def make():
        model = build(bench, shape).eval()
        return model, torch.tensor(documents(shape["vocab"], count, tokens), device=bench.device)

    @torch.inference_mode()
    def layer(model, ids):
        block = model.model.layers[shape["layers"] // 2]
        for kind in PROJECTIONS:
            weight = getattr(block.self_attn if kind in PROJECTIONS[:4] else block.mlp, kind).weight
            for sign in (1.0, -1.0):
                clean = weight.clone()
                noise = torch.randn_like(weight)
                weight.add_(noise * (sign * weight.float().norm() / noise.float().norm()))
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
                model.lm_head.weight[:4] @ hidden.t()
                weight.copy_(clean)

    bench.run("engine", "sweep-layer", f"{shape['name']}/{count}x{tokens}", "torch-loop", (0, 0), make, layer, capture=False)


def generate(bench, shape, answers):
    for count, length in answers:

        def make():
            return build(bench, shape).eval(), torch.tensor(documents(shape["vocab"], count, length), device=bench.device)

        @torch.inference_mode()
        def answer(model, ids):
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)

        bench.run("engine", "generate", f"{shape['name']}/{count}x{length}", "torch", (0, 0), make, answer, capture=False)


def main():
    bench = clock.Bench(clock.arguments(__doc__, ["engine"]))
    transformers.utils.logging.set_verbosity_error()
    for steps in bench.scale["steps"]:
        shape = bench.all_models[steps["model"]]
        train(bench, shape, "train-all", False, steps["packed"])
        generate(bench, shape, steps["answers"])
        sweep(bench, shape, steps["prompts"])
        train(bench, shape, "train-lora-16", True, steps["packed"])
        gc.collect()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
