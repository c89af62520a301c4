"""`meshnode chat`: a conversation at a terminal, or one turn for each line that comes in."""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any, Final

import click

from meshnode.cli.model_text import answer_text
from meshnode.cli.models import AUTO, check_model, complete_model
from meshnode.cli.prompt import FENCE, Prompt, history_path
from meshnode.cli.sampling import with_sampling
from meshnode.cli.screen import Progress, complain, paragraph, say, say_json, table, terminal_columns
from meshnode.cli.session import Session, example, with_session
from meshnode.cli.stream import Turn
from meshnode.cli.talk import Talk
from meshnode.cli.units import ago_text
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.near import nearest
from meshnode.kernel.redaction import printable

SESSIONS_SHOWN: Final = 20
LINES_RECALLED: Final = 2
COMMANDS: Final = {
    "/help": "this list",
    "/new": "begin anew; the chat so far stays stored",
    "/model [NAME]": "which model answers, or another one from now on",
    "/sessions": "the stored chats; `meshnode chat --session ID` goes on with one",
    "/save FILE": "write the conversation into a file",
}


@click.command(
    epilog=example(
        "meshnode chat",
        "meshnode chat llama-3.2-1b --system 'You are brief.' --temperature 0.2",
        "meshnode chat --session sess_3f2a",
    )
)
@click.argument("model", default=AUTO, shell_complete=complete_model)
@click.option("--session", "chat_id", metavar="ID", help="Go on with a stored chat: its id, or the beginning of it.")
@click.option("--system", help="What the model is to be, said before everything.")
@with_session
@with_sampling
def chat(session: Session, fields: dict[str, Any], model: str, chat_id: str | None, system: str | None) -> None:
    """Talk with a model. The conversation is stored in the mesh.

    Ctrl-C stops an answer, Ctrl-D leaves. A text of several lines stands between two lines of \"\"\". /help lists what
    can be typed besides. Without a terminal each line that comes in is one turn.
    """
    interactive = not session.as_json and all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))
    with session.agent() as agent:
        check_model(agent, model)
        talk = Talk(agent, model=model, system=system, fields=fields)
        if chat_id is not None:
            talk.resume(chat_id)
        with Prompt(interactive=interactive, history=history_path() if interactive else None) as prompt:
            if interactive:
                _greet(talk)
                Conversation(talk, prompt, lambda name: check_model(agent, name)).run()
            else:
                _answer_lines(talk, prompt, as_json=session.as_json)


def _greet(talk: Talk) -> None:
    say(_dim(f"{printable(talk.model)}; /help, Ctrl-D leaves"))
    if talk.messages and talk.chat is not None:
        say(_dim(f"{printable(talk.title)} ({talk.chat}), {len(talk.messages)} messages so far"))
        for message in talk.messages[-LINES_RECALLED:]:
            say(_dim(f"{message['role']}: ") + paragraph(message["content"]))


def _answer_lines(talk: Talk, prompt: Prompt, *, as_json: bool) -> None:
    """One turn for each line; the first failure ends it."""
    while True:
        try:
            words = prompt.read()
        except EOFError:
            return
        if not words.strip():
            continue
        turn = Turn()
        talk.say(words, turn, Silent())
        if as_json:
            say_json({"session_id": talk.chat, **turn.report()}, line=True)
        else:
            click.echo(turn.text.encode("utf-8", "replace"))


