"""The study of text: its corpus, the plain stack, and nets at other numbers of steps."""

import hashlib
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tritondeq as tdeq
from tritondeq.bench.studies import contestants as who
from tritondeq.bench.studies import effort, text
from tritondeq.bench.studies.study import Job
from tritondeq.toolbox import one_thread, parameters

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone():
    with one_thread():
        yield


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A folder that is the standard library; `add(name, text)` writes a file to it."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(text, "corpus", text.corpus.__wrapped__)

    def add(name, written):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(written, encoding="utf-8")

    return add


def names(held: bool, count: int) -> list[str]:
    each = (f"m{i:03}.py" for i in range(1000))
    return [name for name in each if text.held_out(name) == held][:count]


def net(contestant: str, seed: int = 0, **settings) -> text.Net:
    return text.build(Job("", contestant, seed, text.STUDY.settings["tiny"] | settings, CPU))


def test_symbols():
    assert text.symbols("\n ~a").tolist() == [0, 1, 95, 66] and text.SYMBOLS[66] == "a"
    assert text.symbols("\té€\x7f\U0001f40d").tolist() == [len(text.SYMBOLS)] * 5
    assert text.symbols("").shape == (0,)


def test_the_corpus_is_files_in_order_split_by_their_paths(library):
    (seen, other), (unseen,) = names(False, 2), names(True, 1)
    for name, written in ((other, "bb"), (seen, "a"), (unseen, "c")):
        library(name, written)
    for skipped in (
        "test/t.py",
        "site-packages/p.py",
        "encodings/e.py",
        "config-3/c.py",
        "_sysconfigdata_x.py",
        "n.txt",
    ):
        library(skipped, "zzz")
    found = text.corpus()
    assert torch.equal(found.train, text.symbols("abb")) and torch.equal(found.test, text.symbols("c"))
    assert found.digest == hashlib.sha256(b"abb\0c").hexdigest()
    library(unseen, "d")
    assert text.corpus().digest == hashlib.sha256(b"abb\0d").hexdigest()


def test_a_tenth_of_files_is_held_out():
    assert 60 < sum(text.held_out(f"folder/{i}.py") for i in range(1000)) < 140
    for i in range(50):
        digest = hashlib.sha256(f"{i}.py".encode()).hexdigest()
        assert text.held_out(f"{i}.py") == (int(digest[:8], 16) % 10 == 0)


def test_no_sources_are_said(library):
    library(names(False, 1)[0], "only to train on")
    with pytest.raises(FileNotFoundError, match="no Python sources in .*standard library"):
        text.corpus()


def test_the_corpus_is_that_of_this_python():
    found, root = text.corpus(), Path(sysconfig.get_path("stdlib"))
    assert len(found.train) > 10 * len(found.test) / 2 > 100_000
    files = {path.relative_to(root).as_posix() for path in text.sources(root)}
    assert {"os.py", "json/decoder.py"} < files and not any("/test/" in f or "site-packages" in f for f in files)


def test_windows_and_bits():
    x, y = text.windows(torch.arange(20, dtype=torch.uint8), torch.tensor([0, 7]), 3)
    assert x.tolist() == [[0, 1, 2], [7, 8, 9]] and y.tolist() == [[1, 2, 3], [8, 9, 10]] and x.dtype == torch.long
    uniform = lambda x: torch.zeros(*x.shape, 32)  # noqa: E731
    assert text.bits(uniform, x, y).item() == pytest.approx(5)


