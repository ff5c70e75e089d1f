"""LISA: which blocks move in which step, and what the optimizer keeps of them."""

import pytest
import torch

from experiments.laws.laws import judge
from experiments.laws.trial import Trial
from methods import registry
from methods.lisa import LISA
from methods.random_mask import RandomMask

EVERY, STEPS = 2, 8


def watched(seen):
    class Watched(LISA):
        key = "lisa"

        def before_clip(self, *, run, state, step):
            super().before_clip(run=run, state=state, step=step)
            weights = {name: weight.detach().clone() for name, weight in run.weights.items()}
            held = {name for name, weight in run.weights.items() if weight in state["optimizer"].state}
            seen.append((weights, held, dict(state["block"])))

    return Watched


@pytest.mark.parametrize("lora", [False, True])
def test_the_drawn_blocks_move_and_what_is_in_no_block(make, documents, train, lora):
    seen = []
    model = make(num_hidden_layers=4, tie_word_embeddings=False)
    parts = registry.build({"lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}} if lora else {})
    parts = (*parts, watched(seen)(blocks=2, every=EVERY))
    result = train(model, parts, documents, batch=1, micro_batch=1, epochs=STEPS / 6, weight_decay=0.1)
    seen.append((result.run.weights, set(), {}))
    block, drawn, steps = seen[0][2], [], [0] * 4
    outside = result.run.weights.keys() - block.keys()
    assert len(outside) == (0 if lora else 3)  # embedding, final norm, head
    for (before, held, _), (after, *_) in zip(seen, seen[1:]):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert outside <= moved
        drawn.append({block[name] for name in moved & block.keys()})
        assert len(drawn[-1]) == 2
        assert moved == outside | {name for name, index in block.items() if index in drawn[-1]}
        assert all(name not in block or block[name] in drawn[-1] for name in held)  # no state of what is frozen
        for index in drawn[-1]:
            steps[index] += 1
    assert all(drawn[at] == drawn[at - 1] for at in range(1, STEPS) if at % EVERY)
    assert len(set(map(frozenset, drawn))) > 1
    assert result.method.reports(result.run)["lisa"] == {"steps_by_block": steps}


def test_a_block_that_is_drawn_again_begins_with_a_fresh_state(make, documents, train):
    result = train(make(num_hidden_layers=2), (LISA(every=1),), documents, batch=1, micro_batch=1, epochs=2.0)
    state, block = result.optimizer.state, result.states["lisa"]["block"]
    ages = {name: int(state[weight]["step"]) for name, weight in result.run.weights.items() if weight in state}
    within = [ages[name] for name in block if name in ages]
    assert len(within) == len(block) // 2 and max(within) < 12
    assert all(age == 12 for name, age in ages.items() if name not in block)


def test_a_block_that_is_frozen_has_no_state_beside_another_mask_either(make, documents, train):
    parts = (LISA(every=100), RandomMask(fraction=0.5))
    result = train(make(num_hidden_layers=2), parts, documents, weight_decay=0.1)
    block, frozen = result.states["lisa"]["block"], result.states["lisa"]["frozen"]
    held = {name for name, weight in result.run.weights.items() if weight in result.optimizer.state}
    assert held == result.run.weights.keys() - {name for name in block if frozen[name]}


def test_the_draw_is_of_the_seed(make, documents, train):
    reports = []
    for seed in (0, 0, 1):
        settings = {"batch": 1, "micro_batch": 1, "epochs": 2.0}
        result = train(make(num_hidden_layers=4), (LISA(every=1),), documents, seed=seed, **settings)
        reports.append(result.method.reports(result.run)["lisa"]["steps_by_block"])
    assert reports[0] == reports[1] != reports[2] and sum(reports[0]) == 12


def test_a_run_that_is_killed_between_two_draws_goes_on(tmp_path):
    verdict = judge("resumable", Trial(kind=LISA, architecture="llama", folder=tmp_path, chosen={"every": 2}))
    assert verdict.status == "passed", str(verdict)
