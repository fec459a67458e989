"""Chat templates: expected texts are those of transformers 5.24, of templates written here."""

import datetime
import doctest
import json
import pathlib

import numpy as np
import pytest

import dlm.chat
from dlm.chat import Rendered, render

NOW = datetime.datetime(2025, 7, 6, 12)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [
    {"role": "user", "content": " Hé <b>  "},
    {"role": "assistant", "content": "Ho", "reasoning": "hm"},
]
TOOL = {"type": "function", "function": {"name": "f", "description": "ü"}}

# name -> (template, what else is given, the text)
CASES = {
    "generation": (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}",
        {},
        "[user] Hé <b>  [assistant]Ho</s>",
    ),
    "generation is a scope": (
        "{% set x = 1 %}{%- generation -%}  {% set x = 2 %}{{ x }}  {%- endgeneration -%}{{ x }}",
        {},
        "21",
    ),
    "json": (
        "{{ messages[0] | tojson(ensure_ascii=False) }}|{{ messages[0] | tojson(ensure_ascii=True) "
        "}}|{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true, separators=(',', ':')) }}|"
        "{{ [1] | tojson(indent=1) }}",
        {},
        '{"role": "user", "content": " Hé <b>  "}|{"role": "user", "content": " H\\u00e9 <b>  "}|'
        '{"a":"<é>","b":1}|[\n 1\n]',
    ),
    "no tools": (
        "{% if tools is not none %}tools{% else %}none{% endif %}{% if tools is defined %} defined"
        "{% endif %}{% if documents is not none %} docs{% endif %}",
        {},
        "none defined",
    ),
    "tools": (
        "{% for t in tools or [] %}{{ t.function.name }}: {{ t | tojson }}\n{% endfor %}",
        {"tools": [TOOL]},
        'f: {"type": "function", "function": {"name": "f", "description": "ü"}}\n',
    ),
    "documents": (
        "{% for d in documents %}{{ d.title }}{% endfor %}", {"documents": [{"title": "T"}]}, "T"
    ),
    "thinking not said": ("{{ enable_thinking is defined }}", {}, "False"),
    "thinking off": (
        "{% if enable_thinking is defined and enable_thinking is false %}<think></think>"
        "{% endif %}",
        {"enable_thinking": False},
        "<think></think>",
    ),
    "today": ("{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}", {},
              "06 Jul 2025"),
    "a date given": (
        "{% if date_string is defined %}{{ date_string }}{% endif %}", {"date_string": "1 May"},
        "1 May",
    ),
    "loop controls": (
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}"
        "{% break %}{% endfor %}",
        {},
        "Ho",
    ),
    "blocks leave no lines": (
        "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}"
        "\nend",
        {},
        " Hé <b>  \nHo\nend",
    ),
    "thoughts": (
        "{% for m in messages %}{{ m.reasoning_content }}/{{ m.thinking }};{% endfor %}", {},
        "/;hm/hm;",
    ),
    "tokens": ("{{ bos_token }}{{ unk_token is defined }}{{ mask_token }}", {}, "<s>False"),
    "a token given": ("{{ bos_token }}", {"bos_token": "<begin>"}, "<begin>"),
    "macros see all": (
        "{% macro show(m) %}<{{ m.role }}>{{ strftime_now('%Y') }}{{ tools is none }}{% endmacro %}"
        "{{ show(messages[0]) }}",
        {},
        "<user>2025True",
    ),
    "nothing is escaped": ("{{ '<a & \"b\">' }}", {}, '<a & "b">'),
    "methods of strings": ("{{ messages[0].content.strip().split(' ')[-1] | upper }}", {}, "<B>"),
}  # fmt: skip


def test_docstring_example():
    assert doctest.testmod(dlm.chat).failed == 0


@pytest.mark.parametrize(("template", "given", "text"), CASES.values(), ids=list(CASES))
def test_templates_write_what_they_write_elsewhere(template, given, text):
    assert render(template, MESSAGES, given, TOKENS, NOW) == text


def test_what_is_null_is_absent():
    template = "{% for m in messages %}{{ 'content' in m }}{{ m.content is defined }}{% endfor %}"
    messages = [{"role": "user", "content": None}, {"role": "user", "content": ""}]
    assert render(template, messages) == "FalseFalseTrueTrue"


def test_the_time_is_now():
    year = render("{{ strftime_now('%Y') }}", [])
    assert int(year) - datetime.datetime.now().year in (0, -1)


def test_rendered_texts_stay_rendered_when_text_follows():
    text = render("{{ bos_token }}", [], tokens=TOKENS)
    assert type(text) is type(text + "Sure") is Rendered
    assert text + "Sure" == "<s>Sure" and type("Sure" + text) is str


def test_a_warning_says_what_a_template_does_not_read(caplog):
    render("{{ enable_thinking }}", [], {"enable_thinking": True, "tools": None})
    assert not caplog.messages
    render("{{ messages }}", [], {"enable_thinkng": True, "tools": []}, TOKENS)
    assert caplog.messages == ["The chat template reads no enable_thinkng and no tools."]
    render("{{ messages }}", [], {"enable_thinkng": False, "tools": []}, TOKENS)
    assert len(caplog.messages) == 1  # however many prompts there are


