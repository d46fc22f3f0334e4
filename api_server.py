# /// script
# requires-python = ">=3.11"
# dependencies = ["mcp>=2.3,<3", "httpx>=0.28,<0.29"]
# ///
"""An MCP server that calls the HTTP APIs named in a file, and keeps their keys.

    python api_server.py APIS.json            (--check prints what the file means, --help lists the options)

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
    sys.stderr.write(
        f"api_server.py needs {missing.name}: copy serving.py and common.py beside it; pip install httpx\n"
    )
    sys.exit(2)

import argparse
import asyncio
import base64
import html
import json
import logging
import math
import os
import re
import secrets
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlencode

import pydantic
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import BaseModel, Field
from typing_extensions import TypeIs

from common import ConfigError, Sleep, Timer, TokenBucket, TTLCache, trailer
from serving import READ_ONLY, TIME_LIMIT, Options, Server

# ---------------------------------------------------------------------------------------------------------- limits

MAX_BODY = 5_000_000  # bytes of an answer, decompressed; parsed JSON takes up to 25 times that in memory
LONG_BODY = 100_000  # bytes from which an answer is worked on in a thread: about a millisecond's work
MAX_REQUEST, MAX_URL = 1_000_000, 8_000  # characters of a request body, and of a URL: common servers refuse longer ones
MAX_DECODES = 5  # rounds of decoding; nobody means more than two
MAX_REDIRECTS, MAX_ATTEMPTS = 5, 4  # the first attempt included
LIMITS = httpx.Limits(max_connections=100, keepalive_expiry=15)  # per API; seconds
TIMEOUT = httpx.Timeout(None, connect=10)  # seconds; the call's own deadline bounds all else
CACHE_ENTRIES, CACHE_BYTES = 500, 48_000_000  # per API; any one body fits twice, however its characters are stored
PAGE_TTL = 300.0  # seconds for which a cut answer is kept for its own continuation
MAX_ERROR_BODY, MAX_ERROR_TEXT = 64_000, 800  # bytes of an error's body that are read, characters that are shown
MAX_HEADERS, MAX_HEADER_TEXT = 10, 1_000  # response headers that are passed on, and characters of each
MIN_SECRET = 4  # characters; masking a shorter text would riddle every answer
MAX_BRACKETS = 100  # in a select
MAX_VISITS, MAX_SELECTED = 1_000_000, 2 * MAX_BODY  # values a select may look at, characters that it may give

SAFE = {"GET", "HEAD", "OPTIONS"}  # RFC 9110, 9.2.1
IDEMPOTENT = SAFE | {"PUT", "DELETE"}  # RFC 9110, 9.2.2
OWN_HEADERS = {"user-agent": f"small-mcp-servers/{serving.__version__}", "accept-encoding": "gzip", "accept": "*/*"}


# ------------------------------------------------------------------------------------------------------------ the tools
#
# What the model sees; describe_api is in api_openapi.py. A tool checks its arguments, calls what stands below, returns.


# Any JSON. The type says str because for other types the SDK takes the text "null" for no argument at all.
Data = Annotated[str, pydantic.PlainValidator(lambda value: value), pydantic.WithJsonSchema({})]
MAYBE: Any = None


class Gateway:
    """The tools, and what they need."""

    def __init__(self, upstreams: Mapping[str, "Upstream"], server: Server) -> None:
        self._upstreams = upstreams
        self._server = server

    async def list_apis(self) -> dict[str, list[dict[str, Any]]]:
        """List the APIs that call_api can reach: base URL, allowed methods, how much of the rate limit is left, for how
        many seconds answers are cached, and whether describe_api knows the API."""
        return {"apis": [upstream.describe() for upstream in self._upstreams.values()]}

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
        upstream = self._upstreams.get(api)
        if upstream is None:
            raise ToolError(f"unknown API {api!r}; the APIs are {', '.join(self._upstreams)}")
        part = Select(select) if select else None  # before anything is sent
        call = upstream.prepare(method, endpoint, params or {}, data)
        page = f"page {self._server.caller.get()} {call.key}"  # nobody else's call may change what continues this one
        answer, note = upstream.kept(page) if offset else await upstream.call(call, use_cache)
        work = len(answer.text) * (1 + select.count(","))
        text = await in_thread_if_long(work, part.text_of, answer, work) if part else answer.text
        facts = [*answer.facts[:2], note, *answer.facts[2:]]
        kept = answer.ttl is not None
        shown, cut = show_part(text, facts, offset, self._server.options.max_output, kept=kept)
        if cut and kept:
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
    if any(api.openapi for api in config.apis.values()):
        try:
            import api_openapi
        except ModuleNotFoundError:
            raise ConfigError("openapi needs api_openapi.py: copy it beside api_server.py") from None
        files = {name: (config.folder / api.openapi, api.methods) for name, api in config.apis.items() if api.openapi}
        show = partial(show_part, facts=(), max_output=server.options.max_output)
        api_openapi.add_describe_api(server, files, lambda text, offset: show(text, offset=offset)[0])
    return server


def show_part(text: str, facts: Sequence[str], offset: int, max_output: int, *, kept: bool = True) -> tuple[str, bool]:
    """The text from `offset` on, as much as fits above a last line of facts, and whether it was cut. `kept` says that
    the rest can be asked for. Raises ToolError for an offset past the end."""
    total, facts = len(text), list(filter(None, facts))
    if offset and offset >= total:
        raise ToolError(f"offset={offset} is past the end: there are {total} characters; use a smaller offset")
    while len(facts) > 1 and max_output and 2 * len(trailer(*facts)) > max_output:
        facts.pop()  # headers of the upstream must not crowd out its answer

    def last_line(end: int) -> str:
        part = [f"characters {offset + 1}-{end} of {total} shown"] if offset or end < total else []
        part += ["the upstream forbids to keep the rest: use select"] if end < total and not kept else []
        resume = {"offset": end} if end < total and kept else {}
        return "\n" * bool(text) + trailer(*facts, *part, **resume) if facts or part else ""

    end = total
    if max_output and total - offset + len(last_line(total)) > max_output:
        end = min(total, offset + max(max_output - len(last_line(total - 1)), 1))
    return text[offset:end] + last_line(end), end < total


# ---------------------------------------------------------------------------------------------------- configuration

VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
# Headers that frame the message are not set here: one request could be read as two (request smuggling).
FRAMING = "(?!(?:connection|content-length|transfer-encoding|te|trailer|upgrade|accept-encoding):)"
HEADER = re.compile(FRAMING + r"[a-z0-9!#$%&'*+.^_`|~-]{1,100}: [!-~](?:[ -~]*[!-~])?", re.IGNORECASE)
# Literal values of headers with such a name are masked too; those of others (versions, user agents) are no secrets.
SECRET_HEADER = re.compile(r"auth|key|token|secret|cookie|pass|credential|session|signature", re.IGNORECASE)
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Method = Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


class Api(BaseModel):
    """One entry of the file, as it is written there; seconds throughout. `rate_limit` requests in `rate_period` is the
    long run: after a pause, as many again may pass in one period (a token bucket), so give half of a hard limit."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    base_url: str = Field(max_length=1_000)
    description: str = Field("", max_length=300)
    headers: dict[str, str] = Field({}, repr=False)
    rate_limit: int | None = Field(None, ge=1, le=1_000_000)
    rate_period: float = Field(60, gt=0, le=86_400)
    cache_ttl: float = Field(300, ge=0, le=604_800)
    timeout: float = Field(TIME_LIMIT, gt=0, le=TIME_LIMIT)
    methods: list[Method] = Field(["GET", "HEAD"], min_length=1)
    openapi: str | None = None

    @pydantic.field_validator("base_url")
    @classmethod
    def require_plain_url(cls, text: str) -> str:
        """The base URL without a slash at its end. A user, a query or a fragment in it could change what it names."""
        with suppress(httpx.InvalidURL, ToolError):
            url = httpx.URL(text)
            match = re.fullmatch(r"https?://[^/?#@\\$\s]+(/[^?#\\$\s]*)?", text, re.IGNORECASE)
            if match and url.host and 0 < (80 if url.port is None else url.port) < 65_536:
                refuse_escape((match[1] or "").rstrip("/"))
                return str(url).rstrip("/")
        raise ValueError("must be http:// or https://, a host, and at most a port and a plain path, nothing else")

    @pydantic.field_validator("headers")
    @classmethod
    def fill_in(cls, templates: dict[str, str], info: pydantic.ValidationInfo) -> dict[str, str]:
        """The headers with each ${VAR} filled in; notes the secrets in them. No value is ever part of an error."""
        environ, found = cast("tuple[Mapping[str, str], dict[str, str]]", info.context)
        filled: dict[str, str] = {}
        for name, template in templates.items():
            needed = VARIABLE.findall(template)
            if short := [variable for variable in needed if len(environ.get(variable, "")) < MIN_SECRET]:
                raise ValueError(f"{name}: {short[0]} is not set, or shorter than {MIN_SECRET} characters")
            filled[name] = value = VARIABLE.sub(lambda match: environ[match[1]], template)
            if "${" in VARIABLE.sub("", template) or not HEADER.fullmatch(f"{name}: {value}"):
                raise ValueError(f"{name!r} is a header that cannot be set here, or its value is empty or malformed")
            found |= {variable: environ[variable] for variable in needed}
            if not needed and SECRET_HEADER.search(name) and len(value) >= MIN_SECRET:
                found[f"{name}: {value}"] = value
        return filled


