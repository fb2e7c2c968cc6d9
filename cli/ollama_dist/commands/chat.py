"""`run`: a conversation with a model, or one answer when there is a prompt."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ollama_dist.commands.inference import (
    ModelArgument,
    OptionOption,
    PromptArgument,
    SystemOption,
    parse_options,
    parse_value,
    read_prompt,
    write_answer,
)
from ollama_dist.errors import CliError, UsageProblem
from ollama_dist.session import Session, command, fail

HISTORY_LINES = 1000  # of typed lines that are kept between calls
HELP = """\
  /set                   show the settings
  /set NAME VALUE        set a model option: /set temperature 0.2
  /set system TEXT       set the system message
  /clear                 forget the conversation
  /help                  this help
  /bye                   leave; so does Ctrl-D
  \"\"\"                    begin and end a message of several lines
  Ctrl-C                 stop the answer; again to leave"""


@command
def run(
    session: Session,
    model: ModelArgument,
    prompt: PromptArgument = None,
    system: SystemOption = None,
    option: OptionOption = None,
) -> None:
    """Talk with a model; with a PROMPT or piped input, print one answer."""
    from ollama_dist.client import path
    from ollama_dist.resume import resumable

    chat = Chat(session, model, options=parse_options(option or ()), system=system or "")
    if not prompt and sys.stdin.isatty():
        if session.wants_data or not sys.stdout.isatty():
            raise UsageProblem("a conversation needs a terminal", hint="Give a PROMPT.")
        # An unknown model should be told before the first question is typed.
        session.api.get(path("models", model))
        chat.converse()
        return
    text = read_prompt(prompt)
    if not text:
        raise UsageProblem("there is no prompt", hint="Type it behind the model, or pipe it in.")
    chat.messages.append({"role": "user", "content": text})
    if session.wants_data:
        session.data(session.api.infer(path("chat"), chat.request()))
        return
    with resumable(session, path("chat"), chat.request()) as items:
        write_answer(contents(items))


def contents(items: Iterator[dict[str, Any]]) -> Iterator[str]:
    """The text in the messages of a chat answer."""
    for item in items:
        message = item.get("message") or {}
        yield str(message.get("content") or "")


class Chat:
    """A conversation: what was said, and the settings for what comes."""

    def __init__(
        self, session: Session, model: str, *, options: dict[str, Any], system: str
    ) -> None:
        self.session = session
        self.model = model
        self.options = options
        self.system = system
        self.messages: list[dict[str, str]] = []

    def request(self) -> dict[str, Any]:
        """The body for `POST /chat`."""
        messages = list(self.messages)
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        if self.options:
            body["options"] = self.options
        return body

    def converse(self) -> None:
        """Ask and answer until the user leaves.

        Raises:
          KeyboardInterrupt: the user left with a second Ctrl-C.
        """
        self.session.out.print(f"{self.model}. /help shows what you can type.", style="dim")
        stopped = False
        with line_editing():
            while True:
                try:
                    line = read_message()
                except EOFError:
                    print()
                    return
                except KeyboardInterrupt:
                    print()
                    if stopped:
                        raise
                    stopped = True
                    self.session.out.print("Ctrl-C again, Ctrl-D or /bye leaves.", style="dim")
                    continue
                stopped = False
                if line in ("/bye", "/exit", "/quit"):
                    return
                if line.startswith("/"):
                    self.session.say(self.obey(line))
                elif line.strip():
                    stopped = not self.answer(line)

    def obey(self, line: str) -> str:
        """Do what a line that begins with a slash says; return what to tell the user."""
        word, _, rest = line.partition(" ")
        name, _, value = rest.strip().partition(" ")
        match word:
            case "/help" | "/?":
                return HELP
            case "/clear":
                self.messages.clear()
                return "The conversation is forgotten."
            case "/set" if not name:
                settings = {**self.options, **({"system": self.system} if self.system else {})}
                shown = [f"  {key} {setting}" for key, setting in settings.items()]
                return "\n".join(shown) or "Nothing is set."
            case "/set" if name == "system":
                self.system = value.strip()
                return "The system message is set." if self.system else "No system message."
            case "/set" if value.strip():
                self.options[name] = parse_value(name, value.strip())
                return f"{name} is {self.options[name]}."
            case "/set":
                return "Write it like /set temperature 0.2"
            case _:
                return f"There is no {word}. /help shows what there is."

    def answer(self, text: str) -> bool:
        """Send a message and show the answer; False when the user stopped it.

        An answer that was stopped or broke off stays in the conversation as far as it came.
        A message without any answer does not, so that it can be sent again.
        """
        from ollama_dist.client import path
        from ollama_dist.markdown import MarkdownStream
        from ollama_dist.resume import resumable

        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        finished = True
        try:
            with (
                MarkdownStream(self.session.out) as screen,
                resumable(self.session, path("chat"), self.request()) as items,
            ):
                for piece in contents(items):
                    said.append(piece)
                    screen.feed(piece)
        except KeyboardInterrupt:
            finished = False
            self.session.out.print("(stopped)", style="dim")
        except CliError as problem:
            fail(problem)
        whole = "".join(said)
        if whole:
            self.messages.append({"role": "assistant", "content": whole})
        else:
            self.messages.pop()
        print()
        return finished


def read_message() -> str:
    '''One typed message: a line, or several between `"""`.'''
    line = input(">>> ")
    if not line.lstrip().startswith('"""'):
        return line
    lines = [line.lstrip()[3:]]
    while not lines[-1].rstrip().endswith('"""'):
        lines.append(input("... "))
    lines[-1] = lines[-1].rstrip()[:-3]
    return "\n".join(lines)


@contextlib.contextmanager
def line_editing() -> Iterator[None]:
    """Edit lines with readline and keep them between calls, in a file of the user's own."""
    try:
        import readline
    except ImportError:  # some builds of Python have none: typing works without it
        yield
        return
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    file = Path(base) / "ollama-dist" / "history"
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        readline.read_history_file(file)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(file)
