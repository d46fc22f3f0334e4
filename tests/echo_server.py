"""A server of the tests' own, for what all servers have in common: python tests/echo_server.py WORD [options]."""

import sys
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse

from mcp.server.mcpserver.exceptions import ResourceError, ToolError
from pydantic import BaseModel, Field

import serving


class Count(BaseModel):
    """How long a text is."""

    characters: int
    text: str


def build_server(options: serving.Options | None = None, word: str = "") -> serving.Server:
    server = serving.Server("echo", f"Says it again, {word}.", options or serving.Options())
    server.redact = lambda text: text.replace("hunter2", "***")
    server.label = word

    @server.tool(annotations=serving.READ_ONLY, structured_output=False)
    async def say_again(
        text: Annotated[str, Field(description="what to say", max_length=10_000_000)],
        times: Annotated[int, Field(ge=1, strict=True)] = 1,
    ) -> str:
        """Say
        it again."""
        return text * times

    @server.tool(structured_output=False)
    async def crash() -> str:
        raise RuntimeError("the password is hunter2")

    @server.tool(structured_output=False)
    async def fail() -> str:
        raise ToolError("this is wrong: hunter2; do that")

    @server.tool()
    async def count(text: str = "hunter2") -> Count:
        return Count(characters=len(text), text=text)

    @server.tool(structured_output=False)
    async def take(value: Any) -> str:
        serving.audit(taken=True)
        print("a stray print")
        return "taken"

    @server.resource("echo://{text}")
    async def echoed(text: str) -> str:
        if text == "fail":
            raise ResourceError("this is wrong: hunter2; do that")
        return text

    return server


def build(args: argparse.Namespace, options: serving.Options) -> serving.Server:
    if args.word == "bad":
        raise serving.ConfigError("bad is no\nword; give another")
    return build_server(options, args.word)


if __name__ == "__main__":
    parser = serving.argument_parser("echo-server", "Say it again.")
    parser.add_argument("word")
    serving.serve(parser, build)
