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

# To import the SDK is nearly all of the start. It makes 90,000 objects that all stay: looking for garbage among them
# can wait. So can building hundreds of models of messages, most of which are never sent.
gc.disable()
try:
    from pydantic import BaseModel

    BaseModel.model_config["defer_build"] = True
    from mcp.server import MCPServer
except ImportError:
    sys.stderr.write('this server needs the package mcp, version 2.3 or newer: pip install "mcp>=2.3,<3"\n')
    sys.exit(2)

import argparse
import asyncio
import json
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import anyio
from mcp.server.mcpserver.exceptions import ResourceError, ToolError
from mcp.server.mcpserver.utilities.func_metadata import ArgModelBase
from mcp.shared.message import SessionMessage
from mcp_types import CallToolResult, TextContent, ToolAnnotations, jsonrpc_message_adapter
from pydantic_core import ValidationError, to_json

from common import ConfigError, TokenBucket

del BaseModel.model_config["defer_build"]
gc.freeze()
gc.enable()

__version__ = "0.2.0"

MAX_OUTPUT = 40_000  # characters: about 10,000 tokens, below the 25,000 at which clients cut a result themselves
TIME_LIMIT = 30.0  # seconds a tool may run; clients drop results at 60
MAX_AUDITED = 200  # characters of one text in an audit line

# A misspelt argument would be dropped without a word, and the model believe that it had an effect.
ArgModelBase.model_config["extra"] = "forbid"

READ_ONLY = ToolAnnotations(read_only_hint=True, open_world_hint=False)


class Options(NamedTuple):
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
        # Spans that nobody collects would be a tenth of a small call.
        self.middleware[:] = [m for m in self.middleware if type(m).__name__ != "OpenTelemetryMiddleware"]
        self.options = options
        self.redact: Callable[[str], str] = str
        self.health: Callable[[], Awaitable[object]] | None = None
        self.label = ""
        self.variables: Sequence[str] = ()
        # Who calls: over HTTP the short hash of the token, or "" if none is needed; None over stdio.
        self.caller: ContextVar[str | None] = ContextVar("caller", default=None)
        self._buckets: dict[str | None, TokenBucket] = {}  # one for each caller
        self._logs = [2] if options.verbose else []  # descriptors
        if options.audit_log is not None:
            self._logs.append(os.open(options.audit_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))

    def add_tool(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """As in MCPServer, with less for the model to read: a docstring is sent as one line, schemas are slimmed."""
        super().add_tool(fn, *args, **kwargs)
        tool = self._tool_manager.list_tools()[-1]
        tool.description = " ".join(tool.description.split())
        tool.title = tool.title or tool.name.replace("_", " ").capitalize()
        tool.parameters = json.loads(json.dumps(tool.parameters), object_hook=_slim)
        tool.fn_metadata.output_schema = json.loads(json.dumps(tool.fn_metadata.output_schema), object_hook=_slim)

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Any = None) -> Any:
        """Run one tool. Raises ToolError with one sentence that says what to do next."""
        return await self.checked(name, arguments, partial(super().call_tool, name, arguments, context))

    async def read_resource(self, uri: Any, context: Any = None) -> Any:
        """Read one resource, with the limits of a tool call. Raises ResourceError."""
        return await self.checked("resources/read", {"uri": str(uri)}, partial(super().read_resource, uri, context))

    async def checked(self, name: str, arguments: Mapping[str, Any], run: Callable[[], Awaitable[Any]]) -> Any:
        """Do what a client asks for: within the rate and the time limit, and with a line in the audit log.

        Raises what `run` raises, with a message for the model, and LimitError.
        """
        started = time.perf_counter()
        facts: dict[str, object] = {"outcome": "cancelled", "ms": 0.0, "bytes": 0}
        _facts.set(facts)  # worker threads see the same dict
        try:
            if self.options.rate_limit is not None:
                calls, seconds = self.options.rate_limit
                # One caller who uses up the limit must not lock out the others.
                bucket = self._buckets.setdefault(self.caller.get(), TokenBucket(calls, calls / seconds))
                if wait := bucket.try_acquire():
                    raise LimitError(f"rate limit reached: {calls} calls in {seconds:g} s; try again in {wait:.1f} s")
            async with asyncio.timeout(TIME_LIMIT):
                result = await run()
            if isinstance(result, CallToolResult):
                facts["bytes"] = self._clean(result)
            facts["outcome"] = "ok"
            return result
        except TimeoutError:
            facts["outcome"] = "timeout"
            raise LimitError(f"{name} did not finish within {TIME_LIMIT:g} s; ask for less, or for a part") from None
        except (ToolError, ResourceError) as exc:
            facts["outcome"] = "error"
            exc.args = (self._clean_text(self._sentence(name, exc)),)
            raise
        finally:
            facts["ms"] = round((time.perf_counter() - started) * 1000, 1)
            if self._logs:
                self._audit(name, arguments, facts)

    def _sentence(self, name: str, exc: Exception) -> str:
        """What is wrong, without what the SDK puts around it and without any exception's own text."""
        tool = self._tool_manager.get_tool(name)
        if tool and isinstance(exc.__cause__, ValidationError):
            found = [(".".join(map(str, e["loc"])), e["msg"], e["input"]) for e in exc.__cause__.errors()]
            problems = [f"{where}: {said[:1].lower()}{said[1:]} (got {got!r:.60})" for where, said, got in found]
            return f"{'; '.join(problems)}; {name} takes {', '.join(tool.parameters['properties']) or 'no arguments'}"
        if str(exc) == f"Unknown tool: {name}":
            return f"unknown tool: {name}; this server has {', '.join(t.name for t in self._tool_manager.list_tools())}"
        # Of an unexpected exception, the SDK says no more than its prefix, and logs the rest.
        message = str(exc).removeprefix(f"Error executing tool {name}").removeprefix(": ")
        return message or f"{name} failed inside the server; the reason is in the server's log, try other arguments"

    def _clean_text(self, text: str) -> str:
        """Text that may leave: secrets masked, and no lone surrogate, which cannot be sent."""
        text = self.redact(text)
        return text.encode("utf-8", "backslashreplace").decode()

    def _clean(self, result: CallToolResult) -> int:
        """Make a result fit to be sent; returns its size in bytes."""
        if result.structured_content is not None:
            # The SDK's text copy of a structured result is indented JSON: half of it is white space.
            text = self._clean_text(to_json(result.structured_content).decode())
            result.structured_content = json.loads(text)
            result.content = [TextContent(type="text", text=text)]
        texts = [block for block in result.content if isinstance(block, TextContent)]
        for block in texts:
            block.text = self._clean_text(block.text)
        return sum(len(block.text.encode()) for block in texts)

    def _audit(self, name: str, arguments: Mapping[str, Any], facts: Mapping[str, object]) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = {"time": now, "tool": name, "arguments": _for_audit(arguments), "token": self.caller.get(), **facts}
        text = self._clean_text(to_json(line, inf_nan_mode="strings").decode())
        try:
            for log in self._logs:
                os.write(log, text.encode() + b"\n")
        except OSError:
            print("the audit log cannot be written", file=sys.stderr)


