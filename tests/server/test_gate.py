"""Keys, hosts, origins and header limits, over every route that there is."""

import hmac

import pytest

from jaxpaged.config import ServerConfig
from jaxpaged.server import gate
from jaxpaged.server.gate import MAX_HEADER_BYTES, MAX_HEADERS, OPEN_PATHS

KEY = "sk-first-0123456789"
OTHER = "sk-zweiter-schlüssel"


@pytest.fixture
def locked(make_client):
    return make_client(config=ServerConfig(api_key=(KEY, OTHER)))


def routes(client):
    return [(method, route.path.replace("{model:path}", "echo")) for route in client.app.routes for method in sorted(route.methods)]


WRONG = {
    "none": [],
    "wrong": [("authorization", "Bearer nope")],
    "upper case": [("authorization", f"Bearer {KEY.upper()}")],
    "suffix": [("authorization", f"Bearer {KEY}x")],
    "prefix": [("authorization", f"Bearer {KEY[:-1]}")],
    "empty": [("authorization", "Bearer ")],
    "no scheme": [("authorization", KEY)],
    "basic": [("authorization", f"Basic {KEY}")],
    "non-ASCII": [("authorization", "Bearer schlüssel".encode())],
    "not UTF-8": [("authorization", b"Bearer \xff\xfe")],
    "8 KB": [("authorization", "Bearer " + "x" * 8000)],
    "two headers": [("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}")],
    "another header": [("x-api-key", KEY)],
    "query": [("x-forwarded-uri", "/livez")],
}


@pytest.mark.parametrize("name", WRONG)
def test_every_route_but_the_health_ones_needs_the_key(locked, name):
    shapes = set()
    for method, path in [
        *routes(locked),
        ("GET", "/nope"),
        ("GET", "/"),
        ("POST", "/livez/"),
        ("GET", "//livez"),
        ("GET", "/livez/../metrics"),
    ]:
        answer = locked.request(method, path, headers=WRONG[name])
        if path in OPEN_PATHS:
            assert answer.status_code == 200
            continue
        assert answer.status_code == 401, (method, path)
        assert answer.headers["www-authenticate"] == "Bearer"
        if method != "HEAD":
            locked.refused(answer, 401, code="invalid_api_key")
            shapes.add((answer.text, tuple(sorted(set(answer.headers) - {"x-request-id"}))))
    assert len(shapes) == 1


def test_the_open_paths_are_exactly_these():
    assert {"/livez", "/readyz", "/health", "/ping"} == OPEN_PATHS


