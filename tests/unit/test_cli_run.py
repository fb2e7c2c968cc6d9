"""Answers in ollama-dist: streamed, piped, broken off, and a conversation on a terminal."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import cli_fixtures
from tests.fakes.cli_fixtures import WAIT_S, Cli, Terminal, start_piped
from tests.fakes.fake_api import ALPHA, BETA, GAMMA, FakeApi, error, node

cli, fake_api, home = cli_fixtures.cli, cli_fixtures.fake_api, cli_fixtures.home

WHOLE = "Hello, world\u2028!"


def unnamed(fake_api: FakeApi) -> dict[str, object]:
    """The last request without the name that it was given."""
    return {key: value for key, value in fake_api.requests[-1].json.items() if key != "request_id"}


def test_generate_streams_plain_text(cli: Cli, fake_api: FakeApi) -> None:
    result = cli("generate", "m", "say", "hello", stdin="")
    assert result.exit_code == 0
    assert result.stdout == f"{WHOLE}\n"
    asked = fake_api.asked("POST", "/generate")[0].json
    assert len(asked.pop("request_id")) == 32
    assert asked == {
        "model": "m",
        "prompt": "say hello",
        "stream": True,
    }


def test_generate_passes_its_options_on(cli: Cli, fake_api: FakeApi) -> None:
    options = ("--system", "Be brief.", "--option", "top_k=1", "--option", "stop=x", "--raw")
    assert cli("generate", "m", "hi", *options, "--format", "json").exit_code == 0
    assert unnamed(fake_api) == {
        "model": "m",
        "prompt": "hi",
        "system": "Be brief.",
        "options": {"top_k": 1, "stop": ["x"]},
        "raw": True,
        "format": "json",
        "stream": True,
    }
    assert cli("generate", "m", "hi", "--format", '{"type": "object"}').exit_code == 0
    assert fake_api.requests[-1].json["format"] == {"type": "object"}


def test_answers_as_data_are_the_apis_own(cli: Cli, fake_api: FakeApi) -> None:
    data = json.loads(cli("generate", "m", "hi", "-o", "json").stdout)
    assert data["response"] == WHOLE
    assert data["eval_count"] == 4
    assert fake_api.requests[-1].json["stream"] is False
    data = json.loads(cli("run", "m", "hi", "-o", "json").stdout)
    assert data["message"] == {"role": "assistant", "content": WHOLE}


def test_run_with_a_prompt_prints_one_answer(cli: Cli, fake_api: FakeApi) -> None:
    result = cli("run", "m", "hi", "--system", "Be brief.", "--option", "seed=7")
    assert result.exit_code == 0
    assert result.stdout == f"{WHOLE}\n"
    assert unnamed(fake_api) == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi"},
        ],
        "options": {"seed": 7},
        "stream": True,
    }


def test_piped_input_comes_before_the_prompt(cli: Cli, fake_api: FakeApi) -> None:
    cli("run", "m", "Sum it up.", stdin="A long text.\n")
    assert fake_api.requests[-1].json["messages"][0]["content"] == "A long text.\nSum it up."
    cli("run", "m", stdin="Only this.\n")
    assert fake_api.requests[-1].json["messages"][0]["content"] == "Only this."
    cli("embed", "m", stdin="And this.")
    assert fake_api.requests[-1].json == {"model": "m", "prompt": "And this.", "stream": False}


def test_an_error_in_band_follows_what_came_before_it(cli: Cli, fake_api: FakeApi) -> None:
    fake_api.stream_error = "the runner died"
    for name in ("run", "generate"):
        result = cli(name, "m", "hi")
        assert result.exit_code == 1
        assert result.stdout == f"{WHOLE}\n"
        assert result.stderr == "Error: the runner died\n"


@pytest.mark.parametrize(
    ("how", "words"), [("cut_stream", "was lost"), ("end_early", "broke off before its end")]
)
def test_an_answer_that_breaks_off_is_no_success(
    cli: Cli, fake_api: FakeApi, how: str, words: str
) -> None:
    setattr(fake_api, how, True)
    fake_api.nodes = []  # there is nobody else to ask
    result = cli("generate", "m", "hi")
    assert result.exit_code == 1
    assert result.stdout == f"{WHOLE}\n"
    assert words in result.stderr


@pytest.fixture
def other_api() -> Iterator[FakeApi]:
    with FakeApi() as other:
        yield other


@pytest.mark.parametrize("command", ["generate", "run"])
def test_an_answer_goes_on_at_another_node(
    cli: Cli, fake_api: FakeApi, other_api: FakeApi, command: str
) -> None:
    """The node dies after two of four tokens; another one has the rest."""
    other_api.pieces = list(fake_api.pieces)
    fake_api.pieces = fake_api.pieces[:2]
    fake_api.cut_stream = True
    own, other = fake_api.url.partition("//")[2], other_api.url.partition("//")[2]
    fake_api.nodes = [
        node(ALPHA, "alpha", address=own),
        node(BETA, "beta", address=other),
        node(GAMMA, "gamma", address="127.0.0.1:1", status="offline"),
    ]
    result = cli(command, "m", "hi", stdin="")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{WHOLE}\n"
    assert f"going on at http://{other}" in result.stderr
    [first], [second] = (
        api.asked("POST", f"/{'chat' if command == 'run' else command}")
        for api in (fake_api, other_api)
    )
    position = {"resume_from": 2, "received": "Hello, "}
    assert second.json == first.json | position
    assert first.token == second.token


def test_where_no_token_ends_what_was_shown_is_left_out(
    cli: Cli, fake_api: FakeApi, other_api: FakeApi
) -> None:
    """The other node cut its answer otherwise: all of it is asked for, and shown from there on."""
    fake_api.pieces = ["Hello, w"]
    fake_api.cut_stream = True
    fake_api.nodes = [node(BETA, "beta", address=other_api.url.partition("//")[2])]
    mismatch = error(409, "no part ends there", "RESUME_MISMATCH")
    other_api.refuse_once[("POST", "/generate")] = mismatch
    result = cli("generate", "m", "hi")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{WHOLE}\n"
    assert "resume_from" not in other_api.requests[-1].json


@pytest.mark.parametrize("command", ["generate", "run"])
@pytest.mark.parametrize("shown", [0, 2])
@pytest.mark.parametrize("thoughts", [[], ["Hm, ", "so."]])
def test_what_no_token_tells_is_asked_for_whole(
    cli: Cli, fake_api: FakeApi, other_api: FakeApi, command: str, shown: int, thoughts: list[str]
) -> None:
    """Before the first text, and behind thoughts."""
    fake_api.pieces = fake_api.pieces[:shown]
    fake_api.thoughts = other_api.thoughts = thoughts
    fake_api.cut_stream = True
    fake_api.nodes = [node(BETA, "beta", address=other_api.url.partition("//")[2])]
    result = cli(command, "m", "hi", stdin="")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{WHOLE}\n"
    is_counted = shown > 0 and not thoughts
    assert ("resume_from" in other_api.requests[-1].json) == is_counted


@pytest.mark.parametrize("other", [["Hello", "! ", "It is I"], ["Hello"], []])
@pytest.mark.parametrize("thinks", [False, True])
def test_another_answer_is_an_error_not_wrong_text(
    cli: Cli, fake_api: FakeApi, other_api: FakeApi, other: list[str], thinks: bool
) -> None:
    fake_api.pieces = ["Hello, ", "wor"]
    fake_api.cut_stream = True
    fake_api.nodes = [node(BETA, "beta", address=other_api.url.partition("//")[2])]
    if thinks:
        fake_api.thoughts = ["Hm."]
    else:
        mismatch = error(409, "no part ends there", "RESUME_MISMATCH")
        other_api.refuse_once[("POST", "/generate")] = mismatch
    other_api.pieces = other
    result = cli("generate", "m", "hi")
    assert result.exit_code == 1
    assert result.stdout == "Hello, wor\n"
    assert "another answer" in result.stderr


def test_explain_shows_where_a_prompt_would_go(cli: Cli, fake_api: FakeApi) -> None:
    score = {
        "node_id": ALPHA, "node": "alpha", "chosen": True, "willing": True, "why_not": "",
        "loaded": True, "fits": True, "slots": 4, "in_use": 1, "pending_tokens": 30,
        "cached": 0.75, "uncached_tokens": 12, "prefill_rate": 210.4, "queue_s": 0.0,
        "load_s": 0.0, "time_to_first_token_s": 0.2,
    }  # fmt: skip
    away = score | {"node": "beta", "chosen": False, "willing": False, "why_not": "offline"}
    tight = score | {"node": "gamma", "chosen": False, "loaded": False, "fits": False}
    fake_api.explanation = {
        "policy": "prefix",
        "why": "its cache has most of the prompt",
        "scores": [score, tight, away],
    }
    result = cli("explain", "m", "why", "is", "it", "--system", "Be brief.")
    assert result.exit_code == 0
    first, second, third = result.stdout.splitlines()[1:4]
    assert first.split() == ["*", "alpha", "0.20", "s", "75", "%", "1/4", "42", "210", "loaded"]
    assert "no room" in second
    assert third.split()[1:3] == ["-", "75"]
    assert "prefix: its cache has most of the prompt" in result.stdout
    asked = fake_api.requests[-1].json
    assert [message["content"] for message in asked["messages"]] == ["Be brief.", "why is it"]
    data = json.loads(cli("explain", "m", "x", "-o", "json").stdout)
    assert data == fake_api.explanation


def test_embed(cli: Cli, fake_api: FakeApi) -> None:
    result = cli("embed", "m", "some", "words", stdin="")
    assert result.stdout == "2 numbers, length 1.000: 0.6000 -0.8000\n"
    data = json.loads(cli("embed", "m", "x", "-o", "json").stdout)
    assert data == {"model": "m", "embedding": [0.6, -0.8]}


def test_stop_unloads(cli: Cli, fake_api: FakeApi) -> None:
    assert cli("stop", "m").stdout == "m leaves memory as soon as its running answers have ended\n"
    asked = fake_api.asked("POST", "/generate")[-1].json
    assert asked == {"model": "m", "prompt": "", "keep_alive": 0, "stream": False}
    assert json.loads(cli("stop", "m", "-o", "json").stdout)["done"] is True
    fake_api.answers["POST", "/generate"] = error(404, "model 'no' not found", "MODEL_NOT_FOUND")
    assert cli("stop", "no").exit_code == 5


def test_a_pipe_gets_text_as_it_comes_and_ctrl_c_is_quiet(home: Path, fake_api: FakeApi) -> None:
    fake_api.hold_stream = True
    process = start_piped("--host", fake_api.url, "run", "m", "hi")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdin = None
    # The answer has not ended, and yet all that there is has come.
    assert process.stdout.read(len(WHOLE)) == WHOLE
    process.send_signal(signal.SIGINT)
    rest, complaints = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert complaints == ""
    assert "\x1b" not in rest
    assert fake_api.client_left.wait(WAIT_S)


def test_a_reader_that_leaves_is_no_traceback(home: Path, fake_api: FakeApi) -> None:
    fake_api.pieces = ["x" * 100_000] * 20
    process = start_piped("--host", fake_api.url, "generate", "m", "hi")
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.close()
    process.stdout.close()
    complaints = process.stderr.read()
    process.stderr.close()
    process.wait(WAIT_S)
    assert "Traceback" not in complaints


def test_a_conversation(home: Path, fake_api: FakeApi) -> None:
    fake_api.pieces = ["# Title\n\n", "some **bold** ", "words"]
    with Terminal("--host", fake_api.url, "run", "smollm2:135m") as terminal:
        terminal.expect(">>> ")
        terminal.type("first\r")
        terminal.expect("bold")
        terminal.expect(">>> ")
        terminal.type("/set temperature 0.2\r")
        terminal.expect("temperature is 0.2.")
        terminal.type("/set system Be brief.\r")
        terminal.expect("The system message is set.")
        terminal.expect(">>> ")
        terminal.type('"""two\r')
        terminal.expect("... ")
        terminal.type('lines"""\r')
        terminal.expect("bold")
        terminal.expect(">>> ")
        terminal.type("/clear\r")
        terminal.expect("forgotten")
        terminal.expect(">>> ")
        terminal.type("third\r")
        terminal.expect("bold")
        terminal.expect(">>> ")
        terminal.type("\x1b[A\r")
        terminal.expect("bold")
        terminal.expect(">>> ")
        terminal.type("/nope\r")
        terminal.expect("There is no /nope.")
        terminal.type("/help\r")
        terminal.expect("/bye")
        terminal.expect(">>> ")
        terminal.type("/bye\r")
        assert terminal.exit_code() == 0
    assert "**" not in terminal.seen
    bodies = [each.json for each in fake_api.asked("POST", "/chat")]
    answer = {"role": "assistant", "content": "# Title\n\nsome **bold** words"}
    assert bodies[0]["messages"] == [{"role": "user", "content": "first"}]
    assert "options" not in bodies[0]
    assert bodies[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first"},
        answer,
        {"role": "user", "content": "two\nlines"},
    ]
    assert bodies[1]["options"] == {"temperature": 0.2}
    assert bodies[2]["messages"][1:] == [{"role": "user", "content": "third"}]
    assert [each["content"] for each in bodies[3]["messages"][1:]] == [
        "third",
        answer["content"],
        "third",
    ]
    history = home / "state/ollama-dist/history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "first" in history.read_text()


