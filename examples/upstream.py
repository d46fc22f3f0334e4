"""A tiny HTTP API on this machine, to try api_server.py without the internet: python examples/upstream.py [PORT]."""

import json
import sys
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

    def answer(self, status: int, value: object) -> None:
        """Send a JSON body."""
        body = json.dumps(value, indent=2).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8765
    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/v1/users answers; Ctrl-C ends", file=sys.stderr)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
