"""The parts that people copy first: bucket, cache, result budget, sandbox."""

import gc
import os
from pathlib import Path

import anyio
import pytest
from conftest import Clock
from mcp.server.mcpserver.exceptions import ToolError

from common import ConfigError, Directory, Sandbox, TokenBucket, TTLCache, page, printable, trailer, unprintable

pytestmark = pytest.mark.anyio


# -------------------------------------------------------------------------------------------------- token bucket


def test_a_bucket_allows_a_burst_and_refills_at_its_rate_up_to_its_capacity() -> None:
    clock = Clock()
    bucket = TokenBucket(3, 2, timer=clock)
    assert [bucket.try_acquire() for _ in range(5)] == [0.0, 0.0, 0.0, 0.5, 0.5]  # a refused call takes nothing
    for seconds, tokens in ((0.5, 1.0), (1000, 3.0)):
        clock.tick(seconds)
        assert bucket.tokens == tokens


async def test_acquire_waits_just_long_enough_and_refuses_at_once_what_would_take_too_long() -> None:
    clock = Clock()
    bucket = TokenBucket(1, 0.25, timer=clock, sleep=clock.sleep)
    assert [await bucket.acquire(0), await bucket.acquire(3.9)] == [0.0, 4.0]
    assert (clock.slept, bucket.tokens) == ([], 0.0)
    assert await bucket.acquire(10) == 0.0
    assert clock.slept == [4.0]


async def test_callers_that_wait_are_served_one_after_the_other() -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await anyio.lowlevel.checkpoint()

    bucket = TokenBucket(1, 1, timer=Clock(), sleep=sleep)
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(bucket.acquire, 10)
    assert waits == [1.0, 2.0, 3.0]


async def test_a_cancelled_wait_gives_its_token_back() -> None:
    bucket = TokenBucket(1, 1, timer=Clock())
    bucket.try_acquire()
    with anyio.move_on_after(0.01):
        await bucket.acquire(10)
    assert bucket.tokens == 0.0


# ----------------------------------------------------------------------------------------------------- TTL cache


def test_an_entry_is_fresh_until_it_expires_and_then_takes_no_room() -> None:
    clock = Clock()
    cache = TTLCache[str, int](10, 5, timer=clock)
    cache.put("a", 1, size=7)
    cache.put("b", 2, ttl=50)
    clock.tick(4.999)
    assert cache.get("a") == 1
    clock.tick(0.001)
    assert (cache.get("a"), cache.get("b"), cache.currsize) == (None, 2, 0)
    cache.discard("b")
    assert cache.get("b") is None


def test_the_least_recently_used_entry_goes_first() -> None:
    cache = TTLCache[str, int](2, 5, timer=Clock())
    for key in "abac":
        if cache.get(key) is None:
            cache.put(key, ord(key))
    assert [cache.get(key) for key in "abc"] == [97, None, 99]


def test_the_cache_is_bounded_in_bytes_too() -> None:
    cache = TTLCache[str, int](100, 5, max_bytes=10, timer=Clock())
    cache.put("a", 1, size=6)
    cache.put("b", 2, size=6)
    assert (cache.get("a"), cache.get("b"), cache.currsize) == (None, 2, 6)
    cache.put("c", 3, size=11)
    assert (cache.get("c"), cache.currsize) == (None, 6)
    cache.put("b", 4, size=1)
    assert (cache.get("b"), cache.currsize) == (4, 1)
    cache.clear()
    assert (cache.get("b"), cache.currsize) == (None, 0)


# ------------------------------------------------------------------------------------------------- result budget


def test_a_trailer_names_the_arguments_that_continue() -> None:
    assert trailer("lines 1-812 of 2310 shown", offset=812) == "[lines 1-812 of 2310 shown; continue with offset=812]"
    assert trailer("files 1-2 shown", paths=["a b", 'c"']) == r'[files 1-2 shown; continue with paths=["a b", "c\""]]'
    assert trailer("skipped 3 binary files") == "[skipped 3 binary files]"


