"""Reads a Containerfile and says what is wrong with it, without an engine to build it.

Instructions, flags and forms are those of Docker's reference; only what ours uses is known. It
knows nothing of what a command in it does.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Each instruction with its flags, and whether its arguments may be a JSON list.
FLAGS = {
    "ARG": set(),
    "CMD": set(),
    "COPY": {"from", "chown", "chmod"},
    "ENTRYPOINT": set(),
    "ENV": set(),
    "EXPOSE": set(),
    "FROM": {"platform"},
    "HEALTHCHECK": {"interval", "timeout", "start-period", "retries"},
    "LABEL": set(),
    "RUN": set(),
    "STOPSIGNAL": set(),
    "USER": set(),
    "VOLUME": set(),
    "WORKDIR": set(),
}
DURATION = re.compile(r"(\d+(ms|s|m|h))+")
VARIABLE = re.compile(r"(?<!\\)\$\{?([A-Za-z_]\w*)")


class Wrong(Exception):
    """The file has a mistake; says where."""


@dataclass(frozen=True)
class Instruction:
    line: int
    name: str
    flags: dict[str, str]
    rest: str

    @property
    def words(self) -> list[str]:
        """The arguments: of a JSON list, or divided at spaces."""
        if not self.rest.startswith("["):
            return self.rest.split()
        try:
            words = json.loads(self.rest)
        except ValueError as error:
            raise Wrong(f"line {self.line}: {error}") from None
        if not words or not all(isinstance(word, str) for word in words):
            raise Wrong(f"line {self.line}: not a list of strings")
        return list(words)


@dataclass
class Stage:
    base: str
    name: str = ""
    instructions: list[Instruction] = field(default_factory=list)

    def last(self, name: str) -> Instruction:
        """The one that counts."""
        return [one for one in self.instructions if one.name == name][-1]


def read(path: Path, context: Path) -> list[Stage]:
    """The stages of a file whose COPY takes from `context`.

    Raises:
      Wrong: something in it no engine would take.
    """
    stages: list[Stage] = []
    arguments: set[str] = set()  # of the stage, and before the first one
    for one in instructions(path.read_text()):
        if one.name == "FROM":
            match one.words:
                case [base]:
                    stages.append(Stage(base))
                case [base, as_, name] if as_.upper() == "AS":
                    stages.append(Stage(base, name))
                case _:
                    raise Wrong(f"line {one.line}: FROM IMAGE [AS NAME]")
            known(one, arguments)
        elif one.name == "ARG":
            arguments.add(one.rest.partition("=")[0])
        elif not stages:
            raise Wrong(f"line {one.line}: {one.name} before FROM")
        else:
            check(one, stages, context, arguments)
        if stages:
            stages[-1].instructions.append(one)
    if not stages:
        raise Wrong("no FROM")
    return stages


def instructions(text: str) -> Iterator[Instruction]:
    """The lines as instructions; comments are left out, also between continued lines."""
    begun, parts = 0, list[str]()
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("#") or not (line.strip() or parts):
            continue
        begun = begun if parts else number
        parts.append(line.strip().removesuffix("\\"))
        if line.rstrip().endswith("\\"):
            continue
        yield instruction(begun, " ".join(parts).strip())
        parts = []
    if parts:
        raise Wrong(f"line {begun}: the file ends in a continued line")


def instruction(line: int, text: str) -> Instruction:
    name, _, rest = text.partition(" ")
    if name not in FLAGS:
        raise Wrong(f"line {line}: there is no instruction {name!r}")
    flags = {}
    rest = rest.strip()
    while match := re.match(r"--([a-z-]+)=(\S+)\s+", rest):
        if match[1] not in FLAGS[name]:
            raise Wrong(f"line {line}: {name} has no --{match[1]}")
        flags[match[1]] = match[2]
        rest = rest[match.end() :]
    if not rest:
        raise Wrong(f"line {line}: {name} of nothing")
    return Instruction(line, name, flags, rest)


def check(one: Instruction, stages: list[Stage], context: Path, arguments: set[str]) -> None:
    match one.name:
        case "RUN" if not one.rest.startswith("["):
            shell(one, one.rest)
        case "CMD" | "ENTRYPOINT" | "VOLUME":
            _ = one.words
        case "COPY":
            copied(one, stages, context)
        case "EXPOSE":
            if not all(re.fullmatch(r"\d+(/tcp|/udp)?", word) for word in one.words):
                raise Wrong(f"line {one.line}: EXPOSE PORT[/PROTOCOL]")
        case "HEALTHCHECK":
            for name, value in one.flags.items():
                if name != "retries" and not DURATION.fullmatch(value):
                    raise Wrong(f"line {one.line}: --{name}={value} is no time")
            health_command(one)
        case "LABEL" | "ENV":
            if not re.fullmatch(r'([\w.]+=("[^"]*"|[^\s"]+)\s*)+', one.rest):
                raise Wrong(f"line {one.line}: {one.name} KEY=VALUE")
        case "WORKDIR" | "USER" | "STOPSIGNAL":
            if len(one.words) != 1:
                raise Wrong(f"line {one.line}: {one.name} takes one word")
            known(one, arguments)


def known(one: Instruction, arguments: set[str]) -> None:
    for name in VARIABLE.findall(one.rest):
        if name not in arguments:
            raise Wrong(f"line {one.line}: ${name} is no ARG")


def shell(one: Instruction, script: str) -> None:
    done = subprocess.run(["sh", "-n", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Wrong(f"line {one.line}: {done.stderr.strip()}")


def copied(one: Instruction, stages: list[Stage], context: Path) -> None:
    *sources, target = one.words
    if not sources:
        raise Wrong(f"line {one.line}: COPY SOURCE... TARGET")
    if len(sources) > 1 and not target.endswith("/"):
        raise Wrong(f"line {one.line}: several sources need a directory")
    origin = one.flags.get("from")
    if origin is None:
        for source in sources:
            if source != "." and not list(context.glob(source.lstrip("/"))):
                raise Wrong(f"line {one.line}: there is no {source}")
    elif origin not in {stage.name for stage in stages[:-1]}:
        raise Wrong(f"line {one.line}: there is no stage {origin!r}")


def health_command(one: Instruction) -> list[str]:
    """What a HEALTHCHECK runs."""
    word, _, command = one.rest.partition(" ")
    if word != "CMD":
        raise Wrong(f"line {one.line}: HEALTHCHECK CMD ...")
    return Instruction(one.line, "CMD", {}, command.strip()).words
