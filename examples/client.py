"""A client in thirty lines: start a server, or connect to one, list its tools, and call one of them.

python examples/client.py [--call TOOL JSON] python fs_server.py .        over stdio
python examples/client.py [--call TOOL JSON] http://localhost:8000/mcp    over HTTP, with MCP_AUTH_TOKEN if there is one
"""

import argparse
import asyncio
import json
import os
import sys
from contextlib import AsyncExitStack
from typing import Any

import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp_types import TextContent


async def main(server: list[str], call: list[str] | None) -> int:
    """Print the tools, or a tool's answer; returns the exit code."""
    async with AsyncExitStack() as stack:
        target: Any
        if server[0].startswith(("http://", "https://")):
            token = os.environ.get("MCP_AUTH_TOKEN")
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            http_client = await stack.enter_async_context(httpx2.AsyncClient(headers=headers, timeout=60))
            target = streamable_http_client(server[0], http_client=http_client)
        else:
            target = StdioServerParameters(command=server[0], args=server[1:])
        client = await stack.enter_async_context(Client(target))
        if call is None:
            for tool in (await client.list_tools()).tools:
                print(f"{tool.name}: {tool.description}")
            return 0
        result = await client.call_tool(call[0], json.loads(call[1]))
        for block in result.content:
            print(block.text if isinstance(block, TextContent) else f"({block.type})")
        return int(result.is_error)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Try an MCP server.")
    parser.add_argument("--call", nargs=2, metavar=("TOOL", "JSON"), help="a tool and its arguments")
    parser.add_argument("server", nargs=argparse.REMAINDER, help="the URL, or the command that starts it")
    arguments = parser.parse_args()
    if not arguments.server:
        parser.error("give the server's URL, or the command that starts it")
    sys.exit(asyncio.run(main(arguments.server, arguments.call)))
