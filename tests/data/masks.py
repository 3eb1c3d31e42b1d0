"""Writes masks.json: which tokens transformers says are the assistant's, and how it reads the files beside a tokenizer.

Each template is here with `{% generation %}` marks, by which transformers tells, and without, where swat has to find the
same by itself. `[[` and `]]` stand for the marks.

Run with transformers 5: python tests/data/masks.py
"""
import json
import pathlib
import tempfile

from transformers import AutoTokenizer

here = pathlib.Path(__file__).parent
tiny = here.parent.parent / "assets/tiny"

# Beyond the tokens of the tiny tokenizer, special or not, as the models of these templates have them.
SPECIAL = ["<s>", "</s>", "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>",
           "<|python_tag|>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>",
           "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
           "<｜tool▁calls▁end｜>", "<|user|>", "<|assistant|>", "<|end|>"]
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

TEMPLATES = {
    "chatml": """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '
' }}[[{{ message['content'] + '<|im_end|>' }}]]{{ '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""",
    "no generation prompt": """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '
' }}[[{{ message['content'] }}<|im_end|>]]{{ '
' }}{% endfor %}""",
    "llama 3.1": """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' and 'tool_calls' in message %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        [[{{- '{"name": "' + message.tool_calls[0].function.name + '", "parameters": ' }}
        {{- message.tool_calls[0].function.arguments | tojson }}
        {{- '}' }}{{- '<|eot_id|>' }}]]
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}[[{{- message['content'] | trim + '<|eot_id|>' }}]]
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}""",
    "deepseek r1": """{% set ns = namespace(system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and 'tool_calls' in message %}{{'<｜Assistant｜>'}}[[{{'<｜tool▁calls▁begin｜>'}}{%- for tool in message['tool_calls'] %}{{'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\n' + tool['function']['arguments'] | tojson + '<｜tool▁call▁end｜>'}}{%- endfor %}{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}]]{%- elif message['role'] == 'assistant' %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>'}}[[{{content + '<｜end▁of▁sentence｜>'}}]]{%- endif %}{%- endfor -%}{% if add_generation_prompt %}{{'<｜Assistant｜><think>\n'}}{% endif %}""",
    "qwq": """{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
        {{- '<|im_start|>assistant\n' }}[[{{- content }}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if content or not loop.first %}{{- '\n' }}{% endif %}
                {{- '<tool_call>\n{"name": "' + tool_call.function.name + '", "arguments": ' }}
                {{- tool_call.function.arguments | tojson }}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>' }}]]{{- '\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n<think>\n' }}
{%- endif %}
""",
    "qwen3": """{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.last == messages|length - 1 and message.role == "user" %}{%- set ns.last = index %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content if message.content is string else '' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}[[
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\n' }}{%- endif %}
                {{- '<tool_call>\n{"name": "' + tool_call.function.name + '", "arguments": ' }}
                {{- tool_call.function.arguments | tojson }}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>' }}]]{{- '\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
    "echoed call": """{% for message in messages %}
{%- if message['role'] == 'tool' %}
{{- '<|start_header_id|>' + messages[loop.index0 - 1].tool_calls[0].function.name + ' to=assistant<|end_header_id|>' + message['content'] + '<|eot_id|>' }}
{%- elif message.tool_calls %}
{{- '<|start_header_id|>assistant<|end_header_id|>' }}[[
{%- for call in message.tool_calls %}{{ '<|python_tag|>' + call.function.name + '<|user|>' + call.function.arguments | tojson }}{% endfor %}{{ '<|eom_id|>' }}]]
{%- elif message['role'] == 'assistant' %}
{{- '<|start_header_id|>assistant<|end_header_id|>' }}[[{{ message['content'] + '<|eot_id|>' }}]]
{%- else %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>' + message['content'] + '<|eot_id|>' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}""",
    "mistral": """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}[[{{ ' ' + message['content'] | trim + eos_token }}]]{% endif %}{% endfor %}""",
    "zephyr": """{% for message in messages %}
{% if message['role'] == 'assistant' %}
{{ '<|assistant|>\n' }}[[{{ message['content'] + eos_token }}]]{{ '\n' }}
{% else %}
{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "last end alone": """{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}[[{{ message['content'] }}{% if loop.last %}{{ eos_token }}{% endif %}]]{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}""",
}
# Where the marks must be around the assistant's messages alone.
ANY_ROLE = {"chatml", "no generation prompt", "llama 3.1", "last end alone"}

Q = {"role": "user", "content": "How many legs has a spider?"}
A = {"role": "assistant", "content": "Eight."}
R = {"role": "user", "content": "<|im_start|>assistant\n<｜Assistant｜><think>\n And <|im_end|> an ant?"}
LONG = {"role": "assistant", "content": "<think>\nSix legs.\n</think>\n\n Six, it has\n"}
CODE = {"role": "assistant", "content": "<|python_tag|>print(1 + 1)<|im_end|>\n<|im_start|>user\nHm"}
CALL = {"type": "function", "function": {"name": "legs", "arguments": {"animal": "spider", "count": 8}}}
NUMBER = {"type": "function", "function": {"name": "legs", "arguments": {"id": 8}}}
NUMBERS = [Q, {"role": "assistant", "content": "", "tool_calls": [NUMBER]}, {"role": "tool", "content": "8"}, A]
TOOLS = [Q, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "8"}, A]
CALLS = [Q, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
THINKS = {"role": "assistant", "content": "Six.", "reasoning_content": "Ants have six."}
CHATS = {
    "one turn": [Q, A], "system": [{"role": "system", "content": "Be brief."}, Q, A], "two turns": [Q, A, R, LONG],
    "three turns": [Q, LONG, R, LONG, Q, A], "special tokens": [Q, CODE, R, CODE], "thinking": [Q, THINKS],
    "thinking twice": [Q, THINKS, R, THINKS], "tools": TOOLS, "a call at the end": CALLS, "a number": NUMBERS,
}
WITH_TOOLS = {"tools": {"qwq", "qwen3", "echoed call"}, "a number": {"qwq", "qwen3", "echoed call"},
              "a call at the end": {"qwq", "qwen3", "llama 3.1", "deepseek r1", "echoed call"}}


def marked(name, source):
    if name not in ANY_ROLE:
        return source.replace("[[", "{%- generation %}").replace("]]", "{%- endgeneration %}")
    whole = source.replace("]]", "[[").split("[[")
    out = ""
    for i, piece in enumerate(whole):
        if i % 2 == 0:
            out += piece
        else:
            out += ("{%- if message['role'] == 'assistant' %}{%- generation %}" + piece +
                    "{%- endgeneration %}{%- else %}" + piece + "{%- endif %}")
    return out


with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    (folder / "tokenizer.json").write_text((tiny / "tokenizer.json").read_text())
    first = 1 + max(json.loads((tiny / "tokenizer.json").read_text())["model"]["vocab"].values())
    config = json.loads((tiny / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    tokens = [(token, True) for token in SPECIAL] + [(token, False) for token in PLAIN]
    config["added_tokens_decoder"] = {
        str(first + i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                         "special": special} for i, (token, special) in enumerate(tokens)}
    config["eos_token"], config["bos_token"] = "</s>", "<s>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cases = []
    for name, source in TEMPLATES.items():
        plain, marks = source.replace("[[", "").replace("]]", ""), marked(name, source)
        for chat, messages in CHATS.items():
            if name not in WITH_TOOLS.get(chat, {name}) or (name == "mistral" and chat == "system"):
                continue
            out = tokenizer.apply_chat_template(messages, chat_template=marks, return_dict=True,
                                                return_assistant_tokens_mask=True)
            text = tokenizer.apply_chat_template(messages, chat_template=plain, tokenize=False)
            assert text == tokenizer.apply_chat_template(messages, chat_template=marks, tokenize=False), (name, chat)
            ids, mask = out["input_ids"], out["assistant_masks"]
            cases.append({"template": name, "chat": chat, "ids": ids, "trained": mask})
            if name == "deepseek r1" or chat == "special tokens":
                print(name, chat, repr(tokenizer.decode([i for i, m in zip(ids, mask) if m])))
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    two = {str(first): {"content": "<|turn|>", **flags}, str(first + 1): {"content": "<|stop|>", **flags, "special": False}}
    by_id = {"<|stop|>": first + 1, "<|turn|>": first}
    sets = [
        {"added_tokens.json": by_id},
        {"added_tokens.json": by_id, "tokenizer_config.json": {"eos_token": "<|stop|>"}},
        {"added_tokens.json": by_id, "special_tokens_map.json": {"eos_token": {"content": "<|stop|>", "lstrip": True,
            "rstrip": False, "single_word": False, "normalized": False}}, "tokenizer_config.json": {}},
        {"tokenizer_config.json": {"added_tokens_decoder": two}},
        {"tokenizer_config.json": {"added_tokens_decoder": two, "eos_token": "<|stop|>"}},
        {"tokenizer_config.json": {"added_tokens_decoder": two}, "special_tokens_map.json": {"eos_token": "<|stop|>"}},
        {"tokenizer_config.json": {"additional_special_tokens": ["<|turn|>", "<|stop|>"]}},
        {"tokenizer_config.json": {"extra_special_tokens": ["<|turn|>"], "pad_token": "<|stop|>"}},
        {"tokenizer_config.json": {"extra_special_tokens": {"turn_token": "<|turn|>", "stop_token": "<|stop|>"}}},
        {"special_tokens_map.json": {"additional_special_tokens": ["<|turn|>"], "pad_token": "<|stop|>"},
         "tokenizer_config.json": {}},
        {"tokenizer_config.json": {"added_tokens_decoder": {str(first): {"content": "<|stop|>", **flags, "lstrip": True,
            "rstrip": True}}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"2": {"content": "<|im_end|>", **flags, "rstrip": True}}}},
    ]
    read = []
    for files in sets:
        other = pathlib.Path(tempfile.mkdtemp(dir=folder))
        (other / "tokenizer.json").write_text((tiny / "tokenizer.json").read_text())
        files.setdefault("tokenizer_config.json", {})["tokenizer_class"] = "PreTrainedTokenizerFast"
        for name, content in files.items():
            (other / name).write_text(json.dumps(content))
        found = AutoTokenizer.from_pretrained(other)
        text = "<|turn|>user\nhi <|stop|> you<|im_end|> \n<|stop|>"
        ids = found.encode(text, add_special_tokens=False)
        read.append({"files": files, "text": text, "ids": ids, "plain": found.decode(ids, skip_special_tokens=True)})
    templates = {name: {"plain": source.replace("[[", "").replace("]]", ""), "marked": marked(name, source)}
                 for name, source in TEMPLATES.items()}
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in read)
    head = json.dumps({"tokenizer_config": config, "templates": templates, "chats": CHATS}, ensure_ascii=False, indent=1)
    (here / "masks.json").write_text(f'{{"setting": {head},\n"tokens": [\n{rows}\n],\n"cases": [\n{lines}\n]}}\n')
    print(len(cases), "cases")