APIS = pydantic.TypeAdapter(Annotated[dict[Name, Api], Field(min_length=1, max_length=60)])


class Config(NamedTuple):
    """The file, checked, and what masks all the secrets in it."""

    folder: Path
    apis: dict[str, Api]
    mask: "Masker"
    variables: Sequence[str]  # of the environment, without which the file means nothing

    def check(self) -> str:
        """What the server will do, as JSON, secrets masked: the answer to --check."""
        effective = {name: api.model_dump() for name, api in self.apis.items()}
        return json.dumps(self.mask.json(effective), indent=2, ensure_ascii=False)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of two equal names JSON keeps the last without a word; here they are a ValueError, and as headers
    have no case, neither have names."""
    if len({name.lower() for name, _ in pairs}) < len(pairs):
        raise ValueError(f"a name is there twice among {', '.join(name for name, _ in pairs)}")
    return dict(pairs)


def load_config(path: Path, environ: Mapping[str, str]) -> Config:
    """Read and check the file. Raises ConfigError with one line that says where the mistake is."""
    found: dict[str, str] = {}
    try:
        apis = APIS.validate_python(json.loads(path.read_bytes(), object_pairs_hook=unique), context=(environ, found))
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from None
    except pydantic.ValidationError as exc:
        error = exc.errors(include_url=False, include_input=False)[0]
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            message = f"unknown key; the keys are {', '.join(Api.model_fields)}"
        place = ": ".join(map(str, error["loc"])).encode("unicode_escape").decode()
        raise ConfigError(f"{path}: {place}: {message}") from None
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{path}: not valid JSON: {exc}") from None
    return Config(path.parent, apis, Masker([*found.values()]), sorted(found.keys() & environ.keys()))


# --------------------------------------------------------------------------------------------------------- secrets


class Masker:
    """Takes the secrets that it was given out of texts, in every spelling in which an upstream is likely to echo them.

    Replaced by *** are a secret as it is, as URLs, JSON, HTML and hexadecimal write it, and in base64 at each of the
    three alignments; so are the parts of a value such as `Bearer KEY`, and `USER:PASSWORD` inside base64. If one shows
    up only when the text is decoded, once or again and again, the whole line is replaced. The repr shows none of it.
    """

    def __init__(self, values: Sequence[str]) -> None:
        self._forms = sorted({form for value in values for form in self._forms_of(value)}, key=len, reverse=True)
        # A page of a cached answer is masked once, not at every hit; longer texts are too large to keep.
        self._remembered = lru_cache(maxsize=32)(self._mask)

    @staticmethod
    def _forms_of(value: str) -> Iterator[str]:
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

    def __call__(self, text: str) -> str:
        """`text` without the secrets."""
        return self._remembered(text) if len(text) < LONG_BODY else self._mask(text)

    def _mask(self, text: str) -> str:
        for form in self._forms:
            text = text.replace(form, "***")
        if self._hides(text):
            text = "\n".join("***" if self._hides(line) else line for line in text.split("\n"))
        return text

    def _hides(self, text: str) -> bool:
        """Whether a secret comes to light when the text is decoded: one that is only half percent-encoded, say."""
        for _ in range(MAX_DECODES if self._forms else 0):
            before, text = text, html.unescape(unquote(text))
            text = re.sub(r"\\+u00([0-7][0-9A-Fa-f])", lambda match: chr(int(match[1], 16)), text).replace("\\", "")
            if text == before:
                return False
            if any(form in text for form in self._forms):
                return True
        return False

    def json(self, value: Any) -> Any:
        """The same for each text, name and number in a JSON value, so that it stays valid JSON."""
        if is_object(value):
            return {self(name): self.json(item) for name, item in value.items()}
        if is_list(value):
            return [self.json(item) for item in value]
        shown = str(value).removeprefix(EXACT)
        return value if self(shown) == shown else self(shown) if isinstance(value, str) and shown == value else "***"


# -------------------------------------------------------------------------------------------------------- boundary
#
# The endpoint is refused, never repaired: what one program repairs, the next one reads differently. Each round of
# percent-decoding is judged by itself, because a server behind a proxy may decode once more than the proxy did.

ELSEWHERE = "endpoint could be read as another place (//, .., \\, scheme:, user@, odd codes); give a path: /users/42"
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
    raise ToolError(ELSEWHERE)


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
    content_type: str
    key: str

    @property
    def advice(self) -> str:
        """What to do when the answer was lost: a model that just tries again would order everything twice."""
        doubt = f"the {self.method} may have had its effect: look before you send it again"
        return "try again later" if self.method in IDEMPOTENT else doubt


CANONICAL = json.JSONEncoder(sort_keys=True)  # made once; json.dumps makes one for each call


def fill_in_path(path: str, params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """/users/{id} with the value of params.id, which is used up. What is filled in is one segment, never more."""
    names = re.findall(r"\{([^{}/]+)\}", path)
    for name in names:
        texts = [text for _, text in query_pairs({name: params.get(name)}) if text]
        if len(texts) != 1:
            raise ToolError(f"endpoint holds {{{name[:50]}}}: give params.{name[:50]}, one text or number, to fill it")
        path = path.replace(f"{{{name}}}", quote(texts[0], safe=""))
    return path, {name: value for name, value in params.items() if name not in names}


def query_pairs(params: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each query parameter; a list gives one pair for each item, null gives none."""
    for name, value in params.items():
        for item in value if is_list(value) else [value]:
            if isinstance(item, (dict, list)):
                raise ToolError(f"params.{name[:50]} must be text, a number, true, false or a list of those")
            if item is not None:
                yield name, str(item).lower() if isinstance(item, bool) else str(item)


