"""The study of time series: windows, rules without a net, and solves that begin where the last one ended."""

import torch

import tritondeq as tdeq
from tritondeq.bench.studies import effort, series


def wave(slope: float, count: int = 60) -> series.Series:
    """A season of 4, and a trend."""
    t = torch.arange(count, dtype=torch.float64)
    values = torch.tensor([0.0, 2.0, 1.0, -1.0], dtype=torch.float64)[t.long() % 4] + slope * t
    return series.Series(values, t.tolist(), season=4, context=8, horizon=3, split=45)


def test_no_net_trains_on_what_is_tested():
    waves = wave(0.5)
    train, test = waves.windows(False), waves.windows(True)
    assert torch.equal(train[-1], waves.values[34:45]) and torch.equal(test[0], waves.values[37:48])
    assert torch.equal(test[:, 8], waves.values[45:58])


def test_rules():
    """Of a season with a trend: the seasonal rule is behind by the trend, with drift and least squares are exact."""
    waves = wave(0.5)
    truth, rules = waves.windows(True)[:, 8:], series.references(waves)
    behind = (truth - rules["seasonal naive"]).unique()
    assert torch.allclose(behind, torch.full_like(behind, 2.0))
    for rule in ("seasonal naive with drift", "linear"):
        assert torch.allclose(rules[rule], truth, atol=1e-9)
    assert torch.equal(rules["last value"], waves.windows(True)[:, 7:8].expand(-1, 3))


def test_rules_do_not_depend_on_the_test():
    waves = wave(0.1)
    later = waves.values.clone()
    later[waves.split :] = 99.0
    other = series.Series(later, waves.times, waves.season, waves.context, waves.horizon, waves.split)
    for rule, forecast in series.references(waves).items():
        assert torch.equal(forecast[0], series.references(other)[rule][0]), rule


@torch.no_grad()
def test_each_solve_begins_where_the_last_one_ended():
    layer = tdeq.DEQ(tdeq.cells.MLP(6), tol=1e-5).double()
    stream = (torch.randn(1, 6) + 1e-3 * torch.arange(5)[:, None] * torch.randn(1, 6)).double()
    states, steps, residuals = effort.follow(layer, stream)
    cold = layer.solve(stream)
    assert torch.allclose(states, cold.value, atol=1e-4) and (residuals < 1e-5).all()
    assert steps[0] == cold.steps[0] and (steps[1:] < cold.steps[1:]).all()
    again = layer.solve(stream[1:2], states[:1])
    assert torch.equal(again.value, states[1:2]) and again.steps == steps[1]
    ahead, further, _ = effort.follow(layer, stream, ahead=True)
    third = layer.solve(stream[2:3], 2 * ahead[1:2] - ahead[:1])
    assert torch.equal(third.value, ahead[2:3]) and third.steps == further[2] and further[2:].sum() < steps[2:].sum()
