"""Keys at rest and the certificates made from them: who this node is, and what a mesh's root signs.

Its job is the node's Ed25519 key and, on admins, the mesh's root key, each in a file that nobody else may read; the
certificate request, the root's certificate and the leaf; and sealing a root key for another node. It leaves to trust
who is a member: a certificate opens a connection and proves a key, and nothing more.
"""

import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from nacl.exceptions import CryptoError
from nacl.exceptions import TypeError as NaclTypeError
from nacl.public import SealedBox
from nacl.signing import SigningKey, VerifyKey

from meshnode.kernel.durability import make_durable
from meshnode.kernel.errors import ErrorCode, MeshError
from protocol.ids import MeshId, NodeId, mesh_id_of, node_id_of, root_pin

NODE_KEY_FILE: Final = "node.key"
ROOT_KEY_FILE: Final = "root.key"
key_file_bytes_max: Final = 4096
csr_bytes_max: Final = 4096

_ROOT_SEAL_DOMAIN: Final = b"meshnode/root-key/1\x00"
# The clock plays no part in membership, so certificates say "always": from before any clock to RFC 5280's "no
# well-defined expiration date" (section 4.1.2.5). Verifiers skip the dates altogether.
_NOT_BEFORE: Final = datetime(2000, 1, 1)
_NOT_AFTER: Final = datetime(9999, 12, 31, 23, 59, 59)


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """This node's key. `seed` is the 32-byte private key (RFC 8032); `key_path` is where TLS loads it from."""

    node_id: NodeId
    public_key: bytes
    key_path: Path
    seed: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class RootKey:
    """A mesh's root key: whoever holds it is an admin."""

    mesh_id: MeshId
    public_key: bytes
    seed: bytes = field(repr=False)

    @property
    def pin(self) -> bytes:
        """SHA-256 over the root's SubjectPublicKeyInfo, as join URLs carry it."""
        return root_pin(self.public_key)


# ---- keys on disk --------------------------------------------------------------------------------------------------


def load_or_make_identity(folder: Path) -> NodeIdentity:
    """The identity in `folder`, made there when there is none. A key file that exists is never replaced.

    Raises MeshError: BAD_SETTING if others may read the key, STORAGE_FAILED if it cannot be read, parsed or written.
    """
    _make_private_folder(folder)
    path = folder / NODE_KEY_FILE
    key = _read_key(path)
    if key is None:
        _write_new(path, _to_pem(Ed25519PrivateKey.generate()))
        # Read back what is there: another process that started at the same moment may have been first.
        key = _read_key(path)
    if key is None:
        raise _unreadable(path, "it vanished while this agent started")
    public_key = key.public_key().public_bytes_raw()
    return NodeIdentity(
        node_id=node_id_of(public_key), public_key=public_key, key_path=path, seed=key.private_bytes_raw()
    )


def found_root() -> RootKey:
    """A new root key, and with it a new mesh. Nothing is stored yet: see store_root."""
    return root_from_seed(Ed25519PrivateKey.generate().private_bytes_raw())


def root_from_seed(seed: bytes) -> RootKey:
    """The root key with this 32-byte private key. Raises ValueError on any other length."""
    public_key = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    return RootKey(mesh_id=mesh_id_of(public_key), public_key=public_key, seed=seed)


def store_root(folder: Path, root: RootKey) -> None:
    """Keep the root key in `folder`, durably, for this user alone. Storing the same key twice changes nothing.

    Raises MeshError CONFLICT if another mesh's root key is there (nothing is overwritten), STORAGE_FAILED on I/O.
    """
    _make_private_folder(folder)
    if load_root(folder) is None:
        _write_new(folder / ROOT_KEY_FILE, _to_pem(Ed25519PrivateKey.from_private_bytes(root.seed)))
    stored = load_root(folder)
    if stored is None or stored.seed != root.seed:
        raise MeshError(
            ErrorCode.CONFLICT,
            f"{folder / ROOT_KEY_FILE} holds another mesh's root key. Leave that mesh first, or move the file away.",
        )


def load_root(folder: Path) -> RootKey | None:
    """The root key stored in `folder`, or None: this node is no admin. Raises as load_or_make_identity."""
    key = _read_key(folder / ROOT_KEY_FILE)
    return None if key is None else root_from_seed(key.private_bytes_raw())


def _make_private_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.name == "posix" and folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise MeshError(
            ErrorCode.STORAGE_FAILED,
            f"The data folder {folder} cannot be made private: {error.strerror}. Give this user a folder of its own.",
        ) from error


