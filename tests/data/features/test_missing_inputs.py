"""Counts of candidates and past visits without a code or a vector, and the lines about them."""

from __future__ import annotations

from trainer.data.features.missing_inputs import MissingCounts, MissingTally


def test_counts_add_up_and_are_one_line_of_each_kind() -> None:
    tally = MissingTally(
        {"no_code/a": MissingCounts(1, 2000, 3, 4), "no_vector/a": MissingCounts(1, 10, 5, 60)},
        {"no_code/a": MissingCounts(1, 1, 0, 0), "no_code/b-c": MissingCounts(0, 5)},
    )
    tally.add({"no_vector/a": MissingCounts(1, 1000, 5, 60), "no_vector/c": MissingCounts(3, 10)})
    assert tally.messages() == [
        "without a code of a: 2 of 2,001 candidates and 3 of 4 past live visits; of b-c: 0 of 5 candidates (they read "
        "row 0 of its tables)",
        "without a content vector of a: 2 of 1,010 candidates and 10 of 120 past visits; of c: 3 of 10 candidates "
        "(they read a learnt one)",
    ]
    shares = {"no_code/a": 2 / 2001, "no_code/b-c": 0, "no_vector/a": 2 / 1010, "no_vector/c": 0.3}
    assert tally.shares() == shares and not tally.mostly


def test_inputs_that_a_model_does_not_have_have_no_line() -> None:
    assert MissingTally().messages() == [] and MissingTally().shares() == {} and not MissingTally().mostly
    (line,) = MissingTally({"no_vector/b": MissingCounts(0, 10)}).messages()
    assert line == "without a content vector of b: 0 of 10 candidates (they read a learnt one)"


def test_most_candidates_without_a_value_of_one_input_are_told() -> None:
    assert MissingTally({"no_code/a": MissingCounts(0, 9), "no_code/b": MissingCounts(3, 5)}).mostly
    assert MissingTally({"no_code/a": MissingCounts(0, 9), "no_vector/a": MissingCounts(5, 9)}).mostly
