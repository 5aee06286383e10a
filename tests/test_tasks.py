"""Families of tasks: functions, classes of samples in a file, and a user's own samples."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, begun, call, configured, write_classes

import analog
import network
import train

KEY = jax.random.key(3)
keys = functools.partial(jax.random.split, KEY)


def tasks_of(family, n):
    """Tasks of a family whose tasks depend on the key alone."""
    return jax.jit(jax.vmap(lambda key: family.task(key, None)))(keys(n))


# ---- functions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function, ranges, value",
    [
        (train.Sinusoid, [(0.1, 5), (0, np.pi)], lambda a, p, x: a * np.sin(x + p)),
        (train.Line, [(-1, 1), (-2, 2)], lambda a, b, x: np.clip(a * x + b, -3, 3)),
    ],
)
def test_functions_are_drawn_as_they_should(function, ranges, value):
    n, x = 100_000, np.linspace(-5, 5, 7)
    drawn = jax.jit(jax.vmap(function.draw))(keys(n))
    for found, (low, high) in zip(drawn, ranges, strict=True):
        assert found.min() >= low and found.max() <= high
        assert abs(found.mean() - (low + high) / 2) < 4 * (high - low) / (12 * n) ** 0.5
        assert abs(found.std() - (high - low) / 12**0.5) < 4 * (high - low) / n**0.5
    first = function(*(p[0] for p in drawn))
    np.testing.assert_allclose(first.target(x), value(*map(float, first), x), atol=1e-4)


def test_baselines_are_those_of_the_law():
    """E[y²] = E[A²]·mean of sin², and the best function is E[A]·(2/π)·cos x."""
    x = np.linspace(-5, 5, 20_001)
    sine2 = np.mean(0.5 - (np.sin(2 * x + 2 * np.pi) - np.sin(2 * x)) / (4 * np.pi))
    zero = (5**3 - 0.1**3) / (3 * 4.9) * sine2
    best = zero - np.mean((2.55 * 2 / np.pi * np.cos(x)) ** 2)
    assert (round(zero, 3), round(best, 3)) == (4.252, 3.006)
    found = train.Regression(train.Sinusoid, 7, 5).baselines()
    assert list(found.values()) == pytest.approx([zero, best], rel=0.03)


def test_a_sum_over_levels_keeps_every_sample():
    family = train.Regression(train.Sinusoid, 4, 50)
    x = jax.random.uniform(KEY, (50,), minval=-6.0, maxval=6.0)  # some beyond the converter
    found = family.sum_up(x, 3 * x)
    level = network.level(4, x)
    np.testing.assert_allclose(found.share, np.bincount(level, minlength=16) / 50, rtol=1e-5)
    sums = np.bincount(level, 3 * np.asarray(x), minlength=16)
    np.testing.assert_allclose(found.y[:, 0], sums / 50, atol=1e-5)
    np.testing.assert_allclose(found.y2, np.mean((3 * x) ** 2), rtol=1e-5)


def test_a_query_is_the_whole_range():
    """Its error is the mean over a fine grid, to the 0.04² of the 16 inputs of a level."""
    family = train.Regression(train.Sinusoid, 4, 5)
    query = jax.tree.map(lambda x: x[0], tasks_of(family, 1).query)
    function = train.Sinusoid.draw(jax.random.split(keys(1)[0])[0])
    y = jax.random.normal(KEY, (16, 1))
    x = jnp.linspace(-5.0, 5.0, 16 * 2000 + 1)[:-1] + 5 / 16 / 2000  # midpoints
    expected = float(np.mean((y[network.level(4, x), 0] - function.target(x)) ** 2))
    assert family.measures(y, query)["mse"] == pytest.approx(expected, rel=1e-3)


def test_predicting_nothing_has_all_of_the_outer_loss():
    family = train.Regression(train.Sinusoid, 4, 5)
    query = tasks_of(family, 3).query
    np.testing.assert_allclose(family.loss(jnp.zeros((3, 16, 1)), query, 0.0), 1.0, rtol=1e-6)


# ---- classes -------------------------------------------------------------------------------------

FEW = {"n_way": 3, "task_size": 6}  # two shots


@pytest.fixture
def data(here):
    """Data of 6 classes to train on and 3 for the test."""
    return train.load_data(write_classes("few.npz"))


def families(data):
    """The families of its training and its test part."""
    cfg, _ = configured(**FEW)
    return [train.classes_of(cfg, data, is_testing) for is_testing in (False, True)]


@pytest.mark.parametrize("part", [0, 1], ids=["training", "testing"])
def test_a_pool_has_samples_of_its_part_each_as_likely(data, part):
    """n_each of every class: five, and three in training, as the smallest class has four."""
    n = 2000
    numbered = data._replace(x=np.arange(len(data.y), dtype=np.float32)[:, None], side=0)
    family = families(numbered)[part]
    pools = jax.jit(jax.vmap(family.pool))(keys(n)).astype(int)
    assert pools.shape[1:] == (family.n_classes * family.n_each, 1)
    assert (family.n_classes, family.n_each) == ((6, 4), (3, 10))[part]
    index = pools.reshape(n, family.n_classes, -1)
    assert np.all(data.test[index] == part)
    found = data.y[index]
    assert np.all(found == found[..., :1])  # a class in each row
    for row in (np.sort(found[..., 0], 1), np.sort(index.reshape(n, -1), 1)):
        assert np.all(np.diff(row, axis=1) > 0)  # and none twice
    times = np.bincount(index.ravel(), minlength=len(data.y))
    for name in np.unique(found):
        drawn, share = times[data.y == name], family.n_each / np.sum(data.y == name)
        assert np.all(np.abs(drawn - n * share) <= 5 * (n * share * (1 - share)) ** 0.5)


@pytest.mark.parametrize("part", [0, 1], ids=["training", "testing"])
def test_support_and_query_of_a_task_share_no_sample(data, part):
    family = families(data)[part]
    task = tasks_of(family, 200)
    shape = 200, family.n_classes, family.n_each, 3
    support, query = (np.reshape(x.y > 0, shape).astype(int) for x in task)
    assert np.all(support.sum((1, 2)) == 2) and np.all(query.sum((1, 2)) == family.n_each - 2)
    assert (support + query).max() == 1
    label = (support + query).max(2)  # [tasks, classes, n_way]: one to one
    assert np.all(label.sum(1) == 1) and np.all(label.sum(2) <= 1)
    assert len(np.unique(label, axis=0)) > 5
    for x in task:
        n = np.sum(x.y > 0, (1, 2))
        np.testing.assert_allclose(x.share, np.sum(x.y > 0, 2) / n[:, None], rtol=1e-6)
        np.testing.assert_allclose(x.y2, 1, rtol=1e-6)


def test_a_warp_is_a_shear_and_a_shift():
    """Of a ramp, but for the margin, to 0.2 of each entry and to 0.09 of the side."""
    ramps = jnp.indices((20, 20)).astype(float)

    def warped(key):
        return jax.vmap(train.warp, (None, 0))(key, ramps)

    found = jax.jit(jax.vmap(warped))(keys(300))[..., 7:13, 7:13].reshape(300, 2, 36)
    rows, columns = np.indices((6, 6)).reshape(2, 36) - 2.5
    terms = np.stack([rows, columns, np.ones(36)], 1)
    fits, left, *_ = np.linalg.lstsq(terms, found.reshape(600, 36).T, rcond=None)
    assert left.max() < 1e-4
    entries = fits.T.reshape(300, 2, 3) - np.array([[1, 0, 9.5], [0, 1, 9.5]])
    for values, largest in ((entries[..., :2], 0.2), (entries[..., 2], 1.8)):
        assert 0.95 * largest < np.abs(values).max() <= largest + 1e-4
        assert abs(values.std() / largest - 3**-0.5) < 0.05


def test_images_are_warped_in_training_alone(data):
    training, testing = (jax.jit(family.pool)(KEY) for family in families(data))
    is_sample = [np.all(u[:, None] == data.x, 2).any(1) for u in (training, testing)]
    assert not is_sample[0].any() and is_sample[1].all()
    assert 0 <= training.min() and training.max() <= 1


def test_the_loss_of_classes_is_the_cross_entropy(data):
    family = families(data)[1]
    query = tasks_of(family, 4).query
    y = jax.random.normal(KEY, (4, len(query.share[0]), 3))
    asked = np.asarray(query.share) > 0
    label = np.argmax(query.y, 2)
    p = np.exp(2 * np.asarray(y, float))
    p = np.take_along_axis(p, label[..., None], 2)[..., 0] / p.sum(2)
    loss = family.loss(y, query, jnp.log(2.0))
    np.testing.assert_allclose(loss, -np.mean(np.log(p[asked])), rtol=1e-5)
    right = 100 * np.mean((np.argmax(y, 2) == label)[asked])
    found = jax.vmap(family.measures)(y, query)
    np.testing.assert_allclose(np.mean(found["accuracy"]), right, rtol=1e-5)
    error = np.sum((np.asarray(y) - np.eye(3)[label]) ** 2, 2)[asked]
    np.testing.assert_allclose(np.mean(found["mse"]), np.mean(error), rtol=1e-5)


@functools.cache
def of_classes(data_file):
    """Run that begins to learn the classes of a file on ideal devices."""
    return begun(*configured(**FEW, device="perf", tasks=data_file, drive=1.0))


def test_exchangeable_outputs_start_alike_and_differ_on_a_chip(data):
    run = of_classes("few.npz")
    family, population = run.families.testing, train.population_of(run.cfg, run.devices)
    first = jax.eval_shape(train.start, run.cfg, population, run.families.training).meta
    assert first.g.hidden[0].shape == (2, 3 * 17, 7)  # 16 inputs and the bias, 3 rows each
    assert first.g.readout.shape == (2, 6, 1) and first.log_theta.shape == (2, 6, 1)
    meta = train.project(run.state.meta, *train.common_range([analog.PCM]))
    scene = jax.jit(train.scene, static_argnums=2)
    chip, *_ = scene(KEY, meta, run.cfg, family, analog.PCM)
    g = chip.readout.xbar.g
    assert g.shape == (2, 6, 3)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.mean(g[..., a] != g[..., b]) > 0.5


def test_a_file_without_a_test_part_keeps_a_fifth_of_its_classes(here):
    found = train.load_data(write_classes("few.npz", test=None))
    assert set(found.y[found.test]) == {18}


def test_the_shipped_classes_suit_the_preset():
    """All have 20 samples; those of the test are no classes of the training."""
    flags = train.PRESETS["few_shot"] | {"tasks": str(ROOT / "tests" / "omniglot_small.npz")}
    cfg, _ = train.configure(flags)
    data = train.load_data(cfg.tasks)
    assert not np.intersect1d(data.y[data.test], data.y[~data.test]).size
    for family, n_each in zip(train.families_of(cfg)[:2], (8, 20), strict=True):
        assert np.all(family.n_members == 20) and len(family.n_members) > 50
        assert (family.n_in, family.n_out, family.shots, family.n_each) == (196, 5, 5, n_each)


REFUSED = [
    ("no x", {"x": None}, r"few.npz has arrays .'y', 'test'., but needs x and y"),
    ("length", {"y": np.zeros(3, int)}, "differ in length"),
    ("no number", {"x": np.full((72, 4), np.nan)}, "x of .* must hold finite numbers"),
    ("words", {"x": np.full((72, 4), "a")}, "x of .* must hold finite numbers"),
    ("one number", {"x": np.array(3.0)}, "x of .* must have the shape"),
    ("no sample", {"x": np.zeros((0, 4))}, "x of .* must have the shape"),
    ("no column", {"x": np.zeros((72, 0))}, "x of"),
    ("half", {"y": np.full(72, 0.5)}, "y must hold integers: number your classes"),
    ("names", {"y": np.full(72, "cat")}, "y must hold integers: number your classes"),
    ("two columns", {"y": np.zeros((72, 2), int)}, r"y of .* must have the shape \[N\]"),
    ("test of numbers", {"test": np.zeros(72)}, "test must hold true and false"),
    ("test of one", {"test": np.array(True)}, "differ in length"),
    ("test of columns", {"test": np.zeros((72, 2), bool)}, "differ in length"),
    ("all test", {"test": np.ones(72, bool)}, "training part is empty"),
    ("no test", {"test": np.zeros(72, bool)}, "test part of .* 0 classes are fewer"),
    ("classes", {"y": np.arange(72) % 2}, "training part of .* 2 classes are fewer"),
    ("samples", {"y": np.arange(72)}, "a class has 1 samples, but a task needs 2 and a query"),
]


@pytest.mark.parametrize("arrays, words", [x[1:] for x in REFUSED], ids=[x[0] for x in REFUSED])
def test_a_file_that_makes_no_sense_is_refused_in_one_line(here, arrays, words):
    path = write_classes("few.npz", **arrays)
    status, _, err = call("--tasks", path, "--n_way", "3", "--task_size", "6")
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(words, err)


def test_classes_in_both_parts_are_a_warning(here, capsys):
    train.load_data(write_classes("few.npz"))
    assert capsys.readouterr().out == ""
    train.load_data(write_classes("few.npz", test=np.arange(72) % 5 == 0))
    assert "warning: 6 classes of few.npz are in its test and" in capsys.readouterr().out


# ---- a user's samples ----------------------------------------------------------------------------

X = np.array([-4.0, -2.5, 0.3, 1.1, 4.9])


@functools.cache
def functions():
    """Run that begins to learn functions."""
    return begun(*configured(device="ibm", tread=1000.0, grad_thr=0.02))


@functools.cache
def learned():
    """train.Learned of five samples of a function, as many as a task has."""
    run = functions()
    return train.learn(KEY, run, run.devices["ibm"], X, 2 * np.sin(X))


def test_a_users_samples_are_learned_as_those_of_a_task():
    run, found = functions(), learned()
    cfg, meta, device = run.cfg, run.state.meta, run.devices["ibm"]
    family = train.families_of(cfg).testing
    u, support = family.pool(KEY), family.sum_up(X, 2 * np.sin(X))

    def expected(chip_key, *rest):
        chip = network.later(train.new_chip(chip_key, cfg, device, meta.g), cfg.tread)
        readouts, pulses = train.teach(*rest, meta, cfg, device, chip, u, support)
        last = jax.tree.map(lambda x: x[-1:], readouts)
        return train.query_chip(KEY, cfg, device, chip, last, u, train.wait_of(cfg)), pulses

    (seen, w), pulses = expected(*keys(3))
    assert pulses.sum() > 5
    np.testing.assert_array_equal(found.pulses, pulses)
    outputs = (seen.e @ w[0])[network.level(cfg.dac_bits, X)]
    np.testing.assert_allclose(found.predict(KEY, X), outputs, atol=1e-4)


def test_more_samples_take_more_time_and_a_chip_learns_on():
    """A sample is shown for 0.05 s, and a look ends with a read 1 s after its pulses; the chip is
    not programmed anew."""
    run, first = functions(), learned()
    x = np.linspace(-5, 5, 500)
    found = train.learn(KEY, run, run.devices["ibm"], x, x > 0, first.chip, age=1e6)
    times = found.chip.readout.xbar.t_prog
    assert times.max() == 26 + 25
    for before, after in zip(first.chip.hidden, found.chip.hidden, strict=True):
        np.testing.assert_array_equal(before.xbar.g, after.xbar.g)
        np.testing.assert_allclose(after.xbar.t_prog, before.xbar.t_prog - 1e6, rtol=1e-6)
    with pytest.raises(train.Refused, match="age must be 21.25 s or more"):
        train.learn(KEY, run, run.devices["ibm"], x, x > 0, first.chip, 21.0)
    with pytest.raises(train.Refused, match="t must be 52 s or more"):
        found.predict(KEY, x, 51.9)
    assert found.predict(KEY, [0, 1, 2], 1e7).shape == (3, 1)


ONE = np.ones(5)


@pytest.mark.parametrize(
    "x, y, words",
    [
        (X, np.array([1, 2, np.nan, 3, 4]), "y must hold finite numbers"),
        (X * np.inf, ONE, "x must hold finite numbers"),
        (X, ["a"] * 5, "y must hold finite numbers"),
        (X + 1, ONE, "x must be from -5 to 5"),
        (X, ONE[:4], "x has 5 samples, y 4"),
        (np.zeros((5, 2)), np.zeros((5, 2)), r"x must have the shape \[N"),
        ([], [], r"x must have the shape \[N"),
    ],
)
def test_samples_of_no_function_are_refused(x, y, words):
    run = functions()
    with pytest.raises(train.Refused, match=words):
        train.learn(KEY, run, run.devices["ibm"], x, y)


@pytest.mark.parametrize(
    "device, words",
    [
        ("ibm", "must be an analog.Device"),
        (analog.IBM._replace(g_max=13.0), "of g_max 12 µS, not 13"),
    ],
)
def test_a_device_that_does_not_fit_is_refused(device, words):
    with pytest.raises(train.Refused, match=words):
        train.learn(KEY, functions(), device, X, ONE)


CLASSES = np.array([0, 1, 2, 0, 1])


@pytest.mark.parametrize(
    "x, y, words",
    [
        (np.zeros((5, 4, 4)), [0, 1, 2, 3, 0], "y must hold classes from 0 to 2"),
        (np.zeros((5, 4, 4)), [0.5] * 5, "y must hold classes from 0 to 2"),
        (np.zeros((5, 4, 4)), [[0]] * 5, r"y must have the shape \[N\]"),
        (np.zeros((5, 3, 3)), CLASSES, r"x must have the shape \[N, 16\]"),
        (np.full((5, 16), 255), CLASSES, "x must be from 0 to 1"),
        (np.full((5, 16), np.nan), CLASSES, "x must hold finite numbers"),
        (np.zeros((0, 16)), [], r"x must have the shape \[N, 16\]"),
        (0.5, CLASSES, r"x must have the shape \[N, 16\]"),
    ],
)
def test_samples_of_no_class_are_refused(data, x, y, words):
    run = of_classes("few.npz")
    with pytest.raises(train.Refused, match=words):
        train.learn(KEY, run, run.devices["perf"], x, y)


def test_other_labels_are_learned_alike(data):
    """By another column of the readout each, on ideal devices."""
    run = of_classes("few.npz")
    x, y = data.x[data.test].copy(), data.y[data.test] - 16
    one, other = (
        train.learn(KEY, run, run.devices["perf"], x.reshape(-1, 4, 4), labels)
        for labels in (y, (y + 1) % 3)
    )
    assert one.pulses.sum() > 5
    np.testing.assert_array_equal(np.roll(one.pulses, 1, -1), other.pulses)
    found = one.predict(KEY, x)
    assert found.shape == (33, 3)
    np.testing.assert_allclose(np.roll(found, 1, 1), other.predict(KEY, x), atol=1e-5)


@pytest.mark.parametrize("g, words", [(np.full((2, 6, 1), np.nan), "finite"), (ONE, "shape")])
def test_a_chip_that_is_not_the_networks_is_refused(g, words):
    run, chip = functions(), learned().chip
    xbar = chip.readout.xbar._replace(g=g)
    other = chip._replace(readout=chip.readout._replace(xbar=xbar))
    with pytest.raises(train.Refused, match=words):
        train.learn(KEY, run, run.devices["ibm"], X, ONE, other)
