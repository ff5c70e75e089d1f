import random
import re

import pytest

from experiments.data import splits
from experiments.data.sameness import sameness
from methods.errors import UserError
from methods.tools.jsonl import Row


def numbered(n, *, prefix="What is number"):
    return [{"id": i, "question": f"{prefix} {i}?", "answer": str(i)} for i in range(n)]


def question(row):
    return row["question"]


def test_a_split_does_not_depend_on_the_order_of_rows_or_columns():
    rows = numbered(60)
    shuffled = [dict(reversed(row.items())) for row in random.Random(1).sample(rows, 60)]
    one, other = (splits.three_way(r, question=question, train=30, probe=10, test=20) for r in (rows, shuffled))
    assert (one.train, one.probe, one.test) == (other.train, other.probe, other.test)
    assert (len(one.train), len(one.probe), len(one.test)) == (30, 10, 20)


def test_no_question_is_in_two_sets_however_it_is_written():
    rows = numbered(40) + [{"id": 100 + i, "question": f"  what IS number {i} ", "answer": "other"} for i in range(40)]
    split = splits.three_way(rows, question=question, train="all", probe=11, test=21)
    sets = [{splits.normalised(r["question"]) for r in part} for part in (split.train, split.probe, split.test)]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    # 21 test rows take one row of an 11th question, 11 probe rows one of a 6th: their twins are dropped and counted
    assert split.duplicates_between == 2 and split.duplicates_within == 0
    assert len(split.train) + len(split.probe) + len(split.test) + 2 == 80
    split = splits.three_way(rows, question=question, train="all", probe=11, test=21, distinct=True)
    asked = [splits.normalised(row["question"]) for row in (*split.test, *split.probe)]
    assert len(asked) == len(set(asked)) == 32 and split.duplicates_between == 32 and len(split.train) == 16


def test_copies_are_dropped_and_counted():
    rows = numbered(10) + [row | {"id": 50 + row["id"]} for row in numbered(4)]
    split = splits.three_way(rows, question=question, train=5, probe=2, test=3)
    assert split.duplicates_within == 4
    assert splits.sample(rows, test=99, probe=9).duplicates_within == 4


def test_separate_test_rows_clean_the_training_rows():
    pool = numbered(6) + [{"question": "Only here?", "answer": "x"}]
    split = splits.three_way(numbered(30), question=question, train="all", probe=4, test=3, test_rows=pool)
    assert len(split.test) == 3 and all(row in pool for row in split.test)
    # all six shared questions go, also those of test rows that are not scored
    assert split.duplicates_between == 6 and len(split.train) == 20
    assert len(splits.three_way(numbered(9), question=question, train=1, probe=0, test="all", test_rows=pool).test) == 7


def test_a_larger_sample_holds_the_smaller_one():
    rows = numbered(50)
    small, large = splits.sample(rows, test=10, probe=5), splits.sample(rows, test=20, probe=5)
    assert large.test[:10] == small.test and large.test[10:15] == small.probe
    assert splits.sample(rows, test=200, probe=5).probe == []


def test_the_sample_is_not_the_first_rows():
    assert [row["id"] for row in splits.sample(numbered(50), test=10, probe=0).test] != list(range(10))


def test_rows_to_settle_on_are_the_last_whatever_is_scored():
    rows = numbered(50)
    first, other = splits.sample(rows, test=10, probe=4, settle=8), splits.sample(rows, test=30, probe=0, settle=8)
    assert first.train == other.train and len(first.train) == 8 and first.test == other.test[:10]
    whole = splits.sample(rows, test="all", probe=4, settle=8)
    assert whole.train == first.train and len(whole.test) == 38
    assert {row["id"] for part in (whole.test, whole.probe, whole.train) for row in part} == set(range(50))
    assert len(splits.sample(rows, test=45, probe=4, settle=8).train) == 1


def test_too_few_rows_are_refused():
    with pytest.raises(UserError, match="domains.x: 8 train rows are requested, and 5 of 10 are available"):
        splits.three_way(numbered(10), question=question, train=8, probe=2, test=3, where="domains.x")
    with pytest.raises(UserError, match="1 test rows|0 test rows"):
        splits.three_way(numbered(10), question=question, train=8, probe=2, test=0, where="domains.x")
    with pytest.raises(UserError, match="a split cannot have 'al' rows"):
        splits.three_way(numbered(10), question=question, train="al", probe=2, test=3)


