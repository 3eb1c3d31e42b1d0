"""Writes rope.json, templates.json and snippets.json: what transformers computes for the tests of the model room.

Run with transformers 5: python tests/model/oracle.py
"""
import json
import pathlib
import re

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


# Pieces of Python and Jinja that published templates use, or that their authors might.
SNIPPETS = r"""
{{ tools is iterable }}{{ tools is none }}{{ tools is defined }}{{ nothing is iterable }}{{ [] is iterable }}{{ 'a' is iterable }}{{ 3 is iterable }}
{% if tools is iterable and tools | length > 0 %}tools{% endif %}none
{% if tools is not none and tools is iterable %}x{% else %}y{% endif %}
{% if tools %}x{% endif %}{{ (tools or []) | length }}
{{ '%s and %s' % ('a', 2) }}|{{ '%d%%' % 5 }}|{{ '%.2f' % 3.14159 }}|{{ '%05d' % 42 }}|{{ '%-5s|' % 'ab' }}|{{ '%x' % 255 }}
{{ '%(a)s-%(b)d' % {'a': 'x', 'b': 3} }}|{{ '%s' % none }}|{{ '%s' % true }}|{{ '%s' % [1, 'a'] }}
{{ 7 % 3 }}{{ -7 % 3 }}{{ 7 % -3 }}{{ 7.5 % 2 }}{{ 2 * 7 % 4 }}{{ 7 % 4 * 2 }}{{ 10 - 7 % 4 }}{{ (1 + 6) % 4 }}
{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}bad{% endif %}{{ loop.index0 % 2 }}{% endfor %}
{% set x = 'n=%d' % messages | length %}{{ x }}
{{ 'a%b' }}{{ '%' }}{{ 'x' ~ '%s' % 'y' ~ 'z' }}{{ 'p: %s' % messages[0].content.upper() }}
{{ "%s|%s" | format('a', 'b') }}{{ "%(x)s" | format(x='y') }}{{ '{} {}'.format('a', 1) }}{{ '{0}{1}{0}'.format('a', 'b') }}{{ '{x}'.format(x=3) }}
{{ '{:.2f}|{:>5}|{:<5}|{:^5}|{:05d}|{:,}'.format(3.14159, 'a', 'b', 'c', 42, 1234567) }}
{{ ' ab '.strip() }}|{{ ' ab '.lstrip() }}|{{ ' ab '.rstrip() }}|{{ 'xxabxx'.strip('x') }}|{{ 'abc'.lstrip('ba') }}|{{ 'a\n\n'.rstrip('\n') }}|
{{ 'a b  c'.split() }}{{ 'a,b,c'.split(',') }}{{ 'a,b,c'.split(',', 1) }}{{ 'a b c'.split(maxsplit=1) }}{{ 'a,b,c'.rsplit(',', 1) }}{{ ' a b '.split(' ') }}
{{ 'a b  c d'.rsplit(none, 1) }}{{ ' a  b '.split(none, 1) }}{{ ' a  b '.rsplit(none, 1) }}{{ ''.split() }}{{ ''.split(',') }}{{ 'abc'.split('</think>')[-1] }}
{{ 'x</think>y'.split('</think>')[0].split('<think>')[-1] }}{{ 'a\r\nb\nc\n'.splitlines() }}{{ 'a\nb'.splitlines(true) }}{{ 'a\nb\n'.splitlines(keepends=True) }}
{{ 'a-b-c'.partition('-') }}{{ 'a-b-c'.rpartition('-') }}{{ 'abc'.partition('-') }}{{ 'abc'.rpartition('-') }}
{{ 'foobar'.removeprefix('foo') }}{{ 'foobar'.removesuffix('bar') }}{{ 'foobar'.removeprefix('x') }}
{{ 'hello'.find('l') }}{{ 'hello'.rfind('l') }}{{ 'hello'.find('x') }}{{ 'hello'.index('e') }}{{ 'hello'.rindex('l') }}{{ 'hello'.count('l') }}{{ 'hello'.find('l', 3) }}{{ 'hello'.find('l', 0, 2) }}{{ 'héllo'.find('l') }}
{{ 'hello'.startswith('he') }}{{ 'hello'.startswith(('x', 'h')) }}{{ 'hello'.endswith('lo') }}{{ 'hello'.startswith('l', 2) }}{{ 'hello'.endswith(('x', 'o')) }}{{ 'hello'.startswith('') }}
{{ 'ab'.ljust(5) }}|{{ 'ab'.rjust(5, '.') }}|{{ 'ab'.center(5) }}|{{ 'abc'.center(6, '*') }}|{{ '42'.zfill(5) }}|{{ '-42'.zfill(5) }}|{{ 'abc'.center(8) }}|
{{ 'aBc'.upper() }}{{ 'aBc'.lower() }}{{ 'aBc'.swapcase() }}{{ 'hello world'.title() }}{{ 'hELLO'.capitalize() }}{{ 'ß'.upper() }}{{ 'Straße'.casefold() }}
{{ 'abc'.isalpha() }}{{ '12'.isdigit() }}{{ '12'.isnumeric() }}{{ 'a1'.isalnum() }}{{ ' '.isspace() }}{{ 'ab'.islower() }}{{ 'AB'.isupper() }}{{ 'Ab Cd'.istitle() }}{{ 'a_1'.isidentifier() }}{{ '12'.isdecimal() }}{{ ''.isalpha() }}
{{ 'aaa'.replace('a', 'b', 2) }}{{ 'abc'.replace('', '-') }}{{ ','.join(['a', 'b']) }}{{ ''.join([]) }}{{ 'a\tb'.expandtabs(4) }}
{{ 'hello'[1:3] }}{{ 'hello'[-1] }}{{ 'hello'[::-1] }}{{ 'hello'[:2] }}{{ 'hello'[-3:] }}{{ 'hello'[10:] }}{{ 'hello'[0] }}{{ 'hello'[1:4:2] }}{{ 'hé世'[1:] }}
{{ [1, 2, 3, 4][1:] }}{{ [1, 2, 3, 4][::-1] }}{{ [1, 2, 3, 4][-2:] }}{{ [1, 2, 3, 4][::2] }}{{ (1, 2, 3)[:2] }}{{ messages[1:] | length }}{{ messages[::-1][0].role }}{{ messages[-1]['role'] }}
{{ [1, 2].index(2) }}{{ [1, 2, 2].count(2) }}{{ {'a': 1}.get('a') }}{{ {'a': 1}.get('b') }}{{ {'a': 1}.get('b', 2) }}{{ {'a': 1}.items() | list }}{{ {'a': 1}.keys() | list }}{{ {'a': 1}.values() | list }}{{ {'a': 1}.copy() }}
{{ [1, 'a', none, true, 1.5, 'it's', "q"q", 'é\n'] }}{{ {'a': 1, 'b': [2]} }}{{ (1, 'a') }}{{ (1,) }}{{ [] }}{{ {} }}{{ () }}
{{ [1, 'a'] | string }}{{ none | string }}{{ true ~ '' }}{{ [1, 'a'] ~ '' }}{{ {'a': none} ~ '' }}{{ 1.0 }}{{ 1e3 }}{{ 10 / 4 }}{{ 10 / 5 }}{{ 10 // 4 }}{{ 2 ** 3 }}{{ 2 ** -1 }}
{{ dict(a=1, b='x') }}{{ dict([('a', 1)]) }}{{ dict({'a': 1}, b=2) }}{{ range(3) | list }}{{ range(1, 6, 2) | list }}{{ range(3, 0, -1) | list }}
{{ {'a': 'é<>&"', 'b': [1, none, true]} | tojson }}{{ {'a': 1} | tojson(indent=2) }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}{{ 'é' | tojson(ensure_ascii=true) }}{{ [1, 2] | tojson(separators=(',', ':')) }}
{{ ('<' ~ ([1] | tojson)) }}{{ ([1] | tojson) | replace('1', '<') }}{{ ([1] | tojson) + '<a>' }}{{ '%s<' % ([1] | tojson) }}{{ ['<', [1] | tojson] | join('<') }}{{ 1.5 | tojson }}{{ 1e20 | tojson }}{{ 'a/b' | tojson }}
{{ messages | tojson }}{{ messages[0] | tojson(indent=4) }}{{ messages[0].items() | list }}{{ messages[0].keys() | list }}
{% set ns = namespace(a=1, found=false) %}{% for m in messages %}{% if not ns.found %}{% set ns.a = ns.a + 1 %}{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.a }}{{ ns.found }}
{% set ns = namespace() %}{% set ns.list = [] %}{% for m in messages %}{% set ns.list = ns.list + [m.role] %}{% endfor %}{{ ns.list | join(',') }}
{% set ns = namespace({'x': 1}) %}{{ ns.x }}{{ ns['x'] }}{{ ns.y is defined }}{{ ns.get is defined }}
{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.previtem.role if loop.previtem is defined }}{{ loop.nextitem.role if loop.nextitem is defined }}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }};{% endfor %}
{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }},{% endfor %}{% for k in {'a': 1} %}{{ k }}{% endfor %}{% for c in 'ab' %}{{ c }}.{% endfor %}
{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.role }}{% else %}none{% endfor %}{% for x in [] %}{% else %}empty{% endfor %}
{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}{% if loop.index0 == 2 %}{% break %}{% endif %}{% endfor %}
{% for x in [[1, [2, 3]], [4, []]] recursive %}{{ x[0] }}{% if x[1] %}({{ loop(x[1] | map('string') | map('list')) if false else '' }}){% endif %}{% endfor %}
{% macro f(a, b='x', *args) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ f(1, 2) }}{{ f(b=1, a=2) }}{% set f2 = f %}{{ f2(3) }}
{% macro g(x) %}[{{ caller(x) }}]{% endmacro %}{% call(y) g(5) %}<{{ y }}>{% endcall %}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | rejectattr('role', 'equalto', 'user') | map(attribute='role') | join(',') }}{{ messages | map(attribute='content') | join('|') }}
{{ messages | selectattr('role', 'in', ['user', 'system']) | map(attribute='role') | list }}{{ [1, 2, 3] | select('odd') | list }}{{ [1, none, 2] | reject('none') | list }}{{ messages | selectattr('name', 'defined') | list | length }}
{{ [3, 1, 2] | sort }}{{ ['b', 'A'] | sort }}{{ [3, 1] | sort(reverse=true) }}{{ [1, 2, 2] | unique | list }}{{ [1, 2, 3] | sum }}{{ [1, 2] | max }}{{ [1, 2] | min }}{{ [1, 2] | first }}{{ [1, 2] | last }}{{ 'abc' | first }}{{ [1, 2] | reverse | list }}{{ 'abc' | reverse }}
{{ {'b': 1, 'a': 2} | dictsort }}{{ [1, 2, 3] | batch(2) | list }}{{ [1, 2, 3] | slice(2) | list }}{{ messages | groupby('role') | length }}{{ {'a': 1} | items | list }}
{{ 'x' | default('y') }}{{ nothing | default('y') }}{{ '' | default('y', true) }}{{ none | default('y') }}{{ none | d('y', boolean=True) }}{{ nothing.a is defined if nothing is defined else 'no' }}
{{ 'a b' | title }}{{ 'aB' | capitalize }}{{ 'a' | upper }}{{ ' a ' | trim }}|{{ 'xax' | trim('x') }}|{{ 'abc' | length }}{{ 'abc' | count }}{{ 'abc' | replace('b', 'x') }}{{ 'a\nb' | indent(2) }}{{ 'a\nb' | indent(2, true) }}{{ 'a\nb' | indent(first=true, width=1) }}
{{ '5' | int }}{{ 'x' | int }}{{ 'x' | int(3) }}{{ '1.5' | float }}{{ 3.7 | int }}{{ 3.14159 | round(2) }}{{ 3.5 | round }}{{ -3 | abs }}{{ 'ff' | int(base=16) }}{{ 2.5 | round | int }}
{{ 'abc' | list }}{{ {'a': 1} | list }}{{ 'abc' | string }}{{ 5 | string + 'x' }}{{ 'a' in 'abc' }}{{ 'd' not in 'abc' }}{{ 1 in [1] }}{{ 'a' in {'a': 1} }}{{ 'role' in messages[0] }}{{ 'tool_calls' in messages[0] }}
{{ messages[0] is mapping }}{{ messages is sequence }}{{ 'a' is sequence }}{{ 'a' is string }}{{ 1 is number }}{{ 1 is integer }}{{ 1.0 is float }}{{ true is boolean }}{{ true is number }}{{ true is integer }}{{ none is none }}{{ f is undefined }}{{ 4 is divisibleby 2 }}{{ 3 is odd }}{{ 'a' is lower }}{{ 1 is sameas 1 }}{{ true is true }}{{ 'a' is eq 'a' }}{{ {} is mapping }}{{ messages is string }}
{{ 1 == 1.0 }}{{ 'a' < 'b' }}{{ 1 < 2 < 3 }}{{ not true }}{{ none == false }}{{ true == 1 }}{{ [] == () }}{{ [1] == [1] }}{{ 'a' == "a" }}{{ none is not none }}{{ 1 != 2 and 3 }}{{ 0 or 'x' }}{{ '' and 1 }}{{ none or none }}
{{ 'a' if true }}{{ 'a' if false }}{{ 'a' if false else 'b' }}{{ ('x' if messages else 'y') ~ 'z' }}{{ [1, 2] + [3] }}{{ 'a' * 3 }}{{ [0] * 2 }}{{ 'a' 'b' }}{{ 1 + 2 ~ 3 }}{{ 5 - 2 - 1 }}{{ -2 ** 2 }}
{{ messages.0.role if false else messages[0].role }}{{ messages[0].nothing }}{{ messages[0]['nothing'] is defined }}{{ messages[9] is defined }}{{ messages[0].content.nothing is defined }}{{ (messages[0].tool_calls or []) | length }}
{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set (c, d) = (3, 4) %}{{ c }}{{ d }}{% set x %}block {{ a }}{% endset %}{{ x }}{% set y | upper %}up{% endset %}{{ y }}
{% set x = 1 %}{% for i in [1] %}{% set x = 2 %}{% endfor %}{{ x }}{% if true %}{% set x = 3 %}{% endif %}{{ x }}{% with z = 5 %}{{ z }}{% set x = 9 %}{% endwith %}{{ x }}{{ z is defined }}
{%- if true -%} a {%- endif -%} b {#- comment -#} c {% raw %}{{ x }}{% endraw %}{# multi
line #}{{- ' d ' -}} e {%+ if true %} f {%+ endif %}
{% if true %}
  a
  {% if true %}
    b
  {% endif %}
{% endif %}
{{ 'x	y\\z'"' }}{{ "aéA
" }}{{ 'emoji 😀' }}{{ '\' }}
{{ '<b>&' | escape }}{{ '<b>' | safe }}{{ '<b>&amp;' | e }}{{ 'long text here' | truncate(9) }}{{ 'a' | center(5) }}|{{ '<p>x</p>' | striptags }}
{% filter upper %}abc{% endfilter %}{% generation %} x {{ messages[0].role }}{% endgeneration %}{%- generation -%} y {%- endgeneration -%} z
{{ messages[0].content | length > 3 }}{{ messages | length == 3 }}{{ messages[0]['content'] | trim | length }}{{ (messages | last).role }}{{ messages | map(attribute='role') | unique | list }}{{ messages[0].content.split(' ') | length }}
{{ loop is defined }}{{ joiner is defined }}{{ true and not false }}{{ True }}{{ False }}{{ None }}{{ None is none }}{{ true|lower }}{{ none|length if none else 0 }}
{% set messages = messages[1:] if messages[0].role == 'system' else messages %}{{ messages | length }}{% set m = messages[0] %}{{ m.role }}{{ m['role'] }}{{ m.get('name', 'none') }}
{{ 1_000 }}{{ 0x10 }}{{ 1.5e3 }}{{ 7 // 2 }}{{ -7 // 2 }}{{ 7 / 2 }}{{ 1 / 3 }}{{ 100000000000000000000 }}{{ 1e16 }}{{ 1e-5 }}{{ 0.1 + 0.2 }}{{ 3 * 1.5 }}
{{ '\n'.join(messages | map(attribute='role')) }}{{ messages | map(attribute='content') | map('length') | list }}{{ messages | map('tojson') | first }}{{ [['a', 1]] | tojson }}{{ ('a', 'b') | tojson }}{{ {1: 2, true: 3} | tojson }}
{%- for message in messages | selectattr('role', 'ne', 'system') -%}{{ message.role ~ ':' ~ loop.index }}{{ ' ' }}{%- endfor -%}
{{ cycler('a', 'b').next() }}{% set j = joiner(', ') %}{{ j() }}a{{ j() }}b
{{ messages.append is defined }}{{ 'x' is callable }}{{ 'abc' is in 'abcd' }}{{ 2 is gt 1 }}{{ 'a' is ne 'b' }}{{ 1 is ge 1 }}
""".strip("\n").split("\n{")


