"""Differences between two configs, and which of them make another run."""

import pytest

from common.config.diff import differences, fingerprint, flatten, refuse_changes
from common.config.migrations import CHANGED_CUTS, with_class_keys
from common.errors import UserError

CONFIG = {
    "seed": 0,
    "run_dir": "a",
    "checkpoint": None,
    "model": {"_target_": "x.Y", "blocks": {"dropout": 0.1}},
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.99]},
    "trainer": {"steps": 9, "workers": 2, "micro_batch": None},
}


def changed(**keys: object) -> dict:
    """CONFIG with other values; keys are full keys with two underscores for each dot."""
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in CONFIG.items()}
    for key, value in keys.items():
        *parents, last = key.split("__")
        section = config
        for name in parents:
            section[name] = dict(section[name])
            section = section[name]
        section[last] = value
    return config


def test_every_difference_is_named_with_both_values() -> None:
    altered = changed(seed=1, model__blocks__dropout=0.0, optimizer__extra=3)
    del altered["trainer"]["workers"]
    assert differences(CONFIG, altered) == [
        "seed was 0 and is 1",
        "model.blocks.dropout was 0.1 and is 0.0",
        "trainer.workers was 2 and is None",
        "optimizer.extra was None and is 3",
    ]
    assert flatten(CONFIG)["model.blocks.dropout"] == 0.1


def test_keys_that_do_not_change_what_is_learnt_may_change_and_others_may_not() -> None:
    refuse_changes(
        CONFIG, changed(run_dir="b", trainer__workers=0, trainer__micro_batch=4, trainer__strategy="fsdp"), "x"
    )
    evaluators = [CONFIG | {"task": {"evaluator": name}} for name in ("auto", "pycocotools")]
    refuse_changes(*evaluators, "x")
    assert len({fingerprint(config) for config in [CONFIG | {"task": {}}, *evaluators]}) == 1
    for key in ("seed", "optimizer__lr", "trainer__steps", "model___target_"):
        with pytest.raises(UserError, match=r"^x belongs to another run: .*; resume with the former values, allow"):
            refuse_changes(CONFIG, changed(**{key: 7}), "x")


def test_keys_and_sections_can_be_allowed() -> None:
    altered = changed(optimizer__lr=1.0, model__blocks__dropout=0.5)
    with pytest.raises(UserError, match=r"optimizer\.lr was 0\.001 and is 1\.0"):
        refuse_changes(CONFIG, altered, "x", ["model", "opti", "optimizer.l"])
    refuse_changes(CONFIG, altered, "x", ["model.blocks", "optimizer.lr"])


def test_a_fingerprint_ignores_keys_that_do_not_change_what_is_learnt() -> None:
    assert fingerprint(CONFIG) == fingerprint(changed(run_dir="b", trainer__workers=7))
    others = [changed(seed=1), changed(checkpoint="start.pt"), changed(optimizer__betas=[0.9, 0.98]), changed(seed=0.0)]
    assert len({fingerprint(config) for config in [CONFIG, *others]}) == 5
    assert len(fingerprint(CONFIG)) == 8 and fingerprint(CONFIG) == fingerprint(dict(reversed(CONFIG.items())))


def test_auto_equals_every_precision() -> None:
    bf16, auto, fp32 = ({"trainer": {"precision": name}} for name in ("bf16", "auto", "fp32"))
    assert differences(bf16, auto) == differences(auto, bf16) == []
    assert differences(bf16, fp32) == ["trainer.precision was bf16 and is fp32"]


@pytest.mark.parametrize("target", CHANGED_CUTS)
def test_a_default_cut_has_the_fingerprint_of_the_former_default(target: str) -> None:
    """So a sweep finds the runs that an earlier version began, whose configs lacked the shares."""
    former = {key: value for key, (_, value) in CHANGED_CUTS[target].items() if not key.endswith("share")}
    present = {"val_share": None, **{key: value for key, (value, _) in CHANGED_CUTS[target].items()}}
    fingerprints = [fingerprint({"data": {"_target_": target, **keys}}) for keys in (former, present)]
    assert fingerprints[0] == fingerprints[1] and former and set(present) > set(former)
    assert fingerprint({"data": {"_target_": target, **present, "val_share": 0.2}}) != fingerprints[0]
    other = {"_target_": "mypackage.data.Mine", **present}
    assert fingerprint({"data": other}) != fingerprint({"data": {"_target_": "mypackage.data.Mine", **former}})


def test_a_key_that_a_users_yaml_lacks_counts_as_the_value_that_keeps_the_former_behaviour():
    task = {"_target_": "vit.tasks.classification.Classification", "loss": {"smoothing": 0.1}}
    stored = with_class_keys({"task": task})
    assert stored["task"]["distillation"]["teacher"] is None and "distillation" not in task
    assert differences(stored, {"task": task}) == differences({"task": task}, stored) == []
    stored["task"]["distillation"]["weight"] = 0.25
    assert differences(stored, {"task": task}) == ["task.distillation.weight was 0.25 and is 0.5"]
