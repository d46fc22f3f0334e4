"""api_server.py through its tools, against real HTTP servers on loopback; a second one stands for the attacker."""

import asyncio
import gc
import gzip
import html
import json
import tracemalloc
from base64 import b64encode
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote

import pytest
from conftest import Clock, ok, refused
from mcp import Client
from upstream_site import HOSTILE, Gate, Site, reply

from api_server import Config, build_server, load_config
from common import ConfigError
from serving import Options

# The connections of a server stay open until they idle; each test has a loop of its own, which ends before.
WARNINGS = ("ResourceWarning", "pytest.PytestUnraisableExceptionWarning")
pytestmark = [pytest.mark.anyio, *(pytest.mark.filterwarnings(f"ignore::{warning}") for warning in WARNINGS)]

KEY = "sk-live/4fQ9+zX71L&mN=opQ22"
ENVIRON = {"KEY": KEY, "BASIC": b64encode(b"aladdin:open sesame 42").decode()}


@pytest.fixture(autouse=True, scope="module")
def _forget_connections() -> Iterator[None]:
    yield
    gc.collect()  # or the warnings would come in some other file's test


def config(tmp_path: Path, apis: dict[str, Any] | str, **environ: str) -> Config:
    path = tmp_path / "apis.json"
    text = apis if isinstance(apis, str) else json.dumps(apis)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    return load_config(path, ENVIRON | environ)


@asynccontextmanager
async def gateway(
    tmp_path: Path, options: Options | None = None, key: str = KEY, clock: Any = None, **entry: Any
) -> AsyncGenerator[tuple[Site, Client]]:
    """A site, and a client of a server with one API, "demo", at /v1 of it; with a clock, its time is the test's."""
    async with Site() as site:
        entry = {"base_url": f"{site.url}/v1", "headers": {"X-API-Key": "${KEY}"}} | entry
        time = {"timer": clock, "sleep": clock.sleep} if clock else {}
        async with Client(build_server(config(tmp_path, {"demo": entry}, KEY=key), options, **time)) as client:
            yield site, client


def split(text: str) -> tuple[str, str]:
    """A result's body and its last line."""
    body, _, last = text.rpartition("\n")
    assert (last[0], last[-1]) == ("[", "]")
    return body, last


async def call(client: Client, endpoint: str = "/echo", **arguments: Any) -> str:
    return await ok(client, "call_api", api="demo", endpoint=endpoint, **arguments)


async def fails(client: Client, endpoint: str = "/echo", **arguments: Any) -> str:
    return await refused(client, "call_api", api="demo", endpoint=endpoint, **arguments)


async def either(client: Client, endpoint: str, **arguments: Any) -> str:
    """All of a result, be it an error or not, as JSON."""
    arguments = {"api": "demo", "endpoint": endpoint} | arguments
    return (await client.call_tool("call_api", arguments)).model_dump_json()


def placed(text: str, attacker: Site, site: Site) -> str:
    text = text.replace("EVIL", f"127.0.0.1:{attacker.port}")
    return text.replace("HOME", f"127.0.0.1:{site.port}").replace("PORT", str(site.port))


# Where EVIL is the attacker's host and HOME that of the API, these mean
# - another host: absolute, without a scheme, encoded, behind a format mark, with backslashes, as user@host
# - a place out of the base path: dot segments, encoded, in path parameters, with blanks, look-alikes, overlong UTF-8
# - another request: line breaks and control characters, also encoded, also in the query; or nothing that is text
HOSTILE_ENDPOINTS = [
    *"""
    http://EVIL/x https://evil.example/x HTTP://EVIL/x http%3A%2F%2FEVIL/x http%253A%252F%252FEVIL/x http:EVIL/x
    file:///etc/passwd javascript:alert(1) //EVIL/x ///EVIL/x /\u200b/EVIL/x /\u200d/EVIL/x /%2FEVIL/x %2f%2fEVIL/x
    %252f%252fEVIL/x \\\\EVIL\\x /\\EVIL/x /%5CEVIL/x @EVIL/x user:pw@EVIL/x %40EVIL/x :80@EVIL/x http://HOME@EVIL/
    http://HOME/v1@127.0.0.1/ http://HOME/v1.evil.example/ http://HOME/v2/x http://HOME/v1/../x http://HOME/v1//EVIL/x

    ../secret /../secret /a/../../secret /.. /./x /%2e%2e/secret /.%2E/secret /%252e%252e/secret
    /%25252e%25252e/secret
    /%25252525252525252525252525252525252525252e%25252525252525252525252525252525252525252e/secret /%2525252541
    /..%2fsecret /..%252fsecret /..\\secret /..;x=1/secret /%c0%ae%c0%ae/secret /%u002e%u002e/secret /．．/secret
    /%EF%BC%8E%EF%BC%8E/secret /。。/secret /‥/secret /.\xad./secret /.\u200b./secret /.\u200d./secret /..／secret
    ／／EVIL/x /..⁄secret /..∕secret /a＼..＼secret /a﹨secret /％2e％2e/secret

    /x%0d%0aX-Evil:%201 /x%250d%250aX-Evil /x?a=%0d%0ab /x%00 /x\ud800 /x#y /x#@EVIL/ /100% /%zz /echo?q=%FF
    /users/{id} /users/{id}/x /users/{}/..
    """.split(),
    " http://EVIL/x", "ht\ttp://EVIL/x", "/.. /secret", "/x\r\nX-Evil: 1", "/x\u2028y", "/x\x85y",
    "/x HTTP/1.1\r\nHost: evil\r\n\r\nGET /secret", "/x ", "/" + "a" * 3000,
    "/%" + "25" * 20 + "2e%" + "25" * 20 + "2e/secret",
]  # fmt: skip
QUOTED = quote("Zürich/東京/👩\u200d🚀/君の名は？")
GOOD_ENDPOINTS: list[tuple[str, str]] = [
    ("users/42", "/v1/users/42"), ("", "/v1"), ("http://HOME/v1/users?page=2", "/v1/users?page=2"),
    ("http://HOME/v1", "/v1"), ("/users?page=2&empty=&q=a%20b+c", "/v1/users?page=2&empty=&q=a%20b%20c"),
    ("/hello world", "/v1/hello%20world"), ("/Zürich/東京/👩\u200d🚀/君の名は？", "/v1/" + QUOTED),
    ('/a[0]"c"<d>|^`', "/v1/a%5B0%5D%22c%22%3Cd%3E%7C%5E%60"),
    *((same, f"/v1{same}") for same in """
    /users/42 / /a/ /users/@me /a..b/...c/v1.2/.well-known /models/x:predict /web/2020/https://example.com/
    /projects/group%2Fname /lang/C%23/what%3F /discount/100%25 /a,b;c=d&e!f$g'h(i)*j+k~l
    """.split()),
]  # fmt: skip


