"""What a model says of itself, as `show` tells it at each surface."""

from typing import Any

import msgspec

from ollamad.core.description import Description
from ollamad.core.state import Model

MAX_SHOWN_ITEMS = 5  # of an array in `model_info`, unless it is to be verbose; as in Ollama


def shown_texts(model: Model, description: Description) -> dict[str, Any]:
    """Its texts, those that it has."""
    parameters = parameter_lines(description.parameters)
    shown: dict[str, Any] = {
        "license": "\n".join(description.licenses),
        "modelfile": modelfile(model, description),
        "parameters": "\n".join(f"{name:<30} {value}" for name, value in parameters),
        "template": description.template,
        "system": description.system,
        "messages": [
            {"role": message.role, "content": message.content} for message in description.messages
        ],
    }
    return {name: value for name, value in shown.items() if value} | description.config


def parameter_lines(parameters: dict[str, Any]) -> list[tuple[str, str]]:
    """Each parameter as a Modelfile has it; lists stand on a line for each item."""
    lines = []
    for name, value in parameters.items():
        for item in value if isinstance(value, list) else [value]:
            lines.append((name, msgspec.json.encode(item).decode()))
    return lines


def modelfile(model: Model, description: Description) -> str:
    """A Modelfile that makes this model of itself, as a beginning for another one."""
    lines = [
        "# A Modelfile to build a new model on this one.",
        f"FROM {model.name}",
    ]
    if description.template:
        lines.append(f'TEMPLATE """{description.template}"""')
    if description.system:
        lines.append(f'SYSTEM """{description.system}"""')
    for name, value in parameter_lines(description.parameters):
        lines.append(f"PARAMETER {name} {value}")
    for message in description.messages:
        plain = message.content.isprintable() and not message.content.startswith('"')
        content = message.content if plain else f'"""{message.content}"""'
        lines.append(f"MESSAGE {message.role} {content}")
    for text in description.licenses:
        lines.append(f'LICENSE """{text}"""')
    for name, value in description.config.items():
        lines.append(f"{name.upper()} {value}")
    return "\n".join(lines) + "\n"


def model_info(description: Description, *, verbose: bool) -> dict[str, Any]:
    """The header of its file, without the longest arrays unless `verbose`."""
    info = {
        key: []
        if isinstance(value, list) and len(value) > MAX_SHOWN_ITEMS and not verbose
        else value
        for key, value in description.metadata.items()
        if key not in ("general.name", "tokenizer.chat_template")
    }
    return info | {"general.parameter_count": description.parameter_count}
