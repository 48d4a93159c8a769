"""Control: PPO's parts in closed form, episodes as gymnasium plays them, what a policy carries on."""

import copy

import numpy as np
import pytest
import torch

from tritondeq.bench.studies import contestants as who
from tritondeq.bench.studies import control, ppo
from tritondeq.bench.studies.study import Job
from tritondeq.toolbox import one_thread, parameters

gymnasium = pytest.importorskip("gymnasium")
CASES = (ppo.CARTPOLE, ppo.PENDULUM)
TINY = control.STUDY.settings["tiny"] | {"limit": dict.fromkeys(CASES, 40)}


@pytest.fixture(autouse=True)
def alone():
    with one_thread():
        yield


def job(case: str, contestant: str = who.DEQ, **settings) -> Job:
    return Job(case, contestant, 0, TINY | settings, torch.device("cpu"))


def agent(job: Job) -> ppo.Agent:
    return ppo.Agent(control.build(job), ppo.TASKS[job.case], job.settings["critic"])


def test_advantages_are_discounted_sums_up_to_the_end_of_an_episode():
    surprise, done = torch.randn(6, 3, dtype=torch.float64), torch.zeros(6, 3, dtype=torch.float64)
    done[2, 1] = done[5, 2] = 1
    found = ppo.advantages(surprise, done, 0.7)
    for copy_, last in ((0, [5] * 6), (1, [2, 2, 2, 5, 5, 5]), (2, [5] * 6)):
        for t in range(6):
            wanted = sum(0.7 ** (k - t) * surprise[k, copy_] for k in range(t, last[t] + 1))
            assert torch.allclose(found[t, copy_], wanted)


class Script:
    """Two copies of an environment that ends, in the second step: copy 0 for good, copy 1 because time is up."""

    def __init__(self):
        self.told, self.next = [], np.arange(24, dtype=np.float32).reshape(4, 2, 3) / 24

    def step(self, action):
        t = len(self.told)
        self.told.append(action)
        last = np.full(2, t == 1)
        info = {"final_obs": np.array([np.full(3, 5.0), np.full(3, 7.0)]), "_final_obs": last} if t == 1 else {}
        return self.next[t + 1], np.array([8.0, 16.0]), last & [True, False], last & [False, True], info


def test_what_is_learnt_from_is_what_happened(monkeypatch):
    """Values are sums of observations: time that is up is followed by the value of the last state, an end by none."""
    own = job(ppo.PENDULUM, copies=2, horizon=3)
    experience = ppo.Experience(agent(own), own)
    experience.envs = script = Script()
    experience.observations = script.next[0]
    monkeypatch.setattr(experience.agent, "value", lambda observations: observations.sum(-1))
    now, action, chance, ahead, returns = experience.collect()
    assert torch.equal(now.view(3, 2, 3), torch.tensor(script.next[:3]))
    assert np.allclose(np.stack(script.told), 2 * action.view(3, 2, 1).numpy())
    value, decay = torch.tensor(script.next).sum(-1), 0.9 * ppo.TRACE
    reward = torch.tensor([1.0, 2.0])
    after = torch.stack([value[1], torch.tensor([0.0, 21.0]), value[3]])
    surprise = reward + 0.9 * after - value[:3]
    advantage = torch.stack([surprise[0] + decay * surprise[1], surprise[1], surprise[2]])
    assert torch.allclose(returns.view(3, 2), advantage + value[:3])
    assert torch.allclose(ahead.view(3, 2), (advantage - advantage.mean()) / advantage.std(), atol=1e-5)
    assert (
        experience.recent() == 24.0
        and list(experience.returns) == [16.0, 32.0]
        and experience.running.tolist() == [8.0, 16.0]
    )
    policy = experience.agent.policy
    third = policy.onward(now.view(3, 2, 3)[2])
    assert torch.equal(experience.z, third[1]), "the third step begins with zeros"
    chances = experience.task.distribution(policy(now), experience.agent.spread)
    assert torch.allclose(chances.log_prob(action), chance, atol=1e-2)


