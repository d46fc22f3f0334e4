"""The lesson is true: naive servers fall, ours hold, and each defence that it names is what stops its attack."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import PROJECT

LEARN = PROJECT / "learn"
sys.path.insert(0, str(LEARN))  # attack.py imports target.py

from learn import attack  # noqa: E402

README = (PROJECT / "README.md").read_text()
LESSON = (LEARN / "README.md").read_text()


def attacked(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What a run of attack.py prints, and its exit code."""
    return subprocess.run(
        [sys.executable, LEARN / "attack.py", *arguments], capture_output=True, text=True, timeout=300, check=False
    )


# --------------------------------------------------------------------------------------------- naive servers, attacks


def test_the_naive_servers_are_short_say_that_they_are_broken_and_work_for_honest_use(tmp_path: Path) -> None:
    for kind in attack.KINDS:
        lines = (LEARN / f"naive_{kind}_server.py").read_text().splitlines()
        assert len(lines) <= 60
        assert re.fullmatch(r'"""BROKEN ON PURPOSE: .*"""', lines[0])
        (tmp_path / kind).mkdir()
    with ExitStack() as stack:
        files = attack.Files(attack.NAIVE["fs"], tmp_path / "fs")
        stack.callback(files.kill)
        note, moved = str(files.served / "note.txt"), str(files.served / "moved.txt")
        assert "note.txt" in files.call("write_file", path=note, content="good evening")
        assert "moved.txt" in files.call("move_file", source=note, destination=moved)
        assert "good evening" in files.call("read_file", path="moved.txt")
        assert "hello.txt\\\\nmoved.txt" in repr(files.call("list_directory", path="."))
        assert "moved.txt:good evening" in files.call("search_text", path=".", pattern="g..d e", regex=True)
        database = attack.Database(attack.NAIVE["db"], tmp_path / "db")
        stack.callback(database.kill)
        assert "users" in database.call("list_tables")
        assert database.query("SELECT name FROM users ORDER BY id LIMIT 2").count("user 1") > 0
        assert "199" in database.query("SELECT max(id) FROM users;")
        apis = attack.Apis(attack.NAIVE["api"], tmp_path / "api")
        stack.callback(apis.kill)
        assert "shop" in apis.call("list_apis")
        assert "good morning" in apis.call("call_api", api="shop", endpoint="users", params={"page": 1})
        assert apis.shop.seen == [("GET", "/v1/users", attack.SECRET)]


def test_a_few_attacks_break_the_naive_servers_and_not_ours() -> None:
    done = attacked("--only", "sibling", "attach", "absolute")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| **falls**: ") == 3


def test_another_server_that_falls_is_told_apart_from_one_that_holds() -> None:
    command = f"{shlex.quote(sys.executable)} {LEARN}/naive_db_server.py {{}}"
    done = attacked("--kind", "db", "--against", command, "--only", "cte", "updated_at")
    assert done.returncode == 1
    assert "| a write behind WITH | **falls**: changes a row | holds |" in done.stdout


@pytest.mark.parametrize("command", ["no-such-command {}", f"{sys.executable} -c 0"])
def test_a_command_that_is_no_server_is_one_line_on_stderr(command: str) -> None:
    done = attacked("--kind", "fs", "--against", command, "--only", "sibling")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(command)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_every_naive_server_falls_to_every_attack_and_ours_to_none() -> None:
    done = attacked()
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("\n| ") == len(attack.ATTACKS) + 1


# --------------------------------------------------------------------------------- what the two READMEs say about them


def test_the_table_in_the_readme_is_the_one_that_is_printed() -> None:
    best = {name: attack.ATTACKS[name] for name in attack.ATTACKS if attack.ATTACKS[name].best}
    assert len(best) == 9
    assert {each.kind for each in best.values()} == set(attack.KINDS)
    columns: dict[str, attack.Verdicts] = {
        "naive": dict.fromkeys(best, (True, "")),
        "ours": dict.fromkeys(best, (False, "")),
    }
    block = re.search(r"<!-- attacks -->\n(.*?)\n<!-- /attacks -->", README, re.DOTALL)
    assert block
    assert block[1].strip() == attack.table(columns, facts=False)


