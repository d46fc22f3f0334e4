"""describe_api: looks operations up in the OpenAPI file of an API. Imported by api_server.py if its file names one.

The model gets one of three texts: the operations that fit some words, all that one operation takes and gives, or what
the file is about. The file is its owner's, but may be broken: what is missing there is missing here, no more, and
nothing outside it is ever read.
"""

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, cast
from urllib.parse import unquote

from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

from common import ConfigError, trailer
from serving import READ_ONLY, Server

MAX_MATCHES = 15  # operations in one search result: a few hundred tokens
MAX_TEXT = 6_000  # characters of one operation that a search looks through
SCHEMA_DEPTH, SCHEMA_FIELDS = 6, 250  # of one schema: levels of objects in objects, and fields in all
MAX_VALUES = 20  # of an enum that are shown

# What people say for an operation that sends such a method.
VERBS = {
    "GET": "get list show find read fetch search see view look download",
    "PUT": "put set add update change edit replace",
    "PATCH": "patch update change edit modify set rename close reopen",
    "POST": "post create add new make send start open comment buy",
    "DELETE": "delete remove drop cancel",
}
METHODS = (*VERBS, "HEAD", "OPTIONS")
FILLERS = frozenset("a an the of to for in on at by with from all my me is and or i".split())


# --------------------------------------------------------------------------------------------------------- the tool


def add_describe_api(
    server: Server, files: Mapping[str, tuple[Path, Sequence[str]]], show: Callable[[str, int], str]
) -> None:
    """Register the tool. `files` has the OpenAPI file of each API that has one, and the methods that call_api may send;
    `show` makes a page of a text from an offset on. Raises ConfigError."""
    specs = {name: OpenApi(path, methods) for name, (path, methods) in files.items()}

    @server.tool(annotations=READ_ONLY, structured_output=False)
    async def describe_api(
        api: Annotated[str, Field(description="name from list_apis", max_length=64)],
        search: Annotated[str, Field(description="words, such as: list issues", max_length=200)] = "",
        endpoint: Annotated[str, Field(description="GET /users/{id}, or an operation's name", max_length=2_000)] = "",
        offset: Annotated[int, Field(description="first character shown", ge=0, strict=True)] = 0,
    ) -> str:
        """Look an API up in its OpenAPI file: with search, the operations that fit best; with endpoint, that
        operation's parameters, request body and answers (? marks optional fields); with neither, the file's tags. A cut
        text continues with offset."""
        if api not in specs:
            raise ToolError(f"no OpenAPI file for {api!r}, only for {', '.join(specs)}; list_apis has what is known")
        if search and endpoint:
            raise ToolError("give search or endpoint, not both")
        # In a thread: the first search in a file of 13 MB takes half a second.
        return show(await asyncio.to_thread(specs[api].answer, search.strip(), endpoint), offset)


# ---------------------------------------------------------------------------------------------------------- the file


def as_object(value: Any) -> dict[str, Any]:
    """The value if it is an object, else an empty one: a broken file must not break the server."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return cast("list[Any]", value) if isinstance(value, list) else []


def clip(value: Any, limit: int) -> str:
    """The value's text on one line, with … where it was cut; nothing for nothing."""
    return shorten(str(value or ""), limit, placeholder="…")


def words_of(*texts: Any) -> str:
    """The different words of the texts in lower case, each behind a blank: listUsers and list-users are two each."""
    joined = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", " ".join(str(text or "") for text in texts)).lower()
    return "".join(f" {word}" for word in dict.fromkeys(re.findall("[a-z0-9]+", joined)) if word not in FILLERS)


def literal(path: str) -> str:
    """A path without its parameters."""
    return re.sub(r"\{[^}]*\}", "", path)


