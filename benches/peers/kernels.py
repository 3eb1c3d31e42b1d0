"""PyTorch's counterparts of our kernels, at the shapes of `cargo bench`: JSON lines on stdout, in the format of `cargo bench -- --json`.

usage: kernels.py [FILTER ...] [--device cuda|cpu] [--tiny] [--list]

    python benches/peers/kernels.py > peers.jsonl
    cargo bench -- --json > ours.jsonl
    python scripts/bench_report.py table ours.jsonl peers.jsonl

Variants: `torch` (one call of the library), `torch-compile` (eager code through torch.compile), `torch-flash` and `torch-cudnn`
(attention), `torch-fused` (AdamW). They compute the same results from as many bytes; clock.py times them. A variant that does
not support a shape is reported on stderr and by a line {"family", "missing", "reason"}.
"""
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import clock

# Costs, (bytes, FLOPs) of a call, are those of src/backend/cost.rs, which cargo bench uses: what is changed there is changed here.


def layers(model):
    q, kv = model["heads"] * model["head_dim"], model["kv_heads"] * model["head_dim"]
    return [(model["hidden"], q), (model["hidden"], kv), (model["hidden"], model["ffn"]), (model["ffn"], model["hidden"])]


def gemm(bench):
    for model in bench.models:
        shapes = [(bench.tokens, *layer) for layer in layers(model)] + [(bench.scale["head_tokens"], model["hidden"], model["vocab"])]
        for tokens, inputs, outputs in shapes:
            shape, flops = f"{model['name']}/{tokens}x{inputs}x{outputs}", 2 * tokens * inputs * outputs
            size = bench.element() * (tokens * inputs + inputs * outputs + tokens * outputs)
            make = lambda: (bench.random(tokens, inputs), bench.random(outputs, inputs), bench.random(tokens, outputs))
            bench.run("gemm", "forward", shape, "torch", (size, flops), make, lambda x, w, y: torch.mm(x, w.t(), out=y))
            bench.run("gemm", "backward-input", shape, "torch", (size, flops), make, lambda dx, w, dy: torch.mm(dy, w, out=dx))
            # Our gradient is f32; so is this, if the library supports it.
            wide = size + (4 - bench.element()) * inputs * outputs
            weight = (lambda x, w, dy: torch.mm(dy.t(), x, out_dtype=torch.float32)) if bench.cuda else (lambda x, w, dy: torch.mm(dy.t(), x))
            bench.run("gemm", "backward-weight", shape, "torch", (wide, flops), make, weight)
        for tokens in bench.scale["decoded_tokens"]:
            for outputs in (model["ffn"], model["vocab"]):
                inputs = model["hidden"]
                size = bench.element() * (tokens * inputs + inputs * outputs + tokens * outputs)
                make = lambda: (bench.random(tokens, inputs), bench.random(outputs, inputs), bench.random(tokens, outputs))
                bench.run("gemm", "decode", f"{model['name']}/{tokens}x{inputs}x{outputs}", "torch", (size, 2 * tokens * inputs * outputs), make,
                          lambda x, w, y: torch.mm(x, w.t(), out=y))


# Backends of scaled_dot_product_attention; the last is the CPU's, for trials.
ATTENTION = {"torch-flash": SDPBackend.FLASH_ATTENTION, "torch-cudnn": SDPBackend.CUDNN_ATTENTION, "torch-math": SDPBackend.MATH}


def attention(bench):
    cases = [(model, packed) for model in bench.models for packed in bench.scale["packed"]]
    cases += [(bench.all_models[case["model"]], case["packed"]) for case in bench.scale["published"]]
    for model, (count, length) in cases:
        heads, kv_heads, head_dim = model["heads"], model["kv_heads"], model["head_dim"]
        shape, pairs, tokens = f"{model['name']}/{count}x{length}", count * length * (length + 1) // 2, count * length
        q_len, kv_len = tokens * heads * head_dim, tokens * kv_heads * head_dim
        size = lambda q, kv: bench.element() * (q * q_len + kv * kv_len) + 4 * tokens * heads
        forward_cost, backward_cost = (size(2, 2), 4 * pairs * heads * head_dim), (size(4, 4), 10 * pairs * heads * head_dim)
        for variant in ("torch-flash", "torch-cudnn") if bench.cuda else ("torch-math",):

            def forward(q, k, v, *_, backend=ATTENTION[variant]):
                with sdpa_kernel([backend]):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)

            def make(grad=False, forward=forward):
                q = bench.random(count, heads, length, head_dim, grad=grad)
                k, v = (bench.random(count, kv_heads, length, head_dim, grad=grad) for _ in range(2))
                return (q, k, v, forward(q, k, v), torch.randn_like(q, requires_grad=False)) if grad else (q, k, v)

            bench.run("attention", "forward", shape, variant, forward_cost, make, forward)
            backward = lambda q, k, v, o, d_o: torch.autograd.grad(o, (q, k, v), d_o, retain_graph=True)
            bench.run("attention", "backward", shape, variant, backward_cost, lambda make=make: make(True), backward,
                      capture=False)


