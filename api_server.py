# /// script
# requires-python = ">=3.11"
# dependencies = ["mcp>=2.3,<3", "httpx>=0.28,<0.29"]
# ///
"""An MCP server that calls the HTTP APIs named in a file, and keeps their keys.

    python api_server.py APIS.json            (--call list_apis shows what the file means, --help lists the options)

Trust boundary: the file and the environment are yours; everything the model sends (endpoint, method, params, data) and
everything an upstream answers is untrusted. A request goes to its API's own origin and below its base path or not at
all, and what came from ${ENV_VAR} is masked in all that leaves the server.
Not defended against: an upstream that hides the key in a spelling that `Masker` does not know, a name server that lies
about a host named in the file, and what an API does with a request that it allows.
"""

import sys

try:
    import serving  # isort: skip - first of all: it checks Python and mcp, and imports the SDK without garbage collection
    import httpx
except ModuleNotFoundError as missing:
    sys.stderr.write(f"api_server.py needs {missing.name}: copy serving.py and common.py here, pip install httpx\n")
    sys.exit(2)

import argparse
import asyncio
import base64
import html
import json
import logging
import math
import os
import random
import re
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from functools import lru_cache, partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlencode

import pydantic
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import BaseModel, Field

from common import ConfigError, Sleep, Timer, TokenBucket, TTLCache, trailer
from serving import READ_ONLY, TIME_LIMIT, Options, Server

# ---------------------------------------------------------------------------------------------------------- limits

MAX_BODY = 5_000_000  # bytes of an answer, decompressed; parsed JSON takes up to 25 times that in memory
LONG_BODY = 100_000  # bytes from which an answer is worked on in a thread: about a millisecond's work
MAX_REQUEST, MAX_URL = 1_000_000, 8_000  # characters of a request body, and of a URL: common servers refuse longer ones
MAX_DECODES, MAX_REDIRECTS = 5, 5  # rounds of decoding (nobody means more than two); steps from place to place
CACHE_ENTRIES, CACHE_BYTES = 500, 48_000_000  # per API; any one body fits twice, however its characters are stored
PAGE_TTL = 300.0  # seconds for which a cut answer is kept for its own continuation
MAX_ERROR_BODY, MAX_ERROR_TEXT = 64_000, 800  # bytes of an error's body that are read, characters that are shown
MIN_SECRET = 4  # characters; masking a shorter text would riddle every answer
MAX_SELECTED = 2 * MAX_BODY  # what a select may cost: characters that it gives, and ten for each step that it goes

SAFE = {"GET", "HEAD", "OPTIONS"}  # RFC 9110, 9.2.1
IDEMPOTENT = SAFE | {"PUT", "DELETE"}  # RFC 9110, 9.2.2
OWN_HEADERS = {"user-agent": f"small-mcp-servers/{serving.__version__}", "accept-encoding": "gzip", "accept": "*/*"}


# ------------------------------------------------------------------------------------------------------------ the tools
#
# What the model sees; describe_api is in api_openapi.py. A tool checks its arguments, calls what stands below, returns.


# Any JSON. The type says str because for other types the SDK takes the text "null" for no argument at all.
Data = Annotated[str, pydantic.PlainValidator(lambda value: value), pydantic.WithJsonSchema({})]
MAYBE: Any = None


class Gateway(NamedTuple):
    """The tools, and what they need."""

    upstreams: Mapping[str, "Upstream"]
    server: Server

    async def list_apis(self) -> dict[str, list[dict[str, Any]]]:
        """List the APIs that call_api can reach: base URL, allowed methods, how much of the rate limit is left, for how
        many seconds answers are cached, and whether describe_api knows the API."""
        return {"apis": [upstream.describe() for upstream in self.upstreams.values()]}

    async def call_api(
        self,
        api: Annotated[str, Field(description="name from list_apis", max_length=64)],
        endpoint: Annotated[str, Field(description="path below the base URL: /users/42", max_length=2_000)],
        method: Annotated[str, Field(description="one that list_apis shows", max_length=10)] = "GET",
        params: Annotated[dict[str, Any] | None, Field(description="query, or values for {names} in the path")] = None,
        data: Annotated[Data, Field(description="request body: JSON; other text is sent as plain text")] = MAYBE,
        use_cache: Annotated[bool, Field(description="false: ask the API anew", strict=True)] = True,
        select: Annotated[str, Field(description="JMESPath: items[*].{id: id, who: owner.login}", max_length=500)] = "",
        offset: Annotated[int, Field(description="first character shown", ge=0, strict=True)] = 0,
    ) -> str:
        """Call an API and return the body (JSON compact), then one line in brackets: status, type, cache state, page
        and rate-limit headers, what was cut. A cut body is kept for 5 minutes to continue with offset. Use select to
        get only the fields needed of a JSON body. An HTTP error is an error that shows the start of its body."""
        upstream = self.upstreams.get(api)
        if upstream is None:
            raise ToolError(f"unknown API {api!r}; the APIs are {', '.join(self.upstreams)}")
        part = Select(select) if select else None  # before anything is sent
        call = upstream.prepare(method, endpoint, params or {}, data)
        page = f"page {self.server.caller.get()} {call.key}"  # nobody else's call may change what continues this one
        answer = upstream.kept(page) if offset else await upstream.call(call, use_cache)
        if answer is None:  # to fetch the rest could give the rest of another version
            raise ToolError("the rest of that answer is no longer kept; call again without offset, or use select")
        text = await in_thread_if_long(len(answer.text), part.text_of, answer) if part else answer.text
        facts = [*answer.facts[:2], answer.note, *answer.facts[2:]]
        shown, more = show_part(text, facts, offset, self.server.options.max_output, kept=answer.ttl is not None)
        if more:
            upstream.keep(page, answer, PAGE_TTL)
        return shown


