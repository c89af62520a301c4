"""JSON schema to GBNF: what a model may write is exactly what the schema allows, in one line of JSON.

Source: JSON Schema 2020-12, as far as a context-free grammar can say it; keywords that it cannot say are refused by
name when `strict`, and left out of account otherwise. Properties come in the order in which the schema declares them.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.templates import ranges

DEPTH_MAX: Final = 32
RULES_MAX: Final = 4096
VISITS_MAX: Final = 20_000
REPETITIONS_MAX: Final = 1000
GRAMMAR_CHARS_MAX: Final = 256 * 1024

_ANNOTATIONS: Final = frozenset(
    {"title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$schema", "$id",
     "$comment", "$defs", "definitions", "strict", "name", "x-order"}
)  # fmt: skip
_KEYWORDS: Final[dict[str, frozenset[str]]] = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "format"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum", "maximum"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
_ANY: Final = ("object", "array", "string", "number", "boolean", "null")

_BASICS: Final[dict[str, str]] = {
    "space": '" "?',
    "char": r'[^"\\\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})',
    "string": r'"\"" char* "\""',
    "integer": '"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": '"-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "member": 'string ":" space value',
    "object": '"{" space (member ("," space member)*)? "}"',
    "array": '"[" space (value ("," space value)*)? "]"',
    "value": "object | array | string | number | boolean | null",
    "date": '[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])',
    "time": '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})? ("Z" | [-+] ([01] [0-9] | '
    '"2" [0-3]) ":" [0-5] [0-9])',
    "uuid": '[0-9a-f]{8} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{12}',
}
_NEEDS: Final[dict[str, tuple[str, ...]]] = {
    "string": ("char",), "member": ("string", "space", "value"), "object": ("member", "space"), "array": ("value",
    "space"),
    "value": ("object", "array", "string", "number", "boolean", "null"),
}  # fmt: skip
_FORMATS: Final = {"date": "date", "time": "time", "date-time": 'date "T" time', "uuid": "uuid"}


def literal(text: str) -> str:
    """The text as a GBNF literal."""
    escaped = (
        text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    )
    return f'"{escaped}"'


def schema_grammar(schema: Mapping[str, Any] | bool, *, strict: bool = True) -> str:
    """GBNF text whose root is the schema.

    Raises:
        MeshError: BAD_REQUEST, naming the keyword or the limit.
    """
    rules = Rules(strict=strict)
    rules.define("root", rules.body(schema))
    return rules.text()


class Rules:
    """A grammar under construction."""

    def __init__(self, *, strict: bool) -> None:
        self._rules: dict[str, str] = {}
        self._strict = strict

    def text(self) -> str:
        """The grammar so far."""
        made = "".join(f"{name} ::= {body}\n" for name, body in self._rules.items())
        if len(made) > GRAMMAR_CHARS_MAX:
            raise _refused(
                f"the schema makes a grammar of {len(made)} characters; at most {GRAMMAR_CHARS_MAX} are taken"
            )
        return made

    def define(self, name: str, body: str) -> str:
        """Adds a rule under this name, which must be free, and returns the name."""
        if len(self._rules) >= RULES_MAX:
            raise _refused(f"the schema needs more than {RULES_MAX} grammar rules")
        self._rules[name] = body
        return name

    def replace(self, name: str, body: str) -> None:
        """Says what a rule that was only named so far stands for."""
        self._rules[name] = body

    def basic(self, name: str) -> str:
        """One of the rules that all grammars share, with those that it needs."""
        if name not in self._rules:
            self.define(name, _BASICS[name])
            for needed in _NEEDS.get(name, ()):
                self.basic(needed)
        return name

    def body(self, schema: Any, *, strict: bool | None = None) -> str:
        """What stands for a schema (whose `$ref`s lead into itself)."""
        return _Schema(self, schema, self._strict if strict is None else strict, f"s{len(self._rules)}").body()

    def fresh(self, prefix: str, body: str) -> str:
        """Adds a rule under a new name."""
        return self.define(f"{prefix}-{len(self._rules)}", body)


class _Schema:
    """One schema document on its way into the rules."""

    def __init__(self, rules: Rules, document: Any, strict: bool, prefix: str) -> None:
        self._rules, self._document, self._strict, self._prefix = rules, document, strict, prefix
        self._refs: dict[str, str] = {}
        self._visits = 0

    def body(self) -> str:
        return self._of(self._document, 0, frozenset())

    def _of(self, schema: Any, depth: int, bare: frozenset[str]) -> str:
        """`bare`: the references that were followed since the last character, which must not be met again."""
        if depth > DEPTH_MAX:
            raise _refused(f"the schema is nested deeper than {DEPTH_MAX}")
        self._visits += 1
        if self._visits > VISITS_MAX:
            raise _refused(f"the schema has more than {VISITS_MAX} parts, references followed")
        if schema is True or schema == {}:
            return self._rules.basic("value")
        if not isinstance(schema, Mapping):
            raise _refused("a schema must be an object" if schema is not False else "the schema allows nothing (false)")
        if "$ref" in schema:
            self._only(schema, {"$ref"}, "beside $ref")
            return self._reference(schema["$ref"], depth, bare)
        if "const" in schema:
            return literal(json.dumps(schema["const"], ensure_ascii=False))
        if "enum" in schema:
            return self._enum(schema["enum"])
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                self._only(schema, {keyword, "type", "nullable"}, f"beside {keyword}")
                return self._any_of(_list(schema[keyword], keyword), depth, bare, bool(schema.get("nullable")))
        if "allOf" in schema:
            return self._of(self._merged(schema), depth + 1, bare)
        kinds = schema.get("type", _guess(schema))
        kinds = [kinds] if isinstance(kinds, str) else _list(kinds, "type")
        if schema.get("nullable") is True and "null" not in kinds:
            kinds = [*kinds, "null"]
        known = [kind for kind in kinds if isinstance(kind, str) and kind in _KEYWORDS]
        if not kinds or len(known) != len(kinds):
            raise _refused(f"the type {kinds!r:.80} is not known")
        allowed = frozenset().union(*(_KEYWORDS[kind] for kind in known)) | {"type", "nullable"}
        self._only(schema, allowed, "on " + ", ".join(known))
        return _alternatives([self._typed(kind, schema, depth) for kind in known])

    def _only(self, schema: Mapping[str, Any], allowed: frozenset[str] | set[str], where: str) -> None:
        unknown = sorted(str(key) for key in schema if key not in allowed and key not in _ANNOTATIONS)
        if unknown and self._strict:
            raise _refused(
                f"the keyword {unknown[0][:64]!r} {where} is not supported; leave it out or check it yourself"
            )

    def _reference(self, ref: Any, depth: int, bare: frozenset[str]) -> str:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise _refused(f"the reference {ref!r:.80} leads out of the schema; put what it means into $defs")
        if ref in bare:
            raise _refused(f"the reference {ref!r:.80} leads back to itself")
        if ref not in self._refs:
            name = f"{self._prefix}-ref-{len(self._refs)}"
            self._refs[ref] = name
            self._rules.define(name, "")
            self._rules.replace(name, self._of(self._target(ref), depth + 1, bare | {ref}))
        elif bare:
            # The rule may still be open and begin with us: following it once more finds a circle without characters.
            self._of(self._target(ref), depth + 1, bare | {ref})
        return self._refs[ref]

    def _target(self, ref: str) -> Any:
        target = self._document
        for part in ref.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, Mapping) or key not in target:
                raise _refused(f"the reference {ref!r:.80} leads nowhere")
            target = target[key]
        return target

    def _enum(self, values: Any) -> str:
        return _alternatives([literal(json.dumps(value, ensure_ascii=False)) for value in _list(values, "enum")])

    def _any_of(self, options: list[Any], depth: int, bare: frozenset[str], nullable: bool) -> str:
        bodies = [self._of(option, depth + 1, bare) for option in options]
        return _alternatives(bodies + ([self._rules.basic("null")] if nullable else []))

    def _merged(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        merged: dict[str, Any] = {key: value for key, value in schema.items() if key != "allOf"}
        for part in _list(schema["allOf"], "allOf"):
            if isinstance(part, Mapping) and "$ref" in part and len(part) == 1:
                part = self._target(part["$ref"])
            if not isinstance(part, Mapping):
                raise _refused("a part of allOf is no object")
            for key, value in part.items():
                if key == "properties" and isinstance(value, Mapping):
                    merged[key] = {**merged.get(key, {}), **value}
                elif key == "required" and isinstance(value, list):
                    merged[key] = [*merged.get(key, []), *value]
                elif key not in _ANNOTATIONS and merged.setdefault(key, value) != value:
                    raise _refused(f"two parts of allOf say different things of {key!r:.64}")
        return merged

    def _typed(self, kind: str, schema: Mapping[str, Any], depth: int) -> str:
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            return self._array(schema, depth)
        if kind == "string":
            return self._string(schema)
        if kind in ("integer", "number"):
            return self._numeric(kind, schema)
        return self._rules.basic(kind)

    def _object(self, schema: Mapping[str, Any], depth: int) -> str:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise _refused("properties must be an object, and required a list")
        extra = schema.get("additionalProperties", not properties)
        undeclared = [key for key in required if key not in properties]
        if undeclared:
            raise _refused(f"the required property {str(undeclared[0])[:64]!r} is not declared in properties")
        space = self._rules.basic("space")
        if not properties and extra in (True, {}):
            return self._rules.basic("object")
        tail = ["", ""]  # what may follow when nothing was written yet, and when something was
        if extra is not False:
            more = f'{self._rules.basic("string")} ":" {space} {_grouped(self._of(extra, depth + 1, frozenset()))}'
            more = self._rules.fresh("more", more)
            tail = [f'({more} ("," {space} {more})*)?', f'("," {space} {more})*']
        for key, value in reversed(list(properties.items())):
            written = _grouped(self._of(value, depth + 1, frozenset()))
            named = literal(json.dumps(str(key), ensure_ascii=False))
            member = self._rules.fresh("member", f'{named} ":" {space} {written}')
            first, later = f"{member} {tail[1]}".strip(), f'"," {space} {member} {tail[1]}'.strip()
            if key not in required:
                first = f"{first} | {tail[0]}" if tail[0] else f"({first})?"
                later = f"{later} | {tail[1]}" if tail[1] else f"({later})?"
            tail = [self._rules.fresh("first", first), self._rules.fresh("later", later)]
        return f'"{{" {space} {tail[0]} "}}"'.replace("  ", " ")

    def _array(self, schema: Mapping[str, Any], depth: int) -> str:
        space = self._rules.basic("space")
        low, high = self._count(schema, "minItems") or 0, self._count(schema, "maxItems")
        if "prefixItems" in schema:
            parts = [
                _grouped(self._of(part, depth + 1, frozenset())) for part in _list(schema["prefixItems"], "prefixItems")
            ]
            if low not in (0, len(parts)) or high not in (None, len(parts)) or schema.get("items", False) is not False:
                raise _refused("prefixItems is supported for arrays of exactly these items only")
            joined = f' "," {space} '.join(parts)
            return f'"[" {space} {joined} "]"'
        if high is not None and high < low:
            raise _refused("maxItems is smaller than minItems")
        item = self._rules.fresh("item", self._of(schema.get("items", True), depth + 1, frozenset()))
        if high == 0:
            return '"[" "]"'
        rest = f'("," {space} {item}){_times(max(0, low - 1), None if high is None else high - 1)}'
        return f'"[" {space} {item} {rest} "]"' if low else f'"[" {space} ({item} {rest})? "]"'

    def _string(self, schema: Mapping[str, Any]) -> str:
        form = schema.get("format")
        low, high = self._count(schema, "minLength") or 0, self._count(schema, "maxLength")
        if form is not None and form in _FORMATS:
            for name in ("date", "time", "uuid"):
                if name in _FORMATS[form].split():
                    self._rules.basic(name)
            return f'"\\"" {_FORMATS[form]} "\\""'
        if form is not None and self._strict:
            raise _refused(f"the format {str(form)[:64]!r} is not supported (only {', '.join(_FORMATS)} are)")
        if not low and high is None:
            return self._rules.basic("string")
        if high is not None and high < low:
            raise _refused("maxLength is smaller than minLength")
        return f'"\\"" {self._rules.basic("char")}{_times(low, high)} "\\""'

    def _numeric(self, kind: str, schema: Mapping[str, Any]) -> str:
        low, high = self._bound(schema, "minimum"), self._bound(schema, "maximum")
        over, under = self._bound(schema, "exclusiveMinimum"), self._bound(schema, "exclusiveMaximum")
        if kind == "integer":
            low = max((bound for bound in (low, None if over is None else over + 1) if bound is not None), default=None)
            high = min(
                (bound for bound in (high, None if under is None else under - 1) if bound is not None), default=None
            )
        if low is None and high is None:
            return self._rules.basic(kind)
        made = ranges.integers(low, high) if kind == "integer" else ranges.decimals(low, high)
        if not made:
            raise _refused("no number is within minimum and maximum")
        return made

    def _count(self, schema: Mapping[str, Any], keyword: str) -> int | None:
        value = schema.get(keyword)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= REPETITIONS_MAX:
            raise _refused(f"{keyword} must be a number from 0 to {REPETITIONS_MAX}")
        return value

    def _bound(self, schema: Mapping[str, Any], keyword: str) -> int | None:
        value = schema.get(keyword)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or abs(value) >= 10**15:
            if not self._strict:
                return None
            raise _refused(f"{keyword} must be a whole number of at most 15 digits")
        return int(value)


def _guess(schema: Mapping[str, Any]) -> list[str] | str:
    if "properties" in schema or "additionalProperties" in schema or "required" in schema:
        return "object"
    if "items" in schema or "prefixItems" in schema:
        return "array"
    return list(_ANY)


def _list(value: Any, keyword: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise _refused(f"{keyword} must be a list that is not empty")
    return value


def _alternatives(bodies: list[str]) -> str:
    return " | ".join(dict.fromkeys(bodies))


def _grouped(body: str) -> str:
    return f"({body})" if " | " in body else body


def _times(low: int, high: int | None) -> str:
    if high is None:
        return "*" if low == 0 else f"{{{low},}}"
    return f"{{{low},{high}}}"


def _refused(words: str) -> MeshError:
    return MeshError(ErrorCode.BAD_REQUEST, f"This JSON schema cannot be forced: {words}.")
