"""Proximal policy optimisation (Schulman et al. 2017) of a policy that may begin a solve where the last one ended."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

import tritondeq as tdeq

from . import contestants as who
from .study import Job
from .train import Clock

CLIP, TRACE, RECENT = 0.2, 0.95, 20  # of the ratio, lambda of advantages; episodes that a curve is the mean of


@dataclass(frozen=True)
class Task:
    """An environment of gymnasium, and what is divided out of what it tells and asks.

    Attributes:
        scale: Of each observation.
        force: The largest action; 0 where actions are a choice of two.
        reward: Of each reward, for the critic.
        discount: Of rewards to come.
    """

    scale: tuple[float, ...]
    force: float
    reward: float
    discount: float

    def distribution(self, out: Tensor, spread: Tensor) -> Distribution:
        """Of actions, from what the policy returned."""
        if self.force:
            return Independent(Normal(out, spread.exp().expand_as(out), validate_args=False), 1, validate_args=False)
        return Categorical(logits=out, validate_args=False)

    def taken(self, action: Tensor) -> np.ndarray:
        """What the environment is told."""
        return (self.force * action if self.force else action).cpu().numpy()

    def best(self, out: Tensor) -> Tensor:
        """The likeliest action."""
        return out if self.force else out.argmax(-1)


CARTPOLE, PENDULUM = "CartPole-v1", "Pendulum-v1"
TASKS = {
    CARTPOLE: Task((2.4, 2.0, 0.2, 2.0), force=0.0, reward=1.0, discount=0.98),
    PENDULUM: Task((1.0, 1.0, 4.0), force=2.0, reward=8.0, discount=0.9),
}


class Policy(nn.Module):
    """Observations [B, O] -> logits of two actions [B, 2], or the mean of an action [B, 1]."""

    def __init__(self, contestant: str, task: Task, width: int, depth: int, **options: Any):
        super().__init__()
        self.register_buffer("scale", torch.tensor(task.scale))
        self.stem = nn.Linear(len(task.scale), width)
        self.body = who.body(contestant, lambda: tdeq.cells.MLP(width, hidden=width), depth, **options)
        self.head = nn.Linear(width, 1 if task.force else 2)
        with torch.no_grad():
            self.head.weight.mul_(0.01)  # as good as indifferent at first, which PPO likes

    def forward(self, observations: Tensor, z0: Tensor | None = None) -> Tensor:
        """Returns the head's outputs for observations, [B, outputs]."""
        return self.onward(observations, z0)[0]

    def onward(self, observations: Tensor, z0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(what it returns, the state [B, D] that a next call may start from)."""
        x, body = self.stem(observations / self.scale), self.body
        if isinstance(body, who.Hybrid):
            z = body.core(body.prelude(x), z0)
            return self.head(body.coda(x, z)), z
        z = body(x, z0)
        return self.head(z), z


class Agent(nn.Module):
    """A policy, the spread of its actions, and a critic, which is the same plain net for all."""

    def __init__(self, policy: Policy, task: Task, width: int):
        super().__init__()
        self.policy, self.task = policy, task
        self.spread = nn.Parameter(torch.full((1,), -0.5))
        sizes = len(task.scale), width
        layers = nn.Linear(*sizes), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        self.critic = nn.Sequential(*layers)

    def value(self, observations: Tensor) -> Tensor:
        """Returns the critic's values of observations, [B]."""
        return self.critic(observations / self.policy.scale).squeeze(-1)

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The clipped surrogate of PPO (Schulman et al. 2017, equation 7), and half the critic's squared error."""
        observations, actions, before, advantages, returns = batch
        now = self.task.distribution(self.policy(observations), self.spread).log_prob(actions)
        ratio = (now - before).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        return F.mse_loss(self.value(observations), returns) / 2 - gain.mean()


def environments(case: str, count: int) -> Any:
    """So many copies, which begin anew in the step in which an episode ends."""
    import gymnasium

    options = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    return gymnasium.make_vec(case, num_envs=count, vectorization_mode="sync", vector_kwargs=options)


class Experience:
    """Minibatches for PPO, an endless iterator, from copies of the environment that the agent acts in.

    Attributes:
        returns: Of the last episodes.
        clock: The time that acting took.
    """

    def __init__(self, agent: Agent, job: Job):
        self.agent, self.task, self.settings, self.device = agent, TASKS[job.case], job.settings, job.device
        self.envs = environments(job.case, self.settings["copies"])
        self.observations, _ = self.envs.reset(seed=1000 * job.seed)
        self.running, self.taken = np.zeros(self.settings["copies"]), 0
        self.returns: deque[float] = deque(maxlen=RECENT)
        self.clock, self.limit = Clock(job.device), job.settings["limit"][job.case]
        self.z: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        while True:
            with self.clock:
                seen = self.collect()
            for _ in range(self.settings["epochs"]):
                for index in torch.randperm(len(seen[0])).split(self.settings["batch"]):
                    yield tuple(t[index.to(self.device)] for t in seen)

    def recent(self) -> float:
        """The mean return of the last episodes; until one has ended, that of an episode that goes on as it began."""
        if self.returns:
            return mean(self.returns)
        return float(self.running.mean()) * self.limit / max(1, self.taken)

    def tensor(self, array: np.ndarray) -> Tensor:
        """Returns the array as a float32 tensor on the device."""
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)

    @torch.no_grad()
    def collect(self) -> tuple[Tensor, ...]:
        """Observations, actions, their log-probabilities, advantages and returns of so many steps in each copy."""
        steps, task = [], self.task
        for _ in range(self.settings["horizon"]):
            now = self.tensor(self.observations)
            out, self.z = carried(self.agent.policy, now, self.z)
            chances = task.distribution(out, self.agent.spread)
            action = chances.sample()
            self.observations, reward, ended, cut, info = self.envs.step(task.taken(action))
            done, after = ended | cut, self.observations
            self.running += reward
            self.taken += 1
            if done.any():
                after = after.copy()
                after[done] = np.stack(info["final_obs"][done])
                self.returns.extend(self.running[done].tolist())
                self.running[done] = 0
                if self.z is not None:
                    self.z[torch.as_tensor(done, device=self.z.device)] = 0
            numbers = [reward / task.reward, ended, done]
            rest = [self.tensor(each) for each in (*numbers, after)]
            steps.append((now, action, chances.log_prob(action), *rest))
        now, action, chance, reward, ended, done, after = (torch.stack(each) for each in zip(*steps, strict=True))
        values = self.agent.value(now)
        surprise = reward + task.discount * (1 - ended) * self.agent.value(after) - values
        ahead = advantages(surprise, done, task.discount * TRACE)
        centred = (ahead - ahead.mean()) / (ahead.std() + 1e-8)
        return tuple(t.flatten(0, 1) for t in (now, action, chance, centred, ahead + values))


def advantages(surprise: Tensor, done: Tensor, decay: float) -> Tensor:
    """A_t = surprise_t + decay (1 - done_t) A_t+1, each [T, B] (Schulman et al. 2016, equation 16)."""
    found, ahead = torch.empty_like(surprise), torch.zeros_like(surprise[0])
    for t in reversed(range(len(surprise))):
        ahead = surprise[t] + decay * (1 - done[t]) * ahead
        found[t] = ahead
    return found


def carried(policy: Policy, observations: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What the policy returns, and the state to begin the next solve with: None where there is none to solve."""
    out, z = policy.onward(observations, z)
    return out, z if who.solution(policy.body) is not None else None