@pytest.mark.parametrize("max_output", [1, 10, 17, 50, 100, 200, 1000, 0])
@pytest.mark.parametrize("limit", [None, 1, 3, 12])
def test_pages_put_together_are_the_whole_and_none_is_too_long(max_output: int, limit: int | None) -> None:
    items = ["\u4e2d" * (number % 30) + "." for number in range(120)]
    notes = ["skipped 12 binary files"] if max_output > 100 else []
    seen: list[str] = []
    more = True
    while more:
        text = page(items, "items", max_output=max_output, limit=limit, offset=len(seen), notes=lambda: notes)
        assert len(text) <= max_output or max_output < 100  # the least is one item and the trailer
        *lines, last = text.split("\n")
        more = "continue with" in last
        assert last.startswith(f"[items {len(seen) + 1}-") or not more
        seen += lines if more or notes else [*lines, last]
        assert lines or not more
    assert seen == items


def test_a_lazy_page_reads_one_item_more_than_it_shows() -> None:
    numbers = iter(range(100))
    text = page(numbers, "numbers", max_output=0, limit=5)
    assert text.endswith("\n[numbers 1-5 shown; continue with offset=5]")
    assert next(numbers) == 6


def test_an_item_that_is_longer_than_a_page_is_cut_and_says_so() -> None:
    text = page(["x" * 5000, "y"], "items", max_output=1000)
    assert len(text) <= 1000
    assert "more characters]" in text
    assert text.endswith("[items 1-1 of 2 shown; continue with offset=1]")
    assert page(["x" * 500, "y"], "items", max_output=10).startswith("x" * 500 + "\n[")  # a path, say, stays whole


def test_an_empty_page_says_so_and_an_offset_past_the_end_is_an_error() -> None:
    assert page([], "matches", max_output=0, notes=lambda: ["skipped 1 file"]) == "[no matches; skipped 1 file]"
    with pytest.raises(ToolError, match="past the end of the numbers"):
        page([1, 2], "numbers", max_output=0, offset=2)


# --------------------------------------------------------------------------------------------------------- names


RAW_NAMES = [b"plain", b"caf\xe9", b"new\nline", b"\x1b[31mred", b"tab\t\\x41", "schön a\u2028b\u202ec".encode()]


@pytest.mark.parametrize("raw", RAW_NAMES)
def test_any_file_name_is_shown_on_one_line_and_leads_back_to_its_bytes(raw: bytes) -> None:
    shown = printable(os.fsdecode(raw))
    assert shown.isprintable()
    assert os.fsencode(unprintable(shown)) == raw


def test_an_escape_cannot_smuggle_dots_slashes_or_nul() -> None:
    for shown in (r"\x2e\x2e\x2fetc", r"a\x00b", r"\x41", r"\x2f"):
        assert unprintable(shown) == shown


