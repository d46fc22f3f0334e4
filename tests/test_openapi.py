"""describe_api: operations found by words and by endpoints, and schemas shown level by level."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, ok, refused
from mcp import Client

from api_server import build_server, load_config
from common import ConfigError
from serving import Options

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def described(tmp_path: Path, spec: Any, options: Options | None = None, **entry: Any) -> AsyncGenerator[Client]:
    """A client of a server with two APIs; "demo" has an OpenAPI file."""
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    entry = {"base_url": "http://127.0.0.1:1", "openapi": "spec.json"} | entry
    (tmp_path / "apis.json").write_text(json.dumps({"demo": entry, "plain": {"base_url": "http://127.0.0.1:1"}}))
    async with Client(build_server(load_config(tmp_path / "apis.json", {}), options)) as client:
        yield client


async def describe(client: Client, **arguments: Any) -> str:
    return await ok(client, "describe_api", **{"api": "demo"} | arguments)


def large_spec() -> dict[str, Any]:
    """600 operations, with references, cycles, and references that lead out."""
    ref = "#/components/schemas/"
    thing: dict[str, Any] = {
        "id": {"type": "integer"}, "parent": {"$ref": f"{ref}Thing"},
        "children": {"type": "array", "items": {"$ref": f"{ref}Thing"}}, "file": {"$ref": "/etc/passwd"},
        "outside": {"$ref": "http://127.0.0.1:1/evil.json#/X"}, "missing": {"$ref": f"{ref}Nope"},
        "loop": {"$ref": f"{ref}A"}, "listed": {"$ref": f"{ref}Thing/properties/either/oneOf/1"},
        "kind": {"enum": ["a", "b"]}, "either": {"oneOf": [{"type": "string"}, {"type": ["integer", "null"]}]},
        "both": {"allOf": [{"properties": {"x": {"type": "string"}}}, {"properties": {"y": {"type": "number"}}}]},
        "map": {"type": "object", "additionalProperties": {"type": "boolean"}},
    }  # fmt: skip
    answer = {"application/json": {"schema": {"$ref": f"{ref}Thing"}}}
    schemas = {"Thing": {"required": ["id"], "properties": thing}, "A": {"$ref": f"{ref}B"}, "B": {"$ref": f"{ref}A"}}
    components: dict[str, Any] = {
        "parameters": {"page": {"name": "page", "in": "query", "schema": {"type": "integer", "default": 1}}},
        "responses": {"thing": {"description": "a thing", "content": answer}},
        "schemas": schemas,
    }

    def operation(method: str, number: int) -> dict[str, Any]:
        summary = f"{method} the thing number {number} of a repository"
        more = {"description": "Long words about it. " * 30, "tags": [f"group{number % 7}"]}
        refs = {"parameters": [{"$ref": "#/components/parameters/page"}]}
        answers = {"responses": {"200": {"$ref": "#/components/responses/thing"}}}
        return {"operationId": f"{method}Thing{number}", "summary": summary} | more | refs | answers

    methods = ("get", "post", "put", "delete")
    paths = {f"/repos/{{owner}}/things{n}/{{id}}": {m: operation(m, n) for m in methods} for n in range(150)}
    return {"openapi": "3.0.3", "info": {"title": "Big", "version": "9"}, "paths": paths, "components": components}


async def test_a_search_finds_operations_in_a_few_hundred_tokens(tmp_path: Path) -> None:
    async with described(tmp_path, large_spec()) as client:
        text = await describe(client, search="GET thing number 42")
        assert text.splitlines()[0].startswith("GET /repos/{owner}/things42/{id}: get the thing number 42")
        text = await describe(client, search="repository")
        assert len(text) < 2500
        assert "15 of 600 operations shown" in text.splitlines()[-1]
        assert "no operation of 600 matches" in await describe(client, search="zebra")
        text = await describe(client, search="zebra things7")
        assert "things7/" in text.splitlines()[0]  # what holds some of the words follows
        assert "no operation has zebra: these hold some of the words" in text.splitlines()[-1]


def small_spec() -> dict[str, Any]:
    """A few of the operations that people look for in other words than the file's."""
    state = {"properties": {"title": {}, "state": {"enum": ["open", "closed"], "description": "The state."}}}
    body = {"content": {"application/json": {"schema": state}}}
    spoilt = {"422": {"description": "An attempt was made to delete the default branch."}}
    repo = "/repos/{owner}/{repo}"

    def operation(name: str, summary: str, **more: Any) -> dict[str, Any]:
        return {"operationId": name, "summary": summary, **more}

    paths: dict[str, Any] = {
        f"{repo}/issues": {"get": operation("issues/list-for-repo", "List repository issues")},
        f"{repo}/issues/{{issue_number}}": {
            "patch": operation("issues/update", "Update an issue", requestBody=body),
            "get": operation("issues/get", "Get an issue"),
        },
        f"{repo}/issues/{{issue_number}}/lock": {"put": operation("issues/lock", "Lock an issue")},
        f"{repo}/pulls": {"get": operation("pulls/list", "List pull requests", tags=["pulls"])},
        f"{repo}/pulls/{{pull_number}}/files": {"get": operation("pulls/list-files", "List pull requests files")},
        f"{repo}/git/refs/{{ref}}": {"delete": operation("git/delete-ref", "Delete a reference", responses=spoilt)},
        f"{repo}/contents/{{path}}": {
            "get": operation("repos/get-content", "Get repository content"),
            "delete": operation("repos/delete-file", "Delete a file"),
        },
        f"{repo}/{{archive}}/{{ref}}": {"get": operation("repos/archive", "Download an archive")},
    }
    for n in range(10):
        paths[f"{repo}/things{n}"] = {"delete": operation(f"delete-thing-{n}", f"Delete the thing {n}")}
        paths[f"{repo}/others{n}"] = {"get": operation(f"list-other-{n}", f"List the others {n}")}
    return {"openapi": "3.1.0", "paths": paths}


