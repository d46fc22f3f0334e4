"""api_server.py through its tools, against real HTTP servers on loopback; a second one stands for the attacker."""

import asyncio
import base64
import gzip
import html
import json
import tracemalloc
import urllib.parse
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from common import ConfigError, Options
from conftest import PROJECT, Clock, Stdio, ok, refused
from mcp import Client
from upstream_site import Seen, Site, reply

from api_server import Config, build_server, load_config

pytestmark = pytest.mark.anyio

KEY = "sk-live/4fQ9+zX71L&mN=opQ22"
ENVIRON = {"KEY": KEY, "BASIC": base64.b64encode(b"aladdin:open sesame 42").decode()}


def config(tmp_path: Path, apis: dict[str, Any] | str, **environ: str) -> Config:
    path = tmp_path / "apis.json"
    path.write_text(apis if isinstance(apis, str) else json.dumps(apis), encoding="utf-8")
    return load_config(path, ENVIRON | environ)


@asynccontextmanager
async def gateway(
    tmp_path: Path, site: Site, options: Options | None = None, key: str = KEY, **entry: Any
) -> AsyncGenerator[Client]:
    """A client of a server with one API, "demo", at /v1 of the site."""
    entry = {"base_url": f"{site.url}/v1", "headers": {"X-API-Key": "${KEY}"}} | entry
    async with Client(build_server(config(tmp_path, {"demo": entry}, KEY=key), options)) as client:
        yield client


def split(text: str) -> tuple[str, str]:
    """A result's body and its last line."""
    body, _, last = text.rpartition("\n")
    assert last.startswith("[")
    assert last.endswith("]")
    return body, last


async def call(client: Client, endpoint: str = "/echo", **arguments: Any) -> str:
    return await ok(client, "call_api", api="demo", endpoint=endpoint, **arguments)


async def fails(client: Client, endpoint: str = "/echo", **arguments: Any) -> str:
    return await refused(client, "call_api", api="demo", endpoint=endpoint, **arguments)


# ---------------------------------------------------------------------------------------------------- the boundary

HOSTILE_ENDPOINTS = {
    "absolute": "http://127.0.0.1:{port}/x",
    "absolute https": "https://evil.example/x",
    "absolute, upper case": "HTTP://127.0.0.1:{port}/x",
    "absolute, encoded": "http%3A%2F%2F127.0.0.1:{port}/x",
    "absolute, encoded twice": "http%253A%252F%252F127.0.0.1:{port}/x",
    "scheme without slashes": "http:127.0.0.1:{port}/x",
    "scheme with a blank": " http://127.0.0.1:{port}/x",
    "scheme with a tab": "ht\ttp://127.0.0.1:{port}/x",
    "file": "file:///etc/passwd",
    "javascript": "javascript:alert(1)",
    "host": "//127.0.0.1:{port}/x",
    "host, three slashes": "///127.0.0.1:{port}/x",
    "host, behind a format mark": "/\u200b/127.0.0.1:{port}/x",
    "host, encoded": "/%2F127.0.0.1:{port}/x",
    "host, both encoded": "%2f%2f127.0.0.1:{port}/x",
    "host, encoded twice": "%252f%252f127.0.0.1:{port}/x",
    "host, backslashes": "\\\\127.0.0.1:{port}\\x",
    "host, mixed slashes": "/\\127.0.0.1:{port}/x",
    "host, encoded backslash": "/%5C127.0.0.1:{port}/x",
    "userinfo": "@127.0.0.1:{port}/x",
    "userinfo with name": "user:pw@127.0.0.1:{port}/x",
    "userinfo encoded": "%40127.0.0.1:{port}/x",
    "port": ":80@127.0.0.1:{port}/x",
    "parent": "../secret",
    "parent, absolute": "/../secret",
    "parent, in the middle": "/a/../../secret",
    "parent, at the end": "/..",
    "here": "/./x",
    "parent, encoded": "/%2e%2e/secret",
    "parent, half encoded": "/.%2E/secret",
    "parent, encoded twice": "/%252e%252e/secret",
    "parent, encoded three times": "/%25252e%25252e/secret",
    "parent, encoded many times": "/%" + "25" * 20 + "2e%" + "25" * 20 + "2e/secret",
    "encoded too often": "/%2525252541",
    "parent, encoded slash": "/..%2fsecret",
    "parent, encoded slash twice": "/..%252fsecret",
    "parent, backslash": "/..\\secret",
    "parent, path parameter": "/..;x=1/secret",
    "parent, blanks": "/.. /secret",
    "parent, overlong UTF-8": "/%c0%ae%c0%ae/secret",
    "parent, IIS": "/%u002e%u002e/secret",
    "parent, full width": "/．．/secret",
    "parent, full width, encoded": "/%EF%BC%8E%EF%BC%8E/secret",
    "parent, ideographic": "/。。/secret",
    "parent, leaders": "/‥/secret",
    "parent, soft hyphen": "/.\u00ad./secret",
    "parent, zero width": "/.\u200b./secret",
    "slash, full width": "/..／secret",
    "slash, full width host": "／／127.0.0.1:{port}/x",
    "slash, fraction": "/..⁄secret",
    "slash, division": "/..∕secret",
    "backslash, full width": "/a＼..＼secret",
    "backslash, small": "/a﹨secret",
    "percent, full width": "/％2e％2e/secret",
    "CR LF": "/x\r\nX-Evil: 1",
    "CR LF, encoded": "/x%0d%0aX-Evil:%201",
    "CR LF, encoded twice": "/x%250d%250aX-Evil",
    "CR LF in the query": "/x?a=%0d%0ab",
    "request smuggling": "/x HTTP/1.1\r\nHost: evil\r\n\r\nGET /secret",
    "NUL": "/x%00",
    "line separator": "/x\u2028y",
    "next line": "/x\u0085y",
    "lone surrogate": "/x\ud800",
    "fragment": "/x#y",
    "fragment host": "/x#@127.0.0.1:{port}/",
    "bad percent": "/100%",
    "bad percent digits": "/%zz",
    "too long": "/" + "a" * 3000,
    "bytes that are not UTF-8 in the query": "/echo?q=%FF",
}


@pytest.mark.parametrize("endpoint", HOSTILE_ENDPOINTS.values(), ids=HOSTILE_ENDPOINTS)
async def test_a_hostile_endpoint_is_refused_and_nothing_is_sent(tmp_path: Path, endpoint: str) -> None:
    async with Site() as site, Site() as attacker, gateway(tmp_path, site, rate_limit=2) as client:
        problem = await fails(client, endpoint.replace("{port}", str(attacker.port)))
        assert "endpoint" in problem
        assert not site.requests
        assert not attacker.requests
        assert "2 of 2 calls left" in await ok(client, "list_apis")  # a refused call costs nothing


GOOD_ENDPOINTS = {
    "plain": ("/users/42", "/v1/users/42"),
    "without slash": ("users/42", "/v1/users/42"),
    "the base itself": ("", "/v1"),
    "the base with its slash": ("/", "/v1/"),
    "trailing slash": ("/users/", "/v1/users/"),
    "query": ("/users?page=2&empty=&q=a%20b+c", "/v1/users?page=2&empty=&q=a%20b%20c"),
    "dots in names": ("/a..b/...c/v1.2/.well-known", "/v1/a..b/...c/v1.2/.well-known"),
    "at sign": ("/users/@me", "/v1/users/@me"),
    "colon": ("/models/x:predict", "/v1/models/x:predict"),
    "URL inside": ("/web/2020/https://example.com/", "/v1/web/2020/https://example.com/"),
    "encoded slash": ("/projects/group%2Fname", "/v1/projects/group%2Fname"),
    "encoded hash and question mark": ("/lang/C%23/what%3F", "/v1/lang/C%23/what%3F"),
    "encoded percent": ("/discount/100%25", "/v1/discount/100%25"),
    "blank": ("/hello world", "/v1/hello%20world"),
    "unicode": ("/wiki/Zürich/東京/ñ/👩\u200d🚀", "/v1/wiki/" + urllib.parse.quote("Zürich/東京/ñ/👩\u200d🚀")),
    "full-width question mark": ("/wiki/君の名は？", "/v1/wiki/" + urllib.parse.quote("君の名は？")),
    "punctuation": ("/a,b;c=d&e!f$g'h(i)*j+k~l", "/v1/a,b;c=d&e!f$g'h(i)*j+k~l"),
    "brackets and quotes": ('/a[0]{b}"c"<d>|^`', "/v1/a%5B0%5D%7Bb%7D%22c%22%3Cd%3E%7C%5E%60"),
}


@pytest.mark.parametrize(("endpoint", "target"), GOOD_ENDPOINTS.values(), ids=GOOD_ENDPOINTS)
async def test_an_ordinary_endpoint_arrives_as_it_was_meant(tmp_path: Path, endpoint: str, target: str) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        site.on(target.partition("?")[0], reply({"ok": True}))
        assert split(await call(client, endpoint))[0] == '{"ok":true}'
        assert [seen.target for seen in site.requests] == [target]


@pytest.mark.parametrize(
    "method", ["POST", "DELETE", "TRACE", "CONNECT", "GET /x HTTP/1.1\r\n", "GE\u017f", "", " GET", "PO\u017fT"]
)
async def test_a_method_that_is_not_allowed_is_never_sent(tmp_path: Path, method: str) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        await fails(client, method=method)
        assert not site.requests


async def test_an_allowed_method_is_sent_with_its_body(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site, methods=["GET", "POST", "DELETE"]) as client:
        await call(client, method="POST", data={"name": "ä", "n": 1})
        await call(client, method="delete")
        await call(client, method="POST", data="plain text")
        await call(client, method="POST", data=[1, True, None])
        bodies = [(seen.method, seen.headers.get("content-type"), seen.body.decode()) for seen in site.requests]
        assert bodies == [
            ("POST", "application/json", '{"name":"ä","n":1}'),
            ("DELETE", None, ""),
            ("POST", "text/plain; charset=utf-8", "plain text"),
            ("POST", "application/json", "[1,true,null]"),
        ]