class Conversation:
    """A person at a terminal. `check` raises MeshError for a model that is not there."""

    def __init__(self, talk: Talk, prompt: Prompt, check: Any) -> None:
        self._talk = talk
        self._prompt = prompt
        self._check = check

    def run(self) -> None:
        """Until Ctrl-D. What fails is told, and the conversation goes on; without an agent it ends."""
        while True:
            # Ctrl-C may come at any moment, twice too: it ends a line or an answer, never the conversation.
            with contextlib.suppress(KeyboardInterrupt):
                try:
                    self._turn()
                except EOFError:
                    say()
                    return
                except KeyboardInterrupt:
                    say()

    def _turn(self) -> None:
        words = self._prompt.read()
        try:
            if words.startswith("/"):
                self._do(words)
            elif words.strip():
                self._ask(words)
        except MeshError as error:
            if error.code is ErrorCode.AGENT_NOT_RUNNING:
                raise
            complain(error, as_json=False)

    def _ask(self, words: str) -> None:
        turn, spoken = Turn(), Spoken()
        try:
            with spoken:
                self._talk.say(words, turn, spoken)
        except KeyboardInterrupt:
            say(_dim("stopped"))
            return
        say(_dim(f"[{answer_text(turn.shards, turn.usage)}]"))
        if turn.finish_reason == "length":
            say(_dim("[cut off at its greatest length; --max-tokens sets it]"))

    def _do(self, words: str) -> None:
        name, _, rest = words.partition(" ")
        rest = rest.strip()
        match name:
            case "/help":
                say("\n".join(f"{usage:<16}{does}" for usage, does in COMMANDS.items()))
                say(f"{FENCE:<16}begins and ends a text of several lines")
                say(f"{'Ctrl-C, Ctrl-D':<16}stop an answer; leave")
            case "/new":
                self._talk.renew()
                say(_dim("a new conversation"))
            case "/model":
                if rest:
                    self._check(rest)
                    self._talk.model = rest
                say(_dim(f"{printable(self._talk.model)} answers"))
            case "/sessions":
                self._list()
            case "/save" if rest:
                self._talk.save(Path(rest).expanduser())
                say(_dim(f"written to {rest}"))
            case "/save":
                say("Into which file? /save FILE")
            case _:
                near = nearest(name, [usage.split()[0] for usage in COMMANDS])
                hint = f"did you mean {near[0]}?" if near else "/help lists them."
                say(f"There is no {printable(name)}; {hint} A message that begins with / needs a space before it.")

    def _list(self) -> None:
        chats = self._talk.stored()
        rows = [
            (chat["id"], printable(chat["title"]), printable(chat["model"]), ago_text(chat["updated_at"], time.time()))
            for chat in chats[:SESSIONS_SHOWN]
        ]
        if not rows:
            say("No chat is stored yet.")
            return
        say(
            table(
                ("ID", "TITLE", "MODEL", "LAST USED"), rows, width=terminal_columns(), expendable=("MODEL", "LAST USED")
            )
        )
        if len(chats) > SESSIONS_SHOWN:
            say(f"and {len(chats) - SESSIONS_SHOWN} older ones")


class Silent:
    """Hears an answer and shows nothing of it."""

    def waiting(self, words: str) -> None: ...
    def reasoning(self, text: str) -> None: ...
    def text(self, text: str) -> None: ...
    def rerouted(self, words: str) -> None: ...


class Spoken:
    """Shows an answer as it comes: a spinner first, what the model thinks dimmed, then its words."""

    def __init__(self) -> None:
        self._spinner: Progress | None = Progress("thinking")
        self._last = "\n"
        self._dimmed = False

    def __enter__(self) -> "Spoken":
        if self._spinner is not None:
            self._spinner.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop_spinner()
        self._end_line()

    def waiting(self, words: str) -> None:
        if self._spinner is not None:
            self._spinner.tell(words)

    def reasoning(self, text: str) -> None:
        self._dimmed = True
        self._write(_dim(paragraph(text)), text)

    def text(self, text: str) -> None:
        if self._dimmed:
            self._end_line()
            self._dimmed = False
        self._write(paragraph(text), text)

    def rerouted(self, words: str) -> None:
        self._stop_spinner()
        self._end_line()
        say(_dim(f"[{printable(words)}]"))

    def _write(self, shown: str, text: str) -> None:
        self._stop_spinner()
        self._last = text[-1:] or self._last
        click.echo(shown, nl=False)

    def _end_line(self) -> None:
        if self._last != "\n":
            say()
            self._last = "\n"

    def _stop_spinner(self) -> None:
        spinner, self._spinner = self._spinner, None
        if spinner is not None:
            spinner.__exit__(None, None, None)


def _dim(text: str) -> str:
    return click.style(text, dim=True)