def test_ctrl_c_stops_the_answer_and_again_leaves(home: Path, fake_api: FakeApi) -> None:
    fake_api.hold_stream = True
    fake_api.pieces = ["half an ", "answer"]
    with Terminal("--host", fake_api.url, "run", "smollm2:135m") as terminal:
        terminal.expect(">>> ")
        terminal.type("go\r")
        terminal.expect("answer")
        terminal.type("\x03")
        terminal.expect("(stopped)")
        assert fake_api.client_left.wait(WAIT_S)
        terminal.expect(">>> ")
        # What came stays in the conversation.
        fake_api.hold_stream = False
        terminal.type("go on\r")
        terminal.expect("answer")
        terminal.expect(">>> ")
        terminal.interrupt()
        terminal.expect("Ctrl-C again")
        terminal.expect(">>> ")
        terminal.interrupt()
        assert terminal.exit_code() == 130
    assert "Traceback" not in terminal.seen
    assert fake_api.asked("POST", "/chat")[1].json["messages"] == [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "half an answer"},
        {"role": "user", "content": "go on"},
    ]


def test_ctrl_c_at_once_after_a_stopped_answer_leaves(home: Path, fake_api: FakeApi) -> None:
    fake_api.hold_stream = True
    with Terminal("--host", fake_api.url, "run", "smollm2:135m") as terminal:
        terminal.expect(">>> ")
        terminal.type("go\r")
        terminal.expect("Hello")
        terminal.type("\x03")
        terminal.expect(">>> ")
        terminal.interrupt()
        assert terminal.exit_code() == 130