async def test_a_form_is_sent_where_the_file_says_so(tmp_path: Path) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    async with Site() as site, gateway(tmp_path, site, methods=["POST"], headers=form) as client:
        await call(client, method="POST", data={"a": "x y", "b": [1, True]})
        assert site.requests[0].body == b"a=x+y&b=1&b=true"


async def test_params_are_encoded_and_cannot_leave_the_query(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        params = {"q": "a b&c=d#e\r\nX: y", "n": 1, "f": 1.5, "yes": True, "many": ["x", 2], "none": None, "ü": "/../"}
        await call(client, "/echo?z=1", params=params)
        assert site.requests[0].target == (
            "/v1/echo?z=1&q=a%20b%26c%3Dd%23e%0D%0AX%3A%20y&n=1&f=1.5&yes=true&many=x&many=2&%C3%BC=%2F..%2F"
        )
        assert "x: y" not in site.requests[0].headers


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"params": {"a": {"b": 1}}}, "params.a"),
        ({"params": {"a": "\ud800"}}, "surrogate"),
        ({"params": {"a": "x" * 9000}}, "8,000"),
        ({"params": {"a": "ü" * 3000}}, "8,000"),
        ({"params": {"a": [1] * 1_000_000}}, "8,000"),
        ({"params": {str(number): 1 for number in range(100_000)}}, "8,000"),
        ({"endpoint": "/echo?a=1", "params": {"a": 2}}, "give it once"),
        ({"data": "x" * 1_000_001}, "1,000,000"),
        ({"data": {"a": "\ud800"}}, "data"),
        ({"params": "nonsense"}, "params"),
        ({"offset": -1}, "offset"),
        ({"offset": "3"}, "offset"),
        ({"headers": {"X-Evil": "1"}}, "unknown argument: headers"),
        ({"select": "items[*"}, "select"),
        ({"select": "a..b"}, "select"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_bad_arguments_are_errors_and_nothing_is_sent(
    tmp_path: Path, arguments: dict[str, Any], reason: str
) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        assert reason in await fails(client, **arguments)
        assert not site.requests


async def test_an_unknown_api_is_an_error_that_names_the_known_ones(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        assert "demo" in await refused(client, "call_api", api="nope", endpoint="/x")
        assert "demo" in await refused(client, "describe_api", api="nope")


# ------------------------------------------------------------------------------------------------------- redirects


def redirect(location: str, status: int = 302) -> bytes:
    return reply("moved", status, {"Location": location})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_below_the_base_path_is_followed(tmp_path: Path, status: int) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        site.on("/v1/old", redirect("echo?x=1", status))
        assert '"/v1/echo?x=1"' in await call(client, "/old")
        assert site.requests[1].headers["x-api-key"] == KEY


ESCAPING_REDIRECTS = {
    "other port": "http://127.0.0.1:{port}/v1/echo",
    "other name for the same host": "http://localhost:{same}/v1/echo",
    "other scheme": "https://127.0.0.1:{same}/v1/echo",
    "host only": "//127.0.0.1:{port}/v1/echo",
    "userinfo": "http://me:pw@127.0.0.1:{same}/v1/echo",
    "userinfo that looks like the origin": "http://127.0.0.1:{same}@127.0.0.1:{port}/v1/echo",
    "backslash": "http://127.0.0.1:{port}\\@127.0.0.1:{same}/v1/echo",
    "out of the base path": "/v2/echo",
    "out of the base path, relative": "../v2/echo",
    "sibling of the base path": "/v1_evil/echo",
    "encoded dots": "/v1/%2e%2e/v2/echo",
    "encoded twice": "/v1/%252e%252e/v2/echo",
    "file": "file:///etc/passwd",
    "metadata": "http://169.254.169.254/latest/meta-data",
    "no URL": "http://[::1",
    "bad port": "http://127.0.0.1:99999999/",
}


@pytest.mark.parametrize("location", ESCAPING_REDIRECTS.values(), ids=ESCAPING_REDIRECTS)
async def test_a_redirect_elsewhere_ends_the_call_and_sends_nothing_there(tmp_path: Path, location: str) -> None:
    async with Site() as site, Site() as attacker, gateway(tmp_path, site) as client:
        location = location.replace("{port}", str(attacker.port)).replace("{same}", str(site.port))
        site.on("/v1/go", redirect(location))
        problem = await fails(client, "/go")
        if location.startswith(("http://127.0.0.1:", "//127")) and "@" not in location and "9999" not in location:
            assert f"http://127.0.0.1:{attacker.port}" in problem  # the origin is named
        assert [seen.path for seen in site.requests] == ["/v1/go"]
        assert not attacker.requests
        assert not attacker.connections


async def test_an_error_about_a_redirect_speaks_of_the_redirect(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        for location in ("/v2/echo", "/v1/..;/x", "\\\\evil", "/v1/%ff", "http://[::1"):
            site.on("/v1/go", redirect(location))
            problem = await fails(client, "/go")
            assert problem.startswith("demo redirects to ")
            assert "endpoint holds" not in problem


async def test_a_redirect_that_changes_the_method_is_told_on_every_page(tmp_path: Path) -> None:
    async with (
        Site() as site,
        gateway(tmp_path, site, Options(max_output=600), methods=["GET", "PUT", "POST"]) as client,
    ):
        site.on("/v1/users", redirect("/v1/users/", 301))
        site.on("/v1/users/", reply("z" * 800, content_type="text/plain"))
        for method in ("PUT", "POST"):
            for offset in (0, 300):
                text = await call(client, "/users", method=method, data={"a": 1}, offset=offset)
                assert f"the {method} was redirected: this answers GET /v1/users/" in text
        assert "redirected" not in await call(client, "/users")


async def test_five_redirects_are_followed_and_a_sixth_is_not(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        for hop in range(1, 7):
            site.on(f"/v1/{hop}", redirect(f"/v1/{hop - 1}"))
        site.on("/v1/0", reply({"arrived": True}))
        assert "arrived" in await call(client, "/5")
        assert "more than 5 times" in await fails(client, "/6")


async def test_a_redirect_never_turns_a_call_into_a_method_that_is_not_allowed(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site, methods=["POST"]) as client:
        site.on("/v1/form", redirect("/v1/echo", 303))
        assert "not allowed" in await fails(client, "/form", method="POST", data={"a": 1})
        site.on("/v1/moved", redirect("/v1/echo", 307))
        await call(client, "/moved", method="POST", data={"a": 1})
        assert [(seen.method, seen.path) for seen in site.requests[1:]] == [("POST", "/v1/moved"), ("POST", "/v1/echo")]
        assert site.requests[-1].body == b'{"a":1}'


async def test_a_proxy_in_the_environment_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Site() as site, Site() as attacker, gateway(tmp_path, site) as client:
        for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy"):
            monkeypatch.setenv(name, attacker.url)
        await call(client)
        assert site.requests
        assert not attacker.connections


async def test_cookies_are_not_kept_between_calls(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        site.on("/v1/login", reply({"ok": 1}, headers={"Set-Cookie": "session=stolen; Path=/"}))
        assert "stolen" not in await call(client, "/login")
        await call(client)
        assert "cookie" not in site.requests[1].headers


# -------------------------------------------------------------------------------------------------------- the keys

ECHOES: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "percent-encoded": lambda key: urllib.parse.quote(key, safe=""),
    "percent-encoded, lower case": lambda key: urllib.parse.quote(key, safe="").replace("%2F", "%2f"),
    "percent-encoded, slash kept": urllib.parse.quote,
    "percent-encoded twice": lambda key: urllib.parse.quote(urllib.parse.quote(key, safe=""), safe=""),
    "every byte percent-encoded": lambda key: "".join(f"%{byte:02X}" for byte in key.encode()),
    "form": urllib.parse.quote_plus,
    "HTML": html.escape,
    "HTML numbers": lambda key: "".join(f"&#{ord(c)};" for c in key),
    "unicode escapes": lambda key: "".join(f"\\u{ord(c):04x}" for c in key),
    "unicode escapes twice": lambda key: "".join(f"\\\\u{ord(c):04X}" for c in key),
    "escaped slashes": lambda key: key.replace("/", "\\/"),
    "base64": lambda key: base64.b64encode(key.encode()).decode(),
    "base64, URL-safe": lambda key: base64.urlsafe_b64encode(key.encode()).decode().rstrip("="),
    "base64, one byte in": lambda key: base64.b64encode(b":" + key.encode() + b":").decode(),
    "base64, two bytes in": lambda key: base64.b64encode(b"u:" + key.encode() + b"..").decode(),
    "base64 of Basic": lambda key: base64.b64encode(f"user:{key}".encode()).decode(),
    "base64, percent-encoded": lambda key: urllib.parse.quote(base64.b64encode(key.encode()).decode(), safe=""),
    "hexadecimal": lambda key: key.encode().hex(),
    "hexadecimal, upper case": lambda key: key.encode().hex().upper(),
}


def leaks(text: str, secret: str = KEY) -> bool:
    """Whether the secret, or most of one of its encodings, is in the text."""
    forms = {encode(secret) for encode in ECHOES.values()}
    return any(form[2:-5] in text for form in forms) or any(form[2:-5] in urllib.parse.unquote(text) for form in forms)


@pytest.mark.parametrize("encode", ECHOES.values(), ids=ECHOES)
@pytest.mark.parametrize("kind", ["text/plain", "application/json", "error", "HTML error", "header", "key"])
async def test_a_key_that_the_upstream_echoes_is_masked(
    tmp_path: Path, encode: Callable[[str], str], kind: str
) -> None:
    echo = encode(KEY)
    answers = {
        "text/plain": reply(f"you sent {echo} to us", content_type="text/plain"),
        "application/json": reply(f'{{"you": {json.dumps(echo)}, "n": 1}}'),
        "error": reply({"message": f"bad key {echo}"}, 401),
        "HTML error": reply(f"<h1>bad key {echo}</h1>" + "x" * 1000, 500, content_type="text/html"),
        "header": reply({}, headers={"Link": f'<https://x.example/?key={echo}>; rel="next"'}),
        "key": reply({echo: 1}),
    }
    async with Site() as site, gateway(tmp_path, site) as client:
        site.on("/v1/leak", answers[kind])
        for _ in range(2):  # the second time from the cache
            result = await client.call_tool("call_api", {"api": "demo", "endpoint": "/leak"})
            text = result.model_dump_json()
            assert not leaks(text)
            assert not leaks(json.loads(text)["content"][0]["text"])
            assert "***" in text


@pytest.mark.parametrize(
    "answer",
    [
        *[reply({}, headers={"Link": "-" * n + KEY}) for n in (980, 988)],
        reply("x", content_type="text/" + "a" * 185 + KEY),
        reply("x", content_type="text/" + KEY),
        reply("x", headers={"Content-Encoding": "-" * 25 + KEY}),
        redirect("/v2/" + "a" * 180 + urllib.parse.quote(KEY, safe="")),
        redirect("/v1/..;" + KEY),
        redirect("http://" + KEY.partition("/")[0].partition("-")[2] + ".key.example/" + KEY),
    ],
    ids=["link", "link 2", "type", "type 2", "encoding", "redirect", "dot segment", "host"],
)
async def test_what_is_cut_is_masked_before(tmp_path: Path, answer: bytes) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        site.on("/v1/x", answer)
        result = await client.call_tool("call_api", {"api": "demo", "endpoint": "/x"})
        assert KEY[:7].lower() not in result.model_dump_json().lower()


async def test_a_host_is_not_shown_if_the_redirect_holds_a_key(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site, key="MixedCaseKey") as client:
        site.on("/v1/x", redirect("http://MixedCaseKey.evil.example/"))
        assert "mixedcasekey" not in (await fails(client, "/x")).lower()


async def test_masked_json_is_still_json_and_can_be_selected_from(tmp_path: Path) -> None:
    digits = "123456789012"
    async with Site() as site, gateway(tmp_path, site, key=digits) as client:
        site.on("/v1/n", reply(f'{{"id": {digits}, "f": {digits}.50, "list": [{digits}], "ok": 1.10}}'))
        body, _ = split(await call(client, "/n"))
        assert body == '{"id":"***","f":"***","list":["***"],"ok":1.10}'
        assert split(await call(client, "/n", select="{ok,id}"))[0] == '{"ok":1.10,"id":"***"}'


async def test_an_error_tells_what_is_left_of_the_upstreams_limits(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        headers = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1700000000", "Link": "<x>", "Server": "y"}
        site.on("/v1/x", reply({"m": "no"}, 403, headers))
        problem = await fails(client, "/x")
        assert problem == (
            "demo answered 403 Forbidden to GET /v1/x; x-ratelimit-remaining: 0; x-ratelimit-reset: 1700000000: "
            '{"m":"no"}'
        )


async def test_a_basic_credential_is_masked_decoded_too(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site, headers={"Authorization": "Basic ${BASIC}"}) as client:
        site.on("/v1/auth", reply({"user": "aladdin", "password": "open sesame 42", "pair": "aladdin:open sesame 42"}))
        text = await call(client, "/auth")
        assert "sesame" not in text
        assert ENVIRON["BASIC"] not in await call(client)
        assert site.requests[1].headers["authorization"] == f"Basic {ENVIRON['BASIC']}"


async def test_the_parts_of_a_value_are_masked_by_themselves(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site, key="Bearer secret-token-1") as client:
        site.on("/v1/x", reply({"got": "secret-token-1", "user": "somebody-else"}))
        assert split(await call(client, "/x"))[0] == '{"got":"***","user":"somebody-else"}'


async def test_a_key_across_the_border_of_two_pages_is_masked(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site, Options(max_output=600)) as client:
        site.on("/v1/leak", reply("a" * 290 + KEY + "b" * 1000, content_type="text/plain"))
        shown = ""
        while True:
            text = await call(client, "/leak", offset=len(shown))
            body, last = split(text)
            shown += body
            if "continue" not in last:
                break
        assert shown == "a" * 290 + "***" + "b" * 1000


async def test_no_key_in_lists_errors_audit_lines_logs_or_reprs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    log = tmp_path / "audit"
    async with Site() as site:
        headers = {"X-API-Key": "${KEY}", "X-Secret-Literal": "written-in-the-file", "X-Version": "2022-11-28"}
        entry = {"demo": {"base_url": f"{site.url}/v1", "headers": headers}, "down": {"base_url": "http://127.0.0.1:1"}}
        checked = config(tmp_path, entry)
        server = build_server(checked, Options(audit_log=log))
        async with Client(server) as client:
            text = await ok(client, "list_apis") + await call(client)
            assert "2022-11-28" in text  # a version is no secret
            site.on("/v1/header", reply({}, headers={"X-Echo": KEY}))
            await call(client, "/header")
            text += await fails(client, f"//{KEY}") + await refused(client, "call_api", api="down", endpoint="/")
            await call(client, params={"q": KEY})
            text += await fails(client, KEY) + await refused(client, "call_api", api=KEY, endpoint="/")
    text += log.read_text() + repr(checked) + repr(server) + checked.check()
    text += "".join(capfd.readouterr())
    assert not leaks(text)
    assert "written-in-the-file" not in text
    assert len(log.read_text().splitlines()) == 8
    messages = [record.getMessage() for record in caplog.records if not record.name.startswith("mcp")]
    assert not leaks("\n".join(messages))


def test_masking_leaves_ordinary_text_alone(tmp_path: Path) -> None:
    mask = config(tmp_path, {"demo": {"base_url": "http://h", "headers": {"A": "${KEY}", "B": "${BASIC}"}}}).mask
    for text in (
        "",
        "sk-live",
        "aladdin",
        "a%2Fb\\u0041&amp;",
        json.dumps({"a": [1.5, "x" * 1000]}),
        KEY[:12],
        KEY[-9:],
    ):
        assert mask(text) == text


# ------------------------------------------------------------------------------------------------------- the cache


@asynccontextmanager
async def clocked(tmp_path: Path, site: Site, **entry: Any) -> AsyncGenerator[tuple[Client, Clock]]:
    clock = Clock()
    checked = config(tmp_path, {"demo": {"base_url": f"{site.url}/v1"} | entry})
    async with Client(build_server(checked, timer=clock, sleep=clock.sleep)) as client:
        yield client, clock


async def test_the_trailer_tells_hit_from_miss_with_age_and_time_left(tmp_path: Path) -> None:
    async with Site() as site, clocked(tmp_path, site, cache_ttl=300) as (client, clock):
        assert "[200 OK; application/json; cache miss, kept for 300 s]" in await call(client)
        clock.tick(12)
        assert "cache hit, 12 s old, 288 s left]" in await call(client)
        clock.tick(287)
        assert "cache hit, 299 s old, 1 s left]" in await call(client)
        clock.tick(1)
        assert "cache miss" in await call(client)
        assert len(site.requests) == 2


async def test_a_hit_costs_no_token(tmp_path: Path) -> None:
    async with Site() as site, clocked(tmp_path, site, rate_limit=1, rate_period=86_400) as (client, _):
        for _ in range(5):
            await call(client)
        assert "0 of 1 calls left" in await ok(client, "list_apis")
        assert "try again in" in await fails(client, "/other")
        assert len(site.requests) == 1


DIFFERENT_CALLS: dict[str, Sequence[dict[str, Any]]] = {
    "endpoint": [{"endpoint": "/echo"}, {"endpoint": "/echo/"}],
    "base path": [{"endpoint": ""}, {"endpoint": "/"}],
    "method": [{"method": "GET"}, {"method": "HEAD"}, {"method": "GET", "use_cache": False}],
    "params": [{"params": {"a": 1}}, {"params": {"a": "1"}}, {"params": {"a": True}}, {"params": {"a": 1.0}}, {}],
    "true as text": [{"params": {"a": True}}, {"params": {"a": "true"}}],
    "lists": [{"params": {"a": [1, 2]}}, {"params": {"a": [2, 1]}}, {"params": {"a": "1,2"}}],
    "order of equal names": [{"endpoint": "/echo?a=1&a=2"}, {"endpoint": "/echo?a=2&a=1"}],
    "names": [{"params": {"a": "1&b=2"}}, {"params": {"a": 1, "b": 2}}],
    "body": [{"data": {"a": 1}}, {"data": {"a": "1"}}, {"data": {"a": True}}, {"data": 1}, {"data": True}, {}],
    "body as text": [{"data": [1]}, {"data": "x"}],
}


@pytest.mark.parametrize("calls", DIFFERENT_CALLS.values(), ids=DIFFERENT_CALLS)
async def test_different_calls_never_share_an_answer(tmp_path: Path, calls: Sequence[dict[str, Any]]) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        for path in ("/v1", "/v1/", "/v1/echo/"):
            site.on(path, reply({}))
        for arguments in calls:
            assert "cache hit" not in await call(client, **{"endpoint": "/echo"} | arguments)
        assert len(site.requests) == len(calls)


async def test_two_apis_never_share_an_answer(tmp_path: Path) -> None:
    async with Site() as site, Site() as other:
        apis: dict[str, Any] = {"one": {"base_url": f"{site.url}/v1"}, "two": {"base_url": f"{other.url}/v1"}}
        apis["three"] = {"base_url": f"{site.url}/v1", "headers": {"X-Key": "${KEY}"}}
        async with Client(build_server(config(tmp_path, apis))) as client:
            for name in apis:
                assert "cache miss" in await ok(client, "call_api", api=name, endpoint="/echo")
        assert (len(site.requests), len(other.requests)) == (2, 1)


async def test_the_order_of_params_does_not_matter_to_the_cache(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        await call(client, params={"a": 1, "b": {"x": 1}["x"]})
        assert "cache hit" in await call(client, "echo", params={"b": 1, "a": 1})


NOT_CACHED: dict[str, bytes] = {
    "error": reply({"error": 1}, 404),
    "server error": reply({"error": 1}, 500),
    "not 200": reply({"a": 1}, 203),
    "accepted": reply({"a": 1}, 202),
    "no-store": reply({"a": 1}, headers={"Cache-Control": "private, No-Store"}),
    "no-cache": reply({"a": 1}, headers={"Cache-Control": "no-cache"}),
    "max-age=0": reply({"a": 1}, headers={"Cache-Control": "public, max-age=0"}),
    "max-age nonsense": reply({"a": 1}, headers={"Cache-Control": "max-age=soon"}),
    "old already": reply({"a": 1}, headers={"Cache-Control": "max-age=60", "Age": "60"}),
    "expired": reply({"a": 1}, headers={"Expires": "0"}),
    "expired by date": reply({"a": 1}, headers={"Expires": "Thu, 01 Jan 1970 00:00:00 GMT"}),
    "pragma": reply({"a": 1}, headers={"Pragma": "no-cache"}),
    "varies": reply({"a": 1}, headers={"Vary": "*"}),
}


@pytest.mark.parametrize("answer", NOT_CACHED.values(), ids=NOT_CACHED)
async def test_errors_and_what_the_upstream_forbids_are_not_cached(tmp_path: Path, answer: bytes) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        site.on("/v1/x", answer)
        for _ in range(2):
            await client.call_tool("call_api", {"api": "demo", "endpoint": "/x"})
        assert site.count("/v1/x") == 2


@pytest.mark.parametrize(
    ("headers", "ttl"),
    [
        ({}, 300),
        ({"Cache-Control": "public, max-age=60, s-maxage=5"}, 60),
        ({"Cache-Control": 'max-age="60"', "Age": "20"}, 40),
        ({"Cache-Control": "max-age=99999999999999999999"}, 300),
        ({"Vary": "Accept"}, 300),
    ],
    ids=str,
)
async def test_an_answer_is_kept_as_long_as_both_sides_allow(tmp_path: Path, headers: dict[str, str], ttl: int) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        site.on("/v1/x", reply({"a": 1}, headers=headers))
        assert f"kept for {ttl} s" in await call(client, "/x")
        assert "cache hit" in await call(client, "/x")


async def test_use_cache_false_asks_anew_and_cache_ttl_0_never_keeps(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        await call(client)
        assert "cache miss" in await call(client, use_cache=False)
        assert "cache hit" in await call(client)
        assert len(site.requests) == 2
    async with Site() as site, gateway(tmp_path, site, cache_ttl=0) as client:
        await call(client)
        assert "not cached" in await call(client)
        assert len(site.requests) == 2


@pytest.mark.parametrize(
    ("validator", "condition"), [("ETag", "if-none-match"), ("Last-Modified", "if-modified-since")]
)
async def test_an_expired_answer_is_revalidated(tmp_path: Path, validator: str, condition: str) -> None:
    async with Site() as site, clocked(tmp_path, site, cache_ttl=60) as (client, clock):
        fresh = reply({"version": 1}, headers={validator: 'W/"abc"'})
        site.on("/v1/x", [fresh, reply(status=304), reply({"version": 2}, headers={validator: '"def"'})])
        await call(client, "/x")
        clock.tick(61)
        body, last = split(await call(client, "/x"))
        assert body == '{"version":1}'
        assert "revalidated (304), kept for 60 s" in last
        assert site.requests[1].headers[condition] == 'W/"abc"'
        assert "cache hit, 0 s old" in await call(client, "/x")
        clock.tick(61)
        assert '"version":2' in await call(client, "/x")
        assert "if-none-match" not in site.requests[0].headers


async def test_no_cache_with_an_etag_is_revalidated_each_time(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        headers = {"Cache-Control": "no-cache", "ETag": '"1"'}
        site.on("/v1/x", [reply({"a": 1}, headers=headers), reply(status=304, headers=headers)])
        await call(client, "/x")
        assert "revalidated" in await call(client, "/x")
        assert site.requests[1].headers["if-none-match"] == '"1"'


class Gate:
    """A handler that answers when the test says so."""

    def __init__(self, answer: bytes) -> None:
        self.open = asyncio.Event()
        self.arrived = asyncio.Event()
        self.answer = answer

    async def __call__(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        self.arrived.set()
        await self.open.wait()
        writer.write(self.answer)


async def test_identical_concurrent_calls_share_one_request(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site, rate_limit=1, rate_period=86_400) as client:
        gate = Gate(reply({"a": 1}))
        site.on("/v1/slow", gate)
        calls = [asyncio.create_task(call(client, "/slow")) for _ in range(20)]
        await gate.arrived.wait()
        gate.open.set()
        assert {split(text)[0] for text in await asyncio.gather(*calls)} == {'{"a":1}'}
        assert site.count("/v1/slow") == 1


async def test_one_cancelled_caller_does_not_fail_the_others(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        gate = Gate(reply({"a": 1}))
        site.on("/v1/slow", gate)
        first = asyncio.create_task(call(client, "/slow"))
        await gate.arrived.wait()
        others = [asyncio.create_task(call(client, "/slow")) for _ in range(3)]
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.sleep(0.05)
        gate.open.set()
        assert all('{"a":1}' in text for text in await asyncio.gather(*others))
        assert site.count("/v1/slow") == 1


async def test_when_all_callers_are_cancelled_the_request_is_closed(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        gate = Gate(reply({"a": 1}))
        closed = asyncio.Event()

        async def watch(seen: Seen, writer: asyncio.StreamWriter) -> None:
            gate.arrived.set()
            await seen.gone()
            closed.set()

        site.on("/v1/slow", watch)
        calls = [asyncio.create_task(call(client, "/slow")) for _ in range(3)]
        await gate.arrived.wait()
        await asyncio.sleep(0.05)
        for task in calls:
            task.cancel()
        await asyncio.wait_for(closed.wait(), 5)
        site.on("/v1/slow", reply({"b": 2}))
        assert '{"b":2}' in await call(client, "/slow")  # the dead request does not answer for the next call


async def test_an_error_reaches_all_who_wait_and_is_forgotten(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        gate = Gate(reply({"error": "no"}, 400))
        site.on("/v1/x", gate)
        calls = [asyncio.create_task(fails(client, "/x")) for _ in range(3)]
        await gate.arrived.wait()
        gate.open.set()
        assert all("400 Bad Request" in text for text in await asyncio.gather(*calls))
        site.on("/v1/x", reply({"a": 1}))
        assert "cache miss" in await call(client, "/x")


async def test_the_cache_is_bounded_in_entries(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        site.on("/v1/x", reply({}))
        for number in range(501):
            await call(client, f"/x?n={number}")
        assert "cache hit" in await call(client, "/x?n=1")
        assert "cache miss" in await call(client, "/x?n=0")


# ------------------------------------------------------------------------------------------------------ the limits


async def test_a_call_waits_for_its_token_when_there_is_time(tmp_path: Path) -> None:
    async with Site() as site, clocked(tmp_path, site, rate_limit=2, rate_period=20) as (client, clock):
        for number in range(3):
            await call(client, f"/echo?n={number}")
        assert clock.slept == [pytest.approx(10)]
        assert len(site.requests) == 3


async def test_a_call_that_would_wait_too_long_is_refused_with_the_seconds(tmp_path: Path) -> None:
    async with Site() as site, clocked(tmp_path, site, rate_limit=1, rate_period=3600) as (client, clock):
        await call(client)
        problem = await fails(client, "/other")
        assert "try again in 3600 s" in problem
        assert "1 calls per 3600 s" in problem
        clock.tick(3600)
        await call(client, "/echo?other")
        assert clock.slept == []
        assert len(site.requests) == 2


RETRY_DATE = format_datetime(datetime.now(UTC) + timedelta(days=2), usegmt=True)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("retry_after", "advice"),
    [("120", "try again in 120 s"), (RETRY_DATE, "try again in 17"), ("999999999", "try")],
    ids=["seconds", "date", "for ever"],
)
async def test_a_long_retry_after_is_an_error_with_the_seconds(
    tmp_path: Path, status: int, retry_after: str, advice: str
) -> None:
    async with Site() as site, clocked(tmp_path, site) as (client, clock):
        site.on("/v1/x", reply({"m": "slow down"}, status, {"Retry-After": retry_after}))
        problem = await fails(client, "/x")
        assert str(status) in problem
        assert advice in problem
        assert "slow down" in problem
        assert (site.count("/v1/x"), clock.slept) == (1, [])


@pytest.mark.parametrize("status", [429, 503])
async def test_a_short_retry_after_is_obeyed(tmp_path: Path, status: int) -> None:
    async with Site() as site, clocked(tmp_path, site) as (client, clock):
        site.on("/v1/x", [reply({}, status, {"Retry-After": "7"}), reply({"a": 1})])
        assert '{"a":1}' in await call(client, "/x")
        assert clock.slept == [7]


@pytest.mark.parametrize("status", [502, 503, 504])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
async def test_idempotent_calls_are_tried_again_with_growing_pauses(tmp_path: Path, status: int, method: str) -> None:
    async with Site() as site, clocked(tmp_path, site, methods=["GET", "HEAD", "PUT", "DELETE"]) as (client, clock):
        site.on("/v1/x", [*[reply({}, status)] * 3, reply({"a": 1})])
        await call(client, "/x", method=method)
        assert site.count("/v1/x") == 4
        assert len(clock.slept) == 3
        assert all(0.15 * 2**n <= pause <= 0.3 * 2**n for n, pause in enumerate(clock.slept))


@pytest.mark.parametrize("status", [429, 502, 503, 504])
@pytest.mark.parametrize("method", ["POST", "PATCH"])
async def test_other_calls_are_never_repeated(tmp_path: Path, status: int, method: str) -> None:
    async with Site() as site, clocked(tmp_path, site, methods=["POST", "PATCH"]) as (client, clock):
        site.on("/v1/x", [reply({}, status, {"Retry-After": "1"}), reply({"a": 1})])
        assert "try again in 1 s" in await fails(client, "/x", method=method, data={"a": 1})
        assert (site.count("/v1/x"), clock.slept) == (1, [])


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 418, 429, 500, 501, 599])
async def test_other_errors_are_not_repeated_and_tell_status_reason_and_body(tmp_path: Path, status: int) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        site.on("/v1/x", reply({"message": "because\nof that", "more": "x" * 5000}, status))
        problem = await fails(client, "/x")
        assert f"demo answered {status}" in problem
        assert "because" in problem
        assert len(problem) < 1100
        assert site.count("/v1/x") == 1
        assert "Whatever" not in problem


async def test_a_refused_connection_is_tried_again_and_then_told(tmp_path: Path) -> None:
    async with Site() as site:
        pass
    async with clocked(tmp_path, site) as (client, clock):
        assert "cannot be reached" in await fails(client)
        assert len(clock.slept) == 3


async def test_retries_and_redirects_cost_tokens_too(tmp_path: Path) -> None:
    async with Site() as site, clocked(tmp_path, site, rate_limit=10, rate_period=86_400) as (client, _):
        site.on("/v1/x", [reply({}, 502), redirect("/v1/echo")])
        await call(client, "/x")
        assert "7 of 10 calls left" in await ok(client, "list_apis")


# -------------------------------------------------------------------------------------------------------- the body


async def bomb(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """Without end: gzip that grows a thousandfold."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Type: application/json\r\n\r\n")
    packer = gzip.compress(b"0" * 50_000_000)
    writer.write(packer)
    await writer.drain()
    writer.close()


async def flood(seen: Seen, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
    while not seen.hung_up():
        writer.write(b"x" * 65536)
        await writer.drain()


async def drip(seen: Seen, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 1000000\r\n\r\n")
    while not seen.hung_up():
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


async def header_drip(seen: Seen, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while not seen.hung_up():
        writer.write(b"X-A: b\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)


async def reset(seen: Seen, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def reset_midway(seen: Seen, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
    await writer.drain()
    writer.close()


async def garbage(seen: Seen, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9\r\n\r\n")
    await writer.drain()
    writer.close()


async def headers_without_end(seen: Seen, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n" + b"X-A: " + b"b" * 500_000 + b"\r\n\r\n")
    await writer.drain()
    writer.close()


async def padded(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """A whole answer, and then padding without end."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(b"{}"))
    while not seen.hung_up():
        writer.write(b"x" * 65536)
        await writer.drain()


async def empty_members(seen: Seen, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n")
    while not seen.hung_up():
        writer.write(gzip.compress(b"") * 3000)
        await writer.drain()


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (bomb, "5,000,000 bytes"),
        (flood, "5,000,000 bytes"),
        (padded, "5,000,000 bytes"),
        (drip, "within 1 s"),
        (header_drip, "within 1 s"),
        (reset, "broke off"),
        (reset_midway, "broke off"),
        (garbage, "broke off"),
        (headers_without_end, "broke off"),
        (reply("not gzip", headers={"Content-Encoding": "gzip"}), "gzip"),
        (reply(gzip.compress(b"x" * 10_000)[:40], headers={"Content-Encoding": "gzip"}), "too early"),
        (reply("x", headers={"Content-Encoding": "br"}), "'br'"),
        (reply("x", headers={"Content-Encoding": "gzip, gzip"}), "compressed"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)[:30]),
)
async def test_a_hostile_answer_is_a_clear_error(tmp_path: Path, handler: Any, reason: str) -> None:
    async with Site() as site, gateway(tmp_path, site, timeout=1) as client:
        site.on("/v1/x", handler)
        assert reason in await asyncio.wait_for(fails(client, "/x"), 10)


@pytest.mark.parametrize("handler", [drip, reset, reset_midway])
async def test_a_lost_answer_to_a_post_is_no_invitation_to_post_again(tmp_path: Path, handler: Any) -> None:
    async with Site() as site, gateway(tmp_path, site, timeout=1, methods=["POST", "PUT"]) as client:
        site.on("/v1/x", handler)
        assert "may have had its effect" in await fails(client, "/x", method="POST", data={"order": 1})
        assert site.count("/v1/x") == 1
        assert "try again" in await fails(client, "/x", method="PUT", data={"order": 1})


async def test_a_gzip_bomb_does_not_grow_the_memory(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        packed = reply(gzip.compress(b"0" * 50_000_000), headers={"Content-Encoding": "gzip"})
        site.on("/v1/x", packed)
        tracemalloc.start()
        await fails(client, "/x")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 20_000_000


async def test_compressed_nothing_without_end_is_cut_off(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        site.on("/v1/x", empty_members)
        assert "5,000,000 bytes" in await fails(client, "/x")


async def test_a_charset_that_takes_hours_to_decode_is_not_used(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        body = b"\0" * 1000 + b"-" + b"a9" * 2_000_000
        site.on("/v1/x", reply(body, content_type="text/plain; charset=punycode"))
        assert "binary body" in await asyncio.wait_for(call(client, "/x"), 10)


async def test_compressed_answers_are_read_also_in_several_members(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        body = gzip.compress(b'{"a": ') + gzip.compress(b"1}") + b"\0\0"
        site.on("/v1/x", reply(body, headers={"Content-Encoding": "gzip"}))
        assert split(await call(client, "/x"))[0] == '{"a":1}'
        assert site.requests[0].headers["accept-encoding"] == "gzip"


READABLE: dict[str, tuple[bytes, str]] = {
    "compact JSON": (reply('{ "a" : [ 1, 2 ],\n "b": "\\u00e4 \\n" }'), '{"a":[1,2],"b":"ä \\n"}\n[200 OK'),
    "numbers kept": (
        reply("[1.10, 1e400, -0.0, 1E5, 0.1000000000000000055, 12345678901234567890, -0]"),
        "[1.10,1e400,-0.0,1E5,0.1000000000000000055,12345678901234567890,0]",
    ),
    "JSON of another type": (reply("[ 1 ]", content_type="application/problem+json"), "[1]"),
    "JSON by its looks": (reply(" [ 1 ] ", content_type=""), "[1]"),
    "byte order mark": (reply(b'\xef\xbb\xbf[ "\xc3\xa4" ]'), '["ä"]'),
    "invalid JSON": (reply('{"a": 1,}'), '{"a": 1,}\n[200 OK; application/json; cache miss, kept for 300 s; not valid'),
    "two documents": (reply('{"a": 1}\n{"b": 2}'), '{"a": 1}\n{"b": 2}\n[200'),
    "deep JSON": (reply("[" * 100_000), "nested too deeply"),
    "lone surrogate": (reply('{"a": "\\ud800"}'), '{"a":"\\ud800"}'),
    "text": (reply("hello\nworld", content_type="text/plain"), "hello\nworld\n[200 OK; text/plain"),
    "HTML": (reply("<p>hi</p>", content_type="text/html; charset=utf-8"), "<p>hi</p>"),
    "latin-1": (reply("Zürich".encode("latin-1"), content_type="text/plain; charset=ISO-8859-1"), "Zürich"),
    "wrong charset": (reply("Zürich", content_type="text/plain; charset=ascii"), "Zürich"),
    "wrong charset JSON": (reply('["Zürich!"]', content_type="application/json; charset=utf-16"), '["Zürich!"]'),
    "unknown charset": (reply("Zürich", content_type="text/plain; charset=klingon"), "Zürich"),
    "hostile charset": (reply("a" * 50_000, content_type="text/plain; charset=punycode"), "aaa"),
    "hostile charset, not UTF-8": (
        reply(b"\xfc" + b"a-" * 50_000, content_type="text/plain; charset=punycode"),
        "a-a-",
    ),
    "no text codec": (reply("Zürich", content_type="text/plain; charset=zlib"), "Zürich"),
    "not UTF-8 after all": (reply(b"Z\xfcrich", content_type="text/plain; charset=utf-8"), "Z\ufffdrich"),
    "UTF-16": (reply("Zürich".encode("utf-16"), content_type="text/plain"), "Zürich"),
    "UTF-16 declared": (reply("Zürich".encode("utf-16-le"), content_type="text/plain; charset=utf-16le"), "Zürich"),
    "UTF-16 JSON": (reply('["Zürich"]'.encode("utf-16-le")), '["Zürich"]'),
    "ISO-2022-JP": (reply("日本".encode("iso2022_jp"), content_type="text/plain; charset=iso-2022-jp"), "日本"),
    "image": (reply(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", content_type="image/png"), "[200 OK; image/png; cache miss"),
    "binary": (reply(bytes(range(256)), content_type="application/octet-stream"), "binary body of 256 bytes"),
    "binary that claims to be text": (reply(bytes(range(256)), content_type="text/plain"), "binary body of 256 bytes"),
    "binary that claims to be JSON": (reply(bytes(range(128, 256))), "\ufffd"),
    "text that claims to be binary": (reply("a,b\n1,2", content_type="application/octet-stream"), "a,b\n1,2"),
    "empty": (reply(b""), "[200 OK; application/json; cache miss, kept for 300 s; no body]"),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", "[204 No Content; not cached; no body]"),
    "unknown status": (reply("x", 299), "[299; application/json"),
}


@pytest.mark.parametrize(("answer", "expected"), READABLE.values(), ids=READABLE)
async def test_every_body_is_a_readable_result(tmp_path: Path, answer: bytes, expected: str) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        site.on("/v1/x", answer)
        assert expected in await asyncio.wait_for(call(client, "/x"), 5)


async def test_head_shows_the_status(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        assert await call(client, method="HEAD") == "[200 OK; application/json; not cached; no body]"


async def test_of_the_response_headers_only_pages_and_limits_are_passed_on(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        headers = {
            "Link": f'<{site.url}/v1/x?page=2>; rel="next", <https://other.example/v1>; rel="help"',
            "X-RateLimit-Remaining": "59",
            "RateLimit": "limit=10",
            "Set-Cookie": "session=1",
            "Server": "secret-internal-name",
            "X-Powered-By": "x" * 5000,
        }
        site.on("/v1/x", reply({}, headers=headers))
        last = split(await call(client, "/x"))[1]
        assert 'link: </x?page=2>; rel="next", <https://other.example/v1>; rel="help"' in last
        assert "x-ratelimit-remaining: 59; ratelimit: limit=10" in last
        assert "session" not in last
        assert "internal" not in last
        assert "powered" not in last


async def test_links_to_the_api_itself_become_endpoints(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        link = f"<{site.url}/v1/a>, </v1/b>, <//h/v1/c>, </v12/d>, <https://h/v1/e>, <f>"
        site.on("/v1/x", reply({}, headers={"Link": link}))
        assert "link: </a>, </b>, <//h/v1/c>, </v12/d>, <https://h/v1/e>, <f>]" in await call(client, "/x")


@pytest.mark.parametrize(
    "headers",
    [{f"X-RateLimit-{n}": "y" * 1000 for n in range(90)}, {f"X-RateLimit-{'y' * 50_000}": "1"}],
    ids=["many", "long name"],
)
async def test_the_headers_that_are_passed_on_are_bounded(tmp_path: Path, headers: dict[str, str]) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        site.on("/v1/x", reply({}, headers=headers))
        text = await call(client, "/x")
        assert len(text) < 12_000
        assert len(headers) == 1 or "80 more such headers" in text


async def test_escapes_of_half_characters_count_for_the_length_of_a_result(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site, Options(max_output=1000)) as client:
        site.on("/v1/x", reply('{"a": "' + "\\ud800" * 1000 + '"}'))
        assert len(await call(client, "/x")) <= 1000
        assert len(await call(client, "/x", select="a")) <= 1000
        assert '{"a":"\\ud800\\ud800' in await call(client, "/x")


async def test_offset_continues_a_cut_body_from_the_cache(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site, Options(max_output=1000)) as client:
        numbers = list(range(1000))
        site.on("/v1/x", reply(numbers))
        shown, pages = "", 0
        while True:
            text = await call(client, "/x", offset=len(shown))
            assert len(text) <= 1000
            body, last = split(text)
            shown += body
            pages += 1
            if "continue with" not in last:
                break
            assert last.endswith(f"continue with offset={len(shown)}]")
        assert json.loads(shown) == numbers
        assert pages > 3
        assert site.count("/v1/x") == 1
        assert "past the end" in await fails(client, "/x", offset=len(shown))


async def test_the_rest_of_a_cut_post_is_shown_without_posting_again(tmp_path: Path) -> None:
    async with (
        Site() as site,
        gateway(tmp_path, site, Options(max_output=500), methods=["POST"], cache_ttl=0) as client,
    ):
        site.on("/v1/x", reply("z" * 800, 201, content_type="text/plain"))
        assert "offset=" in await call(client, "/x", method="POST", data={"a": 1})
        assert "zzz" in await call(client, "/x", method="POST", data={"a": 1}, offset=400)
        assert site.count("/v1/x") == 1
        await call(client, "/x", method="POST", data={"a": 1})
        assert site.count("/v1/x") == 2  # the same POST without offset is a new one
        assert "no longer kept" in await fails(client, "/x", method="POST", data={"a": 2}, offset=400)
        assert site.count("/v1/x") == 2


async def test_offset_never_takes_the_rest_from_another_method(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site, methods=["GET", "POST"]) as client:
        site.on("/v1/x", reply("z" * 800, content_type="text/plain"))
        await call(client, "/x")
        assert "no longer kept" in await fails(client, "/x", method="POST", offset=400)
        assert site.count("/v1/x") == 1


async def test_the_rest_of_a_post_that_may_not_be_kept_is_not_promised(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site, Options(max_output=500), methods=["POST"]) as client:
        site.on("/v1/x", reply("z" * 800, headers={"Cache-Control": "no-store"}, content_type="text/plain"))
        text = await call(client, "/x", method="POST")
        assert "forbids to keep the rest" in text
        assert "offset" not in text


DOCUMENT: dict[str, Any] = {
    "total": 2,
    "items": [
        {"id": 1, "name": "a", "owner": {"login": "x", "tags": ["p", "q"]}, "a.b": 1.10},
        {"id": 2, "name": None, "owner": {"login": "y", "tags": []}, "extra": True},
    ],
    "empty": [],
    "page": {"next": "/x?page=2"},
    "$id": "#1",
}

SELECTS: dict[str, Any] = {
    "total": 2,
    "$.total": 2,
    "items[0].name": "a",
    "items[-1].id": 2,
    "items.1.id": 2,
    "items[*].id": [1, 2],
    "items[].id": [1, 2],
    "items[*].owner.login": ["x", "y"],
    "items[*].owner.tags[*]": [["p", "q"], []],
    "items[*].extra": [None, True],
    'items[0]["a.b"]': 1.1,
    "items[*].{id,owner.login}": [{"id": 1, "owner.login": "x"}, {"id": 2, "owner.login": "y"}],
    "items[*].{id, extra}": [{"id": 1, "extra": None}, {"id": 2, "extra": True}],
    "items[*][id,name]": [{"id": 1, "name": "a"}, {"id": 2, "name": None}],
    "items[*].id,name": [{"id": 1, "name": "a"}, {"id": 2, "name": None}],
    "items[*].id,items[*].name": [{"id": 1, "name": "a"}, {"id": 2, "name": None}],
    "total,page.next": {"total": 2, "page.next": "/x?page=2"},
    "total, items[*].id": {"total": 2, "items[*].id": [1, 2]},
    "page.next,total": {"page.next": "/x?page=2", "total": 2},
    "{total,items[0].id}": {"total": 2, "items[0].id": 1},
    "empty[*].anything": [],
    "items[0].owner": {"login": "x", "tags": ["p", "q"]},
    "$id": "#1",
    "{$id,$.total}": {"$id": "#1", "$.total": 2},
    "$[items]": {"items": DOCUMENT["items"]},
}


@pytest.mark.parametrize(("select", "expected"), SELECTS.items(), ids=SELECTS)
async def test_select_takes_a_part_of_the_cached_body(tmp_path: Path, select: str, expected: Any) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        site.on("/v1/x", reply(DOCUMENT))
        await call(client, "/x")
        body, last = split(await call(client, "/x", select=select))
        assert json.loads(body) == expected
        assert "cache hit" in last
        assert site.count("/v1/x") == 1


@pytest.mark.parametrize(
    ("select", "advice"),
    [
        ("nothing", "total, items, empty, page"),
        ("{total,empty}.x", "must be its end"),
        ("items[*].{id}[0]", "must be its end"),
        ("items.name", "use [*]"),
        ("items[5].name", "list of 2"),
        ("items[*].nothing", "id, name"),
        ("items[*].{id,nothing}", "id, name"),
        ("total.x", "the value 2"),
        ("total[*]", "the value 2"),
        ("items[0].owner.{login,nothing}", "login, tags"),
        ("items[*].id,nothing", "nothing"),
        ("{}", "empty field"),
        ("{total,}", "empty field"),
        ("{a", "other half"),
        ("a]b", "other half"),
        ("a{b{c}}", "other half"),
        (".", "select"),
    ],
)
async def test_a_select_that_finds_nothing_says_what_is_there(tmp_path: Path, select: str, advice: str) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        site.on("/v1/x", reply(DOCUMENT))
        assert advice in await fails(client, "/x", select=select)


async def test_select_is_bounded_and_needs_json(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        site.on("/v1/big", reply("[" + ",".join(["{}"] * 200_000) + "]"))
        fields = ",".join(f"f{number}" for number in range(50))
        assert "1,000,000 values" in await fails(client, "/big", select=f"[*].{{{fields}}}")
        site.on("/v1/text", reply("hello", content_type="text/plain"))
        assert "text/plain" in await fails(client, "/text", select="a")
        for body, reason in {"": "no body", "{'a': 1}": "not valid JSON"}.items():
            site.on("/v1/none", reply(body))
            assert reason in await fails(client, "/none", select="a", use_cache=False)


async def test_a_select_cannot_multiply_a_body(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        site.on("/v1/x", reply({"a": "x" * 3_000_000, "b": {"y" * 1_500_000: 1}, "c": 3}))
        assert "several times" in await fails(client, "/x", select='{a,$.a,["a"],[a]}')
        assert "several times" in await fails(client, "/x", select='{b,$.b,["b"],[b],$["b"],.b,$[b]}')
        assert split(await call(client, "/x", select='{c,$.c,["c"],[c]}'))[0].startswith('{"c":3,')


# ------------------------------------------------------------------------------------------------ speed and pools


async def test_200_calls_to_a_slow_upstream_hold_up_neither_a_hit_nor_another_api(tmp_path: Path) -> None:
    async with Site() as slow, Site() as fast:
        apis = {"slow": {"base_url": slow.url}, "fast": {"base_url": fast.url}}
        gate = Gate(reply({"a": 1}))
        async with Client(build_server(config(tmp_path, apis))) as client:
            await ok(client, "call_api", api="slow", endpoint="/echo")
            slow.on("/wait", gate)
            calls = [
                asyncio.create_task(ok(client, "call_api", api="slow", endpoint=f"/wait?n={n}")) for n in range(200)
            ]
            await gate.arrived.wait()
            loop = asyncio.get_running_loop()
            started = loop.time()
            assert "cache hit" in await ok(client, "call_api", api="slow", endpoint="/echo")
            assert "cache miss" in await ok(client, "call_api", api="fast", endpoint="/echo")
            assert loop.time() - started < 5  # a guard against waiting for the slow ones, which do not end before this
            gate.open.set()
            await asyncio.gather(*calls)
        assert slow.count("/wait") == 200
        assert slow.connections <= 101


async def test_connections_are_kept_alive_and_closed_at_the_end(tmp_path: Path) -> None:
    async with Site() as site:
        async with gateway(tmp_path, site) as client:
            for number in range(5):
                await call(client, f"/echo?n={number}")
            assert site.connections == 1
        for _ in range(100):
            if not site.open_connections:
                break
            await asyncio.sleep(0.01)
        assert site.open_connections == 0


async def test_the_server_can_be_used_again_after_its_last_session(tmp_path: Path) -> None:
    async with Site() as site:
        server = build_server(config(tmp_path, {"demo": {"base_url": f"{site.url}/v1"}}))
        async with Client(server) as first, Client(server) as second:
            await call(first)
            await call(second, "/echo?2")
        async with Client(server) as third:
            await call(third, "/echo?3")
        assert len(site.requests) == 3


# ---------------------------------------------------------------------------------------------------- describe_api


def large_spec() -> dict[str, Any]:
    """600 operations, with references, cycles, and references that lead out."""
    paths: dict[str, Any] = {}
    for number in range(150):
        item: dict[str, Any] = {}
        for method in ("get", "post", "put", "delete"):
            item[method] = {
                "operationId": f"{method}Thing{number}",
                "summary": f"{method} the thing number {number} of a repository",
                "description": "Long words about it. " * 30,
                "tags": [f"group{number % 7}"],
                "parameters": [{"$ref": "#/components/parameters/page"}],
                "responses": {"200": {"$ref": "#/components/responses/thing"}},
            }
        paths[f"/repos/{{owner}}/things{number}/{{id}}"] = item
    thing: dict[str, Any] = {"type": "object", "required": ["id"], "properties": {"id": {"type": "integer"}}}
    thing["properties"] |= {
        "parent": {"$ref": "#/components/schemas/Thing"},
        "children": {"type": "array", "items": {"$ref": "#/components/schemas/Thing"}},
        "outside": {"$ref": "http://127.0.0.1:1/evil.json#/X"},
        "file": {"$ref": "/etc/passwd"},
        "missing": {"$ref": "#/components/schemas/Nope"},
        "loop": {"$ref": "#/components/schemas/A"},
        "kind": {"enum": ["a", "b"]},
        "either": {"oneOf": [{"type": "string"}, {"type": ["integer", "null"]}]},
        "both": {"allOf": [{"properties": {"x": {"type": "string"}}}, {"properties": {"y": {"type": "number"}}}]},
        "map": {"type": "object", "additionalProperties": {"type": "boolean"}},
    }
    components: dict[str, Any] = {
        "parameters": {"page": {"name": "page", "in": "query", "schema": {"type": "integer", "default": 1}}},
        "responses": {
            "thing": {
                "description": "a thing",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Thing"}}},
            }
        },
        "schemas": {
            "Thing": thing,
            "A": {"$ref": "#/components/schemas/B"},
            "B": {"$ref": "#/components/schemas/A"},
        },
    }
    return {"openapi": "3.0.3", "info": {"title": "Big", "version": "9"}, "paths": paths, "components": components}


@asynccontextmanager
async def described(tmp_path: Path, spec: Any, **entry: Any) -> AsyncGenerator[Client]:
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    entry = {"base_url": "http://127.0.0.1:1", "openapi": "spec.json"} | entry
    async with Client(build_server(config(tmp_path, {"demo": entry}))) as client:
        yield client


async def describe(client: Client, **arguments: Any) -> str:
    return await ok(client, "describe_api", api="demo", **arguments)


async def test_a_search_finds_operations_in_a_few_hundred_tokens(tmp_path: Path) -> None:
    async with described(tmp_path, large_spec()) as client:
        text = await describe(client, search="GET thing number 42")
        assert text.splitlines()[0].startswith("GET /repos/{owner}/things42/{id}: get the thing number 42")
        text = await describe(client, search="repository")
        assert len(text) < 2500
        assert "15 of 600 operations shown" in text.splitlines()[-1]
        assert "no operation" in await describe(client, search="zebra")
        assert "hold some" in await describe(client, search="zebra things7 thing")


async def test_without_arguments_the_tags_are_listed(tmp_path: Path) -> None:
    async with described(tmp_path, large_spec()) as client:
        text = await describe(client)
        assert "Big 9: 600 operations" in text
        assert "group3 (" in text


@pytest.mark.parametrize(
    "endpoint",
    ["GET /repos/{owner}/things3/{id}", "get /repos/me/things3/77", "getThing3", "GET repos/me/things3/77?page=2"],
)
async def test_one_operation_is_shown_with_its_references_resolved(tmp_path: Path, endpoint: str) -> None:
    async with described(tmp_path, large_spec()) as client:
        text = await describe(client, endpoint=endpoint)
        assert "page (query, integer = 1)" in text
        assert '"id":"integer"' in text
        assert '"parent?":"Thing again"' in text
        assert '"children?":["Thing again"]' in text
        assert "outside this file, not read" in text
        assert "not in this file" in text
        assert "circle" in text
        assert '"kind?":"a | b"' in text
        assert '"either?":"string | integer|null"' in text
        assert '"both?":{"x?":"string","y?":"number"}' in text
        assert '"map?":{"<any name>":"boolean"}' in text
        assert "root:" not in text


async def test_choices_and_descriptions_beside_properties_do_not_hide_them(tmp_path: Path) -> None:
    schemas: dict[str, Any] = {"T": {"properties": {"id": {"type": "integer"}}, "required": ["id"]}}
    body: dict[str, Any] = {
        "properties": {
            "described": {"allOf": [{"description": "words"}, {"$ref": "#/T"}]},
            "text": {"allOf": [{"type": "string"}]},
        },
        "anyOf": [{"required": ["described"]}, {"required": ["text"]}],
    }
    either: dict[str, Any] = {"properties": {"a": {}}, "oneOf": [{"$ref": "#/T"}, {"properties": {"b": {}}}]}
    media = {"application/json": {"schema": body}, "application/x": {"schema": either}}
    spec = {"openapi": "3.0.0", "paths": {"/a": {"post": {"requestBody": {"content": media}}}}} | schemas
    async with described(tmp_path, spec) as client:
        text = await describe(client, endpoint="/a")
        assert '{"described?":{"id":"integer"},"text?":"string"}' in text
        assert '{"a?":"any","oneOf":[{"id":"integer"},{"b?":"any"}]}' in text


async def test_methods_that_are_not_allowed_are_marked(tmp_path: Path) -> None:
    async with described(tmp_path, large_spec()) as client:
        text = await describe(client, endpoint="/repos/a/things3/1")
        assert text.splitlines()[0].startswith("GET ")
        assert "DELETE /repos/{owner}/things3/{id}: delete" in text
        assert text.count("[method not allowed here]") == 3


async def test_offset_continues_a_cut_description(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(large_spec()))
    entry = {"demo": {"base_url": "http://127.0.0.1:1", "openapi": "spec.json"}}
    endpoint = "GET /repos/{owner}/things3/{id}"
    async with Client(build_server(config(tmp_path, entry))) as client:
        whole = await describe(client, endpoint=endpoint)
    async with Client(build_server(config(tmp_path, entry), Options(max_output=500))) as client:
        shown = ""
        while len(shown) < len(whole):
            text = await describe(client, endpoint=endpoint, offset=len(shown))
            assert len(text) <= 500
            body, last = split(text)
            shown += body
            assert last.endswith(f"continue with offset={len(shown)}]") or len(shown) == len(whole)
        assert shown == whole
        assert "past the end" in await refused(client, "describe_api", api="demo", endpoint=endpoint, offset=len(whole))


HOSTILE_SPECS: dict[str, Any] = {
    "nonsense everywhere": {
        "openapi": "3.1.0",
        "paths": {
            "/a": {"get": {"parameters": "x", "responses": [1], "tags": 5, "requestBody": 7, "summary": {"a": 1}}},
            "/b": 5,
            "/c": {"$ref": "#/paths/~1c"},
            "/d": {"get": {"parameters": [5, {"schema": 7}], "responses": {"200": {"content": {"x/y": None}}}}},
        },
    },
    "wide": {
        "openapi": "3.0.0",
        "paths": {
            "/a": {
                "get": {
                    "requestBody": {
                        "content": {
                            "application/json": {"schema": {"properties": {f"p{n}": {} for n in range(100_000)}}}
                        }
                    }
                }
            }
        },
    },
    "exponential": {
        "openapi": "3.0.0",
        "paths": {
            "/a": {"get": {"responses": {"200": {"content": {"j": {"schema": {"$ref": "#/s/0"}}}}}}},
        },
        "s": {str(n): {"properties": {f"p{i}": {"$ref": f"#/s/{n + 1}"} for i in range(20)}} for n in range(30)},
    },
}


@pytest.mark.parametrize("spec", HOSTILE_SPECS.values(), ids=HOSTILE_SPECS)
async def test_a_strange_file_neither_breaks_nor_floods_the_answer(tmp_path: Path, spec: Any) -> None:
    async with described(tmp_path, spec) as client:
        for arguments in ({}, {"search": "a"}, {"endpoint": "/a"}):
            assert len(await asyncio.wait_for(describe(client, **arguments), 5)) < 20_000


async def test_describe_api_errors_say_what_to_do(tmp_path: Path) -> None:
    async with described(tmp_path, large_spec()) as client:
        assert "search" in await refused(client, "describe_api", api="demo", endpoint="/nope")
        assert "not both" in await refused(client, "describe_api", api="demo", endpoint="/a", search="b")
    async with Site() as site, gateway(tmp_path, site) as client:
        assert "no OpenAPI file" in await refused(client, "describe_api", api="demo", search="x")


# --------------------------------------------------------------------------------------------------- configuration

BAD_CONFIGS: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "not valid JSON"),
    "not UTF-8": ("\udcff", "not valid JSON"),
    "a list": ([], "object"),
    "empty": ({}, "object"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "no entry": ({"a": 5}, "a: "),
    "key twice": ('{"a": {"base_url": "http://h"}, "a": {"base_url": "http://i"}}', "twice"),
    "NaN": ('{"a": {"base_url": "http://h", "timeout": NaN}}', "NaN"),
    "bad name": ({"a b": {"base_url": "http://h"}}, "a b: a name"),
    "no base_url": ({"a": {}}, "a: base_url"),
    "unknown key": ({"a": {"base_url": "http://h", "ratelimit": 5}}, "a: ratelimit: unknown key"),
    "wrong type": ({"a": {"base_url": "http://h", "rate_limit": "5"}}, "a: rate_limit"),
    "true as number": ({"a": {"base_url": "http://h", "timeout": True}}, "a: timeout"),
    "negative limit": ({"a": {"base_url": "http://h", "rate_limit": -1}}, "a: rate_limit"),
    "no limit at all": ({"a": {"base_url": "http://h", "rate_limit": 0}}, "a: rate_limit"),
    "negative period": ({"a": {"base_url": "http://h", "rate_period": -1}}, "a: rate_period"),
    "negative ttl": ({"a": {"base_url": "http://h", "cache_ttl": -1}}, "a: cache_ttl"),
    "no time": ({"a": {"base_url": "http://h", "timeout": 0}}, "a: timeout"),
    "endless": ('{"a": {"base_url": "http://h", "timeout": 1e999}}', "a: timeout"),
    "unknown method": ({"a": {"base_url": "http://h", "methods": ["GET", "CONNECT"]}}, "a: methods.1"),
    "no method": ({"a": {"base_url": "http://h", "methods": []}}, "a: methods"),
    "header is no text": ({"a": {"base_url": "http://h", "headers": {"X": 5}}}, "a: headers.X"),
    "unset variable": ({"a": {"base_url": "http://h", "headers": {"X": "${NOT_SET}"}}}, "NOT_SET is not set"),
    "empty variable": ({"a": {"base_url": "http://h", "headers": {"X": "${EMPTY}"}}}, "EMPTY is not set"),
    "short variable": ({"a": {"base_url": "http://h", "headers": {"X": "${SHORT}"}}}, "SHORT is shorter"),
    "bad variable": ({"a": {"base_url": "http://h", "headers": {"X": "${1 X}"}}}, "a: headers.X"),
    "open variable": ({"a": {"base_url": "http://h", "headers": {"X": "${KEY"}}}, "a: headers.X"),
    "line break in a variable": ({"a": {"base_url": "http://h", "headers": {"X": "${LINES}"}}}, "a: headers.X"),
    "bad header name": ({"a": {"base_url": "http://h", "headers": {"X Y": "z"}}}, "a: headers"),
    "framing header": ({"a": {"base_url": "http://h", "headers": {"Transfer-Encoding": "chunked"}}}, "a: headers"),
    "header twice": ({"a": {"base_url": "http://h", "headers": {"X": "a", "x": "b"}}}, "a: headers"),
    "no openapi file": ({"a": {"base_url": "http://h", "openapi": "nope.json"}}, "a: openapi"),
    "openapi is YAML": ({"a": {"base_url": "http://h", "openapi": "spec.yaml"}}, "not JSON"),
    "openapi is something else": ({"a": {"base_url": "http://h", "openapi": "other.json"}}, "not an OpenAPI 3.x"),
    **{
        f"base URL {url}": ({"a": {"base_url": url}}, "a: base_url")
        for url in (
            "", "h", "http://h:0", "http://h:65536", "ftp://h", "file:///etc", "//h", "http://", "http:///x",
            "http://u:p@h", "http://@h", "http://h?x=1",
            "http://h#x", "http://h/..", "http://h/%2e%2e/x", "http://h/a/../b", "http://h\\x", "http://h/ x", " http://h",
            "http://h/${KEY}", "http://h:x", "http://h/\r\n", "http://h//x", "javascript:alert(1)", "http://[::1",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize(("apis", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_mistake_in_the_file_is_one_line_that_says_where(tmp_path: Path, apis: Any, message: str) -> None:
    (tmp_path / "spec.yaml").write_text("openapi: 3.0.0\n")
    (tmp_path / "other.json").write_text('{"swagger": "2.0", "paths": {"/a": {}}}')
    path = tmp_path / "apis.json"
    path.write_text(apis if isinstance(apis, str) else json.dumps(apis), encoding="utf-8", errors="surrogateescape")
    environ = {"KEY": KEY, "EMPTY": "", "SHORT": "abc", "LINES": f"{KEY}\r\nX: y"}
    with pytest.raises(ConfigError) as caught:
        build_server(load_config(path, environ))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://h", "https://h/", "http://h:8080/a/b/", "http://[::1]:80/v1", "https://bücher.example/.well-known"]
)
def test_ordinary_base_urls_are_taken(tmp_path: Path, url: str) -> None:
    build_server(config(tmp_path, {"a": {"base_url": url}}))


def test_a_missing_file_is_a_mistake_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "nope.json", {})


# --------------------------------------------------------------------------------------------------- the tools list


async def test_the_tools_are_small_described_and_annotated(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site) as client:
        listed = await client.list_tools()
        assert len(listed.model_dump_json(by_alias=True, exclude_none=True)) < 4500
        assert [tool.name for tool in listed.tools] == ["list_apis", "call_api", "describe_api"]
        for tool in listed.tools:
            assert tool.annotations
            assert tool.annotations.read_only_hint is True
            assert all("description" in schema for schema in tool.input_schema["properties"].values())
        assert listed.tools[1].annotations
        assert listed.tools[1].annotations.open_world_hint is True


async def test_call_api_is_no_reader_once_an_api_allows_writing(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site, methods=["GET", "POST"]) as client:
        annotations = (await client.list_tools()).tools[1].annotations
        assert annotations
        assert (annotations.read_only_hint, annotations.destructive_hint) == (False, True)


async def test_list_apis_shows_no_header(tmp_path: Path) -> None:
    async with Site() as site, gateway(tmp_path, site, description="The demo") as client:
        [entry] = json.loads(await ok(client, "list_apis"))["apis"]
        assert entry == {
            "name": "demo",
            "description": "The demo",
            "base_url": f"{site.url}/v1",
            "methods": ["GET", "HEAD"],
            "limits": "no limit",
            "cache_ttl": 300.0,
            "describe_api": False,
        }


# ------------------------------------------------------------------------------------------------- the real process


async def test_the_process_masks_keys_and_survives_what_hangs_it(
    tmp_path: Path, stdio: Callable[..., Stdio], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    path = tmp_path / "apis.json"
    async with Site() as site:
        path.write_text(json.dumps({"demo": {"base_url": site.url, "headers": {"X-Key": "${THE_KEY}"}}}))
        site.on("/surrogate", reply('{"a": "\\ud800"}'))
        server = stdio("api_server.py", str(path))
        texts = [
            await asyncio.to_thread(server.text, "call_api", api="demo", endpoint=endpoint)
            for endpoint in ("/echo", "/surrogate", "/echo")
        ]
    assert not leaks("".join(texts))
    assert "***" in texts[0]
    assert "\\ud800" in texts[1]
    assert "cache hit" in texts[2]
    assert server.close() == 0


async def run(*arguments: str, environ: dict[str, str] | None = None) -> tuple[int, str, str]:
    import os
    import sys

    process = await asyncio.create_subprocess_exec(
        sys.executable, "api_server.py", *arguments, cwd=PROJECT, env=os.environ | (environ or {}),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_check_prints_the_configuration_with_secrets_masked(tmp_path: Path) -> None:
    code, out, err = await run("examples/apis.json", "--check", environ={"NASA_API_KEY": KEY})
    assert (code, err) == (0, "")
    effective = json.loads(out)
    assert effective["nasa"]["headers"] == {"X-Api-Key": "***"}
    assert effective["github"]["methods"] == ["GET", "HEAD"]
    assert not leaks(out)


async def test_a_mistake_ends_the_process_with_one_line_and_code_2(tmp_path: Path) -> None:
    path = tmp_path / "apis.json"
    path.write_text('{"a": {"base_url": "http://h", "headers": {"X": "${SURELY_NOT_SET}"}}}')
    code, out, err = await run(str(path))
    assert (code, out) == (2, "")
    assert "SURELY_NOT_SET is not set" in err
    assert len(err.splitlines()) == 1


async def test_the_examples_work_together(tmp_path: Path) -> None:
    import sys

    process = await asyncio.create_subprocess_exec(
        sys.executable, "examples/upstream.py", "--port", "0", cwd=PROJECT, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr
        url = (await process.stderr.readline()).decode().split("/users")[0]
        local = json.loads((PROJECT / "examples/local.json").read_text())
        (tmp_path / "local-openapi.json").write_text((PROJECT / "examples/local-openapi.json").read_text())
        local["demo"]["base_url"] = url
        path = tmp_path / "local.json"
        path.write_text(json.dumps(local))
        code, out, _ = await run(str(path), "--call", "call_api", "api=demo", "endpoint=/users", "select=users[*].name")
        assert code == 0
        assert out.startswith('["Ada","Grace"')
        code, _, err = await run(str(path), "--call", "call_api", "api=demo", "endpoint=/nope")
        assert code == 1
        assert "404 Not Found" in err
        code, out, _ = await run(str(path), "--call", "describe_api", "api=demo", "endpoint=/users/1")
        assert "id (path, integer, required)" in out
    finally:
        process.kill()
        await process.communicate()
