"""Writes rope.json and templates.json: what transformers computes for the tests of the model room.

Run with transformers 5: python tests/model/oracle.py
"""
import json
import pathlib

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.chat_template_utils import _compile_jinja_template

here = pathlib.Path(__file__).parent

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "million": {"rope_type": "default", "rope_theta": 1000000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic_long": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 256},
    "yarn": {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn_all": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40, "beta_fast": 16, "beta_slow": 2,
                 "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False, "original_max_position_embeddings": 512},
    "yarn_silent": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0},
    "yarn_factor": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "attention_factor": 1.25},
}
LENGTHS = {"dynamic_long": 3000}


def rope_cases():
    cases = []
    for name, rope in ROPES.items():
        config = LlamaConfig(vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                             num_attention_heads=3, num_key_value_heads=1, head_dim=32,
                             max_position_embeddings=1024, rope_parameters=dict(rope))
        length = LENGTHS.get(name, 600)
        rotary = LlamaRotaryEmbedding(config)
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None])
        rows = [0, 1, 2, 17, 255, length - 1]
        half = config.head_dim // 2
        table = torch.cat((cos[0, rows, :half], sin[0, rows, :half]), dim=-1)
        cases.append({"name": name, "config": json.loads(config.to_json_string()), "length": length, "rows": rows,
                      "table": [[float(x) for x in row] for row in table]})
    return cases


USER = {"role": "user", "content": " How many legs has a spider? "}
ANSWER = {"role": "assistant", "content": "<think>\nSpiders: eight.\n</think>\n\nEight."}
SYSTEM = {"role": "system", "content": "Answer briefly.\n"}
AGAIN = {"role": "user", "content": "Ünïcödé <b>&amp; \"quotes\"</b> 😀"}
CONVERSATIONS = [[USER], [SYSTEM, USER], [USER, ANSWER], [SYSTEM, USER, ANSWER, AGAIN], [USER, ANSWER, AGAIN, ANSWER],
                 [USER, USER]]


def template_cases():
    cases = []
    for path in sorted((here / "templates").glob("*.jinja")):
        template = _compile_jinja_template(path.read_text())
        for messages in CONVERSATIONS:
            for prompt in (False, True):
                try:
                    text = template.render(messages=messages, tools=None, documents=None, add_generation_prompt=prompt,
                                           bos_token="<s>", eos_token="</s>")
                except Exception as error:
                    text = {"error": str(error)}
                cases.append({"template": path.name, "messages": messages, "generation_prompt": prompt, "text": text})
    return cases


for name, cases in (("rope", rope_cases()), ("templates", template_cases())):
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (here / f"{name}.json").write_text(f"[\n{lines}\n]\n")
