"""describe_api: looks operations up in the OpenAPI file of an API. Imported by api_server.py if its file names one.

The model gets the operations that fit some words best, or all that one operation takes and gives. The file is its
owner's, but may be broken: what is missing there is missing here, no more. Nothing outside it is ever read.
"""

import asyncio
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast
from urllib.parse import unquote

from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

from common import ConfigError, trailer
from serving import READ_ONLY, Server

MAX_MATCHES = 15  # operations in one search result: a few hundred tokens
MAX_FIELDS, MAX_DEPTH = 250, 8  # of one schema: once so many are listed, or so deep, no further object is opened
PARAMETER = re.compile(r"\{[^}]*\}")  # in a path

# What people say for an operation that sends such a method.
VERBS = {
    "GET": "get list show find read fetch search see view look download",
    "PUT": "put set add update change edit replace",
    "PATCH": "patch update change edit modify set rename close reopen",
    "POST": "post create add new make send start open comment buy",
    "DELETE": "delete remove drop cancel",
}
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
        """Look an API up in its OpenAPI file: with search, the operations that fit best; or with endpoint, that
        operation's parameters, request body and answers (? marks optional fields); with neither, the file's tags. A cut
        text continues with offset."""
        if api not in specs:
            raise ToolError(f"no OpenAPI file for {api!r}, only for {', '.join(specs)}; list_apis has what is known")
        find = specs[api].describe if endpoint else specs[api].search
        # In a thread: a search in a file of 1,200 operations takes some hundredths of a second.
        return show(await asyncio.to_thread(find, endpoint or search), offset)


# ------------------------------------------------------------------------------- values of a file that may be broken