def snippet_cases():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"},
                {"role": "assistant", "content": "Eight, it has."}]
    cases = []
    line_ends = ["{% for m in messages %}\r\n{{ m.role }}:\r\n{{- ' a\rb' }}\r{% endfor %}\r\n\r\n", "a\r\n", "a\n\n",
                 "a\r", "{{ 'x\r\ny' }}\r\n{% if true %}\r\n  b\r\n{% endif %}\r\n{# c #}\r\nd\r\r\n", "\r\n", "\n\r",
                 "{{ messages[1].content }}\r\n\r\n", "{%- if true %}\r  {%- endif %}\r", "{{ 'a\\r\\nb' }}\n"]
    for source in line_ends + ["{" * (i > 0) + snippet for i, snippet in enumerate(SNIPPETS)]:
        # Single pieces, so that one that fails hides no other.
        pieces = [source] if source in line_ends or "{%" in source or "{#" in source else [f"{{{{{p}}}}}" for p in
                                                                    re.findall(r"\{\{(.*?)\}\}(?=\{\{|[|]|$)", source)]
        for piece in pieces:
            try:
                text = _compile_jinja_template(piece).render(
                    messages=messages, tools=None, documents=None, add_generation_prompt=True, bos_token="<s>",
                    eos_token="</s>")
            except Exception:
                continue
            cases.append({"source": piece, "text": text})
    return [{"messages": messages}, *cases]


for name, cases in (("rope", rope_cases()), ("templates", template_cases()),
                    ("snippets", snippet_cases())):
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (here / f"{name}.json").write_text(f"[\n{lines}\n]\n")
