"""One runner process: started, waited for until its model is loaded, listened to, ended."""

import collections
import logging
import math
import re
import signal
import subprocess
import time
from pathlib import Path

import trio

from ollamad.core.inference import Failed
from ollamad.engine.assembly import Gap
from ollamad.engine.llama_client import LlamaClient, RunnerGone, RunnerRefused, RunnerStalled
from ollamad.engine.memory import Used
from ollamad.engine.spec import ModelSpec, RunnerConfig

LOG_LINES = 50  # kept of a runner's output, for error messages
MAX_LOG_LINE = 500  # characters
READY_POLL_S = 0.01  # first pause between two questions whether the model is loaded
MAX_READY_POLL_S = 0.1
LAST_OUTPUT_S = 0.5  # a dead runner's pipe is at its end, unless a child of it lives on
END_S = 5.0  # for the kernel to take a killed process's memory back
REPORTED_LINES = 10  # of the output, in an error's details
STALL_LOOKS = 4  # at a silent runner, before it has been silent for too long
MAX_STALL_LOOK_S = 5.0
# A runner that works, but says nothing, gets so many times as long: a batch of a large model on a
# slow machine takes minutes, an endless loop for ever.
BUSY_PATIENCE = 10

# What llama.cpp says of files that it does not take. Some that are published for Ollama need
# changes that Ollama has made to its own copy.
_REFUSALS = (
    (
        re.compile(r"unknown model architecture: '([^']*)'"),
        "this engine does not know the architecture {0}: it is newer than the engine, or Ollama's "
        "own; take a newer engine, or the model as GGUF from elsewhere",
    ),
    (
        re.compile(r"(?:missing tensor|wrong (?:number|shape) of tensors?|tensor '[^']*' has wrong|"
                   r"key not found in model|done_getting_tensors|invalid vocab)"),
        "stock llama.cpp refuses the file; some that are published for Ollama need its own "
        "patches: take the model as GGUF from elsewhere",
    ),
)  # fmt: skip

log = logging.getLogger(__name__)