async def test_an_endpoint_arrives_as_it_was_meant_or_is_refused_and_nothing_is_sent(tmp_path: Path) -> None:
    async with Site() as attacker, gateway(tmp_path, rate_limit=len(GOOD_ENDPOINTS) + 2) as (site, client):
        for endpoint in HOSTILE_ENDPOINTS:
            endpoint = placed(endpoint, attacker, site)
            assert "endpoint" in await fails(client, endpoint), ascii(endpoint)
            assert not site.requests + attacker.requests, ascii(endpoint)
        for endpoint, target in GOOD_ENDPOINTS:
            site.on(target.partition("?")[0], reply({"ok": True}))
            answer = await call(client, placed(endpoint, attacker, site), use_cache=False)
            assert (split(answer)[0], site.requests[-1].target) == ('{"ok":true}', target)
        assert f"2 of {len(GOOD_ENDPOINTS) + 2} calls left" in await ok(client, "list_apis")  # a refused one is free


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    *[({"method": m}, "allowed: GET") for m in ("PUT", "TRACE", "GE\u017f", "", " GET")],
    ({"method": "GET /x HTTP/1.1\r\n"}, "method"),
    ({"params": {"a": {"b": 1}}}, "params.a"), ({"params": {"a": "\ud800"}}, "surrogate"),
    ({"params": {"a": "x" * 9000}}, "8,000"), ({"params": {"a": "ü" * 1400}}, "8,000"),
    ({"params": {"a": [1] * 10**6}}, "8,000"), ({"params": {str(n): 1 for n in range(10**5)}}, "8,000"),
    ({"data": "x" * 1_000_001}, "1,000,000"), ({"data": {"a": "\ud800"}}, "data"), ({"params": "nonsense"}, "params"),
    ({"offset": -1}, "offset"), ({"offset": "3"}, "offset"), ({"headers": {"X": "1"}}, "headers: extra inputs"),
    ({"select": "items[*"}, "select"), ({"select": "[" * 400}, "select"), ({"api": "nope"}, "demo"),
]  # fmt: skip
SENT: list[tuple[Any, str | None, str]] = [
    ({"name": "ä", "n": 1}, "application/json", '{"name":"ä","n":1}'), (None, None, ""),
    ("plain text", "text/plain; charset=utf-8", "plain text"), ("null", "text/plain; charset=utf-8", "null"),
    ('{"a": [1]}', "application/json", '{"a":[1]}'),  # some clients write objects as text
    ([1, True, None], "application/json", "[1,true,null]"), (5, "application/json", "5"),
]  # fmt: skip


async def test_data_and_params_are_encoded_and_cannot_leave_their_place_and_bad_ones_are_errors(tmp_path: Path) -> None:
    async with gateway(tmp_path, methods=["GET", "POST"]) as (site, client):
        for data, content_type, body in SENT:
            await call(client, method="post", data=data)
            seen = site.requests[-1]
            assert (seen.headers.get("content-type"), seen.body.decode()) == (content_type, body)
        params = {"q": "a b&c=d#e\r\nX: y", "n": 1, "f": 1.5, "yes": True, "many": ["x", 2], "none": None, "ü": "/../"}
        await call(client, "/echo?z=1", params=params)
        assert site.requests[-1].target == (
            "/v1/echo?z=1&q=a%20b%26c%3Dd%23e%0D%0AX%3A%20y&n=1&f=1.5&yes=true&many=x&many=2&%C3%BC=%2F..%2F"
        )
        for value, segment in ((5, "5"), ("a/b?c d", "a%2Fb%3Fc%20d")):
            site.on(f"/v1/echo/{segment}/x.json", reply({}))
            await call(client, "/echo/{id}/{what}.json", params={"id": value, "what": "x", "page": 2})
            assert site.requests[-1].target == f"/v1/echo/{segment}/x.json?page=2"
        sent = len(site.requests)
        for value in ("..", "../v2", "..%2fv2", "%2e%2e", "", None, ["a", "b"], "a\r\nb", "．．"):
            assert "endpoint" in await fails(client, "/echo/{id}/x", params={"id": value})
        for arguments, reason in BAD_ARGUMENTS:
            assert reason in await refused(client, "call_api", **{"api": "demo", "endpoint": "/echo"} | arguments)
        assert len(site.requests) == sent
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    async with gateway(tmp_path, methods=["POST"], headers=form) as (site, client):
        await call(client, method="POST", data={"a": "x y", "b": [1, True]})
        assert site.requests[0].body == b"a=x+y&b=1&b=true"


def redirect(location: str, status: int = 302) -> bytes:
    return reply("moved", status, {"Location": location})


ESCAPING_REDIRECTS = """
    http://EVIL/v1/echo http://localhost:PORT/v1/echo https://HOME/v1/echo //EVIL/v1/echo http://me:pw@HOME/v1/echo
    /v2/echo ../v2/echo /v1_evil/echo http://HOME@EVIL/v1/echo http://EVIL\\@HOME/v1/echo /v1/%2e%2e/v2/echo
    /v1/%252e%252e/v2/echo /v1/..;/x /v1/%ff \\\\evil file:///etc/passwd http://169.254.169.254/latest/meta-data
    http://127.0.0.1:99999999/ /v1//EVIL/x
""".split()


