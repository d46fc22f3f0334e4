"""A tiny HTTP API on this machine, to try api_server.py without the internet.

python examples/upstream.py                           serve until Ctrl-C
python examples/upstream.py SCRIPT.py ARGUMENT ...    serve while this Python runs that script
"""

import argparse
import json
import subprocess
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

NAMES = ("Ada", "Grace", "Edsger", "Barbara", "Donald", "Radia", "Alan", "Frances", "Niklaus", "Margaret")
USERS = [{"id": n, "name": name, "city": ("London", "Oslo", "Rome")[n % 3]} for n, name in enumerate(NAMES, 1)]


class Handler(BaseHTTPRequestHandler):
    """Answers /v1/users, /v1/users/ID and /v1/echo with JSON; anything else is a 404."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer one request."""
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        parts = url.path.strip("/").split("/")
        if parts == ["v1", "users"]:
            users = [user for user in USERS if query.get("city") in (None, user["city"])]
            self.answer(200, {"total": len(users), "users": users})
        elif parts[:2] == ["v1", "users"] and parts[2:] in [[str(user["id"])] for user in USERS]:
            self.answer(200, USERS[int(parts[2]) - 1])
        elif parts == ["v1", "echo"]:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
            self.answer(
                200, {"method": self.command, "query": query, "headers": dict(self.headers.items()), "body": body}
            )
        else:
            self.answer(404, {"error": f"nothing at {url.path}; try /v1/users, /v1/users/1 or /v1/echo"})

    do_POST = do_GET  # noqa: N815 - the name that http.server looks for

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in http.server
        """Keep the terminal for the script's own output."""

    def answer(self, status: int, value: object) -> None:
        """Send a JSON body."""
        body = json.dumps(value, indent=2).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> int:
    """Serve, alone or around a script; returns the script's exit code."""
    parser = argparse.ArgumentParser(description="Serve a tiny HTTP API on 127.0.0.1.")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a Python script to run meanwhile, and its arguments")
    args = parser.parse_args()
    try:
        server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    except OSError as exc:
        parser.error(f"port {args.port}: {exc.strerror}; is it running already? --port N and local.json take another")
    with server:
        if not args.script:
            print(f"http://127.0.0.1:{server.server_port}/v1/users answers; Ctrl-C ends", file=sys.stderr)
            with suppress(KeyboardInterrupt):
                server.serve_forever()
            return 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            return subprocess.run([sys.executable, *args.script], check=False).returncode  # noqa: S603 - the user's own
        finally:
            server.shutdown()


if __name__ == "__main__":
    sys.exit(main())