class OpenApi:
    """An OpenAPI 3.x file in JSON, read once; `methods` are those that call_api may send. Raises ConfigError."""

    def __init__(self, path: Path, methods: Sequence[str]) -> None:
        try:
            self._spec = as_object(json.loads(path.read_bytes()))
        except (OSError, ValueError, RecursionError) as exc:
            raise ConfigError(f"openapi: cannot read {path} as JSON (YAML must be converted first): {exc}") from None
        paths = as_object(self._spec.get("paths"))
        if not str(self._spec.get("openapi", "")).startswith("3.") or not paths:
            raise ConfigError(f"openapi: {path} is not an OpenAPI 3.x file with paths")
        self._allowed = methods
        self.operations: list[dict[str, Any]] = []  # as they stand there, each with its method, path and all parameters
        for template, item in ((template, self.resolve(item)) for template, item in paths.items()):
            for method in METHODS:
                if spec := as_object(item.get(method.lower())):
                    parameters = [*as_list(item.get("parameters")), *as_list(spec.get("parameters"))]
                    self.operations.append(spec | {"method": method, "path": template, "parameters": parameters})

    def resolve(self, value: Any) -> dict[str, Any]:
        """The object that is meant, its `$ref` followed within this file (RFC 6901); one that leads out of the file is
        named, never fetched."""
        for _ in range(20):  # a reference may lead to a reference, but not for ever
            ref = as_object(value).get("$ref")
            if not isinstance(ref, str):
                return as_object(value)
            value = self._spec if ref.startswith("#/") else None
            for part in map(unquote, ref[2:].split("/")):
                inside = as_object(value) or {str(number): item for number, item in enumerate(as_list(value))}
                value = inside.get(part.replace("~1", "/").replace("~0", "~"))
            if value is None:
                return {"type": f"{ref[:100]} (not in this file)"}
        return {"type": "a reference that leads in a circle"}

    def _line(self, one: Mapping[str, Any]) -> str:
        summary = clip(one.get("summary") or one.get("description"), 100)
        name = f" ({one['operationId']})" if "operationId" in one else ""
        mark = "" if one["method"] in self._allowed else " [method not allowed here]"
        return f"{one['method']} {one['path']}{': ' if summary else ''}{summary}{name}{mark}"

    def answer(self, search: str, endpoint: str) -> str:
        """What describe_api returns. Raises ToolError."""
        return self._describe(endpoint) if endpoint else self._search(search) if search else self._overview()

    def _overview(self) -> str:
        info = as_object(self._spec.get("info"))
        lines = [f"{info.get('title', 'API')} {info.get('version', '')}: {len(self.operations)} operations"]
        if len(self.operations) > MAX_MATCHES:
            tags = Counter(str(tag) for one in self.operations for tag in as_list(one.get("tags")))
            shown = ", ".join(f"{tag} ({count})" for tag, count in tags.most_common(60))
            lines.append(f"tags: {shown}{' …' * (len(tags) > 60)}")
        else:
            lines += map(self._line, self.operations)
        return "\n".join([*lines, trailer("give search, or endpoint")])

    # ------------------------------------------------------------------------------------------------------- search

    @cached_property
    def _texts(self) -> list[tuple[str, str, str]]:
        """For each operation the words that name it (what is done to what), those that only explain it, and its verbs.

        What an operation is good for often stands in its fields and answers only: an issue is closed by an update whose
        field "state" is "open or closed".
        """
        found: list[tuple[str, str, str]] = []
        for one in self.operations:
            name, thing = one.get("operationId", ""), literal(one["path"])
            names = words_of(one.get("summary"), *(str(text).strip("/").rpartition("/")[2] for text in (name, thing)))
            everything = json.dumps([one, self.resolve(one.get("requestBody"))])[:MAX_TEXT]
            found.append((names, words_of(one["path"], everything), words_of(VERBS.get(one["method"]))))
        return found

    @staticmethod
    def _fit(word: str, names: str, text: str, verbs: str) -> float:
        stem = " " + re.sub(r"(?<=[^s]{3})s$", "", word)  # "users" is in no /user/{id}
        # Words count most in a name that says little else, and in a short explanation more than in a long one.
        in_name = 1 + 3 / (1 + names.count(" ")) if stem in names else 0.0
        in_text = 0.2 + 100 / (100 + text.count(" ")) if stem in text else 0.0
        return (in_name or in_text) + (f" {word}" in verbs)

    def _search(self, query: str) -> str:
        """The operations that fit the words best. A word weighs more the fewer have it."""
        scores, missing = [0.0] * len(self.operations), list[str]()
        for word in words_of(query).split()[:10]:
            hits = [self._fit(word, *texts) for texts in self._texts]
            missing += [] if any(hits) else [word]
            weight = math.log(1 + len(hits) / (1 + sum(map(bool, hits))))
            scores = [score + weight * hit for score, hit in zip(scores, hits, strict=True)]
        ranked = sorted(zip(scores, self.operations, strict=True), key=lambda pair: (-pair[0], pair[1]["path"]))
        best = [self._line(one) for score, one in ranked if score]
        if not best:
            return trailer(f"no operation of {len(scores)} matches {query!r}")
        facts = [f"no operation has {clip(', '.join(missing), 100)}: these hold some of the words"] if missing else []
        if len(best) > MAX_MATCHES:
            facts.append(f"{MAX_MATCHES} of {len(best)} operations shown; add words to narrow the search")
        return "\n".join([*best[:MAX_MATCHES], trailer(*facts, 'endpoint="METHOD /path" shows one in full')])

    # ------------------------------------------------------------------------------------------------ one operation

    def _describe(self, endpoint: str) -> str:
        """Parameters and schemas of the operations at `endpoint`: [METHOD] /path (concrete, too) or an operationId."""
        method, _, path = endpoint.strip().rpartition(" ")
        path = path.partition("?")[0].strip("/")
        candidates = [one for one in self.operations if method.upper() in ("", one["method"])]
        found = [one for one in candidates if path in (one["path"].strip("/"), one.get("operationId"))]
        # Then a concrete path, such as /users/42. The last parameter may hold slashes, as in /contents/src/main.py.
        for last in ("[^/]+", ".+"):
            found = found or [one for one in candidates if self._fits(one["path"], path, last)]
        if not found:
            raise ToolError(f"no operation at {endpoint[:200]!r}; find it with search")
        most = max(len(literal(one["path"])) for one in found)
        found = [one for one in found if len(literal(one["path"])) == most]
        found.sort(key=lambda one: one["method"] not in self._allowed)
        text = "\n\n".join("\n".join(filter(None, self._details(one))) for one in found)
        cut = f"schemas are shown {SCHEMA_DEPTH} levels deep and {SCHEMA_FIELDS} fields at most; … stands for the rest"
        return f"{text}\n{trailer(cut)}" if '"…"' in text else text

    @staticmethod
    def _fits(template: str, path: str, last: str) -> bool:
        *heads, tail = [re.escape(part) for part in re.split(r"\{[^}]*\}", template.strip("/"))]
        return re.fullmatch("[^/]+".join(heads) + (last if heads else "") + tail, path) is not None

    def _details(self, one: Mapping[str, Any]) -> Iterator[str]:
        yield self._line(one)
        yield clip(one.get("description"), 600)
        for parameter in map(self.resolve, one["parameters"]):
            place = str(parameter.get("in", "?"))
            facts = [place, self._shape(parameter.get("schema", True)).strip('"')]
            facts += ["required"] if parameter.get("required") else []
            facts += ["set by the server's configuration only"] if place in ("header", "cookie") else []
            text = clip(parameter.get("description"), 200)
            yield f"  {parameter.get('name', '?')} ({', '.join(facts)}){': ' if text else ''}{text}"
        body = self.resolve(one.get("requestBody"))
        for types, shape in self._bodies(body):
            yield f"data {types}{' (required)' if body.get('required') else ''}: {shape}"
        for status, given in as_object(one.get("responses")).items():
            answer = self.resolve(given)
            shapes = [] if status[:1] in ("4", "5") else [f" {types} {shape}" for types, shape in self._bodies(answer)]
            yield f"{status}: {clip(answer.get('description'), 100)}{''.join(shapes)}"

    def _bodies(self, message: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Media types and shape of each different schema of a request or an answer: a shared one comes once."""
        types: dict[str, list[str]] = {}
        for content_type, media in as_object(message.get("content")).items():
            types.setdefault(self._shape(as_object(media).get("schema", True)), []).append(content_type)
        return [(", ".join(names), shape.strip('"')) for shape, names in types.items()]

    def _shape(self, schema: Any) -> str:
        """A short example of what fits a schema: {"id":"integer","name?":"string"}; ? marks what is optional, … what is
        left out. As many whole levels as SCHEMA_FIELDS allow: no field is lost to what is deeper in another."""
        shown = ""
        for levels in range(1, SCHEMA_DEPTH + 1):
            left = iter(range(SCHEMA_FIELDS))
            deeper = self._example(schema, levels, left)
            if shown and next(left, None) is None:
                break
            shown = deeper
        return shown

    def _example(self, schema: Any, levels: int, left: Iterator[int], seen: frozenset[str] = frozenset()) -> str:
        """The same of a schema that may be broken, or contain itself, with so many levels of objects in objects, and
        one field for each item of `left`."""
        ref = str(as_object(schema).get("$ref", ""))
        if ref and ref in seen:
            return json.dumps(f"{ref.rpartition('/')[2]} again")
        seen, schema = seen | {ref}, self._merged(schema)
        properties, required = as_object(schema.get("properties")), as_list(schema.get("required"))
        if next(left, None) is None or (properties and not levels):
            return '"…"'
        parts: list[str] = []
        for name in islice(properties, SCHEMA_FIELDS):
            shown = json.dumps(name if name in required else f"{name}?", ensure_ascii=False)
            parts.append(f"{shown}:{self._example(properties[name], levels - 1, left, seen)}")
        for key in ("oneOf", "anyOf"):
            choices = as_list(schema.get(key))
            shapes = list(dict.fromkeys(self._example(choice, levels, left, seen) for choice in choices))
            if any(shape[0] != '"' for shape in shapes):
                parts.append(f'"{key}":[{",".join(shapes)}]')
            elif shapes and not parts:  # beside fields they say no more than which of them are required together
                return '"' + " | ".join(shape[1:-1] for shape in shapes) + '"'
        if as_object(schema.get("additionalProperties")):
            parts.append(f'"<any name>":{self._example(schema["additionalProperties"], levels, left, seen)}')
        if parts:
            return "{" + ",".join(parts) + "}"
        return f"[{self._example(schema['items'], levels, left, seen)}]" if "items" in schema else self._scalar(schema)

    @staticmethod
    def _scalar(schema: Mapping[str, Any]) -> str:
        kind, values = schema.get("type", "any"), as_list(schema.get("enum")) or [schema.get("const")]
        text = "|".join(map(str, as_list(kind) or [kind])) + f" ({schema.get('format')})" * ("format" in schema)
        if values != [None]:
            text = " | ".join([str(value)[:40] for value in values[:MAX_VALUES]] + ["…"] * (len(values) > MAX_VALUES))
        return json.dumps(text + f" = {str(schema.get('default'))[:40]}" * ("default" in schema), ensure_ascii=False)

    def _merged(self, schema: Any, depth: int = 10) -> dict[str, Any]:
        """The schema together with those that it is made of (`allOf`), which may be made of others."""
        schema = self.resolve(schema)
        for part in as_list(schema.get("allOf")) if depth else []:
            other = self._merged(part, depth - 1)
            properties = as_object(schema.get("properties")) | as_object(other.get("properties"))
            required = as_list(other.get("required")) + as_list(schema.get("required"))
            schema = other | schema | {"properties": properties, "required": required}
        return schema
