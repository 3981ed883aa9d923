"""Keys, hosts, origins and header limits, over every route that there is."""

import hmac

import pytest
from server_harness import GOOD

from jaxpaged.config import ServerConfig
from jaxpaged.errors import ConfigError
from jaxpaged.flags import Parser, add_options, read_options
from jaxpaged.server import gate
from jaxpaged.server.callers import Callers
from jaxpaged.server.gate import MAX_HEADER_BYTES, MAX_HEADERS, OPEN_PATHS
from jaxpaged.server.keys import read_keys

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
        assert answer.status_code in (200, 204, 400, 405, 415), (method, path, answer.text)


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


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_key_empties_its_own_prefix_cache_and_an_admins_key_everybodys(make_client, path):
    body = {"model": "echo", "max_tokens": 1} | (
        {"prompt": "a common beginning"} if "chat" not in path else {"messages": [{"role": "user", "content": "a common beginning"}]}
    )
    client = make_client(config=ServerConfig(api_key=(KEY, OTHER), admin_api_key=("sk-admin",)))
    client.engine.caching = True

    def cached(*keys):
        answers = [client.post(path, body, headers=[("authorization", f"Bearer {key}".encode())]) for key in keys]
        return [answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0 for answer in answers]

    def reset(key):
        return client.request("POST", "/reset_prefix_cache", headers=[("authorization", f"Bearer {key}".encode())])

    assert cached(KEY, OTHER, "sk-admin", KEY, OTHER, "sk-admin") == [False, False, False, True, True, True]
    assert reset(KEY).json() == {"status": "ok", "reset": "own"}
    assert cached(KEY, OTHER, "sk-admin") == [False, True, True]
    client.refused(reset("nope"), 401)
    assert cached(KEY, OTHER, "sk-admin") == [True, True, True]
    assert reset("sk-admin").json() == {"status": "ok", "reset": "all"}
    assert cached(KEY, OTHER, "sk-admin") == [False, False, False]


def test_an_admins_key_alone_locks_the_server_and_opens_every_route(make_client):
    client = make_client(config=ServerConfig(admin_api_key=(KEY,)))
    client.refused(client.request("GET", "/version"), 401, code="invalid_api_key")
    for method, path in routes(client):
        answer = client.request(method, path, headers={"authorization": f"Bearer {KEY}"})
        assert answer.status_code in (200, 204, 400, 415), (method, path, answer.text)


def test_keys_from_a_file(make_client, tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# for the batch jobs\n{KEY}\n\n  {OTHER}  \r\n#sk-old\n", encoding="utf-8")
    client = make_client(config=ServerConfig(api_key=("sk-flag",), api_key_file=str(path)))
    path.unlink()  # it was read at the start
    keys = (KEY, OTHER, "sk-flag", "sk-old", "#sk-old")
    answers = [client.request("GET", "/version", headers=[("authorization", f"Bearer {key}".encode())]).status_code for key in keys]
    assert answers == [200, 200, 200, 401, 401]
    assert repr(read_keys(ServerConfig(api_key=(KEY,)))).find(KEY) == -1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_key": ("",)}, "api_key must not be empty; leave it out to serve without a key"),
        ({"api_key": ("good", "")}, "api_key must not be empty"),
        ({"admin_api_key": ("",)}, "admin_api_key must not be empty"),
        ({"api_key": ("good", "two words")}, "api_key: key 2 has a blank"),
        ({"api_key": ("line\n",)}, "api_key: key 1 has a blank"),
        ({"api_key_file": "/nowhere/keys"}, "api_key_file /nowhere/keys cannot be read: No such file"),
        ({"api_key_file": "/"}, "api_key_file / cannot be read: Is a directory"),
        ({"api_key": ("a", "b"), "admin_api_key": ("c", "b")}, "one key is given as admin_api_key and as api_key"),
    ],
)
def test_keys_that_cannot_be_meant_are_refused_at_the_start(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_keys(ServerConfig(**options))
    assert "good" not in str(caught.value) and "words" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n# nothing\n", b"two words\n", b"\xff\xfe\n"])
def test_a_file_of_keys_without_a_key_is_refused_at_the_start(tmp_path, content):
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ConfigError, match="api_key_file"):
        read_keys(ServerConfig(api_key_file=str(tmp_path / "keys")))


