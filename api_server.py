# /// script
# requires-python = ">=3.11"
# dependencies = ["mcp>=2.3,<3", "httpx>=0.28,<0.29"]
# ///
"""An MCP server that calls the HTTP APIs named in a file, and keeps their keys.

    python api_server.py APIS.json            (--check prints what the file means, --help lists the options)

Trust boundary: the file and the environment are yours; everything the model sends (endpoint, method, params, data) and
everything an upstream answers is untrusted. A request goes to its API's own origin and below its base path or not at
all, and what came from ${ENV_VAR} is masked in all that leaves the server.
Not defended against: an upstream that hides the key in a form other than those `Masker` lists, a name server that
lies about a host named in the file, and what an API does with a request that it allows.
"""

import argparse
import asyncio
import base64
import binascii
import codecs
import hashlib
import json
import logging
import math
import os
import re
import secrets
import sys
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache, lru_cache, partial
from http import client as http_client
from pathlib import Path
from random import uniform
from typing import Annotated, Any, Literal, TypeGuard, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlencode

import httpx
from common import (
    TIME_LIMIT,
    ConfigError,
    Options,
    Server,
    TokenBucket,
    TTLCache,
    __version__,
    argument_parser,
    in_thread_of_its_own,
    serve,
    trailer,
)
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import BaseModel, ConfigDict, Field, ValidationError

# ---------------------------------------------------------------------------------------------------------- limits

MAX_APIS = 60  # with the longest descriptions, list_apis still stays below 40,000 characters
MAX_BODY = 5_000_000  # bytes of an answer, decompressed; parsed JSON takes up to 25 times that in memory
LONG_BODY = 100_000  # bytes from which an answer is worked on in a thread: about a millisecond's work
MAX_REQUEST = 1_000_000  # bytes of a request body
MAX_URL = 8_000  # characters; common servers refuse longer ones
MAX_DECODES = 4  # rounds of percent-decoding; nobody means more than two
MAX_REDIRECTS = 5
MAX_ATTEMPTS = 4  # the first one included
BACKOFF = 0.3  # seconds before the second attempt, doubled for each one after it
CONNECT_TIMEOUT = 10.0  # seconds
MAX_CONNECTIONS = 100  # per API
CACHE_ENTRIES = 500  # per API
CACHE_BYTES = 32_000_000  # per API; any one body fits, however its characters are stored
PAGE_TTL = 300.0  # seconds for which the rest of a cut answer that may not be repeated is kept
MAX_ERROR_BODY = 64_000  # bytes of an error's body that are read
MAX_ERROR_TEXT = 800  # characters of it that are shown
MAX_HEADER_TEXT = 1_000  # characters of one response header that are passed on
MAX_HEADERS = 10  # response headers that are passed on
MIN_SECRET = 4  # characters; masking a shorter text would riddle every answer
MAX_VISITS = 1_000_000  # values one select may look at: about half a second
MAX_REPEATED = 2 * MAX_BODY  # characters that a select may make out of an answer
MAX_MATCHES = 15  # operations in one search result: a few hundred tokens
MAX_SPEC = 64_000_000  # bytes of an OpenAPI file
SCHEMA_DEPTH, SCHEMA_FIELDS = 6, 250  # of one operation's schemas

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
IDEMPOTENT = {"GET", "HEAD", "PUT", "DELETE", "OPTIONS"}  # RFC 9110, 9.2.2
SAFE = {"GET", "HEAD", "OPTIONS"}  # RFC 9110, 9.2.1
MASK = "***"
JSON_TYPE = "application/json"


# -------------------------------------------------------------------------------------------------------- result models


class ApiInfo(BaseModel):
    """One configured API."""

    name: str
    description: str
    base_url: str
    methods: list[str]
    limits: str
    cache_ttl: float
    describe_api: bool


class ApiList(BaseModel):
    """The configured APIs."""

    apis: list[ApiInfo]


# ------------------------------------------------------------------------------------------------------------ the tools
#
# What the model sees. Each tool checks its arguments, calls what stands below it in this file, and returns.

ApiName = Annotated[str, Field(description="name from list_apis", max_length=64)]
Offset = Annotated[int, Field(description="first character shown", ge=0, strict=True)]