def encode_data(data: Any, form: bool) -> tuple[bytes | None, str]:
    """The request body and its type: text as it is, a form where the file says so, anything else as JSON."""
    if isinstance(data, str) and data.lstrip()[:1] in ("{", "["):  # some clients send JSON as text
        with suppress(ValueError, RecursionError):
            data = json.loads(data)
    text = data if isinstance(data, str) else ENCODER.encode(data)
    if len(text) > MAX_REQUEST:
        raise ToolError(f"data is {len(text):,} characters long; the limit is {MAX_REQUEST:,}; send it in parts")
    if form and is_object(data):
        return urlencode(list(query_pairs(data))).encode(), "application/x-www-form-urlencoded"
    content_type = "text/plain; charset=utf-8" if isinstance(data, str) else "application/json"
    return (None, "") if data is None else (text.encode(), content_type)


# ----------------------------------------------------------------------------------------------------------- cache


class Answer(NamedTuple):
    """A successful answer, as it is kept and shown: masked, and compact if it is JSON."""

    text: str
    is_json: bool
    facts: Sequence[str]  # what the last line says of it: status and media type first
    validators: dict[str, str]  # request headers that ask whether it is still good
    ttl: float | None  # None: it must not be kept at all
    fetched: float


Outcome = tuple[Answer, str]  # and where it came from


