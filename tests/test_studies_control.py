"""Control: PPO's parts in closed form, episodes as gymnasium plays them, on which policies are tested."""

import numpy as np
import pytest
import torch

from tritondeq.bench.studies import contestants as who
from tritondeq.bench.studies import control, ppo
from tritondeq.bench.studies.study import Job

gymnasium = pytest.importorskip("gymnasium")
CASES = (ppo.CARTPOLE, ppo.PENDULUM)
TINY = control.STUDY.settings["tiny"] | {"limit": dict.fromkeys(CASES, 40)}


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
    """Each solve of a warm episode begins where the last one ended."""
    task = job(case)
    policy, returns, counts = control.build(task), [], []
    for i in range(TINY["episodes"]):
        env = gymnasium.make(case)
        observation, _ = env.reset(seed=control.TESTED + i)
        returns.append(0.0)
        z, over = None, False
        for _ in range(40):
            with torch.no_grad():
                out, z = policy.onward(torch.tensor(observation, dtype=torch.float32)[None], z if warm else None)
            counts.append(policy.body.last.steps.item())
            observation, reward, *over, _ = env.step(2 * out[0].numpy() if case == ppo.PENDULUM else int(out.argmax()))
            returns[-1] += reward
            if any(over):
                break
    played = control.play(policy, task, warm=warm)
    assert played["return"] == pytest.approx(np.mean(returns), rel=1e-3) and played["converged"] == 100
    assert played["steps"] == pytest.approx(np.mean(counts), abs=0.1) and played["most_steps"] == max(counts)
