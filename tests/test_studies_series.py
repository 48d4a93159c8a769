"""The study of time series: windows, rules without a net, nets, and solves that begin where the last one ended."""

from math import sqrt

import pytest
import torch

import tritondeq as tdeq
from tritondeq.bench.studies import contestants as who
from tritondeq.bench.studies import effort, series
from tritondeq.bench.studies.study import Job
from tritondeq.bench.studies.verdict import against
from tritondeq.toolbox import one_thread, parameters

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone():
    with one_thread():
        yield


def ramp(count: int = 40, **task) -> series.Series:
    """0, 1, 2, ..."""
    task = {"season": 3, "context": 6, "horizon": 2, "split": 30} | task
    return series.Series(torch.arange(count, dtype=torch.float64), [float(i) for i in range(count)], **task)


def wave(slope: float, count: int = 60) -> series.Series:
    """A season of 4, and a trend."""
    t = torch.arange(count, dtype=torch.float64)
    values = torch.tensor([0.0, 2.0, 1.0, -1.0], dtype=torch.float64)[t.long() % 4] + slope * t
    return series.Series(values, t.tolist(), season=4, context=8, horizon=3, split=45)


@pytest.fixture
def known(monkeypatch):
    """Puts a series in place of those of statsmodels."""

    def put(own):
        monkeypatch.setattr(series, "series", lambda case: own)
        return own

    return put


def job(contestant: str, seed: int = 0, **settings) -> Job:
    return Job(series.SUNSPOTS, contestant, seed, series.STUDY.settings["tiny"] | settings, CPU)


def test_the_series_are_those_of_statsmodels():
    pytest.importorskip("statsmodels")
    sun, co2 = series.series(series.SUNSPOTS), series.series(series.CO2)
    assert (len(sun.values), len(co2.values)) == (309, 2284) == (len(sun.times), len(co2.times))
    assert sun.values[:3].tolist() == [5.0, 11.0, 16.0] and sun.times[0] == 1700 and sun.times[-1] == 2008
    assert (
        co2.values[5:8].tolist() == pytest.approx([316.9, (316.9 + 317.5) / 2, 317.5]) and not co2.values.isnan().any()
    )
    assert 1958.2 < co2.times[0] < 1958.3 and 2001.9 < co2.times[-1] < 2002.01
    assert (sun.split, co2.split) == (232, 1713)
    assert (sun.season, sun.horizon, co2.season, co2.horizon) == (11, 11, 52, 26)


def test_nobody_trains_on_what_is_tested():
    own = ramp()
    train, test = own.windows(False), own.windows(True)
    assert train[0].tolist() == list(range(8)) and train[-1, -1] == 29 and len(train) == 23
    assert test[0].tolist() == list(range(24, 32)) and test[:, 6:].min() == 30 and test[-1, -1] == 39
    assert (own.values[:30].diff().abs().mean(), own.step) == (1, 1)


def test_rules():
    """Of a season with a trend: the seasonal rule is behind by the trend, with drift and least squares are exact."""
    own = wave(0.5)
    truth, said = own.windows(True)[:, 8:], series.references(own)
    behind = (truth - said["seasonal naive"]).unique()
    assert torch.allclose(behind, torch.full_like(behind, 2.0))
    for rule in ("seasonal naive with drift", "linear"):
        assert torch.allclose(said[rule], truth, atol=1e-9)
    assert torch.equal(said["last value"], own.windows(True)[:, 7:8].expand(-1, 3))


def test_rules_know_nothing_of_the_test():
    """What is foretold of the first window does not change with what comes after."""
    own = wave(0.1)
    later = own.values.clone()
    later[own.split :] = 99.0
    other = series.Series(later, own.times, own.season, own.context, own.horizon, own.split)
    for rule, said in series.references(own).items():
        assert torch.equal(said[0], series.references(other)[rule][0]), rule


def test_data_is_windows_less_their_last_value():
    own = wave(0.5)
    found = series.data(own, CPU)
    window = own.windows(True)[3]
    assert found.test_x.dtype == torch.float32 and (found.test_x[:, -1] == 0).all()
    scale = found.unit * own.step
    assert torch.allclose(scale * found.test_x[3].double() + window[7], window[:8], atol=1e-5)
    assert torch.allclose(scale * found.test_y[3].double() + window[7], window[8:], atol=1e-5)
    both = torch.cat([found.x, found.y], dim=1)
    assert both.std().item() == pytest.approx(1, abs=1e-5)


def test_nets(known):
    known(wave(0.5))
    nets = {name: series.build(job(name, depth=4)) for name in who.ALL}
    sizes = {name: parameters(net) for name, net in nets.items()}
    assert sizes[who.DEQ] == sizes[who.LOOP] == sizes[who.BLOCK] < sizes[who.HYBRID] < sizes[who.STACK]
    assert abs(sizes[who.WIDE] / sizes[who.STACK] - 1) < 0.25
    net, x = nets[who.STACK], torch.randn(5, 8)
    assert torch.allclose(net(x), net.head(net.body(net.stem(x))) + x @ net.skip.weight.mT + net.skip.bias, atol=1e-6)


def test_a_net_learns_a_season(known):
    """What the trend and the season are, contestants find out; the last value is far off."""
    known(wave(0.5))
    for contestant in (who.DEQ, who.STACK):
        found = series.run(job(contestant, epochs=30, batch=8, lr=1e-2, weight_decay={series.SUNSPOTS: 1e-2}))
        assert found["error"] < 0.25 * found["last value"] and found["linear"] < 1e-9, contestant
        assert found["near"] == found["by_horizon"][0][1] and found["far"] == found["by_horizon"][2][1]
        assert found["error"] == pytest.approx(sum(e for _, e in found["by_horizon"]) / 3)
        apart = [abs(a[1] - b[1]) for a, b in zip(found["forecast"], found["truth"], strict=True)]
        assert max(apart) < 2 and found["truth"][-1] == [59.0, wave(0.5).values[59].item()]
        assert len(apart) == 3 * series.SHOWN and [t for t, _ in found["truth"]] == list(range(48, 60))


