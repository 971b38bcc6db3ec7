"""Parameter groups, optimizers against plain update rules, schedules against torch's."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from common.config.check import construct
from common.config.compose import configure
from common.errors import UserError
from common.files import checkpoint
from common.train import optim
from common.train.optim import OptimizerOptions, ScheduleOptions

OPTIONS = OptimizerOptions(
    name="adamw",
    lr=0.1,
    weight_decay=0.3,
    decay_norms=False,
    betas=(0.8, 0.9),
    eps=1e-3,
    momentum=0.7,
    rates={},
    layer_decay=1.0,
    reference_batch=None,
    scaling="linear",
)
SCHEDULE = ScheduleOptions(name="constant", warmup=0, start=0.0, drops=[], factor=0.1, final=0.0, width=None)


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    parts = {
        "body": nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4)),
        "body2": nn.Linear(4, 4),
        "head": nn.Linear(4, 2),
    }
    return nn.ModuleDict(parts).double()


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def groups(optimizer: torch.optim.Optimizer) -> dict[str, tuple[list[str], float, float]]:
    return {g["name"]: (g["param_names"], g["base_lr"], g["weight_decay"]) for g in optimizer.param_groups}


def test_norms_and_biases_are_not_decayed():
    assert groups(optim.build(make_model(), OPTIONS)) == {
        "rest, decay": (["body.0.weight", "body2.weight", "head.weight"], 0.1, 0.3),
        "rest, no decay": (["body.0.bias", "body.1.weight", "body.1.bias", "body2.bias", "head.bias"], 0.1, 0.0),
    }


def test_decay_norms_decays_everything():
    (group,) = optim.build(make_model(), replace(OPTIONS, decay_norms=True)).param_groups
    assert len(group["params"]) == 8 and group["weight_decay"] == 0.3


def test_the_longest_prefix_of_whole_words_sets_the_rate():
    optimizer = optim.build(make_model(), replace(OPTIONS, decay_norms=True, rates={"body": 0.1, "body.1": 2.0}))
    assert groups(optimizer) == {
        "body, decay": (["body.0.weight", "body.0.bias"], pytest.approx(0.01), 0.3),
        "body.1, decay": (["body.1.weight", "body.1.bias"], pytest.approx(0.2), 0.3),
        "rest, decay": (["body2.weight", "body2.bias", "head.weight", "head.bias"], 0.1, 0.3),
    }


def test_a_prefix_that_matches_nothing_is_refused_with_the_nearest_name():
    with pytest.raises(
        UserError, match=r"optimizer\.rates\.bod matches no parameter of the model; did you mean body\?"
    ):
        optim.build(make_model(), replace(OPTIONS, rates={"bod": 0.1}))


def test_frozen_parameters_are_left_out_and_their_prefix_is_no_mistake():
    model = make_model()
    model["body"].requires_grad_(False)
    optimizer = optim.build(model, replace(OPTIONS, rates={"body": 0.1}))
    assert not any(name.startswith("body.") for g in optimizer.param_groups for name in g["param_names"])
    with pytest.raises(UserError, match="frozen"):
        optim.build(model.requires_grad_(False), OPTIONS)


class Layered(nn.Module):
    """A stem, eleven blocks (blocks.1 is a prefix of blocks.10), a head, and a table that does not decay."""

    undecayed = ("table",)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 2)
        self.table = nn.Parameter(torch.zeros(3, 2))
        self.tables = nn.Parameter(torch.zeros(3, 2))
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(11))
        self.head = nn.Linear(2, 2)

    def layers(self) -> list[tuple[str, ...]]:
        return [("stem", "table"), *((f"blocks.{i}",) for i in range(11)), ("head",)]


def test_a_part_inside_names_matches_unless_a_name_begins_with_it():
    """ "0" begins no name of the model, so it matches "body.0"; "body" begins names, so it does not match "x.body"."""
    model = torch.nn.ModuleDict({"body": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))})
    model["x"] = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 2)})
    rates = rates_by_name(optim.build(model, replace(OPTIONS, lr=1.0, rates={"body": 0.5, "1": 0.1, "body.1.bias": 3})))
    assert rates == {
        "body.0.weight": 0.5,
        "body.0.bias": 0.5,
        "body.1.weight": 0.5,
        "body.1.bias": 3.0,
        "x.body.weight": 1.0,
        "x.body.bias": 1.0,
    }


def rates_by_name(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {name: g["base_lr"] for g in optimizer.param_groups for name in g["param_names"]}


def test_rates_decay_by_layer_from_the_output_to_the_input():
    """By hand: 0.1 at the head, half of it in block 10, a quarter in block 9, ..., 2^-12 of it in the stem."""
    rates = rates_by_name(optim.build(Layered(), replace(OPTIONS, layer_decay=0.5)))
    halvings = {"head": 0, "stem": 12, "table": 12, "tables": 0}  # no layer names it: as the output
    halvings |= {"blocks.10": 1, "blocks.9": 2, "blocks.8": 3, "blocks.7": 4, "blocks.6": 5, "blocks.5": 6}
    halvings |= {"blocks.4": 7, "blocks.3": 8, "blocks.2": 9, "blocks.1": 10, "blocks.0": 11}
    assert {*rates} == {name for name, _ in Layered().named_parameters()}
    for name, rate in rates.items():
        part = name if name.startswith("table") else name.rpartition(".")[0]
        assert rate == pytest.approx(0.1 * 0.5 ** halvings[part], rel=1e-12), name


def test_rates_by_layer_and_by_name_multiply_and_weight_decay_is_unchanged():
    options = replace(OPTIONS, layer_decay=0.5, rates={"blocks.10": 3.0})
    optimizer = optim.build(Layered(), options)
    optim.set_rate(optimizer, 0.1)
    by_name = groups(optimizer)
    assert by_name["blocks.10, 1 below the output, decay"] == (["blocks.10.weight"], pytest.approx(0.15), 0.3)
    assert by_name["blocks.10, 1 below the output, no decay"] == (["blocks.10.bias"], pytest.approx(0.15), 0.0)
    assert by_name["rest, 12 below the output, decay"][0] == ["stem.weight"]
    assert by_name["rest, 12 below the output, no decay"][0] == ["table", "stem.bias"]
    assert len(by_name) == len(optimizer.param_groups) == 26
    assert all(g["lr"] == pytest.approx(0.1 * g["base_lr"]) for g in optimizer.param_groups)


def test_undecayed_tables_of_a_model_decay_only_where_everything_does():
    plain = groups(optim.build(Layered(), OPTIONS))
    assert "table" in plain["rest, no decay"][0] and "tables" in plain["rest, decay"][0], "whole words"
    (group,) = optim.build(Layered(), replace(OPTIONS, decay_norms=True)).param_groups
    assert "table" in group["param_names"]


def test_layer_decay_of_a_model_without_layers_is_refused():
    with pytest.raises(
        UserError, match=r"^optimizer\.layer_decay=0\.75: ModuleDict has no method layers\(\).*; set it"
    ):
        optim.build(make_model(), replace(OPTIONS, layer_decay=0.75))


def test_a_layer_decay_of_zero_trains_the_last_layer_alone():
    rates = rates_by_name(optim.build(Layered(), replace(OPTIONS, layer_decay=0.0)))
    assert {name for name, rate in rates.items() if rate} == {"head.weight", "head.bias", "tables"}


@pytest.mark.parametrize(
    ("reference", "scaling", "batch", "expected"),
    [
        (None, "linear", 64, 0.1),
        (None, "sqrt", 64, 0.1),
        (256, "linear", 1024, 0.4),
        (256, "sqrt", 1024, 0.2),
        (512, "linear", 64, 0.0125),
        (512, "sqrt", 128, 0.05),
        (64, "linear", 64, 0.1),
    ],
)
def test_the_rate_is_scaled_to_the_batch(reference, scaling, batch, expected):
    options = replace(OPTIONS, reference_batch=reference, scaling=scaling)
    scaled = optim.scale_to_batch(options, batch)
    assert scaled.lr == pytest.approx(expected, rel=1e-12)
    assert scaled == replace(options, lr=scaled.lr, reference_batch=None), "nothing else changes"
    assert optim.scale_to_batch(scaled, 7) == scaled, "a scaled rate is not scaled again"


def test_setting_the_rate_keeps_the_proportions_of_groups():
    optimizer = optim.build(make_model(), replace(OPTIONS, rates={"body": 0.5}))
    optim.set_rate(optimizer, 0.1)
    optim.set_rate(optimizer, 0.2)
    assert {g["name"].split(",")[0]: g["lr"] for g in optimizer.param_groups} == pytest.approx(
        {"body": 0.01, "rest": 0.02}
    )


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_the_update_is_that_of_the_paper(name):
    """Adam: arXiv:1412.6980, algorithm 1. AdamW: arXiv:1711.05101, algorithm 2 with the rate also on the decay."""
    model = make_model()
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = optim.build(model, replace(OPTIONS, name=name, decay_norms=True))
    first, second = ({n: torch.zeros_like(p) for n, p in expected.items()} for _ in range(2))
    (b1, b2), lr, decay, eps, momentum = OPTIONS.betas, OPTIONS.lr, OPTIONS.weight_decay, OPTIONS.eps, OPTIONS.momentum
    for step in range(1, 6):
        give_gradients(model, seed=step)
        optimizer.step()
        for n, p in model.named_parameters():
            w, gradient = expected[n], p.grad.clone()
            if name == "adamw":
                w -= lr * decay * w
            else:
                gradient += decay * w
            if name == "sgd":
                first[n] = momentum * first[n] + gradient
                w -= lr * first[n]
                continue
            first[n] = b1 * first[n] + (1 - b1) * gradient
            second[n] = b2 * second[n] + (1 - b2) * gradient**2
            w -= lr * (first[n] / (1 - b1**step)) / ((second[n] / (1 - b2**step)).sqrt() + eps)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[n], rtol=0, atol=1e-13)  # float64 rounding of five steps


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_a_gradient_in_another_memory_layout_updates_the_right_elements(name):
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = make_model().to(memory_format=layout)
        optimizer = optim.build(model, replace(OPTIONS, name=name))
        for step in range(3):
            give_gradients(model, seed=step)  # always contiguous
            optimizer.step()
        results.append({n: p.detach().clone() for n, p in model.named_parameters()})
    for n in results[0]:
        torch.testing.assert_close(results[0][n], results[1][n], rtol=0, atol=1e-15)


def torch_rates(make_scheduler, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def rates(options: ScheduleOptions, steps: int) -> list[float]:
    return [optim.rate_factor(options, step, steps) for step in range(steps)]


def after_5_warm_up_steps(make_scheduler):
    def scheduler(optimizer):
        warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.2, total_iters=4)
        return lr_scheduler.SequentialLR(optimizer, [warmup, make_scheduler(optimizer)], milestones=[5])

    return scheduler


@pytest.mark.parametrize(
    ("options", "make_scheduler"),
    [
        (SCHEDULE, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
        (replace(SCHEDULE, name="step", drops=[0.5, 0.8]), lambda o: lr_scheduler.MultiStepLR(o, [20, 32])),
        (replace(SCHEDULE, name="step", drops=[0.8, 0.5]), lambda o: lr_scheduler.MultiStepLR(o, [20, 32])),
        (replace(SCHEDULE, name="cosine"), lambda o: lr_scheduler.CosineAnnealingLR(o, 40)),
        (replace(SCHEDULE, name="cosine", final=0.05), lambda o: lr_scheduler.CosineAnnealingLR(o, 40, eta_min=0.05)),
        (
            replace(SCHEDULE, name="linear", final=0.05),
            lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.05, total_iters=40),
        ),
        (
            replace(SCHEDULE, name="linear", warmup=5),
            after_5_warm_up_steps(lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=35)),
        ),
        (replace(SCHEDULE, warmup=5), after_5_warm_up_steps(lambda o: lr_scheduler.ConstantLR(o, factor=1.0))),
        (
            replace(SCHEDULE, name="cosine", warmup=5),
            after_5_warm_up_steps(lambda o: lr_scheduler.CosineAnnealingLR(o, 35)),
        ),
        (
            replace(SCHEDULE, name="step", warmup=5, drops=[0.5]),  # drops count from the start of the run
            after_5_warm_up_steps(lambda o: lr_scheduler.MultiStepLR(o, [15])),
        ),
    ],
)
def test_schedules_equal_those_of_torch(options, make_scheduler):
    assert rates(options, 40) == pytest.approx(torch_rates(make_scheduler, 40), abs=1e-12)


def test_a_rounded_fraction_drops_at_the_nearest_step():
    factors = rates(replace(SCHEDULE, name="step", drops=[0.6667]), 300)
    assert [step for step in range(1, 300) if factors[step] != factors[step - 1]] == [200]


def test_warm_up_begins_above_zero_and_ends_at_one():
    factors = rates(replace(SCHEDULE, warmup=4), 6)
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_warm_up_may_be_a_part_of_the_run():
    assert optim.warm_up(replace(SCHEDULE, warmup=0.1), 40) == 4
    assert [optim.warm_up(replace(SCHEDULE, warmup=part), 300) for part in (0.0165, 0.0167)] == [5, 5], "the nearest"
    for name in ("constant", "cosine"):
        part, whole = (replace(SCHEDULE, name=name, warmup=warmup) for warmup in (0.1, 4))
        assert rates(part, 40) == rates(whole, 40)
    assert rates(replace(SCHEDULE, warmup=0.1), 80)[:8] == [n / 8 for n in range(1, 9)]


def test_an_integer_is_a_number_of_steps_and_a_float_a_fraction_of_the_run():
    assert rates(replace(SCHEDULE, warmup=1), 4) == [1.0] * 4
    assert rates(replace(SCHEDULE, warmup=1.0), 4) == [0.25, 0.5, 0.75, 1.0]
    assert rates(replace(SCHEDULE, warmup=0.0), 4) == rates(replace(SCHEDULE, warmup=0.1), 4) == [1.0] * 4


def test_warm_up_rises_from_its_start():
    assert rates(replace(SCHEDULE, warmup=4, start=0.2), 5) == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates(replace(SCHEDULE, warmup=4, start=1.0), 5) == [1.0] * 5
    assert rates(replace(SCHEDULE, name="cosine", start=0.5), 9) == rates(replace(SCHEDULE, name="cosine"), 9)


@pytest.mark.parametrize("warmup", [0.25, 10])
def test_a_cosine_falls_over_the_steps_after_the_warm_up(warmup):
    factors = rates(replace(SCHEDULE, name="cosine", warmup=warmup, start=0.1, final=0.05), 40)
    decay = torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, 30, eta_min=0.05), 30)
    assert factors[9] == 1.0 and factors[10:] == pytest.approx(decay, abs=1e-12)
    assert factors[0] == pytest.approx(0.1 + 0.9 / 10)


@pytest.mark.parametrize("name", ["constant", "step", "cosine", "linear", "inverse_sqrt"])
def test_a_run_shorter_than_its_warm_up_still_has_finite_rates(name):
    assert all(0 < r < 1 and math.isfinite(r) for r in rates(replace(SCHEDULE, name=name, warmup=100, drops=[0.5]), 10))


def test_the_inverse_square_root_starts_where_its_warm_up_ends():
    """By hand for 4 updates of warm-up: quarters up to 1, then the square roots of 4/5, 4/6, ..., 4/16."""
    factors = rates(replace(SCHEDULE, name="inverse_sqrt", warmup=4), 16)
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:6] == pytest.approx([0.894427191, 0.816496581]) and factors[15] == pytest.approx(0.5)
    assert rates(replace(SCHEDULE, name="inverse_sqrt", warmup=4, start=0.2), 16)[:4] == pytest.approx(
        [0.4, 0.6, 0.8, 1]
    )


def test_the_inverse_square_root_without_warm_up_starts_at_one():
    factors = rates(replace(SCHEDULE, name="inverse_sqrt"), 9)
    assert (factors[0], factors[3], factors[8]) == pytest.approx((1.0, 1 / 2, 1 / 3))
    assert factors == rates(replace(SCHEDULE, name="inverse_sqrt", warmup=1), 9)


NOAM = replace(SCHEDULE, name="noam", warmup=4000, width=512)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, 1.74693e-7),  # 1 / (22.62742 x 252,982.2): square roots of 512 and of 4000 cubed
        (2000, 3.49386e-4),  # half way up
        (4000, 6.98771e-4),  # 1 / (22.62742 x 63.24555)
        (16000, 3.49386e-4),  # four times the updates, half the rate
        (100000, 1.39754e-4),  # 1 / (22.62742 x 316.2278), the published length
    ],
)
def test_noam_is_the_published_equation(number, expected):
    """Vaswani et al. 2017, equation 3, with width 512 and 4000 updates of warm-up."""
    assert optim.rate_factor(NOAM, number - 1, 100_000) == pytest.approx(expected, rel=1e-5)


def test_noam_has_a_warm_up_of_its_own():
    assert rates(replace(NOAM, start=0.5), 5000) == rates(NOAM, 5000), "start has no effect"
    factors = rates(replace(NOAM, warmup=0.5, width=4), 8)
    assert factors[:4] == pytest.approx([1 / 16, 2 / 16, 3 / 16, 4 / 16]) and factors[7] == pytest.approx(0.5 / 8**0.5)
    assert rates(replace(NOAM, warmup=0.01, width=4), 9)[::8] == pytest.approx([1 / 2, 1 / 6]), "at least one update"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"width": None},
            r"^schedule\.width=null: noam divides by the square root of the model's width; give that width\.$",
        ),
        ({"warmup": 0}, r"^schedule\.warmup=0: noam needs at least 1 step of warm-up; give 4000 .*\.$"),
        ({"warmup": 0.0}, r"^schedule\.warmup=0\.0: noam needs at least 1 step"),
    ],
)
def test_noam_without_width_or_warm_up_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        replace(NOAM, **values)


@pytest.mark.parametrize("steps", [1, 3, 40])
@pytest.mark.parametrize("warmup", [0, 1, 5, 0.25, 1.0])
@pytest.mark.parametrize("name", ["constant", "step", "cosine", "linear", "inverse_sqrt", "noam"])
def test_the_peak_factor_is_the_maximum_over_the_run(name, warmup, steps):
    options = replace(SCHEDULE, name=name, warmup=warmup or (1 if name == "noam" else 0), drops=[0.1, 0.5], width=16)
    assert optim.peak_rate_factor(options, steps) == max(rates(options, steps))


def test_noam_uses_the_models_width_which_the_config_resolves():
    config = configure(
        "train", ["model=vit", "schedule=noam", "optimizer=adam_transformer", "model.width=48", "model.heads=2"]
    )
    assert config["schedule"]["width"] == 48, "resolved, as in config.yaml and in checkpoints"
    assert construct(ScheduleOptions, config["schedule"]) == replace(NOAM, width=48, factor=1.0, final=1.0)


@pytest.mark.parametrize(
    ("optimizer", "schedule", "lr", "decay"),
    [("adam_transformer", "noam", 1.0, 0.0), ("adam_fairseq", "inverse_sqrt", 5e-4, 1e-4)],
)
def test_the_translators_recipes_are_the_published_ones(optimizer, schedule, lr, decay):
    """Vaswani et al. 2017, section 5.3; fairseq's README on IWSLT14, whose adam is AdamW over all parameters."""
    config = configure("train", ["model=vit", f"schedule={schedule}", f"optimizer={optimizer}"])
    options = construct(OptimizerOptions, config["optimizer"])
    assert (options.lr, options.weight_decay, options.betas, options.reference_batch) == (lr, decay, (0.9, 0.98), None)
    assert (options.name, options.eps, options.decay_norms) == (
        ("adam", 1e-9, False) if schedule == "noam" else ("adamw", 1e-8, True)
    )
    assert config["schedule"]["warmup"] == 4000


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_a_restored_optimizer_continues_bit_for_bit(name, tmp_path):
    options = replace(OPTIONS, name=name, rates={"body": 0.1})
    whole, first = make_model(), make_model()
    whole_optimizer, first_optimizer = optim.build(whole, options), optim.build(first, options)
    for step in range(3):
        for model, optimizer in ((whole, whole_optimizer), (first, first_optimizer)):
            give_gradients(model, step)
            optimizer.step()
    checkpoint.save(tmp_path / "a.pt", {"model": first.state_dict(), "optimizer": optim.state(first_optimizer)})
    content = checkpoint.load(tmp_path / "a.pt")
    second = make_model(seed=1)
    second.load_state_dict(content["model"])
    second_optimizer = optim.build(second, options)
    optim.restore(second_optimizer, content["optimizer"])
    for step in range(3, 6):
        for model, optimizer in ((whole, whole_optimizer), (second, second_optimizer)):
            give_gradients(model, step)
            optimizer.step()
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_restored_state_is_matched_by_name_and_keeps_the_new_options():
    model = make_model()
    optimizer = optim.build(model, OPTIONS)
    give_gradients(model, 0)
    optimizer.step()
    second = optim.build(model, replace(OPTIONS, lr=0.5, decay_norms=True, rates={"head": 0.1}))
    optim.restore(second, optim.state(optimizer))
    assert [(g["name"], g["lr"]) for g in second.param_groups] == [("rest, decay", 0.5), ("head, decay", 0.05)]
    for p in model.parameters():
        assert torch.equal(optimizer.state[p]["exp_avg"], second.state[p]["exp_avg"])
        assert optimizer.state[p]["exp_avg"] is not second.state[p]["exp_avg"]


