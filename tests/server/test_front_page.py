"""What somebody sees who opens the server's address in a browser, or asks for a route that there is not."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from server_fakes import FakeAsyncEngine, replace_info

from jaxpaged.config import ServerConfig
from jaxpaged.server.missing_routes import ELSEWHERE, explain_missing

BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


class Page(HTMLParser):
    """What is on a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.open, self.texts = [], [], [], []
        self.feed(text)
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "a":
            self.links.append(dict(attrs)["href"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_a_browser_gets_a_page_whose_links_work(shared_client):
    answer = shared_client.request("GET", "/", headers=BROWSER)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    page = Page(answer.text)
    said = " ".join(page.texts)
    for wanted in ("jaxpaged", "ready", "echo", "512 tokens", "http://localhost/v1", "curl -N http://localhost/v1/chat/completions"):
        assert wanted in said, wanted
    assert {"/v1/models", "/health", "/metrics", "/openapi.json"} <= set(page.links)
    for link in page.links:
        assert shared_client.request("GET", link).status_code == 200, link
    shown = set(re.findall(r"<code>(/[^<]*)</code>", answer.text))
    assert shown == {route.path.replace("{model:path}", "{model}") for route in shared_client.app.routes} - {"/", "/favicon.ico"}


def test_the_page_runs_nothing_and_loads_nothing(shared_client):
    answer = shared_client.request("GET", "/", headers=BROWSER)
    page = Page(answer.text)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "img", "object", "form", "base"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        for name in ("src", "href"):
            target = attributes.get(name) or "/"
            assert target.startswith("/") or target == "data:,", (tag, target)
    policy = answer.headers["content-security-policy"]
    style = re.search("<style>(.*?)</style>", answer.text, re.DOTALL)[1]
    assert f"style-src 'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'" in policy
    for rule in ("default-src 'none'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"):
        assert rule in policy
    assert "unsafe" not in policy and "http" not in policy
    assert (answer.headers["x-content-type-options"], answer.headers["referrer-policy"]) == ("nosniff", "no-referrer")


@pytest.mark.parametrize("accept", ["*/*", "application/json", "", None])
def test_a_program_gets_json(shared_client, accept):
    answer = shared_client.request("GET", "/", headers={} if accept is None else {"accept": accept})
    content = answer.json()
    assert (content["name"], content["models"], content["max_model_len"]) == ("jaxpaged", ["echo"], 512)
    assert content["status"].startswith("ready") and "POST /v1/chat/completions" in content["routes"]
    assert answer.headers["vary"] == "Accept"


def test_head_of_the_page(shared_client):
    answer = shared_client.request("HEAD", "/", headers=BROWSER)
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"", "text/html; charset=utf-8")


def test_nothing_that_is_shown_is_markup(make_client):
    engine = FakeAsyncEngine()
    replace_info(engine, model_name="</code><script>alert('x')</script>&amp;")
    text = make_client(engine).request("GET", "/", headers=BROWSER).text
    Page(text)
    assert "<script" not in text and "&lt;script&gt;" in text and "&amp;amp;" in text
    command = re.search("<pre>(.*?)</pre>", text, re.DOTALL)[1]
    assert "'" not in command and "&#x27;\\&#x27;&#x27;" in command  # quoted for the shell, then for the page


@pytest.mark.parametrize("state", ["loading", "compiling", "draining", "failed"])
def test_while_it_is_not_ready_the_page_says_why_and_comes_again(make_client, state):
    engine = FakeAsyncEngine()
    engine.state, engine.detail = state, "3 of <9> programs"
    if state in ("loading", "compiling"):
        engine.info = None
    client = make_client(engine)
    text = client.request("GET", "/", headers=BROWSER).text
    Page(text)
    assert 'http-equiv="refresh"' in text
    assert {"draining": "shutting down", "failed": "the engine has failed"}.get(state, "3 of &lt;9&gt; programs") in text
    assert client.request("GET", "/").json()["models"] == ([] if engine.info is None else ["echo"])
    assert 'http-equiv="refresh"' not in make_client().request("GET", "/", headers=BROWSER).text


def test_behind_a_proxy_the_links_have_its_prefix(make_client):
    text = make_client(config=ServerConfig(root_path="/llm/")).request("GET", "/", headers=BROWSER | {"host": "a.example:8443"}).text
    page = Page(text)
    assert page.links and all(link.startswith("/llm/") and "//" not in link for link in page.links)
    assert "http://a.example:8443/llm/v1" in text


def test_the_page_needs_the_key_as_every_route_does(make_client):
    client = make_client(config=ServerConfig(api_key=("sk-x",)))
    client.refused(client.request("GET", "/", headers=BROWSER), 401, code="invalid_api_key")
    assert "echo" in client.request("GET", "/", headers=BROWSER | {"authorization": "Bearer sk-x"}).text


def test_the_icon_is_nothing(shared_client):
    answer = shared_client.request("GET", "/favicon.ico")
    assert (answer.status_code, answer.content) == (204, b"")


MISSING = {
    "/v1": "/v1 is the base URL of clients; GET /v1/models lists the models, GET /openapi.json the routes",
    "/v1/": "/v1/ is the base URL of clients; GET /v1/models lists the models, GET /openapi.json the routes",
    "/v1/v1": "/v1/v1 is the base URL of clients; GET /v1/models lists the models, GET /openapi.json the routes",
    "/chat/completions": "there is no /chat/completions; the base URL of clients ends in /v1: use /v1/chat/completions",
    "/completions": "there is no /completions; the base URL of clients ends in /v1: use /v1/completions",
    "/models": "there is no /models; the base URL of clients ends in /v1: use /v1/models",
    "/v1/chat/completions/": "there is no /v1/chat/completions/; did you mean /v1/chat/completions?",
    "/metrics/": "there is no /metrics/; did you mean /metrics?",
    "/v1//chat/completions": "there is no /v1//chat/completions; did you mean /v1/chat/completions?",
    "/v1/v1/chat/completions": "there is no /v1/v1/chat/completions; did you mean /v1/chat/completions?",
    "/api/v1/chat/completions": "there is no /api/v1/chat/completions; did you mean /v1/chat/completions?",
    "/V1/Chat/Completions": "there is no /V1/Chat/Completions; did you mean /v1/chat/completions?",
    "/v1/chat/completion": "there is no /v1/chat/completion; did you mean /v1/chat/completions?",
    "/v1/health": "there is no /v1/health; did you mean /health?",
    "/v1/tokenize": "there is no /v1/tokenize; did you mean /tokenize?",
    "/healthz": "there is no /healthz; did you mean /health?",
    "/metric": "there is no /metric; did you mean /metrics?",
    "/v1/responses": "/v1/responses is not supported by this server; use /v1/chat/completions",
    "/responses": "/responses is not supported by this server; use /v1/chat/completions",
    "/v1/embeddings": "/v1/embeddings is not supported by this server; its models generate text",
    "/v1/embeddings/": "/v1/embeddings/ is not supported by this server; its models generate text",
    "/v1/messages": "/v1/messages is not supported by this server; use /v1/chat/completions",
    "/v1/messages/count_tokens": "/v1/messages/count_tokens is not supported by this server; use /tokenize",
    "/tokenizer_info": "/tokenizer_info is not supported by this server; use /tokenize and /detokenize",
    "/docs": "/docs is not supported by this server; see /openapi.json",
    "/something/else": "there is no /something/else; GET /openapi.json lists the routes",
    "/wp-login.php": "there is no /wp-login.php; GET /openapi.json lists the routes",
    "/a%0A%1B[2J": "there is no '/a\\n\\x1b[2J'; GET /openapi.json lists the routes",
    "/" + "x" * 5000: f"there is no /{'x' * 99}; GET /openapi.json lists the routes",
}


@pytest.mark.parametrize("path", MISSING)
def test_a_route_that_there_is_not_is_named_with_what_was_probably_meant(shared_client, path):
    for method in ("GET", "POST"):
        error = shared_client.refused(shared_client.request(method, path), 404, code="not_found")
        assert error["message"] == MISSING[path]


def test_no_name_of_a_model_is_no_route(shared_client):
    error = shared_client.refused(shared_client.request("GET", "/v1/models/"), 404, code="not_found")
    assert error["message"] == "there is no /v1/models/; did you mean /v1/models?"


def test_what_is_meant_exists_and_what_is_not_supported_does_not(shared_client):
    routes = [route.path for route in shared_client.app.routes]
    for path in ELSEWHERE:
        for asked in (path, "/v1" + path):
            message = explain_missing(asked, routes)
            assert asked not in routes and "is not supported by this server" in message
            assert all(named in routes for named in re.findall(r"(?:use|and|see) (/[a-z0-9_./]+)", message)), message
