"""Three patterns to copy into a server of your own: cached, rate limited, authenticated.

Each is a decorator for an `async def` tool; copy it with common.py, whose parts it is made of. Try them on the tool at
the end:

    python examples/patterns.py --call exchange_rate currency=NOK
    MCP_AUTH_TOKEN=$(openssl rand -hex 32) python examples/patterns.py --http 8000
"""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where common.py is; not needed beside it

from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

from common import TokenBucket, TTLCache
from serving import READ_ONLY, Options, Server, argument_parser, serve

P = ParamSpec("P")
Tool = Callable[P, Awaitable[str]]

# --------------------------------------------------------------------------------------------------------- cached


def cached(
    ttl: float, *, maxsize: int = 1000, timer: Callable[[], float] = time.monotonic
) -> Callable[[Tool[P]], Tool[P]]:
    """Answer the same arguments from memory for `ttl` seconds. Errors are not kept.

    Only for answers that do not depend on who asks. Two calls at the same moment both do the work.
    """
    cache: TTLCache[str, str] = TTLCache(maxsize, ttl, timer=timer)

    def decorate(tool: Tool[P]) -> Tool[P]:
        @wraps(tool)
        async def wrapper(*args: P.args, **kwargs: P.kwargs) -> str:
            key = json.dumps([args, kwargs], sort_keys=True)  # 1, "1" and true stay apart, as they do not in a tuple
            answer = cache.get(key)
            if answer is None:
                answer = await tool(*args, **kwargs)
                cache.put(key, answer)
            return answer

        return wrapper

    return decorate


# --------------------------------------------------------------------------------------------------- rate limited


def rate_limited(
    calls: int, seconds: float, *, max_wait: float = 5.0, timer: Callable[[], float] = time.monotonic
) -> Callable[[Tool[P]], Tool[P]]:
    """At most `calls` per `seconds`. A call waits up to `max_wait` seconds for its turn; then it is an error that says
    when to try again."""
    bucket = TokenBucket(calls, calls / seconds, timer=timer)

    def decorate(tool: Tool[P]) -> Tool[P]:
        @wraps(tool)
        async def wrapper(*args: P.args, **kwargs: P.kwargs) -> str:
            if wait := await bucket.acquire(max_wait):
                raise ToolError(f"rate limit reached: {calls} calls in {seconds:g} s; try again in {wait:.1f} s")
            return await tool(*args, **kwargs)

        return wrapper

    return decorate


# -------------------------------------------------------------------------------------------------- authenticated


def authenticated(caller: ContextVar[str | None], *allowed: str) -> Callable[[Tool[P]], Tool[P]]:
    """Only for callers whose token has one of these short hashes (`sha256:...`, as in the audit log), or for all who
    have a token if no hash is given. Over stdio there is no token: the one who started the server is the caller.

    `caller` is the server's own variable that says who calls.
    """

    def decorate(tool: Tool[P]) -> Tool[P]:
        @wraps(tool)
        async def wrapper(*args: P.args, **kwargs: P.kwargs) -> str:
            who = caller.get()
            if who is not None and (who not in allowed if allowed else who == ""):
                raise ToolError("this tool is not for you; ask who runs the server to add your token, or use another")
            return await tool(*args, **kwargs)

        return wrapper

    return decorate


# ----------------------------------------------------------------------------------------------------- in a server


def build_server(options: Options | None = None) -> Server:
    """A server with one tool that has all three, in the order that is right for most: the caller is checked before
    anything is told, and an answer from the cache costs nothing of the limit."""
    server = Server("patterns", "Tells exchange rates of long ago.", options or Options())

    @server.tool(annotations=READ_ONLY, structured_output=False)
    @authenticated(server.caller)
    @cached(ttl=300)
    @rate_limited(10, 60)
    async def exchange_rate(
        currency: Annotated[str, Field(description="three letters, such as NOK", pattern="^[A-Z]{3}$")],
    ) -> str:
        """Tell what one euro was in a currency on the first trading day of 2024."""
        await asyncio.sleep(0.1)  # here goes the slow and costly part
        rates = {"NOK": "11.2815", "SEK": "11.1485", "USD": "1.0956"}
        if currency not in rates:
            raise ToolError(f"no rate for {currency}; ask for one of {', '.join(rates)}")
        return rates[currency]

    return server


if __name__ == "__main__":
    serve(argument_parser("patterns", "Show three patterns."), lambda _, options: build_server(options))
