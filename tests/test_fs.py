"""The file server's tools, through the in-memory client: attacks, and what must still work."""

import base64
import json
import os
import re
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from common import ConfigError, Options
from conftest import ok, refused
from mcp import Client
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import AudioContent, BlobResourceContents, EmbeddedResource, ImageContent

from fs_server import Files, Walk, Work, build_server

pytestmark = pytest.mark.anyio

ROOT = "root"  # the allowed directory
PROC_ROOT = "self/root"  # below /proc: a link to the whole file system

SECRET = "the secret outside"
NO_LIMIT = Options(max_output=0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An allowed directory with a secret next to it."""
    root = tmp_path / ROOT
    (root / "sub" / "deeper").mkdir(parents=True)
    (root / "note.txt").write_text("one\ntwo\nthree\n")
    (root / "sub" / "code.py").write_text("import os\nprint('hello')\n")
    (root / "sub" / "deeper" / "data.json").write_text('{"a": 1}')
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "root_evil").mkdir()
    (tmp_path / "root_evil" / "secret.txt").write_text(SECRET)
    return root


def client_for(*roots: Path, **keywords: Any) -> Client:
    return Client(build_server(roots, **keywords))


async def read_all(client: Client, tool: str, **arguments: Any) -> list[str]:
    """The pages of a result, following the arguments that each trailer names to the end."""
    pages: list[str] = []
    while True:
        text = await ok(client, tool, **arguments)
        body, _, last = text.rpartition("\n") if "\n" in text else ("", "", text)
        found = re.fullmatch(r"\[.*; continue with (.*)\]", last)
        if not found:
            return [*pages, text]
        pages.append(body + "\n")
        resume = dict(re.findall(r"(\w+)=(\[.*?\]|\S+)", found[1]))
        for name in ("head", "tail", "offset", "column"):
            arguments.pop(name, None)
        arguments |= {name: json.loads(value) for name, value in resume.items()}
        assert len(pages) < 2000


# ------------------------------------------------------------------------------------------------------ boundary

ESCAPES = {
    "dot dot": "../secret.txt",
    "dot dot inside": "sub/../../secret.txt",
    "dot dot through a missing directory": "missing/../../secret.txt",
    "dot dot through a file": "note.txt/../../secret.txt",
    "absolute": "{outside}/secret.txt",
    "absolute with dots": "{root}/../secret.txt",
    "sibling prefix": "{root}_evil/secret.txt",
    "sibling by dots": "../root_evil/secret.txt",
    "system file": "/etc/passwd",
    "the root of everything": "/",
    "parent": "..",
    "double slash": "//etc/passwd",
    "link to a file": "link_file",
    "link to a directory": "link_dir/secret.txt",
    "link with an absolute target": "link_absolute",
    "link to a link": "link_chain",
    "link to a missing file outside": "link_missing",
    "proc": "/proc/self/environ",
    "proc root": f"/proc/{PROC_ROOT}/etc/passwd",
}
NAMES_ONLY = {  # these are just names, and there is no such file
    "percent": "%2e%2e%2fsecret.txt",
    "double percent": "%252e%252e/secret.txt",
    "full-width dots": "\uff0e\uff0e/secret.txt",
    "division slash": "..\u2215secret.txt",
    "escaped dots": "\\x2e\\x2e/secret.txt",
    "backslash": "..\\secret.txt",
    "tilde": "~/secret.txt",
    "file url": "file:///etc/passwd",
    "overlong": "..%c0%afsecret.txt",
}
TOOLS: dict[str, dict[str, Any]] = {
    "read_file": {},
    "read_media_file": {},
    "list_directory": {},
    "directory_tree": {},
    "search_files": {"pattern": "*"},
    "search_text": {"pattern": "secret"},
}


@pytest.fixture
def hostile(root: Path) -> Path:
    (root / "link_file").symlink_to("../secret.txt")
    (root / "link_dir").symlink_to("..")
    (root / "link_absolute").symlink_to(root.parent / "secret.txt")
    (root / "link_chain").symlink_to("link_file")
    (root / "link_missing").symlink_to("../nothing-there")
    return root


@pytest.mark.parametrize("path", ESCAPES.values(), ids=ESCAPES.keys())
@pytest.mark.parametrize("tool", TOOLS)
async def test_no_path_leads_outside(hostile: Path, tool: str, path: str) -> None:
    async with client_for(hostile) as client:
        message = await refused(client, tool, path=path.format(root=hostile, outside=hostile.parent), **TOOLS[tool])
    assert "is outside the allowed directories; list_allowed_directories names them" in message
    assert SECRET not in message


@pytest.mark.parametrize("path", NAMES_ONLY.values(), ids=NAMES_ONLY.keys())
@pytest.mark.parametrize("tool", TOOLS)
async def test_encodings_and_look_alikes_are_names_and_nothing_else(root: Path, tool: str, path: str) -> None:
    async with client_for(root) as client:
        assert "not found" in await refused(client, tool, path=path, **TOOLS[tool])
        created = root / path
        created.parent.mkdir(parents=True, exist_ok=True)
        created.write_text("fine")
        assert await ok(client, "read_file", path=path) == "fine"


@pytest.mark.parametrize("path", ["", "\0", "note.txt\0.png", "../\0"])
async def test_empty_paths_and_nul_bytes_are_refused(root: Path, path: str) -> None:
    async with client_for(root) as client:
        assert "NUL" in await refused(client, "read_file", path=path)


async def test_an_error_does_not_tell_whether_something_exists_outside(hostile: Path) -> None:
    async with client_for(hostile) as client:
        there = await refused(client, "read_file", path="../secret.txt")
        missing = await refused(client, "read_file", path="../nothing.txt")
        assert there.replace("secret", "nothing") == missing
        info = await ok(client, "get_file_info", path="link_file")
        gone = await ok(client, "get_file_info", path="link_missing")
    assert json.loads(info)["type"] == json.loads(gone)["type"] == "symlink"
    assert json.loads(info)["link_target"] == json.loads(gone)["link_target"] == "(outside the allowed directories)"


async def test_info_through_a_link_outside_is_refused(hostile: Path) -> None:
    async with client_for(hostile) as client:
        assert "outside" in await refused(client, "get_file_info", path="link_dir/secret.txt")
        assert "outside" in await refused(client, "get_file_info", path="..")
        assert "outside" in await refused(client, "get_file_info", path="link_dir/..")


@pytest.mark.parametrize("pattern", ["../*", "/etc/*", "sub/../../*", "**/../../*", "~/*", "..", "a\0b"])
@pytest.mark.parametrize("tool", ["search_files", "list_directory", "search_text"])
async def test_a_glob_that_leads_out_is_refused(root: Path, tool: str, pattern: str) -> None:
    arguments = {"pattern": "secret", "glob": pattern} if tool == "search_text" else {"pattern": pattern}
    async with client_for(root) as client:
        assert "relative to path" in await refused(client, tool, path=".", **arguments)


async def test_walks_do_not_follow_links_out_or_in(hostile: Path) -> None:
    (hostile / "inner").symlink_to("sub")
    async with client_for(hostile) as client:
        assert "secret.txt" not in await ok(client, "search_files", path=".", pattern="**")
        assert SECRET not in await ok(client, "search_text", path=".", pattern="secret")
        tree = await ok(client, "directory_tree", path=".")
        assert tree.count("code.py") == 1
        assert " link_dir [symlink]" in tree


LINKS_INSIDE = {
    "to a file": ("alias.txt", "note.txt", "alias.txt"),
    "to a directory": ("alias", "sub", "alias/../note.txt"),
    "up and down": ("sub/alias.txt", "../note.txt", "sub/alias.txt"),
    "through the outside and back": ("alias.txt", f"../{ROOT}/note.txt", "alias.txt"),
}


@pytest.mark.parametrize(("link", "target", "path"), LINKS_INSIDE.values(), ids=LINKS_INSIDE.keys())
async def test_links_that_stay_inside_work(root: Path, link: str, target: str, path: str) -> None:
    (root / link).symlink_to(target)
    async with client_for(root) as client:
        assert await ok(client, "read_file", path=path) == "one\ntwo\nthree\n"
        assert await ok(client, "read_file", path=str(root / path)) == "one\ntwo\nthree\n"


async def test_the_allowed_directory_may_itself_be_reached_by_a_link(root: Path) -> None:
    (root.parent / "alias").symlink_to(root)
    async with client_for(root.parent / "alias") as client:
        assert await ok(client, "read_file", path="note.txt") == "one\ntwo\nthree\n"
        assert await ok(client, "read_file", path=str(root.parent / "alias" / "note.txt")) == "one\ntwo\nthree\n"
        assert json.loads(await ok(client, "list_allowed_directories"))["directories"] == [str(root)]


async def test_relative_paths_are_looked_up_in_each_directory_in_turn(root: Path) -> None:
    second = root.parent / "second"
    second.mkdir()
    (second / "note.txt").write_text("second")
    (second / "only.txt").write_text("only here")
    async with client_for(root, second) as client:
        assert await ok(client, "read_file", path="note.txt", head=1) == "one\n"
        assert await ok(client, "read_file", path="only.txt") == "only here"
        assert await ok(client, "read_file", path="../second/note.txt") == "second"
        assert "outside" in await refused(client, "read_file", path="../secret.txt")


async def test_an_allowed_directory_stays_the_same_when_its_name_is_given_to_another(root: Path) -> None:
    async with client_for(root) as client:
        root.rename(root.parent / "moved")
        root.symlink_to(root.parent / "root_evil")
        message = await refused(client, "read_file", path="secret.txt")
        assert SECRET not in message


# -------------------------------------------------------------------------------------------- what is never opened


@pytest.fixture
def special(root: Path) -> Iterator[Path]:
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(root)  # the path of a socket must be short
        try:
            server.bind("socket")
        finally:
            os.chdir(here)
        yield root


@pytest.mark.parametrize("name", ["fifo", "socket"])
@pytest.mark.parametrize("tool", ["read_file", "read_media_file"])
async def test_special_files_are_refused_and_never_wait(special: Path, tool: str, name: str) -> None:
    async with client_for(special) as client:
        assert "never opened" in await refused(client, tool, path=name)
        info = json.loads(await ok(client, "get_file_info", path=name))
        assert info["type"] == name


async def test_walks_pass_special_files_by(special: Path) -> None:
    async with client_for(special) as client:
        assert "note.txt:2:two" in await ok(client, "search_text", path=".", pattern="two")
        listing = await ok(client, "list_directory", path=".")
        assert '"path":"./fifo","type":"fifo"' in listing
        assert "error" in await ok(client, "read_multiple_files", paths=["fifo", "socket"])


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev")
async def test_devices_are_refused() -> None:
    async with client_for(Path("/dev")) as client:
        for device in ("zero", "null", "tty"):
            assert "never opened" in await refused(client, "read_file", path=device)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
async def test_files_that_claim_to_be_empty_are_read() -> None:
    async with client_for(Path("/proc")) as client:
        assert "Threads:" in await ok(client, "read_file", path="self/status")
        assert (await ok(client, "read_file", path="self/status", head=1)).startswith("Name:")
        assert "outside" in await refused(client, "read_file", path=f"{PROC_ROOT}/etc/passwd")
        assert "outside" in await refused(client, "read_file", path="self/cwd/pyproject.toml")


@pytest.mark.skipif(not Path("/proc/kallsyms").exists(), reason="needs /proc")
async def test_files_that_give_a_page_at_a_time_are_read_to_their_end() -> None:
    whole = Path("/proc/kallsyms").read_text()
    async with client_for(Path("/proc"), options=NO_LIMIT) as client:
        assert await ok(client, "read_file", path="kallsyms", max_size=100_000_000) == whole
        last = whole.splitlines()[-1]
        assert await ok(client, "read_file", path="kallsyms", max_size=100_000_000, tail=1) == f"{last}\n"
        assert last in await ok(client, "search_text", path="kallsyms", pattern=last.split()[2], max_matches=10_000)


@pytest.mark.skipif(not Path("/proc/kmsg").exists(), reason="needs /proc")
async def test_a_file_that_has_nothing_to_say_just_now_does_not_wait() -> None:
    async with client_for(Path("/proc")) as client:
        result = await client.call_tool("read_media_file", {"path": "kmsg"})
    assert "failed inside the server" not in str(result.content[0])


@pytest.mark.skipif(not Path("/sys/kernel/mm").exists(), reason="needs /sys")
async def test_files_that_are_shorter_than_they_claim_are_whole() -> None:
    file = next(path for path in Path("/sys/kernel").rglob("*") if path.is_file() and path.stat().st_size == 4096)
    async with client_for(Path("/sys")) as client:
        assert await ok(client, "read_file", path=str(file)) == file.read_text()


async def test_symlink_loops_are_errors(root: Path) -> None:
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    (root / "self").symlink_to("self")
    async with client_for(root) as client:
        assert "not a directory" in await refused(client, "read_file", path="self/x")
        for path in ("a", "b", "self"):
            assert "loop" in await refused(client, "read_file", path=path)
        assert json.loads(await ok(client, "get_file_info", path="a"))["type"] == "symlink"


SECRETS = (
    ".env .env.local prod.env .envrc id_rsa id_ed25519 server.pem tls.key .netrc .pgpass .npmrc .git-credentials"
    " .ssh/config .aws/credentials .kube/config .docker/config.json .ENV ID_RSA credentials.json a/b/.ssh/x"
    " terraform.tfstate vault.kdbx"
).split()
NOT_SECRETS = ".env.example id_rsa.pub environment.py keys.txt pem.md my.key.txt ssh/config config.json".split()


@pytest.mark.parametrize("name", SECRETS)
async def test_secret_files_are_listed_but_not_opened(root: Path, name: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("hunter2 needle")
    (root / "innocent.txt").symlink_to(name)
    async with client_for(root) as client:
        for path in (name, "innocent.txt", str(root / name)):
            for tool in ("read_file", "read_media_file"):
                assert "--allow-secrets" in await refused(client, tool, path=path)
        assert "hunter2" not in await ok(client, "read_multiple_files", paths=[name, "note.txt"])
        found = await ok(client, "search_text", path=".", pattern="needle")
        assert found == "[no matches; skipped 1 secret files]"
        assert name in await ok(client, "search_files", path=".", pattern=f"**/{Path(name).name}")
        await ok(client, "get_file_info", path=name)
    async with client_for(root, allow_secrets=True) as client:
        assert await ok(client, "read_file", path=name) == "hunter2 needle"


@pytest.mark.parametrize("name", NOT_SECRETS)
async def test_other_files_are_opened(root: Path, name: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("plain")
    async with client_for(root) as client:
        assert await ok(client, "read_file", path=name) == "plain"


async def test_deny_adds_more_and_stays_with_allow_secrets(root: Path) -> None:
    async with client_for(root, deny=["*.json", "sub/code*"], allow_secrets=True) as client:
        assert "--deny" in await refused(client, "read_file", path="sub/deeper/data.json")
        assert "--deny" in await refused(client, "read_file", path="sub/code.py")
        assert await ok(client, "read_file", path="note.txt")


DENIED = {
    "a name": ("private", "private/a.txt"),
    "a name with a slash": ("private/", "private/deeper/b.txt"),
    "a name at any depth": ("deeper", "private/deeper/b.txt"),
    "a path": ("private/deeper", "private/deeper/b.txt"),
    "another case": ("PRIVATE", "private/a.txt"),
    "a glob": ("priv*", "private/a.txt"),
}


@pytest.mark.parametrize(("deny", "path"), DENIED.values(), ids=DENIED.keys())
async def test_what_is_below_a_denied_directory_is_denied(root: Path, deny: str, path: str) -> None:
    (root / "private" / "deeper").mkdir(parents=True)
    (root / "private" / "a.txt").write_text("needle a")
    (root / "private" / "deeper" / "b.txt").write_text("needle b")
    (root / "Note.txt").write_text("needle")
    async with client_for(root, deny=[deny]) as client:
        assert "--deny" in await refused(client, "read_file", path=path)
        found = await ok(client, "search_text", path=".", pattern="needle")
        assert path not in found
        assert "secret files" in found
        assert await ok(client, "read_file", path="Note.txt") == "needle"


# ------------------------------------------------------------------------------------------------------- reading

TEXTS = {
    "plain": b"one\ntwo\nthree\n",
    "no final newline": b"one\ntwo\nthree",
    "crlf": b"one\r\ntwo\r\nthree\r\n",
    "cr in the middle": b"one\rtwo\nthree",
    "only newlines": b"\n\n\n\n",
    "one newline": b"\n",
    "bom": b"\xef\xbb\xbfone\ntwo\n",
    "umlauts": "käse\nöl\n日本語 text\n🎉🎉🎉🎉🎉🎉🎉🎉\nend".encode(),
    "line separators": "a\u2028b\x0bc\x85d\ne\x1cf\n".encode(),
    "long lines": b"x" * 300 + b"\n" + b"y" * 7 + b"\n" + "é".encode() * 200,
    "one long line": ("0123456789" * 50).encode(),
    "long emoji": ("🎉" * 130).encode(),
    "like a trailer": b"[lines 1-2 of 3 shown]\nx\n[lines 1-2 of 3 shown]",
}


@pytest.mark.parametrize("data", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("max_output", [1, 7, 40, 1000, 0])
async def test_following_the_trailers_gives_the_whole_text_exactly_once(
    root: Path, data: bytes, max_output: int
) -> None:
    (root / "text").write_bytes(data)
    whole = data.decode()
    count = whole.count("\n") + (not whole.endswith("\n"))
    async with client_for(root, options=Options(max_output=max_output)) as client:
        for start in ({}, {"head": 10_000}, {"tail": 10_000}, {"head": count}, {"tail": count}):
            pages = await read_all(client, "read_file", path="text", **start)
            assert "".join(pages).replace("\n", "") == whole.replace("\n", "")
            assert sum(page.count("\n") for page in pages) >= whole.count("\n")
            if max_output >= 1000 or not max_output:
                assert pages == [whole]


SLICES: dict[str, tuple[dict[str, int], str]] = {
    "head": ({"head": 2}, "l0\nl1\n"),
    "head past the end": ({"head": 99}, "".join(f"l{n}\n" for n in range(10))),
    "offset": ({"offset": 8}, "l8\nl9\n"),
    "offset and head": ({"offset": 3, "head": 2}, "l3\nl4\n"),
    "tail": ({"tail": 2}, "l8\nl9\n"),
    "tail past the start": ({"tail": 99}, "".join(f"l{n}\n" for n in range(10))),
    "column": ({"offset": 9, "column": 1}, "9\n"),
}


@pytest.mark.parametrize(("wanted", "expected"), SLICES.values(), ids=SLICES.keys())
@pytest.mark.parametrize("final", [True, False])
async def test_slices(root: Path, wanted: dict[str, int], expected: str, final: bool) -> None:
    text = "".join(f"l{n}\n" for n in range(10))
    (root / "lines").write_text(text if final else text[:-1])
    expected = expected if final or not expected.endswith("9\n") else expected[:-1]
    async with client_for(root) as client:
        assert await ok(client, "read_file", path="lines", **wanted) == expected


async def test_the_trailer_says_which_lines_of_how_many_were_shown(root: Path) -> None:
    (root / "log").write_text("".join(f"line {n}\n" for n in range(1, 101)))
    async with client_for(root, options=Options(max_output=100)) as client:
        text = await ok(client, "read_file", path="log")
        assert text.endswith("\n[lines 1-13 of 100 shown; continue with offset=13]")
        text = await ok(client, "read_file", path="log", offset=13, head=50)
        assert text.endswith("\n[lines 14-25 of 100 shown; continue with offset=25 head=38]")
        text = await ok(client, "read_file", path="log", tail=50)
        assert text.endswith("\n[lines 1-12 of the last 50 shown; continue with tail=38]")


async def test_an_empty_file_says_so(root: Path) -> None:
    (root / "empty").touch()
    async with client_for(root) as client:
        assert await ok(client, "read_file", path="empty") == "[the file is empty]"


BAD_READS: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "latin-1": (b"caf\xe9\n", {}, "not valid utf-8 (byte 0xe9 at position 3); pass its encoding"),
    "cut at the end": ("café".encode()[:-1], {}, "not valid utf-8"),
    "bad byte after pages": (b"x\n" * 100_000 + b"\xff", {"tail": 1}, "at position 200000"),
    "utf-16": ("text".encode("utf-16"), {}, 'pass encoding="utf-16"'),
    "binary": (b"\x89PNG\0\0\0", {}, "read_media_file"),
    "binary late": (b"x\n" * 10_000 + b"\0", {"tail": 1}, "binary"),
    "unknown encoding": (b"x", {"encoding": "utf-9"}, "unknown text encoding"),
    "no text encoding": (b"x", {"encoding": "rot13"}, "unknown text encoding"),
    "hex": (b"x", {"encoding": "hex"}, "unknown text encoding"),
    "slow encoding": (b"x", {"encoding": "punycode"}, "unknown text encoding"),
    "nul encoding": (b"x", {"encoding": "utf-8\0"}, "unknown text encoding"),
    "not ascii": ("é".encode(), {"encoding": "ascii"}, "not valid ascii"),
    "odd utf-16": (b"\xff\xfea", {"encoding": "utf-16"}, "not valid utf-16"),
    "too large": (b"x" * 101, {"max_size": 100}, "read a part with head, tail or offset, or raise max_size"),
    "offset past the end": (b"a\nb\n", {"offset": 2}, "which has 2 lines"),
    "column past the end": (b"abc", {"column": 4}, "column"),
    "tail and head": (b"x", {"tail": 1, "head": 1}, "cannot be combined"),
    "tail and offset": (b"x", {"tail": 1, "offset": 1}, "cannot be combined"),
    "negative": (b"x", {"head": -1}, "greater than or equal to 0"),
    "text for a number": (b"x", {"head": "3"}, "valid integer"),
}


@pytest.mark.parametrize(("data", "arguments", "message"), BAD_READS.values(), ids=BAD_READS.keys())
async def test_what_cannot_be_read_is_an_error_that_names_a_way_out(
    root: Path, data: bytes, arguments: dict[str, Any], message: str
) -> None:
    (root / "file").write_bytes(data)
    async with client_for(root) as client:
        assert message in await refused(client, "read_file", path="file", **arguments)


ENCODED = {
    "latin-1": "café",
    "cp1252": "“quotes” – dash",
    "utf-16": "käse\nöl\n",
    "utf-16-le": "a\nb\nc\n",
    "utf-32": "🎉\n",
    "utf-8-sig": "bom\n",
    "shift_jis": "日本語\nテキスト\n",
    "gb18030": "中文\n",
    "utf-7": "日本語\n",
    "iso2022_jp": "日本語\nテキスト\n",
}


@pytest.mark.parametrize("encoding", ENCODED)
async def test_other_encodings_are_read_when_they_are_named(root: Path, encoding: str) -> None:
    (root / "file").write_bytes(ENCODED[encoding].encode(encoding))
    async with client_for(root) as client:
        assert await ok(client, "read_file", path="file", encoding=encoding) == ENCODED[encoding]


@pytest.mark.parametrize("encoding", [*ENCODED, "cp037"])
async def test_a_long_line_in_any_encoding_is_continued_without_a_gap(root: Path, encoding: str) -> None:
    text = ENCODED.get(encoding, "line\n").replace("\n", "") * 100  # no space: at one, stateful encodings start anew
    (root / "file").write_bytes(text.encode(encoding))
    async with client_for(root, options=Options(max_output=70)) as client:
        pages = await read_all(client, "read_file", path="file", encoding=encoding)
    assert len(pages) > 2
    assert "".join(page.removesuffix("\n") for page in pages) == text


async def test_any_byte_can_be_seen_as_latin_1(root: Path) -> None:
    (root / "file").write_bytes(bytes(range(256)))
    async with client_for(root) as client:
        assert await ok(client, "read_file", path="file", encoding="latin-1") == bytes(range(256)).decode("latin-1")


WRONG_KIND = {
    "a directory": ("read_file", "sub", "is a directory"),
    "the root": ("read_file", ".", "is a directory"),
    "missing": ("read_file", "missing", "not found"),
    "below a file": ("read_file", "note.txt/x", "not a directory"),
    "a file as a directory": ("list_directory", "note.txt", "not a directory"),
    "a missing directory": ("directory_tree", "missing", "not found"),
    "a name too long": ("read_file", "x" * 300, "too long"),
    "missing for info": ("get_file_info", "missing", "not found"),
    "missing for search": ("search_text", "missing", "not found"),
}


@pytest.mark.parametrize(("tool", "path", "message"), WRONG_KIND.values(), ids=WRONG_KIND.keys())
async def test_the_wrong_kind_of_path_is_a_clear_error(root: Path, tool: str, path: str, message: str) -> None:
    async with client_for(root) as client:
        assert message in await refused(client, tool, path=path, **TOOLS.get(tool, {}))


async def test_several_files_come_in_one_call_with_failures_in_place(root: Path) -> None:
    (root / "empty").touch()
    async with client_for(root) as client:
        text = await ok(
            client, "read_multiple_files", paths=["note.txt", "missing", "../secret.txt", "empty", "sub/code.py"]
        )
    assert text.startswith("==> note.txt <==\none\ntwo\nthree\n==> missing <==\n[error: not found: missing")
    assert "==> ../secret.txt <==\n[error: ../secret.txt is outside" in text
    assert "==> empty <==\n[the file is empty]\n" in text
    assert text.endswith("==> sub/code.py <==\nimport os\nprint('hello')")


async def test_several_files_share_one_budget_and_the_rest_is_named(root: Path) -> None:
    names = [f"f{n}" for n in range(5)]
    for name in names:
        (root / name).write_text("".join(f"{name} line {n}\n" for n in range(20)))
    seen: list[str] = []
    async with client_for(root, options=Options(max_output=400)) as client:
        arguments: dict[str, Any] = {"paths": names}
        while True:
            text = await ok(client, "read_multiple_files", **arguments)
            for path, resume in re.findall(r'read_file has the rest; continue with path="(\w+)" (\S+)\]', text):
                name, value = resume.split("=")
                seen += re.findall(
                    r"^f\d line \d+$", await ok(client, "read_file", path=path, **{name: int(value)}), re.M
                )
            seen += re.findall(r"^f\d line \d+$", text, re.MULTILINE)
            rest = re.search(r"; continue with paths=(\[.*\])\]$", text)
            if not rest:
                break
            arguments = {"paths": json.loads(rest[1])}
    assert sorted(seen) == sorted(f"{name} line {n}" for name in names for n in range(20))


@pytest.mark.parametrize("letter", ["x", "x/", "\x01", "\U000e0001"], ids=["name", "path", "control", "invisible"])
async def test_long_paths_do_not_flood_a_result(root: Path, letter: str) -> None:
    path = (letter * 16_000)[:16_000]
    async with client_for(root) as client:
        text = await ok(client, "read_multiple_files", paths=[path] * 100)
        assert len(text) < 90_000
        assert len(await refused(client, "read_file", path=path)) < 17_000
        assert len(await refused(client, "read_file", path=f"../{path}")) < 17_000
    if letter == "x":
        assert re.search(r"\[files 1-(\d+) of 100 shown; continue with the last \d+ of these paths\]$", text)


async def test_media_files_have_their_type(root: Path) -> None:
    for name in ("a.png", "b.mp3", "c.pdf", "noext"):
        (root / name).write_bytes(b"\x00\x01" + name.encode())
    async with client_for(root) as client:
        results = [
            (await client.call_tool("read_media_file", {"path": name})).content[0]
            for name in ("a.png", "b.mp3", "c.pdf", "noext")
        ]
    image, audio, pdf, blob = results
    assert isinstance(image, ImageContent)
    assert (image.mime_type, base64.b64decode(image.data)) == ("image/png", b"\x00\x01a.png")
    assert isinstance(audio, AudioContent)
    assert audio.mime_type == "audio/mpeg"
    assert isinstance(pdf, EmbeddedResource)
    assert pdf.resource.mime_type == "application/pdf"
    assert isinstance(blob, EmbeddedResource)
    assert isinstance(blob.resource, BlobResourceContents)
    assert base64.b64decode(blob.resource.blob) == b"\x00\x01noext"


async def test_the_mime_type_is_that_of_the_bytes(root: Path) -> None:
    for name in ("photo.png.gz", "photo.png.xz", "data:image,x"):
        (root / name).write_bytes(b"x")
    (root / "folder.png").mkdir()
    expected = {"photo.png.gz": "application/gzip", "photo.png.xz": None, "data:image,x": None}
    async with client_for(root) as client:
        for name, mime in expected.items():
            block = (await client.call_tool("read_media_file", {"path": name})).content[0]
            assert isinstance(block, EmbeddedResource)
            assert block.resource.mime_type == (mime or "application/octet-stream")
            assert json.loads(await ok(client, "get_file_info", path=name))["mime_type"] == mime
        assert json.loads(await ok(client, "get_file_info", path="folder.png"))["mime_type"] is None


async def test_an_empty_media_file_is_an_error(root: Path) -> None:
    (root / "empty.png").touch()
    async with client_for(root) as client:
        assert "empty" in await refused(client, "read_media_file", path="empty.png")


async def test_a_media_file_above_the_limit_is_refused(root: Path) -> None:
    with (root / "big.png").open("wb") as file:
        file.truncate(10_000_001)
    async with client_for(root) as client:
        assert "10000001 bytes" in await refused(client, "read_media_file", path="big.png")


# ------------------------------------------------------------------------------------------- listing and finding


async def test_a_listing_has_one_json_object_a_line(root: Path) -> None:
    os.utime(root / "note.txt", (0, 1_700_000_000))
    async with client_for(root) as client:
        lines = [json.loads(line) for line in (await ok(client, "list_directory", path=".")).split("\n")]
        assert lines[0] == {"path": "./note.txt", "type": "file", "size": 14, "modified": "2023-11-14T22:13:20Z"}
        assert [line["path"] for line in lines] == ["./note.txt", "./sub"]
        assert lines[1]["type"] == "directory"
        for line in (await ok(client, "list_directory", path=str(root / "sub"))).split("\n"):
            await ok(client, "get_file_info", path=json.loads(line)["path"])


async def test_a_recursive_listing_takes_a_pattern(root: Path) -> None:
    async with client_for(root) as client:
        text = await ok(client, "list_directory", path=".", recursive=True)
        assert [json.loads(line)["path"] for line in text.split("\n")] == [
            "./note.txt",
            "./sub",
            "./sub/code.py",
            "./sub/deeper",
            "./sub/deeper/data.json",
        ]
        text = await ok(client, "list_directory", path=".", recursive=True, pattern="*.json")
        assert [json.loads(line)["path"] for line in text.split("\n")] == ["./sub/deeper/data.json"]
        assert await ok(client, "list_directory", path=".", pattern="*.xyz") == "[no entries]"
        assert "recursive=true" in await refused(client, "list_directory", path=".", pattern="sub/*.py")
        assert '"./note.txt"' in await ok(client, "list_directory", path=".", pattern="**/*.txt")


async def test_a_tree_is_indented_and_marks_what_it_does_not_enter(root: Path) -> None:
    (root / "node_modules" / "x").mkdir(parents=True)
    async with client_for(root) as client:
        tree = await ok(client, "directory_tree", path=".")
        assert tree == (
            "./\n note.txt\n node_modules/ [skipped]\n sub/\n  code.py\n  deeper/\n   data.json\n"
            "[skipped 1 node_modules]"
        )
        tree = await ok(client, "directory_tree", path=".", max_depth=1, exclude_patterns=["node*"])
        assert tree == "./\n note.txt\n sub/ [not listed]"
        assert "  x/" in await ok(client, "directory_tree", path=".", exclude_patterns=[])
        assert " x/" in await ok(client, "directory_tree", path="node_modules")


JUNK_WALKS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "skipped": ("search_files", {"path": ".", "pattern": "*.js"}, False),
    "named in the path": ("search_files", {"path": "node_modules", "pattern": "*.js"}, True),
    "named in the pattern": ("search_files", {"path": ".", "pattern": "node_modules/**/*.js"}, True),
    "no exclusions": ("search_files", {"path": ".", "pattern": "*.js", "exclude_patterns": []}, True),
    "other exclusions": ("search_files", {"path": ".", "pattern": "*.js", "exclude_patterns": ["*.py"]}, False),
    "text skipped": ("search_text", {"path": ".", "pattern": "junk"}, False),
    "text named in the glob": ("search_text", {"path": ".", "pattern": "junk", "glob": "node_modules/**"}, True),
    "listing skipped": ("list_directory", {"path": ".", "recursive": True}, False),
}


@pytest.mark.parametrize(("tool", "arguments", "found"), JUNK_WALKS.values(), ids=JUNK_WALKS.keys())
async def test_junk_is_walked_only_when_it_is_asked_for(
    root: Path, tool: str, arguments: dict[str, Any], found: bool
) -> None:
    (root / "node_modules" / "lib").mkdir(parents=True)
    (root / "node_modules" / "lib" / "index.js").write_text("junk")
    async with client_for(root) as client:
        text = await ok(client, tool, **arguments)
    assert ("index.js" in text) is found
    assert ("skipped 1 node_modules" in text) is not found


GLOBS = {
    "*.py": {"a.py", "src/b.py", "src/lib/c.py", "src/lib/[x].py"},
    "**/*.py": {"a.py", "src/b.py", "src/lib/c.py", "src/lib/[x].py"},
    "src/*.py": {"src/b.py"},
    "src/**/*.py": {"src/b.py", "src/lib/c.py", "src/lib/[x].py"},
    "./src/*": {"src/b.py", "src/lib", "src/d.ts"},
    "**/lib": {"src/lib"},
    "src/**": {"src/b.py", "src/d.ts", "src/lib", "src/lib/c.py", "src/lib/[x].py"},
    "*.{ts,md}": {"src/d.ts", "READ me.md"},
    "{a,src/b}.py": {"a.py", "src/b.py"},
    "?.py": {"a.py", "src/b.py", "src/lib/c.py"},
    "[ab].py": {"a.py", "src/b.py"},
    "[!ab].py": {"src/lib/c.py"},
    "[a-c].py": {"a.py", "src/b.py", "src/lib/c.py"},
    "[[]x].py": {"src/lib/[x].py"},
    "READ me.md": {"READ me.md"},
    "*.PY": set[str](),
    "a+py": set[str](),
    "a{py": set[str](),
}


@pytest.mark.parametrize("pattern", GLOBS)
async def test_globs(tmp_path: Path, pattern: str) -> None:
    for name in ("a.py", "src/b.py", "src/lib/c.py", "src/lib/[x].py", "src/d.ts", "READ me.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    async with client_for(tmp_path) as client:
        text = await ok(client, "search_files", path=".", pattern=pattern)
    found = set[str]() if text == "[no matches]" else {line.removeprefix("./") for line in text.split("\n")}
    assert found == GLOBS[pattern]


BAD_GLOBS = {"reversed range": "[z-a]", "unclosed brace": "}{a", "too many braces": "{" * 400 + "}" * 400}


@pytest.mark.parametrize("pattern", BAD_GLOBS.values(), ids=BAD_GLOBS.keys())
async def test_a_glob_that_is_not_valid_is_called_a_glob(root: Path, pattern: str) -> None:
    async with client_for(root) as client:
        message = await refused(client, "search_files", path=".", pattern=pattern)
        assert message.startswith("the glob '")
        assert "brackets and braces" in message
        assert "glob" in await refused(client, "search_text", path=".", pattern="x", glob=pattern)


@pytest.mark.parametrize("pattern", ["", "./"])
async def test_an_empty_glob_is_an_error_also_at_the_start(root: Path, pattern: str) -> None:
    async with client_for(root) as client:
        assert "is empty" in await refused(client, "search_files", path=".", pattern=pattern)
    with pytest.raises(ConfigError, match=r"--deny: the glob .* is empty"):
        build_server([root], deny=[pattern])


async def test_a_tilde_is_a_letter_like_any_other(root: Path) -> None:
    (root / "~$letter.docx").touch()
    async with client_for(root) as client:
        assert await ok(client, "search_files", path=".", pattern="~$*") == "./~$letter.docx"


@pytest.mark.parametrize("pattern", ["{a,aa}" * 40 + "b", "*a" * 60 + "b", "**/" * 300 + "x", "[" * 500, "{" * 900])
async def test_glob_bombs_end_at_once(root: Path, pattern: str) -> None:
    (root / ("a" * 200)).touch()
    async with client_for(root) as client:
        result = await client.call_tool("search_files", {"path": ".", "pattern": pattern})
    assert result.content


async def test_found_paths_can_be_passed_back_whatever_their_names(root: Path) -> None:
    names = [
        b"caf\xe9.txt",
        "schön.txt".encode(),
        b"new\nline.txt",
        b"tab\t.txt",
        b"\x1b[31m.txt",
        b"space end ",
        b"-rf",
        b"a\\x41",
    ]
    for name in names:
        (root / os.fsdecode(name)).write_bytes(name)
    async with client_for(root) as client:
        lines = (await ok(client, "search_files", path=".", pattern="*")).split("\n")
        read = {
            await ok(client, "read_file", path=line, encoding="latin-1")
            for line in lines
            if not line.endswith(("sub", "deeper"))
        }
        assert {name.decode("latin-1") for name in names} <= read
        listed = [json.loads(line)["path"] for line in (await ok(client, "list_directory", path=".")).split("\n")]
        assert len(listed) == len(names) + 2
        assert await ok(client, "read_file", path="./caf\\xe9.txt", encoding="latin-1") == "café.txt"
        await ok(client, "search_text", path=".", pattern="caf")


@pytest.mark.parametrize("tool", ["list_directory", "directory_tree", "search_files", "search_text"])
async def test_following_the_trailers_of_a_walk_gives_everything_once_in_order(root: Path, tool: str) -> None:
    for n in range(60):
        (root / "sub" / f"file{n:03}.txt").write_text(f"needle {n}\n")
    arguments: dict[str, Any] = {"path": "."} | {
        "search_files": {"pattern": "*"},
        "search_text": {"pattern": "needle"},
    }.get(tool, {})
    if tool == "list_directory":
        arguments["recursive"] = True
    async with client_for(root) as client:
        whole = await ok(client, tool, **arguments)
    async with client_for(root, options=Options(max_output=300)) as client:
        pages = await read_all(client, tool, **arguments)
    assert len(pages) > 3
    assert "".join(pages) == whole


# --------------------------------------------------------------------------------------------------- text search


async def test_a_search_gives_file_line_and_text(root: Path) -> None:
    async with client_for(root) as client:
        assert await ok(client, "search_text", path=".", pattern="o") == (
            "./note.txt:1:one\n./note.txt:2:two\n./sub/code.py:1:import os\n./sub/code.py:2:print('hello')"
        )
        assert await ok(client, "search_text", path="note.txt", pattern="two") == "note.txt:2:two"
        assert await ok(client, "search_text", path=".", pattern="o", glob="*.py", max_matches=1) == (
            "./sub/code.py:1:import os\n[matches 1-1 shown; continue with offset=1]"
        )
        assert await ok(client, "search_text", path=".", pattern="TWO", ignore_case=True) == "./note.txt:2:two"
        assert await ok(client, "search_text", path=".", pattern="^t\\w+$", regex=True) == (
            "./note.txt:2:two\n./note.txt:3:three"
        )
        assert await ok(client, "search_text", path=".", pattern="t.o") == "[no matches]"


async def test_context_lines_come_once_and_in_order(root: Path) -> None:
    (root / "log").write_text("".join(f"{n} {'hit' if n in (2, 4, 9) else 'x'}\n" for n in range(1, 11)))
    expected = "log-1-1 x\nlog:2:2 hit\nlog-3-3 x\nlog:4:4 hit\nlog-5-5 x\n--\nlog-8-8 x\nlog:9:9 hit\nlog-10-10 x"
    async with client_for(root) as client:
        assert await ok(client, "search_text", path="log", pattern="hit", context=1) == expected
        pages = await read_all(client, "search_text", path="log", pattern="hit", context=1, max_matches=1)
    assert "".join(pages) == expected


async def test_a_search_says_what_it_skipped(root: Path) -> None:
    (root / "image.bin").write_bytes(b"two\0")
    (root / ".env").write_text("two")
    with (root / "huge").open("wb") as file:
        file.truncate(10_000_001)
    async with client_for(root) as client:
        assert await ok(client, "search_text", path=".", pattern="two") == (
            "./note.txt:2:two\n"
            "[skipped 1 binary files; skipped 1 files larger than 10000000 bytes; skipped 1 secret files]"
        )


async def test_lines_of_any_text_are_found_and_long_ones_are_clipped(root: Path) -> None:
    (root / "crlf").write_bytes(b"alpha\r\nneedle\r\n")
    (root / "latin").write_bytes(b"needle caf\xe9\n")
    (root / "long").write_text("x" * 5000 + "needle" + "y" * 5000)
    async with client_for(root) as client:
        text = await ok(client, "search_text", path=".", pattern="needle")
        assert "./crlf:2:needle\n" in text
        assert "./latin:1:needle caf\\xe9\n" in text
        assert re.search(r"\./long:1:\[4875 characters\]…x{125}needley{369}…\[4631 characters\]", text)
        assert "./crlf:2:needle" in await ok(client, "search_text", path=".", pattern="dle$", regex=True)


async def test_text_is_found_in_any_case_and_wherever_it_stands_in_a_line(root: Path) -> None:
    (root / "far").write_text("x" * 50_000 + "NEEDLE" + "y" * 5000)
    (root / "street").write_text("Große STRASSE\nΣΊΣΥΦΟΣ\n")
    async with client_for(root) as client:
        for arguments in ({"pattern": "NEEDLE"}, {"pattern": "needle", "ignore_case": True}):
            text = await ok(client, "search_text", path="far", **arguments)
            assert re.fullmatch(r"far:1:\[49875 characters\]…x{125}NEEDLEy{369}…\[4631 characters\]", text)
        for pattern in ("große", "GROSSE", "straße", "a"):
            assert "street:1:" in await ok(client, "search_text", path="street", pattern=pattern, ignore_case=True)
        assert "street:2:" in await ok(client, "search_text", path="street", pattern="σίσυφος", ignore_case=True)


async def test_a_regular_expression_sees_the_start_of_a_long_line_and_that_is_said(root: Path) -> None:
    (root / "long").write_text("x" * 1990 + "needle" + "y" * 5000 + "needle\n")
    async with client_for(root) as client:
        text = await ok(client, "search_text", path="long", pattern="y{3}", regex=True)
        assert text.endswith("\n[skipped 1 line ends after 2000 characters (plain text is searched to the end)]")
        assert (await ok(client, "search_text", path="long", pattern="yneedle")).startswith("long:1:[")
        assert "[no matches; skipped 1 line ends" in await ok(
            client, "search_text", path="long", pattern="yneedle", regex=True
        )


BAD_PATTERNS = {"unclosed": "(", "look-around": "(?=x)", "back-reference": r"(a)\1", "too large": r"(\w{100}){100}"}


@pytest.mark.parametrize("pattern", BAD_PATTERNS.values(), ids=BAD_PATTERNS.keys())
async def test_a_bad_regular_expression_is_an_error_with_the_reason(root: Path, pattern: str) -> None:
    async with client_for(root) as client:
        assert "no valid regular expression" in await refused(
            client, "search_text", path=".", pattern=pattern, regex=True
        )
        await ok(client, "search_text", path=".", pattern=pattern)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*c", "(a|aa)+$", "(.*a){20}$", "(?:a?){500}a{500}$", "(x+x+)+y"])
async def test_a_regular_expression_built_to_explode_just_answers(root: Path, pattern: str) -> None:
    (root / "bomb").write_text(("a" * 1990 + "b\n") * 20)
    async with client_for(root) as client:
        assert await ok(client, "search_text", path="bomb", pattern=pattern, regex=True) == "[no matches]"


# ------------------------------------------------------------------------------------------------- info and walks


async def test_file_info(root: Path) -> None:
    (root / "alias").symlink_to("sub/code.py")
    (root / "note.txt").chmod(0o640)
    os.utime(root / "note.txt", (1_600_000_000, 1_700_000_000))
    async with client_for(root) as client:
        info = json.loads(await ok(client, "get_file_info", path="note.txt"))
        info.pop("created")
        assert info == {
            "path": "note.txt",
            "type": "file",
            "size": 14,
            "modified": "2023-11-14T22:13:20Z",
            "accessed": "2020-09-13T12:26:40Z",
            "permissions": "-rw-r-----",
            "mime_type": "text/plain",
            "link_target": None,
        }
        alias = json.loads(await ok(client, "get_file_info", path="alias"))
        assert (alias["type"], alias["link_target"]) == ("file", str(root / "sub" / "code.py"))
        assert json.loads(await ok(client, "get_file_info", path="."))["type"] == "directory"


@pytest.fixture
def abyss(tmp_path: Path) -> Iterator[Path]:
    """A thousand directories inside each other; pytest's own cleaning cannot go down so far."""
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1000):
        os.mkdir("deeper", dir_fd=fd)
        child = os.open("deeper", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = child
    bottom = os.open("bottom.txt", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
    os.write(bottom, b"made it")
    os.close(bottom)
    os.close(fd)
    yield tmp_path
    subprocess.run(["rm", "-rf", str(tmp_path / "deeper")], check=True)


async def test_a_thousand_levels_are_listed_to_a_depth_that_is_said(abyss: Path) -> None:
    async with client_for(abyss) as client:
        tree = await ok(client, "directory_tree", path=".")
        assert "skipped 1 directories below 100 levels: give a deeper path" in tree
        assert "skipped 1 directories below" in await ok(client, "search_files", path=".", pattern="bottom.txt")
        assert await ok(client, "read_file", path="deeper/" * 1000 + "bottom.txt") == "made it"
        near = "deeper/" * 950
        assert (await ok(client, "search_files", path=near, pattern="bottom.txt")).endswith("bottom.txt")


def test_an_offset_that_a_walk_did_not_reach_in_its_time_is_not_called_past_the_end(root: Path) -> None:
    walk = Walk(Files([root]), ".", Work(deadline=0))
    with pytest.raises(ToolError, match="stopped after 25 s, before offset=4; give a narrower path"):
        walk.page((listing.prefix for listing in walk.listings()), "lines", 1000, 4)
    assert "stopped after 25 s" in walk.page((listing.prefix for listing in walk.listings()), "lines", 1000, 0)


async def test_a_short_walk_reports_its_progress_once(root: Path) -> None:
    told: list[float] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        told.append(progress)

    async with client_for(root) as client:
        await client.call_tool("search_files", {"path": ".", "pattern": "*"}, progress_callback=note)
    assert told == [5]


async def test_every_tool_is_annotated_and_the_list_is_small_and_stable(root: Path) -> None:
    async with client_for(root) as client:
        tools = (await client.list_tools()).tools
    assert [tool.name for tool in tools] == [
        "read_file",
        "read_media_file",
        "read_multiple_files",
        "list_directory",
        "directory_tree",
        "search_files",
        "search_text",
        "get_file_info",
        "list_allowed_directories",
    ]
    for tool in tools:
        assert tool.annotations
        assert (tool.annotations.read_only_hint, tool.annotations.open_world_hint) == (True, False)
        assert tool.description
        assert len(tool.description) < 420
        for name, schema in tool.input_schema["properties"].items():
            assert schema.get("description") or name in ("ignore_case", "max_matches"), (tool.name, name)
    size = len(json.dumps([tool.model_dump(by_alias=True, exclude_none=True, mode="json") for tool in tools]))
    assert size < 9000


async def test_no_tool_changes_anything(hostile: Path) -> None:
    def snapshot() -> list[tuple[str, int, int]]:
        found = [(str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in hostile.parent.rglob("*")]
        assert all(stat.S_IFMT(os.lstat(name).st_mode) for name, _, _ in found)
        return sorted(found)

    before = snapshot()
    async with client_for(hostile) as client:
        for tool, arguments in TOOLS.items():
            for path in (".", "note.txt", "missing", "../new", "link_missing"):
                await client.call_tool(tool, {"path": path} | arguments)
    assert snapshot() == before
