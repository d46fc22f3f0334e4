# /// script
# requires-python = ">=3.11"
# dependencies = ["langchain-mcp-adapters>=0.3,<0.4"]
# ///
"""The tools of a server as LangChain tools, for an agent or by hand.

uv run examples/langchain_client.py [--call TOOL JSON] uv run fs_server.py .        over stdio
uv run examples/langchain_client.py [--call TOOL JSON] http://localhost:8000/mcp    over HTTP, with MCP_AUTH_TOKEN

langchain-mcp-adapters 0.3 is built on version 1 of the MCP SDK and the servers on version 2, so it lives in an
environment of its own (uv makes one); they meet on the wire. With a model, the tools go to an agent:

    agent = create_agent("anthropic:claude-sonnet-4-5", await client.get_tools())
    print(await agent.ainvoke({"messages": "Which files here mention a deadline?"}))
"""

# Its packages are not in the project's environment:
# pyright: basic, reportMissingImports=false

import argparse
import asyncio
import json
import os
import sys
from typing import Any

import httpx
from langchain_mcp_adapters.client import MultiServerMCPClient


async def main(server: list[str], tool: str | None, arguments: dict[str, Any]) -> int:
    """Print the tools, or a tool's answer; returns the exit code."""
    if server[0].startswith(("http://", "https://")):
        token = os.environ.get("MCP_AUTH_TOKEN")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection = {"transport": "streamable_http", "url": server[0], "headers": headers}
    else:
        connection = {"transport": "stdio", "command": server[0], "args": server[1:]}
    client = MultiServerMCPClient({"server": connection})
    tools = {tool.name: tool for tool in await client.get_tools()}
    if tool is None:
        for listed in tools.values():
            print(f"{listed.name}: {listed.description}")
        return 0
    if tool not in tools:
        print(f"no tool {tool}; the server has {', '.join(tools)}", file=sys.stderr)
        return 1
    call = {"type": "tool_call", "id": "1", "name": tool, "args": arguments}  # as a model's call, it has a status
    answer = await tools[tool].ainvoke(call)
    blocks = [answer.content] if isinstance(answer.content, str) else answer.content
    text = "".join(block if isinstance(block, str) else block.get("text", "") for block in blocks)
    print(text, file=sys.stderr if answer.status == "error" else sys.stdout)
    return int(answer.status == "error")


def in_one_line(error: BaseException, server: list[str]) -> str:
    """Say what stopped us. The SDK's tasks wrap it in groups, one in another."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, httpx.HTTPStatusError):
        return f"the server answers {error.response.status_code}; at 401 set MCP_AUTH_TOKEN, at 404 the path is /mcp"
    if isinstance(error, httpx.TransportError):
        return f"cannot reach {server[0]}: {error}; is the server running, and on that port?"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot start {server[0]}: {error.strerror}; is it installed, and on the PATH?"
    return f"no MCP from {server[0]}: {error}; what it printed stands above, and ours serve HTTP at /mcp"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Use an MCP server's tools in LangChain.")
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
