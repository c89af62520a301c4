"""The life of the agent's process: hold the data folder, and run one runtime after the other.

Joining another mesh or leaving ends a runtime; the files change over, and a new runtime starts in the same process.
"""

import gc
import socket
import time
from collections.abc import Callable
from pathlib import Path

import trio
from msgspec.structs import replace

from meshnode.api.sockets import bind_loopback
from meshnode.cluster.service.moves import former_name
from meshnode.cluster.service.onboarding.joiner import Joiner, read_join_url
from meshnode.cluster.service.switch import DATABASE_FILE, finish, prepare_identity, stage_join
from meshnode.cluster.store import MeshStore
from meshnode.kernel.clock import steady_s
from meshnode.kernel.database import open_database
from meshnode.kernel.datafolder import DataFolder, open_data_folder
from meshnode.kernel.datagrams import open_datagrams
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.logs import Logger, LogSettings, open_logs
from meshnode.kernel.recordstore import SqlRecordStore
from meshnode.kernel.redaction import SecretSet
from meshnode.node.founding import load_roster
from meshnode.node.runtime import ReadyInfo, Runtime, all_migrations
from meshnode.node.services import notify_service_manager
from meshnode.settings import ResolvedSettings, Settings, node_name
from protocol.ids import MeshId, root_pin
from protocol.wire.crypto import SodiumSuite


def run_agent(
    resolved: ResolvedSettings,
    *,
    join_url: str | None = None,
    on_ready: Callable[[ReadyInfo], None] = lambda info: None,
    system_service: bool = False,
) -> None:
    """Run the agent in the foreground until SIGTERM or SIGINT. Raises MeshError with what to do."""
    settings = resolved.settings
    data_dir = Path(settings.node.data_dir) if settings.node.data_dir else None
    with open_data_folder(data_dir, system_service=system_service) as folder:
        folder.check_free()
        agent = Agent(settings, folder, on_ready)
        trio.run(agent.run, join_url)


class Agent:
    """One data folder, one process; a runtime at a time."""

    def __init__(self, settings: Settings, folder: DataFolder, on_ready: Callable[[ReadyInfo], None]) -> None:
        self._settings = settings
        self._folder = folder
        self._on_ready = on_ready
        self._secrets = SecretSet()
        self._started_at = steady_s()
        self._announced = False

    async def run(self, join_url: str | None) -> None:
        """Runtime after runtime, until one ends by a signal or an error."""
        log = self._settings.log
        form = LogSettings(
            level=log.level, form=log.format, file_bytes_max=log.file_bytes_max, files_kept=log.files_kept
        )
        with open_logs(form, data_dir=self._folder.path, secrets=self._secrets) as logs:
            logger = logs.logger("agent")
            finish(self._folder.path)
            if join_url is not None:
                await self._join_at_start(join_url, logger)
            while True:
                runtime = Runtime(
                    self._settings,
                    self._folder,
                    self._secrets,
                    logs.logger,
                    self._started_at,
                    self._tell_ready,
                    lambda: logs.lost_records,
                )
                restart = await runtime.run()
                if not restart:
                    return
                former = finish(self._folder.path)
                if former is not None:
                    logger.info("changed over to another mesh", former_files=str(former))

    def _tell_ready(self, info: ReadyInfo) -> None:
        if not self._announced:
            self._announced = True
            self._on_ready(info)
            # Free ports were found once; after a change of mesh the agent is where it was before.
            api = replace(self._settings.api, port=int(info.api.rpartition(":")[2]))
            self._settings = replace(self._settings, api=api, peers=replace(self._settings.peers, port=info.peer_port))
        # What was imported and built lives for good: a full collection that walks it would stop the agent for tens of
        # milliseconds every few seconds, and delay its links and timers.
        gc.collect()
        gc.freeze()
        notify_service_manager("READY=1")

    async def _join_at_start(self, url: str, logger: Logger) -> None:
        """`up --join`: go into the mesh of the URL before anything runs, unless this node is in it already."""
        parsed = read_join_url(url)
        data_dir = self._folder.path
        former = "none"
        async with open_database(data_dir / DATABASE_FILE, all_migrations(), wall=time.time()) as database:
            store = MeshStore(database)
            mesh = store.load()
            if mesh is not None:
                former = mesh.mesh_id
                suite = SodiumSuite(bytes(32), mesh.mesh_id)
                members = len(load_roster(mesh, suite, store.statements(), SqlRecordStore(database)))
        if mesh is not None and root_pin(mesh.root_public_key) == parsed.pin:
            logger.info("this node is in the mesh of the join URL already")
            return
        if mesh is not None and members > 1:
            raise MeshError(
                ErrorCode.ALREADY_MEMBER,
                f"{data_dir} belongs to another mesh of {members} nodes already. Start the agent without --join, then "
                "`meshnode join --leave-first URL`; or choose another --data-dir.",
            )
        # An invitation is used up by joining: first see that this agent could start at all.
        open_datagrams(self._settings.peers.host, self._settings.peers.port).close()
        bind_loopback(self._settings.api.port).close()
        identity = prepare_identity(data_dir, keep=True)
        grant = await Joiner(identity=identity).join(parsed, node_name(self._settings.node.name, socket.gethostname()))
        wall = time.time()
        await stage_join(
            data_dir, identity, grant, all_migrations(), former=former_name(MeshId(former), wall), wall=wall
        )
        finish(data_dir)
