"""Every receiver, given what hypothesis makes of right inputs; and how much memory they take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import hostile
from vmmig.testing.strategies import corrupted_containers

_MAGNITUDES = [0, 1, 0x7F, 0x80, 0xFF, 1 << 15, (1 << 16) - 1, 1 << 31, (1 << 32) - 1, 1 << 62]
_NUMBERS = st.builds(
    lambda magnitude, delta, size, order: ((magnitude + delta) % (1 << 8 * size)).to_bytes(
        size, order
    ),
    st.sampled_from([*_MAGNITUDES, 1 << 63]),
    st.integers(-2, 2),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from(["little", "big"]),
)


@pytest.fixture(autouse=True, scope="module")
def _stopping() -> Iterator[None]:
    yield
    hostile.stop()


@st.composite
def changed(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A right input after a few changes: bits, numbers, what is cut, repeated, or taken over."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 4))):
        at, other = (draw(st.integers(0, len(data))) for _ in range(2))
        start, end = sorted((at, other))
        kind = draw(
            st.sampled_from(["bit", "number", "cut", "remove", "repeat", "splice", "insert"])
        )
        if kind == "bit" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif kind == "number":
            number = draw(_NUMBERS)
            data = data[:at] + number + data[at + len(number) :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "remove":
            data = data[:start] + data[end:]
        elif kind == "repeat":
            data = data[:end] + data[start:]
        elif kind == "splice":
            data = data[:at] + draw(st.sampled_from(seeds))[at:]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(max_size=8)) + data[at:]
    return data


@settings(max_examples=300)
@given(changed(hostile.SEEDS["container"]) | corrupted_containers())
def test_containers(data: bytes) -> None:
    hostile.container(data)


@settings(max_examples=150)
@given(changed(hostile.SEEDS["stream"]) | corrupted_containers().map(hostile.framed))
def test_peers_that_send(data: bytes) -> None:
    hostile.stream(data)


@settings(max_examples=100)
@given(changed(hostile.SEEDS["stream_answer"]))
def test_peers_that_receive(data: bytes) -> None:
    hostile.stream_answer(data)


@settings(max_examples=150)
@given(changed(hostile.SEEDS["http_answer"]))
def test_http_servers(data: bytes) -> None:
    hostile.http_answer(data)


@settings(max_examples=150)
@given(changed(hostile.SEEDS["request"]))
def test_http_clients(data: bytes) -> None:
    hostile.request(data)


@settings(max_examples=200)
@given(changed(hostile.SEEDS["messages"]))
def test_peers_of_a_live_migration(data: bytes) -> None:
    hostile.messages(data)


@pytest.mark.parametrize("name", hostile.RECEIVERS)
def test_right_inputs(name: str) -> None:
    for seed in hostile.SEEDS[name]:
        hostile.RECEIVERS[name](seed)