# ------------------------------------------------------------------------------------------------------- sandbox


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An allowed directory with a sibling whose name begins with its name."""
    for name in ("top/dir", "top_evil"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "top" / "a.txt").write_text("inside")
    (tmp_path / "top_evil" / "a.txt").write_text("outside")
    links = {"inner": "dir/../a.txt", "outer": "../top_evil/a.txt", "up": "..", "dangling": "dir/nothing"}
    for name, target in links.items():
        (tmp_path / "top" / name).symlink_to(target)
    return tmp_path / "top"


def read(sandbox: Sandbox, path: str) -> bytes:
    with open(sandbox.reach(sandbox.resolve(path), Directory.open), "rb") as file:
        return file.read()


INSIDE = "a.txt ./a.txt dir/../a.txt inner up/top/a.txt dir//..//a.txt"
OUTSIDE = "/ /etc .. ../top_evil/a.txt ../topx dir/../../top_evil/a.txt outer up up/top_evil/a.txt"
MISSING_OUTSIDE = " /no/such ../no/such ~ ~/x"  # told in the same words: nobody learns what there is outside
LIKE_ANY_OTHER = r"~root/.bashrc \x2e\x2e/top_evil/a.txt %2e%2e/top_evil/a.txt ..."  # they only look like a way out
PATHS = [
    *((path, "inside") for path in INSIDE.split()),
    *(
        (path, f"{path} is outside the allowed directories; list_allowed_")
        for path in (OUTSIDE + MISSING_OUTSIDE).split()
    ),
    *((path, f"not found: {path}") for path in LIKE_ANY_OTHER.split()),
    *((path, "the path is empty, over") for path in ("", "a\0b", "x" * 20_000)),
    *(("fifo", "fifo is not a regular file"), ("dir", "dir is a directory"), ("dangling", "not found: dangling")),
]


@pytest.mark.parametrize(("path", "expected"), PATHS, ids=[repr(path[:40]) for path, _ in PATHS])
def test_only_regular_files_inside_are_opened(root: Path, path: str, expected: str) -> None:
    os.mkfifo(root / "fifo")
    sandbox = Sandbox([root])
    if expected == "inside":
        assert read(sandbox, path) == read(sandbox, str(root / path)) == b"inside"
        return
    with pytest.raises(ToolError) as caught:
        read(sandbox, path)
    assert str(caught.value).startswith(expected)


def test_the_home_directory_may_be_written_as_a_tilde(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root))
    sandbox = Sandbox(["~"])
    assert sandbox.roots[0].path == str(root)
    assert sandbox.resolve("~").path == ""
    (root / "~").mkdir()
    (root / "~" / "a.txt").write_text("a directory with that name")
    assert read(sandbox, "~/a.txt") == b"inside"
    assert read(sandbox, "./~/a.txt") == b"a directory with that name"


@pytest.mark.parametrize("swap", ["the file", "its directory"])
def test_a_symlink_that_comes_after_the_look_is_not_followed(root: Path, swap: str) -> None:
    (root / "dir" / "a.txt").write_text("inside")
    sandbox = Sandbox([root])
    located = sandbox.resolve("dir/a.txt")
    if swap == "the file":
        (root / "dir" / "a.txt").unlink()
        (root / "dir" / "a.txt").symlink_to("../../top_evil/a.txt")
    else:
        (root / "dir").rename(root / "old")
        (root / "dir").symlink_to("../top_evil")
    with pytest.raises(ToolError):
        sandbox.reach(located, Directory.open)


def test_the_first_root_that_has_it_is_meant_and_a_new_name_goes_where_its_directory_is(root: Path) -> None:
    sandbox = Sandbox([root, root.parent / "top_evil"])
    assert read(sandbox, "a.txt") == b"inside"
    (root.parent / "top_evil" / "only").mkdir()
    assert sandbox.resolve("only/new.txt").absolute == str(root.parent / "top_evil" / "only" / "new.txt")
    assert sandbox.resolve("new.txt").absolute == str(root / "new.txt")


def test_two_listings_of_an_allowed_directory_at_a_time_both_see_all_of_it(root: Path) -> None:
    sandbox = Sandbox([root])
    first, second = (sandbox.reach(sandbox.resolve("."), Directory.enter) for _ in range(2))
    assert first.fd is not None
    assert second.fd is not None
    with os.scandir(first.fd) as one, os.scandir(second.fd) as other:
        next(one)
        assert len(list(other)) == 6
        assert len(list(one)) == 5


def test_directories_are_closed_when_nobody_holds_them(root: Path) -> None:
    gc.collect()  # what other tests have left
    before = len(os.listdir("/dev/fd"))
    sandbox = Sandbox([root])
    for _ in range(10):
        sandbox.parent(sandbox.resolve("dir/x"))
        sandbox.reach(sandbox.resolve("dir"), Directory.enter)
    del sandbox
    assert len(os.listdir("/dev/fd")) == before


def test_a_directory_that_was_replaced_is_noticed_and_what_is_none_is_refused(root: Path) -> None:
    sandbox = Sandbox([root])
    sandbox.check()
    root.rename(root.parent / "moved")
    root.mkdir()
    with pytest.raises(OSError, match="another directory"):
        sandbox.check()
    assert read(sandbox, str(root / "a.txt")) == b"inside"  # it was held open
    for path in ("", root / "no-such", root.parent / "moved" / "a.txt"):
        with pytest.raises(ConfigError, match="is not a directory"):
            Sandbox([path])


def test_the_sandbox_works_where_the_platform_has_no_dir_fd(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.HAS_DIR_FD", False)
    sandbox = Sandbox([root])
    assert read(sandbox, "a.txt") == b"inside"
    here = sandbox.reach(sandbox.resolve("."), Directory.enter)
    assert [entry.name for entry in here.scan()][:2] == ["a.txt", "dangling"]
    assert sandbox.reach(sandbox.resolve("dir", follow_last=False), Directory.stat).st_mode & 0o40000
    located = sandbox.resolve("a.txt")
    (root / "a.txt").unlink()
    (root / "a.txt").symlink_to("../top_evil/a.txt")
    with pytest.raises(ToolError, match="symbolic links"):
        sandbox.reach(located, Directory.open)
    (root / "dir").rmdir()
    (root / "dir").symlink_to("../top_evil")
    with pytest.raises(NotADirectoryError):
        here.enter("dir")
