"""Reads a Modelfile, in Ollama's grammar. Pure: what a path names is found elsewhere.

    FROM llama3.2                    a model, a GGUF file (./x.gguf), or a blob (@sha256:…)
    ADAPTER ./lora.gguf
    PARAMETER temperature 0.7        `stop` may be repeated
    TEMPLATE \"\"\"{{ .Prompt }}\"\"\"   several lines stand in triple quotes
    SYSTEM You are brief.
    LICENSE \"\"\"…\"\"\"                may be repeated
    MESSAGE user Hello               system, user or assistant
    REQUIRES 0.12.0                  and RENDERER, PARSER: kept for those who know them

Instructions are written in any case; `#` begins a line that says nothing.
"""

import re
from typing import Any, Final

import msgspec

from ollamad.core.description import Changes
from ollamad.core.inference import Message, Options
from ollamad.core.names import nearest

MAX_MODELFILE_BYTES: Final = 1 << 20  # real ones have some kB, with licences some dozen

_INSTRUCTION: Final = re.compile(r"[ \t]*([A-Za-z]+)(?:[ \t]+|$)")
_DIGEST: Final = re.compile(r"@?sha256[:-]([0-9a-f]{64})")
_ROLES: Final = ("system", "user", "assistant")
_CONFIG: Final = ("RENDERER", "PARSER", "REQUIRES")
_QUOTES: Final = '"""'
# Of older Ollamas; without effect today, here as there.
_OLD_PARAMETERS: Final = frozenset(
    {
        "f16_kv", "low_vram", "logits_all", "vocab_only", "use_mlock", "use_mmap", "numa",
        "main_gpu", "num_gqa", "penalize_newline", "rope_frequency_base", "rope_frequency_scale",
        "tfs_z", "embedding_only",
    }
)  # fmt: skip


class ModelfileError(ValueError):
    """The Modelfile cannot be understood; the message names the line."""


class Modelfile(msgspec.Struct, frozen=True):
    """What a Modelfile says. `bases` and `adapters` as they are written."""

    bases: tuple[str, ...]  # of FROM, in order; weights, then perhaps a projector
    adapters: tuple[str, ...] = ()
    changes: Changes = Changes()


def parse_modelfile(text: str) -> Modelfile:
    """Read a Modelfile.

    Raises:
      ModelfileError: it is none.
    """
    if len(text) > MAX_MODELFILE_BYTES:
        raise ModelfileError(f"a Modelfile has at most {MAX_MODELFILE_BYTES:,} characters")
    bases: list[str] = []
    adapters: list[str] = []
    licenses: list[str] = []
    messages: list[Message] = []
    parameters: dict[str, Any] = {}
    texts = {"TEMPLATE": "", "SYSTEM": ""}
    config: dict[str, str] = {}
    for line, name, value in _instructions(text):
        match name:
            case "FROM":
                bases.append(value)
            case "ADAPTER":
                adapters.append(value)
            case "LICENSE":
                licenses.append(value)
            case "MESSAGE":
                role, _, content = value.partition(" ")
                if role not in _ROLES:
                    roles = ", ".join(_ROLES)
                    raise ModelfileError(f"line {line}: the role in MESSAGE must be one of {roles}")
                messages.append(Message(role, _unquoted(content.strip(), line)))
            case "PARAMETER":
                key, _, written = value.partition(" ")
                _add_parameter(parameters, key.lower(), _unquoted(written.strip(), line), line)
            case "TEMPLATE" | "SYSTEM":
                texts[name] = value
            case _:
                config[name.lower()] = value
    if not bases:
        raise ModelfileError("a Modelfile needs a FROM: a model, or a GGUF file")
    return Modelfile(
        tuple(bases),
        tuple(adapters),
        Changes(
            template=texts["TEMPLATE"],
            system=texts["SYSTEM"],
            parameters=parameters,
            messages=tuple(messages),
            licenses=tuple(licenses),
            config=config,
        ),
    )


def is_path(text: str) -> bool:
    """Whether FROM or ADAPTER names a file rather than a model, as it is written."""
    return text.startswith(("/", "./", "../", "~")) or text.lower().endswith(
        (".gguf", ".bin", ".safetensors")
    )


def digest_of(text: str) -> str | None:
    """The blob that FROM or ADAPTER names, if it names one."""
    match = _DIGEST.fullmatch(text)
    return f"sha256:{match[1]}" if match else None


def _instructions(text: str) -> list[tuple[int, str, str]]:
    """Each instruction with its line, its name in upper case, and its value."""
    found = []
    lines = text.replace("\r\n", "\n").split("\n")
    number = 0
    while number < len(lines):
        start, line = number + 1, lines[number]
        number += 1
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _INSTRUCTION.match(line)
        name = match[1].upper() if match else ""
        if match is None or name not in _INSTRUCTIONS:
            word = line.split()[0][:40]
            close = nearest(word, [each.lower() for each in _INSTRUCTIONS])
            hint = f"; did you mean {close[0].upper()}?" if close else ""
            raise ModelfileError(f"line {start}: {word!r} is no instruction of a Modelfile{hint}")
        value = line[match.end() :].strip()
        # The quotes may come after a role or a parameter's name, too.
        opened = value.find(_QUOTES)
        if opened >= 0 and (opened == 0 or name in ("MESSAGE", "PARAMETER")):
            rest = value[opened + len(_QUOTES) :]
            while _QUOTES not in rest:
                if number == len(lines):
                    raise ModelfileError(f'line {start}: the """ of {name} are never closed')
                rest += "\n" + lines[number]
                number += 1
            inner, _, after = rest.partition(_QUOTES)
            if after.strip():
                raise ModelfileError(f'line {number}: nothing may follow the closing """')
            value = value[:opened] + (inner if opened == 0 else f"{_QUOTES}{inner}{_QUOTES}")
        elif name not in ("MESSAGE", "PARAMETER"):
            value = _unquoted(value, start)
        if not value.strip():
            raise ModelfileError(f"line {start}: {name} says nothing")
        found.append((start, name, value))
    return found


_INSTRUCTIONS: Final = (
    "FROM", "ADAPTER", "PARAMETER", "TEMPLATE", "SYSTEM", "LICENSE", "MESSAGE", *_CONFIG,
)  # fmt: skip


def _unquoted(value: str, line: int) -> str:
    if value.startswith(_QUOTES):
        return value.removeprefix(_QUOTES).removesuffix(_QUOTES)
    if value.startswith('"'):
        if len(value) < 2 or not value.endswith('"'):
            raise ModelfileError(f'line {line}: the " is never closed')
        return value[1:-1]
    return value


def _add_parameter(parameters: dict[str, Any], key: str, value: str, line: int) -> None:
    if key in _OLD_PARAMETERS:
        return
    fields = {field.name: field.type for field in msgspec.structs.fields(Options)}
    if key not in fields:
        close = nearest(key, fields)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ModelfileError(f"line {line}: there is no parameter {key!r}{hint}")
    if key == "stop":
        parameters[key] = [*parameters.get(key, []), value]
        return
    try:
        parameters[key] = msgspec.convert(value, fields[key], strict=False)
    except msgspec.ValidationError:
        raise ModelfileError(f"line {line}: {key} cannot be {value!r}") from None
    if parameters[key] is None:
        raise ModelfileError(f"line {line}: {key} needs a value")