def build_server(
    config: "Config", options: Options | None = None, timer: Timer = time.monotonic, sleep: Sleep = asyncio.sleep
) -> Server:
    """The server with its tools. Raises ConfigError if an OpenAPI file cannot be read."""
    for name in ("httpx", "httpcore"):  # they log URLs and response headers
        logging.getLogger(name).setLevel(logging.WARNING)
    upstreams = {name: Upstream(name, api, config.mask, timer, sleep) for name, api in config.apis.items()}
    about = f"Calls the HTTP APIs {clip(', '.join(upstreams), 500)}. Keys are added by the server and are never shown."
    server = Server("api-server", about, options or Options())
    server.redact, server.variables = config.mask, config.variables
    gateway = Gateway(upstreams, server)
    methods = {method for api in config.apis.values() for method in api.methods}
    safe, again = methods <= SAFE, methods <= IDEMPOTENT
    calls = ToolAnnotations(read_only_hint=safe, destructive_hint=not safe, idempotent_hint=again, open_world_hint=True)
    server.tool(annotations=READ_ONLY)(gateway.list_apis)
    server.tool(annotations=calls, structured_output=False)(gateway.call_api)
    if files := {name: (config.folder / api.openapi, api.methods) for name, api in config.apis.items() if api.openapi}:
        try:
            import api_openapi
        except ModuleNotFoundError:
            raise ConfigError("openapi needs api_openapi.py: copy it beside api_server.py") from None
        show = partial(show_part, facts=(), max_output=server.options.max_output)
        api_openapi.add_describe_api(server, files, lambda text, offset: show(text, offset=offset)[0])
    return server


