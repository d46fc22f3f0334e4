"""Running a server: what `fs_server.py`, `db_server.py`, `api_server.py` and their siblings have in common.

    Server                   every tool call and resource read goes through its `checked`: rate limit, time limit,
                             errors of one sentence, secrets masked, one line in the audit log
    Pipes                    the protocol on stdin and stdout, served by the event loop itself
    argument_parser, serve   the command line: --call, --list-tools, --http, --audit-log ...

Copy this file and common.py together with a server. It knows nothing of files, databases or HTTP APIs.
"""

# ruff: noqa: E402, UP036 - the checks come first, for a Python on which the rest could not even be imported

import sys

if sys.version_info < (3, 11):
    sys.stderr.write("this server needs Python 3.11 or newer; start it with python3.11, or with `uv run`\n")
    sys.exit(2)

import gc

# Importing the SDK makes 120,000 objects that all stay; looking for garbage among them is a sixth of the start-up.
gc.disable()
try:
    from mcp.server import MCPServer
except ImportError:
    sys.stderr.write('this server needs the package mcp, version 2.3 or newer: pip install "mcp>=2.3,<3"\n')
    sys.exit(2)

import argparse
import asyncio
import json
import logging
import math
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial, reduce
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import anyio
import anyio.to_thread
from anyio.abc import ObjectStream
from mcp.server.lowlevel.helper_types import ReadResourceContents
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ResourceError, ToolError, UnexpectedToolError
from mcp.server.stdio import stdio_server
from mcp.shared.message import SessionMessage
from mcp_types import CallToolResult, InputRequiredResult, TextContent, ToolAnnotations
from mcp_types.jsonrpc import PARSE_ERROR, ErrorData, JSONRPCError, jsonrpc_message_adapter
from pydantic import AnyUrl, ValidationError
from pydantic_core import to_json

from common import ConfigError, TokenBucket

gc.freeze()
gc.enable()

__version__ = "0.2.0"

T = TypeVar("T")

MAX_OUTPUT = 40_000  # characters: about 10,000 tokens, below the 25,000 at which clients cut a result themselves
MAX_MESSAGE = 1 << 27  # bytes of one message: a text of 10 MB takes six times that in JSON at worst
TIME_LIMIT = 30.0  # seconds a tool may run; clients drop results at 60
MAX_AUDITED = 200  # characters of one text kept in an audit line
MAX_LINE = 20_000  # characters of the arguments in an audit line

READ_ONLY = ToolAnnotations(read_only_hint=True, open_world_hint=False)


@dataclass(frozen=True)
class Options:
    """What every server can be started with: `max_output` in characters (0 = no limit), `rate_limit` as calls per
    seconds, `audit_log` as the file to append to, `verbose` to have the same lines on stderr."""

    max_output: int = MAX_OUTPUT
    rate_limit: tuple[int, float] | None = None
    audit_log: Path | None = None
    verbose: bool = False


# ---------------------------------------------------------------------------------------------------- the server


