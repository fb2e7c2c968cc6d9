"""Which prompts begin alike, what a node tells of its caches, and what others make of it."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamad.core.ids import NodeId
from ollamad.core.inference import GenerateRequest, Message, ToolCall
from ollamad.core.prefix import (
    ENDS,
    FIRST_BLOCK,
    GRACE_S,
    MAX_BLOCKS,
    MAX_NEW_TOLD,
    MIN_NODE_BLOCKS,
    NOT_TOLD,
    RETELL_S,
    TOLD_AGAIN,
    Numbers,
    PrefixCache,
    PrefixIndex,
    PrefixNews,
    Prompt,
    bits,
    prompt_of,
    prompt_of_tokens,
)
from ollamad.core.presence import Beat, Usage
from ollamad.wire.codec import decode, encode

DIGEST = "sha256:m"


def chat(*turns: str, system: str = "", **more: object) -> Prompt:
    roles = ("user", "assistant")
    messages = [Message(roles[place % 2], text) for place, text in enumerate(turns)]
    if system:
        messages.insert(0, Message("system", system))
    return prompt_of(GenerateRequest("m", messages=tuple(messages), **more), DIGEST)  # type: ignore[arg-type]


def plain(text: str, digest: str = DIGEST) -> Prompt:
    return prompt_of(GenerateRequest("m", text), digest)


def test_blocks_grow_with_their_place_and_cover_the_longest_request() -> None:
    sizes = [end - start for start, end in zip((0, *ENDS), ENDS, strict=False)]
    assert sizes[0] == FIRST_BLOCK
    assert len(ENDS) == MAX_BLOCKS
    assert ENDS[-1] > 64 << 20
    for size, end in zip(sizes, ENDS, strict=True):
        assert size <= max(FIRST_BLOCK, end / 16)


def test_prompts_share_blocks_up_to_where_they_differ() -> None:
    one, other = plain("a" * 1000 + "b" * 1000), plain("a" * 1000 + "c" * 1000)
    shared = [x for x, y in zip(one.blocks, other.blocks, strict=True) if x == y]
    # The head of a prompt takes a few bytes of the first block.
    assert ENDS[len(shared) - 1] <= 1010 < ENDS[len(shared)] + 20
    assert one.blocks[: len(shared)] == other.blocks[: len(shared)]
    assert not set(one.blocks[len(shared) :]) & set(other.blocks)


def test_a_short_prompt_has_no_blocks_and_is_covered_by_nothing() -> None:
    prompt = plain("hello")
    assert prompt.blocks == ()
    assert prompt.covered(0) == 0.0


@pytest.mark.parametrize(
    "other",
    [
        plain("x" * 500, digest="sha256:other"),
        prompt_of(GenerateRequest("m", "x" * 500, system="s"), DIGEST),
        prompt_of(GenerateRequest("m", "x" * 500, template="{{.Prompt}}"), DIGEST),
        prompt_of(GenerateRequest("m", "x" * 500, images=(b"png",)), DIGEST),
        prompt_of(GenerateRequest("m", "x" * 500, context=(1, 2)), DIGEST),
        chat("x" * 500),
        chat("x" * 500, tools='[{"name":"f"}]'),
        chat("x" * 500, think="on"),
    ],
)
def test_what_changes_the_prompt_changes_its_blocks(other: Prompt) -> None:
    assert not set(plain("x" * 500).blocks) & set(other.blocks)


def test_the_next_turn_goes_on_what_the_last_one_left_in_the_cache() -> None:
    asked = GenerateRequest("m", messages=(Message("user", "q" * 1000),))
    left = prompt_of(asked, DIGEST, "a" * 1000)
    follow = chat("q" * 1000, "a" * 1000, "next question " * 20)
    assert follow.blocks[: len(left.blocks)] == left.blocks
    assert len(left.blocks) >= 15


def test_a_completion_that_goes_on_from_token_ids() -> None:
    context = tuple(range(400))
    follow = prompt_of(GenerateRequest("m", "more", context=(*context, 7)), DIGEST)
    left = prompt_of_tokens(context, DIGEST)
    assert len(left.blocks) == 12
    assert follow.blocks[:12] == left.blocks


def test_tool_calls_and_images_are_part_of_a_message() -> None:
    call = Message("assistant", "x" * 300, tool_calls=(ToolCall("f", "{}"),))
    image = Message("user", "x" * 300, images=(b"png",))
    blocks = {
        prompt_of(
            GenerateRequest("m", messages=(message, Message("user", "y" * 900))), DIGEST
        ).blocks
        for message in (call, image, Message("assistant", "x" * 300), Message("user", "x" * 300))
    }
    assert len(blocks) == 4


# What a node holds.


def hold(cache: PrefixCache, prompt: Prompt, now: float = 0.0, **changes: float) -> None:
    how = {"tokens": 100.0, "slots": 2, "room": 150.0} | changes
    cache.hold(DIGEST, prompt, how["tokens"], slots=int(how["slots"]), room=how["room"], now=now)


def test_a_cache_has_the_last_sequence_of_each_slot_and_some_more() -> None:
    cache = PrefixCache()
    prompts = [plain(letter * 600) for letter in "abcd"]
    for prompt in prompts:
        hold(cache, prompt)
    # Two slots, and of what they pushed out the newest 150 tokens: one of a hundred.
    assert [cache.covered(DIGEST, prompt) for prompt in prompts] == [0.0, 1.0, 1.0, 1.0]
    assert cache.covered("sha256:other", prompts[3]) == 0.0


def test_a_sequence_that_grows_takes_no_second_slot() -> None:
    cache = PrefixCache()
    other = plain("o" * 600)
    hold(cache, other)
    for length in range(600, 3000, 300):
        hold(cache, plain("g" * length), room=0)
    assert cache.covered(DIGEST, other) == 1.0
    assert cache.covered(DIGEST, plain("g" * 600)) == 1.0
    half = cache.covered(DIGEST, plain("g" * 2700 + "z" * 2700))
    assert 0.4 < half < 0.6


def test_what_is_unloaded_is_held_no_more() -> None:
    cache = PrefixCache()
    hold(cache, plain("a" * 600))
    assert not cache.keep_only([DIGEST])
    assert cache.keep_only([])
    assert cache.covered(DIGEST, plain("a" * 600)) == 0.0
    assert cache.news(0.0).count == 0


def test_news_are_small_and_tell_all_in_turn() -> None:
    cache = PrefixCache()
    for number in range(30):
        hold(cache, plain(f"{number:04}" * 1000), slots=30)
    first = cache.news(0.0)
    assert first.count > 30 * 20
    assert len(first.blocks()) == MAX_NEW_TOLD + TOLD_AGAIN
    beat = Beat(1.0, Usage(), prefixes=first)
    assert len(encode(beat)) - len(encode(Beat(1.0, Usage()))) < 700
    told = set(first.blocks())
    for second in range(1, first.count // TOLD_AGAIN + 2):
        news = cache.news(float(second))
        assert second <= RETELL_S or len(news.blocks()) <= TOLD_AGAIN
        told |= set(news.blocks())
    assert len(told) == first.count


@given(st.binary(max_size=50), st.integers(-5, 1 << 40))
def test_any_news_can_be_read(names: bytes, count: int) -> None:
    news = decode(encode(PrefixNews(count, names)), PrefixNews)
    index = PrefixIndex()
    index.hear(3, news, 0.0)
    assert len(index) <= len(names) // 4


# What others know.


def levels(index: PrefixIndex, prompt: Prompt, among: int = 0b1111) -> dict[int, int]:
    return {number: count for nodes, count in index.levels(prompt, among) for number in bits(nodes)}


def test_levels_tell_how_much_each_node_has() -> None:
    index = PrefixIndex()
    prompt = plain("p" * 1280)
    index.tell(0, prompt.blocks, 0.0)
    index.tell(1, prompt.blocks[:4], 0.0)
    index.tell(2, plain("other" * 300).blocks, 0.0)
    assert levels(index, prompt) == {0: 10, 1: 4, 2: 0, 3: 0}
    assert levels(index, prompt, among=0b0110) == {1: 4, 2: 0}
    index.forget(0)
    assert levels(index, prompt) == {0: 0, 1: 4, 2: 0, 3: 0}


def test_what_a_node_tells_of_no_more_is_forgotten() -> None:
    index = PrefixIndex()
    old, new = plain("a" * 1280), plain("b" * 1280)
    index.tell(0, old.blocks, 0.0)
    index.tell(0, new.blocks, 10.0)
    told = PrefixNews(10, b"".join(name.to_bytes(4, "little") for name in new.blocks))
    index.hear(0, told, 10.0)
    assert levels(index, old)[0] == 0
    assert levels(index, new)[0] == 10
    index.hear(0, PrefixNews(), 20.0)
    assert len(index) == 0


def test_a_rumour_says_nothing_of_caches() -> None:
    index = PrefixIndex()
    index.tell(0, plain("a" * 1280).blocks, 0.0)
    index.hear(0, NOT_TOLD, 1000.0)
    assert levels(index, plain("a" * 1280))[0] == 10


def test_what_was_sent_since_the_beat_stays() -> None:
    index = PrefixIndex()
    prompt = plain("a" * 1280)
    index.tell(0, prompt.blocks, 10.0)
    index.hear(0, PrefixNews(), 10.0 + GRACE_S)
    assert levels(index, prompt)[0] == 10
    index.hear(0, PrefixNews(), 10.1 + GRACE_S)
    assert levels(index, prompt)[0] == 0


def test_the_index_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ollamad.core.prefix.MAX_INDEX_BLOCKS", 1000)
    index = PrefixIndex()
    rng = random.Random(1)
    for node in range(10):
        for _ in range(50):
            index.tell(node, [rng.getrandbits(32) for _ in range(50)], 0.0)
    for node in range(10):  # the first had more while they were few
        index.tell(node, [], 1.0)
    assert len(index) == 10 * MIN_NODE_BLOCKS


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["tell", "hear", "forget"]),
            st.integers(0, 3),
            st.integers(0, 10),
            st.integers(0, 20),
        ),
        max_size=40,
    )
)
def test_both_directions_of_the_index_agree(steps: list[tuple[str, int, int, int]]) -> None:
    index = PrefixIndex()
    for now, (what, node, count, start) in enumerate(steps):
        names = range(start, start + count)
        match what:
            case "tell":
                index.tell(node, names, float(now))
            case "hear":
                data = b"".join(name.to_bytes(4, "little") for name in names)
                index.hear(node, PrefixNews(count, data), float(now))
            case _:
                index.forget(node)
        holders = {(node, name) for name, nodes in index._holders.items() for node in bits(nodes)}
        held = {(node, name) for node, names in index._held.items() for name in names}
        assert holders == held
        assert all(index._holders.values())


def test_numbers_are_small_and_used_again() -> None:
    numbers = Numbers()
    assert [numbers.number(NodeId(name)) for name in "abca"] == [0, 1, 2, 0]
    numbers.drop(NodeId("b"))
    numbers.drop(NodeId("unknown"))
    assert numbers.number(NodeId("d")) == 1
    assert numbers.nodes == ["a", "d", "c"]
