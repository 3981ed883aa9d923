"""The packaged tiny model behind the real server: what HTTP gives is what the engine gives, and nothing stays behind."""

import concurrent.futures
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from server_harness import LoopbackServer, until

from jaxpaged import LLM, SamplingParams
from jaxpaged.config import CacheConfig, EngineConfig, SchedulerConfig, ServerConfig
from jaxpaged.engine.async_engine import AsyncEngine

ROOT = Path(__file__).parents[2]
BUCKETS = (16, 64)
SEQUENCES = 16
PROMPTS = [
    "What is a page?",
    "Tell me what a block table is.",
    "Sort: 5 3 9 1",
    "Once upon a time there was",
    "Why does the scheduler preempt a request?",
]


def configured(cache, **changes):
    return EngineConfig(
        compilation_cache_dir=str(cache),
        cache=CacheConfig(num_pages=513),
        scheduler=SchedulerConfig(max_num_seqs=SEQUENCES, max_num_batched_tokens=BUCKETS[-1], token_buckets=BUCKETS),
        **changes,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("xla")
    directory.chmod(0o700)
    return directory


@pytest.fixture(scope="module")
def served(cache):
    engine = AsyncEngine(configured(cache))
    server = LoopbackServer(engine, ServerConfig(served_model_name=("tiny",)))
    deadline = time.monotonic() + 300
    while httpx.get(server.url + "/health").status_code != 200:
        assert time.monotonic() < deadline and engine.status.state != "failed", engine.status
        time.sleep(0.1)
    yield server
    server.close()
    engine.stop()


@pytest.fixture(scope="module")
def ai(served):
    with openai.OpenAI(base_url=served.url + "/v1", api_key="x", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(autouse=True)
def _nothing_stays_behind(served):
    """After every test: no page in use, no call in the books, no program compiled late, and a good request works."""
    yield
    deadline = time.monotonic() + 15
    while metric(served, "pages", state="active") or metric(served, "num_requests_running"):
        assert time.monotonic() < deadline, "pages are still in use"
        time.sleep(0.02)
    assert metric(served, "recompiles_total") == 0
    assert metric(served, "recoveries_total") == 0
    assert httpx.get(served.url + "/load").json() == {"server_load": 0}
    assert httpx.get(served.url + "/readyz").status_code == 200


def metric(server, name, **labels):
    found = []
    for line in httpx.get(server.url + "/metrics").text.splitlines():
        match = re.fullmatch(rf"jaxpaged:{name}\{{(.*)\}} (\S+)", line)
        if match and all(f'{key}="{value}"' in match[1] for key, value in labels.items()):
            found.append(float(match[2]))
    assert len(found) == 1, (name, found)
    return found[0]


def test_the_answer_makes_sense(ai):
    answer = ai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "What is a page?"}], temperature=0)
    assert "tokens" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 0.8, "seed": 7, "top_p": 0.9}, {"temperature": 1.2, "seed": -3, "top_k": 20}]
)
def test_streamed_whole_and_offline_are_the_same(ai, cache, served, sampling):
    llm = _offline(cache)
    values = dict(sampling, max_tokens=24)
    expected = [output.outputs[0] for output in llm.generate(PROMPTS, SamplingParams(**values), use_tqdm=False)]
    extra = {"extra_body": {"top_k": values.pop("top_k")}} if "top_k" in values else {}
    whole = ai.completions.create(model="tiny", prompt=PROMPTS, **({"top_p": 1} | values), **extra)
    assert [choice.text for choice in whole.choices] == [output.text for output in expected]
    assert [choice.finish_reason for choice in whole.choices] == [output.finish_reason for output in expected]
    streamed = [""] * len(PROMPTS)
    for chunk in ai.completions.create(model="tiny", prompt=PROMPTS, stream=True, **({"top_p": 1} | values), **extra):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in whole.choices]


_offline_engines = {}


def _offline(cache):
    if cache not in _offline_engines:
        _offline_engines[cache] = LLM(
            num_pages=513,
            max_num_seqs=SEQUENCES,
            max_num_batched_tokens=BUCKETS[-1],
            token_buckets=BUCKETS,
            compilation_cache_dir=str(cache),
            show_progress=False,
        )
    return _offline_engines[cache]


def test_the_best_of_several_and_beams_are_those_of_the_library(ai, cache):
    llm = _offline(cache)
    best = SamplingParams(n=2, best_of=4, seed=3, temperature=1.0, max_tokens=12)
    beams = SamplingParams(use_beam_search=True, n=3, beam_width=4, length_penalty=0.7, early_stopping=True, max_tokens=16)
    extra = {"use_beam_search": True, "beam_width": 4, "length_penalty": 0.7, "early_stopping": True}
    for params, asked in (
        (best, {"best_of": 4, "seed": 3, "temperature": 1.0, "top_p": 1}),
        (beams, {"extra_body": extra}),
    ):
        expected = llm.generate(PROMPTS, params, use_tqdm=False)
        found = ai.completions.create(model="tiny", prompt=PROMPTS, n=params.n, max_tokens=params.max_tokens, **asked)
        assert [choice.text for choice in found.choices] == [output.text for each in expected for output in each.outputs]
        assert [choice.finish_reason for choice in found.choices] == [output.finish_reason for each in expected for output in each.outputs]