def freshness(headers: httpx.Headers, ttl: float) -> float | None:
    """Seconds for which an answer may be used again, at most `ttl`: 0.0 = only after asking, None = not to be kept.

    RFC 9111 for a private cache, of which no-store, no-cache and max-age; `Vary: *` matches nothing.
    """
    control = headers.get("cache-control", headers.get("pragma", "")).lower()
    if "no-store" in control or headers.get("vary", "").strip() == "*":
        return None
    if "no-cache" in control:
        return 0.0
    max_age = re.search(r"max-age\b\W*([0-9]{0,9})", control)
    return min(ttl, float(max_age[1] or 0)) if max_age else ttl


# -------------------------------------------------------------------------------------------------------- requests


def retry_after(response: httpx.Response) -> float | None:
    """The seconds that Retry-After asks for, as a number or a date (RFC 9110, 10.2.3), or None."""
    text = response.headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    with suppress(ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return None


@dataclass
class Flight:
    """One request under way, and how many callers wait for it."""

    task: "asyncio.Task[Outcome]"
    waiters: int = 0


class Upstream:
    """One API: its connections (open until they idle, or the process ends), its token bucket, its cache, and the calls
    under way."""

    def __init__(self, name: str, api: Api, mask: Masker, timer: Timer, sleep: Sleep) -> None:
        self.name, self.api = name, api
        self._mask, self._timer, self._sleep = mask, timer, sleep
        limit = api.rate_limit or 10**15  # as good as none
        self._bucket = TokenBucket(limit, limit / api.rate_period, timer=timer, sleep=sleep)
        self._cache = TTLCache[str, Answer](CACHE_ENTRIES, api.cache_ttl, max_bytes=CACHE_BYTES, timer=timer)
        self._flights: dict[str, Flight] = {}  # a new dict after every write
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
        root, allowed, method = self.api.base_url, self.api.methods, method.upper() if method.isascii() else method
        if method not in allowed:
            raise ToolError(f"method {method[:20]!r} is not allowed for {self.name}; allowed: {', '.join(allowed)}")
        rest = below(root, endpoint)  # upstreams hand out whole URLs to go on with
        path, _, query = (endpoint if rest is None else rest).partition("?")
        try:
            # Before the work: encoding a million parameters would hold up every other call for seconds.
            if len(CANONICAL.encode(params)) > MAX_URL:
                raise ToolError(f"params are longer than the {MAX_URL:,} characters that can be sent; use fewer")
            path, params = fill_in_path(path, params)
            refuse_escape(path)
            given = parse_qsl(query, keep_blank_values=True, errors="strict")
            if "#" in endpoint or not "".join(map("".join, given)).isprintable():
                raise ToolError("endpoint holds a # (write %23) or a control character (give such a value in params)")
            place = "/" + quote(path.removeprefix("/"), safe="/%!$&'()*+,;=:@~") if path else ""
            pairs = [*given, *query_pairs(params)]
            url = root + place + ("?" + urlencode(pairs, quote_via=quote) if pairs else "")
            # Of equal names the order counts: ?sort=name&sort=age is another question than ?sort=age&sort=name.
            key = CANONICAL.encode([method, place, sorted(given, key=lambda pair: pair[0]), params, data])
            call = Call(method, url, *encode_data(data, "urlencoded" in self._headers.get("content-type", "")), key)
        except ValueError:
            raise ToolError("endpoint, params or data hold half a surrogate pair, NaN or such; leave it out") from None
        if len(url) > MAX_URL:
            raise ToolError(f"the URL is {len(url):,} characters long; the limit is {MAX_URL:,}; use fewer params")
        return call

    def kept(self, key: str) -> Outcome:
        """An answer that is still good, and its age. Raises ToolError: a rest is never fetched, it could be the rest of
        another version."""
        answer, entry, now = self._cache.get(key), self._cache.peek(key), self._timer()
        if answer is None or entry is None:
            raise ToolError("the rest of that answer is no longer kept; call again without offset, or use select")
        return answer, f"cache hit, {now - answer.fetched:.0f} s old, {entry.expires - now:.0f} s left"

    def keep(self, key: str, answer: Answer, ttl: float) -> None:
        """Keep an answer for so many seconds, or for as long as it is good."""
        size = sys.getsizeof(answer.text) + len(key) + 1_000
        self._cache.put(key, answer, ttl=max(ttl, answer.ttl or 0.0), size=size)

    async def call(self, call: Call, use_cache: bool) -> Outcome:
        """The answer, and where it came from. Raises ToolError."""
        if call.method not in SAFE:
            try:
                return await self._fetch(call, None)
            finally:
                # What this call has changed must not be read back old, whatever came of it (RFC 9111, 4.4, asks less);
                # nor from a request that is under way now.
                self._cache.clear()
                self._flights = {}
        if call.method != "GET" or not use_cache or not self.api.cache_ttl:
            return await self._fetch(call, None)
        with suppress(ToolError):
            return self.kept(call.key)
        # Identical calls wait for one request, which goes on as long as one of them still waits.
        flights = self._flights
        if call.key not in flights:
            entry = self._cache.peek(call.key)
            flights[call.key] = Flight(asyncio.create_task(self._fetch(call, entry.value if entry else None)))
        flight = flights[call.key]
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)  # without shield, one cancelled caller would end it for all
        finally:
            flight.waiters -= 1
            if not flight.waiters:
                flight.task.cancel()
                del flights[call.key]

    async def _fetch(self, call: Call, stale: Answer | None) -> Outcome:
        """Send, and send again with growing, jittered pauses where that cannot do harm twice."""
        clock, flights = asyncio.get_running_loop().time, self._flights
        deadline = clock() + self._seconds
        try:
            async with asyncio.timeout_at(deadline):
                for attempt in range(1, MAX_ATTEMPTS + 1):
                    pause = 0.3 * 2**attempt * (0.25 + secrets.randbelow(1000) / 4000)
                    last = attempt == MAX_ATTEMPTS or call.method not in IDEMPOTENT
                    try:
                        async with aclosing(await self._send(call, stale, deadline)) as response:
                            asked = retry_after(response) if response.status_code in (429, 503) else None
                            pause = max(pause, asked or 0.0)
                            again = response.status_code in (502, 503, 504) or asked is not None
                            if last or not again or clock() + pause >= deadline:
                                return await self._finish(call, response, stale, flights)
                    except (httpx.NetworkError, httpx.RemoteProtocolError):
                        if last or clock() + pause >= deadline:
                            raise
                    await self._sleep(pause)
        except (TimeoutError, httpx.RequestError, OSError) as exc:
            # Not in its own words: those may name hosts and header values.
            problem = "broke off the connection before its answer was complete"
            if isinstance(exc, TimeoutError):
                problem = f"did not finish its answer within {self._seconds:g} s"
            elif isinstance(exc, (httpx.ConnectError, httpx.ConnectTimeout)):
                problem = "cannot be reached (name, connection or certificate refused, or no answer in time)"
            raise ToolError(f"{self.name} {problem}; {call.advice}") from None
        raise AssertionError("the last attempt returns or raises")

    async def _send(self, call: Call, stale: Answer | None, deadline: float) -> httpx.Response:
        """One attempt: a token, a request, and the same again for each redirect."""
        if self._client is None:
            # Left to itself it would send keys to the proxy that the environment names, read .netrc, and keep cookies
            # between callers; its own redirects would forward X-API-Key to whatever host the answer names.
            cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))
            self._client = httpx.AsyncClient(trust_env=False, cookies=cookies, limits=LIMITS, timeout=TIMEOUT)
        headers = {"content-type": call.content_type} if call.content is not None else {}
        headers |= self._headers | (stale.validators if stale else {})
        request = self._client.build_request(call.method, call.url, headers=headers, content=call.content)
        for _ in range(MAX_REDIRECTS + 1):
            require_inside(self.api.base_url, request.url)
            if wait := await self._bucket.acquire(deadline - asyncio.get_running_loop().time()):
                limit = f"{self.name} ({self.api.rate_limit} calls per {self.api.rate_period:g} s)"
                raise ToolError(f"the rate limit of {limit} is used up; try again in {math.ceil(wait)} s")
            response = await self._client.send(request, stream=True)
            if response.next_request is None:
                return response
            await response.aclose()
            request = response.next_request
            with suppress(ToolError):
                require_inside(self.api.base_url, request.url)
                if request.method in self.api.methods:
                    continue
            where = f"{request.method} {self._show(response.headers['location'], 200)}"
            problem = f"redirects to {where}: not sent, as it is not allowed here or not below {self.api.base_url}"
            raise ToolError(f"{self.name} {problem}; {call.advice}")
        raise ToolError(f"{self.name} redirects more than {MAX_REDIRECTS} times; {call.advice}")

    async def _finish(self, call: Call, response: httpx.Response, stale: Answer | None, flights: object) -> Outcome:
        """Turn a response into an answer and keep it if that is allowed. Raises ToolError for an HTTP error."""
        if response.status_code == 304 and stale:
            ttl, note = freshness(response.headers, stale.ttl or 0.0), "revalidated (304)"
            answer = stale._replace(ttl=ttl, fetched=self._timer())
        else:
            answer, note = await self._read(call, response), "cache miss"
        if call.method != "GET" or not answer.facts[0].startswith("200") or not self.api.cache_ttl:
            return answer, "not cached"
        # Without a validator, an answer that has expired on arrival is of no use to anyone; and one that was under way
        # during a write may be older than that.
        if answer.ttl is None or not (answer.ttl or answer.validators) or flights is not self._flights:
            self._cache.discard(call.key)
            return answer, f"{note}, not kept (the upstream forbids it, or something was written meanwhile)"
        self.keep(call.key, answer, 0.0)
        return answer, f"{note}, kept for {answer.ttl:.0f} s"

    async def _read(self, call: Call, response: httpx.Response) -> Answer:
        """Read a response to its end. Raises ToolError for an HTTP error."""
        headers, request = response.headers, response.request
        content_type = headers.get("content-type", "")
        # The few headers that a caller needs: pages and limits, and how much a HEAD would get.
        wanted = re.compile(r"link$|retry-after$|(x-)?rate-?limit" + "|content-length$" * (call.method == "HEAD"))
        found = [f"{name}: {value}" for name, value in headers.items() if wanted.match(name)]
        facts = [self._show(text, MAX_HEADER_TEXT) for text in found[:MAX_HEADERS]]
        body, whole = await read_body(response, MAX_BODY if response.is_success else MAX_ERROR_BODY)
        if response.is_success and not whole:
            raise ToolError(f"{self.name}'s answer is larger than {MAX_BODY:,} bytes; ask for less, or page through it")
        text, is_json, read = await in_thread_if_long(len(body), read_text, body, content_type, self._mask)
        status = f"{response.status_code} {httpx.codes.get_reason_phrase(response.status_code)}".strip()
        asked = f"{request.method} {self._show(request.url.path, 200)}"
        if not response.is_success:
            wait = retry_after(response)
            again = [] if wait is None else [f"try again in {math.ceil(wait)} s"]
            limits = [fact for fact in facts if "limit" in fact.partition(":")[0]]
            what = "; ".join([f"{status} to {asked}", *again, *limits])
            raise ToolError(f"{self.name} answered {what}: {clip(text or '; '.join(read), MAX_ERROR_TEXT)}")
        if request.method != call.method:  # otherwise it looks as if the POST had returned what a GET shows
            facts.insert(0, f"the {call.method} was redirected: this answers {asked}")
        # Without the rest, which could imitate the last line.
        media_type = "".join(re.findall(r"^[\w.+-]+/[\w.+-]+", self._show(content_type, 200)))
        sources = {"if-none-match": headers.get("etag", ""), "if-modified-since": headers.get("last-modified", "")}
        validators = {name: value for name, value in sources.items() if value and value.isascii()}
        ttl = freshness(headers, self.api.cache_ttl)
        return Answer(text, is_json, [status, media_type, *read, *facts], validators, ttl, self._timer())

    def _show(self, text: str, limit: int) -> str:
        """Text of the upstream on one line, masked before it is cut: half a key would not be found afterwards."""
        return clip(self._mask(text), limit)