class Runner:
    """A runner process and the way to talk to it.

    `exited` is set when the process is gone. The socket's path must be free and short enough.
    """

    def __init__(
        self,
        spec: ModelSpec,
        config: RunnerConfig,
        command: tuple[str, ...],
        socket_path: Path,
        load_timeout_s: float,
        stall_timeout_s: float = math.inf,
    ) -> None:
        self.client = LlamaClient(socket_path)
        self.exited = trio.Event()
        self.empty_prompt: list[int] = []  # what the tokenizer makes of nothing: mostly BOS
        self.spellings: dict[Gap, tuple[int, ...]] = {}  # ids that were looked up before
        self.bos_text: str | None = None  # of that, if it is one token; once it was asked for
        self.media_marker = ""  # for an image in a prompt, once it was asked for
        self.infill: tuple[int, int, int] | None = None  # tokens for filling in, if it has them,
        self.infill_known = False  # which was looked up
        self.schemas: set[bytes] = set()  # JSON schemas that it has proved to enforce
        self.crashed = False  # ended by itself after it was ready
        self._name = spec.name
        self._argv = [*command, "--socket", str(socket_path), *config.arguments()]
        self._socket_path = socket_path
        self._load_timeout_s = load_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._embeds_only = config.embedding
        self._hung_s: float | None = None
        self._asked_to_stop = False
        self._ended_by_us = False
        self._over = trio.Event()  # asked to stop, or ended by itself
        self._output_read = trio.Event()
        self._output: collections.deque[str] = collections.deque(maxlen=LOG_LINES)
        self._process: trio.Process | None = None

    @property
    def over(self) -> bool:
        """Whether the process has ended or was asked to."""
        return self._over.is_set()

    def stop(self) -> None:
        """Ask the process to end; `exited` tells when it has."""
        self._asked_to_stop = True
        self._over.set()

    async def run(self, *, task_status: trio.TaskStatus[Failed | None]) -> None:
        """Start the process and keep it until `stop`, its own end, or cancellation.

        Reports as started when the model is loaded, or with the reason why it cannot be.
        """
        started = time.perf_counter()
        try:
            process = await trio.lowlevel.open_process(
                self._argv,
                stdin=subprocess.PIPE,  # its closing ends the runner, however the daemon ends
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's ^C is for the daemon alone
            )
        except OSError as error:
            self.exited.set()
            message = f"the runner {self._argv[0]!r} cannot be started: {error}"
            task_status.started(Failed(code="LOAD_FAILED", message=message))
            return
        self._process = process
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_output, process)
                nursery.start_soon(self._watch, process)
                failure = await self._load()
                if failure is None:
                    log.info("%s loaded in %.1f s", self._name, time.perf_counter() - started)
                    task_status.started(None)
                    nursery.start_soon(self._end_if_it_hangs, process.pid)
                    await self._over.wait()
                    self.crashed = not self._asked_to_stop
                else:
                    task_status.started(failure)
                nursery.cancel_scope.cancel()
        finally:
            await self._end(process)

    async def died(self, lost: RunnerGone) -> Failed:
        """What a request hears that lost its connection; waits a moment for the reason."""
        if not isinstance(lost, RunnerStalled):
            with trio.move_on_after(END_S):
                await self._over.wait()
        reason = self.describe_end() if self.over else str(lost)
        return self._failure("RUNNER_DIED", "stopped in the middle", reason)

    def anonymous_bytes(self) -> int:
        """Bytes of memory that come free when the process ends; a mapped file is not among them."""
        return self.used().anonymous

    def used(self) -> Used:
        """What the process takes now, without what lies on GPUs."""
        if self._process is None:
            return Used(0)
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:  # it has just ended, or this is not Linux
            return Used(0)
        found = {name: 1024 * int(kib) for name, kib in _RESIDENT.findall(status)}
        anonymous = found.get("Anon", 0) + found.get("Shmem", 0)
        return Used(anonymous, found.get("File", 0))

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def describe_end(self) -> str:
        """Why the process ended, as far as it is known, in words for people."""
        status = None if self._process is None else self._process.returncode
        if self._hung_s is not None:
            return f"it hung: no sign of life for {self._hung_s:.3g} s, so it was killed"
        if status is None or self._ended_by_us:
            return "it was told to stop"
        if status == -signal.SIGKILL:
            return "it was killed, as the system does when memory runs out"
        if status < 0:
            return f"it crashed with {signal.Signals(-status).name}"
        return f"it ended with exit code {status}"

    def errors(self) -> list[str]:
        """The last lines of output that are errors, each once; any lines if there is none."""
        return _errors(list(self._output))

    @property
    def refuses_file(self) -> bool:
        """Whether the engine has said that it does not take the model's file at all."""
        return bool(_meaning(self.errors()))

    async def _load(self) -> Failed | None:
        pause_s = READY_POLL_S
        with trio.move_on_after(self._load_timeout_s):
            while not self._over.is_set():
                try:
                    if await self.client.is_ready():
                        self.empty_prompt = await self.client.tokenize(
                            "", add_special=True, parse_special=False
                        )
                        return await self._probe()
                except (RunnerGone, RunnerRefused) as error:
                    log.debug("%s: %s", self._name, error)
                with trio.move_on_after(pause_s):
                    await self._over.wait()
                pause_s = min(MAX_READY_POLL_S, 1.5 * pause_s)
        if self._over.is_set():
            reason = self.describe_end()
        else:
            reason = f"it was not ready after {self._load_timeout_s:g} s"
        return self._failure("LOAD_FAILED", "could not be loaded", reason)

    async def _probe(self) -> Failed | None:
        """See whether the model works: some load, and fail or crash with the first token."""
        try:
            tokens = await self.client.tokenize("a", add_special=True, parse_special=False)
            tokens = tokens[-1:] or [0]
            if self._embeds_only:
                await self.client.embed([tokens])
            else:
                await self.client.probe_text(tokens)
        except RunnerRefused as refusal:
            return self._failure("LOAD_FAILED", "was loaded, but does not work", str(refusal))
        except RunnerGone:
            with trio.move_on_after(END_S):
                await self._over.wait()
            reason = self.describe_end()
            return self._failure("LOAD_FAILED", "was loaded, but does not work", reason)
        return None

    async def _end_if_it_hangs(self, pid: int) -> None:
        """Kill the process when it owes answers and shows no sign of life.

        Signs are: anything that the decode loop says to anybody, CPU time, memory that is read from
        the disk. A request that hears nothing more while others are served is given up alone; one
        that has heard no token yet may have to wait for their prompts.
        """
        limit_s = self._stall_timeout_s
        patient_s = BUSY_PATIENCE * limit_s
        seen = _vitals(pid)
        alive_at = trio.current_time()
        while True:
            await trio.sleep(min(limit_s / STALL_LOOKS, MAX_STALL_LOOK_S))
            vitals, before = _vitals(pid), seen
            seen = vitals
            now = trio.current_time()  # one for all: a little later somebody may be overdue
            silent_s = self.client.silence_s(now)
            if vitals != before or silent_s == 0:
                alive_at = now
            still_s = min(silent_s, now - alive_at)
            # Where nobody hears anything it is the runner that takes so long.
            next_s = limit_s if silent_s < limit_s else patient_s
            overdue = self.client.overdue(now, next_s, patient_s)
            if still_s >= limit_s or (overdue and silent_s >= patient_s):
                self._hung_s = silent_s
                self._over.set()
                return
            for wait in overdue:
                wait.abandon()
            if overdue:
                log.warning(
                    "%d requests to %s hear nothing and are given up", len(overdue), self._name
                )

    async def _read_output(self, process: trio.Process) -> None:
        assert process.stdout is not None
        rest = b""
        async for data in process.stdout:
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[:MAX_LOG_LINE]
            for line in lines:
                text = line[:MAX_LOG_LINE].decode(errors="replace").rstrip()
                self._output.append(text)
                log.debug("%s: %s", self._name, text)
        self._output_read.set()

    async def _watch(self, process: trio.Process) -> None:
        await process.wait()
        with trio.move_on_after(LAST_OUTPUT_S):
            await self._output_read.wait()
        self._over.set()

    async def _end(self, process: trio.Process) -> None:
        """Kill the process: it holds nothing that would want a farewell."""
        self._ended_by_us = process.returncode is None
        self._over.set()
        self.client.close()
        with trio.move_on_after(END_S, shield=True):
            process.kill()
            await process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    await pipe.aclose()
        self._socket_path.unlink(missing_ok=True)
        self.exited.set()

    def _failure(self, code: str, what: str, reason: str) -> Failed:
        lines = self.errors()
        # The first error is the cause, the others are mostly its consequences.
        cause = f" ({lines[0]})" if lines else ""
        if code == "LOAD_FAILED" and (meaning := _meaning(lines)):
            cause += f": {meaning}"
        message = f"the runner of {self._name} {what}: {reason}{cause}"
        return Failed(code=code, message=message, details={"log": lines})


