"""What an inference asks for and what it answers, between API, scheduler, peers and engines.

These structs travel between nodes (msgpack), so fields are added at the end with defaults and
never change their meaning.
"""

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "load", "unload"]


class Options(msgspec.Struct, frozen=True, omit_defaults=True):
    """Ollama's `options`. None means: the model's own parameter, else the default."""

    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    num_thread: int | None = None
    num_keep: int | None = None
    num_predict: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_last_n: int | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    stop: tuple[str, ...] | None = None
    engine: str | None = None  # one of core.weights.ENGINES; None: chosen from the file

    def over(self, base: "Options") -> "Options":
        """These options, with those of `base` where these say nothing."""
        return msgspec.structs.replace(
            base, **{k: v for k, v in msgspec.structs.asdict(self).items() if v is not None}
        )


class ToolCall(msgspec.Struct, frozen=True, tag="k", array_like=True):
    """A function that the model wants called. `arguments` is a JSON object as text."""

    name: str
    arguments: str = "{}"
    id: str = ""
    index: int = 0  # among the calls of one answer


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message of a chat."""

    role: str  # system, user, assistant or tool
    content: str
    thinking: str = ""  # of an assistant
    tool_calls: tuple[ToolCall, ...] = ()  # of an assistant
    tool_name: str = ""  # whose result this is, of role tool
    tool_call_id: str = ""
    images: tuple[bytes, ...] = ()  # files such as PNG or JPEG


class GenerateRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A text generation: a chat when `messages` is not None, else a completion of `prompt`."""

    model: str
    prompt: str = ""
    messages: tuple[Message, ...] | None = None
    system: str | None = None
    context: tuple[int, ...] = ()  # token ids to go on from (generate only)
    raw: bool = False  # no template, the prompt as it is
    format: str = ""  # "json", or a JSON schema as JSON text; empty: free text
    options: Options = Options()
    keep_alive_s: float | None = None  # None: the node's setting; negative: for ever
    truncate: bool = True  # a chat too long for the context drops its oldest messages
    resume: tuple[int, ...] = ()  # the answer's tokens so far: go on behind them
    default_seed: int = -1  # where neither the options nor the model say one; -1: any
    digest: str = ""  # of the model's manifest, so that all nodes mean the same
    failover: str = ""  # one of core.failover.MODES; empty: the entry node's setting
    tools: str = ""  # functions that the model may call, as JSON text in OpenAI's form
    tool_choice: str = ""  # auto, none or required; empty: auto
    think: str = ""  # on, off, low, medium or high; empty: the model has no such choice
    images: tuple[bytes, ...] = ()  # with `prompt`: files such as PNG or JPEG
    suffix: str = ""  # what comes behind the answer: the model fills in between
    template: str = ""  # in Ollama's language, instead of the model's own (generate only)
    logprobs: int = -1  # tell of each token how likely it and so many others were; -1: do not
    logit_bias: tuple[tuple[int, float], ...] = ()  # added to the logits of these token ids
    shift: bool = True  # an answer that fills the context goes on without the oldest tokens
    request_id: str = ""  # the client's own name for it; with one, the answer can be resumed
    resumed_text: str = ""  # what the tokens of `resume` say, if there is a `request_id`
    fingerprint: str = ""  # of who asked for what under the `request_id`, see core.transcripts
    parallel_calls: bool = True  # one answer may call several tools
    only_counts: bool = False  # tell how many tokens the prompt has, and do not answer
    said: str = ""  # the answer's text before `resume`, where nobody knows its tokens any more
    said_tokens: int = 0  # how many they were

    @property
    def has_images(self) -> bool:
        return bool(self.images) or any(message.images for message in self.messages or ())

    @property
    def only_loads(self) -> bool:
        """Whether there is nothing to answer: the model is loaded, or unloaded if `keep_alive_s`
        is 0."""
        if self.messages is not None:
            return not self.messages
        # Token ids that are read as they are make a prompt; else they are what came before it.
        return not (self.prompt or (self.raw and self.context))

    @property
    def only_unloads(self) -> bool:
        """Whether all that it asks is to drop the model from memory."""
        return self.only_loads and self.keep_alive_s == 0

    @property
    def generates(self) -> bool:
        """Whether tokens are asked for; else a model is loaded, or a prompt is counted."""
        return not (self.only_loads or self.only_counts)

    @property
    def is_parsed(self) -> bool:
        """Whether thoughts and calls are to be told apart from the text. Token ids are not known
        then."""
        is_plain = self.raw or self.context or self.template or self.suffix
        return bool(self.tools or self.think) and not is_plain


class EmbedRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Embeddings of some texts."""

    model: str
    inputs: tuple[str, ...]
    options: Options = Options()
    keep_alive_s: float | None = None
    truncate: bool = True


class Likelihood(msgspec.Struct, frozen=True, array_like=True):
    """How likely a token was (the natural logarithm), and what else could have stood there."""

    token: bytes  # its own text, which may be a part of a character
    logprob: float
    others: tuple["Likelihood", ...] = ()  # the likeliest first, itself among them


class Chunk(msgspec.Struct, frozen=True, tag="c", array_like=True):
    """A bit of generated text, and the ids of exactly the tokens that made it."""

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Likelihood, ...] = ()  # of those tokens, where they were asked for


class Thought(msgspec.Struct, frozen=True, tag="t", array_like=True):
    """A bit of what a model thinks before it answers."""

    text: str


class Failover(msgspec.Struct, frozen=True):
    """An answer that another node went on with."""

    from_node: str
    to_node: str
    reason: str  # the code of the failure
    mode: str
    after_tokens: int  # that the client had
    silence_ms: int  # from the last event of the one to the first of the other


class Finished(msgspec.Struct, frozen=True, tag="f", array_like=True):
    """The end of a generation, with the engine's own counts; durations in nanoseconds."""

    reason: FinishReason
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0
    context: tuple[int, ...] = ()  # prompt and answer as token ids (generate without raw)
    prompt_cached_count: int = 0  # tokens of the prompt that needed no evaluation
    failovers: tuple[Failover, ...] = ()  # in their order
    stop_text: str = ""  # of the options' `stop`, the one that ended it, where that is known


class Failed(msgspec.Struct, frozen=True, tag="e", array_like=True):
    """The generation ended with an error, before or after its first chunk."""

    code: str  # upper case, for programs
    message: str
    status: int = 500  # the HTTP status if nothing was sent yet
    details: dict[str, str | int | float | list[str]] = {}


Output = Chunk | Thought | ToolCall
Event = Output | Finished | Failed


class Embeddings(msgspec.Struct, frozen=True):
    """Vectors in the order of the inputs, each of the model's own width."""

    vectors: tuple[tuple[float, ...], ...]
    prompt_eval_count: int = 0
    total_duration: int = 0  # nanoseconds
    load_duration: int = 0


class InferenceError(Exception):
    """An inference cannot be served; carries what the client should see."""

    def __init__(self, failure: Failed) -> None:
        super().__init__(failure.message)
        self.failure = failure


class LoadedModel(msgspec.Struct, frozen=True):
    """A model in a runner's memory, as heartbeats and `/nodes` tell it."""

    name: str
    digest: str
    size: int  # bytes that the runner takes in all
    size_vram: int  # bytes of them on GPUs
    context_length: int  # tokens a slot
    expires_at: float  # Unix seconds; 0 when it stays for ever
    slots: int = 1
    busy: int = 0  # requests in the runner now
    queued: int = 0  # requests that wait for a slot
    engine: str = ""
    engine_reason: str = ""  # why this one, in words
    size_used: int = 0  # bytes that the runner was last seen to take; 0 where that is unknown
