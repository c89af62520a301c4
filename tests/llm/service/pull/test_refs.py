"""What a reference may look like, and what each form means."""

from pathlib import Path

import pytest

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.service.pull.refs import LocalRef, NamedRef, RemoteRef, parse_ref


def test_a_file_of_the_hub_has_a_url_and_a_page_to_ask_for_access() -> None:
    ref = parse_ref("hf:Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf")
    assert ref == RemoteRef(
        "Qwen3-0.6B-Q8_0",
        ("https://huggingface.co/Qwen/Qwen3-0.6B-GGUF/resolve/main/Qwen3-0.6B-Q8_0.gguf",),
        hub=True,
        gated_page="https://huggingface.co/Qwen/Qwen3-0.6B-GGUF",
    )


def test_a_revision_and_a_folder_are_kept() -> None:
    ref = parse_ref("hf:a/b/deep/er file.gguf@refs/pr/1")
    assert isinstance(ref, RemoteRef)
    assert ref.urls == ("https://huggingface.co/a/b/resolve/refs%2Fpr%2F1/deep/er%20file.gguf",)


@pytest.mark.parametrize("number", ["00001", "00003"])
def test_whichever_part_is_named_all_parts_are_meant(number: str) -> None:
    ref = parse_ref(f"https://host.example/x/big-{number}-of-00003.gguf?download=1")
    assert isinstance(ref, RemoteRef)
    assert ref.name == "big"
    assert ref.urls == tuple(f"https://host.example/x/big-0000{n}-of-00003.gguf?download=1" for n in (1, 2, 3))


def test_a_path_is_local_and_stays_where_it_is() -> None:
    assert parse_ref("/models/a.gguf") == LocalRef("a", (Path("/models/a.gguf"),))
    relative = parse_ref("./b.gguf")
    assert isinstance(relative, LocalRef)
    assert relative.paths[0].is_absolute()


def test_anything_else_is_a_name() -> None:
    assert parse_ref(" llama3.2:1b ") == NamedRef("llama3.2:1b")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no model reference"),
        ("two words", "no model reference"),
        ("x" * 3000, "no model reference"),
        ("a\nb", "no model reference"),
        ("hf:owner/repo", "hf:OWNER/REPOSITORY/FILE.gguf"),
        ("hf:a/b/../../c.gguf", "hf:OWNER/REPOSITORY/FILE.gguf"),
        ("http://host.example/a.gguf", "Put an s behind"),
        ("https://user:secret@host.example/a.gguf", "ends in logs"),
        ("hf:../../a.gguf", "hf:OWNER/REPOSITORY/FILE.gguf"),
        ("hf:a/b//c.gguf", "hf:OWNER/REPOSITORY/FILE.gguf"),
        ("hf:a/b/c.gguf@..", "hf:OWNER/REPOSITORY/FILE.gguf"),
        ("hf:a/b/c.gguf@refs/../../x", "hf:OWNER/REPOSITORY/FILE.gguf"),
        ("https://host.example/x/../a.gguf", "no .. in it"),
        ("https://host.example/x/%2e%2e/a.gguf", "no .. in it"),
        ("https://host.example/a.txt", "ends in .gguf"),
        ("https://host.example/a.zip", "is a zip archive"),
        ("https://host.example/a.tar.gz?x=y", "is a compressed file"),
        ("hf:a/b/model.safetensors", "weights in safetensors"),
        ("hf:a/b/pytorch_model.bin@main", "a pickle that can run code"),
        ("/models/a.PTH", "a pickle that can run code"),
        ("https://host.example/a-00004-of-00003.gguf", "is no part of"),
        ("https://host.example/a-00000-of-00003.gguf", "is no part of"),
        ("https://host.example/a-00001-of-99999.gguf", "is no part of"),
    ],
)
def test_what_means_nothing_is_refused_with_the_forms_there_are(text: str, says: str) -> None:
    with pytest.raises(MeshError, match=says) as caught:
        parse_ref(text)
    assert caught.value.code is ErrorCode.BAD_REQUEST
    assert "secret" not in caught.value.message
