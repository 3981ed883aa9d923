"""Places for small and large work: who waits for whom."""

import asyncio

import pytest

from jaxpaged.server.turns import Turns


class Line:
    """Takes places in tasks and notes the order in which they were called."""

    def __init__(self, count):
        self.turns = Turns(count)
        self.called = []

    async def join(self, name, *, large, owner="a"):
        async def wait():
            await self.turns.take(large=large, owner=owner)
            self.called.append(name)

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return task

    async def give(self, *, large):
        self.turns.give(large=large)
        await asyncio.sleep(0)
        await asyncio.sleep(0)


def check(scenario):
    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_large_work_leaves_a_place_for_small_work():
    async def scenario():
        line = Line(3)
        for name in "LMN":
            await line.join(name, large=True)
        assert line.called == ["L", "M"]
        await line.join("s", large=False)
        assert line.called == ["L", "M", "s"]
        await line.join("t", large=False)
        await line.give(large=True)  # the free place is small work's: it comes first
        assert line.called == ["L", "M", "s", "t"]
        await line.give(large=False)
        assert line.called == ["L", "M", "s", "t", "N"]

    check(scenario)


def test_small_work_may_use_every_place():
    async def scenario():
        line = Line(2)
        for name in "abc":
            await line.join(name, large=False)
        assert line.called == ["a", "b"]
        await line.join("L", large=True)
        await line.give(large=False)
        await line.give(large=False)
        assert line.called == ["a", "b", "c", "L"]

    check(scenario)


def test_owners_take_turns():
    async def scenario():
        line = Line(2)
        for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
            await line.join(name, large=True, owner=name[0])
        for _ in range(5):
            await line.give(large=True)
        assert line.called == ["a1", "a2", "b1", "c1", "a3", "b2"]

    check(scenario)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("called", [False, True])
def test_who_leaves_the_line_takes_no_place_with_him(large, called):
    async def scenario():
        line = Line(2)
        first = [await line.join(i, large=large) for i in range(1 if large else 2)]
        gone = await line.join("gone", large=large)
        await line.join("next", large=large)
        if called:
            line.turns.give(large=large)  # its turn has come, and it has not noticed yet
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        if not called:
            await line.give(large=large)
        await asyncio.sleep(0)
        assert line.called == [*range(len(first)), "next"]
        for _ in range(len(first)):
            await line.give(large=large)
        await line.join("last", large=large)
        assert line.called[-1] == "last"

    check(scenario)
