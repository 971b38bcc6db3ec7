import pytest
import torch
from torch import nn

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.nn.attention import Attention
from common.nn.recording import Samples
from common.nn.resnet import Backbone, BackboneOptions
from detr.evaluation.attention import Points, attended, record, rows

SMALL = ["model.width=16", "model.heads=2", "model.feedforward=16", "model.queries=5", "model.encoder_layers=2"]


def detector(seed: int = 0) -> nn.Module:
    config = configure("train", ["model=detr", *SMALL])
    torch.manual_seed(seed)
    model: nn.Module = build(config["model"], classes=4, logits=5).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(
    ("name", "dilation"), [("small", False), ("resnet18", False), ("resnet50", False), ("resnet50", True)]
)
def test_the_grid_of_a_backbone_is_the_size_of_its_feature_map(name: str, dilation: bool) -> None:
    options = BackboneOptions(name=name, weights="none", dilation=dilation, frozen=0)  # type: ignore[arg-type]
    backbone = Backbone(options, official_padding=False)
    for height, width in ((1, 33), (64, 65), (95, 31)):
        with torch.no_grad():
            features, _ = backbone(torch.zeros(1, 3, height, width), None)
        assert backbone.grid(height, width) == tuple(features.shape[-2:])


@torch.no_grad()
def test_the_maps_are_those_of_the_last_layers_without_padding() -> None:
    """Of an image of 40 x 56 pixels, alone and in a batch that is padded to 64 x 64."""
    model = detector()
    image, boxes = torch.randn(1, 3, 40, 56), torch.rand(5, 4).sort(dim=1).values[:, [0, 1, 3, 2]]
    padded = torch.zeros(1, 3, 64, 64)
    padded[:, :, :40, :56] = image
    with record(model) as recorded:
        model(image, None)
    alone = attended(model, recorded, boxes, None, (40, 56), (40, 56))
    with record(model) as recorded:
        model(padded, torch.tensor([[40, 56]]))
    with_padding = attended(model, recorded, boxes, None, (40, 56), (64, 64))
    for first, second in zip(alone, with_padding, strict=True):
        assert first.shape == (5, 2, 5, 7) and (first.sum((-1, -2)) - 1).abs().max() < 1e-5
        assert (first - second).abs().max() < 1e-5  # fp32 rounding of sums over other numbers of keys
    assert (alone.queries[0] - alone.queries[1]).abs().max() > 1e-3  # the queries differ, so a swap would be noticed


