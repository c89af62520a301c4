"""What every command is told (--json, --api-port, --data-dir and so on), and where the agent is that it asks.

Its job: these options, the settings in force, and finding the agent that is meant, by its port or its data folder; no
command looks for it in another way. It leaves talking to the agent to `client` and starting one to the command `up`.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar

import click

from meshnode.kernel.errors import ErrorCode, MeshError

if TYPE_CHECKING:
    # At run time they are imported where they are used: `meshnode version` needs neither.
    from meshnode.cli.client import AgentClient
    from meshnode.settings import ResolvedSettings

_SHARED: Final = ("as_json", "api_port", "data_dir", "config", "token_file")
P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_API_PORT: Final = 4892
TOKEN_FILE: Final = "api-token"
TOKEN_VARIABLE: Final = "MESHNODE_TOKEN"
TOKEN_CHARS_MAX: Final = 256
RUNNING_FILE: Final = "running.json"
"""In the data folder while an agent runs: the port of its API, so that --data-dir alone finds it."""
_RUNNING_BYTES_MAX: Final = 4_096


class Session:
    """What one run of the command was told, and what follows from it."""

    def __init__(
        self,
        *,
        as_json: bool = False,
        api_port: int | None = None,
        data_dir: Path | None = None,
        config: Path | None = None,
        token_file: str | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.as_json = as_json
        self.api_port = api_port
        self.config = config
        self._named_data_dir = data_dir
        self._token_file = token_file
        self._environ = environ

    @cached_property
    def resolved(self) -> "ResolvedSettings":
        """The settings in force. Raises MeshError(BAD_SETTING)."""
        return self.resolve({})

    def resolve(self, flags: Mapping[str, Any]) -> "ResolvedSettings":
        """The settings in force with more flags. Raises MeshError(BAD_SETTING)."""
        from meshnode.settings import load_settings

        own = {
            "api.port": self.api_port,
            "node.data_dir": None if self._named_data_dir is None else str(self._named_data_dir),
        }
        return load_settings(config=self.config, environ=self._environ, flags={**own, **flags})

    @cached_property
    def data_dir(self) -> Path:
        """The data folder of the agent that is meant, absolute; it need not exist. That of --data-dir; where only
        --api-port is given, the one that the agent on that port says it has; else that of the settings.

        Raises MeshError: AGENT_NOT_RUNNING when nobody answers on a port that could be any agent's, and whatever
        asking raises.
        """
        if not self.api_port or self._named_data_dir is not None:
            return self.usual_data_dir
        if running_ports(self.usual_data_dir).get("api_port") == self.api_port:
            return self.usual_data_dir
        try:
            return self._said_data_dir()
        except MeshError as error:
            if error.code is not ErrorCode.AGENT_NOT_RUNNING:
                raise
            usual_port = self.resolve({"api.port": None}).settings.api.port
            if self.api_port == usual_port or "node.data_dir" in self.resolved.origins:
                return self.usual_data_dir
            raise MeshError(
                error.code,
                f"no agent is running on 127.0.0.1:{self.api_port}, so its data folder is not known: "
                "name it with --data-dir",
                retryable=True,
                detail=error.detail,
            ) from error

    def _said_data_dir(self) -> Path:
        with self.agent() as client:
            # Only our own user's word: files are read there, and the token printed.
            client.check_owner()
            return Path(client.get("/api/agent")["data_dir"])

    @cached_property
    def usual_data_dir(self) -> Path:
        """The data folder of --data-dir or of the settings, absolute, whatever --api-port says."""
        configured = self._named_data_dir or ("" if self._is_plain else self.resolved.settings.node.data_dir)
        if configured:
            return Path(configured).expanduser().absolute()
        import platformdirs

        # The same as kernel.datafolder.default_data_dir, which would bring trio and SQLite with it.
        return platformdirs.user_data_path("meshnode", appauthor=False).absolute()

    @cached_property
    def _is_plain(self) -> bool:
        """Whether no settings file and no variable exists, so that every setting not given as a flag is at its default.

        Then there is nothing to read, and what reads it need not be imported: a sixth of a quick command's time.
        """
        if self.config is not None or any(name.startswith("MESHNODE_") for name in self._environ):
            return False
        import platformdirs

        # The same as settings.sources.default_config_path.
        return not os.path.lexists(platformdirs.user_config_path("meshnode") / "config.toml")

    @cached_property
    def port(self) -> int:
        """The port of the agent's API: the flag; else, for a folder named by --data-dir, that of the agent that runs on
        it; else the setting; else what the usual data folder says; else the default.

        Raises MeshError(AGENT_NOT_RUNNING) for a named folder on which none runs: the usual port is another agent's.
        """
        if self.api_port:
            return self.api_port
        running = running_ports(self.usual_data_dir).get("api_port")
        if self._named_data_dir is not None and running:
            return running
        if not self._is_plain and "api.port" in self.resolved.origins and self.resolved.settings.api.port:
            return self.resolved.settings.api.port
        if self._named_data_dir is not None:
            raise MeshError(
                ErrorCode.AGENT_NOT_RUNNING,
                f"no agent is running on the data folder {self.usual_data_dir}: start one with "
                f"`meshnode up --data-dir {self._named_data_dir}`, or name its port with --api-port",
                retryable=True,
                detail={"data_dir": str(self.usual_data_dir)},
            )
        return running or DEFAULT_API_PORT

    def client(self) -> "AgentClient":
        """A client of the agent. Nothing is sent yet."""
        from meshnode.cli.client import AgentClient

        start = "`meshnode up`"
        if self._named_data_dir is not None:
            start = f"`meshnode up --data-dir {self._named_data_dir}`"
        return AgentClient(
            self.port, token_path=self.usual_data_dir / TOKEN_FILE, token=self._given_token, how_to_start=start
        )

    @cached_property
    def _given_token(self) -> str | None:
        """The token that the caller brought along for another user's agent. Raises MeshError(USAGE)."""
        if self._token_file is None:
            return self._environ.get(TOKEN_VARIABLE) or None
        try:
            # `-` is standard input, as for join URLs.
            with click.open_file(self._token_file, encoding="ascii", errors="replace") as file:
                token = str(file.readline(TOKEN_CHARS_MAX)).strip()
        except OSError as error:
            message = f"The token file {self._token_file} cannot be read ({error.strerror}). Name another."
            raise MeshError(ErrorCode.USAGE, message) from error
        if not token:
            raise MeshError(ErrorCode.USAGE, f"The token file {self._token_file} is empty. Name another.")
        return token

    @contextlib.contextmanager
    def agent(self) -> Iterator["AgentClient"]:
        """The same, closed at the end."""
        client = self.client()
        try:
            yield client
        finally:
            client.close()