def show_part(text: str, facts: Sequence[str], offset: int, max_output: int, *, kept: bool = True) -> tuple[str, bool]:
    """The text from `offset` on, as much as fits above a last line of facts, and whether that line says how to go on
    (if the answer is `kept`). Raises ToolError for an offset past the end."""
    # Headers of the upstream must not crowd out its answer.
    total, facts = len(text), [clip(fact, (max_output or 10**6) // 20 + 40) for fact in facts if fact]
    if offset and offset >= total:
        raise ToolError(f"offset={offset} is past the end: there are {total} characters; use a smaller offset")

    def last_line(end: int) -> str:
        part = [f"characters {offset + 1}-{end} of {total} shown"] if offset or end < total else []
        part += ["the upstream forbids to keep the rest: use select"] if end < total and not kept else []
        resume = {"offset": end} if end < total and kept else {}
        return "\n" * bool(text) + trailer(*facts, *part, **resume) if facts or part else ""

    end = total
    if max_output and total - offset + len(last_line(total)) > max_output:
        end = min(total, offset + max(max_output - len(last_line(total - 1)), 1))
    return text[offset:end] + last_line(end), end < total and kept


# ---------------------------------------------------------------------------------------------------- configuration

VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}: [!-~](?:[ -~]*[!-~])?")
# Literal values of headers with such a name are masked too; those of others (versions, user agents) are no secrets.
SECRET_HEADER = re.compile(r"auth|key|token|secret|cookie|pass|credential|session|signature", re.IGNORECASE)
Method = Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def require_plain_url(text: str) -> str:
    """The base URL without a slash at its end. A user, a query or a fragment in it could change what it names."""
    with suppress(httpx.InvalidURL, ToolError):
        url = httpx.URL(text)
        match = re.fullmatch(r"https?://[^/?#@\\$\s]+(/[^?#\\$\s]*)?", text, re.IGNORECASE)
        if match and url.host and 0 < (80 if url.port is None else url.port) < 65_536:
            refuse_escape((match[1] or "").rstrip("/"))
            return str(url).rstrip("/")
    raise ValueError("must be http:// or https://, a host, and at most a port and a plain path, nothing else")


def fill_in(templates: dict[str, str], info: pydantic.ValidationInfo) -> dict[str, str]:
    """The headers with each ${VAR} filled in; notes the secrets in them. No value is ever part of an error."""
    environ, found = cast("tuple[Mapping[str, str], dict[str, str]]", info.context)
    filled: dict[str, str] = {}
    for name, template in templates.items():
        variables = VARIABLE.findall(template)
        if short := [variable for variable in variables if len(environ.get(variable, "")) < MIN_SECRET]:
            raise ValueError(f"{name}: {short[0]} is not set, or shorter than {MIN_SECRET} characters")
        filled[name] = value = VARIABLE.sub(lambda match: environ[match[1]], template)
        if "${" in VARIABLE.sub("", template) or not HEADER.fullmatch(f"{name}: {value}"):
            raise ValueError(f"{name!r} is a header that cannot be set here, or its value is empty or malformed")
        found |= {variable: environ[variable] for variable in variables}
        if SECRET_HEADER.search(name) and len(value) >= MIN_SECRET:
            found[f"{name}: {value}"] = value
    return filled


class Api(BaseModel):
    """One entry of the file, as it is written there; seconds throughout. `rate_limit` requests in `rate_period` is the
    long run: after a pause, as many again may pass in one period (a token bucket), so give half of a hard limit."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    base_url: Annotated[str, pydantic.AfterValidator(require_plain_url)] = Field(max_length=1_000)
    description: str = Field("", max_length=300)
    headers: Annotated[dict[str, str], pydantic.AfterValidator(fill_in)] = Field({}, repr=False)
    rate_limit: int | None = Field(None, ge=1, le=1_000_000)
    rate_period: float = Field(60, gt=0, le=86_400)
    cache_ttl: float = Field(300, ge=0, le=604_800)
    timeout: float = Field(TIME_LIMIT, gt=0, le=TIME_LIMIT)
    methods: list[Method] = Field(["GET", "HEAD"], min_length=1)
    openapi: str | None = None


APIS = pydantic.TypeAdapter(Annotated[dict[str, Api], Field(min_length=1, max_length=60)])


class Config(NamedTuple):
    """The file, checked, and what masks all the secrets in it."""

    folder: Path
    apis: dict[str, Api]
    mask: "Masker"
    variables: Sequence[str]  # of the environment, without which the file means nothing


def load_config(path: Path, environ: Mapping[str, str]) -> Config:
    """Read and check the file. Raises ConfigError with one line that says where the mistake is."""
    found: dict[str, str] = {}
    try:
        apis = APIS.validate_json(path.read_bytes(), context=(environ, found))
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from None
    except pydantic.ValidationError as exc:
        error = exc.errors(include_url=False, include_input=False)[0]
        message = error["msg"].removeprefix("Value error, ")
        raise ConfigError(clip(": ".join(map(str, [path, *error["loc"], message])), 1_000)) from None
    return Config(path.parent, apis, Masker([*found.values()]), sorted(found.keys() & environ.keys()))


# --------------------------------------------------------------------------------------------------------- secrets


def forms_of(value: str) -> Iterator[str]:
    """A secret and its parts, in all the spellings that are replaced."""
    parts = {value, *(part for part in re.split(r"[\s;,=]+", value) if len(part) >= 2 * MIN_SECRET)}
    for part in tuple(parts):
        with suppress(ValueError):  # HTTP Basic: the password inside is a secret, too
            pair = base64.b64decode(part + "=" * (-len(part) % 4), validate=True).decode("ascii")
            parts |= {text for text in (pair, pair.partition(":")[2]) if ":" in pair and len(text) >= MIN_SECRET}
    for text in parts:
        data = text.encode()
        yield from (text, data.hex(), data.hex().upper(), json.dumps(text)[1:-1], html.escape(text))
        yield from (quote(text), quote(text, safe=""), quote_plus(text))
        for shift in range(3):  # the characters that hold bits of nothing but the secret
            encoded = base64.b64encode(b"\0" * shift + data).decode()
            encoded = encoded[-(-8 * shift // 6) : 8 * (shift + len(data)) // 6]
            yield from (encoded, encoded.replace("+", "-").replace("/", "_"))


class Masker:
    """Takes the secrets that it was given out of texts, in every spelling in which an upstream is likely to echo them.

    Replaced by *** are a secret as it is, as URLs, JSON, HTML and hexadecimal write it, and in base64 at each of the
    three alignments; so are the parts of a value such as `Bearer KEY`, and `USER:PASSWORD` inside base64. If one shows
    up only when the text is decoded, once or again and again, all of it is withheld. The repr shows none of it.
    """

    def __init__(self, values: Sequence[str]) -> None:
        self._forms = sorted({form for value in values for form in forms_of(value)}, key=len, reverse=True)
        # A page of a cached answer is masked once, not at every hit; longer texts are too large to keep.
        self._remembered = lru_cache(maxsize=32)(self._mask)

    def __call__(self, text: str) -> str:
        """`text` without the secrets."""
        return self._remembered(text) if len(text) < LONG_BODY else self._mask(text)

    def _mask(self, text: str) -> str:
        for form in self._forms:
            text = text.replace(form, "***")
        decoded = text
        for _ in range(MAX_DECODES if self._forms else 0):
            before, decoded = decoded, html.unescape(unquote(decoded))
            decoded = re.sub(r"\\+u00([0-7][0-9A-Fa-f])", lambda m: chr(int(m[1], 16)), decoded).replace("\\", "")
            if decoded == before:
                break
            if any(form in decoded for form in self._forms):
                return "***"
        return text


# -------------------------------------------------------------------------------------------------------- boundary
#
# The endpoint is refused, never repaired: what one program repairs, the next one reads differently. Each round of
# percent-decoding is judged by itself, because a server behind a proxy may decode once more than the proxy did.

# Characters that look like / \ . or % and survive NFKC, which turns the full-width and small forms into ASCII.
LOOKALIKES = str.maketrans({"⁄": "/", "∕": "/", "⧸": "/", "⧵": "\\", "∖": "\\", "。": ".", "․": ".", "٪": "%"})
# //evil.example is another host, and so are http:x and user@host; browsers and some servers read \ as /; "..;x" is a
# dot segment to Java servers, ". ." to those that strip blanks; \ufffd stands for bytes that are not UTF-8, such as
# the overlong forms of a dot.
FORBIDDEN = re.compile(r"^//|^[^/]*[:@]|[\\\ufffd]|^\s|\s$|(?:^|/)\s*\.[.\s]*(?:;[^/]*)?(?=/|$)")


def refuse_escape(path: str) -> None:
    """Raise ToolError for a path (without query) that some server could read as leading out of its base path."""
    # A % without digits, as in %zz or %u002e, means whatever the upstream makes of it.
    stage = "//" if re.search(r"%(?![0-9A-Fa-f]{2})", path) else path
    for _ in range(MAX_DECODES - 1):
        # CR and LF would add headers or a second request; format marks hide from some what others see. Two of these
        # (joiners, in emoji and some scripts) are meant, but must not stand between two dots.
        bare = stage.replace("\u200c", "").replace("\u200d", "")
        folded = unicodedata.normalize("NFKC", bare).translate(LOOKALIKES)
        # A server that normalises Unicode turns full-width slashes and percent signs into real ones.
        alike = any(folded.count(char) != stage.count(char) for char in "/%")
        if alike or not bare.isprintable() or FORBIDDEN.search(folded):
            break
        decoded = unquote(stage)
        if decoded == stage:
            return
        stage = decoded
    raise ToolError("endpoint could be read as another place (//, .., \\, user@, odd codes); give a path: /users/42")


def below(root: str, url: str) -> str | None:
    """What follows the base URL `root` in a URL, if that is where it leads: "" or a path, a query, or both."""
    rest = url[len(root) :]
    return rest if url.startswith(root) and rest[:1] in ("", "/", "?") else None


def require_inside(root: str, url: httpx.URL) -> None:
    """The last check before every request, of the very URL that is sent. Raises ToolError."""
    rest = below(root, str(url))
    refuse_escape("//" if rest is None else rest.partition("?")[0])


class Call(NamedTuple):
    """One request as it will be sent, and the key under which its answer is kept."""

    method: str
    url: str
    content: bytes | None
    headers: dict[str, str]
    key: str
    advice: str  # when its answer was lost


def fill_in_path(path: str, params: dict[str, Any]) -> str:
    """/users/{id} with params.id, which is taken out of `params`. What is filled in is one segment, never more."""
    for name in dict.fromkeys(re.findall(r"\{([^{}/]+)\}", path)):
        texts = texts_of(name, params.pop(name, None))
        if len(texts) != 1 or not texts[0]:
            raise ToolError(f"endpoint holds {{{name[:50]}}}: give params.{name[:50]}, one text or number, to fill it")
        path = path.replace(f"{{{name}}}", quote(texts[0], safe=""))
    return path


def texts_of(name: str, value: Any) -> list[str]:
    """A query parameter as text: a list gives one for each item, null gives none."""
    items = [item for item in cast("list[Any]", value if isinstance(value, list) else [value]) if item is not None]
    if any(isinstance(item, (dict, list)) for item in items):
        raise ToolError(f"params.{name[:50]} must be text, a number, true, false or a list of those")
    return [str(item).lower() if isinstance(item, bool) else str(item) for item in items]


def encode_data(data: Any, form: bool) -> tuple[bytes | None, dict[str, str]]:
    """The request body and its header: text as it is, a form where the file says so, anything else as JSON."""
    if isinstance(data, str) and data.lstrip()[:1] in ("{", "["):  # some clients send JSON as text
        with suppress(ValueError, RecursionError):
            data = json.loads(data)
    text = data if isinstance(data, str) else ENCODER.encode(data)
    content_type = "text/plain; charset=utf-8" if isinstance(data, str) else "application/json"
    if form and isinstance(data, dict):
        pairs = {name: texts_of(name, value) for name, value in cast("dict[str, Any]", data).items()}
        content_type, text = "application/x-www-form-urlencoded", urlencode(pairs, doseq=True)
    if len(text) > MAX_REQUEST:
        raise ToolError(f"data is {len(text):,} characters long; the limit is {MAX_REQUEST:,}; send it in parts")
    return (None, {}) if data is None else (text.encode(), {"content-type": content_type})


# --------------------------------------------------------------------------------------------------------- answers


class Answer(NamedTuple):
    """A successful answer, as it is kept and shown: masked, and compact if it is JSON."""

    text: str
    facts: Sequence[str]  # what the last line says of it: status and media type first
    note: str  # where it came from
    ttl: float | None  # seconds; None: it must not be kept at all, not even to show the rest of it
    fetched: float


# -------------------------------------------------------------------------------------------------------- requests


class Upstream:
    """One API: its connections (open until they idle, or the process ends), its token bucket, its cache, and the calls
    under way."""

    def __init__(self, name: str, api: Api, mask: Masker, timer: Timer, sleep: Sleep) -> None:
        self.name, self.api = name, api
        self._mask, self._timer, self._sleep = mask, timer, sleep
        limit = api.rate_limit or 10**15  # as good as none
        self._bucket = TokenBucket(limit, limit / api.rate_period, timer=timer, sleep=sleep)
        self._cache = TTLCache[str, Answer](CACHE_ENTRIES, api.cache_ttl, max_bytes=CACHE_BYTES, timer=timer)
        self._tasks: dict[object, asyncio.Task[Answer]] = {}  # the requests under way; a new dict after every write
        self._waiting = Counter[asyncio.Task[Answer]]()  # how many callers wait for each
        self._client: httpx.AsyncClient | None = None
        self._headers = OWN_HEADERS | {name.lower(): value for name, value in api.headers.items()}
        # A little less than the time every tool has, so that it is our message that the model reads.
        self._seconds = min(api.timeout, TIME_LIMIT - 0.5)

    def describe(self) -> dict[str, Any]:
        """What list_apis tells."""
        shown = self.api.model_dump(include={"description", "base_url", "methods", "cache_ttl"})
        left = f"{max(0, math.floor(self._bucket.tokens))} of {self.api.rate_limit} calls left"
        limits = f"{left}, refilled over {self.api.rate_period:g} s" if self.api.rate_limit else "no limit"
        return {"name": self.name, **shown, "limits": limits, "describe_api": self.api.openapi is not None}

    def prepare(self, method: str, endpoint: str, params: dict[str, Any], data: Any) -> Call:
        """Check and encode what the model gave, before anything is spent on it. Raises ToolError.

        A cache hit costs little more than this: what only a request needs, such as parsing the URL, is done with it.
        """
        root, allowed, method, params = self.api.base_url, self.api.methods, method.upper(), {**params}
        if method not in allowed:
            raise ToolError(f"method {method[:20]!r} is not allowed for {self.name}; allowed: {', '.join(allowed)}")
        rest = below(root, endpoint)  # upstreams hand out whole URLs to go on with
        path, _, query = (endpoint if rest is None else rest).partition("?")
        try:
            # Before the work: encoding a million parameters would hold up every other call for seconds.
            if len(json.dumps(params)) > MAX_URL:
                raise ToolError(f"params are longer than the {MAX_URL:,} characters that can be sent; use fewer")
            path = fill_in_path(path, params)
            refuse_escape(path)
            given = parse_qsl(query, keep_blank_values=True, errors="strict")
            if "#" in endpoint or not "".join(map("".join, given)).isprintable():
                raise ToolError("endpoint holds a # (write %23) or a control character (give such a value in params)")
            place = "/" + quote(path.removeprefix("/"), safe="/%!$&'()*+,;=:@~") if path else ""
            pairs = given + [(name, text) for name, value in params.items() for text in texts_of(name, value)]
            url = root + place + ("?" + urlencode(pairs, quote_via=quote) if pairs else "")
            # Of equal names the order counts: ?sort=name&sort=age is another question than ?sort=age&sort=name.
            key = json.dumps([method, place, query, params, data], sort_keys=True)
            content, headers = encode_data(data, "urlencoded" in self._headers.get("content-type", ""))
        except ValueError:
            raise ToolError("endpoint, params or data hold half a surrogate pair, NaN or such; leave it out") from None
        # A model that just tries again would order everything twice.
        advice = "try again later" if method in IDEMPOTENT else f"the {method} may have had its effect: look first"
        return Call(method, url, content, headers | self._headers, key, advice)

    def kept(self, key: str) -> Answer | None:
        """An answer that is still good, and how old it is."""
        answer = self._cache.get(key)
        return answer and answer._replace(note=f"cache hit, {self._timer() - answer.fetched:.0f} s old")

    def keep(self, key: str, answer: Answer, ttl: float) -> None:
        """Keep an answer for so many seconds."""
        self._cache.put(key, answer, ttl=ttl, size=sys.getsizeof(answer.text) + len(key) + 1_000)

    async def call(self, call: Call, use_cache: bool) -> Answer:
        """The answer, and where it came from. Raises ToolError."""
        if call.method not in SAFE:
            try:
                return await self._fetch(call)
            finally:
                # What this call has changed must not be read back old, whatever came of it (RFC 9111, 4.4, asks less);
                # nor from a request that is under way now.
                self._cache.clear()
                self._tasks = {}
        if use_cache and (answer := self.kept(call.key)):
            return answer
        # Identical calls wait for one request, which goes on as long as one of them still waits.
        tasks, key = self._tasks, call.key if use_cache else object()
        task = tasks[key] = tasks.get(key) or asyncio.create_task(self._fetch(call))
        self._waiting[task] += 1
        try:
            answer = await asyncio.shield(task)  # without shield, one cancelled caller would end it for all
        finally:
            self._waiting[task] -= 1
            if not self._waiting[task]:
                task.cancel()
                del self._waiting[task], tasks[key]
        # What was under way during a write may be older than that.
        if call.method == "GET" and answer.facts[0].startswith("200") and answer.ttl and tasks is self._tasks:
            self.keep(call.key, answer, answer.ttl)
            return answer._replace(note=f"cache miss, kept for {answer.ttl:.0f} s")
        return answer

    async def _fetch(self, call: Call) -> Answer:
        """Send, and send again with growing, jittered pauses where that cannot do harm twice. Raises ToolError."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._seconds
        problem = "cannot be reached, or broke off the connection before its answer was complete"
        try:
            async with asyncio.timeout_at(deadline):
                for pause in (0.3, 0.6, 1.2) if call.method in IDEMPOTENT else ():
                    pause *= random.uniform(0.5, 1)  # noqa: S311 - no secret
                    with suppress(httpx.NetworkError, httpx.RemoteProtocolError):
                        async with aclosing(await self._send(call, deadline)) as response:
                            status, asked = response.status_code, response.headers.get("retry-after", "").strip()
                            pause = max(pause, float(asked) if asked.isdecimal() else 0.0)
                            again = status in (502, 503, 504) or (status == 429 and asked.isdecimal())
                            if not again or clock() + pause >= deadline:
                                return await self._read(call, response)
                    await self._sleep(pause)
                async with aclosing(await self._send(call, deadline)) as response:
                    return await self._read(call, response)
        except (httpx.RequestError, OSError) as exc:  # not in its own words: those may name hosts and header values
            if isinstance(exc, TimeoutError):
                problem = f"did not finish its answer within {self._seconds:g} s"
        raise ToolError(f"{self.name} {problem}; {call.advice}")

    async def _send(self, call: Call, deadline: float) -> httpx.Response:
        """One attempt: a token, a request, and the same again for each redirect."""
        if self._client is None:
            # Left to itself it would send keys to the proxy that the environment names, read .netrc, and keep cookies
            # between callers; its own redirects would forward X-API-Key to whatever host the answer names.
            cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))
            self._client = httpx.AsyncClient(trust_env=False, cookies=cookies, timeout=httpx.Timeout(None, connect=10))
        request = self._client.build_request(call.method, call.url, headers=call.headers, content=call.content)
        redirects = 0
        while True:
            require_inside(self.api.base_url, request.url)
            if wait := await self._bucket.acquire(deadline - asyncio.get_running_loop().time()):
                raise ToolError(f"the rate limit of {self.name} is used up; try again in {math.ceil(wait)} s")
            response = await self._client.send(request, stream=True)
            if response.next_request is None:
                return response
            await response.aclose()
            request, redirects = response.next_request, redirects + 1
            with suppress(ToolError):
                require_inside(self.api.base_url, request.url)
                if request.method in self.api.methods and redirects <= MAX_REDIRECTS:
                    continue
            where = f"redirects to {request.method} {clip(self._mask(response.headers['location']), 200)}"
            raise ToolError(f"{self.name} {where}: not sent (outside, not allowed or one too many); {call.advice}")

    async def _read(self, call: Call, response: httpx.Response) -> Answer:
        """Read a response to its end. Raises ToolError for an HTTP error."""
        headers, request, success = response.headers, response.request, response.is_success
        # The few headers that a caller needs: pages and limits, and how much a HEAD would get.
        wanted = re.compile(r"link$|retry-after$|(x-)?rate-?limit" + "|content-length$" * (call.method == "HEAD")).match
        found = [clip(self._mask(f"{name}: {value}"), 1_000) for name, value in headers.items() if wanted(name)][:10]
        body, whole = await read_body(response, MAX_BODY if success else MAX_ERROR_BODY)
        if success and not whole:
            raise ToolError(f"{self.name}'s answer is larger than {MAX_BODY:,} bytes; ask for less, or page through it")
        content_type = headers.get("content-type", "")
        text, read = await in_thread_if_long(len(body), read_text, body, content_type, self._mask)
        status = f"{response.status_code} {httpx.codes.get_reason_phrase(response.status_code)}".strip()
        if not success:
            what = [f"{status} to {request.method} {clip(self._mask(request.url.path), 200)}", *read, *found]
            raise ToolError(f"{self.name} answered {'; '.join(what)}: {clip(text, MAX_ERROR_TEXT)}")
        # Otherwise it looks as if the POST had returned what a GET shows.
        status += f" to the {request.method} after a redirect" * (request.method != call.method)
        # Without the rest, which could imitate the last line.
        media_type = "".join(re.findall(r"^[\w.+-]+/[\w.+-]+", clip(self._mask(content_type), 200)))
        # RFC 9111 for a private cache, of which no-store, no-cache and max-age; `Vary: *` matches nothing.
        control = headers.get("cache-control", headers.get("pragma", "")).lower()
        max_age = re.search(r"max-age\b\W*([0-9]{0,9})", control)
        ttl = min(0.0 if "no-cache" in control else self.api.cache_ttl, float(max_age[1] or 0) if max_age else math.inf)
        kept = ttl if "no-store" not in control and headers.get("vary", "").strip() != "*" else None
        return Answer(text, [status, media_type, *read, *found], "not cached", kept, self._timer())


