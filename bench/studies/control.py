"""Control: CartPole and Pendulum, by policies that PPO trains; a DEQ begins each solve where the last one ended."""

import copy
from collections.abc import Iterator
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tritondeq as tdeq
from tritondeq.toolbox import parameters

from . import contestants as who
from . import plots
from .ppo import CARTPOLE, PENDULUM, TASKS, Agent, Experience, Policy, carried, environments
from .study import Draw, Job, Measure, Run, Study
from .train import COSTS, at_equal_time, cost, latency, train
from .verdict import compare

TESTED = 1_000_000  # seeds of test episodes begin here
WIDTHS = range(8, 257, 4)


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


@torch.no_grad()
def play(policy: Policy, job: Job, *, warm: bool, carry: bool = False) -> dict[str, Any]:
    """Plays episodes under the likeliest actions, the same for every contestant of a seed.

    Args:
        policy: What acts.
        job: The task, and the number of episodes.
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
    """Trains one contestant with one seed and returns what was measured."""
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
    """Returns what to draw, by name."""
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
    """Yields what the numbers show, in sentences."""
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