def rmsnorm(bench):
    def norm(x, w):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w

    def gradient(x, w, dy, residual):
        wide, d = x.float(), dy.float() * w.float()
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        dx = rstd * (d - wide * rstd * rstd * (d * wide).mean(-1, keepdim=True))
        return (dx + residual).to(x.dtype), (dy.float() * wide * rstd).sum(0)

    forward, backward = bench.compiled(norm), bench.compiled(gradient)
    rows = [(m["name"], bench.tokens, m["hidden"]) for m in bench.models] + [("q-norm", 16 * bench.tokens, 128)]
    for name, count, width in rows:
        shape, n = f"{name}/{count}x{width}", count * width
        cost = lambda tensors, flops: (bench.element() * (tensors * n + width) + 4 * count, flops * n)
        make = lambda: (bench.random(count, width), bench.random(width))
        bench.run("rmsnorm", "forward", shape, "torch-compile", cost(2, 4), make, forward)
        make_all = lambda: (*make(), bench.random(count, width), bench.random(count, width))
        bench.run("rmsnorm", "backward", shape, "torch-compile", cost(4, 11), make_all, backward)


def rope(bench):
    def turn(x, table, positions):
        cosines, sines = table[positions].unsqueeze(1).chunk(2, dim=-1)
        low, high = x.float().chunk(2, dim=-1)
        return torch.cat((low * cosines - high * sines, high * cosines + low * sines), dim=-1).to(x.dtype)

    compiled = bench.compiled(turn)
    for model in bench.models:
        heads, head_dim = model["heads"], model["head_dim"]
        n = bench.tokens * heads * head_dim
        make = lambda: (bench.random(bench.tokens, heads, head_dim), bench.random(1024, head_dim, dtype=torch.float32),
                        torch.arange(bench.tokens, device=bench.device) % 1024)
        bench.run("rope", "forward", f"{model['name']}/{bench.tokens}x{heads}x{head_dim}", "torch-compile",
                  (2 * bench.element() * n, 3 * n), make, compiled)


def swiglu(bench):
    def gradient(gate, up, dy):
        g, u, d = gate.float(), up.float(), dy.float()
        sigmoid = torch.sigmoid(g)
        return (d * u * sigmoid * (1 + g * (1 - sigmoid))).to(gate.dtype), (d * g * sigmoid).to(up.dtype)

    forward = bench.compiled(lambda gate, up: (F.silu(gate.float()) * up.float()).to(gate.dtype))
    backward = bench.compiled(gradient)
    for model in bench.models:
        shape, n = f"{model['name']}/{bench.tokens}x{model['ffn']}", bench.tokens * model["ffn"]
        tensors = lambda count: tuple(bench.random(bench.tokens, model["ffn"]) for _ in range(count))
        bench.run("swiglu", "forward", shape, "torch-compile", (3 * bench.element() * n, 5 * n), lambda: tensors(2), forward)
        bench.run("swiglu", "backward", shape, "torch-compile", (5 * bench.element() * n, 13 * n), lambda: tensors(3), backward)


def embedding(bench):
    rows = bench.scale["table_rows"]
    for model in bench.models:
        width, n = model["hidden"], bench.tokens * model["hidden"]
        shape, moved = f"{model['name']}/{bench.tokens}x{width}", (2 * bench.element() * n + 4 * bench.tokens, 0)
        table, first = bench.random(rows, width), [0]

        def indices(step):
            first[0] += bench.tokens * step
            return (first[0] + step * torch.arange(bench.tokens, device=bench.device)) % rows

        bench.run("embedding", "gather", shape, "torch", moved, lambda: (indices(7919),), lambda i: F.embedding(i, table))
        make = lambda: (indices(7919), bench.random(bench.tokens, width))
        bench.run("embedding", "scatter", shape, "torch", moved, make, lambda i, x: table.index_copy_(0, i, x))
        # In f32 as ours, but in no fixed order.
        wide = table.float()
        cost = ((bench.element() + 8) * n + 4 * bench.tokens, n)
        make = lambda: (indices(16), bench.random(bench.tokens, width))
        bench.run("embedding", "backward", shape, "torch", cost, make, lambda i, dy: wide.index_add_(0, i, dy.float()))