# ---------------------------------------------------------------------------------------------------------- bodies

# Only what is surely a charset: Python also has codecs such as punycode, which takes hours over an answer of 5 MB.
CHARSET = re.compile(r"charset=[\"']?((?:utf|iso|latin|windows|cp|koi|mac|shift|euc|gb|big5|us-|ascii)[\w:-]{0,30})")
WORKER = ThreadPoolExecutor(1, "bodies")  # for one at a time: each takes up to 25 times MAX_BODY of memory
# Numbers must come back digit by digit: 1.10 is not 1.1 to everyone. Python's encoder writes nothing but its own
# floats, so a number it would change travels as text behind a mark.
EXACT_JSON = re.compile(r'"\\u0000=([-+.0-9Ee]+)"')
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


async def in_thread_if_long(length: int, function: Callable[..., Any], *args: Any) -> Any:
    """Work on a long body in the thread: on the event loop it would hold up every other call."""
    if length < LONG_BODY:
        return function(*args)
    return await asyncio.get_running_loop().run_in_executor(WORKER, function, *args)


async def read_body(response: httpx.Response, limit: int) -> tuple[bytes, bool]:
    """The first `limit` bytes, decompressed, and whether that is all. Raises ToolError and httpx.RequestError.

    One piece of `httpx.Response.aiter_bytes` from a gzip bomb is 67 MB: the cap must hold inside the decoder.
    """
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip"):
        raise ToolError("the answer is compressed in a way that was not asked for; try another endpoint")
    unzip, body = zlib.decompressobj(wbits=31) if encoding != "identity" else None, bytearray()
    with suppress(zlib.error):
        async for piece in response.aiter_raw():
            body += unzip.decompress(piece, limit + 1 - len(body)) if unzip else piece
            if len(body) > limit or response.num_bytes_downloaded > 2 * limit:
                return bytes(body[:limit]), False
            # Something behind the end: it would be lost without a word, and blocks of nothing would go on for ever.
            if unzip and unzip.unused_data:
                raise zlib.error
        if not unzip or not response.num_bytes_downloaded or unzip.eof:
            return bytes(body), True
    raise ToolError("the answer is not the gzip data that it claims to be, or not all of it; call again")