def test_a_plain_block_is_the_usual_one():
    """Attention written out, with rotary positions that depend on differences only."""
    torch.manual_seed(0)
    block, z = text.Plain(8, 2).double(), torch.randn(2, 5, 8).double()
    z.requires_grad_()
    q, k, v = block.qkv(F.rms_norm(z, (8,), eps=1e-6)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    angle = torch.outer(torch.arange(5.0), text.ROTARY ** -(torch.arange(0, 4, 2.0) / 4)).double()
    turn = torch.polar(torch.ones_like(angle), angle)

    def turned(t):
        out = torch.view_as_complex(torch.stack(t.chunk(2, -1), -1).contiguous()) * turn
        return torch.cat([out.real, out.imag], -1)

    score = turned(q) @ turned(k).mT / 2 + torch.full((5, 5), -torch.inf).triu(1)
    h = z + block.output((score.softmax(-1) @ v).transpose(1, 2).flatten(2))
    gate, inner = block.up(F.rms_norm(h, (8,), eps=1e-6)).chunk(2, -1)
    want = h + block.down(F.silu(gate) * inner)
    got = block(z, z)
    assert torch.allclose(got, want, atol=1e-6)
    g = torch.randn_like(z)
    slopes = [torch.autograd.grad(out, z, g)[0] for out in (got, want)]
    assert torch.allclose(*slopes, atol=1e-6)


def test_no_net_sees_what_it_foretells():
    x = torch.randint(0, 97, (1, 12))
    changed = x.clone()
    changed[0, 7] = (x[0, 7] + 1) % 97
    for contestant in text.STUDY.contestants:
        model = net(contestant, tol=1e-6, max_steps=60)
        apart = (model(x) - model(changed)).abs().amax((0, 2))
        assert apart[:7].max() < 1e-3 * apart[7] and apart[7:].min() > 0, contestant


def test_sizes_of_nets():
    sizes = {name: parameters(net(name, depth=4)) for name in text.STUDY.contestants}
    assert sizes[who.DEQ] == sizes[who.LOOP] == sizes[who.BLOCK] < sizes[who.HYBRID] < sizes[who.STACK]
    assert abs(sizes[who.WIDE] / sizes[who.STACK] - 1) < 0.25 and sizes[who.DEQ] < sizes[text.PLAIN] < sizes[who.STACK]
    assert torch.equal(net(who.DEQ, 3).embedding.weight, net(who.DEQ, 3).embedding.weight)
    assert not torch.equal(net(who.DEQ, 3).embedding.weight, net(who.DEQ, 4).embedding.weight)


def test_the_plain_stack_begins_at_its_input():
    model, x = net(text.PLAIN), torch.randint(0, 97, (2, 6))
    z = model.embedding(x)
    for block in model.body.blocks:
        z = block(z, z)
    assert torch.allclose(model(x), model.head(F.rms_norm(z, (16,), eps=torch.finfo().eps)), atol=1e-5)


# At other numbers of steps


def test_fields_are_changed_and_given_back():
    layer = tdeq.DEQ(tdeq.cells.MLP(4), tol=1e-3, max_steps=7)
    with pytest.raises(KeyError), effort.changed(layer, tol=0.5, max_steps=2):
        assert (layer.tol, layer.max_steps) == (0.5, 2)
        raise KeyError
    assert (layer.tol, layer.max_steps) == (1e-3, 7)
    with effort.taking(layer, 3, 1e-9):
        assert layer(torch.randn(2, 4)).shape == (2, 4) and (layer.last.steps == 3).all()
    loop = who.body(who.LOOP, lambda: tdeq.cells.MLP(4), 2)
    with effort.taking(loop, 5, 1e-9):
        assert who.steps(loop) == 5 and loop.tol is None
    assert who.steps(loop) == 2


def test_what_iterates():
    make = lambda: tdeq.cells.MLP(4)  # noqa: E731
    bodies = {name: who.body(name, make, 2) for name in who.ALL}
    found = {name: effort.core(body) for name, body in bodies.items()}
    assert found[who.STACK] is found[who.BLOCK] is None and found[who.HYBRID] is bodies[who.HYBRID].core
    assert all(found[name] is bodies[name] for name in (who.DEQ, who.WIDE, who.LOOP))


def test_curves_of_a_loop_are_those_of_loops_of_that_depth():
    x, y = torch.randint(0, 97, (3, 9)), torch.randint(0, 97, (3, 9))
    job = Job("", who.LOOP, 0, text.STUDY.settings["tiny"] | {"depth": 2, "steps": [1, 2, 4]}, CPU)
    model = text.build(job)
    with torch.no_grad():
        model(x)
        found = text.by_effort(model, job, lambda: text.bits(model, x, y).item())
        for depth, key in ((1, "half"), (4, "double")):
            other = net(who.LOOP, depth=depth)
            other.load_state_dict(model.state_dict())
            assert found[key] == text.bits(other, x, y).item() == dict(found["by_steps"])[depth]
        assert dict(found["by_steps"])[2] == text.bits(model, x, y).item() and "by_tol" not in found


def test_curves_of_an_equilibrium():
    x, y = torch.randint(0, 97, (3, 9)), torch.randint(0, 97, (3, 9))
    settings = text.STUDY.settings["tiny"] | {"steps": [1, 4, 40], "tols": [0.1, 1e-3]}
    for contestant, beside in ((who.DEQ, 0), (who.HYBRID, 2)):
        job = Job("", contestant, 0, settings, CPU)
        model = text.build(job)
        with torch.no_grad():
            model(x)
            found = text.by_effort(model, job, lambda model=model: text.bits(model, x, y).item())
            effort.core(model.body).tol = 1e-6
            best = text.bits(model, x, y).item()
        assert [count - beside for count, _ in found["by_steps"]] == [1, 4, 40]
        assert found["by_steps"][-1][1] == pytest.approx(best, abs=1e-4) != found["by_steps"][0][1]
        assert [tol for tol, _ in found["by_tol"]] == [0.1, 1e-3]
        assert beside < found["steps_by_tol"][0][1] < found["steps_by_tol"][1][1] < 40
        assert found["by_tol"][1][1] == pytest.approx(best, abs=1e-3)


def test_what_it_says_of_runs():
    base = {"corpus": "ab" * 32, "symbols": [2000, 300], "python": "3.99", "tested": 64, "trained": 500, "seed": 0}
    base |= {"curve": [[1, 1.0, 4.0], [2, 2.0, 3.0]], "half": 3.5, "double": 2.9}
    runs = [
        base | {"contestant": name, "bits": bits + 0.01 * seed, "seed": seed}
        for name, bits in ((who.DEQ, 3.0), (who.STACK, 3.2), (text.PLAIN, 2.5))
        for seed in range(3)
    ]
    said = " ".join(text.says(runs))
    assert "Python 3.99: 2,000 characters to train on and 300 held out, SHA-256 abababababababab..." in said
    assert "500 characters, 25.0 %" in said
    assert "DEQ: 3.500 bits with half of its steps, 3.010 as trained, 2.900 with double." in said
    assert "DEQ against the plain stack, the usual transformer: 3.010 to 2.510 bits (loss)." in said
    assert "stack against the plain stack, the usual transformer: 3.210 to 2.510 bits (loss)." in said
    assert "hybrid" not in said