@pytest.mark.parametrize("value", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER  {KEY} ", f"Bearer {OTHER}".encode()])
def test_each_key_opens_every_route(locked, value):
    for method, path in routes(locked):
        answer = locked.request(method, path, headers=[("authorization", value)])
        assert answer.status_code in (200, 400, 405, 415), (method, path, answer.text)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_prefix_cache_is_parted_by_key(make_client, path):
    """Both ways: the same key finds what it sent before, another key does not, and neither does the same key of another process."""
    body = {"model": "echo", "max_tokens": 1} | (
        {"prompt": "a common beginning"} if "chat" not in path else {"messages": [{"role": "user", "content": "a common beginning"}]}
    )

    def ask(client, key, **extra):
        answer = client.post(path, body | extra, headers=[("authorization", f"Bearer {key}".encode())])
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    client = make_client(config=ServerConfig(api_key=(KEY, OTHER, KEY)))
    client.engine.caching = True
    assert [ask(client, key) > 0 for key in (KEY, KEY, OTHER, OTHER, KEY)] == [False, True, False, True, True]
    assert ask(client, OTHER, user="somebody", prompt_cache_key="x", safety_identifier="y") > 0, "the client does not choose"
    tenants = [request.tenant for request in client.engine.submitted]
    assert len(set(tenants)) == 2 and len(set(tenants[:2])) == 1
    assert not any(key in tenant or tenant in key for tenant in tenants for key in (KEY, OTHER))
    again = make_client(client.engine, ServerConfig(api_key=(KEY,)))
    assert ask(again, KEY) == 0, "the secret is made anew in each process"


def test_without_keys_there_is_one_tenant(client):
    client.post("/v1/completions", {"model": "echo", "prompt": "x"}, headers={"authorization": "Bearer anything"})
    assert [request.tenant for request in client.engine.submitted] == [""]


def test_all_keys_are_compared_in_constant_time(locked, monkeypatch):
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(gate.hmac, "compare_digest", lambda a, b: compared.append((type(a), len(a))) or real(a, b))
    for token in (KEY, OTHER, "nope", ""):
        compared.clear()
        locked.request("GET", "/version", headers={"authorization": f"Bearer {token}".encode()})
        assert compared == [(bytes, 32)] * 2


@pytest.mark.parametrize("host", ["a/v1", "a?", "a#", "", "a b", "a:b", "a:123456", "[::1", "http://a", "a@b", "x" * 300, "a\\b"])
def test_a_host_that_is_none(shared_client, host):
    shared_client.refused(shared_client.request("GET", "/version", headers={"host": host}), 400, code="invalid_host")


@pytest.mark.parametrize("host", ["a", "a:1", "localhost:8000", "example.com", "[::1]", "[::1]:8000", "127.0.0.1:80", "under_score"])
def test_a_host_that_is_one(shared_client, host):
    assert shared_client.request("GET", "/version", headers={"host": host}).status_code == 200


def test_two_hosts(shared_client):
    answer = shared_client.request("GET", "/version", headers=[("host", "a"), ("host", "a")])
    shared_client.refused(answer, 400, code="invalid_host")


def test_header_limits(shared_client):
    shared_client.refused(shared_client.request("GET", "/version", headers={"x": "y" * MAX_HEADER_BYTES}), 431, code="headers_too_large")
    many = {f"x{i}": "y" for i in range(MAX_HEADERS + 1)}
    shared_client.refused(shared_client.request("GET", "/version", headers=many), 431, code="headers_too_large")
    assert shared_client.request("GET", "/version", headers={"x": "y" * (MAX_HEADER_BYTES - 500)}).status_code == 200


def test_url_limit(shared_client):
    shared_client.refused(shared_client.request("GET", "/" + "x" * 9000), 414, code="url_too_long")
    shared_client.refused(shared_client.request("GET", "/version?" + "x" * 9000), 414, code="url_too_long")


def test_cors_is_off_by_default(shared_client):
    answer = shared_client.request("GET", "/version", headers={"origin": "http://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    preflight = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    shared_client.refused(shared_client.request("OPTIONS", "/v1/completions", headers=preflight), 405)


def test_cors_allows_exactly_the_listed_origins(make_client):
    client = make_client(config=ServerConfig(allowed_origins=("https://good.example",), api_key=(KEY,)))
    wanted = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    good = client.request("OPTIONS", "/v1/completions", headers=wanted | {"origin": "https://good.example"})
    assert (good.status_code, good.headers["access-control-allow-origin"]) == (200, "https://good.example")
    assert "access-control-allow-credentials" not in good.headers
    refused = client.request("GET", "/version", headers={"origin": "https://good.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://good.example")
    for origin in ("https://evil.example", "https://good.example.evil", "http://good.example", "https://good.example:8443", "null"):
        answer = client.request("OPTIONS", "/v1/completions", headers=wanted | {"origin": origin})
        assert answer.headers.get("access-control-allow-origin") is None


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://evil.example", 403),
        ("http://localhost.evil.example", 403),
        ("http://127.0.0.1.evil.example:8000", 403),
        ("null", 403),
        ("http://[", 403),
        ("http://localhost:3000", 200),
        ("http://127.0.0.1:8000", 200),
        ("http://[::1]:8000", 200),
        ("https://good.example", 200),
    ],
)
def test_a_page_elsewhere_cannot_reach_a_local_server_through_the_browser(make_client, origin, status):
    client = make_client(config=ServerConfig(allowed_origins=("https://good.example",)), local_only=True)
    answer = client.request("GET", "/version", headers={"origin": origin, "host": "evil.example:8000"})
    assert answer.status_code == status
    if status == 403:
        client.refused(answer, 403, code="origin_not_allowed")


def test_a_prefix_of_a_proxy_opens_nothing(make_client):
    client = make_client(config=ServerConfig(api_key=(KEY,), root_path="/livez"))
    client.refused(client.request("GET", "/livez/metrics"), 401)
    client.refused(client.request("GET", "/metrics"), 401)
    document = client.request("GET", "/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()
    assert document["servers"] == [{"url": "/livez"}]
