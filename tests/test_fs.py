"""The file server: attacks, and what must still work, through the in-memory client; then as a real process."""

import base64
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, Stdio, calls_during_a_race, ok, refused
from mcp import Client

from common import ConfigError
from fs_server import build_server
from serving import READ_ONLY, Options

pytestmark = pytest.mark.anyio

SECRET = "the secret outside"
Start = Callable[..., Stdio]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An allowed directory with a secret next to it, and links that lead there."""
    root = tmp_path / "top"
    (root / "sub" / "deeper").mkdir(parents=True)
    (root / "note.txt").write_text("one\ntwo\nthree\n")
    (root / "sub" / "code.py").write_text("import os\nprint('hello')\n")
    (root / "sub" / "deeper" / "data.json").write_text('{"a": 1}')
    (tmp_path / "top_evil").mkdir()
    for name in ("secret.txt", "top_evil/secret.txt"):
        (tmp_path / name).write_text(SECRET)
    return root


def client_for(*roots: Path, max_output: int = 40_000, **keywords: Any) -> Client:
    return Client(build_server(roots, options=Options(max_output=max_output), **keywords))


async def read_all(client: Client, tool: str, max_output: int = 0, **arguments: Any) -> list[str]:
    """The pages of a result, none longer than it may, following the arguments that each trailer names to the end."""
    pages: list[str] = []
    while True:
        text = await ok(client, tool, **arguments)
        assert len(text) <= max_output or max_output < 300
        body, _, last = text.rpartition("\n") if "\n" in text else ("", "", text)
        found = re.fullmatch(r"\[.* shown; continue with ([^;]*)\]", last)
        if not found:
            return [*pages, text]
        pages.append(body + ("" if "column=" in found[1] else "\n"))
        resume = {name: json.loads(value) for name, value in re.findall(r"(\w+)=(\S+)", found[1])}
        arguments = {k: v for k, v in arguments.items() if k not in ("head", "tail", "offset", "column")} | resume


async def paths_in(client: Client, **arguments: Any) -> list[str]:
    """The paths that list_directory shows."""
    text = await ok(client, "list_directory", **arguments)
    return [json.loads(line)["path"] for line in text.split("\n") if line.startswith("{")]


# {out} is the directory that holds the allowed one, {proc} a link of the system's to its own root.
ESCAPES = (
    "../secret.txt sub/../../secret.txt missing/../../secret.txt note.txt/../../secret.txt {out}/secret.txt"
    " {out}/top/../secret.txt {out}/top_evil/secret.txt ../top_evil/secret.txt /etc/passwd / .. //etc/passwd"
    " link_file link_dir/secret.txt link_absolute link_chain link_missing /proc/self/environ"
    " {proc}/etc/passwd ~/../../etc/passwd"
).split()
# These are just names, and there is no such file.
NAMES_ONLY = (
    r"%2e%2e%2fsecret.txt %252e%252e/secret.txt \x2e\x2e/secret.txt ..\secret.txt file:///etc/passwd ..%c0%afsecret.txt"
    " \uff0e\uff0e/secret.txt ..\u2215secret.txt"
).split()
TOOLS: dict[str, dict[str, Any]] = {
    **{tool: {} for tool in ("read_file", "read_media_file", "list_directory", "directory_tree")},
    **{"search_files": {"pattern": "*"}, "search_text": {"pattern": "secret"}},
}


@pytest.mark.parametrize("tool", TOOLS)
async def test_no_path_leads_outside_and_nothing_is_changed(root: Path, tool: str) -> None:
    links = {"file": "../secret.txt", "dir": "..", "absolute": root.parent / "secret.txt", "chain": "link_file"}
    for name, target in {**links, "missing": "../nothing-there"}.items():
        (root / f"link_{name}").symlink_to(target)
    before = [(str(path), path.lstat()[:2], path.lstat().st_mtime_ns) for path in root.parent.rglob("*")]
    async with client_for(root) as client:
        for path in ESCAPES:
            message = await refused(
                client, tool, path=path.format(out=root.parent, proc="/proc/self/root"), **TOOLS[tool]
            )
            assert "is outside the allowed directories; list_allowed_directories names them" in message
            assert SECRET not in message
        result = (await client.call_tool(tool, {"path": ".", **TOOLS[tool]})).content[0].model_dump_json()
        assert SECRET not in result  # walks do not follow links
        assert "secret.txt" not in result
        assert before == [(str(path), path.lstat()[:2], path.lstat().st_mtime_ns) for path in root.parent.rglob("*")]
        for path in NAMES_ONLY:
            assert "not found" in await refused(client, tool, path=path, **TOOLS[tool])
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text("fine")
            assert await ok(client, "read_file", path=path) == "fine"
        # An error does not tell whether something exists outside.
        for link in ("link_file", "link_missing"):
            info = json.loads(await ok(client, "get_file_info", path=link))
            assert (info["type"], info["link_target"]) == ("symlink", "(outside the allowed directories)")


async def test_a_tilde_and_links_that_stay_inside_work(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root))
    (root / "~$letter.docx").write_text("just a name")
    async with client_for(Path("~")) as client:
        assert await ok(client, "search_files", path="~", pattern="*.py") == "~/sub/code.py"
        assert await ok(client, "search_files", path=".", pattern="~$*") == "./~$letter.docx"
        assert await ok(client, "read_file", path="~$letter.docx") == "just a name"
        assert "outside" in await refused(client, "read_file", path="~/../secret.txt")
    async with client_for(root / "sub") as client:
        assert "outside" in await refused(client, "read_file", path="~/note.txt")
    links = {"a.txt": "note.txt", "a": "sub", "sub/b.txt": "../note.txt", "c.txt": "../top/note.txt"}
    for link, target in {**links, "loop": "pool", "pool": "loop", "self": "self"}.items():
        (root / link).symlink_to(target)
    (root.parent / "alias").symlink_to(root)
    async with client_for(root.parent / "alias") as client:
        for path in ("a.txt", "a/../note.txt", "sub/b.txt", "a/b.txt", "c.txt", str(root / "c.txt")):
            assert await ok(client, "read_file", path=path) == "one\ntwo\nthree\n"
        assert json.loads(await ok(client, "list_allowed_directories")) == {"directories": [str(root)]}
        assert "not a directory" in await refused(client, "read_file", path="self/x")
        for path in ("loop", "pool", "self"):
            assert "symbolic links" in await refused(client, "read_file", path=path)
        assert json.loads(await ok(client, "get_file_info", path="loop"))["type"] == "symlink"


async def test_special_files_are_refused_and_never_wait(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(root / "fifo")
    monkeypatch.chdir(root)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        async with client_for(root, Path("/dev")) as client:
            for name in ("fifo", "socket", "zero", "null", "tty"):
                for tool in ("read_file", "read_media_file"):
                    assert "never opened" in await refused(client, tool, path=name)
                kind = json.loads(await ok(client, "get_file_info", path=name))["type"]
                assert kind == (name if name in ("fifo", "socket") else "device")
            assert "note.txt:2:two" in await ok(client, "search_text", path=str(root), pattern="two")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
async def test_files_that_claim_another_size_than_they_have_are_read() -> None:
    whole = Path("/proc/kallsyms").read_text()  # gives a page at a time
    async with client_for(Path("/proc"), max_output=0) as client:
        assert (await ok(client, "read_file", path="self/status", head=1)).startswith("Name:")
        assert "self/status:1:Name:" in await ok(client, "search_text", path="self/status", pattern="Name:")
        assert await ok(client, "read_file", path="kallsyms", max_size=100_000_000) == whole


SECRETS = (
    ".env .env.local prod.env .envrc id_rsa id_ed25519 server.pem tls.key .netrc .pgpass .npmrc .git-credentials"
    " .ssh/config .ssh/id.pub .aws/credentials .kube/config .docker/config.json .ENV ID_RSA credentials.json a/b/.ssh/x"
    " terraform.tfstate vault.kdbx"
).split()
NOT_SECRETS = ".env.example id_rsa.pub environment.py keys.txt pem.md my.key.txt ssh/config config.json".split()


async def test_secret_files_are_listed_but_not_opened(root: Path) -> None:
    for number, name in enumerate([*SECRETS, *NOT_SECRETS]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("hunter2 needle" if name in SECRETS else "plain")
        (root / f"innocent{number}.txt").symlink_to(name)
    async with client_for(root) as client:
        for number, name in enumerate(SECRETS):
            for path in (name, f"innocent{number}.txt", str(root / name)):
                assert "--allow-secrets" in await refused(client, "read_file", path=path)
            assert "--allow-secrets" in await refused(client, "read_media_file", path=name)
            assert f"./{name}" in await ok(client, "search_files", path=".", pattern=f"**/{Path(name).name}")
        assert "hunter2" not in await ok(client, "read_multiple_files", paths=[*SECRETS, "note.txt"])
        found = await ok(client, "search_text", path=".", pattern="needle")
        assert found == f"[no matches; skipped {len(SECRETS)} secret files]"
        for other in NOT_SECRETS:
            assert await ok(client, "read_file", path=other) == "plain"
    async with client_for(root, allow_secrets=True, deny=["note.*"]) as client:
        for name in SECRETS:
            assert await ok(client, "read_file", path=name) == "hunter2 needle"
        assert "--deny" in await refused(client, "read_file", path="note.txt")
    (root / "private" / "deeper").mkdir(parents=True)
    (root / "private" / "deeper" / "b.txt").write_text("b")
    for deny in ("private", "private/", "deeper", "private/deeper", "PRIVATE", "priv*"):
        async with client_for(root, deny=[deny]) as client:
            assert "--deny" in await refused(client, "read_file", path="private/deeper/b.txt")


texts = ["one\ntwo\nthree", "one\r\ntwo\r\nthree\r\n", "one\rtwo\nthree", "\n\n\n\n", "a\u2028b\x0bc\x85d\ne\x1cf\n"]
texts += ["käse\nöl\n日本語 text\n🎉🎉🎉🎉🎉🎉🎉🎉\nend", "x" * 300 + "\n" + "y" * 7 + "\n" + "é" * 200, "🎉" * 1530]
texts += ["[lines 1-2 of 3 shown]\nx\n[lines 1-2 of 3 shown]", "".join(f"文字 {n}\n" for n in range(300))]


@pytest.mark.parametrize("max_output", [7, 300, 1000, 0])
async def test_following_the_trailers_gives_the_whole_text_exactly_once(root: Path, max_output: int) -> None:
    async with client_for(root, max_output=max_output) as client:
        for whole in texts:
            (root / "text").write_text(whole, newline="")
            count = whole.count("\n") + (not whole.endswith("\n"))
            for start in ({}, {"head": 10_000}, {"tail": 10_000}, {"head": count}, {"tail": count}):
                pages = await read_all(client, "read_file", max_output, path="text", **start)
                assert "".join(pages) == whole
                assert len(pages) == 1 or len(whole) > max_output > 0


TEN = "".join(f"l{n}\n" for n in range(10))
slices = {"head=2": "l0\nl1\n", "head=99": TEN, "tail=99": TEN, "offset=3 head=2": "l3\nl4\n"}
slices |= {"offset=8": "l8\nl9\n", "tail=2": "l8\nl9\n", "offset=9 column=1": "9\n"}


async def test_slices_and_their_trailers(root: Path) -> None:
    async with client_for(root, max_output=230) as client:
        (root / "lines").write_text(TEN)
        for wanted, expected in slices.items():
            part = {name: int(value) for name, value in (word.split("=") for word in wanted.split())}
            assert await ok(client, "read_file", path="lines", **part) == expected
        (root / "lines").write_text("".join(f"line {n}\n" for n in range(1, 101)))
        text = await ok(client, "read_file", path="lines", offset=13, head=50)
        assert text.endswith("\n[lines 14-25 of 100 shown; continue with offset=25 head=38]")
        text = await ok(client, "read_file", path="lines", tail=50)
        assert text.endswith("\n[lines 1-12 of the last 50 shown; continue with tail=38]")


BAD_READS: list[tuple[bytes, dict[str, Any], str]] = [
    (b"caf\xe9\n", {}, "not valid utf-8 (byte 0xe9 in line 1); use read_media_file if"),
    (b"x\n" * 100_000 + b"\xff", {"tail": 1}, "not valid utf-8 (byte 0xff)"),
    ("text".encode("utf-16"), {}, 'pass encoding="utf-16"'),
    (b"\x89PNG\0\0\0", {}, "looks binary: it has NUL bytes); use read_media_file"),
    (b"x\n" * 10_000 + b"\0", {"tail": 1}, "binary"),
    *((b"x", {"encoding": name}, "unknown text encoding") for name in ("utf-9", "rot13", "hex", "punycode", "utf-8\0")),
    (b"\xff\xfea", {"encoding": "utf-16"}, "not valid utf-16"),
    (b"x" * 101, {"max_size": 100}, "with head, tail or offset of read_file, or raise its max_size"),
    (b"a\nb\n", {"offset": 2}, "offset=2 is past the end of file, after 2 lines"),
    (b"abc", {"column": 4}, "column=4 is past the end"),
    *((b"x", {"tail": 1, more: 1}, "cannot be combined") for more in ("head", "offset")),
]
wrong_kind = {"sub": "is a directory", ".": "is a directory", "missing": "not found", "note.txt/x": "not a directory"}
wrong_kind |= {"x" * 300: "too long", "": "NUL", "note.txt\0.png": "NUL"}


async def test_what_cannot_be_read_is_an_error_that_names_a_way_out(root: Path) -> None:
    async with client_for(root) as client:
        for data, arguments, message in BAD_READS:
            (root / "file").write_bytes(data)
            assert message in await refused(client, "read_file", path="file", **arguments)
        for path, message in wrong_kind.items():
            assert message in await refused(client, "read_file", path=path)
        assert "not a directory" in await refused(client, "list_directory", path="note.txt")
        for tool in ("get_file_info", "directory_tree"):
            assert "not found" in await refused(client, tool, path="missing")
        # What is bad beyond the wanted part does not matter.
        (root / "file").write_bytes(b"x\n" * 100_000 + b"\xff\n" + b"y\n" * 100_000)
        assert await ok(client, "read_file", path="file", offset=99_998, head=2) == "x\nx\n"
        assert "".join(await read_all(client, "read_file", path="file", tail=50_000)) == "y\n" * 50_000
        assert "0xff in line 100001" in await refused(client, "read_file", path="file", offset=99_999, head=2)
        (root / "file").write_bytes(bytes(range(256)))
        assert await ok(client, "read_file", path="file", encoding="latin-1") == bytes(range(256)).decode("latin-1")
        path = "\U000e0001" * 16_000  # long paths do not flood a result
        assert len(await refused(client, "read_file", path=f"../{path}")) < 17_000
        assert len(await ok(client, "read_multiple_files", paths=["x/" * 8_000, path] * 50)) <= 40_000


ENCODED = {
    **{"latin-1": "café\n", "cp1252": "“quotes” – dash\n", "utf-16": "käse\nöl\n", "utf-16-le": "a\nb\nc\n"},
    **{"utf-32": "🎉\n", "utf-8-sig": "bom\n", "gb18030": "中文\n", "cp037": "line\n"},
    **dict.fromkeys(("utf-7", "iso2022_jp", "shift_jis"), "日本語\nテキスト\n"),
}


@pytest.mark.parametrize(("encoding", "short"), ENCODED.items())
async def test_other_encodings_are_read_and_continued_without_a_gap(root: Path, encoding: str, short: str) -> None:
    long = short.replace("\n", "") * 200  # no space: at one, stateful encodings start anew
    for name, text in (("short", short), ("long", long), ("lines", short * 20_000)):
        (root / name).write_bytes(text.encode(encoding))
    async with client_for(root, max_output=70) as client:
        assert await ok(client, "read_file", path="short", encoding=encoding) == short
        assert "".join(await read_all(client, "read_file", path="long", encoding=encoding)) == long
        last = short.split("\n")[-2] + "\n"
        assert await ok(client, "read_file", path="lines", encoding=encoding, tail=1) == last


MARKED = {"utf-8": "utf-8-sig", "utf-16": "utf-16", "utf-16-le": "utf-16", "utf-32": "utf-32"}


@pytest.mark.parametrize(("encoding", "written"), MARKED.items())
async def test_a_byte_order_mark_is_no_text_but_tells_the_encoding(root: Path, encoding: str, written: str) -> None:
    text = "using käse;\r\nöl\r\n"
    (root / "file.cs").write_bytes(text.encode(written))
    async with client_for(root) as client:
        for part in ({}, {"tail": 9}, {"head": 9}):
            assert await ok(client, "read_file", path="file.cs", encoding=encoding, **part) == text
        assert await ok(client, "read_file", path="file.cs", encoding=encoding, column=6, head=1) == "käse;\r\n"
        for search in ({"pattern": "^using", "regex": True}, {"pattern": "USING", "ignore_case": True}):
            assert await ok(client, "search_text", path=".", glob="*.cs", **search) == "./file.cs:1:using käse;"
        found = await ok(client, "search_text", path=".", pattern="öl", context=1)
        assert found == "./file.cs-1-using käse;\n./file.cs:2:öl"
        if encoding != "utf-8":
            way = f'(by its byte-order mark); pass encoding="{encoding[:6]}" to read_file'
            assert way in await refused(client, "read_file", path="file.cs")
            assert f"{way}]" in await ok(client, "read_multiple_files", paths=["file.cs"])


@pytest.mark.parametrize("max_output", [40, 300, 400, 2000, 40_000, 0])
async def test_several_files_share_one_result_and_are_continued_exactly(root: Path, max_output: int) -> None:
    names, seen = [f"f{n}" for n in range(5)], ""
    for name in names:
        (root / name).write_text("".join(f"{name} line {n}\n" for n in range(20)))
    async with client_for(root, max_output=max_output) as client:
        for page in await read_all(client, "read_multiple_files", max_output, paths=names):
            text, more, last = page.removesuffix("\n").partition("\n[")
            seen += text + ("" if "column=" in last else "\n")
            if more:
                assert "shown, read_file has the rest; continue with path=" in last
                resume = {name: json.loads(value) for name, value in re.findall(r'(\w+)=("\w+"|\d+)', last)}
                seen += "".join(await read_all(client, "read_file", **resume))
        assert seen == "".join(f"==> {name} <==\n{(root / name).read_text()}" for name in names)
        text = await ok(client, "read_multiple_files", paths=["missing", "../secret.txt", "f0"])
        assert re.match(
            r"==> missing <==\n\[error: not found: missing.*\](\n==> \.\./secret.txt <==\n\[error: |\n\[)", text
        )


async def test_media_files_have_their_type_and_every_file_its_info(root: Path) -> None:
    kinds = {"a.png": "image/png", "b.mp3": "audio/mpeg", "c.pdf": "application/pdf", "noext": None}
    kinds |= {"photo.png.gz": "application/gzip", "photo.png.xz": None, "data:image,x": None}
    (root / "empty.png").touch()
    (root / "big.png").write_bytes(bytes(10_000_001))
    async with client_for(root) as client:
        for name, mime in kinds.items():
            (root / name).write_bytes(b"\x00\x01" + name.encode())
            block = (await client.call_tool("read_media_file", {"path": name})).content[0].model_dump(by_alias=True)
            assert block["type"] == {"a.png": "image", "b.mp3": "audio"}.get(name, "resource")
            content = block.get("resource", block)
            assert content["mimeType"] == (mime or "application/octet-stream")
            assert base64.b64decode(content.get("blob") or content["data"]) == b"\x00\x01" + name.encode()
            assert json.loads(await ok(client, "get_file_info", path=name))["mime_type"] == mime
        for name in ("empty.png", "big.png"):
            assert "empty or has more than 10000000 bytes" in await refused(client, "read_media_file", path=name)
        (root / "alias").symlink_to("sub/code.py")
        (root / "dangling").symlink_to("sub/missing.txt")
        (root / "note.txt").chmod(0o640)
        os.utime(root / "note.txt", (1_600_000_000, 1_700_000_000))
        info = json.loads(await ok(client, "get_file_info", path="note.txt"))
        times = {"modified": "2023-11-14T22:13:20Z", "accessed": "2020-09-13T12:26:40Z", "created": info["created"]}
        kind = {"permissions": "-rw-r-----", "mime_type": "text/plain", "link_target": None}
        assert info == {"path": "note.txt", "type": "file", "size": 14, **times, **kind}
        for link, kind, target in (("alias", "file", "code.py"), ("dangling", "symlink", "missing.txt (not found)")):
            info = json.loads(await ok(client, "get_file_info", path=link))
            assert (info["type"], info["link_target"]) == (kind, f"{root}/sub/{target}")


PYTHON = "a.py src/b.py src/lib/[x].py src/lib/c.py"
GLOBS = {
    **dict.fromkeys(("*.py", "**/*.py"), PYTHON),
    "src/*.py": "src/b.py",
    "src/**/*.py": "src/b.py src/lib/[x].py src/lib/c.py",
    "src/**": "src/b.py src/d.ts src/lib src/lib/[x].py src/lib/c.py",
    "*.{ts,md}": "READ_me.md src/d.ts",
    **dict.fromkeys(("{a,src/b}.py", "[ab].py"), "a.py src/b.py"),
    **dict.fromkeys(("?.py", "[a-c].py"), "a.py src/b.py src/lib/c.py"),
    **{"[!ab].py": "src/lib/c.py", "[[]x].py": "src/lib/[x].py", "**/lib": "src/lib"},
    **dict.fromkeys(("*.PY", "a+py", "a,py"), ""),
}


async def test_globs(tmp_path: Path) -> None:
    (tmp_path / "src" / "lib").mkdir(parents=True)
    for name in [*PYTHON.split(), "src/d.ts", "READ_me.md"]:
        (tmp_path / name).touch()
    async with client_for(tmp_path) as client:
        for pattern, names in GLOBS.items():
            expected = "\n".join(f"./{name}" for name in names.split()) or "[no matches]"
            assert await ok(client, "search_files", path=".", pattern=pattern) == expected
        (tmp_path / ("a" * 200)).touch()
        for pattern in ("{a,aa}" * 40 + "b", "*a" * 60 + "b", "**/" * 300 + "x", "[" * 500, "{" * 900):
            assert (await client.call_tool("search_files", {"path": ".", "pattern": pattern})).content
        for pattern in ("../*", "/etc/*", "sub/../../*", "~/*", "..", "a\0b", "", "./"):
            assert "is empty or leads out" in await refused(client, "search_files", path=".", pattern=pattern)
            with pytest.raises(ConfigError, match=r"--deny: the glob .* is empty or leads out"):
                build_server([tmp_path], deny=[pattern])
        for pattern in ("[z-a]", "}{a", "a{py", "{" * 400 + "}" * 400):
            message = await refused(client, "search_files", path=".", pattern=pattern)
            assert re.match(r"the glob '.*brackets and braces", message)
            with pytest.raises(ConfigError, match=r"--deny: the glob '[^']*' is not valid"):
                build_server([tmp_path], deny=[pattern])


async def test_listings_and_trees(root: Path) -> None:
    os.utime(root / "note.txt", (0, 1_700_000_000))
    os.utime(root / "sub", (0, 1 << 40))  # a year that the calendar does not have
    async with client_for(root) as client:
        assert all(tool.annotations == READ_ONLY for tool in (await client.list_tools()).tools)
        lines = [json.loads(line) for line in (await ok(client, "list_directory")).split("\n")]
        assert lines[0] == {"path": "./note.txt", "type": "file", "size": 14, "modified": "2023-11-14T22:13:20Z"}
        assert (lines[1]["path"], lines[1]["type"]) == ("./sub", "directory")
        below = ["./sub/code.py", "./sub/deeper", "./sub/deeper/data.json"]
        assert await paths_in(client, recursive=True) == ["./note.txt", "./sub", *below]
        assert await paths_in(client, recursive=True, pattern="*.json") == below[2:]
        assert await paths_in(client, pattern="sub/*.py") == below[:1]
        (root / "node_modules" / "x").mkdir(parents=True)
        (root / "node_modules" / "x" / "y.js").write_text("junk")
        # Junk is walked only when it is asked for.
        for glob, exclude, found in (("*.js", None, 0), ("node_modules/**/*.js", None, 1), ("*.js", list[str](), 1)):
            text = await ok(client, "search_files", path=".", pattern=glob, exclude_patterns=exclude)
            assert text == ("./node_modules/x/y.js" if found else "[no matches; skipped 1 node_modules]")
        assert "y.js" in await ok(client, "search_text", path=".", pattern="junk", glob="node_modules/**")
        assert await ok(client, "directory_tree") == (
            "./\n note.txt\n node_modules/ [skipped]\n sub/\n  code.py\n  deeper/\n   data.json\n"
            "[skipped 1 node_modules]"
        )
        tree = await ok(client, "directory_tree", max_depth=1, exclude_patterns=["node*"])
        assert tree == "./\n note.txt\n sub/ [not listed]"


async def test_found_paths_can_be_passed_back_whatever_their_names(root: Path) -> None:
    names = [b"caf\xe9.txt", "schön".encode(), b"new\nline.txt", b"tab\t", b"\x1b[31m.txt", b"end ", b"-rf", b"a\\x41"]
    for name in names:
        (root / os.fsdecode(name)).write_bytes(name)
    async with client_for(root) as client:
        for paths in ((await ok(client, "search_files", path=".", pattern="*")).split("\n"), await paths_in(client)):
            files = [path for path in paths if not path.endswith(("sub", "deeper"))]
            read = {await ok(client, "read_file", path=path, encoding="latin-1") for path in files}
            assert {name.decode("latin-1") for name in names} <= read


@pytest.mark.parametrize("tool", ["list_directory", "directory_tree", "search_files", "search_text"])
@pytest.mark.parametrize("max_output", [40, 300, 2000, 40_000])
async def test_following_the_trailers_of_a_walk_gives_everything_once(root: Path, tool: str, max_output: int) -> None:
    for n in range(60):
        (root / "sub" / f"file{n:03}.txt").write_text(f"secret {n}\n")
    arguments: dict[str, Any] = {"path": ".", **TOOLS[tool]} | ({"recursive": True} if tool == "list_directory" else {})
    async with client_for(root, max_output=0) as client:
        whole = await ok(client, tool, **arguments)
    async with client_for(root, max_output=max_output) as client:
        pages = await read_all(client, tool, max_output, **arguments)
    assert len(pages) > 3 or max_output > 300
    assert "".join(pages) == whole


async def test_a_thousand_levels_are_listed_to_a_depth_that_is_said(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1000):
        os.mkdir("deeper", dir_fd=fd)
        child = os.open("deeper", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = child
    os.close(os.open("bottom.txt", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)
    try:
        async with client_for(tmp_path) as client:
            for path, end in ((".", "below 100 levels: give a deeper path]"), ("deeper/" * 901, "/bottom.txt")):
                assert (await ok(client, "search_files", path=path, pattern="bottom.txt")).endswith(end)
            assert await ok(client, "read_file", path="deeper/" * 1000 + "bottom.txt") == "[the file is empty]"
    finally:  # pytest's own cleaning cannot go down so far
        subprocess.run(["rm", "-rf", str(tmp_path / "deeper")], check=True)


HITS = "".join(f"{n} {'hit' if n in (2, 4, 9) else 'x'}\n" for n in range(1, 11)) + "Große STRASSE\nΣΊΣΥΦΟΣ\nTwo\r\n"
ANY, REGEX = {"ignore_case": True}, {"regex": True}
SEARCHES: list[tuple[dict[str, Any], str]] = [
    ({"pattern": "hit", "max_matches": 1}, "log:2:2 hit\n[matches 1-1 shown; continue with offset=1]"),
    ({"pattern": "^[24] h\\w+$", **REGEX}, "log:2:2 hit\nlog:4:4 hit"),
    *(({"pattern": text, **ANY}, "log:11:Große STRASSE") for text in ("große", "GROSSE", "straße")),
    ({"pattern": "σίσυφος", **ANY}, "log:12:ΣΊΣΥΦΟΣ"),
    *(({"pattern": text, **REGEX}, "log:13:Two") for text in ("wo$", r"[^\r\n]wo\r?$", "hit\\n3|^Two$", "x\\r$|^Two$")),
    ({"pattern": r"z[^\n]*$", **REGEX}, "[no matches]"),
]
ACROSS = ["one\\ntwo", "two\\r$", "(?s)one.*\\r\\ntwo", "(one|two)\\n", r"two\x0a", "one\ntwo"]


async def test_searches_in_a_text(root: Path) -> None:
    (root / "log").write_text(HITS, newline="")
    context = "log-1-1 x\nlog:2:2 hit\nlog-3-3 x\nlog:4:4 hit\nlog-5-5 x\n--\nlog-8-8 x\nlog:9:9 hit\nlog-10-10 x"
    async with client_for(root) as client:
        for arguments, expected in SEARCHES:
            assert await ok(client, "search_text", path="log", **arguments) == expected
        assert await ok(client, "search_text", path="log", pattern="hit", context=1) == context
        pages = await read_all(client, "search_text", path="log", pattern="hit", context=1, max_matches=1)
        assert "".join(pages) == context
        for pattern in ACROSS:
            message = await refused(client, "search_text", path=".", pattern=pattern, regex=True)
            assert message.startswith("no matches; lines are searched one by one")
        assert "one by one" in await refused(client, "search_text", path=".", pattern="one\ntwo")
        for pattern in ("(", "(?=x)", r"(a)\1", r"(\w{100}){100}"):
            message = await refused(client, "search_text", path=".", pattern=pattern, regex=True)
            assert "no valid regular expression" in message
            await ok(client, "search_text", path=".", pattern=pattern)
        (root / "bomb").write_text(("a" * 1990 + "b\n") * 20)
        for pattern in ("(a+)+$", "(a|a)*c", "(a|aa)+$", "(.*a){20}$", "(?:a?){500}a{500}$", "(x+x+)+y"):
            assert await ok(client, "search_text", path="bomb", pattern=pattern, regex=True) == "[no matches]"


async def test_a_search_says_what_it_skipped_and_clips_long_lines(root: Path) -> None:
    (root / "image.bin").write_bytes(b"two\0")
    (root / "latin").write_bytes(b"needle caf\xe9\n")
    (root / "far").write_text("x" * 50_000 + "needle" + "y" * 5000)
    (root / "huge").write_bytes(bytes(10_000_001))
    async with client_for(root, deny=["denied"]) as client:
        (root / "denied").write_text("two")
        skipped = "skipped 1 binary files; skipped 1 files larger than 10000000 bytes; skipped 1 secret files"
        assert await ok(client, "search_text", path=".", pattern="two") == f"./note.txt:2:two\n[{skipped}]"
        for arguments in ({"pattern": "needle"}, {"pattern": "NEEDLE", "ignore_case": True}):
            text = await ok(client, "search_text", path=".", **arguments)
            assert "./latin:1:needle caf\\xe9" in text
            assert re.search(r"\./far:1:\[49875 characters\]…x{125}needley{369}…\[4631 characters\]", text)
        text = await ok(client, "search_text", path="far", pattern="needle", regex=True)
        assert text == "[no matches; skipped 1 line ends after 2000 characters (plain text is searched to the end)]"
        note = "[no matches; 1 searched files are not UTF-8, characters beyond ASCII are not found in them]"
        assert await ok(client, "search_text", path="latin", pattern="café") == note


# A tenth of a second a line, about the worst that the linear regex engine can be made to take.
SLOW = {"path": ".", "pattern": "(?i)(?:[a-zé]{1,100}){1,40}Z", "regex": True}
SLOW_LINE = b"a" * 1_999 + b"\n"
SWAPPER = """
import os, sys
os.chdir(sys.argv[1])
while True:
    try:
        os.rename("dir", "real"); os.symlink(sys.argv[2], "dir")
        os.unlink("dir"); os.rename("real", "dir")
        os.rename("file", "kept"); os.symlink(sys.argv[2] + "/secret.txt", "file")
        os.unlink("file"); os.rename("kept", "file")
    except OSError:
        pass