def test_ctrl_d_leaves_and_errors_do_not(home: Path, fake_api: FakeApi) -> None:
    fake_api.answers["POST", "/chat"] = error(503, "server busy")
    with Terminal("--host", fake_api.url, "run", "smollm2:135m") as terminal:
        terminal.expect(">>> ")
        terminal.type("first\r")
        terminal.expect("Error: server busy")
        terminal.expect(">>> ")
        fake_api.answers.clear()
        terminal.type("again\r")
        terminal.expect("Hello")
        terminal.expect(">>> ")
        terminal.type("\x04")
        assert terminal.exit_code() == 0
    # The message that had no answer is not sent again.
    assert fake_api.requests[-1].json["messages"] == [{"role": "user", "content": "again"}]


def test_a_conversation_with_an_unknown_model_does_not_begin(home: Path, fake_api: FakeApi) -> None:
    with Terminal("--host", fake_api.url, "run", "smolm2") as terminal:
        terminal.expect("Error: model 'smolm2' not found. Did you mean smollm2:135m?")
        assert terminal.exit_code() == 5


@pytest.mark.parametrize("flags", [("--no-color",), ()])
def test_colours_are_for_terminals_that_want_them(
    home: Path, fake_api: FakeApi, flags: tuple[str, ...]
) -> None:
    with Terminal("--host", fake_api.url, *flags, "models", "list") as terminal:
        terminal.expect("team/llama3.2:latest")
        assert terminal.exit_code() == 0
    assert ("\x1b[1m" in terminal.seen) == (not flags)


def test_the_terminal_is_safe_from_an_answer(home: Path, fake_api: FakeApi) -> None:
    fake_api.pieces = ["a\x1b]0;owned\x07b", "\x1b[2Jc"]
    for arguments in (("run", "m", "hi"), ("generate", "m", "hi")):
        with Terminal("--host", fake_api.url, *arguments) as terminal:
            terminal.expect("c")
            assert terminal.exit_code() == 0
        assert "\x1b]0;" not in terminal.seen
        assert "\x1b[2J" not in terminal.seen
        assert "b" in terminal.seen


def test_help_imports_neither_httpx_nor_rich(home: Path) -> None:
    program = (
        "import sys; sys.argv = ['ollama-dist', '--help']\n"
        "from ollama_dist.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'httpx', 'rich', 'trio', 'yaml', 'ollamad'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("[]\n")