async def test_five_redirects_are_followed_none_elsewhere_and_no_cookie_or_proxy_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Site() as attacker, gateway(tmp_path) as (site, client):
        monkeypatch.setenv("http_proxy", attacker.url)
        for location in ESCAPING_REDIRECTS:
            location = placed(location, attacker, site)
            site.on("/v1/go", redirect(location))
            assert f"demo redirects to GET {location}" in await fails(client, "/go")  # not: endpoint holds ...
        assert site.count("/v1/go") == len(site.requests) == len(ESCAPING_REDIRECTS)
        for number, status in enumerate((302, 301, 302, 303, 307, 308)):
            site.on(f"/v1/{number}", redirect(f"{number + 1}", status))
        site.on("/v1/6", reply({"end": True}, headers={"Set-Cookie": "session=stolen; Path=/"}))
        assert "stolen" not in await call(client, "/1")
        assert "one too many" in await fails(client, "/0")
        await call(client)
        assert len(site.requests) == len(ESCAPING_REDIRECTS) + 13
        assert all(seen.headers["x-api-key"] == KEY for seen in site.requests)
        assert "cookie" not in site.requests[-1].headers
        assert not attacker.connections


async def test_a_redirect_that_changes_the_method_is_told_or_refused(tmp_path: Path) -> None:
    post: dict[str, Any] = {"endpoint": "/go", "method": "POST", "data": {"a": 1}}
    async with gateway(tmp_path, methods=["GET", "POST"]) as (site, client):
        site.on("/v1/go", redirect("/v1/echo", 303))
        assert "[200 OK to the GET after a redirect; " in await call(client, **post)
        assert "redirected" not in await call(client, "/go")
    async with gateway(tmp_path, methods=["POST"]) as (site, client):
        site.on("/v1/go", [redirect("/v1/echo", 303), redirect("/v1/echo", 307)])
        assert "may have had its effect" in await fails(client, **post)
        assert len(site.requests) == 1
        assert '"body":"{\\"a\\":1}"' in await call(client, **post)


def b64(text: str) -> str:
    return b64encode(text.encode()).decode()


PERCENT = quote(KEY, safe="")
BYTE_BY_BYTE = ("%%%02X", "&#%d;", "&#x%X;", "\\u%04x", "\\\\u%04X", "%02x", "%02X")
ECHOES = [
    # the key as it is; percent-encoded in full or not, several times, as in a form; in HTML and JSON
    KEY, PERCENT, PERCENT.replace("%2F", "%2f"), quote(KEY), quote(PERCENT), PERCENT.replace("%", "%252525"),
    quote_plus(KEY), html.escape(KEY), quote(html.escape(KEY), safe=""), KEY.replace("/", "\\/"),
    *["".join(form % ord(char) for char in KEY) for form in BYTE_BY_BYTE],
    # in base64: also URL-safe, at each alignment, as the password of a pair, percent-encoded, with escaped slashes
    b64(KEY), b64(KEY).replace("+", "-").replace("/", "_").rstrip("="), b64(f":{KEY}:"), b64(f"u:{KEY}.."),
    b64(f"user:{KEY}"), quote(b64(KEY), safe=""), b64(f"{KEY}???").replace("/", "\\/"),
]  # fmt: skip


def leaks(text: str) -> bool:
    """Whether the key, or most of one of its encodings, is in the text."""
    return any(form[2:-5] in text or form[2:-5] in unquote(text) for form in ECHOES)


@pytest.mark.parametrize("echo", ECHOES)
async def test_a_key_that_the_upstream_echoes_is_masked(tmp_path: Path, echo: str) -> None:
    answers = {
        "text": reply(f"you sent {echo} to us", content_type="text/plain"), "name": reply({echo: 1}),
        "json": reply(f'{{"you": {json.dumps(echo)}, "n": 1}}'), "error": reply({"message": f"bad key {echo}"}, 401),
        "header": reply({}, headers={"Link": f'<https://x.example/?key={echo}>; rel="next"'}),
        "redirect": redirect(f"https://x.example/?key={echo}"), "type": reply("x", content_type=f"text/{echo}"),
    }  # fmt: skip
    async with gateway(tmp_path) as (site, client):
        for kind, answer in answers.items():
            site.on("/v1/leak", answer)
            for _ in range(2):  # the second time from the cache
                text = await either(client, f"/leak?{kind}")
                assert not leaks(text)
                assert not leaks(json.loads(text)["content"][0]["text"])
                assert "***" in text or kind == "type"


CUT = [
    *[reply({}, headers={"Link": "-" * n + KEY}) for n in (980, 988)],
    reply("x", content_type="text/" + "a" * 185 + KEY), reply("x", headers={"Content-Encoding": "-" * 25 + KEY}),
    reply("a" * 790 + " " + KEY, 500, content_type="text/plain"), redirect("/v2/" + "a" * 180 + PERCENT),
    redirect("/v1/..;" + KEY), redirect("http://" + KEY.partition("/")[0][3:] + ".key.example/" + KEY),
]  # fmt: skip


