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


async def test_a_search_finds_operations_in_a_few_hundred_tokens_and_none_lists_tags_or_all(tmp_path: Path) -> None:
    async with described(tmp_path, large_spec()) as client:
        text = await describe(client, search="GET thing number 42")
        assert text.splitlines()[0].startswith("GET /repos/{owner}/things42/{id}: get the thing number 42")
        text = await describe(client, search="repository")
        assert len(text) < 2500
        assert "15 of 600 matching operations shown" in text.splitlines()[-1]
        assert "[0 of 0 matching operations shown" in await describe(client, search="zebra")
        text = await describe(client, search="zebra things7")
        assert "things7/" in text.splitlines()[0]  # what holds some of the words follows
        text = await describe(client)
        assert (text.startswith("Big 9; tags: group0, group1, "), len(text.splitlines())) == (True, 17)
    async with described(tmp_path, json.loads((PROJECT / "examples/local-openapi.json").read_text())) as client:
        assert "POST /echo: Send the request back (echo) [method not allowed here]" in await describe(client)


# A few of the operations that people look for in other words than the file's.
OPERATIONS: list[str] = [
    *"""
    get    /issues                          issues/list-for-repo    List repository issues
    patch  /issues/{issue_number}           issues/update           Update an issue
    get    /issues/{issue_number}           issues/get              Get an issue
    put    /issues/{issue_number}/lock      issues/lock             Lock an issue
    get    /pulls                           pulls/list              List pull requests
    get    /pulls/{pull_number}/files       pulls/list-files        List pull requests files
    delete /git/refs/{ref}                  git/delete-ref          Delete a reference
    get    /contents/{path}                 repos/get-content       Get repository content
    delete /contents/{path}                 repos/delete-file       Delete a file
    get    /{archive}/{ref}                 repos/archive           Download an archive
    """.strip().splitlines()
]
for number in range(10):
    OPERATIONS.append(f"delete /things{number} delete-thing-{number} Delete the thing {number}")
    OPERATIONS.append(f"get /others{number} list-other-{number} List the others {number}")


def small_spec() -> dict[str, Any]:
    state = {"properties": {"title": {}, "state": {"enum": ["open", "closed"], "description": "The state."}}}
    more: dict[str, dict[str, Any]] = {
        "issues/update": {"requestBody": {"content": {"application/json": {"schema": state}}}},
        "git/delete-ref": {"responses": {"422": {"description": "An attempt was made to delete the default branch."}}},
        "pulls/list": {"tags": ["pulls"]},
    }
    paths: dict[str, dict[str, Any]] = {}
    for method, path, name, summary in (line.split(maxsplit=3) for line in OPERATIONS):
        item = paths.setdefault(f"/repos/{{owner}}/{{repo}}{path}", {})
        item[method] = {"operationId": name, "summary": summary} | more.get(name, {})
    return {"openapi": "3.1.0", "paths": paths}


# What finds which operation: other words than the file's, and endpoints whose last parameter may hold slashes.
FOUND = {
    "search": [
        ("list open pull requests", "pulls/list"), ("close an issue", "issues/update"),
        ("delete a branch", "git/delete-ref"), ("remove file", "repos/delete-file"),
        ("listForRepo", "issues/list-for-repo"), ("update the zebra of an issue", "issues/update"),
    ],
    "endpoint": [
        ("/repos/o/r/contents/src/a/main.py", "repos/get-content"), ("/repos/o/r/zipball/main", "repos/archive"),
        ("/repos/o/r/contents/a", "repos/get-content"),  # and not /{archive}/{ref}, which fits, too
        ("DELETE /repos/o/r/git/refs/heads/feature/x", "git/delete-ref"), ("/repos/o/r/issues/5?x=/1/2", "issues/get"),
    ],
}  # fmt: skip


async def test_other_words_and_whole_paths_find_what_is_meant(tmp_path: Path) -> None:
    async with described(tmp_path, small_spec()) as client:
        for argument, searches in FOUND.items():
            for text, name in searches:
                assert f"({name})" in (await describe(client, **{argument: text})).splitlines()[0], text


async def test_one_operation_is_shown_with_its_references_resolved_or_an_error_says_what_to_do(tmp_path: Path) -> None:
    async with described(tmp_path, large_spec()) as client:
        names = (
            "GET /repos/{owner}/things3/{id}",
            "get /repos/me/things3/77",
            "getThing3",
            "GET repos/me/things3/77?x=2",
        )
        texts = [await describe(client, endpoint=name) for name in names]
        for part in (
            "page (query, integer = 1)", '"id":"integer"', '"parent?":"Thing again"', '"children?":["Thing again"]',
            '"outside?":"http://127.0.0.1:1/evil.json#/X (not in this file)"', '"kind?":"a | b"',
            '"file?":"/etc/passwd (not in this file)"', '"either?":"string | integer | null"',
            '"missing?":"#/components/schemas/Nope (not in this file)"', '"loop?":"any"',
            '"listed?":"integer | null"', '"both?":{"x?":"string","y?":"number"}', '"map?":{"<any name>":"boolean"}',
        ):  # fmt: skip
            assert all(part in text and "root:" not in text for text in texts)
        text = await describe(client, endpoint="/repos/a/things3/1")
        assert (text[:4], text.count("[method not allowed here]")) == ("GET ", 3)  # the allowed one comes first
        assert "find it with search" in await refused(client, "describe_api", api="demo", endpoint="/nope")
        assert "find it with search" in await refused(client, "describe_api", api="demo", endpoint="/a", search="get")
        for api in ("plain", "nope"):
            assert f"no OpenAPI file for '{api}', only for demo" in await refused(client, "describe_api", api=api)


