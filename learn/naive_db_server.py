"""BROKEN ON PURPOSE: SQL served the way it is written everywhere; attack.py breaks it. Never use it for your data."""

import json
import sqlite3
import sys

from mcp.server import MCPServer

FORBIDDEN = ("INSERT", "UPDATE", "DELETE", "DROP", "ALTER", "CREATE", "TRUNCATE")

database = sqlite3.connect(sys.argv[1], check_same_thread=False)
database.row_factory = sqlite3.Row

server = MCPServer("naive-database")


@server.tool()
def list_tables() -> str:
    """List the tables."""
    rows = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    return json.dumps([row["name"] for row in rows])


@server.tool()
def query_database(query: str, limit: int = 100) -> str:
    """Run a read-only SQL query."""
    for word in FORBIDDEN:
        if word in query.upper():
            raise ValueError(f"{word} is not allowed: this server is read-only")
    if "LIMIT" not in query.upper():
        query = query.rstrip("; ") + f" LIMIT {limit}"
    rows = database.execute(query).fetchall()
    return json.dumps([dict(row) for row in rows], indent=2)


if __name__ == "__main__":
    server.run()