class LimitError(ToolError, ResourceError):
    """The rate or the time limit, for a tool as for a resource."""


def _slim(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without what costs the model tokens and tells it nothing: titles, which repeat the names, the
    longest texts that are accepted, which no honest call comes near, and the description of a whole result."""
    left_out = ("title", "maxLength", "additionalProperties", "description" if "properties" in schema else "")
    return {name: value for name, value in schema.items() if name not in left_out or isinstance(value, dict)}


# ----------------------------------------------------------------------------------------------------- audit log

_facts: ContextVar[dict[str, object]] = ContextVar("_facts")

_NAME = r"(?i:pass|pwd|secret|token|api.?key|auth(?!ors?\b)|credential|cookie|session|(?<![a-z])sig(nature)?(?![a-z]))"
# name=value in a URL or a connection string, "name": "value" in JSON (also JSON within JSON), Name: value in a header.
_SECRET = re.compile(rf"""({_NAME}[\w.-]*\\*["']?\s*[=:]\s*((?i:bearer|basic) +)?)(\\*"[^"\\]*|'[^']*|[^\s&,;"']+)""")


def audit(**facts: object) -> None:
    """Add facts to the audit line of the call that is running, such as what a write changed."""
    _facts.get({}).update(facts)


def _for_audit(value: Any) -> Any:
    """Arguments as they may be written down: secrets are masked by their name, long texts are cut."""
    if isinstance(value, str):
        length = f"… ({len(value)} characters)" if len(value) > MAX_AUDITED else ""
        return _SECRET.sub(r"\1***", value[:MAX_AUDITED]) + length
    if isinstance(value, Mapping):
        items = cast("Mapping[object, Any]", value).items()
        return {str(name): "***" if re.search(_NAME, str(name)) else _for_audit(item) for name, item in items}
    if isinstance(value, list):
        return [_for_audit(item) for item in cast("list[Any]", value)]
    return value


# --------------------------------------------------------------------------------------------------------- stdio

# The id of a request that cannot be parsed: a name at the top level, before or behind all that is nested.
_ID = rb'"id"\s*:\s*(-?\d+|"[\w .:/-]*")'
_REQUEST_ID = re.compile(rb"\s*\{[^{}\[\]]*?" + _ID + rb"|.*" + _ID + rb"[^{}\[\]]*\}\s*\Z", re.DOTALL)
_UNREADABLE = b'{"jsonrpc":"2.0","id":%b,"error":{"code":-32700,"message":"no JSON-RPC in UTF-8, or too deep"}}\n'


class Pipes(anyio.abc.ObjectReceiveStream[SessionMessage], anyio.abc.ObjectSendStream[SessionMessage]):
    """Stdin and stdout as the two message streams that a server is run over, both in one object.

    Served on the event loop itself. The SDK's transport moves every line through worker threads, and every message
    through two more queues: that is more than half of what a small call costs.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer, self._turn = reader, writer, asyncio.Lock()

    @classmethod
    async def open(cls) -> "Pipes | None":
        """None where the event loop cannot wait for them (a file, a terminal, Windows): the SDK's has to do."""
        kinds = {stat.S_IFMT(os.fstat(end).st_mode) for end in (0, 1)}
        # One socket for both ways is not for us: asyncio would take what comes in for a hang-up.
        if sys.platform == "win32" or kinds - {stat.S_IFIFO, stat.S_IFSOCK} or os.path.sameopenfile(0, 1):  # noqa: ASYNC240
            return None
        # The protocol moves to descriptors of its own, so that a stray print, or a child process, cannot write into it.
        stdin, stdout = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=1 << 27)  # bytes: a text of 10 MB takes six times that in JSON at worst
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), stdin)
        sink, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, stdout)
        return cls(reader, asyncio.StreamWriter(sink, protocol, None, loop))

    async def receive(self) -> SessionMessage:
        """The next message. What cannot be parsed is answered here: the SDK would drop it, and the client wait."""
        async for line in self._reader:
            try:
                return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
            except ValueError:
                found = _REQUEST_ID.match(line)
                self._writer.write(_UNREADABLE % (found[1] or found[2] if found else b"null"))
        raise anyio.EndOfStream

    async def send(self, item: SessionMessage) -> None:
        """Send a message. Large results wait for their turn as they are, not as bytes in a buffer besides."""
        async with self._turn:
            self._writer.write(jsonrpc_message_adapter.dump_json(item.message, exclude_unset=True) + b"\n")
            with suppress(ConnectionError):  # the client has gone; the end of stdin will say so
                await self._writer.drain()

    async def aclose(self) -> None:
        """Nothing to do: the process ends with its client."""


