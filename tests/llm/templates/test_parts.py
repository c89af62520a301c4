"""Contents as OpenAI's clients send them, and names for calls."""

from random import Random

import pytest

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.templates.ids import CALL_ID_CHARS, CALL_ID_PREFIX, call_id
from meshnode.llm.templates.parts import PARTS_MAX, text_of


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ("Hi", "Hi"),
        ([], ""),
        ([{"type": "text", "text": "Hi "}, {"type": "input_text", "text": "there"}], "Hi there"),
        ([{"type": "refusal", "refusal": "No."}], "No."),
    ],
)
def test_text_is_text(content, text):
    assert text_of(content) == text


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}], "'image_url'"),
        ([{"type": "text", "text": "a"}, {"type": "input_audio"}], "part 1 is 'input_audio'"),
        ([{"text": "a"}], "without a type"),
        ([{"type": "text"}], "no text"),
        ([{"type": "text", "text": 1}], "no text"),
        (["a"], "no object"),
        ([{"type": "text", "text": "a"}] * (PARTS_MAX + 1), str(PARTS_MAX)),
    ],
)
def test_what_is_no_text_is_refused_by_name(content, word):
    with pytest.raises(MeshError) as refused:
        text_of(content)
    assert refused.value.code is ErrorCode.BAD_REQUEST
    assert word in refused.value.message


def test_call_ids_are_like_openais_and_of_their_own():
    made = {call_id(Random(seed)) for seed in range(100)}
    assert len(made) == 100
    said = [name.removeprefix(CALL_ID_PREFIX) for name in made]
    assert all(len(rest) == CALL_ID_CHARS and rest.isalnum() for rest in said)
    assert call_id(Random(1)) == call_id(Random(1))