@pytest.mark.parametrize("name", ["JAXPAGED_API_KEY", "VLLM_API_KEY", None])
def test_an_empty_key_of_the_environment_or_the_command_line_does_not_open_the_server(monkeypatch, name):
    """As a compose file gives it where the variable that it takes the key from is not set."""
    parser = Parser()
    add_options(parser, ServerConfig)
    if name is not None:
        monkeypatch.setenv(name, "")
    (config,) = read_options(parser.parse(["--api-key", ""] if name is None else []), ServerConfig)
    with pytest.raises(ConfigError, match="must not be empty"):
        read_keys(config)


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


def local(*, origins=(), hosts=()):
    """Who may call a server that listens on loopback without a key."""
    return Callers(local_only=True, allowed_origins=origins, allowed_hosts=hosts)


ORIGINS = [
    ("http://evil.example", False),
    ("http://localhost.evil.example", False),
    ("http://127.0.0.1.evil.example:8000", False),
    ("http://evil.example\\@localhost", False),
    ("http://evil.example@localhost", False),
    ("http://user:password@127.0.0.1:8000", False),
    ("http://localhost:8000/", False),
    ("http://localhost:8000?x", False),
    ("http://localhost#", False),
    ("http://localhost:", False),
    ("http://localhost:0", False),
    ("http://localhost:65536", False),
    ("http://localhost:08000", False),
    ("http://LOCALHOST:8000", False),
    (" http://localhost", False),
    ("http://localhost evil.example", False),
    ("http://localhost,http://evil.example", False),
    ("http://127.0.0.256", False),
    ("http://128.0.0.1", False),
    ("http://0.0.0.0:8000", False),
    ("http://[::2]", False),
    ("http://[", False),
    ("http://[::1", False),
    ("http://::1", False),
    ("//localhost", False),
    ("localhost", False),
    ("ftp://localhost", False),
    ("file://localhost", False),
    ("chrome-extension://localhost", False),
    ("null", False),
    ("", False),
    ("http://localhost", True),
    ("http://localhost:3000", True),
    ("https://localhost:65535", True),
    ("http://app.localhost:3000", True),
    ("http://127.0.0.1:8000", True),
    ("http://127.8.9.10", True),
    ("http://[::1]:8000", True),
    ("https://good.example", True),
    ("https://good.example:8443", False),
    ("http://good.example", False),
]


@pytest.mark.parametrize(("origin", "allowed"), ORIGINS)
def test_a_page_elsewhere_cannot_reach_a_local_server_through_the_browser(make_client, origin, allowed):
    client = make_client(callers=local(origins=["https://good.example"]))
    named = {"origin": origin, "host": "localhost:8000"}
    answer = client.request("GET", "/version", headers=named)
    asked = client.request("OPTIONS", "/v1/completions", headers=named | {"access-control-request-method": "POST"})
    if allowed:
        assert (answer.status_code, asked.status_code) == (200, 200)
        assert {one.headers["access-control-allow-origin"] for one in (answer, asked)} == {origin}
    else:
        for one in (answer, asked):
            client.refused(one, 403, code="origin_not_allowed")
            assert not [name for name in one.headers if name.startswith("access-control")]


def test_two_origins_are_refused(make_client):
    client = make_client(callers=local())
    both = [("origin", "http://localhost"), ("origin", "http://localhost"), ("host", "localhost")]
    client.refused(client.request("GET", "/version", headers=both), 403, code="origin_not_allowed")


HOSTS = [
    ("evil.example", False),
    ("evil.example:8000", False),
    ("localhost.evil.example", False),
    ("notlocalhost", False),
    ("127.0.0.1.evil.example", False),
    ("192.168.1.7:8000", False),
    ("0.0.0.0:8000", False),
    ("[::2]", False),
    ("[fe80::1]", False),
    ("localhost", True),
    ("LocalHost:8000", True),
    ("localhost.", True),
    ("app.localhost", True),
    ("127.0.0.1:8000", True),
    ("127.1.2.3", True),
    ("[::1]", True),
    ("[0:0:0:0:0:0:0:1]:8000", True),
    ("host.docker.internal:8000", True),
    ("LLM.example.com", True),
    ("other.example.com", False),
]