@torch.no_grad()
def test_sampling_points_do_not_depend_on_padding_that_a_stride_does_not_divide() -> None:
    """An image of 32 x 48 pixels, alone and padded to 40 x 56: on the level of stride 16, it covers 2 of 3 rows."""
    levels = ["model.sampling.levels=3", "model.encoder_layers=1"]
    config = configure("train", ["model=deformable_detr", *SMALL[:-1], *levels])
    torch.manual_seed(0)
    model: nn.Module = build(config["model"], classes=4, logits=4).eval()
    image, boxes = torch.randn(1, 3, 32, 48), torch.rand(5, 4).sort(dim=1).values[:, [0, 1, 3, 2]]
    padded = torch.zeros(1, 3, 40, 56)
    padded[:, :, :32, :48] = image
    seen = []
    for images, sizes in ((image, None), (padded, torch.tensor([[32, 48]]))):
        with record(model) as recorded:
            model(images, sizes)
        seen.append(attended(model, recorded, boxes, None, (32, 48), tuple(images.shape[-2:])))  # type: ignore[arg-type]
    for alone, with_padding in zip(*seen, strict=True):
        assert isinstance(alone, Points) and isinstance(with_padding, Points)
        torch.testing.assert_close(with_padding.locations, alone.locations, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_encoders_map_is_that_of_the_position_under_the_boxs_centre() -> None:
    """The centre of box i is in the middle of cell i of 5 x 7 cells; boxes outside the image take the nearest cell."""
    model = detector()
    model(torch.randn(1, 3, 40, 56), None)
    y, x = torch.meshgrid((torch.arange(5) + 0.5) / 5, (torch.arange(7) + 0.5) / 7, indexing="ij")
    centres = torch.stack([x, y], dim=-1).flatten(0, 1)  # (35, 2)
    boxes = torch.cat([centres - 0.05, centres + 0.05], dim=1)
    attention = torch.rand(1, 2, 35, 35)
    recorded = {"queries": [torch.rand(1, 2, 35, 35)], "encoder": [attention]}
    result = attended(model, recorded, boxes, None, (40, 56), (40, 56))
    assert torch.equal(result.centres.flatten(2), attention[0].transpose(0, 1))
    outside = attended(model, recorded, torch.tensor([[-2.0, -2, 0, 0], [1, 1, 3, 3]]), None, (40, 56), (40, 56))
    assert torch.equal(outside.centres, result.centres[[0, 34]])


def test_a_grid_of_another_number_of_positions_is_refused() -> None:
    recorded = {"queries": [torch.rand(1, 2, 5, 36)]}
    with pytest.raises(UserError, match=r"Detector says 5 x 7 positions .* 40 x 56 pixels, but 36 are attended to"):
        attended(detector(), recorded, torch.rand(5, 4), None, (40, 56), (40, 56))


class Sampler(nn.Module):
    """A module that records the samples that it is given."""

    def __init__(self, samples: Samples):
        super().__init__()
        self.samples, self.recorded_samples = samples, None

    def forward(self) -> None:
        if self.recorded_samples is not None:
            self.recorded_samples.append(self.samples)


def sampling_model(queries: Samples, encoder: Samples) -> nn.Module:
    model = nn.Module()
    for part, name, samples in (("decoder", "cross_attention", queries), ("encoder", "attention", encoder)):
        block = nn.ModuleDict({name: Sampler(samples)})
        setattr(model, part, nn.ModuleDict({"blocks": nn.ModuleList([block])}))
    return model


def test_samples_of_all_heads_and_levels_become_points_relative_to_the_image() -> None:
    """The image covers the left half and the upper quarter of the padded map."""
    torch.manual_seed(0)
    shapes = [(8, 6), (4, 3)]
    queries = Samples(torch.rand(1, 3, 2, 2, 4, 2), torch.rand(1, 3, 2, 2, 4), shapes, torch.rand(1, 3, 2))
    weights = torch.rand(1, 60, 2, 2, 4)
    encoder = Samples(torch.rand(1, 60, 2, 2, 4, 2), weights / weights.sum((-1, -2), keepdim=True), shapes)
    model = sampling_model(queries, encoder)
    boxes = torch.tensor([[0.0, 0.0, 0.2, 0.2], [0.5, 0.4, 1.0, 1.0], [0.3, 0.6, 0.4, 1.0]])
    with record(model) as recorded:
        model.decoder.blocks[0]["cross_attention"]()
        model.encoder.blocks[0]["attention"]()
    seen, centres = attended(model, recorded, boxes, None, (10, 30), (40, 60))
    assert isinstance(seen, Points) and isinstance(centres, Points)
    assert torch.allclose(seen.locations[1, 2 * 4 + 3], queries.locations[0, 1, 1, 0, 3] * torch.tensor([2.0, 4.0]))
    assert torch.allclose(seen.weights[1, 2 * 4 + 3], queries.weights[0, 1, 1, 0, 3] / 2)
    in_second_level = queries.locations[0, 1, 1, 1, 2] * torch.tensor(
        [1.5, 4.0]
    )  # the image covers 1 x 2 of 4 x 3 cells
    assert torch.allclose(seen.locations[1, 2 * 4 + 4 + 2], in_second_level)
    assert torch.allclose(seen.references, queries.references[0] * torch.tensor([2.0, 4.0]))
    # The image covers 2 x 3 cells of the first level. The centres are in columns 0, 2 and 1, and in rows 0, 1 and 1.
    tokens = [0, 1 * 6 + 2, 1 * 6 + 1]
    assert torch.allclose(centres.locations[:, 0], encoder.locations[0, tokens, 0, 0, 0] * torch.tensor([2.0, 4.0]))
    assert torch.allclose(centres.weights.sum(1), torch.ones(3)) and centres.references is None
    pairs, _ = attended(model, recorded, boxes[[1, 1]], torch.tensor([1, 1]), (10, 30), (40, 60))
    assert torch.equal(pairs.locations, seen.locations[[1, 1]])
    chosen = rows(seen, torch.tensor([2, 0]))
    assert torch.equal(chosen.locations, seen.locations[[2, 0]]) and torch.equal(
        chosen.references, seen.references[[2, 0]]
    )


def test_a_model_without_recorded_attention_is_refused_with_what_it_lacks() -> None:
    class Convolutional(nn.Module):
        pass

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross_attention = Attention(width=4, heads=1)

    with pytest.raises(
        UserError, match=r"Convolutional has no module named cross_attention .*; use task\.predict\.attention=false"
    ):
        with record(Convolutional()):
            pass
    with pytest.raises(
        UserError, match=r"Foreign has no method memory_grid\(height, width\).*; use task\.predict\.attention=false"
    ):
        with record(Foreign()):
            pass