def test_an_unfinished_episode_counts_as_it_began():
    own = job(ppo.PENDULUM, who.BLOCK)
    experience = ppo.Experience(agent(own), own)
    experience.collect()
    assert not experience.returns and experience.taken == TINY["horizon"] == 8
    assert experience.recent() == pytest.approx(experience.running.mean() / 8 * 40)


def test_an_explicit_policy_carries_nothing():
    own = job(ppo.CARTPOLE, who.LOOP)
    experience = ppo.Experience(agent(own), own)
    experience.collect()
    assert experience.z is None


@pytest.mark.parametrize("case", CASES)
def test_the_surrogate_is_clipped(case):
    own = agent(job(case, who.BLOCK))
    observations = torch.randn(4, len(own.task.scale))
    with torch.no_grad():
        chances = own.task.distribution(own.policy(observations), own.spread)
        actions = chances.sample()
        before = chances.log_prob(actions)
    advantage, returns = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.randn(4)

    def gradient(shift):
        """By the policy's output; the action was less likely by e^shift when it was taken."""
        own.zero_grad()
        loss = own.loss((observations, actions, before - torch.tensor(shift), advantage, returns))
        loss.backward()
        critic = (own.value(observations) - returns).square().mean() / 2
        return loss - critic, own.policy.head.weight.grad.clone()

    value, slope = gradient([0.0] * 4)
    assert torch.allclose(value, torch.tensor(0.0), atol=1e-6)
    own.zero_grad()
    (-(own.task.distribution(own.policy(observations), own.spread).log_prob(actions) * advantage).mean()).backward()
    assert torch.allclose(slope, own.policy.head.weight.grad, atol=1e-6)
    value, slope = gradient([0.5, -0.5, 0.5, -0.5])  # all went the way of their advantage, further than allowed
    assert value.item() == pytest.approx(-(2 * 1.2 - 2 * 0.8) / 4, abs=1e-5) and not slope.any()


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_episodes_are_those_of_gymnasium(case, warm):
    own = job(case)
    policy, returns, counts, seen, rest = control.build(own), [], [], [], []
    for i in range(TINY["episodes"]):
        env = gymnasium.make(case)
        observation, _ = env.reset(seed=control.TESTED + i)
        total, z = 0.0, None
        for _ in range(40):
            now = torch.tensor(observation, dtype=torch.float32)[None]
            with torch.no_grad():
                out, z = policy.onward(now, z if warm else None)
            counts.append(policy.body.last.steps.item())
            seen += [now[0]] * (i == 0)
            rest += [z[0]] * (i == 0)
            action = 2 * out[0].numpy() if case == ppo.PENDULUM else int(out.argmax())
            observation, reward, ended, cut, _ = env.step(action)
            total += reward
            if ended or cut:
                break
        returns.append(total)
    played = control.play(policy, own, warm=warm)
    assert played["return"] == pytest.approx(np.mean(returns), rel=1e-3)
    assert played["steps"] == pytest.approx(np.mean(counts), abs=0.1) and played["most_steps"] == max(counts)
    assert played["converged"] == 100
    assert torch.allclose(played["seen"], torch.stack(seen), atol=1e-3)
    assert torch.allclose(played["rest"], torch.stack(rest), atol=1e-2)


def test_a_warm_solve_ends_where_a_cold_one_does():
    own = job(ppo.PENDULUM, tol=1e-5)
    policy = control.build(own)
    played, cold = (control.play(policy, own, warm=warm) for warm in (True, False))
    with torch.no_grad():
        z = policy.onward(played["seen"])[1]
    assert played["seen"].shape == (40, 3) and torch.allclose(played["rest"], z, atol=1e-3)
    assert played["return"] == pytest.approx(cold["return"], rel=1e-3) and played["steps"] != cold["steps"]


