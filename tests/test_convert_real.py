"""Networks of timm, transformers and torchvision whose middle is an equilibrium; random weights, nothing is loaded."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tritondeq import FixedDropout, fix_dropout, to_equilibrium

pytestmark = pytest.mark.slow
TIGHT = {"tol": 1e-11, "max_steps": 300}
FLOAT32 = 1e-6  # tolerance of what computes its norms in float32 whatever the state is: llama


class Net(NamedTuple):
    model: nn.Module
    owner: nn.Module  # of the stack
    name: str
    inputs: Tensor
    call: Callable[[nn.Module, Tensor], Tensor]
    options: dict
    exact: bool = True  # in float64 throughout

    @property
    def close(self) -> dict:
        return {"rtol": 1e-6, "atol": 1e-9} if self.exact else {"rtol": 1e-3, "atol": 1e-4}


def vit() -> Net:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=8, embed_dim=32, num_heads=2, num_classes=5
    )
    return Net(model, model, "blocks", torch.randn(2, 3, 32, 32), lambda m, x: m(x), {"prelude": 2, "coda": 2})


def gpt2() -> Net:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=6, n_embd=32, n_head=2, vocab_size=40, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(1, 40, (2, 7))
    return Net(model, model.transformer, "h", ids, lambda m, x: m(x).logits, {"prelude": 1, "coda": 1})


def llama() -> Net:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 6, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=40, bos_token_id=0, eos_token_id=0)
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(1, 40, (2, 7))
    return Net(model, model.model, "layers", ids, lambda m, x: m(x).logits, {"prelude": 1, "coda": 1}, exact=False)


NETS = [vit, gpt2, llama]


def converted(make, tight=False, attention=None) -> tuple[Net, nn.Module]:
    net = make()
    if attention:
        net.model.set_attn_implementation(attention)
    options = (TIGHT if net.exact else {"tol": FLOAT32}) if tight else {}
    layer = to_equilibrium(getattr(net.owner, net.name), **net.options, **options)
    setattr(net.owner, net.name, layer)
    return net, layer


@pytest.mark.parametrize("make", NETS, ids=lambda make: make.__name__)
def test_values_and_gradients_are_those_of_the_weight_tied_loop(make):
    net, layer = converted(make, tight=True)
    model = net.model.double().eval()
    x = net.inputs.double() if net.inputs.is_floating_point() else net.inputs
    runs = []
    for steps in (None, 80):
        layer.unrolled(steps)
        out = net.call(model, x)
        runs.append((out, *torch.autograd.grad(out.sin().sum(), list(model.parameters()))))
        if steps is None:
            assert layer.last.converged.all() and layer.last.steps.shape == (2,) and layer.last.steps.max() > 3
    torch.testing.assert_close(*runs, **net.close)


@pytest.mark.parametrize("make", [gpt2, llama], ids=lambda make: make.__name__)
def test_generates_with_its_cache(make):
    net, layer = converted(make, tight=True)
    model, ids = net.model.double().eval(), net.inputs
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # padding
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    cached, whole = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(cached.logits, whole.logits, **net.close)
    with pytest.raises(ValueError, match="DynamicCache.*StaticLayer"):
        model.generate(ids, cache_implementation="static", **options)


@pytest.mark.parametrize("make", [gpt2, llama], ids=lambda make: make.__name__)
def test_attention_that_the_model_is_switched_to(make):
    """The cell follows, as every block does: masks are made for one kind of attention."""
    net, _ = converted(make, tight=True, attention="eager")
    model = net.model.double().eval()
    want = net.call(model, net.inputs)
    for kind in ("sdpa", "eager"):
        model.set_attn_implementation(kind)
        torch.testing.assert_close(net.call(model, net.inputs), want, **net.close)


@pytest.mark.parametrize("make", [gpt2, llama], ids=lambda make: make.__name__)
def test_hidden_states_and_attentions_are_those_of_the_layers(make):
    """One of each layer, also in training, of the unrolled net, and of each step of a generation."""
    net, layer = converted(make)
    model, ids, inputs = net.model.eval(), net.inputs, []
    model.set_attn_implementation("eager")
    plain, ask = net.call(model, ids), {"output_hidden_states": True, "output_attentions": True}
    for block in layer:
        block.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    for steps in (None, 3, None):
        layer.unrolled(steps)
        inputs.clear()
        out = model(ids, use_cache=False, **ask)
        assert (len(out.hidden_states), len(out.attentions)) == (len(layer) + 1, len(layer)) == (4, 3)
        torch.testing.assert_close(list(out.hidden_states[:-1]), inputs)
        for attention in out.attentions:
            torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4 if make is llama else 2, 7))
    torch.testing.assert_close(out.logits, plain)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    steps = model.generate(ids, **options, **ask)
    assert [len(states) for states in steps.hidden_states] == [4, 4, 4]
    assert [[a.shape[-2:] for a in a] for a in steps.attentions] == [[(7, 7)] * 3, [(1, 8)] * 3, [(1, 9)] * 3]
    assert torch.equal(steps.sequences, model.generate(ids, **options).sequences)


@pytest.mark.parametrize("make", [gpt2, llama], ids=lambda make: make.__name__)
def test_hidden_states_and_attentions_have_gradients(make):
    net, layer = converted(make, tight=True)
    model, runs = net.model.double(), []
    model.set_attn_implementation("eager")
    for module in model.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    for steps in (None, 60):
        layer.unrolled(steps)
        out = model.train()(net.inputs, use_cache=False, output_hidden_states=True, output_attentions=True)
        loss = out.hidden_states[2].sin().sum() + out.attentions[1].square().sum()
        runs.append(torch.autograd.grad(loss, list(layer[:2].parameters()), materialize_grads=True))
    assert all(grad.isfinite().all() for grad in runs[0]) and runs[0][-1].norm() > 0
    torch.testing.assert_close(*runs, **net.close)


def test_all_that_a_vision_transformer_asks_of_its_blocks():
    net, layer = converted(vit)
    model, x = net.model.eval(), net.inputs
    out = model(x)
    masked = model.forward_features(x, attn_mask=torch.zeros(17, 17))
    torch.testing.assert_close(model.forward_head(masked), out, rtol=1e-4, atol=1e-4)
    assert len(model.forward_intermediates(x, intermediates_only=True)) == len(layer) == 5
    model.set_grad_checkpointing()
    model.train()
    (grad,) = torch.autograd.grad(model(x).sum(), layer.deq.cell.block.mlp.fc1.weight)
    model.set_grad_checkpointing(False)
    (want,) = torch.autograd.grad(model(x).sum(), layer.deq.cell.block.mlp.fc1.weight)
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-6)


def test_stochastic_depth_and_attention_dropout_of_timm():
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 8, "depth": 6, "embed_dim": 32, "num_heads": 2, "drop_path_rate": 0.5}
    model = timm.create_model("vit_tiny_patch16_224", attn_drop_rate=0.2, proj_drop_rate=0.1, **options)
    model.blocks = to_equilibrium(model.blocks, prelude=2, coda=1, **TIGHT)
    block = model.blocks.deq.cell.block
    assert block.drop_path1.p == pytest.approx(0.3) and block.drop_path1.dims == 1 and block.attn.attn_drop.p == 0
    assert block.mlp.drop1.p == pytest.approx(0.1)
    model.double(), model.blocks.deq.train()
    x, runs = torch.randn(6, 17, 32).double(), []
    for steps in (None, 80):
        torch.manual_seed(0)
        layer = model.blocks.unrolled(steps).deq
        out = layer(x)
        runs.append((out, *torch.autograd.grad(out.sin().sum(), block.parameters())))
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", [vit, gpt2], ids=lambda make: make.__name__)
def test_the_dropout_of_adapters_is_fixed(make):
    """LoRA in a converted model: its gradients are those of the weight-tied loop with the same masks."""
    peft = pytest.importorskip("peft")
    net, layer = converted(make, tight=True)
    name, conv1d = ("qkv", False) if make is vit else ("c_attn", True)
    config = peft.LoraConfig(target_modules=[name], lora_dropout=0.3, fan_in_fan_out=conv1d)
    model = peft.get_peft_model(net.model, config).double()
    for path, p in model.named_parameters():
        if "lora_B" in path:  # 0 at first, as are the gradients of lora_A
            nn.init.normal_(p, std=0.1)
    x, inside = net.inputs.double() if net.inputs.is_floating_point() else net.inputs, layer.deq.cell.block
    with pytest.raises(RuntimeError, match="Dropout 'block.attn.*lora_dropout.default'.*fix_dropout"):
        net.call(model.train(), x)
    assert fix_dropout(model) is model
    wanted, runs = [p for p in model.parameters() if p.requires_grad], []
    assert any(p.requires_grad for p in inside.parameters())
    for steps in (None, 80):
        layer.unrolled(steps)
        torch.manual_seed(0)
        out = net.call(model, x)
        runs.append((out, *torch.autograd.grad(out.sin().sum(), wanted)))
        if steps is None:
            assert layer.last.converged.all() and not torch.equal(net.call(model, x), out), "each call draws its masks"
    torch.testing.assert_close(*runs, **net.close)
    assert all(grad.norm() > 0 for grad in runs[0][1:])


def test_the_dropout_of_vision_models_is_fixed():
    """DropPath and StochasticDepth of timm, transformers and torchvision."""
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    for model in (
        timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=32, num_heads=2, drop_path_rate=0.5),
        transformers.Dinov2Model(transformers.Dinov2Config(**sizes, drop_path_rate=0.5)),
        torchvision.models.convnext_tiny(stochastic_depth_prob=0.5),
    ):
        before = [m for m in model.modules() if type(m).__name__.endswith(("DropPath", "StochasticDepth"))]
        shares = sorted(p for m in before if (p := getattr(m, "drop_prob", getattr(m, "p", 0.0))))
        after = [m for m in fix_dropout(model).modules() if isinstance(m, FixedDropout) and m.dims == 1]
        assert shares[-1] == 0.5 and sorted(m.p for m in after if m.p) == shares
        assert not {*map(type, before)} & {*map(type, model.modules())}


def test_blocks_that_can_not_share_a_cell():
    timm = pytest.importorskip("timm")
    stage, swin = timm.create_model("resnet18").layer2, timm.create_model("swin_tiny_patch4_window7_224")
    for blocks, options, message in (
        (stage, {}, "block 1 can't share one cell with block 0: .*stride"),
        (stage, {"prelude": 1}, "block 1.*bn1 is a BatchNorm2d"),
        (swin.layers[2].blocks, {}, "block 1.*shift"),
    ):
        with pytest.raises(ValueError, match=message):
            to_equilibrium(blocks, **options)


def test_the_page_on_replacing_a_stack(capsys):
    """Its numbers of memory are so, and some of its steps lead where it goes."""
    pytest.importorskip("timm"), pytest.importorskip("sklearn")
    page = (Path(__file__).parent.parent / "docs" / "replace-a-stack.md").read_text()
    block, output = re.search(r"```python\n(.*?)```\n\n    (.*?)\n", page, re.S).groups()
    assert block.count("range(200)") == 1
    names = {}
    exec(block.replace("range(200)", "range(6)"), names)
    assert capsys.readouterr().out.partition(";")[0] == output.partition(";")[0]
    assert names["model"].blocks.last.converged.all() and names["loss"] < 2.6