# ---------------------------------------------------------------------------------------------------------- bodies

# Only what is surely a charset: Python also has codecs such as punycode, which takes hours over an answer of 5 MB.
CHARSET = re.compile(r"charset=[\"']?((?:utf|iso|latin|windows|cp|koi|mac|shift|euc|gb|big5|us-|ascii)[\w:-]{0,30})")
# Numbers must come back digit by digit: 1.10 is not 1.1 to everyone. Python's encoder writes nothing but its own
# floats, so a number it would change travels as text behind a mark that no upstream can guess.
EXACT = f"\0{secrets.token_hex(8)}:"
EXACT_JSON = re.compile(f'"\\\\u0000{EXACT[1:]}([^"]*)"')
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
# One thread: parsing holds the interpreter lock anyway, and several at once would each take their share of memory.
WORKER = ThreadPoolExecutor(1, "long-body")


async def in_thread_if_long(length: int, function: Callable[..., Any], *args: Any) -> Any:
    """Work on a long body in the thread: on the event loop it would hold up every other call."""
    if length < LONG_BODY:
        return function(*args)
    return await asyncio.get_running_loop().run_in_executor(WORKER, partial(function, *args))


async def read_body(response: httpx.Response, limit: int) -> tuple[bytes, bool]:
    """The first `limit` bytes, decompressed, and whether that is all. Raises ToolError and httpx.RequestError.

    One piece of `httpx.Response.aiter_bytes` from a gzip bomb is 67 MB: the cap must hold inside the decoder.
    """
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip"):
        raise ToolError("the answer is compressed in a way that was not asked for; try another endpoint")
    unzip, body = None if encoding == "identity" else zlib.decompressobj(wbits=31), bytearray()
    try:
        async for piece in response.aiter_raw():
            while piece:
                # At least 1: to the decoder, 0 means without limit.
                body += unzip.decompress(piece, max(limit + 1 - len(body), 1)) if unzip else piece
                # Blocks of nothing would go on without end.
                if len(body) > limit or response.num_bytes_downloaded > 2 * limit:
                    return bytes(body[:limit]), False
                if piece := unzip.unused_data if unzip else b"":  # another member; one of nothing takes time, too
                    unzip, limit = zlib.decompressobj(wbits=31), max(limit - 1_000, 0)
    except zlib.error:
        raise ToolError("the answer is not the gzip data that it claims to be; try another endpoint") from None
    if unzip and response.num_bytes_downloaded and not unzip.eof:
        raise ToolError("the compressed answer ends too early; call again")
    return bytes(body), True