def read_text(body: bytes, content_type: str, mask: Masker) -> tuple[str, list[str]]:
    """A body ready to be shown, which is compact if it is JSON and empty if it is binary, and what the reader must know
    about it. It is masked before anything is cut: half a key at a page's end would not be found."""
    declared = CHARSET.search(content_type.lower())
    # What is valid UTF-8 is UTF-8, whatever the header says.
    for codec, errors in (("utf-8", "strict"), (declared[1] if declared else "", "strict"), ("utf-8", "replace")):
        with suppress(UnicodeError, LookupError):
            text = body.decode(codec, errors).removeprefix("\ufeff")
            if not re.search(r"[\0-\x08\x0e-\x1a]", text):
                break
    else:
        return "", [f"binary body of {len(body):,} bytes, not shown"]
    facts = ["not valid UTF-8: unreadable bytes shown as \ufffd"] * (errors == "replace") or ["no body"] * (not text)
    with suppress(ValueError, RecursionError):  # no JSON, or nested too deeply: shown as it came
        text = finish(ENCODER.encode(load_json(text)))
    return mask(text), facts


def clip(text: str, limit: int) -> str:
    """`text` on one line, with … where it was cut."""
    text = " ".join(text[: 4 * limit].split())
    return text if len(text) <= limit else text[:limit] + "…"