class Server(MCPServer[Any]):
    """An MCPServer whose tool calls and resource reads are all checked, bounded in time, and recorded; every failure
    reaches the model as one sentence. To be set by who builds it:

    `redact` is applied to all text that leaves the server, and `health` raises when what it serves is gone. For the
    entry in a client's configuration, `label` tells it from others of its kind, and `variables` are the environment
    variables without which it does not start.
    """

    def __init__(self, name: str, instructions: str, options: Options, lifespan: Any = None) -> None:
        # At the SDK's default, INFO, every refused call would add a line to the client's log file.
        super().__init__(name, instructions=instructions, version=__version__, log_level="WARNING", lifespan=lifespan)
        if "opentelemetry.sdk" not in sys.modules:  # spans that nobody collects would be a tenth of a small call
            self.middleware[:] = [m for m in self.middleware if type(m).__name__ != "OpenTelemetryMiddleware"]
        self.options = options
        self.redact: Callable[[str], str] = str
        self.health: Callable[[], Awaitable[None]] | None = None
        self.label = ""
        self.variables: Sequence[str] = ()
        # Who calls: over HTTP the short hash of the token, or "" if none is needed; None over stdio.
        self.caller: ContextVar[str | None] = ContextVar("caller", default=None)
        self._parameters: dict[str, list[str]] = {}  # the names of each tool's
        self._buckets: dict[str | None, TokenBucket] = {}  # one for each caller
        self._logs = [2] if options.verbose else []  # descriptors
        if options.audit_log is not None:
            self._logs.append(open_audit_log(options.audit_log))

    def add_tool(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """As in MCPServer, with less for the model to read: a docstring is sent as one line, schemas are slimmed."""
        super().add_tool(fn, *args, **kwargs)
        tool = self._tool_manager.list_tools()[-1]
        tool.description = " ".join(tool.description.split())
        tool.title = tool.title or tool.name.replace("_", " ").capitalize()
        tool.parameters = _slim(tool.parameters)
        tool.fn_metadata.output_schema = _slim(tool.fn_metadata.output_schema)
        self._parameters[tool.name] = list(tool.parameters["properties"])

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[Any, Any] | None = None
    ) -> CallToolResult:
        """Run one tool. Raises ToolError with one sentence that says what to do next."""
        run = partial(super().call_tool, name, arguments, context)

        async def call() -> CallToolResult:
            self._refuse_unknown(name, arguments)
            result = cast("CallToolResult", await run())
            audit(bytes=self._clean(result), **({"outcome": "error"} if result.is_error else {}))
            return result

        return await self.checked(name, arguments, call)

    async def read_resource(
        self, uri: AnyUrl | str, context: Context[Any, Any] | None = None
    ) -> Iterable[ReadResourceContents] | InputRequiredResult:
        """Read one resource, with the limits of a tool call. Raises ResourceError."""
        try:
            return await self.checked("resources/read", {"uri": str(uri)}, partial(super().read_resource, uri, context))
        except ToolError as exc:
            raise ResourceError(str(exc)) from None

    async def checked(self, name: str, arguments: Mapping[str, Any], run: Callable[[], Awaitable[T]]) -> T:
        """Do what a client asks for: within the rate and the time limit, and with a line in the audit log.

        Raises what `run` raises, its message cleaned, and ToolError for a limit.
        """
        started = time.perf_counter()
        facts: dict[str, object] = {"outcome": "ok", "ms": 0.0}
        _facts.set(facts)  # worker threads see the same dict
        try:
            self._take_token()
            async with asyncio.timeout(TIME_LIMIT):
                return await run()
        except TimeoutError:
            facts["outcome"] = "timeout"
            raise ToolError(f"{name} did not finish within {TIME_LIMIT:g} s; ask for less, or for a part") from None
        except (ToolError, ResourceError) as exc:
            message, size = self._clean_text(_sentence(name, exc))
            facts.update(outcome="error", bytes=size)
            exc.args = (message,)
            raise
        except BaseException:
            facts["outcome"] = "cancelled"
            raise
        finally:
            facts["ms"] = round((time.perf_counter() - started) * 1000, 1)
            self._audit(name, arguments, facts)

    def _refuse_unknown(self, name: str, arguments: Mapping[str, Any]) -> None:
        valid = self._parameters.get(name)
        if valid is None:
            raise ToolError(f"unknown tool: {name}; this server has {', '.join(self._parameters)}")
        # The SDK drops a misspelt argument without a word, and the model believes that it had an effect.
        for argument in arguments:
            if argument not in valid:
                raise ToolError(f"unknown argument: {argument}; {name} takes {', '.join(valid) or 'no arguments'}")

    def _take_token(self) -> None:
        if self.options.rate_limit is None:
            return
        calls, seconds = self.options.rate_limit
        # One caller who uses up the limit must not lock out the others.
        who = self.caller.get()
        if who not in self._buckets:
            self._buckets[who] = TokenBucket(calls, calls / seconds)
        if wait := self._buckets[who].try_acquire():
            rate = f"{calls} calls at once, {calls / seconds:g} a second"
            raise ToolError(f"rate limit reached: {rate}; try again in {wait:.1f} s")

    def mask(self, secrets: Sequence[str]) -> None:
        """Also keep these texts out of everything that leaves the server."""
        redact = self.redact
        self.redact = lambda text: reduce(lambda text, secret: text.replace(secret, "***"), secrets, redact(text))

    def _clean_text(self, text: str) -> tuple[str, int]:
        """Text that may leave: secrets masked, and no lone surrogate, which cannot be sent; and its size in bytes."""
        text = self.redact(text)
        if text.isascii():  # known at once, while encoding a large text takes as long as reading it
            return text, len(text)
        data = text.encode("utf-8", "backslashreplace")
        return data.decode(), len(data)

    def _clean(self, result: CallToolResult) -> int:
        """Make a result fit to be sent; returns its size in bytes."""
        if result.structured_content is not None:
            # The SDK's text copy of a structured result is indented JSON: half of it is white space.
            text = json.dumps(result.structured_content, ensure_ascii=False, separators=(",", ":"))
            result.structured_content = json.loads(self._clean_text(text)[0])
            result.content = [TextContent(type="text", text=text)]
        size = 0
        for block in result.content:
            if isinstance(block, TextContent):
                block.text, length = self._clean_text(block.text)
                size += length
        return size

    def _audit(self, name: str, arguments: Mapping[str, Any], facts: Mapping[str, object]) -> None:
        if not self._logs:
            return
        known = to_json(_for_audit(arguments), inf_nan_mode="strings")
        shown = json.loads(known) if len(known) < MAX_LINE else f"{len(known)} characters"
        time_ = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        token = {"token": caller} if (caller := self.caller.get()) else {}
        line = json.dumps({"time": time_, "tool": name, "arguments": shown, **token, **facts})
        try:
            for log in self._logs:
                os.write(log, self.redact(line).encode() + b"\n")
        except OSError:
            logging.getLogger(__name__).error("the audit log cannot be written")