async def test_what_is_cut_is_masked_before_and_an_answer_that_hides_a_key_is_withheld(tmp_path: Path) -> None:
    digits, hidden = "123456789012", "".join(f"%{byte:02x}" for byte in KEY.encode())
    async with gateway(tmp_path, key=digits) as (site, client):
        site.on("/v1/n", reply(f'{{"id": "{digits}", "f": {digits}.50, "ok": 1.10}}'))
        assert split(await call(client, "/n"))[0] == '{"id":"***","f":***.50,"ok":1.10}'
        assert "select needs JSON" in await fails(client, "/n", select="ok")
    async with gateway(tmp_path) as (site, client):
        for answer in CUT:
            site.on("/v1/x", answer)
            assert KEY[:7] not in (await either(client, "/x", use_cache=False)).lower()
        site.on("/v1/x", reply({"a": f"1 {hidden}", "b": 2}))
        assert split(await call(client, "/x", use_cache=False))[0] == "***"
        text = f"{KEY[:12]}\\u0041&amp;{KEY[-9:]}"  # what only looks like a key stays
        site.on("/v1/y", reply(f"{text}\nthird", content_type="text/plain"))
        assert split(await call(client, "/y"))[0] == f"{text}\nthird"
    headers = {"Authorization": "Basic ${BASIC}", "X-API-Key": "${KEY}"}
    async with gateway(tmp_path, key="Bearer secret-token-1", headers=headers) as (site, client):
        echo = {"user": "aladdin", "password": "open sesame 42", "pair": "aladdin:open sesame 42"}
        site.on("/v1/auth", reply({"got": "secret-token-1", **echo}))
        assert split(await call(client, "/auth"))[0] == '{"got":"***","user":"aladdin","password":"***","pair":"***"}'
        assert ENVIRON["BASIC"] not in await call(client)
        assert site.requests[1].headers["authorization"] == f"Basic {ENVIRON['BASIC']}"


async def test_no_key_in_lists_errors_audit_lines_logs_or_reprs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    log = tmp_path / "audit"
    async with Site() as site:
        headers = {"X-API-Key": "${KEY}", "X-Secret-Literal": "written-in-the-file", "X-Version": "2022-11-28"}
        checked = config(tmp_path, {"demo": {"base_url": f"{site.url}/v1", "headers": headers}})
        server = build_server(checked, Options(audit_log=log))
        async with Client(server) as client:
            text = await ok(client, "list_apis") + await call(client)
            assert "2022-11-28" in text  # a version is no secret
            site.on("/v1/header", reply({}, headers={"X-Echo": KEY}))
            await call(client, "/header")
            await call(client, params={"q": KEY})
            text += await fails(client, f"//{KEY}") + await refused(client, "call_api", api=KEY, endpoint="/")
    text += log.read_text() + repr(checked) + repr(server) + "".join(capfd.readouterr())
    text += "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith("mcp"))
    assert not leaks(text)
    assert "written-in-the-file" not in text
    assert len(log.read_text().splitlines()) == 6


DIFFERENT_CALLS: dict[str, Sequence[dict[str, Any]]] = {
    "endpoint": [{"endpoint": "/echo"}, {"endpoint": "/echo/"}, {"endpoint": ""}, {"endpoint": "/"}],
    "method": [{"method": "GET"}, {"method": "HEAD"}, {"method": "GET", "use_cache": False}],
    "params": [{"params": {"a": value}} for value in (1, "1", True, 1.0, "true", [1, 2], [2, 1], "1,2")] + [{}],
    "order of equal names": [{"endpoint": "/echo?a=1&a=2"}, {"endpoint": "/echo?a=2&a=1"}],
    "names": [{"params": {"a": "1&b=2"}}, {"params": {"a": 1, "b": 2}}],
    "body": [{"data": value} for value in ({"a": 1}, {"a": "1"}, {"a": True}, 1, True, "1", "x", [1])] + [{}],
}


async def test_different_calls_never_share_an_answer(tmp_path: Path) -> None:
    for calls in DIFFERENT_CALLS.values():
        async with gateway(tmp_path) as (site, client):
            for path in ("/v1", "/v1/", "/v1/echo/"):
                site.on(path, reply({}))
            for arguments in calls:
                assert "cache hit" not in await call(client, **{"endpoint": "/echo"} | arguments)
            assert len(site.requests) == len(calls)


CONTROL: list[tuple[int, dict[str, str], str]] = [
    (200, {}, "300 s"), (200, {"Cache-Control": "public, max-age=60, s-maxage=5"}, "60 s"),
    (200, {"Cache-Control": "max-age=99999999999999999999"}, "300 s"), (200, {"Vary": "Accept"}, "300 s"),
    (200, {"Cache-Control": "private, No-Store"}, ""), (200, {"Cache-Control": "no-cache"}, ""),
    (200, {"Cache-Control": "max-age=soon"}, ""), (200, {"Pragma": "no-cache"}, ""), (200, {"Vary": "*"}, ""),
    (200, {"Cache-Control": "public, max-age=0"}, ""), (203, {}, ""), (404, {}, ""), (500, {}, ""),
]  # fmt: skip


async def test_an_answer_is_kept_as_long_as_both_sides_allow(tmp_path: Path) -> None:
    clock = Clock()
    async with gateway(tmp_path, clock=clock) as (site, client):
        same = f"{site.url}/v1/echo"
        assert "[200 OK; application/json; cache miss, kept for 300 s]" in await call(client, params={"a": 1, "b": 2})
        clock.tick(299)
        assert "cache hit, 299 s old]" in await call(client, same, params={"b": 2, "a": 1})
        assert "cache miss" in await call(client, params={"a": 1, "b": 2}, use_cache=False)
        assert "cache hit, 0 s old" in await call(client, params={"a": 1, "b": 2})
        for number, (status, headers, kept) in enumerate(CONTROL):
            site.on(f"/v1/{number}", reply({"a": 1}, status, headers))
            assert f"kept for {kept}" * bool(kept) in await either(client, f"/{number}")
            await either(client, f"/{number}")
            assert site.count(f"/v1/{number}") == (1 if kept else 2)
        clock.tick(300)
        assert "cache miss" in await call(client, params={"a": 1, "b": 2})