def test_a_restored_state_has_the_memory_layout_of_its_parameter():
    model = make_model()
    optimizer = optim.build(model, OPTIONS)
    give_gradients(model, 0)
    optimizer.step()
    restored = optim.build(model.to(memory_format=torch.channels_last), OPTIONS)
    optim.restore(restored, optim.state(optimizer))
    for p in model.parameters():
        assert restored.state[p]["exp_avg"].stride() == p.stride()


def test_a_parameter_that_never_had_a_gradient_has_no_state():
    model = make_model()
    optimizer = optim.build(model, OPTIONS)
    model["head"].weight.grad = torch.ones_like(model["head"].weight)
    optimizer.step()
    assert list(optim.state(optimizer)) == ["head.weight"]
    restored = optim.build(model, OPTIONS)
    optim.restore(restored, optim.state(optimizer))
    assert list(optim.state(restored)) == ["head.weight"]


@pytest.mark.parametrize("head", [nn.Linear(4, 3).double(), nn.Identity()])
def test_another_models_state_is_refused_with_the_parameter(head):
    model = make_model()
    optimizer = optim.build(model, OPTIONS)
    give_gradients(model, 0)
    optimizer.step()
    saved = optim.state(optimizer)
    model["head"] = head
    with pytest.raises(UserError, match=r"does not match this run at head\.weight"):
        optim.restore(optim.build(model, OPTIONS), saved)


@pytest.mark.parametrize(("name", "momentum"), [("adamw", 0.0), ("adam", 0.0), ("sgd", 0.9), ("sgd", 0.0)])
def test_a_state_that_lacks_what_the_optimizer_continues_from_is_refused(name, momentum, tmp_path):
    model = make_model()
    optimizer = optim.build(model, replace(OPTIONS, name=name, momentum=momentum))
    give_gradients(model, 0)
    optimizer.step()
    saved, file = optim.state(optimizer), tmp_path / "x.pt"
    optim.refuse_incomplete(optimizer, saved, file)
    optim.refuse_incomplete(optimizer, {}, file, may_be_empty=True)
    if name == "sgd" and not momentum:
        optim.refuse_incomplete(optimizer, {}, file)  # it has no state
        return
    first, values = next(iter(saved.items()))
    with pytest.raises(UserError, match=r"x\.pt holds an optimizer state without everything"):
        optim.refuse_incomplete(optimizer, {}, file)
    for key in values:
        reduced = {first: {other: value for other, value in values.items() if other != key}}
        with pytest.raises(UserError, match=f"without {key} of {first},"):
            optim.refuse_incomplete(optimizer, reduced, file, may_be_empty=True)