"""


@pytest.mark.slow
def test_nothing_leaks_while_another_process_swaps_directories_for_symlinks(tmp_path: Path, stdio: Start) -> None:
    root, outside = tmp_path / "top", tmp_path / "outside"
    for top, name, text in ((root / "dir", "in.txt", "inside"), (outside, "OUT.txt", "OUTSIDE")):
        (top / "inner").mkdir(parents=True)
        for file in ("secret.txt", "inner/secret.txt", f"inner/{name}"):
            (top / file).write_text(text)
    (root / "file").write_text("inside")
    (outside / "big.txt").write_bytes(bytes(98_765))
    read = ("read_file dir/secret.txt", "read_file dir/inner/secret.txt", "read_file file", "list_directory dir")
    read += ("directory_tree .", "get_file_info dir/big.txt", "read_media_file dir/secret.txt")
    calls: list[tuple[str, dict[str, Any]]] = [(call.split()[0], {"path": call.split()[1]}) for call in read]
    calls += [("search_files", {"path": "dir", "pattern": "**"}), ("list_directory", {"path": ".", "recursive": True})]
    calls += [("search_text", {"path": ".", "pattern": "SIDE", "ignore_case": True})]
    server = stdio("fs_server.py", str(root))
    for line in calls_during_a_race(server, SWAPPER, [str(root), str(outside)], calls):
        for leak in (b"OUTSIDE", b"OUT.txt", b'big.txt\\",\\"type', b"98765", b"T1VUU0lERQ=="):
            assert leak not in line, line


@pytest.mark.slow
def test_huge_files_and_directories_are_read_in_parts_with_flat_memory(tmp_path: Path, stdio: Start) -> None:
    (tmp_path / "many").mkdir()
    for number in range(200_000):
        os.mknod(tmp_path / "many" / f"entry{number:06}")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(5 << 30)
    with (tmp_path / "log").open("wb") as file:  # 10 GB, of which the disk holds only the two ends
        file.write(b"".join(b"first %d\n" % n for n in range(100_000)))
        file.seek(10 << 30)
        file.write(b"\n" + b"".join(b"last %d\n" % n for n in range(100_000)))
    (tmp_path / "words").write_bytes(b"word\n" * 20_000_000)
    server = stdio("fs_server.py", str(tmp_path))
    before = server.memory()
    assert "5368709120 bytes" in server.call("read_file", path="sparse")["content"][0]["text"]
    for path, arguments in (("sparse", {"head": 3}), ("sparse", {"tail": 3}), ("log", {"offset": 100_000})):
        assert "binary" in server.call("read_file", path=path, **arguments)["content"][0]["text"]
    assert server.text("read_file", path="log", tail=2) == "last 99998\nlast 99999\n"
    assert server.text("read_file", path="words", offset=19_999_999) == "word\n"
    assert server.text("read_file", path="words", tail=10_000_000).startswith("word\n")
    assert "larger than" in server.text("search_text", path=".", pattern="word", glob="words")
    assert server.memory() - before < 60_000_000
    text = server.text("list_directory", path="many")
    assert text.endswith(" of 200000 shown; continue with offset=" + str(text.count("\n")) + "]")
    assert json.loads(server.text("list_directory", path="many", offset=199_999))["path"] == "many/entry199999"
    assert server.text("search_files", path=".", pattern="entry1999[89]9").count("\n") == 1
    assert server.memory() - before < 120_000_000


def test_a_slow_walk_holds_up_nothing_tells_its_progress_and_can_be_cancelled(tmp_path: Path, stdio: Start) -> None:
    for number in range(200):
        (tmp_path / f"d{number}").mkdir()
        (tmp_path / f"d{number}" / "f").write_bytes(SLOW_LINE * 4)
    server = stdio("fs_server.py", str(tmp_path))
    running = server.send("tools/call", {"name": "search_text", "arguments": SLOW, "_meta": {"progressToken": "p"}})
    first = server.start("read_file", path="d0/f", head=1)
    answered, told = False, list[float]()
    while not answered or len(told) < 2:
        message = server.receive()
        assert message.get("id") != running  # the quick call overtakes the slow one
        answered |= message.get("id") == first
        told += [message["params"]["progress"]] if "method" in message else []
    assert told == sorted(set(told))
    server.send("notifications/cancelled", {"requestId": running}, notification=True)

    def cpu() -> float:
        fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    time.sleep(0.5)  # what was under way ends at its next check
    used = cpu()
    time.sleep(1)
    assert cpu() - used < 0.2
    server.start("search_text", **SLOW)  # and closing stdin ends the process while it runs
    assert server.close() == 0


@pytest.mark.slow
def test_a_walk_that_takes_too_long_answers_with_what_it_has(tmp_path: Path, stdio: Start) -> None:
    for number in range(60):
        (tmp_path / f"f{number:02}").write_bytes(SLOW_LINE * 100)
    server = stdio("fs_server.py", str(tmp_path))
    assert "narrower path" in server.text("search_text", **SLOW)


def test_unreadable_entries_are_reported_and_do_not_end_a_walk() -> None:
    with tempfile.TemporaryDirectory() as name:  # another user cannot get into pytest's own directories
        root = Path(name, os.fsdecode(b"caf\xe9"))  # nor does a name that is no text matter
        for directory in ("", "open", "closed"):
            (root / directory).mkdir(exist_ok=True)
            (root / directory / "a.txt").write_text("needle")
        Path(name).chmod(0o755)
        (root / "closed").chmod(0)
        (root / "a.txt").chmod(0)
        become_nobody = "os.setresuid(65534, 65534, 65534) if os.geteuid() == 0 else None"
        script = f"import os, sys; import fs_server; {become_nobody}; sys.argv = sys.argv[1:]; fs_server.main()"

        def call(*words: str) -> str:
            command = [sys.executable, "-c", script, "fs_server.py", str(root), "--call", *words]
            return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False).stdout

        assert " closed/ [unreadable]" in call("directory_tree", "path=.")
        assert "[error: permission denied: a.txt" in call("read_multiple_files", 'paths=["a.txt"]')
        found = call("search_text", "path=.", "pattern=needle")
        assert found == "./open/a.txt:1:needle\n[skipped 1 unreadable directories; skipped 1 unreadable files]\n"
        (root / "closed").chmod(0o755)
