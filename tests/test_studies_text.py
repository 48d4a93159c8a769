"""The study of text: its corpus, the plain stack, and nets at other numbers of steps."""

import hashlib
import sysconfig

import torch
import torch.nn.functional as F

from tritondeq.bench.studies import contestants as who
from tritondeq.bench.studies import text
from tritondeq.bench.studies.study import Job


def net(contestant: str, **settings) -> text.Net:
    return text.build(Job("", contestant, 0, text.STUDY.settings["tiny"] | settings, torch.device("cpu")))


def test_the_corpus_is_files_in_order_split_by_their_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    held = {i: text.held_out(f"m{i:03}.py") for i in range(1000)}
    assert 60 < sum(held.values()) < 140, "a tenth of the files"
    (first, second, *_), (unseen, *_) = ([f"m{i:03}.py" for i in held if held[i] == kind] for kind in (False, True))
    skipped = ["test/t.py", "site-packages/p.py", "encodings/e.py", "config-3/c.py", "_sysconfigdata_x.py", "n.txt"]
    for name, written in ((second, "bb"), (first, "a"), (unseen, "c"), *((name, "zzz") for name in skipped)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(written)
    corpus = text.corpus.__wrapped__()
    assert torch.equal(corpus.train, text.symbols("abb")) and torch.equal(corpus.test, text.symbols("c"))
    assert corpus.digest == hashlib.sha256(b"abb\0c").hexdigest()


def test_a_plain_block_is_the_usual_one():
    """Attention written out, with rotary positions that depend on differences only."""
    block, z = text.Plain(8, 2).double(), torch.randn(2, 5, 8).double()
    q, k, v = block.qkv(F.rms_norm(z, (8,), eps=1e-6)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    angle = torch.outer(torch.arange(5.0), text.ROTARY ** -(torch.arange(0, 4, 2.0) / 4)).double()
    turn = torch.polar(torch.ones_like(angle), angle)

    def turned(t):
        out = torch.view_as_complex(torch.stack(t.chunk(2, -1), -1).contiguous()) * turn
        return torch.cat([out.real, out.imag], -1)

    score = turned(q) @ turned(k).mT / 2 + torch.full((5, 5), -torch.inf).triu(1)
    h = z + block.output((score.softmax(-1) @ v).transpose(1, 2).flatten(2))
    gate, inner = block.up(F.rms_norm(h, (8,), eps=1e-6)).chunk(2, -1)
    assert torch.allclose(block(z, z), h + block.down(F.silu(gate) * inner), atol=1e-6)


def test_no_net_sees_what_it_predicts():
    x = torch.randint(0, 97, (1, 12))
    changed = x.clone()
    changed[0, 7] = (x[0, 7] + 1) % 97
    for contestant in text.STUDY.contestants:
        model = net(contestant, tol=1e-6, max_steps=60)
        apart = (model(x) - model(changed)).abs().amax((0, 2))
        assert apart[:7].max() < 1e-3 * apart[7] and apart[7:].min() > 0, contestant


@torch.no_grad()
def test_curves_of_a_loop_are_those_of_loops_of_that_depth():
    x, y = torch.randint(0, 97, (3, 9)), torch.randint(0, 97, (3, 9))
    settings = text.STUDY.settings["tiny"] | {"depth": 2, "steps": [1, 2, 4]}
    job = Job("", who.LOOP, 0, settings, torch.device("cpu"))
    model = text.build(job)
    model(x)
    curves = text.by_effort(model, job, lambda: text.bits(model, x, y).item())
    for depth, key in ((1, "half"), (4, "double")):
        other = net(who.LOOP, depth=depth)
        other.load_state_dict(model.state_dict())
        assert curves[key] == text.bits(other, x, y).item() == dict(curves["by_steps"])[depth]
    assert dict(curves["by_steps"])[2] == text.bits(model, x, y).item() and who.steps(model.body) == 2