@pytest.mark.parametrize(("host", "allowed"), HOSTS)
def test_a_local_server_answers_to_its_own_names_only(make_client, host, allowed):
    """Else a page whose name is made to point here could read every answer: to its browser the page and the server are one."""
    client = make_client(callers=local(hosts=["llm.example.com"]))
    for method, path in routes(client):
        for headers in ({}, {"origin": f"http://{host}"}):
            answer = client.request(method, path, headers={"host": host} | headers)
            if not allowed:
                assert answer.status_code == 403, (method, path)
                if method != "HEAD":
                    assert client.refused(answer, 403, code="host_not_allowed")["message"].startswith(repr(host))
            elif not headers:
                assert answer.status_code in (200, 204, 400, 415), (method, path, answer.text)


@pytest.mark.parametrize(
    ("callers", "host", "status"),
    [
        (Callers(), "evil.example", 200),  # has a key, or serves a network that knows it by names that we do not know
        (Callers(allowed_hosts=["llm.example.com"]), "evil.example", 403),
        (Callers(allowed_hosts=["llm.example.com"]), "llm.example.com:443", 200),
        (Callers(allowed_hosts=["llm.example.com"]), "127.0.0.1:8000", 200),
        (Callers(allowed_hosts=["10.1.2.3", "FD00::0001"]), "[fd00::1]:8000", 200),
        (local(hosts=["*"]), "evil.example", 200),
        (local(origins=["*"]), "evil.example", 200),  # every page may call anyway
    ],
)
def test_where_names_are_checked(make_client, callers, host, status):
    assert make_client(callers=callers).request("GET", "/version", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # no browser
        ({"sec-fetch-site": "none", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}, 200),  # typed
        ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors", "sec-fetch-dest": "empty"}, 200),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}, 200),  # another port of localhost
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}, 200),  # a link was followed
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "script"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "cors", "origin": "https://good.example"}, 200),
    ],
)
def test_a_browser_that_names_no_origin_says_whether_a_page_elsewhere_asks(make_client, headers, status):
    client = make_client(callers=local(origins=["https://good.example"]))
    answer = client.request("GET", "/metrics", headers=headers)
    assert answer.status_code == status
    assert make_client(callers=Callers()).request("GET", "/metrics", headers=headers).status_code == 200


SDK_HEADERS = (
    "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-package-version,x-stainless-retry-count"
)


@pytest.mark.parametrize("asked", [None, "content-type", SDK_HEADERS, "X-Anything, x-else"])
@pytest.mark.parametrize("origin", ["http://localhost:5173", "https://good.example"])
def test_a_page_that_may_call_may_send_any_header(make_client, origin, asked):
    client = make_client(callers=local(origins=["https://good.example"]))
    headers = {"origin": origin, "access-control-request-method": "POST"} | ({"access-control-request-headers": asked} if asked else {})
    answer = client.request("OPTIONS", "/v1/chat/completions", headers=headers)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers.get("access-control-allow-headers") == asked
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "access-control-allow-private-network" not in answer.headers
    assert "access-control-allow-credentials" not in answer.headers
    answer = client.request("OPTIONS", "/v1/chat/completions", headers=headers | {"access-control-request-private-network": "true"})
    assert answer.headers["access-control-allow-private-network"] == "true"


def test_a_header_that_no_browser_asks_for_is_not_repeated(make_client):
    headers = {"origin": "http://localhost", "access-control-request-method": "POST", "access-control-request-headers": 'x"<>:y'}
    answer = make_client(callers=local()).request("OPTIONS", "/v1/completions", headers=headers)
    assert (answer.status_code, "access-control-allow-headers" in answer.headers) == (200, False)