@pytest.mark.parametrize(("method", "status"), [("POST", 200), ("PUT", 404), ("PATCH", 500), ("DELETE", 200)])
async def test_a_write_empties_the_cache_whatever_its_outcome(tmp_path: Path, method: str, status: int) -> None:
    async with gateway(tmp_path, methods=["GET", "HEAD", "OPTIONS", method]) as (site, client):
        site.on("/v1/x", [reply({"version": 1}), reply({"version": 2}), reply({"version": 3})])
        site.on("/v1/x/close", reply({}, status))
        await call(client, "/x")
        for harmless in ("HEAD", "OPTIONS"):
            await call(client, method=harmless)
        assert "cache hit" in await call(client, "/x")
        await either(client, "/x/close", method=method)
        assert '"version":2' in await call(client, "/x")
        # What was under way meanwhile is not kept either, and the next call does not wait for it.
        site.on("/v1/x/slow", gate := Gate(reply({"version": 1})))
        before = asyncio.create_task(call(client, "/x/slow"))
        await gate.arrived.wait()
        await either(client, "/x/close", method=method)
        site.on("/v1/x/slow", reply({"version": 2}))
        assert '"version":2' in await call(client, "/x/slow")
        gate.open.set()
        assert "not cached" in await before


async def test_identical_concurrent_calls_share_one_request_until_all_are_cancelled(tmp_path: Path) -> None:
    for answer in (reply({"a": 1}), reply({"a": 1}, headers={"Vary": "*"}), reply({"a": 1}, 400), None):
        async with gateway(tmp_path, rate_limit=2, rate_period=86_400) as (site, client):
            site.on("/v1/slow", gate := Gate(answer or b""))
            first, *others = [asyncio.create_task(either(client, "/slow")) for _ in range(20)]
            await gate.arrived.wait()
            await asyncio.sleep(0.05)
            first.cancel()  # which does not fail the others
            await asyncio.sleep(0.05)
            if answer:
                gate.open.set()
                assert all('"a":1' in result.replace("\\", "") for result in await asyncio.gather(*others))
            else:
                for task in others:
                    task.cancel()
                await asyncio.wait_for(site.requests[0].gone(), 5)
            assert site.count("/v1/slow") == 1
            site.on("/v1/slow", reply({"b": 2}))
            assert answer or '{"b":2}' in await call(client, "/slow")  # the dead request answers no other call


@pytest.mark.parametrize("select", ["", "numbers"])
async def test_offset_continues_a_cut_body_without_another_request(tmp_path: Path, select: str) -> None:
    async with gateway(tmp_path, Options(max_output=1000), cache_ttl=0) as (site, client):
        document = {"numbers": [*range(500), KEY, *range(500)]}
        site.on("/v1/x", reply(document))
        shown, last = "", "continue with"
        while "continue with" in last:
            text = await call(client, "/x", offset=len(shown), select=select)
            assert len(text) <= 1000
            body, last = split(text)
            shown += body
            assert last.endswith(f"continue with offset={len(shown)}]") == (len(text) > 990)
        masked = {"numbers": [*range(500), "***", *range(500)]}  # also where a page ends
        assert json.loads(shown) == (masked["numbers"] if select else masked)
        assert site.count("/v1/x") == 1
        assert "past the end" in await fails(client, "/x", offset=len(shown), select=select)


async def test_the_length_of_a_result_counts_its_last_line(tmp_path: Path) -> None:
    for size in (20, 250, 300, 600, 1000):
        async with gateway(tmp_path, Options(max_output=size)) as (site, client):
            site.on("/v1/x", reply("x" * 400, headers={"Link": "<a>" * 50}, content_type="text/plain"))
            site.on("/v1/y", reply('{"a": "' + "\\ud800" * 1000 + '"}'))  # the escapes count
            for endpoint, select in (("/x", ""), ("/y", ""), ("/y", "a")):
                text = await call(client, endpoint, select=select)
                assert len(text) <= max(size, 250)  # the status and how to continue are always told
                assert text[0] in 'x{"'


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_two_pages_never_mix_two_versions(tmp_path: Path, method: str) -> None:
    clock, options = Clock(), Options(max_output=600)
    async with gateway(tmp_path, options, clock=clock, cache_ttl=0, methods=["GET", "POST"]) as (site, client):
        site.on("/v1/x", [reply(letter * 800, content_type="text/plain") for letter in "abcd"])
        assert "no longer kept" in await fails(client, "/x", method=method, offset=400)  # there was no first page
        assert "aaa" in await call(client, "/x", method=method)
        clock.tick(299)
        assert "aaa" in await call(client, "/x", method=method, offset=400)
        assert "bbb" in await call(client, "/x", method=method)  # without offset it is asked anew
        assert "bbb" in await call(client, "/x", method=method, offset=400)
        clock.tick(301)
        assert "no longer kept" in await fails(client, "/x", method=method, offset=400)
        site.on("/v1/x", reply("z" * 800, headers={"Cache-Control": "no-store"}, content_type="text/plain"))
        text = await call(client, "/x", method=method)
        assert "forbids to keep the rest: use select" in text
        assert "offset" not in text


async def test_another_callers_call_does_not_change_the_rest_of_a_page(tmp_path: Path) -> None:
    again, rest = {"use_cache": False}, {"offset": 400}
    async with Site() as site:
        site.on("/v1/x", [reply(letter * 800, content_type="text/plain") for letter in "abc"])
        server = build_server(config(tmp_path, {"demo": {"base_url": f"{site.url}/v1"}}), Options(max_output=500))
        async with Client(server) as client:
            steps: list[tuple[str, str, dict[str, Any]]] = [
                ("one", "a", {}), ("two", "b", again), ("one", "a", rest), ("two", "b", rest), ("one", "b", {})
            ]  # fmt: skip
            for who, letter, arguments in steps:
                server.caller.set(who)
                assert letter * 3 in await call(client, "/x", **arguments)
        assert site.count("/v1/x") == 2


async def test_a_call_waits_for_its_token_when_there_is_time_and_else_is_told_the_seconds(tmp_path: Path) -> None:
    clock = Clock()
    async with gateway(tmp_path, clock=clock, rate_limit=2, rate_period=20) as (site, client):
        for number in (0, 0, 1, 1, 2):  # a hit costs no token
            await call(client, f"/echo?n={number}")
        assert clock.slept == [pytest.approx(10)]
    clock = Clock()
    async with gateway(tmp_path, clock=clock, rate_limit=1, rate_period=3600) as (site, client):
        await call(client)
        assert "is used up; try again in 3600 s" in await fails(client, "/other")
        clock.tick(3600)
        await call(client, "/echo?other")
        assert (clock.slept, len(site.requests)) == ([], 2)


