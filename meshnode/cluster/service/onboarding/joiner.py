"""The joining machine's side: from a pasted URL to everything a member needs, or an error that names every address.

All addresses of the URL are tried, the next one a moment after the last, and each on its own: connect, check that it is
the mesh of the URL, check that it knows the invitation. Only then does one of them get the proof. It stores nothing;
whoever asked keeps the grant.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

import trio

from meshnode.cluster.service.onboarding.certificates import check_leaf, check_root, joiner_context
from meshnode.cluster.service.onboarding.failures import Failure, described, join_failed
from meshnode.cluster.service.onboarding.frames import JoinFrames
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import NodeIdentity, make_csr
from protocol.ids import Address, MeshId, NodeId, mesh_id_of, node_id_of, unpack_address
from protocol.trust.join import (
    JOIN_FRAME_BYTES_MAX,
    JOIN_VERSION,
    JOIN_VERSION_MIN,
    NONCE_BYTES,
    Begin,
    Claim,
    FromIssuer,
    Granted,
    Offer,
    Page,
    Peer,
    Refused,
    Terms,
    Transcript,
    decode_from_issuer,
    protocols_refusal,
    root_matches,
    same_proof,
    verifier_of,
)
from protocol.trust.join_url import JoinUrl, JoinUrlError, join_addresses, parse_join_url
from protocol.trust.keys import GossipKey
from protocol.trust.statements import Admission, open_statement, plain_name
from protocol.trust.view import Role
from protocol.wire.crypto import SodiumSuite
from protocol.wire.frames import Versions

Entropy = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class JoinTimes:
    """Seconds."""

    connect_s: float = 5.0
    greet_s: float = 10.0  # from the connection to the issuer's proof
    answer_s: float = 30.0  # from the joiner's proof to the last page; an admin may have to be asked
    stagger_s: float = 0.25


@dataclass(frozen=True, slots=True)
class PeerHint:
    """A member and where it was last seen."""

    node_id: NodeId
    public_key: bytes
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class JoinGrant:
    """What a new member was given, all of it checked against the root. Certificates are DER."""

    mesh_id: MeshId
    node_id: NodeId
    name: str
    role: Role
    root_public_key: bytes
    root_certificate: bytes
    leaf: bytes
    admission: bytes
    statements: tuple[bytes, ...]
    keys: tuple[GossipKey, ...] = field(repr=False)
    peers: tuple[PeerHint, ...]
    issuer_name: str
    address: Address  # the one that answered
    sealed_root: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class _Greeted:
    """A connection to an issuer that proved itself; the joiner has said nothing secret yet."""

    frames: JoinFrames
    stream: trio.SSLStream[trio.SocketStream]
    address: Address
    offer: Offer
    transcript: Transcript
    issuer_name: str


_Answer = TypeVar("_Answer", Offer, Terms, Granted, Page)
_WRONG_MESH: Final = "it belongs to another mesh, or somebody is in between: its root is not the one that the URL names"


class Joiner:
    """Joins with one identity. Each call of `join` stands for itself; after a failure it may be called again, and an
    invitation that this identity used up a moment ago still counts for it."""

    def __init__(
        self,
        *,
        identity: NodeIdentity,
        times: JoinTimes | None = None,
        entropy: Entropy = secrets.token_bytes,
        versions: Versions | None = None,
    ) -> None:
        """`versions`: the protocol versions that this machine speaks, those of this build if not given."""
        self._identity = identity
        self._times = times or JoinTimes()
        self._entropy = entropy
        self._versions = versions or Versions()

    async def join(self, url: JoinUrl, name: str) -> JoinGrant:
        """Redeem the invitation and return what it gave. Takes at most about a minute; changes nothing on this machine.

        Raises MeshError: UNREACHABLE (nobody answered; the message names each address and why), PIN_MISMATCH (nobody
        of the right mesh answered), TOKEN_INVALID, TOKEN_USED, TOKEN_EXPIRED, JOIN_REFUSED, RATE_LIMITED,
        INCOMPATIBLE_VERSION, BAD_SIGNATURE.
        """
        failures: list[Failure] = []
        greeted = await self._race(url, failures)
        if greeted is None:
            raise join_failed(failures)
        try:
            with trio.fail_after(self._times.answer_s):
                return await self._claim(greeted, url, name)
        except trio.TooSlowError:
            raise join_failed([Failure(greeted.address, ErrorCode.TIMEOUT, "it did not answer in time")]) from None
        except MeshError as error:
            raise join_failed([Failure(greeted.address, error.code, error.message)]) from error
        finally:
            await trio.aclose_forcefully(greeted.stream)

    # ---- finding the issuer -----------------------------------------------------------------------------------------

    async def _race(self, url: JoinUrl, failures: list[Failure]) -> _Greeted | None:
        """The first address whose issuer proved itself; the other attempts are given up."""
        winner: list[_Greeted] = []
        async with trio.open_nursery() as nursery:

            async def attempt(address: Address, done: trio.Event) -> None:
                try:
                    greeted = await self._greet(address, url)
                except MeshError as error:
                    failures.append(Failure(address, error.code, error.message))
                    done.set()
                    return
                if winner:
                    await trio.aclose_forcefully(greeted.stream)
                    return
                winner.append(greeted)
                nursery.cancel_scope.cancel()

            for address in await _resolve(url, failures):
                # The next address is tried after a moment, or at once when this one has failed.
                done = trio.Event()
                nursery.start_soon(partial(attempt, address, done))
                with trio.move_on_after(self._times.stagger_s):
                    await done.wait()
        return winner[0] if winner else None

    async def _greet(self, address: Address, url: JoinUrl) -> _Greeted:
        """Connect and make sure of the other side. Nothing secret is sent, and nothing at all before the root fits."""
        stream: trio.SSLStream[trio.SocketStream] | None = None
        try:
            with trio.fail_after(self._times.connect_s):
                socket = await trio.open_tcp_stream(address.host, address.port)
            stream = trio.SSLStream(socket, joiner_context(), https_compatible=True)
            with trio.fail_after(self._times.greet_s):
                return await self._check_issuer(stream, address, url)
        except (OSError, trio.TooSlowError, trio.BrokenResourceError, MeshError) as error:
            if stream is not None:
                await trio.aclose_forcefully(stream)
            raise described(error, connected=stream is not None) from error
        except trio.Cancelled:
            if stream is not None:
                await trio.aclose_forcefully(stream)
            raise

    async def _check_issuer(
        self, stream: trio.SSLStream[trio.SocketStream], address: Address, url: JoinUrl
    ) -> _Greeted:
        await stream.do_handshake()
        frames = JoinFrames(stream, frame_bytes_max=JOIN_FRAME_BYTES_MAX)
        offer = await _expect(frames, Offer)
        root_key = check_root(offer.root_certificate)
        if not root_matches(url.pin, root_key):
            raise MeshError(ErrorCode.PIN_MISMATCH, _WRONG_MESH)
        issuer_key = check_leaf(offer.leaf_certificate, root_key)
        if stream.getpeercert(binary_form=True) != offer.leaf_certificate:
            raise MeshError(ErrorCode.PIN_MISMATCH, "it showed a certificate that it does not hold the key of")
        version = min(JOIN_VERSION, offer.version_max)
        if version < max(JOIN_VERSION_MIN, offer.version_min):
            raise MeshError(
                ErrorCode.INCOMPATIBLE_VERSION,
                f"its join versions are {offer.version_min} to {offer.version_max}, ours {JOIN_VERSION_MIN} to "
                f"{JOIN_VERSION}: install the same version of meshnode on both machines",
            )
        speaks = self._versions
        refusal = protocols_refusal(mesh=Versions(offer.protocol_min, offer.protocol_max), joiner=speaks)
        if refusal is not None:
            raise MeshError(ErrorCode.INCOMPATIBLE_VERSION, refusal)
        nonce = self._entropy(NONCE_BYTES)
        me = self._identity.public_key
        await frames.send(Begin(version, url.token_id, me, nonce, speaks.min, speaks.max))
        terms = await _expect(frames, Terms)
        transcript = Transcript(
            token_id=url.token_id,
            role=terms.role,
            joiner_key=self._identity.public_key,
            issuer_key=issuer_key,
            root_key=root_key,
            joiner_nonce=nonce,
            issuer_nonce=terms.nonce,
        )
        if not same_proof(transcript.issuer_proof(verifier_of(url.secret)), terms.proof):
            raise MeshError(
                ErrorCode.JOIN_REFUSED,
                "it does not know this invitation's secret, and got none from here. Copy the whole URL again; "
                "if it is right, a machine that was put out of the mesh is pretending: ask for a new invitation",
            )
        return _Greeted(frames, stream, address, offer, transcript, plain_name(terms.issuer_name))

    # ---- joining ----------------------------------------------------------------------------------------------------

    async def _claim(self, greeted: _Greeted, url: JoinUrl, name: str) -> JoinGrant:
        transcript, frames = greeted.transcript, greeted.frames
        proof = transcript.joiner_proof(verifier_of(url.secret))
        await frames.send(Claim(make_csr(self._identity), plain_name(name), proof))
        granted = await _expect(frames, Granted)
        statements: list[bytes] = []
        for _ in range(granted.pages):
            statements += (await _expect(frames, Page)).statements
        return self._grant(greeted, granted, statements)

    def _grant(self, greeted: _Greeted, granted: Granted, statements: list[bytes]) -> JoinGrant:
        """Believe nothing that the root did not sign, not even from the right issuer."""
        root_key, me = greeted.transcript.root_key, self._identity
        mesh_id = mesh_id_of(root_key)
        verifier = SodiumSuite(me.seed, mesh_id)
        if check_leaf(granted.leaf_certificate, root_key) != me.public_key:
            raise MeshError(ErrorCode.BAD_SIGNATURE, "the certificate it issued is for another key")
        admission = open_statement(granted.admission, root_key, verifier)
        if not isinstance(admission, Admission) or admission.public_key != me.public_key:
            raise MeshError(ErrorCode.BAD_SIGNATURE, "the admission it sent is not the root's, or not for this machine")
        if admission.role != greeted.transcript.role:
            raise MeshError(ErrorCode.BAD_SIGNATURE, "the admission it sent gives another role than the invitation")
        if any(open_statement(statement, root_key, verifier) is None for statement in statements):
            raise MeshError(ErrorCode.BAD_SIGNATURE, "the roster it sent holds statements that the root did not sign")
        return JoinGrant(
            mesh_id=mesh_id,
            node_id=me.node_id,
            name=admission.name,
            role=admission.role,
            root_public_key=root_key,
            root_certificate=greeted.offer.root_certificate,
            leaf=granted.leaf_certificate,
            admission=granted.admission,
            statements=tuple(statements),
            keys=tuple(granted.keys),
            peers=tuple(_hint(peer) for peer in granted.peers),
            issuer_name=greeted.issuer_name,
            address=greeted.address,
            sealed_root=granted.sealed_root,
        )


def read_join_url(text: str) -> JoinUrl:
    """The URL that a person pasted. Raises MeshError(BAD_REQUEST), which names the wrong part, never its text."""
    try:
        return parse_join_url(text)
    except JoinUrlError as error:
        raise MeshError(ErrorCode.BAD_REQUEST, str(error), detail={"part": error.part}) from None


async def _resolve(url: JoinUrl, failures: list[Failure]) -> list[Address]:
    """Every IP address that the URL names, host names looked up."""
    found: dict[Address, None] = {}
    for host, port in join_addresses(url):
        try:
            answers = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM)
        except OSError as error:
            failures.append(
                Failure(Address(host, port), ErrorCode.UNREACHABLE, f"the name is not known here ({error.strerror})")
            )
            continue
        for answer in answers:
            found.setdefault(Address(str(answer[4][0]), port))
    return list(found)


async def _expect(frames: JoinFrames, kind: type[_Answer]) -> _Answer:
    message: FromIssuer | None = decode_from_issuer(await frames.receive())
    if isinstance(message, Refused):
        raise _refusal(message)
    if not isinstance(message, kind):
        raise MeshError(ErrorCode.PROTOCOL_VIOLATION, "what answers there does not speak meshnode's join protocol")
    return message


def _refusal(message: Refused) -> MeshError:
    known = {
        code.value: code
        for code in (
            ErrorCode.TOKEN_INVALID,
            ErrorCode.TOKEN_USED,
            ErrorCode.TOKEN_EXPIRED,
            ErrorCode.RATE_LIMITED,
            ErrorCode.INCOMPATIBLE_VERSION,
            ErrorCode.EVICTED,
        )
    }
    return MeshError(known.get(message.code, ErrorCode.JOIN_REFUSED), message.message)


def _hint(peer: Peer) -> PeerHint:
    addresses: list[Address] = []
    for packed in peer.addresses:
        try:
            addresses.append(unpack_address(packed))
        except ValueError:
            continue
    return PeerHint(node_id_of(peer.public_key), peer.public_key, tuple(addresses))
