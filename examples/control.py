"""A policy learns to swing a pendulum up and to balance it, by gradients through simulation and equilibrium.

Run:  python examples/control.py
Takes about 60 s of processor time on one core (100 steps took 102 s), by `time`, with torch 2.14.
"""

import argparse
import math
import time

import torch
from torch import Tensor, nn

import tritondeq as tdeq

FEATURES, BATCH, SECONDS, DT, TORQUE = 32, 32, 4.0, 0.1, 5.0


def hanging(count: int, device: str) -> Tensor:
    """Returns states (angle, speed) [count, 2] near the lowest point; an angle of 0 is upright."""
    return torch.tensor([math.pi, 0.0], device=device) + 0.5 * torch.randn(count, 2).to(device)


def simulate(state: Tensor, torque: Tensor) -> Tensor:
    """Returns the states DT seconds later, of a rod of 1 kg and 1 m."""
    angle, speed = state.unbind(1)
    speed = (speed + DT * (15 * angle.sin() + 3 * torque)).clamp(-10, 10)
    return torch.stack([angle + DT * speed, speed], dim=1)


class Policy(nn.Module):
    """States [B, 2] -> torques [B]: the equilibrium tanh(W z + U x + b), and a linear head."""

    def __init__(self):
        super().__init__()
        self.core = tdeq.DEQ(tdeq.cells.Affine(FEATURES, 3, contraction=0.9))  # one equilibrium, from any start
        self.head = nn.Linear(FEATURES, 1)

    def forward(self, state: Tensor, z0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the torques and the equilibria, where the next solve may start: the state has changed little."""
        angle, speed = state.unbind(1)
        z = self.core(torch.stack([angle.cos(), angle.sin(), speed / 5], dim=1), z0=z0)
        return TORQUE * self.head(z).squeeze(1).tanh(), z


def episode(policy: Policy, state: Tensor, warm: bool = True) -> tuple[Tensor, Tensor, float]:
    """Returns the mean cost, the share of pendulums that stand upright at the end, and the mean evaluations a solve."""
    z, cost, evaluations = None, torch.zeros(len(state), device=state.device), []
    moments = round(SECONDS / DT)
    for _ in range(moments):
        torque, z = policy(state, z.detach() if warm and z is not None else None)
        evaluations.append(policy.core.last.steps.float().mean())
        state = simulate(state, torque)
        cost = cost + (1 - state[:, 0].cos()) + 0.01 * state[:, 1] ** 2 + 0.001 * torque**2
    upright = (state[:, 0].cos() > 0.9) & (state[:, 1].abs() < 1)
    return (cost / moments).mean(), upright.float().mean(), torch.stack(evaluations).mean().item()


def main() -> None:
    """Trains the policy, and prints how it does on new pendulums, with warm starts of its solves and without."""
    args = flags()
    torch.set_num_threads(1)  # a second thread costs such small nets more than it gains
    torch.manual_seed(args.seed)
    policy = Policy().to(args.device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    tests = hanging(200, args.device)
    began = time.process_time()
    for step in range(args.steps + 1):
        if step % max(1, args.steps // 4) == 0:
            with torch.no_grad():
                cost, upright, _ = episode(policy, tests)
            print(
                f"after {step:3} steps: cost {cost:.3f}, upright after {SECONDS:g} s {100 * upright:5.1f} %", flush=True
            )
        if step < args.steps:
            cost, _, _ = episode(policy, hanging(BATCH, args.device))
            optimizer.zero_grad()
            cost.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)  # chaotic moments make gradients large
            optimizer.step()
    print(f"trained for {time.process_time() - began:.1f} s of the processor's time")
    for name, warm in (("zeros", False), ("the last moment's equilibrium", True)):
        with torch.no_grad():
            cost, _, evaluations = episode(policy, tests, warm)
        print(f"solves that start from {name}: {evaluations:.1f} evaluations, cost {cost:.3f}")


def flags() -> argparse.Namespace:
    """Parses the command line."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=60, help="training steps (default: 60)")
    parser.add_argument("--device", choices=devices, default=devices[-1], help="cpu, or cuda where there is a GPU")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 1 or not 0 <= args.seed < 2**31:
        parser.error("--steps takes integers from 1 on, --seed from 0 to 2147483647")
    return args


if __name__ == "__main__":
    main()
