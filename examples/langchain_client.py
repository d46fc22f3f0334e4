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

from langchain_mcp_adapters.client import MultiServerMCPClient


async def main(server: list[str], call: list[str] | None) -> None:
    """Print the tools, or a tool's answer."""
    if server[0].startswith(("http://", "https://")):
        token = os.environ.get("MCP_AUTH_TOKEN")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection = {"transport": "streamable_http", "url": server[0], "headers": headers}
    else:
        connection = {"transport": "stdio", "command": server[0], "args": server[1:]}
    client = MultiServerMCPClient({"server": connection})
    tools = {tool.name: tool for tool in await client.get_tools()}
    if call is None:
        for tool in tools.values():
            print(f"{tool.name}: {tool.description}")
        return
    answer = await tools[call[0]].ainvoke(json.loads(call[1]))
    print("".join(block if isinstance(block, str) else block.get("text", "") for block in answer))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Use an MCP server's tools in LangChain.")
    parser.add_argument("--call", nargs=2, metavar=("TOOL", "JSON"), help="a tool and its arguments")
    parser.add_argument("server", nargs=argparse.REMAINDER, help="the URL, or the command that starts it")
    arguments = parser.parse_args()
    if not arguments.server:
        parser.error("give the server's URL, or the command that starts it")
    asyncio.run(main(arguments.server, arguments.call))
