"""Converted models of transformers with random weights, saved and loaded, as docs/replace-a-stack.md has it."""

import io
import re
from pathlib import Path

import pytest
import torch
from test_convert_real import Net, gpt2
from torch import nn
from torch.testing import assert_close

import tritondeq
from tritondeq import DEQ, to_equilibrium

pytestmark = pytest.mark.slow
PAGE = (Path(__file__).parent.parent / "docs" / "replace-a-stack.md").read_text()


def vit() -> Net:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 6, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)
    model = transformers.ViTForImageClassification(config)
    path = next(path for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    owner, _, name = path.rpartition(".")  # releases differ in what they call it
    options, images = {"prelude": 1, "coda": 1}, torch.randn(2, 3, 32, 32)
    return Net(model, model.get_submodule(owner), name, images, lambda m, x: m(x).logits, options)


def converted(make) -> Net:
    net = make()
    setattr(net.owner, net.name, to_equilibrium(getattr(net.owner, net.name), **net.options))
    return net


def trained(make) -> Net:
    net = converted(make)
    optimizer = torch.optim.SGD(net.model.parameters(), 0.1)
    net.call(net.model, net.inputs).square().sum().backward()
    optimizer.step()
    net.model.eval()
    return net


def assert_equal(net: Net, model: nn.Module) -> None:
    """Values and gradients are the same, to the bit."""
    runs = []
    for each in (net.model, model.eval()):
        out = net.call(each, net.inputs)
        runs.append((out, *torch.autograd.grad(out.sin().sum(), list(each.parameters()))))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [gpt2, vit], ids=lambda make: make.__name__)
def test_a_model_that_was_converted_alike_takes_the_state_dict(make):
    net, file = trained(make), io.BytesIO()
    torch.save(net.model.state_dict(), file)
    file.seek(0)
    fresh = converted(make).model
    fresh.load_state_dict(torch.load(file))
    assert_equal(net, fresh)


@pytest.mark.parametrize("make", [gpt2, vit], ids=lambda make: make.__name__)
def test_a_whole_model_is_saved(make):
    net, file = trained(make), io.BytesIO()
    torch.save(net.model, file)
    file.seek(0)
    assert_equal(net, torch.load(file, weights_only=False))


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_the_plain_stack_raise(strict):
    with pytest.raises(RuntimeError, match=r"transformer\.h\.1 is an equilibrium.*before to_equilibrium"):
        converted(gpt2).model.load_state_dict(gpt2().model.state_dict(), strict=strict)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What the page defines, in a folder of its own."""
    pytest.importorskip("transformers")
    (block,) = re.findall(r"```python\n(import transformers\n.*?)```", PAGE, re.S)
    folder = str(tmp_path_factory.mktemp("page") / "converted")
    names: dict = {"__name__": "page"}
    exec(block.replace('"converted"', repr(folder)), names)
    return names | {"folder": folder}


def test_the_other_blocks_of_the_page(tmp_path, monkeypatch):
    """A part of a stack, adapters and a state dict, in the model of the page's first block."""
    timm = pytest.importorskip("timm")
    sizes = {"depth": 12, "img_size": 16, "patch_size": 4, "num_classes": 10, "embed_dim": 32, "num_heads": 2}

    def make_model():
        return timm.create_model("vit_tiny_patch16_224", **sizes)

    monkeypatch.chdir(tmp_path)
    _, part, adapters, state, _ = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names = {"tdeq": tritondeq, "torch": torch, "make_model": make_model, "model": make_model()}
    exec(part, names)
    model, x = names["model"], torch.randn(2, 3, 16, 16)
    assert [isinstance(block, DEQ) for block in model.blocks] == [False, False, True, False, False]
    exec(state, names)
    fresh = names["fresh"]
    fresh.blocks.deq.tol = model.blocks[2].tol = 1e-6  # by two solvers
    assert_close(fresh.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    assert (make_model().eval()(x) - fresh(x)).abs().max() > 1e-2
    pytest.importorskip("peft")
    exec(adapters, names)
    names["model"].train()(x).sum().backward()
    assert model.blocks[2].last.converged.all()


def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(torch.arange(14).view(2, 7)).logits


def test_a_class_of_its_own_is_loaded_by_from_pretrained(page):
    import transformers

    want = page["plain"]  # converted by the page
    for kind in (page["EquilibriumGPT2"], transformers.AutoModelForCausalLM):
        model, report = kind.from_pretrained(page["folder"], output_loading_info=True)
        assert type(model) is page["EquilibriumGPT2"] and not any(report.values())
        assert torch.equal(logits(model), logits(want)) and model.transformer.h.last.converged.all()
    again = type(model)(model.config)
    assert not torch.equal(logits(again), logits(want))


def test_what_from_pretrained_draws_anew(page, tmp_path):
    """As the page's table has it. A release of transformers that raises here is a reason to shorten the page."""
    import transformers

    plain_class, own = transformers.GPT2LMHeadModel, page["EquilibriumGPT2"]

    def blocks(names):
        return {name.split(".")[2] for name in names}

    stack = plain_class(page["plain"].config)
    stack.save_pretrained(tmp_path / "plain")
    page["plain"].save_pretrained(tmp_path / "no class")
    for kind, folder in ((plain_class, page["folder"]), (transformers.AutoModelForCausalLM, tmp_path / "no class")):
        model, report = kind.from_pretrained(folder, output_loading_info=True)
        assert type(model) is plain_class and blocks(report["missing_keys"]) == {"1", "3", "4", "5"}
        last = page["plain"].transformer.h[2].mlp.c_fc.weight
        assert torch.equal(model.transformer.h[2].mlp.c_fc.weight, last)
    model, report = own.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert torch.equal(model.transformer.h[2].mlp.c_fc.weight, stack.transformer.h[2].mlp.c_fc.weight)
    assert blocks(report["missing_keys"]) == {"1"} and blocks(report["unexpected_keys"]) == {"1", "3", "4", "5"}


def test_a_type_that_is_not_registered_raises(page, tmp_path):
    import transformers

    config = type("Config", (transformers.GPT2Config,), {"model_type": "unregistered-gpt2"})
    own = type("Own", (page["EquilibriumGPT2"],), {"config_class": config})
    own(config.from_dict(page["plain"].config.to_dict())).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unregistered-gpt2"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
