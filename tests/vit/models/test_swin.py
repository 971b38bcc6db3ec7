"""Swin against torchvision and timm in float64, and against attention over the whole map with a mask by region."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
import torch.nn.functional as F
from parity import assert_same_gradients, by_fan_in, gradients, images
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer

from common.config import check as config
from common.config import compose
from common.config.check import construct
from common.errors import UserError
from common.files import checkpoint
from common.machine.seeds import generator
from common.nn import windows
from common.nn.attention import record_attention
from common.train import assembly, optim
from common.train.optim import OptimizerOptions
from common.train.step import Stepper
from vit.criterion.cross_entropy import LossOptions
from vit.importing.swin import to_layout
from vit.models.swin import Swin, SwinBlockOptions
from vit.tasks.classification import Classification, PredictOptions

Tensors = dict[str, Tensor]
EXACT = {"rtol": 0, "atol": 1e-10}  # float64, a few blocks with values of about ten
BLOCKS = SwinBlockOptions(dropout=0.0, attention_dropout=0.0, drop_path=0.0, norm_eps=1e-5)
SMALL: dict[str, Any] = {
    **{"classes": 5, "channels": 3, "image_size": (32, 32), "patch_size": 2, "embedding": "convolution"},
    **{"width": 12, "depths": [2, 3], "heads": [2, 3], "window": 4, "mlp_ratio": 1.5, "blocks": BLOCKS},
}


randomised = partial(parity.randomised, std=by_fan_in)


def swin(**keys: Any) -> Swin:
    """A small Swin Transformer in float64."""
    return Swin(**{**SMALL, **keys}).double()


def assert_same(ours: Swin, theirs: nn.Module, layout: str, pixels: Tensor) -> None:
    """Equal logits, and equal gradients of the pixels and of every parameter, with our parameters in their model."""
    ours = randomised(ours)
    constants = {name: value for name, value in theirs.state_dict().items() if name.endswith("position_index")}
    theirs.double().eval().load_state_dict(to_layout(dict(ours.named_parameters()), layout) | constants)
    pixels = pixels.requires_grad_()
    logits, expected = ours(pixels), theirs(pixels)
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, **EXACT)
    pixel_gradient, by_name = gradients(logits, pixels, ours)
    their_pixels, theirs_by_name = gradients(expected, pixels, theirs)
    torch.testing.assert_close(pixel_gradient, their_pixels, **EXACT)
    assert_same_gradients(to_layout(by_name, layout), theirs_by_name, **EXACT)


@pytest.mark.parametrize("embedding", ["convolution", "multiply"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48)])
def test_logits_and_gradients_are_torchvisions(embedding: str, height: int, width: int) -> None:
    """Maps of 16 x 16 and 8 x 8 are shifted in both stages; one of 4 x 12 along one axis in the second stage."""
    theirs = SwinTransformer([2, 2], 12, [2, 3], [2, 3], [4, 4], 1.5, stochastic_depth_prob=0.0, num_classes=5)
    assert_same(swin(embedding=embedding, image_size=(height, width)), theirs, "torchvision", images(height, width))


TIMM: dict[str, dict[str, Any]] = {
    "two stages": {},
    "three stages, the last one without a shift": {"depths": [2, 1, 2], "heads": [2, 2, 3]},
    "one stage": {"depths": [2], "heads": [2]},
    "a window that is cut to the maps of the last stages": {
        "depths": [2, 2, 2],
        "heads": [1, 2, 3],
        "window": 7,
        "image_size": (28, 28),
    },
    "grey": {"channels": 1, "image_size": (16, 16)},
    "windows that are not square on a narrow map": {"window": 8, "image_size": (8, 32)},
}


@pytest.mark.parametrize("variant", TIMM)
def test_logits_and_gradients_are_timms(variant: str) -> None:
    timm_swin = pytest.importorskip("timm.models.swin_transformer")
    keys = {**SMALL, **TIMM[variant]}
    shape = {"img_size": keys["image_size"], "in_chans": keys["channels"], "patch_size": 2, "num_classes": 5}
    stages = {"depths": keys["depths"], "num_heads": keys["heads"], "window_size": keys["window"], "embed_dim": 12}
    theirs = timm_swin.SwinTransformer(**shape, **stages, mlp_ratio=1.5, drop_path_rate=0.0)
    pixels = images(*keys["image_size"], channels=keys["channels"])
    assert_same(swin(**TIMM[variant]), theirs, "timm", pixels)


# An oracle for sizes that whole windows do not fit, where torchvision and timm attend to padding.


def dense(model: Swin, pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """The logits, with attention over the whole map of `size` and a mask by each token's region; nothing is padded."""
    p = model.patches.size
    x = F.conv2d(pixels, model.patches.weight, model.patches.bias, stride=p).flatten(2).transpose(1, 2)
    x = model.patch_norm(x)
    for i, stage in enumerate(model._stages()):
        if i:
            x, size = merged(model.mergings[i - 1], x, size), ((size[0] + 1) // 2, (size[1] + 1) // 2)
        for j, block in enumerate(stage.blocks):
            shift = [w // 2 if j % 2 and side > w else 0 for side, w in zip(size, stage.window, strict=True)]
            x = dense_block(block, x, size, stage.window, shift)
    return model.head(model.norm(x).mean(dim=1))


def dense_block(block: Any, x: Tensor, size: Any, window: Any, shift: Any) -> Tensor:
    places = torch.cartesian_prod(torch.arange(size[0]), torch.arange(size[1]))  # (N, 2)
    region = (places - torch.tensor(shift)) // torch.tensor(window)
    together = (region[:, None] == region).all(-1)  # (N, N)
    distance = places[:, None] - places  # (N, N, 2), query minus key
    limit = torch.tensor(window) - 1
    i, j = (distance.clamp(-limit, limit) + limit).unbind(-1)
    bias = block.attention.table[i, j].permute(2, 0, 1).masked_fill(~together, float("-inf"))  # (h, N, N)
    heads, y = block.attention.heads, block.residuals[0].norm(x)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in block.attention.in_proj(y).chunk(3, -1))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    x = x + block.attention.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return x + block.feed_forward(block.residuals[1].norm(x))


def merged(merging: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
    x = F.pad(x.unflatten(1, size), (0, 0, 0, size[1] % 2, 0, size[0] % 2))
    parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
    return merging.reduction(merging.norm(torch.cat(parts, dim=-1))).flatten(1, 2)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 36), (26, 18), (38, 10), (6, 6), (2, 30), (64, 32)])