def load_json(text: str) -> Any:
    """Parse JSON, keeping each number exactly as it is written. Raises ValueError or RecursionError."""
    return json.loads(text, parse_float=lambda digits: f if repr(f := float(digits)) == digits else "\0=" + digits)


def finish(text: str) -> str:
    """What ENCODER made, ready to be shown: a lone surrogate, which cannot be sent, as its escape. (Not escaped when it
    is sent, so that max_output counts what is sent.)"""
    return EXACT_JSON.sub(r"\1", text.encode("utf-8", "backslashreplace").decode())


# ---------------------------------------------------------------------------------------------------------- select
#
# A subset of JMESPath (https://jmespath.org), with its meaning: what works here works there.
#
#   items[0].name   items[-1]               a field, an index
#   items[*].owner.login                    the same of each item; nulls are left out
#   items[*].{id: id, who: owner.login}     an object of each; items[*].[id, name] a list of each
#   "odd-name"                              any name, in quotes
#
# One difference: a field or an index that is nowhere is an error that names what is there, not null.

# The grammar: a path; several paths in braces or brackets; or several behind a path.
NAME = r'(?:[A-Za-z_][A-Za-z0-9_]*|"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9A-Fa-f]{4})+")'
INDEX = r"\[\s*(?:-?[0-9]{1,9}|\*)\s*\]"
PATH = rf"(?:{NAME}|{INDEX})(?:\s*\.\s*{NAME}|\s*{INDEX})*"  # items[0].owner."odd-name"
FIELD = rf"\s*{NAME}\s*:\s*{PATH}\s*"  # who: owner.login
SEVERAL = rf"\{{{FIELD}(?:,{FIELD})*\}}|\[\s*{PATH}\s*(?:,\s*{PATH}\s*)*\]"
SELECT = re.compile(rf"\s*(?:({PATH})|(?:({PATH})\s*\.\s*)?({SEVERAL}))\s*")
PART, STEP = re.compile(rf"(?:({NAME})\s*:\s*)?({PATH})"), re.compile(f"{NAME}|{INDEX}")
SELECT_ADVICE = 'it takes items[0].name, [-1], items[*].{id: id, who: owner.login}, [*].[id, name], "odd-name", no more'
Steps = list[tuple[int, Any]]  # each step's place, and its key: a name, an index, or * for each item of a list


