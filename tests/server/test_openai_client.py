"""The real openai client over a real socket: what it sends is understood, what it gets it understands."""

import asyncio

import openai
import pytest
from openai.types.chat import ChatCompletionMessage
from server_fakes import FakeAsyncEngine, byte_tokenizer, replace_info
from server_harness import LoopbackServer, until

from jaxpaged.config import ServerConfig

MESSAGES = [{"role": "user", "content": "hi"}]
REPLY = "user\nhi"


@pytest.fixture(scope="module")
def url():
    server = LoopbackServer(FakeAsyncEngine(), ServerConfig(api_key=("sk-test",)))
    yield server.url + "/v1"
    server.close()


@pytest.fixture(scope="module")
def ai(url):
    with openai.OpenAI(base_url=url, api_key="sk-test", max_retries=0) as made:
        yield made


def test_models(ai):
    assert [model.id for model in ai.models.list()] == ["echo"]
    assert ai.models.retrieve("echo").id == "echo"
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("other")


def test_chat(ai):
    answer = ai.chat.completions.create(model="echo", messages=MESSAGES, temperature=0, user="me", store=False, metadata={"a": "b"})
    assert answer.choices[0].message.content == REPLY
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == 30
    assert answer.id == "chatcmpl-" + answer._request_id


def test_chat_stream(ai):
    chunks = list(ai.chat.completions.create(model="echo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == REPLY
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 9)


def test_chat_stream_helper(ai):
    with ai.chat.completions.stream(model="echo", messages=MESSAGES) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == REPLY


def test_chat_samples_and_logprobs(ai):
    answer = ai.chat.completions.create(
        model="echo",
        messages=MESSAGES,
        n=3,
        logprobs=True,
        top_logprobs=3,
        max_completion_tokens=2,
        seed=7,
        logit_bias={"5": -100},
        stop=["zz"],
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.finish_reason == "length"
        assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [3, 3]
        assert bytes(choice.logprobs.content[1].bytes) == b"u"


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}}]
SHOWS_TOOLS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if thinking %}<|im_start|>{% endif %}"
)


@pytest.fixture(scope="module")
def tool_ai():
    engine = FakeAsyncEngine()
    replace_info(engine, tokenizer=byte_tokenizer(SHOWS_TOOLS))
    server = LoopbackServer(engine)
    with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as made:
        yield made
    server.close()


def echoed(ai, **fields):
    """What the template made of it: the scripted model says its prompt again."""
    fields = {"model": "echo", "max_tokens": 200, "extra_body": {"ignore_eos": True, **fields.pop("extra_body", {})}, **fields}
    return ai.chat.completions.create(**fields).choices[0].message.content


def test_a_history_with_tool_calls(tool_ai):
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at":"it"}'}}
    result = {"role": "tool", "tool_call_id": "c1", "content": "seen"}
    for assistant in ({"role": "assistant", "tool_calls": [call]}, {"role": "assistant", "content": None, "tool_calls": [call]}):
        assert echoed(tool_ai, messages=[*MESSAGES, assistant, result]) == 'user: hiassistant: look{"at": "it"}tool: seen'
    said = ChatCompletionMessage.model_validate({"role": "assistant", "content": None, "tool_calls": [call]})
    assert echoed(tool_ai, messages=[*MESSAGES, said, result]).endswith('look{"at": "it"}tool: seen')
    with pytest.raises(openai.BadRequestError) as caught:
        echoed(tool_ai, messages=[*MESSAGES, {"role": "assistant", "content": "x", "reasoning_content": "y"}])
    assert (caught.value.param, caught.value.code) == ("messages[1].reasoning_content", "unsupported_parameter")


def test_tools_that_may_not_be_called(tool_ai):
    assert echoed(tool_ai, messages=MESSAGES, tools=TOOLS, tool_choice="none").startswith(
        '{"type": "function", "function": {"name": "look"'
    )
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "required"}):
        with pytest.raises(openai.BadRequestError) as caught:
            echoed(tool_ai, messages=MESSAGES, tools=TOOLS, **choice)
        assert caught.value.param in ("tools", "tool_choice")


def test_variables_of_the_template(tool_ai):
    body = {"model": "echo", "messages": MESSAGES, "max_tokens": 1}
    plain = tool_ai.chat.completions.create(**body).usage.prompt_tokens
    raw = tool_ai.chat.completions.with_raw_response.create(
        **body, extra_body={"chat_template_kwargs": {"thinking": True, "enable_thinking": False}}
    )
    assert raw.parse().usage.prompt_tokens == plain + 1
    assert raw.headers["x-jaxpaged-ignored-fields"] == "chat_template_kwargs.enable_thinking"


