"""The comparison of an imported file with its program: it agrees for correct imports and fails for wrong ones."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from foreign_files import swap_in_import
from torch import Tensor, nn

from common.files import checkpoint
from common.machine.seeds import generator
from common.task import Adopted
from scripts import verify_import
from scripts.verify import images
from vit.importing import adopt as importing

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

WIDTH, LAYERS, HEADS, SIDE, PATCH, CLASSES = 48, 2, 3, 32, 8, 7
SMALL = [
    "model=vit",
    "model.width=48",
    "model.layers=2",
    "model.heads=3",
    "model.feedforward=192",
    "model.patch_size=8",
]


def randomised(model: nn.Module) -> Any:
    rng = generator("redrawn")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_(std=1.5 * tensor[0].numel() ** -0.5 if tensor.ndim in (2, 4) else 0.5, generator=rng)
    return model.eval()


def of_timm(**changed: Any) -> dict[str, Tensor]:
    arguments = {"embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS, "img_size": SIDE, "patch_size": PATCH}
    return randomised(timm.models.VisionTransformer(**{**arguments, "num_classes": CLASSES, **changed})).state_dict()


def of_deit() -> dict[str, Tensor]:
    arguments = {"embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS, "img_size": SIDE, "patch_size": PATCH}
    return randomised(timm.models.deit.VisionTransformerDistilled(**arguments, num_classes=CLASSES)).state_dict()


def of_torchvision(representation: int | None = None) -> dict[str, Tensor]:
    arguments = (SIDE, PATCH, LAYERS, HEADS, WIDTH, 4 * WIDTH)
    model = torchvision.models.VisionTransformer(*arguments, num_classes=CLASSES, representation_size=representation)
    return randomised(model).state_dict()


def of_transformers(kind: str = "ViT", name: str = "ForImageClassification", **changed: Any) -> dict[str, Tensor]:
    arguments = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_labels": CLASSES}
    arguments |= {"image_size": SIDE, "patch_size": PATCH, "intermediate_size": 4 * WIDTH}
    config = getattr(transformers, f"{kind}Config")(**{**arguments, **changed})
    return randomised(getattr(transformers, f"{kind}{name}")(config)).state_dict()


def of_google(prefix: str = "", *, jax: bool = False, more: dict[str, tuple[int, ...]] | None = None) -> Any:
    """Random arrays under Google's names and in its shapes."""
    split, rng = (HEADS, WIDTH // HEADS), np.random.default_rng(0)
    attention, second, feed = ("_1", "_2", "_3") if jax else ("_0", "_1", "_0")
    shapes: dict[str, tuple[int, ...]] = {"embedding/kernel": (PATCH, PATCH, 3, WIDTH), "embedding/bias": (WIDTH,)}
    if jax:
        shapes |= {"cls": (1, 1, WIDTH), "Transformer/posembed_input/pos_embedding": (1, 17, WIDTH)}
    else:
        shapes |= {"pos_embedding": (1, 16, WIDTH)}
    for i in range(LAYERS):
        block = f"Transformer/encoderblock_{i}/"
        for norm in ("_0", second):
            shapes |= {f"{block}LayerNorm{norm}/{leaf}": (WIDTH,) for leaf in ("scale", "bias")}
        multi = f"{block}MultiHeadDotProductAttention{attention}/"
        for name in ("query", "key", "value"):
            shapes |= {f"{multi}{name}/kernel": (WIDTH, *split), f"{multi}{name}/bias": split}
        shapes |= {f"{multi}out/kernel": (*split, WIDTH), f"{multi}out/bias": (WIDTH,)}
        for number, (rows, columns) in enumerate(((WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))):
            dense = f"{block}MlpBlock{feed}/Dense_{number}/"
            shapes |= {f"{dense}kernel": (rows, columns), f"{dense}bias": (columns,)}
    shapes |= {f"Transformer/encoder_norm/{leaf}": (WIDTH,) for leaf in ("scale", "bias")}
    shapes |= {"head/kernel": (WIDTH, CLASSES), "head/bias": (CLASSES,), **(more or {})}
    return {f"{prefix}{name}": rng.normal(0.1, 0.3, size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(path: Path, file: Any) -> Path:
    if isinstance(next(iter(file.values())), np.ndarray):
        np.savez(path.with_suffix(".npz"), **file)
        return path.with_suffix(".npz")
    safetensors.torch.save_file({name: t.contiguous() for name, t in file.items()}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def run(path: Path, *overrides: str) -> int:
    return verify_import.main([f"checkpoint={path}", *SMALL, *overrides])


def without_head(file: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in file.items() if not name.startswith(("head", "classifier"))}


def bfloat16(arrays: Any) -> Any:
    return {name: torch.tensor(a).bfloat16().view(torch.int16).numpy().view("V2") for name, a in arrays.items()}


MEAN, EPS = "model.pooling=mean", "model.blocks.norm_eps=1e-12"
SCALE = "model.blocks.layer_scale=1e-5"
TANH = "model.blocks.activation=gelu_tanh"
TOKEN = "model.distillation_token=true"
AGREEING: dict[str, tuple[Callable[[], Any], list[str], str]] = {
    "torchvision": (of_torchvision, [], "logits"),
    "torchvision with a representation": (lambda: of_torchvision(20), ["model.representation=20"], "logits"),
    "torchvision without a head": (lambda: without_head(of_torchvision()), [], "features"),
    "timm": (of_timm, [], "logits"),
    "timm without a head": (lambda: of_timm(num_classes=0), [], "features"),
    "timm in half precision": (lambda: {n: t.bfloat16() for n, t in of_timm().items()}, [], "logits"),
    "timm, norms of queries": (lambda: of_timm(qk_norm=True), ["model.blocks.qk_norm=true"], "logits"),
    "timm, no biases": (lambda: of_timm(qkv_bias=False), [], "logits"),
    "MAE": (lambda: of_timm(global_pool="avg"), ["model.pooling=mean_then_norm", "model.registers=1"], "logits"),
    "registers": (lambda: of_timm(reg_tokens=4), ["model.registers=4"], "logits"),
    "distilled DeiT": (of_deit, [TOKEN], "logits"),
    "transformers' distilled DeiT": (
        lambda: of_transformers("DeiT", "ForImageClassificationWithTeacher"),
        [EPS, TOKEN],
        "logits",
    ),
    "DeiT III": (
        lambda: {
            name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
            for name, tensor in of_timm(no_embed_class=True, init_values=0.1).items()
        },
        ["model.positions.on_token=false", SCALE],
        "logits",
    ),
    "DINOv2": (
        lambda: {
            **{
                name: t
                for name, t in of_timm(num_classes=0, init_values=0.1, reg_tokens=4).items()
                if name != "reg_token"
            },
            "register_tokens": torch.randn(1, 4, WIDTH),
            "pos_embed": torch.randn(1, 17, WIDTH),
            "mask_token": torch.zeros(1, WIDTH),
        },
        ["model.registers=4", SCALE],
        "features",
    ),
    "transformers": (of_transformers, [EPS], "logits"),
    "transformers, with our eps": (of_transformers, [], "logits"),
    "transformers' base model": (lambda: of_transformers(name="Model"), [EPS], "features"),
    "transformers' DINOv2": (lambda: of_transformers("Dinov2"), [SCALE], "features"),
    "transformers' DINOv2 with registers": (
        lambda: of_transformers("Dinov2WithRegisters"),
        ["model.registers=4", SCALE],
        "features",
    ),
    "vit_jax": (lambda: of_google(jax=True), [TANH], "logits"),
    "vit_jax with a representation": (
        lambda: of_google(jax=True, more={"pre_logits/kernel": (WIDTH, WIDTH), "pre_logits/bias": (WIDTH,)}),
        ["model.representation=48", TANH],
        "features",
    ),
    "big_vision": (lambda: of_google("params/"), [MEAN, TANH], "logits"),
    "big_vision in bfloat16": (lambda: bfloat16(of_google("params/")), [MEAN, TANH], "logits"),
    "big_vision's image tower": (lambda: of_google("params/img/"), [MEAN, TANH], "features"),
    "big_vision's fixed positions": (
        lambda: {name: a for name, a in of_google("params/").items() if not name.endswith("pos_embedding")},
        [MEAN, TANH, "data.image_size=[32,48]"],
        "logits",
    ),
}


@pytest.mark.parametrize("case", AGREEING)
def test_a_file_gives_the_outputs_of_its_own_program(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, overrides, compared = AGREEING[case]
    path = write(tmp_path / "file", make())
    code = run(path, *overrides)
    printed = capsys.readouterr()
    assert code == 0, printed.err + printed.out
    lines = printed.out.splitlines()
    assert lines[0].split() == ["checkpoint", str(path)] and lines[-1].startswith(
        "outputs agree: the limit is 0.0001, provided "
    )
    differences = {line.split()[0]: float(line.split()[3]) for line in lines if " differ by " in line}
    assert [*differences] == (["features", "logits"] if compared == "logits" else ["features"])
    assert all(difference < 1e-4 for difference in differences.values())
    assert ("so neither that layer nor the head was compared" in printed.out) == ("vit_jax with a rep" in case)


@pytest.mark.parametrize("case", ["torchvision", "timm", "transformers", "vit_jax", "big_vision"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("encoder.blocks.0.residuals.0.norm.weight", "encoder.blocks.0.residuals.1.norm.weight"),
        ("encoder.blocks.1.attention.out_proj.bias", "encoder.blocks.1.feed_forward.contract.bias"),
    ],
)
def test_two_tensors_swapped_by_the_import_are_noticed(
    case: str,
    first: str,
    second: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    swap_in_import(monkeypatch, importing, first, second)
    make, overrides, _ = AGREEING[case]
    assert run(write(tmp_path / "file", make()), *overrides) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "OUTPUTS DIFFER: the limit is 0.0001"


def test_a_head_in_another_order_is_noticed_though_the_features_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = importing.adopt

    def patched(*arguments: Any) -> Adopted:
        adopted = original(*arguments)
        return adopted._replace(weights={**adopted.weights, "head.bias": adopted.weights["head.bias"].flip(0)})

    monkeypatch.setattr(importing, "adopt", patched)
    assert run(write(tmp_path / "file", of_timm())) == 1
    features, logits = [line for line in capsys.readouterr().out.splitlines() if " differ by " in line]
    assert float(features.split()[6]) < 1e-5 < 0.1 < float(logits.split()[6])


@pytest.mark.parametrize("case", ["MAE", "DINOv2", "torchvision with a representation", "big_vision"])
def test_a_model_that_differs_from_the_configs_is_refused_with_the_keys_to_override(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "file", AGREEING[case][0]())
    assert verify_import.main([f"checkpoint={path}", "model=vit"]) == 2
    message = capsys.readouterr().err
    assert "holds another model than the config describes; give model.patch_size=8 model.width=48" in message
    overrides = shlex.split(message.partition("; give ")[2].strip().removesuffix("."))
    heads = [] if any(key.startswith("model.heads=") for key in overrides) else ["model.heads=3"]
    assert verify_import.main([f"checkpoint={path}", "model=vit", *overrides, *heads]) == 0


def test_a_wrong_number_of_heads_is_refused_if_the_file_holds_the_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Google's kernels have an axis for heads; timm would read them for any number of heads."""
    path = write(tmp_path / "file", of_google("params/"))
    assert run(path, MEAN, TANH, "model.heads=4") == 2
    assert capsys.readouterr().err.endswith("describes; give model.heads=3.\n")


@pytest.mark.parametrize("make", [lambda: of_google(jax=True), lambda: of_google("params/")])
def test_the_wrong_gelu_for_a_file_of_google_is_refused(
    make: Callable[[], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both sides would take the config's exact GELU, and agree on another function than Google's."""
    path = write(tmp_path / "file", make())
    mean = [MEAN] if "cls" not in make() else []
    assert run(path, *mean) == 2
    assert capsys.readouterr().err.endswith("describes; give model.blocks.activation=gelu_tanh.\n")
    assert run(path, *mean, TANH) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(
        ", provided that the original model has model.blocks.norm_eps=1e-06, which the file does not hold"
    )


def test_the_verdict_names_the_options_that_a_file_does_not_decide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(write(tmp_path / "file", of_timm())) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "has model.heads=3, model.blocks.activation=gelu, model.blocks.norm_eps=1e-06, which the" in last


@pytest.mark.parametrize("case", ["torchvision", "timm", "transformers", "big_vision"])
def test_a_peer_that_is_not_installed_is_named_with_the_command_to_install_it(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(images, "import_module", absent)
    make, overrides, _ = AGREEING[case]
    assert run(write(tmp_path / "file", make()), *overrides) == 2
    package = "timm" if case == "big_vision" else case
    assert capsys.readouterr().err.endswith(f"is not installed; pip install {package}.\n")


def test_a_file_that_the_peer_cannot_read_is_refused_in_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """vit_jax's names with big_vision's numbers, which timm does not know."""
    renamed = {"Attention_1": "Attention_0", "Norm_2": "Norm_1", "Block_3": "Block_0"}
    arrays = of_google(jax=True)
    for old, new in renamed.items():
        arrays = {name.replace(old, new): array for name, array in arrays.items()}
    assert run(write(tmp_path / "file", arrays), TANH) == 2
    message = capsys.readouterr().err
    assert message.startswith("timm ") and "cannot read" in message
    assert message.endswith("so nothing can be compared.\n")


def test_mistakes_end_in_one_sentence_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path / "ours.pt", {"config": {}, "task": {}})
    swin = write(tmp_path / "swin", {"layers.0.blocks.0.norm1.weight": torch.zeros(2)})
    good = write(tmp_path / "good", of_timm())
    for arguments, expected in {
        (f"checkpoint={tmp_path / 'ours.pt'}", "model=vit"): "ours.pt was written by this program",
        (f"checkpoint={swin}", "model=vit"): "is a Swin Transformer and not a plain ViT",
        (f"checkpoint={good}",): "verify_import.py needs model=NAME",
        (
            f"checkpoint={good}",
            "model=detr",
        ): "model._target_=detr.models.detector.Detector: only vit.models",
        (f"checkpoint={tmp_path / 'none.pt'}", "model=vit"): "there is no such file",
        (f"checkpoint={good}", "model=vit", "model.widht=3"): "did you mean model.width?",
    }.items():
        assert verify_import.main(list(arguments)) == 2
        printed = capsys.readouterr()
        assert expected in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_without_arguments_the_usage_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_import.main(["--help"]) == 0 and verify_import.main([]) == 2
    assert capsys.readouterr().out.count("checkpoint=FILE model=NAME") == 2
