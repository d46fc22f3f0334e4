"""A server for the HTTP tests: its tools wait, block and repeat. Usage: waiting_server.py DIRECTORY [options]"""

import sys
import time
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import serving  # first of all: it imports the SDK with the garbage collector off

# isort: split
import anyio
import anyio.to_thread
from pydantic import Field

import serving_http

TIMES = ("ARRIVAL_TIME", "ANSWER_TIME", "IDLE_TIME", "DRAIN_TIME", "HEALTH_TIME")


def build_server(directory: Path, options: serving.Options) -> serving.Server:
    server = serving.Server("waiting-server", "Waits.", options)

    async def health() -> None:
        with (directory / "checks").open("a") as checks:
            checks.write("x")
        if (directory / "hang").exists():
            await anyio.sleep(60)
        if (directory / "sick").exists():
            raise OSError("sick")

    server.health = health

    def begin() -> None:
        with (directory / "begun").open("a") as begun:
            begun.write("x")

    @server.tool(annotations=serving.READ_ONLY, structured_output=False)
    async def wait(seconds: float, text: Annotated[str, Field(max_length=100_000_000)] = "") -> str:
        """Wait, and answer with the text. The files `begun` and `cancelled` tell what became of it."""
        begin()
        try:
            await anyio.sleep(seconds)
        except BaseException:
            (directory / "cancelled").touch()
            raise
        return text

    @server.tool(annotations=serving.READ_ONLY, structured_output=False)
    async def block(seconds: float) -> str:
        """Block a thread that nobody can stop."""
        begin()
        await anyio.to_thread.run_sync(time.sleep, seconds)
        return "done"

    @server.tool(annotations=serving.READ_ONLY, structured_output=False)
    async def much(characters: int) -> str:
        """Answer with much text."""
        return "x" * characters

    return server


if __name__ == "__main__":
    parser = serving.argument_parser("waiting-server", "Waits.")
    parser.add_argument("directory", type=Path)
    for name in TIMES:
        parser.add_argument(f"--{name.lower().replace('_', '-')}", type=float, default=getattr(serving_http, name))
    arguments = vars(parser.parse_args())
    for name in TIMES:
        setattr(serving_http, name, arguments[name.lower()])
    serving.serve(parser, lambda args, options: build_server(args.directory, options))