async def test_all_top_fields_come_before_what_is_deeper(tmp_path: Path) -> None:
    fields: dict[str, Any] = {f"d{n}": {"properties": {f"e{m}": {} for m in range(20)}} for n in range(20)}
    deep: dict[str, Any] = {"properties": fields}
    body: dict[str, Any] = {"properties": {f"field{n}": deep if n == 3 else {"type": "string"} for n in range(15)}}
    media: dict[str, Any] = {kind: {"schema": body} for kind in ("application/json", "application/xml")}
    media["text/csv"] = {"schema": {}}
    # Choices and descriptions beside properties do not hide them.
    thing: dict[str, Any] = {"properties": {"id": {"type": "integer"}}, "required": ["id"]}
    words = {"allOf": [{"description": "words"}, {"$ref": "#/T"}]}
    both = {"properties": {"one": words, "text": {"allOf": [{"type": "string"}]}}, "anyOf": [{"required": ["one"]}]}
    either: dict[str, Any] = {"properties": {"a": {}}, "oneOf": [{"$ref": "#/T"}, {"properties": {"b": {}}}]}
    choices = {"application/json": {"schema": both}, "application/x": {"schema": either}}
    bodies = {"/a": media, "/b": choices}
    paths = {path: {"post": {"requestBody": {"content": content}}} for path, content in bodies.items()}
    async with described(tmp_path, {"openapi": "3.0.0", "paths": paths, "T": thing}) as client:
        text = await describe(client, endpoint="/a")
        assert all(f'"field{n}?":' in text for n in range(15))
        assert '"field3?":{"d0?":{"e0?":"any",' in text  # of the next level all, and of the third what fits
        assert '"d19?":"…"}' in text
        assert "data\n  application/json, application/xml: {" in text  # one schema is shown once
        assert all(part in text for part in ("  text/csv: any", "… stands for the rest]"))
        assert text.count("field1?") == 1
        text = await describe(client, endpoint="/b")
        assert '{"one?":{"id":"integer"},"text?":"string"}' in text
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


def body_of(schema: Any) -> dict[str, Any]:
    return {"/a": {"get": {"requestBody": {"content": {"j": {"schema": schema}}}}}}


HOSTILE_PATHS: list[dict[str, Any]] = [
    {  # nonsense everywhere
        "/a": {"get": {"parameters": "x", "responses": [1], "tags": 5, "requestBody": 7, "summary": {"a": 1}}},
        "/b": 5,
        "/c": {"$ref": "#/paths/~1c"},
        "/d": {"get": {"parameters": [5, {"schema": 7}], "responses": {"200": {"content": {"x/y": None}}}}},
    },
    body_of({"properties": {f"p{n}": {} for n in range(10**5)}}),  # wide
    body_of({"$ref": "#/paths/0"})  # exponential
    | {str(n): {"properties": {f"p{i}": {"$ref": f"#/paths/{n + 1}"} for i in range(20)}} for n in range(30)},
    body_of({"$ref": "#/paths/s"})  # made of itself
    | {"s": {"allOf": [{"$ref": "#/paths/s"}, {"oneOf": [{"$ref": "#/paths/s"}] * 50}] * 2}},
]


async def test_a_strange_file_neither_breaks_nor_floods_the_answer(tmp_path: Path) -> None:
    for paths in HOSTILE_PATHS:
        async with described(tmp_path, {"openapi": "3.0.0", "paths": paths}) as client:
            for arguments in ({}, {"search": "a"}, {"endpoint": "/a"}):
                assert len(await asyncio.wait_for(describe(client, **arguments), 5)) <= 40_000


def test_a_file_that_is_none_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "apis.json").write_text('{"a": {"base_url": "http://h", "openapi": "spec.json"}}')
    files = {"openapi: 3.0.0\n": "YAML", "[" * 100_000: "cannot read", '{"swagger": "2.0"}': "not an"}
    for file, message in {None: "cannot read", **files}.items():
        if file is not None:
            (tmp_path / "spec.json").write_text(file)
        with pytest.raises(ConfigError, match=message) as caught:
            build_server(load_config(tmp_path / "apis.json", {}))
        assert "\n" not in str(caught.value)