async def test_a_long_retry_after_is_an_error_with_the_seconds_and_a_short_one_is_obeyed(tmp_path: Path) -> None:
    for status, asked in ((status, time) for status in (429, 503) for time in ("120", "999999999")):
        clock = Clock()
        async with gateway(tmp_path, clock=clock) as (site, client):
            site.on("/v1/x", reply({"m": "slow down"}, status, {"Retry-After": asked}))
            problem = await fails(client, "/x")
            assert all(part in problem for part in (str(status), f"retry-after: {asked}", "slow down"))
            assert (site.count("/v1/x"), clock.slept) == (1, [])
            site.on("/v1/x", [reply({}, status, {"Retry-After": "7"}), reply({"a": 1})])
            assert '{"a":1}' in await call(client, "/x")
            assert clock.slept == [7]


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "POST", "PATCH"])
async def test_only_idempotent_calls_are_tried_again_with_growing_pauses(tmp_path: Path, method: str) -> None:
    clock, again = Clock(), method not in ("POST", "PATCH")
    async with gateway(tmp_path, clock=clock, methods=[method], rate_limit=50, rate_period=86_400) as (site, client):
        for number, status in enumerate((502, 503, 504)):
            site.on(f"/v1/{status}", [*[reply({}, status, {"Retry-After": "0"})] * 3, reply({"a": 1})])
            failed = '"is_error":true' in await either(client, f"/{status}", method=method)
            assert (failed, site.count(f"/v1/{status}")) == ((False, 4) if again else (True, 1))
            assert len(clock.slept) == 3 * (number + 1) * again
        assert all(0.15 * 2 ** (n % 3) <= pause <= 0.3 * 2 ** (n % 3) for n, pause in enumerate(clock.slept))
        assert f"{50 - len(site.requests)} of 50 calls left" in await ok(client, "list_apis")  # each costs a token


async def test_other_errors_are_not_repeated_and_tell_status_limits_and_body(tmp_path: Path) -> None:
    async with gateway(tmp_path) as (site, client):
        for status in (400, 401, 404, 409, 418, 429, 500, 501, 599):
            headers = {"X-RateLimit-Remaining": "0", "Server": "y"}
            site.on(f"/v1/{status}", reply({"message": "because\nof that", "more": "x" * 5000}, status, headers))
            problem = await fails(client, f"/{status}")
            start = f"demo answered {status}"
            facts = f'to GET /v1/{status}; x-ratelimit-remaining: 0: {{"message":"because\\nof that"'
            assert (problem.startswith(start), facts in problem, len(problem) < 1100) == (True, True, True)
            assert site.count(f"/v1/{status}") == 1


@pytest.mark.parametrize("kind", HOSTILE)
async def test_a_hostile_answer_is_a_clear_error_and_bounded_in_memory(tmp_path: Path, kind: str) -> None:
    async with gateway(tmp_path, timeout=1 if "drip" in kind else 20, methods=["POST"]) as (site, client):
        answer, reason = HOSTILE[kind]
        site.on("/v1/x", answer)
        tracemalloc.start()
        problem = await fails(client, "/x", method="POST", data={"order": 1})
        assert reason in problem
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
        tracemalloc.stop()
        assert site.count("/v1/x") == 1
        # An answer that was lost is no invitation to order again.
        assert ("may have had its effect" in problem) == (reason in ("within 1 s", "broke off"))