def _sentence(name: str, exc: Exception) -> str:
    """What is wrong, in one sentence, without what the SDK puts around it and without any exception's own text."""
    if isinstance(exc, UnexpectedToolError):
        return f"{name} failed inside the server; the reason is in the server's log, try other arguments"
    if isinstance(exc.__cause__, ValidationError):
        problems = [
            f"{'.'.join(str(part) for part in error['loc'])}: {error['msg'][:1].lower()}{error['msg'][1:]}"
            + (f" (got {str(error['input'])[:60]!r})" if error["type"] != "missing" else "")
            for error in exc.__cause__.errors(include_url=False)
        ]
        return f"{'; '.join(problems)}; correct the arguments of {name} and call it again"
    return str(exc).removeprefix(f"Error executing tool {name}: ")


def _slim(schema: Any) -> Any:
    """A JSON schema without what costs the model tokens and tells it nothing: titles, which repeat the names, the
    longest texts that are accepted, which no honest call comes near, and the description of a whole result."""
    if isinstance(schema, list):
        return [_slim(item) for item in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    items = cast("dict[str, Any]", schema).items()
    left_out = ("title", "maxLength", "description" if "properties" in schema else "")
    return {k: _slim(v) for k, v in items if not (k in left_out and isinstance(v, (str, int)))}


def health_check(check: Callable[[], object]) -> Callable[[], Awaitable[None]]:
    """`check` as the `health` of a Server. One check runs at a time, on no thread of the tools': those of a file system
    that hangs must not use them up."""
    limiter = anyio.CapacityLimiter(1)

    async def health() -> None:
        await anyio.to_thread.run_sync(check, abandon_on_cancel=True, limiter=limiter)

    return health


# ----------------------------------------------------------------------------------------------------- audit log

_facts: ContextVar[dict[str, object]] = ContextVar("_facts")

_NAME = (
    r"pass|pwd|secret|token|api[-_]?key|auth(?!ors?(?![a-z]))|credential|cookie|session"
    r"|(?<![a-z])sig(?:nature)?(?![a-z])"
)
_SECRET = re.compile(_NAME, re.IGNORECASE)
# name=value in a URL or a connection string, "name": "value" in JSON (also JSON within JSON), Name: value in a header.
_SECRET_TEXT = re.compile(
    rf"""((?:{_NAME})[\w.-]*(?:\\*["'])?\s*[=:]\s*(?:(?:bearer|basic)\s+)?)"""
    r"""(\\*"[^"\\]*|'[^']*|[^\s&,;"'{}]+)""",
    re.IGNORECASE,
)


def audit(**facts: object) -> None:
    """Add facts to the audit line of the call that is running, such as what a write changed."""
    _facts.get({}).update(facts)


def open_audit_log(path: Path) -> int:
    """A descriptor to append to. Raises ConfigError."""
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a reader.
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NONBLOCK", 0), 0o600)
    except OSError as exc:
        raise ConfigError(f"cannot write the audit log {path}: {exc.strerror}; name another file") from None


def _for_audit(value: Any, name: str = "") -> Any:
    """Arguments as they may be written down: secrets are masked by their name, long texts are cut."""
    if _SECRET.search(name):
        return "***"
    if isinstance(value, str):
        length = f"… ({len(value)} characters)" if len(value) > MAX_AUDITED else ""
        return _SECRET_TEXT.sub(r"\1***", value[:MAX_AUDITED]) + length
    if isinstance(value, Mapping):
        return {str(k): _for_audit(v, str(k)) for k, v in cast("Mapping[object, Any]", value).items()}
    if isinstance(value, list):
        return [_for_audit(item, name) for item in cast("list[Any]", value)]
    return value


# --------------------------------------------------------------------------------------------------------- stdio

# The id of a request that cannot be parsed: a name at the top level, before or behind all that is nested.
_ID = rb'"id"\s*:\s*(-?\d{1,15}|"[^"\\]{0,100}")'
_REQUEST_ID = re.compile(rb"\s*\{[^{}\[\]]*?" + _ID + rb"|.*" + _ID + rb"[^{}\[\]]*\}\s*\Z", re.DOTALL)
UNREADABLE = "the message is no JSON-RPC in UTF-8, or has a lone surrogate, a huge number or deep nesting; mend it"


class Pipes(ObjectStream[SessionMessage]):
    """Stdin and stdout as the two message streams that a server is run over, both in one object.

    Served on the event loop itself. The SDK's transport moves every line through worker threads, and every message
    through two more queues: that is more than half of what a small call costs.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()

    @classmethod
    async def open(cls) -> "Pipes | None":
        """None where the event loop cannot wait for them (a file, a terminal, Windows): the SDK's has to do."""
        ends = [os.fstat(0), os.fstat(1)]
        if sys.platform == "win32" or not all(stat.S_ISFIFO(end.st_mode) or stat.S_ISSOCK(end.st_mode) for end in ends):
            return None
        if os.path.samestat(*ends):  # one socket for both ways: asyncio would take what comes in for a hang-up
            return None
        # The protocol moves to descriptors of its own, so that a stray print, or a child process, cannot write into it.
        stdin, stdout = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=MAX_MESSAGE)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), stdin)
        sink, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, stdout)
        sink.set_write_buffer_limits(high=0)  # drain returns when all is written, not when the rest is small
        return cls(reader, asyncio.StreamWriter(sink, protocol, None, loop))

    async def send(self, item: SessionMessage) -> None:  # noqa: D102
        async with self._turn:  # large results wait as they are, not as bytes in a buffer besides
            line = jsonrpc_message_adapter.dump_json(item.message, by_alias=True, exclude_unset=True)
            self._writer.write(line + b"\n")
            with suppress(ConnectionError):  # the client has gone; the end of stdin will say so
                await self._writer.drain()

    async def receive(self) -> SessionMessage:  # noqa: D102
        while True:
            line = b""
            try:
                line = await self._reader.readline()
                if not line:
                    raise anyio.EndOfStream
                return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
            except ValueError:  # no message of the protocol, or longer than MAX_MESSAGE
                await self._refuse(line)

    async def _refuse(self, line: bytes) -> None:
        """Answer what cannot be parsed: the SDK would drop it, and the client wait for its time-out."""
        found = _REQUEST_ID.match(line)
        number = json.loads(found[1] or found[2]) if found else None
        error = ErrorData(code=PARSE_ERROR, message=UNREADABLE)
        await self.send(SessionMessage(JSONRPCError(jsonrpc="2.0", id=number, error=error)))

    async def send_eof(self) -> None:  # noqa: D102
        pass

    async def aclose(self) -> None:  # noqa: D102
        pass


