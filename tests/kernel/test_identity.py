"""Keys at rest and the certificates made from them."""

import os
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import (
    certificate_public_key,
    found_root,
    issue_leaf,
    load_or_make_identity,
    load_root,
    make_csr,
    open_sealed_root,
    public_key_of_csr,
    root_certificate,
    root_from_seed,
    seal_root,
    store_root,
)
from meshnode.kernel.links import make_contexts
from protocol.ids import mesh_id_of, node_id_of, root_pin

posix_only = pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")


def test_the_first_start_makes_a_key_and_later_ones_load_it(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "data"
    made = load_or_make_identity(folder)
    assert made == load_or_make_identity(folder)
    assert made.node_id == node_id_of(made.public_key)
    assert Ed25519PrivateKey.from_private_bytes(made.seed).public_key().public_bytes_raw() == made.public_key
    assert [path.name for path in folder.iterdir()] == ["node.key"]
    assert made.seed.hex() not in repr(made)
    assert repr(made.seed) not in repr(made)
    assert load_or_make_identity(tmp_path / "other").node_id != made.node_id


@posix_only
def test_the_key_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o755)
    old = os.umask(0)
    try:
        load_or_make_identity(folder)
        store_root(folder, found_root())
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("node.key", "root.key"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600


@posix_only
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_may_read_is_refused_with_what_to_do(tmp_path: Path, mode: int) -> None:
    load_or_make_identity(tmp_path)
    path = tmp_path / "node.key"
    path.chmod(mode)
    with pytest.raises(MeshError) as caught:
        load_or_make_identity(tmp_path)
    assert caught.value.code is ErrorCode.BAD_SETTING
    assert str(path) in caught.value.message
    assert "chmod 600" in caught.value.message
    path.chmod(0o600)
    load_or_make_identity(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"-----BEGIN PRIVATE KEY-----\ncut off",
        b"\0" * 119,
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        ),
    ],
    ids=["empty", "cut off", "zeros", "another kind", "encrypted"],
)
def test_a_key_file_that_holds_no_key_is_named_and_never_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(MeshError) as caught:
        load_or_make_identity(tmp_path)
    assert caught.value.code is ErrorCode.STORAGE_FAILED
    assert str(path) in caught.value.message
    assert path.read_bytes() == content


def test_a_start_that_was_killed_in_mid_write_leaves_no_half_key(tmp_path: Path) -> None:
    (tmp_path / f".node.key.{os.getpid()}.new").write_bytes(b"half")
    made = load_or_make_identity(tmp_path)
    assert load_or_make_identity(tmp_path) == made
    assert [path.name for path in tmp_path.iterdir()] == ["node.key"]


def test_two_first_starts_at_once_agree_on_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process writes its key between this one's look and its own writing."""
    original = os.link
    winner: list[bytes] = []

    def link_late(source: Path, target: Path) -> None:
        if not winner:
            winner.append(b"")
            winner[0] = load_or_make_identity(tmp_path).public_key
        original(source, target)

    monkeypatch.setattr(os, "link", link_late)
    assert load_or_make_identity(tmp_path).public_key == winner[0]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MeshError) as caught:
        load_or_make_identity(tmp_path / "file" / "data")
    assert caught.value.code is ErrorCode.STORAGE_FAILED
    assert str(tmp_path / "file" / "data") in caught.value.message


def test_the_root_key_is_stored_once_and_never_over_anothers(tmp_path: Path) -> None:
    assert load_root(tmp_path) is None
    root = found_root()
    assert root.mesh_id == mesh_id_of(root.public_key)
    assert root.pin == root_pin(root.public_key)
    store_root(tmp_path, root)
    store_root(tmp_path, root)
    assert load_root(tmp_path) == root
    with pytest.raises(MeshError) as caught:
        store_root(tmp_path, found_root())
    assert caught.value.code is ErrorCode.CONFLICT
    assert load_root(tmp_path) == root
    assert repr(root.seed) not in repr(root)


def test_certificates_say_who_and_for_ever(tmp_path: Path) -> None:
    root, identity = found_root(), load_or_make_identity(tmp_path)
    assert root_certificate(root) == root_certificate(root_from_seed(root.seed))
    authority = x509.load_der_x509_certificate(root_certificate(root))
    key = public_key_of_csr(make_csr(identity))
    assert key == identity.public_key
    leaf = x509.load_der_x509_certificate(issue_leaf(root, key))
    leaf.verify_directly_issued_by(authority)
    assert leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == identity.node_id
    assert certificate_public_key(issue_leaf(root, key)) == key
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    for certificate in (leaf, authority):
        assert certificate.not_valid_before_utc.year == 2000
        assert certificate.not_valid_after_utc.year == 9999


def test_a_certificate_request_proves_possession(tmp_path: Path) -> None:
    mine, other = load_or_make_identity(tmp_path / "a"), load_or_make_identity(tmp_path / "b")
    request = make_csr(mine)
    forged = request.replace(mine.public_key, other.public_key)
    assert forged != request
    of_another_kind = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )
    for bad in (forged, b"", request[:-1], bytes(5000), of_another_kind):
        with pytest.raises(MeshError) as caught:
            public_key_of_csr(bad)
        assert caught.value.code is ErrorCode.BAD_REQUEST


def test_a_sealed_root_key_opens_for_its_receiver_and_mesh_alone(tmp_path: Path) -> None:
    root, other_root = found_root(), found_root()
    receiver, eve = load_or_make_identity(tmp_path / "a"), load_or_make_identity(tmp_path / "b")
    sealed = seal_root(root, receiver.public_key)
    assert root.seed not in sealed
    assert open_sealed_root(receiver, sealed, root.mesh_id) == root
    altered = bytes([sealed[0] ^ 1]) + sealed[1:]
    attempts = [
        (eve, sealed, root.mesh_id),
        (receiver, altered, root.mesh_id),
        (receiver, sealed[:-1], root.mesh_id),
        (receiver, b"", root.mesh_id),
        (receiver, seal_root(other_root, receiver.public_key), root.mesh_id),
    ]
    for identity, box, mesh_id in attempts:
        with pytest.raises(MeshError) as caught:
            open_sealed_root(identity, box, mesh_id)
        assert caught.value.code is ErrorCode.BAD_SIGNATURE


def test_contexts_refuse_a_leaf_of_another_key(tmp_path: Path) -> None:
    root = found_root()
    mine, other = load_or_make_identity(tmp_path / "a"), load_or_make_identity(tmp_path / "b")
    with pytest.raises(MeshError) as caught:
        make_contexts(mine, issue_leaf(root, other.public_key), root_certificate(root))
    assert caught.value.code is ErrorCode.BAD_SIGNATURE
    contexts = make_contexts(mine, issue_leaf(root, mine.public_key), root_certificate(root))
    for context in (contexts.server, contexts.client):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.verify_flags & ssl.VERIFY_X509_STRICT
        assert len(context.get_ca_certs()) == 1
    assert contexts.server.num_tickets == 0