def test_texts_of_an_article_are_in_one_set_whatever_the_numbers():
    texts = [(f"Article {i % 70}", f"Passage number {i}.") for i in range(200)]
    wanted = {"test": 40, "settle": 60, "probe": 17}
    sets, left, copies = splits.by_article([*texts, ("Another", "passage NUMBER 7")], sizes=wanted)
    assert copies == 1 and {name: len(drawn) for name, drawn in sets.items()} == wanted
    of = dict(map(reversed, texts))
    articles = [{of[text] for text in drawn} for drawn in (*sets.values(), *left)]
    assert sum(map(len, articles)) == len(set.union(*articles)) == 70
    assert splits.by_article(reversed(texts), sizes=wanted)[0] == sets  # the order of the rows is no matter
    alone, _, _ = splits.by_article([("", text) for _, text in texts], sizes={"test": 150, "probe": 60})
    assert len(alone["test"]) == 150 and len(alone["probe"]) == 50 and not set(alone["test"]) & set(alone["probe"])


def test_sums_that_differ_in_a_sign_are_no_copies():
    plus, minus = ([{"question": f"What is {i} {sign} {i % 7}?"} for i in range(20, 60)] for sign in "+-")
    split = splits.three_way(plus, question=question, train="all", probe=4, test="all", test_rows=minus)
    assert (len(split.train), len(split.probe), len(split.test), split.duplicates_between) == (
        36,
        4,
        40,
        0,
    ) and not split.pair
    split = splits.three_way(plus + minus, question=question, train=30, probe=10, test=40)
    assert split.duplicates_between == 0 and len(split.train) == 30


def test_a_finer_sameness_deals_no_row_anew():
    """The order is that of the old, coarse key: a row that once was a copy comes in, and moves none of the others."""
    rows = numbered(60)
    before = splits.three_way(rows, question=question, train="all", probe=10, test=20)
    signed = [{"question": f"What is number -{i}?"} for i in range(0, 60, 5)]
    after = splits.three_way(rows + signed, question=question, train="all", probe=10, test=20)
    first, second = ([row for row in (*s.test, *s.probe, *s.train) if row in rows] for s in (before, after))
    assert first == second == sorted(rows, key=lambda row: splits.text_hash(row["question"]))
    assert after.duplicates_between == 0 and len(after.train) == len(before.train) + 12


def test_copies_are_shown_by_one_pair_with_their_lines():
    rows = [Row({"question": "What is 7 + 3?", "answer": str(i)}, at=f"rows.jsonl line {i}") for i in (1, 2)]
    held = [Row({"question": "what is 7+3"}, at="test.jsonl line 9")]
    split = splits.three_way(rows + numbered(5), question=question, train="all", probe=0, test="all", test_rows=held)
    assert split.duplicates_between == 2
    assert re.fullmatch(
        r"'What is 7 \+ 3\?' \(rows.jsonl line [12]\) is a copy of 'what is 7\+3' \(test.jsonl line 9\)", split.pair
    )
    with pytest.raises(
        UserError, match=r"1 train rows are requested, and 0 of 2 are available \(2 are left out.*is a copy of.*line 9"
    ):
        splits.three_way(rows, question=question, train="all", probe=0, test="all", test_rows=held)


def test_general_texts_that_differ_in_a_sign_are_both_kept():
    texts = [("", text) for text in ("a + b", "a - b", "A - B?", "naïve", "nai\u0308ve")]
    sets, _, copies = splits.by_article(texts, sizes={"test": 9})
    assert copies == 2 and set(map(sameness, sets["test"])) == {"a+b", "a-b", "naïve"} and len(sets["test"]) == 3


def test_normalising():
    assert splits.normalised("  What's  H\u2082O?\n") == "what s h2o"
    assert splits.text_hash("A b") == splits.text_hash("a  B!") != splits.text_hash("ab")