# Warm starts


def stream(count: int, features: int, drift: float) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(1, features) + drift * torch.arange(count)[:, None] * torch.randn(1, features)


def test_each_solve_begins_where_the_last_one_ended():
    layer = tdeq.DEQ(tdeq.cells.MLP(6), tol=1e-5).double()
    into = stream(5, 6, 1e-3).double()
    with torch.no_grad():
        states, steps, residuals = effort.follow(layer, into)
        cold = layer.solve(into)
        assert torch.allclose(states, cold.value, atol=1e-4) and (residuals < 1e-5).all()
        assert steps[0] == cold.steps[0] and (steps[1:] < cold.steps[1:]).all()
        for i in (1, 2):
            again = layer.solve(into[i : i + 1], states[i - 1 : i])
            assert torch.equal(again.value, states[i : i + 1]) and again.steps == steps[i]
        ahead, further, _ = effort.follow(layer, into, ahead=True)
        third = layer.solve(into[2:3], 2 * ahead[1:2] - ahead[:1])
        assert (
            torch.equal(third.value, ahead[2:3]) and third.steps == further[2] and further[2:].sum() < steps[2:].sum()
        )


def test_the_first_of_a_stream_does_not_count():
    layer = tdeq.DEQ(tdeq.cells.MLP(6)).double()
    torch.manual_seed(0)
    each = torch.randn(40, 6).double()
    with torch.no_grad():
        steps = layer.solve(each).steps
        first, others = each[steps.argmin()], each[steps.argmax()]
        found = effort.by_start(layer, torch.stack([first, others, others, others]), [1e-3], 1e-3)
    assert steps.min() < steps.max() == found["cold"] and found["cold_by_tol"] == [[1e-3, found["cold"]]]
    assert found["warm"] < found["cold"] - 1 and found["apart"] < 1e-2


def test_what_a_stream_tells(known):
    own = known(wave(0.5))
    every = series.data(own, CPU)
    settings = series.STUDY.settings["tiny"] | {"tols": [1e-2, series.STREAMED], "steps": [1, 40]}
    for contestant in who.ALL:
        net = series.build(job(contestant))
        found = series.streamed(net, every, settings)
        if contestant in (who.STACK, who.BLOCK):
            assert not found
            continue
        cold, warm = (dict(found[key]) for key in ("cold_by_steps", "warm_by_steps"))
        if contestant == who.LOOP:
            assert "saved" not in found and set(cold) == {1, 40}
        else:
            assert found["saved"] == pytest.approx(100 * (1 - found["warm"] / found["cold"]))
            assert max(found[f"{start}_residual"] for start in effort.STARTS) < series.STREAMED
            assert found["apart"] < 10 * series.STREAMED
            assert [point[0] for point in found["saved_by_tol"]] == settings["tols"]
            assert found["cold_by_tol"][0][1] < found["cold_by_tol"][1][1] == found["cold"]
        with (
            torch.no_grad()
        ):  # all steps that are needed: warm and cold forecasts are the same, those of the net itself
            x, y = every.test_x[:4], every.test_y[:4]
            usual = (every.unit * (net(x) - y).abs().mean()).item()
        assert warm[40] == pytest.approx(cold[40], rel=1e-2)
        if contestant != who.LOOP:
            assert cold[40] == pytest.approx(usual, rel=1e-2)
        assert cold[1] != pytest.approx(cold[40], rel=1e-4)


def test_the_verdict_against_what_is_known():
    """Of three seeds with a spread of 1: the quantile for 2 degrees of freedom is 4.303, the error 1 / sqrt(3)."""
    edge = 4.302653 / sqrt(3)
    for gap, word in ((0.0, "tie"), (0.999 * edge, "tie"), (1.001 * edge, "win"), (-1.001 * edge, "loss")):
        for sign, better in ((1, "more"), (-1, "less")):
            told = against([9.0 + sign * gap, 10.0 + sign * gap, 11.0 + sign * gap], 10.0, better)
            assert told.word == word and told.allowed == pytest.approx(edge) and told.theirs == 10
    assert against([3.0], 4.0, "more").word == ""


def test_what_it_says_of_runs():
    base = {"case": series.CO2, "contestant": who.DEQ, "references": {"last value": [], "linear": []}, "linear": 1.5}
    base |= {"last value": 3.0, "curve": [[1, 1.0, 4.0], [2, 2.0, 3.0]], "cold": 8.0, "warm": 6.0, "ahead": 9.0}
    base |= {"saved": 25.0, "cold_residual": 1e-3, "warm_residual": 2e-3, "ahead_residual": 3e-3, "apart": 4e-3}
    runs = [base | {"seed": seed, "error": 2 + 0.01 * seed, "apart": 4e-3 + seed * 1e-3} for seed in range(3)]
    said = " ".join(series.says(runs))
    assert "CO2: DEQ 2.01 against what needs no net: last value 3.00 (win), linear 1.50 (loss)." in said
    assert "8.0 steps from nothing, 6.0 from the last equilibrium (25 % fewer, a win), 9.0 from the line" in said
    assert "1.0e-03, 2.0e-03, 3.0e-03, and equilibria found warm and cold differ by at most 6.0e-03." in said
    slower = " ".join(series.says([run | {"warm": 10.0, "saved": -25.0} for run in runs]))
    assert "(25 % more, a loss)" in slower and "sunspots" not in slower