async def serve_stdio(server: Server) -> None:
    """Serve the client that started this process, until it hangs up; then end the process."""
    if pipes := await Pipes.open():
        lowlevel = server._lowlevel_server  # pyright: ignore[reportPrivateUsage] - there is no public way to bring streams
        await lowlevel.run(pipes, pipes, lowlevel.create_initialization_options())
    else:
        await server.run_stdio_async()
    # The client has gone. A worker thread that is stuck in a system call must not keep the process alive.
    os._exit(0)


# -------------------------------------------------------------------------------------------------- command line


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.splitlines())} (--help shows the usage)\n")


def argument_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that all servers share; the caller adds its own."""
    parser = _OneLineParser(prog=name, description=description, allow_abbrev=False)
    instead, add = parser.add_mutually_exclusive_group().add_argument, parser.add_argument
    instead("--call", nargs="+", metavar=("TOOL", "name=value"), help="run one tool, print its result, exit")
    instead("--list-tools", action="store_true", help="print the tools with their parameters, exit")
    instead("--http", metavar="[HOST:]PORT", help="serve HTTP; others reach a HOST only with a token in MCP_AUTH_TOKEN")
    add("--allowed-host", action="append", default=[], metavar="NAME", help="what HTTP clients call this server")
    add("--audit-log", type=Path, metavar="FILE", help="append one JSON line a call to FILE")
    add("--verbose", action="store_true", help="write the same line to stderr")
    add("--max-output", type=int, default=MAX_OUTPUT, metavar="CHARS", help="in a result at most (%(default)s; 0: all)")
    add("--rate-limit", type=_rate, metavar="CALLS/SECONDS", help="refuse calls above this rate")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def _rate(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch("([1-9][0-9]{0,8})/([1-9][0-9]{0,8})", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not CALLS/SECONDS, such as 60/60")
    return int(found[1]), int(found[2])


def serve(parser: argparse.ArgumentParser, build: Callable[[argparse.Namespace, Options], Server]) -> None:
    """Read the command line, build the server, and do what was asked: serve over stdio, or run one tool."""
    # Ctrl-C ends the process at once; Python's own handler would wait for the thread that reads stdin.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    args = parser.parse_args()
    try:
        if args.max_output < 0:
            raise ConfigError(f"--max-output {args.max_output} is less than 0; give a number of characters")
        server = build(args, Options(args.max_output, args.rate_limit, args.audit_log, args.verbose))
        if args.http is not None:
            import serving_http

            serving_http.serve(server, args.http, args.allowed_host)
        elif args.list_tools:
            anyio.run(list_tools, server)
        elif args.call:
            anyio.run(call_once, server, *args.call)
        else:
            if None in (sys.stdin, sys.stdout):
                raise ConfigError("stdin or stdout is closed; let a client start this server, or add --http PORT")
            if sys.stdin.isatty():
                greet(server, parser.prog)
            anyio.run(serve_stdio, server)
    except BrokenPipeError:  # who reads what is printed, such as `head`, has had enough
        os._exit(0)
    except ModuleNotFoundError as missing:
        parser.error(f"{missing.name} is missing: copy {missing.name}.py into the directory of this server")
    except (ConfigError, OSError) as exc:
        parser.error(str(exc))


async def list_tools(server: Server) -> None:
    """What `--list-tools` prints."""
    for tool in await server.list_tools():
        print(f"{tool.name}: {tool.description}", flush=True)
        for name, schema in tool.input_schema["properties"].items():
            default = f"default {json.dumps(schema['default'])}" if "default" in schema else "required"
            print(f"    {name} ({default}): {schema.get('description', '')}", flush=True)


async def call_once(server: Server, tool: str, *pairs: str) -> None:
    """Run one tool through an in-memory client and print the result; the exit code is 1 for an error."""
    from mcp import Client

    schemas = {t.name: t.input_schema["properties"] for t in await server.list_tools()}
    arguments: dict[str, Any] = {}
    for name, _, text in (pair.partition("=") for pair in pairs):
        arguments[name] = text
        # Only a parameter that is text takes the words as they are; for the others they are JSON.
        if schemas.get(tool, {}).get(name, {}).get("type") != "string":
            with suppress(ValueError):
                arguments[name] = json.loads(text)
    async with Client(server) as client:
        result = await client.call_tool(tool, arguments)
    for block in result.content:
        print(getattr(block, "text", block), file=sys.stderr if result.is_error else sys.stdout, flush=True)
    sys.exit(int(result.is_error))


def greet(server: Server, prog: str) -> None:
    """Tell a person who started the server on a terminal what it is waiting for."""
    command, *words = command_line()
    args = [os.path.abspath(word) if os.path.exists(word) else word for word in words]
    entry = {"command": command, "args": args, "env": dict.fromkeys(server.variables, "...")}
    name = re.sub(r"[^\w-]+", "-", f"{prog}-{server.label}").strip("-")
    print(f"{server.name} {__version__}: {server.instructions}\n\nFor claude_desktop_config.json:\n", file=sys.stderr)
    print(json.dumps({"mcpServers": {name: entry}}, indent=2), file=sys.stderr)
    print("\nTo try it without a client: --list-tools, --call TOOL name=value. Waiting; Ctrl-C ends.", file=sys.stderr)


def command_line() -> list[str]:
    """What starts this server again: under uv, `uv` or `uvx` and what they were given, because the Python and the
    script that run now are in its cache then, and are gone after `uv cache prune`."""
    if "UV" in os.environ and sys.platform != "win32":
        try:
            words = os.fsdecode(Path(f"/proc/{os.getppid()}/cmdline").read_bytes()).split("\0")[:-1]
        except OSError:  # macOS
            words = subprocess.getoutput(f"ps -ww -o args= -p {os.getppid()}").split()  # noqa: S605 - a number only
        words = words[2:] if words[1:3] == ["tool", "uvx"] else words  # what uvx becomes
        if Path(words[0]).stem in ("uv", "uvx"):
            return [Path(words[0]).stem, *words[1:]]
    return [sys.executable, *sys.argv] if sys.argv[0].endswith(".py") else sys.argv
