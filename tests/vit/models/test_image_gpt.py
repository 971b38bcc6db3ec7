"""Image GPT against transformers' ImageGPT with random weights, its invariances, and its cached steps."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from common.machine.seeds import generator
from vit.models.image_gpt import ImageGpt

transformers = pytest.importorskip("transformers")

COLOURS, CLASSES, SIZE, WIDTH, HEADS, LAYERS = 11, 5, (3, 4), 24, 3, 3
PIXELS = math.prod(SIZE)
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # fp64, three blocks with logits of size ten
NAMES = {
    "transformer.wte.": "embedding.",
    "transformer.wpe.": "positions.table.",
    "transformer.ln_f.": "decoder.norm.",
    "transformer.h.": "decoder.blocks.",
    "ln_1.": "residuals.0.norm.",
    "ln_2.": "residuals.1.norm.",
    "attn.c_attn.": "attention.in_proj.",
    "attn.c_proj.": "attention.out_proj.",
    "mlp.c_fc.": "feed_forward.expand.",
    "mlp.c_proj.": "feed_forward.contract.",
    "lm_head.": "output.",
    "score.": "head.",
}


def build_model(**changed: Any) -> ImageGpt:
    shape = {"width": WIDTH, "heads": HEADS, "layers": LAYERS, "feedforward": 4 * WIDTH, "norm_eps": 1e-5}
    data = {"colours": COLOURS, "classes": 0, "image_size": SIZE, "dropout": 0.0}
    return ImageGpt(**{**shape, **data, **changed})


def redrawn(model: ImageGpt) -> ImageGpt:
    """The model with all tensors sampled, so that no output is zero."""
    rng = generator("image gpt")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=rng)
    return model.double().eval()


def our_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def transposed(name: str, tensor: Tensor) -> Tensor:
    """Their matrices of blocks are (in, out)."""
    return tensor.t() if ".c_" in name else tensor


def is_ours(name: str) -> bool:
    return not name.endswith("bias")


def peer(kind: str = "ForCausalImageModeling") -> nn.Module:
    """A model of transformers with random weights, without dropout, and with biases of zero."""
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    shape = {"vocab_size": COLOURS + 1, "n_positions": PIXELS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    config = transformers.ImageGPTConfig(**shape, **drop, num_labels=CLASSES, use_cache=False)
    model = getattr(transformers, f"ImageGPT{kind}")(config).double().eval()
    rng = generator("peer", kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3, generator=rng) if is_ours(name) else parameter.zero_()
            if "ln_" in name:
                parameter.uniform_(0.5, 1.5, generator=rng)
    return model


def like(theirs: nn.Module, **changed: Any) -> ImageGpt:
    """Our model with the weights of theirs."""
    ours = build_model(**changed).double().eval()
    tensors = {our_name(n): transposed(n, p).contiguous() for n, p in theirs.named_parameters() if is_ours(n)}
    missing = ours.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys and {*missing.missing_keys} <= {"output.weight"}
    return ours


def images(count: int = 2) -> Tensor:
    return torch.randint(COLOURS, (count, PIXELS), generator=generator("pixels"))


def shifted(tokens: Tensor) -> Tensor:
    """The input of transformers: the start token, and all pixels but the last."""
    return F.pad(tokens[:, :-1], (1, 0), value=COLOURS)


def assert_equal_gradients(ours: ImageGpt, theirs: nn.Module, logits: Tensor, expected: Tensor) -> None:
    direction = torch.randn(logits.shape, dtype=logits.dtype, generator=generator("direction"))
    logits.backward(direction)
    expected.backward(direction)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    compared = 0
    for name, parameter in theirs.named_parameters():
        if is_ours(name) and parameter.grad is not None:
            torch.testing.assert_close(gradients[our_name(name)], transposed(name, parameter.grad), **EXACT)
            compared += bool(parameter.grad.any())
    assert compared == 6 * LAYERS + 4


def test_logits_and_all_gradients_are_those_of_transformers() -> None:
    theirs = peer()
    ours = like(theirs)
    logits, expected = ours(images()).colours, theirs(shifted(images())).logits
    assert expected.std() > 1
    torch.testing.assert_close(logits, expected, **EXACT)
    assert_equal_gradients(ours, theirs, logits, expected)


def test_masked_logits_and_gradients_are_those_of_transformers_without_its_causal_mask() -> None:
    """transformers has no masked objective; its blocks compute it on zero embeddings, if they see all positions."""
    theirs = peer()
    for block in theirs.transformer.h:
        block.attn.bias.fill_(True)
    ours = like(theirs)
    masked = torch.rand(2, PIXELS, generator=generator("masks")) < 0.3
    assert masked.any() and not masked.all()
    embedded = theirs.transformer.wte(images()) * ~masked[:, :, None]
    expected = theirs(inputs_embeds=embedded).logits
    logits = ours(images(), masked).colours
    torch.testing.assert_close(logits, expected, **EXACT)
    assert_equal_gradients(ours, theirs, logits, expected)


def test_class_logits_are_those_of_transformers() -> None:
    theirs = peer("ForImageClassification")
    expected = theirs(shifted(images())).logits
    classes = like(theirs, classes=CLASSES)(images()).classes
    assert classes is not None and expected.std() > 0.1
    torch.testing.assert_close(classes, expected, **EXACT)


def test_features_of_layers_are_normed_inputs_of_blocks_averaged_over_positions() -> None:
    theirs = peer()
    states = theirs.transformer(shifted(images()), output_hidden_states=True).hidden_states
    expected = [block.ln_1(state).mean(1) for block, state in zip(theirs.transformer.h, states, strict=False)]
    features = like(theirs).layer_features(images())
    assert len(features) == len(states) == LAYERS + 1
    for ours, theirs_ in zip(features, [*expected, states[-1].mean(1)], strict=True):
        torch.testing.assert_close(ours, theirs_, **EXACT)


@pytest.mark.parametrize(
    ("shape", "count"),
    [((512, 24, 8), 76_571_648), ((1024, 36, 8), 455_157_760), ((1536, 48, 16), 1_362_250_752)],
    ids=["S", "M", "L"],
)
def test_the_published_sizes_have_as_many_parameters_as_transformers_without_biases(
    shape: tuple[int, int, int], count: int
) -> None:
    """76M, 455M and 1362M in section 3.4 of the paper."""
    width, layers, heads = shape
    config = transformers.ImageGPTConfig(n_embd=width, n_layer=layers, n_head=heads)
    with torch.device("meta"):
        theirs = transformers.ImageGPTForCausalImageModeling(config)
        size = {"width": width, "layers": layers, "heads": heads, "feedforward": 4 * width}
        ours = build_model(**size, colours=512, image_size=(32, 32))
    assert sum(p.numel() for n, p in theirs.named_parameters() if is_ours(n)) == count
    assert sum(p.numel() for p in ours.parameters()) == count


def test_the_first_loss_is_that_of_equal_probabilities() -> None:
    model = build_model(classes=CLASSES)
    outputs = model(images())
    loss = F.cross_entropy(outputs.colours.flatten(0, 1), images().flatten())
    assert float(loss.detach()) == pytest.approx(math.log(COLOURS), abs=1e-6)
    assert not outputs.classes.any()


def test_initial_deviations_are_those_of_the_authors_code() -> None:
    model = build_model(width=96, heads=4, layers=4, feedforward=384, colours=400, image_size=(20, 20))
    block = model.decoder.blocks[0]
    expected = {
        model.embedding.weight: 0.02,
        model.positions.table.weight: 0.01,
        block.attention.in_proj.weight: 96**-0.5,
        block.attention.out_proj.weight: (96 * 4) ** -0.5,
        block.feed_forward.expand.weight: 0.02,
        block.feed_forward.contract.weight: 0.02,
    }
    for parameter, std in expected.items():  # of 9,216 numbers or more: within 5 standard errors
        assert float(parameter.detach().std()) == pytest.approx(std, rel=0.04)
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("position", [0, 5, PIXELS - 1])
def test_a_pixel_changes_no_logits_up_to_its_own(position: int) -> None:
    model = redrawn(build_model())
    changed = images()
    changed[:, position] = (changed[:, position] + 1) % COLOURS
    before, after = model(images()).colours, model(changed).colours
    assert torch.equal(before[:, : position + 1], after[:, : position + 1])
    assert (before != after)[:, position + 1 :].any(-1).all(), "and all later ones"


@torch.no_grad()
def test_a_masked_pixels_colour_changes_nothing_and_every_other_pixels_changes_all_logits() -> None:
    model = redrawn(build_model())
    masked = torch.zeros(2, PIXELS, dtype=torch.bool)
    masked[:, 4] = True
    for position in (4, 9):
        changed = images()
        changed[:, position] = (changed[:, position] + 1) % COLOURS
        differs = (model(images(), masked).colours != model(changed, masked).colours).any(-1)
        assert differs.all() if position == 9 else not differs.any()


@torch.no_grad()
@pytest.mark.parametrize("given", [0, 1, 7])
def test_cached_steps_give_the_logits_of_the_whole_pass(given: int) -> None:
    model, tokens = redrawn(build_model()), images(4)
    whole = model(tokens).colours
    state = model.encode(torch.zeros(4, 0), torch.zeros(4))
    prompt = F.pad(tokens[:, :given], (1, 0), value=COLOURS)
    logits = [model.step(state, prompt if given else prompt[:, 0])]
    logits += [model.step(state, tokens[:, i]) for i in range(given, PIXELS - 1)]
    torch.testing.assert_close(torch.stack(logits, 1), whole[:, given:], **EXACT)


@torch.no_grad()
def test_reordered_states_continue_the_selected_rows() -> None:
    model, tokens, rows = redrawn(build_model()), images(3), torch.tensor([2, 2, 0])
    state = model.encode(torch.zeros(3, 0), torch.zeros(3))
    model.step(state, F.pad(tokens[:, :5], (1, 0), value=COLOURS))
    state = model.reorder(state, rows)
    logits = model.step(state, tokens[rows, 5])
    torch.testing.assert_close(logits, model(tokens[rows]).colours[:, 6], **EXACT)


def test_layers_hold_every_parameter_once() -> None:
    model = build_model(classes=CLASSES)
    for name, _ in model.named_parameters():
        groups = [g for g in model.layers() if any(name == p or name.startswith(f"{p}.") for p in g)]
        assert len(groups) == 1, name


def test_mistakes_and_far_too_large_images_are_reported() -> None:
    with pytest.raises(UserError, match=r"model.width=24 must be divisible by model.heads=5"):
        build_model(heads=5)
    assert build_model().input_advice() == []
    assert build_model().input_summary() == ["12 tokens an image: 3 x 4 pixels of 11 colours"]
    with torch.device("meta"):
        large = build_model(image_size=(224, 224))
    assert "50,176 pixels" in large.input_advice()[0]
