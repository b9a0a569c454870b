"""Chat templates: what they see, and that they can neither run away nor escape."""

import pytest

from flm.cluster import templates
from flm.cluster.templates import ChatTemplate
from flm.worker.errors import InvalidRequest

HELLO = [{"role": "user", "content": "hello"}]


def refusal(source: str, messages: list[dict[str, str]] = HELLO) -> str:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(source).render(messages)
    assert caught.value.field == "messages"
    return caught.value.message


def test_chatml_where_there_is_no_template() -> None:
    text = ChatTemplate(None).render([{"role": "system", "content": "be brief"}, *HELLO])
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


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.1)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    assert "took more than" in refusal(loops)
