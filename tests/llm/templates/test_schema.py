"""A grammar takes exactly what its schema allows, and what it cannot say is refused by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.templates.ranges import decimals, integers
from meshnode.llm.templates.schema import DEPTH_MAX, REPETITIONS_MAX, schema_grammar
from tests.support.gbnf import Grammar

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "nick": {"type": "string"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {"node": {"type": "object", "properties": {"v": {"type": "integer"},
    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["v", "next"]}},
    "$ref": "#/$defs/node",
}  # fmt: skip
OPTIONAL = {"properties": {"a": {"type": "null"}, "b": {"type": "null"}, "c": {"type": "null"}}}
CASES = [
    (PERSON, ['{"name": "A", "age": 3}', '{"name":"","age":-3,"nick":"x"}'], ['{"name": "A"}',
    '{"age": 3, "name": "A"}', '{"name": "A", "age": 3, "x": 1}', '{"name": "A", "age": 3.5}', ""]),
    (TREE, ['{"v": 1, "next": null}', '{"v": 1, "next": {"v": 2, "next": null}}'], ['{"v": 1}', '{"v": 1, "next": 3}']),
    (OPTIONAL, ["{}", '{"b": null}', '{"a": null, "c": null}', '{"a": null, "b": null, "c": null}'],
    ['{"c": null, "a": null}', '{"a": null "b": null}', '{, "b": null}']),
    ({"type": "object"}, ["{}", '{"x": [1, {"y": "z"}]}'], ["[]", "{,}"]),
    ({"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}}, ["{}",
    '{"a": null}', '{"a": null, "z": 1}', '{"z": 1}'], ['{"z": "s"}']),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, ["[1]", "[1, 2]"], ["[]",
    "[1, 2, 3]", '["a"]']),
    ({"type": "array", "items": {"type": "boolean"}}, ["[]", "[true]", "[true,false]"], ["[true,]", "[1]"]),
    ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
    ({"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}]}, ['["a", 1]'], ['["a"]', "[1, 1]"]),
    ({"enum": ["red", 'a "b"\\', 3, None]}, ['"red"', '"a \\"b\\"\\\\"', "3", "null"], ["red", '"blue"']),
    ({"const": {"a": [1]}}, ['{"a": [1]}'], ["{}"]),
    ({"type": ["string", "null"]}, ['"x"', "null"], ["1"]),
    ({"type": "string", "nullable": True}, ['"x"', "null"], ["1"]),
    ({"anyOf": [{"type": "integer"}, {"type": "boolean"}]}, ["1", "true"], ['"1"']),
    ({"allOf": [{"properties": {"a": {"type": "null"}}, "required": ["a"]}, {"properties": {"b": {"type": "null"}}}]},
    ['{"a": null}', '{"a": null, "b": null}'], ["{}"]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', '"a\\n"', '"abc"'], ['"a"', '"abcd"']),
    ({"type": "string", "format": "date"}, ['"2026-02-28"'], ['"2026-13-01"', '"today"']),
    ({"type": "string", "format": "date-time"}, ['"2026-02-28T10:00:00Z"'], ['"2026-02-28"']),
    ({"type": "string"}, ['"\\u00e9 \u20ac"'], ['"\n"', '"\\x"', '"', '""" ']),
    ({"type": "number"}, ["0", "-1.5", "1e9", "12.25E-3"], ["01", ".5", "1.", "+1"]),
    ({"type": "number", "minimum": 0, "maximum": 1}, ["0", "0.5", "1", "1.0"], ["-0.5", "1.5", "2"]),
    ({"type": "integer", "exclusiveMinimum": 0, "maximum": 12}, ["1", "12"], ["0", "13", "-1"]),
    (True, ["1", '{"a": []}'], ["x"]),
    ({"properties": {"a\nb": {"type": "null"}}, "required": ["a\nb"]}, ['{"a\\nb": null}'], ['{"a\nb": null}']),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), CASES, ids=[json.dumps(case[0])[:60] for case in CASES])
def test_exactly_what_is_allowed(schema, good, bad):
    grammar = Grammar(schema_grammar(schema))
    assert [text for text in good if not grammar.accepts(text)] == []
    assert [text for text in bad if grammar.accepts(text)] == []


