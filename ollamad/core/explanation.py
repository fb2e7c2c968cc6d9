"""Why a request goes where it goes, as clients see it: the whole table of scores. Values only."""

import msgspec


class NodeScore(msgspec.Struct, frozen=True):
    """One node that holds the model. Durations are predictions, in seconds."""

    node_id: str
    node: str  # its name
    chosen: bool
    willing: bool
    why_not: str  # offline or draining, if it is not willing
    loaded: bool  # the model is in its memory
    fits: bool  # or would fit, beside those that serve somebody
    slots: int
    in_use: int  # requests that have a slot there or wait for one
    pending_tokens: int  # of prompts to be evaluated before this one
    cached: float  # part of the prompt that its cache holds, 0 to 1
    uncached_tokens: int  # that it would evaluate
    prefill_rate: float  # measured, tokens a second
    queue_s: float
    load_s: float  # 0 if it is loaded
    time_to_first_token_s: float


class Explanation(msgspec.Struct, frozen=True):
    """A decision of routing."""

    policy: str
    why: str
    prompt_tokens: int  # estimated from its bytes
    chosen: str = ""  # node id; empty if no node is willing
    scores: tuple[NodeScore, ...] = ()  # best first
