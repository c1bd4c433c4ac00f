"""The message of a user's mistake is one line, whatever the file or name that it quotes."""

from __future__ import annotations

import pickle

from hypothesis import given
from hypothesis import strategies as st

from trainer.console.errors import UserError


@given(st.text())
def test_a_message_is_one_line_without_control_characters(text: str) -> None:
    error = UserError(f"{text}: no such file")
    assert len(str(error).splitlines()) <= 1
    assert "\x1b" not in str(error) and str(error).endswith(": no such file")
    assert str(pickle.loads(pickle.dumps(error))) == str(error), "ranks send it to each other"


def test_plain_messages_stay_as_they_are() -> None:
    assert str(UserError("données/x: \\n is no number, “7” is")) == "données/x: \\n is no number, “7” is"
    assert str(UserError("a\nb\tc\u2028")) == "a\\nb\\tc\\u2028"