def build_server(
    config: "Config",
    options: Options | None = None,
    *,
    timer: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Server:
    """The server with its three tools. Raises ConfigError if an OpenAPI file cannot be read."""
    logging.getLogger("httpcore").setLevel(logging.WARNING)  # at DEBUG it logs response headers
    upstreams: dict[str, Upstream] = {}
    for target in config.targets:
        try:
            upstreams[target.name] = Upstream(target, config.mask, timer, sleep)
        except ConfigError as exc:
            raise ConfigError(f"{target.name}: {exc}") from None
    sessions = 0

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncGenerator[None]:
        nonlocal sessions
        sessions += 1
        try:
            yield
        finally:
            sessions -= 1
            if sessions == 0:  # over HTTP and in tests several can overlap; the last one closes the connections
                for upstream in upstreams.values():
                    await upstream.close()

    options = options or Options()
    instructions = f"Calls the HTTP APIs {', '.join(upstreams)}. Keys are added by the server and are never shown."
    server = Server("api-server", clip(instructions, 600), options, redact=config.mask, lifespan=lifespan)
    methods = {method for upstream in upstreams.values() for method in upstream.api.methods}
    calls = ToolAnnotations(
        read_only_hint=methods <= SAFE,
        destructive_hint=not methods <= SAFE,
        idempotent_hint=methods <= IDEMPOTENT,
        open_world_hint=True,
    )
    looks = ToolAnnotations(read_only_hint=True, open_world_hint=False)

    def find(name: str) -> Upstream:
        if name not in upstreams:
            raise ToolError(f"unknown API {name!r}; the APIs are {', '.join(upstreams)}")
        return upstreams[name]

    @server.tool(annotations=looks)
    async def list_apis() -> ApiList:
        """List the APIs that call_api can reach: base URL, allowed methods, how much of the rate limit is left, for how
        many seconds answers are cached, and whether describe_api knows the API."""
        return ApiList(
            apis=[
                ApiInfo(
                    name=name,
                    description=upstream.api.description,
                    base_url=str(upstream.base_url),
                    methods=list(upstream.api.methods),
                    limits=upstream.limits_left,
                    cache_ttl=upstream.api.cache_ttl,
                    describe_api=upstream.spec is not None,
                )
                for name, upstream in upstreams.items()
            ]
        )

    @server.tool(annotations=calls, structured_output=False)
    async def call_api(
        api: ApiName,
        endpoint: Annotated[str, Field(description="path below the base URL: /users/42", max_length=2_000)],
        method: Annotated[str, Field(description="one that list_apis shows", max_length=10)] = "GET",
        params: Annotated[dict[str, Any] | None, Field(description="query; a list repeats the name")] = None,
        data: Annotated[Any, Field(description="request body: JSON; other text is sent as plain text")] = None,
        use_cache: Annotated[bool, Field(description="false: ask the API anew", strict=True)] = True,
        select: Annotated[
            str, Field(description="part of a JSON body: items[0].name, items[*].{id,owner.login}", max_length=500)
        ] = "",
        offset: Offset = 0,
    ) -> str:
        """Call an API and return the body (JSON compact), then one line in brackets: status, type, cache state, page
        and rate-limit headers, what was cut. A cut body continues with offset, if it was kept without a second
        request. Use select to get only the fields needed: a path, [*] for each item, {a,b} for several fields. An HTTP
        error is an error that shows the start of its body."""
        upstream = find(api)
        if select:
            parse_parts(select)  # before anything is sent
        call = upstream.prepare(method, endpoint, params or {}, data)
        answer, note = await upstream.call(call, use_cache, offset)
        long = answer.body.text if select else ""
        return await in_thread_if_long(long, render, call, answer, note, select, offset, options.max_output)

    @server.tool(annotations=looks, structured_output=False)
    async def describe_api(
        api: ApiName,
        search: Annotated[str, Field(description="words, such as: list issues", max_length=200)] = "",
        endpoint: Annotated[str, Field(description="GET /users/{id}, or an operation's name", max_length=2_000)] = "",
        offset: Offset = 0,
    ) -> str:
        """Look an API up in its OpenAPI file: with search, the operations that match; with endpoint, that operation's
        parameters, request body and answers (? marks optional fields); with neither, the file's tags. A cut text
        continues with offset."""
        upstream = find(api)
        if upstream.spec is None:
            raise ToolError(
                f"{api} has no OpenAPI file; use call_api. It is: {upstream.api.description or 'not described'}"
            )
        if search and endpoint:
            raise ToolError("give search or endpoint, not both")
        text = upstream.spec.describe(endpoint) if endpoint else upstream.spec.search(search)
        return show_part(text, [], offset, options.max_output)

    return server


# -------------------------------------------------------------------------------------------------------------- JSON

# Numbers must come back digit by digit: 1.10 is not 1.1 to everyone. Python's encoder writes nothing but its own
# floats, so a number it would change travels as text behind a mark that no upstream can guess.
_EXACT = f"\0{secrets.token_hex(8)}:"
_EXACT_JSON = re.compile(f'"\\\\u0000{_EXACT[1:]}([^"]*)"')


T = TypeVar("T")


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether a JSON value is an object."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether a JSON value is a list."""
    return isinstance(value, list)


def clip(text: str, limit: int) -> str:
    """`text` on one line, with … where it was cut."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + "…"


def load_json(text: str) -> Any:
    """Parse JSON, keeping each number exactly as it is written. Raises ValueError or RecursionError."""

    def number(digits: str) -> float | str:
        return value if repr(value := float(digits)) == digits else _EXACT + digits

    return json.loads(text, parse_float=number)


def is_json(text: str) -> bool:
    """Whether the text can be parsed."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def dump_json(value: Any) -> str:
    """Compact JSON, characters as they are; a lone surrogate, which cannot be sent, as its escape."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if not text.isascii():  # escaped here and not when it is sent, so that max_output counts what is sent
        text = text.encode("utf-8", "backslashreplace").decode()
    return _EXACT_JSON.sub(r"\1", text) if "\\u0000" in text else text


# --------------------------------------------------------------------------------------------------------- secrets


def _spellings(characters: str) -> list[str]:
    """Patterns for any one of the characters as URLs, JSON and HTML write it. Each begins with a plain character, which
    makes the search fast, and bounds its repetitions, against runaway matching."""
    rows: dict[str, str] = {}
    for code in (f"{ord(char):02x}" for char in characters):
        rows[code[0]] = rows.get(code[0], "") + code[1] + code[1].upper()
    code = "(?:" + "|".join(f"{high}[{low}]" for high, low in rows.items()) + ")"
    decimal = "|".join(str(ord(char)) for char in characters)
    named = {"&": "amp", "<": "lt", ">": "gt", '"': "quot"}
    html = "".join(f"|{named[char]}" for char in characters if char in named)
    plain = "".join(f"|{re.escape(char)}" for char in characters if char in '"\\/')
    spellings = [
        f"%(?:25){{0,3}}{code}",
        rf"\\\\{{0,3}}(?:u00{code}{plain})",
        f"&(?:#0{{0,5}}(?:{decimal})|#[xX]0{{0,5}}{code}{html});",
    ]
    return [*spellings, r"\+"] if " " in characters else spellings


@cache
def _pattern(text: str) -> re.Pattern[str]:
    """`text` as a pattern that matches each of its characters in any spelling; + and / also as URL-safe base64."""
    url_safe = {"+": ["-"], "/": ["_"]}
    return re.compile("".join(f"(?:{'|'.join([*_spellings(c), re.escape(c), *url_safe.get(c, [])])})" for c in text))


class Masker:
    """Replaces the secrets it was given, in every form in which an upstream is likely to echo them.

    The forms: as it is, percent-encoded (up to four times over), JSON- and HTML-escaped, any mixture of those,
    hexadecimal, base64 at each of the three alignments, and the parts of a value such as `Bearer KEY`, or of
    `USER:PASSWORD` inside base64. The repr shows none of it.
    """

    def __init__(self, values: Sequence[str]) -> None:
        self._forms = sorted({form for value in values for form in self._forms_of(value)}, key=len, reverse=True)
        characters = "".join(sorted(set("".join(self._forms))))
        self._escapes = re.compile("|".join(_spellings(characters)) if characters else r"(?!)")
        # A page of a cached answer is masked once, not at every hit; longer texts are too large to keep.
        self._remembered = lru_cache(maxsize=32)(self._mask)

    @staticmethod
    def _forms_of(value: str) -> Iterator[str]:
        parts = {value, *(part for part in re.split(r"[\s;,=]+", value) if len(part) >= 2 * MIN_SECRET)}
        for part in tuple(parts):
            try:
                decoded = base64.b64decode(part + "=" * (-len(part) % 4), validate=True).decode("ascii")
            except (binascii.Error, UnicodeDecodeError):
                continue
            if decoded.isprintable() and ":" in decoded:  # HTTP Basic
                parts |= {text for text in (decoded, decoded.partition(":")[2]) if len(text) >= MIN_SECRET}
        for text in parts:
            data = text.encode()
            yield from (text, data.hex(), data.hex().upper())
            for shift in range(3):  # the characters that hold bits of nothing but the secret
                encoded = base64.b64encode(b"\0" * shift + data).decode()
                yield encoded[-(-8 * shift // 6) : 8 * (shift + len(data)) // 6]

    def __call__(self, text: str) -> str:
        """`text` with every secret replaced by ***."""
        return self._remembered(text) if len(text) < LONG_BODY else self._mask(text)

    def _mask(self, text: str) -> str:
        escaped = self._escapes.search(text) is not None  # without it, looking for the plain forms is enough
        # The pattern of a whole form takes milliseconds to compile; its start tells whether it can be there at all.
        starts = {form[:MIN_SECRET] for form in self._forms} if escaped else ()
        found = {start for start in starts if _pattern(start).search(text)}
        for form in self._forms:
            if form[:MIN_SECRET] in found or form in text or form.replace("+", "-").replace("/", "_") in text:
                text = _pattern(form).sub(MASK, text)
        return text

    def json(self, value: Any) -> Any:
        """The same for each text, name and number in a JSON value, so that it stays valid JSON."""
        if is_object(value):
            return {self(name): self.json(item) for name, item in value.items()}
        if is_list(value):
            return [self.json(item) for item in value]
        if isinstance(value, str) and not value.startswith(_EXACT):
            return self(value)
        return value if self(str(value)) == str(value) else MASK


# -------------------------------------------------------------------------------------------------------- boundary
#
# The endpoint is refused, never repaired: what one program repairs, the next one reads differently. Each round of
# percent-decoding is judged by itself, because a server behind a proxy may decode once more than the proxy did.

# Characters that look like / \ . or % and survive NFKC, which turns the full-width and small forms into ASCII.
LOOKALIKES = str.maketrans({"⁄": "/", "∕": "/", "⧸": "/", "⧵": "\\", "∖": "\\", "。": ".", "․": ".", "٪": "%"})
ADVICE = "give a path below the API's base URL, such as /users/42"


def refuse_escape(path: str) -> None:
    """Raise ToolError for a path (without query) that some server could read as leading out of its base path."""
    # Without this, "%zz" or "%u002e" means whatever the upstream makes of it.
    if re.search(r"%(?![0-9A-Fa-f]{2})", path):
        raise ToolError("endpoint holds a % without two hexadecimal digits behind it; write %25 for a percent sign")
    stage = path
    for _ in range(MAX_DECODES):
        refuse_stage(stage)
        try:
            decoded = unquote(stage, errors="strict")
        except UnicodeDecodeError:  # overlong forms such as %c0%ae, which old decoders read as a dot
            raise ToolError(f"endpoint holds percent-encoded bytes that are not UTF-8; {ADVICE}") from None
        if decoded == stage:
            return
        stage = decoded
    raise ToolError(f"endpoint is percent-encoded more than {MAX_DECODES - 1} times over; encode it once")


def refuse_stage(stage: str) -> None:
    """Raise ToolError if the path, decoded this far, holds anything that could change where it leads."""
    # CR and LF would add headers or a second request; other control characters are cut off or skipped by some.
    if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in stage):
        raise ToolError(f"endpoint holds a control character or broken Unicode; {ADVICE}")
    # Some servers drop format marks such as soft hyphens, so that they must not hide what they stand between.
    folded = "".join(char for char in unicodedata.normalize("NFKC", stage) if unicodedata.category(char) != "Cf")
    folded = folded.translate(LOOKALIKES)
    # Browsers and some servers read \ as /, so \\host is //host.
    if "\\" in folded:
        raise ToolError(f"endpoint holds a backslash or a look-alike of it; {ADVICE}")
    # A server that normalises Unicode turns full-width slashes and percent signs into real ones.
    if any(folded.count(char) != stage.count(char) for char in "/%"):
        raise ToolError(f"endpoint holds a look-alike of / or %; {ADVICE}")
    if folded.startswith("//"):
        raise ToolError(f"endpoint begins with //, which names another host; {ADVICE}")
    if not folded.startswith("/") and re.match(r"[^/]*[:@]", folded):
        raise ToolError(f"endpoint looks like an absolute URL or user@host; {ADVICE}")
    for segment in folded.split("/"):
        # "..;x" is a dot segment to Java servers, and ". ." to those that strip blanks.
        bare = "".join(segment.split(";")[0].split())
        if bare and not bare.strip("."):
            raise ToolError(f"endpoint holds a dot segment ({segment[:20]!r}); {ADVICE}")


def require_inside(base: httpx.URL, url: httpx.URL) -> None:
    """The last check before every request, of the very URL that is sent. Raises ToolError."""
    root = base.raw_path.rstrip(b"/")
    path = url.raw_path.partition(b"?")[0]
    if origin(url) != origin(base) or url.userinfo or (path != root and not path.startswith(root + b"/")):
        raise ToolError(f"endpoint leads out of {base}; {ADVICE}")
    refuse_escape(path[len(root) :].decode())


def origin(url: httpx.URL) -> str:
    """Scheme, host and port, as they are compared and shown."""
    host = f"[{url.host}]" if ":" in url.host else url.raw_host.decode()
    return f"{url.scheme}://{host}" + (f":{url.port}" if url.port is not None else "")


def query_pairs(params: Mapping[str, Any], limit: int) -> Iterator[tuple[str, str]]:
    """Name and text of each query parameter; a list gives one pair for each item, null gives none."""
    length = 0
    for name, value in params.items():
        for item in value if is_list(value) else [value]:
            if isinstance(item, bool):
                text = "true" if item else "false"
            elif isinstance(item, str | int) or (isinstance(item, float) and math.isfinite(item)):
                text = str(item)
            elif item is None:
                continue
            else:
                raise ToolError(
                    f"params.{name[:50]} must be text, a number, true, false or a list of those; write it as text"
                )
            length += len(name) + len(text) + 2
            if length > limit:  # encoding a million of them would hold up every other call for seconds
                raise ToolError(f"the parameters are longer than the {limit:,} characters that can be sent; use fewer")
            yield name, text


@dataclass(frozen=True)
class Call:
    """One request as it will be sent, and the key under which its answer is kept."""

    method: str
    url: str
    content: bytes | None
    content_type: str
    key: bytes


CANONICAL = json.JSONEncoder(sort_keys=True)  # made once; json.dumps makes one for each call


def encode_data(data: Any, form: bool) -> tuple[bytes | None, str]:
    """The request body and its type: text as it is, a form where the file says so, anything else as JSON."""
    try:
        if data is None:
            return None, ""
        if isinstance(data, str):
            content, content_type = data.encode(), "text/plain; charset=utf-8"
        elif form and is_object(data):
            content, content_type = (
                urlencode(list(query_pairs(data, MAX_REQUEST))).encode(),
                "application/x-www-form-urlencoded",
            )
        else:
            content_type = JSON_TYPE
            content = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except ValueError:  # also a lone surrogate
        raise ToolError("data holds a number or a character that JSON cannot carry; leave it out") from None
    if len(content) > MAX_REQUEST:
        raise ToolError(f"data is {len(content):,} bytes long; the limit is {MAX_REQUEST:,}; send it in parts")
    return content, content_type


def parse_query(query: str) -> list[tuple[str, str]]:
    """The parameters in an endpoint's query. Raises ToolError."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:  # read loosely, they would be sent as another character
        raise ToolError("endpoint's query holds percent-encoded bytes that are not UTF-8; write them as text") from None
    if re.search(r"[\x00-\x1f\x7f]", unquote(query)):
        raise ToolError("endpoint holds a control character in its query; give such a value in params")
    return pairs


def build_call(root: str, method: str, endpoint: str, params: Mapping[str, Any], data: Any, form: bool) -> Call:
    """Check and encode what the model gave; `root` is the base URL without a slash at its end. Raises ToolError.

    A cache hit costs little more than this: what only a request needs, such as parsing the URL, is done with it.
    """
    if "#" in endpoint:
        raise ToolError(f"endpoint holds a #, which is never sent; write %23 for the character, or {ADVICE}")
    if endpoint != endpoint.strip():
        raise ToolError(f"endpoint begins or ends with white space; {ADVICE}")
    path, _, query = endpoint.partition("?")
    refuse_escape(path)
    given = parse_query(query) if query else []
    if twice := {name for name, _ in given} & params.keys():
        raise ToolError(f"{min(twice)[:50]!r} is in the endpoint's query and in params; give it once")
    try:
        place = "/" + quote(path.removeprefix("/"), safe="/%!$&'()*+,;=:@~") if path else ""
        pairs = [*given, *query_pairs(params, MAX_URL)]
        url = root + place + ("?" + urlencode(pairs, quote_via=quote) if pairs else "")
        content, content_type = encode_data(data, form)
        # Of equal names the order counts: ?sort=name&sort=age is another question than ?sort=age&sort=name.
        given.sort(key=lambda pair: pair[0])
        key = CANONICAL.encode([method, place, given, params, data]).encode()
    except UnicodeEncodeError:
        raise ToolError("params hold broken Unicode (half of a surrogate pair); leave it out") from None
    if len(url) > MAX_URL:
        raise ToolError(f"the URL would be {len(url):,} characters long; the limit is {MAX_URL:,}; use fewer params")
    return Call(method, url, content, content_type, hashlib.sha256(key).digest())


# ---------------------------------------------------------------------------------------------------- configuration

# Literal values of headers with such a name are masked too; those of others (versions, user agents) are no secrets.
SECRET_HEADER = re.compile(r"auth|key|token|secret|cookie|pass|credential|session|signature", re.IGNORECASE)
# Headers that frame the message: with them in the file, one request could be read as two (request smuggling).
FRAMING_HEADERS = {"connection", "content-length", "transfer-encoding", "te", "trailer", "upgrade", "accept-encoding"}


class Api(BaseModel):
    """One entry of the file, as it is written there; seconds throughout."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    base_url: str = Field(max_length=1_000)
    description: str = Field("", max_length=300)
    headers: dict[str, str] = Field({}, repr=False)
    rate_limit: int | None = Field(None, ge=1, le=1_000_000)
    rate_period: float = Field(60, gt=0, le=86_400)
    cache_ttl: float = Field(300, ge=0, le=604_800)
    timeout: float = Field(TIME_LIMIT, gt=0, le=TIME_LIMIT)
    methods: list[Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]] = Field(
        ["GET", "HEAD"], min_length=1
    )
    openapi: str | None = None


def parse_base_url(text: str) -> httpx.URL:
    """The base URL without a slash at its end. Raises ConfigError for all but scheme://host[:port][/path]."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as exc:
        raise ConfigError(f"base_url: {str(exc).lower()}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError("base_url: must begin with http:// or https:// and name a host")
    if url.port is not None and not 0 < url.port < 65_536:
        raise ConfigError(f"base_url: {url.port} is no port")
    if url.userinfo or "@" in text.partition("://")[2].partition("/")[0]:
        raise ConfigError("base_url: holds a user or password; put them into a header, from ${A_VARIABLE}")
    if "?" in text or "#" in text:
        raise ConfigError("base_url: holds a ? or #; leave out the query and the fragment")
    if "$" in text or "\\" in text or any(char.isspace() for char in text):
        raise ConfigError("base_url: holds a $, a backslash or a space; only header values may hold ${VARIABLES}")
    try:
        refuse_escape(re.sub(r"^[^:]*://[^/]*", "", text).rstrip("/"))
    except ToolError as exc:
        raise ConfigError(f"base_url: {str(exc).partition(';')[0].replace('endpoint', 'the path')}") from None
    return url.copy_with(raw_path=url.raw_path.rstrip(b"/") or b"/")


VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def expand_header(name: str, template: str, environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """The value with each ${VAR} filled in, and the secrets in it. Raises ConfigError, never showing a value."""
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}", name) or name.lower() in FRAMING_HEADERS:
        raise ConfigError(f"headers.{name!r}: not a header that can be set here")
    found: list[str] = []

    def fill(match: re.Match[str]) -> str:
        value = environ.get(match[1], "")
        if not value:
            raise ConfigError(f"headers.{name}: the environment variable {match[1]} is not set")
        if len(value) < MIN_SECRET:
            raise ConfigError(
                f"headers.{name}: {match[1]} is shorter than {MIN_SECRET} characters: masking so short a text would "
                "riddle every answer; if it is no secret, write it out in the file"
            )
        found.append(value)
        return value

    value = VARIABLE.sub(fill, template)
    if "${" in VARIABLE.sub("", template):
        raise ConfigError(f"headers.{name}: holds a ${{ that is no ${{VARIABLE_NAME}}")
    if not value.isascii() or not value.isprintable() or value != value.strip() or not value:
        raise ConfigError(f"headers.{name}: the value is empty, or holds a line break or another forbidden character")
    if not found and SECRET_HEADER.search(name) and len(value) >= MIN_SECRET:
        found.append(value)
    return value, found


@dataclass(frozen=True)
class Target:
    """One API of the file, checked: its base URL parsed, its headers filled in."""

    name: str
    api: Api
    base_url: httpx.URL
    headers: dict[str, str] = field(repr=False)
    openapi: Path | None


@dataclass(frozen=True)
class Config:
    """The file, checked, and what masks all the secrets in it."""

    targets: list[Target]
    mask: Masker

    @property
    def variables(self) -> list[str]:
        """The environment variables that the file needs."""
        return sorted({name for target in self.targets for name in VARIABLE.findall(str(target.api.headers))})

    def check(self) -> str:
        """What the server will do, as JSON, secrets masked: the answer to --check."""
        effective = {
            target.name: target.api.model_dump() | {"base_url": str(target.base_url), "headers": target.headers}
            for target in self.targets
        }
        return json.dumps(self.mask.json(effective), indent=2, ensure_ascii=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # JSON keeps the last of two equal names without a word
        twice = next(name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1)
        raise ConfigError(f"the key {twice!r} is there twice")
    return found


def _no_constant(text: str) -> Any:
    raise ConfigError(f"{text} is not JSON")


def parse_api(name: str, entry: Any, folder: Path, environ: Mapping[str, str]) -> tuple[Target, list[str]]:
    """One checked entry, and the secrets in it. Raises ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise ConfigError("a name is up to 64 letters, digits, dots, dashes and underscores")
    try:
        api = Api.model_validate(entry)
    except ValidationError as exc:
        error = exc.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, error["loc"]))
        place = f"{place}: " if place else ""
        if error["type"] == "extra_forbidden":
            raise ConfigError(f"{place}unknown key; the keys are {', '.join(Api.model_fields)}") from None
        raise ConfigError(f"{place}{error['msg'][0].lower()}{error['msg'][1:]}") from None
    headers: dict[str, str] = {}
    found: list[str] = []
    for header, template in api.headers.items():
        if header.lower() in map(str.lower, headers):
            raise ConfigError(f"headers.{header}: is there twice")
        headers[header], secrets_in_it = expand_header(header, template, environ)
        found += secrets_in_it
    openapi = folder / api.openapi if api.openapi is not None else None
    return Target(name, api, parse_base_url(api.base_url), headers, openapi), found


def load_config(path: Path, environ: Mapping[str, str]) -> Config:
    """Read and check the file. Raises ConfigError with one line that says where the mistake is."""
    try:
        document = json.loads(path.read_bytes(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from None
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from None
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{path}: not valid JSON: {exc}") from None
    if not is_object(document) or not document or len(document) > MAX_APIS:
        raise ConfigError(f"{path}: must be one JSON object that maps 1 to {MAX_APIS} names to an API each")
    targets: list[Target] = []
    found: list[str] = []
    for name, entry in document.items():
        try:
            target, secrets_in_it = parse_api(name, entry, path.parent, environ)
        except ConfigError as exc:
            raise ConfigError(f"{path}: {name if name.isprintable() else repr(name)}: {exc}") from None
        targets.append(target)
        found += secrets_in_it
    return Config(targets, Masker(found))


# ---------------------------------------------------------------------------------------------------------- bodies

# Codecs that are no charsets: punycode would take hours over an answer of 5 MB, and none of them is ever meant.
NO_CHARSETS = {"punycode", "idna", "unicode-escape", "raw-unicode-escape", "undefined"}
TEXT_TYPES = re.compile(r"text/|.*(json|xml|javascript|yaml|csv|urlencoded|graphql)")


async def read_body(response: httpx.Response, limit: int) -> tuple[bytes, bool]:
    """The first `limit` bytes, decompressed, and whether that is all. Raises ToolError and httpx.RequestError.

    One piece of `httpx.Response.aiter_bytes` from a gzip bomb is 67 MB: the cap must hold inside the decoder.
    """
    encoding = response.headers.get("content-encoding", "").strip()
    if encoding.lower() not in ("", "identity", "gzip", "x-gzip", "deflate"):
        shown = repr(encoding) if len(encoding) <= 40 else "something unknown"
        raise ToolError(f"the answer is compressed as {shown}, which was not asked for; try another endpoint")
    gzip_or_zlib = 47  # for wbits: whichever the header says
    unzip = None if encoding.lower() in ("", "identity") else zlib.decompressobj(gzip_or_zlib)
    body, received = bytearray(), 0
    try:
        async for piece in response.aiter_raw():
            received += len(piece)
            body += piece if unzip is None else unzip.decompress(piece, limit + 1 - len(body))
            while unzip and unzip.unused_data.startswith(b"\x1f\x8b") and len(body) <= limit:  # another gzip member
                piece, unzip = unzip.unused_data, zlib.decompressobj(gzip_or_zlib)
                body += unzip.decompress(piece, limit + 1 - len(body))
            # What is received counts as well: zlib collects whatever follows the end of the data.
            if len(body) > limit or received > 2 * limit:
                return bytes(body[:limit]), False
    except zlib.error:
        raise ToolError("the answer is not the gzip data that it claims to be; try another endpoint") from None
    if unzip and received and not unzip.eof:
        raise ToolError("the compressed answer ends too early; call again")
    return bytes(body), True


def decode_text(body: bytes, content_type: str) -> tuple[str | None, list[str]]:
    """The body as text, or None if it is binary; and what the reader must know about it."""
    is_json = "json" in content_type.lower()
    declared = re.search(r"charset=[\"']?([\w.:-]{1,40})", content_type, re.IGNORECASE)
    charset = declared[1].lower() if declared else ""
    with suppress(LookupError):
        charset = "" if codecs.lookup(charset).name.replace("_", "-") in NO_CHARSETS else charset
    # What is valid UTF-8 is UTF-8, whatever the header says, unless the header names an encoding that only looks so.
    guess = json.detect_encoding(body) if is_json or body[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    if (b"\0" in body and guess == "utf-8-sig") or (charset.startswith(("iso-2022", "utf-7")) and not is_json):
        guess = charset
    for codec in filter(None, [guess, charset]):
        try:
            text = body.decode("utf-8-sig" if codec == "utf-8" else codec)
        except (UnicodeError, LookupError):  # LookupError: there is no such text encoding
            continue
        if "\0" in text or (not TEXT_TYPES.match(content_type.lower()) and re.search(r"[\x01-\x08\x0e-\x1a]", text)):
            return None, []
        other = charset and not text.isascii() and codec.removesuffix("-sig") != charset
        return text, [f"read as {codec.removesuffix('-sig')}"] if other else []
    if TEXT_TYPES.match(content_type.lower()) and b"\0" not in body:
        return body.decode("utf-8", "replace"), ["not valid UTF-8: unreadable bytes shown as \ufffd"]
    return None, []


# One thread: parsing holds the interpreter lock anyway, and several at once would each take their share of memory.
WORKER = ThreadPoolExecutor(1, "long-body")


async def in_thread_if_long(content: Sized, function: Callable[..., T], *args: Any) -> T:
    """Work on a long body in the thread: on the event loop it would hold up every other call."""
    if len(content) < LONG_BODY:
        return function(*args)
    return await asyncio.get_running_loop().run_in_executor(WORKER, partial(function, *args))


@dataclass(frozen=True)
class Body:
    """An answer's body, ready to be shown: masked, and compact if it is JSON."""

    text: str
    json: bool = False
    facts: tuple[str, ...] = ()


def read_text(body: bytes, content_type: str, mask: Masker) -> Body:
    """Make a body readable. Masking comes before anything is cut: half a key at a page's end would not be found."""
    if not body:
        return Body("", facts=("no body",))
    text, facts = decode_text(body, content_type)
    if text is None:
        return Body("", facts=(f"binary body of {len(body):,} bytes, not shown",))
    if "json" in content_type.lower() or text.lstrip()[:1] in ("{", "["):
        try:
            value = load_json(text)
            compact = dump_json(value)
            masked = mask(compact)
            if masked != compact and not is_json(masked):  # a number was masked, or the half of an escape
                masked = dump_json(mask.json(value))
            return Body(masked, True, tuple(facts))
        except ValueError as exc:
            where = f" (character {exc.pos})" if isinstance(exc, json.JSONDecodeError) else ""
            facts.append(f"not valid JSON{where}, shown as it came")
        except RecursionError:
            facts.append("JSON nested too deeply, shown as it came")
    return Body(mask(text), False, tuple(facts))


# ---------------------------------------------------------------------------------------------------------- select
#
# items[*].name    the name of each item           items[0]["a.b"]     an index; a name in quotes
# id,name          an object of two fields         items[*].{id,owner.login}    the same for each item

SELECT_ADVICE = "write a path such as items[0].name, items[*].owner.login or items[*].{id,name}"
MISSING = object()
_STEP = re.compile(
    r"""\.?(?: \[(?P<index>-?\d{1,9})] | (?P<each>\[\*?]) | \["(?P<quoted>[^"]*)"]
           | \{(?P<braces>[^{}]*)} | \[(?P<brackets>[^][{}"]+)] | (?P<name>[^].[{},"]+) )""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Each:
    """The step [*]."""


@dataclass(frozen=True)
class Fields:
    """The step {a,b}: each field's text, which becomes its name in the result, and its own steps."""

    fields: tuple[tuple[str, "tuple[Step, ...]"], ...]


Step = str | int | Each | Fields


def parse_select(text: str) -> tuple[Step, ...]:
    """The steps of one path, with no comma outside braces. Raises ToolError."""
    text = re.sub(r"^\$(?=[.[]|$)", "", text.strip())
    steps: list[Step] = []
    position = 0
    while position < len(text):
        match = _STEP.match(text, position)
        if match is None:
            raise ToolError(f"select is wrong at {text[position : position + 20]!r}; {SELECT_ADVICE}")
        found = match[match.lastgroup or 0]
        match match.lastgroup:
            case "index":
                steps.append(int(found))
            case "each":
                steps.append(Each())
            case "braces" | "brackets":
                steps.append(parse_fields(found.split(",")))
            case _:
                steps.append(found if match.lastgroup == "quoted" else found.strip())
        position = match.end()
        if position < len(text) and isinstance(steps[-1], Fields):
            raise ToolError(f"select goes on behind {{...}}, which must be its end; {SELECT_ADVICE}")
    return tuple(steps)


def parse_fields(parts: Sequence[str]) -> Fields:
    """One step that takes several paths. Raises ToolError."""
    if not all(part.strip() for part in parts):
        raise ToolError(f"select names an empty field; {SELECT_ADVICE}")
    return Fields(tuple((part.strip(), parse_select(part)) for part in parts))


class Selection:
    """Follows one select into a JSON value, counting what it looks at."""

    def __init__(self) -> None:
        self._visits = 0
        self._found: set[str] = set()
        self._missing: dict[str, tuple[Step, Any]] = {}  # fields that were missing at least once, and where
        self._problem: tuple[Step, Any] = ("", None)

    def run(self, value: Any, steps: Sequence[Step]) -> Any:
        """What the steps lead to. Raises ToolError if nothing is there, naming what is."""
        result = self._follow(value, steps)
        problems = [] if result is not MISSING else [self._problem]
        # A field that some items have is null in the others; one that none has is surely a mistake.
        problems += [problem for label, problem in self._missing.items() if label not in self._found]
        if problems:
            raise ToolError(self._explain(*problems[0]))
        return result

    def _follow(self, value: Any, steps: Sequence[Step]) -> Any:
        for number, step in enumerate(steps):
            self._visits += 1
            if self._visits > MAX_VISITS:
                raise ToolError(f"select would look at more than {MAX_VISITS:,} values; choose a smaller part")
            if isinstance(step, Fields):
                return self._take(value, step)
            if isinstance(step, Each) and is_list(value):
                results = [self._follow(item, steps[number + 1 :]) for item in value]
                if results and all(result is MISSING for result in results):
                    return MISSING
                return [None if result is MISSING else result for result in results]
            if is_list(value) and isinstance(step, str) and step.isdecimal():
                step = int(step)
            if isinstance(step, int) and is_list(value) and -len(value) <= step < len(value):
                value = value[step]
                continue
            if isinstance(step, str) and is_object(value) and step in value:
                value = value[step]
                continue
            self._problem = (step, value)
            return MISSING
        return value

    def _take(self, value: Any, step: Fields) -> dict[str, Any]:
        results: dict[str, Any] = {}
        for label, steps in step.fields:
            result = self._follow(value, steps)
            if result is MISSING:
                self._missing.setdefault(label, self._problem)
            else:
                self._found.add(label)
            results[label] = None if result is MISSING else result
        return results

    @staticmethod
    def _explain(step: Step, value: Any) -> str:
        wanted = "no list" if isinstance(step, Each) else f"no {step!r}"
        if is_object(value):
            there = f"an object with {clip(', '.join(value), 300) or 'nothing in it'}"
        elif is_list(value):
            there = f"a list of {len(value)}: use [*] for each item, [0] for the first"
        else:
            there = f"the value {clip(dump_json(value), 60)}"
        return f"select finds {wanted} where there is {there}"


def parse_parts(select: str) -> list[str]:
    """`select` cut at the commas that stand outside quotes, braces and brackets. Raises ToolError if it is wrong."""
    parts = re.findall(r'(?:"[^"]*"|\{[^{}]*\}|\[[^\[\]]*\]|[^,"{}\[\]])+', select)
    if ",".join(parts) != select:
        raise ToolError("select holds a bracket, brace, quote or comma without its other half; " + SELECT_ADVICE)
    for part in parts:
        parse_select(part)
    return parts


def refuse_repetition(value: Any) -> None:
    """Raise ToolError for a value that is larger than any answer: {a,$.a,["a"]} holds the same text three times, and
    500 characters of that would take a gigabyte."""
    length, rest = 0, [value]
    while rest:
        item = rest.pop()
        length += len(item) if isinstance(item, str) else 1
        if is_object(item):
            rest += [*item, *item.values()]
        elif is_list(item):
            rest += item
        if length + len(rest) > MAX_REPEATED:
            raise ToolError("select takes the same parts several times, which is too long; choose fewer fields")


def select_json(value: Any, select: str) -> Any:
    """The part of a JSON value that `select` names. Raises ToolError."""
    parts = parse_parts(select)
    if len(parts) < 2:
        return Selection().run(value, parse_select(select))
    # "items[*].id,name" means the name of each item, and "id,items[*].name" one at the top: the first reading that
    # finds everything holds.
    prefix = re.match(r"(?:.*[.\]])?", parts[0])
    place = prefix[0] if prefix else ""
    nested = parse_fields([part.strip().removeprefix(place) for part in parts])
    try:
        return Selection().run(value, (*parse_select(place.removesuffix(".")), nested))
    except ToolError as problem:
        if not place:
            raise
        try:
            return Selection().run(value, (parse_fields(parts),))
        except ToolError:
            raise problem from None


# --------------------------------------------------------------------------------------------------------- OpenAPI


@dataclass(frozen=True)
class Operation:
    """One operation of an OpenAPI file: its own part of it, and the lower-case texts that a search looks through."""

    method: str
    path: str
    spec: Mapping[str, Any]
    shared: Sequence[Any]  # the parameters that all methods of the path have
    head: str
    text: str


def as_object(value: object) -> dict[str, Any]:
    """The value if it is an object, else an empty one: a broken file must not break the server."""
    return value if is_object(value) else {}


def as_list(value: object) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return value if is_list(value) else []


class OpenApi:
    """An OpenAPI 3.x file in JSON, read and indexed once; it names other files and hosts in vain."""

    def __init__(self, path: Path, methods: Sequence[str]) -> None:
        try:
            if path.stat().st_size > MAX_SPEC:
                raise ConfigError(f"openapi: {path} is larger than {MAX_SPEC:,} bytes")
            self._spec = as_object(json.loads(path.read_bytes()))
        except OSError as exc:
            raise ConfigError(f"openapi: cannot read {path}: {exc.strerror}") from None
        except (ValueError, RecursionError):
            raise ConfigError(f"openapi: {path} is not JSON; a YAML file must be converted first") from None
        if not str(self._spec.get("openapi", "")).startswith("3.") or not as_object(self._spec.get("paths")):
            raise ConfigError(f"openapi: {path} is not an OpenAPI 3.x file with paths")
        self._methods = methods
        self.operations = list(self._index())

    def _index(self) -> Iterator[Operation]:
        for path, item in as_object(self._spec.get("paths")).items():
            item = as_object(self._resolve(item))
            for method in METHODS:
                if is_object(spec := item.get(method.lower())):
                    head = f"{method} {path} {spec.get('operationId', '')} {spec.get('summary', '')}".lower()
                    text = f"{head} {as_list(spec.get('tags'))} {str(spec.get('description', ''))[:2000]}".lower()
                    yield Operation(method, path, spec, as_list(item.get("parameters")), head, text)

    def _overview(self) -> str:
        """What the file describes, and its operations if they are few, or else their tags."""
        info = as_object(self._spec.get("info"))
        title = f"{info.get('title', 'API')} {info.get('version', '')}: {len(self.operations)} operations"
        if len(self.operations) <= MAX_MATCHES:
            return "\n".join([title, *(self._line(operation) for operation in self.operations)])
        counts = Counter(str(tag) for operation in self.operations for tag in as_list(operation.spec.get("tags")))
        tags = ", ".join(f"{tag} ({count})" for tag, count in sorted(counts.items())[:60]) or "none"
        return "\n".join([title, f"tags: {tags}{' …' * (len(counts) > 60)}", trailer("give search, or endpoint")])

    def search(self, query: str) -> str:
        """The operations that hold every word of the query, or else some of them; the best first. All tags for none."""
        # A plural finds the singular, too: "users" is in no /user/{id}.
        words = [word.removesuffix("s") if len(word) > 3 else word for word in query.lower().split()[:10]]
        if not words:
            return self._overview()

        def rank(operation: Operation) -> tuple[int, int, int]:
            found, in_head = (sum(word in text for word in words) for text in (operation.text, operation.head))
            return -found, -in_head, len(operation.path)

        some = sorted((o for o in self.operations if any(word in o.text for word in words)), key=rank)
        best = [o for o in some if all(word in o.text for word in words)]
        facts = [] if best else ["no operation holds every word of the search; these hold some"]
        matches = best or some
        if not matches:
            return trailer(f"no operation of {len(self.operations)} matches; try other words, or none for the tags")
        if len(matches) > MAX_MATCHES:
            facts.insert(0, f"{MAX_MATCHES} of {len(matches)} operations shown; add words to narrow the search")
        lines = [self._line(operation) for operation in matches[:MAX_MATCHES]]
        return "\n".join([*lines, trailer(*facts, 'endpoint="METHOD /path" shows one in full')])

    def _line(self, operation: Operation) -> str:
        spec = operation.spec
        summary = clip(str(spec.get("summary") or spec.get("description") or ""), 100)
        name = f" ({spec['operationId']})" if "operationId" in spec else ""
        mark = "" if operation.method in self._methods else " [method not allowed here]"
        return f"{operation.method} {operation.path}{': ' if summary else ''}{summary}{name}{mark}"

    def describe(self, endpoint: str) -> str:
        """Parameters and schemas of the operations at `endpoint`: [METHOD] /path (concrete, too) or an operationId."""
        method, _, path = endpoint.strip().rpartition(" ")
        path = path.partition("?")[0]
        candidates = [operation for operation in self.operations if method.upper() in ("", operation.method)]
        found = [o for o in candidates if path in (o.path, o.path.strip("/"), o.spec.get("operationId"))]
        if not found:
            fitting = [o for o in candidates if self._fits(o.path, path)]
            fewest = min((o.path.count("{") for o in fitting), default=0)
            found = [o for o in fitting if o.path.count("{") == fewest]
        if not found:
            raise ToolError(f"no operation at {endpoint[:200]!r}; find it with search")
        found.sort(key=lambda operation: operation.method not in self._methods)
        blocks: list[str] = []
        for operation in found:
            shape = Shape(self._resolve)
            blocks.append("\n".join(self._details(operation, shape)))
            if shape.cut:
                depth = f"schemas are shown {SCHEMA_DEPTH} levels deep and {SCHEMA_FIELDS} fields at most"
                blocks[-1] += "\n" + trailer(f"{depth}; … stands for the rest")
        return "\n\n".join(blocks)

    @staticmethod
    def _fits(template: str, path: str) -> bool:
        ours, theirs = template.strip("/").split("/"), path.strip("/").split("/")
        return len(ours) == len(theirs) and all(a == b or "{" in a for a, b in zip(ours, theirs, strict=True))

    def _details(self, operation: Operation, shape: "Shape") -> Iterator[str]:
        spec = operation.spec
        yield self._line(operation)
        if spec.get("description"):
            yield clip(str(spec["description"]), 600)
        for given in [*operation.shared, *as_list(spec.get("parameters"))]:
            parameter = as_object(self._resolve(given))
            place = str(parameter.get("in", "?"))
            facts = [place, dump_json(shape.of(parameter.get("schema", True))).strip('"')]
            facts += ["required"] if parameter.get("required") else []
            facts += ["set by the server's configuration only"] if place in ("header", "cookie") else []
            text = clip(str(parameter.get("description", "")), 200)
            yield f"  {parameter.get('name', '?')} ({', '.join(facts)})" + (f": {text}" if text else "")
        body = as_object(self._resolve(spec.get("requestBody")))
        for content_type, media in as_object(body.get("content")).items():
            required = " (required)" if body.get("required") else ""
            yield f"data {content_type}{required}: {dump_json(shape.of(as_object(media).get('schema', True)))}"
        for status, given in as_object(spec.get("responses")).items():
            response = as_object(self._resolve(given))
            line = f"{status}: {clip(str(response.get('description', '')), 100)}"
            for content_type, media in list(as_object(response.get("content")).items())[:1]:
                if not status.startswith(("4", "5")):
                    line += f" {content_type} {dump_json(shape.of(as_object(media).get('schema', True)))}"
            yield line

    def _resolve(self, value: Any) -> Any:
        """Follow a `$ref` within this file (RFC 6901); anything that leads out of it is named, never fetched."""
        for _ in range(20):  # a reference may lead to a reference, but not for ever
            ref = as_object(value).get("$ref")
            if not isinstance(ref, str):
                return value
            if not ref.startswith("#/"):
                return {"type": f"see {ref[:100]} (outside this file, not read)"}
            value = self._spec
            for part in ref[2:].split("/"):
                part = unquote(part).replace("~1", "/").replace("~0", "~")
                if is_list(value):
                    value = value[int(part)] if part.isdecimal() and int(part) < len(value) else None
                else:
                    value = as_object(value).get(part)
            if value is None:
                return {"type": f"{ref[:100]} (not in this file)"}
        return {"type": "a reference that leads in a circle"}


class Shape:
    """Writes schemas as short examples of their shape: {"id":"integer","name?":"string"}; ? marks what is optional."""

    def __init__(self, resolve: Callable[[Any], Any]) -> None:
        self._resolve = resolve
        self._fields = SCHEMA_FIELDS
        self.cut = False

    def of(self, schema: Any, depth: int = SCHEMA_DEPTH, seen: frozenset[str] = frozenset()) -> Any:
        """The shape of one schema; … where it is too deep, too large, or contains itself."""
        ref = as_object(schema).get("$ref")
        if isinstance(ref, str):
            if ref in seen:
                return f"{ref.rpartition('/')[2]} again"
            seen |= {ref}
        schema = as_object(self._resolve(schema))
        self._fields -= 1
        if depth == 0 or self._fields < 0:
            self.cut = True
            return "…"
        if is_list(schema.get("allOf")) or is_object(schema.get("properties")):
            shape = self._object(schema, depth, seen)
            # Beside properties, choices often say no more than which of them are required together.
            choices = self._choices(schema, depth, seen)
            return shape | choices if is_object(shape) and is_object(choices) else shape
        if (choices := self._choices(schema, depth, seen)) is not None:
            return choices
        if "items" in schema:
            return [self.of(schema["items"], depth - 1, seen)]
        if is_object(schema.get("additionalProperties")):
            return {"<any name>": self.of(schema["additionalProperties"], depth - 1, seen)}
        if values := [schema["const"]] if "const" in schema else as_list(schema.get("enum")):
            return " | ".join(clip(str(value), 40) for value in values[:20]) + (" | …" if len(values) > 20 else "")
        kind = schema.get("type", "any")
        name = "|".join(str(one) for one in kind) if is_list(kind) else str(kind)
        default = f" = {clip(str(schema['default']), 40)}" if "default" in schema else ""
        return name + (f" ({schema['format']})" if "format" in schema else "") + default

    def _choices(self, schema: Mapping[str, Any], depth: int, seen: frozenset[str]) -> dict[str, Any] | str | None:
        for key in ("oneOf", "anyOf"):
            if is_list(choices := schema.get(key)):
                shapes = [self.of(choice, depth - 1, seen) for choice in choices[:20]] + ["…"] * (len(choices) > 20)
                structures = any(isinstance(shape, dict | list) for shape in shapes)
                return {key: shapes} if structures else " | ".join(dict.fromkeys(shapes))
        return None

    def _object(self, schema: Mapping[str, Any], depth: int, seen: frozenset[str]) -> Any:
        merged: dict[str, Any] = {}
        required = as_list(schema.get("required"))
        for name, item in as_object(schema.get("properties")).items():
            if self._fields <= 0:
                self.cut = True
                return merged | {"…": "…"}
            merged[name if name in required else name + "?"] = self.of(item, depth - 1, seen)
        for part in as_list(schema.get("allOf"))[:20]:
            shape = self.of(part, depth, seen)
            if is_object(shape):
                merged |= shape
            elif shape != "any":  # a part that only describes says nothing of the shape
                return shape if not merged else merged | {"…": shape}
        return merged


# ------------------------------------------------------------------------------------------------------- upstreams


@dataclass(frozen=True)
class Answer:
    """A successful answer, as it is cached and shown. `ttl` is None if it must not be kept at all."""

    status: int
    body: Body
    content_type: str
    headers: tuple[str, ...]
    validators: dict[str, str]
    ttl: float | None


@dataclass
class Flight:
    """One request under way, and how many callers wait for it."""

    task: asyncio.Task[tuple[Answer, str]]
    waiters: int = 0


@cache
def tls_context() -> Any:
    """The certificates are read once, when the first https API is called: 20 ms."""
    return httpx.create_ssl_context(trust_env=False)


def status_line(status: int) -> str:
    """The status with its standard reason; the upstream's own reason could say anything."""
    return f"{status} {http_client.responses.get(status, '')}".strip()


def seconds_until(date: str) -> float:
    """Seconds from now to an HTTP date. Raises ValueError."""
    try:
        when = parsedate_to_datetime(date)
        return (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    except (TypeError, OverflowError):
        raise ValueError(date) from None


def retry_after(response: httpx.Response) -> float | None:
    """The seconds that Retry-After asks for (RFC 9110, 10.2.3), or None."""
    text = response.headers.get("retry-after", "").strip()
    with suppress(ValueError):
        return float(text) if re.fullmatch(r"[0-9]{1,9}", text) else max(0.0, seconds_until(text))
    return None


def freshness(headers: httpx.Headers, ttl: float) -> float | None:
    """Seconds for which an answer may be used again, at most `ttl`: 0.0 = only after asking, None = not to be kept.

    RFC 9111 for a private cache: no-store, no-cache, max-age less Age, else Expires; `Vary: *` matches nothing.
    """
    directives: dict[str, str] = {}
    for part in headers.get("cache-control", headers.get("pragma", "")).lower().split(","):
        name, _, value = part.partition("=")
        directives[name.strip()] = value.strip().strip('"')
    if "no-store" in directives or headers.get("vary", "").strip() == "*":
        return None
    if "no-cache" in directives:
        return 0.0
    left = ttl
    if "max-age" in directives:
        lifetime, age = (
            int(text[:9]) if re.fullmatch("[0-9]+", text) else 0
            for text in (directives["max-age"], headers.get("age", ""))
        )
        left = lifetime - age
    elif "expires" in headers:
        left = 0.0  # "0" and the like are no date and mean: already expired
        with suppress(ValueError):
            left = seconds_until(headers["expires"])
    return max(0.0, min(ttl, left))


DEFAULT_HEADERS = {
    "User-Agent": f"small-mcp-servers/{__version__}",
    "Accept": f"{JSON_TYPE}, */*;q=0.8",
    "Accept-Encoding": "gzip",
}


class Upstream:
    """One API: its connection pool, its token bucket, its cache, and the requests under way."""

    def __init__(
        self, target: Target, mask: Masker, timer: Callable[[], float], sleep: Callable[[float], Awaitable[None]]
    ) -> None:
        self.name = target.name
        self.api = target.api
        self.base_url = target.base_url
        self.spec = OpenApi(target.openapi, target.api.methods) if target.openapi else None
        self.bucket: TokenBucket | None = None
        if (limit := self.api.rate_limit) is not None:
            self.bucket = TokenBucket(limit, limit / self.api.rate_period, timer=timer, sleep=sleep)
        self.cache = TTLCache[bytes, Answer](CACHE_ENTRIES, self.api.cache_ttl, max_bytes=CACHE_BYTES, timer=timer)
        self._root = str(target.base_url).rstrip("/")
        self._headers = httpx.Headers(DEFAULT_HEADERS)
        self._headers.update(target.headers)
        self._form = "urlencoded" in self._headers.get("content-type", "")
        self._mask = mask
        self._timer = timer
        self._sleep = sleep
        self._pool: httpx.AsyncHTTPTransport | None = None
        self._flights: dict[bytes, Flight] = {}
        # A little less than the time every tool has, so that it is this message that the model reads.
        self._seconds = min(self.api.timeout, TIME_LIMIT - 0.5)
        timeout = httpx.Timeout(self._seconds, connect=min(CONNECT_TIMEOUT, self._seconds))
        self._extensions = {"timeout": timeout.as_dict()}

    @property
    def limits_left(self) -> str:
        """How many calls the token bucket would let through now."""
        if self.bucket is None:
            return "no limit"
        left = max(0, math.floor(self.bucket.tokens))
        return f"{left} of {self.api.rate_limit} calls left, refilled over {self.api.rate_period:g} s"

    def prepare(self, method: str, endpoint: str, params: Mapping[str, Any], data: Any) -> Call:
        """Check a call before anything is spent on it. Raises ToolError."""
        allowed = self.api.methods
        if method.upper() not in allowed or not method.isascii():
            raise ToolError(f"method {method[:20]!r} is not allowed for {self.name}; allowed: {', '.join(allowed)}")
        return build_call(self._root, method.upper(), endpoint, params, data, self._form)

    async def call(self, call: Call, use_cache: bool, offset: int) -> tuple[Answer, str]:
        """The answer, and where it came from. Raises ToolError."""
        if (offset or (use_cache and call.method == "GET")) and (answer := self.cache.get(call.key)) is not None:
            entry = self.cache.peek(call.key)
            now = self._timer()
            age, left = (now - entry.stored, entry.expires - now) if entry else (0.0, 0.0)
            return answer, f"cache hit, {age:.0f} s old, {left:.0f} s left"
        if offset and call.method not in SAFE:
            raise ToolError(f"the rest of that answer is no longer kept; without offset, {call.method} is sent again")
        if call.method == "GET" and use_cache and self.api.cache_ttl:
            return await self._share(call)
        return await self._fetch(call, None)

    async def _share(self, call: Call) -> tuple[Answer, str]:
        """Let identical calls wait for one request; it goes on as long as one of them still waits."""
        flight = self._flights.get(call.key)
        if flight is None:
            stale = self.cache.peek(call.key)
            task = asyncio.create_task(self._fetch(call, stale.value if stale else None))
            flight = self._flights[call.key] = Flight(task)
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)  # without shield, one cancelled caller would end it for all
        finally:
            flight.waiters -= 1
            if flight.task.done() or not flight.waiters:
                flight.task.cancel()
                if self._flights.get(call.key) is flight:
                    del self._flights[call.key]

    async def _fetch(self, call: Call, stale: Answer | None) -> tuple[Answer, str]:
        deadline = asyncio.get_running_loop().time() + self._seconds
        try:
            async with asyncio.timeout_at(deadline):
                return await self._attempt(call, stale, deadline)
        except TimeoutError:
            problem = f"{self.name} did not finish its answer within {self._seconds:g} s; "
            raise ToolError(problem + self._advise(call, "ask for less, or try again later")) from None
        except (httpx.RequestError, OSError) as exc:
            raise ToolError(self._describe(call, exc)) from None

    @staticmethod
    def _advise(call: Call, advice: str) -> str:
        """What to do after an answer was lost: a model that just tries again would order everything twice."""
        doubt = f"the {call.method} may have had its effect: look before you send it again"
        return advice if call.method in IDEMPOTENT else doubt

    async def _attempt(self, call: Call, stale: Answer | None, deadline: float) -> tuple[Answer, str]:
        """Send, and send again with growing, jittered pauses where that cannot do harm twice."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            pause = uniform(0.5, 1) * BACKOFF * 2 ** (attempt - 1)  # noqa: S311 - jitter, no secret
            last = attempt == MAX_ATTEMPTS or call.method not in IDEMPOTENT
            try:
                response = await self._send(call, stale, deadline)
            except (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout) as exc:
                # Waiting for a connection once more must fit whole, or the model would not learn what was wrong.
                needed = CONNECT_TIMEOUT if isinstance(exc, httpx.ConnectTimeout) else 0.0
                if last or not self._fits(pause + needed, deadline):
                    raise ToolError(self._describe(call, exc)) from None
            else:
                try:
                    asked = retry_after(response) if response.status_code in (429, 503) else None
                    again = response.status_code in (502, 503, 504) or asked is not None
                    pause = max(pause, asked or 0.0)
                    if last or not again or not self._fits(pause, deadline):
                        return await self._finish(call, response, stale)
                finally:
                    await response.aclose()
            await self._sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    @staticmethod
    def _fits(pause: float, deadline: float) -> bool:
        return asyncio.get_running_loop().time() + pause < deadline

    async def _send(self, call: Call, stale: Answer | None, deadline: float) -> httpx.Response:
        """One attempt: a token, a request, and the same again for each redirect. The caller closes the response."""
        method, url, content = call.method, httpx.URL(call.url), call.content
        headers = httpx.Headers(stale.validators if stale else {})
        if content is not None:
            headers["Content-Type"] = call.content_type
        headers.update(self._headers)
        for _ in range(MAX_REDIRECTS + 1):
            require_inside(self.base_url, url)
            await self._take_token(deadline)
            request = httpx.Request(method, url, headers=headers, content=content, extensions=self._extensions)
            response = await self._open_pool().handle_async_request(request)
            response.request = request
            if response.status_code not in (301, 302, 303, 307, 308) or "location" not in response.headers:
                return response
            await response.aclose()
            url = self._redirected(url, response.headers["location"])
            if method not in SAFE and response.status_code in (301, 302, 303):
                method, content = "GET", None
                headers.pop("Content-Type", None)  # there is no body any more
                if method not in self.api.methods:
                    raise ToolError(
                        f"{self.name} took the {call.method} and redirects to a GET of {self._show(url.path, 200)}, "
                        "which is not allowed here; the call may have had its effect, do not repeat it"
                    )
        raise ToolError(f"{self.name} redirects more than {MAX_REDIRECTS} times; try another endpoint")

    def _redirected(self, url: httpx.URL, location: str) -> httpx.URL:
        """Where a redirect leads. Raises ToolError unless it stays with the API."""
        try:
            target = url.join(location).copy_with(fragment=None)
        except (httpx.InvalidURL, ValueError):
            raise ToolError(
                f"{self.name} redirects to something that is no URL: not followed; try another endpoint"
            ) from None
        try:
            require_inside(self.base_url, target)
        except ToolError:
            # A host is in lower case, in which the mask would not know a key.
            shown = origin(target) if self._mask(location) == location else "an address with a key in it"
            where = f"another origin, {shown}"
            if origin(target) == origin(self.base_url):
                path = target.raw_path.decode().partition("?")[0]
                where = f"{self._show(path, 200)}, which is outside its base path or hides where it leads"
            raise ToolError(
                f"{self.name} redirects to {where}: nothing was sent there, because its keys are for {self.base_url}; "
                "if you need it, it must be configured as an API of its own"
            ) from None
        return target

    def _asked(self, response: httpx.Response) -> str:
        return f"{response.request.method} {self._show(response.request.url.path, 200)}"

    def _show(self, text: str, limit: int) -> str:
        """Text of the upstream on one line, masked before it is cut: half a key would not be found afterwards."""
        return clip(self._mask(text), limit)

    async def _take_token(self, deadline: float) -> None:
        if self.bucket is None:
            return
        wait = await self.bucket.acquire(deadline - asyncio.get_running_loop().time())
        if wait:
            raise ToolError(
                f"the rate limit of {self.name} ({self.api.rate_limit} calls per {self.api.rate_period:g} s) is used "
                f"up; try again in {math.ceil(wait)} s"
            )

    async def _finish(self, call: Call, response: httpx.Response, stale: Answer | None) -> tuple[Answer, str]:
        """Turn a response into an answer and keep it if that is allowed. Raises ToolError for an HTTP error."""
        if stale is not None and response.status_code == 304:
            return self._keep(call, stale, freshness(response.headers, stale.ttl or 0.0), "revalidated (304)")
        ttl = freshness(response.headers, self.api.cache_ttl)
        content_type = self._show(response.headers.get("content-type", ""), 200)
        if not response.is_success:
            await self._raise_http_error(response, content_type)
        body, whole = await read_body(response, MAX_BODY)
        if not whole:
            raise ToolError(f"{self.name}'s answer is larger than {MAX_BODY:,} bytes; ask for less, or page through it")
        validators = {
            header: response.headers[source]
            for header, source in (("If-None-Match", "etag"), ("If-Modified-Since", "last-modified"))
            if source in response.headers and response.headers[source].isascii()
        }
        facts = self._passed_on(response.headers)
        if response.request.method != call.method:  # otherwise it looks as if the POST had returned what a GET shows
            facts.insert(0, f"the {call.method} was redirected: this answers {self._asked(response)}")
        answer = Answer(
            response.status_code,
            await in_thread_if_long(body, read_text, body, content_type, self._mask),
            content_type,
            tuple(facts),
            validators,
            ttl,
        )
        return self._keep(call, answer, ttl, "cache miss")

    def _keep(self, call: Call, answer: Answer, ttl: float | None, note: str) -> tuple[Answer, str]:
        if call.method == "GET" and answer.status == 200 and self.api.cache_ttl:
            # Without a validator, an answer that has expired on arrival is of no use to anyone.
            if ttl is None or (ttl == 0 and not answer.validators):
                self.cache.discard(call.key)
                return answer, f"{note}, not kept (the upstream forbids it)"
            note = f"{note}, kept for {ttl:.0f} s"
        elif call.method not in SAFE and ttl is not None:  # only so that offset can go on without sending it twice
            note, ttl = "not cached", PAGE_TTL
        else:
            return answer, "not cached"
        self.cache.put(call.key, answer, ttl=ttl, size=sys.getsizeof(answer.body.text) + 1_000)
        return answer, note

    async def _raise_http_error(self, response: httpx.Response, content_type: str) -> None:
        try:
            body, _ = await read_body(response, MAX_ERROR_BODY)
            text = read_text(body, content_type, self._mask)
            shown = clip(text.text[: 4 * MAX_ERROR_TEXT] or "; ".join(text.facts), MAX_ERROR_TEXT)
        except ToolError as exc:
            shown = str(exc)
        wait = retry_after(response)
        again = "" if wait is None else f"; try again in {math.ceil(wait)} s"
        limits = "".join(f"; {text}" for text in self._passed_on(response.headers) if "limit" in text.partition(":")[0])
        what = f"{status_line(response.status_code)} to {self._asked(response)}"
        raise ToolError(f"{self.name} answered {what}{again}{limits}: {shown}")

    def _passed_on(self, headers: httpx.Headers) -> list[str]:
        """The few response headers that a caller needs: pages and limits. Links below the base URL become endpoints."""
        root = re.escape(self.base_url.raw_path.decode().rstrip("/"))
        here = re.compile(f"<(?:{re.escape(origin(self.base_url))})?{root}/(?!/)")
        wanted = re.compile(r"link$|retry-after$|(x-)?rate-?limit")
        found = [f"{name}: {here.sub('</', value)}" for name, value in headers.items() if wanted.match(name)]
        more = [f"{len(found) - MAX_HEADERS} more such headers"] if len(found) > MAX_HEADERS else []
        return [self._show(text, MAX_HEADER_TEXT) for text in found[:MAX_HEADERS]] + more

    def _describe(self, call: Call, exc: httpx.RequestError | OSError) -> str:
        """One sentence for the model; the exception's own text may name hosts, proxies and header values."""
        match exc:
            case httpx.ConnectTimeout():
                return f"{self.name} could not be reached within {min(CONNECT_TIMEOUT, self._seconds):g} s; try later"
            case httpx.PoolTimeout():
                return f"{self.name} is busy: all {MAX_CONNECTIONS} connections are in use; try again in a few seconds"
            case httpx.TimeoutException():
                return f"{self.name} sent nothing for {self._seconds:g} s; {self._advise(call, 'try again later')}"
            case httpx.ConnectError():
                return f"{self.name} cannot be reached (name, connection or certificate refused); check its base_url"
            case _:
                problem = f"{self.name} broke off the connection before its answer was complete; "
                return problem + self._advise(call, "try again")

    def _open_pool(self) -> httpx.AsyncHTTPTransport:
        # Not httpx.AsyncClient: that keeps cookies between callers, sends keys to the proxy that the environment names
        # and reads .netrc, and on a redirect forwards X-API-Key and its like to whatever host the answer names.
        if self._pool is None:
            self._pool = httpx.AsyncHTTPTransport(
                verify=tls_context() if self.base_url.scheme == "https" else False,  # no origin has both
                limits=httpx.Limits(max_connections=MAX_CONNECTIONS, keepalive_expiry=15),
            )
        return self._pool

    async def close(self) -> None:
        """Close the connections; the next call would open new ones."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.aclose()


def render(call: Call, answer: Answer, note: str, select: str, offset: int, max_output: int) -> str:
    """The body, or what `select` takes from it, from `offset` on; the last line says what it is and what was cut."""
    body = answer.body
    text = body.text
    if select:
        if not body.json:
            what = "; ".join(body.facts) or answer.content_type or "of no type"
            raise ToolError(f"select needs JSON, and the answer is {what}; leave select out")
        try:
            selected = select_json(load_json(text), select)
            if len(text) * (1 + select.count(",")) > MAX_REPEATED:
                refuse_repetition(selected)
            text = dump_json(selected)
        except RecursionError:
            raise ToolError("the JSON is nested too deeply for select; leave select out") from None
    facts = [
        status_line(answer.status),
        *re.findall(r"^[\w.+-]+/[\w.+-]+", answer.content_type),  # without the rest, which could imitate this line
        note,
        *body.facts,
        *answer.headers,
    ]
    kept = call.method in SAFE or answer.ttl is not None
    return show_part(text, facts, offset, max_output, kept=kept)


def show_part(text: str, facts: list[str], offset: int, max_output: int, *, kept: bool = True) -> str:
    """The text from `offset` on, as much as fits, and the facts, with what was cut, as its last line."""
    if offset and offset >= len(text):
        raise ToolError(f"offset={offset} is past the end: there are {len(text)} characters; use a smaller offset")
    room = max(max_output - len(trailer(*facts)) - 100, max_output // 2, 1)
    end = len(text)
    if max_output and end - offset > (room if facts else max_output):
        end = offset + room
    if offset or end < len(text):
        facts.append(f"characters {offset + 1}-{end} of {len(text)} shown")
    resume: dict[str, int] = {}
    if end < len(text) and kept:
        resume = {"offset": end}
    elif end < len(text):
        facts.append("the upstream forbids to keep the rest: use select")
    return "\n".join(filter(None, [text[offset:end], trailer(*facts, **resume) if facts else ""]))


# ----------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Serve the APIs named in the file on the command line."""
    parser = argument_parser("api-server", "Serve HTTP APIs to a language model, without showing it their keys.")
    parser.add_argument("apis", type=Path, metavar="APIS.json", help="the file that names the APIs")
    parser.add_argument("--check", action="store_true", help="print what the file means, secrets masked, and exit")

    def build(args: argparse.Namespace, options: Options) -> Server:
        config = load_config(args.apis, os.environ)
        server = build_server(config, options)
        server.health = in_thread_of_its_own(partial(load_config, args.apis, os.environ))
        server.variables = config.variables
        if args.check:
            print(config.check())
            sys.exit(0)
        return server

    serve(parser, build)


if __name__ == "__main__":
    main()
