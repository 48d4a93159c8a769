"""Control: CartPole and Pendulum, by policies that PPO trains; a DEQ begins each solve where the last one ended."""

import copy
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
from tritondeq.demo.common import parameters

from . import contestants as who
from . import plots
from .study import Draw, Job, Measure, Run, Study
from .train import COSTS, Clock, at_equal_time, cost, latency, train
from .verdict import compare

CLIP, TRACE, RECENT = 0.2, 0.95, 20  # of PPO: of the ratio, lambda of advantages; episodes that a curve is the mean of
TESTED = 1_000_000  # seeds of test episodes begin here
WIDTHS = range(8, 257, 4)


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
        return self.critic(observations / self.policy.scale).squeeze(-1)

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The clipped surrogate of PPO (Schulman et al. 2017, equation 7), and half the critic's squared error."""
        observations, actions, before, advantages, returns = batch
        now = self.task.distribution(self.policy(observations), self.spread).log_prob(actions)
        ratio = (now - before).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        return F.mse_loss(self.value(observations), returns) / 2 - gain.mean()


def build(job: Job) -> Policy:
    """The contestant's policy, drawn from the job's seed; torch's own generator goes on from there."""
    settings, task = job.settings, TASKS[job.case]
    options = {"tol": settings["tol"], "max_steps": settings["max_steps"]}

    def made(contestant: str, width: int) -> Policy:
        return Policy(contestant, task, width, settings["depth"], **options)

    width = settings["width"]
    if job.contestant == who.WIDE:
        target = parameters(made(who.STACK, width))
        width = who.matched(lambda width: parameters(made(who.DEQ, width)), target, WIDTHS)
    torch.manual_seed(job.seed)
    return made(job.contestant, width).to(job.device)


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


@torch.no_grad()
def play(policy: Policy, job: Job, *, warm: bool, carry: bool = False) -> dict[str, Any]:
    """Episodes under the likeliest actions, the same for every contestant of a seed.

    Args:
        warm: Whether a solve begins with the equilibrium of the step before, or with zeros.
        carry: Begin warm what is no equilibrium, too.

    Returns:
        `return`, the mean; `steps` of the body an action, and the share of them that `converged`, in %; `seen` [T, O]
        and `rest` [T, D], the observations and states of the first episode.
    """
    task, count = TASKS[job.case], job.settings["episodes"]
    envs = environments(job.case, count)
    observations, _ = envs.reset(seed=TESTED + 1000 * job.seed)
    going, total, z = np.ones(count, dtype=bool), np.zeros(count), None
    steps, converged, seen, rest = [], [], [], []
    for _ in range(job.settings["limit"][job.case]):
        now = torch.as_tensor(observations, dtype=torch.float32, device=job.device)
        out, z = policy.onward(now, z) if carry else carried(policy, now, z if warm else None)
        alive, told, last = torch.as_tensor(going), who.steps(policy.body), who.solution(policy.body)
        steps.append(told.cpu()[alive] if isinstance(told, Tensor) else torch.full((int(alive.sum()),), told))
        if last is not None:
            converged.append(last.converged.cpu()[alive].float())
        if going[0]:
            seen.append(now[0])
            rest.append(z[0] if z is not None else now[0])
        observations, reward, ended, cut, _ = envs.step(task.taken(task.best(out)))
        total += reward * going
        going &= ~(ended | cut)
        if not going.any():
            break
    found = {"return": float(total.mean()), "steps": torch.cat(steps).mean().item()}
    found |= {"most_steps": torch.cat(steps).max().item(), "seen": torch.stack(seen), "rest": torch.stack(rest)}
    return found | ({"converged": 100 * torch.cat(converged).mean().item()} if converged else {})


def limited(policy: Policy, steps: int) -> Policy:
    """A copy whose solve or loop takes so many steps, whatever the residual."""
    policy = copy.deepcopy(policy)
    core = policy.body.core if isinstance(policy.body, who.Hybrid) else policy.body
    core.solver, core.adjoint = tdeq.Picard(), tdeq.Unrolled(steps)
    return policy