@pytest.mark.parametrize(
    ("search", "name"),
    [
        ("list open pull requests", "pulls/list"), ("close an issue", "issues/update"),
        ("delete a branch", "git/delete-ref"), ("remove file", "repos/delete-file"),
        ("listForRepo", "issues/list-for-repo"), ("update the zebra of an issue", "issues/update"),
    ],
)  # fmt: skip
async def test_a_search_in_other_words_finds_what_is_meant(tmp_path: Path, search: str, name: str) -> None:
    async with described(tmp_path, small_spec()) as client:
        assert f"({name})" in (await describe(client, search=search)).splitlines()[0]


async def test_without_arguments_the_tags_are_listed_or_the_few_operations(tmp_path: Path) -> None:
    async with described(tmp_path, large_spec()) as client:
        text = await describe(client)
        assert "Big 9: 600 operations" in text
        assert "group3 (" in text
    local = json.loads((PROJECT / "examples/local-openapi.json").read_text())
    async with described(tmp_path, local) as client:
        assert "POST /echo: Send the request back (echo) [method not allowed here]" in await describe(client)


@pytest.mark.parametrize(
    "endpoint",
    ["GET /repos/{owner}/things3/{id}", "get /repos/me/things3/77", "getThing3", "GET repos/me/things3/77?page=2"],
)
async def test_one_operation_is_shown_with_its_references_resolved(tmp_path: Path, endpoint: str) -> None:
    async with described(tmp_path, large_spec()) as client:
        text = await describe(client, endpoint=endpoint)
        for part in (
            "page (query, integer = 1)", '"id":"integer"', '"parent?":"Thing again"', '"children?":["Thing again"]',
            '"outside?":"http://127.0.0.1:1/evil.json#/X (not in this file)"',
            '"file?":"/etc/passwd (not in this file)"',
            '"missing?":"#/components/schemas/Nope (not in this file)"', '"loop?":"a reference that leads in a circle"',
            '"listed?":"integer|null"', '"kind?":"a | b"', '"either?":"string | integer|null"',
            '"both?":{"x?":"string","y?":"number"}', '"map?":{"<any name>":"boolean"}',
        ):  # fmt: skip
            assert part in text
        assert "root:" not in text


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [
        ("/repos/o/r/contents/src/a/main.py", "repos/get-content"),
        ("/repos/o/r/contents/a", "repos/get-content"),  # and not /{archive}/{ref}, which fits, too
        ("DELETE /repos/o/r/git/refs/heads/feature/x", "git/delete-ref"),
        ("/repos/o/r/zipball/main", "repos/archive"),
        ("/repos/o/r/issues/5?x=/1/2", "issues/get"),
    ],
)
async def test_a_last_parameter_may_hold_slashes(tmp_path: Path, endpoint: str, name: str) -> None:
    async with described(tmp_path, small_spec()) as client:
        assert f"({name})" in (await describe(client, endpoint=endpoint)).splitlines()[0]


async def test_all_top_fields_come_before_what_is_deeper(tmp_path: Path) -> None:
    deep: dict[str, Any] = {
        "properties": {f"d{n}": {"properties": {f"e{m}": {} for m in range(20)}} for n in range(20)}
    }
    body: dict[str, Any] = {"properties": {f"field{n}": deep if n == 3 else {"type": "string"} for n in range(15)}}
    media: dict[str, Any] = {
        "application/json": {"schema": body},
        "application/xml": {"schema": body},
        "text/csv": {"schema": {}},
    }
    spec: dict[str, Any] = {"openapi": "3.0.0", "paths": {"/a": {"post": {"requestBody": {"content": media}}}}}
    async with described(tmp_path, spec) as client:
        text = await describe(client, endpoint="/a")
        assert all(f'"field{n}?":' in text for n in range(15))
        assert '"field3?":{"d0?":"…"' in text  # of the next level all that fits, and of the third none
        assert "data application/json, application/xml: {" in text  # one schema is shown once
        assert "data text/csv: any" in text
        assert text.count("field1?") == 1
        assert "… stands for the rest]" in text