async def serve_stdio(server: Server) -> None:
    """Serve the client that started this process, until it hangs up; then end the process."""
    pipes: Any = await Pipes.open()
    lowlevel = server._lowlevel_server  # pyright: ignore[reportPrivateUsage] - the SDK has no public way to bring streams
    async with nullcontext((pipes, pipes)) if pipes else stdio_server() as (received, to_send):
        await lowlevel.run(received, to_send, lowlevel.create_initialization_options())
    # The client has gone. A worker thread that is stuck in a system call must not keep the process alive.
    sys.stderr.flush()
    os._exit(0)


# -------------------------------------------------------------------------------------------------- command line


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.splitlines())} (--help shows the usage)\n")


def argument_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that all servers share; the caller adds its own."""
    parser = _OneLineParser(prog=name, description=description, allow_abbrev=False)
    instead, add = parser.add_mutually_exclusive_group(), parser.add_argument
    instead.add_argument(
        "--call", nargs="+", metavar=("TOOL", "name=value"), help="run one tool, print its result, exit"
    )
    instead.add_argument("--list-tools", action="store_true", help="print the tools with their parameters, exit")
    http = "serve Streamable HTTP instead; on a HOST that others reach only with a token in MCP_AUTH_TOKEN"
    instead.add_argument("--http", metavar="[HOST:]PORT", help=http)
    host = "a name by which HTTP clients call this server"
    add("--allowed-host", action="append", default=[], metavar="NAME[:PORT]", help=host)
    add("--audit-log", type=Path, metavar="FILE", help="append one JSON line a call to FILE")
    add("--verbose", action="store_true", help="write the same line to stderr")
    most = "characters of a result at most (%(default)s; 0: no limit)"
    add("--max-output", type=int, default=MAX_OUTPUT, metavar="CHARS", help=most)
    add("--rate-limit", type=_rate, metavar="CALLS/SECONDS", help="refuse calls above this rate")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def _rate(text: str) -> tuple[int, float]:
    with suppress(ValueError, ZeroDivisionError):
        calls, seconds = text.split("/")
        if int(calls) >= 1 and 0 < int(calls) / float(seconds) < math.inf:
            return int(calls), float(seconds)
    raise argparse.ArgumentTypeError(f"{text!r} is not CALLS/SECONDS, such as 60/60")


def serve(parser: argparse.ArgumentParser, build: Callable[[argparse.Namespace, Options], Server]) -> None:
    """Read the command line, build the server, and do what was asked: serve over stdio, or run one tool."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed: the next file that is opened would take its place
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(number, "r+", closefd=False))  # noqa: SIM115 - for as long as the process lives
    end_with_reader(True)
    args = parser.parse_args()
    serve_http: Callable[[], None] | None = None
    try:
        if args.max_output < 0:
            raise ConfigError(f"--max-output {args.max_output} is less than 0; give a number of characters")
        server = build(args, Options(args.max_output, args.rate_limit, args.audit_log, args.verbose))
        if args.http is not None:
            serve_http = prepare_http(server, args.http, args.allowed_host)
        elif args.allowed_host:
            raise ConfigError("--allowed-host is for --http only; leave it out, or add --http PORT")
    except ConfigError as exc:
        parser.error(str(exc))
    # Ctrl-C ends the process at once; Python's own handler would wait for the thread that reads stdin.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if args.list_tools:
        anyio.run(print_tools, server)
        return
    end_with_reader(False)
    if args.call:
        sys.exit(anyio.run(call_once, parser, server, args.call))
    elif serve_http:
        serve_http()
    else:
        if sys.stdin.isatty():
            greet(server, parser.prog)
        anyio.run(serve_stdio, server)