def test_extra_fields_of_vllm(ai):
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "skip_special_tokens": False, "prompt_logprobs": 1}
    answer = ai.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=10, extra_body=extra)
    assert answer.choices[0].message.content.startswith("<|im_start|>user")
    assert len(answer.prompt_logprobs) == 21


def test_the_best_of_several(ai):
    answer = ai.completions.create(model="echo", prompt="hello", n=2, best_of=4)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "hello"), (1, "hello")]
    assert answer.usage.completion_tokens == 20
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    chat = ai.chat.completions.create(model="echo", messages=MESSAGES, n=2, extra_body={"best_of": 3})
    assert [choice.message.content for choice in chat.choices] == [REPLY, REPLY]
    with pytest.raises(openai.BadRequestError) as caught:
        ai.completions.create(model="echo", prompt="hello", best_of=2, stream=True)
    assert caught.value.param == "best_of"


def test_beam_search(ai):
    extra = {"use_beam_search": True, "beam_width": 4, "length_penalty": 0.8, "early_stopping": True}
    answer = ai.completions.create(model="echo", prompt="hello", n=3, temperature=0, extra_body=extra)
    assert [choice.text for choice in answer.choices] == ["hello", "hell", "hel"]
    chat = ai.chat.completions.create(model="echo", messages=MESSAGES, n=2, extra_body=extra)
    assert [choice.index for choice in chat.choices] == [0, 1]
    with pytest.raises(openai.BadRequestError) as caught:
        ai.chat.completions.create(model="echo", messages=MESSAGES, stream=True, extra_body=extra)
    assert caught.value.param == "use_beam_search"


@pytest.mark.parametrize("prompt", ["hey", ["hey", "you"], [1, 2, 3], [[1, 2], [3, 4]]])
@pytest.mark.parametrize("n", [1, 2])
def test_completions_with_every_form_of_prompt(ai, prompt, n):
    plain = ai.completions.create(model="echo", prompt=prompt, n=n, logprobs=2, echo=True)
    texts = [choice.text for choice in plain.choices]
    count = n * (len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1)
    assert len(texts) == count
    assert all(len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) for choice in plain.choices)
    streamed = [""] * count
    for chunk in ai.completions.create(model="echo", prompt=prompt, n=n, stream=True, echo=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


@pytest.mark.parametrize(
    ("error", "body"),
    [
        (openai.BadRequestError, {"temperature": 9}),
        (openai.BadRequestError, {"max_tokens": 100_000}),
        (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (openai.BadRequestError, {"response_format": {"type": "json_object"}}),
        (openai.NotFoundError, {"model": "gpt-4"}),
    ],
)
def test_errors_are_the_clients_own(ai, error, body):
    with pytest.raises(error) as caught:
        ai.chat.completions.create(**({"model": "echo", "messages": MESSAGES} | body))
    assert caught.value.param == next(iter(body))
    assert caught.value.request_id


def test_a_wrong_key(url):
    with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as other, pytest.raises(openai.AuthenticationError):
        other.models.list()


def test_a_fault_in_the_middle_of_a_stream_raises(make_server):
    engine = FakeAsyncEngine()
    engine.fail_at = (4, "numerical_error")
    with openai.OpenAI(base_url=make_server(engine).url + "/v1", api_key="x", max_retries=0) as client:
        text = ""
        with pytest.raises(openai.APIError) as caught:
            for chunk in client.chat.completions.create(model="echo", messages=MESSAGES, stream=True):
                text += chunk.choices[0].delta.content or ""
        assert (text, caught.value.code) == ("use", "numerical_error")


def test_the_client_waits_and_retries_when_there_is_no_room(make_server):
    engine = FakeAsyncEngine(max_calls=0)
    original = engine.submit

    def submit(request, **options):
        try:
            return original(request, **options)
        except Exception as error:
            error.retry_after_s = 1
            raise
        finally:
            engine.max_calls = 1

    engine.submit = submit
    with openai.OpenAI(base_url=make_server(engine).url + "/v1", api_key="x", max_retries=2) as client:
        assert client.completions.create(model="echo", prompt="hey").choices[0].text == "hey"


def test_async_client(url):
    async def ask(client, i):
        stream = await client.completions.create(model="echo", prompt=f"number {i}", stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def go():
        async with openai.AsyncOpenAI(base_url=url, api_key="sk-test", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(20)))

    assert asyncio.run(go()) == [f"number {i}" for i in range(20)]


def test_leaving_a_stream_frees_it(make_server):
    server = make_server(FakeAsyncEngine(step_s=0.1))  # 20 s to the end
    with openai.OpenAI(base_url=server.url + "/v1", api_key="x") as client:
        stream = client.completions.create(model="echo", prompt="x" * 300, max_tokens=200, stream=True)
        next(iter(stream))
        assert server.engine.running
        stream.close()
    until(lambda: not server.engine.running, 5.0)