def test_the_lesson_has_every_attack_and_quotes_the_naive_servers() -> None:
    headings = re.findall(r"^### (.+\))$", LESSON, re.MULTILINE)
    assert headings == [f"{each.name[0].upper()}{each.name[1:]} (`{name}`)" for name, each in attack.ATTACKS.items()]
    code = {line.strip() for path in LEARN.glob("naive_*.py") for line in path.read_text().splitlines()}
    blocks = re.findall(r"```python\n(.*?)```", LESSON, re.DOTALL)
    quoted = [line.strip() for block in blocks for line in block.split("\n")]
    assert len(quoted) > 20
    assert set(quoted) - {"", "..."} <= code


def names_in(path: Path) -> dict[str, ast.stmt]:
    """The functions, classes, methods and constants that a file defines at its top or in a class."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
            found |= {f"{node.name}.{each.name}": each for each in methods}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return found


def test_every_function_that_the_lesson_names_exists_in_the_file_it_links_to() -> None:
    links = re.findall(r"\[`([\w.]+)(?<!\.py)`\]\(\.\./([\w/]+\.py)\)", LESSON)
    assert len(links) >= len(attack.ATTACKS)
    missing = [(name, file) for name, file in links if name not in names_in(PROJECT / file)]
    assert not missing


# ----------------------------------------------------------------------------- each attack is real: a defence taken out

# In which file which function gets which first line, or which constant which value. Where there are several, each of
# these layers stops the attack alone.
WITHOUT = {
    "swap": ["common.py NO_FOLLOW 0"],
    "fifo": ["common.py TO_READ NO_FOLLOW"],
    "explosion": ["fs_server.py linear_regex return re.compile(pattern.replace('(?s)', '')).search"],
    "dotenv": ["fs_server.py Files.is_secret return False"],
    "overwrite": ["fs_write_server.py rename_new return os.rename(f'{source.path}/{name}', f'{target.path}/{new}')"],
    "cte": [
        "db_server.py authorize return sqlite3.SQLITE_OK",
        "db_server.py forbid_writing return",
        "db_server.py uri return Path(path).as_uri() + '?mode=rw'",
    ],
    "attach": ["db_server.py authorize return sqlite3.SQLITE_OK", "db_server.py limit_sizes return"],
    "runaway": ["db_server.py TIMEOUT 25.0"],
    "dots": ["api_server.py refuse_escape return"],
    "redirect": ["api_server.py require_inside return"],
    "echo": ["api_server.py Masker._mask return text"],
    "bomb": ["api_server.py MAX_BODY 10**10"],
    "drip": ["api_server.py Upstream._fetch self._seconds = 1e9"],
    "loop": ["common.py TokenBucket.acquire return 0.0"],
}


def take_out(path: Path, name: str, line: str) -> None:
    """Put a line at the beginning of a function, or another value behind a constant's."""
    found = names_in(path)[name]
    text = path.read_text().splitlines()
    if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
        first = found.body[0]
        at = first.end_lineno if ast.get_docstring(found) else first.lineno - 1
        text.insert(at or 0, " " * first.col_offset + line)
    else:
        text.insert(found.end_lineno or 0, f"{name} = {line}")
    path.write_text("\n".join(text) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT)
def test_with_its_defence_taken_out_of_ours_an_attack_gets_through(name: str, tmp_path: Path) -> None:
    for path in PROJECT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for layer in WITHOUT[name]:
        file, place, line = layer.split(maxsplit=2)
        take_out(tmp_path / file, place, line)
    kind = attack.ATTACKS[name].kind
    command = shlex.join([sys.executable, str(tmp_path / attack.SERVERS[kind]), "{}"])
    assert attack.run(kind, command, [name])[name][0] is True
