"""Series: spacing, restart after a kill, refusals; on a run of a few steps."""

import itertools

import pytest
from safetensors.torch import load_file

from cutaway import specimens
from cutaway.core.errors import LoadError, ParameterError
from cutaway.specimens import series
from cutaway.specimens.exam import load_plain
from cutaway.specimens.making import plans

STEPS = 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A series that was never interrupted."""
    return series.train("micro", checkpoints=4, steps=STEPS, cache=tmp_path_factory.mktemp("whole"))


def weights(found, step):
    return load_file(found.folder / f"step-{step}" / "model.safetensors")


def test_spacing_is_logarithmic_from_a_fortieth():
    steps = series.spaced(1600, 14)
    assert len(steps) == 14
    assert (steps[0], steps[1], steps[-1]) == (0, 40, 1600)
    ratios = [b / a for a, b in itertools.pairwise(steps[1:])]
    assert max(ratios) / min(ratios) < 1.05


def test_checkpoints_that_fall_together_are_one():
    assert series.spaced(4, 24) == (0, 1, 2, 3, 4)


def test_a_series_needs_two_checkpoints():
    with pytest.raises(ParameterError, match="1 checkpoints: a series has a first and a last"):
        series.spaced(100, 1)


def test_every_checkpoint_is_a_plain_model(whole):
    assert whole.is_complete
    assert whole.steps[0] == 0
    assert whole.steps[-1] == STEPS
    model, tokenizer = load_plain(whole.folder / f"step-{STEPS}", "causal-lm")
    assert model.config.vocab_size == len(tokenizer)
    assert whole.revisions[-1] == f"micro@step-{STEPS}"


def test_weights_move_between_checkpoints(whole):
    first, last = weights(whole, 0), weights(whole, STEPS)
    assert all(not first[n].equal(last[n]) for n in first if n.endswith("proj.weight"))


def test_a_killed_run_goes_on_and_ends_the_same(whole, tmp_path):
    class KilledError(Exception):
        pass

    def kill(done, steps, loss):
        if done == whole.planned[2] + 1:
            raise KilledError

    with pytest.raises(KilledError):
        series.train("micro", checkpoints=4, steps=STEPS, cache=tmp_path, progress=kill)
    assert series.find("micro", tmp_path).steps == whole.planned[:3]
    done = []
    again = series.train(
        "micro", checkpoints=4, steps=STEPS, cache=tmp_path, progress=lambda n, _, loss: done.append(n)
    )
    assert done == list(range(whole.planned[2] + 1, STEPS + 1))
    ours, theirs = weights(again, STEPS), weights(whole, STEPS)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_finished_series_is_not_trained_again(whole):
    def fail(*_):
        raise AssertionError("a step was made")

    cache = whole.folder.parent.parent
    assert series.train("micro", checkpoints=4, steps=STEPS, cache=cache, progress=fail) == whole


def test_another_plan_in_the_same_place_is_refused(whole):
    with pytest.raises(ParameterError, match=r"5 checkpoints in 12 steps: .* holds one with .* 4 in 12; remove"):
        series.train("micro", checkpoints=5, steps=STEPS, cache=whole.folder.parent.parent)


def test_revisions_are_found_through_path(whole, monkeypatch):
    monkeypatch.setenv(series.CACHE_VARIABLE, str(whole.folder.parent.parent))
    assert specimens.path("micro", "step-0") == whole.folder / "step-0"
    with pytest.raises(LoadError, match=r"revision 'micro@step-13': .* did you mean .*'step-12'"):
        specimens.path("micro", "step-13")


def test_an_unknown_name_gets_the_nearest(tmp_path):
    with pytest.raises(LoadError, match="training 'mikro': no recipe has that name; did you mean 'micro'"):
        series.train("mikro", cache=tmp_path)


def test_a_series_never_started_says_how_to_start(tmp_path):
    with pytest.raises(LoadError, match=r"series 'town': none is kept in .*; cutaway specimen train town"):
        series.find("town", tmp_path)


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LoadError, match=r"cannot be written .*; set CUTAWAY_CACHE to another"):
        series.train("micro", steps=2, cache=tmp_path / "file")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(series.CACHE_VARIABLE, raising=False)
    assert series.cache_folder() == tmp_path / "cutaway"
    monkeypatch.setenv(series.CACHE_VARIABLE, str(tmp_path / "mine"))
    assert series.cache_folder() == tmp_path / "mine"


@pytest.mark.parametrize("name", plans.trainable())
def test_every_plan_can_make_its_first_batch(name):
    made = plans.plan(name)
    for batches, _ in made.stages:
        batch = batches(0)
        assert batch.weights.shape == batch.inputs["input_ids"].shape
        assert int(batch.inputs["input_ids"].max()) < made.model.config.vocab_size
        assert batch.weights[:, 0].abs().max() == 0