def _read_key(path: Path) -> Ed25519PrivateKey | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error.strerror or "it cannot be opened") from error
    with os.fdopen(descriptor, "rb") as file:
        # Asked of the open file, so that nobody can swap the file between the question and the reading.
        mode = os.fstat(file.fileno()).st_mode
        if os.name == "posix" and mode & 0o077:
            raise MeshError(
                ErrorCode.BAD_SETTING,
                f"{path} may be read by others (mode {mode & 0o777:04o}), so its key may be known to them. If nobody "
                f"could have copied it, run: chmod 600 '{path}'. Otherwise evict this node and join with a new key.",
                detail={"path": str(path), "mode": f"{mode & 0o777:04o}"},
            )
        try:
            text = file.read(key_file_bytes_max)
            key = serialization.load_pem_private_key(text, password=None)
        except OSError as error:
            raise _unreadable(path, error.strerror or "it cannot be read") from error
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise _unreadable(path, "it does not hold a private key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _unreadable(path, "it holds a key that is not Ed25519")
    return key


def _to_pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_new(path: Path, content: bytes) -> None:
    """Write a file that did not exist: all of it or none, durable, readable by its owner alone; leave one that does."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        draft.unlink(missing_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            # A link, unlike a rename, never replaces a key that another process put there meanwhile.
            os.link(draft, path)
        except FileExistsError:
            pass
        except OSError:
            # A file system without hard links.
            if not path.exists():
                os.replace(draft, path)
        make_durable(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        draft.unlink(missing_ok=True)


def _unreadable(path: Path, why: str) -> MeshError:
    return MeshError(
        ErrorCode.STORAGE_FAILED,
        f"The key file {path} cannot be used: {why}. Restore it from a backup; or move it away, and this machine "
        "becomes a new node that has to join again.",
        detail={"path": str(path)},
    )


def _unwritable(path: Path, error: OSError) -> MeshError:
    return MeshError(
        ErrorCode.STORAGE_FAILED,
        f"The key file {path} cannot be written: {error.strerror}. Check the disk and who owns the folder.",
        detail={"path": str(path)},
    )


# ---- certificates --------------------------------------------------------------------------------------------------


def root_certificate(root: RootKey) -> bytes:
    """The root's self-made certificate, DER. The same bytes on every admin: it depends on the key alone."""
    key = Ed25519PrivateKey.from_private_bytes(root.seed)
    name = _name(f"meshnode {root.mesh_id}")
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(int.from_bytes(root.pin[:16], "big") >> 1 | 1)
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return builder.sign(key, None).public_bytes(serialization.Encoding.DER)


def make_csr(identity: NodeIdentity) -> bytes:
    """This node's certificate request, DER (RFC 2986): it proves possession of the key."""
    key = Ed25519PrivateKey.from_private_bytes(identity.seed)
    request = x509.CertificateSigningRequestBuilder().subject_name(_name(identity.node_id)).sign(key, None)
    return request.public_bytes(serialization.Encoding.DER)


def public_key_of_csr(csr: bytes) -> bytes:
    """The raw Ed25519 key that a certificate request proves possession of. Raises MeshError BAD_REQUEST."""
    refused = MeshError(ErrorCode.BAD_REQUEST, "The certificate request is not one of an Ed25519 key. Join again.")
    if len(csr) > csr_bytes_max:
        raise refused
    try:
        request = x509.load_der_x509_csr(csr)
        key = request.public_key()
        signed = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise refused from error
    if not signed or not isinstance(key, Ed25519PublicKey):
        raise refused
    return key.public_bytes_raw()


def issue_leaf(root: RootKey, public_key: bytes) -> bytes:
    """A leaf certificate for a node's raw Ed25519 key, DER, signed by the root. Its subject is the node id.

    It carries no name, because names change and identify nobody, and it does not end, because membership is decided by
    the roster. Raises ValueError if the key is none.
    """
    key = Ed25519PublicKey.from_public_bytes(public_key)
    signer = Ed25519PrivateKey.from_private_bytes(root.seed)
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(node_id_of(public_key)))
        .issuer_name(_name(f"meshnode {root.mesh_id}"))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    return builder.sign(signer, None).public_bytes(serialization.Encoding.DER)


def certificate_public_key(certificate: bytes) -> bytes:
    """The raw Ed25519 key in a DER certificate. Raises MeshError BAD_SIGNATURE if it holds no such key."""
    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise MeshError(ErrorCode.BAD_SIGNATURE, "The certificate cannot be read. Join the mesh again.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise MeshError(ErrorCode.BAD_SIGNATURE, "The certificate is not one of an Ed25519 key. Join the mesh again.")
    return key.public_bytes_raw()


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


# ---- handing the root key to another admin -------------------------------------------------------------------------


def seal_root(root: RootKey, recipient_public_key: bytes) -> bytes:
    """The root key, sealed so that only the node with this identity key can open it (libsodium's sealed box).

    Anyone could have sealed it, so the receiver trusts it for the mesh id it expects and for nothing else.
    """
    box = SealedBox(VerifyKey(recipient_public_key).to_curve25519_public_key())
    return bytes(box.encrypt(_ROOT_SEAL_DOMAIN + root.seed))


def open_sealed_root(identity: NodeIdentity, sealed: bytes, mesh_id: MeshId) -> RootKey:
    """The root key of `mesh_id` out of what seal_root made for this node. Nothing is stored.

    Raises MeshError BAD_SIGNATURE if it is not sealed to this node, was altered, or is the root of another mesh.
    """
    box = SealedBox(SigningKey(identity.seed).to_curve25519_private_key())
    try:
        content = bytes(box.decrypt(sealed))
    except (CryptoError, NaclTypeError, ValueError) as error:
        raise _bad_seal() from error
    seed = content.removeprefix(_ROOT_SEAL_DOMAIN)
    if len(content) != len(_ROOT_SEAL_DOMAIN) + 32 or len(seed) != 32:
        raise _bad_seal()
    root = root_from_seed(seed)
    if root.mesh_id != mesh_id:
        raise _bad_seal()
    return root


def _bad_seal() -> MeshError:
    return MeshError(
        ErrorCode.BAD_SIGNATURE,
        "The root key that was sent is not this mesh's, or not sealed to this node. Ask the admin to promote it again.",
    )
