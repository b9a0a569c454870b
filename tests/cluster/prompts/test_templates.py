"""Chat templates: what they see, and that they can neither run away nor escape."""

import tracemalloc

import pytest

from flm.cluster.prompts import template_sandbox
from flm.cluster.prompts.prompt_formats import CHATML
from flm.cluster.prompts.templates import ChatTemplate
from flm.worker.errors import InvalidRequest

HELLO = [{"role": "user", "content": "hello"}]


def refusal(source: str, messages: list[dict[str, str]] = HELLO) -> str:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(source).render(messages)
    assert caught.value.field == "messages"
    return caught.value.message


def test_chatml() -> None:
    text = ChatTemplate(CHATML).render([{"role": "system", "content": "be brief"}, *HELLO])
    assert text == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_templates_may_use() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m['content'] }}"
        "{% endfor %}{{ {'a': '<ü>'} | tojson }}{{ strftime_now('%Y') | length }}{{ eos_token }}"
        "{% for i in range(3) %}{{ i }}{% endfor %}"
    )
    assert ChatTemplate(source, "<s>", "</s>").render(HELLO * 2) == '<s>hello{"a": "<ü>"}4</s>012'


def test_trims_blocks_as_the_field_does() -> None:
    assert ChatTemplate("  {% if true %}\nx\n  {% endif %}\ny").render(HELLO) == "x\ny"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses them: roles must alternate"),
        ("{{ messages[7].content }}", "failed on them"),
        ("{{ 1 / 0 }}", "failed on them"),
        ("{{ nothing() }}", "failed on them"),
        ("{% for m in messages %}", "is broken"),
        ("{{ messages.__class__.__mro__ }}", "failed on them"),
        ("{% set _ = messages.append(1) %}", "failed on them"),
        ("{{ 'a' * 99999999 }}", "was stopped"),
        ("{{ 9 ** 99999999 }}", "was stopped"),
        ("{% for i in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}", "was stopped"),
    ],
)
def test_refusals_say_why(source: str, why: str) -> None:
    assert why in refusal(source)


LARGE = [
    "{{ 'x'.ljust(60000000) }}",
    "{{ 'x'.rjust(60000000) }}",
    "{{ 'x'.center(60000000) }}",
    "{{ 'x'.zfill(60000000) }}",
    "{{ 'x'.expandtabs(60000000) }}",
    "{{ 'x' | center(60000000) }}",
    "{{ '%60000000d' | format(1) }}",
    "{{ '%*d' | format(60000000, 1) }}",
    "{{ '%60000000d' % 1 }}",
    "{{ '{:>60000000}'.format(1) }}",
    "{{ '{:>60000000}'.format_map({}) }}",
    "{{ (1).to_bytes(60000000) }}",
    "{{ [0] * 60000000 }}",
    "{{ lipsum(n=60000000) }}",
    "{{ 'x' | indent(60000000, true) }}",
    "{{ ('x' * 9999).replace('x', 'y' * 9999) }}",
    "{{ ('x' * 9999) | replace('', 'y' * 9999) }}",
    "{{ ('x' * 9999).join('y' * 9999) }}",
    "{{ range(9999) | join('y' * 9999) }}",
    "{{ {'a': 1} | tojson(indent=60000000) }}",
    "{{ range(60000000) | list }}",
    "{{ strftime_now('%60000000Y') }}",
    "{% set ns = namespace(x='x') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='x') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='x') %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    (
        "{% set ns = namespace(x='x') %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
        "{{ ns.x | tojson }}"
    ),
    "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = ns.x + ['x' * 4000000] %}{% endfor %}",
    "{% macro m(x) %}{% for i in range(9999) %}{{ x }}{% endfor %}{% endmacro %}{{ m('x' * 99999) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% set x %}{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}{% endset %}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
]


@pytest.mark.parametrize("source", LARGE, ids=lambda source: source[:60])
def test_memory_is_bounded(source: str) -> None:
    tracemalloc.start()
    try:
        refusal(source)
        assert tracemalloc.get_traced_memory()[1] < 96 << 20
    finally:
        tracemalloc.stop()


def test_what_the_field_uses_still_works() -> None:
    source = (
        "{% set ns = namespace(text='') %}{% for m in messages %}"
        "{% set ns.text = ns.text ~ loop.index ~ ':' ~ (m['content'] | trim) + ';' %}"
        "{% if loop.last and messages | length == loop.length %}{{ ns.text }}{% endif %}{% endfor %}"
        "{{ messages[0].content.replace('l', 'L').split('e') | join('-') }}{{ '%s=%d' | format('a', 7) }}"
        "{{ messages | map(attribute='role') | unique | list }}{{ 'a\nb' | indent(2) }}{{ ', '.join(['p', 'q']) }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ [1] + [2] }}{{ none }}{{ 2 * 3 }}"
    )
    assert ChatTemplate(source).render(HELLO * 2) == (
        "1:hello;2:hello;h-LLoa=7['user']a\n  bp, q2[1, 2]None6"
    )


def test_what_jinja_does_within_loops() -> None:
    """There it passes the loop's own variables to every call."""
    source = (
        "{% for m in messages[::-1] %}{% set c = m.content.replace('l', 'L') %}{{ c.replace('o', '0', 1) }}"
        "{{ '-'.join(c.split('e', 1)) }}{% endfor %}{% generation %}{{ messages[0].content }}{% endgeneration %}!"
    )
    assert ChatTemplate(source).render(HELLO) == "heLL0h-LLohello!"


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.1)
    loops = "{% set l = range(9999) | list %}{% for i in l %}{% for j in l %}{% endfor %}{% endfor %}"
    assert "took more than" in refusal(loops)


def test_what_a_template_may_ask_of_tools_that_nobody_gave() -> None:
    """As the field renders: there, and none."""
    source = "{% if tools is not none %}a{% endif %}{% if tools %}b{% endif %}{% if documents is defined %}c{% endif %}"
    assert ChatTemplate(source).render(HELLO) == "c"


def test_a_template_of_glm_4_0414s_shape() -> None:
    """Roles in turn without line ends between them, loops over some of the messages, fields that a message may have."""
    source = (
        "[GM]<sop>\n{%- if tools -%}\n<|system|>\n{% for tool in tools %}\n    {%- set f = tool.function %}\n"
        "{{ f | tojson(indent=4, ensure_ascii=False) }}\n{%- endfor %}\n{%- endif -%}\n\n"
        "{%- for m in messages if m.role == 'system' %}\n<|system|>\n{{ m.content }}\n{%- endfor %}\n\n"
        "{%- for m in messages if m.role != 'system' %}\n    {%- set meta = m.get('metadata', '') %}\n"
        "    {%- if m['role'] == 'user' %}\n<|user|>\n{{ m['content'] }}\n"
        "    {%- elif not meta %}\n<|assistant|>\n{{ m.content }}\n    {%- endif %}\n{%- endfor %}\n"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}\n"
    )
    said = [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, *said]
    want = "[GM]<sop><|system|>\ns<|user|>\na<|assistant|>\nb<|user|>\nc<|assistant|>"
    assert ChatTemplate(source).render(messages) == want