ERRORS = {
    400: lambda client, head: client.post("/v1/completions", {"model": "echo"}, headers=head),
    401: lambda client, head: client.request("GET", "/version", headers=head | {"authorization": "Bearer wrong"}),
    403: lambda client, head: client.request("GET", "/version", headers=head | {"host": "evil.example"}),
    404: lambda client, head: client.request("GET", "/nowhere", headers=head),
    405: lambda client, head: client.request("GET", "/v1/completions", headers=head),
    413: lambda client, head: client.post("/v1/completions", {"model": "echo", "prompt": "x" * 3000}, headers=head),
    414: lambda client, head: client.request("GET", "/" + "x" * 9000, headers=head),
    415: lambda client, head: client.request("POST", "/v1/completions", content=b"x", headers=head),
    429: lambda client, head: client.post("/v1/completions", GOOD, headers=head),
    431: lambda client, head: client.request("GET", "/version", headers=head | {"x": "y" * 20_000}),
    500: lambda client, head: client.request("GET", "/load", headers=head),
    503: lambda client, head: client.post(
        "/v1/chat/completions", {"model": "echo", "messages": [{"role": "user", "content": "x"}]}, headers=head
    ),
}


@pytest.mark.parametrize("origin", ["https://good.example", "https://evil.example", None])
@pytest.mark.parametrize("status", ERRORS)
def test_a_page_that_may_call_can_read_every_error(make_client, status, origin):
    config = ServerConfig(api_key=(KEY,), max_body_bytes=2000, allowed_origins=("https://good.example",), allowed_hosts=("localhost",))
    client = make_client(config=config)
    if status == 429:
        client.engine.max_calls = 0
    if status == 500:
        client.service.calls = None
    if status == 503:
        client.engine.state = "stopped"
    answer = ERRORS[status](client, {"authorization": f"Bearer {KEY}"} | ({"origin": origin} if origin else {}))
    assert answer.status_code == status, answer.text
    assert answer.headers["vary"] == "Origin"
    shown = answer.headers.get("access-control-allow-origin"), "x-request-id" in answer.headers.get("access-control-expose-headers", "")
    assert shown == (("https://good.example", True) if origin == "https://good.example" else (None, False))


def test_with_every_origin_allowed_answers_do_not_depend_on_it(make_client):
    answer = make_client(config=ServerConfig(allowed_origins=("*",))).request("GET", "/version", headers={"origin": "http://any.example"})
    assert (answer.headers["access-control-allow-origin"], "vary" in answer.headers) == ("*", False)


@pytest.mark.parametrize(
    ("origin", "hint"),
    [
        ("localhost:3000", "like http://localhost:3000"),
        ("http://localhost:3000/", "no path"),
        ("http://Localhost", "as browsers send them"),
        ("https://good.example:443", "write 'https://good.example'"),
        ("http://good.example:80", "write 'http://good.example'"),
        ('["*"]', "or *"),
        ("http://*.example.com", "as browsers send them"),
        ("", "like"),
    ],
)
def test_an_allowed_origin_that_no_browser_sends_is_refused_at_start(origin, hint):
    with pytest.raises(ConfigError, match="allowed_origins") as caught:
        Callers(allowed_origins=[origin])
    assert hint in str(caught.value) and repr(origin) in str(caught.value)


@pytest.mark.parametrize("origin", ["*", "null", "tauri://localhost", "chrome-extension://abcdefghijklmnop", "http://localhost:80800"[:-1]])
def test_an_allowed_origin_that_a_browser_sends(origin):
    assert Callers(allowed_origins=[origin]).may_call(origin)


@pytest.mark.parametrize("name", ["example.com:8000", "http://example.com", "", "a b", "*.example.com", "[::1"])
def test_an_allowed_host_that_is_none_is_refused_at_start(name):
    with pytest.raises(ConfigError, match="allowed_hosts takes names or addresses without a port"):
        Callers(allowed_hosts=[name])


def test_a_prefix_of_a_proxy_opens_nothing(make_client):
    client = make_client(config=ServerConfig(api_key=(KEY,), root_path="/livez"))
    client.refused(client.request("GET", "/livez/metrics"), 401)
    client.refused(client.request("GET", "/metrics"), 401)
    document = client.request("GET", "/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()
    assert document["servers"] == [{"url": "/livez"}]
