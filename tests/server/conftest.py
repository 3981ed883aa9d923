"""Clients and servers over the scripted engine."""

import pytest
from leaks import check_idle_engines, watch
from server_fakes import FakeAsyncEngine
from server_harness import Client, LoopbackServer

watch()


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Every engine that is idle after a test holds nothing."""
    yield
    check_idle_engines()


@pytest.fixture
def engine():
    return FakeAsyncEngine()


@pytest.fixture
def make_client():
    """Makes clients with other engines or options; closes them at the end."""
    made = []

    def make(engine=None, config=None, **options):
        made.append(Client(engine or FakeAsyncEngine(), config, **options))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def client(make_client, engine):
    return make_client(engine)


@pytest.fixture(scope="session")
def shared_client():
    """One client for the hundreds of cases that leave nothing behind."""
    client = Client(FakeAsyncEngine())
    yield client
    client.close()


@pytest.fixture
def make_server():
    made = []

    def make(engine=None, config=None, **options):
        made.append(LoopbackServer(engine or FakeAsyncEngine(), config, **options))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def server(make_server, engine):
    return make_server(engine)
