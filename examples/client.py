"""A client to learn from: start a server, or connect to one, list its tools, and call one of them.

python examples/client.py [--call TOOL JSON] python fs_server.py .        over stdio
python examples/client.py [--call TOOL JSON] http://localhost:8000/mcp    over HTTP, with MCP_AUTH_TOKEN if there is one
"""

import argparse
import asyncio
import json
import os
import sys
from contextlib import AsyncExitStack
from typing import Any, cast

import httpx2
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp_types import TextContent


async def main(server: list[str], tool: str | None, arguments: dict[str, Any]) -> int:
    """Print the tools, or a tool's answer; returns the exit code."""
    async with AsyncExitStack() as stack:
        target: Any
        if server[0].startswith(("http://", "https://")):
            token = os.environ.get("MCP_AUTH_TOKEN")
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            hooks = {"response": [explain_refusal]}
            http_client = httpx2.AsyncClient(headers=headers, timeout=60, event_hooks=hooks)
            target = streamable_http_client(server[0], http_client=await stack.enter_async_context(http_client))
        else:
            target = StdioServerParameters(command=server[0], args=server[1:])
        client = await stack.enter_async_context(Client(target))
        if tool is None:
            for listed in (await client.list_tools()).tools:
                print(f"{listed.name}: {listed.description}")
            return 0
        result = await client.call_tool(tool, arguments)
        for block in result.content:
            text = block.text if isinstance(block, TextContent) else f"({block.type})"
            print(text, file=sys.stderr if result.is_error else sys.stdout)
        return int(result.is_error)


# ------------------------------------------------------------------------------------------- what can go wrong

REFUSED = {
    401: "it wants a token: set MCP_AUTH_TOKEN to one of its own",
    404: "it serves nothing at that path; ours serve at /mcp",
    421: "it does not know that host name: start it with --allowed-host",
}


async def explain_refusal(response: httpx2.Response) -> None:
    """Raise what the status means; all that the SDK would tell is "an error response"."""
    if response.status_code in REFUSED:
        raise ConnectionRefusedError(f"the server answers {response.status_code}: {REFUSED[response.status_code]}")


def in_one_line(error: BaseException, server: list[str]) -> str:
    """Say what stopped us. The SDK's tasks wrap it in groups, one in another."""
    while isinstance(error, BaseExceptionGroup):
        error = cast("BaseExceptionGroup[Exception]", error).exceptions[0]
    if isinstance(error, httpx2.TransportError):
        return f"cannot reach {server[0]}: {error}; is the server running, and on that port?"
    if isinstance(error, MCPError):
        return f"{server[0]} does not speak MCP, or ended too soon ({error}); what it printed stands above"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot start {server[0]}: {error.strerror}; is it installed, and on the PATH?"
    return str(error)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Try an MCP server.")
    parser.add_argument("--call", nargs=2, metavar=("TOOL", "JSON"), help="a tool and its arguments")
    parser.add_argument("server", nargs=argparse.REMAINDER, help="the URL, or the command that starts it")
    options = parser.parse_args()
    if not options.server:
        parser.error("give the server's URL, or the command that starts it")
    tool, text = options.call or (None, "{}")
    try:
        arguments: dict[str, Any] = dict(json.loads(text))
    except (TypeError, ValueError):
        parser.error(f'the arguments of {tool} are no JSON object, such as {{"path": "."}}')
    try:
        sys.exit(asyncio.run(main(options.server, tool, arguments)))
    except Exception as error:
        sys.exit(in_one_line(error, options.server))