REFUSED = [
    ({"type": "string", "pattern": "a+"}, "'pattern'"),
    ({"type": "string", "format": "email"}, "'email'"),
    ({"type": "object", "patternProperties": {}}, "'patternProperties'"),
    ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
    ({"type": "integer", "multipleOf": 3}, "'multipleOf'"),
    ({"not": {"type": "string"}}, "'not'"),
    ({"type": "file"}, "'file'"),
    ({"type": []}, "type"),
    ({"enum": []}, "enum"),
    (False, "allows nothing"),
    ([], "must be an object"),
    ({"$ref": "https://example.org/x"}, "$defs"),
    ({"$ref": "#/$defs/absent"}, "nowhere"),
    ({"$ref": "#"}, "back to itself"),
    ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "back to itself"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "back to itself"),
    ({"allOf": [{"$ref": "#"}]}, "nested deeper"),
    ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "'type'"),
    ({"required": ["a"]}, "'a'"),
    ({"type": "string", "maxLength": REPETITIONS_MAX + 1}, str(REPETITIONS_MAX)),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "maxLength"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "no number"),
    ({"type": "number", "minimum": 0.5}, "whole number"),
    ({"type": "integer", "minimum": float("inf")}, "whole number"),
    ({"properties": []}, "properties"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "word"), REFUSED, ids=[json.dumps(case[0])[:60] for case in REFUSED])
def test_what_cannot_be_said_is_refused_by_name(schema, word):
    with pytest.raises(MeshError, match="cannot be forced") as refused:
        schema_grammar(schema)
    assert refused.value.code is ErrorCode.BAD_REQUEST
    assert word in refused.value.message


def test_without_strict_a_keyword_is_left_out_of_account():
    grammar = Grammar(schema_grammar({"type": "string", "pattern": "a+", "format": "email"}, strict=False))
    assert grammar.accepts('"b"')


def test_nesting_without_end_is_refused():
    schema = {"type": "null"}
    for _ in range(DEPTH_MAX + 2):
        schema = {"type": "array", "items": schema}
    with pytest.raises(MeshError, match="nested deeper"):
        schema_grammar(schema)


def test_references_that_multiply_are_refused():
    defs = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 3} for i in range(12)} | {"d12": {"type": "null"}}
    with pytest.raises(MeshError, match="parts"):
        schema_grammar({"$defs": defs, "$ref": "#/$defs/d0"})


def test_ten_thousand_properties_are_refused():
    with pytest.raises(MeshError, match="grammar rules"):
        schema_grammar({"properties": {f"p{i}": {"type": "null"} for i in range(10_000)}})


_BOUND = st.none() | st.integers(-1200, 1200)


@given(_BOUND, _BOUND, st.integers(-1300, 1300))
def test_whole_numbers_within_bounds(low, high, number):
    body = integers(low, high)
    inside = (low is None or number >= low) and (high is None or number <= high)
    if body:
        assert Grammar(f"root ::= {body}\n").accepts(str(number)) == inside
    else:
        assert low is not None
        assert high is not None
        assert low > high


@given(_BOUND, _BOUND, st.integers(-13000, 13000))
def test_decimals_within_bounds(low, high, tenths):
    body, text = decimals(low, high), f"{'-' if tenths < 0 else ''}{abs(tenths) // 10}.{abs(tenths) % 10}"
    inside = (low is None or tenths >= 10 * low) and (high is None or tenths <= 10 * high)
    assert (bool(body) and Grammar(f"root ::= {body}\n").accepts(text)) == inside


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def schema_of(value):
    """A schema that this very value satisfies."""
    match value:
        case dict():
            return {
                "type": "object",
                "properties": {key: schema_of(inner) for key, inner in value.items()},
                "required": list(value),
                "additionalProperties": False,
            }
        case list():
            return {"type": "array", "items": {"anyOf": [schema_of(inner) for inner in value] or [{"type": "null"}]}}
        case bool():
            return {"type": "boolean"}
        case int():
            return {"type": "integer"}
        case str():
            return {"type": "string", "maxLength": len(value)}
    return {"type": "null"}


@given(_VALUES)
def test_every_value_satisfies_its_own_schema(value):
    text = json.dumps(value, ensure_ascii=False)
    assert Grammar(schema_grammar(schema_of(value))).accepts(text)
    assert Grammar(schema_grammar(True)).accepts(text)
