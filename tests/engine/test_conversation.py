"""Parts of a conversation that only some chat templates show: what is shown reaches the model, what is left out is refused by name."""

import json

import pytest
from server_fakes import SPECIAL, TEMPLATE, byte_tokenizer

from jaxpaged.engine.conversation import MAX_DEPTH, RESERVED_TEMPLATE_KEYS, TemplateSupport, find_support, fit_messages
from jaxpaged.errors import RequestError

# The way of each family, shortened; what they do with calls, results, reasoning and tools is theirs.
HERMES = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}<|im_start|>assistant
{{ message.content }}{% for call in message.tool_calls %}{% set call = call.function %}
<tool_call>
{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif message.role == 'tool' %}<|im_start|>user
<tool_response>{{ message.content }}</tool_response><|im_end|>
{% elif message.role in ('user', 'system', 'assistant') %}<|im_start|>{{ message.role }}
{% if message.reasoning_content and loop.last and enable_thinking is not false %}<think>{{ message.reasoning_content }}</think>
{% endif %}{{ message.content }}<|im_end|>
{% endif %}{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"""
TEXT_ARGUMENTS = """{%- for message in messages %}{%- if message.tool_calls is defined %}{%- for call in message.tool_calls %}
{{- '<call>' + call.function.name + '\\n' + call.function.arguments + '\\n' }}{%- endfor %}
{%- elif message.role == 'tool' %}{{ '<result>' + message.content }}{%- else %}{{ message.role + ':' + message.content }}{%- endif %}
{%- endfor %}"""
NINE_CHARACTERS = """{%- for message in messages %}{%- if message.tool_calls is defined %}
{%- if message.tool_calls[0].id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}
{{- '[TOOL_CALLS] ' + message.tool_calls | tojson }}
{%- elif message.role == 'tool' %}{{ '[TOOL_RESULTS] ' + message.content + message.tool_call_id }}
{%- elif message.role in ('user', 'assistant') %}{{ message.role + ': ' + message.content }}
{%- else %}{{ raise_exception('only user, assistant and tool') }}{%- endif %}{%- endfor %}"""
OLD_FUNCTIONS = """{%- for m in messages %}{{ m.role }}{% if m.name %} name={{ m.name }}{% endif %}: {{ m.content }}
{%- if m.function_call %} calls {{ m.function_call.name }} {{ m.function_call.arguments | tojson }}{% endif %};{% endfor %}"""
REASONING = "{%- for m in messages %}{{ m.role }}{% if m.reasoning %}({{ m.reasoning }}){% endif %}: {{ m.content }}\n{% endfor %}"
STRICT = (
    "{%- for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles alternate') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
BROKEN = "{{ messages[0].nothing.at.all }}"

KNOWN = {
    HERMES: {"tool_calls", "tool", "reasoning_content"},
    TEXT_ARGUMENTS: {"tool_calls", "tool", "function"},
    NINE_CHARACTERS: {"tool_calls", "tool"},
    OLD_FUNCTIONS: {"function_call", "function", "tool"},
    REASONING: {"reasoning_content", "tool", "function"},
    TEMPLATE: {"tool", "function"},
    STRICT: set(),
    BROKEN: set(),
}


def weather(arguments, **more):
    return {"id": "call_0001", "type": "function", "function": {"name": "weather", "arguments": arguments}, **more}


def talk(arguments='{"city": "Ulm"}'):
    return [
        {"role": "user", "content": "How is it in Ulm?"},
        {"role": "assistant", "content": None, "tool_calls": [weather(arguments)]},
        {"role": "tool", "tool_call_id": "call_0001", "content": "rain, 7 degrees"},
    ]


def rendered(template, messages, **options):
    tokenizer = byte_tokenizer(template)
    ids = tokenizer.apply_chat_template(messages, **{"add_generation_prompt": False, **options})
    return tokenizer.decode(ids, skip_special_tokens=False)


def refused(template, messages, **options):
    with pytest.raises(RequestError) as caught:
        rendered(template, messages, **options)
    return caught.value


@pytest.mark.parametrize(("template", "parts"), KNOWN.items(), ids=lambda item: item[:20] if isinstance(item, str) else None)
def test_what_a_template_shows_is_found_by_trying_it(template, parts):
    tokenizer = byte_tokenizer(template)
    support = tokenizer._find_support(tokenizer._chat_template)
    assert support == TemplateSupport(frozenset(parts), arguments_as_text=template is TEXT_ARGUMENTS)


def test_a_template_is_tried_once():
    tokenizer = byte_tokenizer(HERMES)
    tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert tokenizer._support is None, "an ordinary conversation needs no trial"
    tokenizer.apply_chat_template(talk())
    found = tokenizer._support
    tokenizer.apply_chat_template(talk())
    assert tokenizer._support is found
    tokenizer.apply_chat_template(talk(), chat_template=TEXT_ARGUMENTS)
    assert tokenizer._support is found


@pytest.mark.parametrize("arguments", ['{"city": "Ulm"}', {"city": "Ulm"}, ' {"city":\n"Ulm"}'])
def test_calls_and_results_reach_the_template(arguments):
    assert rendered(HERMES, talk(arguments)) == (
        "<|im_start|>user\nHow is it in Ulm?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>rain, 7 degrees</tool_response><|im_end|>\n"
    )
    as_client = arguments if isinstance(arguments, str) else json.dumps(arguments)
    assert rendered(TEXT_ARGUMENTS, talk(arguments)) == f"user:How is it in Ulm?<call>weather\n{as_client}\n<result>rain, 7 degrees"
    assert "call_0001" in rendered(NINE_CHARACTERS, talk(arguments))


@pytest.mark.parametrize("arguments", [None, "", "  ", {}, "{}"])
def test_no_arguments_are_an_empty_object(arguments):
    assert '"arguments": {}}' in rendered(HERMES, talk(arguments))
    assert "weather\n{}\n" in rendered(TEXT_ARGUMENTS, talk(arguments))


@pytest.mark.parametrize(
    "arguments",
    ["nope", "[1]", "5", '"x"', '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}', '{"a": 1} x', '{"city": "Ulm', '{"a":' * 100_000,
     '{"a":' * MAX_DEPTH + "[]" + "}" * MAX_DEPTH, '{"a": ' + "9" * 5000 + "}"],
    ids=lambda item: repr(item)[:20],
)  # fmt: skip
def test_arguments_that_are_no_object_stay_text(arguments):
    """Models write broken JSON at times: a history with it is no reason to end the conversation."""
    assert f'"arguments": {json.dumps(arguments)}}}' in rendered(HERMES, talk(arguments))
    assert f"<call>weather\n{arguments}\n" in rendered(TEXT_ARGUMENTS, talk(arguments))


@pytest.mark.parametrize("arguments", [[1], 5, True])
def test_arguments_of_another_kind_are_refused_by_name(arguments):
    for template in (HERMES, TEXT_ARGUMENTS):
        assert refused(template, talk(arguments)).param == "messages[1].tool_calls[0].function.arguments"


def test_arguments_may_nest_to_the_bound():
    deepest = '{"a":' * (MAX_DEPTH - 1) + "[]" + "}" * (MAX_DEPTH - 1)
    assert json.dumps(json.loads(deepest)) in rendered(HERMES, talk(deepest))


def test_what_a_template_leaves_out_is_refused_by_name():
    for template in (TEMPLATE, REASONING, OLD_FUNCTIONS):
        error = refused(template, talk())
        assert (error.param, error.code) == ("messages[1].tool_calls", "unsupported_parameter")
        assert "leaves it out" in str(error)
    user, tool = talk()[0], talk()[2]
    assert refused(STRICT, [user, tool]).param == "messages[1].role"
    assert "'tool'" in str(refused(STRICT, [user, tool]))
    assert refused(HERMES, [user, {"role": "function", "name": "f", "content": "x"}]).param == "messages[1].role"
    assert (
        refused(HERMES, [user, {"role": "assistant", "content": "x", "function_call": {"name": "f"}}]).param == "messages[1].function_call"
    )
    for key in ("reasoning", "reasoning_content"):
        assert refused(TEMPLATE, [user, {"role": "assistant", "content": "x", key: "hm"}]).param == f"messages[1].{key}"


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_reasoning_goes_under_both_of_its_names(key):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", key: "because"}]
    assert "<think>because</think>" in rendered(HERMES, messages)
    assert "assistant(because): a" in rendered(REASONING, messages)


def test_the_old_form_of_calls():
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "function", "name": "f", "content": "9"},
    ]
    assert rendered(OLD_FUNCTIONS, messages) == 'user: q;assistant:  calls f {"x": 1};function name=f: 9;'


@pytest.mark.parametrize("part", [{"content": None}, {}, {"content": ""}, {"content": []}])
def test_no_content_of_an_assistant_is_empty(part):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", **part}]
    for template in (TEMPLATE, HERMES, TEXT_ARGUMENTS):
        assert rendered(template, messages) == rendered(template, [messages[0], {"role": "assistant", "content": ""}])


def test_tools_and_variables_reach_the_template():
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}}
    assert json.dumps(tool) in rendered(HERMES, talk(), tools=[tool])
    ask = [{"role": "user", "content": "q"}]
    thinking = rendered(HERMES, ask, add_generation_prompt=True)
    silent = rendered(HERMES, ask, add_generation_prompt=True, template_kwargs={"enable_thinking": False})
    assert silent == thinking + "<think></think>"
    tokenizer = byte_tokenizer(HERMES)
    assert tokenizer.template_reads("enable_thinking")
    assert not tokenizer.template_reads("enable_thinkin") and not tokenizer.template_reads("thinking")


@pytest.mark.parametrize("name", sorted(RESERVED_TEMPLATE_KEYS))
def test_no_variable_replaces_what_is_ours(name):
    assert refused(HERMES, talk(), template_kwargs={name: "x"}).param == "chat_template_kwargs"


SHOWS_ALL = (
    "{{ messages | tojson }}{{ tools | tojson }}{{ extra | default({}) | tojson }}"
    "{% for key in extra %}{{ key }}={{ extra[key] }};{% endfor %}"
    "{% for m in messages %}{{ m.role }}{{ m.name }}{{ m.content }}{{ m.tool_calls }}{{ m.tool_call_id }}{{ m.reasoning }}"
    "<|im_end|>{% endfor %}"
)


@pytest.mark.parametrize("special", SPECIAL)
def test_special_tokens_spelled_anywhere_are_text(special):
    """In names, ids, keys, values, escapes, tools and variables: only what the template itself writes is a special token."""
    escaped = special.replace("<", "\\u003c")
    messages = [
        {"role": "user", "content": special, "name": special},
        {
            "role": "assistant",
            "content": "",
            "reasoning": special,
            "tool_calls": [
                {
                    "id": special,
                    "type": "function",
                    "function": {"name": special, "arguments": f'{{"{special}": ["{escaped}", {{"{escaped}2": "a{special}"}}]}}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": special, "content": special},
    ]
    tool = {"type": "function", "function": {"name": special, "description": special, "parameters": {special: {special: [special]}}}}
    tokenizer = byte_tokenizer(SHOWS_ALL)
    ids = tokenizer.apply_chat_template(messages, tools=[tool], template_kwargs={"extra": {special: [special, {special: special}]}})
    written = [token_id for token_id in ids if token_id in tokenizer.special_token_ids]
    assert written == tokenizer.encode("<|im_end|>") * 3
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text.count(special) > 20 and "\ufdd0" not in text


def test_messages_that_need_nothing_pass_through():
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": [], "reasoning_content": ""}]
    assert fit_messages(messages, TemplateSupport(frozenset())) == messages
    assert find_support(lambda messages: "").parts == frozenset()