NUMBERS = "[1.10, 1e400, -0.0, 1E5, 0.1000000000000000055, 12345678901234567890, -0]"
JSON, ANY, KEPT = "application/json", "application/octet-stream", "cache miss, kept for 300 s"
READABLE: list[tuple[str, bytes | str, str]] = [
    # JSON: compact, numbers as they are, also of another type or by its looks, and as text if it is none
    (JSON, '{ "a" : [ 1, 2 ],\n "b": "\\u00e4 \\n" }', '{"a":[1,2],"b":"ä \\n"}\n[200 OK'),
    (JSON, NUMBERS, NUMBERS.replace(" ", "").replace("-0]", "0]")), ("application/problem+json", "[ 1 ]", "[1]"),
    ("", " [ 1 ] ", "[1]"),
    (JSON, b'\xef\xbb\xbf[ "\xc3\xa4" ]', '["ä"]'), (JSON, '{"a": "\\ud800"}', '{"a":"\\ud800"}'),
    (JSON, '{"a": 1,}', '{"a": 1,}\n[200 OK'), (JSON, '{"a": NaN}', '{"a": NaN}\n[200 OK'),
    (JSON, "[" * 10**5, "[[[[["),
    (JSON, '{"a": 1}\n{"b": 2}', '{"a": 1}\n{"b": 2}\n[200'),
    # text: UTF-8, else in the charset of the header, if that is one
    ("text/plain", "hello\nworld", "hello\nworld\n[200 OK; text/plain"), ("text/html; charset=utf-8", "<p>", "<p>\n["),
    ("text/plain; charset=ISO-8859-1", "Zürich".encode("latin-1"), "Zürich"),
    ("text/plain; charset=utf-16le", "Zürich".encode("utf-16-le"), "Zürich"),
    ("text/plain; charset=ascii", "Zürich", "Zürich"), (f"{JSON}; charset=utf-16", '["Zürich!"]', '["Zürich!"]'),
    ("text/plain; charset=klingon", "Zürich", "Zürich"), ("text/plain; charset=zlib", "Zürich", "Zürich"),
    ("text/plain; charset=punycode", b"\xfc" + b"a-" * 50_000, "a-a-"), (JSON, bytes(range(128, 256)), "\ufffd"),
    ("text/plain; charset=utf-8", b"Z\xfcrich", "Z\ufffdrich"),
    # binary, whatever it claims to be, and nothing
    ("image/png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "[200 OK; image/png; cache miss"), (ANY, "a,b\n1,2", "a,b\n1,2"),
    (ANY, bytes(range(256)), "binary body of 256 bytes"), ("text/plain", bytes(range(256)), "binary body of 256 bytes"),
    (JSON, b"", f"[200 OK; application/json; {KEPT}; no body]"),
]  # fmt: skip
PACKED_JSON = reply(gzip.compress(b"[1, 2]"), headers={"Content-Encoding": "gzip"})


async def test_every_body_is_a_readable_result_with_no_headers_but_pages_and_limits(tmp_path: Path) -> None:
    async with gateway(tmp_path) as (site, client):
        answers = [(reply(body, content_type=kind), expected) for kind, body, expected in READABLE]
        answers += [(PACKED_JSON, "[1,2]\n[200"), (reply("x", 299), "[299; application/json")]
        answers += [(b"HTTP/1.1 204 No Content\r\n\r\n", "[204 No Content; not cached; no body]")]
        headers = {"Set-Cookie": "s=1", "Link": '</b>; rel="next"', "Server": "internal", "X-RateLimit-Remaining": "59"}
        headers["RateLimit"] = "limit=9"
        shown = f'[200 OK; {JSON}; {KEPT}; link: </b>; rel="next"; x-ratelimit-remaining: 59; ratelimit: limit=9]'
        answers += [(reply({}, headers=headers), shown)]
        for number, (answer, expected) in enumerate(answers):
            site.on("/v1/x", answer)
            assert expected in await asyncio.wait_for(call(client, f"/x?{number}"), 5)
            assert site.requests[-1].headers["accept-encoding"] == "gzip"
        assert "[200 OK; application/json; not cached; no body; content-length: " in await call(client, method="HEAD")
        for headers in ({f"X-RateLimit-{n}": "y" * 1000 for n in range(90)}, {f"X-RateLimit-{'y' * 50_000}": "1"}):
            site.on("/v1/x", reply({}, headers=headers))
            assert len(await call(client, "/x", use_cache=False)) < 12_000


A = {"id": 1, "name": "a", "owner": {"login": "x", "tags": ["p", "q"]}, "a.b": 1.10}
B: dict[str, Any] = {"id": 2, "name": None, "owner": {"login": "y", "tags": []}, "extra": True}
PAGE = {"next": "/x?page=2", 'say "é"': "\\"}
DOCUMENT: dict[str, Any] = {"total": 2, "items": [A, B], "empty": [], "grid": [[1, 2], [3], 4], "page": PAGE}

# What JMESPath makes of each, as the package jmespath 1.1.0 answers it.
SELECTS: dict[str, Any] = {
    "total": 2, "items[0].name": "a", "items[-1].id": 2, " items [ 0 ] . id ": 1, "items[*].id": [1, 2],
    "items[*].name": ["a"], "items[*].owner.login": ["x", "y"], "items[*].extra": [True],
    "items[*].owner.tags[*]": [["p", "q"], []], "items[*].owner.tags[0]": ["p"],
    'items[0]."a.b"': 1.1, 'page."say \\"\\u00e9\\""': "\\", "items[*].[id, name]": [[1, "a"], [2, None]],
    "items[*].{id: id, who: owner.login}": [{"id": 1, "who": "x"}, {"id": 2, "who": "y"}],
    'items[*].{id: id, "an extra": extra}': [{"id": 1, "an extra": None}, {"id": 2, "an extra": True}],
    "items[0].{a: id, c: owner.tags[*]}": {"a": 1, "c": ["p", "q"]}, "items[0].owner.[login, tags]": ["x", ["p", "q"]],
    "{n: total, first: items[0].name}": {"n": 2, "first": "a"}, "[total, page.next]": [2, "/x?page=2"],
    "empty[*].anything": [], "items[1].name.anything": None,
    "grid[*][0]": [1, 3], "items[0].owner": {"login": "x", "tags": ["p", "q"]},
}  # fmt: skip
MISSING = [
    ("nothing", """no 'nothing' among ["total","items","empty","grid","page"]"""), ("items.name", "[*] takes each"),
    ("items[5].name", 'no 5 among [{"id":1'), ("empty[0].name", "no 0 among []"), ("items[*].nothing", '"id","name"'),
    ("items[*].{id: id, no: nothing}", '"id","name"'), ("{a: total, b: nothing}", "'nothing'"),
    ("total.x", "no 'x' among 2"), ("total[*]", "no '*' among 2"), ("page[*].x", "no '*' among"),
]  # fmt: skip
WRONG = [
    "items[?id==`1`]", "items[0:1]", "items | [0]", "length(items)", "@", "*", "items.*", "`1`",
    "a || b", "!a", "{}", "[]x", "{total}", "{a: total,}", "{a: }", "{a", "a]b", "a..b", ".a", "a.",
    "{a: {b: total}}", "[" * 250, "{a:" * 160, "[a" + ",a" * 240, "a" + " " * 400 + "b", "a" + "[0]" * 150 + "!",
    "a b", "items[].id", "a.[0]", "a.[]", "{a: total}.a", "[total][0]", "total, page", "$.total", "odd-name", '"open',
    '""', "'raw'", "items.0", "[id", "[a,]", "a[b]", "é", "{1: a}",
]  # fmt: skip


async def test_select_takes_a_bounded_part_of_a_cached_json_body_or_says_what_there_is(tmp_path: Path) -> None:
    async with gateway(tmp_path) as (site, client):
        site.on("/v1/x", reply(DOCUMENT))
        for select in WRONG:
            assert "it takes items[0].name, [-1]" in await fails(client, "/x", select=select), select
        assert not site.requests  # a wrong one is found before
        await call(client, "/x")
        for select, expected in SELECTS.items():
            body, last = split(await call(client, "/x", select=select))
            assert (json.loads(body), "cache hit" in last) == (expected, True), select
        for select, advice in MISSING:
            assert advice in await fails(client, "/x", select=select), select
        assert site.count("/v1/x") == 1
        site.on("/v1/big", reply("[" + ",".join(["{}"] * 200_000) + "]"))
        fields = ",".join(f"f{number}: f" for number in range(50))
        assert "too much" in await fails(client, "/big", select=f"[*].{{{fields}}}")
        for body, kind, reason in (("hello", "text/plain", "plain"), ("", JSON, "no body"), ("{'a'", JSON, "needs")):
            site.on("/v1/none", reply(body, content_type=kind))
            assert reason in await fails(client, "/none", select="a", use_cache=False)
        # The same part several times would make a small select a huge result.
        site.on("/v1/y", reply({"a": "x" * 3_000_000, "b": {"y" * 1_500_000: 1}, "c": 3}))
        for select in ("[a, a, a, a, a]", "{a: b, b: b, c: b, d: b, e: b, f: b, g: b, h: b}"):
            assert "same several times" in await fails(client, "/y", select=select)
        assert split(await call(client, "/y", select="[c, c, c]"))[0] == "[3,3,3]"


async def test_many_calls_to_a_slow_upstream_hold_up_no_hit(tmp_path: Path) -> None:
    async with gateway(tmp_path) as (site, client):
        await call(client)
        site.on("/v1/wait", gate := Gate(reply({"a": 1})))
        calls = [asyncio.create_task(call(client, "/wait", params={"n": n})) for n in range(110)]
        await gate.arrived.wait()
        assert "cache hit" in await asyncio.wait_for(call(client), 5)
        gate.open.set()
        await asyncio.gather(*calls)
        assert (site.count("/v1/wait"), site.connections <= 100) == (110, True)


BAD_ENTRIES: list[tuple[dict[str, Any], str]] = [
    ({"ratelimit": 5}, "ratelimit: Extra inputs are not permitted"),
    ({"rate_limit": "5"}, "rate_limit"), ({"rate_limit": -1}, "rate_limit"), ({"rate_limit": 0}, "rate_limit"),
    ({"rate_period": -1}, "rate_period"), ({"timeout": True}, "timeout"), ({"timeout": 0}, "timeout"),
    ({"timeout": 31}, "timeout"), ({"cache_ttl": -1}, "cache_ttl"), ({"methods": []}, "methods"),
    ({"methods": ["GET", "CONNECT"]}, "methods: 1"), ({"headers": {"X": 5}}, "headers: X"),
    ({"headers": {"X": "${NOT_SET}"}}, "headers: X: NOT_SET is not set"),
    ({"headers": {"X": "${EMPTY}"}}, "headers: X: EMPTY is not set"),
    ({"headers": {"X": "${SHORT}"}}, "headers: X: SHORT is not set, or shorter"),
    ({"headers": {"X": "${1 X}"}}, "headers: 'X'"), ({"headers": {"X": "${KEY"}}, "headers: 'X'"),
    ({"headers": {"X": "${LINES}"}}, "headers: 'X'"), ({"headers": {"X": ""}}, "headers: 'X'"),
    ({"headers": {"X": " y"}}, "headers: 'X'"), ({"headers": {"X Y": "z"}}, "headers: 'X Y'"),
]  # fmt: skip
BAD_URLS = """
    h http://h:0 http://h:65536 ftp://h file:///etc //h http:// http:///x http://u:p@h http://@h http://h?x=1
    http://h#x http://h/.. http://h/%2e%2e/x http://h/a/../b http://h\\x http://h/${KEY} http://h:x http://h//x
    javascript:alert(1) http://[::1
""".split()
HOST = {"base_url": "http://h"}
BAD_CONFIGS: list[tuple[Any, str]] = [
    ("{", "Invalid JSON"), ("\udcff", "Invalid JSON"), ("[" * 100_000, "Invalid JSON"), ([], "an object"),
    ({}, "at least 1"), ({f"a{n}": HOST for n in range(61)}, "at most 60"), ({"a": 5}, "a: "),
    ('{"a": {"base_url": "http://h", "timeout": NaN}}', "a: timeout"),
    ({"a\nb": {}}, "a b: base_url"), ({"a": {}}, "a: base_url"),
    *[({"a": HOST | entry}, f"a: {place}") for entry, place in BAD_ENTRIES],
    *[({"a": {"base_url": url}}, "a: base_url: must be http://") for url in [*BAD_URLS, '', 'http://h/ x', ' http://h', 'http://h/\r\n']],
]  # fmt: skip


def test_a_mistake_in_the_file_is_one_line_that_says_where(tmp_path: Path) -> None:
    environ = {"EMPTY": "", "SHORT": "abc", "LINES": f"{KEY}\r\nX: y"}
    for apis, message in BAD_CONFIGS:
        with pytest.raises(ConfigError) as caught:
            build_server(config(tmp_path, apis, **environ))
        problem = str(caught.value)
        assert message in problem
        assert not any(part in problem for part in ("\n", KEY))
    for url in ("http://h", "https://h/", "http://h:8080/a/b/", "http://[::1]:80/v1", "https://bücher.example/.known"):
        build_server(config(tmp_path, {"a": {"base_url": url}}))
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "nope.json", {})


async def test_the_tools_are_small_described_and_annotated_and_list_apis_shows_no_header(tmp_path: Path) -> None:
    for methods, hints in ((["GET", "HEAD"], (True, False)), (["GET", "POST"], (False, True))):
        async with gateway(tmp_path, methods=methods, description="The demo") as (site, client):
            listed = await client.list_tools()
            assert len(listed.model_dump_json(by_alias=True, exclude_none=True)) < 3000
            assert [tool.name for tool in listed.tools] == ["list_apis", "call_api"]
            assert all("description" in schema for schema in listed.tools[1].input_schema["properties"].values())
            assert (annotations := listed.tools[1].annotations)
            assert (annotations.read_only_hint, annotations.destructive_hint) == hints
            [entry] = json.loads(await ok(client, "list_apis"))["apis"]
            shown = {"name": "demo", "description": "The demo", "base_url": f"{site.url}/v1", "methods": methods}
            assert entry == shown | {"limits": "no limit", "cache_ttl": 300.0, "describe_api": False}