def cross_entropy(bench):
    def losses(logits, targets):
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def gradient(logits, targets):
        wide = logits.float()
        probabilities = torch.softmax(wide, -1)
        chosen = F.one_hot(targets, logits.shape[-1])
        return F.cross_entropy(wide, targets, reduction="none"), (probabilities - chosen).to(logits.dtype)

    rows = bench.scale["logit_rows"]
    compiled = bench.compiled(losses), bench.compiled(gradient)
    for model in bench.models:
        n = rows * model["vocab"]
        make = lambda: (bench.random(rows, model["vocab"]), torch.arange(rows, device=bench.device) * 7919 % model["vocab"])
        for op, tensors, flops, call in (("loss", 1, 4, compiled[0]), ("gradient", 2, 7, compiled[1])):
            bench.run("cross_entropy", op, f"{model['name']}/{rows}x{model['vocab']}", "torch-compile",
                      (tensors * bench.element() * n, flops * n), make, call)


def sampling(bench):
    def nucleus(logits):
        probabilities = torch.softmax(logits.float() / 0.7, -1)
        ordered, order = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered > 0.9] = 0
        return order.gather(-1, torch.multinomial(ordered, 1))

    for model in bench.models:
        for rows in bench.scale["sampled_rows"]:
            shape, n = f"{model['name']}/{rows}x{model['vocab']}", rows * model["vocab"]
            cost = lambda flops: (bench.element() * n, flops * n)
            make = lambda: (bench.random(rows, model["vocab"]),)
            bench.run("sampling", "greedy", shape, "torch", cost(1), make, lambda logits: logits.argmax(-1))
            bench.run("sampling", "nucleus", shape, "torch", cost(80), make, nucleus, capture=False)


def adamw(bench):
    least = bench.scale["stepped_elements"]
    for model in bench.models:
        (h, q), (_, kv), (_, ffn), _ = layers(model)
        module = [(q, h), (kv, h), (kv, h), (h, q), (ffn, h), (ffn, h), (h, ffn)]
        size = sum(a * b for a, b in module)
        count = -(-least // size)
        elements, shape = count * size, f"{model['name']}/{count}-layers"

        def make():
            weights = [bench.random(*shape, grad=True) for _ in range(count) for shape in module]
            for w in weights:
                w.grad = bench.random(*w.shape)
            optimizer = torch.optim.AdamW(weights, lr=1e-5, weight_decay=0.1, fused=True)
            optimizer.step()
            return optimizer, [w.grad for w in weights]

        # Weights, gradients and moments in one type, rounded to nearest.
        state = "bf16" if bench.cuda else "f32"
        bench.run("adamw", f"step-{state}", shape, "torch-fused", (7 * bench.element() * elements, 14 * elements), make, lambda o, _: o.step(),
                  capture=False)
        bench.run("adamw", f"squares-{state}", shape, "torch", (bench.element() * elements, 2 * elements), make,
                  lambda _, grads: torch._foreach_norm(grads), capture=False)


def perturb(bench):
    def both(w, n):
        scaled = 0.1 * w.float().norm() / n.float().norm() * n.float()
        return (w.float() + scaled).to(w.dtype), (w.float() - scaled).to(w.dtype)

    compiled = bench.compiled(both)
    for model in bench.models:
        n = model["ffn"] * model["hidden"]
        shape, make = f"{model['name']}/{model['ffn']}x{model['hidden']}", lambda: (bench.random(model["ffn"], model["hidden"]),)
        bench.run("perturb", "gaussian", shape, "torch-compile", (3 * bench.element() * n, 16 * n), make, lambda w: compiled(w, torch.randn_like(w)))
        bench.run("perturb", "given", shape, "torch-compile", (4 * bench.element() * n, 8 * n), lambda: make() + make(), compiled)


FAMILIES = [gemm, attention, rmsnorm, rope, swiglu, embedding, cross_entropy, sampling, adamw, perturb]


def main():
    bench = clock.Bench(clock.arguments(__doc__, [family.__name__ for family in FAMILIES]))
    for family in FAMILIES:
        family(bench)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