def read_text(body: bytes, content_type: str, mask: Masker) -> tuple[str, bool, list[str]]:
    """A body ready to be shown, whether it is JSON (then compact), and what the reader must know about it. It is masked
    before anything is cut: half a key at a page's end would not be found."""
    text, facts = decode_text(body, content_type.lower())
    if "json" in content_type.lower() or text.lstrip()[:1] in ("{", "["):
        try:
            value = load_json(text)
            compact = dump_json(value)
            return (compact if mask(compact) == compact else dump_json(mask.json(value))), True, facts
        except RecursionError:
            facts.append("JSON nested too deeply, shown as it came")
        except ValueError:
            facts += ["not valid JSON, shown as it came"] if text else []
    return mask(text), False, facts


def decode_text(body: bytes, content_type: str) -> tuple[str, list[str]]:
    """The body as text, which is empty if it is binary, and what the reader must know about it."""
    declared = CHARSET.search(content_type)
    # What is valid UTF-8 is UTF-8, whatever the header says.
    for codec, errors in (("utf-8", "strict"), (declared[1] if declared else "", "strict"), ("utf-8", "replace")):
        with suppress(UnicodeError, LookupError):
            text = body.decode(codec, errors).removeprefix("\ufeff")
            if not re.search(r"[\0-\x08\x0e-\x1a]", text):
                lost = errors == "replace"
                return text, ["not valid UTF-8: unreadable bytes shown as \ufffd"] * lost or ["no body"] * (not text)
    return "", [f"binary body of {len(body):,} bytes, not shown"]