def prepare_http(server: Server, address: str, hosts: Sequence[str]) -> Callable[[], None]:
    """Bind the address while a mistake can still be told in one line; what is returned serves. Raises ConfigError."""
    try:
        import serving_http
    except ModuleNotFoundError as missing:
        raise ConfigError(f"--http needs {missing.name}: copy serving_http.py beside this server") from None
    return serving_http.prepare(server, address, hosts)


def end_with_reader(on: bool) -> None:
    """Whether the process ends, without a traceback, when whoever reads what it prints, such as `head`, has had enough.
    Not while it serves: a client or an upstream that hangs up is an ordinary error then."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL if on else signal.SIG_IGN)


def greet(server: Server, prog: str) -> None:
    """Tell a person who started the server on a terminal what it is waiting for."""
    python = [sys.executable] if sys.argv[0].endswith(".py") else []
    command, *words = started_by_uv() or [*python, os.path.abspath(sys.argv[0]), *sys.argv[1:]]
    arguments = [os.path.abspath(word) if os.path.exists(word) else word for word in words]
    entry: dict[str, Any] = {"command": command, "args": arguments}
    if server.variables:
        entry["env"] = dict.fromkeys(server.variables, "...")
    name = re.sub(r"[^\w-]+", "-", f"{prog}-{server.label}").strip("-")
    print(
        f"{server.name} {__version__}: {server.instructions}\n\n"
        f"It speaks MCP on stdin and stdout and is meant to be started by a client. For Claude Desktop, put this into"
        f" claude_desktop_config.json:\n\n{json.dumps({'mcpServers': {name: entry}}, indent=2)}\n\n"
        f"To try a tool without a client: --list-tools, then --call TOOL name=value. Waiting; Ctrl-C ends.",
        file=sys.stderr,
    )


def started_by_uv() -> list[str]:
    """`uv` or `uvx` and what they were given, if they started this process; else nothing. The Python and the script
    that run now are in uv's cache then, and are gone after `uv cache prune`."""
    with suppress(OSError):  # no such file, no such program: not a system on which this can be known
        if "UV" in os.environ:
            parent = Path(f"/proc/{os.getppid()}/cmdline")
            if parent.exists():
                words = os.fsdecode(parent.read_bytes()).rstrip("\0").split("\0")
            else:
                command = ["ps", "-ww", "-o", "args=", "-p", str(os.getppid())]
                words = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()  # noqa: S603
            if words[1:3] == ["tool", "uvx"]:  # what uvx becomes
                return ["uvx", *words[3:]]
            if Path(words[0]).stem in ("uv", "uvx"):
                return [Path(words[0]).stem, *words[1:]]
    return []


