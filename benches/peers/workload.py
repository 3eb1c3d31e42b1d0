"""The inputs of both sides, generated from a seed: nothing is downloaded, and nothing in them is harmful."""
import json
import random

WORDS = """river stone garden window bread silver morning paper bridge summer winter train letter music silence forest bottle market
village candle mirror ocean island valley engine ladder basket pillow carpet button pocket butter pepper ginger lemon cherry apple
orange yellow purple crimson""".split()
# A minimal template, so that a prompt of a given length needs few words.
TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def conversations(path, count, numbers=120, seed=0):
    """Sums, about six tokens each: one short question, and an answer that is longer than any example is cut to."""
    draw = random.Random(seed)
    with open(path, "w") as out:
        for _ in range(count):
            pairs = [(draw.randrange(1000), draw.randrange(1000)) for _ in range(numbers)]
            answer = " ".join(f"{a} plus {b} is {a + b}." for a, b in pairs)
            turns = [{"role": "user", "content": "Add some numbers."}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": turns}) + "\n")


def security(path, template_path, tokenizer, count, tokens, seed=0):
    """`count` prompts a split of exactly `tokens` tokens with the template. Half of them carry the label harmful: nothing in them is, the
    timed commands only want both labels, and words that tell the two apart, so that a probe can be trained."""
    draw = random.Random(seed)
    template_path.write_text(TEMPLATE)
    length = lambda text: len(tokenizer.apply_chat_template([{"role": "user", "content": text}], chat_template=TEMPLATE,
                                                            add_generation_prompt=True, return_dict=True)["input_ids"])
    with open(path, "w") as out:
        for split in ("train", "valid", "test"):
            written = 0
            while written < count:
                label = ("harmful", "benign")[written % 2]
                words = WORDS[: len(WORDS) // 2] if written % 2 else WORDS[len(WORDS) // 2:]
                text = "Tell me about"
                while length(text) < tokens:
                    text += " " + draw.choice(words)
                if length(text) == tokens:
                    pair = f"{split}-{written // 2}"
                    out.write(json.dumps({"prompt": text, "label": label, "pair": pair, "split": split}) + "\n")
                    written += 1