def test_the_prefix_cache_is_parted_by_api_key(cache):
    """Both ways, on the real engine: the same key finds what it sent before, another key does not; nor does anybody after a reset."""
    engine = AsyncEngine(configured(cache))
    server = LoopbackServer(engine, ServerConfig(served_model_name=("tiny",), api_key=("first", "second"), admin_api_key=("third",)))
    prompt = "Once upon a time there was a page that two requests wanted to read. " * 4
    texts = set()

    def cached(key, **more):
        with openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0, timeout=120) as client:
            stream = client.completions.create(
                model="tiny",
                prompt=prompt,
                max_tokens=8,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=more,
            )
            chunks = list(stream)
            texts.add("".join(chunk.choices[0].text for chunk in chunks[:-1]))
            return chunks[-1].usage.prompt_tokens_details.cached_tokens

    try:
        until(lambda: httpx.get(server.url + "/health").status_code == 200, 300)
        assert [cached(key) > 0 for key in ("first", "first", "second", "second", "first")] == [False, True, False, True, True]
        assert cached("first", prompt_logprobs=None, user="second") > 0
        assert httpx.post(server.url + "/reset_prefix_cache").status_code == 401
        assert httpx.post(server.url + "/reset_prefix_cache", headers={"authorization": "Bearer second"}).status_code == 200
        assert [cached(key) > 0 for key in ("first", "second", "second")] == [True, False, True]
        assert httpx.post(server.url + "/reset_prefix_cache", headers={"authorization": "Bearer third"}).json()["reset"] == "all"
        assert [cached(key) for key in ("first", "second")] == [0, 0]
        assert len(texts) == 1
    finally:
        server.close()
        engine.stop()


def test_chat_streamed_and_whole_are_the_same(ai):
    for prompt in PROMPTS:
        body = {"model": "tiny", "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 32}
        whole = ai.chat.completions.create(**body)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ai.chat.completions.create(**body, stream=True))
        assert streamed == whole.choices[0].message.content


def test_sixty_four_requests_at_once(served):
    """Four times as many as run at a time; each gets the answer that it gets alone."""

    def ask(i, **more):
        body = {"model": "tiny", "prompt": f"Story {i % 8}:", "max_tokens": 20, "temperature": 0.7, "seed": i % 8, **more}
        answer = httpx.post(served.url + "/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    alone = [ask(i) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        together = list(pool.map(ask, range(64)))
    assert together == alone * 8


def test_samples_and_logprobs(ai):
    answer = ai.completions.create(model="tiny", prompt="What is", n=4, max_tokens=8, temperature=1.5, seed=1, logprobs=5, echo=True)
    assert len({choice.text for choice in answer.choices}) > 1
    for choice in answer.choices:
        logprobs = choice.logprobs
        assert "".join(logprobs.tokens).replace("<|im_end|>", "") == choice.text
        assert logprobs.token_logprobs[0] is None
        for token, value, top in zip(logprobs.tokens[1:], logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True):
            assert top[token] == value <= 0
            assert 5 <= len(top) <= 6
    greedy = ai.completions.create(model="tiny", prompt="What is", max_tokens=8, temperature=0, logprobs=1)
    logprobs = greedy.choices[0].logprobs
    assert [max(top, key=top.get) for top in logprobs.top_logprobs] == logprobs.tokens


def test_stop_strings_and_limits(ai):
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "What is a page?"}], "temperature": 0}
    full = ai.chat.completions.create(**ask).choices[0].message.content
    word = full.split()[5]
    cut = ai.chat.completions.create(**ask, stop=[word])
    assert cut.choices[0].message.content == full[: full.index(word)]
    assert cut.choices[0].stop_reason == word
    short = ai.chat.completions.create(**ask, max_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)
    fixed = ai.chat.completions.create(**ask, max_tokens=40, extra_body={"ignore_eos": True})
    assert fixed.usage.completion_tokens == 40
    only = ai.completions.create(model="tiny", prompt="x", max_tokens=5, extra_body={"allowed_token_ids": [100]})
    assert len(only.choices[0].text) > 0