@pytest.mark.parametrize("name", control.STUDY.contestants)
def test_a_policy_is_its_body_between_two_layers(name):
    own = job(ppo.CARTPOLE, name, tol=1e-6, max_steps=60)
    policy, x = control.build(own), torch.randn(5, 4)
    out, z = policy.onward(x)
    inner = policy.stem(x / torch.tensor(ppo.TASKS[ppo.CARTPOLE].scale))
    assert torch.allclose(policy(x), policy.head(policy.body(inner)), atol=1e-5) and torch.equal(policy(x), out)
    carried = ppo.carried(policy, x, None)[1]
    assert (carried is None) == (name not in (who.DEQ, who.HYBRID))
    if carried is not None:
        core = policy.body.core if name == who.HYBRID else policy.body
        given = policy.body.prelude(inner) if name == who.HYBRID else inner
        assert torch.allclose(z, core(given), atol=1e-5)
        assert torch.allclose(policy.onward(x, z)[0], out, atol=1e-4) and core.last.steps.max() <= 2


def test_a_limited_policy_takes_so_many_steps():
    for name in (who.DEQ, who.LOOP):
        policy, x = control.build(job(ppo.PENDULUM, name)), torch.randn(3, 3)
        inner = policy.stem(x / policy.scale)
        cell = policy.body.cell
        u, z0 = cell.inject(inner), torch.randn(3, TINY["width"])
        wanted = cell(cell(cell(z0, u), u), u)
        few = control.limited(policy, 3)
        assert torch.allclose(few.onward(x, z0)[1], wanted, atol=1e-6) and who.steps(few.body) == 3
        assert policy.body.last is None
    hybrid = control.limited(control.build(job(ppo.PENDULUM, who.HYBRID)), 2)
    assert hybrid.onward(x)[0].shape == (3, 1) and hybrid.body.core.last.steps.max() == 2


def test_ppo_learns():
    own = job(ppo.CARTPOLE, who.BLOCK, width=16, critic=32, copies=16, horizon=32, epochs=8, batch=128, episodes=8)
    own.settings.update(updates={ppo.CARTPOLE: 320}, limit={ppo.CARTPOLE: 200})
    untrained = control.play(control.build(own), own, warm=True)["return"]
    found = control.run(own)
    assert found["return"] > 3 * untrained and found["curve"][-1][2] > 2 * found["curve"][0][2]
    assert found["training_seconds"] > found["seconds"] and "cold_steps" not in found


def test_the_wide_policy_has_the_parameters_of_the_stack():
    size = {n: parameters(control.build(job(ppo.CARTPOLE, n, width=16, depth=4))) for n in (who.WIDE, who.STACK)}
    assert abs(size[who.WIDE] / size[who.STACK] - 1) < 0.1


def test_a_limited_copy_leaves_the_policy_alone():
    policy = control.build(job(ppo.PENDULUM))
    before = copy.deepcopy(policy.body.adjoint)
    control.limited(policy, 2)
    assert policy.body.adjoint == before


def test_what_is_said_is_what_was_measured():
    curve = [[1, 2.0, 10.0], [2, 4.0, 20.0]]
    common = {"case": ppo.CARTPOLE, "curve": curve, "return": 100.0}
    runs = []
    for seed in (0, 1):
        warm = {"steps": 3.0 + seed, "cold_steps": 9.0 + seed, "cold_return": 80.0, "moved": 0.125}
        curves = {"cold_by_steps": [[1, 30.0], [2, 60.0]], "warm_by_steps": [[1, 40.0], [2, 70.0]]}
        runs += [common | {"contestant": who.DEQ, "seed": seed} | warm | curves]
        quick = [[1, 1.0, 5.0], [2, 3.0, 15.0]]
        runs += [common | {"contestant": who.STACK, "seed": seed, "curve": quick}]
    time, steps, held = control.says(runs)
    assert time.endswith("after 3.0 s, when the quickest is done: DEQ 10, stack 15.")
    assert "from the last equilibrium takes 3.5 steps, one from zeros 9.5: a win." in steps
    assert "z moves by 12 % of its norm. The return is 100, all solves from zeros 80." in steps
    assert held.endswith(
        "held to 1 step an action: 40 where each begins with the last state, 30 where it begins with zeros."
    )