def is_object(value: Any) -> TypeIs[dict[str, Any]]:
    """Whether a JSON value is an object."""
    return isinstance(value, dict)


def is_list(value: Any) -> TypeIs[list[Any]]:
    """Whether a JSON value is a list."""
    return isinstance(value, list)


def clip(text: str, limit: int) -> str:
    """`text` on one line, with … where it was cut."""
    text = " ".join(text[: 4 * limit].split())
    return text if len(text) <= limit else text[:limit] + "…"


def load_json(text: str) -> Any:
    """Parse JSON, keeping each number exactly as it is written. Raises ValueError or RecursionError."""
    return json.loads(text, parse_float=lambda digits: f if repr(f := float(digits)) == digits else EXACT + digits)


def dump_json(value: Any) -> str:
    """Compact JSON, characters as they are; a lone surrogate, which cannot be sent, as its escape."""
    text = ENCODER.encode(value)
    if not text.isascii():  # escaped here and not when it is sent, so that max_output counts what is sent
        text = text.encode("utf-8", "backslashreplace").decode()
    return EXACT_JSON.sub(r"\1", text) if "\\u0000" in text else text


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

SELECT_ADVICE = 'it takes items[0].name, [-1], items[*].{id: id, who: owner.login}, [*].[id, name], "odd-name", no more'
TOKEN = re.compile(
    r"""(?P<field>[A-Za-z_][A-Za-z0-9_]* | "(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9A-Fa-f]{4})+")
      | \[\s*(?P<index>-?[0-9]{1,9})\s*\] | (?P<each>\[\s*\*\s*\]) | (?P<mark>\S)""",
    re.VERBOSE,
)


@dataclass
class Step:
    """One step of a path, and what came of it. The key is a field's name, an index, paths to take at once, or None for
    each item of a list."""

    key: Any
    found: bool = False
    missing: Sequence[Any] = ()  # where it led nowhere, the first time


