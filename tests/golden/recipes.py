"""Losses of recipes on the golden model `llama`, by PyTorch and transformers in f64: recipes.json.

    python tests/golden/recipes.py

Of each case: the summed cross-entropy and, of every gradient, the norm and the product with cos(0), cos(1), …
"""

import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
DOCUMENTS = json.loads((HERE / "llama/case.json").read_text())
RHO = 0.8
BETAS = [0.5, 2.0, 0.1, 0.0]
DISTIL = 0.7


def teacher(row):
    """Token ids and probabilities of a trained row; every third has no teacher."""
    ids = [(7 * row + 5 * j) % 47 for j in range(3)]
    return ids, [0.0, 0.0, 0.0] if row % 3 == 0 else [0.5, 0.3, 0.2]


def rows(model, move=None):
    """Log-probabilities and target of each trained row, document after document."""
    found = []
    for i, (tokens, targets) in enumerate(zip(DOCUMENTS["documents"], DOCUMENTS["targets"])):
        hooks, states = [], []
        for layer, module in enumerate(model.model.layers):

            def moved(_module, _inputs, output, layer=layer, i=i):
                hidden = output[0] if isinstance(output, tuple) else output
                hidden = hidden if move is None else hidden + move[i][layer]
                hidden.retain_grad()
                states.append(hidden)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            hooks.append(module.register_forward_hook(moved))
        logits = model(torch.tensor([tokens])).logits[0]
        [hook.remove() for hook in hooks]
        logs = torch.log_softmax(logits, -1)
        found.append((states, [(logs[at], target) for at, target in enumerate(targets) if target is not None]))
    return found


def gradients(model):
    out = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad.flatten()
        cosines = torch.tensor([math.cos(i) for i in range(len(grad))], dtype=grad.dtype)
        out[name] = [grad.norm().item(), (grad @ cosines).item()]
    model.zero_grad()
    return out


def main():
    model = AutoModelForCausalLM.from_pretrained(HERE / "llama", dtype=torch.float64, attn_implementation="eager")
    cases = {}

    pairs = [pair for _, pairs in rows(model) for pair in pairs]
    loss = full = 0.0
    for row, (logs, target) in enumerate(pairs):
        beta, reference = BETAS[row % 4], 3 + 0.25 * (row % 5)
        loss = loss - logs[target]
        drift = logs[target] + reference
        full = full - (2 / beta * torch.nn.functional.logsigmoid(beta * drift) if beta else logs[target])
        ids, probs = teacher(row)
        full = full + DISTIL * sum(p * (math.log(p) - logs[i]) for i, p in zip(ids, probs) if p)
    full.backward()
    cases["terms"] = {"loss": loss.item(), "gradients": gradients(model)}

    first = rows(model)
    sum(-logs[target] for _, pairs in first for logs, target in pairs).backward()
    # A document of one token has no loss.
    grads = [[torch.zeros_like(s) if s.grad is None else s.grad for s in states] for states, _ in first]
    norm = math.sqrt(sum((g**2).sum().item() for states in grads for g in states))
    model.zero_grad()
    second = rows(model, [[RHO / norm * g for g in states] for states in grads])
    loss = sum(-logs[target] for _, pairs in second for logs, target in pairs)
    loss.backward()
    cases["vaccine"] = {"norm": norm, "loss": loss.item(), "gradients": gradients(model)}
    (HERE / "recipes.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
