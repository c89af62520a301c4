"""The OpenAPI description of the local API, and its readable form as a page.

Its job is to say what the router holds, nothing by hand: a route that is mounted is described, and only those. It
leaves checking requests against the description to nobody: both come from the same types.
"""

import html
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import msgspec

from meshnode.api.render import ErrorAnswer
from meshnode.api.routing import ByteStream, Content, Route, Router
from meshnode.api.sse import EventStream
from meshnode.kernel.errors import ErrorCode, http_status

_REF: Final = "#/components/schemas/{name}"
_ALWAYS: Final = (ErrorCode.BAD_REQUEST, ErrorCode.UNAUTHORIZED, ErrorCode.FORBIDDEN, ErrorCode.MISDIRECTED)
_SHARED_QUERY: Final[tuple[tuple[str, dict[str, object], str], ...]] = (
    ("limit", {"type": "integer", "minimum": 1, "maximum": 1000}, "How many items at most."),
    ("cursor", {"type": "string"}, "Where the page before ended, from its Link header with rel=next."),
)


def describe(router: Router, version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of every route of `router`."""
    types: dict[int, Any] = {id(ErrorAnswer): ErrorAnswer}
    for route in router.routes:
        for described in (route.request, route.response, *route.events.values()):
            if described not in (None, EventStream, Content, ByteStream):
                types[id(described)] = described
    listed = list(types.values())
    schemas, components = msgspec.json.schema_components(listed, ref_template=_REF)
    schema_of = dict(zip(map(id, listed), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in router.routes:
        path = route.path.replace("...}", "}")
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "meshnode local API",
            "version": version,
            "description": "The API of one agent, on this machine only. Answers are the same from every member.",
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}],
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": dict(sorted(components.items())),
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "The token that `meshnode token` prints. On Linux the agent's own user needs none.",
                }
            },
        },
    }


def _operation(route: Route, schema_of: Mapping[int, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _operation_id(route),
        "summary": route.summary,
        "tags": [route.tag],
        "responses": _responses(route, schema_of),
    }
    if parameters := _parameters(route):
        operation["parameters"] = parameters
    if route.request is not None:
        schema = schema_of[id(route.request)]
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    elif route.raw_body:
        media = {"schema": {"type": "string", "format": "binary"}}
        operation["requestBody"] = {"required": True, "content": {"application/octet-stream": media}}
    if route.public:
        operation["security"] = []
    return operation


def _operation_id(route: Route) -> str:
    words = route.path.replace("{", "by_").replace("}", "").replace("...", "").replace("-", "_").replace(".", "_")
    return "_".join([route.method.lower(), *(word for word in words.split("/") if word)])


def _parameters(route: Route) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in route.param_names
    ]
    if route.query is not None:
        for field in msgspec.structs.fields(route.query):
            parameters.append(
                {
                    "name": field.encode_name,
                    "in": "query",
                    "required": field.required,
                    "schema": msgspec.json.schema(field.type),
                }
            )
    if route.paginated:
        parameters += [
            {"name": name, "in": "query", "required": False, "schema": schema, "description": text}
            for name, schema, text in _SHARED_QUERY
        ]
    if route.mesh_wide:
        parameters.append(
            {
                "name": "scope",
                "in": "query",
                "required": False,
                "schema": {"enum": ["mesh", "local"], "default": "mesh"},
                "description": "`local` answers for this node alone.",
            }
        )
    return parameters


def _responses(route: Route, schema_of: Mapping[int, Any]) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    if route.streams:
        events = {name: schema_of[id(kind)] for name, kind in route.events.items()}
        media = {"schema": {"type": "string"}, **({"x-events": events} if events else {})}
        responses["200"] = {"description": "A stream of events.", "content": {"text/event-stream": media}}
    elif route.media:
        types = {kind: "object" if kind == "application/json" else "string" for kind in route.media}
        contents = {kind: {"schema": {"type": name}} for kind, name in types.items()}
        responses[str(route.status)] = {"description": HTTPStatus(route.status).phrase, "content": contents}
    elif route.response in (Content, ByteStream):
        media = {"schema": {"type": "string", "format": "binary"}}
        responses[str(route.status)] = {"description": "The content.", "content": {"application/octet-stream": media}}
    elif route.response is None:
        status = 204 if route.status == 200 and route.asgi is None else route.status
        responses[str(status)] = {"description": HTTPStatus(status).phrase}
    else:
        media = {"schema": schema_of[id(route.response)]}
        responses[str(route.status)] = {
            "description": HTTPStatus(route.status).phrase,
            "content": {"application/json": media},
        }
    if route.also_status is not None:
        described = HTTPStatus(route.also_status).phrase
        responses[str(route.also_status)] = {**responses[str(route.status)], "description": described}
    codes: dict[int, list[str]] = {}
    for code in (*_ALWAYS, *route.errors):
        codes.setdefault(http_status(code), []).append(code.value)
    error = {"application/json": {"schema": schema_of[id(ErrorAnswer)]}}
    for status, names in sorted(codes.items()):
        described = ", ".join(f"`{name}`" for name in dict.fromkeys(names))
        responses.setdefault(str(status), {"description": f"An error: {described}.", "content": error})
    return responses


def as_page(document: Mapping[str, Any]) -> str:
    """The description as one HTML page that needs no script."""
    info = document["info"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{html.escape(info['title'])}</title><link rel=stylesheet href=/docs.css>",
        f"<h1>{html.escape(info['title'])} {html.escape(info['version'])}</h1><p>{html.escape(info['description'])}",
        "<p>For programs: <a href=/openapi.json>/openapi.json</a>.<nav><ul>",
    ]
    operations = [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    for method, path, operation in operations:
        anchor, line = html.escape(operation["operationId"]), html.escape(f"{method.upper()} {path}")
        parts.append(f"<li><a href='#{anchor}'><code>{line}</code></a> {html.escape(operation['summary'])}")
    parts.append("</ul></nav><main>")
    for method, path, operation in operations:
        parts.append(_operation_html(method, path, operation))
    parts.append("<h2 id=types>Types</h2>")
    for name, schema in document["components"]["schemas"].items():
        parts.append(f"<section><h3 id='{html.escape(name)}'>{html.escape(name)}</h3>{_schema_html(schema)}</section>")
    parts.append("</main></html>")
    return "\n".join(parts)


def _operation_html(method: str, path: str, operation: Mapping[str, Any]) -> str:
    anchor, title = html.escape(operation["operationId"]), html.escape(f"{method.upper()} {path}")
    lines = [
        f"<section><h2 id='{anchor}'><code>{title}</code></h2>",
        f"<p>{html.escape(operation['summary'])}",
    ]
    if operation.get("security") == []:
        lines.append(" <em>Needs no credentials.</em>")
    if parameters := operation.get("parameters"):
        lines.append("<table><tr><th>parameter<th>in<th>required<th>meaning")
        for parameter in parameters:
            shown = (parameter["name"], parameter["in"], "yes" if parameter["required"] else "no")
            cells = "".join(f"<td>{html.escape(cell)}" for cell in shown)
            lines.append(f"<tr>{cells}<td>{html.escape(parameter.get('description', ''))}")
        lines.append("</table>")
    if body := operation.get("requestBody"):
        for media, described in body["content"].items():
            lines.append(f"<p>Body, {html.escape(media)}: {_kind(described['schema'])}")
    lines.append("<table><tr><th>status<th>answer")
    for status, answer in operation["responses"].items():
        kinds = ", ".join(_kind(described["schema"]) for described in answer.get("content", {}).values())
        text = html.escape(answer["description"]).replace("`", "")
        lines.append(f"<tr><td>{status}<td>{text} {kinds}")
    lines.append("</table></section>")
    return "\n".join(lines)


def _schema_html(schema: Mapping[str, Any]) -> str:
    text = f"<p>{html.escape(str(schema.get('description', '')))}"
    rows = []
    required = set(schema.get("required", ()))
    for name, field in schema.get("properties", {}).items():
        needed = "yes" if name in required else "no"
        rows.append(f"<tr><td>{html.escape(name)}<td>{_kind(field)}<td>{needed}")
    return text + ("<table><tr><th>field<th>type<th>required" + "".join(rows) + "</table>" if rows else "")


def _kind(schema: Mapping[str, Any]) -> str:
    """A schema in a few words, linked where it is one of the types."""
    if "$ref" in schema:
        name = html.escape(schema["$ref"].rpartition("/")[2])
        return f"<a href='#{name}'>{name}</a>"
    if "anyOf" in schema:
        return " or ".join(_kind(inner) for inner in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {})) if isinstance(schema.get('items'), dict) else 'anything'}"
    if "enum" in schema:
        return " or ".join(f"<code>{html.escape(str(value))}</code>" for value in schema["enum"])
    return html.escape(str(schema.get("format") or schema.get("type") or "anything"))