def as_object(value: Any) -> dict[str, Any]:
    """The value if it is an object, else an empty one."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return cast("list[Any]", value) if isinstance(value, list) else []


def clip(value: Any, limit: int) -> str:
    """The value's text on one line, with … where it was cut; nothing for nothing."""
    text = " ".join(str(value or "").split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def words_of(*texts: Any) -> str:
    """The different words of the texts in lower case, each behind a blank: listUsers and list-users are two each."""
    joined = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", " ".join(str(text or "") for text in texts)).lower()
    return "".join(f" {word}" for word in dict.fromkeys(re.findall(r"[^\W_]+", joined)) if word not in FILLERS)


# ---------------------------------------------------------------------------------------------------------- the file


class OpenApi:
    """An OpenAPI 3.x file in JSON, read once; `methods` are those that call_api may send. Raises ConfigError."""

    def __init__(self, path: Path, methods: Sequence[str]) -> None:
        try:
            self._spec = as_object(json.loads(path.read_bytes()))
        except (OSError, ValueError, RecursionError) as exc:
            raise ConfigError(f"openapi: cannot read {path} as JSON (YAML must be converted first): {exc}") from None
        paths = as_object(self._spec.get("paths"))
        if not str(self._spec.get("openapi")).startswith("3.") or not paths:
            raise ConfigError(f"openapi: {path} is not an OpenAPI 3.x file with paths")
        self._allowed = methods
        self._operations: list[dict[str, Any]] = []  # as they stand there, each with its method, path, all parameters
        for template, item in zip(paths, map(self._resolve, paths.values()), strict=True):
            for method in (*VERBS, "HEAD", "OPTIONS"):
                if spec := as_object(item.get(method.lower())):
                    parameters = [*as_list(item.get("parameters")), *as_list(spec.get("parameters"))]
                    self._operations.append(spec | {"method": method, "path": template, "parameters": parameters})
        self._texts = [weighted_texts(one) for one in self._operations]

    def _resolve(self, value: Any, left: int = 20) -> dict[str, Any]:
        """The object that is meant, its `$ref` followed within this file (RFC 6901). One that leads out of the file is
        named, never fetched: the file must not make the server read other files, or call other hosts."""
        ref = as_object(value).get("$ref")
        if not isinstance(ref, str) or not left:  # a reference may lead to a reference, but not in a circle for ever
            return as_object(value)
        value = {"#": self._spec}
        for part in unquote(ref).split("/"):
            inside = as_object(value) or {str(number): item for number, item in enumerate(as_list(value))}
            value = inside.get(part.replace("~1", "/").replace("~0", "~"), {"type": f"{ref[:100]} (not in this file)"})
        return self._resolve(value, left - 1)

    def _line(self, one: Mapping[str, Any]) -> str:
        line = f"{one['method']} {one['path']}: {clip(one.get('summary') or one.get('description'), 100)}"
        name = f" ({one['operationId']})" if "operationId" in one else ""
        return line.rstrip(": ") + name + ("" if one["method"] in self._allowed else " [method not allowed here]")

    # ------------------------------------------------------------------------------------------------------- search

    def search(self, query: str, /) -> str:
        """The operations that fit the words best, or at least some of them. Without words: all, and the tags of the
        file, which are good words to search for."""
        words, scores = words_of(query).split(), [0.0] * len(self._operations)
        for word in [*words, *(word.rstrip("s") for word in words)]:  # "users" is in no /user/{id}
            hits = [sum(weight for text, weight in texts if f" {word}" in text) for texts in self._texts]
            # A word counts more the fewer operations have it, as in every search engine (inverse document frequency).
            rarity = math.log(1 + len(hits) / (1 + sum(map(bool, hits))))
            scores = [score + rarity * hit for score, hit in zip(scores, hits, strict=True)]
        ranked = sorted(zip(scores, self._operations, strict=True), key=lambda pair: (-pair[0], pair[1]["path"]))
        best = [self._line(one) for score, one in ranked if score or not words]
        count = f"{len(best[:MAX_MATCHES])} of {len(best)} matching operations shown, best first"
        info = as_object(self._spec.get("info"))
        tags = ", ".join(dict.fromkeys(str(tag) for one in self._operations for tag in as_list(one.get("tags"))))
        about = [] if words else [f"{info.get('title')} {info.get('version')}; tags: {clip(tags, 2_000)}"]
        return "\n".join([*about, *best[:MAX_MATCHES], trailer(count, 'give other words, or endpoint="METHOD /path"')])

    # ------------------------------------------------------------------------------------------------ one operation

    def describe(self, endpoint: str, /) -> str:
        """Parameters and schemas of the operations at `endpoint`: [METHOD] /path (concrete, too) or an operationId."""
        method, _, path = endpoint.strip().rpartition(" ")
        path = path.partition("?")[0].strip("/")
        candidates = [one for one in self._operations if method.upper() in ("", one["method"])]
        found = [one for one in candidates if one.get("operationId") == path]
        found = found or [one for one in candidates if re.fullmatch(pattern_of(one["path"]), path)]
        if not found:
            raise ToolError(f"no operation at {endpoint[:200]!r}; find it with search")
        # /users/me fits /users/{id}, too: the path that has most letters of its own is meant.
        best = max((one["path"] for one in found), key=lambda template: len(PARAMETER.sub("", template)))
        text = "\n\n".join("\n".join(self._details(one)) for one in found if one["path"] == best)
        cut = f"no object is opened after {MAX_FIELDS} fields or below {MAX_DEPTH} levels; … stands for the rest"
        return f"{text}\n{trailer(cut)}" if '…"' in text else text

    def _details(self, one: Mapping[str, Any]) -> Iterator[str]:
        yield f"{self._line(one)}\n{clip(one.get('description'), 600)}".rstrip()
        for given in map(self._resolve, one["parameters"]):
            facts = [str(given.get("in")), self._example(given.get("schema"))]
            facts += ["required"] if given.get("required") else []
            facts += ["set by the server's configuration only"] if facts[0] in ("header", "cookie") else []
            yield f"  {given.get('name')} ({', '.join(facts)}): {clip(given.get('description'), 200)}".rstrip(": ")
        body = {"data": one["requestBody"]} if "requestBody" in one else {}  # as call_api's argument is called
        for title, message in {**body, **as_object(one.get("responses"))}.items():
            message, kinds = self._resolve(message), dict[str, list[str]]()
            for kind, media in as_object(message.get("content")).items():  # a schema that kinds share is shown once
                kinds.setdefault(self._example(as_object(media).get("schema")), []).append(kind)
            need = " (required)" if message.get("required") else ""
            yield f"{title}{need}: {clip(message.get('description'), 200)}".rstrip(": ")
            # Errors (400 to 599) look alike in most APIs: their description is enough.
            yield from (f"  {', '.join(names)}: {shown}" for shown, names in kinds.items() if title[:1] not in "45")

    # ------------------------------------------------------------------------------------------------------- schemas

    def _example(self, schema: Any) -> str:
        """A short example of what fits a schema: {"id":"integer","name?":"string"}; ? marks what is optional, … what is
        left out. Breadth first, so that no field is lost to what is deeper in another."""
        top = [schema]
        # Where a schema stands that its example is to replace, and the references that led there. It grows on the way.
        queue: list[tuple[Any, Any, tuple[str, ...]]] = [(top, 0, ())]
        for place, key, above in queue:
            ref = str(as_object(place[key]).get("$ref", ""))
            inside = f"{ref.rpartition('/')[2]} again" if ref and ref in above else self._inside(place[key])
            if not isinstance(inside, str) and (len(queue) > MAX_FIELDS or len(above) > MAX_DEPTH):
                inside = "…"
            place[key] = inside
            if not isinstance(inside, str):
                names = inside if isinstance(inside, dict) else range(len(inside))
                queue += [(inside, name, (*above, ref)) for name in names]
        text = json.dumps(top[0], ensure_ascii=False, separators=(",", ":"))
        # A choice between plain values needs no list: "string | integer".
        text = re.sub(r'\{"oneOf":\[("[^\[\]{}]*")\]\}', lambda found: found[1].replace('","', " | "), text)
        return text.strip('"')

    def _inside(self, schema: Any) -> dict[str, Any] | list[Any] | str:
        """The schemas in a schema, as they stand there: of its fields by their names, or of its items. If there are
        none, its type in words."""
        parts, required = [self._resolve(schema)], list[Any]()
        merged, properties = dict[str, Any](), dict[str, Any]()
        for part in parts:  # what it is made of (allOf) may be made of others; a broken file makes one of itself
            parts += map(self._resolve, as_list(part.get("allOf"))[: MAX_FIELDS - len(parts)])
            properties |= as_object(part.get("properties"))
            required += as_list(part.get("required"))
            merged = part | merged
        fields = {name if name in required else f"{name}?": field for name, field in properties.items()}
        choices = as_list(merged.get("oneOf")) or as_list(merged.get("anyOf"))
        # Some only say which of the fields are required together.
        if any(self._resolve(choice).keys() - {"required"} for choice in choices):
            fields["oneOf"] = {"prefixItems": choices}  # which is shown as a list
        if as_object(merged.get("additionalProperties")):
            fields["<any name>"] = merged["additionalProperties"]
        items = [item for item in (*as_list(merged.get("prefixItems")), merged.get("items")) if item]
        return fields or items or scalar(merged)


# ------------------------------------------------------------------------------------- what needs nothing of the file


def weighted_texts(one: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The words that name an operation, those for its method, and all others, each with the weight of one word in it:
    it counts more in a short text than in a long one.

    What an operation is good for often stands in its fields and answers only: an issue is closed by an update whose
    field "state" is "open or closed".
    """
    name = words_of(one.get("summary"), str(one.get("operationId", "")).rpartition("/")[2])
    texts = name, words_of(VERBS.get(one["method"])), words_of(one)
    return [(text, 1 / math.log(2 + text.count(" "))) for text in texts]


def pattern_of(template: str) -> str:
    """What fits a path with parameters. The last of them may hold slashes, as in /contents/src/main.py."""
    *heads, tail = map(re.escape, PARAMETER.split(template.strip("/")))
    return "[^/]+".join(heads) + (".+" if heads else "") + tail


def scalar(schema: Mapping[str, Any]) -> str:
    """The values or the type of a schema that has no other in it: open | closed, integer = 1, string (date-time)."""
    kind = schema.get("type", "any")
    values = as_list(schema.get("enum")) or as_list(kind) or [schema.get("const", kind)]
    text = clip(" | ".join(map(str, values)), 400)
    text += f" ({schema['format']})" if "format" in schema else ""
    return text + (f" = {clip(str(schema['default']), 40)}" if "default" in schema else "")