def by_steps(policy: Policy, job: Job) -> dict[str, Any]:
    """Curves of the return over the steps that a solve, or a loop, is allowed an action; beginning cold and warm."""
    if isinstance(policy.body, who.Stack):
        return {}
    curves = {"cold_by_steps": [], "warm_by_steps": []}
    for allowed in job.settings["allowed"]:
        few = limited(policy, allowed)
        curves["cold_by_steps"].append([allowed, play(few, job, warm=False)["return"]])
        curves["warm_by_steps"].append([allowed, play(few, job, warm=True, carry=True)["return"]])
    return curves


def action_seconds(policy: Policy, seen: Tensor, device: torch.device, warm: bool) -> float:
    """Of one action for one observation after another."""

    def episode() -> None:
        z = None
        for now in seen:
            z = carried(policy, now[None], z if warm else None)[1]

    return latency(episode, len(seen), device)["sample_seconds"]


def run(job: Job) -> dict[str, Any]:
    settings, policy = job.settings, build(job)
    agent = Agent(policy, TASKS[job.case], settings["critic"]).to(job.device)
    experience, acted = Experience(agent, job), []
    first = torch.randn(settings["batch"], len(TASKS[job.case].scale), device=job.device)
    found = cost(policy, lambda: policy(first).square().mean())

    def check() -> float:
        acted.append(experience.clock.spent)
        return experience.recent()

    rates = {"updates": settings["updates"][job.case], "lr": settings["lr"], "weight_decay": 0.0}
    found |= train(agent, agent.loss, iter(experience), **rates, check=check)
    found["curve"] = [[n, spent + more, value] for (n, spent, value), more in zip(found["curve"], acted, strict=True)]
    found["training_seconds"] = found["seconds"] + experience.clock.spent
    played = play(policy, job, warm=True)
    seen, rest = played.pop("seen"), played.pop("rest")
    found |= played | {"sample_seconds": action_seconds(policy, seen, job.device, warm=True)}
    if who.solution(policy.body) is not None:
        cold = play(policy, job, warm=False)
        found |= {"cold_return": cold["return"], "cold_steps": cold["steps"]}
        found["cold_seconds"] = action_seconds(policy, seen, job.device, warm=False)
        with torch.no_grad():
            alone = policy.onward(seen)[1]
        size = alone.norm(dim=1)
        found["apart"] = ((rest - alone).norm(dim=1) / size).median().item()
        found["moved"] = (alone.diff(dim=0).norm(dim=1) / size[1:]).mean().item()
    return found | by_steps(policy, job)


def _present(runs: list[Run]) -> list[str]:
    """Cases of which there are runs."""
    return [case for case in STUDY.cases if plots.of(runs, case=case)]


def pictures(runs: list[Run]) -> dict[str, Draw]:
    cases = _present(runs)
    curves = [
        ("cold_by_steps", "steps an action, cold start", "return"),
        ("warm_by_steps", "steps an action, warm start", "return"),
    ]

    def costs(figure: Any) -> None:
        views = [("steps", "steps an action"), ("sample_seconds", "ms an action")]
        scaled = [run | {"sample_seconds": 1e3 * run["sample_seconds"]} for run in runs]
        for row, case in zip(figure.subplots(len(cases), 2, squeeze=False), cases, strict=True):
            for ax, (key, label) in zip(row, views, strict=True):
                plots.bars(ax, plots.of(scaled, case=case), key)
                ax.set(ylabel=label)
                ax.set_title(case, fontsize=10)

    return {
        "steps": lambda figure: plots.panels(figure, cases, curves, runs),
        "costs": costs,
        "learning": lambda figure: plots.learning(figure, cases, runs, "return"),
    }


