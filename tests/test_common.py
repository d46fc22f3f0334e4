"""The parts that people copy first: bucket, cache, result budget, sandbox."""

import gc
import os
from pathlib import Path

import anyio
import pytest
from conftest import Clock
from mcp.server.mcpserver.exceptions import ToolError

from common import ConfigError, Sandbox, TokenBucket, TTLCache, page, printable, trailer, unprintable

pytestmark = pytest.mark.anyio


# -------------------------------------------------------------------------------------------------- token bucket


def test_a_full_bucket_allows_a_burst_and_then_tells_how_long_to_wait() -> None:
    clock = Clock()
    bucket = TokenBucket(3, 2, timer=clock)
    assert [bucket.try_acquire() for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert bucket.try_acquire() == 0.5  # a refused call takes nothing


def test_tokens_come_back_at_the_refill_rate_and_never_above_the_capacity() -> None:
    clock = Clock()
    bucket = TokenBucket(3, 2, timer=clock)
    for _ in range(3):
        bucket.try_acquire()
    clock.tick(0.5)
    assert bucket.tokens == 1.0
    clock.tick(1000)
    assert bucket.tokens == 3.0


async def test_acquire_waits_just_long_enough() -> None:
    clock = Clock()
    bucket = TokenBucket(1, 0.25, timer=clock, sleep=clock.sleep)
    assert await bucket.acquire(10) == 0.0
    assert await bucket.acquire(10) == 0.0
    assert clock.slept == [4.0]


async def test_acquire_refuses_at_once_what_would_take_too_long() -> None:
    clock = Clock()
    bucket = TokenBucket(1, 0.25, timer=clock, sleep=clock.sleep)
    await bucket.acquire(0)
    assert await bucket.acquire(3.9) == 4.0
    assert clock.slept == []
    assert bucket.tokens == 0.0


async def test_callers_that_wait_are_served_one_after_the_other() -> None:
    clock = Clock()
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await anyio.lowlevel.checkpoint()

    bucket = TokenBucket(1, 1, timer=clock, sleep=sleep)
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(bucket.acquire, 10)
    assert waits == [1.0, 2.0, 3.0]


async def test_a_cancelled_wait_gives_its_token_back() -> None:
    clock = Clock()
    bucket = TokenBucket(1, 1, timer=clock)
    bucket.try_acquire()
    with anyio.move_on_after(0.01):
        await bucket.acquire(10)
    assert bucket.tokens == 0.0


@pytest.mark.parametrize(("capacity", "rate"), [(0, 1), (-1, 1), (1, 0), (1, -1)])
def test_a_bucket_that_could_never_fill_is_refused(capacity: float, rate: float) -> None:
    with pytest.raises(ValueError, match="capacity"):
        TokenBucket(capacity, rate)


# ----------------------------------------------------------------------------------------------------- TTL cache


def test_an_entry_is_fresh_until_the_instant_it_expires() -> None:
    clock = Clock()
    cache = TTLCache[str, int](10, 5, timer=clock)
    cache.put("a", 1)
    clock.tick(4.999)
    assert cache.get("a") == 1
    clock.tick(0.001)
    assert cache.get("a") is None


def test_an_expired_entry_can_still_be_peeked_at_until_it_is_removed() -> None:
    clock = Clock()
    cache = TTLCache[str, int](10, 5, timer=clock)
    cache.put("a", 1, size=7)
    cache.put("b", 2, ttl=50)
    clock.tick(6)
    entry = cache.peek("a")
    assert entry is not None
    assert (entry.value, entry.size, entry.stored, entry.expires) == (1, 7, 1000.0, 1005.0)
    cache.discard("a")
    assert cache.peek("a") is None
    assert cache.get("b") == 2
    assert cache.currsize == 0


def test_the_least_recently_used_entry_goes_first() -> None:
    cache = TTLCache[str, int](2, 5, timer=Clock())
    cache.put("a", 1)
    cache.put("b", 2)
    cache.get("a")
    cache.put("c", 3)
    assert [cache.get(key) for key in "abc"] == [1, None, 3]


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


@pytest.mark.parametrize("max_output", [1, 10, 17, 50, 100, 0])
@pytest.mark.parametrize("limit", [None, 1, 3, 12])
def test_pages_put_together_are_the_whole_exactly_once(max_output: int, limit: int | None) -> None:
    items = [f"item {number}" for number in range(12)]
    seen: list[str] = []
    offset = 0
    while True:
        lines = page(items, "items", max_output=max_output, limit=limit, offset=offset).split("\n")
        if "continue with" not in lines[-1]:
            assert seen + lines == items
            return
        assert lines[-1].startswith(f"[items {offset + 1}-")
        seen += lines[:-1]
        assert len(seen) > offset
        offset = len(seen)


def test_a_lazy_page_reads_one_item_more_than_it_shows() -> None:
    numbers = iter(range(100))
    text = page(numbers, "numbers", max_output=0, limit=5)
    assert text.split("\n")[-1] == "[numbers 1-5 shown; continue with offset=5]"
    assert next(numbers) == 6


@pytest.mark.parametrize("max_output", [100, 200, 1000])
def test_a_page_with_its_trailer_is_no_longer_than_it_may_be(max_output: int) -> None:
    items = ["\u4e2d" * (number % 30) for number in range(500)]
    notes = ["skipped 12 binary files"] if max_output > 100 else []
    offset = 0
    while True:
        text = page(items, "items", max_output=max_output, offset=offset, notes=lambda: notes)
        *lines, last = text.split("\n")
        assert len(text) <= max_output
        assert lines == items[offset : offset + len(lines)]
        if "continue with" not in last:
            return
        offset = int(last.rpartition("=")[2].rstrip("]"))


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


@pytest.mark.parametrize(
    "raw",
    [b"plain", "schön".encode(), b"caf\xe9", b"new\nline", b"\x1b[31mred", "a\u2028b\u202ec".encode(), b"tab\t\\x41"],
)
def test_any_file_name_is_shown_on_one_line_and_leads_back_to_its_bytes(raw: bytes) -> None:
    name = os.fsdecode(raw)
    shown = printable(name)
    assert shown.isprintable()
    assert os.fsencode(unprintable(shown)) == raw


@pytest.mark.parametrize("shown", [r"\x2e\x2e\x2fetc", r"a\x00b", r"\x41", r"\x2f"])
def test_an_escape_cannot_smuggle_dots_slashes_or_nul(shown: str) -> None:
    assert unprintable(shown) == shown


# ------------------------------------------------------------------------------------------------------- sandbox


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An allowed directory with a sibling whose name begins with its name."""
    for name in ("root/dir", "root_evil"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "root" / "a.txt").write_text("inside")
    (tmp_path / "root_evil" / "a.txt").write_text("outside")
    (tmp_path / "root" / "inner").symlink_to("dir/../a.txt")
    (tmp_path / "root" / "outer").symlink_to("../root_evil/a.txt")
    (tmp_path / "root" / "up").symlink_to("..")
    (tmp_path / "root" / "dangling").symlink_to("dir/nothing")
    return tmp_path / "root"


def read(sandbox: Sandbox, path: str) -> bytes:
    fd = sandbox.open(sandbox.resolve(path))
    try:
        return os.read(fd, 100)
    finally:
        os.close(fd)


OUTSIDE = [
    "..",
    "../root_evil/a.txt",
    "../rootx",
    "dir/../../root_evil/a.txt",
    "outer",
    "up",
    "up/root_evil/a.txt",
    "/",
    "/etc",
]
MISSING_OUTSIDE = ["/no/such", "../no/such", "~", "~/x"]
NAMES_LIKE_ANY_OTHER = ["~root/.bashrc", r"\x2e\x2e/root_evil/a.txt", "%2e%2e/root_evil/a.txt", "..."]


@pytest.mark.parametrize("path", [*OUTSIDE, *MISSING_OUTSIDE])
def test_what_leads_out_is_refused_in_the_same_words_whether_it_exists_or_not(root: Path, path: str) -> None:
    with pytest.raises(ToolError) as caught:
        Sandbox([root]).resolve(path)
    assert str(caught.value) == f"{path} is outside the allowed directories; list_allowed_directories names them"


@pytest.mark.parametrize("path", NAMES_LIKE_ANY_OTHER)
def test_what_only_looks_as_if_it_led_out_is_not_found_inside(root: Path, path: str) -> None:
    sandbox = Sandbox([root])
    with pytest.raises(ToolError, match="not found"):
        sandbox.open(sandbox.resolve(path))


@pytest.mark.parametrize("path", ["a.txt", "./a.txt", "dir/../a.txt", "inner", "up/root/a.txt", "dir//..//a.txt"])
def test_what_stays_inside_is_opened(root: Path, path: str) -> None:
    assert read(Sandbox([root]), path) == b"inside"
    assert read(Sandbox([root]), str(root / path)) == b"inside"


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 20_000])
def test_what_is_no_path_is_refused(root: Path, path: str) -> None:
    with pytest.raises(ToolError, match="the path is empty, over"):
        Sandbox([root]).resolve(path)


def test_the_home_directory_may_be_written_as_a_tilde(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root))
    sandbox = Sandbox(["~"])
    assert sandbox.roots[0].path == str(root)
    assert read(sandbox, "~/a.txt") == b"inside"
    assert sandbox.resolve("~").parts == ()
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
        (root / "dir" / "a.txt").symlink_to("../../root_evil/a.txt")
    else:
        (root / "dir").rename(root / "old")
        (root / "dir").symlink_to("../root_evil")
    with pytest.raises(ToolError):
        sandbox.open(located)


def test_only_regular_files_are_opened(root: Path) -> None:
    os.mkfifo(root / "fifo")
    sandbox = Sandbox([root])
    for path, words in {"fifo": "not a regular file", "dir": "is a directory", "dangling": "not found"}.items():
        with pytest.raises(ToolError, match=words):
            sandbox.open(sandbox.resolve(path))


def test_the_first_root_that_has_it_is_meant_and_a_new_name_goes_where_its_directory_is(root: Path) -> None:
    sandbox = Sandbox([root, root.parent / "root_evil"])
    assert read(sandbox, "a.txt") == b"inside"
    (root.parent / "root_evil" / "only").mkdir()
    assert sandbox.resolve("only/new.txt").absolute == str(root.parent / "root_evil" / "only" / "new.txt")
    assert sandbox.resolve("new.txt").absolute == str(root / "new.txt")


def test_two_listings_of_an_allowed_directory_at_a_time_both_see_all_of_it(root: Path) -> None:
    sandbox = Sandbox([root])
    first, second = (sandbox.directory(sandbox.resolve(".")) for _ in range(2))
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
        sandbox.directory(sandbox.resolve("dir"))
    del sandbox
    assert len(os.listdir("/dev/fd")) == before


def test_a_directory_that_was_replaced_is_noticed(root: Path) -> None:
    sandbox = Sandbox([root])
    sandbox.check()
    root.rename(root.parent / "moved")
    root.mkdir()
    with pytest.raises(OSError, match="another directory"):
        sandbox.check()
    assert read(sandbox, str(root.parent / "root" / "a.txt")) == b"inside"  # it was held open


@pytest.mark.parametrize("name", ["", "no-such", "a.txt"])
def test_what_is_no_directory_cannot_be_served(root: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is not a directory"):
        Sandbox([root / name if name else ""])


def test_the_sandbox_works_where_the_platform_has_no_dir_fd(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.HAS_DIR_FD", False)
    sandbox = Sandbox([root])
    assert read(sandbox, "a.txt") == b"inside"
    assert [entry.name for entry in sandbox.directory(sandbox.resolve(".")).scan()][:2] == ["a.txt", "dangling"]
    assert sandbox.stat(sandbox.resolve("dir", follow_last=False)).st_mode & 0o40000
    located = sandbox.resolve("a.txt")
    (root / "a.txt").unlink()
    (root / "a.txt").symlink_to("../root_evil/a.txt")
    with pytest.raises(ToolError, match="replaced"):
        sandbox.open(located)
    (root / "dir").rmdir()
    (root / "dir").symlink_to("../root_evil")
    with pytest.raises(NotADirectoryError):
        sandbox.directory(sandbox.resolve(".")).enter("dir")