def disconnect_at_random(served, rng):
    """Sends a request and closes the connection at some moment: in the queue, in the prefill, in the middle of a stream, at the end."""
    chat = rng.random() < 0.5
    words = " ".join(rng.choice(["page", "block", "token", "cat"]) for _ in range(rng.choice([1, 20, 300])))
    body = {
        "model": "tiny",
        "max_tokens": rng.choice([1, 10, 200]),
        "n": rng.choice([1, 1, 4]),
        "stream": rng.random() < 0.6,
        "temperature": 1.0,
    }
    body |= {"messages": [{"role": "user", "content": words}]} if chat else {"prompt": [words] * rng.choice([1, 3]), "ignore_eos": True}
    content = json.dumps(body).encode()
    path = "/v1/chat/completions" if chat else "/v1/completions"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        if rng.random() < 0.1:
            connection.sendall((head + content)[: rng.randrange(len(head + content))])
            return
        connection.sendall(head + content)
        connection.settimeout(rng.choice([0.001, 0.02, 0.1, 0.5]))
        try:
            for _ in range(rng.choice([0, 1, 3, 10])):
                if not connection.recv(4096):
                    return
        except TimeoutError:
            pass


@pytest.mark.parametrize(("count", "at_once"), [(40, 8), pytest.param(200, 32, marks=pytest.mark.slow)])
def test_random_disconnects_leave_no_page_in_use(served, count, at_once):
    rngs = [random.Random(i) for i in range(count)]
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda rng: disconnect_at_random(served, rng), rngs))
    deadline = time.monotonic() + 20
    while metric(served, "pages", state="active"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_disconnect_frees_its_pages_within_two_steps(served):
    """Counted in steps: from the moment the server knows, at most two more are read before the pool is empty."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", served.url + "/v1/completions", json=body) as answer:
        pieces = answer.iter_bytes()  # dropping it would close the response
        assert b"text_completion" in next(pieces)
        assert metric(served, "pages", state="active") > 0
    engine = served.engine
    deadline = time.monotonic() + 15
    while len(served.service.calls):
        assert time.monotonic() < deadline
    steps = engine.stats().steps
    while engine.stats().pages_used:
        assert time.monotonic() < deadline
    assert engine.stats().steps - steps <= 2


def test_bad_input_disturbs_nobody(served):
    """A stream runs on, token for token, while bad requests of every kind arrive."""
    body = {"model": "tiny", "prompt": "Once upon", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    expected = httpx.post(served.url + "/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    stop = threading.Event()

    def pester():
        bad = [{"prompt": [2**31]}, {"n": 0}, {"temperature": -1}, {"logit_bias": {"99999": 1}}, {"max_tokens": 10**6}, {"stop": [""]}]
        while not stop.is_set():
            for change in bad:
                assert httpx.post(served.url + "/v1/completions", json={"model": "tiny", "prompt": "x"} | change).status_code == 400

    thread = threading.Thread(target=pester)
    thread.start()
    try:
        for _ in range(3):
            assert httpx.post(served.url + "/v1/completions", json=body, timeout=60).json()["choices"][0]["text"] == expected
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
def test_pool_waste_is_small_for_long_contexts(cache):
    engine = AsyncEngine(configured(cache))
    server = LoopbackServer(engine, ServerConfig(served_model_name=("tiny",)))
    try:
        while httpx.get(server.url + "/health").status_code != 200:
            time.sleep(0.1)

        def ask(i):
            body = {"model": "tiny", "prompt": [[100 + i] * (200 + 3 * i)], "max_tokens": 64, "ignore_eos": True}
            return httpx.post(server.url + "/v1/completions", json=body, timeout=300).status_code

        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            assert set(pool.map(ask, range(64))) == {200}
        assert 0 < metric(server, "kv_waste_perc") < 0.04
    finally:
        server.close()
        engine.stop()


@pytest.mark.slow
def test_sigterm_under_load_loses_no_stream(cache):
    """The real process, the real model, 32 streams."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    flags = ["--port", "0", "--max-num-seqs", str(SEQUENCES), "--max-num-batched-tokens", str(BUCKETS[-1]), "--num-pages", "513"]
    flags += ["--token-buckets", ",".join(map(str, BUCKETS)), "--compilation-cache-dir", str(cache)]
    process = subprocess.Popen(
        [sys.executable, "scripts/serve_local.py", *flags], stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
    try:
        url = ""
        for line in process.stderr:
            lines.append(line)
            if match := re.search(r"ready +(\S+)", line):
                url = match[1]
                break
        assert url, lines
        reader.start()
        texts = [b""] * 32

        def read(i):
            body = {
                "model": "tiny",
                "prompt": f"Story {i}:",
                "max_tokens": 300,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            with httpx.stream("POST", url + "/v1/completions", json=body, timeout=120) as answer:
                for piece in answer.iter_bytes():
                    texts[i] += piece

        threads = [threading.Thread(target=read, args=(i,)) for i in range(32)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while httpx.get(url + "/load").json() != {"server_load": 32}:  # a request that comes after the signal is refused
            assert time.monotonic() < deadline
        while sum(map(bool, texts)) < 8:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert sum(text.endswith(b"data: [DONE]\n\n") for text in texts) == 0, "too fast to be under load"
        for thread in threads:
            thread.join(120)
        assert process.wait(30) == 0
        for text in texts:
            assert text.endswith(b"data: [DONE]\n\n")
            assert b'"completion_tokens":300' in text
    finally:
        process.kill()
        process.wait()