async def test_choices_and_descriptions_beside_properties_do_not_hide_them(tmp_path: Path) -> None:
    schemas: dict[str, Any] = {"T": {"properties": {"id": {"type": "integer"}}, "required": ["id"]}}
    body: dict[str, Any] = {
        "properties": {
            "described": {"allOf": [{"description": "words"}, {"$ref": "#/T"}]},
            "text": {"allOf": [{"type": "string"}]},
        },
        "anyOf": [{"required": ["described"]}, {"required": ["text"]}],
    }
    either: dict[str, Any] = {"properties": {"a": {}}, "oneOf": [{"$ref": "#/T"}, {"properties": {"b": {}}}]}
    media = {"application/json": {"schema": body}, "application/x": {"schema": either}}
    spec = {"openapi": "3.0.0", "paths": {"/a": {"post": {"requestBody": {"content": media}}}}} | schemas
    async with described(tmp_path, spec) as client:
        text = await describe(client, endpoint="/a")
        assert '{"described?":{"id":"integer"},"text?":"string"}' in text
        assert '{"a?":"any","oneOf":[{"id":"integer"},{"b?":"any"}]}' in text


async def test_offset_continues_a_cut_description(tmp_path: Path) -> None:
    endpoint = "GET /repos/{owner}/things3/{id}"
    async with described(tmp_path, large_spec()) as client:
        whole = await describe(client, endpoint=endpoint)
    async with described(tmp_path, large_spec(), Options(max_output=500)) as client:
        shown = ""
        while len(shown) < len(whole):
            text = await describe(client, endpoint=endpoint, offset=len(shown))
            assert len(text) <= 500
            body, _, last = text.rpartition("\n")
            shown += body
            assert last.endswith(f"continue with offset={len(shown)}]") or len(shown) == len(whole)
        assert shown == whole
        assert "past the end" in await refused(client, "describe_api", api="demo", endpoint=endpoint, offset=len(whole))


HOSTILE_SPECS: dict[str, Any] = {
    "nonsense everywhere": {
        "/a": {"get": {"parameters": "x", "responses": [1], "tags": 5, "requestBody": 7, "summary": {"a": 1}}},
        "/b": 5,
        "/c": {"$ref": "#/paths/~1c"},
        "/d": {"get": {"parameters": [5, {"schema": 7}], "responses": {"200": {"content": {"x/y": None}}}}},
    },
    "wide": {
        "/a": {
            "get": {"requestBody": {"content": {"j": {"schema": {"properties": {f"p{n}": {} for n in range(10**5)}}}}}}
        }
    },
    "exponential": {
        "/a": {"get": {"responses": {"200": {"content": {"j": {"schema": {"$ref": "#/paths/0"}}}}}}},
        **{str(n): {"properties": {f"p{i}": {"$ref": f"#/paths/{n + 1}"} for i in range(20)}} for n in range(30)},
    },
    "made of itself": {
        "/a": {"get": {"requestBody": {"content": {"j": {"schema": {"$ref": "#/paths/s"}}}}}},
        "s": {"allOf": [{"$ref": "#/paths/s"}, {"oneOf": [{"$ref": "#/paths/s"}] * 50}] * 2},
    },
}


@pytest.mark.parametrize("paths", HOSTILE_SPECS.values(), ids=HOSTILE_SPECS)
async def test_a_strange_file_neither_breaks_nor_floods_the_answer(tmp_path: Path, paths: Any) -> None:
    async with described(tmp_path, {"openapi": "3.0.0", "paths": paths}) as client:
        for arguments in ({}, {"search": "a"}, {"endpoint": "/a"}):
            assert len(await asyncio.wait_for(describe(client, **arguments), 5)) < 20_000


async def test_methods_that_are_not_allowed_are_marked_and_errors_say_what_to_do(tmp_path: Path) -> None:
    async with described(tmp_path, large_spec()) as client:
        text = await describe(client, endpoint="/repos/a/things3/1")
        assert text.startswith("GET ")  # the allowed one comes first
        assert text.count("[method not allowed here]") == 3
        assert "find it with search" in await refused(client, "describe_api", api="demo", endpoint="/nope")
        assert "not both" in await refused(client, "describe_api", api="demo", endpoint="/a", search="b")
        for api in ("plain", "nope"):
            assert f"no OpenAPI file for '{api}', only for demo" in await refused(client, "describe_api", api=api)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (None, "cannot read"),
        ("openapi: 3.0.0\n", "YAML"),
        ("[" * 100_000, "cannot read"),
        ('{"swagger": "2.0"}', "not an"),
    ],
)
def test_a_file_that_is_none_is_a_mistake(tmp_path: Path, file: str | None, message: str) -> None:
    (tmp_path / "apis.json").write_text('{"a": {"base_url": "http://h", "openapi": "spec.json"}}')
    if file is not None:
        (tmp_path / "spec.json").write_text(file)
    with pytest.raises(ConfigError, match=message) as caught:
        build_server(load_config(tmp_path / "apis.json", {}))
    assert "\n" not in str(caught.value)