def read_key(token: str) -> Any:
    """The key that is meant by a name, which may be in quotes, by [0], or by [*]. (A field may be called *, too: what
    is meant depends on whether there is an object or a list.)"""
    if token[0] == "[":
        return "*" if "*" in token else int(token[1:-1])
    return json.loads(token) if token[0] == '"' else token


def read_path(path: str, start: int) -> Steps:
    """The steps of a path whose first one is at such a place of the select."""
    return [(start + match.start(), read_key(match[0])) for match in STEP.finditer(path)]


class Select:
    """One select: taken apart at once, and then followed. Raises ToolError."""

    def __init__(self, text: str) -> None:
        match = SELECT.fullmatch(text)
        if match is None:
            raise ToolError(f"select {clip(text, 100)!r} is wrong; {SELECT_ADVICE}")
        self._left = MAX_SELECTED
        self._missed: dict[int, tuple[Any, Any] | None] = {}  # by a step's place; None: it was found once
        self._path = read_path(match[1] or match[2] or "", 0)
        if several := match[3]:
            parts = [(part[1], read_path(part[2], len(text) + part.start())) for part in PART.finditer(several)]
            parts = [(ENCODER.encode(read_key(name)) + ":" if name else "", steps) for name, steps in parts]
            self._path.append((-1, (several[0], parts, several[-1])))

    def text_of(self, answer: Answer) -> str:
        """The part of a JSON answer that is meant. Raises ToolError."""
        try:
            text = finish(self._follow(load_json(answer.text), self._path))
        except (ValueError, RecursionError):
            raise ToolError(f"select needs JSON, not too deep: {', '.join(answer.facts[1:3])}; leave it out") from None
        # What some items have is null in the others; what none has is surely a mistake.
        for key, value in filter(None, self._missed.values()):
            there = ENCODER.encode([*cast("dict[str, Any]", value)] if isinstance(value, dict) else value)
            raise ToolError(f"select finds no {key!r} among {clip(finish(there), 300)}; [*] takes each item of a list")
        return text

    def _follow(self, value: Any, path: Steps) -> str:
        """What a path leads to, as JSON text."""
        self._left -= 10 * len(path)
        if self._left < 0:
            # {a: a, b: a, c: a} holds the same text three times, and 500 characters of that would take a gigabyte.
            raise ToolError("select would look at or give too much, or the same several times; choose a smaller part")
        for number, (place, key) in enumerate(path):
            if value is None:  # nothing is in it, and nothing is wrong with that
                return "null"
            if isinstance(key, tuple):
                opening, parts, closing = cast("tuple[str, list[tuple[str, Steps]], str]", key)
                return opening + ",".join([name + self._follow(value, steps) for name, steps in parts]) + closing
            if key == "*" and isinstance(value, list):
                self._missed[place] = None
                results = [self._follow(item, path[number + 1 :]) for item in cast("list[Any]", value)]
                return "[" + ",".join(result for result in results if result != "null") + "]"
            try:
                value = cast("Any", {} if isinstance(value, str) else value)[key]
            except (LookupError, TypeError):
                self._missed.setdefault(place, (key, value))
                return "null"
            self._missed[place] = None
        text = ENCODER.encode(value)
        self._left -= len(text)
        return text


# ----------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Serve the APIs named in the file on the command line."""
    parser = serving.argument_parser("api-server", "Serve HTTP APIs to a language model that never sees their keys.")
    parser.add_argument("apis", type=Path, metavar="APIS.json", help="the file that names the APIs")
    parser.add_argument("--check", action="store_const", dest="call", const=["list_apis"], help="as --call list_apis")

    def build(args: argparse.Namespace, options: Options) -> Server:
        server = build_server(load_config(args.apis, os.environ), options)
        server.health = partial(asyncio.to_thread, partial(load_config, args.apis, os.environ))
        server.label = args.apis.stem
        return server

    serving.serve(parser, build)


if __name__ == "__main__":
    main()