@pytest.mark.parametrize("trained", [(32, 32), (8, 24)])
def test_at_any_size_logits_are_those_of_attention_over_the_map_with_a_mask_by_region(
    height: int, width: int, trained: tuple[int, int]
) -> None:
    """So padding to whole windows changes nothing. Built for (8, 24), windows are 4 x 4 and 2 x 4."""
    model = randomised(swin(image_size=trained, depths=[2, 3, 2], heads=[2, 3, 2]))
    pixels = images(height, width).requires_grad_()
    logits, expected = model(pixels), dense(model, pixels, (height // 2, width // 2))
    torch.testing.assert_close(logits, expected, **EXACT)
    (of_pixels, by_name), (their_pixels, expected_by_name) = (gradients(y, pixels, model) for y in (logits, expected))
    torch.testing.assert_close(of_pixels, their_pixels, **EXACT)
    for name, gradient in by_name.items():
        torch.testing.assert_close(gradient, expected_by_name[name], **EXACT, msg=lambda m, n=name: f"{n}: {m}")


def test_an_image_that_patches_do_not_fit_is_padded_with_zeros() -> None:
    model = randomised(swin(patch_size=4))
    pixels = images(30, 45)
    torch.testing.assert_close(model(pixels), model(F.pad(pixels, (0, 3, 0, 2))), **EXACT)
    assert not torch.allclose(model(pixels), model(pixels[..., :28, :44]), atol=1e-3), "the last pixels count"


def test_an_image_has_the_same_logits_alone_and_in_a_batch() -> None:
    model = randomised(swin())
    pixels = images(26, 18, count=3)
    torch.testing.assert_close(model(pixels), torch.cat([model(image[None]) for image in pixels]), **EXACT)


def test_a_window_that_covers_the_map_is_not_shifted_and_others_are() -> None:
    covered, divided = randomised(swin(window=16, depths=[2], heads=[2])), randomised(swin(depths=[2], heads=[2]))
    for model, moves in ((covered, False), (divided, True)):
        layouts = model.plans(model.grid, images(32, 32))[0].layouts
        assert (layouts[1] is not layouts[0]) == moves
        with record_attention(model) as maps:
            model(images(32, 32))
        zeros = [(attention == 0).any().item() for (attention,) in maps.values()]
        assert zeros == [False, moves], "only shifted windows are masked"


def test_tokens_of_the_first_block_see_only_their_window_and_shifted_ones_reach_the_next() -> None:
    """The gradient of one token's output by all tokens: 16 after one block, and its neighbours' windows after two."""
    model = randomised(swin(depths=[2], heads=[2]))
    (stage,), plan = model._stages(), model.plans((16, 16), images(32, 32))[0]
    x = torch.randn(1, 256, 12, dtype=torch.float64, generator=generator("tokens")).requires_grad_()
    y = windows.move(x, plan.entry)
    for number, (block, reach) in enumerate(zip(stage.blocks, (16, 64), strict=True)):
        y = windows.move(y, plan.swaps[0]) if number else y
        y = block(y, guide=plan.layouts[number])
        token = plan.layouts[number].slots[5 * 16 + 5]
        (gradient,) = torch.autograd.grad(y[0, token].sum(), x, retain_graph=True)
        assert gradient[0].any(-1).sum() == reach


@pytest.mark.parametrize("sizes", [((32, 32), (20, 36), (32, 32))])
def test_stored_layouts_follow_the_size_of_the_images(sizes: Any) -> None:
    model, fresh = randomised(swin()), randomised(swin())
    for size in sizes:
        with torch.inference_mode():
            model(images(*size))
        pixels = images(*size).requires_grad_()  # the layouts of inference serve for training, too
        torch.testing.assert_close(model(pixels), copy.deepcopy(fresh)(pixels), **EXACT)
        model(pixels).sum().backward()


# The paper's sizes.

COUNTS = {  # torchvision's and timm's documentation
    "swin_t": 28_288_354,
    "swin_s": 49_606_258,
    "swin_b": 87_768_224,
    "swin_l": 196_532_476,
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_presets_have_the_published_numbers_of_parameters(name: str) -> None:
    with torch.device("meta"):
        section = compose.configure("train", [f"model={name}"])["model"]
        model = config.build(section, classes=1000, channels=3, image_size=(224, 224))
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]
    rates = {"swin_t": 0.2, "swin_s": 0.3, "swin_b": 0.5, "swin_l": 0.2}
    assert model._stages()[-1].blocks[-1].residuals[0].drop_path == pytest.approx(rates[name])
    assert {head.heads for stage in model._stages() for head in [stage.blocks[0].attention]} == {
        width // 32 for width in (model.norm.normalized_shape[0] // 2**i for i in range(4))
    }, "a head has 32 channels"


def test_the_small_model_fits_digits_and_fashion_mnist() -> None:
    keys = ["data=fashion_mnist", "model.patch_size=2", "model.window=7", "model.width=48", "model.depths=[2,4]"]
    for arguments, window in ((["model=swin"], [(4, 4), (4, 4)]), (["model=swin", *keys], [(7, 7), (7, 7)])):
        run = compose.configure("train", arguments)
        side = run["data"]["image_size"]
        model = config.build(run["model"], classes=10, channels=1, image_size=(side, side))
        assert [stage.window for stage in model._stages()] == window
        assert model(torch.zeros(2, 1, side, side)).shape == (2, 10)
        assert all(side % length == 0 for side, length in zip(model.grid, window[0], strict=True)), "no padding"


# Training.


def test_stochastic_depth_increases_linearly_over_all_blocks() -> None:
    model = swin(depths=[2, 3], blocks=replace(BLOCKS, drop_path=0.4))
    rates = [block.residuals[i].drop_path for stage in model._stages() for block in stage.blocks for i in range(2)]
    assert rates == pytest.approx([0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])


def test_every_option_of_the_blocks_reaches_them() -> None:
    model = swin(blocks=SwinBlockOptions(dropout=0.1, attention_dropout=0.2, drop_path=0.0, norm_eps=0.01))
    block = model._stages()[1].blocks[2]
    assert (block.residuals[0].dropout.p, block.feed_forward.dropout.p, model.dropout.p) == (0.1, 0.1, 0.1)
    assert block.attention.dropout == 0.2
    assert {part.eps for part in model.modules() if isinstance(part, nn.LayerNorm)} == {0.01}


def test_all_options_together_train_in_bf16() -> None:
    torch.manual_seed(0)
    options = SwinBlockOptions(dropout=0.1, attention_dropout=0.1, drop_path=0.2, norm_eps=1e-5)
    model = Swin(**{**SMALL, "blocks": options}).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images(26, 30, count=16, dtype=torch.float32))
    logits.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


class FixedImages:
    """A substitute for a data set of eight images of five classes."""

    def classes(self) -> list[str]:
        return list("abcde")

    def inputs(self, batch: dict[str, Any], device: torch.device) -> Tensor:
        return batch["images"].to(device)


@pytest.mark.parametrize("split", [[3, 1, 4], [1] * 8])
def test_a_step_does_not_depend_on_how_its_batch_is_split(split: list[int]) -> None:
    run = compose.configure("train", ["model=swin"])
    options = construct(OptimizerOptions, run["optimizer"])
    predict = PredictOptions(top=1, attention="none", layer=-1, neighbours=0)
    pixels, labels, parameters = images(26, 30, count=8), torch.arange(8) % 5, []
    for lengths in ([8], split):
        task: Any = Classification(data=FixedImages(), loss=LossOptions(smoothing=0.1), predict=predict)  # type: ignore[arg-type]
        model = randomised(swin()).train()
        batches, start = [], 0
        for length in lengths:
            part = slice(start, start := start + length)
            batches.append({"ids": [*range(length)], "images": pixels[part], "labels": labels[part]})
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        Stepper(task, model, optim.build(model, options), torch.device("cpu"), "fp32", 0.1)(batches, 0)
        parameters.append(dict(model.named_parameters()))
        assert all((before[name] != p).any() for name, p in parameters[-1].items())
    whole, pieces = parameters
    for name, parameter in whole.items():
        torch.testing.assert_close(parameter, pieces[name], **EXACT, msg=lambda m, n=name: f"{n}: {m}")


def test_norms_biases_and_tables_have_no_weight_decay_and_each_parameter_one_layer() -> None:
    run = compose.configure("train", ["model=swin_t", "optimizer.layer_decay=0.5"])
    model = swin()
    optimizer = optim.build(model, construct(OptimizerOptions, run["optimizer"]))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (decays[id(parameter)] > 0) == (parameter.ndim > 1 and "table" not in name), name
    prefixes = [prefix for layer in model.layers() for prefix in layer]
    for name, _ in model.named_parameters():
        assert sum(name.startswith(f"{prefix}.") for prefix in prefixes) == 1, name
    assert model.layers()[2] == ("stages.0.blocks.1", "mergings.0") and len(model.layers()) == 1 + 5 + 1


def test_parameters_start_as_in_the_official_code() -> None:
    torch.manual_seed(0)
    model = Swin(**{**SMALL, "width": 96, "heads": [3, 6], "patch_size": 4, "window": 7})
    bound = (3 * 4 * 4) ** -0.5
    for name, parameter in model.named_parameters():
        if name.startswith("patches"):
            assert 0.9 * bound < parameter.abs().max() <= bound, name
        elif "norm" in name and name.endswith("weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif parameter.ndim == 1:
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.25 if "table" in name else 0.1), name


# Checkpoints.


def test_the_names_in_a_checkpoint_are_fixed() -> None:
    """Users' checkpoints and the import of other layouts depend on them."""
    block = {
        **{"attention.in_proj.weight": (36, 12), "attention.in_proj.bias": (36,)},
        **{"attention.out_proj.weight": (12, 12), "attention.out_proj.bias": (12,), "attention.table": (7, 7, 2)},
        **{"feed_forward.expand.weight": (18, 12), "feed_forward.expand.bias": (18,)},
        **{"feed_forward.contract.weight": (12, 18), "feed_forward.contract.bias": (12,)},
        **{f"residuals.{i}.norm.{leaf}": (12,) for i in range(2) for leaf in ("weight", "bias")},
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in swin().state_dict().items()}
    assert {name: shapes[f"stages.0.blocks.1.{name}"] for name in block} == block
    rest = {name for name in shapes if not name.startswith("stages.")}
    pairs = ("patches", "patch_norm", "mergings.0.norm", "norm", "head")
    assert rest == {f"{part}.{leaf}" for part in pairs for leaf in ("weight", "bias")} | {"mergings.0.reduction.weight"}
    assert len(shapes) == len(rest) + 5 * len(block)


def test_tables_of_another_window_are_resampled_bicubically_for_each_head() -> None:
    trained, model = randomised(swin()), swin(window=8)
    tensors = trained.state_dict()
    adapted = model.adapt(tensors)
    model.load_state_dict(adapted)
    for name in model.undecayed:
        table, expected = adapted[name], tensors[name]
        for head in range(table.shape[-1]):
            alone = F.interpolate(expected[None, None, :, :, head].float(), table.shape[:2], mode="bicubic")[0, 0]
            torch.testing.assert_close(table[:, :, head].float(), alone, rtol=1e-5, atol=1e-5)
    assert model.adaptations(tensors) == [
        "relative position biases of windows of 4 x 4 tokens are resampled by bicubic interpolation to 8 x 8"
    ]
    assert {name for name in adapted if adapted[name] is not tensors[name]} == {*model.undecayed}
    same = trained.adapt(tensors)
    assert all(same[name] is tensors[name] for name in tensors) and not trained.adaptations(tensors)
    assert not model.adaptations({"head.weight": torch.zeros(2, 2)}), "a file of another model"


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 26), (20, 32), (64, 64)])
def test_a_model_built_for_another_image_size_computes_what_the_trained_one_computes_there(
    height: int, width: int
) -> None:
    """A smaller map cuts a window to the map, and its table to the distances that occur."""
    trained, model = (
        randomised(swin(depths=[2, 3, 2], heads=[2, 3, 2])),
        swin(depths=[2, 3, 2], heads=[2, 3, 2], image_size=(height, width)),
    )
    tensors = trained.state_dict()
    model.load_state_dict(model.adapt(tensors))
    torch.testing.assert_close(model.eval()(images(height, width)), trained(images(height, width)), **EXACT)
    changed = any(stage.window != (4, 4) for stage in model._stages())
    assert bool(model.adaptations(tensors)) == changed
    assert all(" are cut to " in sentence for sentence in model.adaptations(tensors))