def says(runs: list[Run]) -> Iterator[str]:
    for case in _present(runs):
        own = plots.of(runs, case=case)
        seconds, values = at_equal_time(
            {name: [r["curve"] for r in plots.of(own, contestant=name)] for name in plots.names(own)}
        )
        fared = ", ".join(f"{name} {value:.0f}" for name, value in values.items())
        yield f"{case}, return of the last episodes after {seconds:.1f} s, when the quickest is done: {fared}."
        for name in (name for name in plots.names(own) if name not in who.RIVALS):
            these = plots.of(own, contestant=name)
            values = {key: [run[key] for run in these] for key in ("steps", "cold_steps", "return", "cold_return")}
            saved = compare(values["steps"], values["cold_steps"], "less")
            moved = mean(run["moved"] for run in these)
            yield (
                f"{case}, {name}: a solve from the last equilibrium takes {saved.ours:.1f} steps, one from zeros "
                f"{saved.theirs:.1f}{saved.word and ': a ' + saved.word}. From action to action z moves by "
                f"{100 * moved:.0f} % of its norm. The return is {mean(values['return']):.0f}, all solves from zeros "
                f"{mean(values['cold_return']):.0f}."
            )
        for run in plots.of(own, seed=own[0]["seed"]):
            if "cold_by_steps" in run:
                these = plots.of(own, contestant=run["contestant"])
                few = run["cold_by_steps"][0][0]
                cold, warm = (mean(r[key][0][1] for r in these) for key in ("cold_by_steps", "warm_by_steps"))
                yield (
                    f"{case}, {run['contestant']}, held to {few} step{'s' * (few > 1)} an action: {warm:.0f} where "
                    f"each begins with the last state, {cold:.0f} where it begins with zeros."
                )


SHARED = {"tol": 1e-3, "max_steps": 30, "width": 32, "depth": 4, "critic": 64, "copies": 32, "horizon": 64}
SHARED |= {"epochs": 10, "batch": 256, "lr": 3e-3, "episodes": 16, "allowed": [1, 2, 4, 8]}
SHARED |= {"limit": {CARTPOLE: 500, PENDULUM: 200}}
TINY = {"width": 8, "depth": 2, "critic": 8, "copies": 4, "horizon": 8, "epochs": 2, "batch": 16, "episodes": 2}
TINY |= {"updates": {CARTPOLE: 8, PENDULUM: 8}, "limit": {CARTPOLE: 15, PENDULUM: 15}, "allowed": [1, 2]}
FULL = {"updates": {CARTPOLE: 4000, PENDULUM: 8000}, "width": 64, "depth": 8, "episodes": 100}
STUDY = Study(
    name="control",
    title="Control: a solve that begins where the last one ended",
    question=(
        "does a policy that is an equilibrium balance as well as a stack, and does it act as fast, if each solve "
        "begins with the equilibrium of the action before? The cell is `cells.MLP`. All are trained from experience by "
        "PPO ([Schulman et al. 2017](https://arxiv.org/abs/1707.06347)), beside the same plain critic, in the same "
        "number of environment steps. They are played by the likeliest action, one at a time as a controller would; "
        "explicit nets begin every action anew. The one learning rate was picked from 1e-3 and 3e-3 by runs of the "
        "equilibrium and the stack with a seed that is not reported. The picture of steps takes the same trained cells "
        "for a fixed number of steps."
    ),
    data=(
        "CartPole-v1 (a push to the left or right, 500 steps at most, which is the highest return) and Pendulum-v1 "
        "(a torque, 200 steps) of gymnasium. Episodes that are played begin from states of their own, the same for "
        "every contestant of a seed."
    ),
    settings={
        "tiny": SHARED | TINY,
        "quick": SHARED | {"updates": {CARTPOLE: 1200, PENDULUM: 1200}},
        "full": SHARED | FULL,
    },
    contestants=tuple(name for name in who.ALL if name != who.WIDE),
    measures=(
        Measure("return", "return", "more", main=True),
        Measure("sample_seconds", "an action, us", "less", digits=0, scale=1e6, main=True),
        Measure("cold_seconds", "an action from zeros, us", digits=0, scale=1e6),
        Measure("cold_steps", "steps from zeros"),
        Measure("cold_return", "return, all from zeros"),
        Measure("moved", "move of z an action, %", scale=100),
        Measure("apart", "z from the last one against z from zeros, %", digits=2, scale=100),
        Measure("training_seconds", "training and acting, s", "less"),
        *(measure for measure in COSTS if measure.key != "sample_seconds"),
    ),
    run=run,
    pictures=pictures,
    says=says,
    cases=(CARTPOLE, PENDULUM),
    packages=("gymnasium",),
)
