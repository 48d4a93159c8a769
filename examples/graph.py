"""Every node of a chain learns the class that only its first node shows: a stack sees four edges far.

Run:  python examples/graph.py
Takes 7 s of processor time on one core, by `time`, with torch 2.14.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritondeq as tdeq

CLASSES, FEATURES, DEPTH = 3, 16, 4
Graph = tuple[Tensor, Tensor, Tensor]  # features [N, CLASSES], edges [2, E] from and to, their weights [E, 1]


def chains(count: int, shortest: int, longest: int, device: str) -> tuple[Graph, Tensor, Tensor]:
    """Returns chains of random lengths as one graph, and the class and the place in its chain of each node [N]."""
    lengths = torch.randint(shortest, longest + 1, (count,))
    distance = torch.cat([torch.arange(int(length)) for length in lengths])
    classes = torch.randint(CLASSES, (count,)).repeat_interleave(lengths)
    features = F.one_hot(classes, CLASSES) * (distance == 0).unsqueeze(1)
    nodes = torch.arange(len(distance))
    later = nodes[distance > 0]
    edges = torch.stack([torch.cat([later, later - 1, nodes]), torch.cat([later - 1, later, nodes])])
    degree = edges[0].bincount().float()  # every node is a neighbour of its own
    weights = degree[edges].prod(0).rsqrt().unsqueeze(1)
    graph = (features.float().to(device), edges.to(device), weights.to(device))
    return graph, classes.to(device), distance.to(device)


class GraphConv(tdeq.cells.Cell):
    """f(z, x) = tanh(0.95 A z W + x U) with ||W|| = 1: contractive on every graph, for ||A|| = 1.

    All nodes are one sample, since each depends on its neighbours; hence `batch_dims = 0`.
    """

    batch_dims = 0

    def __init__(self, inputs: int):
        super().__init__()
        self.input = nn.Linear(inputs, FEATURES, bias=False)
        weight = nn.Linear(FEATURES, FEATURES, bias=False)
        nn.init.eye_(weight.weight)  # begins as a mean of neighbours
        self.weight = nn.utils.parametrizations.spectral_norm(weight, n_power_iterations=5)

    def inject(self, graph: Graph) -> Graph:
        """Returns what doesn't depend on z, computed once a solve."""
        features, edges, weights = graph
        return self.input(features), edges, weights

    def initial(self, graph: Graph, injection: Graph) -> Tensor:
        """Returns where a solve starts."""
        return torch.zeros_like(injection[0])

    def forward(self, z: Tensor, injection: Graph) -> Tensor:
        """Evaluates the convolution on node states z [N, FEATURES]."""
        u, (source, target), weights = injection
        gathered = torch.zeros_like(z).index_add(0, target, weights * z[source])
        return torch.tanh(0.95 * self.weight(gathered) + u)


class Stack(nn.Module):
    """The explicit rival: graph convolutions one after another, each with other weights."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(GraphConv(CLASSES) for _ in range(DEPTH))

    def forward(self, graph: Graph) -> Tensor:
        z = self.layers[0].initial(graph, self.layers[0].inject(graph))
        for layer in self.layers:
            z = layer(z, layer.inject(graph))
        return z


def main() -> None:
    """Trains both nets, and prints the share of nodes that are right by their distance from the root."""
    args = flags()
    torch.set_num_threads(1)  # a second thread costs such small tensors more than it gains
    torch.manual_seed(args.seed)
    train_graph, train_classes, _ = chains(60, 5, args.longest, args.device)
    test_graph, test_classes, distance = chains(60, 5, args.longest, args.device)
    ranges = ((0, 3), (4, 9), (10, args.longest))
    print(f"nodes of new chains of up to {args.longest} that are right, by distance from the first:")
    print(" " * 28 + "".join(f"{f'{low} to {high}':>10}" for low, high in ranges) + "   evaluations")
    adjoint = tdeq.Implicit(tol=1e-3, max_steps=200)
    solved = tdeq.DEQ(GraphConv(CLASSES), solver=tdeq.Anderson(), adjoint=adjoint, tol=1e-5, max_steps=200)
    for name, body in (("equilibrium", solved), (f"stack of {DEPTH} convolutions", Stack())):
        # States fade with the distance; the norm brings them all to one size, so that a faint one can be read.
        net = nn.Sequential(body, nn.RMSNorm(FEATURES, eps=1e-12), nn.Linear(FEATURES, CLASSES)).to(args.device)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(args.steps):
            loss = F.cross_entropy(net(train_graph), train_classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = (net(test_graph).argmax(1) == test_classes).float()
        shares = [right[(low <= distance) & (distance <= high)].mean().item() for low, high in ranges]
        count = int(solved.last.steps) if body is solved else DEPTH
        print(f"{name:28}" + "".join(f"{100 * share:8.1f} %" for share in shares) + f"{count:14}", flush=True)
    print(f"chance: {100 / CLASSES:.1f} %; the solve of the new chains: {tdeq.Status(int(solved.last.status)).name}")


def flags() -> argparse.Namespace:
    """Parses the command line."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=100, help="training steps (default: 100)")
    parser.add_argument("--longest", type=int, default=20, help="nodes of the longest chain for training (default: 20)")
    parser.add_argument("--device", choices=devices, default=devices[-1], help="cpu, or cuda where there is a GPU")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 1 or not 0 <= args.seed < 2**31 or args.longest < 12:
        parser.error("--steps takes integers from 1 on, --longest from 12 on, --seed from 0 to 2147483647")
    return args


if __name__ == "__main__":
    main()