_LOOP = "{%% for m in messages %%}%s{%% endfor %%}"


@pytest.mark.parametrize(
    ("template", "roles"),
    [
        (_LOOP % "{% if m.role == 'user' %}{{ m.content }}{% endif %}", "'assistant' and 'system'"),
        ("{{ messages[-1].content }}", "'assistant' and 'system' and 'user'"),
        # As templates of models that see pictures have it, for lists of parts.
        (_LOOP % "{% for part in m.content %}{{ part.text }}{% endfor %}",
         "'assistant' and 'system' and 'user'"),
        (_LOOP % "{{ m.content | trim | replace('B', 'b') }}", None),
        ("{{ messages | tojson }}", None),
        # Nothing else can be written.
        (_LOOP % "{{ m.content if m.content in ('Be brief.', 'Hi', 'Ho') else 1 / 0 }}", None),
    ],
)  # fmt: skip
def test_a_warning_says_which_messages_a_template_leaves_out(caplog, template, roles):
    contents = {"system": "Be brief.", "user": "Hi", "assistant": "Ho"}
    messages = [{"role": role, "content": content} for role, content in contents.items()]
    render(template, [*messages, {"role": "user", "content": "Hi"}])
    said = [f"The chat template leaves out messages with role {roles}."]
    assert caplog.messages == (said if roles else [])


def test_there_may_be_no_content_to_leave_out(caplog):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    render("{{ messages[1].tool_calls }}", [{"role": "user", "content": ""}, call])
    assert not caplog.messages


def test_the_content_of_a_message_may_come_in_parts():
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert render("{{ messages[0].content[0].text }}", messages) == "Hi"
    assert render("{{ messages[0].content | tojson }}", messages) == json.dumps(
        messages[0]["content"]
    )
    with pytest.raises(ValueError, match=r"writes content=.*as Python would print it: it must be"):
        render("<{{ messages[0].content }}>", messages)


def test_now_is_a_date():
    template = "{{ strftime_now('%d %b %Y') }}"
    assert render(template, [], now=datetime.date(2024, 7, 1)) == "01 Jul 2024"
    with pytest.raises(TypeError, match=r"now='2024-07-01' must be a datetime\.datetime or a dat"):
        render(template, [], now="2024-07-01")


def test_numbers_of_numpy_are_numbers():
    assert render("{{ n + 1 }}{{ b }}", [], {"n": np.int32(1), "b": np.bool_(False)}) == "2False"


@pytest.mark.parametrize(
    ("template", "messages", "given", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", [{}], {}, "cannot .*: roles must alt"),
        ("{% if %}", [{}], {}, "the chat template cannot write these messages: Expected an exp"),
        ("{% generation %}", [{}], {}, "the chat template cannot write these messages: "),
        ("{{ messages.append(1) }}", [{}], {}, "cannot .*: access to attribute .append.*unsafe"),
        ("{{ ''.__class__.__mro__ }}{{ messages[0].x.y }}", [{}], {}, "cannot write these mess"),
        ("{{ 1 / 0 }}", [{}], {}, "cannot write these messages: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", [{}], {}, "cannot .*: maximum recurs"),
        ("", ["Hi"], {}, "messages has 'Hi', which must be a dictionary with role, content"),
        ("", [{"content": object()}], {}, "messages has a object, which must be text, a number"),
        ("", [], {"tools": [len]}, r"tools has a builtin_function.* \(of a function its JSON sch"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_in_one_sentence(template, messages, given, message):
    with pytest.raises(ValueError, match=message):
        render(template, messages, given)


def test_the_templates_of_trl_as_transformers_writes_them():
    """All that it ships, on several conversations and settings."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    trl = pytest.importorskip("trl")
    files = sorted(pathlib.Path(trl.__file__).parent.rglob("*.jinja"))
    assert files
    call = [{"type": "function", "function": {"name": "f", "arguments": {"place": "Zürich"}}}]
    conversations = [
        MESSAGES[:1],
        [{"role": "system", "content": "Be brief."}, *MESSAGES, {"role": "user", "content": "?"}],
        [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": call},
         {"role": "tool", "name": "f", "content": "{}"}],
    ]  # fmt: skip
    settings = [
        {}, {"add_generation_prompt": True, "enable_thinking": False},
        {"add_generation_prompt": True, "tools": [TOOL], "date_string": "1 May"},
    ]  # fmt: skip
    for file in files:
        template = file.read_text(encoding="utf-8")
        for messages in conversations:
            for given in settings:
                chat = utils._normalize_chat_messages(messages)
                told = {**TOKENS, **given}
                try:
                    texts, _ = utils.render_jinja_template([chat], chat_template=template, **told)
                except Exception:
                    with pytest.raises(ValueError, match="the chat template cannot write"):
                        render(template, messages, given, TOKENS)
                else:
                    plain = {"add_generation_prompt": False, **given}
                    assert render(template, messages, plain, TOKENS) == texts[0], file.name
