"""Trainers that people come with do to an equilibrium what a plain loop of PyTorch does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from tritondeq import DEQ, cells, to_equilibrium

# A trainer may warn of what it likes; a solve may not.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore", "error:::tritondeq.*")]
TIGHT = {"tol": 1e-11, "max_steps": 300}
CLOSE = {"rtol": 1e-8, "atol": 1e-10}  # of what is solved twice, to TIGHT


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads spend more time waiting for one another than they save on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, z, x):
        return torch.tanh(self.norm(x) + self.down(torch.tanh(self.up(z))))


def net(cell=Block, **options) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), DEQ(cell(8), **options), nn.Linear(8, 1))


def data(rows=32, dtype=torch.float64) -> TensorDataset:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return TensorDataset(x, 1 + x.sum(1, keepdim=True).sin())


def adamw(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def plain_loop(model, batches) -> list[float]:
    """Returns the losses of one step of AdamW for each batch (x, y)."""
    optimizer, losses = adamw(model), []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    return losses


def grads_of(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gpt2(**options) -> nn.Module:
    """A GPT-2 of five blocks with random weights, of which the middle three are one equilibrium."""
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 5, "n_embd": 16, "n_head": 2, "vocab_size": 20, "n_positions": 16}
    sizes |= dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    model.transformer.h = to_equilibrium(model.transformer.h, prelude=1, coda=1, **TIGHT)
    return model.double()


def sentences(rows=16) -> torch.Tensor:
    """Each token is the one before plus 3."""
    return 1 + (torch.arange(rows).unsqueeze(1) + 3 * torch.arange(8)) % 19


def vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 8, "depth": 6, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    model.blocks = to_equilibrium(model.blocks, prelude=1, coda=1, **TIGHT)
    return model.double()


def test_lightning(tmp_path):
    """Trainer.fit is the plain loop, validates in inference mode, and resumes as if it had never stopped."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.losses, self.modes = net(**TIGHT).double(), [], []

        def training_step(self, batch, index):
            x, y = batch
            loss = F.mse_loss(self.net(x), y)
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch, index):
            x, y = batch
            self.modes.append(torch.is_inference_mode_enabled())
            self.log("validation", F.mse_loss(self.net(x), y))

        def configure_optimizers(self):
            return adamw(self)

    loader, held_out = DataLoader(data(), batch_size=8), DataLoader(data(40), batch_size=40)
    quiet = dict.fromkeys(["enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"], False)

    def fit(epochs, checkpoint=None):
        module = Module()
        options = {"accelerator": "cpu", "default_root_dir": tmp_path} | quiet
        trainer = lightning.Trainer(max_epochs=epochs, **options)
        trainer.fit(module, loader, held_out, ckpt_path=checkpoint)
        return module, trainer

    module, trainer = fit(4)
    model = net(**TIGHT).double()
    assert module.losses == plain_loop(model, [*loader] * 4)
    torch.testing.assert_close(module.net.state_dict(), model.state_dict(), rtol=0, atol=0)
    x, y = data(40).tensors
    (validated,) = trainer.validate(module, held_out, verbose=False)
    assert module.modes[-1] and not any(module.modes[:-1])
    assert validated["validation"] == pytest.approx(F.mse_loss(model(x), y).item())

    fit(2)[1].save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(4, tmp_path / "half.ckpt")
    assert resumed.losses == module.losses[8:]
    torch.testing.assert_close(resumed.net.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_of_transformers(tmp_path, checkpointing):
    """Trainer.train is the plain loop, with gradient checkpointing too, and resumes as if it had never stopped."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    ids, drawn = sentences(), []

    def collate(rows):
        drawn.append({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
        return drawn[-1]

    def train(checkpoint=None):
        options = {"max_steps": 8, "save_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 4}
        options |= {"learning_rate": 1e-2, "gradient_checkpointing": checkpointing, "optim": "adamw_torch"}
        options |= {"use_cpu": True, "disable_tqdm": True, "report_to": []}
        rows = [{"input_ids": row, "labels": row} for row in ids]
        arguments = transformers.TrainingArguments(str(tmp_path), **options)
        trainer = transformers.Trainer(gpt2(), arguments, train_dataset=rows, data_collator=collate)
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    trainer = train()
    got = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    model, losses = gpt2(), []
    optimizer = adamw(model)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 8)
    for batch in drawn:
        optimizer.zero_grad()
        loss = model(**batch, num_items_in_batch=batch["labels"].numel()).loss  # as Trainer counts tokens
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert len(losses) == 8 and losses[-1] < 0.9 * losses[0]
    torch.testing.assert_close(got, losses, rtol=1e-6, atol=0)  # logged in float32
    torch.testing.assert_close(trainer.model.state_dict(), model.state_dict(), **CLOSE)

    resumed = train(str(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(resumed.model.state_dict(), trainer.model.state_dict(), rtol=0, atol=0)


def test_saved_by_transformers(tmp_path):
    """`from_pretrained` makes a model without its equilibrium: make one, convert it, and load the weights into that."""
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    model = gpt2()
    nn.init.normal_(model.transformer.h.deq.cell.block.attn.c_attn.weight)
    model.save_pretrained(tmp_path)

    fresh = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained(tmp_path))
    fresh.transformer.h = to_equilibrium(fresh.transformer.h, prelude=1, coda=1, **TIGHT)
    safetensors.load_model(fresh.double(), tmp_path / "model.safetensors")
    assert torch.equal(fresh.eval()(sentences()).logits, model.eval()(sentences()).logits)


@pytest.fixture
def accelerator():
    """`Accelerator(...)` of this test alone; its settings are those of a process otherwise."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    yield accelerate.Accelerator
    accelerate.state.AcceleratorState._reset_state(True)


def test_accelerate_accumulates_gradients(accelerator, tmp_path):
    """Steps of two half batches are steps of whole ones; a saved state is one to go on from."""
    loader = DataLoader(data(), batch_size=4)
    accelerator = accelerator(cpu=True, gradient_accumulation_steps=2)
    model = net(**TIGHT).double()
    model, optimizer, loader = accelerator.prepare(model, adamw(model), loader)

    def epoch():
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.mse_loss(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
        return {name: weight.clone() for name, weight in accelerator.unwrap_model(model).state_dict().items()}

    epoch()
    accelerator.save_state(tmp_path)
    weights = epoch()
    want = net(**TIGHT).double()
    plain_loop(want, [*DataLoader(data(), batch_size=8)] * 2)
    torch.testing.assert_close(weights, want.state_dict(), **CLOSE)
    accelerator.load_state(tmp_path)
    torch.testing.assert_close(epoch(), weights, rtol=0, atol=0)


def test_accelerate_autocasts(accelerator):
    """The gradient is that of torch.autocast, and as near to float64's as bfloat16 allows; weights stay in float32."""
    x, y = data(dtype=torch.float32).tensors
    accelerator = accelerator(cpu=True, mixed_precision="bf16")
    model = net()
    model, optimizer = accelerator.prepare(model, adamw(model))
    plain, exact = net(), net(**TIGHT).double()
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        with accelerator.autocast():
            loss = F.mse_loss(model(x), y)
        accelerator.backward(loss)
        if step == 0:
            with torch.autocast("cpu", torch.bfloat16):
                out = plain(x).float()
                F.mse_loss(out, y).backward()
            F.mse_loss(exact(x.double()), y.double()).backward()
            torch.testing.assert_close(grads_of(model), grads_of(plain), rtol=0, atol=0)
            for got, want in zip(grads_of(model).values(), grads_of(exact).values(), strict=True):
                assert (got - want).norm() < 0.05 * want.norm()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def assert_adapters_train(make, call, config, folder):
    """Gradients of adapters follow from those of the weights that they are merged into; no other weight gets one.

    With W + s B A in place of W and G the gradient of that sum, B gets s G A', and A gets s B' G.
    """
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    before = call(make()).detach()
    model = peft.get_peft_model(make(), peft.LoraConfig(r=2, lora_alpha=1, init_lora_weights=False, **config))
    model.double()
    out = call(model)
    assert (out - before).norm() > 0.01 * before.norm()
    out.square().sum().backward()
    got = grads_of(model)
    assert got and set(got) == {name for name, _ in model.named_parameters() if "lora_" in name}

    merged = copy.deepcopy(model).merge_and_unload().requires_grad_()
    torch.testing.assert_close(call(merged), out, **CLOSE)
    call(merged).square().sum().backward()
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            a, b = (getattr(module, which)["default"].weight for which in ("lora_A", "lora_B"))
            grad = merged.get_submodule(name).weight.grad
            grad = 0.5 * (grad.T if module.fan_in_fan_out else grad)  # s = lora_alpha / r
            torch.testing.assert_close((a.grad, b.grad), (b.T @ grad, grad @ a.T), **CLOSE)
            assert a.grad.norm() > 0 and b.grad.norm() > 0

    with model.disable_adapter():
        torch.testing.assert_close(call(model), before, **CLOSE)
    model.save_pretrained(folder)
    torch.testing.assert_close(call(peft.PeftModel.from_pretrained(make(), folder).double()), out, **CLOSE)
    return model


def test_peft_on_a_converted_model(tmp_path):
    """Convert first, then add adapters: to the equilibrium's block, and to the blocks that stayed."""
    ids = sentences()
    config = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}  # GPT-2 stores W transposed
    model = assert_adapters_train(gpt2, lambda model: model(ids).logits, config, tmp_path)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize(
    ("cell", "targets"),
    [
        (Block, ["up", "down"]),
        (cells.Affine, ["input"]),
        (cells.MLP, ["up", "down"]),
        (lambda width: cells.Transformer(width, heads=2), ["input", "qkv", "output", "up", "down"]),
    ],
    ids=["block", "affine", "mlp", "transformer"],
)
def test_peft_on_the_linear_layers_of_a_cell(cell, targets, tmp_path):
    x = data(4).tensors[0]
    x = x if cell in (Block, cells.Affine) else x.expand(2, -1, -1)
    assert_adapters_train(
        lambda: net(cell, **TIGHT).double(), lambda model: model(x), {"target_modules": targets}, tmp_path
    )


def test_averages_of_timm():
    """ModelEmaV2 and V3 hold ema = decay ema + (1 - decay) weight, and the layer in them solves with it."""
    timm = pytest.importorskip("timm")
    model, images = vit(), torch.randn(4, 3, 16, 16).double()
    averages = timm.utils.ModelEmaV2(model, decay=0.9), timm.utils.ModelEmaV3(model, decay=0.9)
    want = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = adamw(model)
    for _ in range(3):
        F.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
        for average in averages:
            average.update(model)
        for name, weight in model.state_dict().items():
            want[name] = 0.9 * want[name] + 0.1 * weight
    averaged = vit()
    averaged.load_state_dict(want)
    for average in averages:
        torch.testing.assert_close(average.module.state_dict(), want, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(average.module(images), averaged.eval()(images), **CLOSE)


def test_mixup_of_timm():
    """The gradient of a mixed batch is that of the weight-tied net, run long, and the loss falls."""
    timm = pytest.importorskip("timm")
    loss = pytest.importorskip("timm.loss")
    images, labels = torch.randn(8, 3, 16, 16).double(), torch.arange(8) % 3
    mixup = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=3)
    criterion = loss.SoftTargetCrossEntropy()
    mixed, targets = mixup(images.clone(), labels)
    grads = []
    for steps in (None, 80):
        model = vit()
        model.blocks.unrolled(steps)
        criterion(model(mixed), targets).backward()
        grads.append(grads_of(model))
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)

    model.blocks.unrolled(None)
    optimizer, losses = adamw(model), []
    for _ in range(20):
        optimizer.zero_grad()
        criterion(model(mixed), targets).backward()
        optimizer.step()
        with torch.no_grad():
            losses.append(F.cross_entropy(model(images), labels).item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("kind", ["mean", "ema"])
def test_averaged_model_of_torch(kind):
    batches, averaging = [*DataLoader(data(), batch_size=8)], {}
    if kind == "ema":
        averaging = {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}
    model = net(**TIGHT).double()
    model(batches[0][0]).sum().backward()
    model.zero_grad()
    average, history, optimizer = AveragedModel(model, **averaging), [], adamw(model)
    assert model[1].last.converged.all() and average.module[1].last is None  # a copy has not solved anything
    for x, y in batches:
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        average.update_parameters(model)
        history.append(copy.deepcopy(model.state_dict()))
    want = history[0]  # the first update copies
    for k, weights in enumerate(history[1:], 2):
        share = 0.1 if kind == "ema" else 1 / k
        want = {name: (1 - share) * want[name] + share * weight for name, weight in weights.items()}
    torch.testing.assert_close(average.module.state_dict(), want, rtol=1e-12, atol=1e-14)
    averaged = net(**TIGHT).double()
    averaged.load_state_dict(want)
    torch.testing.assert_close(average(batches[0][0]), averaged(batches[0][0]), **CLOSE)


def test_grad_scaler():
    """A scaled loss has the same gradient to the bit, and a step whose gradient overflowed is left out."""
    x, y = data(dtype=torch.float32).tensors
    model, scaler = net(), torch.amp.GradScaler("cpu", init_scale=2.0**30)
    optimizer = adamw(model)
    F.mse_loss(model(x), y).backward()
    want = grads_of(model)
    optimizer.zero_grad()
    scaler.scale(F.mse_loss(model(x), y)).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(grads_of(model), want, rtol=0, atol=0)
    scaler.step(optimizer)
    scaler.update()

    before, optimizer_before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="backward solve"):
        scaler.scale(1e38 * F.mse_loss(model(x), y)).backward()
    assert all(p.grad.isnan().any() for p in model[1].parameters())  # what failed is not 0
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**29
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict(), optimizer_before, rtol=0, atol=0)


def test_grad_scaler_with_float16():
    """Training under autocast to float16 lowers the loss; the first gradient is as near to float64's as that allows."""
    x, y = data(dtype=torch.float32).tensors
    model, exact, scaler = net(), net(**TIGHT).double(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer, losses = adamw(model), []
    F.mse_loss(exact(x.double()), y.double()).backward()
    for step in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.mse_loss(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if step == 0:
            for got, want in zip(grads_of(model).values(), grads_of(exact).values(), strict=True):
                assert (got - want).norm() < 0.02 * want.norm()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
