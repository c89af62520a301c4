"""`meshnode token`: the secret that lets programs of other users and OpenAI clients use the local API."""

import click

from meshnode.cli.screen import say, say_json
from meshnode.cli.session import TOKEN_FILE, Session, example, with_session
from meshnode.kernel.errors import ErrorCode, MeshError

_TOKEN_BYTES_MAX = 256


@click.command(
    epilog=example(
        "meshnode token", 'curl -H "Authorization: Bearer $(meshnode token)" http://127.0.0.1:4892/api/status'
    )
)
@with_session
def token(session: Session) -> None:
    """Print the API's token. Programs of your own user on this machine need none."""
    path = session.data_dir / TOKEN_FILE
    try:
        with path.open("rb") as file:
            secret = file.read(_TOKEN_BYTES_MAX).decode("ascii", "replace").strip()
    except FileNotFoundError as error:
        message = f"There is no token in {session.data_dir} yet: the agent makes it at its first start (`meshnode up`)."
        raise MeshError(ErrorCode.NOT_FOUND, message) from error
    except OSError as error:
        message = f"{path} cannot be read ({error.strerror}). Run this as the user that runs the agent."
        raise MeshError(ErrorCode.FORBIDDEN, message) from error
    if session.as_json:
        say_json({"token": secret, "path": str(path)})
    else:
        say(secret)