def running_ports(data_dir: Path) -> dict[str, int]:
    """The ports (`api_port`, `peer_port`, `onboarding_port`) that the agent on this folder wrote down, if it did."""
    try:
        with (data_dir / RUNNING_FILE).open("rb") as file:
            said = json.loads(file.read(_RUNNING_BYTES_MAX))
    except (OSError, ValueError):
        return {}
    ports = said.items() if isinstance(said, dict) else ()
    return {
        name: port for name, port in ports if name.endswith("_port") and isinstance(port, int) and 0 < port < 65_536
    }


def write_running(data_dir: Path, ports: Mapping[str, int], pid: int) -> None:
    """Write down where the agent listens. What cannot be written is let go: it only saves typing a port."""
    target = data_dir / RUNNING_FILE
    draft = target.with_name(f".{RUNNING_FILE}.{pid}")
    with contextlib.suppress(OSError):
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(json.dumps({**ports, "pid": pid}) + "\n")
        os.replace(draft, target)


def with_session(function: Callable[Concatenate[Session, P], R]) -> Callable[P, R]:
    """Give a command the options that all have, and the session they make as its first argument."""

    @click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
    @click.option("--api-port", type=click.IntRange(0, 65_535), help="Port of the agent's local API.")
    @click.option(
        "--data-dir", type=click.Path(path_type=Path, file_okay=False), help="Data folder of the agent that is meant."
    )
    @click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="Settings file to read.")
    @click.option(
        "--token-file",
        type=click.Path(allow_dash=True, dir_okay=False),
        help="Token of another user's agent, in a file; - reads it from stdin. Or in MESHNODE_TOKEN.",
    )
    @functools.wraps(function)
    def command(*arguments: P.args, **named: P.kwargs) -> R:
        told: dict[str, Any] = {name: named.pop(name) for name in _SHARED}
        return function(Session(**told), *arguments, **named)

    return command


def example(*lines: str) -> str:
    """The examples below a command's help, kept as they are."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