class FixedClasses:
    """The members of a task that loading initial weights uses."""

    def state(self) -> dict[str, Any]:
        return {"classes": list("abcde")}


def test_a_run_can_start_from_weights_of_another_window(tmp_path: Path) -> None:
    trained = randomised(swin())
    content = {"model": trained.state_dict(), "average": None, "task": FixedClasses().state(), "config": {}, "step": 3}
    checkpoint.save(tmp_path / "a.pt", content)
    message = assembly.load_initial_weights(swin(window=8), FixedClasses(), tmp_path / "a.pt")  # type: ignore[arg-type]
    first, note = message.split("\n")
    assert first.endswith(f": {len(trained.state_dict())} tensors"), "nothing is re-initialised or unused"
    assert note.endswith("windows of 4 x 4 tokens are resampled by bicubic interpolation to 8 x 8")


# Mistakes.


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"heads": [2]}, r"^model\.depths=\[2, 3\] and model\.heads=\[2\] must name the same number of stages"),
        ({"depths": [], "heads": []}, "at least one"),
        ({"mlp_ratio": 0.05}, r"^model\.mlp_ratio=0\.05 of model\.width=12 leaves no hidden channel .* such as 4\.$"),
        ({"heads": [2, 5]}, r"the width of stage 1 is 24 \(model\.width=12\), which must be divisible by .*, 5\.$"),
    ],
)
def test_stages_that_do_not_fit_together_are_refused(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        swin(**keys)


def test_the_start_summary_names_the_maps_and_their_windows() -> None:
    assert swin(image_size=(32, 16), window=7).input_summary() == [
        "128 tokens an image; the stages' maps are 16 x 8 in windows of 7 x 7, 8 x 4 in windows of 7 x 4"
    ]
