"""TLS for the join, and the check that a leaf is the root's.

No certificate authority of the system plays a part, and no date: the joiner knows the root by the URL's pin, and a
machine whose clock is wrong by a year must still be able to join.
"""

import os
import ssl
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import NodeIdentity, certificate_public_key


def issuer_context(identity: NodeIdentity, leaf: bytes) -> ssl.SSLContext:
    """The server side: TLS 1.3, this node's leaf, no session tickets, no client certificate (a joiner has none)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    # The standard library loads certificates from files only; the leaf is public.
    with tempfile.TemporaryDirectory(prefix="meshnode-") as folder:
        path = Path(folder) / "leaf.pem"
        path.write_text(ssl.DER_cert_to_PEM_cert(leaf), encoding="ascii")
        context.load_cert_chain(path, os.fspath(identity.key_path))
    return context


def joiner_context() -> ssl.SSLContext:
    """The client side. It verifies nothing by itself: `joiner` checks root, leaf and key before it sends a byte."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def check_leaf(leaf: bytes, root_public_key: bytes) -> bytes:
    """The raw Ed25519 key that the root certified in this leaf. Raises MeshError(BAD_SIGNATURE) if it did not."""
    public_key = certificate_public_key(leaf)
    certificate = x509.load_der_x509_certificate(leaf)
    refused = MeshError(ErrorCode.BAD_SIGNATURE, "its certificate is not one that the mesh's root signed")
    try:
        is_authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        root = Ed25519PublicKey.from_public_bytes(root_public_key)
        root.verify(certificate.signature, certificate.tbs_certificate_bytes)
    except (InvalidSignature, ValueError, UnsupportedAlgorithm, x509.ExtensionNotFound) as error:
        raise refused from error
    if is_authority:
        raise refused
    return public_key


def check_root(certificate: bytes) -> bytes:
    """The raw Ed25519 key of a root certificate that signed itself. Raises MeshError(BAD_SIGNATURE)."""
    public_key = certificate_public_key(certificate)
    try:
        root = x509.load_der_x509_certificate(certificate)
        Ed25519PublicKey.from_public_bytes(public_key).verify(root.signature, root.tbs_certificate_bytes)
    except (InvalidSignature, ValueError, UnsupportedAlgorithm) as error:
        raise MeshError(ErrorCode.BAD_SIGNATURE, "its root certificate was not made by the key in it") from error
    return public_key
