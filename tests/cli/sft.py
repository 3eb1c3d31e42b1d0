"""Losses of 20 steps by TRL's SFTTrainer on the tiny model: sft.json.

    python tests/cli/sft.py        (trl 1.16, transformers 5.23, torch 2.15, on a CPU in f32)

`assistant`: messages with assistant_only_loss; `completion`: prompt and completion; `accumulated`: messages, two micro-batches a step.
"""
import json
import pathlib
import random
import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

here = pathlib.Path(__file__).parent
tiny = here.parent.parent / "assets/tiny"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = ["kelm", "dorb", "which", "is", "big", "?", ".", "pick", "one", "of", ",", "small", "the", "first", "sorry"]


class Recorded(SFTTrainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.recorded.append(float(loss))
        return loss


def losses(rows, accumulation, **options):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = TEMPLATE
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_length=250, max_steps=20, per_device_train_batch_size=4, learning_rate=1e-3,
        gradient_accumulation_steps=accumulation, lr_scheduler_type="constant", weight_decay=0.1, max_grad_norm=1.0,
        train_sampling_strategy="sequential", gradient_checkpointing=False, use_cpu=True, bf16=False, report_to=[],
        save_strategy="no", disable_tqdm=True, **options)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    trainer = Recorded(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.recorded = []
    trainer.train()
    found = trainer.recorded
    return [sum(found[i:i + accumulation]) for i in range(0, len(found), accumulation)]


random.seed(3)


def say(count):
    return " ".join(random.choice(WORDS) for _ in range(count))


def turns(i):
    return [{"role": "user", "content": say(3 + i % 7)}, {"role": "assistant", "content": say(2 + i % 5)}]


chats = [turns(i) + (turns(i + 4) if i % 3 == 0 else []) for i in range(40)]
messages = [{"messages": chat} for chat in chats]
pairs = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]
found = {"template": TEMPLATE, "messages": messages, "pairs": pairs, "losses": {
    "assistant": losses(messages, 1, assistant_only_loss=True),
    "completion": losses(pairs, 1),
    "accumulated": losses(messages, 2, assistant_only_loss=True),
}}
(here / "sft.json").write_text(json.dumps(found) + "\n")
