"""A server for the HTTP tests: its tools wait and block. Usage: waiting_server.py DIRECTORY [options]"""

import sys
import time
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import anyio
import anyio.to_thread
import common
from common import READ_ONLY, Options, Server, argument_parser, serve
from pydantic import Field


def build_server(directory: Path, options: Options) -> Server:
    async def health() -> None:
        if (directory / "hang").exists():
            await anyio.sleep(60)
        (directory / "healthy").read_bytes()

    server = Server("waiting-server", "Waits.", options, health=health)

    @server.tool(annotations=READ_ONLY, structured_output=False)
    async def wait(seconds: float, text: Annotated[str, Field(max_length=100_000_000)] = "") -> str:
        """Wait, and answer with the text. The files `begun` and `cancelled` tell what became of it."""
        (directory / "begun").touch()
        try:
            await anyio.sleep(seconds)
        except BaseException:
            (directory / "cancelled").touch()
            raise
        return text

    @server.tool(annotations=READ_ONLY, structured_output=False)
    async def block(seconds: float) -> str:
        """Block a thread that nobody can stop."""
        (directory / "begun").touch()
        await anyio.to_thread.run_sync(time.sleep, seconds)
        return "done"

    @server.tool(annotations=READ_ONLY, structured_output=False)
    async def much(characters: int) -> str:
        """Answer with much text."""
        return "x" * characters

    return server


if __name__ == "__main__":
    parser = argument_parser("waiting-server", "Waits.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--arrival", type=float, default=common.ARRIVAL_TIME)
    parser.add_argument("--answer", type=float, default=common.ANSWER_TIME)
    parser.add_argument("--idle", type=float, default=common.IDLE_TIME)
    arguments = parser.parse_args()
    common.ARRIVAL_TIME, common.ANSWER_TIME, common.IDLE_TIME = arguments.arrival, arguments.answer, arguments.idle
    serve(parser, lambda args, options: build_server(args.directory, options))