async def print_tools(server: Server) -> None:
    """What `--list-tools` prints."""
    for tool in await server.list_tools():
        required = tool.input_schema.get("required", [])
        print(f"{tool.name}: {tool.description}")
        for name, schema in tool.input_schema["properties"].items():
            default = "required" if name in required else f"default {json.dumps(schema.get('default'))}"
            print(f"    {name} ({default}): {schema.get('description', '')}")


async def call_once(parser: argparse.ArgumentParser, server: Server, words: list[str]) -> int:
    """Run one tool through an in-memory client and print the result; returns the exit code."""
    from mcp import Client

    tool, *pairs = words
    schemas = {t.name: t.input_schema["properties"] for t in await server.list_tools()}
    arguments: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator:
            parser.error(f"{pair!r} is not name=value; put other arguments before --call")
        arguments[name] = text
        # Only a parameter that is text takes the words as they are; for the others they are JSON.
        if schemas.get(tool, {}).get(name, {}).get("type") != "string":
            with suppress(ValueError):
                arguments[name] = json.loads(text)
    async with Client(server) as client:
        result = await client.call_tool(tool, arguments)
    end_with_reader(True)
    out = sys.stderr if result.is_error else sys.stdout
    for block in result.content:
        text = block.text if isinstance(block, TextContent) else block.model_dump_json(exclude_none=True)
        out.buffer.write(text.encode("utf-8", "backslashreplace") + b"\n")
    out.flush()
    return int(result.is_error)