_RESIDENT = re.compile(r"^Rss(Anon|File|Shmem):\s+(\d+) kB", re.MULTILINE)


def _vitals(pid: int) -> tuple[str, ...]:
    """What grows while a process works or waits for the disk: major faults and CPU time."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ()
    fields = stat.rpartition(")")[2].split()  # the program's name may have spaces
    return tuple(fields[index] for index in (9, 11, 12))


def explained_refusal(output: list[str]) -> str:
    """Why an engine does not take a file, from all that it said."""
    lines = _errors(output[-LOG_LINES:])
    meaning = _meaning(lines)
    return f"{lines[0][:MAX_LOG_LINE]}: {meaning}" if meaning else lines[0][:MAX_LOG_LINE]


def _errors(output: list[str]) -> list[str]:
    errors = [_without_prefix(line) for line in output if " E " in line]
    return list(dict.fromkeys(errors or output))[-REPORTED_LINES:]


def _meaning(lines: list[str]) -> str:
    """What the engine's refusal of a file means for who wants to run it."""
    for pattern, meaning in _REFUSALS:
        for line in lines:
            if (found := pattern.search(line)) is not None:
                return meaning.format(*found.groups())
    return ""


def _without_prefix(line: str) -> str:
    """The line without llama.cpp's time and level (`0.00.014.525 E `)."""
    return line.partition(" E ")[2].strip()
