"""`meshnode ask`: one question, one answer on standard output; made for pipes."""

import os
import stat
import sys
from contextlib import closing
from typing import Any, Final

import click

from meshnode.cli.models import AUTO, complete_model, not_pulled
from meshnode.cli.sampling import with_sampling
from meshnode.cli.screen import Progress, note, paragraph, say_json
from meshnode.cli.session import Session, example, with_session
from meshnode.cli.stream import Turn, follow
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.redaction import printable

CONTEXT_BYTES_MAX: Final = 16 * 1024 * 1024


@click.command(
    epilog=example(
        "meshnode ask why is the sky blue",
        "git diff | meshnode ask 'write a commit message' --temperature 0",
        "meshnode ask --json --model llama-3.2-1b 'one word: yes or no?' | jq -r .answer",
    )
)
@click.argument("question", nargs=-1)
@click.option("--model", default=AUTO, shell_complete=complete_model, help="Default: the best that is ready.")
@click.option("--system", help="What the model is to be, said before the question.")
@with_session
@with_sampling
def ask(session: Session, fields: dict[str, Any], question: tuple[str, ...], model: str, system: str | None) -> None:
    """Ask a model, and print its answer as it comes.

    What comes in through a pipe is put below the question. Standard output gets the answer and nothing else, as the
    model wrote it; at a terminal, characters that could move the cursor are escaped.
    """
    words = "\n\n".join(part for part in (" ".join(question), _piped()) if part)
    if not words.strip():
        raise click.UsageError("What is the question? Give it as an argument, or through a pipe")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": words})
    turn = Turn()
    asked = {"model": model, "messages": messages, **fields}
    with session.agent() as agent:
        try:
            with (
                Printed(quiet=session.as_json) as printed,
                closing(agent.post_events("/api/llm/chat", asked)) as events,
            ):
                follow(events, turn, printed)
        except MeshError as error:
            # Only then is it worth asking whether it could be fetched.
            raise (error.code is ErrorCode.NOT_FOUND and not_pulled(agent, model)) or error from error
    if session.as_json:
        say_json(turn.report())
    elif turn.finish_reason == "length":
        note("The answer was cut off at its greatest length; --max-tokens sets it.")


def _piped() -> str:
    """What a pipe or a file brings; nothing where a person is, or nobody. Raises click.UsageError for too much."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return ""
    if stat.S_ISCHR(mode):
        return ""
    data = sys.stdin.buffer.read(CONTEXT_BYTES_MAX + 1)
    if len(data) > CONTEXT_BYTES_MAX:
        raise click.UsageError(f"More than {CONTEXT_BYTES_MAX // 1024**2} MiB came through the pipe: send less")
    return data.decode("utf-8", "replace").strip("\n")


class Printed:
    """Writes the answer on standard output, each piece at once; a spinner as long as there is none."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._spinner: Progress | None = Progress("thinking", quiet=quiet)
        self._begun = False
        self._last = ""

    def __enter__(self) -> "Printed":
        if self._spinner is not None:
            self._spinner.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop_spinner()
        if self._begun and self._last != "\n":
            click.echo()

    def waiting(self, words: str) -> None:
        if self._spinner is not None:
            self._spinner.tell(words)

    def reasoning(self, text: str) -> None: ...

    def text(self, text: str) -> None:
        if self._quiet:
            return
        self._stop_spinner()
        self._begun, self._last = True, text[-1]
        shown = paragraph(text) if sys.stdout.isatty() else text
        # As bytes: the answer is UTF-8 whatever the locale thinks it can show. click flushes.
        click.echo(shown.encode("utf-8", "replace"), nl=False)

    def rerouted(self, words: str) -> None:
        if not self._quiet and sys.stderr.isatty():
            note(f"\n[{printable(words)}]")

    def _stop_spinner(self) -> None:
        spinner, self._spinner = self._spinner, None
        if spinner is not None:
            spinner.__exit__(None, None, None)