class Select:
    """One select: parsed at once, with a method for each rule of the grammar, and then followed. Raises ToolError."""

    def __init__(self, text: str) -> None:
        if text.count("[") + text.count("{") > MAX_BRACKETS:  # each costs two levels of Python's stack
            raise ToolError(f"select has more than {MAX_BRACKETS} brackets; choose a smaller part")
        found = [(match.lastgroup or "", match[match.lastgroup or 0]) for match in TOKEN.finditer(text)]
        self._rest = [*((token if kind == "mark" else kind, token) for kind, token in found), ("end", "its end")]
        self._all: list[Step] = []
        self._visits = 0
        self._steps = self._path()
        self._take("end")

    def _take(self, *kinds: str) -> tuple[str, Any]:
        kind, token = self._rest[0]
        if kind not in kinds:
            raise ToolError(f"select is wrong at {token[:20]!r}; {SELECT_ADVICE}")
        self._rest = self._rest[1:]
        return kind, json.loads(token) if kind == "index" or token[:1] == '"' else token

    def _path(self) -> list[Step]:
        steps, kinds = list[Step](), ["field", "index", "each", "{", "["]
        while True:
            kind, token = self._take(*kinds)
            several = kind in ("{", "[")
            steps.append(Step(self._paths(kind) if several else None if kind == "each" else token))
            following = self._rest[0][0]
            if several or following not in (".", "index", "each"):  # JMESPath would take it of the whole
                self._all += steps
                return steps
            kinds = ["index", "each"] if following != "." else ["field", "{", "["]
            self._rest = self._rest[following == "." :]

    def _paths(self, kind: str) -> Any:
        names, paths, end = list[str](), list[list[Step]](), {"{": "}", "[": "]"}[kind]
        while not paths or self._take(",", end)[0] == ",":
            if kind == "{":
                names.append(self._take("field")[1])
                self._take(":")
            paths.append(self._path())
        return dict(zip(names, paths, strict=True)) if names else paths

    def _follow(self, value: Any, steps: Sequence[Step]) -> Any:
        for number, step in enumerate(steps):
            key = step.key
            self._visits += 1
            if self._visits > MAX_VISITS:
                raise ToolError(f"select would look at more than {MAX_VISITS:,} values; choose a smaller part")
            if value is None:  # nothing is in it, and nothing is wrong with that
                return None
            if is_object(key):
                value = {name: self._follow(value, path) for name, path in key.items()}
            elif is_list(key):
                value = [self._follow(value, path) for path in key]
            elif key is None and is_list(value):
                step.found = True
                results = [self._follow(item, steps[number + 1 :]) for item in value]
                return [result for result in results if result is not None]
            elif (is_object(value) and key in value) or (
                is_list(value) and isinstance(key, int) and -len(value) <= key < len(value)
            ):
                step.found, value = True, cast("Any", value)[key]
            else:
                step.missing = step.missing or ([] if value == [] else [value])
                return None
        return value

    def _run(self, value: Any) -> Any:
        result = self._follow(value, self._steps)
        for step in self._all:
            # What some items have is null in the others; what none has is surely a mistake.
            if step.missing and not step.found:
                place, there = step.missing[0], f"the value {clip(dump_json(step.missing[0]), 60)}"
                if is_object(place):
                    there = f"an object with {clip(', '.join(place), 300) or 'nothing in it'}"
                elif is_list(place):
                    there = f"a list of {len(place)}: use [*] for each item, [0] for the first"
                wanted = "list" if step.key is None else repr(step.key)
                raise ToolError(f"select finds no {wanted} where there is {there}")
        return result

    def text_of(self, answer: Answer, most: int) -> str:
        """The part of a JSON answer that is meant, at `most` so many characters. Raises ToolError."""
        if not answer.is_json:
            raise ToolError(f"select needs JSON, and the answer is: {', '.join(answer.facts[1:3])}; leave select out")
        try:
            selected, length = self._run(load_json(answer.text)), 0
            # {a: a, b: a, c: a} holds the same text three times, and 500 characters of that would take a gigabyte.
            for piece in ENCODER.iterencode(selected) if most > MAX_SELECTED else ():
                length += len(piece)
                if length > MAX_SELECTED:
                    raise ToolError("select takes the same parts several times, which is too long; choose fewer fields")
            return dump_json(selected)
        except RecursionError:
            raise ToolError("the JSON is nested too deeply for select; leave select out") from None


# ----------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Serve the APIs named in the file on the command line."""
    parser = serving.argument_parser("api-server", "Serve HTTP APIs to a language model that never sees their keys.")
    parser.add_argument("apis", type=Path, metavar="APIS.json", help="the file that names the APIs")
    parser.add_argument("--check", action="store_true", help="print what the file means, secrets masked, and exit")

    def build(args: argparse.Namespace, options: Options) -> Server:
        config = load_config(args.apis, os.environ)
        server = build_server(config, options)
        server.health = serving.health_check(partial(load_config, args.apis, os.environ))
        server.label = args.apis.stem
        if args.check:
            print(config.check())
            sys.exit(0)
        return server

    serving.serve(parser, build)


if __name__ == "__main__":
    main()
